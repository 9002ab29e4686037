// entropy_probe.cu -- final norm + unembedding + statistics of the softmax, for a few rows of one or of several layers, without ever
// writing logits: over the vocabulary (three launches) or over a handful of candidate tokens (one).
#include "gemm.cuh"
#include "softmax_part.cuh"

namespace {

// entropy_probe
//   h[r] = round_T(x[r] * rsqrt(mean(x[r]^2) + eps) * norm_weight), or round_T(x[r])
//   l[r, v] = sum_k h[r, k] w[v, k];  m = max_v l,  Z = sum_v e^(l - m),  p = e^(l - m) / Z
//   stats: argmax (lowest id), m, lse = m + ln Z, entropy = ln Z - sum_v (l - m) e^(l - m) / Z, top1 = 1 / Z, m - second largest
//   chosen_logprob[r] = l[r, chosen[r]] - lse, -inf where chosen is not among the outputs
//
//   x               [num_rows, hidden]  f32  read
//   norm_weight     [hidden]            f32  read, may be null
//   w               [vocab, hidden]     T    read once per 64 rows; with candidates only their rows
//   candidates      [num_candidates]    u32  read, may be null; ascending
//   chosen          [num_rows]          u32  read, may be null
//   stats           [num_rows]               write;  chosen_logprob [num_rows] f32 write, may be null
//
// Work      vocabulary: normalise (CTA = row), probe (CTA = 256 outputs x 64, 32 or 16 rows: 8 warps of 32 outputs on tensor cores; w and h
//           come through two stages of 64 k in shared memory; the tile of logits replaces them there and a warp takes a row's statistics),
//           merge (warp = row). The last arriver of the probe would have to merge a few hundred tiles of every row by itself; a
//           third launch costs less. Row tiles are the fast grid axis: those of the same outputs meet in L2.
//           candidates: CTA = row, warp = candidate, lanes along k.
// Numerics  f32 sums, k ascending. Z is kept as Z - 1, without the largest term: ln Z = log1p(Z - 1) and the weighted sum then keep their
//           relative precision however peaked the row is. Tiles are merged in a fixed order; a row's bits do not depend on other rows.
// Traffic   2 vocab * hidden bytes per 64 rows (4 for f32, per 16 rows), + up to a quarter of it for h, from L2;
//           32 bytes per row and tile.
// Bound     memory up to 64 rows: 64 FLOP per byte, a third of what tensor cores need. Not measured.
// Limits    hidden % 8 == 0 (f32: % 4), hidden > 0; x, norm_weight, w, workspace aligned to 16 bytes; vocab < 2^24;
//           candidates: at most 1024, hidden <= 24576.
// Oracle    testing::entropy_probe.   Bench  rksc-run bench kernels --op entropy_probe

constexpr uint32_t kOutputs = 256;  // of a CTA
constexpr uint32_t kStageK = 64;    // k of a stage: 128 bytes of a row
constexpr uint32_t kStages = 2;
// CTAs of an SM: two where its shared memory holds them (72 to 80 KiB each), which leaves a thread 128 registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kCtasPerSm = 1;
#else
constexpr int kCtasPerSm = 2;
#endif
constexpr uint32_t kRowWords = kStageK / 2;
constexpr uint32_t kThreads = 256, kWarps = kThreads / 32;
// Floats of a row of logits in shared memory: 4 more than there are, so that the four rows a warp writes at a time (2t) are in
// different banks.
constexpr uint32_t kLogitStride = kOutputs + 4;
constexpr uint32_t kMaxCandidates = 1024;
constexpr uint32_t kRowsF32 = 16;
// A workspace may be shared with linear, which keeps arrival counters at its start.
constexpr size_t kReserved = kCounterBytes;

// ---- workspace ------------------------------------------------------------------------------------------------------------------

struct Workspace {
  size_t parts, chosen, bytes;  // byte offsets; h, [num_rows, hidden] T, comes first
};
__host__ __device__ inline Workspace workspace_of(uint32_t num_rows, uint32_t hidden, uint32_t num_outputs) {
  const size_t tiles = (num_outputs + kOutputs - 1) / kOutputs;
  Workspace s;
  s.parts = kReserved + (static_cast<size_t>(num_rows) * hidden * 4 + 15) / 16 * 16;  // T may be f32
  s.chosen = s.parts + static_cast<size_t>(num_rows) * tiles * 32;
  s.bytes = s.chosen + static_cast<size_t>(num_rows) * 4;
  return s;
}
template <typename T, typename P>
RKSC_DEVICE gptr<T> at_byte(P* workspace, size_t offset) {
  return global<T>(static_cast<unsigned char*>(workspace) + offset);
}

// ---- what all ways end in -----------------------------------------------------------------------------------------------------------

// What a row's parts amount to; by one thread. `chosen_logit` is read only where a log-probability is wanted.
RKSC_DEVICE void write_stats(const rksc_entropy_probe_params& p, uint32_t row, const Part& part, uint32_t argmax, bool single,
                             float chosen_logit) {
  const float ln_z = log1pf(part.rest), top1 = 1.0f / (1.0f + part.rest);
  const rksc_statistics none{0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0};
  const rksc_statistics stats{argmax, part.max, part.max + ln_z, fmaxf(ln_z - part.weighted * top1, 0.0f), top1,
                              single ? 0.0f : part.max - part.second, 1};
  global<rksc_statistics>(p.stats)[row] = part.finite != 0 ? stats : none;
  // Differences before sums: a sure token keeps its small log-probability.
  if (p.chosen_logprob != nullptr) global<float>(p.chosen_logprob)[row] = (chosen_logit - part.max) - ln_z;
}

// ---- normalise ------------------------------------------------------------------------------------------------------------------

// 1 / rms of row x, the same in every thread; 1 without a norm.
RKSC_DEVICE float row_scale(gptr<const float> x, uint32_t hidden, float eps, bool has_norm, smem<float> scratch) {
  if (!has_norm) return 1.0f;
  float squares = 0.0f;
  for (uint32_t k = 4 * threadIdx.x; k < hidden; k += 4 * kThreads) {
    const vec<float, 4> v = load_vec<4>(x + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) squares = fmaf(v[i], v[i], squares);
  }
  return rsqrtf(cta_sum(squares, scratch) / static_cast<float>(hidden) + eps);
}
// Elements k .. k + 3 of h.
template <typename T>
RKSC_DEVICE vec<T, 4> normed(gptr<const float> x, gptr<const float> weight, bool has_norm, float scale, uint32_t k) {
  const vec<float, 4> v = load_vec<4>(x + k);
  vec<float, 4> n{{1.0f, 1.0f, 1.0f, 1.0f}};
  if (has_norm) n = load_vec<4>(weight + k);
  vec<T, 4> h;
#pragma unroll
  for (int i = 0; i < 4; ++i) h[i] = from_float<T>(v[i] * scale * n[i]);
  return h;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) probe_normalise_kernel(const __grid_constant__ rksc_entropy_probe_params p) {
  RKSC_SHARED(float, scratch, 32);
  const bool has_norm = p.norm_weight != nullptr;
  gptr<const float> x = global<const float>(p.x) + static_cast<uint64_t>(blockIdx.x) * p.hidden;
  gptr<const float> weight = global<const float>(p.norm_weight);
  gptr<T> h = at_byte<T>(p.workspace, kReserved) + static_cast<uint64_t>(blockIdx.x) * p.hidden;
  const float scale = row_scale(x, p.hidden, p.eps, has_norm, scratch);
  for (uint32_t k = 4 * threadIdx.x; k < p.hidden; k += 4 * kThreads) store_vec(h + k, normed<T>(x, weight, has_norm, scale, k));
  // Where the chosen token is no output nobody else writes its logit.
  if (threadIdx.x == 0) at_byte<float>(p.workspace, workspace_of(p.num_rows, p.hidden, p.vocab).chosen)[blockIdx.x] = -kInfinity;
}

// ---- probe ------------------------------------------------------------------------------------------------------------------------

// Takes the statistics of the CTA's logits, [rows, kLogitStride] in shared memory, a warp a row. All threads; logits are visible.
RKSC_DEVICE void tile_stats(const rksc_entropy_probe_params& p, smem<const float> logits, uint32_t first_row, uint32_t num_rows) {
  const uint32_t lane = threadIdx.x % 32, tile = blockIdx.y, first = tile * kOutputs;
  const uint32_t count = min(kOutputs, p.vocab - first);
  const Workspace at = workspace_of(p.num_rows, p.hidden, p.vocab);
  for (uint32_t r = threadIdx.x / 32; r < num_rows; r += kWarps) {
    const Part part = logits_part(logits + r * kLogitStride, count, first);
    if (lane != 0) continue;
    const uint32_t row = first_row + r;
    gptr<float> out = at_byte<float>(p.workspace, at.parts) + (static_cast<uint64_t>(row) * gridDim.y + tile) * 8;
    store_vec(out, vec<float, 4>{{part.max, part.second, part.rest, part.weighted}});
    store_vec(out + 4, vec<float, 4>{{__uint_as_float(part.idx), __uint_as_float(part.finite), 0.0f, 0.0f}});
    if (p.chosen == nullptr) continue;
    const uint32_t chosen = global<const uint32_t>(p.chosen)[row];
    if (chosen - first < count) {
      const float logit = logits[r * kLogitStride + (chosen - first)];
      at_byte<float>(p.workspace, at.chosen)[row] = logit;
    }
  }
}

// One stage holds 64 k of the CTA's outputs and rows, [kOutputs + rows, 8 pieces of 16 bytes]. Odd rows have the halves of their
// pieces swapped: eight lanes then read four pieces each of two neighbouring rows from 32 different banks. As in linear.cu a lane's
// 16 bytes serve two k-steps.
template <typename T, int kTiles>
struct ProbeTile {
  static constexpr uint32_t kRows = 8 * kTiles, kStageWords = (kOutputs + kRows) * kRowWords;
  static constexpr uint32_t kStageBytes = kStages * kStageWords * 4, kLogitBytes = kRows * kLogitStride * 4;
  static constexpr uint32_t kBytes = kStageBytes > kLogitBytes ? kStageBytes : kLogitBytes;

  smem<uint32_t> stages;
  gptr<const uint32_t> w, h;
  uint32_t first_output, first_row, num_outputs, num_rows, row_words;

  RKSC_DEVICE static uint32_t word_of(uint32_t row, uint32_t piece) { return row * kRowWords + 4 * (piece ^ (row % 2 * 4)); }

  // Sends for stage `idx` (64 k from idx * 64): zeros past the end of k, and rows past the last repeat it.
  RKSC_DEVICE void fetch(uint32_t idx) {
    const uint32_t piece = threadIdx.x % 8, word = idx * kRowWords + 4 * piece;
    const bool inside = word < row_words;
    smem<uint32_t> stage = stages + idx % kStages * kStageWords;
#pragma unroll
    for (uint32_t i = 0; i < kOutputs; i += kThreads / 8) {
      const uint32_t r = i + threadIdx.x / 8, output = min(first_output + r, num_outputs - 1);
      cp_async_16<uint32_t>(stage + word_of(r, piece), w + (static_cast<uint64_t>(output) * row_words + (inside ? word : 0)), inside);
    }
#pragma unroll
    for (uint32_t i = 0; i < kRows; i += kThreads / 8) {
      const uint32_t r = i + threadIdx.x / 8, row = min(first_row + r, num_rows - 1);
      // 16 rows are half of what the threads cover.
      if (r >= kRows) continue;
      cp_async_16<uint32_t>(stage + word_of(kOutputs + r, piece), h + (static_cast<uint64_t>(row) * row_words + (inside ? word : 0)),
                            inside);
    }
  }

  RKSC_DEVICE void multiply(FragC (&acc)[2][kTiles], uint32_t idx) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    smem<const uint32_t> stage = stages + idx % kStages * kStageWords;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      // Eight rows further down a piece is where it is here: g's parity is theirs.
      smem<const uint32_t> outputs = stage + word_of(32 * warp + g, 4 * j + t), rows = stage + word_of(kOutputs + g, 4 * j + t);
      vec<uint32_t, 4> a[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) a[i] = load_vec<4>(outputs + 8 * i * kRowWords);
#pragma unroll
      for (uint32_t n = 0; n < kTiles; ++n) {
        const vec<uint32_t, 4> b = load_vec<4>(rows + 8 * n * kRowWords);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const FragA frag{{a[2 * m][2 * step], a[2 * m + 1][2 * step], a[2 * m][2 * step + 1], a[2 * m + 1][2 * step + 1]}};
            mma_m16n8k16<T>(acc[m][n], frag, FragB{{b[2 * step], b[2 * step + 1]}});
          }
        }
      }
    }
  }
};

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) probe_kernel(const __grid_constant__ rksc_entropy_probe_params p) {
  using Tile = ProbeTile<T, kTiles>;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  Tile tile;
  tile.stages = dynamic_shared<uint32_t>(0);
  tile.w = global<const uint32_t>(p.w);
  tile.h = at_byte<const uint32_t>(p.workspace, kReserved);
  tile.first_output = blockIdx.y * kOutputs;
  tile.first_row = blockIdx.x * Tile::kRows;
  tile.num_outputs = p.vocab;
  tile.num_rows = p.num_rows;
  tile.row_words = p.hidden / 2;
  FragC acc[2][kTiles];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) acc[m][n] = FragC{};
  }

  const uint32_t num_stages = div_up_device(p.hidden, kStageK);
#pragma unroll
  for (uint32_t i = 0; i < kStages; ++i) {
    if (i < num_stages) tile.fetch(i);
    cp_async_commit();
  }
  for (uint32_t i = 0; i < num_stages; ++i) {
    // Stage i has arrived, for all threads once all have waited.
    cp_async_wait<kStages - 1>();
    __syncthreads();
    tile.multiply(acc, i);
    // All warps are done with the stage.
    __syncthreads();
    if (i + kStages < num_stages) tile.fetch(i + kStages);
    cp_async_commit();
  }
  // The last barrier above also frees the stages for the logits: no group is under way.
  cp_async_wait<0>();
  smem<float> logits = dynamic_shared<float>(0);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[(8 * n + 2 * t + i % 2) * kLogitStride + 32 * warp + 16 * m + g + i / 2 * 8] = acc[m][n].v[i];
      }
    }
  }
  __syncthreads();
  tile_stats(p, logits, tile.first_row, min(Tile::kRows, p.num_rows - tile.first_row));
}

// f32, on CUDA cores: thread = output, h of 16 rows through shared memory.
__global__ void __launch_bounds__(kThreads) probe_f32_kernel(const __grid_constant__ rksc_entropy_probe_params p) {
  constexpr uint32_t kChunk = 128;
  RKSC_SHARED(float, rows, kRowsF32 * kChunk);
  RKSC_SHARED(float, logits, kRowsF32 * kLogitStride);
  const uint32_t first_row = blockIdx.x * kRowsF32, output = min(blockIdx.y * kOutputs + threadIdx.x, p.vocab - 1);
  gptr<const float> w = global<const float>(p.w) + static_cast<uint64_t>(output) * p.hidden;
  gptr<const float> h = at_byte<const float>(p.workspace, kReserved);
  float acc[kRowsF32] = {};
  for (uint32_t start = 0; start < p.hidden; start += kChunk) {
    const uint32_t width = min(kChunk, p.hidden - start);
    for (uint32_t i = threadIdx.x; i < kRowsF32 * kChunk / 4; i += kThreads) {
      const uint32_t k = i % (kChunk / 4) * 4, row = min(first_row + i / (kChunk / 4), p.num_rows - 1);
      if (k < width) store_vec(rows + 4 * i, load_vec<4>(h + (static_cast<uint64_t>(row) * p.hidden + start + k)));
    }
    __syncthreads();
    for (uint32_t k = 0; k < width; k += 4) {
      const vec<float, 4> a = load_vec<4>(w + (start + k));
#pragma unroll
      for (uint32_t r = 0; r < kRowsF32; ++r) {
        const vec<float, 4> b = load_vec<4>(rows + (r * kChunk + k));
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[r] = fmaf(a[i], b[i], acc[r]);
      }
    }
    // The next chunk overwrites the rows.
    __syncthreads();
  }
#pragma unroll
  for (uint32_t r = 0; r < kRowsF32; ++r) logits[r * kLogitStride + threadIdx.x] = acc[r];
  __syncthreads();
  tile_stats(p, logits, first_row, min(kRowsF32, p.num_rows - first_row));
}

// Merges a row's tiles, each lane every 32nd in ascending order, then the lanes by butterfly.
__global__ void __launch_bounds__(32) probe_merge_kernel(const __grid_constant__ rksc_entropy_probe_params p) {
  const uint32_t row = blockIdx.x, tiles = div_up_device(p.vocab, kOutputs);
  const Workspace at = workspace_of(p.num_rows, p.hidden, p.vocab);
  gptr<const float> parts = at_byte<const float>(p.workspace, at.parts) + static_cast<uint64_t>(row) * tiles * 8;
  Part part = empty_part();
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < tiles; i += 32) {
    const vec<float, 4> a = load_vec<4>(parts + 8 * i), b = load_vec<4>(parts + (8 * i + 4));
    part = merge(part, Part{a[0], a[1], a[2], a[3], __float_as_uint(b[0]), __float_as_uint(b[1])});
  }
  part = warp_merge(part);
  if (threadIdx.x != 0) return;
  const float chosen = at_byte<const float>(p.workspace, at.chosen)[row];
  write_stats(p, row, part, part.idx, p.vocab == 1, chosen);
}

// ---- candidates ---------------------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) probe_candidates_kernel(const __grid_constant__ rksc_entropy_probe_params p) {
  RKSC_SHARED(float, scratch, 32);
  RKSC_SHARED(float, logits, kMaxCandidates);
  smem<float> h = dynamic_shared<float>(0);  // [hidden]
  const uint32_t lane = threadIdx.x % 32, row = blockIdx.x;
  const bool has_norm = p.norm_weight != nullptr;
  gptr<const float> x = global<const float>(p.x) + static_cast<uint64_t>(row) * p.hidden;
  gptr<const float> weight = global<const float>(p.norm_weight);
  gptr<const uint32_t> candidates = global<const uint32_t>(p.candidates);
  gptr<const T> w = global<const T>(p.w);
  const float scale = row_scale(x, p.hidden, p.eps, has_norm, scratch);
  for (uint32_t k = 4 * threadIdx.x; k < p.hidden; k += 4 * kThreads) {
    const vec<T, 4> v = normed<T>(x, weight, has_norm, scale, k);
    store_vec(h + k, vec<float, 4>{{to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3])}});
  }
  __syncthreads();
  for (uint32_t c = threadIdx.x / 32; c < p.num_candidates; c += kWarps) {
    const uint32_t id = candidates[c];
    gptr<const T> w_row = w + static_cast<uint64_t>(id) * p.hidden;
    float sum = 0.0f;
#pragma unroll 4
    for (uint32_t k = kVec<T> * lane; k < p.hidden; k += kVec<T> * 32) {
      const vec<T, kVec<T>> a = load_vec<kVec<T>>(w_row + k);
#pragma unroll
      for (int i = 0; i < kVec<T>; i += 4) {
        const vec<float, 4> b = load_vec<4>(h + (k + i));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(to_float(a[i + e]), b[e], sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) logits[c] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const Part part = logits_part(logits, p.num_candidates, 0);
  if (lane != 0) return;
  float chosen_logit = -kInfinity;
  if (p.chosen != nullptr) {
    const uint32_t chosen = global<const uint32_t>(p.chosen)[row];
    for (uint32_t c = 0; c < p.num_candidates; ++c) {
      const uint32_t id = candidates[c];
      if (id == chosen) chosen_logit = logits[c];
    }
  }
  // No index where nothing compares, that is with NaN alone; the row is then not finite.
  const uint32_t argmax = candidates[min(part.idx, p.num_candidates - 1)];
  write_stats(p, row, part, argmax, p.num_candidates == 1, chosen_logit);
}

// ---- launch -------------------------------------------------------------------------------------------------------------------------

template <typename T, int kTiles>
int32_t launch_probe(const rksc_entropy_probe_params& p, rksc_stream stream) {
  const dim3 grid(div_up(p.num_rows, 8 * kTiles), div_up(p.vocab, kOutputs));
  return launch(probe_kernel<T, kTiles>, grid, dim3(kThreads), ProbeTile<T, kTiles>::kBytes, stream, p);
}

// The smallest tile that holds the rows, 64 where none does: a pass over w for each.
template <typename T>
int32_t launch_probe_tile(const rksc_entropy_probe_params& p, rksc_stream stream) {
  if (p.num_rows <= 16) return launch_probe<T, 2>(p, stream);
  if (p.num_rows <= 32) return launch_probe<T, 4>(p, stream);
  return launch_probe<T, 8>(p, stream);
}

int32_t launch_vocabulary(const rksc_entropy_probe_params& p, rksc_stream stream) {
  int32_t code = RKSC_DISPATCH_DTYPE(p.dtype, T, [&] {
    return launch(probe_normalise_kernel<T>, dim3(p.num_rows), dim3(kThreads), 0, stream, p);
  });
  if (code != 0) return code;
  if (p.dtype == RKSC_F32) {
    const dim3 grid(div_up(p.num_rows, kRowsF32), div_up(p.vocab, kOutputs));
    code = launch(probe_f32_kernel, grid, dim3(kThreads), 0, stream, p);
  } else {
    code = RKSC_DISPATCH_DTYPE_16(p.dtype, T, [&] { return launch_probe_tile<T>(p, stream); });
  }
  if (code != 0) return code;
  return launch(probe_merge_kernel, dim3(p.num_rows), dim3(32), 0, stream, p);
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------------------------

extern "C" size_t RKSC_FN(entropy_probe_workspace_bytes)(uint32_t num_rows, uint32_t hidden, uint32_t num_outputs) {
  return workspace_of(num_rows, hidden, num_outputs).bytes;
}

extern "C" int32_t RKSC_FN(entropy_probe)(const rksc_entropy_probe_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype <= RKSC_F16);
  RKSC_REQUIRE(p->hidden > 0 && p->hidden % (p->dtype == RKSC_F32 ? 4 : 8) == 0);
  RKSC_REQUIRE(p->vocab > 0 && p->vocab < 1u << 24);
  RKSC_REQUIRE(p->chosen_logprob == nullptr || p->chosen != nullptr);
  if (p->num_rows == 0) return 0;
  if (p->candidates == nullptr) {
    RKSC_REQUIRE(p->workspace != nullptr);
    return launch_vocabulary(*p, stream);
  }
  RKSC_REQUIRE(p->num_candidates > 0 && p->num_candidates <= kMaxCandidates && p->hidden <= 24576);
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    return launch(probe_candidates_kernel<T>, dim3(p->num_rows), dim3(kThreads), p->hidden * 4, stream, *p);
  });
}

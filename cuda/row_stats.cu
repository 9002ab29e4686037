// row_stats.cu -- one sweep over logits rows: largest, second largest, ln sum exp, entropy, whether all is finite.
#include "common.cuh"

namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
// Logits a thread holds in registers between the two passes, and a CTA with it. Derived, not measured: 16 KiB a CTA in four
// 16-byte loads a thread; 38 CTAs a row of 152064, so that one row reaches a quarter of the GPU and four rows all of it.
constexpr uint32_t kHeld = 16;
constexpr uint32_t kSlice = kThreads * kHeld;

// z below which e^z and z e^z are 0, and which keeps 0 * infinity away.
constexpr float kFloor = -1000.0f;

// What a slice, or a row, says of itself. The largest logit's own term, e^0 = 1, is kept out of `rest`: with it a sum of f32
// could not tell 1 from 1 + 1e-9, and the entropy of a peaked row lives there.
struct Part {
  float max, second;     // second == max where the largest occurs twice
  float rest, weighted;  // sum of e^z and of z e^z over all but argmax, z = x - max
  uint32_t argmax, finite;
};

struct Top {
  float max, second;
  uint32_t argmax;
};

RKSC_DEVICE Top merge(const Top& a, const Top& b) {
  const bool from_b = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  return Top{from_b ? b.max : a.max, fmaxf(fminf(a.max, b.max), fmaxf(a.second, b.second)), from_b ? b.argmax : a.argmax};
}

RKSC_DEVICE Top warp_top(Top top) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const Top other{__shfl_xor_sync(kFullMask, top.max, step), __shfl_xor_sync(kFullMask, top.second, step),
                    __shfl_xor_sync(kFullMask, top.argmax, step)};
    top = merge(top, other);
  }
  return top;
}

RKSC_DEVICE rksc_statistics finish(const Part& row, uint32_t vocab) {
  if (row.finite == 0) return rksc_statistics{0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0};
  const float sum = 1.0f + row.rest, log_sum = log1pf(row.rest);
  return rksc_statistics{row.argmax, row.max, row.max + log_sum, fmaxf(log_sum - row.weighted / sum, 0.0f), 1.0f / sum,
                         vocab > 1 ? row.max - row.second : 0.0f, 1};
}

// The CTA's slice; complete in thread 0 alone.
template <int kWidth>
RKSC_DEVICE Part slice_part(gptr<const float> logits, uint32_t start, uint32_t vocab) {
  RKSC_SHARED(float, maxima, kWarps);
  RKSC_SHARED(float, seconds, kWarps);
  RKSC_SHARED(uint32_t, ids, kWarps);
  RKSC_SHARED(uint32_t, flags, kWarps);
  RKSC_SHARED(float, sums, 2 * kWarps);
  constexpr int kLoads = kHeld / kWidth;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t first = start + threadIdx.x * kWidth;
  vec<float, kWidth> x[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const uint32_t id = first + j * kThreads * kWidth;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[j][e] = -INFINITY;
    if (id < vocab) x[j] = load_vec<kWidth>(logits + id);
  }
  Top top{-INFINITY, -INFINITY, 0xffffffffu};
  bool finite = true;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      // Ids ascend, so that the first of equals stays.
      const uint32_t id = first + j * kThreads * kWidth + e;
      finite = finite && (id >= vocab || fabsf(x[j][e]) < INFINITY);
      const bool larger = x[j][e] > top.max;
      top.second = fmaxf(top.second, fminf(top.max, x[j][e]));
      if (larger) {
        top.max = x[j][e];
        top.argmax = id;
      }
    }
  }
  top = warp_top(top);
  const bool warp_finite = __all_sync(kFullMask, finite);
  if (lane == 0) {
    maxima[warp] = top.max;
    seconds[warp] = top.second;
    ids[warp] = top.argmax;
    flags[warp] = warp_finite;
  }
  // The slice's maximum is what every thread's exponentials are taken against.
  __syncthreads();
  top = Top{maxima[0], seconds[0], ids[0]};
  uint32_t all_finite = flags[0];
#pragma unroll
  for (uint32_t w = 1; w < kWarps; ++w) {
    top = merge(top, Top{maxima[w], seconds[w], ids[w]});
    all_finite &= flags[w];
  }
  float rest = 0.0f, weighted = 0.0f;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (first + j * kThreads * kWidth + e == top.argmax) continue;
      const float z = fmaxf(x[j][e] - top.max, kFloor), power = expf(z);
      rest += power;
      weighted += z * power;
    }
  }
  rest = warp_sum(rest);
  weighted = warp_sum(weighted);
  if (lane == 0) {
    sums[warp] = rest;
    sums[kWarps + warp] = weighted;
  }
  // Thread 0 adds up what the warps wrote.
  __syncthreads();
  Part part{top.max, top.second, 0.0f, 0.0f, top.argmax, all_finite};
  if (threadIdx.x == 0) {
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      part.rest += sums[w];
      part.weighted += sums[kWarps + w];
    }
  }
  return part;
}

// The slices of a row, merged by one warp: lane l takes slices l, l + 32, .. in order, a butterfly the lanes.
RKSC_DEVICE Part merge_slices(gptr<const Part> parts, uint32_t num_slices) {
  const uint32_t lane = threadIdx.x % 32;
  Top top{-INFINITY, -INFINITY, 0xffffffffu};
  bool finite = true;
  for (uint32_t i = lane; i < num_slices; i += 32) {
    const Part part = parts[i];
    top = merge(top, Top{part.max, part.second, part.argmax});
    finite = finite && part.finite != 0;
  }
  top = warp_top(top);
  Part row{top.max, top.second, 0.0f, 0.0f, top.argmax, static_cast<uint32_t>(__all_sync(kFullMask, finite))};
  for (uint32_t i = lane; i < num_slices; i += 32) {
    const Part part = parts[i];
    // All but one slice bring their largest logit's term back.
    const float own = part.argmax == top.argmax ? 0.0f : 1.0f;
    const float shift = fmaxf(part.max - top.max, kFloor), scale = expf(shift);
    row.rest += scale * (part.rest + own);
    row.weighted += scale * (part.weighted + shift * (part.rest + own));
  }
  row.rest = warp_sum(row.rest);
  row.weighted = warp_sum(row.weighted);
  return row;
}

RKSC_DEVICE void clear(gptr<Part> parts, uint32_t num_slices) {
  for (uint32_t i = threadIdx.x; i < num_slices; i += 32) parts[i] = Part{0.0f, 0.0f, 0.0f, 0.0f, 0, 0};
}

// row_stats
//   z = x - max, Z = sum e^z:  lse = max + ln Z,  entropy = ln Z - sum z e^z / Z,  top1 = 1 / Z,  margin = max - second
//
//   logits [num_rows, vocab] f32                                    read
//   stats  [num_rows]                                               write; all zero where a logit is NaN or infinite
//   workspace [num_rows] counters, [num_rows, slices] Part          zero before and after; unused with one slice
//
// Work      CTA = (row, slice of kSlice logits), each logit loaded once into a register; the last CTA of a row to arrive
//           merges the slices in their order. The cut depends on vocab alone, so a row's bits do not depend on its neighbours.
// Numerics  f32; Z - 1 is summed instead of Z and ln Z is log1p of it (see Part), so that lse, entropy and top1 keep their
//           relative accuracy for peaked rows. Ties: the lowest id.
// Traffic   4 * num_rows * vocab bytes, + 48 a slice.
// Bound     memory; about 20 instructions a logit. For one row latency: two loads and two barriers deep, and the merge.
// Limits    vocab > 0; vocab % 4 == 0 takes the vector path, others load single logits.
// Oracle    testing::oracle::row_stats.   Bench  rksc-run bench kernels --op row_stats
template <int kWidth>
__global__ void __launch_bounds__(kThreads) row_stats_kernel(const __grid_constant__ rksc_row_stats_params p) {
  RKSC_SHARED(uint32_t, arrived, 1);
  const uint32_t row = blockIdx.x, slice = blockIdx.y, num_slices = gridDim.y;
  gptr<const float> logits = global<const float>(p.logits) + static_cast<uint64_t>(row) * p.vocab;
  const Part part = slice_part<kWidth>(logits, slice * kSlice, p.vocab);
  gptr<rksc_statistics> stats = global<rksc_statistics>(p.stats);
  if (num_slices == 1) {
    if (threadIdx.x == 0) stats[row] = finish(part, p.vocab);
    return;
  }
  // Counters are padded to whole Parts.
  const uint32_t counter_parts = div_up_device(p.num_rows * 4, sizeof(Part));
  gptr<uint32_t> counter = global<uint32_t>(p.workspace) + row;
  gptr<Part> parts = global<Part>(p.workspace) + counter_parts + static_cast<uint64_t>(row) * num_slices;
  if (threadIdx.x == 0) {
    parts[slice] = part;
    // The part is visible to whoever sees the count.
    __threadfence();
    arrived[0] = atomic_add(counter, 1u);
  }
  // The count is broadcast.
  __syncthreads();
  if (arrived[0] != num_slices - 1 || threadIdx.x >= 32) return;
  // The other CTAs' parts, published before their counts, are read behind ours.
  __threadfence();
  const Part merged = merge_slices(parts, num_slices);
  // The lanes read one another's slices no more.
  __syncwarp();
  clear(parts, num_slices);
  if (threadIdx.x == 0) {
    stats[row] = finish(merged, p.vocab);
    counter[0] = 0;
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" size_t RKSC_FN(row_stats_workspace_bytes)(uint32_t num_rows, uint32_t vocab) {
  const size_t slices = div_up(vocab, kSlice);
  if (slices <= 1) return 0;
  return (div_up(num_rows * 4, sizeof(Part)) + num_rows * slices) * sizeof(Part);
}

extern "C" int32_t RKSC_FN(row_stats)(const rksc_row_stats_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->vocab > 0);
  if (p->num_rows == 0) return 0;
  const dim3 grid(p->num_rows, div_up(p->vocab, kSlice));
  if (p->vocab % 4 == 0) return launch(row_stats_kernel<4>, grid, dim3(kThreads), 0, stream, *p);
  return launch(row_stats_kernel<1>, grid, dim3(kThreads), 0, stream, *p);
}

// kv_scores.cu -- R-KV scores of cached slots: how much the last queries look at a slot, and how redundant its key is.
// Four launches, no n x n matrix: kv_prepare, kv_nearest (kv_scores_nearest.cuh), kv_mean, kv_score. Which slots stay is the
// host's business.
#include <type_traits>

#include "kv_scores_nearest.cuh"

namespace {

// Order-preserving: a < b as floats exactly when ordered(a) < ordered(b). 0 is below all.
RKSC_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
RKSC_DEVICE float from_ordered(uint32_t x) { return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

// tanh grows with its argument: the largest of a group is capped, and stays the largest.
RKSC_DEVICE float capped(float x, float softcap) { return softcap > 0.0f ? softcap * tanhf(x / softcap) : x; }

// best[j * 64 + slot] = max over the group of q k sm_scale, ordered. `best` starts at 0.
template <typename T>
RKSC_DEVICE void group_logits(const ScoresPlan& plan, uint32_t head, smem<const T> keys, uint32_t stride, smem<uint32_t> best) {
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, num_rows = p.num_queries * plan.group;
  const gptr<const T> queries = global<const T>(p.queries) + static_cast<uint64_t>(head) * plan.group * p.head_dim;
  const uint32_t b_row = lane / 16 * 8 + lane % 8, b_col = lane / 8 % 2 * 8;
  // A warp takes 16 rows (query, query head of the group) against the tile's 64 keys.
  for (uint32_t base = threadIdx.x / 32 * 16; base < num_rows; base += kScoreThreads / 32 * 16) {
    gptr<const T> q[2];
    bool valid[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = base + half * 8 + g;
      valid[half] = row < num_rows;
      q[half] = queries;
      if (valid[half]) q[half] = queries + (row / plan.group * p.num_q_heads + row % plan.group) * p.head_dim;
    }
    FragC c[8];
#pragma unroll
    for (uint32_t n = 0; n < 8; ++n)
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) c[n].v[e] = 0.0f;
    for (uint32_t k = 0; k < p.head_dim; k += 16) {
      FragA a;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const vec<T, 2> pair = load_vec<2>(q[i % 2] + (k + i / 2 * 8 + 2 * t));
        a.r[i] = static_cast<uint32_t>(pair[0].bits) | static_cast<uint32_t>(pair[1].bits) << 16;
      }
#pragma unroll
      for (uint32_t n = 0; n < 8; n += 2) {
        uint32_t r[4];
        ldmatrix_x4<T>(r, keys + ((n * 8 + b_row) * stride + k + b_col));
        const FragB low = {{r[0], r[1]}}, high = {{r[2], r[3]}};
        mma_m16n8k16<T>(c[n], a, low);
        mma_m16n8k16<T>(c[n + 1], a, high);
      }
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      if (!valid[half]) continue;
      const uint32_t j = (base + half * 8 + g) / plan.group;
#pragma unroll
      for (uint32_t n = 0; n < 8; ++n)
#pragma unroll
        for (uint32_t e = 0; e < 2; ++e) {
          atomic_max(best + (j * kTileSlots + n * 8 + 2 * t + e), ordered(c[n].v[half * 2 + e] * p.sm_scale));
        }
    }
  }
}

template <>
RKSC_DEVICE void group_logits<float>(const ScoresPlan& plan, uint32_t head, smem<const float> keys, uint32_t stride,
                                     smem<uint32_t> best) {
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t slot = threadIdx.x % kTileSlots;
  const smem<const float> key = keys + slot * stride;
  for (uint32_t j = threadIdx.x / kTileSlots; j < p.num_queries; j += kScoreThreads / kTileSlots) {
    float max = -INFINITY;
    for (uint32_t g = 0; g < plan.group; ++g) {
      const gptr<const float> q = global<const float>(p.queries) + (j * p.num_q_heads + head * plan.group + g) * p.head_dim;
      float dot = 0.0f;
#pragma unroll 4
      for (uint32_t k = 0; k < p.head_dim; k += 4) {
        const vec<float, 4> a = load_vec<4>(q + k), b = load_vec<4>(key + k);
#pragma unroll
        for (uint32_t e = 0; e < 4; ++e) dot = fmaf(a[e], b[e], dot);
      }
      max = fmaxf(max, dot * p.sm_scale);
    }
    best[j * kTileSlots + slot] = ordered(max);
  }
}

// kv_prepare
//   inv_norm[v] = 1 / (|K_v| + 1e-8); tile_keys = sum over the tile of K_v inv_norm[v]; logits[j, v] = max_g q_jg K_v sm_scale, or
//   softcap tanh of it / softcap;
//   tile_max, tile_sum: softmax statistics of each query over the tile's candidates; protected_links = 0
//
//   queries [num_queries, Hq, D] T, k_cache [num_blocks, Hkv, block_size, D] T, blocks, positions: read; the rest: ScoresPlan, written
//
// Work      CTA = (64 slots, kv head): keys to shared memory once; tensor cores for the logits of 16-bit keys, the maximum over
//           the group by shared-memory integer maxima (any order).
// Numerics  f32 throughout; sums over a tile in ascending order of slots.
// Traffic   Hkv * num_slots * (D * sizeof(T) + 4 * (num_queries + 3)) bytes; queries from L2.
// Bound     memory: 2 * num_queries * group FLOP an element of K.
// Limits    see the launcher.
// Oracle    testing/kv_scores.rs.   Bench  rksc-run bench kernels --op kv_scores
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) kv_prepare_kernel(const __grid_constant__ ScoresPlan plan) {
  RKSC_SHARED(float, inv_norms, kTileSlots);
  RKSC_SHARED(uint32_t, best, kMaxQueries * kTileSlots);
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t tile = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, lane = thread % 32;
  constexpr uint32_t kChunk = kChunkVecs * kVec<T>;
  const uint32_t stride = p.head_dim + kVec<T>;
  const smem<T> keys = dynamic_shared<T>(0);
  for (uint32_t col = 0; col < p.head_dim; col += kChunk) load_keys<T>(p, head, tile, col / kChunk, keys + col, stride);
  cp_async_commit();
  for (uint32_t x = thread; x < p.num_queries * kTileSlots; x += kScoreThreads) best[x] = 0;
  cp_async_wait<0>();
  // Keys and zeroed maxima.
  __syncthreads();

  // Two threads a slot.
  const uint32_t slot = tile * kTileSlots + thread / 2;
  const uint64_t of_head = static_cast<uint64_t>(head) * plan.padded;
  float square = 0.0f;
  for (uint32_t k = thread % 2 * kVec<T>; k < p.head_dim; k += 2 * kVec<T>) {
    const vec<T, kVec<T>> x = load_vec<kVec<T>>(keys + (thread / 2 * stride + k));
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) square = fmaf(to_float(x[e]), to_float(x[e]), square);
  }
  square += __shfl_xor_sync(kFullMask, square, 1);
  if (thread % 2 == 0) {
    const float inv = slot < p.num_slots ? 1.0f / (sqrtf(square) + 1e-8f) : 0.0f;
    inv_norms[thread / 2] = inv;
    global<float>(plan.inv_norm)[of_head + slot] = inv;
    global<uint64_t>(plan.protected_links)[of_head + slot] = 0;
  }
  group_logits<T>(plan, head, keys, stride, best);
  // Inverse norms and logits.
  __syncthreads();

  const gptr<float> tile_keys = global<float>(plan.tile_keys) + (static_cast<uint64_t>(head) * plan.num_tiles + tile) * p.head_dim;
  for (uint32_t d = thread; d < p.head_dim; d += kScoreThreads) {
    float sum = 0.0f;
    for (uint32_t row = 0; row < kTileSlots; ++row) {
      const T x = keys[row * stride + d];
      const float inv = inv_norms[row];
      sum = fmaf(to_float(x), inv, sum);
    }
    tile_keys[d] = sum;
  }
  for (uint32_t j = thread / 32; j < p.num_queries; j += kScoreThreads / 32) {
    const gptr<float> logits = global<float>(plan.logits) + (static_cast<uint64_t>(head) * p.num_queries + j) * plan.padded;
    float x[2], max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = half * 32 + lane;
      const uint32_t bits = best[j * kTileSlots + row];
      x[half] = tile * kTileSlots + row < plan.num_candidates ? capped(from_ordered(bits), p.softcap) : -INFINITY;
      logits[tile * kTileSlots + row] = x[half];
      max = fmaxf(max, x[half]);
    }
    max = warp_max(max);
    // Without a candidate the maximum is -inf and the sum empty.
    if (max > -INFINITY) sum = warp_sum(expf(x[0] - max) + expf(x[1] - max));
    if (lane == 0) {
      const uint64_t at = (static_cast<uint64_t>(head) * plan.num_tiles + tile) * p.num_queries + j;
      global<float>(plan.tile_max)[at] = max;
      global<float>(plan.tile_sum)[at] = sum;
    }
  }
  if (p.positions != nullptr && thread < 32) {
    const gptr<const uint32_t> positions = global<const uint32_t>(p.positions) + static_cast<uint64_t>(head) * p.position_stride;
    uint32_t newest = 0;
    for (uint32_t s = tile * kTileSlots + lane; s < p.num_slots && s < (tile + 1) * kTileSlots; s += 32) {
      const uint32_t position = positions[s];
      newest = position > newest ? position : newest;
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      const uint32_t other = __shfl_xor_sync(kFullMask, newest, step);
      newest = other > newest ? other : newest;
    }
    if (lane == 0) global<uint32_t>(plan.tile_newest)[static_cast<uint64_t>(head) * plan.num_tiles + tile] = newest;
  }
}

// kv_mean
//   m_v = (<k_v, sum_u k_u> - <k_v, k_v> - protected_links[v]) / n, k the normalised keys: the mean of S's column or row v
//   without the protected links and the diagonal; exp_mean = exp(m), tile_exp its sum over the tile
//   importance[v] = mean_j exp(logits[j, v] - row_max[j]) / row_sum[j]; in the text's variant the logit is the largest of
//   the candidates [v - W, v + W - 1], W = pool_size / 2, which is to pool each query's attention before the mean
//
//   ScoresPlan; k_cache, blocks read once more
//
// Work      CTA = (64 slots, kv head); 8 lanes a key.
// Numerics  f32. m lies within [-1, 1], so its softmax needs no maximum.
// Traffic   Hkv * num_slots * (D * sizeof(T) + 4 * (num_queries + 5)) bytes.
// Bound     memory (L2: keys were read by the kernels before).
// Limits    see the launcher.
// Oracle    testing/kv_scores.rs.   Bench  rksc-run bench kernels --op kv_scores
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) kv_mean_kernel(const __grid_constant__ ScoresPlan plan) {
  RKSC_SHARED(float, exps, kTileSlots);
  RKSC_SHARED(float, key_sum, 256);
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t tile = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
  const uint64_t of_head = static_cast<uint64_t>(head) * plan.padded;
  const gptr<const float> sum_of_head = global<const float>(plan.key_sum) + head * p.head_dim;
  for (uint32_t d = thread; d < p.head_dim; d += kScoreThreads) key_sum[d] = sum_of_head[d];
  __syncthreads();
  for (uint32_t row = thread / 8; row < kTileSlots; row += kScoreThreads / 8) {
    const uint32_t slot = tile * kTileSlots + row;
    const gptr<const T> key = key_row<T>(p, head, slot < p.num_slots ? slot : 0);
    float dot = 0.0f, square = 0.0f;
    for (uint32_t k = thread % 8 * kVec<T>; k < p.head_dim; k += 8 * kVec<T>) {
      const vec<T, kVec<T>> x = load_vec<kVec<T>>(key + k);
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) {
        const float sum = key_sum[k + e];
        dot = fmaf(to_float(x[e]), sum, dot);
        square = fmaf(to_float(x[e]), to_float(x[e]), square);
      }
    }
#pragma unroll
    for (int step = 4; step > 0; step >>= 1) {
      dot += __shfl_xor_sync(kFullMask, dot, step);
      square += __shfl_xor_sync(kFullMask, square, step);
    }
    if (thread % 8 == 0) {
      const float inv = global<const float>(plan.inv_norm)[of_head + slot];
      const float links = from_fixed(global<const uint64_t>(plan.protected_links)[of_head + slot]);
      const float mean = (dot * inv - square * inv * inv - links) / static_cast<float>(p.num_slots);
      const float e = slot < p.num_slots ? expf(mean) : 0.0f;
      exps[row] = e;
      global<float>(plan.exp_mean)[of_head + slot] = e;
    }
  }
  __syncthreads();
  if (thread < 32) {
    const float sum = warp_sum(exps[thread] + exps[thread + 32]);
    if (thread == 0) global<float>(plan.tile_exp)[static_cast<uint64_t>(head) * plan.num_tiles + tile] = sum;
  }
  const uint32_t slot = tile * kTileSlots + thread;
  if (thread < kTileSlots && slot < plan.num_candidates) {
    const uint32_t reach = p.variant == RKSC_KV_TEXT ? p.pool_size / 2 : 0, ahead = reach > 0 ? reach - 1 : 0;
    const uint32_t first = slot > reach ? slot - reach : 0;
    const uint32_t last = plan.num_candidates - 1 - slot > ahead ? slot + ahead : plan.num_candidates - 1;
    float sum = 0.0f;
    for (uint32_t j = 0; j < p.num_queries; ++j) {
      const gptr<const float> logits =
          global<const float>(plan.logits) + (static_cast<uint64_t>(head) * p.num_queries + j) * plan.padded;
      float x = -INFINITY;
      for (uint32_t s = first; s <= last; ++s) x = fmaxf(x, logits[s]);
      const float max = global<const float>(plan.row_max)[head * p.num_queries + j];
      const float norm = global<const float>(plan.row_sum)[head * p.num_queries + j];
      sum += expf(x - max) / norm;
    }
    global<float>(plan.importance)[of_head + slot] = sum / static_cast<float>(p.num_queries);
  }
}

// kv_score
//   redundancy[v] = exp_mean[v] / sum over all slots; importance[v] = max of the means within pool_size / 2 candidates, or as
//   it is where each query's attention was pooled;
//   scores[v] = lambda * importance[v] - (1 - lambda) * redundancy[v]
//
//   ScoresPlan; scores, importance, redundancy [Hkv, num_candidates] f32: written
//
// Work      CTA = (256 candidates, kv head), a thread each; every CTA sums the tiles' sums again, in the same order.
// Numerics  f32.
// Traffic   Hkv * num_candidates * 20 bytes.
// Bound     launch.
// Limits    see the launcher.
// Oracle    testing/kv_scores.rs.   Bench  rksc-run bench kernels --op kv_scores
__global__ void __launch_bounds__(256) kv_score_kernel(const __grid_constant__ ScoresPlan plan) {
  RKSC_SHARED(float, scratch, 32);
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t head = blockIdx.y, slot = blockIdx.x * 256 + threadIdx.x;
  const gptr<const float> tile_exp = global<const float>(plan.tile_exp) + static_cast<uint64_t>(head) * plan.num_tiles;
  float part = 0.0f;
  for (uint32_t tile = threadIdx.x; tile < plan.num_tiles; tile += 256) part += tile_exp[tile];
  const float total = cta_sum(part, scratch);
  if (slot >= plan.num_candidates) return;
  const uint64_t of_head = static_cast<uint64_t>(head) * plan.padded;
  const gptr<const float> means = global<const float>(plan.importance) + of_head;
  const uint32_t reach = p.variant == RKSC_KV_TEXT ? 0 : p.pool_size / 2, first = slot > reach ? slot - reach : 0;
  const uint32_t last = plan.num_candidates - 1 - slot > reach ? slot + reach : plan.num_candidates - 1;
  float pooled = -INFINITY;
  for (uint32_t s = first; s <= last; ++s) pooled = fmaxf(pooled, means[s]);
  const float exp_mean = global<const float>(plan.exp_mean)[of_head + slot];
  const float redundancy = exp_mean / total;
  const uint64_t at = static_cast<uint64_t>(head) * plan.num_candidates + slot;
  global<float>(p.scores)[at] = p.lambda * pooled - (1.0f - p.lambda) * redundancy;
  if (p.importance != nullptr) global<float>(p.importance)[at] = pooled;
  if (p.redundancy != nullptr) global<float>(p.redundancy)[at] = redundancy;
}

// Lays the plan's arrays out from `base`; returns the bytes they take.
size_t lay_out(ScoresPlan& plan, unsigned char* base, uint32_t num_slots, uint32_t num_queries, uint32_t num_kv_heads,
               uint32_t head_dim) {
  plan.num_tiles = div_up(num_slots, kTileSlots);
  plan.padded = plan.num_tiles * kTileSlots;
  size_t bytes = 0;
  const auto take = [&](auto*& pointer, size_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + bytes);
    bytes += (count * num_kv_heads * sizeof(*pointer) + 255) / 256 * 256;
  };
  take(plan.protected_links, plan.padded);
  take(plan.inv_norm, plan.padded);
  take(plan.logits, static_cast<size_t>(num_queries) * plan.padded);
  take(plan.importance, plan.padded);
  take(plan.exp_mean, plan.padded);
  take(plan.tile_keys, static_cast<size_t>(plan.num_tiles) * head_dim);
  take(plan.tile_max, static_cast<size_t>(plan.num_tiles) * num_queries);
  take(plan.tile_sum, static_cast<size_t>(plan.num_tiles) * num_queries);
  take(plan.tile_exp, plan.num_tiles);
  take(plan.tile_newest, plan.num_tiles);
  take(plan.key_sum, head_dim);
  take(plan.row_max, num_queries);
  take(plan.row_sum, num_queries);
  return bytes;
}

template <typename T>
int32_t launch_scores(const ScoresPlan& plan, rksc_stream stream) {
  const dim3 tiles(plan.num_tiles, plan.p.num_kv_heads), threads(kScoreThreads);
  const uint32_t keys = kTileSlots * (plan.p.head_dim + kVec<T>) * static_cast<uint32_t>(sizeof(T));
  int32_t code = launch(kv_prepare_kernel<T>, tiles, threads, keys, stream, plan);
  if (code == 0) code = launch_nearest<T>(plan, stream);
  if (code == 0) code = launch(kv_mean_kernel<T>, tiles, threads, 0, stream, plan);
  if (code == 0) {
    code = launch(kv_score_kernel, dim3(div_up(plan.num_candidates, 256), plan.p.num_kv_heads), dim3(256), 0, stream, plan);
  }
  return code;
}

}  // namespace

// ---- launchers: check, dispatch, launch, report -------------------------------------------------

extern "C" size_t RKSC_FN(kv_scores_workspace_bytes)(uint32_t num_slots, uint32_t num_queries, uint32_t, uint32_t num_kv_heads,
                                                     uint32_t head_dim) {
  ScoresPlan plan = {};
  return lay_out(plan, nullptr, num_slots, num_queries, num_kv_heads, head_dim);
}

extern "C" int32_t RKSC_FN(kv_scores)(const rksc_kv_scores_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->num_queries >= 1 && p->num_queries <= kMaxQueries);
  RKSC_REQUIRE(p->variant <= RKSC_KV_ALG1);
  RKSC_REQUIRE(p->num_slots >= p->window && p->num_slots <= kMaxSlots);
  RKSC_REQUIRE(p->pool_size % 2 == 1 && p->block_size > 0);
  RKSC_REQUIRE(p->head_dim >= 8 && p->head_dim <= 256 && p->head_dim % (p->dtype == RKSC_F32 ? 8 : 16) == 0);
  RKSC_REQUIRE(p->num_kv_heads <= 65535);
  // Below 0 a key would be similar to itself, and to the zeros past the last slot.
  RKSC_REQUIRE(p->positions == nullptr || p->position_stride >= p->num_slots);
  RKSC_REQUIRE(p->threshold >= 0.0f && p->softcap >= 0.0f && p->softcap < INFINITY);
  if (p->num_slots == p->window || p->num_kv_heads == 0) return 0;
  RKSC_REQUIRE(p->num_q_heads >= p->num_kv_heads && p->num_q_heads % p->num_kv_heads == 0);
  ScoresPlan plan = {};
  plan.p = *p;
  lay_out(plan, static_cast<unsigned char*>(p->workspace), p->num_slots, p->num_queries, p->num_kv_heads, p->head_dim);
  plan.num_candidates = p->num_slots - p->window;
  plan.group = p->num_q_heads / p->num_kv_heads;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] { return launch_scores<T>(plan, stream); });
}

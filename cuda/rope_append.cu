// rope_append.cu -- fused qkv rows become rotated q, and k and v in their cache slots; some rows' q is kept for later.
#include "common.cuh"
#include "rotary.cuh"

namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / 32;

// Lanes that share a head: the least power of two with a vector of pairs each, so that butterflies stay inside.
RKSC_DEVICE uint32_t head_lanes(uint32_t pairs, uint32_t width) {
  uint32_t lanes = 32;
  while (lanes > 1 && lanes / 2 * width >= pairs) lanes /= 2;
  return lanes;
}

// Squares of x[0, count) added up over the CTA, in an order fixed by count; count is a multiple of kWidth.
template <int kWidth>
RKSC_DEVICE float span_squares(gptr<const float> x, uint32_t count, smem<float> scratch) {
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x * kWidth; i < count; i += kThreads * kWidth) {
    const vec<float, kWidth> part = load_vec<kWidth>(x + i);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) squares += part[e] * part[e];
  }
  return cta_sum(squares, scratch);
}

// rope_append
//   q and k heads: x normed first where weights are given (x * rsqrt(mean(x^2) + norm_eps) * w, the mean over the head, or over
//   all q or all k heads of the row), then for i < R / 2, with R = rotary_dim, a = float(positions[t]) * inv_freq[i],
//   c = cos(a) * rope_scale, s = sin(a) * rope_scale:
//     y[i] = x[i] c - x[i + R / 2] s,   y[i + R / 2] = x[i + R / 2] c + x[i] s;   elements from R on, and v heads, as they are
//
//   qkv       [num_rows, (Hq + 2 Hkv) * D] f32                  read: q heads, k heads, v heads
//   positions, slots [num_rows] u32, inv_freq [R / 2] f32       read
//   ring_rows        [num_rows] u32                             read, or null
//   q_norm, k_norm   [D], or [Hq * D] and [Hkv * D] f32         read, or null
//   q         [num_rows, Hq, D] T                               write
//   query_ring       [.., Hq, D] T                              write at ring_rows, q's bits; or null
//   k_cache, v_cache [num_blocks, Hkv, block_size, D] T         write at slots; nothing for RKSC_NO_SLOT
//
// Work      CTA = (row, run of heads). head_lanes lanes a head, kWidth pairs (see HeadPairs) a lane at a time: 2 heads of 128
//           or 4 of 64 to the warp. A head's values are loaded before the barrier behind which the CTA's table of R / 2
//           cosines and sines stands, so that the two latencies overlap. A norm over the row: every CTA adds up all of the
//           row's q, or k, for itself.
// Numerics  the angle is one f32 product, cosine and sine of that f32 within 2 ulp for any position; f32 throughout, one
//           rounding to T. The norm's sum is a butterfly in an order fixed by D, over the row one fixed by the heads and D.
// Traffic   num_rows * (Hq + 2 Hkv) * D * (4 + sizeof(T)) bytes; with a norm over the row q and k once more per CTA, from L2.
// Bound     memory; at decode sizes latency.
// Limits    head_dim and rotary_dim even, rotary_dim <= head_dim <= 256; both % 8 == 0 takes the vector path (kWidth 4), others
//           single pairs. Both norm weights or none. block_size > 0; no slot and no ring row named twice.
// Oracle    testing::oracle::rope, rms_norm.   Bench  rksc-run bench kernels --op rope_append
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(const __grid_constant__ rksc_rope_append_params p) {
  // With 32 lanes a head, kTurns vectors of pairs cover kMaxPairs.
  constexpr int kTurns = kMaxPairs / (32 * kWidth);
  RKSC_SHARED(float, cosines, kMaxPairs);
  RKSC_SHARED(float, sines, kMaxPairs);
  RKSC_SHARED(float, scratch, 32);
  const HeadPairs pairs(p.head_dim, p.rotary_dim);
  const uint32_t row = blockIdx.x, hq = p.num_q_heads, hkv = p.num_kv_heads;
  const uint32_t lanes = head_lanes(pairs.all, kWidth), per_warp = 32 / lanes;
  const uint32_t head = (blockIdx.y * kWarps + threadIdx.x / 32) * per_warp + threadIdx.x % 32 / lanes;
  const uint32_t first = threadIdx.x % lanes * kWidth, stride = lanes * kWidth;
  const bool is_q = head < hq, is_v = head >= hq + hkv;
  const bool there = head < hq + 2 * hkv;

  vec<float, kWidth> low[kTurns], high[kTurns];
  float squares = 0.0f;
  gptr<const float> heads = global<const float>(p.qkv) + static_cast<uint64_t>(row) * (hq + 2 * hkv) * p.head_dim;
  gptr<const float> x = heads + head * p.head_dim;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint32_t i = first + turn * stride;
    if (!there || i >= pairs.all) continue;
    low[turn] = load_vec<kWidth>(x + pairs.low(i));
    high[turn] = load_vec<kWidth>(x + pairs.high(i));
#pragma unroll
    for (int e = 0; e < kWidth; ++e) squares += low[turn][e] * low[turn][e] + high[turn][e] * high[turn][e];
  }
  const uint32_t slot = global<const uint32_t>(p.slots)[row];
  uint32_t ring_row = RKSC_NO_SLOT;
  if (is_q && p.query_ring != nullptr && p.ring_rows != nullptr) ring_row = global<const uint32_t>(p.ring_rows)[row];
  const float position = static_cast<float>(global<const uint32_t>(p.positions)[row]);
  for (uint32_t i = threadIdx.x; i < pairs.turned; i += kThreads) {
    const float inv_freq = global<const float>(p.inv_freq)[i];
    float sine, cosine;
    sincosf(position * inv_freq, &sine, &cosine);
    cosines[i] = cosine * p.rope_scale;
    sines[i] = sine * p.rope_scale;
  }
  // Every head reads the whole table.
  __syncthreads();

  if (p.q_norm != nullptr) {
    gptr<const float> w = global<const float>(is_q ? p.q_norm : p.k_norm);
    uint32_t span = p.head_dim;
    if (p.norm_span == RKSC_NORM_HEAD) {
      // All lanes take part, those of v heads for nothing.
      for (uint32_t step = lanes / 2; step > 0; step /= 2) squares += __shfl_xor_sync(kFullMask, squares, step);
    } else {
      // The CTA's heads are [begin, begin + kWarps * per_warp): it may have some of both.
      const uint32_t begin = blockIdx.y * kWarps * per_warp;
      float q_squares = 0.0f, k_squares = 0.0f;
      if (begin < hq) q_squares = span_squares<kWidth>(heads, hq * p.head_dim, scratch);
      if (begin < hq + hkv && begin + kWarps * per_warp > hq) {
        k_squares = span_squares<kWidth>(heads + hq * p.head_dim, hkv * p.head_dim, scratch);
      }
      squares = is_q ? q_squares : k_squares;
      span *= is_q ? hq : hkv;
      if (there && !is_v) w = w + (is_q ? head : head - hq) * p.head_dim;
    }
    if (there && !is_v) {
      const float inv = rsqrtf(squares / static_cast<float>(span) + p.norm_eps);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const uint32_t i = first + turn * stride;
        if (i >= pairs.all) continue;
        const vec<float, kWidth> w_low = load_vec<kWidth>(w + pairs.low(i)), w_high = load_vec<kWidth>(w + pairs.high(i));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          low[turn][e] = low[turn][e] * inv * w_low[e];
          high[turn][e] = high[turn][e] * inv * w_high[e];
        }
      }
    }
  }
  if (!there || (!is_q && slot == RKSC_NO_SLOT)) return;

  gptr<T> to = global<T>(p.q) + (static_cast<uint64_t>(row) * hq + head) * p.head_dim;
  if (!is_q) {
    const uint32_t kv_head = is_v ? head - hq - hkv : head - hq, block = slot / p.block_size;
    const uint64_t at = (static_cast<uint64_t>(block) * hkv + kv_head) * p.block_size + slot % p.block_size;
    to = global<T>(is_v ? p.v_cache : p.k_cache) + at * p.head_dim;
  }
  const bool kept = ring_row != RKSC_NO_SLOT;
  gptr<T> ring = to;
  if (kept) ring = global<T>(p.query_ring) + (static_cast<uint64_t>(ring_row) * hq + head) * p.head_dim;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint32_t i = first + turn * stride;
    if (i >= pairs.all) continue;
    const bool turns = !is_v && i < pairs.turned;
    vec<T, kWidth> y_low, y_high;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      float c = 1.0f, s = 0.0f;
      if (turns) {
        c = cosines[i + e];
        s = sines[i + e];
      }
      // What does not turn is stored as it is: 0 * infinity would not be.
      y_low[e] = from_float<T>(turns ? low[turn][e] * c - high[turn][e] * s : low[turn][e]);
      y_high[e] = from_float<T>(turns ? high[turn][e] * c + low[turn][e] * s : high[turn][e]);
    }
    store_vec(to + pairs.low(i), y_low);
    store_vec(to + pairs.high(i), y_high);
    if (!kept) continue;
    store_vec(ring + pairs.low(i), y_low);
    store_vec(ring + pairs.high(i), y_high);
  }
}

// Heads of a CTA: what head_lanes leaves room for in every warp.
uint32_t heads_per_cta(uint32_t pairs, uint32_t width) {
  uint32_t lanes = 32;
  while (lanes > 1 && lanes / 2 * width >= pairs) lanes /= 2;
  return kWarps * (32 / lanes);
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(rope_append)(const rksc_rope_append_params* p, rksc_stream stream) {
  RKSC_REQUIRE(can_rotate(p->head_dim, p->rotary_dim));
  RKSC_REQUIRE(p->num_q_heads > 0 && p->num_kv_heads > 0 && p->block_size > 0);
  RKSC_REQUIRE((p->q_norm == nullptr) == (p->k_norm == nullptr) && p->norm_span <= RKSC_NORM_ROW);
  if (p->num_rows == 0) return 0;
  const uint32_t pairs = p->head_dim / 2, num_heads = p->num_q_heads + 2 * p->num_kv_heads;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    if (pairs_in_fours(p->head_dim, p->rotary_dim)) {
      const dim3 grid(p->num_rows, div_up(num_heads, heads_per_cta(pairs, 4)));
      return launch(rope_append_kernel<T, 4>, grid, dim3(kThreads), 0, stream, *p);
    }
    const dim3 grid(p->num_rows, div_up(num_heads, heads_per_cta(pairs, 1)));
    return launch(rope_append_kernel<T, 1>, grid, dim3(kThreads), 0, stream, *p);
  });
}

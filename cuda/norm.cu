// norm.cu -- add_rms_norm: the residual addition, the norms before and after it and the cosine between the two, in one launch.
#include "common.cuh"

namespace {

// 16-byte vectors of a row that a thread holds: rows up to kMaxThreads * kHeld * 4 never leave the registers.
constexpr int kHeld = 2;
constexpr uint32_t kMaxThreads = 1024;
// Of the kernel that reads a row twice.
constexpr uint32_t kLongThreads = 512;

// What one pass over a row adds up.
struct Sums {
  float after = 0.0f;    // x after the addition, squared
  float product = 0.0f;  // reference * x after
  float before = 0.0f;   // reference squared
};

// The sums over the CTA, the same in every thread: a butterfly in each warp, one barrier, the same butterfly over the warps.
// `scratch` holds 3 * 32 floats and is used once.
RKSC_DEVICE Sums cta_sums(Sums sums, bool all, smem<float> scratch) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  sums.after = warp_sum(sums.after);
  if (all) {
    sums.product = warp_sum(sums.product);
    sums.before = warp_sum(sums.before);
  }
  if (lane == 0) {
    scratch[warp] = sums.after;
    if (all) {
      scratch[32 + warp] = sums.product;
      scratch[64 + warp] = sums.before;
    }
  }
  // Every warp now needs what every other wrote.
  __syncthreads();
  const bool there = lane < num_warps;
  float x = 0.0f;
  if (there) x = scratch[lane];
  sums.after = warp_sum(x);
  if (all) {
    float y = 0.0f, z = 0.0f;
    if (there) {
      y = scratch[32 + lane];
      z = scratch[64 + lane];
    }
    sums.product = warp_sum(y);
    sums.before = warp_sum(z);
  }
  return sums;
}

RKSC_DEVICE float inv_rms(float squares, const rksc_add_rms_norm_params& p) {
  return rsqrtf(squares / static_cast<float>(p.hidden) + p.eps);
}

RKSC_DEVICE void store_similarity(const rksc_add_rms_norm_params& p, uint32_t row, const Sums& sums) {
  // Roots first: a product of the squares would leave the range of f32 sooner than the rows do.
  const float norms = sqrtf(sums.before) * sqrtf(sums.after);
  global<float>(p.similarity)[row] = norms > 0.0f ? sums.product / norms : 0.0f;
}

template <typename T, int N>
RKSC_DEVICE vec<T, N> round_vec(const vec<float, N>& x) {
  vec<T, N> y;
#pragma unroll
  for (int e = 0; e < N; ++e) y[e] = from_float<T>(x[e]);
  return y;
}

// add_rms_norm
//   x[t] += delta[t], normed first where there is a post_norm: delta[t, i] * rsqrt(mean_j(delta[t, j]^2) + eps) * post_norm[i]
//   y[t, i] = x[t, i] * rsqrt(mean_j(x[t, j]^2) + eps) * weight[i], or x[t, i] without a weight
//   keep[t] = x[t]
//   similarity[t] = cos(reference[t], x[t]), reference being x before the addition where null; 0 where a norm is 0
//
//   x         [num_rows, hidden] f32   read, written where there is a delta
//   delta     [num_rows, hidden] f32   read, or null
//   post_norm [hidden] f32             read, or null; without delta not looked at
//   weight    [hidden] f32             read, or null; null without y
//   reference [num_rows, hidden] f32   read, or null
//   y         [num_rows, hidden] T     write, or null
//   keep      [num_rows, hidden] f32   write, or null
//   similarity [num_rows] f32          write, or null
//
// Work      CTA = row; a thread holds kHeld vectors of 16 bytes in registers from the load to the store of y. All loads, the
//           weight's too, are issued before the one barrier, so that a decode step pays memory latency once. A post_norm is a
//           reduction more, before the addition; weight is then read behind its barrier.
// Numerics  f32; the three sums of x are fused into one reduction; all in a fixed order that depends on hidden alone. One
//           rounding to T.
// Traffic   num_rows * hidden * (8 + 4 + sizeof(T)) bytes with delta, + 4 * num_rows * hidden with reference or keep; weights
//           from L2.
// Bound     memory; at decode sizes latency: one load, one barrier, one store.
// Limits    hidden % 4 == 0 and hidden <= 8192; others take add_rms_norm_long_kernel. hidden > 0.
// Oracle    testing::oracle::rms_norm, cosine.   Bench  rksc-run bench kernels --op add_rms_norm
//
// kPlain leaves post_norm and a y without weight out: 48 registers instead of 62, more CTAs an SM for families without either.
template <typename T, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_kernel(const __grid_constant__ rksc_add_rms_norm_params p) {
  RKSC_SHARED(float, scratch, 96);
  const bool adds = p.delta != nullptr, norms_delta = !kPlain && adds && p.post_norm != nullptr;
  const bool compares = p.similarity != nullptr, norms = p.weight != nullptr, rounds = !kPlain && !norms && p.y != nullptr;
  const uint64_t start = static_cast<uint64_t>(blockIdx.x) * p.hidden;
  gptr<float> x = global<float>(p.x) + start;
  vec<float, 4> held[kHeld], weight[kHeld], delta[kHeld], reference[kHeld];
  // All loads before the first store: the compiler may not move one over the other. The weights share their registers.
  const float* first_weight = norms_delta ? p.post_norm : norms ? p.weight : nullptr;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const uint32_t i = (h * blockDim.x + threadIdx.x) * 4;
    if (i >= p.hidden) continue;
    held[h] = load_vec<4>(x + i);
    if (adds) delta[h] = load_vec<4>(global<const float>(p.delta) + start + i);
    if (compares && p.reference != nullptr) reference[h] = load_vec<4>(global<const float>(p.reference) + start + i);
    if (first_weight != nullptr) weight[h] = load_vec<4>(global<const float>(first_weight) + i);
  }
  if (norms_delta) {
    float squares = 0.0f;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if ((h * blockDim.x + threadIdx.x) * 4 >= p.hidden) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) squares += delta[h][e] * delta[h][e];
    }
    const float inv = inv_rms(cta_sum(squares, scratch), p);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const uint32_t i = (h * blockDim.x + threadIdx.x) * 4;
      if (i >= p.hidden) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) delta[h][e] = delta[h][e] * inv * weight[h][e];
      if (norms) weight[h] = load_vec<4>(global<const float>(p.weight) + i);
    }
  }
  Sums sums;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const uint32_t i = (h * blockDim.x + threadIdx.x) * 4;
    if (i >= p.hidden) continue;
    if (p.reference == nullptr) reference[h] = held[h];
    if (adds) {
#pragma unroll
      for (int e = 0; e < 4; ++e) held[h][e] += delta[h][e];
      store_vec(x + i, held[h]);
    }
    if (p.keep != nullptr) store_vec(global<float>(p.keep) + start + i, held[h]);
    if (rounds) store_vec(global<T>(p.y) + start + i, round_vec<T>(held[h]));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums.after += held[h][e] * held[h][e];
      sums.product += reference[h][e] * held[h][e];
      sums.before += reference[h][e] * reference[h][e];
    }
  }
  if (!norms && !compares) return;
  sums = cta_sums(sums, compares, scratch);
  if (compares && threadIdx.x == 0) store_similarity(p, blockIdx.x, sums);
  if (!norms) return;
  const float inv = inv_rms(sums.after, p);
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const uint32_t i = (h * blockDim.x + threadIdx.x) * 4;
    if (i >= p.hidden) continue;
    vec<T, 4> y;
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = from_float<T>(held[h][e] * inv * weight[h][e]);
    store_vec(global<T>(p.y) + start + i, y);
  }
}

// The same for any hidden: x is read again for y, by the thread that wrote it, and delta twice where it is normed. kWidth is 4
// where hidden % 4 == 0, else 1.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kLongThreads) add_rms_norm_long_kernel(const __grid_constant__ rksc_add_rms_norm_params p) {
  RKSC_SHARED(float, scratch, 96);
  const bool adds = p.delta != nullptr, norms_delta = adds && p.post_norm != nullptr;
  const bool compares = p.similarity != nullptr, norms = p.weight != nullptr, rounds = !norms && p.y != nullptr;
  const uint64_t start = static_cast<uint64_t>(blockIdx.x) * p.hidden;
  gptr<float> x = global<float>(p.x) + start;
  float delta_inv = 1.0f;
  if (norms_delta) {
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x * kWidth; i < p.hidden; i += kLongThreads * kWidth) {
      const vec<float, kWidth> delta = load_vec<kWidth>(global<const float>(p.delta) + start + i);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) squares += delta[e] * delta[e];
    }
    delta_inv = inv_rms(cta_sum(squares, scratch), p);
  }
  Sums sums;
  for (uint32_t i = threadIdx.x * kWidth; i < p.hidden; i += kLongThreads * kWidth) {
    vec<float, kWidth> after = load_vec<kWidth>(x + i);
    vec<float, kWidth> reference = after;
    if (compares && p.reference != nullptr) reference = load_vec<kWidth>(global<const float>(p.reference) + start + i);
    if (adds) {
      vec<float, kWidth> delta = load_vec<kWidth>(global<const float>(p.delta) + start + i);
      if (norms_delta) {
        const vec<float, kWidth> post_norm = load_vec<kWidth>(global<const float>(p.post_norm) + i);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) delta[e] = delta[e] * delta_inv * post_norm[e];
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) after[e] += delta[e];
      store_vec(x + i, after);
    }
    if (p.keep != nullptr) store_vec(global<float>(p.keep) + start + i, after);
    if (rounds) store_vec(global<T>(p.y) + start + i, round_vec<T>(after));
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      sums.after += after[e] * after[e];
      sums.product += reference[e] * after[e];
      sums.before += reference[e] * reference[e];
    }
  }
  if (!norms && !compares) return;
  sums = cta_sums(sums, compares, scratch);
  if (compares && threadIdx.x == 0) store_similarity(p, blockIdx.x, sums);
  if (!norms) return;
  const float inv = inv_rms(sums.after, p);
  for (uint32_t i = threadIdx.x * kWidth; i < p.hidden; i += kLongThreads * kWidth) {
    const vec<float, kWidth> after = load_vec<kWidth>(x + i);
    const vec<float, kWidth> weight = load_vec<kWidth>(global<const float>(p.weight) + i);
    vec<T, kWidth> y;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) y[e] = from_float<T>(after[e] * inv * weight[e]);
    store_vec(global<T>(p.y) + start + i, y);
  }
}

// Threads that hold a row of `hidden`: whole warps, kHeld vectors each. Derived, not measured: two vectors a thread keep all
// of a row's loads in flight with half the warps in the reduction.
uint32_t row_threads(uint32_t hidden) { return div_up(div_up(hidden, 4 * kHeld), 32) * 32; }

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(add_rms_norm)(const rksc_add_rms_norm_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->hidden > 0 && (p->weight == nullptr || p->y != nullptr));
  if (p->num_rows == 0) return 0;
  if (p->delta == nullptr && p->y == nullptr && p->similarity == nullptr && p->keep == nullptr) return 0;
  const dim3 grid(p->num_rows);
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    if (p->hidden % 4 != 0) return launch(add_rms_norm_long_kernel<T, 1>, grid, dim3(kLongThreads), 0, stream, *p);
    if (p->hidden > kMaxThreads * kHeld * 4) {
      return launch(add_rms_norm_long_kernel<T, 4>, grid, dim3(kLongThreads), 0, stream, *p);
    }
    const dim3 threads(row_threads(p->hidden));
    const bool plain = p->post_norm == nullptr && (p->weight != nullptr || p->y == nullptr);
    if (plain) return launch(add_rms_norm_kernel<T, true>, grid, threads, 0, stream, *p);
    return launch(add_rms_norm_kernel<T, false>, grid, threads, 0, stream, *p);
  });
}

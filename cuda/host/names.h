// names.h -- CUDA's names for the emulation: qualifiers, indices, collectives, bit and math functions, 16-bit conversions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <bit>
#include <cmath>

#include "core.h"

// ---- qualifiers -------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline  // where it pays: forced into every instance, attention alone compiles for over a minute
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define threadIdx (::simt::cur.thread_idx)
#define blockIdx (::simt::cur.block_idx)
#define blockDim (::simt::cur.block_dim)
#define gridDim (::simt::cur.grid_dim)
constexpr int warpSize = 32;

// ---- 16-bit floats ----------------------------------------------------------------------------------------------

namespace simt {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | rest);
  // The exponent is rebased by an exact multiplication, which also normalises subnormals.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(0x7fff);  // as a GPU does: the sign and payload are lost
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to nearest even by the addition.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t rebased = magnitude - 0x38000000;
  return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // as a GPU does
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace simt

// ---- barriers, fences, collectives --------------------------------------------------------------------------------

SIMT_INLINE void __syncthreads() { simt::sync_threads(); }
SIMT_INLINE int __syncthreads_count(int p) { return simt::sync_threads_vote(simt::Vote::kCount, p); }
SIMT_INLINE int __syncthreads_and(int p) { return simt::sync_threads_vote(simt::Vote::kAnd, p); }
SIMT_INLINE int __syncthreads_or(int p) { return simt::sync_threads_vote(simt::Vote::kOr, p); }
SIMT_INLINE void __syncwarp(uint32_t mask = 0xffffffffu) { simt::sync_warp(mask); }
SIMT_INLINE void __threadfence() { simt::thread_fence(); }
SIMT_INLINE void __threadfence_block() {}
SIMT_INLINE void __trap() { simt::fault("__trap"); }

namespace simt {

// A shuffle's value, carried in 64 bits.
template <typename T>
SIMT_INLINE T shuffle(uint32_t mask, T value, uint32_t source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t carried = 0;
  __builtin_memcpy(&carried, &value, sizeof(T));
  carried = exchange(Collective::kShuffle, mask, carried, source);
  __builtin_memcpy(&value, &carried, sizeof(T));
  return value;
}
SIMT_INLINE uint32_t lane_id() { return cur.me & 31; }
SIMT_INLINE uint32_t shuffle_xor_source(uint32_t lane_mask, uint32_t width) {
  const uint32_t lane = lane_id(), source = lane ^ lane_mask;
  return source >= (lane & ~(width - 1)) + width ? lane : source;
}
SIMT_INLINE uint32_t shuffle_source(uint32_t source, uint32_t width) {
  return (lane_id() & ~(width - 1)) + (source & (width - 1));
}
SIMT_INLINE uint32_t shuffle_up_source(uint32_t delta, uint32_t width) {
  const uint32_t lane = lane_id();
  return (lane & (width - 1)) < delta ? lane : lane - delta;
}
SIMT_INLINE uint32_t shuffle_down_source(uint32_t delta, uint32_t width) {
  const uint32_t lane = lane_id();
  return (lane & (width - 1)) + delta >= width ? lane : lane + delta;
}

}  // namespace simt

// Overloads and not templates, so that elements of views convert.
#define SIMT_SHUFFLES(T)                                                                                \
  SIMT_INLINE T __shfl_sync(uint32_t mask, T v, int lane, int width = 32) {                             \
    return simt::shuffle(mask, v, simt::shuffle_source(static_cast<uint32_t>(lane), width));            \
  }                                                                                                     \
  SIMT_INLINE T __shfl_xor_sync(uint32_t mask, T v, int lane_mask, int width = 32) {                    \
    return simt::shuffle(mask, v, simt::shuffle_xor_source(static_cast<uint32_t>(lane_mask), width));   \
  }                                                                                                     \
  SIMT_INLINE T __shfl_up_sync(uint32_t mask, T v, uint32_t delta, int width = 32) {                    \
    return simt::shuffle(mask, v, simt::shuffle_up_source(delta, width));                               \
  }                                                                                                     \
  SIMT_INLINE T __shfl_down_sync(uint32_t mask, T v, uint32_t delta, int width = 32) {                  \
    return simt::shuffle(mask, v, simt::shuffle_down_source(delta, width));                             \
  }
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(unsigned int)
SIMT_SHUFFLES(long)
SIMT_SHUFFLES(unsigned long)
SIMT_SHUFFLES(long long)
SIMT_SHUFFLES(unsigned long long)
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(double)
#undef SIMT_SHUFFLES

SIMT_INLINE uint32_t __ballot_sync(uint32_t mask, int p) {
  return static_cast<uint32_t>(simt::exchange(simt::Collective::kBallot, mask, p != 0, 0));
}
SIMT_INLINE int __any_sync(uint32_t mask, int p) {
  return static_cast<int>(simt::exchange(simt::Collective::kAny, mask, p != 0, 0));
}
SIMT_INLINE int __all_sync(uint32_t mask, int p) {
  return static_cast<int>(simt::exchange(simt::Collective::kAll, mask, p != 0, 0));
}
#define SIMT_REDUCE(name, op)                                                         \
  SIMT_INLINE uint32_t name(uint32_t mask, uint32_t v) {                              \
    return static_cast<uint32_t>(simt::exchange(simt::Collective::op, mask, v, 0));   \
  }
SIMT_REDUCE(__reduce_add_sync, kReduceAdd)
SIMT_REDUCE(__reduce_min_sync, kReduceMin)
SIMT_REDUCE(__reduce_max_sync, kReduceMax)
SIMT_REDUCE(__reduce_and_sync, kReduceAnd)
SIMT_REDUCE(__reduce_or_sync, kReduceOr)
SIMT_REDUCE(__reduce_xor_sync, kReduceXor)
SIMT_REDUCE(__match_any_sync, kMatchAny)
#undef SIMT_REDUCE

// ---- bits -------------------------------------------------------------------------------------------------------

SIMT_INLINE float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
SIMT_INLINE float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
SIMT_INLINE uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
SIMT_INLINE int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }
SIMT_INLINE int __popc(uint32_t x) { return std::popcount(x); }
SIMT_INLINE int __popcll(uint64_t x) { return std::popcount(x); }
SIMT_INLINE int __clz(uint32_t x) { return std::countl_zero(x); }
SIMT_INLINE int __clzll(uint64_t x) { return std::countl_zero(x); }
SIMT_INLINE int __ffs(uint32_t x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
SIMT_INLINE int __ffsll(uint64_t x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
SIMT_INLINE uint32_t __brev(uint32_t x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
SIMT_INLINE uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
SIMT_INLINE uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
SIMT_INLINE uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
SIMT_INLINE uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
SIMT_INLINE uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7)) & 0xff);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// ---- math -------------------------------------------------------------------------------------------------------

SIMT_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __frcp_rn(float x) { return 1.0f / x; }
SIMT_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE float __expf(float x) { return expf(x); }
SIMT_INLINE float __logf(float x) { return logf(x); }
SIMT_INLINE float __log2f(float x) { return log2f(x); }
SIMT_INLINE float __sinf(float x) { return sinf(x); }
SIMT_INLINE float __cosf(float x) { return cosf(x); }
SIMT_INLINE float __powf(float a, float b) { return powf(a, b); }
SIMT_INLINE void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
SIMT_INLINE float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
SIMT_INLINE int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
SIMT_INLINE int __float2int_rz(float x) { return static_cast<int>(x); }
SIMT_INLINE int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
SIMT_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }
SIMT_INLINE float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

#define SIMT_MIN_MAX(T)                                 \
  SIMT_INLINE T min(T a, T b) { return b < a ? b : a; } \
  SIMT_INLINE T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned int)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
SIMT_INLINE unsigned int min(int a, unsigned int b) { return min(static_cast<unsigned int>(a), b); }
SIMT_INLINE unsigned int min(unsigned int a, int b) { return min(a, static_cast<unsigned int>(b)); }
SIMT_INLINE unsigned int max(int a, unsigned int b) { return max(static_cast<unsigned int>(a), b); }
SIMT_INLINE unsigned int max(unsigned int a, int b) { return max(a, static_cast<unsigned int>(b)); }
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }
SIMT_INLINE double min(double a, double b) { return fmin(a, b); }
SIMT_INLINE double max(double a, double b) { return fmax(a, b); }

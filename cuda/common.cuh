// common.cuh -- what every kernel file builds on: element types, memory views, vectors, reductions, launch and dispatch.
//
// A kernel file is compiled twice: by nvcc for a GPU, and as C++20 against cuda/host for the emulation. Everything that differs
// is behind this header and mma.cuh. Kernels reach memory only through the views below: under nvcc they are plain pointers,
// in the emulation every access is checked.
//
//   gptr<T>                     global memory; made from a params pointer by global<T>(p)
//   smem<T>                     shared memory; made by RKSC_SHARED(T, name, count) or dynamic_shared<T>(byte_offset)
//   p[i], p + i                 element and pointer arithmetic. Never `auto x = p[i]`: name the type (an element is a proxy in the
//                               emulation). p[i] = v, p[i] += v and T v = p[i] work on both.
//   load_vec<N>(p)              N elements at once from a gptr or smem, N * sizeof(T) <= 16 bytes, aligned to that
//   store_vec(p, v)             the inverse
//   atomic_add, atomic_max      on gptr or smem of uint32_t or uint64_t; return the old value. No float atomics anywhere.
//
// __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __any_sync, __all_sync, __threadfence, threadIdx, blockIdx, blockDim,
// gridDim and the math functions keep their CUDA names in both. Barriers and shuffles must be reached by all threads of the CTA
// or by all 32 lanes of the warp.
#pragma once

#include <stdint.h>

#include "../include/rksc_kernels.h"

#ifdef RKSC_EMULATED
#include "host/simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

template <typename T>
using gptr = T*;
template <typename T>
using smem = T*;

template <typename T, typename P>
__device__ __forceinline__ gptr<T> global(P* p) {
  return reinterpret_cast<T*>(p);
}

// A static shared array of the CTA.
#define RKSC_SHARED(T, name, count)              \
  __shared__ __align__(16) T name##_memory[count]; \
  smem<T> name = name##_memory

extern __shared__ __align__(128) unsigned char rksc_dynamic_memory[];
template <typename T>
__device__ __forceinline__ smem<T> dynamic_shared(uint32_t byte_offset) {
  return reinterpret_cast<T*>(rksc_dynamic_memory + byte_offset);
}

__device__ __forceinline__ uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
__device__ __forceinline__ uint64_t atomic_add(uint64_t* p, uint64_t v) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ uint32_t atomic_max(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
__device__ __forceinline__ uint64_t atomic_max(uint64_t* p, uint64_t v) {
  return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

#endif  // RKSC_EMULATED

#define RKSC_DEVICE __device__ __forceinline__

// ---- element types ----------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RKSC_DEVICE float to_float(float x) { return x; }
RKSC_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
#ifdef RKSC_EMULATED
RKSC_DEVICE float to_float(f16 x) { return simt::half_to_float(x.bits); }
#else
RKSC_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
#endif

// Rounds to nearest, ties to even.
template <typename T>
RKSC_DEVICE T from_float(float x);
template <>
RKSC_DEVICE float from_float<float>(float x) {
  return x;
}
#ifdef RKSC_EMULATED
template <>
RKSC_DEVICE bf16 from_float<bf16>(float x) {
  return bf16{simt::float_to_bfloat16(x)};
}
template <>
RKSC_DEVICE f16 from_float<f16>(float x) {
  return f16{simt::float_to_half(x)};
}
#else
template <>
RKSC_DEVICE bf16 from_float<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
RKSC_DEVICE f16 from_float<f16>(float x) {
  return f16{__half_as_ushort(__float2half_rn(x))};
}
#endif

// 2^x to about 2 ulp; results below 2^-126 are 0. Weights of a softmax, where the spare range of exp2f costs three instructions.
#ifdef RKSC_EMULATED
RKSC_DEVICE float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
#else
RKSC_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// ---- vectors ----------------------------------------------------------------------------------------------------

template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
  T v[N];
  RKSC_DEVICE T& operator[](int i) { return v[i]; }
  RKSC_DEVICE const T& operator[](int i) const { return v[i]; }
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

#ifndef RKSC_EMULATED
template <int N, typename T>
__device__ __forceinline__ vec<T, N> load_vec(const T* p) {
  return *reinterpret_cast<const vec<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const vec<T, N>& v) {
  *reinterpret_cast<vec<T, N>*>(p) = v;
}
#endif

// ---- reductions: fixed butterfly order, so the same bits every time -------------------------------------------------

constexpr uint32_t kFullMask = 0xffffffffu;

RKSC_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
RKSC_DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// Sum over the CTA, the same in every thread. `scratch` holds 32 floats; it may be reused after the next barrier.
RKSC_DEVICE float cta_sum(float x, smem<float> scratch) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float total = 0.0f;
  for (uint32_t w = 0; w < num_warps; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// ---- launch and dispatch -----------------------------------------------------------------------------------------

// cudaErrorInvalidValue.
constexpr int32_t kInvalidValue = 1;

#define RKSC_REQUIRE(condition) \
  do {                          \
    if (!(condition)) return kInvalidValue; \
  } while (0)

inline uint32_t div_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
RKSC_DEVICE uint32_t div_up_device(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

#ifndef RKSC_EMULATED
// Launches and reports. More than 48 KiB of dynamic shared memory is opted into here.
template <typename Params>
inline int32_t launch(void (*kernel)(Params), dim3 grid, dim3 block, uint32_t shared_bytes, rksc_stream stream, const Params& p) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (e != cudaSuccess) return e;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
#endif

// Runs `...` (a callable taking no arguments) with T bound to the element type, or reports an unknown one.
#define RKSC_DISPATCH_DTYPE(dtype, T, ...)          \
  [&]() -> int32_t {                                \
    switch (dtype) {                                \
      case RKSC_F32: { using T = float; return __VA_ARGS__(); } \
      case RKSC_BF16: { using T = bf16; return __VA_ARGS__(); } \
      case RKSC_F16: { using T = f16; return __VA_ARGS__(); }   \
      default: return kInvalidValue;                \
    }                                               \
  }()

// The same for the two types that tensor cores take.
#define RKSC_DISPATCH_DTYPE_16(dtype, T, ...)       \
  [&]() -> int32_t {                                \
    switch (dtype) {                                \
      case RKSC_BF16: { using T = bf16; return __VA_ARGS__(); } \
      case RKSC_F16: { using T = f16; return __VA_ARGS__(); }   \
      default: return kInvalidValue;                \
    }                                               \
  }()

#define RKSC_DISPATCH_HEAD_DIM(head_dim, kHeadDim, ...)                 \
  [&]() -> int32_t {                                                    \
    switch (head_dim) {                                                 \
      case 32: { constexpr int kHeadDim = 32; return __VA_ARGS__(); }   \
      case 64: { constexpr int kHeadDim = 64; return __VA_ARGS__(); }   \
      case 80: { constexpr int kHeadDim = 80; return __VA_ARGS__(); }   \
      case 96: { constexpr int kHeadDim = 96; return __VA_ARGS__(); }   \
      case 128: { constexpr int kHeadDim = 128; return __VA_ARGS__(); } \
      case 256: { constexpr int kHeadDim = 256; return __VA_ARGS__(); } \
      default: return kInvalidValue;                                    \
    }                                                                   \
  }()

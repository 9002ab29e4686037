// mma.cuh -- tensor-core and asynchronous-copy helpers: one signature, a device path here and an emulated path in
// host/mma.h. sm_80 and up. T is bf16 or f16; accumulation is f32.
//
// Fragment layout of mma.m16n8k16 (row.col), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4; two 16-bit elements a register,
// the lower k in the low half:
//   A [16, 16]  r[0] (g, 2t)   r[1] (g + 8, 2t)   r[2] (g, 2t + 8)   r[3] (g + 8, 2t + 8)
//   B [16, 8]   r[0] (2t, g)   r[1] (2t + 8, g)          (k, n)
//   C [16, 8]   v[0] (g, 2t)   v[1] (g, 2t + 1)   v[2] (g + 8, 2t)   v[3] (g + 8, 2t + 1)
#pragma once

#include "common.cuh"

struct FragA {
  uint32_t r[4];
};
struct FragB {
  uint32_t r[2];
};
struct FragC {
  float v[4];
};

// Two neighbours of T in a register, `low` in the low half.
template <typename T>
RKSC_DEVICE uint32_t pack2(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

#ifdef RKSC_EMULATED
#include "host/mma.h"
#else

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(FragC& c, const FragA& a, const FragB& b);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(FragC& c, const FragA& a, const FragB& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(FragC& c, const FragA& a, const FragB& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

// Four 8x8 tiles of 16-bit elements: lane l names row l % 8 of tile l / 8 (16 bytes, aligned); r[i] is tile i.
// Without transposition lane l receives elements (l / 4, 2 (l % 4)) and its right neighbour; with it, the tile transposed.
template <typename T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], smem<const T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
template <typename T>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], smem<const T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// Two tiles, named by lanes 0..15 (the others must still name readable rows).
template <typename T>
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], smem<const T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared, asynchronously; zeros where `valid` is false (`src` must then still be a legal address).
// Visible to the copying thread after cp_async_wait, to others after a barrier behind that.
template <typename T>
__device__ __forceinline__ void cp_async_16(smem<T> dst, gptr<const T> src, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(dst));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the committed groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif  // RKSC_EMULATED

// codes.cuh -- what linear_w4 and linear_w8 share: steps from codes to numbers, and a warp's way through its units of k.
#pragma once

#include <type_traits>

#include "gemm.cuh"

// Of a unit: 32 k, which are one word (4 bits) or two (8 bits) of every output that a lane reads.
constexpr int kChunks = kUnit / 32;

// (word & mask) | magic in one instruction.
RKSC_DEVICE uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t magic) {
#ifdef RKSC_EMULATED
  return (word & mask) | magic;
#else
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word), "r"(mask), "r"(magic));
  return v;
#endif
}

// Sums of two pairs, each rounded once.
template <typename T>
RKSC_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
#ifdef RKSC_EMULATED
  const auto half = [](uint32_t v, int shift) { return to_float(T{static_cast<uint16_t>(v >> shift)}); };
  return pack2<T>(half(a, 0) + half(b, 0), half(a, 16) + half(b, 16));
#else
  uint32_t sum;
  if constexpr (std::is_same_v<T, f16>) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {
    // a * 1 + b: sm_80 has no addition of bf16 pairs.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  }
  return sum;
#endif
}

// Products of two pairs, each rounded once.
template <typename T>
RKSC_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
#ifdef RKSC_EMULATED
  const auto half = [](uint32_t v, int shift) { return to_float(T{static_cast<uint16_t>(v >> shift)}); };
  return pack2<T>(half(a, 0) * half(b, 0), half(a, 16) * half(b, 16));
#else
  uint32_t product;
  if constexpr (std::is_same_v<T, f16>) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  } else {
    // a * b - 0: sm_80 has no multiplication of bf16 pairs.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  }
  return product;
#endif
}

// A warp's units of k, every num_warps-th of the slice, through its ring of kRing units: codes are sent for kRing units ahead, rows of
// x one chunk ahead, a group's scales where it begins.
template <int kTiles, int kRing, typename Warp, typename Params>
RKSC_DEVICE void stream_units(Warp& ww, const Slice& slice, uint32_t warp, uint32_t num_warps, const Params& p) {
  uint32_t unit = slice.first + warp, slot = 0;
#pragma unroll
  for (int i = 0; i < kRing; ++i) ww.fetch(unit + i * num_warps, i);
  vec<uint32_t, 4> b[kTiles], next[kTiles];
  ww.load_rows(next, unit * (kUnit / 2), 0);
  for (; unit < slice.last; unit += num_warps) {
    ww.load_groups(unit, 0);
    // The oldest of kRing groups. Lanes read what others sent for: all have to have waited.
    cp_async_wait<kRing - 1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) b[n] = next[n];
      ww.load_rows(next, (j + 1 < kChunks ? unit : unit + num_warps) * (kUnit / 2), (j + 1) % kChunks);
      if (j > 0 && ((32 * j) & (p.group_size - 1)) == 0) ww.load_groups(unit, j);
      ww.multiply(b, slot, j);
    }
    // All lanes have read the slot.
    __syncwarp();
    ww.fetch(unit + kRing * num_warps, slot);
    slot = slot + 1 == kRing ? 0 : slot + 1;
  }
}

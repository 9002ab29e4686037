// codes.cuh -- steps from codes to numbers that linear_w4 and linear_w8 share.
#pragma once

#include <type_traits>

#include "mma.cuh"

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

// rotary.cuh -- which elements of a head RoPE turns with which, shared by the kernels that write keys.
#pragma once

#include "common.cuh"

// Pairs of a head of 256.
constexpr uint32_t kMaxPairs = 128;

// A head as pairs of elements, so that every element has a place in one of them. Of R = rotary_dim elements that turn and D in all,
// pair i is
//   i in [0, R / 2)        (i, i + R / 2), turned by the angle of inv_freq[i]
//   i in [R / 2, D / 2)    (i + R / 2, i + D / 2), elements from R on, which pass
// Neighbouring pairs have neighbouring elements within each of the two ranges.
struct HeadPairs {
  uint32_t turned, all;
  RKSC_DEVICE HeadPairs(uint32_t head_dim, uint32_t rotary_dim) : turned(rotary_dim / 2), all(head_dim / 2) {}
  RKSC_DEVICE uint32_t low(uint32_t i) const { return i < turned ? i : i + turned; }
  RKSC_DEVICE uint32_t high(uint32_t i) const { return i < turned ? i + turned : i + all; }
};

inline bool can_rotate(uint32_t head_dim, uint32_t rotary_dim) {
  return head_dim % 2 == 0 && head_dim <= 2 * kMaxPairs && rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= head_dim;
}

// Whether four neighbouring pairs are two vectors of four elements, all turned or none.
inline bool pairs_in_fours(uint32_t head_dim, uint32_t rotary_dim) { return head_dim % 8 == 0 && rotary_dim % 8 == 0; }

// softmax_part.cuh -- statistics of a part of a row of logits, and how two parts make one: maximum, second, argmax, and the sums that
// lse and entropy are made of. Whoever splits a row takes a Part of each piece and merges them in an order of its own choosing.
//
// Invariant: the largest term, e^0, is never added to the sum but counted apart. ln Z = log1p(rest) and the weighted sum then keep their
// relative precision where one token has nearly all of the mass and Z in f32 would be 1.
#pragma once

#include "common.cuh"

constexpr uint32_t kNone = 0xffffffffu;

struct Part {
  float max, second;  // second largest; equal to max when that occurs twice
  float rest;         // sum of e^(l - max) over all but one occurrence of max; -1 where there is nothing at all
  float weighted;     // sum of (l - max) e^(l - max)
  uint32_t idx;       // lowest output with max
  uint32_t finite;
};
constexpr float kInfinity = __builtin_huge_valf();
RKSC_DEVICE Part empty_part() { return Part{-kInfinity, -kInfinity, -1.0f, 0.0f, kNone, 1}; }

// Far enough that e^z is 0, near enough that z e^z is too, and no infinity.
RKSC_DEVICE float below(float l, float max) { return fmaxf(l - max, -1000.0f); }

// The same whichever way round: the larger maximum, or lower index, leads.
RKSC_DEVICE Part merge(const Part& a, const Part& b) {
  const bool a_leads = a.max > b.max || (a.max == b.max && a.idx < b.idx);
  const Part& hi = a_leads ? a : b;
  const Part& lo = a_leads ? b : a;
  const float shift = below(lo.max, hi.max), scale = expf(shift), mass = 1.0f + lo.rest;
  return Part{hi.max, fmaxf(hi.second, lo.max), fmaf(scale, mass, hi.rest), hi.weighted + scale * fmaf(shift, mass, lo.weighted), hi.idx,
              hi.finite & lo.finite};
}
RKSC_DEVICE Part warp_merge(Part part) {
  for (int step = 16; step > 0; step >>= 1) {
    Part other;
    other.max = __shfl_xor_sync(kFullMask, part.max, step);
    other.second = __shfl_xor_sync(kFullMask, part.second, step);
    other.rest = __shfl_xor_sync(kFullMask, part.rest, step);
    other.weighted = __shfl_xor_sync(kFullMask, part.weighted, step);
    other.idx = __shfl_xor_sync(kFullMask, part.idx, step);
    other.finite = __shfl_xor_sync(kFullMask, part.finite, step);
    part = merge(part, other);
  }
  return part;
}

// The part of `count` logits, outputs first .. first + count, by a warp; the same in every lane.
RKSC_DEVICE Part logits_part(smem<const float> logits, uint32_t count, uint32_t first) {
  const uint32_t lane = threadIdx.x % 32;
  Part part = empty_part();
  for (uint32_t i = lane; i < count; i += 32) {
    const float l = logits[i];
    // False for NaN too.
    if (!(fabsf(l) < kInfinity)) part.finite = 0;
    part.second = fmaxf(part.second, fminf(part.max, l));
    if (l > part.max) {
      part.max = l;
      part.idx = first + i;
    }
  }
  for (int step = 16; step > 0; step >>= 1) {
    const float max = __shfl_xor_sync(kFullMask, part.max, step), second = __shfl_xor_sync(kFullMask, part.second, step);
    const uint32_t idx = __shfl_xor_sync(kFullMask, part.idx, step);
    part.finite &= __shfl_xor_sync(kFullMask, part.finite, step);
    part.second = fmaxf(fmaxf(part.second, second), fminf(part.max, max));
    if (max > part.max || (max == part.max && idx < part.idx)) {
      part.max = max;
      part.idx = idx;
    }
  }
  float rest = 0.0f, weighted = 0.0f;
  for (uint32_t i = lane; i < count; i += 32) {
    if (first + i == part.idx) continue;
    const float l = logits[i], z = below(l, part.max), e = expf(z);
    rest += e;
    weighted = fmaf(z, e, weighted);
  }
  part.rest = warp_sum(rest);
  part.weighted = warp_sum(weighted);
  return part;
}

// sample_row.cuh -- what sample.cu does to a logits row before it weighs anything: reading it, its extremes, biases and penalties.
#pragma once

#include "common.cuh"

namespace sampling {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kWarps = kThreads / 32;
// Bins of the histogram of a row, and of one that narrows a crowded bin.
constexpr uint32_t kBins = 2048, kFineBits = 9, kFineBins = 1u << kFineBits;
// Tokens that are ranked against one another.
constexpr uint32_t kListed = 512;

// Shared memory in bytes. Penalty counters lie over the histogram and the list, a fine histogram over the list.
constexpr uint32_t kHistogramAt = 0, kListAt = kHistogramAt + 3 * 4 * kBins;
constexpr uint32_t kWarpMassAt = kListAt + 2 * 8 * kListed, kWarpCountAt = kWarpMassAt + 8 * kWarps;
constexpr uint32_t kWordsAt = kWarpCountAt + 4 * kWarps, kSharedBytes = kWordsAt + 8 * 6;
constexpr uint32_t kCounters = kWarpMassAt / 4;
static_assert(3 * 4 * kFineBins <= 2 * 8 * kListed);

// Words that one thread writes and all read.
constexpr uint32_t kBin = 0, kMassBefore = 1, kCountBefore = 2, kToken = 3, kMassReached = 4;
RKSC_DEVICE smem<uint64_t> words() { return dynamic_shared<uint64_t>(kWordsAt); }
// Counters that all threads raise; of 32 bits, which shared memory adds in one go.
constexpr uint32_t kNumListed = 0, kSavedAt = 1;
RKSC_DEVICE smem<uint32_t> counters() { return dynamic_shared<uint32_t>(kWordsAt + 8 * 5); }

// What is asked of this CTA's row. Read again wherever it is needed: kept, it would cost registers throughout.
RKSC_DEVICE rksc_sample_row request(const rksc_sample_params& p) { return global<const rksc_sample_row>(p.rows)[blockIdx.x]; }

// The splitmix64 finaliser, as in sampler.rs.
RKSC_DEVICE uint64_t mix(uint64_t x) {
  uint64_t z = x + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// The 53 bits of the row's uniform number, at the top of a word.
RKSC_DEVICE uint64_t uniform_bits(const rksc_sample_row& r) { return mix(mix(mix(r.seed) ^ r.path) ^ r.position) & ~0x7ffull; }

// ---- the row ----------------------------------------------------------------------------------------------------

struct Row {
  gptr<float> x;
  uint32_t vocab;
  uint32_t lead;  // logits between the 16-byte boundary at or before x and x
};

RKSC_DEVICE vec<float, 4> load_logits(const Row& row, uint32_t v) {
  const uint32_t first = v * 4 - row.lead;
  if (v * 4 >= row.lead && first + 4 <= row.vocab) return load_vec<4>(row.x + first);
  vec<float, 4> x;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    // Before the row the id wraps round and is past it too.
    const uint32_t id = first + e;
    x[e] = -INFINITY;
    if (id < row.vocab) x[e] = row.x[id];
  }
  return x;
}

// f(id, logit) for every logit; also for a few ids outside the row, with -infinity. A thread loads kAhead vectors before it
// looks at the first.
template <int kAhead, typename F>
RKSC_DEVICE void for_each_logit(const Row& row, F f) {
  const uint32_t vectors = (row.lead + row.vocab + 3) / 4;
  for (uint32_t v = threadIdx.x; v < vectors; v += kAhead * kThreads) {
    vec<float, 4> x[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) x[a] = load_logits(row, v + a * kThreads);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f((v + a * kThreads) * 4 + e - row.lead, x[a][e]);
    }
  }
}

struct Extremes {
  float max, min;  // NaN ignored; min over what is not -infinity
  uint32_t argmax;
};

// Bits whose order is that of the numbers; -0 counts as 0.
RKSC_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
RKSC_DEVICE float unordered(uint32_t bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }

RKSC_DEVICE uint64_t warp_max_u64(uint64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const uint64_t other = __shfl_xor_sync(kFullMask, x, step);
    x = other > x ? other : x;
  }
  return x;
}

RKSC_DEVICE Extremes extremes(const Row& row) {
  smem<uint64_t> warp_top = dynamic_shared<uint64_t>(kWarpMassAt);
  smem<uint32_t> warp_low = dynamic_shared<uint32_t>(kWarpCountAt);
  // The larger the better the token: its logit, then the lower id.
  uint64_t top = static_cast<uint64_t>(ordered(-INFINITY)) << 32 | 0xffffffffu;
  uint32_t low = 0xffffffffu;
  for_each_logit<4>(row, [&](uint32_t id, float x) {
    if (x != x) return;
    const uint64_t packed = static_cast<uint64_t>(ordered(x)) << 32 | (0xffffffffu - id);
    if (packed > top) top = packed;
    if (x > -INFINITY) low = ordered(x) < low ? ordered(x) : low;
  });
  top = warp_max_u64(top);
  low = __reduce_min_sync(kFullMask, low);
  if (threadIdx.x % 32 == 0) {
    warp_top[threadIdx.x / 32] = top;
    warp_low[threadIdx.x / 32] = low;
  }
  // Every warp reduces what all of them wrote.
  __syncthreads();
  top = warp_max_u64(warp_top[threadIdx.x % 32]);
  low = __reduce_min_sync(kFullMask, warp_low[threadIdx.x % 32]);
  // The scratch may be written again.
  __syncthreads();
  return Extremes{unordered(static_cast<uint32_t>(top >> 32)), unordered(low), 0xffffffffu - static_cast<uint32_t>(top)};
}

// ---- penalties --------------------------------------------------------------------------------------------------

RKSC_DEVICE bool has_penalties(const rksc_sample_row& r) {
  return r.repetition_penalty != 1.0f || r.presence_penalty != 0.0f || r.frequency_penalty != 0.0f;
}

RKSC_DEVICE bool changes_logits(const rksc_sample_row& r) { return has_penalties(r) || r.num_bias != 0; }

RKSC_DEVICE float penalised(float x, uint32_t uses, const rksc_sample_row& r) {
  // Rounded step by step, never fused: the host does the same.
  if (r.repetition_penalty != 1.0f) x = x > 0.0f ? __fdiv_rn(x, r.repetition_penalty) : __fmul_rn(x, r.repetition_penalty);
  const uint32_t generated = uses & 0x7fffffffu;
  if (generated == 0) return x;
  return __fsub_rn(x, __fadd_rn(r.presence_penalty, __fmul_rn(r.frequency_penalty, static_cast<float>(generated))));
}

// Each token of the history once: the vocabulary in tiles of kCounters tokens, a counter each. Top bit: in the prompt or
// generated; the others: times generated.
RKSC_DEVICE void penalise(const Row& row, const rksc_sample_row& r, gptr<const uint32_t> history, gptr<float> saved) {
  smem<uint32_t> uses = dynamic_shared<uint32_t>(kHistogramAt);
  for (uint32_t tile = 0; tile < row.vocab; tile += kCounters) {
    const uint32_t size = row.vocab - tile < kCounters ? row.vocab - tile : kCounters;
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) uses[i] = 0;
    // Counters are zero before any is raised.
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < r.num_prompt + r.num_generated; i += kThreads) {
      const uint32_t at = r.history_start + i, offset = history[at] - tile;
      if (offset >= size) continue;
      saved[at] = row.x[tile + offset];
      atomic_max(uses + offset, 0x80000000u);
    }
    // The top bit is set before counts change what it is compared with.
    __syncthreads();
    for (uint32_t i = r.num_prompt + threadIdx.x; i < r.num_prompt + r.num_generated; i += kThreads) {
      const uint32_t offset = history[r.history_start + i] - tile;
      if (offset < size) atomic_add(uses + offset, 1u);
    }
    // Counts are complete, and logits saved, before logits change.
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t used = uses[i];
      if (used != 0) row.x[tile + i] = penalised(row.x[tile + i], used, r);
    }
    // Counters are read before the next tile clears them; the last tile's logits are written before anybody reads them.
    __syncthreads();
  }
}

RKSC_DEVICE void apply_history(const Row& row, const rksc_sample_params& p) {
  const rksc_sample_row r = request(p);
  gptr<const uint32_t> history = global<const uint32_t>(p.history);
  gptr<float> saved = global<float>(p.saved);
  for (uint32_t i = threadIdx.x; i < r.num_bias; i += kThreads) {
    const uint32_t at = r.bias_start + i, token = history[at];
    if (token >= row.vocab) continue;
    saved[at] = row.x[token];
    row.x[token] = __fadd_rn(row.x[token], __uint_as_float(history[at + r.num_bias]));
  }
  // Biases are added before penalties look at the sum, or anybody at the row.
  __syncthreads();
  if (has_penalties(r)) penalise(row, r, history, saved);
}

// The logit of `token` as it came in.
RKSC_DEVICE float logit_before(const Row& row, const rksc_sample_params& p, uint32_t token) {
  const rksc_sample_row r = request(p);
  gptr<const uint32_t> history = global<const uint32_t>(p.history);
  gptr<float> saved = global<float>(p.saved);
  smem<uint32_t> counter = counters();
  if (threadIdx.x == 0) counter[kSavedAt] = 0;
  // Zero before it is raised.
  __syncthreads();
  const uint32_t past = has_penalties(r) ? r.num_prompt + r.num_generated : 0;
  for (uint32_t i = threadIdx.x; i < past + r.num_bias; i += kThreads) {
    const uint32_t at = i < past ? r.history_start + i : r.bias_start + (i - past);
    if (history[at] == token) atomic_max(counter + kSavedAt, at + 1);
  }
  // The token's last place: its bias, which was added first, or any of its penalties, which all hold the same.
  __syncthreads();
  const uint32_t found = counter[kSavedAt];
  return found != 0 ? saved[found - 1] : row.x[token];
}

}  // namespace sampling

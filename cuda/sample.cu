// sample.cu -- from logits rows to tokens: biases, penalties, temperature, top-k, min-p, top-p, one seeded draw a row.
//
// No sort. A token weighs exp((x - max) / temperature) in units of 2^-kUnitBits, made with integers alone (weight_of), so
// that sums are exact: they depend neither on the order of additions nor on the GPU. All of top-k, top-p and the draw ask for
// the first token, most likely first and ties by id, at which a count or a mass is reached (search): a histogram over the
// distance to the maximum finds its bin, and the few tokens of a bin are ranked against one another.
#include "sample_row.cuh"

namespace {

using namespace sampling;

// The weight of the most likely token. 2^44 * 2^kIdBits stays below 2^64.
constexpr uint32_t kUnitBits = 44;
constexpr uint32_t kIdBits = 19;
constexpr uint32_t kInfinity = 0x7f800000u;

// ---- weights ----------------------------------------------------------------------------------------------------

// How a logit becomes a key and a weight.
struct Law {
  float max;
  uint32_t scale;  // log2(e) / temperature is scale * 2^(119 - shift - 32), the top bit of scale set
  int32_t shift;
  uint64_t floor;  // least weight that counts
  float bins_per_unit;
};

// ceil(x * 2^bits) for 0 <= x < 1.
RKSC_DEVICE uint64_t fixed(float x, uint32_t bits) {
  const uint32_t word = __float_as_uint(x), exponent = word >> 23;
  const uint64_t mantissa = (word & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0u);
  // x = mantissa * 2^(exponent - 150)
  const int32_t shift = static_cast<int32_t>(exponent) - 150 + static_cast<int32_t>(bits);
  if (shift >= 0) return mantissa << shift;
  if (shift < -24) return mantissa != 0;
  return (mantissa + (1ull << -shift) - 1) >> -shift;
}

RKSC_DEVICE Law make_law(const Extremes& e, const rksc_sample_params& p) {
  const rksc_sample_row r = request(p);
  // Subnormal temperatures lose their mantissa's leading one, and mean nothing.
  const float temperature = fmaxf(r.temperature, 1.17549435e-38f);
  const uint32_t bits = __float_as_uint(temperature), exponent = bits >> 23, mantissa = (bits & 0x7fffffu) | 0x800000u;
  // log2(e) * 2^63
  const uint64_t quotient = 0xb8aa3b295c17f0bcull / mantissa;
  const int32_t zeros = __clzll(quotient);
  Law law;
  law.max = e.max;
  law.scale = static_cast<uint32_t>(quotient << zeros >> 32);
  law.shift = zeros + static_cast<int32_t>(exponent) - 1;
  law.floor = fixed(r.min_p, kUnitBits);
  if (law.floor == 0) law.floor = 1;
  // Bins share evenly the distances whose weights are not 0 (fewer than kUnitBits + 2 octaves), as far as the row has them.
  const float range = fminf(e.max - e.min, (kUnitBits + 2) * 0.69314718f * temperature);
  law.bins_per_unit = kBins / fmaxf(range, 1e-30f);
  return law;
}

// Ascending keys are descending logits. Past kInfinity, unsigned: NaN.
RKSC_DEVICE uint32_t key_of(float x, const Law& law) { return __float_as_uint(law.max - x); }

// round(2^kUnitBits * exp(-distance / temperature)) within 2^-30 of it, or 0 where that is below the floor.
RKSC_DEVICE uint64_t weight_of(uint32_t key, const Law& law) {
  if (key >= kInfinity) return 0;
  const uint32_t exponent = key >> 23 != 0 ? key >> 23 : 1, mantissa = (key & 0x7fffffu) | (key >> 23 != 0 ? 0x800000u : 0u);
  // Octaves with 32 fraction bits: the product of two normal mantissas has at least 54, so that 16 places leave 64 octaves.
  const int32_t shift = law.shift - static_cast<int32_t>(exponent);
  if (shift <= 16) return 0;
  const uint64_t octaves = shift < 64 ? static_cast<uint64_t>(mantissa) * law.scale >> shift : 0;
  if (octaves >> 32 > kUnitBits + 1) return 0;
  const uint32_t f = static_cast<uint32_t>(octaves);
  // 1 - f * p(f) = 2^-f on [0, 1), p interpolated at Chebyshev nodes; all coefficients in 2^-32.
  uint32_t p = 0x0000bda6u;
  p = 0x0009c200u - __umulhi(p, f);
  p = 0x005728b0u - __umulhi(p, f);
  p = 0x027641a9u - __umulhi(p, f);
  p = 0x0e358127u - __umulhi(p, f);
  p = 0x3d7f7bcbu - __umulhi(p, f);
  p = 0xb17217f7u - __umulhi(p, f);
  const uint64_t power = (1ull << 32) - __umulhi(p, f);
  const uint64_t weight = ((power << (kUnitBits + 1 - 32) >> (octaves >> 32)) + 1) >> 1;
  return weight >= law.floor ? weight : 0;
}

// Never falls as the key rises.
RKSC_DEVICE uint32_t bin_of(uint32_t key, const Law& law) {
  return static_cast<uint32_t>(fminf(__uint_as_float(key) * law.bins_per_unit, kBins - 1.0f));
}

// The least key whose bin is at or past `bin`.
RKSC_DEVICE uint32_t first_key(uint32_t bin, const Law& law) {
  uint32_t low = 0, high = kInfinity;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (bin < kBins && bin_of(middle, law) >= bin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// ---- histograms -------------------------------------------------------------------------------------------------

// Per bin the mass, in two halves because shared memory adds no 64-bit numbers in one go, and the number of tokens.
struct Histogram {
  smem<uint32_t> low, high, count;
  uint32_t size;
};

RKSC_DEVICE Histogram histogram(uint32_t byte_offset, uint32_t size) {
  smem<uint32_t> all = dynamic_shared<uint32_t>(byte_offset);
  return Histogram{all, all + size, all + 2 * size, size};
}

RKSC_DEVICE void clear(const Histogram& h) {
  for (uint32_t i = threadIdx.x; i < 3 * h.size; i += kThreads) h.low[i] = 0;
  // Zero before anything is added.
  __syncthreads();
}

RKSC_DEVICE void add(const Histogram& h, uint32_t bin, uint64_t weight, bool counts) {
  const uint32_t part = static_cast<uint32_t>(weight);
  const uint32_t carry = atomic_add(h.low + bin, part) + part < part ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + carry;
  if (high != 0) atomic_add(h.high + bin, high);
  if (counts) atomic_add(h.count + bin, 1u);
}

RKSC_DEVICE uint64_t mass(const Histogram& h, uint32_t bin) {
  const uint32_t low = h.low[bin], high = h.high[bin];
  return static_cast<uint64_t>(high) << 32 | low;
}

// Every bin becomes the sum of those up to it. A thread owns two neighbours.
RKSC_DEVICE void accumulate(const Histogram& h) {
  smem<uint64_t> warp_mass = dynamic_shared<uint64_t>(kWarpMassAt);
  smem<uint32_t> warp_count = dynamic_shared<uint32_t>(kWarpCountAt);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * 2;
  // All additions are in.
  __syncthreads();
  uint64_t mass_0 = 0, mass_1 = 0;
  uint32_t count_0 = 0, count_1 = 0;
  if (first < h.size) {
    mass_0 = mass(h, first);
    mass_1 = mass(h, first + 1);
    count_0 = h.count[first];
    count_1 = h.count[first + 1];
  }
  uint64_t mass_here = mass_0 + mass_1;
  uint32_t count_here = count_0 + count_1;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint64_t mass_there = __shfl_up_sync(kFullMask, mass_here, step);
    const uint32_t count_there = __shfl_up_sync(kFullMask, count_here, step);
    if (lane >= step) {
      mass_here += mass_there;
      count_here += count_there;
    }
  }
  if (lane == 31) {
    warp_mass[warp] = mass_here;
    warp_count[warp] = count_here;
  }
  // Each warp adds the totals of those before it.
  __syncthreads();
  uint64_t mass_before = 0;
  uint32_t count_before = 0;
  if (lane < warp) {
    mass_before = warp_mass[lane];
    count_before = warp_count[lane];
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    mass_before += __shfl_xor_sync(kFullMask, mass_before, step);
    count_before += __shfl_xor_sync(kFullMask, count_before, step);
  }
  if (first < h.size) {
    const uint64_t mass_end = mass_before + mass_here, mass_middle = mass_end - mass_1;
    h.low[first] = static_cast<uint32_t>(mass_middle);
    h.high[first] = static_cast<uint32_t>(mass_middle >> 32);
    h.low[first + 1] = static_cast<uint32_t>(mass_end);
    h.high[first + 1] = static_cast<uint32_t>(mass_end >> 32);
    h.count[first] = count_before + count_here - count_1;
    h.count[first + 1] = count_before + count_here;
  }
  // Sums are read by all.
  __syncthreads();
}

// What is asked for: the first token at which the mass, or the number of tokens, reaches `amount` (at least 1).
struct Target {
  uint64_t amount;
  bool by_count;
};

struct Crossing {
  uint32_t bin;
  uint64_t mass_before;
  uint32_t count_before;
};

// The bin in which the target is reached. `h` is accumulated and holds enough.
RKSC_DEVICE Crossing locate(const Histogram& h, const Target& target) {
  smem<uint64_t> word = words();
  const uint32_t first = threadIdx.x * 2;
  if (first < h.size) {
    uint64_t mass_before = 0;
    uint32_t count_before = 0;
    if (first > 0) {
      mass_before = mass(h, first - 1);
      count_before = h.count[first - 1];
    }
    for (uint32_t bin = first; bin < first + 2; ++bin) {
      const uint64_t mass_end = mass(h, bin);
      const uint32_t count_end = h.count[bin];
      const uint64_t before = target.by_count ? count_before : mass_before, end = target.by_count ? count_end : mass_end;
      if (before < target.amount && target.amount <= end) {
        word[kBin] = bin;
        word[kMassBefore] = mass_before;
        word[kCountBefore] = count_before;
      }
      mass_before = mass_end;
      count_before = count_end;
    }
  }
  // One thread found it.
  __syncthreads();
  const uint64_t bin = word[kBin], mass_before = word[kMassBefore], count_before = word[kCountBefore];
  return Crossing{static_cast<uint32_t>(bin), mass_before, static_cast<uint32_t>(count_before)};
}

// ---- search -----------------------------------------------------------------------------------------------------

struct Reached {
  uint32_t token;
  uint64_t mass;  // up to and with it
};

// Lists the tokens that weigh anything with `low` <= place < `high`, place being key and id, and returns how many there are;
// beyond kListed they are only counted.
RKSC_DEVICE uint32_t gather(const Row& row, const Law& law, uint64_t low, uint64_t high) {
  smem<uint64_t> places = dynamic_shared<uint64_t>(kListAt), weights = places + kListed;
  smem<uint32_t> counter = counters();
  if (threadIdx.x == 0) counter[kNumListed] = 0;
  // Zero before it is raised.
  __syncthreads();
  for_each_logit<1>(row, [&](uint32_t id, float x) {
    const uint32_t key = key_of(x, law);
    const uint64_t place = static_cast<uint64_t>(key) << kIdBits | id;
    if (key >= kInfinity || place < low || place >= high) return;
    const uint64_t weight = weight_of(key, law);
    if (weight == 0) return;
    const uint32_t i = atomic_add(counter + kNumListed, 1u);
    if (i >= kListed) return;
    places[i] = place;
    weights[i] = weight;
  });
  // The list is complete.
  __syncthreads();
  return counter[kNumListed];
}

// The listed token that reaches the target; `mass_before` is that of all tokens before the listed. Every token adds up those
// not behind it: the order of the list does not matter.
RKSC_DEVICE Reached pick(uint32_t num_listed, const Target& target, uint64_t mass_before) {
  smem<uint64_t> places = dynamic_shared<uint64_t>(kListAt), weights = places + kListed, word = words();
  if (threadIdx.x < num_listed) {
    const uint64_t place = places[threadIdx.x], weight = weights[threadIdx.x];
    uint64_t mass = 0, rank = 0;
    for (uint32_t i = 0; i < num_listed; ++i) {
      if (places[i] > place) continue;
      mass += weights[i];
      ++rank;
    }
    const uint64_t before = target.by_count ? rank - 1 : mass - weight, end = target.by_count ? rank : mass;
    if (before < target.amount && target.amount <= end) {
      word[kToken] = place & ((1u << kIdBits) - 1);
      word[kMassReached] = mass_before + mass;
    }
  }
  // One thread found it; the list may be written again.
  __syncthreads();
  const uint64_t token = word[kToken], reached = word[kMassReached];
  return Reached{static_cast<uint32_t>(token), reached};
}

// Narrows `low` and `high` to the part in which the target is reached, and takes what lies before it off the target.
RKSC_DEVICE void narrow(const Row& row, const Law& law, uint64_t& low, uint64_t& high, Target& target, uint64_t& mass_before) {
  const Histogram fine = histogram(kListAt, kFineBins);
  const uint64_t start = low, end = high;
  const int32_t width = 64 - __clzll(end - start - 1), shift = width > static_cast<int32_t>(kFineBits) ? width - kFineBits : 0;
  clear(fine);
  for_each_logit<1>(row, [&](uint32_t id, float x) {
    const uint32_t key = key_of(x, law);
    const uint64_t place = static_cast<uint64_t>(key) << kIdBits | id;
    if (key >= kInfinity || place < start || place >= end) return;
    const uint64_t weight = weight_of(key, law);
    if (weight != 0) add(fine, static_cast<uint32_t>((place - start) >> shift), weight, target.by_count);
  });
  accumulate(fine);
  const Crossing at = locate(fine, target);
  low = start + (static_cast<uint64_t>(at.bin) << shift);
  const uint64_t next = low + (1ull << shift);
  high = next < end ? next : end;
  mass_before += at.mass_before;
  target.amount -= target.by_count ? at.count_before : at.mass_before;
}

RKSC_DEVICE Reached search(const Row& row, const Law& law, const Histogram& coarse, Target target) {
  const Crossing at = locate(coarse, target);
  uint64_t low = static_cast<uint64_t>(first_key(at.bin, law)) << kIdBits;
  uint64_t high = static_cast<uint64_t>(first_key(at.bin + 1, law)) << kIdBits;
  uint64_t mass_before = at.mass_before;
  target.amount -= target.by_count ? at.count_before : at.mass_before;
  // A place names one token, so this ends at the latest when one place is left.
  while (true) {
    const uint32_t num_listed = gather(row, law, low, high);
    if (num_listed <= kListed) return pick(num_listed, target, mass_before);
    narrow(row, law, low, high, target, mass_before);
  }
}

enum Stage { kTopK, kTopP, kDraw };

// Top-k, then top-p of what it leaves, then the draw from what that leaves. Each cuts the same order short, so that the mass
// kept says all about it.
RKSC_DEVICE uint32_t draw(const Row& row, const Extremes& e, const rksc_sample_params& p) {
  const Law law = make_law(e, p);
  const Histogram coarse = histogram(kHistogramAt, kBins);
  const uint32_t top_k = request(p).top_k;
  const bool counts = top_k != 0;
  clear(coarse);
  for_each_logit<1>(row, [&](uint32_t, float x) {
    const uint32_t key = key_of(x, law);
    const uint64_t weight = weight_of(key, law);
    if (weight != 0) add(coarse, bin_of(key, law), weight, counts);
  });
  accumulate(coarse);
  Reached at{0, mass(coarse, kBins - 1)};
  // Nothing is finite.
  if (at.mass == 0) return 0;
  const uint32_t num_tokens = coarse.count[kBins - 1];
  // One search in the code, for all three.
#pragma unroll 1
  for (int stage = kTopK; stage <= kDraw; ++stage) {
    Target target{top_k, true};
    if (stage == kTopK && (!counts || top_k >= num_tokens)) continue;
    if (stage == kTopP) {
      const float top_p = request(p).top_p;
      if (top_p >= 1.0f) continue;
      const uint64_t share = fixed(fmaxf(top_p, 0.0f), 64), reached = __umul64hi(share, at.mass) + (share * at.mass != 0 ? 1 : 0);
      target = Target{reached > 0 ? reached : 1, false};
    }
    if (stage == kDraw) {
      // The first token whose running mass exceeds u * mass, that is, reaches the next integer.
      target = Target{__umul64hi(uniform_bits(request(p)), at.mass) + 1, false};
    }
    at = search(row, law, coarse, target);
  }
  return at.token;
}

// sample
//   y = logits after penalties (over num_prompt + num_generated tokens of history) and bans
//   temperature 0: argmax y; else w[i] = exp((y[i] - max y) / temperature); in the order of falling y, then rising id:
//   the first top_k with w >= min_p; of them the shortest head with at least top_p of their mass; of it the first token whose
//   running mass exceeds uniform(seed, path, position) times the mass
//
//   logits  [num_rows, vocab] f32   read; changed where a row has penalties or biases
//   rows    [num_rows], history     read
//   saved   [ids in history] f32    scratch
//   sampled [num_rows]              write: the token and its logit as it came in
//
// Work      CTA of 1024 threads = row. Passes over the row: one for the extremes, one for the histogram, one for each of
//           top-k, top-p and the draw, each with a list of <= kListed tokens ranked by all pairs; more where a bin holds more.
// Numerics  penalties rounded as on the host; weights and sums are integers, exact in any order. A token differs from
//           sampler.rs, which sums f64, only where the draw falls within about 2^-30 of a boundary between two tokens.
// Traffic   4 * num_rows * vocab bytes from memory, 3 to 5 times that from L2.
// Bound     one SM's instructions and shared atomics: about 60 instructions and 1 to 3 atomics a logit in the histogram's pass,
//           10 in the others. 152064 logits: 0.1 ms expected on an H100-class SM (derived, not measured), rows in parallel;
//           penalties add about 15 passes over the history.
// Limits    0 < vocab <= 2^19; saved where a row has penalties or biases.
// Oracle    testing::sample, sampler::sample.   Bench  rksc-run bench kernels --op sample
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ rksc_sample_params p) {
  const uint64_t start = static_cast<uint64_t>(blockIdx.x) * p.vocab;
  const uint64_t address = reinterpret_cast<uintptr_t>(p.logits) / sizeof(float) + start;
  const Row row{global<float>(p.logits) + start, p.vocab, static_cast<uint32_t>(address % 4)};
  const bool changed = changes_logits(request(p));
  if (changed) apply_history(row, p);
  const Extremes e = extremes(row);
  uint32_t token = e.argmax;
  if (request(p).temperature > 0.0f) {
    token = draw(row, e, p);
  } else {
    // Nothing is larger than a NaN: the host's argmax never leaves it.
    const float first = row.x[0];
    if (first != first) token = 0;
  }
  float logit = row.x[token];
  if (changed) logit = logit_before(row, p, token);
  if (threadIdx.x == 0) global<rksc_sampled>(p.sampled)[blockIdx.x] = rksc_sampled{token, logit};
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(sample)(const rksc_sample_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->vocab > 0 && p->vocab <= 1u << kIdBits);
  if (p->num_rows == 0) return 0;
  return launch(sample_kernel, dim3(p->num_rows), dim3(kThreads), kSharedBytes, stream, *p);
}

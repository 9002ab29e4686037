// linear_w8.cu -- y = x W^T + bias for up to 16 rows with weights of 8 bits in groups along k. Streams codes and scales once.
#include "codes.cuh"

namespace {

// linear_w8
//   y[t, n] = sum over groups j of scale[n, j] * sum_(k in j) x[t, k] number(code[n, k]) + bias[n]
//   number(c) = c - 128, or the E4M3 number that c is
//
//   x       [num_rows, in]      T    read   (through L1; from L2 once an SM)
//   codes   [out, in / 4]       u32  read   once; k ascending from the low byte
//   scales  [out, in / group]        read   once; f16, of E4M3 numbers f32
//   bias    [out]               f32  read, may be null
//   route   [num_rows]          f32  read, may be null
//   y       [num_rows, out]     f32  write
//
// Work      CTA = 32 outputs x a slice of k; warp = units of 128 k, CTA's warps in turn, each through a ring of its own in shared memory.
//           A lane's two words hold k0 + 8t .. k0 + 8t + 7 of an output, as its 16 bytes of x do: the first four k serve as one k-step of
//           mma.m16n8k16 and the last four as the next, as in linear.cu.
// Numerics  mma multiplies x by number(code), which T holds exactly: no weight is rounded. f32 sums of 32 k are scaled by fmaf in f32.
//           Order of k fixed by (in, out): a row's bits do not depend on the other rows.
// Traffic   out * in bytes + 2 (4) out * in / group, + num_rows * in from L2 per SM; slices as in linear.cu.
// Bound     memory: per word of four codes and lane 6 (f16) to 8 (bf16) instructions to make them numbers, 10 where they are E4M3.
//           Not measured.
// Limits    T bf16 or f16; num_rows <= 16; group 32, 64 or 128; in % group == 0, in > 0; x, codes aligned to 16 bytes; workspace where
//           the plan has slices. out any.
// Oracle    testing::linear_quantised::quantised_oracle.   Bench  rksc-run bench kernels --op linear_w8

constexpr int kMTiles = 2, kHalves = 2 * kMTiles;  // a lane reads outputs g, g + 8, g + 16, g + 24
constexpr int kRing = 2;                           // units of a warp under way
constexpr uint32_t kRowWords = kUnit / 4;          // of a unit
constexpr uint32_t kUnitWords = 16 * kMTiles * kRowWords;

// Bytes 2i and 2i + 1 of a word, each at the bottom of a half.
template <int i>
RKSC_DEVICE uint32_t spread(uint32_t word) {
#ifdef RKSC_EMULATED
  return (word >> (16 * i) & 0xffu) | (word >> (16 * i + 8) & 0xffu) << 16;
#else
  return __byte_perm(word, 0, i == 0 ? 0x4140 : 0x4342);
#endif
}

// The same, each at the top.
template <int i>
RKSC_DEVICE uint32_t spread_to_top(uint32_t word) {
#ifdef RKSC_EMULATED
  return spread<i>(word) << 8;
#else
  return __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
#endif
}

// Codes less 128, a pair.
template <typename T>
RKSC_DEVICE uint32_t centred(uint32_t codes) {
  if constexpr (std::is_same_v<T, f16>) {
    // 1024 + code, less 1152.
    return add2<T>(codes | 0x64006400u, 0xe480e480u);
  } else {
    // bf16 has room for seven bits above 128: 128 + those, less 256, or less 128 where the eighth is set.
    return add2<T>(mask_or(codes, 0x007f007fu, 0x43004300u), (codes & 0x00800080u) ^ 0xc380c380u);
  }
}

// E4M3 numbers at the top of the halves, a pair. Their exponent and mantissa moved to where T has them are 2^-8 (f16) or 2^-120 (bf16)
// of the number, subnormal ones included.
template <typename T>
RKSC_DEVICE uint32_t widen_e4m3(uint32_t tops) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  const uint32_t rest = (tops >> (kHalf ? 1 : 4)) & (kHalf ? 0x3f803f80u : 0x07f007f0u);
  return mul2<T>(mask_or(tops, 0x80008000u, rest), kHalf ? 0x5c005c00u : 0x7b807b80u);
}

// Numbers 2i and 2i + 1 of a word.
template <typename T, bool kE4m3, int i>
RKSC_DEVICE uint32_t numbers(uint32_t word) {
  if constexpr (kE4m3) {
    return widen_e4m3<T>(spread_to_top<i>(word));
  } else {
    return centred<T>(spread<i>(word));
  }
}

template <typename T, int kTiles, bool kE4m3>
struct W8Warp {
  using Scale = std::conditional_t<kE4m3, float, f16>;

  gptr<const uint32_t> codes[kHalves];  // 16 bytes of each output's units that this lane sends for, and those 16 words on
  gptr<const uint32_t> x[kTiles];       // this lane's words of rows g, g + 8
  gptr<const Scale> scales;
  uint32_t first_group[kHalves];  // of each output
  smem<uint32_t> ring;            // [kRing, 32 outputs, 32 words]
  uint32_t g, t, swizzle;
  int32_t num_code_words, num_x_words;  // of a row, from this lane's first on; not positive where it has none
  uint32_t last_unit, groups_per_row, group_shift;
  float scale[kHalves];
  FragC acc[kMTiles][kTiles];

  // The eight 16-byte pieces of an output's unit are swizzled by its row, so that what 16 lanes read (four outputs, two pieces each) and
  // what 8 lanes write (two outputs, four pieces each) lies in 32 banks. A group is committed even where there is nothing to fetch.
  RKSC_DEVICE void fetch(uint32_t unit, uint32_t slot) {
    if (unit < last_unit) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const bool inside = static_cast<int32_t>(unit * kRowWords + 16 * half) < num_code_words;
        const smem<uint32_t> dst = ring + (slot * kUnitWords + g * kRowWords + 4 * ((t + 4 * half) ^ swizzle));
        const uint32_t word = inside ? unit * kRowWords + 16 * half : 0;
#pragma unroll
        for (int h = 0; h < kHalves; ++h) cp_async_16<uint32_t>(dst + 8 * kRowWords * h, codes[h] + word, inside);
      }
    }
    cp_async_commit();
  }
  // Chunk j of the unit that starts at word `start`. Rows end in zeros: the codes fetched for k past the end count as -128, or as 0.
  RKSC_DEVICE void load_rows(vec<uint32_t, 4> (&b)[kTiles], uint32_t start, int j) {
    const int32_t left = num_x_words - static_cast<int32_t>(start);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) b[n] = 16 * j < left ? load_x(x[n] + start + 16 * j) : vec<uint32_t, 4>{};
  }
  RKSC_DEVICE void load_groups(uint32_t unit, int j) {
    const uint32_t group = min((unit * kUnit + 32 * j) >> group_shift, groups_per_row - 1);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const Scale of_group = scales[first_group[h] + group];
      scale[h] = to_float(of_group);
    }
  }
  RKSC_DEVICE void multiply(const vec<uint32_t, 4> (&b)[kTiles], uint32_t slot, int j) {
    const uint32_t piece = (2 * j + t / 2) ^ swizzle;
    smem<const uint32_t> mine = ring + (slot * kUnitWords + g * kRowWords + 4 * piece + 2 * (t % 2));
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const vec<uint32_t, 2> low = load_vec<2>(mine + 2 * m * 8 * kRowWords);
      const vec<uint32_t, 2> high = load_vec<2>(mine + (2 * m + 1) * 8 * kRowWords);
      FragC part[kTiles];
      clear(part);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const FragA a{{numbers<T, kE4m3, 0>(low[step]), numbers<T, kE4m3, 0>(high[step]), numbers<T, kE4m3, 1>(low[step]),
                       numbers<T, kE4m3, 1>(high[step])}};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma_m16n8k16<T>(part[n], a, FragB{{b[n][2 * step], b[n][2 * step + 1]}});
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n].v[i] = fmaf(part[n].v[i], scale[2 * m + i / 2], acc[m][n].v[i]);
      }
    }
  }
};

template <typename T, int kTiles, bool kE4m3>
__global__ void __launch_bounds__(kMaxWarps * 32) linear_w8_kernel(const __grid_constant__ rksc_linear_w8_params p) {
  if (rows_on_side(p) == 0) return;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const Slice slice = slice_of(p.in_features);
  W8Warp<T, kTiles, kE4m3> ww;
  ww.g = lane / 4;
  ww.t = lane % 4;
  ww.swizzle = 4 * (ww.g % 2) + 2 * (ww.g / 2 % 2);
  ww.ring = dynamic_shared<uint32_t>(0) + warp * (kRing * kUnitWords);
  ww.scales = global<const typename W8Warp<T, kTiles, kE4m3>::Scale>(p.scales);
  ww.last_unit = slice.last;
  ww.group_shift = p.group_size == 32 ? 5 : p.group_size == 64 ? 6 : 7;
  ww.groups_per_row = p.in_features >> ww.group_shift;
  ww.num_code_words = static_cast<int32_t>(p.in_features / 4 - 4 * ww.t);
  ww.num_x_words = static_cast<int32_t>(p.in_features / 2 - 4 * ww.t);
  // Outputs and rows past the end repeat the last one; what comes of them is not written.
  const uint32_t lane_word = ww.num_code_words > 0 ? 4 * ww.t : 0;
#pragma unroll
  for (uint32_t h = 0; h < kHalves; ++h) {
    const uint32_t output = min(blockIdx.x * (16 * kMTiles) + 8 * h + ww.g, p.out_features - 1);
    ww.codes[h] = global<const uint32_t>(p.codes) + (static_cast<uint64_t>(output) * (p.in_features / 4) + lane_word);
    ww.first_group[h] = output * ww.groups_per_row;
  }
#pragma unroll
  for (uint32_t n = 0; n < kTiles; ++n) {
    ww.x[n] = global<const uint32_t>(p.x) + (min(8 * n + ww.g, p.num_rows - 1) * (p.in_features / 2) + 4 * ww.t);
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) clear(ww.acc[m]);

  stream_units<kTiles, kRing>(ww, slice, warp, num_warps, p);
  // The sums go where the rings of all warps are.
  cp_async_wait<0>();
  __syncthreads();
  finish_tile(ww.acc, skinny_output(p));
}

template <typename T, int kTiles, bool kE4m3>
int32_t launch_linear_w8(const rksc_linear_w8_params& p, rksc_stream stream) {
  const SkinnyPlan plan = skinny_plan(p.in_features, p.out_features, true);
  RKSC_REQUIRE(plan.num_slices == 1 || p.workspace != nullptr);
  const uint32_t ring_bytes = plan.num_warps * kRing * kUnitWords * 4, sums = sums_bytes<kMTiles, kTiles>(plan.num_warps);
  return launch(linear_w8_kernel<T, kTiles, kE4m3>, dim3(plan.num_tiles, plan.num_slices), dim3(plan.num_warps * 32),
                ring_bytes > sums ? ring_bytes : sums, stream, p);
}

}  // namespace

// ---- launcher -------------------------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(linear_w8)(const rksc_linear_w8_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype == RKSC_BF16 || p->dtype == RKSC_F16);
  RKSC_REQUIRE(skinny_rows_fit(*p));
  RKSC_REQUIRE(p->group_size == 32 || p->group_size == 64 || p->group_size == 128);
  RKSC_REQUIRE(p->in_features > 0 && p->in_features % p->group_size == 0);
  RKSC_REQUIRE(p->number <= RKSC_NUMBER_E4M3);
  // Scales are indexed in 32 bits.
  RKSC_REQUIRE(static_cast<uint64_t>(p->out_features) * (p->in_features / p->group_size) <= UINT32_MAX);
  if (p->num_rows == 0 || p->out_features == 0) return 0;
  return RKSC_DISPATCH_DTYPE_16(p->dtype, T, [&] {
    if (p->number == RKSC_NUMBER_E4M3) {
      return p->num_rows <= 8 ? launch_linear_w8<T, 1, true>(*p, stream) : launch_linear_w8<T, 2, true>(*p, stream);
    }
    return p->num_rows <= 8 ? launch_linear_w8<T, 1, false>(*p, stream) : launch_linear_w8<T, 2, false>(*p, stream);
  });
}

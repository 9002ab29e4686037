// linear_w4.cu -- y = x W^T + bias for up to 16 rows with weights of 4 bits in groups along k. Streams codes, scales and zeros once.
#include "codes.cuh"

namespace {

// linear_w4
//   y[t, n] = sum over groups j of scale[n, j] * sum_(k in j) x[t, k] (code[n, k] - zero[n, j]) + bias[n]
//
//   x       [num_rows, in]      T    read   (through L1; from L2 once an SM)
//   codes   [out, in / 8]       u32  read   once; k ascending from the low nibble
//   scales  [out, in / group]   f16  read   once
//   zeros   [out, in / group]   none: 8; u8; or f16
//   bias    [out]               f32  read, may be null
//   route   [num_rows]          f32  read, may be null
//   y       [num_rows, out]     f32  write
//
// Work      CTA = 32 outputs x a slice of k; warp = units of 128 k, CTA's warps in turn, each through a ring of its own in shared memory.
//           A word's eight codes become four registers of two by mask and shift: codes i and i + 4 meet, so x is paired that way too
//           (byte permutes, shared by the warp's 32 outputs). A lane's word serves two k-steps of mma.m16n8k16, as in linear.cu.
// Numerics  mma multiplies x by code - zero, which T holds exactly: no weight is rounded at all. f32 sums of a group, or of 32 k of it,
//           are scaled by fmaf in f32. Fractional zeros: code - zero is rounded once to T. Integer zeros beyond 127 would be rounded in
//           bf16; codes end at 15. Order of k fixed by (in, out): a row's bits do not depend on the other rows.
// Traffic   out * in / 2 bytes + (2 to 4) out * in / group, + num_rows * in from L2 per SM; slices as in linear.cu.
// Bound     memory, with issue slots close behind: some 22 instructions per word of eight codes and lane, of 28 (H200) to 35 (H100) that
//           an SM can issue in the time a word takes at full bandwidth. Counted in sm_90a code for 8 rows; not measured.
// Limits    T bf16 or f16; num_rows <= 16; group 32, 64 or 128; in % group == 0, in > 0; x, codes aligned to 16 bytes; workspace where
//           the plan has slices. out any.
// Oracle    testing::linear_quantised::quantised_oracle.   Bench  rksc-run bench kernels --op linear_w4

constexpr int kMTiles = 2, kHalves = 2 * kMTiles;  // a lane reads outputs g, g + 8, g + 16, g + 24
constexpr int kRing = 3;                           // units of a warp under way
constexpr uint32_t kUnitWords = 16 * kMTiles * (kUnit / 8);

// Numbers whose low mantissa bits are free for a code: 128 and 1024 have a spacing of 1 in bf16 and f16.
template <typename T>
constexpr uint32_t kMagicBits = 0x43004300u;
template <>
constexpr uint32_t kMagicBits<f16> = 0x64006400u;
template <typename T>
constexpr float kMagic = 128.0f;
template <>
constexpr float kMagic<f16> = 1024.0f;

// The low (high) halves of a and b, a's in the low half.
RKSC_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) {
#ifdef RKSC_EMULATED
  return (a & 0xffffu) | b << 16;
#else
  return __byte_perm(a, b, 0x5410);
#endif
}
RKSC_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) {
#ifdef RKSC_EMULATED
  return a >> 16 | (b & 0xffff0000u);
#else
  return __byte_perm(a, b, 0x7632);
#endif
}

// What the groups of a lane's outputs say.
struct Groups {
  float scale[kHalves];
  uint32_t minus_base[kHalves];  // pairs of -(magic + whole part of the zero)
  uint32_t minus_rest[kHalves];  // pairs of -(what is left of it); fractional zeros only
};

template <typename T, int kTiles, bool kFractional>
struct W4Warp {
  gptr<const uint32_t> codes[kHalves];  // 16 bytes of each output's units that this lane sends for
  gptr<const uint32_t> x[kTiles];       // this lane's words of rows g, g + 8
  gptr<const f16> scales;
  gptr<const uint8_t> zeros;
  uint32_t first_group[kHalves];  // of each output
  smem<uint32_t> ring;            // [kRing, 32 outputs, 16 words]
  uint32_t g, t, swizzle;
  int32_t num_code_words, num_x_words;  // of a row, from this lane's first on; not positive where it has none
  uint32_t last_unit, groups_per_row, group_shift;
  bool has_zeros;
  Groups groups;
  FragC acc[kMTiles][kTiles];

  // The four 16-byte pieces of an output's unit are swizzled by its row, so that 32 lanes that each want one word of eight outputs find
  // them in 32 banks. A group is committed even where there is nothing to fetch.
  RKSC_DEVICE void fetch(uint32_t unit, uint32_t slot) {
    if (unit < last_unit) {
      const bool inside = static_cast<int32_t>(unit * (kUnit / 8)) < num_code_words;
      const smem<uint32_t> dst = ring + (slot * kUnitWords + g * 16 + 4 * (t ^ swizzle));
      const uint32_t word = inside ? unit * (kUnit / 8) : 0;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) cp_async_16<uint32_t>(dst + 128 * h, codes[h] + word, inside);
    }
    cp_async_commit();
  }
  // Chunk j of the unit that starts at word `start`. Rows end in zeros: the codes fetched for k past the end count as -zero.
  RKSC_DEVICE void load_rows(vec<uint32_t, 4> (&b)[kTiles], uint32_t start, int j) {
    const int32_t left = num_x_words - static_cast<int32_t>(start);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) b[n] = 16 * j < left ? load_x(x[n] + start + 16 * j) : vec<uint32_t, 4>{};
  }
  RKSC_DEVICE void set_zero(int h, float whole) { groups.minus_base[h] = pack2<T>(-kMagic<T> - whole, -kMagic<T> - whole); }
  RKSC_DEVICE void load_groups(uint32_t unit, int j) {
    const uint32_t group = min((unit * kUnit + 32 * j) >> group_shift, groups_per_row - 1);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const f16 scale = scales[first_group[h] + group];
      groups.scale[h] = to_float(scale);
    }
    if constexpr (kFractional) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const f16 zero = global<const f16>(zeros)[first_group[h] + group];
        const float whole = fminf(fmaxf(rintf(to_float(zero)), -120.0f), 120.0f);  // magic + whole is exact in bf16
        const float rest = whole - to_float(zero);
        set_zero(h, whole);
        groups.minus_rest[h] = pack2<T>(rest, rest);
      }
    } else if (has_zeros) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const uint8_t zero = zeros[first_group[h] + group];
        set_zero(h, static_cast<float>(zero));
      }
    }
  }
  // Codes (0, 4), (1, 5), (2, 6), (3, 7) of a word, less the zero.
  RKSC_DEVICE vec<uint32_t, 4> unpack(uint32_t word, int h) {
    vec<uint32_t, 4> q;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[i] = add2<T>(mask_or(word >> (4 * i), 0x000f000fu, kMagicBits<T>), groups.minus_base[h]);
      if constexpr (kFractional) q[i] = add2<T>(q[i], groups.minus_rest[h]);
    }
    return q;
  }
  RKSC_DEVICE void multiply(const vec<uint32_t, 4> (&x_rows)[kTiles], uint32_t slot, int j) {
    smem<const uint32_t> mine = ring + (slot * kUnitWords + g * 16 + 4 * (j ^ swizzle) + t);
    FragB b[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const vec<uint32_t, 4>& e = x_rows[n];  // elements 0 1, 2 3, 4 5, 6 7
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        b[n][step].r[0] = low_halves(e[step], e[step + 2]);
        b[n][step].r[1] = high_halves(e[step], e[step + 2]);
      }
    }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      vec<uint32_t, 4> q[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = mine[(2 * m + half) * 128];
        q[half] = unpack(word, 2 * m + half);
      }
      FragC part[kTiles];
      clear(part);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const FragA a{{q[0][2 * step], q[1][2 * step], q[0][2 * step + 1], q[1][2 * step + 1]}};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma_m16n8k16<T>(part[n], a, b[n][step]);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n].v[i] = fmaf(part[n].v[i], groups.scale[2 * m + i / 2], acc[m][n].v[i]);
      }
    }
  }
};

template <typename T, int kTiles, bool kFractional>
__global__ void __launch_bounds__(kMaxWarps * 32) linear_w4_kernel(const __grid_constant__ rksc_linear_w4_params p) {
  if (rows_on_side(p) == 0) return;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const Slice slice = slice_of(p.in_features);
  W4Warp<T, kTiles, kFractional> ww;
  ww.g = lane / 4;
  ww.t = lane % 4;
  ww.swizzle = ww.g / 2;
  ww.ring = dynamic_shared<uint32_t>(0) + warp * (kRing * kUnitWords);
  ww.scales = global<const f16>(p.scales);
  ww.zeros = global<const uint8_t>(p.zeros);
  ww.has_zeros = p.zero_kind != RKSC_ZERO_NONE;
  ww.last_unit = slice.last;
  ww.group_shift = p.group_size == 32 ? 5 : p.group_size == 64 ? 6 : 7;
  ww.groups_per_row = p.in_features >> ww.group_shift;
  ww.num_code_words = static_cast<int32_t>(p.in_features / 8 - 4 * ww.t);
  ww.num_x_words = static_cast<int32_t>(p.in_features / 2 - 4 * ww.t);
  // Outputs and rows past the end repeat the last one; what comes of them is not written. A lane past a short row points to its start.
  const uint32_t lane_word = ww.num_code_words > 0 ? 4 * ww.t : 0;
#pragma unroll
  for (uint32_t h = 0; h < kHalves; ++h) {
    const uint32_t output = min(blockIdx.x * (16 * kMTiles) + 8 * h + ww.g, p.out_features - 1);
    ww.codes[h] = global<const uint32_t>(p.codes) + (static_cast<uint64_t>(output) * (p.in_features / 8) + lane_word);
    ww.first_group[h] = output * ww.groups_per_row;
    ww.set_zero(h, 8.0f);
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

template <typename T, int kTiles, bool kFractional>
int32_t launch_linear_w4(const rksc_linear_w4_params& p, rksc_stream stream) {
  const SkinnyPlan plan = skinny_plan(p.in_features, p.out_features, true);
  RKSC_REQUIRE(plan.num_slices == 1 || p.workspace != nullptr);
  const uint32_t ring_bytes = plan.num_warps * kRing * kUnitWords * 4, sums = sums_bytes<kMTiles, kTiles>(plan.num_warps);
  return launch(linear_w4_kernel<T, kTiles, kFractional>, dim3(plan.num_tiles, plan.num_slices), dim3(plan.num_warps * 32),
                ring_bytes > sums ? ring_bytes : sums, stream, p);
}

}  // namespace

// ---- launcher -------------------------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(linear_w4)(const rksc_linear_w4_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype == RKSC_BF16 || p->dtype == RKSC_F16);
  RKSC_REQUIRE(skinny_rows_fit(*p));
  RKSC_REQUIRE(p->group_size == 32 || p->group_size == 64 || p->group_size == 128);
  RKSC_REQUIRE(p->in_features > 0 && p->in_features % p->group_size == 0);
  RKSC_REQUIRE(p->zero_kind <= RKSC_ZERO_FRACTIONAL && (p->zero_kind == RKSC_ZERO_NONE || p->zeros != nullptr));
  // Scales are indexed in 32 bits.
  RKSC_REQUIRE(static_cast<uint64_t>(p->out_features) * (p->in_features / p->group_size) <= UINT32_MAX);
  if (p->num_rows == 0 || p->out_features == 0) return 0;
  return RKSC_DISPATCH_DTYPE_16(p->dtype, T, [&] {
    if (p->zero_kind == RKSC_ZERO_FRACTIONAL) {
      return p->num_rows <= 8 ? launch_linear_w4<T, 1, true>(*p, stream) : launch_linear_w4<T, 2, true>(*p, stream);
    }
    return p->num_rows <= 8 ? launch_linear_w4<T, 1, false>(*p, stream) : launch_linear_w4<T, 2, false>(*p, stream);
  });
}

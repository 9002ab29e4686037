// linear.cu -- y = x W^T + bias for up to 16 rows: decode. Streams the weights once; larger batches belong to a tiled GEMM.
#include "gemm.cuh"

namespace {

// linear
//   y[t, n] = sum_k x[t, k] w[n, k] + bias[n]
//
//   x     [num_rows, in]   T    read   (through L1; from L2 once an SM)
//   w     [out, in]        T    read   once
//   bias  [out]            f32  read, may be null
//   route [num_rows]       f32  read, may be null
//   y     [num_rows, out]  f32  write
//
// Work      CTA = 16 or 32 outputs x a slice of k; warp = units of 128 k, CTA's warps in turn. Weights reach a warp by cp.async through
//           four slots of its own, one per 32 k: a lane fetches, a unit ahead, what it will itself multiply, so that 3 to 4 KiB
//           (6 to 8) of a warp are always under way, without a barrier. Plain loads would not do: ptxas moves them down to their uses.
//           A lane's 16 bytes hold k0 + 8t .. k0 + 8t + 7. mma does not care which k are called 2t, 2t + 1, 2t + 8 and 2t + 9 as long as A
//           and B agree, so the first four serve as one k-step and the last four as the next, in x as in w: no shuffle, no layout.
//           x is not staged: the CTAs of an SM would each stage the same rows, whereas L1 keeps them for all of them.
// Numerics  f32 accumulators; order of k fixed by (in, out): a row's bits do not depend on the other rows. f32 inputs: fmaf.
// Traffic   2 out * in bytes (4 for f32), + num_rows * in from L2 per SM, + 4 num_rows * out; slices add 8 num_rows * out * slices.
// Bound     memory: num_rows FLOP per byte. Not measured.
// Limits    num_rows <= 16; in % 8 == 0 (f32: % 4), in > 0; x, w aligned to 16 bytes; workspace where the plan has slices. out any.
// Oracle    testing::linear_oracle.   Bench  rksc-run bench kernels --op linear
constexpr int kChunks = kUnit / 32;  // of a unit: what a lane's 16 bytes cover
// 16-byte slots of a lane: one per chunk and output.
template <int kMTiles>
constexpr uint32_t kSlots = kChunks * 2 * kMTiles;

template <typename T, int kMTiles, int kTiles>
struct LinearWarp {
  gptr<const uint32_t> w[2 * kMTiles];  // this lane's words of outputs g, g + 8, ...
  gptr<const uint32_t> x[kTiles];       // and of rows g, g + 8
  smem<uint32_t> slots;                 // [chunks, 2 kMTiles, 32 lanes, 4]: this lane's
  int32_t num_words;                    // of a row, from this lane's first on; not positive where it has none
  uint32_t last_unit;
  FragC acc[kMTiles][kTiles];

  // Sends for chunk j of a unit; zeros past the end of the row. A group is committed even where there is nothing to fetch.
  RKSC_DEVICE void fetch(uint32_t unit, int j) {
    if (unit < last_unit) {
      const bool inside = static_cast<int32_t>(unit * (kUnit / 2) + 16 * j) < num_words;
      const uint32_t start = inside ? unit * (kUnit / 2) : 0;
      const int offset = inside ? 16 * j : 0;
#pragma unroll
      for (int h = 0; h < 2 * kMTiles; ++h) {
        cp_async_16<uint32_t>(slots + (j * 2 * kMTiles + h) * 128, w[h] + start + offset, inside);
      }
    }
    cp_async_commit();
  }
  // Chunk j of the unit that starts at word `start`; zeros past the end of the row.
  RKSC_DEVICE void load_rows(vec<uint32_t, 4> (&b)[kTiles], uint32_t start, int j) {
    const int32_t left = num_words - static_cast<int32_t>(start);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) b[n] = 16 * j < left ? load_x(x[n] + start + 16 * j) : vec<uint32_t, 4>{};
  }
  RKSC_DEVICE void multiply(const vec<uint32_t, 4> (&b)[kTiles], int j) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const vec<uint32_t, 4> low = load_vec<4>(slots + (j * 2 * kMTiles + 2 * m) * 128);
      const vec<uint32_t, 4> high = load_vec<4>(slots + (j * 2 * kMTiles + 2 * m + 1) * 128);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const FragA a{{low[2 * step], high[2 * step], low[2 * step + 1], high[2 * step + 1]}};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma_m16n8k16<T>(acc[m][n], a, FragB{{b[n][2 * step], b[n][2 * step + 1]}});
        }
      }
    }
  }
};

template <typename T, int kMTiles, int kTiles>
__global__ void __launch_bounds__(kMaxWarps * 32) linear_kernel(const __grid_constant__ rksc_linear_params p) {
  if (rows_on_side(p) == 0) return;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t row_words = p.in_features / 2, num_warps = blockDim.x / 32;
  const Slice slice = slice_of(p.in_features);
  LinearWarp<T, kMTiles, kTiles> lw;
  lw.slots = dynamic_shared<uint32_t>(0) + (warp * kSlots<kMTiles> * 128 + lane * 4);
  lw.num_words = static_cast<int32_t>(row_words - 4 * t);
  lw.last_unit = slice.last;
  // Outputs and rows past the end repeat the last one; what comes of them is not written. A lane past a short row points to its start.
  const uint32_t lane_word = 4 * t < row_words ? 4 * t : 0;
#pragma unroll
  for (uint32_t h = 0; h < 2 * kMTiles; ++h) {
    const uint32_t output = min(blockIdx.x * (16 * kMTiles) + 8 * h + g, p.out_features - 1);
    lw.w[h] = global<const uint32_t>(p.w) + (static_cast<uint64_t>(output) * row_words + lane_word);
  }
#pragma unroll
  for (uint32_t n = 0; n < kTiles; ++n) {
    lw.x[n] = global<const uint32_t>(p.x) + (min(8 * n + g, p.num_rows - 1) * row_words + lane_word);
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) clear(lw.acc[m]);

  uint32_t unit = slice.first + warp;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) lw.fetch(unit, j);
  vec<uint32_t, 4> b[kTiles], next[kTiles];
  lw.load_rows(next, unit * (kUnit / 2), 0);
  for (; unit < slice.last; unit += num_warps) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) b[n] = next[n];
      lw.load_rows(next, (j + 1 < kChunks ? unit : unit + num_warps) * (kUnit / 2), (j + 1) % kChunks);
      cp_async_wait<kChunks - 1>();  // the oldest of kChunks groups: what this lane itself sent for, so no barrier
      lw.multiply(b, j);
      // The slots are free: the mma has taken what was loaded from them.
      lw.fetch(unit + num_warps, j);
    }
  }
  // The sums go where the slots of all warps are.
  cp_async_wait<0>();
  __syncthreads();
  finish_tile(lw.acc, skinny_output(p));
}

// f32 has no tensor core of its own precision. Warp = 4 outputs, lanes along k; one butterfly for each sum at the end.
constexpr uint32_t kOutputsF32 = 4, kWarpsF32 = 4;
template <int kTiles>
__global__ void __launch_bounds__(kWarpsF32 * 32) linear_f32_kernel(const __grid_constant__ rksc_linear_params p) {
  constexpr uint32_t kRows = 8 * kTiles;
  const uint32_t rows = rows_on_side(p);
  if (rows == 0) return;
  const uint32_t lane = threadIdx.x % 32, first = (blockIdx.x * kWarpsF32 + threadIdx.x / 32) * kOutputsF32;
  if (first >= p.out_features) return;  // whole warps; no barrier follows
  gptr<const float> x = global<const float>(p.x);
  gptr<const float> bias = global<const float>(p.bias);
  gptr<float> y = global<float>(p.y);
  gptr<const float> w[kOutputsF32];
#pragma unroll
  for (uint32_t m = 0; m < kOutputsF32; ++m) {
    const uint32_t output = first + m < p.out_features ? first + m : p.out_features - 1;
    w[m] = global<const float>(p.w) + static_cast<uint64_t>(output) * p.in_features;
  }
  float acc[kOutputsF32][kRows] = {};
  for (uint32_t k = 4 * lane; k < p.in_features; k += 128) {
    vec<float, 4> a[kOutputsF32];
#pragma unroll
    for (uint32_t m = 0; m < kOutputsF32; ++m) a[m] = load_vec<4>(w[m] + k);
#pragma unroll
    for (uint32_t n = 0; n < kRows; ++n) {
      if ((rows >> n & 1) == 0) continue;
      const vec<float, 4> b = load_vec<4>(x + n * p.in_features + k);
#pragma unroll
      for (uint32_t m = 0; m < kOutputsF32; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n] = fmaf(a[m][i], b[i], acc[m][n]);
      }
    }
  }
#pragma unroll
  for (uint32_t n = 0; n < kRows; ++n) {
    if ((rows >> n & 1) == 0) continue;
#pragma unroll
    for (uint32_t m = 0; m < kOutputsF32; ++m) {
      float sum = warp_sum(acc[m][n]);
      if (lane != 0 || first + m >= p.out_features) continue;
      if (p.bias != nullptr) sum += bias[first + m];
      y[static_cast<uint64_t>(n) * p.y_stride + first + m] = sum;
    }
  }
}

template <typename T, int kMTiles, int kTiles>
int32_t launch_linear(const rksc_linear_params& p, const SkinnyPlan& plan, rksc_stream stream) {
  const uint32_t slot_bytes = plan.num_warps * kSlots<kMTiles> * 32 * 16, sums = sums_bytes<kMTiles, kTiles>(plan.num_warps);
  return launch(linear_kernel<T, kMTiles, kTiles>, dim3(plan.num_tiles, plan.num_slices), dim3(plan.num_warps * 32),
                slot_bytes > sums ? slot_bytes : sums, stream, p);
}

template <typename T>
int32_t launch_linear(const rksc_linear_params& p, rksc_stream stream) {
  const SkinnyPlan plan = skinny_plan(p.in_features, p.out_features, false);
  RKSC_REQUIRE(plan.num_slices == 1 || p.workspace != nullptr);
  if (p.num_rows <= 8) return plan.m_tiles == 1 ? launch_linear<T, 1, 1>(p, plan, stream) : launch_linear<T, 2, 1>(p, plan, stream);
  return plan.m_tiles == 1 ? launch_linear<T, 1, 2>(p, plan, stream) : launch_linear<T, 2, 2>(p, plan, stream);
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------------------

extern "C" size_t RKSC_FN(linear_workspace_bytes)(uint32_t num_rows, uint32_t in_features, uint32_t out_features) {
  // One size for linear, and for linear_w4 and linear_w8, whose CTAs are always wide.
  const size_t plain = skinny_workspace_bytes(num_rows, skinny_plan(in_features, out_features, false));
  const size_t wide = skinny_workspace_bytes(num_rows, skinny_plan(in_features, out_features, true));
  return plain > wide ? plain : wide;
}

extern "C" int32_t RKSC_FN(linear)(const rksc_linear_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype <= RKSC_F16);
  RKSC_REQUIRE(skinny_rows_fit(*p));
  RKSC_REQUIRE(p->in_features > 0 && p->in_features % (p->dtype == RKSC_F32 ? 4 : 8) == 0);
  if (p->num_rows == 0 || p->out_features == 0) return 0;
  if (p->dtype == RKSC_F32) {
    const dim3 grid(div_up(p->out_features, kWarpsF32 * kOutputsF32)), block(kWarpsF32 * 32);
    if (p->num_rows <= 8) return launch(linear_f32_kernel<1>, grid, block, 0, stream, *p);
    return launch(linear_f32_kernel<2>, grid, block, 0, stream, *p);
  }
  return RKSC_DISPATCH_DTYPE_16(p->dtype, T, [&] { return launch_linear<T>(*p, stream); });
}

// gemm.cuh -- what linear, linear_w4 and linear_w8 share: loads of x, the plan, which rows a launch is for, and the way from the
// accumulators of a CTA's warps to y. It knows nothing of how weights are stored.
//
// The ops stream [out, in] weights past at most 16 rows of x. Weights are the A operand of mma.m16n8k16 (16 outputs by 16 k), x^T
// is B (16 k by 8 rows): a weight is loaded from memory once, straight into the register it is multiplied from. A CTA owns a tile of
// outputs and a slice of k; its warps take the slice's units of kUnit in turn, so that together they read long runs of each row.
//
// Invariant: which k meet in which order depends on (in, out) alone, never on the number of rows: column n of an mma is a
// function of column n of B, warps are summed in warp order, slices in slice order. One branch and sixteen get the same bits.
#pragma once

#include "mma.cuh"

// k that a warp takes at a time.
constexpr uint32_t kUnit = 128;
constexpr uint32_t kMaxWarps = 16;
// Arrival counters at the start of a workspace, whatever the shape: launches of different shapes may share one workspace, because
// no partial ever lies where another shape keeps a counter.
constexpr uint32_t kMaxCounters = 4096;
constexpr uint32_t kCounterBytes = kMaxCounters * 4;

// 16 bytes of x. Every CTA of an SM reads the same rows, L1 keeps them; weights pass it by (cp.async.cg).
RKSC_DEVICE vec<uint32_t, 4> load_x(gptr<const uint32_t> p) {
#ifdef RKSC_EMULATED
  return load_vec<4>(p);
#else
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return vec<uint32_t, 4>{{v.x, v.y, v.z, v.w}};
#endif
}

// ---- plan ---------------------------------------------------------------------------------------------------------------------

struct SkinnyPlan {
  uint32_t m_tiles;     // 16-output tiles of a CTA: 1 or 2
  uint32_t num_tiles;   // CTAs along out
  uint32_t num_slices;  // CTAs along k; more than one go through the workspace
  uint32_t num_warps;   // of a CTA
};

// Derived, not measured. A function of (in, out) only, so that the sum order is too.
//   Width     with 32 outputs a CTA asks for half as much x per weight: 1/4 of the weights' bytes at 8 rows, of L2's bandwidth where L1
//             does not have it. From 96 CTAs on the SMs are busy enough; smaller matrices are cut to 16.
//   Slices    x of a slice should stay in L1 beside the weights' buffers: 6144 k are 96 KiB at 8 rows. Splitting only to fill the GPU is
//             not worth it: the last arriver costs about as much as it saves.
//   Warps     8 warps let several CTAs share an SM, so that one reduces while others load. Where CTAs are too few to keep some 6 MiB
//             under way (4.3 TB/s times 1 us, and slack) each gets 16.
inline SkinnyPlan skinny_plan(uint32_t in_features, uint32_t out_features, bool always_wide) {
  const uint32_t m_tiles = always_wide || out_features >= 96 * 32 ? 2 : 1;
  const uint32_t num_tiles = div_up(out_features, 16 * m_tiles);
  const uint32_t num_slices = num_tiles <= kMaxCounters ? div_up(in_features, 6144) : 1;
  const uint32_t units = div_up(div_up(in_features, kUnit), num_slices);
  const uint32_t wanted = static_cast<uint64_t>(num_tiles) * num_slices * m_tiles >= 192 ? 8 : kMaxWarps;
  return SkinnyPlan{m_tiles, num_tiles, num_slices, units < wanted ? units : wanted};
}

inline size_t skinny_workspace_bytes(uint32_t num_rows, const SkinnyPlan& plan) {
  if (plan.num_slices == 1) return 0;
  return kCounterBytes + sizeof(float) * plan.num_tiles * plan.num_slices * num_rows * 16 * plan.m_tiles;
}

// Units [first, last) of slice blockIdx.y.
struct Slice {
  uint32_t first, last;
};
RKSC_DEVICE Slice slice_of(uint32_t in_features) {
  const uint32_t units = div_up_device(in_features, kUnit);
  return Slice{units * blockIdx.y / gridDim.y, units * (blockIdx.y + 1) / gridDim.y};
}

// ---- rows -----------------------------------------------------------------------------------------------------------------------

// The rows that a launch is for, a bit each: all, or those on its side of the route. Every thread of the grid finds the same, so that a
// launch without rows ends before anyone counts arrivals.
template <typename Params>
RKSC_DEVICE uint32_t rows_on_side(const Params& p) {
  const uint32_t all = (1u << p.num_rows) - 1;
  if (p.route == nullptr) return all;
  gptr<const float> route = global<const float>(p.route);
  uint32_t left = 0;
  for (uint32_t t = 0; t < p.num_rows; ++t) {
    const float layers = route[t];
    left |= (layers < static_cast<float>(p.layer) ? 1u : 0u) << t;
  }
  return p.side == 0 ? all & ~left : left;
}

// ---- from accumulators to y -----------------------------------------------------------------------------------------------------

// Floats of a row of outputs in shared memory: 4 more than there are, which puts the four rows that a warp writes at a time (2t)
// into different banks.
template <int kMTiles>
constexpr uint32_t kSumStride = 16 * kMTiles + 4;
// Shared memory of finish_tile.
template <int kMTiles, int kTiles>
inline uint32_t sums_bytes(uint32_t num_warps) {
  return num_warps * 8 * kTiles * kSumStride<kMTiles> * static_cast<uint32_t>(sizeof(float));
}

struct SkinnyOutput {
  gptr<const float> bias;  // [out], or null
  bool has_bias;
  gptr<float> y;             // [num_rows, y_stride], the first out of each row
  gptr<uint32_t> arrivals;   // [tiles], read only where there are slices
  gptr<float> partials;      // [tiles, slices, num_rows, outputs of a tile]
  uint32_t num_rows, out_features, y_stride;
  uint32_t rows;  // a bit for each row that is written
};

// Output of the tile's element e = row * outputs + m.
template <uint32_t kOutputs>
RKSC_DEVICE void write_output(const SkinnyOutput& o, uint32_t e, float sum) {
  const uint32_t row = e / kOutputs, output = blockIdx.x * kOutputs + e % kOutputs;
  if (output >= o.out_features || (o.rows >> row & 1) == 0) return;
  if (o.has_bias) sum += o.bias[output];
  o.y[static_cast<uint64_t>(row) * o.y_stride + output] = sum;
}

// Sums the CTA's warps in warp order, then, where k was sliced over CTAs, lets the last to arrive sum the slices in slice order.
template <int kMTiles, int kTiles>
RKSC_DEVICE void finish_tile(const FragC (&acc)[kMTiles][kTiles], const SkinnyOutput& o) {
  constexpr uint32_t kOutputs = 16 * kMTiles, kStride = kSumStride<kMTiles>, kWarpSums = 8 * kTiles * kStride;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  smem<float> sums = dynamic_shared<float>(0);  // [warps, 8 kTiles rows, kStride]
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp * kWarpSums + (8 * n + 2 * t + i % 2) * kStride + 16 * m + g + i / 2 * 8] = acc[m][n].v[i];
      }
    }
  }
  __syncthreads();
  const uint32_t count = o.num_rows * kOutputs, num_warps = blockDim.x / 32;
  gptr<float> partials = o.partials + static_cast<uint64_t>(blockIdx.x) * gridDim.y * count;
  for (uint32_t e = threadIdx.x; e < count; e += blockDim.x) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < num_warps; ++w) sum += sums[w * kWarpSums + e / kOutputs * kStride + e % kOutputs];
    if (gridDim.y == 1) {
      write_output<kOutputs>(o, e, sum);
    } else {
      partials[blockIdx.y * count + e] = sum;
    }
  }
  if (gridDim.y == 1) return;

  // Release: this CTA's partials before its arrival. The barrier lets one thread announce what all of them wrote.
  RKSC_SHARED(uint32_t, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomic_add(o.arrivals + blockIdx.x, 1u) == gridDim.y - 1 ? 1u : 0u;
  __syncthreads();
  const uint32_t is_last = last[0];
  if (is_last == 0) return;
  // Acquire: the other CTAs' partials after their arrivals.
  __threadfence();
  for (uint32_t e = threadIdx.x; e < count; e += blockDim.x) {
    float sum = 0.0f;
    for (uint32_t s = 0; s < gridDim.y; ++s) sum += partials[s * count + e];
    write_output<kOutputs>(o, e, sum);
  }
  if (threadIdx.x == 0) o.arrivals[blockIdx.x] = 0u;
}

// What finish_tile needs of the params of any of the ops.
template <typename Params>
RKSC_DEVICE SkinnyOutput skinny_output(const Params& p) {
  return SkinnyOutput{global<const float>(p.bias),
                      p.bias != nullptr,
                      global<float>(p.y),
                      global<uint32_t>(p.workspace),
                      global<float>(p.workspace) + kMaxCounters,
                      p.num_rows,
                      p.out_features,
                      p.y_stride,
                      rows_on_side(p)};
}

// The limits that the ops share.
template <typename Params>
inline bool skinny_rows_fit(const Params& p) {
  return p.num_rows <= RKSC_SKINNY_MAX_ROWS && p.y_stride >= p.out_features && p.side <= 1;
}

template <int kTiles>
RKSC_DEVICE void clear(FragC (&acc)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) acc[n] = FragC{};
}

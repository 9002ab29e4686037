// kv_scores.cuh -- what the kernels of kv_scores share: the plan, paged keys, and products of two tiles of keys.
#pragma once

#include "mma.cuh"

// Slots of a tile; tiles are anchored at slot 0.
constexpr uint32_t kTileSlots = 64;
constexpr uint32_t kScoreThreads = 128;
// Columns that are brought to shared memory at a time: 128 bytes of a row, 8 threads of 16 bytes each.
constexpr uint32_t kChunkVecs = 8;
constexpr uint32_t kMaxQueries = 64;
constexpr uint32_t kMaxSlots = 1u << 17;

// The params and where things lie in the workspace. `padded` is num_slots rounded up to whole tiles.
struct ScoresPlan {
  rksc_kv_scores_params p;
  uint64_t* protected_links; // [Hkv, padded] what a key's mean leaves out: the links to it, or its own; fixed point, see to_fixed
  float* inv_norm;           // [Hkv, padded] 1 / (|K| + 1e-8)
  float* logits;             // [Hkv, num_queries, padded] maximum over the group, scaled
  float* importance;         // [Hkv, padded] mean over the queries, before pooling over slots
  float* exp_mean;           // [Hkv, padded] exp(m)
  float* tile_keys;          // [Hkv, num_tiles, D] sum of a tile's normalised keys
  float* tile_max;           // [Hkv, num_tiles, num_queries] largest logit of a tile's candidates
  float* tile_sum;           // [Hkv, num_tiles, num_queries] sum of exp(logit - tile_max)
  float* tile_exp;           // [Hkv, num_tiles] sum of exp(m)
  uint32_t* tile_newest;     // [Hkv, num_tiles] largest position
  float* key_sum;            // [Hkv, D] sum of all normalised keys
  float* row_max;            // [Hkv, num_queries]
  float* row_sum;            // [Hkv, num_queries]
  uint32_t num_tiles, padded, num_candidates, group;
};

// Sums of cosines as integers: the order in which they are added does not matter, so that atomics give the same bits always.
// 40 bits below the point, and 23 above for up to 2^17 of them.
RKSC_DEVICE uint64_t to_fixed(float x) { return static_cast<uint64_t>(static_cast<int64_t>(x * 1099511627776.0f)); }
RKSC_DEVICE float from_fixed(uint64_t x) { return static_cast<float>(static_cast<int64_t>(x)) * (1.0f / 1099511627776.0f); }

// The key of a slot.
template <typename T>
RKSC_DEVICE gptr<const T> key_row(const rksc_kv_scores_params& p, uint32_t head, uint32_t slot) {
  const uint32_t block = global<const uint32_t>(p.blocks)[slot / p.block_size];
  return global<const T>(p.k_cache) +
         ((static_cast<uint64_t>(block) * p.num_kv_heads + head) * p.block_size + slot % p.block_size) * p.head_dim;
}

// Starts the copy of a chunk of columns of a tile's keys to `dst`, rows of `stride` elements; zeros for slots past the last.
// Needs cp_async_commit, cp_async_wait and a barrier.
template <typename T>
RKSC_DEVICE void load_keys(const rksc_kv_scores_params& p, uint32_t head, uint32_t tile, uint32_t chunk, smem<T> dst,
                           uint32_t stride) {
  const uint32_t vec_in_row = threadIdx.x % kChunkVecs, col = (chunk * kChunkVecs + vec_in_row) * kVec<T>;
  if (col >= p.head_dim) return;
  for (uint32_t row = threadIdx.x / kChunkVecs; row < kTileSlots; row += kScoreThreads / kChunkVecs) {
    const uint32_t slot = tile * kTileSlots + row;
    const bool valid = slot < p.num_slots;
    const gptr<const T> src = key_row<T>(p, head, valid ? slot : 0) + col;
    cp_async_16<T>(dst + (row * stride + vec_in_row * kVec<T>), src, valid);
  }
}

// Dot products of 64 rows u and 64 rows v by 128 threads: 4 rows and 8 columns each. The rows are raw keys: products of 16-bit
// elements are exact in f32 and are accumulated there, so that the tensor cores lose nothing that f32 would keep.
template <typename T>
struct PairTile {
  FragC c[2][4]; // warp = 32 rows x 32 columns

  RKSC_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n].v[e] = 0.0f;
  }
  // num_cols is a multiple of 16.
  RKSC_DEVICE void accumulate(smem<const T> u, uint32_t u_stride, smem<const T> v, uint32_t v_stride, uint32_t num_cols) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // A: tiles (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15). B: (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), ...
    const uint32_t a_row = warp / 2 * 32 + lane % 16, a_col = lane / 16 * 8;
    const uint32_t b_row = warp % 2 * 32 + lane / 16 * 8 + lane % 8, b_col = lane / 8 % 2 * 8;
#pragma unroll 2
    for (uint32_t k = 0; k < num_cols; k += 16) {
      FragA a[2];
#pragma unroll
      for (uint32_t m = 0; m < 2; ++m) ldmatrix_x4<T>(a[m].r, u + ((a_row + m * 16) * u_stride + k + a_col));
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        uint32_t r[4];
        ldmatrix_x4<T>(r, v + ((b_row + half * 16) * v_stride + k + b_col));
        const FragB low = {{r[0], r[1]}}, high = {{r[2], r[3]}};
#pragma unroll
        for (uint32_t m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(c[m][half * 2], a[m], low);
          mma_m16n8k16<T>(c[m][half * 2 + 1], a[m], high);
        }
      }
    }
  }
  RKSC_DEVICE float at(uint32_t m, uint32_t n) const { return c[m / 2][n / 2].v[m % 2 * 2 + n % 2]; }
  static RKSC_DEVICE uint32_t row(uint32_t m) { return threadIdx.x / 64 * 32 + m * 8 + threadIdx.x % 32 / 4; }
  static RKSC_DEVICE uint32_t col(uint32_t n) { return threadIdx.x / 32 % 2 * 32 + n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2; }
};

template <>
struct PairTile<float> {
  float c[4][8];

  RKSC_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) c[m][n] = 0.0f;
  }
  // num_cols is a multiple of 4.
  RKSC_DEVICE void accumulate(smem<const float> u, uint32_t u_stride, smem<const float> v, uint32_t v_stride, uint32_t num_cols) {
    for (uint32_t k = 0; k < num_cols; k += 4) {
      vec<float, 4> a[4];
#pragma unroll
      for (uint32_t m = 0; m < 4; ++m) a[m] = load_vec<4>(u + (row(m) * u_stride + k));
#pragma unroll
      for (uint32_t n = 0; n < 8; ++n) {
        const vec<float, 4> b = load_vec<4>(v + (col(n) * v_stride + k));
#pragma unroll
        for (uint32_t m = 0; m < 4; ++m)
#pragma unroll
          for (uint32_t e = 0; e < 4; ++e) c[m][n] = fmaf(a[m][e], b[e], c[m][n]);
      }
    }
  }
  RKSC_DEVICE float at(uint32_t m, uint32_t n) const { return c[m][n]; }
  // Neighbouring threads have neighbouring columns: 8 rows of shared memory at once, which an odd stride in vectors spreads.
  static RKSC_DEVICE uint32_t row(uint32_t m) { return threadIdx.x / 8 + m * 16; }
  static RKSC_DEVICE uint32_t col(uint32_t n) { return threadIdx.x % 8 + n * 8; }
};


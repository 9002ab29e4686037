// kv_scores_nearest.cuh -- the pairwise part of kv_scores: for each key the newest other key that is similar, found without
// keeping any of the n x n cosines.
#pragma once

#include "kv_scores.cuh"

namespace {

// A key that is similar to a row: the newer, the larger; ties in position go to the later slot. 0 is none.
RKSC_DEVICE uint64_t recency_key(uint32_t position, uint32_t slot) { return (static_cast<uint64_t>(position) << 32 | slot) + 1; }

// newest[t] = largest position in tiles [0, t]. One warp; the caller's barrier makes it visible.
RKSC_DEVICE void newest_up_to(gptr<const uint32_t> tile_newest, uint32_t num_tiles, smem<uint32_t> newest) {
  uint32_t carried = 0;
  const uint32_t lane = threadIdx.x;
  for (uint32_t base = 0; base < num_tiles; base += 32) {
    uint32_t x = 0;
    if (base + lane < num_tiles) x = tile_newest[base + lane];
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t left = __shfl_up_sync(kFullMask, x, step);
      if (lane >= step && left > x) x = left;
    }
    if (carried > x) x = carried;
    if (base + lane < num_tiles) newest[base + lane] = x;
    carried = __shfl_sync(kFullMask, x, 31);
  }
}

// Sums what the tiles of a head left: normalised keys over D, and the softmax of each query. Tiles in ascending order.
RKSC_DEVICE void fold_tiles(const ScoresPlan& plan, uint32_t head) {
  const rksc_kv_scores_params& p = plan.p;
  const gptr<const float> tile_keys =
      global<const float>(plan.tile_keys) + static_cast<uint64_t>(head) * plan.num_tiles * p.head_dim;
  for (uint32_t d = threadIdx.x; d < p.head_dim; d += kScoreThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t tile = 0; tile < plan.num_tiles; ++tile) sum += tile_keys[tile * p.head_dim + d];
    global<float>(plan.key_sum)[head * p.head_dim + d] = sum;
  }
  const uint64_t of_head = static_cast<uint64_t>(head) * plan.num_tiles * p.num_queries;
  const gptr<const float> tile_max = global<const float>(plan.tile_max) + of_head;
  const gptr<const float> tile_sum = global<const float>(plan.tile_sum) + of_head;
  for (uint32_t j = threadIdx.x; j < p.num_queries; j += kScoreThreads) {
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t tile = 0; tile < plan.num_tiles; ++tile) max = fmaxf(max, tile_max[tile * p.num_queries + j]);
    for (uint32_t tile = 0; tile < plan.num_tiles; ++tile) {
      // A tile of window slots alone has maximum -inf and sum 0; there is a candidate, so max is finite.
      sum += tile_sum[tile * p.num_queries + j] * expf(tile_max[tile * p.num_queries + j] - max);
    }
    global<float>(plan.row_max)[head * p.num_queries + j] = max;
    global<float>(plan.row_sum)[head * p.num_queries + j] = sum;
  }
}

// The newest similar key each of a thread's 4 rows has seen among its own columns; key 0 is none.
struct Nearest {
  uint64_t key[4];
  float link[4];
};

// Looks a tile's products through for similar keys and posts what is newer to best_of_row.
template <typename T>
RKSC_DEVICE void visit_tile(const PairTile<T>& pairs, Nearest& nearest, const float (&inv_norm_u)[4], float threshold,
                            uint32_t u_start, uint32_t v_start, smem<const float> inv_norm_v, smem<const uint32_t> position_v,
                            smem<float> link_to_first, smem<uint64_t> best_of_row) {
  bool improved[4] = {false, false, false, false};
#pragma unroll
  for (uint32_t n = 0; n < 8; ++n) {
    const uint32_t col = PairTile<T>::col(n), v = v_start + col;
    const float inv_norm_col = inv_norm_v[col];
#pragma unroll
    for (uint32_t m = 0; m < 4; ++m) {
      // Slots past the last are zero keys: similar to nothing.
      const float link = pairs.at(m, n) * inv_norm_u[m] * inv_norm_col;
      const uint32_t row = PairTile<T>::row(m);
      if (v == 0) link_to_first[row] = link;
      if (link > threshold && v != u_start + row) {
        const uint64_t key = recency_key(position_v[col], v);
        if (key > nearest.key[m]) {
          nearest.key[m] = key;
          nearest.link[m] = link;
          improved[m] = true;
        }
      }
    }
  }
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m)
    if (improved[m]) atomic_max(best_of_row + PairTile<T>::row(m), nearest.key[m]);
}

// Whether every row has a similar key that is newer than all slots left, none of which is past position newest_left. At equal
// positions the later slot counts as newer, and what is left has earlier slots. The same in all threads of a warp.
RKSC_DEVICE bool all_found(smem<const uint64_t> best_of_row, uint32_t newest_left) {
  bool found = true;
  for (uint32_t row = threadIdx.x % 32; row < kTileSlots; row += 32) {
    const uint64_t key = best_of_row[row];
    found = found && key > static_cast<uint64_t>(newest_left) << 32;
  }
  return __all_sync(kFullMask, found);
}

// Adds the rows' links to their newest similar keys to what those keys' means leave out, or with row means to what their own do.
template <typename T>
RKSC_DEVICE void add_links(const Nearest& nearest, uint32_t u_start, bool row_means, smem<const uint64_t> best_of_row,
                           smem<const float> link_to_first, gptr<uint64_t> links) {
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
    const uint32_t row = PairTile<T>::row(m);
    const uint64_t key = best_of_row[row];
    // A key names its slot, so exactly one thread has it.
    if (nearest.key[m] == 0 || nearest.key[m] != key) continue;
    atomic_add(links + (row_means ? u_start + row : static_cast<uint32_t>(key - 1)), to_fixed(nearest.link[m]));
  }
  if (row_means) return;
  // Where nothing is similar the link to slot 0 is dropped, as the published code does. Such a row made the walk reach tile 0.
  // Without redundancy nearly all rows end here: one addition a warp.
  if (threadIdx.x >= kTileSlots) return;
  const uint64_t key = best_of_row[threadIdx.x];
  uint64_t dropped = 0;
  if (key == 0 && u_start + threadIdx.x != 0) {
    const float link = link_to_first[threadIdx.x];
    dropped = to_fixed(link);
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) dropped += __shfl_xor_sync(kFullMask, dropped, step);
  if (threadIdx.x % 32 == 0 && dropped != 0) atomic_add(links, dropped);
}

// kv_nearest
//   v*(u) = the newest v != u with S[u, v] > threshold, S[u, v] = K_u K_v / ((|K_u| + 1e-8) (|K_v| + 1e-8)); 0 if there is none
//   protected_links[v] = sum of S[u, v] over the u != v with v*(u) = v; with row means (variants text and alg1)
//   protected_links[u] = S[u, v*(u)], 0 if there is none
//
//   k_cache [num_blocks, Hkv, block_size, D] T, blocks [slots], positions [Hkv, position_stride] or null: read
//   inv_norm, tile_newest and, for the fold, tile_keys, tile_max, tile_sum: read, as kv_prepare left them
//   protected_links: added to; key_sum [Hkv, D], row_max, row_sum [Hkv, num_queries]: written
//
// Work      CTA = (64 rows u, kv head); it holds its rows' keys in shared memory and walks the tiles of keys v from the last to the
//           first, two chunks of columns in flight, until all its rows have a similar key newer than all that is left. One CTA
//           more per head folds the tiles' partial sums meanwhile, and is all there is where nobody wants redundancy.
// Numerics  dot products of raw keys in f32 (tensor cores for 16-bit keys: products exact, f32 accumulation), then two f32 factors:
//           about 2^-21 off the exact cosine at most, never rounded to 16 bits. Sums over u are of integers: any order will do.
// Traffic   keys of the walked tiles per 64 rows, from L2: at worst num_slots^2 / 64 * D * sizeof(T) bytes a head; once from memory.
// Bound     tensor cores at worst, 2 num_slots^2 D FLOP a head; redundant traces stop after a few tiles.
// Limits    D % 16 == 0 (16 bits), D % 8 == 0 (f32), D <= 256; num_slots <= 2^17; threshold >= 0.
// Oracle    testing/kv_scores.rs.   Bench  rksc-run bench kernels --op kv_scores
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) kv_nearest_kernel(const __grid_constant__ ScoresPlan plan) {
  const rksc_kv_scores_params& p = plan.p;
  const uint32_t head = blockIdx.y;
  if (blockIdx.x == 0) {
    fold_tiles(plan, head);
    return;
  }
  RKSC_SHARED(uint64_t, best_of_row, kTileSlots);
  RKSC_SHARED(float, link_to_first, kTileSlots);
  // Two tiles' worth: the next tile's are written while this one's are read.
  RKSC_SHARED(float, inv_norm_v, 2 * kTileSlots);
  RKSC_SHARED(uint32_t, position_v, 2 * kTileSlots);
  constexpr uint32_t kChunk = kChunkVecs * kVec<T>, kStride = kChunk + kVec<T>;
  const uint32_t u_stride = p.head_dim + kVec<T>, num_chunks = div_up_device(p.head_dim, kChunk);
  const smem<T> u_keys = dynamic_shared<T>(0);
  const smem<T> v_keys = u_keys + kTileSlots * u_stride;
  const smem<uint32_t> newest =
      dynamic_shared<uint32_t>((kTileSlots * u_stride + 2 * kTileSlots * kStride) * static_cast<uint32_t>(sizeof(T)));
  const gptr<const float> inv_norm = global<const float>(plan.inv_norm) + static_cast<uint64_t>(head) * plan.padded;
  const gptr<const uint32_t> positions = global<const uint32_t>(p.positions) + static_cast<uint64_t>(head) * p.position_stride;
  const bool by_position = p.positions != nullptr;
  const uint32_t u_tile = blockIdx.x - 1, thread = threadIdx.x;

  const auto load_v = [&](uint32_t tile, uint32_t chunk, uint32_t stage) {
    load_keys<T>(p, head, tile, chunk, v_keys + stage * kTileSlots * kStride, kStride);
    cp_async_commit();
    if (chunk == 0 && thread < kTileSlots) {
      const uint32_t slot = tile * kTileSlots + thread, at = tile % 2 * kTileSlots + thread;
      inv_norm_v[at] = inv_norm[slot];
      uint32_t position = slot;
      if (by_position && slot < p.num_slots) position = positions[slot];
      position_v[at] = position;
    }
  };

  // Rows past the last slot count as found.
  if (thread < kTileSlots) best_of_row[thread] = u_tile * kTileSlots + thread < p.num_slots ? 0 : ~0ull;
  if (by_position && thread < 32) {
    newest_up_to(global<const uint32_t>(plan.tile_newest) + static_cast<uint64_t>(head) * plan.num_tiles, plan.num_tiles, newest);
  }
  for (uint32_t chunk = 0; chunk < num_chunks; ++chunk) load_keys<T>(p, head, u_tile, chunk, u_keys + chunk * kChunk, u_stride);
  uint32_t tile = plan.num_tiles - 1, chunk = 0, stage = 0;
  load_v(tile, chunk, stage);

  float inv_norm_u[4];
  Nearest nearest;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
    inv_norm_u[m] = inv_norm[u_tile * kTileSlots + PairTile<T>::row(m)];
    nearest.key[m] = 0;
    nearest.link[m] = 0.0f;
  }
  PairTile<T> pairs;
  pairs.clear();
  for (;;) {
    cp_async_wait<0>();
    // The chunk is there for all, and nobody reads the other stage any more.
    __syncthreads();
    const bool last_chunk = chunk + 1 == num_chunks;
    const uint32_t next_chunk = last_chunk ? 0 : chunk + 1;
    if (!last_chunk || tile > 0) load_v(last_chunk ? tile - 1 : tile, next_chunk, 1 - stage);
    const uint32_t left = p.head_dim - chunk * kChunk;
    pairs.accumulate(u_keys + chunk * kChunk, u_stride, v_keys + stage * kTileSlots * kStride, kStride,
                     left < kChunk ? left : kChunk);
    if (last_chunk) {
      const uint32_t half = tile % 2 * kTileSlots;
      visit_tile<T>(pairs, nearest, inv_norm_u, p.threshold, u_tile * kTileSlots, tile * kTileSlots, inv_norm_v + half,
                    position_v + half, link_to_first, best_of_row);
      // All rows' best so far are known to all. They change again only behind the next chunk's barrier, so all warps see the same.
      __syncthreads();
      if (tile == 0) break;
      uint32_t newest_left = tile * kTileSlots - 1;
      if (by_position) newest_left = newest[tile - 1];
      if (all_found(best_of_row, newest_left)) break;
      pairs.clear();
      tile -= 1;
    }
    chunk = next_chunk;
    stage = 1 - stage;
  }
  // No copy may outlive the CTA.
  cp_async_wait<0>();
  add_links<T>(nearest, u_tile * kTileSlots, p.variant != RKSC_KV_CODE, best_of_row, link_to_first,
               global<uint64_t>(plan.protected_links) + static_cast<uint64_t>(head) * plan.padded);
}

template <typename T>
int32_t launch_nearest(const ScoresPlan& plan, rksc_stream stream) {
  constexpr uint32_t kStride = (kChunkVecs + 1) * kVec<T>;
  const uint32_t elements = kTileSlots * (plan.p.head_dim + kVec<T>) + 2 * kTileSlots * kStride;
  const uint32_t newest = plan.p.positions ? plan.num_tiles * 4 : 0;
  // Without links the redundancy is some finite number, and its share is 0.
  const uint32_t tiles = plan.p.lambda == 1.0f && plan.p.redundancy == nullptr ? 0 : plan.num_tiles;
  return launch(kv_nearest_kernel<T>, dim3(tiles + 1, plan.p.num_kv_heads), dim3(kScoreThreads),
                elements * static_cast<uint32_t>(sizeof(T)) + newest, stream, plan);
}

}  // namespace

// attention.cuh -- what the attention kernels share: the state of an online softmax, paged addressing, the ring of K and V tiles,
// and the merge of a row group's partial results.
//
// Scores are carried in base 2: s = log2(e) sm_scale q k, so that weights are exp2 of differences and a maximum passes from
// item to item without a rounding.
#pragma once

#include <math.h>

#include "mma.cuh"

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr uint32_t kAttentionThreads = 128;
// Items of a group whose weights are held at once in the merge.
constexpr uint32_t kMergeItems = 16;

// Part of a softmax: out = sum 2^(s - max) v is kept beside it. No slots seen: max -inf, sum 0, out 0.
struct AttnState {
  float max, sum;
};

// What a state of maximum `max` is multiplied by when `joint` >= max becomes the maximum; an empty state counts nothing.
RKSC_DEVICE float attn_weight(float max, float joint) { return max == -INFINITY ? 0.0f : exp2_fast(max - joint); }

// ln sum exp of the scaled scores; -inf where there were none.
RKSC_DEVICE float attn_lse(AttnState s) { return s.sum == 0.0f ? -INFINITY : s.max * kLn2 + logf(s.sum); }

// K or V of one layer, [num_blocks, Hkv, block_size, D], seen by one kv head.
template <typename T>
struct KvView {
  gptr<const T> base;
  uint32_t block_elems;  // Hkv * block_size * D

  RKSC_DEVICE static KvView make(const void* cache, uint32_t num_kv_heads, uint32_t head, uint32_t block_size, uint32_t head_dim) {
    const uint32_t head_elems = block_size * head_dim;
    return {global<const T>(cache) + static_cast<uint64_t>(head) * head_elems, num_kv_heads * head_elems};
  }
  // Element `elem` of the block's [block_size, D].
  RKSC_DEVICE gptr<const T> at(uint32_t block, uint32_t elem) const {
    return base + (static_cast<uint64_t>(block) * block_elems + elem);
  }
};

// ---- tiles in shared memory --------------------------------------------------------------------------------------

// Rows of D elements of T. Rows are padded by 16 bytes: an odd number of 16-byte units apart for every D here, so the 8 rows of
// an ldmatrix (or the 8 lanes of a phase of 16-byte loads) lie in different banks. At D 256 of 16-bit elements the padding would
// not leave room for three tiles in 99 KiB, and the vectors of a row are permuted instead.
template <typename T, int kHeadDim>
struct TileShape {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kVecs = kHeadDim / kVec<T>;
  static constexpr bool kPermuted = kTensor && kHeadDim == 256;
  static constexpr int kStride = kHeadDim + (kPermuted ? 0 : kVec<T>);
  // f32 takes half tiles, for the same bytes.
  static constexpr int kSlots = kTensor ? RKSC_TILE_SLOTS : RKSC_TILE_SLOTS / 2;
  static constexpr int kBuffers = kTensor && kHeadDim < 256 ? 4 : 2;
  static constexpr int kElems = kSlots * kStride;
  // Vectors of a tile whose addresses a thread works out together; at D 256 there are no registers left for more.
  static constexpr int kIssueUnroll = kHeadDim < 256 ? 8 : 4;
  // Queries whose vectors are held at once, and whether they need memory of their own beside the ring.
  static constexpr int kQueries = kTensor ? RKSC_ATTENTION_MAX_ROWS : 16;
  static constexpr bool kQueryInRegisters = kTensor && kHeadDim < 256;
  static constexpr uint32_t kRingBytes =
      (kBuffers * kElems + (kQueryInRegisters ? 0 : kQueries * kStride)) * static_cast<uint32_t>(sizeof(T));

  // Offset of vector `c` of row `row`.
  RKSC_DEVICE static uint32_t at(uint32_t row, uint32_t c) {
    return row * kStride + (kPermuted ? c ^ (row % 8) : c) * kVec<T>;
  }
};

// True where one of the elements is infinite or NaN.
template <typename T>
RKSC_DEVICE bool any_not_finite(const vec<T, kVec<T>>& x) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) any |= !(fabsf(to_float(x[i])) < INFINITY);
  return any;
}

// The tiles of an item, K 0, V 0, K 1, V 1, ... in this order through kBuffers buffers: load j lies in buffer j % kBuffers.
template <typename T, int kHeadDim>
struct KvRing {
  using Shape = TileShape<T, kHeadDim>;
  smem<T> memory;
  KvView<T> k, v;
  gptr<const uint32_t> blocks;  // the item's first block
  uint32_t num_blocks, block_shift;
  uint32_t end;      // slots of the item that are read; beyond them a tile is zero
  uint32_t ids, next_ids;  // this lane's block of the current window of 32 blocks, and of the next

  RKSC_DEVICE uint32_t num_tiles() const { return div_up_device(end, Shape::kSlots); }
  RKSC_DEVICE smem<T> buffer(uint32_t load) const { return memory + (load % Shape::kBuffers) * Shape::kElems; }

  RKSC_DEVICE uint32_t fetch_ids(uint32_t window) const {
    const uint32_t at = window * 32 + threadIdx.x % 32;
    uint32_t id = 0;  // a legal block where there is nothing to read
    if (at < num_blocks) id = blocks[at];
    return id;
  }

  RKSC_DEVICE void begin() {
    num_blocks = (end + (1u << block_shift) - 1) >> block_shift;
    ids = fetch_ids(0);
    next_ids = fetch_ids(1);
  }

  // Starts load `load`; a commit belongs to every load, also to one past the end. The block ids of a window come from a register
  // by shuffle, and the window after it is already on its way: no load waits for a load of its address.
  RKSC_DEVICE void issue(uint32_t load) {
    const uint32_t tile = load / 2;
    if (tile < num_tiles()) {
      const uint32_t window_tiles = (32u << block_shift) / Shape::kSlots;
      if (load % 2 == 0 && tile > 0 && tile % window_tiles == 0) {
        ids = next_ids;
        next_ids = fetch_ids(tile / window_tiles + 1);
      }
      const KvView<T> cache = load % 2 == 0 ? k : v;
      const smem<T> dst = buffer(load);
      const uint32_t offset_mask = (1u << block_shift) - 1;
#pragma unroll(Shape::kIssueUnroll)
      for (int i = 0; i < Shape::kSlots * Shape::kVecs / static_cast<int>(kAttentionThreads); ++i) {
        const uint32_t idx = threadIdx.x + i * kAttentionThreads;
        const uint32_t slot = idx / Shape::kVecs, c = idx % Shape::kVecs;
        const uint32_t at = tile * Shape::kSlots + slot;
        const uint32_t block = __shfl_sync(kFullMask, ids, (at >> block_shift) % 32);
        cp_async_16<T>(dst + Shape::at(slot, c), cache.at(block, (at & offset_mask) * kHeadDim + c * kVec<T>), at < end);
      }
    }
    cp_async_commit();
  }

  // Clears the vectors of a V tile, of those this thread loaded, that are not finite and lie at or past `first`: some row does not
  // attend to them, and 0 times them is not 0. What rows that do attend must know is left in `poison`: the lowest such slot, inverted.
  RKSC_DEVICE void scrub(uint32_t load, uint32_t first, smem<uint32_t> poison) {
    const smem<T> tile = buffer(load);
    for (uint32_t idx = threadIdx.x; idx < Shape::kSlots * Shape::kVecs; idx += kAttentionThreads) {
      const uint32_t slot = idx / Shape::kVecs, at = load / 2 * Shape::kSlots + slot;
      const smem<T> p = tile + Shape::at(slot, idx % Shape::kVecs);
      if (at < first || at >= end) continue;
      if (any_not_finite<T>(load_vec<kVec<T>>(p))) {
        store_vec(p, vec<T, kVec<T>>{});
        atomic_max(poison, ~at);
      }
    }
  }
};

// ---- one item ----------------------------------------------------------------------------------------------------

// What every thread of the CTA knows about its item. Query i is row i / group of the item, head i % group of the kv head.
struct ItemView {
  rksc_attention_item item;
  uint32_t index, head, group, num_queries;
  uint32_t end;        // slots any of its rows attends to, counted from the item's first
  uint32_t shortest;   // slots all of its rows attend to
  smem<uint32_t> rows;    // [num_rows] batch row
  smem<uint32_t> limits;  // [num_rows] slots the row attends to, from the item's first, at most num_slots
  smem<uint32_t> poison;  // see KvRing::scrub; 0: none

  // Row of `q`, `o` and `lse` seen as [T * Hq, ...].
  RKSC_DEVICE uint64_t output(uint32_t query, uint32_t num_q_heads) const {
    return static_cast<uint64_t>(rows[query / group]) * num_q_heads + head * group + query % group;
  }
  RKSC_DEVICE bool poisoned(uint32_t query) const {
    const uint32_t mark = poison[0];
    return mark != 0 && limits[query / group] > ~mark;
  }
};

// Reads the item's rows. Each warp finds the bounds for itself, so the barrier behind is for `rows`, `limits` and `poison` alone.
RKSC_DEVICE void open_item(const rksc_paged_attention_params& p, ItemView& view) {
  const gptr<const uint32_t> row_order = global<const uint32_t>(p.row_order), kv_lens = global<const uint32_t>(p.kv_lens);
  const rksc_attention_item& item = view.item;
  uint32_t longest = 0, shortest = item.num_slots;
  for (uint32_t row = threadIdx.x % 32; row < item.num_rows; row += 32) {
    const uint32_t kv_len = kv_lens[item.row_start + row];
    const uint32_t past = kv_len > item.slot_start ? kv_len - item.slot_start : 0;
    const uint32_t limit = past < item.num_slots ? past : item.num_slots;
    longest = limit > longest ? limit : longest;
    shortest = limit < shortest ? limit : shortest;
    if (threadIdx.x < 32) {
      view.limits[row] = limit;
      view.rows[row] = row_order[item.row_start + row];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const uint32_t a = __shfl_xor_sync(kFullMask, longest, step), b = __shfl_xor_sync(kFullMask, shortest, step);
    longest = a > longest ? a : longest;
    shortest = b < shortest ? b : shortest;
  }
  if (threadIdx.x == 0) view.poison[0] = 0;
  view.end = longest;
  view.shortest = shortest;
}

// Four elements of a query's unnormalised output go where they belong: normalised to o, or as they are to the item's partials.
template <typename T>
RKSC_DEVICE void emit(const rksc_paged_attention_params& p, const ItemView& view, uint32_t query, uint32_t elem,
                      vec<float, 4> out, AttnState state) {
  const uint32_t dim = p.head_dim;
  const bool direct = view.item.partial_start == RKSC_NO_PARTIAL;
  float scale = direct && state.sum != 0.0f ? 1.0f / state.sum : 1.0f;
  if (view.poisoned(query)) scale = NAN;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] *= scale;
  if (direct) {
    const uint64_t at = view.output(query, p.num_q_heads);
    vec<T, 4> rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(out[i]);
    store_vec(global<T>(p.o) + (at * dim + elem), rounded);
    if (elem == 0) global<float>(p.lse)[at] = attn_lse(state);
  } else {
    const uint64_t at = static_cast<uint64_t>(view.item.partial_start + query / view.group) * p.num_q_heads +
                        view.head * view.group + query % view.group;
    store_vec(global<float>(p.partial_o) + (at * dim + elem), out);
    if (elem == 0) store_vec(global<float>(p.partial_ml) + at * 2, vec<float, 2>{{state.max, state.sum}});
  }
}

// ---- merge -------------------------------------------------------------------------------------------------------

// Shared memory of the merge: weights and sums of [64 queries][kMergeItems], and the outputs between rounds of items.
template <int kHeadDim>
constexpr uint32_t kMergeBytes = RKSC_ATTENTION_MAX_ROWS * (2 * kMergeItems + kHeadDim) * 4;

// True in the CTA that is the last of its group's items for this kv head; its partials and theirs may then be read. The counter is back
// at zero for the next launch.
RKSC_DEVICE bool arrive_last(const rksc_paged_attention_params& p, const ItemView& view, uint32_t num_items, smem<uint32_t> flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const gptr<uint32_t> counter = global<uint32_t>(p.arrivals) + (static_cast<uint64_t>(view.item.group) * p.num_kv_heads + view.head);
    const bool last = atomic_add(counter, 1u) == num_items - 1;
    if (last) counter[0] = 0;
    flag[0] = last ? 1 : 0;
  }
  __syncthreads();
  const uint32_t last = flag[0];
  if (last != 0) __threadfence();
  return last != 0;
}

// One round's items of the group, and what the rounds so far came to.
struct MergeMemory {
  smem<uint32_t> first, count, partial;  // [kMergeItems] item's rows, from the group's first; its partial of row `first`
  smem<uint32_t> rows;                   // [64] batch row
  smem<float> max, sum, alpha;           // [64] per query; alpha takes the rounds before to the new maximum
  smem<float> weights, sums, out;        // [64][kMergeItems] twice, [64][D]
};

// The round's weights, from the partials' maxima and sums.
RKSC_DEVICE void merge_weights(const rksc_paged_attention_params& p, const MergeMemory& mem, uint32_t head, uint32_t group,
                               uint32_t num_queries, uint32_t num_items, bool first_round) {
  const gptr<const float> ml = global<const float>(p.partial_ml);
  // All pairs at once: the loads do not wait for each other.
#pragma unroll 4
  for (uint32_t pair = threadIdx.x; pair < num_queries * kMergeItems; pair += kAttentionThreads) {
    const uint32_t query = pair / kMergeItems, i = pair % kMergeItems, row = query / group;
    vec<float, 2> state{{-INFINITY, 0.0f}};
    if (i < num_items && row - mem.first[i] < mem.count[i]) {
      const uint64_t at = static_cast<uint64_t>(mem.partial[i] + row - mem.first[i]) * p.num_q_heads + head * group + query % group;
      state = load_vec<2>(ml + at * 2);
    }
    mem.weights[pair] = state[0];
    mem.sums[pair] = state[1];
  }
  __syncthreads();
  if (threadIdx.x < num_queries) {
    const uint32_t query = threadIdx.x;
    AttnState before{-INFINITY, 0.0f};
    if (!first_round) before = {mem.max[query], mem.sum[query]};
    float joint = before.max;
    for (uint32_t i = 0; i < num_items; ++i) {
      const float max = mem.weights[query * kMergeItems + i];
      joint = fmaxf(joint, max);
    }
    const float alpha = attn_weight(before.max, joint);
    float sum = before.sum * alpha;
    for (uint32_t i = 0; i < num_items; ++i) {
      const float max = mem.weights[query * kMergeItems + i], part = mem.sums[query * kMergeItems + i];
      const float w = attn_weight(max, joint);
      sum += w * part;
      mem.weights[query * kMergeItems + i] = w;
    }
    mem.max[query] = joint;
    mem.sum[query] = sum;
    mem.alpha[query] = alpha;
  }
  __syncthreads();
}

// Adds the round's outputs in item order, and after the last round writes o. Four quarter rows times four items are in flight per
// thread: the tail of the launch is the latency of these loads.
template <typename T, int kHeadDim>
RKSC_DEVICE void merge_outputs(const rksc_paged_attention_params& p, const MergeMemory& mem, uint32_t head, uint32_t group,
                               uint32_t num_queries, uint32_t num_items, bool first_round, bool last_round) {
  constexpr uint32_t kQuads = kHeadDim / 4, kUnits = 4, kAhead = 4;
  const gptr<const float> partial_o = global<const float>(p.partial_o);
  for (uint32_t start = threadIdx.x; start < num_queries * kQuads; start += kUnits * kAttentionThreads) {
    vec<float, 4> acc[kUnits] = {};
    for (uint32_t i0 = 0; i0 < num_items; i0 += kAhead) {
      vec<float, 4> part[kUnits][kAhead] = {};
      float weight[kUnits][kAhead] = {};
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) {
        const uint32_t unit = start + u * kAttentionThreads, query = unit / kQuads;
#pragma unroll
        for (uint32_t a = 0; a < kAhead; ++a) {
          const uint32_t i = i0 + a;
          if (query >= num_queries || i >= num_items) continue;
          weight[u][a] = mem.weights[query * kMergeItems + i];
          if (weight[u][a] == 0.0f) continue;  // no such row in the item, or nothing to add
          const uint64_t at =
              static_cast<uint64_t>(mem.partial[i] + query / group - mem.first[i]) * p.num_q_heads + head * group + query % group;
          part[u][a] = load_vec<4>(partial_o + (at * kHeadDim + unit % kQuads * 4));
        }
      }
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) {
#pragma unroll
        for (uint32_t a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[u][e] += weight[u][a] * part[u][a][e];
        }
      }
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      const uint32_t unit = start + u * kAttentionThreads, query = unit / kQuads, elem = unit % kQuads * 4;
      if (query >= num_queries) continue;
      if (!first_round) {
        const vec<float, 4> before = load_vec<4>(mem.out + (query * kHeadDim + elem));
        const float alpha = mem.alpha[query];
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[u][e] += alpha * before[e];
      }
      if (!last_round) {
        store_vec(mem.out + (query * kHeadDim + elem), acc[u]);
        continue;
      }
      const AttnState state{mem.max[query], mem.sum[query]};
      const float scale = state.sum != 0.0f ? 1.0f / state.sum : 0.0f;
      const uint64_t at = static_cast<uint64_t>(mem.rows[query / group]) * p.num_q_heads + head * group + query % group;
      vec<T, 4> rounded;
#pragma unroll
      for (int e = 0; e < 4; ++e) rounded[e] = from_float<T>(acc[u][e] * scale);
      store_vec(global<T>(p.o) + (at * kHeadDim + elem), rounded);
      if (elem == 0) global<float>(p.lse)[at] = attn_lse(state);
    }
  }
}

// Merges the group's partials for one kv head, in item order, kMergeItems at a time.
template <typename T, int kHeadDim>
RKSC_DEVICE void merge_group(const rksc_paged_attention_params& p, const MergeMemory& mem, const rksc_attention_group& group,
                             uint32_t head, uint32_t group_heads) {
  const gptr<const rksc_attention_item> items = global<const rksc_attention_item>(p.items) + group.item_start;
  if (threadIdx.x < group.num_rows) mem.rows[threadIdx.x] = global<const uint32_t>(p.row_order)[group.row_start + threadIdx.x];
  const uint32_t num_queries = group.num_rows * group_heads;
  for (uint32_t start = 0; start < group.num_items; start += kMergeItems) {
    const uint32_t left = group.num_items - start, n = left < kMergeItems ? left : kMergeItems;
    if (threadIdx.x < n) {
      const rksc_attention_item item = items[start + threadIdx.x];
      mem.first[threadIdx.x] = item.row_start - group.row_start;
      mem.count[threadIdx.x] = item.num_rows;
      mem.partial[threadIdx.x] = item.partial_start;
    }
    __syncthreads();
    merge_weights(p, mem, head, group_heads, num_queries, n, start == 0);
    merge_outputs<T, kHeadDim>(p, mem, head, group_heads, num_queries, n, start == 0, left <= kMergeItems);
    // The next round overwrites the table and the weights.
    __syncthreads();
  }
}

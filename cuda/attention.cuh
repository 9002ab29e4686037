// attention.cuh -- what the attention kernels share: scores and windows, the state of an online softmax, paged addressing, the ring of
// K and V tiles, and what a CTA knows of its item.
//
// Scores are carried in base 2: s = log2(e) sm_scale q k, so that weights are exp2 of differences and a maximum passes from
// item to item without a rounding. Capped, s = log2(e) softcap tanh(sm_scale q k / softcap).
#pragma once

#include <math.h>

#include "mma.cuh"

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr uint32_t kAttentionThreads = 128;

// What is done to a product of a query and a key before exp2: capped, and then multiplied by the factor.
struct ScoreScale {
  float factor;
  float inner;  // what goes into tanh for one of the product; 0: no cap

  RKSC_DEVICE static ScoreScale make(float sm_scale, float softcap) {
    if (softcap > 0.0f) return {softcap * kLog2e, sm_scale / softcap};
    return {sm_scale * kLog2e, 0.0f};
  }
  RKSC_DEVICE float cap(float x) const { return inner > 0.0f ? tanhf(x * inner) : x; }
};

// The first slot that a row attends to which sees `num_slots` through a window over the newest; window 0: over all.
RKSC_DEVICE uint32_t window_start(uint32_t num_slots, uint32_t window) {
  return window != 0 && num_slots > window ? num_slots - window : 0;
}

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
};

// ---- one item ----------------------------------------------------------------------------------------------------

// What every thread of the CTA knows about its item. Query i is row i / group of the item, head i % group of the kv head. Slots are
// counted from the item's first, which open_item moves up to the first tile within a row's window.
struct ItemView {
  rksc_attention_item item;
  uint32_t index, head, group, num_queries;
  uint32_t window;     // newest slots that a row attends to; 0: all
  uint32_t skipped;    // slots that were the item's and lie below the windows of all of its rows
  uint32_t end;        // slots up to the last that any of its rows attends to
  uint32_t shortest;   // slots up to the first past some row's own
  uint32_t highest;    // slots below the window of some row
  smem<uint32_t> rows;    // [num_rows] batch row
  smem<uint32_t> seen;    // [num_rows] slots up to the row's own, before `skipped` were taken off
  smem<uint32_t> poison;  // [num_rows] 1: the row attends to a slot that `scrub` cleared

  // Row `row` attends to slots [start(row), limit(row)).
  RKSC_DEVICE uint32_t own(uint32_t row) const {
    const uint32_t slots = seen[row];
    return slots > skipped ? slots - skipped : 0;
  }
  RKSC_DEVICE uint32_t start(uint32_t row) const { return window_start(own(row), window); }
  RKSC_DEVICE uint32_t limit(uint32_t row) const {
    const uint32_t slots = own(row);
    return slots < item.num_slots ? slots : item.num_slots;
  }

  // Row of `q`, `o` and `lse` seen as [T * Hq, ...].
  RKSC_DEVICE uint64_t output(uint32_t query, uint32_t num_q_heads) const {
    return static_cast<uint64_t>(rows[query / group]) * num_q_heads + head * group + query % group;
  }
  // Row of the partials seen as [partials * Hq, ...].
  RKSC_DEVICE uint64_t partial(uint32_t query, uint32_t num_q_heads) const {
    return static_cast<uint64_t>(item.partial_start + query / group) * num_q_heads + head * group + query % group;
  }
  RKSC_DEVICE bool poisoned(uint32_t query) const {
    const uint32_t mark = poison[query / group];
    return mark != 0;
  }
};

// Clears the vectors of a V tile, of those this thread loaded, that are not finite in slots that some row does not attend to: 0 times
// them is not 0. Rows that do attend are marked.
template <typename T, int kHeadDim>
RKSC_DEVICE void scrub(const KvRing<T, kHeadDim>& ring, uint32_t load, const ItemView& view) {
  using Shape = TileShape<T, kHeadDim>;
  const smem<T> tile = ring.buffer(load);
  for (uint32_t idx = threadIdx.x; idx < Shape::kSlots * Shape::kVecs; idx += kAttentionThreads) {
    const uint32_t slot = idx / Shape::kVecs, at = load / 2 * Shape::kSlots + slot;
    const smem<T> p = tile + Shape::at(slot, idx % Shape::kVecs);
    if ((at < view.shortest && at >= view.highest) || at >= ring.end) continue;
    if (!any_not_finite<T>(load_vec<kVec<T>>(p))) continue;
    store_vec(p, vec<T, kVec<T>>{});
    for (uint32_t row = 0; row < view.item.num_rows; ++row) {
      if (at >= view.start(row) && at < view.limit(row)) atomic_max(view.poison + row, 1u);
    }
  }
}

// Whether some row does not attend to a slot of [first, first + count).
RKSC_DEVICE bool masked(const ItemView& view, uint32_t first, uint32_t count) {
  return first + count > view.shortest || first < view.highest;
}

// Reads the item's rows. Each warp finds the bounds for itself, so the barrier behind is for `rows`, `seen` and `poison` alone.
template <bool kLimited>
RKSC_DEVICE void open_item(const rksc_paged_attention_params& p, ItemView& view) {
  const gptr<const uint32_t> row_order = global<const uint32_t>(p.row_order), kv_lens = global<const uint32_t>(p.kv_lens);
  rksc_attention_item& item = view.item;
  view.window = kLimited ? p.window : 0;
  uint32_t longest = 0, shortest = item.num_slots, lowest = item.num_slots, highest = 0;
  for (uint32_t row = threadIdx.x % 32; row < item.num_rows; row += 32) {
    const uint32_t kv_len = kv_lens[item.row_start + row];
    const uint32_t seen = kv_len > item.slot_start ? kv_len - item.slot_start : 0;
    const uint32_t limit = seen < item.num_slots ? seen : item.num_slots;
    longest = limit > longest ? limit : longest;
    shortest = limit < shortest ? limit : shortest;
    if constexpr (kLimited) {
      const uint32_t start = window_start(seen, p.window);
      if (seen > 0) lowest = start < lowest ? start : lowest;
      highest = start > highest ? start : highest;
    }
    if (threadIdx.x < 32) {
      view.seen[row] = seen;
      view.rows[row] = row_order[item.row_start + row];
      view.poison[row] = 0;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const uint32_t a = __shfl_xor_sync(kFullMask, longest, step), b = __shfl_xor_sync(kFullMask, shortest, step);
    longest = a > longest ? a : longest;
    shortest = b < shortest ? b : shortest;
    if constexpr (kLimited) {
      const uint32_t c = __shfl_xor_sync(kFullMask, lowest, step), d = __shfl_xor_sync(kFullMask, highest, step);
      lowest = c < lowest ? c : lowest;
      highest = d > highest ? d : highest;
    }
  }
  view.skipped = 0;
  if constexpr (kLimited) {
    // Whole tiles, and nothing of an item that no row attends to.
    view.skipped = lowest < longest ? lowest / RKSC_TILE_SLOTS * RKSC_TILE_SLOTS : item.num_slots;
    item.slot_start += view.skipped;
    item.num_slots -= view.skipped;
    item.block_start += view.skipped / p.block_size;
  }
  const auto left = [&view](uint32_t slots) { return slots > view.skipped ? slots - view.skipped : 0; };
  view.end = left(longest);
  view.shortest = left(shortest);
  view.highest = left(highest);
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
    const uint64_t at = view.partial(query, p.num_q_heads);
    store_vec(global<float>(p.partial_o) + (at * dim + elem), out);
    if (elem == 0) store_vec(global<float>(p.partial_ml) + at * 2, vec<float, 2>{{state.max, state.sum}});
  }
}

// The partials of an item that none of its rows attends to: the merge reads no outputs of weight 0.
RKSC_DEVICE void emit_nothing(const rksc_paged_attention_params& p, const ItemView& view) {
  for (uint32_t query = threadIdx.x; query < view.num_queries; query += kAttentionThreads) {
    const uint64_t at = view.partial(query, p.num_q_heads);
    store_vec(global<float>(p.partial_ml) + at * 2, vec<float, 2>{{-INFINITY, 0.0f}});
  }
}

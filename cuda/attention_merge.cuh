// attention_merge.cuh -- the merge of a row group's partial results in paged_attention, by the last of its items to arrive.
#pragma once

#include "attention.cuh"

// Items of a group whose weights are held at once.
constexpr uint32_t kMergeItems = 16;

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

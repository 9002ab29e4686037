// paged_attention.cu -- attention of every row over the slots its plan names: prefill, decode and shared segments in one launch.
//
// Formula   o[t,h] = sum_j p_j v_j / sum_j p_j,  p_j = exp(s_j - max),  lse[t,h] = ln sum_j exp(s_j),  over the row's window of slots;
//           s_j = sm_scale q[t,h] k_j or, capped, softcap tanh(sm_scale q[t,h] k_j / softcap)
// Args      see rksc_paged_attention_params
//   q, o    [T, Hq, D]                       T    read once per item / written once
//   k, v    [num_blocks, Hkv, block_size, D] T    an item's slots are read once, whatever the number of rows that share them
//   lse     [T, Hq]                          f32  written
//   items   [max_items]                           (rows) x (slots) for all kv heads; partials: [partials, Hq, D] + [.., 2] f32
//
// Work      CTA = (item, kv head), 4 warps, up to 64 queries = rows x group; surplus CTAs return. Tiles of 64 slots come through a ring
//           of 4 shared buffers (K 0, V 0, K 1, ...), three loads ahead of use. The warps divide queries x slots at run time: up to 16
//           queries 1 x 4 (each warp a quarter of the slots of a tile), up to 32 2 x 2, else 4 x 1. So a decode row without company
//           keeps four warps busy, and a full query tile wastes nothing. Warps with the same queries merge in shared memory.
//           A group with several items: each writes partials, the last to arrive merges them in item order. With a window an item
//           begins at the first tile that one of its rows attends to; one without any says so, and its outputs are not merged.
//           f32: CUDA cores, see paged_attention_f32.cuh.
// Numerics  scores f32, from the tensor cores unscaled; the scale and log2(e) are folded into one fused multiply-add before exp2. P is
//           rounded to T unnormalised; its sum is taken in f32 before rounding. o is normalised and rounded once. The order of
//           every sum is fixed by the plan. Slots past a row's kv_len or below its window have weight 0 and their V is not looked at:
//           it may be NaN. Windows and caps are kernels of their own (kLimited), so that the others have no part in them.
//           A row without slots: o = 0, lse = -inf.
// Traffic   2 * sum over items of slots from that tile on * Hkv * D * sizeof(T), + 2 T Hq D sizeof(T), + 2 * 4 * partials Hq (D + 2).
// Bound     decode: memory (2 flops per byte and query that shares). Prefill and wide sharing: tensor cores.
// Limits    D of 32, 64, 80, 96, 128, 256; block_size 16 or 32; Hq % Hkv == 0; group <= 64; sm_scale > 0; softcap >= 0; 16-byte aligned buffers.
// Oracle    testing::attention.   Bench  rksc-run bench kernels --op paged_attention
#include "attention_merge.cuh"
#include "paged_attention_f32.cuh"

namespace {

// ---- tensor cores ------------------------------------------------------------------------------------------------

// Where a warp stands in its CTA's tile: queries [16 tile, + 16), slots [part, part + 1) of `parts` equal parts.
struct WarpPlace {
  uint32_t tile, part, parts;
};

RKSC_DEVICE WarpPlace warp_place(uint32_t num_queries) {
  const uint32_t parts = num_queries <= 16 ? 4 : num_queries <= 32 ? 2 : 1;
  const uint32_t warp = threadIdx.x / 32;
  return {warp / parts, warp % parts, parts};
}

// The warps' states at the end: [4][16][kDumpStride] outputs, then [4][16][2] maxima and sums. The 8 floats between rows keep the
// 8-byte stores of a half warp in different banks.
template <int kHeadDim>
constexpr uint32_t kDumpStride = kHeadDim + 8;
template <int kHeadDim>
constexpr uint32_t kDumpBytes = 64 * (kDumpStride<kHeadDim> + 2) * 4;

// A warp's 16 queries against its share of a tile: 16 * kChunks slots. Lane: queries g and g + 8, in the layout of FragC.
template <typename T, int kHeadDim, int kChunks>
struct WarpAttention {
  using Shape = TileShape<T, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  FragC out[kHeadDim / 8];
  float max[2], sum[2];  // sums of this lane's columns
  FragA q[Shape::kQueryInRegisters ? kSteps : 1];
  uint32_t p[kChunks][4];

  RKSC_DEVICE void load_query(FragA& a, smem<const T> query, uint32_t tile, int step) const {
    const uint32_t lane = threadIdx.x % 32;
    ldmatrix_x4<T>(a.r, query + Shape::at(tile * 16 + lane % 16, 2 * step + lane / 16));
  }

  RKSC_DEVICE void begin(smem<const T> query, uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) out[i] = FragC{};
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
    if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query(q[step], query, tile, step);
    }
  }

  RKSC_DEVICE void scores(FragC (&s)[2 * kChunks], smem<const T> query, uint32_t tile, smem<const T> k, uint32_t first_slot) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) s[i] = FragC{};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      FragA a;
      if constexpr (Shape::kQueryInRegisters) {
        a = q[step];
      } else {
        load_query(a, query, tile, step);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        uint32_t r[4];
        const uint32_t slot = first_slot + c * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4<T>(r, k + Shape::at(slot, 2 * step + lane / 8 % 2));
        mma_m16n8k16<T>(s[2 * c], a, FragB{{r[0], r[1]}});
        mma_m16n8k16<T>(s[2 * c + 1], a, FragB{{r[2], r[3]}});
      }
    }
  }

  RKSC_DEVICE static void cap(FragC (&s)[2 * kChunks], ScoreScale scale) {
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i].v[e] = scale.cap(s[i].v[e]);
    }
  }

  // Leaves the slots out that queries g and g + 8 do not attend to: those of the warp's share from `limit` on, and those below `start`.
  template <bool kLimited>
  RKSC_DEVICE static void mask(FragC (&s)[2 * kChunks], const uint32_t (&start)[2], const uint32_t (&limit)[2]) {
    const uint32_t column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t slot = column + i * 8 + e % 2;
        if (slot >= limit[e / 2] || (kLimited && slot < start[e / 2])) s[i].v[e] = -INFINITY;
      }
    }
  }

  // Scores to weights in p, and the state to its new maximum.
  RKSC_DEVICE void softmax(FragC (&s)[2 * kChunks], float scale) {
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = s[0].v[2 * half];
#pragma unroll
      for (int i = 0; i < 2 * kChunks; ++i) top = fmaxf(top, fmaxf(s[i].v[2 * half], s[i].v[2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      const float now = fmaxf(max[half], top * scale);
      // Nothing seen yet: weights 2^-inf = 0 against any finite number.
      const float shift = now == -INFINITY ? 0.0f : now;
      alpha[half] = exp2_fast(max[half] - shift);
      max[half] = now;
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * kChunks; ++i) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[i].v[e] = exp2_fast(fmaf(s[i].v[e], scale, -shift));
          part += s[i].v[e];
        }
      }
      sum[half] = sum[half] * alpha[half] + part;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const FragC& from = s[2 * c + e / 2];
        p[c][e] = pack2<T>(from.v[e % 2 * 2], from.v[e % 2 * 2 + 1]);
      }
    }
    // After the first tiles the maximum seldom moves.
    if (__any_sync(kFullMask, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i].v[e] *= alpha[e / 2];
      }
    }
  }

  RKSC_DEVICE void mix(smem<const T> v, uint32_t first_slot) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const FragA a{{p[c][0], p[c][1], p[c][2], p[c][3]}};
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t r[4];
        ldmatrix_x4_trans<T>(r, v + Shape::at(first_slot + c * 16 + lane % 16, 2 * n + lane / 16));
        mma_m16n8k16<T>(out[2 * n], a, FragB{{r[0], r[1]}});
        mma_m16n8k16<T>(out[2 * n + 1], a, FragB{{r[2], r[3]}});
      }
    }
  }

  RKSC_DEVICE void dump(smem<float> memory) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const smem<float> states = memory + 64 * kDumpStride<kHeadDim>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = warp * 16 + lane / 4 + half * 8;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        store_vec(memory + (row * kDumpStride<kHeadDim> + i * 8 + lane % 4 * 2),
                  vec<float, 2>{{out[i].v[2 * half], out[i].v[2 * half + 1]}});
      }
      float total = sum[half];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
      if (lane % 4 == 0) store_vec(states + row * 2, vec<float, 2>{{max[half], total}});
    }
  }
};

// All tiles of the item; leaves the warps' states in shared memory, behind a barrier.
template <typename T, int kHeadDim, int kChunks, bool kLimited>
RKSC_DEVICE void attend(KvRing<T, kHeadDim>& ring, const ItemView& view, WarpPlace place, smem<const T> query, ScoreScale scale,
                        smem<float> dump) {
  using Shape = TileShape<T, kHeadDim>;
  WarpAttention<T, kHeadDim, kChunks> warp;
  const bool any = place.tile * 16 < view.num_queries;
  uint32_t starts[2] = {0, 0}, limits[2] = {0, 0};
  uint32_t longest = 0;
  if (any) {
    // Queries past the last are zero vectors with its limit: computed, not written.
    const uint32_t last = view.num_queries - 1, query0 = place.tile * 16 + threadIdx.x % 32 / 4, query1 = query0 + 8;
    const uint32_t row0 = (query0 < last ? query0 : last) / view.group, row1 = (query1 < last ? query1 : last) / view.group;
    starts[0] = view.start(row0);
    starts[1] = view.start(row1);
    limits[0] = view.limit(row0);
    limits[1] = view.limit(row1);
    longest = limits[0] > limits[1] ? limits[0] : limits[1];
  }
#pragma unroll
  for (int step = 16; step > 2; step >>= 1) {
    const uint32_t other = __shfl_xor_sync(kFullMask, longest, step);
    longest = other > longest ? other : longest;
  }
  warp.begin(query, any ? place.tile : 0);
  const uint32_t num_tiles = ring.num_tiles();
  const uint32_t share = place.part * kChunks * 16;
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    const uint32_t first = tile * RKSC_TILE_SLOTS + share;
    // A warp whose queries attend to none of its slots has nothing to add.
    const bool active = any && first < longest;
    // K of this tile has landed for everybody, and everybody is done with the buffer that the next load goes to.
    cp_async_wait<Shape::kBuffers - 2>();
    __syncthreads();
    ring.issue(2 * tile + Shape::kBuffers - 1);
    if (active) {
      FragC s[2 * kChunks];
      warp.scores(s, query, place.tile, ring.buffer(2 * tile), share);
      if constexpr (kLimited) warp.cap(s, scale);
      if (masked(view, first, kChunks * 16)) {
        const auto left = [first](uint32_t slot) { return slot > first ? slot - first : 0; };
        warp.template mask<kLimited>(s, {left(starts[0]), left(starts[1])}, {left(limits[0]), left(limits[1])});
      }
      warp.softmax(s, scale.factor);
    }
    // The same for V.
    cp_async_wait<Shape::kBuffers - 2>();
    if (masked(view, tile * RKSC_TILE_SLOTS, RKSC_TILE_SLOTS)) scrub(ring, 2 * tile + 1, view);
    __syncthreads();
    ring.issue(2 * tile + Shape::kBuffers);
    if (active) warp.mix(ring.buffer(2 * tile + 1), share);
  }
  // The states take the place of the tiles.
  cp_async_wait<0>();
  __syncthreads();
  warp.dump(dump);
  __syncthreads();
}

// Joins what the warps found for each query, in the order of their slots, and hands it on.
template <typename T, int kHeadDim>
RKSC_DEVICE void join_warps(const rksc_paged_attention_params& p, const ItemView& view, uint32_t parts, smem<const float> dump) {
  constexpr uint32_t kQuads = kHeadDim / 4;
  const smem<const float> states = dump + 64 * kDumpStride<kHeadDim>;
  for (uint32_t unit = threadIdx.x; unit < view.num_queries * kQuads; unit += kAttentionThreads) {
    const uint32_t query = unit / kQuads, elem = unit % kQuads * 4;
    const uint32_t first = query / 16 * parts * 16 + query % 16;
    AttnState joint{-INFINITY, 0.0f};
    for (uint32_t i = 0; i < parts; ++i) {
      const float max = states[(first + i * 16) * 2];
      joint.max = fmaxf(joint.max, max);
    }
    vec<float, 4> out{};
    for (uint32_t i = 0; i < parts; ++i) {
      const uint32_t row = first + i * 16;
      const vec<float, 2> state = load_vec<2>(states + row * 2);
      const vec<float, 4> part = load_vec<4>(dump + (row * kDumpStride<kHeadDim> + elem));
      const float weight = attn_weight(state[0], joint.max);
      joint.sum += weight * state[1];
#pragma unroll
      for (int e = 0; e < 4; ++e) out[e] += weight * part[e];
    }
    emit<T>(p, view, query, elem, out, joint);
  }
}

template <typename T, int kHeadDim, bool kLimited>
RKSC_DEVICE void run_item(const rksc_paged_attention_params& p, const ItemView& view, KvRing<T, kHeadDim>& ring) {
  using Shape = TileShape<T, kHeadDim>;
  // The queries pass through the buffer that is filled last, or stay behind the ring.
  const smem<T> query = ring.memory + (Shape::kQueryInRegisters ? Shape::kBuffers - 1 : Shape::kBuffers) * Shape::kElems;
  const WarpPlace place = warp_place(view.num_queries);
  for (uint32_t idx = threadIdx.x; idx < div_up_device(view.num_queries, 16) * 16 * Shape::kVecs; idx += kAttentionThreads) {
    const uint32_t i = idx / Shape::kVecs, c = idx % Shape::kVecs;
    const bool valid = i < view.num_queries;
    const uint64_t at = valid ? view.output(i, p.num_q_heads) : 0;
    cp_async_16<T>(query + Shape::at(i, c), global<const T>(p.q) + (at * kHeadDim + c * kVec<T>), valid);
  }
  cp_async_commit();
#pragma unroll 1
  for (uint32_t load = 0; load < Shape::kBuffers - 1; ++load) ring.issue(load);
  cp_async_wait<Shape::kBuffers - 1>();
  __syncthreads();
  const smem<float> dump = dynamic_shared<float>(0);
  const ScoreScale scale = ScoreScale::make(p.sm_scale, kLimited ? p.softcap : 0.0f);
  if (place.parts == 4) {
    attend<T, kHeadDim, 1, kLimited>(ring, view, place, query, scale, dump);
  } else if (place.parts == 2) {
    attend<T, kHeadDim, 2, kLimited>(ring, view, place, query, scale, dump);
  } else {
    attend<T, kHeadDim, 4, kLimited>(ring, view, place, query, scale, dump);
  }
  join_warps<T, kHeadDim>(p, view, place.parts, dump);
}

// ---- kernel ------------------------------------------------------------------------------------------------------

template <typename T, int kHeadDim>
constexpr uint32_t shared_bytes() {
  uint32_t bytes = TileShape<T, kHeadDim>::kRingBytes;
  if (TileShape<T, kHeadDim>::kTensor) {
    bytes = bytes > kDumpBytes<kHeadDim> ? bytes : kDumpBytes<kHeadDim>;
  } else {
    bytes += 4 * kF32Queries * kF32Slots * 4;
  }
  return bytes > kMergeBytes<kHeadDim> ? bytes : kMergeBytes<kHeadDim>;
}
// What sm_86, sm_89 and sm_120 give a CTA, less the static part.
static_assert(shared_bytes<bf16, 256>() + 1792 <= 99 * 1024 && shared_bytes<float, 256>() + 1792 <= 99 * 1024);

// CTAs that fit an SM by shared memory on the larger GPUs; bounds the registers (65536 / (128 * n)).
template <typename T, int kHeadDim>
constexpr int kCtasPerSm = sizeof(T) == 4 ? 2 : kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2;

// Opens the ring of K and V and runs the item.
template <typename T, int kHeadDim, bool kLimited>
RKSC_DEVICE void attend_item(const rksc_paged_attention_params& p, const ItemView& view) {
  KvRing<T, kHeadDim> ring;
  ring.memory = dynamic_shared<T>(0);
  ring.k = KvView<T>::make(p.k_cache, p.num_kv_heads, view.head, p.block_size, kHeadDim);
  ring.v = KvView<T>::make(p.v_cache, p.num_kv_heads, view.head, p.block_size, kHeadDim);
  ring.blocks = global<const uint32_t>(p.blocks) + view.item.block_start;
  ring.block_shift = p.block_size == 16 ? 4 : 5;
  ring.end = view.end;
  ring.begin();
  __syncthreads();
  if constexpr (TileShape<T, kHeadDim>::kTensor) {
    run_item<T, kHeadDim, kLimited>(p, view, ring);
  } else {
    run_item_f32<kHeadDim, kLimited>(p, view, ring);
  }
}

// kLimited: with a window, a cap, or both.
template <typename T, int kHeadDim, bool kLimited>
__global__ void __launch_bounds__(kAttentionThreads, kCtasPerSm<T, kHeadDim>)
    paged_attention_kernel(const __grid_constant__ rksc_paged_attention_params p) {
  RKSC_SHARED(uint32_t, rows, RKSC_ATTENTION_MAX_ROWS);
  RKSC_SHARED(uint32_t, seen, RKSC_ATTENTION_MAX_ROWS);
  RKSC_SHARED(uint32_t, poison, RKSC_ATTENTION_MAX_ROWS);
  RKSC_SHARED(uint32_t, arrived_last, 1);
  RKSC_SHARED(uint32_t, table, 3 * kMergeItems);
  RKSC_SHARED(float, states, 3 * RKSC_ATTENTION_MAX_ROWS);

  // Both loads are under way at once; an item past the last is allocated, and not used.
  const uint32_t num_items = global<const uint32_t>(p.num_items)[0];
  ItemView view;
  view.index = blockIdx.x / p.num_kv_heads;
  view.head = blockIdx.x % p.num_kv_heads;
  view.item = global<const rksc_attention_item>(p.items)[view.index];
  if (view.index >= num_items) return;
  view.group = p.num_q_heads / p.num_kv_heads;
  view.num_queries = view.item.num_rows * view.group;
  view.rows = rows;
  view.seen = seen;
  view.poison = poison;
  open_item<kLimited>(p, view);

  if (kLimited && view.end == 0 && view.item.partial_start != RKSC_NO_PARTIAL) {
    emit_nothing(p, view);
  } else {
    attend_item<T, kHeadDim, kLimited>(p, view);
  }
  if (view.item.partial_start == RKSC_NO_PARTIAL) return;

  const rksc_attention_group group = global<const rksc_attention_group>(p.groups)[view.item.group];
  if (!arrive_last(p, view, group.num_items, arrived_last)) return;
  MergeMemory mem;
  mem.first = table;
  mem.count = table + kMergeItems;
  mem.partial = table + 2 * kMergeItems;
  mem.rows = rows;
  mem.max = states;
  mem.sum = states + RKSC_ATTENTION_MAX_ROWS;
  mem.alpha = states + 2 * RKSC_ATTENTION_MAX_ROWS;
  mem.weights = dynamic_shared<float>(0);
  mem.sums = mem.weights + RKSC_ATTENTION_MAX_ROWS * kMergeItems;
  mem.out = mem.sums + RKSC_ATTENTION_MAX_ROWS * kMergeItems;
  merge_group<T, kHeadDim>(p, mem, group, view.head, view.group);
}

}  // namespace

// ---- launcher ----------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(paged_attention)(const rksc_paged_attention_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->num_kv_heads > 0 && p->num_q_heads % p->num_kv_heads == 0);
  RKSC_REQUIRE(p->num_q_heads / p->num_kv_heads <= RKSC_ATTENTION_MAX_ROWS);
  RKSC_REQUIRE(p->block_size == 16 || p->block_size == 32);
  RKSC_REQUIRE(p->sm_scale > 0.0f && p->softcap >= 0.0f && p->softcap < INFINITY);
  RKSC_REQUIRE(static_cast<uint64_t>(p->max_items) * p->num_kv_heads < (1ull << 31));
  if (p->max_items == 0) return 0;
  const bool limited = p->window != 0 || p->softcap > 0.0f;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    return RKSC_DISPATCH_HEAD_DIM(p->head_dim, kHeadDim, [&] {
      const auto kernel = limited ? paged_attention_kernel<T, kHeadDim, true> : paged_attention_kernel<T, kHeadDim, false>;
      return launch(kernel, dim3(p->max_items * p->num_kv_heads), dim3(kAttentionThreads),
                    shared_bytes<T, kHeadDim>(), stream, *p);
    });
  });
}

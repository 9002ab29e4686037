// paged_attention_f32.cuh -- the part of paged_attention that works on f32, without tensor cores: an item's queries 16 at a time, 4 to
// a warp, past its tiles of 32 slots. Scores: lane = slot. PV: lane = four elements of D, for narrow heads several queries side by side.
#pragma once

#include "attention.cuh"

constexpr uint32_t kF32Queries = 4;  // of a warp
constexpr uint32_t kF32Slots = RKSC_TILE_SLOTS / 2;

// A warp's queries and what they have seen so far.
template <int kHeadDim, bool kLimited>
struct WarpAttentionF32 {
  using Shape = TileShape<float, kHeadDim>;
  static constexpr uint32_t kQuads = kHeadDim / 4;
  static constexpr uint32_t kLanes = kQuads > 16 ? 32 : kQuads;             // lanes to a query in PV
  static constexpr uint32_t kOwn = kF32Queries * kLanes / 32;               // queries of a lane there
  static constexpr uint32_t kPieces = (kQuads + 31) / 32;                   // quads of a lane and query
  uint32_t limits[kF32Queries], starts[kLimited ? kF32Queries : 1];
  float max[kF32Queries], sum[kF32Queries];  // sums of this lane's slots
  vec<float, 4> out[kOwn][kPieces];

  // The first of this lane's queries in PV.
  RKSC_DEVICE static uint32_t own() { return threadIdx.x % 32 / kLanes * kOwn; }
  // x[i] without an index at run time, which would put x into local memory.
  RKSC_DEVICE static float pick(const float (&x)[kF32Queries], uint32_t i) {
    return i == 0 ? x[0] : i == 1 ? x[1] : i == 2 ? x[2] : x[3];
  }

  RKSC_DEVICE void begin(const ItemView& view, uint32_t first_query) {
#pragma unroll
    for (uint32_t r = 0; r < kF32Queries; ++r) {
      // Queries past the last are zero vectors with its limit: computed, not written.
      const uint32_t last = view.num_queries - 1, query = first_query + r < last ? first_query + r : last;
      limits[r] = view.limit(query / view.group);
      if constexpr (kLimited) starts[r] = view.start(query / view.group);
      max[r] = -INFINITY;
      sum[r] = 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < kOwn; ++i) {
#pragma unroll
      for (uint32_t piece = 0; piece < kPieces; ++piece) out[i][piece] = vec<float, 4>{};
    }
  }

  // Weights of the tile at `first_slot` to `weights`, [slot][query]: every lane needs all of them. alpha: factors for `out`.
  RKSC_DEVICE void weigh(smem<const float> query, smem<const float> k, smem<float> weights, uint32_t first_slot, ScoreScale scale,
                         float (&alpha)[kF32Queries]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    vec<float, 4> s[kF32Queries] = {};  // four partial sums: shorter chains, smaller error
    for (uint32_t c = 0; c < kQuads; ++c) {
      const vec<float, 4> x = load_vec<4>(k + Shape::at(lane, c));
#pragma unroll
      for (uint32_t r = 0; r < kF32Queries; ++r) {
        const vec<float, 4> y = load_vec<4>(query + Shape::at(warp * kF32Queries + r, c));
#pragma unroll
        for (int e = 0; e < 4; ++e) s[r][e] = fmaf(x[e], y[e], s[r][e]);
      }
    }
    vec<float, kF32Queries> w;
#pragma unroll
    for (uint32_t r = 0; r < kF32Queries; ++r) {
      float product = (s[r][0] + s[r][1]) + (s[r][2] + s[r][3]);
      bool attended = first_slot + lane < limits[r];
      if constexpr (kLimited) {
        product = scale.cap(product);
        attended = attended && first_slot + lane >= starts[r];
      }
      const float x = attended ? product * scale.factor : -INFINITY;
      const float now = fmaxf(max[r], warp_max(x));
      // Nothing seen yet: weights 2^-inf = 0 against any finite number.
      const float shift = now == -INFINITY ? 0.0f : now;
      alpha[r] = exp2_fast(max[r] - shift);
      w[r] = exp2_fast(x - shift);
      max[r] = now;
      sum[r] = sum[r] * alpha[r] + w[r];
    }
    store_vec(weights + lane * kF32Queries, w);
    __syncwarp();
  }

  RKSC_DEVICE void mix(smem<const float> v, smem<const float> weights, const float (&alpha)[kF32Queries]) {
#pragma unroll
    for (uint32_t i = 0; i < kOwn; ++i) {
      const float a = kOwn == kF32Queries ? alpha[i] : pick(alpha, own() + i);
#pragma unroll
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][piece][e] *= a;
      }
    }
    for (uint32_t slot = 0; slot < kF32Slots; ++slot) {
      const vec<float, kOwn> w = load_vec<kOwn>(weights + (slot * kF32Queries + own()));
#pragma unroll
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        const uint32_t quad = threadIdx.x % kLanes + piece * 32;
        if (quad >= kQuads) continue;
        const vec<float, 4> x = load_vec<4>(v + Shape::at(slot, quad));
#pragma unroll
        for (uint32_t i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[i][piece][e] = fmaf(w[i], x[e], out[i][piece][e]);
        }
      }
    }
    // The next tile's weights take the place of these.
    __syncwarp();
  }

  RKSC_DEVICE void finish(const rksc_paged_attention_params& p, const ItemView& view, uint32_t first_query) {
#pragma unroll
    for (uint32_t r = 0; r < kF32Queries; ++r) sum[r] = warp_sum(sum[r]);
#pragma unroll
    for (uint32_t i = 0; i < kOwn; ++i) {
      const uint32_t r = own() + i;
      if (first_query + r >= view.num_queries) continue;
      const AttnState state{pick(max, r), pick(sum, r)};
#pragma unroll
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        const uint32_t quad = threadIdx.x % kLanes + piece * 32;
        if (quad < kQuads) emit<float>(p, view, first_query + r, quad * 4, out[i][piece], state);
      }
    }
  }
};

template <int kHeadDim, bool kLimited>
RKSC_DEVICE void run_item_f32(const rksc_paged_attention_params& p, const ItemView& view, KvRing<float, kHeadDim>& ring) {
  using Shape = TileShape<float, kHeadDim>;
  const uint32_t warp = threadIdx.x / 32;
  const ScoreScale scale = ScoreScale::make(p.sm_scale, kLimited ? p.softcap : 0.0f);
  const smem<float> query = ring.memory + Shape::kBuffers * Shape::kElems;
  const smem<float> weights = query + (Shape::kQueries * Shape::kStride + warp * kF32Queries * kF32Slots);
  for (uint32_t first = 0; first < view.num_queries; first += Shape::kQueries) {
    for (uint32_t idx = threadIdx.x; idx < Shape::kQueries * Shape::kVecs; idx += kAttentionThreads) {
      const uint32_t i = idx / Shape::kVecs, c = idx % Shape::kVecs;
      const bool valid = first + i < view.num_queries;
      const uint64_t at = valid ? view.output(first + i, p.num_q_heads) : 0;
      cp_async_16<float>(query + Shape::at(i, c), global<const float>(p.q) + (at * kHeadDim + c * 4), valid);
    }
    cp_async_commit();
    ring.begin();
    ring.issue(0);
    WarpAttentionF32<kHeadDim, kLimited> state;
    state.begin(view, first + warp * kF32Queries);
    const uint32_t num_tiles = ring.num_tiles();
    for (uint32_t tile = 0; tile < num_tiles; ++tile) {
      float alpha[kF32Queries];
      // K has landed for everybody, and everybody is done with the V before, whose buffer the next V goes to.
      cp_async_wait<0>();
      __syncthreads();
      ring.issue(2 * tile + 1);
      state.weigh(query, ring.buffer(2 * tile), weights, tile * kF32Slots, scale, alpha);
      // The same for V, and the next K.
      cp_async_wait<0>();
      if (masked(view, tile * kF32Slots, kF32Slots)) scrub(ring, 2 * tile + 1, view);
      __syncthreads();
      ring.issue(2 * tile + 2);
      state.mix(ring.buffer(2 * tile + 1), weights, alpha);
    }
    state.finish(p, view, first + warp * kF32Queries);
    // The next pass loads over these queries and tiles.
    cp_async_wait<0>();
    __syncthreads();
  }
}

// attention_mass.cu -- how much attention each slot of a sequence received from the sequence's rows of this step.
//
// Formula   mass[h, j] = sum over rows t that attend to slot j, and query heads of kv head h, of exp(s_j - lse);
//           s_j = sm_scale q k_j or, capped, softcap tanh(sm_scale q k_j / softcap)
// Args      see rksc_attention_mass_params
//   q       [T, Hq, D]                        T    read once per tile of slots
//   k       [num_blocks, Hkv, block_size, D]  T    read once
//   lse     [T, Hq]                           f32  read once per tile of slots
//   mass    per sequence [Hkv, kv_len]        f32  written
//
// Work      CTA = (64 slots, kv head, sequence); K of the tile stays in shared memory while the queries pass, 16 at a time. Thread:
//           one slot, four queries at once, one of two interleaved halves of the passes' queries; the halves join at the end.
// Numerics  f32 throughout; a slot's sum runs over queries in order, within each half. Rows before the first that attends to a tile are
//           passed over, as are those from the first on that has left it behind; a slot that a row does not attend to may be NaN.
// Traffic   Hkv * kv_len * D * sizeof(T) of K, of the tiles that some row attends to; the queries again for every tile, from L2.
// Bound     decode: memory. Long chunks: f32 arithmetic (an op for compression and reports, not for every step).
// Limits    D % 8 == 0, D <= 256; block_size 16 or 32; Hq % Hkv == 0; 16-byte aligned q and k; at most 65535 sequences and heads.
// Oracle    testing::attention.   Bench  rksc-run bench kernels --op attention_mass
#include "attention.cuh"

namespace {

constexpr uint32_t kSlots = RKSC_TILE_SLOTS;
constexpr uint32_t kPass = 16;  // queries in shared memory at once
constexpr uint32_t kHalves = kAttentionThreads / kSlots;
constexpr uint32_t kQueries = kPass / kHalves;  // of a pass, of one half
constexpr uint32_t kTogether = 4;

// Elements between rows: 16 bytes more than D, as in TileShape.
template <typename T>
RKSC_DEVICE uint32_t row_stride(uint32_t head_dim) {
  return head_dim + kVec<T>;
}

// Dot products of one slot with kTogether queries.
template <typename T>
RKSC_DEVICE void dots(float (&s)[kTogether], smem<const T> k, smem<const T> q, uint32_t head_dim) {
  const uint32_t stride = row_stride<T>(head_dim);
#pragma unroll
  for (uint32_t i = 0; i < kTogether; ++i) s[i] = 0.0f;
  for (uint32_t at = 0; at < head_dim; at += kVec<T>) {
    const vec<T, kVec<T>> x = load_vec<kVec<T>>(k + at);
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      const vec<T, kVec<T>> y = load_vec<kVec<T>>(q + (i * stride + at));
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) s[i] = fmaf(to_float(x[e]), to_float(y[e]), s[i]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_mass_kernel(const __grid_constant__ rksc_attention_mass_params p) {
  RKSC_SHARED(float, lse, kPass);
  RKSC_SHARED(uint32_t, limits, kPass);
  RKSC_SHARED(float, halves, kSlots);
  const rksc_mass_sequence sequence = global<const rksc_mass_sequence>(p.sequences)[blockIdx.z];
  const uint32_t head = blockIdx.y, first_slot = blockIdx.x * kSlots;
  if (first_slot >= sequence.kv_len) return;
  const uint32_t dim = p.head_dim, stride = row_stride<T>(dim), vecs = dim / kVec<T>, group = p.num_q_heads / p.num_kv_heads;
  const uint32_t left = sequence.kv_len - first_slot, num_slots = left < kSlots ? left : kSlots;
  const smem<T> k = dynamic_shared<T>(0), q = k + kSlots * stride;
  const KvView<T> cache = KvView<T>::make(p.k_cache, p.num_kv_heads, head, p.block_size, dim);
  const gptr<const uint32_t> blocks = global<const uint32_t>(p.blocks) + sequence.block_start;

  // Row i sees kv_len - (num_rows - 1 - i) slots.
  const uint32_t shortest = sequence.kv_len - (sequence.num_rows - 1);
  const uint32_t first_row = first_slot >= shortest ? first_slot + 1 - shortest : 0;
  uint32_t num_rows = sequence.num_rows;
  if (p.window != 0) {
    // A row that sees so many slots has left the tile behind.
    const uint64_t past = static_cast<uint64_t>(first_slot) + num_slots + p.window;
    const uint64_t rows = past > shortest ? past - shortest : 0;
    num_rows = rows < num_rows ? static_cast<uint32_t>(rows) : num_rows;
  }
  if (first_row < num_rows) {
    for (uint32_t idx = threadIdx.x; idx < kSlots * vecs; idx += kAttentionThreads) {
      const uint32_t slot = idx / vecs, c = idx % vecs, at = first_slot + slot;
      const bool valid = slot < num_slots;
      uint32_t block = 0;
      if (valid) block = blocks[at / p.block_size];
      cp_async_16<T>(k + (slot * stride + c * kVec<T>), cache.at(block, at % p.block_size * dim + c * kVec<T>), valid);
    }
    cp_async_commit();
  }

  const uint32_t slot = threadIdx.x % kSlots, half = threadIdx.x / kSlots;
  const uint32_t num_queries = num_rows * group;
  const ScoreScale scale = ScoreScale::make(p.sm_scale, p.softcap);
  float mass = 0.0f;
  for (uint32_t start = first_row * group; start < num_queries; start += kPass) {
    for (uint32_t idx = threadIdx.x; idx < kPass * vecs; idx += kAttentionThreads) {
      const uint32_t i = idx / vecs, c = idx % vecs;
      const bool valid = start + i < num_queries;
      const uint32_t query = valid ? start + i : 0;
      const uint64_t at = static_cast<uint64_t>(sequence.row_start + query / group) * p.num_q_heads + head * group + query % group;
      cp_async_16<T>(q + (i * stride + c * kVec<T>), global<const T>(p.q) + (at * dim + c * kVec<T>), valid);
    }
    cp_async_commit();
    if (threadIdx.x < kPass) {
      const uint32_t query = start + threadIdx.x;
      const bool valid = query < num_queries;
      float x = 0.0f;
      if (valid) {
        const uint64_t at = static_cast<uint64_t>(sequence.row_start + query / group) * p.num_q_heads + head * group + query % group;
        x = global<const float>(p.lse)[at];
      }
      lse[threadIdx.x] = x * kLog2e;
      limits[threadIdx.x] = valid ? shortest + query / group : 0;
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kQueries; i += kTogether) {
      const uint32_t first = half * kQueries + i;
      float s[kTogether];
      dots<T>(s, k + slot * stride, q + first * stride, dim);
#pragma unroll
      for (uint32_t a = 0; a < kTogether; ++a) {
        const float base = lse[first + a];
        const uint32_t limit = limits[first + a];
        const bool attended = first_slot + slot < limit && first_slot + slot >= window_start(limit, p.window);
        if (attended) mass += exp2_fast(fmaf(scale.cap(s[a]), scale.factor, -base));
      }
    }
    // The next pass overwrites the queries.
    __syncthreads();
  }
  if (half == 1) halves[slot] = mass;
  __syncthreads();
  if (half == 0 && slot < num_slots) {
    const float other = halves[slot];
    const uint64_t at = static_cast<uint64_t>(sequence.mass_start) * p.num_kv_heads + static_cast<uint64_t>(head) * sequence.kv_len;
    global<float>(p.mass)[at + first_slot + slot] = mass + other;
  }
}

static_assert(kHalves == 2, "the join at the end is of two halves");

}  // namespace

// ---- launcher ----------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(attention_mass)(const rksc_attention_mass_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->num_kv_heads > 0 && p->num_q_heads % p->num_kv_heads == 0);
  RKSC_REQUIRE(p->block_size == 16 || p->block_size == 32);
  RKSC_REQUIRE(p->head_dim > 0 && p->head_dim % 8 == 0 && p->head_dim <= 256);
  RKSC_REQUIRE(p->softcap >= 0.0f && p->softcap < INFINITY);
  RKSC_REQUIRE(p->num_sequences <= 65535 && p->num_kv_heads <= 65535);
  if (p->num_sequences == 0 || p->max_kv_len == 0) return 0;
  const dim3 grid(div_up(p->max_kv_len, kSlots), p->num_kv_heads, p->num_sequences);
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    const uint32_t bytes = (kSlots + kPass) * (p->head_dim + kVec<T>) * static_cast<uint32_t>(sizeof(T));
    return launch(attention_mass_kernel<T>, grid, dim3(kAttentionThreads), bytes, stream, *p);
  });
}

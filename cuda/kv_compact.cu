// kv_compact.cu -- moves the slots that compression keeps to the front of a sequence, in place, each kv head its own set.
// Which slots are kept, and that no block is shared with another branch, is the host's business.
#include "common.cuh"

namespace {

constexpr uint32_t kThreads = 256;
// 16-byte vectors of a row that one CTA moves: columns are independent of each other, so a head's rows are cut into slices of
// 64 bytes (two sectors) to have enough CTAs; 2 * Hkv alone would leave most of a GPU idle. Derived, not measured.
constexpr uint32_t kSliceVecs = 4;
constexpr uint32_t kSlotsPerPass = kThreads / kSliceVecs;
// Slots a thread has in flight: 64 bytes a thread, 16 KiB a CTA.
constexpr uint32_t kPasses = 4;

// One slice of the kept rows of K or V of a head.
RKSC_DEVICE void move_rows(const rksc_kv_compact_params& p, gptr<uint32_t> cache, uint32_t head, uint32_t slice,
                           uint32_t row_words) {
  const gptr<const uint32_t> keep = global<const uint32_t>(p.keep) + static_cast<uint64_t>(head) * p.num_keep;
  const gptr<const uint32_t> blocks = global<const uint32_t>(p.blocks);
  const uint32_t word = (slice * kSliceVecs + threadIdx.x % kSliceVecs) * 4;
  const auto offset = [&](uint32_t slot) {
    const uint32_t block = blocks[slot / p.block_size];
    return ((static_cast<uint64_t>(block) * p.num_kv_heads + head) * p.block_size + slot % p.block_size) * row_words + word;
  };
  for (uint32_t base = 0; base < p.num_keep; base += kSlotsPerPass * kPasses) {
    vec<uint32_t, 4> row[kPasses];
    bool moves[kPasses];
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t i = base + pass * kSlotsPerPass + threadIdx.x / kSliceVecs;
      moves[pass] = false;
      if (i < p.num_keep && word < row_words) {
        const uint32_t slot = keep[i];
        moves[pass] = slot != p.first_slot + i;
        if (moves[pass]) row[pass] = load_vec<4>(cache + offset(slot));
      }
    }
    // A target of this tile may be a source of this tile. It is never a source of a later one (keep[i] >= first_slot + i), so
    // the next tile may be read without another barrier.
    __syncthreads();
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t i = base + pass * kSlotsPerPass + threadIdx.x / kSliceVecs;
      if (moves[pass]) store_vec(cache + offset(p.first_slot + i), row[pass]);
    }
  }
}

RKSC_DEVICE void move_positions(const rksc_kv_compact_params& p, uint32_t head) {
  const gptr<const uint32_t> keep = global<const uint32_t>(p.keep) + static_cast<uint64_t>(head) * p.num_keep;
  const gptr<uint32_t> positions = global<uint32_t>(p.positions) + static_cast<uint64_t>(head) * p.capacity;
  for (uint32_t base = 0; base < p.num_keep; base += kThreads * kPasses) {
    uint32_t moved[kPasses];
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t i = base + pass * kThreads + threadIdx.x;
      if (i < p.num_keep) {
        const uint32_t slot = keep[i];
        moved[pass] = positions[slot];
      }
    }
    // As in move_rows.
    __syncthreads();
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t i = base + pass * kThreads + threadIdx.x;
      if (i < p.num_keep) positions[p.first_slot + i] = moved[pass];
    }
  }
}

// kv_compact
//   for i ascending: K[h, first_slot + i] = K[h, keep[h][i]], V and positions alike
//
//   k_cache, v_cache  [num_blocks, Hkv, block_size, D]  dtype  read and written
//   positions         [Hkv, capacity]  u32  read and written, or null
//   blocks            [slots / block_size]  u32  read
//   keep              [Hkv, num_keep]  u32  read; ascending, keep[h][i] >= first_slot + i
//
// Work      CTA = (kv head, K or V, 64 bytes of the row), one more per head for positions; it walks the kept slots in tiles of 256
//           (1024 positions): a thread reads 4 vectors, barrier, writes them.
// Numerics  bits are moved, whatever the type. A row that is in place already is neither read nor written.
// Traffic   4 * Hkv * D * sizeof(T) bytes for each kept slot that moves, 8 * Hkv more with positions.
// Bound     memory, but latency for short lists: 2 * Hkv * D * sizeof(T) / 64 CTAs with 16 KiB in flight each.
// Limits    D * sizeof(T) a multiple of 16; first_slot + num_keep <= capacity; blocks belong to this sequence alone.
// Oracle    testing/kv_compact.rs.   Bench  rksc-run bench kernels --op kv_compact
__global__ void __launch_bounds__(kThreads) kv_compact_kernel(const __grid_constant__ rksc_kv_compact_params p) {
  const uint32_t row_words = p.head_dim * (p.dtype == RKSC_F32 ? 4 : 2) / 4;
  const uint32_t num_slices = div_up_device(row_words, kSliceVecs * 4);
  const uint32_t job = blockIdx.x;
  if (job < num_slices) {
    move_rows(p, global<uint32_t>(p.k_cache), blockIdx.y, job, row_words);
  } else if (job < 2 * num_slices) {
    move_rows(p, global<uint32_t>(p.v_cache), blockIdx.y, job - num_slices, row_words);
  } else {
    move_positions(p, blockIdx.y);
  }
}

}  // namespace

// ---- launchers: check, dispatch, launch, report -------------------------------------------------

extern "C" int32_t RKSC_FN(kv_compact)(const rksc_kv_compact_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype <= RKSC_F16);
  const uint32_t row_bytes = p->head_dim * (p->dtype == RKSC_F32 ? 4 : 2);
  RKSC_REQUIRE(row_bytes > 0 && row_bytes % 16 == 0);
  RKSC_REQUIRE(p->block_size > 0 && p->num_kv_heads <= 65535);
  RKSC_REQUIRE(p->first_slot <= p->capacity && p->num_keep <= p->capacity - p->first_slot);
  if (p->num_keep == 0 || p->num_kv_heads == 0) return 0;
  const uint32_t jobs = 2 * div_up(row_bytes, kSliceVecs * 16) + (p->positions ? 1 : 0);
  return launch(kv_compact_kernel, dim3(jobs, p->num_kv_heads), dim3(kThreads), 0, stream, *p);
}

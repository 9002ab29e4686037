// kv_copy_blocks.cu -- copy-on-write of the heads of KV blocks.
#include "common.cuh"

namespace {

// A block head of 16 slots x 128 x 2 bytes is two vectors for each of them.
constexpr uint32_t kThreads = 128;

// kv_copy_blocks
//   for every copy c, kv head h: cache[c.dst, h, 0 .. c.num_slots) = cache[c.src, h, 0 .. c.num_slots), K and V alike
//
//   copies  [num_copies] {src, dst, num_slots}                            read
//   k_cache, v_cache [num_blocks, num_kv_heads, block_size, head_dim] T   read and write
//
// Work      CTA = (copy, kv head, K or V): one run of neighbours, moved in vectors of kCount words.
// Numerics  exact; destinations are distinct and no source, so the order of CTAs does not matter.
// Traffic   4 * num_slots * num_kv_heads * head_dim * sizeof(T) bytes a copy.
// Bound     memory; at one copy a branch the launch.
// Limits    num_slots <= block_size (larger is cut to it); slots of whole 16-byte vectors take the vector path, others move
//           words or half words.
// Oracle    the slots themselves (tests/kernels/cuda_elementwise.rs).   Bench  rksc-run bench kernels --op kv_copy_blocks
template <typename Word, int kCount>
__global__ void __launch_bounds__(kThreads) kv_copy_blocks_kernel(const __grid_constant__ rksc_kv_copy_blocks_params p) {
  const uint32_t head = blockIdx.x % p.num_kv_heads;
  const rksc_block_copy copy = global<const rksc_block_copy>(p.copies)[blockIdx.x / p.num_kv_heads];
  gptr<Word> cache = global<Word>(blockIdx.y == 0 ? p.k_cache : p.v_cache);
  const uint32_t element_bytes = p.dtype == RKSC_F32 ? 4 : 2;
  const uint32_t slot_words = p.head_dim * element_bytes / static_cast<uint32_t>(sizeof(Word));
  const uint64_t head_words = static_cast<uint64_t>(p.block_size) * slot_words;
  const uint32_t words = (copy.num_slots < p.block_size ? copy.num_slots : p.block_size) * slot_words;
  gptr<const Word> from = cache + (static_cast<uint64_t>(copy.src) * p.num_kv_heads + head) * head_words;
  gptr<Word> to = cache + (static_cast<uint64_t>(copy.dst) * p.num_kv_heads + head) * head_words;
  for (uint32_t i = threadIdx.x * kCount; i < words; i += 2 * kThreads * kCount) {
    // Two loads before the first store, over which the compiler may not move them.
    const uint32_t j = i + kThreads * kCount;
    const vec<Word, kCount> one = load_vec<kCount>(from + i);
    vec<Word, kCount> other = one;
    if (j < words) other = load_vec<kCount>(from + j);
    store_vec(to + i, one);
    if (j < words) store_vec(to + j, other);
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(kv_copy_blocks)(const rksc_kv_copy_blocks_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype == RKSC_F32 || p->dtype == RKSC_BF16 || p->dtype == RKSC_F16);
  RKSC_REQUIRE(p->num_kv_heads > 0 && p->block_size > 0 && p->head_dim > 0);
  if (p->num_copies == 0) return 0;
  const dim3 grid(p->num_copies * p->num_kv_heads, 2);
  const uint32_t slot_bytes = p->head_dim * (p->dtype == RKSC_F32 ? 4 : 2);
  if (slot_bytes % 16 == 0) return launch(kv_copy_blocks_kernel<uint32_t, 4>, grid, dim3(kThreads), 0, stream, *p);
  if (slot_bytes % 4 == 0) return launch(kv_copy_blocks_kernel<uint32_t, 1>, grid, dim3(kThreads), 0, stream, *p);
  return launch(kv_copy_blocks_kernel<uint16_t, 1>, grid, dim3(kThreads), 0, stream, *p);
}

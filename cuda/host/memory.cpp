// memory.cpp -- registered memory and the shadow of global memory.
//
// Global writes are tracked in batches (Batch): a word's shadow names the batch that wrote it last. Another CTA of the launch
// may read or overwrite it only once the batch is published (its lanes fenced, or a later fence by the lane that then did an
// atomic) and the reading thread has acquired (its CTA did an atomic, then fenced). Within a CTA, warps need a barrier between.
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "machine.h"

namespace simt {

Range null_range{0, 0, nullptr, 2, true}, unknown_range{0, 0, nullptr, 2, true}, misaligned_range{0, 0, nullptr, 2, true};

namespace {

std::shared_mutex registry_mutex;
std::map<uintptr_t, std::unique_ptr<Range>> registry;

// Batch ids are given out in blocks, across machines, so that an id in a shadow tells its launch: ids below a launch's base are
// older.
constexpr uint32_t kBatchBlock = 1024;
std::atomic<uint32_t> next_batch_block{1};

size_t shadow_bytes(const Range& r, uint32_t shift) { return ((static_cast<size_t>(r.bytes) + 7) >> shift) * sizeof(uint32_t); }

uint32_t* map_shadow(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    fprintf(stderr, "simt: no memory for a shadow of %zu bytes\n", bytes);
    abort();
  }
  return static_cast<uint32_t*>(p);
}

// Makes the range's shadow fine enough for accesses of `bytes` bytes.
void refine_shadow(Range& r, uint32_t bytes) {
  const uint32_t shift = bytes % 4 == 0 ? 2 : bytes % 2 == 0 ? 1 : 0;
  if (r.shadow && r.shift <= shift) return;
  uint32_t* finer = map_shadow(shadow_bytes(r, shift));
  if (r.shadow) {
    const size_t old_bytes = shadow_bytes(r, r.shift);
    for (size_t i = 0; i < old_bytes / sizeof(uint32_t); ++i) {
      if (!r.shadow[i]) continue;
      for (size_t j = 0; j < 1u << (r.shift - shift); ++j) finer[(i << (r.shift - shift)) + j] = r.shadow[i];
    }
    munmap(r.shadow, old_bytes);
  }
  r.shadow = finer;
  r.shift = shift;
}

}  // namespace

// What reports say of an access.
const char* verb(Access access) {
  switch (access) {
    case Access::kRead: return "reads";
    case Access::kWrite: return "writes";
    default: return "updates atomically";
  }
}

Range* find_range(const void* p, uint32_t alignment) {
  if (!p) return &null_range;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % alignment) return &misaligned_range;
  Machine* m = cur.machine;
  Machine::Lookup* cached = m ? &m->lookup[(at >> 4 ^ at >> 12) % 64] : nullptr;
  if (cached && cached->p == p) return cached->range;
  Range* found = &unknown_range;
  {
    std::shared_lock lock(registry_mutex);
    auto next = registry.upper_bound(at);
    if (next != registry.begin()) {
      Range& r = *std::prev(next)->second;
      // A pointer to the end belongs to the range too: what an empty tail looks like.
      if (at - r.begin <= static_cast<uintptr_t>(r.bytes)) found = &r;
    }
  }
  if (cached) *cached = {p, found};
  return found;
}

void global_fault(Access access, const void* p, const Range* range, uint32_t bytes) {
  if (range == &null_range) fault("%s %u bytes through a null pointer", verb(access), bytes);
  if (range == &misaligned_range) fault("%s %u bytes at %p: misaligned for the element type", verb(access), bytes, p);
  if (range == &unknown_range)
    fault("%s %u bytes at %p: out of bounds, the pointer was made outside registered memory", verb(access), bytes, p);
  fault("%s %u bytes at offset %lld of a range of %lld bytes at %p: out of bounds", verb(access), bytes,
        static_cast<long long>(reinterpret_cast<uintptr_t>(p) - range->begin), static_cast<long long>(range->bytes),
        reinterpret_cast<void*>(range->begin));
}

void global_misaligned(Access access, const void* p, uint32_t bytes) {
  fault("%s a vector of %u bytes at %p: misaligned", verb(access), bytes, p);
}

// ---- publication ------------------------------------------------------------------------------------------------

namespace {

Batch* find_batch(Machine& m, uint32_t id) {
  const uint32_t block = id / kBatchBlock - cur.launch_base / kBatchBlock;
  if (block >= m.batch_blocks.size() || !m.batch_blocks[block]) return nullptr;
  return &m.batch_blocks[block][id % kBatchBlock];
}

uint32_t new_batch(Machine& m) {
  if (m.next_batch == m.end_batch) {
    const uint32_t block = next_batch_block.fetch_add(1);
    if (block >= 0xffffffffu / kBatchBlock) {
      fprintf(stderr, "simt: a process may make no more than 2^32 batches of global writes\n");
      abort();
    }
    m.next_batch = block * kBatchBlock;
    m.end_batch = m.next_batch + kBatchBlock;
    const uint32_t index = block - cur.launch_base / kBatchBlock;
    if (m.spare_blocks.empty()) m.spare_blocks.push_back(static_cast<Batch*>(malloc(sizeof(Batch) * kBatchBlock)));
    m.batch_blocks.resize(index + 1, nullptr);
    m.batch_blocks[index] = m.spare_blocks.back();
    m.spare_blocks.pop_back();
  }
  return m.next_batch++;
}

// The batch that the running thread's next global write belongs to.
uint32_t open_batch(Machine& m) {
  Fiber& f = *cur.fiber;
  Warp& w = *f.warp;
  if (w.batch) {
    Batch& b = *find_batch(m, w.batch);
    // A lane that has fenced its part of a batch begins another.
    if (!(b.writers & f.bit)) {
      b.writers |= f.bit;
      b.unfenced |= f.bit;
      return f.batch = cur.batch = w.batch;
    }
  }
  w.batch = new_batch(m);
  *find_batch(m, w.batch) = Batch{m.cta, w.index, m.epoch, w.phase, f.bit, f.bit, 0, 0, false};
  m.unpublished.push_back(w.batch);
  return f.batch = cur.batch = w.batch;
}

bool has_acquired(const Machine& m) {
  const Fiber& f = *cur.fiber;
  return f.acquired || m.acquired_epoch < m.epoch || f.warp->acquired_phase < f.warp->phase;
}

// Whether the running thread may touch what batch `id` of this launch wrote; reports if not.
void check_order(Machine& m, Access access, const Range& r, int64_t at, uint32_t bytes, uint32_t id) {
  const Batch* b = find_batch(m, id);
  if (!b) return;
  const Fiber& f = *cur.fiber;
  const char* race = access == Access::kRead ? "write-read" : "write-write";
  if (b->cta == m.cta) {
    if (b->warp != f.warp->index && b->epoch == m.epoch) {
      fault(
          "%s race in global memory: %s %u bytes at offset %lld of the range at %p, which warp %u wrote with no __syncthreads "
          "since",
          race, verb(access), bytes, static_cast<long long>(at), reinterpret_cast<void*>(r.begin), b->warp);
    }
    return;
  }
  if (b->published && has_acquired(m)) return;
  const Index g = cur.grid_dim;
  char why[160];
  if (!b->published && b->unfenced) {
    snprintf(why, sizeof why, "the writer executed no __threadfence between the write and an atomic");
  } else if (!b->published) {
    snprintf(why, sizeof why, "the writer's CTA executed no atomic behind its __threadfence (and a barrier)");
  } else {
    snprintf(why, sizeof why, "this thread executed no __threadfence behind an atomic of its CTA");
  }
  fault(
      "%s race between CTAs in global memory: %s %u bytes at offset %lld of the range at %p, which CTA (%llu, %llu, %llu) warp %u "
      "wrote in this "
      "launch: %s",
      race, verb(access), bytes, static_cast<long long>(at), reinterpret_cast<void*>(r.begin),
      static_cast<unsigned long long>(b->cta % g.x), static_cast<unsigned long long>(b->cta / g.x % g.y),
      static_cast<unsigned long long>(b->cta / g.x / g.y), b->warp, why);
}

}  // namespace

void global_read_shadow(const Range* range, int64_t at, uint32_t bytes) {
  const uint32_t base = cur.launch_base;
  const uint32_t* s = range->shadow + (at >> range->shift);
  const uint32_t* end = range->shadow + ((at + bytes - 1) >> range->shift);
  for (; s <= end; ++s) {
    if (__builtin_expect(*s >= base && *s != cur.batch, 0)) check_order(*cur.machine, Access::kRead, *range, at, bytes, *s);
  }
}

void global_write_shadow(Range* range, int64_t at, uint32_t bytes) {
  if (__builtin_expect(range->read_only, 0)) {
    fault("writes %u bytes at offset %lld of the read-only range at %p", bytes, static_cast<long long>(at),
          reinterpret_cast<void*>(range->begin));
  }
  const uint32_t shift = range->shift;
  if (__builtin_expect(!range->shadow || (bytes & ((1u << shift) - 1)), 0)) refine_shadow(*range, bytes);
  uint32_t mine = cur.batch;
  if (!mine) mine = open_batch(*cur.machine);
  const uint32_t base = cur.launch_base;
  uint32_t* s = range->shadow + (at >> range->shift);
  uint32_t* end = range->shadow + ((at + bytes - 1) >> range->shift);
  for (; s <= end; ++s) {
    if (__builtin_expect(*s >= base && *s != mine, 0)) check_order(*cur.machine, Access::kWrite, *range, at, bytes, *s);
    *s = mine;
  }
}

void global_atomic(Range* range, const void* p) {
  if (range->read_only) {
    fault("updates atomically the read-only range at %p", reinterpret_cast<void*>(range->begin));
  }
  (void)p;
  Machine& m = *cur.machine;
  Fiber& f = *cur.fiber;
  Warp& w = *f.warp;
  if (++f.atomics > 100'000'000)
    fault("limit of the emulation: 100 million atomics in a thread; CTAs run one after the other, none can wait for another");
  if (m.atomic_epoch == kNever) m.atomic_epoch = m.epoch;
  if (w.atomic_phase == kNever) w.atomic_phase = w.phase;
  size_t kept = 0;
  for (const uint32_t id : m.unpublished) {
    Batch& b = *find_batch(m, id);
    const bool same_warp = b.warp == w.index;
    const bool fenced =
        b.unfenced == 0 && (b.fence_epoch < m.epoch || (same_warp && (b.fence_phase < w.phase || b.writers == f.bit)));
    // A fence is cumulative: it covers what a barrier ordered before it.
    const bool covered = f.fence_epoch != kNever && (b.epoch < f.fence_epoch || (same_warp && b.phase < f.fence_phase));
    if (fenced || covered) {
      b.published = true;
    } else {
      m.unpublished[kept++] = id;
    }
  }
  m.unpublished.resize(kept);
}

void thread_fence() {
  Machine& m = *cur.machine;
  Fiber& f = *cur.fiber;
  Warp& w = *f.warp;
  for (const uint32_t id : m.unpublished) {
    Batch& b = *find_batch(m, id);
    if (b.warp != w.index || !(b.unfenced & f.bit)) continue;
    b.unfenced &= ~f.bit;
    b.fence_epoch = m.epoch;
    b.fence_phase = w.phase;
  }
  f.batch = cur.batch = 0;
  f.fence_epoch = m.epoch;
  f.fence_phase = w.phase;
  if (f.atomics || m.atomic_epoch < m.epoch || w.atomic_phase < w.phase) {
    f.acquired = true;
    if (m.acquired_epoch == kNever) m.acquired_epoch = m.epoch;
    if (w.acquired_phase == kNever) w.acquired_phase = w.phase;
  }
}

void close_batches(Warp& w) {
  if (!w.batch) return;
  w.batch = 0;
  for (uint32_t l = 0; l < 32; ++l) w.lanes[l].batch = 0;
  cur.batch = 0;
}

// ---- launches and CTAs ------------------------------------------------------------------------------------------

void begin_launch_memory(Machine& m) {
  // Ids from here on are this launch's, or of launches on other threads: those are in none of its blocks and count as older.
  if (m.next_batch == m.end_batch) {
    m.spare_blocks.insert(m.spare_blocks.end(), m.batch_blocks.begin(), m.batch_blocks.end());
    m.batch_blocks.clear();
    cur.launch_base = next_batch_block.load() * kBatchBlock;
  } else {
    cur.launch_base = m.next_batch;
  }
  for (auto& l : m.lookup) l = {nullptr, &null_range};
}

void end_launch_memory(Machine& m) {
  if (m.batch_blocks.empty()) return;
  // What is left of the last block goes to the next launch.
  Batch* last = m.batch_blocks.back();
  m.batch_blocks.pop_back();
  for (Batch* block : m.batch_blocks) {
    if (block) m.spare_blocks.push_back(block);
  }
  m.batch_blocks.assign(1, last);
}

void begin_cta_global(Machine& m) {
  m.unpublished.clear();
  m.atomic_epoch = m.acquired_epoch = kNever;
}

}  // namespace simt

extern "C" {

int32_t rksc_emu_register(const void* p, size_t bytes, int32_t read_only) {
  using namespace simt;
  if (!p || bytes == 0) return 1;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  std::unique_lock lock(registry_mutex);
  auto next = registry.lower_bound(begin);
  if (next != registry.end() && next->first - begin < bytes) return 1;
  if (next != registry.begin()) {
    const Range& before = *std::prev(next)->second;
    if (begin - before.begin < static_cast<uintptr_t>(before.bytes)) return 1;
  }
  registry.emplace(begin, std::make_unique<Range>(Range{begin, static_cast<int64_t>(bytes), nullptr, 2, read_only != 0}));
  return 0;
}

int32_t rksc_emu_unregister(const void* p) {
  using namespace simt;
  std::unique_lock lock(registry_mutex);
  auto at = registry.find(reinterpret_cast<uintptr_t>(p));
  if (at == registry.end()) return 1;
  Range& r = *at->second;
  if (r.shadow) munmap(r.shadow, shadow_bytes(r, r.shift));
  registry.erase(at);
  return 0;
}

}  // extern "C"

// machine.h -- internal to the emulation: one launch's fibers, warps and bookkeeping. A machine runs one launch at a time, on the
// calling thread; machines are pooled, since test threads come and go.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <vector>

#include "core.h"

namespace simt {

constexpr uint32_t kMaxThreads = 1024, kMaxWarps = 32;
constexpr uint32_t kNever = 0xffffffffu;

struct Warp;

struct PendingCopy {
  uint32_t at;      // destination in shared memory
  uint32_t group;   // cp.async group, counted per thread
  const void* src;  // null: zeros
};

// A CUDA thread. What a switch and a collective touch lies in one cache line.
struct alignas(64) Fiber {
  void* sp;  // while it does not run
  Warp* warp;
  // Collectives: what it brings, and what it gets.
  uint64_t value, result;
  uint32_t argument;
  int32_t stack;  // index, -1 before its first run
  Index thread_idx;
  uint32_t id;     // linear thread index
  uint32_t bit;    // of its lane
  uint32_t batch;  // of its global writes (memory.cpp)

  void* pointers[3];

  // Publication of global writes (memory.cpp).
  uint32_t fence_epoch, fence_phase;  // of its last fence; kNever before
  uint32_t atomics;
  bool acquired;

  uint32_t copy_group;  // the one being filled
  uint32_t first_copy;  // copies before it have landed
  std::vector<PendingCopy> copies;
};
static_assert(offsetof(Fiber, pointers) == 64);

struct Warp {
  Fiber* lanes;
  uint32_t index;
  uint32_t exists, live, runnable, arrived, at_barrier;  // lanes
  uint32_t phase;
  Collective op[32];
  uint32_t mask[32];

  uint32_t batch;
  uint32_t atomic_phase, acquired_phase;  // first in this CTA; kNever before
};

// Global writes of one warp that share a barrier epoch and a phase: the unit in which publication to other CTAs is tracked.
struct Batch {
  uint64_t cta;
  uint32_t warp, epoch, phase;
  uint32_t writers, unfenced;  // lanes
  uint32_t fence_epoch, fence_phase;
  bool published;
};

struct StaticArray {
  const void* site;
  const char* name;
  uint32_t at, bytes;
};

struct Machine {
  Launch launch;
  void* main_sp;
  bool faulted;
  char fault_text[2048];

  // Order.
  int32_t order;
  uint64_t random;

  // The CTA.
  uint64_t cta, num_ctas;
  uint32_t num_threads, num_warps, num_live, num_at_barrier;
  uint32_t runnable_warps;
  uint32_t epoch;       // barriers since the launch began
  uint32_t next_phase;  // every phase given out so far is smaller
  uint32_t atomic_epoch, acquired_epoch;
  int32_t vote_count, vote_and, vote_result;
  uint32_t static_end;
  std::vector<StaticArray> statics;
  std::vector<uint32_t> unpublished;  // batches of this CTA

  Fiber fibers[kMaxThreads];  // by id
  Warp warps[kMaxWarps];

  // Stacks.
  std::vector<char*> stacks;  // lowest usable address of each
  std::vector<int32_t> free_stacks;

  // Batches of the launch, by (id - launch_base) / kBatchBlock; another machine's blocks are null.
  std::vector<Batch*> batch_blocks;
  std::vector<Batch*> spare_blocks;
  uint32_t next_batch, end_batch;

  struct Lookup {
    const void* p;
    Range* range;
  } lookup[64];

  alignas(128) unsigned char shared[kMaxSharedBytes];
  uint32_t shared_write[kMaxSharedBytes / 2], shared_read[kMaxSharedBytes / 2];
};

// memory.cpp
void begin_launch_memory(Machine& m);
void end_launch_memory(Machine& m);
void begin_cta_global(Machine& m);
// The warp's global writes from here on belong to a later phase.
void close_batches(Warp& w);

const char* verb(Access access);

// shared.cpp
void begin_cta_shared(Machine& m);
void end_cta_shared(Machine& m);
// Forgets everything known of shared memory.
void clear_shared(Machine& m);

// collectives.cpp
void complete(Warp& w, Collective op, uint32_t mask);
const char* name_of(Collective op);

// scheduler.cpp
uint64_t next_random(Machine& m);
// Runs the CTA's threads until all have ended or one has faulted.
void run_threads(Machine& m);
// Abandons them.
[[noreturn]] void to_main(Machine& m);

// simt.cpp
[[noreturn]] SIMT_COLD void fault_of(Fiber* fiber, const char* format, ...) __attribute__((format(printf, 2, 3)));

inline uint32_t entry_of(const Fiber& f) { return f.warp->phase << kPhaseShift | f.id; }

}  // namespace simt

// core.h -- what views and collectives share with the scheduler: the running thread's state and the slow paths behind the checks.
//
// Fast paths are inline in views.h; whatever is not plainly in order goes to a function declared here, which either
// finds it in order after all or reports and never returns.
#pragma once

#include <stdint.h>

#include "control.h"

namespace simt {

struct Index {
  uint32_t x, y, z;
};

// A registered range of global memory. `shadow` holds, per 1 << shift bytes, the batch of the last write in a launch;
// it exists once a kernel has written to the range.
struct Range {
  uintptr_t begin;
  int64_t bytes;
  uint32_t* shadow;
  uint32_t shift;
  bool read_only;
};

// Where views point that are null, outside registered memory, or misaligned for their type: no access is in bounds.
extern Range null_range, unknown_range, misaligned_range;

struct Fiber;
struct Machine;
struct SharedPlace;

// Shared-memory shadow, one entry for reads and one for writes per 2 bytes:
//   phase << 12 | flags | thread. A warp's phase grows at each of its __syncwarp; at a barrier all warps go on with a common,
// larger one. So an access lies behind the last barrier when its entry is < Current::barrier, and belongs to this CTA when it is
// >= Current::start.
constexpr uint32_t kPhaseShift = 12;
constexpr uint32_t kThreadMask = 0x3ff;      // warp * 32 + lane
constexpr uint32_t kManyLanes = 1u << 10;    // reads: several lanes of the warp in this phase
constexpr uint32_t kManyWarps = 1u << 11;    // reads: several warps since the barrier
constexpr uint32_t kAtomic = 1u << 11;       // writes: by an atomic
constexpr uint32_t kCopyPending = 1u << 31;  // writes: destination of a cp.async that nothing has waited for yet
constexpr uint32_t kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kMaxStaticSharedBytes = 48 * 1024;

// The thread that runs now, and its CTA.
struct Current {
  Index thread_idx, block_idx, block_dim, grid_dim;
  unsigned char* shared;   // the CTA's memory: dynamic at 0, static arrays behind it
  uint32_t* shared_write;  // shadows of it
  uint32_t* shared_read;
  uint32_t me;           // entry of this thread now
  uint32_t start;        // entries below are of earlier CTAs
  uint32_t barrier;      // entries below lie behind the last barrier
  uint32_t launch_base;  // batches below are of earlier launches
  uint32_t batch;        // batch of this thread's global writes, 0 when the next write must open one
  uint32_t dynamic_bytes;
  Fiber* fiber;
  Machine* machine;
};
extern __thread Current cur __attribute__((tls_model("initial-exec")));

#define SIMT_INLINE inline __attribute__((always_inline))
#define SIMT_COLD __attribute__((noinline, cold))

// Reports for the running thread and abandons the launch.
[[noreturn]] SIMT_COLD void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Access { kRead, kWrite, kAtomic };

Range* find_range(const void* p, uint32_t alignment);
[[noreturn]] SIMT_COLD void global_fault(Access access, const void* p, const Range* range, uint32_t bytes);
[[noreturn]] SIMT_COLD void global_misaligned(Access access, const void* p, uint32_t bytes);
__attribute__((noinline)) void global_read_shadow(const Range* range, int64_t at, uint32_t bytes);
__attribute__((noinline)) void global_write_shadow(Range* range, int64_t at, uint32_t bytes);
void global_atomic(Range* range, const void* p);

// A static shared array of the CTA, the same for every thread that comes by `site`.
uint32_t static_shared(const void* site, const char* name, uint32_t bytes);
[[noreturn]] SIMT_COLD void shared_out_of_bounds(Access access, int32_t relative, uint32_t begin, int32_t size, uint32_t bytes);
[[noreturn]] SIMT_COLD void shared_misaligned(Access access, uint32_t at, uint32_t bytes);
__attribute__((noinline)) void shared_read_slow(uint32_t at, uint32_t bytes);
__attribute__((noinline)) void shared_write_slow(uint32_t at, uint32_t bytes);
void shared_byte(uint32_t at, bool write);
void shared_atomic(uint32_t at, uint32_t bytes);

// Collectives. A lane waits until all of `mask` are in the same one; the last to come computes for all.
enum class Collective : uint32_t {
  kSyncWarp,
  kShuffle,
  kBallot,
  kAny,
  kAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kMatchAny,
  kMmaBf16,
  kMmaF16,
  kLdmatrix1,
  kLdmatrix2,
  kLdmatrix4,
  kLdmatrix1Trans,
  kLdmatrix2Trans,
  kLdmatrix4Trans,
};
void sync_warp(uint32_t mask);
// For shuffles `argument` is the lane whose value is wanted.
uint64_t exchange(Collective op, uint32_t mask, uint64_t value, uint32_t argument);
void sync_threads();
enum class Vote { kCount, kAnd, kOr };
int sync_threads_vote(Vote vote, int predicate);
void thread_fence();

// c, a, b: 4 floats, 4 and 2 registers of this lane.
void mma(Collective op, float* c, const uint32_t* a, const uint32_t* b);
// The row this lane names, 16 bytes.
void ldmatrix(Collective op, uint32_t* r, SharedPlace row);
void cp_async(SharedPlace dst, const void* src, const Range* range, bool valid);
void cp_async_commit();
void cp_async_wait(uint32_t pending_groups);

// One launch, with the kernel's type erased.
struct Launch {
  const char* text;  // the arguments of launch(...) as written: the kernel's name comes first
  void (*call)(void (*kernel)(), const void* params);
  void (*kernel)();
  const void* params;
  Index grid, block;
  uint32_t shared_bytes;
};
int32_t run(const Launch& launch);

}  // namespace simt

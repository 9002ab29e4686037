// scheduler.cpp -- a fiber per CUDA thread: stacks, who runs next, barriers, arrival at collectives.
//
// A fiber leaves the CPU only when it waits (collective, barrier) or ends; the next one is entered directly. A thread that ends
// hands its stack to the next that has not begun, so kernels without barriers run on one stack.
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <bit>

#include "machine.h"
#include "switch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

uint64_t next_random(Machine& m) {
  m.random += 0x9e3779b97f4a7c15ull;
  uint64_t z = m.random;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

void to_main(Machine& m) {
  void* abandoned;
  rksc_emu_switch(&abandoned, m.main_sp);
  __builtin_unreachable();
}

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // its frames are several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr size_t kStacksPerMapping = 32;

void enter();

// ---- stacks -----------------------------------------------------------------------------------------------------

void map_stacks(Machine& m) {
  constexpr size_t stride = kStackBytes + kGuardBytes;
  void* base =
      mmap(nullptr, stride * kStacksPerMapping, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    fprintf(stderr, "simt: no memory for stacks\n");
    abort();
  }
  for (size_t i = 0; i < kStacksPerMapping; ++i) {
    char* guard = static_cast<char*>(base) + i * stride;
    mprotect(guard, kGuardBytes, PROT_NONE);
    m.stacks.push_back(guard + kGuardBytes);
    m.free_stacks.push_back(static_cast<int32_t>(m.stacks.size() - 1));
  }
}

int32_t take_stack(Machine& m) {
  if (m.free_stacks.empty()) map_stacks(m);
  const int32_t stack = m.free_stacks.back();
  m.free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  // Fibers that were abandoned have left the marks of their frames.
  __asan_unpoison_memory_region(m.stacks[stack], kStackBytes);
#endif
  return stack;
}

// Stacks begin at different offsets in their pages: 32 of them at one offset would share a few cache sets.
char* stack_top(const Machine& m, int32_t stack) {
  return m.stacks[stack] + kStackBytes - (static_cast<size_t>(stack) * 576) % 8192;
}

SIMT_INLINE void set_current(Fiber& f) {
  cur.fiber = &f;
  cur.thread_idx = f.thread_idx;
  cur.me = entry_of(f);
  cur.batch = f.batch;
}

// ---- order ------------------------------------------------------------------------------------------------------

uint32_t choose_random(Machine& m, uint32_t choices) {
  const int rotation = static_cast<int>(next_random(m) % 32);
  return (__builtin_ctz(std::rotr(choices, rotation)) + rotation) % 32;
}

// One of `choices` (not empty): the next after `last` in the machine's order, going round; kNever for the first.
SIMT_INLINE uint32_t choose(Machine& m, uint32_t choices, uint32_t last) {
  if (m.order == RKSC_EMU_FORWARD) {
    const uint32_t later = last >= 31 ? 0 : choices & (0xfffffffeu << last);
    return __builtin_ctz(later ? later : choices);
  }
  if (m.order == RKSC_EMU_BACKWARD) {
    const uint32_t earlier = last > 31 ? 0 : choices & ((1u << last) - 1);
    return 31 - __builtin_clz(earlier ? earlier : choices);
  }
  return choose_random(m, choices);
}

// ---- waiting ----------------------------------------------------------------------------------------------------

void list_lanes(char* out, size_t size, uint32_t lanes) {
  size_t used = 0;
  out[0] = 0;
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    uint32_t end = l;
    while (end < 31 && lanes >> (end + 1) & 1) ++end;
    const int n = end > l ? snprintf(out + used, size - used, "%s%u-%u", used ? ", " : "", l, end)
                          : snprintf(out + used, size - used, "%s%u", used ? ", " : "", l);
    if (n < 0 || used + static_cast<size_t>(n) >= size) return;
    used += static_cast<size_t>(n);
    l = end;
  }
}

[[noreturn]] SIMT_COLD void divergent_collective(Warp& w) {
  const uint32_t lane = __builtin_ctz(w.arrived);
  const uint32_t missing = w.mask[lane] & ~w.arrived;
  char here[128], elsewhere[128];
  list_lanes(here, sizeof here, w.arrived);
  list_lanes(elsewhere, sizeof elsewhere, missing);
  const char* where = missing & w.at_barrier ? "wait at __syncthreads" : "have exited";
  fault_of(&w.lanes[lane], "divergent %s: lanes %s of warp %u wait in it, lanes %s that its mask names %s", name_of(w.op[lane]),
           here, w.index, elsewhere, where);
}

void release_barrier(Machine& m) {
  if (m.num_live != m.num_threads) {
    // Named for the first thread that waits.
    for (uint32_t i = 0; i < m.num_threads; ++i) {
      Fiber& f = m.fibers[i];
      if (f.warp->at_barrier & f.bit) {
        fault_of(&f, "divergent __syncthreads: %u threads wait at it, %u threads of the CTA have exited", m.num_live,
                 m.num_threads - m.num_live);
      }
    }
  }
  uint32_t phase = m.next_phase;
  for (uint32_t i = 0; i < m.num_warps; ++i) phase = phase > m.warps[i].phase ? phase : m.warps[i].phase;
  ++phase;
  if (phase >= 1u << (31 - kPhaseShift)) fault("limit of the emulation: more than %u barriers in a CTA", phase);
  m.runnable_warps = 0;
  for (uint32_t i = 0; i < m.num_warps; ++i) {
    Warp& w = m.warps[i];
    close_batches(w);
    w.phase = phase;
    w.at_barrier = 0;
    w.runnable = w.live;
    m.runnable_warps |= 1u << i;
  }
  m.next_phase = phase + 1;
  cur.barrier = phase << kPhaseShift;
  ++m.epoch;
  m.num_at_barrier = 0;
}

// The same when no lane of the running thread's warp can go on.
__attribute__((noinline)) Fiber* pick_warp(Machine& m) {
  Warp& stuck = *cur.fiber->warp;
  if (stuck.arrived) divergent_collective(stuck);
  m.runnable_warps &= ~(1u << stuck.index);
  uint32_t last = stuck.index;
  if (!m.runnable_warps) {
    if (m.num_live == 0) return nullptr;
    release_barrier(m);
    last = kNever;
  }
  Warp& w = m.warps[choose(m, m.runnable_warps, last)];
  return &w.lanes[choose(m, w.runnable, kNever)];
}

// The thread to run next; null when the CTA is done.
SIMT_INLINE Fiber* pick(Machine& m) {
  Warp& w = *cur.fiber->warp;
  if (__builtin_expect(w.runnable == 0, 0)) return pick_warp(m);
  return &w.lanes[choose(m, w.runnable, cur.fiber->id % 32)];
}

void wait() {
  Machine& m = *cur.machine;
  Fiber& self = *cur.fiber;
  Fiber* next = pick(m);
  if (next == &self) {
    set_current(self);
    return;
  }
  if (next->stack < 0) {
    next->stack = take_stack(m);
    next->sp = fresh_stack(stack_top(m, next->stack), enter);
  }
  set_current(*next);
  rksc_emu_switch(&self.sp, next->sp);
}

// Ends the running thread; the next to run, or null.
Fiber* finish(Machine& m) {
  Fiber& self = *cur.fiber;
  Warp& w = *self.warp;
  w.live &= ~self.bit;
  w.runnable &= ~self.bit;
  --m.num_live;
  if (w.arrived) {
    for (uint32_t waiting = w.arrived; waiting; waiting &= waiting - 1) {
      if (w.mask[__builtin_ctz(waiting)] & self.bit) divergent_collective(w);
    }
  }
  return pick(m);
}

// What a fiber runs: its thread, then threads that have not begun.
void enter() {
  Machine& m = *cur.machine;
  for (;;) {
    m.launch.call(m.launch.kernel, m.launch.params);
    const int32_t stack = cur.fiber->stack;
    Fiber* next = finish(m);
    if (next && next->stack < 0) {
      next->stack = stack;
      set_current(*next);
      continue;
    }
    m.free_stacks.push_back(stack);
    if (!next) to_main(m);
    set_current(*next);
    void* ended;
    rksc_emu_switch(&ended, next->sp);
  }
}

}  // namespace

void run_threads(Machine& m) {
  Warp& w = m.warps[choose(m, m.runnable_warps, kNever)];
  Fiber& first = w.lanes[choose(m, w.runnable, kNever)];
  first.stack = take_stack(m);
  set_current(first);
  rksc_emu_switch(&m.main_sp, fresh_stack(stack_top(m, first.stack), enter));
}

// ---- collectives: arrival -----------------------------------------------------------------------------------------

namespace {

void arrive(Collective op, uint32_t mask) {
  Fiber& self = *cur.fiber;
  Warp& w = *self.warp;
  const uint32_t lane = self.id % 32;
  if (!(mask & self.bit)) fault("%s whose mask 0x%08x leaves out the calling lane", name_of(op), mask);
  w.op[lane] = op;
  w.mask[lane] = mask;
  w.arrived |= self.bit;
  if (mask & ~w.live) {
    char gone[128];
    list_lanes(gone, sizeof gone, mask & ~w.live);
    fault("divergent %s: its mask names lanes %s of warp %u, which %s", name_of(op), gone, w.index,
          mask & ~w.exists ? "do not exist" : "have exited");
  }
  if ((w.arrived & mask) != mask) {
    w.runnable &= ~self.bit;
    wait();
    return;
  }
  for (uint32_t l = 0; l < 32; ++l) {
    if ((mask >> l & 1) && (w.op[l] != op || w.mask[l] != mask)) {
      fault("divergent %s (mask 0x%08x): lane %u of warp %u is in %s (mask 0x%08x)", name_of(op), mask, l, w.index,
            name_of(w.op[l]), w.mask[l]);
    }
  }
  complete(w, op, mask);
  w.arrived &= ~mask;
  w.runnable |= mask;
}

}  // namespace

void sync_warp(uint32_t mask) {
  arrive(Collective::kSyncWarp, mask & cur.fiber->warp->exists);
  cur.me = entry_of(*cur.fiber);
}

uint64_t exchange(Collective op, uint32_t mask, uint64_t value, uint32_t argument) {
  Fiber& self = *cur.fiber;
  self.value = value;
  self.argument = argument;
  arrive(op, mask);
  return self.result;
}

void mma(Collective op, float* c, const uint32_t* a, const uint32_t* b) {
  Fiber& self = *cur.fiber;
  self.pointers[0] = c;
  self.pointers[1] = const_cast<uint32_t*>(a);
  self.pointers[2] = const_cast<uint32_t*>(b);
  arrive(op, 0xffffffffu);
}

void ldmatrix(Collective op, uint32_t* r, SharedPlace row) {
  row.check_vector(Access::kRead);
  Fiber& self = *cur.fiber;
  self.pointers[0] = r;
  self.argument = row.at;
  arrive(op, 0xffffffffu);
}

void sync_threads() {
  Machine& m = *cur.machine;
  Fiber& self = *cur.fiber;
  Warp& w = *self.warp;
  w.at_barrier |= self.bit;
  w.runnable &= ~self.bit;
  ++m.num_at_barrier;
  wait();
}

int sync_threads_vote(Vote vote, int predicate) {
  Machine& m = *cur.machine;
  // The first to come to this barrier begins the count; the result is taken before anyone can come to the next.
  if (m.num_at_barrier == 0) m.vote_count = 0;
  m.vote_count += predicate != 0;
  sync_threads();
  const int count = m.vote_count;
  sync_threads();
  switch (vote) {
    case Vote::kCount: return count;
    case Vote::kAnd: return count == static_cast<int>(m.num_threads);
    default: return count > 0;
  }
}

}  // namespace simt

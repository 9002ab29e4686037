// simt.cpp -- the scheduler: a fiber per CUDA thread, CTAs one after the other, warps until they wait, faults.
//
// A fiber leaves the CPU only when it waits (collective, barrier) or ends; the next one is entered directly. A thread that ends
// hands its stack to the next that has not begun, so kernels without barriers run on one stack.
#include "simt.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <bit>
#include <memory>
#include <mutex>
#include <numeric>

#include "machine.h"

namespace simt {

__thread Current cur __attribute__((tls_model("initial-exec")));

namespace {

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;
constexpr size_t kStacksPerMapping = 32;

struct HostThread {
  int32_t order;
  uint64_t seed;
  char fault_text[2048];
};
thread_local HostThread host;

std::mutex pool_mutex;
std::vector<std::unique_ptr<Machine>> pool;

// ---- switching --------------------------------------------------------------------------------------------------

extern "C" void rksc_emu_switch(void** save, void* load);
extern "C" void rksc_emu_enter();

#if defined(__x86_64__)
asm(R"(
.text
.globl rksc_emu_switch
.hidden rksc_emu_switch
.type rksc_emu_switch, @function
rksc_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rksc_emu_switch, .-rksc_emu_switch
)");
// A stack from which rksc_emu_switch returns into `entry`, with a return address of 0 so that backtraces end there.
void* fresh_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl rksc_emu_switch
.hidden rksc_emu_switch
.type rksc_emu_switch, %function
rksc_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size rksc_emu_switch, .-rksc_emu_switch
)");
void* fresh_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(entry);
  return sp;
}
#else
#error "the emulation switches stacks on x86-64 and aarch64 only"
#endif

void map_stacks(Machine& m) {
  constexpr size_t stride = kStackBytes + kGuardBytes;
  void* base = mmap(nullptr, stride * kStacksPerMapping, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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

[[noreturn]] void to_main(Machine& m) {
  void* abandoned;
  rksc_emu_switch(&abandoned, m.main_sp);
  __builtin_unreachable();
}

// ---- order ------------------------------------------------------------------------------------------------------

uint64_t next_random(Machine& m) {
  m.random += 0x9e3779b97f4a7c15ull;
  uint64_t z = m.random;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

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
  fault_of(&w.lanes[lane], "divergent %s: lanes %s of warp %u wait in it, lanes %s that its mask names %s",
           name_of(w.op[lane]), here, w.index, elsewhere, where);
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

void enter() {
  rksc_emu_enter();
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

}  // namespace

// What a fiber runs: its thread, then threads that have not begun.
extern "C" void rksc_emu_enter() {
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

void ldmatrix(Collective op, uint32_t* r, uint32_t at) {
  Fiber& self = *cur.fiber;
  self.pointers[0] = r;
  self.argument = at;
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

// ---- faults -----------------------------------------------------------------------------------------------------

namespace {

// "name_kernel<T, 4>" of "name_kernel<T, 4>, dim3(...), ...".
int name_length(const char* text) {
  int depth = 0, n = 0;
  for (; text[n]; ++n) {
    if (text[n] == '<' || text[n] == '(') ++depth;
    if (text[n] == '>' || text[n] == ')') --depth;
    if (text[n] == ',' && depth == 0) break;
  }
  return n;
}

// A second line that turns into file and line numbers when pasted into a shell.
void append_frames(char* out, size_t size) {
  void* frames[12];
  const int n = backtrace(frames, 12);
  Dl_info info;
  // The first two are append_frames and report.
  if (n < 4 || !dladdr(frames[2], &info) || !info.dli_fname) return;
  size_t used = static_cast<size_t>(snprintf(out, size, "\n  at: addr2line -Cfipse %s", info.dli_fname));
  for (int i = 2; i < n && used < size; ++i) {
    // One back, from the return address into the call.
    const uintptr_t at = reinterpret_cast<uintptr_t>(frames[i]) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    used += static_cast<size_t>(snprintf(out + used, size - used, " %#lx", static_cast<unsigned long>(at)));
  }
}

[[noreturn]] void report(Fiber* fiber, const char* format, va_list args) {
  Machine* m = cur.machine;
  if (!m) {
    fprintf(stderr, "simt: a checked view used outside a kernel: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    abort();
  }
  const Index t = fiber->thread_idx, b = cur.block_idx;
  char* out = m->fault_text;
  size_t size = sizeof m->fault_text;
  int used = snprintf(out, size, "%.*s: CTA (%u, %u, %u), thread (%u, %u, %u), warp %u lane %u: ", name_length(m->launch.text),
                      m->launch.text, b.x, b.y, b.z, t.x, t.y, t.z, fiber->id / 32, fiber->id % 32);
  used += vsnprintf(out + used, size - used, format, args);
  if (static_cast<size_t>(used) < size) append_frames(out + used, size - used);
  m->faulted = true;
  to_main(*m);
}

}  // namespace

void fault(const char* format, ...) {
  va_list args;
  va_start(args, format);
  report(cur.fiber, format, args);
}

void fault_of(Fiber* fiber, const char* format, ...) {
  va_list args;
  va_start(args, format);
  report(fiber, format, args);
}

// ---- launches ---------------------------------------------------------------------------------------------------

namespace {

std::unique_ptr<Machine> take_machine() {
  {
    std::lock_guard lock(pool_mutex);
    if (!pool.empty()) {
      std::unique_ptr<Machine> m = std::move(pool.back());
      pool.pop_back();
      return m;
    }
  }
  auto m = std::make_unique<Machine>();
  m->next_phase = 1;
  // The first backtrace of a process loads a library: not on a fiber's stack.
  void* frame[1];
  backtrace(frame, 1);
  return m;
}

void init_threads(Machine& m) {
  const Index block = m.launch.block;
  m.num_threads = block.x * block.y * block.z;
  m.num_warps = (m.num_threads + 31) / 32;
  for (uint32_t i = 0; i < m.num_threads; ++i) {
    Fiber& f = m.fibers[i];
    f.id = i;
    f.warp = &m.warps[i / 32];
    f.bit = 1u << i % 32;
    f.thread_idx = Index{i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  for (uint32_t i = 0; i < m.num_warps; ++i) {
    m.warps[i].index = i;
    m.warps[i].lanes = &m.fibers[i * 32];
    const uint32_t lanes = m.num_threads - i * 32;
    m.warps[i].exists = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
  }
}

void run_cta(Machine& m, uint64_t cta) {
  const Index grid = m.launch.grid;
  m.cta = cta;
  cur.block_idx = Index{static_cast<uint32_t>(cta % grid.x), static_cast<uint32_t>(cta / grid.x % grid.y),
                        static_cast<uint32_t>(cta / grid.x / grid.y)};
  begin_cta_memory(m);
  m.num_live = m.num_threads;
  m.num_at_barrier = 0;
  m.runnable_warps = m.num_warps == 32 ? 0xffffffffu : (1u << m.num_warps) - 1;
  ++m.epoch;
  for (uint32_t i = 0; i < m.num_warps; ++i) {
    Warp& w = m.warps[i];
    w.live = w.runnable = w.exists;
    w.arrived = w.at_barrier = 0;
    w.phase = m.next_phase;
    w.batch = 0;
    w.atomic_phase = w.acquired_phase = kNever;
  }
  cur.start = cur.barrier = m.next_phase << kPhaseShift;
  ++m.next_phase;
  for (uint32_t i = 0; i < m.num_threads; ++i) {
    Fiber& f = m.fibers[i];
    f.stack = -1;
    f.batch = 0;
    f.fence_epoch = f.fence_phase = kNever;
    f.atomics = 0;
    f.acquired = false;
    f.copy_group = f.first_copy = 0;
    f.copies.clear();
  }
  Warp& w = m.warps[choose(m, m.runnable_warps, kNever)];
  Fiber& first = w.lanes[choose(m, w.runnable, kNever)];
  first.stack = take_stack(m);
  set_current(first);
  rksc_emu_switch(&m.main_sp, fresh_stack(stack_top(m, first.stack), enter));
  if (m.faulted) return;
  for (uint32_t i = 0; i < m.num_warps; ++i) m.next_phase = m.next_phase > m.warps[i].phase ? m.next_phase : m.warps[i].phase + 1;
  end_cta_memory(m);
}

void run_ctas(Machine& m) {
  const uint64_t n = m.num_ctas;
  // Seeded: a stride coprime to n visits every CTA once.
  uint64_t at = 0, stride = 1;
  if (m.order == RKSC_EMU_BACKWARD) {
    at = n - 1;
    stride = n - 1;
  } else if (m.order == RKSC_EMU_SEEDED) {
    at = next_random(m) % n;
    stride = next_random(m) % n;
    while (std::gcd(stride, n) != 1) stride = (stride + 1) % n;
  }
  for (uint64_t i = 0; i < n && !m.faulted; ++i) {
    run_cta(m, at);
    at = (at + stride) % n;
  }
}

int32_t refuse(const Launch& l, int32_t code, const char* why) {
  snprintf(host.fault_text, sizeof host.fault_text, "%.*s: not launched: %s (grid %u x %u x %u, block %u x %u x %u, %u bytes)",
           name_length(l.text), l.text, why, l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y, l.block.z, l.shared_bytes);
  return code;
}

}  // namespace

int32_t run(const Launch& l) {
  constexpr int32_t kInvalidValue = 1, kInvalidConfiguration = 9;
  host.fault_text[0] = 0;
  const uint64_t threads = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
  if (threads == 0 || threads > kMaxThreads || l.block.z > 64) return refuse(l, kInvalidConfiguration, "block");
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > 0x7fffffff || l.grid.y > 65535 || l.grid.z > 65535) {
    return refuse(l, kInvalidConfiguration, "grid");
  }
  if (l.shared_bytes > kMaxSharedBytes) return refuse(l, kInvalidValue, "more than 227 KiB of shared memory");

  std::unique_ptr<Machine> machine = take_machine();
  Machine& m = *machine;
  m.launch = l;
  m.faulted = false;
  m.order = host.order;
  m.random = host.seed;
  m.num_ctas = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  m.epoch = 0;
  m.statics.clear();
  m.static_end = (l.shared_bytes + 15) / 16 * 16;
  init_threads(m);
  cur.machine = &m;
  cur.block_dim = l.block;
  cur.grid_dim = l.grid;
  cur.shared = m.shared;
  cur.shared_write = m.shared_write;
  cur.shared_read = m.shared_read;
  cur.dynamic_bytes = l.shared_bytes;
  begin_launch_memory(m);
  run_ctas(m);
  end_launch_memory(m);
  cur.machine = nullptr;
  cur.fiber = nullptr;
  const bool faulted = m.faulted;
  if (faulted) {
    snprintf(host.fault_text, sizeof host.fault_text, "%s", m.fault_text);
    // Abandoned fibers hold stacks, and pending copies their destinations.
    m.free_stacks.clear();
    for (size_t i = 0; i < m.stacks.size(); ++i) m.free_stacks.push_back(static_cast<int32_t>(i));
    __builtin_memset(m.shared_write, 0, sizeof m.shared_write);
    __builtin_memset(m.shared_read, 0, sizeof m.shared_read);
    m.next_phase = 1;
  }
  std::lock_guard lock(pool_mutex);
  pool.push_back(std::move(machine));
  return faulted ? RKSC_EMU_FAULT : 0;
}

}  // namespace simt

extern "C" {

uint32_t rksc_emu_version(void) { return 1; }

int32_t rksc_emu_set_order(int32_t order, uint64_t seed) {
  if (order < RKSC_EMU_FORWARD || order > RKSC_EMU_SEEDED) return 1;
  simt::host.order = order;
  simt::host.seed = seed;
  return 0;
}

const char* rksc_emu_last_fault(void) { return simt::host.fault_text; }
void rksc_emu_clear_fault(void) { simt::host.fault_text[0] = 0; }

}  // extern "C"

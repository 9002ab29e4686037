// simt.cpp -- launches: CTAs one after the other on the calling thread, reports, control.
#include "simt.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <mutex>
#include <numeric>

#include "machine.h"

namespace simt {

__thread Current cur __attribute__((tls_model("initial-exec")));

namespace {

struct HostThread {
  int32_t order;
  uint64_t seed;
  char fault_text[2048];
};
thread_local HostThread host;

std::mutex pool_mutex;
std::vector<std::unique_ptr<Machine>> pool;

// ---- faults -----------------------------------------------------------------------------------------------------

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
  begin_cta_global(m);
  begin_cta_shared(m);
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
  run_threads(m);
  if (m.faulted) return;
  for (uint32_t i = 0; i < m.num_warps; ++i) m.next_phase = m.next_phase > m.warps[i].phase ? m.next_phase : m.warps[i].phase + 1;
  end_cta_shared(m);
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
    clear_shared(m);
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

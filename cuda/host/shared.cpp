// shared.cpp -- the CTA's shared memory: static arrays, the slow half of the shadow checks, asynchronous copies.
//
// A warp may touch what another has touched (one of the two writing) only behind a barrier; a lane what another lane of its warp
// has touched only behind a __syncwarp or a barrier. Entries of the shadow are described in core.h.
#include "simt.h"

#include <stdio.h>

#include "machine.h"

namespace simt {

uint32_t static_shared(const void* site, const char* name, uint32_t bytes) {
  Machine& m = *cur.machine;
  for (const StaticArray& a : m.statics) {
    if (a.site == site) return a.at;
  }
  const uint32_t at = m.static_end;
  m.static_end = at + (bytes + 15) / 16 * 16;
  if (m.static_end - (cur.dynamic_bytes + 15) / 16 * 16 > kMaxStaticSharedBytes) {
    fault("more than 48 KiB of static shared memory: out of bounds at %s", name);
  }
  if (m.static_end > kMaxSharedBytes) fault("more than 227 KiB of shared memory: out of bounds at %s", name);
  m.statics.push_back({site, name, at, bytes});
  return at;
}

namespace {

// "byte 12 of scratch", "byte 4096 of dynamic shared memory".
struct Place {
  char text[96];
  explicit Place(uint32_t at) {
    for (const StaticArray& a : cur.machine->statics) {
      if (at - a.at < a.bytes) {
        snprintf(text, sizeof text, "byte %u of %s", at - a.at, a.name);
        return;
      }
    }
    snprintf(text, sizeof text, "byte %u of dynamic shared memory", at);
  }
};

}  // namespace

void shared_out_of_bounds(Access access, int32_t relative, uint32_t begin, int32_t size, uint32_t bytes) {
  for (const StaticArray& a : cur.machine->statics) {
    if (a.at == begin) {
      fault("%s %u bytes at byte %d of %s, which has %u: out of bounds", verb(access), bytes, relative, a.name, a.bytes);
    }
  }
  fault("%s %u bytes at byte %d behind byte %u of dynamic shared memory, which has %u: out of bounds", verb(access), bytes,
        relative, begin, begin + static_cast<uint32_t>(size));
}

void shared_misaligned(Access access, uint32_t at, uint32_t bytes) {
  fault("%s a vector of %u bytes at %s: misaligned", verb(access), bytes, Place(at).text);
}

void shared_byte(uint32_t at, bool write) {
  uint32_t& w = cur.shared_write[at / 2];
  if (w & kCopyPending)
    fault("%s %s, where a cp.async of thread %u is under way: before its wait", write ? "overwrites" : "reads", Place(at).text,
          w & kThreadMask);
  if (write) {
    w = cur.me;
  } else if (w < cur.start) {
    fault("reads unwritten shared memory: 1 byte at %s", Place(at).text);
  }
}

void shared_read_slow(uint32_t at, uint32_t bytes) {
  const uint32_t me = cur.me & ~kManyLanes, flags = cur.me & kManyLanes;
  uint32_t last_w = 0xffffffff, last_r = 0, last_now = 0;
  for (uint32_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    const uint32_t w = cur.shared_write[i];
    // Mostly like its neighbour.
    if (w == last_w && cur.shared_read[i] == last_r) {
      cur.shared_read[i] = last_now;
      continue;
    }
    last_w = w;
    last_r = cur.shared_read[i];
    if (w >= cur.barrier || w < cur.start) {
      if (w & kCopyPending)
        fault("reads %s, where a cp.async of thread %u is under way: before its wait", Place(2 * i).text, w & kThreadMask);
      if (w < cur.start) fault("reads unwritten shared memory: %u bytes at %s", bytes, Place(2 * i).text);
      if (((w ^ me) & kThreadMask) >> 5) {
        fault("write-read race: reads %s, which thread %u (warp %u) wrote with no __syncthreads since", Place(2 * i).text,
              w & kThreadMask, (w & kThreadMask) >> 5);
      }
      if (((w ^ me) & kThreadMask || flags) && w >> kPhaseShift == me >> kPhaseShift) {
        fault("write-read race within the warp: reads %s, which lane %u wrote with no __syncwarp since", Place(2 * i).text, w & 31);
      }
    }
    uint32_t& r = cur.shared_read[i];
    if (r < cur.barrier || r == me) {
      r = me | flags;
    } else if (r & kManyWarps) {
      // Nothing to add.
    } else if (((r ^ me) & kThreadMask) >> 5) {
      r |= kManyWarps;
    } else if (r >> kPhaseShift != me >> kPhaseShift) {
      r = me | flags;
    } else {
      r |= kManyLanes;
    }
    last_now = r;
  }
}

void shared_write_slow(uint32_t at, uint32_t bytes) {
  const uint32_t me = cur.me;
  for (uint32_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    const uint32_t w = cur.shared_write[i], r = cur.shared_read[i];
    if (w >= cur.barrier && w != me) {
      if (w & kCopyPending)
        fault("overwrites %s, where a cp.async of thread %u is under way: before its wait", Place(2 * i).text, w & kThreadMask);
      if (((w ^ me) & kThreadMask) >> 5) {
        fault("write-write race: writes %s, which thread %u (warp %u) wrote with no __syncthreads since", Place(2 * i).text,
              w & kThreadMask, (w & kThreadMask) >> 5);
      }
      if ((w ^ me) & kThreadMask && w >> kPhaseShift == me >> kPhaseShift) {
        fault("write-write race within the warp: writes %s, which lane %u wrote with no __syncwarp since", Place(2 * i).text,
              w & 31);
      }
    }
    if (r >= cur.barrier) {
      if (r & kManyWarps || ((r ^ me) & kThreadMask) >> 5) {
        fault("read-write race: writes %s, which thread %u (warp %u)%s read with no __syncthreads since", Place(2 * i).text,
              r & kThreadMask, (r & kThreadMask) >> 5, r & kManyWarps ? " and others" : "");
      }
      if ((r & kManyLanes || (r ^ me) & kThreadMask) && r >> kPhaseShift == me >> kPhaseShift) {
        fault("read-write race within the warp: writes %s, which lane %u%s read with no __syncwarp since", Place(2 * i).text,
              r & 31, r & kManyLanes ? " and others" : "");
      }
    }
    cur.shared_write[i] = me;
  }
}

void shared_atomic(uint32_t at, uint32_t bytes) {
  if (cur.shared_write[at / 2] < cur.start) fault("updates unwritten shared memory: %u bytes at %s", bytes, Place(at).text);
  for (uint32_t i = at / 2; i < (at + bytes) / 2; ++i) {
    // Atomics do not race with each other.
    const uint32_t w = cur.shared_write[i];
    if (!(w >= cur.barrier && !(w & kCopyPending) && w & kAtomic && cur.shared_read[i] < cur.barrier)) shared_write_slow(2 * i, 2);
    cur.shared_write[i] = cur.me | kAtomic;
  }
}

// ---- cp.async ---------------------------------------------------------------------------------------------------

void cp_async(SharedPlace dst, const void* src, const Range* range, bool valid) {
  dst.check_vector(Access::kWrite);
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) global_misaligned(Access::kRead, src, 16);
  const uint32_t at = dst.at;
  GlobalAccess::read<__uint128_t>(src, range);
  // The copy may land at any time from here on: it races with whatever a write here would race with.
  if (cur.shared_write[at / 2] & kCopyPending) {
    const uint32_t owner = cur.shared_write[at / 2] & kThreadMask;
    // Two copies to one place in flight, even by one thread, land in no particular order.
    fault("cp.async to byte %u of shared memory, where one of thread %u is still under way", at, owner);
  }
  shared_write_slow(at, 16);
  for (uint32_t i = 0; i < 8; ++i) cur.shared_write[at / 2 + i] = kCopyPending | cur.fiber->id;
  cur.fiber->copies.push_back({at, cur.fiber->copy_group, valid ? src : nullptr});
}

void cp_async_commit() { ++cur.fiber->copy_group; }

void cp_async_wait(uint32_t pending_groups) {
  Fiber& f = *cur.fiber;
  // Groups [0, copy_group) are committed; the last `pending_groups` of them may stay under way.
  const uint32_t landed = f.copy_group > pending_groups ? f.copy_group - pending_groups : 0;
  while (f.first_copy < f.copies.size() && f.copies[f.first_copy].group < landed) {
    const PendingCopy& copy = f.copies[f.first_copy++];
    if (copy.src) {
      __builtin_memcpy(cur.shared + copy.at, copy.src, 16);
    } else {
      __builtin_memset(cur.shared + copy.at, 0, 16);
    }
    for (uint32_t i = 0; i < 8; ++i) {
      cur.shared_write[copy.at / 2 + i] = cur.me;
      cur.shared_read[copy.at / 2 + i] = 0;
    }
  }
  if (f.first_copy == f.copies.size()) {
    f.copies.clear();
    f.first_copy = 0;
  }
}

// ---- CTAs -------------------------------------------------------------------------------------------------------

void begin_cta_shared(Machine& m) {
  if (m.next_phase > 1u << (30 - kPhaseShift)) {
    clear_shared(m);
  }
}

void end_cta_shared(Machine& m) {
  for (uint32_t i = 0; i < m.num_threads; ++i) {
    Fiber& f = m.fibers[i];
    for (size_t j = f.first_copy; j < f.copies.size(); ++j) {
      __builtin_memset(m.shared_write + f.copies[j].at / 2, 0, 8 * sizeof(uint32_t));
    }
  }
}

void clear_shared(Machine& m) {
  __builtin_memset(m.shared_write, 0, sizeof m.shared_write);
  __builtin_memset(m.shared_read, 0, sizeof m.shared_read);
  m.next_phase = 1;
}

}  // namespace simt

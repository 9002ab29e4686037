// simt.h -- the SIMT execution layer: runs the kernels of cuda/ on a CPU, every access to memory checked.
//
// A launch runs to its end on the calling thread, CTA after CTA. Each CUDA thread is a fiber; a warp runs until its lanes wait at a
// barrier or have ended. CTAs, warps and lanes come in the order that rksc_emu_set_order (control.h) asks for: results must not
// depend on it. Launches return 0, a cudaError_t where a GPU would refuse the launch, or RKSC_EMU_FAULT.
//
// What is reported
//   global memory   access outside the range registered (rksc_emu_register) where the view's pointer lay when global<T>() made it;
//                   null; vectors and elements off their alignment; writes to read-only ranges
//                   across CTAs of a launch: reading or overwriting what another CTA wrote, unless the writer did __threadfence, then
//                   (behind a barrier, or itself) an atomic, and this thread's CTA an atomic, then __threadfence; atomics are exempt
//                   within a CTA: reading or overwriting what another warp wrote with no __syncthreads since
//   shared memory   bounds of RKSC_SHARED arrays, of the launch's dynamic bytes, of 227 KiB; alignment; reads of what this CTA has not
//                   written; between warps: write-read, read-write, write-write with no __syncthreads between; between lanes of a
//                   warp: the same with no __syncwarp (over all live lanes) or __syncthreads between. A shuffle orders nothing, nor
//                   does mma; ldmatrix reads a row for all lanes. Tracked per 2 bytes; races between single bytes are not seen.
//   cp.async        its destination read or written, or its stage still being read by others, before the wait
//   collectives     __syncthreads that not all threads of the CTA reach; shuffles, votes, mma, ldmatrix that not all lanes of the
//                   mask reach, or reach as another operation; a shuffle from outside the mask. A stuck CTA is reported, never waited for.
// What is not: overwriting in global memory what another warp still reads (only the order's effect on results shows it); signed
// overflow and the like; pointers used without a view; endless loops without an atomic; speed.
//
// A report (rksc_emu_last_fault) names kernel, CTA, thread and what happened; its second line, pasted into a shell, names
// the lines (with -g1 and more):
//   row_sum_kernel<T>: CTA (0, 0, 0), thread (32, 0, 0), warp 1 lane 0: write-read race: reads byte 0 of scratch, which
//   thread 0 (warp 0) wrote with no __syncthreads since
//     at: addr2line -Cfipse target/debug/deps/kernels-... 0x3f43 0x6f71 ...
// In gdb: `break simt::fault` stops on the fiber that is at fault, `bt` shows the kernel, `p simt::cur.thread_idx` who it is; `break
// name_kernel if simt::cur.block_idx.x == 3 && simt::cur.thread_idx.x == 17` stops in one thread. printf works in kernels. A crash inside
// rksc_emu_switch or on a first push is an overflow of the 64 KiB stack.
//
// Where views are not pointers: `auto x = p[i]` is a proxy, name the type; a mutable view's element has no members (copy the struct out,
// assign it back); a template parameter gptr<const T> is not deduced from a gptr<T>; references to elements do not exist.
//
// Build as C++20 with -DRKSC_EMULATED -O2 -ffp-contract=off -Wno-unknown-pragmas (kernels: -x c++), cuda/host/*.cpp alongside.
//
// Cost, in ns on a 2.6 GHz x86-64 server core: a lane in a shuffle or a barrier 8 to 9 (switch included), a thread of an
// empty kernel 10, an empty launch 500; an element of shared memory 3 to 5, 16 bytes of it 7; an element of global memory 2 to 7 read and
// up to 15 written (lanes run one after the other, so a warp's coalesced access is strided here); mma_m16n8k16 of a warp 750,
// ldmatrix_x4 of a warp 1000.
#pragma once

#ifndef RKSC_EMULATED
#error "host/simt.h is for builds with RKSC_EMULATED"
#endif

#include "../../include/rksc_kernels.h"
#include "core.h"
#include "names.h"
#include "views.h"

namespace simt {

template <typename Params>
int32_t launch_kernel(const char* text, void (*kernel)(Params), dim3 grid, dim3 block, uint32_t shared_bytes, rksc_stream,
                      const Params& p) {
  return run(Launch{
      text,
      [](void (*k)(), const void* params) { reinterpret_cast<void (*)(Params)>(k)(*static_cast<const Params*>(params)); },
      reinterpret_cast<void (*)()>(kernel),
      &p,
      Index{grid.x, grid.y, grid.z},
      Index{block.x, block.y, block.z},
      shared_bytes,
  });
}

}  // namespace simt

// launch(kernel, grid, block, shared_bytes, stream, params): a macro, so that reports can name the kernel.
#define launch(...) ::simt::launch_kernel(#__VA_ARGS__, __VA_ARGS__)

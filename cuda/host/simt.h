// simt.h -- the SIMT execution layer: runs the kernels of cuda/ on a CPU, every memory access checked.
//
// Build kernel files and cuda/host/*.cpp as C++20 with
//   g++ -std=c++20 -O2 -ffp-contract=off -Wno-unknown-pragmas -DRKSC_EMULATED [-g] (kernels: -x c++ file.cu)
// Memory that kernels use is registered first (control.h: rksc_emu_register); launches then run to their end on the calling thread and
// return 0, a cudaError_t for a launch a GPU would refuse, or RKSC_EMU_FAULT: rksc_emu_last_fault() says what, where, which thread.
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

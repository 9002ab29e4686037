// main.cpp -- the SIMT emulation under the sanitizers of the C++ compiler: its own patterns, clean and with every fault planted
// (abandoned fibers and all), and one kernel over shapes and types, in the three orders. `.ci/run` has the command.
#include <stdio.h>

#include <initializer_list>
#include <vector>

#include "control.h"
#include "rksc_kernels.h"

namespace {

int clean, reported, wrong;

void patterns() {
  for (auto pattern : {rksc_emu_fault_rows, rksc_emu_fault_row_sum, rksc_emu_fault_reverse, rksc_emu_fault_rounds,
                       rksc_emu_fault_pipeline, rksc_emu_fault_split_sum, rksc_emu_fault_product}) {
    pattern(0) == 0 ? ++clean : ++wrong;
    for (int32_t n = 1, code; (code = pattern(n)) != -1; ++n) code == RKSC_EMU_FAULT ? ++reported : ++wrong;
  }
}

// Every buffer is an allocation of exactly its size: a byte beyond it is the compiler's to report, if the emulation does not.
void norm(uint32_t dtype, uint32_t hidden, uint32_t rows) {
  std::vector<float> x(rows * hidden, 0.5f), delta(rows * hidden, -2.0f), weight(hidden, 1.0f), similarity(rows);
  std::vector<char> y(rows * hidden * (dtype == RKSC_F32 ? 4 : 2));
  const auto enter = [](auto& v, bool read_only) { rksc_emu_register(v.data(), v.size() * sizeof v[0], read_only); };
  enter(x, false), enter(delta, true), enter(weight, true), enter(similarity, false), enter(y, false);
  rksc_add_rms_norm_params p{};
  p.x = x.data(), p.delta = delta.data(), p.weight = weight.data(), p.y = y.data(), p.similarity = similarity.data();
  p.num_rows = rows, p.hidden = hidden, p.dtype = dtype, p.eps = 1e-5f;
  rksc_emu_add_rms_norm(&p, nullptr) == 0 ? ++clean : ++wrong;
  for (const void* at : {static_cast<void*>(x.data()), static_cast<void*>(delta.data()), static_cast<void*>(weight.data()),
                         static_cast<void*>(similarity.data()), static_cast<void*>(y.data())}) {
    rksc_emu_unregister(at);
  }
}

}  // namespace

int main() {
  for (int32_t order : {RKSC_EMU_FORWARD, RKSC_EMU_BACKWARD, RKSC_EMU_SEEDED}) {
    rksc_emu_set_order(order, 7);
    patterns();
    for (uint32_t dtype : {RKSC_F32, RKSC_BF16, RKSC_F16}) {
      for (uint32_t hidden : {64, 192, 896, 4096}) {
        for (uint32_t rows : {1, 3, 17}) norm(dtype, hidden, rows);
      }
    }
  }
  printf("%d clean launches, %d planted faults reported, %d wrong\n", clean, reported, wrong);
  return wrong != 0 || reported != 3 * 30;
}

// exit_rows.cu -- which rows leave the backbone after a layer. Decided here, so that no layer waits for the host.
#include "common.cuh"

namespace {

constexpr uint32_t kThreads = 256;

// Of the rows [start, end) that decide, at most floor(share n) are not above tau. A NaN is not above.
RKSC_DEVICE bool enough_above(const rksc_exit_rows_params& p, uint32_t start, uint32_t end) {
  uint32_t not_above = 0;
  for (uint32_t row = start; row < end; ++row) {
    const float similarity = global<const float>(p.similarity)[row];
    not_above += similarity > p.tau ? 0u : 1u;
  }
  return not_above <= static_cast<uint32_t>(p.share * static_cast<float>(end - start));
}

RKSC_DEVICE bool fires(const rksc_exit_rows_params& p, uint32_t start, uint32_t end) {
  if (p.rule == RKSC_EXIT_ABOVE) return enough_above(p, start, end);
  return end - 1 >= p.offset && (end - 1 - p.offset) % p.every == 0;
}

// exit_rows
//   route[t] = layer where the gate fires for t and route[t] is infinite; RKSC_EXIT_ENTER: route[t] = infinity
//
//   exits       [num_rows, 2] u32   read: the rows that decide for the row; empty where the gate has no say
//   similarity  [num_rows] f32      read, RKSC_EXIT_ABOVE only
//   route       [num_rows] f32      read, written
//
// Work      one CTA; a thread decides for every kThreads-th row. A decoding row decides for itself; a prompt's rows all go over the
//           same range again, which L1 holds.
// Numerics  comparisons and counts: exact.
// Traffic   16 bytes a row.
// Bound     latency: a launch, a load or two, a barrier where the whole batch is asked.
// Limits    every > 0 where the rule has it.
// Oracle    gate::GateSpec::decide.   Bench  rksc-run bench kernels --op exit_rows
__global__ void __launch_bounds__(kThreads) exit_rows_kernel(const __grid_constant__ rksc_exit_rows_params p) {
  RKSC_SHARED(float, scratch, kThreads / 32);
  const gptr<const uint32_t> exits = global<const uint32_t>(p.exits);
  const gptr<float> route = global<float>(p.route);
  bool everyone = false;
  if (p.whole_batch != 0) {
    float staying = 0.0f;
    for (uint32_t row = threadIdx.x; row < p.num_rows; row += kThreads) {
      const uint32_t start = exits[2 * row], end = exits[2 * row + 1];
      if (start < end && !fires(p, start, end)) staying += 1.0f;
    }
    staying = warp_sum(staying);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = staying;
    // Every thread now needs what every warp found.
    __syncthreads();
    float all = 0.0f;
    for (uint32_t warp = 0; warp < kThreads / 32; ++warp) all += scratch[warp];
    if (all > 0.0f) return;
    everyone = true;
  }
  for (uint32_t row = threadIdx.x; row < p.num_rows; row += kThreads) {
    if (p.rule == RKSC_EXIT_ENTER) {
      route[row] = __uint_as_float(0x7f800000u);
      continue;
    }
    const uint32_t start = exits[2 * row], end = exits[2 * row + 1];
    if (start >= end) continue;
    const float left = route[row];
    const bool stays = left > 3.0e38f;  // infinite: still in the backbone
    if (stays && (everyone || fires(p, start, end))) route[row] = static_cast<float>(p.layer);
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(exit_rows)(const rksc_exit_rows_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->rule <= RKSC_EXIT_ABOVE);
  RKSC_REQUIRE(p->rule != RKSC_EXIT_EVERY_NTH || p->every > 0);
  RKSC_REQUIRE(p->rule != RKSC_EXIT_ABOVE || p->similarity != nullptr);
  RKSC_REQUIRE(p->rule == RKSC_EXIT_ENTER || p->exits != nullptr);
  if (p->num_rows == 0) return 0;
  return launch(exit_rows_kernel, dim3(1), dim3(kThreads), 0, stream, *p);
}

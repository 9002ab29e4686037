// faults.cu -- patterns of cuda/ in small, each clean (n = 0) and with one fault planted (n = 1, 2, ...), for the tests of the
// emulation itself. Built for the emulation alone.
//
// A launcher brings its own memory. It returns what the launch returned, or 1 where a clean pattern computed something wrong.
#include "../mma.cuh"

#include <vector>

namespace {

// Registered memory of a launcher. 16-byte aligned.
template <typename T>
class Memory {
 public:
  explicit Memory(size_t count, bool read_only = false) : data_(count) {
    for (size_t i = 0; i < count; ++i) data_[i] = static_cast<T>(i % 13);
    rksc_emu_register(data_.data(), count * sizeof(T), read_only);
  }
  ~Memory() { rksc_emu_unregister(data_.data()); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() { return data_.data(); }
  T& operator[](size_t i) { return data_[i]; }

 private:
  std::vector<T> data_;
};

struct Params {
  const float* x;
  float* y;
  uint32_t* counter;
  uint32_t width;
};

constexpr uint32_t kRows = 5, kThreads = 128, kWidth = 512;

// ---- rows: y = 2 x, one CTA a row, 16 bytes a thread ---------------------------------------------------------------

template <int n>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Params p) {
  const uint64_t row = static_cast<uint64_t>(blockIdx.x) * p.width;
  // 1: the first row begins one element early in x; 2: the last ends one vector late in y; 3: off by one element.
  const gptr<const float> x = global<const float>(p.x) + row - (n == 1 ? 4 : 0);
  const gptr<float> y = global<float>(p.y) + row + (n == 2 ? 4 : n == 3 ? 1 : 0);
  const uint32_t i = threadIdx.x * 4;
  vec<float, 4> v = load_vec<4>(x + i);
  for (int j = 0; j < 4; ++j) v[j] *= 2.0f;
  store_vec(y + i, v);
  // 4: the input is read-only.
  if (n == 4) global<float>(const_cast<float*>(p.x))[row] = 0.0f;
}

template <int n>
int32_t rows() {
  Memory<float> x(kRows * kWidth, true), y(kRows * kWidth);
  const Params p{x.data(), y.data(), nullptr, kWidth};
  const int32_t code = launch(rows_kernel<n>, dim3(kRows), dim3(kThreads), 0, nullptr, p);
  for (uint32_t i = 0; n == 0 && i < kRows * kWidth; ++i) {
    if (y[i] != 2.0f * x[i]) return 1;
  }
  return code;
}

// ---- row_sum: the CTA reduction of common.cuh, two rows one after the other ------------------------------------------

template <int n>
__global__ void __launch_bounds__(kThreads) row_sum_kernel(const __grid_constant__ Params p) {
  RKSC_SHARED(float, scratch, kThreads / 32);
  const gptr<const float> x = global<const float>(p.x);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (uint32_t row = 0; row < 2; ++row) {
    const float sum = warp_sum(x[row * kThreads + threadIdx.x]);
    // 3: every warp at the same place; 4: the last warp forgotten; 5: one place too far.
    const uint32_t place = n == 3 ? 0 : n == 5 ? warp + 1 : warp;
    if (lane == 0 && !(n == 4 && warp == kThreads / 32 - 1)) scratch[place] = sum;
    if (n != 1) __syncthreads();
    float total = 0.0f;
    for (uint32_t w = 0; w < kThreads / 32; ++w) total += scratch[w];
    if (threadIdx.x == 0) global<float>(p.y)[row] = total;
    // 2: the next row's sums may overwrite what other warps still read.
    if (n != 2) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
}

template <int n>
int32_t row_sum() {
  Memory<float> x(2 * kThreads), y(2);
  const Params p{x.data(), y.data(), nullptr, 0};
  const int32_t code = launch(row_sum_kernel<n>, dim3(1), dim3(kThreads), 0, nullptr, p);
  for (uint32_t row = 0; n == 0 && row < 2; ++row) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < kThreads; ++i) sum += x[row * kThreads + i];
    if (y[row] != sum) return 1;
  }
  return code;
}

// ---- reverse: lanes of a warp exchange through shared memory ---------------------------------------------------------

template <int n>
__global__ void __launch_bounds__(kThreads) reverse_kernel(const __grid_constant__ Params p) {
  const smem<float> mine = dynamic_shared<float>(threadIdx.x / 32 * 32 * static_cast<uint32_t>(sizeof(float)));
  const uint32_t lane = threadIdx.x % 32;
  float v = global<const float>(p.x)[threadIdx.x];
  for (uint32_t round = 0; round < 3; ++round) {
    mine[lane] = v;
    if (n != 1) __syncwarp();
    v = mine[31 - lane];
    if (n != 2) __syncwarp();
  }
  // 3: beyond what the launch asked for.
  if (n == 3) mine[32 * (kThreads / 32)] = v;
  global<float>(p.y)[threadIdx.x] = v;
}

template <int n>
int32_t reverse() {
  Memory<float> x(kThreads), y(kThreads);
  const Params p{x.data(), y.data(), nullptr, 0};
  const int32_t code = launch(reverse_kernel<n>, dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, p);
  for (uint32_t i = 0; n == 0 && i < kThreads; ++i) {
    if (y[i] != x[i / 32 * 32 + 31 - i % 32]) return 1;
  }
  return code;
}

// ---- rounds: barriers and collectives that all threads must reach -----------------------------------------------------

template <int n>
__global__ void __launch_bounds__(kThreads) rounds_kernel(const __grid_constant__ Params p) {
  RKSC_SHARED(float, scratch, kThreads);
  const uint32_t lane = threadIdx.x % 32;
  // 1: some threads have no row and leave; 2: one warp goes round once less.
  if (n == 1 && threadIdx.x >= 100) return;
  const uint32_t rounds = n == 2 && threadIdx.x >= 96 ? 2 : 3;
  float v = global<const float>(p.x)[threadIdx.x];
  for (uint32_t round = 0; round < rounds; ++round) {
    scratch[threadIdx.x] = v;
    __syncthreads();
    v += scratch[kThreads - 1 - threadIdx.x];
    __syncthreads();
  }
  // 3: half a warp takes part in a shuffle, the rest is at the barrier; 4: it has left; 5: it is in a ballot; 6: a lane
  // outside the mask is read.
  if (n == 3) {
    if (lane < 16) v += __shfl_xor_sync(kFullMask, v, 1);
    __syncthreads();
  }
  if (n == 4) {
    if (lane >= 16) return;
    v += __shfl_xor_sync(kFullMask, v, 1);
  }
  if (n == 5) {
    if (lane < 16) {
      v += __shfl_xor_sync(kFullMask, v, 1);
    } else {
      v += static_cast<float>(__ballot_sync(kFullMask, v > 0.0f));
    }
  }
  if (n == 6 && lane < 16) v += __shfl_xor_sync(0xffffu, v, 16);
  global<float>(p.y)[threadIdx.x] = v;
}

template <int n>
int32_t rounds() {
  Memory<float> x(kThreads), y(kThreads);
  const Params p{x.data(), y.data(), nullptr, 0};
  const int32_t code = launch(rounds_kernel<n>, dim3(1), dim3(kThreads), 0, nullptr, p);
  for (uint32_t i = 0; n == 0 && i < kThreads; ++i) {
    if (y[i] != 4.0f * (x[i] + x[kThreads - 1 - i])) return 1;
  }
  return code;
}

// ---- pipeline: tiles through two stages of cp.async, all threads reading all of a tile ----------------------------------

constexpr uint32_t kTiles = 6, kTile = 4 * kThreads;

template <int n>
__global__ void __launch_bounds__(kThreads) pipeline_kernel(const __grid_constant__ Params p) {
  const gptr<const float> x = global<const float>(p.x);
  const auto fetch = [&](uint32_t tile) {
    const smem<float> stage = dynamic_shared<float>(tile % 2 * kTile * static_cast<uint32_t>(sizeof(float)));
    if (tile < kTiles) cp_async_16(stage + threadIdx.x * 4, x + tile * kTile + threadIdx.x * 4, true);
    cp_async_commit();
  };
  fetch(0);
  float sum = 0.0f;
  for (uint32_t tile = 0; tile < kTiles; ++tile) {
    const smem<float> stage = dynamic_shared<float>(tile % 2 * kTile * static_cast<uint32_t>(sizeof(float)));
    fetch(tile + 1);
    // 1: waits for one group too few; 2: nobody waits for the other threads' copies; 3: overwrites a copy under way.
    if (n == 3) stage[threadIdx.x * 4] = 0.0f;
    cp_async_wait<n == 1 ? 2 : 1>();
    if (n != 2) __syncthreads();
    for (uint32_t i = 0; i < 4; ++i) sum += stage[threadIdx.x * 4 + i] - stage[kTile - 1 - (threadIdx.x * 4 + i)];
    // 4: the next fetch overwrites a stage that others still read.
    if (n != 4) __syncthreads();
  }
  global<float>(p.y)[threadIdx.x] = sum;
}

template <int n>
int32_t pipeline() {
  Memory<float> x(kTiles * kTile), y(kThreads);
  const Params p{x.data(), y.data(), nullptr, 0};
  const int32_t code = launch(pipeline_kernel<n>, dim3(1), dim3(kThreads), 2 * kTile * sizeof(float), nullptr, p);
  for (uint32_t t = 0; n == 0 && t < kThreads; ++t) {
    float sum = 0.0f;
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      for (uint32_t i = 0; i < 4; ++i) sum += x[tile * kTile + t * 4 + i] - x[tile * kTile + kTile - 1 - (t * 4 + i)];
    }
    if (y[t] != sum) return 1;
  }
  return code;
}

// ---- split_sum: partials of all CTAs, added up by the last to arrive ----------------------------------------------------

template <int n>
__global__ void __launch_bounds__(kThreads) split_sum_kernel(const __grid_constant__ Params p) {
  RKSC_SHARED(uint32_t, is_last, 1);
  const gptr<float> partial = global<float>(p.y) + kThreads;
  const gptr<uint32_t> counter = global<uint32_t>(p.counter);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  // 5: all CTAs write the same words.
  partial[n == 5 ? threadIdx.x : i] = global<const float>(p.x)[i];
  // 1: partials not fenced; 3: the counter may run ahead of other warps' partials.
  if (n != 1) __threadfence();
  if (n != 3) __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomic_add(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (is_last[0] == 0) return;
  // 2: partials read without a fence; 4: fenced by a thread that the readers do not wait for.
  if (n != 2 && (n != 4 || threadIdx.x == 0)) __threadfence();
  float sum = 0.0f;
  for (uint32_t cta = 0; cta < gridDim.x; ++cta) sum += partial[cta * kThreads + threadIdx.x];
  global<float>(p.y)[threadIdx.x] = sum;
  if (threadIdx.x == 0) counter[0] = 0;
}

template <int n>
int32_t split_sum() {
  Memory<float> x(kRows * kThreads), y((kRows + 1) * kThreads);
  Memory<uint32_t> counter(1);
  const Params p{x.data(), y.data(), counter.data(), 0};
  const int32_t code = launch(split_sum_kernel<n>, dim3(kRows), dim3(kThreads), 0, nullptr, p);
  for (uint32_t t = 0; n == 0 && t < kThreads; ++t) {
    float sum = 0.0f;
    for (uint32_t cta = 0; cta < kRows; ++cta) sum += x[cta * kThreads + t];
    if (y[t] != sum || counter[0] != 0) return 1;
  }
  return code;
}

// ---- product: one mma tile a warp from shared memory ---------------------------------------------------------------------

constexpr uint32_t kRow = 24;  // 16 elements and padding

template <int n>
__global__ void __launch_bounds__(64) product_kernel(const __grid_constant__ Params p) {
  RKSC_SHARED(bf16, a, 16 * kRow);
  RKSC_SHARED(bf16, b, 8 * kRow);  // [n, k]
  const gptr<const float> x = global<const float>(p.x);
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x; i < 16 * 16; i += 64) a[i / 16 * kRow + i % 16] = from_float<bf16>(x[i]);
  for (uint32_t i = threadIdx.x; i < 8 * 16; i += 64) b[i / 16 * kRow + i % 16] = from_float<bf16>(x[256 + i]);
  // 1: tiles not complete yet; 2: rows off their 16 bytes; 3: a row of padding is read.
  if (n != 1) __syncthreads();
  FragA fa;
  FragB fb;
  FragC fc = {};
  ldmatrix_x4(fa.r, a + ((lane % 16) * kRow + lane / 16 * 8 + (n == 2 ? 1 : 0)));
  ldmatrix_x2(fb.r, b + ((lane % 8) * kRow + lane / 8 % 2 * 8 + (n == 3 ? 8 : 0)));
  mma_m16n8k16<bf16>(fc, fa, fb);
  const gptr<float> y = global<float>(p.y) + threadIdx.x / 32 * 128;
  for (uint32_t i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = fc.v[i];
}

template <int n>
int32_t product() {
  Memory<float> x(256 + 128), y(2 * 128);
  const Params p{x.data(), y.data(), nullptr, 0};
  const int32_t code = launch(product_kernel<n>, dim3(1), dim3(64), 0, nullptr, p);
  for (uint32_t i = 0; n == 0 && i < 2 * 128; ++i) {
    float sum = 0.0f;
    for (uint32_t k = 0; k < 16; ++k) sum += x[i % 128 / 8 * 16 + k] * x[256 + i % 8 * 16 + k];
    if (y[i] != sum) return 1;
  }
  return code;
}

}  // namespace

// ---- launchers: one per pattern, n chooses the plant ------------------------------------------------------------------------

#define RKSC_PATTERN(name, last)                                    \
  template <int n>                                                  \
  static int32_t choose_##name(int32_t wanted) {                    \
    if (wanted == n) return name<n>();                              \
    if constexpr (n < last) return choose_##name<n + 1>(wanted);    \
    return -1;                                                      \
  }                                                                 \
  extern "C" int32_t rksc_emu_fault_##name(int32_t n) { return choose_##name<0>(n); }
RKSC_PATTERN(rows, 4)
RKSC_PATTERN(row_sum, 5)
RKSC_PATTERN(reverse, 3)
RKSC_PATTERN(rounds, 6)
RKSC_PATTERN(pipeline, 4)
RKSC_PATTERN(split_sum, 5)
RKSC_PATTERN(product, 3)

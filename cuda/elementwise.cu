// elementwise.cu -- embed, glu, gather_rows, gather_columns and softcap: rows that are read once, changed or moved, written
// once.
#include "common.cuh"

namespace {

constexpr uint32_t kThreads = 256;

// kWidth values as f32, as few vectors as they fit.
template <int kWidth>
RKSC_DEVICE void store_floats(gptr<float> to, const vec<float, kWidth>& x) {
  constexpr int kPart = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPart) {
    vec<float, kPart> part;
#pragma unroll
    for (int j = 0; j < kPart; ++j) part[j] = x[i + j];
    store_vec(to + i, part);
  }
}

template <int kWidth>
RKSC_DEVICE vec<float, kWidth> load_floats(gptr<const float> from) {
  constexpr int kPart = kWidth < 4 ? kWidth : 4;
  vec<float, kWidth> x;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPart) {
    const vec<float, kPart> part = load_vec<kPart>(from + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) x[i + j] = part[j];
  }
  return x;
}

// embed
//   x[t, i] = table[ids[t], i] * scale, widened to f32 first
//
//   table [vocab, hidden] T, ids [num_rows] u32   read
//   x     [num_rows, hidden] f32                  write
//
// Work      CTA = (row, kThreads vectors of it); a thread moves kWidth neighbours.
// Numerics  one f32 product, exact where scale is 1. An id at or past vocab yields NaN, which row_stats reports, and reads
//           nothing.
// Traffic   num_rows * hidden * (sizeof(T) + 4) bytes.
// Bound     memory; at decode sizes the launch.
// Limits    hidden > 0; rows of whole 16-byte vectors of T take the vector path, others move single elements.
// Oracle    the rows themselves (tests/kernels/cuda_elementwise.rs).   Bench  rksc-run bench kernels --op embed
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) embed_kernel(const __grid_constant__ rksc_embed_params p) {
  const uint32_t row = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (i >= p.hidden) return;
  const uint32_t id = global<const uint32_t>(p.ids)[row];
  vec<float, kWidth> x;
  if (id < p.vocab) {
    const vec<T, kWidth> from = load_vec<kWidth>(global<const T>(p.table) + static_cast<uint64_t>(id) * p.hidden + i);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = to_float(from[e]) * p.scale;
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = __uint_as_float(0x7fc00000u);
  }
  store_floats(global<float>(p.x) + static_cast<uint64_t>(row) * p.hidden + i, x);
}

// s of an activation that is g / (1 + e^-s).
template <rksc_activation kActivation>
RKSC_DEVICE float logit(float g) {
  if constexpr (kActivation == RKSC_SILU) return g;
  // 2 sqrt(2 / pi) (g + 0.044715 g^3), for (1 + tanh(z)) / 2 = 1 / (1 + e^-2z).
  return 1.5957691f * g * (1.0f + 0.044715f * g * g);
}

// glu
//   y[t, i] = g / (1 + e^-s) * u,  g = gate_up[t, i],  u = gate_up[t, intermediate + i]
//     s = g, which is silu(g) * u, or s = 2 sqrt(2 / pi) (g + 0.044715 g^3), which is gelu(g) * u in its form with tanh
//
//   gate_up [num_rows, 2 * intermediate] f32   read
//   y       [num_rows, intermediate] T         write
//
// Work      CTA = (row, kThreads vectors of it); a thread makes one 16-byte vector of y.
// Numerics  f32; e^-s may overflow to infinity, where the quotient is the right 0; one rounding to T.
// Traffic   num_rows * intermediate * (8 + sizeof(T)) bytes.
// Bound     memory: about 20 to 25 instructions an element against 10 or 12 bytes.
// Limits    activation is known; intermediate of whole 16-byte vectors of T takes the vector path, others single elements.
// Oracle    testing::oracle::glu.   Bench  rksc-run bench kernels --op glu
template <typename T, int kWidth, rksc_activation kActivation>
__global__ void __launch_bounds__(kThreads) glu_kernel(const __grid_constant__ rksc_glu_params p) {
  const uint32_t row = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (i >= p.intermediate) return;
  gptr<const float> gate = global<const float>(p.gate_up) + static_cast<uint64_t>(row) * 2 * p.intermediate + i;
  const vec<float, kWidth> g = load_floats<kWidth>(gate);
  const vec<float, kWidth> u = load_floats<kWidth>(gate + p.intermediate);
  vec<T, kWidth> y;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) y[e] = from_float<T>(g[e] / (1.0f + expf(-logit<kActivation>(g[e]))) * u[e]);
  store_vec(global<T>(p.y) + static_cast<uint64_t>(row) * p.intermediate + i, y);
}

// gather_rows
//   dst[i] = src[rows[i]]
//
//   rows [num_rows] u32, src [.., width] f32   read
//   dst  [num_rows, width] f32                 write, no overlap with src
//
// Work      CTA = (row, kThreads vectors of it).
// Numerics  exact.
// Traffic   8 * num_rows * width bytes.
// Bound     memory; at decode sizes the launch.
// Limits    none; width % 4 == 0 takes the vector path.
// Oracle    the rows themselves (tests/kernels/cuda_elementwise.rs).   Bench  rksc-run bench kernels --op gather_rows
template <int kWidth>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const __grid_constant__ rksc_gather_rows_params p) {
  const uint32_t row = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (i >= p.width) return;
  const uint32_t from = global<const uint32_t>(p.rows)[row];
  const vec<float, kWidth> x = load_vec<kWidth>(global<const float>(p.src) + static_cast<uint64_t>(from) * p.width + i);
  store_vec(global<float>(p.dst) + static_cast<uint64_t>(row) * p.width + i, x);
}

// softcap
//   logits[t, i] = cap * tanh(logits[t, i] / cap)
//
//   logits [num_rows, vocab] f32   read and written
//
// Work      CTA = (row, kThreads vectors of it).
// Numerics  f32, tanh within 2 ulp; NaN stays NaN, an infinity becomes cap.
// Traffic   8 * num_rows * vocab bytes.
// Bound     memory.
// Limits    cap > 0; vocab % 4 == 0 takes the vector path.
// Oracle    testing::oracle::softcap.   Bench  rksc-run bench kernels --op softcap
template <int kWidth>
__global__ void __launch_bounds__(kThreads) softcap_kernel(const __grid_constant__ rksc_softcap_params p) {
  const uint32_t row = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (i >= p.vocab) return;
  gptr<float> at = global<float>(p.logits) + static_cast<uint64_t>(row) * p.vocab + i;
  vec<float, kWidth> x = load_vec<kWidth>(at);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) x[e] = p.cap * tanhf(x[e] / p.cap);
  store_vec(at, x);
}

// gather_columns
//   dst[t, k] = src[t, columns[k]]
//
//   columns [width] u32, src [num_rows, width] T   read; every element of src once a row
//   dst     [num_rows, width] T                    write, no overlap with src
//
// Work      CTA = (row, kThreads vectors of it); a thread makes kWidth neighbours of dst.
// Numerics  exact.
// Traffic   4 * num_rows * width + 4 * width bytes, the columns from L2 after the first row.
// Bound     single elements of a row that lies in L1; at decode sizes the launch.
// Limits    T bf16 or f16; width % 8 == 0 takes the vector path.
// Oracle    the rows themselves (tests/kernels/cuda_elementwise.rs).   Bench  rksc-run bench kernels --op gather_columns
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) gather_columns_kernel(const __grid_constant__ rksc_gather_columns_params p) {
  const uint32_t row = blockIdx.x, i = (blockIdx.y * kThreads + threadIdx.x) * kWidth;
  if (i >= p.width) return;
  gptr<const uint32_t> columns = global<const uint32_t>(p.columns) + i;
  gptr<const T> src = global<const T>(p.src) + static_cast<uint64_t>(row) * p.width;
  vec<T, kWidth> x;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    const uint32_t column = columns[e];
    x[e] = src[column];
  }
  store_vec(global<T>(p.dst) + static_cast<uint64_t>(row) * p.width + i, x);
}

// Rows in x, where a grid may be large; a row's vectors in y.
dim3 grid_of(uint32_t num_rows, uint32_t width, uint32_t vector) { return dim3(num_rows, div_up(width, kThreads * vector)); }

template <rksc_activation kActivation>
int32_t launch_glu(const rksc_glu_params& p, rksc_stream stream) {
  return RKSC_DISPATCH_DTYPE(p.dtype, T, [&] {
    if (p.intermediate % kVec<T> == 0) {
      const dim3 grid = grid_of(p.num_rows, p.intermediate, kVec<T>);
      return launch(glu_kernel<T, kVec<T>, kActivation>, grid, dim3(kThreads), 0, stream, p);
    }
    return launch(glu_kernel<T, 1, kActivation>, grid_of(p.num_rows, p.intermediate, 1), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(embed)(const rksc_embed_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->hidden > 0);
  if (p->num_rows == 0) return 0;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    if (p->hidden % kVec<T> == 0) {
      return launch(embed_kernel<T, kVec<T>>, grid_of(p->num_rows, p->hidden, kVec<T>), dim3(kThreads), 0, stream, *p);
    }
    return launch(embed_kernel<T, 1>, grid_of(p->num_rows, p->hidden, 1), dim3(kThreads), 0, stream, *p);
  });
}

extern "C" int32_t RKSC_FN(glu)(const rksc_glu_params* p, rksc_stream stream) {
  if (p->num_rows == 0 || p->intermediate == 0) return 0;
  switch (p->activation) {
    case RKSC_SILU: return launch_glu<RKSC_SILU>(*p, stream);
    case RKSC_GELU_TANH: return launch_glu<RKSC_GELU_TANH>(*p, stream);
    default: return kInvalidValue;
  }
}

extern "C" int32_t RKSC_FN(gather_rows)(const rksc_gather_rows_params* p, rksc_stream stream) {
  if (p->num_rows == 0 || p->width == 0) return 0;
  if (p->width % 4 == 0) {
    return launch(gather_rows_kernel<4>, grid_of(p->num_rows, p->width, 4), dim3(kThreads), 0, stream, *p);
  }
  return launch(gather_rows_kernel<1>, grid_of(p->num_rows, p->width, 1), dim3(kThreads), 0, stream, *p);
}

extern "C" int32_t RKSC_FN(softcap)(const rksc_softcap_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->cap > 0.0f);
  if (p->num_rows == 0 || p->vocab == 0) return 0;
  if (p->vocab % 4 == 0) {
    return launch(softcap_kernel<4>, grid_of(p->num_rows, p->vocab, 4), dim3(kThreads), 0, stream, *p);
  }
  return launch(softcap_kernel<1>, grid_of(p->num_rows, p->vocab, 1), dim3(kThreads), 0, stream, *p);
}

extern "C" int32_t RKSC_FN(gather_columns)(const rksc_gather_columns_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->dtype == RKSC_BF16 || p->dtype == RKSC_F16);
  if (p->num_rows == 0 || p->width == 0) return 0;
  return RKSC_DISPATCH_DTYPE_16(p->dtype, T, [&] {
    if (p->width % kVec<T> == 0) {
      return launch(gather_columns_kernel<T, kVec<T>>, grid_of(p->num_rows, p->width, kVec<T>), dim3(kThreads), 0, stream, *p);
    }
    return launch(gather_columns_kernel<T, 1>, grid_of(p->num_rows, p->width, 1), dim3(kThreads), 0, stream, *p);
  });
}

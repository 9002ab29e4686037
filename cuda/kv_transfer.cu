// kv_transfer.cu -- K and V of slots for other positions.
#include "common.cuh"

namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kMaxHalf = 128;

// kv_transfer
//   for every transfer t, kv head h: V[t.dst, h] = V[t.src, h]; K[t.dst, h] is K[t.src, h] turned on, for i < D / 2 with
//   a = float(t.shift) * inv_freq[i], c = cos(a), s = sin(a):
//     y[i] = x[i] c - x[i + D / 2] s,   y[i + D / 2] = x[i + D / 2] c + x[i] s
//
//   transfers [num_transfers] {src, dst, shift}, inv_freq [D / 2] f32       read
//   k_cache, v_cache [num_blocks, num_kv_heads, block_size, head_dim] T     read at src, write at dst
//
// Work      CTA = transfer: a table of D / 2 cosines and sines once for all heads, then threads over (head, kWidth pairs), K
//           and V together so that four loads are under way before the first store.
// Numerics  the angle is one f32 product, cosine and sine of that f32 within 2 ulp for any shift; f32, one rounding to T.
//           V, and K where shift is 0, are copied bit for bit. Destinations are distinct and no source, so the order of CTAs
//           does not matter.
// Traffic   4 * num_kv_heads * head_dim * sizeof(T) bytes a transfer.
// Bound     memory; at the tokens of one prompt the launch.
// Limits    head_dim even, <= 256; head_dim % 8 == 0 takes the vector path (kWidth 4), others single pairs. Slots are in the
//           cache.
// Oracle    testing::oracle::turn.   Bench  rksc-run bench kernels --op kv_transfer
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kv_transfer_kernel(const __grid_constant__ rksc_kv_transfer_params p) {
  RKSC_SHARED(float, cosines, kMaxHalf);
  RKSC_SHARED(float, sines, kMaxHalf);
  const rksc_slot_transfer transfer = global<const rksc_slot_transfer>(p.transfers)[blockIdx.x];
  const uint32_t half = p.head_dim / 2;
  if (transfer.shift != 0) {
    const float shift = static_cast<float>(transfer.shift);
    for (uint32_t i = threadIdx.x; i < half; i += kThreads) {
      float sine, cosine;
      sincosf(shift * global<const float>(p.inv_freq)[i], &sine, &cosine);
      cosines[i] = cosine;
      sines[i] = sine;
    }
  }
  // Every head reads the whole table.
  __syncthreads();

  gptr<T> k = global<T>(p.k_cache), v = global<T>(p.v_cache);
  const uint32_t per_head = half / kWidth;
  for (uint32_t item = threadIdx.x; item < p.num_kv_heads * per_head; item += kThreads) {
    const uint32_t head = item / per_head, i = item % per_head * kWidth;
    const auto place = [&](uint32_t slot) {
      const uint64_t at = static_cast<uint64_t>(slot / p.block_size) * p.num_kv_heads + head;
      return (at * p.block_size + slot % p.block_size) * p.head_dim + i;
    };
    const uint64_t from = place(transfer.src), to = place(transfer.dst);
    vec<T, kWidth> low = load_vec<kWidth>(k + from), high = load_vec<kWidth>(k + from + half);
    const vec<T, kWidth> v_low = load_vec<kWidth>(v + from), v_high = load_vec<kWidth>(v + from + half);
    store_vec(v + to, v_low);
    store_vec(v + to + half, v_high);
    if (transfer.shift != 0) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float a = to_float(low[e]), b = to_float(high[e]), c = cosines[i + e], s = sines[i + e];
        low[e] = from_float<T>(a * c - b * s);
        high[e] = from_float<T>(b * c + a * s);
      }
    }
    store_vec(k + to, low);
    store_vec(k + to + half, high);
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(kv_transfer)(const rksc_kv_transfer_params* p, rksc_stream stream) {
  RKSC_REQUIRE(p->head_dim > 0 && p->head_dim % 2 == 0 && p->head_dim <= 2 * kMaxHalf);
  RKSC_REQUIRE(p->num_kv_heads > 0 && p->block_size > 0);
  if (p->num_transfers == 0) return 0;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    const dim3 grid(p->num_transfers);
    if (p->head_dim % 8 == 0) return launch(kv_transfer_kernel<T, 4>, grid, dim3(kThreads), 0, stream, *p);
    return launch(kv_transfer_kernel<T, 1>, grid, dim3(kThreads), 0, stream, *p);
  });
}

// kv_transfer.cu -- K and V of slots for other positions.
#include "common.cuh"
#include "rotary.cuh"

namespace {

constexpr uint32_t kThreads = 128;

// kv_transfer
//   for every transfer t, kv head h: V[t.dst, h] = V[t.src, h]; K[t.dst, h] is K[t.src, h] turned on, for i < R / 2 with
//   R = rotary_dim, a = float(t.shift) * inv_freq[i], c = cos(a), s = sin(a):
//     y[i] = x[i] c - x[i + R / 2] s,   y[i + R / 2] = x[i + R / 2] c + x[i] s;   elements from R on as they are
//
//   transfers [num_transfers] {src, dst, shift}, inv_freq [R / 2] f32       read
//   k_cache, v_cache [num_blocks, num_kv_heads, block_size, head_dim] T     read at src, write at dst
//
// Work      CTA = transfer: a table of R / 2 cosines and sines once for all heads, then threads over (head, kWidth pairs), K
//           and V together so that four loads are under way before the first store.
// Numerics  the angle is one f32 product, cosine and sine of that f32 within 2 ulp for any shift; f32, one rounding to T.
//           V, K from R on, and K where shift is 0, are copied bit for bit. Destinations are distinct and no source, so the
//           order of CTAs does not matter.
// Traffic   4 * num_kv_heads * head_dim * sizeof(T) bytes a transfer.
// Bound     memory; at the tokens of one prompt the launch.
// Limits    head_dim and rotary_dim even, rotary_dim <= head_dim <= 256; both % 8 == 0 takes the vector path (kWidth 4), others
//           single pairs. Slots are in the cache.
// Oracle    testing::oracle::turn.   Bench  rksc-run bench kernels --op kv_transfer
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) kv_transfer_kernel(const __grid_constant__ rksc_kv_transfer_params p) {
  RKSC_SHARED(float, cosines, kMaxPairs);
  RKSC_SHARED(float, sines, kMaxPairs);
  const rksc_slot_transfer transfer = global<const rksc_slot_transfer>(p.transfers)[blockIdx.x];
  const HeadPairs pairs(p.head_dim, p.rotary_dim);
  if (transfer.shift != 0) {
    const float shift = static_cast<float>(transfer.shift);
    for (uint32_t i = threadIdx.x; i < pairs.turned; i += kThreads) {
      float sine, cosine;
      sincosf(shift * global<const float>(p.inv_freq)[i], &sine, &cosine);
      cosines[i] = cosine;
      sines[i] = sine;
    }
  }
  // Every head reads the whole table.
  __syncthreads();

  gptr<T> k = global<T>(p.k_cache), v = global<T>(p.v_cache);
  const uint32_t per_head = pairs.all / kWidth;
  for (uint32_t item = threadIdx.x; item < p.num_kv_heads * per_head; item += kThreads) {
    const uint32_t head = item / per_head, i = item % per_head * kWidth, apart = pairs.high(i) - pairs.low(i);
    const auto place = [&](uint32_t slot) {
      const uint64_t at = static_cast<uint64_t>(slot / p.block_size) * p.num_kv_heads + head;
      return (at * p.block_size + slot % p.block_size) * p.head_dim + pairs.low(i);
    };
    const uint64_t from = place(transfer.src), to = place(transfer.dst);
    vec<T, kWidth> low = load_vec<kWidth>(k + from), high = load_vec<kWidth>(k + from + apart);
    const vec<T, kWidth> v_low = load_vec<kWidth>(v + from), v_high = load_vec<kWidth>(v + from + apart);
    store_vec(v + to, v_low);
    store_vec(v + to + apart, v_high);
    if (transfer.shift != 0 && i < pairs.turned) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float a = to_float(low[e]), b = to_float(high[e]), c = cosines[i + e], s = sines[i + e];
        low[e] = from_float<T>(a * c - b * s);
        high[e] = from_float<T>(b * c + a * s);
      }
    }
    store_vec(k + to, low);
    store_vec(k + to + apart, high);
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------------------

extern "C" int32_t RKSC_FN(kv_transfer)(const rksc_kv_transfer_params* p, rksc_stream stream) {
  RKSC_REQUIRE(can_rotate(p->head_dim, p->rotary_dim));
  RKSC_REQUIRE(p->num_kv_heads > 0 && p->block_size > 0);
  if (p->num_transfers == 0) return 0;
  return RKSC_DISPATCH_DTYPE(p->dtype, T, [&] {
    const dim3 grid(p->num_transfers);
    if (pairs_in_fours(p->head_dim, p->rotary_dim)) return launch(kv_transfer_kernel<T, 4>, grid, dim3(kThreads), 0, stream, *p);
    return launch(kv_transfer_kernel<T, 1>, grid, dim3(kThreads), 0, stream, *p);
  });
}

// mma.h -- the emulated side of mma.cuh. A collective is computed for all 32 lanes by the last to arrive.
//
// Arithmetic of mma_m16n8k16: products are exact (16-bit factors in f32), the eight of k = 0..7 are added in ascending k in f32,
// the sum is added to c, then the same for k = 8..15. A tensor core keeps a few more bits within such a group and truncates
// where this rounds; tolerances cover either.
#pragma once

template <typename T>
SIMT_INLINE void mma_m16n8k16(FragC& c, const FragA& a, const FragB& b) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  simt::mma(std::is_same_v<T, bf16> ? simt::Collective::kMmaBf16 : simt::Collective::kMmaF16, c.v, a.r, b.r);
}

namespace simt {
template <typename T>
SIMT_INLINE void ldmatrix_row(Collective op, uint32_t* r, const smem<T>& row) {
  static_assert(sizeof(T) == 2);
  ldmatrix(op, r, row.place());
}
}  // namespace simt

// Twice each, so that T may be deduced or given whether the view is const or not.
#define SIMT_LDMATRIX(name, count, op)                            \
  template <typename T>                                           \
  SIMT_INLINE void name(uint32_t(&r)[count], smem<T> row) {       \
    simt::ldmatrix_row(simt::Collective::op, r, row);             \
  }                                                               \
  template <typename T>                                           \
  SIMT_INLINE void name(uint32_t(&r)[count], smem<const T> row) { \
    simt::ldmatrix_row(simt::Collective::op, r, row);             \
  }
SIMT_LDMATRIX(ldmatrix_x2, 2, kLdmatrix2)
SIMT_LDMATRIX(ldmatrix_x2_trans, 2, kLdmatrix2Trans)
SIMT_LDMATRIX(ldmatrix_x4, 4, kLdmatrix4)
SIMT_LDMATRIX(ldmatrix_x4_trans, 4, kLdmatrix4Trans)
#undef SIMT_LDMATRIX

// The destination is off limits until cp_async_wait. `src` is checked whether or not it is valid.
template <typename T, typename S>
SIMT_INLINE void cp_async_16(smem<T> dst, gptr<S> src, bool valid) {
  static_assert(std::is_same_v<T, std::remove_const_t<S>>);
  simt::cp_async(dst.place(), src.raw(), src.range(), valid);
}
SIMT_INLINE void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
SIMT_INLINE void cp_async_wait() {
  static_assert(N >= 0);
  simt::cp_async_wait(N);
}

//! Eight lanes: AVX2, FMA and F16C.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Vector, exp2_poly};

/// Exists only inside [`run`]: holding one means that the instructions are there.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

const N: usize = 8;

/// Runs a kernel with the instructions enabled.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2(()))
}

/// Rounds to bf16 as bits in the high halves, denormals and NaN included.
#[inline]
#[target_feature(enable = "avx2")]
fn round_bits(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    let kept = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm256_and_si256(kept, _mm256_set1_epi32(0xffff_0000_u32 as i32))
}

/// The bf16 of `a` then `b` in memory order.
#[inline]
#[target_feature(enable = "avx2")]
fn pack(a: __m256i, b: __m256i) -> __m256i {
    let x = _mm256_packus_epi32(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn reduce_add(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn reduce_max(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// 2^n * p where x is not below -126, else 0.
#[inline]
#[target_feature(enable = "avx2")]
fn scale(x: __m256, p: __m256, n: __m256) -> __m256 {
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    let scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)));
    _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(-126.0)))
}

/// # Safety
/// 8 rows of 8 words, `src_stride` words apart at `src` and `dst_stride` apart at `dst`, are inside their buffers.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    for half in 0..2 {
        let mut a = [_mm256_setzero_ps(); 4];
        for (r, a) in a.iter_mut().enumerate() {
            // SAFETY: rows r and r + 4, words 4 half..4 half + 4, inside the 8 x 8 words promised.
            unsafe {
                let at = src.add(r * src_stride + 4 * half);
                let x = _mm256_castps128_ps256(_mm_loadu_ps(at));
                *a = _mm256_insertf128_ps::<1>(x, _mm_loadu_ps(at.add(4 * src_stride)));
            }
        }
        let t0 = _mm256_unpacklo_ps(a[0], a[1]);
        let t1 = _mm256_unpackhi_ps(a[0], a[1]);
        let t2 = _mm256_unpacklo_ps(a[2], a[3]);
        let t3 = _mm256_unpackhi_ps(a[2], a[3]);
        let cols = [
            _mm256_shuffle_ps::<0b01_00_01_00>(t0, t2),
            _mm256_shuffle_ps::<0b11_10_11_10>(t0, t2),
            _mm256_shuffle_ps::<0b01_00_01_00>(t1, t3),
            _mm256_shuffle_ps::<0b11_10_11_10>(t1, t3),
        ];
        for (i, col) in cols.into_iter().enumerate() {
            // SAFETY: row 4 half + i < 8 of the destination.
            unsafe { _mm256_storeu_ps(dst.add((4 * half + i) * dst_stride), col) };
        }
    }
}

// SAFETY of every block below: an `Avx2` exists only where the instructions are enabled, and every pointer comes from a
// slice cut to the length that the instruction touches.
impl Vector for Avx2 {
    const LANES: usize = N;
    const QUERIES: usize = 2;
    const PAIRS: bool = false;
    type F = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(src[..N].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m256, dst: &mut [f32]) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(dst[..N].as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let x = _mm_loadu_si128(src[..N].as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: __m256, dst: &mut [bf16]) {
        // SAFETY: see above.
        unsafe {
            let x = round_bits(x);
            _mm_storeu_si128(dst[..N].as_mut_ptr().cast(), _mm256_castsi256_si128(pack(x, x)));
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src[..N].as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, x: __m256, dst: &mut [f16]) {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm_storeu_si128(dst[..N].as_mut_ptr().cast(), x);
        }
    }
    #[inline(always)]
    fn round_bf16(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(round_bits(x)) }
    }
    #[inline(always)]
    fn round_f16(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
    }
    #[inline(always)]
    fn select_nonneg(self, sign: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_GE_OQ>(sign, _mm256_setzero_ps())) }
    }
    #[inline(always)]
    fn keep_first(self, n: usize, x: __m256, other: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(N) as i32), lane);
            _mm256_blendv_ps(other, x, _mm256_castsi256_ps(keep))
        }
    }
    #[inline(always)]
    fn exp2(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        let (n, r) = unsafe {
            let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            (n, _mm256_sub_ps(x, n))
        };
        let p = exp2_poly(self, r);
        // SAFETY: see above.
        unsafe { scale(x, p, n) }
    }
    #[inline(always)]
    fn reduce_add(self, x: __m256) -> f32 {
        // SAFETY: see above.
        unsafe { reduce_add(x) }
    }
    #[inline(always)]
    fn reduce_max(self, x: __m256) -> f32 {
        // SAFETY: see above.
        unsafe { reduce_max(x) }
    }

    #[inline(always)]
    fn dot_bf16(self, acc: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let (ai, bi) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let (ah, bh) = (_mm256_and_si256(ai, high), _mm256_and_si256(bi, high));
            let (al, bl) = (_mm256_slli_epi32::<16>(ai), _mm256_slli_epi32::<16>(bi));
            let acc = _mm256_fmadd_ps(_mm256_castsi256_ps(al), _mm256_castsi256_ps(bl), acc);
            _mm256_fmadd_ps(_mm256_castsi256_ps(ah), _mm256_castsi256_ps(bh), acc)
        }
    }
    #[inline(always)]
    fn pack_bf16(self, a: __m256, b: __m256, dst: &mut [u32]) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(dst[..N].as_mut_ptr().cast(), pack(round_bits(a), round_bits(b))) }
    }
    #[inline(always)]
    fn low_half(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0xffff))) }
    }
    #[inline(always)]
    fn high_half(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), high))
        }
    }
    #[inline(always)]
    fn transpose(self, src: &[u32], src_stride: usize, dst: &mut [u32], dst_stride: usize) {
        let src = &src[..(N - 1) * src_stride + N];
        let dst = &mut dst[..(N - 1) * dst_stride + N];
        // SAFETY: see above; both slices were cut to the 8 rows.
        unsafe { transpose(src.as_ptr().cast(), src_stride, dst.as_mut_ptr().cast(), dst_stride) }
    }
}

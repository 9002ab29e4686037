//! Sixteen lanes: AVX-512 F, BW, VL, DQ and BF16.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Vector, exp2_poly};

/// Exists only inside [`run`]: holding one means that the instructions are there.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

const N: usize = 16;

/// Runs a kernel with the instructions enabled.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512(()))
}

/// Rounds to bf16 as bits in the high halves, denormals and NaN included (the instruction flushes denormals).
#[inline]
#[target_feature(enable = "avx512f")]
fn round_bits(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000));
    _mm512_and_si512(kept, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

/// The low eight lanes added to the high eight, down to one.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn reduce_add(x: __m512) -> f32 {
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn reduce_max(x: __m512) -> f32 {
    let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// 2^n * p where x is not below -126, else 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale(x: __m512, p: __m512, n: __m512) -> __m512 {
    let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    _mm512_maskz_scalef_ps(keep, p, n)
}

/// # Safety
/// 16 rows of 16 words, `src_stride` words apart at `src` and `dst_stride` apart at `dst`, are inside their buffers.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn transpose(src: *const u32, src_stride: usize, dst: *mut u32, dst_stride: usize) {
    let mut a = [_mm512_setzero_si512(); N];
    for (i, a) in a.iter_mut().enumerate() {
        // Rows i, i+4, i+8, i+12 quarter by quarter: lane quarter q of a[4 * c + r] is words 4c..4c+4 of row 4q + r.
        let (c, r) = (i / 4, i % 4);
        // SAFETY: rows r, r + 4, r + 8, r + 12 and words 4c..4c + 4 lie inside the 16 x 16 words promised.
        unsafe {
            let at = src.add(r * src_stride + 4 * c);
            let x = _mm512_castsi128_si512(_mm_loadu_si128(at.cast()));
            let x = _mm512_inserti32x4::<1>(x, _mm_loadu_si128(at.add(4 * src_stride).cast()));
            let x = _mm512_inserti32x4::<2>(x, _mm_loadu_si128(at.add(8 * src_stride).cast()));
            *a = _mm512_inserti32x4::<3>(x, _mm_loadu_si128(at.add(12 * src_stride).cast()));
        }
    }
    for c in 0..4 {
        let t0 = _mm512_unpacklo_epi32(a[4 * c], a[4 * c + 1]);
        let t1 = _mm512_unpackhi_epi32(a[4 * c], a[4 * c + 1]);
        let t2 = _mm512_unpacklo_epi32(a[4 * c + 2], a[4 * c + 3]);
        let t3 = _mm512_unpackhi_epi32(a[4 * c + 2], a[4 * c + 3]);
        let cols = [
            _mm512_unpacklo_epi64(t0, t2),
            _mm512_unpackhi_epi64(t0, t2),
            _mm512_unpacklo_epi64(t1, t3),
            _mm512_unpackhi_epi64(t1, t3),
        ];
        for (i, col) in cols.into_iter().enumerate() {
            // SAFETY: row 4c + i < 16 of the destination.
            unsafe { _mm512_storeu_si512(dst.add((4 * c + i) * dst_stride).cast(), col) };
        }
    }
}

/// Words `(a[i], b[i])` of 32 elements each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn zip(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    let lo = _mm512_unpacklo_epi16(a, b);
    let hi = _mm512_unpackhi_epi16(a, b);
    let first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    let second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    (_mm512_permutex2var_epi64(lo, first, hi), _mm512_permutex2var_epi64(lo, second, hi))
}

// SAFETY of every block below: an `Avx512` exists only where the instructions are enabled, and every pointer comes from a
// slice cut to the length that the instruction touches.
impl Vector for Avx512 {
    const LANES: usize = N;
    const QUERIES: usize = 4;
    const PAIRS: bool = true;
    type F = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn splat_word(self, x: u32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(x as i32)) }
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(src[..N].as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, dst: &mut [f32]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(dst[..N].as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_loadu_si256(src[..N].as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: __m512, dst: &mut [bf16]) {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round_bits(x)));
            _mm256_storeu_si256(dst[..N].as_mut_ptr().cast(), x);
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src[..N].as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, x: __m512, dst: &mut [f16]) {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            _mm256_storeu_si256(dst[..N].as_mut_ptr().cast(), x);
        }
    }
    #[inline(always)]
    fn round_bf16(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(round_bits(x)) }
    }
    #[inline(always)]
    fn round_f16(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_abs_ps(x) }
    }
    #[inline(always)]
    fn select_nonneg(self, sign: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(sign, _mm512_setzero_ps()), a) }
    }
    #[inline(always)]
    fn keep_first(self, n: usize, x: __m512, other: __m512) -> __m512 {
        let mask = if n >= N { u16::MAX } else { (1 << n) - 1 };
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(other, mask, x) }
    }
    #[inline(always)]
    fn exp2(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        let (n, r) = unsafe {
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            (n, _mm512_sub_ps(x, n))
        };
        let p = exp2_poly(self, r);
        // SAFETY: see above.
        unsafe { scale(x, p, n) }
    }
    #[inline(always)]
    fn reduce_add(self, x: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { reduce_add(x) }
    }
    #[inline(always)]
    fn reduce_max(self, x: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { reduce_max(x) }
    }

    #[inline(always)]
    fn dot_bf16(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above; the transmutes only rename the 512 bits.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }
    #[inline(always)]
    fn pack_bf16(self, a: __m512, b: __m512, dst: &mut [u32]) {
        // SAFETY: see above; the transmute only renames the 512 bits.
        unsafe {
            let words = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
            _mm512_storeu_si512(dst[..N].as_mut_ptr().cast(), words);
        }
    }
    #[inline(always)]
    fn low_half(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff))) }
    }
    #[inline(always)]
    fn high_half(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), high))
        }
    }
    #[inline(always)]
    fn zip_bf16(self, a: &[bf16], b: &[bf16], dst: &mut [u32]) {
        let dst = &mut dst[..2 * N];
        // SAFETY: see above.
        unsafe {
            let a = _mm512_loadu_si512(a[..2 * N].as_ptr().cast());
            let b = _mm512_loadu_si512(b[..2 * N].as_ptr().cast());
            let (x, y) = zip(a, b);
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), x);
            _mm512_storeu_si512(dst[N..].as_mut_ptr().cast(), y);
        }
    }
    #[inline(always)]
    fn transpose(self, src: &[u32], src_stride: usize, dst: &mut [u32], dst_stride: usize) {
        let src = &src[..(N - 1) * src_stride + N];
        let dst = &mut dst[..(N - 1) * dst_stride + N];
        // SAFETY: see above; both slices were cut to the 16 rows.
        unsafe { transpose(src.as_ptr(), src_stride, dst.as_mut_ptr(), dst_stride) }
    }
}

//! `linear` with AVX-512: bf16 dot products, or FMA on widened elements; 16 partial sums along k.
//!
//! One kernel call makes `R x N` sums, a register each. Few rows: `R` is all of them, and every row of W is read once.
//! Many rows: W is taken in pieces that stay in the L2 while the rows pass over them, four at a time.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Job, Output};

/// A multiple of every `N` below, so that threads begin at whole blocks.
pub(super) const GRAIN: usize = 24;
/// Rows of W that stay in the L2 while all rows of x pass over them.
const RESIDENT_BYTES: usize = 512 << 10;

/// One pair of element types: how to load and how to multiply.
trait Dot {
    type X: Copy;
    type W: Copy;
    /// Elements of k in one register.
    const STEP: usize;
    type V: Copy;

    /// # Safety
    /// `STEP` elements can be read at `p`.
    unsafe fn load_x(p: *const Self::X) -> Self::V;
    /// # Safety
    /// `len < STEP` elements can be read at `p`; the rest becomes zero.
    unsafe fn load_x_tail(p: *const Self::X, len: usize) -> Self::V;
    /// # Safety
    /// As [`load_x`](Self::load_x).
    unsafe fn load_w(p: *const Self::W) -> Self::V;
    /// # Safety
    /// As [`load_x_tail`](Self::load_x_tail).
    unsafe fn load_w_tail(p: *const Self::W, len: usize) -> Self::V;
    /// # Safety
    /// AVX-512 with bf16 is there.
    unsafe fn mul_add(x: Self::V, w: Self::V, acc: __m512) -> __m512;
}

/// bf16 x bf16.
struct DotBf16;

impl Dot for DotBf16 {
    type X = bf16;
    type W = bf16;
    const STEP: usize = 32;
    type V = __m512i;

    #[inline(always)]
    unsafe fn load_x(p: *const bf16) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_x_tail(p: *const bf16, len: usize) -> __m512i {
        // SAFETY: as the trait demands; masked elements are not touched.
        unsafe { _mm512_maskz_loadu_epi16((1u32 << len) - 1, p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_w(p: *const bf16) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { Self::load_x(p) }
    }
    #[inline(always)]
    unsafe fn load_w_tail(p: *const bf16, len: usize) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { Self::load_x_tail(p, len) }
    }
    #[inline(always)]
    unsafe fn mul_add(x: __m512i, w: __m512i, acc: __m512) -> __m512 {
        // SAFETY: as the trait demands; both types are 64 plain bytes.
        unsafe {
            _mm512_dpbf16_ps(
                acc,
                std::mem::transmute::<__m512i, __m512bh>(x),
                std::mem::transmute::<__m512i, __m512bh>(w),
            )
        }
    }
}

/// How 16 elements of W become f32, exactly.
pub(super) trait Widen: Copy {
    /// # Safety
    /// 16 elements can be read at `p`.
    unsafe fn load16(p: *const Self) -> __m512;
    /// # Safety
    /// `len < 16` elements can be read at `p`; the rest becomes zero.
    unsafe fn load16_tail(p: *const Self, len: usize) -> __m512;
}

impl Widen for f32 {
    #[inline(always)]
    unsafe fn load16(p: *const f32) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load16_tail(p: *const f32, len: usize) -> __m512 {
        // SAFETY: as the trait demands; masked elements are not touched.
        unsafe { _mm512_maskz_loadu_ps((1u16 << len) - 1, p) }
    }
}

impl Widen for bf16 {
    #[inline(always)]
    unsafe fn load16(p: *const bf16) -> __m512 {
        // SAFETY: as the trait demands. A bf16 is the upper half of its f32.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load16_tail(p: *const bf16, len: usize) -> __m512 {
        // SAFETY: as the trait demands; masked elements are not touched.
        unsafe {
            let bits = _mm256_maskz_loadu_epi16((1u16 << len) - 1, p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }
}

impl Widen for f16 {
    #[inline(always)]
    unsafe fn load16(p: *const f16) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load16_tail(p: *const f16, len: usize) -> __m512 {
        // SAFETY: as the trait demands; masked elements are not touched.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u16 << len) - 1, p.cast())) }
    }
}

/// f32 x widened W.
struct DotF32<W>(std::marker::PhantomData<W>);

impl<W: Widen> Dot for DotF32<W> {
    type X = f32;
    type W = W;
    const STEP: usize = 16;
    type V = __m512;

    #[inline(always)]
    unsafe fn load_x(p: *const f32) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { f32::load16(p) }
    }
    #[inline(always)]
    unsafe fn load_x_tail(p: *const f32, len: usize) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { f32::load16_tail(p, len) }
    }
    #[inline(always)]
    unsafe fn load_w(p: *const W) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { W::load16(p) }
    }
    #[inline(always)]
    unsafe fn load_w_tail(p: *const W, len: usize) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { W::load16_tail(p, len) }
    }
    #[inline(always)]
    unsafe fn mul_add(x: __m512, w: __m512, acc: __m512) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_fmadd_ps(x, w, acc) }
    }
}

/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; the calling thread owns the outputs of `job`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn multiply_bf16(job: &Job<'_, bf16, bf16>) {
    // SAFETY: handed on to the caller.
    unsafe { multiply::<DotBf16>(job) }
}

/// # Safety
/// As [`multiply_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn multiply_f32<W: Widen>(job: &Job<'_, f32, W>) {
    // SAFETY: handed on to the caller.
    unsafe { multiply::<DotF32<W>>(job) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn multiply<D: Dot>(job: &Job<'_, D::X, D::W>) {
    let resident = (RESIDENT_BYTES / (job.in_features * size_of::<D::W>()).max(1) / GRAIN).max(1) * GRAIN;
    let resident = if job.rows <= 8 { job.num_outs.max(1) } else { resident };
    for first in (0..job.num_outs).step_by(resident) {
        let end = job.num_outs.min(first + resident);
        // SAFETY: handed on to the caller.
        unsafe {
            match job.rows {
                0 => {}
                1 => sweep::<D, 1, 8>(job, 0, first, end),
                2 => sweep::<D, 2, 8>(job, 0, first, end),
                3 | 4 => sweep::<D, 4, 6>(job, 0, first, end),
                5..=8 => sweep::<D, 8, 3>(job, 0, first, end),
                rows => (0..rows).step_by(4).for_each(|row| sweep::<D, 4, 6>(job, row, first, end)),
            }
        }
    }
}

/// Where rows `first..first + len` of `elems` (`[_, k]`) begin; the last one again for those past `len`.
#[inline]
fn starts<T, const N: usize>(elems: &[T], k: usize, first: usize, len: usize) -> [*const T; N] {
    std::array::from_fn(|i| elems[(first + i.min(len - 1)) * k..][..k].as_ptr())
}

/// Up to `R` rows of x from `row` against rows `[first, end)` of W. Missing rows of either side are computed as copies of
/// the last one and not stored.
///
/// # Safety
/// As [`multiply_bf16`]; `row < job.rows` and `end <= job.num_outs`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn sweep<D: Dot, const R: usize, const N: usize>(
    job: &Job<'_, D::X, D::W>,
    row: usize,
    first: usize,
    end: usize,
) {
    let k = job.in_features;
    let num_rows = R.min(job.rows - row);
    let x: [*const D::X; R] = starts(job.x, k, row, num_rows);
    let whole = k / D::STEP * D::STEP;
    for out in (first..end).step_by(N) {
        let num_outs = N.min(end - out);
        let w: [*const D::W; N] = starts(job.w, k, out, num_outs);
        let mut acc = [[_mm512_setzero_ps(); N]; R];
        let mut at = 0;
        while at < whole {
            // SAFETY: `at + STEP <= k`, the length of every row; a prefetch may name any address.
            unsafe {
                for w in w {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(N * k + at).cast());
                }
                // No `array::from_fn`: it lacks the target features, and its closure would be called, not inlined.
                let mut x_now = [D::load_x(x[0].add(at)); R];
                for r in 1..R {
                    x_now[r] = D::load_x(x[r].add(at));
                }
                for n in 0..N {
                    let w = D::load_w(w[n].add(at));
                    for r in 0..R {
                        acc[r][n] = D::mul_add(x_now[r], w, acc[r][n]);
                    }
                }
            }
            at += D::STEP;
        }
        if whole < k {
            // SAFETY: `k - whole` elements are left in every row.
            unsafe {
                for n in 0..N {
                    let w = D::load_w_tail(w[n].add(whole), k - whole);
                    for r in 0..R {
                        acc[r][n] = D::mul_add(D::load_x_tail(x[r].add(whole), k - whole), w, acc[r][n]);
                    }
                }
            }
        }
        // SAFETY: handed on to the caller.
        unsafe { store_sums(job.out, &acc, (row, num_rows), (job.first_out + out, num_outs)) };
    }
}

/// Writes the sums of registers, one a row and output, for the first `num_rows` rows from `row` and `num_outs` outputs from
/// `first_out`. `R * N` is a multiple of 8.
///
/// # Safety
/// AVX-512 F is there; the calling thread owns these outputs.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_sums<const R: usize, const N: usize>(
    out: &Output<'_>,
    acc: &[[__m512; N]; R],
    (row, num_rows): (usize, usize),
    (first_out, num_outs): (usize, usize),
) {
    let mut sums = [[0.0f32; N]; R];
    for (acc, sums) in acc.as_flattened().chunks_exact(8).zip(sums.as_flattened_mut().chunks_exact_mut(8)) {
        sums.copy_from_slice(&reduce8([acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7]]));
    }
    for (r, sums) in sums.iter().enumerate().take(num_rows) {
        // SAFETY: handed on to the caller.
        unsafe { out.store(row + r, first_out, &sums[..num_outs]) };
    }
}

/// The sums of 8 registers, each by the halving tree: lane i and lane i + 8, then + 4, + 2, + 1.
/// Registers are paired at every level, so that a level costs half of the one before.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn reduce8(v: [__m512; 8]) -> [f32; 8] {
    let (mut quarters, mut halves) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 4]);
    for (i, sum) in halves.iter_mut().enumerate() {
        let (a, b) = (v[2 * i], v[2 * i + 1]);
        *sum = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xEE>(a, b));
    }
    // Four lanes each of v0, v1, v2, v3, and of v4, v5, v6, v7.
    for (i, sum) in quarters.iter_mut().enumerate() {
        let (a, b) = (halves[2 * i], halves[2 * i + 1]);
        *sum = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
    }
    let [low, high] = quarters;
    let pairs = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(low, high), _mm512_shuffle_ps::<0xEE>(low, high));
    let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(pairs, pairs), _mm512_shuffle_ps::<0xDD>(pairs, pairs));
    let mut lanes = [0.0f32; 16];
    // SAFETY: the array has 16 elements.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
    std::array::from_fn(|i| lanes[i % 4 * 4 + i / 4])
}

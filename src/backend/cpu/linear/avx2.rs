//! `linear` with AVX2, FMA and F16C: 8 partial sums along k, W widened in registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Job;

/// Rows of W in one kernel call.
const OUTS: usize = 4;
pub(super) const GRAIN: usize = OUTS;
const LANES: usize = 8;
/// Rows of W that stay in the L2 while all rows of x pass over them.
const RESIDENT_BYTES: usize = 256 << 10;

/// How 8 elements of W become f32, exactly.
pub(super) trait Widen: Copy + Default {
    /// # Safety
    /// 8 elements can be read at `p`; AVX2 and F16C are there.
    unsafe fn load8(p: *const Self) -> __m256;
}

impl Widen for f32 {
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: as the trait demands.
        unsafe { _mm256_loadu_ps(p) }
    }
}

impl Widen for bf16 {
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: as the trait demands. A bf16 is the upper half of its f32.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
}

impl Widen for f16 {
    #[inline(always)]
    unsafe fn load8(p: *const Self) -> __m256 {
        // SAFETY: as the trait demands.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

/// # Safety
/// AVX2, FMA and F16C are there; the calling thread owns the outputs of `job`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply<W: Widen>(job: &Job<'_, f32, W>) {
    let resident = (RESIDENT_BYTES / (job.in_features * size_of::<W>()).max(1) / OUTS).max(1) * OUTS;
    for first in (0..job.num_outs).step_by(resident) {
        let outs = first..job.num_outs.min(first + resident);
        let mut row = 0;
        while row < job.rows {
            for out in outs.clone().step_by(OUTS) {
                // SAFETY: handed on to the caller; both indices are inside the job.
                unsafe { if job.rows - row >= 2 { block::<W, 2>(job, row, out) } else { block::<W, 1>(job, row, out) } }
            }
            row += 2;
        }
    }
}

/// Rows `first..first + len` of `elems` (`[_, k]`); the last one again for those past `len`.
#[inline]
fn rows_of<T, const N: usize>(elems: &[T], k: usize, first: usize, len: usize) -> [&[T]; N] {
    std::array::from_fn(|i| &elems[(first + i.min(len - 1)) * k..][..k])
}

/// `R` rows of x from `row` against up to `OUTS` rows of W from `out`.
///
/// # Safety
/// As [`multiply`]; `row + R <= job.rows` and `out < job.num_outs`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<W: Widen, const R: usize>(job: &Job<'_, f32, W>, row: usize, out: usize) {
    let k = job.in_features;
    let num_outs = OUTS.min(job.num_outs - out);
    // Missing rows of W are computed as copies of the last one and not stored.
    let w: [&[W]; OUTS] = rows_of(job.w, k, out, num_outs);
    let x: [&[f32]; R] = rows_of(job.x, k, row, R);
    let mut acc = [[_mm256_setzero_ps(); OUTS]; R];
    let whole = k / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        // SAFETY: `at + LANES <= k`, the length of every row.
        unsafe {
            // No `array::from_fn`: it lacks the target features, and its closure would be called, not inlined.
            let mut x_now = [_mm256_setzero_ps(); R];
            for r in 0..R {
                x_now[r] = _mm256_loadu_ps(x[r].as_ptr().add(at));
            }
            for n in 0..OUTS {
                let w = W::load8(w[n].as_ptr().add(at));
                for r in 0..R {
                    acc[r][n] = _mm256_fmadd_ps(x_now[r], w, acc[r][n]);
                }
            }
        }
    }
    if whole < k {
        let mut x_tail = [[0.0f32; LANES]; R];
        for r in 0..R {
            x_tail[r][..k - whole].copy_from_slice(&x[r][whole..]);
        }
        for n in 0..OUTS {
            let mut w_tail = [W::default(); LANES];
            w_tail[..k - whole].copy_from_slice(&w[n][whole..]);
            for r in 0..R {
                // SAFETY: both arrays have `LANES` elements.
                unsafe {
                    acc[r][n] =
                        _mm256_fmadd_ps(_mm256_loadu_ps(x_tail[r].as_ptr()), W::load8(w_tail.as_ptr()), acc[r][n]);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        let mut sums = [0.0; OUTS];
        for (sum, &acc) in sums.iter_mut().zip(acc) {
            *sum = reduce(acc);
        }
        // SAFETY: handed on to the caller.
        unsafe { job.out.store(row + r, job.first_out + out, &sums[..num_outs]) };
    }
}

/// The halving tree: lane i and lane i + 4, then + 2, + 1.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn reduce(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

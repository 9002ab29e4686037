//! Codes with AVX2: 8 words are a block. With their top bits flipped, a code less its middle is what a shift up and an
//! arithmetic shift down leave. Sign, exponent and mantissa of an E4M3 number are shifted to where f32 has them, and what
//! its exponent lacks is multiplied in. Lane m of the sums covers k 8m to 8m + 7 of a block (4m to 4m + 3).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

use super::{CodeJob, Layout};
use crate::backend::cpu::linear::avx2::reduce;
use crate::quant::{CodeBits, Scales, Zeros};

/// Rows of W in one kernel call.
const OUTS: usize = 4;
pub(super) const GRAIN: usize = OUTS;
/// Words of a block, and groups whose scales fill a register.
const LANES: usize = 8;
/// Codes that stay in the L2 while all rows of x pass over them.
const RESIDENT_BYTES: usize = 256 << 10;

/// x in registers of 8 numbers.
pub(super) fn layout(bits: CodeBits) -> Layout {
    Layout { lanes: LANES, registers: bits.per_word() }
}

/// # Safety
/// AVX2, FMA and F16C are there; x is laid out as [`layout`] says; the calling thread owns the outputs of `job`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(job: &CodeJob<'_, f32>) {
    // SAFETY: handed on to the caller.
    unsafe {
        match job.w.bits {
            CodeBits::W4 => pass::<8, false>(job),
            CodeBits::W8 => pass::<4, false>(job),
            CodeBits::F8 => pass::<4, true>(job),
        }
    }
}

/// All rows of x against all rows of W, `C` codes a word, which are E4M3 numbers where `FLOAT`.
///
/// # Safety
/// As [`multiply`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pass<const C: usize, const FLOAT: bool>(job: &CodeJob<'_, f32>) {
    let resident = (RESIDENT_BYTES / (4 * job.w.num_words()).max(1) / OUTS).max(1) * OUTS;
    for first in (0..job.num_outs).step_by(resident) {
        let outs = first..job.num_outs.min(first + resident);
        for row in (0..job.rows).step_by(2) {
            for out in outs.clone().step_by(OUTS) {
                // SAFETY: handed on to the caller; both indices are inside the job.
                unsafe {
                    match job.rows - row {
                        1 => block::<C, FLOAT, 1>(job, row, out),
                        _ => block::<C, FLOAT, 2>(job, row, out),
                    }
                }
            }
        }
    }
}

/// `R` rows of x from `row` against up to `OUTS` rows of W from `out`.
///
/// # Safety
/// As [`multiply`]; `row + R <= job.rows` and `out < job.num_outs`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<const C: usize, const FLOAT: bool, const R: usize>(job: &CodeJob<'_, f32>, row: usize, out: usize) {
    let (num_words, num_groups) = (job.w.num_words(), job.w.num_groups());
    let num_outs = OUTS.min(job.num_outs - out);
    let x: [&[f32]; R] = std::array::from_fn(|r| &job.x[(row + r) * job.x_stride..][..job.x_stride]);
    // Lanes of a group, as a power of two: as many blocks share a register of scales.
    let group_lanes = (job.w.group / C).ilog2();
    let shift = _mm_cvtsi32_si128(group_lanes as i32);
    let flipped = _mm256_set1_epi32(match (FLOAT, C) {
        (true, _) => 0,
        (false, 8) => 0x8888_8888u32 as i32,
        (false, _) => 0x8080_8080u32 as i32,
    });
    let mut acc = [[_mm256_setzero_ps(); R]; OUTS];
    for group in (0..num_groups).step_by(LANES) {
        let blocks = (group << group_lanes) / LANES..((group + LANES) << group_lanes) / LANES;
        for (n, acc) in acc.iter_mut().enumerate() {
            // Missing rows of W are computed as copies of the last one and not stored.
            let w_row = out + n.min(num_outs - 1);
            let (at, left) = (w_row * num_groups + group, num_groups - group);
            let scale = match job.w.scales {
                Scales::F16(scales) => first_eight(scales, at, left),
                Scales::F32(scales) => first_floats(scales[at..].iter().copied().take(left)),
            };
            if !matches!(job.w.zeros, Zeros::None) {
                let offset = _mm256_mul_ps(scale, zero_offsets(job.w.zeros, at, left));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let sums = &job.sums[(row + r) * job.sums_stride + group..][..LANES];
                    // SAFETY: there are 8.
                    *acc = _mm256_fnmadd_ps(offset, unsafe { _mm256_loadu_ps(sums.as_ptr()) }, *acc);
                }
            }
            for (i, block) in blocks.clone().enumerate().take_while(|(_, block)| block * LANES < num_words) {
                let words = &job.w.codes[w_row * num_words + block * LANES..][..LANES.min(num_words - block * LANES)];
                let x = x.map(|x| &x[block * C * LANES..][..C * LANES]);
                let part = multiply_block::<C, FLOAT, R>(_mm256_xor_si256(first_words(words), flipped), &x);
                let lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
                let lane = _mm256_add_epi32(lane, _mm256_set1_epi32((i * LANES) as i32));
                let scale = _mm256_permutevar8x32_ps(scale, _mm256_srl_epi32(lane, shift));
                for (acc, part) in acc.iter_mut().zip(part) {
                    *acc = _mm256_fmadd_ps(part, scale, *acc);
                }
            }
        }
    }
    for r in 0..R {
        let mut sums = [0.0; OUTS];
        for (sum, acc) in sums.iter_mut().zip(&acc) {
            *sum = reduce(acc[r]);
        }
        // SAFETY: handed on to the caller.
        unsafe { job.out.store(row + r, job.first_out + out, &sums[..num_outs]) };
    }
}

/// Eight words, whose codes' top bits are flipped unless they are E4M3 numbers, times a block of each row of x.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_block<const C: usize, const FLOAT: bool, const R: usize>(words: __m256i, x: &[&[f32]; R]) -> [__m256; R] {
    let down = _mm_cvtsi32_si128((32 - 32 / C) as i32);
    let mut part = [_mm256_setzero_ps(); R];
    for c in 0..C {
        let up = _mm_cvtsi32_si128((32 - 32 / C * (c + 1)) as i32);
        let top = _mm256_sll_epi32(words, up);
        let w = if FLOAT { widen_e4m3(top) } else { _mm256_cvtepi32_ps(_mm256_sra_epi32(top, down)) };
        for (part, x) in part.iter_mut().zip(x) {
            // SAFETY: there are 8.
            *part = _mm256_fmadd_ps(unsafe { _mm256_loadu_ps(x[c * LANES..][..LANES].as_ptr()) }, w, *part);
        }
    }
    part
}

/// The E4M3 numbers in the top bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn widen_e4m3(top: __m256i) -> __m256 {
    let sign = _mm256_and_si256(top, _mm256_set1_epi32(i32::MIN));
    let rest = _mm256_and_si256(_mm256_srli_epi32::<4>(top), _mm256_set1_epi32(0x07f0_0000));
    // Times 2^120: biases of 127 and 7. Subnormal numbers come out right too.
    let rebias = _mm256_castsi256_ps(_mm256_set1_epi32((127 + 120) << 23));
    _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)), rebias)
}

/// Up to eight words, then zeros: there x is zero too.
#[inline]
#[target_feature(enable = "avx2")]
fn first_words(words: &[u32]) -> __m256i {
    let mut filled = [0u32; LANES];
    let words = match words.first_chunk() {
        Some(whole) => whole,
        None => {
            filled[..words.len()].copy_from_slice(words);
            &filled
        }
    };
    // SAFETY: there are 8.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

/// Eight numbers from `at`, `len` at most; zeros past their end.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn first_eight(numbers: &[f16], at: usize, len: usize) -> __m256 {
    let numbers = &numbers[at..at + LANES.min(len)];
    let mut filled = [f16::ZERO; LANES];
    filled[..numbers.len()].copy_from_slice(numbers);
    // SAFETY: there are 8.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(filled.as_ptr().cast())) }
}

/// The first eight numbers; zeros past their end.
#[inline]
#[target_feature(enable = "avx2")]
fn first_floats(numbers: impl Iterator<Item = f32>) -> __m256 {
    let mut filled = [0.0f32; LANES];
    filled.iter_mut().zip(numbers).for_each(|(f, number)| *f = number);
    // SAFETY: there are 8.
    unsafe { _mm256_loadu_ps(filled.as_ptr()) }
}

/// What eight groups from `at`, `len` at most, take for zero, less 8.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn zero_offsets(zeros: Zeros<'_>, at: usize, len: usize) -> __m256 {
    let zeros = match zeros {
        Zeros::None => return _mm256_setzero_ps(),
        Zeros::Fractional(z) => first_eight(z, at, len),
        Zeros::Integer(z) => first_floats(z[at..].iter().take(len).map(|&z| f32::from(z))),
    };
    _mm256_sub_ps(zeros, _mm256_set1_ps(8.0))
}

//! Codes with AVX-512. 16 words are a block; its nibbles become numbers by `vpermw` (bf16, two look-ups a word at once) or
//! `vpermps` (f32), whose index is the shifted word itself: the bits above a nibble are ignored or find a table repeated.
//!
//! A code of 8 bits is two nibbles with a table each, `low` and `16 (high - 8)`: their sum is the code less 128. An E4M3
//! number has its bits shifted to where the other type has them; its exponent is raised by an addition, or, below the
//! smallest normal number, the whole is looked up: `vdpbf16ps` takes subnormal numbers for zeros.
//! Lane m of the sums covers k 8m to 8m + 7 of a block (4m to 4m + 3), so a group is 2, 4, 8, .. neighbouring lanes.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::bf16;

use self::lanes::{Decode, E4m3, Lanes, LanesBf16, LanesF32, Nibbles, Scale};
use super::{CodeJob, Layout};
use crate::backend::cpu::linear::avx512::{reduce8, store_sums};
use crate::quant::{CodeBits, Scales, Zeros};

mod lanes;

/// A multiple of every `N` below, so that threads begin at whole blocks.
pub(super) const GRAIN: usize = 8;
/// Codes that stay in the L2 while all rows of x pass over them.
const RESIDENT_BYTES: usize = 256 << 10;
/// Codes are fetched so many times `N` rows ahead of their use.
const AHEAD: usize = 2;
/// Words of a block.
const WORDS: usize = 16;
/// Groups whose scales fill a register.
const CHUNK: usize = 16;

/// x in registers of `lanes` numbers.
pub(super) fn layout(lanes: usize, bits: CodeBits) -> Layout {
    Layout { lanes, registers: WORDS * bits.per_word() / lanes }
}

/// Lays a row out as [`Layout::fill`] does.
///
/// # Safety
/// AVX-512 F and BW are there; `dst` holds whole blocks enough for the row.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn fill_bf16(x: &[bf16], registers: usize, dst: &mut [bf16]) {
    let block = 32 * registers;
    for (x, dst) in x.chunks(block).zip(dst.chunks_exact_mut(block)) {
        let mut filled = [bf16::ZERO; 128];
        let x = if x.len() == block {
            x
        } else {
            filled[..x.len()].copy_from_slice(x);
            &filled[..block]
        };
        // SAFETY: both have `registers` times 32 elements.
        unsafe {
            let load = |r: usize| _mm512_loadu_si512(x.as_ptr().add(32 * r).cast());
            let mut store = |r: usize, v: __m512i| _mm512_storeu_si512(dst.as_mut_ptr().add(32 * r).cast(), v);
            let (even, odd) = split(load(0), load(1));
            if registers == 2 {
                store(0, even);
                store(1, odd);
            } else {
                let (more_even, more_odd) = split(load(2), load(3));
                let (of_even, of_odd) = (split(even, more_even), split(odd, more_odd));
                store(0, of_even.0);
                store(1, of_odd.0);
                store(2, of_even.1);
                store(3, of_odd.1);
            }
        }
    }
}

/// The even and the odd 16-bit elements of two registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    const EVEN: [u16; 32] = {
        let mut at = [0; 32];
        let mut i = 0;
        while i < 32 {
            at[i] = 2 * i as u16;
            i += 1;
        }
        at
    };
    // SAFETY: the array is as large as the register.
    let even = unsafe { _mm512_loadu_si512(EVEN.as_ptr().cast()) };
    let odd = _mm512_or_si512(even, _mm512_set1_epi16(1));
    (_mm512_permutex2var_epi16(a, even, b), _mm512_permutex2var_epi16(a, odd, b))
}

/// Sums a row over its groups.
///
/// # Safety
/// AVX-512 F, DQ and BF16 are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn sum_bf16(x: &[bf16], group: usize, sums: &mut [f32]) {
    // SAFETY: both types are 64 plain bytes.
    let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(bf16::ONE.to_bits() as i16)) };
    for (x, sums) in x.chunks(8 * group).zip(sums.chunks_mut(8)) {
        let mut lanes = [_mm512_setzero_ps(); 8];
        for (lanes, x) in lanes.iter_mut().zip(x.chunks_exact(group)) {
            for x in x.chunks_exact(32) {
                // SAFETY: there are 32.
                let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(x.as_ptr().cast())) };
                *lanes = _mm512_dpbf16_ps(*lanes, x, ones);
            }
        }
        sums.copy_from_slice(&reduce8(lanes)[..sums.len()]);
    }
}

/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; x is laid out as [`layout`] says; the calling thread owns the outputs of `job`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn multiply_bf16(job: &CodeJob<'_, bf16>) {
    // SAFETY: handed on to the caller.
    unsafe { multiply::<LanesBf16>(job) }
}

/// # Safety
/// As [`multiply_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn multiply_f32(job: &CodeJob<'_, f32>) {
    // SAFETY: handed on to the caller.
    unsafe { multiply::<LanesF32>(job) }
}

/// # Safety
/// As [`multiply_bf16`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn multiply<L: Lanes>(job: &CodeJob<'_, L::X>) {
    // SAFETY: handed on to the caller.
    unsafe {
        let high = |unit: i32| L::table(move |i| ((i - 8) * unit) as f32);
        match (job.w.bits, job.w.scales) {
            (CodeBits::W4, Scales::F16(scales)) => pass::<L, _, _>(job, scales, Nibbles([high(1)])),
            (CodeBits::W8, Scales::F16(scales)) => {
                pass::<L, _, _>(job, scales, Nibbles([L::table(|i| i as f32), high(16)]))
            }
            (CodeBits::F8, Scales::F32(scales)) => {
                pass::<L, _, _>(job, scales, E4m3(L::table(|i| CodeBits::F8.number(i as u32 % 8))))
            }
            // No tensor has such scales.
            (CodeBits::F8, Scales::F16(_)) | (CodeBits::W4 | CodeBits::W8, Scales::F32(_)) => {}
        }
    }
}

/// All rows of x against all rows of W, in pieces where there are many of both.
///
/// # Safety
/// As [`multiply_bf16`]; `scales` are those of `job`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pass<L: Lanes, S: Scale, D: Decode<L>>(job: &CodeJob<'_, L::X>, scales: &[S], decode: D) {
    let resident = (RESIDENT_BYTES / (4 * job.w.num_words()).max(1) / GRAIN).max(1) * GRAIN;
    let resident = match job.rows {
        0..=4 => job.num_outs.max(1),
        5..=16 => GRAIN,
        _ => resident,
    };
    for first in (0..job.num_outs).step_by(resident) {
        let end = job.num_outs.min(first + resident);
        // SAFETY: handed on to the caller.
        unsafe {
            match job.rows {
                0 => {}
                1 => sweep::<L, S, D, 1, 8>(job, (scales, decode), 0, first, end),
                2 => sweep::<L, S, D, 2, 4>(job, (scales, decode), 0, first, end),
                3 | 4 => sweep::<L, S, D, 4, 4>(job, (scales, decode), 0, first, end),
                rows => {
                    (0..rows).step_by(4).for_each(|row| sweep::<L, S, D, 4, 4>(job, (scales, decode), row, first, end))
                }
            }
        }
    }
}

/// Where rows `first..first + len` of `elems` (`[_, width]`) begin; the last one again for those past `len`.
#[inline]
fn starts<E, const N: usize>(elems: &[E], width: usize, first: usize, len: usize) -> [*const E; N] {
    std::array::from_fn(|i| elems[(first + i.min(len - 1)) * width..][..width].as_ptr())
}

/// The first `len` of 16 lanes.
#[inline(always)]
fn first_lanes(len: usize) -> __mmask16 {
    if len >= 16 { !0 } else { (1 << len) - 1 }
}

/// Up to `R` rows of x from `row` against rows `[first, end)` of W. Missing rows of either side are computed as copies of
/// the last one and not stored.
///
/// # Safety
/// As [`pass`]; `row < job.rows` and `end <= job.num_outs`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn sweep<L: Lanes, S: Scale, D: Decode<L>, const R: usize, const N: usize>(
    job: &CodeJob<'_, L::X>,
    (scales, decode): (&[S], D),
    row: usize,
    first: usize,
    end: usize,
) {
    let (num_words, num_groups) = (job.w.num_words(), job.w.num_groups());
    let num_rows = R.min(job.rows - row);
    let x: [*const L::X; R] = starts(job.x, job.x_stride, row, num_rows);
    // Lanes of a group, as a power of two: as many blocks share a register of scales.
    let group_lanes = (job.w.group / job.w.bits.per_word()).ilog2();
    let (shift, lane) =
        (_mm_cvtsi32_si128(group_lanes as i32), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    let block_len = D::STEPS / D::PER_X * L::LANES;
    for out in (first..end).step_by(N) {
        let num_outs = N.min(end - out);
        let codes: [*const u32; N] = starts(job.w.codes, num_words, out, num_outs);
        let scales: [*const S; N] = starts(scales, num_groups, out, num_outs);
        let mut acc = [[_mm512_setzero_ps(); N]; R];
        let mut block = 0;
        for group in (0..num_groups).step_by(CHUNK) {
            let mask = first_lanes(num_groups - group);
            let mut scale = [_mm512_setzero_ps(); N];
            for (scale, scales) in scale.iter_mut().zip(scales) {
                // SAFETY: the mask names groups of this row; a prefetch may name any address.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(N * num_groups + group).cast());
                    *scale = S::load(scales.add(group), mask);
                }
            }
            if !matches!(job.w.zeros, Zeros::None) {
                let rows = [row, num_rows];
                // SAFETY: handed on to the caller.
                unsafe { subtract_zeros(job, &mut acc, &scale, rows, [out, num_outs], group) };
            }
            for i in 0..1 << group_lanes {
                let at = block * WORDS;
                if at >= num_words {
                    break;
                }
                let of_lane = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * i)), shift);
                let x = x.map(|x| x.wrapping_add(block * block_len));
                let block_of = Block::<L, D, R, N> { codes, at, num_words, x, decode, scale, of_lane };
                // SAFETY: `at` is in every row of W, and x is padded to whole blocks.
                unsafe { block_of.multiply(&mut acc) };
                block += 1;
            }
        }
        // SAFETY: handed on to the caller.
        unsafe { store_sums(job.out, &acc, (row, num_rows), (job.first_out + out, num_outs)) };
    }
}

/// Takes what the zeros of 16 groups from `group` amount to off the sums of rows `[row, row + num_rows)` and outputs
/// `[out, out + num_outs)`.
///
/// # Safety
/// As [`sweep`]; the groups from `group` on are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn subtract_zeros<X, const R: usize, const N: usize>(
    job: &CodeJob<'_, X>,
    acc: &mut [[__m512; N]; R],
    scale: &[__m512; N],
    [row, num_rows]: [usize; 2],
    [out, num_outs]: [usize; 2],
    group: usize,
) {
    let num_groups = job.w.num_groups();
    let mask = first_lanes(num_groups - group);
    for (n, &scale) in scale.iter().enumerate() {
        let at = (out + n.min(num_outs - 1)) * num_groups + group;
        // SAFETY: the mask names groups of this row.
        let offset = unsafe { _mm512_mul_ps(scale, zero_offsets(job.w.zeros, at, N * num_groups, mask)) };
        for (r, acc) in acc.iter_mut().enumerate() {
            let sums = &job.sums[(row + r.min(num_rows - 1)) * job.sums_stride + group..][..CHUNK];
            // SAFETY: there are 16.
            acc[n] = _mm512_fnmadd_ps(offset, unsafe { _mm512_loadu_ps(sums.as_ptr()) }, acc[n]);
        }
    }
}

/// The block at word `at` of a row, zeros past the end of the row; the block `ahead` words on is fetched.
///
/// # Safety
/// AVX-512 is there; the row has `num_words` words, more than `at`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_words(codes: *const u32, at: usize, num_words: usize, ahead: usize) -> __m512i {
    // SAFETY: these words are in this row; a prefetch may name any address.
    unsafe {
        if at + WORDS <= num_words {
            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(at + ahead).cast());
            _mm512_loadu_si512(codes.add(at).cast())
        } else {
            _mm512_maskz_loadu_epi32(first_lanes(num_words - at), codes.add(at).cast())
        }
    }
}

/// The blocks at word `at` of `N` rows of W, and what they are multiplied by.
struct Block<L: Lanes, D: Decode<L>, const R: usize, const N: usize> {
    codes: [*const u32; N],
    at: usize,
    num_words: usize,
    x: [*const L::X; R],
    decode: D,
    /// 16 groups of each row of W.
    scale: [__m512; N],
    /// The group of each lane.
    of_lane: __m512i,
}

impl<L: Lanes, D: Decode<L>, const R: usize, const N: usize> Block<L, D, R, N> {
    /// Adds the products to `acc`.
    ///
    /// # Safety
    /// As [`multiply_bf16`]; rows of W have `num_words` words, more than `at`; a block can be read at every x.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn multiply(&self, acc: &mut [[__m512; N]; R]) {
        let Self { codes, at, num_words, x, decode, scale, of_lane } = *self;
        let ahead = AHEAD * N * num_words;
        let mut part = [[_mm512_setzero_ps(); N]; R];
        // SAFETY: as the caller promises; register j / PER_X is in the block.
        unsafe {
            if R == 1 {
                // One output after the other: words of all of them would not fit the registers.
                for n in 0..N {
                    let words = load_words(codes[n], at, num_words, ahead);
                    for j in 0..D::STEPS {
                        let w = decode.decode(words, j);
                        part[0][n] = L::mul_add(L::load(x[0].add(j / D::PER_X * L::LANES)), w, part[0][n]);
                    }
                }
            } else {
                let mut words = [_mm512_setzero_si512(); N];
                for n in 0..N {
                    words[n] = load_words(codes[n], at, num_words, ahead);
                }
                for j in 0..D::STEPS {
                    let mut x_now = [L::load(x[0].add(j / D::PER_X * L::LANES)); R];
                    for r in 1..R {
                        x_now[r] = L::load(x[r].add(j / D::PER_X * L::LANES));
                    }
                    for n in 0..N {
                        let w = decode.decode(words[n], j);
                        for r in 0..R {
                            part[r][n] = L::mul_add(x_now[r], w, part[r][n]);
                        }
                    }
                }
            }
        }
        for n in 0..N {
            let scale = _mm512_permutexvar_ps(of_lane, scale[n]);
            for r in 0..R {
                acc[r][n] = _mm512_fmadd_ps(part[r][n], scale, acc[r][n]);
            }
        }
    }
}

/// What 16 groups from `at` take for zero, less 8; 0 where the mask is. Fetches those `ahead` groups on.
///
/// # Safety
/// AVX-512 with BW and VL is there; the mask names groups that there are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn zero_offsets(zeros: Zeros<'_>, at: usize, ahead: usize, mask: __mmask16) -> __m512 {
    // SAFETY: as the caller promises; a prefetch may name any address.
    let zeros = unsafe {
        match zeros {
            Zeros::None => return _mm512_setzero_ps(),
            Zeros::Integer(z) => {
                _mm_prefetch::<_MM_HINT_T0>(z.as_ptr().wrapping_add(at + ahead).cast());
                _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, z.as_ptr().add(at).cast())))
            }
            Zeros::Fractional(z) => {
                _mm_prefetch::<_MM_HINT_T0>(z.as_ptr().wrapping_add(at + ahead).cast());
                _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, z.as_ptr().add(at).cast()))
            }
        }
    };
    _mm512_maskz_sub_ps(mask, zeros, _mm512_set1_ps(8.0))
}

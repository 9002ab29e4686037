//! `linear` against weights in codes: y\[t, n\] = sum over groups j of scale\[n, j\] sum_(k in j) x\[t, k\] (code\[n, k\] -
//! zero\[n, j\]) + bias\[n\].
//!
//! A register of words holds, at any one shift, every eighth (fourth) code of a stretch of k: a *block*. x is laid out once a
//! call in the same way, so that codes become numbers by a shift and a look-up and never change places, and one lane of the
//! sums covers neighbours in k, which is to say one group. Zeros stay outside: codes count from their middle, and what a
//! group's zero differs from it is multiplied by the group's sum of x. Codes that are E4M3 numbers go the way of those of 8
//! bits, have no zeros, and become numbers by their bits.
//!
//! The sum order, by the level, x, the width of a code and the group:
//!
//! | level | x | order |
//! |---|---|---|
//! | `avx512`, `amx` | bf16 | blocks of 16 words; a block: 16 lanes of `vdpbf16ps` by nibble (E4M3: by code), from 0; times the scales, FMA; halving tree |
//! | `avx512`, `amx` | widened to f32 | the same with 16 lanes of FMA |
//! | `avx2` | widened to f32 | blocks of 8 words; a block: 8 lanes of FMA by code, from 0; times the scales, FMA; halving tree |
//! | `portable` | widened to f32 | groups: 16 lanes of multiply and add of x (code - zero), from 0; times the scale; halving tree |
//!
//! With zeros, the first two subtract scale (zero - middle) sum(x) of 16 (8) groups, a lane each, before the blocks of these
//! groups. A sum of x runs over 16 lanes (of `vdpbf16ps` in the first row) and their halving tree.

use half::{bf16, f16};

use super::{Activations, Line, Output, Run, grow};
use crate::backend::cpu::matrix::{CodeRows, Weights};
use crate::backend::cpu::pool::ThreadPool;
use crate::backend::cpu::simd::SimdLevel;
use crate::error::Result;
use crate::quant::{CodeBits, Zeros};

#[cfg(x86_kernels)]
mod avx2;
#[cfg(x86_kernels)]
mod avx512;
mod portable;

const GROUPS: [usize; 3] = [32, 64, 128];
const LINE_FLOATS: usize = 16;

/// Activations as the kernels for codes want them; only what the matrix at hand asks for is prepared.
#[derive(Default)]
pub(super) struct CodeScratch {
    /// x for words of 8 and of 4 codes.
    x: [Vec<Line>; 2],
    /// Sums of x over groups of 32, 64 and 128.
    sums: [Vec<Line>; 3],
}

/// How the kernels of a level read x.
#[derive(Clone, Copy)]
struct Layout {
    /// Numbers of a register; 0: x stays as it is.
    lanes: usize,
    /// Registers of a block, a number of each code of a word.
    registers: usize,
}

impl Layout {
    /// Numbers of a row; past its end come zeros.
    fn row_len(self, in_features: usize) -> usize {
        in_features.next_multiple_of((self.lanes * self.registers).max(1))
    }

    /// Number `lane` of register r of a block is its element `lane * registers + r`.
    fn fill<S: Copy>(self, x: &[S], dst: &mut [f32], widen: impl Fn(S) -> f32) {
        let block = self.lanes * self.registers;
        if block == 0 {
            return dst.iter_mut().zip(x).for_each(|(d, &s)| *d = widen(s));
        }
        for (x, dst) in x.chunks(block).zip(dst.chunks_exact_mut(block)) {
            for (r, dst) in dst.chunks_exact_mut(self.lanes).enumerate() {
                let every = x[r.min(x.len())..].iter().step_by(self.registers);
                let tail = every.len();
                dst.iter_mut().zip(every).for_each(|(d, &s)| *d = widen(s));
                dst[tail..].fill(0.0);
            }
        }
    }
}

/// One thread's part of a call: all rows against some rows of W.
struct CodeJob<'a, X> {
    /// `[rows, x_stride]` as [`Layout::fill`] lays it out.
    x: &'a [X],
    x_stride: usize,
    /// `[rows, sums_stride]` sums of x over the groups, zeros past the last; read only where there are zeros.
    #[cfg_attr(not(x86_kernels), expect(dead_code, reason = "the portable kernel subtracts zeros from codes"))]
    sums: &'a [f32],
    #[cfg_attr(not(x86_kernels), expect(dead_code, reason = "as above"))]
    sums_stride: usize,
    w: CodeRows<'a>,
    rows: usize,
    /// Which output the first row of `w` makes.
    first_out: usize,
    num_outs: usize,
    out: &'a Output<'a>,
}

impl Run<'_> {
    /// The parts in codes.
    pub(super) fn codes(
        &self,
        pool: &mut ThreadPool,
        level: SimdLevel,
        scratch: &mut CodeScratch,
        x: Activations<'_>,
        out: &Output<'_>,
    ) -> Result<()> {
        match x {
            Activations::F32(x) => self.codes_f32(pool, level, scratch, x, out, |x| x),
            Activations::F16(x) => self.codes_f32(pool, level, scratch, x, out, f16::to_f32),
            #[cfg(x86_kernels)]
            Activations::Bf16(x) if level >= SimdLevel::Avx512 => {
                self.lay_out(
                    pool,
                    scratch,
                    x,
                    |bits| avx512::layout(32, bits),
                    |layout, x, dst: &mut [bf16]| {
                        // SAFETY: the level is available, and `lay_out` gives whole blocks.
                        unsafe { avx512::fill_bf16(x, layout.registers, dst) }
                    },
                );
                self.sum_groups(pool, scratch, x, |x, group, sums| {
                    // SAFETY: the level is available.
                    unsafe { avx512::sum_bf16(x, group, sums) }
                });
                let scratch = &*scratch;
                self.divide(pool, avx512::GRAIN, true, |_, first_out, w, num_outs| {
                    let Weights::Codes(w) = w else { return };
                    let job = self.code_job(scratch, avx512::layout(32, w.bits), w, first_out, num_outs, out);
                    // SAFETY: the level is available, and `divide` gave these outputs to this thread.
                    unsafe { avx512::multiply_bf16(&job) }
                })
            }
            Activations::Bf16(x) => self.codes_f32(pool, level, scratch, x, out, bf16::to_f32),
        }
    }

    /// x widened to f32, which is exact.
    fn codes_f32<T: Copy + Sync>(
        &self,
        pool: &mut ThreadPool,
        level: SimdLevel,
        scratch: &mut CodeScratch,
        x: &[T],
        out: &Output<'_>,
        widen: impl Fn(T) -> f32 + Copy + Sync,
    ) -> Result<()> {
        let (layout, grain): (fn(CodeBits) -> Layout, usize) = match level {
            #[cfg(x86_kernels)]
            SimdLevel::Amx | SimdLevel::Avx512 => (|bits| avx512::layout(16, bits), avx512::GRAIN),
            #[cfg(x86_kernels)]
            SimdLevel::Avx2 => (avx2::layout, avx2::GRAIN),
            _ => (portable::layout, portable::GRAIN),
        };
        self.lay_out(pool, scratch, x, layout, |layout, x, dst| layout.fill(x, dst, widen));
        self.sum_groups(pool, scratch, x, |x, group, sums| {
            sums.iter_mut().zip(x.chunks_exact(group)).for_each(|(sum, x)| *sum = sum_lanes(x, widen));
        });
        let scratch = &*scratch;
        self.divide(pool, grain, true, |_, first_out, w, num_outs| {
            let Weights::Codes(w) = w else { return };
            let job = self.code_job(scratch, layout(w.bits), w, first_out, num_outs, out);
            // SAFETY: the level is available, and `divide` gave these outputs to this thread.
            unsafe {
                match level {
                    #[cfg(x86_kernels)]
                    SimdLevel::Amx | SimdLevel::Avx512 => avx512::multiply_f32(&job),
                    #[cfg(x86_kernels)]
                    SimdLevel::Avx2 => avx2::multiply(&job),
                    _ => portable::multiply(&job),
                }
            }
        })
    }

    /// Lays x out for each width of a code that there is; a layout looks at nothing but that.
    fn lay_out<S: Copy + Sync, D: bytemuck::Pod + Sync>(
        &self,
        pool: &mut ThreadPool,
        scratch: &mut CodeScratch,
        x: &[S],
        layout: impl Fn(CodeBits) -> Layout,
        fill: impl Fn(Layout, &[S], &mut [D]) + Sync,
    ) {
        let k = self.in_features;
        for bits in [CodeBits::W4, CodeBits::W8] {
            if k == 0 || !self.code_parts().any(|w| w.bits.per_word() == bits.per_word()) {
                continue;
            }
            let layout = layout(bits);
            let row_lines = (layout.row_len(k) * size_of::<D>()).div_ceil(size_of::<Line>());
            let lines = &mut scratch.x[place_of_bits(bits)];
            grow(lines, self.rows * row_lines);
            self.prepare(pool, &mut lines[..self.rows * row_lines], self.rows, row_lines, |row, lines| {
                let x = &x[row * k..(row + 1) * k];
                fill(layout, x, bytemuck::cast_slice_mut(lines));
            });
        }
    }

    /// Sums x over the groups of each size that has zeros.
    fn sum_groups<S: Copy + Sync>(
        &self,
        pool: &mut ThreadPool,
        scratch: &mut CodeScratch,
        x: &[S],
        sum: impl Fn(&[S], usize, &mut [f32]) + Sync,
    ) {
        let k = self.in_features;
        for (&group, lines) in GROUPS.iter().zip(&mut scratch.sums) {
            if k == 0 || !self.code_parts().any(|w| w.group == group && !matches!(w.zeros, Zeros::None)) {
                continue;
            }
            let row_lines = sum_lines(k, group);
            grow(lines, self.rows * row_lines);
            self.prepare(pool, &mut lines[..self.rows * row_lines], self.rows, row_lines, |row, lines| {
                let (sums, x) = (bytemuck::cast_slice_mut::<Line, f32>(lines), &x[row * k..(row + 1) * k]);
                sums[k / group..].fill(0.0);
                sum(x, group, &mut sums[..k / group]);
            });
        }
    }

    fn code_parts(&self) -> impl Iterator<Item = CodeRows<'_>> {
        self.w.parts().flatten().filter_map(|part| if let Weights::Codes(w) = part.2 { Some(w) } else { None })
    }

    fn code_job<'a, X: bytemuck::Pod>(
        &self,
        scratch: &'a CodeScratch,
        layout: Layout,
        w: CodeRows<'a>,
        first_out: usize,
        num_outs: usize,
        out: &'a Output<'a>,
    ) -> CodeJob<'a, X> {
        let place = GROUPS.iter().position(|&group| group == w.group).unwrap_or(0);
        CodeJob {
            x: bytemuck::cast_slice(&scratch.x[place_of_bits(w.bits)]),
            x_stride: layout.row_len(self.in_features),
            sums: bytemuck::cast_slice(&scratch.sums[place]),
            sums_stride: sum_lines(self.in_features, w.group) * LINE_FLOATS,
            w,
            rows: self.rows,
            first_out,
            num_outs,
            out,
        }
    }
}

fn place_of_bits(bits: CodeBits) -> usize {
    match bits {
        CodeBits::W4 => 0,
        CodeBits::W8 | CodeBits::F8 => 1,
    }
}

/// Lines of a row's sums.
fn sum_lines(in_features: usize, group: usize) -> usize {
    (in_features / group).div_ceil(LINE_FLOATS)
}

/// The sum of a group: 16 lanes, then the halving tree.
fn sum_lanes<S: Copy>(x: &[S], widen: impl Fn(S) -> f32) -> f32 {
    let mut lanes = [0.0f32; LINE_FLOATS];
    for x in x.chunks_exact(LINE_FLOATS) {
        lanes.iter_mut().zip(x).for_each(|(lane, &x)| *lane += widen(x));
    }
    super::portable::reduce(&lanes)
}

//! `linear` on the CPU: y\[t, n\] = sum_k x\[t, k\] w\[n, k\] + bias\[n\], sums in f32.
//!
//! This file checks shapes, prepares activations and divides outputs among threads; one kernel file per instruction set
//! does the sums. Weights are read where they lie.
//!
//! *The law every kernel keeps:* at one SIMD level the order in which k is summed depends on `in` alone. It is the same
//! for every number of rows, position of a row, tile shape, thread count and stacking of parts, so that a row's bits
//! depend on that row of x only. The sum order per level and pair of types:
//!
//! | level | x, w | order |
//! |---|---|---|
//! | `amx` | bf16, bf16 | `tdpbf16ps` over 32 k at a time, ascending |
//! | `avx512` | bf16, bf16 | 16 lanes of `vdpbf16ps`, 32 k a step, halving tree |
//! | `avx512` | others | 16 lanes of FMA, halving tree |
//! | `avx2` | any, widened to f32 | 8 lanes of FMA, halving tree |
//! | `portable` | any, widened to f32 | 16 lanes of multiply and add, halving tree |
//! | any | any, codes | by the width of a code and its group too: `codes.rs` |
#![allow(unsafe_code)]

use std::ops::Range;

use half::{bf16, f16};

use codes::CodeScratch;
pub use routed::{RoutedArgs, RoutedScratch, routed_linear};

use super::matrix::{CpuMatrix, Weights};
use super::pool::{SharedMut, ThreadPool, share};
use super::simd::SimdLevel;
use crate::error::{Error, Result};

#[cfg(x86_kernels)]
mod amx;
#[cfg(x86_kernels)]
mod avx2;
#[cfg(x86_kernels)]
mod avx512;
mod codes;
mod portable;
mod routed;

/// Rows prepared and multiplied in one go. Bounds the scratch; 512 rows of 1024 bf16 fill half of a 2 MiB L2.
const MAX_ROWS: usize = 512;
/// Elements of x below which the caller prepares them alone: waking the pool would take longer.
const PARALLEL_PREPARE_ELEMS: usize = 1 << 16;

/// Input rows `[T, in]` in the compute type.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

/// What [`linear`] multiplies.
pub struct LinearArgs<'a> {
    /// `[T, in]`.
    pub x: Activations<'a>,
    /// Rows of `x` and `y` to work on.
    pub rows: Range<usize>,
    /// Width of a row of `x`.
    pub in_features: usize,
    /// `[out, in]`.
    pub w: &'a CpuMatrix,
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
    /// `[T, out]`, written in `rows`.
    pub y: &'a mut [f32],
}

/// Buffers that [`linear`] prepares activations in. They grow to the largest call and stay.
#[derive(Default)]
pub struct LinearScratch {
    /// Activations of one run of rows, in the form the kernel wants; shared by the threads.
    x: Vec<Line>,
    /// `thread_lines` for each thread.
    #[cfg(x86_kernels)]
    threads: Vec<Line>,
    /// The same rows, as kernels for codes want them.
    codes: CodeScratch,
    /// The same rows with their columns as the codes have them.
    columns: Vec<Line>,
}

/// A cache line.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

impl Line {
    const ZERO: Self = Self([0; 16]);
}

/// One thread's part of a call: rows `[0, rows)` of the prepared x against some rows of W.
struct Job<'a, X, W> {
    /// `[rows, in]`, or as the level prepares it.
    x: &'a [X],
    /// `[num_outs, in]`.
    w: &'a [W],
    rows: usize,
    in_features: usize,
    /// Which output `w[0]` makes.
    first_out: usize,
    num_outs: usize,
    out: &'a Output<'a>,
}

/// Where the sums go: y with its bias.
struct Output<'a> {
    y: SharedMut<'a, f32>,
    first_row: usize,
    out_features: usize,
    bias: Option<&'a [f32]>,
}

impl Output<'_> {
    /// y\[row, outs\] for a row counted from the first of this run.
    ///
    /// # Safety
    /// The calling thread owns the outputs `outs`, and drops one result before it asks for the next.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn row(&self, row: usize, outs: Range<usize>) -> &mut [f32] {
        let at = (self.first_row + row) * self.out_features;
        // SAFETY: handed on to the caller: outputs of different threads do not overlap.
        unsafe { self.y.range(at + outs.start..at + outs.end) }
    }

    /// Writes `sums` plus bias to y\[row, first_out..\].
    ///
    /// # Safety
    /// The calling thread owns these outputs.
    #[inline(always)]
    unsafe fn store(&self, row: usize, first_out: usize, sums: &[f32]) {
        let outs = first_out..first_out + sums.len();
        // SAFETY: as the caller promises.
        let y = unsafe { self.row(row, outs.clone()) };
        match self.bias {
            Some(bias) => y.iter_mut().zip(sums).zip(&bias[outs]).for_each(|((y, s), b)| *y = s + b),
            None => y.copy_from_slice(sums),
        }
    }
}

/// Computes `args.rows` of y. The level must be available; the pool's size does not change a bit.
pub fn linear(
    pool: &mut ThreadPool,
    level: SimdLevel,
    scratch: &mut LinearScratch,
    args: LinearArgs<'_>,
) -> Result<()> {
    let LinearArgs { x, rows, in_features, w, bias, y } = args;
    let out_features = w.out_features();
    check(in_features == w.in_features(), || format!("in_features {}", w.in_features()), || in_features.to_string())?;
    check(rows.start <= rows.end, || "ascending rows".into(), || format!("{rows:?}"))?;
    let x_len = match x {
        Activations::F32(x) => x.len(),
        Activations::Bf16(x) => x.len(),
        Activations::F16(x) => x.len(),
    };
    let has = |len: usize, width: usize| rows.end.checked_mul(width).is_some_and(|needed| len >= needed);
    check(has(x_len, in_features), || format!("x [{}, {in_features}]", rows.end), || format!("{x_len} elements"))?;
    check(
        has(y.len(), out_features),
        || format!("y [{}, {out_features}]", rows.end),
        || format!("{} elements", y.len()),
    )?;
    if let Some(bias) = bias {
        check(bias.len() == out_features, || format!("bias [{out_features}]"), || format!("{} elements", bias.len()))?;
    }
    for part in w.parts() {
        let fits = matches!(
            (x, part?.2),
            (Activations::F32(_), _)
                | (_, Weights::Codes(_))
                | (Activations::Bf16(_), Weights::Bf16(_))
                | (Activations::F16(_), Weights::F16(_))
        );
        check(fits, || "weights made for the compute type of x".into(), || "another type".into())?;
    }
    level.check_available()?;

    let mut start = rows.start;
    while start < rows.end && out_features > 0 {
        let end = rows.end.min(start + MAX_ROWS);
        let elems = start * in_features..end * in_features;
        let run = Run { rows: end - start, in_features, w };
        let out = Output { y: SharedMut::new(y), first_row: start, out_features, bias };
        let x = match x {
            Activations::F32(x) => Activations::F32(&x[elems]),
            Activations::Bf16(x) => Activations::Bf16(&x[elems]),
            Activations::F16(x) => Activations::F16(&x[elems]),
        };
        if w.has_dense() {
            match x {
                Activations::F32(x) => run.f32(pool, level, x, &out)?,
                Activations::Bf16(x) => run.bf16(pool, level, scratch, x, &out)?,
                Activations::F16(x) => run.widened(pool, level, scratch, x, &out, f16::to_f32)?,
            }
        }
        if w.has_codes() {
            let LinearScratch { codes, columns, .. } = &mut *scratch;
            let x = match x {
                Activations::F32(x) => Activations::F32(run.as_codes_stand(pool, columns, x)),
                Activations::Bf16(x) => Activations::Bf16(run.as_codes_stand(pool, columns, x)),
                Activations::F16(x) => Activations::F16(run.as_codes_stand(pool, columns, x)),
            };
            run.codes(pool, level, codes, x, &out)?;
        }
        start = end;
    }
    Ok(())
}

fn check(fits: bool, expected: impl Fn() -> String, got: impl Fn() -> String) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::Shape { op: "linear", expected: expected(), got: got() }) }
}

/// At most [`MAX_ROWS`] rows of a call whose shapes have been checked, at a level that is available.
struct Run<'a> {
    rows: usize,
    in_features: usize,
    w: &'a CpuMatrix,
}

impl Run<'_> {
    /// bf16 against bf16, in the type itself where the level has the instructions.
    fn bf16(
        &self,
        pool: &mut ThreadPool,
        level: SimdLevel,
        scratch: &mut LinearScratch,
        x: &[bf16],
        out: &Output<'_>,
    ) -> Result<()> {
        match level {
            #[cfg(x86_kernels)]
            SimdLevel::Amx => {
                let groups = amx::num_groups(self.rows);
                let group_lines = amx::group_lines(self.rows, self.in_features);
                let thread_lines = amx::thread_lines(self.rows, self.in_features, out.out_features);
                grow(&mut scratch.x, groups * group_lines);
                grow(&mut scratch.threads, thread_lines * pool.num_threads());
                self.prepare(pool, &mut scratch.x, groups, group_lines, |group, lines| {
                    // SAFETY: the level is available.
                    unsafe { amx::pack(x, self.rows, self.in_features, group, lines) }
                });
                let packed = &scratch.x[..groups * group_lines];
                let own = SharedMut::new(&mut scratch.threads);
                self.divide(pool, amx::GRAIN, false, |idx, first_out, w, num_outs| {
                    let Weights::Bf16(w) = w else { return };
                    // SAFETY: every thread takes its own lines.
                    let own = unsafe { own.range(idx * thread_lines..(idx + 1) * thread_lines) };
                    // SAFETY: the level is available, x was packed above, and `divide` gave these outputs to this thread.
                    unsafe { amx::multiply(&self.job(packed, w, first_out, num_outs, out), own) }
                })
            }
            #[cfg(x86_kernels)]
            SimdLevel::Avx512 => self.divide(pool, avx512::GRAIN, false, |_, first_out, w, num_outs| {
                let Weights::Bf16(w) = w else { return };
                // SAFETY: the level is available, and `divide` gave these outputs to this thread.
                unsafe { avx512::multiply_bf16(&self.job(x, w, first_out, num_outs, out)) }
            }),
            _ => self.widened(pool, level, scratch, x, out, bf16::to_f32),
        }
    }

    /// Widens x to f32, which is exact, and goes on in f32.
    fn widened<T: Copy + Sync>(
        &self,
        pool: &mut ThreadPool,
        level: SimdLevel,
        scratch: &mut LinearScratch,
        x: &[T],
        out: &Output<'_>,
        widen: impl Fn(T) -> f32 + Sync,
    ) -> Result<()> {
        let row_lines = self.in_features.div_ceil(16);
        let lines = x.len().div_ceil(16);
        grow(&mut scratch.x, lines);
        // Pieces of a row's size; where rows begin does not matter here.
        self.prepare(pool, &mut scratch.x[..lines], self.rows, row_lines.max(1), |piece, lines| {
            let at = (piece * row_lines.max(1) * 16).min(x.len());
            let dst: &mut [f32] = bytemuck::cast_slice_mut(lines);
            dst.iter_mut().zip(&x[at..]).for_each(|(d, &s)| *d = widen(s));
        });
        self.f32(pool, level, &bytemuck::cast_slice(&scratch.x)[..x.len()], out)
    }

    /// f32 against anything.
    fn f32(&self, pool: &mut ThreadPool, level: SimdLevel, x: &[f32], out: &Output<'_>) -> Result<()> {
        match level {
            #[cfg(x86_kernels)]
            SimdLevel::Amx | SimdLevel::Avx512 => {
                self.divide(pool, avx512::GRAIN, false, |_, first_out, w, num_outs| {
                    // SAFETY: the level is available, and `divide` gives each thread outputs of its own.
                    unsafe {
                        match w {
                            Weights::F32(w) => avx512::multiply_f32(&self.job(x, w, first_out, num_outs, out)),
                            Weights::Bf16(w) => avx512::multiply_f32(&self.job(x, w, first_out, num_outs, out)),
                            Weights::F16(w) => avx512::multiply_f32(&self.job(x, w, first_out, num_outs, out)),
                            Weights::Codes(_) => {}
                        }
                    }
                })
            }
            #[cfg(x86_kernels)]
            SimdLevel::Avx2 => self.divide(pool, avx2::GRAIN, false, |_, first_out, w, num_outs| {
                // SAFETY: the level is available, and `divide` gives each thread outputs of its own.
                unsafe {
                    match w {
                        Weights::F32(w) => avx2::multiply(&self.job(x, w, first_out, num_outs, out)),
                        Weights::Bf16(w) => avx2::multiply(&self.job(x, w, first_out, num_outs, out)),
                        Weights::F16(w) => avx2::multiply(&self.job(x, w, first_out, num_outs, out)),
                        Weights::Codes(_) => {}
                    }
                }
            }),
            _ => self.divide(pool, portable::GRAIN, false, |_, first_out, w, num_outs| {
                // SAFETY: `divide` gives each thread outputs of its own.
                unsafe {
                    match w {
                        Weights::F32(w) => portable::multiply(&self.job(x, w, first_out, num_outs, out), |w| w),
                        Weights::Bf16(w) => portable::multiply(&self.job(x, w, first_out, num_outs, out), bf16::to_f32),
                        Weights::F16(w) => portable::multiply(&self.job(x, w, first_out, num_outs, out), f16::to_f32),
                        Weights::Codes(_) => {}
                    }
                }
            }),
        }
    }

    fn job<'a, X, W>(
        &self,
        x: &'a [X],
        w: &'a [W],
        first_out: usize,
        num_outs: usize,
        out: &'a Output<'a>,
    ) -> Job<'a, X, W> {
        Job { x, w, rows: self.rows, in_features: self.in_features, first_out, num_outs, out }
    }

    /// x with its columns in the order of those of the codes; rows of codes are whole lines of any type.
    fn as_codes_stand<'a, T: bytemuck::Pod + Sync>(
        &self,
        pool: &mut ThreadPool,
        lines: &'a mut Vec<Line>,
        x: &'a [T],
    ) -> &'a [T] {
        let Some(columns) = self.w.columns() else { return x };
        let row_lines = self.in_features * size_of::<T>() / size_of::<Line>();
        grow(lines, self.rows * row_lines);
        self.prepare(pool, &mut lines[..self.rows * row_lines], self.rows, row_lines, |row, lines| {
            let x = &x[row * self.in_features..][..self.in_features];
            let dst: &mut [T] = bytemuck::cast_slice_mut(lines);
            dst.iter_mut().zip(columns).for_each(|(d, &column)| *d = x[column as usize]);
        });
        &bytemuck::cast_slice(lines)[..x.len()]
    }

    /// Calls `f(piece, its lines)` for every piece of `piece_lines` lines, on all threads when there is enough to do.
    fn prepare(
        &self,
        pool: &mut ThreadPool,
        lines: &mut [Line],
        num_pieces: usize,
        piece_lines: usize,
        f: impl Fn(usize, &mut [Line]) + Sync,
    ) {
        if self.rows * self.in_features < PARALLEL_PREPARE_ELEMS {
            return lines
                .chunks_mut(piece_lines.max(1))
                .take(num_pieces)
                .enumerate()
                .for_each(|(piece, lines)| f(piece, lines));
        }
        let (num_lines, num_threads) = (lines.len(), pool.num_threads());
        let lines = SharedMut::new(lines);
        pool.run(&|idx| {
            for piece in share(num_pieces, 1, idx, num_threads) {
                let range = piece * piece_lines..num_lines.min((piece + 1) * piece_lines);
                // SAFETY: pieces do not overlap, and every piece belongs to one thread.
                f(piece, unsafe { lines.range(range) });
            }
        });
    }

    /// Calls `f(thread, first_out, weights, num_outs)` for the outputs of each thread, part by part: of the parts in codes,
    /// or of the others. Threads get equal bytes of codes, or equal numbers of outputs.
    fn divide(
        &self,
        pool: &mut ThreadPool,
        grain: usize,
        in_codes: bool,
        f: impl Fn(usize, usize, Weights<'_>, usize) + Sync,
    ) -> Result<()> {
        let num_threads = pool.num_threads();
        // Parts were checked before: none is an error.
        let parts = || self.w.parts().flatten().filter(|part| matches!(part.2, Weights::Codes(_)) == in_codes);
        let cost = |w: &Weights<'_>| if let Weights::Codes(w) = w { w.bits.bits() / 4 } else { 1 };
        let total = parts().map(|(_, num_rows, w)| num_rows * cost(&w)).sum();
        pool.run(&|idx| {
            let own = share(total, grain, idx, num_threads);
            let mut before = 0;
            for (first_row, num_rows, w) in parts() {
                let row_at = |at: usize| at.saturating_sub(before).div_ceil(cost(&w)).min(num_rows);
                let (start, end) = (row_at(own.start), row_at(own.end));
                before += num_rows * cost(&w);
                if start < end {
                    f(idx, first_row + start, self.rows_of(w, start..end), end - start);
                }
            }
        });
        Ok(())
    }

    /// Rows of a part.
    fn rows_of<'a>(&self, part: Weights<'a>, rows: Range<usize>) -> Weights<'a> {
        let elems = rows.start * self.in_features..rows.end * self.in_features;
        match part {
            Weights::F32(w) => Weights::F32(&w[elems]),
            Weights::Bf16(w) => Weights::Bf16(&w[elems]),
            Weights::F16(w) => Weights::F16(&w[elems]),
            Weights::Codes(w) => Weights::Codes(w.rows(rows)),
        }
    }
}

fn grow(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line::ZERO);
    }
}

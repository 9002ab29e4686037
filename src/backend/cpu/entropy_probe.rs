//! `entropy_probe`: what rows of the residual stream would say if they were unembedded now.
//!
//! formula: h = round(x * rsqrt(mean(x^2) + eps) * norm), or round(x); logits = h W^T; statistics as in `row_stats`
//! work split: rows for the norm; then tiles of outputs of all rows, whose logits stay in the second-level cache
//! numerics: those of `add_rms_norm`, `linear` and `row_stats`: the same bits as the three one after the other, and a
//! candidate's logit has the bits it has in the vocabulary
//! traffic: W once a run of rows; no logit leaves the caches
//! oracle: `testing::entropy_probe`; tests: `tests/kernels/entropy_probe.rs`
#![allow(unsafe_code)]

use std::ops::Range;

use half::{bf16, f16};

use super::elem::{Elem, load_part, store_part};
use super::elementwise::for_rows;
use super::linear::{Activations, LinearArgs, LinearScratch, linear};
use super::matrix::CpuMatrix;
use super::norm::{inv_rms, normalize, sum_squares};
use super::pool::{SharedMut, ThreadPool};
use super::row_stats::{CHUNK, Part, fill_parts, fold, position};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::backend::{RowStats, checks};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Rows that go over W together.
const MAX_ROWS: usize = 256;
/// Logits of a tile: 1 MiB, half of a second-level cache.
const TILE_LOGITS: usize = 1 << 18;

/// The arguments of `entropy_probe`.
pub struct EntropyProbeArgs<'a> {
    /// `[stats.len(), hidden]`
    pub x: &'a [f32],
    /// Weight of the norm `[hidden]`; `None` takes `x` as it is.
    pub norm: Option<&'a [f32]>,
    /// Added to the mean square.
    pub eps: f32,
    /// `[vocab, hidden]`
    pub w: &'a CpuMatrix,
    /// Token ids the softmax runs over, ascending; `None`: the vocabulary.
    pub candidates: Option<&'a [u32]>,
    /// Row width.
    pub hidden: usize,
    /// One of each row of `x`, written.
    pub stats: &'a mut [RowStats],
}

/// Buffers kept between calls.
#[derive(Default)]
pub struct EntropyProbeScratch {
    h_f32: Vec<f32>,
    h_bf16: Vec<bf16>,
    h_f16: Vec<f16>,
    /// `[rows, outputs of a tile]`
    logits: Vec<f32>,
    /// Of a tile.
    parts: Vec<Part>,
    /// `[rows, chunks]` of all tiles.
    all_parts: Vec<Part>,
    /// `[rows]` largest logit so far and its output.
    best: Vec<(f32, u32)>,
}

/// See [`EntropyProbeArgs`].
pub fn entropy_probe(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut EntropyProbeScratch,
    linear_scratch: &mut LinearScratch,
    args: EntropyProbeArgs<'_>,
) -> Result<()> {
    let EntropyProbeArgs { x, norm, eps, w, candidates, hidden, stats } = args;
    let fits = hidden > 0 && hidden == w.in_features() && x.len() >= stats.len() * hidden && w.out_features() > 0;
    if !fits || norm.is_some_and(|n| n.len() != hidden) {
        return Err(Error::Shape {
            op: "entropy_probe",
            expected: format!("{} rows and a norm of {}", stats.len(), w.in_features()),
            got: format!("{} elements, hidden {hidden}", x.len()),
        });
    }
    let gathered = match candidates {
        None => None,
        Some(ids) => {
            checks::candidates(ids, w.out_features())?;
            Some(w.gather(ids)?)
        }
    };
    let mut probe = Probe { level, pool, scratch, linear_scratch, w: gathered.as_ref().unwrap_or(w), hidden };
    for (stats, x) in stats.chunks_mut(MAX_ROWS).zip(x.chunks(MAX_ROWS * hidden)) {
        probe.prepare(&x[..stats.len() * hidden], norm, eps);
        probe.run(stats)?;
    }
    if let Some(ids) = candidates {
        for stats in stats.iter_mut().filter(|s| s.finite == 1) {
            stats.argmax = ids[stats.argmax as usize];
        }
    }
    Ok(())
}

/// A run of rows against W.
struct Probe<'a> {
    level: SimdLevel,
    pool: &'a mut ThreadPool,
    scratch: &'a mut EntropyProbeScratch,
    linear_scratch: &'a mut LinearScratch,
    w: &'a CpuMatrix,
    hidden: usize,
}

impl Probe<'_> {
    /// Lays out h in the compute type.
    fn prepare(&mut self, x: &[f32], norm: Option<&[f32]>, eps: f32) {
        let (level, hidden) = (self.level, self.hidden);
        match self.w.compute() {
            DType::F32 => normed(level, self.pool, x, norm, eps, hidden, &mut self.scratch.h_f32),
            DType::Bf16 => normed(level, self.pool, x, norm, eps, hidden, &mut self.scratch.h_bf16),
            DType::F16 => normed(level, self.pool, x, norm, eps, hidden, &mut self.scratch.h_f16),
        }
    }

    /// Logits and their statistics, tile by tile.
    fn run(&mut self, stats: &mut [RowStats]) -> Result<()> {
        let (rows, outputs) = (stats.len(), self.w.out_features());
        let width = (TILE_LOGITS / rows / CHUNK).max(1) * CHUNK;
        let per_row = outputs.div_ceil(CHUNK);
        self.scratch.all_parts.clear();
        self.scratch.all_parts.resize(rows * per_row, Part::default());
        self.scratch.best.clear();
        self.scratch.best.resize(rows, (f32::NEG_INFINITY, 0));
        let mut first = 0;
        while first < outputs {
            let tile = first..outputs.min(first + width);
            self.tile(tile.clone(), rows, per_row)?;
            first = tile.end;
        }
        let all = self.scratch.all_parts.chunks(per_row).zip(&self.scratch.best);
        for (stats, (parts, &(_, argmax))) in stats.iter_mut().zip(all) {
            *stats = fold(parts, outputs, argmax);
        }
        Ok(())
    }

    /// The outputs `tile` of all rows; it begins at a chunk.
    fn tile(&mut self, tile: Range<usize>, rows: usize, per_row: usize) -> Result<()> {
        let scratch = &mut *self.scratch;
        let width = tile.len();
        scratch.logits.resize((rows * width).max(scratch.logits.len()), 0.0);
        let logits = &mut scratch.logits[..rows * width];
        let x = match self.w.compute() {
            DType::F32 => Activations::F32(&scratch.h_f32),
            DType::Bf16 => Activations::Bf16(&scratch.h_bf16),
            DType::F16 => Activations::F16(&scratch.h_f16),
        };
        let w = self.w.slice(tile.clone());
        let args = LinearArgs { x, rows: 0..rows, in_features: self.hidden, w: &w, bias: None, y: logits };
        linear(self.pool, self.level, self.linear_scratch, args)?;
        fill_parts(self.level, self.pool, logits, width, &mut scratch.parts);
        let (first_chunk, num_chunks) = (tile.start / CHUNK, width.div_ceil(CHUNK));
        for (row, parts) in scratch.parts.chunks(num_chunks).enumerate() {
            scratch.all_parts[row * per_row + first_chunk..][..num_chunks].copy_from_slice(parts);
            let best = &mut scratch.best[row];
            for (chunk, part) in parts.iter().enumerate() {
                if part.max > best.0 {
                    let at = chunk * CHUNK + position(&logits[row * width..][chunk * CHUNK..width], part.max);
                    *best = (part.max, (tile.start + at) as u32);
                }
            }
        }
        Ok(())
    }
}

/// `h` of all rows of `x`, rounded once.
fn normed<T: Elem>(
    level: SimdLevel,
    pool: &mut ThreadPool,
    x: &[f32],
    norm: Option<&[f32]>,
    eps: f32,
    hidden: usize,
    h: &mut Vec<T>,
) {
    h.resize(x.len(), T::narrow(0.0));
    let h = SharedMut::new(h);
    for_rows(pool, 0..x.len() / hidden, hidden, &|rows| {
        dispatch(level, NormRows { rows, x, norm, eps, hidden, h: &h });
    });
}

struct NormRows<'a, T> {
    rows: Range<usize>,
    x: &'a [f32],
    norm: Option<&'a [f32]>,
    eps: f32,
    hidden: usize,
    h: &'a SharedMut<'a, T>,
}

impl<T: Elem> Kernel for NormRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        for row in self.rows {
            let at = row * self.hidden..(row + 1) * self.hidden;
            let x = &self.x[at.clone()];
            // SAFETY: threads have different rows.
            let h = unsafe { self.h.range(at) };
            if let Some(weight) = self.norm {
                normalize(v, x, inv_rms(sum_squares(v, x), self.hidden, self.eps), weight, h);
                continue;
            }
            let mut xs = x.chunks_exact(V::LANES);
            let mut hs = h.chunks_exact_mut(V::LANES);
            for (x, h) in xs.by_ref().zip(hs.by_ref()) {
                T::store(v, v.load(x), h);
            }
            let rest = hs.into_remainder();
            if !rest.is_empty() {
                store_part(v, load_part(v, xs.remainder()), rest);
            }
        }
    }
}

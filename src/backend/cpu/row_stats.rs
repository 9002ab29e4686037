//! `row_stats`: one sweep over logits rows.
//!
//! formula: with z = x - max: S = sum e^z, lse = max + ln S, entropy = ln S - sum z e^z / S, top1 = 1 / S
//! work split: (row, chunk of 4096): a chunk is read from memory once, its second pass hits the first-level cache;
//! chunks of a row are folded left to right in f64, so threads never divide a sum
//! numerics: f32 in a chunk, as `LANES` partial sums; f64 across chunks
//! traffic: each logit once
//! oracle: `testing::oracle::row_stats`; tests: `tests/kernels/row_stats.rs`
#![allow(unsafe_code)]

use super::elem::load_part;
use super::norm::THREAD_ELEMS;
use super::pool::{SharedMut, ThreadPool, share};
use super::simd::SimdLevel;
use super::vector::{Kernel, LOG2_E, Vector, dispatch};
use crate::backend::RowStats;
use crate::error::{Error, Result};

/// Logits in a chunk: 16 KiB.
pub(super) const CHUNK: usize = 4096;

/// Partial results, kept between calls.
#[derive(Default)]
pub struct RowStatsScratch {
    parts: Vec<Part>,
}

/// What a chunk says of itself.
#[derive(Clone, Copy, Default)]
pub(super) struct Part {
    pub(super) max: f32,
    /// The second largest; equal to `max` when it occurs twice.
    second: f32,
    /// sum e^(x - max)
    sum: f32,
    /// sum (x - max) e^(x - max)
    weighted: f32,
    finite: bool,
}

/// Statistics of the first `stats.len()` rows of `logits`, `[stats.len(), vocab]`.
/// A row with a NaN or an infinity has `finite` 0 and nothing else.
pub fn row_stats(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut RowStatsScratch,
    logits: &[f32],
    vocab: usize,
    stats: &mut [RowStats],
) -> Result<()> {
    let rows = stats.len();
    if vocab == 0 || logits.len() < rows * vocab {
        return Err(Error::Shape {
            op: "row_stats",
            expected: format!("{rows} rows of at least one logit"),
            got: format!("{} logits, vocab {vocab}", logits.len()),
        });
    }
    fill_parts(level, pool, &logits[..rows * vocab], vocab, &mut scratch.parts);
    let per_row = vocab.div_ceil(CHUNK);
    for ((stats, parts), logits) in stats.iter_mut().zip(scratch.parts.chunks(per_row)).zip(logits.chunks(vocab)) {
        let best = parts.iter().enumerate().fold(0, |best, (i, p)| if p.max > parts[best].max { i } else { best });
        *stats = fold(parts, vocab, (best * CHUNK + position(&logits[best * CHUNK..], parts[best].max)) as u32);
    }
    Ok(())
}

/// The parts of every chunk of rows of `vocab` logits, `[rows, chunks]`.
pub(super) fn fill_parts(
    level: SimdLevel,
    pool: &mut ThreadPool,
    logits: &[f32],
    vocab: usize,
    filled: &mut Vec<Part>,
) {
    let (rows, per_row) = (logits.len() / vocab, vocab.div_ceil(CHUNK));
    filled.clear();
    filled.resize(rows * per_row, Part::default());
    let threads = pool.num_threads();
    let turn = |first: usize, parts| dispatch(level, Turn { logits, vocab, per_row, first, parts });
    if threads == 1 || rows * vocab < THREAD_ELEMS {
        return turn(0, &mut filled[..]);
    }
    let parts = SharedMut::new(filled);
    pool.run(&|idx| {
        let mine = share(rows * per_row, 1, idx, threads);
        // SAFETY: shares of different threads do not overlap.
        turn(mine.start, unsafe { parts.range(mine) });
    });
}

/// Where `x` first is.
pub(super) fn position(logits: &[f32], x: f32) -> usize {
    logits.iter().position(|&l| l == x).unwrap_or_default()
}

/// Fills the parts of chunks `[first, first + parts.len())`.
struct Turn<'a> {
    logits: &'a [f32],
    vocab: usize,
    per_row: usize,
    first: usize,
    parts: &'a mut [Part],
}

impl Kernel for Turn<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        for (i, part) in self.parts.iter_mut().enumerate() {
            let (row, chunk) = ((self.first + i) / self.per_row, (self.first + i) % self.per_row);
            let start = chunk * CHUNK;
            let end = (start + CHUNK).min(self.vocab);
            *part = sweep(v, &self.logits[row * self.vocab..][start..end]);
        }
    }
}

#[inline(always)]
fn sweep<V: Vector>(v: V, x: &[f32]) -> Part {
    let zero = v.splat(0.0);
    let none = v.splat(f32::NEG_INFINITY);
    let (mut max, mut second, mut poison) = (none, none, zero);
    let mut xs = x.chunks_exact(V::LANES);
    for x in xs.by_ref() {
        let x = v.load(x);
        second = v.max(second, v.min(max, x));
        max = v.max(max, x);
        // 0 for finite logits, NaN otherwise.
        poison = v.fma(x, zero, poison);
    }
    let rest = xs.remainder();
    let last = v.keep_first(rest.len(), load_part(v, rest), none);
    if !rest.is_empty() {
        second = v.max(second, v.min(max, last));
        max = v.max(max, last);
        poison = v.fma(load_part(v, rest), zero, poison);
    }
    let finite = v.reduce_add(poison) == 0.0;
    let top = v.reduce_max(max);
    let (mut maxima, mut seconds) = ([f32::NEG_INFINITY; 16], [f32::NEG_INFINITY; 16]);
    v.store(max, &mut maxima);
    v.store(second, &mut seconds);
    let mut runner_up = f32::NEG_INFINITY;
    let mut held = false;
    for (&m, &s) in maxima.iter().zip(&seconds) {
        if m == top && !held {
            held = true;
        } else {
            runner_up = runner_up.max(m);
        }
        runner_up = runner_up.max(s);
    }

    let shift = v.splat(top);
    // Far enough that e^z is 0, near enough that 0 * z is too; missing lanes are put there.
    let floor = v.splat(-1000.0);
    let base = v.splat(LOG2_E);
    let (mut sum, mut weighted) = (zero, zero);
    let (mut sum_b, mut weighted_b) = (zero, zero);
    let mut pairs = x.chunks_exact(2 * V::LANES);
    for x in pairs.by_ref() {
        let a = v.max(v.sub(v.load(x), shift), floor);
        let b = v.max(v.sub(v.load(&x[V::LANES..]), shift), floor);
        let (p, q) = (v.exp2(v.mul(a, base)), v.exp2(v.mul(b, base)));
        sum = v.add(sum, p);
        sum_b = v.add(sum_b, q);
        weighted = v.fma(a, p, weighted);
        weighted_b = v.fma(b, q, weighted_b);
    }
    for x in pairs.remainder().chunks(V::LANES) {
        let z = v.max(v.keep_first(x.len(), v.sub(load_part(v, x), shift), floor), floor);
        let p = v.exp2(v.mul(z, base));
        sum = v.add(sum, p);
        weighted = v.fma(z, p, weighted);
    }
    Part {
        max: top,
        second: runner_up,
        sum: v.reduce_add(v.add(sum, sum_b)),
        weighted: v.reduce_add(v.add(weighted, weighted_b)),
        finite,
    }
}

/// Folds the chunks of a row of `vocab` logits left to right.
pub(super) fn fold(parts: &[Part], vocab: usize, argmax: u32) -> RowStats {
    if !parts.iter().all(|p| p.finite) {
        return RowStats::default();
    }
    let (mut max, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for p in parts {
        second = second.max(p.second).max(max.min(p.max));
        max = max.max(p.max);
    }
    let (mut sum, mut weighted) = (0.0f64, 0.0f64);
    for p in parts {
        let shift = f64::from(p.max) - f64::from(max);
        let scale = shift.exp();
        sum += scale * f64::from(p.sum);
        weighted += scale * (f64::from(p.weighted) + shift * f64::from(p.sum));
    }
    RowStats {
        argmax,
        max,
        lse: (f64::from(max) + sum.ln()) as f32,
        entropy: (sum.ln() - weighted / sum).max(0.0) as f32,
        top1: (1.0 / sum) as f32,
        margin: if vocab > 1 { max - second } else { 0.0 },
        finite: 1,
    }
}

//! `add_rms_norm`: the residual addition, the norms before and after it, and the step similarity.
//!
//! formula: norm(x, w) = x * rsqrt(mean(x^2) + eps) * w; x' = x + delta or x + norm(delta, post_norm); y = x' or
//! norm(x', weight), rounded once; similarity = cos(before, x')
//! work split: rows
//! numerics: f32 sums in `LANES` partial sums and a fixed tree, whatever the number of rows
//! traffic: x twice, delta (twice where it is normed), y and what is kept or compared with once
//! oracle: `testing::oracle::rms_norm`; tests: `tests/kernels/elementwise.rs`
#![allow(unsafe_code)]

use std::ops::Range;

use super::elem::{Elem, load_part, load_some, narrow_row, store_part, store_some};
use super::pool::{SharedMut, ThreadPool, share};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::error::{Error, Result};

/// Elements below which one thread does an elementwise op alone: waking the others costs about as much as the work.
pub(crate) const THREAD_ELEMS: usize = 16 * 1024;

/// The arguments of `add_rms_norm`; `T` is the compute type.
pub struct AddRmsNormArgs<'a, T> {
    /// Rows of `x`, `delta` and `y` to work on.
    pub rows: Range<usize>,
    /// `[T, hidden]`, updated in place.
    pub x: &'a mut [f32],
    /// `[T, hidden]`, added first.
    pub delta: Option<&'a [f32]>,
    /// `[hidden]`: weight of a norm that `delta` takes before it is added; without `delta` nothing.
    pub post_norm: Option<&'a [f32]>,
    /// What `y` becomes.
    pub output: Output<'a>,
    /// `[T, hidden]`, written as `output` says.
    pub y: &'a mut [T],
    /// `[T, hidden]`, receives x as it is after the addition.
    pub keep: Option<&'a mut [f32]>,
    /// `[T, hidden]` and `[T]`: receives the cosine of each row after the addition to the row given; 0 where a norm is 0.
    pub step_similarity: Option<(&'a [f32], &'a mut [f32])>,
    /// Row width.
    pub hidden: usize,
    /// Added to each mean square.
    pub eps: f32,
}

/// As [`NormOutput`](crate::backend::NormOutput), in host memory.
#[derive(Clone, Copy)]
pub enum Output<'a> {
    /// `y` is not touched.
    None,
    /// x as it is.
    Rounded,
    /// x normed with this weight `[hidden]`.
    Normed(&'a [f32]),
}

/// See [`AddRmsNormArgs`].
pub fn add_rms_norm<T: Elem>(level: SimdLevel, pool: &mut ThreadPool, args: AddRmsNormArgs<'_, T>) -> Result<()> {
    let AddRmsNormArgs { rows, x, delta, post_norm, output, y, keep, step_similarity, hidden, eps } = args;
    let shape = |expected: String, got: String| Err(Error::Shape { op: "add_rms_norm", expected, got });
    let need = rows.end * hidden;
    if rows.start > rows.end || hidden == 0 || x.len() < need || delta.is_some_and(|d| d.len() < need) {
        return shape(format!("x and delta of {need} elements"), format!("x {}", x.len()));
    }
    let weight = if let Output::Normed(weight) = output { Some(weight) } else { None };
    let writes = !matches!(output, Output::None);
    if weight.into_iter().chain(post_norm).any(|w| w.len() != hidden) || writes && y.len() < need {
        return shape(format!("weights of {hidden}, y of {need} elements"), format!("y {}", y.len()));
    }
    if step_similarity.as_ref().is_some_and(|(before, out)| before.len() < need || out.len() < rows.end) {
        return shape(format!("{need} elements to compare with, room for {} cosines", rows.end), "fewer".into());
    }
    if keep.as_ref().is_some_and(|k| k.len() < need) {
        return shape(format!("room to keep {need} elements"), "less".into());
    }
    if delta.is_none() && !writes && step_similarity.is_none() && keep.is_none() {
        return Ok(());
    }
    let (before, similarity) = step_similarity.map_or((None, &mut [][..]), |(before, out)| (Some(before), out));
    let (keeps, keep) = keep.map_or((false, &mut [][..]), |k| (true, k));
    let job = Job {
        x: SharedMut::new(x),
        delta,
        post_norm,
        output,
        y: SharedMut::new(y),
        keeps,
        keep: SharedMut::new(keep),
        before,
        similarity: SharedMut::new(similarity),
        hidden,
        eps,
    };
    let threads = pool.num_threads();
    if threads == 1 || rows.len() * hidden < THREAD_ELEMS || rows.len() == 1 {
        dispatch(level, Turn { job: &job, rows });
        return Ok(());
    }
    pool.run(&|idx| {
        let part = share(rows.len(), 1, idx, threads);
        dispatch(level, Turn { job: &job, rows: rows.start + part.start..rows.start + part.end });
    });
    Ok(())
}

struct Job<'a, T> {
    x: SharedMut<'a, f32>,
    delta: Option<&'a [f32]>,
    post_norm: Option<&'a [f32]>,
    output: Output<'a>,
    y: SharedMut<'a, T>,
    keeps: bool,
    keep: SharedMut<'a, f32>,
    before: Option<&'a [f32]>,
    similarity: SharedMut<'a, f32>,
    hidden: usize,
    eps: f32,
}

struct Turn<'a, T> {
    job: &'a Job<'a, T>,
    rows: Range<usize>,
}

impl<T: Elem> Kernel for Turn<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let job = self.job;
        for row in self.rows {
            let at = row * job.hidden..(row + 1) * job.hidden;
            // SAFETY: threads have different rows.
            let x = unsafe { job.x.range(at.clone()) };
            let added = match (job.delta, job.post_norm) {
                (None, _) => None,
                (Some(delta), None) => Some(add(v, x, &delta[at.clone()])),
                (Some(delta), Some(weight)) => {
                    let delta = &delta[at.clone()];
                    Some(add_normed(v, x, delta, inv_rms(sum_squares(v, delta), job.hidden, job.eps), weight))
                }
            };
            if job.keeps {
                // SAFETY: as above.
                unsafe { job.keep.range(at.clone()) }.copy_from_slice(x);
            }
            if let Some(before) = job.before {
                // SAFETY: as above.
                let out = unsafe { job.similarity.range(row..row + 1) };
                out[0] = cosine(&compare(v, &before[at.clone()], x));
            }
            if let Output::None = job.output {
                continue;
            }
            // SAFETY: as above.
            let y = unsafe { job.y.range(at) };
            match job.output {
                Output::Normed(weight) => {
                    let square = added.unwrap_or_else(|| sum_squares(v, x));
                    normalize(v, x, inv_rms(square, job.hidden, job.eps), weight, y);
                }
                _ => narrow_row(v, x, y),
            }
        }
    }
}

/// Sums over a row as it was and as it is.
struct Sums {
    before: f32,
    after: f32,
    product: f32,
}

fn cosine(sums: &Sums) -> f32 {
    let norms = (f64::from(sums.before) * f64::from(sums.after)).sqrt();
    if norms > 0.0 { (f64::from(sums.product) / norms) as f32 } else { 0.0 }
}

/// 1 / sqrt(square / n + eps)
#[inline(always)]
pub(super) fn inv_rms(square: f32, n: usize, eps: f32) -> f32 {
    1.0 / (square / n as f32 + eps).sqrt()
}

/// `x += delta`, and the sum of its squares then.
#[inline(always)]
fn add<V: Vector>(v: V, x: &mut [f32], delta: &[f32]) -> f32 {
    let mut after = v.splat(0.0);
    let mut xs = x.chunks_exact_mut(V::LANES);
    let mut ds = delta.chunks_exact(V::LANES);
    for (x, d) in xs.by_ref().zip(ds.by_ref()) {
        let sum = v.add(v.load(x), v.load(d));
        v.store(sum, x);
        after = v.fma(sum, sum, after);
    }
    let rest = xs.into_remainder();
    if !rest.is_empty() {
        let sum = v.add(load_part(v, &*rest), load_part(v, ds.remainder()));
        store_part(v, sum, rest);
        after = v.fma(sum, sum, after);
    }
    v.reduce_add(after)
}

/// `x += delta * inv * weight`, and the sum of its squares then.
#[inline(always)]
fn add_normed<V: Vector>(v: V, x: &mut [f32], delta: &[f32], inv: f32, weight: &[f32]) -> f32 {
    let (inv, mut after) = (v.splat(inv), v.splat(0.0));
    for ((x, d), w) in x.chunks_mut(V::LANES).zip(delta.chunks(V::LANES)).zip(weight.chunks(V::LANES)) {
        let sum = v.add(load_some(v, &*x), v.mul(v.mul(load_some(v, d), inv), load_some(v, w)));
        store_some(v, sum, x);
        after = v.fma(sum, sum, after);
    }
    v.reduce_add(after)
}

/// The sums that make the cosine of two rows.
#[inline(always)]
fn compare<V: Vector>(v: V, before: &[f32], x: &[f32]) -> Sums {
    let mut sums = [v.splat(0.0); 3];
    let mut fold = |a: V::F, b: V::F| {
        sums = [v.fma(a, a, sums[0]), v.fma(b, b, sums[1]), v.fma(a, b, sums[2])];
    };
    let (mut olds, mut news) = (before.chunks_exact(V::LANES), x.chunks_exact(V::LANES));
    for (a, b) in olds.by_ref().zip(news.by_ref()) {
        fold(v.load(a), v.load(b));
    }
    if !news.remainder().is_empty() {
        fold(load_part(v, olds.remainder()), load_part(v, news.remainder()));
    }
    let [before, after, product] = sums.map(|s| v.reduce_add(s));
    Sums { before, after, product }
}

/// The same bits as [`add`] yields for the same row.
#[inline(always)]
pub(super) fn sum_squares<V: Vector>(v: V, x: &[f32]) -> f32 {
    let mut sum = v.splat(0.0);
    let mut xs = x.chunks_exact(V::LANES);
    for x in xs.by_ref() {
        let x = v.load(x);
        sum = v.fma(x, x, sum);
    }
    if !xs.remainder().is_empty() {
        let x = load_part(v, xs.remainder());
        sum = v.fma(x, x, sum);
    }
    v.reduce_add(sum)
}

/// `y = x * inv * weight`, rounded once.
#[inline(always)]
pub(super) fn normalize<V: Vector, T: Elem>(v: V, x: &[f32], inv: f32, weight: &[f32], y: &mut [T]) {
    let inv = v.splat(inv);
    let mut xs = x.chunks_exact(V::LANES);
    let mut ws = weight.chunks_exact(V::LANES);
    let mut ys = y.chunks_exact_mut(V::LANES);
    for ((x, w), y) in xs.by_ref().zip(ws.by_ref()).zip(ys.by_ref()) {
        T::store(v, v.mul(v.mul(v.load(x), inv), v.load(w)), y);
    }
    let rest = ys.into_remainder();
    if !rest.is_empty() {
        let y = v.mul(v.mul(load_part(v, xs.remainder()), inv), load_part(v, ws.remainder()));
        store_part(v, y, rest);
    }
}

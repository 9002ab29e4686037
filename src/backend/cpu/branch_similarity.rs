//! `branch_similarity`: layer-weighted cosines of branches to the root and to each other, and their clusters.
//!
//! formula: sigma(a, b) = sum_l w_l cos(a^l, b^l) / sum_l w_l; a cosine is 0 where a norm is 0
//! work split: (layer, row): its products with the rows up to it; threads never divide a sum
//! numerics: dot products in `LANES` f32 partial sums and a fixed tree, the same for every pair, so that equal states
//! give exactly 1; cosines and the sum over layers in f64
//! traffic: each state once per row it meets, from the caches
//! oracle: `testing::branch_similarity`; tests: `tests/kernels/branch_similarity.rs`
#![allow(unsafe_code)]

use super::elem::load_part;
use super::norm::THREAD_ELEMS;
use super::pool::{SharedMut, ThreadPool};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::backend::{Similarity, checks};
use crate::error::{Error, Result};
use crate::gate;

/// Products of a row taken together, so that one multiply-add does not wait for the last.
const TOGETHER: usize = 4;

/// The arguments of `branch_similarity`.
pub struct BranchSimilarityArgs<'a> {
    /// `[num_layers, num_branches, hidden]`
    pub states: &'a [f32],
    /// `[num_layers, hidden]`
    pub root: &'a [f32],
    /// `[num_layers]`
    pub layer_weights: &'a [f32],
    /// Branches.
    pub num_branches: usize,
    /// Row width.
    pub hidden: usize,
    /// From this similarity on, two branches are one cluster.
    pub tau: f32,
    /// Written.
    pub similarity: &'a mut Similarity,
}

/// Products of all pairs of a layer's rows, kept between calls.
#[derive(Default)]
pub struct BranchSimilarityScratch {
    /// `[num_layers, pairs]`
    dots: Vec<f32>,
}

/// See [`BranchSimilarityArgs`].
pub fn branch_similarity(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut BranchSimilarityScratch,
    args: BranchSimilarityArgs<'_>,
) -> Result<()> {
    let (num_layers, num_branches, hidden) = (args.layer_weights.len(), args.num_branches, args.hidden);
    checks::similarity(num_layers, num_branches, hidden)?;
    if args.states.len() < num_layers * num_branches * hidden || args.root.len() < num_layers * hidden {
        return Err(Error::Shape {
            op: "branch_similarity",
            expected: format!("states [{num_layers}, {num_branches}, {hidden}] and their roots"),
            got: format!("{} and {} elements", args.states.len(), args.root.len()),
        });
    }
    let pairs = num_pairs(num_branches + 1);
    scratch.dots.resize(num_layers * pairs, 0.0);
    let job = Job { args: &args, pairs, dots: SharedMut::new(&mut scratch.dots) };
    let threads = pool.num_threads();
    if threads == 1 || num_layers * pairs * hidden < THREAD_ELEMS {
        dispatch(level, Turn { job: &job, first: 0, step: 1 });
    } else {
        // Later rows meet more: threads take turns.
        pool.run(&|idx| dispatch(level, Turn { job: &job, first: idx, step: threads }));
    }
    finish(args, &scratch.dots, pairs);
    Ok(())
}

/// Pairs (r, s) of `num_rows` rows with r <= s.
fn num_pairs(num_rows: usize) -> usize {
    num_rows * (num_rows + 1) / 2
}

/// Where the pair (r, s), r <= s, lies.
fn pair(r: usize, s: usize) -> usize {
    num_pairs(s) + r
}

struct Job<'a> {
    args: &'a BranchSimilarityArgs<'a>,
    pairs: usize,
    dots: SharedMut<'a, f32>,
}

impl<'a> Job<'a> {
    /// A row of a layer: the branches, then the root.
    #[inline(always)]
    fn row(&self, layer: usize, row: usize) -> &'a [f32] {
        let BranchSimilarityArgs { states, root, num_branches, hidden, .. } = *self.args;
        let (rows, at) = if row < num_branches { (states, layer * num_branches + row) } else { (root, layer) };
        &rows[at * hidden..(at + 1) * hidden]
    }
}

/// Units `first`, `first + step`, ... of (layer, row).
struct Turn<'a> {
    job: &'a Job<'a>,
    first: usize,
    step: usize,
}

impl Kernel for Turn<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let num_rows = self.job.args.num_branches + 1;
        let units = self.job.args.layer_weights.len() * num_rows;
        for unit in (self.first..units).step_by(self.step) {
            let (layer, row) = (unit / num_rows, unit % num_rows);
            let at = layer * self.job.pairs + pair(0, row);
            // SAFETY: every unit has products of its own.
            let dots = unsafe { self.job.dots.range(at..at + row + 1) };
            let own = self.job.row(layer, row);
            for (i, dots) in dots.chunks_mut(TOGETHER).enumerate() {
                let mut others = [own; TOGETHER];
                for (j, other) in others[..dots.len()].iter_mut().enumerate() {
                    *other = self.job.row(layer, i * TOGETHER + j);
                }
                let sums = products(v, own, &others);
                dots.copy_from_slice(&sums[..dots.len()]);
            }
        }
    }
}

/// Products of a row with others, each in one order of its own.
#[inline(always)]
fn products<V: Vector>(v: V, own: &[f32], others: &[&[f32]; TOGETHER]) -> [f32; TOGETHER] {
    let mut acc = [v.splat(0.0); TOGETHER];
    let whole = own.len() / V::LANES * V::LANES;
    let mut at = 0;
    while at < whole {
        let a = v.load(&own[at..]);
        for (acc, other) in acc.iter_mut().zip(others) {
            *acc = v.fma(a, v.load(&other[at..]), *acc);
        }
        at += V::LANES;
    }
    if at < own.len() {
        let a = load_part(v, &own[at..]);
        for (acc, other) in acc.iter_mut().zip(others) {
            *acc = v.fma(a, load_part(v, &other[at..]), *acc);
        }
    }
    let mut sums = [0.0; TOGETHER];
    for (sum, acc) in sums.iter_mut().zip(acc) {
        *sum = v.reduce_add(acc);
    }
    sums
}

/// Products to cosines, their sums over layers, and the clusters.
fn finish(args: BranchSimilarityArgs<'_>, dots: &[f32], pairs: usize) {
    let n = args.num_branches;
    let sigma = |r: usize, s: usize| {
        let (mut sum, mut weights) = (0.0, 0.0);
        for (dots, &weight) in dots.chunks(pairs).zip(args.layer_weights) {
            sum += f64::from(weight) * cosine(dots[pair(r, s)], dots[pair(r, r)], dots[pair(s, s)]);
            weights += f64::from(weight);
        }
        // The weights add up to 1 but for rounding; with their sum equal states come out as exactly 1.
        (sum / weights) as f32
    };
    let found = args.similarity;
    found.to_root.clear();
    found.to_root.extend((0..n).map(|b| sigma(b, n)));
    found.pairwise.clear();
    found.pairwise.resize(n * n, 1.0);
    for b in 0..n {
        for c in 0..b {
            let similarity = sigma(c, b);
            found.pairwise[b * n + c] = similarity;
            found.pairwise[c * n + b] = similarity;
        }
    }
    found.labels = gate::cluster(&found.pairwise, n, args.tau);
}

/// The cosine from a product and two squared norms: in f64 the root of a square is exact.
fn cosine(dot: f32, square_a: f32, square_b: f32) -> f64 {
    let norms = (f64::from(square_a) * f64::from(square_b)).sqrt();
    if norms == 0.0 { 0.0 } else { (f64::from(dot) / norms).clamp(-1.0, 1.0) }
}

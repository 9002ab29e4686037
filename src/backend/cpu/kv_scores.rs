//! `kv_scores`: R-KV scores of a sequence's slots, one layer, each kv head by itself.
//!
//! formula: see [`KvScoresArgs`]; k are the keys divided by (norm + 1e-8), S = k k^T
//! work split: (kv head, panel of 64 slots) twice, with the heads' sums over panels between; then heads. Each unit owns
//! its results, so threads never divide a sum
//! numerics: products and norms in f32, an element of S in ascending order of D; sums over slots in f64, ascending
//! traffic: K once; normalised keys (f32) once per panel that still has a row without a similar key
//! oracle: `testing::kv_scores`; tests: `tests/kernels/kv_scores.rs`
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

mod panel;

use self::panel::Panel;
use super::attention::scale::ScoreScale;
use super::elem::{Elem, MAX_LANES, load_part};
use super::pool::{SharedMut, ThreadPool};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::backend::RkvVariant;
use crate::batch::TILE_SLOTS;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// Multiply-adds below which waking the other threads costs more than it saves (about 10 us of one core).
const THREAD_WORK: usize = 200_000;
/// A slot to which there is no link.
const NO_LINK: u32 = u32::MAX;

/// The arguments of `kv_scores`; `T` is the compute type. Over the candidates i, all slots but the last `window`:
///
/// ```text
/// a[j, i] = max over the group's query heads g of q[j, g] K[i] sm_scale, or softcap tanh of it / softcap
/// I[i]    = mean over the queries j of softmax_i(a[j, :]), then the largest within pool_size / 2 candidates
/// w(u)    = newest slot w != u with S[u, w] > threshold; slot 0 where there is none
/// m[v]    = 1/n (sum of S[u, v] over u != v with w(u) != v)
/// R       = softmax over all n slots of m
/// score   = lambda I - (1 - lambda) R
/// ```
///
/// `Text` and `Alg1` have `m[u] = 1/n (sum of S[u, v] over v != u, v != w(u))`, where `w(u)` may be none; `Text` takes the
/// largest `a` of `[i - pool_size / 2, i + pool_size / 2 - 1]` (`i` itself where that is nothing), and not of `I` afterwards.
pub struct KvScoresArgs<'a, T> {
    /// `[.., Hq, D]`
    pub queries: &'a [T],
    /// Rows of `queries` that are looked with.
    pub query_rows: Range<usize>,
    /// K of one layer.
    pub k_cache: &'a [T],
    /// The sequence's table.
    pub blocks: &'a [u32],
    /// Slots of the sequence.
    pub num_slots: usize,
    /// Last slots that are no candidates.
    pub window: usize,
    /// Odd.
    pub pool_size: usize,
    /// Which formulas.
    pub variant: RkvVariant,
    /// Share of the importance; at 1 keys are not compared.
    pub lambda: f32,
    /// Cosine above which keys are similar; 0 at least.
    pub threshold: f32,
    /// Query heads.
    pub num_q_heads: usize,
    /// Multiplies q k.
    pub sm_scale: f32,
    /// Bound of `a`; above zero.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
    /// `[Hkv, num_slots - window]`, written.
    pub scores: &'a mut [f32],
}

/// What a call needs, kept between calls; `padded` is `num_slots` rounded up to whole panels.
#[derive(Default)]
pub struct KvScoresScratch {
    /// `[queries, Hq, dim]` widened, `dim` the head dim rounded up to whole vectors.
    queries: Vec<f32>,
    /// `[Hkv, panels, dim]` rows of a panel's slots: normalised keys, transposed.
    keys: Vec<[f32; TILE_SLOTS]>,
    /// `[Hkv, panels, dim]` sums over a panel's keys, and `[Hkv, dim]` over all.
    panel_sums: Vec<f32>,
    key_sums: Vec<f32>,
    /// `[Hkv, queries, padded]` maxima over the group, times log2(e).
    logits: Vec<f32>,
    /// `[Hkv, padded]` sum of a column of S without the diagonal; the slot its row is linked to, and that link.
    column_sums: Vec<f32>,
    nearest: Vec<u32>,
    links: Vec<f32>,
    threads: Vec<Own>,
}

/// Scratch of one thread.
#[derive(Default)]
struct Own {
    /// `[64, dim]`
    rows: Vec<f32>,
    /// Rows without a similar key so far.
    active: Vec<usize>,
    /// `[padded]`
    protected: Vec<f64>,
    importance: Vec<f32>,
    exps: Vec<f32>,
    pooled: Vec<f32>,
}

/// See [`KvScoresArgs`].
pub fn kv_scores<T: Elem>(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut KvScoresScratch,
    args: KvScoresArgs<'_, T>,
) -> Result<()> {
    let sizes = check(&args)?;
    if sizes.candidates == 0 {
        return Ok(());
    }
    let Sizes { heads, panels, dim, .. } = sizes;
    scratch.begin(&args, &sizes, pool.num_threads());
    let threads = if sizes.work() < THREAD_WORK { None } else { Some(pool) };
    let mut pool = Units { level, pool: threads, own: &mut scratch.threads };
    pool.run(
        heads * panels,
        &Prepare {
            args: &args,
            sizes: &sizes,
            queries: &scratch.queries,
            keys: SharedMut::new(&mut scratch.keys),
            panel_sums: SharedMut::new(&mut scratch.panel_sums),
            logits: SharedMut::new(&mut scratch.logits),
        },
    );
    if args.lambda != 1.0 {
        sum_panels(&scratch.panel_sums, panels, dim, &mut scratch.key_sums);
        pool.run(
            heads * panels,
            &Compare {
                sizes: &sizes,
                threshold: args.threshold,
                links_to_first: args.variant == RkvVariant::Code,
                keys: &scratch.keys,
                key_sums: &scratch.key_sums,
                column_sums: SharedMut::new(&mut scratch.column_sums),
                nearest: SharedMut::new(&mut scratch.nearest),
                links: SharedMut::new(&mut scratch.links),
            },
        );
    }
    let score = Score {
        sizes: &sizes,
        pool_size: args.pool_size,
        variant: args.variant,
        lambda: args.lambda,
        logits: &scratch.logits,
        column_sums: &scratch.column_sums,
        nearest: &scratch.nearest,
        links: &scratch.links,
        scores: SharedMut::new(args.scores),
    };
    pool.run(heads, &score);
    Ok(())
}

/// What is where.
struct Sizes {
    heads: usize,
    group: usize,
    slots: usize,
    candidates: usize,
    queries: usize,
    panels: usize,
    /// Slots of whole panels.
    padded: usize,
    /// Head dim in whole vectors; the rest is zero.
    dim: usize,
}

impl Sizes {
    /// Multiply-adds at most.
    fn work(&self) -> usize {
        self.heads * self.slots * self.dim * (self.slots + self.queries * self.group)
    }

    /// The keys of a panel of a head, in rows of `dim`.
    fn panel(&self, unit: usize) -> Range<usize> {
        unit * self.dim..(unit + 1) * self.dim
    }

    /// Head, panel, first slot.
    fn place(&self, unit: usize) -> (usize, usize, usize) {
        let (head, panel) = (unit / self.panels, unit % self.panels);
        (head, panel, panel * TILE_SLOTS)
    }
}

fn check<T: Elem>(args: &KvScoresArgs<'_, T>) -> Result<Sizes> {
    let KvLayout { num_kv_heads: heads, head_dim, block_size, num_blocks, .. } = *args.layout;
    let shape = |expected: String, got: String| Err(Error::Shape { op: "kv_scores", expected, got });
    let queries = args.query_rows.len();
    if heads == 0 || queries == 0 || !args.num_q_heads.is_multiple_of(heads) || args.window > args.num_slots {
        let got = format!("{queries} queries of {} heads, window {}", args.num_q_heads, args.window);
        return shape(format!("queries of a multiple of {heads} heads, {} slots", args.num_slots), got);
    }
    let (q_len, cache) = (args.query_rows.end * args.num_q_heads * head_dim, num_blocks * args.layout.block_elems());
    if args.queries.len() < q_len || args.k_cache.len() < cache || args.blocks.len() * block_size < args.num_slots {
        let got = format!("{} and {}, {} blocks", args.queries.len(), args.k_cache.len(), args.blocks.len());
        return shape(format!("{q_len} elements of queries, {cache} of K, blocks of {} slots", args.num_slots), got);
    }
    let (slots, candidates) = (args.num_slots, args.num_slots - args.window);
    if args.scores.len() != heads * candidates {
        return shape(format!("{} scores", heads * candidates), args.scores.len().to_string());
    }
    let panels = slots.div_ceil(TILE_SLOTS);
    Ok(Sizes {
        heads,
        group: args.num_q_heads / heads,
        slots,
        candidates,
        queries,
        panels,
        padded: panels * TILE_SLOTS,
        dim: head_dim.next_multiple_of(MAX_LANES),
    })
}

impl KvScoresScratch {
    fn begin<T: Elem>(&mut self, args: &KvScoresArgs<'_, T>, sizes: &Sizes, num_threads: usize) {
        let &Sizes { heads, queries, panels, padded, dim, .. } = sizes;
        let head_dim = args.layout.head_dim;
        let width = args.num_q_heads * head_dim;
        self.queries.clear();
        for head in args.queries[args.query_rows.start * width..args.query_rows.end * width].chunks(head_dim.max(1)) {
            self.queries.extend(head.iter().map(|x| x.widen()));
            self.queries.resize(self.queries.len() + dim - head_dim, 0.0);
        }
        self.keys.resize(heads * panels * dim, [0.0; TILE_SLOTS]);
        self.panel_sums.resize(heads * panels * dim, 0.0);
        self.key_sums.resize(heads * dim, 0.0);
        self.logits.resize(heads * queries * padded, 0.0);
        self.column_sums.resize(heads * padded, 0.0);
        self.nearest.resize(heads * padded, NO_LINK);
        self.links.resize(heads * padded, 0.0);
        self.threads.resize_with(num_threads.max(self.threads.len()), Own::default);
    }
}

/// Sums of all keys of a head, panels in ascending order.
fn sum_panels(panel_sums: &[f32], panels: usize, dim: usize, key_sums: &mut [f32]) {
    for (of_head, sums) in panel_sums.chunks(panels * dim).zip(key_sums.chunks_mut(dim)) {
        for (d, sum) in sums.iter_mut().enumerate() {
            *sum = of_head.iter().skip(d).step_by(dim).map(|&x| f64::from(x)).sum::<f64>() as f32;
        }
    }
}

/// A phase: units whose results are their own.
trait Phase: Sync {
    fn unit<V: Vector>(&self, v: V, unit: usize, own: &mut Own);
}

/// Who works on the units of a phase.
struct Units<'a> {
    level: SimdLevel,
    /// `None`: the caller alone.
    pool: Option<&'a mut ThreadPool>,
    own: &'a mut [Own],
}

impl Units<'_> {
    fn run<P: Phase>(&mut self, num_units: usize, phase: &P) {
        let next = AtomicUsize::new(0);
        let turn = |own: &mut Own| dispatch(self.level, Turn { phase, next: &next, num_units, own });
        let own = SharedMut::new(&mut *self.own);
        let on_thread = |idx: usize| {
            // SAFETY: each thread takes the scratch of its own index.
            if let Some(own) = unsafe { own.range(idx..idx + 1) }.first_mut() {
                turn(own);
            }
        };
        match &mut self.pool {
            Some(pool) if num_units > 1 => pool.run(&on_thread),
            _ => on_thread(0),
        }
    }
}

/// One thread's turn.
struct Turn<'a, P> {
    phase: &'a P,
    next: &'a AtomicUsize,
    num_units: usize,
    own: &'a mut Own,
}

impl<P: Phase> Kernel for Turn<'_, P> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        loop {
            // Who takes a unit has no bearing on its result.
            let unit = self.next.fetch_add(1, Ordering::Relaxed);
            if unit >= self.num_units {
                return;
            }
            self.phase.unit(v, unit, self.own);
        }
    }
}

/// (head, panel): its normalised keys, their sum, and what the queries say to them.
struct Prepare<'a, T> {
    args: &'a KvScoresArgs<'a, T>,
    sizes: &'a Sizes,
    queries: &'a [f32],
    keys: SharedMut<'a, [f32; TILE_SLOTS]>,
    panel_sums: SharedMut<'a, f32>,
    logits: SharedMut<'a, f32>,
}

impl<T: Elem> Phase for Prepare<'_, T> {
    #[inline(always)]
    fn unit<V: Vector>(&self, v: V, unit: usize, own: &mut Own) {
        let &Sizes { group, queries, padded, dim, .. } = self.sizes;
        let (head, _, first) = self.sizes.place(unit);
        // SAFETY: every unit has a panel of its own.
        let keys = unsafe { self.keys.range(self.sizes.panel(unit)) };
        self.load(v, head, first, &mut own.rows);
        panel::transpose_rows(v, &own.rows, dim, keys);
        let scale = ScoreScale::new(self.args.sm_scale, self.args.softcap);
        let factor = v.splat(scale.factor);
        for (j, query) in self.queries.chunks_exact(self.args.num_q_heads * dim).enumerate() {
            let mut best = Panel(keys).best(v, &query[head * group * dim..][..group * dim]);
            // tanh grows with its argument, so the largest of the group stays the largest.
            scale.cap(v, &mut best);
            let to = (head * queries + j) * padded + first;
            // SAFETY: as above.
            let logits = unsafe { self.logits.range(to..to + TILE_SLOTS) };
            for (x, logits) in best.chunks_exact(V::LANES).zip(logits.chunks_exact_mut(V::LANES)) {
                v.store(v.mul(v.load(x), factor), logits);
            }
        }
        // SAFETY: as above.
        panel::normalise(v, keys, unsafe { self.panel_sums.range(self.sizes.panel(unit)) });
    }
}

impl<T: Elem> Prepare<'_, T> {
    /// The panel's keys as rows of `dim`, zeros past the last slot and the last element.
    #[inline(always)]
    fn load<V: Vector>(&self, v: V, head: usize, first: usize, rows: &mut Vec<f32>) {
        let (layout, dim) = (self.args.layout, self.sizes.dim);
        let size = layout.block_size;
        rows.clear();
        rows.resize(TILE_SLOTS * dim, 0.0);
        let slots = first..self.sizes.slots.min(first + TILE_SLOTS);
        for (slot, row) in slots.zip(rows.chunks_exact_mut(dim)) {
            let at = layout.elem(self.args.blocks[slot / size] as usize, head, slot % size);
            let key = &self.args.k_cache[at..at + layout.head_dim];
            for (x, row) in key.chunks(V::LANES).zip(row.chunks_exact_mut(V::LANES)) {
                v.store(if x.len() == V::LANES { T::load(v, x) } else { load_part(v, x) }, row);
            }
        }
    }
}

/// (head, panel): the newest similar key of each of its slots, and the column sums of S.
struct Compare<'a> {
    sizes: &'a Sizes,
    threshold: f32,
    /// Whether a slot without a similar key is linked to slot 0.
    links_to_first: bool,
    keys: &'a [[f32; TILE_SLOTS]],
    key_sums: &'a [f32],
    column_sums: SharedMut<'a, f32>,
    nearest: SharedMut<'a, u32>,
    links: SharedMut<'a, f32>,
}

impl Phase for Compare<'_> {
    #[inline(always)]
    fn unit<V: Vector>(&self, v: V, unit: usize, own: &mut Own) {
        let &Sizes { slots, panels, padded, dim, .. } = self.sizes;
        let (head, panel, first) = self.sizes.place(unit);
        let keys = Panel(&self.keys[self.sizes.panel(unit)]);
        let at = head * padded + first..head * padded + first + TILE_SLOTS;
        // SAFETY: every unit has slots of its own.
        let (sums, nearest) = unsafe { (self.column_sums.range(at.clone()), self.nearest.range(at.clone())) };
        // SAFETY: as above.
        let links = unsafe { self.links.range(at) };
        keys.column_sums(v, &self.key_sums[head * dim..][..dim], sums);
        nearest.fill(NO_LINK);
        links.fill(0.0);
        own.rows.resize(TILE_SLOTS * dim, 0.0);
        keys.rows(v, &mut own.rows);
        own.active.clear();
        own.active.extend(0..TILE_SLOTS.min(slots - first));
        // From the newest panel to the oldest; rows leave with the first panel that has a similar key.
        for other in (0..panels).rev() {
            if own.active.is_empty() {
                return;
            }
            let them = Panel(&self.keys[self.sizes.panel(head * panels + other)]);
            let before = own.active.len();
            let (mut start, mut left) = (0, 0);
            while start < before {
                let mut cosines = [[0.0; TILE_SLOTS]; panel::MAX_ROWS];
                let taken = them.products(v, &own.rows, &own.active[start..before], &mut cosines);
                for i in 0..taken {
                    let row = own.active[start + i];
                    let cosines = &mut cosines[i];
                    if other == panel {
                        cosines[row] = f32::NEG_INFINITY;
                    }
                    if let Some(column) = panel::last_above(v, cosines, self.threshold) {
                        (nearest[row], links[row]) = ((other * TILE_SLOTS + column) as u32, cosines[column]);
                    } else {
                        if other == 0 && self.links_to_first && first + row != 0 {
                            (nearest[row], links[row]) = (0, cosines[0]);
                        }
                        own.active[left] = row;
                        left += 1;
                    }
                }
                start += taken;
            }
            own.active.truncate(left);
        }
    }
}

/// A head: sums over its slots, and the scores.
struct Score<'a> {
    sizes: &'a Sizes,
    pool_size: usize,
    variant: RkvVariant,
    lambda: f32,
    logits: &'a [f32],
    column_sums: &'a [f32],
    nearest: &'a [u32],
    links: &'a [f32],
    scores: SharedMut<'a, f32>,
}

impl Phase for Score<'_> {
    #[inline(always)]
    fn unit<V: Vector>(&self, v: V, head: usize, own: &mut Own) {
        let candidates = self.sizes.candidates;
        // SAFETY: every head has scores of its own.
        let scores = unsafe { self.scores.range(head * candidates..(head + 1) * candidates) };
        self.importance(v, head, own);
        let reach = if self.variant == RkvVariant::Text { 0 } else { self.pool_size / 2 };
        max_within(&own.importance, reach, reach, scores);
        if self.lambda == 1.0 {
            return;
        }
        let total = self.exp_means(head, own);
        for (score, exp_mean) in scores.iter_mut().zip(&own.protected) {
            let redundancy = (exp_mean / total) as f32;
            *score = self.lambda * *score - (1.0 - self.lambda) * redundancy;
        }
    }
}

impl Score<'_> {
    /// `own.importance[i]` = mean over the queries of the softmax over the candidates.
    #[inline(always)]
    fn importance<V: Vector>(&self, v: V, head: usize, own: &mut Own) {
        let &Sizes { candidates, queries, padded, .. } = self.sizes;
        let whole = candidates.next_multiple_of(MAX_LANES);
        own.importance.clear();
        own.importance.resize(whole, 0.0);
        own.exps.clear();
        own.exps.resize(whole, 0.0);
        for logits in self.logits[head * queries * padded..][..queries * padded].chunks_exact(padded) {
            let (behind, ahead) = match self.variant {
                RkvVariant::Text => (self.pool_size / 2, (self.pool_size / 2).saturating_sub(1)),
                RkvVariant::Code | RkvVariant::Alg1 => (0, 0),
            };
            let logits = &logits[..candidates];
            let mut top = v.splat(f32::NEG_INFINITY);
            own.exps[..candidates].copy_from_slice(logits);
            own.exps[candidates..].fill(f32::NEG_INFINITY);
            for x in own.exps.chunks_exact(V::LANES) {
                top = v.max(top, v.load(x));
            }
            let top = v.splat(v.reduce_max(top));
            let mut sum = v.splat(0.0);
            for x in own.exps.chunks_exact_mut(V::LANES) {
                let e = v.exp2(v.sub(v.load(x), top));
                sum = v.add(sum, e);
                v.store(e, x);
            }
            if behind > 0 {
                own.pooled.clear();
                own.pooled.resize(candidates, 0.0);
                max_within(&own.exps[..candidates], behind, ahead, &mut own.pooled);
                own.exps[..candidates].copy_from_slice(&own.pooled);
            }
            let share = v.splat(1.0 / (v.reduce_add(sum) * queries as f32));
            for (x, importance) in own.exps.chunks_exact(V::LANES).zip(own.importance.chunks_exact_mut(V::LANES)) {
                v.store(v.fma(v.load(x), share, v.load(importance)), importance);
            }
        }
        own.importance.truncate(candidates);
    }

    /// `own.protected[v]` = exp(m\[v\]) of every slot; returns their sum.
    fn exp_means(&self, head: usize, own: &mut Own) -> f64 {
        let &Sizes { slots, padded, .. } = self.sizes;
        let of_head = head * padded..head * padded + slots;
        own.protected.clear();
        own.protected.resize(slots, 0.0);
        let links = self.nearest[of_head.clone()].iter().zip(&self.links[of_head.clone()]);
        for (u, (&nearest, &link)) in links.enumerate().filter(|(_, (nearest, _))| **nearest != NO_LINK) {
            let whose = if self.variant == RkvVariant::Code { nearest as usize } else { u };
            own.protected[whose] += f64::from(link);
        }
        let mut total = 0.0;
        for (x, &sum) in own.protected.iter_mut().zip(&self.column_sums[of_head]) {
            *x = ((f64::from(sum) - *x) / slots as f64).exp();
            total += *x;
        }
        total
    }
}

/// `out[i]` = the largest of `x[i - behind ..= i + ahead]`.
fn max_within(x: &[f32], behind: usize, ahead: usize, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        let near = &x[i.saturating_sub(behind)..(i + ahead + 1).min(x.len())];
        *out = near.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    }
}

//! `rope_append`: fused qkv rows become q and cache entries; and `kv_copy_blocks`.
//!
//! formula: per head (x RMS-normed first where the family does), for i below R/2, R being rotary_dim, and angle
//! a_i = position * inv_freq\[i\]: y\[i\] = x\[i\] cos a_i - x\[i + R/2\] sin a_i, y\[i + R/2\] = x\[i + R/2\] cos a_i +
//! x\[i\] sin a_i; elements from R on, and v, are only rounded
//! work split: rows
//! numerics: the angle is an f32 product, as transformers computes it; cos and sin of that f32, correctly rounded
//! traffic: qkv once, q, k and v once; q of the rows that the ring keeps once more
//! oracle: `testing::oracle::rope`; tests: `tests/kernels/elementwise.rs`
#![allow(unsafe_code)]

use std::ops::Range;

use super::elem::{Elem, load_some, narrow_row, store_some};
use super::elementwise::for_rows;
use super::norm::{inv_rms, normalize, sum_squares};
use super::pool::{SharedMut, ThreadPool};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::backend::{NO_RING_ROW, NormSpan, checks};
use crate::error::{Error, Result};
use crate::kv::BlockCopy;
use crate::kv::KvLayout;

/// The arguments of `rope_append`; `T` is the compute type.
pub struct RopeAppendArgs<'a, T> {
    /// Rows of `qkv`, `q`, `positions` and `slots` to work on.
    pub rows: Range<usize>,
    /// `[T, (Hq + 2 Hkv) * D]`: q heads, then k heads, then v heads.
    pub qkv: &'a [f32],
    /// `[T, Hq, D]`, written.
    pub q: &'a mut [T],
    /// `[.., Hq, D]`, written at `ring_rows`; there is one where any are named.
    pub query_ring: Option<&'a mut [T]>,
    /// K of one layer, written at `slots`.
    pub k_cache: &'a mut [T],
    /// V of one layer, written at `slots`.
    pub v_cache: &'a mut [T],
    /// `[T]`: what RoPE uses.
    pub positions: &'a [u32],
    /// `[T]`: `block_id * block_size + offset`, no two alike.
    pub slots: &'a [u32],
    /// `[T]` row of the ring, no two alike, or [`NO_RING_ROW`]; empty: none at all.
    pub ring_rows: &'a [u32],
    /// `[rotary_dim / 2]`, radians per position.
    pub inv_freq: &'a [f32],
    /// Elements of a head that turn.
    pub rotary_dim: usize,
    /// Multiplies cos and sin.
    pub rope_scale: f32,
    /// What q and k go through first.
    pub qk_norm: Option<QkWeights<'a>>,
    /// Query heads.
    pub num_q_heads: usize,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// As [`QkNorm`](crate::backend::QkNorm), in host memory.
#[derive(Clone, Copy)]
pub struct QkWeights<'a> {
    /// `[D]`, or `[Hq * D]` where the norm spans the row.
    pub q: &'a [f32],
    /// `[D]`, or `[Hkv * D]`.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// What the mean runs over.
    pub span: NormSpan,
}

/// What the layers of a step have in common: kept between calls, so that the first layer alone pays for it.
#[derive(Default)]
pub struct RopeScratch {
    /// Rows' positions of the last call, and what the table was made with.
    positions: Vec<u32>,
    inv_freq: Vec<f32>,
    rope_scale: f32,
    /// Distinct positions, ascending.
    distinct: Vec<u32>,
    /// `[distinct, 2, rotary_dim / 2]`: cos, then sin.
    table: Vec<f32>,
    slots: Distinct,
    ring_rows: Distinct,
}

/// Ids of the last call, found distinct.
#[derive(Default)]
struct Distinct {
    ids: Vec<u32>,
    sorted: Vec<u32>,
}

impl Distinct {
    /// Whether no id but [`NO_RING_ROW`] is named twice.
    fn check(&mut self, ids: &[u32]) -> bool {
        if self.ids == ids {
            return true;
        }
        copy(&mut self.sorted, ids);
        self.sorted.sort_unstable();
        if self.sorted.windows(2).any(|w| w[0] == w[1] && w[0] != NO_RING_ROW) {
            return false;
        }
        copy(&mut self.ids, ids);
        true
    }
}

impl RopeScratch {
    fn prepare(&mut self, positions: &[u32], inv_freq: &[f32], scale: f32) {
        if self.positions == positions && self.inv_freq == inv_freq && self.rope_scale == scale {
            return;
        }
        copy(&mut self.positions, positions);
        self.inv_freq.clear();
        self.inv_freq.extend_from_slice(inv_freq);
        self.rope_scale = scale;
        copy(&mut self.distinct, positions);
        self.distinct.sort_unstable();
        self.distinct.dedup();
        self.table.clear();
        for &position in &self.distinct {
            let angle = |f: &f32| f64::from(position as f32 * f);
            self.table.extend(inv_freq.iter().map(|f| angle(f).cos() as f32 * scale));
            self.table.extend(inv_freq.iter().map(|f| angle(f).sin() as f32 * scale));
        }
    }
}

fn copy(to: &mut Vec<u32>, from: &[u32]) {
    to.clear();
    to.extend_from_slice(from);
}

/// See [`RopeAppendArgs`].
pub fn rope_append<T: Elem>(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut RopeScratch,
    args: RopeAppendArgs<'_, T>,
) -> Result<()> {
    check(&args)?;
    let rows = args.rows.clone();
    let kept = if args.ring_rows.is_empty() { 0..0 } else { rows.clone() };
    if !scratch.slots.check(&args.slots[rows.clone()]) || !scratch.ring_rows.check(&args.ring_rows[kept]) {
        return Err(Error::Shape {
            op: "rope_append",
            expected: "distinct slots, and distinct ring rows".into(),
            got: "one named twice".into(),
        });
    }
    scratch.prepare(&args.positions[rows.clone()], args.inv_freq, args.rope_scale);
    let width = (args.num_q_heads + 2 * args.layout.num_kv_heads) * args.layout.head_dim;
    let job = Job {
        qkv: args.qkv,
        q: SharedMut::new(args.q),
        query_ring: SharedMut::new(args.query_ring.unwrap_or_default()),
        k_cache: SharedMut::new(args.k_cache),
        v_cache: SharedMut::new(args.v_cache),
        positions: args.positions,
        slots: args.slots,
        ring_rows: args.ring_rows,
        distinct: &scratch.distinct,
        table: &scratch.table,
        rotary_dim: args.rotary_dim,
        qk_norm: args.qk_norm,
        num_q_heads: args.num_q_heads,
        layout: args.layout,
    };
    for_rows(pool, rows, width, &|rows| dispatch(level, Turn { job: &job, rows }));
    Ok(())
}

fn check<T: Elem>(args: &RopeAppendArgs<'_, T>) -> Result<()> {
    let layout = args.layout;
    let (rows, dim) = (&args.rows, layout.head_dim);
    let shape = |expected: String, got: String| Err(Error::Shape { op: "rope_append", expected, got });
    checks::rotary("rope_append", args.rotary_dim, dim)?;
    if rows.start > rows.end || args.inv_freq.len() != args.rotary_dim / 2 {
        return shape(format!("{} frequencies", args.rotary_dim / 2), args.inv_freq.len().to_string());
    }
    let width = (args.num_q_heads + 2 * layout.num_kv_heads) * dim;
    if args.qkv.len() < rows.end * width || args.q.len() < rows.end * args.num_q_heads * dim {
        return shape(
            format!("{} rows of {width} and of {} x {dim}", rows.end, args.num_q_heads),
            format!("{} and {} elements", args.qkv.len(), args.q.len()),
        );
    }
    if args.positions.len() < rows.end || args.slots.len() < rows.end {
        return shape(format!("{} positions and slots", rows.end), args.slots.len().to_string());
    }
    let cache = layout.num_blocks * layout.block_elems();
    let num_slots = layout.num_blocks * layout.block_size;
    if args.k_cache.len() < cache || args.v_cache.len() < cache {
        return shape(format!("{cache} elements of K and V"), args.k_cache.len().to_string());
    }
    if args.slots[rows.clone()].iter().any(|&s| s as usize >= num_slots) {
        return shape(format!("slots below {num_slots}"), "one beyond".into());
    }
    let num_ring_rows = checks::ring_rows(args.ring_rows, args.positions.len())?;
    checks::ring_is_there(num_ring_rows, args.query_ring.is_some())?;
    let ring_len = num_ring_rows * args.num_q_heads * dim;
    if args.query_ring.as_ref().is_some_and(|ring| ring.len() < ring_len) {
        return shape(format!("a query ring of {ring_len} elements"), "a smaller one".into());
    }
    let Some(norm) = args.qk_norm else { return Ok(()) };
    let (q, k) = match norm.span {
        NormSpan::Head => (dim, dim),
        NormSpan::Row => (args.num_q_heads * dim, layout.num_kv_heads * dim),
    };
    if (norm.q.len(), norm.k.len()) != (q, k) {
        return shape(format!("norm weights of {q} and {k}"), format!("{} and {}", norm.q.len(), norm.k.len()));
    }
    Ok(())
}

struct Job<'a, T> {
    qkv: &'a [f32],
    q: SharedMut<'a, T>,
    query_ring: SharedMut<'a, T>,
    k_cache: SharedMut<'a, T>,
    v_cache: SharedMut<'a, T>,
    positions: &'a [u32],
    slots: &'a [u32],
    ring_rows: &'a [u32],
    distinct: &'a [u32],
    table: &'a [f32],
    rotary_dim: usize,
    qk_norm: Option<QkWeights<'a>>,
    num_q_heads: usize,
    layout: &'a KvLayout,
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
        let (hq, hkv, dim) = (job.num_q_heads, job.layout.num_kv_heads, job.layout.head_dim);
        let (size, turned) = (job.layout.block_size, job.rotary_dim);
        for row in self.rows {
            let at = job.distinct.binary_search(&job.positions[row]).unwrap_or_default() * turned;
            let (cos, sin) = job.table[at..at + turned].split_at(turned / 2);
            let heads = &job.qkv[row * (hq + 2 * hkv) * dim..(row + 1) * (hq + 2 * hkv) * dim];
            let (qs, kvs) = heads.split_at(hq * dim);
            let (ks, vs) = kvs.split_at(hkv * dim);
            let q_norm = job.qk_norm.map(|n| RowNorm::new(v, n, n.q, qs));
            let k_norm = job.qk_norm.map(|n| RowNorm::new(v, n, n.k, ks));
            // SAFETY: threads have different rows.
            let q = unsafe { job.q.range(row * hq * dim..(row + 1) * hq * dim) };
            for (head, (x, y)) in qs.chunks_exact(dim).zip(q.chunks_exact_mut(dim)).enumerate() {
                rotate(v, x, head_norm(v, q_norm, head, x), (cos, sin), y);
            }
            if let Some(&kept) = job.ring_rows.get(row).filter(|&&kept| kept != NO_RING_ROW) {
                let to = kept as usize * hq * dim;
                // SAFETY: no two rows have the same ring row.
                unsafe { job.query_ring.range(to..to + hq * dim) }.copy_from_slice(q);
            }
            let slot = job.slots[row] as usize;
            for (head, (k, value)) in ks.chunks_exact(dim).zip(vs.chunks_exact(dim)).enumerate() {
                let to = job.layout.elem(slot / size, head, slot % size);
                // SAFETY: no two rows have the same slot.
                let (k_to, v_to) = unsafe { (job.k_cache.range(to..to + dim), job.v_cache.range(to..to + dim)) };
                rotate(v, k, head_norm(v, k_norm, head, k), (cos, sin), k_to);
                narrow_row(v, value, v_to);
            }
        }
    }
}

/// The norm of a row's q or k heads.
#[derive(Clone, Copy)]
enum RowNorm<'a> {
    /// Weight `[D]` and eps for each head.
    Head(&'a [f32], f32),
    /// Weight of all heads, and 1 / rms of the row.
    Row(&'a [f32], f32),
}

impl<'a> RowNorm<'a> {
    #[inline(always)]
    fn new<V: Vector>(v: V, norm: QkWeights<'_>, weight: &'a [f32], heads: &[f32]) -> Self {
        match norm.span {
            NormSpan::Head => Self::Head(weight, norm.eps),
            NormSpan::Row => Self::Row(weight, inv_rms(sum_squares(v, heads), heads.len(), norm.eps)),
        }
    }
}

/// Weight and 1 / rms of head number `head`, which is `x`.
#[inline(always)]
fn head_norm<'a, V: Vector>(v: V, norm: Option<RowNorm<'a>>, head: usize, x: &[f32]) -> Option<(&'a [f32], f32)> {
    match norm? {
        RowNorm::Head(weight, eps) => Some((weight, inv_rms(sum_squares(v, x), x.len(), eps))),
        RowNorm::Row(weight, inv) => Some((&weight[head * x.len()..][..x.len()], inv)),
    }
}

/// Norms one head where asked, and turns as many of its elements as there are cosines and sines.
#[inline(always)]
fn rotate<V: Vector, T: Elem>(v: V, x: &[f32], norm: Option<(&[f32], f32)>, (cos, sin): (&[f32], &[f32]), y: &mut [T]) {
    let half = cos.len();
    let (x0, x1) = x[..2 * half].split_at(half);
    let (turned, passed) = y.split_at_mut(2 * half);
    let (y0, y1) = turned.split_at_mut(half);
    let inv = v.splat(norm.map_or(1.0, |(_, inv)| inv));
    let mut at = 0;
    while at < half {
        let part = at..half.min(at + V::LANES);
        at = part.end;
        let mut a = load_some(v, &x0[part.clone()]);
        let mut b = load_some(v, &x1[part.clone()]);
        if let Some((w, _)) = norm {
            a = v.mul(v.mul(a, inv), load_some(v, &w[part.clone()]));
            b = v.mul(v.mul(b, inv), load_some(v, &w[half..][part.clone()]));
        }
        let (c, s) = (load_some(v, &cos[part.clone()]), load_some(v, &sin[part.clone()]));
        store_some(v, v.sub(v.mul(a, c), v.mul(b, s)), &mut y0[part.clone()]);
        store_some(v, v.add(v.mul(b, c), v.mul(a, s)), &mut y1[part]);
    }
    match norm {
        Some((w, inv)) => normalize(v, &x[2 * half..], inv, &w[2 * half..], passed),
        None => narrow_row(v, &x[2 * half..], passed),
    }
}

/// Copies the first `num_slots` slots of each pair's source to its destination, for every kv head.
pub fn kv_copy_blocks<T: Elem>(
    copies: &[BlockCopy],
    k_cache: &mut [T],
    v_cache: &mut [T],
    layout: &KvLayout,
) -> Result<()> {
    let cache = layout.num_blocks * layout.block_elems();
    let fits =
        |c: &BlockCopy| (c.src.max(c.dst) as usize) < layout.num_blocks && c.num_slots as usize <= layout.block_size;
    if k_cache.len() < cache || v_cache.len() < cache || !copies.iter().all(fits) {
        return Err(Error::Shape {
            op: "kv_copy_blocks",
            expected: format!("blocks below {}, at most {} slots of each", layout.num_blocks, layout.block_size),
            got: format!("{copies:?}"),
        });
    }
    for copy in copies {
        let len = copy.num_slots as usize * layout.head_dim;
        for head in 0..layout.num_kv_heads {
            let from = layout.elem(copy.src as usize, head, 0);
            let to = layout.elem(copy.dst as usize, head, 0);
            k_cache.copy_within(from..from + len, to);
            v_cache.copy_within(from..from + len, to);
        }
    }
    Ok(())
}

//! `glu`, `gather_rows`, `embed` and `softcap`.
//!
//! formula: y = activation(g) * u; dst\[i\] = src\[rows\[i\]\]; x\[t\] = table\[ids\[t\]\] * scale; x = cap * tanh(x / cap)
//! work split: rows
//! numerics: sigmoid through e^-|g|, so nothing overflows; one rounding to the compute type; tanh within 4 ulp
//! traffic: every operand once
//! oracle: `testing::oracle`; tests: `tests/kernels/elementwise.rs`
#![allow(unsafe_code)]

use std::ops::Range;

use half::{bf16, f16};

use super::elem::{Elem, load_part, load_some, store_part, store_some};
use super::norm::THREAD_ELEMS;
use super::pool::{SharedMut, ThreadPool, share};
use super::simd::SimdLevel;
use super::vector::{Kernel, LOG2_E, Vector, dispatch, tanh};
use crate::backend::Activation;
use crate::error::{Error, Result};

/// The arguments of `glu`; `T` is the compute type.
pub struct GluArgs<'a, T> {
    /// Rows to work on.
    pub rows: Range<usize>,
    /// `[T, 2 * inter]`: gate, then up.
    pub gate_up: &'a [f32],
    /// `[T, inter]`, written.
    pub y: &'a mut [T],
    /// Row width of `y`.
    pub intermediate: usize,
    /// What the gate goes through.
    pub activation: Activation,
}

/// See [`GluArgs`].
pub fn glu<T: Elem>(level: SimdLevel, pool: &mut ThreadPool, args: GluArgs<'_, T>) -> Result<()> {
    let GluArgs { rows, gate_up, y, intermediate: n, activation } = args;
    if rows.start > rows.end || gate_up.len() < rows.end * 2 * n || y.len() < rows.end * n {
        return Err(Error::Shape {
            op: "glu",
            expected: format!("rows {rows:?} of 2 x {n} and {n}"),
            got: format!("{} and {} elements", gate_up.len(), y.len()),
        });
    }
    let out = SharedMut::new(y);
    for_rows(pool, rows, n, &|rows| match activation {
        Activation::Silu => dispatch(level, GluRows { rows, gate_up, y: &out, n, gate: Silu }),
        Activation::GeluTanh => dispatch(level, GluRows { rows, gate_up, y: &out, n, gate: GeluTanh }),
    });
    Ok(())
}

/// An activation as `g * sigmoid(s)`.
trait Gate: Copy {
    /// s of g.
    fn logit<V: Vector>(self, v: V, g: V::F) -> V::F;
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct GeluTanh;

impl Gate for Silu {
    #[inline(always)]
    fn logit<V: Vector>(self, _v: V, g: V::F) -> V::F {
        g
    }
}

/// `(1 + tanh(z)) / 2 = sigmoid(2 z)`.
impl Gate for GeluTanh {
    #[inline(always)]
    fn logit<V: Vector>(self, v: V, g: V::F) -> V::F {
        // 2 sqrt(2 / pi)
        let scale = v.mul(v.splat(1.595_769), g);
        v.mul(scale, v.fma(v.mul(v.splat(0.044_715), g), g, v.splat(1.0)))
    }
}

struct GluRows<'a, T, G> {
    rows: Range<usize>,
    gate_up: &'a [f32],
    y: &'a SharedMut<'a, T>,
    n: usize,
    gate: G,
}

impl<T: Elem, G: Gate> Kernel for GluRows<'_, T, G> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let n = self.n;
        for row in self.rows {
            let (gate, up) = self.gate_up[row * 2 * n..(row + 1) * 2 * n].split_at(n);
            // SAFETY: threads have different rows.
            let y = unsafe { self.y.range(row * n..(row + 1) * n) };
            let mut gs = gate.chunks_exact(V::LANES);
            let mut us = up.chunks_exact(V::LANES);
            let mut ys = y.chunks_exact_mut(V::LANES);
            for ((g, u), y) in gs.by_ref().zip(us.by_ref()).zip(ys.by_ref()) {
                T::store(v, gate_one(v, self.gate, v.load(g), v.load(u)), y);
            }
            let rest = ys.into_remainder();
            if !rest.is_empty() {
                let y = gate_one(v, self.gate, load_part(v, gs.remainder()), load_part(v, us.remainder()));
                store_part(v, y, rest);
            }
        }
    }
}

#[inline(always)]
fn gate_one<V: Vector, G: Gate>(v: V, gate: G, g: V::F, u: V::F) -> V::F {
    let (one, s) = (v.splat(1.0), gate.logit(v, g));
    let t = v.exp2(v.mul(v.abs(s), v.splat(-LOG2_E)));
    let sigmoid = v.div(v.select_nonneg(s, one, t), v.add(one, t));
    v.mul(v.mul(g, sigmoid), u)
}

/// `dst[i] = src[rows[i]]` for rows of `width`.
pub fn gather_rows(pool: &mut ThreadPool, rows: &[u32], src: &[f32], dst: &mut [f32], width: usize) -> Result<()> {
    let held = src.len() / width.max(1);
    if dst.len() < rows.len() * width || rows.iter().any(|&r| r as usize >= held) {
        return Err(Error::Shape {
            op: "gather_rows",
            expected: format!("{} rows of {width}, below row {held}", rows.len()),
            got: format!("{} elements, row {:?}", dst.len(), rows.iter().max()),
        });
    }
    let out = SharedMut::new(dst);
    for_rows(pool, 0..rows.len(), width, &|part| {
        for i in part {
            let from = rows[i] as usize * width;
            // SAFETY: threads have different rows.
            unsafe { out.range(i * width..(i + 1) * width) }.copy_from_slice(&src[from..from + width]);
        }
    });
    Ok(())
}

/// A table of rows as it is stored.
#[derive(Clone, Copy, Debug)]
pub enum Table<'a> {
    /// `[vocab, hidden]`
    F32(&'a [f32]),
    /// `[vocab, hidden]`
    Bf16(&'a [bf16]),
    /// `[vocab, hidden]`
    F16(&'a [f16]),
}

impl Table<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(t) => t.len(),
            Self::Bf16(t) => t.len(),
            Self::F16(t) => t.len(),
        }
    }
}

/// The arguments of `embed`.
pub struct EmbedArgs<'a> {
    /// Where rows come from.
    pub table: Table<'a>,
    /// `[T]` rows of the table.
    pub ids: &'a [u32],
    /// Multiplies them; 1 keeps every bit.
    pub scale: f32,
    /// `[T, hidden]`, written.
    pub x: &'a mut [f32],
    /// Row width.
    pub hidden: usize,
}

/// `x[t] = table[ids[t]] * scale`, widened first.
pub fn embed(level: SimdLevel, pool: &mut ThreadPool, args: EmbedArgs<'_>) -> Result<()> {
    let EmbedArgs { table, ids, scale, x, hidden } = args;
    let vocab = table.len() / hidden.max(1);
    if x.len() < ids.len() * hidden || ids.iter().any(|&id| id as usize >= vocab) {
        return Err(Error::Shape {
            op: "embed",
            expected: format!("{} rows of {hidden}, ids below {vocab}", ids.len()),
            got: format!("{} elements, id {:?}", x.len(), ids.iter().max()),
        });
    }
    let out = SharedMut::new(x);
    for_rows(pool, 0..ids.len(), hidden, &|rows| match table {
        Table::F32(table) => dispatch(level, EmbedRows { rows, table, ids, scale, x: &out, hidden }),
        Table::Bf16(table) => dispatch(level, EmbedRows { rows, table, ids, scale, x: &out, hidden }),
        Table::F16(table) => dispatch(level, EmbedRows { rows, table, ids, scale, x: &out, hidden }),
    });
    Ok(())
}

struct EmbedRows<'a, T> {
    rows: Range<usize>,
    table: &'a [T],
    ids: &'a [u32],
    scale: f32,
    x: &'a SharedMut<'a, f32>,
    hidden: usize,
}

impl<T: Elem> Kernel for EmbedRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let (n, scale) = (self.hidden, v.splat(self.scale));
        for row in self.rows {
            let from = self.ids[row] as usize * n;
            let src = &self.table[from..from + n];
            // SAFETY: threads have different rows.
            let x = unsafe { self.x.range(row * n..(row + 1) * n) };
            let mut ss = src.chunks_exact(V::LANES);
            let mut xs = x.chunks_exact_mut(V::LANES);
            for (s, x) in ss.by_ref().zip(xs.by_ref()) {
                v.store(v.mul(T::load(v, s), scale), x);
            }
            let rest = xs.into_remainder();
            if !rest.is_empty() {
                store_part(v, v.mul(load_part(v, ss.remainder()), scale), rest);
            }
        }
    }
}

/// `logits = cap * tanh(logits / cap)`, whole rows of `vocab`.
pub fn softcap(level: SimdLevel, pool: &mut ThreadPool, logits: &mut [f32], vocab: usize, cap: f32) {
    let num_rows = logits.len() / vocab.max(1);
    let logits = SharedMut::new(logits);
    for_rows(pool, 0..num_rows, vocab, &|rows| {
        // SAFETY: threads have different rows.
        let x = unsafe { logits.range(rows.start * vocab..rows.end * vocab) };
        dispatch(level, Cap { x, cap });
    });
}

struct Cap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Kernel for Cap<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let cap = v.splat(self.cap);
        for x in self.x.chunks_mut(V::LANES) {
            let capped = v.mul(cap, tanh(v, v.div(load_some(v, &*x), cap)));
            store_some(v, capped, x);
        }
    }
}

/// Calls `f` for disjoint parts of `rows`, on all threads when there is enough to do.
pub(super) fn for_rows(pool: &mut ThreadPool, rows: Range<usize>, width: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    let threads = pool.num_threads();
    if threads == 1 || rows.len() < 2 || rows.len() * width < THREAD_ELEMS {
        return f(rows);
    }
    pool.run(&|idx| {
        let part = share(rows.len(), 1, idx, threads);
        f(rows.start + part.start..rows.start + part.end);
    });
}

//! `silu_mul`, `gather_rows` and `embed`.
//!
//! formula: y = g * sigmoid(g) * u; dst\[i\] = src\[rows\[i\]\]; x\[t\] = table\[ids\[t\]\]
//! work split: rows
//! numerics: sigmoid through e^-|g|, so nothing overflows; one rounding to the compute type
//! traffic: every operand once
//! oracle: `testing::oracle`; tests: `tests/kernels/elementwise.rs`
#![allow(unsafe_code)]

use std::ops::Range;

use half::{bf16, f16};

use super::elem::{Elem, load_part, store_part};
use super::norm::THREAD_ELEMS;
use super::pool::{SharedMut, ThreadPool, share};
use super::simd::SimdLevel;
use super::vector::{Kernel, LOG2_E, Vector, dispatch};
use crate::error::{Error, Result};

/// The arguments of `silu_mul`; `T` is the compute type.
pub struct SiluMulArgs<'a, T> {
    /// Rows to work on.
    pub rows: Range<usize>,
    /// `[T, 2 * inter]`: gate, then up.
    pub gate_up: &'a [f32],
    /// `[T, inter]`, written.
    pub y: &'a mut [T],
    /// Row width of `y`.
    pub intermediate: usize,
}

/// See [`SiluMulArgs`].
pub fn silu_mul<T: Elem>(level: SimdLevel, pool: &mut ThreadPool, args: SiluMulArgs<'_, T>) -> Result<()> {
    let SiluMulArgs { rows, gate_up, y, intermediate: n } = args;
    if rows.start > rows.end || gate_up.len() < rows.end * 2 * n || y.len() < rows.end * n {
        return Err(Error::Shape {
            op: "silu_mul",
            expected: format!("rows {rows:?} of 2 x {n} and {n}"),
            got: format!("{} and {} elements", gate_up.len(), y.len()),
        });
    }
    let out = SharedMut::new(y);
    for_rows(pool, rows, n, &|rows| dispatch(level, SiluRows { rows, gate_up, y: &out, n }));
    Ok(())
}

struct SiluRows<'a, T> {
    rows: Range<usize>,
    gate_up: &'a [f32],
    y: &'a SharedMut<'a, T>,
    n: usize,
}

impl<T: Elem> Kernel for SiluRows<'_, T> {
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
                T::store(v, gate_one(v, v.load(g), v.load(u)), y);
            }
            let rest = ys.into_remainder();
            if !rest.is_empty() {
                let y = gate_one(v, load_part(v, gs.remainder()), load_part(v, us.remainder()));
                store_part(v, y, rest);
            }
        }
    }
}

#[inline(always)]
fn gate_one<V: Vector>(v: V, g: V::F, u: V::F) -> V::F {
    let one = v.splat(1.0);
    let t = v.exp2(v.mul(v.abs(g), v.splat(-LOG2_E)));
    let sigmoid = v.div(v.select_nonneg(g, one, t), v.add(one, t));
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

/// `x[t] = table[ids[t]]`, widened.
pub fn embed(
    level: SimdLevel,
    pool: &mut ThreadPool,
    table: Table<'_>,
    ids: &[u32],
    x: &mut [f32],
    hidden: usize,
) -> Result<()> {
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
        Table::F32(table) => dispatch(level, EmbedRows { rows, table, ids, x: &out, hidden }),
        Table::Bf16(table) => dispatch(level, EmbedRows { rows, table, ids, x: &out, hidden }),
        Table::F16(table) => dispatch(level, EmbedRows { rows, table, ids, x: &out, hidden }),
    });
    Ok(())
}

struct EmbedRows<'a, T> {
    rows: Range<usize>,
    table: &'a [T],
    ids: &'a [u32],
    x: &'a SharedMut<'a, f32>,
    hidden: usize,
}

impl<T: Elem> Kernel for EmbedRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let n = self.hidden;
        for row in self.rows {
            let from = self.ids[row] as usize * n;
            let src = &self.table[from..from + n];
            // SAFETY: threads have different rows.
            let x = unsafe { self.x.range(row * n..(row + 1) * n) };
            let mut ss = src.chunks_exact(V::LANES);
            let mut xs = x.chunks_exact_mut(V::LANES);
            for (s, x) in ss.by_ref().zip(xs.by_ref()) {
                v.store(T::load(v, s), x);
            }
            let rest = xs.into_remainder();
            if !rest.is_empty() {
                store_part(v, load_part(v, ss.remainder()), rest);
            }
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

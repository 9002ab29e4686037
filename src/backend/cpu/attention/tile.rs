//! The arithmetic of one 64-slot tile: what it costs, and every bit that comes out of attention.
//!
//! ```text
//! K tile [step][64 slots], V tile [slot step][D], both of 32-bit words: an f32, or (PACKED) a pair of bf16
//!
//! s[slot]  = sm_scale * log2(e) * sum over steps of q * k     -inf at and past the row's kv_len, and below its window;
//!            capped: softcap * log2(e) * tanh(sm_scale / softcap * sum)
//! m'       = max(m, max s)        a = 2^(m - m')       p = 2^(s - m')
//! l'       = a * l + sum p        (LANES partial sums, added up at the end)
//! o'       = a * o + sum over the slots attended to of round(p) * v
//! ```
//!
//! A query's sums run over steps in ascending order in its own accumulators, so how many queries go through the tile
//! together (1, 2 or 4, for register reuse) cannot change a bit. V past a query's `kv_len` or below its window is not
//! multiplied by a zero but left out: it may be another row's NaN.

use std::ops::Range;

use bytemuck::cast_slice_mut;
use half::bf16;

use super::scale::ScoreScale;
use crate::backend::cpu::elem::{Elem, MAX_LANES, load_part};
use crate::backend::cpu::vector::Vector;
use crate::batch::TILE_SLOTS;
use crate::dtype::DType;

/// Most queries worked on at once.
const MAX_QUERIES: usize = 4;
/// Vectors of slots, or of elements of D, held per query.
const VECS: usize = 4;

/// Words in a tile's row for `T`: pairs of bf16 for the dot product instruction, else f32.
pub(super) const fn is_packed<T: Elem>(pairs: bool) -> bool {
    pairs && matches!(T::DTYPE, DType::Bf16)
}

/// One thread's tile and the softmax state of its queries. Grows to the largest unit seen, then allocates no more.
pub(super) struct Scratch {
    /// K of one tile, transposed: `[steps_max][64]` words.
    k: Vec<[u32; TILE_SLOTS]>,
    /// V of one tile: `[64 or 32][d_stride]` words.
    v: Vec<u32>,
    /// K rows before the transposition: `[64][k_stride]` words.
    stage: Vec<u32>,
    scores: [[f32; TILE_SLOTS]; MAX_QUERIES],
    probs: [[u32; TILE_SLOTS]; MAX_QUERIES],
    /// `[queries][steps]` words.
    q: Vec<u32>,
    /// `[queries][d_stride]`, unnormalised.
    o: Vec<f32>,
    /// `[queries][MAX_LANES]` partial sums of p.
    l: Vec<f32>,
    /// `[queries]` running maxima, base 2.
    m: Vec<f32>,
    dims: Dims,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            k: Vec::new(),
            v: Vec::new(),
            stage: Vec::new(),
            scores: [[0.0; TILE_SLOTS]; MAX_QUERIES],
            probs: [[0; TILE_SLOTS]; MAX_QUERIES],
            q: Vec::new(),
            o: Vec::new(),
            l: Vec::new(),
            m: Vec::new(),
            dims: Dims::default(),
        }
    }
}

/// Strides of the scratch, in words.
#[derive(Clone, Copy, Default)]
struct Dims {
    head_dim: usize,
    /// Words of a q or k row: `head_dim`, or half of it.
    steps: usize,
    /// `steps` rounded up to whole vectors.
    k_stride: usize,
    /// `head_dim` rounded up to whole vectors.
    d_stride: usize,
}

/// Where a tile's rows are: pieces of at most one block, in slot order.
pub(super) struct TileRows<'a, T> {
    /// Blocks of the tile, in order.
    pub blocks: &'a [u32],
    /// K or V of one layer.
    pub cache: &'a [T],
    /// Elements between a block and the next.
    pub block_elems: usize,
    /// First element of the kv head inside a block.
    pub head_start: usize,
    pub block_size: usize,
    pub head_dim: usize,
    /// Slots to read; the rest of the tile is zero.
    pub num_slots: usize,
}

impl<'a, T> TileRows<'a, T> {
    /// The row of a slot below `num_slots`.
    #[inline(always)]
    fn row(&self, slot: usize) -> &'a [T] {
        let block = self.blocks[slot / self.block_size] as usize;
        let at = block * self.block_elems + self.head_start + slot % self.block_size * self.head_dim;
        &self.cache[at..at + self.head_dim]
    }
}

impl Scratch {
    /// Makes room for `queries` queries with an empty state.
    #[inline(always)]
    pub(super) fn begin<V: Vector, T: Elem, const PAIRS: bool>(&mut self, _v: V, queries: usize, head_dim: usize) {
        let packed = is_packed::<T>(PAIRS);
        let steps = if packed { head_dim / 2 } else { head_dim };
        let d = Dims {
            head_dim,
            steps,
            k_stride: steps.next_multiple_of(V::LANES),
            d_stride: head_dim.next_multiple_of(V::LANES),
        };
        self.dims = d;
        self.k.resize(d.k_stride, [0; TILE_SLOTS]);
        self.stage.clear();
        self.stage.resize(TILE_SLOTS * d.k_stride, 0);
        self.v.clear();
        self.v.resize(TILE_SLOTS * d.d_stride, 0);
        self.q.resize(queries * d.steps, 0);
        self.o.clear();
        self.o.resize(queries * d.d_stride, 0.0);
        self.l.clear();
        self.l.resize(queries * MAX_LANES, 0.0);
        self.m.clear();
        self.m.resize(queries, f32::NEG_INFINITY);
    }

    /// Takes the query vector of query `i`.
    #[inline(always)]
    pub(super) fn set_query<V: Vector, T: Elem, const PAIRS: bool>(&mut self, v: V, i: usize, q: &[T]) {
        let steps = self.dims.steps;
        put_row::<V, T, PAIRS>(v, q, &mut self.q[i * steps..(i + 1) * steps]);
    }

    /// Makes the tile of `k` current.
    #[inline(always)]
    pub(super) fn load_keys<V: Vector, T: Elem, const PAIRS: bool>(&mut self, v: V, k: &TileRows<'_, T>) {
        let d = self.dims;
        let n = k.num_slots.min(TILE_SLOTS);
        for (slot, row) in self.stage.chunks_exact_mut(d.k_stride).enumerate() {
            if slot < n {
                put_row::<V, T, PAIRS>(v, k.row(slot), &mut row[..d.steps]);
            } else if slot < n.next_multiple_of(V::LANES) {
                row.fill(0);
            }
        }
        let words: &mut [u32] = self.k.as_flattened_mut();
        for step in (0..d.k_stride).step_by(V::LANES) {
            for slot in (0..n).step_by(V::LANES) {
                let src = &self.stage[slot * d.k_stride + step..];
                v.transpose(src, d.k_stride, &mut words[step * TILE_SLOTS + slot..], TILE_SLOTS);
            }
        }
    }

    /// Makes the tile of `k` and `vr` current.
    #[inline(always)]
    pub(super) fn load_tile<V: Vector, T: Elem, const PAIRS: bool>(
        &mut self,
        v: V,
        k: &TileRows<'_, T>,
        vr: &TileRows<'_, T>,
    ) {
        self.load_keys::<V, T, PAIRS>(v, k);
        let d = self.dims;
        let n = k.num_slots.min(TILE_SLOTS);
        if is_packed::<T>(PAIRS) {
            for (pair, row) in self.v.chunks_exact_mut(d.d_stride).take(n.div_ceil(2)).enumerate() {
                let a: &[bf16] = bytemuck::cast_slice(vr.row(2 * pair));
                // The missing half of an odd last pair is cleared when it is used.
                let b: &[bf16] = if 2 * pair + 1 < n { bytemuck::cast_slice(vr.row(2 * pair + 1)) } else { a };
                let mut at = 0;
                while at + 2 * V::LANES <= d.head_dim {
                    v.zip_bf16(&a[at..], &b[at..], &mut row[at..]);
                    at += 2 * V::LANES;
                }
                for i in at..d.head_dim {
                    row[i] = u32::from(a[i].to_bits()) | u32::from(b[i].to_bits()) << 16;
                }
            }
        } else {
            for (slot, row) in self.v.chunks_exact_mut(d.d_stride).take(n).enumerate() {
                put_row::<V, T, false>(v, vr.row(slot), &mut row[..d.head_dim]);
            }
        }
    }

    /// Folds the current tile into `queries`, which all attend to the same `slots` of it, one at least.
    #[inline(always)]
    pub(super) fn fold<V: Vector, T: Elem, const PAIRS: bool>(
        &mut self,
        v: V,
        queries: Range<usize>,
        slots: &Range<usize>,
        scale: &ScoreScale,
    ) {
        let Range { start: mut at, end } = queries;
        while V::QUERIES >= 4 && at + 4 <= end {
            self.fold_some::<V, T, PAIRS, 4>(v, at, slots, scale);
            at += 4;
        }
        while V::QUERIES >= 2 && at + 2 <= end {
            self.fold_some::<V, T, PAIRS, 2>(v, at, slots, scale);
            at += 2;
        }
        while at < end {
            self.fold_some::<V, T, PAIRS, 1>(v, at, slots, scale);
            at += 1;
        }
    }

    #[inline(always)]
    fn fold_some<V: Vector, T: Elem, const PAIRS: bool, const R: usize>(
        &mut self,
        v: V,
        first: usize,
        slots: &Range<usize>,
        scale: &ScoreScale,
    ) {
        let d = self.dims;
        let k = &self.k[..d.steps];
        let q = &self.q[first * d.steps..(first + R) * d.steps];
        score::<V, T, PAIRS, R>(v, k, q, &mut self.scores);
        scale.cap(v, self.scores[..R].as_flattened_mut());
        let mut alpha = [v.splat(0.0); R];
        for (r, alpha) in alpha.iter_mut().enumerate() {
            let l = &mut self.l[(first + r) * MAX_LANES..][..MAX_LANES];
            *alpha = softmax::<V, T, PAIRS>(
                v,
                &mut self.scores[r],
                &mut self.probs[r],
                slots,
                scale.factor,
                &mut self.m[first + r],
                l,
            );
        }
        let o = &mut self.o[first * d.d_stride..(first + R) * d.d_stride];
        let tile = ValueTile { words: &self.v, stride: d.d_stride, slots };
        let mut at = 0;
        while at < d.d_stride {
            let vecs = match (d.d_stride - at) / V::LANES {
                1 => 1,
                2 | 3 => 2,
                _ => VECS,
            };
            match vecs {
                1 => mix::<V, T, PAIRS, R, 1>(v, &tile, at, &self.probs, &alpha, o),
                2 => mix::<V, T, PAIRS, R, 2>(v, &tile, at, &self.probs, &alpha, o),
                _ => mix::<V, T, PAIRS, R, VECS>(v, &tile, at, &self.probs, &alpha, o),
            }
            at += vecs * V::LANES;
        }
    }

    /// Adds to `mass` what each slot of the current keys received from the queries, one after the other: e^(score - lse) of
    /// those a query attends to. `queries` has the slots of the tile each attends to, and its lse times log2(e).
    #[inline(always)]
    pub(super) fn add_mass<V: Vector, T: Elem, const PAIRS: bool>(
        &mut self,
        v: V,
        queries: &[(Range<usize>, f32)],
        scale: &ScoreScale,
        mass: &mut [f32; TILE_SLOTS],
    ) {
        let (mut at, end) = (0, queries.len());
        while V::QUERIES >= 4 && at + 4 <= end {
            self.add_some::<V, T, PAIRS, 4>(v, at, &queries[at..at + 4], scale, mass);
            at += 4;
        }
        while at < end {
            self.add_some::<V, T, PAIRS, 1>(v, at, &queries[at..at + 1], scale, mass);
            at += 1;
        }
    }

    #[inline(always)]
    fn add_some<V: Vector, T: Elem, const PAIRS: bool, const R: usize>(
        &mut self,
        v: V,
        first: usize,
        queries: &[(Range<usize>, f32)],
        scale: &ScoreScale,
        mass: &mut [f32; TILE_SLOTS],
    ) {
        let steps = self.dims.steps;
        let q = &self.q[first * steps..(first + R) * steps];
        score::<V, T, PAIRS, R>(v, &self.k[..steps], q, &mut self.scores);
        scale.cap(v, self.scores[..R].as_flattened_mut());
        let scale = v.splat(scale.factor);
        for (scores, (slots, lse)) in self.scores.iter().zip(queries) {
            let lse = v.splat(-lse);
            for (c, (s, mass)) in scores.chunks_exact(V::LANES).zip(mass.chunks_exact_mut(V::LANES)).enumerate() {
                let x = v.fma(v.load(s), scale, lse);
                let x = keep_slots(v, slots, c * V::LANES, x, v.splat(f32::NEG_INFINITY));
                v.store(v.add(v.load(mass), v.exp2(x)), mass);
            }
        }
    }

    /// Writes query `i`'s normalised output and returns its ln sum exp.
    #[inline(always)]
    pub(super) fn finish<V: Vector, T: Elem>(&self, v: V, i: usize, o: &mut [T]) -> f32 {
        let d = self.dims;
        let l = v.reduce_add(v.load(&self.l[i * MAX_LANES..]));
        let total = v.splat(l);
        let row = &self.o[i * d.d_stride..(i + 1) * d.d_stride];
        for (chunk, o) in row.chunks_exact(V::LANES).zip(o.chunks_mut(V::LANES)) {
            let x = v.div(v.load(chunk), total);
            if o.len() == V::LANES { T::store(v, x, o) } else { crate::backend::cpu::elem::store_part(v, x, o) }
        }
        self.m[i] * std::f32::consts::LN_2 + l.ln()
    }
}

/// A row as words: its bits for pairs, else widened.
#[inline(always)]
fn put_row<V: Vector, T: Elem, const PAIRS: bool>(v: V, src: &[T], dst: &mut [u32]) {
    if is_packed::<T>(PAIRS) || matches!(T::DTYPE, DType::F32) {
        let bytes: &mut [u8] = cast_slice_mut(dst);
        return bytes.copy_from_slice(bytemuck::cast_slice(src));
    }
    let dst: &mut [f32] = cast_slice_mut(dst);
    let mut src = src.chunks_exact(V::LANES);
    let mut dst = dst.chunks_exact_mut(V::LANES);
    for (s, d) in src.by_ref().zip(dst.by_ref()) {
        v.store(T::load(v, s), d);
    }
    let mut last = [0.0; MAX_LANES];
    v.store(load_part(v, src.remainder()), &mut last);
    let rest = dst.into_remainder();
    rest.copy_from_slice(&last[..rest.len()]);
}

#[inline(always)]
fn dot<V: Vector, T: Elem, const PAIRS: bool>(v: V, acc: V::F, a: V::F, b: V::F) -> V::F {
    if is_packed::<T>(PAIRS) { v.dot_bf16(acc, a, b) } else { v.fma(a, b, acc) }
}

/// Unscaled scores of `R` queries against all 64 slots.
#[inline(always)]
fn score<V: Vector, T: Elem, const PAIRS: bool, const R: usize>(
    v: V,
    k: &[[u32; TILE_SLOTS]],
    q: &[u32],
    out: &mut [[f32; TILE_SLOTS]; MAX_QUERIES],
) {
    let steps = k.len();
    let mut rows = [q; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &q[r * steps..(r + 1) * steps];
    }
    let mut at = 0;
    while at < TILE_SLOTS {
        let mut acc = [[v.splat(0.0); VECS]; R];
        for step in 0..steps {
            let slots = &k[step][at..at + VECS * V::LANES];
            let mut kv = [acc[0][0]; VECS];
            for c in 0..VECS {
                kv[c] = v.load_words(&slots[c * V::LANES..]);
            }
            for r in 0..R {
                let qv = v.splat_word(rows[r][step]);
                for c in 0..VECS {
                    acc[r][c] = dot::<V, T, PAIRS>(v, acc[r][c], qv, kv[c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..VECS {
                v.store(acc[r][c], &mut out[r][at + c * V::LANES..]);
            }
        }
        at += VECS * V::LANES;
    }
}

/// `x`, whose lanes are slots from `first` on, where the slots are in `slots`, else `other`.
#[inline(always)]
fn keep_slots<V: Vector>(v: V, slots: &Range<usize>, first: usize, x: V::F, other: V::F) -> V::F {
    let x = v.keep_first(slots.end.saturating_sub(first), x, other);
    v.keep_first(slots.start.saturating_sub(first), other, x)
}

/// Turns scores into probabilities, updates m and l, and returns the factor for o.
#[inline(always)]
fn softmax<V: Vector, T: Elem, const PAIRS: bool>(
    v: V,
    scores: &mut [f32; TILE_SLOTS],
    probs: &mut [u32; TILE_SLOTS],
    slots: &Range<usize>,
    scale: f32,
    m: &mut f32,
    l: &mut [f32],
) -> V::F {
    let scale = v.splat(scale);
    let masked = v.splat(f32::NEG_INFINITY);
    let mut top = masked;
    for (c, chunk) in scores.chunks_exact_mut(V::LANES).enumerate() {
        let mut x = v.mul(v.load(chunk), scale);
        if slots.len() < TILE_SLOTS {
            x = keep_slots(v, slots, c * V::LANES, x, masked);
        }
        top = v.max(top, x);
        v.store(x, chunk);
    }
    let top = v.reduce_max(top);
    let before = *m;
    let now = if before > top { before } else { top };
    *m = now;
    let alpha = v.exp2(v.splat(before - now));
    let now = v.splat(now);
    let mut sum = v.mul(v.load(l), alpha);
    let mut at = 0;
    while at < TILE_SLOTS {
        let a = v.exp2(v.sub(v.load(&scores[at..]), now));
        let b = v.exp2(v.sub(v.load(&scores[at + V::LANES..]), now));
        sum = v.add(sum, v.add(a, b));
        if is_packed::<T>(PAIRS) {
            v.pack_bf16(a, b, &mut probs[at / 2..]);
        } else {
            v.store_words(T::round(v, a), &mut probs[at..]);
            v.store_words(T::round(v, b), &mut probs[at + V::LANES..]);
        }
        at += 2 * V::LANES;
    }
    v.store(sum, l);
    alpha
}

struct ValueTile<'a> {
    words: &'a [u32],
    stride: usize,
    /// Slots the queries attend to.
    slots: &'a Range<usize>,
}

/// `o = alpha * o + p V` for `R` queries and `C` vectors of D from element `at`.
#[inline(always)]
fn mix<V: Vector, T: Elem, const PAIRS: bool, const R: usize, const C: usize>(
    v: V,
    tile: &ValueTile<'_>,
    at: usize,
    probs: &[[u32; TILE_SLOTS]; MAX_QUERIES],
    alpha: &[V::F; R],
    o: &mut [f32],
) {
    let mut acc = [[alpha[0]; C]; R];
    for r in 0..R {
        let row = &o[r * tile.stride + at..][..C * V::LANES];
        for c in 0..C {
            acc[r][c] = v.mul(v.load(&row[c * V::LANES..]), alpha[r]);
        }
    }
    let packed = is_packed::<T>(PAIRS);
    let Range { start, end } = *tile.slots;
    let (mut step, steps) = if packed { (start / 2, end / 2) } else { (start, end.min(TILE_SLOTS)) };
    if packed && start % 2 == 1 {
        let row = &tile.words[step * tile.stride + at..][..C * V::LANES];
        for c in 0..C {
            let high = v.high_half(v.load_words(&row[c * V::LANES..]));
            for r in 0..R {
                acc[r][c] = dot::<V, T, PAIRS>(v, acc[r][c], v.splat_word(probs[r][step]), high);
            }
        }
        step += 1;
    }
    while step < steps {
        let row = &tile.words[step * tile.stride + at..][..C * V::LANES];
        let mut vv = [alpha[0]; C];
        for c in 0..C {
            vv[c] = v.load_words(&row[c * V::LANES..]);
        }
        for r in 0..R {
            let p = v.splat_word(probs[r][step]);
            for c in 0..C {
                acc[r][c] = dot::<V, T, PAIRS>(v, acc[r][c], p, vv[c]);
            }
        }
        step += 1;
    }
    if packed && end % 2 == 1 {
        let row = &tile.words[step * tile.stride + at..][..C * V::LANES];
        for c in 0..C {
            let low = v.low_half(v.load_words(&row[c * V::LANES..]));
            for r in 0..R {
                acc[r][c] = dot::<V, T, PAIRS>(v, acc[r][c], v.splat_word(probs[r][step]), low);
            }
        }
    }
    for r in 0..R {
        let row = &mut o[r * tile.stride + at..][..C * V::LANES];
        for c in 0..C {
            v.store(acc[r][c], &mut row[c * V::LANES..]);
        }
    }
}

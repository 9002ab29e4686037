//! The arithmetic of a panel: 64 slots' keys as rows of one element each, so that a row times a vector of slots is a plain
//! multiply-add, and a slot's sums run over D in ascending order however many rows go through together.

use crate::backend::cpu::vector::Vector;
use crate::batch::TILE_SLOTS;

/// Most rows worked on at once.
pub(super) const MAX_ROWS: usize = 4;
/// Vectors of slots held per row.
const VECS: usize = 4;
/// Rows one after the other.
const FIRST_ROWS: [usize; MAX_ROWS] = [0, 1, 2, 3];

/// `[dim]` rows of 64 slots.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a>(pub(super) &'a [[f32; TILE_SLOTS]]);

impl Panel<'_> {
    /// The keys as 64 rows of `dim`.
    #[inline(always)]
    pub(super) fn rows<V: Vector>(self, v: V, rows: &mut [f32]) {
        let (dim, words) = (self.0.len(), bytemuck::cast_slice::<f32, u32>(self.0.as_flattened()));
        let rows: &mut [u32] = bytemuck::cast_slice_mut(rows);
        for d in (0..dim).step_by(V::LANES) {
            for slot in (0..TILE_SLOTS).step_by(V::LANES) {
                v.transpose(&words[d * TILE_SLOTS + slot..], TILE_SLOTS, &mut rows[slot * dim + d..], dim);
            }
        }
    }

    /// Of each slot the largest product with a row of `queries`.
    #[inline(always)]
    pub(super) fn best<V: Vector>(self, v: V, queries: &[f32]) -> [f32; TILE_SLOTS] {
        let mut best = [f32::NEG_INFINITY; TILE_SLOTS];
        let mut products = [[0.0; TILE_SLOTS]; MAX_ROWS];
        let (mut at, dim) = (0, self.0.len());
        while at < queries.len() {
            let left = ((queries.len() - at) / dim).min(MAX_ROWS);
            let taken = self.products(v, &queries[at..], &FIRST_ROWS[..left], &mut products);
            for x in &products[..taken] {
                for (x, best) in x.chunks_exact(V::LANES).zip(best.chunks_exact_mut(V::LANES)) {
                    v.store(v.max(v.load(best), v.load(x)), best);
                }
            }
            at += taken * dim;
        }
        best
    }

    /// Products of the first of the `wanted` rows with all slots, as many as fit the registers; returns how many.
    #[inline(always)]
    pub(super) fn products<V: Vector>(
        self,
        v: V,
        rows: &[f32],
        wanted: &[usize],
        out: &mut [[f32; TILE_SLOTS]; MAX_ROWS],
    ) -> usize {
        if V::QUERIES >= 4 && wanted.len() >= 4 {
            self.products_of::<V, 4>(v, rows, wanted, out);
            4
        } else if V::QUERIES >= 2 && wanted.len() >= 2 {
            self.products_of::<V, 2>(v, rows, wanted, out);
            2
        } else {
            self.products_of::<V, 1>(v, rows, wanted, out);
            1
        }
    }

    #[inline(always)]
    fn products_of<V: Vector, const R: usize>(
        self,
        v: V,
        rows: &[f32],
        wanted: &[usize],
        out: &mut [[f32; TILE_SLOTS]; MAX_ROWS],
    ) {
        let dim = self.0.len();
        let mut cut = [rows; R];
        for (cut, &row) in cut.iter_mut().zip(wanted) {
            *cut = &rows[row * dim..(row + 1) * dim];
        }
        let mut at = 0;
        while at < TILE_SLOTS {
            let mut acc = [[v.splat(0.0); VECS]; R];
            for (d, slots) in self.0.iter().enumerate() {
                let slots = &slots[at..at + VECS * V::LANES];
                let mut keys = [acc[0][0]; VECS];
                for c in 0..VECS {
                    keys[c] = v.load(&slots[c * V::LANES..]);
                }
                for r in 0..R {
                    let x = v.splat(cut[r][d]);
                    for c in 0..VECS {
                        acc[r][c] = v.fma(x, keys[c], acc[r][c]);
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

    /// `<k, sum> - <k, k>` of each slot.
    #[inline(always)]
    pub(super) fn column_sums<V: Vector>(self, v: V, sum: &[f32], out: &mut [f32]) {
        for (c, out) in out.chunks_exact_mut(V::LANES).enumerate() {
            let (mut with_all, mut with_itself) = (v.splat(0.0), v.splat(0.0));
            for (keys, &sum) in self.0.iter().zip(sum) {
                let x = v.load(&keys[c * V::LANES..]);
                with_all = v.fma(x, v.splat(sum), with_all);
                with_itself = v.fma(x, x, with_itself);
            }
            v.store(v.sub(with_all, with_itself), out);
        }
    }
}

/// 64 rows of `dim` as a panel.
#[inline(always)]
pub(super) fn transpose_rows<V: Vector>(v: V, rows: &[f32], dim: usize, panel: &mut [[f32; TILE_SLOTS]]) {
    let rows: &[u32] = bytemuck::cast_slice(rows);
    let words: &mut [u32] = bytemuck::cast_slice_mut(panel.as_flattened_mut());
    for d in (0..dim).step_by(V::LANES) {
        for slot in (0..TILE_SLOTS).step_by(V::LANES) {
            v.transpose(&rows[slot * dim + d..], dim, &mut words[d * TILE_SLOTS + slot..], TILE_SLOTS);
        }
    }
}

/// Divides each key by its norm + 1e-8; `sums` takes the sum of the keys.
#[inline(always)]
pub(super) fn normalise<V: Vector>(v: V, panel: &mut [[f32; TILE_SLOTS]], sums: &mut [f32]) {
    let mut inverse = [0.0; TILE_SLOTS];
    for (c, inverse) in inverse.chunks_exact_mut(V::LANES).enumerate() {
        let mut square = v.splat(0.0);
        for keys in panel.iter() {
            let x = v.load(&keys[c * V::LANES..]);
            square = v.fma(x, x, square);
        }
        v.store(square, inverse);
        for x in inverse {
            *x = 1.0 / (x.sqrt() + 1e-8);
        }
    }
    for (keys, sum) in panel.iter_mut().zip(sums) {
        let mut total = v.splat(0.0);
        for (x, inverse) in keys.chunks_exact_mut(V::LANES).zip(inverse.chunks_exact(V::LANES)) {
            let unit = v.mul(v.load(x), v.load(inverse));
            total = v.add(total, unit);
            v.store(unit, x);
        }
        *sum = v.reduce_add(total);
    }
}

/// The last of 64 values that is above `threshold`.
#[inline(always)]
pub(super) fn last_above<V: Vector>(v: V, x: &[f32; TILE_SLOTS], threshold: f32) -> Option<usize> {
    let mut top = v.splat(f32::NEG_INFINITY);
    for x in x.chunks_exact(V::LANES) {
        top = v.max(top, v.load(x));
    }
    // Most panels have none.
    if v.reduce_max(top) > threshold { x.iter().rposition(|&x| x > threshold) } else { None }
}

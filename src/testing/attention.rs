//! Attention in float64, over a paged cache read through a block table.

use super::oracle::{self, Scoring};
use crate::dtype::DType;
use crate::kv::KvLayout;

/// One layer's cache and how to read it.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// Geometry.
    pub layout: &'a KvLayout,
    /// K, values of the compute type.
    pub k: &'a [f64],
    /// V, values of the compute type.
    pub v: &'a [f64],
}

impl<'a> PagedKv<'a> {
    /// The first `num_slots` vectors of a sequence for one kv head, from `cache`, which is `k` or `v`.
    pub fn rows(&self, cache: &'a [f64], blocks: &[u32], kv_head: usize, num_slots: usize) -> Vec<&'a [f64]> {
        let size = self.layout.block_size;
        (0..num_slots)
            .map(|slot| {
                let at = self.layout.elem(blocks[slot / size] as usize, kv_head, slot % size);
                &cache[at..at + self.layout.head_dim]
            })
            .collect()
    }

    /// One query that sees a sequence's first `num_slots` slots: its output, rounded, and ln sum exp. Zeros and -inf without slots.
    pub fn attention(
        &self,
        dtype: DType,
        q: &[f64],
        blocks: &[u32],
        kv_head: usize,
        num_slots: usize,
        scoring: &Scoring,
    ) -> (Vec<f64>, f64) {
        if num_slots == 0 {
            return (vec![0.0; q.len()], f64::NEG_INFINITY);
        }
        let k = self.rows(self.k, blocks, kv_head, num_slots);
        let v = self.rows(self.v, blocks, kv_head, num_slots);
        oracle::attention(dtype, q, &k, &v, scoring)
    }
}

/// `exp(score - lse)` summed over the `queries` (vector, its lse, slots it sees) that attend to it, for each of `k`.
pub fn attention_mass(queries: &[(&[f64], f64, usize)], k: &[&[f64]], scoring: &Scoring) -> Vec<f64> {
    k.iter()
        .enumerate()
        .map(|(slot, k)| {
            queries
                .iter()
                .filter(|(_, _, num_slots)| scoring.slots(*num_slots).contains(&slot))
                .map(|(q, lse, _)| (scoring.score(q, k) - lse).exp())
                .sum()
        })
        .collect()
}

//! The device side of a KV budget: rings of branches' last queries, the scores that decide a cut, the compaction.

use super::Model;
use super::family::ModelConfig;
use crate::backend::{Backend, KvCompact, KvScores};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::budget::QueryScoring;

/// A ring and how many of its rows hold a query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryRing {
    pub(crate) ring: u32,
    pub(crate) num_queries: usize,
}

/// Which slots of a branch to score, in every layer, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotScoring<'a> {
    pub(crate) blocks: &'a [u32],
    pub(crate) num_slots: usize,
    /// Last slots that are no candidates.
    pub(crate) num_recent: usize,
    pub(crate) ring: QueryRing,
    pub(crate) how: QueryScoring,
}

/// `capacity` rings of `window` queries, in every layer `[capacity * window, Hq, D]`.
pub(super) struct QueryRings<B: Backend> {
    pub(super) layers: Vec<B::Buf>,
    capacity: usize,
    window: usize,
}

impl<B: Backend> Model<B> {
    pub(super) fn reserve_rings(&mut self, capacity: usize, window: usize) -> Result<()> {
        let (held, elems) = (self.rings.as_ref().map_or(0, |r| r.capacity), ring_elems(&self.config, window));
        if capacity <= held {
            return Ok(());
        }
        let mut layers = Vec::with_capacity(self.config.num_layers);
        for layer in 0..self.config.num_layers {
            let mut grown = self.backend.alloc(self.compute, capacity * elems)?;
            if let Some(old) = &self.rings {
                let mut bytes = Vec::new();
                self.backend.read_bytes(&old.layers[layer], 0, held * elems, &mut bytes)?;
                self.backend.write_bytes(&mut grown, 0, held * elems, &bytes)?;
            }
            layers.push(grown);
        }
        // Recorded passes write to the rings that were, or to none.
        self.backend.forget_recordings()?;
        self.rings = Some(QueryRings { layers, capacity, window });
        Ok(())
    }

    pub(super) fn read_ring(&mut self, ring: u32, out: &mut Vec<u8>) -> Result<()> {
        let Some(rings) = &self.rings else { return Err(no_ring()) };
        let elems = ring_elems(&self.config, rings.window);
        for layer in &rings.layers {
            self.backend.read_bytes(layer, ring as usize * elems, elems, out)?;
        }
        Ok(())
    }

    pub(super) fn write_ring(&mut self, ring: u32, bytes: &[u8]) -> Result<()> {
        let Some(rings) = &mut self.rings else { return Err(no_ring()) };
        let elems = ring_elems(&self.config, rings.window);
        let mut taken = 0;
        for layer in &mut rings.layers {
            taken += self.backend.write_bytes(layer, ring as usize * elems, elems, &bytes[taken..])?;
        }
        Ok(())
    }

    /// `scores` becomes `[layers, kv heads, candidates]`. One read-back for all layers.
    pub(super) fn kv_scores(&mut self, p: &SlotScoring<'_>, scores: &mut Vec<f32>) -> Result<()> {
        let Some(rings) = &self.rings else { return Err(no_ring()) };
        let (config, layout) = (&self.config, &self.layout);
        let per_layer = config.num_kv_heads * (p.num_slots - p.num_recent);
        scores.clear();
        scores.resize(config.num_layers * per_layer, 0.0);
        if self.slot_scores.as_ref().is_none_or(|(_, len)| *len < scores.len()) {
            let len = scores.len().next_power_of_two();
            self.slot_scores = Some((self.backend.alloc(DType::F32, len)?, len));
        }
        let Some((buf, _)) = &mut self.slot_scores else { return Ok(()) };
        let first_row = p.ring.ring as usize * rings.window;
        for (layer, (k_cache, _)) in self.kv.iter().enumerate() {
            self.backend.kv_scores(KvScores {
                queries: &rings.layers[layer],
                query_rows: first_row..first_row + p.ring.num_queries,
                k_cache,
                blocks: p.blocks,
                num_slots: p.num_slots,
                window: p.num_recent,
                pool_size: p.how.pool_size,
                variant: p.how.variant,
                lambda: p.how.lambda,
                threshold: p.how.threshold,
                num_q_heads: config.num_q_heads,
                sm_scale: config.sm_scale,
                softcap: config.attn_softcap,
                layout,
                scores: buf,
                scores_start: layer * per_layer,
            })?;
        }
        self.backend.read_f32(buf, 0, scores)
    }

    /// `keep` is `[layers, kv heads, kept]`: see [`KvCompact`].
    pub(super) fn kv_compact(&mut self, blocks: &[u32], keep: &[u32], first_slot: usize) -> Result<()> {
        let per_layer = keep.len() / self.config.num_layers;
        for ((k_cache, v_cache), keep) in self.kv.iter_mut().zip(keep.chunks(per_layer.max(1))) {
            let layout = &self.layout;
            self.backend.kv_compact(KvCompact { k_cache, v_cache, blocks, keep, first_slot, layout })?;
        }
        Ok(())
    }
}

/// Elements of one ring in one layer.
fn ring_elems(config: &ModelConfig, window: usize) -> usize {
    window * config.num_q_heads * config.head_dim
}

fn no_ring() -> Error {
    Error::Internal("a query ring is named before there are any".into())
}

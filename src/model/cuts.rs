//! The device side of a KV budget: rings of branches' last queries, the scores that decide a cut, the compaction, and the
//! attention that each slot receives.

use super::family::ModelConfig;
use super::live::LiveRows;
use super::{Model, Workspace};
use crate::backend::{AttentionMass, Backend, KvCompact, KvScores, MassSequence, RkvVariant};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;
use crate::kv::budget::KeepRule;

/// A ring and how many of its rows hold a query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryRing {
    pub(crate) ring: u32,
    pub(crate) num_queries: usize,
}

/// Which slots of a branch to score, in every layer, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotScoring<'a> {
    blocks: &'a [u32],
    num_slots: usize,
    /// Last slots that are no candidates.
    num_recent: usize,
    ring: QueryRing,
    variant: RkvVariant,
    lambda: f32,
    threshold: f32,
    pool_size: usize,
}

impl<'a> SlotScoring<'a> {
    /// For a rule that asks queries; another is taken for importance alone.
    pub(crate) fn new(rule: KeepRule, blocks: &'a [u32], num_slots: usize, num_recent: usize, ring: QueryRing) -> Self {
        let (variant, lambda, threshold, pool_size) = match rule {
            KeepRule::RKv { variant, lambda, threshold, pool_size } => (variant, lambda, threshold, pool_size),
            KeepRule::SnapKv { pool_size } => (RkvVariant::Code, 1.0, 1.0, pool_size),
            KeepRule::H2o | KeepRule::Streaming | KeepRule::Random { .. } => (RkvVariant::Code, 1.0, 1.0, 1),
        };
        Self { blocks, num_slots, num_recent, ring, variant, lambda, threshold, pool_size }
    }
}

/// `capacity` rings of `window` queries, in every layer `[capacity * window, Hq, D]`.
pub(super) struct QueryRings<B: Backend> {
    pub(super) layers: Vec<B::Buf>,
    capacity: usize,
    window: usize,
}

impl<B: Backend> Model<B> {
    pub(super) fn grow_rings(&mut self, capacity: usize, window: usize) -> Result<()> {
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

    pub(super) fn ring_bytes_out(&mut self, ring: u32, out: &mut Vec<u8>) -> Result<()> {
        let Some(rings) = &self.rings else { return Err(no_ring()) };
        let elems = ring_elems(&self.config, rings.window);
        for layer in &rings.layers {
            self.backend.read_bytes(layer, ring as usize * elems, elems, out)?;
        }
        Ok(())
    }

    pub(super) fn ring_bytes_in(&mut self, ring: u32, bytes: &[u8]) -> Result<()> {
        let Some(rings) = &mut self.rings else { return Err(no_ring()) };
        let elems = ring_elems(&self.config, rings.window);
        let mut taken = 0;
        for layer in &mut rings.layers {
            taken += self.backend.write_bytes(layer, ring as usize * elems, elems, &bytes[taken..])?;
        }
        Ok(())
    }

    /// `scores` becomes `[layers, kv heads, candidates]`. One read-back for all layers.
    pub(super) fn score_slots(&mut self, p: &SlotScoring<'_>, scores: &mut Vec<f32>) -> Result<()> {
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
                pool_size: p.pool_size,
                variant: p.variant,
                lambda: p.lambda,
                threshold: p.threshold,
                num_q_heads: config.num_q_heads,
                sm_scale: config.sm_scale(),
                layout,
                scores: buf,
                scores_start: layer * per_layer,
            })?;
        }
        self.backend.read_f32(buf, 0, scores)
    }

    /// `keep` is `[layers, kv heads, kept]`: see [`KvCompact`].
    pub(super) fn compact_slots(&mut self, blocks: &[u32], keep: &[u32], first_slot: usize) -> Result<()> {
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

/// Right behind a layer's `paged_attention`: appends to `received` of every sequence that asks for it what its slots were
/// given by its rows, `[kv heads, kv_len]`.
pub(super) fn accumulate<B: Backend>(
    backend: &mut B,
    ws: &Workspace<B>,
    k_cache: &B::Buf,
    (config, layout): (&ModelConfig, &KvLayout),
    (batch, live): (&Batch, &LiveRows),
    received: &mut [Vec<f32>],
) -> Result<()> {
    let mut asking = Vec::new();
    let mut sequences = Vec::new();
    for i in 0..live.num_seqs() {
        let seq = &batch.seqs[live.seq_of(i)];
        let Some(from) = seq.accumulates_from else { continue };
        asking.push(live.seq_of(i));
        let rows = (live.first_row(i) + from).min(live.last_row(i))..live.last_row(i) + 1;
        sequences.push(MassSequence { rows, block_start: seq.blocks.start, kv_len: seq.kv_len });
    }
    if sequences.is_empty() {
        return Ok(());
    }
    let mut slots = Vec::new();
    backend.attention_mass(AttentionMass {
        q: &ws.q,
        k_cache,
        lse: &ws.lse,
        blocks: &batch.blocks,
        sequences: &sequences,
        num_q_heads: config.num_q_heads,
        sm_scale: config.sm_scale(),
        layout,
        mass: &mut slots,
    })?;
    let mut rest = slots.as_slice();
    for (seq, view) in asking.into_iter().zip(&sequences) {
        let (own, others) = rest.split_at((layout.num_kv_heads * view.kv_len).min(rest.len()));
        received[seq].extend_from_slice(own);
        rest = others;
    }
    Ok(())
}

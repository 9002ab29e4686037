//! The decoder, layer by layer, written once for prefill, decode, verification and scoring.
//!
//! A pass runs *segments* of layers between probed layers. At a cut the gates decide; rows that go on are packed by a
//! stable permutation, backbone rows first and rows of the second weight set behind them, and attention still runs
//! over all of them. With no gate at work there is one segment and nothing is permuted.

mod answer;
mod cuts;
pub mod family;
pub(crate) mod fields;
mod gating;
mod live;
mod load;
mod mass;
pub mod weights;

use std::ops::Range;

use crate::backend::{
    AddRmsNorm, Backend, Counters, Embed, KvCopyBlocks, KvTransfer, Linear, PagedAttention, RopeAppend, RowStats,
    Sampled, SiluMul, Similarity,
};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;
use crate::sampler::{DrawKey, SamplingParams};
use crate::tree::RowAnswer;
use cuts::QueryRings;
pub(crate) use cuts::{QueryRing, SlotScoring};
use family::ModelConfig;
pub(crate) use gating::PassGate;
use gating::{Exit, Watch};
use live::LiveRows;
use load::Loader;
pub(crate) use load::workspace_bytes;
use weights::WeightStore;

/// What to read from one row once its logits exist.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowQuery {
    /// Batch row.
    pub(crate) row: usize,
    /// Choose a token.
    pub(crate) draw: Option<Draw>,
    /// Report the log-probabilities of these tokens.
    pub(crate) watch: Vec<u32>,
    /// Report this many of the most likely tokens.
    pub(crate) top_k: usize,
}

/// How to choose a token from a row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draw {
    pub(crate) params: SamplingParams,
    /// Tokens that may not be taken yet.
    pub(crate) banned: Vec<u32>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) generated: Vec<u32>,
    pub(crate) key: DrawKey,
}

/// What became of a sequence in a pass with gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It ran through every layer of the backbone.
    Done,
    /// It left after this layer; nothing of it may be committed.
    Dropped(u32),
    /// Its logits were read after this layer; its KV is incomplete and may not be committed.
    Stopped(u32),
    /// Its layers after this one used the second weight set.
    River(u32),
    /// It left after this layer in favour of another sequence of the batch; nothing of it may be committed.
    Aliased { layer: u32, to: usize },
    /// It ran to the end with another sequence's KV in place of some of its own after this layer.
    Mixed(u32),
}

/// What an inner layer would have said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerRow {
    /// After this layer, counted from 1.
    pub layer: u32,
    /// Statistics over the vocabulary or the watched tokens, as the gate says.
    pub stats: RowStats,
}

/// The result of a pass.
#[derive(Debug, Default)]
pub(crate) struct PassOutput {
    /// One per query; `None` where the row was dropped.
    pub(crate) answers: Vec<Option<RowAnswer>>,
    /// One per sequence.
    pub(crate) fates: Vec<Fate>,
    /// What the probed layers said, one list a sequence; empty when no gate was set.
    pub(crate) layers: Vec<Vec<LayerRow>>,
    /// What each gate found that compares sequences.
    pub(crate) similarities: Vec<Option<Similarity>>,
    /// KV slots attention reads in each layer before any gate, shared runs once.
    pub(crate) slots_read: usize,
    /// What each of the batch's `blocks` received from the last row of its sequence; empty unless that was measured.
    pub(crate) mass: Vec<f32>,
    /// Of each sequence that asked for it, `[layers, kv heads, kv_len]`: what its slots received from its rows. Empty when
    /// nobody asked.
    pub(crate) slot_mass: Vec<Vec<f32>>,
    /// Rows in flight, summed over the layers.
    pub(crate) layer_rows: u64,
}

/// A model with its KV cache on some device: all that the engine knows of both.
pub(crate) trait Runner: Send {
    fn run(&mut self, batch: &Batch, queries: &[RowQuery], gates: &[PassGate<'_>]) -> Result<PassOutput>;
    /// Appends the bytes of one block, all layers, to `out`.
    fn read_block(&mut self, block: u32, out: &mut Vec<u8>) -> Result<()>;
    /// The inverse; returns the bytes taken.
    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<usize>;
    /// Makes room for so many rings of `window` queries; those that are there keep their contents.
    fn reserve_rings(&mut self, capacity: usize, window: usize) -> Result<()>;
    /// Appends the bytes of one ring, all layers, to `out`.
    fn read_ring(&mut self, ring: u32, out: &mut Vec<u8>) -> Result<()>;
    /// The inverse.
    fn write_ring(&mut self, ring: u32, bytes: &[u8]) -> Result<()>;
    /// `[layers, kv heads, candidates]` scores of a branch's slots.
    fn kv_scores(&mut self, scoring: &SlotScoring<'_>, scores: &mut Vec<f32>) -> Result<()>;
    /// Moves the slots `keep`, `[layers, kv heads, kept]`, down to `first_slot`. After an error in the middle the branch's
    /// slots are lost.
    fn kv_compact(&mut self, blocks: &[u32], keep: &[u32], first_slot: usize) -> Result<()>;
    fn counters(&self) -> Counters;
    fn reset_counters(&mut self);
    /// The device in words.
    fn describe(&self) -> String;
    /// Bytes of weights copied beyond what is mapped in place.
    fn weight_copy_bytes(&self) -> u64;
}

struct Layer<B: Backend> {
    attn_norm: B::Buf,
    qkv: B::Matrix,
    qkv_bias: Option<B::Buf>,
    q_norm: Option<B::Buf>,
    k_norm: Option<B::Buf>,
    o: B::Matrix,
    o_bias: Option<B::Buf>,
    mlp_norm: B::Buf,
    gate_up: B::Matrix,
    down: B::Matrix,
}

/// Which copy of the layers a row uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WeightSet {
    Backbone,
    River,
}

/// See the module text.
pub(crate) struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    compute: DType,
    layout: KvLayout,
    embed: B::Matrix,
    layers: Vec<Layer<B>>,
    /// The second weight set; empty when there is none.
    river: Vec<Layer<B>>,
    final_norm: B::Buf,
    /// Stands in for a norm where rows are unembedded as they are; made when it is first needed.
    no_norm: Option<B::Buf>,
    /// `None` when tied to `embed`.
    lm_head: Option<B::Matrix>,
    /// `[head_dim / 2]`.
    inv_freq: B::Buf,
    /// K and V of each layer.
    kv: Vec<(B::Buf, B::Buf)>,
    /// Last queries of branches under a KV budget; `None` until there is one.
    rings: Option<QueryRings<B>>,
    /// f32, and how many: the scores of a branch's slots on their way to the host.
    slot_scores: Option<(B::Buf, usize)>,
    ws: Workspace<B>,
    max_rows: usize,
    max_group_rows: usize,
}

/// Activations of one pass, reused by every pass.
struct Workspace<B: Backend> {
    x: B::Buf,       // [max_rows, hidden] f32: the residual stream
    x_alt: B::Buf,   // [max_rows, hidden] f32: its permuted copy at a cut
    h: B::Buf,       // [max_rows, hidden] compute type: norm output
    qkv: B::Buf,     // [max_rows, (Hq + 2 Hkv) D] f32
    q: B::Buf,       // [max_rows, Hq D] compute type
    o: B::Buf,       // [max_rows, Hq D] compute type
    lse: B::Buf,     // [max_rows, Hq] f32
    delta: B::Buf,   // [max_rows, hidden] f32: what the block adds to x
    gate_up: B::Buf, // [max_rows, 2 inter] f32
    act: B::Buf,     // [max_rows, inter] compute type
    out_x: B::Buf,   // [chunk, hidden] f32: residual rows to unembed
    out_h: B::Buf,   // [chunk, hidden] compute type
    logits: B::Buf,  // [chunk, vocab] f32
    chunk: usize,
    watched: B::Buf, // [watched_len] f32: single logits on their way to the host
    watched_len: usize,
    stats: Vec<RowStats>,
    sampled: Vec<Sampled>,
    row: Vec<f32>, // [vocab]: one row on the host, when its most likely tokens are wanted
}

/// What [`Model::new`] needs beyond the weights.
pub(crate) struct ModelOptions {
    pub(crate) compute: DType,
    pub(crate) layout: KvLayout,
    /// Rows of the largest pass.
    pub(crate) max_rows: usize,
}

impl<B: Backend> Model<B> {
    pub(crate) fn new(mut backend: B, config: ModelConfig, store: &WeightStore, options: ModelOptions) -> Result<Self> {
        let mut load = Loader { backend: &mut backend, store, compute: options.compute, config: &config };
        let embed = load.matrix(&[("model.embed_tokens.weight", config.vocab_size)], config.hidden)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(load.matrix(&[("lm_head.weight", config.vocab_size)], config.hidden)?),
        };
        let layers = (0..config.num_layers).map(|i| load.layer(i)).collect::<Result<Vec<_>>>()?;
        let final_norm = load.vector("model.norm.weight", config.hidden)?;
        let kv_elems = options.layout.num_blocks * options.layout.block_elems();
        let kv = (0..config.num_layers)
            .map(|_| Ok((backend.alloc(options.compute, kv_elems)?, backend.alloc(options.compute, kv_elems)?)))
            .collect::<Result<Vec<_>>>()?;
        let ws = Workspace::new(&backend, &config, &options)?;
        Ok(Self {
            inv_freq: backend.upload(&config.inv_freq())?,
            compute: options.compute,
            layout: options.layout,
            max_rows: options.max_rows,
            max_group_rows: backend.max_group_rows(config.num_q_heads / config.num_kv_heads),
            river: Vec::new(),
            backend,
            config,
            embed,
            layers,
            final_norm,
            no_norm: None,
            lm_head,
            kv,
            rings: None,
            slot_scores: None,
            ws,
        })
    }

    /// Makes the layers of `store` the second weight set (norms and biases come from it too).
    pub(crate) fn set_river(&mut self, store: &WeightStore) -> Result<()> {
        let mut load = Loader { backend: &mut self.backend, store, compute: self.compute, config: &self.config };
        self.river = (0..self.config.num_layers).map(|i| load.layer(i)).collect::<Result<Vec<_>>>()?;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch, queries: &[RowQuery], gates: &[PassGate<'_>]) -> Result<PassOutput> {
        let live = LiveRows::new(batch);
        let (inputs, query_ids) = live.inputs(batch, queries, self.layout.block_size, self.max_group_rows);
        let slots_read = inputs.plan.slots_read();
        let mut pass = Pass {
            live,
            inputs: self.backend.stage(inputs)?,
            query_ids,
            delta_pending: false,
            answers: vec![None; queries.len()],
            fates: vec![Fate::Done; batch.seqs.len()],
            layers: vec![Vec::new(); if gates.is_empty() { 0 } else { batch.seqs.len() }],
            exits: Vec::new(),
            step_similarity: Vec::new(),
            watches: gates.iter().map(Watch::new).collect(),
            mass: Vec::new(),
            slot_mass: if batch.accumulates() { vec![Vec::new(); batch.seqs.len()] } else { Vec::new() },
        };
        let mut layer_rows = 0;
        let reads_mass = batch.measures_mass || batch.accumulates();
        let repeatable = gates.is_empty() && batch.copies.is_empty() && !reads_mass && queries.len() <= self.ws.chunk;
        self.backend.begin_pass(&pass.inputs, repeatable)?;
        let hidden = self.config.hidden;
        self.backend.embed(Embed { table: &self.embed, inputs: &pass.inputs, x: &mut self.ws.x, hidden })?;
        for layer_idx in 0..self.config.num_layers {
            layer_rows += pass.live.num_rows() as u64;
            self.decoder_layer(layer_idx, batch, &mut pass)?;
            self.probe_all(gates, layer_idx as u32 + 1, batch, queries, &mut pass)?;
            if pass.live.is_empty() {
                break;
            }
        }
        self.flush_delta(&mut pass, None)?;
        self.answer(queries, &mut pass)?;
        let similarities = pass.watches.into_iter().map(|w| w.similarity).collect();
        let Pass { answers, fates, layers, mass, slot_mass, .. } = pass;
        Ok(PassOutput { answers, fates, layers, similarities, slots_read, layer_rows, mass, slot_mass })
    }

    /// One layer for every row in flight, each with its weight set.
    fn decoder_layer(&mut self, layer_idx: usize, batch: &Batch, pass: &mut Pass<B>) -> Result<()> {
        let Self { backend, config, ws, layout, rings, .. } = self;
        let (hidden, eps) = (config.hidden, config.rms_norm_eps);
        let groups = pass.live.groups();
        let weights = |set: WeightSet| match set {
            WeightSet::Backbone => &self.layers[layer_idx],
            WeightSet::River => &self.river[layer_idx],
        };
        let delta = std::mem::replace(&mut pass.delta_pending, true);
        let (k_cache, v_cache) = &mut self.kv[layer_idx];

        // Attention half: norm, qkv, RoPE and KV write.
        for (rows, set) in groups.clone() {
            let w = weights(set);
            backend.add_rms_norm(AddRmsNorm {
                rows: rows.clone(),
                x: &mut ws.x,
                delta: delta.then_some(&ws.delta),
                weight: Some(&w.attn_norm),
                y: &mut ws.h,
                step_similarity: None,
                hidden,
                eps,
            })?;
            backend.linear(Linear {
                rows: rows.clone(),
                x: &ws.h,
                w: &w.qkv,
                bias: w.qkv_bias.as_ref(),
                y: &mut ws.qkv,
            })?;
            backend.rope_append(RopeAppend {
                rows,
                inputs: &pass.inputs,
                qkv: &ws.qkv,
                q: &mut ws.q,
                query_ring: rings.as_mut().map(|r| &mut r.layers[layer_idx]),
                k_cache,
                v_cache,
                inv_freq: &self.inv_freq,
                rope_scale: 1.0,
                q_norm: w.q_norm.as_ref().map(|w| (w, eps)),
                k_norm: w.k_norm.as_ref().map(|w| (w, eps)),
                num_q_heads: config.num_q_heads,
                layout,
            })?;
        }
        // Before the copies: what is transferred may stand in a block that a fork copies.
        if pass.live.has_transfers() {
            let (inputs, inv_freq) = (&pass.inputs, &self.inv_freq);
            backend.kv_transfer(KvTransfer { inputs, k_cache, v_cache, inv_freq, layout })?;
        }
        if !batch.copies.is_empty() {
            backend.kv_copy_blocks(KvCopyBlocks { inputs: &pass.inputs, k_cache, v_cache, layout })?;
        }
        backend.paged_attention(PagedAttention {
            inputs: &pass.inputs,
            q: &ws.q,
            k_cache,
            v_cache,
            o: &mut ws.o,
            lse: &mut ws.lse,
            num_q_heads: config.num_q_heads,
            sm_scale: config.sm_scale(),
            layout,
        })?;
        if batch.measures_mass && layer_idx == mass::layer(config) {
            pass.mass = mass::measure(backend, ws, k_cache, (config, layout), (batch, &pass.live))?;
        }
        if !pass.slot_mass.is_empty() {
            mass::accumulate(backend, ws, k_cache, (config, layout), (batch, &pass.live), &mut pass.slot_mass)?;
        }

        // Output projection and MLP half.
        for (rows, set) in groups {
            let w = weights(set);
            backend.linear(Linear {
                rows: rows.clone(),
                x: &ws.o,
                w: &w.o,
                bias: w.o_bias.as_ref(),
                y: &mut ws.delta,
            })?;
            backend.add_rms_norm(AddRmsNorm {
                rows: rows.clone(),
                x: &mut ws.x,
                delta: Some(&ws.delta),
                weight: Some(&w.mlp_norm),
                y: &mut ws.h,
                step_similarity: None,
                hidden,
                eps,
            })?;
            backend.linear(Linear { rows: rows.clone(), x: &ws.h, w: &w.gate_up, bias: None, y: &mut ws.gate_up })?;
            backend.silu_mul(SiluMul {
                rows: rows.clone(),
                gate_up: &ws.gate_up,
                y: &mut ws.act,
                intermediate: config.intermediate,
            })?;
            backend.linear(Linear { rows, x: &ws.act, w: &w.down, bias: None, y: &mut ws.delta })?;
        }
        Ok(())
    }

    /// Adds the last block's output to the residual stream, if that is still to be done.
    fn flush_delta(&mut self, pass: &mut Pass<B>, step_similarity: Option<&mut [f32]>) -> Result<()> {
        if pass.live.is_empty() || !std::mem::take(&mut pass.delta_pending) {
            return Ok(());
        }
        self.backend.add_rms_norm(AddRmsNorm {
            rows: 0..pass.live.num_rows(),
            x: &mut self.ws.x,
            delta: Some(&self.ws.delta),
            weight: None,
            y: &mut self.ws.h,
            step_similarity,
            hidden: self.config.hidden,
            eps: self.config.rms_norm_eps,
        })
    }
}

impl<B: Backend> Runner for Model<B> {
    fn run(&mut self, batch: &Batch, queries: &[RowQuery], gates: &[PassGate<'_>]) -> Result<PassOutput> {
        if batch.num_rows() > self.max_rows {
            return Err(Error::Internal(format!("a pass of {} rows; at most {}", batch.num_rows(), self.max_rows)));
        }
        self.forward(batch, queries, gates)
    }

    fn read_block(&mut self, block: u32, out: &mut Vec<u8>) -> Result<()> {
        let elems = self.layout.block_elems();
        for (k, v) in &self.kv {
            self.backend.read_bytes(k, block as usize * elems, elems, out)?;
            self.backend.read_bytes(v, block as usize * elems, elems, out)?;
        }
        Ok(())
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<usize> {
        let elems = self.layout.block_elems();
        let mut taken = 0;
        for (k, v) in &mut self.kv {
            taken += self.backend.write_bytes(k, block as usize * elems, elems, &bytes[taken..])?;
            taken += self.backend.write_bytes(v, block as usize * elems, elems, &bytes[taken..])?;
        }
        Ok(taken)
    }

    fn reserve_rings(&mut self, capacity: usize, window: usize) -> Result<()> {
        Self::reserve_rings(self, capacity, window)
    }

    fn read_ring(&mut self, ring: u32, out: &mut Vec<u8>) -> Result<()> {
        Self::read_ring(self, ring, out)
    }

    fn write_ring(&mut self, ring: u32, bytes: &[u8]) -> Result<()> {
        Self::write_ring(self, ring, bytes)
    }

    fn kv_scores(&mut self, scoring: &SlotScoring<'_>, scores: &mut Vec<f32>) -> Result<()> {
        Self::kv_scores(self, scoring, scores)
    }

    fn kv_compact(&mut self, blocks: &[u32], keep: &[u32], first_slot: usize) -> Result<()> {
        Self::kv_compact(self, blocks, keep, first_slot)
    }

    fn counters(&self) -> Counters {
        self.backend.counters()
    }

    fn reset_counters(&mut self) {
        self.backend.reset_counters();
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn weight_copy_bytes(&self) -> u64 {
        let extra = |m: &B::Matrix| self.backend.matrix_extra_bytes(m);
        let layers = self.layers.iter().chain(&self.river);
        layers.map(|l| extra(&l.qkv) + extra(&l.o) + extra(&l.gate_up) + extra(&l.down)).sum::<u64>()
            + extra(&self.embed)
            + self.lm_head.as_ref().map_or(0, extra)
    }
}

/// What changes in the course of one pass.
struct Pass<B: Backend> {
    live: LiveRows,
    /// What the live rows need.
    inputs: B::Inputs,
    /// Which query each of the inputs' `query_rows` answers.
    query_ids: Vec<usize>,
    /// `delta` holds a block's output that `x` has not received yet.
    delta_pending: bool,
    answers: Vec<Option<RowAnswer>>,
    fates: Vec<Fate>,
    /// What the probed layers said, one list a sequence.
    layers: Vec<Vec<LayerRow>>,
    exits: Vec<Exit<B>>,
    /// Of each live row, after the layer that is being probed, where a gate asks for it.
    step_similarity: Vec<f32>,
    /// One a gate.
    watches: Vec<Watch<B>>,
    /// See [`PassOutput::mass`].
    mass: Vec<f32>,
    /// See [`PassOutput::slot_mass`].
    slot_mass: Vec<Vec<f32>>,
}

type Groups = Vec<(Range<usize>, WeightSet)>;

//! The decoder, layer by layer, written once for prefill, decode, verification and scoring.
//!
//! A pass runs *segments* of layers between probed layers. At a cut the gates decide; rows that go on are packed by a
//! stable permutation. Rows that leave for the second weight set stay where they are: the device decides that and notes
//! it by row, and attention still runs over all of them. With no gate at work there is one segment and nothing is
//! permuted.

mod answer;
mod capture;
mod cuts;
pub mod family;
pub(crate) mod fields;
mod gating;
mod live;
mod load;
mod mass;
mod river;
pub mod weights;

use std::ops::Range;
use std::path::Path;

use crate::backend::{
    AddRmsNorm, Backend, Counters, Embed, Glu, KvCopyBlocks, KvTransfer, Linear, NormOutput, PagedAttention, QkNorm,
    River, RopeAppend, RowStats, Sampled, Similarity,
};
use crate::batch::{AttentionPlan, Batch};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gate::Effect;
use crate::kv::KvLayout;
use crate::quant::{Hessians, LayerInput, QuantWeights};
use crate::sampler::{DrawKey, SamplingParams};
use crate::tree::RowAnswer;
use capture::Capture;
use cuts::QueryRings;
pub(crate) use cuts::{QueryRing, SlotScoring};
use family::{ModelConfig, Rope};
pub(crate) use gating::PassGate;
use gating::{Exit, Watch};
use live::LiveRows;
use load::Loader;
pub(crate) use load::workspace_bytes;
use river::Routes;
pub(crate) use river::route_bytes;
use weights::{Access, WeightStore};

/// The config.json and the tensors of a Hugging Face folder, fused tensors in their parts.
pub fn open(dir: &Path, access: Access) -> Result<(ModelConfig, WeightStore)> {
    let (config, mut store) = (ModelConfig::from_dir(dir)?, WeightStore::open_by(dir, access)?);
    store.split_fused(&config)?;
    Ok((config, store))
}

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
    /// Added to logits: token, bias. Minus infinity for those that may not be taken yet.
    pub(crate) bias: Vec<(u32, f32)>,
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
    /// Its layers after this one used the second weight set, for its rows from `first` on.
    River { layer: u32, first: usize },
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

/// How little a layer changed a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerStep {
    /// The layer, counted from 1.
    pub layer: u32,
    /// Cosine of the residual stream before and after it.
    pub similarity: f32,
}

/// What a pass is to do.
#[derive(Clone, Copy)]
struct Asked<'a> {
    batch: &'a Batch,
    queries: &'a [RowQuery],
    gates: &'a [PassGate<'a>],
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
    /// The step similarities that the host looked at, one list a sequence; empty when no gate was set.
    pub(crate) steps: Vec<Vec<LayerStep>>,
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
    /// Until the end of it, passes sum up what the matrices of these layers are multiplied with.
    fn begin_capture(&mut self, layers: Range<usize>);
    /// The sums.
    fn end_capture(&mut self) -> Hessians;
    fn counters(&self) -> Counters;
    fn reset_counters(&mut self);
    /// There is a second weight set.
    fn has_river(&self) -> bool;
    /// The device in words.
    fn describe(&self) -> String;
    /// Bytes of weights copied beyond what is mapped in place.
    fn weight_copy_bytes(&self) -> u64;
}

struct Layer<B: Backend> {
    /// As [`LayerNorms`](family::LayerNorms) has them.
    attn_in: Option<B::Buf>,
    attn_out: Option<B::Buf>,
    mlp_in: Option<B::Buf>,
    mlp_out: Option<B::Buf>,
    w: Projections<B>,
    qkv_bias: Option<B::Buf>,
    /// Of q and of k.
    qk_norm: Option<(B::Buf, B::Buf)>,
    o_bias: Option<B::Buf>,
    gate_up_bias: Option<B::Buf>,
    down_bias: Option<B::Buf>,
}

/// How the layers of one kind rotate q and k.
struct Rotation<B: Backend> {
    /// `[rotary_dim / 2]`.
    inv_freq: B::Buf,
    rotary_dim: usize,
    /// Multiplies cosines and sines.
    scale: f32,
}

impl<B: Backend> Rotation<B> {
    fn new(backend: &mut B, rope: &Rope, context: usize) -> Result<Self> {
        let inv_freq = backend.upload(&rope.inv_freq(context))?;
        Ok(Self { inv_freq, rotary_dim: rope.rotary_dim, scale: rope.scale() })
    }
}

/// The matrices of a layer: what there may be a second set of.
struct Projections<B: Backend> {
    qkv: B::Matrix,
    o: B::Matrix,
    gate_up: B::Matrix,
    down: B::Matrix,
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
    river: Vec<Projections<B>>,
    /// What rows on their way to it need; made for the first pass that has such rows.
    routes: Option<Routes<B>>,
    final_norm: B::Buf,
    /// Stands in for a norm where rows are unembedded as they are; made when it is first needed.
    no_norm: Option<B::Buf>,
    /// `None` when tied to `embed`.
    lm_head: Option<B::Matrix>,
    rope: Rotation<B>,
    /// Of layers with a window, where they rotate otherwise.
    local_rope: Option<Rotation<B>>,
    /// K and V of each layer.
    kv: Vec<(B::Buf, B::Buf)>,
    /// Last queries of branches under a KV budget; `None` until there is one.
    rings: Option<QueryRings<B>>,
    /// While texts are looked at.
    capture: Option<Capture>,
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
    /// `codes` stand in for the store's projections.
    pub(crate) fn new(
        mut backend: B,
        config: ModelConfig,
        (store, codes): (&WeightStore, Option<&QuantWeights>),
        options: ModelOptions,
    ) -> Result<Self> {
        let mut load = Loader { backend: &mut backend, store, codes, compute: options.compute, config: &config };
        let embed = load.matrix(&[("model.embed_tokens.weight", config.vocab_size)], config.hidden)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(load.matrix(&[("lm_head.weight", config.vocab_size)], config.hidden)?),
        };
        let layers = (0..config.num_layers).map(|i| load.layer(i)).collect::<Result<Vec<_>>>()?;
        let final_norm = load.norm("model.norm.weight", config.hidden)?;
        let kv_elems = options.layout.num_blocks * options.layout.block_elems();
        let kv = (0..config.num_layers)
            .map(|_| Ok((backend.alloc(options.compute, kv_elems)?, backend.alloc(options.compute, kv_elems)?)))
            .collect::<Result<Vec<_>>>()?;
        let ws = Workspace::new(&backend, &config, &options)?;
        let mut rotation = |rope: &Rope| Rotation::new(&mut backend, rope, config.max_position_embeddings);
        Ok(Self {
            rope: rotation(&config.rope)?,
            local_rope: config.local_rope.as_ref().map(rotation).transpose()?,
            compute: options.compute,
            layout: options.layout,
            max_rows: options.max_rows,
            max_group_rows: backend.max_group_rows(config.num_q_heads / config.num_kv_heads),
            river: Vec::new(),
            routes: None,
            backend,
            config,
            embed,
            layers,
            final_norm,
            no_norm: None,
            lm_head,
            kv,
            rings: None,
            capture: None,
            slot_scores: None,
            ws,
        })
    }

    /// Makes the projections of `store`, or `codes` in their place, the second weight set. Norms and biases are the
    /// backbone's.
    pub(crate) fn set_river(&mut self, (store, codes): (&WeightStore, Option<&QuantWeights>)) -> Result<()> {
        let Self { backend, config, compute, .. } = self;
        let mut load = Loader { backend, store, codes, compute: *compute, config };
        self.river = (0..load.config.num_layers).map(|i| load.projections(i)).collect::<Result<Vec<_>>>()?;
        self.make_routes()?;
        Ok(())
    }

    fn forward(&mut self, asked: Asked<'_>) -> Result<PassOutput> {
        let Asked { batch, queries, gates } = asked;
        let live = LiveRows::new(batch);
        self.prepare_gates(gates)?;
        let (inputs, query_ids) = live.inputs(asked, self.layout.block_size, self.max_group_rows);
        let slots_read = mean_slots_read(&inputs.plan, &self.config);
        let mut pass = Pass {
            live,
            inputs: self.backend.stage(inputs)?,
            query_ids,
            pending: None,
            answers: vec![None; queries.len()],
            fates: vec![Fate::Done; batch.seqs.len()],
            layers: vec![Vec::new(); if gates.is_empty() { 0 } else { batch.seqs.len() }],
            steps: vec![Vec::new(); if gates.is_empty() { 0 } else { batch.seqs.len() }],
            exits: Vec::new(),
            compared: None,
            routed: false,
            num_rows: batch.num_rows(),
            watches: gates.iter().map(Watch::new).collect(),
            mass: Vec::new(),
            slot_mass: if batch.accumulates() { vec![Vec::new(); batch.seqs.len()] } else { Vec::new() },
        };
        let mut layer_rows = 0;
        let reads = batch.measures_mass || batch.accumulates() || self.capture.is_some();
        let on_device = gates.iter().all(|g| g.spec.effect == Effect::River);
        let repeatable = on_device && batch.copies.is_empty() && !reads && queries.len() <= self.ws.chunk;
        self.backend.begin_pass(&pass.inputs, repeatable.then(|| river::variant(gates)))?;
        self.enter_backbone(gates, &pass)?;
        let (hidden, scale) = (self.config.hidden, self.config.embed_scale());
        self.backend.embed(Embed { table: &self.embed, inputs: &pass.inputs, x: &mut self.ws.x, hidden, scale })?;
        for layer_idx in 0..self.config.num_layers {
            layer_rows += pass.live.num_rows() as u64;
            self.decoder_layer(layer_idx, batch, gates, &mut pass)?;
            self.probe_all(asked, layer_idx as u32 + 1, &mut pass)?;
            if pass.live.is_empty() {
                break;
            }
        }
        self.flush_delta(&mut pass, None)?;
        self.answer(queries, &mut pass)?;
        self.read_routes(gates, &mut pass)?;
        let similarities = pass.watches.into_iter().map(|w| w.similarity).collect();
        let Pass { answers, fates, layers, steps, mass, slot_mass, .. } = pass;
        Ok(PassOutput { answers, fates, layers, steps, similarities, slots_read, layer_rows, mass, slot_mass })
    }

    /// One layer for every row in flight, each with its weight set.
    fn decoder_layer(
        &mut self,
        layer_idx: usize,
        batch: &Batch,
        gates: &[PassGate<'_>],
        pass: &mut Pass<B>,
    ) -> Result<()> {
        self.begin_layer(layer_idx, gates, pass)?;
        let Self { backend, config, ws, layout, rings, capture, compute, .. } = self;
        let mut capture = |backend: &mut B, input: LayerInput, x: &B::Buf| match capture {
            Some(capture) => {
                let size = (pass.live.num_rows(), input.width(config));
                capture.add(backend, (layer_idx, input), (x, *compute), size)
            }
            None => Ok(()),
        };
        let (hidden, eps, rows) = (config.hidden, config.rms_norm_eps, 0..pass.live.num_rows());
        let layer = &self.layers[layer_idx];
        let river = self.river.get(layer_idx).zip(self.routes.as_ref()).filter(|_| pass.routed);
        let second = |of: fn(&Projections<B>) -> &B::Matrix| {
            river.map(|(w, routes)| River { w: of(w), route: &routes.route, layer: layer_idx as u32 + 1 })
        };
        let (k_cache, v_cache) = &mut self.kv[layer_idx];
        let window = config.window(layer_idx);
        let rope = match &self.local_rope {
            Some(local) if config.is_local(layer_idx) => local,
            _ => &self.rope,
        };

        // Attention half: qkv, RoPE and KV write.
        capture(backend, LayerInput::Qkv, &ws.h)?;
        backend.linear(Linear {
            rows: rows.clone(),
            x: &ws.h,
            w: &layer.w.qkv,
            river: second(|w| &w.qkv),
            bias: layer.qkv_bias.as_ref(),
            y: &mut ws.qkv,
        })?;
        backend.rope_append(RopeAppend {
            rows: rows.clone(),
            inputs: &pass.inputs,
            qkv: &ws.qkv,
            q: &mut ws.q,
            query_ring: rings.as_mut().map(|r| &mut r.layers[layer_idx]),
            k_cache,
            v_cache,
            inv_freq: &rope.inv_freq,
            rotary_dim: rope.rotary_dim,
            rope_scale: rope.scale,
            qk_norm: layer.qk_norm.as_ref().zip(config.family.qk_norm).map(|((q, k), span)| QkNorm { q, k, eps, span }),
            num_q_heads: config.num_q_heads,
            layout,
        })?;
        // Before the copies: what is transferred may stand in a block that a fork copies.
        if pass.live.has_transfers() {
            let (inputs, inv_freq, rotary_dim) = (&pass.inputs, &rope.inv_freq, rope.rotary_dim);
            backend.kv_transfer(KvTransfer { inputs, k_cache, v_cache, inv_freq, rotary_dim, layout })?;
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
            sm_scale: config.sm_scale,
            window,
            softcap: config.attn_softcap,
            layout,
        })?;
        if batch.measures_mass && layer_idx == mass::layer(config) {
            pass.mass = mass::measure(backend, ws, k_cache, (config, layout), (batch, &pass.live))?;
        }
        if !pass.slot_mass.is_empty() {
            mass::accumulate(backend, ws, k_cache, (config, layout), (batch, &pass.live), &mut pass.slot_mass)?;
        }

        // Output projection and MLP half.
        capture(backend, LayerInput::O, &ws.o)?;
        let (o, bias) = (&layer.w.o, layer.o_bias.as_ref());
        let x = &ws.o;
        backend.linear(Linear { rows: rows.clone(), x, w: o, river: second(|w| &w.o), bias, y: &mut ws.delta })?;
        backend.add_rms_norm(AddRmsNorm {
            rows: rows.clone(),
            x: &mut ws.x,
            delta: Some(&ws.delta),
            post_norm: layer.attn_out.as_ref(),
            output: normed_by(&layer.mlp_in),
            y: &mut ws.h,
            keep: None,
            step_similarity: None,
            hidden,
            eps,
        })?;
        capture(backend, LayerInput::GateUp, &ws.h)?;
        let (x, gate_up, river) = (&ws.h, &layer.w.gate_up, second(|w| &w.gate_up));
        let bias = layer.gate_up_bias.as_ref();
        backend.linear(Linear { rows: rows.clone(), x, w: gate_up, river, bias, y: &mut ws.gate_up })?;
        backend.glu(Glu {
            rows: rows.clone(),
            gate_up: &ws.gate_up,
            y: &mut ws.act,
            intermediate: config.intermediate,
            activation: config.activation,
        })?;
        capture(backend, LayerInput::Down, &ws.act)?;
        let (x, down, river) = (&ws.act, &layer.w.down, second(|w| &w.down));
        backend.linear(Linear { rows, x, w: down, river, bias: layer.down_bias.as_ref(), y: &mut ws.delta })
    }

    /// The addition that the layer before left open, the norm in front of attention, and between the two what gates want
    /// of the residual stream that stands there.
    fn begin_layer(&mut self, layer_idx: usize, gates: &[PassGate<'_>], pass: &mut Pass<B>) -> Result<()> {
        let after = layer_idx as u32;
        let pending = pass.pending.replace(layer_idx);
        let (keep, compare) = (river::compares(gates, after + 1), river::compares(gates, after));
        let compare = compare && pass.compared != Some(after);
        let Self { backend, config, ws, routes, .. } = self;
        let (keep, step_similarity) = match routes {
            Some(routes) => routes.around(after, keep, compare),
            None => (None, None),
        };
        backend.add_rms_norm(AddRmsNorm {
            rows: 0..pass.live.num_rows(),
            x: &mut ws.x,
            delta: pending.is_some().then_some(&ws.delta),
            post_norm: pending.and_then(|before| self.layers[before].mlp_out.as_ref()),
            output: normed_by(&self.layers[layer_idx].attn_in),
            y: &mut ws.h,
            keep,
            step_similarity,
            hidden: config.hidden,
            eps: config.rms_norm_eps,
        })?;
        self.exit_rows(gates, after, pass)
    }

    /// Adds the last block's output to the residual stream, if that is still to be done, and compares where `compared`
    /// names the layer that is to be compared with its beginning.
    fn flush_delta(&mut self, pass: &mut Pass<B>, compared: Option<u32>) -> Result<()> {
        let Some(pending) = pass.pending.take().filter(|_| !pass.live.is_empty()) else { return Ok(()) };
        let Self { backend, config, ws, routes, .. } = self;
        let step_similarity =
            compared.zip(routes.as_mut()).and_then(|(after, routes)| routes.around(after, false, true).1);
        pass.compared = compared;
        backend.add_rms_norm(AddRmsNorm {
            rows: 0..pass.live.num_rows(),
            x: &mut ws.x,
            delta: Some(&ws.delta),
            post_norm: self.layers[pending].mlp_out.as_ref(),
            output: NormOutput::None,
            y: &mut ws.h,
            keep: None,
            step_similarity,
            hidden: config.hidden,
            eps: config.rms_norm_eps,
        })
    }
}

impl<B: Backend> Runner for Model<B> {
    fn run(&mut self, batch: &Batch, queries: &[RowQuery], gates: &[PassGate<'_>]) -> Result<PassOutput> {
        if batch.num_rows() > self.max_rows {
            return Err(Error::Internal(format!("a pass of {} rows; at most {}", batch.num_rows(), self.max_rows)));
        }
        self.forward(Asked { batch, queries, gates })
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

    fn begin_capture(&mut self, layers: Range<usize>) {
        Self::begin_capture(self, layers);
    }

    fn end_capture(&mut self) -> Hessians {
        Self::end_capture(self)
    }

    fn counters(&self) -> Counters {
        self.backend.counters()
    }

    fn reset_counters(&mut self) {
        self.backend.reset_counters();
    }

    fn has_river(&self) -> bool {
        !self.river.is_empty()
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn weight_copy_bytes(&self) -> u64 {
        let extra = |m: &B::Matrix| self.backend.matrix_extra_bytes(m);
        let layers = self.layers.iter().map(|l| &l.w).chain(&self.river);
        layers.map(|w| extra(&w.qkv) + extra(&w.o) + extra(&w.gate_up) + extra(&w.down)).sum::<u64>()
            + extra(&self.embed)
            + self.lm_head.as_ref().map_or(0, extra)
    }
}

/// Slots that attention reads in a layer, in the mean over the layers: windows differ.
fn mean_slots_read(plan: &AttentionPlan, config: &ModelConfig) -> usize {
    if !config.has_windows() {
        return plan.slots_read(None);
    }
    (0..config.num_layers).map(|layer| plan.slots_read(config.window(layer))).sum::<usize>() / config.num_layers
}

/// What a block reads: the residual stream through its norm, or as it is where the family has none there.
fn normed_by<B: Backend>(norm: &Option<B::Buf>) -> NormOutput<'_, B> {
    norm.as_ref().map_or(NormOutput::Rounded, NormOutput::Normed)
}

/// What changes in the course of one pass.
struct Pass<B: Backend> {
    live: LiveRows,
    /// What the live rows need.
    inputs: B::Inputs,
    /// Which query each of the inputs' `query_rows` answers.
    query_ids: Vec<usize>,
    /// The layer whose MLP's output stands in `delta` and has not been added to `x` yet.
    pending: Option<usize>,
    answers: Vec<Option<RowAnswer>>,
    fates: Vec<Fate>,
    /// What the probed layers said, one list a sequence.
    layers: Vec<Vec<LayerRow>>,
    /// See [`PassOutput::steps`].
    steps: Vec<Vec<LayerStep>>,
    exits: Vec<Exit<B>>,
    /// The layer whose step similarities have been taken already.
    compared: Option<u32>,
    /// Rows may have left the backbone.
    routed: bool,
    /// Rows that the device holds.
    num_rows: usize,
    /// One a gate.
    watches: Vec<Watch<B>>,
    /// See [`PassOutput::mass`].
    mass: Vec<f32>,
    /// See [`PassOutput::slot_mass`].
    slot_mass: Vec<Vec<f32>>,
}

//! From named tensors to resident layers, and the buffers of a pass.

use super::{Layer, ModelOptions, Projections, Workspace};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::model::family::ModelConfig;
use crate::model::weights::{Tensor, WeightStore};
use crate::quant::{MatrixPart, QuantWeights};

/// Logits kept at a time: rows are answered in chunks of at most this many bytes. 64 branches of a vocabulary of 152,064
/// fit, so that their decode step reads the unembedding once and is one recording on a GPU.
const LOGITS_CHUNK_BYTES: usize = 38 << 20;
/// Watched logits read at a time: 64 branches with 16 spellings each.
const WATCHED_LEN: usize = 1024;

/// Bytes of the activations of a pass of `max_rows` rows.
pub(crate) fn workspace_bytes(config: &ModelConfig, compute: DType, max_rows: usize) -> u64 {
    let q_width = config.num_q_heads * config.head_dim;
    let qkv_width = q_width + 2 * config.num_kv_heads * config.head_dim;
    let f32s = 3 * config.hidden + qkv_width + config.num_q_heads + 2 * config.intermediate;
    let rounded = config.hidden + 2 * q_width + config.intermediate;
    (max_rows * (4 * f32s + compute.size_bytes() * rounded)) as u64
}

impl<B: Backend> Workspace<B> {
    pub(super) fn new(backend: &B, config: &ModelConfig, options: &ModelOptions) -> Result<Self> {
        // Some backends round the rows of a pass up, at most to the next 32; and the rows they answer, to the next 8.
        let rows = options.max_rows.next_multiple_of(32);
        let chunk = (LOGITS_CHUNK_BYTES / 4 / config.vocab_size).clamp(8, 64) / 8 * 8;
        let f32s = |width: usize| backend.alloc(DType::F32, rows * width);
        let rounded = |width: usize| backend.alloc(options.compute, rows * width);
        let q_width = config.num_q_heads * config.head_dim;
        Ok(Self {
            x: f32s(config.hidden)?,
            x_alt: f32s(config.hidden)?,
            h: rounded(config.hidden)?,
            qkv: f32s(q_width + 2 * config.num_kv_heads * config.head_dim)?,
            q: rounded(q_width)?,
            o: rounded(q_width)?,
            lse: f32s(config.num_q_heads)?,
            delta: f32s(config.hidden)?,
            gate_up: f32s(2 * config.intermediate)?,
            act: rounded(config.intermediate)?,
            out_x: backend.alloc(DType::F32, chunk * config.hidden)?,
            out_h: backend.alloc(options.compute, chunk * config.hidden)?,
            logits: backend.alloc(DType::F32, chunk * config.vocab_size)?,
            chunk,
            watched: backend.alloc(DType::F32, WATCHED_LEN)?,
            watched_len: WATCHED_LEN,
            stats: Vec::new(),
            sampled: Vec::new(),
            row: Vec::new(),
        })
    }
}

/// Takes named tensors from a store and makes them resident.
pub(super) struct Loader<'a, B: Backend> {
    pub(super) backend: &'a mut B,
    pub(super) store: &'a WeightStore,
    /// Matrices in codes, which stand in for the store's.
    pub(super) codes: Option<&'a QuantWeights>,
    pub(super) compute: DType,
    pub(super) config: &'a ModelConfig,
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn matrix(&mut self, parts: &[(&str, usize)], cols: usize) -> Result<B::Matrix> {
        let part = |(name, rows): &(&str, usize)| -> Result<MatrixPart> {
            match self.codes.and_then(|codes| codes.get(name)) {
                Some(codes) => Ok(codes.clone().into()),
                None => Ok(self.store.get(name, &[*rows, cols])?.into()),
            }
        };
        let parts: Vec<MatrixPart> = parts.iter().map(part).collect::<Result<_>>()?;
        self.backend.matrix(&parts, self.compute)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<B::Buf> {
        self.backend.vector(&[self.store.get(name, &[len])?])
    }

    /// A norm's weight, with what the family adds to it.
    pub(super) fn norm(&mut self, name: &str, len: usize) -> Result<B::Buf> {
        match self.config.family.norm_offset {
            0.0 => self.vector(name, len),
            offset => self.backend.vector(&[self.store.get(name, &[len])?.plus(offset)]),
        }
    }

    pub(super) fn layer(&mut self, idx: usize) -> Result<Layer<B>> {
        let c = self.config;
        let name = |suffix: &str| format!("model.layers.{idx}.{suffix}");
        let mut bias = |wanted: bool, parts: &[(&str, usize)]| -> Result<Option<B::Buf>> {
            if !wanted {
                return Ok(None);
            }
            let part = |(n, len): &(&str, usize)| self.store.get(&name(&format!("{n}.bias")), &[*len]);
            let parts: Vec<Tensor> = parts.iter().map(part).collect::<Result<_>>()?;
            self.backend.vector(&parts).map(Some)
        };
        let qkv_bias = bias(c.qkv_bias, &qkv(c))?;
        let o_bias = bias(c.o_bias, &[("self_attn.o_proj", c.hidden)])?;
        let gate_up_bias = bias(c.mlp_bias, &gate_up(c))?;
        let down_bias = bias(c.mlp_bias, &[("mlp.down_proj", c.hidden)])?;
        let qk_norm = match c.qk_norm_lens() {
            Some((q, k)) => {
                Some((self.norm(&name("self_attn.q_norm.weight"), q)?, self.norm(&name("self_attn.k_norm.weight"), k)?))
            }
            None => None,
        };
        let mut norm = |n: Option<&str>| n.map(|n| self.norm(&name(&format!("{n}.weight")), c.hidden)).transpose();
        let norms = &c.family.norms;
        Ok(Layer {
            attn_in: norm(norms.attn_in)?,
            attn_out: norm(norms.attn_out)?,
            mlp_in: norm(norms.mlp_in)?,
            mlp_out: norm(norms.mlp_out)?,
            w: self.projections(idx)?,
            qkv_bias,
            qk_norm,
            o_bias,
            gate_up_bias,
            down_bias,
        })
    }

    pub(super) fn projections(&mut self, idx: usize) -> Result<Projections<B>> {
        let c = self.config;
        let mut stacked = |parts: &[(&str, usize)], cols: usize| {
            let name = |(n, rows): &(&str, usize)| (format!("model.layers.{idx}.{n}.weight"), *rows);
            let named: Vec<(String, usize)> = parts.iter().map(name).collect();
            let borrowed: Vec<(&str, usize)> = named.iter().map(|(n, rows)| (n.as_str(), *rows)).collect();
            self.matrix(&borrowed, cols)
        };
        Ok(Projections {
            qkv: stacked(&qkv(c), c.hidden)?,
            o: stacked(&[("self_attn.o_proj", c.hidden)], c.num_q_heads * c.head_dim)?,
            gate_up: stacked(&gate_up(c), c.hidden)?,
            down: stacked(&[("mlp.down_proj", c.hidden)], c.intermediate)?,
        })
    }
}

/// The matrices that are stacked for attention, and their heights.
fn qkv(c: &ModelConfig) -> [(&'static str, usize); 3] {
    let (q_width, kv_width) = (c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    [("self_attn.q_proj", q_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)]
}

/// The matrices that are stacked for the MLP, and their heights.
fn gate_up(c: &ModelConfig) -> [(&'static str, usize); 2] {
    [("mlp.gate_proj", c.intermediate), ("mlp.up_proj", c.intermediate)]
}

//! The part of config.json that the engine uses.

use std::path::Path;

use super::rope::FULL_ATTENTION;
use super::{Family, Rope, WindowRule, unsupported};
use crate::backend::{Activation, NormSpan};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::fields::{Fields, Json};
use crate::quant::CheckpointFormat;

/// The largest number that any size in a config may be.
pub(super) const MAX_ABSURD: u64 = 1_000_000_000;

/// Weights of a model, so that bytes and bits of any part of it are whole numbers that fit. No model comes near.
const MAX_PARAMS: u128 = 1 << 44;

/// What config.json says, checked.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct ModelConfig {
    /// What is not in the numbers.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// What the MLP's gate goes through.
    pub activation: Activation,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of one head, even; `num_q_heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// How q and k are rotated.
    pub rope: Rope,
    /// How they are in layers with a window, where that is otherwise.
    pub local_rope: Option<Rope>,
    /// Attention scores are multiplied by it.
    pub sm_scale: f32,
    /// Scores are capped by it: `cap * tanh(score / cap)`.
    pub attn_softcap: Option<f32>,
    /// Logits are.
    pub logit_softcap: Option<f32>,
    /// Positions the model is opened for; see [`with_context`](Self::with_context).
    pub max_position_embeddings: usize,
    /// The most they could be.
    pub context_limit: usize,
    /// Of each layer, how many of the last positions it attends to; empty, or `None`: all.
    pub windows: Vec<Option<usize>>,
    /// The unembedding is the embedding; the file has no lm_head.
    pub tie_word_embeddings: bool,
    /// q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The o projection has a bias.
    pub o_bias: bool,
    /// gate, up and down projections have a bias.
    pub mlp_bias: bool,
    /// First token of a text, if the model has one.
    pub bos_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_ids: Vec<u32>,
    /// How the checkpoint says it is stored (f32 where it does not say, as transformers has it).
    pub dtype: DType,
    /// How the layers' projections are stored, where they are in codes.
    pub quantization: Option<CheckpointFormat>,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads a config.json.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(&Json::read(path)?)
    }

    /// Reads the bytes of a config.json; `path` is what errors call it.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::from_json(&Json::parse(path, bytes)?)
    }

    fn from_json(json: &Json) -> Result<Self> {
        let f = json.fields()?;
        let family = super::find(&f)?;
        let quantization = f.object("quantization_config")?.map(|q| CheckpointFormat::from_fields(&q)).transpose()?;
        if family.fused && quantization.is_some() {
            let what = format!(
                "quantization_config in a {} model, whose tensors are fused (use the bf16 checkpoint)",
                family.name
            );
            return Err(unsupported(what));
        }
        let heads = Heads::read(&f, &family)?;
        let (attention_bias, mlp_bias) = biases(&f, &family)?;
        if f.flag("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(unsupported("use_bidirectional_attention = true (use a model that generates)".to_owned()));
        }
        let rms_norm_eps = f.opt_number("rms_norm_eps")?.unwrap_or(1e-6);
        // As the f32 that it becomes.
        if !(rms_norm_eps as f32 > 0.0 && rms_norm_eps < 1.0) {
            return Err(f.bad("rms_norm_eps", format!("{rms_norm_eps} must lie between 0 and 1")));
        }
        let num_layers = f.count("num_hidden_layers", 1 << 14)?;
        let rope = Rope::from_fields(&f, FULL_ATTENTION, family.default_rope_theta, heads.head_dim)?;
        if rope.rotary_dim != heads.head_dim && !family.partial_rotary {
            return Err(unsupported(format!("partial_rotary_factor in a {} model", family.name)));
        }
        let (context, context_limit) = rope.reach(f.count("max_position_embeddings", MAX_ABSURD)?);
        let vocab_size = f.count("vocab_size", 1 << 28)?;
        let config = Self {
            hidden: heads.hidden,
            intermediate: f.count("intermediate_size", 1 << 24)?,
            activation: activation(&f, &family)?,
            num_layers,
            num_q_heads: heads.num_q_heads,
            num_kv_heads: heads.num_kv_heads,
            head_dim: heads.head_dim,
            vocab_size,
            rms_norm_eps: rms_norm_eps as f32,
            rope,
            local_rope: local_rope(&f, &family, heads.head_dim)?,
            sm_scale: sm_scale(&f, &family, heads.head_dim)?,
            attn_softcap: softcap(&f, "attn_logit_softcapping", family.softcaps.map(|caps| caps.0))?,
            logit_softcap: softcap(&f, "final_logit_softcapping", family.softcaps.map(|caps| caps.1))?,
            max_position_embeddings: context,
            context_limit,
            windows: windows(&f, &family, num_layers, context_limit)?,
            tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(family.ties_by_default),
            qkv_bias: family.qkv_bias || attention_bias,
            o_bias: attention_bias,
            mlp_bias,
            bos_id: f.ids("bos_token_id", vocab_size)?.first().copied(),
            eos_ids: f.ids("eos_token_id", vocab_size)?,
            dtype: dtype(&f)?,
            quantization,
            family,
        };
        match config.num_params() {
            ..=MAX_PARAMS => Ok(config),
            n => Err(Error::format(json.path(), format!("the sizes make {n} weights; at most {MAX_PARAMS} are read"))),
        }
    }

    /// The model for a context of so many positions; `None` leaves what config.json says. It decides about frequencies where the rule for long contexts
    /// depends on it ([`Rope`]): longrope's long factors, dynamic's base.
    pub fn with_context(self, positions: Option<usize>) -> Result<Self> {
        let positions = positions.unwrap_or(self.max_position_embeddings);
        if positions == 0 || positions > self.context_limit {
            let why = format!("{positions} is out of range; the model reaches from 1 to {}", self.context_limit);
            return Err(Error::config("max-context", why));
        }
        Ok(Self { max_position_embeddings: positions, ..self })
    }

    /// The last positions that a layer attends to; `None`: all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten().filter(|&w| w < self.max_position_embeddings)
    }

    /// The layer is one of those with a window, whether the context reaches beyond it or not.
    pub fn is_local(&self, layer: usize) -> bool {
        self.windows.get(layer).is_some_and(Option::is_some)
    }

    /// Some layer does not attend to all positions.
    pub fn has_windows(&self) -> bool {
        (0..self.windows.len()).any(|layer| self.window(layer).is_some())
    }

    /// What embedding rows are multiplied by.
    pub fn embed_scale(&self) -> f32 {
        if self.family.scales_embedding { (self.hidden as f64).sqrt() as f32 } else { 1.0 }
    }

    /// Name and shape of every tensor the engine asks for, in the order of the forward pass. What a checkpoint has fused
    /// stands here in its parts.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let q = self.num_q_heads * self.head_dim;
        let kv = self.num_kv_heads * self.head_dim;
        let (h, inter, norms) = (self.hidden, self.intermediate, &self.family.norms);
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, h])];
        for layer in 0..self.num_layers {
            let mut put =
                |name: &str, shape: &[usize]| out.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            let norm = |name: Option<&str>| name.map(|name| format!("{name}.weight"));
            norm(norms.attn_in).iter().for_each(|name| put(name, &[h]));
            for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
                put(&format!("self_attn.{name}_proj.weight"), &[rows, h]);
                if self.qkv_bias {
                    put(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            if let Some((q_len, k_len)) = self.qk_norm_lens() {
                put("self_attn.q_norm.weight", &[q_len]);
                put("self_attn.k_norm.weight", &[k_len]);
            }
            put("self_attn.o_proj.weight", &[h, q]);
            if self.o_bias {
                put("self_attn.o_proj.bias", &[h]);
            }
            norm(norms.attn_out).iter().chain(&norm(norms.mlp_in)).for_each(|name| put(name, &[h]));
            for (name, rows, cols) in [("gate", inter, h), ("up", inter, h), ("down", h, inter)] {
                put(&format!("mlp.{name}_proj.weight"), &[rows, cols]);
                if self.mlp_bias {
                    put(&format!("mlp.{name}_proj.bias"), &[rows]);
                }
            }
            norm(norms.mlp_out).iter().for_each(|name| put(name, &[h]));
        }
        out.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tie_word_embeddings {
            out.push(("lm_head.weight".to_owned(), vec![self.vocab_size, h]));
        }
        out
    }

    /// Elements of the norm weights of q and of k, where they are normed.
    pub fn qk_norm_lens(&self) -> Option<(usize, usize)> {
        let heads = |n: usize, span: NormSpan| if span == NormSpan::Head { self.head_dim } else { n * self.head_dim };
        self.family.qk_norm.map(|span| (heads(self.num_q_heads, span), heads(self.num_kv_heads, span)))
    }

    /// Parameters in all tensors of [`tensor_shapes`](Self::tensor_shapes).
    pub fn num_params(&self) -> u128 {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().map(|&d| d as u128).product::<u128>()).sum()
    }
}

/// The sizes that have to fit each other.
struct Heads {
    hidden: usize,
    num_q_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    fn read(f: &Fields<'_>, family: &Family) -> Result<Self> {
        let hidden = f.count("hidden_size", 1 << 20)?;
        let num_q_heads = f.count("num_attention_heads", 1 << 16)?;
        let num_kv_heads = match f.opt_count("num_key_value_heads", 1 << 16)? {
            Some(n) => n,
            None if family.kv_heads_default_to_q => num_q_heads,
            None => return Err(f.missing("num_key_value_heads")),
        };
        if num_q_heads % num_kv_heads != 0 {
            let why = format!("{num_kv_heads} does not divide num_attention_heads = {num_q_heads}");
            return Err(f.bad("num_key_value_heads", why));
        }
        let head_dim = match f.opt_count("head_dim", 1 << 16)?.or(family.default_head_dim) {
            Some(d) => d,
            None if hidden % num_q_heads == 0 => hidden / num_q_heads,
            None => {
                let why = format!("{num_q_heads} does not divide hidden_size = {hidden}, and head_dim is not given");
                return Err(f.bad("num_attention_heads", why));
            }
        };
        if head_dim % 2 != 0 {
            return Err(f.bad("head_dim", format!("{head_dim} is odd; RoPE rotates pairs, so it must be even")));
        }
        Ok(Self { hidden, num_q_heads, num_kv_heads, head_dim })
    }
}

/// `attention_bias` and `mlp_bias`.
fn biases(f: &Fields<'_>, family: &Family) -> Result<(bool, bool)> {
    let flag = |field: &str, known: bool| -> Result<bool> {
        let on = f.flag(field)?.unwrap_or(false);
        if on && !known {
            return Err(unsupported(format!("{field} = true in a {} model", family.name)));
        }
        Ok(on)
    };
    Ok((flag("attention_bias", family.config_attention_bias)?, flag("mlp_bias", family.config_mlp_bias)?))
}

fn activation(f: &Fields<'_>, family: &Family) -> Result<Activation> {
    match f.string("hidden_activation")?.or(f.string("hidden_act")?) {
        None => Ok(family.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(other) => Err(unsupported(format!("hidden_act {other:?} (supported: silu, gelu_pytorch_tanh)"))),
    }
}

/// Layers with a window may rotate otherwise: `rope_parameters.sliding_attention`, or `rope_local_base_freq`.
fn local_rope(f: &Fields<'_>, family: &Family, head_dim: usize) -> Result<Option<Rope>> {
    let Some(theta) = family.local_rope_theta else { return Ok(None) };
    let nested = match f.object("rope_parameters")? {
        Some(whole) => whole.object("sliding_attention")?.is_some(),
        None => false,
    };
    if nested {
        return Rope::from_fields(f, "sliding_attention", theta, head_dim).map(Some);
    }
    let field = "rope_local_base_freq";
    let theta = f.opt_number(field)?.unwrap_or(theta);
    Rope::plain(theta, head_dim).checked(f, field).map(Some)
}

fn sm_scale(f: &Fields<'_>, family: &Family, head_dim: usize) -> Result<f32> {
    let Some(default) = family.query_scalar else { return Ok(1.0 / (head_dim as f32).sqrt()) };
    let scalar = f.opt_factor("query_pre_attn_scalar")?.unwrap_or(default);
    Ok((1.0 / scalar.sqrt()) as f32)
}

/// A field that is `null` says that there is no cap; one that is not there leaves it to the family.
fn softcap(f: &Fields<'_>, field: &str, default: Option<f64>) -> Result<Option<f32>> {
    let cap = match f.opt_factor(field)? {
        None if f.has(field) => None,
        None => default,
        cap => cap,
    };
    Ok(cap.map(|cap| cap as f32))
}

/// The window of each layer; empty where none has one below the longest context.
fn windows(f: &Fields<'_>, family: &Family, num_layers: usize, longest: usize) -> Result<Vec<Option<usize>>> {
    let window = match f.opt_count("sliding_window", MAX_ABSURD)? {
        None if !f.has("sliding_window") => family.default_window,
        window => window,
    };
    let kinds = f.strings("layer_types")?;
    if !kinds.is_empty() && kinds.len() != num_layers {
        return Err(f.bad("layer_types", format!("{} entries; there are {num_layers} layers", kinds.len())));
    }
    if let Some(kind) = kinds.iter().find(|k| ![FULL_ATTENTION, "sliding_attention"].contains(k)) {
        return Err(unsupported(format!("layer_types {kind:?} (supported: full_attention, sliding_attention)")));
    }
    let used = f.flag("use_sliding_window")?.unwrap_or(false);
    let first = f.opt_integer("max_window_layers", 0, 1 << 14)?.unwrap_or(28);
    let pattern = f.opt_count("sliding_window_pattern", 1 << 14)?;
    let slides = |layer: usize| match (family.window, kinds.get(layer)) {
        (WindowRule::Always, _) => window.is_some(),
        (_, Some(kind)) => *kind == "sliding_attention",
        (WindowRule::Never, None) => false,
        (WindowRule::WhenUsed, None) => used && window.is_some() && layer >= first,
        (WindowRule::AllBut(nth), None) => !(layer + 1).is_multiple_of(pattern.unwrap_or(nth)),
    };
    let layers: Vec<bool> = (0..num_layers).map(slides).collect();
    if !layers.contains(&true) {
        return Ok(Vec::new());
    }
    let Some(window) = window else {
        return Err(f.bad("sliding_window", "missing, and some layers attend to no more than it says"));
    };
    if window >= longest && family.local_rope_theta.is_none() {
        return Ok(Vec::new());
    }
    Ok(layers.into_iter().map(|slides| slides.then_some(window)).collect())
}

fn dtype(f: &Fields<'_>) -> Result<DType> {
    let Some(name) = f.string("dtype")?.or(f.string("torch_dtype")?) else { return Ok(DType::F32) };
    let plain = name.strip_prefix("torch.").unwrap_or(name);
    plain.parse().map_err(|_| unsupported(format!("dtype {name:?} (use bfloat16, float16 or float32)")))
}

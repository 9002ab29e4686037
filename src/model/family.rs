//! Model families as data, and the config.json that picks one.
//!
//! A family says what config.json leaves unsaid: which projections carry a bias, whether q and k are normed per head.
//! Tensor names are the same in all of them. A new family of this shape is one row in [`FAMILIES`].

use std::path::Path;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::fields::{Fields, Json};

/// What sets one model family apart from the plain decoder (RMSNorm, GQA with RoPE, SwiGLU).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Family {
    /// Short name, and `model_type` in config.json.
    pub name: &'static str,
    /// The entry of `architectures` in config.json.
    pub architecture: &'static str,
    /// q, k and v always carry a bias (o does not).
    pub qkv_bias: bool,
    /// `attention_bias` in config.json gives q, k, v and o a bias.
    pub config_attention_bias: bool,
    /// `mlp_bias` in config.json gives gate, up and down a bias.
    pub config_mlp_bias: bool,
    /// q and k are RMS-normed per head before RoPE.
    pub qk_norm: bool,
    /// head_dim where config.json leaves it out; `None` is hidden / heads.
    pub default_head_dim: Option<usize>,
    /// A missing `num_key_value_heads` means as many as query heads (elsewhere it is an error).
    pub kv_heads_default_to_q: bool,
    /// A non-null `sliding_window` is in use without `use_sliding_window`.
    pub sliding_window_on: bool,
}

/// Llama and its many look-alikes.
pub const LLAMA: Family = Family {
    name: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: false,
    config_attention_bias: true,
    config_mlp_bias: true,
    qk_norm: false,
    default_head_dim: None,
    kv_heads_default_to_q: true,
    sliding_window_on: false,
};

/// Every family this build runs.
pub const FAMILIES: [Family; 4] = [
    LLAMA,
    Family {
        name: "mistral",
        architecture: "MistralForCausalLM",
        config_attention_bias: false,
        config_mlp_bias: false,
        kv_heads_default_to_q: false,
        sliding_window_on: true,
        ..LLAMA
    },
    Family {
        name: "qwen2",
        architecture: "Qwen2ForCausalLM",
        qkv_bias: true,
        config_attention_bias: false,
        config_mlp_bias: false,
        kv_heads_default_to_q: false,
        ..LLAMA
    },
    Family {
        name: "qwen3",
        architecture: "Qwen3ForCausalLM",
        config_mlp_bias: false,
        qk_norm: true,
        default_head_dim: Some(128),
        kv_heads_default_to_q: false,
        ..LLAMA
    },
];

/// What other well-known architectures would need; first match by substring, more special ones first.
const MISSING: [(&str, &str); 13] = [
    ("Moe", "mixture-of-experts layers"),
    ("MoE", "mixture-of-experts layers"),
    ("Mixtral", "mixture-of-experts layers"),
    ("Deepseek", "multi-head latent attention"),
    ("ConditionalGeneration", "image or audio input"),
    ("Gemma", "GeGLU, norm offsets and scaled embeddings"),
    ("Phi3", "fused qkv and gate_up tensors"),
    ("Phi", "LayerNorm and partial RoPE"),
    ("Olmo", "post-norm layers"),
    ("Granite", "embedding, residual and logit multipliers"),
    ("GPT", "LayerNorm and learned positions"),
    ("Bert", "a causal decoder"),
    ("Mamba", "state-space layers"),
];

/// The part of config.json that the engine uses, checked.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct ModelConfig {
    /// What is not in the numbers.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the SwiGLU.
    pub intermediate: usize,
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
    /// Base of the RoPE frequencies.
    pub rope_theta: f32,
    /// Positions the model can tell apart: `max_position_embeddings`, or the sliding window if that is smaller
    /// (within one window, sliding attention is full attention).
    pub max_position_embeddings: usize,
    /// The sliding window, if one is in use.
    pub sliding_window: Option<usize>,
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
        let family = find_family(&f)?;
        if let Some(quant) = f.object("quantization_config")? {
            let method = quant.string("quant_method")?.unwrap_or("unnamed");
            return Err(unsupported(format!("quantization_config ({method}; use the bf16 or f16 checkpoint)")));
        }
        match f.string("hidden_act")?.or(f.string("hidden_activation")?) {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(unsupported(format!("hidden_act {other:?} (use silu)"))),
        }

        let hidden = f.count("hidden_size", 1 << 20)?;
        let num_q_heads = f.count("num_attention_heads", 1 << 16)?;
        let num_kv_heads = match f.opt_count("num_key_value_heads", 1 << 16)? {
            Some(n) => n,
            None if family.kv_heads_default_to_q => num_q_heads,
            None => return Err(f.missing("num_key_value_heads")),
        };
        if num_q_heads % num_kv_heads != 0 {
            return Err(f.bad(
                "num_key_value_heads",
                format!("{num_kv_heads} does not divide num_attention_heads = {num_q_heads}"),
            ));
        }
        let head_dim = match f.opt_count("head_dim", 1 << 16)?.or(family.default_head_dim) {
            Some(d) => d,
            None if hidden % num_q_heads == 0 => hidden / num_q_heads,
            None => {
                return Err(f.bad(
                    "num_attention_heads",
                    format!("{num_q_heads} does not divide hidden_size = {hidden}, and head_dim is not given"),
                ));
            }
        };
        if head_dim % 2 != 0 {
            return Err(f.bad("head_dim", format!("{head_dim} is odd; RoPE rotates pairs, so it must be even")));
        }

        let attention_bias = f.flag("attention_bias")?.unwrap_or(false);
        let mlp_bias = f.flag("mlp_bias")?.unwrap_or(false);
        if attention_bias && !family.config_attention_bias {
            return Err(unsupported(format!("attention_bias = true in a {} model", family.name)));
        }
        if mlp_bias && !family.config_mlp_bias {
            return Err(unsupported(format!("mlp_bias = true in a {} model", family.name)));
        }
        let rope_theta = rope_theta(&f)?;
        let rms_norm_eps = f.opt_number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(f.bad("rms_norm_eps", format!("{rms_norm_eps} must lie between 0 and 1")));
        }

        let positions = f.count("max_position_embeddings", MAX_ABSURD)?;
        let sliding_window = sliding_window(&f, &family)?;
        let vocab_size = f.count("vocab_size", 1 << 28)?;
        let config = Self {
            hidden,
            intermediate: f.count("intermediate_size", 1 << 24)?,
            num_layers: f.count("num_hidden_layers", 1 << 14)?,
            num_q_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: rms_norm_eps as f32,
            rope_theta: rope_theta as f32,
            max_position_embeddings: sliding_window.map_or(positions, |w| w.min(positions)),
            sliding_window,
            tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family.qkv_bias || attention_bias,
            o_bias: attention_bias,
            mlp_bias,
            bos_id: f.ids("bos_token_id", vocab_size)?.first().copied(),
            eos_ids: f.ids("eos_token_id", vocab_size)?,
            dtype: dtype(&f)?,
            family,
        };
        Ok(config)
    }

    /// What attention scores are multiplied by.
    pub fn sm_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Rotation frequencies `[head_dim / 2]`, radians per position, in f32 as transformers computes them.
    pub fn inv_freq(&self) -> Vec<f32> {
        let dim = self.head_dim as f32;
        (0..self.head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / dim;
                1.0 / f64::from(self.rope_theta).powf(f64::from(exponent)) as f32
            })
            .collect()
    }

    /// Name and shape of every tensor the checkpoint must hold, in the order of the forward pass.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let q = self.num_q_heads * self.head_dim;
        let kv = self.num_kv_heads * self.head_dim;
        let (h, inter) = (self.hidden, self.intermediate);
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, h])];
        for layer in 0..self.num_layers {
            let mut put =
                |name: &str, shape: &[usize]| out.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            put("input_layernorm.weight", &[h]);
            for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
                put(&format!("self_attn.{name}_proj.weight"), &[rows, h]);
                if self.qkv_bias {
                    put(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            if self.family.qk_norm {
                put("self_attn.q_norm.weight", &[self.head_dim]);
                put("self_attn.k_norm.weight", &[self.head_dim]);
            }
            put("self_attn.o_proj.weight", &[h, q]);
            if self.o_bias {
                put("self_attn.o_proj.bias", &[h]);
            }
            put("post_attention_layernorm.weight", &[h]);
            for (name, rows, cols) in [("gate", inter, h), ("up", inter, h), ("down", h, inter)] {
                put(&format!("mlp.{name}_proj.weight"), &[rows, cols]);
                if self.mlp_bias {
                    put(&format!("mlp.{name}_proj.bias"), &[rows]);
                }
            }
        }
        out.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tie_word_embeddings {
            out.push(("lm_head.weight".to_owned(), vec![self.vocab_size, h]));
        }
        out
    }

    /// Parameters in all tensors of [`tensor_shapes`](Self::tensor_shapes).
    pub fn num_params(&self) -> u128 {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().map(|&d| d as u128).product::<u128>()).sum()
    }

    /// The shape of a known model (or `tiny`), to be filled with random weights.
    pub fn shape(name: &str) -> Result<Self> {
        let [llama, _, qwen2, _] = FAMILIES;
        let base = |family: Family| Self {
            family,
            hidden: 64,
            intermediate: 128,
            num_layers: 2,
            num_q_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 256,
            rms_norm_eps: if family.name == "llama" { 1e-5 } else { 1e-6 },
            rope_theta: 10_000.0,
            max_position_embeddings: 2048,
            sliding_window: None,
            tie_word_embeddings: true,
            qkv_bias: family.qkv_bias,
            o_bias: false,
            mlp_bias: false,
            bos_id: Some(0),
            eos_ids: vec![1],
            dtype: DType::Bf16,
        };
        let qwen = |hidden, intermediate, num_layers, num_q_heads, num_kv_heads, head_dim| Self {
            hidden,
            intermediate,
            num_layers,
            num_q_heads,
            num_kv_heads,
            head_dim,
            vocab_size: 151_936,
            rope_theta: 1_000_000.0,
            max_position_embeddings: 32_768,
            bos_id: Some(151_643),
            eos_ids: vec![151_645, 151_643],
            ..base(qwen2)
        };
        Ok(match name {
            "tiny" => base(llama),
            "qwen2.5-0.5b" => qwen(896, 4864, 24, 14, 2, 64),
            "qwen2.5-1.5b" => qwen(1536, 8960, 28, 12, 2, 128),
            "qwen2.5-7b" => {
                Self { vocab_size: 152_064, tie_word_embeddings: false, ..qwen(3584, 18_944, 28, 28, 4, 128) }
            }
            "llama-3-8b" => Self {
                hidden: 4096,
                intermediate: 14_336,
                num_layers: 32,
                num_q_heads: 32,
                num_kv_heads: 8,
                head_dim: 128,
                vocab_size: 128_256,
                rope_theta: 500_000.0,
                max_position_embeddings: 8192,
                tie_word_embeddings: false,
                bos_id: Some(128_000),
                eos_ids: vec![128_009, 128_001],
                ..base(llama)
            },
            other => {
                return Err(Error::config("shape", format!("{other:?} is unknown; use {}", Self::SHAPES.join(", "))));
            }
        })
    }

    /// The names [`shape`](Self::shape) knows.
    pub const SHAPES: [&'static str; 5] = ["tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3-8b"];
}

/// The largest number that any size in a config may be.
const MAX_ABSURD: u64 = 1_000_000_000;

fn unsupported(what: String) -> Error {
    Error::Unsupported { op: "config.json", what }
}

fn find_family(f: &Fields<'_>) -> Result<Family> {
    let supported = || FAMILIES.map(|family| family.architecture).join(", ");
    let named = match f.strings("architectures")?.as_slice() {
        [] => None,
        [one] => Some(*one),
        many => return Err(f.bad("architectures", format!("{} entries; exactly one is understood", many.len()))),
    };
    let known = |family: &&Family| match named {
        Some(architecture) => family.architecture == architecture,
        None => f.string("model_type").ok().flatten() == Some(family.name),
    };
    if let Some(family) = FAMILIES.iter().find(known) {
        return Ok(*family);
    }
    let Some(architecture) = named.or(f.string("model_type")?) else {
        return Err(f.bad("architectures", format!("missing; it names the model class, one of {}", supported())));
    };
    let needs = match MISSING.iter().find(|(part, _)| architecture.contains(part)) {
        Some((_, missing)) => format!("it needs {missing}; "),
        None => String::new(),
    };
    Err(unsupported(format!("architecture {architecture} ({needs}supported: {})", supported())))
}

/// RoPE base from `rope_parameters` (newer) or `rope_theta` + `rope_scaling` (older). Only the unscaled kind is known.
fn rope_theta(f: &Fields<'_>) -> Result<f64> {
    let outer = f.opt_number("rope_theta")?;
    let mut theta = outer;
    for field in ["rope_parameters", "rope_scaling"] {
        let Some(rope) = f.object(field)? else { continue };
        match rope.string("rope_type")?.or(rope.string("type")?) {
            None | Some("default") => {}
            Some(kind) => return Err(unsupported(format!("{field}.rope_type {kind:?} (use \"default\")"))),
        }
        partial_rotary(&rope)?;
        if let Some(inner) = rope.opt_number("rope_theta")? {
            match outer {
                Some(outer) if outer != inner => {
                    return Err(
                        f.bad(field, format!("rope_theta is {inner} here and {outer} at the top; make them equal"))
                    );
                }
                _ => theta = Some(inner),
            }
        }
    }
    partial_rotary(f)?;
    let theta = theta.unwrap_or(10_000.0);
    if !(1.0..=1e12).contains(&theta) {
        return Err(f.bad("rope_theta", format!("{theta} must lie between 1 and 1e12")));
    }
    Ok(theta)
}

fn partial_rotary(f: &Fields<'_>) -> Result<()> {
    match f.opt_number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(unsupported(format!("partial_rotary_factor {factor}"))),
        _ => Ok(()),
    }
}

fn sliding_window(f: &Fields<'_>, family: &Family) -> Result<Option<usize>> {
    let window = f.opt_count("sliding_window", MAX_ABSURD)?;
    let sliding_layers = f.strings("layer_types")?.iter().any(|kind| *kind != "full_attention");
    let on = family.sliding_window_on || sliding_layers || f.flag("use_sliding_window")?.unwrap_or(false);
    match window {
        None if sliding_layers => {
            Err(f.bad("layer_types", "names layers without full attention, and sliding_window is not given"))
        }
        window => Ok(window.filter(|_| on)),
    }
}

fn dtype(f: &Fields<'_>) -> Result<DType> {
    let Some(name) = f.string("dtype")?.or(f.string("torch_dtype")?) else { return Ok(DType::F32) };
    let plain = name.strip_prefix("torch.").unwrap_or(name);
    plain.parse().map_err(|_| unsupported(format!("dtype {name:?} (use bfloat16, float16 or float32)")))
}

/// How the checkpoint's authors generate, from generation_config.json. Absent fields stay `None`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Tokens that end a text; empty leaves it to [`ModelConfig::eos_ids`].
    pub eos_ids: Vec<u32>,
    /// Longest answer.
    pub max_new_tokens: Option<usize>,
    /// Draw rather than take the most likely token.
    pub do_sample: bool,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Draw among the k most likely; 0 is all.
    pub top_k: Option<usize>,
    /// Draw among the most likely that together reach p.
    pub top_p: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; a missing file is the default.
    pub fn from_dir(dir: &Path, vocab_size: usize) -> Result<Self> {
        let path = dir.join("generation_config.json");
        if path.exists() { Self::from_json(&Json::read(&path)?, vocab_size) } else { Ok(Self::default()) }
    }

    /// Reads the bytes of a generation_config.json; `path` is what errors call it.
    pub fn from_bytes(path: &Path, bytes: &[u8], vocab_size: usize) -> Result<Self> {
        Self::from_json(&Json::parse(path, bytes)?, vocab_size)
    }

    fn from_json(json: &Json, vocab_size: usize) -> Result<Self> {
        let f = json.fields()?;
        let temperature = f.opt_number("temperature")?;
        if temperature.is_some_and(|t| !(0.0..=100.0).contains(&t)) {
            return Err(f.bad("temperature", "must lie between 0 and 100"));
        }
        let top_p = f.opt_number("top_p")?;
        if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err(f.bad("top_p", "must lie above 0 and not above 1"));
        }
        Ok(Self {
            eos_ids: f.ids("eos_token_id", vocab_size)?,
            max_new_tokens: f.opt_count("max_new_tokens", MAX_ABSURD)?,
            do_sample: f.flag("do_sample")?.unwrap_or(false),
            temperature: temperature.map(|t| t as f32),
            top_k: f.opt_integer("top_k", 0, MAX_ABSURD)?,
            top_p: top_p.map(|p| p as f32),
        })
    }
}

#[cfg(test)]
#[path = "family_tests.rs"]
mod tests;

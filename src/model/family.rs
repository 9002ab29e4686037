//! Model families as data: what config.json leaves unsaid.
//!
//! Every family is one decoder: RMSNorm, grouped-query attention with RoPE, a gated MLP. A row of [`FAMILIES`] says where
//! a family differs from Llama; the numbers come from config.json ([`ModelConfig`]). A new family of this shape is one
//! row.

mod config;
mod generation;
mod rope;
mod shapes;
#[cfg(test)]
mod tests;

pub use config::ModelConfig;
pub use generation::GenerationConfig;
pub use rope::{Rope, RopeScaling};

use crate::backend::{Activation, NormSpan};
use crate::error::{Error, Result};
use crate::model::fields::Fields;

/// What sets one model family apart from Llama.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
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
    /// q and k are RMS-normed before RoPE, over this much.
    pub qk_norm: Option<NormSpan>,
    /// Where the norms of a layer stand, and what they are called.
    pub norms: LayerNorms,
    /// Added to every norm weight of the file.
    pub norm_offset: f32,
    /// Of the gated MLP, where config.json does not say.
    pub activation: Activation,
    /// Embedding rows are multiplied by sqrt(hidden).
    pub scales_embedding: bool,
    /// q, k and v are one tensor in the file, and so are gate and up.
    pub fused: bool,
    /// `partial_rotary_factor` in config.json leaves a part of each head unrotated.
    pub partial_rotary: bool,
    /// Which layers a `sliding_window` is for.
    pub window: WindowRule,
    /// The window where config.json has no `sliding_window`.
    pub default_window: Option<usize>,
    /// Attention scores are divided by the root of this where config.json has no `query_pre_attn_scalar`; `None` always
    /// takes head_dim.
    pub query_scalar: Option<f64>,
    /// Soft caps of scores and of logits where config.json has none; `None` where the family knows no such thing.
    pub softcaps: Option<(f64, f64)>,
    /// RoPE base of layers with a window where it is another than that of the others.
    pub local_rope_theta: Option<f64>,
    /// RoPE base where config.json has none.
    pub default_rope_theta: f64,
    /// head_dim where config.json leaves it out; `None` is hidden / heads.
    pub default_head_dim: Option<usize>,
    /// A missing `num_key_value_heads` means as many as query heads (elsewhere it is an error).
    pub kv_heads_default_to_q: bool,
    /// A missing `tie_word_embeddings` means that they are tied.
    pub ties_by_default: bool,
}

/// The norms of a layer by name, each a tensor `model.layers.N.<name>.weight`; `None` where there is no norm.
///
/// ```text
/// h = attn_in(x)   x += attn_out(attention(h))   h = mlp_in(x)   x += mlp_out(mlp(h))
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LayerNorms {
    /// In front of attention.
    pub attn_in: Option<&'static str>,
    /// On what attention adds to the residual stream.
    pub attn_out: Option<&'static str>,
    /// In front of the MLP.
    pub mlp_in: Option<&'static str>,
    /// On what the MLP adds.
    pub mlp_out: Option<&'static str>,
}

impl LayerNorms {
    /// The names that are there, in the order of a pass.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.attn_in, self.attn_out, self.mlp_in, self.mlp_out].into_iter().flatten()
    }
}

/// Which layers a `sliding_window` in config.json is for, where it has no `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum WindowRule {
    /// None.
    Never,
    /// All.
    Always,
    /// With `use_sliding_window`, those from `max_window_layers` on.
    WhenUsed,
    /// All but every n-th; `sliding_window_pattern` in config.json is another n.
    AllBut(usize),
}

const PRE_NORMS: LayerNorms = LayerNorms {
    attn_in: Some("input_layernorm"),
    attn_out: None,
    mlp_in: Some("post_attention_layernorm"),
    mlp_out: None,
};

/// Llama and its many look-alikes: Llama 2 to 3.3, Falcon 3, DeepSeek-R1's distillations of Llama.
pub const LLAMA: Family = Family {
    name: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: false,
    config_attention_bias: true,
    config_mlp_bias: true,
    qk_norm: None,
    norms: PRE_NORMS,
    norm_offset: 0.0,
    activation: Activation::Silu,
    scales_embedding: false,
    fused: false,
    partial_rotary: false,
    window: WindowRule::Never,
    default_window: None,
    query_scalar: None,
    softcaps: None,
    local_rope_theta: None,
    default_rope_theta: 10_000.0,
    default_head_dim: None,
    kv_heads_default_to_q: true,
    ties_by_default: false,
};

const MISTRAL: Family = Family {
    name: "mistral",
    architecture: "MistralForCausalLM",
    config_attention_bias: false,
    config_mlp_bias: false,
    kv_heads_default_to_q: false,
    window: WindowRule::Always,
    default_window: Some(4096),
    ..LLAMA
};

/// Qwen 2 and 2.5, DeepSeek-R1's distillations of them.
const QWEN2: Family = Family {
    name: "qwen2",
    architecture: "Qwen2ForCausalLM",
    qkv_bias: true,
    config_attention_bias: false,
    config_mlp_bias: false,
    kv_heads_default_to_q: false,
    window: WindowRule::WhenUsed,
    ..LLAMA
};

const QWEN3: Family = Family {
    name: "qwen3",
    architecture: "Qwen3ForCausalLM",
    qkv_bias: false,
    config_attention_bias: true,
    qk_norm: Some(NormSpan::Head),
    default_head_dim: Some(128),
    ..QWEN2
};

/// Phi-3, Phi-3.5 and Phi-4-mini.
const PHI3: Family = Family {
    name: "phi3",
    architecture: "Phi3ForCausalLM",
    config_attention_bias: false,
    config_mlp_bias: false,
    fused: true,
    partial_rotary: true,
    window: WindowRule::Always,
    ..LLAMA
};

const OLMO2: Family = Family {
    name: "olmo2",
    architecture: "Olmo2ForCausalLM",
    config_mlp_bias: false,
    qk_norm: Some(NormSpan::Row),
    norms: LayerNorms {
        attn_in: None,
        attn_out: Some("post_attention_layernorm"),
        mlp_in: None,
        mlp_out: Some("post_feedforward_layernorm"),
    },
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    architecture: "Gemma2ForCausalLM",
    config_mlp_bias: false,
    norms: LayerNorms {
        attn_in: Some("input_layernorm"),
        attn_out: Some("post_attention_layernorm"),
        mlp_in: Some("pre_feedforward_layernorm"),
        mlp_out: Some("post_feedforward_layernorm"),
    },
    norm_offset: 1.0,
    activation: Activation::GeluTanh,
    scales_embedding: true,
    window: WindowRule::AllBut(2),
    default_window: Some(4096),
    query_scalar: Some(256.0),
    softcaps: Some((50.0, 30.0)),
    default_head_dim: Some(256),
    kv_heads_default_to_q: false,
    ties_by_default: true,
    ..LLAMA
};

/// Gemma 3 without images.
const GEMMA3: Family = Family {
    name: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    qk_norm: Some(NormSpan::Head),
    window: WindowRule::AllBut(6),
    softcaps: None,
    local_rope_theta: Some(10_000.0),
    default_rope_theta: 1_000_000.0,
    ..GEMMA2
};

/// Every family this build runs.
pub const FAMILIES: [Family; 8] = [LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, OLMO2, GEMMA2, GEMMA3];

/// What other well-known architectures would need; first match by substring, more special ones first.
const MISSING: [(&str, &str); 13] = [
    ("Moe", "mixture-of-experts layers"),
    ("MoE", "mixture-of-experts layers"),
    ("Mixtral", "mixture-of-experts layers"),
    ("Deepseek", "multi-head latent attention"),
    ("ConditionalGeneration", "image or audio input"),
    ("Gemma", "what other generations of Gemma do otherwise than 2 and 3"),
    ("Phi", "LayerNorm and partial RoPE with biases"),
    ("Olmo", "LayerNorm without weights, or other windows"),
    ("Granite", "embedding, residual and logit multipliers"),
    ("Cohere", "LayerNorm and parallel attention and MLP"),
    ("GPT", "LayerNorm and learned positions"),
    ("Bert", "a causal decoder"),
    ("Mamba", "state-space layers"),
];

/// The family that `architectures` names, or `model_type` where there is no such field.
fn find(f: &Fields<'_>) -> Result<Family> {
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

fn unsupported(what: String) -> Error {
    Error::Unsupported { op: "config.json", what }
}

//! Shapes of known models, to be filled with random weights.

use super::{Family, LLAMA, ModelConfig, QWEN2, Rope};
use crate::dtype::DType;
use crate::error::{Error, Result};

impl ModelConfig {
    /// The shape of a known model (or `tiny`), to be filled with random weights.
    pub fn shape(name: &str) -> Result<Self> {
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
            activation: family.activation,
            rope: Rope::plain(10_000.0, 16),
            local_rope: None,
            sm_scale: 0.25,
            attn_softcap: None,
            logit_softcap: None,
            max_position_embeddings: 2048,
            context_limit: 2048,
            windows: Vec::new(),
            tie_word_embeddings: true,
            qkv_bias: family.qkv_bias,
            o_bias: false,
            mlp_bias: false,
            bos_id: Some(0),
            eos_ids: vec![1],
            dtype: DType::Bf16,
            quantization: None,
        };
        let qwen = |hidden, intermediate, num_layers, num_q_heads, num_kv_heads, head_dim| Self {
            hidden,
            intermediate,
            num_layers,
            num_q_heads,
            num_kv_heads,
            head_dim,
            vocab_size: 151_936,
            rope: Rope::plain(1_000_000.0, head_dim),
            sm_scale: 1.0 / (head_dim as f32).sqrt(),
            max_position_embeddings: 32_768,
            context_limit: 32_768,
            bos_id: Some(151_643),
            eos_ids: vec![151_645, 151_643],
            ..base(QWEN2)
        };
        Ok(match name {
            "tiny" => base(LLAMA),
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
                rope: Rope::plain(500_000.0, 128),
                sm_scale: 1.0 / (128f32).sqrt(),
                max_position_embeddings: 8192,
                context_limit: 8192,
                tie_word_embeddings: false,
                bos_id: Some(128_000),
                eos_ids: vec![128_009, 128_001],
                ..base(LLAMA)
            },
            other => {
                return Err(Error::config("shape", format!("{other:?} is unknown; use {}", Self::SHAPES.join(", "))));
            }
        })
    }

    /// The names [`shape`](Self::shape) knows.
    pub const SHAPES: [&'static str; 5] = ["tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3-8b"];
}

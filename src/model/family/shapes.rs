//! Shapes of known models: what `plan` reckons with before anything is downloaded, and what random weights can fill.

use super::{Family, LLAMA, MISTRAL, ModelConfig, OLMO2, QWEN2, QWEN3, Rope};
use crate::dtype::DType;
use crate::error::{Error, Result};

struct Shape {
    name: &'static str,
    family: Family,
    /// Hidden size, intermediate size, layers, query heads, kv heads, head_dim.
    sizes: [usize; 6],
    vocab_size: usize,
    rope_base: f64,
    max_positions: usize,
    tied: bool,
}

const fn shape(
    name: &'static str,
    family: Family,
    sizes: [usize; 6],
    (vocab_size, tied): (usize, bool),
    (rope_base, max_positions): (f64, usize),
) -> Shape {
    Shape { name, family, sizes, vocab_size, rope_base, max_positions, tied }
}

/// As their config.json has them; RoPE without its scaling.
const KNOWN: [Shape; 15] = [
    shape("tiny", LLAMA, [64, 128, 2, 4, 2, 16], (256, true), (1e4, 2048)),
    shape("llama-3.2-1b", LLAMA, [2048, 8192, 16, 32, 8, 64], (128_256, true), (5e5, 131_072)),
    shape("llama-3.2-3b", LLAMA, [3072, 8192, 28, 24, 8, 128], (128_256, true), (5e5, 131_072)),
    shape("llama-3-8b", LLAMA, [4096, 14_336, 32, 32, 8, 128], (128_256, false), (5e5, 8192)),
    shape("falcon3-7b", LLAMA, [3072, 23_040, 28, 12, 4, 256], (131_072, false), (1_000_042.0, 32_768)),
    shape("falcon3-10b", LLAMA, [3072, 23_040, 40, 12, 4, 256], (131_072, false), (1_000_042.0, 32_768)),
    shape("mistral-7b-v0.3", MISTRAL, [4096, 14_336, 32, 32, 8, 128], (32_768, false), (1e6, 32_768)),
    shape("qwen2.5-0.5b", QWEN2, [896, 4864, 24, 14, 2, 64], (151_936, true), (1e6, 32_768)),
    shape("qwen2.5-1.5b", QWEN2, [1536, 8960, 28, 12, 2, 128], (151_936, true), (1e6, 32_768)),
    shape("qwen2.5-3b", QWEN2, [2048, 11_008, 36, 16, 2, 128], (151_936, true), (1e6, 32_768)),
    shape("qwen2.5-7b", QWEN2, [3584, 18_944, 28, 28, 4, 128], (152_064, false), (1e6, 32_768)),
    shape("qwen3-0.6b", QWEN3, [1024, 3072, 28, 16, 8, 128], (151_936, true), (1e6, 40_960)),
    shape("qwen3-4b", QWEN3, [2560, 9728, 36, 32, 8, 128], (151_936, true), (1e6, 40_960)),
    shape("qwen3-8b", QWEN3, [4096, 12_288, 36, 32, 8, 128], (151_936, false), (1e6, 40_960)),
    shape("olmo-2-7b", OLMO2, [4096, 11_008, 32, 32, 32, 128], (100_352, false), (5e5, 4096)),
];

impl ModelConfig {
    /// The shape of a known model (or `tiny`).
    pub fn shape(name: &str) -> Result<Self> {
        let known = KNOWN.iter().find(|shape| shape.name == name);
        let names = || Self::shapes().collect::<Vec<_>>().join(", ");
        known.map(Shape::config).ok_or_else(|| Error::config("shape", format!("{name:?} is unknown; use {}", names())))
    }

    /// The names [`shape`](Self::shape) knows.
    pub fn shapes() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|shape| shape.name)
    }
}

impl Shape {
    fn config(&self) -> ModelConfig {
        let [hidden, intermediate, num_layers, num_q_heads, num_kv_heads, head_dim] = self.sizes;
        ModelConfig {
            family: self.family,
            hidden,
            intermediate,
            num_layers,
            num_q_heads,
            num_kv_heads,
            head_dim,
            vocab_size: self.vocab_size,
            rms_norm_eps: if [LLAMA.name, MISTRAL.name].contains(&self.family.name) { 1e-5 } else { 1e-6 },
            activation: self.family.activation,
            rope: Rope::plain(self.rope_base, head_dim),
            local_rope: None,
            sm_scale: 1.0 / (head_dim as f32).sqrt(),
            attn_softcap: None,
            logit_softcap: None,
            max_position_embeddings: self.max_positions,
            context_limit: self.max_positions,
            windows: Vec::new(),
            tie_word_embeddings: self.tied,
            qkv_bias: self.family.qkv_bias,
            o_bias: false,
            mlp_bias: false,
            bos_id: Some(0),
            eos_ids: vec![1],
            dtype: DType::Bf16,
            quantization: None,
        }
    }
}

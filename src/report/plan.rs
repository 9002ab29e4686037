//! What a model needs in memory: computed, nothing is loaded.

use serde::Serialize;

use crate::backend::cpu;
use crate::config::EngineConfig;
use crate::engine::kv_layout;
use crate::error::Result;
use crate::model::family::ModelConfig;
use crate::model::workspace_bytes;
use crate::quant::{QuantOptions, check_dense};

/// Bytes by purpose.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryPlan {
    /// All tensors at the compute type's size, but for those that codes stand in for.
    pub weight_bytes: u64,
    /// Projections in codes: a second weight set, in place of the stored ones, or (all of them) as they are stored.
    pub code_bytes: u64,
    /// Activations of the largest pass.
    pub workspace_bytes: u64,
    /// The KV cache.
    pub kv_cache_bytes: u64,
    /// Its blocks.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// K and V of one token.
    pub kv_bytes_per_token: u64,
    /// K and V of one branch's own tokens.
    pub kv_bytes_per_branch: u64,
    /// Branches that fit beside one shared prefix.
    pub max_branches: usize,
}

impl MemoryPlan {
    /// Plans for branches of `own` tokens each that share `prefix` tokens.
    pub fn new(config: &EngineConfig, model: &ModelConfig, prefix: usize, own: usize) -> Result<Self> {
        config.validate()?;
        let layout = kv_layout(config, model, cpu::kv_budget())?;
        let block_bytes = layout.block_bytes(model.num_layers);
        // One more: the copy of the prefix's shared tail.
        let own_blocks = own.div_ceil(layout.block_size) + 1;
        let left = layout.num_blocks.saturating_sub(prefix.div_ceil(layout.block_size));
        let codes = |options: &Option<QuantOptions>| options.map_or((0, 0), |o| o.num_bytes(model));
        if config.quantise.or(config.river).is_some() {
            check_dense(model)?;
        }
        let (own_bytes, replaced) =
            model.quantization.map_or_else(|| codes(&config.quantise), |format| format.num_bytes(model));
        let (river_bytes, _) = codes(&config.river);
        Ok(Self {
            weight_bytes: (model.num_params() as u64 - replaced) * config.dtype.size_bytes() as u64,
            code_bytes: own_bytes + river_bytes,
            workspace_bytes: workspace_bytes(model, config.dtype, config.max_batch_tokens),
            kv_cache_bytes: layout.num_blocks as u64 * block_bytes,
            kv_blocks: layout.num_blocks,
            block_size: layout.block_size,
            kv_bytes_per_token: block_bytes / layout.block_size as u64,
            kv_bytes_per_branch: (own_blocks as u64).saturating_mul(block_bytes),
            max_branches: left / own_blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_a_7b_shape_is_arithmetic() {
        let config = EngineConfig { kv_cache_memory: Some(8 << 30), ..Default::default() };
        let model = ModelConfig::shape("qwen2.5-7b").unwrap();
        let plan = MemoryPlan::new(&config, &model, 1024, 512).unwrap();
        assert_eq!(plan.kv_bytes_per_token, 57_344);
        assert_eq!(plan.kv_blocks, (8usize << 30) / (57_344 * 16));
        assert_eq!(plan.max_branches, (plan.kv_blocks - 64) / 33);
        assert!(plan.weight_bytes > 15_000_000_000 && plan.weight_bytes < 15_500_000_000);
        assert_eq!(plan.code_bytes, 0);
    }

    /// In groups of 64 with fractional zeros a weight takes 4.5 bits.
    #[test]
    fn codes_come_on_top_or_instead() {
        let config = EngineConfig { kv_cache_memory: Some(8 << 30), ..Default::default() };
        let model = ModelConfig::shape("qwen2.5-7b").unwrap();
        let plan = |config: EngineConfig| MemoryPlan::new(&config, &model, 1024, 512).unwrap();
        let (plain, codes) = (plan(config.clone()), Some(QuantOptions::default()));
        let river = plan(EngineConfig { river: codes, ..config.clone() });
        let whole = plan(EngineConfig { quantise: codes, ..config });
        assert_eq!((river.weight_bytes, river.code_bytes), (plain.weight_bytes, whole.code_bytes));
        let replaced = (plain.weight_bytes - whole.weight_bytes) / 2;
        assert_eq!(whole.code_bytes * 16, replaced * 9);
    }
}

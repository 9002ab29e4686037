//! A config.json: the model it describes, for any context, and what that needs in memory.

use std::path::Path;

use rksc::EngineConfig;
use rksc::model::family::{GenerationConfig, ModelConfig, Rope};
use rksc::quant::QuantOptions;
use rksc::report::MemoryPlan;

/// See the module text.
pub fn config(data: &[u8]) {
    let path = Path::new("config.json");
    if let Ok(generation) = GenerationConfig::from_bytes(path, data, 1000) {
        assert!(generation.eos_ids.iter().all(|&id| id < 1000));
    }
    let Ok(model) = ModelConfig::from_bytes(path, data) else { return };
    check_sizes(&model);
    let limit = model.context_limit;
    assert!(model.clone().with_context(Some(0)).is_err());
    assert!(model.clone().with_context(limit.checked_add(1)).is_err() || limit == usize::MAX);
    for context in [None, Some(1), Some(limit.min(4097)), Some(limit)] {
        let model = model.clone().with_context(context).expect("within the limit");
        assert!(context.is_none_or(|n| n == model.max_position_embeddings));
        std::iter::once(&model.rope).chain(&model.local_rope).for_each(|rope| check_rope(rope, &model));
        check_plan(&model);
    }
}

/// Numbers that a pass divides and indexes by.
fn check_sizes(model: &ModelConfig) {
    assert!(model.num_q_heads.is_multiple_of(model.num_kv_heads) && model.head_dim.is_multiple_of(2));
    assert!([0, model.num_layers].contains(&model.windows.len()));
    assert!(model.max_position_embeddings >= 1 && model.max_position_embeddings <= model.context_limit);
    assert!(model.sm_scale.is_finite() && model.sm_scale > 0.0);
    assert!([model.attn_softcap, model.logit_softcap].iter().flatten().all(|&cap| cap.is_finite() && cap > 0.0));
    assert!(model.eos_ids.iter().chain(&model.bos_id).all(|&id| (id as usize) < model.vocab_size));
    assert!(model.num_params() > 0 && model.rms_norm_eps > 0.0);
}

/// Frequencies are numbers.
fn check_rope(rope: &Rope, model: &ModelConfig) {
    let frequencies = rope.inv_freq(model.max_position_embeddings);
    assert_eq!(frequencies.len(), rope.rotary_dim / 2);
    assert!(rope.rotary_dim <= model.head_dim && rope.scale().is_finite() && rope.scale() > 0.0, "{rope:?}");
    assert!(frequencies.iter().all(|x| x.is_finite() && *x >= 0.0), "{rope:?}: {frequencies:?}");
}

/// `rksc-run plan`: a number for everything, or an error.
fn check_plan(model: &ModelConfig) {
    let codes = Some(QuantOptions::default());
    let plain = EngineConfig { kv_cache_memory: Some(1 << 40), ..EngineConfig::default() };
    let whole = EngineConfig { quantise: codes, ..plain.clone() };
    let river = EngineConfig { river: codes, kv_cache_memory: None, ..plain.clone() };
    for config in [plain, whole, river] {
        let Ok(plan) = MemoryPlan::new(&config, model, 1000, 100) else { continue };
        assert!(plan.kv_blocks >= 2 && plan.kv_bytes_per_token > 0 && plan.workspace_bytes > 0);
        assert!(plan.max_branches < plan.kv_blocks && plan.kv_bytes_per_branch >= plan.kv_bytes_per_token);
    }
}

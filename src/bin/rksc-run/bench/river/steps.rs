//! Branches of forced length through an engine that does nothing else, step by step.

use std::time::Instant;

use clap::Args;
use rksc::Engine;
use rksc::config::{EngineConfig, ModelSource};
use rksc::engine::{BranchId, EngineStats, GenerateParams, PrefillOptions};
use rksc::testing::fill::Fill;

use super::super::kv_bytes;
use super::{Arm, Weights};
use crate::common::EngineArgs;

/// What runs where there is no text: a shape with random weights, greedy.
#[derive(Args, Clone)]
pub(super) struct RunArgs {
    /// Branches, each with a prompt of its own.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) batch: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(super) prompt_tokens: usize,
    /// Tokens that each branch generates.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(super) tokens: usize,
}

/// What came of a run, prompts aside.
#[derive(Clone, Debug, Default)]
pub(super) struct Run {
    /// Seconds of each step.
    pub(super) seconds: Vec<f64>,
    /// Layers of the backbone that each row of each step went through.
    pub(super) depths: Vec<Vec<u32>>,
    /// What each branch generated.
    pub(super) tokens: Vec<Vec<u32>>,
    pub(super) weight_bytes: u64,
    pub(super) stats: EngineStats,
}

impl RunArgs {
    /// Weights, and room for the branches of one engine unless the memory was given.
    pub(super) fn load(&self, engine: &EngineArgs, shape: &str) -> anyhow::Result<Weights> {
        anyhow::ensure!(self.batch >= 1, "--batch: must be at least 1");
        anyhow::ensure!(self.prompt_tokens >= 1, "--prompt-tokens: must be at least 1");
        anyhow::ensure!(self.tokens >= 2, "--tokens: must be at least 2");
        let source = match engine.source() {
            ModelSource::Bundled => ModelSource::Random { shape: shape.to_string(), seed: 0 },
            source => source,
        };
        let mut weights = Weights::load(engine.config_for(source))?;
        let EngineConfig { block_size, max_batch_tokens, .. } = weights.config;
        let (num_tokens, max) = (self.prompt_tokens + self.tokens, weights.model.max_position_embeddings);
        anyhow::ensure!(num_tokens <= max, "--tokens: {num_tokens} with the prompt exceed the model's {max}");
        let prompts = self.batch * self.prompt_tokens;
        anyhow::ensure!(prompts <= max_batch_tokens, "--batch: {prompts} prompt tokens do not fit one pass");
        let blocks = self.batch * (num_tokens.div_ceil(block_size) + 1);
        let bytes = kv_bytes(&weights.config, &weights.model, blocks);
        weights.config.kv_cache_memory = weights.config.kv_cache_memory.or(Some(bytes));
        Ok(weights)
    }
}

/// Runs the prompts, then lets the arm generate.
pub(super) fn run(engine: &mut Engine, args: &RunArgs, arm: &Arm) -> anyhow::Result<Run> {
    Arm::backbone().apply(engine)?;
    let ids = (0..args.batch as u64).map(|i| start(engine, args, i)).collect::<rksc::Result<Vec<_>>>()?;
    engine.step()?;
    engine.reset_counters();
    arm.apply(engine)?;
    let mut run = Run::default();
    while engine.has_work() {
        let started = Instant::now();
        let summary = engine.step()?;
        run.seconds.push(started.elapsed().as_secs_f64());
        anyhow::ensure!(summary.items.iter().all(|i| i.is_decode), "{}: a prompt ran among the timed steps", arm.name);
        run.depths.push(summary.items.iter().map(|i| i.backbone_layers).collect());
    }
    run.weight_bytes = engine.counters().weight_bytes;
    run.stats = engine.engine_stats();
    for id in ids {
        let generated = engine.tokens(id)?[args.prompt_tokens..].to_vec();
        anyhow::ensure!(generated.len() == args.tokens, "{}: a branch ended at {} tokens", arm.name, generated.len());
        run.tokens.push(generated);
        engine.prune(id)?;
    }
    while engine.next_event().is_some() {}
    Arm::backbone().apply(engine)?;
    Ok(run)
}

fn start(engine: &mut Engine, args: &RunArgs, idx: u64) -> rksc::Result<BranchId> {
    let vocab = engine.model().vocab_size;
    let mut fill = Fill::new(1 + idx.wrapping_mul(0x9e37));
    let prompt: Vec<u32> = (0..args.prompt_tokens).map(|_| fill.below(vocab) as u32).collect();
    let id = engine.prefill(&prompt, PrefillOptions { use_prefix_cache: false, path: idx, ..Default::default() })?;
    let params =
        GenerateParams { max_new_tokens: args.tokens, min_new_tokens: args.tokens, ..GenerateParams::default() };
    engine.start(id, params)?;
    Ok(id)
}

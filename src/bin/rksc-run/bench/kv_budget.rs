//! `rksc-run bench kv-budget`: what a KV budget costs in answers, and what it gives in memory and speed.

mod accuracy;
mod chains;
mod cost;
mod draw;
mod memory;
mod methods;
mod score;
mod throughput;

use clap::{Args, Subcommand};
use rksc::Engine;
use rksc::config::{EngineConfig, ModelSource};
use rksc::model::family::ModelConfig;

use super::kv_bytes;
use crate::common::{self, EngineArgs};

#[derive(Subcommand)]
pub(crate) enum Command {
    Accuracy(Box<accuracy::Args>),
    Throughput(Box<throughput::Args>),
    Memory(Box<memory::Args>),
    Cost(Box<cost::Args>),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Accuracy(args) => accuracy::run(args),
        Command::Throughput(args) => throughput::run(args),
        Command::Memory(args) => memory::run(args),
        Command::Cost(args) => cost::run(args),
    }
}

/// Flags of the commands that need no text: a shape with random weights.
#[derive(Args, Clone)]
struct ShapeArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Random weights of this shape, unless a model is given.
    #[arg(long, default_value = "qwen2.5-0.5b", value_name = "NAME", conflicts_with = "model")]
    shape: String,
    /// Tokens of each prompt; they are pinned.
    #[arg(long, default_value_t = 16, value_name = "N")]
    prompt_tokens: usize,
    /// 0 is greedy. With random weights that falls into loops, whose like keys make redundancy cheap to find; drawn tokens
    /// do not, but drawing them takes time of its own [default: 1 for `cost`, else 0].
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

impl ShapeArgs {
    fn config(&self) -> EngineConfig {
        let shape = || ModelSource::Random { shape: self.shape.clone(), seed: 0 };
        let source = self.engine.source();
        self.engine.config_for(if source == ModelSource::Bundled { shape() } else { source })
    }

    /// With `num_blocks` KV blocks, unless the memory was given.
    fn open(&self, num_blocks: usize, num_tokens: usize) -> anyhow::Result<Engine> {
        anyhow::ensure!(self.prompt_tokens >= 1, "--prompt-tokens: must be at least 1");
        let mut config = self.config();
        let model = match &config.model {
            ModelSource::Random { shape, .. } => ModelConfig::shape(shape)?,
            ModelSource::Dir(dir) => ModelConfig::from_dir(dir)?,
            ModelSource::Bundled => anyhow::bail!("--shape: needs a name"),
        };
        let max = model.max_position_embeddings;
        anyhow::ensure!(num_tokens <= max, "--max-new-tokens: {num_tokens} tokens exceed the model's {max}");
        config.kv_cache_memory = config.kv_cache_memory.or(Some(kv_bytes(&config, &model, num_blocks)));
        Ok(common::open(config)?)
    }
}

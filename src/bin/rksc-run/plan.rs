//! `rksc-run plan`: what a model needs in memory, before any of it is loaded.

use std::io::Write;

use clap::Args as ClapArgs;
use rksc::ModelSource;
use rksc::config::available_memory;
use rksc::model::family::ModelConfig;
use rksc::report::MemoryPlan;

use crate::common::{EngineArgs, JsonFlag, human_bytes, print_json};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// A named shape instead of a model: qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, llama-3-8b.
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Tokens shared by the branches of a problem.
    #[arg(long, default_value_t = 1024)]
    prefix: usize,
    /// Tokens of a branch's own.
    #[arg(long, default_value_t = 512)]
    own: usize,
    #[command(flatten)]
    format: JsonFlag,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let model = match (&args.shape, args.engine.source()) {
        (Some(shape), _) => ModelConfig::shape(shape)?,
        (None, ModelSource::Dir(dir)) => ModelConfig::from_dir(&dir)?,
        #[cfg(feature = "bundled-model")]
        (None, _) => rksc::bundled::config()?,
        #[cfg(not(feature = "bundled-model"))]
        (None, _) => anyhow::bail!("model: give a folder with -m DIR, or a --shape"),
    };
    let plan = MemoryPlan::new(&args.engine.config(), &model, args.prefix, args.own)?;
    if args.format.json {
        return print_json(&plan);
    }
    let mut out = std::io::stdout().lock();
    let mut row = |name: &str, bytes: u64, what: &str| writeln!(out, "{name:<22}{:>12}  {what}", human_bytes(bytes));
    row("weights", plan.weight_bytes, "mapped from the file, or random")?;
    row("workspace", plan.workspace_bytes, "activations of the largest pass; touched as used")?;
    row(
        "KV cache",
        plan.kv_cache_bytes,
        &format!("{} blocks of {} tokens; touched as used", plan.kv_blocks, plan.block_size),
    )?;
    row("  per token", plan.kv_bytes_per_token, "")?;
    row("  per branch", plan.kv_bytes_per_branch, &format!("{} tokens of its own", args.own))?;
    row("total", plan.weight_bytes + plan.workspace_bytes + plan.kv_cache_bytes, "")?;
    writeln!(out, "{:<22}{:>12}  sharing {} tokens", "branches that fit", plan.max_branches, args.prefix)?;
    writeln!(out, "to fix the cache at this size: --kv-cache-memory {}", plan.kv_cache_bytes)?;
    if let Some(free) = available_memory() {
        writeln!(out, "free memory now: {}", human_bytes(free))?;
    }
    Ok(())
}

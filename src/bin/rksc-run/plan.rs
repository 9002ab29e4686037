//! `rksc-run plan`: what a model needs in memory, before any of it is loaded.

use std::io::Write;

use clap::Args as ClapArgs;
use clap::builder::PossibleValuesParser;
use rksc::config::{EngineConfig, available_memory};
use rksc::kv::budget::KvLimit;
use rksc::model::family::ModelConfig;
use rksc::report::MemoryPlan;
use rksc::{ModelSource, Result};

use crate::common::{EngineArgs, JsonFlag, human_bytes, print_json, refused};
use crate::quant::{QuantArgs, Wanted};
use crate::river;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// A known model's shape instead of a folder.
    #[arg(long, conflicts_with = "model", value_parser = PossibleValuesParser::new(ModelConfig::shapes()))]
    shape: Option<String>,
    /// Tokens shared by the branches of a problem.
    #[arg(long, default_value_t = 1024)]
    prefix: usize,
    /// Tokens of a branch's own.
    #[arg(long, default_value_t = 512)]
    own: usize,
    /// Tokens whose KV a branch may keep of those, per layer and head.
    #[arg(long, value_name = "N")]
    kv_budget: Option<usize>,
    /// Tokens that may come on top until the next cut [default: as in solve].
    #[arg(long, value_name = "M")]
    kv_buffer: Option<usize>,
    /// With a second weight set in 4 bits, as in solve; when tokens leave makes no difference here.
    #[arg(long, default_value = "off", value_name = "EXIT", value_parser = river::exit)]
    river: river::Exit,
    /// The whole model in 4 bits.
    #[arg(long)]
    quantise: bool,
    #[command(flatten)]
    quant: QuantArgs,
    #[command(flatten)]
    format: JsonFlag,
}

impl Args {
    /// Slots of its own that a branch holds at most.
    fn most_held(&self, config: &EngineConfig) -> Result<usize> {
        match (self.kv_budget, self.kv_buffer) {
            (Some(budget), buffer) => {
                let limit = KvLimit { buffer, ..KvLimit::new(budget) }.for_prompt(0, config.block_size);
                limit.validate(config.kv_window)?;
                Ok(limit.budget + limit.buffer)
            }
            (None, Some(_)) => Err(refused("kv-buffer", "changes nothing without a budget; give --kv-budget N too")),
            (None, None) => Ok(usize::MAX),
        }
    }
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
    let mut config = args.engine.config();
    let model = model.with_context(config.max_context)?;
    args.quant.apply(&Wanted { river: args.river.is_on(), quantise: args.quantise }, &mut config)?;
    let held = args.own.min(args.most_held(&config)?);
    let plan = MemoryPlan::new(&config, &model, args.prefix, held)?;
    if args.format.json {
        return print_json(&plan);
    }
    let own = match args.kv_budget {
        Some(_) => format!("{} tokens of its own, of which it holds at most {held}", args.own),
        None => format!("{} tokens of its own", args.own),
    };
    let mut out = std::io::stdout().lock();
    let mut row = |name: &str, bytes: u64, what: &str| writeln!(out, "{name:<22}{:>12}  {what}", human_bytes(bytes));
    row("weights", plan.weight_bytes, "mapped from the file, or random")?;
    if let Some(format) = &model.quantization {
        row("projections in codes", plan.code_bytes, &format!("{format}, all of them"))?;
    } else if let Some(codes) = config.river.or(config.quantise) {
        row("weights in codes", plan.code_bytes, &format!("{codes}, mapped from their file, or made"))?;
    }
    row("workspace", plan.workspace_bytes, "activations of the largest pass; touched as used")?;
    row(
        "KV cache",
        plan.kv_cache_bytes,
        &format!("{} blocks of {} tokens; touched as used", plan.kv_blocks, plan.block_size),
    )?;
    row("  per token", plan.kv_bytes_per_token, "")?;
    row("  per branch", plan.kv_bytes_per_branch, &own)?;
    row("total", plan.weight_bytes + plan.code_bytes + plan.workspace_bytes + plan.kv_cache_bytes, "")?;
    writeln!(out, "{:<22}{:>12}  sharing {} tokens", "branches that fit", plan.max_branches, args.prefix)?;
    writeln!(out, "to fix the cache at this size: --kv-cache-memory {}", plan.kv_cache_bytes)?;
    if let Some(free) = available_memory() {
        writeln!(out, "free memory now: {}", human_bytes(free))?;
    }
    Ok(())
}

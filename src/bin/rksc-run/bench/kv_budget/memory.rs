//! What a chain holds under a budget, step by step, against the full cache.

use clap::Args as ClapArgs;

use super::super::{Table, cpu_model};
use super::ShapeArgs;
use super::chains::{self, Job};
use super::methods::Method;
use crate::common::print_json;

/// What one chain holds under a budget: slots per (layer, head) and blocks, against the full cache.
///
/// SAVED = 1 - held / full: at the peaks of both, and in the mean over all steps; once with the pinned prompt on both sides
/// and once without it. Blocks and cuts are checked after every step against the schedule.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Tokens that the chain generates.
    #[arg(long, default_value_t = 8192, value_name = "N")]
    max_new_tokens: usize,
    /// Slots kept at a cut, the prompt not counted.
    #[arg(long, default_value_t = 640, value_name = "N")]
    kv_budget: usize,
    /// Slots on top of it until the next cut.
    #[arg(long, default_value_t = 128, value_name = "N")]
    kv_buffer: usize,
    /// How to choose what stays.
    #[arg(long, default_value = "rkv", value_name = "NAME")]
    method: Method,
}

#[derive(serde::Serialize)]
struct Use {
    peak: usize,
    mean: f64,
}

impl Use {
    fn of(slots: impl Iterator<Item = usize> + Clone) -> Self {
        let n = slots.clone().count().max(1) as f64;
        Self { peak: slots.clone().max().unwrap_or(0), mean: slots.sum::<usize>() as f64 / n }
    }

    /// Saved by `self` where the other is the full cache: at the peaks, in the mean.
    fn saved(&self, full: &Self) -> [f64; 2] {
        [1.0 - self.peak as f64 / full.peak.max(1) as f64, 1.0 - self.mean / full.mean.max(1.0)]
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let prompt = args.shape.prompt_tokens;
    let num_tokens = prompt + args.max_new_tokens;
    let block_size = args.shape.config().block_size;
    let limit = args.method.limit(args.kv_budget, Some(args.kv_buffer), rksc::kv::budget::KvPrompt::Pin, 1);
    let budget = limit.for_prompt(prompt, block_size);
    let window = args.shape.config().kv_window;
    budget.validate(window)?;
    let most = budget.pinned + budget.kept(window) + budget.buffer;
    let mut engine = args.shape.open(most.min(num_tokens).div_ceil(block_size) + 2, num_tokens)?;
    let job = Job {
        prompt_tokens: prompt,
        new_tokens: args.max_new_tokens,
        temperature: args.shape.temperature.unwrap_or(0.0),
        limit: Some(limit),
        chains: 1,
        at_once: 1,
    };
    let mut done = 0;
    let outcome = chains::run(&mut engine, &job, &mut |_, step| {
        anyhow::ensure!(step.held <= most, "{} slots, and {most} are the most", step.held);
        done += 1;
        if done % 512 == 0 {
            eprintln!("{done} steps");
        }
        Ok(())
    })?;
    let decodes = || outcome.steps.iter().filter(|s| s.decodes == 1);
    let held = Use::of(decodes().map(|s| s.held));
    let full = Use::of(decodes().map(|s| s.full));
    let held_blocks = Use::of(decodes().map(|s| s.blocks));
    let full_blocks = Use::of(decodes().map(|s| s.full.div_ceil(block_size)));
    let chain = Use::of(decodes().map(|s| s.held - budget.pinned));
    let full_chain = Use::of(decodes().map(|s| s.full - budget.pinned));
    let rows =
        [("slots", &held, &full), ("of these not pinned", &chain, &full_chain), ("blocks", &held_blocks, &full_blocks)];
    let info = engine.info();
    if args.shape.json {
        let row = |(name, held, full): &(&str, &Use, &Use)| {
            let [peak, mean] = held.saved(full);
            serde_json::json!({
                "of": name, "held": held, "full": full, "saved_at_peak": peak, "saved_in_the_mean": mean,
            })
        };
        return print_json(&serde_json::json!({
            "bench": "kv-budget memory", "model": info.name, "dtype": info.dtype, "device": info.device,
            "cpu": cpu_model(), "method": args.method.name, "prompt_tokens": prompt,
            "max_new_tokens": args.max_new_tokens, "budget": args.kv_budget, "buffer": args.kv_buffer,
            "steps": outcome.steps.len(), "kv_cuts": outcome.kv_cuts, "blocks_peak": outcome.blocks_peak,
            "expected_peak": outcome.expected_peak, "rows": rows.iter().map(row).collect::<Vec<_>>(),
        }));
    }
    say!(
        "{}, {} | {prompt} prompt tokens, pinned | {} generated | {}, budget {}, buffer {}: {} cuts",
        info.name,
        info.dtype,
        args.max_new_tokens,
        args.method.name,
        args.kv_budget,
        args.kv_buffer,
        outcome.kv_cuts
    );
    let mut table = Table::new(&["", "peak", "full", "saved", "mean", "full", "saved"]);
    for (name, held, full) in rows {
        let [peak, mean] = held.saved(full).map(|x| format!("{:.1} %", x * 100.0));
        table.row(vec![
            name.to_string(),
            held.peak.to_string(),
            full.peak.to_string(),
            peak,
            format!("{:.1}", held.mean),
            format!("{:.1}", full.mean),
            mean,
        ]);
    }
    table.print()?;
    say!(
        "per layer and head, over {} decode steps; every step had the blocks and cuts of the schedule, none more than \
         budget + buffer = {} slots behind the prompt",
        outcome.steps.len() - 1,
        most - budget.pinned
    );
    Ok(())
}

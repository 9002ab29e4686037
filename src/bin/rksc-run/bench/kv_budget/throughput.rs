//! Tokens per second in a fixed memory: the full cache, and budgets whose freed blocks hold more chains.

use clap::Args as ClapArgs;
use rksc::Engine;

use super::super::{Table, cpu_model, median, spread};
use super::ShapeArgs;
use super::chains::{self, Job, Outcome};
use super::methods::{Method, share};
use crate::common::{human_bytes, print_json};

/// Tokens per second in memory for one full chain: the full cache, and budgets of which more chains fit.
///
/// Every arm is asked for --generations times as many chains as fit it, all at once, each of --max-new-tokens tokens whatever
/// it says; the full cache gets them as fast as they fit, so that no chain gives way. RATE: their tokens over the time from
/// the first to the last step. GAIN: over the full cache's rate in the same turn. FLOOR: what the batch alone can give,
/// chains that fit x step(full) / step(arm) over chains that fit the full cache; a step is the median over those in which
/// all that fit decode, and no prompt runs and nothing is cut. OF FLOOR is what cuts, prompts and the last chains leave
/// of it.
///
/// Blocks are checked after every step against what the schedule of the cuts says; the command fails where they differ.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Tokens that each chain generates.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    max_new_tokens: usize,
    /// Budgets, in % of --max-new-tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [10.0, 16.0, 34.0, 54.0], value_name = "P,..")]
    kv_budget_percent: Vec<f64>,
    /// Slots on top of a budget until the next cut.
    #[arg(long, default_value_t = 32, value_name = "N")]
    kv_buffer: usize,
    /// How to choose what stays.
    #[arg(long, default_value = "rkv", value_name = "NAME")]
    method: Method,
    /// Complete generations one after the other, at least 2.
    #[arg(long, default_value_t = 2, value_name = "N")]
    generations: usize,
    /// Turns; every arm has one in each, in an order that rotates.
    #[arg(long, default_value_t = 1, value_name = "N")]
    repeats: usize,
}

/// One arm before it runs.
struct Arm {
    percent: Option<f64>,
    job: Job,
    budget: usize,
    /// Slots and blocks that one of its chains holds at most.
    slots: usize,
    blocks: usize,
    fits: usize,
}

#[derive(serde::Serialize)]
struct Row {
    percent: Option<f64>,
    budget: Option<usize>,
    buffer: Option<usize>,
    slots_per_chain: usize,
    blocks_per_chain: usize,
    fits: usize,
    in_flight: usize,
    in_flight_mean: f64,
    chains: usize,
    /// Of each turn.
    tokens_per_s: Vec<f64>,
    step_ms: Vec<f64>,
    gain: Vec<f64>,
    floor: Vec<f64>,
    preemptions: u64,
    tokens_recomputed: u64,
    kv_cuts: u64,
    blocks_peak: usize,
    expected_peak: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.generations >= 2, "--generations: must be at least 2");
    anyhow::ensure!(args.repeats >= 1, "--repeats: must be at least 1");
    anyhow::ensure!(args.max_new_tokens >= 2, "--max-new-tokens: must be at least 2");
    let num_tokens = args.shape.prompt_tokens + args.max_new_tokens;
    let block_size = args.shape.config().block_size;
    // The engine keeps a block for the copy of a shared tail, whether there will be one or not.
    let mut engine = args.shape.open(num_tokens.div_ceil(block_size) + 1, num_tokens)?;
    let arms = arms(args, &engine)?;
    let mut outcomes: Vec<Vec<Outcome>> = arms.iter().map(|_| Vec::new()).collect();
    for turn in 0..args.repeats {
        for i in 0..arms.len() {
            let at = (i + turn) % arms.len();
            eprintln!("turn {}: {}, {} chains", turn + 1, arms[at].name(), arms[at].job.chains);
            outcomes[at].push(chains::run(&mut engine, &arms[at].job, &mut |_, _| Ok(()))?);
        }
    }
    let full = (&arms[0], outcomes[0].as_slice());
    let rows: Vec<Row> = arms.iter().zip(&outcomes).map(|(arm, of)| Row::new(arm, of, full)).collect();
    if args.shape.json { print_json(&json(args, &engine, &rows)) } else { print(args, &engine, &rows) }
}

/// The full cache first.
fn arms(args: &Args, engine: &Engine) -> anyhow::Result<Vec<Arm>> {
    let (block_size, window) = (engine.config().block_size, engine.config().kv_window);
    let num_blocks = engine.engine_stats().blocks;
    let prompt = args.shape.prompt_tokens;
    let job = Job {
        prompt_tokens: prompt,
        new_tokens: args.max_new_tokens,
        temperature: args.shape.temperature.unwrap_or(0.0),
        limit: None,
        chains: 0,
        at_once: 0,
    };
    let arm = |percent: Option<f64>| -> anyhow::Result<Arm> {
        // The last token is not computed.
        let full = prompt + args.max_new_tokens - 1;
        let (limit, budget, slots) = match percent {
            None => (None, 0, full),
            Some(percent) => {
                let budget = share(percent, args.max_new_tokens as f64);
                let limit = args.method.limit(budget, Some(args.kv_buffer), rksc::kv::budget::KvPrompt::Pin, 1);
                let b = limit.for_prompt(prompt, block_size);
                b.validate(window)?;
                (Some(limit), budget, full.min(b.pinned + b.kept(window) + b.buffer))
            }
        };
        let blocks = slots.div_ceil(block_size);
        let fits = num_blocks / blocks;
        anyhow::ensure!(fits >= 1, "--kv-cache-memory: {num_blocks} blocks, and one chain needs {blocks}");
        let chains = fits * args.generations;
        // Whom a budget limits the scheduler lets in as they fit; chains without one it lets in as they come.
        let at_once = if limit.is_some() { chains } else { fits };
        Ok(Arm { percent, job: Job { limit, chains, at_once, ..job }, budget, slots, blocks, fits })
    };
    let percents = args.kv_budget_percent.iter().map(|&p| Some(p));
    std::iter::once(None).chain(percents).map(arm).collect()
}

impl Arm {
    fn name(&self) -> String {
        name(self.percent, self.budget)
    }
}

fn name(percent: Option<f64>, budget: usize) -> String {
    percent.map_or("full cache".into(), |p| format!("{p} % = {budget}"))
}

impl Row {
    fn new(arm: &Arm, outcomes: &[Outcome], (full, fulls): (&Arm, &[Outcome])) -> Self {
        let rate = |o: &Outcome| o.tokens as f64 / o.seconds;
        // Chains of a full generation advance together: that is where the batch is what fits.
        let step = |arm: &Arm, o: &Outcome| median(&o.plain(arm.fits)) * 1e3;
        let pairs = || outcomes.iter().zip(fulls);
        let of_batch = |arm: &Arm, o: &Outcome| arm.fits as f64 / step(arm, o);
        let most = |f: fn(&Outcome) -> u64| outcomes.iter().map(f).max().unwrap_or(0);
        Self {
            percent: arm.percent,
            budget: arm.percent.map(|_| arm.budget),
            buffer: arm.job.limit.and_then(|l| l.buffer),
            slots_per_chain: arm.slots,
            blocks_per_chain: arm.blocks,
            fits: arm.fits,
            in_flight: outcomes.iter().map(|o| o.in_flight().0).max().unwrap_or(0),
            in_flight_mean: outcomes.iter().map(|o| o.in_flight().1).sum::<f64>() / outcomes.len().max(1) as f64,
            chains: arm.job.chains,
            tokens_per_s: outcomes.iter().map(rate).collect(),
            step_ms: outcomes.iter().map(|o| step(arm, o)).collect(),
            gain: pairs().map(|(o, f)| rate(o) / rate(f)).collect(),
            floor: pairs().map(|(o, f)| of_batch(arm, o) / of_batch(full, f)).collect(),
            preemptions: most(|o| o.preemptions),
            tokens_recomputed: most(|o| o.tokens_recomputed),
            kv_cuts: most(|o| o.kv_cuts),
            blocks_peak: most(|o| o.blocks_peak as u64) as usize,
            expected_peak: most(|o| o.expected_peak as u64) as usize,
        }
    }
}

fn json(args: &Args, engine: &Engine, rows: &[Row]) -> serde_json::Value {
    let info = engine.info();
    serde_json::json!({
        "bench": "kv-budget throughput", "model": info.name, "dtype": info.dtype, "device": info.device,
        "cpu": cpu_model(),
        "config": {
            "prompt_tokens": args.shape.prompt_tokens, "max_new_tokens": args.max_new_tokens,
            "temperature": args.shape.temperature.unwrap_or(0.0), "kv_buffer": args.kv_buffer, "method": args.method.name,
            "generations": args.generations, "repeats": args.repeats,
        },
        "kv_cache_bytes": info.kv_cache_bytes, "blocks": engine.engine_stats().blocks, "arms": rows,
    })
}

fn print(args: &Args, engine: &Engine, rows: &[Row]) -> anyhow::Result<()> {
    let info = engine.info();
    let blocks = engine.engine_stats().blocks;
    say!(
        "{}, {} | {} prompt tokens, {} generated | {} = {blocks} blocks for KV, one chain's whole cache takes {}",
        info.name,
        info.dtype,
        args.shape.prompt_tokens,
        args.max_new_tokens,
        human_bytes(info.kv_cache_bytes),
        rows[0].blocks_per_chain,
    );
    let mut table = Table::new(&[
        "budget",
        "slots",
        "blocks",
        "fit",
        "in flight",
        "chains",
        "tokens/s",
        "gain",
        "floor",
        "of floor",
        "step ms",
        "cuts",
        "gave way",
        "computed again",
        "peak blocks",
        "expected",
    ]);
    for r in rows {
        let of_floor: Vec<f64> = r.gain.iter().zip(&r.floor).map(|(g, f)| g / f * 100.0).collect();
        table.row(vec![
            name(r.percent, r.budget.unwrap_or(0)),
            r.slots_per_chain.to_string(),
            r.blocks_per_chain.to_string(),
            r.fits.to_string(),
            format!("{} ({:.1})", r.in_flight, r.in_flight_mean),
            r.chains.to_string(),
            spread(&r.tokens_per_s, 1),
            spread(&r.gain, 2),
            spread(&r.floor, 2),
            format!("{} %", spread(&of_floor, 0)),
            spread(&r.step_ms, 2),
            r.kv_cuts.to_string(),
            r.preemptions.to_string(),
            r.tokens_recomputed.to_string(),
            r.blocks_peak.to_string(),
            r.expected_peak.to_string(),
        ]);
    }
    table.print()?;
    say!(
        "{}, buffer {}; the full cache at its best: {} in flight, as many as fit; in flight: the most (the mean over \
         all steps)",
        args.method.name,
        args.kv_buffer,
        rows[0].fits
    );
    if args.repeats > 1 {
        say!("medians of {} turns (least to most); gains and floors are paired within a turn", args.repeats);
    }
    Ok(())
}

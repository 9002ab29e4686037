//! What cuts cost: steps that begin with one against the steps around them.

use clap::Args as ClapArgs;

use super::super::median;
use super::super::{Table, cpu_model};
use super::ShapeArgs;
use super::chains::{self, Job, Step};
use super::methods::Method;
use crate::common::{human_bytes, print_json};

/// The share of decode time that cuts take: scores, selection, compaction.
///
/// A step that begins with a cut is compared with the median of the plain steps among the 16 around it; EXCESS is the median
/// over these pairs. SHARE: excess x cuts over the time of all steps from the first cut on. `streaming` scores nothing: its
/// excess is selection and compaction alone. The memory is the process's high-water mark from just before the first cut to
/// the end, beside what one n x n matrix of f32 would take.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Tokens that each chain generates.
    #[arg(long, default_value_t = 3072, value_name = "N")]
    max_new_tokens: usize,
    /// Slots kept at a cut, the prompt not counted.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    kv_budget: usize,
    /// Slots on top of it until the next cut.
    #[arg(long, default_value_t = 128, value_name = "N")]
    kv_buffer: usize,
    /// How to choose what stays, one arm each.
    #[arg(long, value_delimiter = ',', default_value = "rkv,streaming", value_name = "NAME,..")]
    methods: Vec<Method>,
    /// Chains that decode together.
    #[arg(short = 'B', long, default_value_t = 1, value_name = "N")]
    branches: usize,
}

/// Share of the decode time that cuts may take.
const LIMIT: f64 = 0.05;
/// Temperature where none is given: at it no two keys are alike by repetition.
const DRAWN: f32 = 1.0;
/// Steps before and behind a cut that it is compared with.
const AROUND: usize = 8;

#[derive(serde::Serialize)]
struct Row {
    method: String,
    cuts: u64,
    /// Steps that a cut was compared in.
    pairs: usize,
    step_ms: f64,
    excess_ms: f64,
    excess_p10_ms: f64,
    excess_p90_ms: f64,
    /// Of the steps from the first cut on; and of all steps.
    share: f64,
    share_of_all: f64,
    /// Bytes that the process grew by from the first cut on; `None` where the system does not tell.
    memory_growth: Option<u64>,
    /// Bytes of one head's n x n matrix, and of all layers and heads together.
    square: u64,
    squares: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!((1..=1024).contains(&args.branches), "-B: must be between 1 and 1024");
    let prompt = args.shape.prompt_tokens;
    let num_tokens = prompt + args.max_new_tokens;
    let block_size = args.shape.config().block_size;
    let per_chain = (prompt + args.kv_budget + args.kv_buffer + 64).div_ceil(block_size) + 1;
    let mut engine = args.shape.open(args.branches * per_chain + 1, num_tokens)?;
    let mut rows = Vec::new();
    for method in &args.methods {
        eprintln!("{}", method.name);
        let limit = method.limit(args.kv_budget, Some(args.kv_buffer), rksc::kv::budget::KvPrompt::Pin, 1);
        limit.for_prompt(prompt, block_size).validate(engine.config().kv_window)?;
        let job = Job {
            prompt_tokens: prompt,
            new_tokens: args.max_new_tokens,
            temperature: args.shape.temperature.unwrap_or(DRAWN),
            limit: Some(limit),
            chains: args.branches,
            at_once: args.branches,
        };
        // The first cut comes when the budget is full at the earliest: what the process holds by then is no cut's.
        let mut before = None;
        let outcome = chains::run(&mut engine, &job, &mut |_, step| {
            if before.is_none() && step.held >= args.branches * (prompt + args.kv_budget) {
                before = reset_high_water().and_then(|()| status_bytes("VmRSS:"));
            }
            Ok(())
        })?;
        let grown = before.zip(status_bytes("VmHWM:")).map(|(before, after)| after.saturating_sub(before));
        let n = (args.kv_budget + args.kv_buffer) as u64;
        let heads = (engine.model().num_layers * engine.model().num_kv_heads) as u64;
        rows.push(Row::new(&method.name, &outcome.steps, grown, (4 * n * n, heads))?);
    }
    let info = engine.info();
    if args.shape.json {
        return print_json(&serde_json::json!({
            "bench": "kv-budget cost", "model": info.name, "dtype": info.dtype, "device": info.device,
            "cpu": cpu_model(), "prompt_tokens": prompt, "max_new_tokens": args.max_new_tokens,
            "budget": args.kv_budget, "buffer": args.kv_buffer, "branches": args.branches,
            "temperature": args.shape.temperature.unwrap_or(DRAWN), "limit": LIMIT, "arms": rows,
        }));
    }
    say!(
        "{}, {} | budget {}, buffer {} | {} in a batch, {} tokens each",
        info.name,
        info.dtype,
        args.kv_budget,
        args.kv_buffer,
        args.branches,
        args.max_new_tokens
    );
    let mut table = Table::new(&[
        "method",
        "cuts",
        "step ms",
        "excess ms (p10 to p90)",
        "share",
        "limit",
        "",
        "of the whole run",
        "memory grew",
        "one n x n",
        "all heads' n x n",
    ]);
    for r in &rows {
        table.row(vec![
            r.method.clone(),
            r.cuts.to_string(),
            format!("{:.2}", r.step_ms),
            format!("{:.2} ({:.2} to {:.2})", r.excess_ms, r.excess_p10_ms, r.excess_p90_ms),
            format!("{:.2} %", r.share * 100.0),
            format!("{:.0} %", LIMIT * 100.0),
            if r.share <= LIMIT { "held".into() } else { "not held".into() },
            format!("{:.2} %", r.share_of_all * 100.0),
            r.memory_growth.map_or("unknown".into(), human_bytes),
            human_bytes(r.square),
            human_bytes(r.squares),
        ]);
    }
    table.print()?;
    say!("step: median without a cut; n = budget + buffer; memory: from just before the first cut to the end");
    Ok(())
}

impl Row {
    fn new(
        method: &str,
        steps: &[Step],
        memory_growth: Option<u64>,
        (square, heads): (u64, u64),
    ) -> anyhow::Result<Self> {
        let first = steps.iter().position(|s| s.cuts > 0);
        let first = first.ok_or_else(|| anyhow::anyhow!("--max-new-tokens: nothing was cut; take more"))?;
        let behind = &steps[first..];
        let excess: Vec<(f64, u64)> = pairs(behind);
        anyhow::ensure!(!excess.is_empty(), "--kv-buffer: no step without a cut to compare with");
        // Where several chains are cut before one step, each has its part of the excess.
        let each: Vec<f64> = excess.iter().map(|(ms, cuts)| ms / *cuts as f64).collect();
        let cuts: u64 = behind.iter().map(|s| s.cuts).sum();
        let of = rksc::report::LatencyMs::of(&each);
        let total = |steps: &[Step]| steps.iter().map(|s| s.seconds * 1e3).sum::<f64>();
        Ok(Self {
            method: method.to_string(),
            cuts,
            pairs: each.len(),
            step_ms: median(&behind.iter().filter(|s| s.is_plain()).map(|s| s.seconds * 1e3).collect::<Vec<_>>()),
            excess_ms: of.p50,
            excess_p10_ms: of.p10,
            excess_p90_ms: of.p90,
            share: of.p50 * cuts as f64 / total(behind),
            share_of_all: of.p50 * cuts as f64 / total(steps),
            memory_growth,
            square,
            squares: square * heads,
        })
    }
}

/// Milliseconds by which steps with cuts exceed those around them, and their cuts.
fn pairs(steps: &[Step]) -> Vec<(f64, u64)> {
    let pair = |(i, step): (usize, &Step)| {
        let around = &steps[i.saturating_sub(AROUND)..(i + AROUND + 1).min(steps.len())];
        let plain: Vec<f64> =
            around.iter().filter(|s| s.is_plain() && s.decodes == step.decodes).map(|s| s.seconds).collect();
        let is_pair = step.cuts > 0 && step.prefills == 0 && !plain.is_empty();
        is_pair.then(|| ((step.seconds - median(&plain)) * 1e3, step.cuts))
    };
    steps.iter().enumerate().filter_map(pair).collect()
}

/// Forgets the process's largest size so far. `None` where the system cannot.
fn reset_high_water() -> Option<()> {
    std::fs::write("/proc/self/clear_refs", "5").ok()
}

/// A line of the process's status, in bytes.
fn status_bytes(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(ms: f64, cuts: u64) -> Step {
        Step { seconds: ms / 1e3, decodes: 2, prefills: 0, cuts, held: 0, full: 0, blocks: 0 }
    }

    #[test]
    fn a_cut_is_charged_what_it_takes_beyond_the_steps_around_it() {
        // Steps of 10 ms, a cut of 4 ms before every tenth; from the first cut on 31 steps with 4 of them (one double).
        let mut steps: Vec<Step> = (0..36).map(|i| if i % 10 == 5 { step(14.0, 1) } else { step(10.0, 0) }).collect();
        steps[25] = step(18.0, 2);
        let row = Row::new("rkv", &steps, None, (100, 4)).unwrap();
        assert_eq!((row.cuts, row.pairs, row.squares), (5, 4, 400));
        assert!((row.excess_ms - 4.0).abs() < 1e-9 && (row.step_ms - 10.0).abs() < 1e-9, "{}", row.excess_ms);
        assert!((row.share - 20.0 / 330.0).abs() < 1e-9, "{}", row.share);
        assert!((row.share_of_all - 20.0 / 380.0).abs() < 1e-9);
        assert!(Row::new("rkv", &steps[..5], None, (100, 4)).is_err());
    }
}

//! Drafts: how many proposed tokens stand, and what they save. The tokens must be the backbone's.

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::engine::{EndReason, EngineStats};
use rksc::gate::river::RiverExit;
use rksc::report::{BranchResult, ProblemResult};

use super::super::paired::Paired;
use super::super::{Table, cpu_model};
use super::chains::{self, ChainArgs};
use super::rates::{self, Rates};
use super::score::acceptance;
use super::steps::{self, Run, RunArgs};
use super::{Arm, in_turn};
use crate::common::print_json;

/// Drafts of N tokens against the backbone: the model in codes proposes, the backbone keeps what it would have chosen.
///
/// On greedy chains of problems; with --shape, on random weights (the flags of problems then mean nothing, and --batch,
/// --prompt-tokens and --tokens say what runs). The command fails where a chain differs from the backbone's.
///
/// ACCEPTED: the share of proposed tokens that stood. TOKENS A PASS: of the backbone. TOKENS/S: arms in turns, prompts included;
/// SPEED-UP: paired within a turn.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    chains: ChainArgs,
    /// Tokens proposed at a time, one arm each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 7], value_name = "N,..")]
    draft: Vec<usize>,
    /// Random weights of this shape.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
    #[command(flatten)]
    run: RunArgs,
}

/// One arm.
#[derive(serde::Serialize)]
struct Row {
    arm: String,
    chains: usize,
    proposed: u64,
    acceptance: Option<f64>,
    tokens_per_pass: f64,
    #[serde(flatten)]
    rates: Rates,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let exits = args.draft.iter().map(|&n| RiverExit::Draft(n));
    let arms: Vec<Arm> = std::iter::once(Arm::backbone()).chain(exits.map(Arm::exit)).collect();
    arms.iter().filter_map(|a| a.river).try_for_each(|river| river.validate())?;
    let (engine, rows) = match &args.shape {
        Some(shape) => on_shape(args, shape, &arms)?,
        None => on_problems(args, &arms)?,
    };
    if args.chains.json { print_json(&json(args, &engine, &rows)) } else { print(args, &engine, &rows) }
}

fn on_problems(args: &Args, arms: &[Arm]) -> anyhow::Result<(Engine, Vec<Row>)> {
    let weights = args.chains.load()?;
    let engine = weights.with_river(&weights.codes(args.chains.quant.options())?)?;
    let (tasks, config) = (args.chains.tasks(&engine)?, args.chains.config());
    let mut engines = [engine];
    let (mut backbone, mut stats) = (Vec::new(), Vec::new());
    for arm in arms {
        let (results, counted) = chains::solve(&mut engines[0], &tasks, &config, arm)?;
        if backbone.is_empty() {
            backbone = results;
        } else {
            same(&arm.name, Paired::new(&results, &backbone).same_tokens, tasks.len())?;
        }
        stats.push(counted);
    }
    let timed = &tasks[..args.chains.speed_problems.min(tasks.len())];
    let rates = rates::measure(&mut engines, arms, timed, &config, args.chains.repeats)?;
    let of = (tasks.len(), num_decoded(&backbone));
    let rows =
        arms.iter().zip(&stats).zip(rates).map(|((arm, stats), rates)| Row::new(arm, of, stats, rates)).collect();
    let [engine] = engines;
    Ok((engine, rows))
}

fn on_shape(args: &Args, shape: &str, arms: &[Arm]) -> anyhow::Result<(Engine, Vec<Row>)> {
    anyhow::ensure!(args.chains.repeats >= 1, "--repeats: must be at least 1");
    let weights = args.run.load(&args.chains.engine, shape)?;
    let mut engine = weights.with_river(&weights.codes(args.chains.quant.options())?)?;
    drop(weights);
    let mut runs: Vec<Vec<Run>> = arms.iter().map(|_| Vec::new()).collect();
    for turn in 0..args.chains.repeats {
        for at in in_turn(arms.len(), turn) {
            eprintln!("turn {}: {}", turn + 1, arms[at].name);
            runs[at].push(steps::run(&mut engine, &args.run, &arms[at])?);
        }
    }
    let (backbone, batch) = (&runs[0], args.run.batch);
    // The first token of each branch came with its prompt.
    let decoded = batch * (args.run.tokens - 1);
    let rate = |run: &Run| decoded as f64 / run.seconds.iter().sum::<f64>();
    let row = |(arm, runs): (&Arm, &Vec<Run>)| {
        let equal = |(a, b): (&Run, &Run)| a.tokens.iter().zip(&b.tokens).filter(|(a, b)| a == b).count();
        let equal = runs.iter().zip(backbone).map(equal).min().unwrap_or(0);
        same(&arm.name, equal, batch)?;
        let rates = Rates {
            tokens_per_s: runs.iter().map(rate).collect(),
            speed_up: runs.iter().zip(backbone).map(|(a, b)| rate(a) / rate(b)).collect(),
        };
        Ok(Row::new(arm, (batch, decoded as u64), &runs[0].stats, rates))
    };
    let rows = arms.iter().zip(&runs).map(row).collect::<anyhow::Result<_>>()?;
    Ok((engine, rows))
}

fn same(arm: &str, same: usize, all: usize) -> anyhow::Result<()> {
    anyhow::ensure!(same == all, "{arm}: {} of {all} chains are not the backbone's", all - same);
    Ok(())
}

/// Tokens that came of decode passes: all but the first, the one that ended the chain included.
fn num_decoded(results: &[ProblemResult]) -> u64 {
    let branches = results.iter().flat_map(|r| &r.branches);
    let decoded = |b: &BranchResult| b.tokens.len() + usize::from(b.ended == Some(EndReason::EndToken)) - 1;
    branches.filter(|b| !b.tokens.is_empty()).map(decoded).sum::<usize>() as u64
}

impl Row {
    fn new(arm: &Arm, (chains, decoded): (usize, u64), stats: &EngineStats, rates: Rates) -> Self {
        // Each pass yields the proposals that it keeps, and a token more.
        let passes = decoded.saturating_sub(stats.drafts_kept);
        Self {
            arm: arm.name.clone(),
            chains,
            proposed: stats.tokens_drafted,
            acceptance: acceptance(stats),
            tokens_per_pass: decoded as f64 / passes.max(1) as f64,
            rates,
        }
    }
}

fn json(args: &Args, engine: &Engine, rows: &[Row]) -> serde_json::Value {
    let info = engine.info();
    let run = args.shape.as_ref().map(|_| {
        serde_json::json!({
            "batch": args.run.batch, "prompt_tokens": args.run.prompt_tokens, "tokens": args.run.tokens,
        })
    });
    serde_json::json!({
        "bench": "river draft", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "config": {
            "files": args.chains.problems.files, "limit": args.chains.problems.limit,
            "max_new_tokens": args.chains.max_new_tokens, "speed_problems": args.chains.speed_problems,
            "codes": args.chains.quant.options().to_string(), "repeats": args.chains.repeats, "run": run,
        },
        "arms": rows,
    })
}

fn print(args: &Args, engine: &Engine, rows: &[Row]) -> anyhow::Result<()> {
    say!("{}, {} | codes {}", engine.info().name, engine.info().dtype, args.chains.quant.options());
    let mut table = Table::new(&["arm", "proposed", "accepted", "tokens a pass", "tokens/s", "speed-up"]);
    for r in rows {
        let mut cells = vec![
            r.arm.clone(),
            r.proposed.to_string(),
            r.acceptance.map_or("-".into(), |a| format!("{:.1} %", a * 100.0)),
            format!("{:.2}", r.tokens_per_pass),
        ];
        cells.extend(r.rates.cells());
        table.row(cells);
    }
    table.print()?;
    say!(
        "{} chains, each with the backbone's tokens; tokens/s: medians of {} turns (least to most)",
        rows[0].chains,
        args.chains.repeats
    );
    Ok(())
}

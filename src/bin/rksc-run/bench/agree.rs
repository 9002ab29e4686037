//! `rksc-run bench agree`: the same problems on two devices, token by token.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::engine::PrefillOptions;
use rksc::gate::step::DecodeExit;
use rksc::gate::verify::SkipRule;
use rksc::report::ProblemResult;
use rksc::solver::task::Task;
use rksc::solver::{Policy, Solver, SolverConfig};

use crate::common::{self, EngineArgs, print_json};
use crate::solve::{compile_pack, text_tasks};

/// Where the CPU's two most likely tokens are nearer than this, another order of additions may choose the other.
const CLOSE: f32 = 0.05;

/// Whether a device generates the tokens that the CPU generates: greedy, every branch to its end, every branch verified.
///
/// Branches whose tokens differ are compared where they first do: below a margin of 0.05 between the CPU's two largest
/// logits it is a close call, which is counted; above, it is an error.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Only the first N of the bundled problems.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// One JSON object on stdout instead of a line.
    #[arg(long)]
    json: bool,
    /// One JSON line a problem.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(serde::Serialize)]
struct Agreement {
    bench: &'static str,
    id: String,
    branches: usize,
    same: usize,
    close_calls: usize,
    different: usize,
    /// The largest margin at which a branch took another token.
    worst_margin: f32,
    same_answer: bool,
    /// Between the verifier's scores of branches with the same tokens.
    largest_score_difference: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut config = SolverConfig::preset(Policy::Exact);
    config.num_branches = args.branches;
    config.skip = SkipRule::Never;
    config.decode_exit = DecodeExit::Off;
    config.validate()?;
    let source = args.engine.source();
    let mut problems = source.sample_problems()?;
    problems.truncate(args.limit.unwrap_or(usize::MAX));
    let mut device = args.engine.open()?;
    let mut cpu_config = args.engine.config();
    cpu_config.device = "cpu".into();
    let mut cpu = common::open(cpu_config)?;
    let pack = compile_pack(&args.engine, &cpu, source.prompt_pack(None)?, "")?;
    let tasks = text_tasks(&pack, &problems)?;
    let mut out = args.out.as_deref().map(|p| File::create(p).with_context(|| p.display().to_string())).transpose()?;
    let mut all = Vec::with_capacity(tasks.len());
    for task in tasks.chunks(1) {
        let (want, got) = (solve(&mut cpu, &config, task)?, solve(&mut device, &config, task)?);
        let agreement = compare(&mut cpu, task[0].as_ref(), &want, &got)?;
        if let Some(out) = &mut out {
            writeln!(out, "{}", serde_json::to_string(&agreement)?)?;
        }
        all.push(agreement);
    }
    let sum = |part: fn(&Agreement) -> usize| all.iter().map(part).sum::<usize>();
    let (branches, close, different) = (sum(|a| a.branches), sum(|a| a.close_calls), sum(|a| a.different));
    if args.json {
        print_json(&serde_json::json!({
            "bench": "agree", "device": device.info().device, "cpu": cpu.info().device, "branches": branches,
            "same": sum(|a| a.same), "close_calls": close, "different": different, "problems": all,
        }))?;
    } else {
        say!(
            "{} of {branches} branches have the CPU's tokens, {close} more differ at a margin below {CLOSE}",
            sum(|a| a.same)
        );
    }
    anyhow::ensure!(different == 0, "{different} of {branches} branches differ from the CPU");
    Ok(())
}

/// One problem.
fn solve(engine: &mut Engine, config: &SolverConfig, task: &[Box<dyn Task>]) -> rksc::Result<ProblemResult> {
    let mut found = None;
    let mut take = |_, result| {
        found = Some(result);
        Ok(())
    };
    Solver::new(engine, config.clone())?.solve(task, &mut take)?;
    found.ok_or_else(|| rksc::Error::Internal("a problem without a result".into()))
}

fn compare(cpu: &mut Engine, task: &dyn Task, want: &ProblemResult, got: &ProblemResult) -> rksc::Result<Agreement> {
    let mut a = Agreement {
        bench: "agree",
        id: want.id.clone(),
        branches: want.branches.len(),
        same: 0,
        close_calls: 0,
        different: 0,
        worst_margin: 0.0,
        same_answer: want.answer == got.answer,
        largest_score_difference: 0.0,
    };
    for (i, (want, got)) in want.branches.iter().zip(&got.branches).enumerate() {
        if want.tokens == got.tokens {
            a.same += 1;
            if let (Some(want), Some(got)) = (want.score, got.score) {
                a.largest_score_difference = a.largest_score_difference.max((want - got).abs());
            }
            continue;
        }
        let common = want.tokens.iter().zip(&got.tokens).take_while(|(w, g)| w == g).count();
        let margin = margin(cpu, &[task.root(), task.branch(i)?, &want.tokens[..common]].concat())?;
        a.worst_margin = a.worst_margin.max(margin);
        *if margin < CLOSE { &mut a.close_calls } else { &mut a.different } += 1;
    }
    Ok(a)
}

/// Between the two largest logits behind `tokens`.
fn margin(cpu: &mut Engine, tokens: &[u32]) -> rksc::Result<f32> {
    let branch = cpu.prefill(tokens, PrefillOptions { use_prefix_cache: false, ..Default::default() })?;
    while cpu.has_work() {
        cpu.step()?;
    }
    while cpu.next_event().is_some() {}
    let margin = cpu.row(branch)?.map_or(f32::INFINITY, |row| row.stats.margin);
    cpu.prune(branch)?;
    Ok(margin)
}

//! `rksc-run bench trial`: what trial answers save, and which answers they change.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::gate::step::{DecodeExit, TrialRule};
use rksc::report::{ProblemResult, wilson};
use rksc::solver::{Policy, Solver, SolverConfig, VerifyMode};

use super::{Table, arms, cpu_model};
use crate::common::{EngineArgs, SamplingArgs, print_json, progress, read_text};
use crate::solve::{approaches, compile_pack, text_tasks};

/// The decode exits `off`, `decided`, and `trial` at several confidences, on the same problems.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Problem file [default: the bundled problems].
    #[arg(long, value_name = "FILE")]
    problems: Option<PathBuf>,
    /// Only the first N problems.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// One approach a line, instead of the pack's.
    #[arg(long, value_name = "FILE")]
    approaches: Option<PathBuf>,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Tokens a branch may generate.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Problems in flight; changes nothing but the time it takes.
    #[arg(long, default_value_t = 8)]
    concurrency: usize,
    /// Confidences of the trial exit.
    #[arg(long, value_delimiter = ',', default_values_t = [0.9, 0.99, 0.999, 0.9999], value_name = "P,P,..")]
    confidences: Vec<f64>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

/// One exit, compared with `decided`.
#[derive(serde::Serialize)]
struct Row {
    exit: DecodeExit,
    confidence: Option<f64>,
    accuracy: f64,
    interval: [f64; 2],
    /// Decoded tokens, trials included; mean per problem.
    decode: f64,
    trial_tokens: f64,
    trials: f64,
    stood: f64,
    /// Answers other than `decided`'s, and of these: right before, right now.
    changed: usize,
    right_to_wrong: usize,
    wrong_to_right: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = args.engine.source();
    let mut problems = arms::read(&args.engine, args.problems.as_slice(), args.limit)?;
    problems.retain(|p| p.answer.is_some());
    anyhow::ensure!(!problems.is_empty(), "--problems: none has an answer to compare with");
    let exits = [(DecodeExit::Off, None), (DecodeExit::Decided, None)].into_iter();
    let exits: Vec<_> = exits.chain(args.confidences.iter().map(|&p| (DecodeExit::Trial, Some(p)))).collect();
    let config = |(exit, confidence): (DecodeExit, Option<f64>)| -> rksc::Result<SolverConfig> {
        let rule = TrialRule::default();
        let config = SolverConfig {
            num_branches: args.branches,
            max_new_tokens: args.max_new_tokens,
            decode_exit: exit,
            trial_rule: TrialRule { confidence: confidence.unwrap_or(rule.confidence), ..rule },
            verify: VerifyMode::Off,
            sampling: args.sampling.params()?,
            concurrency: args.concurrency,
            ..SolverConfig::preset(Policy::Exact)
        };
        config.validate()?;
        Ok(config)
    };
    let configs = exits.iter().map(|&e| config(e)).collect::<rksc::Result<Vec<_>>>()?;
    let mut engine = args.engine.open()?;
    let mut pack = source.prompt_pack(None)?;
    if let Some(path) = &args.approaches {
        pack.approaches = approaches(&read_text(path)?);
    }
    let tasks = text_tasks(&compile_pack(&args.engine, &engine, pack, "")?, &problems)?;
    let bar = progress(tasks.len() * configs.len());
    let mut all: Vec<Vec<ProblemResult>> = Vec::new();
    for config in &configs {
        let mut results: Vec<(usize, ProblemResult)> = Vec::with_capacity(tasks.len());
        Solver::new(&mut engine, config.clone())?.solve(&tasks, &mut |idx, result| {
            results.push((idx, result));
            bar.inc(1);
            Ok(())
        })?;
        results.sort_by_key(|(idx, _)| *idx);
        all.push(results.into_iter().map(|(_, r)| r).collect());
    }
    bar.finish_and_clear();
    let decided = &all[1];
    let rows: Vec<Row> = exits.iter().zip(&all).map(|(&exit, r)| Row::new(exit, r, decided)).collect();
    if args.json {
        return print_json(&serde_json::json!({
            "bench": "trial", "model": engine.info().name, "dtype": engine.info().dtype, "device": engine.info().device,
            "cpu": cpu_model(), "problems": problems.len(), "branches": args.branches, "rows": rows,
        }));
    }
    print(&rows, problems.len())
}

impl Row {
    fn new(
        (exit, confidence): (DecodeExit, Option<f64>),
        results: &[ProblemResult],
        decided: &[ProblemResult],
    ) -> Self {
        let n = results.len().max(1) as f64;
        let mean = |f: &dyn Fn(&ProblemResult) -> u64| results.iter().map(f).sum::<u64>() as f64 / n;
        let right = results.iter().filter(|r| r.correct == Some(true)).count();
        let pairs = || decided.iter().zip(results);
        let flipped = |from: bool| pairs().filter(|(d, r)| d.correct == Some(from) && r.correct == Some(!from)).count();
        Self {
            exit,
            confidence,
            accuracy: right as f64 / n,
            interval: wilson(right, results.len()),
            decode: mean(&|r| r.tokens.decode),
            trial_tokens: mean(&|r| r.trials.tokens),
            trials: mean(&|r| r.trials.run as u64),
            stood: mean(&|r| r.trials.stood as u64),
            changed: pairs().filter(|(d, r)| d.answer != r.answer).count(),
            right_to_wrong: flipped(true),
            wrong_to_right: flipped(false),
        }
    }
}

fn print(rows: &[Row], problems: usize) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        "exit",
        "right (95 %)",
        "tokens",
        "of trials",
        "saved",
        "trials",
        "stood",
        "changed",
        "right to wrong",
        "wrong to right",
    ]);
    let decided = rows[1].decode;
    for r in rows {
        let [lo, hi] = r.interval.map(|x| x * 100.0);
        table.row(vec![
            match (r.exit, r.confidence) {
                (DecodeExit::Off, _) => "off".into(),
                (_, None) => "decided".into(),
                (_, Some(p)) => format!("trial {p}"),
            },
            format!("{:.1} % ({lo:.1} to {hi:.1})", r.accuracy * 100.0),
            format!("{:.0}", r.decode),
            format!("{:.0}", r.trial_tokens),
            format!("{:.1} %", (1.0 - r.decode / decided) * 100.0),
            format!("{:.1}", r.trials),
            format!("{:.1}", r.stood),
            r.changed.to_string(),
            r.right_to_wrong.to_string(),
            r.wrong_to_right.to_string(),
        ]);
    }
    table.print()?;
    say!(
        "{problems} problems; means per problem; tokens: decoded, trials included; saved and changed: against decided"
    );
    Ok(())
}

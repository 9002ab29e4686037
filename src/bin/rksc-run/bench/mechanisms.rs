//! `rksc-run bench mechanisms`: each mechanism alone, and those that pay together, against `exact`.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::gate::step::{Converged, DecodeExit};
use rksc::gate::verify::{SkipRule, VerifyExit};
use rksc::gate::{Over, ProbeNorm};
use rksc::report::ProblemResult;
use rksc::report::ladder::{Arm, Interval};
use rksc::report::mechanisms::{MechanismReport, MechanismRow, Rate, Selection, with_skip};
use rksc::solver::select::Select;
use rksc::solver::{Policy, SolverConfig, verify_again};

use super::arms::{self, ProblemArgs, Work};
use super::{Table, cpu_model};
use crate::common::{EngineArgs, print_json};
use crate::solve::text_tasks;

/// Each mechanism alone, and those that pay together, against `exact`: the same solver with nothing cut short.
///
/// Every arm solves every problem on the same engine, in an order that rotates from problem to problem. Answers are told
/// under each selection rule, always against `exact` under that rule.
///
/// GAIN: mean latency of `exact` over that of the arm, with the 95 % interval of a bootstrap over problems. CEILING: what
/// the counted passes allow; see `rksc-run bench ladder --help`.
///
/// CHANGED ANSWERS: right to wrong and wrong to right per decision and per problem, with 95 % Clopper-Pearson intervals.
/// A decision is a problem whose verification was skipped, a verification that left its pass early, a branch that was
/// stopped or merged; an arm that does several of these has its changes charged to the first of them.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    problems: ProblemArgs,
    /// Text in front of every problem: bundled, none or a file [default: bundled for the bundled model, else none].
    #[arg(long, value_name = "bundled|none|FILE")]
    prefix: Option<String>,
    /// Prompt pack [default: prompts.json beside the model].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Tokens a branch may generate.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// Selection rules to tell the answers under: vote, majority, score*sqrt(conf).
    #[arg(long, value_delimiter = ',', default_value = "vote,score*sqrt(conf)", value_name = "RULE,..")]
    select: Vec<Select>,
    /// Times each problem is solved by each arm.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Only arms whose names contain one of these, and `exact`.
    #[arg(long, value_delimiter = ',', value_name = "WORD,..")]
    only: Vec<String>,
    /// Answers and token counts alone: N problems in flight. Branches that another arm has decoded are not decoded
    /// again to be verified otherwise, or not at all.
    #[arg(long, value_name = "N")]
    untimed: Option<usize>,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

/// Similarity from which decoding branches are merged.
const MERGE_TAU: f32 = 0.99;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.rounds >= 1, "--rounds: must be at least 1");
    let configs = configs(args)?;
    let problems = args.problems.read(&args.engine)?;
    anyhow::ensure!(!problems.is_empty(), "--limit: leaves no problems");
    let mut engine = args.engine.open()?;
    let pack = arms::pack(&args.engine, &engine, args.prefix.as_deref(), args.prompts.as_deref())?;
    let work = Work { tasks: text_tasks(&pack, &problems)?, warm: Vec::new() };
    let mut arms: Vec<Arm> =
        configs.into_iter().map(|(name, config)| Arm::new(name, config, work.tasks.len())).collect();
    for arm in &arms {
        arm.config.validate_task(work.tasks[0].as_ref())?;
    }
    match args.untimed {
        None => arms::measure(&mut engine, &work, args.rounds, &mut arms)?,
        Some(in_flight) => count(&mut engine, &work, in_flight, &mut arms)?,
    }
    let report = MechanismReport::new(&arms, &args.select, args.untimed.is_none());
    if args.json { print_json(&json(args, &engine, &report)) } else { print(&report) }
}

/// The arms by name, the baseline first.
fn configs(args: &Args) -> rksc::Result<Vec<(&'static str, SolverConfig)>> {
    let base = SolverConfig {
        num_branches: args.branches,
        max_new_tokens: args.max_new_tokens,
        ..SolverConfig::preset(Policy::Exact)
    };
    let rksc = SolverConfig::preset(Policy::Rksc);
    let full = VerifyExit { over: Over::Vocabulary, norm: ProbeNorm::Final, ..VerifyExit::CANDIDATES };
    let skip = |skip| SolverConfig { skip, ..base.clone() };
    let decode = |decode_exit| SolverConfig { decode_exit, ..base.clone() };
    let verify = |exit| SolverConfig { verify_exit: Some(exit), ..base.clone() };
    let mut arms = vec![
        ("exact", base.clone()),
        ("skip: agreement", skip(SkipRule::AGREEMENT)),
        ("skip: the paper's rule", skip(SkipRule::PAPER)),
        ("skip: the code's rule", skip(SkipRule::CODE)),
        ("decode exit: decided", decode(DecodeExit::Decided)),
        ("decode exit: per branch", decode(DecodeExit::PerBranch)),
        ("decode exit: stop all", decode(DecodeExit::StopAll)),
        ("decode exit: trial", decode(DecodeExit::Trial)),
        ("verify exit: candidates", verify(VerifyExit::CANDIDATES)),
        ("verify exit: full", verify(full)),
        ("verify exit: full, every 3rd", verify(VerifyExit { every: 3, ..full })),
        ("verify exit: full, 3 stacked", verify(VerifyExit { stacked: 3, ..full })),
        ("verify exit: the paper's", verify(VerifyExit::PAPER)),
        ("merge converged", SolverConfig { merge: Some(Converged::at(MERGE_TAU)), ..base.clone() }),
        (
            "the paper's three together",
            SolverConfig {
                skip: SkipRule::CODE,
                decode_exit: DecodeExit::StopAll,
                verify_exit: Some(VerifyExit::PAPER),
                ..base.clone()
            },
        ),
        ("rksc", SolverConfig { num_branches: args.branches, max_new_tokens: args.max_new_tokens, ..rksc }),
    ];
    arms.iter().try_for_each(|(_, c)| c.validate())?;
    let is_wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|w| name.contains(w.as_str()));
    arms.retain(|(name, _)| *name == "exact" || is_wanted(name));
    Ok(arms)
}

/// Runs each arm once over all problems. Where another arm has decoded the same branches, only what differs is run:
/// the verification, or nothing where it is skipped.
fn count(engine: &mut Engine, work: &Work, in_flight: usize, arms: &mut [Arm]) -> anyhow::Result<()> {
    let plain = |c: &SolverConfig| SolverConfig {
        skip: SkipRule::Never,
        verify_exit: None,
        policy: Policy::Exact,
        ..c.clone()
    };
    for at in 0..arms.len() {
        let (before, rest) = arms.split_at_mut(at);
        let arm = &mut rest[0];
        let source = before.iter().find(|b| b.config == plain(&arm.config));
        let mut results: Vec<ProblemResult> = match source {
            Some(source) => source.results.iter().flatten().cloned().collect(),
            None => {
                let config = SolverConfig { concurrency: in_flight, cold_cache: false, ..plain(&arm.config) };
                arms::count(engine, &work.tasks, &config, &arm.name)?.0
            }
        };
        if arm.config.verify_exit.is_some() {
            for (task, result) in work.tasks.iter().zip(&mut results) {
                *result = verify_again(engine, &arm.config, task.as_ref(), result)?;
            }
        }
        arm.results = with_skip(&results, arm.config.skip).into_iter().map(|r| vec![r]).collect();
    }
    Ok(())
}

fn json(args: &Args, engine: &Engine, report: &MechanismReport) -> serde_json::Value {
    let info = engine.info();
    serde_json::json!({
        "bench": "mechanisms", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "config": {
            "files": args.problems.files, "limit": args.problems.limit, "prefix": args.prefix, "branches": args.branches,
            "rounds": args.rounds, "untimed": args.untimed, "merge_tau": MERGE_TAU,
        },
        "problems": report.problems, "arms": report.arms,
    })
}

fn print(report: &MechanismReport) -> anyhow::Result<()> {
    let problems = report.problems.max(1) as f64;
    let mut table = Table::new(&[
        "mechanism",
        "ms",
        "gain",
        "95 %",
        "ceiling",
        "prefill",
        "decode",
        "verify",
        "verified",
        "not run",
        "exit layer",
        "peak",
        "verdict",
    ]);
    report.arms.iter().for_each(|a| table.row(cost_cells(a, problems)));
    table.print()?;
    say!("{} problems; tokens per problem; verified, not run: verifications of all problems", report.problems);
    let rules = report.arms.first().map_or(0, |a| a.selections.len());
    for i in 0..rules {
        let rows: Vec<(&MechanismRow, &Selection)> =
            report.arms.iter().filter_map(|a| Some((a, a.selections.get(i)?))).collect();
        print_selection(&rows)?;
    }
    Ok(())
}

fn cost_cells(a: &MechanismRow, problems: f64) -> Vec<String> {
    let per_problem = |x: u64| format!("{:.0}", x as f64 / problems);
    let none = || "-".to_string();
    let gain = a.timing.as_ref().and_then(|t| t.gain);
    vec![
        a.name.clone(),
        a.timing.as_ref().map_or_else(none, |t| format!("{:.1}", t.latency_ms.mean)),
        gain.map_or_else(none, |g| format!("{:.2}", g.measured.value)),
        gain.map_or_else(none, |g| format!("{:.2} to {:.2}", g.measured.lo, g.measured.hi)),
        gain.map_or_else(none, |g| format!("{:.2}", g.ceiling)),
        per_problem(a.tokens.prefill),
        per_problem(a.tokens.decode),
        per_problem(a.tokens.verify),
        a.verified.to_string(),
        a.verify_skipped.to_string(),
        a.mean_exit_layer.map_or_else(none, |l| format!("{l:.1}")),
        a.timing.as_ref().map_or_else(none, |t| t.blocks_peak.to_string()),
        a.verdict.to_string(),
    ]
}

fn print_selection(rows: &[(&MechanismRow, &Selection)]) -> anyhow::Result<()> {
    let Some((_, first)) = rows.first() else { return Ok(()) };
    let rule = serde_json::to_value(first.rule)?;
    let name = format!("selected by {}", rule.as_str().unwrap_or_default());
    let mut table = Table::new(&[
        &name,
        "right (95 %)",
        "difference",
        "skips",
        "exits",
        "stops",
        "merges",
        "changed",
        "right to wrong",
        "a decision",
        "a problem",
        "wrong to right",
        "a decision",
        "a problem",
    ]);
    for (a, s) in rows {
        let right = s.accuracy.zip(s.accuracy_interval);
        let d = a.decisions;
        let [bad, good] = [s.right_to_wrong, s.wrong_to_right].map(rate_cells);
        let mut cells = vec![
            a.name.clone(),
            right.map_or("-".into(), |(x, [lo, hi])| {
                format!("{:.1} % ({:.1} to {:.1})", x * 100.0, lo * 100.0, hi * 100.0)
            }),
            s.difference.map_or("-".into(), |Interval { value, lo, hi }| {
                format!("{:+.2} ({:+.2} to {:+.2})", value * 100.0, lo * 100.0, hi * 100.0)
            }),
        ];
        cells.extend([d.skips, d.exits, d.stops, d.merges, s.changed].map(|n| n.to_string()));
        cells.extend(bad);
        cells.extend(good);
        table.row(cells);
    }
    say!();
    table.print()?;
    say!("difference: points, with the 95 % interval of a bootstrap; rates in %, with 95 % Clopper-Pearson intervals");
    Ok(())
}

/// A count, and its intervals per decision and per problem in per cent.
fn rate_cells(r: Rate) -> [String; 3] {
    let interval = |[lo, hi]: [f64; 2]| format!("{:.2} to {:.2}", lo * 100.0, hi * 100.0);
    let decision = match r.decisions {
        0 => "-".into(),
        n => format!("{:.2} ({})", r.count as f64 / n as f64 * 100.0, interval(r.per_decision)),
    };
    [r.count.to_string(), decision, interval(r.per_problem)]
}

//! `rksc-run bench ladder`: one engine, the same problems, every policy in turn.
//!
//! For each problem (and round) every policy runs once, in an order that rotates from problem to problem, so that a
//! slow minute of the machine hits all of them alike. One problem is solved by all of them before anything counts.
//! What ratio and ceiling mean stands in `rksc::report::ladder`, and in this command's `--help`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args as ClapArgs, ValueEnum};
use rksc::Engine;
use rksc::config::ModelSource;
use rksc::gate::step::DecodeExit;
use rksc::gate::verify::SkipRule;
use rksc::problems::Problem;
use rksc::report::html::ReportData;
use rksc::report::ladder::{Arm, ArmReport, Interval, LadderReport, Ratio};
use rksc::report::{ProblemResult, SolveReport};
use rksc::solver::select::Select;
use rksc::solver::task::{SyntheticLengths, SyntheticTask, Task};
use rksc::solver::{Policy, SolverConfig};

use super::arms::{self, Work};
use super::{Table, cpu_model};
use crate::common::{self, EngineArgs, print_json};
use crate::report_file::{self, ReportFile};
use crate::solve::text_tasks;

/// Problems of a random-weights ladder unless --limit says otherwise.
const SYNTHETIC_PROBLEMS: usize = 5;

/// The policies against each other, interleaved in one process on the same problems.
///
/// Every policy solves every problem on the same engine; the order rotates from problem to problem, and one problem is
/// solved beforehand without counting.
///
/// RATIO: mean latency of a policy over mean latency of rksc, over the same problems, with the 95 % interval of a
/// bootstrap over problems.
///
/// CEILING: what the counted work allows. Every pass of every policy is priced from one list, in which a row count
/// costs the median of all measured passes of that many rows; the ceiling is the price of the policy's passes over the
/// price of rksc's. A ratio below its ceiling is what is lost between the passes. A ratio above it comes from passes
/// that were cheaper than others of as many rows, because attention read shared slots once.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Random weights of a named shape (tiny, qwen2.5-0.5b, ...) instead of a model: a prefix of 1024 tokens, 32 more a
    /// branch, forced lengths, everything verified.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "problems", "prefix", "prompts"])]
    shape: Option<String>,
    /// Problem file [default: the bundled problems].
    #[arg(long, value_name = "FILE")]
    problems: Option<PathBuf>,
    /// Only the first N problems [default: all; 5 with --shape].
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Text in front of every problem: bundled, none or a file [default: bundled for the bundled model, else none].
    #[arg(long, value_name = "bundled|none|FILE")]
    prefix: Option<String>,
    /// Prompt pack [default: prompts.json beside the model].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Policies to run [default: all six].
    #[arg(long, value_delimiter = ',', value_name = "A,B,C")]
    policies: Vec<Policy>,
    /// cold: nothing is cached when a problem begins. warm: --prefix is.
    #[arg(long, default_value = "cold")]
    cache: Cache,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Tokens a branch may generate [default: 256; 8 with --shape, where it generates exactly that many].
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// One selection rule for all policies: vote, majority or score*sqrt(conf) [default: each policy's own].
    #[arg(long)]
    select: Option<Select>,
    /// Times each problem is solved by each policy.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// No skipping and no decode exits in any policy: equal work.
    #[arg(long)]
    verify_all: bool,
    /// The ladder, and what rksc (or the last policy) did in its first round, as one HTML file with figures. That policy
    /// solves the problems once more, without counting, for what a timed run does not write down.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Cache {
    Cold,
    Warm,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.rounds >= 1, "--rounds: must be at least 1");
    let configs = configs(args)?;
    let source = match &args.shape {
        Some(shape) => ModelSource::Random { shape: shape.clone(), seed: 0 },
        None => args.engine.source(),
    };
    let report_file = args.report.as_deref().map(|path| ReportFile::open(path, None)).transpose()?;
    let mut engine = common::open(args.engine.config_for(source))?;
    let work = if args.shape.is_some() { synthetic(args, &engine)? } else { text(args, &engine)? };
    anyhow::ensure!(!work.tasks.is_empty(), "--limit: leaves no problems");

    let arm = |config: SolverConfig| Arm::new(config.policy.name(), config, work.tasks.len());
    let mut arms: Vec<Arm> = configs.into_iter().map(arm).collect();
    let mut outcome = arms::measure(&mut engine, &work, args.rounds, &mut arms);
    let report = outcome.is_ok().then(|| LadderReport::new(&arms));
    if let Some(file) = &report_file {
        let shown = arms.iter().position(|a| a.config.policy == Policy::Rksc).unwrap_or(arms.len() - 1);
        if outcome.is_ok() {
            outcome = record(&mut engine, &work, &mut arms[shown]);
        }
        write_page(file, &engine, (arms.len(), &arms[shown]), report.as_ref(), outcome)?;
    } else {
        outcome?;
    }
    match report {
        Some(report) if args.json => print_json(&json(args, &engine, &report)),
        Some(report) => print(&report),
        None => Ok(()),
    }
}

/// Solves the problems once more, and adds to the first round's results what a timed run does not write down.
fn record(engine: &mut Engine, work: &Work, arm: &mut Arm) -> anyhow::Result<()> {
    for problem in 0..work.tasks.len() {
        let config = SolverConfig { record: true, ..arm.config.clone() };
        let mut again = Arm::new(config.policy.name(), config, work.tasks.len());
        arms::run_one(engine, work, problem, &mut again)?;
        let (Some(timed), Some(told)) = (arm.results[problem].first_mut(), again.results[problem].pop()) else {
            continue;
        };
        timed.memory = told.memory;
        timed.similarity = told.similarity;
        for (timed, told) in timed.branches.iter_mut().zip(told.branches) {
            timed.layers = told.layers;
        }
    }
    Ok(())
}

/// The page shows one policy's problems beside the ladder; after an error those it came to.
fn write_page(
    file: &ReportFile,
    engine: &Engine,
    (num_arms, shown): (usize, &Arm),
    ladder: Option<&LadderReport>,
    outcome: anyhow::Result<()>,
) -> anyhow::Result<()> {
    let problems: Vec<ProblemResult> = shown.results.iter().filter_map(|rounds| rounds.first()).cloned().collect();
    let sums = SolveReport::new(&shown.config, &problems);
    let page = ReportData {
        title: format!("Ladder of {num_arms} policies; in detail: {}", sums.policy),
        setting: report_file::setting(engine),
        report: Some(&sums),
        problems: &problems,
        ladder,
        error: None,
    };
    report_file::finish(Some(file), page, outcome)
}

fn configs(args: &Args) -> anyhow::Result<Vec<SolverConfig>> {
    let mut policies = if args.policies.is_empty() { Policy::ALL.to_vec() } else { args.policies.clone() };
    let mut seen = Vec::new();
    policies.retain(|p| {
        !seen.contains(p) && {
            seen.push(*p);
            true
        }
    });
    let synthetic = args.shape.is_some();
    let config = |policy| {
        let mut c = SolverConfig::preset(policy);
        c.num_branches = args.branches;
        c.max_new_tokens = args.max_new_tokens.unwrap_or(if synthetic { 8 } else { 256 });
        c.forced_length = synthetic;
        // A warm cache is emptied and filled here, before each run.
        c.cold_cache = args.cache == Cache::Cold;
        if synthetic || args.verify_all {
            c.skip = SkipRule::Never;
            c.decode_exit = DecodeExit::Off;
        }
        if let Some(select) = args.select {
            c.select = select;
        }
        c.validate()?;
        Ok(c)
    };
    policies.into_iter().map(config).collect()
}

/// Problems made of token ids. With a warm cache there would be nothing left of them to compute.
fn synthetic(args: &Args, engine: &Engine) -> anyhow::Result<Work> {
    anyhow::ensure!(args.cache == Cache::Cold, "--cache: warm needs problems with a common prefix; drop --shape");
    let vocab = engine.model().vocab_size;
    let task = |i| SyntheticTask::new(i, args.branches, vocab, SyntheticLengths::default());
    let tasks = (0..args.limit.unwrap_or(SYNTHETIC_PROBLEMS)).map(|i| Box::new(task(i)) as Box<dyn Task>);
    Ok(Work { tasks: tasks.collect(), warm: Vec::new() })
}

fn text(args: &Args, engine: &Engine) -> anyhow::Result<Work> {
    let files: Vec<PathBuf> = args.problems.iter().cloned().collect();
    let problems = arms::read(&args.engine, &files, args.limit)?;
    let pack = arms::pack(&args.engine, engine, args.prefix.as_deref(), args.prompts.as_deref())?;
    let tasks = text_tasks(&pack, &problems)?;
    let mut warm = Vec::new();
    if args.cache == Cache::Warm {
        // What all problems begin with, and one more whose question is empty.
        let empty = Problem { id: String::new(), question: String::new(), answer: None, paraphrases: Vec::new() };
        let bare = text_tasks(&Arc::clone(&pack), &[empty])?;
        let roots: Vec<&[u32]> = tasks.iter().chain(&bare).map(|t| t.root()).collect();
        warm = common_prefix(&roots).to_vec();
        anyhow::ensure!(!warm.is_empty(), "--cache: warm needs a --prefix");
    }
    Ok(Work { tasks, warm })
}

/// The longest run with which all of `lists` begin.
fn common_prefix<'a>(lists: &[&'a [u32]]) -> &'a [u32] {
    let Some((first, rest)) = lists.split_first() else { return &[] };
    let same = |n: &usize| rest.iter().all(|l| l.get(*n) == first.get(*n));
    &first[..(0..first.len()).take_while(same).count()]
}

fn json(args: &Args, engine: &Engine, report: &LadderReport) -> serde_json::Value {
    let info = engine.info();
    let head = serde_json::json!({
        "bench": "ladder", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "config": {
            "branches": args.branches, "cache": args.cache, "rounds": args.rounds, "verify_all": args.verify_all,
            "select": args.select, "prefix": args.prefix, "shape": args.shape, "limit": args.limit,
            "max_batch_tokens": engine.config().max_batch_tokens, "block_size": engine.config().block_size,
        },
    });
    let mut all = head;
    if let (Some(all), Ok(serde_json::Value::Object(report))) = (all.as_object_mut(), serde_json::to_value(report)) {
        all.extend(report);
    }
    all
}

fn print(report: &LadderReport) -> anyhow::Result<()> {
    let known = report.policies.iter().any(|p| p.accuracy.is_some());
    let mut table = Table::new(&[
        "policy",
        "ms/problem",
        "p10",
        "p50",
        "p90",
        "in passes",
        "passes",
        "prefill",
        "decode",
        "verify",
        "skipped",
        "peak",
        "shared",
        "private",
        "same",
        if known { "right  (95 %)" } else { "" },
    ]);
    let problems = report.problems.max(1) as f64;
    report.policies.iter().for_each(|p| table.row(arm_cells(p, problems)));
    table.print()?;
    say!(
        "{} problems x {} rounds; tokens per problem; blocks: the most of any problem; same: as no-sharing's",
        report.problems,
        report.rounds
    );
    if !report.ratios.is_empty() {
        say!();
        let mut table = Table::new(&["mean latency", "ratio", "95 %", "ceiling", "of ceiling"]);
        report.ratios.iter().for_each(|(name, r)| table.row(ratio_cells(name, r)));
        table.print()?;
    }
    if let Some(Interval { value, lo, hi }) = report.accuracy_difference {
        let points = |x: f64| format!("{:+.1}", x * 100.0);
        say!("accuracy, rksc minus no-sharing: {} points ({} to {})", points(value), points(lo), points(hi));
    }
    if let Some(gain) = report.sharing {
        say!(
            "prefill of a problem: {:.1} ms unshared, {:.1} ms shared; sharing {} by {:.1} ms",
            gain.full_ms,
            gain.shared_ms,
            if gain.pays() { "pays" } else { "loses" },
            gain.net_ms.abs()
        );
    }
    Ok(())
}

fn arm_cells(p: &ArmReport, problems: f64) -> Vec<String> {
    let (l, t, b) = (p.latency_ms, p.tokens, p.blocks);
    let ms = |x: f64| format!("{x:.1}");
    let per_problem = |x: u64| format!("{:.0}", x as f64 / problems);
    let percent = |x: f64| format!("{:.0} %", x * 100.0);
    let right = p.accuracy.zip(p.accuracy_interval);
    vec![
        p.policy.into(),
        ms(l.mean),
        ms(l.p10),
        ms(l.p50),
        ms(l.p90),
        ms(p.pass_ms),
        format!("{:.1}", p.passes),
        per_problem(t.prefill),
        per_problem(t.decode),
        per_problem(t.verify),
        percent(p.skip_rate),
        b.peak.to_string(),
        b.shared.to_string(),
        b.private.to_string(),
        p.agreement.map_or("-".into(), percent),
        right.map_or(String::new(), |(a, [lo, hi])| {
            format!("{:.1} % ({:.1} to {:.1})", a * 100.0, lo * 100.0, hi * 100.0)
        }),
    ]
}

fn ratio_cells(name: &str, r: &Ratio) -> Vec<String> {
    let Interval { value, lo, hi } = r.measured;
    vec![
        name.into(),
        format!("{value:.2}x"),
        format!("{lo:.2} to {hi:.2}"),
        format!("{:.2}x", r.ceiling),
        format!("{:.0} %", r.of_ceiling * 100.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::common_prefix;

    #[test]
    fn the_common_prefix_of_lists() {
        assert_eq!(common_prefix(&[&[1, 2, 3], &[1, 2, 4, 5], &[1, 2]]), [1, 2]);
        assert_eq!(common_prefix(&[&[1], &[2]]), [] as [u32; 0]);
        assert_eq!(common_prefix(&[]), [] as [u32; 0]);
    }
}

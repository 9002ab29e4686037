//! Right answers against the budget, for each way to choose what stays.

use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use rksc::Engine;
use rksc::gate::step::DecodeExit;
use rksc::kv::budget::KvPrompt;
use rksc::report::ProblemResult;
use rksc::solver::task::Task;
use rksc::solver::{Policy, Sharing, SolverConfig, VerifyMode};

use super::super::arms::{self, ProblemArgs};
use super::super::{Table, cpu_model};
use super::draw;
use super::methods::{Method, share};
use super::score::{Arm, Group, Row, Setting};
use crate::common::{EngineArgs, print_json};
use crate::solve::{compile_pack, text_tasks};

/// Right answers of long chains under KV budgets, against the full cache on the same problems.
///
/// One chain a problem, greedy, nothing verified or cut short. A budget is a percentage of the mean length of the full
/// cache's chains, and counts what is not pinned; the prompt is pinned unless --kv-prompt evict.
///
/// RIGHT: with its Wilson 95 % interval. LOST, WON: problems right with the full cache alone, and with the arm alone.
/// DIFFERENCE: in points, with Tango's paired score interval (95 %). LOSS AT MOST: the same test's one-sided 95 % bound.
///
/// Problems fall into three kinds: never cut; cut for the first time when the answer had been stated; cut before. Stated:
/// the text decided before the cut has the answer that the full cache ends with (or if that is none, the expected one)
/// where the task reads answers, or as the last word of a finished line. Each is given as right of all, and how many of
/// them the full cache has right.
///
/// SAVED: 1 - held / full slots of the same chain, prompts included, peaks summed over problems and all decode steps summed;
/// computed from lengths and schedule, and the command fails where the engine's records differ from that.
///
/// DEFAULT: from the largest budget down, the last before the first whose bound does not exclude a loss of more than
/// --margin points; it takes 2,000 problems.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    problems: ProblemArgs,
    /// One approach a line, of which the first is taken [default: the long style of the bundled model, else the pack's].
    #[arg(long, value_name = "FILE")]
    approaches: Option<PathBuf>,
    /// Tokens a chain may generate.
    #[arg(long, default_value_t = 640, value_name = "N")]
    max_new_tokens: usize,
    /// Budgets, in % of the full cache's mean chain.
    #[arg(long, value_delimiter = ',', default_values_t = [8.0, 10.0, 16.0, 25.0, 34.0, 54.0, 100.0], value_name = "P,..")]
    kv_budget_percent: Vec<f64>,
    /// Slots on top of a budget until the next cut [default: half of it, at most 128, in whole blocks].
    #[arg(long, value_name = "N")]
    kv_buffer: Option<usize>,
    /// rkv, rkv-text, rkv-alg1, rkv-layer, rkv-token, snapkv, streaming, h2o, random (each head
    /// its own draw) or random-token (one draw for all).
    #[arg(long, value_delimiter = ',', default_value = "rkv,snapkv,streaming,h2o,random", value_name = "NAME,..")]
    methods: Vec<Method>,
    /// Also R-KV's other published forms and aggregations.
    #[arg(long)]
    variants: bool,
    /// R-KV's share of importance.
    #[arg(long, default_value_t = 0.1, value_name = "L")]
    kv_lambda: f32,
    /// What becomes of the prompt's slots.
    #[arg(long, default_value = "pin", value_name = "pin|evict")]
    kv_prompt: Prompt,
    /// With --kv-prompt evict, leading tokens that stay all the same.
    #[arg(long, default_value_t = 4, value_name = "N")]
    kv_sinks: usize,
    /// Draws of random eviction.
    #[arg(long, default_value_t = 1, value_name = "K")]
    seeds: u64,
    /// Loss, in points, that a default must exclude.
    #[arg(long, default_value_t = 2.0, value_name = "POINTS")]
    margin: f64,
    /// Problems in flight; changes nothing but the time it takes.
    #[arg(long, default_value_t = 32, value_name = "N")]
    concurrency: usize,
    /// Draw it as an SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Prompt {
    Pin,
    Evict,
}

const OTHER_FORMS: [&str; 4] = ["rkv-text", "rkv-alg1", "rkv-layer", "rkv-token"];
/// Problems that a default takes.
const ENOUGH: usize = 2000;
/// What arXiv 2505.24133 says R-KV has of the full cache's accuracy, by budget in % of the mean chain.
const CLAIMS: [(f64, f64); 2] = [(10.0, 1.00), (16.0, 1.05)];

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut problems = args.problems.read(&args.engine)?;
    problems.retain(|p| p.answer.is_some());
    anyhow::ensure!(!problems.is_empty(), "--problems: none has an answer to compare with");
    anyhow::ensure!(args.seeds >= 1, "--seeds: must be at least 1");
    let mut engine = args.engine.open()?;
    let pack = arms::long_pack(&args.engine.source(), args.approaches.as_deref())?;
    let tasks = text_tasks(&compile_pack(&args.engine, &engine, pack, "")?, &problems)?;
    let config = SolverConfig {
        num_branches: 1,
        max_new_tokens: args.max_new_tokens,
        verify: VerifyMode::Off,
        decode_exit: DecodeExit::Off,
        // A prompt that shares its blocks with a root keeps them: one that may go has them for itself.
        sharing: if args.kv_prompt == Prompt::Evict { Sharing::None } else { Sharing::Exact },
        concurrency: args.concurrency,
        cold_cache: false,
        ..SolverConfig::preset(Policy::Exact)
    };
    let setting = Setting {
        block_size: engine.config().block_size,
        window: engine.config().kv_window,
        are_roots: config.sharing == Sharing::None,
    };
    let whole = Arm { method: "full".into(), seed: None, percent: None, limit: None };
    let full = solve(&mut engine, &tasks, &config, &whole)?;
    let mean = full.iter().flat_map(|r| &r.branches).map(|b| b.tokens.len()).sum::<usize>() as f64 / full.len() as f64;
    let mut rows = vec![Row::new(&whole, &tasks, &full, &full, setting)?];
    for arm in budgets(args, mean, setting)? {
        eprintln!("{}", name(&arm.method, arm.seed, arm.percent));
        let results = solve(&mut engine, &tasks, &config, &arm)?;
        rows.push(Row::new(&arm, &tasks, &results, &full, setting)?);
    }
    if let Some(path) = &args.svg {
        let words = format!(
            "{} problems, one chain of {mean:.0} tokens in the mean each; {}, greedy; 95 % intervals",
            problems.len(),
            engine.info().name
        );
        let svg = draw::accuracy(&rows, words, &CLAIMS);
        std::fs::write(path, svg).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    }
    let verdicts = verdicts(args, &rows);
    if args.json { print_json(&json(args, &engine, (mean, &rows), &verdicts)) } else { print((mean, &rows), &verdicts) }
}

/// Every arm but the full cache, methods in order, each from the smallest budget up.
fn budgets(args: &Args, mean: f64, setting: Setting) -> anyhow::Result<Vec<Arm>> {
    let mut methods = args.methods.clone();
    if args.variants {
        let others: Result<Vec<Method>, String> = OTHER_FORMS.iter().map(|name| name.parse()).collect();
        methods.extend(others.map_err(anyhow::Error::msg)?);
    }
    let mut percents = args.kv_budget_percent.clone();
    percents.sort_by(f64::total_cmp);
    let prompt = if args.kv_prompt == Prompt::Evict { KvPrompt::Evict } else { KvPrompt::Pin };
    let mut arms: Vec<Arm> = Vec::new();
    for method in methods.into_iter().map(|m| m.with_lambda(args.kv_lambda)) {
        for &percent in &percents {
            for seed in 0..if method.is_random() { args.seeds } else { 1 } {
                let mut limit = method.limit(share(percent, mean), args.kv_buffer, prompt, seed);
                limit.sinks = args.kv_sinks;
                limit.for_prompt(1, setting.block_size).validate(setting.window)?;
                let seed = (method.is_random() && args.seeds > 1).then_some(seed);
                let arm = Arm { method: method.name.clone(), seed, percent: Some(percent), limit: Some(limit) };
                if !arms.iter().any(|a| (&a.method, a.seed, a.limit) == (&arm.method, arm.seed, arm.limit)) {
                    arms.push(arm);
                }
            }
        }
    }
    Ok(arms)
}

fn solve(
    engine: &mut Engine,
    tasks: &[Box<dyn Task>],
    config: &SolverConfig,
    arm: &Arm,
) -> anyhow::Result<Vec<ProblemResult>> {
    engine.clear_prefix_cache()?;
    let config = SolverConfig { kv: arm.limit, ..config.clone() };
    Ok(arms::count(engine, tasks, &config, &name(&arm.method, arm.seed, arm.percent))?.0)
}

fn name(method: &str, seed: Option<u64>, percent: Option<f64>) -> String {
    let draw = seed.map(|s| format!(" {}", s + 1)).unwrap_or_default();
    let percent = percent.map(|p| format!(" {p} %")).unwrap_or_default();
    format!("{method}{draw}{percent}")
}

/// What follows from the rows, in plain words.
fn verdicts(args: &Args, rows: &[Row]) -> Vec<String> {
    let mut out = Vec::new();
    let full = rows[0].paired.share();
    for (percent, claim) in CLAIMS {
        let Some(r) = rows.iter().find(|r| r.method == "rkv" && r.percent == Some(percent)) else { continue };
        let of_full = |difference: f64| (full + difference) / full;
        let [lo, hi] = r.paired.difference_interval.map(of_full);
        let verdict = match claim {
            c if of_full(r.paired.difference) >= c => "met",
            c if hi >= c => "not met, though the interval reaches it",
            _ => "not met",
        };
        out.push(format!(
            "the paper's {:.0} % of the full cache at {percent} % (other models, other problems): here {:.1} % ({:.1} to \
             {:.1}): {verdict}",
            claim * 100.0,
            of_full(r.paired.difference) * 100.0,
            lo * 100.0,
            hi * 100.0
        ));
    }
    let mut methods: Vec<&str> = Vec::new();
    for r in rows.iter().skip(1) {
        if !methods.contains(&r.method.as_str()) {
            methods.push(&r.method);
        }
    }
    out.extend(methods.into_iter().map(|method| default_of(args, rows, method)));
    out
}

/// Budgets are tested from the largest down until one fails, so that testing many of them costs no confidence.
fn default_of(args: &Args, rows: &[Row], method: &str) -> String {
    let mut tested: Vec<&Row> = rows.iter().filter(|r| r.method == method).collect();
    tested.sort_by_key(|r| std::cmp::Reverse(r.budget));
    // Of several draws the worst counts.
    let bound = |budget| {
        tested.iter().filter(|r| r.budget == budget).map(|r| r.paired.loss_bound * 100.0).fold(f64::MIN, f64::max)
    };
    let last = tested.iter().take_while(|r| bound(r.budget) <= args.margin).last();
    let few = rows[0].paired.problems < ENOUGH;
    let choice = match last {
        Some(r) => format!("{} slots, {} %", r.budget.unwrap_or(0), r.percent.unwrap_or(0.0)),
        None => "the full cache".into(),
    };
    let why = match (last, tested.first()) {
        (Some(r), _) => format!("a loss of more than {:.2} points is excluded", bound(r.budget)),
        (None, Some(r)) => format!("at the largest budget the bound is {:.2} points", bound(r.budget)),
        (None, None) => "no budget was tried".into(),
    };
    let caveat = if few {
        format!("; {} problems do not make a default, it takes {ENOUGH}", rows[0].paired.problems)
    } else {
        String::new()
    };
    format!("default by {method}: {choice} ({why}; margin {} points{caveat})", args.margin)
}

fn json(args: &Args, engine: &Engine, (mean, rows): (f64, &[Row]), verdicts: &[String]) -> serde_json::Value {
    let info = engine.info();
    serde_json::json!({
        "bench": "kv-budget accuracy", "model": info.name, "dtype": info.dtype, "device": info.device,
        "cpu": cpu_model(),
        "config": {
            "files": args.problems.files, "limit": args.problems.limit, "max_new_tokens": args.max_new_tokens,
            "kv_prompt": if args.kv_prompt == Prompt::Evict { "evict" } else { "pin" }, "kv_sinks": args.kv_sinks,
            "kv_lambda": args.kv_lambda, "kv_window": engine.config().kv_window, "margin": args.margin,
        },
        "problems": rows[0].paired.problems, "full_mean_tokens": mean, "arms": rows, "verdicts": verdicts,
    })
}

fn print((mean, rows): (f64, &[Row]), verdicts: &[String]) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        "arm",
        "slots + buffer",
        "right",
        "% (95 %)",
        "lost",
        "won",
        "difference (95 %)",
        "loss at most",
        "never cut",
        "cut after answer",
        "cut before",
        "cuts",
        "tokens",
        "unfinished",
    ]);
    for r in rows {
        let mut cells = vec![
            name(&r.method, r.seed, r.percent),
            r.budget.zip(r.buffer).map_or("-".into(), |(a, b)| format!("{a} + {b}")),
        ];
        cells.extend(r.paired.right_cells());
        if r.budget.is_some() {
            cells.extend(r.paired.change_cells());
            cells.extend([
                format!("{:.2}", r.paired.loss_bound * 100.0),
                group(r.never_cut),
                group(r.cut_after_answer),
                group(r.cut_before_answer),
                format!("{:.1}", r.cuts_mean),
            ]);
        } else {
            cells.extend((0..8).map(|_| "-".to_string()));
        }
        cells.extend([format!("{:.0}", r.paired.tokens_mean), r.paired.unfinished.to_string()]);
        table.row(cells);
    }
    table.print()?;
    say!(
        "kinds of problems: right of all, in brackets right with the full cache; a chain of it has {mean:.0} tokens\n"
    );
    let mut table = Table::new(&[
        "memory",
        "saved at peak",
        "in the mean",
        "unpinned: at peak",
        "in the mean",
        "most unpinned slots",
        "pinned (mean)",
    ]);
    for r in rows.iter().filter(|r| r.budget.is_some()) {
        let m = &r.memory;
        let percent = |x: f64| format!("{:.1} %", x * 100.0);
        table.row(vec![
            name(&r.method, r.seed, r.percent),
            percent(m.saved_peak),
            percent(m.saved_mean),
            percent(m.unpinned_saved_peak),
            percent(m.unpinned_saved_mean),
            m.unpinned_peak.to_string(),
            format!("{:.1}", m.pinned_mean),
        ]);
    }
    table.print()?;
    say!("slots per (layer, head) against the full cache of the same chains, over their decode steps\n");
    for verdict in verdicts {
        say!("{verdict}");
    }
    let differ: usize = rows.iter().map(|r| r.differ_before_cut).sum();
    if differ > 0 {
        say!("{differ} chains differed from the full cache's before they were cut: passes are not exact here");
    }
    Ok(())
}

fn group(g: Group) -> String {
    if g.problems == 0 { "-".into() } else { format!("{} of {} ({})", g.right, g.problems, g.right_full) }
}

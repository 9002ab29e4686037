//! `rksc-run bench tree`: trees of several depths and beams against plain branches at equal generated tokens.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::problems::Problem;
use rksc::prompts::same_answer;
use rksc::report::{NodeEnd, ProblemResult, wilson};
use rksc::sampler::SamplingParams;
use rksc::solver::select::{Ballot, Select, select};
use rksc::solver::task::Task;
use rksc::solver::{Policy, SearchConfig, Solver, SolverConfig, StepScore, VerifyMode};

use super::{Table, arms, cpu_model};
use crate::common::{EngineArgs, print_json, progress};
use crate::search::Score;
use crate::solve::{compile_pack, text_tasks};

/// Trees against plain branches that vote, on the same problems, at equal generated tokens.
///
/// One plain run draws --plain-branches branches a problem; their approaches are the pack's, over and over. For each
/// tree and each problem, plain voting has the first n of them, n chosen so that they generated the number of tokens
/// nearest to the tree's. Generated tokens are those of every node ever made, or of every branch; what verifiers read
/// is counted beside them.
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
    /// Depths of the trees.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4], value_name = "D,D,..")]
    depths: Vec<usize>,
    /// Beams of the trees deeper than 1.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4], value_name = "K,K,..")]
    beams: Vec<usize>,
    /// What a step is worth.
    #[arg(long, default_value = "confidence")]
    score: Score,
    /// Children of a node.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Branches of the plain run; more than the largest tree generates for.
    #[arg(long, default_value_t = 40, value_name = "N")]
    plain_branches: usize,
    /// How the answer is chosen, in all arms: vote or majority.
    #[arg(long, default_value = "vote")]
    select: Select,
    /// Temperature of all draws.
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Key of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

/// A tree, and plain branches of the same number of tokens.
#[derive(serde::Serialize)]
struct Row {
    depth: usize,
    /// None at depth 1, where nothing is expanded.
    beam: Option<usize>,
    tree: Cell,
    plain: Cell,
    /// Problems whose answer only the tree, and only the plain branches, got right.
    only_tree: usize,
    only_plain: usize,
    /// Of all nodes: ended as duplicates, pruned, leaves.
    nodes: [usize; 4],
}

#[derive(Default, serde::Serialize)]
struct Cell {
    right: Vec<bool>,
    accuracy: f64,
    interval: [f64; 2],
    /// Mean per problem.
    generated: f64,
    verify: f64,
    branches: f64,
    /// The most blocks of any problem, and the mean over problems; plain branches are only counted where all ran.
    blocks_peak: Option<usize>,
    blocks_mean: Option<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.select != Select::ScoreSqrtConf, "--select: use vote or majority; nothing is verified");
    let mut problems = arms::read(&args.engine, args.problems.as_slice(), args.limit)?;
    problems.retain(|p| p.answer.is_some());
    anyhow::ensure!(!problems.is_empty(), "--problems: none has an answer to compare with");
    let arms = arms(args)?;
    let mut engine = args.engine.open()?;
    let bar = progress(problems.len() * (arms.len() + 2));
    let mut solve = |config: &SolverConfig, cycles: usize| -> anyhow::Result<Vec<ProblemResult>> {
        let tasks = tasks(args, &engine, &problems, cycles)?;
        let mut results = Vec::with_capacity(tasks.len());
        for task in tasks.chunks(1) {
            engine.clear_prefix_cache()?; // what the problem before left there is no part of this one's peak
            engine.reset_counters();
            let mut take = |_, result| {
                results.push(result);
                Ok(())
            };
            Solver::new(&mut engine, config.clone())?.solve(task, &mut take)?;
            bar.inc(1);
        }
        Ok(results)
    };
    let budget = SolverConfig { num_branches: args.plain_branches, search: None, ..arms[0].clone() };
    let plain = solve(&budget, args.plain_branches.div_ceil(args.branches))?;
    let eight = solve(&SolverConfig { search: None, ..arms[0].clone() }, 1)?;
    let mut rows = Vec::new();
    for arm in &arms {
        let trees = solve(arm, 1)?;
        rows.push(Row::new(args, arm, &trees, &plain));
    }
    bar.finish_and_clear();
    let eight = Cell::of(&eight, &mut |r| (r.correct == Some(true), r.branches.len()));
    if args.json {
        print_json(&serde_json::json!({
            "bench": "tree", "model": engine.info().name, "dtype": engine.info().dtype, "device": engine.info().device,
            "cpu": cpu_model(), "problems": problems.len(), "config": arms[0], "plain": eight, "rows": rows,
        }))
    } else {
        print(args, &rows, &eight, problems.len())
    }
}

/// The trees, depth 1 once: it has nothing that a beam could choose from.
fn arms(args: &Args) -> anyhow::Result<Vec<SolverConfig>> {
    anyhow::ensure!(!args.depths.is_empty() && !args.beams.is_empty(), "--depths and --beams: need at least one each");
    let score: StepScore = args.score.into();
    let mut arms = Vec::new();
    for &depth in &args.depths {
        for &beam in if depth == 1 { &args.beams[..1] } else { &args.beams[..] } {
            let config = SolverConfig {
                num_branches: args.branches,
                verify: VerifyMode::Off,
                select: args.select,
                sampling: SamplingParams { temperature: args.temperature, seed: args.seed, ..Default::default() },
                search: Some(SearchConfig { depth, beam, score, min_score: None }),
                ..SolverConfig::preset(Policy::Exact)
            };
            config.validate()?;
            arms.push(config);
        }
    }
    Ok(arms)
}

/// The problems, the pack's approaches `cycles` times over.
fn tasks(args: &Args, engine: &Engine, problems: &[Problem], cycles: usize) -> anyhow::Result<Vec<Box<dyn Task>>> {
    let mut pack = args.engine.source().prompt_pack(None)?;
    let one = pack.approaches.clone();
    anyhow::ensure!(one.len() >= args.branches, "-B: the prompt pack has {} approaches", one.len());
    pack.approaches = one[..args.branches].iter().cycle().take(args.branches * cycles).cloned().collect();
    text_tasks(&compile_pack(&args.engine, engine, pack, "")?, problems)
}

impl Row {
    fn new(args: &Args, arm: &SolverConfig, trees: &[ProblemResult], plain: &[ProblemResult]) -> Self {
        let (depth, beam) = arm.search.as_ref().map_or((1, 1), |s| (s.depth, s.beam));
        let tree = Cell::of(trees, &mut |r| (r.correct == Some(true), r.branches.len()));
        let mut trees_left = trees.iter();
        let mut used = Vec::new();
        let mut plain = Cell::of(plain, &mut |r| {
            let budget = trees_left.next().map_or(0, generated);
            let n = nearest(r, budget);
            used.push(r.branches[..n].iter().map(|b| b.tokens.len()).sum::<usize>());
            (is_right(args.select, r, n), n)
        });
        plain.generated = mean(used.into_iter());
        (plain.blocks_peak, plain.blocks_mean) = (None, None);
        let count = |is: fn(NodeEnd) -> bool| trees.iter().flat_map(|r| &r.tree).filter(|n| is(n.ended)).count();
        let nodes = [
            trees.iter().map(|r| r.tree.len()).sum(),
            count(|e| matches!(e, NodeEnd::Duplicate(_))),
            count(|e| e == NodeEnd::Pruned),
            trees.iter().map(|r| r.branches.len()).sum(),
        ];
        let only = |a: &Cell, b: &Cell| a.right.iter().zip(&b.right).filter(|(a, b)| **a && !**b).count();
        let (only_tree, only_plain) = (only(&tree, &plain), only(&plain, &tree));
        Self { depth, beam: (depth > 1).then_some(beam), only_tree, only_plain, tree, plain, nodes }
    }
}

impl Cell {
    fn of(results: &[ProblemResult], right: &mut dyn FnMut(&ProblemResult) -> (bool, usize)) -> Self {
        let judged: Vec<(bool, usize)> = results.iter().map(right).collect();
        let num_right = judged.iter().filter(|(right, _)| *right).count();
        Self {
            accuracy: num_right as f64 / results.len().max(1) as f64,
            interval: wilson(num_right, results.len()),
            generated: mean(results.iter().map(generated)),
            verify: mean(results.iter().map(|r| r.tokens.verify as usize)),
            branches: mean(judged.iter().map(|j| j.1)),
            blocks_peak: results.iter().map(|r| r.blocks_peak).max(),
            blocks_mean: Some(mean(results.iter().map(|r| r.blocks_peak))),
            right: judged.into_iter().map(|j| j.0).collect(),
        }
    }
}

/// Tokens of every node ever made, or of every branch where there is no tree.
fn generated(r: &ProblemResult) -> usize {
    if r.tree.is_empty() {
        return r.branches.iter().map(|b| b.tokens.len()).sum();
    }
    r.tree.iter().map(|n| n.tokens).sum()
}

/// How many of the first branches, at least one, generated the number of tokens nearest to `budget`.
fn nearest(r: &ProblemResult, budget: usize) -> usize {
    let mut sum = 0;
    let sums = r.branches.iter().map(|b| {
        sum += b.tokens.len();
        sum
    });
    sums.enumerate().min_by_key(|(_, sum)| sum.abs_diff(budget)).map_or(0, |(i, _)| i + 1)
}

/// Whether the first `n` branches choose the right answer.
fn is_right(rule: Select, r: &ProblemResult, n: usize) -> bool {
    let ballot = |b: &rksc::report::BranchResult| Ballot {
        answer: b.answer.clone(),
        confidence: b.confidence,
        score: b.score,
        votes: b.votes,
    };
    let ballots: Vec<Ballot> = r.branches[..n].iter().map(ballot).collect();
    let answer = select(rule, &ballots).and_then(|i| ballots[i].answer.as_deref());
    matches!((answer, r.expected.as_deref()), (Some(a), Some(e)) if same_answer(a, e))
}

fn mean(values: impl Iterator<Item = usize>) -> f64 {
    let (sum, n) = values.fold((0, 0usize), |(sum, n), x| (sum + x, n + 1));
    sum as f64 / n.max(1) as f64
}

fn print(args: &Args, rows: &[Row], eight: &Cell, problems: usize) -> anyhow::Result<()> {
    let right = |c: &Cell| {
        let [lo, hi] = c.interval.map(|x| x * 100.0);
        format!("{:.1} % ({lo:.1} to {hi:.1})", c.accuracy * 100.0)
    };
    let mut table = Table::new(&[
        "tree",
        "right (95 %)",
        "tokens",
        "verify",
        "leaves",
        "peak",
        "duplicates",
        "pruned",
        "plain",
        "right (95 %)",
        "tokens",
        "only tree",
        "only plain",
    ]);
    for r in rows {
        let share = |n: usize| format!("{:.0} %", n as f64 * 100.0 / r.nodes[0].max(1) as f64);
        table.row(vec![
            r.beam.map_or(format!("D={}", r.depth), |k| format!("D={} K={k}", r.depth)),
            right(&r.tree),
            format!("{:.0}", r.tree.generated),
            format!("{:.0}", r.tree.verify),
            format!("{:.1}", r.tree.branches),
            r.tree.blocks_peak.unwrap_or(0).to_string(),
            share(r.nodes[1]),
            share(r.nodes[2]),
            format!("{:.1}", r.plain.branches),
            right(&r.plain),
            format!("{:.0}", r.plain.generated),
            r.only_tree.to_string(),
            r.only_plain.to_string(),
        ]);
    }
    table.print()?;
    say!(
        "{problems} problems, temperature {}; plain B={}: {}, {:.0} tokens, peak {}",
        args.temperature,
        args.branches,
        right(eight),
        eight.generated,
        eight.blocks_peak.unwrap_or(0)
    );
    say!(
        "tokens: generated, mean per problem; plain: as many branches as generated the tokens of the tree beside them"
    );
    Ok(())
}

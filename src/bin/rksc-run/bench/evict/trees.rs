//! Problems solved as trees, in half the cache that they need.

use std::time::Instant;

use rksc::kv::eviction::Eviction;
use rksc::report::ProblemResult;
use rksc::solver::task::Task;
use rksc::solver::{Policy, SearchConfig, Solver, SolverConfig, StepScore, VerifyMode};
use rksc::testing::clairvoyant::{Visit, fewest_recomputed};
use rksc::{Engine, Error};

use super::{Args, Arm, block_bytes, print_arms};

/// All policies on the same trees.
#[derive(serde::Serialize)]
pub(super) struct Report {
    problems: usize,
    depth: usize,
    beam: usize,
    branches: usize,
    concurrency: usize,
    nodes: usize,
    /// Blocks in which no branch has to give way.
    need: usize,
    /// Half of them.
    blocks: usize,
    /// Tokens computed again by whoever knows the trees and expands one node at a time, level by level; `None` where a
    /// node alone does not fit.
    bound: Option<u64>,
    arms: Vec<Arm>,
}

/// One way to run the trees.
#[derive(Clone, Copy)]
struct Setting {
    blocks: usize,
    eviction: Eviction,
    concurrency: usize,
}

pub(super) fn run(args: &Args, model: &Engine, tasks: &[Box<dyn Task>]) -> anyhow::Result<Option<Report>> {
    let tasks = &tasks[..args.tree_problems.min(tasks.len())];
    if tasks.is_empty() {
        return Ok(None);
    }
    let trees = Trees { args, tasks, block_bytes: block_bytes(model) };
    let concurrency = args.concurrency;
    let need = trees.need()?;
    let (arm, expected) = trees.solve("its need", Setting { blocks: need, eviction: Eviction::Lru, concurrency })?;
    let mut arms = vec![arm];
    let blocks = need / 2;
    let one = ("one at a time", Setting { blocks, eviction: Eviction::Lru, concurrency: 1 });
    let each = Eviction::ALL.map(|eviction| (eviction.name(), Setting { blocks, eviction, concurrency }));
    for (name, setting) in std::iter::once(one).chain(each) {
        eprintln!("trees, {name}");
        let (arm, results) = trees.solve(name, setting)?;
        for (got, expected) in results.iter().zip(&expected) {
            let tokens = |r: &ProblemResult| r.branches.iter().map(|b| b.tokens.clone()).collect::<Vec<_>>();
            anyhow::ensure!(tokens(got) == tokens(expected), "{name}: other tokens for {}", got.id);
        }
        arms.push(arm);
    }
    let block_size = model.config().block_size;
    let visits = visits(tasks, &expected, block_size)?;
    Ok(Some(Report {
        problems: tasks.len(),
        depth: args.depth,
        beam: args.beam,
        branches: args.branches,
        concurrency,
        nodes: expected.iter().map(|r| r.tree.len()).sum(),
        need,
        blocks,
        bound: fewest_recomputed(&visits, blocks).map(|n| n * block_size as u64),
        arms,
    }))
}

struct Trees<'a> {
    args: &'a Args,
    tasks: &'a [Box<dyn Task>],
    block_bytes: u64,
}

impl Trees<'_> {
    /// Solves every problem; the results in the order of the problems.
    fn solve(&self, name: &str, setting: Setting) -> anyhow::Result<(Arm, Vec<ProblemResult>)> {
        let mut config = SolverConfig::preset(Policy::Exact);
        config.verify = VerifyMode::Off;
        config.num_branches = self.args.branches;
        config.concurrency = setting.concurrency;
        config.cold_cache = false;
        config.sampling.temperature = 0.7;
        config.search = Some(SearchConfig {
            depth: self.args.depth,
            beam: self.args.beam,
            score: StepScore::Confidence,
            min_score: None,
        });
        let mut engine = Engine::open(self.args.config(setting.blocks, self.block_bytes, setting.eviction))?;
        let mut results: Vec<(usize, ProblemResult)> = Vec::new();
        let mut take = |idx, result| {
            results.push((idx, result));
            Ok(())
        };
        let started = Instant::now();
        Solver::new(&mut engine, config)?.solve(self.tasks, &mut take)?;
        let seconds = started.elapsed().as_secs_f64();
        results.sort_by_key(|(idx, _)| *idx);
        Ok((Arm::new(name, &engine.engine_stats(), seconds), results.into_iter().map(|(_, r)| r).collect()))
    }

    /// The smallest cache in which no branch gives way, by halving.
    fn need(&self) -> anyhow::Result<usize> {
        let is_enough = |blocks: usize| {
            eprintln!("trees, {blocks} blocks");
            let setting = Setting { blocks, eviction: Eviction::Lru, concurrency: self.args.concurrency };
            match self.solve("", setting) {
                Ok((arm, _)) => Ok(arm.preemptions == 0),
                Err(e) if matches!(e.downcast_ref(), Some(Error::OutOfBlocks { .. })) => Ok(false),
                Err(e) => Err(e),
            }
        };
        let mut enough = 64;
        while !is_enough(enough)? {
            enough *= 2;
        }
        let mut too_few = enough / 2;
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            *if is_enough(middle)? { &mut enough } else { &mut too_few } = middle;
        }
        Ok(enough)
    }
}

/// The nodes of every tree, one at a time in order of creation (level by level), problem after problem.
fn visits(tasks: &[Box<dyn Task>], results: &[ProblemResult], block_size: usize) -> anyhow::Result<Vec<Visit>> {
    let mut visits = Vec::new();
    for (p, (task, result)) in tasks.iter().zip(results).enumerate() {
        let id = |owner: usize, block: usize| ((p as u64) << 48) | ((owner as u64) << 24) | block as u64;
        let root_len = task.root().len();
        let root: Vec<u64> = (0..root_len.div_ceil(block_size)).map(|i| id(0, i)).collect();
        visits.push(Visit { read: Vec::new(), left: root.clone(), held: root.len() });
        // Of each node: its blocks in path order, and where it ends.
        let mut paths: Vec<(Vec<u64>, usize)> = Vec::with_capacity(result.tree.len());
        for node in &result.tree {
            let (parent, start, given) = match node.parent {
                Some(parent) => (&paths[parent].0, paths[parent].1, 0),
                None => (&root, root_len, task.branch(node.branch)?.len()),
            };
            let end = start + given + node.tokens;
            let own = (start / block_size..end.div_ceil(block_size)).map(|i| id(node.node + 1, i));
            let path: Vec<u64> = parent[..start / block_size].iter().copied().chain(own.clone()).collect();
            // Its parent's tail stays with the parent, for the next child.
            let left: Vec<u64> = parent.iter().copied().chain(own).collect();
            visits.push(Visit { read: parent.clone(), held: left.len(), left });
            paths.push((path, end));
        }
    }
    Ok(visits)
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!(
            "trees | {} problems, {} at a time | depth {}, beam {}, {} branches | {} nodes | {} blocks of {} needed",
            self.problems,
            self.concurrency,
            self.depth,
            self.beam,
            self.branches,
            self.nodes,
            self.blocks,
            self.need
        );
        let bound = self.bound.map(|b| Arm { name: "bound".into(), tokens_recomputed: b, ..Default::default() });
        print_arms(&[bound.as_slice(), &self.arms].concat())?;
        Ok(())
    }
}

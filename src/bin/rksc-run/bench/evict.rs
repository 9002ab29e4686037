//! `rksc-run bench evict`: what each eviction policy computes again, beside what cannot be avoided.
//!
//! *prefixes*: a few long prefixes are revisited in a skewed order, one request at a time, in a cache for some of them.
//! *trees*: problems are solved as trees in half the cache that they need.

mod prefixes;
mod trees;

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::config::EngineConfig;
use rksc::engine::EngineStats;
use rksc::kv::eviction::Eviction;
use rksc::problems::read_problems;
use rksc::solver::task::Task;

use super::Table;
use crate::common::{EngineArgs, print_json};
use crate::solve::{compile_pack, text_tasks};

/// What each eviction policy computes again, on the same work in the same memory.
///
/// PREFIXES: requests come one at a time; each is one of a few prefixes, drawn with Zipf's weights, and a question of its
/// own. BOUND is the fewest tokens that anybody computes again who knows all requests beforehand and serves them in this
/// order with as many blocks. IN TURN serves all requests of one prefix before the next: nothing is computed again that
/// fits at all, for whoever may choose the order.
///
/// TREES: problems are solved as trees with half the blocks that they need so that no branch gives way. BOUND: what is
/// computed again by whoever knows which nodes will be kept and expands one node at a time, level by level and problem
/// after problem. ONE AT A TIME is the engine with one problem in flight.
///
/// Answers do not depend on the policy; the command fails if they do.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Problem file to make prefixes and questions of [default: the bundled problems].
    #[arg(long, value_name = "FILE")]
    problems: Option<PathBuf>,
    /// Different prefixes.
    #[arg(long, value_name = "N", default_value_t = 6)]
    prefixes: usize,
    /// Tokens of a prefix.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    prefix_tokens: usize,
    /// Prefixes that the cache holds.
    #[arg(long, value_name = "X", default_value_t = 2.5)]
    pool: f64,
    /// Requests; 0 leaves the prefixes out.
    #[arg(long, value_name = "N", default_value_t = 200)]
    requests: usize,
    /// Tokens generated for each.
    #[arg(long, value_name = "N", default_value_t = 32)]
    new_tokens: usize,
    /// The i-th prefix is drawn with weight 1 / i^S.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    skew: f64,
    /// First seed of the order of requests.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Orders, each with the next seed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    orders: u64,
    /// Problems solved as trees; 0 leaves the trees out.
    #[arg(long, value_name = "N", default_value_t = 12)]
    tree_problems: usize,
    /// Levels of a tree.
    #[arg(long, default_value_t = 4)]
    depth: usize,
    /// Nodes kept of a level.
    #[arg(long, default_value_t = 4)]
    beam: usize,
    /// Children of a node.
    #[arg(short = 'B', long, default_value_t = 4)]
    branches: usize,
    /// Trees in flight.
    #[arg(long, value_name = "N", default_value_t = 4)]
    concurrency: usize,
    /// Decode passes from one measurement of attention mass to the next.
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().mass_every)]
    mass_every: usize,
    /// What a measurement leaves of the mass before it.
    #[arg(long, value_name = "X", default_value_t = EngineConfig::default().mass_decay)]
    mass_decay: f64,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// The engine's flags with a cache of `blocks` and a policy; the command chooses both.
    fn config(&self, blocks: usize, block_bytes: u64, eviction: Eviction) -> EngineConfig {
        EngineConfig {
            kv_cache_memory: Some(blocks as u64 * block_bytes),
            eviction,
            mass_every: self.mass_every,
            mass_decay: self.mass_decay,
            ..self.engine.config()
        }
    }
}

/// One run of the same work.
#[derive(Clone, Debug, Default, serde::Serialize)]
struct Arm {
    name: String,
    blocks: usize,
    tokens_recomputed: u64,
    tokens_computed: u64,
    tokens_from_cache: u64,
    preemptions: u64,
    blocks_evicted: u64,
    bytes_evicted: u64,
    seconds: f64,
}

impl Arm {
    fn new(name: &str, stats: &EngineStats, seconds: f64) -> Self {
        Self {
            name: name.into(),
            blocks: stats.blocks,
            tokens_recomputed: stats.tokens_recomputed,
            tokens_computed: stats.tokens_computed,
            tokens_from_cache: stats.tokens_from_cache,
            preemptions: stats.preemptions,
            blocks_evicted: stats.blocks_evicted,
            bytes_evicted: stats.bytes_evicted,
            seconds,
        }
    }

    /// Adds the figures of another order.
    fn add(&mut self, other: &Self) {
        self.tokens_recomputed += other.tokens_recomputed;
        self.tokens_computed += other.tokens_computed;
        self.tokens_from_cache += other.tokens_from_cache;
        self.preemptions += other.preemptions;
        self.blocks_evicted += other.blocks_evicted;
        self.bytes_evicted += other.bytes_evicted;
        self.seconds += other.seconds;
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.orders >= 1, "--orders: must be at least 1");
    let source = args.engine.source();
    let problems = match &args.problems {
        Some(path) => read_problems(path)?,
        None => source.sample_problems()?,
    };
    let engine = args.engine.open()?;
    let pack = compile_pack(&args.engine, &engine, source.prompt_pack(None)?, "")?;
    let tasks = text_tasks(&pack, &problems)?;
    let prefixes = prefixes::run(args, &engine, &tasks)?;
    let trees = trees::run(args, &engine, &tasks)?;
    if args.json {
        return print_json(&serde_json::json!({
            "bench": "evict", "model": engine.info().name, "device": engine.info().device,
            "mass_every": args.mass_every, "mass_decay": args.mass_decay, "prefixes": prefixes,
            "trees": trees,
        }));
    }
    prefixes.map_or(Ok(()), |prefixes| prefixes.print())?;
    trees.map_or(Ok(()), |trees| trees.print())
}

/// Bytes of one block of the engine's cache.
fn block_bytes(engine: &Engine) -> u64 {
    engine.config().block_size as u64 * engine.info().kv_bytes_per_token
}

/// A line an arm.
fn print_arms(arms: &[Arm]) -> std::io::Result<()> {
    let header = ["", "recomputed", "computed", "from cache", "preemptions", "blocks evicted", "MB evicted", "s"];
    let mut table = Table::new(&header);
    for arm in arms {
        table.row(vec![
            arm.name.clone(),
            arm.tokens_recomputed.to_string(),
            arm.tokens_computed.to_string(),
            arm.tokens_from_cache.to_string(),
            arm.preemptions.to_string(),
            arm.blocks_evicted.to_string(),
            format!("{:.1}", arm.bytes_evicted as f64 / 1e6),
            format!("{:.1}", arm.seconds),
        ]);
    }
    table.print()
}

/// The prompt of a task's branch `idx`.
fn prompt(task: &dyn Task, idx: usize) -> rksc::Result<Vec<u32>> {
    Ok([task.root(), task.branch(idx)?].concat())
}

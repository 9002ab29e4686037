//! Long prefixes revisited in a skewed order, one request at a time.

use std::time::Instant;

use rksc::Engine;
use rksc::engine::{GenerateParams, PrefillOptions};
use rksc::kv::eviction::Eviction;
use rksc::solver::task::Task;
use rksc::testing::clairvoyant::{Trace, fewest_recomputed};
use rksc::testing::fill::Fill;

use super::{Args, Arm, block_bytes, print_arms, prompt};

/// All orders together.
#[derive(serde::Serialize)]
pub(super) struct Report {
    orders: u64,
    first_seed: u64,
    blocks: usize,
    /// Tokens that nobody avoids to compute again who serves the requests in their order.
    bound: u64,
    arms: Vec<Arm>,
    /// Tokens computed again by order: the bound, then each arm.
    by_order: Vec<Vec<u64>>,
}

struct Request {
    prefix: usize,
    tokens: Vec<u32>,
}

pub(super) fn run(args: &Args, model: &Engine, tasks: &[Box<dyn Task>]) -> anyhow::Result<Option<Report>> {
    if args.requests == 0 {
        return Ok(None);
    }
    anyhow::ensure!(args.prefixes >= 1, "--prefixes: must be at least 1");
    anyhow::ensure!(args.new_tokens >= 1, "--new-tokens: must be at least 1");
    anyhow::ensure!(args.skew.is_finite() && args.skew >= 0.0, "--skew: must be 0 or more");
    let block_size = model.config().block_size;
    let blocks = (args.pool * args.prefix_tokens.div_ceil(block_size) as f64) as usize;
    let mut report =
        Report { orders: args.orders, first_seed: args.seed, blocks, bound: 0, arms: Vec::new(), by_order: Vec::new() };
    for seed in args.seed..args.seed + args.orders {
        let requests = requests(args, tasks, seed)?;
        let (bound, arms) = one_order(args, model, &requests, blocks)?;
        report.bound += bound;
        report.by_order.push(std::iter::once(bound).chain(arms.iter().map(|a| a.tokens_recomputed)).collect());
        if report.arms.is_empty() {
            report.arms = arms;
        } else {
            report.arms.iter_mut().zip(&arms).for_each(|(sum, arm)| sum.add(arm));
        }
    }
    Ok(Some(report))
}

/// The bound and every arm on the same requests.
fn one_order(args: &Args, model: &Engine, requests: &[Request], blocks: usize) -> anyhow::Result<(u64, Vec<Arm>)> {
    let block_bytes = block_bytes(model);
    let order: Vec<usize> = (0..requests.len()).collect();
    let mut in_turn = order.clone();
    in_turn.sort_by_key(|&i| requests[i].prefix);
    let longest = requests.iter().map(|r| r.tokens.len() + args.new_tokens).max().unwrap_or(0);
    let one = longest.div_ceil(model.config().block_size) + 1;
    anyhow::ensure!(one <= blocks, "--pool: one request takes {one} blocks; {blocks} are too few");
    let all = requests.len() * one;
    let mut arms = Vec::new();
    let (arm, expected) = serve(args, requests, &order, "no limit", (all, block_bytes, Eviction::Lru))?;
    arms.push(arm);
    let turns = std::iter::once(("in turn", &in_turn, Eviction::Lru));
    for (name, order, eviction) in turns.chain(Eviction::ALL.map(|e| (e.name(), &order, e))) {
        eprintln!("{name}");
        let (arm, answers) = serve(args, requests, order, name, (blocks, block_bytes, eviction))?;
        anyhow::ensure!(answers == expected, "{name}: other tokens than without a limit");
        arms.push(arm);
    }
    let mut trace = Trace::new(model.config().block_size);
    for (request, tokens) in requests.iter().zip(&expected) {
        trace.push(tokens, request.tokens.len());
    }
    let Some(bound) = fewest_recomputed(trace.visits(), blocks) else {
        anyhow::bail!("--pool: one request takes more than {blocks} blocks");
    };
    Ok((bound * model.config().block_size as u64, arms))
}

/// Serves the requests in `order`, one at a time. The tokens come back in the requests' own order.
fn serve(
    args: &Args,
    requests: &[Request],
    order: &[usize],
    name: &str,
    (blocks, block_bytes, eviction): (usize, u64, Eviction),
) -> anyhow::Result<(Arm, Vec<Vec<u32>>)> {
    let mut engine = Engine::open(args.config(blocks, block_bytes, eviction))?;
    let mut answers = vec![Vec::new(); requests.len()];
    let started = Instant::now();
    for &i in order {
        let branch = engine.prefill(&requests[i].tokens, PrefillOptions::default())?;
        engine.start(branch, GenerateParams { max_new_tokens: args.new_tokens, ..Default::default() })?;
        while engine.has_work() {
            engine.step()?;
        }
        while engine.next_event().is_some() {}
        answers[i] = engine.tokens(branch)?.to_vec();
        engine.prune(branch)?;
    }
    Ok((Arm::new(name, &engine.engine_stats(), started.elapsed().as_secs_f64()), answers))
}

/// Which prefix each request has is drawn with Zipf's weights; its question is the next problem with the next approach.
fn requests(args: &Args, tasks: &[Box<dyn Task>], seed: u64) -> anyhow::Result<Vec<Request>> {
    anyhow::ensure!(!tasks.is_empty(), "--problems: needs at least one");
    let mut rng = Fill::new(seed);
    let prefixes: Vec<Vec<u32>> =
        (0..args.prefixes).map(|i| prefix(args, tasks, i, &mut rng)).collect::<rksc::Result<_>>()?;
    let weights: Vec<f64> = (1..=args.prefixes).map(|i| (i as f64).powf(-args.skew)).collect();
    let sum: f64 = weights.iter().sum();
    let num_approaches = (0..args.requests).take_while(|&b| tasks[0].branch(b).is_ok()).count().max(1);
    let request = |i: usize| {
        let mut left = (f64::from(rng.unit()) + 1.0) / 2.0 * sum;
        let drawn = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        let prefix = drawn.unwrap_or(args.prefixes - 1);
        // More requests than questions and approaches: they come again.
        let question = prompt(tasks[i % tasks.len()].as_ref(), i / tasks.len() % num_approaches)?;
        Ok(Request { prefix, tokens: [prefixes[prefix].as_slice(), &question].concat() })
    };
    (0..args.requests).map(request).collect()
}

/// Problems in a drawn order, cut to length. The first differs from prefix to prefix, so that none shares a block.
fn prefix(args: &Args, tasks: &[Box<dyn Task>], idx: usize, rng: &mut Fill) -> rksc::Result<Vec<u32>> {
    let mut tokens = prompt(tasks[idx % tasks.len()].as_ref(), idx / tasks.len())?;
    while tokens.len() < args.prefix_tokens {
        let task = &tasks[rng.below(tasks.len())];
        tokens.extend(prompt(task.as_ref(), rng.below(4))?);
    }
    tokens.truncate(args.prefix_tokens);
    Ok(tokens)
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!("prefixes | {} blocks | {} orders from seed {}", self.blocks, self.orders, self.first_seed);
        let bound = Arm { name: "bound".into(), tokens_recomputed: self.bound, ..Default::default() };
        print_arms(&[std::slice::from_ref(&bound), &self.arms].concat())?;
        Ok(())
    }
}

//! A pool that holds one problem and a tenth, and eight problems in it: every policy finishes them, and nothing that
//! is evicted changes an answer.

mod common;

use common::*;
use rksc::engine::{Engine, EngineStats};
use rksc::kv::eviction::Eviction;
use rksc::report::ProblemResult;
use rksc::solver::task::Task;
use rksc::solver::{Policy, Solver, SolverConfig};

const NUM_PROBLEMS: usize = 8;

fn solve(engine: &mut Engine, concurrency: usize, tasks: &[Box<dyn Task>]) -> Vec<ProblemResult> {
    let config = SolverConfig { concurrency, ..SolverConfig::preset(Policy::Exact) };
    let mut results: Vec<(usize, ProblemResult)> = Vec::new();
    let mut take = |idx, result| {
        results.push((idx, result));
        Ok(())
    };
    Solver::new(engine, config).unwrap().solve(tasks, &mut take).unwrap();
    engine.check_integrity().unwrap();
    results.sort_by_key(|(idx, _)| *idx);
    results.into_iter().map(|(_, r)| r).collect()
}

/// Blocks that the largest problem takes on its own.
fn need(engine: &mut Engine, tasks: &[Box<dyn Task>]) -> usize {
    let mut most = 0;
    for task in tasks.chunks(1) {
        engine.clear_prefix_cache().unwrap();
        engine.reset_counters();
        solve(engine, 1, task);
        most = most.max(engine.engine_stats().blocks_peak);
    }
    most
}

#[test]
fn a_pool_of_one_problem_and_a_tenth_finishes_eight_under_every_policy() {
    let tasks = tasks(&problems("dev", NUM_PROBLEMS), "");
    let mut huge = engine(|_| {});
    let need = need(&mut huge, &tasks);
    let blocks = need * 11 / 10;
    huge.reset_counters();
    let expected = solve(&mut huge, NUM_PROBLEMS, &tasks);
    let stats = huge.engine_stats();
    assert_eq!((stats.preemptions, stats.blocks_evicted, stats.tokens_recomputed), (0, 0, 0));
    let undisturbed = stats.tokens_computed;
    for eviction in Eviction::ALL {
        let mut tight = engine(|c| {
            c.kv_cache_memory = Some(blocks as u64 * 16 * huge.info().kv_bytes_per_token);
            c.eviction = eviction;
        });
        assert_eq!(tight.engine_stats().blocks, blocks);
        let got = solve(&mut tight, NUM_PROBLEMS, &tasks);
        let stats = tight.engine_stats();
        println!("{eviction}: {blocks} blocks for a need of {need}, {stats:?}");
        assert_eq!(got.len(), NUM_PROBLEMS);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!((&got.id, &got.answer), (&expected.id, &expected.answer), "{eviction}");
            for (got, expected) in got.branches.iter().zip(&expected.branches) {
                assert!(got.tokens == expected.tokens && got.score == expected.score, "{eviction}: another branch");
            }
        }
        check_costs(&stats, undisturbed, blocks);
    }
}

/// The pool was too small, and every token more than the undisturbed run's was one that had been evicted.
fn check_costs(stats: &EngineStats, undisturbed: u64, blocks: usize) {
    assert!(stats.preemptions > 0 && stats.blocks_evicted > 0, "the pool was not tight: {stats:?}");
    assert!(stats.blocks_peak <= blocks);
    assert_eq!(stats.bytes_evicted % stats.blocks_evicted, 0);
    let more = stats.tokens_computed as i64 - undisturbed as i64;
    assert!(stats.tokens_recomputed > 0 && more <= stats.tokens_recomputed as i64, "{more} more: {stats:?}");
}

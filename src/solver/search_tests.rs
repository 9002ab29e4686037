//! The search between two steps of the engine: blocks, votes and errors in the middle of a tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::beam::{SearchConfig, StepScore};
use super::search::Search;
use super::task::{CompiledPack, Task, TextTask};
use super::{Policy, SolverConfig, VerifyMode};
use crate::config::{EngineConfig, ModelSource};
use crate::engine::{BranchId, Engine, EventKind};
use crate::error::{Error, Result};

const BLOCK: usize = 16;

fn engine() -> Engine {
    let config =
        EngineConfig { model: ModelSource::Bundled, kv_cache_memory: Some(16 << 20), threads: 1, ..Default::default() };
    Engine::open(config).unwrap()
}

fn tasks(engine: &Engine) -> Vec<TextTask> {
    let source = ModelSource::Bundled;
    let end_tokens = source.end_tokens(engine.model()).unwrap();
    let pack = source.prompt_pack(None).unwrap();
    let pack = Arc::new(CompiledPack::new(pack, Arc::new(source.tokenizer().unwrap()), "", &end_tokens).unwrap());
    source.sample_problems().unwrap().into_iter().map(|p| TextTask::new(Arc::clone(&pack), p).unwrap()).collect()
}

fn config(depth: usize, beam: usize, score: StepScore) -> SolverConfig {
    let search = Some(SearchConfig { depth, beam, score, min_score: None });
    let mut config = SolverConfig { verify: VerifyMode::Off, search, ..SolverConfig::preset(Policy::Exact) };
    config.sampling.temperature = 1.3;
    config
}

/// One pass of the engine, and what the search hears of it.
fn step(engine: &mut Engine, search: &mut Search) -> Result<()> {
    engine.step()?;
    let mine: Vec<BranchId> = search.branch_ids().collect();
    while let Some(event) = engine.next_event() {
        if !mine.contains(&event.branch) {
            continue;
        }
        match event.kind {
            EventKind::Token(token) => search.on_token(event.branch, &token),
            EventKind::Ended(reason) => search.on_ended(engine, event.branch, reason)?,
            EventKind::Ready => search.on_ready(engine, event.branch)?,
            EventKind::Preempted | EventKind::Aliased { .. } => {}
        }
    }
    Ok(())
}

/// What the level's nodes hold before it is closed: computed tokens, and where they left their parent's.
struct Held {
    computed: usize,
    forked_at: usize,
}

fn blocks_from(at: usize, to: usize) -> usize {
    to.div_ceil(BLOCK) - at / BLOCK
}

/// Drives a problem to its end. Whenever a level closes, the blocks in use must be exactly those of the nodes that are
/// left: the root's, each surviving node's own, and of their ancestors' what is not their own.
fn check_blocks(engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> usize {
    engine.clear_prefix_cache().unwrap();
    let root = task.root().len();
    let mut search = Search::start(engine, config, 0, task).unwrap();
    // Of every expanded node: its computed tokens, and where it left its own parent's.
    let mut expanded: BTreeMap<usize, (usize, Option<usize>)> = BTreeMap::new();
    let mut checked = 0;
    while !search.is_done() {
        step(engine, &mut search).unwrap();
        let Some(growth) = &search.growth else {
            search.advance(engine, config, task).unwrap();
            continue;
        };
        let depth = growth.depth;
        let forked_at = |parent: Option<usize>| parent.map_or(root, |p| expanded[&p].0);
        let held: BTreeMap<usize, (Held, Option<usize>)> = growth
            .level
            .iter()
            .map(|g| {
                let computed = engine.stats(g.candidate.id).unwrap().num_computed_tokens;
                (g.node, (Held { computed, forked_at: forked_at(g.parent) }, g.parent))
            })
            .collect();
        let leaves_before: usize = growth.leaves.len();
        search.advance(engine, config, task).unwrap();
        let Some(growth) = &search.growth else { continue };
        if growth.depth == depth {
            continue;
        }
        // Nodes whose blocks are still needed, each once: leaves of this level, parents of the next, their ancestors.
        let mut kept: Vec<usize> = growth.level.iter().filter_map(|g| g.parent).collect();
        kept.dedup();
        for &node in &kept {
            expanded.insert(node, (held[&node].0.computed, held[&node].1));
        }
        let mut alive: Vec<usize> = growth.leaves[leaves_before..].iter().map(|l| l.0).chain(kept).collect();
        if leaves_before > 0 {
            // Leaves of earlier levels are not looked at: the problem is left out.
            continue;
        }
        let mut used = root.div_ceil(BLOCK);
        let mut ancestors: Vec<usize> = Vec::new();
        for node in alive.drain(..) {
            let (Held { computed, forked_at }, parent) = &held[&node];
            used += blocks_from(*forked_at, *computed);
            let mut at = *parent;
            while let Some(p) = at.filter(|p| !ancestors.contains(p)) {
                ancestors.push(p);
                // An expanded node is gone: what is left of it are its whole blocks behind its own parent's.
                let (computed, parent) = expanded[&p];
                let from = parent.map_or(root, |q| expanded[&q].0);
                used += computed / BLOCK - from / BLOCK;
                at = parent;
            }
        }
        assert_eq!(engine.engine_stats().blocks_used, used, "{}, level {depth}", task.id());
        engine.check_integrity().unwrap();
        checked += 1;
    }
    let result = search.finish(engine, config, task).unwrap();
    assert!(!result.tree.is_empty());
    assert_eq!(engine.engine_stats().branches, 0);
    checked
}

#[test]
fn the_blocks_of_pruned_and_merged_nodes_are_free_within_the_step() {
    let mut engine = engine();
    for score in [StepScore::Confidence, StepScore::Both] {
        let config = config(4, 2, score);
        let checked: usize = tasks(&engine).iter().take(4).map(|t| check_blocks(&mut engine, &config, t)).sum();
        assert!(checked >= 6, "{checked} levels");
    }
}

#[test]
fn the_engine_counts_the_votes_that_the_search_does() {
    let mut engine = engine();
    let tasks = tasks(&engine);
    let mut config = config(3, 100, StepScore::Confidence);
    config.sampling.temperature = 0.2;
    let mut search = Search::start(&mut engine, &config, 0, &tasks[0]).unwrap();
    let mut most: f64 = 0.0;
    while !search.is_done() {
        step(&mut engine, &mut search).unwrap();
        search.advance(&mut engine, &config, &tasks[0]).unwrap();
        let growing = search.growth.iter().flat_map(|g| g.level.iter().map(|g| &g.candidate));
        for c in growing.chain(&search.run.branches) {
            assert_eq!(engine.stats(c.id).unwrap().votes, c.votes);
            most = most.max(c.votes);
        }
    }
    assert!(most > 8.0, "duplicates of duplicates: {most}");
    search.finish(&mut engine, &config, &tasks[0]).unwrap();
}

/// A failed step in any place of the tree, and a cancelled one: nothing stays in the engine.
#[test]
fn an_error_at_any_step_leaves_nothing_in_the_engine() {
    let mut engine = engine();
    let task = tasks(&engine).remove(1);
    let config = config(3, 2, StepScore::Both);
    for at in 0.. {
        let mut search = Search::start(&mut engine, &config, 0, &task).unwrap();
        let mut failed = false;
        for pass in 0.. {
            if search.is_done() {
                break;
            }
            let is_it = pass == at * 3;
            if is_it && at % 2 == 0 {
                engine.fail_allocation(0);
            } else if is_it {
                engine.cancel_flag().raise();
            }
            match step(&mut engine, &mut search) {
                Ok(()) => search.advance(&mut engine, &config, &task).unwrap(),
                Err(Error::OutOfMemory { .. } | Error::Cancelled) => {
                    failed = true;
                    break;
                }
                Err(other) => panic!("{other}"),
            }
        }
        search.abandon(&mut engine);
        engine.cancel_flag().clear();
        while engine.next_event().is_some() {}
        let stats = engine.engine_stats();
        assert_eq!((stats.branches, stats.blocks_used), (0, stats.blocks_cached), "pass {}", at * 3);
        engine.check_integrity().unwrap();
        if !failed {
            assert!(at > 8, "the tree was over after {} passes", at * 3);
            break;
        }
    }
}

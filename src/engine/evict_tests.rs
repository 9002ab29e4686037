//! Attention mass on its way from the pass to the blocks, the order it gives, and what eviction is counted to cost.

use super::*;
use crate::batch::{Batch, BatchSeq};
use crate::config::ModelSource;
use crate::kv::eviction::Eviction;

fn engine(num_blocks: u64, eviction: Eviction) -> Engine {
    let open = |bytes: u64| {
        let config = EngineConfig {
            model: ModelSource::Bundled,
            kv_cache_memory: Some(bytes),
            threads: 1,
            eviction,
            mass_decay: 1.0,
            ..Default::default()
        };
        Engine::open(config).unwrap()
    };
    open(num_blocks * 16 * open(1 << 20).info().kv_bytes_per_token)
}

fn tokens(from: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| 300 + (from + i * 7) % 400).collect()
}

fn uncached(e: &mut Engine, tokens: &[u32]) -> BranchId {
    e.prefill(tokens, PrefillOptions { use_prefix_cache: false, ..Default::default() }).unwrap()
}

fn run(e: &mut Engine) {
    while e.has_work() {
        e.step().unwrap();
    }
    e.check_integrity().unwrap();
}

fn start(e: &mut Engine, id: BranchId, max_new_tokens: usize) {
    e.start(id, GenerateParams { max_new_tokens, ..Default::default() }).unwrap();
}

/// By block of the branch's table.
fn masses(e: &Engine, id: BranchId) -> Vec<f64> {
    e.tree.get(id).unwrap().table.blocks().iter().map(|&b| e.evictor.mass.of(b)).collect()
}

fn assert_near(got: f64, want: f64) {
    assert!((got - want).abs() < 0.01 * want, "{got} instead of {want}");
}

/// A pass by hand: `lens` new rows each, in blocks of their own from block 0 on.
fn pass(e: &mut Engine, lens: &[usize], measures_mass: bool) -> Vec<f32> {
    let mut batch = Batch { measures_mass, ..Default::default() };
    for &len in lens {
        let (row, first) = (batch.token_ids.len(), batch.blocks.len());
        batch.token_ids.extend(tokens(row as u32, len as u32));
        batch.positions.extend(0..len as u32);
        batch.slots.extend((0..len as u32).map(|i| first as u32 * 16 + i));
        batch.blocks.extend((0..len.div_ceil(16)).map(|i| (first + i) as u32));
        batch.seqs.push(BatchSeq {
            rows: row..row + len,
            blocks: first..batch.blocks.len(),
            kv_len: len,
            accumulates_from: None,
        });
    }
    e.runner.run(&batch, &[], &[]).unwrap().mass
}

#[test]
fn a_measured_row_hands_out_one_per_query_head() {
    let mut e = engine(64, Eviction::Mass);
    let heads = e.model().num_q_heads as f64;
    assert!(pass(&mut e, &[37, 16], false).is_empty());
    let mass = pass(&mut e, &[37, 16, 1], true);
    assert_eq!(mass.len(), 3 + 1 + 1);
    assert!(mass.iter().all(|&m| m > 0.0), "{mass:?}");
    assert_near(mass[..3].iter().map(|&m| f64::from(m)).sum(), heads);
    assert_near(mass[3].into(), heads);
    // A row that sees itself alone gives itself all it has.
    assert_near(mass[4].into(), heads);
}

/// A branch of 48 tokens, and a fork of it that adds one: three blocks that the fork found.
fn family(e: &mut Engine) -> (BranchId, BranchId) {
    let root = uncached(e, &tokens(0, 48));
    let mut forks = [BranchId::default()];
    e.fork(root, &mut forks).unwrap();
    e.append(forks[0], &[400]).unwrap();
    (root, forks[0])
}

#[test]
fn only_who_finds_a_block_adds_to_its_mass() {
    let mut e = engine(64, Eviction::Mass);
    let heads = e.model().num_q_heads as f64;
    let root = uncached(&mut e, &tokens(0, 48));
    start(&mut e, root, 40);
    run(&mut e);
    assert_eq!(masses(&e, root), [0.0; 6], "its own rows add nothing");
    let (root, fork) = family(&mut e);
    run(&mut e);
    let mass = masses(&e, fork);
    assert_eq!(masses(&e, root), mass[..3]);
    assert_eq!(mass[3], 0.0);
    let found: f64 = mass.iter().sum();
    assert!(mass[..3].iter().all(|&m| m > 0.0) && found < heads, "{mass:?}");
    let mut again = [BranchId::default(); 3];
    e.fork(root, &mut again).unwrap();
    again.iter().for_each(|&b| e.append(b, &[400]).unwrap());
    run(&mut e);
    // Three more rows that see what the fork saw.
    assert_near(masses(&e, root).iter().sum(), 4.0 * found);
}

#[test]
fn mass_is_measured_where_a_prompt_ends_and_in_every_sixteenth_decode_pass() {
    let sum = |new: usize| {
        let mut e = engine(64, Eviction::Mass);
        let (root, fork) = family(&mut e);
        start(&mut e, fork, new);
        run(&mut e);
        masses(&e, root).iter().sum::<f64>()
    };
    let sums = [1, 16, 17, 32, 33].map(sum);
    assert!(sums[0] > 0.0 && sums[0] == sums[1], "{sums:?}");
    assert!(sums[2] > sums[1] && sums[2] == sums[3] && sums[4] > sums[3], "{sums:?}");
}

#[test]
fn other_policies_measure_nothing() {
    for eviction in [Eviction::Lru, Eviction::Fifo] {
        let mut e = engine(64, eviction);
        let (root, fork) = family(&mut e);
        start(&mut e, fork, 20);
        run(&mut e);
        assert_eq!(masses(&e, root), [0.0; 3]);
    }
}

#[test]
fn a_copied_tail_keeps_its_mass() {
    let mut e = engine(64, Eviction::Mass);
    let root = uncached(&mut e, &tokens(0, 37));
    run(&mut e);
    let tail = e.tree.get(root).unwrap().table.blocks()[2];
    e.evictor.mass.add(tail, 5.0);
    let mut forks = [BranchId::default(); 2];
    e.fork(root, &mut forks).unwrap();
    e.append(forks[0], &[400]).unwrap();
    run(&mut e);
    assert_eq!((masses(&e, root)[2], masses(&e, forks[0])[2]), (5.0, 5.0));
    assert_ne!(e.tree.get(forks[0]).unwrap().table.blocks()[2], tail);
}

#[test]
fn a_branch_that_gave_way_has_found_only_what_the_cache_still_had() {
    let mut e = engine(64, Eviction::Mass);
    let (root, fork) = family(&mut e);
    run(&mut e);
    assert_eq!(e.tree.get(fork).unwrap().num_found, 48);
    e.preempt(fork.index as usize).unwrap();
    e.append(fork, &[401]).unwrap();
    let before = masses(&e, root);
    run(&mut e);
    assert_eq!((masses(&e, root), masses(&e, fork)), (before, vec![0.0; 4]));
    let options = PrefillOptions::default();
    let cached = e.prefill(&tokens(0, 48), options).unwrap();
    run(&mut e);
    let again = e.prefill(&tokens(0, 48), options).unwrap();
    run(&mut e);
    assert_eq!(e.tree.get(again).unwrap().num_found, 32);
    let mass = masses(&e, cached);
    assert!(mass[0] > 0.0 && mass[1] > 0.0 && mass[2] == 0.0, "{mass:?}");
}

#[test]
fn the_least_attended_branch_gives_way_first() {
    let order = |eviction| {
        let mut e = engine(64, eviction);
        let ids: Vec<BranchId> = (0..4).map(|i| uncached(&mut e, &tokens(i * 50, 32))).collect();
        run(&mut e);
        for (i, worth) in [3.0, 90.0, 1.0, 2.0].into_iter().enumerate() {
            let blocks = e.tree.get(ids[i]).unwrap().table.blocks().to_vec();
            blocks.iter().for_each(|&b| e.evictor.mass.add(b, 100.0 * worth));
        }
        let holders = e.holders().unwrap();
        holders.iter().map(|h| ids.iter().position(|id| id.index as usize == h.branch).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(order(Eviction::Mass), [2, 3, 0, 1]);
    assert_eq!(order(Eviction::Lru), [3, 2, 1, 0]);
    assert_eq!(order(Eviction::Fifo), [3, 2, 1, 0]);
}

#[test]
fn a_branch_that_gave_way_is_computed_again_and_that_is_counted() {
    let mut e = engine(64, Eviction::Mass);
    let id = uncached(&mut e, &tokens(0, 37));
    run(&mut e);
    let block_bytes = e.layout.block_bytes(e.model.num_layers);
    e.reset_counters();
    e.preempt(id.index as usize).unwrap();
    let stats = e.engine_stats();
    assert_eq!((stats.blocks_evicted, stats.bytes_evicted), (3, 3 * block_bytes));
    e.append(id, &[400, 401]).unwrap();
    run(&mut e);
    let stats = e.engine_stats();
    assert_eq!((stats.tokens_computed, stats.tokens_recomputed), (39, 37));
    // Running the last token again to generate from it is no eviction's fault.
    start(&mut e, id, 2);
    run(&mut e);
    assert_eq!(e.engine_stats().tokens_recomputed, 37);
}

#[test]
fn a_fork_of_a_branch_that_gave_way_computes_its_share_again() {
    let mut e = engine(64, Eviction::Lru);
    let root = uncached(&mut e, &tokens(0, 37));
    run(&mut e);
    e.preempt(root.index as usize).unwrap();
    e.reset_counters();
    let mut forks = [BranchId::default(); 1];
    e.fork(root, &mut forks).unwrap();
    e.append(forks[0], &[400]).unwrap();
    run(&mut e);
    let stats = e.engine_stats();
    assert_eq!((stats.tokens_computed, stats.tokens_recomputed), (38, 37));
}

#[test]
fn what_the_prefix_cache_lost_is_counted_block_by_block_when_it_is_asked_for_again() {
    for eviction in Eviction::ALL {
        let mut e = engine(6, eviction);
        let ask = |e: &mut Engine, prompt: &[u32]| {
            let id = e.prefill(prompt, PrefillOptions::default()).unwrap();
            run(e);
            e.prune(id).unwrap();
            e.engine_stats()
        };
        let (a, b) = (tokens(0, 50), tokens(50, 50));
        let stats = ask(&mut e, &a);
        assert_eq!((stats.tokens_recomputed, stats.blocks_evicted, stats.blocks_cached), (0, 0, 3));
        // Four blocks for b, three are free: one of a's goes.
        let stats = ask(&mut e, &b);
        assert_eq!((stats.tokens_recomputed, stats.blocks_evicted, stats.blocks_cached), (0, 1, 5));
        let stats = ask(&mut e, &a);
        assert_eq!((stats.tokens_recomputed, stats.tokens_from_cache), (16, 32), "{eviction}");
    }
}

//! Attention mass on its way from the pass to the blocks, the order it gives, and what eviction is counted to cost.

use super::*;
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

#[test]
fn a_measured_row_hands_out_one_per_query_head() {
    let mut e = engine(64, Eviction::Mass);
    let heads = e.model().num_q_heads as f64;
    let id = uncached(&mut e, &tokens(0, 37));
    run(&mut e);
    let mass = masses(&e, id);
    assert_eq!(mass.len(), 3);
    assert!(mass.iter().all(|&m| m > 0.0), "{mass:?}");
    assert_near(mass.iter().sum(), heads);
}

#[test]
fn mass_is_measured_where_a_prompt_ends_and_in_every_sixteenth_decode_pass() {
    for (new, measurements) in [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3)] {
        let mut e = engine(64, Eviction::Mass);
        let heads = e.model().num_q_heads as f64;
        let id = uncached(&mut e, &tokens(0, 37));
        start(&mut e, id, new);
        run(&mut e);
        assert_near(masses(&e, id).iter().sum(), heads * f64::from(measurements));
    }
}

#[test]
fn branches_add_up_on_the_blocks_they_share() {
    let mut e = engine(64, Eviction::Mass);
    let heads = e.model().num_q_heads as f64;
    let root = uncached(&mut e, &tokens(0, 32));
    let mut forks = [BranchId::default(); 4];
    e.fork(root, &mut forks).unwrap();
    for (i, &fork) in forks.iter().enumerate() {
        e.append(fork, &[400 + i as u32]).unwrap();
    }
    run(&mut e);
    // The root's own last row, and one row a fork; of the forks' mass, what fell on their own blocks.
    let own: f64 = forks.iter().map(|&f| masses(&e, f)[2]).sum();
    let shared: f64 = masses(&e, root).iter().sum();
    assert!(own > 0.0);
    assert_near(shared + own, 5.0 * heads);
}

#[test]
fn other_policies_measure_nothing() {
    for eviction in [Eviction::Lru, Eviction::Fifo] {
        let mut e = engine(64, eviction);
        let id = uncached(&mut e, &tokens(0, 37));
        start(&mut e, id, 20);
        run(&mut e);
        assert_eq!(masses(&e, id), [0.0; 4]);
    }
}

#[test]
fn a_copied_tail_keeps_its_mass() {
    let mut e = engine(64, Eviction::Mass);
    let heads = e.model().num_q_heads as f64;
    let root = uncached(&mut e, &tokens(0, 37));
    run(&mut e);
    let before = masses(&e, root)[2];
    let mut forks = [BranchId::default(); 2];
    e.fork(root, &mut forks).unwrap();
    e.append(forks[0], &[400]).unwrap();
    run(&mut e);
    let tails = (masses(&e, root)[2], masses(&e, forks[0])[2]);
    assert_eq!(tails.0, before);
    assert!(tails.1 > before && tails.1 < before + heads, "{tails:?} after {before}");
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

//! Early exit together with everything else that moves KV: budgets, forks, swap-outs, the prefix cache.

mod common;

use common::path;
use common::walk::Walk;
use rksc::engine::{Engine, SecondSet};
use rksc::gate::river::{River, RiverExit};
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::{DType, EngineConfig};

/// The bundled model with another model's projections as its second set, which nobody can take for its own.
fn engine(river: River, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config = EngineConfig { threads: 1, kv_cache_memory: Some(64 << 20), ..EngineConfig::default() };
    change(&mut config);
    let dir = path(common::MODEL);
    let (model, store) = (ModelConfig::from_dir(&dir).unwrap(), WeightStore::open(&dir).unwrap());
    let other = WeightStore::random(&model, 5, DType::Bf16).unwrap();
    let mut engine = Engine::with_second_set(config, model, &store, SecondSet::Dense(&other)).unwrap();
    engine.set_river(Some(river)).unwrap();
    engine
}

/// River x R-KV x branches x preemption: on a random walk, branches that give up their blocks at random steps say and hold
/// the same as if they had not; without a budget every layer holds every token once (RV7). After every step the engine's
/// books are checked, among them that the prefix cache holds exact blocks alone.
#[test]
fn a_random_walk_in_the_river_is_the_same_with_swaps_and_without() {
    let rivers = [
        River::new(RiverExit::Fixed(2)),
        River::new(RiverExit::Tau(0.75)),
        River { refresh: Some(7), ..River::new(RiverExit::Tau(0.8)) },
    ];
    let (mut cuts, mut swaps, mut early, mut refreshes) = (0, 0, 0, 0);
    for seed in 0..12u64 {
        let river = rivers[seed as usize % rivers.len()];
        let mut calm = engine(river, |_| {});
        let walk = |preempt| match river.refresh {
            Some(_) => Walk::new(seed, preempt).without_budgets(),
            None => Walk::new(seed, preempt),
        };
        let expected = walk(false).run(&mut calm);
        let mut rough = engine(river, |c| c.threads = 2);
        let got = walk(true).run(&mut rough);
        got.assert_same(&expected, seed);
        for i in (0..expected.rows.len()).filter(|&i| expected.is_exact[i]) {
            let whole: Vec<u32> = (0..expected.held[i][0].len() as u32).collect();
            assert!(expected.held[i].iter().all(|set| *set == whole), "seed {seed}, branch {i}: coverage");
        }
        let stats = calm.engine_stats();
        cuts += stats.kv_cuts;
        refreshes += stats.kv_refreshes;
        early += stats.tokens_decoded * 8 - stats.decode_layers;
        swaps += rough.engine_stats().preemptions;
    }
    assert!(cuts > 200 && swaps > 300 && early > 10_000 && refreshes > 50, "{cuts}, {swaps}, {early}, {refreshes}");
}

//! Gates between layers, on the real model: rows that leave take their blocks along, rows that stay keep every bit.

use super::*;
use crate::bundled;
use crate::config::ModelSource;
use crate::gate::{Effect, Rule, Scope, Statistic};
use crate::kv::block_pool::BlockState;
use crate::model::weights::WeightStore;

const NUM_BRANCHES: usize = 8;

fn engine(model: ModelConfig, river: Option<&WeightStore>) -> Engine {
    let config =
        EngineConfig { model: ModelSource::Bundled, kv_cache_memory: Some(4 << 20), threads: 1, ..Default::default() };
    let weights = bundled::weights().unwrap();
    match river {
        Some(river) => Engine::with_second_set(config, model, &weights, SecondSet::Dense(river)).unwrap(),
        None => Engine::with_weights(config, model, &weights).unwrap(),
    }
}

fn whole() -> Engine {
    engine(bundled::config().unwrap(), None)
}

fn gate(layer: u32, every: u32, offset: u32, effect: Effect) -> GateSpec {
    let rule = Rule::EveryNth { every, offset };
    GateSpec { layers: vec![layer], statistic: Statistic::RowIndex, rule, scope: Scope::Sequence, effect }
}

/// A root of 37 tokens, eight forks with a token of their own, the root out of the way; one more token each to decode.
fn branches(e: &mut Engine) -> Vec<BranchId> {
    let prompt: Vec<u32> = (0..37).map(|i| 300 + i * 7 % 400).collect();
    let root = e.prefill(&prompt, PrefillOptions::default()).unwrap();
    let mut ids = vec![BranchId::default(); NUM_BRANCHES];
    e.fork(root, &mut ids).unwrap();
    for (i, &id) in ids.iter().enumerate() {
        e.append(id, &[400 + i as u32]).unwrap();
    }
    e.step().unwrap();
    e.prune(root).unwrap();
    let all: Vec<u32> = (0..e.model().vocab_size as u32).collect();
    for (i, &id) in ids.iter().enumerate() {
        e.append(id, &[500 + i as u32]).unwrap();
        e.watch(id, &all, 0).unwrap();
    }
    ids
}

fn bits(e: &Engine, id: BranchId) -> Vec<u32> {
    e.row(id).unwrap().unwrap().watched.iter().map(|x| x.to_bits()).collect()
}

fn rows(e: &mut Engine, gates: &[GateSpec]) -> (Vec<BranchId>, Vec<Vec<u32>>) {
    let ids = branches(e);
    e.set_gates(gates).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    let rows = ids.iter().map(|&id| bits(e, id)).collect();
    (ids, rows)
}

#[test]
fn dropped_rows_return_their_blocks_and_survivors_keep_their_bits() {
    let (_, plain) = rows(&mut whole(), &[]);
    let mut e = whole();
    let ids = branches(&mut e);
    let used = e.engine_stats().blocks_used;
    let before: Vec<BranchStats> = ids.iter().map(|&id| e.stats(id).unwrap()).collect();
    e.set_gates(&[gate(2, 2, 1, Effect::Drop)]).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    for (i, &id) in ids.iter().enumerate() {
        let now = e.stats(id).unwrap();
        if i % 2 == 0 {
            assert_eq!(bits(&e, id), plain[i], "survivor {i}");
            assert_eq!((now.num_computed_tokens, now.ended), (39, None));
        } else {
            assert_eq!((now.ended, now.exit_layer), (Some(EndReason::Dropped), Some(2)));
            assert_eq!(now.num_computed_tokens, before[i].num_computed_tokens);
            assert_eq!(now.blocks_private, before[i].blocks_private);
        }
    }
    assert_eq!(e.engine_stats().blocks_used, used, "tokens 38 and 39 lie in the same block");
}

#[test]
fn stopped_rows_answer_from_their_layer() {
    let five = ModelConfig { num_layers: 5, ..bundled::config().unwrap() };
    let (_, shallow) = rows(&mut engine(five, None), &[]);
    let (_, plain) = rows(&mut whole(), &[]);
    let mut e = whole();
    let (ids, stopped) = rows(&mut e, &[gate(5, 3, 0, Effect::Stop)]);
    for (i, &id) in ids.iter().enumerate() {
        let expected = if i % 3 == 0 { &shallow[i] } else { &plain[i] };
        assert_eq!(&stopped[i], expected, "branch {i}");
        assert_eq!(e.stats(id).unwrap().exit_layer, (i % 3 == 0).then_some(5));
        assert_eq!(e.stats(id).unwrap().num_computed_tokens, if i % 3 == 0 { 38 } else { 39 });
    }
}

#[test]
fn the_second_weight_set_serves_its_rows_and_marks_their_blocks() {
    let model = bundled::config().unwrap();
    let other = WeightStore::random(&model, 5, crate::DType::Bf16).unwrap();
    let (_, plain) = rows(&mut whole(), &[]);
    let mut e = engine(model.clone(), Some(&other));
    let (ids, mixed) = rows(&mut e, &[gate(3, 2, 0, Effect::River)]);
    for (i, &id) in ids.iter().enumerate() {
        let is_river = i % 2 == 0;
        assert_eq!(mixed[i] != plain[i], is_river, "branch {i}");
        let expected = if is_river { BlockState::River } else { BlockState::Exact };
        assert_eq!(e.stats(id).unwrap().state, expected);
    }
    // The same weights as second set: every bit stays, whatever the depth.
    let same = bundled::weights().unwrap();
    for layer in 1..8 {
        let mut e = engine(model.clone(), Some(&same));
        assert_eq!(rows(&mut e, &[gate(layer, 2, 1, Effect::River)]).1, plain, "river after layer {layer}");
    }
}

#[test]
fn drop_stop_and_river_work_in_one_pass() {
    let same = bundled::weights().unwrap();
    let five = ModelConfig { num_layers: 5, ..bundled::config().unwrap() };
    let (_, shallow) = rows(&mut engine(five, None), &[]);
    let (_, plain) = rows(&mut whole(), &[]);
    let mut e = engine(bundled::config().unwrap(), Some(&same));
    let ids = branches(&mut e);
    // After layer 2 rows 1, 3, 5, 7 leave; of the four left, rows 1 and 3 (branches 2 and 6) move to the river, which
    // puts them behind branches 0 and 4; after layer 5 the first row (branch 0) stops.
    e.set_gates(&[gate(2, 2, 1, Effect::Drop), gate(3, 2, 1, Effect::River), gate(5, 99, 0, Effect::Stop)]).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    assert_eq!(bits(&e, ids[0]), shallow[0]);
    for i in [2, 4, 6] {
        assert_eq!(bits(&e, ids[i]), plain[i], "branch {i}");
    }
    let ended: Vec<_> = ids.iter().map(|&id| e.stats(id).unwrap().ended).collect();
    assert_eq!(ended[1], Some(EndReason::Dropped));
    assert_eq!(ended[0], Some(EndReason::Stopped));
    assert_eq!(ended[2], None);
}

#[test]
fn river_blocks_never_enter_the_prefix_cache_and_survive_preemption_bit_for_bit() {
    let same = bundled::weights().unwrap();
    let run = |preempt: bool| {
        let mut e = engine(bundled::config().unwrap(), Some(&same));
        let prompt: Vec<u32> = (0..20).map(|i| 300 + i).collect();
        let id = e.prefill(&prompt, PrefillOptions::default()).unwrap();
        e.step().unwrap();
        let cached = e.engine_stats().blocks_cached;
        e.set_gates(&[gate(3, 1, 0, Effect::River)]).unwrap();
        e.start(id, GenerateParams { max_new_tokens: 40, ..Default::default() }).unwrap();
        for _ in 0..30 {
            e.step().unwrap();
        }
        assert_eq!(e.engine_stats().blocks_cached, cached, "river rows were offered to the cache");
        if preempt {
            e.preempt(id.index as usize).unwrap();
            assert!(e.engine_stats().swapped_bytes > 0);
        }
        while e.has_work() {
            e.step().unwrap();
        }
        assert_eq!(e.engine_stats().swapped_bytes, 0);
        e.check_integrity().unwrap();
        (e.tokens(id).unwrap().to_vec(), e.row(id).unwrap().unwrap().stats.lse.to_bits())
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn a_river_gate_without_a_second_set_is_refused_and_changes_nothing() {
    let mut e = whole();
    let ids = branches(&mut e);
    let used = e.engine_stats().blocks_used;
    e.set_gates(&[gate(3, 1, 0, Effect::River)]).unwrap();
    assert!(e.step().unwrap_err().to_string().contains("second weight set"));
    assert_eq!(e.engine_stats().blocks_used, used);
    e.check_integrity().unwrap();
    e.set_gates(&[]).unwrap();
    e.step().unwrap();
    assert!(ids.iter().all(|&id| e.stats(id).unwrap().num_computed_tokens == 39));
}

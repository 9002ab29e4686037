//! Early exit on the real model: what the backbone computes stays, what the river writes is whole, marked and kept apart.

use super::*;
use crate::bundled;
use crate::config::ModelSource;
use crate::gate::river::RiverExit;
use crate::kv::block_pool::BlockState;
use crate::model::weights::WeightStore;
use crate::model::weights::fingerprint::sha256;
use crate::sampler::SamplingParams;

const LAYERS: u32 = 8;

fn engine(river: Option<&WeightStore>) -> Engine {
    let config =
        EngineConfig { model: ModelSource::Bundled, kv_cache_memory: Some(4 << 20), threads: 1, ..Default::default() };
    let (model, weights) = (bundled::config().unwrap(), bundled::weights().unwrap());
    match river {
        Some(river) => Engine::with_second_set(config, model, &weights, SecondSet::Dense(river)).unwrap(),
        None => Engine::with_weights(config, model, &weights).unwrap(),
    }
}

/// The backbone's weights once more, and weights of another model.
fn same() -> WeightStore {
    bundled::weights().unwrap()
}

fn other() -> WeightStore {
    WeightStore::random(&bundled::config().unwrap(), 5, crate::DType::Bf16).unwrap()
}

fn prompt(i: u32) -> Vec<u32> {
    (0..21 + i).map(|t| 300 + (t * 7 + i) % 400).collect()
}

fn sampled(max_new_tokens: usize) -> GenerateParams {
    let sampling = SamplingParams { temperature: 0.8, seed: 3, ..SamplingParams::default() };
    GenerateParams { max_new_tokens, sampling, ..Default::default() }
}

/// What became of a branch: its tokens, and a hash of the K and V of every slot it holds.
#[derive(Debug, PartialEq)]
struct Outcome {
    tokens: Vec<u32>,
    kv: String,
}

fn outcome(e: &mut Engine, id: BranchId) -> Outcome {
    Outcome { tokens: e.tokens(id).unwrap().to_vec(), kv: kv_hash(&e.read_kv(id, 0).unwrap(), usize::MAX) }
}

/// Of the first `slots` slots.
fn kv_hash(kv: &[LayerKv], slots: usize) -> String {
    let width = bundled::config().unwrap().num_kv_heads * bundled::config().unwrap().head_dim;
    let first = |x: &[f32]| x[..x.len().min(slots.saturating_mul(width))].to_vec();
    let all: Vec<f32> = kv.iter().flat_map(|l| [first(&l.k), first(&l.v)].concat()).collect();
    sha256(bytemuck::cast_slice(&all))
}

fn run(e: &mut Engine) {
    while e.has_work() {
        e.step().unwrap();
        e.check_integrity().unwrap();
    }
}

/// Roots of different lengths generate together.
fn generate(
    e: &mut Engine,
    river: Option<River>,
    roots: std::ops::Range<u32>,
    params: &GenerateParams,
) -> Vec<Outcome> {
    e.set_river(river).unwrap();
    let roots: Vec<BranchId> = roots
        .map(|i| {
            let options = PrefillOptions { path: u64::from(i), ..Default::default() };
            let id = e.prefill(&prompt(i), options).unwrap();
            e.start(id, params.clone()).unwrap();
            id
        })
        .collect();
    run(e);
    roots.into_iter().map(|id| outcome(e, id)).collect()
}

fn tau(tau: f32) -> River {
    River::new(RiverExit::Tau(tau))
}

fn fixed(layers: u32) -> River {
    River::new(RiverExit::Fixed(layers))
}

/// Acceptance test RV4.
#[test]
fn rv4_a_bound_beyond_every_cosine_is_the_backbone_and_reads_no_other_weights() {
    let (mut plain, mut with) = (engine(None), engine(Some(&other())));
    let want = generate(&mut plain, None, 0..3, &sampled(40));
    for river in [tau(2.0), fixed(LAYERS)] {
        with.reset_counters();
        with.clear_prefix_cache().unwrap();
        assert_eq!(generate(&mut with, Some(river), 0..3, &sampled(40)), want, "{river:?}");
        assert_eq!(with.counters().weight_bytes, plain.counters().weight_bytes, "{river:?}");
        let stats = with.engine_stats();
        assert_eq!(stats.decode_layers, stats.tokens_decoded * u64::from(LAYERS));
    }
}

/// Acceptance tests RV5 and RV7: with the backbone's own weights as the second set every bit of every slot in every layer
/// is the backbone's, whatever the depth: none is missing, none is in another's place; and each is written once.
#[test]
fn rv5_rv7_the_same_weights_give_the_same_bits_at_every_depth() {
    let mut plain = engine(None);
    let want = generate(&mut plain, None, 0..3, &sampled(64));
    let same = same();
    let mut e = engine(Some(&same));
    let mut rivers: Vec<River> = (0..LAYERS).map(fixed).collect();
    rivers.extend([0.3, 0.6, 0.8, 0.9, 0.95].map(tau));
    rivers.extend([River { batch_min: true, ..tau(0.8) }, River { min_layer: 3, max_layer: 5, ..tau(-2.0) }]);
    for river in rivers {
        e.reset_counters();
        e.clear_prefix_cache().unwrap();
        assert_eq!(generate(&mut e, Some(river), 0..3, &sampled(64)), want, "{river:?}");
        assert_eq!(e.counters().kv_write_bytes, plain.counters().kv_write_bytes, "{river:?}");
    }
}

/// Half of acceptance test RV6; the other is what `linear` makes of codes.
#[test]
fn rv6_below_every_cosine_a_token_leaves_after_the_first_layer_it_may() {
    for (river, depth) in [(tau(-2.0), 1), (River { min_layer: 3, ..tau(-2.0) }, 3), (fixed(1), 1), (fixed(0), 0)] {
        let mut e = engine(Some(&other()));
        generate(&mut e, Some(river), 0..2, &sampled(20));
        let stats = e.engine_stats();
        assert_eq!(stats.tokens_decoded, 2 * 19, "{river:?}");
        assert_eq!(stats.decode_layers, stats.tokens_decoded * depth, "{river:?}");
    }
    // Layers from the second on are the other model's, for every row: the rest of that model.
    let mut e = engine(Some(&other()));
    let gate = fixed(1).gate(8).unwrap();
    e.set_gates(&[gate]).unwrap();
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    run(&mut e);
    let got = e.row(id).unwrap().unwrap().stats.lse;
    let mut hybrid = hybrid();
    let id = hybrid.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    run(&mut hybrid);
    assert_eq!(got.to_bits(), hybrid.row(id).unwrap().unwrap().stats.lse.to_bits());
}

/// A model whose projections are the other's from the second layer on.
fn hybrid() -> Engine {
    let (model, own, other) = (bundled::config().unwrap(), bundled::weights().unwrap(), other());
    let is_projection = |name: &str| name.ends_with("_proj.weight") && !name.contains("layers.0.");
    let tensors: Vec<_> = model
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let tensor = if is_projection(&name) { &other } else { &own }.get(&name, &shape).unwrap();
            (name, shape, tensor.bytes().to_vec())
        })
        .collect();
    let view = |shape: &[usize], bytes: &'static [u8]| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.to_vec(), bytes).unwrap()
    };
    let views = tensors.into_iter().map(|(name, shape, bytes)| (name, view(&shape, bytes.leak())));
    let file: &'static [u8] = safetensors::serialize(views, None).unwrap().leak();
    let store = WeightStore::from_static(file).unwrap();
    let config = EngineConfig { kv_cache_memory: Some(4 << 20), threads: 1, ..Default::default() };
    Engine::with_weights(config, model, &store).unwrap()
}

/// Acceptance test RV12.
#[test]
fn rv12_each_row_of_a_batch_goes_its_own_way_unless_told_otherwise() {
    let other = other();
    for river in [tau(0.75), fixed(3)] {
        let mut e = engine(Some(&other));
        let together = generate(&mut e, Some(river), 0..6, &sampled(30));
        for i in 0..6 {
            let mut alone = engine(Some(&other));
            assert_eq!(generate(&mut alone, Some(river), i..i + 1, &sampled(30))[0], together[i as usize]);
        }
    }
    let depths = |batch_min: bool| {
        let mut e = engine(Some(&other));
        generate(&mut e, Some(River { batch_min, ..tau(0.75) }), 0..6, &sampled(30));
        e.engine_stats().decode_layers
    };
    assert!(depths(true) > depths(false), "the last to leave holds the others");
}

/// Acceptance test RV13: bytes of weights a token takes.
#[test]
fn rv13_bytes_are_those_of_the_layers_run() {
    let (model, weights) = (bundled::config().unwrap(), bundled::weights().unwrap());
    let bytes = |is_wanted: fn(&str) -> bool| -> u64 {
        let wanted = model.tensor_shapes().into_iter().filter(|(name, _)| is_wanted(name));
        wanted.map(|(_, shape)| 2 * shape.iter().product::<usize>() as u64).sum()
    };
    let (all, head) = (bytes(|n| n.ends_with("_proj.weight")), bytes(|n| n.contains("embed_tokens")));
    // A second set of twice the bytes.
    let wide = WeightStore::random(&model, 5, crate::DType::F32).unwrap();
    drop(weights);
    let config =
        EngineConfig { dtype: crate::DType::F32, kv_cache_memory: Some(8 << 20), threads: 1, ..Default::default() };
    let mut e = Engine::with_second_set(config, model, &bundled::weights().unwrap(), SecondSet::Dense(&wide)).unwrap();
    for layers in 0..=LAYERS {
        e.clear_prefix_cache().unwrap();
        e.set_river(Some(fixed(layers))).unwrap();
        let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
        e.start(id, sampled(10)).unwrap();
        e.step().unwrap();
        e.reset_counters();
        run(&mut e);
        let backbone = u64::from(layers) * all / u64::from(LAYERS);
        let river = u64::from(LAYERS - layers) * 2 * all / u64::from(LAYERS);
        let rows = e.engine_stats().tokens_decoded;
        assert_eq!(e.counters().weight_bytes, rows * (backbone + river + head), "{layers} layers");
    }
}

#[test]
fn drafts_change_no_token_and_no_bit() {
    let (same, other) = (same(), other());
    for (params, what) in
        [(GenerateParams { max_new_tokens: 50, ..Default::default() }, "greedy"), (sampled(50), "sampled")]
    {
        let want = generate(&mut engine(None), None, 0..4, &params);
        for tokens in [1, 3, 7] {
            for (second, set) in [("same", &same), ("other", &other)] {
                let mut e = engine(Some(set));
                let river = River::new(RiverExit::Draft(tokens));
                assert_eq!(generate(&mut e, Some(river), 0..4, &params), want, "{what} {tokens} {second}");
                let stats = e.engine_stats();
                assert!(stats.tokens_drafted > 0);
                if second == "same" {
                    // Everything proposed is kept, but for what stands behind an end.
                    assert!(stats.drafts_kept * 10 >= stats.tokens_drafted * 8, "{stats:?}");
                }
            }
        }
    }
}

#[test]
fn drafts_with_penalties_bans_and_ends_are_what_they_would_have_been() {
    let sampling = SamplingParams { temperature: 1.0, repetition_penalty: 1.3, seed: 9, ..SamplingParams::default() };
    let probe = generate(&mut engine(None), None, 0..1, &sampled(12));
    let end = *probe[0].tokens.last().unwrap();
    for min_new_tokens in [0, 20] {
        let params =
            GenerateParams { max_new_tokens: 45, min_new_tokens, end_tokens: vec![end, 1], sampling: sampling.clone() };
        let want = generate(&mut engine(None), None, 0..5, &params);
        let mut e = engine(Some(&same()));
        assert_eq!(generate(&mut e, Some(River::new(RiverExit::Draft(5))), 0..5, &params), want);
    }
}

/// Whoever gives way to others, whenever: same tokens, same bits.
#[test]
fn preemption_at_random_steps_changes_nothing() {
    let other = other();
    let rivers = [
        fixed(2),
        tau(0.75),
        River { refresh: Some(5), ..tau(0.75) },
        River { refresh: Some(8), ..fixed(3) },
        River::new(RiverExit::Draft(3)),
    ];
    for river in rivers {
        let calm = generate(&mut engine(Some(&other)), Some(river), 0..4, &sampled(40));
        for seed in 0..6u64 {
            let mut e = engine(Some(&other));
            e.set_river(Some(river)).unwrap();
            let roots: Vec<BranchId> = (0..4)
                .map(|i| {
                    let options = PrefillOptions { path: i, ..Default::default() };
                    let id = e.prefill(&prompt(i as u32), options).unwrap();
                    e.start(id, sampled(40)).unwrap();
                    id
                })
                .collect();
            let mut fill = crate::testing::fill::Fill::new(seed);
            while e.has_work() {
                if fill.below(4) == 0 {
                    e.force_preemption(roots[fill.below(4)]);
                }
                e.step().unwrap();
                e.check_integrity().unwrap();
            }
            assert!(e.engine_stats().preemptions > 3);
            for (&id, want) in roots.iter().zip(&calm) {
                assert_eq!(e.tokens(id).unwrap(), want.tokens, "{river:?}, seed {seed}");
            }
        }
    }
}

#[test]
fn a_refresh_makes_the_last_tokens_exact() {
    let mut e = engine(Some(&other()));
    e.set_river(Some(River { refresh: Some(6), ..fixed(2) })).unwrap();
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    e.start(id, sampled(40)).unwrap();
    let (mut exact, mut most) = (0, 0);
    while e.has_work() {
        e.step().unwrap();
        let b = e.tree.get(id).unwrap();
        exact = exact.max(b.table.exact_len());
        most = most.max(b.num_computed - b.table.exact_len());
    }
    assert!(e.engine_stats().kv_refreshes >= 5);
    assert!(exact > 50 && most == 6, "exact {exact}, approximate {most}");
    // The exact rows are the backbone's for the same tokens.
    let tokens = e.tokens(id).unwrap()[..48].to_vec();
    let got = kv_hash(&e.read_kv(id, 0).unwrap(), tokens.len());
    let mut plain = engine(None);
    let id = plain.prefill(&tokens, PrefillOptions::default()).unwrap();
    run(&mut plain);
    assert_eq!(got, outcome(&mut plain, id).kv);
}

#[test]
fn river_blocks_stay_out_of_the_prefix_cache_and_forks_know_what_they_stand_on() {
    let mut e = engine(Some(&other()));
    e.set_river(Some(fixed(2))).unwrap();
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    e.start(id, sampled(60)).unwrap();
    e.step().unwrap();
    let cached = e.engine_stats().blocks_cached;
    run(&mut e);
    assert_eq!(e.engine_stats().blocks_cached, cached);
    assert_eq!(e.stats(id).unwrap().state, BlockState::River);
    let mut child = [BranchId::default()];
    e.fork(id, &mut child).unwrap();
    e.append(child[0], &[400; 40]).unwrap();
    run(&mut e);
    assert_eq!(e.stats(child[0]).unwrap().state, BlockState::River, "backbone rows that read the river's");
    assert_eq!(e.engine_stats().blocks_cached, cached);
}

/// A gate of its own sends all rows of a branch, also one that generates: none of them may be taken for exact.
#[test]
fn rows_that_left_by_a_branchs_own_gate_are_marked_from_the_first() {
    let mut e = engine(Some(&other()));
    let options = PrefillOptions { use_prefix_cache: true, ..Default::default() };
    let id = e.prefill(&prompt(20), options).unwrap();
    e.start(id, sampled(40)).unwrap();
    for _ in 0..20 {
        e.step().unwrap();
    }
    e.clear_prefix_cache().unwrap();
    e.force_preemption(id);
    e.gate(&fixed(2).gate(8).unwrap(), &[id]).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    assert!(e.engine_stats().preemptions > 0);
    assert_eq!(e.tree.get(id).unwrap().table.exact_len(), 0);
    assert_eq!(e.engine_stats().blocks_cached, 0);
}

#[test]
fn a_step_back_is_refreshed_as_soon_as_anything_else() {
    let mut e = engine(Some(&other()));
    e.set_river(Some(River { refresh: Some(6), ..fixed(2) })).unwrap();
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    e.start(id, sampled(50)).unwrap();
    run(&mut e);
    e.truncate(id, 30).unwrap();
    e.start(id, sampled(30)).unwrap();
    let mut most = 0;
    while e.has_work() {
        e.step().unwrap();
        let b = e.tree.get(id).unwrap();
        most = most.max(b.num_computed - b.table.exact_len());
    }
    assert!(most <= 6 + 1, "{most} approximate rows");
}

/// The pass behind the proposals fails: nothing has happened, and the next step yields what it would have yielded.
#[test]
fn a_draft_whose_pass_fails_leaves_no_trace() {
    let want = generate(&mut engine(None), None, 0..3, &sampled(30));
    let mut e = engine(Some(&other()));
    e.set_river(Some(River::new(RiverExit::Draft(4)))).unwrap();
    let roots: Vec<BranchId> = (0..3)
        .map(|i| {
            let options = PrefillOptions { path: i, ..Default::default() };
            let id = e.prefill(&prompt(i as u32), options).unwrap();
            e.start(id, sampled(30)).unwrap();
            id
        })
        .collect();
    let (mut steps, mut failed) = (0, 0);
    while e.has_work() {
        steps += 1;
        if steps % 3 == 0 {
            e.fail_allocation(steps % 4);
        }
        failed += usize::from(e.step().is_err());
        e.check_integrity().unwrap();
    }
    assert!(failed > 3, "{failed}");
    for (id, want) in roots.into_iter().zip(want) {
        assert_eq!(outcome(&mut e, id), want);
    }
}

/// Drafts beside a prompt that fills the pass, and in passes smaller than a draft.
#[test]
fn drafts_give_way_to_prompts_and_fit_small_passes() {
    let weights = bundled::weights().unwrap();
    let open = |max_batch_tokens| {
        let config =
            EngineConfig { kv_cache_memory: Some(4 << 20), threads: 1, max_batch_tokens, ..Default::default() };
        let second = SecondSet::Dense(&weights);
        Engine::with_second_set(config, bundled::config().unwrap(), &weights, second).unwrap()
    };
    for max_batch_tokens in [3, 8, 2048] {
        let mut plain = open(max_batch_tokens);
        let want = generate(&mut plain, None, 0..3, &sampled(30));
        let mut e = open(max_batch_tokens);
        let got = generate(&mut e, Some(River::new(RiverExit::Draft(5))), 0..3, &sampled(30));
        assert_eq!(got, want, "{max_batch_tokens} tokens a pass");
        assert!(e.engine_stats().steps < plain.engine_stats().steps);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |e: &mut Engine, river: River| e.set_river(Some(river)).unwrap_err().to_string();
    assert!(refused(&mut engine(None), tau(0.5)).contains("second weight set"));
    let mut e = engine(Some(&same()));
    assert!(refused(&mut e, tau(f32::NAN)).contains("tau"));
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    e.limit_kv(id, crate::kv::budget::KvBudget::new(32, 0, 16)).unwrap();
    assert!(refused(&mut e, River::new(RiverExit::Draft(4))).contains("KV budget"));
    assert!(refused(&mut e, River { refresh: Some(4), ..fixed(2) }).contains("KV budget"));
    assert!(refused(&mut e, River { min_layer: 8, max_layer: 9, ..tau(0.5) }).contains("river-first"));
    e.prune(id).unwrap();
    e.set_river(Some(River::new(RiverExit::Draft(4)))).unwrap();
    let id = e.prefill(&prompt(0), PrefillOptions::default()).unwrap();
    let limit = crate::kv::budget::KvBudget::new(32, 0, 16);
    assert!(e.limit_kv(id, limit).unwrap_err().to_string().contains("draft"));
}

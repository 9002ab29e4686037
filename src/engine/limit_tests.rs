//! What a cut keeps is what the oracle keeps, and what others hold stays as it is, bit for bit.

use super::*;
use crate::backend::RkvVariant;
use crate::config::ModelSource;
use crate::dtype::DType;
use crate::kv::budget::{Aggregation, KeepRule, KvBudget};
use crate::testing::kv_scores::{Head, kv_scores};

fn engine() -> Engine {
    let config = EngineConfig {
        model: ModelSource::Bundled,
        dtype: DType::F32,
        kv_cache_memory: Some(64 << 20),
        threads: 1,
        ..Default::default()
    };
    Engine::open(config).unwrap()
}

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| 300 + (n * 31 + i * 7) % 400).collect()
}

/// A branch of `len` prompt tokens that generates under `budget`.
fn limited(e: &mut Engine, len: u32, budget: KvBudget) -> BranchId {
    let id = e.prefill(&prompt(len), PrefillOptions::default()).unwrap();
    e.limit_kv(id, budget).unwrap();
    e.start(id, GenerateParams { max_new_tokens: 200, ..Default::default() }).unwrap();
    id
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
}

/// K of every slot of one head, from the blocks' bytes.
fn keys(e: &mut Engine, id: BranchId, layer: usize, head: usize) -> Vec<f64> {
    let (num_slots, blocks) = {
        let table = &e.tree.get(id).unwrap().table;
        (table.len(), table.indices().to_vec())
    };
    let layout = e.layout;
    let mut keys = Vec::new();
    for block in blocks {
        let mut bytes = Vec::new();
        e.runner.read_block(block, &mut bytes).unwrap();
        let all = floats(&bytes);
        let k = &all[2 * layer * layout.block_elems()..][..layout.block_elems()];
        keys.extend_from_slice(&k[head * layout.block_size * layout.head_dim..][..layout.block_size * layout.head_dim]);
    }
    keys.truncate(num_slots * layout.head_dim);
    keys
}

/// The last queries of one head's group, in the order of the ring's rows: `[num_queries][group][D]`.
fn queries(e: &mut Engine, id: BranchId, layer: usize, head: usize) -> Vec<f64> {
    let limited = e.tree.get(id).unwrap().limited.clone().unwrap();
    let (ring, num_queries) = limited.ring_in_use(e.tree.get(id).unwrap().num_computed, e.config.kv_window);
    let (d, q_heads) = (e.model.head_dim, e.model.num_q_heads);
    let group = q_heads / e.model.num_kv_heads;
    let mut bytes = Vec::new();
    e.runner.read_ring(ring, &mut bytes).unwrap();
    let all = floats(&bytes);
    let of_layer = &all[layer * e.config.kv_window * q_heads * d..];
    (0..num_queries).flat_map(|j| of_layer[(j * q_heads + head * group) * d..][..group * d].to_vec()).collect()
}

/// Positions that the oracle keeps in one head, ascending, and the least gap between a kept and a dropped score.
fn oracle_keeps(
    e: &mut Engine,
    id: BranchId,
    (layer, head): (usize, usize),
    (variant, lambda): (RkvVariant, f64),
    kept: usize,
    first: usize,
) -> (Vec<u32>, f64) {
    let keys = keys(e, id, layer, head);
    let queries = queries(e, id, layer, head);
    let (head_dim, window) = (e.model.head_dim, e.config.kv_window);
    let scores = kv_scores(&Head {
        queries: &queries,
        keys: &keys,
        positions: None,
        head_dim,
        group: e.model.num_q_heads / e.model.num_kv_heads,
        window,
        pool_size: 7,
        variant,
        sm_scale: 1.0 / (head_dim as f64).sqrt(),
        softcap: None,
        lambda,
        threshold: 0.5,
    });
    let num_slots = keys.len() / head_dim;
    let mut order: Vec<usize> = (first..num_slots - window).collect();
    order.sort_by(|&a, &b| scores.scores[b].total_cmp(&scores.scores[a]).then(b.cmp(&a)));
    let (best, rest) = order.split_at(kept - window);
    let gap = scores.scores[best[best.len() - 1]] - scores.scores[rest[0]];
    let before = e.kv_positions(id, layer, head).unwrap();
    let mut slots: Vec<usize> = best.to_vec();
    slots.sort_unstable();
    slots.extend(num_slots - window..num_slots);
    let positions = (0..first).chain(slots).map(|slot| before[slot]).collect();
    (positions, gap)
}

#[test]
fn a_cut_keeps_what_the_oracle_keeps() {
    for variant in [RkvVariant::Code, RkvVariant::Text] {
        let rule = KeepRule::RKv { variant, lambda: 0.1, threshold: 0.5, pool_size: 7 };
        let mut e = engine();
        let budget = KvBudget { budget: 40, buffer: 24, pinned: 20, rule, aggregation: Aggregation::Head };
        let id = limited(&mut e, 20, budget);
        let (mut compared, mut seen) = (0, 0);
        while e.has_work() {
            let (num_cuts, is_due) = {
                let b = e.tree.get(id).unwrap();
                (b.limited.as_ref().unwrap().num_cuts, e.due(b).unwrap())
            };
            let Some((_, first)) = is_due else {
                e.step().unwrap();
                assert_eq!(e.stats(id).unwrap().kv_cuts, num_cuts, "cut without being due");
                continue;
            };
            let heads: Vec<(usize, usize)> =
                (0..e.model.num_layers).flat_map(|l| (0..e.model.num_kv_heads).map(move |h| (l, h))).collect();
            let expected: Vec<_> =
                heads.iter().map(|&h| oracle_keeps(&mut e, id, h, (variant, 0.1), 40, first)).collect();
            e.cut_due().unwrap();
            for (&(layer, head), (positions, gap)) in heads.iter().zip(&expected) {
                seen += 1;
                // A gap this small is within what f32 may turn round.
                if *gap > 1e-6 {
                    compared += 1;
                    assert_eq!(&e.kv_positions(id, layer, head).unwrap(), positions, "layer {layer}, head {head}");
                }
            }
            e.check_integrity().unwrap();
        }
        assert!(seen >= 4 * e.model.num_layers && compared * 10 > seen * 9, "{compared} of {seen} sets compared");
    }
}

#[test]
fn a_slot_moves_with_its_keys_and_values() {
    let mut e = engine();
    let id = limited(&mut e, 20, KvBudget { budget: 24, buffer: 16, ..KvBudget::new(24, 20, 16) });
    let (mut num_cuts, layer) = (0, 1);
    while e.has_work() {
        let head_dim = e.model.head_dim;
        let before = (keys(&mut e, id, layer, 0), e.kv_positions(id, layer, 0).unwrap());
        e.cut_due().unwrap();
        let after = (keys(&mut e, id, layer, 0), e.kv_positions(id, layer, 0).unwrap());
        num_cuts += usize::from(before.1.len() != after.1.len());
        for (key, position) in after.0.chunks(head_dim).zip(&after.1) {
            let slot = before.1.iter().position(|p| p == position).unwrap();
            assert_eq!(key, &before.0[slot * head_dim..][..head_dim], "position {position}");
        }
        e.step().unwrap();
    }
    assert!(num_cuts >= 4, "{num_cuts} cuts");
}

/// KV13, at the level of bytes: whatever is cut, no block that has another owner changes.
#[test]
fn a_shared_block_never_changes() {
    let mut e = engine();
    let root = limited(&mut e, 37, KvBudget::new(20, 37, 16));
    let mut alive = vec![root];
    let (mut num_cuts, mut num_shared) = (0, 0);
    for step in 0..260u64 {
        if step % 13 == 5 && alive.len() < 12 {
            let parent = alive[(step / 13) as usize % alive.len()];
            let mut child = [BranchId::default()];
            e.fork(parent, &mut child).unwrap();
            e.append(child[0], &prompt(1 + (step % 5) as u32)).unwrap();
            e.start(child[0], GenerateParams { max_new_tokens: 150, ..Default::default() }).unwrap();
            alive.push(child[0]);
        }
        if step % 53 == 50 {
            e.prune(alive.remove(step as usize % alive.len())).unwrap();
        }
        let shared: Vec<u32> = e
            .tree
            .iter()
            .flat_map(|b| b.table.blocks())
            .filter(|&&id| e.pool.is_shared(id).unwrap())
            .map(|id| id.index())
            .collect();
        let read = |e: &mut Engine| -> Vec<Vec<u8>> {
            let bytes = |&block: &u32| {
                let mut bytes = Vec::new();
                e.runner.read_block(block, &mut bytes).unwrap();
                bytes
            };
            shared.iter().map(bytes).collect()
        };
        let before = read(&mut e);
        let cuts_before = e.totals.kv_cuts;
        e.cut_due().unwrap();
        num_cuts += e.totals.kv_cuts - cuts_before;
        num_shared += shared.len() as u64 * (e.totals.kv_cuts - cuts_before);
        assert!(read(&mut e) == before, "a cut in step {step} changed a shared block");
        e.check_integrity().unwrap();
        e.step().unwrap();
    }
    assert!(num_cuts > 20 && num_shared > 20, "{num_cuts} cuts with {num_shared} shared blocks around");
}

//! Branches under a KV budget: the schedule and the memory to the slot, independence of everything else in flight, of
//! swap-outs and of forks, and what the prefix cache may see of them.

mod common;

use common::walk::{RULES, Walk, positions};
use common::{Rng, engine, fork, greedy, run_all, traces, uncached};
use rksc::EngineConfig;
use rksc::engine::{BranchId, Engine, EventKind, PrefillOptions};
use rksc::gate::asks::Asks;
use rksc::kv::budget::{Aggregation, KeepRule, KvBudget};

fn prompt(seed: u64, n: usize) -> Vec<u32> {
    Rng(seed).tokens(n)
}

fn budget(budget: usize, pinned: usize) -> KvBudget {
    KvBudget { buffer: 16, ..KvBudget::new(budget, pinned, 16) }
}

fn limited_root(e: &mut Engine, tokens: &[u32], path: u64, budget: Option<KvBudget>, new: usize) -> BranchId {
    let id = e.prefill(tokens, PrefillOptions { path, ..uncached() }).unwrap();
    if let Some(budget) = budget {
        e.limit_kv(id, budget).unwrap();
    }
    e.start(id, greedy(new)).unwrap();
    id
}

/// KV7, in the engine: a prompt of 100, pinned by nothing, budget 256, buffer 128.
#[test]
fn kv7_the_engine_cuts_by_the_schedule() {
    for (prompt_len, expected) in [(100, vec![257, 385, 513, 641, 769]), (600, vec![600, 641, 769])] {
        let mut e = engine(|_| {});
        let budget = KvBudget { buffer: 128, ..KvBudget::new(256, 0, 16) };
        let id = limited_root(&mut e, &prompt(1, prompt_len), 0, Some(budget), 800 - prompt_len);
        let mut cuts = Vec::new();
        let mut peak = 0;
        while e.has_work() {
            let before = e.stats(id).unwrap();
            e.step().unwrap();
            let after = e.stats(id).unwrap();
            if after.kv_cuts > before.kv_cuts {
                cuts.push(before.num_computed_tokens);
                assert_eq!(after.num_slots, 257, "256 kept, and the row behind the cut");
            }
            if !cuts.is_empty() || prompt_len < 256 {
                peak = peak.max(after.num_slots);
            }
        }
        assert_eq!(cuts, expected, "prompt {prompt_len}");
        assert_eq!(e.stats(id).unwrap().first_kv_cut, Some(expected[0]));
        assert!(peak <= 384, "{peak} slots");
    }
}

/// KV14: exact slots and blocks at every step, for every rule.
#[test]
fn kv14_never_more_than_budget_and_buffer_and_blocks_return_at_once() {
    for rule in RULES {
        let mut e = engine(|_| {});
        let limit = KvBudget { rule, ..budget(40, 21) };
        let kept = limit.kept(8);
        let id = limited_root(&mut e, &prompt(2, 21), 5, Some(limit), 300);
        let (mut num_cuts, mut num_dropped) = (0, 0);
        while e.has_work() {
            let before = e.stats(id).unwrap();
            e.step().unwrap();
            let after = e.stats(id).unwrap();
            let grown = after.num_computed_tokens - before.num_computed_tokens;
            let was_cut = after.kv_cuts > before.kv_cuts;
            let expected = if was_cut { 21 + kept + grown } else { before.num_slots + grown };
            assert_eq!(after.num_slots, expected, "{rule:?}");
            assert!(after.num_slots <= 21 + kept + 16, "{rule:?}: {} slots", after.num_slots);
            assert_eq!(e.engine_stats().blocks_used, after.num_slots.div_ceil(16), "{rule:?}");
            num_cuts += u32::from(was_cut);
            num_dropped += (before.num_slots + grown - after.num_slots) as u64;
        }
        assert!(num_cuts >= 15, "{rule:?}: {num_cuts} cuts");
        assert_eq!(e.engine_stats().kv_cuts, u64::from(num_cuts));
        assert_eq!(e.engine_stats().slots_dropped, num_dropped, "{rule:?}");
        e.prune(id).unwrap();
        e.check_integrity().unwrap();
        assert_eq!(e.engine_stats().blocks_used, 0);
    }
}

/// KV8: a cache below its budget is not touched.
#[test]
fn kv8_below_the_budget_every_bit_is_as_without() {
    for rule in RULES {
        let rows = |limit: Option<KvBudget>| {
            let mut e = engine(|_| {});
            let id = limited_root(&mut e, &prompt(3, 30), 0, limit, 60);
            let rows = traces(&mut e, &[id]);
            assert_eq!(e.stats(id).unwrap().kv_cuts, 0);
            (rows, e.tokens(id).unwrap().to_vec())
        };
        assert_eq!(rows(None), rows(Some(KvBudget { rule, ..budget(64, 30) })), "{rule:?}");
    }
}

/// KV9: exactly at its budget a branch is left alone.
#[test]
fn kv9_at_the_budget_nothing_happens() {
    let mut e = engine(|_| {});
    let id = limited_root(&mut e, &prompt(3, 30), 0, Some(budget(32, 30)), 33);
    run_all(&mut e);
    let stats = e.stats(id).unwrap();
    assert_eq!((stats.num_slots, stats.kv_cuts), (62, 0));
    assert_eq!(positions(&e, id)[0], (0..62).collect::<Vec<u32>>());
}

/// KV11: several in one batch, limited and not, each as it is alone.
#[test]
fn kv11_each_branch_of_a_batch_is_as_alone() {
    let limits: Vec<Option<KvBudget>> = RULES
        .iter()
        .map(|&rule| Some(KvBudget { rule, ..budget(24, 12) }))
        .chain([None, Some(KvBudget { aggregation: Aggregation::Layer, ..budget(24, 0) })])
        .chain([Some(KvBudget { aggregation: Aggregation::Token, ..budget(30, 4) }), None])
        .collect();
    let start =
        |e: &mut Engine, i: usize| limited_root(e, &prompt(i as u64, 12 + 5 * i), i as u64, limits[i], 90 + 7 * i);
    let mut together = engine(|_| {});
    let ids: Vec<BranchId> = (0..limits.len()).map(|i| start(&mut together, i)).collect();
    let rows = traces(&mut together, &ids);
    for (i, rows) in rows.iter().enumerate() {
        let mut alone = engine(|_| {});
        let id = start(&mut alone, i);
        assert_eq!(&traces(&mut alone, &[id])[0], rows, "branch {i}");
        assert_eq!(positions(&alone, id), positions(&together, ids[i]), "branch {i}");
        assert_eq!(alone.stats(id).unwrap().kv_cuts > 0, limits[i].is_some(), "branch {i}");
    }
}

#[test]
fn what_stays_is_what_the_rule_says() {
    let held = |limit: KvBudget| {
        let mut e = engine(|_| {});
        let id = limited_root(&mut e, &prompt(9, 40), 0, Some(limit), 120);
        run_all(&mut e);
        assert!(e.stats(id).unwrap().kv_cuts > 3);
        let all = positions(&e, id);
        for set in &all {
            assert!(set.is_sorted_by(|a, b| a < b), "slots in order of position");
            assert!(set[..limit.pinned].iter().copied().eq(0..limit.pinned as u32), "the pinned part stays");
            assert!(set.ends_with(&(151..159).collect::<Vec<u32>>()), "the window stays");
        }
        all
    };
    let differ = |all: &[Vec<u32>]| all.iter().any(|set| *set != all[0]);
    let with = |rule: KeepRule, aggregation| KvBudget { rule, aggregation, ..budget(40, 4) };
    let streaming = held(with(KeepRule::Streaming, Aggregation::Head));
    let newest = |set: &Vec<u32>| set[4..].iter().copied().eq(159 - (set.len() as u32 - 4)..159);
    assert!(streaming.iter().all(newest));
    for rule in [KeepRule::RKV, KeepRule::SNAPKV, KeepRule::H2o, KeepRule::Random { seed: 1 }] {
        let by_head = held(with(rule, Aggregation::Head));
        assert!(differ(&by_head), "{rule:?}: every head chose the same");
        let by_layer = held(with(rule, Aggregation::Layer));
        assert!(by_layer.chunks(2).all(|heads| heads[0] == heads[1]) && differ(&by_layer), "{rule:?}");
        assert!(!differ(&held(with(rule, Aggregation::Token))), "{rule:?}");
        assert_ne!(by_head, streaming);
    }
    let [rkv, snapkv] = [KeepRule::RKV, KeepRule::SNAPKV].map(|rule| held(with(rule, Aggregation::Head)));
    assert_ne!(rkv, snapkv, "redundancy makes no difference");
    let [one, two] = [1, 2].map(|seed| held(with(KeepRule::Random { seed }, Aggregation::Head)));
    assert_ne!(one, two, "the seed makes no difference");
}

/// Branches of one prompt are cut in different steps.
#[test]
fn cuts_are_staggered() {
    let mut e = engine(|_| {});
    let root = e.prefill(&prompt(4, 20), uncached()).unwrap();
    e.limit_kv(root, budget(32, 20)).unwrap();
    let ids: Vec<BranchId> = (0..8).map(|_| fork(&mut e, root)).collect();
    for &id in &ids {
        e.start(id, greedy(200)).unwrap();
    }
    let mut most = 0;
    while e.has_work() {
        let before = e.engine_stats().kv_cuts;
        e.step().unwrap();
        most = most.max(e.engine_stats().kv_cuts - before);
    }
    assert_eq!(most, 1, "cuts in one step");
    assert!(ids.iter().all(|&id| e.stats(id).unwrap().kv_cuts >= 10));
}

/// A fork of a branch that has been cut goes on as that branch does.
#[test]
fn a_fork_of_a_cut_branch_goes_on_as_it_does() {
    for rule in RULES {
        let mut e = engine(|_| {});
        let limit = KvBudget { buffer: 64, rule, ..budget(40, 20) };
        let id = limited_root(&mut e, &prompt(6, 20), 0, Some(limit), 240);
        while e.stats(id).unwrap().kv_cuts < 2 || e.stats(id).unwrap().num_slots % 16 != 3 {
            e.step().unwrap();
        }
        let child = fork(&mut e, id);
        e.step().unwrap(); // the parent computes its pending token, and the child has it
        let len = e.tokens(child).unwrap().len();
        e.start(child, greedy(30)).unwrap();
        assert_eq!(positions(&e, child)[0][..20], (0..20).collect::<Vec<u32>>()[..]);
        let before = e.stats(id).unwrap().kv_cuts;
        while e.tokens(child).unwrap().len() < len + 24 {
            e.step().unwrap();
        }
        assert_eq!(e.stats(id).unwrap().kv_cuts, before, "{rule:?}: the parent was cut meanwhile");
        assert_eq!(e.tokens(id).unwrap()[..len + 24], e.tokens(child).unwrap()[..len + 24], "{rule:?}");
        e.prune(id).unwrap();
        run_all(&mut e);
        e.check_integrity().unwrap();
    }
}

/// What a branch keeps does not depend on whether one that had become the same prompt is still there.
#[test]
fn a_prompt_that_two_branches_share_stays_with_both() {
    let held = |prunes: bool| {
        let mut e = engine(|_| {});
        let ids = [0, 1].map(|path| {
            let id = e.prefill(&prompt(11, 45), PrefillOptions { path, ..uncached() }).unwrap();
            e.limit_kv(id, budget(24, 0)).unwrap();
            id
        });
        e.gate(&Asks::default().gate(), &ids).unwrap();
        let mut aliased = None;
        while e.has_work() {
            e.step().unwrap();
            while let Some(event) = e.next_event() {
                if let EventKind::Aliased { to } = event.kind {
                    aliased = Some((event.branch, to));
                }
            }
        }
        let (other, id) = aliased.expect("two like prompts are one");
        if prunes {
            e.prune(other).unwrap();
        }
        e.start(id, greedy(80)).unwrap();
        run_all(&mut e);
        assert!(e.stats(id).unwrap().kv_cuts > 1);
        positions(&e, id)
    };
    assert!(held(false) == held(true));
}

/// Nothing that a cut has touched, and nothing that it may touch later, is found by another branch.
#[test]
fn the_prefix_cache_sees_only_what_is_never_cut() {
    for pinned in [40, 4] {
        let mut e = engine(|_| {});
        let tokens = prompt(8, 40);
        let id = e.prefill(&tokens, PrefillOptions::default()).unwrap();
        e.limit_kv(id, budget(24, pinned)).unwrap();
        e.start(id, greedy(100)).unwrap();
        run_all(&mut e);
        let said = e.tokens(id).unwrap().to_vec();
        assert!(e.stats(id).unwrap().kv_cuts > 3);
        let cached = e.engine_stats().blocks_cached;
        assert_eq!(cached, if pinned == 40 { 2 } else { 0 });
        e.prune(id).unwrap();
        let again = e.prefill(&said, PrefillOptions::default()).unwrap();
        run_all(&mut e);
        assert_eq!(e.engine_stats().tokens_from_cache, 16 * cached as u64);
        let mut fresh = engine(|_| {});
        let alone = fresh.prefill(&said, uncached()).unwrap();
        run_all(&mut fresh);
        assert_eq!(common::row_bits(&e, again), common::row_bits(&fresh, alone));
    }
}

/// A cut branch cannot go back into what was cut, says so, and stays as it was.
#[test]
fn going_back_behind_a_cut_is_refused() {
    let mut e = engine(|_| {});
    let id = limited_root(&mut e, &prompt(5, 20), 0, Some(budget(24, 20)), 90);
    run_all(&mut e);
    let (tokens, held) = (e.tokens(id).unwrap().to_vec(), positions(&e, id));
    let why = e.truncate(id, 60).unwrap_err().to_string();
    assert!(why.contains("budget"), "{why}");
    assert_eq!((e.tokens(id).unwrap(), positions(&e, id)), (&tokens[..], held));
    // Into its uncut end and into the pinned part it can.
    e.truncate(id, tokens.len() - 3).unwrap();
    e.check_integrity().unwrap();
    e.start(id, greedy(40)).unwrap();
    run_all(&mut e);
    e.truncate(id, 18).unwrap();
    e.start(id, greedy(5)).unwrap();
    let rows = traces(&mut e, &[id]);
    let mut fresh = engine(|_| {});
    let alone = limited_root(&mut fresh, &prompt(5, 20)[..18], 0, None, 5);
    assert_eq!(rows, traces(&mut fresh, &[alone]), "cut back to its prompt it is as new");
    assert!(e.limit_kv(id, budget(4, 2)).unwrap_err().to_string().starts_with("kv-budget"));
}

/// Freed blocks become branches: a cache that holds one branch in full holds as many limited ones as fit, and no more are
/// let in than can stay.
#[test]
fn freed_blocks_become_branches() {
    let (prompt_len, new): (usize, usize) = (16, 400);
    let full_blocks = (prompt_len + new).div_ceil(16) as u64 + 1;
    let small = |c: &mut EngineConfig| {
        let block = engine(|_| {}).info().kv_bytes_per_token * 16;
        c.kv_cache_memory = Some(full_blocks * block);
    };
    let mut e = engine(small);
    let limit = KvBudget { buffer: 16, ..KvBudget::new(32, prompt_len, 16) };
    // 16 pinned, 32 kept and 16 on top: 4 blocks a branch, of 27.
    for i in 0..20 {
        limited_root(&mut e, &prompt(i, prompt_len), i, Some(limit), new);
    }
    let (mut most, mut ended) = (0, 0);
    while e.has_work() {
        let summary = e.step().unwrap();
        most = most.max(summary.items.len());
        assert!(e.engine_stats().blocks_used as u64 <= full_blocks);
        while let Some(event) = e.next_event() {
            if matches!(event.kind, EventKind::Ended(_)) {
                assert_eq!(e.tokens(event.branch).unwrap().len(), prompt_len + new);
                e.prune(event.branch).unwrap();
                ended += 1;
            }
        }
    }
    assert_eq!(most, full_blocks as usize / 4);
    let stats = e.engine_stats();
    assert_eq!((stats.preemptions, stats.tokens_recomputed), (0, 0));
    assert_eq!(ended, 20);
}

/// KV13 and swapping: on a random walk with many forks, branches that give up their blocks at random steps say and hold the
/// same as if they had not, and those without a budget the same as if nobody had one.
#[test]
fn a_random_walk_with_forks_and_swaps_changes_nobody() {
    let (mut cuts, mut preempted, mut exact) = (0, 0, 0);
    for seed in 0..20 {
        let mut calm = engine(|_| {});
        let expected = Walk::new(seed, false).run(&mut calm);
        let mut rough = engine(|c| c.threads = 2);
        let got = Walk::new(seed, true).run(&mut rough);
        got.assert_same(&expected, seed);
        for i in (0..expected.rows.len()).filter(|&i| expected.is_exact[i] && !expected.is_stale[i]) {
            let Some(last) = expected.rows[i].last() else { continue };
            exact += 1;
            let mut fresh = engine(|_| {});
            // Its last row came from all its tokens but the one it then said, where it said one.
            let said = usize::from(last[7] != u32::MAX);
            let tokens = &expected.tokens[i][..expected.tokens[i].len() - said];
            let id = fresh.prefill(tokens, uncached()).unwrap();
            run_all(&mut fresh);
            assert_eq!(common::row_bits(&fresh, id)[..7], last[..7], "seed {seed}, branch {i}: not as alone");
        }
        cuts += calm.engine_stats().kv_cuts;
        preempted += rough.engine_stats().preemptions;
    }
    assert!(cuts > 500 && preempted > 500 && exact > 50, "{cuts} cuts, {preempted} swaps, {exact} exact branches");
}

//! The library's calls at their edges: handles that name nobody, numbers at the end of their range, and what an error
//! leaves behind.

mod common;

use common::*;
use rksc::Error;
use rksc::engine::{BranchId, EndReason, Engine, EventKind, GenerateParams, PrefillOptions};

/// Every call that takes a branch, with one that must be refused.
fn refused(engine: &mut Engine, own: BranchId, bad: BranchId) {
    let is_refused = |what: &str, error: Option<Error>| match error {
        Some(Error::Branch { branch, .. }) => assert_eq!(branch, bad.to_string(), "{what}"),
        other => panic!("{what}: {other:?} instead of Error::Branch"),
    };
    let (before, used) = (engine.tokens(own).unwrap().to_vec(), engine.engine_stats());
    is_refused("fork", engine.fork(bad, &mut [BranchId::default()]).err());
    is_refused("append", engine.append(bad, &[7]).err());
    is_refused("truncate", engine.truncate(bad, 1).err());
    is_refused("prune", engine.prune(bad).err());
    is_refused("merge from", engine.merge(own, bad).err());
    is_refused("merge into", engine.merge(bad, own).err());
    is_refused("select", engine.select(&[own, bad]).err());
    is_refused("start", engine.start(bad, greedy(1)).err());
    is_refused("stop", engine.stop(bad).err());
    is_refused("watch", engine.watch(bad, &[7], 1).err());
    is_refused("score", engine.score(bad, &[7], &mut [0.0]).err());
    is_refused("score_prompt", engine.score_prompt(bad, &mut [0.0]).err());
    is_refused("row", engine.row(bad).err());
    is_refused("tokens", engine.tokens(bad).err());
    is_refused("stats", engine.stats(bad).err());
    is_refused("confidence", engine.confidence(bad).err());
    assert_eq!((engine.tokens(own).unwrap(), engine.engine_stats()), (&before[..], used));
    engine.check_integrity().unwrap();
}

#[test]
fn stale_foreign_and_default_handles_are_refused_by_every_call() {
    let (mut ours, mut theirs) = (engine(|_| {}), engine(|_| {}));
    let prompt = Rng(1).tokens(20);
    // Both engines count their branches alike.
    let own: Vec<BranchId> = (0..3).map(|_| ours.prefill(&prompt, uncached()).unwrap()).collect();
    let foreign: Vec<BranchId> = (0..3).map(|_| theirs.prefill(&prompt, uncached()).unwrap()).collect();
    run_all(&mut ours);
    ours.prune(own[1]).unwrap();
    refused(&mut ours, own[0], own[1]);
    let again = ours.prefill(&prompt, uncached()).unwrap();
    assert_ne!(again, own[1], "a handle came back");
    refused(&mut ours, own[0], own[1]);
    for &bad in &foreign {
        refused(&mut ours, own[0], bad);
    }
    refused(&mut ours, own[0], BranchId::default());
}

#[test]
fn numbers_at_the_end_of_their_range_are_limits_and_not_traps() {
    let mut engine = engine(|_| {});
    let branch = engine.prefill(&Rng(2).tokens(2040), uncached()).unwrap();
    engine.start(branch, greedy(usize::MAX)).unwrap();
    run_all(&mut engine);
    let stats = engine.stats(branch).unwrap();
    assert_eq!((stats.num_tokens, stats.ended), (2048, Some(EndReason::Context)));
    // None at all is an end like any other.
    let branch = engine.prefill(&Rng(3).tokens(9), uncached()).unwrap();
    engine.start(branch, GenerateParams { min_new_tokens: usize::MAX, ..greedy(0) }).unwrap();
    let kinds: Vec<EventKind> =
        std::iter::from_fn(|| engine.next_event()).filter(|e| e.branch == branch).map(|e| e.kind).collect();
    assert_eq!(kinds, [EventKind::Ended(EndReason::Length)]);
    assert!(!engine.has_work());
    engine.watch(branch, &[], usize::MAX).unwrap();
    engine.append(branch, &[8]).unwrap();
    run_all(&mut engine);
    assert_eq!(engine.row(branch).unwrap().unwrap().top.len(), 768);
}

#[test]
fn children_have_the_votes_of_their_parent() {
    let mut engine = engine(|_| {});
    let root = engine.prefill(&Rng(6).tokens(20), uncached()).unwrap();
    let (a, b) = (fork(&mut engine, root), fork(&mut engine, root));
    engine.merge(a, b).unwrap();
    let child = fork(&mut engine, a);
    assert_eq!([root, a, child].map(|id| engine.stats(id).unwrap().votes), [1.0, 2.0, 2.0]);
}

#[test]
fn an_uncached_branch_leaves_nothing_in_the_prefix_cache() {
    let mut engine = engine(|_| {});
    let root = engine.prefill(&Rng(6).tokens(40), PrefillOptions::default()).unwrap();
    let ids = [fork(&mut engine, root), fork(&mut engine, root)];
    for (i, &id) in ids.iter().enumerate() {
        engine.append(id, &Rng(7 + i as u64).tokens(40)).unwrap();
    }
    run_all(&mut engine);
    let used = |e: &Engine| (e.engine_stats().blocks_used, e.engine_stats().blocks_cached);
    // Root: 2 whole blocks and a tail. Each fork: 3 whole blocks of its own, no tail.
    assert_eq!(used(&engine), (3 + 2 * 3, 2 + 2 * 3));
    engine.prune(ids[0]).unwrap();
    assert_eq!(used(&engine), (9, 8), "pruned alone, a branch's whole blocks stay cached");
    engine.uncache(ids[1]).unwrap();
    assert_eq!(used(&engine), (9, 5));
    engine.prune(ids[1]).unwrap();
    assert_eq!(used(&engine), (6, 5));
    engine.check_integrity().unwrap();
}

#[test]
fn a_refused_call_changes_nothing() {
    let mut engine = engine(|_| {});
    let prompt = Rng(4).tokens(30);
    let branch = engine.prefill(&prompt, uncached()).unwrap();
    engine.watch(branch, &[7], 2).unwrap();
    run_all(&mut engine);
    let state = |e: &Engine| (e.tokens(branch).unwrap().to_vec(), row_bits(e, branch), e.engine_stats());
    let before = state(&engine);
    let vocab = engine.model().vocab_size as u32;
    let hot = |temperature| {
        let mut params = greedy(4);
        params.sampling.temperature = temperature;
        params
    };
    let errors = [
        engine.prefill(&[], uncached()).err(),
        engine.prefill(&[vocab], uncached()).err(),
        engine.append(branch, &[7, vocab]).err(),
        engine.append(branch, &[7; 2048]).err(),
        engine.truncate(branch, 0).err(),
        engine.truncate(branch, 31).err(),
        engine.merge(branch, branch).err(),
        engine.select(&[]).err(),
        engine.start(branch, hot(-1.0)).err(),
        engine.start(branch, hot(f32::NAN)).err(),
        engine.start(branch, GenerateParams { end_tokens: vec![vocab], ..greedy(4) }).err(),
        engine.watch(branch, &[u32::MAX], 0).err(),
        engine.score_prompt(branch, &mut [0.0; 30]).err(),
        engine.score(branch, &[7, 8], &mut [0.0]).err(),
        engine.score(branch, &[vocab], &mut [0.0]).err(),
    ];
    for (i, error) in errors.into_iter().enumerate() {
        let error = error.unwrap_or_else(|| panic!("call {i} was accepted"));
        assert!(matches!(error, Error::Config { .. } | Error::Shape { .. }), "call {i}: {error:?}");
    }
    assert!(state(&engine) == before && !engine.has_work());
    assert_eq!(engine.next_event(), None);
}

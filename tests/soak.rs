//! Long and narrow: many requests that come, fork, grow and are cancelled in a small cache; forward progress when only
//! one of them fits; refusal up front of what can never fit; cancellation between steps.

mod common;

use std::collections::HashSet;

use common::*;
use rksc::engine::{
    BranchId, BranchStats, Engine, EngineStats, Event, EventKind, GenerateParams, PrefillOptions, RowAnswer,
};
use rksc::kv::eviction::Eviction;
use rksc::sampler::SamplingParams;
use rksc::{DType, Error};

const NUM_REQUESTS: usize = 600;
const MAX_IN_FLIGHT: usize = 12;

fn small(blocks: u64) -> Engine {
    small_with(blocks, Eviction::Lru)
}

fn small_with(blocks: u64, eviction: Eviction) -> Engine {
    let block_bytes = 16 * engine(|_| {}).info().kv_bytes_per_token;
    let engine = engine(|c| {
        c.kv_cache_memory = Some(blocks * block_bytes);
        c.max_batch_tokens = 256;
        c.eviction = eviction;
    });
    assert_eq!(engine.engine_stats().blocks as u64, blocks);
    engine
}

struct Request {
    branches: Vec<BranchId>,
    /// Steps until it is cancelled, if it is to be.
    cancelled_in: Option<usize>,
    /// It may still grow when all its branches have ended.
    turns: usize,
}

fn submit(engine: &mut Engine, rng: &mut Rng, common: &[u32]) -> Request {
    let shared = rng.below(common.len());
    let own_len = 1 + rng.below(60);
    let own = rng.tokens(own_len);
    let prompt = if rng.below(3) == 0 { own } else { [&common[..shared], &own].concat() };
    let options = PrefillOptions { use_prefix_cache: rng.below(4) != 0, salt: rng.below(2) as u64, path: rng.next() };
    let root = engine.prefill(&prompt, options).unwrap();
    let mut branches = vec![root];
    for _ in 0..rng.below(4) {
        let parent = branches[rng.below(branches.len())];
        let child = fork(engine, parent);
        let len = 1 + rng.below(20);
        engine.append(child, &rng.tokens(len)).unwrap();
        branches.push(child);
    }
    for &branch in &branches {
        if rng.below(4) != 0 {
            engine.start(branch, params(rng)).unwrap();
        }
    }
    let cancelled_in = (rng.below(10) < 3).then(|| rng.below(20));
    Request { branches, cancelled_in, turns: rng.below(3) }
}

fn params(rng: &mut Rng) -> GenerateParams {
    let temperature = [0.0, 0.9][rng.below(2)];
    let sampling = SamplingParams { temperature, seed: rng.next(), ..SamplingParams::default() };
    GenerateParams { sampling, end_tokens: vec![EOS], ..greedy(1 + rng.below(24)) }
}

#[test]
fn six_hundred_requests_leave_nothing_behind() {
    Eviction::ALL.into_iter().for_each(six_hundred_requests);
}

fn six_hundred_requests(eviction: Eviction) {
    let mut engine = small_with(72, eviction);
    let mut rng = Rng(20_240_601);
    let common = rng.tokens(150);
    let mut live: Vec<Request> = Vec::new();
    let mut at_rest: HashSet<BranchId> = HashSet::new();
    let (mut submitted, mut finished, mut cancelled, mut steps) = (0, 0, 0, 0);
    while submitted < NUM_REQUESTS || !live.is_empty() {
        while submitted < NUM_REQUESTS && live.len() < MAX_IN_FLIGHT && rng.below(3) != 0 {
            live.push(submit(&mut engine, &mut rng, &common));
            submitted += 1;
        }
        engine.step().unwrap_or_else(|e| panic!("step {steps}, {submitted} requests in: {e}"));
        steps += 1;
        assert!(steps < 200_000, "no end in sight: {finished} finished, {cancelled} cancelled");
        while let Some(Event { branch, kind }) = engine.next_event() {
            if matches!(kind, EventKind::Ready | EventKind::Ended(_)) {
                at_rest.insert(branch);
            }
        }
        if steps % 4 == 0 {
            engine.check_integrity().unwrap_or_else(|e| panic!("step {steps}: {e}"));
        }
        for i in (0..live.len()).rev() {
            let request = &mut live[i];
            let cancel = request.cancelled_in == Some(0);
            request.cancelled_in = request.cancelled_in.map(|n| n.saturating_sub(1));
            if !cancel && !request.branches.iter().all(|b| at_rest.contains(b)) {
                continue;
            }
            if !cancel && request.turns > 0 {
                request.turns -= 1;
                // Whatever rests may have lost its blocks meanwhile; it is asked for more all the same.
                let branch = request.branches[rng.below(request.branches.len())];
                at_rest.remove(&branch);
                let num_tokens = engine.stats(branch).unwrap().num_tokens;
                if rng.below(4) == 0 {
                    engine.truncate(branch, 1 + rng.below(num_tokens)).unwrap();
                }
                let len = 1 + rng.below(20);
                engine.append(branch, &rng.tokens(len)).unwrap();
                if rng.below(2) == 0 {
                    engine.start(branch, params(&mut rng)).unwrap();
                }
                continue;
            }
            // Parents may go before their children, or behind them.
            let mut request = live.swap_remove(i);
            if rng.below(2) == 0 {
                request.branches.reverse();
            }
            for branch in request.branches {
                engine.prune(branch).unwrap();
            }
            if cancel { cancelled += 1 } else { finished += 1 }
        }
    }
    let stats = engine.engine_stats();
    println!(
        "{eviction}: {finished} finished, {cancelled} cancelled in {steps} steps; {} preemptions, {} tokens computed, {} from the cache",
        stats.preemptions, stats.tokens_computed, stats.tokens_from_cache
    );
    assert!(finished + cancelled == NUM_REQUESTS && cancelled > NUM_REQUESTS / 10);
    assert!(stats.preemptions > 0 && stats.tokens_from_cache > 0, "the soak did not reach its corners");
    assert_eq!(stats.branches, 0);
    assert_eq!(stats.blocks_used, stats.blocks_cached, "blocks are lost");
    engine.clear_prefix_cache().unwrap();
    engine.check_integrity().unwrap();
    assert_eq!(engine.engine_stats().blocks_used, 0);
}

/// What the owners of `branches` see of them.
fn views(engine: &Engine, branches: &[BranchId]) -> Vec<(Vec<u32>, Option<RowAnswer>, BranchStats)> {
    let view = |&b: &BranchId| {
        let stats = BranchStats { entropy: 0.0, ..engine.stats(b).unwrap() }; // NaN before the first row; `row` has it
        (engine.tokens(b).unwrap().to_vec(), engine.row(b).unwrap().cloned(), stats)
    };
    branches.iter().map(view).collect()
}

#[test]
fn refused_allocations_leave_every_branch_as_it_was() {
    const NUM: u64 = 400;
    let common = Rng(1).tokens(150);
    let mut huge = engine(|_| {});
    let undisturbed: Vec<Vec<Vec<u32>>> = (0..NUM)
        .map(|seed| {
            let request = submit(&mut huge, &mut Rng(seed), &common);
            let (tokens, _) = finish(&mut huge, &request.branches);
            request.branches.into_iter().for_each(|b| huge.prune(b).unwrap());
            tokens
        })
        .collect();

    let mut engine = small(72);
    let mut rng = Rng(20_240_602);
    let mut live: Vec<(u64, Request)> = Vec::new();
    let mut at_rest: HashSet<BranchId> = HashSet::new();
    let (mut submitted, mut finished, mut cancelled, mut steps, mut refused, mut untouched) = (0, 0, 0, 0, 0, 0);
    while submitted < NUM || !live.is_empty() {
        while submitted < NUM && live.len() < MAX_IN_FLIGHT && rng.below(3) != 0 {
            live.push((submitted, submit(&mut engine, &mut Rng(submitted), &common)));
            submitted += 1;
        }
        // One step in twenty gets no memory: before its first branch, between two of them, or for the pass itself.
        if engine.has_work() && rng.below(20) == 0 {
            let branches: Vec<BranchId> = live.iter().flat_map(|(_, r)| r.branches.clone()).collect();
            let (before, totals) = (views(&engine, &branches), engine.engine_stats());
            engine.fail_allocation(rng.below(MAX_IN_FLIGHT));
            match engine.step() {
                Err(Error::OutOfMemory { what: "a step", bytes }) => assert!(bytes > 0),
                other => panic!("step {steps}: {other:?} instead of OutOfMemory"),
            }
            refused += 1;
            engine.check_integrity().unwrap_or_else(|e| panic!("step {steps}: {e}"));
            let after = views(&engine, &branches);
            for (before, after) in before.iter().zip(&after) {
                assert!(before.0 == after.0 && before.1 == after.1, "step {steps}: a refused step left its mark");
                let kept =
                    |s: &BranchStats| (s.num_generated_tokens, s.ended, s.mean_confidence.to_bits(), s.votes.to_bits());
                assert_eq!(kept(&before.2), kept(&after.2));
            }
            // Unless it made room, or looked into the prefix cache, not a block has moved.
            let totals_after = engine.engine_stats();
            let made_room = |s: &EngineStats| (s.preemptions, s.tokens_from_cache, s.blocks_cached);
            if made_room(&totals) == made_room(&totals_after) {
                untouched += 1;
                assert!(before == after, "step {steps}: blocks moved");
                assert_eq!(totals_after.blocks_used, totals.blocks_used);
            }
        }
        engine.step().unwrap_or_else(|e| panic!("step {steps}, {submitted} requests in: {e}"));
        steps += 1;
        assert!(steps < 200_000, "no end in sight: {finished} finished, {cancelled} cancelled");
        while let Some(Event { branch, kind }) = engine.next_event() {
            if matches!(kind, EventKind::Ready | EventKind::Ended(_)) {
                at_rest.insert(branch);
            }
        }
        for i in (0..live.len()).rev() {
            let (seed, request) = &mut live[i];
            let cancel = request.cancelled_in == Some(0);
            request.cancelled_in = request.cancelled_in.map(|n| n.saturating_sub(1));
            if cancel {
                cancelled += 1;
            } else if request.branches.iter().all(|b| at_rest.contains(b)) {
                for (&b, expected) in request.branches.iter().zip(&undisturbed[*seed as usize]) {
                    assert_eq!(engine.tokens(b).unwrap(), expected, "request {seed}: another answer");
                }
                finished += 1;
            } else {
                continue;
            }
            let (_, request) = live.swap_remove(i);
            request.branches.into_iter().for_each(|b| engine.prune(b).unwrap());
        }
    }
    let stats = engine.engine_stats();
    println!(
        "{finished} finished, {cancelled} cancelled, {refused} of {steps} steps refused, {untouched} of them without a \
         block moved; {} preemptions",
        stats.preemptions
    );
    assert!(finished + cancelled == NUM && cancelled > NUM / 10 && finished > NUM / 2);
    assert!(refused > steps / 40 && untouched > refused / 4 && stats.preemptions > 0);
    engine.clear_prefix_cache().unwrap();
    engine.check_integrity().unwrap();
    assert_eq!((engine.engine_stats().branches, engine.engine_stats().blocks_used), (0, 0));
}

/// Runs to the end; tokens of every branch, and the most often that any was preempted.
fn finish(engine: &mut Engine, branches: &[BranchId]) -> (Vec<Vec<u32>>, u32) {
    run_all(engine);
    engine.check_integrity().unwrap();
    let preempted = branches.iter().map(|&b| engine.stats(b).unwrap().preemptions).max().unwrap();
    (branches.iter().map(|&b| engine.tokens(b).unwrap().to_vec()).collect(), preempted)
}

#[test]
fn a_pool_for_one_finishes_sixty_four() {
    const NEW: usize = 40;
    let mut rng = Rng(9);
    // The largest needs 320 tokens, 20 blocks; 1.05 times that is 21.
    let prompts: Vec<Vec<u32>> = (0..64).map(|i| rng.tokens(if i == 17 { 280 } else { 8 + (i * 37) % 272 })).collect();
    let start = |engine: &mut Engine| -> Vec<BranchId> {
        let start_one = |prompt: &Vec<u32>| {
            let branch = engine.prefill(prompt, uncached()).unwrap();
            engine.start(branch, greedy(NEW)).unwrap();
            branch
        };
        prompts.iter().map(start_one).collect()
    };
    let mut huge = engine(|_| {});
    let branches = start(&mut huge);
    let (expected, never) = finish(&mut huge, &branches);
    assert_eq!(never, 0);
    for eviction in Eviction::ALL {
        let mut tight = small_with(21, eviction);
        let branches = start(&mut tight);
        let (got, preempted) = finish(&mut tight, &branches);
        let preemptions = tight.engine_stats().preemptions;
        println!("{eviction}: {preemptions} preemptions in all, at most {preempted} of one branch");
        assert!(preemptions > 0, "the pool was not tight");
        assert!(preempted <= 8, "{eviction}: one branch was preempted {preempted} times");
        assert!(got == expected, "{eviction}: tokens depend on the size of the pool");
        assert!(got.iter().zip(&prompts).all(|(t, p)| t.len() == p.len() + NEW));
    }
}

#[test]
fn a_pool_for_one_finishes_sixty_four_forks_of_an_idle_root() {
    const NEW: usize = 40;
    let mut rng = Rng(10);
    let root_tokens = rng.tokens(250);
    let suffixes: Vec<Vec<u32>> = (0..64).map(|i| rng.tokens(1 + i % 23)).collect();
    for cached in [false, true] {
        let start = |engine: &mut Engine| -> Vec<BranchId> {
            let options = PrefillOptions { use_prefix_cache: cached, ..PrefillOptions::default() };
            let root = engine.prefill(&root_tokens, options).unwrap();
            let start_one = |suffix: &Vec<u32>| {
                let branch = fork(engine, root);
                engine.append(branch, suffix).unwrap();
                engine.start(branch, greedy(NEW)).unwrap();
                branch
            };
            let mut branches: Vec<BranchId> = suffixes.iter().map(start_one).collect();
            branches.push(root);
            branches
        };
        let mut huge = engine(|_| {});
        let branches = start(&mut huge);
        let (expected, _) = finish(&mut huge, &branches);
        for eviction in Eviction::ALL {
            // 250 + 23 + 40 tokens: 20 blocks.
            let mut tight = small_with(21, eviction);
            let branches = start(&mut tight);
            let (got, preempted) = finish(&mut tight, &branches);
            let preemptions = tight.engine_stats().preemptions;
            println!("cached {cached}, {eviction}: {preemptions} preemptions, at most {preempted} of one");
            assert!(got == expected, "{eviction}: tokens depend on the size of the pool");
            assert!(preempted <= 8, "cached {cached}, {eviction}: one branch was preempted {preempted} times");
        }
    }
}

#[test]
fn what_can_never_fit_is_refused_up_front_with_the_missing_bytes() {
    let mut engine = small(21);
    let block_bytes = 16 * engine.info().kv_bytes_per_token;
    let refuse = |result: Result<(), Error>, blocks: usize| match result {
        Err(Error::OutOfBlocks { needed, capacity, missing_bytes }) => {
            assert_eq!((needed, capacity), (blocks, 21));
            assert_eq!(missing_bytes, (blocks as u64 - 21) * block_bytes);
        }
        other => panic!("{other:?} instead of OutOfBlocks"),
    };
    let mut rng = Rng(3);
    refuse(engine.prefill(&rng.tokens(321), uncached()).map(drop), 22);
    refuse(engine.prefill(&rng.tokens(500), uncached()).map(drop), 33);
    assert_eq!(engine.engine_stats().branches, 0, "a refused prompt left a branch");
    let branch = engine.prefill(&rng.tokens(300), uncached()).unwrap();
    refuse(engine.append(branch, &rng.tokens(21)), 22);
    refuse(engine.start(branch, greedy(21)), 22);
    let message = engine.start(branch, greedy(21)).unwrap_err().to_string();
    assert!(message.contains(&format!("{block_bytes} bytes are missing")), "{message}");
    // What just fits runs.
    engine.start(branch, greedy(20)).unwrap();
    run_all(&mut engine);
    assert_eq!(engine.tokens(branch).unwrap().len(), 320);
    // Beyond the model's context nothing helps, and that is said instead.
    let error = small(600).prefill(&rng.tokens(2049), uncached()).unwrap_err().to_string();
    assert!(error.contains("2048"), "{error}");
}

#[test]
fn a_raised_flag_stops_steps_and_a_cleared_one_lets_them_go_on() {
    let mut rng = Rng(4);
    let prompt = rng.tokens(50);
    let start = |engine: &mut Engine| {
        let branch = engine.prefill(&prompt, uncached()).unwrap();
        engine.start(branch, greedy(12)).unwrap();
        branch
    };
    let mut engine = engine(|c| c.dtype = DType::F32);
    let undisturbed = start(&mut engine);
    run_all(&mut engine);
    let branch = start(&mut engine);
    for _ in 0..4 {
        engine.step().unwrap();
    }
    let flag = engine.cancel_flag();
    std::thread::spawn(move || flag.raise()).join().unwrap();
    let before = engine.stats(branch).unwrap();
    for _ in 0..3 {
        assert!(matches!(engine.step(), Err(Error::Cancelled)));
    }
    let after = engine.stats(branch).unwrap();
    assert_eq!((after.num_tokens, after.num_computed_tokens), (before.num_tokens, before.num_computed_tokens));
    assert_eq!(after.num_generated_tokens, 4);
    assert!(engine.has_work());
    engine.cancel_flag().clear();
    run_all(&mut engine);
    assert_eq!(engine.tokens(branch).unwrap(), engine.tokens(undisturbed).unwrap());
}

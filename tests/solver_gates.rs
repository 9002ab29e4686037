//! The solver's approximations against the exact job: what never fires changes nothing, what merges conserves votes, and
//! nothing stays behind.

mod common;

use std::sync::Arc;

use common::*;
use rksc::Error;
use rksc::engine::{EndReason, Engine};
use rksc::gate::asks::{Asks, AsksScope};
use rksc::gate::step::{Converged, DecodeExit, TrialRule};
use rksc::gate::verify::{SkipRule, VerifyExit};
use rksc::problems::Problem;
use rksc::prompts::PromptPack;
use rksc::report::ProblemResult;
use rksc::solver::select::Select;
use rksc::solver::task::{Task, TextTask};
use rksc::solver::{Policy, SearchConfig, Solver, SolverConfig, StepScore, VerifyMode};

fn exact() -> SolverConfig {
    SolverConfig { num_branches: 4, verify: VerifyMode::Off, ..SolverConfig::preset(Policy::Exact) }
}

fn merging(tau: f32) -> SolverConfig {
    SolverConfig { merge: Some(Converged::at(tau)), ..exact() }
}

fn asking(tau: f32) -> SolverConfig {
    let asks = Asks { tau, ..Asks::default() };
    SolverConfig { wordings: 3, asks: Some(asks), ..exact() }
}

/// Blocks of the bundled model in bf16.
fn blocks(n: u64) -> Option<u64> {
    Some(n * 16 * 2 * 2 * 8 * 32 * 2)
}

/// What every branch said, bit for bit, and what came of it.
fn said(results: &[ProblemResult]) -> Vec<String> {
    let branch = |b: &rksc::report::BranchResult| {
        let (confidence, score) = (b.confidence.to_bits(), b.score.map(f64::to_bits));
        format!("{:?} {confidence} {score:?} {:?} {}", b.tokens, b.ended, b.votes)
    };
    let one = |r: &ProblemResult| {
        let branches: Vec<String> = r.branches.iter().map(branch).collect();
        format!("{:?} {} {}", r.answer, r.winner, branches.join("\n"))
    };
    results.iter().map(one).collect()
}

fn check_votes(result: &ProblemResult) -> usize {
    let sum: f64 = result.branches.iter().map(|b| b.votes).sum();
    assert_eq!(sum, result.branches.len() as f64, "votes are conserved");
    assert!(result.branches[result.winner].merged_into.is_none(), "a branch that is gone cannot win");
    for b in &result.branches {
        assert_eq!(b.merged_into.is_some(), b.ended == Some(EndReason::Merged));
        assert_eq!(b.merged_into.is_some(), b.votes == 0.0);
        let chain = |i: usize| result.branches[i].branch != b.branch;
        assert!(b.merged_into.is_none_or(chain));
    }
    result.branches.iter().filter(|b| b.merged_into.is_some()).count()
}

/// Tasks of a pack whose approaches are these, and do not bear a number.
fn unnumbered(approaches: &[&str], change: impl Fn(&mut PromptPack), n: usize) -> Vec<Box<dyn Task>> {
    let mut pack = prompt_pack();
    pack.approach = "\nApproach: {approach}\nStep 1:".into();
    pack.approaches = approaches.iter().map(|a| a.to_string()).collect();
    change(&mut pack);
    let pack = compiled(pack, "");
    let task = |p: &Problem| Box::new(TextTask::new(Arc::clone(&pack), p.clone()).unwrap()) as Box<dyn Task>;
    problems("dev", n).iter().map(task).collect()
}

#[test]
fn branches_with_equal_tokens_merge_at_once() {
    let tasks = unnumbered(&["Use short equations.", "Use short equations."], |_| (), 3);
    let two = |config: SolverConfig| SolverConfig { num_branches: 2, ..config };
    let plain = solve(&mut engine(|_| ()), &two(exact()), &tasks);
    let merged = solve(&mut engine(|_| ()), &two(merging(0.9999)), &tasks);
    for (p, m) in plain.iter().zip(&merged) {
        assert_eq!(p.branches[0].tokens, p.branches[1].tokens);
        assert_eq!(check_votes(m), 1);
        let gone = m.branches.iter().position(|b| b.merged_into.is_some()).unwrap();
        let survivor = &m.branches[1 - gone];
        assert_eq!((m.branches[gone].merged_into, survivor.votes), (Some(1 - gone), 2.0));
        assert_eq!((&survivor.tokens, &m.answer), (&p.branches[0].tokens, &p.answer));
        // Compared in the first decode step, gone after it: its second token is never run.
        assert_eq!(m.branches[gone].tokens, p.branches[0].tokens[..2]);
        assert_eq!(survivor.ended, Some(EndReason::EndToken));
        assert_eq!(p.tokens.decode - m.tokens.decode, survivor.tokens.len() as u64 - 1, "rows saved");
        assert_eq!(p.tokens.prefill, m.tokens.prefill);
    }
}

#[test]
fn a_threshold_above_one_merges_nothing() {
    let tasks = tasks(&problems("dev", 4), "");
    let plain = said(&solve(&mut engine(|_| ()), &exact(), &tasks));
    for (concurrency, memory) in [(1, Some(64 << 20)), (3, Some(64 << 20)), (4, blocks(30))] {
        let mut e = engine(|c| c.kv_cache_memory = memory);
        let config = SolverConfig { concurrency, merge: Some(Converged { every: 1, ..Converged::at(2.0) }), ..exact() };
        assert_eq!(said(&solve(&mut e, &config, &tasks)), plain, "{concurrency} in flight");
        assert_eq!(e.engine_stats().preemptions > 0, memory == blocks(30));
    }
}

#[test]
fn merging_conserves_votes_and_saves_rows() {
    let tasks = tasks(&problems("dev", 4), "");
    let plain = solve(&mut engine(|_| ()), &exact(), &tasks);
    let mut merges = Vec::new();
    for tau in [-1.0, 0.8, 0.95] {
        let config = SolverConfig { concurrency: 2, ..merging(tau) };
        let results = solve(&mut engine(|_| ()), &config, &tasks);
        merges.push(results.iter().map(check_votes).sum::<usize>());
        for (p, m) in plain.iter().zip(&results) {
            assert!(m.tokens.decode <= p.tokens.decode);
            assert_eq!(m.branches.iter().all(|b| b.votes == 1.0), m.branches.iter().all(|b| b.merged_into.is_none()));
        }
    }
    assert_eq!(merges[0], 3 * tasks.len(), "all are alike");
    assert!(merges.is_sorted_by(|a, b| a >= b), "{merges:?}");
}

#[test]
fn merged_branches_neither_win_nor_hide_an_agreement() {
    let tasks = tasks(&problems("dev", 3), "");
    let verified = SolverConfig { verify: VerifyMode::Suffix, select: Select::ScoreSqrtConf, ..merging(-1.0) };
    for result in solve(&mut engine(|_| ()), &verified, &tasks) {
        assert_eq!(check_votes(&result), 3);
        assert_eq!(result.verify.run, 1, "the survivor alone is asked");
        assert_eq!(result.answer, result.branches[result.winner].answer);
    }
    let agreed = SolverConfig { skip: SkipRule::Agreement { k: 4 }, ..verified };
    for result in solve(&mut engine(|_| ()), &agreed, &tasks) {
        assert_eq!(result.verify.skipped, result.answer.is_some(), "four branches speak with one voice");
    }
}

#[test]
fn merging_works_beside_every_other_way_to_end() {
    let every = |tau: f32| Some(Converged { every: 1, ..Converged::at(tau) });
    let stops = |pack: &mut PromptPack| pack.stops = vec!["\nStep 3".into(), "The".into()];
    let all: Vec<String> = prompt_pack().approaches;
    let approaches: Vec<&str> = all.iter().map(String::as_str).collect();
    let tasks = unnumbered(&approaches, stops, 3);
    let trial_rule = TrialRule { confidence: 0.0, max_tokens: 16 };
    for decode_exit in
        [DecodeExit::Off, DecodeExit::Trial, DecodeExit::Decided, DecodeExit::StopAll, DecodeExit::PerBranch]
    {
        for tau in [2.0, 0.9] {
            let config = SolverConfig {
                merge: every(tau),
                decode_exit,
                trial_rule,
                concurrency: 2,
                record: true,
                verify: VerifyMode::Suffix,
                num_branches: 6,
                ..exact()
            };
            for memory in [Some(64 << 20), blocks(30)] {
                let results = solve(&mut engine(|c| c.kv_cache_memory = memory), &config, &tasks);
                results.iter().for_each(|r| drop(check_votes(r)));
            }
        }
    }
}

#[test]
fn wordings_are_prompts_like_any_other() {
    let tasks = tasks(&problems("dev", 3), "");
    let config = SolverConfig { wordings: 3, ..exact() };
    let shared = solve(&mut engine(|_| ()), &config, &tasks);
    let apart = SolverConfig {
        wordings: 3,
        num_branches: 4,
        verify: VerifyMode::Off,
        ..SolverConfig::preset(Policy::NoSharing)
    };
    let apart = solve(&mut engine(|_| ()), &apart, &tasks);
    for ((task, s), a) in tasks.iter().zip(&shared).zip(&apart) {
        for (idx, (b, same)) in s.branches.iter().zip(&a.branches).enumerate() {
            assert_eq!((&b.tokens, &b.answer, b.wording), (&same.tokens, &same.answer, idx % 3));
            let mut e = engine(|_| ());
            let prompt = [task.wording(idx % 3).unwrap(), task.branch(idx).unwrap()].concat();
            let id = e.prefill(&prompt, uncached()).unwrap();
            e.start(id, greedy_to_end()).unwrap();
            run_all(&mut e);
            assert_eq!(b.tokens, generated(&e, id, prompt.len()));
        }
        assert!(s.tokens.prefill < a.tokens.prefill);
    }
}

#[test]
fn wordings_that_stay_apart_change_no_token() {
    let tasks = tasks(&problems("dev", 4), "");
    let off = SolverConfig { asks: None, ..asking(2.0) };
    let plain = said(&solve(&mut engine(|_| ()), &off, &tasks));
    for recompute in [None, Some(0.2)] {
        for (scope, concurrency, memory) in [
            (AsksScope::Problem, 1, 64 << 20),
            (AsksScope::Batch, 4, 64 << 20),
            (AsksScope::Problem, 4, blocks(40).unwrap()),
        ] {
            let asks = Asks { tau: 2.0, scope, recompute, ..Asks::default() };
            let config = SolverConfig { asks: Some(asks), concurrency, record: true, ..asking(2.0) };
            let results = solve(&mut engine(|c| c.kv_cache_memory = Some(memory)), &config, &tasks);
            assert_eq!(said(&results), plain, "{scope:?}, {concurrency} in flight, recompute {recompute:?}");
            if memory == 64 << 20 {
                assert!(results.iter().all(|r| r.similarity.is_some()));
            }
        }
    }
}

/// All wordings become one: every branch says what a branch of the representative's wording says.
#[test]
fn shared_wordings_say_what_their_representative_says() {
    let tasks = tasks(&problems("dev", 3), "");
    for (task, result) in tasks.iter().zip(solve(&mut engine(|_| ()), &asking(-1.0), &tasks)) {
        let record = result.similarity.as_ref().unwrap();
        let label = record.clusters[0];
        assert!(record.clusters.iter().all(|&l| l == label));
        for (idx, b) in result.branches.iter().enumerate() {
            let prompt = [task.wording(label).unwrap(), task.branch(idx).unwrap()].concat();
            let mut e = engine(|_| ());
            let id = e.prefill(&prompt, uncached()).unwrap();
            e.start(id, greedy_to_end()).unwrap();
            run_all(&mut e);
            assert_eq!(b.tokens, generated(&e, id, prompt.len()), "{} branch {idx}", task.id());
        }
        assert!(result.tokens.probed > 0);
    }
}

#[test]
fn across_problems_only_equal_numbers_become_one() {
    let mut problems = problems("dev", 2);
    let mut twin = problems[0].clone();
    (twin.id, twin.question) = ("twin".into(), twin.paraphrases[0].clone());
    problems.insert(1, twin);
    let tasks = tasks(&problems, "");
    let asks = Asks { tau: -1.0, scope: AsksScope::Batch, ..Asks::default() };
    let config = SolverConfig { asks: Some(asks), concurrency: 3, ..exact() };
    let results = solve(&mut engine(|_| ()), &config, &tasks);
    let clusters = &results[0].similarity.as_ref().unwrap().clusters;
    assert_eq!(clusters.len(), 3);
    assert_eq!((clusters[0], clusters[2]), (clusters[1], 2), "the twin has the same numbers, the other problem others");
    let plain = solve(&mut engine(|_| ()), &exact(), &tasks);
    let tokens = |r: &ProblemResult| r.branches.iter().map(|b| b.tokens.clone()).collect::<Vec<_>>();
    let label = clusters[0];
    assert_eq!((tokens(&results[0]), tokens(&results[1])), (tokens(&plain[label]), tokens(&plain[label])));
    assert_eq!(tokens(&results[2]), tokens(&plain[2]));
}

#[test]
fn a_verification_that_never_exits_early_scores_the_same() {
    let tasks = tasks(&problems("dev", 3), "");
    for verify in [VerifyMode::Suffix, VerifyMode::Fresh, VerifyMode::FreshShared] {
        let off = SolverConfig { verify, ..exact() };
        let plain = said(&solve(&mut engine(|_| ()), &off, &tasks));
        for all_or_none in [false, true] {
            let never = VerifyExit { theta: -1.0, all_or_none, ..VerifyExit::CANDIDATES };
            let config = SolverConfig { verify_exit: Some(never), concurrency: 2, ..off.clone() };
            let results = solve(&mut engine(|_| ()), &config, &tasks);
            assert_eq!(said(&results), plain);
            assert!(results.iter().all(|r| r.verify.exited == 0 && r.verify.run == 4));
        }
        let recorded = solve(&mut engine(|_| ()), &SolverConfig { record: true, ..off }, &tasks);
        assert_eq!(said(&recorded), plain);
        assert!(recorded.iter().flat_map(|r| &r.branches).all(|b| b.layers.len() == 8 && b.exit_layer.is_none()));
    }
}

fn everything() -> SolverConfig {
    SolverConfig {
        merge: Some(Converged { every: 2, ..Converged::at(0.97) }),
        verify: VerifyMode::Suffix,
        verify_exit: Some(VerifyExit::CANDIDATES),
        decode_exit: DecodeExit::Decided,
        concurrency: 2,
        record: true,
        ..asking(0.5)
    }
}

#[test]
fn a_failed_step_leaves_nothing_behind_and_spoils_nothing() {
    let tasks = tasks(&problems("dev", 2), "");
    let config = everything();
    let clean = said(&solve(&mut engine(|_| ()), &config, &tasks));
    let mut e = engine(|_| ());
    let nothing_stays = |e: &mut Engine, what: &str| {
        assert_eq!(e.engine_stats().branches, 0, "{what}");
        e.clear_prefix_cache().unwrap();
        assert_eq!(e.engine_stats().blocks_used, 0, "{what}");
        e.check_integrity().unwrap();
    };
    for at in [0, 3, 99] {
        e.fail_allocation(at);
        let failed = Solver::new(&mut e, config.clone()).unwrap().solve(&tasks, &mut |_, _| Ok(()));
        assert!(failed.is_err(), "{at}");
        nothing_stays(&mut e, "a step without memory");
    }
    let refuse = &mut |_, _| Err(Error::Cancelled);
    assert!(Solver::new(&mut e, config.clone()).unwrap().solve(&tasks, refuse).is_err());
    nothing_stays(&mut e, "a result nobody wants");
    assert_eq!(said(&solve(&mut e, &config, &tasks)), clean);
}

#[test]
fn trees_grow_from_shared_wordings() {
    let tasks = tasks(&problems("dev", 2), "");
    let search = Some(SearchConfig { depth: 2, beam: 2, score: StepScore::Both, min_score: None });
    for (tau, recompute) in [(-1.0, None), (-1.0, Some(0.3)), (2.0, None)] {
        let asks = Some(Asks { tau, recompute, ..Asks::default() });
        let mut config = SolverConfig { search: search.clone(), record: true, asks, ..asking(tau) };
        config.sampling.temperature = 1.3;
        config.verify = VerifyMode::Suffix;
        let results = solve(&mut engine(|_| ()), &config, &tasks);
        for r in results {
            assert!(r.tree.len() > 4 && r.similarity.is_some());
            assert!(r.tree.iter().all(|n| n.text.is_ascii()));
        }
    }
}

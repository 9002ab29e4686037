//! Trial answers: a fork of a branch is asked for the answer at each step delimiter. What it says is what a branch with
//! that prompt says by hand, and asking changes nothing about the branch that is asked.

mod common;

use common::*;
use rksc::DType;
use rksc::engine::EndReason;
use rksc::gate::step::{DecodeExit, TrialRule};
use rksc::prompts::PromptPack;
use rksc::report::{BranchResult, TrialCounts};
use rksc::solver::task::{Task, TextTask};
use rksc::solver::{Policy, Solver, SolverConfig, VerifyMode};

fn config(decode_exit: DecodeExit, trial_rule: TrialRule) -> SolverConfig {
    SolverConfig { decode_exit, trial_rule, verify: VerifyMode::Off, ..SolverConfig::preset(Policy::Exact) }
}

/// Every answer stands.
const ANY: TrialRule = TrialRule { confidence: 0.0, max_tokens: 16 };

/// No answer comes to its end, and none stands.
const NONE: TrialRule = TrialRule { confidence: 0.0, max_tokens: 1 };

#[test]
fn asking_changes_nothing_about_the_branches_that_are_asked() {
    let tasks = tasks(&problems("dev", 6), "");
    let mut engine = engine(|_| {});
    let decided = solve(&mut engine, &config(DecodeExit::Decided, NONE), &tasks);
    let asked = solve(&mut engine, &config(DecodeExit::Trial, NONE), &tasks);
    for (d, a) in decided.iter().zip(&asked) {
        let said = |b: &BranchResult| (b.tokens.clone(), b.confidence.to_bits(), b.ended, b.votes);
        let (d_said, a_said): (Vec<_>, Vec<_>) =
            (d.branches.iter().map(said).collect(), a.branches.iter().map(said).collect());
        assert_eq!(d_said, a_said);
        assert_eq!((&d.answer, d.winner), (&a.answer, a.winner));
        assert_eq!(d.trials, TrialCounts::default());
        // Of each branch: one trial a step; the trial's tokens are all that came on top.
        let steps: usize = a.branches.iter().map(|b| b.text.matches('\n').count()).sum();
        assert_eq!((a.trials.run, a.trials.stood), (steps, 0));
        let question = tasks[0].trial().unwrap().len() as u64;
        assert!(a.trials.tokens <= steps as u64 * question, "a trial of one token computes its question alone");
        assert_eq!(a.tokens.total() - d.tokens.total(), a.trials.tokens);
    }
}

#[test]
fn a_branch_that_is_sure_ends_with_the_answer_it_was_asked_for() {
    let tasks = tasks(&problems("dev", 6), "");
    let mut engine = engine(|c| c.dtype = DType::F32);
    let tokenizer = tokenizer();
    let results = solve(&mut engine, &config(DecodeExit::Trial, ANY), &tasks);
    let mut stood = 0;
    for (task, result) in tasks.iter().zip(&results) {
        assert!(result.trials.stood <= result.trials.run);
        for b in result.branches.iter().filter(|b| b.ended == Some(EndReason::Stopped) && b.answer.is_some()) {
            let (steps, answer) = b.text.rsplit_once('\n').unwrap();
            let answer = answer.strip_prefix("The answer is").unwrap();
            let spoken =
                [branch_prompt(task.as_ref(), b.branch), tokenizer.encode(&format!("{steps}\nThe answer is")).unwrap()];
            let id = engine.prefill(&spoken.concat(), uncached()).unwrap();
            engine.start(id, greedy_to_end()).unwrap();
            run_all(&mut engine);
            let said = generated(&engine, id, spoken.concat().len());
            engine.prune(id).unwrap();
            assert_eq!(tokenizer.decode(&said).unwrap(), answer, "{}", task.id());
            assert_eq!(b.tokens[b.tokens.len() - said.len()..], said);
            assert_eq!(b.answer.as_deref(), Some(answer.trim_matches([' ', '.'])));
            stood += 1;
        }
    }
    assert_eq!(stood, results.iter().map(|r| r.trials.stood).sum::<usize>());
    assert!(stood > 6, "{stood}");
}

#[test]
fn what_stands_can_be_verified_and_counts_its_own_confidence() {
    let tasks = tasks(&problems("dev", 3), "");
    let mut engine = engine(|_| {});
    let config = SolverConfig { verify: VerifyMode::Suffix, ..config(DecodeExit::Trial, ANY) };
    for result in solve(&mut engine, &config, &tasks) {
        assert_eq!(result.verify.run, 8);
        for b in &result.branches {
            assert!(b.score.is_some_and(|s| s > 0.0 && s < 1.0) && b.confidence > 0.5 && b.confidence <= 1.0);
        }
    }
}

#[test]
fn a_pack_without_a_trial_is_refused_by_field() {
    let pack = PromptPack { trial: None, ..prompt_pack() };
    let tasks: Vec<Box<dyn Task>> =
        vec![Box::new(TextTask::new(compiled(pack, ""), problems("dev", 1).remove(0)).unwrap())];
    let mut engine = engine(|_| {});
    let mut run = |exit| {
        let outcome = Solver::new(&mut engine, config(exit, ANY)).unwrap().solve(&tasks, &mut |_, _| Ok(()));
        outcome.map_err(|e| e.to_string())
    };
    let error = run(DecodeExit::Trial).unwrap_err();
    assert!(error.contains("prompts: trial"), "{error}");
    run(DecodeExit::Decided).unwrap();
    let bad = |rule| config(DecodeExit::Trial, rule).validate().unwrap_err().to_string();
    assert!(bad(TrialRule { confidence: 1.5, ..ANY }).contains("trial-confidence"));
    assert!(bad(TrialRule { max_tokens: 0, ..ANY }).contains("max_tokens"));
}

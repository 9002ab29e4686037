//! Branches that grow as a tree: what the tree records against what the engine says by hand, its edges, and that nothing
//! of it stays behind.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use rksc::engine::{CancelFlag, EndReason};
use rksc::prompts::PromptPack;
use rksc::report::{NodeEnd, NodeResult, ProblemResult};
use rksc::solver::task::{Task, TextTask};
use rksc::solver::{Policy, SearchConfig, Solver, SolverConfig, StepScore, VerifyMode};
use rksc::tokenizer::StopScanner;
use rksc::{DType, Error};

fn search(depth: usize, beam: usize) -> Option<SearchConfig> {
    Some(SearchConfig { depth, beam, score: StepScore::Confidence, min_score: None })
}

/// Hot enough for siblings to differ.
fn config(search: Option<SearchConfig>) -> SolverConfig {
    let mut config =
        SolverConfig { num_branches: 4, verify: VerifyMode::Off, search, ..SolverConfig::preset(Policy::Exact) };
    config.sampling.temperature = 1.3;
    config
}

fn ended(tree: &[NodeResult], is: impl Fn(NodeEnd) -> bool) -> Vec<&NodeResult> {
    tree.iter().filter(|n| is(n.ended)).collect()
}

fn is_leaf(end: NodeEnd) -> bool {
    matches!(end, NodeEnd::Answered | NodeEnd::Length | NodeEnd::Stopped | NodeEnd::Failed)
}

/// The solution up to and with a node.
fn solution(tree: &[NodeResult], node: &NodeResult) -> String {
    let before = node.parent.map_or(String::new(), |p| solution(tree, &tree[p]));
    before + &node.text
}

#[test]
fn a_tree_of_depth_one_is_the_plain_job_bit_for_bit() {
    let tasks = tasks(&problems("test", 6), "");
    for (beam, verify) in [(4, VerifyMode::Off), (4, VerifyMode::Suffix), (1, VerifyMode::Off)] {
        let plain = solve(&mut engine(|_| {}), &SolverConfig { verify, ..config(None) }, &tasks);
        let grown = solve(&mut engine(|_| {}), &SolverConfig { verify, ..config(search(1, beam)) }, &tasks);
        for (p, g) in plain.iter().zip(&grown) {
            assert_eq!(p.branches, g.branches, "tokens, scores, blocks and votes of every branch");
            assert!(g.branches.iter().all(|b| b.votes == 1.0));
            assert_eq!((&p.answer, p.winner, p.tokens), (&g.answer, g.winner, g.tokens));
            assert_eq!((p.blocks_peak, p.blocks_shared), (g.blocks_peak, g.blocks_shared));
            assert!(p.tree.is_empty());
            for (i, (node, branch)) in g.tree.iter().zip(&g.branches).enumerate() {
                assert_eq!((node.node, node.parent, node.depth, node.branch), (i, None, 1, i));
                assert_eq!(
                    (&node.text, node.tokens, &node.answer),
                    (&branch.text, branch.tokens.len(), &branch.answer)
                );
                assert_eq!((node.confidence, node.score), (branch.confidence, branch.score));
            }
            assert_eq!(g.tree.len(), 4);
        }
    }
}

/// What must hold of any tree.
fn check_tree(result: &ProblemResult, config: &SolverConfig) {
    let (tree, search) = (&result.tree, config.search.as_ref().unwrap());
    for (i, n) in tree.iter().enumerate() {
        assert_eq!(n.node, i);
        assert!(n.parent.is_none_or(|p| p < i && tree[p].depth + 1 == n.depth && tree[p].ended == NodeEnd::Expanded));
        assert_eq!(n.parent.is_none(), n.depth == 1);
        assert!(n.depth <= search.depth);
        let children = tree.iter().filter(|c| c.parent == Some(i)).count();
        assert_eq!(children, if n.ended == NodeEnd::Expanded { config.num_branches } else { 0 });
        if let NodeEnd::Duplicate(of) = n.ended {
            assert_eq!(solution(tree, n), solution(tree, &tree[of]));
            assert_eq!(tree[of].depth, n.depth);
            assert!(tree[of].score >= n.score);
        }
        if n.depth < search.depth && !is_leaf(n.ended) {
            assert!(n.text.ends_with('\n') && n.text.matches('\n').count() == 1, "a step: {:?}", n.text);
        }
    }
    for depth in 1..search.depth {
        let of = |is: fn(NodeEnd) -> bool| ended(tree, is).into_iter().filter(|n| n.depth == depth).collect::<Vec<_>>();
        let (kept, pruned) = (of(|e| e == NodeEnd::Expanded), of(|e| e == NodeEnd::Pruned));
        assert!(kept.len() <= search.beam && (pruned.is_empty() || kept.len() == search.beam));
        let worst = kept.iter().filter_map(|n| n.score).fold(f64::INFINITY, f64::min);
        assert!(pruned.iter().filter_map(|n| n.score).all(|score| score <= worst));
    }
    let leaves = ended(tree, is_leaf);
    assert_eq!(leaves.len(), result.branches.len());
    for (leaf, branch) in leaves.into_iter().zip(&result.branches) {
        assert_eq!((&solution(tree, leaf), &leaf.answer), (&branch.text, &branch.answer));
    }
}

#[test]
fn the_record_holds_the_whole_tree_and_its_tokens_are_those_computed() {
    let problems = problems("dev", 5);
    let tasks = tasks(&problems, "");
    let mut engine = engine(|_| {});
    let (mut duplicates, mut pruned, mut early) = (0, 0, 0);
    for (depth, beam) in [(2, 1), (3, 2), (4, 2)] {
        let config = config(search(depth, beam));
        for (task, result) in tasks.iter().zip(solve(&mut engine, &config, &tasks)) {
            check_tree(&result, &config);
            let suffixes: usize = (0..4).map(|i| task.branch(i).unwrap().len()).sum();
            assert_eq!(result.tokens.prefill, (task.root().len() + suffixes) as u64);
            // Every node but the first level's runs its parent's last token; only an end token shows that a node's own
            // last one has run.
            let run = |n: &NodeResult| n.tokens + usize::from(n.depth > 1) - usize::from(n.ended != NodeEnd::Answered);
            assert_eq!(result.tokens.decode, result.tree.iter().map(run).sum::<usize>() as u64);
            duplicates += ended(&result.tree, |e| matches!(e, NodeEnd::Duplicate(_))).len();
            pruned += ended(&result.tree, |e| e == NodeEnd::Pruned).len();
            early += ended(&result.tree, |e| e == NodeEnd::Answered).iter().filter(|n| n.depth < depth).count();
        }
    }
    println!("{duplicates} duplicates, {pruned} pruned, {early} answers before the last level");
    assert!(duplicates > 0 && pruned > 0 && early > 0, "the problems do not show what they are here for");
}

#[test]
fn siblings_are_drawn_apart_and_the_same_again() {
    let tasks = tasks(&problems("dev", 6), "");
    let config = config(search(3, 2));
    let alone = solve(&mut engine(|_| {}), &config, &tasks);
    let among = solve(&mut engine(|_| {}), &SolverConfig { concurrency: 6, ..config.clone() }, &tasks);
    for (a, b) in alone.iter().zip(&among) {
        assert_eq!((&a.tree, &a.answer), (&b.tree, &b.answer));
    }
    let apart = |r: &ProblemResult| {
        r.tree.iter().any(|n| r.tree.iter().any(|m| n.parent.is_some() && n.parent == m.parent && n.text != m.text))
    };
    assert!(alone.iter().any(apart));
    let mut other = config;
    other.sampling.seed = 1;
    let other = solve(&mut engine(|_| {}), &other, &tasks);
    assert!(alone.iter().zip(&other).any(|(a, b)| a.tree != b.tree));
}

#[test]
fn a_step_is_scored_by_what_it_says() {
    let problem = problems("dev", 3).remove(2);
    let task = tasks(std::slice::from_ref(&problem), "");
    let mut engine = engine(|c| c.dtype = DType::F32);
    let tokenizer = tokenizer();
    let (yes, no) = (tokenizer.single_token(" YES").unwrap(), tokenizer.single_token(" NO").unwrap());
    for score in [StepScore::Confidence, StepScore::Verifier, StepScore::Both] {
        let tree = Some(SearchConfig { depth: 2, beam: 2, score, min_score: None });
        let result = solve(&mut engine, &config(tree), &task).remove(0);
        for node in result.tree.iter().filter(|n| n.depth == 1 && !is_leaf(n.ended)) {
            let mut prompt = branch_prompt(task[0].as_ref(), node.branch);
            let step = tokenizer.encode(&node.text).unwrap();
            assert_eq!(step.len(), node.tokens);
            // The question opens with the delimiter; it is not said twice.
            prompt.extend_from_slice(&step[..step.len() - 1]);
            prompt.extend_from_slice(task[0].verify_suffix());
            let id = engine.prefill(&prompt, uncached()).unwrap();
            engine.watch(id, &[yes, no], 0).unwrap();
            run_all(&mut engine);
            let row = engine.row(id).unwrap().unwrap();
            let (yes, no) = (f64::from(row.watched[0]).exp(), f64::from(row.watched[1]).exp());
            engine.prune(id).unwrap();
            let expected = match score {
                StepScore::Confidence => node.confidence,
                StepScore::Verifier => yes / (yes + no),
                StepScore::Both => yes / (yes + no) * node.confidence.sqrt(),
            };
            let got = node.score.unwrap();
            assert!((got - expected).abs() < 1e-4, "{score:?}: {got} is not {expected}");
        }
    }
}

#[test]
fn a_step_without_a_delimiter_ends_where_its_tokens_do() {
    let tasks = tasks(&problems("dev", 2), "");
    let config = SolverConfig { max_new_tokens: 4, ..config(search(3, 2)) };
    for result in solve(&mut engine(|_| {}), &config, &tasks) {
        assert_eq!(result.tree.len(), 4);
        assert!(result.tree.iter().all(|n| (n.ended, n.tokens, n.depth) == (NodeEnd::Length, 4, 1)));
        assert!(result.branches.iter().all(|b| b.ended == Some(EndReason::Length)));
        assert_eq!(result.answer, None);
    }
}

#[test]
fn an_answer_at_depth_one_is_a_leaf_like_those_of_the_last_level() {
    let tasks = tasks(&problems("dev", 4), "");
    // Nobody says it: every node is a whole solution, and the tree is the plain job.
    let never = SolverConfig { step_delimiter: Some("@@".into()), ..config(search(3, 2)) };
    let plain = solve(&mut engine(|_| {}), &config(None), &tasks);
    for (p, g) in plain.iter().zip(solve(&mut engine(|_| {}), &never, &tasks)) {
        assert_eq!((&p.branches, &p.answer, p.tokens), (&g.branches, &g.answer, g.tokens));
        assert!(g.tree.iter().all(|n| n.depth == 1 && is_leaf(n.ended)));
    }
    // Only the fourth approach checks its steps: it alone goes on, beside the leaves of depth 1.
    let mut mixed = SolverConfig { step_delimiter: Some(" Check:".into()), ..config(search(2, 1)) };
    mixed.sampling.temperature = 0.5;
    let mut both = 0;
    for result in solve(&mut engine(|_| {}), &mixed, &tasks) {
        let at = |depth| result.tree.iter().filter(|n| n.depth == depth && is_leaf(n.ended)).count();
        assert_eq!(result.branches.len(), at(1) + at(2));
        both += usize::from(at(1) == 3 && at(2) == 4);
    }
    assert!(both > 0);
}

#[test]
fn a_tree_whose_nodes_are_all_pruned_has_no_answer() {
    let tasks = tasks(&problems("dev", 2), "");
    let floor = SearchConfig { min_score: Some(2.0), ..search(3, 2).unwrap() };
    for verify in [VerifyMode::Off, VerifyMode::Suffix] {
        let config = SolverConfig { verify, ..config(Some(floor.clone())) };
        for result in solve(&mut engine(|_| {}), &config, &tasks) {
            assert_eq!((&result.answer, result.correct, result.branches.len()), (&None, Some(false), 0));
            let pruned = |n: &NodeResult| matches!(n.ended, NodeEnd::Pruned | NodeEnd::Duplicate(_));
            assert!(result.tree.len() == 4 && result.tree.iter().all(pruned));
            assert_eq!(result.verify.run, 0);
        }
    }
}

#[test]
fn a_beam_larger_than_the_level_keeps_all_of_it() {
    let tasks = tasks(&problems("dev", 2), "");
    for result in solve(&mut engine(|_| {}), &config(search(2, 100)), &tasks) {
        assert!(ended(&result.tree, |e| e == NodeEnd::Pruned).is_empty());
        assert!(ended(&result.tree, |e| e == NodeEnd::Expanded).len() > 1);
    }
}

#[test]
fn duplicates_hand_their_votes_down_to_the_leaves() {
    let tasks = tasks(&problems("dev", 4), "");
    let mut config = config(search(2, 100));
    config.sampling.temperature = 0.2;
    config.num_branches = 8;
    let mut merged = 0;
    for result in solve(&mut engine(|_| {}), &config, &tasks) {
        let tree = &result.tree;
        let votes = |n: &NodeResult| 1 + ended(tree, |e| e == NodeEnd::Duplicate(n.node)).len();
        let leaves = ended(tree, is_leaf);
        for (leaf, branch) in leaves.iter().zip(&result.branches) {
            assert_eq!(branch.votes, leaf.parent.map_or(1, |p| votes(&tree[p])) as f64);
        }
        // Nobody was pruned: every first node speaks through its children, or through those of another.
        let spoken: f64 =
            leaves.iter().zip(&result.branches).map(|(n, b)| b.votes / if n.depth == 1 { 1.0 } else { 8.0 }).sum();
        assert_eq!(spoken, 8.0);
        merged += ended(tree, |e| matches!(e, NodeEnd::Duplicate(_))).len();
    }
    assert!(merged > 0);
}

/// Raises the flag when the solver reads its `after`-th answer.
struct Cancelling {
    inner: Box<dyn Task>,
    flag: CancelFlag,
    after: usize,
    seen: AtomicUsize,
}

impl Task for Cancelling {
    fn id(&self) -> &str {
        self.inner.id()
    }
    fn expected(&self) -> Option<&str> {
        self.inner.expected()
    }
    fn root(&self) -> &[u32] {
        self.inner.root()
    }
    fn branch(&self, idx: usize) -> rksc::Result<&[u32]> {
        self.inner.branch(idx)
    }
    fn end_tokens(&self) -> &[u32] {
        self.inner.end_tokens()
    }
    fn stop_scanner(&self) -> Option<StopScanner> {
        self.inner.stop_scanner()
    }
    fn step_scanner(&self, delimiter: Option<&str>) -> Option<StopScanner> {
        self.inner.step_scanner(delimiter)
    }
    fn trial(&self) -> Option<&[u32]> {
        self.inner.trial()
    }
    fn verify_suffix(&self) -> &[u32] {
        self.inner.verify_suffix()
    }
    fn verify_fresh(&self, generated: &[u32]) -> rksc::Result<Vec<u32>> {
        self.inner.verify_fresh(generated)
    }
    fn verdict_tokens(&self) -> (&[u32], &[u32]) {
        self.inner.verdict_tokens()
    }
    fn text(&self, generated: &[u32]) -> rksc::Result<String> {
        self.inner.text(generated)
    }
    fn answer(&self, text: &str) -> Option<String> {
        if self.seen.fetch_add(1, Ordering::Relaxed) == self.after {
            self.flag.raise();
        }
        self.inner.answer(text)
    }
}

#[test]
fn a_cancelled_search_leaves_nothing_behind() {
    let mut engine = engine(|_| {});
    let tree = SearchConfig { score: StepScore::Both, ..search(4, 2).unwrap() };
    // 4 answers are read on the first level, 8 on every other.
    for after in [0, 3, 4, 11, 12, 18] {
        let inner = tasks(&problems("dev", 5), "").remove(4);
        let task = Cancelling { inner, flag: engine.cancel_flag(), after, seen: AtomicUsize::new(0) };
        let tasks: Vec<Box<dyn Task>> = vec![Box::new(task)];
        let outcome = Solver::new(&mut engine, config(Some(tree.clone()))).unwrap().solve(&tasks, &mut |_, _| Ok(()));
        assert!(matches!(outcome, Err(Error::Cancelled)), "after {after}: {outcome:?}");
        engine.cancel_flag().clear();
        let stats = engine.engine_stats();
        assert_eq!((stats.branches, stats.blocks_used), (0, stats.blocks_cached), "after {after}");
        assert!(engine.next_event().is_none());
        engine.check_integrity().unwrap();
    }
}

#[test]
fn a_pack_without_a_delimiter_is_refused_by_field() {
    let pack = PromptPack { step_delimiter: String::new(), ..prompt_pack() };
    let task = TextTask::new(compiled(pack, ""), problems("dev", 1).remove(0)).unwrap();
    let tasks: Vec<Box<dyn Task>> = vec![Box::new(task)];
    let mut engine = engine(|_| {});
    let refused = |config: &SolverConfig, engine: &mut rksc::Engine| {
        let outcome = Solver::new(engine, config.clone()).unwrap().solve(&tasks, &mut |_, _| Ok(()));
        assert_eq!(engine.engine_stats().branches, 0);
        outcome.map_err(|e| e.to_string())
    };
    let error = refused(&config(search(2, 2)), &mut engine).unwrap_err();
    assert!(error.contains("step_delimiter") && error.contains("--step-delimiter"), "{error}");
    refused(&config(search(1, 2)), &mut engine).unwrap();
    let own = SolverConfig { step_delimiter: Some("\n".into()), ..config(search(2, 2)) };
    refused(&own, &mut engine).unwrap();
}

#[test]
fn stop_strings_end_a_node_where_they_end_a_branch() {
    let pack = PromptPack { stops: vec!["\nStep 3".into()], ..prompt_pack() };
    let compiled = compiled(pack, "");
    let problem = problems("test", 3).remove(2);
    let tasks: Vec<Box<dyn Task>> = vec![Box::new(TextTask::new(Arc::clone(&compiled), problem).unwrap())];
    let mut config = config(search(3, 1));
    config.sampling.temperature = 0.3;
    let result = solve(&mut engine(|_| {}), &config, &tasks).remove(0);
    check_tree(&result, &config);
    for b in &result.branches {
        assert!(!b.text.contains("\nStep 3") && b.text.contains("Step 2"), "{:?}", b.text);
        assert_eq!(b.ended, Some(EndReason::EndToken));
    }
}

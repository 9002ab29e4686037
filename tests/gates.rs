//! Gates of branches and groups on the bundled model: prompts that become one, verdicts that are read early, and what
//! both cost and leave behind.

mod common;

use common::*;
use rksc::engine::{BranchId, EndReason, Engine, Event, EventKind, PrefillOptions};
use rksc::gate::asks::Asks;
use rksc::gate::verify::VerifyExit;
use rksc::gate::{Effect, GateSpec, Over, ProbeNorm, Rows, Rule, Statistic};
use rksc::report::ProblemResult;
use rksc::solver::sharing_table::{SharingCell, SharingTable};
use rksc::solver::task::Task;
use rksc::solver::{Policy, Solver, SolverConfig, verify_again};

const LAYERS: u64 = 8;

/// The wordings of a problem as roots, each with a fork that has an approach behind it and generates.
struct Wordings {
    roots: Vec<BranchId>,
    forks: Vec<BranchId>,
    suffix: Vec<u32>,
}

fn wordings(e: &mut Engine, task: &dyn Task) -> Wordings {
    let suffix = task.branch(0).unwrap().to_vec();
    let mut w = Wordings { roots: Vec::new(), forks: Vec::new(), suffix };
    for i in 0..task.num_wordings() {
        w.roots.push(e.prefill(task.wording(i).unwrap(), uncached()).unwrap());
    }
    w
}

fn fork_all(e: &mut Engine, w: &mut Wordings) {
    for &root in &w.roots {
        let child = fork(e, root);
        e.append(child, &w.suffix).unwrap();
        e.start(child, greedy_to_end()).unwrap();
        w.forks.push(child);
    }
}

fn asks(tau: f32, probe_layers: u32) -> GateSpec {
    Asks { tau, probe_layers, ..Asks::default() }.gate()
}

fn aliased(e: &mut Engine) -> Vec<(BranchId, BranchId)> {
    let mut found = Vec::new();
    while let Some(Event { branch, kind }) = e.next_event() {
        if let EventKind::Aliased { to } = kind {
            found.push((branch, to));
        }
    }
    found
}

fn first_task() -> Box<dyn Task> {
    tasks(&problems("dev", 1), "").remove(0)
}

/// Acceptance vector RK16: a branch whose prompt was shared says what the representative's prompt and its own suffix say.
#[test]
fn rk16_an_aliased_prompt_is_its_representatives() {
    let task = first_task();
    let mut e = engine(|_| ());
    let mut w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    fork_all(&mut e, &mut w);
    let rows: u64 = (0..task.num_wordings()).map(|i| task.wording(i).unwrap().len() as u64).sum();
    e.step().unwrap();
    e.check_integrity().unwrap();
    let aliases = aliased(&mut e);
    assert_eq!(aliases.len(), w.roots.len() - 1, "every wording but one");
    let to = aliases[0].1;
    assert!(aliases.iter().all(|a| a.1 == to));
    let found = e.similarity(to).unwrap().unwrap();
    let label = found.similarity.labels[0] as usize;
    assert_eq!((found.members.clone(), w.roots[label]), (w.roots.clone(), to));

    // Two layers of every prompt, the other six of one.
    let kept = task.wording(label).unwrap().len() as u64;
    assert_eq!(e.engine_stats().layer_rows, 2 * rows + (LAYERS - 2) * kept);
    assert_eq!(e.engine_stats().blocks_used, (kept as usize).div_ceil(e.config().block_size));

    run_all(&mut e);
    let mut alone = engine(|_| ());
    let root = alone.prefill(task.wording(label).unwrap(), uncached()).unwrap();
    let child = fork(&mut alone, root);
    alone.append(child, &w.suffix).unwrap();
    alone.start(child, greedy_to_end()).unwrap();
    run_all(&mut alone);
    for &f in &w.forks {
        assert_eq!(e.tokens(f).unwrap(), alone.tokens(child).unwrap());
        assert_eq!(row_bits(&e, f), row_bits(&alone, child));
    }
    e.check_integrity().unwrap();
}

/// Prompts below the threshold lose nothing but the look: every bit is as without the gate.
#[test]
fn prompts_that_stay_themselves_keep_every_bit() {
    let task = first_task();
    let run = |gate: Option<GateSpec>| {
        let mut e = engine(|_| ());
        let mut w = wordings(&mut e, task.as_ref());
        if let Some(gate) = gate {
            e.gate(&gate, &w.roots).unwrap();
        }
        fork_all(&mut e, &mut w);
        run_all(&mut e);
        let bits: Vec<_> = w.forks.iter().map(|&f| (e.tokens(f).unwrap().to_vec(), row_bits(&e, f))).collect();
        (bits, e.engine_stats().layer_rows)
    };
    assert_eq!(run(None), run(Some(asks(1.5, 3))));
}

#[test]
fn different_keys_never_become_one() {
    let task = first_task();
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    let keys: Vec<u64> = (0..w.roots.len() as u64).map(|i| i % 2).collect();
    e.gate_keyed(&asks(-1.0, 1), &w.roots, &keys).unwrap();
    e.step().unwrap();
    let place = |id: BranchId| w.roots.iter().position(|&r| r == id).unwrap();
    let aliases = aliased(&mut e);
    assert_eq!(aliases.len(), w.roots.len() - 2);
    assert!(aliases.iter().all(|&(a, b)| keys[place(a)] == keys[place(b)]));
}

#[test]
fn a_group_that_does_not_fit_one_pass_is_not_compared() {
    let task = first_task();
    let mut e = engine(|c| c.max_batch_tokens = 64);
    let mut w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 1), &w.roots).unwrap();
    fork_all(&mut e, &mut w);
    run_all(&mut e);
    assert!(w.roots.iter().all(|&r| e.similarity(r).unwrap().is_none()));
}

#[test]
fn a_group_runs_together_beside_decoding_branches_and_after_a_failed_step() {
    let task = first_task();
    let mut e = engine(|_| ());
    let other = e.prefill(&[5, 9, 300, 301], uncached()).unwrap();
    e.start(other, greedy(40)).unwrap();
    e.step().unwrap();
    let w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    e.fail_allocation(99);
    assert!(e.step().is_err());
    e.check_integrity().unwrap();
    e.step().unwrap();
    assert_eq!(aliased(&mut e).len(), w.roots.len() - 1, "the gate was still set after the failure");
    run_all(&mut e);
    assert_eq!(e.stats(other).unwrap().num_generated_tokens, 40);
}

#[test]
fn gates_on_the_wrong_branches_are_refused() {
    let mut e = engine(|_| ());
    let a = e.prefill(&[300, 301], uncached()).unwrap();
    let b = e.prefill(&[302, 303], uncached()).unwrap();
    let refused = |e: &mut Engine, gate: &GateSpec, ids: &[BranchId], keys: &[u64]| {
        e.gate_keyed(gate, ids, keys).unwrap_err().to_string()
    };
    assert!(refused(&mut e, &asks(0.9, 8), &[a, b], &[]).contains("between 1 and 7"));
    assert!(refused(&mut e, &asks(0.9, 2), &[a, a], &[]).contains("twice"));
    assert!(refused(&mut e, &asks(0.9, 2), &[a, b], &[1]).contains("1 keys for 2"));
    e.start(b, greedy(3)).unwrap();
    assert!(refused(&mut e, &asks(0.9, 2), &[a, b], &[]).contains("generates"));
    run_all(&mut e);
    assert!(refused(&mut e, &asks(0.9, 2), &[a], &[]).contains("no tokens to run"));
    assert!(e.set_gates(&[asks(0.9, 2)]).unwrap_err().to_string().contains("named"));
}

/// A problem's branches, decoded, each with a fork that is asked for the verdict.
fn verifiers(e: &mut Engine, task: &dyn Task) -> Vec<BranchId> {
    let root = e.prefill(task.root(), PrefillOptions::default()).unwrap();
    let mut ids = Vec::new();
    for i in 0..4 {
        let b = fork(e, root);
        e.append(b, task.branch(i).unwrap()).unwrap();
        e.start(b, greedy_to_end()).unwrap();
        ids.push(b);
    }
    run_all(e);
    let (yes, no) = task.verdict_tokens();
    let watched = [yes, no].concat();
    ids.iter()
        .map(|&b| {
            let v = fork(e, b);
            e.append(v, task.verify_suffix()).unwrap();
            e.watch(v, &watched, 0).unwrap();
            v
        })
        .collect()
}

fn observed(over: Over, norm: ProbeNorm) -> (Engine, Vec<BranchId>) {
    let task = first_task();
    let mut e = engine(|_| ());
    let ids = verifiers(&mut e, task.as_ref());
    e.gate(&VerifyExit { over, norm, ..VerifyExit::PAPER }.observer(LAYERS as usize), &ids).unwrap();
    e.step().unwrap();
    (e, ids)
}

#[test]
fn the_last_layers_probe_is_the_row_itself() {
    let (e, ids) = observed(Over::Vocabulary, ProbeNorm::Final);
    for &id in &ids {
        let row = e.row(id).unwrap().unwrap();
        let layers: Vec<u32> = row.layers.iter().map(|l| l.layer).collect();
        assert_eq!(layers, (1..=LAYERS as u32).collect::<Vec<_>>());
        let last = row.layers.last().unwrap().stats;
        assert_eq!(last.argmax, row.stats.argmax);
        assert!((last.entropy - row.stats.entropy).abs() < 1e-4 && (last.lse - row.stats.lse).abs() < 1e-3);
        assert_eq!(e.stats(id).unwrap().exit_layer, None, "it has only been looked at");
    }
    let (e, ids) = observed(Over::Watched, ProbeNorm::Final);
    for &id in &ids {
        let row = e.row(id).unwrap().unwrap();
        let p: Vec<f64> = row.watched.iter().map(|x| f64::from(*x).exp()).collect();
        let share = p[0] / p.iter().sum::<f64>();
        let entropy = -(share * share.ln() + (1.0 - share) * (1.0 - share).ln());
        let last = row.layers.last().unwrap().stats;
        assert!((f64::from(last.entropy) - entropy).abs() < 1e-4, "{} {entropy}", last.entropy);
        assert!((f64::from(last.top1) - share.max(1.0 - share)).abs() < 1e-4);
    }
    // The raw form unembeds another vector.
    let (raw, ids) = observed(Over::Vocabulary, ProbeNorm::Raw);
    let row = raw.row(ids[0]).unwrap().unwrap();
    assert!((row.layers[7].stats.entropy - row.stats.entropy).abs() > 1e-3);
}

/// An exit is where the numbers of the observer say it should be, whatever is stacked, and reported only where one
/// happened.
#[test]
fn verdicts_leave_where_their_entropy_settles() {
    let (seen, ids) = observed(Over::Watched, ProbeNorm::Final);
    let entropies: Vec<Vec<f32>> =
        ids.iter().map(|&id| seen.row(id).unwrap().unwrap().layers.iter().map(|l| l.stats.entropy).collect()).collect();
    let task = first_task();
    let exits = |exit: VerifyExit| {
        let mut e = engine(|_| ());
        let ids = verifiers(&mut e, task.as_ref());
        let before = e.engine_stats();
        e.gate(&exit.gate(LAYERS as usize).unwrap(), &ids).unwrap();
        e.step().unwrap();
        e.check_integrity().unwrap();
        assert!(ids.iter().all(|&id| e.row(id).unwrap().unwrap().watched.len() == 2), "every verdict is there");
        let exits: Vec<Option<u32>> = ids.iter().map(|&id| e.stats(id).unwrap().exit_layer).collect();
        for (&id, exit) in ids.iter().zip(&exits) {
            assert_eq!(e.stats(id).unwrap().ended, exit.map(|_| EndReason::Stopped));
        }
        let layer_rows = e.engine_stats().layer_rows - before.layer_rows;
        let saved: u64 = exits.iter().map(|x| x.map_or(0, |l| LAYERS - u64::from(l))).sum();
        let rows = task.verify_suffix().len() as u64;
        assert_eq!(layer_rows, rows * (4 * LAYERS - saved));
        exits
    };
    for (theta, epsilon) in [(0.7, 9.0), (0.6, 0.05), (0.5, 0.3), (0.05, 0.05)] {
        let exit = VerifyExit { theta, epsilon, min_layer: 1, ..VerifyExit::CANDIDATES };
        let settled =
            |xs: &Vec<f32>, layer: usize| xs[layer - 1] < theta && (xs[layer - 1] - xs[layer - 2]).abs() < epsilon;
        let expected: Vec<Option<u32>> =
            entropies.iter().map(|xs| (2..8).find(|&l| settled(xs, l)).map(|l| l as u32)).collect();
        assert_eq!(exits(exit), expected, "theta {theta}, epsilon {epsilon}");
        // Probes after layers 1, 2, 3 are read after 3; 4, 5, 6 after 6; 7 by itself.
        let stacked: Vec<Option<u32>> =
            expected.iter().map(|l| l.map(|l| l.div_ceil(3) * 3).map(|l| l.min(7))).collect();
        assert_eq!(exits(VerifyExit { stacked: 3, ..exit }), stacked);
        let all = (2..8).find(|&l| entropies.iter().all(|xs| settled(xs, l))).map(|l| l as u32);
        assert_eq!(exits(VerifyExit { all_or_none: true, ..exit }), [all; 4]);
    }
}

#[test]
fn a_watched_entropy_needs_somebody_who_watches() {
    let mut e = engine(|_| ());
    let a = e.prefill(&[300, 301], uncached()).unwrap();
    let statistic = Statistic::Entropy { over: Over::Watched, norm: ProbeNorm::Final, stacked: 1 };
    let spec = GateSpec { statistic, rule: Rule::Below(9.0), effect: Effect::Stop, ..asks(0.5, 2) };
    e.gate(&spec, &[a]).unwrap();
    assert!(e.step().unwrap_err().to_string().contains("watches"));
    e.check_integrity().unwrap();
}

/// Prompts that keep their own tokens take only what they have in common, and everything else is theirs.
#[test]
fn a_recomputed_prompt_keeps_its_tokens() {
    let task = first_task();
    let plain = |e: &mut Engine| {
        let mut w = wordings(e, task.as_ref());
        fork_all(e, &mut w);
        w
    };
    let mut exact = engine(|c| c.dtype = rksc::DType::F32);
    let reference = plain(&mut exact);
    run_all(&mut exact);
    let run = |share: f32| {
        let mut e = engine(|c| c.dtype = rksc::DType::F32);
        let mut w = wordings(&mut e, task.as_ref());
        let asks = Asks { tau: -1.0, probe_layers: 2, recompute: Some(share), ..Asks::default() };
        e.gate(&asks.gate(), &w.roots).unwrap();
        fork_all(&mut e, &mut w);
        e.step().unwrap();
        e.check_integrity().unwrap();
        let layer_rows = e.engine_stats().layer_rows;
        run_all(&mut e);
        let found = e.similarity(w.roots[0]).unwrap().unwrap().similarity.labels.clone();
        for (i, (&root, &fork)) in w.roots.iter().zip(&w.forks).enumerate() {
            assert_eq!(e.tokens(root).unwrap(), task.wording(i).unwrap(), "its tokens are its own");
            let state = e.stats(fork).unwrap().state;
            assert_eq!(state == rksc::kv::block_pool::BlockState::Exact, found[i] as usize == i);
        }
        assert_eq!(e.engine_stats().blocks_cached, 0);
        (layer_rows, w.forks.iter().map(|&f| (e.tokens(f).unwrap().to_vec(), row_bits(&e, f))).collect::<Vec<_>>())
    };
    // Everything computed: every bit is as without the gate.
    let (full, all) = run(1.0);
    let bits: Vec<_> =
        reference.forks.iter().map(|&f| (exact.tokens(f).unwrap().to_vec(), row_bits(&exact, f))).collect();
    assert_eq!(all, bits);
    let (some, _) = run(0.3);
    let (none, _) = run(0.0);
    assert!(none < some && some < full, "{none} {some} {full}");
}

#[test]
fn a_marked_prompt_survives_preemption_bit_for_bit() {
    let task = first_task();
    let run = |blocks: u64| {
        let mut e = engine(|c| c.kv_cache_memory = Some(blocks * 16 * 2 * 2 * 8 * 32 * 2));
        let mut w = wordings(&mut e, task.as_ref());
        let asks = Asks { tau: -1.0, probe_layers: 1, recompute: Some(0.1), ..Asks::default() };
        e.gate(&asks.gate(), &w.roots).unwrap();
        fork_all(&mut e, &mut w);
        run_all(&mut e);
        e.check_integrity().unwrap();
        let bits: Vec<_> = w.forks.iter().map(|&f| (e.tokens(f).unwrap().to_vec(), row_bits(&e, f))).collect();
        (bits, e.engine_stats().preemptions)
    };
    let (roomy, calm) = run(200);
    let (tight, busy) = run(22);
    assert_eq!(calm, 0);
    assert!(busy > 0, "the small cache did not make anybody give way");
    assert_eq!(roomy, tight);
}

/// Which of a problem's wordings speaks for all of them when all are alike.
fn representative(task: &dyn Task) -> usize {
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task);
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    e.step().unwrap();
    e.similarity(w.roots[0]).unwrap().unwrap().similarity.labels[0] as usize
}

/// Tokens and last row of `tokens`, generated on from, with nobody else there.
fn alone(tokens: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut e = engine(|_| ());
    let id = e.prefill(tokens, uncached()).unwrap();
    e.start(id, greedy_to_end()).unwrap();
    run_all(&mut e);
    (e.tokens(id).unwrap().to_vec(), row_bits(&e, id))
}

#[test]
fn a_later_gate_replaces_an_earlier_one() {
    let task = first_task();
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    let (gone, rest) = w.roots.split_last().unwrap();
    e.gate(&VerifyExit { over: Over::Vocabulary, ..VerifyExit::PAPER }.observer(LAYERS as usize), &[*gone]).unwrap();
    e.step().unwrap();
    let aliases = aliased(&mut e);
    assert_eq!(aliases.len(), rest.len() - 1);
    assert!(aliases.iter().all(|a| a.0 != *gone && a.1 != *gone));
    assert!(e.similarity(*gone).unwrap().is_none());
    assert_eq!(e.row(*gone).unwrap().unwrap().layers.len(), LAYERS as usize);
    assert_eq!(e.similarity(rest[0]).unwrap().unwrap().members, rest);
}

#[test]
fn a_prompt_that_is_asked_for_more_leaves_its_group() {
    let task = first_task();
    let other = (representative(task.as_ref()) + 1) % task.num_wordings();
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    e.start(w.roots[other], greedy_to_end()).unwrap();
    run_all(&mut e);
    e.check_integrity().unwrap();
    assert_eq!(e.tokens(w.roots[other]).unwrap(), alone(task.wording(other).unwrap()).0);
    assert_eq!(e.similarity(w.roots[(other + 1) % w.roots.len()]).unwrap().unwrap().members.len(), w.roots.len() - 1);

    let score = |gated: bool| {
        let mut e = engine(|_| ());
        let w = wordings(&mut e, task.as_ref());
        if gated {
            e.gate(&asks(-1.0, 2), &w.roots).unwrap();
        }
        let mut logprobs = [0.0; 3];
        e.score(w.roots[other], &[300, 301, 302], &mut logprobs).unwrap();
        logprobs.map(f32::to_bits)
    };
    assert_eq!(score(true), score(false));
}

#[test]
fn an_aliased_prompt_that_watches_something_else_hears_of_it() {
    let task = first_task();
    let label = representative(task.as_ref());
    let other = (label + 1) % task.num_wordings();
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    e.watch(w.roots[other], &[17, 300], 2).unwrap();
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    run_all(&mut e);
    e.check_integrity().unwrap();
    let mut alone = engine(|_| ());
    let root = alone.prefill(task.wording(label).unwrap(), uncached()).unwrap();
    alone.watch(root, &[17, 300], 2).unwrap();
    run_all(&mut alone);
    assert_eq!(e.tokens(w.roots[other]).unwrap(), task.wording(label).unwrap());
    assert_eq!(e.row(w.roots[other]).unwrap(), alone.row(root).unwrap());
}

/// Only a fork of the whole prompt follows it: one of what it was before, or of its beginning, keeps its own tokens.
#[test]
fn forks_that_do_not_begin_with_the_whole_prompt_stay_themselves() {
    let task = first_task();
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    let (mut forks, mut prompts) = (Vec::new(), Vec::new());
    for (i, &root) in w.roots.iter().enumerate() {
        let (before, cut) = (fork(&mut e, root), fork(&mut e, root));
        e.truncate(cut, 20).unwrap();
        e.append(root, &[300, 301]).unwrap();
        let wording = task.wording(i).unwrap();
        for (id, kept) in [(before, wording), (cut, &wording[..20])] {
            e.append(id, &w.suffix).unwrap();
            e.start(id, greedy_to_end()).unwrap();
            forks.push(id);
            prompts.push([kept, &w.suffix].concat());
        }
    }
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    run_all(&mut e);
    e.check_integrity().unwrap();
    assert_eq!(w.roots.iter().filter(|&&r| e.stats(r).unwrap().exit_layer.is_some()).count(), w.roots.len() - 1);
    for (&id, prompt) in forks.iter().zip(&prompts) {
        assert_eq!((e.tokens(id).unwrap().to_vec(), row_bits(&e, id)), alone(prompt));
    }
}

#[test]
fn a_fork_that_is_scored_follows_its_prompt() {
    let task = first_task();
    let label = representative(task.as_ref());
    let score = |e: &mut Engine, root: BranchId| {
        let child = fork(e, root);
        let mut logprobs = vec![0.0; task.branch(0).unwrap().len()];
        e.score(child, task.branch(0).unwrap(), &mut logprobs).unwrap();
        logprobs.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let mut e = engine(|_| ());
    let w = wordings(&mut e, task.as_ref());
    e.gate(&asks(-1.0, 2), &w.roots).unwrap();
    let got = score(&mut e, w.roots[(label + 1) % w.roots.len()]);
    let mut alone = engine(|_| ());
    let root = alone.prefill(task.wording(label).unwrap(), uncached()).unwrap();
    assert_eq!(got, score(&mut alone, root));
}

/// What always fires after `layer`.
fn always(layer: u32, effect: Effect) -> GateSpec {
    let rule = Rule::EveryNth { every: 1, offset: 0 };
    GateSpec { layers: vec![layer], statistic: Statistic::RowIndex, rule, effect, ..asks(0.5, 1) }
}

/// The KV of a branch that leaves its pass is there for the first layers alone: a fork may not read it in the others.
#[test]
fn a_fork_waits_for_a_branch_that_may_leave_its_pass() {
    let prompt: Vec<u32> = (0..40).map(|i| 300 + i * 7 % 400).collect();
    let expected = alone(&[&prompt[..], &[310, 320]].concat());
    for effect in [Effect::Stop, Effect::Drop] {
        let mut e = engine(|_| ());
        let root = e.prefill(&prompt, uncached()).unwrap();
        let child = fork(&mut e, root);
        e.append(child, &[310, 320]).unwrap();
        e.start(child, greedy_to_end()).unwrap();
        e.gate(&always(2, effect), &[root]).unwrap();
        run_all(&mut e);
        e.check_integrity().unwrap();
        assert_eq!(e.stats(root).unwrap().exit_layer, Some(2));
        assert_eq!((e.tokens(child).unwrap().to_vec(), row_bits(&e, child)), expected, "{effect:?}");
    }
}

/// A fork that runs in the pass in which its prompt takes another's KV has that KV too: none of it is exact.
#[test]
fn the_prefix_cache_never_gets_a_mixed_prompt_from_its_forks() {
    let task = first_task();
    let cached = PrefillOptions::default();
    let mut e = engine(|_| ());
    let mut w = Wordings { suffix: task.branch(0).unwrap().to_vec(), roots: Vec::new(), forks: Vec::new() };
    for i in 0..task.num_wordings() {
        w.roots.push(e.prefill(task.wording(i).unwrap(), cached).unwrap());
    }
    let asks = Asks { tau: -1.0, probe_layers: 1, recompute: Some(0.0), ..Asks::default() };
    e.gate(&asks.gate(), &w.roots).unwrap();
    fork_all(&mut e, &mut w);
    run_all(&mut e);
    w.roots.iter().chain(&w.forks).for_each(|&id| e.prune(id).unwrap());
    for i in 0..task.num_wordings() {
        let prompt = [task.wording(i).unwrap(), &w.suffix].concat();
        let again = e.prefill(&prompt, cached).unwrap();
        e.start(again, greedy_to_end()).unwrap();
        run_all(&mut e);
        assert_eq!((e.tokens(again).unwrap().to_vec(), row_bits(&e, again)), alone(&prompt), "wording {i}");
    }
}

#[test]
fn a_mixed_prompt_that_stops_answers_from_its_own_row() {
    let task = first_task();
    let mut e = engine(|c| c.dtype = rksc::DType::F32);
    let w = wordings(&mut e, task.as_ref());
    let asks = Asks { tau: -1.0, probe_layers: 1, recompute: Some(0.0), ..Asks::default() };
    e.gate(&asks.gate(), &w.roots).unwrap();
    let statistic = Statistic::Entropy { over: Over::Vocabulary, norm: ProbeNorm::Final, stacked: 1 };
    e.set_gates(&[GateSpec { statistic, rule: Rule::Above(-1.0), ..always(4, Effect::Stop) }]).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    let stopped: Vec<BranchId> =
        w.roots.iter().copied().filter(|&r| e.stats(r).unwrap().exit_layer == Some(4)).collect();
    assert_eq!(stopped.len(), w.roots.len() - 1, "all but the one whose KV the others take");
    for id in stopped {
        let row = e.row(id).unwrap().unwrap();
        let probe = row.layers[0].stats;
        assert_eq!((row.layers[0].layer, probe.argmax), (4, row.stats.argmax));
        assert!((probe.entropy - row.stats.entropy).abs() < 1e-4, "{} {}", probe.entropy, row.stats.entropy);
    }
}

#[test]
fn two_gates_after_one_layer_both_see_its_step() {
    let mut e = engine(|_| ());
    let id = e.prefill(&[300, 301, 302], uncached()).unwrap();
    let step = GateSpec {
        statistic: Statistic::StepSimilarity { of: Rows::Last },
        rule: Rule::Above(-2.0),
        ..always(3, Effect::Stop)
    };
    let look = VerifyExit { over: Over::Vocabulary, ..VerifyExit::PAPER }.observer(LAYERS as usize);
    e.set_gates(&[look, step]).unwrap();
    e.step().unwrap();
    assert_eq!(e.stats(id).unwrap().exit_layer, Some(3));
}

#[test]
fn a_score_that_a_gate_cut_short_is_an_error() {
    let mut e = engine(|_| ());
    let id = e.prefill(&[300, 301, 302], uncached()).unwrap();
    e.set_gates(&[always(3, Effect::Drop)]).unwrap();
    let mut logprobs = [0.0; 2];
    assert!(e.score(id, &[303, 304], &mut logprobs).unwrap_err().to_string().contains("gate"));
    assert_eq!(logprobs, [0.0; 2]);
}

fn solve(e: &mut Engine, config: &SolverConfig, tasks: &[Box<dyn Task>]) -> Vec<ProblemResult> {
    let mut results = Vec::new();
    let mut take = |_, r| {
        results.push(r);
        Ok(())
    };
    Solver::new(e, config.clone()).unwrap().solve(tasks, &mut take).unwrap();
    results
}

/// Branches that are verified by themselves, after the run, say what they say within it.
#[test]
fn branches_verified_again_say_the_same() {
    let tasks = tasks(&problems("dev", 2), "");
    let mut e = engine(|_| ());
    let plain = SolverConfig { num_branches: 3, ..SolverConfig::preset(Policy::Exact) };
    let decoded = solve(&mut e, &plain, &tasks);
    let early = VerifyExit { theta: 0.69, epsilon: 0.69, ..VerifyExit::CANDIDATES };
    for exit in [None, Some(VerifyExit::PAPER), Some(early)] {
        let config = SolverConfig { verify_exit: exit, ..plain.clone() };
        let within = solve(&mut e, &config, &tasks);
        assert_eq!(exit.is_some(), within.iter().any(|r| r.verify.exited > 0), "{exit:?}");
        for ((task, before), within) in tasks.iter().zip(&decoded).zip(&within) {
            let again = verify_again(&mut e, &config, task.as_ref(), before).unwrap();
            assert_eq!((&again.branches, &again.verify), (&within.branches, &within.verify), "{exit:?}");
        }
    }
    assert_eq!(e.engine_stats().branches, 0);
    e.check_integrity().unwrap();
    let mut reworded = decoded[0].clone();
    reworded.branches[0].wording = 1;
    let refused = verify_again(&mut e, &plain, tasks[0].as_ref(), &reworded).unwrap_err();
    assert!(refused.to_string().contains("wordings"), "{refused}");
}

#[test]
fn prompts_are_not_compared_where_the_start_up_table_says_no() {
    let tasks = tasks(&problems("dev", 1), "");
    let mut e = engine(|_| ());
    let mut run = |full_ms| {
        let cell = SharingCell { prefix_tokens: 16, branches: 2, full_ms, prefix_ms: 1.0, suffix_ms: 1.0 };
        let config = SolverConfig {
            num_branches: 3,
            wordings: 3,
            asks: Some(Asks { tau: -1.0, ..Asks::default() }),
            sharing_table: Some(SharingTable { cells: vec![cell] }),
            ..SolverConfig::preset(Policy::Exact)
        };
        let r = solve(&mut e, &config, &tasks).remove(0);
        (r.similarity.is_some(), r.tokens.probed > 0)
    };
    assert_eq!((run(2.5), run(1.5)), ((true, true), (false, false)));
}

/// What is timed is thrown away; the times themselves are nobody's to assert.
#[test]
fn the_start_up_table_leaves_the_engine_as_it_was() {
    let mut e = engine(|_| ());
    let table = SharingTable::measure(&mut e, &Asks::default()).unwrap();
    let sizes: Vec<(usize, usize)> = table.cells.iter().take(4).map(|c| (c.prefix_tokens, c.branches)).collect();
    assert_eq!(sizes, [(64, 1), (64, 2), (64, 4), (64, 8)]);
    assert!(table.cells.iter().all(|c| c.full_ms > 0.0 && c.prefix_ms > 0.0));
    let stats = e.engine_stats();
    assert_eq!((stats.branches, stats.blocks_used, stats.tokens_computed), (0, 0, 0));
    assert!(e.next_event().is_none());
    e.check_integrity().unwrap();
}

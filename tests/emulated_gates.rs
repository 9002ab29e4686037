//! Gates, groups and evictions on the emulated device: the same decisions as on the CPU, except where a statistic lies
//! within 1e-3 of its threshold, and the same tokens but for close calls.

mod common;

use std::path::Path;

use common::*;
use rksc::DType;
use rksc::config::EngineConfig;
use rksc::engine::{BranchId, Engine, Event, EventKind};
use rksc::gate::asks::Asks;
use rksc::gate::river::{River, RiverExit};
use rksc::gate::step::Converged;
use rksc::gate::verify::VerifyExit;
use rksc::gate::{GateSpec, Over, ProbeNorm};
use rksc::kv::eviction::Eviction;
use rksc::quant::QuantOptions;
use rksc::solver::task::Task;

const LAYERS: usize = 8;
const NEAR: f32 = 1e-3;

fn on(device: &str, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    engine(|c| {
        c.device = device.into();
        c.kv_cache_memory = Some(8 << 20);
        change(c);
    })
}

/// Both devices, each with what `make` puts there.
fn both<T>(change: impl Fn(&mut EngineConfig), make: impl Fn(&mut Engine) -> T) -> [(Engine, T); 2] {
    ["cpu", "emulated"].map(|device| {
        let mut e = on(device, &change);
        let made = make(&mut e);
        (e, made)
    })
}

/// Each branch's tokens with the margins they were chosen by.
type Said = Vec<Vec<(u32, f32)>>;

/// Runs to the end; notes who became another's, and who gave way, as places in `branches`.
fn run(e: &mut Engine, branches: &[BranchId]) -> (Said, Vec<(usize, Option<usize>)>) {
    let (mut said, mut events) = (vec![Vec::new(); branches.len()], Vec::new());
    let place = |id: BranchId| branches.iter().position(|&b| b == id);
    while e.has_work() {
        e.step().unwrap();
        while let Some(Event { branch, kind }) = e.next_event() {
            let Some(i) = place(branch) else { continue };
            match kind {
                EventKind::Token(t) => said[i].push((t.token, t.stats.margin)),
                EventKind::Aliased { to } => events.push((i, place(to))),
                EventKind::Preempted => events.push((i, None)),
                _ => {}
            }
        }
    }
    e.check_integrity().unwrap();
    (said, events)
}

/// The same tokens, or first different where the CPU's margin is below 0.05; returns how many are such close calls.
fn close_calls(cpu: &Said, device: &Said) -> usize {
    let mut num = 0;
    for (i, (want, got)) in cpu.iter().zip(device).enumerate() {
        let same = want.iter().zip(got).take_while(|(a, b)| a.0 == b.0).count();
        if same < want.len().max(got.len()) {
            let margin = want.get(same).map_or(f32::INFINITY, |w| w.1);
            assert!(margin < 0.05, "branch {i} differs at token {same}, where the margin is {margin}");
            num += 1;
        }
    }
    num
}

fn greedy_few() -> rksc::engine::GenerateParams {
    rksc::engine::GenerateParams { max_new_tokens: 6, ..greedy_to_end() }
}

/// A problem's wordings as roots, then a fork of each that has an approach behind it and generates.
fn wordings(e: &mut Engine, task: &dyn Task, n: usize) -> Vec<BranchId> {
    let roots: Vec<BranchId> = (0..n).map(|i| e.prefill(task.wording(i).unwrap(), uncached()).unwrap()).collect();
    let forks: Vec<BranchId> = roots.iter().map(|&root| fork(e, root)).collect();
    for &f in &forks {
        e.append(f, task.branch(0).unwrap()).unwrap();
        e.start(f, greedy_few()).unwrap();
    }
    [roots, forks].concat()
}

/// Off-diagonal similarities, ascending.
fn pairs(e: &Engine, id: BranchId) -> Vec<f32> {
    let found = e.similarity(id).unwrap().unwrap();
    let n = found.members.len();
    let mut pairs: Vec<f32> = (0..n * n).filter(|i| i / n < i % n).map(|i| found.similarity.pairwise[i]).collect();
    pairs.sort_by(f32::total_cmp);
    pairs
}

/// Thresholds in the middle of the widest gaps: some pairs are above, some below.
fn thresholds(pairs: &[f32]) -> Vec<f32> {
    let mut gaps: Vec<(f32, f32)> = pairs.windows(2).map(|w| (w[1] - w[0], (w[0] + w[1]) / 2.0)).collect();
    gaps.sort_by(|a, b| b.0.total_cmp(&a.0));
    gaps.iter().take(2).map(|g| g.1).collect()
}

#[test]
fn prompts_cluster_alias_and_mix_as_on_the_cpu() {
    const WORDINGS: usize = 3;
    let (mut near, mut calls, mut aliases) = (0, 0, 0);
    for (idx, task) in tasks(&problems("dev", 2), "").iter().enumerate() {
        let task = task.as_ref();
        let mut probe = on("cpu", |_| ());
        let ids = wordings(&mut probe, task, WORDINGS);
        probe.gate(&Asks { tau: 2.0, ..Asks::default() }.gate(), &ids[..WORDINGS]).unwrap();
        probe.step().unwrap();
        let pairs = pairs(&probe, ids[0]);
        for (tau, recompute) in thresholds(&pairs).into_iter().zip([None, Some(0.2)]) {
            let gate = Asks { tau, recompute, ..Asks::default() }.gate();
            let f32s = |c: &mut EngineConfig| c.dtype = if idx == 1 { DType::F32 } else { DType::Bf16 };
            let [(mut cpu, ids), (mut device, same)] = both(f32s, |e| {
                let ids = wordings(e, task, WORDINGS);
                e.gate(&gate, &ids[..WORDINGS]).unwrap();
                ids
            });
            let ((want, want_events), (got, got_events)) = (run(&mut cpu, &ids), run(&mut device, &same));
            let of = |e: &Engine, id| e.similarity(id).unwrap().unwrap().similarity.clone();
            let (on_cpu, on_device) = (of(&cpu, ids[0]), of(&device, same[0]));
            for (a, b) in on_cpu.pairwise.iter().zip(&on_device.pairwise) {
                assert!((a - b).abs() < NEAR, "{a} {b}");
            }
            if on_cpu.pairwise.iter().any(|x| (x - tau).abs() < NEAR) {
                near += 1;
                continue;
            }
            assert_eq!((&on_cpu.labels, &want_events), (&on_device.labels, &got_events), "tau {tau}");
            aliases += want_events.len();
            let (a, b) = (cpu.engine_stats(), device.engine_stats());
            assert_eq!((a.layer_rows, a.tokens_computed > 0), (b.layer_rows, true));
            calls += close_calls(&want, &got);
        }
    }
    println!("{near} of 4 runs near a threshold, {calls} close calls");
    assert!(near <= 1 && aliases > 0, "{near} {aliases}");
}

/// A pass with transfers is launched, never recorded, and writes as many bytes as on the CPU.
#[test]
fn a_mixed_prompt_writes_what_it_writes_on_the_cpu() {
    let tasks = tasks(&problems("dev", 1), "");
    let run = |device: &str| {
        let mut e = on(device, |c| c.dtype = DType::F32);
        let roots: Vec<BranchId> =
            (0..3).map(|i| e.prefill(tasks[0].wording(i).unwrap(), uncached()).unwrap()).collect();
        e.gate(&Asks { tau: -1.0, probe_layers: 2, recompute: Some(0.0), ..Asks::default() }.gate(), &roots).unwrap();
        e.reset_counters();
        e.step().unwrap();
        let entropies: Vec<f32> = roots.iter().map(|&r| e.row(r).unwrap().unwrap().stats.entropy).collect();
        (e.counters(), entropies)
    };
    let ((cpu, want), (device, got)) = (run("cpu"), run("emulated"));
    assert_eq!(device.graph_replays, 0);
    assert_eq!(cpu.kv_write_bytes, device.kv_write_bytes);
    assert_eq!(cpu.launches, device.launches);
    for (a, b) in want.iter().zip(&got) {
        assert!((a - b).abs() < NEAR, "{a} {b}");
    }
}

/// Solutions that the CPU found, with their prompts, on both devices; what is asked of them is forked off.
fn solved(task: &dyn Task, n: usize) -> [(Engine, Vec<BranchId>); 2] {
    let mut cpu = on("cpu", |_| ());
    let prompts: Vec<Vec<u32>> = (0..n)
        .map(|i| {
            let id = cpu.prefill(&branch_prompt(task, i), uncached()).unwrap();
            cpu.start(id, greedy_to_end()).unwrap();
            run_all(&mut cpu);
            cpu.tokens(id).unwrap().to_vec()
        })
        .collect();
    both(
        |_| (),
        |e| {
            let ids: Vec<BranchId> = prompts.iter().map(|p| e.prefill(p, uncached()).unwrap()).collect();
            run_all(e);
            ids
        },
    )
}

/// Verifiers of `branches` under `gate`: where each left, and what the probed layers said.
fn verdicts(
    e: &mut Engine,
    task: &dyn Task,
    branches: &[BranchId],
    gate: &GateSpec,
) -> (Vec<Option<u32>>, Vec<Vec<f32>>, Vec<f32>) {
    let (yes, no) = task.verdict_tokens();
    let watched = [yes, no].concat();
    let ids: Vec<BranchId> = branches.iter().map(|&b| fork(e, b)).collect();
    for &id in &ids {
        e.append(id, task.verify_suffix()).unwrap();
        e.watch(id, &watched, 0).unwrap();
    }
    e.gate(gate, &ids).unwrap();
    e.step().unwrap();
    e.check_integrity().unwrap();
    let exits = ids.iter().map(|&id| e.stats(id).unwrap().exit_layer).collect();
    let rows: Vec<_> = ids.iter().map(|&id| e.row(id).unwrap().unwrap().clone()).collect();
    ids.iter().for_each(|&id| e.prune(id).unwrap());
    let layers = rows.iter().map(|r| r.layers.iter().map(|l| l.stats.entropy).collect()).collect();
    (exits, layers, rows.iter().map(|r| r.watched[0]).collect())
}

#[test]
fn verdicts_leave_where_they_leave_on_the_cpu() {
    const BRANCHES: usize = 3;
    let tasks = tasks(&problems("dev", 1), "");
    let task = tasks[0].as_ref();
    let [(mut cpu, ids), (mut device, same)] = solved(task, BRANCHES);
    let (mut near, mut decisions, mut exited) = (0, 0, 0);
    for (over, norm) in [
        (Over::Watched, ProbeNorm::Final),
        (Over::Watched, ProbeNorm::Raw),
        (Over::Vocabulary, ProbeNorm::Final),
        (Over::Vocabulary, ProbeNorm::Raw),
    ] {
        let form = VerifyExit { over, norm, min_layer: 1, ..VerifyExit::CANDIDATES };
        let (_, seen, _) = verdicts(&mut cpu, task, &ids, &form.observer(LAYERS));
        let (_, on_device, _) = verdicts(&mut device, task, &same, &form.observer(LAYERS));
        for (a, b) in seen.iter().flatten().zip(on_device.iter().flatten()) {
            assert!((a - b).abs() < 0.05 * a.abs().max(0.2), "{over:?} {norm:?}: entropy {a} on the CPU, {b}");
        }
        // Something between what was seen: some leave early, some late.
        let mut sorted: Vec<f32> = seen.iter().flatten().copied().collect();
        sorted.sort_by(f32::total_cmp);
        let theta = sorted[sorted.len() / 2];
        for (epsilon, stacked, all_or_none) in [(9.0, 1, false), (0.2 * theta, 3, false), (9.0, 2, true)] {
            let exit = VerifyExit { theta, epsilon, stacked, all_or_none, ..form };
            let gate = exit.gate(LAYERS).unwrap();
            let (want, _, want_yes) = verdicts(&mut cpu, task, &ids, &gate);
            let (got, _, got_yes) = verdicts(&mut device, task, &same, &gate);
            // What the two devices see differs by their rounding; the threshold is one of the values.
            let is_near = |xs: &Vec<f32>, ys: &Vec<f32>| {
                xs.windows(2).zip(ys.windows(2)).any(|(x, y)| {
                    let (change, other) = ((x[1] - x[0]).abs(), (y[1] - y[0]).abs());
                    let off = (x[1] - y[1]).abs().max((change - other).abs()).max(NEAR);
                    (x[1] - theta).abs() <= off || (change - epsilon).abs() <= off
                })
            };
            let nearby: Vec<bool> = seen.iter().zip(&on_device).map(|(x, y)| is_near(x, y)).collect();
            for (i, &is_near) in nearby.iter().enumerate() {
                decisions += 1;
                exited += usize::from(want[i].is_some());
                if want[i] != got[i] {
                    assert!(is_near || (all_or_none && nearby.contains(&true)), "{exit:?}: {want:?} {got:?}");
                    near += 1;
                } else {
                    assert!((want_yes[i] - got_yes[i]).abs() < 0.1, "{} {}", want_yes[i], got_yes[i]);
                }
            }
        }
    }
    println!("{near} of {decisions} decisions differ, each at a statistic near its threshold; {exited} exits");
    assert!(exited > 0 && 10 * near <= decisions, "{near} of {decisions}, {exited} exits");
}

#[test]
fn decoding_branches_are_as_alike_as_on_the_cpu() {
    let tasks = tasks(&problems("dev", 1), "");
    let task = tasks[0].as_ref();
    let rule = Converged::at(0.9);
    let [(mut cpu, ids), (mut device, same)] = both(
        |_| (),
        |e| {
            let root = e.prefill(task.root(), uncached()).unwrap();
            let ids: Vec<BranchId> = (0..4).map(|_| fork(e, root)).collect();
            for (i, &id) in ids.iter().enumerate() {
                e.append(id, task.branch(i).unwrap()).unwrap();
                e.start(id, greedy(8)).unwrap();
            }
            e.step().unwrap();
            ids
        },
    );
    let (mut near, mut steps) = (0, 0);
    for _ in 0..5 {
        if (0..4).any(|i| cpu.tokens(ids[i]).unwrap() != device.tokens(same[i]).unwrap()) {
            break; // a close call: other tokens have other states
        }
        for (e, ids) in [(&mut cpu, &ids), (&mut device, &same)] {
            e.gate(&rule.gate(LAYERS), ids).unwrap();
            e.step().unwrap();
        }
        let (a, b) = (cpu.similarity(ids[0]).unwrap().unwrap(), device.similarity(same[0]).unwrap().unwrap());
        for (x, y) in a.similarity.pairwise.iter().zip(&b.similarity.pairwise) {
            assert!((x - y).abs() < 5.0 * NEAR, "{x} {y}");
        }
        steps += 1;
        if a.similarity.pairwise.iter().any(|x| (x - rule.tau).abs() < 5.0 * NEAR) {
            near += 1;
        } else {
            assert_eq!(a.similarity.labels, b.similarity.labels);
        }
    }
    println!("{near} of {steps} comparisons near the threshold");
    assert!(steps >= 2, "{steps}");
}

/// Attention mass decides who gives way: the same branches in the same order, and the same tokens in the end.
#[test]
fn the_same_branches_give_way_by_mass() {
    let tasks = tasks(&problems("dev", 3), "");
    // f32 blocks of 16 slots: three prompts and their branches do not fit.
    let tight = |c: &mut EngineConfig| {
        c.dtype = DType::F32;
        c.eviction = Eviction::Mass;
        c.mass_every = 1;
        c.kv_cache_memory = Some(16 * 16 * 2 * 2 * 8 * 32 * 4);
    };
    let start = |e: &mut Engine| {
        let mut ids = Vec::new();
        for task in &tasks {
            let root = e.prefill(task.root(), Default::default()).unwrap();
            for i in 0..2 {
                let id = fork(e, root);
                e.append(id, task.branch(i).unwrap()).unwrap();
                e.start(id, greedy_few()).unwrap();
                ids.push(id);
            }
        }
        ids
    };
    let [(mut cpu, ids), (mut device, same)] = both(tight, start);
    let ((want, want_events), (got, got_events)) = (run(&mut cpu, &ids), run(&mut device, &same));
    assert_eq!(want_events, got_events);
    assert!(!want_events.is_empty(), "nobody gave way");
    let (a, b) = (cpu.engine_stats(), device.engine_stats());
    assert_eq!(
        (a.preemptions, a.blocks_evicted, a.tokens_recomputed),
        (b.preemptions, b.blocks_evicted, b.tokens_recomputed)
    );
    assert_eq!(close_calls(&want, &got), 0);
}

/// The bundled model with its own projections in codes as the second set.
fn in_river(device: &str, river: River, codes: &Path) -> Engine {
    let mut e = on(device, |c| {
        c.river = Some(QuantOptions::default());
        c.codes = Some(codes.to_owned());
    });
    e.set_river(Some(river)).unwrap();
    e
}

/// Three branches of a prompt, which leave the backbone as `river` says. Returns what they say, and the sum of their
/// depths.
fn leave_early(e: &mut Engine, task: &dyn Task) -> (Said, u64) {
    let root = e.prefill(task.root(), uncached()).unwrap();
    let branches: Vec<BranchId> = (0..3).map(|_| fork(e, root)).collect();
    for (i, &b) in branches.iter().enumerate() {
        e.append(b, task.branch(i).unwrap()).unwrap();
        e.start(b, rksc::engine::GenerateParams { max_new_tokens: 24, ..greedy_to_end() }).unwrap();
    }
    let said = run(e, &branches).0;
    (said, e.engine_stats().decode_layers)
}

fn tokens(said: &Said) -> Vec<Vec<u32>> {
    said.iter().map(|s| s.iter().map(|t| t.0).collect()).collect()
}

/// A row's path is decided on the device: no read-back a layer, and a step is one recording, whatever its rows do.
#[test]
fn tokens_leave_early_as_on_the_cpu_without_asking_the_host() {
    let task = tasks(&problems("dev", 1), "").remove(0);
    let rivers = [
        River::new(RiverExit::Fixed(2)),
        River::new(RiverExit::Tau(0.8)),
        River { batch_min: true, ..River::new(RiverExit::Tau(0.8)) },
        River::new(RiverExit::Draft(3)),
    ];
    let dir = tempfile::tempdir().unwrap();
    let codes = dir.path().join("tinymath.codes");
    let (mut calls, mut same) = (0, 0);
    for river in rivers {
        let (mut cpu, mut device) = (in_river("cpu", river, &codes), in_river("emulated", river, &codes));
        let (want, depth) = leave_early(&mut cpu, task.as_ref());
        let (got, device_depth) = leave_early(&mut device, task.as_ref());
        calls += close_calls(&want, &got);
        let as_said = tokens(&want) == tokens(&got);
        if as_said {
            assert!(depth.abs_diff(device_depth) <= depth / 20, "{river:?}: depths {depth} and {device_depth}");
        }
        let (counters, stats) = (device.counters(), device.engine_stats());
        // A read of the tokens, one of their statistics, one of the routes.
        let passes = stats.steps + stats.tokens_drafted;
        assert!(counters.read_backs <= 3 * passes, "{river:?}: {} read-backs, {passes} passes", counters.read_backs);
        if !matches!(river.exit, RiverExit::Draft(_)) {
            assert!(counters.graph_replays > 15, "{river:?}: {} steps replayed", counters.graph_replays);
            // Per pass and layer the same sets are read; the device learns that from its routes, once a pass.
            if as_said && depth == device_depth {
                assert_eq!(counters.weight_bytes, cpu.counters().weight_bytes, "{river:?}");
                same += 1;
            }
        }
    }
    assert!(calls <= 1 && same >= 1, "{calls} close calls, {same} policies with the very depths");
}

/// What drafts yield on a device is what that device yields without them.
#[test]
fn drafts_change_nothing_on_the_device() {
    let task = tasks(&problems("dev", 1), "").remove(0);
    let dir = tempfile::tempdir().unwrap();
    let codes = dir.path().join("tinymath.codes");
    let want = leave_early(&mut on("emulated", |_| {}), task.as_ref()).0;
    let mut drafting = in_river("emulated", River::new(RiverExit::Draft(3)), &codes);
    let got = leave_early(&mut drafting, task.as_ref()).0;
    assert_eq!(tokens(&got), tokens(&want));
    assert!(drafting.engine_stats().drafts_kept > 0 && drafting.counters().graph_replays > 0);
}

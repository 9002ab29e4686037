//! The whole engine on the emulated device: the same orchestration, params, graphs and kernel files as on a GPU, against
//! the CPU backend.

mod common;

use common::{branch_prompt, engine, fork, generated, greedy_to_end, problems, tasks, uncached};
use rksc::engine::{BranchId, Engine, GenerateParams};
use rksc::kv::budget::{KeepRule, KvBudget};
use rksc::sampler::SamplingParams;
use rksc::solver::task::Task;
use rksc::solver::{Policy, Solver, SolverConfig, VerifyMode};
use rksc::{DType, EngineConfig};

const BRANCHES: usize = 8;

fn on(device: &str, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    engine(|c| {
        c.device = device.into();
        c.kv_cache_memory = Some(8 << 20);
        change(c);
    })
}

/// The tokens of every branch of a problem, all in one batch.
fn solve(engine: &mut Engine, task: &dyn Task, params: &GenerateParams) -> Vec<Vec<u32>> {
    let root_tokens = task.root();
    let root = engine.prefill(root_tokens, uncached()).unwrap();
    let branches: Vec<BranchId> = (0..BRANCHES).map(|_| fork(engine, root)).collect();
    for (i, &branch) in branches.iter().enumerate() {
        engine.append(branch, task.branch(i).unwrap()).unwrap();
        engine.start(branch, params.clone()).unwrap();
    }
    common::run_all(engine);
    let tokens =
        branches.iter().enumerate().map(|(i, &b)| generated(engine, b, branch_prompt(task, i).len())).collect();
    branches.iter().chain([&root]).for_each(|&b| engine.prune(b).unwrap());
    engine.check_integrity().unwrap();
    tokens
}

/// The CPU's top-1 margin behind `prompt` and `tokens`.
fn margin(cpu: &mut Engine, prompt: &[u32], tokens: &[u32]) -> f32 {
    let branch = cpu.prefill(&[prompt, tokens].concat(), uncached()).unwrap();
    common::run_all(cpu);
    let margin = cpu.row(branch).unwrap().unwrap().stats.margin;
    cpu.prune(branch).unwrap();
    margin
}

/// Same tokens: equal, or first differing where the CPU's margin is below 0.05; such branches are counted.
fn compare(cpu: &mut Engine, task: &dyn Task, on_cpu: &[Vec<u32>], on_device: &[Vec<u32>]) -> usize {
    let mut close_calls = 0;
    for (i, (want, got)) in on_cpu.iter().zip(on_device).enumerate() {
        if want == got {
            continue;
        }
        let common = want.iter().zip(got).take_while(|(a, b)| a == b).count();
        let margin = margin(cpu, &branch_prompt(task, i), &want[..common]);
        assert!(margin < 0.05, "branch {i} differs at token {common}, where the margin is {margin}");
        close_calls += 1;
    }
    close_calls
}

#[test]
fn five_problems_have_the_same_tokens_as_on_the_cpu() {
    let tasks = tasks(&problems("sample", 5), "");
    let (mut cpu, mut emulated) = (on("cpu", |_| ()), on("emulated", |_| ()));
    let mut close_calls = 0;
    for task in &tasks {
        let want = solve(&mut cpu, task.as_ref(), &greedy_to_end());
        let got = solve(&mut emulated, task.as_ref(), &greedy_to_end());
        close_calls += compare(&mut cpu, task.as_ref(), &want, &got);
    }
    println!("{close_calls} of {} branches differ, each first at a margin below 0.05", 5 * BRANCHES);
    assert!(100 * close_calls <= 5 * BRANCHES, "{close_calls} close calls");
    let counters = emulated.counters();
    assert!(counters.graph_replays > 0, "no decode step was replayed");
}

#[test]
fn f32_answers_scores_and_verdicts_agree() {
    let tasks = tasks(&problems("sample", 2), "");
    let config = SolverConfig { verify: VerifyMode::Suffix, ..SolverConfig::preset(Policy::Exact) };
    let mut results = Vec::new();
    for device in ["cpu", "emulated"] {
        let mut engine = on(device, |c| c.dtype = DType::F32);
        let mut all = Vec::new();
        let mut take = |idx, result| {
            all.push((idx, result));
            Ok(())
        };
        Solver::new(&mut engine, config.clone()).unwrap().solve(&tasks, &mut take).unwrap();
        engine.check_integrity().unwrap();
        all.sort_by_key(|(idx, _)| *idx);
        results.push(all);
    }
    for ((_, want), (_, got)) in results[0].iter().zip(&results[1]) {
        assert_eq!(want.answer, got.answer);
        for (want, got) in want.branches.iter().zip(&got.branches) {
            assert_eq!(want.tokens, got.tokens);
            assert_eq!(want.answer, got.answer);
            assert!((want.confidence - got.confidence).abs() < 1e-4, "{} {}", want.confidence, got.confidence);
            let (want, got) = (want.score.unwrap(), got.score.unwrap());
            assert!((want - got).abs() < 1e-3, "verdict {want} on the CPU, {got} on the device");
        }
    }
}

#[test]
fn sampled_tokens_agree() {
    let tasks = tasks(&problems("sample", 1), "");
    let sampling = SamplingParams {
        temperature: 0.8,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        seed: 5,
        ..Default::default()
    };
    let params = GenerateParams { sampling, max_new_tokens: 12, ..greedy_to_end() };
    let tokens =
        ["cpu", "emulated"].map(|device| solve(&mut on(device, |c| c.dtype = DType::F32), tasks[0].as_ref(), &params));
    assert_eq!(tokens[0], tokens[1]);
}

#[test]
fn a_replayed_step_reads_back_once_and_counts_like_the_cpu() {
    let tasks = tasks(&problems("sample", 1), "");
    let mut counters = Vec::new();
    for device in ["cpu", "emulated"] {
        let mut engine = on(device, |_| ());
        let root = engine.prefill(tasks[0].root(), uncached()).unwrap();
        engine.start(root, common::greedy(8)).unwrap();
        (0..4).for_each(|_| drop(engine.step().unwrap()));
        engine.reset_counters();
        engine.step().unwrap();
        counters.push(engine.counters());
    }
    assert_eq!(counters[1].graph_replays, 1);
    assert_eq!(counters[1].read_backs, 1);
    counters[1].graph_replays = 0;
    assert_eq!(counters[0], counters[1]);
}

fn run_with_a_swap(engine: &mut Engine, branch: BranchId) {
    for step in 0.. {
        if !engine.has_work() {
            return;
        }
        if step == 20 {
            engine.force_preemption(branch);
        }
        engine.step().unwrap();
    }
}

/// Cuts, rings that grow between recorded steps, and a swap: branches under budgets hold and say what they do on the CPU.
#[test]
fn branches_under_a_kv_budget_hold_what_they_hold_on_the_cpu() {
    let tasks = tasks(&problems("sample", 1), "");
    // Passes that add up attention for H2O read back, and are not recorded: its branches come last.
    let rules = [KeepRule::RKV, KeepRule::SNAPKV, KeepRule::RKV, KeepRule::SNAPKV, KeepRule::RKV, KeepRule::H2o];
    let mut held = Vec::new();
    for device in ["cpu", "emulated"] {
        let mut engine = on(device, |c| c.dtype = DType::F32);
        let mut branches = Vec::new();
        for (i, rule) in rules.into_iter().enumerate() {
            if rule == KeepRule::H2o {
                run_with_a_swap(&mut engine, branches[0]);
            }
            let prompt = branch_prompt(tasks[0].as_ref(), i);
            let branch = engine.prefill(&prompt, uncached()).unwrap();
            let budget = KvBudget { buffer: 6, rule, ..KvBudget::new(12, prompt.len(), 16) };
            engine.limit_kv(branch, budget).unwrap();
            engine.start(branch, common::greedy(32)).unwrap();
            branches.push(branch);
        }
        run_with_a_swap(&mut engine, branches[5]);
        assert!(branches.iter().all(|&b| engine.stats(b).unwrap().kv_cuts >= 3));
        assert_eq!(engine.engine_stats().preemptions, 2);
        if device == "emulated" {
            assert!(engine.counters().graph_replays > 10, "{} replays", engine.counters().graph_replays);
        }
        let of = |&b: &BranchId| (engine.tokens(b).unwrap().to_vec(), engine.kv_positions(b, 3, 1).unwrap());
        held.push(branches.iter().map(of).collect::<Vec<_>>());
    }
    assert_eq!(held[0], held[1]);
}

#[test]
fn a_head_dim_without_a_kernel_is_refused_by_name() {
    let config = EngineConfig {
        model: rksc::ModelSource::Random { shape: "tiny".into(), seed: 0 },
        device: "emulated".into(),
        ..EngineConfig::default()
    };
    let error = Engine::open(config).err().unwrap().to_string();
    assert!(error.contains("head_dim 16") && error.contains("--device cpu"), "{error}");
}

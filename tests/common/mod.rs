//! What the integration tests share: engines of the bundled model, its data, rows as bits, a seeded generator.

#![allow(dead_code, reason = "every test file takes what it needs")]

pub(crate) mod walk;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rksc::backend::cpu::simd::SimdLevel;
use rksc::engine::{BranchId, Engine, Event, EventKind, GenerateParams, PrefillOptions};
use rksc::problems::{Problem, read_problems};
use rksc::prompts::PromptPack;
use rksc::report::ProblemResult;
use rksc::solver::task::{CompiledPack, Task, TextTask};
use rksc::solver::{Solver, SolverConfig};
use rksc::tokenizer::Tokenizer;
use rksc::{EngineConfig, ModelSource};

pub(crate) const MODEL: &str = "models/tinymath";
pub(crate) const EOS: u32 = 1;

/// A path relative to the crate root.
pub(crate) fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// A file of the model's folder.
pub(crate) fn model_file(name: &str) -> PathBuf {
    path(MODEL).join(name)
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every SIMD level this CPU has; the others are skipped aloud.
pub(crate) fn simd_levels() -> Vec<String> {
    let (here, absent): (Vec<SimdLevel>, Vec<SimdLevel>) = SimdLevel::ALL.into_iter().partition(|l| l.is_available());
    for level in absent {
        eprintln!("skipped: this CPU has no {level}");
    }
    here.into_iter().map(|l| l.to_string()).collect()
}

/// The model of this crate's own folder, one thread, 64 MiB of KV cache; `change` says what differs.
pub(crate) fn engine(change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config = EngineConfig {
        model: ModelSource::Dir(path(MODEL)),
        threads: 1,
        kv_cache_memory: Some(64 << 20),
        ..EngineConfig::default()
    };
    change(&mut config);
    Engine::open(config).unwrap()
}

/// Roots that take nothing from the prefix cache and leave nothing in it.
pub(crate) fn uncached() -> PrefillOptions {
    PrefillOptions { use_prefix_cache: false, ..PrefillOptions::default() }
}

/// Every id of the vocabulary: what to watch to see a whole row.
pub(crate) fn all_ids(engine: &Engine) -> Vec<u32> {
    (0..engine.model().vocab_size as u32).collect()
}

/// Greedy, exactly `n` tokens, end tokens or not.
pub(crate) fn greedy(n: usize) -> GenerateParams {
    GenerateParams { max_new_tokens: n, ..GenerateParams::default() }
}

/// Greedy up to the end token.
pub(crate) fn greedy_to_end() -> GenerateParams {
    GenerateParams { end_tokens: vec![EOS], ..greedy(256) }
}

pub(crate) fn fork(engine: &mut Engine, parent: BranchId) -> BranchId {
    let mut child = [BranchId::default()];
    engine.fork(parent, &mut child).unwrap();
    child[0]
}

/// The branch's last row, bit for bit: statistics, token, every watched log-probability.
pub(crate) fn row_bits(engine: &Engine, branch: BranchId) -> Vec<u32> {
    let row = engine.row(branch).unwrap().expect("the branch has run");
    let s = row.stats;
    let mut bits = vec![s.argmax, s.max.to_bits(), s.lse.to_bits(), s.entropy.to_bits(), s.top1.to_bits()];
    bits.extend([s.margin.to_bits(), s.finite, row.token.map_or(u32::MAX, |t| t)]);
    bits.extend(row.watched.iter().map(|x| x.to_bits()));
    bits
}

/// Rows of one branch in the order in which they came.
pub(crate) type Trace = Vec<Vec<u32>>;

/// Steps until nobody has work; returns the rows of `branches`, taken as each was committed.
pub(crate) fn traces(engine: &mut Engine, branches: &[BranchId]) -> Vec<Trace> {
    let mut rows: HashMap<BranchId, Trace> = HashMap::new();
    let mut steps = 0;
    while engine.has_work() {
        engine.step().unwrap();
        steps += 1;
        assert!(steps < 30_000, "the engine does not come to an end");
        while let Some(Event { branch, kind }) = engine.next_event() {
            if matches!(kind, EventKind::Token(_) | EventKind::Ready) {
                rows.entry(branch).or_default().push(row_bits(engine, branch));
            }
        }
    }
    engine.check_integrity().unwrap();
    branches.iter().map(|b| rows.remove(b).unwrap_or_default()).collect()
}

/// Steps until nobody has work; returns how many steps that took.
pub(crate) fn run_all(engine: &mut Engine) -> usize {
    let mut steps = 0;
    while engine.has_work() {
        engine.step().unwrap();
        steps += 1;
        assert!(steps < 30_000, "the engine does not come to an end");
    }
    while engine.next_event().is_some() {}
    steps
}

/// What the branch has behind its first `prompt_len` tokens.
pub(crate) fn generated(engine: &Engine, branch: BranchId, prompt_len: usize) -> Vec<u32> {
    engine.tokens(branch).unwrap()[prompt_len..].to_vec()
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_file(&model_file("tokenizer.json")).unwrap())
}

pub(crate) fn prompt_pack() -> PromptPack {
    PromptPack::from_file(&model_file("prompts.json")).unwrap()
}

/// The first `n` problems of `problems/NAME.jsonl`.
pub(crate) fn problems(name: &str, n: usize) -> Vec<Problem> {
    let mut all = read_problems(&model_file(&format!("problems/{name}.jsonl"))).unwrap();
    assert!(all.len() >= n);
    all.truncate(n);
    all
}

pub(crate) fn fewshot_prefix() -> String {
    read(&model_file("problems/fewshot_prefix_1024.txt"))
}

pub(crate) fn compiled(pack: PromptPack, prefix: &str) -> Arc<CompiledPack> {
    Arc::new(CompiledPack::new(pack, tokenizer(), prefix, &[EOS]).unwrap())
}

/// Problems as tasks of the model's own pack.
pub(crate) fn tasks(problems: &[Problem], prefix: &str) -> Vec<Box<dyn Task>> {
    let pack = compiled(prompt_pack(), prefix);
    let task = |p: &Problem| Box::new(TextTask::new(Arc::clone(&pack), p.clone()).unwrap()) as Box<dyn Task>;
    problems.iter().map(task).collect()
}

/// Solves `tasks`; the results in the order of the tasks.
pub(crate) fn solve(engine: &mut Engine, config: &SolverConfig, tasks: &[Box<dyn Task>]) -> Vec<ProblemResult> {
    let mut results: Vec<(usize, ProblemResult)> = Vec::new();
    let mut take = |idx, result| {
        results.push((idx, result));
        Ok(())
    };
    Solver::new(engine, config.clone()).unwrap().solve(tasks, &mut take).unwrap();
    assert_eq!(engine.engine_stats().branches, 0, "branches stayed behind");
    engine.check_integrity().unwrap();
    results.sort_by_key(|(idx, _)| *idx);
    results.into_iter().map(|(_, r)| r).collect()
}

/// The whole prompt of a problem's branch `idx`.
pub(crate) fn branch_prompt(task: &dyn Task, idx: usize) -> Vec<u32> {
    [task.root(), task.branch(idx).unwrap()].concat()
}

/// splitmix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `[0, n)`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Ids that any prompt may hold (no special tokens).
    pub(crate) fn tokens(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| 7 + self.below(760) as u32).collect()
    }
}

//! Arms of a comparison: the same problems on one engine, in turn or one arm after the other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use rksc::config::ModelSource;
use rksc::engine::PrefillOptions;
use rksc::problems::{Problem, read_problems};
use rksc::prompts::PromptPack;
use rksc::report::ladder::Arm;
use rksc::report::{PassRecord, ProblemResult};
use rksc::solver::task::{CompiledPack, Task};
use rksc::solver::{Solver, SolverConfig};
use rksc::{Engine, Error};

use crate::common::{EngineArgs, progress, read_text};
use crate::solve::{approaches, compile_pack};

/// The long style that the bundled model was trained in.
const LONG_STYLE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/approaches_long.txt"));

/// The problems, and the tokens a warm cache holds when one begins.
pub(super) struct Work {
    pub(super) tasks: Vec<Box<dyn Task>>,
    pub(super) warm: Vec<u32>,
}

/// Which problems a comparison is made on.
#[derive(Args, Clone)]
pub(super) struct ProblemArgs {
    /// Problem files [default: the bundled problems].
    #[arg(long = "problems", value_delimiter = ',', value_name = "FILE,..")]
    pub(super) files: Vec<PathBuf>,
    /// Only the first N problems.
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<usize>,
}

impl ProblemArgs {
    pub(super) fn read(&self, engine: &EngineArgs) -> rksc::Result<Vec<Problem>> {
        read(engine, &self.files, self.limit)
    }
}

/// The first `limit` problems of `files`, one after the other; without any, the bundled ones.
pub(super) fn read(engine: &EngineArgs, files: &[PathBuf], limit: Option<usize>) -> rksc::Result<Vec<Problem>> {
    let mut problems = match files {
        [] => engine.source().sample_problems()?,
        files => files.iter().map(|f| read_problems(f)).collect::<rksc::Result<Vec<_>>>()?.concat(),
    };
    problems.truncate(limit.unwrap_or(usize::MAX));
    Ok(problems)
}

/// The prompt pack behind `prefix`: bundled, none or a file; by default the bundled one of the bundled model.
pub(super) fn pack(
    args: &EngineArgs,
    engine: &Engine,
    prefix: Option<&str>,
    prompts: Option<&Path>,
) -> anyhow::Result<Arc<CompiledPack>> {
    let source = args.source();
    compile_pack(args, engine, source.prompt_pack(prompts)?, &prefix_text(&source, prefix)?)
}

/// The model's prompt pack with the approaches of a file; without one the bundled model gets its long style.
pub(super) fn long_pack(source: &ModelSource, file: Option<&Path>) -> anyhow::Result<PromptPack> {
    let mut pack = source.prompt_pack(None)?;
    let lines = match file {
        Some(path) => Some(read_text(path)?),
        None => (*source == ModelSource::Bundled).then(|| LONG_STYLE.to_string()),
    };
    if let Some(lines) = lines {
        pack.approaches = approaches(&lines);
    }
    Ok(pack)
}

/// The text in front of every problem.
pub(super) fn prefix_text(source: &ModelSource, prefix: Option<&str>) -> anyhow::Result<String> {
    Ok(match prefix {
        None if *source == ModelSource::Bundled => source.fewshot_prefix()?,
        None | Some("none") => String::new(),
        Some("bundled") => ModelSource::Bundled.fewshot_prefix()?,
        Some(path) => read_text(Path::new(path))?,
    })
}

/// Each arm once without counting, then all of them in turn, in an order that rotates from problem to problem.
pub(super) fn measure(engine: &mut Engine, work: &Work, rounds: usize, arms: &mut [Arm]) -> anyhow::Result<()> {
    let bar = progress(arms.len() * (1 + work.tasks.len() * rounds));
    for arm in arms.iter_mut() {
        bar.set_message("warm-up");
        run_one(engine, work, 0, arm)?;
        arm.results[0].clear();
        arm.passes.clear();
        bar.inc(1);
    }
    for round in 0..rounds {
        for problem in 0..work.tasks.len() {
            for turn in 0..arms.len() {
                let at = (turn + problem + round) % arms.len();
                let arm = &mut arms[at];
                bar.set_message(arm.name.clone());
                run_one(engine, work, problem, arm)?;
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// One arm, one problem.
pub(super) fn run_one(engine: &mut Engine, work: &Work, problem: usize, arm: &mut Arm) -> anyhow::Result<()> {
    // Before the counters start over: what the arm before left in the cache is no part of this one's peak.
    if !work.warm.is_empty() {
        warm_cache(engine, &work.warm)?;
    } else if arm.config.cold_cache {
        engine.clear_prefix_cache()?;
    }
    engine.reset_counters();
    let mut solver = Solver::new(engine, arm.config.clone())?;
    solver
        .solve(&work.tasks[problem..=problem], &mut |_, result| {
            arm.results[problem].push(result);
            Ok(())
        })
        .map_err(anyhow::Error::from)
        .with_context(|| format!("{}, problem {}", arm.name, work.tasks[problem].id()))?;
    arm.passes.extend_from_slice(solver.passes());
    Ok(())
}

/// Every problem once under `config`, many in flight: what comes of each, in order, and the passes. Its times mean
/// nothing.
pub(super) fn count(
    engine: &mut Engine,
    tasks: &[Box<dyn Task>],
    config: &SolverConfig,
    name: &str,
) -> anyhow::Result<(Vec<ProblemResult>, Vec<PassRecord>)> {
    let bar = progress(tasks.len());
    bar.set_message(name.to_string());
    let mut results: Vec<(usize, ProblemResult)> = Vec::with_capacity(tasks.len());
    let mut solver = Solver::new(engine, config.clone())?;
    solver
        .solve(tasks, &mut |idx, result| {
            results.push((idx, result));
            bar.inc(1);
            Ok(())
        })
        .map_err(anyhow::Error::from)
        .with_context(|| name.to_string())?;
    bar.finish_and_clear();
    results.sort_by_key(|(idx, _)| *idx);
    Ok((results.into_iter().map(|(_, r)| r).collect(), solver.passes().to_vec()))
}

/// Leaves `tokens` in the prefix cache and nothing else: not what another arm left of the same problem.
fn warm_cache(engine: &mut Engine, tokens: &[u32]) -> Result<(), Error> {
    engine.clear_prefix_cache()?;
    let branch = engine.prefill(tokens, PrefillOptions::default())?;
    while engine.has_work() {
        engine.step()?;
    }
    while engine.next_event().is_some() {}
    engine.prune(branch)
}

//! One greedy chain a problem: what is asked, and how an arm answers it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use rksc::engine::EngineStats;
use rksc::gate::step::DecodeExit;
use rksc::report::ProblemResult;
use rksc::solver::task::Task;
use rksc::solver::{Policy, SolverConfig, VerifyMode};
use rksc::{Engine, config::ModelSource};

use super::super::arms::{self, ProblemArgs};
use super::{Arm, Weights};
use crate::common::EngineArgs;
use crate::quant::QuantArgs;
use crate::solve::{compile_pack, text_tasks};

#[derive(Args, Clone)]
pub(super) struct ChainArgs {
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) problems: ProblemArgs,
    /// What the bundled model is asked to write.
    #[arg(long, default_value = "long", value_name = "long|pack")]
    style: Style,
    /// One approach a line, of which the first is taken, instead of a style.
    #[arg(long, value_name = "FILE")]
    approaches: Option<PathBuf>,
    /// Tokens a chain may generate.
    #[arg(long, default_value_t = 640, value_name = "N")]
    pub(super) max_new_tokens: usize,
    /// Problems in flight where nothing is timed; changes nothing but the time it takes.
    #[arg(long, default_value_t = 32, value_name = "N")]
    concurrency: usize,
    #[command(flatten)]
    pub(super) quant: QuantArgs,
    /// Chains of each timed turn, one after the other.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(super) speed_problems: usize,
    /// Timed turns; every arm has one in each, in an order that rotates.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(super) repeats: usize,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Style {
    Long,
    Pack,
}

impl ChainArgs {
    pub(super) fn load(&self) -> rksc::Result<Weights> {
        Weights::load(self.engine.config())
    }

    /// Problems whose answers are known.
    pub(super) fn tasks(&self, engine: &Engine) -> anyhow::Result<Vec<Box<dyn Task>>> {
        let mut problems = self.problems.read(&self.engine)?;
        problems.retain(|p| p.answer.is_some());
        anyhow::ensure!(!problems.is_empty(), "--problems: none has an answer to compare with");
        anyhow::ensure!(self.repeats >= 1, "--repeats: must be at least 1");
        anyhow::ensure!(self.speed_problems >= 1, "--speed-problems: must be at least 1");
        let source: ModelSource = self.engine.source();
        let pack = match (self.style, &self.approaches) {
            (Style::Pack, None) => source.prompt_pack(None)?,
            (_, file) => arms::long_pack(&source, file.as_deref())?,
        };
        text_tasks(&compile_pack(&self.engine, engine, pack, "")?, &problems)
    }

    /// Nothing is verified or cut short.
    pub(super) fn config(&self) -> SolverConfig {
        SolverConfig {
            num_branches: 1,
            max_new_tokens: self.max_new_tokens,
            verify: VerifyMode::Off,
            decode_exit: DecodeExit::Off,
            concurrency: self.concurrency,
            cold_cache: false,
            ..SolverConfig::preset(Policy::Exact)
        }
    }
}

/// Every problem once, many in flight, and what the engine counted meanwhile.
pub(super) fn solve(
    engine: &mut Engine,
    tasks: &[Box<dyn Task>],
    config: &SolverConfig,
    arm: &Arm,
) -> anyhow::Result<(Vec<ProblemResult>, EngineStats)> {
    eprintln!("{}", arm.name);
    engine.clear_prefix_cache()?;
    engine.reset_counters();
    let config = SolverConfig { river: arm.river, ..config.clone() };
    let results = arms::count(engine, tasks, &config, &arm.name)?.0;
    Ok((results, engine.engine_stats()))
}

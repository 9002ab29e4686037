//! Semantic sharing against token-exact sharing, on problems asked in several wordings.

use rksc::Engine;
use rksc::gate::asks::{Asks, AsksScope};
use rksc::report::ProblemResult;
use rksc::report::ladder::Arm;
use rksc::report::mechanisms::{MechanismReport, MechanismRow};
use rksc::solver::select::Select;
use rksc::solver::task::Task;
use rksc::solver::{Policy, SolverConfig, VerifyMode};

use super::Args;
use crate::bench::arms::{self, Work};

/// One arm.
#[derive(serde::Serialize)]
pub(super) struct SharingRow {
    pub(super) tau: Option<f32>,
    pub(super) probe_layers: Option<u32>,
    pub(super) recompute: Option<f32>,
    /// Wordings beyond the first of each problem that became one with another, over all of these.
    pub(super) reuse_rate: f64,
    /// Prompt tokens of a problem, those that left early included.
    pub(super) prefill_tokens: f64,
    /// Tokens of a problem that were not computed, in tokens through all layers.
    pub(super) saved_tokens: f64,
    #[serde(flatten)]
    pub(super) mechanism: MechanismRow,
}

pub(super) fn asks(args: &Args, tau: f32, probe_layers: u32) -> Asks {
    Asks { tau, probe_layers, alpha: args.alpha, scope: AsksScope::Problem, recompute: None }
}

/// Token-exact sharing first.
pub(super) fn arms(args: &Args) -> rksc::Result<Vec<(String, SolverConfig)>> {
    let base = SolverConfig {
        num_branches: args.branches,
        max_new_tokens: args.max_new_tokens,
        wordings: args.wordings,
        verify: VerifyMode::Off,
        ..SolverConfig::preset(Policy::Exact)
    };
    let with = |asks| SolverConfig { asks: Some(asks), ..base.clone() };
    let mut out = vec![("token-exact".to_string(), base.clone())];
    for &depth in &args.depths {
        for &tau in &args.taus {
            out.push((format!("tau {tau}, {depth} layers"), with(asks(args, tau, depth))));
        }
    }
    let depth = args.depths.get(1).or(args.depths.first()).copied().unwrap_or(1);
    for &share in &args.recompute {
        let asks = Asks { recompute: Some(share), ..asks(args, args.recompute_tau, depth) };
        out.push((format!("tau {}, {depth} layers, recompute {share}", args.recompute_tau), with(asks)));
    }
    out.iter().try_for_each(|(_, c)| c.validate())?;
    Ok(out)
}

/// Runs the arms in turn, or one after the other without times.
pub(super) fn measure(
    args: &Args,
    engine: &mut Engine,
    tasks: Vec<Box<dyn Task>>,
    configs: Vec<(String, SolverConfig)>,
) -> anyhow::Result<Vec<SharingRow>> {
    let work = Work { tasks, warm: Vec::new() };
    let mut arms: Vec<Arm> = configs.into_iter().map(|(n, c)| Arm::new(n, c, work.tasks.len())).collect();
    match args.untimed {
        None => arms::measure(engine, &work, 1, &mut arms)?,
        Some(concurrency) => {
            for arm in &mut arms {
                let config = SolverConfig { concurrency, cold_cache: false, ..arm.config.clone() };
                let (results, passes) = arms::count(engine, &work.tasks, &config, &arm.name)?;
                arm.results = results.into_iter().map(|r| vec![r]).collect();
                arm.passes = passes;
            }
        }
    }
    let layers = engine.model().num_layers as f64;
    let report = MechanismReport::new(&arms, &[Select::Vote], args.untimed.is_none());
    let rows = report.arms.into_iter().zip(&arms);
    Ok(rows.map(|(mechanism, arm)| SharingRow::new(mechanism, arm, args.wordings, layers)).collect())
}

impl SharingRow {
    fn new(mechanism: MechanismRow, arm: &Arm, wordings: usize, layers: f64) -> Self {
        let problems = arm.results.len().max(1) as f64;
        let others: usize = arm.results.iter().flatten().map(|r| num_wordings(r).min(wordings).saturating_sub(1)).sum();
        // Nothing but the comparison of prompts leaves a layer out here.
        let saved: f64 = arm.passes.iter().map(|p| p.rows as f64 - p.layer_rows as f64 / layers).sum();
        let asks = arm.config.asks;
        Self {
            tau: asks.map(|a| a.tau),
            probe_layers: asks.map(|a| a.probe_layers),
            recompute: asks.and_then(|a| a.recompute),
            reuse_rate: mechanism.decisions.reuses as f64 / others.max(1) as f64,
            prefill_tokens: (mechanism.tokens.prefill + mechanism.tokens.probed) as f64 / problems,
            saved_tokens: saved / problems,
            mechanism,
        }
    }
}

fn num_wordings(r: &ProblemResult) -> usize {
    r.branches.iter().map(|b| b.wording + 1).max().unwrap_or(1)
}

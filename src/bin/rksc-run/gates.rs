//! Flags of what makes prompts one, stops a verification between layers, and merges branches.

use clap::{Args, ValueEnum};
use rksc::Engine;
use rksc::calibrate::Usable;
use rksc::gate::asks::{Asks, AsksScope};
use rksc::gate::step::Converged;
use rksc::gate::verify::VerifyExit;
use rksc::gate::{Over, ProbeNorm};
use rksc::solver::SolverConfig;
use rksc::solver::sharing_table::SharingTable;

#[derive(Args, Clone)]
pub(crate) struct GateArgs {
    /// Let the branches take turns among the first N wordings of a problem (its question, then its `paraphrases`).
    #[arg(long, value_name = "N", default_value_t = 1)]
    wordings: usize,
    /// `semantic`: prompts that look alike after the first layers go on as one. Not exact.
    #[arg(long, default_value = "off")]
    asks: AsksMode,
    /// Similarity from which two prompts are one [default: 0.95, or as calibrated].
    #[arg(long, value_name = "TAU", allow_negative_numbers = true)]
    asks_tau: Option<f32>,
    /// Layers every prompt runs through before it is compared [default: 2, or as calibrated].
    #[arg(long, value_name = "K")]
    asks_probe_layers: Option<u32>,
    /// Weight of deep layers in the comparison: exp(alpha l / L) [default: 1.5].
    #[arg(long, value_name = "ALPHA")]
    asks_alpha: Option<f32>,
    /// Which prompts may become one: wordings of a problem, or of any problem in flight with the same numbers.
    #[arg(long, default_value = "problem")]
    asks_scope: Scope,
    /// Compare prompts also where the times measured at the start say that nothing can be saved.
    #[arg(long)]
    asks_always: bool,
    /// Prompts keep their tokens; of those they share, this share is computed all the same, and the rest is taken over.
    #[arg(long, value_name = "P")]
    asks_recompute: Option<f32>,
    /// Stop a verification between two layers once its verdict's entropy has settled: over the whole vocabulary, or over
    /// the verdicts alone [default: as the policy says].
    #[arg(long)]
    verify_exit: Option<ExitOver>,
    /// The norm in front of an early look.
    #[arg(long)]
    exit_norm: Option<Norm>,
    /// Look after every K-th layer.
    #[arg(long, value_name = "K")]
    exit_every: Option<u32>,
    /// Looks that share one reading of the unembedding.
    #[arg(long, value_name = "N")]
    exit_stacked: Option<u32>,
    /// First layer that is looked at.
    #[arg(long, value_name = "L")]
    exit_min_layer: Option<u32>,
    /// Entropy (nats) below which a verdict stands.
    #[arg(long, value_name = "THETA")]
    exit_theta: Option<f32>,
    /// Change of the entropy below which it has settled.
    #[arg(long, value_name = "EPSILON")]
    exit_epsilon: Option<f32>,
    /// All verifications of a pass stop together, or none.
    #[arg(long)]
    exit_all_or_none: bool,
    /// Merge decoding branches whose states are at least this similar; above 1, none ever are.
    #[arg(long, value_name = "TAU", allow_negative_numbers = true)]
    merge_converged: Option<f32>,
    /// Steps from one comparison of branches to the next.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "merge_converged")]
    merge_every: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AsksMode {
    Off,
    Semantic,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scope {
    Problem,
    Batch,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExitOver {
    Off,
    Full,
    Candidates,
}

#[derive(Clone, Copy, ValueEnum)]
enum Norm {
    Final,
    Raw,
}

impl GateArgs {
    /// Measures once where comparing prompts can pay, if they are to be compared.
    pub(crate) fn measure(&self, engine: &mut Engine, config: &mut SolverConfig) -> rksc::Result<()> {
        if let Some(asks) = config.asks.filter(|_| !self.asks_always) {
            config.sharing_table = Some(SharingTable::measure(engine, &asks)?);
        }
        Ok(())
    }

    /// Which of the mechanisms switched on here have their thresholds left to a calibration.
    pub(crate) fn left_open(&self) -> Usable {
        let is_candidates = matches!(self.verify_exit, Some(ExitOver::Candidates));
        let exit_numbers = self.exit_theta.is_some()
            || self.exit_epsilon.is_some()
            || self.exit_every.is_some()
            || self.exit_stacked.is_some()
            || self.exit_min_layer.is_some();
        let exit_form = self.exit_norm.is_some() || self.exit_all_or_none;
        let asks_numbers = self.asks_tau.is_some() || self.asks_probe_layers.is_some() || self.asks_alpha.is_some();
        Usable {
            skip: false,
            verify_exit: is_candidates && !exit_numbers && !exit_form,
            asks: self.asks == AsksMode::Semantic && !asks_numbers,
        }
    }

    /// Changes `config` as far as flags were given.
    pub(crate) fn apply(&self, config: &mut SolverConfig) {
        config.wordings = self.wordings;
        if self.asks == AsksMode::Semantic {
            let base = config.asks.unwrap_or_default();
            config.asks = Some(Asks {
                tau: self.asks_tau.unwrap_or(base.tau),
                probe_layers: self.asks_probe_layers.unwrap_or(base.probe_layers),
                alpha: self.asks_alpha.unwrap_or(base.alpha),
                scope: match self.asks_scope {
                    Scope::Problem => AsksScope::Problem,
                    Scope::Batch => AsksScope::Batch,
                },
                recompute: self.asks_recompute,
            });
        } else {
            config.asks = None;
        }
        let base = match self.verify_exit {
            None => config.verify_exit,
            Some(ExitOver::Off) => None,
            Some(ExitOver::Full) => Some(VerifyExit { over: Over::Vocabulary, ..VerifyExit::CANDIDATES }),
            Some(ExitOver::Candidates) => Some(VerifyExit::CANDIDATES),
        };
        config.verify_exit = base.map(|base| VerifyExit {
            over: base.over,
            norm: self.exit_norm.map_or(base.norm, |n| match n {
                Norm::Final => ProbeNorm::Final,
                Norm::Raw => ProbeNorm::Raw,
            }),
            min_layer: self.exit_min_layer.unwrap_or(base.min_layer),
            every: self.exit_every.unwrap_or(base.every),
            stacked: self.exit_stacked.unwrap_or(base.stacked),
            theta: self.exit_theta.unwrap_or(base.theta),
            epsilon: self.exit_epsilon.unwrap_or(base.epsilon),
            all_or_none: self.exit_all_or_none || base.all_or_none,
        });
        config.merge = self.merge_converged.map(|tau| Converged { every: self.merge_every, ..Converged::at(tau) });
    }
}

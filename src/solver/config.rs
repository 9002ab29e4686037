//! Policies as data: what is shared, what is verified, what may be cut short, how the answer is chosen.

use crate::error::{Error, Result};
use crate::gate::asks::{Asks, AsksScope};
use crate::gate::river::{River, RiverExit};
use crate::gate::step::{Converged, DecodeExit, StopAllRule, TrialRule};
use crate::gate::verify::{SkipRule, VerifyExit};
use crate::kv::budget::{KvLimit, KvPrompt};
use crate::sampler::SamplingParams;
use crate::solver::beam::SearchConfig;
use crate::solver::select::Select;
use crate::solver::sharing_table::SharingTable;
use crate::solver::task::Task;

/// The presets of the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Nothing is shared; every branch prefills its whole prompt, and its own verification prompt.
    NoSharing,
    /// Branches share the problem's KV; every verification prompt is prefilled on its own.
    PaperBaseline,
    /// As `PaperBaseline`, and the verification prompts share their common text.
    ExactFresh,
    /// Branches share the problem's KV; verification is a suffix on a fork of each branch.
    Exact,
    /// The paper's rules: fresh verification skipped by confidence, decoding stopped for all, score * sqrt(conf).
    RkscPaper,
    /// What was measured to be best: `Exact`, verification skipped by agreement, decoding stopped once decided.
    Rksc,
}

impl Policy {
    /// All of them, from the least to the most shared.
    pub const ALL: [Self; 6] =
        [Self::NoSharing, Self::PaperBaseline, Self::ExactFresh, Self::Exact, Self::RkscPaper, Self::Rksc];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoSharing => "no-sharing",
            Self::PaperBaseline => "paper-baseline",
            Self::ExactFresh => "exact-fresh",
            Self::Exact => "exact",
            Self::RkscPaper => "rksc-paper",
            Self::Rksc => "rksc",
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|p| p.name() == s).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|p| p.name()).collect();
            Error::config("policy", format!("{s:?} is unknown; use one of {}", names.join(", ")))
        })
    }
}

/// What branches share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// Nothing: each branch is a prompt of its own.
    None,
    /// The KV of identical tokens.
    Exact,
}

/// How a branch is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyMode {
    /// Not at all.
    Off,
    /// A question behind its own solution, on a fork of its KV.
    Suffix,
    /// A prompt of its own, prefilled on its own.
    Fresh,
    /// A prompt of its own; the text common to all branches' prompts is computed once.
    FreshShared,
}

/// Everything the solver is asked to do. Start from [`SolverConfig::preset`].
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SolverConfig {
    /// The preset it came from.
    pub policy: Policy,
    /// Branches per problem.
    pub num_branches: usize,
    /// Tokens a branch may generate.
    pub max_new_tokens: usize,
    /// Every branch generates exactly `max_new_tokens`, whatever it says (for speed measurements).
    pub forced_length: bool,
    /// What branches share.
    pub sharing: Sharing,
    /// Wordings of a problem that its branches take turns among, as far as there are: 1 is the question alone.
    pub wordings: usize,
    /// Prompts that look alike become one.
    pub asks: Option<Asks>,
    /// Where comparing a problem's prompts cannot pay, so that they are not compared; `None`: they always are.
    pub sharing_table: Option<SharingTable>,
    /// Decoding branches that have become alike are merged.
    pub merge: Option<Converged>,
    /// How branches are verified.
    pub verify: VerifyMode,
    /// When verification is skipped.
    pub skip: SkipRule,
    /// When a verification that runs leaves its pass before the last layer.
    pub verify_exit: Option<VerifyExit>,
    /// When decoding ends early.
    pub decode_exit: DecodeExit,
    /// Constants of the confidence-based decode exits.
    pub exit_rule: StopAllRule,
    /// Constants of the trial-answer exit.
    pub trial_rule: TrialRule,
    /// How the answer is chosen.
    pub select: Select,
    /// How tokens are chosen; draws are keyed by (seed, problem, branch, position).
    pub sampling: SamplingParams,
    /// How much KV a branch may hold; `None`: all of it.
    pub kv: Option<KvLimit>,
    /// How generated tokens use the second weight set; `None`: not at all.
    pub river: Option<River>,
    /// Branches grow as a tree instead of each by itself.
    pub search: Option<SearchConfig>,
    /// Ends a step; the task's own where there is none.
    pub step_delimiter: Option<String>,
    /// Problems in flight.
    pub concurrency: usize,
    /// Empty the prefix cache before each problem.
    pub cold_cache: bool,
    /// Write down what reports draw: what each layer of a verification says, and where the KV blocks are at each step.
    /// Costs time, and changes no answer.
    pub record: bool,
    /// Whose thresholds were taken from a calibration, and what it promises.
    pub calibration: Option<Calibrated>,
}

/// What a run took from a calibration.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Calibrated {
    /// The file's name.
    pub file: String,
    /// At most this share of the problems goes from right to wrong, by each mechanism alone.
    pub target: f64,
    /// With this confidence.
    pub confidence: f64,
    /// Problems it rests on.
    pub problems: usize,
    /// Mechanisms that run with its thresholds.
    pub used: Vec<String>,
    /// Mechanisms that run without: no setting was admissible, or the promise does not extend to them.
    pub unused: Vec<String>,
    /// What is different from the runs it rests on: there the target was never shown.
    pub differs: Vec<String>,
}

impl SolverConfig {
    /// The configuration behind a preset's name, with 8 branches and greedy decoding.
    pub fn preset(policy: Policy) -> Self {
        let base = Self {
            policy,
            num_branches: 8,
            max_new_tokens: 256,
            forced_length: false,
            sharing: Sharing::Exact,
            wordings: 1,
            asks: None,
            sharing_table: None,
            merge: None,
            verify: VerifyMode::Suffix,
            skip: SkipRule::Never,
            verify_exit: None,
            decode_exit: DecodeExit::Off,
            exit_rule: StopAllRule::default(),
            trial_rule: TrialRule::default(),
            select: Select::Vote,
            sampling: SamplingParams::default(),
            kv: None,
            river: None,
            search: None,
            step_delimiter: None,
            concurrency: 1,
            cold_cache: true,
            record: false,
            calibration: None,
        };
        match policy {
            Policy::NoSharing => Self { sharing: Sharing::None, verify: VerifyMode::Fresh, ..base },
            Policy::PaperBaseline => Self { verify: VerifyMode::Fresh, ..base },
            Policy::ExactFresh => Self { verify: VerifyMode::FreshShared, ..base },
            Policy::Exact => base,
            Policy::RkscPaper => Self {
                verify: VerifyMode::Fresh,
                skip: SkipRule::CODE,
                verify_exit: Some(VerifyExit::PAPER),
                decode_exit: DecodeExit::StopAll,
                select: Select::ScoreSqrtConf,
                ..base
            },
            Policy::Rksc => Self { skip: SkipRule::AGREEMENT, decode_exit: DecodeExit::Decided, ..base },
        }
    }

    /// Refuses what cannot work, by name.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        check((1..=1024).contains(&self.num_branches), "branches", "must be between 1 and 1024")?;
        check(self.max_new_tokens >= 1, "max-new-tokens", "must be at least 1")?;
        check(self.skip != SkipRule::Agreement { k: 0 }, "agree", "must be at least 1")?;
        check((1..=1024).contains(&self.concurrency), "concurrency", "must be between 1 and 1024")?;
        check(
            self.select != Select::ScoreSqrtConf || self.verify != VerifyMode::Off,
            "select",
            "score*sqrt(conf) needs verification; drop --verify off or use --select vote",
        )?;
        let trial = self.trial_rule;
        check((0.0..=1.0).contains(&trial.confidence), "trial-confidence", "must be between 0 and 1")?;
        check(trial.max_tokens >= 1, "trial_rule.max_tokens", "must be at least 1")?;
        check(
            self.decode_exit != DecodeExit::Trial || !self.forced_length,
            "decode-exit",
            "trial ends branches by their text, and forced lengths by their number; use another",
        )?;
        if let Some(search) = &self.search {
            search.validate(self)?;
        }
        if let Some(kv) = &self.kv {
            check(
                kv.prompt == KvPrompt::Pin || self.sharing == Sharing::None,
                "kv-prompt",
                "evict drops nothing of a prompt that branches share; use --policy no-sharing, or --kv-prompt pin",
            )?;
            check(
                self.decode_exit != DecodeExit::Trial,
                "kv-budget",
                "holds nothing back under --decode-exit trial, which forks each branch after every step: what a fork has \
                 shared is never dropped; use another exit",
            )?;
        }
        if let Some(river) = &self.river {
            self.validate_river(river)?;
        }
        check(self.wordings >= 1, "wordings", "must be at least 1")?;
        if let Some(asks) = &self.asks {
            asks.validate()?;
            check(self.sharing == Sharing::Exact, "asks", "needs a policy that shares KV")?;
            let has_pairs = self.wordings > 1 || (asks.scope == AsksScope::Batch && self.concurrency > 1);
            check(
                has_pairs,
                "asks",
                "has nothing to compare: give --wordings N, or --asks-scope batch with --concurrency N",
            )?;
        }
        if let Some(merge) = &self.merge {
            merge.validate()?;
        }
        if let Some(exit) = &self.verify_exit {
            exit.validate()?;
        }
        self.sampling.validate()
    }

    fn validate_river(&self, river: &River) -> Result<()> {
        river.validate()?;
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        check(
            river.prefill.is_none() || self.asks.is_none(),
            "river-prefill",
            "and --asks both decide on a prompt's last pass; drop one of the two",
        )?;
        check(
            !river.verify || self.verify_exit.is_none(),
            "river-verify",
            "and --verify-exit both decide on a verification's pass; drop one of the two",
        )?;
        check(
            !river.verify || self.verify != VerifyMode::Off,
            "river-verify",
            "there is no verification under --verify off",
        )?;
        if self.kv.is_some() {
            river.check_budget()?;
        }
        let forks = self.decode_exit == DecodeExit::Trial || self.search.as_ref().is_some_and(|s| s.depth > 1);
        check(
            river.refresh.is_none() || !forks,
            "river-refresh",
            "runs nothing again that a branch had when it was forked, and a tree or --decode-exit trial forks at every step; \
             drop one of the two",
        )?;
        if !matches!(river.exit, RiverExit::Draft(_)) {
            return Ok(());
        }
        let by_step = self.search.is_some() || self.merge.is_some();
        let by_step = by_step || !matches!(self.decode_exit, DecodeExit::Off | DecodeExit::Decided);
        check(
            !by_step,
            "river",
            "a draft yields several tokens a step, and a tree, --merge or this --decode-exit looks at every one; drop one \
             of the two",
        )
    }

    /// Refuses a task that lacks what this configuration needs of it, by the name of the missing field.
    pub fn validate_task(&self, task: &dyn Task) -> Result<()> {
        let is_grown = self.search.as_ref().is_some_and(|s| s.depth > 1);
        let needs_steps = is_grown || self.decode_exit == DecodeExit::Trial;
        if needs_steps && task.step_scanner(self.step_delimiter.as_deref()).is_none() {
            let why =
                "the task has no step delimiter; give the prompt pack a field step_delimiter, or --step-delimiter";
            return Err(Error::config("step_delimiter", why));
        }
        if self.decode_exit == DecodeExit::Trial && task.trial().is_none() {
            let why = "--decode-exit trial needs it in the prompt pack: the text that elicits an answer behind a step";
            return Err(Error::config("prompts: trial", why));
        }
        Ok(())
    }
}

//! Thresholds with a promise: on a problem file, the settings of each mechanism that hold a stated target, with a
//! confidence bound and not by a point estimate.
//!
//! **What is bounded.** An error is a problem that is right with nothing left out and wrong with the setting. Of n
//! problems k are errors; the one-sided Clopper-Pearson limit ([`crate::stats::upper_limit`]) is the largest share of
//! errors under which k or fewer of n would still come up with probability `1 - confidence`. A setting is admissible
//! when that limit is at most the target. Without any error the limit is `1 - (1 - confidence)^(1/n)`: at 95 % it is
//! 1.49 % for 200 problems and 0.60 % for 500, whatever the setting. 200 problems cannot show 0.5 %: that takes 598
//! without an error, and then the answer is "no admissible setting", before anything is run.
//!
//! **Why many settings may be tried.** Each mechanism's settings stand in one order, fixed in the code, from the most
//! cautious to the boldest; they are tested in that order and the first that is not admissible ends the search
//! (`calibrate/walk.rs`). This is fixed-sequence testing: a false setting is only ever reached by accepting the first false one
//! in the order, which happens with probability `1 - confidence` at most. So any of the settings before the stop may
//! be chosen, also the one that saves most on the very same problems, and no correction for their number is due.
//!
//! **What the promise covers.** Problems drawn like those of the file, run with the same [`Setup`]; each mechanism by
//! itself. Two at once add up: at most the sum of their targets.
//!
//! **How it is done.** Every problem runs once with nothing left out ([`Records`]); all settings are replayed on that.

mod asks;
mod file;
mod negatives;
mod record;
pub mod river;
mod verdicts;
mod walk;

use serde::{Deserialize, Serialize};

pub use asks::AsksSetting;
pub use file::{Calibration, FileRef, MechanismCheck, Usable};
pub use negatives::{Negative, parse_negatives};
pub use record::Records;
pub use verdicts::ExitSetting;
pub use walk::{Counts, Goal};

use crate::error::{Error, Result};
use crate::gate::verify::SkipRule;
use crate::model::weights::fingerprint::sha256;
use crate::prompts::PromptPack;
use crate::solver::select::Select;
use crate::solver::{SolverConfig, VerifyMode};
use crate::stats::trials_needed;

/// How the problems were run. The promise is about runs like these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Branches per problem.
    pub branches: usize,
    /// Wordings that a problem's branches take turns among.
    pub wordings: usize,
    /// Tokens a branch may generate.
    pub max_new_tokens: usize,
    /// SHA-256 of the prompt pack, written as JSON.
    pub prompts: String,
    /// SHA-256 of the text in front of every problem; of nothing, where there is none.
    pub prefix: String,
    /// Problems run at once: changes no record, and is not written down.
    #[serde(skip, default = "one")]
    pub in_flight: usize,
}

fn one() -> usize {
    1
}

impl Setup {
    /// A setup of these texts; the numbers are still to be filled in.
    pub fn of_texts(pack: &PromptPack, prefix: &str) -> Result<Self> {
        let pack = serde_json::to_string(pack).map_err(|e| Error::Internal(e.to_string()))?;
        let (prompts, prefix) = (sha256(pack.as_bytes()), sha256(prefix.as_bytes()));
        Ok(Self { branches: 1, wordings: 1, max_new_tokens: 1, prompts, prefix, in_flight: 1 })
    }

    /// In what another setup differs, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let numbers = [
            ("branches", self.branches, other.branches),
            ("wordings", self.wordings, other.wordings),
            ("max-new-tokens", self.max_new_tokens, other.max_new_tokens),
        ];
        for (name, here, there) in numbers {
            if here != there {
                found.push(format!("{name} {there} (calibrated with {here})"));
            }
        }
        for (name, here, there) in [("prompts", &self.prompts, &other.prompts), ("prefix", &self.prefix, &other.prefix)]
        {
            if here != there {
                found.push(format!("another {name}"));
            }
        }
        found
    }
}

/// What was found for a mechanism.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part<S> {
    /// `admissible`, or `no admissible setting` and why.
    pub answer: String,
    /// The setting that saves most of those that hold the target.
    pub setting: Option<S>,
    /// What it saves: a share of this.
    pub saves: String,
    /// What it did to the problems.
    pub evidence: Option<Evidence>,
    /// Settings of the sequence, and of these, how many were found to hold the target before one did not.
    pub settings: usize,
    /// See `settings`.
    pub held: usize,
    /// The setting that ended the search.
    pub stopped_at: Option<Stop<S>>,
}

/// Counts, and what follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// What was counted.
    pub counts: Counts,
    /// Upper limit of the share of problems that go from right to wrong, rounded up.
    pub bound: f64,
    /// Upper limit of the share of false merges, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge_bound: Option<f64>,
    /// Share of the work left out.
    pub saving: f64,
}

/// A setting that does not hold the target.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop<S> {
    /// The setting.
    pub setting: S,
    /// What it did to the problems.
    pub evidence: Evidence,
}

/// The same digits on every machine: a logarithm's last bits are not.
fn rounded(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}

/// As [`rounded`], never below.
fn rounded_up(x: f64) -> f64 {
    ((x * 1e6 - 1e-3).ceil() / 1e6).min(1.0)
}

impl Evidence {
    fn of(counts: Counts, goal: Goal) -> Self {
        Self {
            counts,
            bound: rounded_up(counts.bound(goal.confidence)),
            merge_bound: counts.merge_bound(goal.confidence).map(rounded_up),
            saving: rounded(counts.saving()),
        }
    }
}

impl<S: Copy> Part<S> {
    fn none(saves: &str, settings: usize, why: &str) -> Self {
        Self {
            answer: format!("no admissible setting: {why}"),
            setting: None,
            saves: saves.into(),
            evidence: None,
            settings,
            held: 0,
            stopped_at: None,
        }
    }

    fn find(goal: Goal, saves: &str, candidates: &[S], evaluate: impl Fn(&S) -> Counts) -> Self {
        let walk = walk::walk(goal, candidates, evaluate);
        let answer = match (&walk.chosen, walk.num_held) {
            (Some(_), _) => "admissible".to_string(),
            (None, 0) => {
                format!("no admissible setting: {}", walk.failed.map_or("none to try".into(), |f| why(goal, f.1)))
            }
            (None, held) => {
                format!("no admissible setting: the {held} most cautious hold the target and save nothing here")
            }
        };
        Self {
            answer,
            setting: walk.chosen.map(|c| c.0),
            evidence: walk.chosen.map(|c| Evidence::of(c.1, goal)),
            saves: saves.into(),
            settings: candidates.len(),
            held: walk.num_held,
            stopped_at: walk.failed.map(|(setting, c)| Stop { setting, evidence: Evidence::of(c, goal) }),
        }
    }
}

/// Why the most cautious setting does not do.
fn why(goal: Goal, counts: Counts) -> String {
    let merges = counts.merge_bound(goal.confidence).is_some_and(|bound| bound > goal.target);
    let what = match merges {
        true => format!("{} of {} pairs that must not become one do", counts.false_merges, counts.pairs),
        false => format!("{} of {} problems go from right to wrong", counts.right_to_wrong, counts.n),
    };
    format!("under the most cautious {what}")
}

/// The settings of every mechanism.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// Verification skipped by the paper's rule.
    pub skip_paper: Part<SkipRule>,
    /// Verification skipped by the reference code's rule.
    pub skip_code: Part<SkipRule>,
    /// Verification skipped when answers agree.
    pub skip_agreement: Part<SkipRule>,
    /// Verification ended between two layers.
    pub verify_exit: Part<ExitSetting>,
    /// Wordings of a problem that become one.
    pub asks: Part<AsksSetting>,
}

const VERIFICATIONS: &str = "verifications";
const LAYERS: &str = "layers of verifications";
const PROMPTS: &str = "layers of prompt tokens";

impl Parts {
    /// Finds each mechanism's setting. Without `pairs` to look at, ASKS has none.
    pub fn find(records: &Records, goal: Goal) -> Self {
        let problems = &records.problems;
        let num_branches = problems.first().map_or(0, |p| p.branches().len());
        let skip = |rules: Vec<SkipRule>| Part::find(goal, VERIFICATIONS, &rules, |r| verdicts::skip(r, problems));
        let exits = verdicts::exits(records.num_layers);
        let asked = asks::settings(&records.depths);
        Self {
            skip_paper: skip(verdicts::paper_rules()),
            skip_code: skip(verdicts::code_rules()),
            skip_agreement: skip(verdicts::agreements(num_branches)),
            verify_exit: if records.has_verdicts {
                Part::find(goal, LAYERS, &exits, |s| verdicts::exit(s, problems, records.num_layers))
            } else {
                Part::none(LAYERS, exits.len(), "needs a prompt pack with one spelling of yes and one of no")
            },
            asks: if records.pairs.iter().any(|p| !p.is_harmless()) {
                Part::find(goal, PROMPTS, &asked, |s| records.share(s))
            } else {
                Part::none(PROMPTS, asked.len(), "needs pairs that must not become one (--negatives FILE)")
            },
        }
    }

    /// What `num_problems` problems can never show, said without running them; `None` when they can.
    pub fn out_of_reach(goal: Goal, num_problems: usize) -> Option<Self> {
        let least = crate::stats::upper_limit(0, num_problems, goal.confidence);
        if least <= goal.target {
            return None;
        }
        let percent = |x: f64| rounded(100.0 * x);
        let why = format!(
            "{num_problems} problems cannot show less than {:.2} % at {} % confidence; {} % takes {} without an error",
            100.0 * least,
            percent(goal.confidence),
            percent(goal.target),
            trials_needed(goal.target, goal.confidence),
        );
        Some(Self {
            skip_paper: Part::none(VERIFICATIONS, 0, &why),
            skip_code: Part::none(VERIFICATIONS, 0, &why),
            skip_agreement: Part::none(VERIFICATIONS, 0, &why),
            verify_exit: Part::none(LAYERS, 0, &why),
            asks: Part::none(PROMPTS, 0, &why),
        })
    }
}

impl Records {
    fn share(&self, setting: &AsksSetting) -> Counts {
        asks::share(setting, &self.problems, &self.pairs, (&self.depths, self.num_layers))
    }
}

/// Where a run cannot have the promise, whatever it is calibrated with.
fn outside(config: &SolverConfig) -> Vec<String> {
    let reads_verdicts = config.select == Select::ScoreSqrtConf;
    let mut found = Vec::new();
    if reads_verdicts && config.verify != VerifyMode::Suffix {
        found.push("verification is not a suffix".to_string());
    }
    if reads_verdicts && config.decode_exit != crate::gate::step::DecodeExit::Off {
        found.push("decoding may end early".to_string());
    }
    if config.sampling.temperature > 0.0 {
        found.push("tokens are drawn".to_string());
    }
    if config.search.is_some() || config.merge.is_some() {
        found.push("branches are not independent".to_string());
    }
    if config.kv.is_some() {
        found.push("branches have a KV budget".to_string());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal = Goal { target: 0.02, confidence: 0.95 };

    #[test]
    fn what_so_few_problems_cannot_show_is_said_beforehand() {
        assert!(Parts::out_of_reach(GOAL, 200).is_none());
        let parts = Parts::out_of_reach(Goal { target: 0.005, ..GOAL }, 200).unwrap();
        let answer = &parts.asks.answer;
        assert!(answer.starts_with("no admissible setting: 200 problems cannot show less than 1.49 % at 95 %"));
        assert!(answer.ends_with("0.5 % takes 598 without an error"), "{answer}");
        assert_eq!((&parts.skip_code.answer, parts.skip_code.setting), (answer, None));
    }

    #[test]
    fn limits_are_never_rounded_down() {
        assert_eq!((rounded_up(0.0148672), rounded_up(0.5), rounded_up(1.0)), (0.014868, 0.5, 1.0));
        assert_eq!(rounded(0.1234564), 0.123456);
    }

    #[test]
    fn a_setting_that_does_nothing_is_no_answer() {
        let counts = |&saved: &u64| Counts { n: 200, saved, work: 10, ..Counts::default() };
        let idle = Part::find(GOAL, PROMPTS, &[0, 0, 0], counts);
        assert_eq!((idle.setting, idle.held), (None, 3));
        assert!(idle.answer.contains("the 3 most cautious hold the target and save nothing"));
        let found = Part::find(GOAL, PROMPTS, &[0, 5], counts);
        assert_eq!(
            (found.setting, found.answer.as_str(), found.evidence.unwrap().saving),
            (Some(5), "admissible", 0.5)
        );
    }

    #[test]
    fn setups_differ_by_name() {
        let a = Setup {
            branches: 8,
            wordings: 5,
            max_new_tokens: 256,
            prompts: sha256(b"p"),
            prefix: sha256(b""),
            in_flight: 1,
        };
        assert!(a.differences(&Setup { in_flight: 8, ..a.clone() }).is_empty());
        let b = Setup { branches: 4, prefix: sha256(b"x"), ..a.clone() };
        assert_eq!(a.differences(&b), ["branches 4 (calibrated with 8)", "another prefix"]);
    }
}

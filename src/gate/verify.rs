//! Whether the verification pass runs at all (CGEE level 1), from the branches' confidences or their answers; and
//! whether it stops between two layers (level 2), from what the layers would say.

use std::collections::BTreeMap;

use super::{Effect, GateSpec, Over, ProbeNorm, Rule, Scope, Statistic};
use crate::error::{Error, Result};

/// The rule for skipping verification.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", tag = "rule")]
pub enum SkipRule {
    /// Verify always.
    Never,
    /// The reference code's rule: top >= `tau` and top - second >= `gap`, or top >= 0.9 `tau` and the relative gap
    /// >= `rel_gap`.
    Code {
        /// Confidence of the leader.
        tau: f64,
        /// Absolute lead.
        gap: f64,
        /// Relative lead of the second condition.
        rel_gap: f64,
    },
    /// The paper's rule: top >= `tau` and (top - second) / top >= `rel_gap`.
    Paper {
        /// Confidence of the leader.
        tau: f64,
        /// Relative lead.
        rel_gap: f64,
    },
    /// `k` extracted answers agree.
    Agreement {
        /// How many of them.
        k: usize,
    },
}

impl SkipRule {
    /// The constants of the reference code.
    pub const CODE: Self = Self::Code { tau: 0.70, gap: 0.06, rel_gap: 0.08 };
    /// The paper's form with the constants of the acceptance vectors.
    pub const PAPER: Self = Self::Paper { tau: 0.70, rel_gap: 0.08 };
    /// Five branches agree.
    pub const AGREEMENT: Self = Self::Agreement { k: 5 };

    /// True when verification may be skipped. A single branch never leads anyone.
    pub fn skips(&self, confidences: &[f64], answers: &[Option<String>]) -> bool {
        let mut sorted = confidences.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let lead = match sorted[..] {
            [top, second, ..] => Some((top, top - second)),
            _ => None,
        };
        match (*self, lead) {
            (Self::Never, _) => false,
            (Self::Agreement { k }, _) => largest_agreement(answers) >= k,
            (_, None) => false,
            (Self::Code { tau, gap, rel_gap }, Some((top, lead))) => {
                (top >= tau && lead >= gap) || (top >= 0.9 * tau && lead / top.max(1e-6) >= rel_gap)
            }
            (Self::Paper { tau, rel_gap }, Some((top, lead))) => top >= tau && lead / top >= rel_gap,
        }
    }
}

/// When a verification leaves its pass before the last layer: its verdict's entropy is low and has settled.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct VerifyExit {
    /// What the entropy is taken over.
    pub over: Over,
    /// How the residual stream is normed before it is unembedded.
    pub norm: ProbeNorm,
    /// First probed layer; the first exit is possible at the second.
    pub min_layer: u32,
    /// Layers from one probe to the next.
    pub every: u32,
    /// Probes that share one reading of the unembedding.
    pub stacked: u32,
    /// Entropy, in nats, below which a verdict stands.
    pub theta: f32,
    /// Change of the entropy below which it has settled.
    pub epsilon: f32,
    /// All verifications of a pass leave together, or none.
    pub all_or_none: bool,
}

impl VerifyExit {
    /// The reference code's form and constants: every layer, the whole vocabulary, no norm, all or none.
    pub const PAPER: Self = Self {
        over: Over::Vocabulary,
        norm: ProbeNorm::Raw,
        min_layer: 2,
        every: 1,
        stacked: 1,
        theta: 8.0,
        epsilon: 3.0,
        all_or_none: true,
    };
    /// The form that costs two rows of the unembedding: the verdicts alone, normed, each branch by itself.
    pub const CANDIDATES: Self = Self {
        over: Over::Watched,
        norm: ProbeNorm::Final,
        theta: 0.1,
        epsilon: 0.1,
        all_or_none: false,
        ..Self::PAPER
    };

    /// The gate on a model of `num_layers`; `None` where no layer is left to be saved.
    pub fn gate(&self, num_layers: usize) -> Option<GateSpec> {
        let layers: Vec<u32> = (self.min_layer..num_layers as u32).step_by(self.every.max(1) as usize).collect();
        (layers.len() > 1).then(|| GateSpec {
            layers,
            statistic: self.statistic(),
            rule: Rule::Settled { theta: self.theta, epsilon: self.epsilon },
            scope: if self.all_or_none { Scope::Batch } else { Scope::Sequence },
            effect: Effect::Stop,
        })
    }

    /// The same look at every layer, the last included, and no exit.
    pub fn observer(&self, num_layers: usize) -> GateSpec {
        GateSpec {
            layers: (1..=num_layers as u32).collect(),
            statistic: self.statistic(),
            rule: Rule::Never,
            scope: Scope::Sequence,
            effect: Effect::Observe,
        }
    }

    fn statistic(&self) -> Statistic {
        Statistic::Entropy { over: self.over, norm: self.norm, stacked: self.stacked }
    }

    /// Refuses what cannot work, by name.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str| if ok { Ok(()) } else { Err(Error::config(field, "must be at least 1")) };
        check(self.min_layer >= 1, "exit-min-layer")?;
        check(self.every >= 1, "exit-every")?;
        check(self.stacked >= 1, "exit-stacked")?;
        match self.theta.is_finite() && self.epsilon.is_finite() {
            true => Ok(()),
            false => Err(Error::config("exit-theta, exit-epsilon", "must be numbers")),
        }
    }
}

/// The size of the largest group of equal answers; branches without an answer agree with nobody.
pub fn largest_agreement(answers: &[Option<String>]) -> usize {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for answer in answers.iter().flatten() {
        *counts.entry(answer).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIRS: [[f64; 2]; 6] = [[0.90, 0.85], [0.72, 0.65], [0.64, 0.58], [0.69, 0.62], [0.62, 0.40], [0.80, 0.735]];

    /// Acceptance vector RK6.
    #[test]
    fn rk6_the_codes_rule() {
        let skipped: Vec<bool> = PAIRS.iter().map(|p| SkipRule::CODE.skips(p, &[])).collect();
        assert_eq!(skipped, [false, true, true, true, false, true]);
    }

    /// Acceptance vector RK7.
    #[test]
    fn rk7_the_papers_rule() {
        let skipped: Vec<bool> = PAIRS.iter().map(|p| SkipRule::PAPER.skips(p, &[])).collect();
        assert_eq!(skipped, [false, true, false, false, false, true]);
    }

    #[test]
    fn agreement_counts_equal_answers_only() {
        let answers: Vec<Option<String>> =
            ["5", "5", "7", "5", "-", "5"].iter().map(|a| (*a != "-").then(|| a.to_string())).collect();
        assert!(SkipRule::Agreement { k: 4 }.skips(&[], &answers));
        assert!(!SkipRule::AGREEMENT.skips(&[], &answers));
        assert_eq!(largest_agreement(&[None, None]), 0);
    }

    #[test]
    fn the_exit_probes_from_its_first_layer_and_never_the_last() {
        let layers = |exit: VerifyExit, n| exit.gate(n).map(|g| g.layers);
        assert_eq!(layers(VerifyExit::PAPER, 8), Some(vec![2, 3, 4, 5, 6, 7]));
        assert_eq!(layers(VerifyExit { every: 2, min_layer: 1, ..VerifyExit::CANDIDATES }, 8), Some(vec![1, 3, 5, 7]));
        assert_eq!(layers(VerifyExit::PAPER, 3), None, "one probe has nothing to compare with");
        assert_eq!(VerifyExit::PAPER.observer(3).layers, [1, 2, 3]);
        assert!(VerifyExit { stacked: 0, ..VerifyExit::PAPER }.validate().is_err());
    }

    #[test]
    fn one_branch_has_nobody_to_lead() {
        assert!(!SkipRule::CODE.skips(&[0.99], &[]));
    }
}

//! Between two decode steps: which branches stop, and which have become one.

use super::{Effect, GateSpec, Rule, Scope, Statistic};
use crate::error::{Error, Result};

/// When decoding ends before every branch has ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecodeExit {
    /// Every branch runs to its own end.
    Off,
    /// A branch stops when its confidence trails the leader's beyond the rule's lead; the others run on.
    PerBranch,
    /// The reference code's rule: when one branch leads in confidence, all stop where they are.
    StopAll,
    /// When the leading answer's lead exceeds the branches still open, all stop: lossless for a majority vote.
    Decided,
    /// As `Decided`; and at each step delimiter a fork of the branch is asked for the answer, and the branch stops with
    /// that answer when the fork is sure of it. The branch itself decodes on meanwhile. Not lossless.
    Trial,
}

/// When two decoding branches have become one: the states of their newest tokens are alike.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Converged {
    /// Similarity from which two are one. Above 1, none ever are.
    pub tau: f32,
    /// Steps from one comparison to the next.
    pub every: usize,
    /// Layer l of L weighs `exp(alpha l / L)`.
    pub alpha: f32,
}

impl Converged {
    /// Compared every eight steps; alike in the upper half of the layers.
    pub const fn at(tau: f32) -> Self {
        Self { tau, every: 8, alpha: 1.5 }
    }

    /// The gate that compares: it reads the middle layer and the last, and lets every branch go on.
    pub fn gate(&self, num_layers: usize) -> GateSpec {
        let last = num_layers as u32;
        GateSpec {
            layers: if last > 1 { vec![last / 2, last] } else { vec![last] },
            statistic: Statistic::BranchSimilarity { alpha: self.alpha },
            rule: Rule::Cluster { tau: self.tau },
            scope: Scope::Sequence,
            effect: Effect::Observe,
        }
    }

    /// Refuses what cannot work, by name.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        check(self.tau.is_finite() && self.alpha.is_finite(), "merge-converged", "must be a number")?;
        check(self.every >= 1, "merge-every", "must be at least 1")
    }
}

/// Constants of [`DecodeExit::Trial`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct TrialRule {
    /// Geometric mean of the answer tokens' top-1 probabilities from which on the answer stands.
    pub confidence: f64,
    /// Tokens an answer may have; a fork that goes on beyond them has given none.
    pub max_tokens: usize,
}

impl Default for TrialRule {
    fn default() -> Self {
        Self { confidence: 0.99999, max_tokens: 16 }
    }
}

impl TrialRule {
    /// Whether an answer stands whose `num_tokens` tokens' top-1 log-probabilities have this sum. One of no tokens never
    /// does.
    pub fn stands(&self, log_top1_sum: f64, num_tokens: usize) -> bool {
        num_tokens > 0 && (log_top1_sum / num_tokens as f64).exp() >= self.confidence
    }
}

/// Constants of [`DecodeExit::StopAll`] and [`DecodeExit::PerBranch`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct StopAllRule {
    /// Steps (counted from 0) before which nothing stops.
    pub min_step: usize,
    /// Mean confidence the leader needs.
    pub confidence: f64,
    /// Lead relative to the leader's mean.
    pub rel_lead: f64,
}

impl Default for StopAllRule {
    fn default() -> Self {
        Self { min_step: 3, confidence: 0.72, rel_lead: 0.10 }
    }
}

impl StopAllRule {
    /// `step` is the index of the step just made, `means` the running mean confidence of each branch.
    pub fn fires(&self, step: usize, means: &[f64]) -> bool {
        let mut sorted = means.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        match sorted[..] {
            [top, second, ..] => {
                step >= self.min_step && top >= self.confidence && (top - second) / top.max(1e-6) >= self.rel_lead
            }
            _ => false,
        }
    }

    /// The same constants applied to each branch by itself: true for those that trail a confident leader.
    pub fn trailing(&self, step: usize, means: &[f64]) -> Vec<bool> {
        let top = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let leads = step >= self.min_step && top >= self.confidence;
        means.iter().map(|m| leads && (top - m) / top >= self.rel_lead).collect()
    }
}

/// Weighted votes of the branches that have ended, and what the open ones can still add.
///
/// `votes` holds each distinct answer's weight. `max_weight` bounds the weight an open branch can bring (1 for a
/// majority vote; for a vote weighted by confidence, a probability, also 1).
pub fn is_decided(votes: &[f64], num_open: usize, max_weight: f64) -> bool {
    let mut sorted = votes.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let lead = match sorted[..] {
        [] => return false,
        [top] => top,
        [top, second, ..] => top - second,
    };
    num_open > 0 && lead > num_open as f64 * max_weight
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Acceptance vector RK8.
    #[test]
    fn rk8_stop_all_fires_at_step_three() {
        let (a, b) = ([0.9, 0.8, 0.7, 0.8], [0.6, 0.7, 0.6, 0.6]);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let fired = (0..4).find(|&s| StopAllRule::default().fires(s, &[mean(&a[..=s]), mean(&b[..=s])]));
        assert_eq!(fired, Some(3));
        assert!((mean(&a) - 0.80).abs() < 1e-12 && (mean(&b) - 0.625).abs() < 1e-12);
        assert!((0..100).all(|s| !StopAllRule::default().fires(s, &[0.80, 0.75])));
    }

    #[test]
    fn only_the_trailing_branches_stop() {
        let rule = StopAllRule::default();
        assert_eq!(rule.trailing(3, &[0.9, 0.85, 0.5]), [false, false, true]);
        assert_eq!(rule.trailing(2, &[0.9, 0.85, 0.5]), [false, false, false]);
        assert_eq!(rule.trailing(9, &[0.6, 0.3]), [false, false]);
    }

    #[test]
    fn a_trial_stands_on_the_geometric_mean_of_its_tokens() {
        let rule = TrialRule { confidence: 0.8, max_tokens: 4 };
        let log = |top1: &[f64]| top1.iter().map(|p| p.ln()).sum::<f64>();
        assert!(rule.stands(log(&[0.64, 1.0]) + 1e-12, 2), "the mean is 0.8");
        assert!(!rule.stands(log(&[0.63, 1.0]), 2));
        assert!(rule.stands(log(&[0.9, 0.9, 0.9]), 3) && !rule.stands(log(&[0.99, 0.99, 0.4]), 3));
        assert!(!rule.stands(0.0, 0) && !rule.stands(f64::NAN, 1));
    }

    #[test]
    fn decided_needs_a_lead_larger_than_the_open_branches() {
        assert!(!is_decided(&[4.0], 4, 1.0));
        assert!(is_decided(&[5.0], 3, 1.0));
        assert!(!is_decided(&[5.0, 2.0], 3, 1.0));
        assert!(is_decided(&[5.0, 1.0], 2, 1.0));
        assert!(!is_decided(&[5.0], 0, 1.0));
        assert!(!is_decided(&[], 3, 1.0));
    }
}

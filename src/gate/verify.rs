//! Whether the verification pass runs at all (CGEE level 1), from the branches' confidences or their answers.

use std::collections::BTreeMap;

/// The rule for skipping verification.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
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
    fn one_branch_has_nobody_to_lead() {
        assert!(!SkipRule::CODE.skips(&[0.99], &[]));
    }
}

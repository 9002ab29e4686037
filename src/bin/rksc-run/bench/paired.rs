//! An arm's chains against those of another arm on the same problems: how many are right, and what changed.

use rksc::engine::EndReason;
use rksc::report::{BranchResult, ProblemResult, wilson};
use rksc::stats::{Z_ONE_SIDED, Z_TWO_SIDED, paired_difference};

/// One chain a problem, in the order of the other arm's.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct Paired {
    pub(super) problems: usize,
    pub(super) right: usize,
    /// Wilson, 95 %.
    pub(super) interval: [f64; 2],
    pub(super) right_to_wrong: usize,
    pub(super) wrong_to_right: usize,
    /// Share right less that of the other arm, with Tango's paired 95 % interval.
    pub(super) difference: f64,
    pub(super) difference_interval: [f64; 2],
    /// With 95 % confidence no more than this share is lost: the one-sided bound of the same score test.
    pub(super) loss_bound: f64,
    /// Problems with the very tokens of the other arm.
    pub(super) same_tokens: usize,
    pub(super) tokens_mean: f64,
    /// Chains that reached the token limit.
    pub(super) unfinished: usize,
}

impl Paired {
    pub(super) fn new(results: &[ProblemResult], other: &[ProblemResult]) -> Self {
        let n = results.len();
        let right = results.iter().filter(|r| is_right(r)).count();
        let pairs = || other.iter().zip(results);
        let flipped = |from| pairs().filter(|(o, r)| is_right(o) == from && is_right(r) != from).count();
        let (lost, won) = (flipped(true), flipped(false));
        let branches = || results.iter().flat_map(|r| &r.branches);
        Self {
            problems: n,
            right,
            interval: wilson(right, n),
            right_to_wrong: lost,
            wrong_to_right: won,
            difference: (won as f64 - lost as f64) / n.max(1) as f64,
            difference_interval: paired_difference(lost, won, n, Z_TWO_SIDED),
            loss_bound: -paired_difference(lost, won, n, Z_ONE_SIDED)[0],
            same_tokens: pairs().filter(|(o, r)| tokens(o).eq(tokens(r))).count(),
            tokens_mean: branches().map(|b| b.tokens.len()).sum::<usize>() as f64 / n.max(1) as f64,
            unfinished: branches().filter(|b| b.ended == Some(EndReason::Length)).count(),
        }
    }

    pub(super) fn share(&self) -> f64 {
        self.right as f64 / self.problems.max(1) as f64
    }

    /// `457 of 500`, and in per cent with the interval.
    pub(super) fn right_cells(&self) -> [String; 2] {
        let [lo, hi] = self.interval.map(|x| x * 100.0);
        [format!("{} of {}", self.right, self.problems), format!("{:.1} ({lo:.1} to {hi:.1})", self.share() * 100.0)]
    }

    /// Lost, won, and the difference in points with its interval.
    pub(super) fn change_cells(&self) -> [String; 3] {
        let [lo, hi] = self.difference_interval.map(|x| x * 100.0);
        [
            self.right_to_wrong.to_string(),
            self.wrong_to_right.to_string(),
            format!("{:+.1} ({lo:+.1} to {hi:+.1})", self.difference * 100.0),
        ]
    }
}

pub(super) fn is_right(result: &ProblemResult) -> bool {
    result.correct == Some(true)
}

pub(super) fn only_branch(result: &ProblemResult) -> anyhow::Result<&BranchResult> {
    result.branches.first().ok_or_else(|| anyhow::anyhow!("problem {} has no branch", result.id))
}

fn tokens(result: &ProblemResult) -> impl Iterator<Item = &[u32]> {
    result.branches.iter().map(|b| &*b.tokens)
}

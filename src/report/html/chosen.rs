//! Which problems are shown one by one when there are too many to show all.

use super::markup::clipped;
use crate::report::ProblemResult;

/// Figures of single problems in a section: with the one of all problems two rows of three on a wide page.
pub(super) const CHOSEN: usize = 5;

/// Characters of an id in a title.
const MAX_ID: usize = 48;

/// A problem worth a figure, and why.
#[derive(Clone, Copy)]
pub(super) struct Chosen<'a> {
    pub(super) problem: &'a ProblemResult,
    pub(super) why: &'static str,
}

/// At most [`CHOSEN`] of the problems for which `has` is true: three wrong ones, then slow ones, then the first; in the
/// order of the run.
pub(super) fn chosen(problems: &[ProblemResult], has: impl Fn(&ProblemResult) -> bool) -> Vec<Chosen<'_>> {
    let all: Vec<usize> = (0..problems.len()).filter(|&i| has(&problems[i])).collect();
    let mut taken: Vec<(usize, &'static str)> = Vec::new();
    let take = |i: usize, why, taken: &mut Vec<(usize, &'static str)>| {
        if taken.len() < CHOSEN && taken.iter().all(|t| t.0 != i) {
            taken.push((i, why));
        }
    };
    for &i in all.iter().filter(|&&i| problems[i].correct == Some(false)).take(CHOSEN / 2 + 1) {
        take(i, "wrong", &mut taken);
    }
    let mut slow = all.clone();
    slow.sort_by(|&a, &b| problems[b].latency_ms.total_cmp(&problems[a].latency_ms));
    if all.len() > CHOSEN {
        slow.iter().take(2).for_each(|&i| take(i, "slow", &mut taken));
    }
    all.iter().for_each(|&i| take(i, "", &mut taken));
    taken.sort_unstable();
    taken.into_iter().map(|(i, why)| Chosen { problem: &problems[i], why }).collect()
}

impl Chosen<'_> {
    /// Its id, and what it was chosen for.
    pub(super) fn title(&self) -> String {
        let id = clipped(&self.problem.id, MAX_ID);
        match self.why {
            "" => id,
            why => format!("{id} ({why})"),
        }
    }
}

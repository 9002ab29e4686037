//! Which of many settings hold a target, tested in an order that is fixed before anything is seen.

use serde::{Deserialize, Serialize};

use crate::stats::upper_limit;

/// What a setting must hold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// At most this share of problems goes from right to wrong.
    pub target: f64,
    /// The confidence with which that is known.
    pub confidence: f64,
}

/// What a setting did to recorded problems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Problems.
    pub n: usize,
    /// Right without it and wrong with it.
    pub right_to_wrong: usize,
    /// Wrong without it and right with it.
    pub wrong_to_right: usize,
    /// Problems in which it did anything.
    pub fired: usize,
    /// Work left out.
    pub saved: u64,
    /// Of so much.
    pub work: u64,
    /// Pairs that must not become one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pairs: usize,
    /// Of these, those that did.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub false_merges: usize,
    /// Pairs that differ in a name alone and became one: no answer changes by that.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub harmless_merges: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Counts {
    /// Books a problem.
    pub(super) fn book(&mut self, before: bool, after: bool, fired: bool) {
        self.n += 1;
        self.right_to_wrong += usize::from(before && !after);
        self.wrong_to_right += usize::from(!before && after);
        self.fired += usize::from(fired);
    }

    /// Share of the work left out.
    pub fn saving(&self) -> f64 {
        if self.work == 0 { 0.0 } else { self.saved as f64 / self.work as f64 }
    }

    /// Upper limit of the share that goes from right to wrong.
    pub fn bound(&self, confidence: f64) -> f64 {
        upper_limit(self.right_to_wrong, self.n, confidence)
    }

    /// Upper limit of the share of pairs that become one and must not; `None` where there are no such pairs to look at.
    pub fn merge_bound(&self, confidence: f64) -> Option<f64> {
        (self.pairs > 0).then(|| upper_limit(self.false_merges, self.pairs, confidence))
    }

    /// Whether the goal is shown to be held, by the problems and by the pairs.
    pub fn holds(&self, goal: Goal) -> bool {
        let held = |bound: f64| bound <= goal.target;
        held(self.bound(goal.confidence)) && self.merge_bound(goal.confidence).is_none_or(held)
    }
}

/// What became of a sequence of settings.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Walk<S> {
    /// The setting that saves most among those that hold the goal, if it saves anything.
    pub(super) chosen: Option<(S, Counts)>,
    /// Settings that hold the goal.
    pub(super) num_held: usize,
    /// The first that does not.
    pub(super) failed: Option<(S, Counts)>,
}

/// Goes through `candidates` in their order up to the first that does not hold the goal. Of equal savings the earlier
/// is chosen: it is the more cautious.
pub(super) fn walk<S: Copy>(goal: Goal, candidates: &[S], evaluate: impl Fn(&S) -> Counts) -> Walk<S> {
    let mut walk = Walk { chosen: None, num_held: 0, failed: None };
    for &setting in candidates {
        let counts = evaluate(&setting);
        if !counts.holds(goal) {
            walk.failed = Some((setting, counts));
            break;
        }
        walk.num_held += 1;
        if counts.saving() > walk.chosen.map_or(0.0, |(_, best)| best.saving()) {
            walk.chosen = Some((setting, counts));
        }
    }
    walk
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal = Goal { target: 0.02, confidence: 0.95 };

    fn counts(right_to_wrong: usize, saved: u64) -> Counts {
        Counts { n: 200, right_to_wrong, saved, work: 100, ..Counts::default() }
    }

    fn chosen(errors: &[usize], saved: &[u64]) -> (Option<usize>, usize, Option<usize>) {
        let all: Vec<usize> = (0..errors.len()).collect();
        let w = walk(GOAL, &all, |&i| counts(errors[i], saved[i]));
        (w.chosen.map(|c| c.0), w.num_held, w.failed.map(|f| f.0))
    }

    #[test]
    fn the_first_failure_ends_it_whatever_would_come_after() {
        assert_eq!(chosen(&[0, 0, 1, 0], &[1, 2, 3, 4]), (Some(1), 2, Some(2)));
        assert_eq!(chosen(&[1, 0], &[1, 2]), (None, 0, Some(0)));
        assert_eq!(chosen(&[0, 0, 0], &[1, 2, 3]), (Some(2), 3, None));
        assert_eq!(chosen(&[], &[]), (None, 0, None));
    }

    #[test]
    fn what_saves_most_is_chosen_and_what_saves_nothing_is_not() {
        assert_eq!(chosen(&[0, 0, 0, 0], &[1, 5, 5, 2]), (Some(1), 4, None));
        assert_eq!(chosen(&[0, 0], &[0, 0]), (None, 2, None));
    }

    #[test]
    fn a_goal_is_held_by_the_limit_and_not_by_the_estimate() {
        // 1 of 200 is 0.5 %, and no more than 2.35 % is known.
        assert!(counts(0, 1).holds(GOAL) && !counts(1, 1).holds(GOAL));
        let few = Counts { n: 148, ..Counts::default() };
        assert!(!few.holds(GOAL) && Counts { n: 149, ..few }.holds(GOAL));
        assert!(!Counts::default().holds(GOAL), "no problems show nothing");
    }

    #[test]
    fn pairs_must_hold_it_too() {
        let with = |pairs, false_merges| Counts { pairs, false_merges, ..counts(0, 1) };
        assert!(with(750, 0).holds(GOAL) && with(750, 8).holds(GOAL));
        assert!(!with(750, 20).holds(GOAL) && !with(100, 0).holds(GOAL));
    }

    #[test]
    fn problems_are_booked_by_what_they_were_and_became() {
        let mut c = Counts::default();
        for (before, after) in [(true, true), (true, false), (false, true), (false, false), (true, false)] {
            c.book(before, after, before != after);
        }
        assert_eq!((c.n, c.right_to_wrong, c.wrong_to_right, c.fired), (5, 2, 1, 3));
    }
}

//! Which branch wins.

use crate::error::{Error, Result};

/// How the answer is chosen from the branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Select {
    /// The answer with the largest sum of its branches' confidences.
    #[serde(rename = "vote")]
    Vote,
    /// The answer most branches give.
    #[serde(rename = "majority")]
    Majority,
    /// The branch with the largest verifier score times the square root of its confidence (the paper's).
    #[serde(rename = "score*sqrt(conf)")]
    ScoreSqrtConf,
}

impl Select {
    /// Every rule.
    pub const ALL: [Self; 3] = [Self::Vote, Self::Majority, Self::ScoreSqrtConf];
}

impl std::str::FromStr for Select {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "vote" => Ok(Self::Vote),
            "majority" => Ok(Self::Majority),
            "score*sqrt(conf)" | "score-sqrt-conf" => Ok(Self::ScoreSqrtConf),
            _ => Err(Error::config("select", format!("{s:?} is unknown; use vote, majority or score*sqrt(conf)"))),
        }
    }
}

/// A branch as the selection sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Ballot {
    /// Its answer, if it gave one.
    pub answer: Option<String>,
    /// Its mean top-1 probability.
    pub confidence: f64,
    /// Its verifier score, if it was verified.
    pub score: Option<f64>,
    /// How many branches it speaks for: its weight in a vote.
    pub votes: f64,
}

impl Ballot {
    /// A branch that was not verified counts by its confidence alone, as in the paper after a skip.
    /// One that another speaks for does not stand at all.
    fn composite(&self) -> f64 {
        match self.votes > 0.0 {
            true => self.score.unwrap_or(1.0) * self.confidence.sqrt(),
            false => f64::NEG_INFINITY,
        }
    }

    fn weight(&self, rule: Select) -> f64 {
        if rule == Select::Majority { self.votes } else { self.votes * self.confidence }
    }
}

/// The winning branch. Among branches of the winning answer the most confident; ties go to the first. Branches
/// without an answer win only when nobody has one.
pub fn select(rule: Select, ballots: &[Ballot]) -> Option<usize> {
    let best = |score: &dyn Fn(&Ballot) -> f64| first_max(ballots.iter().map(score));
    if rule == Select::ScoreSqrtConf {
        let has_answer = ballots.iter().any(|b| b.answer.is_some());
        let counts = |b: &Ballot| b.votes > 0.0 && (b.answer.is_some() || !has_answer);
        return best(&|b: &Ballot| if counts(b) { b.composite() } else { -1.0 });
    }
    let support = |b: &Ballot| -> f64 {
        let same = |o: &&Ballot| b.answer.is_some() && o.answer == b.answer;
        ballots.iter().filter(same).map(|b| b.weight(rule)).sum()
    };
    let top = ballots.iter().map(support).fold(0.0, f64::max);
    best(&|b: &Ballot| if support(b) == top { 1.0 + b.confidence } else { 0.0 })
}

/// Each distinct answer's weight under `rule`, in order of first appearance.
pub fn tally(rule: Select, ballots: &[Ballot]) -> Vec<f64> {
    let mut answers: Vec<(&str, f64)> = Vec::new();
    for b in ballots {
        let Some(answer) = b.answer.as_deref() else { continue };
        let weight = b.weight(rule);
        match answers.iter_mut().find(|(a, _)| *a == answer) {
            Some((_, sum)) => *sum += weight,
            None => answers.push((answer, weight)),
        }
    }
    answers.into_iter().map(|(_, sum)| sum).collect()
}

fn first_max(values: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, x) in values.enumerate() {
        if best.is_none_or(|(_, b)| x > b) {
            best = Some((i, x));
        }
    }
    best.map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ballot(answer: &str, confidence: f64, score: Option<f64>) -> Ballot {
        Ballot { answer: (answer != "-").then(|| answer.to_string()), confidence, score, votes: 1.0 }
    }

    /// Acceptance vector RK9.
    #[test]
    fn rk9_score_times_root_of_confidence() {
        let b = [ballot("a", 0.25, Some(0.9)), ballot("b", 0.81, Some(0.6)), ballot("c", 1.0, Some(0.5))];
        let composites: Vec<f64> = b.iter().map(Ballot::composite).collect();
        for (got, expected) in composites.iter().zip([0.45, 0.54, 0.50]) {
            assert!((got - expected).abs() < 1e-12);
        }
        assert_eq!(select(Select::ScoreSqrtConf, &b), Some(1));
    }

    #[test]
    fn votes_are_weighted_and_majority_is_not() {
        let b = [ballot("1", 0.9, None), ballot("2", 0.4, None), ballot("2", 0.45, None), ballot("-", 1.0, None)];
        assert_eq!(select(Select::Vote, &b), Some(0));
        assert_eq!(select(Select::Majority, &b), Some(2));
        assert_eq!(tally(Select::Majority, &b), [1.0, 2.0]);
    }

    #[test]
    fn a_branch_that_speaks_for_others_has_their_votes() {
        let mut b = [ballot("1", 0.5, None), ballot("2", 0.9, None)];
        assert_eq!((select(Select::Vote, &b), select(Select::Majority, &b)), (Some(1), Some(1)));
        b[0].votes = 2.0;
        assert_eq!((select(Select::Vote, &b), select(Select::Majority, &b)), (Some(0), Some(0)));
        assert_eq!((tally(Select::Vote, &b), tally(Select::Majority, &b)), (vec![1.0, 0.9], vec![2.0, 1.0]));
    }

    /// A branch that was stopped before its answer is sure of what it has said so far.
    #[test]
    fn a_branch_without_an_answer_wins_only_when_nobody_has_one() {
        let b = [ballot("-", 1.0, None), ballot("1", 0.5, Some(0.5))];
        assert_eq!(Select::ALL.map(|rule| select(rule, &b)), [Some(1); 3]);
        assert_eq!(Select::ALL.map(|rule| select(rule, &b[..1])), [Some(0); 3]);
    }

    /// One that was merged away has no score either, and would count as one whose verification was skipped.
    #[test]
    fn a_branch_without_votes_is_never_chosen() {
        let mut b = [ballot("1", 0.5, Some(0.5)), ballot("-", 0.9, None)];
        b[1].votes = 0.0;
        assert_eq!(select(Select::ScoreSqrtConf, &b), Some(0));
    }

    #[test]
    fn without_any_answer_the_most_confident_branch_stands() {
        assert_eq!(select(Select::Vote, &[ballot("-", 0.3, None), ballot("-", 0.6, None)]), Some(1));
        assert_eq!(select(Select::Vote, &[]), None);
    }
}

//! Verifications left out (CGEE level 1) or ended between two layers (level 2), replayed on records.
//!
//! Both are judged under `score*sqrt(conf)`, the one selection rule that reads verdicts: under a vote they change no
//! answer whatever they do.

use serde::{Deserialize, Serialize};

use super::record::{ProblemRecord, Solution};
use super::walk::Counts;
use crate::gate::Seen;
use crate::gate::verify::{SkipRule, VerifyExit};
use crate::solver::select::{Ballot, Select, select};

/// Leads tried, from the most cautious on; relative ones.
const LEADS: [f64; 12] = [0.5, 0.3, 0.2, 0.1, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.0];
/// Confidences tried at each lead.
const CONFIDENCES: [f64; 8] = [0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0];
/// Bounds of the entropy (nats; ln 2 is the most two verdicts have) and of its change, tightened together.
const SETTLED: [(f32, f32); 10] = [
    (0.01, 0.01),
    (0.03, 0.03),
    (0.1, 0.03),
    (0.1, 0.1),
    (0.2, 0.1),
    (0.3, 0.2),
    (0.4, 0.3),
    (0.5, 0.5),
    (0.6, 0.7),
    (0.7, 0.7),
];

/// An exit between two layers: [`VerifyExit::CANDIDATES`] with these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitSetting {
    /// First probed layer.
    pub min_layer: u32,
    /// Layers from one probe to the next.
    pub every: u32,
    /// Entropy, in nats, below which a verdict stands.
    pub theta: f32,
    /// Change of the entropy below which it has settled.
    pub epsilon: f32,
}

impl ExitSetting {
    /// The exit it stands for.
    pub fn exit(&self) -> VerifyExit {
        VerifyExit {
            min_layer: self.min_layer,
            every: self.every,
            theta: self.theta,
            epsilon: self.epsilon,
            ..VerifyExit::CANDIDATES
        }
    }
}

/// The paper's rule: large leads first, at each lead high confidences first.
pub(super) fn paper_rules() -> Vec<SkipRule> {
    grid().map(|(rel_gap, tau)| SkipRule::Paper { tau, rel_gap }).collect()
}

/// The code's rule; its two leads keep the ratio in which they were published (0.06 to 0.08).
pub(super) fn code_rules() -> Vec<SkipRule> {
    grid().map(|(rel_gap, tau)| SkipRule::Code { tau, gap: 0.75 * rel_gap, rel_gap }).collect()
}

fn grid() -> impl Iterator<Item = (f64, f64)> {
    LEADS.into_iter().flat_map(|lead| CONFIDENCES.into_iter().map(move |confidence| (lead, confidence)))
}

/// Agreement: of all branches first. One branch always agrees with itself, so two is the least.
pub(super) fn agreements(num_branches: usize) -> Vec<SkipRule> {
    (2..=num_branches).rev().map(|k| SkipRule::Agreement { k }).collect()
}

/// Exits: late ones first; from a layer on, sparse looks and tight bounds first.
pub(super) fn exits(num_layers: usize) -> Vec<ExitSetting> {
    let mut all = Vec::new();
    for min_layer in (1..num_layers as u32).rev() {
        for every in [2, 1] {
            let of = |(theta, epsilon)| ExitSetting { min_layer, every, theta, epsilon };
            all.extend(SETTLED.into_iter().map(of).filter(|s| s.exit().gate(num_layers).is_some()));
        }
    }
    all
}

/// What `rule` does to the problems: verifications saved, answers changed.
pub(super) fn skip(rule: &SkipRule, problems: &[ProblemRecord]) -> Counts {
    let mut counts = Counts::default();
    for p in problems {
        let branches = p.branches();
        let confidences: Vec<f64> = branches.iter().map(|b| b.confidence).collect();
        let answers: Vec<Option<String>> = branches.iter().map(|b| b.answer.clone()).collect();
        let skips = rule.skips(&confidences, &answers);
        let scores = branches.iter().map(|b| b.score);
        let before = p.is_right(Select::ScoreSqrtConf, &ballots(branches, scores));
        let unverified = ballots(branches, std::iter::repeat(None));
        let after = if skips { p.is_right(Select::ScoreSqrtConf, &unverified) } else { before };
        counts.book(before, after, skips);
        counts.work += branches.len() as u64;
        counts.saved += if skips { branches.len() as u64 } else { 0 };
    }
    counts
}

/// What `setting` does to the problems: layers of verifications saved, answers changed.
pub(super) fn exit(setting: &ExitSetting, problems: &[ProblemRecord], num_layers: usize) -> Counts {
    let mut counts = Counts::default();
    for p in problems {
        let branches = p.branches();
        let left: Vec<Option<u32>> = branches.iter().map(|b| exit_layer(setting, &b.entropies, num_layers)).collect();
        let early = branches.iter().zip(&left).map(|(b, layer)| match layer {
            Some(layer) => b.verdicts.get(*layer as usize - 1).copied(),
            None => b.score,
        });
        let before = p.is_right(Select::ScoreSqrtConf, &ballots(branches, branches.iter().map(|b| b.score)));
        let after = p.is_right(Select::ScoreSqrtConf, &ballots(branches, early));
        counts.book(before, after, left.iter().any(Option::is_some));
        counts.work += (branches.len() * num_layers) as u64;
        counts.saved += left.iter().flatten().map(|&l| num_layers as u64 - u64::from(l)).sum::<u64>();
    }
    counts
}

/// The layer after which a verification leaves, given the entropy after every layer.
pub(super) fn exit_layer(setting: &ExitSetting, entropies: &[f32], num_layers: usize) -> Option<u32> {
    let gate = setting.exit().gate(num_layers).filter(|_| entropies.len() == num_layers)?;
    let probed: Vec<f32> = gate.layers.iter().map(|&l| entropies[l as usize - 1]).collect();
    let fires = |n: &usize| gate.decide(&[Seen { row: 0, values: &probed[..=*n] }])[0];
    (0..probed.len()).find(fires).map(|n| gate.layers[n])
}

fn ballots(branches: &[Solution], scores: impl Iterator<Item = Option<f64>>) -> Vec<Ballot> {
    let ballot = |(b, score): (&Solution, Option<f64>)| {
        let (answer, confidence) = (b.answer.clone(), b.confidence);
        Ballot { answer, confidence, score, votes: 1.0 }
    };
    branches.iter().zip(scores).map(ballot).collect()
}

impl ProblemRecord {
    /// Whether the answer that `rule` selects is the expected one.
    pub(super) fn is_right(&self, rule: Select, ballots: &[Ballot]) -> bool {
        let winner = select(rule, ballots).and_then(|i| ballots[i].answer.as_deref());
        winner.is_some_and(|answer| crate::prompts::same_answer(answer, &self.expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A branch with this answer, confidence, last verdict and verdict after layer 3 of 4.
    fn solution(answer: &str, confidence: f64, last: f64, third: f64) -> Solution {
        Solution {
            answer: Some(answer.into()),
            confidence,
            score: Some(last),
            entropies: vec![0.6, 0.05, 0.04, 0.03],
            verdicts: vec![0.5, third, third, last],
        }
    }

    fn problem(branches: Vec<Solution>) -> ProblemRecord {
        ProblemRecord { expected: "1".into(), wordings: vec![branches], tokens: vec![9], similar: Vec::new() }
    }

    /// Right by its verdicts; the surest branch is wrong, and so are the verdicts after layer 3.
    fn saved_by_verdicts() -> ProblemRecord {
        problem(vec![solution("1", 0.8, 0.9, 0.1), solution("2", 0.9, 0.1, 0.9)])
    }

    /// Wrong by its verdicts, right without them.
    fn spoilt_by_verdicts() -> ProblemRecord {
        problem(vec![solution("1", 0.9, 0.1, 0.9), solution("2", 0.8, 0.9, 0.1)])
    }

    #[test]
    fn a_skip_selects_by_confidence() {
        let problems = [saved_by_verdicts(), spoilt_by_verdicts()];
        let fires = SkipRule::Paper { tau: 0.9, rel_gap: 0.1 };
        let c = skip(&fires, &problems);
        assert_eq!((c.n, c.right_to_wrong, c.wrong_to_right, c.fired), (2, 1, 1, 2));
        assert_eq!((c.saved, c.work), (4, 4));
        let stays = SkipRule::Paper { tau: 0.95, rel_gap: 0.1 };
        let c = skip(&stays, &problems);
        assert_eq!((c.right_to_wrong, c.wrong_to_right, c.fired, c.saved), (0, 0, 0, 0));
    }

    #[test]
    fn an_exit_replaces_the_last_verdict() {
        let problems = [saved_by_verdicts(), spoilt_by_verdicts()];
        let setting = ExitSetting { min_layer: 2, every: 1, theta: 0.1, epsilon: 0.1 };
        let c = exit(&setting, &problems, 4);
        assert_eq!((c.right_to_wrong, c.wrong_to_right, c.fired), (1, 1, 2));
        assert_eq!((c.saved, c.work), (4, 16), "one layer of four, four verifications");
        let never = ExitSetting { theta: 0.01, ..setting };
        assert_eq!(exit(&never, &problems, 4).fired, 0);
    }

    /// A verification whose entropies are unknown (its logits were not finite) runs to its end, with its own score.
    #[test]
    fn a_broken_verification_never_leaves() {
        let mut p = saved_by_verdicts();
        for b in &mut p.wordings[0] {
            (b.entropies, b.verdicts) = (Vec::new(), Vec::new());
        }
        let setting = ExitSetting { min_layer: 1, every: 1, theta: 1.0, epsilon: 1.0 };
        let c = exit(&setting, &[p], 4);
        assert_eq!((c.right_to_wrong, c.fired, c.saved), (0, 0, 0));
    }

    /// Acceptance vector RK5, through the gate's own rule.
    #[test]
    fn rk5_the_exit_layer() {
        let entropies = [11.0, 9.0, 7.5, 7.0, 6.0];
        let at = |epsilon| exit_layer(&ExitSetting { min_layer: 2, every: 1, theta: 8.0, epsilon }, &entropies, 5);
        assert_eq!((at(3.0), at(0.4)), (Some(3), None));
        let sparse = ExitSetting { min_layer: 1, every: 2, theta: 8.0, epsilon: 4.0 };
        assert_eq!(exit_layer(&sparse, &entropies, 5), Some(3));
    }

    #[test]
    fn sequences_begin_with_the_most_cautious() {
        let exits = exits(8);
        assert_eq!(exits[0], ExitSetting { min_layer: 6, every: 1, theta: 0.01, epsilon: 0.01 });
        assert!(exits.iter().all(|s| s.exit().gate(8).is_some_and(|g| g.validate(8).is_ok())));
        let tight = |s: &ExitSetting| s.min_layer == 3 && s.every == 1;
        let thetas: Vec<f32> = exits.iter().filter(|s| tight(s)).map(|s| s.theta).collect();
        assert!(thetas.len() == SETTLED.len() && thetas.is_sorted());
        assert!(LEADS.is_sorted_by(|a, b| a > b) && CONFIDENCES.is_sorted_by(|a, b| a > b));
        assert_eq!(agreements(4), [4, 3, 2].map(|k| SkipRule::Agreement { k }));
        assert!(agreements(1).is_empty() && self::exits(2).is_empty());
        assert_eq!(paper_rules().len(), code_rules().len());
    }
}

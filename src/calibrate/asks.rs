//! Wordings that become one (ASKS), replayed on records: the solutions of every wording are known, so whose replaces
//! whose is all that a threshold decides.

use serde::{Deserialize, Serialize};

use super::record::{PairRecord, ProblemRecord, Solution};
use super::walk::Counts;
use crate::gate::cluster;
use crate::solver::select::{Ballot, Select};

/// Similarities tried at each depth, from the most cautious on.
const TAUS: [f32; 15] = [0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5];

/// Semantic sharing among the wordings of a problem, with these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AsksSetting {
    /// Similarity from which two prompts are one.
    pub tau: f32,
    /// Layers that every prompt runs through before it is compared.
    pub probe_layers: u32,
}

/// Deep looks first, at each depth high similarities first.
pub(super) fn settings(depths: &[u32]) -> Vec<AsksSetting> {
    let mut depths = depths.to_vec();
    depths.sort_unstable_by(|a, b| b.cmp(a));
    depths.iter().flat_map(|&probe_layers| TAUS.into_iter().map(move |tau| AsksSetting { tau, probe_layers })).collect()
}

/// What `setting` does: layers of prompt tokens saved, answers of a vote changed, pairs merged that must not be.
/// `depths` says to which depth each similarity in the records belongs.
pub(super) fn share(
    setting: &AsksSetting,
    problems: &[ProblemRecord],
    pairs: &[PairRecord],
    (depths, num_layers): (&[u32], usize),
) -> Counts {
    let mut counts = Counts::default();
    let Some(depth) = depths.iter().position(|&d| d == setting.probe_layers) else { return counts };
    for p in problems {
        let num_wordings = p.wordings.len();
        let alone: Vec<usize> = (0..num_wordings).collect();
        let labels: Vec<usize> = match p.similar.get(depth) {
            Some(similar) => cluster(similar, num_wordings, setting.tau).iter().map(|&l| l as usize).collect(),
            None => alone.clone(),
        };
        let before = p.is_right(Select::Vote, &turns(p, &alone));
        let after = p.is_right(Select::Vote, &turns(p, &labels));
        counts.book(before, after, labels != alone);
        for (i, &tokens) in p.tokens.iter().enumerate() {
            counts.work += (tokens * num_layers) as u64;
            let left_out = num_layers.saturating_sub(setting.probe_layers as usize);
            counts.saved += if labels[i] == i { 0 } else { (tokens * left_out) as u64 };
        }
    }
    for pair in pairs {
        let merges = pair.similarity.get(depth).is_some_and(|&s| s >= setting.tau);
        if pair.is_harmless() {
            counts.harmless_merges += usize::from(merges);
        } else {
            counts.pairs += 1;
            counts.false_merges += usize::from(merges);
        }
    }
    counts
}

/// The ballots of a problem whose branches take turns among its wordings, each asked as its representative.
fn turns(p: &ProblemRecord, representatives: &[usize]) -> Vec<Ballot> {
    let ballot = |branch: usize| {
        let wording = representatives[branch % representatives.len()];
        let s: &Solution = &p.wordings[wording][branch];
        Ballot { answer: s.answer.clone(), confidence: s.confidence, score: None, votes: 1.0 }
    };
    (0..p.branches().len()).map(ballot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solution(answer: &str) -> Solution {
        let answer = Some(answer.to_string());
        Solution { answer, confidence: 0.9, score: None, entropies: Vec::new(), verdicts: Vec::new() }
    }

    /// Three wordings, of which the first is always answered wrongly; the similarity of every two of them, by depth.
    fn problem(similar: &[f32]) -> ProblemRecord {
        let branches = |answer: &str| vec![solution(answer), solution(answer), solution(answer)];
        let matrix = |&s: &f32| vec![1.0, s, 0.1, s, 1.0, 0.1, 0.1, 0.1, 1.0];
        ProblemRecord {
            expected: "1".into(),
            wordings: vec![branches("2"), branches("1"), branches("1")],
            tokens: vec![10, 20, 30],
            similar: similar.iter().map(matrix).collect(),
        }
    }

    fn pair(kind: &str, similarity: f32) -> PairRecord {
        PairRecord { kind: kind.into(), similarity: vec![similarity, 0.0] }
    }

    #[test]
    fn a_merged_wording_gives_its_representatives_solutions() {
        let at =
            |tau, probe_layers| share(&AsksSetting { tau, probe_layers }, &[problem(&[0.9, 0.4])], &[], (&[4, 1], 8));
        let c = at(0.8, 4);
        // 0 and 1 are one; 0 is their representative (ties go to the first), and two of three answers are wrong now.
        assert_eq!((c.n, c.right_to_wrong, c.fired), (1, 1, 1));
        assert_eq!((c.saved, c.work), (20 * 4, 60 * 8));
        assert_eq!((at(0.95, 4).fired, at(0.95, 4).right_to_wrong), (0, 0));
        assert_eq!(at(0.8, 1).fired, 0, "at depth 1 they are less alike");
        let all = at(-1.0, 4);
        assert_eq!((all.saved, all.right_to_wrong), ((20 + 30) * 4, 1));
    }

    #[test]
    fn pairs_are_counted_by_what_their_merging_would_do() {
        let pairs = [pair("number", 0.99), pair("operation", 0.5), pair("name", 0.99), pair("other", 0.9)];
        let at = |tau| share(&AsksSetting { tau, probe_layers: 2 }, &[], &pairs, (&[2, 1], 8));
        assert_eq!((at(0.9).pairs, at(0.9).false_merges, at(0.9).harmless_merges), (3, 2, 1));
        assert_eq!((at(0.995).false_merges, at(0.995).harmless_merges), (0, 0));
    }

    #[test]
    fn a_problem_that_was_not_compared_stays_as_it_is() {
        let c = share(&AsksSetting { tau: -1.0, probe_layers: 2 }, &[problem(&[])], &[], (&[2], 8));
        assert_eq!((c.n, c.fired, c.saved), (1, 0, 0));
    }

    #[test]
    fn deep_and_strict_comes_first() {
        let s = settings(&[1, 4, 2]);
        assert_eq!(s[0], AsksSetting { tau: 0.9999, probe_layers: 4 });
        assert_eq!(s.len(), 3 * TAUS.len());
        assert!(s.is_sorted_by_key(|s| std::cmp::Reverse(s.probe_layers)));
        assert!(TAUS.is_sorted_by(|a, b| a > b));
    }
}

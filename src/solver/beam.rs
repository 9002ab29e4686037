//! The decision at the end of a level of the tree: numbers and tokens in, who goes on out.

use crate::error::{Error, Result};
use crate::solver::{Sharing, SolverConfig};

/// How a problem's branches are grown as a tree.
///
/// Depth 1 holds one node per approach, as without a tree. On levels 1 to `depth - 1` a node is one step; `beam` of a
/// level's nodes are kept, and each grows as many children as there are branches. On the last level a node runs to the
/// end of its solution. A node that ends its solution earlier is a leaf: it takes no place in the beam, and is a
/// candidate of the selection like the leaves of the last level.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SearchConfig {
    /// Levels; 1 grows nothing, whatever the beam.
    pub depth: usize,
    /// Nodes kept of a level.
    pub beam: usize,
    /// What a step is worth.
    pub score: StepScore,
    /// Nodes scored below this are pruned even where the beam has a place.
    pub min_score: Option<f64>,
}

/// What a step is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepScore {
    /// The mean top-1 probability of its own tokens.
    Confidence,
    /// The verifier's yes against its no, asked on a fork of the solution so far.
    Verifier,
    /// The verifier's score times the square root of the confidence.
    Both,
}

impl StepScore {
    /// The score of a step; `yes` is what the verifier said, `None` where it was not asked or could not answer.
    pub fn of(self, confidence: f64, yes: Option<f64>) -> Option<f64> {
        match self {
            Self::Confidence => Some(confidence),
            Self::Verifier => yes,
            Self::Both => yes.map(|yes| yes * confidence.sqrt()),
        }
    }
}

impl SearchConfig {
    /// Refuses what cannot work, by name.
    pub fn validate(&self, config: &SolverConfig) -> Result<()> {
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        check((1..=64).contains(&self.depth), "depth", "must be between 1 and 64")?;
        check(self.beam >= 1, "beam", "must be at least 1")?;
        check(
            self.beam.saturating_mul(config.num_branches) <= 1024,
            "beam",
            "beam times branches must be at most 1024",
        )?;
        check(self.min_score.is_none_or(|x| !x.is_nan()), "min-step-score", "must be a number")?;
        if self.depth == 1 {
            return Ok(());
        }
        check(
            config.sampling.temperature > 0.0,
            "depth",
            "the children of a node differ only by their draws, and greedily all would say the same; \
             use --temperature 0.7, or --depth 1",
        )?;
        check(
            config.sharing != Sharing::None,
            "depth",
            "children share the KV of the node they grow from; use another --policy than no-sharing, or --depth 1",
        )?;
        check(!config.forced_length, "depth", "forced lengths leave no steps to expand; use --depth 1")
    }
}

/// A node at the end of its level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LevelNode<'a> {
    /// All tokens generated from the problem on, its ancestors' included.
    pub(super) solution: &'a [u32],
    /// It ended at a step delimiter, and could go on.
    pub(super) is_open: bool,
    /// Its step's score; `None` (and what is not a number) ranks last.
    pub(super) score: Option<f64>,
    /// The node of the level that stands for all whose states are like its own, where states were compared.
    pub(super) like: Option<usize>,
}

/// What becomes of a node at the end of its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NodeFate {
    /// It has ended its solution and stays as a leaf.
    Leaf,
    /// It is expanded.
    Keep,
    /// It is dropped.
    Prune,
    /// It is dropped, and the node with this index, which said the same or has come to the same state, has its votes.
    Merge(usize),
}

/// Decides a level. Of the open nodes with equal solutions the best scored stays (ties: the first); of those that stay
/// the `beam` best are kept (ties: the first), except where they are scored below `min_score`.
///
/// Two nodes say the same only when everything since the problem is equal: the same step behind different steps is not
/// the same state, and equal answers reached on different ways are votes, not duplicates. Where states were compared,
/// nodes with the same `like` are one as well.
pub(super) fn decide(nodes: &[LevelNode<'_>], beam: usize, min_score: Option<f64>) -> Vec<NodeFate> {
    let rank = |i: usize| nodes[i].score.filter(|x| !x.is_nan()).unwrap_or(f64::NEG_INFINITY);
    let mut order: Vec<usize> = (0..nodes.len()).filter(|&i| nodes[i].is_open).collect();
    order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
    let mut fates = vec![NodeFate::Leaf; nodes.len()];
    let mut kept: Vec<usize> = Vec::new();
    let mut distinct: Vec<usize> = Vec::new();
    for i in order {
        let is_one = |j: usize| {
            nodes[j].solution == nodes[i].solution || (nodes[i].like.is_some() && nodes[i].like == nodes[j].like)
        };
        fates[i] = match distinct.iter().find(|&&j| is_one(j)) {
            Some(&survivor) => NodeFate::Merge(survivor),
            None => {
                distinct.push(i);
                let is_good = min_score.is_none_or(|least| rank(i) >= least);
                if is_good && kept.len() < beam {
                    kept.push(i);
                    NodeFate::Keep
                } else {
                    NodeFate::Prune
                }
            }
        };
    }
    fates
}

#[cfg(test)]
mod tests {
    use super::NodeFate::{Keep, Leaf, Merge, Prune};
    use super::*;
    use crate::solver::Policy;

    fn open(solution: &[u32], score: f64) -> LevelNode<'_> {
        LevelNode { solution, is_open: true, score: Some(score), like: None }
    }

    #[test]
    fn the_best_are_kept_and_the_first_wins_a_tie() {
        let nodes = [open(&[1], 0.5), open(&[2], 0.9), open(&[3], 0.5), open(&[4], 0.1)];
        assert_eq!(decide(&nodes, 2, None), [Keep, Keep, Prune, Prune]);
        assert_eq!(decide(&nodes, 9, None), [Keep; 4], "a beam larger than the level keeps all");
        assert_eq!(decide(&[], 2, None), []);
    }

    #[test]
    fn nodes_of_one_state_are_one_and_the_better_scored_stays() {
        let like = |like, node: LevelNode<'static>| LevelNode { like: Some(like), ..node };
        let nodes = [like(1, open(&[1], 0.5)), like(1, open(&[2], 0.9)), like(2, open(&[3], 0.1))];
        assert_eq!(decide(&nodes, 9, None), [Merge(1), Keep, Keep]);
    }

    #[test]
    fn leaves_take_no_place_and_are_never_pruned() {
        let leaf = LevelNode { is_open: false, ..open(&[9], 0.0) };
        assert_eq!(decide(&[leaf, open(&[1], 0.2), open(&[2], 0.3)], 1, Some(0.9)), [Leaf, Prune, Prune]);
        assert_eq!(decide(&[leaf, open(&[1], 0.2), leaf, open(&[2], 0.3)], 1, None), [Leaf, Prune, Leaf, Keep]);
    }

    #[test]
    fn equal_solutions_are_one_and_the_better_scored_has_the_votes() {
        let nodes = [open(&[1, 2], 0.5), open(&[1, 2], 0.7), open(&[5, 2], 0.6), open(&[1, 2], 0.7)];
        assert_eq!(decide(&nodes, 2, None), [Merge(1), Keep, Keep, Merge(1)]);
        // A duplicate takes no place; the votes of what is pruned in the end are lost with it.
        assert_eq!(decide(&nodes, 1, None), [Merge(1), Keep, Prune, Merge(1)]);
        assert_eq!(decide(&nodes, 2, Some(0.9)), [Merge(1), Prune, Prune, Merge(1)]);
    }

    #[test]
    fn the_same_step_behind_different_steps_is_no_duplicate() {
        assert_eq!(decide(&[open(&[1, 7, 8], 0.5), open(&[2, 7, 8], 0.4)], 2, None), [Keep, Keep]);
        let leaf = LevelNode { is_open: false, ..open(&[1], 0.9) };
        assert_eq!(decide(&[leaf, open(&[1], 0.4)], 1, None), [Leaf, Keep]);
    }

    #[test]
    fn a_node_without_a_score_comes_last() {
        let unscored = LevelNode { score: None, ..open(&[1], 0.0) };
        let nan = open(&[2], f64::NAN);
        assert_eq!(decide(&[unscored, nan, open(&[3], 0.1)], 1, None), [Prune, Prune, Keep]);
        assert_eq!(decide(&[unscored, nan], 1, None), [Keep, Prune]);
        assert_eq!(decide(&[unscored, nan], 2, Some(0.0)), [Prune, Prune]);
    }

    #[test]
    fn scores_are_what_their_names_say() {
        assert_eq!(StepScore::Confidence.of(0.81, None), Some(0.81));
        assert_eq!(StepScore::Verifier.of(0.81, Some(0.5)), Some(0.5));
        assert_eq!(StepScore::Both.of(0.81, Some(0.5)), Some(0.45));
        assert_eq!(StepScore::Both.of(0.81, None), None);
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let search = SearchConfig { depth: 2, beam: 2, score: StepScore::Confidence, min_score: None };
        let mut config = SolverConfig::preset(Policy::Exact);
        let complaint = |s: &SearchConfig, c: &SolverConfig| s.validate(c).unwrap_err().to_string();
        assert!(complaint(&search, &config).contains("--temperature 0.7"));
        assert!(SearchConfig { depth: 1, ..search.clone() }.validate(&config).is_ok());
        config.sampling.temperature = 0.7;
        assert!(search.validate(&config).is_ok());
        assert!(complaint(&SearchConfig { depth: 0, ..search.clone() }, &config).contains("depth"));
        assert!(complaint(&SearchConfig { beam: 0, ..search.clone() }, &config).contains("beam"));
        assert!(complaint(&SearchConfig { beam: 129, ..search.clone() }, &config).contains("1024"));
        let nan = SearchConfig { min_score: Some(f64::NAN), ..search.clone() };
        assert!(complaint(&nan, &config).contains("min-step-score"));
        assert!(complaint(&search, &SolverConfig { forced_length: true, ..config.clone() }).contains("--depth 1"));
        config.sharing = Sharing::None;
        assert!(complaint(&search, &config).contains("--policy"));
    }
}

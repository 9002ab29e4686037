//! The record of a tree: every node ever made, and what became of it.

use super::candidate::Candidate;
use crate::engine::EndReason;
use crate::report::{BranchResult, NodeEnd, NodeResult};

/// A node as the record needs it.
pub(super) struct Node {
    parent: Option<usize>,
    depth: usize,
    branch: usize,
    /// Tokens of the solution that its ancestors generated.
    pub(super) from: usize,
    /// What its solution begins with.
    inherited: String,
    /// Its branch among the run's.
    pub(super) leaf: Option<usize>,
    /// What it added, once it has ended as anything but a leaf.
    pub(super) said: Said,
    pub(super) score: Option<f64>,
}

/// What a node added to its ancestors' words.
#[derive(Clone)]
pub(super) struct Said {
    pub(super) tokens: usize,
    pub(super) text: String,
    pub(super) confidence: f64,
    pub(super) answer: Option<String>,
    pub(super) ended: NodeEnd,
}

impl Node {
    pub(super) fn new(parent: Option<usize>, depth: usize, branch: usize, grown_from: Option<&Candidate>) -> Self {
        Self {
            parent,
            depth,
            branch,
            from: grown_from.map_or(0, |c| c.generated.len()),
            inherited: grown_from.map_or(String::new(), |c| c.text.clone()),
            leaf: None,
            said: Said { tokens: 0, text: String::new(), confidence: 0.0, answer: None, ended: NodeEnd::Failed },
            score: None,
        }
    }

    /// What it adds to its ancestors' words.
    pub(super) fn own(&self, solution: &str) -> String {
        solution.strip_prefix(self.inherited.as_str()).unwrap_or(solution).to_string()
    }

    /// Its record; `leaf` is its branch with the confidence of its own steps, if it became one.
    fn result(
        &self,
        number: usize,
        leaf: Option<(&BranchResult, f64)>,
        ended: impl Fn(&BranchResult) -> NodeEnd,
    ) -> NodeResult {
        let said = match leaf {
            Some((b, confidence)) => Said {
                tokens: b.tokens.len().saturating_sub(self.from),
                text: self.own(&b.text),
                confidence,
                answer: b.answer.clone(),
                ended: ended(b),
            },
            None => self.said.clone(),
        };
        NodeResult {
            node: number,
            parent: self.parent,
            depth: self.depth,
            branch: self.branch,
            tokens: said.tokens,
            text: said.text,
            confidence: said.confidence,
            score: leaf.map_or(self.score, |(b, _)| b.score),
            answer: said.answer,
            ended: said.ended,
        }
    }
}

/// The whole tree, parents first. `branches` are its leaves, with the confidence of each one's own steps.
pub(super) fn record(nodes: &[Node], branches: &[BranchResult], confidences: &[f64]) -> Vec<NodeResult> {
    let node_of = |branch: usize| nodes.iter().position(|node| node.leaf == Some(branch));
    let leaf = |node: &Node| node.leaf.and_then(|i| Some((branches.get(i)?, *confidences.get(i)?)));
    let ended = |b: &BranchResult| match b.ended {
        Some(EndReason::EndToken) => NodeEnd::Answered,
        Some(EndReason::Length | EndReason::Context) => NodeEnd::Length,
        Some(EndReason::Stopped) => NodeEnd::Stopped,
        Some(EndReason::Merged) => b.merged_into.and_then(node_of).map_or(NodeEnd::Failed, NodeEnd::Merged),
        Some(EndReason::Dropped | EndReason::NonFinite) | None => NodeEnd::Failed,
    };
    nodes.iter().enumerate().map(|(i, node)| node.result(i, leaf(node), ended)).collect()
}

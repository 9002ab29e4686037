//! One level of a tree before its last: its steps on their way, their scores, its end.

use super::beam::{self, LevelNode, NodeFate, SearchConfig, StepScore};
use super::candidate::{Candidate, generate_params};
use super::config::SolverConfig;
use super::nodes::{Node, Said};
use super::steps::StepWatch;
use super::task::Task;
use super::verdicts::yes_share;
use crate::engine::{BranchId, EndReason, Engine};
use crate::error::Result;
use crate::gate::step::Converged;
use crate::report::NodeEnd;

/// A level before the last, and what waits for the end of the growth.
pub(super) struct Growth {
    pub(super) config: SearchConfig,
    pub(super) depth: usize,
    pub(super) level: Vec<Growing>,
    /// Children of the level, while it is being closed.
    next: Vec<Growing>,
    pub(super) leaves: Vec<(usize, Candidate)>,
    /// While the steps are scored by a verifier: (its branch, the node of the level it judges).
    verifiers: Option<Vec<(BranchId, usize)>>,
    /// While the states of the level's open nodes are compared: (a fork of each, the node it stands for).
    compared: Option<Vec<(BranchId, usize)>>,
    /// Verdicts, or rows to compare, still to come.
    open: usize,
    num_yes: usize,
}

pub(super) struct Growing {
    pub(super) node: usize,
    pub(super) parent: Option<usize>,
    pub(super) candidate: Candidate,
    watch: StepWatch,
    /// It ended at a step delimiter, and can go on.
    is_open: bool,
    yes: Option<f64>,
    /// The node of the level that stands for it, where their states are alike.
    like: Option<usize>,
}

impl Growth {
    /// The first level, of the problem's branches.
    pub(super) fn new(tree: &SearchConfig, task: &dyn Task, branches: Vec<Candidate>, watch: &StepWatch) -> Self {
        let level = branches.into_iter().enumerate().map(|(i, c)| Growing::new(i, None, c, watch.clone())).collect();
        Self {
            config: tree.clone(),
            depth: 1,
            level,
            next: Vec::new(),
            leaves: Vec::new(),
            verifiers: None,
            compared: None,
            open: 0,
            num_yes: task.verdict_tokens().0.len(),
        }
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        let nodes = self.level.iter().chain(&self.next).map(|g| g.candidate.id);
        let leaves = self.leaves.iter().map(|(_, c)| c.id);
        let helpers = self.verifiers.iter().chain(&self.compared).flatten().map(|v| v.0);
        nodes.chain(leaves).chain(helpers)
    }

    pub(super) fn candidate(&mut self, branch: BranchId) -> Option<&mut Candidate> {
        self.level.iter_mut().map(|g| &mut g.candidate).find(|c| c.id == branch)
    }

    pub(super) fn verifier(&self, branch: BranchId) -> Option<usize> {
        self.verifiers.iter().flatten().find(|v| v.0 == branch).map(|v| v.1)
    }

    pub(super) fn on_verdict(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        if self.compared.iter().flatten().any(|c| c.0 == branch) {
            self.open -= 1;
        }
        let Some(i) = self.verifier(branch) else { return Ok(()) };
        let yes = engine.row(branch)?.and_then(|row| yes_share(row, self.num_yes));
        for j in i..self.level.len() {
            if j == i || self.level[j].is_twin_of(&self.level[i]) {
                self.level[j].yes = yes;
            }
        }
        self.open -= 1;
        Ok(())
    }

    /// True when every step of the level has ended, has been compared where that is asked for, and is scored.
    pub(super) fn is_ready(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<bool> {
        if self.open > 0 {
            return Ok(false);
        }
        if self.verifiers.is_some() {
            return Ok(true);
        }
        for g in &mut self.level {
            g.settle(engine, task)?;
        }
        if self.level.iter().any(|g| g.candidate.ended.is_none()) {
            return Ok(false);
        }
        if let Some(rule) = &config.merge {
            match &self.compared {
                None => self.compare(engine, rule)?,
                Some(_) => self.take_comparison(engine)?,
            }
            if self.open > 0 {
                return Ok(false);
            }
        }
        if self.config.score == StepScore::Confidence {
            return Ok(true);
        }
        self.ask_verifiers(engine, task)?;
        Ok(self.open == 0)
    }

    /// Compares the states of the open nodes: the last row of each runs once more, on a fork, all in one pass.
    fn compare(&mut self, engine: &mut Engine, rule: &Converged) -> Result<()> {
        let forks = self.compared.insert(Vec::new());
        for (i, g) in self.level.iter().enumerate().filter(|(_, g)| g.is_open) {
            let mut fork = [BranchId::default()];
            engine.fork(g.candidate.id, &mut fork)?;
            forks.push((fork[0], i));
            engine.watch(fork[0], &[], 0)?;
        }
        let ids: Vec<BranchId> = forks.iter().map(|f| f.0).collect();
        if ids.len() > 1 {
            engine.gate(&rule.gate(engine.model().num_layers), &ids)?;
        }
        self.open = ids.len();
        Ok(())
    }

    /// Notes who is alike, and takes the forks out again.
    fn take_comparison(&mut self, engine: &mut Engine) -> Result<()> {
        let forks = self.compared.iter().flatten();
        let node_of = |id: BranchId| forks.clone().find(|f| f.0 == id).map(|f| f.1);
        let first = forks.clone().next().map(|f| engine.similarity(f.0)).transpose()?.flatten();
        let mut alike = Vec::new();
        if let Some(found) = first {
            for (&m, &label) in found.members.iter().zip(&found.similarity.labels) {
                alike.extend(node_of(m).zip(node_of(found.members[label as usize])));
            }
        }
        for (node, like) in alike {
            self.level[node].like = Some(like);
        }
        while let Some(&(id, _)) = self.compared.as_ref().and_then(|c| c.last()) {
            engine.prune(id)?;
            self.compared.as_mut().map(Vec::pop);
        }
        Ok(())
    }

    /// One verifier for each open node, on a fork of it; twins have one.
    fn ask_verifiers(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<()> {
        let (yes, no) = task.verdict_tokens();
        let watched = [yes, no].concat();
        let verifiers = self.verifiers.insert(Vec::new());
        for (i, g) in self.level.iter().enumerate().filter(|(_, g)| g.is_open) {
            if self.level[..i].iter().any(|other| g.is_twin_of(other)) {
                continue;
            }
            let mut fork = [BranchId::default()];
            engine.fork(g.candidate.id, &mut fork)?;
            verifiers.push((fork[0], i));
            let suffix = task.verify_suffix();
            engine.append(fork[0], &suffix[overlap(&g.candidate.generated, suffix)..])?;
            engine.watch(fork[0], &watched, 0)?;
            self.open += 1;
        }
        Ok(())
    }
}

impl Growing {
    fn new(node: usize, parent: Option<usize>, candidate: Candidate, watch: StepWatch) -> Self {
        Self { node, parent, candidate, watch, is_open: false, yes: None, like: None }
    }

    /// Siblings that said the same: their KV is the same, and so is their verdict.
    fn is_twin_of(&self, other: &Self) -> bool {
        self.parent.is_some()
            && self.parent == other.parent
            && (self.is_open, &self.candidate.generated) == (other.is_open, &other.candidate.generated)
    }

    /// Ends the step at its delimiter, unless the solution has ended with it.
    fn settle(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<()> {
        let c = &mut self.candidate;
        if c.ended.is_none() {
            c.settle(engine, task)?;
            let step = self.watch.next_end(&engine.tokens(c.id)?[c.prompt_len..])?;
            if step.is_some() && c.ended.is_none() {
                engine.stop(c.id)?; // behind the delimiter: a pass brings one token, and each is looked at
                c.ended = Some(EndReason::Stopped);
                self.is_open = true;
            }
        }
        c.settle(engine, task)
    }
}

/// The level is over: duplicates merge, the beam is kept, the others' blocks return, and the kept grow the next level.
/// After an error everything is still where [`Growth::branch_ids`] finds it.
pub(super) fn close_level(
    growth: &mut Growth,
    nodes: &mut Vec<Node>,
    engine: &mut Engine,
    config: &SolverConfig,
    task: &dyn Task,
) -> Result<()> {
    while let Some(&(id, _)) = growth.verifiers.as_ref().and_then(|v| v.last()) {
        engine.uncache(id)?;
        engine.prune(id)?;
        growth.verifiers.as_mut().map(Vec::pop);
    }
    let scores: Vec<Option<f64>> =
        growth.level.iter().map(|g| g.score(growth.config.score, engine)).collect::<Result<_>>()?;
    let views: Vec<LevelNode<'_>> = growth.level.iter().zip(&scores).map(|(g, &score)| g.view(score)).collect();
    let fates = beam::decide(&views, growth.config.beam, growth.config.min_score);
    for (g, (&fate, &score)) in growth.level.iter().zip(fates.iter().zip(&scores)) {
        let ended = match fate {
            NodeFate::Leaf => continue,
            NodeFate::Keep => NodeEnd::Expanded,
            NodeFate::Prune => NodeEnd::Pruned,
            NodeFate::Merge(i) if g.candidate.generated == growth.level[i].candidate.generated => {
                NodeEnd::Duplicate(growth.level[i].node)
            }
            NodeFate::Merge(i) => NodeEnd::Merged(growth.level[i].node),
        };
        nodes[g.node].score = score;
        nodes[g.node].said = g.said(&nodes[g.node], engine, ended)?;
    }
    // Survivors may be pruned, and take the votes along: merge first.
    for (i, &fate) in fates.iter().enumerate() {
        if let NodeFate::Merge(survivor) = fate {
            engine.uncache(growth.level[i].candidate.id)?;
            engine.merge(growth.level[survivor].candidate.id, growth.level[i].candidate.id)?;
            growth.level[survivor].candidate.votes += growth.level[i].candidate.votes;
        }
    }
    for (i, _) in fates.iter().enumerate().filter(|(_, f)| **f == NodeFate::Prune) {
        engine.uncache(growth.level[i].candidate.id)?;
        engine.prune(growth.level[i].candidate.id)?;
    }
    for (i, _) in fates.iter().enumerate().filter(|(_, f)| **f == NodeFate::Keep) {
        expand(growth, i, nodes, engine, config, task)?;
        engine.prune(growth.level[i].candidate.id)?;
    }
    let next = std::mem::take(&mut growth.next);
    let level = std::mem::replace(&mut growth.level, next);
    let leaves = level.into_iter().zip(fates).filter(|(_, fate)| *fate == NodeFate::Leaf);
    growth.leaves.extend(leaves.map(|(g, _)| (g.node, g.candidate)));
    growth.verifiers = None;
    growth.compared = None;
    growth.depth += 1;
    Ok(())
}

/// As many children of the level's node `i` as there are branches.
fn expand(
    growth: &mut Growth,
    i: usize,
    nodes: &mut Vec<Node>,
    engine: &mut Engine,
    config: &SolverConfig,
    task: &dyn Task,
) -> Result<()> {
    let parent = &growth.level[i];
    let used = parent.candidate.generated.len();
    let watch = StepWatch::new(config, task, used)?;
    let mut children = vec![BranchId::default(); config.num_branches];
    engine.fork(parent.candidate.id, &mut children)?;
    for (branch, &id) in children.iter().enumerate() {
        let child = Candidate::grown_from(&parent.candidate, id, task);
        growth.next.push(Growing::new(nodes.len(), Some(parent.node), child, watch.clone()));
        nodes.push(Node::new(Some(parent.node), growth.depth + 1, branch, Some(&parent.candidate)));
    }
    let params = generate_params(config, task, config.max_new_tokens - used);
    children.into_iter().try_for_each(|id| engine.start(id, params.clone()))
}

impl Growing {
    /// Leaves are judged at the end.
    fn score(&self, rule: StepScore, engine: &Engine) -> Result<Option<f64>> {
        if !self.is_open {
            return Ok(None);
        }
        Ok(rule.of(engine.confidence(self.candidate.id)?, self.yes))
    }

    fn view(&self, score: Option<f64>) -> LevelNode<'_> {
        LevelNode { solution: &self.candidate.generated, is_open: self.is_open, score, like: self.like }
    }

    fn said(&self, node: &Node, engine: &Engine, ended: NodeEnd) -> Result<Said> {
        let c = &self.candidate;
        Ok(Said {
            tokens: c.generated.len() - node.from,
            text: node.own(&c.text),
            confidence: engine.confidence(c.id)?,
            answer: c.answer.clone(),
            ended,
        })
    }
}

/// Tokens with which `suffix` begins and `solution` ends: where a step's delimiter opens the verification question, it
/// is not said twice.
fn overlap(solution: &[u32], suffix: &[u32]) -> usize {
    (0..=suffix.len().min(solution.len())).rev().find(|&n| solution.ends_with(&suffix[..n])).unwrap_or(0)
}

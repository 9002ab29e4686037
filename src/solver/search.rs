//! One problem whose branches grow as a tree.
//!
//! ```text
//! one node per approach --(all steps ended)--> score --> merge, keep, prune --> children of the kept
//!          ^                                                                         |
//!          +------------------------- levels 1 to depth - 1 -------------------------+--> last level
//! ```
//!
//! The nodes of the last level, and those that ended their solution before it, are the branches of a [`Run`]: it decodes
//! them to their end, verifies and selects. A problem without a tree is such a run from its beginning.

use super::beam::{self, LevelNode, NodeFate, SearchConfig, StepScore};
use super::candidate::{Candidate, generate_params};
use super::config::SolverConfig;
use super::prompts::Prompts;
use super::run::Run;
use super::steps::StepWatch;
use super::task::Task;
use super::verdicts::yes_share;
use crate::engine::{BranchId, EndReason, Engine, StepItem};
use crate::error::Result;
use crate::report::{BranchResult, NodeEnd, NodeResult, ProblemResult};

/// See the module text.
pub(super) struct Search {
    pub(super) run: Run,
    /// Every node ever made, parents first; empty without a tree.
    nodes: Vec<Node>,
    /// While a level before the last is open.
    pub(super) growth: Option<Growth>,
}

struct Node {
    parent: Option<usize>,
    depth: usize,
    branch: usize,
    /// Tokens of the solution that its ancestors generated.
    from: usize,
    /// What its solution begins with.
    inherited: String,
    /// Its branch among the run's.
    leaf: Option<usize>,
    /// What it added, once it has ended as anything but a leaf.
    said: Said,
    score: Option<f64>,
}

#[derive(Clone)]
struct Said {
    tokens: usize,
    text: String,
    confidence: f64,
    answer: Option<String>,
    ended: NodeEnd,
}

/// A level before the last, and what waits for the end of the growth.
pub(super) struct Growth {
    config: SearchConfig,
    pub(super) depth: usize,
    pub(super) level: Vec<Growing>,
    /// Children of the level, while it is being closed.
    next: Vec<Growing>,
    pub(super) leaves: Vec<(usize, Candidate)>,
    /// While the steps are scored by a verifier: (its branch, the node of the level it judges).
    verifiers: Option<Vec<(BranchId, usize)>>,
    /// Verdicts still to come.
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
}

impl Search {
    /// Puts the problem's first branches into the engine. On error nothing stays there.
    pub(super) fn start(engine: &mut Engine, config: &SolverConfig, task_idx: usize, task: &dyn Task) -> Result<Self> {
        config.validate_task(task)?;
        let run = Run::start(engine, config, task_idx, task)?;
        let mut search = Self { run, nodes: Vec::new(), growth: None };
        let Some(tree) = &config.search else { return Ok(search) };
        for branch in 0..search.run.branches.len() {
            search.nodes.push(Node::new(None, 1, branch, None));
        }
        if tree.depth == 1 {
            search.nodes.iter_mut().enumerate().for_each(|(i, node)| node.leaf = Some(i));
            return Ok(search);
        }
        match search.plant(tree, config, task) {
            Ok(()) => Ok(search),
            Err(error) => {
                search.abandon(engine);
                Err(error)
            }
        }
    }

    /// The run's branches become the first level.
    fn plant(&mut self, tree: &SearchConfig, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        let watch = StepWatch::new(config, task, 0)?;
        let roots = std::mem::take(&mut self.run.branches);
        let level = roots.into_iter().enumerate().map(|(i, c)| Growing::new(i, None, c, watch.clone())).collect();
        self.growth = Some(Growth {
            config: tree.clone(),
            depth: 1,
            level,
            next: Vec::new(),
            leaves: Vec::new(),
            verifiers: None,
            open: 0,
            num_yes: task.verdict_tokens().0.len(),
        });
        Ok(())
    }

    pub(super) fn task_idx(&self) -> usize {
        self.run.task_idx()
    }

    pub(super) fn is_done(&self) -> bool {
        self.growth.is_none() && self.run.is_done()
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        self.run.branch_ids().chain(self.growth.iter().flat_map(Growth::branch_ids))
    }

    /// Books a step's tokens and its time.
    pub(super) fn count(&mut self, item: &StepItem, seconds: f64) {
        if self.growth.as_ref().is_some_and(|g| g.verifier(item.branch).is_some()) {
            return self.run.count_verify(item, seconds);
        }
        // The first pass of a child computes the token with which its parent ended.
        let is_grown = self.growth.as_ref().map_or(self.run.is_grown(item.branch), |g| g.depth > 1);
        let is_decode = item.is_decode || (is_grown && item.num_tokens == 1);
        self.run.count(&StepItem { is_decode, ..*item }, seconds);
    }

    pub(super) fn on_token(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        match &mut self.growth {
            Some(growth) => growth.candidate(branch).map_or(Ok(()), |c| c.on_token(engine)),
            None => self.run.on_token(engine, branch),
        }
    }

    pub(super) fn on_ended(&mut self, engine: &Engine, branch: BranchId, reason: EndReason) -> Result<()> {
        let Some(growth) = &mut self.growth else { return self.run.on_ended(engine, branch, reason) };
        match growth.candidate(branch) {
            Some(c) => {
                c.ended.get_or_insert(reason); // a stop string's reason stands, and so does a step's end
                Ok(())
            }
            None => growth.on_verdict(engine, branch),
        }
    }

    pub(super) fn on_ready(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        match &mut self.growth {
            Some(growth) => growth.on_verdict(engine, branch),
            None => self.run.on_ready(engine, branch),
        }
    }

    /// A prompt of this problem has become another's: its branches' prompts are as long as that one.
    pub(super) fn on_aliased(&mut self, engine: &Engine, root: BranchId) -> Result<()> {
        let Some(wording) = self.run.prompts.wording_of(root) else { return Ok(()) };
        let longer = self.run.prompts.on_aliased(engine, wording)?;
        let growing = self.growth.iter_mut().flat_map(|g| g.level.iter_mut().map(|g| &mut g.candidate));
        for c in self.run.branches.iter_mut().chain(growing).filter(|c| c.wording == wording) {
            c.prompt_len = c.prompt_len.saturating_add_signed(longer);
        }
        Ok(())
    }

    pub(super) fn prompts(&self) -> &Prompts {
        &self.run.prompts
    }

    pub(super) fn prompts_mut(&mut self) -> &mut Prompts {
        &mut self.run.prompts
    }

    pub(super) fn sample_memory(&mut self, engine: &Engine) {
        self.run.sample_memory(engine);
    }

    /// Between two steps: the end of steps, of levels, and what the run has to decide.
    pub(super) fn advance(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        if let Some(growth) = &mut self.growth {
            if !growth.is_ready(engine, task)? {
                return Ok(());
            }
            close_level(growth, &mut self.nodes, engine, config, task)?;
            if growth.depth < growth.config.depth && !growth.level.is_empty() {
                return Ok(());
            }
            if let Some(growth) = self.growth.take() {
                let mut leaves = growth.leaves;
                leaves.extend(growth.level.into_iter().map(|g| (g.node, g.candidate)));
                for (i, (node, candidate)) in leaves.into_iter().enumerate() {
                    self.nodes[node].leaf = Some(i);
                    self.run.branches.push(candidate);
                }
            }
        }
        self.run.advance(engine, config, task)
    }

    /// Selects the answer, clears the engine of the problem, and writes the record.
    pub(super) fn finish(self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<ProblemResult> {
        let confidences: Vec<f64> = self.run.branches.iter().map(Candidate::own_confidence).collect();
        let mut result = self.run.finish(engine, config, task)?;
        let leaf = |node: &Node| node.leaf.and_then(|i| Some((result.branches.get(i)?, *confidences.get(i)?)));
        result.tree = self.nodes.iter().enumerate().map(|(i, node)| node.result(i, leaf(node))).collect();
        Ok(result)
    }

    /// Takes everything of this problem out of the engine.
    pub(super) fn abandon(self, engine: &mut Engine) {
        for id in self.growth.iter().flat_map(Growth::branch_ids) {
            let _ = engine.prune(id);
        }
        self.run.abandon(engine);
    }
}

impl Growth {
    fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        let nodes = self.level.iter().chain(&self.next).map(|g| g.candidate.id);
        let leaves = self.leaves.iter().map(|(_, c)| c.id);
        nodes.chain(leaves).chain(self.verifiers.iter().flatten().map(|v| v.0))
    }

    fn candidate(&mut self, branch: BranchId) -> Option<&mut Candidate> {
        self.level.iter_mut().map(|g| &mut g.candidate).find(|c| c.id == branch)
    }

    fn verifier(&self, branch: BranchId) -> Option<usize> {
        self.verifiers.iter().flatten().find(|v| v.0 == branch).map(|v| v.1)
    }

    fn on_verdict(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
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

    /// True when every step of the level has ended and is scored.
    fn is_ready(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<bool> {
        if self.verifiers.is_some() {
            return Ok(self.open == 0);
        }
        for g in &mut self.level {
            g.settle(engine, task)?;
        }
        if self.level.iter().any(|g| g.candidate.ended.is_none()) {
            return Ok(false);
        }
        if self.config.score == StepScore::Confidence {
            return Ok(true);
        }
        self.ask_verifiers(engine, task)?;
        Ok(self.open == 0)
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
        Self { node, parent, candidate, watch, is_open: false, yes: None }
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
fn close_level(
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
            NodeFate::Merge(i) => NodeEnd::Duplicate(growth.level[i].node),
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
        LevelNode { solution: &self.candidate.generated, is_open: self.is_open, score }
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

impl Node {
    fn new(parent: Option<usize>, depth: usize, branch: usize, grown_from: Option<&Candidate>) -> Self {
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
    fn own(&self, solution: &str) -> String {
        solution.strip_prefix(self.inherited.as_str()).unwrap_or(solution).to_string()
    }

    /// Its record; `leaf` is its branch with the confidence of its own steps, if it became one.
    fn result(&self, number: usize, leaf: Option<(&BranchResult, f64)>) -> NodeResult {
        let said = match leaf {
            Some((b, confidence)) => Said {
                tokens: b.tokens.len().saturating_sub(self.from),
                text: self.own(&b.text),
                confidence,
                answer: b.answer.clone(),
                ended: b.ended.map_or(NodeEnd::Failed, node_end),
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

/// Why a leaf ended.
fn node_end(reason: EndReason) -> NodeEnd {
    match reason {
        EndReason::EndToken => NodeEnd::Answered,
        EndReason::Length | EndReason::Context => NodeEnd::Length,
        EndReason::Stopped => NodeEnd::Stopped,
        EndReason::Dropped | EndReason::NonFinite | EndReason::Merged => NodeEnd::Failed,
    }
}

/// Tokens with which `suffix` begins and `solution` ends: where a step's delimiter opens the verification question, it
/// is not said twice.
fn overlap(solution: &[u32], suffix: &[u32]) -> usize {
    (0..=suffix.len().min(solution.len())).rev().find(|&n| solution.ends_with(&suffix[..n])).unwrap_or(0)
}

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

use super::candidate::Candidate;
use super::config::SolverConfig;
use super::growth::{Growth, close_level};
use super::nodes::{Node, record};
use super::prompts::Prompts;
use super::run::Run;
use super::steps::StepWatch;
use super::task::Task;
use crate::engine::{BranchId, EndReason, Engine, GeneratedToken, StepItem};
use crate::error::Result;
use crate::report::ProblemResult;

/// See the module text.
pub(super) struct Search {
    pub(super) run: Run,
    /// Every node ever made, parents first; empty without a tree.
    nodes: Vec<Node>,
    /// While a level before the last is open.
    pub(super) growth: Option<Growth>,
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
        match StepWatch::new(config, task, 0) {
            Ok(watch) => {
                let branches = std::mem::take(&mut search.run.branches);
                search.growth = Some(Growth::new(tree, task, branches, &watch));
                Ok(search)
            }
            Err(error) => {
                search.abandon(engine);
                Err(error)
            }
        }
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

    pub(super) fn on_token(&mut self, branch: BranchId, token: &GeneratedToken) {
        let Some(growth) = &mut self.growth else { return self.run.on_token(branch, token) };
        if let Some(c) = growth.candidate(branch) {
            c.on_token(token);
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
            if !growth.is_ready(engine, config, task)? {
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
        result.tree = record(&self.nodes, &result.branches, &confidences);
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

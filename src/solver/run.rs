//! One problem on its way through its phases.
//!
//! ```text
//! start: root + forks --(all branches ended)--> verify (or skip) --(all verdicts there)--> finish: select
//! ```
//!
//! The run reacts to what the engine reports about its branches; it decides between steps and never inside one.

use std::time::Instant;

use super::candidate::{Candidate, generate_params};
use super::config::{Sharing, SolverConfig, VerifyMode};
use super::merge::Merging;
use super::prompts::{Prompts, num_wordings};
use super::select::{Ballot, select, tally};
use super::task::Task;
use super::trial::Trials;
use super::verdicts::Verdicts;
use crate::engine::{BranchId, EndReason, Engine, GeneratedToken, PrefillOptions, StepItem};
use crate::error::Result;
use crate::gate::step::{DecodeExit, is_decided};
use crate::prompts::same_answer;
use crate::report::{MemorySample, PhaseMs, ProblemResult, TokenCounts};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Decode,
    Verify,
    Done,
}

/// See the module text.
pub(super) struct Run {
    task_idx: usize,
    phase: Phase,
    pub(super) prompts: Prompts,
    pub(super) branches: Vec<Candidate>,
    verdicts: Verdicts,
    started: Instant,
    tokens: TokenCounts,
    ms: PhaseMs,
    /// While branches that converge are merged.
    merging: Option<Merging>,
    /// With [`DecodeExit::Trial`].
    trials: Option<Trials>,
    blocks_shared: usize,
    memory: Vec<MemorySample>,
    /// Blocks the engine had given back before.
    freed_before: u64,
}

impl Run {
    /// Puts the problem's branches into the engine. On error nothing stays there.
    pub(super) fn start(engine: &mut Engine, config: &SolverConfig, task_idx: usize, task: &dyn Task) -> Result<Self> {
        let mut run = Self {
            task_idx,
            phase: Phase::Decode,
            prompts: Prompts::default(),
            branches: Vec::new(),
            verdicts: Verdicts::default(),
            started: Instant::now(),
            tokens: TokenCounts::default(),
            ms: PhaseMs::default(),
            merging: config.merge.map(Merging::new),
            trials: None,
            blocks_shared: 0,
            memory: Vec::new(),
            freed_before: if config.record { engine.memory().freed } else { 0 },
        };
        match run.expand(engine, config, task) {
            Ok(()) => Ok(run),
            Err(error) => {
                run.abandon(engine);
                Err(error)
            }
        }
    }

    fn expand(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        let options = PrefillOptions {
            use_prefix_cache: config.sharing == Sharing::Exact,
            path: self.task_idx as u64,
            ..Default::default()
        };
        let params = generate_params(config, task, config.max_new_tokens);
        self.prompts.expand(engine, config, task, options)?;
        for idx in 0..config.num_branches {
            let wording = idx % num_wordings(config, task);
            let (text, suffix) = (task.wording(wording)?, task.branch(idx)?);
            let id = match self.prompts.root(wording) {
                Some(root) => {
                    let mut child = [BranchId::default()];
                    engine.fork(root, &mut child)?;
                    child[0]
                }
                None => {
                    let path = (self.task_idx as u64) << 16 | idx as u64;
                    engine.prefill(text, PrefillOptions { path, ..options })?
                }
            };
            self.branches.push(Candidate { wording, ..Candidate::new(id, text.len() + suffix.len(), task) });
            engine.append(id, suffix)?;
            if let Some(kv) = &config.kv {
                engine.limit_kv(id, kv.for_prompt(text.len() + suffix.len(), engine.config().block_size))?;
            }
            engine.start(id, params.clone())?;
            engine.exit_prompt(id)?;
        }
        Ok(())
    }

    pub(super) fn task_idx(&self) -> usize {
        self.task_idx
    }

    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        let candidates = self.branches.iter().map(|c| c.id);
        let trials = self.trials.iter().flat_map(Trials::branch_ids);
        candidates.chain(self.prompts.branch_ids()).chain(self.verdicts.branch_ids()).chain(trials)
    }

    /// True for a branch that goes on where another ended.
    pub(super) fn is_grown(&self, branch: BranchId) -> bool {
        self.branches.iter().any(|c| c.id == branch && c.earlier.1 > 0)
    }

    /// Books a step's tokens and its time to a phase.
    pub(super) fn count(&mut self, item: &StepItem, seconds: f64) {
        let is_probed = self.phase == Phase::Decode && item.left_early;
        let is_trial = self.trials.as_mut().is_some_and(|t| t.count(item));
        let (tokens, ms) = match (self.phase, item.is_decode || is_trial) {
            (Phase::Verify, _) => (&mut self.tokens.verify, &mut self.ms.verify),
            (_, true) => (&mut self.tokens.decode, &mut self.ms.decode),
            (_, false) if is_probed => (&mut self.tokens.probed, &mut self.ms.prefill),
            (_, false) => (&mut self.tokens.prefill, &mut self.ms.prefill),
        };
        *tokens += item.num_tokens as u64;
        *ms += seconds * 1e3;
    }

    /// Writes down where the KV blocks are.
    pub(super) fn sample_memory(&mut self, engine: &Engine) {
        let now = engine.memory();
        self.memory.push(MemorySample {
            step: self.memory.len(),
            shared: now.shared,
            private: now.private,
            cached: now.cached,
            freed: now.freed - self.freed_before,
        });
    }

    /// Books what was asked of a verifier before the branches had ended.
    pub(super) fn count_verify(&mut self, item: &StepItem, seconds: f64) {
        self.tokens.verify += item.num_tokens as u64;
        self.ms.verify += seconds * 1e3;
    }

    pub(super) fn on_token(&mut self, branch: BranchId, token: &GeneratedToken) {
        if let Some(c) = self.branches.iter_mut().find(|c| c.id == branch) {
            c.on_token(token);
        } else if let Some(trials) = &mut self.trials {
            trials.on_token(branch, token);
        }
    }

    pub(super) fn on_ended(&mut self, engine: &Engine, branch: BranchId, reason: EndReason) -> Result<()> {
        if let Some(c) = self.branches.iter_mut().find(|c| c.id == branch) {
            c.ended.get_or_insert(reason); // a stop string's reason stands
            return Ok(());
        }
        if let Some(trials) = &mut self.trials {
            trials.on_ended(engine, branch, reason)?;
        }
        self.verdicts.take(engine, branch, &mut self.branches)
    }

    pub(super) fn on_ready(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        self.verdicts.take(engine, branch, &mut self.branches)
    }

    /// Between two steps: exits, and the way into the next phase.
    pub(super) fn advance(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        if self.phase == Phase::Decode {
            self.settle_ended(engine, task)?;
            self.advance_trials(engine, config, task)?;
            if let Some(merging) = &mut self.merging {
                merging.advance(engine, task, &mut self.branches)?;
            }
            self.early_exit(engine, config)?;
            if self.branches.iter().all(|c| c.ended.is_some()) {
                self.settle_ended(engine, task)?;
                self.end_decode(engine, config, task)?;
            }
        }
        if self.phase == Phase::Verify && self.verdicts.are_there() {
            self.phase = Phase::Done;
        }
        Ok(())
    }

    /// Reads the solutions of branches that ended, and ends those that ran into a stop string.
    fn settle_ended(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<()> {
        self.branches.iter_mut().try_for_each(|c| c.settle(engine, task))
    }

    fn advance_trials(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        if config.decode_exit != DecodeExit::Trial {
            return Ok(());
        }
        if self.trials.is_none() {
            self.trials = Some(Trials::new(config, task, self.branches.len())?);
        }
        self.trials.as_mut().map_or(Ok(()), |t| t.advance(engine, config, task, &mut self.branches))
    }

    fn early_exit(&mut self, engine: &mut Engine, config: &SolverConfig) -> Result<()> {
        let open: Vec<usize> = (0..self.branches.len()).filter(|&i| self.branches[i].ended.is_none()).collect();
        let Some(step) = self.branches.iter().map(|c| c.steps).max().and_then(|s| s.checked_sub(1)) else {
            return Ok(());
        };
        let standing: Vec<usize> =
            (0..self.branches.len()).filter(|&i| self.branches[i].merged_into.is_none()).collect();
        let means: Vec<f64> = standing.iter().map(|&i| self.branches[i].confidence).collect();
        let stops: Vec<usize> = match config.decode_exit {
            DecodeExit::Off => Vec::new(),
            DecodeExit::StopAll if config.exit_rule.fires(step, &means) => open,
            DecodeExit::StopAll => Vec::new(),
            DecodeExit::PerBranch => {
                let trailing = config.exit_rule.trailing(step, &means);
                let trails = |i: usize| standing.iter().zip(&trailing).any(|(&s, &trails)| s == i && trails);
                open.into_iter().filter(|&i| trails(i)).collect()
            }
            DecodeExit::Decided | DecodeExit::Trial => {
                let ended: Vec<Ballot> =
                    self.branches.iter().filter(|c| c.ended.is_some()).map(Candidate::ballot).collect();
                let most = open.iter().map(|&i| self.branches[i].votes).fold(0.0, f64::max);
                if is_decided(&tally(config.select, &ended), open.len(), most) { open } else { Vec::new() }
            }
        };
        for i in stops {
            engine.stop(self.branches[i].id)?;
            self.branches[i].ended = Some(EndReason::Stopped);
        }
        Ok(())
    }

    /// Every branch has ended: skip verification, or put the verifiers into the engine.
    fn end_decode(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        if let Some(trials) = &mut self.trials {
            trials.clear(engine)?;
        }
        self.blocks_shared = engine.num_shared_blocks();
        for c in self.branches.iter_mut().filter(|c| c.merged_into.is_none()) {
            c.take_memory(engine)?;
        }
        let standing = || self.branches.iter().filter(|c| c.merged_into.is_none());
        let confidences: Vec<f64> = standing().map(|c| c.confidence).collect();
        // As often as there are branches that it stands for.
        let votes = |c: &Candidate| std::iter::repeat_n(c.answer.clone(), c.votes as usize);
        let answers: Vec<Option<String>> = standing().flat_map(votes).collect();
        self.phase = Phase::Done;
        if config.verify == VerifyMode::Off {
            return Ok(());
        }
        if config.skip.skips(&confidences, &answers) {
            self.verdicts.skip();
            return Ok(());
        }
        self.phase = Phase::Verify;
        self.verdicts.ask(engine, config, task, &self.branches)
    }

    /// Selects the answer, clears the engine of the problem, and writes the record.
    pub(super) fn finish(
        mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
    ) -> Result<ProblemResult> {
        let ballots: Vec<Ballot> = self.branches.iter().map(Candidate::ballot).collect();
        let winner = select(config.select, &ballots).unwrap_or(0); // nobody is left when a search pruned all
        let answer = ballots.get(winner).and_then(|b| b.answer.clone());
        let blocks_peak = engine.engine_stats().blocks_peak;
        let branches = std::mem::take(&mut self.branches);
        for id in branches.iter().filter(|c| c.merged_into.is_none()).map(|c| c.id) {
            engine.prune(id)?;
        }
        let latency_ms = self.started.elapsed().as_secs_f64() * 1e3;
        let result = ProblemResult {
            id: task.id().to_string(),
            correct: task.expected().map(|e| answer.as_deref().is_some_and(|a| same_answer(a, e))),
            expected: task.expected().map(str::to_string),
            winner,
            answer,
            latency_ms,
            phase_ms: self.ms,
            tokens: self.tokens,
            verify: self.verdicts.outcome().clone(),
            blocks_peak,
            blocks_shared: self.blocks_shared,
            trials: self.trials.as_ref().map(Trials::counts).unwrap_or_default(),
            branches: branches.into_iter().enumerate().map(|(i, c)| c.into_result(i)).collect(),
            similarity: self.prompts.take_record(),
            tree: Vec::new(),
            memory: std::mem::take(&mut self.memory),
        };
        self.abandon(engine);
        Ok(result)
    }

    /// Takes everything of this problem out of the engine; branches that are already gone are no matter.
    pub(super) fn abandon(self, engine: &mut Engine) {
        let ids: Vec<BranchId> = self.branch_ids().collect();
        for id in ids {
            let _ = engine.prune(id);
        }
    }
}

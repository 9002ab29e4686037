//! One problem on its way through its phases.
//!
//! ```text
//! start: root + forks --(all branches ended)--> verify (or skip) --(all verdicts there)--> finish: select
//! ```
//!
//! The run reacts to what the engine reports about its branches; it decides between steps and never inside one.

use std::time::Instant;

use super::config::{Sharing, SolverConfig, VerifyMode};
use super::select::{Ballot, select, tally};
use super::task::Task;
use super::trial::Trials;
use crate::engine::{BranchId, EndReason, Engine, GenerateParams, PrefillOptions, RowAnswer, StepItem};
use crate::error::Result;
use crate::gate::step::{DecodeExit, is_decided};
use crate::prompts::same_answer;
use crate::report::{BranchResult, PhaseMs, ProblemResult, TokenCounts, VerifyOutcome};
use crate::tokenizer::StopScanner;

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
    root: Option<BranchId>,
    pub(super) branches: Vec<Candidate>,
    /// Branches that exist for verification alone: (branch, index of the candidate it judges).
    verifiers: Vec<(BranchId, Option<usize>)>,
    started: Instant,
    tokens: TokenCounts,
    ms: PhaseMs,
    verify: VerifyOutcome,
    /// With [`DecodeExit::Trial`].
    trials: Option<Trials>,
    blocks_shared: usize,
}

/// A branch that may become the answer.
pub(super) struct Candidate {
    pub(super) id: BranchId,
    pub(super) prompt_len: usize,
    steps: usize,
    /// What the nodes it grew from had of confidence: the sum, and of how many steps.
    earlier: (f64, usize),
    pub(super) ended: Option<EndReason>,
    pub(super) generated: Vec<u32>,
    pub(super) text: String,
    pub(super) answer: Option<String>,
    pub(super) confidence: f64,
    score: Option<f64>,
    pub(super) votes: f64,
    blocks: (usize, usize),
    /// Where a stop string may end it.
    pub(super) stops: Option<StopScanner>,
}

impl Run {
    /// Puts the problem's branches into the engine. On error nothing stays there.
    pub(super) fn start(engine: &mut Engine, config: &SolverConfig, task_idx: usize, task: &dyn Task) -> Result<Self> {
        let mut run = Self {
            task_idx,
            phase: Phase::Decode,
            root: None,
            branches: Vec::new(),
            verifiers: Vec::new(),
            started: Instant::now(),
            tokens: TokenCounts::default(),
            ms: PhaseMs::default(),
            verify: VerifyOutcome::default(),
            trials: None,
            blocks_shared: 0,
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
        if config.sharing == Sharing::Exact {
            self.root = Some(engine.prefill(task.root(), options)?);
        }
        for idx in 0..config.num_branches {
            let suffix = task.branch(idx)?;
            let id = match self.root {
                Some(root) => {
                    let mut child = [BranchId::default()];
                    engine.fork(root, &mut child)?;
                    child[0]
                }
                None => {
                    let path = (self.task_idx as u64) << 16 | idx as u64;
                    engine.prefill(task.root(), PrefillOptions { path, ..options })?
                }
            };
            self.branches.push(Candidate::new(id, task.root().len() + suffix.len(), task));
            engine.append(id, suffix)?;
            engine.start(id, params.clone())?;
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
        candidates.chain(self.root).chain(self.verifiers.iter().map(|v| v.0)).chain(trials)
    }

    /// True for a branch that goes on where another ended.
    pub(super) fn is_grown(&self, branch: BranchId) -> bool {
        self.branches.iter().any(|c| c.id == branch && c.earlier.1 > 0)
    }

    /// Books a step's tokens and its time to a phase.
    pub(super) fn count(&mut self, item: &StepItem, seconds: f64) {
        let is_trial = self.trials.as_mut().is_some_and(|t| t.count(item));
        let (tokens, ms) = match (self.phase, item.is_decode || is_trial) {
            (Phase::Verify, _) => (&mut self.tokens.verify, &mut self.ms.verify),
            (_, true) => (&mut self.tokens.decode, &mut self.ms.decode),
            (_, false) => (&mut self.tokens.prefill, &mut self.ms.prefill),
        };
        *tokens += item.num_tokens as u64;
        *ms += seconds * 1e3;
    }

    /// Books what was asked of a verifier before the branches had ended.
    pub(super) fn count_verify(&mut self, item: &StepItem, seconds: f64) {
        self.tokens.verify += item.num_tokens as u64;
        self.ms.verify += seconds * 1e3;
    }

    pub(super) fn on_token(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        if let Some(c) = self.branches.iter_mut().find(|c| c.id == branch) {
            return c.on_token(engine);
        }
        self.trials.as_mut().map_or(Ok(()), |t| t.on_token(engine, branch))
    }

    pub(super) fn on_ended(&mut self, engine: &Engine, branch: BranchId, reason: EndReason) -> Result<()> {
        if let Some(c) = self.branches.iter_mut().find(|c| c.id == branch) {
            c.ended.get_or_insert(reason); // a stop string's reason stands
            return Ok(());
        }
        if let Some(trials) = &mut self.trials {
            trials.on_ended(engine, branch, reason)?;
        }
        self.on_verdict(engine, branch)
    }

    pub(super) fn on_ready(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        self.on_verdict(engine, branch)
    }

    /// A verifier's last row is there: its yes against its no. A verifier whose logits were not finite gives no score.
    fn on_verdict(&mut self, engine: &Engine, branch: BranchId) -> Result<()> {
        let Some(&(_, Some(idx))) = self.verifiers.iter().find(|v| v.0 == branch) else { return Ok(()) };
        let Some(row) = engine.row(branch)? else { return Ok(()) };
        if let Some(score) = yes_share(row, self.verify.num_yes_spellings) {
            self.branches[idx].score = Some(score);
        }
        self.verify.open -= 1;
        Ok(())
    }

    /// Between two steps: exits, and the way into the next phase.
    pub(super) fn advance(&mut self, engine: &mut Engine, config: &SolverConfig, task: &dyn Task) -> Result<()> {
        if self.phase == Phase::Decode {
            self.settle_ended(engine, task)?;
            self.advance_trials(engine, config, task)?;
            self.early_exit(engine, config)?;
            if self.branches.iter().all(|c| c.ended.is_some()) {
                self.settle_ended(engine, task)?;
                self.end_decode(engine, config, task)?;
            }
        }
        if self.phase == Phase::Verify && self.verify.open == 0 {
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
        let means: Vec<f64> = self.branches.iter().map(|c| c.confidence).collect();
        let stops: Vec<usize> = match config.decode_exit {
            DecodeExit::Off => Vec::new(),
            DecodeExit::StopAll if config.exit_rule.fires(step, &means) => open,
            DecodeExit::StopAll => Vec::new(),
            DecodeExit::PerBranch => {
                let trailing = config.exit_rule.trailing(step, &means);
                open.into_iter().filter(|&i| trailing[i]).collect()
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
        for c in &mut self.branches {
            let stats = engine.stats(c.id)?;
            c.blocks = (stats.blocks_shared, stats.blocks_private);
        }
        let confidences: Vec<f64> = self.branches.iter().map(|c| c.confidence).collect();
        let answers: Vec<Option<String>> = self.branches.iter().map(|c| c.answer.clone()).collect();
        self.verify.skipped = config.verify != VerifyMode::Off && config.skip.skips(&confidences, &answers);
        self.phase = Phase::Done;
        if config.verify == VerifyMode::Off || self.verify.skipped {
            return Ok(());
        }
        self.phase = Phase::Verify;
        let (yes, no) = task.verdict_tokens();
        self.verify.num_yes_spellings = yes.len();
        let watched = [yes, no].concat();
        match config.verify {
            VerifyMode::Off => {}
            VerifyMode::Suffix => self.verify_on_forks(engine, task, &watched)?,
            VerifyMode::Fresh => self.verify_fresh(engine, task, &watched, false)?,
            VerifyMode::FreshShared => self.verify_fresh(engine, task, &watched, true)?,
        }
        self.verify.run = self.verifiers.iter().filter(|v| v.1.is_some()).count();
        self.verify.open = self.verify.run;
        Ok(())
    }

    /// Branches with a broken last row cannot be asked.
    fn can_verify(c: &Candidate) -> bool {
        !matches!(c.ended, Some(EndReason::NonFinite | EndReason::Dropped))
    }

    fn verify_on_forks(&mut self, engine: &mut Engine, task: &dyn Task, watched: &[u32]) -> Result<()> {
        for (idx, c) in self.branches.iter().enumerate().filter(|(_, c)| Self::can_verify(c)) {
            let mut fork = [BranchId::default()];
            engine.fork(c.id, &mut fork)?;
            self.verifiers.push((fork[0], Some(idx)));
            engine.append(fork[0], task.verify_suffix())?;
            engine.watch(fork[0], watched, 0)?;
        }
        Ok(())
    }

    /// Prompts of their own; with `share`, their common beginning is a root that all fork from.
    fn verify_fresh(&mut self, engine: &mut Engine, task: &dyn Task, watched: &[u32], share: bool) -> Result<()> {
        let options = PrefillOptions { use_prefix_cache: share, ..Default::default() };
        let mut prompts = Vec::new();
        for (idx, c) in self.branches.iter().enumerate().filter(|(_, c)| Self::can_verify(c)) {
            prompts.push((idx, task.verify_fresh(&c.generated)?));
        }
        let common = if share { common_prefix(&prompts) } else { 0 };
        let root = if common > 0 {
            let root = engine.prefill(&prompts[0].1[..common], options)?;
            self.verifiers.push((root, None));
            Some(root)
        } else {
            None
        };
        for (idx, prompt) in prompts {
            let id = match root {
                Some(root) => {
                    let mut fork = [BranchId::default()];
                    engine.fork(root, &mut fork)?;
                    self.verifiers.push((fork[0], Some(idx)));
                    engine.append(fork[0], &prompt[common..])?;
                    fork[0]
                }
                None => {
                    let id = engine.prefill(&prompt, options)?;
                    self.verifiers.push((id, Some(idx)));
                    id
                }
            };
            engine.watch(id, watched, 0)?;
        }
        Ok(())
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
        for id in branches.iter().map(|c| c.id) {
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
            verify: self.verify.clone(),
            blocks_peak,
            blocks_shared: self.blocks_shared,
            trials: self.trials.as_ref().map(Trials::counts).unwrap_or_default(),
            branches: branches.into_iter().enumerate().map(|(i, c)| c.into_result(i)).collect(),
            similarity: None,
            tree: Vec::new(),
            memory: Vec::new(),
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

impl Candidate {
    pub(super) fn new(id: BranchId, prompt_len: usize, task: &dyn Task) -> Self {
        Self {
            id,
            prompt_len,
            steps: 0,
            earlier: (0.0, 0),
            ended: None,
            generated: Vec::new(),
            text: String::new(),
            answer: None,
            confidence: 0.0,
            score: None,
            votes: 1.0,
            blocks: (0, 0),
            stops: task.stop_scanner(),
        }
    }

    /// A branch that goes on where `parent` has ended.
    pub(super) fn grown_from(parent: &Self, id: BranchId, task: &dyn Task) -> Self {
        let steps = parent.num_steps();
        Self {
            earlier: (parent.confidence * steps as f64, steps),
            confidence: parent.confidence,
            votes: parent.votes,
            ..Self::new(id, parent.prompt_len, task)
        }
    }

    /// Steps generated from the problem on.
    pub(super) fn num_steps(&self) -> usize {
        self.earlier.1 + self.steps
    }

    /// The mean top-1 probability of the steps it generated itself.
    pub(super) fn own_confidence(&self) -> f64 {
        match (self.earlier, self.steps) {
            ((_, 0), _) => self.confidence,
            (_, 0) => 0.0,
            ((sum, _), steps) => (self.confidence * self.num_steps() as f64 - sum) / steps as f64,
        }
    }

    /// It takes over what a fork of it said: `steps` from the problem on, with this mean confidence.
    pub(super) fn take_over(&mut self, id: BranchId, confidence: f64, steps: usize) {
        self.id = id;
        self.stops = None;
        self.ended = Some(EndReason::Stopped);
        self.confidence = confidence;
        self.steps = steps.saturating_sub(self.earlier.1);
    }

    pub(super) fn on_token(&mut self, engine: &Engine) -> Result<()> {
        self.steps += 1;
        self.confidence = engine.confidence(self.id)?;
        if self.earlier.1 > 0 {
            let own = self.confidence * self.steps as f64;
            self.confidence = (self.earlier.0 + own) / self.num_steps() as f64;
        }
        Ok(())
    }

    /// Ends it where it ran into a stop string, and reads its solution once it has ended.
    pub(super) fn settle(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<()> {
        let generated = &engine.tokens(self.id)?[self.prompt_len..];
        let stop = self.stops.as_mut().map(|s| s.scan(generated)).transpose()?.flatten();
        if let Some(keep) = stop {
            let keep = keep.max(1);
            self.stops = None; // the first one settles it
            if self.ended.is_none() {
                engine.stop(self.id)?;
            }
            self.ended = Some(EndReason::EndToken);
            engine.truncate(self.id, self.prompt_len + keep)?;
        }
        if self.ended.is_some() && self.generated.is_empty() { self.read(engine, task) } else { Ok(()) }
    }

    /// Reads its solution.
    pub(super) fn read(&mut self, engine: &Engine, task: &dyn Task) -> Result<()> {
        self.generated = engine.tokens(self.id)?[self.prompt_len..].to_vec();
        self.text = task.text(&self.generated)?;
        self.answer = task.answer(&self.text);
        Ok(())
    }

    fn ballot(&self) -> Ballot {
        Ballot { answer: self.answer.clone(), confidence: self.confidence, score: self.score, votes: self.votes }
    }

    fn into_result(self, idx: usize) -> BranchResult {
        BranchResult {
            branch: idx,
            tokens: self.generated,
            text: self.text,
            answer: self.answer,
            score: self.score,
            confidence: self.confidence,
            ended: self.ended,
            votes: self.votes,
            exit_layer: None,
            layers: Vec::new(),
            wording: 0,
            blocks_shared: self.blocks.0,
            blocks_private: self.blocks.1,
        }
    }
}

/// How a problem's branches generate.
pub(super) fn generate_params(config: &SolverConfig, task: &dyn Task, max_new_tokens: usize) -> GenerateParams {
    GenerateParams {
        sampling: config.sampling.clone(),
        max_new_tokens,
        min_new_tokens: 0,
        end_tokens: if config.forced_length { Vec::new() } else { task.end_tokens().to_vec() },
    }
}

/// A verifier's yes against its no, of which the first `num_yes` watched tokens are spellings of yes. `None` when its
/// logits were not finite.
pub(super) fn yes_share(row: &RowAnswer, num_yes: usize) -> Option<f64> {
    let (yes, no) = row.watched.split_at_checked(num_yes).filter(|_| !row.watched.is_empty())?;
    let mass = |xs: &[f32]| xs.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
    let (yes, no) = (mass(yes), mass(no));
    Some(if yes + no > 0.0 { yes / (yes + no) } else { 0.0 })
}

/// Tokens with which every prompt begins, leaving each at least one of its own.
fn common_prefix(prompts: &[(usize, Vec<u32>)]) -> usize {
    let Some(((_, first), rest)) = prompts.split_first() else { return 0 };
    let same = |n: usize| rest.iter().all(|(_, p)| p.get(n) == first.get(n));
    let shortest = prompts.iter().map(|(_, p)| p.len()).min().unwrap_or(0);
    (0..shortest.saturating_sub(1)).take_while(|&n| same(n)).count()
}

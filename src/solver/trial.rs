//! Trial answers: at each step delimiter a fork of the branch is asked for the answer; when it is sure, the branch
//! stops and the fork takes its place. The branch decodes on meanwhile, and what it said behind the delimiter is then
//! dropped.

use super::candidate::Candidate;
use super::config::SolverConfig;
use super::steps::StepWatch;
use super::task::Task;
use crate::engine::{BranchId, EndReason, Engine, GenerateParams, GeneratedToken, StepItem};
use crate::error::Result;
use crate::report::TrialCounts;
use crate::sampler::SamplingParams;

/// The trials of one problem.
#[derive(Default)]
pub(super) struct Trials {
    open: Vec<Trial>,
    /// Of each candidate.
    watches: Vec<StepWatch>,
    counts: TrialCounts,
}

struct Trial {
    id: BranchId,
    candidate: usize,
    /// Of the branch.
    prompt_len: usize,
    /// Tokens before its answer: the branch's up to the delimiter, then the question.
    answer_from: usize,
    /// Sum of the branch's top-1 probabilities up to the delimiter, and their number.
    confidence: (f64, usize),
    /// Of each token it generated, the one that ended it included.
    top1: Vec<f64>,
    /// Where its answer ends, once that is known; `None` in it: it never came to an end.
    end: Option<Option<usize>>,
    watch: StepWatch,
}

impl Trials {
    /// Watches `num_candidates` branches from their beginning.
    pub(super) fn new(config: &SolverConfig, task: &dyn Task, num_candidates: usize) -> Result<Self> {
        let watch = StepWatch::new(config, task, 0)?;
        Ok(Self { watches: vec![watch; num_candidates], ..Self::default() })
    }

    pub(super) fn counts(&self) -> TrialCounts {
        self.counts
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        self.open.iter().map(|t| t.id)
    }

    /// Books a step's tokens, if they are a trial's.
    pub(super) fn count(&mut self, item: &StepItem) -> bool {
        let is_trial = self.open.iter().any(|t| t.id == item.branch);
        if is_trial {
            self.counts.tokens += item.num_tokens as u64;
        }
        is_trial
    }

    pub(super) fn on_token(&mut self, branch: BranchId, token: &GeneratedToken) {
        if let Some(t) = self.open.iter_mut().find(|t| t.id == branch) {
            t.top1.push(f64::from(token.stats.top1));
        }
    }

    pub(super) fn on_ended(&mut self, engine: &Engine, branch: BranchId, reason: EndReason) -> Result<()> {
        if let Some(t) = self.open.iter_mut().find(|t| t.id == branch) {
            let ended_itself = reason == EndReason::EndToken;
            let end = if ended_itself { Some(engine.tokens(branch)?.len()) } else { None };
            t.end.get_or_insert(end);
        }
        Ok(())
    }

    /// Between two steps: lets the sure ones take their branch's place, drops the others that ended and those whose
    /// branch did, and starts new ones.
    pub(super) fn advance(
        &mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        candidates: &mut [Candidate],
    ) -> Result<()> {
        let mut idx = 0;
        while idx < self.open.len() {
            self.open[idx].find_end(engine)?;
            let t = &self.open[idx];
            let c = &mut candidates[t.candidate];
            if c.ended.is_none() && t.end.is_none() {
                idx += 1;
                continue;
            }
            if c.ended.is_none() && t.take_place(engine, config, task, c)? {
                self.counts.stood += 1;
            } else {
                engine.uncache(t.id)?;
                engine.prune(t.id)?;
            }
            self.open.remove(idx);
        }
        for (idx, c) in candidates.iter().enumerate().filter(|(_, c)| c.ended.is_none()) {
            self.ask(engine, config, task, idx, c)?;
        }
        Ok(())
    }

    /// Drops those that are still open.
    pub(super) fn clear(&mut self, engine: &mut Engine) -> Result<()> {
        while let Some(t) = self.open.last() {
            engine.uncache(t.id)?;
            engine.prune(t.id)?;
            self.open.pop();
        }
        Ok(())
    }

    /// Starts a trial where the branch has just completed a step.
    fn ask(
        &mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        idx: usize,
        c: &Candidate,
    ) -> Result<()> {
        let tokens = engine.tokens(c.id)?.len();
        let mut step = None;
        while let Some(end) = self.watches[idx].next_end(&engine.tokens(c.id)?[c.prompt_len..])? {
            step = Some(end);
        }
        let Some(step) = step else { return Ok(()) };
        let question = task.trial().unwrap_or_default();
        let answer_from = tokens + question.len();
        let most = answer_from + config.trial_rule.max_tokens;
        let fits = most - c.prompt_len <= config.max_new_tokens && most <= engine.model().max_position_embeddings;
        if c.prompt_len + step.after != tokens || !fits {
            return Ok(());
        }
        let mut fork = [BranchId::default()];
        engine.fork(c.id, &mut fork)?;
        let watch = StepWatch::new(config, task, answer_from - c.prompt_len)?;
        let confidence = (c.confidence * c.num_steps() as f64, c.num_steps());
        self.open.push(Trial {
            id: fork[0],
            candidate: idx,
            prompt_len: c.prompt_len,
            answer_from,
            confidence,
            top1: Vec::new(),
            end: None,
            watch,
        });
        self.counts.run += 1;
        engine.append(fork[0], question)?;
        let params = GenerateParams {
            sampling: SamplingParams::default(),
            max_new_tokens: config.trial_rule.max_tokens,
            min_new_tokens: 0,
            end_tokens: task.end_tokens().to_vec(),
        };
        engine.start(fork[0], params)
    }
}

impl Trial {
    /// A step delimiter ends an answer as an end token does.
    fn find_end(&mut self, engine: &mut Engine) -> Result<()> {
        let prompt_len = self.prompt_len;
        if self.end.is_some_and(|end| end.is_some()) {
            return Ok(());
        }
        if let Some(step) = self.watch.next_end(&engine.tokens(self.id)?[prompt_len..])? {
            engine.stop(self.id)?;
            self.end = Some(Some(prompt_len + step.before));
        }
        Ok(())
    }

    /// Puts the fork in the branch's place, if its answer stands.
    fn take_place(
        &self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        c: &mut Candidate,
    ) -> Result<bool> {
        let Some(Some(end)) = self.end else { return Ok(false) };
        let top1 = &self.top1[..end.saturating_sub(self.answer_from).min(self.top1.len())];
        let question = task.trial().unwrap_or_default();
        let tokens = engine.tokens(self.id)?;
        let answer = task.answer(&task.text(&tokens[self.answer_from - question.len()..end])?);
        if answer.is_none() || !config.trial_rule.stands(top1.iter().map(|p| p.ln()).sum(), top1.len()) {
            return Ok(false);
        }
        engine.truncate(self.id, end)?;
        engine.prune(c.id)?;
        let (sum, steps) = (self.confidence.0 + top1.iter().sum::<f64>(), self.confidence.1 + top1.len());
        c.take_over(self.id, sum / steps.max(1) as f64, steps);
        c.read(engine, task)?;
        c.answer = answer;
        Ok(true)
    }
}

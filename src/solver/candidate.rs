//! A branch on its way to being the answer: what it has said, how sure it was, why it ended.

use super::config::SolverConfig;
use super::select::Ballot;
use super::task::Task;
use crate::engine::{BranchId, EndReason, Engine, GenerateParams, GeneratedToken};
use crate::error::Result;
use crate::report::{BranchResult, LayerEntropy};
use crate::tokenizer::StopScanner;

/// A branch that may become the answer.
pub(super) struct Candidate {
    pub(super) id: BranchId,
    pub(super) prompt_len: usize,
    pub(super) steps: usize,
    /// The sum of the top-1 probabilities up to each.
    pub(super) sums: Vec<f64>,
    /// What the nodes it grew from had of confidence: the sum, and of how many steps.
    pub(super) earlier: (f64, usize),
    pub(super) ended: Option<EndReason>,
    pub(super) generated: Vec<u32>,
    pub(super) text: String,
    pub(super) answer: Option<String>,
    pub(super) confidence: f64,
    pub(super) score: Option<f64>,
    pub(super) votes: f64,
    pub(super) blocks: (usize, usize),
    /// Its KV when it ended.
    pub(super) kv: KvHeld,
    /// The wording of the problem it was asked in.
    pub(super) wording: usize,
    /// What the probed layers of its verification said.
    pub(super) layers: Vec<LayerEntropy>,
    /// Where its verification left its pass early.
    pub(super) exit_layer: Option<u32>,
    /// It is gone, and this branch has its votes.
    pub(super) merged_into: Option<usize>,
    /// Where a stop string may end it.
    pub(super) stops: Option<StopScanner>,
}

/// A branch's KV under a budget.
#[derive(Clone, Copy, Default)]
pub(super) struct KvHeld {
    /// Slots it held.
    slots: usize,
    /// Slots it would have held without.
    full: usize,
    cuts: u32,
    /// Tokens it had generated then.
    first_cut: Option<usize>,
}

impl Candidate {
    pub(super) fn new(id: BranchId, prompt_len: usize, task: &dyn Task) -> Self {
        Self {
            id,
            prompt_len,
            steps: 0,
            sums: Vec::new(),
            earlier: (0.0, 0),
            ended: None,
            generated: Vec::new(),
            text: String::new(),
            answer: None,
            confidence: 0.0,
            score: None,
            votes: 1.0,
            blocks: (0, 0),
            kv: KvHeld::default(),
            wording: 0,
            layers: Vec::new(),
            exit_layer: None,
            merged_into: None,
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
            wording: parent.wording,
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

    pub(super) fn on_token(&mut self, token: &GeneratedToken) {
        let sum = self.sums.last().copied().unwrap_or(0.0) + f64::from(token.stats.top1);
        self.sums.push(sum);
        self.count_steps(self.sums.len());
    }

    /// It has generated `steps` tokens.
    fn count_steps(&mut self, steps: usize) {
        self.steps = steps;
        let sum = steps.checked_sub(1).and_then(|last| self.sums.get(last)).copied().unwrap_or(0.0);
        self.confidence = (self.earlier.0 + sum) / self.num_steps().max(1) as f64;
    }

    /// Ends it where it ran into a stop string, and reads its solution once it has ended.
    pub(super) fn settle(&mut self, engine: &mut Engine, task: &dyn Task) -> Result<()> {
        if self.merged_into.is_some() {
            return Ok(());
        }
        let generated = &engine.tokens(self.id)?[self.prompt_len..];
        let stop = self.stops.as_mut().map(|s| s.scan(generated)).transpose()?.flatten();
        if let Some(keep) = stop {
            // What came behind it in the same step was never said.
            self.count_steps(self.steps.min(keep + 1));
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

    /// Notes where its KV is.
    pub(super) fn take_memory(&mut self, engine: &Engine) -> Result<()> {
        let stats = engine.stats(self.id)?;
        self.blocks = (stats.blocks_shared, stats.blocks_private);
        self.kv = KvHeld {
            slots: stats.num_slots,
            full: stats.num_computed_tokens,
            cuts: stats.kv_cuts,
            first_cut: stats.first_kv_cut.map(|n| n.saturating_sub(self.prompt_len)),
        };
        Ok(())
    }

    /// Reads its solution.
    pub(super) fn read(&mut self, engine: &Engine, task: &dyn Task) -> Result<()> {
        self.generated = engine.tokens(self.id)?[self.prompt_len..].to_vec();
        self.text = task.text(&self.generated)?;
        self.answer = task.answer(&self.text);
        Ok(())
    }

    pub(super) fn ballot(&self) -> Ballot {
        Ballot { answer: self.answer.clone(), confidence: self.confidence, score: self.score, votes: self.votes }
    }

    pub(super) fn into_result(self, idx: usize) -> BranchResult {
        BranchResult {
            branch: idx,
            tokens: self.generated,
            text: self.text,
            answer: self.answer,
            score: self.score,
            confidence: self.confidence,
            ended: self.ended,
            votes: self.votes,
            exit_layer: self.exit_layer,
            layers: self.layers,
            wording: self.wording,
            merged_into: self.merged_into,
            blocks_shared: self.blocks.0,
            blocks_private: self.blocks.1,
            kv_slots: self.kv.slots,
            kv_full: self.kv.full,
            kv_cuts: self.kv.cuts,
            first_kv_cut: self.kv.first_cut,
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

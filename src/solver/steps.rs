//! Where a branch's steps end.

use super::config::SolverConfig;
use super::task::Task;
use crate::error::{Error, Result};
use crate::tokenizer::StopScanner;

/// Watches a branch for step delimiters, one after the other.
#[derive(Clone, Debug)]
pub(super) struct StepWatch {
    fresh: StopScanner,
    scanner: StopScanner,
    /// Generated tokens that belong to finished steps.
    from: usize,
}

impl StepWatch {
    /// Watches what is generated behind the first `from` tokens.
    pub(super) fn new(config: &SolverConfig, task: &dyn Task, from: usize) -> Result<Self> {
        config.validate_task(task)?;
        let scanner = task.step_scanner(config.step_delimiter.as_deref());
        let fresh = scanner.ok_or_else(|| Error::Internal("steps are watched without a delimiter".into()))?;
        Ok(Self { scanner: fresh.clone(), fresh, from })
    }

    /// `generated` are all of the branch's tokens so far. Returns where the next step ends, its delimiter included, and
    /// how many tokens come before the one that completes the delimiter; each step once.
    pub(super) fn next_end(&mut self, generated: &[u32]) -> Result<Option<StepEnd>> {
        let own = generated.get(self.from..).unwrap_or_default();
        let Some(before) = self.scanner.scan(own)? else { return Ok(None) };
        let end = StepEnd { before: self.from + before, after: self.from + before + 1 };
        self.scanner = self.fresh.clone();
        self.from = end.after;
        Ok(Some(end))
    }
}

/// The token that completes a step's delimiter: `generated[before..after]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepEnd {
    pub(super) before: usize,
    pub(super) after: usize,
}

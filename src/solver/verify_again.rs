//! Verification by itself, of branches that have been decoded before: what another way of verifying them would say,
//! without decoding them again.

use super::candidate::Candidate;
use super::config::SolverConfig;
use super::task::Task;
use super::verdicts::Verdicts;
use crate::engine::{BranchId, Engine, EventKind, PrefillOptions};
use crate::error::{Error, Result};
use crate::report::ProblemResult;

/// `result` as it would have been had its branches been verified as `config` says: their scores and exit layers. On the
/// CPU exactly so, since there a row's bits depend on its own tokens alone. The answer is not selected anew, and times,
/// tokens and blocks stay what they were. The branches must have been asked in the problem's first wording, and the
/// engine must have nothing else to do.
pub fn verify_again(
    engine: &mut Engine,
    config: &SolverConfig,
    task: &dyn Task,
    result: &ProblemResult,
) -> Result<ProblemResult> {
    if result.branches.iter().any(|b| b.wording != 0) {
        return Err(Error::config("wordings", "branches of other wordings cannot be verified again"));
    }
    let mut again = Again { root: None, branches: Vec::new(), verdicts: Verdicts::default() };
    let outcome = again.run(engine, config, task, result);
    for id in again.branch_ids() {
        let _ = engine.prune(id); // those that an error kept out of the engine are no matter
    }
    outcome
}

struct Again {
    root: Option<BranchId>,
    branches: Vec<Candidate>,
    verdicts: Verdicts,
}

impl Again {
    fn branch_ids(&self) -> Vec<BranchId> {
        self.verdicts.branch_ids().chain(self.branches.iter().map(|c| c.id)).chain(self.root).collect()
    }

    fn run(
        &mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        result: &ProblemResult,
    ) -> Result<ProblemResult> {
        let root = engine.prefill(task.root(), PrefillOptions::default())?;
        self.root = Some(root);
        for b in &result.branches {
            let mut fork = [BranchId::default()];
            engine.fork(root, &mut fork)?;
            let mut candidate = Candidate::new(fork[0], 0, task);
            candidate.ended = b.ended;
            candidate.generated.clone_from(&b.tokens);
            self.branches.push(candidate);
            engine.append(fork[0], &[task.branch(b.branch)?, &b.tokens].concat())?;
        }
        self.step(engine)?;
        self.verdicts.ask(engine, config, task, &self.branches)?;
        self.step(engine)?;
        let mut result = result.clone();
        result.verify = self.verdicts.outcome().clone();
        for (b, c) in result.branches.iter_mut().zip(&self.branches) {
            (b.score, b.exit_layer) = (c.score, c.exit_layer);
            b.layers.clone_from(&c.layers);
        }
        Ok(result)
    }

    /// Runs what there is to run.
    fn step(&mut self, engine: &mut Engine) -> Result<()> {
        while engine.has_work() {
            engine.step()?;
            while let Some(event) = engine.next_event() {
                if matches!(event.kind, EventKind::Ready | EventKind::Ended(_)) {
                    self.verdicts.take(engine, event.branch, &mut self.branches)?;
                }
            }
        }
        Ok(())
    }
}

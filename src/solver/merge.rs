//! Decoding branches that have become one: compared every few steps, merged where their states are alike.

use super::candidate::Candidate;
use super::task::Task;
use crate::engine::{BranchId, EndReason, Engine};
use crate::error::Result;
use crate::gate::step::Converged;

/// See the module text.
pub(super) struct Merging {
    rule: Converged,
    /// Decode steps since the branches were compared.
    age: usize,
    /// Who the pass to come, or the last one, compares.
    compared: Vec<BranchId>,
}

impl Merging {
    /// Compares for the first time in the first decode step.
    pub(super) fn new(rule: Converged) -> Self {
        Self { rule, age: rule.every, compared: Vec::new() }
    }

    /// Between two steps: merges what the last pass found alike, and asks the next one when it is time.
    pub(super) fn advance(&mut self, engine: &mut Engine, task: &dyn Task, branches: &mut [Candidate]) -> Result<()> {
        self.merge(engine, task, branches)?;
        let open = || branches.iter().filter(|c| c.ended.is_none());
        if open().any(|c| c.num_steps() == 0) || open().count() < 2 {
            return Ok(());
        }
        self.age += 1;
        if self.age > self.rule.every {
            self.age = 1;
            self.compared = open().map(|c| c.id).collect();
            engine.gate(&self.rule.gate(engine.model().num_layers), &self.compared)?;
        }
        Ok(())
    }

    fn merge(&mut self, engine: &mut Engine, task: &dyn Task, branches: &mut [Candidate]) -> Result<()> {
        let compared = std::mem::take(&mut self.compared);
        // A trial that stood has taken its branch's place since.
        let Some(found) = compared.iter().find_map(|&id| engine.similarity(id).ok().flatten()).cloned() else {
            return Ok(());
        };
        let place = |id: BranchId| branches.iter().position(|c| c.id == id);
        let labels = found.members.iter().zip(&found.similarity.labels);
        let pairs: Vec<(usize, usize)> = labels
            .filter_map(|(&m, &label)| Some((place(m)?, place(found.members[label as usize])?)))
            .filter(|&(merged, survivor)| merged != survivor)
            .collect();
        for (merged, survivor) in pairs {
            let is_sound = branches[survivor].ended.is_none_or(|e| e == EndReason::EndToken);
            if branches[merged].ended.is_some() || !is_sound {
                continue;
            }
            branches[merged].read(engine, task)?;
            engine.uncache(branches[merged].id)?;
            engine.merge(branches[survivor].id, branches[merged].id)?;
            branches[survivor].votes += branches[merged].votes;
            let gone = &mut branches[merged];
            (gone.votes, gone.answer, gone.ended) = (0.0, None, Some(EndReason::Merged));
            gone.merged_into = Some(survivor);
        }
        Ok(())
    }
}

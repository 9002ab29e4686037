//! Generated tokens that leave the backbone early: which rows of a pass may, and when the backbone runs them again.
//!
//! What a branch's tokens become depends on the branch alone (but for `batch_min`), not on who else is in flight, nor on
//! whether it gave up its blocks in between: its newest token leaves by itself, whatever of the branch runs again in the
//! same pass, and a branch with KV of the river is swapped out bit for bit.

use super::Engine;
use super::step::Reserved;
use crate::error::{Error, Result};
use crate::gate::GateSpec;
use crate::gate::river::{River, RiverExit};
use crate::kv::block_pool::BlockState;
use crate::model::PassGate;
use crate::tree::{Branch, BranchId};

impl Engine {
    /// How generated tokens use the second weight set from the next step on; `None`, the default, not at all. What has
    /// been computed stays as it is.
    pub fn set_river(&mut self, river: Option<River>) -> Result<()> {
        let num_layers = self.model.num_layers;
        let Some(river) = river else {
            (self.river, self.river_gate) = (None, None);
            return Ok(());
        };
        river.validate()?;
        if !self.runner.has_river() {
            return Err(Error::config("river", "the engine was opened without a second weight set"));
        }
        if self.tree.iter().any(|b| b.limited.is_some()) {
            river.check_budget()?;
        }
        let looks = river.prefill.is_some() || matches!(river.exit, RiverExit::Tau(_));
        if looks && river.min_layer as usize >= num_layers {
            let why = format!("{}: of the model's {num_layers} layers the last is too late", river.min_layer);
            return Err(Error::config("river-first", why));
        }
        let gate = river.gate(num_layers);
        gate.iter().try_for_each(|gate| gate.validate(num_layers))?;
        (self.river, self.river_gate) = (Some(river), gate);
        Ok(())
    }

    /// What [`set_river`](Self::set_river) has set.
    pub fn river(&self) -> Option<&River> {
        self.river.as_ref()
    }

    /// The river's gate on the generated tokens of a pass.
    pub(super) fn decode_gate<'a>(&self, gate: Option<&'a GateSpec>, reserved: &[Reserved]) -> Option<PassGate<'a>> {
        let seqs: Vec<usize> = (0..reserved.len()).filter(|&i| reserved[i].decodes).collect();
        let drafts = self.num_proposed().is_some();
        let gate = gate.filter(|_| !drafts && !seqs.is_empty());
        gate.map(|spec| PassGate { spec, seqs, keys: Vec::new(), newest_alone: true })
    }

    /// Tokens a draft proposes, where that is the policy.
    pub(super) fn num_proposed(&self) -> Option<usize> {
        match self.river.as_ref()?.exit {
            RiverExit::Draft(tokens) => Some(tokens),
            _ => None,
        }
    }

    /// Lets the last pass of a prompt leave the backbone early, where the policy says so: to be called before it runs.
    pub fn exit_prompt(&mut self, prompt: BranchId) -> Result<()> {
        let num_tokens = self.tree.get(prompt)?.tokens.len();
        match self.river.and_then(|river| river.prefill_gate(num_tokens, self.model.num_layers)) {
            Some(gate) => self.gate(&gate, &[prompt]),
            None => Ok(()),
        }
    }

    /// Makes tokens pending again whose K and V the river wrote, in branches that have enough of them. What a branch had
    /// when it was last forked stays as it is.
    pub(super) fn refresh_due(&mut self) -> Result<()> {
        let Some(every) = self.river.and_then(|r| r.refresh) else { return Ok(()) };
        let due = |b: &Branch| {
            let from = b.exact_len().max(b.num_forked).max(b.num_refreshed);
            let is_whole = b.limited.is_none() && b.fork_point.is_none();
            let is_due = is_whole && b.is_generating() && b.pending() == 1 && b.num_computed >= from + every;
            is_due.then_some((b.id, from))
        };
        let due: Vec<(BranchId, usize)> = self.tree.iter().filter_map(due).collect();
        for (id, from) in due {
            self.uncompute(id, from)?;
            let b = self.tree.get_mut(id)?;
            if b.exact_len() == from {
                b.state = BlockState::Exact;
            }
            // Behind a fork in the river the rows stay approximate: they are not due again for that.
            b.num_refreshed = b.num_computed + every;
            self.totals.kv_refreshes += 1;
        }
        Ok(())
    }
}

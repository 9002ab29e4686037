//! Gates of single branches and groups: set before a pass, spent by it.

use std::sync::Arc;

use super::step::Reserved;
use super::{Engine, Event, EventKind};
use crate::backend::Similarity;
use crate::error::{Error, Result};
use crate::gate::{Effect, GateSpec, Statistic};
use crate::kv::block_pool::BlockState;
use crate::model::PassGate;
use crate::tree::{Branch, BranchId, Mode};

/// A gate on its branches, until the pass that computes their last pending tokens.
#[derive(Debug)]
pub(crate) struct BranchGate {
    spec: GateSpec,
    members: Vec<BranchId>,
    keys: Vec<u64>,
}

/// What a comparison of branches found.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupSimilarity {
    /// Who was compared; the first is the root.
    pub members: Vec<BranchId>,
    /// Their similarities and clusters.
    pub similarity: Similarity,
}

/// A gate of branches at work in a pass.
pub(super) struct RunningGate {
    gate: Arc<BranchGate>,
    /// Who of its members has a last pending token in the pass: (place among them, sequence of the pass).
    members: Vec<(usize, usize)>,
}

impl BranchGate {
    /// All members run in one pass, or none does.
    fn compares(&self) -> bool {
        matches!(self.spec.statistic, Statistic::BranchSimilarity { .. })
    }
}

impl Engine {
    /// Sets `spec` on `branches` for the pass that computes their last pending tokens; that pass spends it. What it saw
    /// is in [`row`](Self::row)'s `layers` and in [`similarity`](Self::similarity). A later gate replaces it.
    ///
    /// Branches that are compared run their last tokens in one pass together. When they do not fit one, the gate is
    /// taken off, and nothing is compared.
    pub fn gate(&mut self, spec: &GateSpec, branches: &[BranchId]) -> Result<()> {
        self.gate_keyed(spec, branches, &[])
    }

    /// As [`gate`](Self::gate), with one key a branch: branches of different keys never become one.
    pub fn gate_keyed(&mut self, spec: &GateSpec, branches: &[BranchId], keys: &[u64]) -> Result<()> {
        self.check_gate(spec)?;
        if !keys.is_empty() && keys.len() != branches.len() {
            let why = format!("{} keys for {} branches", keys.len(), branches.len());
            return Err(Error::config("gate", why));
        }
        for (i, &id) in branches.iter().enumerate() {
            let b = self.tree.get(id)?;
            let why = if branches[..i].contains(&id) {
                "is named twice"
            } else if !b.is_runnable() {
                "has no tokens to run"
            } else if spec.effect.needs_clusters() && b.mode != Mode::Idle {
                "generates: only a prompt can become another's"
            } else if spec.effect.needs_clusters() && b.state != BlockState::Exact {
                "is not exact"
            } else if spec.effect.needs_clusters() && b.score_from.is_some() {
                "is being scored: every row of it must run"
            } else {
                continue;
            };
            return Err(Error::Branch { branch: id.to_string(), why });
        }
        let gate = Arc::new(BranchGate { spec: spec.clone(), members: branches.to_vec(), keys: keys.to_vec() });
        for &id in branches {
            let b = self.tree.get_mut(id)?;
            b.gate = Some(Arc::clone(&gate));
            b.similarity = None;
        }
        Ok(())
    }

    /// Refuses what cannot be done with this model.
    pub(super) fn check_gate(&self, spec: &GateSpec) -> Result<()> {
        spec.validate(self.model.num_layers)?;
        match (spec.statistic, self.model.logit_softcap) {
            (Statistic::Entropy { .. }, Some(_)) => {
                let why = "statistic: the logits of this model are capped (final_logit_softcapping), which probes of inner \
                           layers do not know";
                Err(Error::config("gate", why))
            }
            _ => Ok(()),
        }
    }

    /// What the last comparison that the branch took part in found; `None` when there was none.
    pub fn similarity(&self, branch: BranchId) -> Result<Option<&GroupSimilarity>> {
        Ok(self.tree.get(branch)?.similarity.as_deref())
    }

    /// Takes gates off groups whose pending tokens can never stand in one pass, or whose members are gone.
    pub(super) fn dissolve_groups(&mut self) -> Result<()> {
        let groups: Vec<Arc<BranchGate>> =
            self.tree.iter().filter_map(|b| b.gate.clone()).filter(|g| g.compares()).collect();
        for gate in groups {
            let mut pending = 0;
            for b in gate.members.iter().filter(|&&m| self.is_under(m, &gate)).filter_map(|&m| self.tree.get(m).ok()) {
                pending += b.tokens.len() - self.fork_start(b);
            }
            if pending > self.config.max_batch_tokens {
                self.dissolve(&gate)?;
            }
        }
        Ok(())
    }

    /// Takes the gate off the group that the branch at `index` belongs to; false when there is none.
    pub(super) fn dissolve_group_of(&mut self, index: usize) -> Result<bool> {
        let Some(gate) = self.tree.at(index).and_then(|b| b.gate.clone()).filter(|g| g.compares()) else {
            return Ok(false);
        };
        self.dissolve(&gate)?;
        Ok(true)
    }

    fn dissolve(&mut self, gate: &Arc<BranchGate>) -> Result<()> {
        tracing::debug!(members = gate.members.len(), "not compared: the prompts do not fit one pass");
        for &m in gate.members.iter() {
            if self.is_under(m, gate) {
                self.tree.get_mut(m)?.gate = None;
            }
        }
        Ok(())
    }

    /// The branch is there, and no later gate has replaced this one.
    fn is_under(&self, branch: BranchId, gate: &Arc<BranchGate>) -> bool {
        self.tree.get(branch).is_ok_and(|b| b.gate.as_ref().is_some_and(|g| Arc::ptr_eq(g, gate)))
    }

    /// A branch that is asked for more than its prompt can no longer become another's.
    pub(super) fn leave_clusters(&mut self, branch: BranchId) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        if b.gate.as_ref().is_some_and(|g| g.spec.effect.needs_clusters()) {
            b.gate = None;
        }
        Ok(())
    }

    /// A number for the group that must run together with this branch, if any.
    pub(super) fn group_of(b: &Branch) -> Option<usize> {
        b.gate.as_ref().filter(|g| g.compares()).map(|g| Arc::as_ptr(g) as usize)
    }

    /// A fork of a branch that may leave its pass waits until that is decided: the layers behind would miss its KV.
    pub(super) fn waits_for_gate(&self, b: &Branch) -> bool {
        let leaves = |spec: &GateSpec| matches!(spec.effect, Effect::Alias | Effect::Drop | Effect::Stop);
        let for_all = self.gates.iter().any(leaves);
        let mut fork = b.fork_point;
        while let Some(parent) = fork.and_then(|f| self.tree.get(f.parent).ok()) {
            if parent.is_runnable() && (for_all || parent.gate.as_ref().is_some_and(|g| leaves(&g.spec))) {
                return true;
            }
            fork = parent.fork_point;
        }
        false
    }

    /// Gates for every pass first, then those of the branches whose last pending token this pass computes.
    pub(super) fn branch_gates(&self, reserved: &[Reserved]) -> Result<Vec<RunningGate>> {
        let mut gates: Vec<RunningGate> = Vec::new();
        for r in reserved.iter().filter(|r| r.query.is_some()) {
            if let Some(gate) = &self.tree.get(r.branch)?.gate
                && !gates.iter().any(|g| Arc::ptr_eq(&g.gate, gate))
            {
                let seq = |id: &BranchId| reserved.iter().position(|r| r.branch == *id && r.query.is_some());
                let placed = gate.members.iter().enumerate().filter(|(_, m)| self.is_under(**m, gate));
                let members = placed.filter_map(|(i, m)| Some((i, seq(m)?))).collect();
                gates.push(RunningGate { gate: Arc::clone(gate), members });
            }
        }
        Ok(gates)
    }

    /// The pass's gates: those set for every pass, then `of_branches`.
    pub(super) fn pass_gates<'a>(
        gates: &'a [GateSpec],
        of_branches: &'a [RunningGate],
        reserved: &[Reserved],
    ) -> Vec<PassGate<'a>> {
        let all = gates.iter().map(|spec| PassGate {
            spec,
            seqs: (0..reserved.len()).collect(),
            keys: Vec::new(),
            newest_alone: false,
        });
        let some = of_branches.iter().map(|RunningGate { gate, members }| PassGate {
            spec: &gate.spec,
            seqs: members.iter().map(|m| m.1).collect(),
            keys: members.iter().filter_map(|m| gate.keys.get(m.0).copied()).collect(),
            newest_alone: false,
        });
        all.chain(some).collect()
    }

    /// The pass has run: its branches' gates are spent, and what they compared is known to every member.
    pub(super) fn spend_gates(
        &mut self,
        gates: &[RunningGate],
        reserved: &[Reserved],
        mut similarities: Vec<Option<Similarity>>,
    ) -> Result<()> {
        let of_branches = similarities.split_off(similarities.len().saturating_sub(gates.len()));
        for (gate, similarity) in gates.iter().zip(of_branches) {
            let members: Vec<BranchId> = gate.members.iter().map(|m| reserved[m.1].branch).collect();
            let found = similarity.map(|similarity| GroupSimilarity { members: members.clone(), similarity });
            let found = found.map(Arc::new);
            for m in members {
                let b = self.tree.get_mut(m)?;
                b.gate = None;
                b.similarity.clone_from(&found);
            }
        }
        Ok(())
    }

    /// `branch` becomes one with `to`: its tokens, its blocks, its last row. Children that wait for it follow. Where it
    /// watches something else, its last token runs again.
    pub(super) fn alias(&mut self, branch: BranchId, to: BranchId, layer: u32) -> Result<()> {
        self.note_shared(to, self.tree.get(to)?.num_computed)?;
        let target = self.tree.get(to)?;
        let b = self.tree.get(branch)?;
        let sees_the_same = (&b.watch, b.top_k) == (&target.watch, target.top_k);
        let num_computed = target.num_computed.min(target.tokens.len() - usize::from(!sees_the_same));
        let num_slots = target.slots_for(num_computed).unwrap_or(num_computed);
        let table = target.table.fork(&mut self.pool, num_slots)?;
        let tokens = target.tokens.clone();
        let target_limited = target.limited.clone();
        let (state, cached) = (target.state, target.num_cached_blocks.min(num_computed / self.layout.block_size));
        let last = target.last.clone().filter(|_| sees_the_same);
        let old = b.tokens.clone();
        self.rebase_children(branch, &old, &tokens)?;
        let b = self.tree.get_mut(branch)?;
        b.table.clear(&mut self.pool)?;
        b.table = table;
        match (&mut b.limited, target_limited) {
            (Some(own), target) => own.become_like(target.as_deref(), old.len(), tokens.len()),
            (None, Some(target)) if target.is_cut() => {
                b.limited = Some(Box::new(target.fork(b.ordinal, tokens.len())));
            }
            (None, _) => {}
        }
        b.tokens = tokens;
        b.num_forked = num_computed;
        b.num_refreshed = 0;
        b.num_computed = num_computed;
        b.prompt_len = b.tokens.len();
        b.num_cached_blocks = cached;
        b.state = state;
        b.last = last;
        b.fork_point = None;
        b.exit_layer = Some(layer);
        self.events.push_back(Event { branch, kind: EventKind::Aliased { to } });
        Ok(())
    }

    /// The children that wait for `branch`, which changes from `old` to `new`, follow it, and so on below them. One that
    /// does not begin with all of `old` is no fork of that prompt: it takes what there is, and goes its own way.
    fn rebase_children(&mut self, branch: BranchId, old: &[u32], new: &[u32]) -> Result<()> {
        let is_child = |b: &&Branch| b.fork_point.is_some_and(|f| f.parent == branch);
        let children: Vec<BranchId> = self.tree.iter().filter(is_child).map(|b| b.id).collect();
        for child in children {
            let old_child = self.tree.get(child)?.tokens.clone();
            let Some(own) = old_child.strip_prefix(old) else {
                self.materialise(child)?;
                continue;
            };
            let new_child = [new, own].concat();
            self.rebase_children(child, &old_child, &new_child)?;
            let b = self.tree.get_mut(child)?;
            b.tokens = new_child;
            let moved = |place: usize| (place + new.len()).saturating_sub(old.len());
            b.prompt_len = moved(b.prompt_len).max(1);
            b.score_from = b.score_from.map(moved);
            if let Some(limited) = &mut b.limited {
                limited.rebase(moved);
            }
            if let Some(fork) = &mut b.fork_point {
                // A fork that runs its parent's last token again still does.
                fork.at = moved(fork.at);
            }
        }
        Ok(())
    }
}

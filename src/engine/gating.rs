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
        spec.validate(self.model.num_layers)?;
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
            for b in gate.members.iter().filter_map(|&m| self.tree.get(m).ok()) {
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
        for &m in &gate.members {
            if let Ok(b) = self.tree.get_mut(m)
                && b.gate.as_ref().is_some_and(|g| Arc::ptr_eq(g, gate))
            {
                b.gate = None;
            }
        }
        Ok(())
    }

    /// A number for the group that must run together with this branch, if any.
    pub(super) fn group_of(b: &Branch) -> Option<usize> {
        b.gate.as_ref().filter(|g| g.compares()).map(|g| Arc::as_ptr(g) as usize)
    }

    /// A fork of a prompt that may yet become another's waits until that is decided.
    pub(super) fn waits_for_gate(&self, b: &Branch) -> bool {
        let mut fork = b.fork_point;
        while let Some(parent) = fork.and_then(|f| self.tree.get(f.parent).ok()) {
            if parent.gate.as_ref().is_some_and(|g| g.spec.effect == Effect::Alias) {
                return true;
            }
            fork = parent.fork_point;
        }
        false
    }

    /// Gates for every pass first, then those of the branches whose last pending token this pass computes.
    pub(super) fn branch_gates(&self, reserved: &[Reserved]) -> Result<Vec<Arc<BranchGate>>> {
        let mut gates: Vec<Arc<BranchGate>> = Vec::new();
        for r in reserved.iter().filter(|r| r.query.is_some()) {
            if let Some(gate) = &self.tree.get(r.branch)?.gate
                && !gates.iter().any(|g| Arc::ptr_eq(g, gate))
            {
                gates.push(Arc::clone(gate));
            }
        }
        Ok(gates)
    }

    /// The pass's gates: those set for every pass, then `of_branches`.
    pub(super) fn pass_gates<'a>(
        gates: &'a [GateSpec],
        of_branches: &'a [Arc<BranchGate>],
        reserved: &[Reserved],
    ) -> Vec<PassGate<'a>> {
        let all = gates.iter().map(|spec| PassGate { spec, seqs: (0..reserved.len()).collect(), keys: Vec::new() });
        let place = |id: &BranchId| reserved.iter().position(|r| r.branch == *id && r.query.is_some());
        let some = of_branches.iter().map(|gate| {
            let placed = || gate.members.iter().enumerate().filter_map(|(i, m)| Some((i, place(m)?)));
            PassGate {
                spec: &gate.spec,
                seqs: placed().map(|(_, seq)| seq).collect(),
                keys: placed().filter_map(|(i, _)| gate.keys.get(i).copied()).collect(),
            }
        });
        all.chain(some).collect()
    }

    /// The pass has run: its branches' gates are spent, and what they compared is known to every member.
    pub(super) fn spend_gates(
        &mut self,
        gates: &[Arc<BranchGate>],
        reserved: &[Reserved],
        mut similarities: Vec<Option<Similarity>>,
    ) -> Result<()> {
        let of_branches = similarities.split_off(similarities.len().saturating_sub(gates.len()));
        for (gate, similarity) in gates.iter().zip(of_branches) {
            let ran = |m: &&BranchId| reserved.iter().any(|r| r.branch == **m && r.query.is_some());
            let members: Vec<BranchId> = gate.members.iter().filter(ran).copied().collect();
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

    /// `branch` becomes one with `to`: its tokens, its blocks, its last row. Children that wait for it follow.
    pub(super) fn alias(&mut self, branch: BranchId, to: BranchId, layer: u32) -> Result<()> {
        let target = self.tree.get(to)?;
        let table = target.table.fork(&mut self.pool, target.num_computed)?;
        let (tokens, num_computed) = (target.tokens.clone(), target.num_computed);
        let (state, cached, last) = (target.state, target.num_cached_blocks, target.last.clone());
        let b = self.tree.get_mut(branch)?;
        b.table.clear(&mut self.pool)?;
        b.table = table;
        let old_len = std::mem::replace(&mut b.tokens, tokens).len();
        b.num_computed = num_computed;
        b.prompt_len = b.tokens.len();
        b.num_cached_blocks = cached;
        b.state = state;
        b.last = last;
        b.fork_point = None;
        b.exit_layer = Some(layer);
        self.rebase_children(branch, old_len)?;
        self.events.push_back(Event { branch, kind: EventKind::Aliased { to } });
        Ok(())
    }

    /// The first `old_len` tokens of the children that wait for `branch` become its own, and so on below them.
    fn rebase_children(&mut self, branch: BranchId, old_len: usize) -> Result<()> {
        let new = self.tree.get(branch)?.tokens.clone();
        let is_child = |b: &&Branch| b.fork_point.is_some_and(|f| f.parent == branch);
        let children: Vec<BranchId> = self.tree.iter().filter(is_child).map(|b| b.id).collect();
        for child in children {
            let b = self.tree.get_mut(child)?;
            let old_child_len = b.tokens.len();
            b.tokens.splice(..old_len.min(old_child_len), new.iter().copied());
            b.prompt_len = (b.prompt_len + new.len()).saturating_sub(old_len).max(1);
            if let Some(fork) = &mut b.fork_point {
                // A fork that runs its parent's last token again still does.
                fork.at = new.len().saturating_sub(old_len.saturating_sub(fork.at));
            }
            self.rebase_children(child, old_child_len)?;
        }
        Ok(())
    }
}

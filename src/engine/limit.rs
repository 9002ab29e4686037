//! Cutting branches back to their KV budgets: who is due, what scores decide, what the device is told.
//!
//! ```text
//! slots:   | pinned | shared at a fork | candidates ......................... | the last `window` |
//!          0        `first` is behind both                                     len - window        len
//! a cut:   scores of the candidates -> the best of them, in order -> compaction in place -> whole blocks return
//! ```
//!
//! A branch's cuts depend on its own tokens alone: not on who else is in flight, nor on whether it gave up its blocks in
//! between. Hence what was shared at a fork is never dropped, even when the others are gone; the last queries are counted
//! by position; and a branch that has been cut is swapped out bit for bit.

use super::Engine;
use super::limited::{CutMade, Limited};
use super::step::Reserved;
use crate::backend::NO_RING_ROW;
use crate::error::{Error, Result};
use crate::gate::river::River;
use crate::kv::block_pool::BlockState;
use crate::kv::budget::{KeepRule, KvBudget};
use crate::kv::selection::{self, Candidates};
use crate::model::{PassOutput, QueryRing, Runner, SlotScoring};
use crate::sampler::{DrawKey, child_path, uniform};
use crate::tree::{Branch, BranchId};

/// Which rings are free. They take the device's memory beside its KV cache, for branches that are at work.
#[derive(Debug, Default)]
pub(super) struct RingPool {
    free: Vec<u32>,
    capacity: u32,
}

impl RingPool {
    fn take(&mut self, runner: &mut dyn Runner, window: usize) -> Result<u32> {
        if self.free.is_empty() {
            let capacity = (2 * self.capacity).max(4);
            runner.reserve_rings(capacity as usize, window)?;
            self.free.extend((self.capacity..capacity).rev());
            self.capacity = capacity;
        }
        self.free.pop().ok_or_else(|| Error::Internal("no query ring is free".into()))
    }
}

impl Engine {
    /// From now on the branch holds `budget.budget` slots per (layer, kv head) behind its pinned tokens, and at most
    /// `budget.buffer` more until it is cut back: an approximation, which [`BranchStats`](super::BranchStats) records. Forks
    /// have the same budget, each for itself. Slots in blocks that it shares, now or at a later fork, are neither counted
    /// nor dropped. A branch that does not pin all its tokens leaves the prefix cache.
    pub fn limit_kv(&mut self, branch: BranchId, budget: KvBudget) -> Result<()> {
        budget.validate(self.config.kv_window)?;
        if self.model.has_windows() {
            let why =
                "this model has layers with a sliding window, which goes by position: a cut would move what it sees";
            return Err(Error::config("kv-budget", why));
        }
        self.river.iter().try_for_each(River::check_budget)?;
        let b = self.tree.get(branch)?;
        if b.limited.as_ref().is_some_and(|l| l.is_cut()) {
            return Err(Error::config("kv-budget", "the branch has been cut under another budget; give it one before"));
        }
        if budget.pinned < b.tokens.len() {
            self.uncache(branch)?;
        }
        self.release_ring(branch)?;
        let b = self.tree.get_mut(branch)?;
        b.limited = Some(Box::new(Limited::new(budget, b, self.layout.block_size)));
        Ok(())
    }

    /// Whose tokens the slots of one layer and kv head are, in slot order.
    pub fn kv_positions(&self, branch: BranchId, layer: usize, kv_head: usize) -> Result<Vec<u32>> {
        let b = self.tree.get(branch)?;
        if layer >= self.model.num_layers || kv_head >= self.model.num_kv_heads {
            return Err(Error::config("kv_positions", "no such layer or kv head"));
        }
        let head = layer * self.model.num_kv_heads + kv_head;
        let position = |slot| b.limited.as_ref().map_or(slot as u32, |l| l.position(slot, head));
        Ok((0..b.num_slots()).map(position).collect())
    }

    /// Cuts every branch that is due. Only one that generates and stands before its next token: a prompt is never cut in
    /// the middle, wherever its chunks end.
    pub(super) fn cut_due(&mut self) -> Result<()> {
        let due: Vec<(BranchId, usize)> =
            self.tree.iter().filter_map(|b| self.due(b).transpose()).collect::<Result<_>>()?;
        due.into_iter().try_for_each(|(id, first)| self.cut(id, first))
    }

    /// The first slot that may go, if the branch is due.
    pub(super) fn due(&self, b: &Branch) -> Result<Option<(BranchId, usize)>> {
        let Some(limited) = &b.limited else { return Ok(None) };
        let waits = b.fork_point.is_some() || b.swapped.is_some() || b.rests;
        if waits || !b.is_generating() || b.num_generated == 0 || b.pending() != 1 {
            return Ok(None);
        }
        let window = self.config.kv_window;
        let first = limited.shared.max(limited.budget.pinned);
        let is_due = |first: usize| {
            let held = b.table.len().saturating_sub(first);
            limited.budget.is_due(b.num_computed, held, limited.phase, window)
        };
        let asks = limited.budget.rule.by_queries().is_some();
        let has_queries = !asks || limited.num_queries(b.num_computed, window) > 0;
        if b.num_computed <= limited.forked_at || !has_queries || !is_due(first) {
            return Ok(None);
        }
        // Nobody else may ever see a slot move, whoever holds the block by now.
        let first = first.max(self.shared_slots(b)?);
        Ok(is_due(first).then_some((b.id, first)))
    }

    /// Slots up to the end of the last block that has another owner.
    fn shared_slots(&self, b: &Branch) -> Result<usize> {
        for (i, &id) in b.table.blocks().iter().enumerate().rev() {
            if self.pool.is_shared(id)? {
                return Ok((i + 1) * self.layout.block_size);
            }
        }
        Ok(0)
    }

    fn cut(&mut self, id: BranchId, first: usize) -> Result<()> {
        let window = self.config.kv_window;
        let b = self.tree.get(id)?;
        let Some(limited) = &b.limited else { return Ok(()) };
        let (num_slots, kept) = (b.table.len(), limited.budget.kept(window));
        let recent = limited.budget.recent(window).min(kept);
        let choosers = limited.budget.choosers();
        let scores = self.slot_scores(id, num_slots - recent)?;
        let candidates = Candidates {
            scores: &scores,
            num_layers: self.model.num_layers,
            num_kv_heads: self.model.num_kv_heads,
            first,
            end: num_slots - recent,
        };
        let keep = selection::keep(&candidates, kept - recent, num_slots, choosers);
        let b = self.tree.get_mut(id)?;
        b.table.mark(&mut self.pool, first, BlockState::Compacted)?;
        if let Err(error) = self.runner.kv_compact(b.table.indices(), &keep, first) {
            self.drop_kv(id)?;
            return Err(error);
        }
        b.table.truncate(&mut self.pool, first + kept)?;
        b.state = b.state.inherit(BlockState::Compacted);
        b.num_found = b.num_found.min(first);
        b.num_lost = 0;
        b.num_cached_blocks = b.num_cached_blocks.min(first / self.layout.block_size);
        let num_heads = candidates.num_layers * candidates.num_kv_heads;
        let num_computed = b.num_computed;
        if let Some(limited) = &mut b.limited {
            limited.commit_cut(&CutMade { keep: &keep, num_heads, first, num_slots, recent, num_computed });
        }
        self.totals.kv_cuts += 1;
        self.totals.slots_dropped += (num_slots - first - kept) as u64;
        tracing::debug!(branch = %id, num_slots, kept = first + kept, "cut");
        Ok(())
    }

    /// `[layers, kv heads, num_candidates]` scores of the branch's first slots.
    fn slot_scores(&mut self, id: BranchId, num_candidates: usize) -> Result<Vec<f32>> {
        let num_heads = self.model.num_layers * self.model.num_kv_heads;
        let window = self.config.kv_window;
        let b = self.tree.get(id)?;
        let Some(limited) = &b.limited else { return Ok(Vec::new()) };
        let num_slots = b.table.len();
        let head_major = |score: &dyn Fn(usize, usize) -> f32| {
            (0..num_heads).flat_map(|head| (0..num_candidates).map(move |slot| score(head, slot))).collect()
        };
        match limited.budget.rule {
            KeepRule::Streaming => Ok(head_major(&|_, slot| slot as f32)),
            KeepRule::H2o => {
                Ok(head_major(&|head, slot| limited.mass.get(slot * num_heads + head).copied().unwrap_or(0.0)))
            }
            KeepRule::Random { seed } => {
                let cut = u64::from(limited.num_cuts) << 32;
                let draw = |head: usize, slot: usize| {
                    let path = child_path(b.path, head as u64);
                    uniform(seed, DrawKey { path, position: cut | slot as u64 }) as f32
                };
                Ok(head_major(&draw))
            }
            KeepRule::RKv { .. } | KeepRule::SnapKv { .. } => {
                let (Some(ring), Some(how)) = (limited.queries.ring, limited.budget.rule.by_queries()) else {
                    return Err(Error::Internal("a branch without queries is cut".into()));
                };
                let num_queries = limited.num_queries(b.num_computed, window);
                let scoring = SlotScoring {
                    blocks: b.table.indices(),
                    num_slots,
                    num_recent: num_slots - num_candidates,
                    ring: QueryRing { ring, num_queries },
                    how,
                };
                let mut scores = Vec::new();
                self.runner.kv_scores(&scoring, &mut scores)?;
                Ok(scores)
            }
        }
    }

    /// After a compaction that stopped in the middle: the branch is computed again from its tokens. Children that wait for it
    /// go on waiting.
    fn drop_kv(&mut self, id: BranchId) -> Result<()> {
        let b = self.tree.get_mut(id)?;
        b.table.clear(&mut self.pool)?;
        b.num_lost = b.num_computed;
        b.num_computed = 0;
        b.num_found = 0;
        b.num_cached_blocks = 0;
        if let Some(limited) = &mut b.limited {
            limited.forget_cuts();
        }
        Ok(())
    }

    /// Rows of the query ring for the tokens `from..to` of a branch, which are about to run.
    pub(super) fn push_ring_rows(&mut self, id: BranchId, from: usize, to: usize) -> Result<()> {
        let window = self.config.kv_window;
        let b = self.tree.get_mut(id)?;
        let queries = b.limited.as_mut().filter(|l| l.budget.rule.by_queries().is_some()).map(|l| &mut l.queries);
        let Some(queries) = queries else {
            self.batch.ring_rows.extend((from..to).map(|_| NO_RING_ROW));
            return Ok(());
        };
        if to > queries.since && queries.ring.is_none() {
            queries.ring = Some(self.rings.take(self.runner.as_mut(), window)?);
        }
        let first = queries.since.max(to.saturating_sub(window));
        let row = |t: usize| match queries.ring {
            Some(ring) if t >= first => ring * window as u32 + ((t - queries.since) % window) as u32,
            _ => NO_RING_ROW,
        };
        self.batch.ring_rows.extend((from..to).map(row));
        queries.written = queries.written.max(to);
        Ok(())
    }

    pub(super) fn release_ring(&mut self, id: BranchId) -> Result<()> {
        if let Some(limited) = &mut self.tree.get_mut(id)?.limited {
            self.rings.free.extend(limited.queries.ring.take());
        }
        Ok(())
    }

    /// Appends what the branch's ring holds to `out`.
    pub(super) fn swap_ring_out(&mut self, id: BranchId, out: &mut Vec<u8>) -> Result<()> {
        match self.tree.get(id)?.limited.as_ref().and_then(|l| l.queries.ring) {
            Some(ring) => self.runner.read_ring(ring, out),
            None => Ok(()),
        }
    }

    /// The inverse of [`swap_ring_out`](Self::swap_ring_out); nothing where there was no ring.
    pub(super) fn swap_ring_in(&mut self, id: BranchId, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let ring = self.rings.take(self.runner.as_mut(), self.config.kv_window)?;
        self.runner.write_ring(ring, bytes)?;
        if let Some(limited) = &mut self.tree.get_mut(id)?.limited {
            limited.queries.ring = Some(ring);
        }
        Ok(())
    }

    /// The first of its rows in the pass, counted from its first, whose attention is to be added up; `None`: no row's.
    pub(super) fn accumulates_from(b: &Branch, from: usize, to: usize) -> Option<usize> {
        let limited = b.limited.as_ref().filter(|l| l.budget.rule == KeepRule::H2o)?;
        let first = limited.mass_until.max(from);
        (first < to).then(|| first - from)
    }

    /// Adds what slots have received in the pass, before its rows are committed.
    pub(super) fn add_slot_mass(&mut self, reserved: &[Reserved], output: &PassOutput) -> Result<()> {
        let num_heads = self.model.num_layers * self.model.num_kv_heads;
        for (r, received) in reserved.iter().zip(&output.slot_mass) {
            let b = self.tree.get_mut(r.branch)?;
            let num_computed = b.num_computed + r.num_new_tokens;
            let Some(limited) = b.limited.as_mut().filter(|_| !received.is_empty()) else { continue };
            let num_slots = received.len() / num_heads;
            // Slots of rows that run again, or that stand where others stood, begin anew.
            let num_known = limited.slots_for(limited.mass_until).unwrap_or(num_slots);
            limited.mass.truncate(num_known * num_heads);
            limited.mass.resize(num_slots * num_heads, 0.0);
            for (head, slots) in received.chunks(num_slots).enumerate() {
                for (slot, x) in slots.iter().enumerate() {
                    limited.mass[slot * num_heads + head] += x;
                }
            }
            limited.mass_until = num_computed;
        }
        Ok(())
    }
}

//! Branches under a KV budget: what each may drop, when it is cut, and which of its last queries and how much attention
//! per slot are kept for the decision.
//!
//! ```text
//! slots:   | pinned | shared at a fork | candidates ......................... | the last `window` |
//!          0        `first` is behind both                                     len - window        len
//! a cut:   scores of the candidates -> the best of them, in order -> compaction in place -> whole blocks return
//! tokens:  slot = position up to the first cut's `first`, and slot = position - dropped from `uncut_from` on
//! ```
//!
//! A branch's cuts depend on its own tokens alone: not on who else is in flight, nor on whether it gave up its blocks in
//! between. Hence what was shared at a fork is never dropped, even when the others are gone; the last queries are counted
//! by position; and a branch that has been cut is swapped out bit for bit.

use std::sync::Arc;

use super::Engine;
use super::step::Reserved;
use crate::backend::NO_RING_ROW;
use crate::error::{Error, Result};
use crate::kv::block_pool::BlockState;
use crate::kv::budget::{KeepRule, KvBudget};
use crate::kv::selection::{self, Candidates};
use crate::model::{PassOutput, QueryRing, Runner, SlotScoring};
use crate::sampler::{DrawKey, child_path, uniform};
use crate::tree::{Branch, BranchId};

/// A branch's budget and what its cuts need to know.
#[derive(Clone, Debug)]
pub(crate) struct Limited {
    budget: KvBudget,
    block_size: usize,
    /// Slots in blocks that were shared at a fork: whole blocks.
    shared: usize,
    /// Tokens of the last fork. The block it ended in is a branch's own when that has run another row.
    forked_at: usize,
    /// When within the buffer it is cut.
    phase: usize,
    queries: LastQueries,
    /// What each slot has received, `[slots, layers * kv heads]`; for [`KeepRule::H2o`].
    mass: Vec<f32>,
    /// The rows of `tokens[..mass_until]` are in `mass`.
    mass_until: usize,
    cut: Option<Cut>,
    pub(super) num_cuts: u32,
    /// Tokens computed by then.
    pub(super) first_cut: Option<usize>,
}

/// Which of a branch's queries its ring holds: the last `window` of `tokens[since..]` that have run, that of token `t` in
/// row `(t - since) % window`.
#[derive(Clone, Copy, Debug)]
struct LastQueries {
    ring: Option<u32>,
    since: usize,
    /// `tokens[..written]` have run, though perhaps their KV is lost or their pass failed.
    written: usize,
}

/// What cuts have left of a branch. One set of positions serves all its forks.
#[derive(Clone, Debug)]
struct Cut {
    /// Up to here slots and positions are the same.
    first: usize,
    /// `tokens[uncut_from..]` still have all their slots.
    uncut_from: usize,
    /// Slots dropped so far.
    dropped: usize,
    /// `[layers * kv heads, uncut_from - dropped - first]`: whose slots the others are.
    positions: Arc<[u32]>,
}

/// A cut that has been made.
struct CutMade<'a> {
    /// `[num_heads, kept]` of the slots `[first, num_slots)`; the last `recent` of each head stand as they stood.
    keep: &'a [u32],
    num_heads: usize,
    first: usize,
    num_slots: usize,
    recent: usize,
    num_computed: usize,
}

impl Limited {
    fn new(budget: KvBudget, b: &Branch, block_size: usize) -> Self {
        let num_run = b.fork_point.map_or(b.num_computed.max(b.num_lost), |f| f.at);
        // Where the prompt stays, its queries have nothing to say: they would depend on what the prefix cache had of it.
        let since = if budget.pinned >= b.tokens.len() { num_run.max(budget.pinned) } else { num_run };
        Self {
            budget,
            block_size,
            shared: b.num_forked / block_size * block_size,
            forked_at: num_run,
            phase: budget.phase(b.ordinal),
            queries: LastQueries { ring: None, since, written: num_run },
            mass: Vec::new(),
            mass_until: num_run,
            cut: None,
            num_cuts: 0,
            first_cut: None,
        }
    }

    /// For the `ordinal`-th branch that continues behind `num_tokens` of this one's tokens.
    pub(super) fn fork(&self, ordinal: u64, num_tokens: usize) -> Self {
        let mut fork = Self { num_cuts: 0, first_cut: None, phase: self.budget.phase(ordinal), ..self.clone() };
        fork.queries.ring = None;
        fork.begin_behind(num_tokens);
        fork
    }

    /// A fork that has waited has its parent's first `num_tokens` now: with what that has dropped meanwhile.
    pub(super) fn take_from(&mut self, parent: Option<&Self>, num_tokens: usize) {
        if let Some(parent) = parent {
            self.cut.clone_from(&parent.cut);
            self.mass.clone_from(&parent.mass);
            self.mass_until = parent.mass_until.min(num_tokens);
            self.shared = parent.shared;
        }
        self.share(num_tokens);
    }

    fn begin_behind(&mut self, num_tokens: usize) {
        self.queries = LastQueries { ring: self.queries.ring, since: num_tokens, written: num_tokens };
        self.mass_until = self.mass_until.min(num_tokens);
        self.share(num_tokens);
    }

    /// The blocks of its first `num_tokens` tokens have another owner from now on, or had one.
    pub(super) fn share(&mut self, num_tokens: usize) {
        self.forked_at = num_tokens;
        if let Some(slots) = self.slots_for(num_tokens) {
            self.shared = self.shared.max(slots / self.block_size * self.block_size);
        }
    }

    /// It has dropped something.
    pub(super) fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// It has become another branch's like, with `num_tokens` tokens, all of them its prompt if that was pinned.
    pub(super) fn become_like(&mut self, other: Option<&Self>, old_len: usize, num_tokens: usize) {
        self.cut = other.and_then(|o| o.cut.clone());
        self.mass = other.map(|o| o.mass.clone()).unwrap_or_default();
        self.budget.pinned = if self.budget.pinned >= old_len { num_tokens } else { self.budget.pinned };
        self.shared = 0;
        self.begin_behind(num_tokens);
    }

    /// Before it has run, its tokens have changed: what stood at `place` stands at `moved(place)`.
    pub(super) fn rebase(&mut self, moved: impl Fn(usize) -> usize) {
        self.budget.pinned = moved(self.budget.pinned);
        self.begin_behind(moved(self.queries.since));
    }

    /// Tokens from `num_tokens` on will run again: queries of theirs do not count.
    pub(super) fn run_again(&mut self, num_tokens: usize) {
        let q = &mut self.queries;
        if num_tokens < q.written.max(q.since) {
            q.since = num_tokens;
            q.written = num_tokens;
        }
        self.mass_until = self.mass_until.min(num_tokens);
        self.forked_at = self.forked_at.min(num_tokens);
        if self.cut.as_ref().is_some_and(|cut| num_tokens <= cut.first) {
            self.cut = None;
        }
        self.shared = self.shared.min(num_tokens / self.block_size * self.block_size);
    }

    /// Tokens from `num_tokens` on are gone.
    pub(super) fn truncate(&mut self, num_tokens: usize) {
        self.run_again(num_tokens);
        self.budget.pinned = self.budget.pinned.min(num_tokens);
    }

    /// All its KV is gone and will be computed in full.
    pub(super) fn forget_cuts(&mut self) {
        self.cut = None;
        self.mass.clear();
        self.mass_until = 0;
    }

    /// Slots that hold the first `num_tokens` tokens; `None` where a cut went through them.
    pub(crate) fn slots_for(&self, num_tokens: usize) -> Option<usize> {
        match &self.cut {
            Some(cut) if num_tokens >= cut.uncut_from => Some(num_tokens - cut.dropped),
            Some(cut) if num_tokens > cut.first => None,
            _ => Some(num_tokens),
        }
    }

    /// The most of the first `num_tokens` tokens that can be had without those that a cut went through.
    pub(crate) fn whole_tokens(&self, num_tokens: usize) -> usize {
        match (&self.cut, self.slots_for(num_tokens)) {
            (Some(cut), None) => cut.first,
            _ => num_tokens,
        }
    }

    /// Slots that are their tokens' own and stay so.
    pub(super) fn num_permanent(&self) -> usize {
        self.cut.as_ref().map_or(usize::MAX, |cut| cut.first).min(self.shared.max(self.budget.pinned))
    }

    /// Slots it holds at most while it generates.
    pub(super) fn most_slots(&self, window: usize) -> usize {
        self.shared.max(self.budget.pinned).saturating_add(self.budget.kept(window) + self.budget.buffer)
    }

    /// The ring's rows that hold a query, when `num_computed` tokens have run.
    fn num_queries(&self, num_computed: usize, window: usize) -> usize {
        num_computed.saturating_sub(self.queries.since).min(window)
    }

    /// The ring and its rows in use.
    #[cfg(test)]
    pub(super) fn ring_in_use(&self, num_computed: usize, window: usize) -> (u32, usize) {
        (self.queries.ring.unwrap(), self.num_queries(num_computed, window))
    }

    fn position(&self, slot: usize, head: usize) -> u32 {
        let Some(cut) = &self.cut else { return slot as u32 };
        let num_moved = cut.uncut_from - cut.dropped - cut.first;
        let position = match slot.checked_sub(cut.first) {
            None => slot,
            Some(i) if i < num_moved => return cut.positions[head * num_moved + i],
            Some(_) => slot + cut.dropped,
        };
        position as u32
    }
}

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
        let b = self.tree.get(branch)?;
        if b.limited.as_ref().is_some_and(|l| l.cut.is_some()) {
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
        let has_queries = !limited.budget.rule.needs_queries() || limited.num_queries(b.num_computed, window) > 0;
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
            rule @ (KeepRule::RKv { .. } | KeepRule::SnapKv { .. }) => {
                let ring =
                    limited.queries.ring.ok_or_else(|| Error::Internal("a branch without queries is cut".into()))?;
                let ring = QueryRing { ring, num_queries: limited.num_queries(b.num_computed, window) };
                let num_recent = num_slots - num_candidates;
                let scoring = SlotScoring::new(rule, b.table.indices(), num_slots, num_recent, ring);
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
        let queries = b.limited.as_mut().filter(|l| l.budget.rule.needs_queries()).map(|l| &mut l.queries);
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

    /// Appends what the branch's ring holds to `out`, and gives the ring back.
    pub(super) fn swap_ring_out(&mut self, id: BranchId, out: &mut Vec<u8>) -> Result<()> {
        let ring = self.tree.get(id)?.limited.as_ref().and_then(|l| l.queries.ring);
        if let Some(ring) = ring {
            self.runner.read_ring(ring, out)?;
        }
        self.release_ring(id)
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

impl Limited {
    fn commit_cut(&mut self, made: &CutMade<'_>) {
        let kept = made.keep.len() / made.num_heads.max(1);
        let num_moved = kept - made.recent;
        let map_first = self.cut.as_ref().map_or(made.first, |cut| cut.first.min(made.first));
        let mut positions = Vec::with_capacity(made.num_heads * (made.first - map_first + num_moved));
        for (head, keep) in made.keep.chunks(kept).enumerate() {
            positions.extend((map_first..made.first).map(|slot| self.position(slot, head)));
            positions.extend(keep[..num_moved].iter().map(|&slot| self.position(slot as usize, head)));
        }
        self.compact_mass(made, kept);
        let dropped = self.cut.as_ref().map_or(0, |cut| cut.dropped) + made.num_slots - made.first - kept;
        let uncut_from = made.num_computed - made.recent;
        self.cut = Some(Cut { first: map_first, uncut_from, dropped, positions: positions.into() });
        self.num_cuts += 1;
        self.first_cut.get_or_insert(made.num_computed);
    }

    fn compact_mass(&mut self, made: &CutMade<'_>, kept: usize) {
        let num_heads = made.num_heads;
        if self.mass.is_empty() {
            return;
        }
        for i in 0..kept {
            for head in 0..num_heads {
                let from = made.keep[head * kept + i] as usize * num_heads + head;
                // Ascending and never to the right of where it stood: nothing is overwritten that is still needed.
                self.mass[(made.first + i) * num_heads + head] = self.mass.get(from).copied().unwrap_or(0.0);
            }
        }
        self.mass.truncate((made.first + kept) * num_heads);
    }
}

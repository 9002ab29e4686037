//! What a branch under a KV budget knows of itself: which of its tokens still have slots, which of its last queries are
//! kept, how much attention each slot has received.
//!
//! ```text
//! tokens:  slot = position up to the first cut's `first`, and slot = position - dropped from `uncut_from` on
//! ```
//!
//! All of it follows from the branch's own tokens and from when it was forked.

use std::sync::Arc;

use crate::kv::budget::KvBudget;
use crate::tree::Branch;

/// A branch's budget and what its cuts need to know.
#[derive(Clone, Debug)]
pub(crate) struct Limited {
    pub(super) budget: KvBudget,
    block_size: usize,
    /// Slots in blocks that were shared at a fork: whole blocks.
    pub(super) shared: usize,
    /// Tokens of the last fork. The block it ended in is a branch's own when that has run another row.
    pub(super) forked_at: usize,
    /// When within the buffer it is cut.
    pub(super) phase: usize,
    pub(super) queries: LastQueries,
    /// What each slot has received, `[slots, layers * kv heads]`; for [`KeepRule::H2o`](crate::kv::budget::KeepRule::H2o).
    pub(super) mass: Vec<f32>,
    /// The rows of `tokens[..mass_until]` are in `mass`.
    pub(super) mass_until: usize,
    cut: Option<Cut>,
    pub(super) num_cuts: u32,
    /// Tokens computed by then.
    pub(super) first_cut: Option<usize>,
}

/// Which of a branch's queries its ring holds: the last `window` of `tokens[since..]` that have run, that of token `t` in
/// row `(t - since) % window`.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastQueries {
    pub(super) ring: Option<u32>,
    pub(super) since: usize,
    /// `tokens[..written]` have run, though perhaps their KV is lost or their pass failed.
    pub(super) written: usize,
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
pub(super) struct CutMade<'a> {
    /// `[num_heads, kept]` of the slots `[first, num_slots)`; the last `recent` of each head stand as they stood.
    pub(super) keep: &'a [u32],
    pub(super) num_heads: usize,
    pub(super) first: usize,
    pub(super) num_slots: usize,
    pub(super) recent: usize,
    pub(super) num_computed: usize,
}

impl Limited {
    pub(super) fn new(budget: KvBudget, b: &Branch, block_size: usize) -> Self {
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
    pub(super) fn num_queries(&self, num_computed: usize, window: usize) -> usize {
        num_computed.saturating_sub(self.queries.since).min(window)
    }

    /// The ring and its rows in use.
    #[cfg(test)]
    pub(super) fn ring_in_use(&self, num_computed: usize, window: usize) -> (u32, usize) {
        (self.queries.ring.unwrap(), self.num_queries(num_computed, window))
    }

    pub(super) fn position(&self, slot: usize, head: usize) -> u32 {
        let Some(cut) = &self.cut else { return slot as u32 };
        let num_moved = cut.uncut_from - cut.dropped - cut.first;
        let position = match slot.checked_sub(cut.first) {
            None => slot,
            Some(i) if i < num_moved => return cut.positions[head * num_moved + i],
            Some(_) => slot + cut.dropped,
        };
        position as u32
    }

    pub(super) fn commit_cut(&mut self, made: &CutMade<'_>) {
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

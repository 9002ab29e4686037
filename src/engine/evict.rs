//! Making room: who gives way, what that frees, what it costs later; and when the attention mass that decides it is
//! measured.

use super::step::Reserved;
use super::{Engine, Event, EventKind};
use crate::error::Result;
use crate::kv::block_pool::{BlockId, BlockState};
use crate::kv::eviction::{Eviction, Rank};
use crate::model::PassOutput;
use crate::scheduler::Holder;
use crate::tree::{Branch, BranchId, Mode, SwappedBlocks};

impl Engine {
    /// Branches that could give way, in the order in which they do.
    pub(super) fn holders(&self) -> Result<Vec<Holder>> {
        let mut holding: Vec<&Branch> =
            self.tree.iter().filter(|b| !b.table.is_empty() && self.can_give_way(b)).collect();
        holding.sort_by_key(|b| std::cmp::Reverse(b.arrival));
        if self.config.eviction == Eviction::Mass {
            let mut ranked: Vec<(Rank, &Branch)> = Vec::with_capacity(holding.len());
            for (i, b) in holding.into_iter().enumerate() {
                let private = self.private_blocks(b)?;
                ranked.push((self.evictor.branch_rank(&private, b.depth as usize, i as u64), b));
            }
            ranked.sort_by_key(|(rank, _)| *rank);
            holding = ranked.into_iter().map(|(_, b)| b).collect();
        }
        let holder = |b: &Branch| Holder { branch: b.id.index as usize, runnable: b.is_runnable() };
        Ok(holding.into_iter().map(holder).collect())
    }

    /// Blocks that no other branch holds: what the branch would bring, at once or from the prefix cache.
    fn private_blocks(&self, b: &Branch) -> Result<Vec<BlockId>> {
        let mut private = Vec::new();
        for &id in b.table.blocks() {
            if self.pool.ref_count(id)? == 1 + u32::from(self.cache.contains(id)) {
                private.push(id);
            }
        }
        Ok(private)
    }

    /// An exact branch can always be recomputed; another needs room in the swap space.
    pub(super) fn can_give_way(&self, b: &Branch) -> bool {
        let bytes = b.table.blocks().len() as u64 * self.layout.block_bytes(self.model.num_layers);
        b.state == BlockState::Exact || self.swap_used + bytes <= self.config.swap_space
    }

    /// For tests: the branch gives up its blocks in the next step, as if another had needed them.
    #[doc(hidden)]
    pub fn force_preemption(&mut self, branch: BranchId) {
        self.forced_preemptions.push(branch);
    }

    pub(super) fn preempt_as_forced(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.forced_preemptions) {
            if self.tree.get(id).is_ok_and(|b| !b.table.is_empty() && self.can_give_way(b)) {
                self.preempt(id.index as usize)?;
            }
        }
        Ok(())
    }

    /// Takes a branch's blocks. An exact branch will be recomputed; any other is swapped out bit for bit.
    pub(super) fn preempt(&mut self, index: usize) -> Result<()> {
        let Some(id) = self.tree.at(index).map(|b| b.id) else { return Ok(()) };
        let num_free = self.pool.num_free();
        let b = self.tree.get_mut(id)?;
        b.rests |= b.mode == Mode::Idle && b.num_computed == b.tokens.len();
        b.num_found = 0;
        if b.state == BlockState::Exact {
            b.num_lost = b.num_lost.max(b.num_computed);
            b.num_computed = 0;
            b.num_cached_blocks = 0;
        } else {
            let (num_slots, num_exact) = (b.table.len(), b.table.exact_len());
            let mut swapped = SwappedBlocks { num_slots, num_exact, ..SwappedBlocks::default() };
            for &block in b.table.indices() {
                self.runner.read_block(block, &mut swapped.bytes)?;
            }
            self.swap_ring_out(id, &mut swapped.queries)?;
            self.swap_used += swapped.num_bytes();
            self.tree.get_mut(id)?.swapped = Some(swapped);
        }
        self.release_ring(id)?;
        let b = self.tree.get_mut(id)?;
        b.table.clear(&mut self.pool)?;
        b.preemptions += 1;
        let was_runnable = b.is_runnable();
        self.totals.preemptions += 1;
        self.count_evicted(self.pool.num_free() - num_free);
        tracing::debug!(branch = %id, was_runnable, "preempted");
        self.events.push_back(Event { branch: id, kind: EventKind::Preempted });
        Ok(())
    }

    /// Frees up to `n` blocks of the prefix cache.
    pub(super) fn evict_cached(&mut self, n: usize) -> Result<()> {
        let num_freed = self.cache.evict(n, &self.evictor, &mut self.pool)?;
        self.count_evicted(num_freed);
        Ok(())
    }

    fn count_evicted(&mut self, num_blocks: usize) {
        self.totals.blocks_evicted += num_blocks as u64;
        self.totals.bytes_evicted += num_blocks as u64 * self.layout.block_bytes(self.model.num_layers);
    }

    /// Counts the rows of a pass that were computed once before; to be called before they are committed.
    pub(super) fn count_recomputed(&mut self, r: &Reserved) -> Result<()> {
        let b = self.tree.get_mut(r.branch)?;
        let end = b.num_computed + r.num_new_tokens;
        self.totals.tokens_recomputed += b.num_lost.min(end).saturating_sub(b.num_computed) as u64;
        if end >= b.num_lost {
            b.num_lost = 0;
        }
        Ok(())
    }

    /// Whether the pass measures attention mass: every so many decode passes, and where a prompt ends, so that no
    /// request goes unseen however short its answer.
    pub(super) fn measures_mass(&mut self, reserved: &[Reserved]) -> Result<bool> {
        if self.config.eviction != Eviction::Mass {
            return Ok(false);
        }
        let (mut decodes, mut ends_prompt) = (false, false);
        for r in reserved {
            let is_decode = self.tree.get(r.branch)?.num_generated > 0;
            decodes |= is_decode;
            ends_prompt |= !is_decode && r.query.is_some();
        }
        self.decode_passes += u64::from(decodes);
        Ok(ends_prompt || (decodes && self.decode_passes.is_multiple_of(self.config.mass_every as u64)))
    }

    /// Adds what each block received in the pass, if that was measured: from branches that found it, not from the one
    /// that computed it. A branch attends most to what it has just said, and that tells nothing of who needs it next.
    pub(super) fn add_mass(&mut self, reserved: &[Reserved], output: &PassOutput) -> Result<()> {
        if output.mass.is_empty() {
            return Ok(());
        }
        self.evictor.mass.begin_measurement();
        for (r, seq) in reserved.iter().zip(&self.batch.seqs) {
            let b = self.tree.get(r.branch)?;
            let num_found = b.num_found / self.layout.block_size;
            let found = b.table.blocks().iter().take(num_found);
            for (&block, &mass) in found.zip(&output.mass[seq.blocks.clone()]) {
                self.evictor.mass.add(block, f64::from(mass));
            }
        }
        Ok(())
    }
}

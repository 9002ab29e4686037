//! The blocks of one branch: append, fork, copy-on-write, truncate. Owns one reference of each block in it; knows
//! neither tokens nor positions. A *KV index* `i` counts a branch's slots from 0; its physical slot is
//! `blocks[i / block_size] * block_size + i % block_size`.
//!
//! ```text
//! block_size 4, len 10     | b0: 0 1 2 3 | b1: 4 5 6 7 | b2: 8 9 - - |     blocks.len() == ceil(len / block_size)
//! fork at 9 shares           b0            b1            b2                 its own len is 9
//! the first of the two to append past its end copies its slots of b2 to a fresh block
//! ```
//!
//! Invariant: a table never hands out a slot of a block that has another owner, be it a table, the prefix cache or the
//! source of a copy under way. An append is open until the step has run: [`commit`](BlockTable::commit) lets go of the
//! copied block, [`rollback`](BlockTable::rollback) undoes the append, the copy-on-write included. Until then the
//! copied block stays referenced, so that nobody reuses or writes it while the device reads it.

use std::ops::Range;

use super::block_pool::{BlockId, BlockPool, BlockState};
use crate::error::{Error, Result};
use crate::kv::BlockCopy;

/// What a step has to do for one append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendPlan {
    /// KV indices of the new rows: `[len before, len after)`. [`BlockTable::push_slots`] turns them into slots.
    pub kv: Range<usize>,
    /// To be done in every layer before the new rows are written.
    pub copy: Option<BlockCopy>,
}

/// An append whose step has not run: what it takes to undo it.
#[derive(Debug)]
struct OpenAppend {
    len: usize,
    num_blocks: usize,
    state: BlockState,
    exact_len: usize,
    /// The former tail block, which a copy replaced; this reference keeps it alive and read-only.
    copied_from: Option<BlockId>,
    /// The state of a tail block that is written in place, before.
    tail_state: Option<BlockState>,
}

/// See the module text. Not `Clone`: [`fork`](Self::fork) counts. Must be emptied before it is dropped.
#[derive(Debug)]
#[must_use = "a table that is dropped before `free` loses its blocks"]
pub struct BlockTable {
    block_size: usize,
    blocks: Vec<BlockId>,
    /// `blocks[i].index()`, in the form that attention plans read.
    indices: Vec<u32>,
    len: usize,
    /// The weakest state of the rows `[0, len)`, and what new rows inherit.
    state: BlockState,
    /// Rows `[0, exact_len)` are exact rows of this branch's own tokens; equals `len` while `state` is exact.
    exact_len: usize,
    open: Option<OpenAppend>,
}

impl BlockTable {
    /// An empty table. `block_size` is at least 1.
    pub fn new(block_size: usize) -> Self {
        debug_assert!(block_size > 0);
        Self {
            block_size: block_size.max(1),
            blocks: Vec::new(),
            indices: Vec::new(),
            len: 0,
            state: BlockState::Exact,
            exact_len: 0,
            open: None,
        }
    }

    /// A table of full blocks, whose references it takes over (from a prefix cache look-up, say). When a handle is
    /// refused, the references stay with the caller.
    pub fn from_blocks(pool: &BlockPool, block_size: usize, blocks: &[BlockId]) -> Result<Self> {
        let mut table = Self::new(block_size);
        let mut state = BlockState::Exact;
        let mut num_exact = 0;
        for (i, &id) in blocks.iter().enumerate() {
            state = state.inherit(pool.state(id)?);
            if state == BlockState::Exact {
                num_exact = i + 1;
            }
        }
        table.len = blocks.len() * table.block_size;
        table.exact_len = num_exact * table.block_size;
        table.state = state;
        table.indices = blocks.iter().map(|id| id.index()).collect();
        table.blocks = blocks.to_vec();
        Ok(table)
    }

    /// A branch that has the first `at` rows of this one, by sharing the blocks of `[0, at)`, the partial one included.
    /// While an append is open, `at` may reach into the rows it adds (a fork that runs in the same step); such a fork
    /// must be cleared before the append is rolled back.
    pub fn fork(&self, pool: &mut BlockPool, at: usize) -> Result<Self> {
        if at > self.len {
            return Err(Error::Internal(format!("block table: fork at {at} of {} rows", self.len)));
        }
        let shared = &self.blocks[..at.div_ceil(self.block_size)];
        pool.retain_all(shared)?;
        let mut table = Self::new(self.block_size);
        table.blocks = shared.to_vec();
        table.indices = self.indices[..shared.len()].to_vec();
        table.len = at;
        table.exact_len = self.exact_len.min(at);
        table.state = if at <= self.exact_len { BlockState::Exact } else { self.state };
        Ok(table)
    }

    /// Fresh blocks an append of `num_new` rows uses: those past the tail, and one to copy a shared partial tail to.
    ///
    /// ```text
    /// [0, len % block_size) of the tail block is copied when the block has another owner
    /// [len, len + num_new)  ends in block ceil((len + num_new) / block_size)
    /// ```
    ///
    /// The answer holds until somebody forks this table, caches its tail or takes such an owner away (which can only
    /// lower it). Opening other appends in between changes nothing: what they copy from stays shared.
    pub fn blocks_needed_for(&self, pool: &BlockPool, num_new: usize) -> Result<usize> {
        if num_new == 0 {
            return Ok(0);
        }
        let copies = usize::from(self.shared_tail(pool)?.is_some());
        Ok((self.len + num_new).div_ceil(self.block_size) - self.blocks.len() + copies)
    }

    /// Appends `num_new` rows, with blocks from the end of `fresh`, and opens the append until
    /// [`commit`](Self::commit) or [`rollback`](Self::rollback). What it does not need stays in `fresh`.
    ///
    /// Take `sum(blocks_needed_for)` of the whole batch first ([`BlockPool::try_take`], which may refuse while nothing
    /// has changed yet); then this cannot fail, except for a broken promise, and then it changes nothing.
    pub fn append(&mut self, pool: &mut BlockPool, fresh: &mut Vec<BlockId>, num_new: usize) -> Result<AppendPlan> {
        self.refuse_open("append")?;
        if num_new == 0 {
            return Ok(AppendPlan { kv: self.len..self.len, copy: None });
        }
        self.check_pool(pool)?;
        let needed = self.blocks_needed_for(pool, num_new)?;
        let Some(kept) = fresh.len().checked_sub(needed) else {
            return Err(Error::Internal(format!("block table: {needed} blocks needed, {} reserved", fresh.len())));
        };
        for &id in &fresh[kept..] {
            if pool.is_shared(id)? {
                return Err(Error::Block { block: id.to_string(), why: "a fresh block has another owner" });
            }
        }
        let copied_from = self.shared_tail(pool)?;
        let mut open = OpenAppend {
            len: self.len,
            num_blocks: self.blocks.len(),
            state: self.state,
            exact_len: self.exact_len,
            copied_from,
            tail_state: None,
        };
        let mut taken = fresh.drain(kept..);
        let mut copy = None;
        let num_tail_slots = self.len % self.block_size;
        if let (Some(src), Some(tail)) = (copied_from, self.blocks.last_mut()) {
            if let Some(dst) = taken.next() {
                pool.set_state(dst, self.state)?;
                copy = Some(BlockCopy { src: src.index(), dst: dst.index(), num_slots: num_tail_slots as u32 });
                *tail = dst;
                self.indices[open.num_blocks - 1] = dst.index();
            }
        } else if let Some(&tail) = self.blocks.last()
            && num_tail_slots > 0
        {
            open.tail_state = Some(pool.state(tail)?);
            pool.set_state(tail, self.state)?;
        }
        for id in taken {
            pool.set_state(id, self.state)?;
            self.blocks.push(id);
            self.indices.push(id.index());
        }
        let kv = self.len..self.len + num_new;
        self.len = kv.end;
        if self.state == BlockState::Exact {
            self.exact_len = kv.end;
        }
        self.open = Some(open);
        Ok(AppendPlan { kv, copy })
    }

    /// Ends an open append whose step has run: the block it copied from loses this owner. Does nothing without one.
    pub fn commit(&mut self, pool: &mut BlockPool) -> Result<()> {
        self.check_pool(pool)?;
        match self.open.take() {
            Some(OpenAppend { copied_from: Some(src), .. }) => pool.release(src),
            _ => Ok(()),
        }
    }

    /// Undoes an open append whose step failed or was cancelled: the table is as it was. Does nothing without one.
    pub fn rollback(&mut self, pool: &mut BlockPool) -> Result<()> {
        self.check_pool(pool)?;
        let Some(open) = self.open.take() else { return Ok(()) };
        // blocks: [0, num_blocks) were there before, the last of them possibly swapped; [num_blocks, ..) are new.
        let first_new = open.num_blocks - usize::from(open.copied_from.is_some());
        let new = self.blocks.split_off(first_new);
        self.indices.truncate(first_new);
        if let Some(src) = open.copied_from {
            self.blocks.push(src);
            self.indices.push(src.index());
        }
        self.len = open.len;
        self.state = open.state;
        self.exact_len = open.exact_len;
        if let (Some(state), Some(&tail)) = (open.tail_state, self.blocks.last()) {
            pool.set_state(tail, state)?;
        }
        pool.release_all(&new)
    }

    /// Says that the rows `[from, ..)` are in `state` or weaker; rows appended later inherit it. Cutting the branch
    /// back to `from` or below lifts it. To be called before anybody else can see those rows: ahead of the append, or
    /// while it is open. Blocks with other owners keep their state, which is about what those owners see.
    pub fn mark(&mut self, pool: &mut BlockPool, from: usize, state: BlockState) -> Result<()> {
        if state == BlockState::Exact {
            return Ok(());
        }
        if self.open.as_ref().is_some_and(|open| from < open.len) {
            return self.refuse_open("mark earlier rows");
        }
        self.check_pool(pool)?;
        self.state = self.state.inherit(state);
        self.exact_len = self.exact_len.min(from);
        for &id in self.blocks.iter().skip(from / self.block_size) {
            if !pool.is_shared(id)? {
                let weaker = pool.state(id)?.inherit(state);
                pool.set_state(id, weaker)?;
            }
        }
        Ok(())
    }

    /// Cuts the branch to its first `len` rows and releases the blocks past them, tail first. Longer than the branch
    /// is no change.
    pub fn truncate(&mut self, pool: &mut BlockPool, len: usize) -> Result<()> {
        self.refuse_open("truncate")?;
        if len > self.len {
            return Ok(());
        }
        self.check_pool(pool)?;
        let cut = self.blocks.split_off(len.div_ceil(self.block_size));
        self.indices.truncate(self.blocks.len());
        self.len = len;
        if len <= self.exact_len {
            self.state = BlockState::Exact;
            self.exact_len = len;
        }
        pool.release_all(&cut)
    }

    /// Releases every block, tail first; an open append is rolled back. The table is then as [`new`](Self::new) made
    /// it.
    pub fn clear(&mut self, pool: &mut BlockPool) -> Result<()> {
        self.rollback(pool)?;
        self.truncate(pool, 0)
    }

    /// The end of a branch: [`clear`](Self::clear) for good. Refused (with a pool that is not its own), it loses the
    /// blocks.
    pub fn free(mut self, pool: &mut BlockPool) -> Result<()> {
        let freed = self.clear(pool);
        self.blocks.clear();
        freed
    }

    /// Rows, appended ones included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Rows per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The blocks, in KV order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The blocks' indices, in KV order: what an attention plan takes.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The weakest state of all rows, which new rows inherit.
    pub fn state(&self) -> BlockState {
        self.state
    }

    /// The leading rows that are exact rows of this branch's own tokens.
    pub fn exact_len(&self) -> usize {
        self.exact_len
    }

    /// The leading full blocks that hold exact rows of this branch's own tokens: what the prefix cache may be given.
    /// Of an open append only what was there before: its rows are not written yet.
    pub fn cacheable_blocks(&self) -> &[BlockId] {
        let exact_len = self.open.as_ref().map_or(self.exact_len, |open| open.exact_len.min(self.exact_len));
        &self.blocks[..exact_len / self.block_size]
    }

    /// The block that an open append copies from: referenced by this table though not in it.
    pub fn copied_from(&self) -> Option<BlockId> {
        self.open.as_ref().and_then(|open| open.copied_from)
    }

    /// The physical slot of KV index `i`, or `None` past the end.
    pub fn slot(&self, i: usize) -> Option<u32> {
        let block = (i < self.len).then(|| self.indices[i / self.block_size])?;
        Some(block * self.block_size as u32 + (i % self.block_size) as u32)
    }

    /// Appends the physical slots of `kv` to `slots`; stops at the end of the branch.
    pub fn push_slots(&self, kv: Range<usize>, slots: &mut Vec<u32>) {
        slots.extend(kv.map_while(|i| self.slot(i)));
    }

    /// Blocks that have another owner too.
    pub fn num_shared_blocks(&self, pool: &BlockPool) -> Result<usize> {
        self.blocks.iter().try_fold(0, |n, &id| Ok(n + usize::from(pool.is_shared(id)?)))
    }

    /// Blocks that only this table owns: what preempting the branch would bring.
    pub fn num_private_blocks(&self, pool: &BlockPool) -> Result<usize> {
        Ok(self.blocks.len() - self.num_shared_blocks(pool)?)
    }

    /// Verifies that the blocks cover the rows exactly, are live, and agree with [`indices`](Self::indices), and that
    /// everything an open append writes has no other owner.
    pub fn check_integrity(&self, pool: &BlockPool) -> Result<()> {
        let fail = |why: String| Err(Error::Internal(format!("block table: {why}")));
        if self.blocks.len() != self.len.div_ceil(self.block_size) {
            return fail(format!("{} blocks for {} rows", self.blocks.len(), self.len));
        }
        if !self.blocks.iter().map(|id| id.index()).eq(self.indices.iter().copied()) {
            return fail(format!("indices {:?} of blocks {:?}", self.indices, self.blocks));
        }
        // All rows may be exact under a weaker state: the mark came ahead of its first row.
        if self.exact_len > self.len || (self.state == BlockState::Exact && self.exact_len < self.len) {
            return fail(format!("{:?} with {} of {} rows exact", self.state, self.exact_len, self.len));
        }
        for &id in self.blocks.iter().chain(self.copied_from().iter()) {
            pool.ref_count(id)?;
        }
        if let Some(open) = &self.open {
            for &id in &self.blocks[open.len / self.block_size..] {
                if pool.is_shared(id)? {
                    return fail(format!("block {id} is written and shared"));
                }
            }
        }
        Ok(())
    }

    /// The tail block, when it is partial and has another owner: the next append copies it.
    pub fn shared_tail(&self, pool: &BlockPool) -> Result<Option<BlockId>> {
        match self.blocks.last() {
            Some(&tail) if !self.len.is_multiple_of(self.block_size) && pool.is_shared(tail)? => Ok(Some(tail)),
            _ => Ok(None),
        }
    }

    fn refuse_open(&self, what: &str) -> Result<()> {
        match self.open {
            None => Ok(()),
            Some(_) => Err(Error::Internal(format!("block table: {what} during an append"))),
        }
    }

    /// Refuses a foreign pool before anything has changed.
    fn check_pool(&self, pool: &BlockPool) -> Result<()> {
        self.blocks.first().map_or(Ok(()), |&id| pool.ref_count(id).map(|_| ()))
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        debug_assert!(
            self.blocks.is_empty() || std::thread::panicking(),
            "a block table of {} blocks was dropped before it was freed",
            self.blocks.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::test_rng::Rng;

    const BS: usize = 4;

    fn append(table: &mut BlockTable, pool: &mut BlockPool, n: usize) -> AppendPlan {
        let mut fresh = pool.try_take(table.blocks_needed_for(pool, n).unwrap()).unwrap();
        let plan = table.append(pool, &mut fresh, n).unwrap();
        assert!(fresh.is_empty());
        table.check_integrity(pool).unwrap();
        plan
    }

    fn table_of(pool: &mut BlockPool, len: usize) -> BlockTable {
        let mut table = BlockTable::new(BS);
        append(&mut table, pool, len);
        table.commit(pool).unwrap();
        table
    }

    #[test]
    fn slots_run_through_blocks_in_order() {
        let mut pool = BlockPool::new(4);
        let mut table = table_of(&mut pool, 3);
        let plan = append(&mut table, &mut pool, 4);
        assert_eq!(plan, AppendPlan { kv: 3..7, copy: None });
        let mut slots = Vec::new();
        table.push_slots(plan.kv, &mut slots);
        assert_eq!(slots, [3, 4, 5, 6]);
        assert_eq!((table.slot(6), table.slot(7)), (Some(6), None));
        assert_eq!(table.indices(), [0, 1]);
        table.free(&mut pool).unwrap();
        assert_eq!(pool.num_free(), 4);
    }

    #[test]
    fn fork_of_full_block_does_not_copy() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 8);
        let mut b = a.fork(&mut pool, 8).unwrap();
        assert_eq!((b.num_shared_blocks(&pool).unwrap(), b.num_private_blocks(&pool).unwrap()), (2, 0));
        assert_eq!(append(&mut a, &mut pool, 1).copy, None);
        assert_eq!(append(&mut b, &mut pool, 1).copy, None);
        assert_eq!(pool.num_free(), 0);
        a.free(&mut pool).unwrap();
        b.free(&mut pool).unwrap();
        assert_eq!(pool.num_free(), 4);
    }

    #[test]
    fn fork_inside_a_block_copies_once_and_the_last_owner_writes_in_place() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 7);
        let mut b = a.fork(&mut pool, 6).unwrap();
        let old_tail = a.blocks()[1];
        let plan = append(&mut a, &mut pool, 1);
        assert_eq!(plan.copy, Some(BlockCopy { src: old_tail.index(), dst: a.indices()[1], num_slots: 3 }));
        a.commit(&mut pool).unwrap();
        assert_eq!(append(&mut b, &mut pool, 1).copy, None);
        assert_eq!(b.blocks()[1], old_tail);
        a.free(&mut pool).unwrap();
        b.free(&mut pool).unwrap();
    }

    #[test]
    fn source_of_a_copy_outlives_the_step_and_is_not_written_in_it() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 2);
        let mut b = a.fork(&mut pool, 2).unwrap();
        let src = a.blocks()[0];
        let reserved = a.blocks_needed_for(&pool, 1).unwrap() + b.blocks_needed_for(&pool, 1).unwrap();
        let mut fresh = pool.try_take(reserved).unwrap();
        let plan_a = a.append(&mut pool, &mut fresh, 1).unwrap();
        // Both copy: whether B writes in place must not depend on A having been appended first.
        let plan_b = b.append(&mut pool, &mut fresh, 1).unwrap();
        assert!(plan_a.copy.is_some() && plan_b.copy.is_some() && fresh.is_empty());
        assert_eq!(pool.ref_count(src).unwrap(), 2);
        a.commit(&mut pool).unwrap();
        assert_eq!(pool.ref_count(src).unwrap(), 1);
        b.commit(&mut pool).unwrap();
        assert!(pool.ref_count(src).is_err());
        a.free(&mut pool).unwrap();
        b.free(&mut pool).unwrap();
        assert_eq!(pool.num_free(), 4);
    }

    #[test]
    fn rollback_brings_the_shared_tail_back() {
        let mut pool = BlockPool::new(6);
        let mut a = table_of(&mut pool, 6);
        let b = a.fork(&mut pool, 6).unwrap();
        let before = (a.blocks().to_vec(), a.indices().to_vec(), pool.num_free());
        append(&mut a, &mut pool, 7);
        assert_eq!(pool.num_free(), 1);
        a.rollback(&mut pool).unwrap();
        assert_eq!((a.blocks().to_vec(), a.indices().to_vec(), pool.num_free()), before);
        assert_eq!((a.len(), a.num_shared_blocks(&pool).unwrap()), (6, 2));
        a.rollback(&mut pool).unwrap();
        a.check_integrity(&pool).unwrap();
        a.free(&mut pool).unwrap();
        b.free(&mut pool).unwrap();
    }

    #[test]
    fn clear_during_an_append_lets_go_of_both_tails() {
        let mut pool = BlockPool::new(6);
        let mut a = table_of(&mut pool, 6);
        let b = a.fork(&mut pool, 5).unwrap();
        append(&mut a, &mut pool, 1);
        a.clear(&mut pool).unwrap();
        assert!(a.is_empty() && a.copied_from().is_none());
        b.free(&mut pool).unwrap();
        assert_eq!(pool.num_free(), 6);
    }

    #[test]
    fn truncate_into_a_shared_block_copies_on_the_next_append() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 8);
        let b = a.fork(&mut pool, 8).unwrap();
        a.truncate(&mut pool, 5).unwrap();
        a.truncate(&mut pool, 100).unwrap();
        assert_eq!(a.len(), 5);
        assert_eq!(append(&mut a, &mut pool, 1).copy.map(|c| c.num_slots), Some(1));
        a.free(&mut pool).unwrap();
        b.free(&mut pool).unwrap();
    }

    #[test]
    fn unreserved_append_fork_past_the_end_and_a_second_append_change_nothing() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 4);
        assert!(matches!(a.append(&mut pool, &mut vec![], 1), Err(Error::Internal(_))));
        assert!(matches!(a.fork(&mut pool, 5), Err(Error::Internal(_))));
        append(&mut a, &mut pool, 1);
        let mut fresh = pool.try_take(2).unwrap();
        assert!(a.append(&mut pool, &mut fresh, 1).is_err());
        assert!(a.truncate(&mut pool, 1).is_err());
        assert_eq!((a.len(), fresh.len()), (5, 2));
        a.commit(&mut pool).unwrap();
        pool.release_all(&fresh).unwrap();
        let mut other = BlockPool::new(4);
        let mut foreign = other.try_take(4).unwrap();
        assert!(matches!(a.append(&mut pool, &mut foreign, 7), Err(Error::Block { .. })));
        assert!(matches!(a.append(&mut other, &mut foreign, 7), Err(Error::Block { .. })));
        assert!(matches!(a.clear(&mut other), Err(Error::Block { .. })));
        a.check_integrity(&pool).unwrap();
        a.free(&mut pool).unwrap();
    }

    #[test]
    fn fork_of_an_open_append_sees_its_rows_and_is_undone_before_it() {
        let mut pool = BlockPool::new(8);
        let mut a = table_of(&mut pool, 4);
        let mut fresh = pool.try_take(a.blocks_needed_for(&pool, 2).unwrap()).unwrap();
        a.append(&mut pool, &mut fresh, 2).unwrap();
        let mut b = a.fork(&mut pool, 6).unwrap();
        assert_eq!(b.blocks(), a.blocks());
        let mut fresh = pool.try_take(b.blocks_needed_for(&pool, 1).unwrap()).unwrap();
        assert_eq!(b.append(&mut pool, &mut fresh, 1).unwrap().copy.map(|c| c.num_slots), Some(2));
        b.clear(&mut pool).unwrap();
        a.rollback(&mut pool).unwrap();
        assert_eq!((a.len(), pool.num_free()), (4, 7));
        pool.check_integrity().unwrap();
        a.free(&mut pool).unwrap();
    }

    #[test]
    fn over_reserved_blocks_stay_with_the_caller() {
        let mut pool = BlockPool::new(4);
        let mut a = table_of(&mut pool, 2);
        let b = a.fork(&mut pool, 2).unwrap();
        let mut fresh = pool.try_take(a.blocks_needed_for(&pool, 1).unwrap()).unwrap();
        b.free(&mut pool).unwrap();
        assert_eq!(a.append(&mut pool, &mut fresh, 1).unwrap().copy, None);
        assert_eq!(fresh.len(), 1);
        pool.release_all(&fresh).unwrap();
        a.free(&mut pool).unwrap();
    }

    #[test]
    fn marked_rows_pass_their_state_on_and_leave_the_cacheable_run() {
        let mut pool = BlockPool::new(8);
        let mut a = table_of(&mut pool, 9);
        a.mark(&mut pool, 9, BlockState::River).unwrap();
        append(&mut a, &mut pool, 1);
        a.commit(&mut pool).unwrap();
        append(&mut a, &mut pool, 4);
        a.commit(&mut pool).unwrap();
        let states: Vec<_> = a.blocks().iter().map(|&b| pool.state(b).unwrap()).collect();
        assert_eq!(states, [BlockState::Exact, BlockState::Exact, BlockState::River, BlockState::River]);
        assert_eq!(a.cacheable_blocks().len(), 2);
        let exact = a.fork(&mut pool, 9).unwrap();
        let river = a.fork(&mut pool, 10).unwrap();
        assert_eq!((exact.state(), river.state()), (BlockState::Exact, BlockState::River));
        a.truncate(&mut pool, 9).unwrap();
        assert_eq!(a.state(), BlockState::Exact);
        // The copy holds the exact row only.
        append(&mut a, &mut pool, 3);
        assert_eq!(pool.state(a.blocks()[2]).unwrap(), BlockState::Exact);
        a.commit(&mut pool).unwrap();
        assert_eq!(a.cacheable_blocks().len(), 3);
        for t in [a, exact, river] {
            t.free(&mut pool).unwrap();
        }
    }

    #[test]
    fn rollback_takes_the_mark_of_the_failed_step_back() {
        let mut pool = BlockPool::new(8);
        let mut a = table_of(&mut pool, 5);
        append(&mut a, &mut pool, 6);
        assert_eq!(a.cacheable_blocks().len(), 1);
        a.mark(&mut pool, 5, BlockState::River).unwrap();
        assert_eq!(pool.state(a.blocks()[1]).unwrap(), BlockState::River);
        a.rollback(&mut pool).unwrap();
        assert_eq!((a.state(), pool.state(a.blocks()[1]).unwrap()), (BlockState::Exact, BlockState::Exact));
        a.free(&mut pool).unwrap();
    }

    #[test]
    fn random_walk_of_forks_and_appends_brings_all_blocks_home() {
        for seed in 0..50 {
            let mut rng = Rng(seed);
            let mut pool = BlockPool::new(40);
            let mut tables = vec![BlockTable::new(BS)];
            for _ in 0..300 {
                let i = rng.below(tables.len());
                match rng.below(5) {
                    0 if tables.len() < 8 => {
                        let at = rng.below(tables[i].len() + 1);
                        let fork = tables[i].fork(&mut pool, at).unwrap();
                        tables.push(fork);
                    }
                    1 if tables.len() > 1 => tables.swap_remove(i).free(&mut pool).unwrap(),
                    2 => {
                        let len = rng.below(tables[i].len() + 1);
                        tables[i].truncate(&mut pool, len).unwrap();
                    }
                    _ => {
                        let n = 1 + rng.below(6);
                        let needed = tables[i].blocks_needed_for(&pool, n).unwrap();
                        if let Some(mut fresh) = pool.try_take(needed) {
                            let before = (tables[i].blocks().to_vec(), tables[i].len());
                            tables[i].append(&mut pool, &mut fresh, n).unwrap();
                            tables[i].check_integrity(&pool).unwrap();
                            if rng.below(3) == 0 {
                                tables[i].rollback(&mut pool).unwrap();
                                assert_eq!((tables[i].blocks().to_vec(), tables[i].len()), before, "seed {seed}");
                            }
                            tables[i].commit(&mut pool).unwrap();
                        }
                    }
                }
                pool.check_integrity().unwrap();
                tables.iter().for_each(|t| t.check_integrity(&pool).unwrap());
            }
            tables.into_iter().for_each(|t| t.free(&mut pool).unwrap());
            assert_eq!(pool.num_free(), 40, "seed {seed}");
        }
    }
}

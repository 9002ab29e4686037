//! Who owns which KV block: a free list, reference counts and states. Knows neither tokens nor branches.
//!
//! Invariants: free + referenced blocks == total; a block is in the free list exactly when its count is zero; a block
//! with `ref_count > 1` is read-only for everybody. "Not now" is `None`; a handle that was freed, or that belongs to
//! another pool, is refused with [`Error::Block`] and changes nothing.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// A number no other pool or prefix cache of this process has, so that a foreign handle is always told from an own one.
pub(super) fn next_owner() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Handle to a block of one pool. It dies when the block's last owner releases it, even if the block is taken again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId {
    index: u32,
    generation: u32,
    pool: u32,
}

impl BlockId {
    /// Position of the block in the cache; what kernels and attention plans use. Not checked against anything.
    pub const fn index(self) -> u32 {
        self.index
    }

    /// How often the block had been freed when it was taken. Wraps after 2^32 reuses of one block.
    pub const fn generation(self) -> u32 {
        self.generation
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockId({self} of pool {})", self.pool)
    }
}

/// How the rows of a block came to be, strongest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockState {
    /// Computed by every layer, attending to exact rows only. The only state the prefix cache keeps.
    #[default]
    Exact,
    /// Some layer was skipped, here or in a row attended to.
    River,
    /// Slots were dropped, here or before.
    Compacted,
    /// Stands in for KV of other tokens, or attended to such.
    Aliased,
}

impl BlockState {
    /// The weaker of the two: the state of rows in state `self` that attended to rows in state `other`.
    #[must_use]
    pub fn inherit(self, other: Self) -> Self {
        self.max(other)
    }
}

#[derive(Clone, Debug)]
struct BlockMeta {
    generation: u32,
    ref_count: u32,
    state: BlockState,
}

/// All blocks of one KV cache.
#[derive(Debug)]
pub struct BlockPool {
    id: u32,
    meta: Vec<BlockMeta>,
    /// A stack. Owners release tail first, so that the next taker gets a freed table's blocks in table order.
    free: Vec<u32>,
    peak_in_use: usize,
    /// Blocks given back so far.
    num_freed: u64,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks. A slot number is a `u32`: `num_blocks * block_size` must not exceed 2^32.
    pub fn new(num_blocks: usize) -> Self {
        debug_assert!(u32::try_from(num_blocks).is_ok());
        let num_blocks = num_blocks.min(u32::MAX as usize);
        Self {
            id: next_owner(),
            meta: vec![BlockMeta { generation: 0, ref_count: 0, state: BlockState::Exact }; num_blocks],
            free: (0..num_blocks as u32).rev().collect(),
            peak_in_use: 0,
            num_freed: 0,
        }
    }

    /// Takes `n` blocks, exact and with one owner each, or none at all. Taking 0 always succeeds.
    #[must_use = "blocks that nobody releases are lost"]
    pub fn try_take(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let keep = self.free.len().checked_sub(n)?;
        let taken = self.free.drain(keep..).rev();
        let meta = &mut self.meta;
        let blocks = taken
            .map(|index| {
                let block = &mut meta[index as usize];
                block.ref_count = 1;
                block.state = BlockState::Exact;
                BlockId { index, generation: block.generation, pool: self.id }
            })
            .collect();
        self.peak_in_use = self.peak_in_use.max(self.meta.len() - keep);
        Some(blocks)
    }

    /// Blocks given back since the pool was made.
    pub fn num_freed(&self) -> u64 {
        self.num_freed
    }

    /// Adds an owner.
    pub fn retain(&mut self, id: BlockId) -> Result<()> {
        let block = self.get_mut(id)?;
        block.ref_count = block.ref_count.checked_add(1).ok_or_else(|| refuse(id, "too many owners"))?;
        Ok(())
    }

    /// Adds an owner to each of `ids`, or to none when one of them is refused.
    pub fn retain_all(&mut self, ids: &[BlockId]) -> Result<()> {
        for (i, &id) in ids.iter().enumerate() {
            if let Err(why) = self.retain(id) {
                self.release_all(&ids[..i])?;
                return Err(why);
            }
        }
        Ok(())
    }

    /// Takes an owner away; the last one frees the block at once and ends every copy of the handle.
    pub fn release(&mut self, id: BlockId) -> Result<()> {
        let block = self.get_mut(id)?;
        block.ref_count -= 1;
        if block.ref_count == 0 {
            block.generation = block.generation.wrapping_add(1);
            self.free.push(id.index);
            self.num_freed += 1;
        }
        Ok(())
    }

    /// Releases `ids` from the last to the first. Stops at the first one that is refused.
    pub fn release_all(&mut self, ids: &[BlockId]) -> Result<()> {
        ids.iter().rev().try_for_each(|&id| self.release(id))
    }

    /// Owners of the block.
    pub fn ref_count(&self, id: BlockId) -> Result<u32> {
        Ok(self.get(id)?.ref_count)
    }

    /// Whether the block has more than one owner, and so must not be written.
    pub fn is_shared(&self, id: BlockId) -> Result<bool> {
        Ok(self.get(id)?.ref_count > 1)
    }

    /// How the block's rows came to be.
    pub fn state(&self, id: BlockId) -> Result<BlockState> {
        Ok(self.get(id)?.state)
    }

    /// Says how the block's rows came to be.
    pub fn set_state(&mut self, id: BlockId, state: BlockState) -> Result<()> {
        self.get_mut(id)?.state = state;
        Ok(())
    }

    /// Blocks nobody owns.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn num_blocks(&self) -> usize {
        self.meta.len()
    }

    /// Blocks somebody owns.
    pub fn num_in_use(&self) -> usize {
        self.meta.len() - self.free.len()
    }

    /// The most blocks that were ever in use at once.
    pub fn peak_in_use(&self) -> usize {
        self.peak_in_use
    }

    /// Lets [`peak_in_use`](Self::peak_in_use) start over from what is in use now.
    pub fn reset_peak(&mut self) {
        self.peak_in_use = self.num_in_use();
    }

    /// Verifies that free + referenced == total, that no block is free twice, and that none is free and referenced.
    pub fn check_integrity(&self) -> Result<()> {
        let mut is_free = vec![false; self.meta.len()];
        for &index in &self.free {
            match is_free.get_mut(index as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::Internal(format!("block pool: block {index} is twice in the free list"))),
            }
        }
        for (index, (meta, is_free)) in self.meta.iter().zip(is_free).enumerate() {
            if is_free != (meta.ref_count == 0) {
                let why = format!("block pool: block {index} has {} owners, is free: {is_free}", meta.ref_count);
                return Err(Error::Internal(why));
            }
        }
        Ok(())
    }

    fn get(&self, id: BlockId) -> Result<&BlockMeta> {
        self.check(id).map(|()| &self.meta[id.index as usize])
    }

    fn get_mut(&mut self, id: BlockId) -> Result<&mut BlockMeta> {
        self.check(id).map(|()| &mut self.meta[id.index as usize])
    }

    fn check(&self, id: BlockId) -> Result<()> {
        if id.pool != self.id {
            return Err(refuse(id, "the handle belongs to another pool"));
        }
        match self.meta.get(id.index as usize) {
            Some(meta) if meta.generation == id.generation && meta.ref_count > 0 => Ok(()),
            _ => Err(refuse(id, "the handle was released")),
        }
    }
}

fn refuse(id: BlockId, why: &'static str) -> Error {
    Error::Block { block: id.to_string(), why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::test_rng::Rng;

    #[test]
    fn take_is_all_or_nothing() {
        let mut pool = BlockPool::new(3);
        assert!(pool.try_take(4).is_none());
        assert_eq!((pool.num_free(), pool.peak_in_use()), (3, 0));
        let blocks = pool.try_take(3).unwrap();
        assert!(pool.try_take(1).is_none());
        assert_eq!(pool.try_take(0), Some(vec![]));
        pool.release_all(&blocks).unwrap();
        assert_eq!((pool.num_free(), pool.peak_in_use()), (3, 3));
    }

    #[test]
    fn released_table_is_taken_again_in_table_order() {
        let mut pool = BlockPool::new(4);
        let first = pool.try_take(4).unwrap();
        pool.release_all(&first).unwrap();
        let second = pool.try_take(4).unwrap();
        let indices = |blocks: &[BlockId]| blocks.iter().map(|b| b.index()).collect::<Vec<_>>();
        assert_eq!(indices(&first), [0, 1, 2, 3]);
        assert_eq!(indices(&second), [0, 1, 2, 3]);
    }

    #[test]
    fn stale_foreign_and_double_release_are_refused_and_change_nothing() {
        let (mut pool, mut other) = (BlockPool::new(2), BlockPool::new(2));
        let a = pool.try_take(1).unwrap()[0];
        let foreign = other.try_take(1).unwrap()[0];
        assert_eq!((a.index(), a.generation()), (foreign.index(), foreign.generation()));
        assert!(matches!(pool.release(foreign), Err(Error::Block { .. })));
        pool.release(a).unwrap();
        assert!(matches!(pool.release(a), Err(Error::Block { .. })));
        let again = pool.try_take(1).unwrap()[0];
        assert_eq!(again.index(), a.index());
        for refused in [a, foreign] {
            assert!(matches!(pool.retain(refused), Err(Error::Block { .. })));
            assert!(matches!(pool.ref_count(refused), Err(Error::Block { .. })));
            assert!(matches!(pool.set_state(refused, BlockState::River), Err(Error::Block { .. })));
        }
        assert_eq!(pool.ref_count(again).unwrap(), 1);
        assert_eq!(pool.state(again).unwrap(), BlockState::Exact);
        pool.check_integrity().unwrap();
    }

    #[test]
    fn retain_all_with_a_stale_handle_retains_none() {
        let mut pool = BlockPool::new(2);
        let blocks = pool.try_take(2).unwrap();
        pool.release(blocks[1]).unwrap();
        assert!(pool.retain_all(&blocks).is_err());
        assert_eq!(pool.ref_count(blocks[0]).unwrap(), 1);
    }

    #[test]
    fn inherited_state_is_the_weaker_one_and_a_new_block_is_exact() {
        use BlockState::*;
        assert_eq!(Exact.inherit(River), River);
        assert_eq!(Aliased.inherit(Exact), Aliased);
        assert_eq!(River.inherit(Compacted), Compacted);
        let mut pool = BlockPool::new(1);
        let a = pool.try_take(1).unwrap()[0];
        pool.set_state(a, Aliased).unwrap();
        pool.release(a).unwrap();
        let b = pool.try_take(1).unwrap()[0];
        assert_eq!(pool.state(b).unwrap(), Exact);
    }

    #[test]
    fn random_walk_keeps_free_plus_referenced_at_total() {
        for seed in 0..50 {
            let mut rng = Rng(seed);
            let mut pool = BlockPool::new(17);
            let mut held: Vec<BlockId> = Vec::new();
            let mut dead: Vec<BlockId> = Vec::new();
            for _ in 0..400 {
                match rng.below(3) {
                    0 => {
                        let n = rng.below(5);
                        match pool.try_take(n) {
                            Some(blocks) => held.extend(blocks),
                            None => assert!(n > pool.num_free()),
                        }
                    }
                    1 if !held.is_empty() => {
                        let id = held[rng.below(held.len())];
                        pool.retain(id).unwrap();
                        held.push(id);
                    }
                    _ if !held.is_empty() => {
                        let id = held.swap_remove(rng.below(held.len()));
                        pool.release(id).unwrap();
                        if !held.contains(&id) {
                            dead.push(id);
                        }
                    }
                    _ => {}
                }
                pool.check_integrity().unwrap();
                for &id in &held {
                    assert_eq!(pool.ref_count(id).unwrap() as usize, held.iter().filter(|&&h| h == id).count());
                }
                assert!(dead.iter().all(|&id| pool.ref_count(id).is_err()), "seed {seed}");
            }
            held.drain(..).for_each(|id| pool.release(id).unwrap());
            assert_eq!(pool.num_free(), 17);
        }
    }
}

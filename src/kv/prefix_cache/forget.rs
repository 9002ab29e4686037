//! Taking a path out of the cache before its time.

use super::{PrefixCache, Result};
use crate::kv::block_pool::{BlockId, BlockPool};

impl PrefixCache {
    /// Drops what is cached of `tokens`, from the last block back to the first that is locked or owned by anybody but the
    /// cache and the one who holds `own`. Returns how many blocks the cache gave up.
    ///
    /// Paths of others may lead through such a block when theirs, of the same tokens, came second: they are dropped with
    /// it, and come back when their branches offer them again.
    pub fn forget(&mut self, salt: u64, tokens: &[u32], own: &[BlockId], pool: &mut BlockPool) -> Result<usize> {
        let mut path = Vec::new();
        let mut hash = salt;
        for block_tokens in tokens.chunks_exact(self.block_size) {
            hash = (self.hasher)(hash, block_tokens);
            let Some((idx, block)) = self.find(path.last().map(|&(idx, _)| idx), salt, hash, block_tokens) else {
                break;
            };
            path.push((idx, block));
        }
        let mut num_forgotten = 0;
        for (idx, block) in path.into_iter().rev() {
            if pool.ref_count(block)? > 1 + u32::from(own.contains(&block)) {
                break;
            }
            let subtree = self.subtree(idx);
            if subtree.iter().any(|&i| self.node(i).is_some_and(|node| node.num_locks > 0)) {
                break;
            }
            for i in subtree.into_iter().rev() {
                let Some(block) = self.node(i).map(|node| node.block) else { continue };
                self.remove(i);
                pool.release(block)?;
                num_forgotten += 1;
            }
        }
        Ok(num_forgotten)
    }

    /// The node and all below it, parents first.
    fn subtree(&self, idx: u32) -> Vec<u32> {
        let mut subtree = vec![idx];
        let mut at = 0;
        while let Some(&parent) = subtree.get(at) {
            if self.node(parent).is_some_and(|node| node.num_children > 0) {
                subtree.extend(self.nodes().filter(|(_, node)| node.parent == Some(parent)).map(|(i, _)| i));
            }
            at += 1;
        }
        subtree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BS: usize = 4;

    /// One branch of three blocks of ones, and one that leaves it after the first.
    fn fork() -> (BlockPool, PrefixCache, Vec<BlockId>, Vec<BlockId>) {
        let (mut pool, mut cache) = (BlockPool::new(8), PrefixCache::new(BS));
        let a = pool.try_take(3).unwrap();
        cache.insert(0, &[1; 12], &a, &mut pool).unwrap();
        let b = pool.try_take(1).unwrap();
        pool.retain(a[0]).unwrap();
        cache.insert(0, &[1, 1, 1, 1, 2, 2, 2, 2], &[a[0], b[0]], &mut pool).unwrap();
        (pool, cache, a, b)
    }

    #[test]
    fn a_path_goes_back_to_where_another_leaves_it() {
        let (mut pool, mut cache, a, b) = fork();
        assert_eq!(cache.forget(0, &[1; 13], &a, &mut pool).unwrap(), 2);
        cache.check_integrity(&pool).unwrap();
        assert!(cache.contains(a[0]) && cache.contains(b[0]) && !cache.contains(a[1]) && !cache.contains(a[2]));
        pool.release_all(&a[1..]).unwrap();
        assert_eq!(pool.num_in_use(), 2, "what was forgotten returns with its owner");
        // The other branch still holds the first block; when it alone does, that goes with its own.
        assert_eq!(cache.forget(0, &[1; 4], &a, &mut pool).unwrap(), 0);
        pool.release(a[0]).unwrap();
        assert_eq!(cache.forget(0, &[1, 1, 1, 1, 2, 2, 2, 2], &[a[0], b[0]], &mut pool).unwrap(), 2);
        assert!(cache.is_empty());
    }

    #[test]
    fn a_path_that_came_second_goes_with_the_block_it_leads_through() {
        let (mut pool, mut cache) = (BlockPool::new(8), PrefixCache::new(BS));
        let (a, b) = (pool.try_take(1).unwrap(), pool.try_take(2).unwrap());
        cache.insert(0, &[1; 4], &a, &mut pool).unwrap();
        cache.insert(0, &[1; 8], &b, &mut pool).unwrap();
        assert!(cache.contains(a[0]) && !cache.contains(b[0]) && cache.contains(b[1]));
        assert_eq!(cache.forget(0, &[1; 4], &a, &mut pool).unwrap(), 2);
        pool.release_all(&a).unwrap();
        assert_eq!((cache.len(), pool.num_in_use()), (0, 2));
        cache.insert(0, &[1; 8], &b, &mut pool).unwrap();
        assert_eq!(cache.len(), 2);
        cache.check_integrity(&pool).unwrap();
    }

    #[test]
    fn what_somebody_else_holds_or_locks_stays() {
        let (mut pool, mut cache, a, _) = fork();
        pool.retain(a[2]).unwrap();
        assert_eq!(cache.forget(0, &[1; 12], &a, &mut pool).unwrap(), 0);
        pool.release(a[2]).unwrap();
        assert_eq!(cache.forget(0, &[1; 12], &[], &mut pool).unwrap(), 0, "held, and not by the one who asks");
        assert_eq!(cache.forget(1, &[1; 12], &a, &mut pool).unwrap(), 0, "another salt");
        let lock = cache.lock(0, &[1; 12]).unwrap();
        assert_eq!(cache.forget(0, &[1; 12], &a, &mut pool).unwrap(), 0);
        cache.unlock(lock).unwrap();
        assert_eq!(cache.forget(0, &[1; 12], &a, &mut pool).unwrap(), 2);
        cache.check_integrity(&pool).unwrap();
    }
}

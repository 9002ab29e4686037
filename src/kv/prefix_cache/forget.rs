//! Taking a path out of the cache before its time.

use super::{PrefixCache, Result};
use crate::kv::block_pool::{BlockId, BlockPool};

impl PrefixCache {
    /// Drops what is cached of `tokens`, from the last block back to the first that is locked, has another block behind
    /// it, or is owned by anybody but the cache and the one who holds `own`. Returns how many blocks the cache gave up.
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
            let owners = 1 + u32::from(own.contains(&block));
            if !self.node(idx).is_some_and(|node| node.is_free_leaf()) || pool.ref_count(block)? > owners {
                break;
            }
            self.remove(idx);
            pool.release(block)?;
            num_forgotten += 1;
        }
        Ok(num_forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BS: usize = 4;

    /// `(held blocks, cache)`: three blocks of ones, and two that leave them after the first.
    fn fork() -> (BlockPool, PrefixCache, Vec<BlockId>, Vec<BlockId>) {
        let (mut pool, mut cache) = (BlockPool::new(8), PrefixCache::new(BS));
        let a = pool.try_take(3).unwrap();
        cache.insert(0, &[1; 12], &a, &mut pool).unwrap();
        let b = pool.try_take(1).unwrap();
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
        // The other path still needs the first block; when that is gone, it goes.
        assert_eq!(cache.forget(0, &[1; 4], &a, &mut pool).unwrap(), 0);
        assert_eq!(cache.forget(0, &[1, 1, 1, 1, 2, 2, 2, 2], &[a[0], b[0]], &mut pool).unwrap(), 2);
        assert!(cache.is_empty());
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

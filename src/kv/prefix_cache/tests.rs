//! Look-ups, insertions, evictions and locks one by one, and a random walk over all of them.

use super::*;
use crate::kv::test_rng::Rng;

const BS: usize = 4;

fn lru() -> Evictor {
    Evictor::new(Eviction::Lru, 0, 1.0)
}

/// Takes blocks for `tokens`, caches them, and lets go of them: afterwards the cache alone owns what is new.
fn cache(cache: &mut PrefixCache, pool: &mut BlockPool, salt: u64, tokens: &[u32]) -> Vec<BlockId> {
    let blocks = pool.try_take(tokens.len() / BS).unwrap();
    cache.insert(salt, tokens, &blocks, pool).unwrap();
    pool.release_all(&blocks).unwrap();
    cache.check_integrity(pool).unwrap();
    blocks
}

fn hits(cache: &mut PrefixCache, pool: &mut BlockPool, salt: u64, tokens: &[u32]) -> Vec<BlockId> {
    let blocks = cache.lookup(salt, tokens, usize::MAX, pool).unwrap();
    pool.release_all(&blocks).unwrap();
    cache.check_integrity(pool).unwrap();
    blocks
}

#[test]
fn lookup_retains_the_longest_run_of_full_blocks() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let tokens: Vec<u32> = (0..13).collect();
    let blocks = cache(&mut c, &mut pool, 0, &tokens);
    assert_eq!(c.len(), 3);
    let found = c.lookup(0, &tokens, 100, &mut pool).unwrap();
    assert_eq!(found, blocks);
    assert_eq!(pool.ref_count(found[2]).unwrap(), 2);
    pool.release_all(&found).unwrap();
    let mut other = tokens.clone();
    other[9] = 99;
    assert_eq!(hits(&mut c, &mut pool, 0, &other), blocks[..2]);
    assert!(hits(&mut c, &mut pool, 0, &tokens[..3]).is_empty());
}

#[test]
fn lookup_of_a_fully_cached_prompt_leaves_something_to_compute() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let tokens: Vec<u32> = (0..8).collect();
    let blocks = cache(&mut c, &mut pool, 0, &tokens);
    let found = c.lookup(0, &tokens, tokens.len() - 1, &mut pool).unwrap();
    assert_eq!(found, blocks[..1]);
    pool.release_all(&found).unwrap();
}

#[test]
fn other_salt_never_hits() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::with_hasher(BS, |_, _| 0));
    let a = cache(&mut c, &mut pool, 1, &[5; 8]);
    assert!(hits(&mut c, &mut pool, 2, &[5; 8]).is_empty());
    let b = cache(&mut c, &mut pool, 2, &[5; 8]);
    assert_eq!(hits(&mut c, &mut pool, 1, &[5; 8]), a);
    assert_eq!(hits(&mut c, &mut pool, 2, &[5; 8]), b);
}

#[test]
fn equal_block_under_another_parent_is_another_node() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::with_hasher(BS, |_, _| 0));
    let a = cache(&mut c, &mut pool, 0, &[1, 1, 1, 1, 9, 9, 9, 9]);
    let b = cache(&mut c, &mut pool, 0, &[2, 2, 2, 2, 9, 9, 9, 9]);
    assert_eq!(c.len(), 4);
    assert_eq!(hits(&mut c, &mut pool, 0, &[1, 1, 1, 1, 9, 9, 9, 9]), a);
    assert_eq!(hits(&mut c, &mut pool, 0, &[2, 2, 2, 2, 9, 9, 9, 9]), b);
    assert!(hits(&mut c, &mut pool, 0, &[9, 9, 9, 9]).is_empty());
}

#[test]
fn first_come_wins() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let a = cache(&mut c, &mut pool, 0, &[1; 4]);
    cache(&mut c, &mut pool, 0, &[1; 8]);
    assert_eq!(hits(&mut c, &mut pool, 0, &[1; 8])[0], a[0]);
    assert_eq!((c.len(), pool.num_in_use()), (2, 2));
}

#[test]
fn insert_and_lookup_stop_at_a_block_that_is_not_exact() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let blocks = pool.try_take(3).unwrap();
    pool.set_state(blocks[1], BlockState::River).unwrap();
    assert_eq!(c.insert(0, &[1; 12], &blocks, &mut pool).unwrap(), 1);
    pool.set_state(blocks[1], BlockState::Exact).unwrap();
    assert_eq!(c.insert(0, &[1; 12], &blocks, &mut pool).unwrap(), 2);
    pool.set_state(blocks[1], BlockState::Compacted).unwrap();
    assert_eq!(hits(&mut c, &mut pool, 0, &[1; 12]), blocks[..1]);
    pool.release_all(&blocks).unwrap();
}

#[test]
fn block_is_cached_for_one_history_only() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let blocks = pool.try_take(1).unwrap();
    assert_eq!(c.insert(0, &[1; 4], &blocks, &mut pool).unwrap(), 1);
    assert_eq!(c.insert(1, &[1; 4], &blocks, &mut pool).unwrap(), 0);
    pool.release_all(&blocks).unwrap();
    assert_eq!(c.evict(9, &lru(), &mut pool).unwrap(), 1);
}

#[test]
fn eviction_takes_leaves_first_and_the_least_recently_used_path() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let a = cache(&mut c, &mut pool, 0, &[1; 12]);
    let b = cache(&mut c, &mut pool, 0, &[2; 8]);
    hits(&mut c, &mut pool, 0, &[1; 4]);
    assert_eq!(c.num_evictable(&pool).unwrap(), 5);
    // a2 and a1 are older than b; a0 was used after b.
    for (n, gone) in [(1, vec![a[2]]), (2, vec![a[1], b[1]]), (1, vec![b[0]]), (9, vec![a[0]])] {
        assert_eq!(c.evict(n, &lru(), &mut pool).unwrap(), gone.len());
        assert!(gone.iter().all(|&id| pool.ref_count(id).is_err()));
        c.check_integrity(&pool).unwrap();
    }
    assert_eq!((c.len(), pool.num_free()), (0, 8));
}

#[test]
fn fifo_takes_the_path_that_came_first_however_it_is_used() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let a = cache(&mut c, &mut pool, 0, &[1; 12]);
    let b = cache(&mut c, &mut pool, 0, &[2; 8]);
    hits(&mut c, &mut pool, 0, &[1; 12]);
    let fifo = Evictor::new(Eviction::Fifo, 8, 1.0);
    for gone in [a[2], a[1], a[0], b[1], b[0]] {
        assert_eq!(c.evict(1, &fifo, &mut pool).unwrap(), 1);
        assert!(pool.ref_count(gone).is_err(), "{gone}");
        c.check_integrity(&pool).unwrap();
    }
}

#[test]
fn mass_takes_the_least_attended_leaf_and_the_first_block_of_a_path_last() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let a = cache(&mut c, &mut pool, 0, &[1; 12]);
    let b = cache(&mut c, &mut pool, 0, &[2; 8]);
    let mut by = Evictor::new(Eviction::Mass, 8, 1.0);
    // Worth mass / (depth + 1). a: 0.0, 4.0, 2.0; b: 0.0, 1.0. The first blocks are worth nothing and stay all the
    // same; a1 is hidden behind a2.
    for (id, mass) in [(a[0], 0.0), (a[1], 8.0), (a[2], 6.0), (b[0], 0.0), (b[1], 2.0)] {
        by.mass.add(id, mass);
    }
    for gone in [b[1], a[2], a[1], a[0], b[0]] {
        assert_eq!(c.evict(1, &by, &mut pool).unwrap(), 1);
        assert!(pool.ref_count(gone).is_err(), "{gone}");
        c.check_integrity(&pool).unwrap();
    }
}

#[test]
fn what_was_evicted_is_known_until_it_is_cleared() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    cache(&mut c, &mut pool, 0, &[1; 12]);
    assert_eq!(c.num_evicted_blocks(0, &[1; 14], 3), 0);
    c.evict(2, &lru(), &mut pool).unwrap();
    assert_eq!(c.num_evicted_blocks(0, &[1; 14], 1), 2);
    assert_eq!(c.num_evicted_blocks(0, &[1; 11], 1), 1);
    assert_eq!(c.num_evicted_blocks(0, &[[1; 8], [2; 8]].concat(), 1), 1);
    assert_eq!(c.num_evicted_blocks(1, &[1; 14], 0), 0);
    cache(&mut c, &mut pool, 0, &[1; 12]);
    assert_eq!(c.num_evicted_blocks(0, &[1; 14], 3), 0);
    c.clear(&mut pool).unwrap();
    assert_eq!(c.num_evicted_blocks(0, &[1; 14], 0), 0);
}

#[test]
fn eviction_spares_what_a_branch_holds_and_what_is_locked() {
    let (mut pool, mut c) = (BlockPool::new(8), PrefixCache::new(BS));
    let a = cache(&mut c, &mut pool, 0, &[1; 12]);
    cache(&mut c, &mut pool, 0, &[2; 8]);
    let held = c.lookup(0, &[1; 12], 8, &mut pool).unwrap();
    let lock = c.lock(0, &[2, 2, 2, 2, 7, 7, 7, 7]).unwrap();
    assert!(c.lock(0, &[3; 4]).is_none());
    assert_eq!(c.num_evictable(&pool).unwrap(), 2);
    assert_eq!(c.evict(9, &lru(), &mut pool).unwrap(), 2);
    assert!(pool.ref_count(a[2]).is_err());
    c.check_integrity(&pool).unwrap();
    c.unlock(lock).unwrap();
    pool.release_all(&held).unwrap();
    assert_eq!(c.evict(9, &lru(), &mut pool).unwrap(), 3);
}

#[test]
fn stale_and_foreign_locks_are_refused() {
    let (mut pool, mut c, mut d) = (BlockPool::new(8), PrefixCache::new(BS), PrefixCache::new(BS));
    cache(&mut c, &mut pool, 0, &[1; 4]);
    cache(&mut d, &mut pool, 0, &[1; 4]);
    let (stale, foreign) = (c.lock(0, &[1; 4]).unwrap(), d.lock(0, &[1; 4]).unwrap());
    c.clear(&mut pool).unwrap();
    c.check_integrity(&pool).unwrap();
    cache(&mut c, &mut pool, 0, &[1; 4]);
    let own = c.lock(0, &[1; 4]).unwrap();
    assert!(c.unlock(stale).is_err() && c.unlock(foreign).is_err());
    c.unlock(own).unwrap();
    c.clear(&mut pool).unwrap();
    d.clear(&mut pool).unwrap();
    assert_eq!(pool.num_free(), 8);
}

#[test]
fn evicting_thousands_of_blocks_is_not_quadratic() {
    Eviction::ALL.into_iter().for_each(evicts_thousands);
}

fn evicts_thousands(policy: Eviction) {
    let n = 20_000;
    let by = Evictor::new(policy, 2 * n, 1.0);
    let (mut pool, mut c) = (BlockPool::new(2 * n), PrefixCache::new(BS));
    let chain: Vec<u32> = (0..(n * BS) as u32).collect();
    cache(&mut c, &mut pool, 0, &chain);
    for i in 0..n as u32 {
        let blocks = pool.try_take(1).unwrap();
        c.insert(1, &[i; BS], &blocks, &mut pool).unwrap();
        pool.release_all(&blocks).unwrap();
    }
    let started = std::time::Instant::now();
    assert_eq!(c.evict(3, &by, &mut pool).unwrap(), 3);
    assert_eq!(c.evict(usize::MAX, &by, &mut pool).unwrap(), 2 * n - 3);
    // 40,000 evictions at well below a microsecond each; the bound only has to tell n log n from n^2.
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    assert!(c.is_empty());
}

#[test]
fn random_walk_of_inserts_lookups_locks_and_evictions_stays_consistent() {
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let mut by = Evictor::new(Eviction::ALL[seed as usize % 3], 24, 0.5);
        let (mut pool, mut c) = (BlockPool::new(24), PrefixCache::with_hasher(BS, |h, t| hash_block(h, t) & 7));
        let (mut held, mut locks): (Vec<BlockId>, Vec<PathLock>) = (Vec::new(), Vec::new());
        for _ in 0..300 {
            let tokens: Vec<u32> = (0..5).flat_map(|_| [rng.below(2) as u32; BS]).collect();
            let salt = rng.below(2) as u64;
            match rng.below(6) {
                0 | 1 => {
                    if let Some(blocks) = pool.try_take(1 + rng.below(5)) {
                        c.insert(salt, &tokens, &blocks, &mut pool).unwrap();
                        held.extend(blocks);
                    }
                }
                2 => held.extend(c.lookup(salt, &tokens, 19, &mut pool).unwrap()),
                3 => locks.extend(c.lock(salt, &tokens)),
                4 if !locks.is_empty() => c.unlock(locks.swap_remove(rng.below(locks.len()))).unwrap(),
                4 => held.drain(..).for_each(|id| pool.release(id).unwrap()),
                _ => {
                    by.mass.begin_measurement();
                    held.iter().for_each(|&id| by.mass.add(id, rng.below(9) as f64));
                    let (n, most) = (rng.below(6), c.num_evictable(&pool).unwrap());
                    assert_eq!(c.evict(n, &by, &mut pool).unwrap(), n.min(most), "seed {seed}");
                }
            }
            c.check_integrity(&pool).unwrap();
            pool.check_integrity().unwrap();
            for id in c.blocks() {
                let expected = 1 + held.iter().filter(|&&h| h == id).count();
                assert_eq!(pool.ref_count(id).unwrap() as usize, expected, "seed {seed}");
                assert!(c.contains(id));
            }
        }
        held.drain(..).for_each(|id| pool.release(id).unwrap());
        locks.into_iter().for_each(|lock| c.unlock(lock).unwrap());
        let all = c.len();
        assert_eq!(c.evict(usize::MAX, &by, &mut pool).unwrap(), all);
        assert_eq!(pool.num_free(), 24, "seed {seed}");
    }
}

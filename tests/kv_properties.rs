//! Random walks over pool, tables and prefix cache together, against a shadow model of the device: every physical slot
//! is tagged with the history of the row written to it, and after every operation every branch reads its own history
//! through its table. Plus what the walks rarely hit: stale and foreign handles, colliding hashes.
//!
//! A failing sequence prints its seed; `sequence(seed)` in a test of its own replays it.

use rksc::Error;
use rksc::kv::BlockCopy;
use rksc::kv::block_pool::{BlockId, BlockPool, BlockState};
use rksc::kv::block_table::BlockTable;
use rksc::kv::eviction::{Eviction, Evictor};
use rksc::kv::prefix_cache::{PathLock, PrefixCache, hash_block};

const NUM_SEQUENCES: u64 = if cfg!(miri) { 2 } else { 10_000 };
const NUM_OPS: usize = 200;
const MAX_BRANCHES: usize = 8;
const MAX_LEN: usize = 48;

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `[0, n)`; 0 when `n` is 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Two tokens only, in runs: branches often agree for a block or two.
    fn tokens(&mut self, n: usize) -> Vec<u32> {
        let mut token = 0;
        (0..n)
            .map(|_| {
                if self.one_in(6) {
                    token = self.below(2) as u32;
                }
                token
            })
            .collect()
    }
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a slot holds: the history up to and including its row, and the row's position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tag {
    history: u64,
    position: u32,
}

/// The tag of the row after `previous`. `nonce` is 0 for an exact row; others depend on more than their tokens.
fn next_tag(previous: Option<Tag>, salt: u64, token: u32, nonce: u64) -> Tag {
    let (history, position) = previous.map_or((mix(salt + 1), 0), |tag| (tag.history, tag.position + 1));
    Tag { history: mix(history ^ mix(u64::from(token) + 7) ^ nonce), position }
}

struct Branch {
    table: BlockTable,
    salt: u64,
    tokens: Vec<u32>,
    /// What `table` must lead to.
    tags: Vec<Tag>,
    nonce: u64,
}

/// A branch that was preempted: its tokens are all that is left.
struct Waiting {
    salt: u64,
    tokens: Vec<u32>,
}

struct World {
    seed: u64,
    rng: Rng,
    block_size: usize,
    pool: BlockPool,
    cache: PrefixCache,
    evictor: Evictor,
    branches: Vec<Branch>,
    waiting: Vec<Waiting>,
    locks: Vec<PathLock>,
    /// The device: one tag per physical slot.
    slots: Vec<Tag>,
    /// Handles that were seen dead once, and must stay so.
    dead: Vec<BlockId>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failing sequence: seed {}", self.seed);
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(mix(seed));
        let block_size = [1, 2, 4, 4, 8][rng.below(5)];
        let num_blocks = 4 + rng.below(160 / block_size);
        let cache = match rng.below(3) {
            0 => PrefixCache::with_hasher(block_size, |h, t| hash_block(h, t) & 3),
            _ => PrefixCache::new(block_size),
        };
        Self {
            seed,
            rng,
            block_size,
            pool: BlockPool::new(num_blocks),
            cache,
            evictor: Evictor::new(Eviction::ALL[seed as usize % 3], num_blocks, 0.9),
            branches: Vec::new(),
            waiting: Vec::new(),
            locks: Vec::new(),
            slots: vec![Tag::default(); num_blocks * block_size],
            dead: Vec::new(),
        }
    }

    /// Blocks for a step, from the free list or from unreferenced cached blocks.
    fn reserve(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let missing = n.saturating_sub(self.pool.num_free());
        if missing > self.cache.num_evictable(&self.pool).unwrap() {
            assert!(self.pool.try_take(n).is_none());
            return None;
        }
        assert_eq!(self.cache.evict(missing, &self.evictor, &mut self.pool).unwrap(), missing);
        Some(self.pool.try_take(n).unwrap())
    }

    /// One step for some branches: `(branch, tokens)` each. `false` when the cache is too small for it now.
    fn step(&mut self, work: &[(usize, Vec<u32>)]) -> bool {
        let mut needed = 0;
        for (b, tokens) in work {
            needed += self.branches[*b].table.blocks_needed_for(&self.pool, tokens.len()).unwrap();
        }
        let Some(mut fresh) = self.reserve(needed) else { return false };
        let marked_early = self.rng.one_in(2);
        let mut copies: Vec<BlockCopy> = Vec::new();
        let mut writes: Vec<(u32, Tag)> = Vec::new();
        for (b, tokens) in work {
            let branch = &mut self.branches[*b];
            let turns_river = branch.nonce == 0 && self.rng.one_in(12);
            let len = branch.table.len();
            if turns_river && marked_early {
                branch.nonce = self.rng.next() | 1;
                branch.table.mark(&mut self.pool, len, BlockState::River).unwrap();
            }
            let plan = branch.table.append(&mut self.pool, &mut fresh, tokens.len()).unwrap();
            if turns_river && !marked_early {
                branch.nonce = self.rng.next() | 1;
                branch.table.mark(&mut self.pool, len, BlockState::River).unwrap();
            }
            assert_eq!(plan.kv, len..len + tokens.len());
            copies.extend(plan.copy);
            let mut slots = Vec::new();
            branch.table.push_slots(plan.kv.clone(), &mut slots);
            assert_eq!(slots.len(), tokens.len());
            for (&token, &slot) in tokens.iter().zip(&slots) {
                let tag = next_tag(branch.tags.last().copied(), branch.salt, token, branch.nonce);
                branch.tags.push(tag);
                branch.tokens.push(token);
                writes.push((slot, tag));
            }
            for block in &branch.table.blocks()[len / self.block_size..] {
                assert_eq!(self.pool.ref_count(*block).unwrap(), 1, "a written block has one owner");
                assert!(!self.cache.contains(*block), "a cached block is never written");
            }
        }
        if self.rng.one_in(4) && !work.is_empty() {
            // While the step runs, what was there before it may be cached.
            let branch = &self.branches[work[0].0];
            let blocks = branch.table.cacheable_blocks().to_vec();
            self.cache.insert(branch.salt, &branch.tokens, &blocks, &mut self.pool).unwrap();
        }
        assert!(fresh.is_empty(), "reserved {needed} blocks, used {}", needed - fresh.len());
        self.check_owners();
        // Where a step is cancelled: 0 before the device saw it, 1 after the copies, 2 halfway, 3 and up not at all.
        let reached = self.rng.below(16);
        if reached > 0 {
            self.device_copies(&copies);
        }
        let num_writes = [0, 0, writes.len() / 2].get(reached).copied().unwrap_or(writes.len());
        for &(slot, tag) in &writes[..num_writes] {
            self.slots[slot as usize] = tag;
        }
        self.evictor.mass.begin_measurement();
        for (b, tokens) in work {
            let branch = &mut self.branches[*b];
            if reached > 2 {
                let mass = self.rng.below(9) as f64;
                branch.table.blocks().iter().for_each(|&id| self.evictor.mass.add(id, mass));
                branch.table.commit(&mut self.pool).unwrap();
            } else {
                branch.table.rollback(&mut self.pool).unwrap();
                let len = branch.tokens.len() - tokens.len();
                branch.tokens.truncate(len);
                branch.tags.truncate(len);
                if branch.table.state() == BlockState::Exact {
                    branch.nonce = 0;
                }
            }
        }
        true
    }

    /// Copies in an order of the test's choice: destinations are distinct, and none is a source.
    fn device_copies(&mut self, copies: &[BlockCopy]) {
        for (i, copy) in copies.iter().enumerate() {
            assert!(copies.iter().all(|c| c.src != copy.dst), "{copies:?}");
            assert!(copies[..i].iter().all(|c| c.dst != copy.dst), "{copies:?}");
        }
        let backwards = self.rng.one_in(2);
        for i in 0..copies.len() {
            let copy = copies[if backwards { copies.len() - 1 - i } else { i }];
            let (src, dst) = (copy.src as usize * self.block_size, copy.dst as usize * self.block_size);
            self.slots.copy_within(src..src + copy.num_slots as usize, dst);
        }
    }

    /// A new branch for these tokens: what is cached, then the rest in one step. Waits when the cache is too small.
    fn start(&mut self, salt: u64, tokens: Vec<u32>) {
        let found = self.cache.lookup(salt, &tokens, tokens.len() - 1, &mut self.pool).unwrap();
        let table = BlockTable::from_blocks(&self.pool, self.block_size, &found).unwrap();
        let num_cached = table.len();
        assert!(num_cached < tokens.len() && table.state() == BlockState::Exact);
        let mut tags: Vec<Tag> = Vec::new();
        for &token in &tokens[..num_cached] {
            tags.push(next_tag(tags.last().copied(), salt, token, 0));
        }
        let rest = tokens[num_cached..].to_vec();
        self.branches.push(Branch { table, salt, tokens: tokens[..num_cached].to_vec(), tags, nonce: 0 });
        let b = self.branches.len() - 1;
        self.check_histories();
        if !self.step(&[(b, rest)]) {
            let branch = self.branches.remove(b);
            branch.table.free(&mut self.pool).unwrap();
            self.waiting.push(Waiting { salt, tokens });
        }
    }

    /// Ends a branch; remembers the handles that died with it.
    fn prune(&mut self, b: usize) -> (u64, Vec<u32>, u64) {
        let Branch { table, salt, tokens, nonce, .. } = self.branches.swap_remove(b);
        let blocks = table.blocks().to_vec();
        table.free(&mut self.pool).unwrap();
        self.bury(&blocks);
        (salt, tokens, nonce)
    }

    fn bury(&mut self, blocks: &[BlockId]) {
        let pool = &self.pool;
        self.dead.extend(blocks.iter().filter(|&&id| pool.ref_count(id).is_err()));
    }

    fn op(&mut self) {
        let num = self.branches.len();
        let b = self.rng.below(num);
        match self.rng.below(16) {
            0 | 1 if num < MAX_BRANCHES => match self.waiting.pop() {
                Some(Waiting { salt, tokens }) if self.rng.one_in(2) => self.start(salt, tokens),
                _ => {
                    let (salt, len) = (self.rng.below(2) as u64, 1 + self.rng.below(MAX_LEN / 2));
                    let tokens = self.rng.tokens(len);
                    self.start(salt, tokens);
                }
            },
            2..=6 if num > 0 => {
                let mut work = Vec::new();
                for b in 0..num {
                    let n = if self.rng.one_in(4) { 1 + self.rng.below(9) } else { 1 };
                    if !self.rng.one_in(3) && self.branches[b].tokens.len() + n <= MAX_LEN {
                        work.push((b, self.rng.tokens(n)));
                    }
                }
                if !self.step(&work) {
                    self.preempt(b);
                }
            }
            7 | 8 if num > 0 && num < MAX_BRANCHES => {
                let parent = &self.branches[b];
                let at = self.rng.below(parent.table.len() + 1);
                let table = parent.table.fork(&mut self.pool, at).unwrap();
                let nonce = if table.state() == BlockState::Exact { 0 } else { parent.nonce };
                let (tokens, tags) = (parent.tokens[..at].to_vec(), parent.tags[..at].to_vec());
                let salt = parent.salt;
                self.branches.push(Branch { table, salt, tokens, tags, nonce });
            }
            9 if num > 0 => {
                self.prune(b);
            }
            10 if num > 0 => {
                let branch = &mut self.branches[b];
                let len = self.rng.below(branch.table.len() + 1);
                let blocks = branch.table.blocks().to_vec();
                branch.table.truncate(&mut self.pool, len).unwrap();
                branch.tokens.truncate(len);
                branch.tags.truncate(len);
                if branch.table.state() == BlockState::Exact {
                    branch.nonce = 0;
                }
                self.bury(&blocks);
            }
            11 | 12 if num > 0 => {
                let branch = &self.branches[b];
                let blocks = branch.table.cacheable_blocks().to_vec();
                self.cache.insert(branch.salt, &branch.tokens, &blocks, &mut self.pool).unwrap();
            }
            13 => {
                let (n, most) = (self.rng.below(6), self.cache.num_evictable(&self.pool).unwrap());
                let blocks: Vec<BlockId> = self.cache.blocks().collect();
                assert_eq!(self.cache.evict(n, &self.evictor, &mut self.pool).unwrap(), n.min(most));
                self.bury(&blocks);
            }
            14 if num > 0 => self.preempt(b),
            15 => match self.rng.below(3) {
                0 if num > 0 => {
                    let branch = &self.branches[b];
                    self.locks.extend(self.cache.lock(branch.salt, &branch.tokens));
                }
                1 if self.rng.one_in(8) => {
                    self.cache.clear(&mut self.pool).unwrap();
                    for lock in self.locks.drain(..) {
                        assert!(matches!(self.cache.unlock(lock), Err(Error::Internal(_))));
                    }
                }
                _ => self.locks.pop().map_or((), |lock| self.cache.unlock(lock).unwrap()),
            },
            _ => {}
        }
    }

    /// A branch gives its blocks up. An exact one waits and is recomputed; others cannot be, and end.
    fn preempt(&mut self, b: usize) {
        let (salt, tokens, nonce) = self.prune(b);
        if nonce == 0 && !tokens.is_empty() {
            self.waiting.push(Waiting { salt, tokens });
        }
    }

    /// Every block's count equals the tables, open copies and cache nodes that hold it; the rest is free.
    fn check_owners(&self) {
        let mut owners = [0u32; 256];
        let mut num_held = 0;
        let mut add = |id: BlockId| {
            num_held += u32::from(owners[id.index() as usize] == 0);
            owners[id.index() as usize] += 1;
        };
        for branch in &self.branches {
            branch.table.check_integrity(&self.pool).unwrap();
            branch.table.blocks().iter().copied().chain(branch.table.copied_from()).for_each(&mut add);
        }
        self.cache.blocks().for_each(&mut add);
        let held = self.branches.iter().flat_map(|b| b.table.blocks().iter().copied()).chain(self.cache.blocks());
        for id in held {
            assert_eq!(self.pool.ref_count(id).unwrap(), owners[id.index() as usize], "owners of {id}");
        }
        assert_eq!(self.pool.num_free() + num_held as usize, self.pool.num_blocks());
        self.pool.check_integrity().unwrap();
        self.cache.check_integrity(&self.pool).unwrap();
    }

    /// Every branch reads its own history through its table, and no row of another.
    fn check_histories(&self) {
        for branch in &self.branches {
            assert_eq!((branch.table.len(), branch.tags.len()), (branch.tokens.len(), branch.tokens.len()));
            for (i, tag) in branch.tags.iter().enumerate() {
                assert_eq!(self.slots[branch.table.slot(i).unwrap() as usize], *tag, "row {i}");
            }
            for &id in branch.table.cacheable_blocks() {
                assert_eq!(self.pool.state(id).unwrap(), BlockState::Exact);
            }
        }
    }
}

/// One walk; returns rows read back and blocks shared, so that the caller can tell it was not idle.
fn sequence(seed: u64) -> [usize; 3] {
    let mut w = World::new(seed);
    let mut seen = [0; 3];
    for _ in 0..NUM_OPS {
        w.op();
        w.check_owners();
        w.check_histories();
        seen[0] += w.branches.iter().map(|b| b.tags.len()).sum::<usize>();
        seen[1] += w.branches.iter().map(|b| b.table.num_shared_blocks(&w.pool).unwrap()).sum::<usize>();
        seen[2] += w.cache.len();
    }
    for &id in &w.dead {
        assert!(matches!(w.pool.retain(id), Err(Error::Block { .. })), "{id:?}");
    }
    let live: Vec<BlockId> =
        w.branches.iter().flat_map(|b| b.table.blocks().to_vec()).chain(w.cache.blocks()).collect();
    assert!(live.iter().all(|&id| w.evictor.mass.of(id) >= 0.0));
    for branch in w.branches.drain(..) {
        branch.table.free(&mut w.pool).unwrap();
    }
    w.locks.drain(..).for_each(|lock| w.cache.unlock(lock).unwrap());
    let num_cached = w.cache.len();
    assert_eq!(w.cache.evict(usize::MAX, &w.evictor, &mut w.pool).unwrap(), num_cached);
    assert_eq!(w.pool.num_free(), w.pool.num_blocks());
    w.check_owners();
    seen
}

#[test]
fn every_branch_reads_its_own_history_after_every_operation() {
    let num_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8) as u64;
    let seen = std::thread::scope(|scope| {
        let walk = |t: u64| {
            move || {
                (t..NUM_SEQUENCES).step_by(num_threads as usize).fold([0; 3], |sum: [usize; 3], seed| {
                    let one = sequence(seed);
                    [sum[0] + one[0], sum[1] + one[1], sum[2] + one[2]]
                })
            }
        };
        let threads: Vec<_> = (0..num_threads).map(|t| scope.spawn(walk(t))).collect();
        let sums: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        sums.into_iter()
            .map(|sum| sum.expect("a sequence failed"))
            .reduce(|a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2]])
    });
    let [rows, shared, cached] = seen.unwrap().map(|n| n as f64 / (NUM_SEQUENCES as f64 * NUM_OPS as f64));
    eprintln!("per operation: {rows:.1} rows read back, {shared:.1} shared and {cached:.1} cached blocks");
    assert!(rows > 10.0 && shared > 1.0 && cached > 1.0, "the walks are idle");
}

#[test]
fn stale_foreign_and_doubly_released_handles_are_refused() {
    let mut rng = Rng(5);
    let (mut pool, mut other) = (BlockPool::new(64), BlockPool::new(64));
    let theirs = other.try_take(64).unwrap();
    let mut refused = 0;
    for _ in 0..1_000 {
        let mut table = BlockTable::new(4);
        let n = 1 + rng.below(200);
        let mut fresh = pool.try_take(table.blocks_needed_for(&pool, n).unwrap()).unwrap();
        table.append(&mut pool, &mut fresh, n).unwrap();
        table.commit(&mut pool).unwrap();
        let stale = table.blocks().to_vec();
        table.free(&mut pool).unwrap();
        // Now the same blocks belong to somebody else.
        let new_owner = pool.try_take(64).unwrap();
        for &id in stale.iter().chain(&theirs) {
            let refusals = [
                pool.release(id).err(),
                pool.retain(id).err(),
                pool.ref_count(id).err(),
                pool.is_shared(id).err(),
                pool.state(id).err(),
                pool.set_state(id, BlockState::River).err(),
                pool.retain_all(&[new_owner[0], id]).err(),
                BlockTable::from_blocks(&pool, 4, &[id]).err(),
                PrefixCache::new(1).insert(0, &[1], &[id], &mut pool).err(),
                BlockTable::new(4).append(&mut pool, &mut vec![id], 1).err(),
            ];
            for refusal in refusals {
                assert!(matches!(refusal, Some(Error::Block { .. })), "{id:?}: {refusal:?}");
                refused += 1;
            }
        }
        for &id in &new_owner {
            assert_eq!((pool.ref_count(id).unwrap(), pool.state(id).unwrap()), (1, BlockState::Exact));
        }
        pool.release_all(&new_owner).unwrap();
        assert!(pool.release_all(&new_owner).is_err());
        pool.check_integrity().unwrap();
    }
    assert_eq!(pool.num_free(), 64);
    assert!(refused > 100_000);
}

#[test]
fn table_and_cache_refuse_a_pool_that_is_not_theirs() {
    let (mut pool, mut other) = (BlockPool::new(8), BlockPool::new(8));
    let mut cache = PrefixCache::new(4);
    let mut table = BlockTable::new(4);
    let mut fresh = pool.try_take(2).unwrap();
    table.append(&mut pool, &mut fresh, 6).unwrap();
    let _theirs = other.try_take(8).unwrap();
    assert!(table.commit(&mut other).is_err() && table.rollback(&mut other).is_err());
    table.commit(&mut pool).unwrap();
    cache.insert(0, &[1; 6], table.cacheable_blocks(), &mut pool).unwrap();
    let refusals = [
        table.blocks_needed_for(&other, 1).err(),
        table.fork(&mut other, 5).err(),
        table.mark(&mut other, 5, BlockState::River).err(),
        table.truncate(&mut other, 1).err(),
        table.clear(&mut other).err(),
        table.num_shared_blocks(&other).err(),
        cache.lookup(0, &[1; 6], 5, &mut other).err(),
        cache.evict(1, &Evictor::new(Eviction::Lru, 8, 1.0), &mut other).err(),
        cache.evict(1, &Evictor::new(Eviction::Mass, 8, 1.0), &mut other).err(),
        cache.num_evictable(&other).err(),
        cache.clear(&mut other).err(),
    ];
    for (i, refusal) in refusals.iter().enumerate() {
        assert!(matches!(refusal, Some(Error::Block { .. })), "{i}: {refusal:?}");
    }
    assert_eq!((table.len(), table.state(), cache.len()), (6, BlockState::Exact, 1));
    table.check_integrity(&pool).unwrap();
    cache.check_integrity(&pool).unwrap();
    table.free(&mut pool).unwrap();
    cache.clear(&mut pool).unwrap();
    assert_eq!(pool.num_free(), 8);
}

/// Hashes of 8 bits over thousands of blocks: nearly every look-up walks through nodes of other tokens.
#[test]
fn colliding_hashes_never_share_wrongly() {
    const NUM_LOOKUPS: usize = if cfg!(miri) { 200 } else { 100_000 };
    const BS: usize = 2;
    let mut rng = Rng(6);
    let mut pool = BlockPool::new(2_000);
    let mut cache = PrefixCache::with_hasher(BS, |h, t| hash_block(h, t) & 0xff);
    let evictor = Evictor::new(Eviction::Lru, 2_000, 1.0);
    // What each block holds: the salt and all tokens up to its end.
    let mut contents: Vec<(u64, Vec<u32>)> = vec![Default::default(); 2_000];
    let (mut num_hits, mut num_misses) = (0, 0);
    for _ in 0..NUM_LOOKUPS {
        let salt = rng.below(3) as u64;
        let tokens: Vec<u32> = (0..12).map(|_| rng.below(3) as u32).collect();
        let found = cache.lookup(salt, &tokens, tokens.len() - 1, &mut pool).unwrap();
        for (i, id) in found.iter().enumerate() {
            let (of, held) = &contents[id.index() as usize];
            assert!(*of == salt && *held == tokens[..(i + 1) * BS], "block {id} was shared wrongly");
        }
        num_hits += found.len();
        num_misses += tokens.len() / BS - 1 - found.len();
        let missing = tokens.len() / BS - found.len();
        if pool.num_free() < missing {
            cache.evict(500, &evictor, &mut pool).unwrap();
        }
        let fresh = pool.try_take(missing).unwrap();
        for (i, id) in fresh.iter().enumerate() {
            contents[id.index() as usize] = (salt, tokens[..(found.len() + i + 1) * BS].to_vec());
        }
        let blocks: Vec<BlockId> = found.into_iter().chain(fresh).collect();
        cache.insert(salt, &tokens, &blocks, &mut pool).unwrap();
        pool.release_all(&blocks).unwrap();
    }
    cache.check_integrity(&pool).unwrap();
    eprintln!("{num_hits} blocks hit, {num_misses} missed");
    assert!(num_hits > NUM_LOOKUPS / 2 && num_misses > NUM_LOOKUPS / 2);
    cache.clear(&mut pool).unwrap();
    assert_eq!(pool.num_free(), 2_000);
}

//! Full token blocks that outlive their branches: a radix tree with one block of tokens an edge. Owns one reference of
//! each block in it. Knows neither branches nor partial blocks.
//!
//! ```text
//! salt 7 - [t0 .. t15] b3 - [t16 .. t31] b9 - [..] b4      a node: parent, tokens, block, hash chained from the
//!                         \ [t16'.. t31'] b5                       parent's (from the salt's at the top level)
//! ```
//!
//! Invariants: a hash only finds candidates, and a hit is a node whose parent, salt and tokens were compared; a block
//! is in at most one node, is full and was exact when it came; a node goes only after its children, so a parent's
//! index never names another node than the one its children were hung under; a leaf is among `leaves` exactly while
//! it is not locked. The cache never writes a block, and by owning it makes it read-only for every table.

mod forget;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

use super::block_pool::{BlockId, BlockPool, BlockState, next_owner};
use super::eviction::{Eviction, Evictor, Rank};
use crate::error::{Error, Result};

/// Hash of a block of tokens, chained from the hash of what precedes it.
pub type BlockHasher = fn(parent_hash: u64, tokens: &[u32]) -> u64;

/// The hasher in use unless a test asks for a worse one: one multiply-xor round per token, mixed at the end. Fast, and
/// nothing relies on it being hard to collide: every hit is compared.
pub fn hash_block(parent_hash: u64, tokens: &[u32]) -> u64 {
    let mix = |z: u64| {
        let z = (z ^ (z >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        z ^ (z >> 29)
    };
    let round = |h: u64, &t: &u32| mix(h ^ (u64::from(t) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    tokens.iter().fold(mix(parent_hash.wrapping_add(0x2545_f491_4f6c_dd1d)), round)
}

/// Pins a path of the cache against eviction until [`PrefixCache::unlock`] takes it back.
#[derive(Debug)]
#[must_use = "a lock that is dropped pins its path until the cache is cleared"]
pub struct PathLock {
    node: u32,
    generation: u32,
    cache: u32,
}

#[derive(Debug)]
struct Node {
    /// `None` at the top level, where `salt` decides.
    parent: Option<u32>,
    salt: u64,
    /// `[block_size]`.
    tokens: Box<[u32]>,
    block: BlockId,
    hash: u64,
    /// Next node with the same hash.
    next: Option<u32>,
    /// Blocks before this one.
    depth: u32,
    num_children: u32,
    num_locks: u32,
    /// Clock of the last look-up or insertion that went through here; a parent's is never earlier.
    last_used: u64,
    /// Order of insertion; unique, breaks ties of `last_used`.
    age: u64,
}

#[derive(Debug, Default)]
struct Entry {
    generation: u32,
    node: Option<Node>,
}

/// See the module text.
#[derive(Debug)]
pub struct PrefixCache {
    id: u32,
    block_size: usize,
    hasher: BlockHasher,
    /// Arena of nodes; vacant entries are listed in `vacant`.
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    /// First node of each hash.
    heads: HashMap<u64, u32>,
    /// Node of each block, by block index.
    by_block: HashMap<u32, u32>,
    /// Unlocked leaves, `(last_used, age)` -> node: eviction order.
    leaves: BTreeMap<(u64, u64), u32>,
    clock: u64,
    next_age: u64,
    evicted: Evicted,
}

/// Hashes of evicted nodes, for [`PrefixCache::num_evicted_blocks`]: the latest, in two halves of which the older is
/// dropped when the newer is full.
#[derive(Debug, Default)]
struct Evicted {
    newer: HashSet<u64>,
    older: HashSet<u64>,
}

/// Evicted nodes remembered, in blocks of the pool.
const REMEMBERED_POOLS: usize = 8;

impl PrefixCache {
    /// An empty cache of blocks of `block_size` tokens, at least 1.
    pub fn new(block_size: usize) -> Self {
        Self::with_hasher(block_size, hash_block)
    }

    /// An empty cache with a hasher of the caller's choice; any hasher is correct, a poor one is slow.
    pub fn with_hasher(block_size: usize, hasher: BlockHasher) -> Self {
        debug_assert!(block_size > 0);
        Self {
            id: next_owner(),
            block_size: block_size.max(1),
            hasher,
            entries: Vec::new(),
            vacant: Vec::new(),
            heads: HashMap::new(),
            by_block: HashMap::new(),
            leaves: BTreeMap::new(),
            clock: 0,
            next_age: 0,
            evicted: Evicted::default(),
        }
    }

    /// The longest run of cached full blocks that `tokens[..max_tokens]` begins with, retained for the caller. To have
    /// at least one token left to compute logits from, pass a `max_tokens` below the prompt's length. Modifies the
    /// order of eviction.
    pub fn lookup(
        &mut self,
        salt: u64,
        tokens: &[u32],
        max_tokens: usize,
        pool: &mut BlockPool,
    ) -> Result<Vec<BlockId>> {
        let tokens = &tokens[..max_tokens.min(tokens.len())];
        self.clock += 1;
        let mut blocks = Vec::new();
        let (mut parent, mut hash) = (None, salt);
        for block_tokens in tokens.chunks_exact(self.block_size) {
            hash = (self.hasher)(hash, block_tokens);
            let Some((idx, block)) = self.find(parent, salt, hash, block_tokens) else { break };
            if pool.state(block)? != BlockState::Exact {
                break;
            }
            self.touch(idx);
            blocks.push(block);
            parent = Some(idx);
        }
        pool.retain_all(&blocks)?;
        Ok(blocks)
    }

    /// Caches the full blocks that hold `tokens`, from the first on: `blocks[i]` holds
    /// `tokens[i * block_size..(i + 1) * block_size]`. First come wins: where an equal node exists, its block stays.
    /// Stops at the first block that is not exact, or is in the cache for other tokens. Returns how many blocks the
    /// cache newly owns.
    pub fn insert(&mut self, salt: u64, tokens: &[u32], blocks: &[BlockId], pool: &mut BlockPool) -> Result<usize> {
        self.clock += 1;
        let mut num_new = 0;
        let (mut parent, mut hash) = (None, salt);
        for (block_tokens, &block) in tokens.chunks_exact(self.block_size).zip(blocks) {
            if pool.state(block)? != BlockState::Exact {
                break;
            }
            hash = (self.hasher)(hash, block_tokens);
            let idx = match self.find(parent, salt, hash, block_tokens) {
                Some((idx, _)) => {
                    self.touch(idx);
                    idx
                }
                None if self.by_block.contains_key(&block.index()) => break,
                None => {
                    pool.retain(block)?;
                    num_new += 1;
                    self.add(parent, salt, hash, block_tokens, block)
                }
            };
            parent = Some(idx);
        }
        Ok(num_new)
    }

    /// Frees up to `n` blocks that nobody but the cache owns, leaves first, of these in the order of `by`, and of equals
    /// the oldest. Returns how many. `evict(0)` is always safe.
    pub fn evict(&mut self, n: usize, by: &Evictor, pool: &mut BlockPool) -> Result<usize> {
        match by.policy {
            Eviction::Lru => self.evict_least_recent(n, pool),
            Eviction::Fifo | Eviction::Mass => self.evict_lowest_rank(n, by, pool),
        }
    }

    /// By the index of leaves, which has this order.
    fn evict_least_recent(&mut self, n: usize, pool: &mut BlockPool) -> Result<usize> {
        let mut num_freed = 0;
        // Everything before the cursor is owned by others too, or was a parent when the cursor passed.
        let mut cursor = (0, 0);
        while num_freed < n
            && let Some((&key, &leaf)) = self.leaves.range(cursor..).next()
        {
            cursor = (key.0, key.1 + 1);
            let mut next = Some(leaf);
            while let Some(idx) = next.take() {
                let Some(node) = self.node(idx) else { break };
                let (block, parent) = (node.block, node.parent);
                if num_freed == n || pool.ref_count(block)? != 1 {
                    break;
                }
                self.evict_node(idx, pool.num_blocks());
                pool.release(block)?;
                num_freed += 1;
                // A parent that became a leaf behind the cursor is the next in order; ahead of it, the cursor comes by.
                next = parent.filter(|&p| self.node(p).is_some_and(|p| p.is_free_leaf() && p.key() < cursor));
            }
        }
        Ok(num_freed)
    }

    /// Ranks change behind the cache's back, so the leaves are ranked anew each time.
    fn evict_lowest_rank(&mut self, n: usize, by: &Evictor, pool: &mut BlockPool) -> Result<usize> {
        let mut heap = BinaryHeap::new();
        let leaves: Vec<u32> = if n > 0 { self.leaves.values().copied().collect() } else { Vec::new() };
        for idx in leaves {
            heap.extend(self.ranked(idx, by, pool)?);
        }
        let mut num_freed = 0;
        while num_freed < n
            && let Some(Reverse((_, idx))) = heap.pop()
        {
            let Some(node) = self.node(idx) else { break };
            let (block, parent) = (node.block, node.parent);
            self.evict_node(idx, pool.num_blocks());
            pool.release(block)?;
            num_freed += 1;
            if let Some(parent) = parent {
                heap.extend(self.ranked(parent, by, pool)?);
            }
        }
        Ok(num_freed)
    }

    /// The node with its place, if it is an unlocked leaf that nobody else owns.
    fn ranked(&self, idx: u32, by: &Evictor, pool: &BlockPool) -> Result<Option<Reverse<(Rank, u32)>>> {
        let Some(node) = self.node(idx).filter(|node| node.is_free_leaf()) else { return Ok(None) };
        let is_evictable = pool.ref_count(node.block)? == 1;
        Ok(is_evictable.then(|| Reverse((by.block_rank(node.block, node.depth as usize, node.age), idx))))
    }

    /// How many blocks behind the first `num_cached` of these tokens were in the cache once, and were evicted: what has
    /// to be computed again. Of the longest gone only so many are remembered as the pool has blocks, eight times over.
    pub fn num_evicted_blocks(&self, salt: u64, tokens: &[u32], num_cached: usize) -> usize {
        if self.evicted.newer.is_empty() {
            return 0;
        }
        let mut hash = salt;
        let is_evicted = |(i, block_tokens): (usize, &[u32])| {
            hash = (self.hasher)(hash, block_tokens);
            i < num_cached || self.evicted.newer.contains(&hash) || self.evicted.older.contains(&hash)
        };
        let num_known = tokens.chunks_exact(self.block_size).enumerate().map(is_evicted).take_while(|&e| e).count();
        num_known.saturating_sub(num_cached)
    }

    /// Blocks that [`evict`](Self::evict) could free: owned by nobody else, not locked, and no such node below them.
    pub fn num_evictable(&self, pool: &BlockPool) -> Result<usize> {
        let mut pinned = vec![false; self.entries.len()];
        let mut num_pinned = 0;
        for (idx, node) in self.nodes() {
            if node.num_locks == 0 && pool.ref_count(node.block)? == 1 {
                continue;
            }
            let mut at = Some(idx);
            while let Some(idx) = at
                && !std::mem::replace(&mut pinned[idx as usize], true)
            {
                num_pinned += 1;
                at = self.node(idx).and_then(|node| node.parent);
            }
        }
        Ok(self.len() - num_pinned)
    }

    /// Pins the longest cached run of `tokens` against eviction, or `None` when nothing of it is cached. Does not
    /// change the order of eviction.
    pub fn lock(&mut self, salt: u64, tokens: &[u32]) -> Option<PathLock> {
        let (mut deepest, mut hash) = (None, salt);
        for block_tokens in tokens.chunks_exact(self.block_size) {
            hash = (self.hasher)(hash, block_tokens);
            let Some((idx, _)) = self.find(deepest, salt, hash, block_tokens) else { break };
            deepest = Some(idx);
        }
        // The ancestors are pinned by having a child.
        let idx = deepest?;
        let entry = &mut self.entries[idx as usize];
        let generation = entry.generation;
        let node = entry.node.as_mut()?;
        node.num_locks += 1;
        let key = node.key();
        self.leaves.remove(&key);
        Some(PathLock { node: idx, generation, cache: self.id })
    }

    /// Takes a lock back. Refused for a lock of another cache, or from before a [`clear`](Self::clear).
    pub fn unlock(&mut self, lock: PathLock) -> Result<()> {
        let entry = self.entries.get_mut(lock.node as usize);
        let entry = entry.filter(|entry| lock.cache == self.id && entry.generation == lock.generation);
        let Some(node) = entry.and_then(|entry| entry.node.as_mut()).filter(|node| node.num_locks > 0) else {
            return Err(Error::Internal("prefix cache: unlock of a path that is not locked here".into()));
        };
        node.num_locks -= 1;
        if node.is_free_leaf() {
            let key = node.key();
            self.leaves.insert(key, lock.node);
        }
        Ok(())
    }

    /// Releases every block, locked or not. Locks given before are void.
    pub fn clear(&mut self, pool: &mut BlockPool) -> Result<()> {
        let mut blocks: Vec<(u64, BlockId)> = self.nodes().map(|(_, node)| (node.age, node.block)).collect();
        blocks.sort_unstable();
        if let Some(&(_, block)) = blocks.first() {
            pool.ref_count(block)?;
        }
        self.heads.clear();
        self.by_block.clear();
        self.leaves.clear();
        self.vacant.clear();
        self.evicted = Evicted::default();
        for (idx, entry) in self.entries.iter_mut().enumerate() {
            entry.generation = entry.generation.wrapping_add(u32::from(entry.node.take().is_some()));
            self.vacant.push(idx as u32);
        }
        blocks.iter().rev().try_for_each(|&(_, block)| pool.release(block))
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.by_block.len()
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.by_block.is_empty()
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Whether the cache owns the block.
    pub fn contains(&self, block: BlockId) -> bool {
        let node = self.by_block.get(&block.index()).and_then(|&idx| self.node(idx));
        node.is_some_and(|node| node.block == block)
    }

    /// The blocks in the cache, in no particular order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.nodes().map(|(_, node)| node.block)
    }

    /// Verifies the tree, its hashes and indexes against each other, and that every block is live.
    pub fn check_integrity(&self, pool: &BlockPool) -> Result<()> {
        let fail = |why: String| Err(Error::Internal(format!("prefix cache: {why}")));
        let mut num_children = vec![0; self.entries.len()];
        let (mut num_nodes, mut num_free_leaves) = (0, 0);
        for (idx, node) in self.nodes() {
            num_nodes += 1;
            num_free_leaves += usize::from(node.is_free_leaf());
            let (parent_hash, depth) = match node.parent.map(|p| (p, self.node(p))) {
                None => (node.salt, 0),
                Some((p, Some(parent))) if parent.salt == node.salt && parent.last_used >= node.last_used => {
                    num_children[p as usize] += 1;
                    (parent.hash, parent.depth + 1)
                }
                Some((p, _)) => return fail(format!("node {idx} hangs under {p}, which is vacant or older")),
            };
            if node.depth != depth {
                return fail(format!("node {idx} has depth {} below {depth} blocks", node.depth));
            }
            if node.tokens.len() != self.block_size || (self.hasher)(parent_hash, &node.tokens) != node.hash {
                return fail(format!("node {idx} has a hash that is not of its tokens"));
            }
            if self.find(node.parent, node.salt, node.hash, &node.tokens) != Some((idx, node.block)) {
                return fail(format!("node {idx} is not found by its hash, or has a twin"));
            }
            if self.by_block.get(&node.block.index()) != Some(&idx) {
                return fail(format!("node {idx} is not found by its block {}", node.block));
            }
            if node.is_free_leaf() != (self.leaves.get(&node.key()) == Some(&idx)) {
                return fail(format!("node {idx} is an unlocked leaf: {}, is listed otherwise", node.is_free_leaf()));
            }
            pool.ref_count(node.block)?;
        }
        for (idx, node) in self.nodes() {
            if node.num_children != num_children[idx as usize] {
                return fail(format!("node {idx} has {} children", num_children[idx as usize]));
            }
        }
        let lens = (self.by_block.len(), self.leaves.len(), self.vacant.len());
        if lens != (num_nodes, num_free_leaves, self.entries.len() - num_nodes) {
            return fail(format!("{num_nodes} nodes, {num_free_leaves} unlocked leaves, but indexes have {lens:?}"));
        }
        Ok(())
    }

    fn node(&self, idx: u32) -> Option<&Node> {
        self.entries.get(idx as usize).and_then(|entry| entry.node.as_ref())
    }

    fn node_mut(&mut self, idx: u32) -> Option<&mut Node> {
        self.entries.get_mut(idx as usize).and_then(|entry| entry.node.as_mut())
    }

    fn nodes(&self) -> impl Iterator<Item = (u32, &Node)> {
        self.entries.iter().enumerate().filter_map(|(idx, entry)| Some((idx as u32, entry.node.as_ref()?)))
    }

    /// The node under `parent` with these tokens. The hash finds candidates; equality decides.
    fn find(&self, parent: Option<u32>, salt: u64, hash: u64, tokens: &[u32]) -> Option<(u32, BlockId)> {
        let mut at = self.heads.get(&hash).copied();
        while let Some(idx) = at {
            let node = self.node(idx)?;
            if node.parent == parent && node.salt == salt && *node.tokens == *tokens {
                return Some((idx, node.block));
            }
            at = node.next;
        }
        None
    }

    fn touch(&mut self, idx: u32) {
        let clock = self.clock;
        let Some(node) = self.node_mut(idx) else { return };
        let old = node.key();
        node.last_used = clock;
        let new = node.key();
        if self.leaves.remove(&old).is_some() {
            self.leaves.insert(new, idx);
        }
    }

    fn add(&mut self, parent: Option<u32>, salt: u64, hash: u64, tokens: &[u32], block: BlockId) -> u32 {
        let idx = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            self.entries.len() as u32 - 1
        });
        let mut depth = 0;
        if let Some(parent) = parent.and_then(|p| self.node_mut(p)) {
            parent.num_children += 1;
            depth = parent.depth + 1;
            let key = parent.key();
            self.leaves.remove(&key);
        }
        let node = Node {
            parent,
            salt,
            tokens: tokens.into(),
            block,
            hash,
            next: self.heads.insert(hash, idx),
            depth,
            num_children: 0,
            num_locks: 0,
            last_used: self.clock,
            age: self.next_age,
        };
        self.next_age += 1;
        self.leaves.insert(node.key(), idx);
        self.by_block.insert(block.index(), idx);
        self.entries[idx as usize].node = Some(node);
        idx
    }

    /// [`remove`](Self::remove)s a node, and remembers that it was there.
    fn evict_node(&mut self, idx: u32, num_pool_blocks: usize) {
        if let Some(hash) = self.node(idx).map(|node| node.hash) {
            self.evicted.remember(hash, num_pool_blocks * REMEMBERED_POOLS);
            self.remove(idx);
        }
    }

    /// Takes a childless node out of the tree and all indexes; the block's reference is the caller's to release.
    fn remove(&mut self, idx: u32) {
        let entry = &mut self.entries[idx as usize];
        let Some(node) = entry.node.take() else { return };
        entry.generation = entry.generation.wrapping_add(1);
        self.vacant.push(idx);
        self.leaves.remove(&node.key());
        self.by_block.remove(&node.block.index());
        match (self.heads.get(&node.hash).copied(), node.next) {
            (Some(head), Some(next)) if head == idx => {
                self.heads.insert(node.hash, next);
            }
            (Some(head), None) if head == idx => {
                self.heads.remove(&node.hash);
            }
            (head, next) => {
                let mut at = head;
                while let Some(before) = at.and_then(|at| self.node_mut(at)) {
                    if before.next == Some(idx) {
                        before.next = next;
                        break;
                    }
                    at = before.next;
                }
            }
        }
        if let Some(parent_idx) = node.parent
            && let Some(parent) = self.node_mut(parent_idx)
        {
            parent.num_children -= 1;
            if parent.is_free_leaf() {
                let key = parent.key();
                self.leaves.insert(key, parent_idx);
            }
        }
    }
}

impl Evicted {
    fn remember(&mut self, hash: u64, capacity: usize) {
        if self.newer.len() >= capacity.div_ceil(2) {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(hash);
    }
}

impl Node {
    fn key(&self) -> (u64, u64) {
        (self.last_used, self.age)
    }

    fn is_free_leaf(&self) -> bool {
        self.num_children == 0 && self.num_locks == 0
    }
}

#[cfg(test)]
mod tests;

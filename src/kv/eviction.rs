//! Who gives its blocks up when the cache is full: the policies as data, the attention mass of blocks, and one order
//! for cached blocks and live branches alike. Frees nothing itself.
//!
//! Under [`Eviction::Mass`] (RSBCM) a block is worth the attention it receives, divided by its depth plus one. Mass is
//! measured now and then, at one layer; between two measurements older mass fades by a constant factor.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use super::block_pool::BlockId;
use crate::error::{Error, Result};

/// Which blocks go first. Whatever the policy, a cached block goes after those that follow it, and a live branch only
/// when no unreferenced cached block is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Eviction {
    /// Cached blocks by their last use, branches youngest first.
    #[default]
    Lru,
    /// Cached blocks in the order in which they came, branches youngest first.
    Fifo,
    /// Cached blocks and branches by the attention they received, divided by depth plus one.
    Mass,
}

impl Eviction {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Lru, Self::Fifo, Self::Mass];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Fifo => "fifo",
            Self::Mass => "mass",
        }
    }
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Eviction {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config("eviction", format!("{name:?} is unknown; use one of {names}"))
        })
    }
}

/// A place in the order of eviction; the smallest goes first.
#[derive(Clone, Copy, Debug)]
pub struct Rank {
    /// Goes only when nothing else can.
    pub pinned: bool,
    /// What it is worth.
    pub importance: f64,
    /// Between equals the smallest goes first.
    pub age: u64,
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_worth = || self.importance.total_cmp(&other.importance);
        self.pinned.cmp(&other.pinned).then_with(by_worth).then(self.age.cmp(&other.age))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Rank {}

/// RSBCM's worth of something that received `mass` and stands `depth` below its root.
pub fn importance(mass: f64, depth: usize) -> f64 {
    mass / (depth as f64 + 1.0)
}

/// The attention each block received. A block that is freed has lost its mass: it is looked up by handle, and a reused
/// block's handle is another one.
#[derive(Debug)]
pub struct BlockMass {
    /// By block index: the generation that received it, and the mass in units of the first measurement.
    entries: Vec<(u32, f64)>,
    decay: f64,
    /// What one unit of mass measured now adds to an entry. It grows instead of all entries fading.
    unit: f64,
}

/// Past this, entries and unit are scaled down together.
const MAX_UNIT: f64 = 1e100;

impl BlockMass {
    /// Nothing measured, for `num_blocks` blocks. `decay` in `(0, 1]` is what a measurement leaves of earlier mass.
    pub fn new(num_blocks: usize, decay: f64) -> Self {
        debug_assert!(decay > 0.0 && decay <= 1.0);
        Self { entries: vec![(0, 0.0); num_blocks], decay, unit: 1.0 }
    }

    /// Lets what was measured before fade.
    pub fn begin_measurement(&mut self) {
        self.unit /= self.decay;
        if self.unit > MAX_UNIT {
            self.entries.iter_mut().for_each(|(_, mass)| *mass /= self.unit);
            self.unit = 1.0;
        }
    }

    /// Adds what the block received. What is not finite is left out: one broken branch must not spoil the order.
    pub fn add(&mut self, block: BlockId, mass: f64) {
        let unit = self.unit;
        if let Some(entry) = self.entries.get_mut(block.index() as usize).filter(|_| mass.is_finite()) {
            let before = if entry.0 == block.generation() { entry.1 } else { 0.0 };
            *entry = (block.generation(), before + mass * unit);
        }
    }

    /// What the block received, faded; 0 before its first measurement.
    pub fn of(&self, block: BlockId) -> f64 {
        match self.entries.get(block.index() as usize) {
            Some(&(generation, mass)) if generation == block.generation() => mass / self.unit,
            _ => 0.0,
        }
    }

    /// Adds the mass of `from` to that of `to`: a copy-on-write moved a branch there.
    pub fn copy(&mut self, from: BlockId, to: BlockId) {
        self.add(to, self.of(from));
    }
}

/// The policy with what it has to know: one for the prefix cache and for live branches.
#[derive(Debug)]
pub struct Evictor {
    /// The policy.
    pub policy: Eviction,
    /// All zero unless the policy is [`Eviction::Mass`].
    pub mass: BlockMass,
}

impl Evictor {
    /// An evictor for `num_blocks` blocks; see [`BlockMass::new`].
    pub fn new(policy: Eviction, num_blocks: usize, decay: f64) -> Self {
        Self { policy, mass: BlockMass::new(num_blocks, decay) }
    }

    /// The place of a cached block: `depth` counts the blocks before it, `age` the insertions. The first block of a
    /// path is pinned under `mass`: everything behind it needs it.
    pub fn block_rank(&self, block: BlockId, depth: usize, age: u64) -> Rank {
        match self.policy {
            Eviction::Lru | Eviction::Fifo => Rank { pinned: false, importance: 0.0, age },
            Eviction::Mass => Rank { pinned: depth == 0, importance: importance(self.mass.of(block), depth), age },
        }
    }

    /// The place of a live branch under [`Eviction::Mass`] by the blocks that it would bring; between equals the smallest
    /// `age` goes first. A branch that brings none comes last.
    pub fn branch_rank(&self, private: &[BlockId], depth: usize, age: u64) -> Rank {
        // The mean: a sum would make every long branch precious, and those bring the most.
        let mass: f64 = private.iter().map(|&id| self.mass.of(id)).sum();
        let per_block = mass / private.len().max(1) as f64;
        Rank { pinned: private.is_empty(), importance: importance(per_block, depth), age }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::block_pool::BlockPool;

    /// Blocks come one by one, `(depth, importance before division)` each; past `capacity` the smallest goes. Returns
    /// those that went, in order.
    fn evicted(capacity: usize, blocks: &[(usize, f64)]) -> Vec<u64> {
        let mut held: Vec<Rank> = Vec::new();
        let mut gone = Vec::new();
        for (i, &(depth, worth)) in blocks.iter().enumerate() {
            held.push(Rank { pinned: false, importance: importance(worth, depth), age: i as u64 });
            if held.len() > capacity {
                let (at, _) = held.iter().enumerate().min_by_key(|(_, rank)| **rank).unwrap();
                gone.push(held.remove(at).age);
            }
        }
        gone
    }

    #[test]
    fn rk10_equal_importance_is_first_in_first_out() {
        assert_eq!(evicted(4, &[(1, 1.0); 8]), [0, 1, 2, 3]);
    }

    #[test]
    fn rk11_the_least_important_goes_even_if_it_just_came() {
        let blocks = [(0, 0.9), (1, 0.8), (2, 0.9), (1, 0.3), (3, 0.95), (0, 0.2)];
        assert_eq!(evicted(3, &blocks), [3, 4, 5]);
    }

    #[test]
    fn the_pinned_go_last_and_between_equals_the_smallest_age_first() {
        let e = Evictor::new(Eviction::Mass, 4, 1.0);
        let mut pool = BlockPool::new(4);
        let ids = pool.try_take(4).unwrap();
        assert!(e.block_rank(ids[0], 0, 0) > e.block_rank(ids[1], 1, 9));
        assert!(e.branch_rank(&ids, 0, 7) < e.branch_rank(&ids, 0, 8));
        assert!(e.branch_rank(&ids, 0, 8) < e.branch_rank(&[], 0, 7));
    }

    #[test]
    fn a_branch_is_worth_the_mean_mass_of_its_blocks_over_its_depth() {
        let mut e = Evictor::new(Eviction::Mass, 4, 1.0);
        let mut pool = BlockPool::new(4);
        let ids = pool.try_take(4).unwrap();
        for (&id, mass) in ids.iter().zip([4.0, 2.0, 2.5, 0.0]) {
            e.mass.add(id, mass);
        }
        assert_eq!(e.branch_rank(&ids[..2], 0, 0).importance, 3.0);
        assert_eq!(e.branch_rank(&ids[..2], 2, 0).importance, 1.0);
        assert!(e.branch_rank(&ids[2..3], 0, 0) < e.branch_rank(&ids[..2], 0, 0));
    }

    #[test]
    fn mass_fades_moves_and_dies_with_its_block() {
        let mut pool = BlockPool::new(2);
        let mut mass = BlockMass::new(2, 0.5);
        let ids = pool.try_take(2).unwrap();
        mass.begin_measurement();
        mass.add(ids[0], 8.0);
        mass.begin_measurement();
        mass.add(ids[0], 1.0);
        mass.add(ids[0], f64::NAN);
        assert_eq!(mass.of(ids[0]), 5.0);
        mass.copy(ids[0], ids[1]);
        assert_eq!((mass.of(ids[0]), mass.of(ids[1])), (5.0, 5.0));
        pool.release(ids[0]).unwrap();
        let again = pool.try_take(1).unwrap()[0];
        assert_eq!(again.index(), ids[0].index());
        assert_eq!(mass.of(again), 0.0);
        mass.add(again, 1.0);
        assert_eq!((mass.of(again), mass.of(ids[0])), (1.0, 0.0));
    }

    #[test]
    fn thousands_of_measurements_keep_the_order() {
        let mut pool = BlockPool::new(2);
        let mut mass = BlockMass::new(2, 0.9);
        let ids = pool.try_take(2).unwrap();
        for i in 0..20_000 {
            mass.begin_measurement();
            mass.add(ids[i % 2], 1.0);
            let (last, other) = (mass.of(ids[i % 2]), mass.of(ids[1 - i % 2]));
            assert!(last > other && last < 1.0 / (1.0 - 0.81) + 1e-9, "{i}: {last} {other}");
        }
        assert!((mass.of(ids[0]) - 0.9 / (1.0 - 0.81)).abs() < 1e-9);
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for policy in Eviction::ALL {
            assert_eq!(policy.to_string().parse::<Eviction>().unwrap(), policy);
        }
        let error = "random".parse::<Eviction>().unwrap_err().to_string();
        assert!(error.contains("lru, fifo, mass"), "{error}");
    }
}

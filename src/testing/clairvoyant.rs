//! What eviction costs at least: the fewest blocks that anybody computes again who knows all visits beforehand.
//!
//! A visit reads blocks in path order (each needs those before it), holds a number of blocks while it runs, and leaves
//! blocks behind, again in path order. Between two visits any of them may be kept, as long as what is kept through a
//! visit and what that visit holds fit the capacity together. A block that is read again and was not kept since it was
//! last left is computed again.
//!
//! *It bounds* every policy that serves the visits one at a time and in this order with whole blocks. Another order, or
//! several visits at once, is another problem.
//!
//! Each pair of neighbouring uses of a block is an interval that is kept or not, all of equal worth, and a visit limits
//! how many pass through it. Dropping those that end last wherever there are too many keeps the most of them (Belady).
//! To evict leaves before what they hang on costs nothing: a block is read whenever a later one of its path is, so its
//! interval never ends later. (Where a visit makes a block anew that others read, this may not hold, and the bound may
//! then lie below what leaves first allows.)

use std::collections::{BTreeSet, HashMap, HashSet};

/// See the module text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visit {
    /// Blocks it can do without computing, in path order.
    pub read: Vec<u64>,
    /// Blocks that are there when it ends, in path order.
    pub left: Vec<u64>,
    /// Blocks it takes while it runs, what it reads included.
    pub held: usize,
}

/// The fewest blocks computed again with room for `capacity` blocks; `None` when a visit alone does not fit.
pub fn fewest_recomputed(visits: &[Visit], capacity: usize) -> Option<u64> {
    let next_reads = next_reads(visits);
    let mut seen: HashSet<u64> = HashSet::new();
    // What is kept, by the visit that reads it next; and the same by block.
    let mut kept: BTreeSet<(usize, u64)> = BTreeSet::new();
    let mut next_of: HashMap<u64, usize> = HashMap::new();
    let mut recomputed = 0;
    for (visit, next_reads) in visits.iter().zip(next_reads) {
        for id in &visit.read {
            let was_kept = next_of.remove(id).is_some_and(|next| kept.remove(&(next, *id)));
            recomputed += u64::from(!was_kept && seen.contains(id));
        }
        let room = capacity.checked_sub(visit.held)?;
        while kept.len() > room {
            let (_, id) = kept.pop_last()?;
            next_of.remove(&id);
        }
        for (&id, next) in visit.left.iter().zip(next_reads) {
            if let Some(next) = next {
                kept.insert((next, id));
                next_of.insert(id, next);
            }
        }
        seen.extend(visit.read.iter().chain(&visit.left));
    }
    Some(recomputed)
}

/// For each block that a visit leaves: the visit that reads it next, unless another makes it anew before.
fn next_reads(visits: &[Visit]) -> Vec<Vec<Option<usize>>> {
    let mut next: HashMap<u64, Option<usize>> = HashMap::new();
    let mut reads = Vec::with_capacity(visits.len());
    for (t, visit) in visits.iter().enumerate().rev() {
        reads.push(visit.left.iter().map(|id| next.get(id).copied().flatten()).collect());
        next.extend(visit.left.iter().map(|&id| (id, None)));
        next.extend(visit.read.iter().map(|&id| (id, Some(t))));
    }
    reads.reverse();
    reads
}

/// Visits of a prefix cache, from the tokens alone: equal tokens behind equal tokens are one block.
#[derive(Debug)]
pub struct Trace {
    block_size: usize,
    ids: HashMap<(u64, Vec<u32>), u64>,
    visits: Vec<Visit>,
}

impl Trace {
    /// No visits yet, of blocks of `block_size` tokens.
    pub fn new(block_size: usize) -> Self {
        Self { block_size, ids: HashMap::new(), visits: Vec::new() }
    }

    /// A request that came with the first `prompt_len` of `tokens` and generated the rest. As in the engine, the last
    /// token of the prompt is always computed, and the last one generated never.
    pub fn push(&mut self, tokens: &[u32], prompt_len: usize) {
        let computed = &tokens[..tokens.len().saturating_sub(1).max(prompt_len.min(tokens.len()))];
        let left = self.path(computed);
        let num_read = prompt_len.saturating_sub(1) / self.block_size;
        let read = left[..num_read.min(left.len())].to_vec();
        self.visits.push(Visit { read, left, held: computed.len().div_ceil(self.block_size) });
    }

    /// The visits, in the order in which they came.
    pub fn visits(&self) -> &[Visit] {
        &self.visits
    }

    fn path(&mut self, tokens: &[u32]) -> Vec<u64> {
        let mut parent = 0;
        let mut path = Vec::with_capacity(tokens.len() / self.block_size);
        for block in tokens.chunks_exact(self.block_size) {
            let fresh = self.ids.len() as u64 + 1;
            parent = *self.ids.entry((parent, block.to_vec())).or_insert(fresh);
            path.push(parent);
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    /// A visit of the path of `len` blocks towards leaf `leaf` of a tree whose first `shared` blocks are common.
    fn path(leaf: u64, len: usize, shared: usize) -> Visit {
        let read: Vec<u64> =
            (0..len as u64).map(|i| if i < shared as u64 { i } else { 100 * (leaf + 1) + i }).collect();
        Visit { held: len, left: read.clone(), read }
    }

    #[test]
    fn a_cache_that_holds_all_computes_nothing_again() {
        let visits = [path(0, 3, 1), path(1, 3, 1), path(0, 3, 1), path(1, 2, 1)];
        assert_eq!(fewest_recomputed(&visits, 5), Some(0));
        assert_eq!(fewest_recomputed(&visits, 2), None);
    }

    #[test]
    fn what_is_needed_last_goes_first() {
        // Two blocks each, nothing shared, room for four: of a, b, c, a, b one path goes, and it is b (needed last).
        let visits: Vec<Visit> = [0, 1, 2, 0, 1].iter().map(|&leaf| path(leaf, 2, 0)).collect();
        assert_eq!(fewest_recomputed(&visits, 4), Some(2));
        assert_eq!(fewest_recomputed(&visits, 5), Some(1));
        assert_eq!(fewest_recomputed(&visits, 6), Some(0));
        // In turns with room for two of three, the least recently used is always the next one needed: LRU would compute
        // all 12 again. Whoever knows keeps one of two.
        let turns: Vec<Visit> = (0..9).map(|i| path(i % 3, 2, 0)).collect();
        assert_eq!(fewest_recomputed(&turns, 4), Some(6));
    }

    #[test]
    fn a_trace_knows_blocks_by_all_tokens_before_them() {
        let mut trace = Trace::new(4);
        trace.push(&[1, 1, 1, 1, 2, 2, 2, 2, 3, 3], 9);
        trace.push(&[9, 1, 1, 1, 2, 2, 2, 2, 3, 3], 8);
        trace.push(&[1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4], 12);
        let [a, b, c] = trace.visits() else { panic!() };
        assert_eq!((a.read.len(), a.left.len(), a.held), (2, 2, 3));
        assert_eq!((b.read.len(), b.left.len(), b.held), (1, 2, 3));
        assert_eq!((c.read.len(), c.left.len(), c.held), (2, 3, 3));
        assert_eq!(a.read, c.read);
        assert!(a.left.iter().all(|id| !b.left.contains(id)));
    }

    /// Every choice of what to keep behind every visit, leaves first: a subset that holds each block's parent too.
    fn exhaustive(visits: &[Visit], capacity: usize, parents: &HashMap<u64, u64>) -> u64 {
        let mut states: HashMap<BTreeSet<u64>, u64> = HashMap::from([(BTreeSet::new(), 0)]);
        let mut seen: BTreeSet<u64> = BTreeSet::new();
        for visit in visits {
            let mut next: HashMap<BTreeSet<u64>, u64> = HashMap::new();
            for (kept, cost) in &states {
                let missed = visit.read.iter().filter(|&id| seen.contains(id) && !kept.contains(id)).count() as u64;
                let through: Vec<u64> =
                    kept.iter().filter(|id| !visit.read.contains(id) && !visit.left.contains(id)).copied().collect();
                for mask in 0..1u32 << through.len() {
                    let passed = || through.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1).map(|(_, &id)| id);
                    if passed().count() + visit.held > capacity {
                        continue;
                    }
                    let state: BTreeSet<u64> = passed().chain(visit.left.iter().copied()).collect();
                    if state.iter().all(|id| parents.get(id).is_none_or(|p| state.contains(p))) {
                        let best = next.entry(state).or_insert(u64::MAX);
                        *best = (*best).min(cost + missed);
                    }
                }
            }
            seen.extend(visit.read.iter().chain(&visit.left));
            states = next;
        }
        states.into_values().min().unwrap()
    }

    /// Ten visits of a small tree; with `makes_anew`, some leave blocks that they could not read.
    fn visits(rng: &mut Fill, makes_anew: bool) -> Vec<Visit> {
        let shared = rng.below(3);
        let visit = |rng: &mut Fill| {
            let mut visit = path(rng.below(4) as u64, 1 + rng.below(3), shared);
            visit.held += rng.below(2);
            if makes_anew && visit.left.len() > 1 && rng.below(3) == 0 {
                visit.read.pop();
            }
            visit
        };
        (0..10).map(|_| visit(rng)).collect()
    }

    #[test]
    fn nobody_who_evicts_leaves_first_does_better() {
        let (mut rng, mut hard, mut below) = (Fill::new(3), 0, 0);
        for case in 0..300 {
            let makes_anew = case % 3 == 0;
            let visits = visits(&mut rng, makes_anew);
            let mut parents = HashMap::new();
            for visit in &visits {
                parents.extend(visit.left.windows(2).map(|pair| (pair[1], pair[0])));
            }
            let capacity = 4 + rng.below(3);
            let best = exhaustive(&visits, capacity, &parents);
            let bound = fewest_recomputed(&visits, capacity).unwrap();
            let holds = if makes_anew { bound <= best } else { bound == best };
            assert!(holds, "case {case}: {bound}, best {best}: {visits:?} in {capacity}");
            hard += usize::from(best > 0);
            below += usize::from(bound < best);
        }
        assert!(hard > 100 && below < 10, "{hard} cases were tight, {below} bounds below the best");
    }
}

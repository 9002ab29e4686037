//! From an attention plan to the work list of the `paged_attention` kernel.
//!
//! The plan says which slots are shared by whom. What is decided here is how much one CTA does: how many rows share a
//! run of slots (`rows`), and how many tiles of it one item takes (`tiles`). The bits of a result depend on `tiles` and
//! on the rows' own slots; the same plan and parameters always give the same list.
//!
//! ```text
//! plan group:  rows of A, B, C over a shared run, then each its own      (see AttentionPlan)
//! piece:       a row group of the kernel: rows under one root, at most `rows` of them
//! run:         slots that the same rows of a piece read one after another, whatever segments they came from
//! item:        `tiles` of a run; a piece with more than one is merged by the last CTA to arrive
//! ```
//!
//! *Cost model*, in clock cycles of one SM, for D = 128 and two-byte elements. Derived, not measured:
//!
//! ```text
//! work     items * OPEN + tiles * TILE_SHARED (a tile of K and V at an SM's part of the L2 bandwidth) + merges
//! longest  OPEN + tiles of the longest item * what a tile takes a CTA alone (by rows: warps divide rows x slots)
//! merge    ARRIVE + MERGE for each (query, item): 512 bytes of partial output, read by one CTA
//! cost     max(work * kv heads / SMs, longest) + the largest merge
//! ```
//!
//! Where the machine is full, `work` decides, and it falls with every row that shares a tile. Where it is not, `longest`
//! and the merge decide: then it can be better to let fewer rows share, and to read a run again from L2, than to have
//! one CTA merge the partials of all of them. A piece of one row that reads everything alone is among the candidates, so
//! sharing is never chosen where it costs more by this model.

use std::ops::Range;

use super::bindings::{RKSC_ATTENTION_MAX_ROWS, RKSC_NO_PARTIAL, rksc_attention_group, rksc_attention_item};
use crate::batch::{AttentionPlan, TILE_SLOTS};

/// First loads of an item, each waiting for the one before: item, rows and block ids, K.
const OPEN: u64 = 1500;
/// 32 KiB at 24 bytes a cycle: 5.5 TB/s of L2 over 132 SMs at 1.75 GHz.
const TILE_SHARED: u64 = 1300;
/// A tile for a CTA that has its SM to itself, for up to 16, 32, 64 queries.
const TILE_ALONE: [u64; 3] = [450, 550, 900];
/// Stores, fence, counter, and the first loads of the merge.
const ARRIVE: u64 = 1500;
/// 512 bytes at 40 bytes a cycle.
const MERGE: u64 = 13;

/// What the list depends on besides the plan.
#[derive(Clone, Copy, Debug)]
pub struct ItemParams {
    /// SMs of the device.
    pub num_sms: usize,
    /// KV heads: every item runs once for each.
    pub num_kv_heads: usize,
    /// Query heads of a kv head.
    pub gqa_group: usize,
    /// Slots of a block.
    pub block_size: usize,
    /// Partials there is memory for; 0 makes every item write its rows' results itself.
    pub max_partials: usize,
}

impl ItemParams {
    /// Rows that fit one item: what to give `AttentionPlan` as `max_group_rows`.
    pub fn max_group_rows(&self) -> usize {
        (RKSC_ATTENTION_MAX_ROWS as usize / self.gqa_group.max(1)).max(1)
    }

    /// Items that a plan of `num_rows` rows never exceeds. A tree of n rows has fewer than 2n runs, and no split of them
    /// adds more than twice what fills the device.
    pub fn max_items(&self, num_rows: usize) -> usize {
        2 * num_rows + self.target_items()
    }

    /// Items of all runs that, once per kv head, give every SM two CTAs.
    fn target_items(&self) -> usize {
        (2 * self.num_sms).div_ceil(self.num_kv_heads.max(1)).max(1)
    }
}

/// The kernel's arrays; `row_order` and `kv_lens` are the plan's own.
#[derive(Clone, Debug, Default)]
pub struct AttentionItems {
    /// Items of all groups, a group's together.
    pub items: Vec<rksc_attention_item>,
    /// Row groups, the one with the longest item first.
    pub groups: Vec<rksc_attention_group>,
    /// Block ids of all items.
    pub blocks: Vec<u32>,
    /// Partials the items write.
    pub num_partials: usize,
}

/// Rows that are merged together.
struct Piece {
    rows: Range<usize>,
    runs: Range<usize>,
}

/// Slots of the same rows, from tile to tile without a gap.
struct Run {
    rows: Range<usize>,
    tile_start: usize,
    num_slots: usize,
    /// Range of [`Cut::segments`].
    segments: Range<usize>,
}

impl Run {
    fn tiles(&self) -> usize {
        self.num_slots.div_ceil(TILE_SLOTS)
    }

    /// Items it makes at `tiles` each.
    fn items(&self, tiles: usize) -> usize {
        self.tiles().div_ceil(tiles).max(1)
    }
}

/// The plan's rows in pieces of at most so many.
#[derive(Default)]
struct Cut {
    pieces: Vec<Piece>,
    runs: Vec<Run>,
    segments: Vec<usize>,
}

/// One candidate, weighed.
struct Weight {
    cost: u64,
    num_partials: usize,
    num_items: usize,
}

impl AttentionItems {
    /// The list for `plan`, which was made with [`ItemParams::max_group_rows`].
    pub fn new(plan: &AttentionPlan, params: &ItemParams) -> Self {
        let mut best: Option<(u64, Cut, usize)> = None;
        let mut rows = params.max_group_rows();
        loop {
            let cut = Cut::new(plan, rows, params);
            let total: usize = cut.runs.iter().map(Run::tiles).sum();
            let longest = cut.runs.iter().map(Run::tiles).max().unwrap_or(0).max(1);
            let filled = total.div_ceil(params.target_items()).max(1);
            let mut chosen: Option<(u64, usize)> = None;
            let mut fewest_items = usize::MAX;
            for tiles in [filled, 2 * filled, 4 * filled, longest] {
                let weight = cut.weigh(tiles.min(longest), params);
                fewest_items = fewest_items.min(weight.num_items);
                let fits = weight.num_partials <= params.max_partials;
                if fits && chosen.is_none_or(|(cost, _)| weight.cost < cost) {
                    chosen = Some((weight.cost, tiles.min(longest)));
                }
            }
            if let Some((cost, tiles)) = chosen
                && best.as_ref().is_none_or(|b| cost < b.0)
            {
                best = Some((cost, cut, tiles));
            }
            // With the device full, fewer rows to an item only means more to read.
            let full = best.is_some() && fewest_items * params.num_kv_heads >= 2 * params.num_sms;
            if rows == 1 || full {
                break;
            }
            rows = rows.div_ceil(2);
        }
        // Rows alone, each in one item, need no partials and are the last candidate; so there is always a best.
        best.map(|(_, cut, tiles)| cut.emit(plan, tiles, params)).unwrap_or_default()
    }
}

impl Cut {
    fn new(plan: &AttentionPlan, rows: usize, params: &ItemParams) -> Self {
        let mut cut = Self::default();
        for group in &plan.groups {
            let segments = &plan.segments[group.segments.clone()];
            let mut at = group.rows.start;
            let mut from = 0;
            while at < group.rows.end {
                // The rows under one root: its segment begins at tile 0 and spans them all; a row without slots stands alone.
                let root = segments[from..].iter().find(|s| s.rows.start <= at && at < s.rows.end);
                let end = root.map_or(at + 1, |s| s.rows.end.min(group.rows.end));
                let mut to = from;
                while to < segments.len() && segments[to].rows.start < end {
                    to += 1;
                }
                let family = group.segments.start + from..group.segments.start + to;
                cut.family(plan, at..end, family, rows, params);
                (at, from) = (end, to);
            }
        }
        cut
    }

    /// Cuts the rows under one root evenly; into single rows where what they share is less than what sharing costs.
    fn family(
        &mut self,
        plan: &AttentionPlan,
        rows: Range<usize>,
        segments: Range<usize>,
        max: usize,
        params: &ItemParams,
    ) {
        let (mut saved, mut parts) = (0, 0);
        for s in &plan.segments[segments.clone()] {
            saved += (s.rows.len() - 1) * s.num_slots.div_ceil(TILE_SLOTS);
            parts += s.rows.len();
        }
        let count = segments.len();
        let overhead = ARRIVE
            + MERGE * (parts * params.gqa_group) as u64
            + OPEN * (count as u64).saturating_sub(rows.len() as u64);
        let alone = count > 1 && TILE_SHARED * saved as u64 <= overhead;
        let max = if alone { 1 } else { max };
        let pieces = rows.len().div_ceil(max);
        for i in 0..pieces {
            let part = rows.start + rows.len() * i / pieces..rows.start + rows.len() * (i + 1) / pieces;
            self.piece(plan, part, segments.clone());
        }
    }

    fn piece(&mut self, plan: &AttentionPlan, rows: Range<usize>, segments: Range<usize>) {
        let first_run = self.runs.len();
        for i in segments {
            let s = &plan.segments[i];
            let own = s.rows.start.max(rows.start)..s.rows.end.min(rows.end);
            if own.start >= own.end {
                continue;
            }
            let longest = plan.kv_lens[own.clone()].iter().map(|&n| n as usize).max().unwrap_or(0);
            let start = s.tile_start * TILE_SLOTS;
            let end = (start + s.num_slots).min(longest);
            if end <= start {
                continue;
            }
            let at = self.segments.len();
            self.segments.push(i);
            if let Some(last) = self.runs[first_run..].last_mut()
                && last.rows == own
                && last.tile_start * TILE_SLOTS + last.num_slots == start
            {
                last.num_slots = end - last.tile_start * TILE_SLOTS;
                last.segments.end = at + 1;
            } else {
                self.runs.push(Run {
                    rows: own,
                    tile_start: s.tile_start,
                    num_slots: end - start,
                    segments: at..at + 1,
                });
            }
        }
        if self.runs.len() == first_run {
            // Nothing to attend to: an item without slots writes zeros.
            let at = self.segments.len();
            self.runs.push(Run { rows: rows.clone(), tile_start: 0, num_slots: 0, segments: at..at });
        }
        self.pieces.push(Piece { rows, runs: first_run..self.runs.len() });
    }

    fn weigh(&self, tiles: usize, params: &ItemParams) -> Weight {
        let (mut work, mut longest, mut tail) = (0, 0, 0);
        let (mut num_items, mut num_partials) = (0, 0);
        for piece in &self.pieces {
            let runs = &self.runs[piece.runs.clone()];
            let items: usize = runs.iter().map(|r| r.items(tiles)).sum();
            let mut parts = 0;
            for run in runs {
                let n = run.items(tiles);
                let alone = match run.rows.len() * params.gqa_group {
                    0..=16 => TILE_ALONE[0],
                    17..=32 => TILE_ALONE[1],
                    _ => TILE_ALONE[2],
                };
                work += n as u64 * OPEN + run.tiles() as u64 * TILE_SHARED;
                longest = longest.max(OPEN + run.tiles().div_ceil(n) as u64 * alone);
                parts += run.rows.len() * n;
            }
            num_items += items;
            if items > 1 {
                let merge = ARRIVE + MERGE * (parts * params.gqa_group) as u64;
                work += merge;
                tail = tail.max(merge);
                num_partials += parts;
            }
        }
        let work = work * params.num_kv_heads as u64 / params.num_sms.max(1) as u64;
        Weight { cost: work.max(longest) + tail, num_partials, num_items }
    }

    fn emit(&self, plan: &AttentionPlan, tiles: usize, params: &ItemParams) -> AttentionItems {
        let mut out = AttentionItems::default();
        // The longest first, so that it is not the last to start where the items do not all run at once.
        let longest = |p: &Piece| self.runs[p.runs.clone()].iter().map(|r| r.tiles().div_ceil(r.items(tiles))).max();
        let mut order: Vec<&Piece> = self.pieces.iter().collect();
        order.sort_by_key(|p| std::cmp::Reverse(longest(p)));
        let mut emitted = vec![None; plan.segments.len()];
        for piece in order {
            let runs = &self.runs[piece.runs.clone()];
            let num_items: usize = runs.iter().map(|r| r.items(tiles)).sum();
            let group = out.groups.len() as u32;
            out.groups.push(rksc_attention_group {
                row_start: piece.rows.start as u32,
                num_rows: piece.rows.len() as u32,
                item_start: out.items.len() as u32,
                num_items: num_items as u32,
            });
            for run in runs {
                let blocks = self.run_blocks(plan, run, &mut emitted, &mut out.blocks);
                let count = run.items(tiles);
                for i in 0..count {
                    let first = run.tiles() * i / count;
                    let end = (run.tiles() * (i + 1) / count * TILE_SLOTS).min(run.num_slots);
                    let partial_start = if num_items > 1 { out.num_partials as u32 } else { RKSC_NO_PARTIAL };
                    out.items.push(rksc_attention_item {
                        row_start: run.rows.start as u32,
                        num_rows: run.rows.len() as u32,
                        slot_start: ((run.tile_start + first) * TILE_SLOTS) as u32,
                        num_slots: (end - (first * TILE_SLOTS).min(end)) as u32,
                        block_start: (blocks + first * TILE_SLOTS / params.block_size) as u32,
                        group,
                        partial_start,
                    });
                    if num_items > 1 {
                        out.num_partials += run.rows.len();
                    }
                }
            }
        }
        out
    }

    /// Where the run's block ids are. Those of a single segment are listed once, however many pieces read it.
    fn run_blocks(
        &self,
        plan: &AttentionPlan,
        run: &Run,
        emitted: &mut [Option<usize>],
        blocks: &mut Vec<u32>,
    ) -> usize {
        let segments = &self.segments[run.segments.clone()];
        if let [only] = segments
            && let Some(at) = emitted[*only]
        {
            return at;
        }
        let at = blocks.len();
        for &i in segments {
            blocks.extend_from_slice(&plan.blocks[plan.segments[i].blocks.clone()]);
        }
        if let [only] = segments {
            emitted[*only] = Some(at);
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::SequenceView;

    const H200: ItemParams =
        ItemParams { num_sms: 132, num_kv_heads: 4, gqa_group: 7, block_size: 16, max_partials: usize::MAX };

    /// Sequences as (block table, slots, rows), rows in order.
    type Seqs = Vec<(Vec<u32>, usize, usize)>;

    fn plan(seqs: &Seqs, params: &ItemParams) -> AttentionPlan {
        let mut at = 0;
        let views: Vec<SequenceView<'_>> = seqs
            .iter()
            .map(|(blocks, kv_len, rows)| {
                at += rows;
                SequenceView { rows: at - rows..at, blocks, kv_len: *kv_len }
            })
            .collect();
        AttentionPlan::new(&views, params.block_size, params.max_group_rows())
    }

    /// `branches` decode rows over a common prefix, and `own` slots each.
    fn branches(branches: usize, prefix: usize, own: usize) -> Seqs {
        let shared = prefix / 16;
        let private = (prefix + own).div_ceil(16) - shared;
        (0..branches)
            .map(|b| {
                let first = shared + b * private;
                let blocks = (0..shared).chain(first..first + private).map(|x| x as u32).collect();
                (blocks, prefix + own, 1)
            })
            .collect()
    }

    /// Every row meets its own slots once, in order, in its own blocks; partials are disjoint; groups fit.
    fn check(seqs: &Seqs, params: &ItemParams) -> AttentionItems {
        let plan = plan(seqs, params);
        let list = AttentionItems::new(&plan, params);
        let owner: Vec<(usize, usize)> = seqs
            .iter()
            .enumerate()
            .flat_map(|(i, (_, kv_len, rows))| (0..*rows).map(move |r| (i, kv_len + 1 + r - rows)))
            .collect();
        let mut reached = vec![0; plan.row_order.len()];
        let mut written = vec![0; plan.row_order.len()];
        let mut partials = vec![false; list.num_partials];
        let mut next_item = 0;
        for (g, group) in list.groups.iter().enumerate() {
            assert_eq!(group.item_start as usize, next_item);
            assert!(group.num_rows as usize <= params.max_group_rows() && group.num_items > 0);
            next_item += group.num_items as usize;
            for row in group.row_start..group.row_start + group.num_rows {
                written[row as usize] += 1;
            }
            for item in &list.items[group.item_start as usize..next_item] {
                assert_eq!(item.group as usize, g);
                assert_eq!(item.slot_start % 64, 0);
                assert!(item.row_start >= group.row_start && item.num_rows > 0);
                assert!(item.row_start + item.num_rows <= group.row_start + group.num_rows);
                assert_eq!(item.partial_start == RKSC_NO_PARTIAL, group.num_items == 1);
                for i in 0..item.num_rows as usize {
                    if group.num_items > 1 {
                        let partial = &mut partials[item.partial_start as usize + i];
                        assert!(!std::mem::replace(partial, true));
                    }
                    let row = item.row_start as usize + i;
                    let (seq, kv_len) = owner[plan.row_order[row] as usize];
                    assert_eq!(plan.kv_lens[row] as usize, kv_len);
                    let (start, end) = (item.slot_start as usize, (item.slot_start + item.num_slots) as usize);
                    if start < kv_len {
                        assert_eq!(reached[row], start);
                        reached[row] = end.min(kv_len);
                    }
                    for slot in (start..end.min(kv_len)).step_by(params.block_size) {
                        let at = item.block_start as usize + (slot - start) / params.block_size;
                        assert_eq!(list.blocks[at], seqs[seq].0[slot / params.block_size]);
                    }
                }
            }
        }
        assert_eq!(next_item, list.items.len());
        for (row, &reached) in reached.iter().enumerate() {
            assert_eq!(reached, plan.kv_lens[row] as usize);
            assert_eq!(written[row], 1);
        }
        assert!(partials.iter().all(|&p| p));
        assert!(list.num_partials <= params.max_partials);
        assert!(list.items.len() <= params.max_items(plan.row_order.len()), "{} items", list.items.len());
        list
    }

    fn most_rows(list: &AttentionItems) -> u32 {
        list.items.iter().map(|i| i.num_rows).max().unwrap()
    }

    #[test]
    fn a_short_sequence_is_one_item_without_partials() {
        let list = check(&vec![(vec![3, 1, 2], 40, 1)], &H200);
        assert_eq!((list.items.len(), list.num_partials), (1, 0));
    }

    #[test]
    fn a_long_sequence_is_split_to_fill_the_device() {
        let list = check(&branches(1, 0, 32768), &H200);
        assert!((16..=66).contains(&list.items.len()), "{} items", list.items.len());
    }

    #[test]
    fn branches_on_their_own_slots_fill_the_device_unsplit() {
        let list = check(&branches(64, 0, 4096), &H200);
        assert_eq!((list.items.len(), list.num_partials), (64, 0));
    }

    #[test]
    fn a_long_prefix_of_many_branches_is_read_once_a_group() {
        let list = check(&branches(64, 4096, 48), &H200);
        assert_eq!(most_rows(&list), 9);
        let read: u32 = list.items.iter().map(|i| i.num_slots).sum();
        assert!(read < 8 * 4096 + 64 * 128, "{read} slots");
    }

    #[test]
    fn a_prefix_on_an_idle_device_is_shared_by_few_rows_and_split() {
        // One CTA would merge the partials of 56 queries; four merge 14 each.
        let list = check(&branches(8, 1024, 32), &H200);
        assert!(most_rows(&list) < 8 && list.items.len() > 16, "{} rows", most_rows(&list));
    }

    #[test]
    fn one_shared_tile_of_two_branches_is_read_twice() {
        let list = check(&branches(2, 64, 40), &ItemParams { num_sms: 1, ..H200 });
        assert_eq!((most_rows(&list), list.items.len(), list.num_partials), (1, 2, 0));
    }

    #[test]
    fn without_memory_for_partials_rows_stand_alone() {
        let params = ItemParams { max_partials: 0, ..H200 };
        let list = check(&branches(8, 1024, 32), &params);
        assert_eq!((list.items.len(), list.num_partials), (8, 0));
        // A prefill needs none.
        let list = check(&vec![((0..64).collect(), 1024, 1024)], &ItemParams { num_sms: 8, ..params });
        assert_eq!(list.items.len(), 1024_usize.div_ceil(9));
    }

    #[test]
    fn no_rows_no_items() {
        let list = AttentionItems::new(&AttentionPlan::default(), &H200);
        assert!(list.items.is_empty() && list.groups.is_empty() && list.blocks.is_empty());
    }

    #[test]
    fn a_row_without_slots_gets_an_empty_item() {
        let seqs = vec![(vec![], 0, 1), (vec![4, 5, 6, 7, 8], 70, 1)];
        let list = check(&seqs, &H200);
        assert_eq!(list.items.iter().filter(|i| i.num_slots == 0).count(), 1);
    }

    #[test]
    fn random_trees_are_covered() {
        let mut fill = crate::testing::fill::Fill::new(9);
        for case in 0..300 {
            let block_size = [16, 32][fill.below(2)];
            let params = ItemParams {
                num_sms: [1, 8, 132][fill.below(3)],
                num_kv_heads: 1 + fill.below(8),
                gqa_group: [1, 2, 3, 4, 5, 6, 7, 8, 16][fill.below(9)],
                block_size,
                max_partials: [0, 10, usize::MAX][fill.below(3)],
            };
            let mut next = 0..u32::MAX;
            let mut seqs: Seqs = Vec::new();
            for i in 0..1 + fill.below(24) {
                let rows = if fill.below(4) == 0 { 1 + fill.below(90) } else { 1 };
                let mut blocks: Vec<u32> = Vec::new();
                if i > 0 && fill.below(4) > 0 {
                    let other = &seqs[fill.below(i)];
                    blocks.extend(&other.0[..fill.below((other.1 - other.2) / block_size + 1)]);
                }
                let kv_len = blocks.len() * block_size + rows + fill.below(300);
                while blocks.len() < kv_len.div_ceil(block_size) {
                    blocks.extend(next.next());
                }
                seqs.push((blocks, kv_len, rows));
            }
            eprintln!("case {case}: {params:?}");
            check(&seqs, &params);
        }
    }
}

//! Who reads which KV tiles for whom, from block ids alone.
//!
//! Sequences are sorted by block table, so those that share a run of blocks stand side by side; a run of tiles whose
//! blocks are identical in several sequences becomes one *segment*, read once for all their rows. Trees of any depth
//! fall out of the recursion, and a batch that shares nothing becomes one segment per sequence.
//!
//! ```text
//! rows of A, B, C:   | shared tiles 0..14 (one segment, rows A+B+C) | A 14..16 |
//!                                                                   | B+C 14..15 | B 15..17 |
//!                                                                                | C 15..16 |
//! ```
//!
//! A segment never begins inside a tile: a tile that is shared in part is read by each owner. So the tile grid, and
//! with it every bit of a row's result, does not depend on who else is in the batch. Each row folds its tiles left to
//! right in segment order.

use std::ops::Range;

use super::{TILE_SLOTS, window_start};

/// What the plan needs to know of a sequence.
#[derive(Clone, Debug)]
pub struct SequenceView<'a> {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Its block table, at least `ceil(kv_len / block_size)` long.
    pub blocks: &'a [u32],
    /// Slots its last row attends to.
    pub kv_len: usize,
}

/// A query tile: rows that are worked on together, with their segments in tile order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Range of [`AttentionPlan::row_order`].
    pub rows: Range<usize>,
    /// Range of [`AttentionPlan::segments`]; a row's segments appear in ascending tile order.
    pub segments: Range<usize>,
}

/// A run of tiles read once for a contiguous range of ordered rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanSegment {
    /// Range of [`AttentionPlan::row_order`], inside its group's rows.
    pub rows: Range<usize>,
    /// First tile; the segment's slots begin at `tile_start * 64`.
    pub tile_start: usize,
    /// Slots covered: `[tile_start * 64, tile_start * 64 + num_slots)`; a multiple of 64 unless it ends its rows.
    pub num_slots: usize,
    /// Range of [`AttentionPlan::blocks`]: the blocks of those slots, in order.
    pub blocks: Range<usize>,
}

/// See the module text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttentionPlan {
    /// Batch row of each ordered row.
    pub row_order: Vec<u32>,
    /// Slots each ordered row attends to.
    pub kv_lens: Vec<u32>,
    /// Query tiles; they cover `row_order` without overlap.
    pub groups: Vec<RowGroup>,
    /// Segments of all groups.
    pub segments: Vec<PlanSegment>,
    /// Block ids of all segments.
    pub blocks: Vec<u32>,
}

impl AttentionPlan {
    /// Plans `seqs`, with at most `max_group_rows` rows in a group. `block_size` divides 64.
    pub fn new(seqs: &[SequenceView<'_>], block_size: usize, max_group_rows: usize) -> Self {
        let mut order: Vec<&SequenceView<'_>> = seqs.iter().filter(|s| !s.rows.is_empty()).collect();
        order.sort_by(|a, b| a.blocks.cmp(b.blocks).then(a.rows.start.cmp(&b.rows.start)));
        let mut plan = Self::default();
        let mut group: Vec<Piece<'_>> = Vec::new();
        let mut group_rows = 0;
        for seq in order {
            let mut rows = seq.rows.clone();
            while !rows.is_empty() {
                let take = rows.len().min(max_group_rows.max(1) - group_rows);
                let piece_end = rows.start + take;
                group.push(Piece {
                    rows: rows.start..piece_end,
                    blocks: seq.blocks,
                    kv_len: seq.kv_len - (seq.rows.end - piece_end),
                });
                group_rows += take;
                rows.start = piece_end;
                if group_rows == max_group_rows.max(1) {
                    plan.close_group(&mut group, block_size);
                    group_rows = 0;
                }
            }
        }
        plan.close_group(&mut group, block_size);
        plan
    }

    /// Slots read by all segments, each segment's tiles once: what sharing saves shows here, and what a window does.
    pub fn slots_read(&self, window: Option<usize>) -> usize {
        self.segments.iter().map(|s| s.num_slots - self.slots_below(s, s.rows.clone(), window)).sum()
    }

    /// Slots at the segment's front, in whole tiles, that lie below the windows of all of the ordered `rows`.
    pub(crate) fn slots_below(&self, segment: &PlanSegment, rows: Range<usize>, window: Option<usize>) -> usize {
        if window.is_none() {
            return 0;
        }
        let start = segment.tile_start * TILE_SLOTS;
        let lens = self.kv_lens[rows].iter().map(|&n| n as usize).filter(|&n| n > start);
        let first = lens.map(|n| window_start(n, window)).min().unwrap_or(usize::MAX);
        (first.saturating_sub(start) / TILE_SLOTS * TILE_SLOTS).min(segment.num_slots)
    }

    fn close_group(&mut self, pieces: &mut Vec<Piece<'_>>, block_size: usize) {
        if pieces.is_empty() {
            return;
        }
        let first_row = self.row_order.len();
        let first_segment = self.segments.len();
        let mut starts = Vec::with_capacity(pieces.len() + 1);
        for piece in pieces.iter() {
            starts.push(self.row_order.len());
            for (i, row) in piece.rows.clone().enumerate() {
                self.row_order.push(row as u32);
                self.kv_lens.push((piece.kv_len + 1 + i - piece.rows.len()) as u32);
            }
        }
        starts.push(self.row_order.len());
        self.split(pieces, &starts, 0, block_size);
        self.groups
            .push(RowGroup { rows: first_row..self.row_order.len(), segments: first_segment..self.segments.len() });
        pieces.clear();
    }

    /// Emits the segments of `pieces` from `tile` on: the longest common run first, then each side of the fork.
    fn split(&mut self, pieces: &[Piece<'_>], starts: &[usize], tile: usize, block_size: usize) {
        let per_tile = TILE_SLOTS / block_size;
        let (first, rest) = match pieces.split_first() {
            Some(x) => x,
            None => return,
        };
        let rows = starts[0]..starts[pieces.len()];
        if rest.is_empty() {
            return self.push_segment(first.blocks, tile, first.kv_len, rows, block_size);
        }
        let mut end = tile;
        while pieces.iter().all(|p| p.shares_tile(first, end, per_tile)) {
            end += 1;
        }
        if end > tile {
            self.push_segment(first.blocks, tile, end * TILE_SLOTS, rows, block_size);
        }
        let mut from = 0;
        while from < pieces.len() {
            let mut to = from + 1;
            while to < pieces.len() && pieces[to].shares_tile(&pieces[from], end, per_tile) {
                to += 1;
            }
            self.split(&pieces[from..to], &starts[from..=to], end, block_size);
            from = to;
        }
    }

    fn push_segment(&mut self, blocks: &[u32], tile: usize, end_slot: usize, rows: Range<usize>, block_size: usize) {
        let start_slot = tile * TILE_SLOTS;
        if end_slot <= start_slot {
            return;
        }
        let from = self.blocks.len();
        self.blocks.extend_from_slice(&blocks[start_slot / block_size..end_slot.div_ceil(block_size)]);
        self.segments.push(PlanSegment {
            rows,
            tile_start: tile,
            num_slots: end_slot - start_slot,
            blocks: from..self.blocks.len(),
        });
    }
}

/// Some rows of one sequence.
struct Piece<'a> {
    rows: Range<usize>,
    blocks: &'a [u32],
    kv_len: usize,
}

impl Piece<'_> {
    /// Both hold the whole of `tile`, in the same blocks.
    fn shares_tile(&self, other: &Self, tile: usize, per_tile: usize) -> bool {
        let end_slot = (tile + 1) * TILE_SLOTS;
        let blocks = tile * per_tile..(tile + 1) * per_tile;
        self.kv_len >= end_slot && other.kv_len >= end_slot && self.blocks[blocks.clone()] == other.blocks[blocks]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(rows: Range<usize>, blocks: &[u32], kv_len: usize) -> SequenceView<'_> {
        SequenceView { rows, blocks, kv_len }
    }

    #[test]
    fn one_decode_row_is_one_segment() {
        let plan = AttentionPlan::new(&[seq(0..1, &[7, 8, 9], 40)], 16, 64);
        assert_eq!(plan.segments, [PlanSegment { rows: 0..1, tile_start: 0, num_slots: 40, blocks: 0..3 }]);
        assert_eq!(plan.kv_lens, [40]);
    }

    #[test]
    fn a_common_run_is_read_once_and_partial_tiles_are_private() {
        // 6 shared blocks = 96 slots: tile 0 is shared, tile 1 begins shared and ends private.
        let a: Vec<u32> = vec![0, 1, 2, 3, 4, 5, 10];
        let b: Vec<u32> = vec![0, 1, 2, 3, 4, 5, 11];
        let plan = AttentionPlan::new(&[seq(0..1, &b, 100), seq(1..2, &a, 98)], 16, 64);
        assert_eq!(plan.row_order, [1, 0]);
        assert_eq!(plan.kv_lens, [98, 100]);
        let shape: Vec<_> = plan.segments.iter().map(|s| (s.rows.clone(), s.tile_start, s.num_slots)).collect();
        assert_eq!(shape, [(0..2, 0, 64), (0..1, 1, 34), (1..2, 1, 36)]);
        assert_eq!(plan.slots_read(None), 134);
    }

    #[test]
    fn a_tree_of_depth_two() {
        let root: Vec<u32> = (0..8).collect(); // two tiles
        let with = |tail: &[u32]| [root.as_slice(), tail].concat();
        let a = with(&[20, 21, 22, 23, 30]);
        let b = with(&[20, 21, 22, 23, 31]);
        let c = with(&[24]);
        let plan = AttentionPlan::new(&[seq(0..1, &c, 130), seq(1..2, &b, 200), seq(2..3, &a, 194)], 16, 64);
        let shape: Vec<_> = plan.segments.iter().map(|s| (s.rows.clone(), s.tile_start, s.num_slots)).collect();
        assert_eq!(shape, [(0..3, 0, 128), (0..2, 2, 64), (0..1, 3, 2), (1..2, 3, 8), (2..3, 2, 2)]);
    }

    #[test]
    fn tiles_that_all_rows_have_left_behind_are_not_read() {
        let root: Vec<u32> = (0..8).collect(); // two tiles
        let with = |tail: &[u32]| [root.as_slice(), tail].concat();
        let (a, b) = (with(&[20, 21, 22, 23, 30]), with(&[24]));
        let plan = AttentionPlan::new(&[seq(0..1, &a, 194), seq(1..2, &b, 130)], 16, 64);
        let read = |window| plan.slots_read(Some(window));
        assert_eq!(plan.slots_read(None), 128 + 66 + 2);
        assert_eq!((read(1), read(2), read(3)), (2 + 2, 2 + 2, 64 + 66 + 2));
        assert_eq!((read(66), read(67), read(194)), (64 + 66 + 2, 128 + 66 + 2, 128 + 66 + 2));
        // Of some rows alone.
        assert_eq!(plan.slots_below(&plan.segments[0], 0..1, Some(67)), 64);
    }

    #[test]
    fn prefill_rows_get_one_slot_more_each_and_groups_are_bounded() {
        let blocks: Vec<u32> = (0..10).collect();
        let plan = AttentionPlan::new(&[seq(0..100, &blocks, 150)], 16, 64);
        assert_eq!(plan.groups.len(), 2);
        assert_eq!(plan.kv_lens[0], 51);
        assert_eq!(plan.kv_lens[99], 150);
        assert_eq!(plan.segments[0].num_slots, 51 + 63);
        assert_eq!(plan.segments[1].num_slots, 150);
    }
}

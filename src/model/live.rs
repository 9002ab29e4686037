//! The rows in flight during a pass: which sequences are left, in which row order, with which weight set.
//!
//! ```text
//! live rows:  | backbone sequences, in batch order | river sequences, in batch order |
//! ```

use std::ops::Range;

use super::{Groups, RowQuery, WeightSet};
use crate::backend::PassInputs;
use crate::batch::{AttentionPlan, Batch, BatchSeq, SequenceView};
use crate::gate::Effect;

/// See the module text.
pub(super) struct LiveRows {
    seqs: Vec<LiveSeq>,
}

#[derive(Clone)]
struct LiveSeq {
    /// Index in the batch.
    seq: usize,
    /// Its rows among the live rows.
    rows: Range<usize>,
    /// Its rows in the batch.
    batch_rows: Range<usize>,
    river: bool,
}

impl LiveRows {
    pub(super) fn new(batch: &Batch) -> Self {
        let live = |(i, s): (usize, &BatchSeq)| LiveSeq {
            seq: i,
            rows: s.rows.clone(),
            batch_rows: s.rows.clone(),
            river: false,
        };
        Self { seqs: batch.seqs.iter().enumerate().map(live).collect() }
    }

    /// What the pass needs of the live rows, in their order, and which queries its `query_rows` belong to.
    pub(super) fn inputs(
        &self,
        batch: &Batch,
        queries: &[RowQuery],
        block_size: usize,
        max_group_rows: usize,
    ) -> (PassInputs, Vec<usize>) {
        let (num_rows, num_queries) = (self.num_rows(), queries.len());
        let mut inputs = PassInputs {
            token_ids: Vec::with_capacity(num_rows),
            positions: Vec::with_capacity(num_rows),
            slots: Vec::with_capacity(num_rows),
            copies: batch.copies.clone(),
            query_rows: Vec::with_capacity(num_queries),
            ..Default::default()
        };
        let mut views = Vec::with_capacity(self.seqs.len());
        for seq in &self.seqs {
            inputs.token_ids.extend_from_slice(&batch.token_ids[seq.batch_rows.clone()]);
            inputs.positions.extend_from_slice(&batch.positions[seq.batch_rows.clone()]);
            inputs.slots.extend_from_slice(&batch.slots[seq.batch_rows.clone()]);
            let whole = &batch.seqs[seq.seq];
            let blocks = &batch.blocks[whole.blocks.clone()];
            views.push(SequenceView { rows: seq.rows.clone(), blocks, kv_len: whole.kv_len });
        }
        inputs.plan = AttentionPlan::new(&views, block_size, max_group_rows);
        let mut query_ids = Vec::with_capacity(num_queries);
        for (i, query) in queries.iter().enumerate() {
            if let Some(row) = self.live_row(query.row) {
                query_ids.push(i);
                inputs.query_rows.push(row as u32);
            }
        }
        (inputs, query_ids)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    pub(super) fn num_rows(&self) -> usize {
        self.seqs.last().map_or(0, |s| s.rows.end)
    }

    /// Row ranges with their weight set; at most two.
    pub(super) fn groups(&self) -> Groups {
        let split = self.seqs.iter().find(|s| s.river).map_or(self.num_rows(), |s| s.rows.start);
        [(0..split, WeightSet::Backbone), (split..self.num_rows(), WeightSet::River)]
            .into_iter()
            .filter(|(rows, _)| !rows.is_empty())
            .collect()
    }

    /// Where a sequence of the batch is among the live ones, if a gate with this effect may ask it: those in the river
    /// stay there.
    pub(super) fn eligible(&self, seq: usize, effect: Effect) -> Option<usize> {
        self.seqs.iter().position(|s| s.seq == seq && (effect != Effect::River || !s.river))
    }

    /// The batch row of a live sequence's last token.
    pub(super) fn batch_last_row(&self, seq: usize) -> Option<usize> {
        self.seqs.iter().find(|s| s.seq == seq).map(|s| s.batch_rows.end - 1)
    }

    pub(super) fn seq_of(&self, live_seq: usize) -> usize {
        self.seqs[live_seq].seq
    }

    pub(super) fn first_row(&self, live_seq: usize) -> usize {
        self.seqs[live_seq].rows.start
    }

    pub(super) fn last_row(&self, live_seq: usize) -> usize {
        self.seqs[live_seq].rows.end - 1
    }

    /// Where a batch row is now; `None` when its sequence has left.
    fn live_row(&self, batch_row: usize) -> Option<usize> {
        let seq = self.seqs.iter().find(|s| s.batch_rows.contains(&batch_row))?;
        Some(seq.rows.start + batch_row - seq.batch_rows.start)
    }

    /// Takes the sequences in `fired` (ascending) out, or moves them to the river. Returns the old live row of each new
    /// live row; [`inputs`](Self::inputs) must be staged again.
    pub(super) fn apply(&mut self, effect: Effect, fired: &[usize]) -> Vec<u32> {
        let old = std::mem::take(&mut self.seqs);
        let mut backbone = Vec::new();
        let mut river = Vec::new();
        for (i, mut seq) in old.into_iter().enumerate() {
            if fired.binary_search(&i).is_ok() {
                match effect {
                    Effect::Drop | Effect::Stop | Effect::Alias => continue,
                    Effect::River => seq.river = true,
                    Effect::Observe => {}
                }
            }
            if seq.river { river.push(seq) } else { backbone.push(seq) }
        }
        self.seqs = backbone;
        self.seqs.append(&mut river);
        let mut order = Vec::new();
        for seq in &mut self.seqs {
            let start = order.len();
            order.extend(seq.rows.clone().map(|r| r as u32));
            seq.rows = start..order.len();
        }
        order
    }
}

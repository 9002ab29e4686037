//! The rows in flight during a pass: which sequences are left, in batch order.

use std::ops::Range;

use super::{Asked, PassGate, river};
use crate::backend::PassInputs;
use crate::batch::{AttentionPlan, Batch, BatchSeq, SequenceView};
use crate::gate::{Effect, Rows, Statistic};
use crate::kv::SlotTransfer;

/// See the module text.
pub(super) struct LiveRows {
    seqs: Vec<LiveSeq>,
    /// Slots of rows that are in flight no more and take their KV from other sequences' rows, in every layer to come.
    transfers: Vec<SlotTransfer>,
    /// Sequences those come from.
    sources: Vec<usize>,
}

struct LiveSeq {
    /// Index in the batch.
    seq: usize,
    /// Its rows among the live rows.
    rows: Range<usize>,
    /// Its rows in the batch.
    batch_rows: BatchRows,
}

/// Rows of the batch that are in flight for one sequence, ascending.
#[derive(Clone)]
enum BatchRows {
    All(Range<usize>),
    Some(Vec<usize>),
}

impl BatchRows {
    /// Calls `each` with every maximal run of neighbours.
    fn for_each_run(&self, mut each: impl FnMut(Range<usize>)) {
        match self {
            Self::All(rows) => each(rows.clone()),
            Self::Some(rows) => {
                rows.chunk_by(|a, b| a + 1 == *b).for_each(|run| each(run[0]..run[run.len() - 1] + 1));
            }
        }
    }

    /// Where a row stands among them.
    fn place(&self, row: usize) -> Option<usize> {
        match self {
            Self::All(rows) => rows.contains(&row).then(|| row - rows.start),
            Self::Some(rows) => rows.binary_search(&row).ok(),
        }
    }

    fn last(&self) -> Option<usize> {
        match self {
            Self::All(rows) => rows.clone().last(),
            Self::Some(rows) => rows.last().copied(),
        }
    }
}

impl LiveRows {
    pub(super) fn new(batch: &Batch) -> Self {
        let live = |(i, s): (usize, &BatchSeq)| LiveSeq {
            seq: i,
            rows: s.rows.clone(),
            batch_rows: BatchRows::All(s.rows.clone()),
        };
        let seqs = batch.seqs.iter().enumerate().map(live).collect();
        Self { seqs, transfers: Vec::new(), sources: Vec::new() }
    }

    /// What the pass needs of the live rows, in their order, and which queries its `query_rows` belong to.
    pub(super) fn inputs(
        &self,
        Asked { batch, queries, gates }: Asked<'_>,
        block_size: usize,
        max_group_rows: usize,
    ) -> (PassInputs, Vec<usize>) {
        let (num_rows, num_queries) = (self.num_rows(), queries.len());
        let mut inputs = PassInputs {
            token_ids: Vec::with_capacity(num_rows),
            positions: Vec::with_capacity(num_rows),
            slots: Vec::with_capacity(num_rows),
            copies: batch.copies.clone(),
            transfers: self.transfers.clone(),
            query_rows: Vec::with_capacity(num_queries),
            exits: river::exits(gates).map(|gate| self.exits(gate, batch)).collect(),
            ..Default::default()
        };
        let ring_rows = if batch.keeps_queries() { batch.ring_rows.as_slice() } else { &[] };
        let mut views = Vec::with_capacity(self.seqs.len());
        for seq in &self.seqs {
            let whole = &batch.seqs[seq.seq];
            let blocks = &batch.blocks[whole.blocks.clone()];
            seq.batch_rows.for_each_run(|run| {
                let first = inputs.token_ids.len();
                inputs.token_ids.extend_from_slice(&batch.token_ids[run.clone()]);
                inputs.positions.extend_from_slice(&batch.positions[run.clone()]);
                inputs.slots.extend_from_slice(&batch.slots[run.clone()]);
                inputs.ring_rows.extend(ring_rows.get(run.clone()).into_iter().flatten());
                let kv_len = whole.kv_len - (whole.rows.end - run.end);
                views.push(SequenceView { rows: first..first + run.len(), blocks, kv_len });
            });
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

    pub(super) fn num_seqs(&self) -> usize {
        self.seqs.len()
    }

    pub(super) fn num_rows(&self) -> usize {
        self.seqs.last().map_or(0, |s| s.rows.end)
    }

    /// Of each live row, the live rows that decide whether `gate` sends it to the second weight set; none where the gate
    /// has no say. A sequence that takes KV from another, or gives it, stays as it is.
    fn exits(&self, gate: &PassGate<'_>, batch: &Batch) -> Vec<[u32; 2]> {
        let mut exits = vec![[0; 2]; self.num_rows()];
        for &member in &gate.seqs {
            let Some(live) = self.eligible(member, Effect::River) else { continue };
            let seq = &self.seqs[live];
            let first = match (gate.spec.statistic, &seq.batch_rows) {
                (_, BatchRows::Some(_)) => continue,
                (Statistic::StepSimilarity { of: Rows::Percentile { skip, .. } }, BatchRows::All(rows)) => {
                    let skipped = batch.positions[rows.clone()].iter().filter(|&&p| p < skip).count();
                    seq.rows.start + skipped
                }
                _ => seq.rows.end - 1,
            };
            let leaving = if gate.newest_alone { seq.rows.end - 1..seq.rows.end } else { seq.rows.clone() };
            exits[leaving].fill([first as u32, seq.rows.end as u32]);
        }
        exits
    }

    /// Where a sequence of the batch is among the live ones, if a gate with this effect may ask it: those that others
    /// take their KV from stay as they are.
    pub(super) fn eligible(&self, seq: usize, effect: Effect) -> Option<usize> {
        let may = effect == Effect::Observe || !self.sources.contains(&seq);
        self.seqs.iter().position(|s| s.seq == seq && may)
    }

    pub(super) fn has_transfers(&self) -> bool {
        !self.transfers.is_empty()
    }

    /// The batch row of a live sequence's last token.
    pub(super) fn batch_last_row(&self, seq: usize) -> Option<usize> {
        self.seqs.iter().find(|s| s.seq == seq).and_then(|s| s.batch_rows.last())
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
    pub(super) fn live_row(&self, batch_row: usize) -> Option<usize> {
        self.seqs.iter().find_map(|s| Some(s.rows.start + s.batch_rows.place(batch_row)?))
    }

    /// Takes the sequences in `fired` (ascending) out. Returns the old live row of each new live row;
    /// [`inputs`](Self::inputs) must be staged again.
    pub(super) fn take_out(&mut self, fired: &[usize]) -> Vec<u32> {
        let mut place = 0..;
        self.seqs.retain(|_| place.next().is_some_and(|i| fired.binary_search(&i).is_err()));
        let mut order = Vec::new();
        for seq in &mut self.seqs {
            let start = order.len();
            order.extend(seq.rows.clone().map(|r| r as u32));
            seq.rows = start..order.len();
        }
        order
    }

    /// Leaves `thinned` sequences only some of their rows; the others' slots take their KV from another sequence's.
    /// Returns what [`take_out`](Self::take_out) does.
    pub(super) fn thin(&mut self, thinned: Vec<Thinned>) -> Vec<u32> {
        let mut order = Vec::new();
        let mut thinned = thinned.into_iter().peekable();
        for (i, seq) in self.seqs.iter_mut().enumerate() {
            let start = order.len();
            match thinned.next_if(|t| t.live == i) {
                Some(t) => {
                    order.extend(t.kept.iter().map(|&(offset, _)| (seq.rows.start + offset) as u32));
                    seq.batch_rows = BatchRows::Some(t.kept.into_iter().map(|(_, batch_row)| batch_row).collect());
                    self.transfers.extend(t.transfers);
                    self.sources.push(t.source);
                }
                None => order.extend(seq.rows.clone().map(|r| r as u32)),
            }
            seq.rows = start..order.len();
        }
        order
    }
}

/// What is left of a sequence in flight.
pub(super) struct Thinned {
    /// Which.
    pub(super) live: usize,
    /// Its rows that run on: (place among its live rows, batch row), ascending.
    pub(super) kept: Vec<(usize, usize)>,
    /// The other rows' slots.
    pub(super) transfers: Vec<SlotTransfer>,
    /// The sequence they take their KV from.
    pub(super) source: usize,
}

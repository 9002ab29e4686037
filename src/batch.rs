//! A step as flat arrays: which tokens run, where their KV goes, and who attends to what.
//!
//! Made from a step plan on the host from token ids, positions and block ids alone; the model and the backends see
//! nothing of branches.

mod attention_plan;

pub use attention_plan::{AttentionPlan, PlanSegment, RowGroup, SequenceView};

use crate::backend::NO_RING_ROW;
use crate::kv::BlockCopy;

/// Slots per attention tile. The grid is anchored at slot 0 of a sequence and never moves.
pub const TILE_SLOTS: usize = 64;

/// The first slot that a row attends to which sees `kv_len` slots through a window over the newest; `None`: over all.
pub(crate) fn window_start(kv_len: usize, window: Option<usize>) -> usize {
    window.map_or(0, |w| kv_len.saturating_sub(w))
}

/// One step's input, in row order: each sequence's new tokens are contiguous rows.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[T]`
    pub token_ids: Vec<u32>,
    /// `[T]`: what RoPE uses.
    pub positions: Vec<u32>,
    /// `[T]`: `block_id * block_size + offset`, where this token's K and V go.
    pub slots: Vec<u32>,
    /// `[T]`: where the row's q is kept for a later cut, [`NO_RING_ROW`] for nowhere.
    pub ring_rows: Vec<u32>,
    /// `[num_seqs]`, rows in order.
    pub seqs: Vec<BatchSeq>,
    /// Block ids of all sequences, each sequence's range in its [`BatchSeq::blocks`].
    pub blocks: Vec<u32>,
    /// Copy-on-write heads, done in every layer before attention reads.
    pub copies: Vec<BlockCopy>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// The pass measures the attention that each of `blocks` receives from the last row of its sequence.
    pub measures_mass: bool,
}

/// One sequence of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSeq {
    /// Its new tokens' rows `[start, end)`.
    pub rows: std::ops::Range<usize>,
    /// Its block table, as a range of [`Batch::blocks`].
    pub blocks: std::ops::Range<usize>,
    /// Slots held after this step. Row `rows.end - 1` attends to `[0, kv_len)`, each earlier row to one slot less.
    pub kv_len: usize,
    /// From this one of its rows on, the attention its slots receive is reported; `None`: not at all.
    pub accumulates_from: Option<usize>,
}

impl Batch {
    /// Rows in this step.
    pub fn num_rows(&self) -> usize {
        self.token_ids.len()
    }

    /// Some row's q is kept.
    pub fn keeps_queries(&self) -> bool {
        self.ring_rows.iter().any(|&row| row != NO_RING_ROW)
    }

    /// Somebody adds up what slots receive.
    pub fn accumulates(&self) -> bool {
        self.seqs.iter().any(|s| s.accumulates_from.is_some())
    }

    /// The plan that covers every row of this batch.
    pub fn attention_plan(&self, block_size: usize, max_group_rows: usize) -> AttentionPlan {
        let views: Vec<SequenceView<'_>> = self
            .seqs
            .iter()
            .map(|s| SequenceView { rows: s.rows.clone(), blocks: &self.blocks[s.blocks.clone()], kv_len: s.kv_len })
            .collect();
        AttentionPlan::new(&views, block_size, max_group_rows)
    }
}

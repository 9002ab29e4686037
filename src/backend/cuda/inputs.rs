//! A pass's inputs in device memory: one buffer of 32-bit words, filled by one copy.
//!
//! ```text
//! | token_ids | positions | slots | ring_rows | query_rows | row_order | kv_lens | exits | num_items | items | groups | copies | transfers | blocks |
//! ```
//!
//! Sections are as long as their bucket, so that a recorded graph finds each where it was. Block ids come last: they
//! are reached through indices, and there may be any number. Only passes that keep queries have ring rows, and they are
//! shapes of their own, so that a recording either reads this pass's ring rows or writes to no ring.

use super::attention_items::{AttentionItems, ItemParams};
use super::bindings::{RKSC_NO_SLOT, rksc_attention_group, rksc_attention_item, rksc_block_copy, rksc_slot_transfer};
use super::device::{Device, DeviceBuf};
use super::graphs::{Shape, bucket};
use crate::backend::{PassInputs, checks};
use crate::batch::AttentionPlan;
use crate::error::{Error, Result};

/// Where a pass's inputs lie, and what the host needs to know of them. Valid until the next pass is staged.
pub struct CudaInputs {
    /// Counts as they are.
    pub(super) num_rows: usize,
    pub(super) num_queries: usize,
    pub(super) num_copies: usize,
    pub(super) num_transfers: usize,
    /// Rows the query ring must have for the ring rows; 0: none are named.
    pub(super) num_ring_rows: usize,
    /// Counts rounded up.
    pub(super) shape: Shape,
    /// Who attends to what, for counting.
    pub(super) plan: AttentionPlan,
    /// Slots copied on write.
    pub(super) slots_copied: usize,
    sections: Sections,
    /// Device address of the first word.
    base: usize,
}

/// First word of each section.
#[derive(Clone, Copy, Debug, Default)]
struct Sections {
    positions: usize,
    slots: usize,
    ring_rows: usize,
    query_rows: usize,
    row_order: usize,
    kv_lens: usize,
    exits: usize,
    num_items: usize,
    items: usize,
    groups: usize,
    copies: usize,
    transfers: usize,
    blocks: usize,
}

impl Sections {
    fn new(shape: Shape, num_copies: usize, num_transfers: usize) -> Self {
        let words = |bytes: usize| bytes / 4;
        let positions = shape.rows;
        let slots = positions + shape.rows;
        let ring_rows = slots + shape.rows;
        let query_rows = ring_rows + if shape.keeps_queries { shape.rows } else { 0 };
        let row_order = query_rows + shape.queries;
        let kv_lens = row_order + shape.rows;
        let exits = kv_lens + shape.rows;
        let num_items = exits + 2 * shape.rows * shape.gates;
        let items = num_items + 1;
        let groups = items + shape.items * words(size_of::<rksc_attention_item>());
        // A group has a row at least.
        let copies = groups + shape.rows * words(size_of::<rksc_attention_group>());
        let transfers = copies + num_copies * words(size_of::<rksc_block_copy>());
        let blocks = transfers + num_transfers * words(size_of::<rksc_slot_transfer>());
        Self {
            positions,
            slots,
            ring_rows,
            query_rows,
            row_order,
            kv_lens,
            exits,
            num_items,
            items,
            groups,
            copies,
            transfers,
            blocks,
        }
    }
}

impl CudaInputs {
    fn at<T>(&self, word: usize) -> *const T {
        (self.base + word * size_of::<u32>()) as *const T
    }

    pub(super) fn token_ids(&self) -> *const u32 {
        self.at(0)
    }

    pub(super) fn positions(&self) -> *const u32 {
        self.at(self.sections.positions)
    }

    pub(super) fn slots(&self) -> *const u32 {
        self.at(self.sections.slots)
    }

    /// Null where no row's q is kept.
    pub(super) fn ring_rows(&self) -> *const u32 {
        if self.shape.keeps_queries { self.at(self.sections.ring_rows) } else { std::ptr::null() }
    }

    pub(super) fn query_rows(&self) -> *const u32 {
        self.at(self.sections.query_rows)
    }

    pub(super) fn row_order(&self) -> *const u32 {
        self.at(self.sections.row_order)
    }

    pub(super) fn kv_lens(&self) -> *const u32 {
        self.at(self.sections.kv_lens)
    }

    /// Which rows decide for each row, as one of the gates has it.
    pub(super) fn exits(&self, gate: usize) -> Result<*const u32> {
        if gate >= self.shape.gates {
            return Err(Error::Internal(format!("gate {gate} of {} that were staged", self.shape.gates)));
        }
        Ok(self.at(self.sections.exits + 2 * self.shape.rows * gate))
    }

    pub(super) fn num_items(&self) -> *const u32 {
        self.at(self.sections.num_items)
    }

    pub(super) fn items(&self) -> *const rksc_attention_item {
        self.at(self.sections.items)
    }

    pub(super) fn groups(&self) -> *const rksc_attention_group {
        self.at(self.sections.groups)
    }

    pub(super) fn copies(&self) -> *const rksc_block_copy {
        self.at(self.sections.copies)
    }

    pub(super) fn transfers(&self) -> *const rksc_slot_transfer {
        self.at(self.sections.transfers)
    }

    pub(super) fn blocks(&self) -> *const u32 {
        self.at(self.sections.blocks)
    }
}

/// The device buffer of the inputs and the host words on their way to it.
#[derive(Default)]
pub(super) struct InputStore {
    buffer: Option<DeviceBuf<u32>>,
    words: Vec<u32>,
}

impl InputStore {
    /// Lays out and uploads `inputs`. The flag says whether the buffer moved.
    pub(super) fn stage(
        &mut self,
        device: &mut Device,
        inputs: PassInputs,
        params: &ItemParams,
    ) -> Result<(CudaInputs, bool)> {
        let list = AttentionItems::new(&inputs.plan, params);
        let num_rows = inputs.token_ids.len();
        let num_ring_rows = checks::ring_rows(&inputs.ring_rows, num_rows)?;
        let ring_rows = if num_ring_rows > 0 { inputs.ring_rows.as_slice() } else { &[] };
        let shape = Shape {
            rows: bucket(num_rows),
            queries: bucket(inputs.query_rows.len()),
            items: list.items.len().next_power_of_two(),
            partials: list.num_partials.next_power_of_two(),
            keeps_queries: num_ring_rows > 0,
            gates: inputs.exits.len(),
            variant: 0,
        };
        let sections = Sections::new(shape, inputs.copies.len(), inputs.transfers.len());
        self.words.clear();
        let mut put = |start: usize, words: &[u32], filler: u32| {
            self.words.resize(start, filler);
            self.words.extend_from_slice(words);
        };
        put(0, &inputs.token_ids, 0);
        put(sections.positions, &inputs.positions, 0);
        put(sections.slots, &inputs.slots, 0);
        put(sections.ring_rows, ring_rows, RKSC_NO_SLOT);
        put(sections.query_rows, &inputs.query_rows, RKSC_NO_SLOT);
        put(sections.row_order, &inputs.plan.row_order, 0);
        put(sections.kv_lens, &inputs.plan.kv_lens, 0);
        for (gate, exits) in inputs.exits.iter().enumerate() {
            // What fills the rows up goes the way of the last, so that no weights are read for it alone.
            let last = exits.last().copied().unwrap_or_default();
            let padded: Vec<[u32; 2]> = exits.iter().copied().chain(std::iter::repeat(last)).take(shape.rows).collect();
            put(sections.exits + 2 * shape.rows * gate, padded.as_flattened(), 0);
        }
        put(sections.num_items, &[list.items.len() as u32], 0);
        put(sections.items, bytemuck::cast_slice(&list.items), 0);
        put(sections.groups, bytemuck::cast_slice(&list.groups), 0);
        put(sections.copies, &copies(&inputs), 0);
        put(sections.transfers, &transfers(&inputs), 0);
        put(sections.blocks, &list.blocks, 0);
        let fits = self.buffer.as_ref().is_some_and(|b| b.len() >= self.words.len());
        if !fits {
            self.buffer = Some(device.alloc(2 * self.words.len().next_power_of_two())?);
        }
        let mut base = 0;
        if let Some(buffer) = &mut self.buffer {
            device.upload(buffer, 0, &self.words)?;
            base = buffer.ptr() as usize;
        }
        let staged = CudaInputs {
            num_rows,
            num_queries: inputs.query_rows.len(),
            num_copies: inputs.copies.len(),
            num_transfers: inputs.transfers.len(),
            num_ring_rows,
            shape,
            plan: inputs.plan,
            slots_copied: inputs.copies.iter().map(|c| c.num_slots as usize).sum(),
            sections,
            base,
        };
        Ok((staged, !fits))
    }
}

/// The words of `rksc_block_copy`.
fn copies(inputs: &PassInputs) -> Vec<u32> {
    inputs.copies.iter().flat_map(|c| [c.src, c.dst, c.num_slots]).collect()
}

/// The words of `rksc_slot_transfer`.
fn transfers(inputs: &PassInputs) -> Vec<u32> {
    inputs.transfers.iter().flat_map(|t| [t.src, t.dst, t.shift.cast_unsigned()]).collect()
}

//! What every backend asks of a probe's parameters before it touches memory.

use super::MassSequence;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// Candidate tokens are ascending ids below `vocab`, one at least.
pub(super) fn candidates(candidates: &[u32], vocab: usize) -> Result<()> {
    let ascending = candidates.windows(2).all(|pair| pair[0] < pair[1]);
    match candidates.last() {
        Some(&last) if ascending && (last as usize) < vocab => Ok(()),
        _ => Err(Error::Shape {
            op: "entropy_probe",
            expected: format!("ascending candidate tokens below {vocab}, one at least"),
            got: format!("{candidates:?}"),
        }),
    }
}

/// A similarity has a branch, a layer and a column at least.
pub(super) fn similarity(num_layers: usize, num_branches: usize, hidden: usize) -> Result<()> {
    if num_layers > 0 && num_branches > 0 && hidden > 0 {
        return Ok(());
    }
    Err(Error::Shape {
        op: "branch_similarity",
        expected: "a layer, a branch and a column at least".into(),
        got: format!("[{num_layers}, {num_branches}, {hidden}]"),
    })
}

/// Every sequence's rows lie below `num_rows` and attend to a slot each, and its table holds its slots. Returns the
/// slots of all sequences.
pub(super) fn sequences(
    sequences: &[MassSequence],
    blocks: &[u32],
    num_rows: usize,
    layout: &KvLayout,
) -> Result<usize> {
    let mut slots = 0;
    for s in sequences {
        let table = s.block_start..s.block_start + s.kv_len.div_ceil(layout.block_size.max(1));
        let held = blocks.get(table).is_some_and(|t| t.iter().all(|&b| (b as usize) < layout.num_blocks));
        if !held || s.rows.is_empty() || s.rows.end > num_rows || s.rows.len() > s.kv_len {
            return Err(Error::Shape {
                op: "attention_mass",
                expected: format!("rows below {num_rows} with a slot each, and a table of blocks for them"),
                got: format!("{s:?}, {} table entries", blocks.len()),
            });
        }
        slots += s.kv_len;
    }
    Ok(slots)
}

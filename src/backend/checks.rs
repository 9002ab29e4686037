//! What every backend asks of an op's parameters before it touches memory.

use super::{Backend, KvCompact, KvScores, MassSequence, NO_RING_ROW};
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

/// A row attends to its own slot at least, and a cap is one.
pub(super) fn window_and_softcap(op: &'static str, window: Option<usize>, softcap: Option<f32>) -> Result<()> {
    if window != Some(0) && softcap.is_none_or(|cap| cap > 0.0 && cap.is_finite()) {
        return Ok(());
    }
    let expected = "a window of a slot at least, a finite soft cap above 0".into();
    Err(Error::Shape { op, expected, got: format!("window {window:?}, soft cap {softcap:?}") })
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

/// What turns is an even part of an even head.
pub(super) fn rotary(op: &'static str, rotary_dim: usize, head_dim: usize) -> Result<()> {
    if rotary_dim > 0 && rotary_dim <= head_dim && rotary_dim.is_multiple_of(2) && head_dim.is_multiple_of(2) {
        return Ok(());
    }
    let expected = format!("an even rotary_dim from 2 to an even head_dim of {head_dim}");
    Err(Error::Shape { op, expected, got: rotary_dim.to_string() })
}

/// A cap divides.
pub(super) fn softcap(cap: f32) -> Result<()> {
    if cap > 0.0 && cap.is_finite() {
        return Ok(());
    }
    Err(Error::Shape { op: "softcap", expected: "a finite cap above 0".into(), got: cap.to_string() })
}

/// Ring rows of a pass of `num_rows` rows: none, or one each. Returns how many rows the ring must have for them.
pub(super) fn ring_rows(ring_rows: &[u32], num_rows: usize) -> Result<usize> {
    if !ring_rows.is_empty() && ring_rows.len() != num_rows {
        let got = format!("{} ring rows", ring_rows.len());
        return Err(Error::Shape { op: "stage", expected: format!("none, or one for each of {num_rows} rows"), got });
    }
    Ok(ring_rows.iter().filter(|&&row| row != NO_RING_ROW).max().map_or(0, |&row| row as usize + 1))
}

/// Named ring rows without a ring would be lost without a word.
pub(super) fn ring_is_there(num_ring_rows: usize, there: bool) -> Result<()> {
    if num_ring_rows == 0 || there {
        return Ok(());
    }
    let expected = format!("a query ring of {num_ring_rows} rows");
    Err(Error::Shape { op: "rope_append", expected, got: "none".into() })
}

/// A table that holds the sequence's slots, a query at least, an odd pooling, a threshold no zero key passes.
pub(super) fn kv_scores<B: Backend>(p: &KvScores<'_, B>) -> Result<()> {
    window_and_softcap("kv_scores", None, p.softcap)?;
    let KvLayout { num_kv_heads, block_size, num_blocks, .. } = *p.layout;
    let table = p.blocks.get(..p.num_slots.div_ceil(block_size.max(1)));
    let held = table.is_some_and(|t| t.iter().all(|&b| (b as usize) < num_blocks));
    let heads = num_kv_heads > 0 && p.num_q_heads > 0 && p.num_q_heads.is_multiple_of(num_kv_heads);
    let wanted = p.window <= p.num_slots && !p.query_rows.is_empty() && p.pool_size % 2 == 1;
    if held && heads && wanted && p.threshold >= 0.0 {
        return Ok(());
    }
    Err(Error::Shape {
        op: "kv_scores",
        expected: "a table of the slots, a window within them, a query, an odd pool, a threshold of 0 at least".into(),
        got: format!(
            "{} slots in {} blocks, window {}, queries {:?}, pool {}, threshold {}, {} query heads of {:?}",
            p.num_slots,
            p.blocks.len(),
            p.window,
            p.query_rows,
            p.pool_size,
            p.threshold,
            p.num_q_heads,
            p.layout
        ),
    })
}

/// Every head keeps as many slots of the table, ascending, none of them below where it goes. Returns how many rows move.
pub(super) fn kv_compact<B: Backend>(p: &KvCompact<'_, B>) -> Result<usize> {
    let KvLayout { num_kv_heads, block_size, num_blocks, .. } = *p.layout;
    let refuse = |got: String| {
        let expected = "ascending slots of the table, as many a head, none below where it goes".into();
        Err(Error::Shape { op: "kv_compact", expected, got })
    };
    let num_keep = p.keep.len() / num_kv_heads.max(1);
    if num_keep * num_kv_heads != p.keep.len() || p.blocks.iter().any(|&b| b as usize >= num_blocks) {
        return refuse(format!("{} slots of {num_kv_heads} heads, blocks {:?}", p.keep.len(), p.blocks));
    }
    let capacity = p.blocks.len() * block_size;
    let mut moved = 0;
    for keep in p.keep.chunks(num_keep.max(1)) {
        let ascending = keep.windows(2).all(|pair| pair[0] < pair[1]);
        // Ascending, so the first decides for all.
        let downwards = keep.first().is_none_or(|&slot| slot as usize >= p.first_slot);
        if !ascending || !downwards || keep.last().is_some_and(|&slot| slot as usize >= capacity) {
            return refuse(format!("{keep:?} to {} of {capacity}", p.first_slot));
        }
        moved += keep.iter().zip(p.first_slot..).filter(|&(&from, to)| from as usize != to).count();
    }
    Ok(moved)
}

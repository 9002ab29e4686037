//! Oracle of `kv_compact`: a gather out of place.

/// Rows of one head after the move: `keep[i]` of `rows` at `first_slot + i`, all else as it was.
pub fn kv_compact<R: Clone>(rows: &[R], keep: &[u32], first_slot: usize) -> Vec<R> {
    let mut moved = rows.to_vec();
    for (i, &slot) in keep.iter().enumerate() {
        moved[first_slot + i] = rows[slot as usize].clone();
    }
    moved
}

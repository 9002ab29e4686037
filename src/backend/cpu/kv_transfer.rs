//! K and V of slots for other positions.

use super::elem::Elem;
use crate::error::{Error, Result};
use crate::kv::{KvLayout, SlotTransfer};

/// For every transfer and kv head: V is copied; the first R = `2 * inv_freq.len()` elements of K, seen as pairs
/// (i, i + R/2), are turned by `shift * inv_freq[i]`, and the others copied. A shift of 0 copies K bit for bit.
pub fn kv_transfer<T: Elem>(
    transfers: &[SlotTransfer],
    k_cache: &mut [T],
    v_cache: &mut [T],
    inv_freq: &[f32],
    layout: &KvLayout,
) -> Result<()> {
    let (dim, size) = (layout.head_dim, layout.block_size);
    let cache = layout.num_blocks * layout.block_elems();
    let num_slots = layout.num_blocks * size;
    let fits = |t: &SlotTransfer| (t.src.max(t.dst) as usize) < num_slots;
    let (half, turned) = (inv_freq.len(), 2 * inv_freq.len());
    if k_cache.len() < cache || v_cache.len() < cache || turned > dim || !transfers.iter().all(fits) {
        let expected = format!("slots below {num_slots}, at most {} frequencies", dim / 2);
        return Err(Error::Shape { op: "kv_transfer", expected, got: format!("{transfers:?}") });
    }
    let mut key = vec![0.0; turned];
    for t in transfers {
        let turns: Vec<(f32, f32)> = inv_freq.iter().map(|f| (t.shift as f32 * f).sin_cos()).collect();
        for head in 0..layout.num_kv_heads {
            let elem = |slot: u32| layout.elem(slot as usize / size, head, slot as usize % size);
            let (from, to) = (elem(t.src), elem(t.dst));
            v_cache.copy_within(from..from + dim, to);
            if t.shift == 0 {
                k_cache.copy_within(from..from + dim, to);
                continue;
            }
            k_cache.copy_within(from + turned..from + dim, to + turned);
            for (x, k) in key.iter_mut().zip(&k_cache[from..from + turned]) {
                *x = k.widen();
            }
            let (low, high) = key.split_at(half);
            for (i, ((a, b), (sin, cos))) in low.iter().zip(high).zip(&turns).enumerate() {
                k_cache[to + i] = T::narrow(a * cos - b * sin);
                k_cache[to + half + i] = T::narrow(b * cos + a * sin);
            }
        }
    }
    Ok(())
}

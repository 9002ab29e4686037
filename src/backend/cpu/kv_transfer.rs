//! K and V of slots for other positions.

use super::elem::Elem;
use crate::error::{Error, Result};
use crate::kv::{KvLayout, SlotTransfer};

/// For every transfer and kv head: V is copied; K, seen as pairs (i, i + D/2), is turned by `shift * inv_freq[i]`. A
/// shift of 0 copies K bit for bit.
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
    if k_cache.len() < cache || v_cache.len() < cache || inv_freq.len() < dim / 2 || !transfers.iter().all(fits) {
        let expected = format!("slots below {num_slots}, {} frequencies", dim / 2);
        return Err(Error::Shape { op: "kv_transfer", expected, got: format!("{transfers:?}") });
    }
    let mut key = vec![0.0; dim];
    for t in transfers {
        let turns: Vec<(f32, f32)> = inv_freq[..dim / 2].iter().map(|f| (t.shift as f32 * f).sin_cos()).collect();
        for head in 0..layout.num_kv_heads {
            let elem = |slot: u32| layout.elem(slot as usize / size, head, slot as usize % size);
            let (from, to) = (elem(t.src), elem(t.dst));
            v_cache.copy_within(from..from + dim, to);
            if t.shift == 0 {
                k_cache.copy_within(from..from + dim, to);
                continue;
            }
            for (x, k) in key.iter_mut().zip(&k_cache[from..from + dim]) {
                *x = k.widen();
            }
            let (low, high) = key.split_at(dim / 2);
            for (i, ((a, b), (sin, cos))) in low.iter().zip(high).zip(&turns).enumerate() {
                k_cache[to + i] = T::narrow(a * cos - b * sin);
                k_cache[to + dim / 2 + i] = T::narrow(b * cos + a * sin);
            }
        }
    }
    Ok(())
}

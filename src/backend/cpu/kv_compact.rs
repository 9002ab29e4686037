//! Kept slots move down in place, each kv head its own set.

use super::elem::Elem;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// For every kv head h and i ascending: slot `first_slot + i` takes K and V of slot `keep[h][i]`. Lists are ascending and
/// `keep[h][i] >= first_slot + i`, so no slot is overwritten before it is read. Rows in place already are not touched.
pub fn kv_compact<T: Elem>(
    k_cache: &mut [T],
    v_cache: &mut [T],
    blocks: &[u32],
    keep: &[u32],
    first_slot: usize,
    layout: &KvLayout,
) -> Result<()> {
    let (dim, size) = (layout.head_dim, layout.block_size);
    let cache = layout.num_blocks * layout.block_elems();
    if k_cache.len() < cache || v_cache.len() < cache {
        let got = format!("{} and {}", k_cache.len(), v_cache.len());
        return Err(Error::Shape { op: "kv_compact", expected: format!("{cache} elements of K and V"), got });
    }
    let num_keep = keep.len() / layout.num_kv_heads.max(1);
    for (head, keep) in keep.chunks(num_keep.max(1)).enumerate() {
        let elem = |slot: usize| layout.elem(blocks[slot / size] as usize, head, slot % size);
        for (&from, to) in keep.iter().zip(first_slot..) {
            if from as usize == to {
                continue;
            }
            let (from, to) = (elem(from as usize), elem(to));
            k_cache.copy_within(from..from + dim, to);
            v_cache.copy_within(from..from + dim, to);
        }
    }
    Ok(())
}

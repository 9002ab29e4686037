//! A branch's K and V as numbers, for those who compare caches.

use super::Engine;
use crate::error::{Error, Result};
use crate::tree::BranchId;

/// K, behind RoPE, and V of one layer, `[slots, kv heads, head_dim]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerKv {
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

impl Engine {
    /// K and V of the branch's slots `[from, ..)`, layer by layer. Reads every layer of every block of it: not for inner
    /// loops. Refused for a branch that has been swapped out.
    pub fn read_kv(&mut self, branch: BranchId, from: usize) -> Result<Vec<LayerKv>> {
        let b = self.tree.get(branch)?;
        if b.swapped.is_some() {
            return Err(Error::Branch { branch: branch.to_string(), why: "is swapped out" });
        }
        let num_slots = b.table.len();
        let blocks = b.table.indices().to_vec();
        let (layout, num_layers) = (self.layout, self.model.num_layers);
        let mut layers = vec![LayerKv { k: Vec::new(), v: Vec::new() }; num_layers];
        let mut bytes = Vec::new();
        for (i, &block) in blocks.iter().enumerate().skip(from / layout.block_size) {
            bytes.clear();
            self.runner.read_block(block, &mut bytes)?;
            let values = layout.dtype.widen(&bytes);
            let first = i * layout.block_size;
            for (layer, kv) in values.chunks_exact(2 * layout.block_elems()).zip(&mut layers) {
                let (k, v) = layer.split_at(layout.block_elems());
                for slot in from.max(first)..num_slots.min(first + layout.block_size) {
                    for head in 0..layout.num_kv_heads {
                        let at = layout.elem(0, head, slot - first);
                        kv.k.extend_from_slice(&k[at..at + layout.head_dim]);
                        kv.v.extend_from_slice(&v[at..at + layout.head_dim]);
                    }
                }
            }
        }
        Ok(layers)
    }
}

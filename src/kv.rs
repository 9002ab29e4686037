//! The KV cache: the one place where its layout is defined.
//!
//! Per layer, K and V are `[num_blocks, num_kv_heads, block_size, head_dim]`, so a head's tokens are contiguous
//! within a block and heads may later keep different tokens while the block table stays one per branch:
//!
//! ```text
//! block b:  | head 0: slot 0 .. slot 15 | head 1: slot 0 .. slot 15 | ...     each slot: head_dim elements
//! ```
//!
//! `position` (what RoPE used) and `slot` are different things; neither is ever derived from the other.

pub mod block_pool;
pub mod block_table;
pub mod budget;
pub mod eviction;
pub mod prefix_cache;
pub(crate) mod selection;

use crate::dtype::DType;

/// Geometry of one layer's K (and, identically, V).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Blocks per layer.
    pub num_blocks: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Tokens per block: 16 or 32.
    pub block_size: usize,
    /// Elements per head and token.
    pub head_dim: usize,
    /// Element type.
    pub dtype: DType,
}

impl KvLayout {
    /// Elements of one block of K: `num_kv_heads * block_size * head_dim`.
    pub const fn block_elems(&self) -> usize {
        self.num_kv_heads * self.block_size * self.head_dim
    }

    /// First element of (block, head, offset).
    pub const fn elem(&self, block: usize, kv_head: usize, offset: usize) -> usize {
        ((block * self.num_kv_heads + kv_head) * self.block_size + offset) * self.head_dim
    }

    /// Bytes of K and V of one block over `num_layers` layers.
    pub const fn block_bytes(&self, num_layers: usize) -> u64 {
        2 * num_layers as u64 * self.block_elems() as u64 * self.dtype.size_bytes() as u64
    }
}

/// One copy-on-write: the first `num_slots` slots of `src` go to `dst`, for every kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// Block to read.
    pub src: u32,
    /// Block to write.
    pub dst: u32,
    /// Slots `[0, num_slots)` to copy.
    pub num_slots: u32,
}

/// One slot's K and V for another position: V as it is, K turned by the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotTransfer {
    /// Physical slot to read.
    pub src: u32,
    /// Physical slot to write.
    pub dst: u32,
    /// Position of `dst` less that of `src`.
    pub shift: i32,
}

/// Seeded numbers for the random walks of this module's tests.
#[cfg(test)]
mod test_rng {
    /// splitmix64.
    pub(super) struct Rng(pub(super) u64);

    impl Rng {
        pub(super) fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        /// A number in `[0, n)`; 0 when `n` is 0.
        pub(super) fn below(&mut self, n: usize) -> usize {
            (self.next() % n.max(1) as u64) as usize
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stride_geometry_of_a_qwen2_5_0_5b_cache() {
        let layout = KvLayout { num_blocks: 10, num_kv_heads: 2, block_size: 16, head_dim: 64, dtype: DType::Bf16 };
        assert_eq!(layout.block_elems(), 2048);
        assert_eq!(layout.elem(3, 1, 5), (3 * 2 + 1) * 1024 + 5 * 64);
        // 24 layers x (K + V) x 2 heads x 16 tokens x 64 x 2 bytes
        assert_eq!(layout.block_bytes(24), 196_608);
    }
}

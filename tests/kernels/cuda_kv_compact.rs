//! `kv_compact` against a gather out of place.

use rksc::backend::cuda::bindings::rksc_kv_compact_params;
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::kv_compact::kv_compact;

use crate::device::{DTYPES, assert_refused, for_each_device};

/// A cache with one sequence in it and other blocks around.
struct Compaction {
    layout: KvLayout,
    blocks: Vec<u32>,
    first_slot: usize,
    /// `[Hkv][num_keep]`
    keep: Vec<Vec<u32>>,
    with_positions: bool,
}

impl Compaction {
    fn num_slots(&self) -> usize {
        self.blocks.len() * self.layout.block_size
    }

    /// K or V after the move, from what it was.
    fn want(&self, cache: &[u8]) -> Vec<u8> {
        let width = self.layout.head_dim * self.layout.dtype.size_bytes();
        let mut moved = cache.to_vec();
        for (head, keep) in self.keep.iter().enumerate() {
            let at = |slot: usize| {
                let block = self.blocks[slot / self.layout.block_size] as usize;
                self.layout.elem(block, head, slot % self.layout.block_size) * self.layout.dtype.size_bytes()
            };
            let rows: Vec<&[u8]> = (0..self.num_slots()).map(|slot| &cache[at(slot)..at(slot) + width]).collect();
            for (slot, row) in kv_compact(&rows, keep, self.first_slot).into_iter().enumerate() {
                moved[at(slot)..at(slot) + width].copy_from_slice(row);
            }
        }
        moved
    }

    fn check(&self, what: &str) {
        let bytes = self.layout.num_blocks * self.layout.block_elems() * self.layout.dtype.size_bytes();
        let mut fill = Fill::new(bytes as u64 + self.first_slot as u64);
        let mut random = |len: usize| -> Vec<u8> { (0..len).map(|_| fill.next_u64() as u8).collect() };
        let (k, v) = (random(bytes), random(bytes));
        let (want_k, want_v) = (self.want(&k), self.want(&v));
        let capacity = self.num_slots();
        let positions: Vec<u32> = (0..self.keep.len() * capacity).map(|i| 7 * i as u32 + 1).collect();
        let want_positions: Vec<u32> = positions
            .chunks(capacity)
            .zip(&self.keep)
            .flat_map(|(row, keep)| kv_compact(row, keep, self.first_slot))
            .collect();
        for_each_device(what, |dev| {
            let (mut k, mut v) = (dev.buffer(&k)?, dev.buffer(&v)?);
            let mut positions = dev.buffer(&positions)?;
            let (blocks, keep) = (dev.buffer(&self.blocks)?, dev.buffer(&self.keep.concat())?);
            let params = rksc_kv_compact_params {
                k_cache: k.ptr_mut().cast(),
                v_cache: v.ptr_mut().cast(),
                positions: if self.with_positions { positions.ptr_mut() } else { std::ptr::null_mut() },
                blocks: blocks.ptr(),
                keep: keep.ptr(),
                num_keep: self.keep.first().map_or(0, Vec::len) as u32,
                first_slot: self.first_slot as u32,
                capacity: capacity as u32,
                num_kv_heads: self.layout.num_kv_heads as u32,
                head_dim: self.layout.head_dim as u32,
                block_size: self.layout.block_size as u32,
                dtype: self.layout.dtype as u32,
                reserved: 0,
            };
            dev.launch(dev.kernels().kv_compact, &params)?;
            let (k, v) = (dev.to_vec(&k)?, dev.to_vec(&v)?);
            assert!(k == want_k && v == want_v, "{what}: K {} V {}", k == want_k, v == want_v);
            if self.with_positions {
                assert!(dev.to_vec(&positions)? == want_positions, "{what}: positions");
            }
            // All bytes were compared.
            Ok(Vec::new())
        });
    }
}

/// An ascending choice of `num_keep` of the slots `[first, first + len)`.
fn choose(fill: &mut Fill, first: usize, len: usize, num_keep: usize) -> Vec<u32> {
    let mut slots: Vec<u32> = fill.shuffled(len).into_iter().take(num_keep).map(|slot| slot + first as u32).collect();
    slots.sort_unstable();
    slots
}

#[test]
fn kv_compact_is_a_gather() {
    for (i, (num_kv_heads, head_dim, block_size, num_slots, first_slot, num_keep)) in [
        (1, 32, 16, 16, 0, 0),
        (1, 32, 16, 16, 0, 1),
        (2, 64, 16, 32, 0, 15),
        (2, 64, 32, 32, 0, 16),
        (3, 80, 16, 48, 0, 17),
        (1, 96, 32, 64, 0, 63),
        (1, 128, 16, 64, 0, 64),
        (4, 128, 16, 160, 0, 100),
        (8, 128, 32, 96, 31, 40),
        (2, 256, 16, 96, 5, 90),
        (1, 256, 32, 320, 16, 255),
        (1, 64, 16, 320, 17, 256),
        (1, 64, 16, 320, 33, 257),
        (2, 8, 16, 640, 0, 600),
        (1, 72, 16, 1136, 3, 1025),
        (2, 64, 32, 1152, 0, 1024),
        (1, 128, 16, 1168, 100, 1000),
        (1, 32, 16, 4096, 64, 2048),
        (1, 32, 32, 4128, 0, 4100),
        (16, 32, 16, 64, 8, 30),
        (1, 16, 16, 16, 16, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let dtype = DTYPES[i % 3];
        let mut fill = Fill::new(i as u64);
        let num_blocks = num_slots / block_size + 3;
        let layout = KvLayout { num_blocks, num_kv_heads, block_size, head_dim, dtype };
        let mut blocks = fill.shuffled(num_blocks);
        blocks.truncate(num_slots / block_size);
        let keep = (0..num_kv_heads).map(|_| choose(&mut fill, first_slot, num_slots - first_slot, num_keep)).collect();
        let case = Compaction { layout, blocks, first_slot, keep, with_positions: i % 4 != 3 };
        case.check(&format!("kv_compact {dtype} heads {num_kv_heads} d {head_dim} slots {num_slots} keep {num_keep}"));
    }
}

#[test]
fn kv_compact_survives_every_overlap() {
    for dtype in DTYPES {
        let (num_slots, first_slot) = (1120, 3);
        let layout = KvLayout { num_blocks: 70, num_kv_heads: 1, block_size: 16, head_dim: 32, dtype };
        let blocks = Fill::new(70).shuffled(70);
        let all = first_slot as u32..num_slots as u32;
        let mut keeps: Vec<Vec<u32>> = vec![
            // In place, down by one, down by a tile and around it, one dropped in the middle, every other, the last alone.
            all.clone().collect(),
            all.clone().skip(1).collect(),
            all.clone().skip(255).collect(),
            all.clone().skip(256).collect(),
            all.clone().skip(257).collect(),
            all.clone().filter(|&slot| slot != 600).collect(),
            all.clone().step_by(2).collect(),
            vec![num_slots as u32 - 1],
        ];
        let mut fill = Fill::new(5);
        for _ in 0..8 {
            let num_keep = fill.below(num_slots - first_slot + 1);
            keeps.push(choose(&mut fill, first_slot, num_slots - first_slot, num_keep));
        }
        for (i, keep) in keeps.into_iter().enumerate() {
            let what = format!("kv_compact {dtype} overlap {i}");
            Compaction { layout, blocks: blocks.clone(), first_slot, keep: vec![keep], with_positions: true }
                .check(&what);
        }
    }
}

#[test]
fn kv_compact_refuses_what_it_cannot_do() {
    for_each_device("kv_compact refuses", |dev| {
        let good = rksc_kv_compact_params {
            num_kv_heads: 1,
            head_dim: 64,
            block_size: 16,
            capacity: 32,
            first_slot: 32,
            ..Default::default()
        };
        dev.launch(dev.kernels().kv_compact, &good)?;
        for bad in [
            rksc_kv_compact_params { num_keep: 1, ..good },
            rksc_kv_compact_params { first_slot: 33, ..good },
            rksc_kv_compact_params { head_dim: 6, ..good },
            rksc_kv_compact_params { dtype: 3, ..good },
            rksc_kv_compact_params { block_size: 0, ..good },
        ] {
            assert_refused(dev.launch(dev.kernels().kv_compact, &bad));
        }
        Ok(Vec::new())
    });
}

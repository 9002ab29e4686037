//! `kv_compact` against a gather out of place: the kernel on every device, and through the trait on both backends; and what
//! attention makes of the slots that it kept.

use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::bindings::rksc_kv_compact_params;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::kv_compact::kv_compact;
use rksc::testing::oracle::assert_close;
use rksc::{DType, Error, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, wide};
use crate::kv_transfer::contents;

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

    /// Through the trait: K and V afterwards, byte for byte.
    fn through<B: Backend>(&self, b: &mut B, k: &[u8], v: &[u8]) -> Result<(Vec<u8>, Vec<u8>, Counters)> {
        let KvLayout { dtype, num_blocks, .. } = self.layout;
        let len = num_blocks * self.layout.block_elems();
        let (mut k_cache, mut v_cache) = (b.alloc(dtype, len)?, b.alloc(dtype, len)?);
        b.write_bytes(&mut k_cache, 0, len, k)?;
        b.write_bytes(&mut v_cache, 0, len, v)?;
        b.reset_counters();
        b.kv_compact(KvCompact {
            k_cache: &mut k_cache,
            v_cache: &mut v_cache,
            blocks: &self.blocks,
            keep: &self.keep.concat(),
            first_slot: self.first_slot,
            layout: &self.layout,
        })?;
        let (mut moved, counters) = ((Vec::new(), Vec::new()), b.counters());
        b.read_bytes(&k_cache, 0, len, &mut moved.0)?;
        b.read_bytes(&v_cache, 0, len, &mut moved.1)?;
        Ok((moved.0, moved.1, counters))
    }

    fn cuda(&self) -> Cuda {
        let KvLayout { num_kv_heads, block_size, .. } = self.layout;
        Cuda::new(Device::emulated().unwrap(), Heads { num_q_heads: num_kv_heads, num_kv_heads, block_size })
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
        let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
        let (on_cpu_k, on_cpu_v, counters) = self.through(&mut cpu, &k, &v).unwrap();
        assert!(on_cpu_k == want_k && on_cpu_v == want_v, "{what} on the CPU");
        let places =
            |keep: &Vec<u32>| keep.iter().zip(self.first_slot..).filter(|&(&from, to)| from as usize != to).count();
        let moved: usize = self.keep.iter().map(places).sum();
        let kv_write_bytes = (2 * moved * self.layout.head_dim * self.layout.dtype.size_bytes()) as u64;
        assert_eq!(counters, Counters { launches: 1, kv_write_bytes, ..Default::default() }, "{what}");
        let (on_device_k, on_device_v, counted) = self.through(&mut self.cuda(), &k, &v).unwrap();
        assert!(on_device_k == want_k && on_device_v == want_v, "{what} through the trait");
        assert_eq!(counted, counters, "{what}");
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

#[test]
fn kv_compact_refuses_lists_that_do_not_descend() {
    let layout = KvLayout { num_blocks: 3, num_kv_heads: 2, block_size: 16, head_dim: 32, dtype: DType::F32 };
    let cache = vec![0u8; 3 * layout.block_elems() * 4];
    let good = |keep: [&[u32]; 2], first_slot: usize| Compaction {
        layout,
        blocks: vec![2, 0],
        first_slot,
        keep: keep.map(<[u32]>::to_vec).to_vec(),
        with_positions: false,
    };
    let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    good([&[3, 31], &[4, 5]], 3).through(&mut cpu, &cache, &cache).unwrap();
    for bad in [
        // Unsorted, twice the same, upwards, past the table, of different lengths, in a block that is not there.
        good([&[3, 31], &[5, 4]], 3),
        good([&[3, 31], &[4, 4]], 3),
        good([&[3, 31], &[2, 4]], 3),
        good([&[3, 32], &[4, 5]], 3),
        good([&[3, 31], &[4]], 3),
        Compaction { blocks: vec![3, 0], ..good([&[3, 31], &[4, 5]], 3) },
    ] {
        let on_cpu = bad.through(&mut cpu, &cache, &cache);
        assert!(matches!(on_cpu, Err(Error::Shape { op: "kv_compact", .. })), "{:?}", bad.keep);
        let on_device = bad.through(&mut bad.cuda(), &cache, &cache);
        assert!(matches!(on_device, Err(Error::Shape { op: "kv_compact", .. })), "{:?}", bad.keep);
    }
}

/// Tokens of one sequence, of which row i was at position i; the last is the query.
struct Tokens {
    layout: KvLayout,
    qkv: Vec<f32>,
    num_rows: usize,
}

const Q_HEADS: usize = 4;

impl Tokens {
    /// Writes row `rows[s]` to slot s, moves the slots `keep` down where given, and lets the last row look at the first
    /// `kv_len` slots: o, lse.
    fn look<B: Backend>(&self, b: &mut B, rows: &[u32], keep: Option<&[u32]>, kv_len: usize) -> Result<[Vec<f32>; 2]> {
        let KvLayout { head_dim: dim, num_kv_heads, dtype, num_blocks, block_size, .. } = self.layout;
        let len = num_blocks * self.layout.block_elems();
        let mut kv = (b.alloc(dtype, len)?, b.alloc(dtype, len)?);
        let blocks: Vec<u32> = (0..num_blocks as u32).rev().collect();
        let slot = |s: usize| blocks[s / block_size] * block_size as u32 + (s % block_size) as u32;
        self.append(b, rows, (0..rows.len()).map(slot).collect(), &mut kv, &[])?;
        if let Some(keep) = keep {
            let (k_cache, v_cache, keep) = (&mut kv.0, &mut kv.1, &keep.repeat(num_kv_heads));
            let (blocks, layout) = (&blocks, &self.layout);
            b.kv_compact(KvCompact { k_cache, v_cache, blocks, keep, first_slot: 0, layout })?;
        }
        // The query's own key goes to the last slot, where it does not look.
        let unused = slot(num_blocks * block_size - 1);
        let view = [SequenceView { rows: 0..1, blocks: &blocks, kv_len }];
        let (inputs, q) = self.append(b, &[self.num_rows as u32 - 1], vec![unused], &mut kv, &view)?;
        let (mut o, mut lse) = (b.alloc(dtype, Q_HEADS * dim)?, b.alloc(DType::F32, Q_HEADS)?);
        b.paged_attention(PagedAttention {
            inputs: &inputs,
            q: &q,
            k_cache: &kv.0,
            v_cache: &kv.1,
            o: &mut o,
            lse: &mut lse,
            num_q_heads: Q_HEADS,
            sm_scale: 1.0 / (dim as f32).sqrt(),
            window: None,
            softcap: None,
            layout: &self.layout,
        })?;
        let mut found = vec![0.0; Q_HEADS];
        b.read_f32(&lse, 0, &mut found)?;
        Ok([contents(b, &o, dtype, Q_HEADS * dim)?, found])
    }

    /// A pass of `rows` up to their q.
    fn append<B: Backend>(
        &self,
        b: &mut B,
        rows: &[u32],
        slots: Vec<u32>,
        (k_cache, v_cache): &mut (B::Buf, B::Buf),
        views: &[SequenceView<'_>],
    ) -> Result<(B::Inputs, B::Buf)> {
        let KvLayout { head_dim: dim, num_kv_heads, dtype, block_size, .. } = self.layout;
        let width = (Q_HEADS + 2 * num_kv_heads) * dim;
        let qkv: Vec<f32> = rows.iter().flat_map(|&r| &self.qkv[r as usize * width..][..width]).copied().collect();
        let qkv = b.upload(&qkv)?;
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let inv_freq = b.upload(&inv_freq)?;
        let mut q = b.alloc(dtype, rows.len() * Q_HEADS * dim)?;
        let plan = AttentionPlan::new(views, block_size, b.max_group_rows(Q_HEADS / num_kv_heads));
        let (token_ids, positions) = (vec![0; rows.len()], rows.to_vec());
        let inputs = b.stage(PassInputs { token_ids, positions, slots, plan, ..Default::default() })?;
        b.rope_append(RopeAppend {
            rows: 0..rows.len(),
            inputs: &inputs,
            qkv: &qkv,
            q: &mut q,
            query_ring: None,
            k_cache,
            v_cache,
            inv_freq: &inv_freq,
            rotary_dim: self.layout.head_dim,
            rope_scale: 1.0,
            qk_norm: None,
            num_q_heads: Q_HEADS,
            layout: &self.layout,
        })?;
        Ok((inputs, q))
    }
}

/// Kept keys stay as their positions turned them: the logit of (position, query) keeps every bit, and attention over what is
/// kept is what it would be if nothing else had been there, whatever slots it stands in.
#[test]
fn kept_slots_answer_as_if_nothing_else_had_been_there() {
    fn case<B: Backend>(b: &mut B, dtype: DType) {
        let layout = KvLayout { num_blocks: 9, num_kv_heads: 2, block_size: 16, head_dim: 64, dtype };
        let num_rows = 131;
        let mut fill = Fill::new(10);
        let tokens = Tokens { layout, qkv: fill.normals(num_rows * (Q_HEADS + 4) * 64, 1.0), num_rows };
        let all: Vec<u32> = (0..num_rows as u32 - 1).collect();
        let keep = choose(&mut fill, 0, num_rows - 1, 70);
        let compacted = tokens.look(b, &all, Some(&keep), 70).unwrap();
        let alone = tokens.look(b, &keep, None, 70).unwrap();
        assert_eq!(compacted.clone().map(|x| bits(&x)), alone.map(|x| bits(&x)));
        let shuffled: Vec<u32> = fill.shuffled(70).into_iter().map(|i| keep[i as usize]).collect();
        let [o, lse] = tokens.look(b, &shuffled, None, 70).unwrap();
        // P is rounded to the type, scaled by the maximum of its tile.
        let atol = if dtype == DType::F32 { 1e-5 } else { 2e-3 };
        assert_close("another order: o", dtype, atol, &wide(&o), &wide(&compacted[0]));
        assert_close("another order: lse", DType::F32, 1e-5, &wide(&lse), &wide(&compacted[1]));
        // The lse of one slot is its logit.
        for &position in &[keep[0], keep[35], keep[69]] {
            let full = tokens.look(b, &[position], None, 1).unwrap();
            let kept = tokens.look(b, &all, Some(&[position]), 1).unwrap();
            assert_eq!(bits(&full[1]), bits(&kept[1]), "the logit of {position}");
        }
    }
    for dtype in DTYPES {
        case(&mut Cpu::new(2, SimdLevel::detect()).unwrap(), dtype);
    }
    let heads = Heads { num_q_heads: Q_HEADS, num_kv_heads: 2, block_size: 16 };
    case(&mut Cuda::new(Device::emulated().unwrap(), heads), DType::Bf16);
}

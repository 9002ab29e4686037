//! `paged_attention` and `attention_mass` on worlds of branches: a tree of sequences whose blocks lie shuffled in a cache
//! full of NaN.

use rksc::backend::cuda::attention_items::{AttentionItems, ItemParams};
use rksc::backend::cuda::bindings::*;
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::kv::KvLayout;
use rksc::testing::attention::{PagedKv, attention_mass};
use rksc::testing::fill::Fill;
use rksc::testing::oracle::{self, Scoring};
use rksc::{DType, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed, rounded, wide, widened};

/// What a case varies.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Query heads, kv heads.
    heads: (usize, usize),
    dim: usize,
    block_size: usize,
    /// Blocks shared by all, then by halves, quarters ... of the sequences.
    shared: Vec<usize>,
    /// (slots in all, rows of this step) of each sequence.
    seqs: Vec<(usize, usize)>,
}

pub(crate) fn shape(
    heads: (usize, usize),
    dim: usize,
    block_size: usize,
    shared: &[usize],
    seqs: &[(usize, usize)],
) -> Shape {
    Shape { heads, dim, block_size, shared: shared.to_vec(), seqs: seqs.to_vec() }
}

#[derive(Clone, Debug)]
pub(crate) struct Seq {
    pub(crate) blocks: Vec<u32>,
    pub(crate) kv_len: usize,
    pub(crate) rows: usize,
}

pub(crate) struct World {
    pub(crate) dtype: DType,
    pub(crate) layout: KvLayout,
    pub(crate) num_q_heads: usize,
    pub(crate) seqs: Vec<Seq>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// `[T, Hq, D]`, rows of each sequence in order.
    pub(crate) q: Vec<f32>,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
}

impl World {
    pub(crate) fn new(shape: &Shape, dtype: DType, seed: u64) -> Self {
        let mut fill = Fill::new(seed);
        let (hq, hkv) = shape.heads;
        let needed = shape.seqs.iter().map(|s| s.0.div_ceil(shape.block_size)).sum::<usize>() + 3;
        let mut free = fill.shuffled(needed);
        let layout = KvLayout {
            num_blocks: needed,
            num_kv_heads: hkv,
            block_size: shape.block_size,
            head_dim: shape.dim,
            dtype,
        };
        let mut seqs: Vec<Seq> = Vec::new();
        for (i, &(kv_len, rows)) in shape.seqs.iter().enumerate() {
            let mut blocks: Vec<u32> = Vec::new();
            let mut width = shape.seqs.len();
            for run in &shape.shared {
                let first = i / width * width;
                // Rows of this step lie in blocks of their own.
                let end = (blocks.len() + run).min((kv_len - rows) / shape.block_size);
                if first < i {
                    let known: Vec<u32> = seqs[first].blocks.iter().take(end).skip(blocks.len()).copied().collect();
                    blocks.extend(known);
                }
                while blocks.len() < end {
                    blocks.extend(free.pop());
                }
                width = width.div_ceil(2);
            }
            while blocks.len() < kv_len.div_ceil(shape.block_size) {
                blocks.extend(free.pop());
            }
            seqs.push(Seq { blocks, kv_len, rows });
        }
        let mut k = vec![f32::NAN; layout.num_blocks * layout.block_elems()];
        let mut v = k.clone();
        for seq in &seqs {
            for (slot, head) in (0..seq.kv_len).flat_map(|slot| (0..hkv).map(move |head| (slot, head))) {
                let at = layout.elem(seq.blocks[slot / shape.block_size] as usize, head, slot % shape.block_size);
                if k[at].is_nan() {
                    for i in at..at + shape.dim {
                        k[i] = fill.normal();
                        v[i] = fill.normal();
                    }
                }
            }
        }
        let rows: usize = seqs.iter().map(|s| s.rows).sum();
        let q = fill.normals(rows * hq * shape.dim, 1.5);
        Self { dtype, layout, num_q_heads: hq, seqs, k, v, q, window: None, softcap: None }
    }

    fn group(&self) -> usize {
        self.num_q_heads / self.layout.num_kv_heads
    }

    fn num_rows(&self) -> usize {
        self.seqs.iter().map(|s| s.rows).sum()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim as f32).sqrt()
    }

    fn scoring(&self) -> Scoring {
        let softcap = self.softcap.map(f64::from);
        Scoring { sm_scale: f64::from(self.scale()), window: self.window, softcap }
    }

    fn first_row(&self, seq: usize) -> usize {
        self.seqs[..seq].iter().map(|s| s.rows).sum()
    }

    pub(crate) fn item_params(&self, num_sms: usize, max_partials: usize) -> ItemParams {
        ItemParams {
            num_sms,
            num_kv_heads: self.layout.num_kv_heads,
            gqa_group: self.group(),
            block_size: self.layout.block_size,
            max_partials,
        }
    }

    pub(crate) fn plan(&self) -> AttentionPlan {
        let views: Vec<SequenceView<'_>> = (0..self.seqs.len())
            .map(|i| {
                let (seq, at) = (&self.seqs[i], self.first_row(i));
                SequenceView { rows: at..at + seq.rows, blocks: &seq.blocks, kv_len: seq.kv_len }
            })
            .collect();
        AttentionPlan::new(&views, self.layout.block_size, self.item_params(1, 0).max_group_rows())
    }

    /// What each (row, head) should come to: rows to look at, outputs, and ln sum exp. Of a long chunk a few rows say as
    /// much as all.
    pub(crate) fn expected(&self) -> Vec<(usize, Vec<f64>, f64)> {
        let [k, v, q] = [&self.k, &self.v, &self.q].map(|x| rounded(self.dtype, x));
        let kv = PagedKv { layout: &self.layout, k: &k, v: &v };
        let dim = self.layout.head_dim;
        let mut want = Vec::new();
        for (i, seq) in self.seqs.iter().enumerate() {
            let stride = (seq.rows / 5).max(1);
            for nth in (0..seq.rows).filter(|nth| nth % stride == 0 || nth + 1 == seq.rows) {
                let num_slots = seq.kv_len + 1 + nth - seq.rows;
                for head in 0..self.num_q_heads {
                    let at = (self.first_row(i) + nth) * self.num_q_heads + head;
                    let q = &q[at * dim..(at + 1) * dim];
                    let kv_head = head / self.group();
                    let (o, lse) = kv.attention(self.dtype, q, &seq.blocks, kv_head, num_slots, &self.scoring());
                    want.push((at, o, lse));
                }
            }
        }
        want
    }

    pub(crate) fn check(&self, what: &str, want: &[(usize, Vec<f64>, f64)], o: &[f32], lse: &[f32]) {
        let dim = self.layout.head_dim;
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for (at, o_want, lse_want) in want {
            got.extend(wide(&o[at * dim..(at + 1) * dim]));
            expected.extend(o_want);
            let lse = f64::from(lse[*at]);
            let close = lse == *lse_want || (lse - lse_want).abs() < 2e-5 * (1.0 + lse_want.abs());
            assert!(close, "{what}: (row, head) {at}: lse {lse}, want {lse_want}");
        }
        // P is rounded against another maximum than the oracle's: its error is P's eps anew, averaged over slots.
        let atol = if self.dtype == DType::F32 { 3e-6 } else { 1.5 * oracle::eps(self.dtype) };
        oracle::assert_close(what, self.dtype, atol, &got, &expected);
        assert!(o.iter().all(|x| x.is_finite()), "{what}: an output was not written");
    }
}

/// A world on a device, with room for a list.
struct OnDevice {
    q: DeviceBuf<u8>,
    k: DeviceBuf<u8>,
    v: DeviceBuf<u8>,
    o: DeviceBuf<u8>,
    lse: DeviceBuf<f32>,
    row_order: DeviceBuf<u32>,
    kv_lens: DeviceBuf<u32>,
    blocks: DeviceBuf<u32>,
    items: DeviceBuf<rksc_attention_item>,
    groups: DeviceBuf<rksc_attention_group>,
    num_items: DeviceBuf<u32>,
    partial_o: DeviceBuf<f32>,
    partial_ml: DeviceBuf<f32>,
    arrivals: DeviceBuf<u32>,
}

impl OnDevice {
    /// Buffers for lists of up to `list`'s size, with some more items than it has.
    fn new(dev: &mut Device, world: &World, plan: &AttentionPlan, list: &AttentionItems) -> Result<Self> {
        let (heads, dim) = (world.num_q_heads, world.layout.head_dim);
        let mut on = Self {
            q: narrowed(dev, world.dtype, &world.q)?,
            k: narrowed(dev, world.dtype, &world.k)?,
            v: narrowed(dev, world.dtype, &world.v)?,
            o: dev.alloc(world.q.len() * world.dtype.size_bytes())?,
            lse: dev.alloc(world.num_rows() * heads)?,
            row_order: dev.alloc(plan.row_order.len())?,
            kv_lens: dev.alloc(plan.row_order.len())?,
            blocks: dev.alloc(list.blocks.len())?,
            items: dev.alloc(list.items.len() + 3)?,
            groups: dev.alloc(list.groups.len())?,
            num_items: dev.alloc(1)?,
            partial_o: dev.alloc(list.num_partials * heads * dim)?,
            partial_ml: dev.alloc(list.num_partials * heads * 2)?,
            arrivals: dev.zeroed(list.groups.len() * world.layout.num_kv_heads)?,
        };
        on.upload(dev, plan, list)?;
        Ok(on)
    }

    fn upload(&mut self, dev: &mut Device, plan: &AttentionPlan, list: &AttentionItems) -> Result<()> {
        dev.upload(&mut self.row_order, 0, &plan.row_order)?;
        dev.upload(&mut self.kv_lens, 0, &plan.kv_lens)?;
        dev.upload(&mut self.blocks, 0, &list.blocks)?;
        dev.upload(&mut self.items, 0, &list.items)?;
        dev.upload(&mut self.groups, 0, &list.groups)?;
        dev.upload(&mut self.num_items, 0, &[list.items.len() as u32])
    }

    fn params(&mut self, world: &World) -> rksc_paged_attention_params {
        rksc_paged_attention_params {
            q: self.q.ptr().cast(),
            k_cache: self.k.ptr().cast(),
            v_cache: self.v.ptr().cast(),
            o: self.o.ptr_mut().cast(),
            lse: self.lse.ptr_mut(),
            row_order: self.row_order.ptr(),
            kv_lens: self.kv_lens.ptr(),
            blocks: self.blocks.ptr(),
            items: self.items.ptr(),
            groups: self.groups.ptr(),
            num_items: self.num_items.ptr(),
            partial_o: self.partial_o.ptr_mut(),
            partial_ml: self.partial_ml.ptr_mut(),
            arrivals: self.arrivals.ptr_mut(),
            max_items: self.items.len() as u32,
            num_q_heads: world.num_q_heads as u32,
            num_kv_heads: world.layout.num_kv_heads as u32,
            head_dim: world.layout.head_dim as u32,
            block_size: world.layout.block_size as u32,
            dtype: world.dtype as u32,
            sm_scale: world.scale(),
            window: world.window.unwrap_or(0) as u32,
            softcap: world.softcap.unwrap_or(0.0),
            reserved: 0,
        }
    }

    fn results(&self, dev: &mut Device, world: &World) -> Result<(Vec<f32>, Vec<f32>)> {
        assert!(dev.to_vec(&self.arrivals)?.iter().all(|&count| count == 0), "a counter was left");
        Ok((widened(dev, world.dtype, &self.o)?, dev.to_vec(&self.lse)?))
    }
}

/// One launch of `list` on fresh buffers.
pub(crate) fn run(
    dev: &mut Device,
    world: &World,
    plan: &AttentionPlan,
    list: &AttentionItems,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut on = OnDevice::new(dev, world, plan, list)?;
    let params = on.params(world);
    dev.launch(dev.kernels().paged_attention, &params)?;
    on.results(dev, world)
}

pub(crate) fn joined((o, lse): (Vec<f32>, Vec<f32>)) -> Vec<u32> {
    [bits(&o), bits(&lse)].concat()
}

/// Planned for a device of 132 SMs, which splits whatever it can, and for one SM, which shares whatever it can: both
/// against the oracle.
fn oracle_case(shape: &Shape, dtype: DType, seed: u64) {
    let world = World::new(shape, dtype, seed);
    let (plan, want) = (world.plan(), world.expected());
    let mut before = Vec::new();
    for num_sms in [132, 1] {
        let list = AttentionItems::new(&plan, &world.item_params(num_sms, usize::MAX));
        if list.items == before {
            continue;
        }
        let what = format!("paged_attention {dtype} {shape:?}, {} items", list.items.len());
        for_each_device(&what, |dev| {
            let (o, lse) = run(dev, &world, &plan, &list)?;
            world.check(&what, &want, &o, &lse);
            Ok(joined((o, lse)))
        });
        before = list.items;
    }
}

fn shapes() -> Vec<Shape> {
    vec![
        // Decode of one sequence at every awkward length.
        shape((1, 1), 32, 16, &[], &[(1, 1)]),
        shape((2, 1), 64, 16, &[], &[(15, 1)]),
        shape((4, 2), 32, 16, &[], &[(16, 1)]),
        shape((3, 1), 64, 16, &[], &[(17, 1)]),
        shape((7, 1), 64, 16, &[], &[(63, 1)]),
        shape((8, 1), 64, 16, &[], &[(64, 1)]),
        shape((2, 2), 128, 16, &[], &[(65, 1)]),
        shape((14, 2), 64, 16, &[], &[(127, 1)]),
        shape((4, 2), 80, 16, &[], &[(200, 1)]),
        shape((5, 1), 96, 16, &[], &[(1025, 1)]),
        shape((2, 1), 256, 32, &[], &[(31, 1)]),
        shape((6, 1), 128, 32, &[], &[(33, 1)]),
        shape((16, 1), 32, 32, &[], &[(129, 1)]),
        // Prefill, and a chunk onto what is there.
        shape((4, 2), 32, 16, &[], &[(127, 127)]),
        shape((7, 1), 64, 16, &[], &[(140, 73)]),
        shape((1, 1), 128, 32, &[], &[(130, 65)]),
        shape((2, 1), 256, 16, &[], &[(70, 40)]),
        shape((2, 1), 80, 32, &[], &[(100, 100)]),
        // Decode of several on their own.
        shape((4, 2), 32, 16, &[], &[(5, 1), (64, 1), (200, 1), (129, 1)]),
        // One long and many short.
        shape((3, 1), 32, 16, &[], &[(1100, 1), (3, 1), (17, 1), (64, 1), (1, 1), (40, 1)]),
        // Trees of depth 1, 2 and 3, sharing whole tiles or not.
        shape((4, 2), 32, 16, &[16], &[(300, 1), (270, 1), (260, 1), (257, 1), (320, 1), (321, 1), (258, 1), (299, 1)]),
        shape(
            (7, 1),
            128,
            16,
            &[16],
            &[(270, 1), (290, 1), (300, 1), (257, 1), (257, 1), (258, 1), (299, 1), (312, 1)],
        ),
        shape((14, 2), 64, 16, &[6], &[(100, 1), (130, 1), (97, 1)]),
        shape((8, 2), 64, 32, &[4, 2], &[(200, 1), (210, 1), (250, 1), (195, 1)]),
        shape((16, 1), 80, 16, &[8, 4, 4], &[(257, 1), (258, 1), (300, 1), (290, 1), (310, 1), (270, 1), (280, 1)]),
        shape((4, 1), 256, 16, &[8], &[(140, 1), (150, 1), (129, 1)]),
        // Prefill chunks and decodes over shared blocks.
        shape((4, 2), 32, 16, &[8], &[(140, 10), (129, 1), (200, 70), (150, 1)]),
        shape((6, 3), 96, 32, &[2, 1], &[(100, 1), (164, 100), (97, 1), (1, 1)]),
    ]
}

#[test]
fn paged_attention_matches_oracle() {
    for (i, shape) in shapes().iter().enumerate() {
        for dtype in DTYPES {
            oracle_case(shape, dtype, i as u64);
        }
    }
}

/// `list` with one tile to an item: the most partials there can be, empty ones among them.
pub(crate) fn split_to_tiles(list: &AttentionItems, block_size: usize) -> AttentionItems {
    let mut out = AttentionItems { blocks: list.blocks.clone(), ..Default::default() };
    for group in &list.groups {
        let first = out.items.len();
        for item in &list.items[group.item_start as usize..(group.item_start + group.num_items) as usize] {
            for start in (0..item.num_slots).step_by(64) {
                out.items.push(rksc_attention_item {
                    slot_start: item.slot_start + start,
                    num_slots: (item.num_slots - start).min(64),
                    block_start: item.block_start + start / block_size as u32,
                    partial_start: out.num_partials as u32,
                    ..*item
                });
                out.num_partials += item.num_rows as usize;
            }
        }
        let num_items = (out.items.len() - first) as u32;
        out.groups.push(rksc_attention_group { item_start: first as u32, num_items, ..*group });
    }
    out
}

#[test]
fn the_finest_split_matches_oracle() {
    for shape in [
        shape((2, 1), 32, 16, &[], &[(1300, 60)]),
        shape((7, 1), 128, 32, &[34], &[(1130, 1), (1150, 3), (1100, 1)]),
        shape((4, 2), 80, 16, &[8, 8], &[(300, 1), (270, 1), (290, 2), (400, 1)]),
        shape((1, 1), 256, 16, &[], &[(70, 1), (2200, 1)]),
    ] {
        for dtype in DTYPES {
            let world = World::new(&shape, dtype, 40);
            let (plan, want) = (world.plan(), world.expected());
            let whole = AttentionItems::new(&plan, &world.item_params(1, usize::MAX));
            let list = split_to_tiles(&whole, shape.block_size);
            let what = format!("paged_attention {dtype} {shape:?}, {} items of one tile", list.items.len());
            for_each_device(&what, |dev| {
                let (o, lse) = run(dev, &world, &plan, &list)?;
                world.check(&what, &want, &o, &lse);
                Ok(joined((o, lse)))
            });
        }
    }
}

#[test]
fn paged_attention_matches_oracle_on_long_sequences() {
    oracle_case(&shape((1, 1), 64, 16, &[], &[(4096, 1)]), DType::F32, 1);
    oracle_case(&shape((2, 1), 32, 16, &[240], &[(4096, 1), (4000, 1), (3841, 2)]), DType::F16, 2);
    oracle_case(&shape((1, 1), 32, 16, &[], &[(32768, 1)]), DType::Bf16, 3);
    oracle_case(&shape((1, 1), 64, 32, &[], &[(32700, 1)]), DType::F16, 4);
}

#[test]
fn paged_attention_matches_oracle_on_random_trees() {
    let mut fill = Fill::new(77);
    for case in 0..16 {
        let hkv = 1 + fill.below(2);
        let group = [1, 2, 3, 4, 5, 6, 7, 8, 16][case % 9];
        let block_size = [16, 32][fill.below(2)];
        let shared: Vec<usize> = (0..fill.below(4)).map(|_| fill.below(7)).collect();
        let prefix = shared.iter().sum::<usize>() * block_size;
        let seqs: Vec<(usize, usize)> = (0..1 + fill.below(9))
            .map(|_| {
                let rows = if fill.below(4) == 0 { 1 + fill.below(30) } else { 1 };
                (prefix + rows + fill.below(100), rows)
            })
            .collect();
        let dim = [32, 64, 128][fill.below(3)];
        oracle_case(&shape((hkv * group, hkv), dim, block_size, &shared, &seqs), DTYPES[case % 3], 1000 + case as u64);
    }
}

/// The tokens that follow a row, in its own blocks, become NaN and infinite: the row does not notice.
#[test]
fn garbage_past_a_rows_own_slots_changes_nothing() {
    for dtype in DTYPES {
        for kv_len in [64, 100, 130] {
            let mut world = World::new(&shape((4, 2), 32, 16, &[], &[(kv_len, 40)]), dtype, kv_len as u64);
            let plan = world.plan();
            let list = AttentionItems::new(&plan, &world.item_params(132, usize::MAX));
            let clean = (world.k.clone(), world.v.clone());
            for (slot, head) in (kv_len - 13..kv_len).flat_map(|slot| [(slot, 0), (slot, 1)]) {
                let at = world.layout.elem(world.seqs[0].blocks[slot / 16] as usize, head, slot % 16);
                world.k[at..at + 32].fill(f32::NAN);
                world.v[at..at + 16].fill(f32::INFINITY);
                world.v[at + 16..at + 32].fill(f32::NAN);
            }
            let garbage = World {
                k: world.k.clone(),
                v: world.v.clone(),
                ..World::new(&shape((4, 2), 32, 16, &[], &[(kv_len, 40)]), dtype, kv_len as u64)
            };
            (world.k, world.v) = clean;
            let what = format!("garbage {dtype} {kv_len}");
            for_each_device(&what, |dev| {
                let (o, lse) = run(dev, &world, &plan, &list)?;
                let (o2, lse2) = run(dev, &garbage, &plan, &list)?;
                let rows = 40 - 13;
                assert_eq!(o2[..rows * 128], o[..rows * 128], "{what}");
                assert_eq!(lse2[..rows * 4], lse[..rows * 4], "{what}");
                assert!(
                    o2[rows * 128..].iter().all(|x| x.is_nan()),
                    "{what}: a NaN must show in the rows that read it"
                );
                Ok(joined((o, lse)))
            });
        }
    }
}

#[test]
fn a_row_without_slots_is_zero() {
    let mut world = World::new(&shape((2, 1), 32, 16, &[], &[(70, 1), (1, 1)]), DType::Bf16, 3);
    world.seqs[1].kv_len = 0;
    let plan = world.plan();
    // Together with a row that has some, and in an item of its own.
    let own = AttentionItems::new(&plan, &world.item_params(1, usize::MAX));
    let empty = plan.kv_lens.iter().position(|&n| n == 0).unwrap();
    let mut together = own.clone();
    together.items.retain(|item| item.num_slots > 0);
    together.items[0] = rksc_attention_item { row_start: 0, num_rows: 2, group: 0, ..together.items[0] };
    together.groups = vec![rksc_attention_group { row_start: 0, num_rows: 2, item_start: 0, num_items: 1 }];
    let mut split = together.clone();
    let whole = split.items[0];
    split.items = vec![
        rksc_attention_item { num_slots: 64, partial_start: 0, ..whole },
        rksc_attention_item {
            slot_start: 64,
            num_slots: 6,
            block_start: whole.block_start + 4,
            partial_start: 2,
            ..whole
        },
    ];
    (split.num_partials, split.groups[0].num_items) = (4, 2);
    for (name, list) in [("alone", own), ("together", together), ("split", split)] {
        for_each_device(&format!("a row without slots, {name}"), |dev| {
            let (o, lse) = run(dev, &world, &plan, &list)?;
            let row = plan.row_order[empty] as usize;
            assert_eq!(row, 1);
            world.check(name, &world.expected(), &o, &lse);
            assert!(o[64..].iter().all(|&x| x == 0.0) && lse[2..].iter().all(|&x| x == f32::NEG_INFINITY));
            Ok(joined((o, lse)))
        });
    }
}

#[test]
fn very_unequal_scores_do_not_overflow() {
    for dtype in DTYPES {
        let mut world = World::new(&shape((2, 1), 32, 16, &[], &[(330, 1)]), dtype, 5);
        for x in &mut world.k {
            *x *= 400.0;
        }
        let (plan, want) = (world.plan(), world.expected());
        for num_sms in [1, 132] {
            let list = AttentionItems::new(&plan, &world.item_params(num_sms, usize::MAX));
            for_each_device("large scores", |dev| {
                let (o, lse) = run(dev, &world, &plan, &list)?;
                world.check("large scores", &want, &o, &lse);
                Ok(joined((o, lse)))
            });
        }
    }
}

/// One graph, recorded once, serves steps with other items: their number is read on the device. Launches that follow each
/// other find the counters at zero.
#[test]
fn a_graph_serves_steps_of_different_lengths() {
    let world = World::new(&shape((4, 2), 64, 16, &[8], &[(700, 1), (650, 1), (130, 1)]), DType::Bf16, 6);
    let mut shorter = World::new(&shape((4, 2), 64, 16, &[8], &[(700, 1), (650, 1), (130, 1)]), DType::Bf16, 6);
    for (seq, kv_len) in shorter.seqs.iter_mut().zip([300, 260, 129]) {
        seq.kv_len = kv_len;
    }
    let steps = [&world, &shorter, &world].map(|w| {
        let plan = w.plan();
        let list = AttentionItems::new(&plan, &w.item_params(132, usize::MAX));
        (w, plan, list, w.expected())
    });
    assert!(steps[1].2.items.len() < steps[0].2.items.len());
    for_each_device("paged_attention in a graph", |dev| {
        let mut on = OnDevice::new(dev, &world, &steps[0].1, &steps[0].2)?;
        let params = on.params(&world);
        dev.begin_capture()?;
        dev.launch(dev.kernels().paged_attention, &params)?;
        let graph = dev.end_capture()?;
        let mut all = Vec::new();
        for (w, plan, list, want) in &steps {
            on.upload(dev, plan, list)?;
            for _ in 0..2 {
                graph.launch(dev)?;
                let (o, lse) = on.results(dev, w)?;
                w.check("paged_attention in a graph", want, &o, &lse);
                all.push(joined((o, lse)));
            }
        }
        assert!(all[0] == all[1] && all[2] == all[3] && all[4] == all[0], "the same step twice, other bits");
        Ok(all.concat())
    });
}

#[test]
fn paged_attention_refuses_what_it_cannot_do() {
    for_each_device("limits", |dev| {
        let world = World::new(&shape((2, 1), 32, 16, &[], &[(40, 1)]), DType::F16, 1);
        let plan = world.plan();
        let list = AttentionItems::new(&plan, &world.item_params(1, 0));
        let mut on = OnDevice::new(dev, &world, &plan, &list)?;
        let good = on.params(&world);
        for bad in [
            rksc_paged_attention_params { head_dim: 48, ..good },
            rksc_paged_attention_params { block_size: 8, ..good },
            rksc_paged_attention_params { dtype: 7, ..good },
            rksc_paged_attention_params { num_q_heads: 3, num_kv_heads: 2, ..good },
            rksc_paged_attention_params { num_q_heads: 65, ..good },
            rksc_paged_attention_params { sm_scale: 0.0, ..good },
            rksc_paged_attention_params { softcap: -1.0, ..good },
            rksc_paged_attention_params { softcap: f32::NAN, ..good },
            rksc_paged_attention_params { softcap: f32::INFINITY, ..good },
        ] {
            assert_refused(dev.launch(dev.kernels().paged_attention, &bad));
        }
        dev.launch(dev.kernels().paged_attention, &rksc_paged_attention_params { max_items: 0, ..good })?;
        Ok(Vec::new())
    });
}

// ---- attention_mass ------------------------------------------------------------------------------------------------

fn mass_case(shape: &Shape, dtype: DType, seed: u64) {
    assert_mass(&World::new(shape, dtype, seed), &format!("attention_mass {dtype} {shape:?}"));
}

pub(crate) fn assert_mass(world: &World, what: &str) {
    let dtype = world.dtype;
    let (heads, dim, group) = (world.layout.num_kv_heads, world.layout.head_dim, world.group());
    let [k, v, q] = [&world.k, &world.v, &world.q].map(|x| rounded(dtype, x));
    let kv = PagedKv { layout: &world.layout, k: &k, v: &v };
    let scoring = world.scoring();
    let mut lse = vec![0.0f32; world.num_rows() * world.num_q_heads];
    let (mut sequences, mut blocks, mut want) = (Vec::new(), Vec::new(), Vec::new());
    let mut mass_start = 0;
    for (i, seq) in world.seqs.iter().enumerate() {
        let row_start = world.first_row(i);
        sequences.push(rksc_mass_sequence {
            row_start: row_start as u32,
            num_rows: seq.rows as u32,
            block_start: blocks.len() as u32,
            kv_len: seq.kv_len as u32,
            mass_start,
        });
        mass_start += seq.kv_len as u32;
        blocks.extend(&seq.blocks);
        for head in 0..heads {
            let k = kv.rows(&k, &seq.blocks, head, seq.kv_len);
            let mut queries = Vec::new();
            for (nth, h) in (0..seq.rows).flat_map(|nth| (head * group..(head + 1) * group).map(move |h| (nth, h))) {
                let at = (row_start + nth) * world.num_q_heads + h;
                let num_slots = seq.kv_len + 1 + nth - seq.rows;
                let q = &q[at * dim..(at + 1) * dim];
                let sum: f64 = attention_mass(&[(q, 0.0, num_slots)], &k, &scoring).iter().sum();
                lse[at] = sum.ln() as f32;
                queries.push((q, f64::from(lse[at]), num_slots));
            }
            want.extend(attention_mass(&queries, &k, &scoring));
        }
    }
    let max_kv_len = world.seqs.iter().map(|s| s.kv_len).max().unwrap_or(0) as u32 + 70;
    for_each_device(what, |dev| {
        let (q, k) = (narrowed(dev, dtype, &world.q)?, narrowed(dev, dtype, &world.k)?);
        let (lse, blocks, sequences) = (dev.buffer(&lse)?, dev.buffer(&blocks)?, dev.buffer(&sequences)?);
        let mut mass = dev.alloc::<f32>(want.len())?;
        let params = rksc_attention_mass_params {
            q: q.ptr().cast(),
            k_cache: k.ptr().cast(),
            lse: lse.ptr(),
            blocks: blocks.ptr(),
            sequences: sequences.ptr(),
            mass: mass.ptr_mut(),
            num_sequences: sequences.len() as u32,
            max_kv_len,
            num_q_heads: world.num_q_heads as u32,
            num_kv_heads: heads as u32,
            head_dim: dim as u32,
            block_size: world.layout.block_size as u32,
            dtype: dtype as u32,
            sm_scale: world.scale(),
            window: world.window.unwrap_or(0) as u32,
            softcap: world.softcap.unwrap_or(0.0),
        };
        dev.launch(dev.kernels().attention_mass, &params)?;
        let mass = dev.to_vec(&mass)?;
        // The result is f32 whatever the compute type; the error is that of the exponents.
        let atol = 2e-6 * world.seqs.iter().map(|s| (s.rows * group) as f64).fold(1.0, f64::max);
        oracle::assert_close(what, DType::F32, atol, &wide(&mass), &want);
        Ok(bits(&mass))
    });
}

#[test]
fn attention_mass_matches_oracle() {
    let more = [
        shape((1, 1), 64, 16, &[], &[]),
        shape((2, 2), 40, 16, &[], &[(66, 2)]),
        shape((1, 1), 32, 16, &[], &[(4097, 1)]),
        shape((1, 1), 32, 16, &[], &[(32768, 1)]),
    ];
    for (i, shape) in shapes().iter().chain(&more).enumerate() {
        mass_case(shape, DTYPES[i % 3], i as u64);
        mass_case(shape, DTYPES[(i + 1) % 3], i as u64);
    }
}

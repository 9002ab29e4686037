//! `paged_attention` over plans as the engine makes them, and `attention_mass`.

use rksc::DType;
use rksc::backend::cuda::attention_items::{AttentionItems, ItemParams};
use rksc::backend::cuda::bindings::*;
use rksc::backend::cuda::device::DeviceBuf;
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::kv::KvLayout;
use rksc::model::family::ModelConfig;
use rksc::testing::attention::attention_mass as mass_oracle;
use rksc::testing::fill::Fill;
use rksc::testing::oracle::{self, Scoring};

use super::harness::{Bench, COMPUTE, Noise};
use super::report::{Measured, error};
use super::rows::layout;

/// As the backend has it.
const MAX_PARTIALS: usize = 1 << 14;
/// Slots of each branch behind the prefix.
const OWN: usize = 48;

/// Sequences, each with `rows` rows this step.
struct Seqs {
    tables: Vec<Vec<u32>>,
    kv_len: usize,
    rows: usize,
    num_blocks: usize,
}

impl Seqs {
    /// Branches over a prefix of theirs or of their own, in shuffled blocks.
    fn branches(count: usize, prefix: usize, own: usize, shared: bool) -> Self {
        let common = if shared { prefix / 16 } else { 0 };
        let private = (prefix + own).div_ceil(16) - common;
        let num_blocks = common + count * private;
        let ids = Fill::new(3).shuffled(num_blocks);
        let table = |i: usize| [&ids[..common], &ids[common + i * private..][..private]].concat();
        Self { tables: (0..count).map(table).collect(), kv_len: prefix + own, rows: 1, num_blocks }
    }

    /// One prompt, all of it in this step.
    fn prompt(len: usize) -> Self {
        Self { rows: len, ..Self::branches(1, 0, len, false) }
    }

    fn num_rows(&self) -> usize {
        self.tables.len() * self.rows
    }

    fn plan(&self, params: &ItemParams) -> AttentionPlan {
        let views: Vec<SequenceView<'_>> = (0..)
            .zip(&self.tables)
            .map(|(i, blocks)| SequenceView { rows: i * self.rows..(i + 1) * self.rows, blocks, kv_len: self.kv_len })
            .collect();
        AttentionPlan::new(&views, 16, params.max_group_rows())
    }

    /// Slots attended to, over all rows.
    fn pairs(&self) -> usize {
        self.tables.len() * (self.kv_len + 1 - self.rows..=self.kv_len).sum::<usize>()
    }
}

/// A layer's cache, in as many copies as it takes to come from memory.
struct Cache {
    layout: KvLayout,
    k: Noise,
    v: Noise,
    copies: usize,
}

impl Cache {
    fn new(b: &mut Bench, m: &ModelConfig, num_blocks: usize) -> anyhow::Result<Self> {
        let layout = layout(m.num_kv_heads, m.head_dim, num_blocks);
        let len = num_blocks * layout.block_elems();
        let copies = b.copies(4 * len);
        Ok(Self { layout, k: b.noise(COMPUTE, copies * len)?, v: b.noise(COMPUTE, copies * len)?, copies })
    }

    fn len(&self) -> usize {
        self.layout.num_blocks * self.layout.block_elems()
    }

    /// The first `num_slots` vectors of a table.
    fn rows(&self, cache: &Noise, table: &[u32], head: usize, num_slots: usize) -> Vec<Vec<f64>> {
        let row = |slot: usize| {
            cache.wide(self.layout.elem(table[slot / 16] as usize, head, slot % 16), self.layout.head_dim)
        };
        (0..num_slots).map(row).collect()
    }
}

fn slices(rows: &[Vec<f64>]) -> Vec<&[f64]> {
    rows.iter().map(Vec::as_slice).collect()
}

/// Decode of B branches that share a prefix of P or have it each to itself, and a prompt of 1024.
/// bytes: every slot of the cache once, Hkv D 2 of K and of V; q and o 2 each
pub(super) fn paged_attention(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        for &branches in b.sizes(&[1, 8, 64], &[3]) {
            for &prefix in b.sizes(&[0, 128, 1024, 4096], &[64]) {
                for shared in [true, false] {
                    if !shared || (branches > 1 && prefix > 0) {
                        let kind = if shared { "shared" } else { "own" };
                        let shape = format!("{model} B={branches} P={prefix} own={OWN} {kind}");
                        attention_case(b, &m, shape, &Seqs::branches(branches, prefix, OWN, shared))?;
                    }
                }
            }
        }
        let &prompt = b.sizes(&[1024], &[70]).first().unwrap_or(&1);
        attention_case(b, &m, format!("{model} prompt of {prompt}"), &Seqs::prompt(prompt))?;
    }
    Ok(())
}

fn attention_case(b: &mut Bench, m: &ModelConfig, shape: String, seqs: &Seqs) -> anyhow::Result<()> {
    b.case("paged_attention", shape, COMPUTE, |b| {
        let (hq, dim, t) = (m.num_q_heads, m.head_dim, seqs.num_rows());
        let mut lists = Lists::new(b, m, seqs)?;
        let cache = Cache::new(b, m, seqs.num_blocks)?;
        let q = b.noise(COMPUTE, t * hq * dim)?;
        let (mut o, mut lse) = (b.results(2 * t * hq * dim)?, b.results(4 * t * hq)?);
        let params = rksc_paged_attention_params {
            q: q.ptr(0),
            k_cache: cache.k.ptr(0),
            v_cache: cache.v.ptr(0),
            o: o.ptr_mut().cast(),
            lse: lse.ptr_mut().cast(),
            ..lists.params(m)
        };
        b.dev.launch(b.dev.kernels().paged_attention, &params)?;
        let (mut got, mut want) = (Vec::new(), Vec::new());
        let mut lse_error = 0.0f64;
        for (row, head) in [(0, 0), (t / 2, hq - 1), (t - 1, hq / 2)] {
            let (table, num_slots) = (&seqs.tables[row / seqs.rows], seqs.kv_len + 1 + row % seqs.rows - seqs.rows);
            let kv_head = head / (hq / m.num_kv_heads);
            let (k, v) =
                (cache.rows(&cache.k, table, kv_head, num_slots), cache.rows(&cache.v, table, kv_head, num_slots));
            let at = row * hq + head;
            let scoring = Scoring::plain(f64::from(params.sm_scale));
            let (o_want, lse_want) =
                oracle::attention(COMPUTE, &q.wide(at * dim, dim), &slices(&k), &slices(&v), &scoring);
            got.extend(b.read(COMPUTE, &o, at * dim, dim)?);
            want.extend(o_want);
            lse_error = lse_error.max(error(&b.read(DType::F32, &lse, at, 1)?, &[lse_want]));
        }
        let len = cache.len();
        let times = b.time(cache.copies, |dev, set| {
            let (k_cache, v_cache) = (cache.k.ptr(set * len), cache.v.ptr(set * len));
            dev.launch(dev.kernels().paged_attention, &rksc_paged_attention_params { k_cache, v_cache, ..params })
        })?;
        // Weights of P are rounded to the compute type against another maximum than the oracle's.
        let error = if lse_error <= 1e-4 { error(&got, &want) } else { f64::NAN };
        let bytes = 4 * len + 4 * t * hq * dim;
        let flops = if seqs.rows > 1 { 4 * seqs.pairs() * hq * dim } else { 0 };
        Ok(Measured { bytes, flops, error, tolerance: 1e-2, times })
    })
}

/// The work list of a plan on the device.
struct Lists {
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

impl Lists {
    fn new(b: &mut Bench, m: &ModelConfig, seqs: &Seqs) -> anyhow::Result<Self> {
        let (hq, hkv) = (m.num_q_heads, m.num_kv_heads);
        let params = ItemParams {
            num_sms: b.dev.info().num_sms as usize,
            num_kv_heads: hkv,
            gqa_group: hq / hkv,
            block_size: 16,
            max_partials: MAX_PARTIALS,
        };
        let plan = seqs.plan(&params);
        let list = AttentionItems::new(&plan, &params);
        let dev = &mut b.dev;
        Ok(Self {
            row_order: dev.buffer(&plan.row_order)?,
            kv_lens: dev.buffer(&plan.kv_lens)?,
            blocks: dev.buffer(&list.blocks)?,
            items: dev.buffer(&list.items)?,
            groups: dev.buffer(&list.groups)?,
            num_items: dev.buffer(&[list.items.len() as u32])?,
            partial_o: dev.alloc(list.num_partials * hq * m.head_dim)?,
            partial_ml: dev.alloc(list.num_partials * hq * 2)?,
            arrivals: dev.zeroed(list.groups.len() * hkv)?,
        })
    }

    /// Everything but the tensors.
    fn params(&mut self, m: &ModelConfig) -> rksc_paged_attention_params {
        rksc_paged_attention_params {
            q: std::ptr::null(),
            k_cache: std::ptr::null(),
            v_cache: std::ptr::null(),
            o: std::ptr::null_mut(),
            lse: std::ptr::null_mut(),
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
            num_q_heads: m.num_q_heads as u32,
            num_kv_heads: m.num_kv_heads as u32,
            head_dim: m.head_dim as u32,
            block_size: 16,
            dtype: COMPUTE as u32,
            sm_scale: 1.0 / (m.head_dim as f32).sqrt(),
            window: 0,
            softcap: 0.0,
            reserved: 0,
        }
    }
}

/// bytes: K once, Hkv D 2 a slot; mass 4 Hkv a slot
pub(super) fn attention_mass(b: &mut Bench) -> anyhow::Result<()> {
    // Any number serves in place of ln sum exp.
    const LSE: f32 = 6.0;
    for (model, m) in b.models()? {
        for &branches in b.sizes(&[1, 8], &[2]) {
            let kv_len = if b.timed { 4096 / branches.div_ceil(2) } else { 70 };
            b.case("attention_mass", format!("{model} B={branches} kv={kv_len}"), COMPUTE, |b| {
                let (hq, hkv, dim) = (m.num_q_heads, m.num_kv_heads, m.head_dim);
                let seqs = Seqs::branches(branches, 0, kv_len, false);
                let cache = Cache::new(b, &m, seqs.num_blocks)?;
                let q = b.noise(COMPUTE, branches * hq * dim)?;
                let blocks = b.dev.buffer(&seqs.tables.concat())?;
                let lse = b.dev.buffer(&vec![LSE; branches * hq])?;
                let sequences: Vec<rksc_mass_sequence> = (0..branches)
                    .map(|i| rksc_mass_sequence {
                        row_start: i as u32,
                        num_rows: 1,
                        block_start: (i * kv_len.div_ceil(16)) as u32,
                        kv_len: kv_len as u32,
                        mass_start: (i * kv_len) as u32,
                    })
                    .collect();
                let sequences = b.dev.buffer(&sequences)?;
                let mut mass = b.results(4 * branches * hkv * kv_len)?;
                let params = rksc_attention_mass_params {
                    q: q.ptr(0),
                    k_cache: cache.k.ptr(0),
                    lse: lse.ptr(),
                    blocks: blocks.ptr(),
                    sequences: sequences.ptr(),
                    mass: mass.ptr_mut().cast(),
                    num_sequences: branches as u32,
                    max_kv_len: kv_len as u32,
                    num_q_heads: hq as u32,
                    num_kv_heads: hkv as u32,
                    head_dim: dim as u32,
                    block_size: 16,
                    dtype: COMPUTE as u32,
                    sm_scale: 1.0 / (dim as f32).sqrt(),
                    window: 0,
                    softcap: 0.0,
                };
                b.dev.launch(b.dev.kernels().attention_mass, &params)?;
                // The last kv head of the last branch.
                let (branch, head, group) = (branches - 1, hkv - 1, hq / hkv);
                let got = b.read(DType::F32, &mass, (branch * hkv + head) * kv_len, kv_len)?;
                let k = cache.rows(&cache.k, &seqs.tables[branch], head, kv_len);
                let queries: Vec<Vec<f64>> =
                    (0..group).map(|g| q.wide((branch * hq + head * group + g) * dim, dim)).collect();
                let queries: Vec<(&[f64], f64, usize)> =
                    queries.iter().map(|q| (q.as_slice(), f64::from(LSE), kv_len)).collect();
                let want = mass_oracle(&queries, &slices(&k), &Scoring::plain(f64::from(params.sm_scale)));
                let len = cache.len();
                let times = b.time(cache.copies, |dev, set| {
                    let params = rksc_attention_mass_params { k_cache: cache.k.ptr(set * len), ..params };
                    dev.launch(dev.kernels().attention_mass, &params)
                })?;
                let bytes = branches * kv_len * hkv * (2 * dim + 4);
                Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: 1e-5, times })
            })?;
        }
    }
    Ok(())
}

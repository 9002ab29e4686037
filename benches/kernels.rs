//! Every CPU op at the shapes of real models: checked against the oracle, then timed.
//!
//! ```text
//! cargo bench --bench kernels [-- FILTER] [--json FILE] [--simd LEVEL] [--threads N]
//! ```
//! One line a case: `op | shape | us (median, p10, p90) | bytes | GB/s | of DRAM read | GFLOP/s | floor us`.
//! The floor is the larger of two times: the case's bytes at the measured DRAM read rate, and its arithmetic at the rate
//! of `linear` at 1024 rows. Weights, embeddings and decode KV are rotated through 256 MB and come from memory, as in a
//! pass over a model that no cache holds; activations stay in the caches, as they do between the ops of a pass, and can
//! be faster than the floor. The bytes of each op stand beside its case, with t rows and 2 bytes a bf16.

#[path = "kernels/compression.rs"]
mod compression;
#[path = "kernels/probes.rs"]
mod probes;

use std::ops::Range;
use std::time::Instant;

use anyhow::ensure;
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::roof::{MemoryRoof, linear_rate, random_buf, random_matrix};
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cpu::{Cpu, CpuBuf, MAX_GROUP_ROWS};
use rksc::backend::{
    Activation, AddRmsNorm, Backend, Embed, GatherRows, Glu, KvCopyBlocks, KvTransfer, Linear, NormOutput,
    PagedAttention, PassInputs, RopeAppend, RowIds, RowStats, RowStatsOp, Softcap,
};
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::kv::{BlockCopy, KvLayout, SlotTransfer};
use rksc::report::LatencyMs;
use rksc::testing::oracle::{self, Scoring};
use rksc::{DType, Result};

const COMPUTE: DType = DType::Bf16;
const ROTATE_BYTES: usize = 256 << 20;
const MIN_SAMPLES: usize = 30;
const WARM_UP: usize = 3;

/// Qwen2.5-0.5B.
const HIDDEN: usize = 896;
const INTER: usize = 4864;
const VOCAB: usize = 151_936;
const HEADS: Heads = Heads { name: "0.5b", q: 14, kv: 2, dim: 64 };
/// The bundled model.
const TINY_HEADS: Heads = Heads { name: "tinymath", q: 4, kv: 2, dim: 32 };

#[derive(Clone, Copy)]
struct Heads {
    name: &'static str,
    q: usize,
    kv: usize,
    dim: usize,
}

#[derive(serde::Serialize)]
struct Case {
    op: &'static str,
    shape: String,
    us: LatencyMs,
    bytes: usize,
    gb_per_s: f64,
    of_read: f64,
    gflops: f64,
    floor_us: f64,
}

struct Harness {
    cpu: Cpu,
    read: f64,
    flops: f64,
    filter: String,
    cases: Vec<Case>,
}

impl Harness {
    fn wants(&self, op: &str) -> bool {
        op.contains(&self.filter)
    }

    /// Times `run`, which is given the number of the call.
    fn time(
        &mut self,
        op: &'static str,
        shape: String,
        (bytes, arithmetic): (usize, usize),
        mut run: impl FnMut(&mut Cpu, usize) -> Result<()>,
    ) -> Result<()> {
        let mut samples = Vec::new();
        for call in 0..WARM_UP + MIN_SAMPLES {
            let started = Instant::now();
            run(&mut self.cpu, call)?;
            if call >= WARM_UP {
                samples.push(started.elapsed().as_secs_f64() * 1e6);
            }
        }
        let us = LatencyMs::of(&samples);
        let floor_us = (bytes as f64 / self.read).max(arithmetic as f64 / self.flops) * 1e6;
        let gb_per_s = bytes as f64 / us.p50 / 1e3;
        let (of_read, gflops) = (gb_per_s * 1e9 / self.read, arithmetic as f64 / us.p50 / 1e3);
        println!(
            "{op:<17} | {shape:<34} | {:>9.1} {:>9.1} {:>9.1} | {bytes:>11} | {gb_per_s:>6.1} | {:>4.0} % | {gflops:>6.0} | {floor_us:>9.1}",
            us.p50,
            us.p10,
            us.p90,
            of_read * 100.0
        );
        self.cases.push(Case { op, shape, us, bytes, gb_per_s, of_read, gflops, floor_us });
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let (mut filter, mut json, mut simd, mut threads) = (String::new(), None, SimdLevel::detect(), 0);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| anyhow::anyhow!("{arg} needs a value"));
        match arg.as_str() {
            "--bench" => {}
            "--json" => json = Some(value()?),
            "--simd" => simd = value()?.parse()?,
            "--threads" => threads = value()?.parse()?,
            flag if flag.starts_with('-') => anyhow::bail!("{flag} is unknown"),
            _ => filter = arg,
        }
    }
    let mut cpu = Cpu::new(threads, simd)?;
    let memory = MemoryRoof::measure(threads, simd);
    let flops = linear_rate(&mut cpu, COMPUTE, 1024)?;
    let device = cpu.describe();
    println!(
        "{device}; DRAM read {:.1} GB/s, copy {:.1} GB/s; linear at 1024 rows {:.0} GFLOP/s",
        memory.read / 1e9,
        memory.copy / 1e9,
        flops / 1e9
    );
    println!(
        "{:<17} | {:<34} | {:>9} {:>9} {:>9} | {:>11} | {:>6} | {:>6} | {:>6} | {:>9}",
        "op", "shape", "us", "p10", "p90", "bytes", "GB/s", "read", "GF/s", "floor us"
    );
    let mut h = Harness { cpu, read: memory.read, flops, filter, cases: Vec::new() };
    for rows in [8, 1024] {
        embed(&mut h, rows)?;
        add_rms_norm(&mut h, rows)?;
        rope_append(&mut h, rows)?;
        glu(&mut h, rows)?;
        gather_rows(&mut h, rows)?;
    }
    linear(&mut h, &[1, 8, 256])?;
    kv_copy_blocks(&mut h)?;
    kv_transfer(&mut h)?;
    for heads in [TINY_HEADS, HEADS] {
        attention_decode(&mut h, heads)?;
        attention_prefill(&mut h, heads)?;
        probes::attention_mass(&mut h, heads)?;
    }
    softcap(&mut h)?;
    row_stats(&mut h)?;
    probes::entropy_probe(&mut h)?;
    probes::branch_similarity(&mut h)?;
    compression::kv_scores(&mut h)?;
    compression::kv_compact(&mut h)?;
    if let Some(path) = json {
        let roof = serde_json::json!({"read": memory.read, "copy": memory.copy, "linear_flops": flops});
        let all = serde_json::json!({"device": device, "dtype": COMPUTE, "roof": roof, "cases": h.cases});
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

fn wide(buf: &CpuBuf, range: Range<usize>) -> Vec<f64> {
    match buf {
        CpuBuf::F32(x) => x[range].iter().map(|&x| f64::from(x)).collect(),
        CpuBuf::Bf16(x) => x[range].iter().map(|x| x.to_f64()).collect(),
        CpuBuf::F16(x) => x[range].iter().map(|x| x.to_f64()).collect(),
    }
}

fn rounded(x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| oracle::round(COMPUTE, x)).collect()
}

fn f32s(len: usize, seed: u64) -> CpuBuf {
    random_buf(len, DType::F32, seed)
}

/// bytes: t * hidden * (2 read + 4 written)
fn embed(h: &mut Harness, rows: usize) -> anyhow::Result<()> {
    if !h.wants("embed") {
        return Ok(());
    }
    let table = random_matrix(VOCAB, HIDDEN, COMPUTE, 1)?;
    let inputs: Vec<PassInputs> = (0..64)
        .map(|call| (call * rows..(call + 1) * rows).map(|i| (i * 7919 % VOCAB) as u32).collect())
        .map(|token_ids| PassInputs { token_ids, ..Default::default() })
        .collect();
    let mut x = h.cpu.alloc(DType::F32, rows * HIDDEN)?;
    let run = |cpu: &mut Cpu, call: usize, x: &mut CpuBuf| {
        cpu.embed(Embed { table: &table, inputs: &inputs[call % 64], x, scale: 1.0, hidden: HIDDEN })
    };
    run(&mut h.cpu, 0, &mut x)?;
    let mut want = vec![0.0; HIDDEN];
    table.widen_row(inputs[0].token_ids[rows - 1] as usize, &mut want)?;
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    ensure!(wide(&x, (rows - 1) * HIDDEN..rows * HIDDEN) == want, "embed: a row differs from the table");
    let bytes = rows * HIDDEN * (2 + 4);
    h.time("embed", format!("{rows} x {HIDDEN}"), (bytes, 0), |cpu, call| run(cpu, call, &mut x))?;
    Ok(())
}

/// bytes: t * hidden * (x 4 read + 4 written, delta 4 read, y 2 written) + 4 * hidden of weight
fn add_rms_norm(h: &mut Harness, rows: usize) -> anyhow::Result<()> {
    if !h.wants("add_rms_norm") {
        return Ok(());
    }
    let len = rows * HIDDEN;
    let (mut x, delta, weight) = (f32s(len, 1), f32s(len, 2), f32s(HIDDEN, 3));
    let mut y = h.cpu.alloc(COMPUTE, len)?;
    let last = len - HIDDEN..len;
    let (before, added) = (wide(&x, last.clone()), wide(&delta, last.clone()));
    let run = |cpu: &mut Cpu, x: &mut CpuBuf, y: &mut CpuBuf| {
        cpu.add_rms_norm(AddRmsNorm {
            rows: 0..rows,
            x,
            delta: Some(&delta),
            post_norm: None,
            output: NormOutput::Normed(&weight),
            y,
            keep: None,
            step_similarity: None,
            hidden: HIDDEN,
            eps: 1e-6,
        })
    };
    run(&mut h.cpu, &mut x, &mut y)?;
    let sum: Vec<f64> = before.iter().zip(&added).map(|(a, b)| oracle::round(DType::F32, a + b)).collect();
    let want = rounded(&oracle::rms_norm(&sum, &wide(&weight, 0..HIDDEN), 1e-6));
    oracle::assert_close("add_rms_norm", COMPUTE, 2e-6, &wide(&y, last), &want);
    let bytes = len * (4 + 4 + 4 + 2) + 4 * HIDDEN;
    h.time("add_rms_norm", format!("{rows} x {HIDDEN}"), (bytes, 0), |cpu, _| run(cpu, &mut x, &mut y))?;
    Ok(())
}

/// bytes: weights 2 * in * out + x 2 * t * in + y 4 * t * out; arithmetic: 2 * t * in * out
fn linear(h: &mut Harness, all_rows: &[usize]) -> anyhow::Result<()> {
    if !h.wants("linear") {
        return Ok(());
    }
    for (name, k, n) in [("qkv", HIDDEN, 1152), ("gate_up", HIDDEN, 2 * INTER), ("down", INTER, HIDDEN)] {
        let weight_bytes = 2 * k * n;
        let copies: Vec<CpuMatrix> = (0..ROTATE_BYTES.div_ceil(weight_bytes) as u64)
            .map(|i| random_matrix(n, k, COMPUTE, i))
            .collect::<Result<_>>()?;
        for &rows in all_rows {
            let x = random_buf(rows * k, COMPUTE, 9);
            let mut y = h.cpu.alloc(DType::F32, rows * n)?;
            h.cpu.linear(Linear { rows: 0..rows, x: &x, w: &copies[0], river: None, bias: None, y: &mut y })?;
            check_linear(&copies[0], &wide(&x, (rows - 1) * k..rows * k), &wide(&y, (rows - 1) * n..rows * n))?;
            let bytes = weight_bytes + 2 * rows * k + 4 * rows * n;
            let shape = format!("{rows} x {k} -> {n} ({name})");
            h.time("linear", shape, (bytes, 2 * rows * k * n), |cpu, call| {
                let w = &copies[call % copies.len()];
                cpu.linear(Linear { rows: 0..rows, x: &x, w, river: None, bias: None, y: &mut y })
            })?;
        }
    }
    Ok(())
}

/// Some outputs of one row against sums in f64.
fn check_linear(w: &CpuMatrix, x: &[f64], y: &[f64]) -> anyhow::Result<()> {
    let mut row = vec![0.0; x.len()];
    for out in (0..y.len()).step_by(y.len() / 7) {
        w.widen_row(out, &mut row)?;
        let want: f64 = x.iter().zip(&row).map(|(x, &w)| x * f64::from(w)).sum();
        let size: f64 = x.iter().zip(&row).map(|(x, &w)| (x * f64::from(w)).abs()).sum();
        ensure!((y[out] - want).abs() < 1e-5 * size, "linear: output {out}: got {}, want {want}", y[out]);
    }
    Ok(())
}

/// bytes: t * (Hq + 2 Hkv) * D * (4 read + 2 written)
fn rope_append(h: &mut Harness, rows: usize) -> anyhow::Result<()> {
    if !h.wants("rope_append") {
        return Ok(());
    }
    let Heads { q: hq, kv: hkv, dim, .. } = HEADS;
    let layout = layout(HEADS, rows.div_ceil(16));
    let width = (hq + 2 * hkv) * dim;
    let qkv = f32s(rows * width, 1);
    let mut q = h.cpu.alloc(COMPUTE, rows * hq * dim)?;
    let mut k = h.cpu.alloc(COMPUTE, layout.num_blocks * layout.block_elems())?;
    let mut v = h.cpu.alloc(COMPUTE, layout.num_blocks * layout.block_elems())?;
    let ids: Vec<u32> = (0..rows as u32).collect();
    let inputs = PassInputs { positions: ids.clone(), slots: ids, ..Default::default() };
    let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    let inv_freq_buf = h.cpu.upload(&inv_freq)?;
    let mut run = |cpu: &mut Cpu, q: &mut CpuBuf| {
        cpu.rope_append(RopeAppend {
            rows: 0..rows,
            inputs: &inputs,
            qkv: &qkv,
            q,
            query_ring: None,
            k_cache: &mut k,
            v_cache: &mut v,
            inv_freq: &inv_freq_buf,
            rotary_dim: dim,
            rope_scale: 1.0,
            qk_norm: None,
            num_q_heads: hq,
            layout: &layout,
        })
    };
    run(&mut h.cpu, &mut q)?;
    let at = (rows - 1) * width;
    let want = rounded(&oracle::rope(&wide(&qkv, at..at + dim), rows as u32 - 1, &inv_freq, 1.0));
    let at = (rows - 1) * hq * dim;
    oracle::assert_close("rope_append", COMPUTE, 2e-6, &wide(&q, at..at + dim), &want);
    let shape = format!("{rows} x {hq}/{hkv} heads of {dim}");
    h.time("rope_append", shape, (rows * width * (4 + 2), 0), |cpu, _| run(cpu, &mut q))?;
    Ok(())
}

fn layout(heads: Heads, num_blocks: usize) -> KvLayout {
    KvLayout { num_blocks, num_kv_heads: heads.kv, block_size: 16, head_dim: heads.dim, dtype: COMPUTE }
}

/// bytes: K and V, each slot * Hkv * D * 2 read and written
fn kv_copy_blocks(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("kv_copy_blocks") {
        return Ok(());
    }
    let layout = layout(HEADS, 16);
    let len = layout.num_blocks * layout.block_elems();
    let (mut k, mut v) = (random_buf(len, COMPUTE, 1), random_buf(len, COMPUTE, 2));
    let copies: Vec<BlockCopy> = (0..8).map(|i| BlockCopy { src: i, dst: i + 8, num_slots: 15 }).collect();
    let inputs = PassInputs { copies, ..Default::default() };
    let mut run = |cpu: &mut Cpu, k: &mut CpuBuf| {
        cpu.kv_copy_blocks(KvCopyBlocks { inputs: &inputs, k_cache: k, v_cache: &mut v, layout: &layout })
    };
    run(&mut h.cpu, &mut k)?;
    let head = 15 * layout.head_dim;
    let to = 8 * layout.block_elems();
    ensure!(wide(&k, 0..head) == wide(&k, to..to + head), "kv_copy_blocks: a copied head differs");
    let bytes = 2 * 2 * 8 * 15 * layout.num_kv_heads * layout.head_dim * 2;
    h.time("kv_copy_blocks", "8 blocks of 15 slots".into(), (bytes, 0), |cpu, _| run(cpu, &mut k))?;
    Ok(())
}

/// bytes: K and V, each slot * Hkv * D * 2 read and written
fn kv_transfer(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("kv_transfer") {
        return Ok(());
    }
    let (layout, n) = (layout(HEADS, 16), 128);
    let (slots, dim) = (layout.num_kv_heads * layout.head_dim, layout.head_dim);
    let len = layout.num_blocks * layout.block_elems();
    let (mut k, mut v) = (random_buf(len, COMPUTE, 1), random_buf(len, COMPUTE, 2));
    let freqs: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    let inv_freq = CpuBuf::F32(freqs.clone());
    let transfers = (0..n).map(|i| SlotTransfer { src: i, dst: i + n, shift: 5 }).collect();
    let inputs = PassInputs { transfers, ..Default::default() };
    let mut run = |cpu: &mut Cpu, k: &mut CpuBuf| {
        let (v_cache, layout, rotary_dim) = (&mut v, &layout, dim);
        cpu.kv_transfer(KvTransfer { inputs: &inputs, k_cache: k, v_cache, inv_freq: &inv_freq, rotary_dim, layout })
    };
    run(&mut h.cpu, &mut k)?;
    let to = layout.elem(n as usize / 16, 0, 0);
    let want = rounded(&oracle::turn(&wide(&k, 0..dim), 5, &freqs));
    oracle::assert_close("kv_transfer", COMPUTE, 2e-6, &wide(&k, to..to + dim), &want);
    h.time("kv_transfer", format!("{n} slots"), (2 * 2 * n as usize * slots * 2, 0), |cpu, _| run(cpu, &mut k))?;
    Ok(())
}

/// Sequences over a cache of their own blocks, in as many copies as asked for.
struct Attention {
    heads: Heads,
    layout: KvLayout,
    inputs: PassInputs,
    caches: Vec<(CpuBuf, CpuBuf)>,
    rows: usize,
}

impl Attention {
    fn new(heads: Heads, seqs: &[SequenceView<'_>], num_blocks: usize, rotate_bytes: usize) -> Self {
        let layout = layout(heads, num_blocks);
        let len = num_blocks * layout.block_elems();
        let first = (random_buf(len, COMPUTE, 1), random_buf(len, COMPUTE, 2));
        let copy = |buf: &CpuBuf| match buf {
            CpuBuf::Bf16(x) => CpuBuf::Bf16(x.clone()),
            _ => random_buf(len, COMPUTE, 3),
        };
        let count = rotate_bytes.div_ceil(4 * len).max(1);
        let caches = (1..count).map(|_| (copy(&first.0), copy(&first.1))).collect::<Vec<_>>();
        Self {
            heads,
            layout,
            inputs: PassInputs {
                plan: AttentionPlan::new(seqs, layout.block_size, MAX_GROUP_ROWS),
                ..Default::default()
            },
            caches: std::iter::once(first).chain(caches).collect(),
            rows: seqs.iter().map(|s| s.rows.len()).sum(),
        }
    }

    /// Checks the first head of row `row`, which attends to `slots` (block, offset), then times all.
    fn bench(&self, h: &mut Harness, shape: String, row: usize, slots: &[(u32, usize)]) -> anyhow::Result<()> {
        let Heads { q: hq, dim, .. } = self.heads;
        let q = random_buf(self.rows * hq * dim, COMPUTE, 4);
        let mut o = h.cpu.alloc(COMPUTE, self.rows * hq * dim)?;
        let mut lse = h.cpu.alloc(DType::F32, self.rows * hq)?;
        let sm_scale = 1.0 / (dim as f32).sqrt();
        let mut run = |cpu: &mut Cpu, call: usize, o: &mut CpuBuf| {
            let (k_cache, v_cache) = &self.caches[call % self.caches.len()];
            let (inputs, layout) = (&self.inputs, &self.layout);
            let lse = &mut lse;
            cpu.paged_attention(PagedAttention {
                inputs,
                q: &q,
                k_cache,
                v_cache,
                o,
                lse,
                num_q_heads: hq,
                sm_scale,
                window: None,
                softcap: None,
                layout,
            })
        };
        run(&mut h.cpu, 0, &mut o)?;
        let read = |cache: &CpuBuf| -> Vec<Vec<f64>> {
            let at = |&(block, offset): &(u32, usize)| self.layout.elem(block as usize, 0, offset);
            slots.iter().map(|s| wide(cache, at(s)..at(s) + dim)).collect()
        };
        let (k, v) = (read(&self.caches[0].0), read(&self.caches[0].1));
        let k: Vec<&[f64]> = k.iter().map(Vec::as_slice).collect();
        let v: Vec<&[f64]> = v.iter().map(Vec::as_slice).collect();
        let at = row * hq * dim;
        let (want, _) =
            oracle::attention(COMPUTE, &wide(&q, at..at + dim), &k, &v, &Scoring::plain(f64::from(sm_scale)));
        // P is rounded against another maximum than the oracle's.
        let got = wide(&o, at..at + dim);
        let (atol, size) = (1.5 * oracle::eps(COMPUTE), want.iter().fold(0.0f64, |m, x| m.max(x.abs())));
        for (g, w) in got.iter().zip(&want) {
            ensure!((g - w).abs() <= atol * (size + 0.1), "paged_attention: {shape}: got {g}, want {w}");
        }
        // Every planned tile of K and V once; q and o once. Two products of 2 operations per query element and slot.
        let slot_bytes = 2 * self.layout.num_kv_heads * dim * 2;
        let bytes = self.inputs.plan.slots_read(None) * slot_bytes + 2 * self.rows * hq * dim * 2;
        let attended: usize = self.inputs.plan.kv_lens.iter().map(|&n| n as usize).sum();
        h.time("paged_attention", shape, (bytes, 4 * attended * hq * dim), |cpu, call| run(cpu, call, &mut o))?;
        Ok(())
    }
}

/// bytes: planned slots * 2 * Hkv * D * 2 + q and o; the shared 1024 slots count once
fn attention_decode(h: &mut Harness, heads: Heads) -> anyhow::Result<()> {
    if !h.wants("paged_attention") {
        return Ok(());
    }
    let (branches, shared, own) = (8usize, 1024 / 16u32, 48 / 16u32);
    let tables: Vec<Vec<u32>> =
        (0..branches as u32).map(|b| (0..shared).chain(shared + b * own..shared + (b + 1) * own).collect()).collect();
    let seqs: Vec<SequenceView<'_>> =
        tables.iter().enumerate().map(|(b, t)| SequenceView { rows: b..b + 1, blocks: t, kv_len: 1024 + 48 }).collect();
    let num_blocks = (shared + branches as u32 * own) as usize;
    let bench = Attention::new(heads, &seqs, num_blocks, ROTATE_BYTES);
    let slots: Vec<(u32, usize)> = (0..1072).map(|s| (tables[7][s / 16], s % 16)).collect();
    bench.bench(h, format!("decode 8 x (1024 + 48), {}", heads.name), 7, &slots)
}

/// bytes: planned slots * 2 * Hkv * D * 2 + q and o; rows are planned in groups of 64
fn attention_prefill(h: &mut Harness, heads: Heads) -> anyhow::Result<()> {
    if !h.wants("paged_attention") {
        return Ok(());
    }
    let table: Vec<u32> = (0..64).rev().collect();
    let seqs = [SequenceView { rows: 0..1024, blocks: &table, kv_len: 1024 }];
    let bench = Attention::new(heads, &seqs, 64, 0);
    let slots: Vec<(u32, usize)> = (0..1024).map(|s| (table[s / 16], s % 16)).collect();
    bench.bench(h, format!("prefill 1024, {}", heads.name), 1023, &slots)
}

/// bytes: t * inter * (gate 4 + up 4 read, y 2 written)
fn glu(h: &mut Harness, rows: usize) -> anyhow::Result<()> {
    if !h.wants("glu") {
        return Ok(());
    }
    let gate_up = f32s(rows * 2 * INTER, 1);
    let mut y = h.cpu.alloc(COMPUTE, rows * INTER)?;
    for (name, activation) in [("silu", Activation::Silu), ("gelu-tanh", Activation::GeluTanh)] {
        let run = |cpu: &mut Cpu, y: &mut CpuBuf| {
            cpu.glu(Glu { rows: 0..rows, gate_up: &gate_up, y, intermediate: INTER, activation })
        };
        run(&mut h.cpu, &mut y)?;
        let wide_row = wide(&gate_up, (rows - 1) * 2 * INTER..rows * 2 * INTER);
        let want: Vec<f64> = (0..INTER).map(|i| oracle::glu(activation, wide_row[i], wide_row[INTER + i])).collect();
        let got = wide(&y, (rows - 1) * INTER..rows * INTER);
        oracle::assert_close("glu", COMPUTE, 1e-5, &got, &rounded(&want));
        let shape = format!("{rows} x {INTER}, {name}");
        h.time("glu", shape, (rows * INTER * 10, 0), |cpu, _| run(cpu, &mut y))?;
    }
    Ok(())
}

/// bytes: t * width * (4 read + 4 written)
fn gather_rows(h: &mut Harness, rows: usize) -> anyhow::Result<()> {
    if !h.wants("gather_rows") {
        return Ok(());
    }
    let src = f32s(rows * HIDDEN, 1);
    let mut dst = h.cpu.alloc(DType::F32, rows * HIDDEN)?;
    let order: Vec<u32> = (0..rows as u32).rev().collect();
    let run = |cpu: &mut Cpu, dst: &mut CpuBuf| {
        cpu.gather_rows(GatherRows { rows: RowIds::Given(&order), src: &src, dst, dst_row: 0, width: HIDDEN })
    };
    run(&mut h.cpu, &mut dst)?;
    let last = (rows - 1) * HIDDEN..rows * HIDDEN;
    ensure!(wide(&dst, last) == wide(&src, 0..HIDDEN), "gather_rows: a row differs");
    h.time("gather_rows", format!("{rows} x {HIDDEN}"), (rows * HIDDEN * 8, 0), |cpu, _| run(cpu, &mut dst))?;
    Ok(())
}

/// bytes: rows * vocab * (4 read + 4 written)
fn softcap(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("softcap") {
        return Ok(());
    }
    let (rows, cap) = (8, 0.75);
    let mut logits = f32s(rows * VOCAB, 1);
    let run = |cpu: &mut Cpu, logits: &mut CpuBuf| cpu.softcap(Softcap { logits, num_rows: rows, vocab: VOCAB, cap });
    let last = (rows - 1) * VOCAB..rows * VOCAB;
    let want: Vec<f64> = wide(&logits, last.clone()).iter().map(|&x| oracle::softcap(f64::from(cap), x)).collect();
    run(&mut h.cpu, &mut logits)?;
    oracle::assert_close("softcap", DType::F32, 1e-6, &wide(&logits, last), &want);
    h.time("softcap", format!("{rows} x {VOCAB}"), (8 * rows * VOCAB, 0), |cpu, _| run(cpu, &mut logits))?;
    Ok(())
}

/// bytes: 4 * rows * vocab
fn row_stats(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("row_stats") {
        return Ok(());
    }
    let rows = 8;
    let logits = f32s(rows * VOCAB, 1);
    let mut stats = vec![RowStats::default(); rows];
    let run = |cpu: &mut Cpu, stats: &mut Vec<RowStats>| {
        cpu.row_stats(RowStatsOp { logits: &logits, num_rows: rows, vocab: VOCAB })?;
        cpu.read_stats(stats)
    };
    run(&mut h.cpu, &mut stats)?;
    if let CpuBuf::F32(logits) = &logits {
        let (want, got) = (oracle::row_stats(&logits[(rows - 1) * VOCAB..]), stats[rows - 1]);
        let close =
            (f64::from(got.lse) - want.lse).abs() < 1e-4 && (f64::from(got.entropy) - want.entropy).abs() < 1e-3;
        ensure!(got.argmax as usize == want.argmax && close, "row_stats: got {got:?}, want {want:?}");
    }
    h.time("row_stats", format!("{rows} x {VOCAB}"), (4 * rows * VOCAB, 0), |cpu, _| run(cpu, &mut stats))?;
    Ok(())
}

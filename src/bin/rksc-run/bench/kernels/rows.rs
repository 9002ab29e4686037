//! Ops that work row by row: activations that the op before left in the caches, logits, copies of KV blocks.

use rksc::DType;
use rksc::backend::Activation;
use rksc::backend::cuda::bindings::*;
use rksc::kv::KvLayout;
use rksc::sampler::{DrawKey, SamplingParams};
use rksc::testing::oracle;
use rksc::testing::sample::{Request, sample as sample_oracle};

use super::harness::{Bench, COMPUTE};
use super::report::{Measured, error};

/// One rounding to bf16 that may fall the other way.
const ROUNDED: f64 = 4e-3;

fn rounded(x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| oracle::round(COMPUTE, x)).collect()
}

/// bytes: t hidden (2 read, 4 written)
pub(super) fn embed(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        for &t in b.sizes(&[8, 1024], &[3]) {
            b.case("embed", format!("{model} {t} x {}", m.hidden), COMPUTE, |b| {
                let table = b.noise(COMPUTE, m.vocab_size * m.hidden)?;
                // Other rows of the table in each of 64 sets.
                let sets = if b.timed { 64 } else { 1 };
                let ids: Vec<u32> = (0..sets * t).map(|i| (i * 7919 % m.vocab_size) as u32).collect();
                let id_buf = b.dev.buffer(&ids)?;
                let mut x = b.results(4 * t * m.hidden)?;
                let params = rksc_embed_params {
                    table: table.ptr(0),
                    ids: id_buf.ptr(),
                    x: x.ptr_mut().cast(),
                    num_rows: t as u32,
                    hidden: m.hidden as u32,
                    vocab: m.vocab_size as u32,
                    dtype: COMPUTE as u32,
                    scale: 1.0,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().embed, &params)?;
                let got = b.read(DType::F32, &x, (t - 1) * m.hidden, m.hidden)?;
                let want = table.wide(ids[t - 1] as usize * m.hidden, m.hidden);
                let times = b.time(sets, |dev, set| {
                    let ids = id_buf.ptr().wrapping_add(set * t);
                    dev.launch(dev.kernels().embed, &rksc_embed_params { ids, ..params })
                })?;
                let error = error(&got, &want);
                Ok(Measured { bytes: t * m.hidden * 6, flops: 0, error, tolerance: 0.0, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: t hidden (x 4 read, 4 written; delta 4 read; y 2 written), weight 4 hidden, and once more with a post-norm
pub(super) fn add_rms_norm(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        for &t in b.sizes(&[1, 8, 1024], &[3]) {
            add_rms_norm_case(b, format!("{model} {t} x {}", m.hidden), (t, m.hidden), false)?;
            add_rms_norm_case(b, format!("{model} {t} x {}, post-norm", m.hidden), (t, m.hidden), true)?;
        }
    }
    Ok(())
}

fn add_rms_norm_case(b: &mut Bench, shape: String, (t, width): (usize, usize), post: bool) -> anyhow::Result<()> {
    b.case("add_rms_norm", shape, COMPUTE, |b| {
        let (mut x, delta) = (b.noise(DType::F32, t * width)?, b.noise(DType::F32, t * width)?);
        let (weight, post_norm) = (b.noise(DType::F32, width)?, b.noise(DType::F32, width)?);
        let mut y = b.results(2 * t * width)?;
        let params = rksc_add_rms_norm_params {
            x: x.ptr_mut(0).cast(),
            delta: delta.ptr(0).cast(),
            post_norm: if post { post_norm.ptr(0).cast() } else { std::ptr::null() },
            weight: weight.ptr(0).cast(),
            y: y.ptr_mut().cast(),
            keep: std::ptr::null_mut(),
            reference: std::ptr::null(),
            similarity: std::ptr::null_mut(),
            num_rows: t as u32,
            hidden: width as u32,
            dtype: COMPUTE as u32,
            eps: 1e-6,
        };
        b.dev.launch(b.dev.kernels().add_rms_norm, &params)?;
        let last = (t - 1) * width;
        let got = b.read(COMPUTE, &y, last, width)?;
        let mut added = delta.wide(last, width);
        if post {
            added = oracle::rms_norm(&added, &post_norm.wide(0, width), 1e-6);
        }
        let sum: Vec<f64> = x.wide(last, width).iter().zip(&added).map(|(x, d)| x + d).collect();
        let want = rounded(&oracle::rms_norm(&sum, &weight.wide(0, width), 1e-6));
        let times = b.time(1, |dev, _| dev.launch(dev.kernels().add_rms_norm, &params))?;
        let bytes = t * width * 14 + 4 * width * (1 + usize::from(post));
        Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: ROUNDED, times })
    })
}

/// bytes: t (exits 8, cosine 4, route 4 read and 4 written)
pub(super) fn exit_rows(b: &mut Bench) -> anyhow::Result<()> {
    for &t in b.sizes(&[1, 8, 64], &[3]) {
        b.case("exit_rows", format!("{t} rows"), DType::F32, |b| {
            let exits: Vec<u32> = (0..t as u32).flat_map(|row| [row, row + 1]).collect();
            let similarity: Vec<f32> = (0..t).map(|row| if row % 3 == 0 { 0.9 } else { 0.4 }).collect();
            let (exits, similarity_buf) = (b.dev.buffer(&exits)?, b.dev.buffer(&similarity)?);
            let mut route = b.dev.buffer(&vec![f32::INFINITY; t])?;
            let params = rksc_exit_rows_params {
                exits: exits.ptr(),
                similarity: similarity_buf.ptr(),
                route: route.ptr_mut(),
                num_rows: t as u32,
                rule: RKSC_EXIT_ABOVE,
                every: 0,
                offset: 0,
                tau: 0.5,
                share: 0.0,
                whole_batch: 0,
                layer: 4,
            };
            b.dev.launch(b.dev.kernels().exit_rows, &params)?;
            let left = |s: &f32| if *s > 0.5 { 4.0 } else { f32::INFINITY };
            let want: Vec<f32> = similarity.iter().map(left).collect();
            let error = if b.dev.to_vec(&route)? == want { 0.0 } else { 1.0 };
            let times = b.time(1, |dev, _| dev.launch(dev.kernels().exit_rows, &params))?;
            Ok(Measured { bytes: 20 * t, flops: 0, error, tolerance: 0.0, times })
        })?;
    }
    Ok(())
}

/// bytes: t intermediate (8 read, 2 written)
pub(super) fn glu(b: &mut Bench) -> anyhow::Result<()> {
    let activations = [("silu", Activation::Silu, RKSC_SILU), ("gelu-tanh", Activation::GeluTanh, RKSC_GELU_TANH)];
    for (model, m) in b.models()? {
        let width = m.intermediate;
        for &t in b.sizes(&[1, 8, 1024], &[3]) {
            for (name, activation, code) in activations {
                b.case("glu", format!("{model} {t} x {width}, {name}"), COMPUTE, |b| {
                    let gate_up = b.noise(DType::F32, 2 * t * width)?;
                    let mut y = b.results(2 * t * width)?;
                    let params = rksc_glu_params {
                        gate_up: gate_up.ptr(0).cast(),
                        y: y.ptr_mut().cast(),
                        num_rows: t as u32,
                        intermediate: width as u32,
                        activation: code,
                        dtype: COMPUTE as u32,
                    };
                    b.dev.launch(b.dev.kernels().glu, &params)?;
                    let got = b.read(COMPUTE, &y, (t - 1) * width, width)?;
                    let row = gate_up.wide(2 * (t - 1) * width, 2 * width);
                    let (gate, up) = row.split_at(width);
                    let want: Vec<f64> = gate.iter().zip(up).map(|(&g, &u)| oracle::glu(activation, g, u)).collect();
                    let times = b.time(1, |dev, _| dev.launch(dev.kernels().glu, &params))?;
                    let error = error(&got, &rounded(&want));
                    Ok(Measured { bytes: t * width * 10, flops: 0, error, tolerance: ROUNDED, times })
                })?;
            }
        }
    }
    Ok(())
}

/// bytes: t hidden (4 read, 4 written)
pub(super) fn gather_rows(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let width = m.hidden;
        for &t in b.sizes(&[8, 64], &[3]) {
            b.case("gather_rows", format!("{model} {t} of 1024 x {width}"), DType::F32, |b| {
                let src = b.noise(DType::F32, 1024 * width)?;
                let rows: Vec<u32> = (0..t as u32).map(|i| i * 31 % 1024).collect();
                let row_buf = b.dev.buffer(&rows)?;
                let mut dst = b.results(4 * t * width)?;
                let params = rksc_gather_rows_params {
                    rows: row_buf.ptr(),
                    src: src.ptr(0).cast(),
                    dst: dst.ptr_mut().cast(),
                    num_rows: t as u32,
                    width: width as u32,
                };
                b.dev.launch(b.dev.kernels().gather_rows, &params)?;
                let got = b.read(DType::F32, &dst, (t - 1) * width, width)?;
                let want = src.wide(rows[t - 1] as usize * width, width);
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().gather_rows, &params))?;
                let error = error(&got, &want);
                Ok(Measured { bytes: t * width * 8, flops: 0, error, tolerance: 0.0, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: t vocab (4 read, 4 written)
pub(super) fn softcap(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let vocab = m.vocab_size;
        for &t in b.sizes(&[1, 8, 64], &[3]) {
            b.case("softcap", format!("{model} {t} x {vocab}"), DType::F32, |b| {
                let mut logits = b.noise(DType::F32, t * vocab)?;
                let params = rksc_softcap_params {
                    logits: logits.ptr_mut(0).cast(),
                    num_rows: t as u32,
                    vocab: vocab as u32,
                    cap: 0.75,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().softcap, &params)?;
                let last = (t - 1) * vocab;
                let got = b.read(DType::F32, &logits.memory, last, vocab)?;
                let want: Vec<f64> = logits.wide(last, vocab).iter().map(|&x| oracle::softcap(0.75, x)).collect();
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().softcap, &params))?;
                let error = error(&got, &want);
                Ok(Measured { bytes: 8 * t * vocab, flops: 0, error, tolerance: 1e-6, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: t hidden (2 read, 2 written), columns 4 hidden
pub(super) fn gather_columns(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let width = m.hidden;
        for &t in b.sizes(&[8, 256], &[3]) {
            b.case("gather_columns", format!("{model} {t} x {width}"), COMPUTE, |b| {
                let src = b.noise(COMPUTE, t * width)?;
                let mut columns: Vec<u32> = (0..width as u32).collect();
                columns.sort_by_key(|k| k.wrapping_mul(0x9e37_79b9));
                let column_buf = b.dev.buffer(&columns)?;
                let mut dst = b.results(2 * t * width)?;
                let params = rksc_gather_columns_params {
                    src: src.ptr(0),
                    columns: column_buf.ptr(),
                    dst: dst.ptr_mut().cast(),
                    num_rows: t as u32,
                    width: width as u32,
                    dtype: COMPUTE as u32,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().gather_columns, &params)?;
                let got = b.read(COMPUTE, &dst, (t - 1) * width, width)?;
                let row = src.wide((t - 1) * width, width);
                let want: Vec<f64> = columns.iter().map(|&k| row[k as usize]).collect();
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().gather_columns, &params))?;
                let error = error(&got, &want);
                Ok(Measured { bytes: t * width * 4 + 4 * width, flops: 0, error, tolerance: 0.0, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: t vocab 4
pub(super) fn row_stats(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let vocab = m.vocab_size;
        for &t in b.sizes(&[1, 8, 64], &[3]) {
            b.case("row_stats", format!("{model} {t} x {vocab}"), DType::F32, |b| {
                let logits = b.noise(DType::F32, t * vocab)?;
                let mut stats = b.results(t * size_of::<rksc_statistics>())?;
                let mut workspace = b.dev.zeroed::<u8>(b.dev.kernels().row_stats_workspace_bytes(t, vocab))?;
                let params = rksc_row_stats_params {
                    logits: logits.ptr(0).cast(),
                    stats: stats.ptr_mut().cast(),
                    workspace: workspace.ptr_mut().cast(),
                    num_rows: t as u32,
                    vocab: vocab as u32,
                };
                b.dev.launch(b.dev.kernels().row_stats, &params)?;
                let got = b.read(DType::F32, &stats, (t - 1) * 7 + 1, 5)?;
                let row = logits.floats((t - 1) * vocab, vocab);
                let s = oracle::row_stats(&row);
                let want = [f64::from(row[s.argmax]), s.lse, s.entropy, s.top1, s.margin];
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().row_stats, &params))?;
                let error = error(&got, &want);
                Ok(Measured { bytes: 4 * t * vocab, flops: 0, error, tolerance: 1e-5, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: t vocab 4
pub(super) fn sample(b: &mut Bench) -> anyhow::Result<()> {
    let greedy = SamplingParams::default();
    let drawn = SamplingParams { temperature: 0.8, top_k: 50, top_p: 0.95, min_p: 0.01, seed: 5, ..greedy.clone() };
    for (model, m) in b.models()? {
        let vocab = m.vocab_size;
        for &t in b.sizes(&[8, 64], &[3]) {
            for (name, p) in [("greedy", &greedy), ("top-k 50, top-p 0.95", &drawn)] {
                b.case("sample", format!("{model} {t} x {vocab}, {name}"), DType::F32, |b| {
                    let mut logits = b.noise(DType::F32, t * vocab)?;
                    let key = |row: usize| DrawKey { path: row as u64 * 77, position: 1000 };
                    let rows: Vec<rksc_sample_row> = (0..t)
                        .map(|row| rksc_sample_row {
                            seed: p.seed,
                            path: key(row).path,
                            position: key(row).position,
                            temperature: p.temperature,
                            top_p: p.top_p,
                            min_p: p.min_p,
                            repetition_penalty: p.repetition_penalty,
                            top_k: p.top_k,
                            ..Default::default()
                        })
                        .collect();
                    let (row_buf, history) = (b.dev.buffer(&rows)?, b.dev.buffer(&[0u32])?);
                    let mut sampled = b.results(t * size_of::<rksc_sampled>())?;
                    let params = rksc_sample_params {
                        logits: logits.ptr_mut(0).cast(),
                        rows: row_buf.ptr(),
                        history: history.ptr(),
                        saved: std::ptr::null_mut(),
                        sampled: sampled.ptr_mut().cast(),
                        num_rows: t as u32,
                        vocab: vocab as u32,
                    };
                    b.dev.launch(b.dev.kernels().sample, &params)?;
                    let found = b.dev.to_vec(&sampled)?;
                    let token = |row: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| found[8 * row + i]));
                    let wrong = (0..t.min(8)).filter(|&row| {
                        let request = Request { params: p, prompt: &[], generated: &[], bias: &[], key: key(row) };
                        sample_oracle(&logits.floats(row * vocab, vocab), &request) != token(row)
                    });
                    // The share of wrong tokens.
                    let error = wrong.count() as f64 / t.min(8) as f64;
                    let times = b.time(1, |dev, _| dev.launch(dev.kernels().sample, &params))?;
                    Ok(Measured { bytes: 4 * t * vocab, flops: 0, error, tolerance: 0.0, times })
                })?;
            }
        }
    }
    Ok(())
}

/// bytes: t (Hq + 2 Hkv) D (4 read, 2 written)
pub(super) fn rope_append(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let (hq, hkv, dim) = (m.num_q_heads, m.num_kv_heads, m.head_dim);
        for &t in b.sizes(&[1, 8, 1024], &[3]) {
            b.case("rope_append", format!("{model} {t} x {hq}/{hkv} heads of {dim}"), COMPUTE, |b| {
                let width = (hq + 2 * hkv) * dim;
                let layout = layout(hkv, dim, t.div_ceil(16));
                let cache_len = layout.num_blocks * layout.block_elems();
                let qkv = b.noise(DType::F32, t * width)?;
                let (mut q, mut k) = (b.results(2 * t * hq * dim)?, b.results(2 * cache_len)?);
                let mut v = b.results(2 * cache_len)?;
                let ids = b.dev.buffer(&(0..t as u32).collect::<Vec<u32>>())?;
                let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / dim as f32)).collect();
                let inv_freq_buf = b.dev.buffer(&inv_freq)?;
                let params = rksc_rope_append_params {
                    qkv: qkv.ptr(0).cast(),
                    q: q.ptr_mut().cast(),
                    query_ring: std::ptr::null_mut(),
                    k_cache: k.ptr_mut().cast(),
                    v_cache: v.ptr_mut().cast(),
                    positions: ids.ptr(),
                    slots: ids.ptr(),
                    ring_rows: std::ptr::null(),
                    inv_freq: inv_freq_buf.ptr(),
                    q_norm: std::ptr::null(),
                    k_norm: std::ptr::null(),
                    num_rows: t as u32,
                    num_q_heads: hq as u32,
                    num_kv_heads: hkv as u32,
                    head_dim: dim as u32,
                    rotary_dim: dim as u32,
                    block_size: layout.block_size as u32,
                    dtype: COMPUTE as u32,
                    norm_span: RKSC_NORM_HEAD,
                    rope_scale: 1.0,
                    norm_eps: 0.0,
                };
                b.dev.launch(b.dev.kernels().rope_append, &params)?;
                // The last row's first query head, last key head and last value head.
                let row = (t - 1) * width;
                let rope = |at: usize| oracle::rope(&qkv.wide(at, dim), t as u32 - 1, &inv_freq, 1.0);
                let slot = layout.elem((t - 1) / 16, hkv - 1, (t - 1) % 16);
                let mut got = b.read(COMPUTE, &q, (t - 1) * hq * dim, dim)?;
                got.extend(b.read(COMPUTE, &k, slot, dim)?);
                got.extend(b.read(COMPUTE, &v, slot, dim)?);
                let mut want = rope(row);
                want.extend(rope(row + (hq + hkv - 1) * dim));
                want.extend(qkv.wide(row + width - dim, dim));
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().rope_append, &params))?;
                let error = error(&got, &rounded(&want));
                Ok(Measured { bytes: t * width * 6, flops: 0, error, tolerance: ROUNDED, times })
            })?;
        }
    }
    Ok(())
}

pub(super) fn layout(num_kv_heads: usize, head_dim: usize, num_blocks: usize) -> KvLayout {
    KvLayout { num_blocks, num_kv_heads, block_size: 16, head_dim, dtype: COMPUTE }
}

/// bytes: K and V, each slot Hkv D 2 read and written
pub(super) fn kv_copy_blocks(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        for &n in b.sizes(&[8, 64], &[3]) {
            b.case("kv_copy_blocks", format!("{model} {n} blocks of 15 slots"), COMPUTE, |b| {
                let layout = layout(m.num_kv_heads, m.head_dim, 2 * n);
                let cache_len = layout.num_blocks * layout.block_elems();
                let (mut k, mut v) = (b.noise(COMPUTE, cache_len)?, b.noise(COMPUTE, cache_len)?);
                let copies: Vec<rksc_block_copy> = (0..n as u32)
                    .map(|i| rksc_block_copy { src: i, dst: n as u32 + (i + 1) % n as u32, num_slots: 15 })
                    .collect();
                let copy_buf = b.dev.buffer(&copies)?;
                let params = rksc_kv_copy_blocks_params {
                    copies: copy_buf.ptr(),
                    k_cache: k.ptr_mut(0),
                    v_cache: v.ptr_mut(0),
                    num_copies: n as u32,
                    num_kv_heads: m.num_kv_heads as u32,
                    block_size: layout.block_size as u32,
                    head_dim: m.head_dim as u32,
                    dtype: COMPUTE as u32,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().kv_copy_blocks, &params)?;
                let (head, last) = (m.num_kv_heads - 1, copies[n - 1]);
                let len = 15 * m.head_dim;
                let [to, from] = [last.dst, last.src].map(|block| layout.elem(block as usize, head, 0));
                let mut got = b.read(COMPUTE, &k.memory, to, len)?;
                got.extend(b.read(COMPUTE, &v.memory, to, len)?);
                let want = [k.wide(from, len), v.wide(from, len)].concat();
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().kv_copy_blocks, &params))?;
                let bytes = 2 * 2 * n * 15 * m.num_kv_heads * m.head_dim * 2;
                Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: 0.0, times })
            })?;
        }
    }
    Ok(())
}

/// bytes: K and V, each slot Hkv D 2 read and written; the tokens of one prompt or of eight
pub(super) fn kv_transfer(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        for &n in b.sizes(&[64, 512], &[3]) {
            b.case("kv_transfer", format!("{model} {n} slots"), COMPUTE, |b| {
                let layout = layout(m.num_kv_heads, m.head_dim, 2 * n.div_ceil(16));
                let cache_len = layout.num_blocks * layout.block_elems();
                let (mut k, mut v) = (b.noise(COMPUTE, cache_len)?, b.noise(COMPUTE, cache_len)?);
                let first = (layout.num_blocks / 2 * 16) as u32;
                let transfers: Vec<rksc_slot_transfer> =
                    (0..n as u32).map(|i| rksc_slot_transfer { src: i, dst: first + i, shift: 3 + i as i32 }).collect();
                let inv_freq = m.rope.inv_freq(m.max_position_embeddings);
                let (list, freqs) = (b.dev.buffer(&transfers)?, b.dev.buffer(&inv_freq)?);
                let params = rksc_kv_transfer_params {
                    transfers: list.ptr(),
                    k_cache: k.ptr_mut(0),
                    v_cache: v.ptr_mut(0),
                    inv_freq: freqs.ptr(),
                    num_transfers: n as u32,
                    num_kv_heads: m.num_kv_heads as u32,
                    block_size: layout.block_size as u32,
                    head_dim: m.head_dim as u32,
                    rotary_dim: m.head_dim as u32,
                    dtype: COMPUTE as u32,
                };
                b.dev.launch(b.dev.kernels().kv_transfer, &params)?;
                let (head, last) = (m.num_kv_heads - 1, transfers[n - 1]);
                let [to, from] =
                    [last.dst, last.src].map(|slot| layout.elem(slot as usize / 16, head, slot as usize % 16));
                let mut got = b.read(COMPUTE, &k.memory, to, m.head_dim)?;
                got.extend(b.read(COMPUTE, &v.memory, to, m.head_dim)?);
                let turned = rounded(&oracle::turn(&k.wide(from, m.head_dim), last.shift, &inv_freq));
                let want = [turned, v.wide(from, m.head_dim)].concat();
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().kv_transfer, &params))?;
                let bytes = 2 * 2 * n * m.num_kv_heads * m.head_dim * 2;
                Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: ROUNDED, times })
            })?;
        }
    }
    Ok(())
}

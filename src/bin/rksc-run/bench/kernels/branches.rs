//! Ops on branches and their caches: `branch_similarity`, `kv_scores`, `kv_compact`.

use rksc::DType;
use rksc::backend::RkvVariant;
use rksc::backend::cuda::bindings::*;
use rksc::testing::branch_similarity::{branch_similarity as similarity_oracle, layer_weights};
use rksc::testing::fill::Fill;
use rksc::testing::kv_scores::{Head, kv_scores as scores_oracle};

use super::harness::{Bench, COMPUTE};
use super::report::{Measured, error};
use super::rows::layout;

/// bytes: states and root 4 layers (branches + 1) hidden
pub(super) fn branch_similarity(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let (layers, hidden) = (m.num_layers + 1, m.hidden);
        for &n in b.sizes(&[8, 64], &[3]) {
            b.case("branch_similarity", format!("{model} {n} branches x {layers} x {hidden}"), DType::F32, |b| {
                let states = b.noise(DType::F32, layers * n * hidden)?;
                let root = b.noise(DType::F32, layers * hidden)?;
                let weights: Vec<f32> = layer_weights(1.5, layers).iter().map(|&w| w as f32).collect();
                let weight_buf = b.dev.buffer(&weights)?;
                let (mut to_root, mut pairwise) = (b.results(4 * n)?, b.results(4 * n * n)?);
                let (mut above, mut labels) = (b.results(4 * n)?, b.results(4 * n)?);
                let bytes = b.dev.kernels().branch_similarity_workspace_bytes(layers, n);
                let mut workspace = b.dev.zeroed::<u8>(bytes)?;
                let params = rksc_branch_similarity_params {
                    states: states.ptr(0).cast(),
                    root: root.ptr(0).cast(),
                    layer_weights: weight_buf.ptr(),
                    to_root: to_root.ptr_mut().cast(),
                    pairwise: pairwise.ptr_mut().cast(),
                    above: above.ptr_mut().cast(),
                    labels: labels.ptr_mut().cast(),
                    workspace: workspace.ptr_mut().cast(),
                    num_layers: layers as u32,
                    num_branches: n as u32,
                    hidden: hidden as u32,
                    tau: 0.9,
                };
                b.dev.launch(b.dev.kernels().branch_similarity, &params)?;
                let mut got = b.read(DType::F32, &to_root, 0, n)?;
                got.extend(b.read(DType::F32, &pairwise, 0, n * n)?);
                let (all, roots) = (states.floats(0, layers * n * hidden), root.floats(0, layers * hidden));
                let want = similarity_oracle(&all, &roots, &weights, hidden);
                let want = [want.to_root, want.pairwise].concat();
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().branch_similarity, &params))?;
                let bytes = 4 * layers * (n + 1) * hidden;
                Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: 1e-5, times })
            })?;
        }
    }
    Ok(())
}

/// Keys of which no two are similar: the search for the newest similar key goes all the way.
/// bytes: K, 2 n Hkv D; arithmetic: the cosine of every pair once, n^2 Hkv D
pub(super) fn kv_scores(b: &mut Bench) -> anyhow::Result<()> {
    const WINDOW: usize = 8;
    for (model, m) in b.models()? {
        let (hq, hkv, dim) = (m.num_q_heads, m.num_kv_heads, m.head_dim);
        for &n in b.sizes(&[512, 5120], &[100]) {
            b.case("kv_scores", format!("{model} n={n} window={WINDOW}"), COMPUTE, |b| {
                let layout = layout(hkv, dim, n.div_ceil(16));
                let len = layout.num_blocks * layout.block_elems();
                let copies = b.copies(2 * len);
                let k = b.noise(COMPUTE, copies * len)?;
                let queries = b.noise(COMPUTE, WINDOW * hq * dim)?;
                let table = Fill::new(3).shuffled(layout.num_blocks);
                let blocks = b.dev.buffer(&table)?;
                let mut scores = b.results(4 * hkv * (n - WINDOW))?;
                let bytes = b.dev.kernels().kv_scores_workspace_bytes(n, WINDOW, hq, hkv, dim);
                let mut workspace = b.dev.alloc::<u8>(bytes)?;
                let params = rksc_kv_scores_params {
                    queries: queries.ptr(0),
                    k_cache: k.ptr(0),
                    blocks: blocks.ptr(),
                    positions: std::ptr::null(),
                    scores: scores.ptr_mut().cast(),
                    importance: std::ptr::null_mut(),
                    redundancy: std::ptr::null_mut(),
                    workspace: workspace.ptr_mut().cast(),
                    num_slots: n as u32,
                    window: WINDOW as u32,
                    num_queries: WINDOW as u32,
                    pool_size: 7,
                    variant: RKSC_KV_CODE,
                    num_q_heads: hq as u32,
                    num_kv_heads: hkv as u32,
                    head_dim: dim as u32,
                    block_size: 16,
                    dtype: COMPUTE as u32,
                    sm_scale: 1.0 / (dim as f32).sqrt(),
                    lambda: 0.1,
                    threshold: 0.95,
                    position_stride: 0,
                    softcap: 0.0,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().kv_scores, &params)?;
                // The last kv head.
                let (head, group) = (hkv - 1, hq / hkv);
                let got = b.read(DType::F32, &scores, head * (n - WINDOW), n - WINDOW)?;
                let keys: Vec<f64> = (0..n)
                    .flat_map(|slot| k.wide(layout.elem(table[slot / 16] as usize, head, slot % 16), dim))
                    .collect();
                let row = |w: usize| queries.wide((w * hq + head * group) * dim, group * dim);
                let want = scores_oracle(&Head {
                    queries: &(0..WINDOW).flat_map(row).collect::<Vec<f64>>(),
                    keys: &keys,
                    positions: None,
                    head_dim: dim,
                    group,
                    window: WINDOW,
                    pool_size: 7,
                    variant: RkvVariant::Code,
                    sm_scale: f64::from(params.sm_scale),
                    softcap: None,
                    lambda: f64::from(params.lambda),
                    threshold: f64::from(params.threshold),
                });
                let times = b.time(copies, |dev, set| {
                    let params = rksc_kv_scores_params { k_cache: k.ptr(set * len), ..params };
                    dev.launch(dev.kernels().kv_scores, &params)
                })?;
                let error = error(&got, &want.scores);
                Ok(Measured { bytes: 2 * len, flops: n * n * hkv * dim, error, tolerance: 1e-4, times })
            })?;
        }
    }
    Ok(())
}

/// Every other slot moves down.
/// bytes: K and V, each kept slot Hkv D 2 read and written
pub(super) fn kv_compact(b: &mut Bench) -> anyhow::Result<()> {
    for (model, m) in b.models()? {
        let (hkv, dim) = (m.num_kv_heads, m.head_dim);
        for &n in b.sizes(&[1024, 8192], &[100]) {
            b.case("kv_compact", format!("{model} {} of {n} slots", n / 2), COMPUTE, |b| {
                let layout = layout(hkv, dim, n.div_ceil(16));
                let len = layout.num_blocks * layout.block_elems();
                let copies = b.copies(4 * len);
                let (mut k, mut v) = (b.noise(COMPUTE, copies * len)?, b.noise(COMPUTE, copies * len)?);
                let table = Fill::new(3).shuffled(layout.num_blocks);
                let blocks = b.dev.buffer(&table)?;
                let keep: Vec<u32> = (0..hkv).flat_map(|_| (0..n as u32 / 2).map(|i| 2 * i + 1)).collect();
                let keep_buf = b.dev.buffer(&keep)?;
                let (k_base, v_base) = (k.ptr_mut(0), v.ptr_mut(0));
                let params = rksc_kv_compact_params {
                    k_cache: k_base,
                    v_cache: v_base,
                    positions: std::ptr::null_mut(),
                    blocks: blocks.ptr(),
                    keep: keep_buf.ptr(),
                    num_keep: (n / 2) as u32,
                    first_slot: 0,
                    capacity: n as u32,
                    num_kv_heads: hkv as u32,
                    head_dim: dim as u32,
                    block_size: 16,
                    dtype: COMPUTE as u32,
                    reserved: 0,
                };
                b.dev.launch(b.dev.kernels().kv_compact, &params)?;
                // The last kv head's first, middle and last kept slot.
                let (mut got, mut want) = (Vec::new(), Vec::new());
                for i in [0, n / 4, n / 2 - 1] {
                    let elem = |slot: usize| layout.elem(table[slot / 16] as usize, hkv - 1, slot % 16);
                    for cache in [&k, &v] {
                        got.extend(b.read(COMPUTE, &cache.memory, elem(i), dim)?);
                        want.extend(cache.wide(elem(2 * i + 1), dim));
                    }
                }
                let times = b.time(copies, |dev, set| {
                    let [k_cache, v_cache] = [k_base, v_base].map(|p| p.wrapping_byte_add(2 * set * len));
                    dev.launch(dev.kernels().kv_compact, &rksc_kv_compact_params { k_cache, v_cache, ..params })
                })?;
                let bytes = 2 * 2 * (n / 2) * hkv * dim * 2;
                Ok(Measured { bytes, flops: 0, error: error(&got, &want), tolerance: 0.0, times })
            })?;
        }
    }
    Ok(())
}

//! The ops that compress a cache.

use anyhow::ensure;
use rksc::DType;
use rksc::backend::cpu::roof::random_buf;
use rksc::backend::cpu::{Cpu, CpuBuf};
use rksc::backend::{Backend, KvCompact, KvScores, RkvVariant};
use rksc::testing::fill::Fill;
use rksc::testing::kv_scores::{Head, kv_scores as scores_oracle};

use super::{COMPUTE, HEADS, Harness, layout, wide};

/// Budget and buffer: slots of a sequence when it is compressed.
const SLOTS: usize = 1024 + 128;
const WINDOW: usize = 8;

/// Without similar keys, where the search for the newest one goes all the way; where half of all keys are similar, and it
/// ends in the first panel; and without redundancy.
/// bytes: K, 2 n Hkv D; arithmetic: the cosine of every pair once, n^2 Hkv D, and the queries, 2 window n Hq D
pub(super) fn kv_scores(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("kv_scores") {
        return Ok(());
    }
    let (hq, hkv, dim, n) = (HEADS.q, HEADS.kv, HEADS.dim, SLOTS);
    let layout = layout(HEADS, n / 16);
    let k_cache = random_buf(layout.num_blocks * layout.block_elems(), COMPUTE, 1);
    let queries = random_buf(WINDOW * hq * dim, COMPUTE, 2);
    let blocks = Fill::new(3).shuffled(layout.num_blocks);
    let (len, sm_scale) = (n - WINDOW, 1.0 / (dim as f32).sqrt());
    for (what, lambda, threshold) in [("none similar", 0.1, 0.95), ("half similar", 0.1, 0.0), ("lambda 1", 1.0, 0.5)] {
        let run = |cpu: &mut Cpu, scores: &mut CpuBuf| {
            cpu.kv_scores(KvScores {
                queries: &queries,
                query_rows: 0..WINDOW,
                k_cache: &k_cache,
                blocks: &blocks,
                num_slots: n,
                window: WINDOW,
                pool_size: 7,
                variant: RkvVariant::Code,
                lambda,
                threshold,
                num_q_heads: hq,
                sm_scale,
                softcap: None,
                layout: &layout,
                scores,
                scores_start: 0,
            })
        };
        let mut scores = h.cpu.alloc(DType::F32, hkv * len)?;
        run(&mut h.cpu, &mut scores)?;
        // The last kv head.
        let (head, group) = (hkv - 1, hq / hkv);
        let key = |slot: usize| layout.elem(blocks[slot / 16] as usize, head, slot % 16);
        let keys: Vec<f64> = (0..n).map(key).flat_map(|at| wide(&k_cache, at..at + dim)).collect();
        let row = |j: usize| (j * hq + head * group) * dim;
        let want = scores_oracle(&Head {
            queries: &(0..WINDOW).map(row).flat_map(|at| wide(&queries, at..at + group * dim)).collect::<Vec<f64>>(),
            keys: &keys,
            positions: None,
            head_dim: dim,
            group,
            window: WINDOW,
            pool_size: 7,
            variant: RkvVariant::Code,
            sm_scale: f64::from(sm_scale),
            softcap: None,
            lambda: f64::from(lambda),
            threshold: f64::from(threshold),
        });
        let off = wide(&scores, head * len..hkv * len).into_iter().zip(&want.scores).map(|(g, w)| (g - w).abs());
        ensure!(off.fold(0.0, f64::max) < 1e-5, "kv_scores: a slot differs");
        let pairs = if lambda == 1.0 { 0 } else { n * n * hkv * dim };
        let work = (2 * n * hkv * dim, pairs + 2 * WINDOW * n * hq * dim);
        h.time("kv_scores", format!("{n} slots, {what}"), work, |cpu, _| run(cpu, &mut scores))?;
    }
    Ok(())
}

/// bytes: K and V, each kept slot that moves Hkv * D * 2 read and written
pub(super) fn kv_compact(h: &mut Harness) -> anyhow::Result<()> {
    if !h.wants("kv_compact") {
        return Ok(());
    }
    let (hkv, dim, n) = (HEADS.kv, HEADS.dim, SLOTS);
    let layout = layout(HEADS, n / 16);
    let len = layout.num_blocks * layout.block_elems();
    let (mut k_cache, mut v_cache) = (random_buf(len, COMPUTE, 1), random_buf(len, COMPUTE, 2));
    let blocks = Fill::new(3).shuffled(layout.num_blocks);
    // All but every ninth: 128 of 1152 go.
    let keep: Vec<u32> = (0..n as u32).filter(|slot| slot % 9 != 0).collect();
    let before = wide(&k_cache, 0..len);
    let (lists, first_slot) = (keep.repeat(hkv), 0);
    let mut run = |cpu: &mut Cpu, k_cache: &mut CpuBuf| {
        let (v_cache, blocks, keep, layout) = (&mut v_cache, &blocks, &lists, &layout);
        cpu.kv_compact(KvCompact { k_cache, v_cache, blocks, keep, first_slot, layout })
    };
    run(&mut h.cpu, &mut k_cache)?;
    let elem = |slot: usize| layout.elem(blocks[slot / 16] as usize, hkv - 1, slot % 16);
    for (to, &from) in keep.iter().enumerate() {
        let (to, from) = (elem(to), elem(from as usize));
        ensure!(wide(&k_cache, to..to + dim) == before[from..from + dim], "kv_compact: a row differs");
    }
    let bytes = 2 * 2 * keep.len() * hkv * dim * 2;
    let shape = format!("{} of {n} slots", keep.len());
    h.time("kv_compact", shape, (bytes, 0), |cpu, _| run(cpu, &mut k_cache))?;
    Ok(())
}

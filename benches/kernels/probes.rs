//! The ops that gates and eviction ask with.

use anyhow::ensure;
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::roof::{random_buf, random_matrix};
use rksc::backend::{
    AttentionMass, Backend, BranchSimilarity, EntropyProbe, MassSequence, PagedAttention, PassInputs, RowStats,
    Similarity,
};
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::testing::attention::attention_mass as mass_oracle;
use rksc::testing::branch_similarity::branch_similarity as similarity_oracle;
use rksc::testing::entropy_probe::entropy_probe as entropy_oracle;
use rksc::testing::oracle::Scoring;
use rksc::{DType, gate};

use super::{COMPUTE, HIDDEN, Harness, Heads, ROTATE_BYTES, VOCAB, f32s, layout, wide};

fn narrow(x: Vec<f64>) -> Vec<f32> {
    x.into_iter().map(|x| x as f32).collect()
}

/// bytes: w once, 2 * outputs * hidden, and x, 4 * t * hidden
pub(super) fn entropy_probe(h: &mut Harness) -> anyhow::Result<()> {
    const TINY: (usize, usize) = (192, 768);
    let pair: &[u32] = &[7, 401];
    for ((hidden, vocab), rows, candidates) in [
        (TINY, 8, None),
        (TINY, 8, Some(pair)),
        (TINY, 64, None),
        ((HIDDEN, VOCAB), 8, None),
        ((HIDDEN, VOCAB), 64, None),
        ((HIDDEN, VOCAB), 8, Some(pair)),
    ] {
        if !h.wants("entropy_probe") {
            return Ok(());
        }
        let copies =
            if candidates.is_none() && vocab == VOCAB { ROTATE_BYTES.div_ceil(2 * hidden * vocab) + 1 } else { 1 };
        let w: Vec<_> =
            (0..copies).map(|i| random_matrix(vocab, hidden, COMPUTE, i as u64)).collect::<Result<_, _>>()?;
        let (x, norm) = (f32s(rows * hidden, 1), f32s(hidden, 2));
        let mut stats = vec![RowStats::default(); rows];
        let run = |cpu: &mut Cpu, call: usize, stats: &mut Vec<RowStats>| {
            let w = &w[call % copies];
            let probe = EntropyProbe { x: &x, num_rows: rows, norm: Some(&norm), eps: 1e-6, w, candidates, hidden };
            cpu.entropy_probe(probe)?;
            cpu.read_stats(stats)
        };
        run(&mut h.cpu, 0, &mut stats)?;
        let ids: Vec<u32> = candidates.map_or_else(|| (0..vocab as u32).collect(), <[u32]>::to_vec);
        let mut outputs = vec![0.0; ids.len() * hidden];
        for (row, &id) in outputs.chunks_mut(hidden).zip(&ids) {
            w[0].widen_row(id as usize, row)?;
        }
        let outputs: Vec<f64> = outputs.into_iter().map(f64::from).collect();
        let (last, weight) = (narrow(wide(&x, (rows - 1) * hidden..rows * hidden)), narrow(wide(&norm, 0..hidden)));
        let want = entropy_oracle(COMPUTE, &last, Some((&weight, 1e-6)), &outputs).stats;
        let got = stats[rows - 1];
        let off = (f64::from(got.entropy) - want.entropy).abs();
        ensure!(got.finite == 1 && off < 2e-2, "entropy_probe: got {got:?}, want {want:?}");
        let what = candidates.map_or(String::new(), |c| format!(", {} of them", c.len()));
        let bytes = 2 * ids.len() * hidden + 4 * rows * hidden;
        let shape = format!("{rows} x {hidden} x {vocab}{what}");
        let arithmetic = 2 * rows * hidden * ids.len();
        h.time("entropy_probe", shape, (bytes, arithmetic), |cpu, call| run(cpu, call, &mut stats))?;
    }
    Ok(())
}

/// bytes: states and root, 4 * layers * (branches + 1) * hidden
pub(super) fn branch_similarity(h: &mut Harness) -> anyhow::Result<()> {
    for (num_layers, num_branches, hidden) in [(4, 8, 192), (24, 8, HIDDEN), (24, 64, HIDDEN)] {
        if !h.wants("branch_similarity") {
            return Ok(());
        }
        let (states, root) = (f32s(num_layers * num_branches * hidden, 1), f32s(num_layers * hidden, 2));
        let layers: Vec<u32> = (1..=num_layers as u32).collect();
        let layer_weights = &gate::layer_weights(1.5, &layers, num_layers);
        let mut similarity = Similarity::default();
        let run = |cpu: &mut Cpu, similarity: &mut Similarity| {
            let (states, root, tau) = (&states, &root, 0.9);
            cpu.branch_similarity(BranchSimilarity {
                states,
                root,
                layer_weights,
                num_branches,
                hidden,
                tau,
                similarity,
            })
        };
        run(&mut h.cpu, &mut similarity)?;
        let all = narrow(wide(&states, 0..num_layers * num_branches * hidden));
        let want = similarity_oracle(&all, &narrow(wide(&root, 0..num_layers * hidden)), layer_weights, hidden);
        let off = similarity.pairwise.iter().zip(&want.pairwise).map(|(g, w)| (f64::from(*g) - w).abs());
        ensure!(off.fold(0.0, f64::max) < 1e-5, "branch_similarity: pairwise differs");
        let bytes = 4 * num_layers * (num_branches + 1) * hidden;
        let products = num_layers * hidden * (num_branches + 1) * (num_branches + 2) / 2;
        let shape = format!("{num_branches} branches x {num_layers} x {hidden}");
        h.time("branch_similarity", shape, (bytes, 2 * products), |cpu, _| run(cpu, &mut similarity))?;
    }
    Ok(())
}

/// bytes: K of every sequence, 2 * slots * Hkv * D, and q
pub(super) fn attention_mass(h: &mut Harness, heads: Heads) -> anyhow::Result<()> {
    if !h.wants("attention_mass") {
        return Ok(());
    }
    let (branches, kv_len) = (8, 1072);
    let Heads { q: hq, kv: hkv, dim, .. } = heads;
    let of_branch = kv_len / 16;
    let layout = layout(heads, branches * of_branch);
    let len = layout.num_blocks * layout.block_elems();
    let (k_cache, v_cache) = (random_buf(len, COMPUTE, 1), random_buf(len, COMPUTE, 2));
    let (q, sm_scale) = (random_buf(branches * hq * dim, COMPUTE, 3), 1.0 / (dim as f32).sqrt());
    let blocks: Vec<u32> = (0..layout.num_blocks as u32).rev().collect();
    let sequences: Vec<MassSequence> =
        (0..branches).map(|b| MassSequence { rows: b..b + 1, block_start: b * of_branch, kv_len }).collect();
    let views: Vec<SequenceView<'_>> = sequences
        .iter()
        .map(|s| SequenceView {
            rows: s.rows.clone(),
            blocks: &blocks[s.block_start..s.block_start + of_branch],
            kv_len,
        })
        .collect();
    let inputs = &PassInputs { plan: AttentionPlan::new(&views, 16, super::MAX_GROUP_ROWS), ..Default::default() };
    let (mut o, mut lse) = (h.cpu.alloc(COMPUTE, branches * hq * dim)?, h.cpu.alloc(DType::F32, branches * hq)?);
    h.cpu.paged_attention(PagedAttention {
        inputs,
        q: &q,
        k_cache: &k_cache,
        v_cache: &v_cache,
        o: &mut o,
        lse: &mut lse,
        num_q_heads: hq,
        sm_scale,
        window: None,
        softcap: None,
        layout: &layout,
    })?;
    let run = |cpu: &mut Cpu, mass: &mut Vec<f32>| {
        cpu.attention_mass(AttentionMass {
            q: &q,
            k_cache: &k_cache,
            lse: &lse,
            blocks: &blocks,
            sequences: &sequences,
            num_q_heads: hq,
            sm_scale,
            window: None,
            softcap: None,
            layout: &layout,
            mass,
        })
    };
    let mut mass = Vec::new();
    run(&mut h.cpu, &mut mass)?;
    // The last branch's last kv head.
    let (row, head, group) = (branches - 1, hkv - 1, hq / hkv);
    let keys: Vec<Vec<f64>> = (0..kv_len)
        .map(|slot| layout.elem(blocks[row * of_branch + slot / 16] as usize, head, slot % 16))
        .map(|at| wide(&k_cache, at..at + dim))
        .collect();
    let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
    let at = |i: usize| row * hq + head * group + i;
    let queries: Vec<(Vec<f64>, f64)> =
        (0..group).map(|i| (wide(&q, at(i) * dim..(at(i) + 1) * dim), wide(&lse, at(i)..at(i) + 1)[0])).collect();
    let queries: Vec<_> = queries.iter().map(|(q, lse)| (q.as_slice(), *lse, kv_len)).collect();
    let want = mass_oracle(&queries, &keys, &Scoring::plain(f64::from(sm_scale)));
    let off = mass[mass.len() - kv_len..].iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).abs());
    ensure!(off.fold(0.0, f64::max) < 1e-4, "attention_mass: a slot differs");
    let bytes = 2 * branches * kv_len * hkv * dim + 2 * branches * hq * dim;
    let shape = format!("decode {branches} x {kv_len}, {}", heads.name);
    h.time("attention_mass", shape, (bytes, 2 * branches * kv_len * hq * dim), |cpu, _| run(cpu, &mut mass))?;
    Ok(())
}

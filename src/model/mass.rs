//! The attention that slots receive in a pass: by block for the eviction that asks for it, by slot for a KV budget.

use super::Workspace;
use super::family::ModelConfig;
use super::live::LiveRows;
use crate::backend::{AttentionMass, Backend, MassSequence};
use crate::batch::Batch;
use crate::error::Result;
use crate::kv::KvLayout;

/// The one layer it is measured at: a middle one. The first attend to what is near, the last to few slots.
pub(super) fn layer(config: &ModelConfig) -> usize {
    config.num_layers / 2
}

/// Right behind the layer's `paged_attention`, whose q and lse it takes from `ws`: for each entry of the batch's
/// `blocks`, the attention of its sequence's last row, summed over the block's slots and all heads. Each live sequence
/// sums to the number of query heads; one that has left the pass has zeros.
pub(super) fn measure<B: Backend>(
    backend: &mut B,
    ws: &Workspace<B>,
    k_cache: &B::Buf,
    (config, layout): (&ModelConfig, &KvLayout),
    (batch, live): (&Batch, &LiveRows),
) -> Result<Vec<f32>> {
    let sequences: Vec<MassSequence> = (0..live.num_seqs())
        .map(|i| {
            let (row, seq) = (live.last_row(i), &batch.seqs[live.seq_of(i)]);
            MassSequence { rows: row..row + 1, block_start: seq.blocks.start, kv_len: seq.kv_len }
        })
        .collect();
    let window = config.window(layer(config));
    let slots = received(backend, ws, k_cache, (config, layout, window), (batch, &sequences))?;
    let mut mass = vec![0.0; batch.blocks.len()];
    let mut heads = slots.as_slice();
    for seq in &sequences {
        for _ in 0..layout.num_kv_heads {
            let (head, rest) = heads.split_at(seq.kv_len.min(heads.len()));
            heads = rest;
            for (sum, slots) in mass[seq.block_start..].iter_mut().zip(head.chunks(layout.block_size)) {
                *sum += slots.iter().sum::<f32>();
            }
        }
    }
    Ok(mass)
}

/// Adds to `given` of every sequence that asks for it what its slots were given by its rows in this layer,
/// `[kv heads, kv_len]`.
pub(super) fn accumulate<B: Backend>(
    backend: &mut B,
    ws: &Workspace<B>,
    k_cache: &B::Buf,
    (config, layout): (&ModelConfig, &KvLayout),
    (batch, live): (&Batch, &LiveRows),
    given: &mut [Vec<f32>],
) -> Result<()> {
    let (mut asking, mut sequences) = (Vec::new(), Vec::new());
    for i in 0..live.num_seqs() {
        let seq = &batch.seqs[live.seq_of(i)];
        let Some(from) = seq.accumulates_from else { continue };
        let last = live.last_row(i);
        asking.push(live.seq_of(i));
        let rows = (live.first_row(i) + from).min(last)..last + 1;
        sequences.push(MassSequence { rows, block_start: seq.blocks.start, kv_len: seq.kv_len });
    }
    if sequences.is_empty() {
        return Ok(());
    }
    // Models with windows take no KV budget.
    let slots = received(backend, ws, k_cache, (config, layout, None), (batch, &sequences))?;
    let mut rest = slots.as_slice();
    for (seq, view) in asking.into_iter().zip(&sequences) {
        let (own, others) = rest.split_at((layout.num_kv_heads * view.kv_len).min(rest.len()));
        given[seq].extend_from_slice(own);
        rest = others;
    }
    Ok(())
}

/// `[kv heads, kv_len]` of each sequence, one behind the other.
fn received<B: Backend>(
    backend: &mut B,
    ws: &Workspace<B>,
    k_cache: &B::Buf,
    (config, layout, window): (&ModelConfig, &KvLayout, Option<usize>),
    (batch, sequences): (&Batch, &[MassSequence]),
) -> Result<Vec<f32>> {
    let mut slots = Vec::new();
    backend.attention_mass(AttentionMass {
        q: &ws.q,
        k_cache,
        lse: &ws.lse,
        blocks: &batch.blocks,
        sequences,
        num_q_heads: config.num_q_heads,
        sm_scale: config.sm_scale,
        window,
        softcap: config.attn_softcap,
        layout,
        mass: &mut slots,
    })?;
    Ok(slots)
}

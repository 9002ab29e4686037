//! The ops that compress a cache: `kv_scores` and `kv_compact`.
//!
//! What they are asked, and how often, depends on what the host just decided, so neither is ever part of a recording.

use super::bindings::*;
use super::ops::code;
use super::{Cuda, grow, put};
use crate::backend::{KvCompact, KvScores, RkvVariant, checks};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// Queries that `kv_scores` holds in shared memory.
const MAX_QUERIES: usize = 64;
/// Slots up to which sums of cosines are exact.
const MAX_SLOTS: usize = 1 << 17;

impl Cuda {
    /// See [`KvScores`].
    pub(super) fn score_slots(&mut self, p: KvScores<'_, Self>) -> Result<()> {
        let op = "kv_scores";
        self.outside_recording(op)?;
        checks::kv_scores(&p)?;
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        let num_queries = p.query_rows.len();
        if num_queries > MAX_QUERIES || p.num_slots > MAX_SLOTS {
            let what = format!("{num_queries} queries, {} slots (it takes {MAX_QUERIES}, {MAX_SLOTS})", p.num_slots);
            return Err(Error::Unsupported { op: "kv_scores on a CUDA device", what });
        }
        self.launched().kv_read_bytes += (p.num_slots * num_kv_heads * head_dim * dtype.size_bytes()) as u64;
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let bytes =
            device.kernels().kv_scores_workspace_bytes(p.num_slots, num_queries, p.num_q_heads, num_kv_heads, head_dim);
        let workspace = grow(device, graphs, &mut scratch.kv_scores, bytes)?;
        let blocks = put(device, graphs, &mut scratch.kv_blocks, bytemuck::cast_slice(p.blocks))?;
        let q_width = p.num_q_heads * head_dim;
        let num_scores = num_kv_heads * (p.num_slots - p.window);
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let params = rksc_kv_scores_params {
            queries: p.queries.at(op, dtype, p.query_rows.start * q_width, num_queries * q_width)?.cast(),
            k_cache: p.k_cache.at(op, dtype, 0, cache_len)?.cast(),
            blocks: blocks.cast(),
            positions: std::ptr::null(),
            scores: p.scores.at_mut(op, DType::F32, p.scores_start, num_scores)?.cast(),
            importance: std::ptr::null_mut(),
            redundancy: std::ptr::null_mut(),
            workspace: workspace.cast(),
            num_slots: p.num_slots as u32,
            window: p.window as u32,
            num_queries: num_queries as u32,
            pool_size: p.pool_size as u32,
            variant: variant_code(p.variant),
            num_q_heads: p.num_q_heads as u32,
            num_kv_heads: num_kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            dtype: code(dtype),
            sm_scale: p.sm_scale,
            lambda: p.lambda,
            threshold: p.threshold,
            position_stride: 0,
            softcap: p.softcap.unwrap_or(0.0),
            reserved: 0,
        };
        self.launch(self.device.kernels().kv_scores, &params)
    }

    /// See [`KvCompact`].
    pub(super) fn compact_slots(&mut self, p: KvCompact<'_, Self>) -> Result<()> {
        let op = "kv_compact";
        self.outside_recording(op)?;
        let moved = checks::kv_compact(&p)?;
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        self.launched().kv_write_bytes += (2 * moved * head_dim * dtype.size_bytes()) as u64;
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let blocks = put(device, graphs, &mut scratch.kv_blocks, bytemuck::cast_slice(p.blocks))?;
        let keep = put(device, graphs, &mut scratch.kv_keep, bytemuck::cast_slice(p.keep))?;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let params = rksc_kv_compact_params {
            k_cache: p.k_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            v_cache: p.v_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            positions: std::ptr::null_mut(),
            blocks: blocks.cast(),
            keep: keep.cast(),
            num_keep: (p.keep.len() / num_kv_heads.max(1)) as u32,
            first_slot: p.first_slot as u32,
            capacity: (p.blocks.len() * block_size) as u32,
            num_kv_heads: num_kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            dtype: code(dtype),
            reserved: 0,
        };
        self.launch(self.device.kernels().kv_compact, &params)
    }
}

fn variant_code(variant: RkvVariant) -> u32 {
    match variant {
        RkvVariant::Code => RKSC_KV_CODE,
        RkvVariant::Text => RKSC_KV_TEXT,
        RkvVariant::Alg1 => RKSC_KV_ALG1,
    }
}

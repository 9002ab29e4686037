//! The ops: check lengths, fill params, launch, count.

use std::ops::Range;
use std::ptr::{null, null_mut};

use super::attention_items::ItemParams;
use super::bindings::*;
use super::graphs::{Mode, Shape};
use super::inputs::CudaInputs;
use super::{Cuda, CudaBuf, CudaMatrix, Heads, Padding, grow, put};
use crate::backend::{
    Activation, AddRmsNorm, AttentionMass, Backend, BranchSimilarity, Counters, Embed, EntropyProbe, ExitRows,
    ExitRule, GatherRows, Glu, KvCompact, KvCopyBlocks, KvScores, KvTransfer, Linear, NormOutput, NormSpan,
    PagedAttention, PassInputs, QkNorm, RopeAppend, RowIds, RowStats, RowStatsOp, Sample, SampleRow, Softcap, checks,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gate::Scope;
use crate::kv::KvLayout;
use crate::model::weights::Tensor;
use crate::quant::MatrixPart;

/// Share of the free memory that a KV cache takes: the rest is for scratch, graphs and the driver.
const KV_SHARE: (u64, u64) = (9, 10);
/// Unmerged attention rows there is scratch for: 64 branches split over every SM of a large GPU.
const MAX_PARTIALS: usize = 1 << 14;

pub(super) fn code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => RKSC_F32,
        DType::Bf16 => RKSC_BF16,
        DType::F16 => RKSC_F16,
    }
}

/// Of a window over slots: 0 is none, and no sequence has more than u32 counts.
pub(super) fn window_code(window: Option<usize>) -> u32 {
    window.map_or(0, |w| u32::try_from(w).unwrap_or(u32::MAX))
}

impl Backend for Cuda {
    type Buf = CudaBuf;
    type Matrix = CudaMatrix;
    type Inputs = CudaInputs;

    fn describe(&self) -> String {
        let info = self.device.info();
        let (major, minor) = info.compute_capability;
        format!("{}, {}, compute capability {major}.{minor}, {} SMs", info.device, info.name, info.num_sms)
    }

    fn max_group_rows(&self, gqa_group: usize) -> usize {
        ItemParams { gqa_group, ..self.item_params() }.max_group_rows()
    }

    fn kv_budget(&self, resident_bytes: u64) -> Option<u64> {
        let free = self.device.free_bytes().ok()?.saturating_sub(resident_bytes);
        Some(free / KV_SHARE.1 * KV_SHARE.0)
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<CudaBuf> {
        CudaBuf::new(&self.device, dtype, len)
    }

    fn matrix(&mut self, parts: &[MatrixPart], compute: DType) -> Result<CudaMatrix> {
        CudaMatrix::new(&mut self.device, parts, compute)
    }

    fn vector(&mut self, parts: &[Tensor]) -> Result<CudaBuf> {
        let mut buf = self.alloc(DType::F32, parts.iter().map(Tensor::num_elems).sum())?;
        let mut start = 0;
        for part in parts {
            let part = part.cast(DType::F32);
            self.device.upload(&mut buf.memory, start, part.bytes())?;
            start += part.bytes().len();
        }
        Ok(buf)
    }

    fn upload(&mut self, values: &[f32]) -> Result<CudaBuf> {
        let mut buf = self.alloc(DType::F32, values.len())?;
        self.device.upload(&mut buf.memory, 0, bytemuck::cast_slice(values))?;
        Ok(buf)
    }

    fn read_f32(&mut self, src: &CudaBuf, start: usize, dst: &mut [f32]) -> Result<()> {
        src.at("read_f32", DType::F32, start, dst.len())?;
        self.counters.read_backs += 1;
        self.device.download(&src.memory, 4 * start, bytemuck::cast_slice_mut(dst))
    }

    fn read_bytes(&mut self, src: &CudaBuf, start: usize, len: usize, dst: &mut Vec<u8>) -> Result<()> {
        src.at("read_bytes", src.dtype, start, len)?;
        let (size, old) = (src.dtype.size_bytes(), dst.len());
        dst.resize(old + len * size, 0);
        self.device.download(&src.memory, start * size, &mut dst[old..])
    }

    fn write_bytes(&mut self, dst: &mut CudaBuf, start: usize, len: usize, src: &[u8]) -> Result<usize> {
        dst.at("write_bytes", dst.dtype, start, len)?;
        let size = dst.dtype.size_bytes();
        let Some(src) = src.get(..len * size) else {
            let got = format!("{} bytes", src.len());
            return Err(Error::Shape { op: "write_bytes", expected: format!("{} bytes", len * size), got });
        };
        self.device.upload(&mut dst.memory, start * size, src)?;
        Ok(src.len())
    }

    fn stage(&mut self, inputs: PassInputs) -> Result<CudaInputs> {
        // What a pass that failed half-way left behind would take the upload for one of its own.
        if self.graphs.mode() == Mode::Record {
            self.graphs.abandon(&mut self.device)?;
        }
        let params = self.item_params();
        let (staged, moved) = self.inputs.stage(&mut self.device, inputs, &params)?;
        if moved {
            self.graphs.forget();
        }
        Ok(staged)
    }

    fn begin_pass(&mut self, inputs: &CudaInputs, repeatable: Option<u64>) -> Result<()> {
        // Of a pass that failed.
        self.routed.clear();
        // A recording holds no transfers: their number is part of no shape.
        let is_decode = repeatable.is_some() && inputs.num_transfers == 0 && inputs.num_rows == inputs.num_queries;
        self.padding = is_decode.then_some(Padding { num_rows: inputs.num_rows, rows: inputs.shape.rows });
        match is_decode {
            true => self.graphs.begin(&mut self.device, Shape { variant: repeatable.unwrap_or(0), ..inputs.shape }),
            false => self.graphs.abandon(&mut self.device),
        }
    }

    fn end_pass(&mut self) -> Result<()> {
        self.padding = None;
        self.counters.graph_replays += u64::from(self.graphs.mode() == Mode::Skip);
        self.graphs.end(&mut self.device)
    }

    fn read_stats(&mut self, stats: &mut [RowStats]) -> Result<()> {
        self.counters.read_backs += 1;
        let Some(found) = &self.scratch.stats else {
            return Err(Error::Internal("read_stats before row_stats or entropy_probe".into()));
        };
        self.device.download(found, 0, bytemuck::cast_slice_mut(stats))
    }

    fn read_route(&mut self, route: &CudaBuf, dst: &mut [f32]) -> Result<()> {
        self.read_f32(route, 0, dst)?;
        self.count_routed(dst);
        Ok(())
    }

    /// Nothing is mapped in place: every weight is a copy.
    fn matrix_extra_bytes(&self, m: &CudaMatrix) -> u64 {
        m.num_bytes()
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn reset_counters(&mut self) {
        self.counters = Counters::default();
        self.routed.clear();
    }

    fn embed(&mut self, p: Embed<'_, Self>) -> Result<()> {
        let rows = self.padded(p.inputs.num_rows);
        self.launched();
        self.launch(
            self.device.kernels().embed,
            &rksc_embed_params {
                table: p.table.dense("embed")?.ptr().cast(),
                ids: p.inputs.token_ids(),
                x: p.x.at_mut("embed", DType::F32, 0, rows * p.hidden)?.cast(),
                num_rows: rows as u32,
                hidden: p.hidden as u32,
                vocab: p.table.out_features as u32,
                dtype: code(p.table.dtype),
                scale: p.scale,
                reserved: 0,
            },
        )
    }

    fn add_rms_norm(&mut self, p: AddRmsNorm<'_, Self>) -> Result<()> {
        let op = "add_rms_norm";
        let rows = self.padded(p.rows.len());
        let (start, len) = (p.rows.start * p.hidden, rows * p.hidden);
        self.launched();
        let (reference, similarity) = match p.step_similarity {
            Some(s) => (
                s.before.at(op, DType::F32, start, len)?.cast(),
                s.similarity.at_mut(op, DType::F32, p.rows.start, rows)?.cast(),
            ),
            None => (null::<u8>(), null_mut::<u8>()),
        };
        let dtype = p.y.dtype;
        let weight = |w: Option<&CudaBuf>| match w {
            Some(w) => Ok(w.at(op, DType::F32, 0, p.hidden)?.cast()),
            None => Ok(null()),
        };
        let y = p.y.at_mut(op, dtype, start, len)?.cast();
        let (y, norm) = match p.output {
            NormOutput::None => (null_mut(), None),
            NormOutput::Rounded => (y, None),
            NormOutput::Normed(norm) => (y, Some(norm)),
        };
        let params = rksc_add_rms_norm_params {
            x: p.x.at_mut(op, DType::F32, start, len)?.cast(),
            delta: p.delta.map_or(Ok(null()), |d| d.at(op, DType::F32, start, len))?.cast(),
            post_norm: weight(p.post_norm.filter(|_| p.delta.is_some()))?,
            weight: weight(norm)?,
            y,
            keep: p.keep.map_or(Ok(null_mut()), |k| k.at_mut(op, DType::F32, start, len))?.cast(),
            reference: reference.cast(),
            similarity: similarity.cast(),
            num_rows: rows as u32,
            hidden: p.hidden as u32,
            dtype: code(dtype),
            eps: p.eps,
        };
        self.launch(self.device.kernels().add_rms_norm, &params)
    }

    fn enter_backbone(&mut self, route: &mut CudaBuf, num_rows: usize) -> Result<()> {
        self.launched();
        let rows = self.padded(num_rows);
        let route = route.at_mut("exit_rows", DType::F32, 0, rows)?.cast();
        self.launch(self.device.kernels().exit_rows, &exit_rows_params(rows, route))
    }

    fn exit_rows(&mut self, p: ExitRows<'_, Self>) -> Result<()> {
        let op = "exit_rows";
        self.launched();
        let rows = self.padded(p.inputs.num_rows);
        let route = p.route.at_mut(op, DType::F32, 0, rows)?.cast();
        let params = rksc_exit_rows_params {
            exits: p.inputs.exits(p.gate)?,
            whole_batch: u32::from(p.scope == Scope::Batch),
            layer: p.layer,
            ..exit_rows_params(rows, route)
        };
        let params = match p.rule {
            ExitRule::EveryNth { every, offset } => {
                rksc_exit_rows_params { rule: RKSC_EXIT_EVERY_NTH, every: every.max(1), offset, ..params }
            }
            ExitRule::Above { similarity, tau, share } => {
                let similarity = similarity.at(op, DType::F32, 0, rows)?.cast();
                rksc_exit_rows_params { rule: RKSC_EXIT_ABOVE, similarity, tau, share, ..params }
            }
        };
        self.launch(self.device.kernels().exit_rows, &params)
    }

    fn linear(&mut self, p: Linear<'_, Self>) -> Result<()> {
        self.multiply(p)
    }

    fn rope_append(&mut self, p: RopeAppend<'_, Self>) -> Result<()> {
        let op = "rope_append";
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        checks::rotary(op, p.rotary_dim, head_dim)?;
        let bytes = 2 * p.rows.len() * num_kv_heads * head_dim * dtype.size_bytes();
        self.launched().kv_write_bytes += bytes as u64;
        let rows = self.padded(p.rows.len());
        let width = (p.num_q_heads + 2 * num_kv_heads) * head_dim;
        let q_width = p.num_q_heads * head_dim;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let (q_norm, k_norm, norm_eps, norm_span) = match p.qk_norm {
            Some(QkNorm { q, k, eps, span }) => {
                let (q_len, k_len, span) = match span {
                    NormSpan::Head => (head_dim, head_dim, RKSC_NORM_HEAD),
                    NormSpan::Row => (q_width, num_kv_heads * head_dim, RKSC_NORM_ROW),
                };
                (q.at(op, DType::F32, 0, q_len)?.cast(), k.at(op, DType::F32, 0, k_len)?.cast(), eps, span)
            }
            None => (null(), null(), 0.0, RKSC_NORM_HEAD),
        };
        let num_ring_rows = p.inputs.num_ring_rows;
        checks::ring_is_there(num_ring_rows, p.query_ring.is_some())?;
        let query_ring = match p.query_ring {
            Some(ring) if num_ring_rows > 0 => ring.at_mut(op, dtype, 0, num_ring_rows * q_width)?.cast(),
            _ => null_mut(),
        };
        let ring_rows = p.inputs.ring_rows();
        let params = rksc_rope_append_params {
            qkv: p.qkv.at(op, DType::F32, p.rows.start * width, rows * width)?.cast(),
            q: p.q.at_mut(op, dtype, p.rows.start * q_width, rows * q_width)?.cast(),
            query_ring,
            k_cache: p.k_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            v_cache: p.v_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            positions: p.inputs.positions().wrapping_add(p.rows.start),
            slots: p.inputs.slots().wrapping_add(p.rows.start),
            ring_rows: if ring_rows.is_null() { ring_rows } else { ring_rows.wrapping_add(p.rows.start) },
            inv_freq: p.inv_freq.at(op, DType::F32, 0, p.rotary_dim / 2)?.cast(),
            q_norm,
            k_norm,
            num_rows: rows as u32,
            num_q_heads: p.num_q_heads as u32,
            num_kv_heads: num_kv_heads as u32,
            head_dim: head_dim as u32,
            rotary_dim: p.rotary_dim as u32,
            block_size: block_size as u32,
            dtype: code(dtype),
            norm_span,
            rope_scale: p.rope_scale,
            norm_eps,
        };
        self.launch(self.device.kernels().rope_append, &params)
    }

    fn kv_copy_blocks(&mut self, p: KvCopyBlocks<'_, Self>) -> Result<()> {
        let op = "kv_copy_blocks";
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        let bytes = 2 * p.inputs.slots_copied * num_kv_heads * head_dim * dtype.size_bytes();
        self.launched().kv_write_bytes += bytes as u64;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let params = rksc_kv_copy_blocks_params {
            copies: p.inputs.copies(),
            k_cache: p.k_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            v_cache: p.v_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            num_copies: p.inputs.num_copies as u32,
            num_kv_heads: num_kv_heads as u32,
            block_size: block_size as u32,
            head_dim: head_dim as u32,
            dtype: code(dtype),
            reserved: 0,
        };
        self.launch(self.device.kernels().kv_copy_blocks, &params)
    }

    fn kv_transfer(&mut self, p: KvTransfer<'_, Self>) -> Result<()> {
        let op = "kv_transfer";
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        checks::rotary(op, p.rotary_dim, head_dim)?;
        let bytes = 2 * p.inputs.num_transfers * num_kv_heads * head_dim * dtype.size_bytes();
        self.launched().kv_write_bytes += bytes as u64;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let params = rksc_kv_transfer_params {
            transfers: p.inputs.transfers(),
            k_cache: p.k_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            v_cache: p.v_cache.at_mut(op, dtype, 0, cache_len)?.cast(),
            inv_freq: p.inv_freq.at(op, DType::F32, 0, p.rotary_dim / 2)?.cast(),
            num_transfers: p.inputs.num_transfers as u32,
            num_kv_heads: num_kv_heads as u32,
            block_size: block_size as u32,
            head_dim: head_dim as u32,
            rotary_dim: p.rotary_dim as u32,
            dtype: code(dtype),
        };
        self.launch(self.device.kernels().kv_transfer, &params)
    }

    fn paged_attention(&mut self, p: PagedAttention<'_, Self>) -> Result<()> {
        let op = "paged_attention";
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = *p.layout;
        checks::window_and_softcap(op, p.window, p.softcap)?;
        let bytes = 2 * p.inputs.plan.slots_read(p.window) * num_kv_heads * head_dim * dtype.size_bytes();
        self.launched().kv_read_bytes += bytes as u64;
        let (num_rows, num_partials) = (p.inputs.num_rows, p.inputs.shape.partials);
        let (device, graphs, scratch) = (&self.device, &mut self.graphs, &mut self.scratch);
        let heads = num_partials * p.num_q_heads;
        let partial_o = grow(device, graphs, &mut scratch.partial_o, 4 * heads * head_dim)?;
        let partial_ml = grow(device, graphs, &mut scratch.partial_ml, 4 * heads * 2)?;
        let arrivals = grow(device, graphs, &mut scratch.arrivals, 4 * p.inputs.shape.rows * num_kv_heads)?;
        let cache_len = p.layout.num_blocks * p.layout.block_elems();
        let q_len = num_rows * p.num_q_heads * head_dim;
        let params = rksc_paged_attention_params {
            q: p.q.at(op, dtype, 0, q_len)?.cast(),
            k_cache: p.k_cache.at(op, dtype, 0, cache_len)?.cast(),
            v_cache: p.v_cache.at(op, dtype, 0, cache_len)?.cast(),
            o: p.o.at_mut(op, dtype, 0, q_len)?.cast(),
            lse: p.lse.at_mut(op, DType::F32, 0, num_rows * p.num_q_heads)?.cast(),
            row_order: p.inputs.row_order(),
            kv_lens: p.inputs.kv_lens(),
            blocks: p.inputs.blocks(),
            items: p.inputs.items(),
            groups: p.inputs.groups(),
            num_items: p.inputs.num_items(),
            partial_o: partial_o.cast(),
            partial_ml: partial_ml.cast(),
            arrivals: arrivals.cast(),
            max_items: p.inputs.shape.items as u32,
            num_q_heads: p.num_q_heads as u32,
            num_kv_heads: num_kv_heads as u32,
            head_dim: head_dim as u32,
            block_size: block_size as u32,
            dtype: code(dtype),
            sm_scale: p.sm_scale,
            window: window_code(p.window),
            softcap: p.softcap.unwrap_or(0.0),
            reserved: 0,
        };
        self.launch(self.device.kernels().paged_attention, &params)
    }

    fn glu(&mut self, p: Glu<'_, Self>) -> Result<()> {
        let op = "glu";
        let rows = self.padded(p.rows.len());
        let (start, len) = (p.rows.start * p.intermediate, rows * p.intermediate);
        self.launched();
        let dtype = p.y.dtype;
        let params = rksc_glu_params {
            gate_up: p.gate_up.at(op, DType::F32, 2 * start, 2 * len)?.cast(),
            y: p.y.at_mut(op, dtype, start, len)?.cast(),
            num_rows: rows as u32,
            intermediate: p.intermediate as u32,
            activation: match p.activation {
                Activation::Silu => RKSC_SILU,
                Activation::GeluTanh => RKSC_GELU_TANH,
            },
            dtype: code(dtype),
        };
        self.launch(self.device.kernels().glu, &params)
    }

    fn gather_rows(&mut self, p: GatherRows<'_, Self>) -> Result<()> {
        let op = "gather_rows";
        self.launched();
        let (rows, num_rows) = match p.rows {
            RowIds::Queried(inputs, range) => {
                let Range { start, end } = range;
                if end > inputs.num_queries {
                    let got = format!("{} queried rows", inputs.num_queries);
                    return Err(Error::Shape { op, expected: format!("rows [{start}, {end})"), got });
                }
                (inputs.query_rows().wrapping_add(start), self.padded(end - start))
            }
            RowIds::Given(ids) => {
                let bytes = bytemuck::cast_slice(ids);
                (put(&mut self.device, &mut self.graphs, &mut self.scratch.row_ids, bytes)?.cast(), ids.len())
            }
        };
        let params = rksc_gather_rows_params {
            rows,
            src: p.src.at(op, DType::F32, 0, p.width)?.cast(),
            dst: p.dst.at_mut(op, DType::F32, p.dst_row * p.width, num_rows * p.width)?.cast(),
            num_rows: num_rows as u32,
            width: p.width as u32,
        };
        self.launch(self.device.kernels().gather_rows, &params)
    }

    fn softcap(&mut self, p: Softcap<'_, Self>) -> Result<()> {
        checks::softcap(p.cap)?;
        let rows = self.padded(p.num_rows);
        self.launched();
        let params = rksc_softcap_params {
            logits: p.logits.at_mut("softcap", DType::F32, 0, rows * p.vocab)?.cast(),
            num_rows: rows as u32,
            vocab: p.vocab as u32,
            cap: p.cap,
            reserved: 0,
        };
        self.launch(self.device.kernels().softcap, &params)
    }

    fn row_stats(&mut self, p: RowStatsOp<'_, Self>) -> Result<()> {
        let rows = self.padded(p.num_rows);
        self.launched();
        let bytes = self.device.kernels().row_stats_workspace_bytes(rows, p.vocab);
        let (device, graphs, scratch) = (&self.device, &mut self.graphs, &mut self.scratch);
        let workspace = grow(device, graphs, &mut scratch.row_stats, bytes)?;
        let stats = grow(device, graphs, &mut scratch.stats, rows * size_of::<rksc_statistics>())?;
        let params = rksc_row_stats_params {
            logits: p.logits.at("row_stats", DType::F32, 0, rows * p.vocab)?.cast(),
            stats: stats.cast(),
            workspace: workspace.cast(),
            num_rows: rows as u32,
            vocab: p.vocab as u32,
        };
        self.launch(self.device.kernels().row_stats, &params)
    }

    fn sample(&mut self, p: Sample<'_, Self>) -> Result<()> {
        self.launched().read_backs += 1;
        let mut history = Vec::new();
        let rows: Vec<rksc_sample_row> = p.rows.iter().map(|row| sample_row(row, &mut history)).collect();
        let (device, graphs, scratch) = (&mut self.device, &mut self.graphs, &mut self.scratch);
        let params = rksc_sample_params {
            logits: p.logits.at_mut("sample", DType::F32, 0, rows.len() * p.vocab)?.cast(),
            rows: put(device, graphs, &mut scratch.sample_rows, bytemuck::cast_slice(&rows))?.cast(),
            history: put(device, graphs, &mut scratch.history, bytemuck::cast_slice(&history))?.cast(),
            sampled: grow(device, graphs, &mut scratch.sampled, rows.len() * size_of::<rksc_sampled>())?.cast(),
            saved: grow(device, graphs, &mut scratch.saved, 4 * history.len())?.cast(),
            num_rows: rows.len() as u32,
            vocab: p.vocab as u32,
        };
        self.launch(self.device.kernels().sample, &params)?;
        match &self.scratch.sampled {
            Some(found) => self.device.download(found, 0, bytemuck::cast_slice_mut(p.sampled)),
            None => Ok(()),
        }
    }

    fn entropy_probe(&mut self, p: EntropyProbe<'_, Self>) -> Result<()> {
        self.probe_entropy(p)
    }

    fn branch_similarity(&mut self, p: BranchSimilarity<'_, Self>) -> Result<()> {
        self.compare_branches(p)
    }

    fn attention_mass(&mut self, p: AttentionMass<'_, Self>) -> Result<()> {
        self.weigh_slots(p)
    }

    fn kv_scores(&mut self, p: KvScores<'_, Self>) -> Result<()> {
        self.score_slots(p)
    }

    fn kv_compact(&mut self, p: KvCompact<'_, Self>) -> Result<()> {
        self.compact_slots(p)
    }

    fn forget_recordings(&mut self) -> Result<()> {
        self.outside_recording("forget_recordings")?;
        self.graphs.forget();
        Ok(())
    }
}

impl Cuda {
    fn item_params(&self) -> ItemParams {
        let Heads { num_q_heads, num_kv_heads, block_size } = self.heads;
        ItemParams {
            num_sms: self.device.info().num_sms as usize,
            num_kv_heads,
            gqa_group: num_q_heads / num_kv_heads.max(1),
            block_size,
            max_partials: MAX_PARTIALS,
        }
    }
}

/// Of the rule that puts all rows into the backbone.
fn exit_rows_params(rows: usize, route: *mut f32) -> rksc_exit_rows_params {
    rksc_exit_rows_params {
        exits: std::ptr::null(),
        similarity: std::ptr::null(),
        route,
        num_rows: rows as u32,
        rule: RKSC_EXIT_ENTER,
        every: 0,
        offset: 0,
        tau: 0.0,
        share: 0.0,
        whole_batch: 0,
        layer: 0,
    }
}

/// One row's params, with its tokens appended to `history`.
fn sample_row(row: &SampleRow<'_>, history: &mut Vec<u32>) -> rksc_sample_row {
    let history_start = history.len() as u32;
    history.extend_from_slice(row.prompt);
    history.extend_from_slice(row.generated);
    let bias_start = history.len() as u32;
    history.extend(row.bias.iter().map(|(token, _)| token));
    history.extend(row.bias.iter().map(|(_, bias)| bias.to_bits()));
    rksc_sample_row {
        seed: row.params.seed,
        path: row.key.path,
        position: row.key.position,
        temperature: row.params.temperature,
        top_p: row.params.top_p,
        min_p: row.params.min_p,
        repetition_penalty: row.params.repetition_penalty,
        presence_penalty: row.params.presence_penalty,
        frequency_penalty: row.params.frequency_penalty,
        top_k: row.params.top_k,
        history_start,
        num_prompt: row.prompt.len() as u32,
        num_generated: row.generated.len() as u32,
        bias_start,
        num_bias: row.bias.len() as u32,
    }
}

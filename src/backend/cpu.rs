//! The CPU backend: typed buffers, one dispatch on the compute type per op, work counted.
//!
//! *Law, per SIMD level: a row's bits depend on its own tokens alone.* `linear` accumulates K in one order for any
//! number of rows; attention has one tile grid; threads divide outputs, never a sum. The files below keep it.

pub mod attention;
pub mod branch_similarity;
pub mod elem;
pub mod elementwise;
pub mod entropy_probe;
pub mod exit_rows;
pub mod kv_compact;
pub mod kv_scores;
pub mod kv_transfer;
pub mod linear;
pub mod matrix;
pub mod norm;
pub mod pool;
pub mod roof;
pub mod rope;
pub mod row_stats;
pub mod simd;
pub mod vector;

use half::{bf16, f16};

pub use attention::MAX_GROUP_ROWS;
use attention::mass::AttentionMassArgs;
use attention::{AttentionScratch, PagedAttentionArgs};
use branch_similarity::{BranchSimilarityArgs, BranchSimilarityScratch};
use elem::Elem;
use elementwise::{EmbedArgs, GluArgs, Table};
use entropy_probe::{EntropyProbeArgs, EntropyProbeScratch};
use kv_scores::{KvScoresArgs, KvScoresScratch};
use linear::{Activations, LinearArgs, LinearScratch, RoutedArgs, RoutedScratch};
use matrix::{CpuMatrix, Weights};
use norm::{AddRmsNormArgs, Output};
use pool::ThreadPool;
use rope::{QkWeights, RopeAppendArgs, RopeScratch};
use row_stats::RowStatsScratch;
use simd::SimdLevel;

use super::{
    AddRmsNorm, AttentionMass, Backend, BranchSimilarity, Counters, Embed, EntropyProbe, ExitRows, ExitRule,
    GatherRows, Glu, KvCompact, KvCopyBlocks, KvScores, KvTransfer, Linear, NormOutput, PagedAttention, PassInputs,
    RopeAppend, RowIds, RowStats, RowStatsOp, Sample, Sampled, Softcap, checks,
};
use crate::config::available_memory;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::weights::Tensor;
use crate::quant::MatrixPart;
use crate::sampler;

/// Host memory of one element type.
#[derive(Debug)]
pub enum CpuBuf {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Half precision.
    F16(Vec<f16>),
}

/// Runs `$body` with `$T` and the named buffers bound to slices of the compute type, which the first of them decides.
macro_rules! with_type {
    ($op:literal, [$name:ident = $buf:expr], $body:expr) => {
        match $buf {
            CpuBuf::F32($name) => $body,
            CpuBuf::Bf16($name) => $body,
            CpuBuf::F16($name) => $body,
        }
    };
    ($op:literal, [$($name:ident = $buf:expr),+], $body:expr) => {
        match ($($buf,)+) {
            ($(CpuBuf::F32($name),)+) => $body,
            ($(CpuBuf::Bf16($name),)+) => $body,
            ($(CpuBuf::F16($name),)+) => $body,
            _ => Err(mixed($op)),
        }
    };
}

fn mixed(op: &'static str) -> Error {
    Error::Shape { op, expected: "buffers of one compute type".into(), got: "different types".into() }
}

impl CpuBuf {
    fn f32(&self, op: &'static str) -> Result<&[f32]> {
        if let Self::F32(x) = self { Ok(x) } else { Err(mixed(op)) }
    }

    fn f32_mut(&mut self, op: &'static str) -> Result<&mut [f32]> {
        if let Self::F32(x) = self { Ok(x) } else { Err(mixed(op)) }
    }

    /// The elements, where they are of type `T`.
    fn typed_mut<T: Elem>(&mut self, op: &'static str) -> Result<&mut [T]> {
        let is_t = match self {
            Self::F32(_) => T::DTYPE == DType::F32,
            Self::Bf16(_) => T::DTYPE == DType::Bf16,
            Self::F16(_) => T::DTYPE == DType::F16,
        };
        if !is_t {
            return Err(mixed(op));
        }
        bytemuck::try_cast_slice_mut(self.bytes_mut()).map_err(|_| mixed(op))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(x) => bytemuck::cast_slice(x),
            Self::Bf16(x) => bytemuck::cast_slice(x),
            Self::F16(x) => bytemuck::cast_slice(x),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(x) => bytemuck::cast_slice_mut(x),
            Self::Bf16(x) => bytemuck::cast_slice_mut(x),
            Self::F16(x) => bytemuck::cast_slice_mut(x),
        }
    }

    fn elem_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::Bf16(_) | Self::F16(_) => 2,
        }
    }
}

/// What a KV cache may take here: a quarter of the free memory, for weights are mapped, and this machine is not ours alone.
pub(crate) fn kv_budget() -> Option<u64> {
    available_memory().map(|free| free / 4)
}

/// See the module text.
pub struct Cpu {
    pool: ThreadPool,
    level: SimdLevel,
    linear: LinearScratch,
    routed: RoutedScratch,
    attention: AttentionScratch,
    rope: RopeScratch,
    row_stats: RowStatsScratch,
    probe: EntropyProbeScratch,
    similarity: BranchSimilarityScratch,
    kv_scores: KvScoresScratch,
    /// What the last `row_stats` or `entropy_probe` found.
    stats: Vec<RowStats>,
    /// One row of logits that `sample` may spoil.
    logits_row: Vec<f32>,
    counters: Counters,
}

impl Cpu {
    /// `num_threads` threads (0: one per core) at a SIMD level this CPU has.
    pub fn new(num_threads: usize, level: SimdLevel) -> Result<Self> {
        crate::config::check_threads(num_threads)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let num_threads = if num_threads == 0 { cores } else { num_threads };
        Ok(Self {
            pool: ThreadPool::new(num_threads),
            level: level.check_available()?,
            linear: LinearScratch::default(),
            routed: RoutedScratch::default(),
            attention: AttentionScratch::default(),
            rope: RopeScratch::default(),
            row_stats: RowStatsScratch::default(),
            probe: EntropyProbeScratch::default(),
            similarity: BranchSimilarityScratch::default(),
            kv_scores: KvScoresScratch::default(),
            stats: Vec::new(),
            logits_row: Vec::new(),
            counters: Counters::default(),
        })
    }

    /// `cpu, 2 threads, avx512`.
    pub fn describe(&self) -> String {
        let threads = self.pool.num_threads();
        format!("cpu, {threads} thread{}, {}", if threads == 1 { "" } else { "s" }, self.level)
    }

    fn launched(&mut self) -> &mut Counters {
        self.counters.launches += 1;
        &mut self.counters
    }
}

impl Backend for Cpu {
    type Buf = CpuBuf;
    type Matrix = CpuMatrix;
    type Inputs = PassInputs;

    fn max_group_rows(&self, _gqa_group: usize) -> usize {
        MAX_GROUP_ROWS
    }

    fn describe(&self) -> String {
        Self::describe(self)
    }

    fn kv_budget(&self, _resident_bytes: u64) -> Option<u64> {
        kv_budget()
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<CpuBuf> {
        Ok(match dtype {
            DType::F32 => CpuBuf::F32(zeroed(len)?),
            DType::Bf16 => CpuBuf::Bf16(zeroed(len)?),
            DType::F16 => CpuBuf::F16(zeroed(len)?),
        })
    }

    fn matrix(&mut self, parts: &[MatrixPart], compute: DType) -> Result<CpuMatrix> {
        CpuMatrix::new(parts, compute)
    }

    fn vector(&mut self, parts: &[Tensor]) -> Result<CpuBuf> {
        let mut out = Vec::new();
        for part in parts {
            let n = part.num_elems();
            let row = CpuMatrix::new(&[Tensor { shape: vec![1, n], ..part.clone() }], DType::F32)?;
            let start = out.len();
            out.resize(start + n, 0.0);
            row.widen_row(0, &mut out[start..])?;
        }
        Ok(CpuBuf::F32(out))
    }

    fn upload(&mut self, values: &[f32]) -> Result<CpuBuf> {
        Ok(CpuBuf::F32(values.to_vec()))
    }

    fn read_f32(&mut self, src: &CpuBuf, start: usize, dst: &mut [f32]) -> Result<()> {
        let x = src.f32("read_f32")?;
        let Some(x) = x.get(start..start + dst.len()) else {
            return Err(Error::Shape {
                op: "read_f32",
                expected: format!("at least {} elements", start + dst.len()),
                got: x.len().to_string(),
            });
        };
        dst.copy_from_slice(x);
        Ok(())
    }

    fn read_bytes(&mut self, src: &CpuBuf, start: usize, len: usize, dst: &mut Vec<u8>) -> Result<()> {
        let size = src.elem_bytes();
        let bytes = src.bytes().get(start * size..(start + len) * size);
        dst.extend_from_slice(bytes.ok_or_else(|| out_of_range("read_bytes", start, len))?);
        Ok(())
    }

    fn write_bytes(&mut self, dst: &mut CpuBuf, start: usize, len: usize, src: &[u8]) -> Result<usize> {
        let num_bytes = len * dst.elem_bytes();
        let at = start * dst.elem_bytes();
        match (dst.bytes_mut().get_mut(at..at + num_bytes), src.get(..num_bytes)) {
            (Some(dst), Some(src)) => dst.copy_from_slice(src),
            _ => return Err(out_of_range("write_bytes", start, len)),
        }
        Ok(num_bytes)
    }

    fn stage(&mut self, inputs: PassInputs) -> Result<PassInputs> {
        Ok(inputs)
    }

    fn begin_pass(&mut self, _inputs: &PassInputs, _repeatable: Option<u64>) -> Result<()> {
        Ok(())
    }

    fn end_pass(&mut self) -> Result<()> {
        Ok(())
    }

    fn read_stats(&mut self, stats: &mut [RowStats]) -> Result<()> {
        self.counters.read_backs += 1;
        match self.stats.get(..stats.len()) {
            Some(found) => stats.copy_from_slice(found),
            None => return Err(out_of_range("read_stats", 0, stats.len())),
        }
        Ok(())
    }

    fn read_route(&mut self, route: &CpuBuf, dst: &mut [f32]) -> Result<()> {
        self.counters.read_backs += 1;
        self.read_f32(route, 0, dst)
    }

    fn matrix_extra_bytes(&self, m: &CpuMatrix) -> u64 {
        m.extra_bytes()
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn reset_counters(&mut self) {
        self.counters = Counters::default();
    }

    fn embed(&mut self, p: Embed<'_, Self>) -> Result<()> {
        self.launched();
        let mut parts = p.table.parts();
        let table = match (parts.next(), parts.next()) {
            (Some(part), None) => part?.2,
            _ => return Err(Error::Unsupported { op: "embed", what: "a table in several parts".into() }),
        };
        let table = match table {
            Weights::F32(t) => Table::F32(t),
            Weights::Bf16(t) => Table::Bf16(t),
            Weights::F16(t) => Table::F16(t),
            Weights::Codes(_) => return Err(Error::Unsupported { op: "embed", what: "a table in codes".into() }),
        };
        let (ids, x) = (&p.inputs.token_ids, p.x.f32_mut("embed")?);
        let args = EmbedArgs { table, ids, scale: p.scale, x, hidden: p.hidden };
        elementwise::embed(self.level, &mut self.pool, args)
    }

    fn add_rms_norm(&mut self, p: AddRmsNorm<'_, Self>) -> Result<()> {
        self.launched();
        let op = "add_rms_norm";
        let x = p.x.f32_mut(op)?;
        let delta = p.delta.map(|d| d.f32(op)).transpose()?;
        let post_norm = p.post_norm.map(|w| w.f32(op)).transpose()?;
        let output = match p.output {
            NormOutput::None => Output::None,
            NormOutput::Rounded => Output::Rounded,
            NormOutput::Normed(weight) => Output::Normed(weight.f32(op)?),
        };
        let keep = p.keep.map(|k| k.f32_mut(op)).transpose()?;
        let step_similarity = match p.step_similarity {
            Some(s) => Some((s.before.f32(op)?, s.similarity.f32_mut(op)?)),
            None => None,
        };
        let (rows, hidden, eps) = (p.rows, p.hidden, p.eps);
        with_type!("add_rms_norm", [y = p.y], {
            let args = AddRmsNormArgs { rows, x, delta, post_norm, output, y, keep, step_similarity, hidden, eps };
            norm::add_rms_norm(self.level, &mut self.pool, args)
        })
    }

    fn enter_backbone(&mut self, route: &mut CpuBuf, num_rows: usize) -> Result<()> {
        self.launched();
        let route = route.f32_mut("enter_backbone")?;
        let rows = route.get_mut(..num_rows).ok_or_else(|| out_of_range("enter_backbone", 0, num_rows))?;
        rows.fill(f32::INFINITY);
        Ok(())
    }

    fn exit_rows(&mut self, p: ExitRows<'_, Self>) -> Result<()> {
        self.launched();
        let op = "exit_rows";
        let rule = match p.rule {
            ExitRule::EveryNth { every, offset } => exit_rows::Rule::EveryNth { every, offset },
            ExitRule::Above { similarity, tau, share } => {
                exit_rows::Rule::Above { similarity: similarity.f32(op)?, tau, share }
            }
        };
        let exits = p.inputs.exits.get(p.gate).ok_or_else(|| out_of_range(op, p.gate, 1))?;
        exit_rows::exit_rows(exits, &rule, p.scope, p.layer, p.route.f32_mut(op)?)
    }

    fn linear(&mut self, p: Linear<'_, Self>) -> Result<()> {
        self.launched();
        let x = match p.x {
            CpuBuf::F32(x) => Activations::F32(x),
            CpuBuf::Bf16(x) => Activations::Bf16(x),
            CpuBuf::F16(x) => Activations::F16(x),
        };
        let args = LinearArgs {
            x,
            rows: p.rows,
            in_features: p.w.in_features(),
            w: p.w,
            bias: p.bias.map(|b| b.f32("linear")).transpose()?,
            y: p.y.f32_mut("linear")?,
        };
        let bytes = match p.river {
            None => {
                linear::linear(&mut self.pool, self.level, &mut self.linear, args)?;
                p.w.num_bytes()
            }
            Some(river) => {
                let (route, layer) = (river.route.f32("linear")?, river.layer);
                let args = RoutedArgs { linear: args, river: river.w, route, layer };
                linear::routed_linear(&mut self.pool, self.level, &mut self.linear, &mut self.routed, args)?
            }
        };
        self.counters.weight_bytes += bytes;
        Ok(())
    }

    fn rope_append(&mut self, p: RopeAppend<'_, Self>) -> Result<()> {
        let op = "rope_append";
        let bytes = 2 * p.rows.len() * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        self.launched().kv_write_bytes += bytes as u64;
        let qk_norm = match p.qk_norm {
            Some(n) => Some(QkWeights { q: n.q.f32(op)?, k: n.k.f32(op)?, eps: n.eps, span: n.span }),
            None => None,
        };
        let (qkv, inv_freq) = (p.qkv.f32(op)?, p.inv_freq.f32(op)?);
        with_type!("rope_append", [q = p.q, k_cache = p.k_cache, v_cache = p.v_cache], {
            let args = RopeAppendArgs {
                rows: p.rows,
                qkv,
                q,
                query_ring: p.query_ring.map(|ring| ring.typed_mut(op)).transpose()?,
                k_cache,
                v_cache,
                positions: &p.inputs.positions,
                slots: &p.inputs.slots,
                ring_rows: &p.inputs.ring_rows,
                inv_freq,
                rotary_dim: p.rotary_dim,
                rope_scale: p.rope_scale,
                qk_norm,
                num_q_heads: p.num_q_heads,
                layout: p.layout,
            };
            rope::rope_append(self.level, &mut self.pool, &mut self.rope, args)
        })
    }

    fn kv_copy_blocks(&mut self, p: KvCopyBlocks<'_, Self>) -> Result<()> {
        let slots: usize = p.inputs.copies.iter().map(|c| c.num_slots as usize).sum();
        let bytes = 2 * slots * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        self.launched().kv_write_bytes += bytes as u64;
        with_type!("kv_copy_blocks", [k_cache = p.k_cache, v_cache = p.v_cache], {
            rope::kv_copy_blocks(&p.inputs.copies, k_cache, v_cache, p.layout)
        })
    }

    fn kv_transfer(&mut self, p: KvTransfer<'_, Self>) -> Result<()> {
        let slot_bytes = 2 * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        self.launched().kv_write_bytes += (p.inputs.transfers.len() * slot_bytes) as u64;
        checks::rotary("kv_transfer", p.rotary_dim, p.layout.head_dim)?;
        let inv_freq = p.inv_freq.f32("kv_transfer")?;
        let half = p.rotary_dim / 2;
        let inv_freq = inv_freq.get(..half).ok_or_else(|| out_of_range("kv_transfer", 0, half))?;
        with_type!("kv_transfer", [k_cache = p.k_cache, v_cache = p.v_cache], {
            kv_transfer::kv_transfer(&p.inputs.transfers, k_cache, v_cache, inv_freq, p.layout)
        })
    }

    fn paged_attention(&mut self, p: PagedAttention<'_, Self>) -> Result<()> {
        let slots = p.inputs.plan.slots_read(p.window);
        let bytes = 2 * slots * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        self.launched().kv_read_bytes += bytes as u64;
        let lse = p.lse.f32_mut("paged_attention")?;
        with_type!("paged_attention", [q = p.q, k_cache = p.k_cache, v_cache = p.v_cache, o = p.o], {
            let args = PagedAttentionArgs {
                plan: &p.inputs.plan,
                q,
                k_cache,
                v_cache,
                o,
                lse,
                num_q_heads: p.num_q_heads,
                sm_scale: p.sm_scale,
                window: p.window,
                softcap: p.softcap,
                layout: p.layout,
            };
            attention::paged_attention(self.level, &mut self.pool, &mut self.attention, args)
        })
    }

    fn glu(&mut self, p: Glu<'_, Self>) -> Result<()> {
        self.launched();
        let gate_up = p.gate_up.f32("glu")?;
        let (rows, intermediate, activation) = (p.rows, p.intermediate, p.activation);
        with_type!("glu", [y = p.y], {
            let args = GluArgs { rows, gate_up, y, intermediate, activation };
            elementwise::glu(self.level, &mut self.pool, args)
        })
    }

    fn gather_rows(&mut self, p: GatherRows<'_, Self>) -> Result<()> {
        self.launched();
        let (src, dst) = (p.src.f32("gather_rows")?, p.dst.f32_mut("gather_rows")?);
        let rows = match p.rows {
            RowIds::Given(rows) => rows,
            RowIds::Queried(inputs, range) => inputs.query_rows.get(range.clone()).ok_or_else(|| {
                let got = format!("{} queried rows", inputs.query_rows.len());
                Error::Shape { op: "gather_rows", expected: format!("rows {range:?}"), got }
            })?,
        };
        let Some(dst) = dst.get_mut(p.dst_row * p.width..) else {
            return Err(out_of_range("gather_rows", p.dst_row * p.width, p.width));
        };
        elementwise::gather_rows(&mut self.pool, rows, src, dst, p.width)
    }

    fn softcap(&mut self, p: Softcap<'_, Self>) -> Result<()> {
        checks::softcap(p.cap)?;
        self.launched();
        let len = p.num_rows * p.vocab;
        let logits = p.logits.f32_mut("softcap")?.get_mut(..len).ok_or_else(|| out_of_range("softcap", 0, len))?;
        elementwise::softcap(self.level, &mut self.pool, logits, p.vocab, p.cap);
        Ok(())
    }

    fn row_stats(&mut self, p: RowStatsOp<'_, Self>) -> Result<()> {
        self.launched();
        let logits = p.logits.f32("row_stats")?;
        self.stats.resize(p.num_rows, RowStats::default());
        row_stats::row_stats(self.level, &mut self.pool, &mut self.row_stats, logits, p.vocab, &mut self.stats)
    }

    fn sample(&mut self, p: Sample<'_, Self>) -> Result<()> {
        self.launched().read_backs += 1;
        let logits = p.logits.f32("sample")?;
        for (i, (row, sampled)) in p.rows.iter().zip(p.sampled).enumerate() {
            let Some(logits) = logits.get(i * p.vocab..(i + 1) * p.vocab) else {
                return Err(out_of_range("sample", i * p.vocab, p.vocab));
            };
            self.logits_row.clear();
            self.logits_row.extend_from_slice(logits);
            for &(token, bias) in row.bias {
                if let Some(x) = self.logits_row.get_mut(token as usize) {
                    *x += bias;
                }
            }
            let token = sampler::sample(&mut self.logits_row, row.params, row.prompt, row.generated, row.key);
            *sampled = Sampled { token, logit: logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY) };
        }
        Ok(())
    }

    fn entropy_probe(&mut self, p: EntropyProbe<'_, Self>) -> Result<()> {
        self.launched().weight_bytes += p.candidates.map_or_else(|| p.w.num_bytes(), |ids| p.w.row_bytes(ids));
        let op = "entropy_probe";
        self.stats.resize(p.num_rows, RowStats::default());
        let args = EntropyProbeArgs {
            x: p.x.f32(op)?,
            norm: p.norm.map(|n| n.f32(op)).transpose()?,
            eps: p.eps,
            w: p.w,
            candidates: p.candidates,
            hidden: p.hidden,
            stats: &mut self.stats,
        };
        entropy_probe::entropy_probe(self.level, &mut self.pool, &mut self.probe, &mut self.linear, args)
    }

    fn branch_similarity(&mut self, p: BranchSimilarity<'_, Self>) -> Result<()> {
        self.launched().read_backs += 1;
        let op = "branch_similarity";
        let args = BranchSimilarityArgs {
            states: p.states.f32(op)?,
            root: p.root.f32(op)?,
            layer_weights: p.layer_weights,
            num_branches: p.num_branches,
            hidden: p.hidden,
            tau: p.tau,
            similarity: p.similarity,
        };
        branch_similarity::branch_similarity(self.level, &mut self.pool, &mut self.similarity, args)
    }

    fn attention_mass(&mut self, p: AttentionMass<'_, Self>) -> Result<()> {
        let slots: usize = p.sequences.iter().map(|s| s.slots_read(p.window)).sum();
        let bytes = slots * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        let counters = self.launched();
        counters.read_backs += 1;
        counters.kv_read_bytes += bytes as u64;
        let lse = p.lse.f32("attention_mass")?;
        with_type!("attention_mass", [q = p.q, k_cache = p.k_cache], {
            let args = AttentionMassArgs {
                q,
                k_cache,
                lse,
                blocks: p.blocks,
                sequences: p.sequences,
                num_q_heads: p.num_q_heads,
                sm_scale: p.sm_scale,
                window: p.window,
                softcap: p.softcap,
                layout: p.layout,
                mass: p.mass,
            };
            attention::mass::attention_mass(self.level, &mut self.pool, &mut self.attention, args)
        })
    }

    fn kv_scores(&mut self, p: KvScores<'_, Self>) -> Result<()> {
        checks::kv_scores(&p)?;
        let bytes = p.num_slots * p.layout.num_kv_heads * p.layout.head_dim * p.layout.dtype.size_bytes();
        self.launched().kv_read_bytes += bytes as u64;
        let scores = p.scores.f32_mut("kv_scores")?;
        let num_scores = p.layout.num_kv_heads * (p.num_slots - p.window);
        let Some(scores) = scores.get_mut(p.scores_start..p.scores_start + num_scores) else {
            return Err(out_of_range("kv_scores", p.scores_start, num_scores));
        };
        with_type!("kv_scores", [queries = p.queries, k_cache = p.k_cache], {
            let args = KvScoresArgs {
                queries,
                query_rows: p.query_rows,
                k_cache,
                blocks: p.blocks,
                num_slots: p.num_slots,
                window: p.window,
                pool_size: p.pool_size,
                variant: p.variant,
                lambda: p.lambda,
                threshold: p.threshold,
                num_q_heads: p.num_q_heads,
                sm_scale: p.sm_scale,
                softcap: p.softcap,
                layout: p.layout,
                scores,
            };
            kv_scores::kv_scores(self.level, &mut self.pool, &mut self.kv_scores, args)
        })
    }

    fn kv_compact(&mut self, p: KvCompact<'_, Self>) -> Result<()> {
        let moved = checks::kv_compact(&p)?;
        self.launched().kv_write_bytes += (2 * moved * p.layout.head_dim * p.layout.dtype.size_bytes()) as u64;
        let (blocks, keep, first_slot, layout) = (p.blocks, p.keep, p.first_slot, p.layout);
        with_type!("kv_compact", [k_cache = p.k_cache, v_cache = p.v_cache], {
            kv_compact::kv_compact(k_cache, v_cache, blocks, keep, first_slot, layout)
        })
    }

    /// Nothing is recorded here.
    fn forget_recordings(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Zeroed memory that is touched when it is used; a refusal by the system is an error, not an abort.
fn zeroed<T: bytemuck::Zeroable>(len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| Error::OutOfMemory {
        what: "a buffer",
        bytes: (len as u64).saturating_mul(std::mem::size_of::<T>() as u64),
    })
}

fn out_of_range(op: &'static str, start: usize, len: usize) -> Error {
    Error::Shape { op, expected: format!("elements [{start}, {})", start + len), got: "a shorter buffer".into() }
}

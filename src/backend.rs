//! The ops a device offers, with one parameter struct each. The same name runs through every ring: trait method,
//! params struct, launcher, kernel, test and bench.
//!
//! | op | does | shapes |
//! |---|---|---|
//! | `embed` | gather rows | ids \[T\] -> x \[T, hidden\] |
//! | `add_rms_norm` | residual add + RMSNorm, optional step similarity | \[T, hidden\] |
//! | `linear` | y = x W^T (+ b) | \[T, in\] -> \[T, out\] |
//! | `rope_append` | q/k norm, RoPE, write k and v to their slots | qkv \[T, (Hq + 2 Hkv) D\] -> q, KV cache |
//! | `kv_copy_blocks` | copy-on-write of block heads | pairs of block ids |
//! | `paged_attention` | plan-driven prefill, decode and shared segments | q -> o \[T, Hq, D\], lse \[T, Hq\] |
//! | `silu_mul` | SwiGLU gate | \[T, 2 inter\] -> \[T, inter\] |
//! | `gather_rows` | stable selection of rows between segments | \[T, hidden\] -> \[T', hidden\] |
//! | `logits` | final norm + unembedding of chosen rows | \[R, hidden\] -> \[R, vocab\] |
//! | `row_stats` | one sweep over logits: max, lse, entropy, top-1 p, margin | \[R, vocab\] -> \[R\] |
//!
//! *Rounding points, the same in every backend and modelled by the oracle:* the residual stream, norm inputs, scores,
//! softmax sums, logits and the outputs of `linear` are f32; rounded once to the compute type are norm outputs, q, k,
//! v, the unnormalised P before PV, the attention output and the SwiGLU output.

use std::ops::Range;

use crate::batch::AttentionPlan;
use crate::dtype::DType;
use crate::error::Result;
use crate::kv::{BlockCopy, KvLayout};
use crate::model::weights::Tensor;

pub mod cpu;
pub mod cuda;

/// What one op sweep over a logits row yields. Natural logarithms throughout.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct RowStats {
    /// The most likely token; ties go to the lowest id.
    pub argmax: u32,
    /// Its logit.
    pub max: f32,
    /// ln sum exp of the row.
    pub lse: f32,
    /// Entropy of the softmax, in nats.
    pub entropy: f32,
    /// Probability of `argmax`.
    pub top1: f32,
    /// Logit of `argmax` minus the second largest logit.
    pub margin: f32,
    /// 1 when every logit was finite, else 0 (and the other fields mean nothing).
    pub finite: u32,
}

/// Work done since the counters were last reset; what tests and reports assert instead of seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Ops launched.
    pub launches: u64,
    /// Bytes of weights that the ops had to read, each matrix once a call.
    pub weight_bytes: u64,
    /// Bytes of K and V read by attention, each planned tile once a segment.
    pub kv_read_bytes: u64,
    /// Bytes of K and V written by `rope_append` and `kv_copy_blocks`.
    pub kv_write_bytes: u64,
    /// Times the host waited for device results.
    pub read_backs: u64,
}

/// A device that runs the ops. Buffers are flat; every op names its rows and widths.
pub trait Backend: Send + 'static {
    /// Typed device memory.
    type Buf: Send;
    /// A weight matrix, resident: one or several row-stacked parts used as one `[out, in]` matrix.
    type Matrix: Send;

    /// Zeroed memory for `len` elements. Large allocations are touched lazily where the device allows it.
    fn alloc(&self, dtype: DType, len: usize) -> Result<Self::Buf>;
    /// Makes row-stacked parts `[out_i, in]` resident. Parts stay where they are mapped whenever the compute type allows it.
    fn matrix(&self, parts: &[Tensor], compute: DType) -> Result<Self::Matrix>;
    /// Vectors laid end to end and widened to f32 (norm weights, biases).
    fn vector(&self, parts: &[Tensor]) -> Result<Self::Buf>;
    /// Copies `dst.len()` elements from `src[start..]` to the host, widened to f32. Counts one read-back.
    fn read_f32(&mut self, src: &Self::Buf, start: usize, dst: &mut [f32]) -> Result<()>;
    /// The bytes of `src[start..start + len]`, for swapping blocks out.
    fn read_bytes(&mut self, src: &Self::Buf, start: usize, len: usize, dst: &mut Vec<u8>) -> Result<()>;
    /// The inverse of [`read_bytes`](Self::read_bytes); returns how many bytes were taken from `src`.
    fn write_bytes(&mut self, dst: &mut Self::Buf, start: usize, len: usize, src: &[u8]) -> Result<usize>;
    /// Bytes kept on the device for weights beyond what is mapped in place (converted or repacked copies).
    fn matrix_extra_bytes(&self, m: &Self::Matrix) -> u64;
    /// Work counted since the last [`reset_counters`](Self::reset_counters).
    fn counters(&self) -> Counters;
    /// Sets the counters to zero.
    fn reset_counters(&mut self);

    /// See [`Embed`].
    fn embed(&mut self, p: Embed<'_, Self>) -> Result<()>;
    /// See [`AddRmsNorm`].
    fn add_rms_norm(&mut self, p: AddRmsNorm<'_, Self>) -> Result<()>;
    /// See [`Linear`].
    fn linear(&mut self, p: Linear<'_, Self>) -> Result<()>;
    /// See [`RopeAppend`].
    fn rope_append(&mut self, p: RopeAppend<'_, Self>) -> Result<()>;
    /// See [`KvCopyBlocks`].
    fn kv_copy_blocks(&mut self, p: KvCopyBlocks<'_, Self>) -> Result<()>;
    /// See [`PagedAttention`].
    fn paged_attention(&mut self, p: PagedAttention<'_, Self>) -> Result<()>;
    /// See [`SiluMul`].
    fn silu_mul(&mut self, p: SiluMul<'_, Self>) -> Result<()>;
    /// See [`GatherRows`].
    fn gather_rows(&mut self, p: GatherRows<'_, Self>) -> Result<()>;
    /// See [`RowStatsOp`].
    fn row_stats(&mut self, p: RowStatsOp<'_, Self>) -> Result<()>;
}

/// `x[t] = table[ids[t]]`, widened to f32.
pub struct Embed<'a, B: Backend + ?Sized> {
    /// Embedding table `[vocab, hidden]`.
    pub table: &'a B::Matrix,
    /// Token ids `[T]`.
    pub ids: &'a [u32],
    /// Residual stream `[T, hidden]` f32, written.
    pub x: &'a mut B::Buf,
    /// Row width.
    pub hidden: usize,
}

/// `x[t] += delta[t]`, then `y[t] = x[t] * rsqrt(mean(x[t]^2) + eps) * weight`, rounded once to the compute type.
pub struct AddRmsNorm<'a, B: Backend + ?Sized> {
    /// Rows of `x`, `delta` and `y` to work on.
    pub rows: Range<usize>,
    /// Residual stream `[T, hidden]` f32, updated in place.
    pub x: &'a mut B::Buf,
    /// What to add first `[T, hidden]` f32; `None` leaves `x` as it is.
    pub delta: Option<&'a B::Buf>,
    /// Norm weight `[hidden]` f32; `None` stops after the addition.
    pub weight: Option<&'a B::Buf>,
    /// Normed rows `[T, hidden]` in the compute type; untouched when `weight` is `None`.
    pub y: &'a mut B::Buf,
    /// Cosine of each row before and after the addition, `[T]` on the host, in row order of `rows`; written when given.
    pub step_similarity: Option<&'a mut [f32]>,
    /// Row width.
    pub hidden: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// `y[t, n] = sum_k x[t, k] w[n, k] + bias[n]`, f32 accumulation in one fixed order of k for any number of rows.
pub struct Linear<'a, B: Backend + ?Sized> {
    /// Rows of `x` and `y` to work on.
    pub rows: Range<usize>,
    /// Input `[T, in]` in the compute type.
    pub x: &'a B::Buf,
    /// Weights `[out, in]`.
    pub w: &'a B::Matrix,
    /// Bias `[out]` f32.
    pub bias: Option<&'a B::Buf>,
    /// Output `[T, out]` f32.
    pub y: &'a mut B::Buf,
}

/// Splits fused qkv rows, applies the optional per-head q/k RMSNorm and RoPE, and rounds once to the compute type:
/// q goes to `q`, k and v to their slots. The rotation pairs element i with i + head_dim/2 (half-split, as transformers).
pub struct RopeAppend<'a, B: Backend + ?Sized> {
    /// Rows of `qkv`, `q`, `positions` and `slots` to work on.
    pub rows: Range<usize>,
    /// `[T, (Hq + 2 Hkv) * D]` f32: q heads, then k heads, then v heads.
    pub qkv: &'a B::Buf,
    /// `[T, Hq, D]` compute type, written.
    pub q: &'a mut B::Buf,
    /// K of one layer, laid out as [`KvLayout`] says, written at `slots`.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer, written at `slots`.
    pub v_cache: &'a mut B::Buf,
    /// `[T]`: what RoPE uses. Never derived from the slot.
    pub positions: &'a [u32],
    /// `[T]`: `block_id * block_size + offset`.
    pub slots: &'a [u32],
    /// Rotation frequencies `[D / 2]`, radians per position.
    pub inv_freq: &'a [f32],
    /// Multiplies cos and sin (1 except for YaRN-like scaling).
    pub rope_scale: f32,
    /// Per-head q norm weight `[D]` f32 and eps, for families that have it.
    pub q_norm: Option<(&'a B::Buf, f32)>,
    /// Per-head k norm weight `[D]` f32 and eps.
    pub k_norm: Option<(&'a B::Buf, f32)>,
    /// Query heads.
    pub num_q_heads: usize,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Copies block heads within one layer. Destinations are distinct, and no destination is a source.
pub struct KvCopyBlocks<'a, B: Backend + ?Sized> {
    /// What to copy.
    pub copies: &'a [BlockCopy],
    /// K of one layer.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer.
    pub v_cache: &'a mut B::Buf,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Attention of every row over the slots its plan names, with online softmax over 64-slot tiles anchored at the row's
/// slot 0 and folded left to right. Slots at or past a row's `kv_len` do not influence it.
pub struct PagedAttention<'a, B: Backend + ?Sized> {
    /// Who reads which tiles for whom; covers every row once.
    pub plan: &'a AttentionPlan,
    /// `[T, Hq, D]` compute type.
    pub q: &'a B::Buf,
    /// K of one layer.
    pub k_cache: &'a B::Buf,
    /// V of one layer.
    pub v_cache: &'a B::Buf,
    /// `[T, Hq, D]` compute type, written.
    pub o: &'a mut B::Buf,
    /// `[T, Hq]` f32, ln sum exp of the scaled scores, written.
    pub lse: &'a mut B::Buf,
    /// Query heads.
    pub num_q_heads: usize,
    /// 1 / sqrt(head_dim), or what the family says.
    pub sm_scale: f32,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// `y[t, i] = silu(gu[t, i]) * gu[t, inter + i]`, rounded once to the compute type.
pub struct SiluMul<'a, B: Backend + ?Sized> {
    /// Rows to work on.
    pub rows: Range<usize>,
    /// `[T, 2 * inter]` f32: gate, then up.
    pub gate_up: &'a B::Buf,
    /// `[T, inter]` compute type, written.
    pub y: &'a mut B::Buf,
    /// Row width of `y`.
    pub intermediate: usize,
}

/// `dst[i] = src[rows[i]]` for f32 rows.
pub struct GatherRows<'a, B: Backend + ?Sized> {
    /// Source row of each destination row.
    pub rows: &'a [u32],
    /// `[T, width]` f32.
    pub src: &'a B::Buf,
    /// `[rows.len(), width]` f32, written.
    pub dst: &'a mut B::Buf,
    /// Row width.
    pub width: usize,
}

/// One sweep over each logits row. Results land on the host; the caller counts the step's one read-back.
pub struct RowStatsOp<'a, B: Backend + ?Sized> {
    /// `[num_rows, vocab]` f32.
    pub logits: &'a B::Buf,
    /// Rows to read, from row 0.
    pub num_rows: usize,
    /// Row width.
    pub vocab: usize,
    /// `[num_rows]`, written.
    pub stats: &'a mut [RowStats],
}

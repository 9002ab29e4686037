//! The ops a device offers, with one parameter struct each. The same name runs through every ring: trait method,
//! params struct, launcher, kernel, test and bench.
//!
//! | op | does | shapes |
//! |---|---|---|
//! | `embed` | gather rows, scaled | ids \[T\] -> x \[T, hidden\] |
//! | `add_rms_norm` | residual add, RMSNorm before and after it, optional step similarity | \[T, hidden\] |
//! | `exit_rows` | which rows use the second weight set from the next layer on | cosines \[T\] -> route \[T\] |
//! | `linear` | y = x W^T (+ b), with one of two weight sets a row | \[T, in\] -> \[T, out\] |
//! | `rope_append` | q/k norm, RoPE, write k and v to their slots, keep some rows' q | qkv \[T, (Hq + 2 Hkv) D\] -> q, KV cache |
//! | `kv_copy_blocks` | copy-on-write of block heads | pairs of block ids |
//! | `kv_transfer` | K and V of slots for other positions, K turned by the difference | pairs of slots |
//! | `paged_attention` | plan-driven prefill, decode and shared segments | q -> o \[T, Hq, D\], lse \[T, Hq\] |
//! | `glu` | gated MLP: SwiGLU or GeGLU | \[T, 2 inter\] -> \[T, inter\] |
//! | `gather_rows` | stable selection of rows between segments | \[T, hidden\] -> \[T', hidden\] |
//! | `logits` | final norm + unembedding of chosen rows | \[R, hidden\] -> \[R, vocab\] |
//! | `softcap` | logits drawn into (-cap, cap) by tanh | \[R, vocab\] |
//! | `row_stats` | one sweep over logits: max, lse, entropy, top-1 p, margin | \[R, vocab\] -> \[R\] |
//! | `sample` | biases, penalties, temperature, top-k, min-p, top-p, one seeded draw | \[R, vocab\] -> \[R\] |
//! | `entropy_probe` | norm + unembedding + statistics of inner-layer rows, logits never written | \[R, hidden\] -> \[R\] |
//! | `branch_similarity` | layer-weighted cosines to the root and pairwise, cluster labels | \[L, B, hidden\] -> \[B, B\] |
//! | `attention_mass` | exp(score - lse), summed over rows and group | q, K, lse -> \[Hkv, kv_len\] |
//! | `kv_scores` | R-KV: how much the last queries look at a slot, how redundant its key is | q ring, K -> \[Hkv, n - window\] |
//! | `kv_compact` | moves kept slots down in place, each kv head its own set | K, V, keep \[Hkv, num_keep\] |
//!
//! *A pass in order:* [`stage`](Backend::stage) lays out what the host decided (tokens, positions, slots, plan), the ops run,
//! [`read_stats`](Backend::read_stats) waits once for what the next decision needs. Between
//! [`begin_pass`](Backend::begin_pass) and [`end_pass`](Backend::end_pass) a device may record the ops and replay a
//! recording of the same shape instead of launching them one by one.
//!
//! *Rounding points, the same in every backend and modelled by the oracle:* the residual stream, norm inputs, scores,
//! softmax sums, logits and the outputs of `linear` are f32; rounded once to the compute type are norm outputs, q, k,
//! v, the unnormalised P before PV, the attention output and the output of `glu`.

use std::ops::Range;

use crate::batch::{AttentionPlan, TILE_SLOTS, window_start};
use crate::dtype::DType;
use crate::error::Result;
use crate::gate::Scope;
use crate::kv::{BlockCopy, KvLayout, SlotTransfer};
use crate::model::weights::Tensor;
use crate::quant::MatrixPart;
use crate::sampler::{DrawKey, SamplingParams};

mod checks;
pub mod cpu;
pub mod cuda;

/// What one op sweep over a logits row yields. Natural logarithms throughout.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Zeroable, bytemuck::Pod)]
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

/// What [`Backend::sample`] chose for one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its logit, before penalties.
    pub logit: f32,
}

/// In [`PassInputs::ring_rows`]: a row whose q nobody wants later.
pub const NO_RING_ROW: u32 = u32::MAX;

/// What the host decided for a pass, in row order. Staged once a pass, and again when a gate has cut rows.
#[derive(Clone, Debug, Default)]
pub struct PassInputs {
    /// `[T]` what `embed` reads.
    pub token_ids: Vec<u32>,
    /// `[T]` what RoPE uses; never derived from the slot.
    pub positions: Vec<u32>,
    /// `[T]`: `block_id * block_size + offset`, where K and V go.
    pub slots: Vec<u32>,
    /// `[T]` row of the query ring that keeps the row's q, [`NO_RING_ROW`] for none; empty: none at all.
    pub ring_rows: Vec<u32>,
    /// Copy-on-write heads.
    pub copies: Vec<BlockCopy>,
    /// Slots that take their K and V from others; destinations are distinct, and no source.
    pub transfers: Vec<SlotTransfer>,
    /// Who attends to what.
    pub plan: AttentionPlan,
    /// Rows whose logits are wanted.
    pub query_rows: Vec<u32>,
    /// Of each gate that sends rows to the second weight set `[T]`: the rows that decide for the row, `[start, end)`; empty
    /// where the gate has no say.
    pub exits: Vec<Vec<[u32; 2]>>,
}

/// Work done since the counters were last reset; what tests and reports assert instead of seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Ops launched.
    pub launches: u64,
    /// Bytes of weights that the ops had to read, each matrix once a call.
    pub weight_bytes: u64,
    /// Bytes of K and V read by attention, each planned tile once a segment and not below a window, and of K by `attention_mass` and `kv_scores`.
    pub kv_read_bytes: u64,
    /// Bytes of K and V written by `rope_append`, `kv_copy_blocks`, `kv_transfer` and `kv_compact`.
    pub kv_write_bytes: u64,
    /// Times the host waited for device results.
    pub read_backs: u64,
    /// Passes that a recorded graph ran; their ops are counted as launched.
    pub graph_replays: u64,
}

/// A device that runs the ops. Buffers are flat; every op names its rows and widths.
pub trait Backend: Send + 'static {
    /// Typed device memory.
    type Buf: Send;
    /// A weight matrix, resident: one or several row-stacked parts used as one `[out, in]` matrix.
    type Matrix: Send;
    /// A pass's inputs where the ops can read them.
    type Inputs: Send;

    /// Rows of one query tile, for a model with `gqa_group` query heads per kv head: what plans are made with.
    fn max_group_rows(&self, gqa_group: usize) -> usize;
    /// The device in words.
    fn describe(&self) -> String;
    /// Bytes a KV cache may take beside `resident_bytes` of weights and activations, if the device says what it has.
    fn kv_budget(&self, resident_bytes: u64) -> Option<u64>;
    /// Zeroed memory for `len` elements. Large allocations are touched lazily where the device allows it.
    fn alloc(&self, dtype: DType, len: usize) -> Result<Self::Buf>;
    /// Makes row-stacked parts `[out_i, in]` resident. Parts stay where they are mapped whenever the compute type allows it.
    fn matrix(&mut self, parts: &[MatrixPart], compute: DType) -> Result<Self::Matrix>;
    /// Vectors laid end to end and widened to f32 (norm weights, biases).
    fn vector(&mut self, parts: &[Tensor]) -> Result<Self::Buf>;
    /// Host values as f32.
    fn upload(&mut self, values: &[f32]) -> Result<Self::Buf>;
    /// Copies `dst.len()` elements from `src[start..]` to the host, widened to f32. Counts one read-back.
    fn read_f32(&mut self, src: &Self::Buf, start: usize, dst: &mut [f32]) -> Result<()>;
    /// The bytes of `src[start..start + len]`, for swapping blocks out.
    fn read_bytes(&mut self, src: &Self::Buf, start: usize, len: usize, dst: &mut Vec<u8>) -> Result<()>;
    /// The inverse of [`read_bytes`](Self::read_bytes); returns how many bytes were taken from `src`.
    fn write_bytes(&mut self, dst: &mut Self::Buf, start: usize, len: usize, src: &[u8]) -> Result<usize>;
    /// Lays out a pass's inputs.
    fn stage(&mut self, inputs: PassInputs) -> Result<Self::Inputs>;
    /// The ops until [`end_pass`](Self::end_pass) are one pass over `inputs`. `repeatable` says that another pass with as
    /// many rows and queries, and the same number here, launches the same ops in the same order on the same buffers, so
    /// that a recording of it serves.
    fn begin_pass(&mut self, inputs: &Self::Inputs, repeatable: Option<u64>) -> Result<()>;
    /// Every op since [`begin_pass`](Self::begin_pass) has been given to the device.
    fn end_pass(&mut self) -> Result<()>;
    /// Statistics of the first rows of the last [`row_stats`](Self::row_stats). Counts one read-back.
    fn read_stats(&mut self, stats: &mut [RowStats]) -> Result<()>;
    /// Reads the first `dst.len()` rows' route. Counts one read-back, and the bytes that routed [`linear`](Self::linear)s
    /// have read since the last, where the device alone knew which rows went where.
    fn read_route(&mut self, route: &Self::Buf, dst: &mut [f32]) -> Result<()>;
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
    /// Sets the first `num_rows` of a route to infinity: they are in the backbone.
    fn enter_backbone(&mut self, route: &mut Self::Buf, num_rows: usize) -> Result<()>;
    /// See [`ExitRows`].
    fn exit_rows(&mut self, p: ExitRows<'_, Self>) -> Result<()>;
    /// See [`Linear`].
    fn linear(&mut self, p: Linear<'_, Self>) -> Result<()>;
    /// See [`RopeAppend`].
    fn rope_append(&mut self, p: RopeAppend<'_, Self>) -> Result<()>;
    /// See [`KvCopyBlocks`].
    fn kv_copy_blocks(&mut self, p: KvCopyBlocks<'_, Self>) -> Result<()>;
    /// See [`KvTransfer`].
    fn kv_transfer(&mut self, p: KvTransfer<'_, Self>) -> Result<()>;
    /// See [`PagedAttention`].
    fn paged_attention(&mut self, p: PagedAttention<'_, Self>) -> Result<()>;
    /// See [`Glu`].
    fn glu(&mut self, p: Glu<'_, Self>) -> Result<()>;
    /// See [`GatherRows`].
    fn gather_rows(&mut self, p: GatherRows<'_, Self>) -> Result<()>;
    /// See [`Softcap`].
    fn softcap(&mut self, p: Softcap<'_, Self>) -> Result<()>;
    /// See [`RowStatsOp`].
    fn row_stats(&mut self, p: RowStatsOp<'_, Self>) -> Result<()>;
    /// See [`Sample`]. Counts one read-back.
    fn sample(&mut self, p: Sample<'_, Self>) -> Result<()>;
    /// See [`EntropyProbe`].
    fn entropy_probe(&mut self, p: EntropyProbe<'_, Self>) -> Result<()>;
    /// See [`BranchSimilarity`]. Counts one read-back.
    fn branch_similarity(&mut self, p: BranchSimilarity<'_, Self>) -> Result<()>;
    /// See [`AttentionMass`]. Counts one read-back.
    fn attention_mass(&mut self, p: AttentionMass<'_, Self>) -> Result<()>;
    /// See [`KvScores`].
    fn kv_scores(&mut self, p: KvScores<'_, Self>) -> Result<()>;
    /// See [`KvCompact`].
    fn kv_compact(&mut self, p: KvCompact<'_, Self>) -> Result<()>;
    /// Buffers that a recording may name have been replaced: none of them is replayed any more. Not between
    /// [`begin_pass`](Self::begin_pass) and [`end_pass`](Self::end_pass) of a repeatable pass.
    fn forget_recordings(&mut self) -> Result<()>;
}

/// `x[t] = table[ids[t]] * scale`, widened to f32 first.
pub struct Embed<'a, B: Backend + ?Sized> {
    /// Embedding table `[vocab, hidden]`.
    pub table: &'a B::Matrix,
    /// Their `token_ids` `[T]` are looked up.
    pub inputs: &'a B::Inputs,
    /// Residual stream `[T, hidden]` f32, written.
    pub x: &'a mut B::Buf,
    /// 1 keeps every bit of the table.
    pub scale: f32,
    /// Row width.
    pub hidden: usize,
}

/// `x[t] += delta[t]`, then what follows reads of `x[t]`, rounded once to the compute type. A norm is
/// `x * rsqrt(mean(x^2) + eps) * weight`.
pub struct AddRmsNorm<'a, B: Backend + ?Sized> {
    /// Rows of `x`, `delta` and `y` to work on.
    pub rows: Range<usize>,
    /// Residual stream `[T, hidden]` f32, updated in place.
    pub x: &'a mut B::Buf,
    /// What to add first `[T, hidden]` f32; `None` leaves `x` as it is.
    pub delta: Option<&'a B::Buf>,
    /// Weight `[hidden]` f32 of a norm that `delta` takes, in f32, before it is added; without `delta` nothing.
    pub post_norm: Option<&'a B::Buf>,
    /// What `y` becomes.
    pub output: NormOutput<'a, B>,
    /// `[T, hidden]` compute type, written as `output` says.
    pub y: &'a mut B::Buf,
    /// `[T, hidden]` f32, receives `x` as it is after the addition.
    pub keep: Option<&'a mut B::Buf>,
    /// How much the rows after the addition are like what they were.
    pub step_similarity: Option<StepSimilarity<'a, B>>,
    /// Row width.
    pub hidden: usize,
    /// Added to each mean square.
    pub eps: f32,
}

/// What [`AddRmsNorm`] makes of `x` after the addition.
pub enum NormOutput<'a, B: Backend + ?Sized> {
    /// Nothing: `y` is not touched.
    None,
    /// `x` as it is.
    Rounded,
    /// `x` normed with this weight `[hidden]` f32.
    Normed(&'a B::Buf),
}

/// Cosines of rows to what they were; 0 where a norm is 0.
pub struct StepSimilarity<'a, B: Backend + ?Sized> {
    /// `[T, hidden]` f32: the rows as they were.
    pub before: &'a B::Buf,
    /// `[T]` f32, written.
    pub similarity: &'a mut B::Buf,
}

/// `y[t, n] = sum_k x[t, k] w[n, k] + bias[n]`, f32 accumulation in one fixed order of k for any number of rows.
pub struct Linear<'a, B: Backend + ?Sized> {
    /// Rows of `x` and `y` to work on.
    pub rows: Range<usize>,
    /// Input `[T, in]` in the compute type.
    pub x: &'a B::Buf,
    /// Weights `[out, in]`.
    pub w: &'a B::Matrix,
    /// Other weights of the same shape for the rows that have left the backbone.
    pub river: Option<River<'a, B>>,
    /// Bias `[out]` f32.
    pub bias: Option<&'a B::Buf>,
    /// Output `[T, out]` f32.
    pub y: &'a mut B::Buf,
}

/// Lets rows leave the backbone after a layer: `route[t]`, infinite until then, becomes `layer` where the gate fires.
pub struct ExitRows<'a, B: Backend + ?Sized> {
    /// The inputs' `exits` say which rows the gate may send, and by which rows each is decided.
    pub inputs: &'a B::Inputs,
    /// Which of them is the gate's.
    pub gate: usize,
    /// When it fires.
    pub rule: ExitRule<'a, B>,
    /// How far one row's decision reaches: its sequence, or all of the gate's rows.
    pub scope: Scope,
    /// The layer just run, counted from 1; 0 before the first.
    pub layer: u32,
    /// `[T]` f32, updated.
    pub route: &'a mut B::Buf,
}

/// When [`ExitRows`] fires.
pub enum ExitRule<'a, B: Backend + ?Sized> {
    /// For rows number `offset`, `offset + every`, ...
    EveryNth {
        /// Distance between rows, at least 1.
        every: u32,
        /// First row.
        offset: u32,
    },
    /// When, of the n rows that decide, at most `floor(share n)` have a cosine that is not above `tau`.
    Above {
        /// `[T]` f32 of [`StepSimilarity`].
        similarity: &'a B::Buf,
        /// The bound, strict; a NaN is not above it.
        tau: f32,
        /// 0: all must be above.
        share: f32,
    },
}

/// Which rows of a [`Linear`] take which weights: row t takes `w` when `route[t] < layer`, else the op's own.
pub struct River<'a, B: Backend + ?Sized> {
    /// Weights `[out, in]` of the rows that have left.
    pub w: &'a B::Matrix,
    /// `[T]` f32: how many layers a row has run in the backbone before it left; infinite while it is there.
    pub route: &'a B::Buf,
    /// The layer that the op belongs to, counted from 1.
    pub layer: u32,
}

/// Splits fused qkv rows, applies the optional q/k RMSNorm, then RoPE, and rounds once to the compute type: q goes to
/// `q`, k and v to their slots. The rotation pairs element i with i + rotary_dim/2 (half-split, as transformers); a head's
/// elements from `rotary_dim` on pass, not multiplied by `rope_scale` either.
pub struct RopeAppend<'a, B: Backend + ?Sized> {
    /// Rows of `qkv`, `q`, and of the inputs' `positions` and `slots`, to work on.
    pub rows: Range<usize>,
    /// Positions and slots of all rows.
    pub inputs: &'a B::Inputs,
    /// `[T, (Hq + 2 Hkv) * D]` f32: q heads, then k heads, then v heads.
    pub qkv: &'a B::Buf,
    /// `[T, Hq, D]` compute type, written.
    pub q: &'a mut B::Buf,
    /// `[.., Hq, D]` compute type: q of a row once more, at the inputs' `ring_rows`. There is one where any are named.
    pub query_ring: Option<&'a mut B::Buf>,
    /// K of one layer, laid out as [`KvLayout`] says, written at the rows' slots.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer, written at the rows' slots.
    pub v_cache: &'a mut B::Buf,
    /// Rotation frequencies `[rotary_dim / 2]` f32, radians per position.
    pub inv_freq: &'a B::Buf,
    /// Elements of a head that turn: even, from 2 to `D`.
    pub rotary_dim: usize,
    /// Multiplies cos and sin (1 except for YaRN-like scaling).
    pub rope_scale: f32,
    /// For families that have it.
    pub qk_norm: Option<QkNorm<'a, B>>,
    /// Query heads.
    pub num_q_heads: usize,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Norms of q and k in [`RopeAppend`]: `x * rsqrt(mean(x^2) + eps) * weight`; v takes none.
pub struct QkNorm<'a, B: Backend + ?Sized> {
    /// Weight of q, f32, `[D]` or `[Hq * D]` as `span` says.
    pub q: &'a B::Buf,
    /// Weight of k, f32, `[D]` or `[Hkv * D]`.
    pub k: &'a B::Buf,
    /// Added to the mean square.
    pub eps: f32,
    /// What the mean runs over.
    pub span: NormSpan,
}

/// What a q or k norm runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum NormSpan {
    /// Each head for itself.
    Head,
    /// All of a row's q heads together, and all of its k heads.
    Row,
}

/// Copies block heads within one layer. Destinations are distinct, and no destination is a source.
pub struct KvCopyBlocks<'a, B: Backend + ?Sized> {
    /// Their `copies` are done.
    pub inputs: &'a B::Inputs,
    /// K of one layer.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer.
    pub v_cache: &'a mut B::Buf,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Takes K and V of slots from others within one layer: V as it is; K, which RoPE has turned to its position, by the
/// difference on. Rounded once more where that is not 0.
pub struct KvTransfer<'a, B: Backend + ?Sized> {
    /// Their `transfers` are done.
    pub inputs: &'a B::Inputs,
    /// K of one layer.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer.
    pub v_cache: &'a mut B::Buf,
    /// Rotation frequencies `[rotary_dim / 2]` f32, radians per position.
    pub inv_freq: &'a B::Buf,
    /// Elements of a head that turn, as in [`RopeAppend`]; the others are copied.
    pub rotary_dim: usize,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Attention of every row over the slots its plan names, with online softmax over 64-slot tiles anchored at the row's
/// slot 0 and folded left to right. Slots at or past a row's `kv_len` do not influence it, nor do those below its window.
pub struct PagedAttention<'a, B: Backend + ?Sized> {
    /// Their `plan` says who reads which tiles for whom; it covers every row once.
    pub inputs: &'a B::Inputs,
    /// `[T, Hq, D]` compute type.
    pub q: &'a B::Buf,
    /// K of one layer.
    pub k_cache: &'a B::Buf,
    /// V of one layer.
    pub v_cache: &'a B::Buf,
    /// `[T, Hq, D]` compute type, written.
    pub o: &'a mut B::Buf,
    /// `[T, Hq]` f32, ln sum exp of the scores, scaled and capped, of the slots attended to, written.
    pub lse: &'a mut B::Buf,
    /// Query heads.
    pub num_q_heads: usize,
    /// 1 / sqrt(head_dim), or what the family says.
    pub sm_scale: f32,
    /// A row of `kv_len` n attends to slots `[n - window, n)`, its own among them; `None`: to all. At least 1. Slots are
    /// positions as long as nothing was cut from the sequence.
    pub window: Option<usize>,
    /// Scores are `softcap * tanh(sm_scale q k / softcap)`; `None`: `sm_scale q k`. Above 0.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// `y[t, i] = activation(gu[t, i]) * gu[t, inter + i]`, rounded once to the compute type.
pub struct Glu<'a, B: Backend + ?Sized> {
    /// Rows to work on.
    pub rows: Range<usize>,
    /// `[T, 2 * inter]` f32: gate, then up.
    pub gate_up: &'a B::Buf,
    /// `[T, inter]` compute type, written.
    pub y: &'a mut B::Buf,
    /// Row width of `y`.
    pub intermediate: usize,
    /// What the gate goes through.
    pub activation: Activation,
}

/// The function of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Activation {
    /// `g / (1 + e^-g)`.
    Silu,
    /// GELU in its form with tanh: `g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))`.
    GeluTanh,
}

/// `dst[dst_row + i] = src[rows[i]]` for f32 rows.
pub struct GatherRows<'a, B: Backend + ?Sized> {
    /// Source row of each destination row.
    pub rows: RowIds<'a, B>,
    /// `[T, width]` f32.
    pub src: &'a B::Buf,
    /// `[.., width]` f32, written from row `dst_row` on.
    pub dst: &'a mut B::Buf,
    /// First destination row.
    pub dst_row: usize,
    /// Row width.
    pub width: usize,
}

/// Row numbers for [`GatherRows`].
pub enum RowIds<'a, B: Backend + ?Sized> {
    /// At hand.
    Given(&'a [u32]),
    /// A range of the inputs' `query_rows`, which may change from one replay of a recording to the next.
    Queried(&'a B::Inputs, Range<usize>),
}

/// `logits = cap * tanh(logits / cap)`, in place. A NaN stays one; an infinity becomes `cap`.
pub struct Softcap<'a, B: Backend + ?Sized> {
    /// `[num_rows, vocab]` f32, updated.
    pub logits: &'a mut B::Buf,
    /// Rows to work on, from row 0.
    pub num_rows: usize,
    /// Row width.
    pub vocab: usize,
    /// The bound, above 0.
    pub cap: f32,
}

/// One sweep over each logits row. Results stay on the device until [`Backend::read_stats`].
pub struct RowStatsOp<'a, B: Backend + ?Sized> {
    /// `[num_rows, vocab]` f32.
    pub logits: &'a B::Buf,
    /// Rows to read, from row 0.
    pub num_rows: usize,
    /// Row width.
    pub vocab: usize,
}

/// One draw per row of `logits`, from row 0.
pub struct Sample<'a, B: Backend + ?Sized> {
    /// `[num_rows, vocab]` f32; scratch afterwards where a row has penalties or biases.
    pub logits: &'a mut B::Buf,
    /// Row width.
    pub vocab: usize,
    /// How each row is drawn.
    pub rows: &'a [SampleRow<'a>],
    /// `[rows.len()]` on the host, written.
    pub sampled: &'a mut [Sampled],
}

/// How one row is drawn.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// Temperature, truncations, penalties, seed.
    pub params: &'a SamplingParams,
    /// Added to logits before anything else: token, bias; no two of one token. Minus infinity bans it.
    pub bias: &'a [(u32, f32)],
    /// The branch's tokens before generation.
    pub prompt: &'a [u32],
    /// Those since.
    pub generated: &'a [u32],
    /// Branch path and position.
    pub key: DrawKey,
}

/// Statistics of what each row would say if it were unembedded now. They stay on the device until
/// [`Backend::read_stats`], as after [`RowStatsOp`]; `argmax` is a token id.
pub struct EntropyProbe<'a, B: Backend + ?Sized> {
    /// Residual rows `[num_rows, hidden]` f32, of one or several layers.
    pub x: &'a B::Buf,
    /// Rows to read, from row 0.
    pub num_rows: usize,
    /// Weight of the norm before the unembedding `[hidden]` f32; `None` takes `x` as it is.
    pub norm: Option<&'a B::Buf>,
    /// Added to the mean square.
    pub eps: f32,
    /// Unembedding `[vocab, hidden]`.
    pub w: &'a B::Matrix,
    /// Token ids the softmax runs over, ascending; `None`: the vocabulary.
    pub candidates: Option<&'a [u32]>,
    /// Row width.
    pub hidden: usize,
}

/// `sum_l w_l cos(h_b^l, h_c^l)` of each branch with the root and with each other branch, and the clusters at `tau`.
pub struct BranchSimilarity<'a, B: Backend + ?Sized> {
    /// `[num_layers, num_branches, hidden]` f32.
    pub states: &'a B::Buf,
    /// `[num_layers, hidden]` f32.
    pub root: &'a B::Buf,
    /// `[num_layers]`, summing to 1.
    pub layer_weights: &'a [f32],
    /// Branches.
    pub num_branches: usize,
    /// Row width.
    pub hidden: usize,
    /// From this similarity on, two branches are one cluster.
    pub tau: f32,
    /// On the host, written.
    pub similarity: &'a mut Similarity,
}

/// What [`BranchSimilarity`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Similarity {
    /// `[num_branches]`: with the root.
    pub to_root: Vec<f32>,
    /// `[num_branches, num_branches]`, symmetric, exactly 1 on the diagonal.
    pub pairwise: Vec<f32>,
    /// `[num_branches]`: the representative of each branch's cluster; see [`crate::gate::cluster`].
    pub labels: Vec<u32>,
}

/// The attention each cached slot received from a sequence's rows: `exp(score - lse)`, summed over the rows that attend
/// to it and the query heads of a kv head.
pub struct AttentionMass<'a, B: Backend + ?Sized> {
    /// `[T, Hq, D]` compute type, after RoPE.
    pub q: &'a B::Buf,
    /// K of one layer.
    pub k_cache: &'a B::Buf,
    /// `[T, Hq]` f32, of the same layer's `paged_attention`.
    pub lse: &'a B::Buf,
    /// Block tables of the sequences, one behind the other.
    pub blocks: &'a [u32],
    /// Who is asked about.
    pub sequences: &'a [MassSequence],
    /// Query heads.
    pub num_q_heads: usize,
    /// As in `paged_attention`.
    pub sm_scale: f32,
    /// As in `paged_attention`; what all rows have left behind has no mass.
    pub window: Option<usize>,
    /// As in `paged_attention`.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
    /// On the host, written: `[Hkv, kv_len]` of each sequence, one behind the other.
    pub mass: &'a mut Vec<f32>,
}

/// A sequence of [`AttentionMass`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MassSequence {
    /// Its rows in `q` and `lse`.
    pub rows: Range<usize>,
    /// Where its table begins in `blocks`.
    pub block_start: usize,
    /// Slots up to its last row's own; each earlier row one fewer.
    pub kv_len: usize,
}

impl MassSequence {
    /// Where the first tile begins that some row attends to.
    fn first_slot(&self, window: Option<usize>) -> usize {
        window_start((self.kv_len + 1).saturating_sub(self.rows.len()), window) / TILE_SLOTS * TILE_SLOTS
    }

    /// Slots of the tiles that some row attends to.
    fn slots_read(&self, window: Option<usize>) -> usize {
        self.kv_len - self.first_slot(window).min(self.kv_len)
    }
}

/// Which of the three published forms of R-KV scores slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RkvVariant {
    /// The reference code: column means of the cosines, each key's link to its newest similar key left out of *that* key's
    /// column (slot 0's where there is none), so that the newest of several duplicates stays; importance is pooled over
    /// `pool_size` slots after the mean over the queries.
    #[default]
    Code,
    /// The paper's text: a key loses its own link to its newest similar key, so none of the duplicates is preferred; each
    /// query's attention is pooled over `[i - pool_size / 2, i + pool_size / 2 - 1]` before the mean.
    Text,
    /// The paper's Algorithm 1: redundancy as in the text, pooling as in the code.
    Alg1,
}

/// `lambda * importance - (1 - lambda) * redundancy` of each slot but the last `window`, for one sequence and layer.
/// Nothing of the size `num_slots^2` is kept. Formulas: `testing::kv_scores`.
pub struct KvScores<'a, B: Backend + ?Sized> {
    /// `[.., Hq, D]` compute type, after RoPE.
    pub queries: &'a B::Buf,
    /// The last queries' rows of `queries`, in any order; importance is their mean.
    pub query_rows: Range<usize>,
    /// K of one layer.
    pub k_cache: &'a B::Buf,
    /// The sequence's table.
    pub blocks: &'a [u32],
    /// Slots it holds; the newest is the last.
    pub num_slots: usize,
    /// Last slots that are no candidates; they take part in redundancy.
    pub window: usize,
    /// Odd.
    pub pool_size: usize,
    /// See [`RkvVariant`].
    pub variant: RkvVariant,
    /// Share of the importance; at 1 redundancy is not computed.
    pub lambda: f32,
    /// Cosine above which two keys are similar.
    pub threshold: f32,
    /// Query heads.
    pub num_q_heads: usize,
    /// As in `paged_attention`.
    pub sm_scale: f32,
    /// As in `paged_attention`.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
    /// f32; `[Hkv, num_slots - window]` is written from element `scores_start` on.
    pub scores: &'a mut B::Buf,
    /// See `scores`.
    pub scores_start: usize,
}

/// For `i` ascending, slot `first_slot + i` of kv head `h` takes K and V of slot `keep[h][i]`, bit for bit, in one layer.
pub struct KvCompact<'a, B: Backend + ?Sized> {
    /// K of one layer.
    pub k_cache: &'a mut B::Buf,
    /// V of one layer.
    pub v_cache: &'a mut B::Buf,
    /// The sequence's table; nobody else holds the blocks from `first_slot` on.
    pub blocks: &'a [u32],
    /// `[Hkv, num_keep]`, each head's ascending, `keep[h][i] >= first_slot + i`.
    pub keep: &'a [u32],
    /// Where they go.
    pub first_slot: usize,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

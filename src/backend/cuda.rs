//! The CUDA backend: one set of ops over two devices, a GPU and its emulation on the host.
//!
//! An op fills its params from typed buffers and hands them to the device; nothing here touches memory. A pass's inputs
//! go up in one copy (`cuda/inputs.rs`); scratch belongs to the backend and grows to the largest pass. A decode step is
//! recorded as a graph the second time its shape comes by, and replayed from then on (`cuda/graphs.rs`).
//!
//! Up to 16 rows `linear` is a handwritten kernel that streams the weights; above that a GPU uses cuBLASLt for dense ones,
//! and the emulation the same kernel, 16 rows at a time. So do weights in codes, and rows with a route.

#[doc(hidden)]
pub mod attention_items;
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, missing_docs, non_camel_case_types, unsafe_code)]
#[doc(hidden)]
pub mod bindings;
mod compression;
#[allow(unsafe_code)]
pub mod cublas;
#[allow(unsafe_code)]
pub mod device;
mod graphs;
mod inputs;
#[cfg(feature = "cust-interop")]
#[allow(unsafe_code)]
pub mod interop;
#[allow(unsafe_code)]
#[doc(hidden)]
pub mod kernels;
mod linear;
mod matrix;
mod ops;
mod probes;

use self::cublas::Cublas;
use self::device::{Device, DeviceBuf};
use self::graphs::{Graphs, Mode};
use self::inputs::InputStore;
use self::linear::RoutedLinear;
pub use self::matrix::CudaMatrix;
use super::Counters;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Head dims that `paged_attention` is compiled for.
const HEAD_DIMS: [usize; 6] = [32, 64, 80, 96, 128, 256];

/// Device memory of one element type.
pub struct CudaBuf {
    memory: DeviceBuf<u8>,
    dtype: DType,
    len: usize,
}

/// See the module text.
pub struct Cuda {
    device: Device,
    inputs: InputStore,
    graphs: Graphs,
    /// Heads, for the work lists of attention.
    heads: Heads,
    /// How rows of the pass under way are rounded up; `None` when it is not a step that may be recorded.
    padding: Option<Padding>,
    scratch: Scratch,
    /// For products of many rows; loaded when the first comes.
    cublas: Option<Cublas>,
    /// Their weights are counted when the route is read.
    routed: Vec<RoutedLinear>,
    counters: Counters,
}

/// Heads of the model's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub num_q_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Tokens per KV block.
    pub block_size: usize,
}

/// How the rows of a decode step are rounded up; every row is queried, so there are as many queries.
#[derive(Clone, Copy)]
struct Padding {
    num_rows: usize,
    rows: usize,
}

/// Memory of single ops, as large as the largest call so far. The parts marked so are zeroed once, and left zeroed.
#[derive(Default)]
struct Scratch {
    /// `linear`; zeroed.
    linear: Option<DeviceBuf<u8>>,
    /// Rows of x in the order of columns of the codes.
    columns: Option<DeviceBuf<u8>>,
    /// `row_stats`; zeroed.
    row_stats: Option<DeviceBuf<u8>>,
    /// Results of `row_stats` and `entropy_probe`.
    stats: Option<DeviceBuf<u8>>,
    /// `entropy_probe`, and its candidates.
    probe: Option<DeviceBuf<u8>>,
    candidates: Option<DeviceBuf<u8>>,
    /// `branch_similarity`, its weights and its results.
    similarities: Option<DeviceBuf<u8>>,
    layer_weights: Option<DeviceBuf<u8>>,
    similarity_results: Option<DeviceBuf<u8>>,
    /// Sequences, tables and results of `attention_mass`.
    mass_sequences: Option<DeviceBuf<u8>>,
    mass_blocks: Option<DeviceBuf<u8>>,
    mass: Option<DeviceBuf<u8>>,
    /// `kv_scores`, and the tables of it and of `kv_compact`, and what that keeps.
    kv_scores: Option<DeviceBuf<u8>>,
    kv_blocks: Option<DeviceBuf<u8>>,
    kv_keep: Option<DeviceBuf<u8>>,
    /// Unmerged outputs of `paged_attention`.
    partial_o: Option<DeviceBuf<u8>>,
    /// Their maxima and sums.
    partial_ml: Option<DeviceBuf<u8>>,
    /// Its counters; zeroed.
    arrivals: Option<DeviceBuf<u8>>,
    /// Row numbers of `gather_rows`.
    row_ids: Option<DeviceBuf<u8>>,
    /// Rows of `sample`, its tokens, the logits it changes for them, its results.
    sample_rows: Option<DeviceBuf<u8>>,
    history: Option<DeviceBuf<u8>>,
    saved: Option<DeviceBuf<u8>>,
    sampled: Option<DeviceBuf<u8>>,
}

impl Cuda {
    /// The backend on a device, for models with these heads.
    pub fn new(device: Device, heads: Heads) -> Self {
        Self {
            device,
            heads,
            inputs: InputStore::default(),
            graphs: Graphs::default(),
            padding: None,
            scratch: Scratch::default(),
            cublas: None,
            routed: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Refuses attention heads that no kernel was made for.
    pub fn check_heads(head_dim: usize, gqa_group: usize) -> Result<()> {
        let refuse = |what: String| Err(Error::Unsupported { op: "paged_attention on a CUDA device", what });
        if !HEAD_DIMS.contains(&head_dim) {
            return refuse(format!("head_dim {head_dim} (it takes {HEAD_DIMS:?}; use --device cpu)"));
        }
        if gqa_group > bindings::RKSC_ATTENTION_MAX_ROWS as usize {
            return refuse(format!("{gqa_group} query heads per kv head"));
        }
        Ok(())
    }

    /// What the device is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn launched(&mut self) -> &mut Counters {
        self.counters.launches += 1;
        &mut self.counters
    }

    /// How many rows an op of `num_rows` rows is launched for.
    fn padded(&self, num_rows: usize) -> usize {
        match self.padding {
            Some(p) if num_rows == p.num_rows => p.rows,
            _ => num_rows,
        }
    }

    /// Gives the op to the device, unless a recording holds it already.
    fn launch<P: Copy + 'static>(&mut self, launcher: kernels::Launcher<P>, params: &P) -> Result<()> {
        match self.graphs.mode() {
            Mode::Skip => Ok(()),
            Mode::Launch | Mode::Record => self.device.launch(launcher, params),
        }
    }
}

/// The address of `bytes` bytes of scratch, which is made larger when it is too small: then recordings are forgotten.
fn grow(device: &Device, graphs: &mut Graphs, slot: &mut Option<DeviceBuf<u8>>, bytes: usize) -> Result<*mut u8> {
    if slot.as_ref().is_none_or(|b| b.len() < bytes) {
        if graphs.mode() != Mode::Launch {
            return Err(Error::Internal("scratch grows while a graph is recorded".into()));
        }
        *slot = Some(device.zeroed(bytes.next_power_of_two())?);
        graphs.forget();
    }
    Ok(slot.as_mut().map_or(std::ptr::null_mut(), DeviceBuf::ptr_mut))
}

/// Copies `bytes` to the start of scratch, which is made larger when it is too small.
fn put(device: &mut Device, graphs: &mut Graphs, slot: &mut Option<DeviceBuf<u8>>, bytes: &[u8]) -> Result<*const u8> {
    let at = grow(device, graphs, slot, bytes.len())?;
    if let Some(buf) = slot {
        device.upload(buf, 0, bytes)?;
    }
    Ok(at)
}

impl CudaBuf {
    fn new(device: &Device, dtype: DType, len: usize) -> Result<Self> {
        Ok(Self { memory: device.zeroed(len * dtype.size_bytes())?, dtype, len })
    }

    /// The address of elements `[start, start + len)`, which must be there and of type `dtype`.
    fn at(&self, op: &'static str, dtype: DType, start: usize, len: usize) -> Result<*const u8> {
        self.check(op, dtype, start, len)?;
        Ok(self.memory.ptr().wrapping_add(start * dtype.size_bytes()))
    }

    /// The same, to be written through.
    fn at_mut(&mut self, op: &'static str, dtype: DType, start: usize, len: usize) -> Result<*mut u8> {
        self.check(op, dtype, start, len)?;
        Ok(self.memory.ptr_mut().wrapping_add(start * dtype.size_bytes()))
    }

    fn check(&self, op: &'static str, dtype: DType, start: usize, len: usize) -> Result<()> {
        if self.dtype == dtype && start + len <= self.len {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            expected: format!("{dtype} elements [{start}, {})", start + len),
            got: format!("{} of {}", self.len, self.dtype),
        })
    }
}

//! Memory, launches and graphs, once over two devices: a GPU through its driver, and the emulation in host memory.
//!
//! - One stream: what is asked for happens in that order. [`Device::launch`] returns before a GPU has run the kernel;
//!   [`Device::download`] and [`Device::synchronize`] wait. The emulation runs everything at once.
//! - Memory belongs to a [`DeviceBuf`], which frees it in stream order when dropped. Buffers named in the params of a
//!   launch must live until the call returns, those named in a [`Graph`] as long as the graph is launched.
//! - After an error that a CUDA context does not survive, the device is lost and every later call says so.
//! - `RKSC_SYNC=1` waits after every op, which pins an asynchronous fault to the op that caused it.
//!
//! References to device memory do not exist: the host copies through raw pointers, kernels see addresses. That is why
//! `launch` is safe although params hold addresses. It runs launchers of `rksc_kernels.h` alone; the emulation checks
//! their every access against the memory alive, and on a GPU a wrong address harms device memory or loses the device.

use std::cell::Cell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytemuck::Pod;

use super::kernels::{Kernels, Launcher};
use crate::error::{Error, Result};

mod codes;
mod emulated;
#[cfg(feature = "cuda")]
mod gpu;

use codes::Code;
use emulated::Emulated;
pub use emulated::WarpOrder;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceInfo {
    /// As the user names it: `cuda:0`, or `emulated`.
    pub device: String,
    /// The product.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// Memory.
    pub total_bytes: u64,
    /// Memory that was free when this was asked; none where the GPU does not let us in.
    pub free_bytes: Option<u64>,
    /// CUDA version of the driver, e.g. `13.0`; none for the emulation.
    pub driver: Option<String>,
}

/// A device, its one stream, and the kernels compiled for it.
pub struct Device {
    kind: Kind,
    kernels: Kernels,
    info: DeviceInfo,
    /// Wait after every op.
    sync: bool,
    capturing: bool,
    /// The op and the code that the device was lost with.
    lost: Cell<Option<(&'static str, i32)>>,
}

#[cfg_attr(not(feature = "emulated-kernels"), allow(dead_code))]
enum Kind {
    Emulated(Emulated),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Gpu),
}

/// Runs `$body` with `$device` bound to either device.
macro_rules! either {
    ($kind:expr, $device:ident => $body:expr) => {
        match $kind {
            Kind::Emulated($device) => $body,
            #[cfg(feature = "cuda")]
            Kind::Gpu($device) => $body,
        }
    };
}

/// The same with `$memory` bound to the memory of `$buf`, which must be of the same device.
macro_rules! with_memory {
    ($op:literal, $kind:expr, $buf:expr, ($device:ident, $memory:ident) => $body:expr) => {
        match ($kind, &$buf.memory) {
            (Kind::Emulated($device), Memory::Emulated($memory)) => $body,
            #[cfg(feature = "cuda")]
            (Kind::Gpu($device), Memory::Gpu($memory)) => $body,
            #[cfg(feature = "cuda")]
            _ => return Err(foreign($op)),
        }
    };
}

#[cfg(feature = "cuda")]
fn foreign(op: &'static str) -> Error {
    Error::Internal(format!("{op}: a buffer of another device"))
}

impl Device {
    /// GPU number `ordinal`, or why there is none.
    pub fn gpu(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            let (gpu, info) = gpu::Gpu::open(ordinal)?;
            Ok(Self::new(Kind::Gpu(gpu), Kernels::native(), info))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ordinal;
            Err(Error::CudaUnavailable { why: "this build has no CUDA backend (feature `cuda`)".into() })
        }
    }

    /// The same on a stream of somebody else, a `cudaStream_t` or `CUstream`.
    ///
    /// # Safety
    /// `stream` belongs to the primary context of GPU `ordinal` and outlives the device, its buffers and its graphs.
    pub unsafe fn gpu_on_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            // SAFETY: the caller's promise.
            let (gpu, info) = unsafe { gpu::Gpu::on_stream(ordinal, stream) }?;
            Ok(Self::new(Kind::Gpu(gpu), Kernels::native(), info))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = stream;
            Self::gpu(ordinal)
        }
    }

    /// The kernels on the host, checked; for tests.
    pub fn emulated() -> Result<Self> {
        #[cfg(feature = "emulated-kernels")]
        {
            let (emulated, info) = Emulated::open();
            Ok(Self::new(Kind::Emulated(emulated), Kernels::emulated(), info))
        }
        #[cfg(not(feature = "emulated-kernels"))]
        Err(Error::CudaUnavailable { why: "this build has no emulated kernels (feature `emulated-kernels`)".into() })
    }

    #[cfg(any(feature = "cuda", feature = "emulated-kernels"))]
    fn new(kind: Kind, kernels: Kernels, info: DeviceInfo) -> Self {
        let sync = std::env::var_os("RKSC_SYNC").is_some_and(|value| value == "1");
        Self { kind, kernels, info, sync, capturing: false, lost: Cell::new(None) }
    }

    /// What it is, as it was when opened.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Memory free now.
    pub fn free_bytes(&self) -> Result<u64> {
        self.alive()?;
        self.check("free_bytes", either!(&self.kind, d => d.free_bytes()))
    }

    /// The launchers for [`launch`](Self::launch), and the sizes of their scratch.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Whether this is the emulation.
    pub fn is_emulated(&self) -> bool {
        matches!(self.kind, Kind::Emulated(_))
    }

    /// The order in which the emulation runs CTAs, warps and lanes from here on. A GPU has its own.
    #[doc(hidden)]
    pub fn set_warp_order(&mut self, order: WarpOrder) {
        match &mut self.kind {
            Kind::Emulated(d) => d.order = order,
            #[cfg(feature = "cuda")]
            Kind::Gpu(_) => {}
        }
    }

    // ---- memory -------------------------------------------------------------------------------------------------

    /// Memory for `len` elements, 256-byte aligned, with any contents (all bits set in the emulation: NaN as a float).
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<DeviceBuf<T>> {
        self.allocate(len, false)
    }

    /// Zeroed memory for `len` elements, 256-byte aligned.
    pub fn zeroed<T: Pod>(&self, len: usize) -> Result<DeviceBuf<T>> {
        self.allocate(len, true)
    }

    fn allocate<T: Pod>(&self, len: usize, zeroed: bool) -> Result<DeviceBuf<T>> {
        self.outside_capture("alloc")?;
        let too_large = || Error::OutOfMemory { what: "a device buffer", bytes: (len as u64).saturating_mul(16) };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&b| b <= isize::MAX as usize).ok_or_else(too_large)?;
        let memory = match either!(&self.kind, d => d.alloc(bytes, zeroed).map(Memory::from)) {
            Err(codes::OUT_OF_MEMORY) => {
                return Err(Error::OutOfMemory { what: "a device buffer", bytes: bytes as u64 });
            }
            other => self.check("alloc", other)?,
        };
        Ok(DeviceBuf { memory, len, elements: PhantomData })
    }

    /// A buffer holding `src`.
    pub fn buffer<T: Pod>(&mut self, src: &[T]) -> Result<DeviceBuf<T>> {
        let mut buf = self.alloc(src.len())?;
        self.upload(&mut buf, 0, src)?;
        Ok(buf)
    }

    /// `dst[start..start + src.len()] = src`. On return `src` may change.
    pub fn upload<T: Pod>(&mut self, dst: &mut DeviceBuf<T>, start: usize, src: &[T]) -> Result<()> {
        self.outside_capture("upload")?;
        let bytes = dst.bytes("upload", start, src.len())?;
        let src = bytemuck::cast_slice(src);
        let code = with_memory!("upload", &mut self.kind, dst, (d, to) => d.upload(to, bytes.start, src));
        self.check("upload", code)
    }

    /// `dst = src[start..start + dst.len()]`, after everything asked for before.
    pub fn download<T: Pod>(&mut self, src: &DeviceBuf<T>, start: usize, dst: &mut [T]) -> Result<()> {
        self.outside_capture("download")?;
        let bytes = src.bytes("download", start, dst.len())?;
        let dst = bytemuck::cast_slice_mut(dst);
        let code = with_memory!("download", &mut self.kind, src, (d, from) => d.download(from, bytes.start, dst));
        self.check("download", code)
    }

    /// All of `src` on the host.
    pub fn to_vec<T: Pod>(&mut self, src: &DeviceBuf<T>) -> Result<Vec<T>> {
        let mut all = bytemuck::zeroed_vec(src.len());
        self.download(src, 0, &mut all)?;
        Ok(all)
    }

    /// `dst[to..to + from.len()] = src[from]`. Becomes a part of a graph being captured.
    pub fn copy<T: Pod>(
        &mut self,
        src: &DeviceBuf<T>,
        from: Range<usize>,
        dst: &mut DeviceBuf<T>,
        to: usize,
    ) -> Result<()> {
        self.alive()?;
        let source = src.bytes("copy", from.start, from.len())?;
        let target = dst.bytes("copy", to, from.len())?;
        let code = match (&mut self.kind, &src.memory, &dst.memory) {
            (Kind::Emulated(d), Memory::Emulated(from), Memory::Emulated(to)) => d.copy(from, source, to, target.start),
            #[cfg(feature = "cuda")]
            (Kind::Gpu(d), Memory::Gpu(from), Memory::Gpu(to)) => d.copy(from, source, to, target.start),
            #[cfg(feature = "cuda")]
            _ => return Err(foreign("copy")),
        };
        self.check("copy", code)
    }

    /// Zeroes all of `dst`. Becomes a part of a graph being captured.
    pub fn zero<T: Pod>(&mut self, dst: &mut DeviceBuf<T>) -> Result<()> {
        self.alive()?;
        let bytes = dst.len * size_of::<T>();
        let code = with_memory!("zero", &mut self.kind, dst, (d, to) => d.zero(to, bytes));
        self.check("zero", code)
    }

    // ---- work ---------------------------------------------------------------------------------------------------

    /// Launches an op: `device.launch(device.kernels().glu, &params)`. Becomes a part of a graph being captured.
    pub fn launch<P: Copy + 'static>(&mut self, launcher: Launcher<P>, params: &P) -> Result<()> {
        self.alive()?;
        let code = either!(&mut self.kind, d => d.launch(launcher, params));
        self.check(launcher.op(), code)?;
        self.after(launcher.op())
    }

    /// Waits until everything asked for is done.
    pub fn synchronize(&mut self) -> Result<()> {
        self.outside_capture("synchronize")?;
        self.wait("synchronize")
    }

    fn wait(&mut self, op: &'static str) -> Result<()> {
        let code = either!(&mut self.kind, d => d.synchronize());
        self.check(op, code)
    }

    /// The stream, a `cudaStream_t`, for work that is not a launch of ours, with its context current on this thread.
    pub fn raw_stream(&self, op: &'static str) -> Result<*mut c_void> {
        self.alive()?;
        match &self.kind {
            Kind::Emulated(_) => Err(Error::Unsupported { op, what: "the emulated device".into() }),
            #[cfg(feature = "cuda")]
            Kind::Gpu(d) => self.check(op, d.raw_stream()),
        }
    }

    /// To be called behind every op.
    pub(super) fn after(&mut self, op: &'static str) -> Result<()> {
        if self.sync && !self.capturing { self.wait(op) } else { Ok(()) }
    }

    /// Records what follows instead of running it, until [`end_capture`](Self::end_capture). Memory can neither be
    /// allocated nor be read or written from the host meanwhile.
    pub fn begin_capture(&mut self) -> Result<()> {
        self.outside_capture("begin_capture")?;
        let code = either!(&mut self.kind, d => d.begin_capture());
        self.check("begin_capture", code)?;
        self.capturing = true;
        Ok(())
    }

    /// The graph of what was asked for since [`begin_capture`](Self::begin_capture); nothing of it has run. To be called
    /// after a failed op too: the error is the graph's then.
    pub fn end_capture(&mut self) -> Result<Graph> {
        self.alive()?;
        if !std::mem::take(&mut self.capturing) {
            return Err(Error::Internal("end_capture without begin_capture".into()));
        }
        let graph = match &mut self.kind {
            Kind::Emulated(d) => d.end_capture().map(GraphKind::Emulated),
            #[cfg(feature = "cuda")]
            Kind::Gpu(d) => d.end_capture().map(GraphKind::Gpu),
        };
        Ok(Graph { kind: self.check("end_capture", graph)? })
    }

    /// A point in time: when everything asked for before is done. Outside of captures.
    pub fn mark(&mut self) -> Result<Mark> {
        self.outside_capture("mark")?;
        let kind = match &mut self.kind {
            Kind::Emulated(_) => Ok(MarkKind::Emulated(Instant::now())),
            #[cfg(feature = "cuda")]
            Kind::Gpu(d) => d.mark().map(MarkKind::Gpu),
        };
        Ok(Mark { kind: self.check("mark", kind)? })
    }

    /// Microseconds on the device from one of its marks to a later one, for which it waits.
    pub fn micros(&mut self, from: &Mark, to: &Mark) -> Result<f64> {
        self.outside_capture("micros")?;
        let micros = match (&from.kind, &to.kind) {
            (MarkKind::Emulated(from), MarkKind::Emulated(to)) => Ok(to.duration_since(*from).as_secs_f64() * 1e6),
            #[cfg(feature = "cuda")]
            (MarkKind::Gpu(from), MarkKind::Gpu(to)) => from.micros_until(to),
            #[cfg(feature = "cuda")]
            _ => return Err(foreign("micros")),
        };
        self.check("micros", micros)
    }

    // ---- failures -----------------------------------------------------------------------------------------------

    fn alive(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some((op, code)) => Err(Error::Cuda {
                op,
                code,
                name: codes::name(code),
                what: "the device was lost with this error; open it again in a new process".into(),
            }),
        }
    }

    fn outside_capture(&self, op: &'static str) -> Result<()> {
        self.alive()?;
        if self.capturing {
            return Err(Error::Internal(format!("{op} while a graph is being captured")));
        }
        Ok(())
    }

    fn check<T>(&self, op: &'static str, code: Code<T>) -> Result<T> {
        let code = match code {
            Ok(value) => return Ok(value),
            Err(code) => code,
        };
        let fault = either!(&self.kind, d => d.fault(code));
        if codes::is_sticky(code) {
            self.lost.set(Some((op, code)));
        }
        let what = match fault {
            Some(fault) => fault,
            None if codes::is_sticky(code) && !self.sync => {
                "it, or an op before it; RKSC_SYNC=1 tells which. The device is lost".into()
            }
            None => codes::meaning(code).into(),
        };
        Err(Error::Cuda { op, code, name: codes::name(code), what })
    }
}

/// See [`Device::mark`].
pub struct Mark {
    kind: MarkKind,
}

#[cfg_attr(not(feature = "emulated-kernels"), allow(dead_code))]
enum MarkKind {
    Emulated(Instant),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Event),
}

/// Work recorded once, launched many times over the same memory. A kernel in it that
/// names memory freed since is a fault in the emulation, and on a GPU reads or writes whatever is there now.
pub struct Graph {
    kind: GraphKind,
}

#[cfg_attr(not(feature = "emulated-kernels"), allow(dead_code))]
enum GraphKind {
    Emulated(emulated::Recording),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Executable),
}

impl Graph {
    /// Runs it once, on the device that recorded it.
    pub fn launch(&self, device: &mut Device) -> Result<()> {
        device.outside_capture("graph")?;
        let (op, code) = match (&self.kind, &mut device.kind) {
            (GraphKind::Emulated(graph), Kind::Emulated(d)) => d.replay(graph),
            #[cfg(feature = "cuda")]
            (GraphKind::Gpu(graph), Kind::Gpu(d)) => ("graph", d.replay(graph)),
            #[cfg(feature = "cuda")]
            _ => return Err(Error::Internal("a graph was launched on a device that did not record it".into())),
        };
        device.check(op, code)?;
        device.after(op)
    }
}

/// Device memory for `len` elements. Dropping it frees it behind the work already asked for.
pub struct DeviceBuf<T> {
    memory: Memory,
    len: usize,
    elements: PhantomData<Cell<T>>,
}

#[cfg_attr(not(feature = "emulated-kernels"), allow(dead_code))]
enum Memory {
    Emulated(Arc<emulated::Allocation>),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Allocation),
}

impl From<emulated::Allocation> for Memory {
    fn from(memory: emulated::Allocation) -> Self {
        Self::Emulated(Arc::new(memory))
    }
}

#[cfg(feature = "cuda")]
impl From<gpu::Allocation> for Memory {
    fn from(memory: gpu::Allocation) -> Self {
        Self::Gpu(memory)
    }
}

impl<T> DeviceBuf<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of element 0 on the device, for params; `ptr().wrapping_add(i)` is element i. Never null, not to be
    /// read on the host.
    pub fn ptr(&self) -> *const T {
        self.address().cast()
    }

    /// The same, for params the op writes through.
    pub fn ptr_mut(&mut self) -> *mut T {
        self.address().cast()
    }

    fn address(&self) -> *mut u8 {
        match &self.memory {
            Memory::Emulated(memory) => memory.ptr(),
            #[cfg(feature = "cuda")]
            Memory::Gpu(memory) => memory.ptr(),
        }
    }

    /// The bytes of `[start, start + len)`, or an error where they are not all inside.
    fn bytes(&self, op: &'static str, start: usize, len: usize) -> Result<Range<usize>> {
        match start.checked_add(len) {
            Some(end) if end <= self.len => Ok(start * size_of::<T>()..end * size_of::<T>()),
            _ => Err(Error::Shape {
                op,
                expected: format!("elements inside a buffer of {}", self.len),
                got: format!("{len} from {start}"),
            }),
        }
    }
}

impl<T> std::fmt::Debug for DeviceBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

/// The GPUs of this machine, or in one line why none can be used.
pub fn gpus() -> Result<Vec<DeviceInfo>> {
    #[cfg(feature = "cuda")]
    {
        gpu::list()
    }
    #[cfg(not(feature = "cuda"))]
    Err(Error::CudaUnavailable { why: "this build has no CUDA backend (feature `cuda`)".into() })
}

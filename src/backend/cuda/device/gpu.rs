//! A GPU through cudarc's driver calls, loaded at run time: absent, old or broken drivers are errors, never panics.
//!
//! cudarc panics where the library or a symbol is missing, so `load` looks for both before anything else is called.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::DeviceInfo;
use super::codes::{self, Code};
use crate::backend::cuda::kernels::Launcher;
use crate::error::{Error, Result};

type Driver<T> = std::result::Result<T, DriverError>;

/// Host memory of one half of the upload ring, and of the download buffer.
const STAGING_BYTES: usize = 4 << 20;

/// Every driver call made here and in the parts of cudarc that are used; all of CUDA 11.4 or older.
const SYMBOLS: [&std::ffi::CStr; 40] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceTotalMem_v2",
    c"cuDeviceGetAttribute",
    c"cuDeviceGetDefaultMemPool",
    c"cuMemPoolSetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxGetCurrent",
    c"cuCtxSetCurrent",
    c"cuCtxSynchronize",
    c"cuMemGetInfo_v2",
    c"cuMemAlloc_v2",
    c"cuMemAllocAsync",
    c"cuMemFree_v2",
    c"cuMemFreeAsync",
    c"cuMemHostAlloc",
    c"cuMemFreeHost",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamBeginCapture_v2",
    c"cuStreamEndCapture",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuGraphExecDestroy",
    c"cuGraphDestroy",
    c"cuEventCreate",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuEventDestroy_v2",
    c"cuGetErrorName",
    c"cuGetErrorString",
];

unsafe extern "C" {
    /// Of the static runtime that the kernels are linked with.
    fn cudaRuntimeGetVersion(version: *mut i32) -> i32;
}

/// The driver, initialised: the CUDA version it supports, as 1000 * major + 10 * minor, or why it cannot be used.
fn load() -> Result<i32> {
    static LOADED: OnceLock<std::result::Result<i32, String>> = OnceLock::new();
    LOADED.get_or_init(try_load).clone().map_err(|why| Error::CudaUnavailable { why })
}

fn try_load() -> std::result::Result<i32, String> {
    // SAFETY: loads the driver's library, whose initialisers are the vendor's.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver (libcuda.so was not found)".into());
    }
    for symbol in SYMBOLS {
        // SAFETY: the library is there; the address is looked up, not used.
        if unsafe { sys::culib().get::<*const c_void>(symbol) }.is_err() {
            return Err(format!("the driver is too old: it has no {}", symbol.to_string_lossy()));
        }
    }
    let failed = |e: DriverError| format!("the driver says {}: {}", codes::name(code(e)), codes::meaning(code(e)));
    result::init().map_err(failed)?;
    if result::device::get_count().map_err(failed)? == 0 {
        return Err("the driver sees no GPU".into());
    }
    let (mut driver, mut runtime) = (0, 0);
    // SAFETY: both write one number.
    unsafe {
        sys::cuDriverGetVersion(&mut driver).result().map_err(failed)?;
        cudaRuntimeGetVersion(&mut runtime);
    }
    // Within a major version an older driver runs a newer build.
    if driver / 1000 < runtime / 1000 {
        let (driver, runtime) = (version(driver), version(runtime));
        return Err(format!("the driver is of CUDA {driver}, this build needs {runtime}: update the driver"));
    }
    Ok(driver)
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

fn code(e: DriverError) -> i32 {
    e.0 as i32
}

fn number(ordinal: usize) -> i32 {
    i32::try_from(ordinal).unwrap_or(i32::MAX)
}

/// What can be known without a context.
fn info(ordinal: usize, driver: i32) -> Driver<DeviceInfo> {
    let device = result::device::get(number(ordinal))?;
    let attribute = |attribute| {
        // SAFETY: the device was just obtained.
        unsafe { result::device::get_attribute(device, attribute) }.map(|value| value.unsigned_abs())
    };
    Ok(DeviceInfo {
        device: format!("cuda:{ordinal}"),
        name: result::device::get_name(device)?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        num_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: the device was just obtained.
        total_bytes: unsafe { result::device::total_mem(device) }? as u64,
        free_bytes: None,
        driver: Some(version(driver)),
    })
}

/// The GPUs there are, with the memory free on each that lets us in.
pub(super) fn list() -> Result<Vec<DeviceInfo>> {
    let driver = load()?;
    let failed = |e| error("devices", e);
    let count = result::device::get_count().map_err(failed)?;
    (0..usize::try_from(count).unwrap_or(0))
        .map(|ordinal| {
            let mut info = info(ordinal, driver).map_err(failed)?;
            let free = CudaContext::new(ordinal).and_then(|context| context.mem_get_info());
            info.free_bytes = free.ok().map(|(free, _)| free as u64);
            Ok(info)
        })
        .collect()
}

fn error(op: &'static str, e: DriverError) -> Error {
    let code = code(e);
    Error::Cuda { op, code, name: codes::name(code), what: codes::meaning(code).into() }
}

/// See the module text.
pub(super) struct Gpu {
    shared: Arc<Shared>,
    staging: Staging,
}

/// What memory needs in order to be freed.
struct Shared {
    stream: Arc<CudaStream>,
    /// Whether the device allocates in stream order; else it waits, as old and virtual GPUs need.
    ordered: bool,
    capturing: AtomicBool,
    /// Memory dropped during a capture, which must not become a part of the graph.
    parked: Mutex<Vec<u64>>,
}

impl Gpu {
    pub(super) fn open(ordinal: usize) -> Result<(Self, DeviceInfo)> {
        Self::with(ordinal, |context| context.new_stream())
    }

    /// # Safety
    /// As for [`Device::gpu_on_stream`](super::Device::gpu_on_stream).
    pub(super) unsafe fn on_stream(ordinal: usize, stream: *mut c_void) -> Result<(Self, DeviceInfo)> {
        // SAFETY: the caller's promise.
        Self::with(ordinal, |context| Ok(unsafe { context.wrap_borrowed_stream(stream.cast()) }))
    }

    fn with(
        ordinal: usize,
        stream: impl FnOnce(&Arc<CudaContext>) -> Driver<Arc<CudaStream>>,
    ) -> Result<(Self, DeviceInfo)> {
        let driver = load()?;
        let count = result::device::get_count().map_err(|e| error("open", e))?;
        if number(ordinal) >= count {
            let why = format!("there is no cuda:{ordinal}, only cuda:0 to cuda:{}", count - 1);
            return Err(Error::CudaUnavailable { why });
        }
        let mut info = info(ordinal, driver).map_err(|e| error("open", e))?;
        let (major, minor) = info.compute_capability;
        if major < 8 {
            let why = format!("{} has compute capability {major}.{minor}; 8.0 is needed", info.name);
            return Err(Error::CudaUnavailable { why });
        }
        let shared = Shared::open(ordinal, stream).map_err(|e| error("open", e))?;
        let staging = Staging::new(&shared).map_err(|e| error("pinned memory", e))?;
        let gpu = Self { shared: Arc::new(shared), staging };
        info.free_bytes = gpu.free_bytes().ok();
        Ok((gpu, info))
    }

    /// The stream, with its context current on this thread.
    fn stream(&self) -> Code<sys::CUstream> {
        self.shared.bind()
    }

    /// What cuBLASLt needs to work on this stream.
    pub(super) fn raw_stream(&self) -> Code<*mut c_void> {
        Ok(self.stream()?.cast())
    }

    pub(super) fn free_bytes(&self) -> Code<u64> {
        self.stream()?;
        Ok(result::mem_get_info().map_err(code)?.0 as u64)
    }

    pub(super) fn alloc(&self, bytes: usize, zeroed: bool) -> Code<Allocation> {
        let stream = self.stream()?;
        // No address of an empty buffer is ever used, but it must not be null.
        let bytes = bytes.max(1);
        // SAFETY: our stream; everything that uses the memory goes through it.
        let address = unsafe {
            if self.shared.ordered { result::malloc_async(stream, bytes) } else { result::malloc_sync(bytes) }
        };
        let memory = Allocation { address: address.map_err(code)?, shared: self.shared.clone() };
        if zeroed {
            // SAFETY: just allocated with this size.
            unsafe { result::memset_d8_async(memory.address, 0, bytes, stream) }.map_err(code)?;
        }
        Ok(memory)
    }

    pub(super) fn upload(&mut self, dst: &Allocation, start: usize, src: &[u8]) -> Code<()> {
        let stream = self.stream()?;
        let mut to = dst.address + start as u64;
        for piece in src.chunks(STAGING_BYTES) {
            let staged = self.staging.stage(piece, stream)?;
            // SAFETY: the range was checked to lie in `dst`; the ring keeps `staged` until the copy is done.
            unsafe { result::memcpy_htod_async(to, staged, stream) }.map_err(code)?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    pub(super) fn download(&mut self, src: &Allocation, start: usize, dst: &mut [u8]) -> Code<()> {
        let stream = self.stream()?;
        let mut from = src.address + start as u64;
        for piece in dst.chunks_mut(STAGING_BYTES) {
            let landing = self.staging.landing(piece.len());
            // SAFETY: the range was checked to lie in `src`; the next line waits for the copy.
            unsafe { result::memcpy_dtoh_async(landing, from, stream) }.map_err(code)?;
            self.shared.stream.synchronize().map_err(code)?;
            piece.copy_from_slice(landing);
            from += piece.len() as u64;
        }
        Ok(())
    }

    pub(super) fn copy(&mut self, src: &Allocation, from: Range<usize>, dst: &Allocation, to: usize) -> Code<()> {
        let stream = self.stream()?;
        if from.is_empty() {
            return Ok(());
        }
        let (source, target) = (src.address + from.start as u64, dst.address + to as u64);
        // SAFETY: both ranges were checked to lie in their buffers, which are freed in stream order.
        unsafe { result::memcpy_dtod_async(target, source, from.len(), stream) }.map_err(code)
    }

    pub(super) fn zero(&mut self, dst: &Allocation, bytes: usize) -> Code<()> {
        let stream = self.stream()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: all of a live buffer.
        unsafe { result::memset_d8_async(dst.address, 0, bytes, stream) }.map_err(code)
    }

    pub(super) fn launch<P>(&mut self, launcher: Launcher<P>, params: &P) -> Code<()> {
        let stream = self.stream()?;
        // SAFETY: the stream is ours and its context current.
        match unsafe { launcher.call(params, stream.cast()) } {
            0 => Ok(()),
            code => Err(code),
        }
    }

    pub(super) fn synchronize(&mut self) -> Code<()> {
        self.stream()?;
        self.shared.stream.synchronize().map_err(code)
    }

    pub(super) fn begin_capture(&mut self) -> Code<()> {
        // Relaxed: a kernel that is loaded at its first launch may need calls that stricter modes forbid.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream()?;
        self.shared.stream.begin_capture(mode).map_err(code)?;
        self.shared.capturing.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn end_capture(&mut self) -> Code<Executable> {
        let stream = self.stream()?;
        // SAFETY: our stream, capturing.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(code);
        self.shared.capturing.store(false, Ordering::Release);
        self.shared.free_parked();
        let graph = graph?;
        // SAFETY: the graph was just made, and is not used again once its executable exists.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, NO_FLAGS);
            let _ = result::graph::destroy(graph);
            executable
        };
        Ok(Executable { graph: executable.map_err(code)?, shared: self.shared.clone() })
    }

    pub(super) fn replay(&mut self, executable: &Executable) -> Code<()> {
        let stream = self.stream()?;
        // SAFETY: both are alive.
        unsafe { result::graph::launch(executable.graph, stream) }.map_err(code)
    }

    pub(super) fn fault(&self, _: i32) -> Option<String> {
        None
    }
}

const NO_FLAGS: sys::CUgraphInstantiate_flags = sys::CUgraphInstantiate_flags(0);

impl Shared {
    fn open(ordinal: usize, stream: impl FnOnce(&Arc<CudaContext>) -> Driver<Arc<CudaStream>>) -> Driver<Self> {
        let context = CudaContext::new(ordinal)?;
        // SAFETY: there is one stream, and no memory of cudarc's own types.
        unsafe { context.disable_event_tracking() };
        let ordered = context.has_async_alloc();
        if ordered {
            let mut keep = u64::MAX;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            // SAFETY: the device's own pool; the attribute is a u64. Freed memory stays with it for the next buffer.
            unsafe {
                let pool = result::device::get_default_mem_pool(context.cu_device())?;
                result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast())?;
            }
        }
        let stream = stream(&context)?;
        Ok(Self { stream, ordered, capturing: AtomicBool::new(false), parked: Mutex::default() })
    }

    fn bind(&self) -> Code<sys::CUstream> {
        self.stream.context().bind_to_thread().map_err(code)?;
        Ok(self.stream.cu_stream())
    }

    fn free(&self, address: u64) {
        if self.capturing.load(Ordering::Acquire) {
            self.parked.lock().unwrap_or_else(PoisonError::into_inner).push(address);
            return;
        }
        let freed = self.bind().and_then(|stream| {
            if self.ordered {
                // SAFETY: allocated on this stream, owned by who drops it.
                return unsafe { result::free_async(address, stream) }.map_err(code);
            }
            self.stream.synchronize().map_err(code)?;
            // SAFETY: as above, and nothing on the stream uses it any more.
            unsafe { result::free_sync(address) }.map_err(code)
        });
        if let Err(code) = freed {
            tracing::warn!("device memory could not be freed: {} ({code})", codes::name(code));
        }
    }

    fn free_parked(&self) {
        let parked = std::mem::take(&mut *self.parked.lock().unwrap_or_else(PoisonError::into_inner));
        parked.into_iter().for_each(|address| self.free(address));
    }
}

/// Device memory.
pub(super) struct Allocation {
    address: u64,
    shared: Arc<Shared>,
}

impl Allocation {
    /// As an address alone.
    pub(super) fn ptr(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(self.address as usize)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.shared.free(self.address);
    }
}

/// A graph ready to be launched.
pub(super) struct Executable {
    graph: sys::CUgraphExec,
    shared: Arc<Shared>,
}

// SAFETY: the driver's graphs may be used from any thread, one at a time; `replay` has the device to itself.
unsafe impl Send for Executable {}

impl Drop for Executable {
    fn drop(&mut self) {
        if self.shared.bind().is_ok() {
            // SAFETY: its owner; the driver keeps what a launch in flight needs.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

/// Pinned host memory: a ring of two halves for uploads, each reused when the copies out of it are done, and a buffer
/// for downloads.
struct Staging {
    /// `3 * STAGING_BYTES`.
    memory: *mut u8,
    half: usize,
    used: usize,
    /// Behind the last copy out of each half; null until there is one.
    done: [sys::CUevent; 2],
    stream: Arc<CudaStream>,
}

// SAFETY: it owns its memory and events, and is used through `&mut` alone.
unsafe impl Send for Staging {}

impl Staging {
    fn new(shared: &Shared) -> Driver<Self> {
        // SAFETY: plain bytes, written before they are read.
        let memory = unsafe { result::malloc_host(3 * STAGING_BYTES, 0) }?.cast::<u8>();
        // SAFETY: just allocated with this size; initialised so that slices of it may exist.
        unsafe { memory.write_bytes(0, 3 * STAGING_BYTES) };
        let stream = shared.stream.clone();
        let mut staging = Self { memory, half: 0, used: 0, done: [std::ptr::null_mut(); 2], stream };
        for event in &mut staging.done {
            *event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        }
        Ok(staging)
    }

    /// A copy of at most `STAGING_BYTES` in pinned memory, kept until what `stream` does with it next is done.
    fn stage(&mut self, src: &[u8], stream: sys::CUstream) -> Code<&[u8]> {
        if self.used + src.len() > STAGING_BYTES {
            // SAFETY: live events of this context. One that was never recorded counts as done.
            unsafe {
                result::event::record(self.done[self.half], stream).map_err(code)?;
                self.half ^= 1;
                result::event::synchronize(self.done[self.half]).map_err(code)?;
            }
            self.used = 0;
        }
        let start = self.half * STAGING_BYTES + self.used;
        self.used += src.len().next_multiple_of(64);
        // SAFETY: inside the current half, behind what was staged before, and no copy reads it any more.
        let staged = unsafe { std::slice::from_raw_parts_mut(self.memory.add(start), src.len()) };
        staged.copy_from_slice(src);
        Ok(staged)
    }

    /// Where a download of at most `STAGING_BYTES` lands.
    fn landing(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: the third part, which is used by one download at a time.
        unsafe { std::slice::from_raw_parts_mut(self.memory.add(2 * STAGING_BYTES), len.min(STAGING_BYTES)) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies may still read the memory; a lost device reads nothing.
        let _ = self.stream.synchronize();
        for event in self.done.into_iter().filter(|event| !event.is_null()) {
            // SAFETY: its owner.
            let _ = unsafe { result::event::destroy(event) };
        }
        // SAFETY: allocated by malloc_host, and this is its owner.
        let _ = unsafe { result::free_host(self.memory.cast()) };
    }
}

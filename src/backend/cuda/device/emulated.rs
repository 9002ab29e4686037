//! The emulated device: host memory registered with the emulation, immediate launches, graphs as lists of calls.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::ops::Range;
use std::sync::Arc;

use super::codes::{self, Code};
use crate::backend::cuda::kernels::Launcher;

/// As device memory is aligned.
const ALIGNMENT: usize = 256;

/// The order in which CTAs, warps and lanes run where CUDA leaves it open. Results must not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarpOrder {
    /// Ascending.
    Forward,
    /// Descending.
    Backward,
    /// Shuffled, the same way each time for one seed.
    Seeded(u64),
}

/// See the module text.
pub(super) struct Emulated {
    pub(super) order: WarpOrder,
    recording: Option<Recording>,
}

/// Calls in the order they were asked for.
#[derive(Default)]
pub(super) struct Recording {
    calls: Vec<(&'static str, Box<dyn Call>)>,
}

/// Something to run again.
trait Call: Send {
    fn run(&self) -> i32;
}

impl Emulated {
    #[cfg(feature = "emulated-kernels")]
    pub(super) fn open() -> (Self, super::DeviceInfo) {
        let memory = crate::config::available_memory().unwrap_or(1 << 30);
        let info = super::DeviceInfo {
            device: "emulated".into(),
            name: "emulation on the host".into(),
            compute_capability: (8, 0),
            num_sms: 16,
            total_bytes: memory,
            free_bytes: Some(memory),
            driver: None,
        };
        (Self { order: WarpOrder::Forward, recording: None }, info)
    }

    pub(super) fn free_bytes(&self) -> Code<u64> {
        Ok(crate::config::available_memory().unwrap_or(1 << 30))
    }

    pub(super) fn alloc(&self, bytes: usize, zeroed: bool) -> Code<Allocation> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).map_err(|_| codes::OUT_OF_MEMORY)?;
        // SAFETY: the layout is not empty.
        let ptr = unsafe { if zeroed { alloc_zeroed(layout) } else { alloc(layout) } };
        if ptr.is_null() {
            return Err(codes::OUT_OF_MEMORY);
        }
        if !zeroed {
            // SAFETY: just allocated with this size.
            unsafe { ptr.write_bytes(0xff, layout.size()) };
        }
        let memory = Allocation { ptr, layout, registered: bytes > 0 };
        if bytes > 0 && control::register(ptr, bytes) != 0 {
            return Err(codes::EMULATION_FAULT);
        }
        Ok(memory)
    }

    pub(super) fn upload(&mut self, dst: &Arc<Allocation>, start: usize, src: &[u8]) -> Code<()> {
        dst.check(start, src.len())?;
        // SAFETY: inside the allocation, which no reference points into.
        unsafe { dst.ptr.add(start).copy_from_nonoverlapping(src.as_ptr(), src.len()) };
        Ok(())
    }

    pub(super) fn download(&mut self, src: &Arc<Allocation>, start: usize, dst: &mut [u8]) -> Code<()> {
        src.check(start, dst.len())?;
        // SAFETY: inside the allocation, which is initialised and which no reference points into.
        unsafe { src.ptr.add(start).copy_to_nonoverlapping(dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    pub(super) fn copy(
        &mut self,
        src: &Arc<Allocation>,
        from: Range<usize>,
        dst: &Arc<Allocation>,
        to: usize,
    ) -> Code<()> {
        src.check(from.start, from.len())?;
        dst.check(to, from.len())?;
        self.submit("copy", Copy { src: src.clone(), from, dst: dst.clone(), to })
    }

    pub(super) fn zero(&mut self, dst: &Arc<Allocation>, bytes: usize) -> Code<()> {
        dst.check(0, bytes)?;
        self.submit("zero", Zero { dst: dst.clone(), bytes })
    }

    pub(super) fn launch<P: std::marker::Copy + 'static>(&mut self, launcher: Launcher<P>, params: &P) -> Code<()> {
        self.submit(launcher.op(), Launch { launcher, params: *params })
    }

    /// Runs `call`, or records it while a graph is being captured.
    fn submit(&mut self, op: &'static str, call: impl Call + 'static) -> Code<()> {
        match &mut self.recording {
            Some(recording) => {
                recording.calls.push((op, Box::new(call)));
                Ok(())
            }
            None => self.run(&call),
        }
    }

    fn run(&self, call: &dyn Call) -> Code<()> {
        control::set_order(self.order);
        match call.run() {
            0 => Ok(()),
            code => Err(code),
        }
    }

    pub(super) fn synchronize(&mut self) -> Code<()> {
        Ok(())
    }

    pub(super) fn begin_capture(&mut self) -> Code<()> {
        self.recording = Some(Recording::default());
        Ok(())
    }

    pub(super) fn end_capture(&mut self) -> Code<Recording> {
        Ok(self.recording.take().unwrap_or_default())
    }

    /// The op that failed, or the last one.
    pub(super) fn replay(&mut self, graph: &Recording) -> (&'static str, Code<()>) {
        for (op, call) in &graph.calls {
            if let Err(code) = self.run(call.as_ref()) {
                return (op, Err(code));
            }
        }
        ("graph", Ok(()))
    }

    /// What the emulation has to say about a launch that it stopped.
    pub(super) fn fault(&self, code: i32) -> Option<String> {
        (code == codes::EMULATION_FAULT).then(control::last_fault).filter(|text| !text.is_empty())
    }
}

struct Launch<P> {
    launcher: Launcher<P>,
    params: P,
}

// SAFETY: params are numbers and addresses; the emulation checks what they point to when they are used.
unsafe impl<P> Send for Launch<P> {}

impl<P> Call for Launch<P> {
    fn run(&self) -> i32 {
        // SAFETY: the emulation has no streams.
        unsafe { self.launcher.call(&self.params, std::ptr::null_mut()) }
    }
}

/// Holds its memory, like `Zero`: the ranges were checked when it was made.
struct Copy {
    src: Arc<Allocation>,
    from: Range<usize>,
    dst: Arc<Allocation>,
    to: usize,
}

impl Call for Copy {
    fn run(&self) -> i32 {
        // SAFETY: checked ranges of live allocations, which no reference points into; they may overlap.
        unsafe { self.dst.ptr.add(self.to).copy_from(self.src.ptr.add(self.from.start), self.from.len()) };
        0
    }
}

struct Zero {
    dst: Arc<Allocation>,
    bytes: usize,
}

impl Call for Zero {
    fn run(&self) -> i32 {
        // SAFETY: as for `Copy`.
        unsafe { self.dst.ptr.write_bytes(0, self.bytes) };
        0
    }
}

/// Host memory that kernels may touch.
pub(super) struct Allocation {
    ptr: *mut u8,
    layout: Layout,
    registered: bool,
}

// SAFETY: it owns plain bytes, which only the methods of the device touch.
unsafe impl Send for Allocation {}
// SAFETY: as above; a shared one is an address and a size.
unsafe impl Sync for Allocation {}

impl Allocation {
    pub(super) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    fn check(&self, start: usize, len: usize) -> Code<()> {
        let inside = start.checked_add(len).is_some_and(|end| end <= self.layout.size());
        if inside { Ok(()) } else { Err(codes::INVALID_VALUE) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.registered {
            control::unregister(self.ptr);
        }
        // SAFETY: allocated with this layout, and this is its owner.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}

/// The emulation's controls.
#[cfg(feature = "emulated-kernels")]
mod control {
    use super::WarpOrder;
    use crate::backend::cuda::bindings::*;

    pub(super) fn register(ptr: *const u8, bytes: usize) -> i32 {
        // SAFETY: only notes the range.
        unsafe { rksc_emu_register(ptr.cast(), bytes, 0) }
    }

    pub(super) fn unregister(ptr: *const u8) {
        // SAFETY: only forgets the range; launches are over when they return.
        unsafe { rksc_emu_unregister(ptr.cast()) };
    }

    pub(super) fn set_order(order: WarpOrder) {
        let (order, seed) = match order {
            WarpOrder::Forward => (0, 0),
            WarpOrder::Backward => (1, 0),
            WarpOrder::Seeded(seed) => (2, seed),
        };
        // SAFETY: sets two numbers of this thread.
        unsafe { rksc_emu_set_order(order, seed) };
    }

    pub(super) fn last_fault() -> String {
        // SAFETY: a string of this thread that lives until its next launch.
        unsafe { std::ffi::CStr::from_ptr(rksc_emu_last_fault()) }.to_string_lossy().into_owned()
    }
}

/// Without the kernels there is nothing to control.
#[cfg(not(feature = "emulated-kernels"))]
mod control {
    use super::WarpOrder;

    pub(super) fn register(_: *const u8, _: usize) -> i32 {
        0
    }

    pub(super) fn unregister(_: *const u8) {}

    pub(super) fn set_order(_: WarpOrder) {}

    pub(super) fn last_fault() -> String {
        String::new()
    }
}

//! Handles of `cust` (feature `cust-interop`). Both sides use the device's primary context, so that addresses mean the
//! same on both, and work is ordered where both use one stream: open the [`Device`] on cust's.
//!
//! cust links libcuda when a program is built: this feature needs it then, and is no part of an `--all-features` run.
//! `cargo check` needs a folder with an empty `lib64/` in `CUDA_LIBRARY_PATH`.

use std::ffi::c_void;

use bytemuck::Pod;
use cust::memory::{DeviceCopy, DevicePointer};
use cust::stream::Stream;

use super::device::{Device, DeviceBuf};
use crate::error::Result;

/// A device whose one stream is cust's.
///
/// # Safety
/// `stream` is of GPU `ordinal` and outlives the device, its buffers and its graphs.
pub unsafe fn device_on(ordinal: usize, stream: &Stream) -> Result<Device> {
    // SAFETY: the caller's promise is the same.
    unsafe { Device::gpu_on_stream(ordinal, raw_stream(stream)) }
}

/// A `cudaStream_t`.
pub fn raw_stream(stream: &Stream) -> *mut c_void {
    stream.as_inner().cast()
}

/// The buffer as cust sees it, while the buffer lives.
pub fn device_pointer<T: Pod + DeviceCopy>(buf: &mut DeviceBuf<T>) -> DevicePointer<T> {
    DevicePointer::from_raw(buf.ptr_mut().addr() as u64)
}

/// cust's memory, for params.
pub fn raw_pointer<T: DeviceCopy>(memory: DevicePointer<T>) -> *mut T {
    std::ptr::without_provenance_mut(memory.as_raw() as usize)
}

//! Codes of the runtime and of the driver (`cudaError_t` and `CUresult` agree on those that matter), and what they say.

/// A result with a `cudaError_t` for an error.
pub(super) type Code<T> = Result<T, i32>;

pub(super) const INVALID_VALUE: i32 = 1;
pub(super) const OUT_OF_MEMORY: i32 = 2;

/// What the emulation returns when it stopped a kernel; see cuda/host/control.h.
pub(super) const EMULATION_FAULT: i32 = 999;

/// Whether a context does not survive it.
pub(super) fn is_sticky(code: i32) -> bool {
    matches!(code, 214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | EMULATION_FAULT)
}

/// The code's name in the CUDA headers.
pub(super) fn name(code: i32) -> &'static str {
    entry(code).0
}

/// What to make of it.
pub(super) fn meaning(code: i32) -> &'static str {
    entry(code).1
}

fn entry(code: i32) -> (&'static str, &'static str) {
    match code {
        INVALID_VALUE => ("cudaErrorInvalidValue", "the params break a limit of the op"),
        OUT_OF_MEMORY => ("cudaErrorMemoryAllocation", "device memory is exhausted"),
        3 => ("cudaErrorInitializationError", "the driver could not be initialised"),
        9 => ("cudaErrorInvalidConfiguration", "the launch asks for more than the device has"),
        35 => ("cudaErrorInsufficientDriver", "the driver is older than the CUDA version this was built with"),
        46 => ("cudaErrorDevicesUnavailable", "the device is in use by another process"),
        98 => ("cudaErrorInvalidDeviceFunction", "no kernel for this device (see RKSC_CUDA_ARCH)"),
        100 => ("cudaErrorNoDevice", "there is no CUDA device"),
        101 => ("cudaErrorInvalidDevice", "there is no device of this number"),
        200 => ("cudaErrorInvalidKernelImage", "the kernels could not be loaded"),
        201 => ("cudaErrorDeviceUninitialized", "the context is not current"),
        209 => ("cudaErrorNoKernelImageForDevice", "no kernels for this device (see RKSC_CUDA_ARCH)"),
        214 => ("cudaErrorECCUncorrectable", "memory error on the device"),
        218 => ("cudaErrorInvalidPtx", "the driver could not compile the kernels"),
        220 => ("cudaErrorNvlinkUncorrectable", "NVLink error"),
        222 => ("cudaErrorUnsupportedPtxVersion", "the driver is older than the kernels (see RKSC_CUDA_ARCH)"),
        700 => ("cudaErrorIllegalAddress", "a kernel touched memory that is not its own"),
        701 => ("cudaErrorLaunchOutOfResources", "the kernel needs more registers or shared memory than there are"),
        702 => ("cudaErrorLaunchTimeout", "a kernel ran longer than the display allows"),
        710 => ("cudaErrorAssert", "a device assertion failed"),
        715 => ("cudaErrorIllegalInstruction", "a kernel executed an illegal instruction"),
        716 => ("cudaErrorMisalignedAddress", "a kernel touched a misaligned address"),
        717 => ("cudaErrorInvalidAddressSpace", "a kernel touched the wrong address space"),
        718 => ("cudaErrorInvalidPc", "a kernel jumped astray"),
        719 => ("cudaErrorLaunchFailure", "a kernel failed"),
        801 => ("cudaErrorNotSupported", "not supported here"),
        802 => ("cudaErrorSystemNotReady", "the system's device services are not running"),
        803 => ("cudaErrorSystemDriverMismatch", "kernel and user side of the driver differ"),
        900..=909 => ("cudaErrorStreamCapture", "a graph could not be captured"),
        EMULATION_FAULT => ("fault", "the emulation stopped a kernel"),
        _ => ("CUDA error", "see the CUDA documentation for the code"),
    }
}

//! The CUDA backend: one set of ops over two devices, a GPU and its emulation on the host.

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, missing_docs, non_camel_case_types, unsafe_code)]
#[doc(hidden)]
pub mod bindings;
#[allow(unsafe_code)]
pub mod cublas;
#[allow(unsafe_code)]
pub mod device;
#[cfg(feature = "cust-interop")]
#[allow(unsafe_code)]
pub mod interop;
#[allow(unsafe_code)]
#[doc(hidden)]
pub mod kernels;

//! Errors, grouped by who can act on them: the caller, the owner of a file, the owner of the machine.
//!
//! "Not now" is never an error: a full cache makes a branch wait. [`Error::OutOfBlocks`] means waiting cannot help.

use std::path::PathBuf;

/// The result of everything fallible in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and where. The [`code`](Error::code) is stable and serves the C ABI and the exit status.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option or a request that cannot be honoured; `why` names the way out.
    #[error("{field}: {why}")]
    Config {
        /// The option or field, as the caller spells it.
        field: String,
        /// What is wrong with it and what would be accepted.
        why: String,
    },
    /// A tensor or buffer of the wrong size.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// The shape it needs.
        expected: String,
        /// The shape it was given.
        got: String,
    },
    /// A model, dtype or option this build does not implement.
    #[error("{op}: {what} is not supported")]
    Unsupported {
        /// Where it was asked for.
        op: &'static str,
        /// What is missing.
        what: String,
    },
    /// A branch handle that is unknown, pruned, or of another engine.
    #[error("branch {branch}: {why}")]
    Branch {
        /// The handle, as `index.generation`.
        branch: String,
        /// Why it cannot be used.
        why: &'static str,
    },
    /// A KV block handle that was freed, or is of another pool.
    #[error("block {block}: {why}")]
    Block {
        /// The handle, as `index.generation`.
        block: String,
        /// Why it cannot be used.
        why: &'static str,
    },
    /// A file that could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file that was read and makes no sense; `why` names the field or the line.
    #[error("{}: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The field or line, and what is wrong with it.
        why: String,
    },
    /// A weights file that is malformed, or lacks what the config promises.
    #[error("{}: tensor {tensor}: {why}", path.display())]
    Weights {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
    /// The KV cache can never hold this request, however long it waits.
    #[error(
        "the KV cache has {capacity} blocks and this needs {needed}: {missing_bytes} bytes are missing (raise --kv-cache-memory, or ask for fewer branches or tokens)"
    )]
    OutOfBlocks {
        /// Blocks the request needs at its largest.
        needed: usize,
        /// Blocks there are.
        capacity: usize,
        /// Bytes of KV cache to add.
        missing_bytes: u64,
    },
    /// Memory that could not be allocated.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much it needed.
        bytes: u64,
    },
    /// A branch produced a NaN or an infinity. Its siblings are untouched.
    #[error("branch {branch}: logits are not finite at position {position}")]
    NonFinite {
        /// The branch that ended.
        branch: String,
        /// The position of the token whose logits were not finite.
        position: usize,
    },
    /// A device that is absent or failed.
    #[error("device {device}: {why}")]
    Device {
        /// The device, as the user names it.
        device: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// There is no CUDA device to be had; everything else works.
    #[error("no CUDA device: {why}")]
    CudaUnavailable {
        /// What is missing, in one line.
        why: String,
    },
    /// A CUDA call that failed.
    #[error("{op}: {name} ({code}): {what}")]
    Cuda {
        /// The op or the call. Errors on a GPU are late: it may be an op before it.
        op: &'static str,
        /// The `cudaError_t`.
        code: i32,
        /// Its name in the CUDA headers.
        name: &'static str,
        /// What it means here, or the emulation's report.
        what: String,
    },
    /// Somebody raised the cancel flag. Everything committed before stays valid.
    #[error("cancelled")]
    Cancelled,
    /// A broken promise inside the engine. Please report it.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Stable numbers for [`Error`], shared by the C ABI (negated) and the exit status of `rksc-run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ErrorCode {
    /// The caller can fix it.
    Caller = 1,
    /// A model or data file is missing or malformed.
    File = 2,
    /// Memory or KV blocks.
    Memory = 3,
    /// A device or driver.
    Device = 4,
    /// Cancelled on request.
    Cancelled = 5,
    /// A bug in this crate.
    Internal = 70,
}

impl Error {
    /// The stable number of this error's group.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Config { .. } | Self::Shape { .. } | Self::Unsupported { .. } | Self::Branch { .. } => {
                ErrorCode::Caller
            }
            Self::Io { .. } | Self::Format { .. } | Self::Weights { .. } => ErrorCode::File,
            Self::OutOfBlocks { .. } | Self::OutOfMemory { .. } => ErrorCode::Memory,
            Self::Device { .. } | Self::CudaUnavailable { .. } | Self::Cuda { .. } => ErrorCode::Device,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::NonFinite { .. } | Self::Block { .. } | Self::Internal(_) => ErrorCode::Internal,
        }
    }

    pub(crate) fn config(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Config { field: field.into(), why: why.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(crate) fn format(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::Format { path: path.into(), why: why.into() }
    }
}

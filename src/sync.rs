//! What threads share and wait with: the standard library's, or loom's where `tests/loom` looks at every interleaving of
//! the files that use it. Nothing else is compiled with `cfg(loom)`.

#[cfg(loom)]
pub(crate) use loom::{
    sync::{Arc, Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(not(loom))]
pub(crate) use std::{
    sync::{Arc, Mutex, MutexGuard, atomic},
    thread,
};

/// Spins between jobs before a thread gives way; a few tens of microseconds. Loom has no time: there it does so at once.
pub(crate) const SPINS: u32 = if cfg!(loom) { 1 } else { 1 << 14 };

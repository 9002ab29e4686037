//! A flag that any thread raises and the engine looks at.

use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Raised from any thread; the running [`Engine::step`](crate::Engine::step) finishes its pass, later ones return
/// [`Error::Cancelled`](crate::Error::Cancelled). Who sees it raised sees what was written before.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks the engine to stop.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Lets the engine run again.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// True once raised.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

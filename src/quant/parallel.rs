//! Work that falls into pieces, on several threads.

use std::num::NonZero;
use std::sync::Mutex;

use crate::error::{Error, Result};

/// One per core.
pub(super) fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Calls `work` with every piece, each on the first thread that is free. What comes out must not depend on the order.
pub(super) fn for_each<I>(threads: usize, pieces: I, work: impl Fn(I::Item) + Sync) -> Result<()>
where
    I: Iterator + Send,
{
    let queue = Mutex::new(pieces);
    let next = || queue.lock().ok().and_then(|mut pieces| pieces.next());
    let run = || {
        while let Some(piece) = next() {
            work(piece);
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        run();
        for other in others {
            other.join().map_err(|_| Error::Internal("a quantising thread ended".to_owned()))?;
        }
        Ok(())
    })
}

//! All interleavings of the thread pool and of the cancel flag, within the bounds that stand beside each check.
//!
//! ```sh
//! cargo test --release --manifest-path tests/loom/Cargo.toml
//! ```
//!
//! The files are the engine's own; only what they share and wait with is loom's (`src/sync.rs`).
//!
//! That the checks can fail was tried, each change alone:
//!
//! | change | what loom says |
//! |---|---|
//! | pool: `finished.fetch_add` or `finished.load` Relaxed | Causality violation, in the three checks that run jobs |
//! | pool: `run` waits for all shares but one | the same |
//! | pool: `drop` wakes nobody | deadlock |
//! | flag: `raise` or `is_raised` Relaxed | Causality violation |
//! | pool: the orderings of `tickets` or `stop` Relaxed | nothing: a job comes out of its lock, and `drop` joins |
#![cfg(test)]

#[path = "../../../src/engine/cancel.rs"]
mod cancel;
#[allow(dead_code)]
#[path = "../../../src/backend/cpu/pool.rs"]
mod pool;
#[path = "../../../src/sync.rs"]
mod sync;

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::cell::UnsafeCell;
use loom::model::Builder;

use cancel::CancelFlag;
use pool::ThreadPool;

/// Runs `check` in every order with at most so many preemptions (switches at a place where the thread could go on);
/// `None` is no bound. Says how many orders there were.
fn model(preemptions: Option<usize>, check: impl Fn() + Sync + Send + 'static) {
    let orders = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = std::sync::Arc::clone(&orders);
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        check();
    });
    println!("{} orders", orders.load(std::sync::atomic::Ordering::Relaxed));
}

/// What shares write, each its own. Loom reports every access that is not ordered after the one before.
struct Cells(Vec<UnsafeCell<u32>>);

// SAFETY: loom watches the accesses; that they are ordered is what is checked.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(len: usize) -> Self {
        Self((0..len).map(|_| UnsafeCell::new(0)).collect())
    }

    fn add_one(&self, idx: usize) {
        // SAFETY: the pointer is that of a live cell, and loom fails the check where another thread has it too.
        self.0[idx].with_mut(|x| unsafe { *x += 1 });
    }

    /// As the owner of all of them: a share that is still at work is reported.
    fn all(&mut self) -> Vec<u32> {
        // SAFETY: as above.
        self.0.iter().map(|cell| cell.with_mut(|x| unsafe { *x })).collect()
    }
}

/// Jobs one after the other, each of which lends out cells of its own: every share is done once, before `run` returns.
fn jobs_of_a_pool(num_threads: usize, num_jobs: u32) {
    let mut pool = ThreadPool::new(num_threads);
    for _ in 0..num_jobs {
        let mut cells = Cells::new(num_threads);
        pool.run(&|idx| cells.add_one(idx));
        assert!(cells.all().iter().all(|&x| x == 1));
    }
}

#[test]
fn pool_of_two_does_every_share_once_and_lends_nothing_longer() {
    model(Some(3), || jobs_of_a_pool(2, 2));
}

#[test]
fn pool_of_three_does_every_share_once_and_lends_nothing_longer() {
    model(Some(2), || jobs_of_a_pool(3, 1));
}

#[test]
fn pool_that_is_dropped_at_once_ends_its_workers() {
    model(None, || drop(ThreadPool::new(3)));
}

#[test]
fn pool_hands_a_panic_to_the_caller_and_works_on() {
    model(Some(3), || {
        let mut pool = ThreadPool::new(2);
        let raise = |idx: usize| {
            if idx == 1 {
                std::panic::panic_any("planted")
            }
        };
        let raised = catch_unwind(AssertUnwindSafe(|| pool.run(&raise))).expect_err("a share panicked");
        assert_eq!(raised.downcast_ref(), Some(&"planted"));
        let mut cells = Cells::new(2);
        pool.run(&|idx| cells.add_one(idx));
        assert_eq!(cells.all(), [1, 1]);
    });
}

#[test]
fn cancel_flag_shows_what_was_written_before_it_was_raised() {
    model(None, || {
        let flag = CancelFlag::default();
        let why = loom::sync::Arc::new(UnsafeCell::new(0));
        let other = (flag.clone(), loom::sync::Arc::clone(&why));
        let thread = loom::thread::spawn(move || {
            let (flag, why) = other;
            // SAFETY: nobody reads it before the flag is up; loom watches.
            why.with_mut(|x| unsafe { *x = 7 });
            flag.raise();
        });
        while !flag.is_raised() {
            loom::thread::yield_now();
        }
        // SAFETY: as above.
        assert_eq!(why.with(|x| unsafe { *x }), 7);
        thread.join().unwrap();
        flag.clear();
        assert!(!flag.is_raised());
    });
}

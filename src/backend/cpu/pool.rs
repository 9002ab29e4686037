//! A private pool of worker threads with a static partition: every thread gets its index and works on its share of
//! the *outputs*. A sum is never divided, so the number of threads cannot change a bit.
//!
//! The caller is thread 0. Workers spin briefly between jobs (a decode step is dozens of jobs, microseconds apart) and
//! then park. The invariant that makes the one `unsafe` here sound: [`ThreadPool::run`] does not return before every
//! worker has finished the job it borrowed.
#![allow(unsafe_code)]

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Spins between jobs before a worker parks; a few tens of microseconds.
const SPINS: u32 = 1 << 14;

type Job = *const (dyn Fn(usize) + Sync);

/// See the module text.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The job of the current epoch; written by the caller before it advances `epoch`.
    job: Mutex<Option<SendJob>>,
    epoch: AtomicUsize,
    running: AtomicUsize,
    stop: AtomicBool,
    /// The first panic of a worker, handed to the caller of `run`.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the pointee is `Sync`, and `run` keeps it alive until every worker has left it.
unsafe impl Send for SendJob {}

impl ThreadPool {
    /// A pool of `num_threads` threads, the caller included. Threads the system refuses are done without.
    pub fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            epoch: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..num_threads)
            .filter_map(|idx| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("rksc-cpu-{idx}")).spawn(move || shared.work(idx)).ok()
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads that `run` calls, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)`, ..., `f(num_threads - 1)`, each on its own thread, and returns when all are done.
    /// A panic of any of them is raised here, after all are done.
    pub fn run(&mut self, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return f(0);
        }
        // SAFETY: only the lifetime is erased; the wait below outlasts every use of the pointer.
        let job = SendJob(unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f) });
        *lock(&self.shared.job) = Some(job);
        self.shared.running.store(self.workers.len(), Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| f(0)));
        let mut spins = 0u32;
        while self.shared.running.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins % SPINS == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
        *lock(&self.shared.job) = None;
        if let Some(panic) = lock(&self.shared.panic).take() {
            resume_unwind(panic);
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn work(&self, idx: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            loop {
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                let epoch = self.epoch.load(Ordering::Acquire);
                if epoch != seen {
                    seen = epoch;
                    break;
                }
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { thread::park() }
            }
            let job = *lock(&self.job);
            if let Some(SendJob(job)) = job {
                // SAFETY: `run` set this job for this epoch and waits until `running` is zero before it returns.
                let f = unsafe { &*job };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(idx))) {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The share `[start, end)` of `len` items that thread `idx` of `num_threads` works on, in multiples of `grain`.
pub fn share(len: usize, grain: usize, idx: usize, num_threads: usize) -> Range<usize> {
    let grains = len.div_ceil(grain.max(1));
    let at = |i: usize| (grains * i / num_threads * grain.max(1)).min(len);
    at(idx)..at(idx + 1)
}

/// A slice whose parts several threads write, each its own.
pub struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: access is only through `range`, whose contract is that no two live ranges overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Lends `slice` out in parts.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The part `range`; empty when it does not lie inside the slice.
    ///
    /// # Safety
    /// No other part that is alive at the same time overlaps `range`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        if range.start > range.end || range.end > self.len {
            return &mut [];
        }
        // SAFETY: the range lies inside the slice, and the caller promises that it overlaps no other live part.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.end - range.start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_works_on_its_own_share() {
        for threads in 1..5 {
            let mut pool = ThreadPool::new(threads);
            let mut data = vec![0u32; 1003];
            for round in 1..50u32 {
                let out = SharedMut::new(&mut data);
                let n = pool.num_threads();
                pool.run(&|idx| {
                    // SAFETY: shares of different threads do not overlap.
                    for x in unsafe { out.range(share(1003, 16, idx, n)) } {
                        *x += 1;
                    }
                });
                assert!(data.iter().all(|&x| x == round));
            }
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_survives() {
        let mut pool = ThreadPool::new(3);
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(&|idx| assert!(idx != 2, "planted"))));
        assert!(caught.is_err());
        let hits = AtomicUsize::new(0);
        pool.run(&|_| {
            hits.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(hits.load(Ordering::Relaxed), 3);
    }
}

//! A private pool of worker threads with a static partition: a job is cut into as many shares of the *outputs* as there
//! are threads. A sum is never divided, so neither the number of threads nor who works on which share can change a bit.
//!
//! The caller works too, and takes whatever share nobody has begun when it is done with its own: on a busy machine a
//! job never waits for a worker that the system has not scheduled. Workers spin briefly between jobs (a decode step is
//! dozens of jobs, microseconds apart) and then park. The invariant that makes the one `unsafe` here sound:
//! [`ThreadPool::run`] does not return before every share that was begun is finished, and a share of an earlier job
//! cannot be begun.
#![allow(unsafe_code)]

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Mutex, MutexGuard, SPINS};

type Job = *const (dyn Fn(usize) + Sync);

/// See the module text.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The current job and its epoch; written by the caller before it opens `tickets`.
    job: Mutex<(u32, Option<SendJob>)>,
    /// High half: the epoch; low half: the next share to begin.
    tickets: AtomicU64,
    /// Shares of the current job that are finished.
    finished: AtomicUsize,
    num_shares: usize,
    stop: AtomicBool,
    /// The first panic of a share, handed to the caller of `run`.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the pointee is `Sync`, and `run` keeps it alive until every share that was begun is finished.
unsafe impl Send for SendJob {}

impl ThreadPool {
    /// A pool of `num_threads` threads, the caller included. Threads the system refuses are done without.
    pub fn new(num_threads: usize) -> Self {
        let num_shares = num_threads.max(1);
        let shared = Arc::new(Shared {
            job: Mutex::new((0, None)),
            tickets: AtomicU64::new(num_shares as u64),
            finished: AtomicUsize::new(0),
            num_shares,
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..num_shares)
            .filter_map(|idx| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("rksc-cpu-{idx}")).spawn(move || shared.work()).ok()
            })
            .collect();
        Self { shared, workers }
    }

    /// Shares that `run` cuts a job into.
    pub fn num_threads(&self) -> usize {
        self.shared.num_shares
    }

    /// Calls `f(0)`, ..., `f(num_threads - 1)`, each once and on any thread, and returns when all are done.
    /// A panic of any of them is raised here, after all are done.
    pub fn run(&mut self, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return (0..self.shared.num_shares).for_each(f);
        }
        // SAFETY: only the lifetime is erased; the wait below outlasts every use of the pointer.
        let job = SendJob(unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f) });
        let epoch = {
            let mut current = lock(&self.shared.job);
            *current = (current.0.wrapping_add(1), Some(job));
            current.0
        };
        self.shared.finished.store(0, Ordering::Relaxed);
        self.shared.tickets.store(u64::from(epoch) << 32, Ordering::Release);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        self.shared.take_shares(epoch, job);
        let mut spins = 0u32;
        while self.shared.finished.load(Ordering::Acquire) != self.shared.num_shares {
            spins += 1;
            if spins.is_multiple_of(SPINS) { thread::yield_now() } else { std::hint::spin_loop() }
        }
        lock(&self.shared.job).1 = None;
        // Taken first: unwinding with the lock held would poison it.
        let panic = lock(&self.shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            loop {
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                let epoch = (self.tickets.load(Ordering::Acquire) >> 32) as u32;
                if epoch != seen {
                    seen = epoch;
                    break;
                }
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { thread::park() }
            }
            let (epoch, job) = *lock(&self.job);
            if let Some(job) = job {
                self.take_shares(epoch, job);
            }
        }
    }

    /// Works on shares of the job of `epoch` until none is left to begin.
    fn take_shares(&self, epoch: u32, SendJob(job): SendJob) {
        while let Some(idx) = self.begin_share(epoch) {
            // SAFETY: a share of this epoch has been begun and is not finished, so `run` has not returned and the job
            // it was given is alive.
            let f = unsafe { &*job };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(idx))) {
                lock(&self.panic).get_or_insert(panic);
            }
            self.finished.fetch_add(1, Ordering::Release);
        }
    }

    /// The next share of the job of `epoch`, or `None` when all are begun or the job is over.
    fn begin_share(&self, epoch: u32) -> Option<usize> {
        let is_open = |t: u64| (t >> 32) as u32 == epoch && (t as u32 as usize) < self.num_shares;
        let begin = |t: u64| is_open(t).then_some(t + 1);
        let ticket = self.tickets.fetch_update(Ordering::AcqRel, Ordering::Acquire, begin).ok()?;
        Some(ticket as u32 as usize)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_share_is_done_once() {
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

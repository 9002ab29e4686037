//! `linear` in plain Rust: 16 partial sums along k, which compilers turn into whatever vectors there are.
#![allow(unsafe_code)]

use super::Job;

pub(super) const GRAIN: usize = 4;
pub(super) const LANES: usize = 16;
/// Rows of x that share one widening of W.
const ROWS: usize = 4;
/// Elements of a row of W that are widened at a time; a multiple of `LANES`.
const CHUNK: usize = 512;

/// # Safety
/// The calling thread owns the outputs of `job`.
pub(super) unsafe fn multiply<W: Copy>(job: &Job<'_, f32, W>, widen: impl Fn(W) -> f32) {
    let k = job.in_features;
    let mut widened = [0.0f32; CHUNK];
    for n in 0..job.num_outs {
        let w = &job.w[n * k..(n + 1) * k];
        for first_row in (0..job.rows).step_by(ROWS) {
            let num_rows = ROWS.min(job.rows - first_row);
            let mut acc = [[0.0f32; LANES]; ROWS];
            for at in (0..k).step_by(CHUNK) {
                let len = CHUNK.min(k - at);
                let chunk = &mut widened[..len];
                chunk.iter_mut().zip(&w[at..at + len]).for_each(|(d, &s)| *d = widen(s));
                for (r, acc) in acc.iter_mut().enumerate().take(num_rows) {
                    let row = (first_row + r) * k + at;
                    accumulate(acc, &job.x[row..row + len], chunk);
                }
            }
            for (r, acc) in acc.iter().enumerate().take(num_rows) {
                // SAFETY: handed on to the caller.
                unsafe { job.out.store(first_row + r, job.first_out + n, &[reduce(acc)]) };
            }
        }
    }
}

pub(super) fn accumulate(acc: &mut [f32; LANES], x: &[f32], w: &[f32]) {
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (w, w_tail) = w.as_chunks::<LANES>();
    for (x, w) in x.iter().zip(w) {
        for ((a, x), w) in acc.iter_mut().zip(x).zip(w) {
            *a += x * w;
        }
    }
    for ((a, x), w) in acc.iter_mut().zip(x_tail).zip(w_tail) {
        *a += x * w;
    }
}

/// The halving tree: lane i and lane i + 8, then + 4, + 2, + 1.
pub(super) fn reduce(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

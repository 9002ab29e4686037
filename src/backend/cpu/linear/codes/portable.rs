//! Codes in plain Rust: a group at a time, widened once for all rows.
#![allow(unsafe_code)]

use super::{CodeJob, Layout};
use crate::backend::cpu::linear::portable::{LANES, accumulate, reduce};
use crate::quant::CodeBits;

pub(super) const GRAIN: usize = 4;
/// Rows of x that share one widening of W.
const ROWS: usize = 4;
const MAX_GROUP: usize = 128;

/// x stays as it is.
pub(super) fn layout(_: CodeBits) -> Layout {
    Layout { lanes: 0, registers: 0 }
}

/// # Safety
/// The calling thread owns the outputs of `job`.
pub(super) unsafe fn multiply(job: &CodeJob<'_, f32>) {
    let (w, groups) = (&job.w, job.w.num_groups());
    let mut unscaled = [0.0f32; MAX_GROUP];
    let unscaled = &mut unscaled[..w.group];
    for n in 0..job.num_outs {
        for first_row in (0..job.rows).step_by(ROWS) {
            let num_rows = ROWS.min(job.rows - first_row);
            let mut acc = [[0.0f32; LANES]; ROWS];
            for group in 0..groups {
                w.unscaled(n * groups + group, unscaled);
                let scale = w.scales.get(n * groups + group);
                for (r, acc) in acc.iter_mut().enumerate().take(num_rows) {
                    let at = (first_row + r) * job.x_stride + group * w.group;
                    let mut part = [0.0f32; LANES];
                    accumulate(&mut part, &job.x[at..at + w.group], unscaled);
                    acc.iter_mut().zip(part).for_each(|(a, part)| *a += scale * part);
                }
            }
            for (r, acc) in acc.iter().enumerate().take(num_rows) {
                // SAFETY: handed on to the caller.
                unsafe { job.out.store(first_row + r, job.first_out + n, &[reduce(acc)]) };
            }
        }
    }
}

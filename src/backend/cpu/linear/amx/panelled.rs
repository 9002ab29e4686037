//! Many rows of x: each block of W is copied once and all rows pass over the copy.
//!
//! ```text
//!             stretch 0   stretch 1  ...          panel: 32 outs of one stretch of k, [steps][32 lines], in the L1
//! outs 0-31    panel 0     panel 4                order:  down a super block (here 4 panels), then the next stretch,
//! outs 32-63   panel 1     panel 5                        then the next super block
//! outs 64-95   panel 2     panel 6
//! outs 96-127  panel 3     panel 7
//! ```
//!
//! Rows of a mapped file seldom begin on a cache line, and a tile load that straddles lines takes twice as long; hence the
//! copy. While the rows pass over one panel, the loop over k also copies the next one and prefetches the one after it, a
//! few lines a step: the tile unit leaves room for that. x comes from the L2 by loads that leave the L1 to the panel
//! (`tileloaddt1`). C of a super block waits in memory between stretches, which costs no rounding.
#![allow(unsafe_code)]

use std::arch::asm;
use std::ops::Range;

use half::bf16;

use super::{C_LINES, GROUP, Job, Line, OUTS, STEP, Tiles, copy_step, group_lines, num_groups, store_block};

/// Steps of k in one panel (2 KiB each). 12 of them stay in the L1 beside the panel that is being copied. Measured on 2
/// cores of a Xeon with AMX, 256 rows, W from memory: at 18944 -> 3584, 12 take 18.5 ms, 16 19.5 ms, 24 20.6 ms.
const MAX_STRETCH: usize = 12;
const PANEL_LINES: usize = MAX_STRETCH * OUTS;
/// C of one super block: the larger, the less often x passes through the L2, until C itself crowds it. Measured as above:
/// 256 KiB 19.8 ms, 512 KiB 18.5 ms, 1 MiB 20.0 ms.
const C_BYTES: usize = 512 << 10;

/// Lines each thread needs: two panels, and C of a super block.
pub(super) fn thread_lines(rows: usize, in_features: usize) -> usize {
    let plan = Plan::new(rows, in_features, 0);
    2 * PANEL_LINES + plan.super_outs / OUTS * plan.num_row_blocks * C_LINES
}

/// How the work is cut.
struct Plan {
    num_outs: usize,
    /// Steps of k in all, whole or not.
    steps: usize,
    num_stretches: usize,
    /// Outs of one super block.
    super_outs: usize,
    /// Blocks of 32 rows of x.
    num_row_blocks: usize,
}

/// One panel: the super block it belongs to, its first out, its stretch.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    out: usize,
    stretch: usize,
}

impl Plan {
    fn new(rows: usize, in_features: usize, num_outs: usize) -> Self {
        let steps = in_features.div_ceil(STEP);
        let num_stretches = steps.div_ceil(MAX_STRETCH).max(1);
        let num_row_blocks = rows.div_ceil(2 * GROUP);
        let block_bytes = num_row_blocks * C_LINES * size_of::<Line>();
        let super_blocks = if num_stretches == 1 { 1 } else { (C_BYTES / block_bytes).max(1) };
        Self { num_outs, steps, num_stretches, super_outs: super_blocks * OUTS, num_row_blocks }
    }

    /// Steps of k of a stretch; lengths differ by one at most.
    fn stretch(&self, stretch: usize) -> Range<usize> {
        let start = |stretch: usize| self.steps * stretch / self.num_stretches;
        start(stretch)..start(stretch + 1)
    }

    fn outs(&self, panel: Panel) -> Range<usize> {
        panel.out..self.num_outs.min(panel.out + OUTS)
    }

    fn next(&self, Panel { first, out, stretch }: Panel) -> Option<Panel> {
        let end = self.num_outs.min(first + self.super_outs);
        if out + OUTS < end {
            Some(Panel { first, out: out + OUTS, stretch })
        } else if stretch + 1 < self.num_stretches {
            Some(Panel { first, out: first, stretch: stretch + 1 })
        } else {
            (end < self.num_outs).then_some(Panel { first: end, out: end, stretch: 0 })
        }
    }
}

/// # Safety
/// As [`super::multiply`]; there are more than 32 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn multiply(job: &Job<'_, Line, bf16>, own: &mut [Line]) {
    let k = job.in_features;
    if job.num_outs == 0 {
        return;
    }
    let plan = Plan::new(job.rows, k, job.num_outs);
    let whole_steps = k / STEP;
    let (num_groups, group_lines) = (num_groups(job.rows), group_lines(job.rows, k));
    let (panels, c) = own.split_at_mut(2 * PANEL_LINES);
    let (mut now, mut coming) = panels.split_at_mut(PANEL_LINES);
    // SAFETY: the caller vouches for AMX.
    let mut tiles = unsafe { Tiles::new() };

    let mut panel = Panel { first: 0, out: 0, stretch: 0 };
    copy_steps(job, plan.outs(panel), plan.stretch(0), 0, now);
    loop {
        let next = plan.next(panel);
        let outs = plan.outs(panel);
        let range = plan.stretch(panel.stretch);
        let is_last = panel.stretch + 1 == plan.num_stretches;
        // SAFETY: as above.
        unsafe { tiles.configure(outs.len(), GROUP) };
        // Steps of the next panel that the loop below copies: those that are whole, if all of its outs are there.
        let next_range = next.map_or(0..0, |next| plan.stretch(next.stretch));
        let is_whole = next.is_some_and(|next| plan.outs(next).len() == OUTS);
        let in_loop = if is_whole { range.len().min(next_range.end.min(whole_steps) - next_range.start) } else { 0 };
        let next_at = next.map_or(0, |next| next.out * k + next_range.start * STEP);
        let after_at =
            next.and_then(|next| plan.next(next)).map_or(next_at, |p| p.out * k + plan.stretch(p.stretch).start * STEP);
        let block_rows = OUTS.div_ceil(plan.num_row_blocks);
        for block in 0..plan.num_row_blocks {
            let group = 2 * block;
            let is_pair = group + 1 < num_groups;
            let c_at = if plan.num_stretches == 1 {
                0
            } else {
                (panel.out - panel.first) / OUTS * plan.num_row_blocks + block
            };
            let c = &mut c[c_at * C_LINES..(c_at + 1) * C_LINES];
            let b = job.x[group * group_lines + range.start * GROUP..].as_ptr();
            let done = (block * block_rows).min(OUTS);
            let mut ahead = Ahead {
                src: job.w.as_ptr().wrapping_add(next_at + done * k),
                dst: coming.as_mut_ptr().wrapping_add(done),
                rows: if in_loop == 0 { 0 } else { block_rows.min(OUTS - done) },
                row_bytes: k * size_of::<bf16>(),
                to_prefetch: (after_at as isize - next_at as isize) * size_of::<bf16>() as isize,
            };
            let mut operands = Operands { a: now.as_ptr(), b, b_second: b.wrapping_add(group_lines) };
            // SAFETY: tiles are configured. The panel holds `range`; the group, and the next one if `is_pair`, have all
            // steps; `c` has four tiles. `in_loop` whole steps of the rows from `src` lie in W, and `dst` has room for them.
            unsafe {
                if panel.stretch == 0 {
                    tiles.zero()
                } else {
                    tiles.load(c)
                }
                operands.multiply(&mut ahead, in_loop, is_pair);
                ahead.rows = 0;
                operands.multiply(&mut ahead, range.len() - in_loop, is_pair);
                tiles.store(c);
            }
            if is_last {
                // SAFETY: handed on to the caller.
                unsafe { store_block(job, c, group, outs.clone()) };
            }
        }
        let Some(next) = next else { return };
        copy_steps(job, plan.outs(next), next_range, in_loop, coming);
        (now, coming) = (coming, now);
        panel = next;
    }
}

/// Copies steps `range` of the rows `outs` of W into their panel, without the first `done`.
fn copy_steps(job: &Job<'_, Line, bf16>, outs: Range<usize>, range: Range<usize>, done: usize, panel: &mut [Line]) {
    for (step, lines) in range.zip(panel.chunks_exact_mut(OUTS)).skip(done) {
        copy_step(job, outs.clone(), step, lines);
    }
}

/// What the loop over k copies besides: in each step, one line of each of `rows` rows of W to consecutive lines.
#[repr(C)]
struct Ahead {
    src: *const bf16,
    dst: *mut Line,
    rows: usize,
    row_bytes: usize,
    /// Bytes from a line copied to the line of the panel after it, which is prefetched.
    to_prefetch: isize,
}

/// Where the tiles of a block come from; moved on by every step.
struct Operands {
    a: *const Line,
    b: *const Line,
    b_second: *const Line,
}

/// The loop over k; see the picture in the parent module for the tiles. Operands of `ahead` are read from memory, for
/// want of registers.
macro_rules! run_steps {
    ($o:ident, $ahead:ident, $steps:ident, [$($tiles:literal),*]) => {
        asm!(
            "2:",
            $($tiles,)*
            "mov {n}, [{ahead} + 16]",
            "test {n}, {n}",
            "jz 4f",
            "mov {src}, [{ahead}]",
            "mov {dst}, [{ahead} + 8]",
            "3:",
            "vmovdqu64 {line}, [{src}]",
            "prefetcht1 [{src} + {far}*1]",
            "vmovdqa64 [{dst}], {line}",
            "add {src}, {row}",
            "add {dst}, 64",
            "dec {n}",
            "jnz 3b",
            "add qword ptr [{ahead}], 64",
            "add qword ptr [{ahead} + 8], 2048",
            "4:",
            "add {a}, 2048",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            a = inout(reg) $o.a, b0 = inout(reg) $o.b, b1 = inout(reg) $o.b_second,
            line_bytes = in(reg) size_of::<Line>(), steps = inout(reg) $steps => _,
            ahead = in(reg) &raw mut *$ahead, row = in(reg) $ahead.row_bytes, far = in(reg) $ahead.to_prefetch,
            src = out(reg) _, dst = out(reg) _, n = out(reg) _, line = out(zmm_reg) _,
            options(nostack),
        )
    };
}

impl Operands {
    /// C += A B over `steps` steps, the second column of tiles only if `is_pair`. Copies as `ahead` says, and moves it on.
    ///
    /// # Safety
    /// Tiles are configured for 16 columns. A and B can be read, and what `ahead` names copied, for all steps.
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply(&mut self, ahead: &mut Ahead, steps: usize, is_pair: bool) {
        if steps == 0 {
            return;
        }
        // SAFETY: as the caller promises; a prefetch may name any address.
        unsafe {
            if is_pair {
                run_steps!(
                    self,
                    ahead,
                    steps,
                    [
                        "tileloaddt1 tmm6, [{b0} + {line_bytes}*1]",
                        "tileloadd tmm4, [{a} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloaddt1 tmm7, [{b1} + {line_bytes}*1]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{a} + {line_bytes}*1 + 1024]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ]
                )
            } else {
                run_steps!(
                    self,
                    ahead,
                    steps,
                    [
                        "tileloaddt1 tmm6, [{b0} + {line_bytes}*1]",
                        "tileloadd tmm4, [{a} + {line_bytes}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{a} + {line_bytes}*1 + 1024]",
                        "tdpbf16ps tmm2, tmm5, tmm6"
                    ]
                )
            }
        }
    }
}

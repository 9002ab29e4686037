//! Many rows of x: each block of W is copied once and all rows pass over the copy.
//!
//! ```text
//!             stretch 0   stretch 1  ...          panel: 32 outs of one stretch of k, a run of each row of W, in the L2
//! outs 0-31    panel 0     panel 4                order:  down a super block (here 4 panels), then the next stretch,
//! outs 32-63   panel 1     panel 5                        then the next super block
//! outs 64-95   panel 2     panel 6
//! outs 96-127  panel 3     panel 7
//! ```
//!
//! Rows of a mapped file seldom begin on a cache line, and a tile load that straddles lines takes twice as long; hence the
//! copy. While the rows pass over one panel, the loop over k also copies the next one, a few lines a step, and prefetches
//! as far ahead as the next row of W. Row after row in runs of KiBs, because that keeps the hardware's own prefetcher
//! going: x comes from the L2 meanwhile and needs the L1's few fill buffers. The rows pass over a panel in slices of k that
//! stay in the L1; C waits in memory between slices, which costs no rounding.
//!
//! Rows of a large y lie many pages apart, and a visit to one is dear: C of many outs is held, then streamed in long runs.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::offset_of;
use std::ops::Range;

use half::bf16;

use super::{
    C_LINES, GROUP, Job, Line, OUTS, STEP, TILE_LINES, Tiles, copy_step, group_lines, load_bias, num_groups,
    prefetch_block, starts, store_block, transpose,
};

/// Steps of k in one panel, at most: the longer, the fewer runs of W, until panels and x crowd the L2. Measured on 2 cores
/// of a Xeon with AMX, 256 rows, W from memory: at 1536 -> 17920, 12 take 7.4 ms, 32 6.5 ms, 64 6.1 ms; at 3584 -> 4608,
/// 32 take 4.4 ms, 64 4.8 ms.
const MAX_STRETCH: usize = 64;
/// The same where x is larger than this.
const MAX_STRETCH_BESIDE_X: usize = 32;
const SMALL_X_BYTES: usize = 1 << 20;
/// Steps in one slice: 16 KiB of the panel.
const MAX_SLICE: usize = 8;
/// Up to here x passes through the L2 once for every 32 outs; a larger x once for every super block.
const L2_X_BYTES: usize = 2 << 20;
/// C of one super block.
const C_BYTES: usize = 512 << 10;
/// C that is held before it is streamed to y. Measured as above, 3584 -> 37888: without holding 42.5 ms, 128 KiB 35.0 ms,
/// 256 KiB 33.3 ms, 512 KiB 32.6 ms, 1 MiB 32.3 ms; not writing y at all 30.5 ms. Without streaming, 512 KiB take 36.5 ms.
const HELD_BYTES: usize = 512 << 10;
/// A smaller y is written block by block: at 896 -> 9728 (10 MB) and 1536 -> 17920 (18 MB) streaming gains nothing.
const STREAMED_Y_BYTES: usize = 24 << 20;
/// Lines from one row of a panel to the next; 13 beyond a multiple of 64, which spreads the rows over the sets of the L1.
const PANEL_STRIDE: usize = MAX_STRETCH + 13;
const PANEL_LINES: usize = PANEL_STRIDE * OUTS;

/// Lines each thread needs: two panels, C of the outs that are held, and 16 rows of them.
pub(super) fn thread_lines(rows: usize, in_features: usize, out_features: usize) -> usize {
    let plan = Plan::new(rows, in_features, out_features, 0);
    2 * PANEL_LINES + plan.c_lines() + GROUP * plan.row_lines()
}

/// How the work is cut.
struct Plan {
    num_outs: usize,
    /// Steps of k in all, whole or not.
    steps: usize,
    num_stretches: usize,
    /// Outs of one super block.
    super_outs: usize,
    /// Outs whose C is held: a super block, or several if y is streamed.
    held_outs: usize,
    is_streamed: bool,
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
    fn new(rows: usize, in_features: usize, out_features: usize, num_outs: usize) -> Self {
        let steps = in_features.div_ceil(STEP);
        let x_bytes = rows * in_features * size_of::<bf16>();
        let max_stretch = if x_bytes <= SMALL_X_BYTES { MAX_STRETCH } else { MAX_STRETCH_BESIDE_X };
        let num_stretches = steps.div_ceil(max_stretch).max(1);
        let num_row_blocks = rows.div_ceil(2 * GROUP);
        let block_bytes = num_row_blocks * C_LINES * size_of::<Line>();
        let super_blocks = if x_bytes <= L2_X_BYTES { 1 } else { (C_BYTES / block_bytes).max(1) };
        let is_streamed = rows * out_features * size_of::<f32>() > STREAMED_Y_BYTES;
        let held_super_blocks = if is_streamed { (HELD_BYTES / (super_blocks * block_bytes)).max(1) } else { 1 };
        let super_outs = super_blocks * OUTS;
        let held_outs = held_super_blocks * super_outs;
        Self { num_outs, steps, num_stretches, super_outs, held_outs, is_streamed, num_row_blocks }
    }

    /// Lines of C.
    fn c_lines(&self) -> usize {
        self.held_outs / OUTS * self.num_row_blocks * C_LINES
    }

    /// Lines from one row of held outs to the next; odd, which spreads the rows over the sets of the L1.
    fn row_lines(&self) -> usize {
        self.held_outs / GROUP + 1
    }

    /// The first of the outs that are held together with those of `panel`.
    fn held_start(&self, panel: Panel) -> usize {
        panel.first / self.held_outs * self.held_outs
    }

    /// Steps of k of a stretch; lengths differ by one at most.
    fn stretch(&self, stretch: usize) -> Range<usize> {
        piece(self.steps, stretch, self.num_stretches)
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

/// The `idx`th of `num` pieces of `0..len`.
fn piece(len: usize, idx: usize, num: usize) -> Range<usize> {
    len * idx / num..len * (idx + 1) / num
}

/// # Safety
/// As [`super::multiply`]; there are more than 32 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn multiply(job: &Job<'_, Line, bf16>, own: &mut [Line]) {
    let k = job.in_features;
    if job.num_outs == 0 {
        return;
    }
    let plan = Plan::new(job.rows, k, job.out.out_features, job.num_outs);
    let (num_groups, group_lines) = (num_groups(job.rows), group_lines(job.rows, k));
    let (panels, own) = own.split_at_mut(2 * PANEL_LINES);
    let (c, held_rows) = own.split_at_mut(plan.c_lines());
    let (mut now, mut coming) = panels.split_at_mut(PANEL_LINES);
    // SAFETY: the caller vouches for AMX.
    let mut tiles = unsafe { Tiles::new() };

    let mut panel = Panel { first: 0, out: 0, stretch: 0 };
    Copy::new(job, plan.outs(panel), plan.stretch(0), now).finish();
    loop {
        let next = plan.next(panel);
        let outs = plan.outs(panel);
        let range = plan.stretch(panel.stretch);
        // SAFETY: as above.
        unsafe { tiles.configure(outs.len(), GROUP) };
        let (next_outs, next_range) = next.map_or((0..0, 0..0), |next| (plan.outs(next), plan.stretch(next.stretch)));
        let mut copy = Copy::new(job, next_outs, next_range, coming);
        copy.quota = copy.lines.div_ceil((range.len() * plan.num_row_blocks).max(1));
        let held_start = plan.held_start(panel);
        let first_c = (panel.out - held_start) / OUTS * plan.num_row_blocks;
        let num_slices = range.len().div_ceil(MAX_SLICE).max(1);
        for idx in 0..num_slices {
            let slice = piece(range.len(), idx, num_slices);
            let is_first = panel.stretch == 0 && idx == 0;
            let is_last = panel.stretch + 1 == plan.num_stretches && idx + 1 == num_slices;
            for block in 0..plan.num_row_blocks {
                let group = 2 * block;
                let is_pair = group + 1 < num_groups;
                let c = &mut c[(first_c + block) * C_LINES..][..C_LINES];
                let b = job.x[group * group_lines + (range.start + slice.start) * GROUP..].as_ptr();
                if is_last && !plan.is_streamed {
                    // SAFETY: handed on to the caller.
                    unsafe { prefetch_block(job, group, outs.clone()) };
                }
                let mut operands =
                    Operands { a: now[slice.start..].as_ptr(), b, b_second: b.wrapping_add(group_lines) };
                // SAFETY: tiles are configured. The panel holds `range`; the group, and the next one if `is_pair`, have all
                // steps; `c` has four tiles. `copy` names what lies in W and in `coming`.
                unsafe {
                    if is_first {
                        tiles.zero()
                    } else {
                        tiles.load(c)
                    }
                    operands.multiply(&mut copy, slice.len(), is_pair);
                    tiles.store(c);
                }
                if is_last && !plan.is_streamed {
                    // SAFETY: handed on to the caller.
                    unsafe { store_block(job, c, group, outs.clone()) };
                }
            }
        }
        if plan.is_streamed && next.is_none_or(|next| plan.held_start(next) != held_start) {
            // SAFETY: handed on to the caller.
            unsafe { stream(job, &plan, c, held_rows, held_start..outs.end) };
        }
        let Some(next) = next else { return };
        copy.finish();
        (now, coming) = (coming, now);
        panel = next;
    }
}

/// Writes C of the held `outs` to y past the caches, row by row in runs of all `outs`.
///
/// # Safety
/// AVX-512 is there; the calling thread owns the outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn stream(job: &Job<'_, Line, bf16>, plan: &Plan, c: &[Line], held_rows: &mut [Line], outs: Range<usize>) {
    let row_lines = plan.row_lines();
    let (start, end) = (job.first_out + outs.start, job.first_out + outs.end);
    for group in 0..num_groups(job.rows) {
        for (line, first_out) in (start..end).step_by(GROUP).enumerate() {
            let tile = (line / 2 * plan.num_row_blocks + group / 2) * 4 + line % 2 * 2 + group % 2;
            let tile = &c[tile * TILE_LINES..][..TILE_LINES];
            let width = GROUP.min(end - first_out);
            // SAFETY: every source is a line; the rest is handed on to the caller.
            let (rows, bias) = unsafe { (transpose(&starts(tile)), load_bias(job.out, first_out, width)) };
            for (row, &sums) in rows.iter().enumerate() {
                let sums = if let Some(bias) = bias { _mm512_add_ps(sums, bias) } else { sums };
                // SAFETY: a line is as long and as aligned as `sums`.
                unsafe { _mm512_store_ps((&raw mut held_rows[row * row_lines + line]).cast(), sums) };
            }
        }
        let first_row = group * GROUP;
        for (row, sums) in (first_row..job.rows.min(first_row + GROUP)).zip(held_rows.chunks_exact(row_lines)) {
            // SAFETY: handed on to the caller.
            let y = unsafe { job.out.row(row, start..end) };
            let sums = &bytemuck::cast_slice::<Line, f32>(sums)[..y.len()];
            let head = y.as_ptr().align_offset(align_of::<Line>()).min(y.len());
            let (y_head, y) = y.split_at_mut(head);
            let (sums_head, sums) = sums.split_at(head);
            let (y, y_tail) = y.as_chunks_mut::<GROUP>();
            let (sums, sums_tail) = sums.as_chunks::<GROUP>();
            y_head.copy_from_slice(sums_head);
            for (y, sums) in y.iter_mut().zip(sums) {
                // SAFETY: both are 16 long, and `y` begins on a line.
                unsafe { _mm512_stream_ps(y.as_mut_ptr(), _mm512_loadu_ps(sums.as_ptr())) };
            }
            y_tail.copy_from_slice(sums_tail);
        }
    }
    // Streamed stores are not ordered with the ones that tell the other threads about them.
    _mm_sfence();
}

/// What the loop over k copies besides: `quota` lines in each step, row by row.
struct Copy {
    src: *const bf16,
    dst: *mut Line,
    /// Lines left of this row.
    left: usize,
    /// Lines of a row.
    run: usize,
    /// Bytes from the end of a run to the next row of W, and of the panel.
    src_skip: usize,
    dst_skip: usize,
    /// Lines to copy in a step.
    quota: usize,
    /// Lines left of all rows.
    lines: usize,
    /// From a line to the one prefetched with it: a row.
    row_bytes: usize,
}

impl Copy {
    /// To copy steps `range` of the rows `outs` of W to a panel. A tail of k, which needs zeros, is copied at once.
    fn new(job: &Job<'_, Line, bf16>, outs: Range<usize>, range: Range<usize>, panel: &mut [Line]) -> Self {
        let k = job.in_features;
        let run = range.end.min(k / STEP).saturating_sub(range.start);
        if run < range.len() {
            for (row, out) in panel.chunks_exact_mut(PANEL_STRIDE).zip(outs.clone()) {
                copy_step(job, out..out + 1, k / STEP, &mut row[run..=run]);
            }
        }
        let row_bytes = k * size_of::<bf16>();
        Self {
            src: job.w.as_ptr().wrapping_add(outs.start * k + range.start * STEP),
            dst: panel.as_mut_ptr(),
            left: run,
            run,
            src_skip: row_bytes - run * size_of::<Line>(),
            dst_skip: (PANEL_STRIDE - run) * size_of::<Line>(),
            quota: 0,
            lines: run * outs.len(),
            row_bytes,
        }
    }

    /// Copies what is left.
    fn finish(&mut self) {
        while self.lines > 0 {
            // SAFETY: lines are left, so `src` lies in W and `dst` in the panel.
            unsafe { self.dst.write(self.src.cast::<Line>().read_unaligned()) };
            self.src = self.src.wrapping_add(STEP);
            self.dst = self.dst.wrapping_add(1);
            self.lines -= 1;
            self.left -= 1;
            if self.left == 0 {
                self.left = self.run;
                self.src = self.src.wrapping_byte_add(self.src_skip);
                self.dst = self.dst.wrapping_byte_add(self.dst_skip);
            }
        }
    }
}

/// Where the tiles of a block come from; moved on by every step.
struct Operands {
    a: *const Line,
    b: *const Line,
    b_second: *const Line,
}

/// The loop over k; see the picture in the parent module for the tiles.
macro_rules! run_steps {
    ($o:ident, $copy:ident, $quota:expr, $steps:ident, [$($tiles:literal),*]) => {
        asm!(
            "2:",
            $($tiles,)*
            "mov {n}, {quota}",
            "test {n}, {n}",
            "jz 4f",
            "3:",
            "vmovdqu64 {line}, [{src}]",
            "prefetcht1 [{src} + {far}*1]",
            "vmovdqa64 [{dst}], {line}",
            "add {src}, 64",
            "add {dst}, 64",
            "dec {left}",
            "jnz 5f",
            "add {src}, [{copy} + {src_skip}]",
            "add {dst}, [{copy} + {dst_skip}]",
            "mov {left}, [{copy} + {run}]",
            "5:",
            "dec {n}",
            "jnz 3b",
            "4:",
            "add {a}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            a = inout(reg) $o.a, b0 = inout(reg) $o.b, b1 = inout(reg) $o.b_second,
            line_bytes = in(reg) size_of::<Line>(), sa = in(reg) PANEL_STRIDE * size_of::<Line>(),
            second = const GROUP * PANEL_STRIDE * size_of::<Line>(),
            steps = inout(reg) $steps => _,
            run = const offset_of!(Copy, run), src_skip = const offset_of!(Copy, src_skip),
            dst_skip = const offset_of!(Copy, dst_skip),
            copy = in(reg) &raw const *$copy, far = in(reg) $copy.row_bytes, quota = in(reg) $quota,
            src = inout(reg) $copy.src, dst = inout(reg) $copy.dst, left = inout(reg) $copy.left,
            n = out(reg) _, line = out(zmm_reg) _,
            options(nostack),
        )
    };
}

impl Operands {
    /// C += A B over `steps` steps, the second column of tiles only if `is_pair`. Copies as `copy` says, and moves it on.
    ///
    /// # Safety
    /// Tiles are configured for 16 columns. A and B can be read for all steps. `copy` names what lies in W and in a panel.
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply(&mut self, copy: &mut Copy, steps: usize, is_pair: bool) {
        let with_copy = steps.min(copy.lines.checked_div(copy.quota).unwrap_or(0));
        copy.lines -= with_copy * copy.quota;
        // SAFETY: as the caller promises.
        unsafe {
            self.run(copy, copy.quota, with_copy, is_pair);
            self.run(copy, 0, steps - with_copy, is_pair);
        }
    }

    /// # Safety
    /// As [`Self::multiply`]; `quota` lines a step are left.
    #[target_feature(enable = "avx512f")]
    unsafe fn run(&mut self, copy: &mut Copy, quota: usize, steps: usize, is_pair: bool) {
        if steps == 0 {
            return;
        }
        // SAFETY: as the caller promises; a prefetch may name any address.
        unsafe {
            if is_pair {
                run_steps!(
                    self,
                    copy,
                    quota,
                    steps,
                    [
                        "tileloaddt1 tmm6, [{b0} + {line_bytes}*1]",
                        "tileloadd tmm4, [{a} + {sa}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloaddt1 tmm7, [{b1} + {line_bytes}*1]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{a} + {sa}*1 + {second}]",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ]
                )
            } else {
                run_steps!(
                    self,
                    copy,
                    quota,
                    steps,
                    [
                        "tileloaddt1 tmm6, [{b0} + {line_bytes}*1]",
                        "tileloadd tmm4, [{a} + {sa}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{a} + {sa}*1 + {second}]",
                        "tdpbf16ps tmm2, tmm5, tmm6"
                    ]
                )
            }
        }
    }
}

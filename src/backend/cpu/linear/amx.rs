//! `linear` for bf16 with AMX tiles.
//!
//! A tile pair `C[16 outs][rows] += A[16 outs][32 k] B[32 k][rows]`: A is read straight from the weights (16 rows, their own
//! stride), B is x packed once per call so that a line holds one pair of k for all rows of a group of 16. C comes out with
//! outputs down and rows across, and is transposed on its way to y.
//!
//! ```text
//!            B  group 0   group 1          tmm6 tmm7
//! A  outs 0-15  tmm0      tmm1       tmm4
//!    outs 16-31 tmm2      tmm3       tmm5
//! ```
//!
//! Many rows: `panelled`. Few rows: weights stream once, prefetched one block of 32 outs ahead in the order in which they
//! lie in memory. A tail of k (`in % 32`) is multiplied from copies filled up with zeros.
//!
//! `C[i][j]` is summed by the same instruction over the same 32 k at a time whatever the other elements of its tile are.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::{Job, Line, Output};

mod panelled;

/// Outputs of one block: two tiles.
const OUTS: usize = 32;
pub(super) const GRAIN: usize = OUTS;
/// Rows of x in one tile.
const GROUP: usize = 16;
/// k in one tile.
const STEP: usize = 32;
const TILE_LINES: usize = 16;
const C_LINES: usize = 4 * TILE_LINES;
/// The next 32 rows of W are prefetched into the L2 if they take no more than this, else `AHEAD_STEPS` of the same rows.
const MAX_AHEAD_BYTES: usize = 512 << 10;
const AHEAD_STEPS: usize = 24;

/// How many groups of 16 rows there are.
pub(super) fn num_groups(rows: usize) -> usize {
    rows.div_ceil(GROUP)
}

/// Lines of one packed group: `[steps][16 pairs of k][columns]` words. Fewer than 16 rows take no more room than they need.
pub(super) fn group_lines(rows: usize, in_features: usize) -> usize {
    in_features.div_ceil(STEP) * num_columns(rows)
}

/// Lines each thread needs; for few rows the tail of k of one block of weights, and C.
pub(super) fn thread_lines(rows: usize, in_features: usize, out_features: usize) -> usize {
    if is_panelled(rows) { panelled::thread_lines(rows, in_features, out_features) } else { OUTS + C_LINES }
}

/// Whether there are enough rows to pay for copying each block of W.
fn is_panelled(rows: usize) -> bool {
    rows > 2 * GROUP
}

fn num_columns(rows: usize) -> usize {
    rows.min(GROUP)
}

/// Packs rows `[16 group, 16 group + 16)` of x `[rows, in]`; missing rows and the tail of k become zero.
///
/// # Safety
/// AVX-512 F, BW, VL and DQ are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack(x: &[bf16], rows: usize, in_features: usize, group: usize, lines: &mut [Line]) {
    let (k, columns) = (in_features, num_columns(rows));
    let first = group * GROUP;
    let num_rows = GROUP.min(rows - first);
    let row_at = |r: usize, at: usize| &x[(first + r) * k + at..][..STEP.min(k - at)];
    let mask = ((1u32 << columns) - 1) as __mmask16;
    for (step, lines) in lines.chunks_exact_mut(columns).enumerate() {
        let at = step * STEP;
        let mut filled = [Line::ZERO; GROUP];
        let mut sources = starts(&filled);
        if at + STEP <= k {
            for (r, source) in sources.iter_mut().enumerate().take(num_rows) {
                *source = row_at(r, at).as_ptr().cast();
            }
        } else {
            for (r, line) in filled.iter_mut().enumerate().take(num_rows) {
                let tail = row_at(r, at);
                bytemuck::cast_slice_mut::<u32, bf16>(&mut line.0)[..tail.len()].copy_from_slice(tail);
            }
            sources = starts(&filled);
        }
        let dst: &mut [f32] = bytemuck::cast_slice_mut(lines);
        // SAFETY: every source has 64 bytes: a whole step of a row of x, or a line of `filled`.
        let pairs = unsafe { transpose(&sources) };
        for (dst, pairs) in dst.chunks_exact_mut(columns).zip(pairs) {
            // SAFETY: the mask names `columns` words, which `dst` has.
            unsafe { _mm512_mask_storeu_ps(dst.as_mut_ptr(), mask, pairs) };
        }
    }
}

/// Where 16 lines begin.
#[inline]
fn starts(lines: &[Line]) -> [*const f32; TILE_LINES] {
    std::array::from_fn(|i| lines[i].0.as_ptr().cast())
}

/// Column j of the 16 x 16 words at `sources`, for every j.
///
/// # Safety
/// AVX-512 F and DQ are there, and 64 bytes can be read at every source.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn transpose(sources: &[*const f32; 16]) -> [__m512; 16] {
    let mut columns = [_mm512_setzero_ps(); 16];
    for c in 0..4 {
        let mut rows = [_mm512_setzero_ps(); 4];
        for (j, row) in rows.iter_mut().enumerate() {
            // Quarter c of rows j, j + 4, j + 8, j + 12: the loads do half of the work, which spares the shuffle port.
            // SAFETY: four words at `4 c` lie in the 16 that the caller vouches for.
            unsafe {
                let v = _mm512_castps128_ps512(_mm_loadu_ps(sources[j].add(4 * c)));
                let v = _mm512_insertf32x4::<1>(v, _mm_loadu_ps(sources[j + 4].add(4 * c)));
                let v = _mm512_insertf32x4::<2>(v, _mm_loadu_ps(sources[j + 8].add(4 * c)));
                *row = _mm512_insertf32x4::<3>(v, _mm_loadu_ps(sources[j + 12].add(4 * c)));
            }
        }
        let low = [_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpacklo_ps(rows[2], rows[3])];
        let high = [_mm512_unpackhi_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[2], rows[3])];
        columns[4 * c] = _mm512_shuffle_ps::<0x44>(low[0], low[1]);
        columns[4 * c + 1] = _mm512_shuffle_ps::<0xEE>(low[0], low[1]);
        columns[4 * c + 2] = _mm512_shuffle_ps::<0x44>(high[0], high[1]);
        columns[4 * c + 3] = _mm512_shuffle_ps::<0xEE>(high[0], high[1]);
    }
    columns
}

/// # Safety
/// AMX and AVX-512 are there and permitted; `job.x` holds all groups as [`pack`] made them; `own` has [`thread_lines`];
/// the calling thread owns the outputs of `job`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn multiply(job: &Job<'_, Line, bf16>, own: &mut [Line]) {
    if is_panelled(job.rows) {
        // SAFETY: handed on to the caller.
        return unsafe { panelled::multiply(job, own) };
    }
    let k = job.in_features;
    let (steps, whole_steps) = (k.div_ceil(STEP), k / STEP);
    let columns = num_columns(job.rows);
    let group_lines = group_lines(job.rows, k);
    let is_pair = job.rows > GROUP;
    let (tail, c) = own.split_at_mut(OUTS);
    let row_bytes = k * size_of::<bf16>();
    let ahead_in_row = OUTS * row_bytes > MAX_AHEAD_BYTES;
    // SAFETY: the caller vouches for AMX.
    let mut tiles = unsafe { Tiles::new() };

    for out in (0..job.num_outs).step_by(OUTS) {
        let num_outs = OUTS.min(job.num_outs - out);
        // SAFETY: as above.
        unsafe { tiles.configure(num_outs, columns) };
        if whole_steps < steps {
            copy_step(job, out..out + num_outs, whole_steps, tail);
        }
        // A second tile that does not exist is computed as a copy of the first one and not stored.
        let second = if num_outs > GROUP { GROUP } else { 0 };
        let a = job.w[out * k..].as_ptr();
        let (ahead, quads) = if ahead_in_row {
            (out * k + AHEAD_STEPS * STEP, num_outs / 4)
        } else {
            ((out + OUTS) * k, if out + OUTS < job.num_outs { OUTS / 4 } else { 0 })
        };
        let mut operands = Operands {
            a,
            a_second: a.wrapping_byte_add(second * row_bytes),
            a_stride: row_bytes,
            a_step: size_of::<Line>(),
            row_bytes,
            b: job.x.as_ptr(),
            b_second: job.x.as_ptr().wrapping_add(group_lines),
            b_stride: columns * size_of::<u32>(),
            ahead: job.w.as_ptr().wrapping_add(ahead),
            quads,
            ahead_is_down: ahead_in_row,
        };
        // SAFETY: tiles are configured. `whole` steps of `num_outs` rows of W lie in `job.w`; the group, and the next one
        // if `is_pair`, have `steps` packed steps; `tail` has a line for every row; `c` has four tiles.
        unsafe {
            tiles.zero();
            tiles.multiply(&mut operands, whole_steps, is_pair);
            if whole_steps < steps {
                operands.a = tail.as_ptr().cast();
                operands.a_second = tail.as_ptr().wrapping_add(second).cast();
                operands.a_stride = size_of::<Line>();
                operands.quads = 0;
                tiles.multiply(&mut operands, 1, is_pair);
            }
            tiles.store(c);
        }
        // SAFETY: handed on to the caller.
        unsafe { store_block(job, c, 0, out..out + num_outs) };
    }
}

/// Fetches the lines of y that [`store_block`] will write: its rows lie pages apart, where no prefetcher follows.
///
/// # Safety
/// The calling thread owns the outputs.
#[inline]
unsafe fn prefetch_block(job: &Job<'_, Line, bf16>, group: usize, outs: Range<usize>) {
    let first_row = group * GROUP;
    let (start, end) = (job.first_out + outs.start, job.first_out + outs.end);
    for row in first_row..job.rows.min(first_row + 2 * GROUP) {
        // SAFETY: handed on to the caller.
        let y = unsafe { job.out.row(row, start..end) };
        for line in y.chunks(GROUP) {
            // SAFETY: a prefetch may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast()) };
        }
    }
}

/// Writes the four tiles of C of two groups of rows from `group` to y, transposed.
///
/// # Safety
/// AVX-512 is there; the calling thread owns the outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store_block(job: &Job<'_, Line, bf16>, c: &[Line], group: usize, outs: Range<usize>) {
    for (i, tile) in c.chunks_exact(TILE_LINES).enumerate() {
        let (first_row, first_out) = ((group + i % 2) * GROUP, outs.start + i / 2 * GROUP);
        if first_row < job.rows && first_out < outs.end {
            let num_rows = GROUP.min(job.rows - first_row);
            let width = GROUP.min(outs.end - first_out);
            // SAFETY: handed on to the caller.
            unsafe { store(job.out, tile, first_row, num_rows, job.first_out + first_out, width) };
        }
    }
}

/// Copies one step of k of the rows `outs` of W, a line each; past the end of k come zeros.
fn copy_step(job: &Job<'_, Line, bf16>, outs: Range<usize>, step: usize, lines: &mut [Line]) {
    let k = job.in_features;
    for (n, line) in outs.zip(lines) {
        let line: &mut [bf16; STEP] = bytemuck::cast_mut(&mut line.0);
        let row = &job.w[n * k + step * STEP..(n + 1) * k];
        match row.first_chunk() {
            Some(whole) => *line = *whole,
            None => {
                line[..row.len()].copy_from_slice(row);
                line[row.len()..].fill(bf16::ZERO);
            }
        }
    }
}

/// Writes one tile, transposed, to y\[first_row.., first_out..\].
///
/// # Safety
/// AVX-512 is there; the calling thread owns the outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store(out: &Output<'_>, tile: &[Line], first_row: usize, num_rows: usize, first_out: usize, width: usize) {
    // SAFETY: every source is a line; the rest is handed on to the caller.
    let (rows, bias) = unsafe { (transpose(&starts(tile)), load_bias(out, first_out, width)) };
    if num_rows == GROUP {
        // The usual case: a loop of known length keeps all rows in registers.
        for (row, &sums) in rows.iter().enumerate() {
            // SAFETY: as below.
            unsafe { store_row(out, first_row + row, first_out, width, sums, bias) };
        }
    } else {
        for (row, &sums) in rows.iter().enumerate().take(num_rows) {
            // SAFETY: handed on to the caller.
            unsafe { store_row(out, first_row + row, first_out, width, sums, bias) };
        }
    }
}

/// The bias of `width` outs.
///
/// # Safety
/// AVX-512 is there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_bias(out: &Output<'_>, first_out: usize, width: usize) -> Option<__m512> {
    out.bias.map(|bias| {
        let bias = &bias[first_out..first_out + width];
        // SAFETY: the mask names the elements of `bias`.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << bias.len()) - 1) as __mmask16, bias.as_ptr()) }
    })
}

/// y\[row, first_out..first_out + width\] = sums + bias.
///
/// # Safety
/// As [`store`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store_row(out: &Output<'_>, row: usize, first_out: usize, width: usize, sums: __m512, bias: Option<__m512>) {
    let sums = if let Some(bias) = bias { _mm512_add_ps(sums, bias) } else { sums };
    // SAFETY: handed on to the caller.
    let y = unsafe { out.row(row, first_out..first_out + width) };
    // SAFETY: the mask names the elements of `y`.
    unsafe { _mm512_mask_storeu_ps(y.as_mut_ptr(), ((1u32 << y.len()) - 1) as __mmask16, sums) };
}

/// Where the tiles of one block come from; moved on by every step.
struct Operands {
    a: *const bf16,
    a_second: *const bf16,
    a_stride: usize,
    a_step: usize,
    b: *const Line,
    b_second: *const Line,
    b_stride: usize,
    /// What to prefetch: `4 quads` lines a step.
    ahead: *const bf16,
    quads: usize,
    /// Bytes from one row of W to the next, for the prefetch.
    row_bytes: usize,
    /// Whether each step takes one line of many rows, rather than four lines of every fourth row.
    ahead_is_down: bool,
}

/// This thread's tile registers, between configuration and release. Nothing else in the process uses them.
struct Tiles {
    /// What they are configured for: outs and columns.
    shape: (usize, usize),
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The loop over k. Tiles: `pair` or `single`, the columns of C. Prefetches: `quads` times four lines a step, `down` one
/// column of lines of 4 rows, or `along` the first of every 4 rows. A prefetch may name any address.
macro_rules! run_steps {
    ($o:ident, $steps:ident, pair, $ahead:ident) => {
        run_steps!(@ahead $o, $steps, $ahead, [
            "tileloadd tmm6, [{b0} + {sb}*1]",
            "tileloadd tmm4, [{a0} + {sa}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {sb}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {sa}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7"
        ])
    };
    ($o:ident, $steps:ident, single, $ahead:ident) => {
        run_steps!(@ahead $o, $steps, $ahead, [
            "tileloadd tmm6, [{b0} + {sb}*1]",
            "tileloadd tmm4, [{a0} + {sa}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {sa}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6"
        ])
    };
    (@ahead $o:ident, $steps:ident, down, $tiles:tt) => {
        run_steps!(@asm $o, $steps, $tiles, [
            "prefetcht1 [{at}]",
            "prefetcht1 [{at} + {row}*1]",
            "lea {at}, [{at} + {row}*2]",
            "prefetcht1 [{at}]",
            "prefetcht1 [{at} + {row}*1]",
            "lea {at}, [{at} + {row}*2]"
        ], "add {ahead}, 64")
    };
    (@ahead $o:ident, $steps:ident, along, $tiles:tt) => {
        run_steps!(@asm $o, $steps, $tiles, [
            "prefetcht1 [{at}]",
            "prefetcht1 [{at} + 64]",
            "prefetcht1 [{at} + 128]",
            "prefetcht1 [{at} + 192]",
            "lea {at}, [{at} + {row}*4]"
        ], "add {ahead}, 256")
    };
    (@asm $o:ident, $steps:ident, [$($tiles:literal),*], [$($ahead:literal),*], $advance:literal) => {
        asm!(
            "2:",
            $($tiles,)*
            "mov {at}, {ahead}",
            "mov {n}, {quads}",
            "test {n}, {n}",
            "jz 4f",
            "3:",
            $($ahead,)*
            "dec {n}",
            "jnz 3b",
            "4:",
            $advance,
            "add {a0}, {a_step}",
            "add {a1}, {a_step}",
            // One step of B: 16 strides.
            "lea {b0}, [{b0} + {sb}*8]",
            "lea {b0}, [{b0} + {sb}*8]",
            "lea {b1}, [{b1} + {sb}*8]",
            "lea {b1}, [{b1} + {sb}*8]",
            "dec {steps}",
            "jnz 2b",
            a0 = inout(reg) $o.a, a1 = inout(reg) $o.a_second, sa = in(reg) $o.a_stride,
            a_step = in(reg) $o.a_step, row = in(reg) $o.row_bytes,
            b0 = inout(reg) $o.b, b1 = inout(reg) $o.b_second, sb = in(reg) $o.b_stride,
            steps = inout(reg) $steps => _, ahead = inout(reg) $o.ahead, quads = in(reg) $o.quads,
            at = out(reg) _, n = out(reg) _,
            options(nostack, readonly),
        )
    };
}

impl Tiles {
    /// # Safety
    /// AMX is there and permitted.
    unsafe fn new() -> Self {
        Self { shape: (0, 0) }
    }

    /// Shapes the tiles for a block of `num_outs` outs (at most 32) and `columns` rows of x (at most 16).
    ///
    /// # Safety
    /// AMX is there and permitted.
    unsafe fn configure(&mut self, num_outs: usize, columns: usize) {
        if self.shape == (num_outs, columns) {
            return;
        }
        self.shape = (num_outs, columns);
        let first = num_outs.min(GROUP) as u8;
        let second = if num_outs > GROUP { (num_outs - GROUP) as u8 } else { first };
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.rows[..8].copy_from_slice(&[first, first, second, second, first, second, 16, 16]);
        let narrow = 4 * columns as u16;
        config.row_bytes[..8].copy_from_slice(&[narrow, narrow, narrow, narrow, 64, 64, narrow, narrow]);
        // SAFETY: 64 bytes of a valid palette 1 configuration: at most 16 rows of at most 64 bytes.
        unsafe {
            asm!("ldtilecfg [{0}]", in(reg) &raw const config, options(nostack),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
    }

    /// C = 0.
    ///
    /// # Safety
    /// Configured.
    unsafe fn zero(&mut self) {
        // SAFETY: touches tile registers only.
        unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)) };
    }

    /// C = `c`, four tiles.
    ///
    /// # Safety
    /// Configured; `c` has `C_LINES`.
    unsafe fn load(&mut self, c: &[Line]) {
        // SAFETY: four tiles of 16 lines are read, which `c` has.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {s}*1]",
                "tileloadd tmm1, [{c} + {s}*1 + 1024]",
                "tileloadd tmm2, [{c} + {s}*1 + 2048]",
                "tileloadd tmm3, [{c} + {s}*1 + 3072]",
                c = in(reg) c.as_ptr(), s = in(reg) size_of::<Line>(), options(nostack, readonly),
            );
        }
    }

    /// `c` = C.
    ///
    /// # Safety
    /// Configured; `c` has `C_LINES`.
    unsafe fn store(&mut self, c: &mut [Line]) {
        // SAFETY: four tiles of at most 16 lines are written, which `c` has.
        unsafe {
            asm!(
                "tilestored [{c} + {s}*1], tmm0",
                "tilestored [{c} + {s}*1 + 1024], tmm1",
                "tilestored [{c} + {s}*1 + 2048], tmm2",
                "tilestored [{c} + {s}*1 + 3072], tmm3",
                c = in(reg) c.as_mut_ptr(), s = in(reg) size_of::<Line>(), options(nostack),
            );
        }
    }

    /// C += A B over `steps` steps; the second column of tiles only if `is_pair` (16 columns each then).
    ///
    /// # Safety
    /// Configured; A and B can be read for all steps.
    unsafe fn multiply(&mut self, o: &mut Operands, steps: usize, is_pair: bool) {
        if steps == 0 {
            return;
        }
        // SAFETY: as the caller promises.
        unsafe {
            match (is_pair, o.ahead_is_down) {
                (true, true) => run_steps!(o, steps, pair, down),
                (true, false) => run_steps!(o, steps, pair, along),
                (false, true) => run_steps!(o, steps, single, down),
                (false, false) => run_steps!(o, steps, single, along),
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: touches tile registers only; allowed without a configuration too.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

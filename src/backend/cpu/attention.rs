//! `paged_attention`: every row over the slots its plan names.
//!
//! formula: o = softmax(s) V, lse = ln sum exp(s), per row and query head, s = sm_scale q K^T or, capped,
//! softcap tanh(sm_scale q K^T / softcap), over the slots of the row's window
//! work split: units of (row group, kv head, run of queries); a unit owns its outputs and walks its segments in tile
//! order, so threads never divide a sum
//! numerics: see `tile.rs`; a row's bits depend on its own tokens alone
//! traffic: each planned tile of K and V once per unit that needs it; none that lies below the windows of a unit's rows
//! oracle: `testing::oracle::attention`; tests: `tests/kernels/attention.rs`
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

pub mod mass;
pub(super) mod scale;
mod tile;

use self::scale::ScoreScale;
use self::tile::{Scratch, TileRows};
use super::elem::Elem;
use super::pool::{SharedMut, ThreadPool};
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use crate::backend::checks;
use crate::batch::{AttentionPlan, PlanSegment, TILE_SLOTS, window_start};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// What to ask of `AttentionPlan`: rows that share their tiles in one group. Larger groups are cut into units anyway.
pub const MAX_GROUP_ROWS: usize = 64;

/// Queries (rows times query heads of a kv head) a unit holds at most: their outputs stay in the first-level cache
/// while the tiles pass (112 x 64 x 4 bytes = 28 KiB of 48 KiB).
const UNIT_QUERIES: usize = 112;
/// Below this many queries a tile costs more to fetch and transpose than to use, so units are not cut finer.
const MIN_UNIT_QUERIES: usize = 4;
/// Multiply-adds below which waking the other threads costs more than it saves (about 10 us of one core).
const THREAD_WORK: usize = 200_000;

/// The arguments of `paged_attention`; `T` is the compute type.
pub struct PagedAttentionArgs<'a, T> {
    /// Who reads which tiles for whom.
    pub plan: &'a AttentionPlan,
    /// `[T, Hq, D]`
    pub q: &'a [T],
    /// K of one layer.
    pub k_cache: &'a [T],
    /// V of one layer.
    pub v_cache: &'a [T],
    /// `[T, Hq, D]`, written.
    pub o: &'a mut [T],
    /// `[T, Hq]`, ln sum exp of the scores, written.
    pub lse: &'a mut [f32],
    /// Query heads.
    pub num_q_heads: usize,
    /// Multiplies q k; above zero.
    pub sm_scale: f32,
    /// Newest slots that a row attends to, at least 1; `None`: all.
    pub window: Option<usize>,
    /// Bound of the scores; above zero.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
}

/// Scratch of all threads, kept between calls so that a steady state allocates nothing.
#[derive(Default)]
pub struct AttentionScratch {
    threads: Vec<Scratch>,
    units: Vec<Unit>,
    seen: Vec<u64>,
}

/// Queries `[start, end)` of one kv head in one group; query `i` is row `i / group` of the group, head `i % group`.
#[derive(Clone)]
struct Unit {
    group: usize,
    kv_head: usize,
    queries: Range<usize>,
}

/// See [`PagedAttentionArgs`]. Every batch row that the plan names must lie inside `q`, `o` and `lse`, once.
pub fn paged_attention<T: Elem>(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut AttentionScratch,
    args: PagedAttentionArgs<'_, T>,
) -> Result<()> {
    check(&args, &mut scratch.seen)?;
    let threads = pool.num_threads();
    let work = plan_units(&args, threads, &mut scratch.units);
    scratch.threads.resize_with(threads.max(scratch.threads.len()), Scratch::default);
    let job = Job {
        plan: args.plan,
        q: args.q,
        k_cache: args.k_cache,
        v_cache: args.v_cache,
        o: SharedMut::new(args.o),
        lse: SharedMut::new(args.lse),
        num_q_heads: args.num_q_heads,
        scale: ScoreScale::new(args.sm_scale, args.softcap),
        window: args.window,
        layout: args.layout,
        units: &scratch.units,
        next: AtomicUsize::new(0),
    };
    if threads == 1 || scratch.units.len() == 1 || work < THREAD_WORK {
        if let Some(own) = scratch.threads.first_mut() {
            job.run(level, own);
        }
        return Ok(());
    }
    let own = SharedMut::new(&mut scratch.threads);
    pool.run(&|idx| {
        // SAFETY: each thread takes the scratch of its own index.
        if let Some(own) = unsafe { own.range(idx..idx + 1) }.first_mut() {
            job.run(level, own);
        }
    });
    Ok(())
}

/// Cuts the plan into units, the longest first, and returns the multiply-adds they add up to.
fn plan_units<T>(args: &PagedAttentionArgs<'_, T>, threads: usize, units: &mut Vec<Unit>) -> usize {
    let heads = args.layout.num_kv_heads;
    let group_heads = args.num_q_heads / heads;
    let plan = args.plan;
    let whole = |rows: usize| (rows * group_heads).div_ceil(UNIT_QUERIES).max(1);
    let planned: usize = plan.groups.iter().map(|g| heads * whole(g.rows.len())).sum();
    let refine = threads.div_ceil(planned.max(1));
    units.clear();
    // Groups of a prefill attend to more and more: the last is the longest.
    for (group, g) in plan.groups.iter().enumerate().rev() {
        let queries = g.rows.len() * group_heads;
        let pieces = (whole(g.rows.len()) * refine).min(queries.div_ceil(MIN_UNIT_QUERIES)).max(1);
        for piece in (0..pieces).rev() {
            let queries = queries * piece / pieces..queries * (piece + 1) / pieces;
            units.extend((0..heads).map(|kv_head| Unit { group, kv_head, queries: queries.clone() }));
        }
    }
    let read = |s: &PlanSegment| s.num_slots - plan.slots_below(s, s.rows.clone(), args.window);
    let row_slots: usize = plan.segments.iter().map(|s| s.rows.len() * read(s)).sum();
    2 * row_slots * args.num_q_heads * args.layout.head_dim
}

struct Job<'a, T> {
    plan: &'a AttentionPlan,
    q: &'a [T],
    k_cache: &'a [T],
    v_cache: &'a [T],
    o: SharedMut<'a, T>,
    lse: SharedMut<'a, f32>,
    num_q_heads: usize,
    scale: ScoreScale,
    window: Option<usize>,
    layout: &'a KvLayout,
    units: &'a [Unit],
    next: AtomicUsize,
}

/// One thread's turn. `pairs`: bf16 goes through the pair dot product instruction where there is one.
struct Turn<'a, T> {
    job: &'a Job<'a, T>,
    own: &'a mut Scratch,
    pairs: bool,
}

impl<T: Elem> Kernel for Turn<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        loop {
            // Who takes a unit has no bearing on its result.
            let at = self.job.next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = self.job.units.get(at) else { return };
            if const { V::PAIRS && matches!(T::DTYPE, DType::Bf16) } && self.pairs {
                self.job.run_unit::<V, true>(v, unit, self.own);
            } else {
                self.job.run_unit::<V, false>(v, unit, self.own);
            }
        }
    }
}

impl<T: Elem> Job<'_, T> {
    fn run(&self, level: SimdLevel, own: &mut Scratch) {
        // Cores with AMX have half the multiply-add rate in vdpbf16ps (measured on Sapphire Rapids: one in 2 cycles, against
        // two f32 FMA in one); those with AVX-512 alone, Zen 4 among them, have twice.
        dispatch(level, Turn { job: self, own, pairs: level == SimdLevel::Avx512 });
    }

    #[inline(always)]
    fn run_unit<V: Vector, const PAIRS: bool>(&self, v: V, unit: &Unit, own: &mut Scratch) {
        let heads = self.num_q_heads / self.layout.num_kv_heads;
        let dim = self.layout.head_dim;
        let group = &self.plan.groups[unit.group];
        let first = unit.queries.start;
        own.begin::<V, T, PAIRS>(v, unit.queries.len(), dim);
        for i in unit.queries.clone() {
            let at = self.query(group.rows.start, unit.kv_head, i) * dim;
            own.set_query::<V, T, PAIRS>(v, i - first, &self.q[at..at + dim]);
        }
        for segment in &self.plan.segments[group.segments.clone()] {
            let from = ((segment.rows.start - group.rows.start) * heads).max(unit.queries.start);
            let to = ((segment.rows.end - group.rows.start) * heads).min(unit.queries.end);
            if from < to {
                self.run_segment::<V, PAIRS>(v, unit, segment, from..to, own);
            }
        }
        for i in unit.queries.clone() {
            let at = self.query(group.rows.start, unit.kv_head, i);
            // SAFETY: `check` saw that no batch row is named twice, and units do not share a (row, head).
            let (o, lse) = unsafe { (self.o.range(at * dim..(at + 1) * dim), self.lse.range(at..at + 1)) };
            lse[0] = own.finish(v, i - first, o);
        }
    }

    /// Index into `[T, Hq]` of query `i` of a group.
    #[inline(always)]
    fn query(&self, first_row: usize, kv_head: usize, i: usize) -> usize {
        let heads = self.num_q_heads / self.layout.num_kv_heads;
        let row = self.plan.row_order[first_row + i / heads] as usize;
        row * self.num_q_heads + kv_head * heads + i % heads
    }

    /// Folds a segment's tiles into the queries `[queries.start, queries.end)` of the group.
    #[inline(always)]
    fn run_segment<V: Vector, const PAIRS: bool>(
        &self,
        v: V,
        unit: &Unit,
        segment: &PlanSegment,
        queries: Range<usize>,
        own: &mut Scratch,
    ) {
        let heads = self.num_q_heads / self.layout.num_kv_heads;
        let group_row = self.plan.groups[unit.group].rows.start;
        let rows = group_row + queries.start / heads..group_row + (queries.end - 1) / heads + 1;
        let lens = &self.plan.kv_lens[rows.clone()];
        let longest = lens.iter().map(|&n| n as usize).max().unwrap_or(0);
        let start_slot = segment.tile_start * TILE_SLOTS;
        let end_slot = (start_slot + segment.num_slots).min(longest);
        let size = self.layout.block_size;
        let blocks = &self.plan.blocks[segment.blocks.clone()];
        let mut slot = start_slot + self.plan.slots_below(segment, rows, self.window);
        while slot < end_slot {
            let num_slots = (end_slot - slot).min(TILE_SLOTS);
            let first_block = (slot - start_slot) / size;
            let tile = |cache| TileRows {
                blocks: &blocks[first_block..first_block + num_slots.div_ceil(size)],
                cache,
                block_elems: self.layout.block_elems(),
                head_start: self.layout.elem(0, unit.kv_head, 0),
                block_size: size,
                head_dim: self.layout.head_dim,
                num_slots,
            };
            own.load_tile::<V, T, PAIRS>(v, &tile(self.k_cache), &tile(self.v_cache));
            // Runs of queries that attend to the same slots of this tile.
            let (first, mut at) = (unit.queries.start, queries.start);
            while at < queries.end {
                let slots = self.attended(group_row + at / heads, slot);
                let mut to = at - at % heads;
                while to < queries.end && self.attended(group_row + to / heads, slot) == slots {
                    to += heads;
                }
                let to = to.min(queries.end);
                if !slots.is_empty() {
                    own.fold::<V, T, PAIRS>(v, at - first..to - first, &slots, &self.scale);
                }
                at = to;
            }
            slot += TILE_SLOTS;
        }
    }

    /// Slots of the tile at `slot` that an ordered row attends to.
    #[inline(always)]
    fn attended(&self, row: usize, slot: usize) -> Range<usize> {
        let kv_len = self.plan.kv_lens[row] as usize;
        let of_tile = |end: usize| end.saturating_sub(slot).min(TILE_SLOTS);
        of_tile(window_start(kv_len, self.window))..of_tile(kv_len)
    }
}

/// Everything the kernel indexes by; also that no two units write the same output.
fn check<T: Elem>(args: &PagedAttentionArgs<'_, T>, seen: &mut Vec<u64>) -> Result<()> {
    checks::window_and_softcap("paged_attention", args.window, args.softcap)?;
    let layout = args.layout;
    let shape = |expected: String, got: String| Err(Error::Shape { op: "paged_attention", expected, got });
    let (hq, hkv, dim) = (args.num_q_heads, layout.num_kv_heads, layout.head_dim);
    if hkv == 0 || hq % hkv != 0 || dim == 0 || dim % 2 != 0 {
        return shape("whole query groups and an even head_dim".into(), format!("{hq}/{hkv} heads of {dim}"));
    }
    if layout.block_size == 0 || !TILE_SLOTS.is_multiple_of(layout.block_size) {
        return shape("a block size that divides 64".into(), layout.block_size.to_string());
    }
    let rows = args.lse.len() / hq.max(1);
    if args.lse.len() != rows * hq || args.q.len() != rows * hq * dim || args.o.len() != rows * hq * dim {
        return shape(
            format!("q and o of [{rows}, {hq}, {dim}]"),
            format!("q {}, o {}, lse {}", args.q.len(), args.o.len(), args.lse.len()),
        );
    }
    let cache = layout.num_blocks * layout.block_elems();
    if args.k_cache.len() < cache || args.v_cache.len() < cache {
        return shape(
            format!("{cache} elements of K and V"),
            format!("{}, {}", args.k_cache.len(), args.v_cache.len()),
        );
    }
    let plan = args.plan;
    let bad = |what: &str| shape("a plan that fits the batch".into(), what.to_string());
    if plan.kv_lens.len() != plan.row_order.len() {
        return bad("kv_lens and row_order of different lengths");
    }
    seen.clear();
    seen.resize(rows.div_ceil(64), 0);
    for &row in &plan.row_order {
        let (word, bit) = (row as usize / 64, 1u64 << (row % 64));
        if row as usize >= rows || seen[word] & bit != 0 {
            return bad("a row that is out of range or named twice");
        }
        seen[word] |= bit;
    }
    if plan.blocks.iter().any(|&b| b as usize >= layout.num_blocks) {
        return bad("a block id out of range");
    }
    let mut next_row = 0;
    for group in &plan.groups {
        if group.rows.start != next_row || group.rows.end <= next_row || group.rows.end > plan.row_order.len() {
            return bad("groups that do not follow each other");
        }
        next_row = group.rows.end;
        let segments = plan.segments.get(group.segments.clone()).unwrap_or_default();
        for s in segments {
            let inside = group.rows.start <= s.rows.start && s.rows.start <= s.rows.end && s.rows.end <= group.rows.end;
            let blocks = plan.blocks.get(s.blocks.clone()).map_or(0, <[u32]>::len);
            if !inside || blocks * layout.block_size < s.num_slots {
                return bad("a segment outside its group or its blocks");
            }
        }
        if segments.len() != group.segments.len() {
            return bad("segments out of range");
        }
    }
    if next_row != plan.row_order.len() {
        return bad("rows without a group");
    }
    Ok(())
}

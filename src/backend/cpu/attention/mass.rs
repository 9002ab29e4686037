//! `attention_mass`: how much attention each cached slot received from a sequence's rows.
//!
//! formula: mass\[h, j\] = sum over rows that attend to slot j, and query heads of kv head h, of exp(score - lse)
//! work split: units of (sequence, kv head, tile); a unit owns its slots, so threads never divide a sum
//! numerics: scores as in `paged_attention`, to the bit; a slot's sum runs over queries in order, in f32
//! traffic: K once, where some row attends to it; the queries again for every tile, from the caches
//! oracle: `testing::attention::attention_mass`; tests: `tests/kernels/attention_mass.rs`
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};

use super::scale::ScoreScale;
use super::tile::{Scratch, TileRows};
use super::{AttentionScratch, THREAD_WORK};
use crate::backend::cpu::elem::Elem;
use crate::backend::cpu::pool::{SharedMut, ThreadPool};
use crate::backend::cpu::simd::SimdLevel;
use crate::backend::cpu::vector::{Kernel, LOG2_E, Vector, dispatch};
use crate::backend::{MassSequence, checks};
use crate::batch::{TILE_SLOTS, window_start};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::KvLayout;

/// Queries laid out at a time.
const RUN: usize = 64;

/// The arguments of `attention_mass`; `T` is the compute type.
pub struct AttentionMassArgs<'a, T> {
    /// `[T, Hq, D]`
    pub q: &'a [T],
    /// K of one layer.
    pub k_cache: &'a [T],
    /// `[T, Hq]`
    pub lse: &'a [f32],
    /// Block tables.
    pub blocks: &'a [u32],
    /// Who is asked about.
    pub sequences: &'a [MassSequence],
    /// Query heads.
    pub num_q_heads: usize,
    /// Multiplies q k.
    pub sm_scale: f32,
    /// Newest slots that a row attends to, at least 1; `None`: all.
    pub window: Option<usize>,
    /// Bound of the scores; above zero.
    pub softcap: Option<f32>,
    /// Geometry of the cache.
    pub layout: &'a KvLayout,
    /// `[Hkv, kv_len]` of each sequence, written.
    pub mass: &'a mut Vec<f32>,
}

/// See [`AttentionMassArgs`].
pub fn attention_mass<T: Elem>(
    level: SimdLevel,
    pool: &mut ThreadPool,
    scratch: &mut AttentionScratch,
    args: AttentionMassArgs<'_, T>,
) -> Result<()> {
    let layout = args.layout;
    let (heads, dim) = (layout.num_kv_heads, layout.head_dim);
    checks::window_and_softcap("attention_mass", args.window, args.softcap)?;
    let num_rows = check(&args)?;
    let num_slots = checks::sequences(args.sequences, args.blocks, num_rows, layout)?;
    let (mut units, mut mass_start, mut work) = (Vec::new(), 0, 0);
    for s in args.sequences {
        for head in 0..heads {
            let of_head = mass_start + head * s.kv_len;
            let tiles = (s.first_slot(args.window)..s.kv_len).step_by(TILE_SLOTS);
            units.extend(tiles.map(|first_slot| Unit { sequence: s, head, first_slot, mass_at: of_head + first_slot }));
        }
        mass_start += heads * s.kv_len;
        work += s.rows.len() * s.slots_read(args.window) * args.num_q_heads * dim;
    }
    args.mass.clear();
    args.mass.resize(num_slots * heads, 0.0);
    let threads = pool.num_threads();
    scratch.threads.resize_with(threads.max(scratch.threads.len()), Scratch::default);
    let job = Job {
        q: args.q,
        k_cache: args.k_cache,
        lse: args.lse,
        blocks: args.blocks,
        num_q_heads: args.num_q_heads,
        scale: ScoreScale::new(args.sm_scale, args.softcap),
        window: args.window,
        layout,
        mass: SharedMut::new(args.mass),
        units: &units,
        next: AtomicUsize::new(0),
    };
    if threads == 1 || units.len() == 1 || work < THREAD_WORK {
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

/// The rows that `q` and `lse` hold, of a cache as large as its layout says.
fn check<T: Elem>(args: &AttentionMassArgs<'_, T>) -> Result<usize> {
    let KvLayout { num_kv_heads, head_dim, block_size, dtype, num_blocks } = *args.layout;
    let heads = args.num_q_heads;
    let fits = num_kv_heads > 0
        && heads > 0
        && heads.is_multiple_of(num_kv_heads)
        && head_dim > 0
        && head_dim.is_multiple_of(2)
        && block_size > 0
        && TILE_SLOTS.is_multiple_of(block_size)
        && dtype == T::DTYPE
        && args.k_cache.len() >= num_blocks * args.layout.block_elems();
    if !fits {
        return Err(Error::Shape {
            op: "attention_mass",
            expected: format!("a cache of {:?} and query heads that are a multiple of its heads", args.layout),
            got: format!("{} elements of {}, {heads} query heads", args.k_cache.len(), T::DTYPE),
        });
    }
    Ok((args.q.len() / (heads * head_dim)).min(args.lse.len() / heads))
}

/// A tile of slots of one kv head.
struct Unit<'a> {
    sequence: &'a MassSequence,
    head: usize,
    first_slot: usize,
    mass_at: usize,
}

struct Job<'a, T> {
    q: &'a [T],
    k_cache: &'a [T],
    lse: &'a [f32],
    blocks: &'a [u32],
    num_q_heads: usize,
    scale: ScoreScale,
    window: Option<usize>,
    layout: &'a KvLayout,
    mass: SharedMut<'a, f32>,
    units: &'a [Unit<'a>],
    next: AtomicUsize,
}

/// One thread's turn; `pairs` as in `paged_attention`.
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
        dispatch(level, Turn { job: self, own, pairs: level == SimdLevel::Avx512 });
    }

    #[inline(always)]
    fn run_unit<V: Vector, const PAIRS: bool>(&self, v: V, unit: &Unit<'_>, own: &mut Scratch) {
        let KvLayout { num_kv_heads, head_dim: dim, block_size, .. } = *self.layout;
        let (s, group) = (unit.sequence, self.num_q_heads / num_kv_heads);
        let num_slots = (s.kv_len - unit.first_slot).min(TILE_SLOTS);
        own.begin::<V, T, PAIRS>(v, RUN, dim);
        own.load_keys::<V, T, PAIRS>(
            v,
            &TileRows {
                blocks: &self.blocks[s.block_start + unit.first_slot / block_size..],
                cache: self.k_cache,
                block_elems: self.layout.block_elems(),
                head_start: self.layout.elem(0, unit.head, 0),
                block_size,
                head_dim: dim,
                num_slots,
            },
        );
        // Row i sees kv_len - (rows - 1 - i) slots; rows before the first that reaches this tile add nothing, nor do those
        // from the first on that has left it behind.
        let shortest = s.kv_len + 1 - s.rows.len();
        let first_row = (unit.first_slot + 1).saturating_sub(shortest);
        let past_row = self.window.map_or(usize::MAX, |w| (unit.first_slot + num_slots).saturating_add(w) - shortest);
        let mut mass = [0.0; TILE_SLOTS];
        let mut queries = [const { (0..0, 0.0) }; RUN];
        let (mut start, end) = (first_row * group, s.rows.len().min(past_row) * group);
        while start < end {
            let count = RUN.min(end - start);
            for (i, query) in queries[..count].iter_mut().enumerate() {
                let (row, head) = ((start + i) / group, (start + i) % group);
                let at = (s.rows.start + row) * self.num_q_heads + unit.head * group + head;
                own.set_query::<V, T, PAIRS>(v, i, &self.q[at * dim..(at + 1) * dim]);
                let of_tile = |end: usize| end.saturating_sub(unit.first_slot).min(num_slots);
                let (from, to) = (window_start(shortest + row, self.window), shortest + row);
                *query = (of_tile(from)..of_tile(to), self.lse[at] * LOG2_E);
            }
            own.add_mass::<V, T, PAIRS>(v, &queries[..count], &self.scale, &mut mass);
            start += count;
        }
        // SAFETY: every unit has slots of its own.
        let out = unsafe { self.mass.range(unit.mass_at..unit.mass_at + num_slots) };
        out.copy_from_slice(&mass[..num_slots]);
    }
}

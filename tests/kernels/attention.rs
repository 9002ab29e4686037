//! `paged_attention` on worlds of branches: a tree of sequences whose blocks lie shuffled in a cache full of NaN.

use half::{bf16, f16};
use rksc::backend::cpu::attention::{AttentionScratch, MAX_GROUP_ROWS, PagedAttentionArgs, paged_attention};
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::oracle::{self, Scoring};

/// One sequence: its block table, how much it holds, and how many of its last slots are rows of this step.
#[derive(Clone, Debug)]
pub(crate) struct Seq {
    pub(crate) blocks: Vec<u32>,
    pub(crate) kv_len: usize,
    pub(crate) rows: usize,
}

/// A cache and the sequences in it.
pub(crate) struct World<T> {
    pub(crate) layout: KvLayout,
    pub(crate) num_q_heads: usize,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    pub(crate) seqs: Vec<Seq>,
    /// Rows of each sequence in order, `[T, Hq, D]`.
    pub(crate) q: Vec<T>,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
}

/// What a case varies.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    heads: (usize, usize),
    dim: usize,
    block_size: usize,
    /// Full blocks shared by all, then by halves, quarters ... of the sequences.
    shared: Vec<usize>,
    /// (slots in all, rows of this step) of each sequence.
    seqs: Vec<(usize, usize)>,
}

impl<T: Elem> World<T> {
    pub(crate) fn new(shape: &Shape, seed: u64) -> Self {
        let mut fill = Fill::new(seed);
        let (hq, hkv) = shape.heads;
        let needed: usize = shape.seqs.iter().map(|s| s.0.div_ceil(shape.block_size)).sum::<usize>() + 8;
        let mut free = fill.shuffled(needed);
        let layout = KvLayout {
            num_blocks: needed,
            num_kv_heads: hkv,
            block_size: shape.block_size,
            head_dim: shape.dim,
            dtype: T::DTYPE,
        };
        let mut seqs: Vec<Seq> = Vec::new();
        for (i, &(kv_len, rows)) in shape.seqs.iter().enumerate() {
            let count = kv_len.div_ceil(shape.block_size);
            let mut blocks = Vec::new();
            let mut width = shape.seqs.len();
            for run in &shape.shared {
                let first = i / width.max(1) * width.max(1);
                let end = (blocks.len() + run).min((kv_len - rows) / shape.block_size);
                if first < i {
                    let of_first: &Seq = &seqs[first];
                    blocks.extend(of_first.blocks.iter().take(end).skip(blocks.len()).copied().collect::<Vec<_>>());
                }
                while blocks.len() < end {
                    blocks.push(free.pop().unwrap());
                }
                width = width.div_ceil(2);
            }
            while blocks.len() < count {
                blocks.push(free.pop().unwrap());
            }
            seqs.push(Seq { blocks, kv_len, rows });
        }
        let nan = T::narrow(f32::NAN);
        let mut k = vec![nan; layout.num_blocks * layout.block_elems()];
        let mut v = k.clone();
        for seq in &seqs {
            for slot in 0..seq.kv_len {
                for head in 0..hkv {
                    let at = Self::elem(&layout, seq, head, slot);
                    if k[at].widen().is_nan() {
                        for i in at..at + shape.dim {
                            k[i] = T::narrow(fill.normal());
                            v[i] = T::narrow(fill.normal());
                        }
                    }
                }
            }
        }
        let rows: usize = seqs.iter().map(|s| s.rows).sum();
        let q = (0..rows * hq * shape.dim).map(|_| T::narrow(fill.normal() * 1.5)).collect();
        Self { layout, num_q_heads: hq, k, v, seqs, q, window: None, softcap: None }
    }

    pub(crate) fn elem(layout: &KvLayout, seq: &Seq, head: usize, slot: usize) -> usize {
        layout.elem(seq.blocks[slot / layout.block_size] as usize, head, slot % layout.block_size)
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim as f32).sqrt()
    }

    pub(crate) fn scoring(&self) -> Scoring {
        let softcap = self.softcap.map(f64::from);
        Scoring { sm_scale: f64::from(self.scale()), window: self.window, softcap }
    }

    /// Rows of sequence `i`.
    pub(crate) fn rows(&self, i: usize) -> std::ops::Range<usize> {
        let start: usize = self.seqs[..i].iter().map(|s| s.rows).sum();
        start..start + self.seqs[i].rows
    }

    pub(crate) fn views(&self) -> Vec<SequenceView<'_>> {
        (0..self.seqs.len())
            .map(|i| SequenceView { rows: self.rows(i), blocks: &self.seqs[i].blocks, kv_len: self.seqs[i].kv_len })
            .collect()
    }

    pub(crate) fn run(&self, level: SimdLevel, threads: usize) -> (Vec<T>, Vec<f32>) {
        self.run_plan(level, threads, &AttentionPlan::new(&self.views(), self.layout.block_size, MAX_GROUP_ROWS))
    }

    pub(crate) fn run_plan(&self, level: SimdLevel, threads: usize, plan: &AttentionPlan) -> (Vec<T>, Vec<f32>) {
        let mut o = vec![T::zeroed(); self.q.len()];
        let mut lse = vec![0.0; self.q.len() / self.layout.head_dim];
        let args = PagedAttentionArgs {
            plan,
            q: &self.q,
            k_cache: &self.k,
            v_cache: &self.v,
            o: &mut o,
            lse: &mut lse,
            num_q_heads: self.num_q_heads,
            sm_scale: self.scale(),
            window: self.window,
            softcap: self.softcap,
            layout: &self.layout,
        };
        let mut scratch = AttentionScratch::default();
        paged_attention(level, &mut ThreadPool::new(threads), &mut scratch, args).unwrap();
        (o, lse)
    }

    /// The same once more.
    pub(crate) fn again(&self) -> Self {
        Self { k: self.k.clone(), v: self.v.clone(), seqs: self.seqs.clone(), q: self.q.clone(), ..*self }
    }

    /// One sequence of this world with other rows, slots and queries, and the same cache.
    pub(crate) fn alone(&self, seq: Seq, q: &[T]) -> Self {
        Self { k: self.k.clone(), v: self.v.clone(), seqs: vec![seq], q: q.to_vec(), ..*self }
    }

    pub(crate) fn check(&self, level: SimdLevel, what: &str) {
        let (o, lse) = self.run(level, 1);
        let dim = self.layout.head_dim;
        let group = self.num_q_heads / self.layout.num_kv_heads;
        let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|x| f64::from(x.widen())).collect() };
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (i, seq) in self.seqs.iter().enumerate() {
            for head in 0..self.layout.num_kv_heads {
                let read = |cache: &[T]| -> Vec<Vec<f64>> {
                    let at = |slot| Self::elem(&self.layout, seq, head, slot);
                    (0..seq.kv_len).map(|slot| wide(&cache[at(slot)..at(slot) + dim])).collect()
                };
                let (k, v) = (read(&self.k), read(&self.v));
                let k: Vec<&[f64]> = k.iter().map(Vec::as_slice).collect();
                let v: Vec<&[f64]> = v.iter().map(Vec::as_slice).collect();
                // A few rows of a long prefill say as much as all of them.
                let stride = (seq.rows / 6).max(1);
                for (nth, row) in self.rows(i).enumerate() {
                    if nth % stride != 0 && nth + 1 != seq.rows {
                        continue;
                    }
                    let n = seq.kv_len - (seq.rows - 1 - nth);
                    for h in head * group..(head + 1) * group {
                        let at = row * self.num_q_heads + h;
                        let q = wide(&self.q[at * dim..][..dim]);
                        let (o_want, lse_want) = oracle::attention(T::DTYPE, &q, &k[..n], &v[..n], &self.scoring());
                        got.extend(wide(&o[at * dim..][..dim]));
                        want.extend(o_want);
                        let lse_got = f64::from(lse[at]);
                        assert!(
                            (lse_got - lse_want).abs() < 2e-5 * (1.0 + lse_want.abs()),
                            "{what}: row {row} head {h}: lse {lse_got}, want {lse_want}"
                        );
                    }
                }
            }
        }
        // P is rounded against another maximum than the oracle's, so its error is P's eps anew, averaged over slots.
        let atol = if T::DTYPE == rksc::DType::F32 { 3e-6 } else { 1.5 * oracle::eps(T::DTYPE) };
        oracle::assert_close(what, T::DTYPE, atol, &got, &want);
    }
}

pub(crate) fn shape(
    heads: (usize, usize),
    dim: usize,
    block_size: usize,
    shared: &[usize],
    seqs: &[(usize, usize)],
) -> Shape {
    Shape { heads, dim, block_size, shared: shared.to_vec(), seqs: seqs.to_vec() }
}

pub(crate) fn shapes() -> Vec<Shape> {
    vec![
        // Decode of one sequence at every awkward length.
        shape((1, 1), 32, 16, &[], &[(1, 1)]),
        shape((2, 1), 64, 16, &[], &[(15, 1)]),
        shape((4, 2), 32, 16, &[], &[(16, 1)]),
        shape((4, 1), 64, 16, &[], &[(17, 1)]),
        shape((7, 1), 64, 16, &[], &[(63, 1)]),
        shape((8, 1), 64, 16, &[], &[(64, 1)]),
        shape((2, 2), 128, 16, &[], &[(65, 1)]),
        shape((14, 2), 64, 16, &[], &[(127, 1)]),
        shape((4, 2), 80, 16, &[], &[(200, 1)]),
        shape((2, 1), 96, 16, &[], &[(1025, 1)]),
        shape((2, 1), 256, 32, &[], &[(31, 1)]),
        shape((1, 1), 128, 32, &[], &[(32, 1)]),
        shape((16, 1), 32, 32, &[], &[(33, 1)]),
        shape((1, 1), 6, 16, &[], &[(70, 3)]),
        // Prefill: all at once, and a chunk onto what is there.
        shape((4, 2), 32, 16, &[], &[(127, 127)]),
        shape((7, 1), 64, 16, &[], &[(200, 73)]),
        shape((2, 2), 64, 32, &[], &[(130, 65)]),
        // Decode of several.
        shape((4, 2), 32, 16, &[], &[(5, 1), (64, 1), (200, 1), (129, 1)]),
        // Trees of depth 1, 2 and 3.
        shape((4, 2), 32, 16, &[16], &[(300, 1), (270, 1), (260, 1), (257, 1), (320, 1), (321, 1), (258, 1), (299, 1)]),
        shape((14, 2), 64, 16, &[6], &[(100, 1), (130, 1), (97, 1)]),
        shape((8, 2), 64, 32, &[4, 2], &[(200, 1), (210, 1), (250, 1), (195, 1)]),
        shape(
            (4, 2),
            80,
            16,
            &[8, 4, 4],
            &[(257, 1), (258, 1), (300, 1), (290, 1), (310, 1), (270, 1), (280, 1), (261, 1)],
        ),
        // Mixed: prefill chunks and decodes over shared blocks.
        shape((4, 2), 32, 16, &[8], &[(140, 10), (129, 1), (200, 70), (150, 1)]),
        shape((6, 3), 96, 32, &[2, 1], &[(100, 1), (164, 100), (97, 1), (1, 1)]),
    ]
}

fn oracle_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in shapes().iter().enumerate() {
        World::<T>::new(shape, i as u64).check(level, &format!("paged_attention {level:?} {:?} {shape:?}", T::DTYPE));
    }
}

/// Calls `$f::<T>(level)` for every dtype and level.
macro_rules! everywhere {
    ($f:ident) => {
        for level in SimdLevel::available() {
            $f::<f32>(level);
            $f::<bf16>(level);
            $f::<f16>(level);
        }
    };
}
pub(crate) use everywhere;

#[test]
fn paged_attention_matches_oracle() {
    for level in [SimdLevel::Portable, SimdLevel::Avx2, SimdLevel::Avx512, SimdLevel::Amx] {
        if !SimdLevel::available().contains(&level) {
            eprintln!("skipped: this CPU lacks {level:?}");
        }
    }
    everywhere!(oracle_case);
}

pub(crate) fn bits<T: Elem>(x: &[T]) -> &[u8] {
    bytemuck::cast_slice(x)
}

/// Row by row alone, in chunks, with another group size, with more threads: the same bits as all together.
pub(crate) fn assert_law<T: Elem>(level: SimdLevel, world: &World<T>, what: &str) {
    let (o, lse) = world.run(level, 1);
    assert!(o.iter().all(|x| x.widen().is_finite()), "{what}");
    for threads in [2, 3] {
        let other = world.run(level, threads);
        assert!(bits(&other.0) == bits(&o) && bits(&other.1) == bits(&lse), "{what}: {threads} threads");
    }
    for group_rows in [1, 5] {
        let plan = AttentionPlan::new(&world.views(), world.layout.block_size, group_rows);
        let other = world.run_plan(level, 1, &plan);
        assert!(bits(&other.0) == bits(&o) && bits(&other.1) == bits(&lse), "{what}: groups of {group_rows}");
    }
    let (per_row, heads) = (world.num_q_heads * world.layout.head_dim, world.num_q_heads);
    for (s, seq) in world.seqs.iter().enumerate() {
        let rows = world.rows(s);
        let middle = rows.start + rows.len() / 2;
        let picked = [rows.start, middle, rows.end - 1].map(|row| row..row + 1);
        for rows_of in picked.into_iter().chain(std::iter::once(rows.start..middle + 1)) {
            // These rows as a step of a sequence that holds no more than the last of them sees.
            let kv_len = seq.kv_len - (rows.end - rows_of.end);
            let blocks = seq.blocks[..kv_len.div_ceil(world.layout.block_size)].to_vec();
            let q = &world.q[rows_of.start * per_row..rows_of.end * per_row];
            let (o1, lse1) = world.alone(Seq { blocks, kv_len, rows: rows_of.len() }, q).run(level, 1);
            let (of_o, of_lse) =
                (rows_of.start * per_row..rows_of.end * per_row, rows_of.start * heads..rows_of.end * heads);
            assert!(bits(&o1) == bits(&o[of_o]), "{what}: rows {rows_of:?} alone");
            assert!(bits(&lse1) == bits(&lse[of_lse]), "{what}: rows {rows_of:?} alone, lse");
        }
    }
}

fn law_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in shapes().iter().enumerate() {
        let world = World::<T>::new(shape, 100 + i as u64);
        assert_law(level, &world, &format!("{level:?} {:?} {shape:?}", T::DTYPE));
    }
}

#[test]
fn a_rows_bits_depend_on_its_own_tokens_alone() {
    everywhere!(law_case);
}

/// Shared blocks replaced by copies of them: another plan, the same bits.
fn copied_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in shapes().iter().enumerate().filter(|(_, s)| !s.shared.is_empty()) {
        let world = World::<T>::new(shape, 200 + i as u64);
        let want = world.run(level, 1);
        let elems = world.layout.block_elems();
        let mut copied = World {
            layout: KvLayout { num_blocks: world.seqs.iter().map(|s| s.blocks.len()).sum(), ..world.layout },
            k: Vec::new(),
            v: Vec::new(),
            seqs: world.seqs.clone(),
            q: world.q.clone(),
            ..world
        };
        for block in copied.seqs.iter_mut().flat_map(|s| s.blocks.iter_mut()) {
            let from = *block as usize * elems;
            *block = (copied.k.len() / elems) as u32;
            copied.k.extend_from_slice(&world.k[from..from + elems]);
            copied.v.extend_from_slice(&world.v[from..from + elems]);
        }
        let got = copied.run(level, 1);
        assert!(bits(&got.0) == bits(&want.0) && bits(&got.1) == bits(&want.1), "{level:?} {shape:?}");
    }
}

#[test]
fn shared_blocks_and_copies_of_them_give_the_same_bits() {
    everywhere!(copied_case);
}

/// The tokens that follow a row, in its own blocks, become NaN and infinite: the row does not notice.
fn garbage_case<T: Elem>(level: SimdLevel) {
    for kv_len in [64, 100, 127, 130] {
        let shape = shape((4, 2), 32, 16, &[], &[(kv_len, 40)]);
        let mut world = World::<T>::new(&shape, kv_len as u64);
        let (o, lse) = world.run(level, 1);
        let clean = kv_len - 13;
        for slot in clean..kv_len {
            for head in 0..2 {
                let at = World::<T>::elem(&world.layout, &world.seqs[0], head, slot);
                world.k[at..at + 32].fill(T::narrow(f32::NAN));
                world.v[at..at + 16].fill(T::narrow(f32::INFINITY));
                world.v[at + 16..at + 32].fill(T::narrow(f32::NAN));
            }
        }
        let (o2, lse2) = world.run(level, 1);
        let rows = 40 - 13;
        assert!(bits(&o2[..rows * 128]) == bits(&o[..rows * 128]), "{level:?} {:?} {kv_len}", T::DTYPE);
        assert_eq!(lse2[..rows * 4], lse[..rows * 4]);
        assert!(o2[rows * 128..].iter().all(|x| x.widen().is_nan()), "a NaN must show in the rows that read it");
    }
}

#[test]
fn garbage_past_a_rows_own_slots_changes_nothing() {
    everywhere!(garbage_case);
}

#[test]
fn very_unequal_scores_do_not_overflow() {
    for level in SimdLevel::available() {
        let mut world = World::<f32>::new(&shape((2, 1), 32, 16, &[], &[(130, 1)]), 5);
        for x in &mut world.k {
            *x *= 400.0;
        }
        world.check(level, &format!("large scores, {level:?}"));
    }
}

#[test]
fn a_plan_that_does_not_fit_is_refused() {
    let world = World::<f32>::new(&shape((2, 1), 32, 16, &[], &[(40, 1), (50, 1)]), 5);
    let good = AttentionPlan::new(&world.views(), 16, 64);
    let mut plans = vec![good.clone(); 4];
    plans[0].row_order[0] = plans[0].row_order[1];
    plans[1].row_order[0] = 2;
    plans[2].blocks[0] = 10_000;
    plans[3].groups[0].rows.end = 1;
    for plan in plans {
        let mut o = vec![0.0; world.q.len()];
        let mut lse = vec![0.0; 4];
        let args = PagedAttentionArgs {
            plan: &plan,
            q: &world.q,
            k_cache: &world.k,
            v_cache: &world.v,
            o: &mut o,
            lse: &mut lse,
            num_q_heads: 2,
            sm_scale: 0.1,
            window: None,
            softcap: None,
            layout: &world.layout,
        };
        let mut pool = ThreadPool::new(1);
        assert!(paged_attention(SimdLevel::Portable, &mut pool, &mut AttentionScratch::default(), args).is_err());
    }
}

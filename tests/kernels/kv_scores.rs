//! `kv_scores` against its float64 oracle and the published vectors: the kernels on every device, and the CPU at every
//! level, where the number of threads changes no bit; through the trait on both backends.

use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::bindings::rksc_kv_scores_params;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::{Backend, Counters, KvScores, RkvVariant};
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::kv_scores::{Head, Scores, kv_scores};
use rksc::testing::oracle::assert_close;
use rksc::{DType, Error, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed, rounded, wide};
use crate::kv_transfer::cache;

/// A sequence at compression. Keys are `[Hkv][num_slots][D]`, queries `[num_queries][Hq][D]`.
struct Sequence {
    dtype: DType,
    num_kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_size: usize,
    window: usize,
    pool_size: usize,
    variant: RkvVariant,
    sm_scale: f32,
    softcap: Option<f32>,
    lambda: f32,
    threshold: f32,
    keys: Vec<f32>,
    queries: Vec<f32>,
    positions: Option<Vec<u32>>,
}

#[derive(Debug)]
struct Output {
    scores: Vec<f32>,
    importance: Vec<f32>,
    redundancy: Vec<f32>,
}

impl Sequence {
    fn num_slots(&self) -> usize {
        self.keys.len() / (self.num_kv_heads * self.head_dim)
    }

    fn num_queries(&self) -> usize {
        self.queries.len() / (self.num_kv_heads * self.group * self.head_dim)
    }

    /// Normal keys, a share of them near copies of earlier ones; by position, slots are in no order.
    fn random(dtype: DType, shape: &Shape, seed: u64) -> Self {
        let Shape {
            num_slots, window, heads: (num_kv_heads, group), head_dim, block_size, copies, by_position, ..
        } = *shape;
        let mut fill = Fill::new(seed);
        let mut keys: Vec<f32> = Vec::with_capacity(num_kv_heads * num_slots * head_dim);
        for _ in 0..num_kv_heads {
            let start = keys.len();
            for slot in 0..num_slots {
                let copied = slot > 0 && fill.below(100) < copies;
                let of = start + fill.below(slot) * head_dim;
                for i in 0..head_dim {
                    let x = if copied { 0.9 * keys[of + i] + 0.4 * fill.normal() } else { fill.normal() };
                    keys.push(x);
                }
            }
        }
        for key in keys.chunks_mut(head_dim) {
            let size = 1.0 + 0.5 * fill.unit();
            key.iter_mut().for_each(|x| *x *= size);
        }
        let queries = fill.normals(shape.num_queries * num_kv_heads * group * head_dim, 1.2);
        // Short sequences in any order; long ones a little out of order, so that the walk over tiles ends early.
        let reach = if num_slots < 1500 { num_slots } else { 200 };
        let of_head = |_| {
            let mut positions: Vec<u32> = (0..num_slots as u32).map(|slot| 5 + 3 * slot).collect();
            for slot in 1..num_slots {
                positions.swap(slot, slot / reach * reach + fill.below(slot % reach + 1));
            }
            positions
        };
        let positions = by_position.then(|| (0..num_kv_heads).flat_map(of_head).collect());
        let (pool_size, sm_scale) = ([7, 1, 3, 5][num_slots % 4], 1.0 / (head_dim as f32).sqrt());
        Self {
            dtype,
            num_kv_heads,
            group,
            head_dim,
            block_size,
            window,
            pool_size,
            variant: shape.variant,
            sm_scale,
            softcap: None,
            lambda: shape.lambda,
            threshold: 0.5,
            keys,
            queries,
            positions,
        }
    }

    /// A few short keys of one head, padded with zeros to what kernels take; `queries` is `[window][group][D]`.
    fn padded(keys: &[&[f32]], queries: &[&[f32]], group: usize) -> Self {
        let pad = |rows: &[&[f32]]| -> Vec<f32> {
            rows.iter().flat_map(|row| row.iter().copied().chain(vec![0.0; 32 - row.len()])).collect()
        };
        Self {
            dtype: DType::F32,
            num_kv_heads: 1,
            group,
            head_dim: 32,
            block_size: 16,
            window: queries.len() / group,
            pool_size: 1,
            variant: RkvVariant::Code,
            sm_scale: 1.0 / (keys[0].len() as f32).sqrt(),
            softcap: None,
            lambda: 0.1,
            threshold: 0.5,
            keys: pad(keys),
            queries: pad(queries),
            positions: None,
        }
    }

    fn want(&self) -> Vec<Scores> {
        let (n, d) = (self.num_slots(), self.head_dim);
        let (keys, queries) = (rounded(self.dtype, &self.keys), rounded(self.dtype, &self.queries));
        let of_head = |head: usize| {
            let queries: Vec<f64> = queries
                .chunks(self.num_kv_heads * self.group * d)
                .flat_map(|row| &row[head * self.group * d..][..self.group * d])
                .copied()
                .collect();
            kv_scores(&Head {
                queries: &queries,
                keys: &keys[head * n * d..][..n * d],
                positions: self.positions.as_ref().map(|p| &p[head * n..][..n]),
                head_dim: d,
                group: self.group,
                window: self.window,
                pool_size: self.pool_size,
                variant: self.variant,
                sm_scale: f64::from(self.sm_scale),
                softcap: self.softcap.map(f64::from),
                lambda: f64::from(self.lambda),
                threshold: f64::from(self.threshold),
            })
        };
        (0..self.num_kv_heads).map(of_head).collect()
    }

    /// In shuffled blocks of a cache full of NaN: its layout, the table, K.
    fn paged(&self) -> (KvLayout, Vec<u32>, Vec<f32>) {
        let (n, d) = (self.num_slots(), self.head_dim);
        let num_blocks = n.div_ceil(self.block_size) + 2;
        let layout = KvLayout {
            num_blocks,
            num_kv_heads: self.num_kv_heads,
            block_size: self.block_size,
            head_dim: d,
            dtype: self.dtype,
        };
        let mut blocks = Fill::new(n as u64).shuffled(num_blocks);
        let mut cache = vec![f32::NAN; num_blocks * layout.block_elems()];
        for (i, key) in self.keys.chunks(d).enumerate() {
            let (head, slot) = (i / n, i % n);
            let at = layout.elem(blocks[slot / self.block_size] as usize, head, slot % self.block_size);
            cache[at..at + d].copy_from_slice(key);
        }
        blocks.truncate(num_blocks - 2);
        (layout, blocks, cache)
    }

    /// Through the trait: the queries are the last of a larger buffer, the scores stand in the middle of one.
    fn through<B: Backend>(&self, b: &mut B, lambda: f32) -> Result<(Vec<f32>, Counters)> {
        let (layout, blocks, keys) = self.paged();
        let num_q_heads = self.num_kv_heads * self.group;
        let k_cache = cache(b, self.dtype, &keys)?;
        let others = vec![f32::NAN; 2 * num_q_heads * self.head_dim];
        let queries = cache(b, self.dtype, &[&others[..], &self.queries[..]].concat())?;
        let len = self.num_kv_heads * (self.num_slots() - self.window);
        let mut scores = b.upload(&vec![7.0; len + 8])?;
        b.reset_counters();
        b.kv_scores(KvScores {
            queries: &queries,
            query_rows: 2..2 + self.num_queries(),
            k_cache: &k_cache,
            blocks: &blocks,
            num_slots: self.num_slots(),
            window: self.window,
            pool_size: self.pool_size,
            variant: self.variant,
            lambda,
            threshold: self.threshold,
            num_q_heads,
            sm_scale: self.sm_scale,
            softcap: self.softcap,
            layout: &layout,
            scores: &mut scores,
            scores_start: 5,
        })?;
        let counters = b.counters();
        let mut all = vec![0.0; len + 8];
        b.read_f32(&scores, 0, &mut all)?;
        assert!(all[..5].iter().chain(&all[5 + len..]).all(|&x| x == 7.0), "scores beside their place");
        Ok((all[5..5 + len].to_vec(), counters))
    }

    /// Importance alone is what lambda 1 asks for, redundancy what 0 does.
    fn on_cpu(&self, cpu: &mut Cpu) -> Result<Output> {
        let mut run = |lambda: f32| Ok(self.through(cpu, lambda)?.0);
        let redundancy: Result<Vec<f32>> = run(0.0);
        Ok(Output {
            scores: run(self.lambda)?,
            importance: run(1.0)?,
            redundancy: redundancy?.iter().map(|x| -x).collect(),
        })
    }

    /// Runs `check` on what every device finds, and the CPU at every level: there with one bit for any number of threads.
    /// The CPU knows no positions but the slots' order.
    fn everywhere(&self, what: &str, check: impl Fn(&Output)) {
        let all = |got: &Output| [bits(&got.scores), bits(&got.importance), bits(&got.redundancy)].concat();
        for_each_device(what, |dev| {
            let got = self.run(dev)?;
            check(&got);
            Ok(all(&got))
        });
        if self.positions.is_none() {
            for level in SimdLevel::available() {
                let [one, two] = [1, 2].map(|threads| self.on_cpu(&mut Cpu::new(threads, level).unwrap()).unwrap());
                check(&one);
                assert!(all(&one) == all(&two), "{what} on the CPU, {level}: bits of two threads");
            }
        }
    }

    fn run(&self, dev: &mut Device) -> Result<Output> {
        let (n, d, hq) = (self.num_slots(), self.head_dim, self.num_kv_heads * self.group);
        let (_, blocks, keys) = self.paged();
        let k_cache = narrowed(dev, self.dtype, &keys)?;
        let queries = narrowed(dev, self.dtype, &self.queries)?;
        let blocks = dev.buffer(&blocks)?;
        // Heads lie further apart than there are slots, as in a cache with room to grow.
        let stride = n + 3;
        let apart = |p: &Vec<u32>| p.chunks(n).flat_map(|head| [head, &[u32::MAX; 3]].concat()).collect::<Vec<u32>>();
        let positions = self.positions.as_ref().map(|p| dev.buffer(&apart(p))).transpose()?;
        let bytes = dev.kernels().kv_scores_workspace_bytes(n, self.num_queries(), hq, self.num_kv_heads, d);
        let mut workspace = dev.alloc::<u8>(bytes)?;
        let len = self.num_kv_heads * (n - self.window);
        let (mut scores, mut importance, mut redundancy) = (dev.alloc(len)?, dev.alloc(len)?, dev.alloc(len)?);
        let params = rksc_kv_scores_params {
            queries: queries.ptr().cast(),
            k_cache: k_cache.ptr().cast(),
            blocks: blocks.ptr(),
            positions: positions.as_ref().map_or(std::ptr::null(), |p| p.ptr()),
            scores: scores.ptr_mut(),
            importance: importance.ptr_mut(),
            redundancy: redundancy.ptr_mut(),
            workspace: workspace.ptr_mut().cast(),
            num_slots: n as u32,
            window: self.window as u32,
            num_queries: self.num_queries() as u32,
            pool_size: self.pool_size as u32,
            variant: self.variant as u32,
            num_q_heads: hq as u32,
            num_kv_heads: self.num_kv_heads as u32,
            head_dim: d as u32,
            block_size: self.block_size as u32,
            dtype: self.dtype as u32,
            sm_scale: self.sm_scale,
            lambda: self.lambda,
            threshold: self.threshold,
            position_stride: stride as u32,
            softcap: self.softcap.unwrap_or(0.0),
            reserved: 0,
        };
        dev.launch(dev.kernels().kv_scores, &params)?;
        let all = Output {
            scores: dev.to_vec(&scores)?,
            importance: dev.to_vec(&importance)?,
            redundancy: dev.to_vec(&redundancy)?,
        };
        // Once more without what is not wanted, on the used workspace.
        let bare =
            rksc_kv_scores_params { importance: std::ptr::null_mut(), redundancy: std::ptr::null_mut(), ..params };
        dev.launch(dev.kernels().kv_scores, &bare)?;
        assert_eq!(bits(&dev.to_vec(&scores)?), bits(&all.scores), "again, without importance and redundancy");
        Ok(all)
    }

    /// The sequence of the first seed for which no cosine that decides anything is too near to the threshold to tell.
    fn decided(dtype: DType, shape: &Shape) -> (Self, Vec<Scores>) {
        for seed in 0..20 {
            let sequence = Self::random(dtype, shape, seed);
            let want = sequence.want();
            if want.iter().all(|head| head.ambiguous == 0) {
                return (sequence, want);
            }
        }
        panic!("every seed is ambiguous")
    }

    fn check(&self, what: &str, want: &[Scores]) {
        assert!(want.iter().all(|head| head.ambiguous == 0), "{what}");
        let gather = |part: fn(&Scores) -> &Vec<f64>| want.iter().flat_map(part).copied().collect::<Vec<f64>>();
        let (scores, importance) = (gather(|s| &s.scores), gather(|s| &s.importance));
        let redundancy = gather(|s| &s.redundancy);
        self.everywhere(what, |got| {
            assert_close(&format!("{what}: scores"), DType::F32, 2e-6, &wide(&got.scores), &scores);
            assert_close(&format!("{what}: importance"), DType::F32, 2e-6, &wide(&got.importance), &importance);
            assert_close(&format!("{what}: redundancy"), DType::F32, 1e-6, &wide(&got.redundancy), &redundancy);
            // R is softmax(m), so n ln R is the sum of a column's links but for a constant. One link more or less, which is what
            // another choice of a protected key comes to, would move it by the threshold.
            for (i, (&g, &w)) in got.redundancy.iter().zip(&redundancy).enumerate() {
                let links = self.num_slots() as f64 * (f64::from(g).ln() - w.ln());
                assert!(links.abs() < 0.05, "{what}: column {i} is off by {links} links");
            }
        });
    }
}

struct Shape {
    num_slots: usize,
    window: usize,
    /// (Hkv, group)
    heads: (usize, usize),
    head_dim: usize,
    block_size: usize,
    /// Keys of 100 that are near copies.
    copies: usize,
    by_position: bool,
    num_queries: usize,
    variant: RkvVariant,
    lambda: f32,
}

#[test]
fn kv_scores_match_oracle() {
    for (i, (num_slots, window, heads, head_dim, block_size, copies, by_position)) in [
        (2, 1, (1, 1), 32, 16, 0, false),
        (9, 8, (1, 1), 64, 16, 30, false),
        (9, 8, (2, 4), 80, 32, 30, true),
        (15, 3, (1, 2), 96, 16, 50, false),
        (16, 8, (1, 3), 128, 16, 50, true),
        (17, 8, (3, 1), 32, 16, 50, false),
        (31, 4, (1, 5), 256, 32, 50, false),
        (33, 8, (2, 6), 64, 32, 50, true),
        (63, 8, (1, 7), 128, 16, 30, false),
        (64, 8, (2, 7), 128, 32, 30, false),
        (65, 8, (1, 8), 128, 16, 60, true),
        (71, 8, (1, 16), 80, 16, 60, false),
        (72, 8, (1, 16), 256, 16, 60, true),
        (127, 16, (2, 2), 96, 32, 90, false),
        (128, 64, (1, 2), 64, 16, 0, false),
        (129, 33, (1, 3), 32, 32, 95, true),
        (200, 8, (4, 1), 64, 16, 10, false),
        (257, 5, (2, 4), 128, 16, 70, false),
        (333, 8, (1, 4), 256, 32, 40, true),
        (512, 8, (1, 1), 80, 16, 50, false),
        (777, 11, (1, 2), 128, 32, 80, false),
        (1000, 8, (1, 7), 64, 16, 60, true),
        (1152, 8, (1, 4), 128, 16, 30, false),
        (4096, 8, (1, 1), 32, 16, 97, false),
        (4133, 8, (1, 1), 64, 32, 97, true),
    ]
    .into_iter()
    .enumerate()
    {
        let (num_queries, variant, lambda) = (window, RkvVariant::Code, 0.1);
        let shape =
            Shape { num_slots, window, heads, head_dim, block_size, copies, by_position, num_queries, variant, lambda };
        // Long cases in one type each.
        for dtype in
            DTYPES.into_iter().enumerate().filter(|(d, _)| num_slots < 300 || i % 3 == *d).map(|(_, dtype)| dtype)
        {
            let what =
                format!("kv_scores {dtype} n {num_slots} w {window} heads {heads:?} d {head_dim} bs {block_size}");
            let (sequence, want) = Sequence::decided(dtype, &shape);
            sequence.check(&what, &want);
        }
    }
}

/// What the queries look at is what attention lets them: capped, none stands out as far.
#[test]
fn kv_scores_cap_what_attention_caps() {
    for (i, softcap) in [50.0, 5.0, 0.7].into_iter().enumerate() {
        for (variant, dtype) in [RkvVariant::Code, RkvVariant::Text, RkvVariant::Alg1].into_iter().zip(DTYPES) {
            let shape = Shape {
                num_slots: 129 + i,
                window: 8,
                heads: (2, 3),
                head_dim: 64,
                block_size: 16,
                copies: 50,
                by_position: false,
                num_queries: 8,
                variant,
                lambda: 0.5,
            };
            let (sequence, plain) = Sequence::decided(dtype, &shape);
            let sequence = Sequence { softcap: Some(softcap), ..sequence };
            let want = sequence.want();
            let most = |scores: &[Scores]| scores[0].importance.iter().copied().fold(0.0, f64::max);
            assert!(most(&want) < most(&plain), "a cap of {softcap} must show");
            sequence.check(&format!("kv_scores {dtype} {variant:?} capped at {softcap}"), &want);
        }
    }
}

fn close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() < 1e-5, "{what}: {got:?} {want:?}");
    }
}

/// The `count` slots with the best scores, ascending.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..scores.len()).collect();
    slots.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    slots.truncate(count);
    slots.sort_unstable();
    slots
}

/// Redundancies of the candidates from column means of all slots.
fn redundancies(mean: &[f64], num_candidates: usize) -> Vec<f64> {
    let sum: f64 = mean.iter().map(|m| m.exp()).sum();
    mean[..num_candidates].iter().map(|m| m.exp() / sum).collect()
}

fn check_redundancy(what: &str, sequence: &Sequence, mean: &[f64]) {
    sequence.check(what, &sequence.want());
    sequence.everywhere(what, |got| {
        close(what, &got.redundancy, &redundancies(mean, mean.len() - sequence.window));
    });
}

#[test]
fn kv_scores_protect_the_newest_of_three_duplicates() {
    let keys: [&[f32]; 5] = [&[0.0, 0.0, 1.0], &[1.0, 0.0, 0.0], &[2.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[3.0, 0.0, 0.0]];
    let sequence = Sequence::padded(&keys, &[&[0.0; 3]], 1);
    check_redundancy("three duplicates", &sequence, &[0.0, 0.4, 0.2, 0.0, 0.0]);
    let got = sequence.want().remove(0);
    assert_eq!(got.nearest, [None, Some(4), Some(4), None, Some(2)]);
}

#[test]
fn kv_scores_drop_the_older_duplicates() {
    let e = |i: usize, x: f32| -> Vec<f32> { (0..5).map(|k| if k == i { x } else { 0.0 }).collect() };
    let keys = [e(0, 1.0), e(1, 1.0), e(1, 2.0), e(2, 1.0), e(1, 0.5), e(3, 1.0), e(4, 1.0)];
    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
    let sequence = Sequence::padded(&keys, &[&[0.0; 5]], 1);
    check_redundancy("older duplicates", &sequence, &[0.0, 0.285_714, 0.142_857, 0.0, 0.0, 0.0, 0.0]);
    sequence.everywhere("older duplicates: scores", |got| {
        close("scores", &got.scores, &[-0.103_585, -0.143_354, -0.122_052, -0.103_585, -0.103_585, -0.103_585]);
        // Of five kept, window included, the two older duplicates go.
        assert_eq!(best(&got.scores, 4), [0, 3, 4, 5]);
    });
}

#[test]
fn kv_scores_drop_the_links_to_slot_0_where_nothing_is_similar() {
    let keys: [&[f32]; 3] = [&[1.0, 0.0], &[0.45, 0.893_029], &[-0.6, 0.8]];
    check_redundancy("slot 0", &Sequence::padded(&keys, &[&[0.0; 2]], 1), &[0.0, 0.298_141, -0.051_859]);
}

#[test]
fn kv_scores_of_a_full_step() {
    let keys: [&[f32]; 10] = [
        &[2.0, 0.0],
        &[1.0, 1.0],
        &[0.0, 1.0],
        &[1.0, 0.9],
        &[0.0, -1.0],
        &[1.1, 1.0],
        &[-1.0, 0.0],
        &[0.2, 1.0],
        &[1.0, 1.1],
        &[0.0, 1.2],
    ];
    // [window][group]: the first query head sees (1, 0) and (0, 1), the second (.5, .5) and (-1, .25).
    let queries: [&[f32]; 4] = [&[1.0, 0.0], &[0.5, 0.5], &[0.0, 1.0], &[-1.0, 0.25]];
    let unpooled = [0.173_153, 0.140_721, 0.120_589, 0.135_729, 0.063_543, 0.145_674, 0.096_526, 0.124_067];
    let pooled = [0.173_153, 0.173_153, 0.140_721, 0.135_729, 0.145_674, 0.145_674, 0.145_674, 0.124_067];
    let redundancy = [0.108_143, 0.125_347, 0.116_102, 0.124_458, 0.044_729, 0.124_551, 0.053_071, 0.122_144];
    let scores = [-0.080_013, -0.095_497, -0.090_419, -0.098_439, -0.025_688, -0.097_528, -0.033_196, -0.097_523];
    let mean_after_softmax = [0.142_776, 0.138_326, 0.129_291, 0.133_779, 0.071_510, 0.141_021, 0.114_779, 0.128_519];
    for (pool_size, lambda, importance) in [(1, 0.1, unpooled), (3, 0.1, pooled), (3, 1.0, pooled)] {
        let sequence = Sequence { pool_size, lambda, ..Sequence::padded(&keys, &queries, 2) };
        sequence.everywhere("full step", |got| {
            close("importance", &got.importance, &importance);
            close("redundancy", &got.redundancy, &redundancy);
            assert!(got.importance.iter().zip(mean_after_softmax).any(|(g, w)| (f64::from(*g) - w).abs() > 0.01));
            if pool_size == 3 {
                let scores = if lambda == 1.0 { pooled } else { scores };
                close("scores", &got.scores, &scores);
                assert_eq!(best(&got.scores, 4), if lambda == 1.0 { [0, 1, 4, 5] } else { [0, 2, 4, 6] });
            }
        });
    }
}

#[test]
fn kv_scores_know_the_newest_by_slot_or_by_position() {
    let keys: [&[f32]; 4] = [&[0.0, 1.0], &[0.0, 1.0], &[0.0, 1.0], &[1.0, 0.0]];
    let by_slot = Sequence::padded(&keys, &[&[0.0; 2]], 1);
    check_redundancy("newest by slot", &by_slot, &[0.5, 0.25, 0.0, 0.0]);
    let by_position = Sequence { positions: Some(vec![9, 3, 5, 2]), ..by_slot };
    check_redundancy("newest by position", &by_position, &[0.0, 0.5, 0.25, 0.0]);
    // Slots that ascend with positions, as compaction leaves them, need no positions.
    let ascending = Sequence::padded(&[keys[3], keys[1], keys[2], keys[0]], &[&[0.0; 2]], 1);
    check_redundancy("newest of ascending slots", &ascending, &[0.0, 0.5, 0.25, 0.0]);
}

#[test]
fn kv_scores_pool_up_to_the_ends() {
    // One key takes all the attention: pooled over 7, its neighbours within 3 do.
    let keys: Vec<Vec<f32>> = (0..11).map(|i| vec![if i == 4 { 100.0 } else { 0.0 }, 1.0]).collect();
    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
    let sequence = Sequence { pool_size: 7, ..Sequence::padded(&keys, &[&[1.0, 0.0]], 1) };
    sequence.everywhere("pooling", |got| {
        close("pooling", &got.importance, &[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    });
    let text = Sequence { variant: RkvVariant::Text, ..sequence };
    text.everywhere("pooling in the text", |got| {
        close("pooling", &got.importance, &[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    });
}

#[test]
fn kv_scores_of_rows_prefer_none_of_three_duplicates() {
    let keys: [&[f32]; 5] = [&[0.0, 0.0, 1.0], &[1.0, 0.0, 0.0], &[2.0, 0.0, 0.0], &[0.0, 1.0, 0.0], &[3.0, 0.0, 0.0]];
    for variant in [RkvVariant::Text, RkvVariant::Alg1] {
        let sequence = Sequence { variant, ..Sequence::padded(&keys, &[&[0.0; 3]], 1) };
        check_redundancy("three duplicates by rows", &sequence, &[0.0, 0.2, 0.2, 0.0, 0.2]);
    }
}

#[test]
fn kv_scores_of_every_variant_match_oracle() {
    const VARIANTS: [RkvVariant; 3] = [RkvVariant::Code, RkvVariant::Text, RkvVariant::Alg1];
    for (i, (num_slots, window, num_queries, heads, head_dim, block_size, copies)) in [
        (5, 0, 1, (1, 2), 32, 16, 40),
        (40, 1, 8, (2, 1), 64, 16, 50),
        (66, 2, 1, (1, 4), 80, 32, 50),
        (130, 64, 3, (1, 2), 64, 16, 70),
        (140, 8, 64, (1, 1), 32, 16, 80),
        (203, 16, 13, (2, 3), 128, 32, 30),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, variant) in VARIANTS.into_iter().enumerate() {
            let (dtype, lambda) = (DTYPES[(i + j) % 3], [0.0, 0.1, 1.0][(i + 2 * j) % 3]);
            let by_position = false;
            let shape = Shape {
                num_slots,
                window,
                heads,
                head_dim,
                block_size,
                copies,
                by_position,
                num_queries,
                variant,
                lambda,
            };
            let what =
                format!("kv_scores {variant:?} {dtype} n {num_slots} w {window} q {num_queries} lambda {lambda}");
            let (sequence, want) = Sequence::decided(dtype, &shape);
            sequence.check(&what, &want);
        }
    }
}

fn small(num_slots: usize, window: usize) -> Sequence {
    let shape = Shape {
        num_slots,
        window,
        heads: (2, 3),
        head_dim: 64,
        block_size: 16,
        copies: 50,
        by_position: false,
        num_queries: 5,
        variant: RkvVariant::Code,
        lambda: 0.1,
    };
    Sequence::decided(DType::Bf16, &shape).0
}

#[test]
fn kv_scores_are_the_same_on_both_backends() {
    let mut cpu = Cpu::new(2, SimdLevel::detect()).unwrap();
    let heads = Heads { num_q_heads: 6, num_kv_heads: 2, block_size: 16 };
    let mut cuda = Cuda::new(Device::emulated().unwrap(), heads);
    // The last has no candidates.
    for (num_slots, window) in [(150, 8), (70, 3), (12, 12)] {
        for variant in [RkvVariant::Code, RkvVariant::Text, RkvVariant::Alg1] {
            let sequence = Sequence { variant, ..small(num_slots, window) };
            let want: Vec<f64> = sequence.want().iter().flat_map(|head| head.scores.clone()).collect();
            let (on_cpu, cpu_counters) = sequence.through(&mut cpu, 0.1).unwrap();
            let (on_device, counters) = sequence.through(&mut cuda, 0.1).unwrap();
            assert_close("on the CPU", DType::F32, 2e-6, &wide(&on_cpu), &want);
            assert_close("on the device", DType::F32, 2e-6, &wide(&on_device), &want);
            let read = (num_slots * 2 * 64 * 2) as u64;
            assert_eq!(counters, Counters { launches: 1, kv_read_bytes: read, ..Default::default() });
            assert_eq!(counters, cpu_counters);
        }
    }
}

#[test]
fn kv_scores_take_any_head_dim_and_block_size_on_the_cpu() {
    for (i, (head_dim, block_size)) in [(2, 16), (6, 16), (20, 5), (40, 64), (100, 7)].into_iter().enumerate() {
        let shape = Shape {
            num_slots: 90 + i,
            window: 4,
            heads: (1, 2),
            head_dim,
            block_size,
            copies: 40,
            by_position: false,
            num_queries: 3,
            variant: RkvVariant::Code,
            lambda: 0.1,
        };
        let (sequence, want) = Sequence::decided(DTYPES[i % 3], &shape);
        for level in SimdLevel::available() {
            let (got, _) = sequence.through(&mut Cpu::new(1, level).unwrap(), 0.1).unwrap();
            assert_close(&format!("heads of {head_dim}, {level}"), DType::F32, 2e-6, &wide(&got), &want[0].scores);
        }
    }
}

#[test]
fn kv_scores_refuse_a_bad_shape_on_both_backends() {
    let heads = Heads { num_q_heads: 6, num_kv_heads: 2, block_size: 16 };
    for change in [
        (|s| s.pool_size = 4) as fn(&mut Sequence),
        |s| s.threshold = -0.1,
        |s| s.threshold = f32::NAN,
        |s| s.queries.clear(),
    ] {
        let mut sequence = small(70, 3);
        change(&mut sequence);
        let on_cpu = sequence.through(&mut Cpu::new(1, SimdLevel::detect()).unwrap(), 0.1);
        assert!(matches!(on_cpu, Err(Error::Shape { op: "kv_scores", .. })), "{on_cpu:?}");
        let on_device = sequence.through(&mut Cuda::new(Device::emulated().unwrap(), heads), 0.1);
        assert!(matches!(on_device, Err(Error::Shape { op: "kv_scores", .. })), "{on_device:?}");
    }
}

#[test]
fn kv_scores_of_zero_keys_and_of_one_key_many_times() {
    for dtype in DTYPES {
        let shape = Shape {
            num_slots: 150,
            window: 8,
            heads: (1, 2),
            head_dim: 64,
            block_size: 16,
            copies: 0,
            by_position: false,
            num_queries: 8,
            variant: RkvVariant::Code,
            lambda: 0.1,
        };
        let mut sequence = Sequence::random(dtype, &shape, 1);
        for slot in (0..150).step_by(5) {
            sequence.keys[slot * 64..][..64].fill(0.0);
        }
        sequence.check(&format!("kv_scores {dtype} zero keys"), &sequence.want());
        for slot in 1..150 {
            sequence.keys.copy_within(64..128, slot * 64);
        }
        sequence.check(&format!("kv_scores {dtype} one key"), &sequence.want());
    }
}

#[test]
fn kv_scores_refuse_what_they_cannot_do() {
    for_each_device("kv_scores refuse", |dev| {
        let good = rksc_kv_scores_params {
            num_slots: 8,
            window: 8,
            num_queries: 8,
            pool_size: 7,
            num_q_heads: 2,
            num_kv_heads: 1,
            head_dim: 64,
            block_size: 16,
            threshold: 0.5,
            ..Default::default()
        };
        // No candidates.
        dev.launch(dev.kernels().kv_scores, &good)?;
        dev.launch(dev.kernels().kv_scores, &rksc_kv_scores_params { num_kv_heads: 0, num_slots: 9, ..good })?;
        for bad in [
            rksc_kv_scores_params { num_queries: 0, ..good },
            rksc_kv_scores_params { num_queries: 65, ..good },
            rksc_kv_scores_params { variant: 3, ..good },
            rksc_kv_scores_params { num_slots: 7, ..good },
            rksc_kv_scores_params { pool_size: 4, ..good },
            rksc_kv_scores_params { pool_size: 0, ..good },
            rksc_kv_scores_params { head_dim: 264, ..good },
            rksc_kv_scores_params { head_dim: 36, ..good },
            rksc_kv_scores_params { threshold: -0.1, ..good },
            rksc_kv_scores_params { softcap: -1.0, ..good },
            rksc_kv_scores_params { softcap: f32::INFINITY, ..good },
            rksc_kv_scores_params { num_slots: 9, num_kv_heads: 3, ..good },
            rksc_kv_scores_params { num_slots: (1 << 17) + 1, ..good },
            rksc_kv_scores_params { num_slots: 9, dtype: 3, ..good },
        ] {
            assert_refused(dev.launch(dev.kernels().kv_scores, &bad));
        }
        Ok(Vec::new())
    });
}

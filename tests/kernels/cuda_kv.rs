//! `kv_scores` against its float64 oracle and the published vectors.

use rksc::backend::cuda::bindings::rksc_kv_scores_params;
use rksc::backend::cuda::device::Device;
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::kv_scores::{Head, Scores, kv_scores};
use rksc::testing::oracle::assert_close;
use rksc::{DType, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed, rounded, wide};

/// A sequence at compression. Keys are `[Hkv][num_slots][D]`, queries `[window][Hq][D]`.
struct Sequence {
    dtype: DType,
    num_kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_size: usize,
    window: usize,
    pool_size: usize,
    sm_scale: f32,
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

    /// Normal keys, a share of them near copies of earlier ones; by position, slots are in no order.
    fn random(dtype: DType, shape: &Shape, seed: u64) -> Self {
        let Shape { num_slots, window, heads: (num_kv_heads, group), head_dim, block_size, copies, by_position } =
            *shape;
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
        let queries = fill.normals(window * num_kv_heads * group * head_dim, 1.2);
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
            sm_scale,
            lambda: 0.1,
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
            sm_scale: 1.0 / (keys[0].len() as f32).sqrt(),
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
                sm_scale: f64::from(self.sm_scale),
                lambda: f64::from(self.lambda),
                threshold: f64::from(self.threshold),
            })
        };
        (0..self.num_kv_heads).map(of_head).collect()
    }

    /// In shuffled blocks of a cache full of NaN.
    fn run(&self, dev: &mut Device) -> Result<Output> {
        let (n, d, hq) = (self.num_slots(), self.head_dim, self.num_kv_heads * self.group);
        let num_blocks = n.div_ceil(self.block_size) + 2;
        let layout = KvLayout {
            num_blocks,
            num_kv_heads: self.num_kv_heads,
            block_size: self.block_size,
            head_dim: d,
            dtype: self.dtype,
        };
        let blocks = Fill::new(n as u64).shuffled(num_blocks);
        let mut cache = vec![f32::NAN; num_blocks * layout.block_elems()];
        for (i, key) in self.keys.chunks(d).enumerate() {
            let (head, slot) = (i / n, i % n);
            let at = layout.elem(blocks[slot / self.block_size] as usize, head, slot % self.block_size);
            cache[at..at + d].copy_from_slice(key);
        }
        let k_cache = narrowed(dev, self.dtype, &cache)?;
        let queries = narrowed(dev, self.dtype, &self.queries)?;
        let blocks = dev.buffer(&blocks[..num_blocks - 2])?;
        // Heads lie further apart than there are slots, as in a cache with room to grow.
        let stride = n + 3;
        let apart = |p: &Vec<u32>| p.chunks(n).flat_map(|head| [head, &[u32::MAX; 3]].concat()).collect::<Vec<u32>>();
        let positions = self.positions.as_ref().map(|p| dev.buffer(&apart(p))).transpose()?;
        let bytes = dev.kernels().kv_scores_workspace_bytes(n, self.window, hq, self.num_kv_heads, d);
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
            pool_size: self.pool_size as u32,
            num_q_heads: hq as u32,
            num_kv_heads: self.num_kv_heads as u32,
            head_dim: d as u32,
            block_size: self.block_size as u32,
            dtype: self.dtype as u32,
            sm_scale: self.sm_scale,
            lambda: self.lambda,
            threshold: self.threshold,
            position_stride: stride as u32,
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
        for_each_device(what, |dev| {
            let got = self.run(dev)?;
            assert_close(&format!("{what}: scores"), DType::F32, 2e-6, &wide(&got.scores), &scores);
            assert_close(&format!("{what}: importance"), DType::F32, 2e-6, &wide(&got.importance), &importance);
            assert_close(&format!("{what}: redundancy"), DType::F32, 1e-6, &wide(&got.redundancy), &redundancy);
            // R is softmax(m), so n ln R is the sum of a column's links but for a constant. One link more or less, which is what
            // another choice of a protected key comes to, would move it by the threshold.
            for (i, (&g, &w)) in got.redundancy.iter().zip(&redundancy).enumerate() {
                let links = self.num_slots() as f64 * (f64::from(g).ln() - w.ln());
                assert!(links.abs() < 0.05, "{what}: column {i} is off by {links} links");
            }
            Ok([bits(&got.scores), bits(&got.importance), bits(&got.redundancy)].concat())
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
        let shape = Shape { num_slots, window, heads, head_dim, block_size, copies, by_position };
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

fn close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() < 1e-5, "{what}: {got:?} {want:?}");
    }
}

/// Redundancies of the candidates from column means of all slots.
fn redundancies(mean: &[f64], num_candidates: usize) -> Vec<f64> {
    let sum: f64 = mean.iter().map(|m| m.exp()).sum();
    mean[..num_candidates].iter().map(|m| m.exp() / sum).collect()
}

fn check_redundancy(what: &str, sequence: &Sequence, mean: &[f64]) {
    sequence.check(what, &sequence.want());
    for_each_device(what, |dev| {
        let got = sequence.run(dev)?;
        close(what, &got.redundancy, &redundancies(mean, mean.len() - sequence.window));
        Ok(bits(&got.redundancy))
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
    for_each_device("older duplicates: scores", |dev| {
        let got = sequence.run(dev)?;
        close("scores", &got.scores, &[-0.103_585, -0.143_354, -0.122_052, -0.103_585, -0.103_585, -0.103_585]);
        Ok(bits(&got.scores))
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
        for_each_device("full step", |dev| {
            let got = sequence.run(dev)?;
            close("importance", &got.importance, &importance);
            close("redundancy", &got.redundancy, &redundancy);
            assert!(got.importance.iter().zip(mean_after_softmax).any(|(g, w)| (f64::from(*g) - w).abs() > 0.01));
            if pool_size == 3 {
                let scores = if lambda == 1.0 { pooled } else { scores };
                close("scores", &got.scores, &scores);
                let mut best: Vec<usize> = (0..8).collect();
                best.sort_by(|&a, &b| got.scores[b].total_cmp(&got.scores[a]));
                if lambda == 1.0 {
                    best[..4].sort_unstable();
                }
                assert_eq!(best[..4], if lambda == 1.0 { [0, 1, 4, 5] } else { [4, 6, 0, 2] });
            }
            Ok(bits(&got.scores))
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
}

#[test]
fn kv_scores_pool_up_to_the_ends() {
    // One key takes all the attention: pooled over 7, its neighbours within 3 do.
    let keys: Vec<Vec<f32>> = (0..11).map(|i| vec![if i == 4 { 100.0 } else { 0.0 }, 1.0]).collect();
    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
    let sequence = Sequence { pool_size: 7, ..Sequence::padded(&keys, &[&[1.0, 0.0]], 1) };
    for_each_device("pooling", |dev| {
        let got = sequence.run(dev)?;
        close("pooling", &got.importance, &[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        Ok(bits(&got.importance))
    });
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
            rksc_kv_scores_params { window: 0, ..good },
            rksc_kv_scores_params { window: 65, num_slots: 100, ..good },
            rksc_kv_scores_params { num_slots: 7, ..good },
            rksc_kv_scores_params { pool_size: 4, ..good },
            rksc_kv_scores_params { pool_size: 0, ..good },
            rksc_kv_scores_params { head_dim: 264, ..good },
            rksc_kv_scores_params { head_dim: 36, ..good },
            rksc_kv_scores_params { threshold: -0.1, ..good },
            rksc_kv_scores_params { num_slots: 9, num_kv_heads: 3, ..good },
            rksc_kv_scores_params { num_slots: (1 << 17) + 1, ..good },
            rksc_kv_scores_params { num_slots: 9, dtype: 3, ..good },
        ] {
            assert_refused(dev.launch(dev.kernels().kv_scores, &bad));
        }
        Ok(Vec::new())
    });
}

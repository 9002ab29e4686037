//! `sample` against the sampler of the CPU and against fixed-point sampling.

use rksc::backend::cuda::bindings::{rksc_sample_params, rksc_sample_row, rksc_sampled};
use rksc::sampler::{DrawKey, SamplingParams, sample};
use rksc::testing::fill::Fill;
use rksc::testing::sample::{Request, penalised, sample as sample_fixed};

use crate::device::{assert_refused, for_each_device};

struct Row {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    bias: Vec<(u32, f32)>,
    key: DrawKey,
}

impl Row {
    fn plain(logits: Vec<f32>, params: SamplingParams, position: u64) -> Self {
        let key = DrawKey { path: 3, position };
        Self { logits, params, prompt: Vec::new(), generated: Vec::new(), bias: Vec::new(), key }
    }

    fn request(&self) -> Request<'_> {
        let Self { params, prompt, generated, bias, key, .. } = self;
        Request { params, prompt, generated, bias, key: *key }
    }

    /// What the CPU chooses, in f64.
    fn host(&self) -> u32 {
        let mut logits = self.logits.clone();
        for &(token, bias) in &self.bias {
            if let Some(x) = logits.get_mut(token as usize) {
                *x += bias;
            }
        }
        sample(&mut logits, &self.params, &self.prompt, &self.generated, self.key)
    }
}

/// Runs the rows in one launch, checks every choice, and returns the tokens.
fn check(what: &str, rows: &[Row]) -> Vec<u32> {
    let vocab = rows[0].logits.len();
    let logits: Vec<f32> = rows.iter().flat_map(|row| row.logits.iter().copied()).collect();
    let mut history = vec![u32::MAX; 3];
    let mut asked = Vec::new();
    for row in rows {
        let p = &row.params;
        let history_start = history.len() as u32;
        history.extend(row.prompt.iter().chain(&row.generated));
        let bias_start = history.len() as u32;
        history.extend(row.bias.iter().map(|(token, _)| token));
        history.extend(row.bias.iter().map(|(_, bias)| bias.to_bits()));
        asked.push(rksc_sample_row {
            seed: p.seed,
            path: row.key.path,
            position: row.key.position,
            temperature: p.temperature,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            top_k: p.top_k,
            history_start,
            num_prompt: row.prompt.len() as u32,
            num_generated: row.generated.len() as u32,
            bias_start,
            num_bias: row.bias.len() as u32,
        });
    }
    let want: Vec<u32> = rows.iter().map(|row| sample_fixed(&row.logits, &row.request())).collect();
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(want[i], row.host(), "{what}: row {i}, the two oracles, {:?}", row.params);
    }
    for_each_device(&format!("sample {what} vocab {vocab}"), |dev| {
        let (mut x, asked) = (dev.buffer(&logits)?, dev.buffer(&asked)?);
        let (history, mut saved) = (dev.buffer(&history)?, dev.alloc::<f32>(history.len())?);
        let mut sampled = dev.alloc::<rksc_sampled>(rows.len())?;
        let params = rksc_sample_params {
            logits: x.ptr_mut(),
            rows: asked.ptr(),
            history: history.ptr(),
            saved: saved.ptr_mut(),
            sampled: sampled.ptr_mut(),
            num_rows: rows.len() as u32,
            vocab: vocab as u32,
        };
        dev.launch(dev.kernels().sample, &params)?;
        let (sampled, after) = (dev.to_vec(&sampled)?, dev.to_vec(&x)?);
        for (i, (row, got)) in rows.iter().zip(&sampled).enumerate() {
            let logit = row.logits[want[i] as usize];
            let what = format!("{what}: row {i} {:?}: {got:?}, want {} {logit}", row.params, want[i]);
            assert_eq!((got.token, got.logit.to_bits()), (want[i], logit.to_bits()), "{what}");
            let y = penalised(&row.logits, &row.request());
            let same = y.iter().zip(&after[i * vocab..]).all(|(y, x)| y.to_bits() == x.to_bits());
            assert!(same, "{what}: logits after penalties");
        }
        Ok(sampled.iter().flat_map(|s| [s.token, s.logit.to_bits()]).collect())
    });
    want
}

const VOCABS: [usize; 22] = [
    1, 2, 3, 4, 5, 31, 32, 33, 97, 1000, 1023, 1024, 1025, 2049, 4095, 4097, 8200, 32_768, 50_257, 128_256, 151_936,
    152_064,
];

fn few(vocab: usize) -> usize {
    if vocab > 20_000 { 3 } else { 8 }
}

#[test]
fn sample_matches_the_cpu_for_every_parameter() {
    for vocab in VOCABS {
        let mut fill = Fill::new(vocab as u64);
        let rows: Vec<Row> = (0..few(vocab))
            .map(|i| {
                let scale = [3.0, 1.0, 10.0][i % 3];
                let params = SamplingParams {
                    temperature: [0.7, 1.0, 5.0, 0.05, 1.5, 100.0, 0.3, 1.0][fill.below(8)],
                    top_k: if i % 2 == 0 { [1, 20, 500, vocab as u32][fill.below(4)] } else { 0 },
                    top_p: [1.0, 0.95, 0.5, 0.01][(i / 2 + fill.below(2)) % 4],
                    min_p: if i % 3 == 2 { 0.02 } else { 0.0 },
                    seed: fill.next_u64(),
                    ..Default::default()
                };
                Row::plain(fill.normals(vocab, scale), params, i as u64)
            })
            .collect();
        check("parameters", &rows);
    }
}

#[test]
fn plain_draws_and_greedy_match_the_cpu() {
    for vocab in VOCABS {
        let mut fill = Fill::new(vocab as u64 + 1);
        let rows: Vec<Row> = (0..few(vocab))
            .map(|i| {
                let temperature = if i == 1 { 0.0 } else { 1.0 };
                let params = SamplingParams { temperature, seed: fill.next_u64(), ..Default::default() };
                Row::plain(fill.normals(vocab, 2.0), params, i as u64)
            })
            .collect();
        check("plain", &rows);
    }
}

#[test]
fn penalties_and_biases_match_the_cpu() {
    for vocab in [1, 5, 97, 1025, 8192, 8193, 50_257, 151_936] {
        let mut fill = Fill::new(vocab as u64 + 2);
        let rows: Vec<Row> = (0..few(vocab))
            .map(|i| {
                // Some ids past the vocabulary, many twice.
                let mut ids = |n: usize| -> Vec<u32> {
                    (0..n).map(|j| fill.below(if j % 2 == 0 { vocab + 2 } else { vocab.min(30) }) as u32).collect()
                };
                let (prompt, generated, mut biased) =
                    (ids([0, 900, 3000][i % 3]), ids([1500, 0, 40][i / 2 % 3]), ids(i % 4 * 3));
                biased.sort_unstable();
                biased.dedup();
                let bias = biased
                    .into_iter()
                    .enumerate()
                    .map(|(j, id)| (id, [f32::NEG_INFINITY, 2.5, -0.75][j % 3]))
                    .collect();
                let params = SamplingParams {
                    temperature: [0.0, 1.0, 0.8][i % 3],
                    top_p: 0.9,
                    repetition_penalty: [1.3, 1.0, 0.8][(i / 3 + i) % 3],
                    presence_penalty: [0.0, 0.3][i % 2],
                    frequency_penalty: [0.1, 0.0, -0.05][i % 3],
                    seed: fill.next_u64(),
                    ..Default::default()
                };
                let key = DrawKey { path: fill.next_u64(), position: i as u64 };
                Row { logits: fill.normals(vocab, 3.0), params, prompt, generated, bias, key }
            })
            .collect();
        check("penalties", &rows);
    }
}

/// Bins hold many tokens, or one key many ids.
#[test]
fn crowds_of_equals_are_told_apart_by_id() {
    for vocab in [3000, 50_257, 152_064] {
        let mut fill = Fill::new(5);
        let params = |i: u64, top_p: f32, top_k: u32| SamplingParams {
            temperature: 1.0,
            top_p,
            top_k,
            seed: i,
            ..Default::default()
        };
        let equal = vec![0.25; vocab];
        let halves: Vec<f32> = fill.normals(vocab, 2.0).iter().map(|x| x.round() / 2.0).collect();
        let close: Vec<f32> = fill.normals(vocab, 1.0).iter().map(|x| 1e-4 * x).collect();
        let outlier: Vec<f32> = (0..vocab).map(|i| if i == 7 { -30.0 } else { 1e-6 * (i % 1000) as f32 }).collect();
        check(
            "crowds",
            &[
                Row::plain(equal, params(1, 1.0, 0), 0),
                Row::plain(halves, params(2, 0.7, 2000), 0),
                Row::plain(close, params(3, 0.5, 0), 0),
                Row::plain(outlier, params(4, 1.0, 1500), 0),
            ],
        );
    }
}

#[test]
fn what_is_not_finite_is_never_drawn() {
    let params = |temperature: f32| SamplingParams { temperature, top_k: 40, seed: 5, ..Default::default() };
    for vocab in [8, 1027] {
        let logits = |f: &dyn Fn(usize) -> f32| (0..vocab).map(f).collect::<Vec<f32>>();
        let holes = logits(&|i| [f32::NEG_INFINITY, 1.0, f32::NAN, 2.0][i % 4]);
        let first = logits(&|i| if i == 0 { f32::NAN } else { i as f32 });
        let none = logits(&|_| f32::NEG_INFINITY);
        let infinite = logits(&|i| if i == 3 { f32::INFINITY } else { 0.0 });
        let zeros = logits(&|i| if i % 2 == 0 { -0.0 } else { 0.0 });
        for temperature in [0.0, 1.0, 1e-40] {
            let rows: Vec<Row> = [&holes, &first, &none, &infinite, &zeros]
                .map(|x| Row::plain(x.clone(), params(temperature), 1))
                .into_iter()
                .collect();
            check("not finite", &rows);
        }
    }
}

#[test]
fn draws_follow_the_softmax() {
    let logits: Vec<f32> = vec![1.0, 0.5, 0.0, -0.5, -1.0, 2.0];
    let n = 300;
    let params = SamplingParams { temperature: 1.0, seed: 11, ..Default::default() };
    let rows: Vec<Row> = (0..n).map(|i| Row::plain(logits.clone(), params.clone(), i)).collect();
    let mut counts = [0.0; 6];
    for token in check("distribution", &rows) {
        counts[token as usize] += 1.0;
    }
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let chi: f64 = logits
        .iter()
        .zip(counts)
        .map(|(&x, count)| {
            let expected = n as f64 * f64::from(x).exp() / total;
            (count - expected).powi(2) / expected
        })
        .sum();
    // The 0.999 quantile for 5 degrees of freedom.
    assert!(chi < 20.52, "chi-square {chi}, counts {counts:?}");
}

#[test]
fn no_rows_are_no_work_and_wide_rows_are_refused() {
    for_each_device("sample limits", |dev| {
        dev.launch(dev.kernels().sample, &rksc_sample_params { vocab: 5, ..Default::default() })?;
        let wide = rksc_sample_params { num_rows: 1, vocab: (1 << 19) + 1, ..Default::default() };
        assert_refused(dev.launch(dev.kernels().sample, &wide));
        assert_refused(dev.launch(dev.kernels().sample, &rksc_sample_params { num_rows: 1, ..Default::default() }));
        Ok(Vec::new())
    });
}

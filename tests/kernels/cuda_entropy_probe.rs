//! `entropy_probe` on a device, over vocabularies and candidates.

use rksc::backend::cuda::bindings::{rksc_entropy_probe_params, rksc_statistics};
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::testing::entropy_probe::entropy_probe;
use rksc::testing::fill::Fill;
use rksc::testing::round_to;
use rksc::{DType, Result};

use crate::device::{DTYPES, assert_refused, for_each_device, narrowed, wide};

const EPS: f32 = 1e-6;

/// (rows, hidden, vocab): rows around the tiles of 16, 32 and 64; hidden around the stages of 64 k; odd vocabularies.
const SHAPES: &[(usize, usize, usize)] = &[
    (0, 64, 100),
    (1, 8, 1),
    (1, 16, 2),
    (2, 24, 255),
    (3, 64, 256),
    (4, 72, 257),
    (8, 128, 300),
    (15, 56, 511),
    (16, 192, 513),
    (17, 136, 260),
    (32, 64, 700),
    (33, 200, 301),
    (64, 128, 257),
    (65, 64, 280),
    (130, 48, 260),
    (8, 896, 520),
    (2, 3584, 270),
    (40, 8, 1000),
    (2, 16, 32_768),
    (1, 24, 50_257),
    (2, 8, 128_256),
    (1, 16, 151_936),
    (3, 8, 152_064),
];

struct Case {
    rows: usize,
    hidden: usize,
    vocab: usize,
    dtype: DType,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    w: Vec<f32>,
    candidates: Option<Vec<u32>>,
    chosen: Vec<u32>,
}

impl Case {
    /// Logits of about normal size times `scale`; without a norm x is what the type holds.
    fn new(rows: usize, hidden: usize, vocab: usize, dtype: DType, norm: bool, scale: f32) -> Self {
        let mut fill = Fill::new((rows * hidden + vocab) as u64);
        let mut x = fill.normals(rows * hidden, if norm { 3.0 } else { 1.0 });
        if !norm {
            x = round_to(&x, dtype);
        }
        let norm = norm.then(|| fill.normals(hidden, 0.2).iter().map(|w| 1.0 + w).collect());
        let w = round_to(&fill.normals(vocab * hidden, scale / (hidden as f32).sqrt()), dtype);
        let chosen = (0..rows).map(|_| fill.below(vocab) as u32).collect();
        Self { rows, hidden, vocab, dtype, x, norm, w, candidates: None, chosen }
    }

    fn what(&self) -> String {
        let outputs = self.candidates.as_ref().map_or(String::new(), |c| format!(" candidates {}", c.len()));
        format!("entropy_probe {} {}x{}x{}{outputs}", self.dtype, self.rows, self.hidden, self.vocab)
    }

    fn run(&self, dev: &mut Device, rows: std::ops::Range<usize>) -> Result<(Vec<rksc_statistics>, Vec<f32>)> {
        let x = dev.buffer(&self.x[rows.start * self.hidden..rows.end * self.hidden])?;
        let norm = self.norm.as_ref().map(|norm| dev.buffer(norm)).transpose()?;
        let w = narrowed(dev, self.dtype, &self.w)?;
        let candidates = self.candidates.as_ref().map(|c| dev.buffer(c)).transpose()?;
        let chosen = dev.buffer(&self.chosen[rows.clone()])?;
        let mut stats = dev.alloc::<u32>(rows.len() * 7)?;
        let mut logprob = dev.alloc::<f32>(rows.len())?;
        // Not zeroed: the op does not rely on it.
        let bytes = dev.kernels().entropy_probe_workspace_bytes(rows.len(), self.hidden, self.vocab);
        let mut workspace = dev.alloc::<u8>(if candidates.is_some() { 0 } else { bytes })?;
        let params = rksc_entropy_probe_params {
            x: x.ptr(),
            norm_weight: norm.as_ref().map_or(std::ptr::null(), DeviceBuf::ptr),
            w: w.ptr().cast(),
            candidates: candidates.as_ref().map_or(std::ptr::null(), DeviceBuf::ptr),
            chosen: chosen.ptr(),
            stats: stats.ptr_mut().cast(),
            chosen_logprob: logprob.ptr_mut(),
            workspace: workspace.ptr_mut().cast(),
            num_rows: rows.len() as u32,
            hidden: self.hidden as u32,
            vocab: self.vocab as u32,
            num_candidates: self.candidates.as_ref().map_or(0, Vec::len) as u32,
            dtype: self.dtype as u32,
            eps: EPS,
        };
        dev.launch(dev.kernels().entropy_probe, &params)?;
        let float = f32::from_bits;
        let read = |s: &[u32]| rksc_statistics {
            argmax: s[0],
            max: float(s[1]),
            lse: float(s[2]),
            entropy: float(s[3]),
            top1: float(s[4]),
            margin: float(s[5]),
            finite: s[6],
        };
        Ok((dev.to_vec(&stats)?.chunks(7).map(read).collect(), dev.to_vec(&logprob)?))
    }

    /// Token id of an output.
    fn token(&self, output: usize) -> u32 {
        self.candidates.as_ref().map_or(output as u32, |c| c[output])
    }

    fn check(&self, stats: &[rksc_statistics], logprobs: &[f32]) {
        let all = wide(&self.w);
        let w: Vec<f64> = match &self.candidates {
            None => all,
            Some(ids) => ids.iter().flat_map(|&id| &all[id as usize * self.hidden..][..self.hidden]).copied().collect(),
        };
        // Under a norm the type's rounding may fall the other way for an element of h now and then.
        let tol = match (self.dtype, &self.norm) {
            (DType::F32, _) | (_, None) => 1e-5,
            (DType::F16, _) => 1e-3,
            (DType::Bf16, _) => 8e-3,
        };
        for row in 0..self.rows {
            let norm = self.norm.as_ref().map(|w| (&w[..], EPS));
            let want = entropy_probe(self.dtype, &self.x[row * self.hidden..][..self.hidden], norm, &w);
            let (got, s) = (&stats[row], &want.stats);
            let size = want.logits.iter().fold(1.0f64, |a, l| a.max(l.abs()));
            let what = format!("{} row {row}: {got:?} {s:?}", self.what());
            let near =
                |got: f32, want: f64, tol: f64| assert!((f64::from(got) - want).abs() <= tol, "{what}: {got} {want}");
            let tol = tol * size;
            assert_eq!(got.finite, 1, "{what}");
            if s.margin > 2.0 * tol || want.logits.len() == 1 {
                assert_eq!(got.argmax, self.token(s.argmax), "{what}");
            }
            near(got.max, want.logits[s.argmax], tol);
            near(got.lse, s.lse, tol);
            near(got.entropy, s.entropy, tol * (1.0 + s.entropy));
            near(got.top1, s.top1, 2.0 * tol * s.top1);
            near(got.margin, s.margin, 2.0 * tol);
            let output = (0..want.logits.len()).find(|&i| self.token(i) == self.chosen[row]);
            match output {
                Some(i) => near(logprobs[row], want.logits[i] - s.lse, 2.0 * tol),
                None => assert_eq!(logprobs[row], f32::NEG_INFINITY, "{what}"),
            }
        }
    }

    fn run_everywhere(&self) {
        for_each_device(&self.what(), |dev| {
            let (stats, logprobs) = self.run(dev, 0..self.rows)?;
            self.check(&stats, &logprobs);
            Ok(result_bits(&stats, &logprobs))
        });
    }
}

fn result_bits(stats: &[rksc_statistics], logprobs: &[f32]) -> Vec<u32> {
    let mut bits: Vec<u32> = logprobs.iter().map(|p| p.to_bits()).collect();
    for s in stats {
        bits.extend([s.argmax, s.finite]);
        bits.extend([s.max, s.lse, s.entropy, s.top1, s.margin].map(f32::to_bits));
    }
    bits
}

#[test]
fn entropy_probe_matches_oracle_on_every_device() {
    for &(rows, hidden, vocab) in SHAPES {
        for dtype in DTYPES {
            let norm = (rows + hidden + vocab) % 2 == 0;
            Case::new(rows, hidden, vocab, dtype, norm, 2.0).run_everywhere();
        }
    }
}

#[test]
fn entropy_probe_over_candidates_matches_oracle() {
    for (rows, hidden, vocab, num_candidates) in [
        (0, 64, 100, 2),
        (1, 8, 40, 1),
        (1, 896, 60, 2),
        (3, 264, 90, 7),
        (8, 128, 50_257, 31),
        (9, 72, 200, 32),
        (17, 64, 300, 33),
        (2, 3584, 70, 64),
        (1, 16, 2000, 1024),
    ] {
        for dtype in DTYPES {
            let mut case = Case::new(rows, hidden, vocab, dtype, hidden % 16 == 0, 2.0);
            let mut ids = Fill::new(vocab as u64).shuffled(vocab);
            ids.truncate(num_candidates);
            ids.sort_unstable();
            for (i, chosen) in case.chosen.iter_mut().enumerate() {
                if i % 2 == 0 {
                    *chosen = ids[i % ids.len()];
                }
            }
            case.candidates = Some(ids);
            case.run_everywhere();
        }
    }
}

/// A vocabulary whose logits are what one says: x is a unit vector and the first column of w holds them.
fn with_logits(dtype: DType, logits: &[f32], rows: usize) -> Case {
    let mut case = Case::new(rows, 8, logits.len(), dtype, false, 1.0);
    for row in case.x.chunks_mut(8) {
        row.fill(0.0);
        row[0] = 1.0;
    }
    for (w, &logit) in case.w.chunks_mut(8).zip(logits) {
        w[0] = logit;
    }
    case
}

#[test]
fn entropy_of_peaked_rows_keeps_its_relative_precision() {
    for dtype in DTYPES {
        for (vocab, top) in
            [(4, 0.0), (4, 2.0), (4, 6.0), (4, 10.0), (300, 12.0), (700, 20.0), (600, 40.0), (513, 80.0)]
        {
            let mut logits = vec![0.0; vocab];
            logits[vocab / 2] = top;
            let mut case = with_logits(dtype, &logits, 1);
            case.chosen[0] = (vocab / 2) as u32;
            let (n, top) = (vocab as f64 - 1.0, f64::from(top));
            let rest = n * (-top).exp();
            let want = rest.ln_1p() + top * rest / (1.0 + rest);
            for_each_device(&format!("{} top {top}", case.what()), |dev| {
                let (stats, logprobs) = case.run(dev, 0..1)?;
                let (entropy, logprob) = (f64::from(stats[0].entropy), f64::from(logprobs[0]));
                assert!((entropy - want).abs() <= 2e-6 * want, "{vocab} {top}: {entropy:e} {want:e}");
                assert!((logprob + rest.ln_1p()).abs() <= 2e-6 * rest.ln_1p(), "{vocab} {top}: {logprob:e}");
                Ok(result_bits(&stats, &logprobs))
            });
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id_wherever_they_meet() {
    for (a, b) in [(0, 1), (5, 37), (31, 32), (255, 256), (3, 699), (256, 512)] {
        let mut logits = vec![-1.0; 700];
        (logits[a], logits[b]) = (2.0, 2.0);
        for candidates in [None, Some((0..700).collect())] {
            let case = Case { candidates, ..with_logits(DType::Bf16, &logits, 3) };
            for_each_device(&format!("tie {a} {b}"), |dev| {
                let (stats, logprobs) = case.run(dev, 0..3)?;
                assert!(stats.iter().all(|s| s.argmax == a as u32 && s.margin == 0.0 && s.finite == 1), "{stats:?}");
                Ok(result_bits(&stats, &logprobs))
            });
        }
    }
}

#[test]
fn anything_not_finite_is_seen_and_hurts_no_other_row() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for dtype in DTYPES {
            let mut case = Case::new(3, 16, 600, dtype, false, 1.0);
            case.x[16 + 5] = bad;
            for candidates in [None, Some(vec![3, 9, 500])] {
                case.candidates = candidates;
                for_each_device(&format!("{} with {bad}", case.what()), |dev| {
                    let (stats, logprobs) = case.run(dev, 0..3)?;
                    assert_eq!([stats[0].finite, stats[1].finite, stats[2].finite], [1, 0, 1], "{stats:?}");
                    assert!(stats[0].entropy > 0.0 && stats[2].entropy > 0.0);
                    Ok(result_bits(&[stats[0], stats[2]], &[logprobs[0], logprobs[2]]))
                });
            }
        }
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_the_other_rows_of_a_probe() {
    for dtype in DTYPES {
        let case = Case::new(70, 136, 300, dtype, true, 2.0);
        for_each_device(&case.what(), |dev| {
            let (all, all_logprobs) = case.run(dev, 0..70)?;
            for rows in [0..1, 3..12, 20..45, 69..70, 2..66] {
                let (some, logprobs) = case.run(dev, rows.clone())?;
                assert_eq!(result_bits(&some, &logprobs), result_bits(&all[rows.clone()], &all_logprobs[rows]));
            }
            Ok(result_bits(&all, &all_logprobs))
        });
    }
}

#[test]
fn entropy_probe_refuses_what_it_cannot_do() {
    for_each_device("entropy_probe refuses", |dev| {
        let ids = dev.buffer(&[1u32])?;
        let mut out = dev.alloc::<f32>(1)?;
        let good = rksc_entropy_probe_params { num_rows: 1, hidden: 16, vocab: 4, dtype: 1, ..Default::default() };
        for bad in [
            rksc_entropy_probe_params { hidden: 0, ..good },
            rksc_entropy_probe_params { hidden: 12, ..good },
            rksc_entropy_probe_params { hidden: 6, dtype: 0, ..good },
            rksc_entropy_probe_params { vocab: 0, ..good },
            rksc_entropy_probe_params { dtype: 3, ..good },
            rksc_entropy_probe_params { chosen_logprob: out.ptr_mut(), ..good },
            rksc_entropy_probe_params { candidates: ids.ptr(), num_candidates: 0, ..good },
            rksc_entropy_probe_params { candidates: ids.ptr(), num_candidates: 1025, ..good },
            good, // no workspace
        ] {
            assert_refused(dev.launch(dev.kernels().entropy_probe, &bad));
        }
        dev.launch(dev.kernels().entropy_probe, &rksc_entropy_probe_params { num_rows: 0, ..good })?;
        Ok(Vec::new())
    });
}

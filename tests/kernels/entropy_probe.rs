use std::ops::Range;

use rksc::backend::cpu::entropy_probe::{EntropyProbeArgs, EntropyProbeScratch, entropy_probe};
use rksc::backend::cpu::linear::{Activations, LinearArgs, LinearScratch, linear};
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::row_stats::{RowStatsScratch, row_stats};
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::{RowStats, cpu};
use rksc::testing::entropy_probe as oracle;
use rksc::testing::fill::Fill;
use rksc::testing::{round_to, tensor};
use rksc::{DType, Error, Result};

use crate::device::{DTYPES, wide};

const EPS: f32 = 1e-6;

/// (rows, hidden, vocab): odd widths, vocabularies around the chunks of 4096, more rows than go together.
const SHAPES: &[(usize, usize, usize)] = &[
    (0, 64, 100),
    (1, 1, 1),
    (1, 8, 2),
    (1, 7, 3),
    (2, 24, 255),
    (3, 33, 256),
    (4, 73, 257),
    (8, 128, 300),
    (15, 55, 511),
    (16, 192, 513),
    (17, 137, 260),
    (33, 200, 301),
    (65, 64, 280),
    (8, 897, 52),
    (2, 3584, 27),
    (1, 448, 4095),
    (2, 31, 4096),
    (3, 16, 4097),
    (70, 8, 8200),
    (2, 9, 12_289),
    (300, 6, 40),
    (257, 5, 4100),
    (2, 16, 50_257),
    (1, 24, 128_256),
    (3, 8, 152_064),
    (70, 4, 151_936),
];

struct Case {
    hidden: usize,
    vocab: usize,
    dtype: DType,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    w: Vec<f32>,
    candidates: Option<Vec<u32>>,
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
        Self { hidden, vocab, dtype, x, norm, w, candidates: None }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.hidden
    }

    fn matrix(&self) -> CpuMatrix {
        // In two parts, as a checkpoint may hold it.
        let cut = self.vocab / 3 * self.hidden;
        let part = |w: &[f32]| tensor("w", self.dtype, &[w.len() / self.hidden, self.hidden], w);
        let parts = [part(&self.w[..cut]), part(&self.w[cut..])];
        CpuMatrix::new(if cut == 0 { &parts[1..] } else { &parts }, self.dtype).unwrap()
    }

    fn run(&self, level: SimdLevel, threads: usize) -> Vec<RowStats> {
        self.run_rows(level, threads, 0..self.rows(), &self.matrix()).unwrap()
    }

    fn run_rows(&self, level: SimdLevel, threads: usize, rows: Range<usize>, w: &CpuMatrix) -> Result<Vec<RowStats>> {
        let mut stats = vec![RowStats::default(); rows.len()];
        let args = EntropyProbeArgs {
            x: &self.x[rows.start * self.hidden..rows.end * self.hidden],
            norm: self.norm.as_deref(),
            eps: EPS,
            w,
            candidates: self.candidates.as_deref(),
            hidden: self.hidden,
            stats: &mut stats,
        };
        let (mut probe, mut linear) = (EntropyProbeScratch::default(), LinearScratch::default());
        entropy_probe(level, &mut ThreadPool::new(threads), &mut probe, &mut linear, args)?;
        Ok(stats)
    }

    /// Token id of an output.
    fn token(&self, output: usize) -> u32 {
        self.candidates.as_ref().map_or(output as u32, |c| c[output])
    }

    fn what(&self, level: SimdLevel) -> String {
        let candidates = self.candidates.as_ref().map_or(String::new(), |c| format!(" candidates {}", c.len()));
        format!("entropy_probe {level} {} {}x{}x{}{candidates}", self.dtype, self.rows(), self.hidden, self.vocab)
    }

    /// What the oracle says of each row, or of some where there are many: they say as much as all.
    fn wanted(&self) -> Vec<(usize, oracle::Probe)> {
        let all = wide(&self.w);
        let row = |&id: &u32| all[id as usize * self.hidden..][..self.hidden].to_vec();
        let w = self.candidates.as_ref().map_or_else(|| all.clone(), |ids| ids.iter().flat_map(row).collect());
        let step = (self.rows() * w.len() / 4_000_000).max(1);
        let norm = self.norm.as_deref().map(|w| (w, EPS));
        let probe = |(row, x)| (row, oracle::entropy_probe(self.dtype, x, norm, &w));
        self.x.chunks(self.hidden).enumerate().step_by(step).map(probe).collect()
    }

    fn check(&self, level: SimdLevel, stats: &[RowStats], wanted: &[(usize, oracle::Probe)]) {
        // Under a norm the type's rounding may fall the other way for an element of h now and then.
        let tol = match (self.dtype, &self.norm) {
            (DType::F32, _) | (_, None) => 1e-5,
            (DType::F16, _) => 1e-3,
            (DType::Bf16, _) => 8e-3,
        };
        for (row, want) in wanted {
            let (got, s) = (&stats[*row], &want.stats);
            let what = format!("{} row {row}: {got:?} {s:?}", self.what(level));
            let tol = tol * want.logits.iter().fold(1.0f64, |a, l| a.max(l.abs()));
            let near = |got: f32, want: f64, tol: f64| {
                assert!((f64::from(got) - want).abs() <= tol, "{what}: {got} {want}");
            };
            assert_eq!(got.finite, 1, "{what}");
            if s.margin > 2.0 * tol || want.logits.len() == 1 {
                assert_eq!(got.argmax, self.token(s.argmax), "{what}");
            }
            near(got.max, want.logits[s.argmax], tol);
            near(got.lse, s.lse, tol);
            near(got.entropy, s.entropy, tol * (1.0 + s.entropy));
            near(got.top1, s.top1, 2.0 * tol * s.top1 + 1e-7);
            near(got.margin, s.margin, 2.0 * tol);
        }
    }

    /// At every level.
    fn check_levels(&self) {
        let wanted = self.wanted();
        for level in SimdLevel::available() {
            self.check(level, &self.run(level, 1), &wanted);
        }
    }
}

#[test]
fn entropy_probe_matches_oracle() {
    for &(rows, hidden, vocab) in SHAPES {
        for dtype in DTYPES {
            Case::new(rows, hidden, vocab, dtype, (rows + hidden + vocab).is_multiple_of(2), 2.0).check_levels();
        }
    }
}

/// (rows, hidden, vocab, candidates)
const CANDIDATES: &[(usize, usize, usize, usize)] = &[
    (0, 64, 100, 2),
    (1, 1, 1, 1),
    (1, 8, 40, 1),
    (1, 7, 5, 5),
    (1, 896, 60, 2),
    (2, 33, 61, 2),
    (3, 264, 90, 7),
    (3, 15, 40, 3),
    (8, 192, 512, 2),
    (8, 128, 50_257, 31),
    (9, 72, 200, 32),
    (17, 65, 300, 33),
    (2, 3584, 70, 64),
    (4, 17, 1000, 16),
    (64, 192, 512, 10),
    (5, 31, 400, 128),
    (1, 16, 2000, 1024),
    (2, 16, 9000, 4097),
    (300, 8, 12, 2),
    (1, 24, 151_936, 2),
    (7, 96, 100, 100),
];

fn with_candidates(rows: usize, hidden: usize, vocab: usize, count: usize, dtype: DType) -> Case {
    let mut ids = Fill::new(vocab as u64).shuffled(vocab);
    ids.truncate(count);
    ids.sort_unstable();
    Case { candidates: Some(ids), ..Case::new(rows, hidden, vocab, dtype, hidden.is_multiple_of(2), 2.0) }
}

#[test]
fn entropy_probe_over_candidates_matches_oracle() {
    for &(rows, hidden, vocab, count) in CANDIDATES {
        for dtype in DTYPES {
            with_candidates(rows, hidden, vocab, count, dtype).check_levels();
        }
    }
}

/// Norm, `linear` and `row_stats` one after the other, over candidates or all.
fn in_three_ops(case: &Case, level: SimdLevel) -> Vec<RowStats> {
    let (rows, hidden, w) = (case.rows(), case.hidden, case.matrix());
    let mut pool = ThreadPool::new(1);
    let mut x = case.x.clone();
    let mut logits = vec![0.0; rows * case.vocab];
    macro_rules! run {
        ($T:ty, $activations:path) => {{
            let mut h = vec![<$T as cpu::elem::Elem>::narrow(0.0); x.len()];
            match case.norm.as_deref() {
                Some(weight) => {
                    let args = cpu::norm::AddRmsNormArgs {
                        rows: 0..rows,
                        x: &mut x,
                        delta: None,
                        post_norm: None,
                        output: cpu::norm::Output::Normed(weight),
                        y: &mut h,
                        keep: None,
                        step_similarity: None,
                        hidden,
                        eps: EPS,
                    };
                    cpu::norm::add_rms_norm(level, &mut pool, args).unwrap();
                }
                None => h.iter_mut().zip(&x).for_each(|(h, &x)| *h = cpu::elem::Elem::narrow(x)),
            }
            let x = $activations(&h);
            let args = LinearArgs { x, rows: 0..rows, in_features: hidden, w: &w, bias: None, y: &mut logits };
            linear(&mut pool, level, &mut LinearScratch::default(), args).unwrap();
        }};
    }
    match case.dtype {
        DType::F32 => run!(f32, Activations::F32),
        DType::Bf16 => run!(half::bf16, Activations::Bf16),
        DType::F16 => run!(half::f16, Activations::F16),
    }
    let (mut logits, mut vocab) = (logits, case.vocab);
    if let Some(ids) = &case.candidates {
        logits = logits.chunks(vocab).flat_map(|row| ids.iter().map(|&id| row[id as usize])).collect();
        vocab = ids.len();
    }
    let mut stats = vec![RowStats::default(); rows];
    row_stats(level, &mut pool, &mut RowStatsScratch::default(), &logits, vocab, &mut stats).unwrap();
    stats.iter_mut().for_each(|s| s.argmax = case.token(s.argmax as usize));
    stats
}

#[test]
fn a_probe_has_the_bits_of_the_ops_it_stands_for() {
    for dtype in DTYPES {
        let whole = SHAPES.iter().map(|&(r, h, v)| Case::new(r, h, v, dtype, h.is_multiple_of(2), 2.0));
        let some = CANDIDATES.iter().map(|&(r, h, v, c)| with_candidates(r, h, v, c, dtype));
        for case in whole.chain(some) {
            for level in SimdLevel::available() {
                assert_eq!(case.run(level, 1), in_three_ops(&case, level), "{}", case.what(level));
            }
        }
    }
}

#[test]
fn a_rows_bits_depend_on_that_row_alone() {
    for level in SimdLevel::available() {
        for dtype in DTYPES {
            for mut case in [Case::new(70, 137, 9000, dtype, true, 2.0), Case::new(300, 40, 70, dtype, false, 2.0)] {
                for candidates in [None, Some(vec![3, 9, 61])] {
                    case.candidates = candidates;
                    let (w, all) = (case.matrix(), case.run(level, 1));
                    for threads in [2, 3] {
                        assert_eq!(case.run(level, threads), all, "{} {threads} threads", case.what(level));
                    }
                    for rows in [0..1, 3..12, 20..45, 69..70, 2..66] {
                        let some = case.run_rows(level, 1, rows.clone(), &w).unwrap();
                        assert_eq!(some, all[rows], "{}", case.what(level));
                    }
                }
            }
        }
    }
}

/// Weights of another type than the activations: they are widened, never rounded.
#[test]
fn single_precision_over_bf16_weights() {
    for level in SimdLevel::available() {
        let mut case = Case::new(5, 65, 300, DType::F32, true, 2.0);
        case.w = round_to(&case.w, DType::Bf16);
        let w = CpuMatrix::new(&[tensor("w", DType::Bf16, &[300, 65], &case.w)], DType::F32).unwrap();
        for candidates in [None, Some(vec![0, 7, 299])] {
            case.candidates = candidates;
            let got = case.run_rows(level, 1, 0..5, &w).unwrap();
            case.check(level, &got, &case.wanted());
            assert_eq!(got, case.run(level, 1), "{level}");
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

/// Acceptance vector RK4.
#[test]
fn rk4_entropy_of_known_distributions() {
    for level in SimdLevel::available() {
        for dtype in DTYPES {
            for (top, want) in [(0.0, 1.386_294), (2.0, 0.918_284), (6.0, 0.051_697), (10.0, 0.001_498)] {
                let got = with_logits(dtype, &[top, 0.0, 0.0, 0.0], 2).run(level, 1);
                assert!(got.iter().all(|s| (s.entropy - want).abs() < 2e-6), "{level} {dtype} top {top}: {got:?}");
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id_wherever_they_meet() {
    for level in SimdLevel::available() {
        for (a, b) in [(0, 1), (5, 37), (100, 4096), (4095, 4096), (4100, 8999)] {
            let mut logits = vec![-1.0; 9000];
            (logits[a], logits[b]) = (2.0, 2.0);
            for candidates in [None, Some((0..9000).collect())] {
                let case = Case { candidates, ..with_logits(DType::Bf16, &logits, 70) };
                let got = case.run(level, 1);
                assert!(
                    got.iter().all(|s| s.argmax == a as u32 && s.margin == 0.0 && s.finite == 1),
                    "{level} {a} {b}"
                );
            }
        }
    }
}

#[test]
fn anything_not_finite_is_seen_and_hurts_no_other_row() {
    for level in SimdLevel::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut case = Case::new(3, 17, 5000, DType::Bf16, true, 1.0);
            for candidates in [None, Some(vec![3, 9, 500])] {
                case.candidates = candidates;
                let clean = case.run(level, 1);
                let x = std::mem::replace(&mut case.x[17 + 5], bad);
                let got = case.run(level, 1);
                case.x[17 + 5] = x;
                assert_eq!([got[0], got[2]], [clean[0], clean[2]], "{level} {bad}");
                assert_eq!(got[1].finite, 0, "{level} {bad}");
            }
        }
    }
}

#[test]
fn candidates_that_are_none_are_refused() {
    let mut case = Case::new(2, 8, 40, DType::F32, true, 1.0);
    for bad in [vec![], vec![40], vec![3, 3], vec![5, 2]] {
        case.candidates = Some(bad);
        let refused = case.run_rows(SimdLevel::Portable, 1, 0..2, &case.matrix());
        assert!(matches!(refused, Err(Error::Shape { op: "entropy_probe", .. })), "{refused:?}");
    }
}

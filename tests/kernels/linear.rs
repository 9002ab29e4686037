//! `linear`: values at every level and pair of types, and the law that a row's bits depend on that row alone.

use half::{bf16, f16};
use rksc::backend::cpu::linear::{Activations, LinearArgs, LinearScratch, linear};
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::model::weights::Tensor;
use rksc::testing::{epsilon, fill, global_difference, linear_oracle, round_to, tensor};
use rksc::{DType, Error};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// (rows, in, out): tails of every width that a kernel blocks by.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (3, 1, 17),
    (1, 31, 15),
    (2, 32, 16),
    (3, 33, 17),
    (8, 31, 33),
    (15, 192, 16),
    (16, 192, 31),
    (17, 192, 33),
    (33, 33, 15),
    (64, 32, 1),
    (1, 448, 768),
    (2, 448, 65),
    (8, 896, 48),
    (16, 896, 50),
    (33, 896, 40),
    (5, 4864, 35),
    (17, 4864, 16),
    (64, 4864, 20),
    (33, 1057, 161),
    (65, 2080, 129),
    (257, 448, 17),
    (257, 33, 33),
    (515, 32, 40),
    (4, 7, 100),
    (7, 16, 23),
];

fn levels() -> Vec<SimdLevel> {
    let (have, lack): (Vec<_>, Vec<_>) = SimdLevel::ALL.into_iter().partition(|level| level.is_available());
    for level in lack {
        eprintln!("skipped: this CPU has no {level}");
    }
    have
}

/// Owned activations of one type.
enum Input {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Input {
    fn new(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(values.to_vec()),
            DType::Bf16 => Self::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            DType::F16 => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
        }
    }

    fn view(&self) -> Activations<'_> {
        match self {
            Self::F32(x) => Activations::F32(x),
            Self::Bf16(x) => Activations::Bf16(x),
            Self::F16(x) => Activations::F16(x),
        }
    }
}

/// One problem: `[rows, in]` against `[out, in]`.
struct Case {
    rows: usize,
    k: usize,
    n: usize,
    compute: DType,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    input: Input,
}

impl Case {
    fn new(rows: usize, k: usize, n: usize, compute: DType) -> Self {
        let x = round_to(&fill(rows as u64 + 1, rows * k), compute);
        let input = Input::new(&x, compute);
        Self { rows, k, n, compute, x, w: fill(k as u64 + 77, n * k), bias: fill(5, n), input }
    }

    /// The weights in parts of the given heights, stored as `dtype`.
    fn matrix(&self, heights: &[usize], dtype: DType) -> CpuMatrix {
        let mut first = 0;
        let mut part = |&height: &usize| {
            let values = &self.w[first * self.k..(first + height) * self.k];
            first += height;
            tensor("w", dtype, &[height, self.k], values)
        };
        CpuMatrix::new(&heights.iter().map(&mut part).collect::<Vec<_>>(), self.compute).unwrap()
    }

    fn run(
        &self,
        threads: usize,
        level: SimdLevel,
        w: &CpuMatrix,
        rows: std::ops::Range<usize>,
        bias: bool,
    ) -> Vec<f32> {
        let mut y = vec![f32::NAN; self.rows * self.n];
        let args = LinearArgs {
            x: self.input.view(),
            rows,
            in_features: self.k,
            w,
            bias: bias.then_some(&self.bias),
            y: &mut y,
        };
        linear(&mut ThreadPool::new(threads), level, &mut LinearScratch::default(), args).unwrap();
        y
    }
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn linear_matches_oracle() {
    for (i, &(rows, k, n)) in SHAPES.iter().enumerate() {
        for compute in DTYPES {
            let case = Case::new(rows, k, n, compute);
            let with_bias = i % 2 == 0;
            for stored in DTYPES {
                let w = case.matrix(&[n], stored);
                let used = if compute == DType::F32 { stored } else { compute };
                assert_eq!(w.extra_bytes() > 0, used != stored);
                let rounded = round_to(&round_to(&case.w, stored), used);
                let (expected, scale) = linear_oracle(&case.x, &rounded, with_bias.then_some(&case.bias), k, n);
                for level in levels() {
                    let y = case.run(2, level, &w, 0..rows, with_bias);
                    let place = format!("{level}: [{rows}, {k}] {compute} x [{n}, {k}] {stored}");
                    for (j, &got) in y.iter().enumerate() {
                        // Products of 16-bit types are exact in f32: what is left are the roundings of the sum.
                        let tolerance =
                            1e-6 + expected[j].abs() * epsilon(compute) + scale[j] * epsilon(DType::F32) * 8.0;
                        let error = (f64::from(got) - expected[j]).abs();
                        assert!(
                            error <= tolerance,
                            "{place}: y[{}, {}] = {got}, expected {}",
                            j / n,
                            j % n,
                            expected[j]
                        );
                    }
                    let difference = global_difference(&y, &expected);
                    let limit = if compute == DType::F32 { 1e-5 } else { 1e-3 };
                    assert!(difference < limit, "{place}: global difference {difference}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for compute in DTYPES {
        for (rows, k, n) in [(67, 33, 35), (67, 928, 50), (40, 2065, 49), (70, 4864, 33)] {
            let case = Case::new(rows, k, n, compute);
            let w = case.matrix(&[n], compute);
            for level in levels() {
                let all = bits(&case.run(1, level, &w, 0..rows, true));
                for range in
                    [0..1, 1..2, 5..7, 3..6, 2..6, 1..9, 30..39, 7..22, 8..24, 0..17, 4..37, 2..36, rows - 1..rows]
                {
                    let some = bits(&case.run(1, level, &w, range.clone(), true));
                    for t in 0..rows {
                        let row = t * n..(t + 1) * n;
                        if range.contains(&t) {
                            assert_eq!(
                                some[row.clone()],
                                all[row],
                                "{level} {compute} [{rows}, {k}], row {t} in {range:?}"
                            );
                        } else {
                            assert!(some[row].iter().all(|&b| b == f32::NAN.to_bits()), "row {t} was touched");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn rows_past_one_run_have_the_same_bits() {
    let (rows, k, n) = (1030, 1057, 33);
    let case = Case::new(rows, k, n, DType::Bf16);
    let w = case.matrix(&[n], DType::Bf16);
    for level in levels() {
        let all = bits(&case.run(2, level, &w, 0..rows, false));
        for t in [0, 511, 512, 1023, 1024, 1029] {
            let one = bits(&case.run(1, level, &w, t..t + 1, false));
            assert_eq!(one[t * n..(t + 1) * n], all[t * n..(t + 1) * n], "{level}, row {t}");
        }
    }
}

/// y of more than 24 MiB, which AMX writes in another way; with x of more than 2 MiB too.
#[test]
fn a_large_y_has_the_same_bits() {
    let shapes = [(300, 40, 21_011, levels()), (491, 2177, 12_850, vec![SimdLevel::Amx])];
    for (rows, k, n, levels) in shapes {
        let case = Case::new(rows, k, n, DType::Bf16);
        let w = case.matrix(&[n - 1003, 1003], DType::Bf16);
        for level in levels.into_iter().filter(|level| level.is_available()) {
            for bias in [false, true] {
                let all = bits(&case.run(2, level, &w, 0..rows, bias));
                for t in [0, 15, 16, 17, 31, 32, 255, 287, 288, rows - 1] {
                    let one = bits(&case.run(1, level, &w, t..t + 1, bias));
                    assert!(
                        one[t * n..(t + 1) * n] == all[t * n..(t + 1) * n],
                        "{level}, [{rows}, {k}] -> {n}, row {t}"
                    );
                }
                assert!(all.iter().all(|&b| f32::from_bits(b).is_finite()), "{level}, [{rows}, {k}] -> {n}");
            }
        }
    }
}

#[test]
fn threads_and_stacking_change_no_bit() {
    for compute in DTYPES {
        for (rows, k, n) in [(1, 448, 117), (8, 97, 117), (37, 1100, 117)] {
            let case = Case::new(rows, k, n, compute);
            for stored in DTYPES {
                let single = case.matrix(&[n], stored);
                let stacked = case.matrix(&[64, 5, 32, 16], stored);
                for level in levels() {
                    let expected = bits(&case.run(1, level, &single, 0..rows, true));
                    for threads in 1..=3 {
                        for (w, name) in [(&single, "single"), (&stacked, "stacked")] {
                            let got = bits(&case.run(threads, level, w, 0..rows, true));
                            assert_eq!(
                                got, expected,
                                "{level} {compute} {stored} {name}, {threads} threads, {rows} rows"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_bad_row_leaves_its_neighbours_alone() {
    let (rows, k, n) = (20, 70, 40);
    for level in levels() {
        let good = Case::new(rows, k, n, DType::Bf16);
        let w = good.matrix(&[n], DType::Bf16);
        let expected = good.run(1, level, &w, 0..rows, false);
        let mut bad = Case::new(rows, k, n, DType::Bf16);
        let Input::Bf16(x) = &mut bad.input else { unreachable!() };
        x[3 * k..4 * k].fill(bf16::NAN);
        x[17 * k + 69] = bf16::INFINITY;
        let got = bad.run(1, level, &w, 0..rows, false);
        for t in 0..rows {
            let row = t * n..(t + 1) * n;
            match t {
                3 | 17 => assert!(got[row].iter().all(|v| !v.is_finite()), "{level}, row {t}"),
                _ => assert_eq!(bits(&got[row.clone()]), bits(&expected[row]), "{level}, row {t}"),
            }
        }
    }
}

#[test]
fn scratch_is_reused_without_leaking_earlier_calls() {
    let mut pool = ThreadPool::new(2);
    for level in levels() {
        let mut scratch = LinearScratch::default();
        for (rows, k, n) in [(257, 900, 64), (3, 33, 20), (40, 1100, 35), (1, 5, 3), (17, 70, 17)] {
            let case = Case::new(rows, k, n, DType::Bf16);
            let w = case.matrix(&[n], DType::Bf16);
            let mut y = vec![0.0; rows * n];
            let args = LinearArgs { x: case.input.view(), rows: 0..rows, in_features: k, w: &w, bias: None, y: &mut y };
            linear(&mut pool, level, &mut scratch, args).unwrap();
            assert_eq!(bits(&y), bits(&case.run(1, level, &w, 0..rows, false)), "{level} [{rows}, {k}] -> {n}");
        }
    }
}

#[test]
fn wrong_shapes_are_errors_and_empty_ones_are_not() {
    let case = Case::new(4, 16, 8, DType::F32);
    let w = case.matrix(&[8], DType::F32);
    let mut pool = ThreadPool::new(1);
    let mut run = |rows: std::ops::Range<usize>, k: usize, bias: Option<&[f32]>, y_len: usize| {
        let mut y = vec![0.0; y_len];
        let args = LinearArgs { x: case.input.view(), rows, in_features: k, w: &w, bias, y: &mut y };
        linear(&mut pool, SimdLevel::detect(), &mut LinearScratch::default(), args)
    };
    assert!(run(0..4, 16, None, 32).is_ok());
    assert!(run(2..2, 16, None, 32).is_ok());
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = run(3..2, 16, None, 32);
    for result in [
        run(0..5, 16, None, 99),
        run(0..4, 15, None, 32),
        run(0..4, 16, None, 31),
        run(0..4, 16, Some(&[0.0]), 32),
        reversed,
    ] {
        assert!(matches!(result, Err(Error::Shape { op: "linear", .. })), "{result:?}");
    }
    let x = Input::new(&case.x, DType::F16);
    let mut y = vec![0.0; 32];
    let args = LinearArgs { x: x.view(), rows: 0..4, in_features: 16, w: &w, bias: None, y: &mut y };
    assert!(linear(&mut pool, SimdLevel::Portable, &mut LinearScratch::default(), args).is_err());
    let a = tensor("a", DType::F32, &[2, 3], &[0.0; 6]);
    let b = tensor("b", DType::F32, &[2, 4], &[0.0; 8]);
    assert!(matches!(CpuMatrix::new(&[a, b], DType::F32), Err(Error::Shape { .. })));
    assert!(CpuMatrix::new::<Tensor>(&[], DType::F32).is_err());
}

#[test]
fn rows_of_a_matrix_can_be_widened() {
    let values = fill(3, 12);
    for dtype in DTYPES {
        let parts = [tensor("a", dtype, &[1, 3], &values[..3]), tensor("b", dtype, &[3, 3], &values[3..])];
        let w = CpuMatrix::new(&parts, dtype).unwrap();
        assert_eq!((w.in_features(), w.out_features(), w.num_bytes()), (3, 4, 12 * dtype.size_bytes() as u64));
        let mut row = [0.0; 3];
        w.widen_row(2, &mut row).unwrap();
        assert_eq!(row.to_vec(), round_to(&values[6..9], dtype));
        assert!(w.widen_row(4, &mut row).is_err());
    }
}

//! `linear` against weights in codes: values for every format, and the law that a row's bits depend on that row alone.

use std::ops::Range;

use half::{bf16, f16};
use rksc::backend::cpu::linear::{Activations, LinearArgs, LinearScratch, linear};
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::model::weights::TensorData;
use rksc::quant::{CodeBits, MatrixPart, QuantTensor, ZeroKind};
use rksc::testing::linear_quantised::{CodeFormat, quantised_oracle, rows_with_codes, with_zeros, without_nan};
use rksc::testing::{fill, global_difference, round_to, tensor};
use rksc::{DType, Error, Result};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// (rows, in / 32, out). Where a group does not divide `in`, the next multiple is taken.
const SHAPES: &[(usize, usize, usize)] = &[
    (0, 4, 33),
    (1, 1, 1),
    (1, 4, 31),
    (1, 12, 33),
    (2, 3, 33),
    (2, 48, 17),
    (3, 5, 31),
    (4, 7, 8),
    (5, 9, 7),
    (7, 13, 2),
    (8, 16, 33),
    (9, 21, 9),
    (12, 66, 5),
    (16, 35, 31),
    (33, 11, 33),
];

/// What is multiplied.
struct Case {
    rows: usize,
    k: usize,
    dtype: DType,
    x: Vec<f32>,
}

impl Case {
    fn new(rows: usize, k: usize, dtype: DType) -> Self {
        Self { rows, k, dtype, x: round_to(&fill((rows + k) as u64, rows * k), dtype) }
    }

    /// y with some rows written, NaN elsewhere.
    fn run(
        &self,
        threads: usize,
        level: SimdLevel,
        w: &CpuMatrix,
        rows: Range<usize>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let mut y = vec![f32::NAN; self.rows * w.out_features()];
        let x_bf16: Vec<bf16> = self.x.iter().map(|&v| bf16::from_f32(v)).collect();
        let x_f16: Vec<f16> = self.x.iter().map(|&v| f16::from_f32(v)).collect();
        let x = match self.dtype {
            DType::F32 => Activations::F32(&self.x),
            DType::Bf16 => Activations::Bf16(&x_bf16),
            DType::F16 => Activations::F16(&x_f16),
        };
        let args = LinearArgs { x, rows, in_features: self.k, w, bias, y: &mut y };
        linear(&mut ThreadPool::new(threads), level, &mut LinearScratch::default(), args)?;
        Ok(y)
    }

    fn bits(&self, threads: usize, level: SimdLevel, w: &CpuMatrix, rows: Range<usize>) -> Vec<u32> {
        self.run(threads, level, w, rows, None).unwrap().iter().map(|y| y.to_bits()).collect()
    }
}

fn matrix(w: &QuantTensor, dtype: DType) -> CpuMatrix {
    CpuMatrix::new(std::slice::from_ref(w), dtype).unwrap()
}

/// Rows `rows` of `w` as a tensor of their own.
fn cut(w: &QuantTensor, rows: Range<usize>) -> QuantTensor {
    let width = w.in_features / w.bits.per_word();
    let codes = w.codes()[rows.start * width..rows.end * width].to_vec();
    rows_with_codes(w, &rows.collect::<Vec<_>>(), codes)
}

fn check(what: &str, w: &QuantTensor, case: &Case, y: &[f32], bias: Option<&[f32]>) {
    let (want, size) = quantised_oracle(w, &case.x, bias);
    assert_eq!(y.len(), want.len());
    for (i, ((&y, &want), &size)) in y.iter().zip(&want).zip(&size).enumerate() {
        let bound = 4e-6 * size + 1e-6;
        assert!((f64::from(y) - want).abs() <= bound, "{what}: y[{i}] = {y}, expected {want} within {bound:e}");
    }
    let difference = global_difference(y, &want);
    assert!(difference < 1e-6, "{what}: global difference {difference:e}");
}

#[test]
fn every_format_matches_the_oracle_at_every_level() {
    for (i, &(rows, k, n)) in SHAPES.iter().enumerate() {
        for format in CodeFormat::all() {
            let k = (32 * k).next_multiple_of(format.group);
            let w = format.random(n, k, i as u64);
            let bias = fill(5, n);
            let bias = (i % 2 == 0).then_some(bias.as_slice());
            for dtype in DTYPES {
                let (case, matrix) = (Case::new(rows, k, dtype), matrix(&w, dtype));
                assert_eq!((matrix.num_bytes(), matrix.extra_bytes()), (w.num_bytes(), 0));
                for level in SimdLevel::available() {
                    let y = case.run(2, level, &matrix, 0..rows, bias).unwrap();
                    check(&format!("{level} [{rows}, {k}] {dtype} x {n} {format:?}"), &w, &case, &y, bias);
                }
            }
        }
    }
}

#[test]
fn zeros_off_the_grid_count_as_what_they_are() {
    let w = CodeFormat { bits: CodeBits::W4, group: 128, zeros: ZeroKind::None }.random(5, 256, 1);
    let whole = [0.0, 15.0, 16.0, 100.0, 127.0, 3.0, 8.0, 9.0, 1.0, 2.0];
    let odd = [-3.25, 0.0, 15.75, 7.5, 100.5, -0.125, 8.0, 127.0, 20.0625, -119.0];
    for w in [with_zeros(&w, ZeroKind::Integer, &whole), with_zeros(&w, ZeroKind::Fractional, &odd)] {
        for dtype in DTYPES {
            let case = Case::new(3, 256, dtype);
            for level in SimdLevel::available() {
                let y = case.run(1, level, &matrix(&w, dtype), 0..3, None).unwrap();
                check(&format!("{level} {dtype} {:?}", w.zero_kind), &w, &case, &y, None);
            }
        }
    }
}

#[test]
fn a_row_of_codes_has_the_same_bits_alone_and_in_any_batch() {
    for format in CodeFormat::all() {
        let (rows, k, n) = (35, 9 * format.group, 33);
        let w = format.random(n, k, 9);
        for dtype in DTYPES {
            let (case, matrix) = (Case::new(rows, k, dtype), matrix(&w, dtype));
            for level in SimdLevel::available() {
                let all = case.bits(1, level, &matrix, 0..rows);
                for range in [0..1, 1..3, 5..8, 3..7, 2..8, 1..9, 7..22, 0..17, 33..35, 34..35] {
                    let some = case.bits(1, level, &matrix, range.clone());
                    for t in 0..rows {
                        let row = t * n..(t + 1) * n;
                        match range.contains(&t) {
                            true => assert_eq!(some[row.clone()], all[row], "{level} {dtype} {format:?} {t} {range:?}"),
                            false => assert!(some[row].iter().all(|&b| b == f32::NAN.to_bits()), "row {t} was touched"),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn threads_and_stacking_of_codes_change_no_bit() {
    for format in CodeFormat::all() {
        let (k, n) = (5 * format.group, 117);
        let w = format.random(n, k, 3);
        let parts = [cut(&w, 0..64), cut(&w, 64..69), cut(&w, 69..101), cut(&w, 101..117)];
        for (rows, dtype) in [(1, DType::Bf16), (8, DType::F16), (19, DType::F32)] {
            let case = Case::new(rows, k, dtype);
            let stacked = CpuMatrix::new(&parts, dtype).unwrap();
            for level in SimdLevel::available() {
                let expected = case.bits(1, level, &matrix(&w, dtype), 0..rows);
                for threads in 1..=3 {
                    for w in [&matrix(&w, dtype), &stacked, &stacked.slice(0..n)] {
                        assert_eq!(case.bits(threads, level, w, 0..rows), expected, "{level} {dtype} {format:?}");
                    }
                }
            }
        }
    }
}

/// As q, k and v may come: each in a form of its own.
fn mixed_parts(k: usize) -> [MatrixPart; 4] {
    let codes = |bits, group, zeros, n| CodeFormat { bits, group, zeros }.random(n, k, n as u64).into();
    [
        codes(CodeBits::W4, 64, ZeroKind::Fractional, 50),
        tensor("dense", DType::Bf16, &[19, k], &fill(2, 19 * k)).into(),
        codes(CodeBits::W8, 128, ZeroKind::None, 31),
        codes(CodeBits::W4, 32, ZeroKind::Integer, 7),
    ]
}

/// Columns in another order: the bits of the same codes against x whose columns are moved.
#[test]
fn codes_in_another_order_of_columns_take_x_in_that_order() {
    for format in [CodeFormat::all()[1], CodeFormat::all()[11]] {
        let (rows, k, n) = (19, 12 * format.group, 33);
        let w = format.random(n, k, 7);
        let mut columns: Vec<u32> = (0..k as u32).collect();
        columns.sort_by_key(|k| k.wrapping_mul(0x9e37_79b9));
        let moved = QuantTensor { columns: Some(columns.clone().into()), ..w.clone() };
        let dense = tensor("dense", DType::Bf16, &[5, k], &fill(2, 5 * k));
        for dtype in DTYPES {
            let case = Case::new(rows, k, dtype);
            let x = case.x.chunks(k).flat_map(|row| columns.iter().map(|&c| row[c as usize])).collect();
            let gathered = Case { x, ..Case::new(rows, k, dtype) };
            let parts: [MatrixPart; 2] = [moved.clone().into(), dense.clone().into()];
            let stacked = CpuMatrix::new(&parts, dtype).unwrap();
            let alone = CpuMatrix::new(std::slice::from_ref(&dense), dtype).unwrap();
            for level in SimdLevel::available() {
                let want = gathered.bits(1, level, &matrix(&w, dtype), 0..rows);
                assert_eq!(case.bits(2, level, &matrix(&moved, dtype), 0..rows), want, "{level} {dtype} {format:?}");
                let y = case.run(1, level, &matrix(&moved, dtype), 0..rows, None).unwrap();
                check(&format!("{level} {dtype} {format:?}"), &moved, &case, &y, None);
                // Dense neighbours take x as it is.
                let both = case.bits(3, level, &stacked, 0..rows);
                let dense = case.bits(1, level, &alone, 0..rows);
                for t in 0..rows {
                    assert_eq!(both[t * (n + 5)..][..n], want[t * n..][..n]);
                    assert_eq!(both[t * (n + 5) + n..][..5], dense[t * 5..][..5]);
                }
            }
        }
        let mut row = vec![0.0; k];
        matrix(&moved, DType::Bf16).widen_row(3, &mut row).unwrap();
        assert_eq!(row, moved.dequantise()[3 * k..4 * k]);
        assert_eq!(row[columns[5] as usize], w.dequantise()[3 * k + 5]);
        let odd: [MatrixPart; 2] = [moved.clone().into(), QuantTensor { name: "odd".into(), ..w.clone() }.into()];
        let e = CpuMatrix::new(&odd, DType::Bf16).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("odd in another order of columns than random codes"), "{e}");
        let twice = QuantTensor { columns: Some(vec![0; k].into()), ..w };
        assert!(matches!(CpuMatrix::new(&[twice], DType::Bf16), Err(Error::Shape { .. })));
    }
}

/// One weight at a time: every E4M3 number, subnormal ones too, is multiplied as what it is.
#[test]
fn every_e4m3_number_counts_as_what_it_is() {
    let codes: Vec<u32> = (0..256u32).flat_map(|n| [0, without_nan(n) << 16, 0, 0, 0, 0, 0, 0]).collect();
    let scales = std::iter::repeat_n(1.0f32.to_bits(), 256).collect();
    let w = CodeFormat { bits: CodeBits::F8, group: 32, zeros: ZeroKind::None }.random(256, 32, 1);
    let w = QuantTensor { codes: TensorData::Owned(codes.into()), scales: TensorData::Owned(scales), ..w };
    let want: Vec<f32> = (0..256).map(|n| w.bits.number(without_nan(n))).collect();
    for dtype in DTYPES {
        let mut case = Case::new(1, 32, dtype);
        case.x.fill(0.0);
        case.x[6] = 1.0;
        for level in SimdLevel::available() {
            assert_eq!(case.run(1, level, &matrix(&w, dtype), 0..1, None).unwrap(), want, "{level} {dtype}");
        }
    }
}

#[test]
fn parts_of_different_kinds_stack() {
    let (rows, k) = (5, 384);
    let parts = mixed_parts(k);
    for dtype in [DType::Bf16, DType::F32] {
        let stacked = CpuMatrix::new(&parts, dtype).unwrap();
        let singles: Vec<CpuMatrix> =
            parts.iter().map(|part| CpuMatrix::new(std::slice::from_ref(part), dtype).unwrap()).collect();
        assert_eq!(stacked.out_features(), 107);
        assert_eq!(stacked.num_bytes(), singles.iter().map(CpuMatrix::num_bytes).sum::<u64>());
        assert_eq!(stacked.row_bytes(&[0, 50, 106]), [0, 1, 3].map(|i| singles[i].row_bytes(&[0])).iter().sum::<u64>());
        let case = Case::new(rows, k, dtype);
        let bias = fill(1, 107);
        for level in SimdLevel::available() {
            for threads in 1..=3 {
                let y = case.run(threads, level, &stacked, 1..rows, Some(&bias)).unwrap();
                let mut first = 0;
                for single in &singles {
                    let n = single.out_features();
                    let want = case.run(1, level, single, 0..rows, Some(&bias[first..first + n])).unwrap();
                    for t in 0..rows {
                        let got = &y[t * 107 + first..][..n];
                        match t {
                            0 => assert!(got.iter().all(|y| y.is_nan()), "row 0 was touched"),
                            _ => assert_eq!(got, &want[t * n..(t + 1) * n], "{level} {dtype}, row {t} from {first}"),
                        }
                    }
                    first += n;
                }
            }
        }
    }
}

#[test]
fn rows_of_codes_can_be_widened() {
    let k = 384;
    let stacked = CpuMatrix::new(&mixed_parts(k), DType::Bf16).unwrap();
    let (MatrixPart::Quantised(w4), MatrixPart::Quantised(w8)) = (&mixed_parts(k)[0], &mixed_parts(k)[2]) else {
        unreachable!()
    };
    let mut row = vec![0.0; k];
    for (at, w, n) in [(0, w4, 0), (49, w4, 49), (69, w8, 0), (99, w8, 30)] {
        stacked.widen_row(at, &mut row).unwrap();
        assert_eq!(row, w.dequantise()[n * k..(n + 1) * k]);
    }
    assert!(stacked.slice(40..80).widen_row(40, &mut row).is_err());
    stacked.slice(40..80).widen_row(29, &mut row).unwrap();
    assert_eq!(row, w8.dequantise()[..k]);
    assert!(matches!(stacked.gather(&[1]), Err(Error::Unsupported { .. })));
}

/// Weights of 4 bits, activations of 16: a row is off the product of the widened weights in f32 by less than 2e-3.
#[test]
fn codes_are_as_good_as_what_they_stand_for() {
    let (k, n) = (1536, 64);
    for format in CodeFormat::all() {
        let w = format.random(n, k, 11);
        let dense = CpuMatrix::new(&[w.to_dense(DType::F32)], DType::F32).unwrap();
        let x = Case::new(1, k, DType::F32);
        for level in SimdLevel::available() {
            let want = x.run(1, level, &dense, 0..1, None).unwrap();
            for dtype in [DType::Bf16, DType::F16] {
                let rounded = Case { x: round_to(&x.x, dtype), dtype, ..Case::new(1, k, dtype) };
                let exact = Case { x: rounded.x.clone(), ..Case::new(1, k, DType::F32) };
                let want =
                    if dtype == DType::Bf16 { exact.run(1, level, &dense, 0..1, None).unwrap() } else { want.clone() };
                let got = rounded.run(1, level, &matrix(&w, dtype), 0..1, None).unwrap();
                let norm = |y: &[f32]| y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
                let off: Vec<f32> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
                assert!(norm(&off) < 2e-3 * norm(&want), "{level} {dtype} {format:?}: {}", norm(&off) / norm(&want));
            }
        }
    }
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let good = CodeFormat { bits: CodeBits::W4, group: 64, zeros: ZeroKind::Integer }.random(4, 128, 1);
    let refused = |w: QuantTensor| CpuMatrix::new(&[w], DType::Bf16).map(|_| ()).unwrap_err();
    for bad in [
        QuantTensor { group: 48, ..good.clone() },
        QuantTensor { in_features: 96, ..good.clone() },
        QuantTensor { out_features: 5, ..good.clone() },
        QuantTensor { zero_kind: ZeroKind::Fractional, ..good.clone() },
        QuantTensor { codes: TensorData::Static(&[0; 7]), ..good.clone() },
    ] {
        assert!(matches!(refused(bad), Error::Shape { .. }));
    }
    for bits in [CodeBits::W8, CodeBits::F8] {
        let w = CodeFormat { bits, ..CodeFormat::all()[0] }.random(4, 128, 1);
        let odd = with_zeros(&w, ZeroKind::Integer, &[128.0; 16]);
        assert!(matches!(refused(odd), Error::Unsupported { op: "matrix", .. }));
    }
    let narrow: [MatrixPart; 2] = [good.into(), tensor("a", DType::Bf16, &[2, 64], &[0.0; 128]).into()];
    assert!(matches!(CpuMatrix::new(&narrow, DType::Bf16), Err(Error::Shape { .. })));
}

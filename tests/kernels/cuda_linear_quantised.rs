//! `linear_w4` and `linear_w8` on a device: values for every format, and the law that a row's bits depend on that row alone.

use rksc::backend::cuda::bindings::*;
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::model::weights::TensorData;
use rksc::quant::{CodeBits, QuantTensor, ZeroKind};
use rksc::testing::fill::Fill;
use rksc::testing::linear_quantised::{CodeFormat, quantised_oracle, with_zeros, without_nan};
use rksc::testing::{epsilon, global_difference, round_to};
use rksc::{DType, Result};

use crate::device::{assert_refused, bits, for_each_device, narrowed};

const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];

/// (rows, groups, out); in is groups * group. Past in = 6144 k is split over CTAs.
const SHAPES: &[(usize, usize, usize)] = &[
    (0, 1, 8),
    (1, 1, 1),
    (2, 2, 31),
    (3, 3, 32),
    (4, 4, 33),
    (5, 5, 17),
    (7, 6, 64),
    (8, 7, 40),
    (9, 9, 48),
    (15, 8, 65),
    (16, 11, 30),
];

#[derive(Clone)]
struct Case {
    rows: usize,
    dtype: DType,
    x: Vec<f32>,
    bias: Option<Vec<f32>>,
    w: QuantTensor,
    /// Which rows are computed: a route, the layer and the side.
    route: Option<(Vec<f32>, u32, u32)>,
}

/// Floats between rows of y that no launch may touch.
const GAP: usize = 3;
/// Of a workspace, at its start.
const COUNTER_BYTES: usize = 4 * 4096;

impl Case {
    fn new(rows: usize, in_features: usize, out_features: usize, format: CodeFormat, dtype: DType) -> Self {
        let seed = (rows * in_features + out_features + format.group) as u64;
        let mut fill = Fill::new(seed);
        let w = format.random(out_features, in_features, seed);
        let x = round_to(&fill.normals(rows * in_features, 1.0), dtype);
        let bias = rows.is_multiple_of(2).then(|| fill.normals(out_features, 1.0));
        Self { rows, dtype, x, bias, w, route: None }
    }

    fn what(&self) -> String {
        let QuantTensor { bits, zero_kind, in_features, out_features, group, .. } = self.w;
        format!("{bits:?} {} {}x{in_features}x{out_features} group {group} zeros {zero_kind:?}", self.dtype, self.rows)
    }

    /// Rows `[first, first + count)`; NaN where nothing was written.
    fn run(&self, dev: &mut Device, first: usize, count: usize) -> Result<Vec<f32>> {
        let QuantTensor { in_features: k, out_features: n, group, .. } = self.w;
        let x = narrowed(dev, self.dtype, &self.x[first * k..(first + count) * k])?;
        let bias = self.bias.as_ref().map(|bias| dev.buffer(bias)).transpose()?;
        let route = self.route.as_ref().map(|(route, ..)| dev.buffer(&route[first..first + count])).transpose()?;
        let (layer, side) = self.route.as_ref().map_or((0, 0), |&(_, layer, side)| (layer, side));
        let stride = n + GAP;
        let mut y = dev.buffer(&vec![f32::NAN; count * stride])?;
        let bytes = dev.kernels().linear_workspace_bytes(count, k, n);
        let mut workspace = dev.zeroed::<u8>(bytes)?;
        let codes = dev.buffer(self.w.codes())?;
        let scales: DeviceBuf<u8> = dev.buffer(self.w.scales().bytes())?;
        let zeros: DeviceBuf<u8> = dev.buffer(self.w.zeros.bytes())?;
        let params = rksc_linear_w4_params {
            x: x.ptr().cast(),
            codes: codes.ptr(),
            scales: scales.ptr().cast(),
            zeros: if self.w.zero_kind == ZeroKind::None { std::ptr::null() } else { zeros.ptr().cast() },
            bias: bias.as_ref().map_or(std::ptr::null(), DeviceBuf::ptr),
            y: y.ptr_mut(),
            workspace: workspace.ptr_mut().cast(),
            route: route.as_ref().map_or(std::ptr::null(), DeviceBuf::ptr),
            num_rows: count as u32,
            in_features: k as u32,
            out_features: n as u32,
            group_size: group as u32,
            zero_kind: self.w.zero_kind as u32,
            dtype: self.dtype as u32,
            y_stride: stride as u32,
            layer,
            side,
            reserved: 0,
        };
        match self.w.bits {
            CodeBits::W4 => dev.launch(dev.kernels().linear_w4, &params)?,
            CodeBits::W8 => dev.launch(dev.kernels().linear_w8, &w8(params, RKSC_NUMBER_INTEGER))?,
            CodeBits::F8 => dev.launch(dev.kernels().linear_w8, &w8(params, RKSC_NUMBER_E4M3))?,
        }
        let all = dev.to_vec(&workspace)?;
        let counters = &all[..all.len().min(COUNTER_BYTES)];
        assert!(counters.iter().all(|&b| b == 0), "{}: counters are left", self.what());
        let all = dev.to_vec(&y)?;
        assert!(
            all.chunks(stride).all(|row| row[n..].iter().all(|y| y.is_nan())),
            "{}: a gap was written",
            self.what()
        );
        Ok(all.chunks(stride).flat_map(|row| row[..n].to_vec()).collect())
    }

    fn check(&self, got: &[f32]) {
        let (want, size) = quantised_oracle(&self.w, &self.x, self.bias.as_deref());
        assert_eq!(got.len(), want.len());
        // Weights are exact but for fractional zeros, where code - zero is rounded to the type.
        let relative = if self.w.zero_kind == ZeroKind::Fractional { epsilon(self.dtype) } else { 1e-5 };
        for (i, ((&g, &w), &size)) in got.iter().zip(&want).zip(&size).enumerate() {
            let bound = relative * size + w.abs() * f64::from(f32::EPSILON);
            assert!(
                (f64::from(g) - w).abs() <= bound,
                "{}: index {i}: got {g}, want {w}, bound {bound:e}",
                self.what()
            );
        }
        let off = global_difference(got, &want);
        // One sum or two may happen to cancel.
        assert!(want.len() < 16 || off < 1e-3 * relative.sqrt(), "{}: global difference {off:e}", self.what());
    }

    fn run_everywhere(&self) {
        for_each_device(&self.what(), |dev| {
            let y = self.run(dev, 0, self.rows)?;
            self.check(&y);
            Ok(bits(&y))
        });
    }
}

/// The same for codes of 8 bits.
fn w8(p: rksc_linear_w4_params, number: rksc_number) -> rksc_linear_w8_params {
    rksc_linear_w8_params {
        x: p.x,
        codes: p.codes,
        scales: p.scales.cast(),
        bias: p.bias,
        y: p.y,
        workspace: p.workspace,
        route: p.route,
        num_rows: p.num_rows,
        in_features: p.in_features,
        out_features: p.out_features,
        group_size: p.group_size,
        number,
        dtype: p.dtype,
        y_stride: p.y_stride,
        layer: p.layer,
        side: p.side,
        reserved: 0,
    }
}

fn w4(group: usize, zeros: ZeroKind) -> CodeFormat {
    CodeFormat { bits: CodeBits::W4, group, zeros }
}

fn w8_of(group: usize) -> CodeFormat {
    CodeFormat { bits: CodeBits::W8, group, zeros: ZeroKind::None }
}

fn f8_of(group: usize) -> CodeFormat {
    CodeFormat { bits: CodeBits::F8, group, zeros: ZeroKind::None }
}

/// One weight at a time: every E4M3 number, subnormal ones too, is multiplied as what it is.
#[test]
fn every_e4m3_number_counts_as_what_it_is() {
    for dtype in DTYPES {
        let mut case = Case::new(1, 32, 256, f8_of(32), dtype);
        let codes: Vec<u32> = (0..256u32).flat_map(|n| [without_nan(n), 0, 0, 0, 0, 0, 0, 0]).collect();
        (case.x, case.bias) = (vec![0.0; 32], None);
        case.x[0] = 1.0;
        let scales = std::iter::repeat_n(1.0f32.to_bits(), 256).collect();
        (case.w.codes, case.w.scales) = (TensorData::Owned(codes.into()), TensorData::Owned(scales));
        for_each_device(&case.what(), |dev| {
            let y = case.run(dev, 0, 1)?;
            let want: Vec<f32> = (0..256).map(|n| case.w.bits.number(without_nan(n))).collect();
            assert_eq!(y, want);
            Ok(bits(&y))
        });
    }
}

#[test]
fn codes_match_the_oracle_on_every_device() {
    for &(rows, groups, out) in SHAPES {
        for format in CodeFormat::all() {
            for dtype in DTYPES {
                Case::new(rows, groups * format.group, out, format, dtype).run_everywhere();
            }
        }
    }
}

#[test]
fn codes_match_the_oracle_where_rows_are_long_or_many() {
    for (rows, k, n, format) in [
        (8, 3584, 40, w4(128, ZeroKind::None)),
        (1, 4864, 33, w4(64, ZeroKind::Integer)),
        (3, 6272, 20, w4(128, ZeroKind::Integer)),
        (16, 12416, 34, w4(128, ZeroKind::Fractional)),
        (2, 18944, 16, w4(128, ZeroKind::None)),
        (4, 8256, 18, w4(32, ZeroKind::Integer)),
        (8, 128, 3100, w4(128, ZeroKind::None)),
        (1, 32, 50_257, w4(32, ZeroKind::Integer)),
        (8, 3584, 40, w8_of(128)),
        (16, 12416, 34, w8_of(64)),
        (3, 6176, 20, w8_of(32)),
        (2, 128, 3100, w8_of(128)),
        (8, 3584, 40, f8_of(128)),
        (16, 12416, 34, f8_of(64)),
        (3, 6176, 20, f8_of(32)),
    ] {
        for dtype in DTYPES {
            Case::new(rows, k, n, format, dtype).run_everywhere();
        }
    }
}

#[test]
fn integer_zeros_off_the_grid_and_negative_fractions_count_as_what_they_are() {
    for dtype in DTYPES {
        let mut case = Case::new(2, 256, 5, w4(128, ZeroKind::None), dtype);
        let whole = [0.0, 15.0, 16.0, 100.0, 127.0, 3.0, 8.0, 9.0, 1.0, 2.0];
        case.w = with_zeros(&case.w, ZeroKind::Integer, &whole);
        case.run_everywhere();
        let odd = [-3.25, 0.0, 15.75, 7.5, 100.5, -0.125, 8.0, 127.0, 20.0625, -119.0];
        case.w = with_zeros(&case.w, ZeroKind::Fractional, &odd);
        case.run_everywhere();
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_how_many_rows_of_codes_there_are() {
    for (k, n, format) in [
        (384, 33, w4(128, ZeroKind::None)),
        (896, 40, w4(32, ZeroKind::Integer)),
        (6400, 20, w4(64, ZeroKind::Fractional)),
        (640, 33, w8_of(128)),
        (6432, 20, w8_of(32)),
        (6432, 20, f8_of(32)),
    ] {
        for dtype in DTYPES {
            let case = Case::new(16, k, n, format, dtype);
            for_each_device(&case.what(), |dev| {
                let all = case.run(dev, 0, 16)?;
                for (first, count) in [(0, 1), (15, 1), (0, 8), (8, 8), (3, 9)] {
                    let some = case.run(dev, first, count)?;
                    assert_eq!(bits(&some), bits(&all[first * n..(first + count) * n]), "{first} {count}");
                }
                Ok(bits(&all))
            });
        }
    }
}

#[test]
fn a_launch_writes_the_rows_on_its_side_and_no_others() {
    // With slices of k and without.
    for (k, n, format) in
        [(384, 33, w4(64, ZeroKind::Fractional)), (6400, 20, w4(128, ZeroKind::None)), (6528, 40, f8_of(64))]
    {
        let case = Case::new(16, k, n, format, DType::Bf16);
        let on_side = |t: usize, side: u32| (t % 3 == 1) == (side == 1);
        let route: Vec<f32> = (0..16).map(|t| if on_side(t, 1) { 4.0 } else { f32::INFINITY }).collect();
        for (layer, side) in [(5, 1), (5, 0), (4, 1), (4, 0)] {
            for_each_device("routed rows", |dev| {
                let mut case = case.clone();
                let all = case.run(dev, 0, 16)?;
                case.route = Some((route.clone(), layer, side));
                let some = case.run(dev, 0, 16)?;
                for t in 0..16 {
                    let (row, is_written) = (t * n..(t + 1) * n, if layer == 5 { on_side(t, side) } else { side == 0 });
                    match is_written {
                        true => assert_eq!(bits(&some[row.clone()]), bits(&all[row]), "{layer} {side} {t}"),
                        false => assert!(some[row].iter().all(|y| y.is_nan()), "{layer} {side} {t}"),
                    }
                }
                Ok(bits(&some))
            });
        }
    }
}

#[test]
fn kernels_for_codes_refuse_what_they_cannot_do() {
    for_each_device("codes refused", |dev| {
        let good = rksc_linear_w4_params {
            num_rows: 1,
            in_features: 128,
            out_features: 1,
            group_size: 128,
            dtype: 1,
            y_stride: 1,
            ..Default::default()
        };
        for bad in [
            rksc_linear_w4_params { num_rows: 17, ..good },
            rksc_linear_w4_params { in_features: 0, ..good },
            rksc_linear_w4_params { in_features: 192, ..good },
            rksc_linear_w4_params { group_size: 48, in_features: 96, ..good },
            rksc_linear_w4_params { zero_kind: RKSC_ZERO_INTEGER, ..good }, // and no zeros
            rksc_linear_w4_params { zero_kind: 3, ..good },
            rksc_linear_w4_params { dtype: 0, ..good },
            rksc_linear_w4_params { y_stride: 0, ..good },
            rksc_linear_w4_params { side: 2, ..good },
            rksc_linear_w4_params { in_features: 8192, ..good }, // split over CTAs, and no workspace
        ] {
            assert_refused(dev.launch(dev.kernels().linear_w4, &bad));
            if bad.zero_kind == RKSC_ZERO_NONE {
                assert_refused(dev.launch(dev.kernels().linear_w8, &w8(bad, RKSC_NUMBER_INTEGER)));
            }
        }
        assert_refused(dev.launch(dev.kernels().linear_w8, &w8(good, RKSC_NUMBER_E4M3 + 1)));
        dev.launch(dev.kernels().linear_w8, &w8(rksc_linear_w4_params { num_rows: 0, ..good }, RKSC_NUMBER_INTEGER))?;
        dev.launch(dev.kernels().linear_w4, &rksc_linear_w4_params { num_rows: 0, ..good })?;
        Ok(Vec::new())
    });
}

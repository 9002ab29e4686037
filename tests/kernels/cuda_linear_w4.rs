//! `linear_w4` on a device: values for every kind of zero and group, and the law that a row's bits depend on that row alone.

use half::f16;
use rksc::backend::cuda::bindings::{RKSC_ZERO_FRACTIONAL, RKSC_ZERO_INTEGER, RKSC_ZERO_NONE, rksc_linear_w4_params};
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::testing::fill::Fill;
use rksc::testing::linear_w4::{W4, Zeros};
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

struct Case {
    rows: usize,
    dtype: DType,
    x: Vec<f32>,
    bias: Option<Vec<f32>>,
    w: W4,
}

impl Case {
    fn new(rows: usize, in_features: usize, out_features: usize, group: usize, kind: u32, dtype: DType) -> Self {
        let mut fill = Fill::new((rows * in_features + out_features + kind as usize) as u64);
        let groups = out_features * (in_features / group);
        let zeros = match kind {
            RKSC_ZERO_INTEGER => Zeros::Integer((0..groups).map(|_| fill.below(16) as u8).collect()),
            RKSC_ZERO_FRACTIONAL => {
                Zeros::Fractional((0..groups).map(|_| f16::from_f32(7.5 + 9.0 * fill.unit())).collect())
            }
            _ => Zeros::None,
        };
        let w = W4 {
            codes: (0..out_features * in_features / 8).map(|_| fill.next_u64() as u32).collect(),
            scales: (0..groups).map(|_| f16::from_f32(0.01 * (1.5 + fill.unit()))).collect(),
            zeros,
            in_features,
            out_features,
            group,
        };
        let x = round_to(&fill.normals(rows * in_features, 1.0), dtype);
        let bias = rows.is_multiple_of(2).then(|| fill.normals(out_features, 1.0));
        Self { rows, dtype, x, bias, w }
    }

    fn what(&self) -> String {
        let w = &self.w;
        let kind = ["none", "integer", "fractional"][self.kind() as usize];
        format!(
            "linear_w4 {} {}x{}x{} group {} zeros {kind}",
            self.dtype, self.rows, w.in_features, w.out_features, w.group
        )
    }

    fn kind(&self) -> u32 {
        match self.w.zeros {
            Zeros::None => RKSC_ZERO_NONE,
            Zeros::Integer(_) => RKSC_ZERO_INTEGER,
            Zeros::Fractional(_) => RKSC_ZERO_FRACTIONAL,
        }
    }

    /// Rows `[first, first + count)`.
    fn run(&self, dev: &mut Device, first: usize, count: usize) -> Result<Vec<f32>> {
        let w = &self.w;
        let x = narrowed(dev, self.dtype, &self.x[first * w.in_features..(first + count) * w.in_features])?;
        let codes = dev.buffer(&w.codes)?;
        let scales: DeviceBuf<u16> = dev.buffer(&w.scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>())?;
        let zeros: DeviceBuf<u8> = match &w.zeros {
            Zeros::None => dev.buffer(&[])?,
            Zeros::Integer(zeros) => dev.buffer(zeros)?,
            Zeros::Fractional(zeros) => dev.buffer(&zeros.iter().flat_map(|z| z.to_ne_bytes()).collect::<Vec<_>>())?,
        };
        let bias = self.bias.as_ref().map(|bias| dev.buffer(bias)).transpose()?;
        let mut y = dev.alloc::<f32>(count * w.out_features)?;
        let bytes = dev.kernels().linear_workspace_bytes(count, w.in_features, w.out_features);
        let mut workspace = dev.zeroed::<u8>(bytes)?;
        let params = rksc_linear_w4_params {
            x: x.ptr().cast(),
            codes: codes.ptr(),
            scales: scales.ptr(),
            zeros: if self.kind() == RKSC_ZERO_NONE { std::ptr::null() } else { zeros.ptr().cast() },
            bias: bias.as_ref().map_or(std::ptr::null(), DeviceBuf::ptr),
            y: y.ptr_mut(),
            workspace: workspace.ptr_mut().cast(),
            num_rows: count as u32,
            in_features: w.in_features as u32,
            out_features: w.out_features as u32,
            group_size: w.group as u32,
            zero_kind: self.kind(),
            dtype: self.dtype as u32,
        };
        dev.launch(dev.kernels().linear_w4, &params)?;
        dev.to_vec(&y)
    }

    fn check(&self, got: &[f32]) {
        let (want, size) = self.w.linear_oracle(&self.x, self.bias.as_deref());
        assert_eq!(got.len(), want.len());
        // Weights are exact but for fractional zeros, where code - zero is rounded to the type.
        let relative = if self.kind() == RKSC_ZERO_FRACTIONAL { epsilon(self.dtype) } else { 1e-5 };
        for (i, ((&g, &w), &size)) in got.iter().zip(&want).zip(&size).enumerate() {
            let bound = relative * size + w.abs() * f64::from(f32::EPSILON);
            assert!(
                (f64::from(g) - w).abs() <= bound,
                "{}: index {i}: got {g}, want {w}, bound {bound:e}",
                self.what()
            );
        }
        let off = global_difference(got, &want);
        assert!(off < 1e-3 * relative.sqrt(), "{}: global difference {off:e}", self.what());
    }

    fn run_everywhere(&self) {
        for_each_device(&self.what(), |dev| {
            let y = self.run(dev, 0, self.rows)?;
            self.check(&y);
            Ok(bits(&y))
        });
    }
}

#[test]
fn linear_w4_matches_oracle_on_every_device() {
    for &(rows, groups, out) in SHAPES {
        for group in [32, 64, 128] {
            for kind in [RKSC_ZERO_NONE, RKSC_ZERO_INTEGER, RKSC_ZERO_FRACTIONAL] {
                for dtype in DTYPES {
                    Case::new(rows, groups * group, out, group, kind, dtype).run_everywhere();
                }
            }
        }
    }
}

#[test]
fn linear_w4_matches_oracle_where_rows_are_long_or_many() {
    for (rows, k, n, group, kind) in [
        (8, 3584, 40, 128, RKSC_ZERO_NONE),
        (1, 4864, 33, 64, RKSC_ZERO_INTEGER),
        (3, 6272, 20, 128, RKSC_ZERO_INTEGER),
        (16, 12416, 34, 128, RKSC_ZERO_FRACTIONAL),
        (2, 18944, 16, 128, RKSC_ZERO_NONE),
        (4, 8256, 18, 32, RKSC_ZERO_INTEGER),
        (8, 128, 3100, 128, RKSC_ZERO_NONE),
        (1, 32, 50_257, 32, RKSC_ZERO_INTEGER),
    ] {
        for dtype in DTYPES {
            Case::new(rows, k, n, group, kind, dtype).run_everywhere();
        }
    }
}

#[test]
fn integer_zeros_off_the_grid_and_negative_fractions_count_as_what_they_are() {
    for dtype in DTYPES {
        let mut case = Case::new(2, 256, 5, 128, RKSC_ZERO_NONE, dtype);
        case.w.zeros = Zeros::Integer([0, 15, 16, 100, 127, 3, 8, 9, 1, 2].to_vec());
        case.run_everywhere();
        let odd = [-3.25, 0.0, 15.75, 7.5, 100.5, -0.125, 8.0, 127.0, 20.0625, -119.0];
        case.w.zeros = Zeros::Fractional(odd.map(f16::from_f32).to_vec());
        case.run_everywhere();
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_how_many_rows_of_w4_there_are() {
    for (k, n, group, kind) in
        [(384, 33, 128, RKSC_ZERO_NONE), (896, 40, 32, RKSC_ZERO_INTEGER), (6400, 20, 64, RKSC_ZERO_FRACTIONAL)]
    {
        for dtype in DTYPES {
            let case = Case::new(16, k, n, group, kind, dtype);
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
fn linear_w4_refuses_what_it_cannot_do() {
    for_each_device("linear_w4 refuses", |dev| {
        let good = rksc_linear_w4_params {
            num_rows: 1,
            in_features: 128,
            out_features: 1,
            group_size: 128,
            dtype: 1,
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
            rksc_linear_w4_params { in_features: 8192, ..good }, // split over CTAs, and no workspace
        ] {
            assert_refused(dev.launch(dev.kernels().linear_w4, &bad));
        }
        dev.launch(dev.kernels().linear_w4, &rksc_linear_w4_params { num_rows: 0, ..good })?;
        Ok(Vec::new())
    });
}

//! `linear` on a device: values, and the law that a row's bits depend on that row alone.

use rksc::backend::cuda::bindings::rksc_linear_params;
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::testing::{fill, global_difference, linear_oracle, round_to};
use rksc::{DType, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed};

/// (rows, in, out): rows around the two tiles of 8; in around the chunks of 32 and units of 128 k, and past 6144, where k
/// is split over CTAs; out around the 16 of a CTA, and past 3072, where a CTA has 32.
const SHAPES: &[(usize, usize, usize)] = &[
    (0, 64, 16),
    (3, 64, 0),
    (1, 8, 1),
    (1, 16, 15),
    (2, 24, 16),
    (3, 32, 17),
    (4, 40, 31),
    (5, 64, 33),
    (7, 120, 16),
    (8, 128, 48),
    (8, 136, 20),
    (9, 128, 33),
    (12, 256, 16),
    (15, 264, 31),
    (16, 256, 32),
    (16, 384, 1),
    (1, 896, 64),
    (8, 896, 48),
    (16, 896, 20),
    (8, 3584, 16),
    (4, 4864, 24),
    (8, 4096, 40),
    (3, 6152, 18),
    (8, 6400, 33),
    (2, 14336, 16),
    (16, 12296, 34),
    (1, 18944, 20),
    (8, 64, 3072),
    (12, 72, 3100),
    (1, 16, 50_257),
    (2, 8, 152_064),
];

struct Case {
    rows: usize,
    k: usize,
    n: usize,
    dtype: DType,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn new(rows: usize, k: usize, n: usize, dtype: DType) -> Self {
        let x = round_to(&fill(rows as u64 + 1, rows * k), dtype);
        let w = round_to(&fill(k as u64 + 77, n * k), dtype);
        Self { rows, k, n, dtype, x, w, bias: fill(5, n) }
    }

    fn what(&self) -> String {
        format!("linear {} {}x{}x{}", self.dtype, self.rows, self.k, self.n)
    }

    fn workspace(&self, dev: &Device) -> Result<DeviceBuf<u8>> {
        dev.zeroed(dev.kernels().linear_workspace_bytes(self.rows, self.k, self.n))
    }

    /// Rows `[first, first + count)`.
    fn run(
        &self,
        dev: &mut Device,
        first: usize,
        count: usize,
        bias: bool,
        workspace: &mut DeviceBuf<u8>,
    ) -> Result<Vec<f32>> {
        let x = narrowed(dev, self.dtype, &self.x[first * self.k..(first + count) * self.k])?;
        let w = narrowed(dev, self.dtype, &self.w)?;
        let bias_buf = dev.buffer(&self.bias)?;
        let mut y = dev.alloc::<f32>(count * self.n)?;
        let params = rksc_linear_params {
            x: x.ptr().cast(),
            w: w.ptr().cast(),
            bias: if bias { bias_buf.ptr() } else { std::ptr::null() },
            y: y.ptr_mut(),
            workspace: workspace.ptr_mut().cast(),
            num_rows: count as u32,
            in_features: self.k as u32,
            out_features: self.n as u32,
            dtype: self.dtype as u32,
            y_stride: self.n as u32,
            ..Default::default()
        };
        dev.launch(dev.kernels().linear, &params)?;
        dev.to_vec(&y)
    }

    fn check(&self, got: &[f32], bias: bool) {
        let (want, size) = linear_oracle(&self.x, &self.w, bias.then_some(&self.bias), self.k, self.n);
        for (i, ((&g, &w), &size)) in got.iter().zip(&want).zip(&size).enumerate() {
            // A tensor core truncates where this rounds: allow each of its steps half a bit.
            let bound = 1e-5 * size + w.abs() * f64::from(f32::EPSILON);
            assert!(
                (f64::from(g) - w).abs() <= bound,
                "{}: index {i}: got {g}, want {w}, bound {bound:e}",
                self.what()
            );
        }
        assert_eq!(got.len(), want.len());
        let off = global_difference(got, &want);
        assert!(off < 1e-5, "{}: global difference {off:e}", self.what());
    }
}

#[test]
fn linear_matches_oracle_on_every_device() {
    for &(rows, k, n) in SHAPES {
        for dtype in DTYPES {
            let case = Case::new(rows, k, n, dtype);
            let bias = (rows + k + n) % 3 != 0;
            for_each_device(&case.what(), |dev| {
                let mut workspace = case.workspace(dev)?;
                let y = case.run(dev, 0, rows, bias, &mut workspace)?;
                case.check(&y, bias);
                Ok(bits(&y))
            });
        }
    }
}

#[test]
fn f32_rows_need_only_be_whole_vectors_of_four() {
    for (rows, k, n) in [(1, 4, 3), (5, 12, 18), (9, 132, 17), (16, 500, 5)] {
        let case = Case::new(rows, k, n, DType::F32);
        for_each_device(&case.what(), |dev| {
            let mut workspace = case.workspace(dev)?;
            let y = case.run(dev, 0, rows, true, &mut workspace)?;
            case.check(&y, true);
            Ok(bits(&y))
        });
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_how_many_rows_there_are() {
    for (k, n) in [(136, 33), (896, 40), (6400, 20), (64, 3090)] {
        for dtype in DTYPES {
            let case = Case::new(16, k, n, dtype);
            for_each_device(&case.what(), |dev| {
                let mut workspace = case.workspace(dev)?;
                let all = case.run(dev, 0, 16, true, &mut workspace)?;
                for (first, count) in [(0, 1), (5, 1), (15, 1), (0, 8), (8, 8), (3, 9), (1, 3)] {
                    let some = case.run(dev, first, count, true, &mut workspace)?;
                    assert_eq!(bits(&some), bits(&all[first * n..(first + count) * n]), "{first} {count}");
                }
                Ok(bits(&all))
            });
        }
    }
}

#[test]
fn one_workspace_serves_all_shapes_and_comes_back_with_its_counters_zero() {
    let cases = [(16, 12296, 34), (2, 6400, 300), (5, 18944, 7)].map(|(rows, k, n)| Case::new(rows, k, n, DType::Bf16));
    for_each_device("linear: one workspace", |dev| {
        let bytes = cases.iter().map(|c| dev.kernels().linear_workspace_bytes(c.rows, c.k, c.n)).max().unwrap_or(0);
        let mut shared = dev.zeroed::<u8>(bytes)?;
        let mut all = Vec::new();
        for case in cases.iter().chain(&cases) {
            let mut own = case.workspace(dev)?;
            let want = case.run(dev, 0, case.rows, true, &mut own)?;
            let got = case.run(dev, 0, case.rows, true, &mut shared)?;
            assert_eq!(bits(&got), bits(&want), "{}", case.what());
            let mut counters = vec![1u8; 4096 * 4];
            dev.download(&shared, 0, &mut counters)?;
            assert!(counters.iter().all(|&c| c == 0), "{}", case.what());
            all.extend(bits(&got));
        }
        Ok(all)
    });
}

#[test]
fn linear_refuses_what_it_cannot_do() {
    for_each_device("linear refuses", |dev| {
        let good = rksc_linear_params {
            num_rows: 1,
            in_features: 16,
            out_features: 1,
            dtype: 1,
            y_stride: 1,
            ..Default::default()
        };
        for bad in [
            rksc_linear_params { num_rows: 17, ..good },
            rksc_linear_params { in_features: 0, ..good },
            rksc_linear_params { in_features: 12, ..good },
            rksc_linear_params { in_features: 6, dtype: 0, ..good },
            rksc_linear_params { dtype: 3, ..good },
            rksc_linear_params { y_stride: 0, ..good },
            rksc_linear_params { side: 2, ..good },
            rksc_linear_params { in_features: 8192, ..good }, // split over CTAs, and no workspace
        ] {
            assert_refused(dev.launch(dev.kernels().linear, &bad));
        }
        dev.launch(dev.kernels().linear, &rksc_linear_params { out_features: 0, ..good })?;
        Ok(Vec::new())
    });
}

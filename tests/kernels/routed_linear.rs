//! `linear` with a river through the [`Backend`] trait: rows take one of two matrices, with the bits of the call without a
//! route, and only what was read is counted.

use std::ops::Range;

use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::quant::{CodeBits, MatrixPart, QuantTensor, ZeroKind};
use rksc::testing::linear_quantised::CodeFormat;
use rksc::testing::{fill, round_to, tensor};
use rksc::{DType, Error, Result};

use crate::device::bits;

/// Rows of the buffers; ops work on some of them.
const ROWS: usize = 40;
const IN: usize = 384;
const LAYER: u32 = 5;
const STAYS: f32 = f32::INFINITY;
const LEFT: f32 = 3.0;

/// Two matrices and rows to multiply.
struct Case {
    dtype: DType,
    backbone: Vec<MatrixPart>,
    river: Vec<MatrixPart>,
    x: Vec<f32>,
    bias: Vec<f32>,
}

/// What a call multiplies by.
enum Weights<'a> {
    Backbone,
    River,
    /// `[ROWS]`.
    Routed(&'a [f32]),
}

struct Outcome {
    y: Vec<f32>,
    counted: Counters,
}

fn codes(bits: CodeBits, group: usize, zeros: ZeroKind, out: usize) -> QuantTensor {
    CodeFormat { bits, group, zeros }.random(out, IN, out as u64)
}

fn dense(dtype: DType, out: usize) -> MatrixPart {
    tensor("w", dtype, &[out, IN], &fill(out as u64, out * IN)).into()
}

impl Case {
    /// A backbone of one dense matrix, and a river whose parts differ.
    fn new(dtype: DType) -> Self {
        let river = vec![
            codes(CodeBits::W4, 64, ZeroKind::Fractional, 33).into(),
            codes(CodeBits::W8, 128, ZeroKind::None, 17).into(),
            dense(dtype, 10),
            codes(CodeBits::W4, 64, ZeroKind::Fractional, 3).into(),
            codes(CodeBits::W4, 64, ZeroKind::Fractional, 4).into(),
        ];
        let x = round_to(&fill(8, ROWS * IN), dtype);
        Self { dtype, backbone: vec![dense(dtype, 67)], river, x, bias: fill(9, 67) }
    }

    /// y of all rows, NaN where nothing was written.
    fn run<B: Backend>(&self, b: &mut B, rows: Range<usize>, weights: Weights<'_>) -> Result<Outcome> {
        let (backbone, river) = (b.matrix(&self.backbone, self.dtype)?, b.matrix(&self.river, self.dtype)?);
        let mut x = b.alloc(self.dtype, self.x.len())?;
        b.write_bytes(&mut x, 0, self.x.len(), tensor("x", self.dtype, &[self.x.len()], &self.x).bytes())?;
        let bias = b.upload(&self.bias)?;
        let mut y = b.upload(&vec![f32::NAN; ROWS * self.bias.len()])?;
        let route = b.upload(if let Weights::Routed(route) = weights { route } else { &[] })?;
        let w = if let Weights::River = weights { &river } else { &backbone };
        let is_routed = matches!(weights, Weights::Routed(_));
        let river = is_routed.then_some(River { w: &river, route: &route, layer: LAYER });
        b.reset_counters();
        b.linear(Linear { rows, x: &x, w, river, bias: Some(&bias), y: &mut y })?;
        if let Weights::Routed(route_of_rows) = weights {
            let mut read = [0.0; ROWS];
            b.read_route(&route, &mut read)?;
            assert_eq!(bits(&read), bits(route_of_rows));
        }
        let counted = b.counters();
        let mut all = vec![0.0; ROWS * self.bias.len()];
        b.read_f32(&y, 0, &mut all)?;
        Ok(Outcome { y: all, counted })
    }

    fn check_routes<B: Backend>(&self, b: &mut B) {
        let n = self.bias.len();
        let what = format!("{} {}", b.describe(), self.dtype);
        let backbone = self.run(b, 0..ROWS, Weights::Backbone).unwrap();
        let river = self.run(b, 0..ROWS, Weights::River).unwrap();
        let patterns: [fn(usize) -> bool; 5] = [|_| false, |_| true, |t| t.is_multiple_of(3), |t| t == 2, |t| t > 9];
        for rows in [0..1, 2..3, 0..8, 1..18, 3..3, 0..ROWS] {
            for (i, leaves) in patterns.iter().enumerate() {
                let route: Vec<f32> = (0..ROWS).map(|t| if leaves(t) { LEFT } else { STAYS }).collect();
                let routed = self.run(b, rows.clone(), Weights::Routed(&route)).unwrap();
                for t in 0..ROWS {
                    let (at, place) = (t * n..(t + 1) * n, format!("{what}: row {t} of {rows:?}, pattern {i}"));
                    if !rows.contains(&t) {
                        assert!(routed.y[at].iter().all(|y| y.is_nan()), "{place} was touched");
                        continue;
                    }
                    let want = if leaves(t) { &river.y } else { &backbone.y };
                    assert_eq!(bits(&routed.y[at.clone()]), bits(&want[at]), "{place}");
                }
                let side = |left: bool, whole: &Outcome| {
                    if rows.clone().any(|t| leaves(t) == left) { whole.counted.weight_bytes } else { 0 }
                };
                let weight_bytes = if rows.is_empty() {
                    routed.counted.weight_bytes
                } else {
                    side(false, &backbone) + side(true, &river)
                };
                let counted = Counters { launches: 1, read_backs: 1, weight_bytes, ..Counters::default() };
                assert_eq!(routed.counted, counted, "{what}: rows {rows:?}, pattern {i}");
            }
        }
    }
}

#[test]
fn rows_take_the_weights_of_their_side_on_the_cpu() {
    for level in SimdLevel::available() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            Case::new(dtype).check_routes(&mut Cpu::new(2, level).unwrap());
        }
    }
}

#[test]
fn rows_take_the_weights_of_their_side_on_every_device() {
    for device in [Device::emulated(), Device::gpu(0)].into_iter().flatten() {
        let mut cuda = Cuda::new(device, Heads { num_q_heads: 1, num_kv_heads: 1, block_size: 16 });
        for dtype in [DType::Bf16, DType::F16] {
            Case::new(dtype).check_routes(&mut cuda);
        }
        let codes = Case::new(DType::F32).run(&mut cuda, 0..1, Weights::River).map(|_| ());
        assert!(matches!(codes, Err(Error::Unsupported { op: "matrix", .. })), "{codes:?}");
    }
}

#[test]
fn a_row_leaves_after_its_layer_and_not_at_it() {
    let case = Case::new(DType::Bf16);
    let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    let backbone = case.run(&mut cpu, 0..4, Weights::Backbone).unwrap();
    let river = case.run(&mut cpu, 0..4, Weights::River).unwrap();
    let mut route = [STAYS; ROWS];
    route[..4].copy_from_slice(&[LAYER as f32 - 1.0, LAYER as f32, f32::NAN, 0.0]);
    let routed = case.run(&mut cpu, 0..4, Weights::Routed(&route)).unwrap();
    let n = case.bias.len();
    for (t, want) in [&river, &backbone, &backbone, &river].into_iter().enumerate() {
        assert_eq!(bits(&routed.y[t * n..(t + 1) * n]), bits(&want.y[t * n..(t + 1) * n]), "row {t}");
    }
}

#[test]
fn a_river_of_another_shape_or_a_short_route_is_refused() {
    let mut case = Case::new(DType::Bf16);
    let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    let refused = |case: &Case, cpu: &mut Cpu, route: &[f32]| {
        let result = case.run(cpu, 0..4, Weights::Routed(route)).map(|_| ());
        assert!(matches!(result, Err(Error::Shape { op: "linear", .. })), "{result:?}");
    };
    refused(&case, &mut cpu, &[STAYS; 3]);
    case.river.pop();
    refused(&case, &mut cpu, &[STAYS; ROWS]);
}

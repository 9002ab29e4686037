//! Float64 oracles, fills and tolerances, shared by tests and benches.

use std::sync::Arc;

use half::{bf16, f16};

use crate::dtype::DType;
use crate::model::weights::{Tensor, TensorData};

/// `len` values in [-1, 1), the same for the same `seed` everywhere: SplitMix64 on the index.
pub fn fill(seed: u64, len: usize) -> Vec<f32> {
    let at = |i: u64| {
        let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add((i + 1).wrapping_mul(0xBF58_476D_1CE4_E5B9));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        ((z >> 40) as f32) / ((1u32 << 23) as f32) - 1.0
    };
    (0..len as u64).map(at).collect()
}

/// `values` rounded to `dtype` and widened again.
pub fn round_to(values: &[f32], dtype: DType) -> Vec<f32> {
    let round = |&v: &f32| match dtype {
        DType::F32 => v,
        DType::Bf16 => bf16::from_f32(v).to_f32(),
        DType::F16 => f16::from_f32(v).to_f32(),
    };
    values.iter().map(round).collect()
}

/// A tensor in memory that holds `values` rounded to `dtype`.
pub fn tensor(name: &str, dtype: DType, shape: &[usize], values: &[f32]) -> Tensor {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size_bytes() + 3);
    for &v in values {
        match dtype {
            DType::F32 => bytes.extend(v.to_le_bytes()),
            DType::Bf16 => bytes.extend(bf16::from_f32(v).to_le_bytes()),
            DType::F16 => bytes.extend(f16::from_f32(v).to_le_bytes()),
        }
    }
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let words: Arc<[u32]> = bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_ne_bytes(b)).collect();
    Tensor { name: name.into(), dtype, shape: shape.to_vec(), data: TensorData::Owned(words) }
}

/// y\[t, n\] = sum_k x\[t, k\] w\[n, k\] + bias\[n\] in f64, and sum_k |x w|, the scale of its rounding errors.
pub fn linear_oracle(
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    in_features: usize,
    out_features: usize,
) -> (Vec<f64>, Vec<f64>) {
    let rows = x.len().checked_div(in_features).unwrap_or(0);
    let (mut y, mut scale) = (Vec::with_capacity(rows * out_features), Vec::with_capacity(rows * out_features));
    for t in 0..rows {
        for n in 0..out_features {
            let (mut sum, mut size) = (0.0f64, 0.0f64);
            for (&a, &b) in x[t * in_features..][..in_features].iter().zip(&w[n * in_features..][..in_features]) {
                let product = f64::from(a) * f64::from(b);
                sum += product;
                size += product.abs();
            }
            let bias = bias.map_or(0.0, |bias| f64::from(bias[n]));
            y.push(sum + bias);
            scale.push(size + bias.abs());
        }
    }
    (y, scale)
}

/// 1 - 2 <a, b> / (<a, a> + <b, b>): 0 for equal arrays, insensitive to a few small elements.
pub fn global_difference(got: &[f32], expected: &[f64]) -> f64 {
    let (mut cross, mut squares) = (0.0, 0.0);
    for (&a, &b) in got.iter().zip(expected) {
        let a = f64::from(a);
        cross += a * b;
        squares += a * a + b * b;
    }
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * cross / squares }
}

/// Distance from 1 to the next number of the type.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::Bf16 => f64::from(bf16::EPSILON.to_f32()),
        DType::F16 => f64::from(f16::EPSILON.to_f32()),
    }
}

//! The ops in float64, one loop after the other, with the rounding points of `backend.rs`. Slow and plain: what every
//! backend is measured against.

use std::ops::Range;

use crate::backend::Activation;
use crate::dtype::DType;

/// Rounds to `dtype` the way a store does.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::Bf16 => f64::from(half::bf16::from_f32(x as f32).to_f32()),
        DType::F16 => f64::from(half::f16::from_f32(x as f32).to_f32()),
    }
}

/// Distance from 1 to the next number.
pub fn eps(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::Bf16 => 0.007_812_5,
        DType::F16 => 0.000_976_562_5,
    }
}

/// What attention makes of a query and a key, and which keys it looks at.
#[derive(Clone, Copy, Debug)]
pub struct Scoring {
    /// Multiplies q k.
    pub sm_scale: f64,
    /// Newest slots that a row attends to; `None`: all.
    pub window: Option<usize>,
    /// Bound of the scores; `None`: none.
    pub softcap: Option<f64>,
}

impl Scoring {
    /// Over all slots, without a cap.
    pub fn plain(sm_scale: f64) -> Self {
        Self { sm_scale, window: None, softcap: None }
    }

    /// The score of one key.
    pub fn score(&self, q: &[f64], k: &[f64]) -> f64 {
        let x = self.sm_scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
        self.softcap.map_or(x, |cap| cap * (x / cap).tanh())
    }

    /// What a row attends to that sees `num_slots`.
    pub fn slots(&self, num_slots: usize) -> Range<usize> {
        num_slots - self.window.unwrap_or(num_slots).min(num_slots)..num_slots
    }
}

/// One query against `k` and `v`, both `[n][dim]`, its own the last: the output rounded to `dtype`, and ln sum exp.
/// P is rounded, unnormalised, where the tile whose maximum it was scaled by is irrelevant: its relative error is.
pub fn attention(dtype: DType, q: &[f64], k: &[&[f64]], v: &[&[f64]], scoring: &Scoring) -> (Vec<f64>, f64) {
    let slots = scoring.slots(k.len());
    let (k, v) = (&k[slots.clone()], &v[slots]);
    let scores: Vec<f64> = k.iter().map(|k| scoring.score(q, k)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    let mut o = vec![0.0; q.len()];
    for (s, v) in scores.iter().zip(v) {
        let p = (s - max).exp();
        sum += p;
        let p = round(dtype, p);
        for (o, v) in o.iter_mut().zip(v.iter()) {
            *o += p * v;
        }
    }
    (o.into_iter().map(|x| round(dtype, x / sum)).collect(), max + sum.ln())
}

/// `x * rsqrt(mean(x^2) + eps) * weight`, unrounded.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inv = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inv * w).collect()
}

/// Cosine of two rows; 0 where one is zero.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// Half-split rotation of the first `2 * inv_freq.len()` elements of one head at `position`; the others pass. The angle is
/// an f32 product.
pub fn rope(x: &[f64], position: u32, inv_freq: &[f32], scale: f64) -> Vec<f64> {
    rotate(x, position as f32, inv_freq, scale)
}

/// The same for a head that stood at some position, `shift` positions on; one that does not move keeps every bit.
pub fn turn(x: &[f64], shift: i32, inv_freq: &[f32]) -> Vec<f64> {
    if shift == 0 { x.to_vec() } else { rotate(x, shift as f32, inv_freq, 1.0) }
}

fn rotate(x: &[f64], steps: f32, inv_freq: &[f32], scale: f64) -> Vec<f64> {
    let half = inv_freq.len();
    let mut y = x.to_vec();
    for (i, freq) in inv_freq.iter().enumerate() {
        let angle = f64::from(steps * freq);
        let (c, s) = (angle.cos() * scale, angle.sin() * scale);
        y[i] = x[i] * c - x[i + half] * s;
        y[i + half] = x[i + half] * c + x[i] * s;
    }
    y
}

/// `activation(g) * u`, unrounded.
pub fn glu(activation: Activation, g: f64, u: f64) -> f64 {
    match activation {
        Activation::Silu => g / (1.0 + (-g).exp()) * u,
        Activation::GeluTanh => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
            0.5 * g * (1.0 + z.tanh()) * u
        }
    }
}

/// `cap * tanh(x / cap)`.
pub fn softcap(cap: f64, x: f64) -> f64 {
    cap * (x / cap).tanh()
}

/// What [`row_stats`] returns.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Lowest id of the largest logit.
    pub argmax: usize,
    /// ln sum exp.
    pub lse: f64,
    /// In nats.
    pub entropy: f64,
    /// Probability of `argmax`.
    pub top1: f64,
    /// Largest minus second largest logit.
    pub margin: f64,
}

/// Statistics of a row of finite logits.
pub fn row_stats(x: &[f32]) -> Stats {
    let mut argmax = 0;
    for (i, &v) in x.iter().enumerate() {
        if v > x[argmax] {
            argmax = i;
        }
    }
    let max = f64::from(x[argmax]);
    let second = x
        .iter()
        .enumerate()
        .filter(|(i, _)| *i != argmax)
        .map(|(_, &v)| f64::from(v))
        .fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    let lse = max + sum.ln();
    let entropy = x
        .iter()
        .map(|&v| {
            let ln_p = f64::from(v) - lse;
            -ln_p.exp() * ln_p
        })
        .sum();
    Stats { argmax, lse, entropy, top1: 1.0 / sum, margin: max - second }
}

/// `1 - 2 <a, b> / (<a, a> + <b, b>)`: 0 where the two are the same, whatever their size.
pub fn global_difference(a: &[f64], b: &[f64]) -> f64 {
    let (mut ab, mut squares) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        ab += a * b;
        squares += a * a + b * b;
    }
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * ab / squares }
}

/// Fails with the op, the case, the index and both values where an element is off by more than
/// `atol + |want| * eps(dtype)`, or all of them together by more than the dtype's global bound.
pub fn assert_close(what: &str, dtype: DType, atol: f64, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let bound = atol + w.abs() * eps(dtype);
        assert!((g - w).abs() <= bound, "{what}: index {i}: got {g:e}, want {w:e}, off by more than {bound:e}");
    }
    let off = global_difference(got, want);
    let bound = if dtype == DType::F32 { 1e-5 } else { 1e-3 };
    assert!(off < bound, "{what}: global difference {off:e}");
}

//! The oracle of `entropy_probe`.

use super::oracle::{Stats, rms_norm, round};
use crate::dtype::DType;

/// What the probe says of one row.
#[derive(Clone, Debug)]
pub struct Probe {
    /// `argmax` is a position among the outputs.
    pub stats: Stats,
    /// One per output.
    pub logits: Vec<f64>,
}

/// One row `x` through the norm (if given), rounded once to `dtype`, against the rows of `w`, `[outputs, hidden]`.
pub fn entropy_probe(dtype: DType, x: &[f32], norm: Option<(&[f32], f32)>, w: &[f64]) -> Probe {
    let mut h: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    if let Some((weight, eps)) = norm {
        let weight: Vec<f64> = weight.iter().map(|&w| f64::from(w)).collect();
        h = rms_norm(&h, &weight, f64::from(eps));
    }
    for h in &mut h {
        *h = round(dtype, *h);
    }
    let logits: Vec<f64> = w.chunks(h.len()).map(|w| w.iter().zip(&h).map(|(w, h)| w * h).sum()).collect();
    Probe { stats: stats(&logits), logits }
}

/// Statistics of finite logits, without the cancellation in 1 + (a tiny rest).
fn stats(x: &[f64]) -> Stats {
    let mut argmax = 0;
    for (i, &v) in x.iter().enumerate() {
        if v > x[argmax] {
            argmax = i;
        }
    }
    let max = x[argmax];
    let others = || x.iter().enumerate().filter(move |&(i, _)| i != argmax).map(|(_, &v)| v);
    let second = others().fold(f64::NEG_INFINITY, f64::max);
    let rest: f64 = others().map(|v| (v - max).exp()).sum();
    let weighted: f64 = others().map(|v| (v - max) * (v - max).exp()).sum();
    let ln_z = rest.ln_1p();
    Stats {
        argmax,
        lse: max + ln_z,
        entropy: ln_z - weighted / (1.0 + rest),
        top1: 1.0 / (1.0 + rest),
        margin: if x.len() > 1 { max - second } else { 0.0 },
    }
}

//! From q k to the exponent of 2 that softmax works with.

use crate::backend::cpu::vector::{LOG2_E, Vector, tanh};

/// What is done to a product of a query and a key: `log2(e) * sm_scale * x`, or, capped,
/// `log2(e) * softcap * tanh(sm_scale * x / softcap)`.
#[derive(Clone, Copy)]
pub(crate) struct ScoreScale {
    /// Multiplies what [`cap`](Self::cap) left.
    pub(crate) factor: f32,
    /// What goes into tanh, for one of x.
    inner: Option<f32>,
}

impl ScoreScale {
    /// `sm_scale` and `softcap` as in [`crate::backend::PagedAttention`].
    pub(crate) fn new(sm_scale: f32, softcap: Option<f32>) -> Self {
        match softcap {
            Some(cap) => Self { factor: cap * LOG2_E, inner: Some(sm_scale / cap) },
            None => Self { factor: sm_scale * LOG2_E, inner: None },
        }
    }

    /// The part before the factor, in place, on whole vectors; without a cap nothing.
    #[inline(always)]
    pub(crate) fn cap<V: Vector>(&self, v: V, x: &mut [f32]) {
        if let Some(inner) = self.inner {
            let inner = v.splat(inner);
            for x in x.chunks_exact_mut(V::LANES) {
                v.store(tanh(v, v.mul(v.load(x), inner)), x);
            }
        }
    }
}

//! Bytes of weights that a decode step must read, by arithmetic: acceptance test RV13 for rows that go different ways.

use rksc::DType;
use rksc::model::family::ModelConfig;
use rksc::quant::QuantWeights;

/// Of every layer, as they are and in codes, and of the unembedding.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct LayerBytes {
    pub(super) dense: Vec<u64>,
    pub(super) codes: Vec<u64>,
    pub(super) head: u64,
}

/// Share by which the engine's count may differ.
const TOLERANCE: f64 = 0.01;

impl LayerBytes {
    /// Projections alone: norms, biases and the rows of the embedding are no part of either count.
    pub(super) fn new(model: &ModelConfig, dtype: DType, codes: &QuantWeights) -> Self {
        let mut bytes = Self { dense: vec![0; model.num_layers], codes: vec![0; model.num_layers], head: 0 };
        let head = if model.tie_word_embeddings { "embed_tokens" } else { "lm_head" };
        for (name, shape) in model.tensor_shapes() {
            let size = (dtype.size_bytes() * shape.iter().product::<usize>()) as u64;
            match layer_of(&name).filter(|_| name.ends_with("_proj.weight")) {
                Some(layer) => bytes.dense[layer] += size,
                None if name.contains(head) => bytes.head += size,
                None => {}
            }
        }
        for tensor in codes.iter() {
            if let Some(layer) = layer_of(&tensor.name) {
                bytes.codes[layer] += tensor.num_bytes();
            }
        }
        bytes
    }

    /// Of a step whose rows went through so many layers of the backbone each: a layer's set is read where a row takes it.
    pub(super) fn of_step(&self, depths: &[u32]) -> u64 {
        let takes = |layer: usize, dense: bool| depths.iter().any(|&d| (layer < d as usize) == dense);
        let layers = self.dense.iter().zip(&self.codes).enumerate().map(|(layer, (dense, codes))| {
            dense * u64::from(takes(layer, true)) + codes * u64::from(takes(layer, false))
        });
        layers.sum::<u64>() + self.head
    }

    /// Of the whole model in codes.
    pub(super) fn whole(&self) -> u64 {
        self.codes.iter().sum::<u64>() + self.head
    }
}

/// Refuses counts that are not what the layers say.
pub(super) fn check(arm: &str, counted: f64, by_formula: f64) -> anyhow::Result<()> {
    anyhow::ensure!(
        (counted / by_formula - 1.0).abs() <= TOLERANCE,
        "{arm}: the engine counted {counted:.0} bytes of weights a step, where the layers say {by_formula:.0}"
    );
    Ok(())
}

/// The number in `model.layers.3.mlp.down_proj.weight`.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_read_once_a_set_that_a_row_takes() {
        let bytes = LayerBytes { dense: vec![100, 100, 100], codes: vec![30, 30, 30], head: 7 };
        assert_eq!([[3], [0], [1]].map(|d| bytes.of_step(&d)), [307, 97, 167]);
        assert_eq!(bytes.of_step(&[1, 2]), 100 + 130 + 30 + 7);
        assert_eq!((bytes.of_step(&[2, 2]), bytes.whole()), (237, 97));
        assert_eq!(layer_of("model.layers.12.self_attn.q_proj.weight"), Some(12));
        assert_eq!(layer_of("model.norm.weight"), None);
    }

    #[test]
    fn counts_may_differ_by_a_hundredth() {
        assert!(check("a", 100.9, 100.0).is_ok() && check("a", 101.1, 100.0).is_err());
    }
}

//! What codes cost and lose, by kind of matrix.

use std::collections::BTreeMap;

use super::rows::rows_f32;
use super::weights::QuantWeights;
use crate::error::Result;
use crate::model::weights::WeightStore;

/// The matrices of one kind, over all layers.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct KindSummary {
    /// As in `down_proj`.
    pub kind: String,
    /// How many there are.
    pub num_matrices: usize,
    /// Bytes of codes, scales and zeros.
    pub num_bytes: u64,
    /// Bits that a weight takes, scales and zeros included.
    pub bits_per_weight: f64,
    /// Mean |W - Wr| over mean |W|.
    pub relative_error: f64,
}

/// Sums over the matrices of a kind.
#[derive(Default)]
struct Sums {
    matrices: usize,
    weights: usize,
    bytes: u64,
    lost: f64,
    size: f64,
}

impl QuantWeights {
    /// One row per kind of matrix, by name. Reads all weights of `store` that were quantised, one matrix at a time.
    pub fn summary(&self, store: &WeightStore) -> Result<Vec<KindSummary>> {
        let mut kinds: BTreeMap<&str, Sums> = BTreeMap::new();
        for tensor in self.iter() {
            let kind = tensor.name.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default();
            let weight = store.get(&tensor.name, &[tensor.out_features, tensor.in_features])?;
            let weight = rows_f32(&weight, 0..tensor.out_features);
            let sums = kinds.entry(kind).or_default();
            sums.matrices += 1;
            sums.weights += weight.len();
            sums.bytes += tensor.num_bytes();
            sums.size += weight.iter().map(|w| f64::from(w.abs())).sum::<f64>();
            sums.lost += weight.iter().zip(tensor.dequantise()).map(|(w, wr)| f64::from((w - wr).abs())).sum::<f64>();
        }
        let row = |(kind, sums): (&str, Sums)| KindSummary {
            kind: kind.to_owned(),
            num_matrices: sums.matrices,
            num_bytes: sums.bytes,
            bits_per_weight: 8.0 * sums.bytes as f64 / sums.weights.max(1) as f64,
            relative_error: if sums.size > 0.0 { sums.lost / sums.size } else { 0.0 },
        };
        Ok(kinds.into_iter().map(row).collect())
    }
}

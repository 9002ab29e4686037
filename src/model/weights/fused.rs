//! Checkpoints that hold q, k and v in one tensor, and gate and up in another (Phi-3): their parts, where they lie, under
//! the names that other checkpoints give them.

use std::ops::Range;
use std::sync::Arc;

use super::{Stored, Tensor, TensorData, WeightStore, safetensors};
use crate::error::Result;
use crate::model::family::ModelConfig;

impl WeightStore {
    /// Cuts what the model's family fuses, as [`open`](crate::model::open) does; a store without fused tensors stays as it
    /// is.
    pub fn split_fused(&mut self, model: &ModelConfig) -> Result<()> {
        if !model.family.fused {
            return Ok(());
        }
        let (q, kv) = (model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim);
        let (qkv, gate_up) =
            ([("q", q), ("k", kv), ("v", kv)], [("gate", model.intermediate), ("up", model.intermediate)]);
        for layer in 0..model.num_layers {
            for (of, fused, parts) in [("self_attn", "qkv", &qkv[..]), ("mlp", "gate_up", &gate_up[..])] {
                let name = |part: &str| format!("model.layers.{layer}.{of}.{part}_proj.weight");
                let rows = parts.iter().map(|(_, rows)| rows).sum();
                let whole = self.get(&name(fused), &[rows, model.hidden])?;
                let Some((file, _)) = self.tensors.remove(&whole.name) else { continue };
                let mut first = 0;
                for &(part, rows) in parts {
                    let tensor = whole.rows(first..first + rows, &name(part));
                    self.tensors.insert(Arc::clone(&tensor.name), (file, Stored::Ready(tensor)));
                    first += rows;
                }
            }
        }
        Ok(())
    }
}

impl Tensor {
    /// Some rows of a matrix as a tensor of their own, where they lie.
    fn rows(&self, rows: Range<usize>, name: &str) -> Self {
        let cols = self.shape.get(1).copied().unwrap_or(1);
        let bytes = rows.start * cols * self.dtype.size_bytes()..rows.end * cols * self.dtype.size_bytes();
        let in_place = bytes.start % 4 == 0;
        let data = match &self.data {
            TensorData::Mapped { map, range } if in_place => {
                TensorData::Mapped { map: Arc::clone(map), range: range.start + bytes.start..range.start + bytes.end }
            }
            TensorData::Static(all) if in_place => TensorData::Static(&all[bytes]),
            _ => TensorData::Owned(safetensors::aligned_copy(&self.bytes()[bytes])),
        };
        Self { name: name.into(), dtype: self.dtype, shape: vec![rows.len(), cols], data }
    }
}

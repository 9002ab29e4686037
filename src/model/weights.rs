//! Weights: tensors in their files.

use std::sync::Arc;

use crate::dtype::DType;

/// A tensor as it lies in its file (mapped) or in memory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: Arc<str>,
    /// Its element type.
    pub dtype: DType,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes are.
    pub data: TensorData,
}

/// Little-endian elements, at least 4-byte aligned.
#[derive(Clone, Debug)]
pub enum TensorData {
    /// In memory, as 32-bit words so that every element type is aligned.
    Owned(Arc<[u32]>),
}

impl Tensor {
    /// The elements, as bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            TensorData::Owned(words) => {
                let all: &[u8] = bytemuck::cast_slice(words);
                &all[..self.num_elems() * self.dtype.size_bytes()]
            }
        }
    }

    /// Product of the shape.
    pub fn num_elems(&self) -> usize {
        self.shape.iter().product()
    }
}

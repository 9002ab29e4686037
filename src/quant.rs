//! Weights in codes of 4 or 8 bits: what they look like, and how a dense matrix becomes one.
//!
//! ```text
//! w[n, k] = (code[n, k] - zero[n, k / group]) * scale[n, k / group]
//! ```
//!
//! Rows are groups of 32, 64 or 128 neighbours along k that share a scale and a zero, so that files of other quantisers
//! (GPTQ, AWQ) fit as they are.

use std::sync::Arc;

use half::f16;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::weights::{Tensor, TensorData};

mod cache;
mod factor;
mod file;
mod gptq;
mod hessian;
mod hqq;
mod options;
mod parallel;
mod rows;
mod rtn;
mod summary;
mod weights;

pub use cache::{Origin, QuantFile};
pub use hessian::{Hessians, LayerInput};
pub use options::{QuantOptions, Quantiser};
pub use summary::KindSummary;
pub use weights::QuantWeights;

/// Bits of one code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum CodeBits {
    /// 0 to 15.
    W4,
    /// 0 to 255.
    W8,
}

impl CodeBits {
    /// Codes in a 32-bit word.
    pub const fn per_word(self) -> usize {
        match self {
            Self::W4 => 8,
            Self::W8 => 4,
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        32 / self.per_word()
    }

    /// The largest code.
    pub const fn max_code(self) -> u32 {
        (1 << self.bits()) - 1
    }
}

/// What the groups of a matrix take for zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Zeros<'a> {
    /// The middle of the codes everywhere: 8 or 128.
    None,
    /// One code a group, `[out, in / group]`; at most 127.
    Integer(&'a [u8]),
    /// One number a group, `[out, in / group]`.
    Fractional(&'a [f16]),
}

/// Which of [`Zeros`] a matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum ZeroKind {
    /// [`Zeros::None`].
    None,
    /// [`Zeros::Integer`].
    Integer,
    /// [`Zeros::Fractional`].
    Fractional,
}

/// A matrix `[out, in]` in codes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct QuantTensor {
    /// Its name in the checkpoint.
    pub name: Arc<str>,
    /// Rows.
    pub out_features: usize,
    /// Columns, a multiple of `group`.
    pub in_features: usize,
    /// Neighbours along k that share a scale and a zero: 32, 64 or 128.
    pub group: usize,
    /// Width of a code.
    pub bits: CodeBits,
    /// What the groups take for zero.
    pub zero_kind: ZeroKind,
    /// `[out, in / codes per word]` u32, k ascending from the low bits.
    pub codes: TensorData,
    /// `[out, in / group]` f16.
    pub scales: TensorData,
    /// `[out, in / group]` u8 or f16, as `zero_kind` says; empty for none.
    pub zeros: TensorData,
}

/// Some rows of a weight matrix, as they are stored.
#[derive(Clone, Debug)]
pub enum MatrixPart {
    /// Every element in its own right.
    Dense(Tensor),
    /// In codes.
    Quantised(QuantTensor),
}

impl From<Tensor> for MatrixPart {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<QuantTensor> for MatrixPart {
    fn from(tensor: QuantTensor) -> Self {
        Self::Quantised(tensor)
    }
}

impl QuantTensor {
    /// Checks that the sizes fit each other.
    pub fn validate(&self) -> Result<()> {
        let refuse = |expected: String, got: String| {
            Err(Error::Shape { op: "matrix in codes", expected, got: format!("{got} in {}", self.name) })
        };
        if ![32, 64, 128].contains(&self.group) || !self.in_features.is_multiple_of(self.group) {
            return refuse(
                "groups of 32, 64 or 128 that divide a row".into(),
                format!("{} of {}", self.group, self.in_features),
            );
        }
        let groups = self.num_groups();
        let zero_bytes = match self.zero_kind {
            ZeroKind::None => 0,
            ZeroKind::Integer => groups,
            ZeroKind::Fractional => 2 * groups,
        };
        let code_bytes = self.out_features * self.in_features / self.bits.per_word() * 4;
        for (what, data, bytes) in [
            ("codes", &self.codes, code_bytes),
            ("scales", &self.scales, 2 * groups),
            ("zeros", &self.zeros, zero_bytes),
        ] {
            let data = data.bytes();
            // Where there is nothing, it may lie anywhere.
            let is_aligned = bytes == 0 || data.as_ptr().addr().is_multiple_of(align_of::<u32>());
            if data.len() < bytes || !is_aligned {
                let got = format!("{} at address {:?}", data.len(), data.as_ptr());
                return refuse(format!("{bytes} aligned bytes of {what}"), got);
            }
        }
        Ok(())
    }

    /// Groups of all rows.
    pub fn num_groups(&self) -> usize {
        self.out_features * (self.in_features / self.group)
    }

    /// `[out, in / codes per word]`.
    pub fn codes(&self) -> &[u32] {
        let len = self.out_features * self.in_features / self.bits.per_word();
        bytemuck::cast_slice(&self.codes.bytes()[..4 * len])
    }

    /// `[out, in / group]`.
    pub fn scales(&self) -> &[f16] {
        bytemuck::cast_slice(&self.scales.bytes()[..2 * self.num_groups()])
    }

    /// `[out, in / group]`.
    pub fn zeros(&self) -> Zeros<'_> {
        match self.zero_kind {
            ZeroKind::None => Zeros::None,
            ZeroKind::Integer => Zeros::Integer(&self.zeros.bytes()[..self.num_groups()]),
            ZeroKind::Fractional => {
                Zeros::Fractional(bytemuck::cast_slice(&self.zeros.bytes()[..2 * self.num_groups()]))
            }
        }
    }

    /// Bytes that one sweep over all rows reads.
    pub fn num_bytes(&self) -> u64 {
        let zeros = match self.zeros() {
            Zeros::None => 0,
            Zeros::Integer(z) => z.len(),
            Zeros::Fractional(z) => 2 * z.len(),
        };
        (4 * self.codes().len() + 2 * self.scales().len() + zeros) as u64
    }

    /// The matrix `[out, in]` that the codes stand for, in f32.
    pub fn dequantise(&self) -> Vec<f32> {
        let (per_word, bits) = (self.bits.per_word(), self.bits.bits());
        let (codes, scales, zeros) = (self.codes(), self.scales(), self.zeros());
        let element = |at: usize| {
            let code = codes[at / per_word] >> (bits * (at % per_word)) & self.bits.max_code();
            let group = at / self.group;
            let zero = match zeros {
                Zeros::None => (1 << (bits - 1)) as f32,
                Zeros::Integer(z) => f32::from(z[group]),
                Zeros::Fractional(z) => z[group].to_f32(),
            };
            (code as f32 - zero) * scales[group].to_f32()
        };
        (0..self.out_features * self.in_features).map(element).collect()
    }

    /// The same as a dense tensor of type `dtype`.
    pub fn to_dense(&self, dtype: DType) -> Tensor {
        let words = self.dequantise().iter().map(|x| x.to_bits()).collect();
        let shape = vec![self.out_features, self.in_features];
        Tensor { name: self.name.clone(), dtype: DType::F32, shape, data: TensorData::Owned(words) }.cast(dtype)
    }
}

//! Weights in codes of 4 or 8 bits: what they look like, how a dense matrix becomes one, and how checkpoints that are
//! stored in codes are read.
//!
//! ```text
//! w[n, k] = (code[n, k] - zero[n, k / group]) * scale[n, k / group]
//! ```
//!
//! Rows are groups of 32, 64 or 128 neighbours along k that share a scale and a zero, so that the codes of other
//! quantisers (GPTQ, AWQ, FP8) fit as they are; see [`CheckpointFormat`].

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::weights::{Tensor, TensorData};

mod cache;
mod checkpoint;
mod e4m3;
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
pub(crate) use checkpoint::check_dense;
pub use checkpoint::{CheckpointFormat, Survey};
pub use hessian::{Hessians, LayerInput};
pub use options::{QuantOptions, Quantiser};
pub use summary::KindSummary;
pub use weights::QuantWeights;

/// What one code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum CodeBits {
    /// A whole number from 0 to 15.
    W4,
    /// A whole number from 0 to 255.
    W8,
    /// A floating-point number of 8 bits: E4M3 without infinities (`e4m3fn`), at most 448. Its scales are f32.
    F8,
}

impl CodeBits {
    /// Codes in a 32-bit word.
    pub const fn per_word(self) -> usize {
        match self {
            Self::W4 => 8,
            Self::W8 | Self::F8 => 4,
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

    /// The number that a code is.
    pub fn number(self, code: u32) -> f32 {
        match self {
            Self::W4 | Self::W8 => code as f32,
            Self::F8 => e4m3::widen(code as u8),
        }
    }

    /// What a group without a zero of its own takes for zero: the middle of the codes, but for numbers with a sign.
    pub const fn middle(self) -> f32 {
        match self {
            Self::W4 => 8.0,
            Self::W8 => 128.0,
            Self::F8 => 0.0,
        }
    }

    /// Bytes of a scale: f16, or f32 for [`F8`](Self::F8).
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::W4 | Self::W8 => 2,
            Self::F8 => 4,
        }
    }
}

/// What the groups of a matrix are multiplied by, `[out, in / group]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales<'a> {
    /// Of whole numbers.
    F16(&'a [f16]),
    /// Of [`CodeBits::F8`].
    F32(&'a [f32]),
}

impl<'a> Scales<'a> {
    /// The scale of a group, counted over all rows.
    pub fn get(self, group: usize) -> f32 {
        match self {
            Self::F16(scales) => scales[group].to_f32(),
            Self::F32(scales) => scales[group],
        }
    }

    /// Those of some groups.
    pub fn groups(self, groups: Range<usize>) -> Self {
        match self {
            Self::F16(scales) => Self::F16(&scales[groups]),
            Self::F32(scales) => Self::F32(&scales[groups]),
        }
    }

    /// As they lie.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Self::F16(scales) => bytemuck::cast_slice(scales),
            Self::F32(scales) => bytemuck::cast_slice(scales),
        }
    }
}

/// What the groups of a matrix take for zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Zeros<'a> {
    /// [`CodeBits::middle`] everywhere.
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
    /// `[out, in / group]` f16, or f32 for [`CodeBits::F8`].
    pub scales: TensorData,
    /// `[out, in / group]` u8 or f16, as `zero_kind` says; empty for none.
    pub zeros: TensorData,
    /// Which column of the matrix each column of the codes is, where they stand in another order: GPTQ's `desc_act`
    /// brings the columns of a group together. Every column once.
    pub columns: Option<Arc<[u32]>>,
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
            ("scales", &self.scales, self.bits.scale_bytes() * groups),
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
        match &self.columns {
            Some(columns) if !is_permutation(columns, self.in_features) => {
                refuse(format!("each of {} columns once", self.in_features), "another order of columns".into())
            }
            _ => Ok(()),
        }
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
    pub fn scales(&self) -> Scales<'_> {
        let bytes = &self.scales.bytes()[..self.bits.scale_bytes() * self.num_groups()];
        match self.bits {
            CodeBits::W4 | CodeBits::W8 => Scales::F16(bytemuck::cast_slice(bytes)),
            CodeBits::F8 => Scales::F32(bytemuck::cast_slice(bytes)),
        }
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
        (4 * self.codes().len() + self.scales().bytes().len() + zeros) as u64
    }

    /// The matrix `[out, in]` that the codes stand for, in f32, its columns in their own order.
    pub fn dequantise(&self) -> Vec<f32> {
        let (per_word, bits) = (self.bits.per_word(), self.bits.bits());
        let (codes, scales, zeros) = (self.codes(), self.scales(), self.zeros());
        let element = |at: usize| {
            let code = codes[at / per_word] >> (bits * (at % per_word)) & self.bits.max_code();
            let group = at / self.group;
            let zero = match zeros {
                Zeros::None => self.bits.middle(),
                Zeros::Integer(z) => f32::from(z[group]),
                Zeros::Fractional(z) => z[group].to_f32(),
            };
            (self.bits.number(code) - zero) * scales.get(group)
        };
        let mut dense: Vec<f32> = (0..self.out_features * self.in_features).map(element).collect();
        if let Some(columns) = &self.columns {
            let mut own = vec![0.0; self.in_features];
            for row in dense.chunks_exact_mut(self.in_features) {
                own.copy_from_slice(row);
                columns.iter().zip(&own).for_each(|(&column, &w)| row[column as usize] = w);
            }
        }
        dense
    }

    /// The same as a dense tensor of type `dtype`.
    pub fn to_dense(&self, dtype: DType) -> Tensor {
        let words = self.dequantise().iter().map(|x| x.to_bits()).collect();
        let shape = vec![self.out_features, self.in_features];
        Tensor { name: self.name.clone(), dtype: DType::F32, shape, data: TensorData::Owned(words) }.cast(dtype)
    }
}

fn is_permutation(columns: &[u32], len: usize) -> bool {
    let mut seen = vec![false; len];
    let mut take = |&column: &u32| seen.get_mut(column as usize).is_some_and(|seen| !std::mem::replace(seen, true));
    columns.len() == len && columns.iter().all(&mut take)
}

/// The order of columns of the parts in codes, which is one for all of them: x is brought into it once.
pub(crate) fn columns_of(parts: &[MatrixPart]) -> Result<Option<&Arc<[u32]>>> {
    let mut codes = parts.iter().filter_map(|p| if let MatrixPart::Quantised(w) = p { Some(w) } else { None });
    let Some(first) = codes.next() else { return Ok(None) };
    match codes.find(|w| w.columns != first.columns) {
        None => Ok(first.columns.as_ref()),
        Some(odd) => {
            let what =
                format!("{} in another order of columns than {} (desc_act), in one matrix", odd.name, first.name);
            Err(Error::Unsupported { op: "matrix", what })
        }
    }
}

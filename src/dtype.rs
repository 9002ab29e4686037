//! Element types, and the one-time rounding to the compute type.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::{Error, Result};

/// How a number is stored. As a compute type it is what activations and the KV cache are rounded to;
/// sums, norms, softmax and the residual stream are f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum DType {
    /// IEEE single precision.
    F32 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half precision.
    F16 = 2,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Elements of this type, as f32.
    pub(crate) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes.as_chunks().0.iter().map(|&e| f32::from_le_bytes(e)).collect(),
            Self::Bf16 => bytes.as_chunks().0.iter().map(|&e| bf16::from_le_bytes(e).to_f32()).collect(),
            Self::F16 => bytes.as_chunks().0.iter().map(|&e| f16::from_le_bytes(e).to_f32()).collect(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for DType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            other => Err(Error::config("dtype", format!("{other:?} is unknown; use f32, bf16 or f16"))),
        }
    }
}

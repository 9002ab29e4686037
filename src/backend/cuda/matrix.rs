//! Weight matrices on the device: row-stacked parts, of which neighbours of one kind share their memory.

use super::device::{Device, DeviceBuf};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::weights::Tensor;
use crate::quant::{CodeBits, MatrixPart, QuantTensor, ZeroKind, Zeros, columns_of};

/// `[out, in]` on the device, in the compute type or in codes.
pub struct CudaMatrix {
    pub(super) parts: Vec<Part>,
    /// See [`QuantTensor::columns`]; of all parts in codes.
    pub(super) columns: Option<DeviceBuf<u32>>,
    pub(super) dtype: DType,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

/// Some rows of one kind.
pub(super) struct Part {
    /// Rows of the matrix before this part.
    pub(super) first_out: usize,
    pub(super) num_outs: usize,
    pub(super) memory: PartMemory,
}

pub(super) enum PartMemory {
    /// In the matrix's type.
    Dense(DeviceBuf<u8>),
    Codes(Codes),
}

/// Laid out as a [`QuantTensor`] is.
pub(super) struct Codes {
    pub(super) format: Format,
    pub(super) codes: DeviceBuf<u8>,
    pub(super) scales: DeviceBuf<u8>,
    pub(super) zeros: DeviceBuf<u8>,
}

/// What neighbours must have in common to be one part.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Format {
    pub(super) bits: CodeBits,
    pub(super) group: usize,
    pub(super) zeros: ZeroKind,
}

impl CudaMatrix {
    pub(super) fn new(device: &mut Device, parts: &[MatrixPart], dtype: DType) -> Result<Self> {
        let columns = columns_of(parts)?.map(|columns| device.buffer(columns)).transpose()?;
        let mut matrix = Self { parts: Vec::new(), columns, dtype, out_features: 0, in_features: 0 };
        for like in parts.chunk_by(|a, b| format_of(a) == format_of(b)) {
            for part in like {
                let width = width(part);
                if matrix.out_features > 0 && width != matrix.in_features {
                    let got = format!("a part of width {width}");
                    let expected = format!("parts of width {}", matrix.in_features);
                    return Err(Error::Shape { op: "matrix", expected, got });
                }
                matrix.in_features = width;
                matrix.out_features += height(part);
            }
            let num_outs = like.iter().map(height).sum();
            let memory = match format_of(&like[0]) {
                None => PartMemory::Dense(dense(device, like, dtype)?),
                Some(format) => PartMemory::Codes(codes(device, like, format, dtype)?),
            };
            matrix.parts.push(Part { first_out: matrix.out_features - num_outs, num_outs, memory });
        }
        Ok(matrix)
    }

    /// Its memory, for ops that take one dense matrix.
    pub(super) fn dense(&self, op: &'static str) -> Result<&DeviceBuf<u8>> {
        self.only_dense().ok_or_else(|| Error::Unsupported { op, what: "a matrix in codes on a CUDA device".into() })
    }

    /// Its memory, where all of it is dense.
    pub(super) fn only_dense(&self) -> Option<&DeviceBuf<u8>> {
        match self.parts.as_slice() {
            [Part { memory: PartMemory::Dense(memory), .. }] => Some(memory),
            _ => None,
        }
    }

    /// Bytes that one sweep over all rows reads.
    pub(super) fn num_bytes(&self) -> u64 {
        let bytes = |part: &Part| match &part.memory {
            PartMemory::Dense(memory) => memory.len(),
            PartMemory::Codes(Codes { codes, scales, zeros, .. }) => codes.len() + scales.len() + zeros.len(),
        };
        self.parts.iter().map(|part| bytes(part) as u64).sum()
    }
}

/// `None`: dense.
fn format_of(part: &MatrixPart) -> Option<Format> {
    match part {
        MatrixPart::Dense(_) => None,
        MatrixPart::Quantised(w) => Some(Format { bits: w.bits, group: w.group, zeros: w.zero_kind }),
    }
}

fn width(part: &MatrixPart) -> usize {
    match part {
        MatrixPart::Dense(tensor) => tensor.shape.last().copied().unwrap_or(0),
        MatrixPart::Quantised(w) => w.in_features,
    }
}

fn height(part: &MatrixPart) -> usize {
    match part {
        MatrixPart::Dense(tensor) => tensor.num_elems().checked_div(width(part)).unwrap_or(0),
        MatrixPart::Quantised(w) => w.out_features,
    }
}

/// Dense parts, one behind the other.
fn dense(device: &mut Device, parts: &[MatrixPart], dtype: DType) -> Result<DeviceBuf<u8>> {
    let tensors = || parts.iter().filter_map(|p| if let MatrixPart::Dense(tensor) = p { Some(tensor) } else { None });
    let mut memory = device.alloc(tensors().map(|t| t.num_elems() * dtype.size_bytes()).sum())?;
    let mut start = 0;
    for part in tensors().map(|tensor: &Tensor| tensor.cast(dtype)) {
        device.upload(&mut memory, start, part.bytes())?;
        start += part.bytes().len();
    }
    Ok(memory)
}

/// Parts of one format, one behind the other.
fn codes(device: &mut Device, parts: &[MatrixPart], format: Format, dtype: DType) -> Result<Codes> {
    let tensors = || parts.iter().filter_map(|p| if let MatrixPart::Quantised(w) = p { Some(w) } else { None });
    for w in tensors() {
        w.validate()?;
        let refuse = |what: String| Err(Error::Unsupported { op: "matrix", what });
        if dtype == DType::F32 {
            return refuse(format!("{} in codes with f32 activations on a CUDA device (bf16 or f16 will do)", w.name));
        }
        if w.bits != CodeBits::W4 && w.zero_kind != ZeroKind::None {
            return refuse(format!("codes of 8 bits with zeros in {}", w.name));
        }
    }
    let mut join = |bytes: fn(&QuantTensor) -> &[u8]| -> Result<DeviceBuf<u8>> {
        let mut memory = device.alloc(tensors().map(|w| bytes(w).len()).sum())?;
        let mut start = 0;
        for w in tensors() {
            device.upload(&mut memory, start, bytes(w))?;
            start += bytes(w).len();
        }
        Ok(memory)
    };
    Ok(Codes {
        format,
        codes: join(|w| bytemuck::cast_slice(w.codes()))?,
        scales: join(|w| w.scales().bytes())?,
        zeros: join(|w| match w.zeros() {
            Zeros::None => &[],
            Zeros::Integer(z) => z,
            Zeros::Fractional(z) => bytemuck::cast_slice(z),
        })?,
    })
}

//! Weight matrices as `linear` and `embed` read them: row-stacked parts, dense or in codes, each used where it lies.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::weights::{Tensor, TensorData};
use crate::quant::{CodeBits, MatrixPart, QuantTensor, ZeroKind, columns_of};

mod code_rows;

pub use code_rows::CodeRows;

/// One `[out, in]` matrix made of one or several row-stacked parts. A part whose element type the compute type cannot
/// use is converted once, here; all others, and all codes, stay where they are mapped.
pub struct CpuMatrix {
    parts: Vec<Part>,
    /// See [`QuantTensor::columns`]; of all parts in codes.
    columns: Option<Arc<[u32]>>,
    compute: DType,
    in_features: usize,
    out_features: usize,
    extra_bytes: u64,
}

struct Part {
    data: MatrixPart,
    /// Rows of the data that are left out before the first.
    skipped_rows: usize,
    /// Rows of the stacked matrix before this part.
    first_row: usize,
    num_rows: usize,
}

impl Part {
    /// Its rows `[from, to)`, counted from its first.
    fn rows(&self, from: usize, to: usize, in_features: usize) -> Result<Weights<'_>> {
        let rows = self.skipped_rows + from..self.skipped_rows + to;
        let at = rows.start * in_features..rows.end * in_features;
        Ok(match &self.data {
            MatrixPart::Quantised(w) => Weights::Codes(CodeRows::new(w).rows(rows)),
            MatrixPart::Dense(tensor) => match weights(tensor)? {
                Weights::F32(w) => Weights::F32(&w[at]),
                Weights::Bf16(w) => Weights::Bf16(&w[at]),
                Weights::F16(w) => Weights::F16(&w[at]),
                codes @ Weights::Codes(_) => codes,
            },
        })
    }

    /// Bytes that reading `num_rows` of its rows takes.
    fn num_bytes(&self, num_rows: usize, in_features: usize) -> u64 {
        match &self.data {
            MatrixPart::Dense(tensor) => (num_rows * in_features * tensor.dtype.size_bytes()) as u64,
            MatrixPart::Quantised(w) => CodeRows::new(w).rows(0..num_rows).num_bytes(),
        }
    }
}

/// Some rows, `[num_rows, in]`.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
    /// In codes.
    Codes(CodeRows<'a>),
}

/// Name, rows and columns of a part.
type Outline<'a> = (&'a str, usize, usize);

impl CpuMatrix {
    /// Stacks `parts` (each `[out_i, in]`) for use with activations of type `compute`.
    pub fn new<P: Clone + Into<MatrixPart>>(parts: &[P], compute: DType) -> Result<Self> {
        let parts: Vec<MatrixPart> = parts.iter().map(|part| part.clone().into()).collect();
        let mut matrix = Self { columns: columns_of(&parts)?.cloned(), ..Self::empty(compute) };
        for mut data in parts {
            let (name, num_rows, in_features) = outline(&data)?;
            if !matrix.parts.is_empty() && in_features != matrix.in_features {
                let expected = format!("[out, {}]", matrix.in_features);
                return Err(shape_error(expected, format!("{name} of [{num_rows}, {in_features}]")));
            }
            match &mut data {
                MatrixPart::Dense(tensor) => {
                    if compute != DType::F32 && compute != tensor.dtype {
                        *tensor = tensor.cast(compute);
                        matrix.extra_bytes += (tensor.num_elems() * compute.size_bytes()) as u64;
                    }
                    weights(tensor)?;
                }
                MatrixPart::Quantised(w) => check_codes(w)?,
            }
            matrix.parts.push(Part { data, skipped_rows: 0, first_row: matrix.out_features, num_rows });
            matrix.in_features = in_features;
            matrix.out_features += num_rows;
        }
        if matrix.parts.is_empty() {
            return Err(shape_error("at least one part".into(), "none".into()));
        }
        Ok(matrix)
    }

    fn empty(compute: DType) -> Self {
        Self { parts: Vec::new(), columns: None, compute, in_features: 0, out_features: 0, extra_bytes: 0 }
    }

    /// Rows `[rows.start, rows.end)` as a matrix of their own, where they lie.
    pub fn slice(&self, rows: Range<usize>) -> Self {
        let columns = self.columns.clone();
        let mut slice = Self { columns, in_features: self.in_features, ..Self::empty(self.compute) };
        for part in &self.parts {
            let end = part.first_row + part.num_rows;
            let (from, to) = (rows.start.clamp(part.first_row, end), rows.end.clamp(part.first_row, end));
            if from < to {
                let skipped_rows = part.skipped_rows + from - part.first_row;
                let (first_row, num_rows) = (slice.out_features, to - from);
                slice.parts.push(Part { data: part.data.clone(), skipped_rows, first_row, num_rows });
                slice.out_features += num_rows;
            }
        }
        slice
    }

    /// A copy of the rows `ids`, in that order, for use with the same activations: `linear` over it yields the bits that
    /// it yields for these rows of the whole. Dense parts only: codes would come out rounded.
    pub fn gather(&self, ids: &[u32]) -> Result<Self> {
        if self.has_codes() {
            return Err(Error::Unsupported { op: "matrix", what: "gathered rows of a matrix in codes".into() });
        }
        let n = self.in_features;
        let mut rows = vec![0.0; ids.len() * n];
        for (row, &id) in rows.chunks_mut(n.max(1)).zip(ids) {
            self.widen_row(id as usize, row)?;
        }
        let words = rows.iter().map(|x| x.to_bits()).collect();
        let shape = vec![ids.len(), n];
        let tensor = Tensor { name: "gathered rows".into(), dtype: DType::F32, shape, data: TensorData::Owned(words) };
        Self::new(&[tensor.cast(self.compute)], self.compute)
    }

    /// What activations it is used with.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// Columns: the width of an input row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Rows of all parts.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of converted copies.
    pub fn extra_bytes(&self) -> u64 {
        self.extra_bytes
    }

    /// Bytes that one sweep over all rows reads.
    pub fn num_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.num_bytes(p.num_rows, self.in_features)).sum()
    }

    /// Bytes that reading the rows `ids` takes.
    pub fn row_bytes(&self, ids: &[u32]) -> u64 {
        let part = |id: usize| self.parts.iter().find(|p| (p.first_row..p.first_row + p.num_rows).contains(&id));
        ids.iter().map(|&id| part(id as usize).map_or(0, |p| p.num_bytes(1, self.in_features))).sum()
    }

    /// Which column of x each column of the codes takes, where they stand in another order.
    pub fn columns(&self) -> Option<&[u32]> {
        self.columns.as_deref()
    }

    /// Whether any part is dense.
    pub fn has_dense(&self) -> bool {
        self.parts.iter().any(|p| matches!(p.data, MatrixPart::Dense(_)))
    }

    /// Whether any part is in codes.
    pub fn has_codes(&self) -> bool {
        self.parts.iter().any(|p| matches!(p.data, MatrixPart::Quantised(_)))
    }

    /// The parts: first row of each in the stacked matrix, number of rows, elements.
    pub fn parts(&self) -> impl Iterator<Item = Result<(usize, usize, Weights<'_>)>> {
        self.parts.iter().map(|p| Ok((p.first_row, p.num_rows, p.rows(0, p.num_rows, self.in_features)?)))
    }

    /// Writes row `row` to `dst` (`[in]`), widened to f32.
    pub fn widen_row(&self, row: usize, dst: &mut [f32]) -> Result<()> {
        let n = self.in_features;
        let part = self.parts.iter().find(|p| (p.first_row..p.first_row + p.num_rows).contains(&row));
        let (Some(part), true) = (part, dst.len() == n) else {
            let expected = format!("a row below {} and {n} elements", self.out_features);
            return Err(shape_error(expected, format!("row {row} and {} elements", dst.len())));
        };
        let at = row - part.first_row;
        match part.rows(at, at + 1, n)? {
            Weights::F32(w) => dst.copy_from_slice(w),
            Weights::Bf16(w) => dst.iter_mut().zip(w).for_each(|(d, s)| *d = s.to_f32()),
            Weights::F16(w) => dst.iter_mut().zip(w).for_each(|(d, s)| *d = s.to_f32()),
            Weights::Codes(w) => match &self.columns {
                None => w.widen(dst),
                Some(columns) => {
                    let mut as_codes = vec![0.0; n];
                    w.widen(&mut as_codes);
                    columns.iter().zip(as_codes).for_each(|(&column, w)| dst[column as usize] = w);
                }
            },
        }
        Ok(())
    }
}

fn outline(part: &MatrixPart) -> Result<Outline<'_>> {
    match part {
        MatrixPart::Dense(tensor) => match tensor.shape.as_slice() {
            &[num_rows, in_features] => Ok((&tensor.name, num_rows, in_features)),
            other => Err(shape_error("[out, in]".into(), format!("{} of {other:?}", tensor.name))),
        },
        MatrixPart::Quantised(w) => Ok((&w.name, w.out_features, w.in_features)),
    }
}

/// Codes whose sizes fit and whose format there are kernels for.
fn check_codes(w: &QuantTensor) -> Result<()> {
    w.validate()?;
    if w.bits != CodeBits::W4 && w.zero_kind != ZeroKind::None {
        let what = format!("codes of 8 bits with zeros in {}", w.name);
        return Err(Error::Unsupported { op: "matrix", what });
    }
    Ok(())
}

fn shape_error(expected: String, got: String) -> Error {
    Error::Shape { op: "matrix", expected, got }
}

/// The elements of `tensor`, typed; an error when there are too few or they are not aligned.
fn weights(tensor: &Tensor) -> Result<Weights<'_>> {
    let bytes = tensor.bytes();
    let len = tensor.num_elems();
    let misfit = |why: String| shape_error(format!("{len} aligned elements of {}", tensor.dtype), why);
    let cast_error = |e: bytemuck::PodCastError| misfit(format!("{}: {e}", tensor.name));
    let (typed, got) = match tensor.dtype {
        DType::F32 => {
            let w = bytemuck::try_cast_slice(bytes).map_err(cast_error)?;
            (Weights::F32(w), w.len())
        }
        DType::Bf16 => {
            let w = bytemuck::try_cast_slice(bytes).map_err(cast_error)?;
            (Weights::Bf16(w), w.len())
        }
        DType::F16 => {
            let w = bytemuck::try_cast_slice(bytes).map_err(cast_error)?;
            (Weights::F16(w), w.len())
        }
    };
    if got == len { Ok(typed) } else { Err(misfit(format!("{got} in {}", tensor.name))) }
}

//! E4M3 numbers: `weight` `[out, in]` is what the kernels read; `weight_scale` is one number, or `[out, 1]`, or, as
//! `weight_scale_inv` too, one number for each block `[out / rows, in / columns]`. All of them are multiplied by.

use ::safetensors::Dtype;

use super::pack::{FLOATS, Matrix, Stored};
use crate::error::Result;
use crate::model::weights::TensorData;
use crate::quant::parallel::{all_cores, for_each};
use crate::quant::{CodeBits, QuantTensor, ZeroKind, e4m3};

/// Bytes that a thread looks through at a time.
const CHUNK: usize = 1 << 20;

pub(super) fn read(matrix: &Matrix<'_>, block: Option<[usize; 2]>) -> Result<QuantTensor> {
    let (out, inside) = (matrix.out, matrix.inside);
    let group = matrix.group(block.map(|[_, columns]| columns))?;
    let codes = matrix.get("weight", &[Dtype::F8_E4M3], &[&[out, inside]])?;
    check_numbers(matrix, &codes)?;
    let what = if matrix.has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
    let row_groups = inside / group;
    let scales: Vec<u32> = match block {
        Some([rows, columns]) => {
            let row_blocks = inside.div_ceil(columns);
            let scales = floats(matrix, what, &[&[out.div_ceil(rows), row_blocks]])?;
            let of = |at: usize| scales[at / row_groups / rows * row_blocks + at % row_groups * group / columns];
            (0..out * row_groups).map(|at| of(at).to_bits()).collect()
        }
        None => {
            let scales = floats(matrix, what, &[&[], &[1], &[out, 1], &[out]])?;
            let of = |at: usize| scales[if scales.len() == 1 { 0 } else { at / row_groups }];
            (0..out * row_groups).map(|at| of(at).to_bits()).collect()
        }
    };
    Ok(QuantTensor {
        name: matrix.name.into(),
        out_features: out,
        in_features: inside,
        group,
        bits: CodeBits::F8,
        zero_kind: ZeroKind::None,
        codes: codes.data,
        scales: TensorData::Owned(scales.into()),
        zeros: TensorData::Static(&[]),
        columns: None,
    })
}

/// Scales, all of them numbers.
fn floats(matrix: &Matrix<'_>, what: &str, shapes: &[&[usize]]) -> Result<Vec<f32>> {
    let scales = matrix.get(what, &FLOATS, shapes)?.floats();
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(scales),
        Some(at) => Err(matrix.blame(what, format!("element {at} is NaN or infinite; the file is damaged"))),
    }
}

fn check_numbers(matrix: &Matrix<'_>, codes: &Stored) -> Result<()> {
    let first = std::sync::Mutex::new(None);
    for_each(all_cores(), codes.bytes().chunks(CHUNK).enumerate(), |(chunk, codes)| {
        let found = e4m3::first_nan(codes).map(|at| chunk * CHUNK + at);
        if let (Some(at), Ok(mut first)) = (found, first.lock()) {
            *first = Some(first.map_or(at, |before: usize| before.min(at)));
        }
    })?;
    match first.into_inner() {
        Ok(Some(at)) => {
            Err(matrix.blame("weight", format!("element {at} is NaN; the file is damaged, fetch it again")))
        }
        _ => Ok(()),
    }
}

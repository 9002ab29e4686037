//! compressed-tensors, `pack-quantized`: `weight_packed` `[out, in / 8]` is what the kernels read; `weight_scale`
//! `[out, groups]`; `weight_g_idx` `[in]` the group of each column, where activations gave them an order.

use ::safetensors::Dtype;

use super::pack::{FLOATS, Groups, Matrix, code, word};
use crate::error::Result;
use crate::quant::{CodeBits, QuantTensor};

const BITS: CodeBits = CodeBits::W4;

pub(super) fn read(matrix: &Matrix<'_>, file_group: Option<usize>) -> Result<QuantTensor> {
    let (out, inside) = (matrix.out, matrix.inside);
    matrix.group(file_group)?;
    let groups = matrix.num_file_groups(file_group);
    let packed = matrix.get("weight_packed", &[Dtype::I32], &[&[out, inside / 8]])?;
    let scales = matrix.get("weight_scale", &FLOATS, &[&[out, groups]])?;
    let scales = matrix.half_scales("weight_scale", &scales)?;
    let columns = match matrix.has("weight_g_idx") {
        false => None,
        true => {
            let g_idx = matrix.get("weight_g_idx", &[Dtype::I32], &[&[inside]])?;
            matrix.columns_of("weight_g_idx", g_idx.words(), file_group)?
        }
    };
    let codes = match &columns {
        None => packed.data,
        Some(columns) => {
            let words = packed.words();
            matrix.repack(BITS, |n, at| {
                word(BITS, |i| {
                    let k = columns[8 * at + i] as usize;
                    code(words[n * (inside / 8) + k / 8], BITS, k % 8)
                })
            })?
        }
    };
    let scale = |(n, j): (usize, usize)| scales[n * groups + j];
    matrix.of_groups(codes, Groups { bits: BITS, file_group, scale: &scale, zero: None, columns })
}

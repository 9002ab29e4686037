//! AWQ by `gemm`: `qweight` `[in, out / 8]` and `qzeros` `[groups, out / 8]` hold eight neighbours along out a word, even
//! ones first; `scales` `[groups, out]`.

use ::safetensors::Dtype;

use super::pack::{FLOATS, Groups, Matrix, code, word};
use crate::error::Result;
use crate::quant::{CodeBits, QuantTensor};

const BITS: CodeBits = CodeBits::W4;
/// Where in a word each of the eight is: nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7.
const PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

pub(super) fn read(matrix: &Matrix<'_>, file_group: Option<usize>) -> Result<QuantTensor> {
    let (out, inside) = (matrix.out, matrix.inside);
    matrix.group(file_group)?;
    let groups = matrix.num_file_groups(file_group);
    let row_words = out.div_ceil(8);
    let qweight = matrix.get("qweight", &[Dtype::I32], &[&[inside, row_words]])?;
    let qzeros = matrix.get("qzeros", &[Dtype::I32], &[&[groups, row_words]])?;
    let scales = matrix.get("scales", &FLOATS, &[&[groups, out]])?;
    let scales = matrix.half_scales("scales", &scales)?;
    let of = |words: &[u32], row: usize, n: usize| code(words[row * row_words + n / 8], BITS, PLACE[n % 8]);
    let words = qweight.words();
    let codes = matrix.repack(BITS, |n, at| word(BITS, |i| of(words, 8 * at + i, n)))?;
    let zero = |(n, j): (usize, usize)| of(qzeros.words(), j, n) as u8;
    let scale = |(n, j): (usize, usize)| scales[j * out + n];
    matrix.of_groups(codes, Groups { bits: BITS, file_group, scale: &scale, zero: Some(&zero), columns: None })
}

//! GPTQ: `qweight` `[in / 8, out]` holds eight neighbours along k a word, k ascending from the low bits (four in 8 bits);
//! `qzeros` `[groups, out / 8]` as many neighbours along out; `scales` `[groups, out]`; `g_idx` `[in]` the group of each
//! column.

use ::safetensors::Dtype;

use super::pack::{FLOATS, Groups, Matrix, code, word};
use crate::error::Result;
use crate::quant::{CodeBits, QuantTensor};

pub(super) fn read(
    matrix: &Matrix<'_>,
    bits: CodeBits,
    file_group: Option<usize>,
    zeros_less_one: bool,
) -> Result<QuantTensor> {
    let (out, inside, per_word) = (matrix.out, matrix.inside, bits.per_word());
    matrix.group(file_group)?;
    let groups = matrix.num_file_groups(file_group);
    let qweight = matrix.get("qweight", &[Dtype::I32], &[&[inside / per_word, out]])?;
    let qzeros = matrix.get("qzeros", &[Dtype::I32], &[&[groups, out.div_ceil(per_word)]])?;
    let scales = matrix.get("scales", &FLOATS, &[&[groups, out]])?;
    let scales = matrix.half_scales("scales", &scales)?;
    let columns = match matrix.has("g_idx") {
        false => None,
        true => {
            let g_idx = matrix.get("g_idx", &[Dtype::I32], &[&[inside]])?;
            matrix.columns_of("g_idx", g_idx.words(), file_group)?
        }
    };
    let words = qweight.words();
    let codes = match &columns {
        None => matrix.repack(bits, |n, at| words[at * out + n])?,
        Some(columns) => matrix.repack(bits, |n, at| {
            word(bits, |i| {
                let k = columns[at * per_word + i] as usize;
                code(words[k / per_word * out + n], bits, k % per_word)
            })
        })?,
    };
    let zeros = zeros(matrix, bits, qzeros.words(), zeros_less_one)?;
    let zero = |(n, j): (usize, usize)| zeros[j * out + n];
    let is_middle = zeros.iter().all(|&zero| f32::from(zero) == bits.middle());
    matrix.of_groups(
        codes,
        Groups {
            bits,
            file_group,
            scale: &|(n, j)| scales[j * out + n],
            zero: if is_middle { None } else { Some(&zero) },
            columns,
        },
    )
}

/// `[groups, out]`.
fn zeros(matrix: &Matrix<'_>, bits: CodeBits, words: &[u32], zeros_less_one: bool) -> Result<Vec<u8>> {
    let (out, per_word) = (matrix.out, bits.per_word());
    let row_words = out.div_ceil(per_word).max(1);
    let of_row = |row: &[u32]| -> Vec<u32> {
        (0..out).map(|n| code(row[n / per_word], bits, n % per_word) + u32::from(zeros_less_one)).collect()
    };
    let zeros: Vec<u32> = words.chunks_exact(row_words).flat_map(of_row).collect();
    let bad = zeros.iter().position(|&zero| match bits {
        CodeBits::W4 => zero > bits.max_code(),
        // The kernels for 8 bits know no zeros.
        _ => zero as f32 != bits.middle(),
    });
    match (bad, bits) {
        (None, _) => Ok(zeros.iter().map(|&zero| zero as u8).collect()),
        (Some(at), CodeBits::W4) => {
            let place = format!("zero {} of output {} in group {}", zeros[at], at % out, at / out);
            let why = format!(
                "{place} is above 15: it was stored as 0 less one, which readers take for 0 or for 16; \
                               save the checkpoint as gptq_v2"
            );
            Err(matrix.blame("qzeros", why))
        }
        (Some(at), _) => {
            let why = format!("zero {} of output {} is not read in 8 bits; quantise with sym", zeros[at], at % out);
            Err(matrix.blame("qzeros", why))
        }
    }
}

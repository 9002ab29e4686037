//! A matrix in codes while it is made: rows of weights in f32, and the place their groups go to.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::parallel::for_each;
use super::rtn::Grid;
use super::{CodeBits, QuantTensor, ZeroKind};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::weights::{Tensor, TensorData};

/// Rows that a thread takes at a time.
const CHUNK: usize = 32;

/// Where the groups of some rows go.
pub(super) struct GroupSink<'a> {
    pub(super) group: usize,
    pub(super) zero_kind: ZeroKind,
    bits: CodeBits,
    codes: &'a mut [u32],
    scales: &'a mut [f16],
    zeros: &'a mut [u8],
}

impl GroupSink<'_> {
    /// Stores group `index` of the rows.
    pub(super) fn put(&mut self, index: usize, grid: &Grid, codes: impl Iterator<Item = f32>) {
        self.scales[index] = grid.scale;
        match self.zero_kind {
            ZeroKind::None => {}
            ZeroKind::Integer => self.zeros[index] = grid.zero as u8,
            ZeroKind::Fractional => {
                self.zeros[2 * index..2 * index + 2].copy_from_slice(&f16::from_f32(grid.zero).to_le_bytes());
            }
        }
        let (bits, per_word) = (self.bits.bits(), self.bits.per_word());
        let words = self.group / per_word;
        let mut codes = codes.map(|code| code as u32);
        for word in &mut self.codes[index * words..(index + 1) * words] {
            *word = codes.by_ref().take(per_word).enumerate().fold(0, |word, (i, code)| word | code << (bits * i));
        }
    }
}

/// What a matrix is to become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) group: usize,
    pub(super) bits: CodeBits,
    pub(super) zero_kind: ZeroKind,
}

/// The matrix `weight` `[out, in]` in codes: `quantise` is given some rows in f32, to use up, and where they go. Rows
/// must not know of each other, so that any number of threads gives the same.
pub(super) fn quantise_rows(
    weight: &Tensor,
    form: Form,
    threads: usize,
    quantise: impl Fn(&mut [f32], &mut GroupSink<'_>) + Sync,
) -> Result<QuantTensor> {
    let (out_features, in_features) = (weight.shape[0], weight.shape[1]);
    let Form { group, bits, zero_kind } = form;
    let (row_words, row_groups) = (in_features / bits.per_word(), in_features / group);
    let zero_bytes = match zero_kind {
        ZeroKind::None => 0,
        ZeroKind::Integer => 1,
        ZeroKind::Fractional => 2,
    } * row_groups;
    let mut words = [4 * row_words, 2 * row_groups, zero_bytes].map(|bytes| zeroed(out_features * bytes));
    if let [Some(codes), Some(scales), Some(zeros)] = words.each_mut().map(Arc::get_mut) {
        let scales: &mut [f16] = &mut bytemuck::cast_slice_mut(scales)[..out_features * row_groups];
        let zeros: &mut [u8] = &mut bytemuck::cast_slice_mut(zeros)[..out_features * zero_bytes];
        let sinks = chunks_mut(codes, CHUNK * row_words)
            .zip(chunks_mut(scales, CHUNK * row_groups))
            .zip(chunks_mut(zeros, CHUNK * zero_bytes))
            .map(|((codes, scales), zeros)| GroupSink { group, zero_kind, bits, codes, scales, zeros });
        for_each(threads, sinks.enumerate(), |(i, mut sink)| {
            let mut rows = rows_f32(weight, i * CHUNK..((i + 1) * CHUNK).min(out_features));
            quantise(&mut rows, &mut sink);
        })?;
    }
    let [codes, scales, zeros] = words.map(TensorData::Owned);
    Ok(QuantTensor {
        name: Arc::clone(&weight.name),
        out_features,
        in_features,
        group,
        bits,
        zero_kind,
        codes,
        scales,
        zeros,
        columns: None,
    })
}

fn zeroed(bytes: usize) -> Arc<[u32]> {
    std::iter::repeat_n(0, bytes.div_ceil(4)).collect()
}

/// Chunks of `len`; without end and empty where `len` is 0.
fn chunks_mut<T>(all: &mut [T], len: usize) -> impl Iterator<Item = &mut [T]> {
    let endless = (len == 0).then(|| std::iter::repeat_with(|| &mut [][..]));
    all.chunks_mut(len.max(1)).chain(endless.into_iter().flatten())
}

/// Some rows of a matrix.
pub(super) fn rows_f32(weight: &Tensor, rows: Range<usize>) -> Vec<f32> {
    let row_bytes = weight.shape[1] * weight.dtype.size_bytes();
    let bytes = &weight.bytes()[rows.start * row_bytes..rows.end * row_bytes];
    match weight.dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|&e| f32::from_le_bytes(e)).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|&e| bf16::from_le_bytes(e).to_f32()).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|&e| f16::from_le_bytes(e).to_f32()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::rtn;

    fn matrix(rows: usize, cols: usize) -> Tensor {
        let words = crate::testing::fill::Fill::new(5).normals(rows * cols, 0.05).into_iter().map(f32::to_bits);
        let data = TensorData::Owned(words.collect());
        Tensor { name: "w".into(), dtype: DType::F32, shape: vec![rows, cols], data }
    }

    #[test]
    fn codes_come_back_as_they_were_put() {
        let weight = matrix(70, 128);
        for (bits, zero_kind) in [(CodeBits::W4, ZeroKind::Integer), (CodeBits::W8, ZeroKind::None)] {
            let form = Form { group: 32, bits, zero_kind };
            let of = |threads| quantise_rows(&weight, form, threads, |rows, sink| rtn::quantise(rows, sink)).unwrap();
            let (one, three) = (of(1), of(3));
            one.validate().unwrap();
            assert_eq!((one.codes(), one.scales()), (three.codes(), three.scales()));
            assert_eq!(one.zeros(), three.zeros());
            for (at, (w, back)) in rows_f32(&weight, 0..70).iter().zip(one.dequantise()).enumerate() {
                let step = one.scales().get(at / 32);
                assert!((w - back).abs() <= 0.51 * step, "{w} became {back}, steps of {step}");
            }
        }
    }
}

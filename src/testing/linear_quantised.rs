//! Weights in codes and the oracle of `linear` over them.

use super::fill::Fill;
use crate::model::weights::TensorData;
use crate::quant::{CodeBits, QuantTensor, ZeroKind, Zeros};

/// What weights in codes look like.
#[derive(Clone, Copy, Debug)]
pub struct CodeFormat {
    /// Width of a code.
    pub bits: CodeBits,
    /// Neighbours along k that share a scale and a zero.
    pub group: usize,
    /// What the groups take for zero.
    pub zeros: ZeroKind,
}

impl CodeFormat {
    /// Every format there are kernels for.
    pub fn all() -> Vec<Self> {
        let zeros = |bits| match bits {
            CodeBits::W4 => vec![ZeroKind::None, ZeroKind::Integer, ZeroKind::Fractional],
            CodeBits::W8 | CodeBits::F8 => vec![ZeroKind::None],
        };
        let of_group = |bits, group| zeros(bits).into_iter().map(move |zeros| Self { bits, group, zeros });
        let of_bits = |bits| [32, 64, 128].into_iter().flat_map(move |group| of_group(bits, group));
        [CodeBits::W4, CodeBits::W8, CodeBits::F8].into_iter().flat_map(of_bits).collect()
    }

    /// Random codes, scales and zeros for weights of about 0.1, `[out, in]`.
    pub fn random(self, out_features: usize, in_features: usize, seed: u64) -> QuantTensor {
        let Self { bits, group, zeros: zero_kind } = self;
        let mut fill = Fill::new(seed);
        let groups = out_features * (in_features / group);
        let middle = bits.middle();
        let scales = match bits {
            CodeBits::W4 | CodeBits::W8 => halves(groups, |_| 0.1 / middle * (1.5 + fill.unit())),
            // Random bits make most E4M3 numbers small.
            CodeBits::F8 => (0..groups).map(|_| (0.01 * (1.5 + fill.unit())).to_bits()).collect(),
        };
        let zeros = match zero_kind {
            ZeroKind::None => Vec::new(),
            ZeroKind::Integer => words((0..groups).map(|_| fill.below(16) as u8).collect()),
            ZeroKind::Fractional => halves(groups, |_| middle - 0.5 + 1.1 * middle * fill.unit()),
        };
        let codes = (0..out_features * in_features / bits.per_word()).map(|_| without_nan(fill.next_u64() as u32));
        QuantTensor {
            name: "random codes".into(),
            out_features,
            in_features,
            group,
            bits,
            zero_kind,
            codes: TensorData::Owned(codes.collect()),
            scales: TensorData::Owned(scales.into()),
            zeros: TensorData::Owned(zeros.into()),
            columns: None,
        }
    }
}

/// The word with each byte that is no E4M3 number made one.
pub fn without_nan(word: u32) -> u32 {
    u32::from_le_bytes(word.to_le_bytes().map(|byte| if byte & 0x7f == 0x7f { byte ^ 1 } else { byte }))
}

/// `w` with other zeros, one a group: whole numbers from 0 to 127, or fractions.
pub fn with_zeros(w: &QuantTensor, zero_kind: ZeroKind, zeros: &[f32]) -> QuantTensor {
    let zeros = match zero_kind {
        ZeroKind::None => Vec::new(),
        ZeroKind::Integer => words(zeros.iter().map(|&z| z as u8).collect()),
        ZeroKind::Fractional => halves(zeros.len(), |i| zeros[i]),
    };
    QuantTensor { zero_kind, zeros: TensorData::Owned(zeros.into()), ..w.clone() }
}

/// Some rows of `w`, with other codes.
pub fn rows_with_codes(w: &QuantTensor, rows: &[usize], codes: Vec<u32>) -> QuantTensor {
    let groups = w.in_features / w.group;
    let of_rows = |data: &TensorData, bytes: usize| {
        let bytes = rows.iter().flat_map(|&row| &data.bytes()[row * groups * bytes..(row + 1) * groups * bytes]);
        TensorData::Owned(words(bytes.copied().collect()).into())
    };
    let zero_bytes = match w.zero_kind {
        ZeroKind::None => 0,
        ZeroKind::Integer => 1,
        ZeroKind::Fractional => 2,
    };
    QuantTensor {
        out_features: rows.len(),
        codes: TensorData::Owned(codes.into()),
        scales: of_rows(&w.scales, w.bits.scale_bytes()),
        zeros: of_rows(&w.zeros, zero_bytes),
        ..w.clone()
    }
}

/// y\[t, n\] in f64, and the scale of its rounding errors: sum_k |x| (|code - zero| + 1) scale. The one is for fractional
/// zeros, whose fraction may be rounded before it is subtracted.
pub fn quantised_oracle(w: &QuantTensor, x: &[f32], bias: Option<&[f32]>) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut size) = (Vec::new(), Vec::new());
    for x in x.chunks(w.in_features) {
        for n in 0..w.out_features {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[n]));
            let (mut sum, mut sizes) = (bias, bias.abs());
            for k in 0..w.in_features {
                let x = f64::from(x[w.columns.as_ref().map_or(k, |columns| columns[k] as usize)]);
                let (code, scale) = weight(w, n, k);
                sum += x * code * scale;
                sizes += x.abs() * (code.abs() + 1.0) * scale.abs();
            }
            y.push(sum);
            size.push(sizes);
        }
    }
    (y, size)
}

/// `code - zero` of row n and column k of the codes, and its scale.
fn weight(w: &QuantTensor, n: usize, k: usize) -> (f64, f64) {
    let (per_word, bits) = (w.bits.per_word(), w.bits.bits());
    let at = n * w.in_features + k;
    let code = w.codes()[at / per_word] >> (bits * (at % per_word)) & w.bits.max_code();
    let group = at / w.group;
    let zero = match w.zeros() {
        Zeros::None => f64::from(w.bits.middle()),
        Zeros::Integer(zeros) => f64::from(zeros[group]),
        Zeros::Fractional(zeros) => zeros[group].to_f64(),
    };
    (f64::from(w.bits.number(code)) - zero, f64::from(w.scales().get(group)))
}

fn halves(len: usize, mut value: impl FnMut(usize) -> f32) -> Vec<u32> {
    words((0..len).flat_map(|i| half::f16::from_f32(value(i)).to_ne_bytes()).collect())
}

fn words(mut bytes: Vec<u8>) -> Vec<u32> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_ne_bytes(b)).collect()
}

//! Rows of a matrix in codes, where they lie.

use std::ops::Range;

use crate::quant::{CodeBits, QuantTensor, Scales, Zeros};

/// Rows `[num_rows, in]` of a [`QuantTensor`] that has been validated.
#[derive(Clone, Copy, Debug)]
pub struct CodeRows<'a> {
    /// `[num_rows, in / codes per word]`, k ascending from the low bits.
    pub codes: &'a [u32],
    /// `[num_rows, in / group]`.
    pub scales: Scales<'a>,
    /// `[num_rows, in / group]`.
    pub zeros: Zeros<'a>,
    /// Width of a code.
    pub bits: CodeBits,
    /// Neighbours along k that share a scale and a zero.
    pub group: usize,
    /// Columns.
    pub in_features: usize,
}

impl<'a> CodeRows<'a> {
    /// All rows of `w`.
    pub(super) fn new(w: &'a QuantTensor) -> Self {
        Self {
            codes: w.codes(),
            scales: w.scales(),
            zeros: w.zeros(),
            bits: w.bits,
            group: w.group,
            in_features: w.in_features,
        }
    }

    /// Some of the rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let of_width = |width: usize| rows.start * width..rows.end * width;
        let groups = of_width(self.num_groups());
        Self {
            codes: &self.codes[of_width(self.num_words())],
            scales: self.scales.groups(groups.clone()),
            zeros: match self.zeros {
                Zeros::None => Zeros::None,
                Zeros::Integer(z) => Zeros::Integer(&z[groups]),
                Zeros::Fractional(z) => Zeros::Fractional(&z[groups]),
            },
            ..*self
        }
    }

    /// Words of codes in a row.
    pub fn num_words(&self) -> usize {
        self.in_features / self.bits.per_word()
    }

    /// Groups of a row.
    pub fn num_groups(&self) -> usize {
        self.in_features / self.group
    }

    /// Bytes that one sweep over the rows reads.
    pub fn num_bytes(&self) -> u64 {
        let zeros = match self.zeros {
            Zeros::None => 0,
            Zeros::Integer(z) => size_of_val(z),
            Zeros::Fractional(z) => size_of_val(z),
        };
        (size_of_val(self.codes) + self.scales.bytes().len() + zeros) as u64
    }

    /// Writes the codes of group `group`, counted over all rows, less what the group takes for zero.
    pub fn unscaled(&self, group: usize, dst: &mut [f32]) {
        let (per_word, bits, max) = (self.bits.per_word(), self.bits.bits(), self.bits.max_code());
        let zero = match self.zeros {
            Zeros::None => self.bits.middle(),
            Zeros::Integer(z) => f32::from(z[group]),
            Zeros::Fractional(z) => z[group].to_f32(),
        };
        let words = self.group / per_word;
        for (dst, &word) in dst.chunks_exact_mut(per_word).zip(&self.codes[group * words..(group + 1) * words]) {
            for (i, dst) in dst.iter_mut().enumerate() {
                *dst = self.bits.number(word >> (bits * i) & max) - zero;
            }
        }
    }

    /// Writes the first row's weights, as the codes stand.
    pub fn widen(&self, dst: &mut [f32]) {
        for (group, dst) in dst.chunks_exact_mut(self.group).enumerate() {
            self.unscaled(group, dst);
            let scale = self.scales.get(group);
            dst.iter_mut().for_each(|w| *w *= scale);
        }
    }
}

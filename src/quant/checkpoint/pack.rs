//! What the formats share: tensors by name, type and shape; words of codes moved to where the kernels want them; scales and
//! zeros spread over the kernels' groups.

use std::sync::Arc;

use ::safetensors::Dtype;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::model::weights::safetensors::aligned_copy;
use crate::model::weights::{TensorData, WeightStore};
use crate::quant::parallel::{all_cores, for_each};
use crate::quant::{CodeBits, QuantTensor, ZeroKind};

/// Rows that a thread repacks at a time: neighbours in the rows of the other layout.
const CHUNK: usize = 32;
/// Types of scales.
pub(super) const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// A projection that is looked for.
pub(super) struct Matrix<'a> {
    pub(super) store: &'a WeightStore,
    /// As in `model.layers.0.mlp.down_proj.weight`.
    pub(super) name: &'a str,
    /// Without `.weight`.
    pub(super) base: &'a str,
    pub(super) out: usize,
    pub(super) inside: usize,
}

/// A tensor of the file, its type and shape checked, aligned for both.
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    /// Up to three bytes more than it has.
    pub(super) data: TensorData,
    num_bytes: usize,
}

impl Stored {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.data.bytes()[..self.num_bytes]
    }

    /// Of a type of 32 bits.
    pub(super) fn words(&self) -> &[u32] {
        bytemuck::cast_slice(self.bytes())
    }

    /// Of a type that [`FLOATS`] has.
    pub(super) fn floats(&self) -> Vec<f32> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|&e| bf16::from_le_bytes(e).to_f32()).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|&e| f16::from_le_bytes(e).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&e| f32::from_le_bytes(e)).collect(),
        }
    }
}

impl Matrix<'_> {
    /// Whether `.weight` is there in codes of 8 bits, of whatever kind.
    pub(super) fn is_in_bytes(&self) -> bool {
        self.store.packed(self.name).is_some_and(|found| found.dtype.bitsize() == 8)
    }

    pub(super) fn has(&self, what: &str) -> bool {
        self.store.contains(&self.tensor(what))
    }

    /// An error about the tensor `<base>.<what>`.
    pub(super) fn blame(&self, what: &str, why: impl Into<String>) -> Error {
        self.store.blame(&self.tensor(what), why.into())
    }

    /// `<base>.<what>`, which must be of one of these types and shapes.
    pub(super) fn get(&self, what: &str, dtypes: &[Dtype], shapes: &[&[usize]]) -> Result<Stored> {
        let expected = || {
            let dtypes: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
            let shapes: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            format!("{} {}", dtypes.join(" or "), shapes.join(" or "))
        };
        let Some(found) = self.store.packed(&self.tensor(what)) else {
            return Err(self.blame(what, format!("missing (expected {})", expected())));
        };
        if !dtypes.contains(&found.dtype) || !shapes.contains(&&found.shape[..]) {
            let why = format!("expected {}, found {} {:?}", expected(), found.dtype, found.shape);
            return Err(self.blame(what, why));
        }
        let bytes = found.data.bytes();
        let is_aligned = bytes.is_empty() || bytes.as_ptr().addr().is_multiple_of(align_of::<u32>());
        let data = if is_aligned { found.data } else { TensorData::Owned(aligned_copy(bytes)) };
        let num_bytes = found.shape.iter().product::<usize>() * found.dtype.bitsize() / 8;
        Ok(Stored { dtype: found.dtype, data, num_bytes })
    }

    fn tensor(&self, what: &str) -> String {
        format!("{}.{what}", self.base)
    }

    /// The kernels' groups for groups of `file_group` (`None`: of a row).
    pub(super) fn group(&self, file_group: Option<usize>) -> Result<usize> {
        group_of(file_group, self.inside).ok_or_else(|| {
            let whole = file_group.map_or("its row".to_owned(), |group| format!("a group of {group}"));
            let why = format!("no 32, 64 or 128 columns divide both {whole} and its {} columns", self.inside);
            self.store.blame(self.name, why)
        })
    }

    /// Groups of a row in the file.
    pub(super) fn num_file_groups(&self, file_group: Option<usize>) -> usize {
        file_group.map_or(1, |group| self.inside.div_ceil(group))
    }

    /// Words of codes `[out, in / codes per word]`, of which `word` knows each.
    pub(super) fn repack(&self, bits: CodeBits, word: impl Fn(usize, usize) -> u32 + Sync) -> Result<TensorData> {
        let row_words = self.inside / bits.per_word();
        let mut words: Arc<[u32]> = std::iter::repeat_n(0, self.out * row_words).collect();
        if let Some(words) = Arc::get_mut(&mut words) {
            for_each(all_cores(), words.chunks_mut(CHUNK * row_words.max(1)).enumerate(), |(chunk, rows)| {
                for at in 0..row_words {
                    for (n, row) in rows.chunks_exact_mut(row_words).enumerate() {
                        row[at] = word(chunk * CHUNK + n, at);
                    }
                }
            })?;
        }
        Ok(TensorData::Owned(words))
    }

    /// The tensor of these codes; `scale` and `zero` know those of row n and group j of the file.
    pub(super) fn of_groups(&self, codes: TensorData, groups: Groups<'_>) -> Result<QuantTensor> {
        let Groups { bits, file_group, scale, zero, columns } = groups;
        let group = self.group(file_group)?;
        let row_groups = self.inside / group;
        let in_file = |at: usize| (at / row_groups, file_group.map_or(0, |of_file| at % row_groups * group / of_file));
        let all = 0..self.out * row_groups;
        let scales = all.clone().map(|at| scale(in_file(at)).to_le_bytes()).collect::<Vec<_>>();
        let zeros: Option<Vec<u8>> = zero.map(|zero| all.map(|at| zero(in_file(at))).collect());
        let owned = |bytes: &[u8]| TensorData::Owned(aligned_copy(bytes));
        Ok(QuantTensor {
            name: self.name.into(),
            out_features: self.out,
            in_features: self.inside,
            group,
            bits,
            zero_kind: if zeros.is_some() { ZeroKind::Integer } else { ZeroKind::None },
            codes,
            scales: owned(scales.as_flattened()),
            zeros: owned(zeros.as_deref().unwrap_or_default()),
            columns,
        })
    }

    /// Scales in f16, as whole numbers have them: exact, or refused.
    pub(super) fn half_scales(&self, what: &str, scales: &Stored) -> Result<Vec<f16>> {
        let to_half = |(at, scale): (usize, f32)| {
            let half = f16::from_f32(scale);
            if !scale.is_finite() {
                return Err(self.blame(what, format!("element {at} is NaN or infinite; the file is damaged")));
            }
            if half.to_f32() != scale {
                return Err(self.blame(what, format!("element {at} is {scale:e}, which f16 does not hold")));
            }
            Ok(half)
        };
        scales.floats().into_iter().enumerate().map(to_half).collect()
    }

    /// Which column of the matrix each column of the codes is, by the group of each column; `None`: their own order.
    pub(super) fn columns_of(
        &self,
        what: &str,
        group_of: &[u32],
        file_group: Option<usize>,
    ) -> Result<Option<Arc<[u32]>>> {
        let of_place = |place: usize| file_group.map_or(0, |group| place / group) as u32;
        let last = of_place(self.inside.saturating_sub(1));
        if let Some(at) = group_of.iter().position(|&group| group > last) {
            let why = format!("element {at} is {}, and the last group is {last}", group_of[at] as i32);
            return Err(self.blame(what, why));
        }
        if group_of.iter().enumerate().all(|(place, &group)| group == of_place(place)) {
            return Ok(None);
        }
        let mut columns: Vec<u32> = (0..group_of.len() as u32).collect();
        columns.sort_by_key(|&column| group_of[column as usize]);
        let misplaced =
            columns.iter().enumerate().find(|&(place, &column)| group_of[column as usize] != of_place(place));
        match misplaced {
            None => Ok(Some(columns.into())),
            Some((place, _)) => {
                let why = format!("group {} has not as many columns as group_size says", of_place(place));
                Err(self.blame(what, why))
            }
        }
    }
}

/// Scales and zeros of groups, as a file has them.
pub(super) struct Groups<'a> {
    pub(super) bits: CodeBits,
    /// `None`: of a row.
    pub(super) file_group: Option<usize>,
    /// Of row n and group j.
    pub(super) scale: &'a dyn Fn((usize, usize)) -> f16,
    /// The same; `None`: the middle everywhere.
    pub(super) zero: Option<&'a dyn Fn((usize, usize)) -> u8>,
    pub(super) columns: Option<Arc<[u32]>>,
}

/// The largest of the kernels' groups that divides a group of a file, and its rows.
pub(super) fn group_of(file_group: Option<usize>, inside: usize) -> Option<usize> {
    let file_group = file_group.unwrap_or(inside);
    [128, 64, 32].into_iter().find(|&group| file_group.is_multiple_of(group) && inside.is_multiple_of(group))
}

/// Code `at` of a word.
pub(super) fn code(word: u32, bits: CodeBits, at: usize) -> u32 {
    word >> (bits.bits() * at) & bits.max_code()
}

/// A word of codes, of which `code` knows each.
pub(super) fn word(bits: CodeBits, code: impl Fn(usize) -> u32) -> u32 {
    (0..bits.per_word()).fold(0, |word, i| word | code(i) << (bits.bits() * i))
}

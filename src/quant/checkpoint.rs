//! Checkpoints whose projections are in codes: what config.json says of them, and the way from their tensors to
//! [`QuantTensor`]s. A weight stays the number that the file says it is, bit for bit in f32: codes are moved, never made
//! anew. Which projections are in codes, the tensors tell: one that is stored dense stays dense, wherever
//! `quantization_config` lists it.
//!
//! | `quant_method` | tensors of a projection `[out, in]` | what becomes of them |
//! |---|---|---|
//! | `gptq` | `qweight`, `qzeros`, `scales`, `g_idx` | 4 or 8 bits, repacked; columns in another order with `desc_act` |
//! | `awq` | `qweight`, `qzeros`, `scales` | 4 bits, repacked |
//! | `fp8` | `weight` E4M3, `weight_scale` or `weight_scale_inv` | where they are mapped |
//! | `compressed-tensors` | as `fp8`, or `weight_packed`, `weight_scale`, `weight_g_idx` | where they are mapped; 4 bits repacked where they have another order |
//!
//! Scales of activations are not looked at: activations stay in the compute type.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;

use super::weights::{QuantWeights, inputs, shapes};
use super::{CodeBits, QuantTensor};
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;
use crate::model::weights::WeightStore;

mod awq;
mod config;
mod fp8;
mod gptq;
mod pack;
mod packed;

use pack::Matrix;

/// How a checkpoint's projections are stored, from the `quantization_config` of its config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "method", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// GPTQ, in 4 or 8 bits.
    Gptq {
        /// Width of a code.
        bits: CodeBits,
        /// Neighbours along k (after `g_idx`) that share a scale and a zero; `None`: all of a row.
        group: Option<usize>,
        /// No zeros but the middle.
        symmetric: bool,
        /// Zeros are stored less one, as `checkpoint_format` `gptq` has them and `gptq_v2` has not.
        zeros_less_one: bool,
    },
    /// AWQ in 4 bits, as `version` `gemm` packs it.
    Awq {
        /// As above.
        group: Option<usize>,
    },
    /// E4M3 numbers.
    Fp8 {
        /// Rows and columns that share a scale; `None`: all columns, and the rows of a tensor or each for itself.
        block: Option<[usize; 2]>,
    },
    /// 4 bits, as compressed-tensors packs them (`pack-quantized`).
    Packed {
        /// As above.
        group: Option<usize>,
    },
}

impl fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = |group: &Option<usize>| match group {
            Some(group) => format!("in groups of {group}"),
            None => "in groups of a row".to_owned(),
        };
        match self {
            Self::Gptq { bits, group: g, .. } => write!(f, "gptq, {bits} bits {}", group(g)),
            Self::Awq { group: g } => write!(f, "awq, 4 bits {}", group(g)),
            Self::Packed { group: g } => write!(f, "compressed-tensors, 4 bits {}", group(g)),
            Self::Fp8 { block: None } => f.write_str("fp8 (E4M3), a scale for a tensor or a row"),
            Self::Fp8 { block: Some([rows, columns]) } => write!(f, "fp8 (E4M3), a scale for {rows} x {columns}"),
        }
    }
}

impl CheckpointFormat {
    /// The projection `name` of `[out, in]` in codes; `None` where the store has it dense.
    pub fn matrix(&self, store: &WeightStore, name: &str, [out, inside]: [usize; 2]) -> Result<Option<QuantTensor>> {
        let matrix = Matrix { store, name, base: name.trim_end_matches(".weight"), out, inside };
        if store.contains(name) && !matrix.is_in_bytes() {
            return store.get(name, &[out, inside]).map(|_| None);
        }
        let tensor = match self {
            Self::Gptq { bits, group, zeros_less_one, .. } => gptq::read(&matrix, *bits, *group, *zeros_less_one),
            Self::Awq { group } => awq::read(&matrix, *group),
            Self::Fp8 { block } => fp8::read(&matrix, *block),
            Self::Packed { group } => packed::read(&matrix, *group),
        }?;
        tensor.validate()?;
        Ok(Some(tensor))
    }

    /// Bytes that the projections of a model take in codes, all of them, and how many weights they are.
    pub fn num_bytes(&self, model: &ModelConfig) -> (u64, u64) {
        let (bits, file_group, zero_bytes) = match self {
            Self::Gptq { bits, group, symmetric, .. } => (*bits, *group, usize::from(!symmetric)),
            Self::Awq { group } => (CodeBits::W4, *group, 1),
            Self::Packed { group } => (CodeBits::W4, *group, 0),
            Self::Fp8 { block } => (CodeBits::F8, block.map(|[_, columns]| columns), 0),
        };
        let of = |[out, inside]: [usize; 2]| {
            let groups = pack::group_of(file_group, inside).map_or(0, |group| out * inside / group);
            let bytes = out * inside * bits.bits() / 8 + groups * (bits.scale_bytes() + zero_bytes);
            (bytes as u64, (out * inside) as u64)
        };
        let all = inputs(model).flat_map(|at| shapes(model, at)).map(|(_, shape)| of(shape));
        all.fold((0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1))
    }
}

/// Endings of tensors that only matrices in codes have.
const MARKS: [&str; 4] = [".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv"];

impl QuantWeights {
    /// The projections that a checkpoint stores in codes; `None` where config.json names no `quantization_config`.
    /// Matrices whose codes the kernels read as they lie stay mapped; others are repacked in memory. Codes of anything
    /// but the layers' projections are refused.
    pub fn from_checkpoint(model: &ModelConfig, store: &WeightStore) -> Result<Option<Self>> {
        let Some(format) = &model.quantization else { return Ok(None) };
        let mut tensors = BTreeMap::new();
        for (name, shape) in inputs(model).flat_map(|at| shapes(model, at)) {
            if let Some(tensor) = format.matrix(store, &name, shape)? {
                tensors.insert(Arc::clone(&tensor.name), tensor);
            }
        }
        check_others(format, model, store)?;
        if tensors.is_empty() {
            let why = format!("quantization_config says {format}, and no projection is stored so");
            return Err(Error::config("model", why));
        }
        Ok(Some(Self { options: None, tensors }))
    }

    /// Bytes that a model takes whose projections are these: their codes, and the store's other tensors.
    pub(crate) fn model_bytes(&self, model: &ModelConfig, store: &WeightStore) -> u64 {
        let dense = |(name, shape): (String, Vec<usize>)| match self.get(&name) {
            Some(_) => 0,
            None => store.get(&name, &shape).map_or(0, |tensor| tensor.bytes().len() as u64),
        };
        self.num_bytes() + model.tensor_shapes().into_iter().map(dense).sum::<u64>()
    }
}

/// What a store holds for a model, tensor by tensor; no more than one matrix at a time is repacked.
#[derive(Debug, Default)]
pub struct Survey {
    /// Projections in codes.
    pub num_matrices: usize,
    /// Bytes of their codes, scales and zeros as the engine has them.
    pub code_bytes: u64,
    /// Bytes of the model's other tensors.
    pub dense_bytes: u64,
    /// Why a tensor cannot be used.
    pub problems: Vec<Error>,
}

impl Survey {
    /// Looks at every tensor that the model asks for.
    pub fn new(model: &ModelConfig, store: &WeightStore) -> Self {
        let mut survey = Self::default();
        for (name, shape) in model.tensor_shapes() {
            if let Err(problem) = survey.add(model.quantization.as_ref(), store, &name, &shape) {
                survey.problems.push(problem);
            }
        }
        let others = model.quantization.as_ref().map(|format| check_others(format, model, store));
        survey.problems.extend(others.and_then(Result::err));
        survey
    }

    fn add(
        &mut self,
        format: Option<&CheckpointFormat>,
        store: &WeightStore,
        name: &str,
        shape: &[usize],
    ) -> Result<()> {
        let codes = match (format, shape) {
            (Some(format), &[out, inside]) if name.ends_with("_proj.weight") => {
                format.matrix(store, name, [out, inside])?
            }
            _ => None,
        };
        match codes {
            Some(codes) => {
                self.num_matrices += 1;
                self.code_bytes += codes.num_bytes();
            }
            None => self.dense_bytes += store.get(name, shape)?.bytes().len() as u64,
        }
        Ok(())
    }
}

/// Refuses codes that stand for something else than a projection, by name.
fn check_others(format: &CheckpointFormat, model: &ModelConfig, store: &WeightStore) -> Result<()> {
    let projections: HashSet<String> = inputs(model).flat_map(|at| shapes(model, at)).map(|(name, _)| name).collect();
    for (wanted, _) in model.tensor_shapes().into_iter().filter(|(name, _)| !projections.contains(name)) {
        let Some(base) = wanted.strip_suffix(".weight") else { continue };
        if let Some(name) = MARKS.iter().map(|mark| format!("{base}{mark}")).find(|name| store.contains(name)) {
            let why =
                format!("in codes ({format}); only the layers' projections may be: take a checkpoint with a dense one");
            return Err(store.blame(&name, why));
        }
    }
    Ok(())
}

/// Whoever would quantise the projections of a checkpoint that has them in codes is refused.
pub(crate) fn check_dense(model: &ModelConfig) -> Result<()> {
    match &model.quantization {
        None => Ok(()),
        Some(format) => {
            let why = format!(
                "the model's projections are in codes already ({format}) and run as they are: drop --quantise and --river, \
                 or take the bf16 checkpoint"
            );
            Err(Error::config("quantise", why))
        }
    }
}

//! The projections of a model's layers in codes, by name: its second weight set, or its only one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::checkpoint::check_dense;
use super::factor::Factor;
use super::hessian::{Hessians, LayerInput};
use super::options::{QuantOptions, Quantiser};
use super::parallel::all_cores;
use super::rows::{Form, quantise_rows};
use super::{CodeBits, QuantTensor, ZeroKind, gptq, hqq, rtn};
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;
use crate::model::weights::WeightStore;

/// The projections of all layers in codes: q, k, v, o, gate, up and down. Norms, biases, embedding and unembedding are
/// those of the first set, and so are projections that a checkpoint has left dense.
#[derive(Clone, Debug)]
pub struct QuantWeights {
    /// `None`: they are a checkpoint's own.
    pub(super) options: Option<QuantOptions>,
    pub(super) tensors: BTreeMap<Arc<str>, QuantTensor>,
}

/// A projection, and what it is to become.
pub(super) struct Projection {
    pub(super) name: String,
    pub(super) shape: [usize; 2],
    pub(super) form: Form,
}

/// Names and shapes of the projections that read one input of a layer.
pub(super) fn shapes(model: &ModelConfig, at: (usize, LayerInput)) -> impl Iterator<Item = (String, [usize; 2])> {
    let (layer, input) = at;
    let (q, kv) = (model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    let rows = match input {
        LayerInput::Qkv => vec![("self_attn.q", q), ("self_attn.k", kv), ("self_attn.v", kv)],
        LayerInput::O => vec![("self_attn.o", model.hidden)],
        LayerInput::GateUp => vec![("mlp.gate", model.intermediate), ("mlp.up", model.intermediate)],
        LayerInput::Down => vec![("mlp.down", model.hidden)],
    };
    let width = input.width(model);
    rows.into_iter().map(move |(name, out)| (format!("model.layers.{layer}.{name}_proj.weight"), [out, width]))
}

/// The projections that read one input of a layer.
pub(super) fn projections(model: &ModelConfig, options: &QuantOptions, at: (usize, LayerInput)) -> Vec<Projection> {
    let projection = |(name, shape): (String, [usize; 2])| {
        let is_kv = name.ends_with(".k_proj.weight") || name.ends_with(".v_proj.weight");
        let bits = if is_kv { options.kv_bits } else { CodeBits::W4 };
        let zero_kind = match (bits, options.quantiser) {
            (CodeBits::W8 | CodeBits::F8, _) => ZeroKind::None,
            (CodeBits::W4, Quantiser::Hqq) => ZeroKind::Fractional,
            (CodeBits::W4, Quantiser::Rtn | Quantiser::Gptq) => ZeroKind::Integer,
        };
        Projection { name, shape, form: Form { group: options.group, bits, zero_kind } }
    };
    shapes(model, at).map(projection).collect()
}

/// Every input of every layer, in order.
pub(super) fn inputs(model: &ModelConfig) -> impl Iterator<Item = (usize, LayerInput)> {
    (0..model.num_layers).flat_map(|layer| LayerInput::ALL.map(|input| (layer, input)))
}

/// Refuses a model in codes, and rows that do not fall into groups, by name.
pub(super) fn check_model(model: &ModelConfig, options: &QuantOptions) -> Result<()> {
    options.validate()?;
    check_dense(model)?;
    for at in inputs(model).take(LayerInput::ALL.len()) {
        let width = at.1.width(model);
        let Some(odd) = projections(model, options, at).into_iter().find(|_| !width.is_multiple_of(options.group))
        else {
            continue;
        };
        let fits = |group: &usize| LayerInput::ALL.iter().all(|input| input.width(model).is_multiple_of(*group));
        let way_out = match [128, 64, 32].into_iter().find(fits) {
            Some(group) => format!("use {group}"),
            None => "no group of 32, 64 or 128 fits this model".to_owned(),
        };
        let why = format!("{} does not divide the {width} columns of {}; {way_out}", options.group, odd.name);
        return Err(Error::config("quant-group", why));
    }
    Ok(())
}

impl QuantWeights {
    /// Quantises the projections of `store`, on all cores; the result is the same on any number of them. `hessians` are
    /// for [`Quantiser::Gptq`], which cannot do without.
    pub fn quantise(
        model: &ModelConfig,
        store: &WeightStore,
        options: QuantOptions,
        hessians: Option<&Hessians>,
    ) -> Result<Self> {
        let mut weights = Self::without_layers(model, options)?;
        weights.add_layers((model, store), 0..model.num_layers, hessians)?;
        Ok(weights)
    }

    /// A set that is yet to be made; options that do not fit the model are refused.
    pub(crate) fn without_layers(model: &ModelConfig, options: QuantOptions) -> Result<Self> {
        check_model(model, &options)?;
        Ok(Self { options: Some(options), tensors: BTreeMap::new() })
    }

    /// Quantises the projections of `layers`, as [`quantise`](Self::quantise) does those of all.
    pub(crate) fn add_layers(
        &mut self,
        (model, store): (&ModelConfig, &WeightStore),
        layers: Range<usize>,
        hessians: Option<&Hessians>,
    ) -> Result<()> {
        let Some(options) = self.options else {
            return Err(Error::Internal("layers added to a checkpoint's own codes".into()));
        };
        let hessians = match (options.quantiser, hessians) {
            (Quantiser::Gptq, None) => return Err(needs_hessians()),
            (Quantiser::Gptq, some) => some,
            (Quantiser::Rtn | Quantiser::Hqq, _) => None,
        };
        let threads = all_cores();
        for at in inputs(model).filter(|(layer, _)| layers.contains(layer)) {
            let factor = hessians.map(|h| Factor::new(h, at, at.1.width(model), threads)).transpose()?;
            for Projection { name, shape, form } in projections(model, &options, at) {
                let weight = store.get_finite(&name, &shape)?;
                let made = quantise_rows(&weight, form, threads, |rows, sink| match (form.zero_kind, &factor) {
                    (ZeroKind::Integer, Some(factor)) => gptq::quantise(rows, factor, sink),
                    (ZeroKind::Fractional, _) => hqq::quantise(rows, sink),
                    (ZeroKind::Integer | ZeroKind::None, _) => rtn::quantise(rows, sink),
                })?;
                self.tensors.insert(Arc::clone(&made.name), made);
            }
        }
        Ok(())
    }

    /// What the set was made with; `None` where it was not made here but read from a checkpoint.
    pub fn options(&self) -> Option<QuantOptions> {
        self.options
    }

    /// The projection called `name` in the checkpoint, as in `model.layers.0.mlp.down_proj.weight`.
    pub fn get(&self, name: &str) -> Option<&QuantTensor> {
        self.tensors.get(name)
    }

    /// All projections, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &QuantTensor> {
        self.tensors.values()
    }

    /// Bytes of all codes, scales and zeros.
    pub fn num_bytes(&self) -> u64 {
        self.iter().map(QuantTensor::num_bytes).sum()
    }

    /// Bits that a weight takes, scales and zeros included.
    pub fn bits_per_weight(&self) -> f64 {
        let weights: usize = self.iter().map(|t| t.out_features * t.in_features).sum();
        8.0 * self.num_bytes() as f64 / weights.max(1) as f64
    }
}

impl QuantOptions {
    /// Bytes that a model's set takes, and of how many weights: what [`QuantWeights::num_bytes`] will say.
    pub fn num_bytes(&self, model: &ModelConfig) -> (u64, u64) {
        let of_all = |projection: &Projection| {
            let Projection { shape: [out, inside], form, .. } = projection;
            let zero_bytes = match form.zero_kind {
                ZeroKind::None => 0,
                ZeroKind::Integer => 1,
                ZeroKind::Fractional => 2,
            };
            let bytes = out * inside * form.bits.bits() / 8 + out * (inside / form.group) * (2 + zero_bytes);
            (bytes as u64, (out * inside) as u64)
        };
        let projections = inputs(model).flat_map(|at| projections(model, self, at));
        projections.map(|p| of_all(&p)).fold((0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1))
    }
}

fn needs_hessians() -> Error {
    let why = "gptq needs the activations of a text: make the file first (rksc-run quantise --quantiser gptq --text FILE), \
               or use hqq";
    Error::config("quantiser", why)
}

//! From a configuration to a running engine: weights, device, block cache.

use std::collections::VecDeque;
use std::time::Instant;

use super::limit::RingPool;
use super::{CancelFlag, Engine, EngineStats, ModelInfo};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::{Cuda, Heads};
use crate::batch::Batch;
use crate::config::{DeviceChoice, EngineConfig, ModelSource};
use crate::error::{Error, Result};
use crate::kv::KvLayout;
use crate::kv::block_pool::BlockPool;
use crate::kv::eviction::Evictor;
use crate::kv::prefix_cache::PrefixCache;
use crate::model::family::ModelConfig;
use crate::model::weights::WeightStore;
use crate::model::{Model, ModelOptions, Runner, route_bytes, workspace_bytes};
use crate::quant::{QuantOptions, QuantWeights};
use crate::tree::BranchTree;

/// Without `kv_cache_memory`, the cache holds at most this many full contexts.
const DEFAULT_CONTEXTS: u64 = 64;

impl Engine {
    /// Loads the model and makes its KV cache. Weights stay mapped; nothing is computed, but for the codes of a checkpoint
    /// that has some: see [`QuantWeights::from_checkpoint`].
    pub fn open(config: EngineConfig) -> Result<Self> {
        config.validate()?;
        let (model, store) = load(&config)?;
        let codes = |options: Option<QuantOptions>| options.map(|o| codes(&config, &model, &store, o)).transpose();
        let (own, river) = (codes(config.quantise)?, codes(config.river)?);
        let river = river.as_ref().map(SecondSet::Codes);
        Self::with_sets(config, model, (&store, own.as_ref()), river)
    }

    /// The configuration's model and weights, for [`with_weights`](Self::with_weights) and its like: several engines may
    /// share them.
    pub fn load(config: &EngineConfig) -> Result<(ModelConfig, WeightStore)> {
        config.validate()?;
        load(config)
    }

    /// The projections of those weights in codes, from the configuration's file or made anew.
    pub fn load_codes(
        config: &EngineConfig,
        model: &ModelConfig,
        store: &WeightStore,
        options: QuantOptions,
    ) -> Result<QuantWeights> {
        codes(config, model, store, options)
    }

    /// What tells the configuration's model from others, without opening it: a hash of its shape and of samples of
    /// every tensor.
    pub fn fingerprint(config: &EngineConfig) -> Result<String> {
        let (model, store) = load(config)?;
        Ok(store.fingerprint(&model))
    }

    /// As [`open`](Self::open), for weights that are at hand; projections that they hold in codes run on these.
    pub fn with_weights(config: EngineConfig, model: ModelConfig, store: &WeightStore) -> Result<Self> {
        Self::with_sets(config, model, (store, None), None)
    }

    /// As [`with_weights`](Self::with_weights), with the projections in codes: the whole model in 4 bits.
    pub fn with_codes(
        config: EngineConfig,
        model: ModelConfig,
        store: &WeightStore,
        codes: &QuantWeights,
    ) -> Result<Self> {
        Self::with_sets(config, model, (store, Some(codes)), None)
    }

    /// As [`with_weights`](Self::with_weights), with a second weight set of the same shape for
    /// [`set_river`](Self::set_river) and for gates whose effect is [`River`](crate::gate::Effect::River).
    pub fn with_second_set(
        config: EngineConfig,
        model: ModelConfig,
        store: &WeightStore,
        second: SecondSet<'_>,
    ) -> Result<Self> {
        Self::with_sets(config, model, (store, None), Some(second))
    }

    fn with_sets(
        config: EngineConfig,
        model: ModelConfig,
        (store, codes): Own<'_>,
        second: Option<SecondSet<'_>>,
    ) -> Result<Self> {
        config.validate()?;
        let started = Instant::now();
        let of_checkpoint = if codes.is_none() { QuantWeights::from_checkpoint(&model, store)? } else { None };
        let own = (store, codes.or(of_checkpoint.as_ref()));
        if config.check_tensors {
            store.check_finite()?;
        }
        let (runner, layout, device_note) = on_device(&config, &model, own, second)?;
        let block_bytes = layout.block_bytes(model.num_layers);
        let info = ModelInfo {
            name: match &config.model {
                ModelSource::Bundled => "tinymath (bundled)".into(),
                ModelSource::Dir(dir) => dir.display().to_string(),
                ModelSource::Random { shape, seed } => format!("{shape} (random weights, seed {seed})"),
            },
            family: model.family.name.into(),
            num_params: model.num_params() as u64,
            weight_bytes: of_checkpoint
                .as_ref()
                .map_or_else(|| store.num_bytes(), |codes| codes.model_bytes(&model, store)),
            weight_copy_bytes: runner.weight_copy_bytes(),
            dtype: config.dtype.to_string(),
            device: runner.describe(),
            device_note,
            kv_cache_bytes: layout.num_blocks as u64 * block_bytes,
            kv_bytes_per_token: block_bytes / layout.block_size as u64,
            load_seconds: started.elapsed().as_secs_f64(),
        };
        Ok(Self {
            pool: BlockPool::new(layout.num_blocks),
            cache: PrefixCache::new(layout.block_size),
            evictor: Evictor::new(config.eviction, layout.num_blocks, config.mass_decay),
            decode_passes: 0,
            runner,
            tree: BranchTree::default(),
            gates: Vec::new(),
            river: None,
            river_gate: None,
            events: VecDeque::new(),
            cancel: CancelFlag::default(),
            next_arrival: 0,
            swap_used: 0,
            rings: RingPool::default(),
            totals: EngineStats::default(),
            batch: Batch::default(),
            queries: Vec::new(),
            fault: None,
            forced_preemptions: Vec::new(),
            config,
            model,
            layout,
            info,
        })
    }
}

/// A second weight set.
#[derive(Clone, Copy, Debug)]
pub enum SecondSet<'a> {
    /// The projections of another checkpoint.
    Dense(&'a WeightStore),
    /// The model's own in codes.
    Codes(&'a QuantWeights),
}

/// A checkpoint, and codes that stand in for its projections.
type Own<'a> = (&'a WeightStore, Option<&'a QuantWeights>);

type Placed = (Box<dyn Runner>, KvLayout);

/// Puts a model and its KV cache on the device that the configuration names. The note says why `auto` chose the CPU.
fn on_device(
    config: &EngineConfig,
    model: &ModelConfig,
    own: Own<'_>,
    second: Option<SecondSet<'_>>,
) -> Result<(Box<dyn Runner>, KvLayout, Option<String>)> {
    let check_heads = || Cuda::check_heads(model.head_dim, model.num_q_heads / model.num_kv_heads.max(1));
    let cuda = |device: Device| {
        check_heads()?;
        let heads =
            Heads { num_q_heads: model.num_q_heads, num_kv_heads: model.num_kv_heads, block_size: config.block_size };
        runner(Cuda::new(device, heads), config, model, own, second)
    };
    let cpu = || runner(Cpu::new(config.threads, config.simd.parse()?)?, config, model, own, second);
    let with_note = |note: Option<String>| move |(runner, layout): Placed| (runner, layout, note);
    match config.device.parse()? {
        DeviceChoice::Cpu => cpu().map(with_note(None)),
        DeviceChoice::Cuda(ordinal) => {
            // Who asked for a GPU by name is told the way out; `auto` takes it.
            let device = Device::gpu(ordinal).map_err(|error| match error {
                Error::CudaUnavailable { why } => Error::CudaUnavailable { why: format!("{why}; use --device cpu") },
                other => other,
            })?;
            cuda(device).map(with_note(None))
        }
        DeviceChoice::Emulated => cuda(Device::emulated()?).map(with_note(None)),
        DeviceChoice::Auto => match Device::gpu(0).and_then(|device| check_heads().map(|()| device)) {
            Ok(device) => cuda(device).map(with_note(None)),
            Err(why) => cpu().map(with_note(Some(why.to_string()))),
        },
    }
}

/// Puts a model and its KV cache on a device.
fn runner<B: Backend>(
    backend: B,
    config: &EngineConfig,
    model: &ModelConfig,
    own: Own<'_>,
    second: Option<SecondSet<'_>>,
) -> Result<Placed> {
    let bytes = |(store, codes): Own<'_>| match codes {
        None => store.num_bytes(),
        Some(codes) if codes.options().is_none() => codes.model_bytes(model, store),
        Some(codes) => store.num_bytes() + codes.num_bytes(),
    };
    let second = second.map(|set| match set {
        SecondSet::Dense(store) => (store, None),
        SecondSet::Codes(codes) => (own.0, Some(codes)),
    });
    let routes = route_bytes(model.hidden, config.max_batch_tokens);
    let weights = bytes(own) + second.map_or(0, |second| bytes(second) + routes);
    let resident = weights + workspace_bytes(model, config.dtype, config.max_batch_tokens);
    let layout = kv_layout(config, model, backend.kv_budget(resident))?;
    let options = ModelOptions { compute: config.dtype, layout, max_rows: config.max_batch_tokens };
    let mut runner = Model::new(backend, model.clone(), own, options)?;
    if let Some(second) = second {
        runner.set_river(second)?;
    }
    Ok((Box::new(runner), layout))
}

/// The model's shape and its weights, from wherever the configuration says.
pub(crate) fn load(config: &EngineConfig) -> Result<(ModelConfig, WeightStore)> {
    let (model, store) = load_whole(config)?;
    Ok((model.with_context(config.max_context)?, store))
}

fn load_whole(config: &EngineConfig) -> Result<(ModelConfig, WeightStore)> {
    match &config.model {
        ModelSource::Dir(dir) => crate::model::open(dir, config.access),
        ModelSource::Random { shape, seed } => {
            let model = ModelConfig::shape(shape)?;
            let store = WeightStore::random(&model, *seed, config.dtype)?;
            Ok((model, store))
        }
        #[cfg(feature = "bundled-model")]
        ModelSource::Bundled => Ok((crate::bundled::config()?, crate::bundled::weights()?)),
        #[cfg(not(feature = "bundled-model"))]
        ModelSource::Bundled => {
            Err(Error::config("model", "this build has no bundled model; give a folder with -m DIR"))
        }
    }
}

/// The model's projections in codes, from their file or made anew.
fn codes(
    config: &EngineConfig,
    model: &ModelConfig,
    store: &WeightStore,
    options: QuantOptions,
) -> Result<QuantWeights> {
    let (weights, origin) = QuantWeights::load_or_quantise(model, store, options, &config.codes_file(), None)?;
    tracing::info!("{options}, {:.2} bits a weight: {origin}", weights.bits_per_weight());
    Ok(weights)
}

/// How many blocks the memory holds: what the configuration says, or else what the device can spare. Too little for one
/// block is refused with what is missing.
pub(crate) fn kv_layout(config: &EngineConfig, model: &ModelConfig, budget: Option<u64>) -> Result<KvLayout> {
    let one = KvLayout {
        num_blocks: 1,
        num_kv_heads: model.num_kv_heads,
        block_size: config.block_size,
        head_dim: model.head_dim,
        dtype: config.dtype,
    };
    let block_bytes = one.block_bytes(model.num_layers);
    let contexts =
        (model.max_position_embeddings as u64).div_ceil(config.block_size as u64).saturating_mul(block_bytes);
    let bytes = config
        .kv_cache_memory
        .unwrap_or_else(|| budget.unwrap_or(u64::MAX).min(DEFAULT_CONTEXTS.saturating_mul(contexts)));
    let num_blocks = bytes / block_bytes;
    // One token needs its block and the copy of a shared tail.
    if num_blocks < 2 {
        let needed = 2;
        let missing_bytes = needed as u64 * block_bytes - bytes;
        return Err(Error::OutOfBlocks { needed, capacity: num_blocks as usize, missing_bytes });
    }
    let num_blocks = usize::try_from(num_blocks).unwrap_or(usize::MAX).min(u32::MAX as usize / config.block_size);
    Ok(KvLayout { num_blocks, ..one })
}

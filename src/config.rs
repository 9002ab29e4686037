//! What the engine is asked to be. Values are checked once, when the engine opens, and trusted afterwards.

use std::path::PathBuf;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::eviction::Eviction;
use crate::model::weights::Access;
use crate::quant::{QuantFile, QuantOptions};

/// Where the weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The model inside the library (feature `bundled-model`).
    Bundled,
    /// A local Hugging Face folder.
    Dir(PathBuf),
    /// Random weights of a known shape, for speed measurements; there is no tokenizer.
    Random {
        /// A name [`ModelConfig::shape`](crate::model::family::ModelConfig::shape) knows.
        shape: String,
        /// Key of the weights.
        seed: u64,
    },
}

/// Which device is meant by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if there is one that this build can use, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by number.
    Cuda(usize),
    /// The CUDA kernels on the host, checked and slow; only with feature `emulated-kernels`.
    Emulated,
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match (name, name.strip_prefix("cuda").map(|n| n.strip_prefix(':').unwrap_or(n))) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("emulated", _) if cfg!(feature = "emulated-kernels") => Ok(Self::Emulated),
            (_, Some("")) => Ok(Self::Cuda(0)),
            (_, Some(number)) if number.parse::<usize>().is_ok() => Ok(Self::Cuda(number.parse().unwrap_or(0))),
            _ => Err(Error::config("device", format!("{name:?} is unknown; use auto, cpu or cuda:N"))),
        }
    }
}

/// Everything [`Engine::open`](crate::Engine::open) needs. Start from `default()` and change what matters.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Where the weights come from.
    pub model: ModelSource,
    /// What activations and the KV cache are rounded to.
    pub dtype: DType,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// `auto`, `amx`, `avx512`, `avx2` or `portable`.
    pub simd: String,
    /// CPU threads; 0 takes one per core.
    pub threads: usize,
    /// Positions to open the model for; `None` takes what its config.json says. More than the model was trained for picks
    /// the frequencies of the rule that its config.json has for long contexts ([`Rope`](crate::model::family::Rope)).
    pub max_context: Option<usize>,
    /// Bytes of KV cache; `None` takes a quarter of the free memory, at most 64 contexts' worth.
    pub kv_cache_memory: Option<u64>,
    /// Tokens per KV block: 16 or 32.
    pub block_size: usize,
    /// Tokens in one pass; longer prompts run in chunks.
    pub max_batch_tokens: usize,
    /// Host bytes for branches that cannot be recomputed exactly.
    pub swap_space: u64,
    /// Whose blocks go when the cache is full.
    pub eviction: Eviction,
    /// Under [`Eviction::Mass`], attention mass is measured in every so many-th decode pass (and where a prompt ends).
    pub mass_every: usize,
    /// What a measurement leaves of the mass measured before, in `(0, 1]`.
    pub mass_decay: f64,
    /// Under a KV budget, the last tokens that always stay and whose queries judge the others, 1 to 64.
    pub kv_window: usize,
    /// The layers' projections in codes instead of as they are stored: the whole model in 4 bits. Not exact.
    pub quantise: Option<QuantOptions>,
    /// The layers' projections once more, in codes: the second weight set of [`Engine::set_river`](crate::Engine::set_river).
    pub river: Option<QuantOptions>,
    /// File of the codes; `None` keeps them beside the model, or in the user's cache.
    pub codes: Option<PathBuf>,
    /// Whether the weights of a folder are mapped or read.
    pub access: Access,
    /// Look for NaN and infinities in the weights while opening.
    pub check_tensors: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model: ModelSource::Bundled,
            dtype: DType::Bf16,
            device: "auto".into(),
            simd: "auto".into(),
            threads: 0,
            max_context: None,
            kv_cache_memory: None,
            block_size: 16,
            max_batch_tokens: 2048,
            swap_space: 4 << 30,
            eviction: Eviction::Lru,
            mass_every: 16,
            mass_decay: 0.95,
            kv_window: 8,
            quantise: None,
            river: None,
            codes: None,
            access: Access::Map,
            check_tensors: false,
        }
    }
}

impl EngineConfig {
    /// Refuses values that cannot work, by name.
    pub fn validate(&self) -> Result<()> {
        if ![16, 32].contains(&self.block_size) {
            return Err(Error::config("block-size", format!("{} is not supported; use 16 or 32", self.block_size)));
        }
        if self.max_batch_tokens == 0 || self.max_batch_tokens > 1 << 20 {
            return Err(Error::config("max-batch-tokens", "must be between 1 and 1048576"));
        }
        if self.mass_every == 0 {
            return Err(Error::config("mass-every", "must be at least 1"));
        }
        if !(self.mass_decay > 0.0 && self.mass_decay <= 1.0) {
            return Err(Error::config("mass-decay", "must be above 0 and at most 1"));
        }
        if !(1..=64).contains(&self.kv_window) {
            return Err(Error::config("kv-window", "must be between 1 and 64"));
        }
        let sets: Vec<&QuantOptions> = self.quantise.iter().chain(&self.river).collect();
        sets.iter().try_for_each(|options| options.validate())?;
        if self.codes.is_some() && sets.len() != 1 {
            let why = "names the file of one set of codes; give --quantise or --river, and not both";
            return Err(Error::config("codes", why));
        }
        check_threads(self.threads)?;
        self.device.parse::<DeviceChoice>().map(drop)
    }

    /// Where the model's codes lie.
    pub fn codes_file(&self) -> QuantFile {
        match (&self.codes, &self.model) {
            (Some(path), _) => QuantFile::At(path.clone()),
            (None, ModelSource::Dir(dir)) => QuantFile::auto(Some(dir)),
            (None, ModelSource::Bundled) => QuantFile::auto(None),
            (None, ModelSource::Random { .. }) => QuantFile::None,
        }
    }
}

/// Refuses what is no number of threads but a mistake.
pub(crate) fn check_threads(threads: usize) -> Result<()> {
    if threads > 1024 {
        return Err(Error::config("threads", "must be at most 1024 (0 takes one per core)"));
    }
    Ok(())
}

/// Bytes the machine can give without swapping, if it says.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_refused_by_name() {
        let bad = |f: fn(&mut EngineConfig)| {
            let mut c = EngineConfig::default();
            f(&mut c);
            c.validate().unwrap_err().to_string()
        };
        assert!(bad(|c| c.block_size = 24).starts_with("block-size"));
        assert!(bad(|c| c.device = "tpu".into()).starts_with("device"));
        assert!(bad(|c| c.device = "cuda:x".into()).starts_with("device"));
        assert!(bad(|c| c.max_batch_tokens = 0).starts_with("max-batch-tokens"));
        assert!(bad(|c| c.mass_every = 0).starts_with("mass-every"));
        assert!(bad(|c| c.kv_window = 0).starts_with("kv-window"));
        assert!(bad(|c| c.mass_decay = 0.0).starts_with("mass-decay"));
        assert!(bad(|c| c.mass_decay = f64::NAN).starts_with("mass-decay"));
        assert!(EngineConfig::default().validate().is_ok());
    }
}

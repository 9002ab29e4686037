//! How a checkpoint's authors generate: generation_config.json.

use std::path::Path;

use super::config::MAX_ABSURD;
use crate::error::Result;
use crate::model::fields::Json;

/// How the checkpoint's authors generate, from generation_config.json. Absent fields stay `None`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Tokens that end a text; empty leaves it to [`ModelConfig::eos_ids`](super::ModelConfig::eos_ids).
    pub eos_ids: Vec<u32>,
    /// Longest answer.
    pub max_new_tokens: Option<usize>,
    /// Draw rather than take the most likely token.
    pub do_sample: bool,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Draw among the k most likely; 0 is all.
    pub top_k: Option<usize>,
    /// Draw among the most likely that together reach p.
    pub top_p: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; a missing file is the default.
    pub fn from_dir(dir: &Path, vocab_size: usize) -> Result<Self> {
        let path = dir.join("generation_config.json");
        if path.exists() { Self::from_json(&Json::read(&path)?, vocab_size) } else { Ok(Self::default()) }
    }

    /// Reads the bytes of a generation_config.json; `path` is what errors call it.
    pub fn from_bytes(path: &Path, bytes: &[u8], vocab_size: usize) -> Result<Self> {
        Self::from_json(&Json::parse(path, bytes)?, vocab_size)
    }

    fn from_json(json: &Json, vocab_size: usize) -> Result<Self> {
        let f = json.fields()?;
        let temperature = f.opt_number("temperature")?;
        if temperature.is_some_and(|t| !(0.0..=100.0).contains(&t)) {
            return Err(f.bad("temperature", "must lie between 0 and 100"));
        }
        let top_p = f.opt_number("top_p")?;
        if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err(f.bad("top_p", "must lie above 0 and not above 1"));
        }
        Ok(Self {
            eos_ids: f.ids("eos_token_id", vocab_size)?,
            max_new_tokens: f.opt_count("max_new_tokens", MAX_ABSURD)?,
            do_sample: f.flag("do_sample")?.unwrap_or(false),
            temperature: temperature.map(|t| t as f32),
            top_k: f.opt_integer("top_k", 0, MAX_ABSURD)?,
            top_p: top_p.map(|p| p as f32),
        })
    }
}

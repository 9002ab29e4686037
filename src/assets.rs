//! What lies beside the weights: tokenizer, end tokens, prompt pack, few-shot prefix, sample problems.

use std::path::{Path, PathBuf};

use crate::calibrate::Calibration;
use crate::chat::ChatTemplate;
use crate::config::ModelSource;
use crate::error::{Error, Result};
use crate::model::family::{GenerationConfig, ModelConfig};
use crate::problems::Problem;
use crate::prompts::PromptPack;
use crate::tokenizer::Tokenizer;

/// What a calibration beside a model is called.
pub const CALIBRATION_FILE: &str = "calibration.json";

/// For a chat model that brings no pack.
const CHAT_PACK: &str = include_str!("../models/chat-pack/prompts.json");

impl ModelSource {
    /// The model's tokenizer. Random weights have none.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match self {
            Self::Dir(dir) => Tokenizer::from_file(&dir.join("tokenizer.json")),
            #[cfg(feature = "bundled-model")]
            Self::Bundled => crate::bundled::tokenizer(),
            _ => Err(self.lacks("tokenizer")),
        }
    }

    /// Tokens that end a text: those of `generation_config.json` and of `config.json` together.
    pub fn end_tokens(&self, model: &ModelConfig) -> Result<Vec<u32>> {
        let generation = match self {
            Self::Dir(dir) => GenerationConfig::from_dir(dir, model.vocab_size)?,
            #[cfg(feature = "bundled-model")]
            Self::Bundled => crate::bundled::generation_config()?,
            _ => GenerationConfig::default(),
        };
        let mut ids = generation.eos_ids;
        ids.extend(&model.eos_ids);
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The model's chat template, by its name where it has several, or the one at `path`. `None` where there is none.
    pub fn chat_template(&self, path: Option<&Path>, name: Option<&str>) -> Result<Option<ChatTemplate>> {
        match (path, self) {
            (Some(path), Self::Dir(dir)) => ChatTemplate::from_file(path, Some(dir)).map(Some),
            (Some(path), _) => ChatTemplate::from_file(path, None).map(Some),
            (None, Self::Dir(dir)) => ChatTemplate::from_dir(dir, name),
            #[cfg(feature = "bundled-model")]
            (None, Self::Bundled) if name.is_none_or(|n| n == "default") => crate::bundled::chat_template(),
            (None, _) => Ok(None),
        }
    }

    /// The prompt pack at `path`, or the one beside the model. A chat model without one has the built-in pack, which its
    /// template says.
    pub fn prompt_pack(&self, path: Option<&Path>) -> Result<PromptPack> {
        match (path, self) {
            (Some(path), _) => PromptPack::from_file(path),
            (None, Self::Dir(dir)) => {
                let path: PathBuf = dir.join("prompts.json");
                if path.exists() {
                    return PromptPack::from_file(&path);
                }
                if self.chat_template(None, None)?.is_some() {
                    return PromptPack::from_bytes(Path::new("<chat prompts.json>"), CHAT_PACK.as_bytes());
                }
                let why = format!(
                    "{} has neither prompts.json nor a chat template; give a prompt pack with --prompts FILE",
                    dir.display()
                );
                Err(Error::config("prompts", why))
            }
            #[cfg(feature = "bundled-model")]
            (None, Self::Bundled) => {
                PromptPack::from_bytes(Path::new("<bundled prompts.json>"), crate::bundled::PROMPTS_JSON.as_bytes())
            }
            _ => Err(self.lacks("prompt pack; give one with --prompts FILE")),
        }
    }

    /// The calibration beside the model, by name, if there is one.
    pub fn calibration(&self) -> Result<Option<(String, Calibration)>> {
        match self {
            Self::Dir(dir) => {
                let path = dir.join(CALIBRATION_FILE);
                if !path.exists() {
                    return Ok(None);
                }
                Ok(Some((path.display().to_string(), Calibration::read(&path)?)))
            }
            #[cfg(feature = "bundled-model")]
            Self::Bundled => {
                let name = "<bundled calibration.json>";
                let calibration =
                    Calibration::from_bytes(Path::new(name), crate::bundled::CALIBRATION_JSON.as_bytes())?;
                Ok(Some((name.to_string(), calibration)))
            }
            _ => Ok(None),
        }
    }

    /// The bundled problems, for the bundled model.
    pub fn sample_problems(&self) -> Result<Vec<Problem>> {
        match self {
            #[cfg(feature = "bundled-model")]
            Self::Bundled => crate::problems::parse_problems(
                Path::new("<bundled problems>"),
                crate::bundled::PROBLEMS_JSONL.as_bytes(),
            ),
            _ => Err(Error::config("problems", "this model comes with none; give a file with --problems FILE")),
        }
    }

    /// The bundled few-shot prefix of about a thousand tokens, for the bundled model.
    pub fn fewshot_prefix(&self) -> Result<String> {
        match self {
            #[cfg(feature = "bundled-model")]
            Self::Bundled => Ok(crate::bundled::FEWSHOT_PREFIX.to_string()),
            _ => Err(Error::config("prefix", "this model comes with none; give a file with --prefix FILE")),
        }
    }

    fn lacks(&self, what: &str) -> Error {
        Error::config("model", format!("{} has no {what}", self.describe()))
    }

    fn describe(&self) -> String {
        match self {
            Self::Bundled => "the bundled model (not in this build)".into(),
            Self::Dir(dir) => dir.display().to_string(),
            Self::Random { shape, .. } => format!("the random {shape} shape"),
        }
    }
}

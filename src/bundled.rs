//! The small reasoning model that is part of the program, with a handful of its problems.

use std::path::Path;

use crate::chat::ChatTemplate;
use crate::error::Result;
use crate::model::family::{GenerationConfig, ModelConfig};
use crate::model::weights::WeightStore;
use crate::tokenizer::Tokenizer;

/// Starts its bytes on a cache line, so that tensors are used in place.
#[repr(C, align(64))]
struct Aligned<Bytes: ?Sized>(Bytes);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../models/tinymath/model.safetensors"));
const CONFIG: &[u8] = include_bytes!("../models/tinymath/config.json");
const GENERATION_CONFIG: &[u8] = include_bytes!("../models/tinymath/generation_config.json");
const TOKENIZER: &[u8] = include_bytes!("../models/tinymath/tokenizer.json");

const TOKENIZER_CONFIG: &[u8] = include_bytes!("../models/tinymath/tokenizer_config.json");

/// What reports call the model.
pub const NAME: &str = "tinymath (bundled)";
/// Its prompt pack.
pub const PROMPTS_JSON: &str = include_str!("../models/tinymath/prompts.json");
/// Solved examples of about 1,000 tokens, to stand before a problem; ends in a blank line.
pub const FEWSHOT_PREFIX: &str = include_str!("../models/tinymath/problems/fewshot_prefix_1024.txt");
/// Twelve problems, two for each number of operations from 2 to 7, one JSON object a line.
pub const PROBLEMS_JSONL: &str = include_str!("../models/tinymath/problems/sample.jsonl");

/// What `rksc-run calibrate` found for it on its dev problems, in bf16.
pub const CALIBRATION_JSON: &str = include_str!("../models/tinymath/calibration.json");

/// Its config.json.
pub fn config() -> Result<ModelConfig> {
    ModelConfig::from_bytes(Path::new("<bundled config.json>"), CONFIG)
}

/// Its generation_config.json.
pub fn generation_config() -> Result<GenerationConfig> {
    let path = Path::new("<bundled generation_config.json>");
    GenerationConfig::from_bytes(path, GENERATION_CONFIG, config()?.vocab_size)
}

/// Its weights, used where they lie in the program.
pub fn weights() -> Result<WeightStore> {
    WeightStore::from_static(&WEIGHTS.0)
}

/// Its chat template.
pub fn chat_template() -> Result<Option<ChatTemplate>> {
    ChatTemplate::from_tokenizer_config(Path::new("<bundled tokenizer_config.json>"), TOKENIZER_CONFIG)
}

/// Its tokenizer.
pub fn tokenizer() -> Result<Tokenizer> {
    Tokenizer::from_bytes(Path::new("<bundled tokenizer.json>"), TOKENIZER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::TensorData;

    #[test]
    fn bundled_model_is_whole_and_in_place() {
        let config = config().unwrap();
        let weights = weights().unwrap();
        let shapes = config.tensor_shapes();
        assert_eq!(weights.names().count(), shapes.len());
        for (name, shape) in shapes {
            assert!(matches!(weights.get(&name, &shape).unwrap().data, TensorData::Static(_)), "{name}");
        }
        weights.check_finite().unwrap();
        assert_eq!(tokenizer().unwrap().vocab_size(), config.vocab_size);
        assert_eq!(generation_config().unwrap().eos_ids, [1]);
        assert_eq!(PROBLEMS_JSONL.lines().count(), 12);
        assert!(FEWSHOT_PREFIX.ends_with("\n\n"));
    }
}

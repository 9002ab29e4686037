//! The target `config` with a bug behind conditions that no input of the corpus meets together: is it found?
#![no_main]

use std::path::Path;

use rksc::model::family::{ModelConfig, RopeScaling};

libfuzzer_sys::fuzz_target!(init: rksc_fuzz::let_panics_be_caught(), |data: &[u8]| {
    rksc_fuzz::config(data);
    let Ok(model) = ModelConfig::from_bytes(Path::new("config.json"), data) else { return };
    if matches!(model.rope.scaling, RopeScaling::Yarn { .. }) {
        assert!(model.vocab_size <= 1000, "planted");
    }
});

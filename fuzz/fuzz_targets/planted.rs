//! The target `config` with a bug behind a value that no input of the corpus has: is it found?
#![no_main]

use std::path::Path;

use rksc::model::family::ModelConfig;

libfuzzer_sys::fuzz_target!(init: rksc_fuzz::let_panics_be_caught(), |data: &[u8]| {
    rksc_fuzz::config(data);
    let Ok(model) = ModelConfig::from_bytes(Path::new("config.json"), data) else { return };
    assert!(model.rms_norm_eps > 1e-12, "planted");
});

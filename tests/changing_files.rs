//! Weights that are read (`--no-mmap`) instead of mapped: what happens to their files then is nobody's crash.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::*;
use rksc::engine::Engine;
use rksc::model::weights::Access;
use rksc::{EngineConfig, ModelSource};
use tempfile::TempDir;

/// A copy of the bundled model whose files may be harmed.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model_file(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn weights(dir: &Path) -> std::path::PathBuf {
    dir.join("model.safetensors")
}

#[test]
fn what_was_read_stays_when_its_file_goes() {
    let dir = copy();
    let open = |access| {
        let model = ModelSource::Dir(dir.path().to_path_buf());
        Engine::open(EngineConfig { model, access, ..EngineConfig::default() }).unwrap()
    };
    let prompt = tokenizer().encode("Problem: Tom has 5 apples").unwrap();
    let tokens = |mut engine: Engine| {
        let branch = engine.prefill(&prompt, uncached()).unwrap();
        engine.start(branch, greedy_to_end()).unwrap();
        run_all(&mut engine);
        engine.tokens(branch).unwrap().to_vec()
    };
    let mapped = tokens(open(Access::Map));
    let read = open(Access::Read);
    std::fs::write(weights(dir.path()), b"somebody else's").unwrap();
    assert_eq!(tokens(read), mapped);
}

#[test]
fn a_file_that_is_cut_while_a_program_starts_is_an_error_at_most() {
    let whole = std::fs::read(model_file("model.safetensors")).unwrap();
    let dir = copy();
    let mut refused = 0;
    for round in 0..24u64 {
        std::fs::write(weights(dir.path()), &whole).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_rksc-run"))
            .args(["generate", "-m", ".", "-p", "x", "--max-new-tokens", "1", "--no-mmap"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(round * 500));
        let file = std::fs::OpenOptions::new().write(true).open(weights(dir.path())).unwrap();
        file.set_len(whole.len() as u64 / 2).unwrap();
        // Killed by a signal there would be no code.
        let code = child.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 2)), "round {round}: {code:?}");
        refused += usize::from(code == Some(2));
    }
    assert!(refused > 0, "every program was done before its file was cut");
}

//! What the fuzz targets run, without libFuzzer: `tests/fuzz_corpus.rs` of the engine includes this file too, and gives
//! every input of the corpus to the same functions.
//!
//! Each takes any bytes. Nothing may panic, and what loads keeps the laws that are asserted here.

mod config;
mod jsonl;
mod template;
mod tokenizer;
mod weights;

pub use config::config;
pub use jsonl::jsonl;
pub use template::template;
pub use tokenizer::tokenizer;
pub use weights::weights;

/// What takes an input.
pub type Target = fn(&[u8]);

/// Every target; the inputs of each lie in `corpus/<name>`.
pub const TARGETS: [(&str, Target); 5] =
    [("weights", weights), ("config", config), ("tokenizer", tokenizer), ("template", template), ("jsonl", jsonl)];

/// Up to the first `at`, and what is behind it.
fn split_once(data: &[u8], at: u8) -> (&[u8], &[u8]) {
    match data.iter().position(|&byte| byte == at) {
        Some(i) => (&data[..i], &data[i + 1..]),
        None => (data, &[]),
    }
}

/// The engine catches panics of the crates that read tokenizers and templates, and makes errors of them; libFuzzer's hook
/// would end the process before. With this one a panic that nobody catches still ends it, one step later.
pub fn let_panics_be_caught() {
    std::panic::set_hook(Box::new(|panic| {
        let foreign = |file: &str| ["/tokenizers-", "/minijinja-"].iter().any(|name| file.contains(name));
        if !panic.location().is_some_and(|at| foreign(at.file())) {
            eprintln!("{panic}");
        }
    }));
}

//! Chat: templates and tokenizers against transformers, conversations whose KV stays, the chat pack, the commands.

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod goldens;
mod hostile;
mod pack;
mod session;

use std::path::Path;

use common::path;
use rksc::chat::ChatTemplate;
use rksc::tokenizer::Tokenizer;
use serde_json::Value;

/// A file of tests/chat, as JSON.
fn json(relative: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path("tests/chat").join(relative)).unwrap()).unwrap()
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_file(&path(&format!("tests/chat/tokenizers/{name}.json"))).unwrap()
}

/// A template without special tokens.
fn template(source: &str) -> rksc::Result<ChatTemplate> {
    ChatTemplate::from_source(Path::new("t.jinja"), source, serde_json::Map::new())
}

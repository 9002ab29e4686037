//! Text to token ids and back.
//!
//! Encoding is the `tokenizers` crate behind a panic guard, because crafted tokenizer files make it panic. Decoding is
//! ours: every token's bytes are looked up in a table made once at load, so that a stream of tokens and the whole text
//! are the same bytes by construction ([`IncrementalDecoder`]), and one token costs what its bytes cost.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::{ModelWrapper, PostProcessorWrapper};

use crate::error::{Error, Result};
use crate::model::fields::read_small;

mod decode;
mod stop;

pub use decode::IncrementalDecoder;
use decode::TokenTable;
pub use stop::{StopMatcher, StopScanner};

/// Larger than the largest vocabulary in use by an order of magnitude.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A loaded tokenizer.json.
#[derive(Clone)]
pub struct Tokenizer {
    path: PathBuf,
    inner: Arc<tokenizers::Tokenizer>,
    table: Arc<TokenTable>,
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_bytes(path, &read_small(path, MAX_FILE_BYTES)?)
    }

    /// Reads the bytes of a tokenizer.json; `path` is what errors call it.
    ///
    /// Truncation, padding and post-processing in the file are dropped: the engine neither cuts prompts nor adds
    /// tokens that nobody asked for.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(Error::format(path, "this is a Git LFS pointer, not the tokenizer: run `git lfs pull`"));
        }
        let mut inner = guard(path, "loading", || tokenizers::Tokenizer::from_bytes(bytes))?;
        guard(path, "loading", || {
            inner.with_truncation(None)?;
            inner.with_padding(None).with_post_processor(None::<PostProcessorWrapper>);
            Ok(())
        })?;
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && let Some(dropout) = bpe.dropout.filter(|p| *p != 0.0)
        {
            let why = format!("model.dropout: {dropout} makes encoding random; set it to null");
            return Err(Error::format(path, why));
        }
        let table = guard(path, "loading", || Ok(TokenTable::new(path, &inner)))??;
        let this = Self { path: path.to_owned(), inner: Arc::new(inner), table: Arc::new(table) };
        // Some crafted files load and then panic on the first text they see: let that be now.
        this.encode("Step 1: 2 + 3 = 5.\n h\u{e9}llo \u{4f60}\u{597d} \u{1f600}")?;
        Ok(this)
    }

    /// Token ids of `text`. Adds no special tokens; recognises those that stand in the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guard(&self.path, "encoding", || self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of `text` as they are behind `context`: some tokenizers begin a text with a space of their own. Where a token
    /// would reach over the seam, those of `text` alone.
    pub fn encode_behind(&self, context: &str, text: &str) -> Result<Vec<u32>> {
        if !context.is_empty() {
            let before = self.encode(context)?;
            if let Some(behind) = self.encode(&format!("{context}{text}"))?.strip_prefix(before.as_slice()) {
                return Ok(behind.to_vec());
            }
        }
        self.encode(text)
    }

    /// Text of `ids`, special tokens included. Ids without a token are skipped, and bytes that are no UTF-8 become
    /// U+FFFD, both as transformers has it.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        decode_all(self.decoder(), ids)
    }

    /// Text of `ids` without special tokens such as end of text.
    pub fn decode_visible(&self, ids: &[u32]) -> Result<String> {
        decode_all(self.visible_decoder(), ids)
    }

    /// Decodes token by token, like [`decode`](Self::decode).
    pub fn decoder(&self) -> IncrementalDecoder {
        IncrementalDecoder::new(Arc::clone(&self.table), false)
    }

    /// Decodes token by token, like [`decode_visible`](Self::decode_visible).
    pub fn visible_decoder(&self) -> IncrementalDecoder {
        IncrementalDecoder::new(Arc::clone(&self.table), true)
    }

    /// The id of `text` if it is exactly one token, here and now (leading spaces count).
    pub fn single_token(&self, text: &str) -> Option<u32> {
        match self.encode(text).ok()?.as_slice() {
            [id] => Some(*id),
            _ => None,
        }
    }

    /// The id of an added token by its exact content, such as `<|eos|>`.
    pub fn token_id(&self, content: &str) -> Option<u32> {
        self.inner.token_to_id(content)
    }

    /// The bytes a token stands for; empty for ids without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// Whether the token is marked special, as end of text is.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} ids)", self.path.display(), self.vocab_size())
    }
}

fn decode_all(mut decoder: IncrementalDecoder, ids: &[u32]) -> Result<String> {
    let mut text = String::new();
    for &id in ids {
        text += &decoder.push(id)?;
    }
    text += &decoder.flush();
    Ok(text)
}

/// Runs a call into `tokenizers`, turning its errors and panics into [`Error::Format`].
fn guard<T>(path: &Path, doing: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::format(path, format!("{doing} failed: {e}"))),
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or(panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Error::format(path, format!("{doing} failed: the file makes the tokenizer panic ({what})")))
        }
    }
}

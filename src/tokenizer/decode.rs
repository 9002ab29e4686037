//! Tokens to bytes to text.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::error::{Error, Result};

/// A vocabulary whose ids go beyond this is a mistake or a trap.
const MAX_ID: u32 = 1 << 24;

/// The bytes of every token, in one piece of memory.
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// `bytes[starts[id]..starts[id + 1]]` is the token.
    starts: Vec<u32>,
    /// Ids marked special, sorted.
    special: Vec<u32>,
    /// Dropped from the front of a text: this string, at most so many times.
    strip_front: Option<(String, u32)>,
}

impl TokenTable {
    pub(super) fn new(path: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        let scheme = Scheme::of(path, tokenizer)?;
        let mut tokens: Vec<(u32, String)> = tokenizer.get_vocab(true).into_iter().map(|(t, id)| (id, t)).collect();
        tokens.sort_unstable();
        if tokens.is_empty() {
            return Err(Error::format(path, "model.vocab: empty"));
        }
        let mut table =
            Self { bytes: Vec::new(), starts: vec![0], special: Vec::new(), strip_front: scheme.strip_front() };
        for pair in tokens.windows(2) {
            if let [(a, first), (b, second)] = pair
                && a == b
            {
                let why = format!("model.vocab: id {a} stands for both {first:?} and {second:?}");
                return Err(Error::format(path, why));
            }
        }
        for (id, token) in tokens {
            if id >= MAX_ID {
                return Err(Error::format(path, format!("model.vocab: id {id} of {token:?} is over {MAX_ID}")));
            }
            // Ids without a token in between are empty.
            table.starts.resize(id as usize + 1, table.bytes.len() as u32);
            scheme.append_bytes(&token, &mut table.bytes);
            let end = u32::try_from(table.bytes.len())
                .map_err(|_| Error::format(path, "model.vocab: over 4 GiB of token text"))?;
            table.starts.push(end);
        }
        let added = tokenizer.get_added_tokens_decoder();
        table.special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        table.special.sort_unstable();
        Ok(table)
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..).and_then(|s| s.first_chunk()) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            None => &[],
        }
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }
}

/// How a token's spelling in the vocabulary stands for bytes: the two ways in use among causal language models.
enum Scheme {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: a mark for the space, `<0xE2>` for bytes outside the vocabulary.
    SentencePiece { replace: Vec<(String, String)>, byte_fallback: bool, strip_front: Option<(String, u32)> },
}

impl Scheme {
    fn of(path: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        let decoder =
            serde_json::to_value(tokenizer.get_decoder()).map_err(|e| Error::format(path, format!("decoder: {e}")))?;
        Self::from_json(&decoder).map_err(|what| {
            let supported = "supported: ByteLevel, or a Sequence of Replace, ByteFallback, Fuse and Strip";
            Error::format(path, format!("decoder: {what} is not supported ({supported})"))
        })
    }

    fn from_json(decoder: &Value) -> Result<Self, String> {
        let steps = match decoder["type"].as_str() {
            None => return Err("none".to_owned()),
            Some("Sequence") => decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice),
            Some(_) => std::slice::from_ref(decoder),
        };
        if let [step] = steps
            && step["type"] == "ByteLevel"
        {
            return Ok(Self::ByteLevel);
        }
        let (mut replace, mut byte_fallback, mut fused, mut strip_front) = (Vec::new(), false, false, None);
        for step in steps {
            match (step["type"].as_str(), fused) {
                (Some("Replace"), false) if !byte_fallback => {
                    let (Some(from), Some(to)) = (step["pattern"]["String"].as_str(), step["content"].as_str()) else {
                        return Err("Replace with a regular expression".to_owned());
                    };
                    if from.is_empty() {
                        return Err("Replace of an empty string".to_owned());
                    }
                    replace.push((from.to_owned(), to.to_owned()));
                }
                (Some("ByteFallback"), false) => byte_fallback = true,
                (Some("Fuse"), _) => fused = true,
                (Some("Strip"), true) if step["stop"] == 0 && strip_front.is_none() => {
                    let start = step["start"].as_u64().and_then(|n| u32::try_from(n).ok());
                    let (Some(content), Some(start)) = (step["content"].as_str(), start) else {
                        return Err(format!("Strip {step}"));
                    };
                    strip_front = Some((content.to_owned(), start));
                }
                (kind, _) => return Err(format!("{} at this place", kind.unwrap_or("a step without type"))),
            }
        }
        if steps.is_empty() || !fused {
            return Err("a sequence without Fuse".to_owned());
        }
        Ok(Self::SentencePiece { replace, byte_fallback, strip_front })
    }

    fn strip_front(&self) -> Option<(String, u32)> {
        match self {
            Self::ByteLevel => None,
            Self::SentencePiece { strip_front, .. } => strip_front.clone(),
        }
    }

    fn append_bytes(&self, token: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                // A token with any character outside the alphabet (an added token) stands for itself.
                let start = out.len();
                for c in token.chars() {
                    let Some(byte) = byte_of(c) else {
                        out.truncate(start);
                        out.extend_from_slice(token.as_bytes());
                        return;
                    };
                    out.push(byte);
                }
            }
            Self::SentencePiece { replace, byte_fallback, .. } => {
                let mut text = token.to_owned();
                for (from, to) in replace {
                    text = text.replace(from, to);
                }
                match text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')) {
                    Some(hex) if *byte_fallback && hex.len() == 2 => match u8::from_str_radix(hex, 16) {
                        Ok(byte) => out.push(byte),
                        Err(_) => out.extend_from_slice(text.as_bytes()),
                    },
                    _ => out.extend_from_slice(text.as_bytes()),
                }
            }
        }
    }
}

/// The byte a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the 68 others follow from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Turns tokens into text one at a time, never showing half a character.
///
/// What was pushed out plus [`flush`](Self::flush) is the text of all tokens, exactly. It holds back at most three
/// bytes and clones cheaply, so a forked branch simply clones it.
#[derive(Clone)]
pub struct IncrementalDecoder {
    table: Arc<TokenTable>,
    skip_special: bool,
    /// The beginning of a character.
    held: Vec<u8>,
    /// How many more [`TokenTable::strip_front`] may go.
    strip_left: u32,
}

impl IncrementalDecoder {
    pub(super) fn new(table: Arc<TokenTable>, skip_special: bool) -> Self {
        let strip_left = table.strip_front.as_ref().map_or(0, |(_, times)| *times);
        Self { table, skip_special, held: Vec::new(), strip_left }
    }

    /// The characters that `id` completes. Bytes that can no longer become a character show as U+FFFD.
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.skip_special && self.table.is_special(id) {
            return Ok(String::new());
        }
        self.held.extend_from_slice(self.table.bytes(id));
        let mut text = String::with_capacity(self.held.len());
        let mut used = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            let bad = chunk.invalid();
            if used + bad.len() == self.held.len() && is_beginning(bad) {
                break;
            }
            if !bad.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                used += bad.len();
            }
        }
        self.held.drain(..used);
        Ok(self.strip(text))
    }

    /// What is held back, when no more tokens come: U+FFFD for half a character, else nothing.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        self.strip(text)
    }

    fn strip(&mut self, mut text: String) -> String {
        let Some((content, _)) = &self.table.strip_front else { return text };
        while self.strip_left > 0 && !text.is_empty() {
            match text.strip_prefix(content.as_str()) {
                Some(rest) => {
                    text = rest.to_owned();
                    self.strip_left -= 1;
                }
                None => self.strip_left = 0,
            }
        }
        text
    }
}

impl std::fmt::Debug for IncrementalDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IncrementalDecoder({} bytes held)", self.held.len())
    }
}

/// Whether more bytes could make these a character.
fn is_beginning(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.valid_up_to() == 0 && e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('\u{120}'), byte_of('\u{10a}'), byte_of(' ')), (Some(b' '), Some(b'\n'), None));
    }
}

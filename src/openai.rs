//! Requests and answers in the shape of OpenAI's API, as its batch files hold them: one JSON object a line, told apart by
//! `custom_id`.
//!
//! ```text
//! {"custom_id", "method", "url", "body"} - Line - Request - (branches) - Reply - {"id", "custom_id", "response", "error"}
//! ```
//!
//! A field that asks for something is honoured, or its line is refused with the field's name; only fields that say who
//! asks, and for which model, are passed over.

mod reply;
mod request;

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

pub use reply::{Reply, ReplyChoice, ReplyToken, Usage, refusal};
pub use request::{Prompt, Request};

use crate::error::{Error, Result};
use crate::model::fields::json_why;
use crate::sampler::child_path;

/// What a line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`: messages in, a message out.
    Chat,
    /// `/v1/completions`: text or tokens in, text out.
    Completions,
}

/// A line of a batch file. What is wrong with its request is the line's own affair, and its answer says so.
#[derive(Debug)]
pub struct Line {
    /// Its name in the answers.
    pub custom_id: String,
    /// Where it is sent, and what it asks; or the field that is refused, and why.
    pub request: Result<(Endpoint, Request)>,
}

#[derive(Deserialize)]
struct RawLine {
    custom_id: Option<String>,
    method: Option<String>,
    url: Option<String>,
    body: Option<Map<String, Value>>,
}

/// Reads the lines of a batch file; `path` is for messages, blank lines are skipped. The first line that is no JSON object
/// with a `custom_id` of its own is refused with its number.
pub fn parse_lines(path: &Path, bytes: &[u8]) -> Result<Vec<Line>> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::format(path, format!("not UTF-8: {e}")))?;
    let mut seen = HashSet::new();
    let mut lines = Vec::new();
    for (i, line) in text.strip_prefix('\u{feff}').unwrap_or(text).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |why: String| Error::format(path, format!("line {}: {why}", i + 1));
        let raw: RawLine = serde_json::from_str(line).map_err(|e| bad(json_why(line.as_bytes(), &e)))?;
        let custom_id = raw.custom_id.clone().filter(|id| !id.is_empty());
        let custom_id = custom_id.ok_or_else(|| bad("needs a \"custom_id\", by which its answer is found".into()))?;
        if !seen.insert(custom_id.clone()) {
            return Err(bad(format!("custom_id {custom_id:?} appears twice")));
        }
        lines.push(Line { custom_id, request: raw.request() });
    }
    if lines.is_empty() {
        return Err(Error::format(path, "holds no lines; each is {\"custom_id\", \"method\", \"url\", \"body\"}"));
    }
    Ok(lines)
}

impl RawLine {
    fn request(self) -> Result<(Endpoint, Request)> {
        if self.method.as_deref() != Some("POST") {
            return Err(Error::config("method", "must be POST"));
        }
        let endpoint = match self.url.as_deref() {
            Some("/v1/chat/completions") => Endpoint::Chat,
            Some("/v1/completions") => Endpoint::Completions,
            _ => return Err(Error::config("url", "must be /v1/chat/completions or /v1/completions")),
        };
        let body = self.body.ok_or_else(|| Error::config("body", "is missing"))?;
        Ok((endpoint, Request::parse(endpoint, body)?))
    }
}

/// The seed of a line that gives none: its own, and the same whenever the line is answered.
pub fn seed_of(run_seed: u64, custom_id: &str) -> u64 {
    custom_id.bytes().fold(run_seed, |seed, byte| child_path(seed, u64::from(byte)))
}

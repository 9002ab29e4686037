//! Conversations with any chat model: its own template renders them, and the engine keeps their KV from turn to turn.
//!
//! ```text
//! messages - ChatTemplate - text - tokens - Session (what the branch holds already stays) - Engine
//!                                                                    reply - ReplySplitter - reasoning | content
//! ```

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::fields::{json_why, read_small};

mod dumps;
mod python;
mod session;
mod template;
mod thinking;

pub use session::{Placement, Session};
pub use template::{ChatTemplate, RenderOptions};
pub use thinking::{ReplyPart, ReplySplitter, ThinkTags};

/// More than any conversation that a context holds.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The names under which templates look for a reply's reasoning; the first is ours.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a conversation. Fields beside `role` and `content` reach the template as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said. Absent and `null` are two things to a template.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub content: Option<Content>,
    /// Everything else, such as `tool_calls`.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The content of a [`Message`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text in parts.
    Parts(Vec<TextPart>),
    /// `null`, as beside tool calls.
    Null,
}

/// A part of a [`Content`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextPart {
    /// `text`: others are refused.
    #[serde(rename = "type")]
    pub kind: TextKind,
    /// The text.
    pub text: String,
}

/// The kinds of parts that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextKind {
    /// Text.
    Text,
}

fn present<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Option<Content>, D::Error> {
    Content::deserialize(from).map(Some)
}

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(text.into())), extra: Map::new() }
    }

    /// A user's message.
    pub fn user(text: impl Into<String>) -> Self {
        Self::new("user", text)
    }

    /// The system's message.
    pub fn system(text: impl Into<String>) -> Self {
        Self::new("system", text)
    }

    /// A model's reply; empty reasoning is none.
    pub fn assistant(content: impl Into<String>, reasoning: &str) -> Self {
        let mut message = Self::new("assistant", content);
        if !reasoning.is_empty() {
            message.extra.insert(REASONING_FIELDS[0].into(), reasoning.into());
        }
        message
    }

    /// The plain text of the content; parts follow each other.
    pub fn text(&self) -> String {
        match &self.content {
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => parts.iter().map(|p| p.text.as_str()).collect(),
            Some(Content::Null) | None => String::new(),
        }
    }

    /// As a template sees it: reasoning goes by all the names in use.
    fn for_template(&self) -> Self {
        let mut message = self.clone();
        let reasoning = REASONING_FIELDS.iter().find_map(|&f| self.extra.get(f).filter(|v| !v.is_null()));
        if let Some(reasoning) = reasoning {
            message.extra.entry(REASONING_FIELDS[1]).or_insert_with(|| reasoning.clone());
            message.extra.insert(REASONING_FIELDS[0].into(), reasoning.clone());
        }
        message
    }
}

/// A file of messages: a list of them, or an object with `messages` and `tools`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MessageFile {
    /// The messages.
    pub messages: Vec<Message>,
    /// Tools for the template.
    pub tools: Option<Value>,
}

impl MessageFile {
    /// Reads a file; every complaint names the line.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_bytes(path, &read_small(path, MAX_FILE_BYTES)?)
    }

    /// As [`read`](Self::read), for bytes at hand; `path` is for messages.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            messages: Vec<Message>,
            #[serde(default)]
            tools: Option<Value>,
        }
        let bad = |e: serde_json::Error| Error::format(path, json_why(bytes, &e));
        // By the first character, so that a complaint is about what was meant.
        if bytes.trim_ascii_start().starts_with(b"{") {
            let Object { messages, tools } = serde_json::from_slice(bytes).map_err(bad)?;
            return Ok(Self { messages, tools });
        }
        Ok(Self { messages: serde_json::from_slice(bytes).map_err(bad)?, tools: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<MessageFile> {
        MessageFile::from_bytes(Path::new("m.json"), text.as_bytes())
    }

    #[test]
    fn messages_keep_every_field_and_what_is_absent_stays_absent() {
        let text = r#"[{"role":"user","content":"hi","name":"bob"},{"role":"assistant","content":null,"tool_calls":[1]},
            {"role":"tool","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},{"role":"x"}]"#;
        let file = read(text).unwrap();
        let back = serde_json::to_value(&file.messages).unwrap();
        assert_eq!(back, serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(file.messages.iter().map(Message::text).collect::<Vec<_>>(), ["hi", "", "ab", ""]);
        assert_eq!((&file.messages[1].content, &file.messages[3].content), (&Some(Content::Null), &None));
    }

    #[test]
    fn a_bad_file_is_refused_by_line() {
        assert!(read(r#"{"messages":[],"tools":[{}]}"#).unwrap().tools.is_some());
        for (text, what) in [
            ("[{\"role\":\n1}]", "line 2"),
            (r#"{"message":[]}"#, "unknown field `message`"),
            (r#"[{"content":"x"}]"#, "missing field `role`"),
            (r#"[{"role":"user","content":[{"type":"image","text":""}]}]"#, "m.json"),
            ("", "the file is empty"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn reasoning_goes_by_every_name_a_template_may_use() {
        let seen = Message::assistant("a", "because").for_template();
        assert_eq!((&seen.extra["reasoning_content"], &seen.extra["thinking"]), (&"because".into(), &"because".into()));
        assert!(Message::assistant("a", "").for_template().extra.is_empty());
    }
}

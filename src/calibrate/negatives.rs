//! Hard negatives: pairs of questions that look alike and are not the same, `{"id", "kind", "question", "other"}` a line.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::prompts::same_answer;

/// Two questions that must not become one, unless they differ in a name alone (kind `name`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Negative {
    /// What differs: `number`, `operation`, `name`, `other`, or the file's own word.
    pub kind: String,
    /// One of them.
    pub question: String,
    /// The other.
    pub other: String,
    /// The answer to the one, if the file says so.
    #[serde(default)]
    pub answer: Option<serde_json::Value>,
    /// The answer to the other.
    #[serde(default)]
    pub other_answer: Option<serde_json::Value>,
}

impl Negative {
    /// Whether one answer is wrong for the other; without answers they are taken to differ.
    pub fn answers_differ(&self) -> bool {
        let text = |v: &Option<serde_json::Value>| {
            v.as_ref().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_string))
        };
        match (text(&self.answer), text(&self.other_answer)) {
            (Some(a), Some(b)) => !same_answer(&a, &b),
            _ => true,
        }
    }
}

/// Parses such a file; `path` is for messages. The first bad line is refused with its number; blank lines are skipped.
pub fn parse_negatives(path: &Path, bytes: &[u8]) -> Result<Vec<Negative>> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::format(path, format!("not UTF-8: {e}")))?;
    let mut negatives = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |why: String| Error::format(path, format!("line {}: {why}", i + 1));
        let negative: Negative = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        for (field, text) in [("question", &negative.question), ("other", &negative.other)] {
            if text.trim().is_empty() {
                return Err(bad(format!("field {field} is empty")));
            }
        }
        negatives.push(negative);
    }
    if negatives.is_empty() {
        return Err(Error::format(path, "holds no pairs; each line is {\"kind\", \"question\", \"other\"}"));
    }
    Ok(negatives)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_read_and_bad_lines_refused() {
        let parse = |text: &str| parse_negatives(Path::new("n.jsonl"), text.as_bytes());
        let line = r#"{"id": "x", "kind": "number", "question": "a 1", "other": "a 2", "answer": 3}"#;
        let pairs = parse(&format!("{line}\n\n")).unwrap();
        assert_eq!((pairs.len(), pairs[0].kind.as_str(), pairs[0].other.as_str()), (1, "number", "a 2"));
        assert!(pairs[0].answers_differ(), "nobody says otherwise");
        let both = |other: &str| {
            let ends = format!(r#", "answer": 3, "other_answer": {other}}}"#);
            parse(&line.replace(r#", "answer": 3}"#, &ends)).unwrap()[0].answers_differ()
        };
        assert!(both("4") && !both("\"3\""));
        for (text, expected) in [
            ("", "holds no pairs"),
            ("{\"kind\": \"name\", \"question\": \"q\"}", "line 1: missing field `other`"),
            ("{\"kind\": \"name\", \"question\": \" \", \"other\": \"q\"}", "line 1: field question is empty"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.starts_with("n.jsonl: ") && message.contains(expected), "{message}");
        }
    }
}

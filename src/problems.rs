//! Problem files: one JSON object a line, `{"id", "question", "answer"?, "paraphrases"?}`; other fields are ignored.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// A problem to solve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Unique within its file.
    pub id: String,
    /// The question as it goes into the prompt.
    pub question: String,
    /// The expected answer, if known.
    pub answer: Option<String>,
    /// Other wordings of the same question.
    pub paraphrases: Vec<String>,
}

#[derive(Deserialize)]
struct Line {
    id: Option<Value>,
    question: Option<String>,
    answer: Option<Value>,
    paraphrases: Option<Vec<String>>,
}

/// Reads a problem file. The first bad line is refused with its number; blank lines are skipped.
pub fn read_problems(path: &Path) -> Result<Vec<Problem>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    parse_problems(path, &bytes)
}

/// As [`read_problems`], for bytes at hand; `path` is for messages.
pub fn parse_problems(path: &Path, bytes: &[u8]) -> Result<Vec<Problem>> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::format(path, format!("not UTF-8: {e}")))?;
    let mut seen = std::collections::HashSet::new();
    let mut problems = Vec::new();
    for (i, line) in text.strip_prefix('\u{feff}').unwrap_or(text).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |why: String| Error::format(path, format!("line {}: {why}", i + 1));
        let problem = parse_line(line, i + 1).map_err(bad)?;
        if !seen.insert(problem.id.clone()) {
            return Err(bad(format!("id {:?} appears twice", problem.id)));
        }
        problems.push(problem);
    }
    if problems.is_empty() {
        return Err(Error::format(path, "holds no problems; each line is {\"id\", \"question\", \"answer\"?}"));
    }
    Ok(problems)
}

fn parse_line(line: &str, number: usize) -> std::result::Result<Problem, String> {
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let scalar = |field: &str, value: Option<Value>| match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(Value::Number(n)) => Ok(Some(n.to_string())),
        Some(_) => Err(format!("field {field}: expected a string or a number")),
    };
    let question = line.question.ok_or("field question is missing")?;
    if question.trim().is_empty() {
        return Err("field question is empty".into());
    }
    Ok(Problem {
        id: scalar("id", line.id)?.unwrap_or_else(|| format!("line-{number}")),
        question,
        answer: scalar("answer", line.answer)?,
        paraphrases: line.paraphrases.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Problem>> {
        parse_problems(Path::new("p.jsonl"), text.as_bytes())
    }

    #[test]
    fn lines_with_numbers_and_extra_fields_are_read() {
        let problems =
            parse("\n{\"id\":7,\"question\":\"q\",\"answer\":18,\"n_ops\":2}\n{\"question\":\"r\"}\n").unwrap();
        assert_eq!((problems[0].id.as_str(), problems[0].answer.as_deref()), ("7", Some("18")));
        assert_eq!(problems[1].id, "line-3");
    }

    #[test]
    fn bad_lines_are_refused_with_file_line_and_field() {
        for (text, expected) in [
            ("", "holds no problems"),
            ("{\"question\":", "line 1"),
            ("{\"id\":\"a\"}", "field question is missing"),
            ("{\"question\":\" \"}", "field question is empty"),
            ("{\"question\":\"q\",\"answer\":[1]}", "field answer"),
            ("{\"id\":1,\"question\":\"q\"}\n{\"id\":1,\"question\":\"q\"}", "line 2: id \"1\" appears twice"),
            ("[1]", "line 1"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.starts_with("p.jsonl: ") && message.contains(expected), "{text:?}: {message}");
        }
    }
}

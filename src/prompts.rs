//! Prompt packs: everything a task says, as data. `prompts.json` lies beside the model; no such text stands in code.

use std::path::Path;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

mod turns;

pub use turns::ChatTurns;

/// The texts of a task. `{question}`, `{number}`, `{approach}` and `{solution}` are filled in where they appear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptPack {
    /// A name for reports.
    pub name: String,
    /// Opens every prompt (a begin-of-text token, spelled as text); may be empty.
    #[serde(default)]
    pub begin: String,
    /// The problem. Needs `{question}`.
    pub problem: String,
    /// What sets a branch on its way. Needs `{approach}`; `{number}` counts from 1.
    pub approach: String,
    /// One per branch.
    pub approaches: Vec<String>,
    /// Asks for the verdict behind a branch's own solution.
    pub verify_suffix: String,
    /// Asks for the verdict in a prompt of its own. Needs `{question}` and `{proposal}`.
    pub verify_fresh: String,
    /// How a solution is proposed there. Needs `{solution}`.
    pub proposal: String,
    /// Spellings of yes; each must be one token.
    pub yes: Vec<String>,
    /// Spellings of no; each must be one token.
    pub no: Vec<String>,
    /// Regular expression whose first group is the answer; its last match in a solution counts.
    pub answer_pattern: String,
    /// What ends a step.
    pub step_delimiter: String,
    /// Strings that end a solution, besides the model's end tokens.
    #[serde(default)]
    pub stops: Vec<String>,
    /// Elicits the answer behind a step, for `--decode-exit trial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trial: Option<String>,
    /// For a chat model: the texts are what a user says, and the model's template makes turns of them. The spellings of
    /// yes and no are then alternatives, of which one at least must be a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatTurns>,
}

impl PromptPack {
    /// Reads and checks a pack; every complaint names the field.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(path, &bytes)
    }

    /// As [`from_file`](Self::from_file), for bytes at hand; `path` is for messages.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let pack: Self = serde_json::from_slice(bytes).map_err(|e| Error::format(path, e.to_string()))?;
        pack.check().map_err(|why| Error::format(path, why))?;
        Ok(pack)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let needs = |field: &str, text: &str, key: &str| {
            if text.contains(key) { Ok(()) } else { Err(format!("field {field}: needs {key}")) }
        };
        needs("problem", &self.problem, "{question}")?;
        needs("approach", &self.approach, "{approach}")?;
        needs("verify_fresh", &self.verify_fresh, "{question}")?;
        needs("verify_fresh", &self.verify_fresh, "{proposal}")?;
        needs("proposal", &self.proposal, "{solution}")?;
        for (field, list) in [("approaches", &self.approaches), ("yes", &self.yes), ("no", &self.no)] {
            if list.is_empty() {
                return Err(format!("field {field}: needs at least one entry"));
            }
        }
        if self.chat.is_some() && !self.begin.is_empty() {
            return Err("field begin: the chat template opens every prompt; leave the field out".into());
        }
        if self.stops.iter().any(String::is_empty) {
            return Err("field stops: an empty string would end everything".into());
        }
        if self.trial.as_ref().is_some_and(String::is_empty) {
            return Err("field trial: an empty string elicits nothing; leave the field out".into());
        }
        self.answer_regex()?;
        Ok(())
    }

    fn answer_regex(&self) -> std::result::Result<Regex, String> {
        let regex = Regex::new(&self.answer_pattern).map_err(|e| {
            // Its message draws the pattern over several lines; the last says what is wrong.
            let text = e.to_string();
            let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            format!("field answer_pattern: {why}")
        })?;
        if regex.captures_len() < 2 {
            return Err("field answer_pattern: needs a group around the answer".into());
        }
        Ok(regex)
    }

    /// Finds answers as this pack spells them.
    pub fn answer_finder(&self) -> Result<AnswerFinder> {
        self.answer_regex().map(AnswerFinder).map_err(|why| Error::config("prompts", why))
    }

    /// The text up to the fork: `begin`, an optional few-shot prefix, the problem.
    pub fn root(&self, prefix: &str, question: &str) -> String {
        format!("{}{prefix}{}", self.begin, fill(&self.problem, &[("{question}", question)]))
    }

    /// The text of branch `idx`, counted from 0. `None` when the pack has no such approach.
    pub fn branch(&self, idx: usize) -> Option<String> {
        let approach = self.approaches.get(idx)?;
        Some(fill(&self.approach, &[("{number}", &(idx + 1).to_string()), ("{approach}", approach)]))
    }

    /// A verification prompt that stands alone.
    pub fn fresh(&self, question: &str, solution: &str) -> String {
        let proposal = fill(&self.proposal, &[("{solution}", solution)]);
        format!("{}{}", self.begin, fill(&self.verify_fresh, &[("{question}", question), ("{proposal}", &proposal)]))
    }
}

/// Replaces each key once, left to right in the template; filled-in text is never searched again.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((at, key, value)) =
        values.iter().filter_map(|(key, value)| rest.find(key).map(|at| (at, *key, *value))).min_by_key(|x| x.0)
    {
        out.push_str(&rest[..at]);
        out.push_str(value);
        rest = &rest[at + key.len()..];
    }
    out + rest
}

/// Extracts answers from solutions.
#[derive(Clone, Debug)]
pub struct AnswerFinder(Regex);

impl AnswerFinder {
    /// The last answer in `text`.
    pub fn find(&self, text: &str) -> Option<String> {
        let last = self.0.captures_iter(text).last()?;
        last.get(1).map(|m| m.as_str().trim().to_string())
    }
}

/// Answers are equal as text or as numbers.
pub fn same_answer(a: &str, b: &str) -> bool {
    let number = |s: &str| s.trim().replace(',', "").parse::<f64>().ok();
    a.trim() == b.trim() || matches!((number(a), number(b)), (Some(x), Some(y)) if x == y)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack() -> PromptPack {
        PromptPack {
            name: "t".into(),
            begin: "<s>".into(),
            problem: "Q: {question}".into(),
            approach: "\n{number}) {approach}".into(),
            approaches: vec!["a {question}".into(), "b".into()],
            verify_suffix: "?".into(),
            verify_fresh: "{question}|{proposal}?".into(),
            proposal: "S:{solution}".into(),
            yes: vec!["y".into()],
            no: vec!["n".into()],
            answer_pattern: "= (-?[0-9]+)".into(),
            step_delimiter: "\n".into(),
            stops: vec![],
            trial: None,
            chat: None,
        }
    }

    #[test]
    fn texts_are_filled_once_and_never_searched_again() {
        let p = pack();
        assert_eq!(p.root("few ", "{question}?"), "<s>few Q: {question}?");
        assert_eq!(p.branch(0).unwrap(), "\n1) a {question}");
        assert_eq!(p.branch(2), None);
        assert_eq!(p.fresh("{proposal}", "{question}"), "<s>{proposal}|S:{question}?");
    }

    #[test]
    fn the_last_answer_counts_and_numbers_compare_as_numbers() {
        let finder = pack().answer_finder().unwrap();
        assert_eq!(finder.find("1+1 = 2, 2+2 = 4."), Some("4".into()));
        assert_eq!(finder.find("none"), None);
        assert!(same_answer("18", "18.0") && same_answer(" x", "x") && !same_answer("1", "2"));
    }

    #[test]
    fn a_bad_pack_is_refused_by_field() {
        let complaint = |f: fn(&mut PromptPack)| {
            let mut p = pack();
            f(&mut p);
            PromptPack::from_bytes(Path::new("p.json"), &serde_json::to_vec(&p).unwrap()).unwrap_err().to_string()
        };
        assert!(complaint(|p| p.problem = "x".into()).contains("field problem: needs {question}"));
        assert!(complaint(|p| p.yes.clear()).contains("field yes"));
        assert!(complaint(|p| p.answer_pattern = "(".into()).contains("field answer_pattern"));
        assert!(complaint(|p| p.answer_pattern = "x".into()).contains("group"));
        assert!(complaint(|p| p.stops.push(String::new())).contains("field stops"));
        assert!(complaint(|p| p.trial = Some(String::new())).contains("field trial"));
        assert!(complaint(|p| p.chat = Some(ChatTurns::default())).contains("field begin"));
    }
}

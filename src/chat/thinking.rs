//! Which part of a reply is reasoning.

use super::template::ChatTemplate;
use crate::tokenizer::{StopMatcher, Tokenizer};

/// The tags in use among reasoning models.
const KNOWN_TAGS: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
];

/// The tags around a model's reasoning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinkTags {
    /// Opens a block.
    pub open: String,
    /// Closes it.
    pub close: String,
}

impl ThinkTags {
    /// The tags of a model: those that its template speaks of, or that are tokens of their own. `None` for models that do
    /// not think aloud.
    pub fn of(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<Self> {
        let (open, close) = KNOWN_TAGS.into_iter().find(|(open, close)| {
            let are_tokens = tokenizer.token_id(open).is_some() && tokenizer.token_id(close).is_some();
            template.source().contains(close) || are_tokens
        })?;
        Some(Self { open: open.into(), close: close.into() })
    }

    /// The tags that are special tokens, which a decoder of visible text leaves out, with their texts.
    pub fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<(u32, String)> {
        let special = |text: &String| tokenizer.token_id(text).filter(|&id| tokenizer.is_special(id));
        [&self.open, &self.close].into_iter().filter_map(|text| Some((special(text)?, text.clone()))).collect()
    }

    /// Whether a prompt ends by opening a block, which the reply then goes on with. A tag that a message speaks of opens
    /// nothing.
    pub fn is_open(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(&self.open)
    }
}

/// A piece of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyPart {
    /// Said to itself.
    Reasoning(String),
    /// Said.
    Content(String),
}

#[derive(Clone, Debug)]
enum Place {
    /// Nothing but white space so far.
    Start,
    Reasoning,
    Content,
}

/// Splits a stream of text into reasoning and content. A block counts where a reply begins with it; what a reply says of
/// tags later is content. Tags belong to neither part, nor does the white space around them.
#[derive(Clone, Debug)]
pub struct ReplySplitter {
    tags: Option<ThinkTags>,
    place: Place,
    /// At the start: the text so far. Inside a block: white space that may be its last.
    held: String,
    close: StopMatcher,
    /// Where a part has begun and only white space has come.
    is_fresh: bool,
    has_thought: bool,
}

impl ReplySplitter {
    /// For a model with these tags; `is_open` when the prompt has opened a block.
    pub fn new(tags: Option<ThinkTags>, is_open: bool) -> Self {
        let close = StopMatcher::new(tags.iter().map(|t| t.close.clone()).collect());
        let place = match (&tags, is_open) {
            (None, _) => Place::Content,
            (Some(_), true) => Place::Reasoning,
            (Some(_), false) => Place::Start,
        };
        let has_thought = matches!(place, Place::Reasoning);
        Self { tags, place, held: String::new(), close, is_fresh: true, has_thought }
    }

    /// Takes the next text; returns what it adds to either part.
    pub fn push(&mut self, text: &str) -> Vec<ReplyPart> {
        let mut parts = Vec::new();
        self.take(text, &mut parts);
        parts
    }

    /// What was held back, when no more text comes. A block that was not closed stays reasoning.
    pub fn finish(&mut self) -> Vec<ReplyPart> {
        let mut parts = Vec::new();
        match self.place {
            Place::Start => {
                let held = std::mem::take(&mut self.held);
                self.place = Place::Content;
                self.take(&held, &mut parts);
            }
            Place::Reasoning => {
                let rest = self.close.flush();
                self.reason(&rest, &mut parts);
            }
            Place::Content => {}
        }
        self.held.clear();
        parts
    }

    fn take(&mut self, text: &str, parts: &mut Vec<ReplyPart>) {
        match self.place {
            Place::Start => self.take_start(text, parts),
            Place::Reasoning => {
                // What stands behind the tag is content: the matcher shows nothing of it.
                let pending = format!("{}{text}", self.close.flush());
                let close = self.tags.as_ref().map(|t| t.close.clone()).unwrap_or_default();
                match pending.find(&close).filter(|_| !close.is_empty()) {
                    Some(at) => {
                        self.reason(&pending[..at], parts);
                        self.held.clear();
                        self.place = Place::Content;
                        self.is_fresh = true;
                        self.take(&pending[at + close.len()..], parts);
                    }
                    None => {
                        let (shown, _) = self.close.push(&pending);
                        self.reason(&shown, parts);
                    }
                }
            }
            Place::Content => {
                let text = if self.is_fresh && self.has_thought { text.trim_start() } else { text };
                if !text.is_empty() {
                    self.is_fresh = false;
                    parts.push(ReplyPart::Content(text.to_owned()));
                }
            }
        }
    }

    fn take_start(&mut self, text: &str, parts: &mut Vec<ReplyPart>) {
        self.held.push_str(text);
        let open = self.tags.as_ref().map(|t| t.open.clone()).unwrap_or_default();
        let said = self.held.trim_start();
        if let Some(rest) = said.strip_prefix(&open) {
            let rest = rest.to_owned();
            self.held.clear();
            (self.place, self.has_thought) = (Place::Reasoning, true);
            self.take(&rest, parts);
        } else if !open.starts_with(said) {
            let held = std::mem::take(&mut self.held);
            self.place = Place::Content;
            self.take(&held, parts);
        }
    }

    /// Reasoning without the white space at its two ends.
    fn reason(&mut self, text: &str, parts: &mut Vec<ReplyPart>) {
        self.held.push_str(text);
        let all = std::mem::take(&mut self.held);
        let all = if self.is_fresh { all.trim_start() } else { &all };
        let said = all.trim_end();
        self.held = all[said.len()..].to_owned();
        if !said.is_empty() {
            self.is_fresh = false;
            parts.push(ReplyPart::Reasoning(said.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags() -> Option<ThinkTags> {
        Some(ThinkTags { open: "<think>".into(), close: "</think>".into() })
    }

    /// (reasoning, content) of a text that comes in pieces of `size` characters.
    fn split(text: &str, is_open: bool, size: usize) -> (String, String) {
        let mut splitter = ReplySplitter::new(tags(), is_open);
        let chars: Vec<char> = text.chars().collect();
        let mut parts: Vec<ReplyPart> = Vec::new();
        for piece in chars.chunks(size) {
            parts.extend(splitter.push(&piece.iter().collect::<String>()));
        }
        parts.extend(splitter.finish());
        let mut both = (String::new(), String::new());
        for part in parts {
            match part {
                ReplyPart::Reasoning(text) => both.0 += &text,
                ReplyPart::Content(text) => both.1 += &text,
            }
        }
        both
    }

    #[test]
    fn a_reply_splits_the_same_however_it_is_cut() {
        let cases = [
            ("<think>\na b\n\nc\n</think>\n\nFour.\n", false, ("a b\n\nc", "Four.\n")),
            ("\n<think></think>x", false, ("", "x")),
            ("a < b\n</think>\n\n</think> é", true, ("a < b", "</think> é")),
            (" plain <think>no</think>", false, ("", " plain <think>no</think>")),
            ("<thin", false, ("", "<thin")),
            ("<think>é cut </thi", false, ("é cut </thi", "")),
            ("still \n", true, ("still", "")),
            ("", false, ("", "")),
        ];
        for (text, is_open, (reasoning, content)) in cases {
            for size in 1..=text.chars().count().max(1) {
                assert_eq!(split(text, is_open, size), (reasoning.into(), content.into()), "{text:?} by {size}");
            }
        }
    }

    #[test]
    fn without_tags_everything_is_content_at_once() {
        let mut splitter = ReplySplitter::new(None, true);
        assert_eq!(splitter.push(" <think>"), [ReplyPart::Content(" <think>".into())]);
        assert!(splitter.finish().is_empty());
    }

    #[test]
    fn a_prompt_opens_a_block_only_at_its_end() {
        let tags = tags().unwrap();
        assert!(tags.is_open("<|assistant|><think>\n"));
        assert!(!tags.is_open("<|assistant|><think>\n\n</think>\n\n"));
        assert!(!tags.is_open("what does <think> do?<|assistant|>"));
        assert!(!tags.is_open(""));
    }
}

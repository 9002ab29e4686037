//! A conversation whose KV stays: each turn computes what the one before did not.
//!
//! ```text
//! the branch holds:  system user reply                       and maybe more of the reply than was kept
//! the next prompt:   system user reply' user assistant:      rendered anew from all messages
//!                    |-- common --|---- appended ----|       the branch is cut back to what is common
//! ```
//!
//! A template that drops earlier reasoning, a message that was edited, a reply whose text reads back as other tokens:
//! each costs the tokens from where the two differ, and nothing else needs to know of it.

use std::sync::Arc;

use super::{ChatTemplate, Message, RenderOptions, ReplySplitter, ThinkTags};
use crate::engine::{BranchId, Engine, PrefillOptions};
use crate::error::{Error, Result};
use crate::kv::budget::KvLimit;
use crate::tokenizer::Tokenizer;

/// See the module text.
#[derive(Debug)]
pub struct Session {
    template: ChatTemplate,
    tokenizer: Arc<Tokenizer>,
    options: RenderOptions,
    tags: Option<ThinkTags>,
    limit: Option<KvLimit>,
    messages: Vec<Message>,
    branch: Option<BranchId>,
}

/// A prompt in its place.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Holds the prompt, and is ready to be started.
    pub branch: BranchId,
    /// Tokens of the prompt.
    pub num_tokens: usize,
    /// Of those, tokens whose KV the branch had already.
    pub num_kept: usize,
    /// Splits the reply.
    pub splitter: ReplySplitter,
}

impl Session {
    /// An empty conversation. `options` are those of every turn; under a `limit` the branch has a KV budget behind its
    /// first prompt.
    pub fn new(
        template: ChatTemplate,
        tokenizer: Arc<Tokenizer>,
        options: RenderOptions,
        limit: Option<KvLimit>,
    ) -> Self {
        let tags = ThinkTags::of(&template, &tokenizer);
        let options = RenderOptions { add_generation_prompt: true, ..options };
        Self { template, tokenizer, options, tags, limit, messages: Vec::new(), branch: None }
    }

    /// What was said so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The tags around the model's reasoning, if it has any.
    pub fn tags(&self) -> Option<&ThinkTags> {
        self.tags.as_ref()
    }

    /// Adds a message.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Takes back the last user's message and all behind it, and returns it.
    pub fn undo(&mut self) -> Option<Message> {
        let at = self.messages.iter().rposition(|m| m.role == "user")?;
        let undone = self.messages.get(at).cloned();
        self.messages.truncate(at);
        undone
    }

    /// Says `text` in place of the user's message `n`, counted from 1; what came behind it is forgotten.
    pub fn edit(&mut self, n: usize, text: impl Into<String>) -> Result<()> {
        let users: Vec<usize> = (0..self.messages.len()).filter(|&i| self.messages[i].role == "user").collect();
        let at = n.checked_sub(1).and_then(|i| users.get(i)).copied();
        let at = at.ok_or_else(|| Error::config("edit", format!("message {n}: there are {} to edit", users.len())))?;
        self.messages.truncate(at);
        self.messages.push(Message::user(text));
        Ok(())
    }

    /// Forgets everything but what the system said at the beginning.
    pub fn reset(&mut self) {
        let opening = self.messages.iter().take_while(|m| m.role == "system").count();
        self.messages.truncate(opening);
    }

    /// Puts the conversation's prompt into the engine, computing nothing yet. After an error the messages are as they were,
    /// and the next call finds its way from whatever the branch holds.
    pub fn place(&mut self, engine: &mut Engine) -> Result<Placement> {
        let text = self.template.render(&self.messages, &self.options)?;
        let tokens = self.tokenizer.encode(&text)?;
        let (branch, num_kept) = match self.reuse(engine, &tokens)? {
            Some(found) => found,
            None => (self.begin(engine, &tokens)?, 0),
        };
        let is_open = self.tags.as_ref().is_some_and(|t| t.is_open(&text));
        let splitter = ReplySplitter::new(self.tags.clone(), is_open);
        Ok(Placement { branch, num_tokens: tokens.len(), num_kept, splitter })
    }

    /// The branch, brought to hold `tokens`, and how many of them it had computed before. `None` when it has nothing of
    /// them, or cannot be cut back to where they differ.
    fn reuse(&mut self, engine: &mut Engine, tokens: &[u32]) -> Result<Option<(BranchId, usize)>> {
        let Some(branch) = self.branch else { return Ok(None) };
        let held = engine.tokens(branch)?;
        let common = held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        if common == 0 {
            return Ok(None);
        }
        let num_kept = common.min(engine.stats(branch)?.num_computed_tokens);
        match engine.truncate(branch, common) {
            // A KV budget has dropped what a shorter prompt would need.
            Err(Error::Config { .. }) if self.limit.is_some() => return Ok(None),
            outcome => outcome?,
        }
        if common < tokens.len() {
            engine.append(branch, &tokens[common..])?;
        }
        Ok(Some((branch, num_kept)))
    }

    /// A new branch in place of the old one.
    fn begin(&mut self, engine: &mut Engine, tokens: &[u32]) -> Result<BranchId> {
        self.clear(engine)?;
        let branch = engine.prefill(tokens, PrefillOptions::default())?;
        self.branch = Some(branch);
        if let Some(limit) = &self.limit {
            engine.limit_kv(branch, limit.for_prompt(tokens.len(), engine.config().block_size))?;
        }
        Ok(branch)
    }

    /// Takes the conversation's KV out of the engine; its messages stay.
    pub fn clear(&mut self, engine: &mut Engine) -> Result<()> {
        self.branch.take().map_or(Ok(()), |branch| engine.prune(branch))
    }
}

//! A pack whose texts are turns of a conversation, as a model's chat template writes them.
//!
//! ```text
//! <open> problem ...: | approach <close, open the reply>  reply  <end of turn> verify_suffix <close, open the reply> YES
//! root ---------------+ branch -------------------------         verify_suffix ---------------------------------
//! ```
//!
//! The template is asked once, with the pack's own placeholders in the messages, and its output is cut where they stand.
//! So what a branch holds is only ever appended to: a template that would render a reply differently once it is history
//! (without its reasoning, say) is not asked to.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::PromptPack;
use crate::chat::{ChatTemplate, Message, RenderOptions, ThinkTags};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// How a pack's texts are said to a chat model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatTurns {
    /// What the system says first, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Variables of the template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub variables: Map<String, Value>,
    /// Those that are different where a verdict is asked for.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub verify_variables: Map<String, Value>,
}

/// Stands for a reply, to be cut out.
const REPLY: &str = "REPLY0TO0BE0CUT0OUT";

impl PromptPack {
    /// The pack as plain text of a model with this template. A pack that is plain already stays as it is.
    pub(crate) fn through(&self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Self> {
        let Some(turns) = &self.chat else { return Ok(self.clone()) };
        let said = |messages: &[Message]| -> Vec<Message> {
            turns.system.iter().map(Message::system).chain(messages.iter().cloned()).collect()
        };
        let user = format!("{}{}", self.problem, self.approach);
        let options = RenderOptions { variables: turns.variables.clone(), ..RenderOptions::prompt() };
        let (begin, close) = template.around(&said(&[Message::user(&user)]), &user, &options)?;

        let mut options = options;
        options.variables.extend(turns.verify_variables.clone());
        let tags = ThinkTags::of(template, tokenizer);
        // A verdict is the first thing said: no reasoning before it.
        let settled = |mut text: String| {
            if let Some(tags) = tags.as_ref().filter(|t| t.is_open(&text)) {
                text = format!("{}\n\n{}\n\n", text.trim_end(), tags.close);
            }
            text
        };
        let asked = [Message::user(&user), Message::assistant(REPLY, ""), Message::user(&self.verify_suffix)];
        let (_, suffix) = template.around(&said(&asked), REPLY, &options)?;
        let (fresh_begin, fresh_close) =
            template.around(&said(&[Message::user(&self.verify_fresh)]), &self.verify_fresh, &options)?;
        if fresh_begin != begin {
            let why = "the chat template opens a prompt otherwise with these than with chat.variables";
            return Err(Error::config("prompts: chat.verify_variables", why));
        }
        Ok(Self {
            begin,
            problem: self.problem.trim_start().to_owned(),
            approach: format!("{}{close}", self.approach.trim_end()),
            verify_suffix: settled(suffix),
            verify_fresh: format!("{}{}", self.verify_fresh.trim(), settled(fresh_close)),
            ..self.clone()
        })
    }
}

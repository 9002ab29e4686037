//! Answers: what a client of the API finds in its output file. Nothing in them depends on when they were made, so that a
//! line has the same answer whenever it is asked.

use serde::Serialize;
use serde_json::{Value, json};

use super::Endpoint;
use crate::error::Error;
use crate::tokenizer::Tokenizer;

/// A generated token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplyToken {
    /// Its id.
    pub id: u32,
    /// Its natural-log probability, before sampling parameters.
    pub logprob: f32,
    /// The most likely tokens in its place, with theirs.
    pub top: Vec<(u32, f32)>,
}

/// One of a request's choices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplyChoice {
    /// What was said, or the continuation.
    pub text: String,
    /// What a thinking model said to itself first.
    pub reasoning: String,
    /// `stop`, `length`, or what went wrong.
    pub finish_reason: String,
    /// Its tokens, where their log-probabilities were asked for.
    pub tokens: Option<Vec<ReplyToken>>,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of all choices.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
}

impl Usage {
    /// Of a prompt and its choices.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }

    /// Adds another request's.
    pub fn add(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.total_tokens += other.total_tokens;
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Where the request was sent.
    pub endpoint: Endpoint,
    /// Who answered.
    pub model: String,
    /// The choices, in order.
    pub choices: Vec<ReplyChoice>,
    /// Tokens in and out.
    pub usage: Usage,
}

impl Reply {
    /// The line for the request `custom_id`. `created` is 0: see the module text.
    pub fn line(&self, custom_id: &str, tokenizer: &Tokenizer) -> Value {
        let (prefix, object) = match self.endpoint {
            Endpoint::Chat => ("chatcmpl", "chat.completion"),
            Endpoint::Completions => ("cmpl", "text_completion"),
        };
        let choices = self.choices.iter().enumerate();
        let choices: Vec<Value> = choices.map(|(index, choice)| self.choice(index, choice, tokenizer)).collect();
        let body = json!({
            "id": format!("{prefix}-{custom_id}"), "object": object, "created": 0, "model": self.model,
            "choices": choices, "usage": self.usage,
        });
        line(custom_id, 200, body)
    }

    fn choice(&self, index: usize, choice: &ReplyChoice, tokenizer: &Tokenizer) -> Value {
        let tokens = choice.tokens.as_deref();
        match self.endpoint {
            Endpoint::Chat => {
                let mut message = json!({"role": "assistant", "content": choice.text});
                if !choice.reasoning.is_empty() {
                    message["reasoning_content"] = choice.reasoning.as_str().into();
                }
                json!({
                    "index": index, "message": message, "logprobs": tokens.map(|t| chat_logprobs(t, tokenizer)),
                    "finish_reason": choice.finish_reason,
                })
            }
            Endpoint::Completions => json!({
                "index": index, "text": choice.text, "logprobs": tokens.map(|t| logprobs(t, tokenizer)),
                "finish_reason": choice.finish_reason,
            }),
        }
    }
}

/// The line for a request that cannot be honoured.
pub fn refusal(custom_id: &str, error: &Error) -> Value {
    let param = match error {
        Error::Config { field, .. } => Some(field),
        _ => None,
    };
    let body = json!({"error": {
        "message": error.to_string(), "type": "invalid_request_error", "param": param, "code": null,
    }});
    line(custom_id, 400, body)
}

fn line(custom_id: &str, status_code: u16, body: Value) -> Value {
    json!({
        "id": format!("batch_req_{custom_id}"), "custom_id": custom_id,
        "response": {"status_code": status_code, "request_id": format!("req_{custom_id}"), "body": body},
        "error": null,
    })
}

fn text(id: u32, tokenizer: &Tokenizer) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

fn chat_logprobs(tokens: &[ReplyToken], tokenizer: &Tokenizer) -> Value {
    let one = |id: u32, logprob: f32| json!({"token": text(id, tokenizer), "logprob": logprob, "bytes": tokenizer.token_bytes(id)});
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut entry = one(token.id, token.logprob);
            entry["top_logprobs"] = token.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
            entry
        })
        .collect();
    json!({"content": content})
}

fn logprobs(tokens: &[ReplyToken], tokenizer: &Tokenizer) -> Value {
    let top = |token: &ReplyToken| -> Value {
        Value::Object(token.top.iter().map(|&(id, logprob)| (text(id, tokenizer), logprob.into())).collect())
    };
    json!({
        "tokens": tokens.iter().map(|t| text(t.id, tokenizer)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
    })
}

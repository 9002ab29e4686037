//! The body of a request: every field is honoured, passed over because it asks for nothing, or refused by name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Endpoint;
use crate::chat::Message;
use crate::error::{Error, Result};
use crate::sampler::SamplingParams;

/// Choices of one line at most.
const MAX_CHOICES: usize = 1024;
/// Most likely tokens reported at most, beside each token.
const MAX_TOP_LOGPROBS: usize = 100;

/// Who asks, of which model, and how it is billed: nothing that an answer could depend on.
const PASSED_OVER: [&str; 7] =
    ["model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"];

/// What is not offered: the field, the JSON that asks for nothing (beside null), and why anything else is refused.
const NOT_OFFERED: [(&str, &str, &str); 13] = [
    ("stream", "false", "a batch answers its lines whole"),
    ("stream_options", "null", "a batch answers its lines whole"),
    ("echo", "false", "a prompt comes back with its log-probabilities from `rksc-run score`"),
    ("suffix", "null", "text is continued, not filled in"),
    ("best_of", "1", "ask for n choices and choose among them"),
    ("use_beam_search", "false", "choices are sampled"),
    ("response_format", r#"{"type":"text"}"#, "answers are not held to a format"),
    ("functions", "null", "is the old name of tools"),
    ("function_call", "null", "is the old name of tool_choice"),
    ("parallel_tool_calls", "true", "calls are not counted"),
    ("modalities", r#"["text"]"#, "only text is answered"),
    ("audio", "null", "only text is answered"),
    ("prediction", "null", "an answer is not drafted by the caller"),
];

/// What goes in front of the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A conversation, for the model's chat template.
    Chat {
        /// Its messages.
        messages: Vec<Message>,
        /// Tools, as JSON schemas.
        tools: Option<Value>,
        /// Variables of the template.
        variables: Map<String, Value>,
    },
    /// Text, special tokens spelled out.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// What a line asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What goes in front.
    pub prompt: Prompt,
    /// `n`.
    pub num_choices: usize,
    /// How tokens are chosen; its seed counts only where `seed` is given.
    pub sampling: SamplingParams,
    /// The line's own seed.
    pub seed: Option<u64>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<usize>,
    /// Tokens to generate before an end token counts.
    pub min_new_tokens: usize,
    /// Texts that end a choice.
    pub stop: Vec<String>,
    /// Tokens that end a choice, beside the model's own.
    pub stop_tokens: Vec<u32>,
    /// Run on past the model's own end tokens.
    pub ignore_eos: bool,
    /// Log-probabilities of the tokens, with so many of the most likely ones beside each.
    pub top_logprobs: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    messages: Option<Vec<Message>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    reasoning_effort: Option<Value>,
    prompt: Option<RawPrompt>,
    n: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<u32, f32>>,
    seed: Option<i64>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    min_tokens: Option<usize>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "must be a text, or a list of token ids")]
enum RawPrompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "must be a text, or a list of texts")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// Of chat a switch, of completions a number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "must be true or false (chat), or a number (completions)")]
enum Logprobs {
    Switch(bool),
    Top(usize),
}

impl Request {
    /// Reads the body of a request. An error names the field and says why it is refused.
    pub fn parse(endpoint: Endpoint, mut body: Map<String, Value>) -> Result<Self> {
        body.retain(|field, value| !value.is_null() && !PASSED_OVER.contains(&field.as_str()));
        for (field, nothing, why) in NOT_OFFERED {
            let asked = body.remove(field).map(|value| value.to_string());
            if asked.is_some_and(|asked| asked != nothing) {
                return Err(Error::config(field, format!("is not offered: {why}")));
            }
        }
        let body: Body = serde_path_to_error::deserialize(Value::Object(body)).map_err(|e| {
            let why = e.inner().to_string();
            // The list of all fields helps nobody.
            let why = why.split_once(", expected one of").map_or(why.as_str(), |(why, _)| why);
            Error::config(e.path().to_string(), why)
        })?;
        body.request(endpoint)
    }
}

impl Body {
    fn request(mut self, endpoint: Endpoint) -> Result<Request> {
        self.refuse_foreign(endpoint)?;
        let request = Request {
            prompt: self.take_prompt(endpoint)?,
            num_choices: self.n.unwrap_or(1),
            sampling: self.sampling()?,
            seed: self.seed.map(|seed| seed as u64),
            max_new_tokens: self.max_new_tokens()?.or((endpoint == Endpoint::Completions).then_some(16)),
            min_new_tokens: self.min_tokens.unwrap_or(0),
            stop: match self.stop.take() {
                None => Vec::new(),
                Some(Stop::One(text)) => vec![text],
                Some(Stop::Many(texts)) => texts,
            },
            top_logprobs: self.top_logprobs()?,
            stop_tokens: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
        };
        request.validate()?;
        Ok(request)
    }

    /// Refuses fields of the other endpoint.
    fn refuse_foreign(&self, endpoint: Endpoint) -> Result<()> {
        let (other, given) = match endpoint {
            Endpoint::Chat => ("/v1/completions", vec![("prompt", self.prompt.is_some())]),
            Endpoint::Completions => (
                "/v1/chat/completions",
                vec![
                    ("messages", self.messages.is_some()),
                    ("tools", self.tools.is_some()),
                    ("tool_choice", self.tool_choice.is_some()),
                    ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
                    ("reasoning_effort", self.reasoning_effort.is_some()),
                    ("max_completion_tokens", self.max_completion_tokens.is_some()),
                    ("top_logprobs", self.top_logprobs.is_some()),
                ],
            ),
        };
        let foreign = given.into_iter().find(|(_, is_given)| *is_given);
        foreign.map_or(Ok(()), |(field, _)| Err(Error::config(field, format!("is a field of {other}"))))
    }

    fn take_prompt(&mut self, endpoint: Endpoint) -> Result<Prompt> {
        if endpoint == Endpoint::Completions {
            return match self.prompt.take() {
                Some(RawPrompt::Text(text)) => Ok(Prompt::Text(text)),
                Some(RawPrompt::Tokens(tokens)) => Ok(Prompt::Tokens(tokens)),
                None => Err(Error::config("prompt", "is missing")),
            };
        }
        let messages = self.messages.take().filter(|m| !m.is_empty());
        let messages = messages.ok_or_else(|| Error::config("messages", "must hold at least one message"))?;
        let mut variables = self.chat_template_kwargs.take().unwrap_or_default();
        variables.extend(self.reasoning_effort.take().map(|effort| ("reasoning_effort".into(), effort)));
        Ok(Prompt::Chat { messages, tools: self.take_tools()?, variables })
    }

    /// The model sees tools or does not; it cannot be made to call one.
    fn take_tools(&mut self) -> Result<Option<Value>> {
        let tools = self.tools.take().map(Value::Array);
        match self.tool_choice.take() {
            None => Ok(tools),
            Some(Value::String(choice)) if choice == "auto" => Ok(tools),
            Some(Value::String(choice)) if choice == "none" => Ok(None),
            Some(_) => Err(Error::config("tool_choice", "must be auto or none: a call cannot be forced")),
        }
    }

    fn sampling(&self) -> Result<SamplingParams> {
        let off = SamplingParams::default();
        // -1 is another spelling of 0.
        let top_k = self.top_k.filter(|&k| k != -1).unwrap_or(0);
        let top_k = u32::try_from(top_k).map_err(|_| Error::config("top_k", "must be 0, for all tokens, or more"))?;
        let bias = self.logit_bias.iter().flatten();
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(off.top_p),
            min_p: self.min_p.unwrap_or(off.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(off.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(off.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(off.frequency_penalty),
            logit_bias: bias.map(|(&token, &bias)| (token, bias)).collect(),
            seed: off.seed,
        })
    }

    fn max_new_tokens(&self) -> Result<Option<usize>> {
        match (self.max_completion_tokens, self.max_tokens) {
            (Some(_), Some(_)) => {
                Err(Error::config("max_tokens", "is the old name of max_completion_tokens; drop one"))
            }
            (new, old) => Ok(new.or(old)),
        }
    }

    fn top_logprobs(&self) -> Result<Option<usize>> {
        match (&self.logprobs, self.top_logprobs) {
            (Some(Logprobs::Switch(true)), top) => Ok(Some(top.unwrap_or(0))),
            (Some(Logprobs::Switch(false)) | None, None) => Ok(None),
            (Some(Logprobs::Top(top)), None) => Ok(Some(*top)),
            _ => Err(Error::config("top_logprobs", "needs logprobs: true")),
        }
    }
}

impl Request {
    fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        self.sampling.validate().and_then(|()| self.sampling.refuse_idle()).map_err(|e| match e {
            Error::Config { field, why } => Error::Config { field: field.replace('-', "_"), why },
            other => other,
        })?;
        check((1..=MAX_CHOICES).contains(&self.num_choices), "n", "must be between 1 and 1024")?;
        let differ = self.num_choices == 1 || self.sampling.temperature > 0.0;
        check(differ, "n", "choices are all the same at temperature 0, which is greedy; give a temperature, or n 1")?;
        check(self.stop.iter().all(|text| !text.is_empty()), "stop", "holds an empty text")?;
        let ends = !self.ignore_eos || !self.stop_tokens.is_empty();
        check(
            self.min_new_tokens == 0 || ends,
            "min_tokens",
            "changes nothing beside ignore_eos; drop one of the two",
        )?;
        let top = self.top_logprobs.unwrap_or(0);
        check(top <= MAX_TOP_LOGPROBS, "top_logprobs", "must be at most 100")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(endpoint: Endpoint, body: Value) -> Result<Request> {
        let Value::Object(body) = body else { panic!("an object") };
        Request::parse(endpoint, body)
    }

    fn chat(extra: Value) -> Result<Request> {
        let mut body = json!({"model": "any", "messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        parse(Endpoint::Chat, body)
    }

    #[test]
    fn a_bare_request_is_sampled_at_temperature_1() {
        let request = chat(json!({"user": "u", "metadata": {"a": 1}, "stream": false, "stop": null})).unwrap();
        assert_eq!(request.sampling, SamplingParams { temperature: 1.0, ..SamplingParams::default() });
        assert_eq!((request.num_choices, request.max_new_tokens, request.top_logprobs), (1, None, None));
        let request = parse(Endpoint::Completions, json!({"prompt": [1, 2], "logprobs": 3})).unwrap();
        assert_eq!((request.max_new_tokens, request.top_logprobs), (Some(16), Some(3)));
        assert_eq!(request.prompt, Prompt::Tokens(vec![1, 2]));
    }

    #[test]
    fn fields_arrive() {
        let request = chat(json!({
            "n": 4, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "logit_bias": {"7": -100}, "seed": -1, "stop": "x",
            "max_completion_tokens": 9, "logprobs": true, "top_logprobs": 2, "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": false}, "tools": [{}], "tool_choice": "none",
        }))
        .unwrap();
        assert_eq!(request.sampling.logit_bias, [(7, -100.0)]);
        assert_eq!((request.seed, request.stop), (Some(u64::MAX), vec!["x".to_string()]));
        assert_eq!((request.num_choices, request.max_new_tokens, request.top_logprobs), (4, Some(9), Some(2)));
        let Prompt::Chat { tools, variables, .. } = request.prompt else { panic!("chat") };
        assert_eq!(tools, None);
        assert_eq!(Value::Object(variables), json!({"enable_thinking": false, "reasoning_effort": "low"}));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (extra, field) in [
            (json!({"stream": true}), "stream"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"functions": []}), "functions"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"max_tokens": 1, "max_completion_tokens": 1}), "max_tokens"),
            (json!({"top_logprobs": 3}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 101}), "top_logprobs"),
            (json!({"temperature": 0, "n": 2}), "n"),
            (json!({"n": 0}), "n"),
            (json!({"temperature": 0, "top_p": 0.5}), "top_p"),
            (json!({"temperature": -1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": 3}), "stop"),
            (json!({"min_tokens": 3, "ignore_eos": true}), "min_tokens"),
            (json!({"prompt": "x"}), "prompt"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [{"content": "x"}]}), "messages[0]"),
            (json!({"guided_json": {}}), "guided_json"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        ] {
            let Err(Error::Config { field: named, why }) = chat(extra.clone()) else { panic!("{extra} was taken") };
            assert!(named.starts_with(field), "{extra}: {named}: {why}");
            assert!(why.len() < 120, "{why}");
        }
    }
}

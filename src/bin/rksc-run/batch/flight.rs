//! One request: its branches, from the prompt to the reply.

use std::sync::Arc;

use rksc::chat::{ChatTemplate, RenderOptions, ReplyPart, ReplySplitter, ThinkTags};
use rksc::engine::{BranchId, Engine, GenerateParams, PrefillOptions};
use rksc::openai::{Endpoint, Prompt, Reply, ReplyChoice, ReplyToken, Request, Usage, seed_of};
use rksc::sampler::SamplingParams;
use rksc::tokenizer::Tokenizer;
use rksc::{Error, ErrorCode};
use serde_json::Value;

use super::Args;
use crate::choice::Choice;
use crate::common::refused;
use crate::decoding::Decoding;

/// What every request of a run is given.
pub(super) struct Setup<'a> {
    pub(super) args: &'a Args,
    decoding: &'a Decoding,
    model: String,
    tokenizer: Arc<Tokenizer>,
    end_tokens: Vec<u32>,
    chat: Option<Chat>,
}

/// How conversations are written down; absent where the model has no template.
struct Chat {
    template: ChatTemplate,
    options: RenderOptions,
    tags: Option<ThinkTags>,
    turn_end: Option<u32>,
}

/// A request whose branches run.
pub(super) struct Flight {
    custom_id: String,
    endpoint: Endpoint,
    root: BranchId,
    num_prompt_tokens: usize,
    pub(super) choices: Vec<Choice>,
    /// Splits the replies of a chat.
    splitter: Option<ReplySplitter>,
    wants_logprobs: bool,
}

impl<'a> Setup<'a> {
    pub(super) fn new(args: &'a Args, decoding: &'a Decoding, engine: &Engine) -> anyhow::Result<Self> {
        let source = args.engine.source();
        let tokenizer = args.engine.tokenizer()?;
        let chat = match args.template.find(&source)? {
            None => None,
            Some(template) => Some(Chat {
                options: args.template.options(None)?,
                tags: ThinkTags::of(&template, &tokenizer),
                turn_end: template.turn_end(&tokenizer),
                template,
            }),
        };
        let end_tokens = source.end_tokens(engine.model())?;
        Ok(Self { args, decoding, model: engine.info().name.clone(), tokenizer, end_tokens, chat })
    }

    /// Makes a request's branches, all of them or none.
    pub(super) fn start(
        &self,
        engine: &mut Engine,
        custom_id: &str,
        endpoint: Endpoint,
        request: &Request,
    ) -> rksc::Result<Flight> {
        let (tokens, splitter) = self.prompt(&request.prompt)?;
        let params = self.params(custom_id, request);
        let end_tokens: Arc<[u32]> = params.end_tokens.as_slice().into();
        let top_k = request.top_logprobs.unwrap_or(0);
        if top_k > 0 {
            self.decoding.check_top_logprobs("top_logprobs")?;
        }
        let root = engine.prefill(&tokens, PrefillOptions::default())?;
        let mut branches = vec![BranchId::default(); request.num_choices];
        let begun = engine.fork(root, &mut branches).and_then(|()| {
            engine.exit_prompt(root)?;
            branches.iter().try_for_each(|&branch| {
                if top_k > 0 {
                    engine.watch(branch, &[], top_k)?;
                }
                self.decoding.start(engine, branch, tokens.len(), &params)
            })
        });
        if let Err(error) = begun {
            // A fork that failed has made none of them.
            branches.retain(|&branch| engine.tokens(branch).is_ok());
            branches.into_iter().chain([root]).try_for_each(|branch| engine.prune(branch))?;
            return Err(error);
        }
        let shown = splitter.as_ref().and_then(|_| self.chat.as_ref()?.tags.as_ref());
        let shown = shown.map(|tags| tags.special_tokens(&self.tokenizer)).unwrap_or_default();
        let choice = |branch| Choice::new(branch, &self.tokenizer, &request.stop, Arc::clone(&end_tokens));
        Ok(Flight {
            custom_id: custom_id.into(),
            endpoint,
            root,
            num_prompt_tokens: tokens.len(),
            choices: branches.into_iter().map(|branch| choice(branch).showing(shown.clone())).collect(),
            splitter,
            wants_logprobs: request.top_logprobs.is_some(),
        })
    }

    /// The tokens of a prompt, and of a conversation what splits the replies.
    fn prompt(&self, prompt: &Prompt) -> rksc::Result<(Vec<u32>, Option<ReplySplitter>)> {
        let (messages, tools, variables) = match prompt {
            Prompt::Tokens(tokens) => return Ok((tokens.clone(), None)),
            Prompt::Text(text) => return Ok((self.tokenizer.encode(text)?, None)),
            Prompt::Chat { messages, tools, variables } => (messages, tools, variables),
        };
        let chat = self.chat.as_ref().ok_or_else(|| {
            refused("messages", "the model has no chat template; give one with --chat-template, or use /v1/completions")
        })?;
        let mut options = chat.options.clone();
        options.tools = tools.clone().or(options.tools);
        options.variables.extend(variables.clone());
        let text = chat.template.render(messages, &options)?;
        let is_open = chat.tags.as_ref().is_some_and(|tags| tags.is_open(&text));
        Ok((self.tokenizer.encode(&text)?, Some(ReplySplitter::new(chat.tags.clone(), is_open))))
    }

    fn params(&self, custom_id: &str, request: &Request) -> GenerateParams {
        let mut end_tokens = request.stop_tokens.clone();
        if !request.ignore_eos {
            let is_chat = matches!(request.prompt, Prompt::Chat { .. });
            let turn_end = self.chat.as_ref().and_then(|chat| chat.turn_end).filter(|_| is_chat);
            end_tokens.extend(self.end_tokens.iter().copied().chain(turn_end));
        }
        let seed = request.seed.unwrap_or_else(|| seed_of(self.args.seed, custom_id));
        GenerateParams {
            sampling: SamplingParams { seed, ..request.sampling.clone() },
            max_new_tokens: request.max_new_tokens.unwrap_or(self.args.max_new_tokens),
            min_new_tokens: request.min_new_tokens,
            end_tokens,
        }
    }

    /// A request whose choices have all ended gives its branches back and becomes its answer, and the tokens it took.
    pub(super) fn land(&self, engine: &mut Engine, flight: &Flight) -> rksc::Result<(Value, Usage)> {
        for branch in flight.choices.iter().map(|choice| choice.branch).chain([flight.root]) {
            engine.prune(branch)?;
        }
        let generated = flight.choices.iter().map(|choice| choice.tokens.len()).sum();
        let usage = Usage::new(flight.num_prompt_tokens, generated);
        let choices = flight.choices.iter().map(|choice| reply_choice(flight, choice)).collect();
        let reply = Reply { endpoint: flight.endpoint, model: self.model.clone(), choices, usage };
        Ok((reply.line(&flight.custom_id, &self.tokenizer), usage))
    }
}

/// The request can be put right, or asks for more than there will ever be room for.
pub(super) fn is_of_the_request(error: &Error) -> bool {
    error.code() == ErrorCode::Caller || matches!(error, Error::OutOfBlocks { .. } | Error::Format { .. })
}

fn reply_choice(flight: &Flight, choice: &Choice) -> ReplyChoice {
    let mut reply = ReplyChoice { finish_reason: choice.finish.clone().unwrap_or_default(), ..ReplyChoice::default() };
    match flight.splitter.clone() {
        None => reply.text.clone_from(&choice.text),
        Some(mut splitter) => {
            let parts = splitter.push(&choice.text);
            for part in parts.into_iter().chain(splitter.finish()) {
                match part {
                    ReplyPart::Reasoning(text) => reply.reasoning.push_str(&text),
                    ReplyPart::Content(text) => reply.text.push_str(&text),
                }
            }
        }
    }
    reply.tokens = flight.wants_logprobs.then(|| {
        let tokens = choice.tokens.iter().zip(&choice.logprobs).zip(&choice.top);
        tokens.map(|((&id, &logprob), top)| ReplyToken { id, logprob, top: top.clone() }).collect()
    });
    reply
}

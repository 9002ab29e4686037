//! `rksc-run batch`: a file of requests in, a file of answers out, in the order of the requests.
//!
//! ```text
//! lines - admitted while there is room - steps over all their branches - finished - written when all before it are
//! ```
//!
//! An answer depends on its line alone, not on its neighbours: a run that is killed and taken up again ends with the file
//! of one that was not.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::chat::{ChatTemplate, RenderOptions, ReplyPart, ReplySplitter, ThinkTags};
use rksc::engine::{BranchId, Engine, Event, GenerateParams, PrefillOptions};
use rksc::openai::{
    Endpoint, Line, Prompt, Reply, ReplyChoice, ReplyToken, Request, Usage, parse_lines, refusal, seed_of,
};
use rksc::sampler::SamplingParams;
use rksc::tokenizer::Tokenizer;
use rksc::{Error, ErrorCode};
use serde_json::Value;

use crate::choice::Choice;
use crate::common::{EngineArgs, print_json, progress, refused};
use crate::decoding::{Decoding, DecodingArgs};
use crate::line_file::LineFile;
use crate::template::TemplateArgs;

/// Lines that wait to be written behind one still in flight, for each that may be in flight.
const WAITING_PER_LINE: usize = 4;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Requests, one JSON object a line: {"custom_id", "method": "POST", "url", "body"}; url is /v1/chat/completions or
    /// /v1/completions.
    #[arg(short, long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Answers, one JSON object a line, in the order of the requests. A request that cannot be honoured is answered with
    /// the field that is to blame.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Go on from the lines that --out holds already.
    #[arg(long)]
    resume: bool,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 16)]
    concurrency: usize,
    /// Tokens of a choice at most, for chat requests that do not say.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_new_tokens: usize,
    /// Key of the draws of requests without a seed, each of which has its own by its custom_id.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    decoding: DecodingArgs,
    /// One JSON object about the run on stdout.
    #[arg(long)]
    json: bool,
}

/// What every request of a run is given.
struct Setup<'a> {
    args: &'a Args,
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
struct Flight {
    custom_id: String,
    endpoint: Endpoint,
    root: BranchId,
    num_prompt_tokens: usize,
    choices: Vec<Choice>,
    /// Splits the replies of a chat.
    splitter: Option<ReplySplitter>,
    wants_logprobs: bool,
}

/// A line between its admission and the file.
enum Entry {
    Flight(Box<Flight>),
    Answer(Value),
}

/// What a run has done.
#[derive(Default, serde::Serialize)]
struct Totals {
    lines: usize,
    /// Lines that the file held already.
    resumed: usize,
    answered: usize,
    refused: usize,
    usage: Usage,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.concurrency > 0, "--concurrency: must be at least 1");
    let bytes = std::fs::read(&args.input).with_context(|| args.input.display().to_string())?;
    let mut lines = parse_lines(&args.input, &bytes)?;
    let mut totals = Totals { lines: lines.len(), ..Totals::default() };
    let mut config = args.engine.config();
    let decoding = args.decoding.apply(&mut config)?;
    decoding.check_shared("use pin")?;
    let mut engine = decoding.open(config)?;
    let setup = Setup::new(args, &decoding, &engine)?;
    // Last: what is in the file stays there until everything else is known to be sound.
    let mut out = LineFile::open(&args.out, "custom_id", args.resume)?;
    lines.retain(|line| !out.done.contains(&line.custom_id));
    totals.resumed = totals.lines - lines.len();
    let started = Instant::now();
    answer_all(&setup, &mut engine, lines, &mut out, &mut totals).map_err(|e| match e.downcast_ref() {
        Some(Error::Cancelled) => e.context("the answers so far are in the file; --resume goes on from there"),
        _ => e,
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let mut report = serde_json::json!({
            "model": engine.info(), "totals": totals, "seconds": seconds, "stats": engine.engine_stats(),
            "counters": engine.counters(),
        });
        decoding.describe(&engine, None, &mut report);
        return print_json(&report);
    }
    let Totals { lines, resumed, answered, refused, usage } = totals;
    eprintln!(
        "{lines} lines: {answered} answered, {refused} refused, {resumed} there before; {} prompt and {} generated tokens in {seconds:.1} s",
        usage.prompt_tokens, usage.completion_tokens
    );
    decoding.say(&engine, None);
    Ok(())
}

fn answer_all(
    setup: &Setup,
    engine: &mut Engine,
    lines: Vec<Line>,
    out: &mut LineFile,
    totals: &mut Totals,
) -> anyhow::Result<()> {
    let bar = progress(lines.len());
    let mut lines = lines.into_iter();
    let mut queue: VecDeque<Entry> = VecDeque::new();
    let concurrency = setup.args.concurrency;
    loop {
        let mut in_flight = queue.iter().filter(|e| matches!(e, Entry::Flight(_))).count();
        while in_flight < concurrency && queue.len() < concurrency * WAITING_PER_LINE {
            let Some(line) = lines.next() else { break };
            let entry = setup.admit(engine, line, totals)?;
            in_flight += usize::from(matches!(entry, Entry::Flight(_)));
            queue.push_back(entry);
        }
        while let Some(Entry::Answer(answer)) = queue.front() {
            out.write(answer)?;
            queue.pop_front();
            bar.inc(1);
        }
        if queue.is_empty() && lines.len() == 0 {
            bar.finish_and_clear();
            return Ok(());
        }
        engine.step()?;
        while let Some(event) = engine.next_event() {
            take(engine, &mut queue, event)?;
        }
        for entry in &mut queue {
            if let Entry::Flight(flight) = entry
                && flight.choices.iter().all(|c| c.finish.is_some())
            {
                *entry = Entry::Answer(setup.land(engine, flight, totals)?);
            }
        }
    }
}

/// Hands an event to the choice whose branch it is; one whose request has landed concerns nobody.
fn take(engine: &mut Engine, queue: &mut VecDeque<Entry>, event: Event) -> anyhow::Result<()> {
    let flights = queue.iter_mut().filter_map(|entry| match entry {
        Entry::Flight(flight) => Some(flight),
        Entry::Answer(_) => None,
    });
    let choice = flights.flat_map(|flight| &mut flight.choices).find(|choice| choice.branch == event.branch);
    choice.map_or(Ok(()), |choice| choice.take(engine, event.kind, &mut |_| Ok(())))
}

impl<'a> Setup<'a> {
    fn new(args: &'a Args, decoding: &'a Decoding, engine: &Engine) -> anyhow::Result<Self> {
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

    /// Starts a line's branches, or answers it with why that cannot be. What is no fault of the request ends the run.
    fn admit(&self, engine: &mut Engine, line: Line, totals: &mut Totals) -> anyhow::Result<Entry> {
        let started =
            line.request.and_then(|(endpoint, request)| self.start(engine, &line.custom_id, endpoint, &request));
        match started {
            Ok(flight) => Ok(Entry::Flight(Box::new(flight))),
            Err(error) if is_of_the_request(&error) => {
                totals.refused += 1;
                Ok(Entry::Answer(refusal(&line.custom_id, &error)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn start(
        &self,
        engine: &mut Engine,
        custom_id: &str,
        endpoint: Endpoint,
        request: &Request,
    ) -> rksc::Result<Flight> {
        let (tokens, splitter) = self.prompt(&request.prompt)?;
        let params = self.params(custom_id, request);
        let end_tokens: Arc<[u32]> = params.end_tokens.as_slice().into();
        let root = engine.prefill(&tokens, PrefillOptions::default())?;
        let mut branches = vec![BranchId::default(); request.num_choices];
        let top_k = request.top_logprobs.unwrap_or(0);
        if top_k > 0 {
            self.decoding.check_top_logprobs("top_logprobs")?;
        }
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

    /// A request whose choices have all ended gives its branches back and becomes its answer.
    fn land(&self, engine: &mut Engine, flight: &Flight, totals: &mut Totals) -> anyhow::Result<Value> {
        for branch in flight.choices.iter().map(|choice| choice.branch).chain([flight.root]) {
            engine.prune(branch)?;
        }
        let generated = flight.choices.iter().map(|choice| choice.tokens.len()).sum();
        let usage = Usage::new(flight.num_prompt_tokens, generated);
        totals.answered += 1;
        totals.usage = Usage::new(
            totals.usage.prompt_tokens + usage.prompt_tokens,
            totals.usage.completion_tokens + usage.completion_tokens,
        );
        let choices = flight.choices.iter().map(|choice| reply_choice(flight, choice)).collect();
        let reply = Reply { endpoint: flight.endpoint, model: self.model.clone(), choices, usage };
        Ok(reply.line(&flight.custom_id, &self.tokenizer))
    }
}

/// The request can be put right, or asks for more than there will ever be room for.
fn is_of_the_request(error: &Error) -> bool {
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

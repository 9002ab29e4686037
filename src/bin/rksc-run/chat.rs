//! `rksc-run chat`: a conversation, from a terminal, from lines, or from a file.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args as ClapArgs;
use rksc::chat::{Message, MessageFile, Placement, ReplyPart, Session};
use rksc::engine::{EndReason, Engine, GenerateParams};
use rksc::tokenizer::Tokenizer;

use crate::choice::{self, Choice, show};
use crate::common::{self, EngineArgs, SamplingArgs, print_json, refused};
use crate::decoding::{Decoding, DecodingArgs};
use crate::template::TemplateArgs;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// What the system says first.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Say what the user says in a file of messages, instead of reading lines; replies that the file has are history.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateArgs,
    /// Tokens of a reply at most.
    #[arg(long, default_value_t = 1024)]
    max_new_tokens: usize,
    /// Ends a reply; not part of it. May be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Show replies without their reasoning.
    #[arg(long)]
    hide_thinking: bool,
    /// One JSON object on stdout, at the end, instead of text.
    #[arg(long, conflicts_with = "hide_thinking")]
    json: bool,
    #[command(flatten)]
    decoding: DecodingArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// A turn, as `--json` has it.
#[derive(serde::Serialize)]
struct Turn {
    reasoning: String,
    content: String,
    finish_reason: String,
    prompt_tokens: usize,
    /// Of those, tokens whose KV was there from the turn before.
    kept_tokens: usize,
    /// Tokens that went through the model, of the prompt and of the reply.
    computed_tokens: u64,
    tokens: Vec<u32>,
    seconds: f64,
    ttft_ms: Option<f64>,
}

struct Chat<'a> {
    args: &'a Args,
    engine: Engine,
    tokenizer: std::sync::Arc<Tokenizer>,
    session: Session,
    params: GenerateParams,
    turns: Vec<Turn>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = args.engine.source();
    let file = args.messages.as_deref().map(MessageFile::read).transpose()?;
    let template = args.template.template(&source)?;
    let options = args.template.options(file.as_ref().and_then(|f| f.tools.clone()))?;
    let sampling = args.sampling.params()?;
    let mut config = args.engine.config();
    let decoding = args.decoding.apply(&mut config)?;
    let engine = decoding.open(config)?;
    let tokenizer = args.engine.tokenizer()?;
    let mut end_tokens = source.end_tokens(engine.model())?;
    end_tokens.extend(template.turn_end(&tokenizer));
    let params = GenerateParams { sampling, max_new_tokens: args.max_new_tokens, min_new_tokens: 0, end_tokens };
    let mut session = Session::new(template, tokenizer.clone(), options, decoding.limit);
    args.system.iter().for_each(|text| session.push(Message::system(text)));
    let mut chat = Chat { args, engine, tokenizer, session, params, turns: Vec::new() };
    match file {
        Some(file) => chat.say_all(file.messages)?,
        None => chat.read_lines()?,
    }
    chat.report(&decoding)
}

impl Chat<'_> {
    /// Says what the user says in a file; a reply that follows there is taken as given.
    fn say_all(&mut self, messages: Vec<Message>) -> anyhow::Result<()> {
        let mut rest = messages.into_iter().peekable();
        while let Some(message) = rest.next() {
            let asks = matches!(message.role.as_str(), "user" | "tool");
            self.session.push(message);
            if asks && rest.peek().is_none_or(|next| next.role == "user") {
                self.reply()?;
            }
        }
        Ok(())
    }

    /// Reads what the user says, a line a time. On a terminal a mistake is said and the talk goes on.
    fn read_lines(&mut self) -> anyhow::Result<()> {
        let stdin = std::io::stdin();
        let is_terminal = stdin.is_terminal();
        if is_terminal {
            eprintln!("/undo, /edit N TEXT, /reset, /quit; Ctrl-C stops a reply");
        }
        loop {
            if is_terminal {
                eprint!("> ");
                std::io::stderr().flush()?;
            }
            let mut line = String::new();
            if stdin.lock().read_line(&mut line)? == 0 {
                return Ok(());
            }
            match self.obey(line.trim_end_matches(['\r', '\n'])) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if is_terminal => eprintln!("{}", common::message(&error)),
                Err(error) => return Err(error),
            }
        }
    }

    /// A line: a command, or what the user says. False at the end.
    fn obey(&mut self, line: &str) -> anyhow::Result<bool> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "" if line.is_empty() => {}
            "/quit" | "/exit" => return Ok(false),
            "/reset" => self.session.reset(),
            "/undo" => match self.session.undo() {
                Some(message) => eprintln!("taken back: {}", message.text()),
                None => return Err(refused("undo", "nothing was said yet").into()),
            },
            "/edit" => {
                let (n, text) = rest.split_once(' ').unwrap_or((rest, ""));
                let usage = || refused("edit", "say /edit N TEXT, with the number of your message");
                self.session.edit(n.parse().map_err(|_| usage())?, text)?;
                self.answer()?;
            }
            // Two strokes begin a message with one.
            _ if line.starts_with('/') && !line.starts_with("//") => {
                return Err(refused(command, "is no command; there are /undo, /edit N TEXT, /reset, /quit").into());
            }
            _ => {
                self.session.push(Message::user(line.strip_prefix('/').unwrap_or(line)));
                self.answer()?;
            }
        }
        Ok(true)
    }

    /// A reply to the line just said, which is taken back where none can be given.
    fn answer(&mut self) -> anyhow::Result<()> {
        self.reply().inspect_err(|_| {
            self.session.undo();
        })
    }

    /// The model's turn. Ctrl-C ends it and nothing else.
    fn reply(&mut self) -> anyhow::Result<()> {
        self.engine.cancel_flag().clear();
        let computed = self.engine.engine_stats().tokens_computed;
        let started = Instant::now();
        let mut placement = self.session.place(&mut self.engine)?;
        while self.engine.next_event().is_some() {} // of a reply that was stopped
        self.engine.start(placement.branch, self.params.clone())?;
        if self.params.max_new_tokens > 0 {
            self.engine.exit_prompt(placement.branch)?;
        }
        let end_tokens = self.params.end_tokens.as_slice().into();
        let choice = Choice::new(placement.branch, &self.tokenizer, &self.args.stop, end_tokens);
        let mut choices =
            [choice.showing(self.session.tags().map(|t| t.special_tokens(&self.tokenizer)).unwrap_or_default())];
        let mut shown = Shown::new(self.args);
        let mut emit = |text: &str| shown.take(placement.splitter.push(text));
        let outcome = choice::run(&mut self.engine, &mut choices, &mut emit);
        let [choice] = &mut choices;
        let ttft_ms = match outcome {
            Err(error) if matches!(error.downcast_ref(), Some(rksc::Error::Cancelled)) => {
                self.engine.cancel_flag().clear();
                self.engine.stop(placement.branch)?;
                choice.end(EndReason::Stopped, &mut emit)?;
                None
            }
            outcome => outcome?,
        };
        shown.take(placement.splitter.finish())?;
        shown.end()?;
        let turn = Turn {
            finish_reason: choice.finish.clone().unwrap_or_default(),
            prompt_tokens: placement.num_tokens,
            kept_tokens: placement.num_kept,
            computed_tokens: self.engine.engine_stats().tokens_computed - computed,
            tokens: std::mem::take(&mut choice.tokens),
            seconds: started.elapsed().as_secs_f64(),
            ttft_ms,
            reasoning: shown.reasoning,
            content: shown.content,
        };
        self.session.push(Message::assistant(&turn.content, &turn.reasoning));
        if !self.args.json {
            turn.say(&placement);
        }
        self.turns.push(turn);
        Ok(())
    }

    fn report(&self, decoding: &Decoding) -> anyhow::Result<()> {
        if self.args.json {
            let mut report = serde_json::json!({
                "model": self.engine.info(),
                "messages": self.session.messages(),
                "turns": self.turns,
                "stats": self.engine.engine_stats(),
            });
            decoding.describe(&self.engine, None, &mut report);
            return print_json(&report);
        }
        decoding.say(&self.engine, None);
        Ok(())
    }
}

impl Turn {
    fn say(&self, placement: &Placement) {
        eprintln!(
            "[{} prompt tokens, {} of them kept; {} generated in {:.1} s; {}]",
            placement.num_tokens,
            placement.num_kept,
            self.tokens.len(),
            self.seconds,
            self.finish_reason
        );
    }
}

/// A reply on its way to the reader.
struct Shown {
    is_json: bool,
    hides: bool,
    is_terminal: bool,
    reasoning: String,
    content: String,
}

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

impl Shown {
    fn new(args: &Args) -> Self {
        Self {
            is_json: args.json,
            hides: args.hide_thinking,
            is_terminal: std::io::stdout().is_terminal(),
            reasoning: String::new(),
            content: String::new(),
        }
    }

    fn take(&mut self, parts: Vec<ReplyPart>) -> anyhow::Result<()> {
        for part in parts {
            match part {
                ReplyPart::Reasoning(text) => {
                    self.reasoning.push_str(&text);
                    match (self.is_json || self.hides, self.is_terminal) {
                        (true, _) => {}
                        (false, true) => show(&format!("{DIM}{text}{PLAIN}"))?,
                        (false, false) => show(&text)?,
                    }
                }
                ReplyPart::Content(text) => {
                    let follows = self.content.is_empty() && !self.reasoning.is_empty() && !self.hides;
                    self.content.push_str(&text);
                    if !self.is_json {
                        show(if follows { "\n\n" } else { "" })?;
                        show(&text)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn end(&self) -> anyhow::Result<()> {
        if self.is_json { Ok(()) } else { show("\n") }
    }
}

//! `rksc-run template`, and the flags of a chat template.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::chat::{ChatTemplate, Message, MessageFile, RenderOptions, ThinkTags};
use rksc::{ModelSource, Result};
use serde_json::Value;

use crate::choice::show;
use crate::common::{print_json, refused};

/// Which template, and what it is told.
#[derive(ClapArgs, Clone)]
pub(crate) struct TemplateArgs {
    /// A chat template instead of the model's: Jinja, or JSON with a field chat_template.
    #[arg(long, value_name = "FILE", conflicts_with = "template_name")]
    chat_template: Option<PathBuf>,
    /// One of the model's templates by its name, where it has several [default: default].
    #[arg(long, value_name = "NAME")]
    template_name: Option<String>,
    /// A variable of the template, as JSON: enable_thinking=false. May be given several times.
    #[arg(long, value_name = "KEY=JSON", value_parser = variable)]
    set: Vec<(String, Value)>,
    /// Tools for the template: a JSON list of function schemas.
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
}

fn variable(text: &str) -> std::result::Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=JSON, such as enable_thinking=false")?;
    let value = serde_json::from_str(value)
        .map_err(|e| format!("{value:?} is not JSON ({e}); a text needs its quotes: {key}='\"text\"'"))?;
    Ok((key.to_owned(), value))
}

impl TemplateArgs {
    /// The template that the flags name, or the model's own if it has one.
    pub(crate) fn find(&self, source: &ModelSource) -> Result<Option<ChatTemplate>> {
        source.chat_template(self.chat_template.as_deref(), self.template_name.as_deref())
    }

    pub(crate) fn template(&self, source: &ModelSource) -> Result<ChatTemplate> {
        self.find(source)?.ok_or_else(|| no_template("give one with --chat-template FILE"))
    }

    /// For a prompt; `tools` are those of a file of messages.
    pub(crate) fn options(&self, tools: Option<Value>) -> anyhow::Result<RenderOptions> {
        let tools = match &self.tools {
            Some(path) => {
                let text = crate::common::read_text(path)?;
                let bad = |e: serde_json::Error| rksc::Error::Format { path: path.clone(), why: e.to_string() };
                Some(serde_json::from_str(&text).map_err(bad)?)
            }
            None => tools,
        };
        Ok(RenderOptions { tools, variables: self.set.iter().cloned().collect(), ..RenderOptions::prompt() })
    }
}

fn no_template(way_out: &str) -> rksc::Error {
    refused("chat-template", format!("the model has none; {way_out}"))
}

/// The template of a model that must have one.
pub(crate) fn required_template(source: &ModelSource) -> Result<ChatTemplate> {
    source.chat_template(None, None)?.ok_or_else(|| no_template("drop --chat, and spell the prompt out"))
}

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// Hugging Face folder [default: the bundled model].
    #[arg(short, long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Messages: a JSON list of {"role", "content"}, or an object with messages and tools.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "system"])]
    messages: Option<PathBuf>,
    /// What the user says.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, required_unless_present = "messages")]
    user: Option<String>,
    /// What the system says first.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    #[command(flatten)]
    template: TemplateArgs,
    /// Do not open the assistant's turn.
    #[arg(long)]
    no_generation_prompt: bool,
    /// The token ids too, as a JSON list on a line of its own behind the prompt.
    #[arg(long, conflicts_with = "json")]
    tokens: bool,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = args.model.clone().map_or(ModelSource::Bundled, ModelSource::Dir);
    let file = match &args.messages {
        Some(path) => MessageFile::read(path)?,
        None => MessageFile {
            messages: args.system.iter().map(Message::system).chain(args.user.iter().map(Message::user)).collect(),
            tools: None,
        },
    };
    let template = args.template.template(&source)?;
    let options =
        RenderOptions { add_generation_prompt: !args.no_generation_prompt, ..args.template.options(file.tools)? };
    let prompt = template.render(&file.messages, &options)?;
    if !args.tokens && !args.json {
        return show(&prompt);
    }
    let tokenizer = source.tokenizer()?;
    let tokens = tokenizer.encode(&prompt)?;
    if args.tokens {
        return show(&format!("{prompt}\n{}\n", serde_json::to_string(&tokens)?));
    }
    let tags = ThinkTags::of(&template, &tokenizer);
    print_json(&serde_json::json!({
        "template": template.path(), "prompt": prompt, "tokens": tokens, "turn_end": template.turn_end(&tokenizer),
        "thinking": tags.map(|tags| serde_json::json!({
            "open": tags.open, "close": tags.close, "is_open": tags.is_open(&prompt),
        })),
    }))
}

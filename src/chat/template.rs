//! A model's chat template: where it is found, and what it makes of messages.
//!
//! The environment is set up as transformers sets up its own. Templates come with models and are not trusted: their text,
//! work and memory are bounded, and they run on a thread of their own, whose stack is deep enough for all that the bounds
//! let them nest. One thing the engine does not count while it happens: a list that holds itself twice, many times over,
//! made text by `~`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use super::python::{self, Raised};
use super::{Message, python::environment};
use crate::error::{Error, Result};
use crate::model::fields::{Fields, Json, read_small};
use crate::tokenizer::Tokenizer;

/// Longer by far than any template in use.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// Steps a template may take to render once; 64 bytes of data count as one.
const FUEL: u64 = 500_000;

/// What the fuel lets a template nest, dropped level by level. Only what is used is ever touched.
const STACK_BYTES: usize = 256 << 20;

/// The template's name inside its environment.
const NAME: &str = "chat";

/// Tokens of tokenizer_config.json that templates may use by these names.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template, compiled, with the special tokens it may use.
#[derive(Clone)]
pub struct ChatTemplate {
    path: PathBuf,
    /// Where in the file it stands: empty, or a field's name.
    field: String,
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    special: Map<String, Value>,
}

/// What a template is given besides messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RenderOptions {
    /// Opens the assistant's turn behind the messages.
    pub add_generation_prompt: bool,
    /// Tools, as JSON schemas.
    pub tools: Option<Value>,
    /// Variables such as `enable_thinking`. They win over all others.
    pub variables: Map<String, Value>,
    /// What `strftime_now` takes for now, in UTC; `None` is the clock, in the machine's time zone.
    pub now: Option<SystemTime>,
}

impl RenderOptions {
    /// As they are for a prompt: the assistant's turn is opened.
    pub fn prompt() -> Self {
        Self { add_generation_prompt: true, ..Self::default() }
    }
}

impl ChatTemplate {
    /// The template of a model folder, if it has one: `chat_template.jinja`, else that of tokenizer_config.json, else
    /// chat_template.json. `name` takes another than the default, by its name in tokenizer_config.json or as a file of
    /// `additional_chat_templates`.
    pub fn from_dir(dir: &Path, name: Option<&str>) -> Result<Option<Self>> {
        let config = TokenizerConfig::read(dir)?;
        let found = match name {
            None | Some("default") => Self::find_default(dir, &config)?,
            Some(name) => Some(Self::find_named(dir, &config, name)?),
        };
        let Some(Found { path, field, source }) = found else { return Ok(None) };
        Self::compile(path, field, source, config.special).map(Some)
    }

    /// The template in a file of its own: Jinja text, or the JSON of a `chat_template` field. Special tokens are those of
    /// the model folder, if there is one.
    pub fn from_file(path: &Path, dir: Option<&Path>) -> Result<Self> {
        let special = dir.map(TokenizerConfig::read).transpose()?.map(|c| c.special).unwrap_or_default();
        let is_json = path.extension().is_some_and(|e| e == "json");
        let Found { path, field, source } = if is_json { Found::in_json(path)? } else { Found::jinja(path)? };
        Self::compile(path, field, source, special)
    }

    /// The default template of a tokenizer_config.json, with its special tokens; `path` is what errors call it.
    pub fn from_tokenizer_config(path: &Path, bytes: &[u8]) -> Result<Option<Self>> {
        let config = TokenizerConfig::parse(Json::parse(path, bytes)?, path)?;
        let Some(Found { path, field, source }) = config.default_template() else { return Ok(None) };
        Self::compile(path, field, source, config.special).map(Some)
    }

    /// A template at hand; `path` is what errors call it.
    pub fn from_source(path: &Path, source: &str, special: Map<String, Value>) -> Result<Self> {
        Self::compile(path.to_owned(), String::new(), source.to_owned(), special)
    }

    fn find_default(dir: &Path, config: &TokenizerConfig) -> Result<Option<Found>> {
        let jinja = dir.join("chat_template.jinja");
        if jinja.exists() {
            return Found::jinja(&jinja).map(Some);
        }
        if let Some(found) = config.default_template() {
            return Ok(Some(found));
        }
        let json = dir.join("chat_template.json");
        if json.exists() { Found::in_json(&json).map(Some) } else { Ok(None) }
    }

    fn find_named(dir: &Path, config: &TokenizerConfig, name: &str) -> Result<Found> {
        let folder = dir.join("additional_chat_templates");
        let is_plain = !name.contains(['/', '\\']) && name != "..";
        let file = folder.join(format!("{name}.jinja"));
        if is_plain && file.exists() {
            return Found::jinja(&file);
        }
        if let Some((_, source)) = config.templates.iter().find(|(n, _)| n == name) {
            return Ok(config.found(name, source));
        }
        let mut names: Vec<String> = config.templates.iter().map(|(n, _)| n.clone()).collect();
        let files = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        names.extend(files.filter_map(|f| Some(f.path().file_stem()?.to_str()?.to_owned())));
        names.sort_unstable();
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Err(Error::config("template-name", format!("{name:?} is not in {}; there are: {there}", dir.display())))
    }

    fn compile(path: PathBuf, field: String, source: String, special: Map<String, Value>) -> Result<Self> {
        if source.len() as u64 > MAX_TEMPLATE_BYTES {
            let why = format!("{} bytes; at most {MAX_TEMPLATE_BYTES} are read", source.len());
            return Err(complaint(&path, &field, None, &why));
        }
        let source: Arc<str> = python::normalise(&source).into();
        let text = Arc::clone(&source);
        let compiled = on_deep_stack(move || {
            let mut environment = environment()?;
            environment.set_fuel(Some(FUEL));
            environment.add_template_owned(NAME, text.to_string()).map(|()| environment)
        });
        let (line, why) = match compiled {
            Ok(Ok(environment)) => {
                return Ok(Self { path, field, source, environment: Arc::new(environment), special });
            }
            Ok(Err(e)) => (e.line(), described(&e)),
            Err(why) => (None, why),
        };
        Err(complaint(&path, &field, line, &why))
    }

    /// The text that the messages become.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let this = self.clone();
        let messages: Vec<Message> = messages.iter().map(Message::for_template).collect();
        let options = options.clone();
        let outcome = on_deep_stack(move || this.render_here(&messages, &options));
        outcome.unwrap_or_else(|why| Err(self.complaint(None, &why)))
    }

    fn render_here(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let named = |map: &'_ Map<String, Value>| -> Vec<(String, minijinja::Value)> {
            map.iter().map(|(k, v)| (k.clone(), Serde(v).into())).collect()
        };
        let mut context: BTreeMap<String, minijinja::Value> = named(&self.special).into_iter().collect();
        let given: [(&str, minijinja::Value); 5] = [
            ("messages", Serde(messages).into()),
            ("tools", Serde(&options.tools).into()),
            ("documents", ().into()),
            ("add_generation_prompt", options.add_generation_prompt.into()),
            ("strftime_now", python::strftime_now(options.now)),
        ];
        context.extend(given.map(|(k, v)| (k.to_owned(), v)));
        context.extend(named(&options.variables));
        let template = self.environment.get_template(NAME);
        template.and_then(|t| t.render(context)).map_err(|e| self.error(&e))
    }

    fn error(&self, e: &minijinja::Error) -> Error {
        match (Raised::of(e), e.kind()) {
            (Some(message), _) => {
                let line = e.line().map(|n| format!(", line {n}")).unwrap_or_default();
                let place = format!("{}{line}", self.path.display());
                Error::config("messages", format!("the chat template ({place}) refuses them: {message}"))
            }
            (None, ErrorKind::OutOfFuel) => {
                let why = format!("takes more than {FUEL} steps, or as much memory: an endless loop?");
                self.complaint(e.line(), &why)
            }
            (None, _) => self.complaint(e.line(), &described(e)),
        }
    }

    fn complaint(&self, line: Option<usize>, why: &str) -> Error {
        complaint(&self.path, &self.field, line, why)
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its text, with line ends as they are used.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What the rendered messages have before and after `text`, which must stand there once, whatever white space
    /// around it the template drops.
    pub(crate) fn around(&self, messages: &[Message], text: &str, options: &RenderOptions) -> Result<(String, String)> {
        let rendered = self.render(messages, options)?;
        let text = text.trim();
        match rendered.match_indices(text).map(|m| m.0).collect::<Vec<_>>()[..] {
            [at] => Ok((rendered[..at].to_owned(), rendered[at + text.len()..].to_owned())),
            _ => {
                Err(self.complaint(None, "does not repeat a message's text as it is, so prompts cannot be made by it"))
            }
        }
    }

    /// The special token with which the template closes an assistant's turn: it ends a reply too. `None` where there is none,
    /// or where a reply cannot be told from what the template puts around it.
    pub fn turn_end(&self, tokenizer: &Tokenizer) -> Option<u32> {
        const REPLY: &str = "REPLY0TO0BE0FOUND";
        let messages = [Message::user("."), Message::assistant(REPLY, "")];
        let (_, after) = self.around(&messages, REPLY, &RenderOptions::default()).ok()?;
        let first = *tokenizer.encode(after.trim_start()).ok()?.first()?;
        tokenizer.is_special(first).then_some(first)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate({}, {} bytes)", self.path.display(), self.source.len())
    }
}

fn complaint(path: &Path, field: &str, line: Option<usize>, why: &str) -> Error {
    let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
    let line = line.map(|n| format!("line {n}: ")).unwrap_or_default();
    Error::format(path, format!("chat template: {field}{line}{why}"))
}

fn described(e: &minijinja::Error) -> String {
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}

/// Runs `job` where deep nesting finds room. Says why it did not come to an end, if it did not.
fn on_deep_stack<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> std::result::Result<T, String> {
    let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES).spawn(job);
    let thread = thread.map_err(|e| format!("no thread to run it on: {e}"))?;
    thread.join().map_err(|_| "it makes the template engine panic".to_owned())
}

/// A template that was found, not compiled yet.
struct Found {
    path: PathBuf,
    field: String,
    source: String,
}

impl Found {
    fn jinja(path: &Path) -> Result<Self> {
        let bytes = read_small(path, MAX_TEMPLATE_BYTES)?;
        let source =
            String::from_utf8(bytes).map_err(|e| Error::format(path, format!("chat template: not UTF-8: {e}")))?;
        Ok(Self { path: path.to_owned(), field: String::new(), source })
    }

    fn in_json(path: &Path) -> Result<Self> {
        let json = Json::read(path)?;
        let fields = json.fields()?;
        let source = fields.string(TEMPLATE_FIELD)?.ok_or_else(|| fields.bad(TEMPLATE_FIELD, "missing"))?;
        Ok(Self { path: path.to_owned(), field: TEMPLATE_FIELD.to_owned(), source: source.to_owned() })
    }
}

const TEMPLATE_FIELD: &str = "chat_template";

/// What tokenizer_config.json says about chats.
#[derive(Default)]
struct TokenizerConfig {
    path: PathBuf,
    special: Map<String, Value>,
    /// (name, template); a lone one is `default`.
    templates: Vec<(String, String)>,
}

impl TokenizerConfig {
    /// A folder without the file says nothing.
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        Self::parse(Json::read(&path)?, &path)
    }

    fn parse(json: Json, path: &Path) -> Result<Self> {
        let fields = json.fields()?;
        let mut special = Map::new();
        for name in SPECIAL_TOKENS {
            if let Some(token) = special_token(&fields, name)? {
                special.insert(name.to_owned(), token.into());
            }
        }
        let templates = templates(&fields)?;
        Ok(Self { path: path.to_owned(), special, templates })
    }

    fn default_template(&self) -> Option<Found> {
        let (name, source) = self.templates.iter().find(|(name, _)| name == "default")?;
        Some(self.found(name, source))
    }

    fn found(&self, name: &str, source: &str) -> Found {
        let field = if self.templates.len() > 1 { format!("{TEMPLATE_FIELD} {name:?}") } else { TEMPLATE_FIELD.into() };
        Found { path: self.path.clone(), field, source: source.to_owned() }
    }
}

/// A token is a string, or an object with its content.
fn special_token<'a>(fields: &Fields<'a>, name: &str) -> Result<Option<&'a str>> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::String(token)) => Ok(Some(token)),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(content)) => Ok(Some(content)),
            _ => Err(fields.bad(name, "content: must be a string")),
        },
        Some(_) => Err(fields.bad(name, "must be a string, or an object with its content")),
    }
}

/// One template, or a list of them with names.
fn templates(fields: &Fields<'_>) -> Result<Vec<(String, String)>> {
    let bad = || fields.bad(TEMPLATE_FIELD, "must be a string, or a list of objects with name and template");
    match fields.get(TEMPLATE_FIELD) {
        None => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![("default".into(), source.clone())]),
        Some(Value::Array(list)) => {
            let entry = |v: &Value| Some((v["name"].as_str()?.to_owned(), v["template"].as_str()?.to_owned()));
            list.iter().map(|v| entry(v).ok_or_else(bad)).collect()
        }
        Some(_) => Err(bad()),
    }
}

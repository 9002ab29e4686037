//! What templates written for Python's Jinja2 expect of it: values printed as Python prints them, its string methods,
//! `json.dumps`, dates, and the functions that transformers adds.

use std::fmt::Write as _;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use regex::Regex;

use super::dumps::to_json;

/// Values nested deeper than this are not printed.
const MAX_DEPTH: usize = 200;

/// An environment as transformers makes it.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(|out, state, value| {
        let text = to_str(state, value)?;
        out.write_str(&text).map_err(Error::from)
    });
    environment.set_unknown_method_callback(call_method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |state: &State, value: &Value| to_str(state, value));
    // In Python strings, dicts and undefined values have a length and items too; `None` has none.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_function("raise_exception", |state: &State, message: &Value| -> Result<Value, Error> {
        let message = to_str(state, message)?;
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_filter("join", join_filter);
    Ok(environment)
}

/// What a template raised by itself.
#[derive(Debug)]
pub(super) struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Raised {
    /// The message, where an error comes from `raise_exception`.
    pub(super) fn of(error: &Error) -> Option<&str> {
        let mut source = std::error::Error::source(error);
        while let Some(e) = source {
            if let Some(Self(message)) = e.downcast_ref() {
                return Some(message);
            }
            source = e.source();
        }
        None
    }
}

/// A template's text as Jinja2 reads it: line ends are `\n`. The `generation` tag, by which transformers tells what a
/// model said from what it was given, becomes a block with a scope and no effect.
pub(super) fn normalise(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    match Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})") {
        Ok(tag) => tag.replace_all(&source, "${1}${2}with${3}").into_owned(),
        Err(_) => source,
    }
}

/// `strftime_now(format)`, for the moment given, or for the clock.
pub(super) fn strftime_now(now: Option<SystemTime>) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        let bad = |e: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}"));
        let now = match now {
            Some(now) => jiff::Timestamp::try_from(now).map_err(bad)?.to_zoned(jiff::tz::TimeZone::UTC),
            None => jiff::Zoned::now(),
        };
        let config = jiff::fmt::strtime::Config::new().lenient(true);
        jiff::fmt::strtime::BrokenDownTime::from(&now).to_string_with_config(&config, format).map_err(bad)
    })
}

/// Data costs fuel before it is made, and each value a step, so that a template cannot make more than it may.
pub(super) fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(1 + bytes as u64 / 64)
}

/// `str(value)`.
fn to_str(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut out = String::new();
    write_repr(state, value, 0, &mut out)?;
    Ok(out)
}

/// `repr(value)`.
fn write_repr(state: &State, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    check_depth(depth)?;
    pay(state, value.as_str().map_or(0, str::len))?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, ["inf", "-inf", "nan"])),
        ValueKind::String => write_repr_str(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.downcast_object_ref::<Tuple>().is_some();
            let (open, close) = if is_tuple { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(state, &item, depth + 1, out)?;
            }
            out.push_str(if is_tuple && value.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        // A macro, a namespace: Python shows no more of them.
        kind => write!(out, "<{kind}>").map_err(Error::from)?,
    }
    Ok(())
}

pub(super) fn check_depth(depth: usize) -> Result<(), Error> {
    if depth <= MAX_DEPTH {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidOperation, format!("a value nests deeper than {MAX_DEPTH}")))
}

/// Single quotes, unless only they are inside.
fn write_repr_str(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A number as Python writes it; `named` are the infinities and what is no number.
pub(super) fn number(value: &Value, named: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let x = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if !x.is_finite() {
        return named[if x.is_nan() { 2 } else { usize::from(x < 0.0) }].to_owned();
    }
    // Shortest digits that read back, as Python has them; only the form differs.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..=15 if x.fract() == 0.0 => format!("{x:.1}"),
        -4..=15 => format!("{x}"),
        e => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
    }
}

/// `join(values, d='', attribute=None)`.
fn join_filter(state: &State, values: &Value, separator: Option<&str>, kwargs: Kwargs) -> Result<String, Error> {
    let separator = match separator {
        Some(separator) => Some(separator),
        None => kwargs.get("d")?,
    };
    let attribute: Option<&str> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    join(state, values, separator.unwrap_or_default(), attribute)
}

/// `separator.join(values)`, or of an attribute of each.
fn join(state: &State, values: &Value, separator: &str, attribute: Option<&str>) -> Result<String, Error> {
    let mut out = String::new();
    for (i, value) in values.try_iter()?.enumerate() {
        let value = attribute.map(|name| value.get_attr(name)).transpose()?.unwrap_or(value);
        pay(state, separator.len() + value.as_str().map_or(0, str::len))?;
        out.push_str(if i > 0 { separator } else { "" });
        out.push_str(&to_str(state, &value)?);
    }
    Ok(out)
}

/// Python's methods on strings and dicts: the usual ones by `pycompat`, and those it lacks.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let cut = if method == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match (cut, method) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Ok(Tuple::new(parts.map(Value::from).to_vec()).into())
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            join(state, values, text, None).map(Value::from)
        }
        "split" | "rsplit" => split(state, text, method == "rsplit", args),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// What a piece takes, in one list and in another.
const PIECE_BYTES: usize = 40;

/// `split(sep=None, maxsplit=-1)`, from the left or from the right.
fn split(state: &State, text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (positional, kwargs) = from_args::<(&[Value], Kwargs)>(args)?;
    let argument = |i: usize, name: &str| match positional.get(i) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let separator = argument(0, "sep")?.filter(|v| !v.is_none());
    let max = argument(1, "maxsplit")?.and_then(|v| v.as_i64()).and_then(|n| usize::try_from(n).ok());
    kwargs.assert_all_used()?;
    let bad = |why: &str| Error::new(ErrorKind::InvalidOperation, format!("split: {why}"));
    let mut pieces: Vec<&str> = Vec::new();
    match &separator {
        Some(separator) => {
            let separator = separator.as_str().ok_or_else(|| bad("the separator must be a string"))?;
            if separator.is_empty() {
                return Err(bad("empty separator"));
            }
            pay(state, PIECE_BYTES * text.matches(separator).count())?;
            match (from_right, max) {
                (false, Some(max)) => pieces.extend(text.splitn(max.saturating_add(1), separator)),
                (true, Some(max)) => pieces.extend(text.rsplitn(max.saturating_add(1), separator)),
                (_, None) => pieces.extend(text.split(separator)),
            }
        }
        None => {
            pay(state, PIECE_BYTES * text.split_whitespace().count())?;
            pieces = split_whitespace(text, from_right, max.unwrap_or(usize::MAX));
        }
    }
    if from_right && max.is_some() {
        pieces.reverse();
    }
    Ok(pieces.into_iter().map(Value::from).collect())
}

/// At most `max` cuts at white space; with `from_right` the last come first.
fn split_whitespace(text: &str, from_right: bool, max: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
        let Some(at) = cut.filter(|_| pieces.len() < max) else {
            pieces.push(rest);
            break;
        };
        let (before, after) = rest.split_at(at);
        let (piece, left) = if from_right { (after, before) } else { (before, after) };
        pieces.push(piece.trim());
        rest = left.trim();
    }
    pieces
}

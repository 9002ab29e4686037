//! `json.dumps`, as templates call it by the filter `tojson`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{check_depth, number, pay};

/// How `json.dumps` is to write.
struct Dumps {
    ensure_ascii: bool,
    /// One level.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, without escapes for HTML.
pub(super) fn to_json(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (positional, kwargs) = from_args::<(&[Value], Kwargs)>(&args)?;
    let argument = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(i) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none()))
    };
    let is_true = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let ensure_ascii = is_true(argument(0, "ensure_ascii")?);
    let indent = argument(1, "indent")?.map(|v| indent(&v)).transpose()?;
    let separators = argument(2, "separators")?;
    let sort_keys = is_true(argument(3, "sort_keys")?);
    kwargs.assert_all_used()?;
    let item = if indent.is_some() { "," } else { ", " };
    let (item_separator, key_separator) = match separators {
        Some(pair) => (separator(&pair, 0)?, separator(&pair, 1)?),
        None => (item.to_owned(), ": ".to_owned()),
    };
    let dumps = Dumps { ensure_ascii, indent, item_separator, key_separator, sort_keys };
    let mut out = String::new();
    dumps.write(state, value, 0, &mut out)?;
    Ok(out)
}

fn indent(value: &Value) -> Result<String, Error> {
    let bad = || Error::new(ErrorKind::InvalidOperation, "tojson: indent must be a string, or a number up to 64");
    match (value.as_str(), value.as_i64()) {
        (Some(text), _) if text.len() <= 64 => Ok(text.to_owned()),
        (None, Some(n)) if n <= 64 => Ok(" ".repeat(n.max(0) as usize)),
        _ => Err(bad()),
    }
}

fn separator(pair: &Value, idx: usize) -> Result<String, Error> {
    let item = pair.get_item_by_index(idx)?;
    let bad = || Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings of at most 64 bytes");
    item.as_str().filter(|s| s.len() <= 64).map(str::to_owned).ok_or_else(bad)
}

impl Dumps {
    fn write(&self, state: &State, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        check_depth(depth)?;
        pay(state, value.as_str().map_or(0, str::len))?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, ["Infinity", "-Infinity", "NaN"])),
            ValueKind::String => self.write_str(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                return self.write_items(state, ['[', ']'], items, depth, out);
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    items.push((Some(key_text(&key)?), item));
                }
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                return self.write_items(state, ['{', '}'], items.into_iter(), depth, out);
            }
            kind => {
                let why = format!("tojson: a value of type {kind} is not JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        state: &State,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        let start_line = |depth: usize, out: &mut String| -> Result<(), Error> {
            let Some(indent) = &self.indent else { return Ok(()) };
            out.push('\n');
            pay(state, indent.len() * depth)?;
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
            Ok(())
        };
        out.push(open);
        let mut is_empty = true;
        for (i, (key, item)) in items.enumerate() {
            is_empty = false;
            out.push_str(if i > 0 { &self.item_separator } else { "" });
            start_line(depth + 1, out)?;
            if let Some(key) = key {
                pay(state, key.len())?;
                self.write_str(&key, out);
                out.push_str(&self.key_separator);
            }
            self.write(state, &item, depth + 1, out)?;
        }
        if !is_empty {
            start_line(depth, out)?;
        }
        out.push(close);
        Ok(())
    }

    fn write_str(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A key of an object: what is no string becomes one.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::Number => Ok(number(key, ["Infinity", "-Infinity", "NaN"])),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a key of type {kind}"))),
    }
}

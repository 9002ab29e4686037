//! Typed access to the fields of a JSON file, with errors that name file and field.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// See [`Fields::opt_factor`].
pub(crate) const FACTORS: RangeInclusive<f64> = 1e-6..=1e6;

/// A parsed JSON file that remembers its path.
pub(crate) struct Json {
    path: PathBuf,
    value: Value,
}

impl Json {
    /// Larger than any sane config, smaller than anything that hurts.
    const MAX_BYTES: u64 = 64 << 20;

    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_small(path, Self::MAX_BYTES)?)
    }

    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let value = serde_json::from_slice(bytes).map_err(|e| Error::format(path, json_why(bytes, &e)))?;
        Ok(Self { path: path.to_owned(), value })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fields(&self) -> Result<Fields<'_>> {
        match &self.value {
            Value::Object(map) => Ok(Fields { path: &self.path, prefix: String::new(), map }),
            other => Err(Error::format(&self.path, format!("{} at the top; it must be an object", kind(other)))),
        }
    }
}

/// Reads a regular file of at most `max_bytes`.
pub(crate) fn read_small(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::format(path, "not a regular file"));
    }
    if meta.len() > max_bytes {
        return Err(Error::format(path, format!("{} bytes; at most {max_bytes} are read", meta.len())));
    }
    std::fs::read(path).map_err(|e| Error::io(path, e))
}

/// Why a JSON text does not parse, with the usual suspects named.
pub(crate) fn json_why(bytes: &[u8], e: &serde_json::Error) -> String {
    let hint = if bytes.is_empty() {
        "; the file is empty"
    } else if bytes.starts_with(b"\xef\xbb\xbf") {
        "; the file starts with a byte order mark: save it as UTF-8 without one"
    } else if bytes.starts_with(b"version https://git-lfs") {
        "; this is a Git LFS pointer: run `git lfs pull`"
    } else if e.is_eof() {
        "; the file is cut short"
    } else if std::str::from_utf8(bytes).is_err() {
        "; the file is not UTF-8"
    } else if [&b"NaN"[..], b"Infinity"].iter().any(|word| bytes.windows(word.len()).any(|w| w == *word)) {
        "; NaN and Infinity are not JSON"
    } else {
        ""
    };
    format!("not valid JSON: {e}{hint}")
}

/// The fields of one object.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// The way to the object, with a dot behind; empty at the top.
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn bad(&self, field: &str, why: impl std::fmt::Display) -> Error {
        Error::format(self.path, format!("{}{field}: {why}", self.prefix))
    }

    pub(crate) fn missing(&self, field: &str) -> Error {
        self.bad(field, "missing; copy it from the model's original config.json")
    }

    /// `null` counts as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// The field is there, be it `null`.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// A whole number in `min..=max`. Floats without a fraction do not count.
    pub(crate) fn opt_integer(&self, field: &str, min: u64, max: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.bad(field, format!("{} must be a whole number from {min} to {max}", shown(value)))),
        }
    }

    pub(crate) fn opt_count(&self, field: &str, max: u64) -> Result<Option<usize>> {
        self.opt_integer(field, 1, max)
    }

    pub(crate) fn count(&self, field: &str, max: u64) -> Result<usize> {
        self.opt_count(field, max)?.ok_or_else(|| self.missing(field))
    }

    /// Whether the field is the number -1, which some files write for "all of it".
    pub(crate) fn is_minus_one(&self, field: &str) -> bool {
        self.get(field).and_then(Value::as_i64) == Some(-1)
    }

    pub(crate) fn opt_number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.bad(field, format!("{} must be a number", shown(value)))),
        }
    }

    /// What something is multiplied or divided by: neither it nor what becomes of it may leave what f32 holds.
    pub(crate) fn opt_factor(&self, field: &str) -> Result<Option<f64>> {
        match self.opt_number(field)? {
            Some(x) if !FACTORS.contains(&x) => Err(self.bad(field, format!("{x} must lie between 1e-6 and 1e6"))),
            factor => Ok(factor),
        }
    }

    /// A list of numbers.
    pub(crate) fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        list.map(Some).ok_or_else(|| self.bad(field, format!("{} must be a list of numbers", shown(value))))
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let flag = value.as_bool().ok_or_else(|| self.bad(field, format!("{} must be true or false", shown(value))))?;
        Ok(Some(flag))
    }

    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let text = value.as_str().ok_or_else(|| self.bad(field, format!("{} must be a string", shown(value))))?;
        Ok(Some(text))
    }

    /// A list of strings; absent is empty.
    pub(crate) fn strings(&self, field: &str) -> Result<Vec<&'a str>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .ok_or_else(|| self.bad(field, format!("{} must be a list of strings", shown(value))))
    }

    /// Whether the field says anything: `false`, an empty list and an empty object do not.
    pub(crate) fn is_set(&self, field: &str) -> bool {
        self.get(field).is_some_and(|value| match value {
            Value::Bool(on) => *on,
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        })
    }

    /// The names of all fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// A list of two whole numbers, each at least 1.
    pub(crate) fn pair(&self, field: &str) -> Result<Option<[usize; 2]>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = |value: &Value| value.as_u64().filter(|n| (1..=1 << 20).contains(n)).map(|n| n as usize);
        let pair = match value.as_array().map(Vec::as_slice) {
            Some([a, b]) => number(a).zip(number(b)),
            _ => None,
        };
        match pair {
            Some((a, b)) => Ok(Some([a, b])),
            None => Err(self.bad(field, format!("{} must be two whole numbers", shown(value)))),
        }
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Fields<'a>>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { path: self.path, prefix: format!("{}{field}.", self.prefix), map }))
            }
            Some(other) => Err(self.bad(field, format!("{} must be an object", shown(other)))),
        }
    }

    /// A token id, or a list of them, each below `vocab_size`; absent is empty.
    pub(crate) fn ids(&self, field: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let one = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(id as u32),
            _ => Err(self.bad(field, format!("{} must be a token id below {vocab_size}", shown(value)))),
        };
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as an error shows it: numbers in full, text cut short, the rest by kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(s) if s.chars().count() <= 40 => format!("{s:?}"),
        Value::String(s) => format!("{:?}...", s.chars().take(40).collect::<String>()),
        other => kind(other).to_owned(),
    }
}

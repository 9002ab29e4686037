//! An `--out` file of JSON lines that a run can be taken up from again: it holds whole lines only, each told by its key.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rksc::{Error, Result};

/// See the module text.
pub(crate) struct LineFile {
    path: PathBuf,
    file: File,
    /// Keys it held when it was opened.
    pub(crate) done: HashSet<String>,
}

impl LineFile {
    /// Starts the file anew, or with `resume` cuts off a line that was in flight and keeps the others. `key` is the field
    /// that every line has.
    pub(crate) fn open(path: &Path, key: &str, resume: bool) -> anyhow::Result<Self> {
        let context = || path.display().to_string();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(!resume);
        let mut file = options.open(path).with_context(context)?;
        let mut bytes = Vec::new();
        if resume {
            file.read_to_end(&mut bytes).with_context(context)?;
        }
        let (done, whole) = keys(&bytes, key).map_err(|why| Error::Format { path: path.to_path_buf(), why })?;
        file.set_len(whole as u64).with_context(context)?;
        file.seek(SeekFrom::End(0)).with_context(context)?;
        Ok(Self { path: path.to_path_buf(), file, done })
    }

    /// One write a line, so that an interruption loses at most the line in flight.
    pub(crate) fn write(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).map_err(|e| Error::Internal(e.to_string()))?;
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.flush());
        written.map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

/// Keys of the whole lines, and how many bytes those are. What follows them must be the beginning of a line of ours: no
/// other file is cut.
fn keys(bytes: &[u8], key: &str) -> std::result::Result<(HashSet<String>, usize), String> {
    const OPENING: &[u8] = b"{\"id\":";
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let (lines, torn) = bytes.split_at(whole);
    let foreign = |i: usize| format!("line {}: not a result of this command", i + 1);
    let mut done = HashSet::new();
    let mut count = 0;
    for line in lines.split_inclusive(|&b| b == b'\n') {
        let value: Option<serde_json::Value> = serde_json::from_slice(line).ok();
        let id = value.as_ref().and_then(|v| v[key].as_str()).ok_or_else(|| foreign(count))?;
        done.insert(id.to_string());
        count += 1;
    }
    if torn.starts_with(OPENING) || OPENING.starts_with(torn) { Ok((done, whole)) } else { Err(foreign(count)) }
}

//! `--report FILE`: a page that is there whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rksc::Engine;
use rksc::report::html::{ReportData, render};

use crate::common::message;

/// Where the page goes; known to be writable before the run.
pub(crate) struct ReportFile {
    /// As the user wrote it.
    name: PathBuf,
    /// What it stands for: a link's target, so that the link stays.
    target: PathBuf,
}

impl ReportFile {
    /// Refuses a place that cannot be written, and one that another output of the command takes.
    pub(crate) fn open(path: &Path, other: Option<&Path>) -> anyhow::Result<Self> {
        let file = Self::at(path);
        let same = |other: &Path| fs::canonicalize(other).unwrap_or_else(|_| other.to_path_buf()) == file.target;
        anyhow::ensure!(!other.is_some_and(same), "--report: {} is the --out file too; name another", path.display());
        file.probe().with_context(|| format!("--report: {}", path.display()))?;
        Ok(file)
    }

    /// The file, unchecked.
    pub(crate) fn at(path: &Path) -> Self {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        Self { name: path.to_path_buf(), target }
    }

    /// Whether it can be written.
    pub(crate) fn probe(&self) -> std::io::Result<()> {
        if self.target.file_name().is_none() {
            return Err(std::io::ErrorKind::InvalidFilename.into());
        }
        match fs::metadata(&self.target) {
            Ok(meta) if meta.is_dir() => Err(std::io::ErrorKind::IsADirectory.into()),
            // A pipe or a device is written to, never replaced.
            Ok(meta) if !meta.is_file() => OpenOptions::new().write(true).open(&self.target).map(drop),
            _ => {
                let temporary = self.temporary();
                File::create(&temporary)?;
                fs::remove_file(&temporary)
            }
        }
    }

    /// Beside the target, because a file is only renamed within its file system.
    fn temporary(&self) -> PathBuf {
        let name = self.target.file_name().unwrap_or_default().to_string_lossy();
        self.target.with_file_name(format!(".{name}.{}.part", std::process::id()))
    }

    /// Writes the page; an older one is replaced in one move.
    pub(crate) fn write(&self, data: &ReportData<'_>) -> anyhow::Result<()> {
        self.replace(render(data).as_bytes()).with_context(|| format!("--report: {}", self.name.display()))
    }

    /// Replaces what it holds in one move.
    pub(crate) fn replace(&self, bytes: &[u8]) -> std::io::Result<()> {
        if fs::metadata(&self.target).is_ok_and(|meta| !meta.is_file()) {
            return OpenOptions::new().write(true).open(&self.target)?.write_all(bytes);
        }
        let temporary = self.temporary();
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.target)
        };
        write().inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
    }
}

/// Writes the report of a run, whatever became of the run, and hands its outcome on. An error of the run comes first.
pub(crate) fn finish(
    file: Option<&ReportFile>,
    data: ReportData<'_>,
    outcome: anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Some(file) = file else { return outcome };
    let error = outcome.as_ref().err().map(message);
    let written = file.write(&ReportData { error, ..data });
    if let (Err(_), Err(second)) = (&outcome, &written) {
        eprintln!("rksc-run: {}", message(second));
    }
    outcome.and(written)
}

/// What a report says about the engine.
pub(crate) fn setting(engine: &Engine) -> Vec<(String, String)> {
    let info = engine.info();
    let of = |name: &str, value: String| (name.to_string(), value);
    vec![
        of("model", info.name.clone()),
        of("compute type", info.dtype.to_string()),
        of("device", info.device.clone()),
        of("block size", engine.config().block_size.to_string()),
    ]
}

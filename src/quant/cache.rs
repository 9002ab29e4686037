//! Where the file of a model's codes lies, and whether it is there already.

use std::ffi::OsString;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::file::{Content, Wanted, check_replaceable, other, read, write};
use super::hessian::Hessians;
use super::options::QuantOptions;
use super::weights::QuantWeights;
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;
use crate::model::weights::WeightStore;

/// The file of a model's codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuantFile {
    /// There is none: the set is made at every load.
    None,
    /// Beside the model, or in the user's cache where that cannot be written; one made for something else is replaced,
    /// and that none can be written is no error.
    Auto {
        /// The model's folder; `None` for a model that has none.
        model_dir: Option<PathBuf>,
        /// The user's cache; see [`QuantFile::auto`].
        cache_dir: Option<PathBuf>,
    },
    /// This one, and no other: made if it is not there, and refused if it was made for something else.
    At(PathBuf),
}

/// Where a model's codes came from, and how long that took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The file was there.
    Mapped {
        /// The file.
        file: PathBuf,
        /// Time to map and check it.
        took: Duration,
    },
    /// It was made.
    Quantised {
        /// The file it was written to, if any.
        file: Option<PathBuf>,
        /// Time to make and write it.
        took: Duration,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped { file, took } => write!(f, "mapped {} in {:.2} s", file.display(), took.as_secs_f64()),
            Self::Quantised { file: None, took } => write!(f, "quantised in {:.2} s", took.as_secs_f64()),
            Self::Quantised { file: Some(file), took } => {
                write!(f, "quantised in {:.2} s, written to {}", took.as_secs_f64(), file.display())
            }
        }
    }
}

impl QuantFile {
    /// Beside the model in `model_dir`, or in `$RKSC_CACHE_DIR`, `$XDG_CACHE_HOME/rksc` or `$HOME/.cache/rksc`.
    pub fn auto(model_dir: Option<&Path>) -> Self {
        Self::Auto { model_dir: model_dir.map(Path::to_owned), cache_dir: cache_dir(|name| std::env::var_os(name)) }
    }

    /// Refuses a named file that cannot be written, or that holds something else than codes: before the work is done.
    pub(crate) fn check_replaceable(&self) -> Result<()> {
        match self {
            Self::At(path) => check_replaceable(path),
            Self::None | Self::Auto { .. } => Ok(()),
        }
    }

    /// Where to look and to write, first to last. A cache holds sets of many models, told apart by `fingerprint`.
    fn places(&self, fingerprint: &str, options: QuantOptions) -> Vec<PathBuf> {
        match self {
            Self::None => Vec::new(),
            Self::At(path) => vec![path.clone()],
            Self::Auto { model_dir, cache_dir } => {
                let model: String = fingerprint.chars().take(16).collect();
                let beside = model_dir.iter().map(|dir| dir.join(format!("rksc-{options}.codes")));
                let cached = cache_dir.iter().map(|dir| dir.join(format!("rksc-{model}-{options}.codes")));
                beside.chain(cached).collect()
            }
        }
    }
}

fn cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("RKSC_CACHE_DIR")
        .or_else(|| folder("XDG_CACHE_HOME").map(|dir| dir.join("rksc")))
        .or_else(|| folder("HOME").map(|dir| dir.join(".cache/rksc")))
}

impl QuantWeights {
    /// The set from its file, or made anew and written there; `hessians` as in [`quantise`](Self::quantise), and not
    /// needed where there is a file. A damaged file is an error, and so is one that was named and is of another model
    /// or made with other options, or cannot be written.
    pub fn load_or_quantise(
        model: &ModelConfig,
        store: &WeightStore,
        options: QuantOptions,
        file: &QuantFile,
        hessians: Option<&Hessians>,
    ) -> Result<(Self, Origin)> {
        let start = Instant::now();
        let fingerprint = if *file == QuantFile::None { String::new() } else { store.fingerprint(model) };
        let places = file.places(&fingerprint, options);
        let wanted = Wanted { model, fingerprint: &fingerprint, options };
        for path in &places {
            if let Some(weights) = look(path, &wanted, file)? {
                return Ok((weights, Origin::Mapped { file: path.clone(), took: start.elapsed() }));
            }
        }
        let weights = Self::quantise(model, store, options, hessians)?;
        let file = match file {
            QuantFile::None => None,
            QuantFile::At(path) => write(path, &weights, &fingerprint).map(|()| Some(path.clone()))?,
            QuantFile::Auto { cache_dir, .. } => {
                write_somewhere(&places, cache_dir.as_deref(), |path| write(path, &weights, &fingerprint))
            }
        };
        Ok((weights, Origin::Quantised { file, took: start.elapsed() }))
    }
}

impl QuantWeights {
    /// Writes the set where it will be looked for, in place of one that is there; returns the place. Unlike a set that is
    /// only kept for the next load, one that cannot be written is an error, and so is one that another would hide.
    pub(crate) fn put(&self, model: &ModelConfig, store: &WeightStore, file: &QuantFile) -> Result<PathBuf> {
        let fingerprint = store.fingerprint(model);
        let mut failed = None;
        let places = self.options.map_or_else(Vec::new, |options| file.places(&fingerprint, options));
        for path in places {
            if let QuantFile::Auto { cache_dir, .. } = file {
                make_cache(cache_dir.as_deref(), &path);
            }
            match write(&path, self, &fingerprint) {
                Ok(()) => return Ok(path),
                Err(e) if path.exists() => return Err(e),
                Err(e) => failed = Some(e),
            }
        }
        Err(failed
            .unwrap_or_else(|| Error::config("codes", "there is no folder for them; name a file with --out FILE")))
    }
}

/// What is wanted, if `path` holds it.
fn look(path: &Path, wanted: &Wanted<'_>, file: &QuantFile) -> Result<Option<QuantWeights>> {
    let named = matches!(file, QuantFile::At(_));
    match read(path, wanted) {
        Ok(Content::Wanted(weights)) => Ok(Some(weights)),
        Ok(Content::Other(what)) if named => Err(other(path, &what)),
        Ok(Content::Other(what)) => {
            tracing::info!("{} is not used: {what}", path.display());
            Ok(None)
        }
        Err(Error::Io { source, .. }) if absent(source.kind()) => Ok(None),
        Err(e @ Error::Io { .. }) if !named => {
            tracing::warn!("{e}; it is not used");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn absent(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Makes the folder of `path`, if that is the user's cache: no other is ours to make.
fn make_cache(cache_dir: Option<&Path>, path: &Path) {
    let _ = cache_dir.filter(|dir| path.parent() == Some(dir)).map(std::fs::create_dir_all);
}

/// The first place that takes the file.
fn write_somewhere(
    places: &[PathBuf],
    cache_dir: Option<&Path>,
    write: impl Fn(&Path) -> Result<()>,
) -> Option<PathBuf> {
    let mut failures = Vec::new();
    for path in places {
        make_cache(cache_dir, path);
        match write(path) {
            Ok(()) => return Some(path.clone()),
            Err(e) => failures.push(e.to_string()),
        }
    }
    let failures = if failures.is_empty() { "there is no folder for it".to_owned() } else { failures.join("; ") };
    tracing::warn!("the codes are not kept: {failures} (set RKSC_CACHE_DIR to a folder that can be written)");
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_the_first_folder_that_is_named() {
        let from = |set: &[(&str, &str)]| {
            cache_dir(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
        };
        let home = ("HOME", "/home/me");
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(from(&[home, xdg, ("RKSC_CACHE_DIR", "/r")]), Some("/r".into()));
        assert_eq!(from(&[home, xdg, ("RKSC_CACHE_DIR", "")]), Some("/x/rksc".into()));
        assert_eq!(from(&[home]), Some("/home/me/.cache/rksc".into()));
        assert_eq!(from(&[]), None);
    }
}

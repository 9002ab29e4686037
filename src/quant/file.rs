//! A model's codes as a safetensors file.
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `<name>.codes` | U32 | `[out, in / codes per word]` |
//! | `<name>.scales` | F16 | `[out, in / group]` |
//! | `<name>.zeros` | U8 or F16; none for matrices in 8 bits | `[out, in / group]` |
//!
//! The metadata say what the set was made from and with, and hold a digest of all tensors. They lie in order of their
//! alignment, so that a map of the file is used in place. What a reader has mapped stays whole: files are replaced by
//! rename, never rewritten.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;

use ::safetensors::Dtype;
use half::f16;
use memmap2::Mmap;
use serde_json::json;

use super::options::QuantOptions;
use super::parallel::{all_cores, for_each};
use super::weights::{Projection, QuantWeights, check_model, inputs, projections};
use super::{QuantTensor, Scales, ZeroKind, Zeros};
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;
use crate::model::weights::Access;
use crate::model::weights::fingerprint::sha256;
use crate::model::weights::safetensors::{Located, aligned_copy, load, locate};
use crate::model::weights::{TensorData, WeightStore, weights_error};

const FORMAT: &str = "rksc-codes";
/// The format's version.
const VERSION: &str = "1";
/// Multiple of bytes at which the tensors start.
const ALIGN: usize = 64;

/// What a file is asked to hold.
pub(super) struct Wanted<'a> {
    pub(super) model: &'a ModelConfig,
    /// See [`WeightStore::fingerprint`].
    pub(super) fingerprint: &'a str,
    pub(super) options: QuantOptions,
}

/// A whole file's content.
pub(super) enum Content {
    /// What was wanted, where it is mapped.
    Wanted(QuantWeights),
    /// Something else, and what.
    Other(String),
}

impl QuantWeights {
    /// Maps the file at `path`, which must hold the set of this model, made with these options.
    pub fn read(path: &Path, model: &ModelConfig, store: &WeightStore, options: QuantOptions) -> Result<Self> {
        let fingerprint = store.fingerprint(model);
        match read(path, &Wanted { model, fingerprint: &fingerprint, options })? {
            Content::Wanted(weights) => Ok(weights),
            Content::Other(what) => Err(other(path, &what)),
        }
    }

    /// Writes a file at `path` for the model whose set this is. It appears whole or not at all.
    pub fn write(&self, path: &Path, model: &ModelConfig, store: &WeightStore) -> Result<()> {
        write(path, self, &store.fingerprint(model))
    }
}

/// A tensor of the file.
struct Part<'a> {
    name: String,
    dtype: Dtype,
    shape: [usize; 2],
    bytes: &'a [u8],
}

/// The tensors of a matrix.
fn parts(tensor: &QuantTensor) -> impl Iterator<Item = Part<'_>> {
    let words = [tensor.out_features, tensor.in_features / tensor.bits.per_word()];
    let groups = [tensor.out_features, tensor.in_features / tensor.group];
    let zeros = match tensor.zeros() {
        Zeros::None => None,
        Zeros::Integer(zeros) => Some((Dtype::U8, zeros)),
        Zeros::Fractional(zeros) => Some((Dtype::F16, bytemuck::cast_slice(zeros))),
    };
    let scales = match tensor.scales() {
        Scales::F16(_) => Dtype::F16,
        Scales::F32(_) => Dtype::F32,
    };
    let part = |what, dtype, shape, bytes| Part { name: format!("{}.{what}", tensor.name), dtype, shape, bytes };
    [
        part("codes", Dtype::U32, words, bytemuck::cast_slice(tensor.codes())),
        part("scales", scales, groups, tensor.scales().bytes()),
    ]
    .into_iter()
    .chain(zeros.map(|(dtype, bytes)| part("zeros", dtype, groups, bytes)))
}

/// SHA-256 over name, type, shape and SHA-256 of every tensor, in order of the names.
fn digest<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>) -> Result<String> {
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort_unstable_by_key(|(name, ..)| *name);
    let mut lines = vec![String::new(); tensors.len()];
    for_each(all_cores(), lines.iter_mut().zip(tensors), |(line, (name, dtype, shape, bytes))| {
        *line = format!("{name} {dtype} {shape:?} {}\n", sha256(bytes));
    })?;
    Ok(sha256(lines.concat().as_bytes()))
}

pub(super) fn write(path: &Path, weights: &QuantWeights, fingerprint: &str) -> Result<()> {
    let Some(options) = weights.options else {
        return Err(Error::config("codes", "they are a checkpoint's own and stay there; none are written"));
    };
    let mut all: Vec<Part<'_>> = weights.iter().flat_map(parts).collect();
    all.sort_by_key(|part| std::cmp::Reverse(part.dtype.bitsize()));
    let sum = digest(all.iter().map(|part| (&*part.name, part.dtype, &part.shape[..], part.bytes)))?;
    let header = header(&all, &metadata(fingerprint, options, &sum))?;
    let save = |temporary: &Path, file: std::fs::File| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&header)?;
        all.iter().try_for_each(|part| out.write_all(part.bytes))?;
        out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(temporary, path)
    };
    let (temporary, file) = temporary(path)?;
    save(&temporary, file).map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Error::io(path, e)
    })?;
    // The rename outlasts a power cut once the folder is on disk too; some file systems cannot be asked to.
    let folder = path.parent().and_then(|folder| std::fs::File::open(folder).ok());
    let _ = folder.map(|folder| folder.sync_all());
    Ok(())
}

fn metadata(fingerprint: &str, options: QuantOptions, sum: &str) -> serde_json::Value {
    json!({
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint,
        "quantiser": options.quantiser.to_string(),
        "group": options.group.to_string(),
        "kv_bits": options.kv_bits.to_string(),
        "sha256": sum,
    })
}

/// Length and text, filled up with spaces to [`ALIGN`].
fn header(parts: &[Part<'_>], metadata: &serde_json::Value) -> Result<Vec<u8>> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".to_owned(), metadata.clone());
    let mut end = 0;
    for Part { name, dtype, shape, bytes } in parts {
        let start = end;
        end += bytes.len();
        let entry = json!({ "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end] });
        entries.insert(name.clone(), entry);
    }
    let text = serde_json::to_vec(&entries).map_err(|e| Error::Internal(e.to_string()))?;
    let len = (8 + text.len()).next_multiple_of(ALIGN) - 8;
    let mut header = (len as u64).to_le_bytes().to_vec();
    header.extend(text);
    header.resize(8 + len, b' ');
    Ok(header)
}

/// Refuses a place that cannot be written, and a file that holds something else than codes.
pub(super) fn check_replaceable(path: &Path) -> Result<()> {
    let (probe, _) = temporary(path)?;
    let _ = std::fs::remove_file(probe);
    let format = match load(path, Access::Map) {
        Ok(map) => locate(path, &map).ok().and_then(|(_, metadata)| metadata.get("format").cloned()),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        Err(_) => None,
    };
    if format.as_deref() == Some(FORMAT) {
        return Ok(());
    }
    Err(Error::format(path, "it holds no codes, or is damaged, and would be replaced; delete it, or name another file"))
}

/// A new file beside `path` that no other writer has.
fn temporary(path: &Path) -> Result<(std::path::PathBuf, std::fs::File)> {
    let Some(name) = path.file_name() else { return Err(Error::format(path, "not the name of a file")) };
    let name = name.to_string_lossy();
    let mut last = None;
    for number in 0..100 {
        let temporary = path.with_file_name(format!(".{name}.{}-{number}.tmp", std::process::id()));
        match std::fs::File::create_new(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => last = Some(e),
            Err(e) => return Err(Error::io(path, e)),
        }
    }
    Err(Error::io(path, last.unwrap_or_else(|| ErrorKind::AlreadyExists.into())))
}

/// Maps and checks a file. A damaged one is an error.
pub(super) fn read(path: &Path, wanted: &Wanted<'_>) -> Result<Content> {
    check_model(wanted.model, &wanted.options)?;
    let map = load(path, Access::Map).map_err(with_way_out)?;
    let (located, metadata) = locate(path, &map).map_err(with_way_out)?;
    if let Some(what) = what_else(path, &metadata, wanted)? {
        return Ok(Content::Other(what));
    }
    let sum = digest(located.iter().map(|t| (&*t.name, t.dtype, &t.shape[..], &map[t.range.clone()])))?;
    if metadata.get("sha256") != Some(&sum) {
        return Err(with_way_out(Error::format(path, "the tensors are not those it was written with; it is damaged")));
    }
    let file = Mapped { path, map, located: located.into_iter().map(|t| (Arc::clone(&t.name), t)).collect() };
    let mut tensors = BTreeMap::new();
    for at in inputs(wanted.model) {
        for projection in projections(wanted.model, &wanted.options, at) {
            let tensor = file.tensor(&projection).map_err(with_way_out)?;
            tensors.insert(Arc::clone(&tensor.name), tensor);
        }
    }
    Ok(Content::Wanted(QuantWeights { options: Some(wanted.options), tensors }))
}

/// Why the file is not the one that is wanted, from its metadata.
fn what_else(path: &Path, found: &HashMap<String, String>, wanted: &Wanted<'_>) -> Result<Option<String>> {
    if found.get("format").map(String::as_str) != Some(FORMAT) {
        let why = "field format: it holds no codes; name another file, or delete this one: it is made anew";
        return Err(Error::format(path, why));
    }
    let options = wanted.options;
    let fields = [
        ("version", VERSION.to_owned(), "in the format's version"),
        ("model", wanted.fingerprint.to_owned(), "for the model"),
        ("quantiser", options.quantiser.to_string(), "by quantiser"),
        ("group", options.group.to_string(), "in groups of"),
        ("kv_bits", options.kv_bits.to_string(), "with k and v in bits"),
    ];
    for (field, wanted, made) in fields {
        match found.get(field) {
            Some(found) if *found == wanted => {}
            Some(found) => {
                let found: String = found.chars().take(80).flat_map(char::escape_debug).collect();
                return Ok(Some(format!("field {field}: it was made {made} {found}, wanted is {wanted}")));
            }
            None => return Err(with_way_out(Error::format(path, format!("field {field}: missing")))),
        }
    }
    Ok(None)
}

/// A mapped file and what its header says.
struct Mapped<'a> {
    path: &'a Path,
    map: Arc<Mmap>,
    located: BTreeMap<Arc<str>, Located>,
}

impl Mapped<'_> {
    fn tensor(&self, projection: &Projection) -> Result<QuantTensor> {
        let (name, [out_features, in_features], form) = (&projection.name, projection.shape, projection.form);
        let groups = [out_features, in_features / form.group];
        let zeros = match form.zero_kind {
            ZeroKind::None => TensorData::Static(&[]),
            ZeroKind::Integer => self.data(name, "zeros", Dtype::U8, groups)?,
            ZeroKind::Fractional => self.data(name, "zeros", Dtype::F16, groups)?,
        };
        let tensor = QuantTensor {
            name: name.as_str().into(),
            out_features,
            in_features,
            group: form.group,
            bits: form.bits,
            zero_kind: form.zero_kind,
            codes: self.data(name, "codes", Dtype::U32, [out_features, in_features / form.bits.per_word()])?,
            scales: self.data(name, "scales", Dtype::F16, groups)?,
            zeros,
            columns: None,
        };
        tensor.validate()?;
        let finite = |numbers: &[f16]| numbers.iter().all(|x| x.is_finite());
        let scales_fit = match tensor.scales() {
            Scales::F16(scales) => finite(scales),
            Scales::F32(scales) => scales.iter().all(|x| x.is_finite()),
        };
        let zeros_fit = match tensor.zeros() {
            Zeros::None => true,
            Zeros::Integer(zeros) => zeros.iter().all(|&z| u32::from(z) <= form.bits.max_code()),
            Zeros::Fractional(zeros) => finite(zeros),
        };
        if !zeros_fit || !scales_fit {
            return Err(weights_error(self.path, name, "a scale or zero is out of range".to_owned()));
        }
        Ok(tensor)
    }

    /// The bytes of `<name>.<what>`, where they lie if that is on a boundary of its type.
    fn data(&self, name: &str, what: &str, dtype: Dtype, shape: [usize; 2]) -> Result<TensorData> {
        let name = format!("{name}.{what}");
        let Some(found) = self.located.get(name.as_str()) else {
            return Err(weights_error(self.path, &name, format!("missing (expected {dtype} {shape:?})")));
        };
        if (found.dtype, &found.shape[..]) != (dtype, &shape[..]) {
            let why = format!("expected {dtype} {shape:?}, found {} {:?}", found.dtype, found.shape);
            return Err(weights_error(self.path, &name, why));
        }
        let bytes = &self.map[found.range.clone()];
        Ok(if bytes.as_ptr().align_offset(dtype.bitsize() / 8) == 0 {
            TensorData::Mapped { map: Arc::clone(&self.map), range: found.range.clone() }
        } else {
            TensorData::Owned(aligned_copy(bytes))
        })
    }
}

/// A file that was named and holds something else.
pub(super) fn other(path: &Path, what: &str) -> Error {
    Error::format(path, format!("{what}; make the file anew (rksc-run quantise) or name another"))
}

fn with_way_out(e: Error) -> Error {
    const WAY_OUT: &str = "; delete the file: it is made anew";
    match e {
        Error::Format { path, why } => Error::Format { path, why: why + WAY_OUT },
        Error::Weights { path, tensor, why } => Error::Weights { path, tensor, why: why + WAY_OUT },
        other => other,
    }
}

//! Reading safetensors files and shard indexes, every one of them untrusted.
//!
//! The header is parsed twice: once here, to see what the crate does not look at (duplicate keys) and to say in words
//! what is wrong with a tensor, and once by the `safetensors` crate, whose verdict and numbers count.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Component, Path};
use std::sync::Arc;

use ::safetensors::{Dtype, SafeTensors};
use memmap2::{Mmap, MmapMut};
use serde::Deserialize;
use serde::de::{Deserializer, IntoDeserializer, MapAccess, Visitor};

use super::{Access, Packed, Stored, Tensor, TensorData, shown_shape, weights_error};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::fields::{json_why, read_small};

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// Where a file's bytes are.
pub(super) enum Source<'a> {
    Mapped(Arc<Mmap>),
    Static(&'static [u8]),
    /// Not for long: tensors are copied.
    Lent(&'a [u8]),
}

impl Source<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }
}

/// The bytes of a regular file of at least a header length.
pub(crate) fn load(path: &Path, access: Access) -> Result<Arc<Mmap>> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::format(path, "not a regular file"));
    }
    if meta.len() < 8 {
        return Err(Error::format(path, format!("{} bytes long; a safetensors file has at least 8", meta.len())));
    }
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    if access == Access::Read {
        return read(path, &mut file, meta.len());
    }
    // SAFETY: the map is read-only and private to this process. Nobody may truncate or rewrite the file in place while
    // it is open; that is the user's promise (module docs), as with every mapped model.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    Ok(Arc::new(map))
}

/// A file of `len` bytes in memory of our own, page-aligned as a map is.
fn read(path: &Path, file: &mut File, len: u64) -> Result<Arc<Mmap>> {
    let num_bytes = usize::try_from(len).map_err(|_| Error::OutOfMemory { what: "the weights", bytes: len })?;
    let mut bytes = MmapMut::map_anon(num_bytes).map_err(|_| Error::OutOfMemory { what: "the weights", bytes: len })?;
    file.read_exact(&mut bytes).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => Error::format(path, format!("was cut short of its {len} bytes while it was read")),
        _ => Error::io(path, e),
    })?;
    Ok(Arc::new(bytes.make_read_only().map_err(|e| Error::io(path, e))?))
}

/// What a checked header says of a tensor, and where in the file its bytes are.
pub(crate) struct Located {
    pub(crate) name: Arc<str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// All tensors of one file, of whatever type, and the texts of its `__metadata__`.
pub(crate) fn locate(path: &Path, bytes: &[u8]) -> Result<(Vec<Located>, HashMap<String, String>)> {
    let header = header(path, bytes)?;
    let data_start = 8 + header.len();
    explain(path, header, bytes.len() - data_start)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| Error::format(path, format!("header: {e}")))?;

    let mut out = Vec::new();
    for (name, info) in metadata.tensors() {
        let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
        if bytes.get(range.clone()).is_none() {
            return Err(weights_error(path, &name, "its data lies outside the file".to_owned()));
        }
        out.push(Located { name: name.into(), dtype: info.dtype, shape: info.shape.clone(), range });
    }
    Ok((out, metadata.metadata().clone().unwrap_or_default()))
}

/// All tensors of one file.
pub(super) fn parse(path: &Path, source: &Source<'_>) -> Result<Vec<(Arc<str>, Stored)>> {
    let bytes = source.bytes();
    let mut out = Vec::new();
    let mut copied = 0;
    for Located { name, dtype, shape, range } in locate(path, bytes)?.0 {
        let in_place = |range: Range<usize>| match source {
            Source::Mapped(map) => TensorData::Mapped { map: Arc::clone(map), range },
            Source::Static(all) => TensorData::Static(&all[range]),
            Source::Lent(all) => TensorData::Owned(aligned_copy(&all[range])),
        };
        let stored = match dtype_of(dtype) {
            None => Stored::Packed(Packed { dtype, shape, data: in_place(range) }),
            Some(dtype) => {
                let slice = &bytes[range.clone()];
                let data = if slice.as_ptr().align_offset(4) != 0 {
                    copied += slice.len();
                    TensorData::Owned(aligned_copy(slice))
                } else {
                    in_place(range)
                };
                Stored::Ready(Tensor { name: Arc::clone(&name), dtype, shape, data })
            }
        };
        out.push((name, stored));
    }
    if copied > 0 {
        tracing::warn!("{}: {copied} bytes of misaligned tensors were copied; re-save the file", path.display());
    }
    Ok(out)
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::Bf16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

pub(super) fn dtype_in_file(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
    }
}

pub(crate) fn aligned_copy(bytes: &[u8]) -> Arc<[u32]> {
    let mut words: Arc<[u32]> = std::iter::repeat_n(0, bytes.len().div_ceil(4)).collect();
    if let Some(words) = Arc::get_mut(&mut words) {
        let out: &mut [u8] = bytemuck::cast_slice_mut(words);
        out[..bytes.len()].copy_from_slice(bytes);
    }
    words
}

/// The header's JSON text.
fn header<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a [u8]> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::format(path, format!("{} bytes long; a safetensors file has at least 8", bytes.len())));
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::format(path, "this is a Git LFS pointer, not the weights: run `git lfs pull`"));
    }
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let why = format!("header length {length} is over {MAX_HEADER_BYTES}; this is not a safetensors file");
        return Err(Error::format(path, why));
    }
    rest.get(..length as usize).ok_or_else(|| {
        let why = format!("header length {length}, but only {} bytes follow; the file is cut short", rest.len());
        Error::format(path, why)
    })
}

/// What the header says of one entry; `__metadata__` falls through.
#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Tensor { dtype: String, shape: Vec<u64>, data_offsets: (u64, u64) },
    Other(serde::de::IgnoredAny),
}

/// Looks for what deserves a sentence of its own: duplicates, holes, overlaps, wrong lengths.
fn explain(path: &Path, header: &[u8], data_len: usize) -> Result<()> {
    let Pairs(entries) = serde_json::from_slice::<Pairs<Entry>>(header)
        .map_err(|e| Error::format(path, format!("header: {}", json_why(header, &e))))?;
    if let Some(name) = duplicate(&entries) {
        return Err(weights_error(path, name, "twice in the header".to_owned()));
    }
    let mut spans = Vec::with_capacity(entries.len());
    for (name, entry) in &entries {
        let Entry::Tensor { dtype, shape, data_offsets: (start, end) } = entry else {
            if name == "__metadata__" {
                continue;
            }
            let why = "its header entry is malformed; it needs dtype, shape and data_offsets, whole numbers".to_owned();
            return Err(weights_error(path, name, why));
        };
        let known: Result<Dtype, serde::de::value::Error> = Dtype::deserialize(dtype.as_str().into_deserializer());
        let Ok(known) = known else {
            return Err(weights_error(path, name, format!("dtype {dtype:?} is unknown")));
        };
        if end < start {
            return Err(weights_error(path, name, format!("data_offsets [{start}, {end}] are reversed")));
        }
        if *end > data_len as u64 {
            let why = format!("data_offsets end at {end}, but the file has {data_len} bytes of data; it is cut short");
            return Err(weights_error(path, name, why));
        }
        let bits = shape.iter().try_fold(known.bitsize() as u64, |n, &d| n.checked_mul(d));
        if bits != (end - start).checked_mul(8) {
            let why = format!("shape {} of {dtype} does not fit its {} bytes of data", shown_shape(shape), end - start);
            return Err(weights_error(path, name, why));
        }
        spans.push((*start, *end, name));
    }
    spans.sort_unstable();
    let mut at = 0;
    for (start, end, name) in spans {
        if start != at {
            let what = if start > at { "a hole" } else { "an overlap" };
            let why = format!("its data starts at {start}, the one before ends at {at}: {what}");
            return Err(weights_error(path, name, why));
        }
        at = end;
    }
    if at != data_len as u64 {
        let why = format!("{} bytes follow the last tensor; the header does not name them", data_len as u64 - at);
        return Err(Error::format(path, why));
    }
    Ok(())
}

/// Reads `weight_map`: tensor to shard, each shard a plain file name.
pub(super) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Option<Pairs<String>>,
    }
    let bytes = read_small(path, MAX_INDEX_BYTES)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| Error::format(path, json_why(&bytes, &e)))?;
    let Some(Pairs(weight_map)) = index.weight_map else {
        return Err(Error::format(path, "weight_map: missing; it names the shard of every tensor"));
    };
    if weight_map.is_empty() {
        return Err(Error::format(path, "weight_map: empty"));
    }
    if let Some(name) = duplicate(&weight_map) {
        return Err(weights_error(path, name, "twice in weight_map".to_owned()));
    }
    for (name, shard) in &weight_map {
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\', ':', '\0']) {
            let why = format!("shard {shard:?} is not a plain file name in the model's folder");
            return Err(weights_error(path, name, why));
        }
        if !shard.ends_with(".safetensors") {
            return Err(weights_error(path, name, format!("shard {shard:?} is not a .safetensors file")));
        }
    }
    Ok(weight_map)
}

/// A JSON object with its pairs as they stand, duplicates included.
struct Pairs<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

fn duplicate<V>(pairs: &[(String, V)]) -> Option<&str> {
    let mut seen = HashSet::with_capacity(pairs.len());
    pairs.iter().map(|(name, _)| name.as_str()).find(|name| !seen.insert(*name))
}

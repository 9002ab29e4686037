//! Weights: tensors in their files.
//!
//! A [`WeightStore`] maps safetensors files and hands out [`Tensor`]s that point into the map, so opening a model reads
//! its headers and nothing else. Do not truncate or rewrite a file in place while it is open: the operating system then
//! ends the process (SIGBUS). Replacing it by rename is fine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::Dtype;
use half::{bf16, f16};
use memmap2::Mmap;

pub use checksums::check_sums;

use crate::dtype::DType;
use crate::error::{Error, Result};

mod checksums;
pub(crate) mod fingerprint;
mod fused;
mod random;
pub(crate) mod safetensors;

/// A tensor as it lies in its file (mapped) or in memory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the checkpoint.
    pub name: Arc<str>,
    /// Its element type.
    pub dtype: DType,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes are.
    pub data: TensorData,
}

/// Little-endian elements, at least 4-byte aligned.
#[derive(Clone, Debug)]
pub enum TensorData {
    /// In memory, as 32-bit words so that every element type is aligned.
    Owned(Arc<[u32]>),
    /// In a mapped file.
    Mapped {
        /// The whole file.
        map: Arc<Mmap>,
        /// The tensor's bytes in it.
        range: Range<usize>,
    },
    /// Inside the program.
    Static(&'static [u8]),
}

/// Elements rounded to `dtype`, as 32-bit words; two 16-bit ones a word, the first in the low half.
fn pack(dtype: DType, mut values: impl ExactSizeIterator<Item = f32>) -> Arc<[u32]> {
    let bits = |x: f32| match dtype {
        DType::F32 => x.to_bits(),
        DType::Bf16 => u32::from(bf16::from_f32(x).to_bits()),
        DType::F16 => u32::from(f16::from_f32(x).to_bits()),
    };
    if dtype == DType::F32 {
        return values.map(bits).collect();
    }
    let num_words = values.len().div_ceil(2);
    let mut next = || values.next().map_or(0, bits);
    (0..num_words).map(|_| next() | next() << 16).collect()
}

impl TensorData {
    /// All there are; up to three more than the elements take.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Owned(words) => bytemuck::cast_slice(words),
            Self::Mapped { map, range } => &map[range.clone()],
            Self::Static(bytes) => bytes,
        }
    }
}

impl Tensor {
    /// The elements, as bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data.bytes()[..self.num_elems() * self.dtype.size_bytes()]
    }

    /// Product of the shape.
    pub fn num_elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor as `to`, rounded to nearest even; where it lies when it is of that type already.
    pub fn cast(&self, to: DType) -> Self {
        if to == self.dtype {
            return self.clone();
        }
        let bytes = self.bytes();
        let words: Arc<[u32]> = match self.dtype {
            DType::F32 => pack(to, bytes.as_chunks().0.iter().map(|&e| f32::from_le_bytes(e))),
            DType::Bf16 => pack(to, bytes.as_chunks().0.iter().map(|&e| bf16::from_le_bytes(e).to_f32())),
            DType::F16 => pack(to, bytes.as_chunks().0.iter().map(|&e| f16::from_le_bytes(e).to_f32())),
        };
        Self { name: self.name.clone(), dtype: to, shape: self.shape.clone(), data: TensorData::Owned(words) }
    }

    /// Every element plus `offset`, in f32.
    pub(crate) fn plus(&self, offset: f32) -> Self {
        let wide = self.cast(DType::F32);
        let elems = wide.bytes().as_chunks().0;
        let data = TensorData::Owned(pack(DType::F32, elems.iter().map(|&e| f32::from_le_bytes(e) + offset)));
        Self { data, ..wide.clone() }
    }

    /// Index of the first element that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<usize> {
        fn find<const N: usize>(bytes: &[u8], finite: impl Fn([u8; N]) -> bool) -> Option<usize> {
            // A branch-free sweep over each chunk, then a search of the one chunk that has a culprit.
            let (elems, _) = bytes.as_chunks::<N>();
            elems.chunks(4096).enumerate().find_map(|(i, chunk)| {
                if chunk.iter().fold(true, |all, &e| all & finite(e)) {
                    return None;
                }
                chunk.iter().position(|&e| !finite(e)).map(|at| i * 4096 + at)
            })
        }
        match self.dtype {
            DType::F32 => find(self.bytes(), |e: [u8; 4]| f32::from_le_bytes(e).is_finite()),
            DType::Bf16 => find(self.bytes(), |e: [u8; 2]| bf16::from_le_bytes(e).is_finite()),
            DType::F16 => find(self.bytes(), |e: [u8; 2]| f16::from_le_bytes(e).is_finite()),
        }
    }
}

/// A tensor of a file, usable or not.
#[derive(Clone, Debug)]
enum Stored {
    Ready(Tensor),
    /// Of an element type the engine does not compute with. Harmless until someone asks for it.
    Packed(Packed),
}

/// A tensor as it lies in its file, of any element type: what checkpoints in codes are made of.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Its bytes, aligned as in the file unless they were copied.
    pub(crate) data: TensorData,
}

/// The tensors of one checkpoint.
#[derive(Clone, Debug)]
pub struct WeightStore {
    /// What errors call the store when no single file is to blame.
    path: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<Arc<str>, (usize, Stored)>,
}

/// How the bytes of weights files are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Mapped: pages are read as they are used, and shared with others. Nobody may change a file while it is open.
    #[default]
    Map,
    /// Read into memory first: what happens to a file afterwards does not matter.
    Read,
}

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

impl WeightStore {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_by(dir, Access::Map)
    }

    /// As [`open`](Self::open), with a choice of access.
    pub fn open_by(dir: &Path, access: Access) -> Result<Self> {
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        if single.exists() {
            let mut store = Self::empty(single.clone());
            store.add_file(single, access)?;
            return Ok(store);
        }
        if index.exists() {
            return Self::open_sharded(dir, &index, access);
        }
        std::fs::metadata(dir).map_err(|e| Error::io(dir, e))?;
        let why = format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}; -m takes a Hugging Face model folder");
        Err(Error::format(dir, why))
    }

    /// Reads a safetensors file that is part of the program. Start it on a 4-byte boundary to have it used in place.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        let path = PathBuf::from("<bundled model.safetensors>");
        let mut store = Self::empty(path.clone());
        store.add_bytes(path, &safetensors::Source::Static(bytes))?;
        Ok(store)
    }

    /// Reads the bytes of a safetensors file and copies its tensors; `path` is what errors call it.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut store = Self::empty(path.to_owned());
        store.add_bytes(path.to_owned(), &safetensors::Source::Lent(bytes))?;
        Ok(store)
    }

    /// The tensor called `name`, which must have this shape.
    pub fn get(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let Some((file, stored)) = self.tensors.get(name) else {
            let why = format!("missing (expected shape {expected_shape:?}); the config asks for it");
            return Err(weights_error(&self.path, name, why));
        };
        let path = self.files.get(*file).unwrap_or(&self.path);
        match stored {
            Stored::Packed(Packed { dtype, .. }) => {
                Err(weights_error(path, name, format!("dtype {dtype} is not supported; use F32, BF16 or F16")))
            }
            Stored::Ready(tensor) if tensor.shape != expected_shape => {
                let why =
                    format!("expected shape {expected_shape:?} from the config, found {}", shown_shape(&tensor.shape));
                Err(weights_error(path, name, why))
            }
            Stored::Ready(tensor) => Ok(tensor.clone()),
        }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(|name| &**name)
    }

    /// The tensor called `name`, of whatever element type.
    pub(crate) fn packed(&self, name: &str) -> Option<Packed> {
        Some(match &self.tensors.get(name)?.1 {
            Stored::Packed(packed) => packed.clone(),
            Stored::Ready(tensor) => Packed {
                dtype: safetensors::dtype_in_file(tensor.dtype),
                shape: tensor.shape.clone(),
                data: tensor.data.clone(),
            },
        })
    }

    /// An error about the tensor `name`, or about its absence.
    pub(crate) fn blame(&self, name: &str, why: String) -> Error {
        let file = self.tensors.get(name).and_then(|(file, _)| self.files.get(*file));
        weights_error(file.unwrap_or(&self.path), name, why)
    }

    /// Bytes of all tensors the engine computes with as they are.
    pub fn num_bytes(&self) -> u64 {
        self.ready().map(|(_, tensor)| tensor.bytes().len() as u64).sum()
    }

    /// The files, in the order they were opened.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Reads every element (`--check-tensors`) and names the first that is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        self.ready().try_for_each(|(file, tensor)| self.refuse_non_finite(file, tensor))
    }

    /// As [`get`](Self::get), for a tensor without NaN and infinities.
    pub(crate) fn get_finite(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let tensor = self.get(name, expected_shape)?;
        let file = self.tensors.get(name).map_or(0, |(file, _)| *file);
        self.refuse_non_finite(file, &tensor)?;
        Ok(tensor)
    }

    fn refuse_non_finite(&self, file: usize, tensor: &Tensor) -> Result<()> {
        let Some(at) = tensor.first_non_finite() else { return Ok(()) };
        let path = self.files.get(file).unwrap_or(&self.path);
        let why = format!("element {at} is NaN or infinite; the file is damaged, fetch it again");
        Err(weights_error(path, &tensor.name, why))
    }

    fn ready(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.tensors.values().filter_map(|(file, stored)| match stored {
            Stored::Ready(tensor) => Some((*file, tensor)),
            Stored::Packed(_) => None,
        })
    }

    fn empty(path: PathBuf) -> Self {
        Self { path, files: Vec::new(), tensors: BTreeMap::new() }
    }

    fn open_sharded(dir: &Path, index: &Path, access: Access) -> Result<Self> {
        let weight_map = safetensors::read_index(index)?;
        let mut store = Self::empty(index.to_owned());
        let mut shards: Vec<&str> = weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in &shards {
            let path = dir.join(shard);
            if !path.exists() {
                return Err(Error::format(
                    index,
                    format!("weight_map names shard {shard}, which is not there; fetch it"),
                ));
            }
            store.add_file(path, access)?;
        }
        for (name, shard) in &weight_map {
            let found = store.tensors.get(name.as_str()).and_then(|(file, _)| store.files.get(*file));
            if found != Some(&dir.join(shard)) {
                let why = format!("the index promises it in {shard}, which lacks it");
                return Err(weights_error(index, name, why));
            }
        }
        Ok(store)
    }

    fn add_file(&mut self, path: PathBuf, access: Access) -> Result<()> {
        let bytes = safetensors::load(&path, access)?;
        self.add_bytes(path, &safetensors::Source::Mapped(bytes))
    }

    fn add_bytes(&mut self, path: PathBuf, source: &safetensors::Source<'_>) -> Result<()> {
        let file = self.files.len();
        for (name, stored) in safetensors::parse(&path, source)? {
            if let Some((other, _)) = self.tensors.insert(name.clone(), (file, stored)) {
                let other = self.files.get(other).unwrap_or(&self.path).display();
                return Err(weights_error(&path, &name, format!("also in {other}; a tensor may be in one shard only")));
            }
        }
        self.files.push(path);
        Ok(())
    }
}

/// The name comes from a file: no control characters, and not all of a long one.
pub(crate) fn weights_error(path: &Path, tensor: &str, why: String) -> Error {
    let tensor = tensor.chars().take(200).flat_map(char::escape_debug).collect();
    Error::Weights { path: path.to_owned(), tensor, why }
}

fn shown_shape<T: std::fmt::Debug>(shape: &[T]) -> String {
    if shape.len() <= 8 { format!("{shape:?}") } else { format!("of rank {}", shape.len()) }
}

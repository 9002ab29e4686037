//! Random weights in the shape of a real model, for benches of speed.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::{Stored, Tensor, TensorData, WeightStore};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;

/// Standard deviation of every matrix and bias.
const STD: f32 = 0.02;

impl WeightStore {
    /// Weights of the config's shape, near N(0, 0.02), norms 1. Same seed, same weights, on any number of threads.
    pub fn random(config: &ModelConfig, seed: u64, dtype: DType) -> Result<Self> {
        let wanted = config.tensor_shapes();
        let bytes = config.num_params().saturating_mul(dtype.size_bytes() as u128);
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let too_large = |_| Error::OutOfMemory { what: "random weights", bytes };
        Vec::<u8>::new().try_reserve_exact(bytes.min(isize::MAX as u64) as usize).map_err(too_large)?;

        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(wanted.len()).min(16);
        let work = || {
            let mut done = Vec::new();
            while let Some((name, shape)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push(random_tensor(name, shape, seed, dtype));
            }
            done
        };
        let made = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut all = work();
            for other in others {
                all.extend(other.join().map_err(|_| Error::Internal("a weight filling thread ended".to_owned()))?);
            }
            Ok::<_, Error>(all)
        })?;
        let path = PathBuf::from("<random weights>");
        let tensors: BTreeMap<_, _> =
            made.into_iter().map(|tensor| (Arc::clone(&tensor.name), (0, Stored::Ready(tensor)))).collect();
        Ok(Self { path: path.clone(), files: vec![path], tensors })
    }
}

fn random_tensor(name: &str, shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    let elems: usize = shape.iter().product();
    let key = mix(name.bytes().fold(seed ^ GOLDEN, |h, b| mix(h ^ u64::from(b))));
    let norm = name.ends_with("norm.weight");
    let value = |i: u32| if norm { 1.0 } else { STD * normal(i) };
    let mut words: Arc<[u32]> = std::iter::repeat_n(0, (elems * dtype.size_bytes()).div_ceil(4)).collect();
    if let Some(words) = Arc::get_mut(&mut words) {
        match dtype {
            DType::F32 => fill(&mut bytemuck::cast_slice_mut(words)[..elems], key, value),
            DType::Bf16 => fill(&mut bytemuck::cast_slice_mut(words)[..elems], key, |i| bf16::from_f32(value(i))),
            DType::F16 => fill(&mut bytemuck::cast_slice_mut(words)[..elems], key, |i| f16::from_f32(value(i))),
        }
    }
    Tensor { name: name.into(), dtype, shape: shape.to_vec(), data: TensorData::Owned(words) }
}

/// Draws every element from a table of 65,536 values: 16 random bits an element, four elements a random word.
fn fill<T: Copy>(out: &mut [T], key: u64, value: impl Fn(u32) -> T) {
    let table: Vec<T> = (0..=0xffff).map(value).collect();
    let Ok(table) = <&[T; 0x1_0000]>::try_from(&table[..]) else { return };
    let mut state = key;
    for four in out.chunks_mut(4) {
        state = state.wrapping_add(GOLDEN);
        let mut bits = mix(state);
        for slot in four {
            *slot = table[(bits & 0xffff) as usize];
            bits >>= 16;
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Value `i` of the table: four uniform 16-bit numbers, summed, centred and scaled to variance 1.
fn normal(i: u32) -> f32 {
    let z = mix(u64::from(i + 1).wrapping_mul(GOLDEN));
    let sum = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
    // The sum has mean 2 * 65535 and standard deviation sqrt(4 / 12) * 65536.
    (sum as i32 - 131_070) as f32 * (1.732_050_8 / 65_536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_fit_the_config_and_repeat() {
        let config = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&config, 7, DType::Bf16).unwrap();
        let again = WeightStore::random(&config, 7, DType::Bf16).unwrap();
        for (name, shape) in config.tensor_shapes() {
            let tensor = store.get(&name, &shape).unwrap();
            assert_eq!(tensor.bytes(), again.get(&name, &shape).unwrap().bytes());
        }
        store.check_finite().unwrap();
        assert_eq!(u128::from(store.num_bytes()), config.num_params() * 2);
        let norm = store.get("model.norm.weight", &[64]).unwrap();
        assert!(norm.bytes().chunks(2).all(|e| bf16::from_le_bytes([e[0], e[1]]).to_f32() == 1.0));
    }

    #[test]
    fn random_weights_look_normal() {
        let config = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&config, 1, DType::F32).unwrap();
        let tensor = store.get("model.embed_tokens.weight", &[256, 64]).unwrap();
        let xs: Vec<f64> =
            tensor.bytes().as_chunks().0.iter().map(|&e: &[u8; 4]| f64::from(f32::from_le_bytes(e))).collect();
        let mean = xs.iter().sum::<f64>() / xs.len() as f64;
        let std = (xs.iter().map(|x| x * x).sum::<f64>() / xs.len() as f64).sqrt();
        assert!(mean.abs() < 1e-3 && (std - 0.02).abs() < 1e-3, "mean {mean}, std {std}");
        let other = WeightStore::random(&config, 2, DType::F32).unwrap();
        assert_ne!(tensor.bytes(), other.get("model.embed_tokens.weight", &[256, 64]).unwrap().bytes());
    }
}

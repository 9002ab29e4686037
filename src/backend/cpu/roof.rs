//! What this machine can do at most, measured: memory is the roof over every op that moves more than it computes, and
//! `linear` at many rows is the roof over the others.

use std::sync::Arc;
use std::time::Instant;

use half::{bf16, f16};

use super::matrix::CpuMatrix;
use super::simd::SimdLevel;
use super::vector::{Kernel, Vector, dispatch};
use super::{Cpu, CpuBuf};
use crate::backend::{Backend, Linear};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::weights::{Tensor, TensorData};
use crate::testing::fill::Fill;

/// Bytes swept: far more than any cache holds.
pub const SWEEP_BYTES: usize = 1 << 30;
/// Sweeps timed; the best counts, for a roof is what was reached, not what is usual.
const SWEEPS: usize = 8;
/// Bytes timed at once: starting threads takes about a hundredth of the time to read them.
const PIECE_BYTES: usize = 128 << 20;
/// The qkv projection of Qwen2.5-7B, `[out, in]`: large enough for any level, small enough for a quick answer.
const PEAK_SHAPE: [usize; 2] = [4608, 3584];

/// Bytes a second of the memory.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct MemoryRoof {
    /// Reading 1 GiB once, every thread its share.
    pub read: f64,
    /// Copying 64 MiB at a time, 512 MiB in all, to another place; read and write counted.
    pub copy: f64,
}

impl MemoryRoof {
    /// Takes about a second and 1 GiB.
    pub fn measure(threads: usize, level: SimdLevel) -> Self {
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let mut data = vec![1.0f32; SWEEP_BYTES / size_of::<f32>()];
        let read = sweep(&mut data, |piece| {
            let share = piece.len().div_ceil(threads);
            std::thread::scope(|scope| {
                for part in piece.chunks(share) {
                    scope.spawn(move || std::hint::black_box(dispatch(level, Sum(part))));
                }
            });
        });
        let copy = sweep(&mut data, |piece| {
            let (src, dst) = piece.split_at_mut(piece.len() / 2);
            let share = src.len().div_ceil(threads);
            std::thread::scope(|scope| {
                for (src, dst) in src.chunks(share).zip(dst.chunks_mut(share)) {
                    scope.spawn(move || dst.copy_from_slice(src));
                }
            });
        });
        Self { read: SWEEP_BYTES as f64 / read, copy: SWEEP_BYTES as f64 / copy }
    }
}

/// Floating-point operations a second of `linear` at `rows` rows: the best of a few calls.
pub fn linear_rate(cpu: &mut Cpu, dtype: DType, rows: usize) -> Result<f64> {
    let [out_features, in_features] = PEAK_SHAPE;
    let w = random_matrix(out_features, in_features, dtype, 1)?;
    let x = random_buf(rows * in_features, dtype, 2);
    let mut y = cpu.alloc(DType::F32, rows * out_features)?;
    let mut run =
        |cpu: &mut Cpu| cpu.linear(Linear { rows: 0..rows, x: &x, w: &w, river: None, bias: None, y: &mut y });
    let mut seconds = f64::INFINITY;
    let begun = Instant::now();
    // The first call also touches the buffers; slow levels are asked twice only.
    for call in 0..SWEEPS {
        let started = Instant::now();
        run(cpu)?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
        if call > 0 && begun.elapsed().as_secs_f64() > 2.0 {
            break;
        }
    }
    Ok((2 * rows * out_features * in_features) as f64 / seconds)
}

/// A weight matrix `[out, in]` of small random numbers.
pub fn random_matrix(out_features: usize, in_features: usize, dtype: DType, seed: u64) -> Result<CpuMatrix> {
    let len = out_features * in_features;
    let mut words: Arc<[u32]> = std::iter::repeat_n(0, (len * dtype.size_bytes()).div_ceil(4)).collect();
    if let Some(words) = Arc::get_mut(&mut words) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
        match random_buf(len, dtype, seed) {
            CpuBuf::F32(x) => bytes[..4 * len].copy_from_slice(bytemuck::cast_slice(&x)),
            CpuBuf::Bf16(x) => bytes[..2 * len].copy_from_slice(bytemuck::cast_slice(&x)),
            CpuBuf::F16(x) => bytes[..2 * len].copy_from_slice(bytemuck::cast_slice(&x)),
        }
    }
    let shape = vec![out_features, in_features];
    CpuMatrix::new(&[Tensor { name: "random".into(), dtype, shape, data: TensorData::Owned(words) }], dtype)
}

/// `len` random numbers even over [-1, 1).
pub fn random_buf(len: usize, dtype: DType, seed: u64) -> CpuBuf {
    let mut fill = Fill::new(seed);
    let values = (0..len).map(|_| fill.unit());
    match dtype {
        DType::F32 => CpuBuf::F32(values.collect()),
        DType::Bf16 => CpuBuf::Bf16(values.map(bf16::from_f32).collect()),
        DType::F16 => CpuBuf::F16(values.map(f16::from_f32).collect()),
    }
}

/// Seconds to work through `data` piece by piece, where each piece counts with its fastest sweep: a sweep is long enough
/// to be interrupted, a piece seldom is. All of the data passes between two visits of a piece, so none is in a cache.
fn sweep(data: &mut [f32], mut f: impl FnMut(&mut [f32])) -> f64 {
    let piece = PIECE_BYTES / size_of::<f32>();
    let mut seconds = vec![f64::INFINITY; data.len().div_ceil(piece)];
    for _ in 0..SWEEPS {
        for (piece, seconds) in data.chunks_mut(piece).zip(&mut seconds) {
            let started = Instant::now();
            f(piece);
            *seconds = seconds.min(started.elapsed().as_secs_f64());
        }
    }
    seconds.into_iter().sum()
}

/// The sum of a slice, in as many streams as hide the latency of an addition.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<V: Vector>(self, v: V) -> f32 {
        let zero = v.splat(0.0);
        let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
        let step = V::LANES;
        for x in self.0.chunks_exact(4 * step) {
            a = v.add(a, v.load(x));
            b = v.add(b, v.load(&x[step..]));
            c = v.add(c, v.load(&x[2 * step..]));
            d = v.add(d, v.load(&x[3 * step..]));
        }
        v.reduce_add(v.add(v.add(a, b), v.add(c, d)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sweep_reads_everything() {
        let data = vec![1.0; 64 * 100];
        for level in SimdLevel::ALL.into_iter().filter(|l| l.is_available()) {
            assert_eq!(dispatch(level, Sum(&data)), 6400.0);
        }
    }
}

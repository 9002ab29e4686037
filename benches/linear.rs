//! `linear` at the layer shapes of real models, weights rotated through memory: through at least 256 MB, and twice
//! the L3 that is visible.
//!
//! ```text
//! cargo bench --bench linear -- [--rows 1,8,256] [--simd avx512] [--threads 2] [--filter 7b] [--compute bf16] [--rotate-mib 1024] [--json FILE]
//! ```
//! One line a case: `op | shape | rows | us | p10 us | GB/s of weights | GFLOP/s`, median and 10th percentile.
//! `benches/peers/torch_linear.py` prints the same cases for PyTorch.

use std::time::{Duration, Instant};

use half::{bf16, f16};
use rksc::DType;
use rksc::backend::cpu::linear::{Activations, LinearArgs, LinearScratch, linear};
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::roof::MemoryRoof;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::model::weights::{Tensor, TensorData};
use rksc::testing::{fill, tensor};

/// (model and layer, in, out)
const SHAPES: &[(&str, usize, usize)] = &[
    ("qwen2.5-0.5b qkv", 896, 1152),
    ("qwen2.5-0.5b o", 896, 896),
    ("qwen2.5-0.5b gate_up", 896, 9728),
    ("qwen2.5-0.5b down", 4864, 896),
    ("qwen2.5-1.5b qkv", 1536, 2048),
    ("qwen2.5-1.5b gate_up", 1536, 17920),
    ("qwen2.5-1.5b down", 8960, 1536),
    ("qwen2.5-7b qkv", 3584, 4608),
    ("qwen2.5-7b gate_up", 3584, 37888),
    ("qwen2.5-7b down", 18944, 3584),
];
/// Weights rotate through at least this much, and twice the L3 that is visible: they are to come from memory.
const MIN_ROTATE_MIB: usize = 256;
const MIN_TIME: Duration = Duration::from_millis(600);

struct Options {
    rows: Vec<usize>,
    level: SimdLevel,
    threads: usize,
    filter: String,
    compute: DType,
    rotate_mib: usize,
    json: Option<String>,
}

impl Options {
    fn parse() -> anyhow::Result<Self> {
        let mut options = Self {
            rows: vec![1, 8, 64, 256, 512],
            level: SimdLevel::detect(),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            filter: String::new(),
            compute: DType::Bf16,
            rotate_mib: MIN_ROTATE_MIB.max(2 * l3_mib()),
            json: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            if arg == "--bench" {
                continue;
            }
            let value = args.next().ok_or_else(|| anyhow::anyhow!("{arg} needs a value"))?;
            match arg.as_str() {
                "--rows" => options.rows = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--simd" => options.level = value.parse()?,
                "--threads" => options.threads = value.parse()?,
                "--filter" => options.filter = value,
                "--compute" => options.compute = value.parse()?,
                "--rotate-mib" => options.rotate_mib = value.parse()?,
                "--json" => options.json = Some(value),
                _ => anyhow::bail!("{arg} is unknown"),
            }
        }
        Ok(options)
    }
}

/// The last-level cache as the system tells it; 0 if it does not.
fn l3_mib() -> usize {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    size.trim().trim_end_matches('K').parse::<usize>().map_or(0, |kib| kib >> 10)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse()?;
    let mut pool = ThreadPool::new(options.threads);
    let mut scratch = LinearScratch::default();
    let mut cases = Vec::new();
    for &(name, k, n) in SHAPES.iter().filter(|(name, ..)| name.contains(&options.filter)) {
        let bytes = n * k * options.compute.size_bytes();
        let first = tensor(name, options.compute, &[n, k], &fill(1, n * k));
        let copy = || Tensor {
            data: TensorData::Owned(first.bytes().as_chunks::<4>().0.iter().map(|&b| u32::from_ne_bytes(b)).collect()),
            ..first.clone()
        };
        let num_copies = (options.rotate_mib << 20).div_ceil(bytes).max(2);
        let weights =
            (0..num_copies).map(|_| CpuMatrix::new(&[copy()], options.compute)).collect::<Result<Vec<_>, _>>()?;
        for &rows in &options.rows {
            let x = fill(2, rows * k);
            let x_bf16: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
            let x_f16: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
            let x = match options.compute {
                DType::F32 => Activations::F32(&x),
                DType::Bf16 => Activations::Bf16(&x_bf16),
                DType::F16 => Activations::F16(&x_f16),
            };
            let mut y = vec![0.0; rows * n];
            let mut samples = Vec::new();
            let begin = Instant::now();
            while samples.len() < 10 || (begin.elapsed() < MIN_TIME && samples.len() < 300) {
                let w = &weights[samples.len() % weights.len()];
                let args = LinearArgs { x, rows: 0..rows, in_features: k, w, bias: None, y: &mut y };
                let start = Instant::now();
                linear(&mut pool, options.level, &mut scratch, args)?;
                samples.push(start.elapsed().as_secs_f64() * 1e6);
            }
            let mut timed = samples[2..].to_vec();
            timed.sort_by(f64::total_cmp);
            let (us, p10) = (timed[timed.len() / 2], timed[timed.len() / 10]);
            let (gbps, gflops) = (bytes as f64 / us / 1e3, (2 * n * k * rows) as f64 / us / 1e3);
            let (compute, level) = (options.compute, options.level);
            println!(
                "linear | {name} {k}->{n} {compute} {level} | {rows} | {us:.1} | {p10:.1} | {gbps:.1} | {gflops:.0}"
            );
            cases.push(serde_json::json!({ "shape": name, "in": k, "out": n, "rows": rows, "us": us, "p10_us": p10 }));
        }
    }
    if let Some(path) = options.json {
        let engine = format!("rksc {} {} {} threads", options.compute, options.level, options.threads);
        // What plain reading gives in this very run: the floor under every case with few rows.
        let read = MemoryRoof::measure(options.threads, options.level).read;
        std::fs::write(
            path,
            serde_json::to_string_pretty(
                &serde_json::json!({ "engine": engine, "read_gb_per_s": read / 1e9, "cases": cases }),
            )?,
        )?;
    }
    Ok(())
}

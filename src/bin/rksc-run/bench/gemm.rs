//! `rksc-run bench gemm`: the linear op at the layer shapes of a model.
//!
//! Each matrix comes in so many copies that the weights are read from memory, as in a pass. The roof of a case is the
//! larger of two times: its weights at the measured memory read rate, its arithmetic at the op's own rate at 1024 rows.

use std::time::Instant;

use clap::Args as ClapArgs;
use rksc::DType;
use rksc::backend::cpu::matrix::CpuMatrix;
use rksc::backend::cpu::roof::{MemoryRoof, linear_rate, random_buf, random_matrix};
use rksc::backend::cpu::{Cpu, CpuBuf};
use rksc::backend::{Backend, Linear};
use rksc::model::family::ModelConfig;
use rksc::quant::{CodeBits, ZeroKind};
use rksc::report::LatencyMs;
use rksc::testing::linear_quantised::CodeFormat;

use super::{CpuArgs, Table, cpu_model, gb};
use crate::common::print_json;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    cpu: CpuArgs,
    /// The model whose layers are timed.
    #[arg(long, default_value = "qwen2.5-0.5b")]
    shape: String,
    /// Rows, one case each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,256")]
    rows: Vec<usize>,
    /// What the matrices hold: elements of the compute type, or codes of 4 bits (fractional zeros), 8 bits (none), or E4M3.
    #[arg(long, value_enum, default_value_t)]
    weights: Weights,
    /// Neighbours along k that share a scale and a zero of codes.
    #[arg(long, default_value_t = 64)]
    group: usize,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

/// How the matrices are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Weights {
    #[default]
    Dense,
    W4,
    W8,
    F8,
}

impl Weights {
    /// A random `[out, in]`.
    fn matrix(self, out: usize, k: usize, args: &Args, seed: u64) -> rksc::Result<CpuMatrix> {
        let (dtype, group) = (args.cpu.dtype, args.group);
        let codes = |bits, zeros| CpuMatrix::new(&[CodeFormat { bits, group, zeros }.random(out, k, seed)], dtype);
        match self {
            Self::Dense => random_matrix(out, k, dtype, seed),
            Self::W4 => codes(CodeBits::W4, ZeroKind::Fractional),
            Self::W8 => codes(CodeBits::W8, ZeroKind::None),
            Self::F8 => codes(CodeBits::F8, ZeroKind::None),
        }
    }
}

/// Copies of a matrix fill at least this much.
const ROTATE_BYTES: u64 = 256 << 20;

#[derive(serde::Serialize)]
struct Case {
    layer: &'static str,
    in_features: usize,
    out_features: usize,
    rows: usize,
    us: LatencyMs,
    weight_gb_per_s: f64,
    gflops: f64,
    roof_us: f64,
    of_roof: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.rows.iter().all(|r| (1..=65_536).contains(r)), "--rows: must be between 1 and 65536");
    let model = ModelConfig::shape(&args.shape)?;
    let mut cpu = args.cpu.open()?;
    eprintln!("measuring the roof");
    let read = MemoryRoof::measure(args.cpu.threads, args.cpu.simd).read;
    let flops = linear_rate(&mut cpu, args.cpu.dtype, 1024)?;
    let mut cases = Vec::new();
    for (layer, in_features, out_features) in layers(&model) {
        eprintln!("{layer}");
        let weights = Rotating::new(in_features, out_features, args)?;
        for &rows in &args.rows {
            let us = weights.time(&mut cpu, rows, args.cpu.dtype)?;
            let arithmetic = (2 * rows * in_features * out_features) as f64;
            let roof_us = (weights.bytes as f64 / read).max(arithmetic / flops) * 1e6;
            cases.push(Case {
                layer,
                in_features,
                out_features,
                rows,
                us,
                weight_gb_per_s: weights.bytes as f64 / us.p50 / 1e3,
                gflops: arithmetic / us.p50 / 1e3,
                roof_us,
                of_roof: roof_us / us.p50,
            });
        }
    }
    if args.json {
        return print_json(&serde_json::json!({
            "bench": "gemm", "shape": args.shape, "dtype": args.cpu.dtype, "weights": args.weights,
            "group": args.group, "cpu": cpu_model(), "device": cpu.describe(),
            "memory_read_gb_per_s": gb(read), "linear_gflops_1024_rows": flops / 1e9, "cases": cases,
        }));
    }
    let weights = match args.weights {
        Weights::Dense => String::new(),
        codes => format!(" x {codes:?} in groups of {}", args.group),
    };
    say!("{} | {} | {}{weights}", cpu_model(), cpu.describe(), args.cpu.dtype);
    say!("roof: memory read {:.1} GB/s, linear at 1024 rows {:.0} GFLOP/s", gb(read), flops / 1e9);
    let mut table = Table::new(&["layer", "in", "out", "rows", "us", "p10", "p90", "GB/s", "GFLOP/s", "of roof"]);
    for c in &cases {
        table.row(vec![
            c.layer.into(),
            c.in_features.to_string(),
            c.out_features.to_string(),
            c.rows.to_string(),
            format!("{:.1}", c.us.p50),
            format!("{:.1}", c.us.p10),
            format!("{:.1}", c.us.p90),
            format!("{:.1}", c.weight_gb_per_s),
            format!("{:.0}", c.gflops),
            format!("{:.0} %", c.of_roof * 100.0),
        ]);
    }
    table.print()?;
    Ok(())
}

/// Name, in and out of the matrices of a layer as the engine stacks them, and of the unembedding.
fn layers(m: &ModelConfig) -> [(&'static str, usize, usize); 5] {
    let q = m.num_q_heads * m.head_dim;
    let kv = m.num_kv_heads * m.head_dim;
    [
        ("qkv", m.hidden, q + 2 * kv),
        ("o", q, m.hidden),
        ("gate_up", m.hidden, 2 * m.intermediate),
        ("down", m.intermediate, m.hidden),
        ("lm_head", m.hidden, m.vocab_size),
    ]
}

/// Copies of a matrix, used in turn.
struct Rotating {
    copies: Vec<CpuMatrix>,
    /// Bytes of one copy.
    bytes: u64,
    in_features: usize,
    out_features: usize,
}

impl Rotating {
    fn new(in_features: usize, out_features: usize, args: &Args) -> rksc::Result<Self> {
        let matrix = |seed| args.weights.matrix(out_features, in_features, args, seed);
        let mut copies = vec![matrix(0)?];
        let bytes = copies[0].num_bytes();
        for seed in 1..ROTATE_BYTES.div_ceil(bytes.max(1)) {
            copies.push(matrix(seed)?);
        }
        Ok(Self { copies, bytes, in_features, out_features })
    }

    /// Microseconds of a call: 30 samples, fewer when they take long.
    fn time(&self, cpu: &mut Cpu, rows: usize, dtype: DType) -> rksc::Result<LatencyMs> {
        let x: CpuBuf = random_buf(rows * self.in_features, dtype, 7);
        let mut y = cpu.alloc(DType::F32, rows * self.out_features)?;
        let mut samples = Vec::new();
        let begun = Instant::now();
        for call in 0.. {
            let w = &self.copies[call % self.copies.len()];
            let started = Instant::now();
            cpu.linear(Linear { rows: 0..rows, x: &x, w, river: None, bias: None, y: &mut y })?;
            if call >= 2 {
                samples.push(started.elapsed().as_secs_f64() * 1e6);
            }
            let enough = samples.len() >= 30 || (samples.len() >= 5 && begun.elapsed().as_secs_f64() > 2.0);
            if enough {
                break;
            }
        }
        Ok(LatencyMs::of(&samples))
    }
}

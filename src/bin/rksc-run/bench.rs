//! `rksc-run bench`: policies against each other, whole passes, one op, the machine. Tables and JSON go to stdout.

mod agree;
mod arms;
mod asks;
mod evict;
mod gemm;
mod kernels;
mod kv_budget;
mod ladder;
mod mechanisms;
mod paired;
mod passes;
mod river;
mod roof;
mod tree;
mod trial;

use clap::{Args, Subcommand};
use rksc::DType;
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::config::EngineConfig;
use rksc::kv::KvLayout;
use rksc::model::family::ModelConfig;
use rksc::report::LatencyMs;

#[derive(Subcommand)]
pub(crate) enum Command {
    Ladder(Box<ladder::Args>),
    Mechanisms(Box<mechanisms::Args>),
    Asks(Box<asks::Args>),
    /// Decode steps of branches that share a context.
    Decode(passes::Args),
    /// Whole prompts.
    Prefill(passes::Args),
    /// The linear op at the layer shapes of a model, weights from memory.
    Gemm(gemm::Args),
    Kernels(Box<kernels::Args>),
    /// What a KV budget costs in answers, and what it gives in memory and speed.
    #[command(subcommand)]
    KvBudget(kv_budget::Command),
    /// What early exit costs in answers and gives in speed.
    #[command(subcommand)]
    River(river::Command),
    Agree(Box<agree::Args>),
    Evict(Box<evict::Args>),
    /// What this machine can do at most: memory, and the linear op at each SIMD level.
    Roof(roof::Args),
    Tree(Box<tree::Args>),
    Trial(Box<trial::Args>),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Ladder(args) => ladder::run(args),
        Command::Mechanisms(args) => mechanisms::run(args),
        Command::Asks(args) => asks::run(args),
        Command::Decode(args) => passes::decode(args),
        Command::Prefill(args) => passes::prefill(args),
        Command::Gemm(args) => gemm::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::KvBudget(command) => kv_budget::run(command),
        Command::River(command) => river::run(command),
        Command::Agree(args) => agree::run(args),
        Command::Evict(args) => evict::run(args),
        Command::Roof(args) => roof::run(args),
        Command::Tree(args) => tree::run(args),
        Command::Trial(args) => trial::run(args),
    }
}

/// Flags of the commands that time ops without an engine.
#[derive(Args, Clone)]
struct CpuArgs {
    /// Compute type: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// CPU kernels: auto, amx, avx512, avx2 or portable.
    #[arg(long, default_value = "auto")]
    simd: SimdLevel,
    /// CPU threads [default: one per core].
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
}

impl CpuArgs {
    fn open(&self) -> rksc::Result<Cpu> {
        Cpu::new(self.threads, self.simd)
    }
}

/// The processor's name, where the system tells it.
fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("model name"));
    let name = line.map_or("unknown", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{name}, {cores} cores")
}

/// Bytes a second in GB/s.
fn gb(bytes_per_second: f64) -> f64 {
    bytes_per_second / 1e9
}

/// Bytes of so many KV blocks of a model.
fn kv_bytes(config: &EngineConfig, model: &ModelConfig, num_blocks: usize) -> u64 {
    let block = KvLayout {
        num_blocks: 1,
        num_kv_heads: model.num_kv_heads,
        block_size: config.block_size,
        head_dim: model.head_dim,
        dtype: config.dtype,
    };
    num_blocks as u64 * block.block_bytes(model.num_layers)
}

fn median(samples: &[f64]) -> f64 {
    LatencyMs::of(samples).p50
}

/// The median, and of several samples the least and the most.
fn spread(samples: &[f64], digits: usize) -> String {
    let (lo, hi) = samples.iter().fold((f64::INFINITY, 0.0f64), |(lo, hi), &x| (lo.min(x), hi.max(x)));
    let middle = format!("{:.digits$}", median(samples));
    if samples.len() > 1 { format!("{middle} ({lo:.digits$} to {hi:.digits$})") } else { middle }
}

/// A table on stdout: first column to the left, the others to the right, as wide as they need to be.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|s| s.to_string()).collect()] }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn print(&self) -> std::io::Result<()> {
        use std::io::Write;
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = std::io::stdout().lock();
        for row in &self.rows {
            let mut line = String::new();
            for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                line += &if i == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

//! `rksc-run bench decode` and `rksc-run bench prefill`: whole passes through the engine.
//!
//! *decode*: B branches share a context and generate one token each per step; every step is timed alone. Its floor is
//! the time to read the counted bytes of weights and KV once at the measured memory rate; weights that stay in the
//! caches (the bundled model's) can be faster than that.
//! On a GPU that is its copy bandwidth, read and write counted.
//! *prefill*: B prompts that share nothing. Arithmetic counted: two operations per weight and token, and attention's
//! four per query element and slot; compared with what `linear` alone reaches at 1024 rows.

use std::time::Instant;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::roof::{MemoryRoof, linear_rate};
use rksc::config::ModelSource;
use rksc::engine::{BranchId, GenerateParams, PrefillOptions};
use rksc::model::family::ModelConfig;
use rksc::report::LatencyMs;
use rksc::sampler::SamplingParams;
use rksc::testing::fill::Fill;

use super::{Table, cpu_model, gb};
use crate::common::{self, EngineArgs, print_json};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Random weights of a named shape (tiny, qwen2.5-0.5b, ...) instead of a model.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
    /// Branches (decode) or prompts (prefill), one case each [default: 1,8,64 and 1].
    #[arg(short = 'B', long, value_delimiter = ',', value_name = "B,...")]
    branches: Vec<usize>,
    /// Tokens of the context or the prompt.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Timed steps (decode) or repetitions (prefill) [default: 32 and 5].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

/// Steps before the timed ones.
const WARM_UP_STEPS: usize = 2;
const MAX_REPEATS: usize = 1_000_000;

impl Args {
    fn open(&self) -> anyhow::Result<Engine> {
        anyhow::ensure!(self.context >= 1, "--context: must be at least 1");
        anyhow::ensure!(self.steps != Some(0), "--steps: must be at least 1");
        anyhow::ensure!(self.branches.iter().all(|b| (1..=1024).contains(b)), "-B: must be between 1 and 1024");
        let source = match &self.shape {
            Some(shape) => ModelSource::Random { shape: shape.clone(), seed: 0 },
            None => self.engine.source(),
        };
        Ok(common::open(self.engine.config_for(source))?)
    }

    fn branches_or(&self, default: &[usize]) -> Vec<usize> {
        if self.branches.is_empty() { default.to_vec() } else { self.branches.clone() }
    }
}

#[derive(serde::Serialize)]
struct DecodeCase {
    branches: usize,
    ms: LatencyMs,
    tokens_per_s: f64,
    weight_bytes: f64,
    weight_gb_per_s: f64,
    kv_bytes: f64,
    floor_ms: f64,
    of_floor: f64,
}

pub(crate) fn decode(args: &Args) -> anyhow::Result<()> {
    let mut engine = args.open()?;
    let steps = args.steps.unwrap_or(32);
    let longest = args.context.saturating_add(steps).saturating_add(WARM_UP_STEPS + 2);
    let max = engine.model().max_position_embeddings;
    anyhow::ensure!(longest <= max, "--context: {longest} tokens with its steps exceed the model's {max}");
    let read = memory_rate(&engine)?;
    let mut cases = Vec::new();
    for b in args.branches_or(&[1, 8, 64]) {
        eprintln!("{b} branches");
        cases.push(decode_case(&mut engine, b, args.context, steps, read)?);
    }
    if args.json {
        let head = serde_json::json!({"context": args.context, "steps": steps, "memory_read_gb_per_s": gb(read)});
        return print_cases("decode", &engine, head, &cases);
    }
    say!("{} | context {} | memory {:.1} GB/s", machine(&engine), args.context, gb(read));
    let header =
        ["branches", "ms/step", "p10", "p90", "tokens/s", "weight MB", "GB/s", "KV MB", "floor ms", "of floor"];
    let mut table = Table::new(&header);
    for c in &cases {
        table.row(vec![
            c.branches.to_string(),
            format!("{:.2}", c.ms.p50),
            format!("{:.2}", c.ms.p10),
            format!("{:.2}", c.ms.p90),
            format!("{:.1}", c.tokens_per_s),
            format!("{:.1}", c.weight_bytes / 1e6),
            format!("{:.1}", c.weight_gb_per_s),
            format!("{:.1}", c.kv_bytes / 1e6),
            format!("{:.2}", c.floor_ms),
            format!("{:.0} %", c.of_floor * 100.0),
        ]);
    }
    table.print()?;
    Ok(())
}

fn decode_case(
    engine: &mut Engine,
    branches: usize,
    context: usize,
    steps: usize,
    read: f64,
) -> rksc::Result<DecodeCase> {
    let ids = grow(engine, branches, context, WARM_UP_STEPS + steps + 1)?;
    // Until every branch has its first token, then a few steps more.
    while engine.tokens(ids[branches])?.len() < context + 2 {
        step(engine)?;
    }
    for _ in 0..WARM_UP_STEPS {
        step(engine)?;
    }
    engine.reset_counters();
    let mut samples = Vec::with_capacity(steps);
    for _ in 0..steps {
        let started = Instant::now();
        step(engine)?;
        samples.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let counters = engine.counters();
    clear(engine, ids)?;
    let ms = LatencyMs::of(&samples);
    let (weight_bytes, kv_bytes) =
        (counters.weight_bytes as f64 / steps as f64, counters.kv_read_bytes as f64 / steps as f64);
    let floor_ms = (weight_bytes + kv_bytes) / read * 1e3;
    Ok(DecodeCase {
        branches,
        ms,
        tokens_per_s: branches as f64 / ms.p50 * 1e3,
        weight_bytes,
        weight_gb_per_s: weight_bytes / ms.p50 / 1e6,
        kv_bytes,
        floor_ms,
        of_floor: floor_ms / ms.p50,
    })
}

/// A context, and branches that continue it with a token of their own; the context comes first in the result.
fn grow(engine: &mut Engine, branches: usize, context: usize, max_new_tokens: usize) -> rksc::Result<Vec<BranchId>> {
    let vocab = engine.model().vocab_size;
    let options = PrefillOptions { use_prefix_cache: false, ..Default::default() };
    let root = engine.prefill(&tokens(0, context, vocab), options)?;
    let mut forks = vec![BranchId::default(); branches];
    engine.fork(root, &mut forks)?;
    for (i, &fork) in forks.iter().enumerate() {
        engine.append(fork, &tokens(1 + i as u64, 1, vocab))?;
        let sampling = SamplingParams::default();
        engine.start(fork, GenerateParams { sampling, max_new_tokens, min_new_tokens: 0, end_tokens: Vec::new() })?;
    }
    Ok(std::iter::once(root).chain(forks).collect())
}

#[derive(serde::Serialize)]
struct PrefillCase {
    prompts: usize,
    ms: LatencyMs,
    tokens_per_s: f64,
    gflop: f64,
    gflops: f64,
    of_linear: f64,
}

pub(crate) fn prefill(args: &Args) -> anyhow::Result<()> {
    let mut engine = args.open()?;
    let max = engine.model().max_position_embeddings;
    anyhow::ensure!(args.context <= max, "--context: {} tokens exceed the model's {max}", args.context);
    let repeats = args.steps.unwrap_or(5);
    anyhow::ensure!(repeats <= MAX_REPEATS, "--steps: must be at most {MAX_REPEATS}");
    let flops = arithmetic_rate(&engine)?;
    let mut cases = Vec::new();
    for prompts in args.branches_or(&[1]) {
        eprintln!("{prompts} prompts");
        cases.push(prefill_case(&mut engine, prompts, args.context, repeats, flops)?);
    }
    if args.json {
        let head = serde_json::json!({
            "context": args.context, "repeats": repeats, "linear_gflops_1024_rows": flops / 1e9,
        });
        return print_cases("prefill", &engine, head, &cases);
    }
    say!("{} | {} tokens a prompt | linear at 1024 rows {:.0} GFLOP/s", machine(&engine), args.context, flops / 1e9);
    let mut table = Table::new(&["prompts", "ms", "p10", "p90", "tokens/s", "GFLOP", "GFLOP/s", "of linear"]);
    for c in &cases {
        table.row(vec![
            c.prompts.to_string(),
            format!("{:.1}", c.ms.p50),
            format!("{:.1}", c.ms.p10),
            format!("{:.1}", c.ms.p90),
            format!("{:.0}", c.tokens_per_s),
            format!("{:.2}", c.gflop),
            format!("{:.0}", c.gflops),
            format!("{:.0} %", c.of_linear * 100.0),
        ]);
    }
    table.print()?;
    Ok(())
}

fn prefill_case(
    engine: &mut Engine,
    prompts: usize,
    context: usize,
    repeats: usize,
    flops: f64,
) -> rksc::Result<PrefillCase> {
    let vocab = engine.model().vocab_size;
    let options = PrefillOptions { use_prefix_cache: false, ..Default::default() };
    let texts: Vec<Vec<u32>> = (0..prompts as u64).map(|i| tokens(i, context, vocab)).collect();
    let mut samples = Vec::with_capacity(repeats);
    for repeat in 0..=repeats {
        let started = Instant::now();
        let ids = texts.iter().map(|t| engine.prefill(t, options)).collect::<rksc::Result<Vec<_>>>()?;
        while engine.has_work() {
            step(engine)?;
        }
        if repeat > 0 {
            samples.push(started.elapsed().as_secs_f64() * 1e3);
        }
        clear(engine, ids)?;
    }
    let ms = LatencyMs::of(&samples);
    let gflop = prompts as f64 * prompt_flops(engine.model(), context) / 1e9;
    let gflops = gflop / ms.p50 * 1e3;
    Ok(PrefillCase {
        prompts,
        ms,
        tokens_per_s: (prompts * context) as f64 / ms.p50 * 1e3,
        gflop,
        gflops,
        of_linear: gflops * 1e9 / flops,
    })
}

/// Operations of one prompt: the layers' matrices for every token, the unembedding for the last, attention below the
/// diagonal.
fn prompt_flops(m: &ModelConfig, tokens: usize) -> f64 {
    let q = m.num_q_heads * m.head_dim;
    let kv = m.num_kv_heads * m.head_dim;
    let layer = m.hidden * (q + 2 * kv) + q * m.hidden + 3 * m.hidden * m.intermediate;
    let linear = 2 * (tokens * m.num_layers * layer + m.hidden * m.vocab_size);
    let attention = 4 * m.num_layers * q * (tokens * (tokens + 1) / 2);
    (linear + attention) as f64
}

/// Bytes a second at most: what reading gives on the CPU, what copying gives on a GPU.
fn memory_rate(engine: &Engine) -> anyhow::Result<f64> {
    eprintln!("measuring the memory");
    match gpu(engine) {
        Some(device) => super::kernels::copy_rate(device),
        None => {
            let config = engine.config();
            Ok(MemoryRoof::measure(config.threads, config.simd.parse()?).read)
        }
    }
}

/// Operations a second of a large product: `linear` on the CPU, cuBLASLt on a GPU.
fn arithmetic_rate(engine: &Engine) -> anyhow::Result<f64> {
    eprintln!("measuring linear at 1024 rows");
    match gpu(engine) {
        Some(device) => super::kernels::product_rate(device),
        None => {
            let config = engine.config();
            Ok(linear_rate(&mut Cpu::new(config.threads, config.simd.parse()?)?, config.dtype, 1024)?)
        }
    }
}

/// The name of the GPU that the engine runs on.
fn gpu(engine: &Engine) -> Option<&str> {
    engine.info().device.split(',').next().filter(|name| name.starts_with("cuda:"))
}

fn machine(engine: &Engine) -> String {
    gpu(engine).map_or_else(cpu_model, |_| engine.info().device.clone())
}

/// One step; what happened in it is of no interest here.
fn step(engine: &mut Engine) -> rksc::Result<()> {
    engine.step()?;
    while engine.next_event().is_some() {}
    Ok(())
}

fn clear(engine: &mut Engine, ids: Vec<BranchId>) -> rksc::Result<()> {
    ids.into_iter().rev().try_for_each(|id| engine.prune(id))
}

/// Token ids of stream `key`.
fn tokens(key: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut fill = Fill::new(key.wrapping_mul(0x9e37));
    (0..len).map(|_| fill.below(vocab) as u32).collect()
}

fn print_cases(
    bench: &str,
    engine: &Engine,
    head: serde_json::Value,
    cases: &impl serde::Serialize,
) -> anyhow::Result<()> {
    let info = engine.info();
    print_json(&serde_json::json!({
        "bench": bench, "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "measured": head, "cases": cases,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_flops_of_the_tiny_shape() {
        let m = ModelConfig::shape("tiny").unwrap();
        // qkv 64x128, o 64x64, three of 64x128; two layers; unembedding 64x256; attention over 1 + 2 slots.
        let layer = 64 * 128 + 64 * 64 + 3 * 64 * 128;
        assert_eq!(prompt_flops(&m, 2), (2 * (2 * 2 * layer + 64 * 256) + 4 * 2 * 64 * 3) as f64);
    }
}

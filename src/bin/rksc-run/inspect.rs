//! `rksc-run inspect` and `rksc-run devices`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::ModelSource;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::DeviceInfo;
use rksc::engine::Engine;
use rksc::model::family::ModelConfig;
use rksc::model::weights::check_sums;
use rksc::quant::Survey;

use crate::common::{EngineArgs, JsonFlag, human_bytes, print_json};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Compare the folder's files with a list that sha256sum wrote.
    #[arg(long, value_name = "FILE", requires = "model")]
    checksums: Option<PathBuf>,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    format: JsonFlag,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = args.engine.source();
    let num_checked = match (&args.checksums, &source) {
        (Some(list), ModelSource::Dir(dir)) => Some(check_sums(dir, list)?),
        _ => None,
    };
    let (model, store) = Engine::load(&args.engine.config())?;
    let survey = Survey::new(&model, &store);
    let weight_bytes = survey.code_bytes + survey.dense_bytes;
    let problems: Vec<String> = survey.problems.iter().map(ToString::to_string).collect();
    let tokenizer = source.tokenizer();
    let names: Vec<&str> = store.names().collect();
    if args.format.json {
        return print_json(&serde_json::json!({
            "family": model.family.name, "hidden": model.hidden, "intermediate": model.intermediate,
            "num_layers": model.num_layers, "num_q_heads": model.num_q_heads, "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim, "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings, "context_limit": model.context_limit,
            "rope": model.rope, "local_rope": model.local_rope, "windows": model.windows,
            "tie_word_embeddings": model.tie_word_embeddings, "num_params": model.num_params() as u64,
            "quantization": model.quantization, "num_code_matrices": survey.num_matrices, "code_bytes": survey.code_bytes,
            "weight_bytes": weight_bytes, "num_tensors": names.len(), "problems": problems,
            "tokenizer_vocab": tokenizer.as_ref().ok().map(|t| t.vocab_size()),
            "end_tokens": source.end_tokens(&model)?, "files_checked": num_checked,
            "tensors": if args.tensors { names } else { Vec::new() },
        }));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "family       {}", model.family.name)?;
    writeln!(out, "parameters   {}", model.num_params())?;
    writeln!(out, "layers       {} of hidden {}, intermediate {}", model.num_layers, model.hidden, model.intermediate)?;
    writeln!(out, "heads        {} query, {} kv, head_dim {}", model.num_q_heads, model.num_kv_heads, model.head_dim)?;
    writeln!(
        out,
        "vocabulary   {} (embeddings {})",
        model.vocab_size,
        if model.tie_word_embeddings { "tied" } else { "untied" }
    )?;
    writeln!(out, "context      {}", in_words(&model))?;
    writeln!(out, "end tokens   {:?}", source.end_tokens(&model)?)?;
    writeln!(out, "weights      {} tensors, {}", names.len(), human_bytes(weight_bytes))?;
    if let Some(format) = &model.quantization {
        writeln!(out, "in codes     {} matrices, {}: {format}", survey.num_matrices, human_bytes(survey.code_bytes))?;
    }
    if let Some(count) = num_checked {
        writeln!(out, "checksums    {count} files are what the list says")?;
    }
    match tokenizer {
        Ok(t) => writeln!(out, "tokenizer    {} entries", t.vocab_size())?,
        Err(e) => writeln!(out, "tokenizer    none ({e})")?,
    }
    if args.tensors {
        names.iter().try_for_each(|name| writeln!(out, "  {name}"))?;
    }
    for problem in &problems {
        writeln!(out, "PROBLEM      {problem}")?;
    }
    Ok(())
}

/// Positions, and what is special about them.
fn in_words(model: &ModelConfig) -> String {
    let mut words = vec![model.max_position_embeddings.to_string()];
    if model.context_limit > model.max_position_embeddings {
        words.push(format!("up to {} with --max-context", model.context_limit));
    }
    let local: Vec<usize> = model.windows.iter().flatten().copied().collect();
    if let (Some(window), true) = (local.first(), model.has_windows()) {
        words.push(format!("{} of {} layers attend to the last {window}", local.len(), model.num_layers));
    }
    words.join(", ")
}

pub(crate) fn devices(args: &JsonFlag) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let levels: Vec<String> = SimdLevel::ALL.into_iter().filter(|l| l.is_available()).map(|l| l.to_string()).collect();
    let gpus = rksc::backend::cuda::device::gpus();
    if args.json {
        let mut devices = vec![serde_json::json!({"name": "cpu", "cores": cores, "simd": levels})];
        let why = match &gpus {
            Ok(gpus) => {
                devices.extend(gpus.iter().map(|gpu| serde_json::json!(gpu)));
                None
            }
            Err(e) => Some(e.to_string()),
        };
        return print_json(&serde_json::json!({"devices": devices, "no_cuda": why}));
    }
    say!("cpu     {cores} cores, kernels: {}", levels.join(", "));
    match gpus {
        Ok(gpus) => {
            for gpu in &gpus {
                say!("{}", describe(gpu));
            }
        }
        Err(e) => say!("cuda    {e}"),
    }
    Ok(())
}

/// `cuda:0  NVIDIA H100, 79.6 GiB (78.9 GiB free), compute capability 9.0, 132 SMs, driver for CUDA 13.0`
fn describe(gpu: &DeviceInfo) -> String {
    let (major, minor) = gpu.compute_capability;
    let free = gpu.free_bytes.map_or("in use".into(), |free| format!("{} free", human_bytes(free)));
    let driver = gpu.driver.as_deref().unwrap_or("none");
    let total = human_bytes(gpu.total_bytes);
    format!(
        "{}  {}, {total} ({free}), compute capability {major}.{minor}, {} SMs, driver for CUDA {driver}",
        gpu.device, gpu.name, gpu.num_sms
    )
}

//! `rksc-run inspect` and `rksc-run devices`.

use std::io::Write;

use clap::Args as ClapArgs;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::DeviceInfo;
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::{ModelSource, Result};

use crate::common::{EngineArgs, JsonFlag, human_bytes, print_json};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    format: JsonFlag,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let source = args.engine.source();
    let (model, store) = open(&source)?;
    let missing: Vec<String> = model
        .tensor_shapes()
        .into_iter()
        .filter_map(|(name, shape)| store.get(&name, &shape).err().map(|e| e.to_string()))
        .collect();
    let tokenizer = source.tokenizer();
    let names: Vec<&str> = store.names().collect();
    if args.format.json {
        return print_json(&serde_json::json!({
            "family": model.family.name, "hidden": model.hidden, "intermediate": model.intermediate,
            "num_layers": model.num_layers, "num_q_heads": model.num_q_heads, "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim, "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings, "rope_theta": model.rope_theta,
            "tie_word_embeddings": model.tie_word_embeddings, "num_params": model.num_params() as u64,
            "weight_bytes": store.num_bytes(), "num_tensors": names.len(), "problems": missing,
            "tokenizer_vocab": tokenizer.as_ref().ok().map(|t| t.vocab_size()),
            "end_tokens": source.end_tokens(&model)?,
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
    writeln!(out, "context      {}", model.max_position_embeddings)?;
    writeln!(out, "end tokens   {:?}", source.end_tokens(&model)?)?;
    writeln!(out, "weights      {} tensors, {}", names.len(), human_bytes(store.num_bytes()))?;
    match tokenizer {
        Ok(t) => writeln!(out, "tokenizer    {} entries", t.vocab_size())?,
        Err(e) => writeln!(out, "tokenizer    none ({e})")?,
    }
    if args.tensors {
        names.iter().try_for_each(|name| writeln!(out, "  {name}"))?;
    }
    for problem in &missing {
        writeln!(out, "PROBLEM      {problem}")?;
    }
    Ok(())
}

fn open(source: &ModelSource) -> Result<(ModelConfig, WeightStore)> {
    match source {
        ModelSource::Dir(dir) => Ok((ModelConfig::from_dir(dir)?, WeightStore::open(dir)?)),
        #[cfg(feature = "bundled-model")]
        ModelSource::Bundled => Ok((rksc::bundled::config()?, rksc::bundled::weights()?)),
        _ => Err(rksc::Error::Config { field: "model".into(), why: "give a folder with -m DIR".into() }),
    }
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
    println!("cpu     {cores} cores, kernels: {}", levels.join(", "));
    match gpus {
        Ok(gpus) => gpus.iter().for_each(|gpu| println!("{}", describe(gpu))),
        Err(e) => println!("cuda    {e}"),
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

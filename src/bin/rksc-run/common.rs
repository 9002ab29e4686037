//! What the commands have in common: the engine's flags, output, exit codes.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rksc::config::{EngineConfig, ModelSource};
use rksc::engine::{CancelFlag, Engine};
use rksc::kv::eviction::Eviction;
use rksc::model::weights::Access;
use rksc::sampler::SamplingParams;
use rksc::tokenizer::Tokenizer;
use rksc::{DType, Error, Result};

/// Flags that mean the same in every command that runs a model.
#[derive(Args, Clone)]
pub(crate) struct EngineArgs {
    /// Hugging Face folder with config.json, *.safetensors and tokenizer.json [default: the bundled model].
    #[arg(short, long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Compute type: f32, bf16 or f16.
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// CPU kernels: auto, amx, avx512, avx2 or portable.
    #[arg(long, default_value = "auto")]
    simd: String,
    /// CPU threads [default: one per core].
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Positions to make room for, prompt and answer together [default: what config.json says]. More than the model was
    /// trained for is possible where its config.json has a rule for that (longrope, dynamic, yarn, linear).
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Memory for the KV cache, e.g. 512MiB or 8GiB [default: a quarter of the free memory, at most 64 contexts].
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    kv_cache_memory: Option<u64>,
    /// Tokens per KV block: 16 or 32.
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Tokens in one pass; longer prompts run in chunks.
    #[arg(long, default_value_t = 2048)]
    max_batch_tokens: usize,
    /// Host memory for branches that cannot be recomputed exactly.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4GiB")]
    swap_space: u64,
    /// Whose KV blocks go when the cache is full: lru, fifo, or mass (the least attended first).
    #[arg(long, value_name = "POLICY", default_value_t)]
    eviction: Eviction,
    /// Read the weights into memory instead of mapping their files, which nobody may change while they are mapped.
    #[arg(long)]
    no_mmap: bool,
    /// Look for NaN and infinities in the weights first.
    #[arg(long)]
    check_tensors: bool,
}

impl EngineArgs {
    pub(crate) fn source(&self) -> ModelSource {
        self.model.clone().map_or(ModelSource::Bundled, ModelSource::Dir)
    }

    pub(crate) fn config(&self) -> EngineConfig {
        self.config_for(self.source())
    }

    pub(crate) fn config_for(&self, model: ModelSource) -> EngineConfig {
        EngineConfig {
            model,
            dtype: self.dtype,
            device: self.device.clone(),
            simd: self.simd.clone(),
            threads: self.threads,
            max_context: self.max_context,
            kv_cache_memory: self.kv_cache_memory,
            block_size: self.block_size,
            max_batch_tokens: self.max_batch_tokens,
            swap_space: self.swap_space,
            eviction: self.eviction,
            access: if self.no_mmap { Access::Read } else { Access::Map },
            check_tensors: self.check_tensors,
            ..EngineConfig::default()
        }
    }

    /// Opens the engine, and says on stderr what it runs on. Ctrl-C cancels it; a second one kills the process.
    pub(crate) fn open(&self) -> Result<Engine> {
        open(self.config())
    }

    pub(crate) fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        self.source().tokenizer().map(Arc::new)
    }
}

/// See [`EngineArgs::open`].
pub(crate) fn open(config: EngineConfig) -> Result<Engine> {
    let engine = Engine::open(config)?;
    announce(&engine);
    Ok(engine)
}

/// What an engine opened otherwise needs: see [`EngineArgs::open`].
pub(crate) fn announce(engine: &Engine) {
    let info = engine.info();
    let why = info.device_note.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
    let codes = engine.config().quantise.map(|options| format!(" | projections in codes, not exact: {options}"));
    eprintln!("{} | {}{} | {}{why}", info.name, info.dtype, codes.unwrap_or_default(), info.device);
    cancel_on_interrupt(engine.cancel_flag());
}

fn cancel_on_interrupt(flag: CancelFlag) {
    // A second engine in one process keeps the first handler; the bench commands install none of their own.
    let _ = ctrlc::set_handler(move || {
        if flag.is_raised() {
            std::process::exit(rksc::ErrorCode::Cancelled as i32);
        }
        flag.raise();
    });
}

/// How tokens are chosen.
#[derive(Args, Clone)]
pub(crate) struct SamplingArgs {
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Keep the smallest set of tokens with this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Divides the logits of tokens seen before; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Subtracted from the logits of tokens generated before.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted for every time a token was generated before.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Added to the logit of a token, -inf to ban it, e.g. 1234=-2.5. May be given several times.
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// Key of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// `1234=-2.5`.
fn parse_bias(text: &str) -> std::result::Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| format!("{text:?} is no token id with a bias, e.g. 1234=-2.5"))
}

impl SamplingArgs {
    /// Truncations that change nothing are refused.
    pub(crate) fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
        };
        params.validate()?;
        params.refuse_idle()?;
        Ok(params)
    }
}

/// `--json` alone.
#[derive(Args, Clone, Copy)]
pub(crate) struct JsonFlag {
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `512MiB`, `8GiB`, `1000000`.
pub(crate) fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        unit => return Err(format!("unknown unit {unit:?}; use B, KiB, MiB, GiB, KB, MB or GB")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is not a size, e.g. 512MiB"))?;
    if !number.is_finite() || number < 0.0 {
        return Err(format!("{text:?} is not a size, e.g. 512MiB"));
    }
    Ok((number * factor as f64) as u64)
}

/// `1.5 GiB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A bar on a terminal, nothing elsewhere.
pub(crate) fn progress(len: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({eta} left)");
    ProgressBar::new(len as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Prints one JSON value and a newline.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

pub(crate) fn init_log(verbose: u8) {
    let level = ["warn", "info", "debug"][usize::from(verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::new(format!("rksc={level}"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
}

/// A flag that is refused, with the way out in `why`.
pub(crate) fn refused(flag: &str, why: impl Into<String>) -> Error {
    Error::Config { field: flag.into(), why: why.into() }
}

/// The exit status: 0 ok, 1 user error, 2 bad model or file, 3 out of memory, 4 device, 5 cancelled, 70 internal.
pub(crate) fn exit(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let broken_pipe = error
        .chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe);
    if broken_pipe {
        return ExitCode::SUCCESS; // the reader has seen enough
    }
    eprintln!("rksc-run: {}", message(&error));
    let code = match error.downcast_ref::<Error>() {
        Some(error) => error.code() as i32,
        None if error.downcast_ref::<std::io::Error>().is_some() => 2,
        None => 1,
    };
    ExitCode::from(u8::try_from(code).unwrap_or(70))
}

/// The error and its causes, without those that the one before has quoted.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

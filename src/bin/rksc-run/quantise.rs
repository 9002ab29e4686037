//! `rksc-run quantise`: a model's codes ahead of time.

use std::io::Write;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::engine::MadeCodes;
use rksc::quant::{QuantOptions, Quantiser};

use crate::common::{EngineArgs, JsonFlag, human_bytes, print_json, read_text, refused};
use crate::quant::QuantArgs;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    quant: QuantArgs,
    /// Plain text whose activations --quantiser gptq looks at: like what the model is going to read and write.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text that run as one prompt [default: 512].
    #[arg(long, value_name = "N")]
    chunk_tokens: Option<usize>,
    /// Tokens of the text to look at, from its beginning [default: 16384].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Where the codes go, in place of what is there [default: beside the model, or in the user's cache, where they are
    /// looked for].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    format: JsonFlag,
}

impl Args {
    /// The text in chunks; none for quantisers that look at none.
    fn chunks(&self, options: QuantOptions) -> anyhow::Result<Vec<Vec<u32>>> {
        let Some(path) = self.text.as_ref().filter(|_| options.quantiser == Quantiser::Gptq) else {
            self.refuse_idle(options)?;
            return Ok(Vec::new());
        };
        let (chunk, most) = (self.chunk_tokens.unwrap_or(512), self.max_tokens.unwrap_or(16_384));
        for (flag, tokens) in [("chunk-tokens", chunk), ("max-tokens", most)] {
            if tokens == 0 {
                return Err(refused(flag, "must be at least 1").into());
            }
        }
        let mut tokens = self.engine.tokenizer()?.encode(&read_text(path)?)?;
        anyhow::ensure!(!tokens.is_empty(), "--text: {} is empty", path.display());
        tokens.truncate(most);
        Ok(tokens.chunks(chunk).map(<[u32]>::to_vec).collect())
    }

    /// Refuses what changes nothing without a text that is looked at, and gptq without one.
    fn refuse_idle(&self, options: QuantOptions) -> rksc::Result<()> {
        let is_gptq = options.quantiser == Quantiser::Gptq;
        let flags = [
            ("text", self.text.is_some()),
            ("chunk-tokens", self.chunk_tokens.is_some()),
            ("max-tokens", self.max_tokens.is_some()),
        ];
        match flags.into_iter().find(|(_, is_given)| *is_given && !is_gptq) {
            Some((flag, _)) => Err(refused(flag, "is of --quantiser gptq; drop one of the two")),
            None if is_gptq => Err(refused("text", "gptq looks at activations; give --text FILE, or use hqq")),
            None => Ok(()),
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let options = args.quant.options();
    let texts = args.chunks(options)?;
    let mut config = args.engine.config();
    config.codes.clone_from(&args.out);
    let made = Engine::make_codes(&config, options, &texts)?;
    if args.format.json { print_json(&made) } else { print(&made) }
}

fn print(made: &MadeCodes) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<12}{:>9}{:>12}{:>14}{:>16}", "kind", "matrices", "bytes", "bits a weight", "relative error")?;
    for kind in &made.kinds {
        writeln!(
            out,
            "{:<12}{:>9}{:>12}{:>14.2}{:>16.4}",
            kind.kind,
            kind.num_matrices,
            human_bytes(kind.num_bytes),
            kind.bits_per_weight,
            kind.relative_error
        )?;
    }
    let bytes = human_bytes(made.num_bytes);
    writeln!(out, "{}: {bytes}, {:.2} bits a weight, in {:.1} s", made.options, made.bits_per_weight, made.seconds)?;
    if made.num_tokens > 0 {
        let runs = if made.num_runs == 1 { "one run".into() } else { format!("{} runs", made.num_runs) };
        writeln!(out, "on the activations of {} tokens, in {runs}", made.num_tokens)?;
    }
    writeln!(out, "written to {}", made.file.display())?;
    Ok(())
}

//! `rksc-run score`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::engine::PrefillOptions;
use rksc::tokenizer::Tokenizer;
use serde::Deserialize;

use crate::common::{EngineArgs, progress};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// JSON lines: {"id"?, "text"} or {"id"?, "tokens"} with a list of token ids.
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// JSON lines: "id", "tokens", "token_logprobs" (null first) and "last_top" (pairs of id and logprob), natural logs.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Most likely next tokens to report.
    #[arg(long, default_value_t = 5)]
    top_k: usize,
}

#[derive(Deserialize)]
struct Line {
    id: Option<serde_json::Value>,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let name = args.input.display();
    let input = File::open(&args.input).with_context(|| name.to_string())?;
    let lines: Vec<String> =
        BufReader::new(input).lines().collect::<std::io::Result<_>>().with_context(|| name.to_string())?;
    let mut engine = args.engine.open()?;
    let mut tokenizer: Option<Arc<Tokenizer>> = None;
    let out = File::create(&args.out).with_context(|| args.out.display().to_string())?;
    let mut out = BufWriter::new(out);
    let bar = progress(lines.len());
    for (i, text) in lines.iter().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = || format!("{name}: line {}", i + 1);
        let line: Line = serde_json::from_str(text).with_context(at)?;
        let tokens = match (line.tokens, line.text) {
            (Some(tokens), None) => tokens,
            (None, Some(text)) => {
                if tokenizer.is_none() {
                    tokenizer = Some(args.engine.tokenizer()?);
                }
                tokenizer.as_ref().map(|t| t.encode(&text)).transpose().with_context(at)?.unwrap_or_default()
            }
            _ => anyhow::bail!("{}: needs either \"text\" or \"tokens\"", at()),
        };
        let id = line.id.unwrap_or_else(|| format!("line-{}", i + 1).into());
        let record = score(&mut engine, args.top_k, id, &tokens).with_context(at)?;
        serde_json::to_writer(&mut out, &record)?;
        out.write_all(b"\n")?;
        out.flush()?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn score(
    engine: &mut Engine,
    top_k: usize,
    id: serde_json::Value,
    tokens: &[u32],
) -> anyhow::Result<serde_json::Value> {
    let branch = engine.prefill(tokens, PrefillOptions::default())?;
    let mut logprobs = vec![f32::NAN; tokens.len()];
    engine.watch(branch, &[], top_k)?;
    engine.score_prompt(branch, &mut logprobs)?;
    let top = engine.row(branch)?.map(|row| row.top.clone()).unwrap_or_default();
    engine.prune(branch)?;
    while engine.next_event().is_some() {}
    let logprobs: Vec<Option<f32>> = logprobs.into_iter().map(|x| x.is_finite().then_some(x)).collect();
    Ok(serde_json::json!({"id": id, "tokens": tokens, "token_logprobs": logprobs, "last_top": top}))
}

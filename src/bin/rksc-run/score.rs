//! `rksc-run score`. The whole input is read and checked before the first line is written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::engine::PrefillOptions;
use rksc::tokenizer::Tokenizer;
use rksc::{Engine, Error};
use serde::Deserialize;

use crate::common::{EngineArgs, print_json, progress, read_text};

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// JSON lines: {"id"?, "text"} or {"id"?, "tokens"} with a list of token ids; {"context", "text"} scores the text alone,
    /// and lines with the same context compute it once.
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// JSON lines: "id", "tokens", "token_logprobs" and "predicted" (the most likely token in each one's place), null for
    /// the first or those of the context, and "last_top" (pairs of id and logprob); natural logs.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Most likely next tokens to report.
    #[arg(long, default_value_t = 5)]
    top_k: usize,
    /// One JSON object about the run on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Line {
    id: Option<serde_json::Value>,
    context: Option<String>,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
}

/// A line of the input, as token ids.
struct Item {
    /// For messages.
    at: String,
    id: serde_json::Value,
    tokens: Vec<u32>,
    /// Of those, the first that are not scored.
    num_context: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let text = read_text(&args.input)?;
    let lines = parse(args, &text)?;
    let mut engine = args.engine.open()?;
    let items = encode(args, lines)?;
    let out = File::create(&args.out).with_context(|| args.out.display().to_string())?;
    let mut out = BufWriter::new(out);
    let bar = progress(items.len());
    let started = Instant::now();
    let (mut sum, mut scored) = (0.0, 0);
    for item in &items {
        let record = score(&mut engine, args.top_k, item).with_context(|| item.at.clone())?;
        for logprob in record.token_logprobs.iter().flatten() {
            sum += f64::from(*logprob);
            scored += 1;
        }
        serde_json::to_writer(&mut out, &record)?;
        out.write_all(b"\n")?;
        out.flush()?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        return print_json(&serde_json::json!({
            "model": engine.info(), "lines": items.len(), "tokens": items.iter().map(|i| i.tokens.len()).sum::<usize>(),
            "scored": scored, "mean_logprob": (scored > 0).then(|| sum / f64::from(scored)),
            "seconds": started.elapsed().as_secs_f64(), "stats": engine.engine_stats(),
        }));
    }
    Ok(())
}

/// Every line with its number.
fn parse(args: &Args, text: &str) -> Result<Vec<(usize, Line)>, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    lines
        .map(|(i, text)| {
            let bad = |why: String| Error::Format { path: args.input.clone(), why: format!("line {}: {why}", i + 1) };
            let line: Line = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
            let given = usize::from(line.text.is_some()) + usize::from(line.tokens.is_some());
            match line {
                _ if given != 1 => Err(bad("needs either \"text\" or \"tokens\"".into())),
                Line { context: Some(_), ref text, .. } if text.as_ref().is_none_or(String::is_empty) => {
                    Err(bad("\"context\" needs a \"text\" behind it".into()))
                }
                line => Ok((i + 1, line)),
            }
        })
        .collect()
}

/// A tokenizer is needed only where there is text.
fn encode(args: &Args, lines: Vec<(usize, Line)>) -> anyhow::Result<Vec<Item>> {
    let mut tokenizer: Option<Arc<Tokenizer>> = None;
    let mut items = Vec::with_capacity(lines.len());
    for (number, line) in lines {
        let at = format!("{}: line {number}", args.input.display());
        let (tokens, num_context) = match line.tokens {
            Some(tokens) => (tokens, 0),
            None => {
                let tokenizer = match &tokenizer {
                    Some(tokenizer) => tokenizer,
                    None => tokenizer.insert(args.engine.tokenizer()?),
                };
                let context = line.context.unwrap_or_default();
                let num_context = tokenizer.encode(&context).with_context(|| at.clone())?.len();
                let whole = context + &line.text.unwrap_or_default();
                let tokens = tokenizer.encode(&whole).with_context(|| at.clone())?;
                // Where the two grow together, the last token of the context is the first of the text.
                let num_context = num_context.min(tokens.len().saturating_sub(1));
                (tokens, num_context)
            }
        };
        items.push(Item { at, id: line.id.unwrap_or_else(|| format!("line-{number}").into()), tokens, num_context });
    }
    Ok(items)
}

/// A line of the output.
#[derive(serde::Serialize)]
struct Record<'a> {
    id: &'a serde_json::Value,
    tokens: &'a [u32],
    token_logprobs: Vec<Option<f32>>,
    predicted: Vec<Option<u32>>,
    last_top: Vec<(u32, f32)>,
}

fn score<'a>(engine: &mut Engine, top_k: usize, item: &'a Item) -> rksc::Result<Record<'a>> {
    let (context, scored) = item.tokens.split_at(item.num_context);
    let mut logprobs = vec![f32::NAN; item.tokens.len()];
    let branch = if context.is_empty() {
        let branch = engine.prefill(scored, PrefillOptions::default())?;
        engine.watch(branch, &[], top_k)?;
        engine.score_prompt(branch, &mut logprobs)?;
        branch
    } else {
        let branch = engine.prefill(context, PrefillOptions::default())?;
        engine.watch(branch, &[], top_k)?;
        engine.score(branch, scored, &mut logprobs[context.len()..])?;
        branch
    };
    let mut predicted = vec![None; context.len()];
    predicted.extend_from_slice(engine.predicted(branch)?);
    let last_top = engine.row(branch)?.map(|row| row.top.clone()).unwrap_or_default();
    engine.prune(branch)?;
    while engine.next_event().is_some() {}
    let token_logprobs = logprobs.into_iter().map(|x| x.is_finite().then_some(x)).collect();
    Ok(Record { id: &item.id, tokens: &item.tokens, token_logprobs, predicted, last_top })
}

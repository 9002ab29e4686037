//! `rksc-run generate`.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::chat::{Message, RenderOptions};
use rksc::engine::{BranchId, BranchStats, Engine, GenerateParams, PrefillOptions};
use rksc::kv::budget::KvPrompt;
use rksc::report::kv::KvTotals;
use rksc::tokenizer::Tokenizer;

use crate::choice::{self, Choice, NON_FINITE};
use crate::common::{EngineArgs, SamplingArgs, print_json, read_text};
use crate::decoding::{Decoding, DecodingArgs};
use crate::template::required_template;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// The prompt, special tokens spelled as text; `-` reads stdin.
    #[arg(short, long, allow_hyphen_values = true, required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// The prompt, from a file.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// The prompt is what a user says, and the model's chat template writes it down.
    #[arg(long)]
    chat: bool,
    /// Continuations; they share the prompt.
    #[arg(short, default_value_t = 1)]
    n: usize,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Tokens to generate before an end token counts.
    #[arg(long, default_value_t = 0)]
    min_new_tokens: usize,
    /// Run on past the model's end tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// A token that ends a continuation, beside the model's end tokens; not part of the output. May be given several times.
    #[arg(long, value_name = "ID")]
    stop_id: Vec<u32>,
    /// Ends a continuation; not part of the output. May be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Print text as it comes (one continuation only).
    #[arg(long, conflicts_with = "json")]
    stream: bool,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
    /// So many of the most likely tokens beside each one, with their log-probabilities (with --json).
    #[arg(long, value_name = "K", default_value_t = 0, requires = "json")]
    top_logprobs: usize,
    #[command(flatten)]
    decoding: DecodingArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Refuses what cannot act beside the rest.
fn check(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!((1..=1024).contains(&args.n), "-n: must be between 1 and 1024");
    anyhow::ensure!(!args.stream || args.n == 1, "--stream: shows one continuation; drop -n {}", args.n);
    let never_ends = args.ignore_eos && args.stop_id.is_empty();
    anyhow::ensure!(
        args.min_new_tokens == 0 || !never_ends,
        "--min-new-tokens: changes nothing beside --ignore-eos; drop one of the two"
    );
    Ok(())
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    check(args)?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (_, Some(path)) => read_text(path)?,
        (Some(dash), None) if dash == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("stdin")?;
            text
        }
        (prompt, None) => prompt.clone().unwrap_or_default(),
    };
    anyhow::ensure!(!prompt.is_empty(), "--prompt: is empty");
    let sampling = args.sampling.params()?;
    let mut config = args.engine.config();
    let decoding = args.decoding.apply(&mut config)?;
    if args.n > 1 {
        decoding.check_shared("use -n 1, or pin")?;
    }
    if args.top_logprobs > 0 {
        decoding.check_top_logprobs("top-logprobs")?;
    }
    let template = args.chat.then(|| required_template(&args.engine.source())).transpose()?;
    let mut engine = decoding.open(config)?;
    let tokenizer = args.engine.tokenizer()?;
    let mut end_tokens = args.stop_id.clone();
    if !args.ignore_eos {
        end_tokens.extend(args.engine.source().end_tokens(engine.model())?);
    }
    let prompt = if let Some(template) = template {
        end_tokens.extend(template.turn_end(&tokenizer).filter(|_| !args.ignore_eos));
        template.render(&[Message::user(prompt)], &RenderOptions::prompt())?
    } else {
        prompt
    };
    let prompt_tokens = tokenizer.encode(&prompt)?;
    let params = GenerateParams {
        sampling,
        max_new_tokens: args.max_new_tokens,
        min_new_tokens: args.min_new_tokens,
        end_tokens,
    };
    let mut choices = start(&mut engine, &tokenizer, &prompt_tokens, (&params, &decoding), args)?;
    let started = Instant::now();
    let first_token_ms = choice::run(&mut engine, &mut choices, &mut |text| {
        if args.stream { choice::show(text) } else { Ok(()) }
    })?;
    let timing = (started.elapsed().as_secs_f64(), first_token_ms);
    report(args, &engine, &prompt_tokens, (&choices, &decoding), timing)
}

fn start(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    (params, decoding): (&GenerateParams, &Decoding),
    args: &Args,
) -> anyhow::Result<Vec<Choice>> {
    let root = engine.prefill(prompt, PrefillOptions::default())?;
    let mut branches = vec![BranchId::default(); args.n];
    match &decoding.limit {
        // What a fork has from its parent is never dropped: where the prompt may go, its own branch goes on.
        Some(limit) if limit.prompt == KvPrompt::Evict => branches.fill(root),
        _ => engine.fork(root, &mut branches)?,
    }
    engine.exit_prompt(root)?;
    let end_tokens: Arc<[u32]> = params.end_tokens.as_slice().into();
    branches
        .into_iter()
        .map(|branch| {
            decoding.start(engine, branch, prompt.len(), params)?;
            if args.top_logprobs > 0 {
                engine.watch(branch, &[], args.top_logprobs)?;
            }
            Ok(Choice::new(branch, tokenizer, &args.stop, Arc::clone(&end_tokens)))
        })
        .collect()
}

fn report(
    args: &Args,
    engine: &Engine,
    prompt: &[u32],
    (choices, decoding): (&[Choice], &Decoding),
    (seconds, first_token_ms): (f64, Option<f64>),
) -> anyhow::Result<()> {
    let stats: Vec<BranchStats> = choices.iter().map(|c| engine.stats(c.branch)).collect::<rksc::Result<_>>()?;
    let mut totals = KvTotals::default();
    stats.iter().for_each(|s| totals.add(s.num_slots, s.num_computed_tokens, s.kv_cuts));
    let generated: usize = choices.iter().map(|c| c.tokens.len()).sum();
    if args.json {
        let choices: Vec<_> = choices
            .iter()
            .zip(&stats)
            .enumerate()
            .map(|(index, (c, s))| {
                serde_json::json!({
                    "index": index, "text": c.text, "tokens": c.tokens, "token_logprobs": c.logprobs,
                    "top_logprobs": (args.top_logprobs > 0).then_some(&c.top),
                    "entropies": c.entropies, "finish_reason": c.finish,
                    "kv_slots": s.num_slots, "kv_cuts": s.kv_cuts,
                })
            })
            .collect();
        let mut report = serde_json::json!({
            "model": engine.info(),
            "choices": choices,
            "usage": {"prompt_tokens": prompt.len(), "completion_tokens": generated},
            "seconds": seconds,
            "ttft_ms": first_token_ms,
            "counters": engine.counters(),
        });
        decoding.describe(engine, Some(&totals), &mut report);
        return print_json(&report);
    }
    let mut out = std::io::stdout().lock();
    if args.stream {
        writeln!(out)?;
    } else if let [only] = choices {
        writeln!(out, "{}", only.text)?;
    } else {
        for (i, c) in choices.iter().enumerate() {
            writeln!(out, "--- {} ({})\n{}", i + 1, c.finish.as_deref().unwrap_or(""), c.text)?;
        }
    }
    for (i, _) in choices.iter().enumerate().filter(|(_, c)| c.finish.as_deref() == Some(NON_FINITE)) {
        eprintln!("continuation {}: {NON_FINITE} (damaged weights? try --check-tensors, or --dtype f32)", i + 1);
    }
    eprintln!(
        "{} prompt and {generated} generated tokens in {:.0} ms ({:.1} tokens/s); first token after {:.1} ms",
        prompt.len(),
        seconds * 1e3,
        generated as f64 / seconds,
        first_token_ms.unwrap_or(f64::NAN)
    );
    decoding.say(engine, Some(&totals));
    Ok(())
}

//! `rksc-run generate`.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::engine::{
    BranchId, BranchStats, EndReason, Engine, EventKind, GenerateParams, GeneratedToken, PrefillOptions,
};
use rksc::gate::river::River;
use rksc::kv::budget::{KvLimit, KvPrompt};
use rksc::quant::QuantOptions;
use rksc::report::kv::{KvTotals, limit_in_words};
use rksc::report::river::{RiverTotals, exactness, river_in_words};
use rksc::tokenizer::{IncrementalDecoder, StopMatcher, Tokenizer};

use crate::common::{self, EngineArgs, SamplingArgs, print_json, read_text, refused};
use crate::kv::KvArgs;
use crate::river::RiverArgs;

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
    /// Ends a continuation; not part of the output. May be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Print text as it comes (one continuation only).
    #[arg(long, conflicts_with = "json")]
    stream: bool,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    river: RiverArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Why a continuation ended whose numbers broke.
const NON_FINITE: &str = "error: non_finite";

/// One continuation on its way.
struct Choice {
    branch: BranchId,
    decoder: IncrementalDecoder,
    stops: StopMatcher,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    entropies: Vec<f32>,
    finish: Option<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!((1..=1024).contains(&args.n), "-n: must be between 1 and 1024");
    anyhow::ensure!(!args.stream || args.n == 1, "--stream: shows one continuation; drop -n {}", args.n);
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
    let mut config = args.engine.config();
    let limit = args.kv.limit(&mut config)?;
    if args.n > 1 && limit.is_some_and(|l| l.prompt == KvPrompt::Evict) {
        let why = format!("evict drops nothing of a prompt that {} continuations share; use -n 1, or pin", args.n);
        return Err(refused("kv-prompt", why).into());
    }
    let river = args.river.policy(false, &mut config)?;
    if limit.is_some() {
        river.iter().try_for_each(River::check_budget)?;
    }
    let mut engine = common::open(config)?;
    engine.set_river(river)?;
    let tokenizer = args.engine.tokenizer()?;
    let prompt_tokens = tokenizer.encode(&prompt)?;
    let end_tokens = if args.ignore_eos { Vec::new() } else { args.engine.source().end_tokens(engine.model())? };
    let params = GenerateParams {
        sampling: args.sampling.params(),
        max_new_tokens: args.max_new_tokens,
        min_new_tokens: args.min_new_tokens,
        end_tokens,
    };
    let mut choices = start(&mut engine, &tokenizer, &prompt_tokens, (&params, limit.as_ref()), args)?;
    let started = Instant::now();
    let mut first_token_ms = None;
    while choices.iter().any(|c| c.finish.is_none()) {
        engine.step()?;
        while let Some(event) = engine.next_event() {
            let Some(choice) = choices.iter_mut().find(|c| c.branch == event.branch) else { continue };
            match event.kind {
                EventKind::Token(token) => {
                    first_token_ms.get_or_insert_with(|| started.elapsed().as_secs_f64() * 1e3);
                    choice.take(&mut engine, &token, &params, args.stream)?;
                }
                EventKind::Ended(reason) => choice.end(reason, args.stream)?,
                EventKind::Ready | EventKind::Preempted | EventKind::Aliased { .. } => {}
            }
        }
    }
    let timing = (started.elapsed().as_secs_f64(), first_token_ms);
    report(args, &engine, &prompt_tokens, (&choices, limit.as_ref()), timing)
}

fn start(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    (params, limit): (&GenerateParams, Option<&KvLimit>),
    args: &Args,
) -> anyhow::Result<Vec<Choice>> {
    let root = engine.prefill(prompt, PrefillOptions::default())?;
    let mut branches = vec![BranchId::default(); args.n];
    match limit {
        // What a fork has from its parent is never dropped: where the prompt may go, its own branch goes on.
        Some(limit) if limit.prompt == KvPrompt::Evict => branches.fill(root),
        _ => engine.fork(root, &mut branches)?,
    }
    engine.exit_prompt(root)?;
    branches
        .into_iter()
        .map(|branch| {
            if let Some(limit) = limit {
                engine.limit_kv(branch, limit.for_prompt(prompt.len(), engine.config().block_size))?;
            }
            engine.start(branch, params.clone())?;
            if params.max_new_tokens > 0 {
                engine.exit_prompt(branch)?;
            }
            Ok(Choice {
                branch,
                decoder: tokenizer.visible_decoder(),
                stops: StopMatcher::new(args.stop.clone()),
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                entropies: Vec::new(),
                finish: None,
            })
        })
        .collect()
}

/// What the river was to do, and what it did.
#[derive(serde::Serialize)]
struct RiverReport {
    policy: River,
    codes: Option<QuantOptions>,
    totals: RiverTotals,
}

impl RiverReport {
    fn of(engine: &Engine) -> Option<Self> {
        let policy = *engine.river()?;
        Some(Self { policy, codes: engine.config().river, totals: RiverTotals::of(engine) })
    }
}

impl Choice {
    fn take(
        &mut self,
        engine: &mut Engine,
        &GeneratedToken { token, logprob, stats }: &GeneratedToken,
        params: &GenerateParams,
        stream: bool,
    ) -> anyhow::Result<()> {
        if self.finish.is_some() || params.end_tokens.contains(&token) {
            return Ok(());
        }
        self.tokens.push(token);
        self.logprobs.push(logprob);
        self.entropies.push(stats.entropy);
        let (text, hit) = self.stops.push(&self.decoder.push(token)?);
        self.emit(&text, stream)?;
        if hit.is_some() {
            engine.stop(self.branch)?;
            self.finish = Some("stop".into());
        }
        Ok(())
    }

    fn end(&mut self, reason: EndReason, stream: bool) -> anyhow::Result<()> {
        if self.finish.is_some() {
            return Ok(());
        }
        let rest = self.decoder.flush();
        let (text, hit) = self.stops.push(&rest);
        self.emit(&text, stream)?;
        if hit.is_none() {
            let held = self.stops.flush();
            self.emit(&held, stream)?;
        }
        self.finish = Some(match reason {
            EndReason::EndToken => "stop".into(),
            EndReason::Length | EndReason::Context => "length".into(),
            EndReason::NonFinite => NON_FINITE.into(),
            EndReason::Stopped | EndReason::Dropped | EndReason::Merged => "cancelled".into(),
        });
        Ok(())
    }

    fn emit(&mut self, text: &str, stream: bool) -> anyhow::Result<()> {
        self.text.push_str(text);
        if stream {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }
}

fn report(
    args: &Args,
    engine: &Engine,
    prompt: &[u32],
    (choices, limit): (&[Choice], Option<&KvLimit>),
    (seconds, first_token_ms): (f64, Option<f64>),
) -> anyhow::Result<()> {
    let stats: Vec<BranchStats> = choices.iter().map(|c| engine.stats(c.branch)).collect::<rksc::Result<_>>()?;
    let mut totals = KvTotals::default();
    stats.iter().for_each(|s| totals.add(s.num_slots, s.num_computed_tokens, s.kv_cuts));
    let river = RiverReport::of(engine);
    let generated: usize = choices.iter().map(|c| c.tokens.len()).sum();
    if args.json {
        let choices: Vec<_> = choices
            .iter()
            .zip(&stats)
            .enumerate()
            .map(|(index, (c, s))| {
                serde_json::json!({
                    "index": index, "text": c.text, "tokens": c.tokens, "token_logprobs": c.logprobs,
                    "entropies": c.entropies, "finish_reason": c.finish,
                    "kv_slots": s.num_slots, "kv_cuts": s.kv_cuts,
                })
            })
            .collect();
        return print_json(&serde_json::json!({
            "model": engine.info(),
            "choices": choices,
            "usage": {"prompt_tokens": prompt.len(), "completion_tokens": generated},
            "seconds": seconds,
            "ttft_ms": first_token_ms,
            "counters": engine.counters(),
            "kv": limit.map(|limit| serde_json::json!({
                "limit": limit, "window": engine.config().kv_window, "totals": totals,
            })),
            "river": river,
            "quantise": engine.config().quantise,
        }));
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
    if let Some(limit) = limit {
        eprintln!("KV budget, not exact: {}; {totals}", limit_in_words(limit));
    }
    if let Some(RiverReport { policy, totals, .. }) = &river {
        eprintln!("River, {}: {}; {totals}", exactness(policy), river_in_words(policy));
    }
    Ok(())
}

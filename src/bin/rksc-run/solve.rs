//! `rksc-run solve`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args as ClapArgs, ValueEnum};
use rksc::ModelSource;
use rksc::calibrate::{Setup, Usable};
use rksc::gate::step::DecodeExit;
use rksc::gate::verify::SkipRule;
use rksc::model::family::ModelConfig;
use rksc::problems::{Problem, read_problems};
use rksc::prompts::PromptPack;
use rksc::quant::QuantOptions;
use rksc::report::html::ReportData;
use rksc::report::kv::limit_in_words;
use rksc::report::river::{exactness, river_in_words};
use rksc::report::{NodeEnd, ProblemResult, SolveReport};
use rksc::solver::select::Select;
use rksc::solver::task::{CompiledPack, Task, TextTask};
use rksc::solver::{Policy, Solver, SolverConfig, VerifyMode};

use crate::calibration::{self, CalibrationArgs};
use crate::common::{self, EngineArgs, SamplingArgs, print_json, progress, read_text};
use crate::gates::GateArgs;
use crate::kv::KvArgs;
use crate::line_file::LineFile;
use crate::report_file::{self, ReportFile};
use crate::river::RiverArgs;
use crate::search::SearchArgs;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Problem file, one JSON object a line: {"id", "question", "answer"?} [default: the bundled problems].
    #[arg(long, value_name = "FILE")]
    problems: Option<PathBuf>,
    /// Solve only the first N problems.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Text in front of every problem (few-shot examples); `bundled` takes the bundled one.
    #[arg(long, value_name = "FILE")]
    prefix: Option<PathBuf>,
    /// Prompt pack [default: prompts.json beside the model; for a chat model without one, the built-in pack].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// One approach a line, instead of the pack's.
    #[arg(long, value_name = "FILE")]
    approaches: Option<PathBuf>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    gates: GateArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    #[command(flatten)]
    search: SearchArgs,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    river: RiverArgs,
    /// Verification leaves early too: by --river-prefill, or without it after as many layers as --river says. Not exact.
    #[arg(long)]
    river_verify: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// One JSON line per problem, written as soon as it is solved.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Keep what --out holds already and solve the rest.
    #[arg(long, requires = "out")]
    resume: bool,
    /// The run as one HTML file with figures, written at its end (also when it ends with an error).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// One JSON object on stdout instead of text; `results` holds what --out writes.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct JsonReport<'a> {
    #[serde(flatten)]
    report: &'a SolveReport,
    /// Under a KV budget, the last tokens that always stay.
    kv_window: Option<usize>,
    /// The codes of the second weight set under a river, of the whole model otherwise.
    codes: Option<QuantOptions>,
    results: &'a [ProblemResult],
}

/// What may be changed about a preset.
#[derive(ClapArgs, Clone)]
pub(crate) struct PolicyArgs {
    /// no-sharing, paper-baseline, exact-fresh, exact, rksc-paper or rksc.
    #[arg(long, default_value = "rksc")]
    policy: Policy,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Tokens a branch may generate.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// How branches are verified [default: as the policy says].
    #[arg(long)]
    verify: Option<Verify>,
    /// When verification is skipped [default: as the policy says].
    #[arg(long)]
    skip: Option<Skip>,
    /// Answers that must agree for --skip agreement [default: 5, or as calibrated].
    #[arg(long)]
    agree: Option<usize>,
    /// When decoding ends early [default: as the policy says].
    #[arg(long, alias = "exit")]
    decode_exit: Option<Exit>,
    /// vote, majority or score*sqrt(conf) [default: as the policy says].
    #[arg(long)]
    select: Option<Select>,
    /// Problems in flight.
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Prefix cache between problems.
    #[arg(long, default_value = "cold")]
    cache: Cache,
}

#[derive(Clone, Copy, ValueEnum)]
enum Verify {
    Suffix,
    Fresh,
    FreshShared,
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum Skip {
    Never,
    Code,
    Paper,
    Agreement,
}

#[derive(Clone, Copy, ValueEnum)]
enum Exit {
    Off,
    PerBranch,
    StopAll,
    Decided,
    /// Decided, and branches stop at an answer that a fork of theirs is sure of.
    Trial,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    /// Emptied before each problem.
    Cold,
    /// Kept.
    Warm,
}

/// Answers that must agree where nothing else is said.
const AGREE: usize = 5;

impl PolicyArgs {
    /// Whether a skip rule is asked for whose numbers are left to a calibration.
    fn leaves_skip_open(&self) -> bool {
        match self.skip {
            Some(Skip::Code | Skip::Paper) => true,
            Some(Skip::Agreement) => self.agree.is_none(),
            Some(Skip::Never) | None => false,
        }
    }

    pub(crate) fn config(&self, sampling: &SamplingArgs) -> rksc::Result<SolverConfig> {
        let mut c = SolverConfig::preset(self.policy);
        c.num_branches = self.branches;
        c.max_new_tokens = self.max_new_tokens;
        c.concurrency = self.concurrency;
        c.cold_cache = self.cache == Cache::Cold;
        c.sampling = sampling.params()?;
        if let Some(verify) = self.verify {
            c.verify = match verify {
                Verify::Suffix => VerifyMode::Suffix,
                Verify::Fresh => VerifyMode::Fresh,
                Verify::FreshShared => VerifyMode::FreshShared,
                Verify::Off => VerifyMode::Off,
            };
        }
        if let Some(skip) = self.skip {
            c.skip = match skip {
                Skip::Never => SkipRule::Never,
                Skip::Code => SkipRule::CODE,
                Skip::Paper => SkipRule::PAPER,
                Skip::Agreement => SkipRule::Agreement { k: self.agree.unwrap_or(AGREE) },
            };
        } else if let (SkipRule::Agreement { k }, Some(agree)) = (&mut c.skip, self.agree) {
            *k = agree;
        }
        if let Some(exit) = self.decode_exit {
            c.decode_exit = match exit {
                Exit::Off => DecodeExit::Off,
                Exit::PerBranch => DecodeExit::PerBranch,
                Exit::StopAll => DecodeExit::StopAll,
                Exit::Decided => DecodeExit::Decided,
                Exit::Trial => DecodeExit::Trial,
            };
        }
        if let Some(select) = self.select {
            c.select = select;
        }
        Ok(c)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut config = args.policy.config(&args.sampling)?;
    args.search.apply(&mut config);
    args.gates.apply(&mut config);
    let mut engine_config = args.engine.config();
    config.kv = args.kv.limit(&mut engine_config)?;
    config.river = args.river.policy(args.river_verify, &mut engine_config)?;
    config.record = args.report.is_some();
    config.validate()?;
    let source = args.engine.source();
    if let ModelSource::Dir(dir) = &source {
        ModelConfig::from_dir(dir)?; // a missing folder is the first thing to say
    }
    let mut problems = match &args.problems {
        Some(path) => read_problems(path)?,
        None => source.sample_problems()?,
    };
    problems.truncate(args.limit.unwrap_or(usize::MAX));
    let report_file = args.report.as_deref().map(|path| ReportFile::open(path, args.out.as_deref())).transpose()?;
    let (pack, prefix) = texts(args)?;
    let setup = Setup {
        branches: config.num_branches,
        wordings: config.wordings,
        max_new_tokens: config.max_new_tokens,
        ..Setup::of_texts(&pack, &prefix)?
    };
    let left_open = Usable { skip: args.policy.leaves_skip_open(), ..args.gates.left_open() };
    args.calibration.apply(&engine_config, &mut config, left_open, &setup)?;
    let mut engine = common::open(engine_config)?;
    args.gates.measure(&mut engine, &mut config)?;
    let mut tasks = text_tasks(&compile_pack(&args.engine, &engine, pack, &prefix)?, &problems)?;
    tasks.first().map_or(Ok(()), |task| config.validate_task(task.as_ref()))?;
    // Last: what is in the file stays there until everything else is known to be sound.
    let mut out = args.out.as_deref().map(|path| LineFile::open(path, "id", args.resume)).transpose()?;
    if let Some(out) = &out {
        problems.retain(|p| !out.done.contains(&p.id));
        tasks.retain(|t| !out.done.contains(t.id()));
    }

    let bar = progress(tasks.len());
    let mut results: Vec<(usize, ProblemResult)> = Vec::with_capacity(tasks.len());
    let outcome = Solver::new(&mut engine, config.clone())?.solve(&tasks, &mut |idx, result| {
        if let Some(out) = &mut out {
            out.write(&result)?;
        }
        bar.inc(1);
        if !args.json {
            bar.suspend(|| print_result(&problems[idx], &result))?;
        }
        results.push((idx, result));
        Ok(())
    });
    bar.finish_and_clear();
    results.sort_by_key(|(idx, _)| *idx);
    let results: Vec<ProblemResult> = results.into_iter().map(|(_, r)| r).collect();
    let report = SolveReport::new(&config, &results).with_river(&engine);
    let mut setting = report_file::setting(&engine);
    let kv_window = config.kv.map(|_| engine.config().kv_window);
    setting.extend(kv_window.map(|n| ("KV window".to_string(), format!("{n} tokens"))));
    let codes = engine.config().river.or(engine.config().quantise);
    setting.extend(codes.map(|codes| (codes_name(&config).to_string(), codes.to_string())));
    setting.extend(config.calibration.as_ref().map(|c| ("calibration".to_string(), calibration::in_words(c))));
    let page = ReportData {
        title: format!("{} of {} problems, policy {}", results.len(), tasks.len(), report.policy),
        setting,
        report: Some(&report),
        problems: &results,
        ..ReportData::default()
    };
    report_file::finish(report_file.as_ref(), page, outcome.map_err(anyhow::Error::from))?;
    if args.json {
        print_json(&JsonReport { report: &report, kv_window, codes, results: &results })
    } else {
        print_summary(&report)
    }
}

fn codes_name(config: &SolverConfig) -> &'static str {
    if config.river.is_some() { "codes of the river" } else { "projections in codes, not exact" }
}

/// The prompt pack, and the text in front of every problem.
fn texts(args: &Args) -> anyhow::Result<(PromptPack, String)> {
    let source = args.engine.source();
    let mut pack = source.prompt_pack(args.prompts.as_deref())?;
    if let Some(path) = &args.approaches {
        pack.approaches = approaches(&read_text(path)?);
    }
    Ok((pack, prefix_text(&source, args.prefix.as_deref())?))
}

/// One approach a line; empty lines are none.
pub(crate) fn approaches(text: &str) -> Vec<String> {
    text.lines().filter(|l| !l.trim().is_empty()).map(str::to_string).collect()
}

/// The text that `--prefix` names.
pub(crate) fn prefix_text(source: &ModelSource, path: Option<&Path>) -> anyhow::Result<String> {
    match path {
        None => Ok(String::new()),
        Some(path) if path == Path::new("bundled") => Ok(source.fewshot_prefix()?),
        Some(path) => read_text(path),
    }
}

/// A pack for the engine's model, with `prefix` in front of every problem.
pub(crate) fn compile_pack(
    args: &EngineArgs,
    engine: &rksc::Engine,
    pack: PromptPack,
    prefix: &str,
) -> anyhow::Result<Arc<CompiledPack>> {
    let source = args.source();
    let (end_tokens, tokenizer) = (source.end_tokens(engine.model())?, args.tokenizer()?);
    let template = if pack.chat.is_some() { source.chat_template(None, None)? } else { None };
    let compiled = match template {
        Some(template) => CompiledPack::with_template(pack, &template, tokenizer, prefix, &end_tokens),
        None => CompiledPack::new(pack, tokenizer, prefix, &end_tokens),
    };
    Ok(Arc::new(compiled?))
}

pub(crate) fn text_tasks(pack: &Arc<CompiledPack>, problems: &[Problem]) -> anyhow::Result<Vec<Box<dyn Task>>> {
    let task = |p: &Problem| Ok(Box::new(TextTask::new(Arc::clone(pack), p.clone())?) as Box<dyn Task>);
    problems.iter().map(task).collect()
}

fn print_result(problem: &Problem, r: &ProblemResult) -> rksc::Result<()> {
    let mut out = std::io::stdout().lock();
    let verdict = match r.correct {
        Some(true) => " (right)".to_string(),
        Some(false) => format!(" (wrong, expected {})", r.expected.as_deref().unwrap_or("?")),
        None => String::new(),
    };
    let winner = r.branches.get(r.winner);
    let agree = r.branches.iter().filter(|b| b.answer.is_some() && b.answer == r.answer).count();
    let answered = r.branches.iter().filter(|b| b.answer.is_some()).count();
    let score = match winner.and_then(|w| w.score) {
        Some(score) => format!("verifier {score:.3}"),
        None if r.verify.skipped => "verification skipped".to_string(),
        None => "not verified".to_string(),
    };
    let write = |out: &mut std::io::StdoutLock<'_>| -> std::io::Result<()> {
        writeln!(out, "{}  {}", r.id, problem.question)?;
        writeln!(out, "  answer {}{verdict}", r.answer.as_deref().unwrap_or("none"))?;
        if let Some(winner) = winner {
            writeln!(out, "  branch {} of {}, after its prompt:", r.winner + 1, r.branches.len())?;
            for line in winner.text.trim().lines() {
                writeln!(out, "    | {line}")?;
            }
            writeln!(
                out,
                "  {agree} of {answered} answers agree, {} branches stopped early; confidence {:.3}, {score}",
                r.branches.iter().filter(|b| b.ended == Some(rksc::engine::EndReason::Stopped)).count(),
                winner.confidence,
            )?;
        }
        if !r.tree.is_empty() {
            let count = |is: fn(NodeEnd) -> bool| r.tree.iter().filter(|n| is(n.ended)).count();
            writeln!(
                out,
                "  tree of {} nodes: {} expanded, {} pruned, {} duplicates, {} leaves",
                r.tree.len(),
                count(|e| e == NodeEnd::Expanded),
                count(|e| e == NodeEnd::Pruned),
                count(|e| matches!(e, NodeEnd::Duplicate(_))),
                r.branches.len(),
            )?;
        }
        let (ms, t) = (r.phase_ms, r.tokens);
        writeln!(
            out,
            "  {:.1} ms: prefill {:.1} ({} tokens), decode {:.1} ({}), verify {:.1} ({})\n",
            r.latency_ms, ms.prefill, t.prefill, ms.decode, t.decode, ms.verify, t.verify
        )
    };
    write(&mut out).map_err(|source| rksc::Error::Io { path: "stdout".into(), source })
}

fn print_summary(r: &SolveReport) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if let (Some(accuracy), Some([lo, hi])) = (r.accuracy, r.accuracy_interval) {
        writeln!(
            out,
            "{} of {} right ({:.1} %, 95 % interval {:.1} to {:.1})",
            r.correct,
            r.problems,
            accuracy * 100.0,
            lo * 100.0,
            hi * 100.0
        )?;
    }
    let l = r.latency_ms;
    writeln!(
        out,
        "policy {}: {:.1} ms a problem (median {:.1}, p90 {:.1}); tokens: prefill {}, decode {}, verify {}",
        r.policy, l.mean, l.p50, l.p90, r.tokens.prefill, r.tokens.decode, r.tokens.verify
    )?;
    writeln!(
        out,
        "verification: {} branches, skipped for {} of {} problems; KV blocks: peak {}, shared {}",
        r.verify.run, r.verify.skipped, r.problems, r.blocks.peak, r.blocks.shared
    )?;
    if let (Some(limit), Some(kv)) = (&r.config.kv, &r.kv) {
        writeln!(out, "KV budget, not exact: {}; {kv}", limit_in_words(limit))?;
    }
    if let (Some(policy), Some(river)) = (&r.config.river, &r.river) {
        writeln!(out, "River, {}: {}; {river}", exactness(policy), river_in_words(policy))?;
    }
    Ok(())
}

//! `rksc-run calibrate`: thresholds that hold a target, found on one problem file or checked on another.

mod river;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::assets::CALIBRATION_FILE;
use rksc::calibrate::{Calibration, Evidence, FileRef, Goal, Part, Parts, Records, Setup, parse_negatives};
use rksc::config::ModelSource;
use rksc::problems::{Problem, parse_problems};
use rksc::solver::task::CompiledPack;
use serde::Serialize;

use crate::common::{self, EngineArgs, print_json, progress};
use crate::report_file::ReportFile;
use crate::solve::{compile_pack, prefix_text};

/// Find thresholds under which at most a stated share of problems goes from right to wrong, with a confidence bound;
/// `solve` takes them from the file that this writes.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Problem file; those of its problems that have an answer count.
    #[arg(long, value_name = "FILE")]
    problems: PathBuf,
    /// Only the first N problems.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Pairs of questions that must not become one, one JSON object a line: {"kind", "question", "other"}. Without them
    /// there is no setting for --asks.
    #[arg(long, value_name = "FILE")]
    negatives: Option<PathBuf>,
    /// At most this share of the problems may go from right to wrong.
    #[arg(long, value_name = "SHARE", default_value_t = 0.02, value_parser = share)]
    target: f64,
    /// The confidence with which that is to be known.
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, value_parser = share)]
    confidence: f64,
    /// Text in front of every problem (few-shot examples); `bundled` takes the bundled one.
    #[arg(long, value_name = "FILE")]
    prefix: Option<PathBuf>,
    /// Prompt pack [default: prompts.json beside the model].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Wordings of a problem that its branches take turns among (its question, then its `paraphrases`).
    #[arg(long, value_name = "N", default_value_t = 5)]
    wordings: usize,
    /// Tokens a branch may generate.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Problems in flight; changes no figure.
    #[arg(long, default_value_t = 4)]
    concurrency: usize,
    /// Where the calibration goes [default: calibration.json beside the model].
    #[arg(long, value_name = "FILE", conflicts_with = "check")]
    out: Option<PathBuf>,
    /// Find nothing: apply the settings of this calibration to the problems, and say whether its target holds.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["target", "confidence"])]
    check: Option<PathBuf>,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    river: river::RiverArgs,
}

/// A share strictly between 0 and 1.
fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
        _ => Err("must lie between 0 and 1; 2 % is 0.02".into()),
    }
}

/// The files of a run, read.
struct Input {
    problems: Vec<Problem>,
    problems_ref: FileRef,
    negatives: Vec<rksc::calibrate::Negative>,
    negatives_ref: Option<FileRef>,
}

impl Input {
    fn read(args: &Args) -> anyhow::Result<Self> {
        let bytes = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
        let text = bytes(&args.problems)?;
        let mut problems = parse_problems(&args.problems, &text)?;
        problems.truncate(args.limit.unwrap_or(usize::MAX));
        problems.retain(|p| p.answer.is_some());
        anyhow::ensure!(!problems.is_empty(), "--problems: none has an answer to compare with");
        let problems_ref = FileRef::new(&args.problems, &text, problems.len());
        let (mut negatives, mut negatives_ref) = (Vec::new(), None);
        if let Some(path) = &args.negatives {
            let text = bytes(path)?;
            negatives = parse_negatives(path, &text)?;
            negatives_ref = Some(FileRef::new(path, &text, negatives.len()));
        }
        Ok(Self { problems, problems_ref, negatives, negatives_ref })
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.river.river {
        return river::run(args);
    }
    if let Some(path) = &args.check {
        return check(args, path);
    }
    let out = match (&args.out, args.engine.source()) {
        (Some(out), _) => out.clone(),
        (None, ModelSource::Dir(dir)) => dir.join(CALIBRATION_FILE),
        _ => anyhow::bail!("--out: the bundled model has no folder; say where the calibration goes"),
    };
    let input = Input::read(args)?;
    let file = ReportFile::at(&out);
    file.probe().with_context(|| format!("--out: {}", out.display()))?;
    let goal = Goal { target: args.target, confidence: args.confidence };
    let model = Engine::fingerprint(&args.engine.config())?;
    let mut session = Session::open(args)?;
    let parts = match Parts::out_of_reach(goal, input.problems.len()) {
        Some(parts) => parts,
        None => Parts::find(&session.record(args, &input)?, goal),
    };
    let files = (input.problems_ref, input.negatives_ref);
    let dtype = session.engine.config().dtype.to_string();
    let calibration = Calibration::new(model, dtype, files, goal, (session.setup, parts));
    file.replace(&calibration.to_bytes()?).with_context(|| format!("--out: {}", out.display()))?;
    if args.json {
        return print_json(&calibration);
    }
    print(&calibration)?;
    say!("written to {}", out.display());
    Ok(())
}

/// An engine, and what is asked of it.
struct Session {
    engine: Engine,
    pack: Arc<CompiledPack>,
    setup: Setup,
}

impl Session {
    fn open(args: &Args) -> anyhow::Result<Self> {
        let source = args.engine.source();
        let pack = source.prompt_pack(args.prompts.as_deref())?;
        let prefix = prefix_text(&source, args.prefix.as_deref())?;
        anyhow::ensure!(args.branches >= 1 && args.wordings >= 1, "--branches, --wordings: must be at least 1");
        let approaches = pack.approaches.len();
        anyhow::ensure!(
            args.branches <= approaches,
            "--branches: the prompt pack has {approaches} approaches; ask for fewer, or give another with --prompts FILE"
        );
        let setup = Setup {
            branches: args.branches,
            wordings: args.wordings,
            max_new_tokens: args.max_new_tokens,
            in_flight: args.concurrency,
            ..Setup::of_texts(&pack, &prefix)?
        };
        let mut config = args.engine.config();
        args.river.apply(&mut config)?;
        let engine = common::open(config)?;
        let pack = compile_pack(&args.engine, &engine, pack, &prefix)?;
        Ok(Self { engine, pack, setup })
    }

    fn record(&mut self, args: &Args, input: &Input) -> anyhow::Result<Records> {
        let bar = progress(1000);
        let negatives = if args.wordings > 1 { input.negatives.as_slice() } else { &[] };
        let mut tell = |done: f64| bar.set_position((1000.0 * done) as u64);
        let records = Records::take(&mut self.engine, &self.pack, &self.setup, &input.problems, negatives, &mut tell);
        bar.finish_and_clear();
        Ok(records?)
    }
}

fn check(args: &Args, path: &Path) -> anyhow::Result<()> {
    let calibration = Calibration::read(path)?;
    let input = Input::read(args)?;
    let name = path.display().to_string();
    calibration.check_model(&name, &Engine::fingerprint(&args.engine.config())?, args.engine.config().dtype)?;
    let mut session = Session::open(args)?;
    let differs = calibration.setup.differences(&session.setup);
    anyhow::ensure!(differs.is_empty(), "--check: {name} promises nothing about {}", differs.join(", "));
    if calibration.parts.asks.setting.is_none() {
        session.setup.wordings = 1; // nobody asks for the others
    }
    let checks = calibration.check(&session.record(args, &input)?);
    if args.json {
        return print_json(&serde_json::json!({
            "calibration": calibration, "problems": input.problems_ref, "mechanisms": checks,
        }));
    }
    say!("{} on {} problems of {}", promise(&calibration), input.problems.len(), input.problems_ref.file);
    for c in &checks {
        let counts = c.counts;
        say!("{}: {}", c.mechanism, c.setting);
        say!(
            "  right to wrong {} ({}), wrong to right {} ({}); at most {} at {} confidence: {}",
            counts.right_to_wrong,
            interval(c.interval),
            counts.wrong_to_right,
            interval(c.gain_interval),
            percent(c.bound),
            percent(calibration.goal.confidence),
            c.verdict,
        );
        say!("  fired on {} of {} problems, saved {}", counts.fired, counts.n, percent(c.saving));
    }
    if checks.is_empty() {
        say!("it has no admissible setting: nothing to check");
    }
    Ok(())
}

fn percent(x: f64) -> String {
    format!("{:.2} %", 100.0 * x)
}

fn interval([lo, hi]: [f64; 2]) -> String {
    format!("95 % interval {} to {}", percent(lo), percent(hi))
}

fn promise(c: &Calibration) -> String {
    format!("at most {} right to wrong at {} confidence", percent(c.goal.target), percent(c.goal.confidence))
}

fn print(c: &Calibration) -> anyhow::Result<()> {
    say!("{}, from {} problems of {}", promise(c), c.problems.count, c.problems.file);
    let p = &c.parts;
    print_part("skip paper", &p.skip_paper)?;
    print_part("skip code", &p.skip_code)?;
    print_part("skip agreement", &p.skip_agreement)?;
    print_part("verify-exit", &p.verify_exit)?;
    print_part("asks", &p.asks)
}

fn print_part<S: Serialize + Copy>(name: &str, part: &Part<S>) -> anyhow::Result<()> {
    let shown = |setting: &S| serde_json::to_string(setting).unwrap_or_default();
    say!("{name}: {}", part.answer);
    if let (Some(setting), Some(evidence)) = (&part.setting, &part.evidence) {
        say!("  {}: {}", shown(setting), figures(evidence, &part.saves));
    }
    if let Some(stop) = &part.stopped_at {
        let figures = figures(&stop.evidence, &part.saves);
        say!("  {} of {} hold; {} does not: {figures}", part.held, part.settings, shown(&stop.setting));
    }
    Ok(())
}

fn figures(e: &Evidence, saves: &str) -> String {
    let c = e.counts;
    let merges = e
        .merge_bound
        .map(|bound| format!("; false merges {} of {} (at most {})", c.false_merges, c.pairs, percent(bound)));
    format!(
        "right to wrong {} of {} (at most {}), wrong to right {}{}; {} of {saves} saved",
        c.right_to_wrong,
        c.n,
        percent(e.bound),
        c.wrong_to_right,
        merges.unwrap_or_default(),
        percent(e.saving),
    )
}

//! `rksc-run calibrate --river`: the bound of the step similarity under which tokens agree with the backbone's.

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::calibrate::river::{self, ForcedText, Goal, RiverCurve, RiverRow};
use rksc::gate::river::RiverExit;
use rksc::gate::step::DecodeExit;
use rksc::solver::{Policy, Solver, SolverConfig, VerifyMode};

use super::{Args, Input, Session};
use crate::common::{print_json, progress};
use crate::quant::{QuantArgs, Wanted};
use crate::report_file::ReportFile;

/// What the paper reports of how its statistic foretells the error of the last layer's values.
const PAPERS_CORRELATION: f64 = 0.5536;

#[derive(ClapArgs)]
pub(super) struct RiverArgs {
    /// Find the tau of `--river tau=X` instead: the one with the shallowest exits whose tokens agree with the backbone's, on
    /// the same tokens (the backbone's own, behind the problems). Prints how much the statistic foretells.
    #[arg(long, conflicts_with_all = ["negatives", "target", "confidence", "check", "branches", "wordings"])]
    pub(super) river: bool,
    /// Least share of tokens behind which both expect the same one most.
    #[arg(long, requires = "river", default_value_t = 0.99, value_name = "SHARE", value_parser = super::share)]
    river_agreement: f64,
    /// Largest mean KL divergence of the next token, in nats.
    #[arg(long, requires = "river", default_value_t = 0.01, value_name = "NATS")]
    river_kl: f64,
    /// Bounds to try.
    #[arg(long, requires = "river", value_delimiter = ',', value_name = "X,..",
          default_values_t = [0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])]
    river_taus: Vec<f32>,
    /// Tokens of each chain that are run, at most.
    #[arg(long, requires = "river", default_value_t = 256, value_name = "N")]
    river_tokens: usize,
    /// Problems whose chains are run.
    #[arg(long, requires = "river", default_value_t = 32, value_name = "N")]
    river_texts: usize,
    #[command(flatten)]
    pub(super) quant: QuantArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let wanted = &args.river;
    anyhow::ensure!(wanted.river_kl >= 0.0, "--river-kl: must not be below 0");
    anyhow::ensure!(wanted.river_tokens >= 1 && wanted.river_texts >= 1, "--river-tokens, --river-texts: at least 1");
    let input = Input::read(args)?;
    let mut session = Session::open(args)?;
    let texts = texts(args, &mut session, &input)?;
    let exits: Vec<RiverExit> = wanted.river_taus.iter().map(|&tau| RiverExit::Tau(tau)).collect();
    let bar = progress(texts.len());
    let mut tell = |done: usize, _: usize| bar.set_position(done as u64);
    let curve = river::measure(&mut session.engine, &texts, &exits, &mut tell)?;
    bar.finish_and_clear();
    let goal = Goal { agreement: wanted.river_agreement, kl: wanted.river_kl };
    let found = river::admissible_tau(&curve, goal);
    let json = json(args, &session.engine, (&curve, found), &texts)?;
    if let Some(out) = &args.out {
        ReportFile::at(out).replace(serde_json::to_string_pretty(&json)?.as_bytes())?;
    }
    if args.json { print_json(&json) } else { print(&curve, found, goal) }
}

/// The backbone's own greedy chains behind the problems' first branch.
fn texts(args: &Args, session: &mut Session, input: &Input) -> anyhow::Result<Vec<ForcedText>> {
    let problems = &input.problems[..input.problems.len().min(args.river.river_texts)];
    let tasks = crate::solve::text_tasks(&session.pack, problems)?;
    let config = SolverConfig {
        num_branches: 1,
        max_new_tokens: args.max_new_tokens.min(args.river.river_tokens),
        verify: VerifyMode::Off,
        decode_exit: DecodeExit::Off,
        concurrency: args.concurrency,
        ..SolverConfig::preset(Policy::Exact)
    };
    let mut texts: Vec<Option<ForcedText>> = tasks.iter().map(|_| None).collect();
    let mut take = |idx: usize, result: rksc::report::ProblemResult| {
        let prompt = [tasks[idx].root(), tasks[idx].branch(0)?].concat();
        let forced = result.branches.first().map_or(Vec::new(), |b| b.tokens.clone());
        texts[idx] = (!forced.is_empty()).then_some(ForcedText { prompt, forced });
        Ok(())
    };
    Solver::new(&mut session.engine, config)?.solve(&tasks, &mut take)?;
    Ok(texts.into_iter().flatten().collect())
}

impl RiverArgs {
    /// `engine` gets the second weight set; codes are refused where nobody asks for one.
    pub(super) fn apply(&self, engine: &mut rksc::EngineConfig) -> rksc::Result<()> {
        self.quant.apply(&Wanted { river: self.river, quantise: false }, engine)
    }
}

fn json(
    args: &Args,
    engine: &Engine,
    (curve, found): (&RiverCurve, Option<&RiverRow>),
    texts: &[ForcedText],
) -> anyhow::Result<serde_json::Value> {
    Ok(serde_json::json!({
        "calibrate": "river", "model": engine.info().name, "fingerprint": Engine::fingerprint(engine.config())?,
        "dtype": engine.info().dtype, "codes": args.river.quant.options().to_string(),
        "problems": args.problems, "texts": texts.len(),
        "agreement": args.river.river_agreement, "kl": args.river.river_kl,
        "tau": found.map(|r| r.exit), "rows": curve.rows, "correlation": curve.correlation,
        "papers_correlation": PAPERS_CORRELATION,
    }))
}

fn print(curve: &RiverCurve, found: Option<&RiverRow>, goal: Goal) -> anyhow::Result<()> {
    say!(
        "{:<10} {:>10} {:>12} {:>12} {:>14} {:>14}",
        "exit",
        "depth",
        "KL (nats)",
        "agreement",
        "k, all layers",
        "v, last layer"
    );
    for r in &curve.rows {
        let k = r.k_cosine.iter().sum::<f64>() / r.k_cosine.len().max(1) as f64;
        let v = r.v_cosine.last().copied().unwrap_or(f64::NAN);
        say!(
            "{:<10} {:>10.2} {:>12.5} {:>10.2} % {k:>14.4} {v:>14.4}",
            r.exit.to_string(),
            r.mean_depth,
            r.kl,
            100.0 * r.agreement
        );
    }
    let tokens = curve.rows.first().map_or(0, |r| r.tokens);
    say!("{tokens} tokens each, on the backbone's own chains; k and v: cosines to the backbone's");
    for (i, r) in curve.correlation.iter().enumerate() {
        say!(
            "step similarity after layer {}: correlation {r:.3} with the cosine of the last layer's values (paper: {PAPERS_CORRELATION})",
            i + 1
        );
    }
    match found {
        Some(r) => say!(
            "{}: the shallowest with at least {} % agreement and a KL of at most {}; use --river {}",
            r.exit,
            100.0 * goal.agreement,
            goal.kl,
            r.exit
        ),
        None => {
            say!("no admissible tau: none has {} % agreement and a KL of at most {}", 100.0 * goal.agreement, goal.kl)
        }
    }
    Ok(())
}

//! Right answers, agreement and speed against the depth at which tokens leave the backbone.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::calibrate::river::{ForcedText, RiverCurve, measure, measure_whole};
use rksc::gate::river::{River, RiverExit};
use rksc::quant::{QuantOptions, Quantiser};
use rksc::report::ProblemResult;
use rksc::solver::task::Task;

use super::super::paired::only_branch;
use super::super::{Table, cpu_model};
use super::chains::{self, ChainArgs};
use super::score::{Kind, Row};
use super::{Arm, Weights, check_fixed, draw, rates, verdicts};
use crate::common::print_json;

/// Right answers of greedy chains whose tokens leave the backbone early, against the backbone on the same problems.
///
/// One chain a problem, nothing verified or cut short. Arms: the backbone; the exits tau=X (after the first layer whose
/// residual stream has a cosine above X) and fixed=E (after E layers); the whole model in codes, prompts too, by each
/// quantiser; drafts, which change nothing.
///
/// RIGHT: with its Wilson 95 % interval. LOST, WON: problems right in the backbone alone, and in the arm alone. DIFFERENCE:
/// in points, with Tango's paired score interval (95 %). SAME: problems with the backbone's very tokens. DEPTH: layers of the
/// backbone that a generated token went through.
///
/// KL, AGREE, K, V: the backbone's own chains of the first --forced-problems problems, given token by token to the arm and
/// to the backbone: nats, share of tokens behind which both expect the same one most, and cosines of all layers' K and V.
///
/// TOKENS/S: chains one at a time, arms in turns, prompts included; medians over the turns. SPEED-UP: paired within a turn.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    chains: ChainArgs,
    /// Cosines above which tokens leave.
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
        value_name = "X,..",
        allow_negative_numbers = true
    )]
    taus: Vec<f32>,
    /// Layers after which tokens leave [default: 0 to all but one].
    #[arg(long, value_delimiter = ',', value_name = "E,..")]
    fixed: Vec<u32>,
    /// Also run the tokens of fixed=E through the backbone every R tokens.
    #[arg(long, value_name = "R")]
    refresh: Option<usize>,
    /// E of that arm.
    #[arg(long, default_value_t = 2, value_name = "E", requires = "refresh")]
    refresh_fixed: u32,
    /// Tokens the draft arm proposes; 0 leaves it out.
    #[arg(long, default_value_t = 4, value_name = "N")]
    draft: usize,
    /// Codes of a better quantiser (`rksc-run quantise --quantiser gptq`).
    #[arg(long, value_name = "FILE")]
    better_codes: Option<PathBuf>,
    /// Problems whose chains are given to the arms.
    #[arg(long, default_value_t = 32, value_name = "N")]
    forced_problems: usize,
    /// Tokens of each that are given.
    #[arg(long, default_value_t = 256, value_name = "N")]
    forced_tokens: usize,
    /// Draw it as an SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What was found.
struct Outcome {
    rows: Vec<Row>,
    curve: RiverCurve,
    verdicts: Vec<String>,
    notes: Vec<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let weights = args.chains.load()?;
    let (mut engines, whole) = engines(args, &weights)?;
    let tasks = args.chains.tasks(&engines[0])?;
    let num_layers = weights.model.num_layers;
    let arms = arms(args, num_layers, whole)?;
    let config = args.chains.config();
    let mut all: Vec<Vec<ProblemResult>> = Vec::new();
    let mut rows = Vec::new();
    for arm in &arms {
        let (results, stats) = chains::solve(&mut engines[arm.engine], &tasks, &config, arm)?;
        rows.push(Row::new(arm, (&results, &stats), all.first().unwrap_or(&results), num_layers));
        all.push(results);
    }
    let curve = force(&mut engines, &arms, &forced_texts(args, &tasks, &all[0])?, &mut rows)?;
    let timed = &tasks[..args.chains.speed_problems.min(tasks.len())];
    let rates = rates::measure(&mut engines, &arms, timed, &config, args.chains.repeats)?;
    rows.iter_mut().zip(rates).for_each(|(row, rates)| row.rates = rates);
    let verdicts = verdicts::all(&rows, num_layers);
    let outcome = Outcome { rows, curve, verdicts, notes: notes(args) };
    if let Some(path) = &args.svg {
        let words = format!(
            "{} problems, one chain of {:.0} tokens in the mean each; {}, greedy; codes {}",
            tasks.len(),
            outcome.rows[0].paired.tokens_mean,
            engines[0].info().name,
            args.chains.quant.options(),
        );
        let svg = draw::accuracy(&outcome.rows, words);
        std::fs::write(path, svg).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    }
    if args.chains.json { print_json(&json(args, &engines[0], &outcome)) } else { print(&outcome) }
}

/// The backbone with its second set, then one engine in codes a quantiser, by name.
fn engines(args: &Args, weights: &Weights) -> anyhow::Result<(Vec<Engine>, Vec<String>)> {
    let options = args.chains.quant.options();
    let codes = weights.codes(options)?;
    let mut engines = vec![weights.with_river(&codes)?, weights.in_codes(&codes)?];
    let mut names = vec![options.quantiser.to_string()];
    if options.quantiser != Quantiser::Rtn {
        let rounded = weights.codes(QuantOptions { quantiser: Quantiser::Rtn, ..options })?;
        engines.push(weights.in_codes(&rounded)?);
        names.push(Quantiser::Rtn.to_string());
    }
    if let Some(path) = &args.better_codes {
        let better = QuantOptions { quantiser: Quantiser::Gptq, ..options };
        let config = rksc::EngineConfig { codes: Some(path.clone()), ..weights.config.clone() };
        let codes = Engine::load_codes(&config, &weights.model, &weights.store, better)?;
        engines.push(weights.in_codes(&codes)?);
        names.push(better.quantiser.to_string());
    }
    Ok((engines, names.into_iter().map(|name| format!("all {name}")).collect()))
}

/// The backbone first.
fn arms(args: &Args, num_layers: usize, whole: Vec<String>) -> anyhow::Result<Vec<Arm>> {
    let mut arms = vec![Arm::backbone()];
    arms.extend(args.taus.iter().map(|&tau| Arm::exit(RiverExit::Tau(tau))));
    let every: Vec<u32> = (0..num_layers as u32).collect();
    let fixed = if args.fixed.is_empty() { &every } else { &args.fixed };
    check_fixed(fixed, num_layers)?;
    arms.extend(fixed.iter().map(|&layers| Arm::exit(RiverExit::Fixed(layers))));
    if let Some(every) = args.refresh {
        let arm = Arm::exit(RiverExit::Fixed(args.refresh_fixed));
        let river = arm.river.map(|river| River { refresh: Some(every), ..river });
        arms.push(Arm { name: format!("{} refresh={every}", arm.name), river, ..arm });
    }
    if args.draft > 0 {
        arms.push(Arm::exit(RiverExit::Draft(args.draft)));
    }
    arms.extend(whole.into_iter().enumerate().map(|(i, name)| Arm::whole(name, 1 + i)));
    arms.iter().filter_map(|a| a.river).try_for_each(|river| river.validate())?;
    Ok(arms)
}

/// The backbone's own chains.
fn forced_texts(args: &Args, tasks: &[Box<dyn Task>], backbone: &[ProblemResult]) -> anyhow::Result<Vec<ForcedText>> {
    let text = |task: &dyn Task, result| -> anyhow::Result<ForcedText> {
        let forced = only_branch(result)?.tokens.iter().copied().take(args.forced_tokens).collect();
        Ok(ForcedText { prompt: [task.root(), task.branch(0)?].concat(), forced })
    };
    let texts = tasks.iter().zip(backbone).map(|(task, result)| text(task.as_ref(), result));
    let mut texts = texts.collect::<anyhow::Result<Vec<_>>>()?;
    texts.retain(|t| !t.forced.is_empty());
    texts.truncate(args.forced_problems);
    anyhow::ensure!(!texts.is_empty(), "--forced-problems: there is no token to give to the arms");
    Ok(texts)
}

/// Gives the same tokens to every arm that can be told apart by them: a draft is the backbone, and what a refresh makes
/// good depends on when it comes.
fn force(engines: &mut [Engine], arms: &[Arm], texts: &[ForcedText], rows: &mut [Row]) -> anyhow::Result<RiverCurve> {
    eprintln!("{} chains, given to every arm", texts.len());
    let is_forced = |row: &Row| matches!(row.kind, Kind::Tau | Kind::Fixed);
    let exits: Vec<RiverExit> =
        rows.iter().zip(arms).filter(|(row, _)| is_forced(row)).filter_map(|(_, a)| Some(a.river?.exit)).collect();
    for engine in engines.iter_mut() {
        Arm::backbone().apply(engine)?;
        engine.clear_prefix_cache()?;
    }
    let (main, others) = engines.split_at_mut(1);
    let curve = measure(&mut main[0], texts, &exits, &mut |_, _| {})?;
    let forced = rows.iter_mut().filter(|row| is_forced(row));
    forced.zip(&curve.rows).for_each(|(row, of)| row.forced = Some(of.clone()));
    for (row, arm) in rows.iter_mut().zip(arms).filter(|(row, _)| row.kind == Kind::Whole) {
        row.forced = Some(measure_whole(&mut main[0], &mut others[arm.engine - 1], texts, &mut |_, _| {})?);
    }
    Ok(curve)
}

fn notes(args: &Args) -> Vec<String> {
    let no_better = "no arm with a better quantiser: make its codes (rksc-run quantise --quantiser gptq) and give them with \
                     --better-codes";
    args.better_codes.is_none().then(|| no_better.to_string()).into_iter().collect()
}

fn json(args: &Args, engine: &Engine, o: &Outcome) -> serde_json::Value {
    let info = engine.info();
    serde_json::json!({
        "bench": "river accuracy", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "config": {
            "files": args.chains.problems.files, "limit": args.chains.problems.limit,
            "max_new_tokens": args.chains.max_new_tokens, "codes": args.chains.quant.options().to_string(),
            "forced_problems": args.forced_problems, "forced_tokens": args.forced_tokens,
            "speed_problems": args.chains.speed_problems, "repeats": args.chains.repeats,
        },
        "problems": o.rows[0].paired.problems, "layers": engine.model().num_layers, "arms": o.rows,
        "correlation": o.curve.correlation, "verdicts": o.verdicts, "notes": o.notes,
    })
}

fn print(o: &Outcome) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        "arm",
        "right",
        "% (95 %)",
        "lost",
        "won",
        "difference (95 %)",
        "same",
        "depth",
        "tokens",
        "KL",
        "agree",
        "K",
        "V",
        "tokens/s",
        "speed-up",
    ]);
    for r in &o.rows {
        let mut cells = vec![r.arm.clone()];
        cells.extend(r.paired.right_cells());
        match r.kind {
            Kind::Backbone => cells.extend(["-"; 4].map(String::from)),
            _ => {
                cells.extend(r.paired.change_cells());
                cells.push(r.paired.same_tokens.to_string());
            }
        }
        cells.extend([format!("{:.2}", r.mean_depth), format!("{:.0}", r.paired.tokens_mean)]);
        match &r.forced {
            None => cells.extend(["-"; 4].map(String::from)),
            Some(f) => cells.extend([
                format!("{:.2e}", f.kl),
                format!("{:.2} %", f.agreement * 100.0),
                format!("{:.4}", verdicts::mean(&f.k_cosine)),
                format!("{:.4}", verdicts::mean(&f.v_cosine)),
            ]),
        }
        cells.extend(r.rates.cells());
        table.row(cells);
    }
    table.print()?;
    let forced = o.curve.rows.first().map_or(0, |r| r.tokens);
    say!("KL, agree, K and V: over the same {forced} tokens; tokens/s: medians (least to most), prompts included\n");
    let correlation: Vec<String> = o.curve.correlation.iter().map(|r| format!("{r:.3}")).collect();
    say!(
        "correlation of the cosine after each layer with that of the last layer's V, leaving there: {} (the paper's: \
         0.5536)",
        correlation.join(" ")
    );
    for line in o.verdicts.iter().chain(&o.notes) {
        say!("{line}");
    }
    Ok(())
}

//! Milliseconds of a decode step and the bytes of weights it reads: the backbone, early exits, the whole model in codes.

use clap::Args as ClapArgs;
use rksc::Engine;
use rksc::gate::river::{River, RiverExit};
use rksc::gate::{Effect, GateSpec, Rule, Scope, Statistic};

use super::super::{Table, cpu_model, median, spread};
use super::bytes::{LayerBytes, check};
use super::steps::{self, Run, RunArgs};
use super::{Arm, CLAIM, check_fixed, in_turn};
use crate::common::{EngineArgs, print_json};
use crate::quant::QuantArgs;

/// Time and bytes of decode steps, arms in turns: the backbone, exits after E layers, the whole model in codes.
///
/// Several branches may go different ways: `each` lets every other one leave after the first depth of --mixed and the others
/// after the second; `last` lets all leave after the second, as the rule that waits for the last one does.
///
/// MS/STEP: medians of each turn, then of the turns. SPEED-UP: the backbone's step over the arm's in the same turn. MB: bytes
/// of weights a step; BY FORMULA: of each layer the sets that a row takes, and the unembedding; the command fails where the
/// two differ by more than 1 %. FLOOR: the backbone's bytes over the arm's, what a machine that only waits for memory would
/// give. OF FLOOR: speed-up over floor. OF ALL: the speed of the whole model in codes, of which the arm has so much.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Random weights of this shape, unless a model is given.
    #[arg(long, default_value = "qwen2.5-1.5b", value_name = "NAME", conflicts_with = "model")]
    shape: String,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    quant: QuantArgs,
    /// Layers after which all tokens leave, one arm each.
    #[arg(long, value_delimiter = ',', default_values_t = [4], value_name = "E,..")]
    fixed: Vec<u32>,
    /// Also arms that decide on the device: leave where the cosine exceeds this (-2: after the first layer).
    #[arg(long, value_delimiter = ',', value_name = "X,..", allow_negative_numbers = true)]
    tau: Vec<f32>,
    /// Where those look: first and last layer.
    #[arg(long, value_parser = parse_pair, default_value = "1,8", value_name = "MIN,MAX")]
    river_layers: [u32; 2],
    /// Of several branches, depths of the two halves.
    #[arg(long, value_parser = parse_pair, default_value = "1,4", value_name = "E1,E2")]
    mixed: [u32; 2],
    /// Turns; every arm has one in each, in an order that rotates.
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeats: usize,
    /// One JSON object on stdout instead of a table.
    #[arg(long)]
    json: bool,
}

/// One arm.
#[derive(serde::Serialize)]
struct Row {
    arm: String,
    mean_depth: f64,
    /// Medians, one a turn.
    step_ms: Vec<f64>,
    speed_up: Vec<f64>,
    /// A step.
    weight_bytes: f64,
    by_formula: f64,
    bytes_ratio: f64,
    floor: f64,
    of_floor: Vec<f64>,
    of_whole: Vec<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.repeats >= 1, "--repeats: must be at least 1");
    let weights = args.run.load(&args.engine, &args.shape)?;
    let codes = weights.codes(args.quant.options())?;
    let bytes = LayerBytes::new(&weights.model, weights.config.dtype, &codes);
    let arms = arms(args, weights.model.num_layers)?;
    let mut engines = [weights.with_river(&codes)?, weights.in_codes(&codes)?];
    drop((weights, codes));
    let mut runs: Vec<Vec<Run>> = arms.iter().map(|_| Vec::new()).collect();
    for turn in 0..args.repeats {
        for at in in_turn(arms.len(), turn) {
            eprintln!("turn {}: {}", turn + 1, arms[at].name);
            runs[at].push(steps::run(&mut engines[arms[at].engine], &args.run, &arms[at])?);
        }
    }
    let rows = rows(&arms, &runs, &bytes)?;
    if args.json { print_json(&json(args, &engines[0], &bytes, &rows)) } else { print(args, &engines[0], &rows) }
}

/// `1,4`.
fn parse_pair(text: &str) -> Result<[u32; 2], String> {
    let pair = text.split_once(',').and_then(|(a, b)| Some([a.parse().ok()?, b.parse().ok()?]));
    pair.ok_or_else(|| format!("{text:?} is not two layers, e.g. 1,4"))
}

/// The backbone first, the whole model in codes last.
fn arms(args: &Args, num_layers: usize) -> anyhow::Result<Vec<Arm>> {
    check_fixed(&args.fixed, num_layers)?;
    let mut arms = vec![Arm::backbone()];
    arms.extend(args.fixed.iter().map(|&layers| Arm::exit(RiverExit::Fixed(layers))));
    for &tau in &args.tau {
        let [min_layer, max_layer] = args.river_layers;
        let exit = RiverExit::Tau(tau);
        let river = River { min_layer, max_layer, ..River::new(exit) };
        river.validate()?;
        arms.push(Arm { name: exit.to_string(), river: Some(river), ..Arm::backbone() });
    }
    if args.run.batch > 1 {
        anyhow::ensure!(args.mixed[0] < args.mixed[1], "--mixed: must ascend");
        arms.push(Arm { name: "each".into(), gates: halves(args.mixed, Scope::Sequence), ..Arm::backbone() });
        arms.push(Arm { name: "last".into(), gates: halves(args.mixed, Scope::Batch), ..Arm::backbone() });
        arms.iter().flat_map(|a| &a.gates).try_for_each(|gate| gate.validate(num_layers))?;
    }
    arms.push(Arm::whole("all".into(), 1));
    Ok(arms)
}

/// Every other row leaves after the first depth, who is still there after the second. Waiting for the last, nobody leaves
/// before that.
fn halves(depths: [u32; 2], scope: Scope) -> Vec<GateSpec> {
    let gate = |(layers, every): (u32, u32)| GateSpec {
        layers: vec![layers],
        statistic: Statistic::RowIndex,
        rule: Rule::EveryNth { every, offset: 0 },
        scope,
        effect: Effect::River,
    };
    depths.into_iter().zip([2, 1]).map(gate).collect()
}

fn rows(arms: &[Arm], runs: &[Vec<Run>], bytes: &LayerBytes) -> anyhow::Result<Vec<Row>> {
    let ms: Vec<Vec<f64>> = runs.iter().map(|r| r.iter().map(|run| median(&run.seconds) * 1e3).collect()).collect();
    let ratio = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<f64>>();
    let (backbone, whole) = (&ms[0], &ms[ms.len() - 1]);
    let backbone_bytes = bytes.of_step(&[bytes.dense.len() as u32]) as f64;
    arms.iter()
        .zip(runs)
        .zip(&ms)
        .map(|((arm, runs), ms)| {
            let steps = runs.iter().map(|r| r.seconds.len()).sum::<usize>() as f64;
            let depths = || runs.iter().flat_map(|r| &r.depths);
            let in_codes = arm.engine == 1;
            let formula = |depths: &Vec<u32>| if in_codes { bytes.whole() } else { bytes.of_step(depths) };
            let by_formula = depths().map(formula).sum::<u64>() as f64 / steps;
            let weight_bytes = runs.iter().map(|r| r.weight_bytes).sum::<u64>() as f64 / steps;
            check(&arm.name, weight_bytes, by_formula)?;
            let layers = depths().flatten().map(|&d| if in_codes { 0 } else { d }).sum::<u32>();
            let speed_up = ratio(backbone, ms);
            let floor = backbone_bytes / by_formula;
            Ok(Row {
                arm: arm.name.clone(),
                mean_depth: f64::from(layers) / depths().flatten().count() as f64,
                step_ms: ms.clone(),
                of_floor: speed_up.iter().map(|s| s / floor).collect(),
                speed_up,
                weight_bytes,
                by_formula,
                bytes_ratio: weight_bytes / by_formula,
                floor,
                of_whole: ratio(whole, ms),
            })
        })
        .collect()
}

fn json(args: &Args, engine: &Engine, bytes: &LayerBytes, rows: &[Row]) -> serde_json::Value {
    let info = engine.info();
    serde_json::json!({
        "bench": "river speed", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
        "config": {
            "batch": args.run.batch, "prompt_tokens": args.run.prompt_tokens, "tokens": args.run.tokens,
            "codes": args.quant.options().to_string(), "repeats": args.repeats, "mixed": args.mixed,
            "river_layers": args.river_layers,
        },
        "layers": engine.model().num_layers, "bytes": bytes, "arms": rows,
    })
}

fn print(args: &Args, engine: &Engine, rows: &[Row]) -> anyhow::Result<()> {
    let info = engine.info();
    say!(
        "{}, {} | batch {}, {} tokens behind {} | codes {}",
        info.name,
        info.dtype,
        args.run.batch,
        args.run.tokens,
        args.run.prompt_tokens,
        args.quant.options()
    );
    let mut table = Table::new(&[
        "arm",
        "depth",
        "ms/step",
        "speed-up",
        "MB",
        "by formula",
        "ratio",
        "floor",
        "of floor",
        "of all",
    ]);
    let percent = |of: &[f64]| format!("{} %", spread(&of.iter().map(|x| x * 100.0).collect::<Vec<_>>(), 0));
    for r in rows {
        table.row(vec![
            r.arm.clone(),
            format!("{:.2}", r.mean_depth),
            spread(&r.step_ms, 2),
            spread(&r.speed_up, 2),
            format!("{:.1}", r.weight_bytes / 1e6),
            format!("{:.1}", r.by_formula / 1e6),
            format!("{:.4}", r.bytes_ratio),
            format!("{:.2}", r.floor),
            percent(&r.of_floor),
            percent(&r.of_whole),
        ]);
    }
    table.print()?;
    say!("medians of {} turns (least to most); speed-ups are paired within a turn", args.repeats);
    say!(
        "the paper says {} to {} times the backbone's tokens/s (Llama models, an A40, 3 to 4 layers deep, batch 1)",
        CLAIM[0],
        CLAIM[1]
    );
    Ok(())
}

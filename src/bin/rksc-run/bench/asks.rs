//! `rksc-run bench asks`: whether the residual stream tells paraphrases from other questions, and what semantic sharing
//! of prompts saves and costs.

mod pairs;
mod sharing;

use std::path::PathBuf;

use clap::Args as ClapArgs;
use rksc::report::html::{Curve, Panel, render_curves};
use rksc::solver::sharing_table::SharingTable;

use super::{Table, arms, cpu_model};
use crate::common::{EngineArgs, print_json};
use crate::solve::text_tasks;
use pairs::{PairReport, Probe};
use sharing::SharingRow;

/// Semantic sharing of prompts (ASKS) on wordings of the same problems, and on questions that only look alike.
///
/// PAIRS: every question with each of its `paraphrases`, and with the `other` question of every line of --negatives.
/// Similarity is the one that --asks semantic uses, after each of --depths layers. AUC is the probability that a
/// paraphrase is more similar than a negative: 1 separates, 0.5 tells nothing.
///
/// ARMS: problems asked in --wordings wordings, solved with token-exact sharing (the baseline), and with semantic sharing
/// at each threshold and depth, in turn on one engine, nothing verified. GAIN is the baseline's mean latency over the
/// arm's; REUSE the share of the other wordings that became one with another; SAVED the prompt tokens that were not
/// computed, in tokens through all layers.
#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Problem files with paraphrases [default: the bundled problems].
    #[arg(long, value_delimiter = ',', value_name = "FILE,..")]
    problems: Vec<PathBuf>,
    /// Pairs that look alike: lines of {"kind", "question", "other", "answer", "other_answer"}.
    #[arg(long, value_name = "FILE")]
    negatives: Option<PathBuf>,
    /// Only the first N problems, and the first N negatives of each kind.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Solve only the first N of the problems; 0 solves none [default: all].
    #[arg(long, value_name = "N")]
    solve: Option<usize>,
    /// Text in front of every problem: bundled, none or a file [default: bundled for the bundled model, else none].
    #[arg(long, value_name = "bundled|none|FILE")]
    prefix: Option<String>,
    /// Prompt pack [default: prompts.json beside the model].
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Thresholds.
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99], value_name = "TAU,..")]
    taus: Vec<f32>,
    /// Layers that prompts run through before they are compared.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4], value_name = "K,..")]
    depths: Vec<u32>,
    /// More depths for the pairs alone.
    #[arg(long, value_delimiter = ',', default_values_t = [6], value_name = "K,..")]
    pair_depths: Vec<u32>,
    /// Weight of deep layers in the comparison: exp(alpha l / L).
    #[arg(long, default_value_t = 1.5)]
    alpha: f32,
    /// Selective recompute: shares of the aligned tokens that are computed all the same.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.1, 0.3], value_name = "P,..")]
    recompute: Vec<f32>,
    /// Threshold of selective recompute; its depth is the second of --depths.
    #[arg(long, default_value_t = 0.8, value_name = "TAU")]
    recompute_tau: f32,
    /// Wordings that the branches take turns among.
    #[arg(long, default_value_t = 4, value_name = "N")]
    wordings: usize,
    /// Branches per problem.
    #[arg(short = 'B', long, default_value_t = 8)]
    branches: usize,
    /// Tokens a branch may generate.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// Answers and token counts alone: N problems in flight.
    #[arg(long, value_name = "N")]
    untimed: Option<usize>,
    /// Draw both as one SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

/// Of the pairs whose answers differ, this share may merge at most where a threshold is to separate.
const MAX_FALSE_RATE: f64 = 0.005;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let problems = arms::read(&args.engine, &args.problems, args.limit)?;
    anyhow::ensure!(!problems.is_empty(), "--limit: leaves no problems");
    anyhow::ensure!(!args.depths.is_empty() && !args.taus.is_empty(), "--depths, --taus: need one each");
    let negatives = args.negatives.as_deref().map(|f| pairs::read(f, args.limit)).transpose()?.unwrap_or_default();
    let mut engine = args.engine.open()?;
    let pack = arms::pack(&args.engine, &engine, args.prefix.as_deref(), args.prompts.as_deref())?;

    let probe = Probe {
        tokenizer: args.engine.tokenizer()?,
        pack: &pack,
        prefix: arms::prefix_text(&args.engine.source(), args.prefix.as_deref())?,
        alpha: args.alpha,
    };
    let mut depths = [args.depths.as_slice(), &args.pair_depths].concat();
    depths.sort_unstable();
    depths.dedup();
    let pairs = probe.report(&mut engine, &problems, &negatives, &depths, &args.taus, MAX_FALSE_RATE)?;

    let tasks = text_tasks(&pack, &problems[..args.solve.unwrap_or(problems.len()).min(problems.len())])?;
    let arms = sharing::arms(args)?;
    let table = SharingTable::measure(&mut engine, &sharing::asks(args, args.taus[0], args.depths[0]))?;
    let rows = if tasks.is_empty() { Vec::new() } else { sharing::measure(args, &mut engine, tasks, arms)? };
    if let Some(path) = &args.svg {
        std::fs::write(path, draw(args, &pairs, &rows)).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    }
    if args.json {
        let info = engine.info();
        return print_json(&serde_json::json!({
            "bench": "asks", "model": info.name, "dtype": info.dtype, "device": info.device, "cpu": cpu_model(),
            "config": {
                "files": args.problems, "limit": args.limit, "solve": args.solve, "prefix": args.prefix,
                "alpha": args.alpha, "wordings": args.wordings, "branches": args.branches, "untimed": args.untimed,
            },
            "problems": problems.len(), "pairs": pairs, "sharing_table": table, "arms": rows,
        }));
    }
    pairs.iter().try_for_each(print_pairs)?;
    print_rows(&rows)?;
    print_table(&table)
}

fn percent(part: f64) -> String {
    format!("{:.1}", part * 100.0)
}

/// One depth: areas, and at each threshold what merges.
fn print_pairs(r: &PairReport) -> anyhow::Result<()> {
    let areas: Vec<String> = r.auc.iter().map(|(kind, auc)| format!("{kind} {auc:.3}")).collect();
    say!(
        "after {} layers; AUC against {}",
        r.depth,
        if areas.is_empty() { "nothing".into() } else { areas.join(", ") }
    );
    let kinds: Vec<&str> = r.taus.first().map_or_else(Vec::new, |t| t.kinds.iter().map(|k| k.kind.as_str()).collect());
    let header: Vec<&str> =
        ["merged, % of", "all negatives"].into_iter().chain(kinds).chain(["changed", "same numbers"]).collect();
    let mut table = Table::new(&header);
    for t in &r.taus {
        let mut cells = vec![format!("tau {}", t.tau), percent(t.false_rate)];
        cells.extend(t.kinds.iter().map(|k| percent(k.rate)));
        cells.push(t.answers_changed.to_string());
        cells.push(t.answers_changed_same_numbers.to_string());
        table.row(cells);
    }
    table.print()?;
    match (r.separating_tau, r.auc.is_empty()) {
        (_, true) => {}
        (Some(tau), _) => say!("tau {tau:.4} keeps what differs apart"),
        (None, _) => {
            say!("no tau separates: whatever merges a paraphrase merges too many questions with other answers")
        }
    }
    say!("changed: answers that merging changes; same numbers: those left when pairs with other numbers are refused\n");
    Ok(())
}

fn print_rows(rows: &[SharingRow]) -> anyhow::Result<()> {
    let Some(base) = rows.first() else { return Ok(()) };
    let mut table = Table::new(&[
        "arm",
        "reuse %",
        "saved tokens",
        "of prefill %",
        "ms",
        "gain",
        "95 %",
        "right %",
        "difference",
        "changed",
        "right to wrong",
        "wrong to right",
        "verdict",
    ]);
    for r in rows {
        let m = &r.mechanism;
        let gain = m.timing.as_ref().and_then(|t| t.gain);
        let s = &m.selections[0];
        table.row(vec![
            m.name.clone(),
            percent(r.reuse_rate),
            format!("{:.1}", r.saved_tokens),
            percent(r.saved_tokens / base.prefill_tokens.max(1.0)),
            m.timing.as_ref().map_or("-".into(), |t| format!("{:.1}", t.latency_ms.mean)),
            gain.map_or("-".into(), |g| format!("{:.3}", g.measured.value)),
            gain.map_or("-".into(), |g| format!("{:.3} to {:.3}", g.measured.lo, g.measured.hi)),
            s.accuracy.map_or("-".into(), percent),
            s.difference.map_or("-".into(), |d| {
                format!("{:+.1} ({:+.1} to {:+.1})", d.value * 100.0, d.lo * 100.0, d.hi * 100.0)
            }),
            s.changed.to_string(),
            s.right_to_wrong.count.to_string(),
            s.wrong_to_right.count.to_string(),
            m.verdict.into(),
        ]);
    }
    table.print()?;
    say!(
        "saved tokens: a problem's, through all layers; of prefill: the baseline's {:.0} tokens a problem",
        base.prefill_tokens
    );
    Ok(())
}

fn print_table(t: &SharingTable) -> anyhow::Result<()> {
    say!();
    let mut table =
        Table::new(&["tokens", "prompts", "each for itself, ms", "one, ms", "the others compared, ms", "net, ms"]);
    for c in &t.cells {
        let ms = |x: f64| format!("{x:.2}");
        table.row(vec![
            c.prefix_tokens.to_string(),
            c.branches.to_string(),
            ms(c.full_ms),
            ms(c.prefix_ms),
            ms(c.suffix_ms),
            ms(c.net_ms()),
        ]);
    }
    table.print()?;
    let refused: Vec<String> = t
        .cells
        .iter()
        .filter(|c| c.branches > 1 && c.net_ms() <= 0.0)
        .map(|c| format!("{} x {}", c.branches, c.prefix_tokens))
        .collect();
    match refused.is_empty() {
        true => say!("the start-up table never says no: prompts that become one save time at every measured size"),
        false => say!("the start-up table says no to {}", refused.join(", ")),
    }
    Ok(())
}

/// What merges by threshold, and what comes of it.
fn draw(args: &Args, pairs: &[PairReport], rows: &[SharingRow]) -> String {
    let depth = args.depths.get(1).or(args.depths.first()).copied().unwrap_or(1);
    let mut panels = Vec::new();
    if let Some(r) = pairs.iter().find(|r| r.depth == depth) {
        let kinds = r.taus.first().map_or(0, |t| t.kinds.len());
        let curve = |i: usize| Curve {
            name: r.taus[0].kinds[i].kind.clone(),
            points: r.taus.iter().map(|t| [f64::from(t.tau), t.kinds[i].rate * 100.0]).collect(),
            is_dashed: false,
        };
        panels.push(Panel {
            title: format!("Pairs that merge after {depth} layers"),
            x: "threshold tau".into(),
            y: "% of the pairs of each kind".into(),
            range: [0.0, 100.0],
            curves: (0..kinds).map(curve).collect(),
        });
    }
    let of_depth = |value: fn(&SharingRow) -> Option<f64>| {
        args.depths.iter().map(move |&k| Curve {
            name: format!("compared after {k} layer{}", if k == 1 { "" } else { "s" }),
            points: rows
                .iter()
                .filter(|r| r.probe_layers == Some(k) && r.recompute.is_none())
                .filter_map(|r| Some([f64::from(r.tau?), value(r)?]))
                .collect(),
            is_dashed: false,
        })
    };
    if let Some(base) = rows.first() {
        let ends = args
            .taus
            .iter()
            .fold([f64::INFINITY, f64::NEG_INFINITY], |[lo, hi], &t| [lo.min(t.into()), hi.max(t.into())]);
        let flat = |y: f64| Curve {
            name: "token-exact sharing".into(),
            points: ends.map(|x| [x, y]).to_vec(),
            is_dashed: true,
        };
        let right = |r: &SharingRow| r.mechanism.selections[0].accuracy.map(|a| a * 100.0);
        panels.push(Panel {
            title: "Other wordings that become one".into(),
            x: "threshold tau".into(),
            y: "% of the wordings beyond the first".into(),
            range: [0.0, 100.0],
            curves: of_depth(|r| Some(r.reuse_rate * 100.0)).collect(),
        });
        panels.push(Panel {
            title: "Problems solved".into(),
            x: "threshold tau".into(),
            y: "% right".into(),
            range: [0.0, 100.0],
            curves: of_depth(right).chain([flat(right(base).unwrap_or(f64::NAN))]).collect(),
        });
    }
    render_curves(&panels)
}

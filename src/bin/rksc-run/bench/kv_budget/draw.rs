//! The rows of `accuracy` as a picture.

use rksc::report::html::{BudgetClaim, BudgetLine, BudgetPlot, BudgetPoint, render_budgets};

use super::score::Row;

/// Accuracy against the budget: a line for each method, a band for the full cache, the paper's claims as points.
pub(super) fn accuracy(rows: &[Row], note: String, claims: &[(f64, f64)]) -> String {
    let percent = |r: &Row| r.paired.share() * 100.0;
    let full = &rows[0];
    let mut lines: Vec<BudgetLine> = Vec::new();
    for r in rows {
        let Some(budget) = r.percent else { continue };
        let [lo, hi] = r.paired.interval.map(|x| x * 100.0);
        let point = BudgetPoint { budget, value: percent(r), lo, hi };
        let name = r.seed.map_or_else(|| in_words(&r.method), |s| format!("{}, draw {}", in_words(&r.method), s + 1));
        match lines.iter_mut().find(|l| l.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(BudgetLine { name, points: vec![point] }),
        }
    }
    let claims = claims.iter().map(|&(budget, ratio)| BudgetClaim {
        budget,
        value: ratio * percent(full),
        words: format!("{:.0} % of full at {budget} %", ratio * 100.0),
    });
    render_budgets(&BudgetPlot {
        title: "Right answers under a KV budget".into(),
        note,
        x: "KV budget, % of the mean chain (log scale); the prompt is kept besides".into(),
        y: "% of the problems right".into(),
        full: percent(full),
        full_interval: full.paired.interval.map(|x| x * 100.0),
        lines,
        claims: claims.collect(),
        claims_words: "arXiv 2505.24133, of other models and other problems:".into(),
    })
}

fn in_words(method: &str) -> String {
    match method {
        "rkv" => "R-KV".into(),
        "rkv-text" => "R-KV, as in the text".into(),
        "rkv-alg1" => "R-KV, Algorithm 1".into(),
        "rkv-layer" => "R-KV, one set a layer".into(),
        "rkv-token" => "R-KV, one set for all".into(),
        "snapkv" => "SnapKV (lambda 1)".into(),
        "streaming" => "StreamingLLM".into(),
        "h2o" => "H2O".into(),
        "random" => "random".into(),
        "random-token" => "random, one set for all".into(),
        other => other.into(),
    }
}

//! The head of the page in numbers: the summary, the whole configuration, every problem in a line.

use serde_json::Value;

use super::ReportData;
use super::markup::{El, amount, clipped, count, grouped, percent, short, table};
use crate::report::kv::limit_in_words;
use crate::report::river::exactness;
use crate::report::{ProblemResult, SolveReport};

/// Name and value, one row each.
pub(super) fn summary(report: &SolveReport, problems: &[ProblemResult]) -> El {
    let mut rows: Vec<[String; 2]> = vec![["Policy".into(), report.policy.into()]];
    rows.push(["Problems solved".into(), grouped(report.problems as f64)]);
    if let (Some(accuracy), Some([lo, hi])) = (report.accuracy, report.accuracy_interval) {
        let right =
            format!("{} ({}; 95 % interval {} to {})", report.correct, percent(accuracy), percent(lo), percent(hi));
        rows.push(["Right".into(), right]);
    }
    let l = report.latency_ms;
    if report.problems > 0 {
        let ms =
            format!("{} ms mean; median {}, p10 {}, p90 {}", short(l.mean), short(l.p50), short(l.p10), short(l.p90));
        rows.push(["Latency a problem".into(), ms]);
    }
    let t = report.tokens;
    let [prefill, decode, verify, total] = [t.prefill, t.decode, t.verify, t.total()].map(|n| grouped(n as f64));
    let mut tokens = format!("{total}: prefill {prefill}, decode {decode}, verify {verify}");
    if t.probed > 0 {
        tokens += &format!(", probed {} (through the first layers only)", grouped(t.probed as f64));
    }
    rows.push(["Tokens computed".into(), tokens]);
    let skipped = count(report.verify.skipped, "problem", "problems");
    rows.push([
        "Verification".into(),
        format!("{} run, skipped for {skipped}", count(report.verify.run, "branch", "branches")),
    ]);
    if let Some(exits) = exits(problems) {
        rows.push(["Stopped between layers".into(), exits]);
    }
    let blocks = format!(
        "{} at the peak; at most {} shared",
        grouped(report.blocks.peak as f64),
        grouped(report.blocks.shared as f64)
    );
    rows.push(["KV blocks".into(), blocks]);
    if let (Some(limit), Some(kv)) = (&report.config.kv, &report.kv) {
        rows.push(["KV budget".into(), format!("{}: {kv}", limit_in_words(limit))]);
    }
    if let (Some(policy), Some(river)) = (&report.config.river, &report.river) {
        rows.push(["River".into(), format!("{}; {river}", exactness(policy))]);
    }
    pairs("summary", rows)
}

fn exits(problems: &[ProblemResult]) -> Option<String> {
    let layers: Vec<f64> =
        problems.iter().flat_map(|r| &r.branches).filter_map(|b| b.exit_layer).map(f64::from).collect();
    let mean = layers.iter().sum::<f64>() / layers.len() as f64;
    (!layers.is_empty())
        .then(|| format!("{}, mean exit layer {}", count(layers.len(), "branch", "branches"), amount(mean)))
}

/// A table of two columns.
pub(super) fn pairs(class: &str, rows: Vec<[String; 2]>) -> El {
    let row = |[name, value]: [String; 2]| {
        El::new("tr").child(El::new("th").attr("scope", "row").text(&name)).child(El::new("td").text(&value))
    };
    El::new("table").class(class).child(El::new("tbody").children(rows.into_iter().map(row)))
}

/// Every field of the configuration by its own name.
pub(super) fn configuration(report: &SolveReport) -> El {
    let mut rows = Vec::new();
    if let Ok(value) = serde_json::to_value(&report.config) {
        flatten(String::new(), &value, &mut rows);
    }
    fold("Every field of the configuration", pairs("fields", rows))
}

fn flatten(name: String, value: &Value, rows: &mut Vec<[String; 2]>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(name, value, rows);
            }
        }
        Value::String(text) => rows.push([name, text.clone()]),
        other => rows.push([name, other.to_string()]),
    }
}

/// Folded away until asked for.
fn fold(summary: &str, body: El) -> El {
    El::new("details").child(El::new("summary").text(summary)).child(body)
}

/// One line a problem, folded away.
pub(super) fn problems(data: &ReportData<'_>) -> Option<El> {
    const MAX_ANSWER: usize = 40;
    if data.problems.is_empty() {
        return None;
    }
    let head = ["problem", "answer", "expected", "right", "ms", "prefill", "decode", "verify", "blocks at peak"];
    let row = |r: &ProblemResult| {
        let answer = |a: &Option<String>| a.as_deref().map_or("-".into(), |a| clipped(a, MAX_ANSWER));
        let t = r.tokens;
        let [prefill, decode, verify] = [t.prefill, t.decode, t.verify].map(|n| grouped(n as f64));
        vec![
            clipped(&r.id, MAX_ANSWER),
            answer(&r.answer),
            answer(&r.expected),
            r.correct.map_or("-", |c| if c { "yes" } else { "no" }).into(),
            short(r.latency_ms),
            prefill,
            decode,
            if r.verify.skipped { "skipped".into() } else { verify },
            grouped(r.blocks_peak as f64),
        ]
    };
    let words = format!("All {}", count(data.problems.len(), "problem", "problems"));
    Some(fold(&words, table(&head, data.problems.iter().map(row).collect())))
}

//! Where a problem's time went: prefill, decode, verify, and what is left.

use super::bars::{BINS, Point, PointAxis, Population, points, stacked};
use super::markup::{count, grouped, short};
use super::plot::{Figure, Series};
use super::{ReportData, Section};
use crate::report::{LatencyMs, ProblemResult};

const PHASES: [Series; 4] = [
    Series { key: "prefill", words: "prefill", colour: "c1" },
    Series { key: "decode", words: "decode", colour: "c2" },
    Series { key: "verify", words: "verify", colour: "c3" },
    Series { key: "rest", words: "outside its passes", colour: "c5" },
];

/// Milliseconds by phase; the rest is what the clock counts and no pass does.
fn parts(r: &ProblemResult) -> Vec<f64> {
    let p = r.phase_ms;
    vec![p.prefill, p.decode, p.verify, (r.latency_ms - p.prefill - p.decode - p.verify).max(0.0)]
}

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let problems = data.problems;
    let mut section = Section::new("latency", "Latency by phase");
    if problems.is_empty() {
        return section.absent("No problem was solved.");
    }
    let names: Vec<String> = problems.iter().map(|r| r.id.clone()).collect();
    let values: Vec<Vec<f64>> = problems.iter().map(parts).collect();
    let by: Vec<f64> = problems.iter().map(|r| r.latency_ms).collect();
    let population = Population { names: &names, values: &values, by: &by, written: short };
    let (kind, title, note) = if population.is_few() {
        ("latency", "Each problem", "Milliseconds from the first token id to the answer.".to_string())
    } else {
        let each = problems.len() as f64 / BINS as f64;
        let note = format!(
            "Milliseconds. {} in order of latency, fastest first; a bar is the mean of {} of them.",
            count(problems.len(), "problem", "problems"),
            if each.fract() == 0.0 { grouped(each) } else { format!("{} or {}", each.floor(), each.ceil()) }
        );
        ("latency-bins", "All problems", note)
    };
    let mut figure = Figure::new(kind, title, note);
    stacked(&mut figure, &PHASES, &population.rows());
    section.figures.push(figure);
    section.figures.push(spread(problems));
    section
}

/// Median and the middle four fifths of each phase.
fn spread(problems: &[ProblemResult]) -> Figure {
    let row = |name: &str, colour: &'static str, of: &dyn Fn(&ProblemResult) -> f64| {
        let l = LatencyMs::of(&problems.iter().map(of).collect::<Vec<f64>>());
        Point {
            name: name.into(),
            value: l.p50,
            interval: Some([l.p10, l.p90]),
            against: None,
            end: short(l.p50),
            colour,
        }
    };
    let mut rows = vec![row("whole", "ink", &|r| r.latency_ms)];
    for (i, phase) in PHASES.iter().enumerate() {
        rows.push(row(phase.words, phase.colour, &|r| parts(r)[i]));
    }
    let note = "Milliseconds a problem: median (dot, number) and 10th to 90th percentile (line).";
    let mut figure = Figure::new("latency-phases", "Spread by phase", note);
    points(&mut figure, PointAxis { zero: true, reference: None, max: None }, &rows);
    figure
}

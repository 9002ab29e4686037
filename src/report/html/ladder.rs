//! The policies against each other: time, ratio, tokens, accuracy.

use super::bars::{Point, PointAxis, Row, points, stacked};
use super::markup::{count, exact, grouped, percent, short, table};
use super::plot::{Figure, Series};
use super::{ReportData, Section};
use crate::report::ladder::{ArmReport, Interval, LadderReport};

const TOKENS: [Series; 4] = [
    Series { key: "prefill", words: "prefill", colour: "c1" },
    Series { key: "decode", words: "decode", colour: "c2" },
    Series { key: "verify", words: "verify", colour: "c3" },
    Series { key: "probed", words: "first layers only", colour: "c5" },
];

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let mut section = Section::new("ladder", "Policies against each other");
    let Some(ladder) = data.ladder else {
        return section.absent("There is no ladder: only a run of several policies to its end has one.");
    };
    section.lead = lead(ladder);
    section.figures.push(latency(ladder));
    if !ladder.ratios.is_empty() {
        section.figures.push(ratios(ladder));
    }
    section.figures.push(tokens(ladder));
    if ladder.policies.iter().any(|p| p.accuracy.is_some()) {
        section.figures.push(accuracy(ladder));
    }
    section.tables.push(arms(ladder));
    section
}

fn lead(ladder: &LadderReport) -> String {
    let mut words = format!(
        "Every policy solved the same {} {}, in turn, on one engine.",
        count(ladder.problems, "problem", "problems"),
        if ladder.rounds == 1 { "once".into() } else { format!("{} times", ladder.rounds) }
    );
    if let Some(Interval { value, lo, hi }) = ladder.accuracy_difference {
        let [value, lo, hi] = [value, lo, hi].map(|x| format!("{:+.1}", x * 100.0));
        words += &format!(" Accuracy of rksc minus that of no-sharing: {value} points ({lo} to {hi}).");
    }
    if let Some(gain) = ladder.sharing {
        words += &format!(
            " Prefill of a problem: {} ms unshared, {} ms shared; sharing {}.",
            short(gain.full_ms),
            short(gain.shared_ms),
            if gain.pays() { "pays" } else { "does not pay" }
        );
    }
    words
}

fn latency(ladder: &LadderReport) -> Figure {
    let note = "Milliseconds a problem: mean (dot, number) and 10th to 90th percentile (line).";
    let mut figure = Figure::new("ladder-latency", "Latency", note);
    let row = |p: &ArmReport| Point {
        name: p.policy.into(),
        value: p.latency_ms.mean,
        interval: Some([p.latency_ms.p10, p.latency_ms.p90]),
        against: None,
        end: short(p.latency_ms.mean),
        colour: "c1",
    };
    let rows: Vec<Point> = ladder.policies.iter().map(row).collect();
    points(&mut figure, PointAxis { zero: true, reference: None, max: None }, &rows);
    figure
}

fn ratios(ladder: &LadderReport) -> Figure {
    let note = "Mean latency of a policy over that of rksc, with its 95 % interval; the stroke is what the counted \
                passes allow. Right of 1, rksc is faster.";
    let mut figure = Figure::new("ladder-ratio", "Times as long as rksc", note);
    let rows: Vec<Point> = ladder
        .ratios
        .iter()
        .map(|(name, r)| Point {
            name: name.split('/').next().unwrap_or(name).into(),
            value: r.measured.value,
            interval: Some([r.measured.lo, r.measured.hi]),
            against: Some(r.ceiling),
            end: format!("{:.2}x", r.measured.value),
            colour: "c1",
        })
        .collect();
    points(&mut figure, PointAxis { zero: true, reference: Some(1.0), max: None }, &rows);
    figure
}

fn tokens(ladder: &LadderReport) -> Figure {
    let mut figure = Figure::new("ladder-tokens", "Tokens computed", "Per problem, by phase.");
    let problems = ladder.problems.max(1) as f64;
    let kinds = if ladder.policies.iter().any(|p| p.tokens.probed > 0) { 4 } else { 3 };
    let row = |p: &ArmReport| {
        let t = p.tokens;
        let end = grouped(t.total() as f64 / problems);
        Row {
            name: p.policy.into(),
            title: format!("{}: {end} tokens a problem", p.policy),
            values: [t.prefill, t.decode, t.verify, t.probed][..kinds].iter().map(|&n| n as f64 / problems).collect(),
            data: vec![("total", exact(t.total() as f64 / problems))],
            end,
        }
    };
    let rows: Vec<Row> = ladder.policies.iter().map(row).collect();
    stacked(&mut figure, &TOKENS[..kinds], &rows);
    figure
}

fn accuracy(ladder: &LadderReport) -> Figure {
    let note = "Right answers in per cent, with the 95 % Wilson interval.";
    let mut figure = Figure::new("ladder-accuracy", "Accuracy", note);
    let row = |p: &ArmReport| {
        let value = p.accuracy? * 100.0;
        let interval = p.accuracy_interval.map(|i| i.map(|x| x * 100.0));
        Some(Point { name: p.policy.into(), value, interval, against: None, end: format!("{value:.1}"), colour: "c1" })
    };
    let rows: Vec<Point> = ladder.policies.iter().filter_map(row).collect();
    let x = points(&mut figure, PointAxis { zero: false, reference: None, max: Some(100.0) }, &rows);
    if x.domain[0] > 0.0 {
        figure.note += " The axis does not begin at zero.";
    }
    figure
}

fn arms(ladder: &LadderReport) -> super::markup::El {
    let problems = ladder.problems.max(1) as f64;
    let head = [
        "policy",
        "ms a problem",
        "in passes",
        "passes",
        "tokens a problem",
        "verification skipped",
        "blocks at peak",
        "shared",
        "private",
        "same as no-sharing",
        "right (95 %)",
    ];
    let row = |p: &ArmReport| {
        let right = p.accuracy.zip(p.accuracy_interval);
        vec![
            p.policy.into(),
            short(p.latency_ms.mean),
            short(p.pass_ms),
            short(p.passes),
            grouped(p.tokens.total() as f64 / problems),
            percent(p.skip_rate),
            grouped(p.blocks.peak as f64),
            grouped(p.blocks.shared as f64),
            grouped(p.blocks.private as f64),
            p.agreement.map_or("-".into(), percent),
            right
                .map_or("-".into(), |(a, [lo, hi])| format!("{} ({:.1} to {:.1})", percent(a), lo * 100.0, hi * 100.0)),
        ]
    };
    table(&head, ladder.policies.iter().map(row).collect())
}

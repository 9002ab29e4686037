//! What the layers of the verification pass said, and after which layer it stopped.

use std::collections::BTreeMap;

use super::chosen::{Chosen, chosen};
use super::markup::{El, coordinate, count, grouped, short};
use super::plot::{Anchor, Figure, Scale, WIDTH, axis_x, axis_y, label, line};
use super::words::entropy_over;
use super::{ReportData, Section};
use crate::report::{BranchResult, LatencyMs, LayerEntropy, ProblemResult};

const LEFT: f64 = 34.0;
const RIGHT: f64 = WIDTH - 18.0;
const PANEL: f64 = 120.0;
const COUNTS: f64 = 56.0;

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let mut section = Section::new("entropy", "Entropy by layer, and exits");
    let branches = || data.problems.iter().flat_map(|r| &r.branches);
    let probed = branches().any(|b| !b.layers.is_empty());
    let exits: Vec<u32> = branches().filter_map(|b| b.exit_layer).collect();
    if !probed && exits.is_empty() {
        return section.absent(why_absent(data));
    }
    section.lead = lead(data, &exits);
    section.figures.push(all_branches(data.problems));
    for problem in chosen(data.problems, |r| r.branches.iter().any(|b| !b.layers.is_empty())) {
        section.figures.push(one_problem(problem));
    }
    section
}

fn lead(data: &ReportData<'_>, exits: &[u32]) -> String {
    let stopped = if exits.is_empty() {
        "No verification stopped before the last layer.".into()
    } else {
        let mean = exits.iter().map(|&l| f64::from(l)).sum::<f64>() / exits.len() as f64;
        format!(
            "The verification of {} stopped before the last layer, after layer {} on average.",
            count(exits.len(), "branch", "branches"),
            short(mean)
        )
    };
    let over = data.report.map_or(String::new(), |r| format!(" over {}", entropy_over(&r.config)));
    let dots = if exits.is_empty() { "" } else { " and a dot where it stopped" };
    format!("{stopped} Entropies{over} in nats; of single problems, a line a branch{dots}.")
}

fn why_absent(data: &ReportData<'_>) -> &'static str {
    let verified = data.problems.iter().any(|r| r.verify.run > 0);
    if data.problems.is_empty() {
        "No problem was solved."
    } else if verified {
        "No layer was probed: verification ran through all layers without looking at them."
    } else {
        "No layer was probed: no branch was verified."
    }
}

/// Layers 1 to the deepest that was probed or stopped at.
fn layer_scale<'a>(branches: impl Iterator<Item = &'a BranchResult>) -> Scale {
    let of = |b: &BranchResult| b.layers.iter().map(|l| l.layer).chain(b.exit_layer).max();
    let deepest = branches.filter_map(of).max().unwrap_or(1).max(2);
    Scale::new([1.0, f64::from(deepest)], [LEFT + 10.0, RIGHT - 10.0])
}

/// Whole layers, few enough to be read.
fn layer_ticks(x: &Scale) -> Vec<f64> {
    let last = x.domain[1] as usize;
    let every = last.div_ceil(12).max(1);
    (1..=last).filter(|l| *l == 1 || l.is_multiple_of(every)).map(|l| l as f64).collect()
}

/// Above: median and percentiles of all branches by layer. Below: how many stopped after each.
fn all_branches(problems: &[ProblemResult]) -> Figure {
    let branches = || problems.iter().flat_map(|r| &r.branches);
    let mut by_layer: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
    let mut exits: BTreeMap<u32, usize> = BTreeMap::new();
    for b in branches() {
        for l in b.layers.iter().filter(|l| l.entropy.is_finite()) {
            by_layer.entry(l.layer).or_default().push(l.entropy);
        }
        if let Some(layer) = b.exit_layer {
            *exits.entry(layer).or_default() += 1;
        }
    }
    let below = if exits.is_empty() { "" } else { "; below, branches that stopped after the layer" };
    let note = format!("Median (dot), 10th to 90th percentile (line){below}.");
    let mut figure = Figure::new("entropy-layers", "All branches", note);
    let x = layer_scale(branches());
    let stats: Vec<(u32, LatencyMs, usize)> =
        by_layer.iter().map(|(&layer, values)| (layer, LatencyMs::of(values), values.len())).collect();
    let y = Scale::from_zero(stats.iter().map(|s| s.1.p90), [PANEL, 8.0]);
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe()).attr("data-y", y.describe());
    plot = plot.children(axis_y(&y, &y.ticks(4), LEFT, RIGHT));
    let median: Vec<String> = stats.iter().map(|(l, s, _)| place(&x, &y, *l, s.p50)).collect();
    plot = plot.child(El::new("polyline").class("thin").attr("points", median.join(" ")));
    for (layer, s, n) in &stats {
        let at = x.at(f64::from(*layer));
        let g = El::new("g").class("layer").attr("data-layer", layer).attr("data-branches", n);
        let g = g.data("p10", s.p10).data("p50", s.p50).data("p90", s.p90);
        let words = format!("after layer {layer}: median {}, {} to {}", short(s.p50), short(s.p10), short(s.p90));
        let g = g.title(&words).child(line("interval c1", [at, y.at(s.p10)], [at, y.at(s.p90)]));
        plot = plot.child(g.child(El::new("circle").class("c1 dot").at("cx", at).at("cy", y.at(s.p50)).attr("r", 4)));
    }
    if exits.is_empty() {
        plot = plot.children(axis_x(&x, &layer_ticks(&x), 8.0, PANEL + 5.0));
        plot = plot.child(label(0.0, PANEL + 17.0, Anchor::Start, "layer").class("tick"));
        figure.height = PANEL + 22.0;
    } else {
        exit_counts(&mut figure, &x, &exits);
    }
    figure.add(plot);
    figure
}

fn exit_counts(figure: &mut Figure, x: &Scale, exits: &BTreeMap<u32, usize>) {
    let (top, bottom) = (PANEL + 24.0, PANEL + 24.0 + COUNTS);
    let y = Scale::from_zero(exits.values().map(|&n| n as f64), [bottom, top]);
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe()).attr("data-y", y.describe());
    plot = plot.children(axis_x(x, &layer_ticks(x), 8.0, bottom));
    let slot = x.at(2.0) - x.at(1.0);
    let width = (slot * 0.6).min(16.0);
    for (&layer, &n) in exits {
        let at = x.at(f64::from(layer));
        let bar = El::new("rect").class("c2").attr("data-exit-layer", layer).attr("data-exits", n);
        let bar = bar.at("x", at - width / 2.0).at("width", width);
        plot = plot.child(bar.at("y", y.at(n as f64)).at("height", bottom - y.at(n as f64)));
        plot = plot.child(label(at, y.at(n as f64) - 3.0, Anchor::Middle, &grouped(n as f64)));
    }
    plot = plot.child(line("axis", [LEFT, bottom], [RIGHT, bottom]));
    plot = plot.child(label(LEFT - 4.0, bottom, Anchor::End, "exits").class("tick"));
    plot = plot.child(label((LEFT + RIGHT) / 2.0, bottom + 26.0, Anchor::Middle, "layer").class("tick"));
    figure.add(plot);
    figure.height = bottom + 32.0;
}

fn place(x: &Scale, y: &Scale, layer: u32, entropy: f64) -> String {
    format!("{},{}", coordinate(x.at(f64::from(layer))), coordinate(y.at(entropy)))
}

/// A line a branch; a dot where its verification stopped, and below how many stopped after each layer.
fn one_problem(chosen: Chosen<'_>) -> Figure {
    let branches = &chosen.problem.branches;
    let mut exits: BTreeMap<u32, usize> = BTreeMap::new();
    for layer in branches.iter().filter_map(|b| b.exit_layer) {
        *exits.entry(layer).or_default() += 1;
    }
    let note =
        format!("{} of {} stopped early.", exits.values().sum::<usize>(), count(branches.len(), "branch", "branches"));
    let mut figure = Figure::new("entropy", chosen.title(), note).of_problem(&chosen.problem.id);
    let x = layer_scale(branches.iter());
    let y = Scale::from_zero(branches.iter().flat_map(|b| b.layers.iter().map(|l| l.entropy)), [PANEL, 8.0]);
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe()).attr("data-y", y.describe());
    plot = plot.children(axis_y(&y, &y.ticks(4), LEFT, RIGHT));
    plot = plot.children(axis_x(&x, &layer_ticks(&x), 8.0, PANEL + 5.0));
    plot = plot.children(branches.iter().map(|b| branch_line(b, &x, &y)));
    // Above every line.
    plot = plot.children(branches.iter().filter_map(|b| exit_dot(b, &x, &y)));
    figure.add(plot);
    figure.add(label(0.0, PANEL + 17.0, Anchor::Start, "layer").class("tick"));
    figure.height = PANEL + 22.0;
    if !exits.is_empty() {
        figure.add(label(0.0, PANEL + 31.0, Anchor::Start, "exits"));
        for (&layer, &n) in &exits {
            let at = label(x.at(f64::from(layer)), PANEL + 31.0, Anchor::Middle, &grouped(n as f64));
            figure.add(at.attr("data-exits", n).attr("data-after", layer));
        }
        figure.height += 15.0;
    }
    figure
}

fn finite(b: &BranchResult) -> impl Iterator<Item = &LayerEntropy> {
    b.layers.iter().filter(|l| l.entropy.is_finite())
}

fn branch_line(b: &BranchResult, x: &Scale, y: &Scale) -> El {
    let mut g = El::new("g").class("branch").attr("data-branch", b.branch);
    let points: Vec<String> = finite(b).map(|l| place(x, y, l.layer, l.entropy)).collect();
    if points.len() > 1 {
        g = g.child(El::new("polyline").class("thin").attr("points", points.join(" ")));
    }
    for l in &b.layers {
        let dot = El::new("circle").class("probe").attr("data-layer", l.layer);
        let dot = dot.data("entropy", l.entropy).data("top1", l.top1);
        let words =
            format!("branch {}, layer {}: {} nats, top-1 {}", b.branch, l.layer, short(l.entropy), short(l.top1));
        let (cy, r) = if l.entropy.is_finite() { (y.at(l.entropy), 1.8) } else { (PANEL, 0.0) };
        g = g.child(dot.at("cx", x.at(f64::from(l.layer))).at("cy", cy).attr("r", r).title(&words));
    }
    g
}

/// Where the layer itself was not probed, the dot stands on the axis: there is no entropy to show.
fn exit_dot(b: &BranchResult, x: &Scale, y: &Scale) -> Option<El> {
    let exit = b.exit_layer?;
    let entropy = finite(b).find(|l| l.layer == exit).map_or(0.0, |l| l.entropy);
    let dot = El::new("circle").class("c2 dot").attr("data-exit-branch", b.branch).attr("data-exit-layer", exit);
    let dot = dot.at("cx", x.at(f64::from(exit))).at("cy", y.at(entropy)).attr("r", 4.5);
    Some(dot.title(&format!("branch {}: stopped after layer {exit}", b.branch)))
}

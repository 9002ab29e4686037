//! KV blocks over a problem's steps: who held them, and what was given back.

use super::bars::{BINS, Population, stacked};
use super::chosen::{Chosen, chosen};
use super::markup::{El, amount, coordinate, count, grouped};
use super::plot::{Anchor, Figure, Scale, Series, WIDTH, axis_x, axis_y, key, label, line};
use super::{ReportData, Section};
use crate::report::{MemorySample, ProblemResult};

const HELD: [Series; 3] = [
    Series { key: "shared", words: "shared", colour: "c1" },
    Series { key: "private", words: "of one branch", colour: "c2" },
    Series { key: "cached", words: "in the cache only", colour: "c5" },
];
const LEFT: f64 = 42.0;
const RIGHT: f64 = WIDTH - 8.0;
const PANEL: f64 = 110.0;
const FREED: f64 = 44.0;
/// Samples drawn of one problem; of more, the fullest of each run of them.
const MAX_SAMPLES: usize = 320;

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let mut section = Section::new("memory", "KV memory over time");
    let sampled: Vec<&ProblemResult> = data.problems.iter().filter(|r| !r.memory.is_empty()).collect();
    if sampled.is_empty() {
        return section.absent("KV blocks were not recorded over time.");
    }
    let freed: u64 = sampled.iter().filter_map(|r| r.memory.last()).map(|m| m.freed).sum();
    section.lead = format!(
        "Blocks by engine step; {} recorded, {} blocks given back while they were open.",
        count(sampled.len(), "problem", "problems"),
        grouped(freed as f64)
    );
    if sampled.len() > 1 {
        section.figures.push(peaks(&sampled));
    }
    for chosen in chosen(data.problems, |r| !r.memory.is_empty()) {
        section.figures.push(one_problem(chosen));
    }
    section
}

fn values(m: &MemorySample) -> [f64; 3] {
    [m.shared as f64, m.private as f64, m.cached as f64]
}

fn held(m: &MemorySample) -> usize {
    m.shared + m.private + m.cached
}

/// The first moment at which most blocks were held.
fn fullest(memory: &[MemorySample]) -> Option<&MemorySample> {
    memory.iter().rev().max_by_key(|m| held(m))
}

fn peaks(sampled: &[&ProblemResult]) -> Figure {
    let at_peak: Vec<[f64; 3]> = sampled.iter().filter_map(|r| fullest(&r.memory)).map(values).collect();
    let names: Vec<String> = sampled.iter().map(|r| r.id.clone()).collect();
    let rows: Vec<Vec<f64>> = at_peak.iter().map(|v| v.to_vec()).collect();
    let by: Vec<f64> = at_peak.iter().map(|v| v.iter().sum()).collect();
    let population = Population { names: &names, values: &rows, by: &by, written: amount };
    let (kind, note) = if population.is_few() {
        ("memory-peaks", "Blocks at each problem's fullest moment.".to_string())
    } else {
        let note = format!(
            "Blocks at the fullest moment; problems in ascending order, a bar is the mean of one {BINS}th of {}.",
            grouped(sampled.len() as f64)
        );
        ("memory-peak-bins", note)
    };
    let mut figure = Figure::new(kind, "At the peak", note);
    stacked(&mut figure, &HELD, &population.rows());
    figure
}

/// At most [`MAX_SAMPLES`] of them, always with the fullest of each run and the last.
fn thinned(memory: &[MemorySample]) -> Vec<MemorySample> {
    let run = memory.len().div_ceil(MAX_SAMPLES).max(1);
    let mut out: Vec<MemorySample> = memory.chunks(run).filter_map(fullest).copied().collect();
    match memory.last() {
        Some(last) if out.last() != Some(last) => out.push(*last),
        _ => {}
    }
    out
}

fn one_problem(chosen: Chosen<'_>) -> Figure {
    let problem = chosen.problem;
    let samples = thinned(&problem.memory);
    let note = match problem.memory.len() {
        n if n > samples.len() => {
            format!("{} of {n} steps, the fullest of each run of them.", samples.len())
        }
        n => format!("{}.", count(n, "step", "steps")),
    };
    let mut figure = Figure::new("memory", chosen.title(), note).of_problem(&problem.id);
    let (marks, top) = key(&HELD, 0.0);
    figure.extend(marks);
    let (first, last) = (samples.first().map_or(0, |m| m.step), samples.last().map_or(0, |m| m.step));
    // The last sample holds for a step too.
    let x = Scale::new([first as f64, last as f64 + 1.0], [LEFT, RIGHT]);
    let y = Scale::from_zero(samples.iter().map(|m| held(m) as f64), [top + PANEL, top + 6.0]);
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe()).attr("data-y", y.describe());
    plot = plot.children(axis_y(&y, &y.ticks(4), LEFT, RIGHT));
    let steps = joined(samples.iter().map(|m| m.step as u64));
    plot = plot.children((0..HELD.len()).map(|s| area(&samples, s, &steps, &x, &y)));
    if let Some(peak) = fullest(&samples) {
        plot = plot.child(peak_label(peak, &x, &y));
    }
    figure.add(plot.child(line("axis", [LEFT, y.range[0]], [RIGHT, y.range[0]])));
    freed(&mut figure, &samples, &steps, &x, top + PANEL + 22.0);
    figure
}

/// The number at the top of the mountain.
fn peak_label(peak: &MemorySample, x: &Scale, y: &Scale) -> El {
    let at = x.at(peak.step as f64).clamp(LEFT + 12.0, RIGHT - 12.0);
    label(at, y.at(held(peak) as f64) - 3.0, Anchor::Middle, &grouped(held(peak) as f64))
}

fn joined(numbers: impl Iterator<Item = u64>) -> String {
    numbers.map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
}

/// The area of series `s` on top of those before it: its upper edge from left to right, then its lower edge back. A
/// sample's number holds until the next.
fn area(samples: &[MemorySample], s: usize, steps: &str, x: &Scale, y: &Scale) -> El {
    let edge = |upto: usize| -> Vec<[f64; 2]> {
        let mut out = Vec::new();
        for (i, m) in samples.iter().enumerate() {
            let height = y.at(values(m)[..upto].iter().sum());
            let until = samples.get(i + 1).map_or(x.domain[1], |next| next.step as f64);
            out.extend([[x.at(m.step as f64), height], [x.at(until), height]]);
        }
        out
    };
    let below = edge(s).into_iter().rev();
    let points: Vec<String> =
        edge(s + 1).into_iter().chain(below).map(|[x, y]| format!("{},{}", coordinate(x), coordinate(y))).collect();
    let polygon = El::new("polygon").class(HELD[s].colour).attr("data-series", HELD[s].key).attr("data-steps", steps);
    polygon.attr("data-values", joined(samples.iter().map(|m| values(m)[s] as u64))).attr("points", points.join(" "))
}

/// Blocks given back since the problem began, on an axis of their own.
fn freed(figure: &mut Figure, samples: &[MemorySample], steps: &str, x: &Scale, top: f64) {
    let y = Scale::from_zero(samples.iter().map(|m| m.freed as f64), [top + FREED, top + 6.0]);
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe()).attr("data-y", y.describe());
    plot = plot.child(label(0.0, top - 4.0, Anchor::Start, "freed since the beginning"));
    plot = plot.children(axis_y(&y, &y.ticks(2), LEFT, RIGHT));
    let ticks: Vec<f64> = x.ticks(5).into_iter().filter(|t| t.fract() == 0.0).collect();
    plot = plot.children(axis_x(x, &ticks, top + FREED, top + FREED));
    let mut points = Vec::new();
    for (i, m) in samples.iter().enumerate() {
        let until = samples.get(i + 1).map_or(x.domain[1], |next| next.step as f64);
        let height = coordinate(y.at(m.freed as f64));
        points.extend([m.step as f64, until].map(|step| format!("{},{height}", coordinate(x.at(step)))));
    }
    let line = El::new("polyline").class("strong-line").attr("data-series", "freed").attr("data-steps", steps);
    let line = line.attr("data-values", joined(samples.iter().map(|m| m.freed)));
    plot = plot.child(line.attr("points", points.join(" ")));
    figure.add(plot);
    figure.add(label((LEFT + RIGHT) / 2.0, top + FREED + 25.0, Anchor::Middle, "step").class("tick"));
    figure.height = top + FREED + 30.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: usize, private: usize) -> MemorySample {
        MemorySample { step, shared: 1, private, cached: 0, freed: 0 }
    }

    #[test]
    fn thinning_keeps_the_peak_and_the_end() {
        let mut memory: Vec<MemorySample> = (0..1001).map(|i| sample(i, i % 7)).collect();
        memory[500].private = 900;
        let thin = thinned(&memory);
        assert!(thin.len() <= MAX_SAMPLES + 1 && thin.windows(2).all(|w| w[0].step < w[1].step));
        assert!(thin.contains(&memory[500]) && thin.last() == memory.last());
        assert_eq!(thinned(&memory[..320]), memory[..320]);
    }

    #[test]
    fn the_fullest_moment_is_the_first_of_equals() {
        let memory = [sample(0, 1), sample(1, 4), sample(2, 4)];
        assert_eq!(fullest(&memory).map(|m| m.step), Some(1));
    }
}

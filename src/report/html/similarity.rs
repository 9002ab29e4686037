//! How similar prompts (or branches) are, and which of them were taken for the same.

use super::bars::{Row, stacked};
use super::chosen::{Chosen, chosen};
use super::markup::{El, coordinate, count, exact_f32, grouped, short};
use super::plot::{Anchor, Figure, Series, WIDTH, fitted, label, text_width};
use super::{ReportData, Section};
use crate::report::SimilarityRecord;

/// Members whose cells still hold a number.
const MAX_NUMBERED: usize = 10;
const MAX_CELL: f64 = 28.0;
const PAIRS: [Series; 2] = [
    Series { key: "together", words: "taken together", colour: "c1" },
    Series { key: "apart", words: "kept apart", colour: "c5" },
];

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let mut section = Section::new("similarity", "Similarity and clusters");
    let records: Vec<&SimilarityRecord> = data.problems.iter().filter_map(|r| r.similarity.as_ref()).collect();
    if records.is_empty() {
        return section
            .absent("No prompts were compared: semantic sharing and merging were off, or had nothing to compare.");
    }
    let members: usize = records.iter().map(|s| s.members.len()).sum();
    let kept: usize = records.iter().map(|s| clusters(s).len()).sum();
    section.lead = format!(
        "In {}, {} made {}. Cells are cosines, the first column those with the root; a frame is a cluster, its \
         representative in bold.",
        count(records.len(), "problem", "problems"),
        count(members, "member", "members"),
        count(kept, "cluster", "clusters")
    );
    if records.len() > 1 {
        section.figures.push(pairs(&records));
    }
    for Chosen { problem, why } in chosen(data.problems, |r| r.similarity.is_some()) {
        if let Some(record) = &problem.similarity {
            section.figures.push(matrix(Chosen { problem, why }, record));
        }
    }
    section
}

/// Members by cluster: (representative, its members), in order of their first member.
fn clusters(s: &SimilarityRecord) -> Vec<(usize, Vec<usize>)> {
    let mut out: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in 0..s.members.len() {
        let representative = s.clusters.get(i).copied().unwrap_or(i);
        match out.iter_mut().find(|c| c.0 == representative) {
            Some(c) => c.1.push(i),
            None => out.push((representative, vec![i])),
        }
    }
    out
}

fn value(s: &SimilarityRecord, i: usize, j: usize) -> f32 {
    s.pairwise.get(i).and_then(|row| row.get(j)).copied().unwrap_or(f32::NAN)
}

/// All pairs of all problems by similarity, in twentieths.
fn pairs(records: &[&SimilarityRecord]) -> Figure {
    const STEPS: i32 = 20;
    let mut bins = std::collections::BTreeMap::<i32, [usize; 2]>::new();
    for s in records {
        for i in 0..s.members.len() {
            for j in i + 1..s.members.len() {
                let x = value(s, i, j);
                if x.is_finite() {
                    let bin = ((f64::from(x) * f64::from(STEPS)).floor() as i32).clamp(-STEPS, STEPS - 1);
                    bins.entry(bin).or_default()[usize::from(s.clusters.get(i) != s.clusters.get(j))] += 1;
                }
            }
        }
    }
    let row = |(bin, n): (i32, [usize; 2])| {
        let [from, to] = [bin, bin + 1].map(|b| f64::from(b) / f64::from(STEPS));
        Row {
            name: format!("{from:.2} to {to:.2}"),
            title: format!("{} together, {} apart", n[0], n[1]),
            values: n.map(|n| n as f64).to_vec(),
            end: grouped((n[0] + n[1]) as f64),
            data: vec![("from", from.to_string())],
        }
    };
    // Most alike first; bins without a pair between others are shown as empty.
    let (lo, hi) = (bins.keys().next().copied().unwrap_or(0), bins.keys().last().copied().unwrap_or(0));
    let rows: Vec<Row> = (lo..=hi).rev().map(|b| row((b, bins.get(&b).copied().unwrap_or_default()))).collect();
    let mut figure =
        Figure::new("similarity-pairs", "All pairs", format!("Pairs by similarity; {}.", thresholds(records)));
    stacked(&mut figure, &PAIRS, &rows);
    figure
}

fn thresholds(records: &[&SimilarityRecord]) -> String {
    let mut taus: Vec<f32> = records.iter().map(|s| s.tau).collect();
    taus.sort_by(f32::total_cmp);
    taus.dedup();
    match taus[..] {
        [tau] => format!("threshold {tau}"),
        [lo, .., hi] => format!("thresholds {lo} to {hi}"),
        [] => "no threshold".into(),
    }
}

fn matrix(chosen: Chosen<'_>, s: &SimilarityRecord) -> Figure {
    let clusters = clusters(s);
    let n = s.members.len();
    let note = format!(
        "Up to layer {}, threshold {}: {} of {n}.",
        s.depth,
        s.tau,
        count(clusters.len(), "cluster", "clusters"),
    );
    let mut figure = Figure::new("similarity", chosen.title(), note).of_problem(&chosen.problem.id);
    // A tenth more: representatives are bold.
    let names = s.members.iter().map(|m| 1.1 * text_width(m)).fold(0.0, f64::max).min(100.0) + 8.0;
    let cell = ((WIDTH - names) / (n as f64 + 1.3)).min(MAX_CELL);
    let grid = Grid { s, cell, names, lowest: lowest(s) };
    let order: Vec<usize> = clusters.iter().flat_map(|c| c.1.iter().copied()).collect();
    let mut plot = El::new("g").class("plot").attr("data-tau", exact_f32(s.tau)).attr("data-depth", s.depth);
    plot = plot.children(grid.head(&order));
    for (row, &i) in order.iter().enumerate() {
        plot = plot.children(grid.row(row, i, &order));
    }
    let mut begin = 0;
    for (representative, members) in &clusters {
        plot = plot.child(grid.frame(begin, *representative, members));
        begin += members.len();
    }
    figure.add(plot);
    figure.height = grid.y(n) + 4.0;
    if !grid.is_numbered() {
        scale_key(&mut figure, grid.lowest);
    }
    figure
}

/// The smallest similarity, rounded down to a tenth: the lightest colour.
fn lowest(s: &SimilarityRecord) -> f64 {
    let all = s.pairwise.iter().flatten().chain(&s.to_root).filter(|v| v.is_finite());
    let min = all.fold(1.0f32, |a, &b| a.min(b));
    ((f64::from(min) * 10.0).floor() / 10.0).min(0.9)
}

struct Grid<'a> {
    s: &'a SimilarityRecord,
    cell: f64,
    names: f64,
    lowest: f64,
}

impl Grid<'_> {
    fn x(&self, column: usize) -> f64 {
        self.names + self.cell * (1.3 + column as f64)
    }

    fn y(&self, row: usize) -> f64 {
        16.0 + self.cell * row as f64
    }

    fn is_numbered(&self) -> bool {
        self.s.members.len() <= MAX_NUMBERED
    }

    /// Above the columns: the members' numbers.
    fn head(&self, order: &[usize]) -> Vec<El> {
        let mut out = vec![label(self.names + self.cell, 11.0, Anchor::End, "root").class("tick")];
        // Numbers of two digits need three of the narrowest columns.
        let every = order.len().div_ceil(14);
        for (column, i) in order.iter().enumerate().filter(|(c, _)| c % every == 0) {
            let x = self.x(column) + self.cell / 2.0;
            let text = i.to_string();
            if x + text_width(&text) / 2.0 <= WIDTH {
                out.push(label(x, 11.0, Anchor::Middle, &text).class("tick"));
            }
        }
        out
    }

    fn row(&self, row: usize, i: usize, order: &[usize]) -> Vec<El> {
        let is_representative = self.s.clusters.get(i).is_none_or(|&c| c == i);
        let baseline = self.y(row) + self.cell / 2.0 + 4.0;
        let mut out = Vec::new();
        if self.cell >= 9.0 {
            let name = fitted(&self.s.members[i], (self.names - 7.0) / 1.1);
            let class = if is_representative { "strong" } else { "" };
            out.push(label(self.names - 5.0, baseline, Anchor::End, &name).class(class));
        }
        let root = self.s.to_root.get(i).copied().unwrap_or(f32::NAN);
        out.extend(self.cell(self.names, row, root, &format!("{} with the root", self.s.members[i]), |el| {
            el.attr("data-member", i).attr("data-root", exact_f32(root))
        }));
        for (column, &j) in order.iter().enumerate() {
            let x = value(self.s, i, j);
            let words = format!("{} with {}", self.s.members[i], self.s.members[j]);
            out.extend(self.cell(self.x(column), row, x, &words, |el| {
                el.attr("data-member", i).attr("data-with", j).attr("data-value", exact_f32(x))
            }));
        }
        out
    }

    fn cell(&self, x: f64, row: usize, value: f32, words: &str, data: impl Fn(El) -> El) -> Vec<El> {
        let v = f64::from(value);
        let strength = if v.is_finite() { ((v - self.lowest) / (1.0 - self.lowest)).clamp(0.0, 1.0) } else { 0.0 };
        let rect = data(El::new("rect").class("c1 cell")).at("x", x).at("y", self.y(row));
        let rect = rect.at("width", self.cell - 1.0).at("height", self.cell - 1.0);
        let rect = rect.attr("fill-opacity", coordinate(0.06 + 0.94 * strength));
        let mut out = vec![rect.title(&format!("{words}: {}", short(v)))];
        if self.is_numbered() {
            let text = if v.is_finite() { format!("{v:.2}").replacen("0.", ".", 1) } else { "-".into() };
            let y = self.y(row) + self.cell / 2.0 + 3.0;
            // Between the two, one colour scheme still takes its ink and the other its paper.
            let class = match 0.06 + 0.94 * strength {
                o if o > 0.86 => "cell-text on-mark",
                o if o > 0.62 => "cell-text on-middle",
                _ => "cell-text",
            };
            out.push(label(x + (self.cell - 1.0) / 2.0, y, Anchor::Middle, &text).class(class));
        }
        out
    }

    fn frame(&self, begin: usize, representative: usize, members: &[usize]) -> El {
        let side = self.cell * members.len() as f64;
        let list: Vec<String> = members.iter().map(ToString::to_string).collect();
        let frame = El::new("rect").class("frame").attr("data-cluster", representative);
        let frame = frame.attr("data-members", list.join(" ")).at("x", self.x(begin) - 0.5);
        frame.at("y", self.y(begin) - 0.5).at("width", side).at("height", side)
    }
}

/// From the lightest to the darkest.
fn scale_key(figure: &mut Figure, lowest: f64) {
    let y = figure.height + 4.0;
    figure.add(label(0.0, y + 9.0, Anchor::Start, &format!("{lowest:.1}")).class("tick"));
    for i in 0..10 {
        let rect = El::new("rect").class("c1 cell").at("x", 22.0 + f64::from(i) * 10.0).at("y", y);
        let rect = rect.at("width", 10.0).at("height", 10.0);
        figure.add(rect.attr("fill-opacity", coordinate(0.06 + 0.94 * f64::from(i) / 9.0)));
    }
    figure.add(label(127.0, y + 9.0, Anchor::Start, "1").class("tick"));
    figure.height = y + 16.0;
}

//! Horizontal bars from zero, a row each, stacked where there are several series; and points with intervals.

use super::markup::{El, exact, short};
use super::plot::{Anchor, Figure, Scale, Series, WIDTH, axis_x, fitted, key, label, line, text_width};

const ROW: f64 = 20.0;
const BAR: f64 = 13.0;
/// The most a row's name may take.
const MAX_NAME: f64 = 104.0;
/// The thinnest line that is still seen.
const HAIR: f64 = 0.6;

/// One row of bars.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: String,
    /// What a resting pointer is told.
    pub(super) title: String,
    /// `[series]`.
    pub(super) values: Vec<f64>,
    /// Behind the bar.
    pub(super) end: String,
    /// `data-` attributes of the row.
    pub(super) data: Vec<(&'static str, String)>,
}

/// Draws `rows` into `figure`, below what is there.
pub(super) fn stacked(figure: &mut Figure, series: &[Series], rows: &[Row]) {
    let mut top = figure.height;
    if series.len() > 1 {
        let (marks, below) = key(series, top);
        figure.extend(marks);
        top = below;
    }
    let left = names_width(rows.iter().map(|r| r.name.as_str()));
    let ends = rows.iter().map(|r| text_width(&r.end)).fold(0.0, f64::max);
    let totals = rows.iter().map(|r| finite_sum(&r.values));
    let x = Scale::from_zero(totals, [left, WIDTH - ends - 6.0]);
    let bottom = top + rows.len() as f64 * ROW;
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe());
    plot = plot.children(axis_x(&x, &x.ticks(3), top, bottom));
    for (i, row) in rows.iter().enumerate() {
        plot = plot.child(bar_row(series, row, &x, top + i as f64 * ROW));
    }
    figure.add(plot.child(line("axis", [left, top], [left, bottom])));
    figure.height = bottom + 18.0;
}

fn bar_row(series: &[Series], row: &Row, x: &Scale, top: f64) -> El {
    let mut g = El::new("g").class("row").attr("data-row", &row.name);
    for (name, value) in &row.data {
        g = g.attr(&format!("data-{name}"), value);
    }
    g = g.title(&row.title);
    let baseline = top + ROW / 2.0 + 4.0;
    let left = x.range[0];
    g = g.child(label(left - 6.0, baseline, Anchor::End, &fitted(&row.name, left - 6.0)));
    let mut sum = 0.0;
    for (s, &value) in series.iter().zip(&row.values) {
        let shown = if value.is_finite() { value } else { 0.0 };
        let (from, to) = (x.at(sum), x.at(sum + shown));
        sum += shown;
        let bar = El::new("rect").class(s.colour).attr("data-series", s.key).data("value", value);
        let bar = bar.at("x", from).at("width", if shown > 0.0 { (to - from).max(HAIR) } else { 0.0 });
        g = g.child(bar.at("y", top + (ROW - BAR) / 2.0).at("height", BAR));
    }
    g.child(label(x.at(sum) + 5.0, baseline, Anchor::Start, &row.end))
}

fn finite_sum(values: &[f64]) -> f64 {
    values.iter().filter(|v| v.is_finite()).sum()
}

fn names_width<'a>(names: impl Iterator<Item = &'a str>) -> f64 {
    names.map(text_width).fold(0.0, f64::max).min(MAX_NAME) + 8.0
}

/// A value, the interval around it, and a second value to hold it against.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) interval: Option<[f64; 2]>,
    /// Drawn as an upright stroke.
    pub(super) against: Option<f64>,
    /// At the right edge.
    pub(super) end: String,
    /// As of a [`Series`].
    pub(super) colour: &'static str,
}

/// Where a chart of points begins and what its upright line means.
#[derive(Clone, Copy, Debug)]
pub(super) struct PointAxis {
    /// The axis begins at zero; otherwise at a round number below the lowest.
    pub(super) zero: bool,
    /// An upright line across all rows.
    pub(super) reference: Option<f64>,
    /// The largest number there can be, if there is one.
    pub(super) max: Option<f64>,
}

/// Draws `rows` into `figure`, below what is there; says on which scale.
pub(super) fn points(figure: &mut Figure, axis: PointAxis, rows: &[Point]) -> Scale {
    let top = figure.height;
    let left = names_width(rows.iter().map(|r| r.name.as_str()));
    let ends = rows.iter().map(|r| text_width(&r.end)).fold(0.0, f64::max);
    let range = [left + 6.0, WIDTH - ends - 10.0];
    let values = || rows.iter().flat_map(|p| [Some(p.value), p.against].into_iter().chain(bounds(p))).flatten();
    let mut x = Scale::from_zero(values(), range);
    let lowest = values().fold(f64::INFINITY, f64::min);
    if !axis.zero && lowest.is_finite() {
        let top_value = axis.max.unwrap_or(x.domain[1]);
        let step = ((top_value - lowest) / 4.0).max(1e-3);
        let round = 10f64.powf(step.log10().ceil());
        x = Scale::new([((lowest / round).floor() * round).max(0.0), top_value], range);
    }
    let bottom = top + rows.len() as f64 * ROW;
    let mut plot = El::new("g").class("plot").attr("data-x", x.describe());
    plot = plot.children(axis_x(&x, &x.ticks(4), top, bottom));
    if let Some(at) = axis.reference {
        plot = plot.child(line("reference", [x.at(at), top], [x.at(at), bottom]));
    }
    for (i, row) in rows.iter().enumerate() {
        plot = plot.child(point_row(row, &x, left, top + i as f64 * ROW));
    }
    figure.add(plot);
    figure.height = bottom + 18.0;
    x
}

fn bounds(p: &Point) -> [Option<f64>; 2] {
    p.interval.map_or([None; 2], |[lo, hi]| [Some(lo), Some(hi)])
}

fn point_row(p: &Point, x: &Scale, left: f64, top: f64) -> El {
    let (middle, baseline) = (top + ROW / 2.0, top + ROW / 2.0 + 4.0);
    let mut g = El::new("g").class("row").attr("data-row", &p.name).data("value", p.value);
    let mut words = format!("{}: {}", p.name, short(p.value));
    if let Some([lo, hi]) = p.interval {
        g = g.data("lo", lo).data("hi", hi);
        words += &format!(", {} to {}", short(lo), short(hi));
    }
    if let Some(against) = p.against {
        g = g.data("against", against);
        words += &format!(", against {}", short(against));
    }
    g = g.title(&words);
    g = g.child(label(left - 2.0, baseline, Anchor::End, &fitted(&p.name, left - 2.0)));
    if let Some([lo, hi]) = p.interval.filter(|i| i.iter().all(|v| v.is_finite())) {
        let class = format!("interval {}", p.colour);
        g = g.child(line(&class, [x.at(lo), middle], [x.at(hi), middle]));
    }
    if let Some(against) = p.against.filter(|v| v.is_finite()) {
        let at = x.at(against);
        g = g.child(line("against", [at, middle - 7.0], [at, middle + 7.0]));
    }
    if p.value.is_finite() {
        g = g.child(
            El::new("circle").class(&format!("{} dot", p.colour)).at("cx", x.at(p.value)).at("cy", middle).attr("r", 4),
        );
    }
    g.child(label(WIDTH, baseline, Anchor::End, &p.end))
}

/// Rows for many problems: below `few`, one each; otherwise `bins` of them in ascending order of `by`, each the mean of
/// its problems. `values[problem][series]`, `names[problem]`.
pub(super) struct Population<'a> {
    pub(super) names: &'a [String],
    pub(super) values: &'a [Vec<f64>],
    pub(super) by: &'a [f64],
    /// How a bar's number is written.
    pub(super) written: fn(f64) -> String,
}

/// Problems that still get a bar each.
pub(super) const FEW: usize = 24;
/// Bars of more problems than that.
pub(super) const BINS: usize = 20;

impl Population<'_> {
    pub(super) fn is_few(&self) -> bool {
        self.values.len() <= FEW
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        if self.is_few() { (0..self.values.len()).map(|i| self.single(i)).collect() } else { self.binned() }
    }

    fn single(&self, i: usize) -> Row {
        let end = (self.written)(self.by[i]);
        Row {
            name: self.names[i].clone(),
            title: format!("{}: {end}", self.names[i]),
            values: self.values[i].clone(),
            end,
            data: vec![("total", exact(self.by[i]))],
        }
    }

    fn binned(&self) -> Vec<Row> {
        let mut order: Vec<usize> = (0..self.values.len()).collect();
        order.sort_by(|&a, &b| self.by[a].total_cmp(&self.by[b]).then(a.cmp(&b)));
        let edge = |bin: usize| bin * order.len() / BINS;
        let bin = |bin: usize| {
            let members = &order[edge(bin)..edge(bin + 1)];
            let mean = |of: &dyn Fn(usize) -> f64| members.iter().map(|&i| of(i)).sum::<f64>() / members.len() as f64;
            let total = mean(&|i| self.by[i]);
            let (from, to) = (bin * 100 / BINS, (bin + 1) * 100 / BINS);
            Row {
                name: format!("{from}-{to} %"),
                title: format!("{} problems, mean {}", members.len(), (self.written)(total)),
                values: (0..self.values[0].len()).map(|s| mean(&|i| self.values[i][s])).collect(),
                end: (self.written)(total),
                data: vec![("total", exact(total)), ("problems", members.len().to_string())],
            }
        };
        (0..BINS).map(bin).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_number() {
        let mut f = Figure::new("t", "", "");
        let series = ["a", "b"].map(|k| Series { key: k, words: k, colour: "c1" });
        let row =
            Row { name: "n".into(), title: String::new(), values: vec![30.0, 10.0], end: "40".into(), data: vec![] };
        stacked(&mut f, &series, &[row]);
        let svg: String = f.marks.iter().map(|m| m.to_string()).collect();
        let x = Scale::from_zero([40.0], [names_width(["n"].into_iter()), WIDTH - text_width("40") - 6.0]);
        let width = super::super::markup::coordinate(x.at(30.0) - x.at(0.0));
        assert!(
            svg.contains(&format!(
                "data-value=\"30\" x=\"{}\" width=\"{width}\"",
                super::super::markup::coordinate(x.at(0.0))
            )),
            "{svg}"
        );
    }

    #[test]
    fn many_problems_become_bins_of_nearly_equal_size() {
        let n = 45;
        let by: Vec<f64> = (0..n).rev().map(f64::from).collect();
        let values: Vec<Vec<f64>> = by.iter().map(|v| vec![*v]).collect();
        let names = vec![String::new(); n as usize];
        let rows = Population { names: &names, values: &values, by: &by, written: short }.rows();
        assert_eq!(rows.len(), BINS);
        let sizes: Vec<usize> = rows.iter().map(|r| r.data[1].1.parse().unwrap()).collect();
        assert_eq!((sizes.iter().sum::<usize>(), sizes.iter().min(), sizes.iter().max()), (45, Some(&2), Some(&3)));
        assert_eq!((rows[0].values[0], rows[19].values[0]), (0.5, 43.0));
    }
}

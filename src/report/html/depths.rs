//! Early exit as one SVG file of its own: panels above each other over the depth at which tokens leave, with lines, dots and
//! marks, and the backbone as a band.

use super::markup::{El, coordinate};
use super::plot::{Anchor, Scale, label, line, tick_label};
use super::sheet::{COLOURS, diamond, sheet};

/// Left and right of every panel.
const SIDES: [f64; 2] = [60.0, 520.0];
/// Top of the first panel, height of each, and what lies between two.
const TOP: f64 = 66.0;
const HEIGHT: f64 = 230.0;
const GAP: f64 = 44.0;
const WIDTH: f64 = 736.0;
/// Horizontal distance of marks at one depth.
const DODGE: f64 = 6.0;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DepthStyle {
    /// Dots, and a line through them.
    Line,
    /// Dots.
    Dots,
    /// A mark.
    Mark,
}

/// One arm in one panel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DepthPoint {
    /// Layers.
    pub depth: f64,
    /// What the panel shows.
    pub value: f64,
    /// Its interval.
    pub interval: Option<[f64; 2]>,
}

/// Arms of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthSeries {
    /// In the key; one name has one colour in all panels.
    pub name: String,
    /// Lines, dots or marks.
    pub style: DepthStyle,
    /// Ascending in depth.
    pub points: Vec<DepthPoint>,
}

/// One number over the depth.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthPanel {
    /// What runs upwards.
    pub y: String,
    /// On a logarithmic scale; what is not above 0 is not drawn.
    pub log: bool,
    /// The backbone's value and interval.
    pub backbone: Option<(f64, [f64; 2])>,
    /// In the order of the key.
    pub series: Vec<DepthSeries>,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthPlot {
    /// Over the panels.
    pub title: String,
    /// Below the title.
    pub note: String,
    /// What runs to the right.
    pub x: String,
    /// The right end: the model's layers.
    pub num_layers: f64,
    /// From the top down.
    pub panels: Vec<DepthPanel>,
}

/// The picture.
pub fn render_depths(p: &DepthPlot) -> String {
    let [left, right] = SIDES;
    let x = Scale::new([0.0, p.num_layers], [left + 14.0, right - 8.0]);
    let names = names(p);
    let mut marks = vec![
        label(8.0, 20.0, Anchor::Start, &p.title).class("title"),
        label(8.0, 37.0, Anchor::Start, &p.note).class("note"),
    ];
    let mut top = TOP;
    for panel in &p.panels {
        marks.extend(draw(panel, &x, top, &names));
        top += HEIGHT + GAP;
    }
    let bottom = top - GAP;
    marks.push(label(0.5 * (left + right), bottom + 34.0, Anchor::Middle, &p.x));
    marks.extend(key(p, &names));
    sheet([WIDTH, bottom + 46.0], marks)
}

/// Of all series, each once.
fn names(p: &DepthPlot) -> Vec<(&str, DepthStyle)> {
    let mut names: Vec<(&str, DepthStyle)> = Vec::new();
    for s in p.panels.iter().flat_map(|panel| &panel.series) {
        if !names.iter().any(|(name, _)| *name == s.name) {
            names.push((&s.name, s.style));
        }
    }
    names
}

/// A panel's own height of a value: logarithms are of base 10.
fn height(panel: &DepthPanel, value: f64) -> Option<f64> {
    let value = if panel.log { value.log10() } else { value };
    value.is_finite().then_some(value)
}

/// Ends of the vertical axis: everything drawn, between whole powers or tens.
fn range(panel: &DepthPanel) -> [f64; 2] {
    let points = panel.series.iter().flat_map(|s| &s.points);
    let ends = points.flat_map(|q| [Some(q.value), q.interval.map(|i| i[0]), q.interval.map(|i| i[1])]).flatten();
    let all = ends.chain(panel.backbone.iter().flat_map(|(_, interval)| *interval));
    let unit = if panel.log { 1.0 } else { 10.0 };
    let (lo, hi) = all
        .filter_map(|v| height(panel, v))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)));
    let lo = (lo / unit).floor() * unit;
    [lo, ((hi / unit).ceil() * unit).max(lo + unit)]
}

fn draw(panel: &DepthPanel, x: &Scale, top: f64, names: &[(&str, DepthStyle)]) -> Vec<El> {
    let [left, right] = SIDES;
    let bottom = top + HEIGHT;
    let y = Scale::new(range(panel), [bottom, top]);
    let mut marks = vec![label(8.0, top - 9.0, Anchor::Start, &panel.y)];
    for t in y.ticks(5).into_iter().filter(|t| !panel.log || t.fract() == 0.0) {
        let words = if panel.log { power(t) } else { tick_label(t) };
        marks.push(line("grid", [left, y.at(t)], [right, y.at(t)]));
        marks.push(label(left - 6.0, y.at(t) + 3.5, Anchor::End, &words).class("tick"));
    }
    for t in x.ticks(8) {
        marks.push(line("grid", [x.at(t), top], [x.at(t), bottom]));
        marks.push(label(x.at(t), bottom + 15.0, Anchor::Middle, &tick_label(t)).class("tick"));
    }
    marks.push(line("axis", [left, bottom], [right, bottom]));
    marks.extend(panel.backbone.iter().flat_map(|b| band(*b, &y)));
    let stacked = names.iter().filter(|(_, style)| *style == DepthStyle::Mark);
    let first = names.iter().position(|(_, style)| *style == DepthStyle::Mark).unwrap_or(0);
    let middle = 0.5 * (stacked.count() as f64 - 1.0);
    for s in &panel.series {
        let at = names.iter().position(|(name, _)| *name == s.name).unwrap_or(0);
        let dodge = if s.style == DepthStyle::Mark { (at as f64 - first as f64 - middle) * DODGE } else { 0.0 };
        marks.extend(series(panel, s, (x, &y), (COLOURS[at % COLOURS.len()], dodge)));
    }
    marks
}

/// `0.001`, `1e-6`.
fn power(exponent: f64) -> String {
    if exponent >= -4.0 { tick_label(10f64.powf(exponent)) } else { format!("1e{exponent:.0}") }
}

/// The backbone: its interval as a band, its value as a line.
fn band((value, interval): (f64, [f64; 2]), y: &Scale) -> [El; 2] {
    let [left, right] = SIDES;
    let [lo, hi] = interval.map(|v| y.at(v));
    let area = El::new("rect").at("x", left).at("y", hi).at("width", right - left).at("height", (lo - hi).max(0.0));
    let value = line("backbone", [left, y.at(value)], [right, y.at(value)]);
    [area.attr("fill", "#1c1c1c").attr("fill-opacity", 0.07), dashed(value)]
}

fn dashed(el: El) -> El {
    el.attr("stroke", "#1c1c1c").attr("stroke-width", 1.2).attr("stroke-dasharray", "6 3")
}

fn series(panel: &DepthPanel, s: &DepthSeries, (x, y): (&Scale, &Scale), (colour, dodge): (&str, f64)) -> Vec<El> {
    let place = |q: &DepthPoint| Some([x.at(q.depth) + dodge, y.at(height(panel, q.value)?)]);
    let placed: Vec<(&DepthPoint, [f64; 2])> = s.points.iter().filter_map(|q| Some((q, place(q)?))).collect();
    let mut out = Vec::new();
    if s.style == DepthStyle::Line {
        let path: Vec<String> =
            placed.iter().map(|(_, [cx, cy])| format!("{},{}", coordinate(*cx), coordinate(*cy))).collect();
        let path = El::new("polyline").attr("points", path.join(" ")).attr("fill", "none");
        out.push(path.attr("stroke", colour).attr("stroke-width", 1.6));
    }
    for (q, [cx, cy]) in placed {
        if let Some([lo, hi]) = q.interval.map(|i| i.map(|v| height(panel, v))) {
            let whisker = lo.zip(hi).map(|(lo, hi)| line("interval", [cx, y.at(lo)], [cx, y.at(hi)]));
            out.extend(
                whisker.map(|w| w.attr("stroke", colour).attr("stroke-width", 1.1).attr("stroke-opacity", 0.55)),
            );
        }
        let words = format!("{}, {} layers: {}", s.name, tick_label(q.depth), tick_label(q.value));
        out.push(mark(s.style, [cx, cy], colour).title(&words));
    }
    out
}

fn mark(style: DepthStyle, [cx, cy]: [f64; 2], colour: &str) -> El {
    match style {
        DepthStyle::Mark => diamond(cx, cy, colour),
        _ => El::new("circle").at("cx", cx).at("cy", cy).at("r", 2.8).attr("fill", colour),
    }
}

/// To the right of the first panel.
fn key(p: &DepthPlot, names: &[(&str, DepthStyle)]) -> Vec<El> {
    let (x, mut at) = (SIDES[1] + 16.0, TOP + 6.0);
    let mut out = Vec::new();
    if p.panels.iter().any(|panel| panel.backbone.is_some()) {
        out.push(dashed(line("backbone", [x, at], [x + 18.0, at])));
        out.push(label(x + 24.0, at + 3.5, Anchor::Start, "backbone"));
    }
    for (i, (name, style)) in names.iter().enumerate() {
        at += 17.0;
        let colour = COLOURS[i % COLOURS.len()];
        if *style == DepthStyle::Line {
            out.push(line("series", [x, at], [x + 18.0, at]).attr("stroke", colour).attr("stroke-width", 1.6));
        }
        out.push(mark(*style, [x + 9.0, at], colour));
        out.push(label(x + 24.0, at + 3.5, Anchor::Start, name));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> DepthPlot {
        let point = |depth: f64, value: f64| DepthPoint { depth, value, interval: Some([value * 0.9, value * 1.1]) };
        let of = |name: &str, style, points: &[DepthPoint]| DepthSeries {
            name: name.into(),
            style,
            points: points.to_vec(),
        };
        let right = vec![
            of("fixed", DepthStyle::Line, &[point(0.0, 50.0), point(4.0, 60.0)]),
            of("tau", DepthStyle::Dots, &[point(2.0, 55.0)]),
            of("hqq", DepthStyle::Mark, &[point(0.0, 50.0)]),
            of("gptq", DepthStyle::Mark, &[point(0.0, 55.0)]),
        ];
        let kl = vec![of("fixed", DepthStyle::Line, &[point(0.0, 0.01), point(4.0, 0.0)])];
        DepthPlot {
            title: "a < b".into(),
            note: "n".into(),
            x: "x".into(),
            num_layers: 8.0,
            panels: vec![
                DepthPanel { y: "%".into(), log: false, backbone: Some((62.0, [58.0, 66.0])), series: right },
                DepthPanel { y: "KL".into(), log: true, backbone: None, series: kl },
            ],
        }
    }

    #[test]
    fn points_land_where_the_axes_say_in_every_panel() {
        let svg = render_depths(&plot());
        // 0 to 8 layers from 74 to 512; 40 to 70 % from 296 up to 66; 1e-3 to 1e-1 from 570 up to 340.
        let y = |v: f64| coordinate(296.0 - (v - 40.0) / 30.0 * 230.0);
        assert!(svg.contains(&format!("points=\"74,{} 293,{}\"", y(50.0), y(60.0))), "{svg}");
        assert!(svg.contains(&format!("cx=\"183.5\" cy=\"{}\"", y(55.0))), "{svg}");
        // Marks at one depth stand beside each other.
        for (cx, v) in [(71.0, 50.0), (77.0, 55.0)] {
            let at = 296.0 - (v - 40.0) / 30.0 * 230.0;
            assert!(svg.contains(&format!("points=\"{cx},{}", coordinate(at - 5.0))), "{cx}: {svg}");
        }
        // What has no logarithm is not drawn.
        assert!(svg.contains("points=\"74,455\"") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains(">0.001<") && svg.contains(">gptq<"), "{svg}");
    }

    #[test]
    fn an_empty_plot_is_still_a_picture() {
        let panels = vec![DepthPanel { y: "y".into(), log: true, backbone: None, series: Vec::new() }];
        let svg = render_depths(&DepthPlot { panels, ..plot() });
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"), "{svg}");
    }
}

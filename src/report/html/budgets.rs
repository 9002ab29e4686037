//! Accuracy against a KV budget as one SVG file of its own: lines with intervals, what they are compared with as a band,
//! and what others claim as marked points.

use super::markup::{El, coordinate};
use super::plot::{Anchor, Scale, label, line, text_width, tick_label};
use super::sheet::{COLOURS, diamond, sheet};

/// Left, right, top and bottom of the plot.
const PLOT: [f64; 4] = [52.0, 520.0, 66.0, 386.0];
const SIZE: [f64; 2] = [736.0, 432.0];
/// Of what the lines are compared with.
const INK: &str = "#1c1c1c";
/// Horizontal distance of two lines' marks at one budget, so that intervals do not hide each other.
const DODGE: f64 = 3.2;

/// One budget of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetPoint {
    /// In per cent, above 0.
    pub budget: f64,
    /// In per cent, as the others.
    pub value: f64,
    /// Lower end of its interval.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

/// A way to choose what stays.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetLine {
    /// Its name in the key.
    pub name: String,
    /// Ascending in the budget.
    pub points: Vec<BudgetPoint>,
}

/// What somebody says.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetClaim {
    /// In per cent.
    pub budget: f64,
    /// In per cent.
    pub value: f64,
    /// In the key.
    pub words: String,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetPlot {
    /// Over the plot.
    pub title: String,
    /// Below the title.
    pub note: String,
    /// What runs to the right.
    pub x: String,
    /// What runs upwards.
    pub y: String,
    /// The full cache's value.
    pub full: f64,
    /// And its interval.
    pub full_interval: [f64; 2],
    /// In the order of the key.
    pub lines: Vec<BudgetLine>,
    /// Marked points.
    pub claims: Vec<BudgetClaim>,
    /// Whose they are, for the key.
    pub claims_words: String,
}

/// The picture. Budgets are drawn on a logarithmic scale.
pub fn render_budgets(p: &BudgetPlot) -> String {
    let [left, right, top, bottom] = PLOT;
    let budgets = budgets(p);
    let ends = [budgets.first().copied().unwrap_or(1.0), budgets.last().copied().unwrap_or(100.0)];
    // Air for the dodged marks at both ends.
    let x = Scale::new(ends.map(f64::ln), [left + 22.0, right - 22.0]);
    let y = Scale::new(range(p), [bottom, top]);
    let mut marks = vec![
        label(8.0, 20.0, Anchor::Start, &p.title).class("title"),
        label(8.0, 37.0, Anchor::Start, &p.note).class("note"),
        label(8.0, top - 9.0, Anchor::Start, &p.y),
    ];
    for t in y.ticks(6) {
        marks.push(line("grid", [left, y.at(t)], [right, y.at(t)]));
        marks.push(label(left - 6.0, y.at(t) + 3.5, Anchor::End, &tick_label(t)).class("tick"));
    }
    for &b in &budgets {
        marks.push(line("grid", [x.at(b.ln()), top], [x.at(b.ln()), bottom]));
        marks.push(label(x.at(b.ln()), bottom + 15.0, Anchor::Middle, &tick_label(b)).class("tick"));
    }
    marks.push(line("axis", [left, bottom], [right, bottom]));
    marks.push(label(0.5 * (left + right), bottom + 34.0, Anchor::Middle, &p.x));
    marks.extend(band(p, &y));
    for (i, l) in p.lines.iter().enumerate() {
        let shift = (i as f64 - 0.5 * (p.lines.len() as f64 - 1.0)) * DODGE;
        marks.extend(draw(l, &x, &y, COLOURS[i % COLOURS.len()], shift));
    }
    marks.extend(p.claims.iter().flat_map(|c| claim(c, &x, &y)));
    marks.extend(key(p));
    sheet(SIZE, marks)
}

/// All budgets that are drawn, ascending, each once.
fn budgets(p: &BudgetPlot) -> Vec<f64> {
    let points = p.lines.iter().flat_map(|l| &l.points).filter(|q| is_sound(q)).map(|q| q.budget);
    let mut all: Vec<f64> = points.chain(p.claims.iter().map(|c| c.budget).filter(|b| *b > 0.0)).collect();
    all.sort_by(f64::total_cmp);
    all.dedup();
    all
}

fn is_sound(q: &BudgetPoint) -> bool {
    q.budget > 0.0 && [q.budget, q.value, q.lo, q.hi].iter().all(|v| v.is_finite())
}

/// Ends of the vertical axis: all intervals and claims between tens.
fn range(p: &BudgetPlot) -> [f64; 2] {
    let points = p.lines.iter().flat_map(|l| &l.points).filter(|q| is_sound(q));
    let (mut lo, mut hi) = (p.full_interval[0], p.full_interval[1]);
    for q in points {
        (lo, hi) = (lo.min(q.lo), hi.max(q.hi));
    }
    for c in p.claims.iter().filter(|c| c.value.is_finite()) {
        (lo, hi) = (lo.min(c.value), hi.max(c.value));
    }
    let down = (lo / 10.0).floor() * 10.0;
    let up = (hi / 10.0).ceil() * 10.0;
    // A claim above everything, as "105 %" of a high value, needs a little more than the last ten.
    [down.max(0.0), if hi > up - 1.0 && hi > 100.0 { up + 2.0 } else { up }]
}

/// The full cache: its interval as a band, its value as a line.
fn band(p: &BudgetPlot, y: &Scale) -> Vec<El> {
    let [left, right, ..] = PLOT;
    let [lo, hi] = p.full_interval.map(|v| y.at(v));
    let area = El::new("rect").at("x", left).at("y", hi).at("width", right - left).at("height", (lo - hi).max(0.0));
    let value = line("full", [left, y.at(p.full)], [right, y.at(p.full)]);
    vec![
        area.attr("fill", "#1c1c1c").attr("fill-opacity", 0.07),
        value.attr("stroke", "#1c1c1c").attr("stroke-width", 1.2).attr("stroke-dasharray", "6 3"),
    ]
}

fn draw(l: &BudgetLine, x: &Scale, y: &Scale, colour: &str, shift: f64) -> Vec<El> {
    let sound: Vec<&BudgetPoint> = l.points.iter().filter(|q| is_sound(q)).collect();
    let at = |q: &BudgetPoint| x.at(q.budget.ln()) + shift;
    let path: Vec<String> =
        sound.iter().map(|q| format!("{},{}", coordinate(at(q)), coordinate(y.at(q.value)))).collect();
    let stroke = |el: El, width: f64| el.attr("stroke", colour).attr("stroke-width", width);
    let mut out = vec![stroke(El::new("polyline").attr("points", path.join(" ")).attr("fill", "none"), 1.6)];
    for q in sound {
        let whisker = stroke(line("interval", [at(q), y.at(q.lo)], [at(q), y.at(q.hi)]), 1.1);
        out.push(whisker.attr("stroke-opacity", 0.55));
        let words = format!("{}, {} %: {:.1} % ({:.1} to {:.1})", l.name, tick_label(q.budget), q.value, q.lo, q.hi);
        let dot = El::new("circle").at("cx", at(q)).at("cy", y.at(q.value)).at("r", 2.6).attr("fill", colour);
        out.push(dot.title(&words));
    }
    out
}

/// A diamond; its words stand in the key, where nothing lies behind them.
fn claim(c: &BudgetClaim, x: &Scale, y: &Scale) -> Option<El> {
    let is_sound = c.budget > 0.0 && c.value.is_finite();
    is_sound.then(|| diamond(x.at(c.budget.ln()), y.at(c.value), INK).title(&c.words))
}

/// To the right of the plot.
fn key(p: &BudgetPlot) -> Vec<El> {
    let (x, mut at) = (PLOT[1] + 16.0, PLOT[2] + 6.0);
    let mut out = Vec::new();
    let full = line("full", [x, at], [x + 18.0, at]).attr("stroke", "#1c1c1c").attr("stroke-width", 1.2);
    out.push(full.attr("stroke-dasharray", "6 3"));
    out.push(label(x + 24.0, at + 3.5, Anchor::Start, "full cache"));
    for (i, l) in p.lines.iter().enumerate() {
        at += 17.0;
        let colour = COLOURS[i % COLOURS.len()];
        out.push(line("series", [x, at], [x + 18.0, at]).attr("stroke", colour).attr("stroke-width", 1.6));
        out.push(El::new("circle").at("cx", x + 9.0).at("cy", at).at("r", 2.6).attr("fill", colour));
        out.push(label(x + 24.0, at + 3.5, Anchor::Start, &l.name));
    }
    if !p.claims.is_empty() {
        at += 24.0;
        out.push(diamond(x + 9.0, at, INK));
        let said = p.claims.iter().map(|c| c.words.clone());
        for words in wrapped(&p.claims_words, SIZE[0] - x - 28.0).into_iter().chain(said) {
            out.push(label(x + 24.0, at + 3.5, Anchor::Start, &words));
            at += 15.0;
        }
    }
    out
}

/// Lines of whole words, none wider than `width` unless one word is.
fn wrapped(text: &str, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(last) if text_width(&format!("{last} {word}")) <= width => {
                last.push(' ');
                last.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> BudgetPlot {
        let points = [(10.0, 20.0), (31.622_776_601_683_793, 60.0), (100.0, 90.0)];
        let line = |name: &str| BudgetLine {
            name: name.into(),
            points: points
                .iter()
                .map(|&(budget, value)| BudgetPoint { budget, value, lo: value - 5.0, hi: value + 5.0 })
                .chain([BudgetPoint { budget: 50.0, value: f64::NAN, lo: 0.0, hi: 0.0 }])
                .collect(),
        };
        BudgetPlot {
            title: "a < b".into(),
            note: "n".into(),
            x: "x".into(),
            y: "y".into(),
            full: 92.0,
            full_interval: [88.0, 94.0],
            lines: vec![line("one")],
            claims: vec![BudgetClaim { budget: 10.0, value: 92.0, words: "said".into() }],
            claims_words: "somebody says in so many words that they need another line".into(),
        }
    }

    #[test]
    fn points_band_and_claims_land_where_the_axes_say() {
        let svg = render_budgets(&plot());
        // 10 to 100 % from 74 to 498, logarithmically; 10 to 100 % right from 386 up to 66.
        let y = |v: f64| 386.0 - (v - 10.0) / 90.0 * 320.0;
        let points =
            [(74.0, 20.0), (286.0, 60.0), (498.0, 90.0)].map(|(x, v)| format!("{x},{}", coordinate(y(v)))).join(" ");
        assert!(svg.contains(&format!("points=\"{points}\"")), "{svg}");
        let band = format!("y=\"{}\" width=\"468\" height=\"{}\"", coordinate(y(94.0)), coordinate(y(88.0) - y(94.0)));
        assert!(svg.contains(&band), "{band}: {svg}");
        assert!(svg.contains(&format!("points=\"74,{} 79,{}", coordinate(y(92.0) - 5.0), coordinate(y(92.0)))));
        // Three marks and the key's; what is no number is not drawn.
        assert_eq!((svg.matches("<circle").count(), svg.matches("class=\"interval\"").count()), (4, 3));
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN"));
        // Its source is broken into lines, the claim itself stands below; a pointer on the mark is told as well.
        let source = [">somebody says in so many</text>", ">words that they need another</text>", ">line</text>"];
        assert!(source.iter().all(|words| svg.contains(words)), "{svg}");
        assert_eq!((svg.matches(">said</text>").count(), svg.matches("<title>said</title>").count()), (1, 1));
    }

    #[test]
    fn lines_of_one_budget_stand_beside_each_other() {
        let mut p = plot();
        p.lines.push(p.lines[0].clone());
        let svg = render_budgets(&p);
        assert!(svg.contains(&format!("cx=\"{}\"", 74.0 - 1.6)) && svg.contains(&format!("cx=\"{}\"", 74.0 + 1.6)));
    }

    #[test]
    fn an_empty_plot_is_still_a_picture() {
        let p = BudgetPlot { lines: Vec::new(), claims: Vec::new(), ..plot() };
        assert!(render_budgets(&p).starts_with("<svg"));
    }
}

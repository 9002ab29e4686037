//! What the figures share: the canvas, scales, axes, keys, and how wide a text is.

use super::markup::{El, coordinate, exact, short};

/// Width of every figure in its own units: a phone's, so that text there has its natural size.
pub(super) const WIDTH: f64 = 336.0;
/// Font size of the figures (the style sheet has the same).
pub(super) const FONT: f64 = 11.0;

/// A drawing with its name and words.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    /// What is drawn: `data-figure`.
    pub(super) kind: &'static str,
    /// The problem it shows, where it shows one.
    pub(super) problem: Option<String>,
    pub(super) title: String,
    /// One sentence below the title: units, and what to look at.
    pub(super) note: String,
    pub(super) height: f64,
    pub(super) marks: Vec<El>,
    /// Below the drawing.
    pub(super) more: Option<El>,
}

impl Figure {
    pub(super) fn new(kind: &'static str, title: impl Into<String>, note: impl Into<String>) -> Self {
        let (title, note) = (title.into(), note.into());
        Self { kind, problem: None, title, note, height: 0.0, marks: Vec::new(), more: None }
    }

    pub(super) fn of_problem(mut self, id: &str) -> Self {
        self.problem = Some(id.to_string());
        self
    }

    pub(super) fn add(&mut self, mark: El) {
        self.marks.push(mark);
    }

    pub(super) fn extend(&mut self, marks: impl IntoIterator<Item = El>) {
        self.marks.extend(marks);
    }

    pub(super) fn into_el(self) -> El {
        let title = El::new("figcaption")
            .child(El::new("strong").text(&self.title))
            .child(El::new("span").class("note").text(&self.note));
        let svg = El::new("svg")
            .attr("viewBox", format!("0 0 {} {}", WIDTH, coordinate(self.height.ceil())))
            .attr("role", "img")
            .attr("aria-label", format!("{}. {}", self.title, self.note))
            .children(self.marks);
        let mut figure = El::new("figure").attr("data-figure", self.kind);
        if let Some(id) = &self.problem {
            figure = figure.attr("data-problem", id);
        }
        figure.child(title).child(svg).children(self.more)
    }
}

/// A straight line from numbers to pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    pub(super) domain: [f64; 2],
    pub(super) range: [f64; 2],
}

impl Scale {
    pub(super) fn new(domain: [f64; 2], range: [f64; 2]) -> Self {
        let [lo, hi] = domain;
        let sound = lo.is_finite() && hi.is_finite() && hi > lo;
        Self { domain: if sound { domain } else { [0.0, 1.0] }, range }
    }

    /// From zero to a little more than the largest value.
    pub(super) fn from_zero(values: impl IntoIterator<Item = f64>, range: [f64; 2]) -> Self {
        let max = values.into_iter().filter(|v| v.is_finite()).fold(0.0, f64::max);
        Self::new([0.0, max * 1.02], range)
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let ([lo, hi], [from, to]) = (self.domain, self.range);
        from + (value - lo) / (hi - lo) * (to - from)
    }

    /// Round numbers within the domain, about `n` intervals of them.
    pub(super) fn ticks(&self, n: usize) -> Vec<f64> {
        let [lo, hi] = self.domain;
        let step = step(hi - lo, n);
        let first = (lo / step - 1e-9).ceil();
        let count = ((hi / step + 1e-9).floor() - first).max(0.0) as usize;
        (0..=count).map(|i| (first + i as f64) * step).collect()
    }

    /// For whoever reads a mark's place back: `data-x="0 120 84 300"` is domain, then range.
    pub(super) fn describe(&self) -> String {
        let ([a, b], [c, d]) = (self.domain, self.range);
        format!("{} {} {} {}", exact(a), exact(b), exact(c), exact(d))
    }
}

/// 1, 2 or 5 times a power of ten, so that about `n` of them make `span`.
fn step(span: f64, n: usize) -> f64 {
    if !span.is_finite() || span <= 0.0 {
        return 1.0;
    }
    let raw = span / n as f64;
    let power = 10f64.powf(raw.log10().floor());
    let nice = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= raw * 0.999);
    nice.unwrap_or(10.0) * power
}

/// A short number for an axis: no more decimals than the ticks need, thousands and millions by letter.
pub(super) fn tick_label(value: f64) -> String {
    let (value, letter) = match value.abs() {
        a if a >= 1e6 => (value / 1e6, "M"),
        a if a >= 1e4 => (value / 1e3, "k"),
        a if a >= 1e3 => return short(value),
        _ => (value, ""),
    };
    let text = format!("{value:.4}");
    format!("{}{letter}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Estimated width in pixels, rather too wide than too narrow: nothing can measure it here.
pub(super) fn text_width(text: &str) -> f64 {
    // By the wide fonts that free systems fall back to.
    let of = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ' ' | '\'' | 'I' => 0.32,
        ':' | ';' | '|' | '(' | ')' | '[' | ']' | 'f' | 't' | 'r' | '-' | '/' => 0.41,
        'm' | 'w' | 'M' | 'W' | '@' | '%' | '#' | '&' | '<' | '>' | '=' | '+' | '~' => 0.97,
        'A'..='Z' => 0.74,
        c if c.is_ascii() => 0.64,
        _ => 1.0,
    };
    text.chars().map(of).sum::<f64>() * FONT
}

/// As many characters of `text` as `width` pixels hold.
pub(super) fn fitted(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_string();
    }
    let mut out = String::new();
    let mut left = width - FONT;
    for c in text.chars() {
        left -= text_width(c.encode_utf8(&mut [0; 4]));
        if left < 0.0 {
            break;
        }
        out.push(c);
    }
    out.push('\u{2026}');
    out
}

/// Where a text hangs from its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// Text with its baseline at `y`.
pub(super) fn label(x: f64, y: f64, anchor: Anchor, text: &str) -> El {
    let el = El::new("text").at("x", x).at("y", y);
    let el = match anchor {
        Anchor::Start => el,
        Anchor::Middle => el.attr("text-anchor", "middle"),
        Anchor::End => el.attr("text-anchor", "end"),
    };
    el.text(text)
}

pub(super) fn line(class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) -> El {
    El::new("line").class(class).at("x1", x1).at("y1", y1).at("x2", x2).at("y2", y2)
}

/// Horizontal axis: a tick and its number at `y` below the plot, thin lines up to `top`.
pub(super) fn axis_x(scale: &Scale, ticks: &[f64], top: f64, y: f64) -> Vec<El> {
    let mut out = Vec::new();
    for &t in ticks {
        let x = scale.at(t);
        out.push(line("grid", [x, top], [x, y]));
        let anchor = if x > WIDTH - 14.0 { Anchor::End } else { Anchor::Middle };
        out.push(label(x.min(WIDTH), y + 12.0, anchor, &tick_label(t)).class("tick"));
    }
    out
}

/// Vertical axis: numbers left of `x`, thin lines to `right`.
pub(super) fn axis_y(scale: &Scale, ticks: &[f64], x: f64, right: f64) -> Vec<El> {
    let mut out = Vec::new();
    for &t in ticks {
        let y = scale.at(t);
        out.push(line("grid", [x, y], [right, y]));
        out.push(label(x - 4.0, y + 3.5, Anchor::End, &tick_label(t)).class("tick"));
    }
    out
}

/// One kind of mark: its name in the data, its words, its colour in the style sheet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Series {
    pub(super) key: &'static str,
    pub(super) words: &'static str,
    /// `c1` .. `c5` for kinds, `d1` .. `d5` for degrees.
    pub(super) colour: &'static str,
}

/// Swatches and words from `top` on, in as many lines as they need; returns the marks and the y below them.
pub(super) fn key(series: &[Series], top: f64) -> (Vec<El>, f64) {
    let (mut x, mut y) = (0.0, top);
    let mut out = Vec::new();
    for s in series {
        let width = 14.0 + text_width(s.words) + 12.0;
        if x > 0.0 && x + width - 12.0 > WIDTH {
            (x, y) = (0.0, y + 16.0);
        }
        let swatch = El::new("rect").class(&format!("{} swatch", s.colour)).at("x", x).at("y", y + 1.0);
        out.push(swatch.at("width", 10.0).at("height", 10.0));
        out.push(label(x + 14.0, y + 10.0, Anchor::Start, s.words));
        x += width;
    }
    (out, y + 20.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_begin_at_zero_and_their_ticks_are_round() {
        let s = Scale::from_zero([3.0, f64::NAN, 100.0], [100.0, 304.0]);
        assert_eq!((s.domain, s.at(0.0), s.at(102.0), s.at(51.0)), ([0.0, 102.0], 100.0, 304.0, 202.0));
        assert_eq!(s.ticks(4), [0.0, 50.0, 100.0]);
        assert_eq!(Scale::from_zero([], [0.0, 1.0]).domain, [0.0, 1.0]);
        assert_eq!(Scale::new([2.0, 2.0], [0.0, 1.0]).domain, [0.0, 1.0]);
        let ticks = Scale::new([0.83, 1.0], [0.0, 1.0]).ticks(4);
        assert!(ticks.len() == 4 && (ticks[0] - 0.85).abs() < 1e-9 && (ticks[3] - 1.0).abs() < 1e-9, "{ticks:?}");
    }

    #[test]
    fn ticks_say_no_more_than_they_must() {
        let labels: Vec<String> = [0.0, 0.25, 2.0, 1500.0, 0.1 + 0.2, 2.5e6, 2e4].map(tick_label).to_vec();
        assert_eq!(labels, ["0", "0.25", "2", "1,500", "0.3", "2.5M", "20k"]);
    }

    #[test]
    fn long_names_are_cut_to_their_place() {
        let name = fitted("a-very-long-problem-identifier-0001", 90.0);
        assert!(name.ends_with('\u{2026}') && text_width(&name) <= 90.0, "{name}");
        assert_eq!(fitted("test-0001", 90.0), "test-0001");
    }

    #[test]
    fn a_key_wraps_before_the_edge() {
        let s = Series { key: "k", words: "blocks only the cache holds", colour: "c1" };
        let (marks, below) = key(&[s; 4], 0.0);
        assert_eq!((marks.len(), below), (8, 3.0 * 16.0 + 20.0));
    }
}

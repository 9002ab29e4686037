//! HTML and SVG text. Everything that comes from outside passes through [`escape`] here and nowhere else; the result is
//! well-formed XML, so that a reader needs no HTML parser to take the numbers back.

use std::fmt::{self, Display};

/// SVG shapes that may close themselves; HTML reads `<td/>` as an open tag.
const SHAPES: [&str; 6] = ["rect", "line", "path", "circle", "polyline", "polygon"];

/// `text` with nothing left in it that HTML could read as markup. Control characters become U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// An element under construction.
#[derive(Clone, Debug)]
pub(super) struct El {
    name: &'static str,
    attributes: String,
    body: String,
}

impl El {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, attributes: String::new(), body: String::new() }
    }

    pub(super) fn attr(mut self, name: &str, value: impl Display) -> Self {
        self.attributes += &format!(" {name}=\"{}\"", escape(&value.to_string()));
        self
    }

    pub(super) fn class(self, class: &str) -> Self {
        self.attr("class", class)
    }

    /// A coordinate, to a hundredth of a pixel.
    pub(super) fn at(self, name: &str, value: f64) -> Self {
        self.attr(name, coordinate(value))
    }

    /// A number of the data, whole: what a reader parses is the number that was drawn.
    pub(super) fn data(self, name: &str, value: f64) -> Self {
        self.attr(&format!("data-{name}"), exact(value))
    }

    pub(super) fn text(mut self, text: &str) -> Self {
        self.body += &escape(text);
        self
    }

    pub(super) fn child(mut self, child: El) -> Self {
        self.body += &child.to_string();
        self
    }

    pub(super) fn children(self, children: impl IntoIterator<Item = El>) -> Self {
        children.into_iter().fold(self, El::child)
    }

    /// What a pointer resting on the element is told.
    pub(super) fn title(self, text: &str) -> Self {
        self.child(El::new("title").text(text))
    }

    /// Text of our own that is no markup for HTML either (a style sheet).
    pub(super) fn verbatim(mut self, text: &'static str) -> Self {
        self.body += text;
        self
    }
}

impl Display for El {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, attributes, body } = self;
        if body.is_empty() && SHAPES.contains(name) {
            write!(f, "<{name}{attributes}/>")
        } else {
            write!(f, "<{name}{attributes}>{body}</{name}>")
        }
    }
}

/// At most two decimals. A coordinate that is no number would make a browser complain: 0 instead; callers leave such
/// marks out.
pub(super) fn coordinate(value: f64) -> String {
    let value = if value.is_finite() { (value * 100.0).round() / 100.0 } else { 0.0 };
    format!("{}", value + 0.0) // -0 becomes 0
}

/// The shortest text that reads back as the same number; `null` where JSON says so.
pub(super) fn exact(value: f64) -> String {
    if value.is_finite() { format!("{value}") } else { "null".into() }
}

/// As [`exact`], of a number that came as f32 (JSON writes it in f32's shortest form too).
pub(super) fn exact_f32(value: f32) -> String {
    if value.is_finite() { format!("{value}") } else { "null".into() }
}

/// Three figures: `0.123`, `1.23`, `12.3`, `123`, `12,345`.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "no number".into(),
        a if a >= 99.95 => grouped(value.round()),
        a if a >= 9.995 => format!("{value:.1}"),
        a if a >= 0.9995 => format!("{value:.2}"),
        a if a >= 0.0005 => format!("{value:.3}"),
        a if a > 0.0 => format!("{value:.0e}"),
        _ => "0".into(),
    }
}

/// A whole number, its thousands apart.
pub(super) fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::from(if value < 0.0 { "-" } else { "" });
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A whole number as such, a mean in three figures.
pub(super) fn amount(value: f64) -> String {
    if value.fract() == 0.0 { grouped(value) } else { short(value) }
}

/// `part` in per cent of one.
pub(super) fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

/// `1 branch`, `3 branches`.
pub(super) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{} {}", grouped(n as f64), if n == 1 { one } else { many })
}

/// The first `max` characters, and a mark that there were more.
pub(super) fn clipped(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_string();
    }
    let mut out: String = text.chars().take(max.saturating_sub(1)).collect();
    out.push('\u{2026}');
    out
}

/// A table in a box that scrolls by itself where the page is narrower; the first column is text, the others numbers.
pub(super) fn table(head: &[&str], rows: Vec<Vec<String>>) -> El {
    let th = |s: &&str| El::new("th").attr("scope", "col").text(s);
    let row = |cells: Vec<String>| {
        let cell = |(i, c): (usize, String)| match i {
            0 => El::new("th").attr("scope", "row").text(&c),
            _ => El::new("td").text(&c),
        };
        El::new("tr").children(cells.into_iter().enumerate().map(cell))
    };
    let head = El::new("thead").child(El::new("tr").children(head.iter().map(th)));
    let body = El::new("tbody").children(rows.into_iter().map(row));
    let table = El::new("table").child(head).child(body);
    // A box that scrolls must be reachable by keyboard.
    El::new("div").class("scroll").attr("tabindex", 0).child(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_hostile_text_is_markup() {
        let text = "</script><b a=\"1\" c='2'>&amp;\u{0}\u{1b}[31m";
        let escaped = escape(text);
        assert!(!escaped.contains(['<', '>', '"', '\'', '\u{0}', '\u{1b}']), "{escaped}");
        assert_eq!(escape("&amp;"), "&amp;amp;");
        let el = El::new("p").attr("title", "a\"b").text("<i>");
        assert_eq!(el.to_string(), "<p title=\"a&quot;b\">&lt;i&gt;</p>");
    }

    #[test]
    fn only_shapes_close_themselves() {
        assert_eq!(El::new("td").to_string(), "<td></td>");
        assert_eq!(El::new("rect").at("x", -0.001).to_string(), "<rect x=\"0\"/>");
    }

    #[test]
    fn numbers_for_people() {
        let cases =
            [(0.0, "0"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (99.97, "100"), (1234567.0, "1,234,567")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
        assert_eq!((grouped(-1000.0), grouped(100.0)), ("-1,000".into(), "100".into()));
        assert_eq!((clipped("abcdef", 4), clipped("abc", 4)), ("abc\u{2026}".into(), "abc".into()));
    }

    #[test]
    fn numbers_for_machines_read_back() {
        for x in [0.1 + 0.2, 1e-300, 123456789.125] {
            assert_eq!(exact(x).parse(), Ok(x));
        }
        assert_eq!((exact(f64::NAN), exact_f32(0.1)), ("null".into(), "0.1".into()));
    }
}

//! Reads a report back: a page is XML but for its first line, so a small reader of elements is enough.

use std::collections::BTreeMap;

#[derive(Clone, Debug, Default)]
pub(crate) struct Element {
    pub(crate) name: String,
    attributes: BTreeMap<String, String>,
    pub(crate) children: Vec<Element>,
    /// Its own text, not that of its children.
    own_text: String,
}

/// Fails on anything that is not well-formed.
pub(crate) fn parse(html: &str) -> Element {
    let mut rest = html.strip_prefix("<!DOCTYPE html>\n").expect("no doctype");
    let mut open = vec![Element::default()];
    while let Some(at) = rest.find('<') {
        open.last_mut().unwrap().own_text += &unescape(&rest[..at]);
        let end = at + rest[at..].find('>').expect("a tag without an end");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            let element = open.pop().unwrap();
            assert_eq!(element.name, name, "closed by the wrong tag");
            open.last_mut().expect("closed more than was opened").children.push(element);
        } else {
            let element = element(tag.strip_suffix('/').unwrap_or(tag));
            if tag.ends_with('/') {
                open.last_mut().unwrap().children.push(element);
            } else {
                open.push(element);
            }
        }
    }
    assert_eq!((open.len(), rest), (1, "\n"), "left open: {:?}", open.last().map(|e| &e.name));
    let mut root = open.pop().unwrap();
    assert_eq!(root.children.len(), 1);
    root.children.pop().unwrap()
}

fn element(tag: &str) -> Element {
    let name_end = tag.find(' ').unwrap_or(tag.len());
    let mut element = Element { name: tag[..name_end].into(), ..Element::default() };
    let mut rest = &tag[name_end..];
    while let Some(attribute) = rest.strip_prefix(' ') {
        let (name, value) = attribute.split_once("=\"").expect("an attribute without a quoted value");
        let (value, after) = value.split_once('"').expect("an attribute without an end");
        assert!(element.attributes.insert(name.into(), unescape(value)).is_none(), "{name} twice in {tag}");
        rest = after;
    }
    assert!(rest.is_empty(), "{tag}");
    element
}

fn unescape(text: &str) -> String {
    let names = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&amp;", "&")];
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out += &rest[..at];
        rest = &rest[at..];
        let (name, c) = names.iter().find(|(name, _)| rest.starts_with(name)).expect("an unknown entity");
        out += c;
        rest = &rest[name.len()..];
    }
    out + rest
}

impl Element {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    pub(crate) fn attr(&self, name: &str) -> &str {
        self.get(name).unwrap_or_else(|| panic!("<{}> has no {name}: {:?}", self.name, self.attributes))
    }

    /// A number as it stands in the data; NaN for `null`.
    pub(crate) fn number(&self, name: &str) -> f64 {
        match self.attr(name) {
            "null" => f64::NAN,
            text => text.parse().unwrap_or_else(|e| panic!("{name}={text:?}: {e}")),
        }
    }

    /// Numbers with spaces or commas between them.
    pub(crate) fn numbers(&self, name: &str) -> Vec<f64> {
        self.attr(name).split([' ', ',']).map(|n| n.parse().unwrap()).collect()
    }

    /// All descendants that satisfy `is`, in the order of the page.
    pub(crate) fn all(&self, is: impl Fn(&Element) -> bool) -> Vec<&Element> {
        let mut out = Vec::new();
        let mut stack: Vec<&Element> = self.children.iter().rev().collect();
        while let Some(e) = stack.pop() {
            if is(e) {
                out.push(e);
            }
            stack.extend(e.children.iter().rev());
        }
        out
    }

    /// Descendants with an attribute.
    pub(crate) fn with(&self, name: &str) -> Vec<&Element> {
        self.all(|e| e.get(name).is_some())
    }

    pub(crate) fn named(&self, name: &str) -> Vec<&Element> {
        self.all(|e| e.name == name)
    }

    /// Figures of a kind.
    pub(crate) fn figures(&self, kind: &str) -> Vec<&Element> {
        self.all(|e| e.get("data-figure") == Some(kind))
    }

    /// The only figure of a kind.
    pub(crate) fn figure(&self, kind: &str) -> &Element {
        let figures = self.figures(kind);
        assert_eq!(figures.len(), 1, "figures {kind:?}");
        figures[0]
    }

    /// All text below, without style.
    pub(crate) fn text(&self) -> String {
        let mut out = if self.name == "style" { String::new() } else { self.own_text.clone() };
        for child in &self.children {
            out += &child.text();
            out.push(' ');
        }
        out
    }

    /// The part of the page with an id.
    pub(crate) fn section(&self, id: &str) -> &Element {
        let found = self.all(|e| e.name == "section" && e.get("id") == Some(id));
        assert_eq!(found.len(), 1, "section {id:?}");
        found[0]
    }
}

/// The scale of a plot, read from the plot: places back to numbers.
pub(crate) struct Scale([f64; 4]);

impl Scale {
    pub(crate) fn of(plot: &Element, axis: &str) -> Self {
        Self(plot.numbers(axis).try_into().unwrap())
    }

    /// The number at a place.
    pub(crate) fn value(&self, place: f64) -> f64 {
        let [lo, hi, from, to] = self.0;
        lo + (place - from) / (to - from) * (hi - lo)
    }

    /// The number that a length stands for.
    pub(crate) fn length(&self, pixels: f64) -> f64 {
        let [lo, hi, from, to] = self.0;
        pixels / (to - from) * (hi - lo)
    }

    /// What a hundredth of a pixel, to which places are rounded, can change.
    pub(crate) fn grain(&self) -> f64 {
        self.length(0.011).abs()
    }
}

//! The branch tree, one node a line, with why each ended; of many problems also how many ended how.

use std::collections::BTreeMap;

use super::bars::{Row, stacked};
use super::chosen::{Chosen, chosen};
use super::markup::{El, clipped, count, exact, grouped};
use super::plot::{Anchor, Figure, Series, WIDTH, fitted, label};
use super::{ReportData, Section};
use crate::engine::EndReason;
use crate::report::{BranchResult, NodeEnd, NodeResult, ProblemResult};

const ROW: f64 = 16.0;
/// Right edges of the columns: tokens, confidence, score.
const COLUMNS: [f64; 3] = [WIDTH - 84.0, WIDTH - 42.0, WIDTH];
/// Nodes drawn one by one, all trees together; the first tree is drawn whatever its size.
const MAX_ROWS: usize = 160;
/// Characters of a node's text below the figure.
const MAX_TEXT: usize = 400;

/// A node as it is drawn.
#[derive(Clone, Debug)]
struct Node<'a> {
    id: usize,
    parent: Option<usize>,
    depth: usize,
    tokens: usize,
    confidence: f64,
    score: Option<f64>,
    answer: Option<&'a str>,
    text: &'a str,
    /// Of the problem; 0 is the question itself.
    wording: usize,
    end: End,
}

/// Why a node ended: its name in the data, in words, and the node it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    key: &'static str,
    words: &'static str,
    /// In words that need no other node.
    kind: &'static str,
    other: Option<usize>,
}

impl From<NodeEnd> for End {
    fn from(end: NodeEnd) -> Self {
        let alone = |key, words| Self { key, words, kind: words, other: None };
        match end {
            NodeEnd::Expanded => alone("expanded", "went on"),
            NodeEnd::Answered => alone("answered", "answered"),
            NodeEnd::Length => alone("length", "token limit"),
            NodeEnd::Stopped => alone("stopped", "stopped early"),
            NodeEnd::Pruned => alone("pruned", "pruned"),
            NodeEnd::Failed => alone("failed", "not finite"),
            NodeEnd::Duplicate(of) => Self { key: "duplicate", words: "same as", kind: "duplicate", other: Some(of) },
            NodeEnd::Merged(into) => Self { key: "merged", words: "merged into", kind: "merged", other: Some(into) },
            NodeEnd::Aliased(to) => Self { key: "aliased", words: "took the KV of", kind: "aliased", other: Some(to) },
        }
    }
}

impl End {
    /// Of a branch that no tree was recorded for.
    fn of_branch(b: &BranchResult) -> Self {
        let other = |key, words| Self { key, words, kind: words, other: None };
        match b.ended {
            Some(EndReason::EndToken) => NodeEnd::Answered.into(),
            Some(EndReason::Length) => NodeEnd::Length.into(),
            Some(EndReason::Stopped) => NodeEnd::Stopped.into(),
            Some(EndReason::NonFinite) => NodeEnd::Failed.into(),
            Some(EndReason::Dropped) => other("dropped", "dropped between layers"),
            Some(EndReason::Context) => other("context", "end of the context"),
            Some(EndReason::Merged) => NodeEnd::Merged(b.merged_into.unwrap_or(b.branch)).into(),
            None => other("open", "still open"),
        }
    }
}

impl<'a> From<&'a NodeResult> for Node<'a> {
    fn from(n: &'a NodeResult) -> Self {
        Self {
            id: n.node,
            parent: n.parent,
            depth: n.depth,
            tokens: n.tokens,
            confidence: n.confidence,
            score: n.score,
            answer: n.answer.as_deref(),
            text: &n.text,
            wording: 0,
            end: n.ended.into(),
        }
    }
}

impl<'a> From<&'a BranchResult> for Node<'a> {
    fn from(b: &'a BranchResult) -> Self {
        Self {
            id: b.branch,
            parent: None,
            depth: 1,
            tokens: b.tokens.len(),
            confidence: b.confidence,
            score: b.score,
            answer: b.answer.as_deref(),
            text: &b.text,
            wording: b.wording,
            end: End::of_branch(b),
        }
    }
}

/// The recorded tree; without one, the branches below the problem.
fn nodes(r: &ProblemResult) -> Vec<Node<'_>> {
    if r.tree.is_empty() {
        r.branches.iter().map(Node::from).collect()
    } else {
        r.tree.iter().map(Node::from).collect()
    }
}

pub(super) fn section(data: &ReportData<'_>) -> Section {
    let mut section = Section::new("tree", "Branches, and why each ended");
    let any = |r: &ProblemResult| !r.branches.is_empty() || !r.tree.is_empty();
    if !data.problems.iter().any(any) {
        return section.absent("No branch was recorded.");
    }
    section.lead =
        "A line a node: its number, why it ended, and its answer, in bold where the problem's is the same. Behind it \
                    the tokens it generated itself, its confidence, and the verifier's score."
            .into();
    section.figures.push(ends(data.problems));
    let mut rows = 0;
    for problem in chosen(data.problems, any) {
        rows += nodes(problem.problem).len();
        if rows <= MAX_ROWS || section.figures.len() == 1 {
            section.figures.push(tree(problem));
        }
    }
    section
}

/// All nodes below the roots of all problems by why they ended, a shade per depth.
fn ends(problems: &[ProblemResult]) -> Figure {
    const DEPTHS: [Series; 5] = [
        Series { key: "1", words: "depth 1", colour: "d1" },
        Series { key: "2", words: "depth 2", colour: "d2" },
        Series { key: "3", words: "depth 3", colour: "d3" },
        Series { key: "4", words: "depth 4", colour: "d4" },
        Series { key: "5", words: "deeper", colour: "d5" },
    ];
    let mut counts: BTreeMap<&str, (&str, [usize; 5])> = BTreeMap::new();
    let mut deepest = 1;
    for n in problems.iter().flat_map(nodes).filter(|n| n.depth > 0) {
        let level = n.depth.clamp(1, 5);
        deepest = deepest.max(level);
        counts.entry(n.end.key).or_insert((n.end.kind, [0; 5])).1[level - 1] += 1;
    }
    let mut rows: Vec<(&str, &str, [usize; 5])> = counts.into_iter().map(|(k, (w, n))| (k, w, n)).collect();
    rows.sort_by_key(|r| std::cmp::Reverse(r.2.iter().sum::<usize>()));
    let row = |(key, words, n): &(&str, &str, [usize; 5])| {
        let total: usize = n.iter().sum();
        Row {
            name: words.to_string(),
            title: format!("{words}: {total}"),
            values: n[..deepest].iter().map(|&n| n as f64).collect(),
            end: grouped(total as f64),
            data: vec![("end", key.to_string()), ("total", total.to_string())],
        }
    };
    let shades = if deepest > 1 { ", stronger nearer to the root" } else { "" };
    let note = format!("Nodes of {} by why they ended{shades}.", count(problems.len(), "problem", "problems"));
    let mut figure = Figure::new("tree-ends", "All problems", note);
    stacked(&mut figure, &DEPTHS[..deepest], &rows.iter().map(row).collect::<Vec<_>>());
    figure
}

fn tree(chosen: Chosen<'_>) -> Figure {
    let r = chosen.problem;
    let nodes = order(nodes(r));
    let answer = r.answer.as_deref().map_or("no answer".into(), |a| format!("answer {}", clipped(a, 40)));
    let verdict = match r.correct {
        Some(true) => ", right".to_string(),
        Some(false) => format!(", expected {}", clipped(r.expected.as_deref().unwrap_or("another"), 40)),
        None => String::new(),
    };
    let mut figure = Figure::new("tree", chosen.title(), format!("{answer}{verdict}.")).of_problem(&r.id);
    let deepest = nodes.iter().map(|n| n.depth).max().unwrap_or(1);
    let layout = Layout { indent: (90.0 / deepest as f64).min(16.0), answer: r.answer.as_deref() };
    for (x, head) in COLUMNS.into_iter().zip(["tokens", "conf.", "score"]) {
        figure.add(label(x, 10.0, Anchor::End, head).class("tick"));
    }
    // Below an unrecorded root, the problem itself stands for it.
    let rooted = nodes.iter().any(|n| n.depth == 0);
    if !rooted {
        figure.add(El::new("circle").class("node expanded").at("cx", 5.0).at("cy", 8.0).attr("r", 3.5));
        figure.add(label(14.0, 12.0, Anchor::Start, "problem"));
    }
    let top = if rooted { 14.0 } else { 16.0 };
    let mut ys: BTreeMap<usize, f64> = BTreeMap::new();
    for (i, n) in nodes.iter().enumerate() {
        let y = top + ROW * i as f64 + ROW / 2.0;
        let from = n.parent.and_then(|p| ys.get(&p)).copied().unwrap_or(8.0);
        figure.add(layout.node(n, y, from));
        ys.insert(n.id, y);
    }
    figure.height = top + ROW * nodes.len() as f64 + 4.0;
    figure.more = Some(texts(&nodes));
    figure
}

/// Depth first, siblings in their order. Nodes whose parent is not there come where they stand.
fn order(nodes: Vec<Node<'_>>) -> Vec<Node<'_>> {
    let known: std::collections::BTreeSet<usize> = nodes.iter().map(|n| n.id).collect();
    let parent = |n: &Node<'_>| n.parent.filter(|p| known.contains(p) && *p != n.id);
    let mut children: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (i, n) in nodes.iter().enumerate() {
        children.entry(parent(n)).or_default().push(i);
    }
    let mut out = Vec::with_capacity(nodes.len());
    let mut stack: Vec<usize> = children.remove(&None).unwrap_or_default();
    stack.reverse();
    while let Some(i) = stack.pop() {
        out.push(nodes[i].clone());
        // Taken out, so that no node is drawn twice whatever the record says.
        stack.extend(children.remove(&Some(nodes[i].id)).unwrap_or_default().into_iter().rev());
    }
    out
}

struct Layout<'a> {
    /// Pixels a level.
    indent: f64,
    /// The problem's answer.
    answer: Option<&'a str>,
}

impl Layout<'_> {
    fn node(&self, n: &Node<'_>, y: f64, parent_y: f64) -> El {
        let x = 5.0 + self.indent * n.depth as f64;
        let mut g = El::new("g").class("row").attr("data-node", n.id).attr("data-depth", n.depth);
        g = g.attr("data-end", n.end.key).attr("data-tokens", n.tokens).data("confidence", n.confidence);
        for (name, number) in [("parent", n.parent), ("other", n.end.other)] {
            if let Some(number) = number {
                g = g.attr(&format!("data-{name}"), number);
            }
        }
        if let Some(score) = n.score {
            g = g.data("score", score);
        }
        if let Some(answer) = n.answer {
            g = g.attr("data-answer", answer);
        }
        if n.wording > 0 {
            g = g.attr("data-wording", n.wording);
        }
        g = g.title(&format!("{} {}: {}", n.id, n.end.words, clipped(n.text.trim(), MAX_TEXT)));
        if n.depth > 0 {
            let stem = x - self.indent;
            let points = format!("{stem},{} {stem},{y} {},{y}", parent_y + 4.0, x - 4.0);
            g = g.child(El::new("polyline").class("edge").attr("points", points));
        }
        g = g.child(mark(n.end.key, x, y));
        let numbers = [Some(grouped(n.tokens as f64)), finite(n.confidence), n.score.and_then(finite)];
        for (right, text) in COLUMNS.into_iter().zip(numbers) {
            g = g.children(text.map(|t| label(right, y + 4.0, Anchor::End, &t).class("number")));
        }
        let class = if n.answer.is_some() && n.answer == self.answer { "strong" } else { "" };
        let from = x + 9.0;
        let words = fitted(&words(n), (COLUMNS[0] - 30.0 - from) / if class.is_empty() { 1.0 } else { 1.1 });
        g.child(label(from, y + 4.0, Anchor::Start, &words).class(class))
    }
}

fn finite(x: f64) -> Option<String> {
    x.is_finite().then(|| format!("{x:.3}"))
}

fn words(n: &Node<'_>) -> String {
    let mut words = format!("{}  {}", n.id, n.end.words);
    if let Some(other) = n.end.other {
        words += &format!(" {other}");
    }
    if let Some(answer) = n.answer {
        words += &format!(": {}", clipped(answer, 24));
    }
    if n.wording > 0 {
        words += &format!(" (wording {})", n.wording);
    }
    words
}

/// A shape for each way to end, so that none depends on its colour alone.
fn mark(end: &str, x: f64, y: f64) -> El {
    let class = format!("node {end}");
    let path = |d: String| El::new("path").class(&class).attr("d", d);
    match end {
        "expanded" | "answered" | "open" => El::new("circle").class(&class).at("cx", x).at("cy", y).attr("r", 3.5),
        "pruned" | "failed" | "dropped" => path(format!("M{} {}l7 7m0 -7l-7 7", x - 3.5, y - 3.5)),
        "duplicate" | "merged" | "aliased" => path(format!("M{x} {}l4 4l-4 4l-4 -4z", y - 4.0)),
        _ => El::new("rect").class(&class).at("x", x - 3.5).at("y", y - 3.5).attr("width", 7).attr("height", 7),
    }
}

/// What the nodes say, folded away.
fn texts(nodes: &[Node<'_>]) -> El {
    let item = |n: &Node<'_>| {
        let head = format!("{} ({} tokens, confidence {}) ", n.id, n.tokens, exact((n.confidence * 1e3).round() / 1e3));
        let text = El::new("span").class("said").text(&clipped(n.text.trim(), MAX_TEXT));
        El::new("li").child(El::new("b").text(&head)).child(text)
    };
    El::new("details")
        .child(El::new("summary").text("What they said"))
        .child(El::new("ul").children(nodes.iter().map(item)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: usize, parent: Option<usize>) -> Node<'static> {
        let end = NodeEnd::Pruned.into();
        Node { id, parent, depth: 1, tokens: 0, confidence: 0.0, score: None, answer: None, text: "", wording: 0, end }
    }

    #[test]
    fn nodes_come_depth_first_and_never_twice() {
        let ids = |nodes: Vec<Node<'_>>| order(nodes).iter().map(|n| n.id).collect::<Vec<_>>();
        let nodes = vec![node(0, None), node(1, Some(0)), node(2, Some(0)), node(3, Some(1)), node(4, Some(99))];
        assert_eq!(ids(nodes), [0, 1, 3, 2, 4]);
        // A record that contradicts itself is not followed in circles.
        assert_eq!(ids(vec![node(0, None), node(1, Some(2)), node(2, Some(1)), node(3, Some(3))]), [0, 3]);
    }
}

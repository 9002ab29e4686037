//! What SVG files of their own share: style, colours, the frame, marks of claims.

use super::markup::{El, coordinate};

const STYLE: &str = "text { font: 11px system-ui, sans-serif; fill: #1c1c1c; } .tick, .note { fill: #5a5a5a; } \
                     .title { font-size: 14px; font-weight: 600; } .grid { stroke: #e3e3e3; stroke-width: 0.7; } \
                     .axis { stroke: #8a8a8a; stroke-width: 0.8; }";
/// Colours that stay apart for the colour-blind.
pub(super) const COLOURS: [&str; 9] =
    ["#0072b2", "#e08a00", "#009e73", "#b5609a", "#7a7a7a", "#56b4e9", "#b3261e", "#5a4fcf", "#8a6d00"];

/// The file's text: marks on white.
pub(super) fn sheet([width, height]: [f64; 2], marks: Vec<El>) -> String {
    let svg = El::new("svg")
        .attr("xmlns", "http://www.w3.org/2000/svg")
        .attr("viewBox", format!("0 0 {width} {height}"))
        .attr("width", width)
        .attr("height", height)
        .child(El::new("style").verbatim(STYLE))
        .child(El::new("rect").attr("width", "100%").attr("height", "100%").attr("fill", "#ffffff"))
        .children(marks);
    format!("{svg}\n")
}

/// Around a point, empty.
pub(super) fn diamond(cx: f64, cy: f64, colour: &str) -> El {
    let corner = |dx: f64, dy: f64| format!("{},{}", coordinate(cx + dx), coordinate(cy + dy));
    let points = [corner(0.0, -5.0), corner(5.0, 0.0), corner(0.0, 5.0), corner(-5.0, 0.0)].join(" ");
    El::new("polygon").attr("points", points).attr("fill", "#ffffff").attr("stroke", colour).attr("stroke-width", 1.3)
}

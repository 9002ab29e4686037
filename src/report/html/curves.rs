//! Curves side by side as one SVG file of its own, for tables that a README can show.

use super::markup::{El, coordinate};
use super::plot::{Anchor, FONT, Scale, WIDTH, axis_x, axis_y, label, line, text_width};

/// Left and right border, top, and height of the plots.
const PLOT: [f64; 4] = [40.0, WIDTH - 12.0, 44.0, 190.0];
/// Between two panels.
const GAP: f64 = 20.0;
const STYLE: &str = "text { font: 11px system-ui, sans-serif; fill: #1c1c1c; } .tick { fill: #5a5a5a; } \
                     .name { font-weight: 600; } .grid { stroke: #d9d9d9; stroke-width: 0.7; }";
/// Colours that stay apart for the colour-blind.
const COLOURS: [&str; 6] = ["#0072b2", "#e08a00", "#009e73", "#b5609a", "#5a5a5a", "#b3261e"];

/// One line of a panel.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name in the key.
    pub name: String,
    /// Ascending in x. Points that are no numbers are left out.
    pub points: Vec<[f64; 2]>,
    /// Drawn broken: what the others are compared with.
    pub is_dashed: bool,
}

/// Curves over one pair of axes.
#[derive(Clone, Debug)]
pub struct Panel {
    /// What is drawn.
    pub title: String,
    /// What runs to the right, with its unit.
    pub x: String,
    /// What runs upwards, with its unit.
    pub y: String,
    /// Ends of the vertical axis; the horizontal one spans the points.
    pub range: [f64; 2],
    /// In the order of the key.
    pub curves: Vec<Curve>,
}

/// The panels from left to right.
pub fn render_curves(panels: &[Panel]) -> String {
    let keys = panels.iter().map(|p| p.curves.len()).max().unwrap_or(0);
    let height = PLOT[2] + PLOT[3] + 36.0 + 15.0 * keys as f64 + 6.0;
    let width = panels.len() as f64 * (WIDTH + GAP) - GAP + 16.0;
    let groups = panels.iter().enumerate().map(|(i, p)| {
        let shift = format!("translate({} 8)", coordinate(8.0 + i as f64 * (WIDTH + GAP)));
        El::new("g").attr("transform", shift).children(panel(p))
    });
    let svg = El::new("svg")
        .attr("xmlns", "http://www.w3.org/2000/svg")
        .attr("viewBox", format!("0 0 {} {}", coordinate(width), coordinate(height + 8.0)))
        .attr("width", coordinate(width))
        .attr("height", coordinate(height + 8.0))
        .child(El::new("style").verbatim(STYLE))
        .child(El::new("rect").attr("width", "100%").attr("height", "100%").attr("fill", "#ffffff"))
        .children(groups);
    format!("{svg}\n")
}

fn panel(p: &Panel) -> Vec<El> {
    let [left, right, top, height] = PLOT;
    let bottom = top + height;
    let sound = || p.curves.iter().flat_map(|c| &c.points).filter(|q| q.iter().all(|v| v.is_finite()));
    let span = sound().fold([f64::INFINITY, f64::NEG_INFINITY], |[lo, hi], q| [lo.min(q[0]), hi.max(q[0])]);
    let (x, y) = (Scale::new(span, [left, right]), Scale::new(p.range, [bottom, top]));
    let mut out = vec![label(0.0, 12.0, Anchor::Start, &p.title).class("name"), label(0.0, 30.0, Anchor::Start, &p.y)];
    out.extend(axis_x(&x, &x.ticks(5), top, bottom));
    out.extend(axis_y(&y, &y.ticks(5), left, right));
    out.push(line("grid", [left, bottom], [right, bottom]));
    out.push(label(right, bottom + 28.0, Anchor::End, &p.x));
    for (i, c) in p.curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        out.push(stroke(&c.points, &x, &y, colour, c.is_dashed));
        if !c.is_dashed {
            let dots = c.points.iter().filter(|q| q.iter().all(|v| v.is_finite()) && c.points.len() <= 20);
            out.extend(dots.map(|q| {
                El::new("circle").at("cx", x.at(q[0])).at("cy", y.at(q[1])).at("r", 2.2).attr("fill", colour)
            }));
        }
        let at = bottom + 36.0 + 15.0 * i as f64;
        let swatch = [[0.0, at], [18.0, at]];
        let unit = Scale::new([0.0, 1.0], [0.0, 1.0]);
        out.push(stroke(&swatch, &unit, &unit, colour, c.is_dashed));
        out.push(label(24.0, at + FONT / 3.0, Anchor::Start, &c.name));
        debug_assert!(24.0 + text_width(&c.name) <= 2.0 * WIDTH, "{}", c.name);
    }
    out
}

fn stroke(points: &[[f64; 2]], x: &Scale, y: &Scale, colour: &str, is_dashed: bool) -> El {
    let at = |q: &[f64; 2]| format!("{},{}", coordinate(x.at(q[0])), coordinate(y.at(q[1])));
    let sound = points.iter().filter(|q| q.iter().all(|v| v.is_finite()));
    let line = El::new("polyline")
        .attr("points", sound.map(at).collect::<Vec<_>>().join(" "))
        .attr("fill", "none")
        .attr("stroke", colour)
        .attr("stroke-width", 1.6);
    if is_dashed { line.attr("stroke-dasharray", "5 3") } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_land_where_the_axes_say() {
        let curve = |name: &str, is_dashed| Curve {
            name: name.into(),
            points: vec![[0.5, 0.0], [0.75, f64::NAN], [1.0, 100.0]],
            is_dashed,
        };
        let panel = Panel {
            title: "a < b".into(),
            x: "tau".into(),
            y: "%".into(),
            range: [0.0, 100.0],
            curves: vec![curve("one", false), curve("base", true)],
        };
        let svg = render_curves(&[panel.clone(), panel]);
        // From the left bottom corner of the plot to its right top corner; what is no number is not drawn.
        assert_eq!(svg.matches("points=\"40,234 324,44\"").count(), 4, "{svg}");
        assert_eq!((svg.matches("<circle").count(), svg.matches("stroke-dasharray").count()), (4, 4));
        assert!(svg.contains("a &lt; b") && svg.starts_with("<svg xmlns=") && !svg.contains("NaN"));
    }
}

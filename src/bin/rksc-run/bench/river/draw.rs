//! The rows of `accuracy` as a picture.

use rksc::report::html::{DepthPanel, DepthPlot, DepthPoint, DepthSeries, DepthStyle, render_depths};

use super::score::{Kind, Row};

/// Right answers and KL against the depth: a line for fixed exits, dots for bounds, marks for the whole model in codes, a
/// band for the backbone.
pub(super) fn accuracy(rows: &[Row], note: String) -> String {
    let right = |r: &Row| {
        let interval = Some(r.paired.interval.map(|x| x * 100.0));
        Some(DepthPoint { depth: r.mean_depth, value: r.paired.share() * 100.0, interval })
    };
    let kl = |r: &Row| {
        let forced = r.forced.as_ref()?;
        Some(DepthPoint { depth: r.depth_when_forced(), value: forced.kl, interval: None })
    };
    let backbone = rows.iter().find(|r| r.kind == Kind::Backbone);
    let band = backbone.map(|r| (r.paired.share() * 100.0, r.paired.interval.map(|x| x * 100.0)));
    let panel = |y: &str, log, backbone, point: &dyn Fn(&Row) -> Option<DepthPoint>| DepthPanel {
        y: y.into(),
        log,
        backbone,
        series: series(rows, point),
    };
    render_depths(&DepthPlot {
        title: "Early exit into a 4-bit copy".into(),
        note,
        x: "layers of the backbone that a generated token goes through, in the mean".into(),
        num_layers: backbone.map_or(1.0, |r| r.mean_depth),
        panels: vec![
            panel("% of the problems right, with 95 % intervals", false, band, &right),
            panel("KL(backbone || arm) of the next token, nats, the same tokens given (log scale)", true, None, &kl),
        ],
    })
}

fn series(rows: &[Row], point: &dyn Fn(&Row) -> Option<DepthPoint>) -> Vec<DepthSeries> {
    let mut out: Vec<DepthSeries> = Vec::new();
    for r in rows {
        let (name, style) = match r.kind {
            Kind::Fixed => ("after a fixed layer".into(), DepthStyle::Line),
            Kind::Tau => ("by the cosine (tau)".into(), DepthStyle::Dots),
            Kind::Whole | Kind::Refresh => (r.arm.clone(), DepthStyle::Mark),
            Kind::Backbone | Kind::Draft => continue,
        };
        let Some(point) = point(r) else { continue };
        match out.iter_mut().find(|s| s.name == name) {
            Some(series) => series.points.push(point),
            None => out.push(DepthSeries { name, style, points: vec![point] }),
        }
    }
    out.iter_mut().for_each(|s| s.points.sort_by(|a, b| a.depth.total_cmp(&b.depth)));
    out
}

//! What follows from the rows, in plain words.

use super::CLAIM;
use super::score::{Kind, Row};

/// What K and V of a token that left must keep of the backbone's, in the mean.
const MIN_COSINE: f64 = 0.97;
/// Share of KL that makes no difference.
const MARGIN: f64 = 0.05;

pub(super) fn all(rows: &[Row], num_layers: usize) -> Vec<String> {
    let mut out: Vec<String> = rows.iter().filter_map(cosines).collect();
    out.extend(exits(rows, num_layers));
    out.extend(speeds(rows));
    out
}

/// Acceptance test RV11, of the exits after 2 and 4 layers.
fn cosines(row: &Row) -> Option<String> {
    let forced = row.forced.as_ref().filter(|_| ["fixed=2", "fixed=4"].contains(&row.arm.as_str()))?;
    let (k, v) = (mean(&forced.k_cosine), mean(&forced.v_cosine));
    let verdict = if k > MIN_COSINE && v > MIN_COSINE { "yes" } else { "no" };
    let by_layer = |of: &[f64]| of.iter().map(|x| format!("{x:.4}")).collect::<Vec<_>>().join(" ");
    Some(format!(
        "{}: K and V like the backbone's, mean cosine above {MIN_COSINE}: {verdict} (K {k:.4}, V {v:.4}); layer by layer K \
         {}; V {}",
        row.arm,
        by_layer(&forced.k_cosine),
        by_layer(&forced.v_cosine)
    ))
}

/// Acceptance test RV15: each bound against fixed exits that leave at the same depth in the mean.
fn exits(rows: &[Row], num_layers: usize) -> Vec<String> {
    let fixed = || rows.iter().filter(|r| r.kind == Kind::Fixed);
    let mut kl: Vec<[f64; 2]> = fixed().filter_map(|r| Some([r.mean_depth, r.forced.as_ref()?.kl])).collect();
    kl.push([num_layers as f64, 0.0]);
    let backbone = rows.iter().find(|r| r.kind == Kind::Backbone).map(|r| [num_layers as f64, r.paired.share()]);
    let right: Vec<[f64; 2]> = fixed().map(|r| [r.mean_depth, r.paired.share()]).chain(backbone).collect();
    let (mut out, mut all) = (Vec::new(), Vec::new());
    for r in rows.iter().filter(|r| r.kind == Kind::Tau) {
        let Some(forced) = &r.forced else { continue };
        let (Some(kl), Some(right)) = (between(&kl, forced.mean_depth), between(&right, r.mean_depth)) else {
            continue;
        };
        let [tau_right, right] = [r.paired.share(), right].map(|share| share * 100.0);
        out.push(format!(
            "{} against fixed exits at its depth: KL {:.2e} against {kl:.2e} at {:.2} layers; right {tau_right:.1} % against \
             {right:.1} % at {:.2}",
            r.arm, forced.kl, forced.mean_depth, r.mean_depth,
        ));
        all.push(([forced.kl, kl], tau_right - right));
    }
    let [tau, fixed] = [0, 1].map(|i| all.iter().map(|(kl, _)| kl[i]).sum::<f64>());
    let points = mean(&all.iter().map(|(_, points)| *points).collect::<Vec<_>>());
    if fixed > 0.0 {
        out.push(format!(
            "at equal depth {} ({:+.0} % KL and {points:+.1} points right, over {} bounds)",
            verdict(tau / fixed),
            (tau / fixed - 1.0) * 100.0,
            all.len()
        ));
    }
    out
}

/// In words, of the KL of bounds over that of fixed exits.
fn verdict(ratio: f64) -> &'static str {
    match ratio {
        r if r > 1.0 + MARGIN => "tau is worse: use fixed",
        r if r < 1.0 - MARGIN => "tau is better than fixed",
        _ => "tau is no better and no worse: use fixed, which looks at nothing",
    }
}

/// The curve's value, straight between its points: what tokens of which some leave at the one depth and some at the other
/// have in the mean. `None` beside the curve.
fn between(curve: &[[f64; 2]], x: f64) -> Option<f64> {
    let mut sorted = curve.to_vec();
    sorted.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let above = sorted.iter().position(|p| p[0] >= x)?;
    let [x1, y1] = sorted[above];
    match above.checked_sub(1).map(|i| sorted[i]) {
        Some([x0, y0]) => Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0)),
        None => (x1 == x).then_some(y1),
    }
}

fn speeds(rows: &[Row]) -> Option<String> {
    let fastest = |kinds: &[Kind]| {
        let of = rows.iter().filter(|r| kinds.contains(&r.kind));
        of.max_by(|a, b| a.rates.speed_up().total_cmp(&b.rates.speed_up()))
    };
    let words = |r: &Row| format!("{:.2} times by {} (depth {:.1})", r.rates.speed_up(), r.arm, r.mean_depth);
    let (exit, whole) = (fastest(&[Kind::Tau, Kind::Fixed])?, fastest(&[Kind::Whole])?);
    let verdict = if exit.rates.speed_up() >= CLAIM[0] { "met" } else { "not met" };
    Some(format!(
        "the paper's {} to {} times the backbone's tokens/s (Llama models, an A40, 3 to 4 layers deep): here at most {}: \
         {verdict}; the whole model in codes {}",
        CLAIM[0],
        CLAIM[1],
        words(exit),
        words(whole)
    ))
}

pub(super) fn mean(of: &[f64]) -> f64 {
    of.iter().sum::<f64>() / of.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_straight_between_their_points_and_end_with_them() {
        let curve = [[8.0, 0.0], [0.0, 4.0], [2.0, 1.0]];
        assert_eq!([0.0, 1.0, 2.0, 5.0, 8.0].map(|x| between(&curve, x)), [4.0, 2.5, 1.0, 0.5, 0.0].map(Some));
        assert_eq!((between(&curve, -0.1), between(&curve, 8.1), between(&[], 1.0)), (None, None, None));
    }
}

//! HQQ: the zero of a group moves to where most weights fit best, a few outliers left out of account.
//!
//! Half-quadratic splitting of `min sum |W - Wr - E|^2 + |E|_p`: E takes what is large of the residual, the zero the mean
//! of the rest. Only the zero moves; the scale is the one of rounding to nearest, and so is the start.

use half::f16;

use super::rows::GroupSink;
use super::rtn::{Grid, range};

/// The norm of E.
const LP: f32 = 0.7;
/// Weight of E's part at the start.
const BETA: f32 = 10.0;
/// What the weight grows by in each iteration.
const KAPPA: f32 = 1.01;
const ITERATIONS: usize = 20;

/// Chooses a grid for every group of some rows, and rounds.
pub(super) fn quantise(rows: &[f32], sink: &mut GroupSink<'_>) {
    for (index, w) in rows.chunks(sink.group).enumerate() {
        let (min, max) = range(w);
        let grid = solve(w, Grid::asymmetric(min, max));
        sink.put(index, &grid, w.iter().map(|&w| grid.nearest(w)));
    }
}

/// The best grid on the way from `start`, which it never is worse than in mean |W - Wr|.
fn solve(w: &[f32], start: Grid) -> Grid {
    let (mut grid, mut best, mut best_error) = (start, start, f32::INFINITY);
    let mut beta = BETA;
    for _ in 0..=ITERATIONS {
        let fit = Fit::of(w, &grid);
        if fit.sum_abs >= best_error {
            break;
        }
        (best, best_error) = (grid, fit.sum_abs);
        // shrink(x) is 0 up to here: |x| = |x|^(p-1) / beta.
        let spared = beta.powf(-1.0 / (2.0 - LP));
        let outliers = if fit.max_abs > spared { sum_of_outliers(w, &grid, beta) } else { 0.0 };
        let zero = f16::from_f32((fit.sum_zero + grid.steps(outliers)) / w.len() as f32);
        if !zero.is_finite() {
            break;
        }
        grid = grid.with_zero(zero.to_f32());
        beta *= KAPPA;
    }
    best
}

/// How a grid fits weights; sums in a fixed order.
struct Fit {
    /// Sum of |W - Wr|.
    sum_abs: f32,
    /// The largest of them.
    max_abs: f32,
    /// Sum of code - W / scale.
    sum_zero: f32,
}

impl Fit {
    fn of(w: &[f32], grid: &Grid) -> Self {
        let (mut sum_abs, mut max_abs, mut sum_zero) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
        for eight in w.as_chunks::<8>().0 {
            for (i, &w) in eight.iter().enumerate() {
                let code = grid.nearest(w);
                let residual = (w - grid.value(code)).abs();
                sum_abs[i] += residual;
                max_abs[i] = max_abs[i].max(residual);
                sum_zero[i] += code - grid.steps(w);
            }
        }
        Self {
            sum_abs: sum_abs.iter().sum(),
            max_abs: max_abs.into_iter().fold(0.0, f32::max),
            sum_zero: sum_zero.iter().sum(),
        }
    }
}

/// Sum of E.
fn sum_of_outliers(w: &[f32], grid: &Grid, beta: f32) -> f32 {
    w.iter().map(|&w| shrink(w - grid.value(grid.nearest(w)), beta)).sum()
}

/// `sign(x) relu(|x| - |x|^(p-1) / beta)`: the minimiser of the p-norm's part.
fn shrink(x: f32, beta: f32) -> f32 {
    let size = x.abs();
    (size - size.powf(LP - 1.0) / beta).max(0.0).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    fn mean_abs_error(w: &[f32], grid: &Grid) -> f32 {
        w.iter().map(|&w| (w - grid.value(grid.nearest(w))).abs()).sum::<f32>() / w.len() as f32
    }

    /// RV9, at scales below and above where outliers are set aside.
    #[test]
    fn no_group_is_worse_than_rounding_and_most_are_better() {
        let mut fill = Fill::new(11);
        for (scale, at_least) in [(0.02, 60), (1.0, 60), (20.0, 10)] {
            let (mut better, mut moved) = (0, 0);
            for _ in 0..200 {
                let mut w = fill.normals(64, scale);
                w.iter_mut().for_each(|w| {
                    if fill.below(50) == 0 {
                        *w *= 8.0
                    }
                });
                let (min, max) = range(&w);
                let start = Grid::asymmetric(min, max);
                let solved = solve(&w, start);
                assert_eq!(solved.scale, start.scale);
                assert_eq!(f16::from_f32(solved.zero).to_f32(), solved.zero);
                let (rtn, hqq) = (mean_abs_error(&w, &start), mean_abs_error(&w, &solved));
                assert!(hqq <= rtn * (1.0 + 1e-5), "{hqq} over {rtn}");
                better += usize::from(hqq < 0.999 * rtn);
                moved += usize::from(solved.zero != start.zero);
            }
            assert!(better > at_least && moved >= better, "{better} better, {moved} moved at {scale}");
        }
    }

    #[test]
    fn shrink_spares_small_residuals() {
        let spared = BETA.powf(-1.0 / (2.0 - LP));
        assert_eq!(shrink(0.99 * spared, BETA), 0.0);
        assert_eq!(shrink(0.0, BETA), 0.0);
        assert!(shrink(1.1 * spared, BETA) > 0.0 && shrink(-1.1 * spared, BETA) < 0.0);
        // 2 - 2^-0.3 / 10
        assert!((shrink(2.0, BETA) - 1.918_774_8).abs() < 1e-6);
    }

    #[test]
    fn odd_groups_end_finite() {
        for w in [[0.0; 32], [0.3; 32], [-7.0; 32], [f32::MAX; 32], [1e-9; 32]] {
            let (min, max) = range(&w);
            let solved = solve(&w, Grid::asymmetric(min, max));
            assert!(solved.zero.is_finite() && w.iter().all(|&w| solved.value(solved.nearest(w)).is_finite()));
        }
    }
}

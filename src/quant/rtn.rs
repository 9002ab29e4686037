//! Rounding to nearest, on the grid that a group's scale and zero span.

use half::f16;

use super::rows::GroupSink;
use super::{CodeBits, ZeroKind};

/// The numbers a group can hold: `(code - zero) * scale` for the codes from `lo` to `hi`. Scale and zero are as they
/// are stored, so that codes are made with what they will be read with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Grid {
    pub(super) scale: f16,
    pub(super) zero: f32,
    step: f32,
    per_step: f32,
    lo: f32,
    hi: f32,
}

/// Adding it to a number below 2^22 rounds to a whole one, ties to even.
const ROUNDER: f32 = (3 << 22) as f32;

impl Grid {
    /// 4 bits over `min..=max`, widened to hold 0, which is a code of its own: weights that are 0 stay 0.
    pub(super) fn asymmetric(min: f32, max: f32) -> Self {
        let (min, max) = (min.min(0.0), max.max(0.0));
        let hi = CodeBits::W4.max_code() as f32;
        let scale = max / hi - min / hi;
        let grid = Self::new(stored_scale(scale), 0.0, 0.0, hi);
        // Where f16 cannot hold the scale, codes are cut at both ends alike.
        grid.with_zero((-min / scale.max(grid.step)).clamp(0.0, hi).round_ties_even())
    }

    /// 8 bits over `-max_abs..=max_abs`: codes 1 to 255 around 128.
    pub(super) fn symmetric(max_abs: f32) -> Self {
        let middle = (CodeBits::W8.max_code() / 2 + 1) as f32;
        Self::new(stored_scale(max_abs / (middle - 1.0)), middle, 1.0, 2.0 * middle - 1.0)
    }

    fn new(scale: f16, zero: f32, lo: f32, hi: f32) -> Self {
        let step = scale.to_f32();
        Self { scale, zero, step, per_step: 1.0 / step, lo, hi }
    }

    /// The grid with its zero elsewhere.
    pub(super) fn with_zero(self, zero: f32) -> Self {
        Self { zero, ..self }
    }

    /// `w` in steps, unrounded and from 0.
    pub(super) fn steps(&self, w: f32) -> f32 {
        w * self.per_step
    }

    /// The code nearest to `w`, a whole number.
    pub(super) fn nearest(&self, w: f32) -> f32 {
        (self.steps(w) + self.zero).clamp(self.lo, self.hi) + ROUNDER - ROUNDER
    }

    /// What a code stands for.
    pub(super) fn value(&self, code: f32) -> f32 {
        (code - self.zero) * self.step
    }
}

/// `scale` in f16: never 0, never infinite, and where f16 is coarse never below `scale`, so that no range is cut.
/// A group without range has scale 1.
fn stored_scale(scale: f32) -> f16 {
    if scale == 0.0 {
        return f16::ONE;
    }
    let nearest = f16::from_f32(scale);
    if nearest.is_infinite() {
        return f16::MAX;
    }
    let coarse = nearest < f16::MIN_POSITIVE;
    if coarse && nearest.to_f32() < scale { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}

/// Smallest and largest of some weights.
pub(super) fn range(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &w| (min.min(w), max.max(w)))
}

/// Rounds rows, group by group.
pub(super) fn quantise(rows: &[f32], sink: &mut GroupSink<'_>) {
    for (index, w) in rows.chunks(sink.group).enumerate() {
        let (min, max) = range(w);
        let grid = match sink.zero_kind {
            ZeroKind::None => Grid::symmetric(max.max(-min)),
            ZeroKind::Integer | ZeroKind::Fractional => Grid::asymmetric(min, max),
        };
        sink.put(index, &grid, w.iter().map(|&w| grid.nearest(w)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    fn asymmetric(w: &[f32]) -> (Grid, Vec<f32>, Vec<f32>) {
        let (min, max) = range(w);
        let grid = Grid::asymmetric(min, max);
        let codes: Vec<f32> = w.iter().map(|&w| grid.nearest(w)).collect();
        let values = codes.iter().map(|&c| grid.value(c)).collect();
        (grid, codes, values)
    }

    /// RV8.
    #[test]
    fn a_known_group_has_its_known_codes() {
        let (grid, codes, values) = asymmetric(&[-0.8, -0.31, 0.02, 0.4, 0.71, 1.2, -0.05, 0.9]);
        assert_eq!(grid.scale, f16::from_f32(2.0 / 15.0));
        assert_eq!(grid.zero, 6.0);
        assert_eq!(codes, [0.0, 4.0, 6.0, 9.0, 11.0, 15.0, 6.0, 13.0]);
        let expected = [-0.8, -0.26667, 0.0, 0.4, 0.66667, 1.2, 0.0, 0.93333];
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 5e-4, "{value} for {expected}");
        }
    }

    #[test]
    fn odd_groups_stay_within_a_step() {
        let groups: [&[f32]; 7] = [
            &[0.0; 8],
            &[0.25; 8],
            &[-3.0; 8],
            &[1.0, 1.5, 2.0, 1.25],
            &[-1.0, -1.5, -2.0, -1.25],
            &[1e-8, -2e-8, 3e-9, 0.0],
            &[2.2e-5, -1.3e-5, 1e-6, 0.0],
        ];
        for w in groups {
            let (grid, codes, values) = asymmetric(w);
            assert!((0.0..=15.0).contains(&grid.zero) && grid.zero.fract() == 0.0, "{grid:?}");
            assert!(codes.iter().all(|c| (0.0..=15.0).contains(c)), "{codes:?}");
            for (value, w) in values.iter().zip(w) {
                assert!((value - w).abs() <= 0.51 * grid.step, "{value} for {w} by {grid:?}");
            }
        }
    }

    #[test]
    fn huge_weights_are_cut_to_what_f16_scales_reach() {
        let (grid, codes, values) = asymmetric(&[f32::MAX, f32::MIN, 0.0, 1e5]);
        assert_eq!(grid.scale, f16::MAX);
        assert!(codes.iter().chain(&values).all(|x| x.is_finite()));
        assert_eq!(values[2], 0.0);
        assert!(values[0] > 0.0);
        let grid = Grid::symmetric(f32::MAX);
        assert_eq!((grid.nearest(f32::MAX), grid.nearest(f32::MIN)), (255.0, 1.0));
    }

    #[test]
    fn eight_bits_are_symmetric_and_fine() {
        let w = Fill::new(3).normals(64, 0.02);
        let max_abs = w.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        let grid = Grid::symmetric(max_abs);
        for &w in &w {
            let code = grid.nearest(w);
            assert!((1.0..=255.0).contains(&code));
            assert_eq!(grid.nearest(-w), 256.0 - code);
            assert!((grid.value(code) - w).abs() <= 0.51 * grid.step);
        }
        assert_eq!(Grid::symmetric(0.0).value(Grid::symmetric(0.0).nearest(0.0)), 0.0);
    }
}

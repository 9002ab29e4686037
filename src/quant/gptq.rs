//! GPTQ: columns are rounded one after the other, and what one loses the columns after it make good, as far as they go
//! together on the activations of a text. Groups choose their grid when their turn comes, for the weights as they are
//! then.

use super::factor::Factor;
use super::rows::GroupSink;
use super::rtn::{Grid, range};

/// Ranges that are tried for a group, as shares of the whole one.
const SHARES: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];
/// Columns of a row that are worked on at a time.
const TILE: usize = 256;
/// The widest group.
const MAX_GROUP: usize = 128;

/// Rounds `rows`, which are used up. They must not be wider than the factor.
pub(super) fn quantise(rows: &mut [f32], factor: &Factor, sink: &mut GroupSink<'_>) {
    let (width, group) = (factor.width, sink.group);
    let row_groups = width / group;
    let mut errors = vec![0.0; rows.len() / width * group];
    for start in (0..width).step_by(group) {
        let weights: Vec<f32> = (start..start + group).map(|j| factor.row(j)[j].powi(-2)).collect();
        for (i, (row, errors)) in rows.chunks_mut(width).zip(errors.chunks_mut(group)).enumerate() {
            let w = &mut row[start..start + group];
            let grid = best_grid(w, &weights);
            let mut codes = [0.0; MAX_GROUP];
            for j in 0..group {
                codes[j] = grid.nearest(w[j]);
                let u = &factor.row(start + j)[start + j..start + group];
                errors[j] = (w[j] - grid.value(codes[j])) / u[0];
                w[j + 1..].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= errors[j] * u);
            }
            sink.put(i * row_groups + start / group, &grid, codes[..group].iter().copied());
        }
        spread(rows, &errors, factor, start..start + group);
    }
}

/// Takes the `errors` `[rows, group]` of the columns `done` off the columns after them.
fn spread(rows: &mut [f32], errors: &[f32], factor: &Factor, done: std::ops::Range<usize>) {
    let width = factor.width;
    for tile in (done.end..width).step_by(TILE) {
        let cols = tile..(tile + TILE).min(width);
        for (row, errors) in rows.chunks_mut(width).zip(errors.chunks(done.len())) {
            let w = &mut row[cols.clone()];
            for (four, j) in errors.as_chunks::<4>().0.iter().zip(done.clone().step_by(4)) {
                let [u0, u1, u2, u3] = [0, 1, 2, 3].map(|i| &factor.row(j + i)[cols.clone()]);
                for (k, w) in w.iter_mut().enumerate() {
                    *w -= four[0] * u0[k] + four[1] * u1[k] + (four[2] * u2[k] + four[3] * u3[k]);
                }
            }
        }
    }
}

/// The grid over the range of `w`, or a share of it, with the smallest sum of squared errors times `weights`.
fn best_grid(w: &[f32], weights: &[f32]) -> Grid {
    let (min, max) = range(w);
    let loss = |grid: &Grid| {
        let mut sum = [0.0; 8];
        for (w, weights) in w.as_chunks::<8>().0.iter().zip(weights.as_chunks::<8>().0) {
            for (sum, (&w, weight)) in sum.iter_mut().zip(w.iter().zip(weights)) {
                let error = w - grid.value(grid.nearest(w));
                *sum += weight * error * error;
            }
        }
        sum.iter().sum::<f32>()
    };
    let mut best = (f32::INFINITY, Grid::asymmetric(min, max));
    for share in SHARES {
        let grid = Grid::asymmetric(share * min, share * max);
        let loss = loss(&grid);
        if loss < best.0 {
            best = (loss, grid);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::model::weights::{Tensor, TensorData};
    use crate::quant::hessian::{Hessians, LayerInput};
    use crate::quant::rows::{Form, quantise_rows};
    use crate::quant::{CodeBits, QuantTensor, ZeroKind, hqq, rtn};
    use crate::testing::fill::Fill;

    const AT: (usize, LayerInput) = (0, LayerInput::Down);
    const ROWS: usize = 48;
    const WIDTH: usize = 320;

    fn weight() -> (Tensor, Vec<f32>) {
        let w = Fill::new(4).normals(ROWS * WIDTH, 0.05);
        let data = TensorData::Owned(w.iter().map(|w| w.to_bits()).collect());
        (Tensor { name: "w".into(), dtype: DType::F32, shape: vec![ROWS, WIDTH], data }, w)
    }

    fn form(zero_kind: ZeroKind) -> Form {
        Form { group: 64, bits: CodeBits::W4, zero_kind }
    }

    fn by_gptq(x: &[f32], threads: usize) -> QuantTensor {
        let mut hessians = Hessians::new();
        hessians.add_rows(0, LayerInput::Down, x, WIDTH).unwrap();
        let factor = Factor::new(&hessians, AT, WIDTH, threads).unwrap();
        let form = form(ZeroKind::Integer);
        quantise_rows(&weight().0, form, threads, |rows, sink| quantise(rows, &factor, sink)).unwrap()
    }

    /// Sum of squares of X (W - Wq)^T.
    fn output_error(x: &[f32], made: &QuantTensor) -> f64 {
        let lost: Vec<f32> = weight().1.iter().zip(made.dequantise()).map(|(w, q)| w - q).collect();
        let error = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>().powi(2);
        x.chunks(WIDTH).map(|x| lost.chunks(WIDTH).map(|w| error(x, w)).sum::<f64>()).sum()
    }

    #[test]
    fn outputs_on_correlated_activations_lose_far_less_than_by_rounding() {
        let mut fill = Fill::new(8);
        let mix = fill.normals(24 * WIDTH, 1.0);
        let mut activations = |num: usize| {
            let mut x = fill.normals(num * WIDTH, 0.3);
            for x in x.chunks_mut(WIDTH) {
                let hidden = fill.normals(24, 1.0);
                x.iter_mut()
                    .enumerate()
                    .for_each(|(k, x)| *x += (0..24).map(|h| hidden[h] * mix[h * WIDTH + k]).sum::<f32>());
            }
            x
        };
        let (seen, unseen) = (activations(800), activations(200));
        let made = by_gptq(&seen, 2);
        made.validate().unwrap();
        let by = |zero_kind, quantise: fn(&[f32], &mut GroupSink<'_>)| {
            quantise_rows(&weight().0, form(zero_kind), 2, |rows, sink| quantise(rows, sink)).unwrap()
        };
        let (rtn, hqq) = (by(ZeroKind::Integer, rtn::quantise), by(ZeroKind::Fractional, hqq::quantise));
        for x in [&seen, &unseen] {
            let [gptq, rtn, hqq] = [&made, &rtn, &hqq].map(|made| output_error(x, made));
            assert!(gptq < 0.5 * rtn && gptq < 0.5 * hqq, "gptq {gptq}, rtn {rtn}, hqq {hqq}");
        }
        let one = by_gptq(&seen, 1);
        assert_eq!((one.codes(), one.scales(), one.zeros()), (made.codes(), made.scales(), made.zeros()));
    }

    /// Nothing to make good: every group is rounded as it is.
    #[test]
    fn uncorrelated_inputs_are_plain_rounding_in_the_best_range() {
        let identity: Vec<f32> = (0..WIDTH * WIDTH).map(|i| f32::from(u8::from(i % (WIDTH + 1) == 0))).collect();
        let made = by_gptq(&identity, 2);
        let plain = quantise_rows(&weight().0, form(ZeroKind::Integer), 1, |rows, sink| {
            for (index, w) in rows.chunks(64).enumerate() {
                let grid = best_grid(w, &[1.0; 64]);
                sink.put(index, &grid, w.iter().map(|&w| grid.nearest(w)));
            }
        });
        let plain = plain.unwrap();
        assert_eq!((made.codes(), made.scales(), made.zeros()), (plain.codes(), plain.scales(), plain.zeros()));
    }

    #[test]
    fn inputs_that_are_always_zero_do_no_harm() {
        let made = by_gptq(&vec![0.0; 10 * WIDTH], 1);
        let errors = weight().1.into_iter().zip(made.dequantise()).map(|(w, q)| (w - q).abs());
        assert!(errors.fold(0.0, f32::max) < 0.1);
    }
}

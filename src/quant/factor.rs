//! The triangle that GPTQ spreads errors with, from the sums of an input.
//!
//! `U` is the upper factor of the inverse: `H^-1 = U^T U`. With the columns in reverse order the Cholesky factor of H is
//! the inverse of U's, so that one factorisation and the inverse of a triangle do: a third of n^3 multiplications in
//! f64, in place, rows on all threads.

use super::hessian::{Hessians, LayerInput};
use super::parallel::for_each;
use crate::error::{Error, Result};

/// Share of the mean diagonal that is added to the diagonal.
const DAMPING: f64 = 0.01;
/// Rows that are factored at a time.
const BLOCK: usize = 64;
/// Rows that a thread takes at a time.
const ROWS: usize = 8;
/// Columns of a row that are worked on at a time.
const TILE: usize = 256;

/// `U` of an input.
pub(super) struct Factor {
    pub(super) width: usize,
    /// `[width, width]`, 0 below the diagonal.
    rows: Vec<f32>,
}

impl Factor {
    /// The factor of the sums of an input that is `width` wide, damped. An input element that was always 0 is treated as
    /// the average one.
    pub(super) fn new(hessians: &Hessians, at: (usize, LayerInput), width: usize, threads: usize) -> Result<Self> {
        let refuse = |why: &str| Error::config("hessians", format!("{:?} input of layer {}: {why}", at.1, at.0));
        let Some((found, sum)) = hessians.get(at) else { return Err(refuse("no rows were added; run a longer text")) };
        if found != width {
            return Err(refuse(&format!(
                "rows of {found} numbers, the model's have {width}; they are of another model"
            )));
        }
        let diagonal: Vec<f64> = (0..width).map(|i| f64::from(sum(i, i))).collect();
        let live = diagonal.iter().filter(|&&d| d > 0.0).count();
        let mean = if live == 0 { 1.0 } else { diagonal.iter().sum::<f64>() / live as f64 };
        let mut h = vec![0.0; width * width];
        for_each(threads, h.chunks_mut(width).enumerate(), |(i, row)| {
            for (j, h) in row[..=i].iter_mut().enumerate() {
                *h = f64::from(sum(width - 1 - j, width - 1 - i));
            }
            let dead = row[i] == 0.0;
            row[i] += DAMPING * mean + if dead { mean } else { 0.0 };
        })?;
        if !cholesky(&mut h, width, threads)? {
            return Err(refuse("not finite or not positive; the text's activations are damaged, or their sums are"));
        }
        invert(&mut h, width, threads)?;
        let rows = h.iter().rev().map(|&u| u as f32).collect();
        Ok(Self { width, rows })
    }

    /// Row `j` of U; what is left of `j` is 0.
    pub(super) fn row(&self, j: usize) -> &[f32] {
        &self.rows[j * self.width..(j + 1) * self.width]
    }
}

/// Sum of products in a fixed order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sum.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sum.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// The lower half of `a` `[n, n]` becomes its Cholesky factor; the upper is neither read nor written. False where `a` is
/// not positive definite.
fn cholesky(a: &mut [f64], n: usize, threads: usize) -> Result<bool> {
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let (block, below) = a[start * n..].split_at_mut(width * n);
        for i in 0..width {
            let (above, row) = block.split_at_mut(i * n);
            reduce(&mut row[..n], above, n, (start, start));
            let pivot = row[start + i] - dot(&row[..start + i], &row[..start + i]);
            if !(pivot > 0.0 && pivot.is_finite()) {
                return Ok(false);
            }
            row[start + i] = pivot.sqrt();
        }
        let block = &*block;
        for_each(threads, below.chunks_mut(ROWS * n), |rows| {
            for tile in (0..start).step_by(TILE) {
                let cols = tile..(tile + TILE).min(start);
                for (j, done) in block.chunks(n).enumerate() {
                    for row in rows.chunks_mut(n) {
                        row[start + j] -= dot(&row[cols.clone()], &done[cols.clone()]);
                    }
                }
            }
            rows.chunks_mut(n).for_each(|row| reduce(row, block, n, (start, 0)));
        })?;
    }
    Ok(true)
}

/// Makes the columns of `row` that `done` rows, from `start` on, have a pivot in, those of the factor. `todo` columns
/// before `start` are still to be taken off.
fn reduce(row: &mut [f64], done: &[f64], n: usize, (start, todo): (usize, usize)) {
    for (j, done) in done.chunks(n).enumerate() {
        let cols = start - todo..start + j;
        row[start + j] = (row[start + j] - dot(&row[cols.clone()], &done[cols])) / done[start + j];
    }
}

/// The lower half of `a` `[n, n]`, a triangle, becomes its inverse; the upper is set to 0.
fn invert(a: &mut [f64], n: usize, threads: usize) -> Result<()> {
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let (done, rest) = a.split_at_mut(start * n);
        let (done, block) = (&*done, &mut rest[..width * n]);
        for_each(threads, block.chunks_mut(ROWS * n), |rows| multiply(rows, done, n, start))?;
        let triangle: Vec<f64> = block.chunks(n).flat_map(|row| &row[start..start + width]).copied().collect();
        for i in 0..width {
            let (above, row) = block.split_at_mut(i * n);
            row[start..n].fill(0.0);
            let coefficients = &triangle[i * width..][..=i];
            for (above, by) in above.chunks(n).zip(coefficients) {
                row[..start + i].iter_mut().zip(above).for_each(|(x, above)| *x += by * above);
            }
            let scale = 1.0 / coefficients[i];
            row[..start + i].iter_mut().for_each(|x| *x *= -scale);
            row[start + i] = scale;
        }
    }
    Ok(())
}

/// The first `start` columns of `rows` times the triangle `done`, in place: a tile of columns depends on what is in it
/// and to the right of it.
fn multiply(rows: &mut [f64], done: &[f64], n: usize, start: usize) {
    for tile in (0..start).step_by(TILE) {
        let cols = tile..(tile + TILE).min(start);
        let mut sums = [[0.0; TILE]; ROWS];
        for (j, done) in done.chunks(n).enumerate().skip(tile) {
            for (row, sum) in rows.chunks(n).zip(&mut sums) {
                let by = row[j];
                sum.iter_mut().zip(&done[cols.clone()]).for_each(|(sum, done)| *sum += by * done);
            }
        }
        for (row, sum) in rows.chunks_mut(n).zip(&sums) {
            row[cols.clone()].copy_from_slice(&sum[..cols.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    /// Sums of `num_rows` rows whose neighbours go together; column 5 is always 0.
    fn correlated(width: usize, num_rows: usize) -> Hessians {
        let mut fill = Fill::new(9);
        let mut rows = fill.normals(num_rows * width, 1.0);
        for row in rows.chunks_mut(width) {
            (1..width).for_each(|i| row[i] += 0.9 * row[i - 1]);
            row[5] = 0.0;
        }
        let mut hessians = Hessians::new();
        hessians.add_rows(0, LayerInput::Down, &rows, width).unwrap();
        hessians
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let width = 300;
        let hessians = correlated(width, 600);
        let at = (0, LayerInput::Down);
        let factor = Factor::new(&hessians, at, width, 2).unwrap();
        assert!(factor.rows == Factor::new(&hessians, at, width, 1).unwrap().rows, "threads change the factor");
        let (_, sum) = hessians.get(at).unwrap();
        let diagonal: f64 = (0..width).map(|i| f64::from(sum(i, i))).sum::<f64>() / (width - 1) as f64;
        let damped = |i: usize, j: usize| {
            let extra = if i == 5 { 1.0 + DAMPING } else { DAMPING };
            f64::from(sum(i.max(j), i.min(j))) + if i == j { extra * diagonal } else { 0.0 }
        };
        // U H U^T is the identity.
        let u: Vec<Vec<f64>> = (0..width).map(|j| factor.row(j).iter().map(|&u| f64::from(u)).collect()).collect();
        let h: Vec<Vec<f64>> = (0..width).map(|i| (0..width).map(|j| damped(i, j)).collect()).collect();
        let uh: Vec<Vec<f64>> = u.iter().map(|u| h.iter().map(|h| dot(u, h)).collect()).collect();
        for i in 0..width {
            for (j, other) in u.iter().enumerate() {
                let (found, expected) = (dot(&uh[i], other), f64::from(u8::from(i == j)));
                assert!((found - expected).abs() < 1e-3, "{found} at {i}, {j}");
            }
            assert!(u[i][..i].iter().all(|&u| u == 0.0));
        }
    }

    #[test]
    fn sums_that_make_no_sense_are_refused_by_name() {
        let mut hessians = Hessians::new();
        hessians.add_rows(2, LayerInput::O, &[f32::NAN; 64], 64).unwrap();
        let why = |layer, width| Factor::new(&hessians, (layer, LayerInput::O), width, 1).err().unwrap().to_string();
        assert!(why(2, 64).contains("O input of layer 2: not finite"), "{}", why(2, 64));
        assert!(why(2, 128).contains("another model"), "{}", why(2, 128));
        assert!(why(1, 64).contains("no rows"), "{}", why(1, 64));
    }
}

//! What a layer's matrices are multiplied with, summed up: X^T X of every input over the tokens of a text.

use std::collections::BTreeMap;

use super::parallel::{all_cores, for_each};
use crate::error::{Error, Result};
use crate::model::family::ModelConfig;

/// The inputs of a layer that are multiplied with matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerInput {
    /// The normed residual stream before attention, `[T, hidden]`; q, k and v read it.
    Qkv,
    /// What attention returns, `[T, Hq * D]`; o reads it.
    O,
    /// The normed residual stream before the MLP, `[T, hidden]`; gate and up read it.
    GateUp,
    /// The SwiGLU's output, `[T, intermediate]`; down reads it.
    Down,
}

impl LayerInput {
    /// All four, in the order of a pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    /// Elements of a row.
    pub fn width(self, model: &ModelConfig) -> usize {
        match self {
            Self::Qkv | Self::GateUp => model.hidden,
            Self::O => model.num_q_heads * model.head_dim,
            Self::Down => model.intermediate,
        }
    }
}

/// X^T X of the inputs of some layers: 2 bytes per element of the square, 1.2 GiB for all layers of a 0.5 B model.
#[derive(Clone, Debug, Default)]
pub struct Hessians {
    grams: BTreeMap<(usize, LayerInput), Gram>,
}

/// Columns of a tile.
const TILE: usize = 64;
/// Rows that are summed up in a tile before they go to the total.
const ROWS: usize = 256;

/// The lower half of X^T X in square tiles, row by row; columns are filled up to whole tiles.
#[derive(Clone, Debug)]
struct Gram {
    width: usize,
    rows: u64,
    tiles: Vec<[f32; TILE * TILE]>,
}

impl Hessians {
    /// Without a row.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `rows` `[T, width]` of an input of a layer, on all cores. An input's rows are all of one width.
    pub fn add_rows(&mut self, layer: usize, input: LayerInput, rows: &[f32], width: usize) -> Result<()> {
        let gram = self.grams.entry((layer, input)).or_insert_with(|| Gram::new(width));
        if width == 0 || width != gram.width || !rows.len().is_multiple_of(width) {
            let expected = format!("whole rows of {} numbers", gram.width);
            return Err(Error::Shape { op: "hessian", expected, got: format!("{} of {width}", rows.len()) });
        }
        rows.chunks(ROWS * width).try_for_each(|rows| gram.add(rows, all_cores()))
    }

    /// Bytes of the sums of one layer of `model`.
    pub(crate) fn layer_bytes(model: &ModelConfig) -> u64 {
        let tiles: usize = LayerInput::ALL.map(|input| first_tile(input.width(model).div_ceil(TILE))).iter().sum();
        (tiles * size_of::<[f32; TILE * TILE]>()) as u64
    }

    /// Rows that were added for an input.
    pub fn num_rows(&self, layer: usize, input: LayerInput) -> u64 {
        self.grams.get(&(layer, input)).map_or(0, |gram| gram.rows)
    }

    /// Bytes of all sums.
    pub fn num_bytes(&self) -> u64 {
        self.grams.values().map(|gram| size_of_val(&*gram.tiles) as u64).sum()
    }

    /// The sums of an input and their width: `at(i, j)` for `j <= i`. `None` where no row was added.
    pub(super) fn get(&self, at: (usize, LayerInput)) -> Option<(usize, impl Fn(usize, usize) -> f32 + Sync)> {
        let gram = self.grams.get(&at).filter(|gram| gram.rows > 0)?;
        Some((gram.width, |i: usize, j: usize| gram.tiles[first_tile(i / TILE) + j / TILE][i % TILE * TILE + j % TILE]))
    }
}

/// Tiles before those of tile row `row`.
fn first_tile(row: usize) -> usize {
    row * (row + 1) / 2
}

impl Gram {
    fn new(width: usize) -> Self {
        Self { width, rows: 0, tiles: vec![[0.0; TILE * TILE]; first_tile(width.div_ceil(TILE))] }
    }

    /// Adds at most [`ROWS`] rows: every tile is the product of two column panels.
    fn add(&mut self, rows: &[f32], threads: usize) -> Result<()> {
        let panels: Vec<Vec<[f32; TILE]>> =
            (0..self.width).step_by(TILE).map(|start| panel(rows, self.width, start)).collect();
        let pairs = (0..panels.len()).flat_map(|row| (0..=row).map(move |col| (row, col)));
        for_each(threads, self.tiles.iter_mut().zip(pairs), |(tile, (row, col))| {
            add_product(tile, &panels[row], &panels[col]);
        })?;
        self.rows += (rows.len() / self.width) as u64;
        Ok(())
    }
}

/// Columns from `start` of all rows, and zero rows up to a multiple of 4.
fn panel(rows: &[f32], width: usize, start: usize) -> Vec<[f32; TILE]> {
    let cols = start..(start + TILE).min(width);
    let mut panel: Vec<_> = rows
        .chunks(width)
        .map(|row| {
            let mut out = [0.0; TILE];
            out[..cols.len()].copy_from_slice(&row[cols.clone()]);
            out
        })
        .collect();
    panel.resize(panel.len().next_multiple_of(4), [0.0; TILE]);
    panel
}

/// `total[i, j] += sum_t left[t, i] right[t, j]`.
fn add_product(total: &mut [f32; TILE * TILE], left: &[[f32; TILE]], right: &[[f32; TILE]]) {
    let mut sum = [[0.0f32; TILE]; TILE];
    for (left, right) in left.as_chunks::<4>().0.iter().zip(right.as_chunks::<4>().0) {
        for (i, sum) in sum.iter_mut().enumerate() {
            let by = left.map(|row| row[i]);
            for (j, sum) in sum.iter_mut().enumerate() {
                *sum += by[0] * right[0][j] + by[1] * right[1][j] + (by[2] * right[2][j] + by[3] * right[3][j]);
            }
        }
    }
    for (total, sum) in total.iter_mut().zip(sum.as_flattened()) {
        *total += sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    #[test]
    fn sums_are_those_of_the_plain_product() {
        let (width, num_rows) = (150, 301);
        let rows = Fill::new(1).normals(num_rows * width, 1.0);
        let mut hessians = Hessians::new();
        let (first, second) = rows.split_at(37 * width);
        for part in [first, second] {
            hessians.add_rows(3, LayerInput::O, part, width).unwrap();
        }
        assert_eq!(hessians.num_rows(3, LayerInput::O), 301);
        assert!(hessians.get((3, LayerInput::Qkv)).is_none());
        let (_, at) = hessians.get((3, LayerInput::O)).unwrap();
        for i in 0..width {
            for j in 0..=i {
                let sum: f64 = rows.chunks(width).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                assert!((f64::from(at(i, j)) - sum).abs() < 1e-3, "{} for {sum} at {i}, {j}", at(i, j));
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let rows = Fill::new(2).normals(100 * 200, 1.0);
        let of = |threads| {
            let mut gram = Gram::new(200);
            gram.add(&rows, threads).unwrap();
            gram.tiles
        };
        assert!(of(1) == of(5));
    }

    #[test]
    fn rows_of_another_width_are_refused() {
        let mut hessians = Hessians::new();
        hessians.add_rows(0, LayerInput::Down, &[1.0; 64], 32).unwrap();
        assert!(hessians.add_rows(0, LayerInput::Down, &[1.0; 64], 64).is_err());
        assert!(hessians.add_rows(0, LayerInput::Down, &[1.0; 33], 32).is_err());
        assert!(hessians.add_rows(0, LayerInput::Qkv, &[], 0).is_err());
    }
}

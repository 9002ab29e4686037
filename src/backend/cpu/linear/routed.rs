//! `linear` whose rows take one of two matrices: each side is a call of its own over its rows, brought together first, so
//! that either matrix is read once and a row gets the bits that it gets without a route.

use std::ops::Range;

use super::{Activations, Line, LinearArgs, LinearScratch, check, grow, linear};
use crate::backend::cpu::matrix::CpuMatrix;
use crate::backend::cpu::pool::ThreadPool;
use crate::backend::cpu::simd::SimdLevel;
use crate::error::Result;

/// What [`routed_linear`] multiplies.
pub struct RoutedArgs<'a> {
    /// As without a route.
    pub linear: LinearArgs<'a>,
    /// Weights of the rows that have left, of the same shape.
    pub river: &'a CpuMatrix,
    /// `[T]`: row t takes `river` where `route[t] < layer`.
    pub route: &'a [f32],
    /// See `route`.
    pub layer: u32,
}

/// Rows of one side. They grow to the largest call and stay.
#[derive(Default)]
pub struct RoutedScratch {
    x: Vec<Line>,
    y: Vec<f32>,
}

/// Computes `args.linear.rows` of y; returns the bytes of weights that were read.
pub fn routed_linear(
    pool: &mut ThreadPool,
    level: SimdLevel,
    scratch: &mut LinearScratch,
    side_scratch: &mut RoutedScratch,
    args: RoutedArgs<'_>,
) -> Result<u64> {
    let RoutedArgs { linear: args, river, route, layer } = args;
    let shape = |w: &CpuMatrix| [w.out_features(), w.in_features()];
    check(
        shape(args.w) == shape(river),
        || format!("a river of {:?}", shape(args.w)),
        || format!("{:?}", shape(river)),
    )?;
    let Some(route) = route.get(args.rows.clone()) else {
        return check(false, || format!("a route of rows {:?}", args.rows), || route.len().to_string()).map(|()| 0);
    };
    let first = args.rows.start;
    let side = |left: bool| -> Vec<usize> {
        let on_side = route.iter().enumerate().filter(|&(_, &r)| (r < layer as f32) == left);
        on_side.map(|(i, _)| first + i).collect()
    };
    let (stayed, left) = (side(false), side(true));
    if left.is_empty() || stayed.is_empty() {
        let w = if left.is_empty() { args.w } else { river };
        linear(pool, level, scratch, LinearArgs { w, ..args })?;
        return Ok(w.num_bytes());
    }
    let LinearArgs { x, in_features, w, bias, y, .. } = args;
    for (w, rows) in [(w, &stayed), (river, &left)] {
        let RoutedScratch { x: side_x, y: side_y } = &mut *side_scratch;
        let x = match x {
            Activations::F32(x) => Activations::F32(gathered(x, in_features, rows, side_x)?),
            Activations::Bf16(x) => Activations::Bf16(gathered(x, in_features, rows, side_x)?),
            Activations::F16(x) => Activations::F16(gathered(x, in_features, rows, side_x)?),
        };
        let n = w.out_features();
        side_y.resize(side_y.len().max(rows.len() * n), 0.0);
        let side_y = &mut side_y[..rows.len() * n];
        let range = 0..rows.len();
        linear(pool, level, scratch, LinearArgs { x, rows: range, in_features, w, bias, y: &mut *side_y })?;
        for (&row, sums) in rows.iter().zip(side_y.chunks_exact(n.max(1))) {
            row_of(y.len(), n, row).map(|at| y[at].copy_from_slice(sums))?;
        }
    }
    Ok(w.num_bytes() + river.num_bytes())
}

/// Some rows of x, one behind the other.
fn gathered<'s, T: bytemuck::Pod>(
    x: &[T],
    in_features: usize,
    rows: &[usize],
    lines: &'s mut Vec<Line>,
) -> Result<&'s [T]> {
    let len = rows.len() * in_features;
    grow(lines, (len * size_of::<T>()).div_ceil(size_of::<Line>()));
    let all = &mut bytemuck::cast_slice_mut(lines)[..len];
    for (&row, dst) in rows.iter().zip(all.chunks_exact_mut(in_features.max(1))) {
        dst.copy_from_slice(&x[row_of(x.len(), in_features, row)?]);
    }
    Ok(all)
}

/// The elements of a row of `len` elements in rows of `width`.
fn row_of(len: usize, width: usize, row: usize) -> Result<Range<usize>> {
    let end = row.saturating_add(1).saturating_mul(width);
    check(end <= len, || format!("at least {end} elements"), || len.to_string())?;
    Ok(row * width..end)
}

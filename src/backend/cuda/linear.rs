//! `linear`: which kernel takes which part of the weights, and for which rows.
//!
//! With a river both matrices are launched and each launch looks at the route by itself: the host decides nothing, so that
//! a recorded step stays good. What was read is known when the host reads the route.

use std::ops::Range;

use super::bindings::*;
use super::cublas::{Cublas, Gemm};
use super::graphs::Mode;
use super::matrix::{Codes, Part, PartMemory};
use super::ops::code;
use super::{Cuda, CudaBuf, CudaMatrix, grow};
use crate::backend::{Linear, River};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{CodeBits, ZeroKind};

/// Rows of one launch of the skinny kernels.
const SKINNY_ROWS: usize = RKSC_SKINNY_MAX_ROWS as usize;
/// Rows of a routed op up to which the skinny kernels do both sides; of more, most are a prompt's and stay.
const FEW_ROUTED: usize = 4 * SKINNY_ROWS;
const OP: &str = "linear";

/// A `linear` whose weights are counted when its route is read.
pub(super) struct RoutedLinear {
    rows: Range<usize>,
    layer: u32,
    /// Bytes of the weights of rows that stayed, and of rows that left.
    sides: [u64; 2],
}

/// The rows of a launch: all, or those on one side of a route.
#[derive(Clone, Copy)]
struct Side<'a> {
    route: Option<&'a CudaBuf>,
    layer: u32,
    side: u32,
}

/// What the launches over all parts of a matrix have in common.
struct Operands<'a> {
    x: &'a CudaBuf,
    w: &'a CudaMatrix,
    bias: Option<&'a CudaBuf>,
    side: Side<'a>,
}

/// Addresses of one launch: at most [`SKINNY_ROWS`] rows against one part.
struct Launch {
    x: *const std::ffi::c_void,
    bias: *const f32,
    y: *mut f32,
    workspace: *mut std::ffi::c_void,
    route: *const f32,
    num_rows: u32,
    y_stride: u32,
    in_features: u32,
    out_features: u32,
    dtype: u32,
    layer: u32,
    side: u32,
}

impl Cuda {
    /// See [`Linear`].
    pub(super) fn multiply(&mut self, p: Linear<'_, Self>) -> Result<()> {
        self.launched();
        let rows = p.rows.start..p.rows.start + self.padded(p.rows.len());
        let Some(River { w: river, route, layer }) = p.river else {
            self.counters.weight_bytes += p.w.num_bytes();
            if rows.len() > SKINNY_ROWS && p.w.only_dense().is_some() && !self.device.is_emulated() {
                return self.linear_large(rows, p).map(|_| ());
            }
            let side = Side { route: None, layer: 0, side: 0 };
            return self.linear_skinny(rows, &Operands { x: p.x, w: p.w, bias: p.bias, side }, p.y);
        };
        let shape = |w: &CudaMatrix| [w.out_features, w.in_features];
        if shape(p.w) != shape(river) {
            let (expected, got) = (format!("a river of {:?}", shape(p.w)), format!("{:?}", shape(river)));
            return Err(Error::Shape { op: OP, expected, got });
        }
        let bytes = [p.w.num_bytes(), river.num_bytes()];
        let (x, bias, own) = (p.x, p.bias, p.w);
        let side = |side| Side { route: Some(route), layer, side };
        if rows.len() > FEW_ROUTED && own.only_dense().is_some() && !self.device.is_emulated() {
            // Hardly any of so many rows has left: the product of all, then those few again.
            self.counters.weight_bytes += bytes[0];
            self.routed.push(RoutedLinear { rows: p.rows.clone(), layer, sides: [0, bytes[1]] });
            let p = Linear { river: None, ..p };
            let y = self.linear_large(rows.clone(), p)?;
            return self.linear_skinny(rows, &Operands { x, w: river, bias, side: side(1) }, y);
        }
        self.routed.push(RoutedLinear { rows: p.rows.clone(), layer, sides: bytes });
        self.linear_skinny(rows.clone(), &Operands { x, w: own, bias, side: side(0) }, p.y)?;
        self.linear_skinny(rows, &Operands { x, w: river, bias, side: side(1) }, p.y)
    }

    /// Counts what the routed ops since the last call have read, now that the rows' route is known.
    pub(super) fn count_routed(&mut self, route: &[f32]) {
        for RoutedLinear { rows, layer, sides } in self.routed.drain(..) {
            let rows = &route[rows.start.min(route.len())..rows.end.min(route.len())];
            for (bytes, left) in sides.into_iter().zip([false, true]) {
                if rows.iter().any(|&r| (r < layer as f32) == left) {
                    self.counters.weight_bytes += bytes;
                }
            }
        }
    }

    /// Many rows on a GPU: cuBLASLt.
    fn linear_large<'y>(&mut self, rows: Range<usize>, p: Linear<'y, Self>) -> Result<&'y mut CudaBuf> {
        let (num_rows, w) = (rows.len(), p.w);
        let gemm = Gemm {
            x: p.x.at(OP, w.dtype, rows.start * w.in_features, num_rows * w.in_features)?.cast(),
            w: w.dense(OP)?.ptr().cast(),
            bias: p.bias.map_or(Ok(std::ptr::null()), |b| b.at(OP, DType::F32, 0, w.out_features))?.cast(),
            y: p.y.at_mut(OP, DType::F32, rows.start * w.out_features, num_rows * w.out_features)?.cast(),
            num_rows,
            in_features: w.in_features,
            out_features: w.out_features,
            dtype: w.dtype,
        };
        if self.graphs.mode() == Mode::Skip {
            return Ok(p.y);
        }
        let cublas = match &mut self.cublas {
            Some(cublas) => cublas,
            none => none.insert(Cublas::open(&self.device)?),
        };
        cublas.gemm(&mut self.device, &gemm)?;
        Ok(p.y)
    }

    /// [`SKINNY_ROWS`] rows at a time the weights stream by once, a launch for each part.
    fn linear_skinny(&mut self, rows: Range<usize>, operands: &Operands<'_>, y: &mut CudaBuf) -> Result<()> {
        let (k, dtype) = (operands.w.in_features, operands.w.dtype);
        let moved = self.as_codes_stand(rows.clone(), operands)?;
        for from in rows.clone().step_by(SKINNY_ROWS) {
            let chunk = from..rows.end.min(from + SKINNY_ROWS);
            for part in &operands.w.parts {
                let x = match (moved, &part.memory) {
                    (Some(moved), PartMemory::Codes(_)) => {
                        moved.wrapping_add((from - rows.start) * k * dtype.size_bytes())
                    }
                    _ => operands.x.at(OP, dtype, from * k, chunk.len() * k)?,
                };
                self.linear_part(chunk.clone(), operands, x, part, y)?;
            }
        }
        Ok(())
    }

    /// Rows of x with their columns in the order of those of the codes; `None` where that is their own.
    fn as_codes_stand(&mut self, rows: Range<usize>, operands: &Operands<'_>) -> Result<Option<*const u8>> {
        let Operands { x, w, .. } = operands;
        let Some(columns) = &w.columns else { return Ok(None) };
        let (start, len) = (rows.start * w.in_features, rows.len() * w.in_features);
        let dst = grow(&self.device, &mut self.graphs, &mut self.scratch.columns, len * w.dtype.size_bytes())?;
        let params = rksc_gather_columns_params {
            src: x.at(OP, w.dtype, start, len)?.cast(),
            columns: columns.ptr(),
            dst: dst.cast(),
            num_rows: rows.len() as u32,
            width: w.in_features as u32,
            dtype: code(w.dtype),
            reserved: 0,
        };
        self.launch(self.device.kernels().gather_columns, &params)?;
        Ok(Some(dst))
    }

    /// `x` is where the first of `rows` is.
    fn linear_part(
        &mut self,
        rows: Range<usize>,
        operands: &Operands<'_>,
        x: *const u8,
        part: &Part,
        y: &mut CudaBuf,
    ) -> Result<()> {
        let Operands { w, bias, side, .. } = operands;
        let (start, len, null) = (rows.start, rows.len(), std::ptr::null);
        let bytes = self.device.kernels().linear_workspace_bytes(len, w.in_features, part.num_outs);
        let workspace = grow(&self.device, &mut self.graphs, &mut self.scratch.linear, bytes)?;
        y.check(OP, DType::F32, start * w.out_features, len * w.out_features)?;
        let first_sum = start * w.out_features + part.first_out;
        let launch = Launch {
            x: x.cast(),
            bias: bias.map_or(Ok(null()), |b| b.at(OP, DType::F32, part.first_out, part.num_outs))?.cast(),
            y: y.at_mut(OP, DType::F32, first_sum, 0)?.cast(),
            workspace: workspace.cast(),
            route: side.route.map_or(Ok(null()), |r| r.at(OP, DType::F32, start, len))?.cast(),
            num_rows: len as u32,
            y_stride: w.out_features as u32,
            in_features: w.in_features as u32,
            out_features: part.num_outs as u32,
            dtype: code(w.dtype),
            layer: side.layer,
            side: side.side,
        };
        match &part.memory {
            PartMemory::Dense(w) => {
                let params = launch.dense(w.ptr().cast());
                self.launch(self.device.kernels().linear, &params)
            }
            PartMemory::Codes(codes) => match codes.format.bits {
                CodeBits::W4 => self.launch(self.device.kernels().linear_w4, &launch.w4(codes)),
                CodeBits::W8 | CodeBits::F8 => self.launch(self.device.kernels().linear_w8, &launch.w8(codes)),
            },
        }
    }
}

impl Launch {
    fn dense(&self, w: *const std::ffi::c_void) -> rksc_linear_params {
        rksc_linear_params {
            x: self.x,
            w,
            bias: self.bias,
            y: self.y,
            workspace: self.workspace,
            route: self.route,
            num_rows: self.num_rows,
            in_features: self.in_features,
            out_features: self.out_features,
            dtype: self.dtype,
            y_stride: self.y_stride,
            layer: self.layer,
            side: self.side,
            reserved: 0,
        }
    }

    fn w4(&self, w: &Codes) -> rksc_linear_w4_params {
        rksc_linear_w4_params {
            x: self.x,
            codes: w.codes.ptr().cast(),
            scales: w.scales.ptr().cast(),
            zeros: if w.format.zeros == ZeroKind::None { std::ptr::null() } else { w.zeros.ptr().cast() },
            bias: self.bias,
            y: self.y,
            workspace: self.workspace,
            route: self.route,
            num_rows: self.num_rows,
            in_features: self.in_features,
            out_features: self.out_features,
            group_size: w.format.group as u32,
            zero_kind: match w.format.zeros {
                ZeroKind::None => RKSC_ZERO_NONE,
                ZeroKind::Integer => RKSC_ZERO_INTEGER,
                ZeroKind::Fractional => RKSC_ZERO_FRACTIONAL,
            },
            dtype: self.dtype,
            y_stride: self.y_stride,
            layer: self.layer,
            side: self.side,
            reserved: 0,
        }
    }

    fn w8(&self, w: &Codes) -> rksc_linear_w8_params {
        rksc_linear_w8_params {
            x: self.x,
            codes: w.codes.ptr().cast(),
            scales: w.scales.ptr().cast(),
            bias: self.bias,
            y: self.y,
            workspace: self.workspace,
            route: self.route,
            num_rows: self.num_rows,
            in_features: self.in_features,
            out_features: self.out_features,
            group_size: w.format.group as u32,
            number: if w.format.bits == CodeBits::F8 { RKSC_NUMBER_E4M3 } else { RKSC_NUMBER_INTEGER },
            dtype: self.dtype,
            y_stride: self.y_stride,
            layer: self.layer,
            side: self.side,
            reserved: 0,
        }
    }
}

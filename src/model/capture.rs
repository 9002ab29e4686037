//! What the matrices of some layers are multiplied with, summed up while texts run.

use std::ops::Range;

use super::Model;
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::{Hessians, LayerInput};

/// See the module text.
pub(super) struct Capture {
    layers: Range<usize>,
    hessians: Hessians,
    /// One input of one layer on its way from the device.
    bytes: Vec<u8>,
}

impl Capture {
    /// Adds the first `rows` rows of `x`, `[rows, width]` of type `dtype`, where their layer is one of those wanted.
    pub(super) fn add<B: Backend>(
        &mut self,
        backend: &mut B,
        (layer, input): (usize, LayerInput),
        (x, dtype): (&B::Buf, DType),
        (rows, width): (usize, usize),
    ) -> Result<()> {
        if !self.layers.contains(&layer) {
            return Ok(());
        }
        self.bytes.clear();
        backend.read_bytes(x, 0, rows * width, &mut self.bytes)?;
        self.hessians.add_rows(layer, input, &dtype.widen(&self.bytes), width)
    }
}

impl<B: Backend> Model<B> {
    /// See [`Runner::begin_capture`](super::Runner::begin_capture).
    pub(super) fn begin_capture(&mut self, layers: Range<usize>) {
        self.capture = Some(Capture { layers, hessians: Hessians::new(), bytes: Vec::new() });
    }

    /// See [`Runner::end_capture`](super::Runner::end_capture).
    pub(super) fn end_capture(&mut self) -> Hessians {
        self.capture.take().map(|capture| capture.hessians).unwrap_or_default()
    }
}

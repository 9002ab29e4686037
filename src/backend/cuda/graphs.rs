//! Decode steps as graphs: recorded when a shape comes by the second time, replayed from then on.
//!
//! Two passes have the same shape when the counts that launches depend on fall into the same buckets ([`Shape`]). What is
//! past the real counts is inert: a padding row has token 0 and no slot, no work item names it, and nobody reads its
//! result. Lengths, positions, slots and block ids are read from device memory, so they may change freely.

use std::collections::HashMap;

use super::device::{Device, Graph};
use crate::error::Result;

/// Shapes kept; past that all are forgotten. A shape is a few hundred launches.
const MAX_SHAPES: usize = 64;

/// Counts a recording depends on, rounded up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) queries: usize,
    pub(super) items: usize,
    pub(super) partials: usize,
    /// Some rows' q goes to the query ring as well.
    pub(super) keeps_queries: bool,
    /// Gates that send rows to the second weight set.
    pub(super) gates: usize,
    /// What else the pass says of itself: a hash of its gates.
    pub(super) variant: u64,
}

/// The next size at or above `n` that launches are made for: powers of two to 8, then multiples of 8 to 64, then of 32.
pub(super) fn bucket(n: usize) -> usize {
    match n {
        0..=8 => n.next_power_of_two(),
        9..=64 => n.next_multiple_of(8),
        _ => n.next_multiple_of(32),
    }
}

/// What becomes of an op that is called now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// It is launched.
    #[default]
    Launch,
    /// It becomes part of a recording.
    Record,
    /// It already is.
    Skip,
}

#[derive(Default)]
pub(super) struct Graphs {
    /// Shapes that came by, with their recording from the second time on.
    shapes: HashMap<Shape, Option<Graph>>,
    mode: Mode,
    shape: Shape,
}

impl Graphs {
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// A repeatable pass begins. The first of a shape is launched op by op, so that scratch has its size before the second
    /// is recorded.
    pub(super) fn begin(&mut self, device: &mut Device, shape: Shape) -> Result<()> {
        self.abandon(device)?;
        self.shape = shape;
        self.mode = match self.shapes.get(&shape) {
            Some(Some(_)) => Mode::Skip,
            Some(None) => {
                device.begin_capture()?;
                Mode::Record
            }
            None => {
                if self.shapes.len() == MAX_SHAPES {
                    self.shapes.clear();
                }
                self.shapes.insert(shape, None);
                Mode::Launch
            }
        };
        Ok(())
    }

    /// The pass's ops have all been called: what was recorded, now or before, runs.
    pub(super) fn end(&mut self, device: &mut Device) -> Result<()> {
        match std::mem::take(&mut self.mode) {
            Mode::Launch => return Ok(()),
            Mode::Record => {
                let graph = device.end_capture()?;
                self.shapes.insert(self.shape, Some(graph));
            }
            Mode::Skip => {}
        }
        match self.shapes.get(&self.shape) {
            Some(Some(graph)) => graph.launch(device),
            _ => Ok(()),
        }
    }

    /// Ends a recording whose pass failed half-way.
    pub(super) fn abandon(&mut self, device: &mut Device) -> Result<()> {
        if std::mem::take(&mut self.mode) == Mode::Record {
            device.end_capture()?;
        }
        Ok(())
    }

    /// Buffers have moved: recordings name the old ones.
    pub(super) fn forget(&mut self) {
        self.shapes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_hold_what_falls_into_them() {
        let expected = [(0, 1), (1, 1), (3, 4), (8, 8), (9, 16), (24, 24), (63, 64), (65, 96), (2048, 2048)];
        for (n, size) in expected {
            assert_eq!(bucket(n), size);
        }
        assert!((1..3000).all(|n| bucket(n) >= n && bucket(bucket(n)) == bucket(n)));
    }
}

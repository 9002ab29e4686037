//! Rows that leave the backbone for the second weight set.
//!
//! ```text
//! layer l - addition, norm, cosine to where the layer began -> exit_rows -> layer l + 1: each row with its own weights
//! ```
//!
//! The device decides and notes by row after which layer it left; the host reads that once, when the pass is over. Rows
//! keep their places, and write their K and V where the backbone would have: no slot is missing.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Fate, Model, Pass, PassGate};
use crate::backend::{Backend, ExitRows, ExitRule, GatherRows, RowIds, StepSimilarity};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gate::{Effect, Rows, Rule, Statistic};

/// What rows on their way out need on the device.
pub(super) struct Routes<B: Backend> {
    /// `[rows]` f32: layers a row has run in the backbone before it left; infinite while it is there.
    pub(super) route: B::Buf,
    /// `[rows]` f32: cosines of the layer looked at last.
    pub(super) similarity: B::Buf,
    /// `[rows, hidden]` f32: the residual stream where a layer began, even layers and odd ones: one is compared with while
    /// the next is kept.
    before: [B::Buf; 2],
    /// `[rows]` f32: room for either of the first two, permuted.
    permuted: B::Buf,
}

impl<B: Backend> Routes<B> {
    fn new(backend: &B, rows: usize, hidden: usize) -> Result<Self> {
        let f32s = |width: usize| backend.alloc(DType::F32, rows * width);
        Ok(Self { route: f32s(1)?, similarity: f32s(1)?, before: [f32s(hidden)?, f32s(hidden)?], permuted: f32s(1)? })
    }

    /// For the addition between layer `after` and the next: where to keep what the next begins with, and what layer
    /// `after` began with.
    pub(super) fn around(
        &mut self,
        after: u32,
        keeps: bool,
        compares: bool,
    ) -> (Option<&mut B::Buf>, Option<StepSimilarity<'_, B>>) {
        let [even, odd] = &mut self.before;
        let (before, next) = if after.is_multiple_of(2) { (&*even, odd) } else { (&*odd, even) };
        let similarity = &mut self.similarity;
        (keeps.then_some(next), compares.then_some(StepSimilarity { before, similarity }))
    }

    /// The rows in flight are now `kept` of those before.
    pub(super) fn permute(&mut self, backend: &mut B, kept: &[u32]) -> Result<()> {
        for values in [&mut self.route, &mut self.similarity] {
            let rows = RowIds::Given(kept);
            backend.gather_rows(GatherRows { rows, src: values, dst: &mut self.permuted, dst_row: 0, width: 1 })?;
            std::mem::swap(values, &mut self.permuted);
        }
        Ok(())
    }
}

/// Some backends round the rows of a pass up, at most to the next 32.
fn route_rows(max_rows: usize) -> usize {
    max_rows.next_multiple_of(32)
}

/// Bytes of [`Routes`] for passes of `max_rows` rows.
pub(crate) fn route_bytes(hidden: usize, max_rows: usize) -> u64 {
    (4 * route_rows(max_rows) * (2 * hidden + 3)) as u64
}

/// What tells a pass with these gates from another of the same shape.
pub(super) fn variant(gates: &[PassGate<'_>]) -> u64 {
    if gates.is_empty() {
        return 0;
    }
    let mut hash = DefaultHasher::new();
    gates.iter().for_each(|g| format!("{:?}", g.spec).hash(&mut hash));
    hash.finish()
}

/// The gates that send rows to the second weight set, in the order of the inputs' `exits`.
pub(super) fn exits<'a, 'b>(gates: &'a [PassGate<'b>]) -> impl Iterator<Item = &'a PassGate<'b>> {
    gates.iter().filter(|g| g.spec.effect == Effect::River)
}

/// A gate looks at the step similarity after this layer.
pub(super) fn compares(gates: &[PassGate<'_>], after: u32) -> bool {
    let is_step = |s: Statistic| matches!(s, Statistic::StepSimilarity { .. });
    gates.iter().any(|g| is_step(g.spec.statistic) && g.spec.layers.contains(&after))
}

impl<B: Backend> Model<B> {
    /// Memory for what the gates of a pass ask for; refuses what cannot be done before anything runs.
    pub(super) fn prepare_gates(&mut self, gates: &[PassGate<'_>]) -> Result<()> {
        let sends = exits(gates).next().is_some();
        if sends && self.river.is_empty() {
            return Err(Error::config("gate", "effect river needs a second weight set"));
        }
        let looks = gates.iter().any(|g| matches!(g.spec.statistic, Statistic::StepSimilarity { .. }));
        if looks { self.make_routes() } else { Ok(()) }
    }

    /// What rows on their way out need, if it is not there.
    pub(super) fn make_routes(&mut self) -> Result<()> {
        if self.routes.is_none() {
            self.routes = Some(Routes::new(&self.backend, route_rows(self.max_rows), self.config.hidden)?);
        }
        Ok(())
    }

    /// Every row begins in the backbone.
    pub(super) fn enter_backbone(&mut self, gates: &[PassGate<'_>], pass: &Pass<B>) -> Result<()> {
        match &mut self.routes {
            Some(routes) if exits(gates).next().is_some() => {
                self.backend.enter_backbone(&mut routes.route, pass.live.num_rows())
            }
            _ => Ok(()),
        }
    }

    /// Lets the gates that look after layer `after` send rows on; the rows' cosines have been taken.
    pub(super) fn exit_rows(&mut self, gates: &[PassGate<'_>], after: u32, pass: &mut Pass<B>) -> Result<()> {
        let Some(routes) = &mut self.routes else { return Ok(()) };
        for (gate, spec) in exits(gates).map(|g| g.spec).enumerate() {
            if !spec.layers.contains(&after) {
                continue;
            }
            let share = match spec.statistic {
                Statistic::StepSimilarity { of: Rows::Percentile { share, .. } } => share,
                _ => 0.0,
            };
            let rule = match spec.rule {
                Rule::EveryNth { every, offset } => ExitRule::EveryNth { every, offset },
                Rule::Above(tau) => ExitRule::Above { similarity: &routes.similarity, tau, share },
                _ => continue,
            };
            let (inputs, route) = (&pass.inputs, &mut routes.route);
            self.backend.exit_rows(ExitRows { inputs, gate, rule, scope: spec.scope, layer: after, route })?;
            pass.routed = true;
        }
        Ok(())
    }

    /// After which layer each sequence left the backbone, and from which of its rows on.
    pub(super) fn read_routes(&mut self, gates: &[PassGate<'_>], pass: &mut Pass<B>) -> Result<()> {
        let Some(routes) = self.routes.as_ref().filter(|_| exits(gates).next().is_some()) else { return Ok(()) };
        let mut left = vec![0.0; pass.live.num_rows()];
        self.backend.read_route(&routes.route, &mut left)?;
        for live in 0..pass.live.num_seqs() {
            let rows = &left[pass.live.first_row(live)..=pass.live.last_row(live)];
            let fate = &mut pass.fates[pass.live.seq_of(live)];
            if let (Some(first), Some(layers), Fate::Done) =
                (rows.iter().position(|r| r.is_finite()), rows.last(), *fate)
            {
                *fate = Fate::River { layer: *layers as u32, first };
            }
        }
        Ok(())
    }
}

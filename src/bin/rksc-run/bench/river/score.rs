//! From results to a row: what is right, how deep tokens went, what they say when they are given, how fast they came.

use rksc::calibrate::river::RiverRow;
use rksc::engine::EngineStats;
use rksc::gate::river::RiverExit;
use rksc::report::ProblemResult;

use super::super::paired::Paired;
use super::Arm;
use super::rates::Rates;

/// What an arm is, for those who draw lines through arms of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Backbone,
    Tau,
    Fixed,
    /// Fixed, and the backbone runs the last tokens again now and then.
    Refresh,
    Draft,
    /// The whole model in codes.
    Whole,
}

impl Kind {
    fn of(arm: &Arm) -> Self {
        match (arm.engine, arm.river) {
            (0, None) => Self::Backbone,
            (_, None) => Self::Whole,
            (_, Some(river)) => match river.exit {
                RiverExit::Tau(_) => Self::Tau,
                RiverExit::Fixed(_) if river.refresh.is_some() => Self::Refresh,
                RiverExit::Fixed(_) => Self::Fixed,
                RiverExit::Draft(_) => Self::Draft,
            },
        }
    }
}

/// One arm against the backbone.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Row {
    pub(super) arm: String,
    pub(super) kind: Kind,
    #[serde(flatten)]
    pub(super) paired: Paired,
    /// Layers with the weights as they are that a generated token went through, in the mean.
    pub(super) mean_depth: f64,
    pub(super) kv_refreshes: u64,
    /// Of drafts, the share that stood.
    pub(super) acceptance: Option<f64>,
    /// The same tokens given to it and to the backbone.
    pub(super) forced: Option<RiverRow>,
    #[serde(flatten)]
    pub(super) rates: Rates,
}

impl Row {
    pub(super) fn new(
        arm: &Arm,
        (results, stats): (&[ProblemResult], &EngineStats),
        backbone: &[ProblemResult],
        num_layers: usize,
    ) -> Self {
        let kind = Kind::of(arm);
        let mean_depth = match kind {
            Kind::Whole => 0.0,
            // Whatever proposed a token, the backbone computed it.
            Kind::Draft => num_layers as f64,
            _ => stats.decode_layers as f64 / stats.tokens_decoded.max(1) as f64,
        };
        Self {
            arm: arm.name.clone(),
            kind,
            paired: Paired::new(results, backbone),
            mean_depth,
            kv_refreshes: stats.kv_refreshes,
            acceptance: acceptance(stats),
            forced: None,
            rates: Rates::default(),
        }
    }

    /// By given tokens where there are any, else by its own.
    pub(super) fn depth_when_forced(&self) -> f64 {
        self.forced.as_ref().map_or(self.mean_depth, |f| f.mean_depth)
    }
}

/// The share of proposed tokens that stood; `None` where none was proposed.
pub(super) fn acceptance(stats: &EngineStats) -> Option<f64> {
    (stats.tokens_drafted > 0).then(|| stats.drafts_kept as f64 / stats.tokens_drafted as f64)
}

//! What the second weight set did for generated tokens.

use serde::Serialize;

use crate::engine::Engine;
use crate::gate::river::{MAX_EXIT_PROMPT, River, RiverExit};

/// Generated tokens of a run under a river.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RiverTotals {
    /// Layers of the model.
    pub layers: usize,
    /// Tokens that were computed one by one.
    pub tokens_decoded: u64,
    /// Layers of the backbone that they went through, in the mean; the river had the others. Null where there are none.
    pub mean_depth: Option<f64>,
    /// Tokens that the river proposed.
    pub drafts_proposed: u64,
    /// Of those, tokens that the backbone would have chosen itself.
    pub drafts_kept: u64,
    /// Times the backbone ran a branch's last tokens again.
    pub refreshes: u64,
}

impl RiverTotals {
    /// What the engine counted since its counters were reset.
    pub fn of(engine: &Engine) -> Self {
        let stats = engine.engine_stats();
        let mean_depth = stats.decode_layers as f64 / stats.tokens_decoded as f64;
        Self {
            layers: engine.model().num_layers,
            tokens_decoded: stats.tokens_decoded,
            mean_depth: (stats.tokens_decoded > 0).then_some(mean_depth),
            drafts_proposed: stats.tokens_drafted,
            drafts_kept: stats.drafts_kept,
            refreshes: stats.kv_refreshes,
        }
    }
}

impl std::fmt::Display for RiverTotals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tokens decoded one by one: {}", self.tokens_decoded)?;
        if let Some(depth) = self.mean_depth {
            write!(f, ", in the backbone for {depth:.2} of {} layers in the mean", self.layers)?;
        }
        if self.drafts_proposed > 0 {
            write!(f, "; drafts: {} proposed, {} kept", self.drafts_proposed, self.drafts_kept)?;
        }
        if self.refreshes > 0 {
            write!(f, "; refreshes: {}", self.refreshes)?;
        }
        Ok(())
    }
}

/// `exact` or `not exact`.
pub fn exactness(river: &River) -> &'static str {
    if river.is_exact() { "exact" } else { "not exact" }
}

/// `generated tokens leave the backbone after 4 layers; verification leaves it too`
pub fn river_in_words(river: &River) -> String {
    let mut words = match river.exit {
        RiverExit::Tau(tau) => {
            let together = if river.batch_min { ", all of a pass after the same" } else { "" };
            format!(
                "a generated token leaves the backbone after the first of the layers {} to {} that changes it so little that \
                 the cosine is above {tau}{together}",
                river.min_layer, river.max_layer
            )
        }
        RiverExit::Fixed(0) => "generated tokens run in the river alone".into(),
        RiverExit::Fixed(1) => "generated tokens leave the backbone after 1 layer".into(),
        RiverExit::Fixed(layers) => format!("generated tokens leave the backbone after {layers} layers"),
        RiverExit::Draft(1) => "the river proposes 1 token, which the backbone checks".into(),
        RiverExit::Draft(tokens) => {
            format!("the river proposes {tokens} tokens, which the backbone checks in one pass")
        }
    };
    if let Some(tau) = river.prefill {
        words += &format!("; prompts of at most {MAX_EXIT_PROMPT} tokens leave it too, as a whole and above {tau}");
    }
    if river.verify {
        words += "; verification leaves it too";
    }
    if let Some(every) = river.refresh {
        words += &format!("; every {every} tokens the backbone runs them again");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_say_what_there_is() {
        let totals = RiverTotals { layers: 24, tokens_decoded: 40, mean_depth: Some(5.25), ..RiverTotals::default() };
        assert_eq!(
            totals.to_string(),
            "tokens decoded one by one: 40, in the backbone for 5.25 of 24 layers in the mean"
        );
        let drafts = RiverTotals { drafts_proposed: 8, drafts_kept: 6, refreshes: 2, ..RiverTotals::default() };
        assert_eq!(drafts.to_string(), "tokens decoded one by one: 0; drafts: 8 proposed, 6 kept; refreshes: 2");
    }

    #[test]
    fn a_policy_says_what_it_does() {
        let words = |exit| river_in_words(&River::new(exit));
        assert!(
            words(RiverExit::Tau(0.5)).contains("the layers 1 to 8") && words(RiverExit::Tau(0.5)).ends_with("0.5")
        );
        assert_eq!(words(RiverExit::Fixed(4)), "generated tokens leave the backbone after 4 layers");
        let all = River { prefill: Some(0.9), verify: true, refresh: Some(64), ..River::new(RiverExit::Fixed(0)) };
        assert_eq!(
            river_in_words(&all),
            "generated tokens run in the river alone; prompts of at most 256 tokens leave it too, as a whole and above 0.9; \
             verification leaves it too; every 64 tokens the backbone runs them again"
        );
        assert_eq!(exactness(&all), "not exact");
        assert_eq!(exactness(&River::new(RiverExit::Draft(4))), "exact");
    }
}

//! How many KV slots a branch may hold, and when it is cut back to them.
//!
//! ```text
//! slots:  | pinned: never dropped | budget: kept by rule ... the last `window` as they are | buffer: fills up until the cut |
//! ```
//!
//! Every (layer, kv head) keeps the same *number* of slots and chooses its own *set*, so one block table stays valid for
//! all of them. A generating branch is cut before a row runs when it holds more than its budget and either its own token
//! counter comes to its phase or the buffer is full. The phase differs from branch to branch, so that not all are cut in
//! the same step, and depends on the branch alone, so that its cuts do not depend on what else is in flight.

use serde::{Deserialize, Serialize};

use crate::backend::RkvVariant;
use crate::error::{Error, Result};

/// More slots than any cache holds; sums and products with it stay within 64 bits.
const MOST: usize = 1 << 30;

/// Which slots stay at a cut. Every rule keeps the pinned slots and the last `window` besides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "method")]
pub enum KeepRule {
    /// R-KV (arXiv 2505.24133): much attended to by the last queries, and no repetition of a newer key.
    RKv {
        /// Which of the three published forms.
        variant: RkvVariant,
        /// Share of the importance in the score; the rest is redundancy.
        lambda: f32,
        /// Cosine above which two keys are similar.
        threshold: f32,
        /// Slots over which importance is pooled; odd.
        pool_size: usize,
    },
    /// Importance alone: R-KV with lambda 1.
    SnapKv {
        /// Slots over which importance is pooled; odd.
        pool_size: usize,
    },
    /// The attention each slot has received since it was written, summed over all rows (arXiv 2306.14048); half of the
    /// budget goes to the newest slots.
    H2o,
    /// The newest (arXiv 2309.17453; its sinks are pinned slots).
    Streaming,
    /// A draw per slot, layer and head.
    Random {
        /// Key of the draws.
        seed: u64,
    },
}

impl KeepRule {
    /// R-KV as the reference code has it, with the paper's lambda.
    pub const RKV: Self = Self::RKv { variant: RkvVariant::Code, lambda: 0.1, threshold: 0.5, pool_size: 7 };
    /// SnapKV with R-KV's pooling.
    pub const SNAPKV: Self = Self::SnapKv { pool_size: 7 };

    /// Its name on the command line and in records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RKv { .. } => "rkv",
            Self::SnapKv { .. } => "snapkv",
            Self::H2o => "h2o",
            Self::Streaming => "streaming",
            Self::Random { .. } => "random",
        }
    }

    /// How it scores slots by the branch's last queries, if it does.
    pub(crate) const fn by_queries(self) -> Option<QueryScoring> {
        match self {
            Self::RKv { variant, lambda, threshold, pool_size } => {
                Some(QueryScoring { variant, lambda, threshold, pool_size })
            }
            Self::SnapKv { pool_size } => {
                Some(QueryScoring { variant: RkvVariant::Code, lambda: 1.0, threshold: 1.0, pool_size })
            }
            Self::H2o | Self::Streaming | Self::Random { .. } => None,
        }
    }
}

/// See [`KeepRule::RKv`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct QueryScoring {
    pub(crate) variant: RkvVariant,
    pub(crate) lambda: f32,
    pub(crate) threshold: f32,
    pub(crate) pool_size: usize,
}

/// Who chooses a set of slots together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Every kv head of every layer for itself.
    #[default]
    Head,
    /// The heads of a layer, by their mean score.
    Layer,
    /// All layers and heads, by their mean score: whole tokens are kept or dropped.
    Token,
}

/// What becomes of a prompt's slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvPrompt {
    /// They stay.
    #[default]
    Pin,
    /// They count and are dropped like any other, but for the sinks. Such branches stay out of the prefix cache.
    Evict,
}

/// What is asked for branches whose prompts are not known yet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvLimit {
    /// See [`KvBudget::budget`].
    pub budget: usize,
    /// See [`KvBudget::buffer`]; `None` takes the default.
    pub buffer: Option<usize>,
    /// What becomes of the prompt.
    pub prompt: KvPrompt,
    /// With [`KvPrompt::Evict`], leading tokens that stay all the same.
    pub sinks: usize,
    /// Which slots stay.
    pub rule: KeepRule,
    /// Who chooses together.
    pub aggregation: Aggregation,
}

impl KvLimit {
    /// R-KV with the prompt pinned and the default buffer.
    pub const fn new(budget: usize) -> Self {
        Self {
            budget,
            buffer: None,
            prompt: KvPrompt::Pin,
            sinks: 4,
            rule: KeepRule::RKV,
            aggregation: Aggregation::Head,
        }
    }

    /// For a branch with this prompt.
    pub fn for_prompt(&self, num_tokens: usize, block_size: usize) -> KvBudget {
        KvBudget {
            budget: self.budget,
            buffer: self.buffer.unwrap_or_else(|| KvBudget::default_buffer(self.budget, block_size)),
            pinned: match self.prompt {
                KvPrompt::Pin => num_tokens,
                KvPrompt::Evict => self.sinks.min(num_tokens),
            },
            rule: self.rule,
            aggregation: self.aggregation,
        }
    }
}

/// See the module text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvBudget {
    /// Slots kept at a cut per (layer, kv head), the pinned ones not counted.
    pub budget: usize,
    /// Slots that may come on top until the next cut.
    pub buffer: usize,
    /// Leading tokens that are never dropped: the prompt, or a few attention sinks.
    pub pinned: usize,
    /// Which slots stay.
    pub rule: KeepRule,
    /// Who chooses together.
    pub aggregation: Aggregation,
}

impl KvBudget {
    /// R-KV with `budget` slots behind the first `pinned`, and the default buffer.
    pub fn new(budget: usize, pinned: usize, block_size: usize) -> Self {
        let buffer = Self::default_buffer(budget, block_size);
        Self { budget, buffer, pinned, rule: KeepRule::RKV, aggregation: Aggregation::Head }
    }

    /// Half of the budget and at most 128, in whole blocks.
    pub fn default_buffer(budget: usize, block_size: usize) -> usize {
        (budget / 2).clamp(1, 128).next_multiple_of(block_size)
    }

    /// Refuses what cannot work, by the flag's name.
    pub fn validate(&self, window: usize) -> Result<()> {
        if self.budget <= window {
            let why = format!("must be above the {window} last tokens that always stay (--kv-window)");
            return Err(Error::config("kv-budget", why));
        }
        if self.budget > MOST {
            return Err(Error::config("kv-budget", format!("must be at most {MOST}")));
        }
        if self.buffer > MOST {
            return Err(Error::config("kv-buffer", format!("must be at most {MOST}")));
        }
        if self.buffer == 0 {
            return Err(Error::config("kv-buffer", "must be at least 1"));
        }
        match self.rule {
            KeepRule::RKv { lambda, threshold, pool_size, .. } => {
                check_pool_size(pool_size)?;
                if !(0.0..=1.0).contains(&lambda) {
                    return Err(Error::config("kv-lambda", "must be between 0 and 1"));
                }
                if !(0.0..=1.0).contains(&threshold) {
                    return Err(Error::config("kv-threshold", "must be a cosine between 0 and 1"));
                }
                Ok(())
            }
            KeepRule::SnapKv { pool_size } => check_pool_size(pool_size),
            KeepRule::H2o | KeepRule::Streaming | KeepRule::Random { .. } => Ok(()),
        }
    }

    /// Slots behind the pinned ones after a cut. Algorithm 1 of the paper keeps the window on top of the budget.
    pub fn kept(&self, window: usize) -> usize {
        let on_top = matches!(self.rule, KeepRule::RKv { variant: RkvVariant::Alg1, .. });
        self.budget + if on_top { window } else { 0 }
    }

    /// Who chooses together; in Algorithm 1 it is the heads of a layer at least.
    pub(crate) fn choosers(&self) -> Aggregation {
        match (self.rule, self.aggregation) {
            (KeepRule::RKv { variant: RkvVariant::Alg1, .. }, Aggregation::Head) => Aggregation::Layer,
            (_, aggregation) => aggregation,
        }
    }

    /// Last slots that stay whatever their score: the window, and for H2O the newer half of the budget.
    pub(crate) fn recent(&self, window: usize) -> usize {
        match self.rule {
            KeepRule::H2o => window.max(self.budget / 2),
            _ => window,
        }
    }

    /// A branch with `num_tokens` computed, `held` of its slots unpinned, is to be cut now.
    pub(crate) fn is_due(&self, num_tokens: usize, held: usize, phase: usize, window: usize) -> bool {
        let kept = self.kept(window);
        held > kept && (num_tokens % self.buffer == phase || held >= kept + self.buffer)
    }

    /// What a branch with a prompt of `prompt` tokens holds while it generates, pass by pass and without end: what is to
    /// be expected of it, from numbers alone. `ordinal` is the number of the child, of a root its path. For branches that
    /// share nothing behind their pinned tokens.
    pub fn held(&self, prompt: usize, ordinal: u64, window: usize) -> impl Iterator<Item = Held> + use<> {
        let budget = *self;
        let (phase, mut num_slots) = (budget.phase(ordinal), prompt);
        (prompt..).map(move |num_tokens| {
            let unpinned = num_slots.saturating_sub(budget.pinned);
            // What has not been attended from cannot be judged by its last queries.
            let can_judge = num_tokens > budget.pinned || budget.rule.by_queries().is_none();
            let is_cut = can_judge && budget.is_due(num_tokens, unpinned, phase, window);
            if is_cut {
                num_slots = budget.pinned + budget.kept(window);
            }
            num_slots += 1;
            Held { num_tokens, num_slots, is_cut }
        })
    }

    /// When within the buffer the `ordinal`-th of several branches is cut: as far from those before it as may be.
    pub(crate) fn phase(&self, ordinal: u64) -> usize {
        let spread = (u64::from((ordinal as u32).reverse_bits()) * self.buffer as u64) >> 32;
        (1 + spread as usize) % self.buffer
    }
}

/// A branch's slots in one of its passes. See [`KvBudget::held`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Tokens it had computed before.
    pub num_tokens: usize,
    /// Slots it attends to in the pass, the pinned ones and the new token's own included.
    pub num_slots: usize,
    /// It is cut before the pass.
    pub is_cut: bool,
}

fn check_pool_size(pool_size: usize) -> Result<()> {
    if pool_size % 2 == 1 && pool_size <= 1023 {
        return Ok(());
    }
    Err(Error::config("kv-pool-size", "must be odd and at most 1023"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: usize = 8;

    /// Totals at which a branch with this prompt is cut, with the slots before and after, up to `end` tokens.
    fn cuts(budget: &KvBudget, prompt: usize, end: usize) -> Vec<(usize, usize, usize)> {
        let (mut held, mut cuts) = (prompt, Vec::new());
        for total in prompt..end {
            if budget.is_due(total, held, budget.phase(0), WINDOW) {
                cuts.push((total, held, budget.kept(WINDOW)));
                held = budget.kept(WINDOW);
            }
            held += 1;
        }
        cuts
    }

    #[test]
    fn kv7_schedule() {
        let budget = KvBudget { buffer: 128, ..KvBudget::new(256, 0, 16) };
        assert_eq!(cuts(&budget, 100, 700), [(257, 257, 256), (385, 384, 256), (513, 384, 256), (641, 384, 256)]);
        assert_eq!(cuts(&budget, 600, 800), [(600, 600, 256), (641, 297, 256), (769, 384, 256)]);
    }

    #[test]
    fn what_is_held_is_the_schedule_behind_the_pinned() {
        let budget = KvBudget { buffer: 128, ..KvBudget::new(640, 16, 16) };
        let passes: Vec<Held> = budget.held(16, 0, WINDOW).take(8192).collect();
        // Phase 1: the first total of the form 1 + 128 k at which more than 640 are unpinned is 769.
        let cuts: Vec<usize> = passes.iter().filter(|h| h.is_cut).map(|h| h.num_tokens).collect();
        assert_eq!(cuts, (0..).map(|k| 769 + 128 * k).take_while(|&t| t < 16 + 8192).collect::<Vec<_>>());
        assert_eq!(passes.iter().map(|h| h.num_slots).max(), Some(16 + 640 + 128));
        assert_eq!((passes[752].num_slots, passes[753].num_slots), (769, 16 + 640 + 1));
    }

    #[test]
    fn never_more_than_budget_and_buffer_at_any_phase() {
        let budget = KvBudget { buffer: 48, ..KvBudget::new(100, 0, 16) };
        for ordinal in 0..100 {
            let (phase, mut held) = (budget.phase(ordinal), 0);
            for total in 0..2000 {
                if budget.is_due(total, held, phase, WINDOW) {
                    held = 100;
                }
                held += 1;
                assert!(held <= 148);
            }
        }
    }

    #[test]
    fn phases_of_neighbours_lie_apart() {
        let budget = KvBudget { buffer: 128, ..KvBudget::new(256, 0, 16) };
        let phases: Vec<usize> = (0..8).map(|i| budget.phase(i)).collect();
        assert_eq!(phases, [1, 65, 33, 97, 17, 81, 49, 113]);
        assert_eq!(KvBudget { buffer: 1, ..budget }.phase(5), 0);
    }

    #[test]
    fn default_buffer_is_half_the_budget_in_blocks() {
        assert_eq!(
            [24, 100, 205, 256, 640, 4096].map(|b| KvBudget::default_buffer(b, 16)),
            [16, 64, 112, 128, 128, 128]
        );
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let good = KvBudget::new(64, 0, 16);
        let field = |b: KvBudget| b.validate(WINDOW).unwrap_err().to_string();
        assert!(field(KvBudget { budget: 8, ..good }).starts_with("kv-budget"));
        assert!(field(KvBudget { buffer: 0, ..good }).starts_with("kv-buffer"));
        assert!(field(KvBudget { budget: usize::MAX, ..good }).starts_with("kv-budget"));
        assert!(field(KvBudget { buffer: usize::MAX, ..good }).starts_with("kv-buffer"));
        let rkv = |lambda, threshold, pool_size| KvBudget {
            rule: KeepRule::RKv { variant: RkvVariant::Code, lambda, threshold, pool_size },
            ..good
        };
        assert!(field(rkv(1.5, 0.5, 7)).starts_with("kv-lambda"));
        assert!(field(rkv(f32::NAN, 0.5, 7)).starts_with("kv-lambda"));
        assert!(field(rkv(0.1, 2.0, 7)).starts_with("kv-threshold"));
        assert!(field(rkv(0.1, 0.5, 6)).starts_with("kv-pool-size"));
        good.validate(WINDOW).unwrap();
    }
}

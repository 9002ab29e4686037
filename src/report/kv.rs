//! What a KV budget held back.

use serde::Serialize;

use super::ProblemResult;
use crate::backend::RkvVariant;
use crate::kv::budget::{Aggregation, KeepRule, KvLimit, KvPrompt};

/// Branches under a KV budget, as they stood when decoding ended. Slots are those of one layer and head, and each branch
/// counts what it shares as its own: how much memory that is, blocks tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvTotals {
    /// Branches that came to their end.
    pub branches: usize,
    /// Of those, the ones that were cut at least once.
    pub branches_cut: usize,
    /// Times a branch was cut back to its budget.
    pub cuts: u64,
    /// Slots held.
    pub slots_held: u64,
    /// Slots that would have been held without the budget.
    pub slots_full: u64,
    /// The difference.
    pub slots_dropped: u64,
    /// The most that one branch held.
    pub most_held: usize,
    /// The most that one branch would have held.
    pub most_full: usize,
}

impl KvTotals {
    /// Sums up a run.
    pub fn of(results: &[ProblemResult]) -> Self {
        let mut totals = Self::default();
        for b in results.iter().flat_map(|r| &r.branches).filter(|b| b.merged_into.is_none()) {
            totals.add(b.kv_slots, b.kv_full, b.kv_cuts);
        }
        totals
    }

    /// One branch more, with the slots it holds and would hold.
    pub fn add(&mut self, held: usize, full: usize, cuts: u32) {
        self.branches += 1;
        self.branches_cut += usize::from(cuts > 0);
        self.cuts += u64::from(cuts);
        self.slots_held += held as u64;
        self.slots_full += full as u64;
        self.slots_dropped += full.saturating_sub(held) as u64;
        self.most_held = self.most_held.max(held);
        self.most_full = self.most_full.max(full);
    }
}

impl std::fmt::Display for KvTotals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "branches cut: {} of {}, cuts: {}; slots held at the end: {} of {} ({} dropped); most held by one branch: {}, {} \
             without the budget",
            self.branches_cut,
            self.branches,
            self.cuts,
            self.slots_held,
            self.slots_full,
            self.slots_dropped,
            self.most_held,
            self.most_full
        )
    }
}

/// `64 KV slots a layer and head behind the prompt, chosen by rkv (code, lambda 0.1), and 32 more until a cut`.
pub fn limit_in_words(limit: &KvLimit) -> String {
    let rule = match limit.rule {
        KeepRule::RKv { variant, lambda, .. } => {
            let variant = match variant {
                RkvVariant::Code => "code",
                RkvVariant::Text => "text",
                RkvVariant::Alg1 => "alg1",
            };
            format!("{} ({variant}, lambda {lambda})", limit.rule.name())
        }
        KeepRule::Random { seed } => format!("{} (seed {seed})", limit.rule.name()),
        rule @ (KeepRule::SnapKv { .. } | KeepRule::H2o | KeepRule::Streaming) => rule.name().into(),
    };
    let window = match limit.rule {
        KeepRule::RKv { variant: RkvVariant::Alg1, .. } => ", besides the window,",
        _ => "",
    };
    let together = match limit.aggregation {
        Aggregation::Head => "",
        Aggregation::Layer => " for all heads of a layer",
        Aggregation::Token => " for all layers and heads",
    };
    let place = match (limit.prompt, limit.sinks) {
        (KvPrompt::Pin, _) => "behind the prompt".to_string(),
        (KvPrompt::Evict, 0) => "the prompt's among them".into(),
        (KvPrompt::Evict, 1) => "behind the first token, the rest of the prompt among them".into(),
        (KvPrompt::Evict, n) => format!("behind the first {n} tokens, the rest of the prompt among them"),
    };
    let buffer = limit.buffer.map_or("some".into(), |n| n.to_string());
    format!(
        "{} KV slots a layer and head{window} {place}, chosen by {rule}{together}, and {buffer} more until a cut",
        limit.budget
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_sums_and_maxima() {
        let mut totals = KvTotals::default();
        totals.add(100, 180, 2);
        totals.add(120, 120, 0);
        let expected = KvTotals {
            branches: 2,
            branches_cut: 1,
            cuts: 2,
            slots_held: 220,
            slots_full: 300,
            slots_dropped: 80,
            most_held: 120,
            most_full: 180,
        };
        assert_eq!(totals, expected);
    }

    #[test]
    fn a_limit_says_what_it_does_with_the_prompt() {
        let limit = KvLimit { buffer: Some(32), ..KvLimit::new(64) };
        assert_eq!(
            limit_in_words(&limit),
            "64 KV slots a layer and head behind the prompt, chosen by rkv (code, lambda 0.1), and 32 more until a cut"
        );
        let evict = KvLimit { prompt: KvPrompt::Evict, rule: KeepRule::Streaming, ..limit };
        assert_eq!(
            limit_in_words(&evict),
            "64 KV slots a layer and head behind the first 4 tokens, the rest of the prompt among them, chosen by \
             streaming, and 32 more until a cut"
        );
        let alg1 = KeepRule::RKv { variant: RkvVariant::Alg1, lambda: 0.1, threshold: 0.5, pool_size: 7 };
        let words = limit_in_words(&KvLimit { rule: alg1, aggregation: Aggregation::Layer, ..limit });
        assert!(words.contains("besides the window") && words.contains("for all heads of a layer"), "{words}");
    }
}

//! The record of a run: what each branch said, what it cost, why it ended; per problem and in sum.

pub mod html;
pub mod kv;
pub mod ladder;
pub mod mechanisms;
mod plan;
pub mod river;
pub mod separation;

use serde::Serialize;

pub use plan::MemoryPlan;

use crate::engine::{EndReason, Engine};
use crate::solver::SolverConfig;

/// Tokens computed, by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TokenCounts {
    /// Prompts.
    pub prefill: u64,
    /// Generated tokens.
    pub decode: u64,
    /// Verification.
    pub verify: u64,
    /// Prompts that ran only through the layers before another stood in for them.
    pub probed: u64,
}

impl TokenCounts {
    /// All phases.
    pub fn total(&self) -> u64 {
        self.prefill + self.decode + self.verify + self.probed
    }
}

/// Milliseconds of device passes, by phase; a pass shared by phases is divided by its branches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseMs {
    /// Prompts.
    pub prefill: f64,
    /// Generated tokens.
    pub decode: f64,
    /// Verification.
    pub verify: f64,
}

/// What became of a problem's verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyOutcome {
    /// Branches verified.
    pub run: usize,
    /// True when a rule skipped it.
    pub skipped: bool,
    /// Of the verified, those that left their pass before its last layer.
    pub exited: usize,
}

/// What became of a problem's trial answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TrialCounts {
    /// Forks asked for an answer.
    pub run: usize,
    /// Of those, how many took their branch's place.
    pub stood: usize,
    /// Tokens computed on them; part of the decoded tokens.
    pub tokens: u64,
}

/// One pass of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PassRecord {
    /// Tokens computed.
    pub rows: usize,
    /// Layers they went through, in sum.
    pub layer_rows: u64,
    /// KV slots attention read in each layer, shared runs once.
    pub slots_read: usize,
    /// Wall time.
    pub seconds: f64,
}

impl PassRecord {
    /// Layers of a row, in the mean.
    fn layers(&self) -> f64 {
        self.layer_rows as f64 / self.rows.max(1) as f64
    }
}

/// What an inner layer of a verification pass would have said.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerEntropy {
    /// After this layer, counted from 1.
    pub layer: u32,
    /// In nats, over what the configuration says (the vocabulary, or the verdicts).
    pub entropy: f64,
    /// Largest probability.
    pub top1: f64,
    /// The verdict's yes against its no, where the look was at these two alone and each has one spelling.
    pub yes: Option<f64>,
}

/// How similar a problem's prompts (or its branches, when they were compared while decoding) are.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SimilarityRecord {
    /// What is compared, in order: `wording 0`, `wording 1`, ...
    pub members: Vec<String>,
    /// `[members]`: with the root.
    pub to_root: Vec<f32>,
    /// `[members][members]`.
    pub pairwise: Vec<Vec<f32>>,
    /// `[members]`: the member that stands for each.
    pub clusters: Vec<usize>,
    /// The threshold.
    pub tau: f32,
    /// The deepest layer compared.
    pub depth: u32,
}

/// Why a node of the branch tree ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeEnd {
    /// It was kept, and its children went on.
    Expanded,
    /// It came to its own end.
    Answered,
    /// It reached its token limit.
    Length,
    /// A decode exit stopped it.
    Stopped,
    /// The beam had no place for it.
    Pruned,
    /// It said what another node says: that one has its votes.
    Duplicate(usize),
    /// Its state had converged with another's: that one has its votes.
    Merged(usize),
    /// Its prompt was similar enough to another's, whose KV it took.
    Aliased(usize),
    /// Its logits were not finite.
    Failed,
}

/// A node of a problem's branch tree.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeResult {
    /// Its number.
    pub node: usize,
    /// The node it grew from.
    pub parent: Option<usize>,
    /// Distance from the root.
    pub depth: usize,
    /// Its number among its siblings; at depth 1 also the number of its approach.
    pub branch: usize,
    /// Tokens it generated itself.
    pub tokens: usize,
    /// The same in words.
    pub text: String,
    /// Mean top-1 probability over its own steps.
    pub confidence: f64,
    /// What its step was scored, if it was.
    pub score: Option<f64>,
    /// Its answer, if it gave one.
    pub answer: Option<String>,
    /// Why it ended.
    pub ended: NodeEnd,
}

/// KV blocks at one moment of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemorySample {
    /// Engine steps since the problem began.
    pub step: usize,
    /// Blocks held by more than one branch.
    pub shared: usize,
    /// Blocks held by one branch.
    pub private: usize,
    /// Blocks only the prefix cache holds.
    pub cached: usize,
    /// Blocks given back since the problem began.
    pub freed: u64,
}

/// A branch's part in a problem.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BranchResult {
    /// Its number, from 0; also the number of its approach, unless the branches were grown as a tree: then they are its
    /// leaves, in the order of the nodes.
    pub branch: usize,
    /// What it generated.
    pub tokens: Vec<u32>,
    /// The same in words.
    pub text: String,
    /// The answer in it.
    pub answer: Option<String>,
    /// The verifier's yes against its no, if it was asked.
    pub score: Option<f64>,
    /// Mean top-1 probability over its generated steps.
    pub confidence: f64,
    /// Why it ended.
    pub ended: Option<EndReason>,
    /// Its weight in a vote: its own, and those of the branches it speaks for.
    pub votes: f64,
    /// The layer after which its verification stopped, where it did.
    pub exit_layer: Option<u32>,
    /// What the probed layers of its verification said, shallow first.
    pub layers: Vec<LayerEntropy>,
    /// The wording of the problem it was asked in; 0 is the question itself.
    pub wording: usize,
    /// The branch that has its votes, where the two had become one.
    pub merged_into: Option<usize>,
    /// KV blocks it shared when decoding ended.
    pub blocks_shared: usize,
    /// KV blocks of its own.
    pub blocks_private: usize,
    /// KV slots it held when decoding ended, in each layer and head.
    pub kv_slots: usize,
    /// KV slots it would have held then without a KV budget: one a token.
    pub kv_full: usize,
    /// Times its KV was cut back to its budget.
    pub kv_cuts: u32,
    /// Of the tokens it generated, those that were computed when that first happened.
    pub first_kv_cut: Option<usize>,
}

/// A problem's record: one line of `--out`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProblemResult {
    /// Its id.
    pub id: String,
    /// The selected answer.
    pub answer: Option<String>,
    /// Whether it is the expected one, if that is known.
    pub correct: Option<bool>,
    /// The expected answer, if known.
    pub expected: Option<String>,
    /// The branch it came from.
    pub winner: usize,
    /// From the first token id to the answer.
    pub latency_ms: f64,
    /// Device time by phase.
    pub phase_ms: PhaseMs,
    /// Tokens computed by phase.
    pub tokens: TokenCounts,
    /// Verification.
    pub verify: VerifyOutcome,
    /// The most KV blocks in use at once since the counters were reset.
    pub blocks_peak: usize,
    /// KV blocks held by more than one branch when decoding ended.
    pub blocks_shared: usize,
    /// Trial answers.
    pub trials: TrialCounts,
    /// The branches, in order.
    pub branches: Vec<BranchResult>,
    /// Similarity of the problem's prompts, where they were compared.
    pub similarity: Option<SimilarityRecord>,
    /// The branch tree, parents first; empty where the solver made none.
    pub tree: Vec<NodeResult>,
    /// KV blocks over time, where that was asked for.
    pub memory: Vec<MemorySample>,
}

/// Latencies of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LatencyMs {
    /// Arithmetic mean.
    pub mean: f64,
    /// 10th percentile.
    pub p10: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
}

impl LatencyMs {
    /// Percentiles by linear interpolation between order statistics.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mean = if sorted.is_empty() { 0.0 } else { sorted.iter().sum::<f64>() / sorted.len() as f64 };
        Self { mean, p10: quantile(&sorted, 0.1), p50: quantile(&sorted, 0.5), p90: quantile(&sorted, 0.9) }
    }
}

/// The `q`-quantile of sorted samples.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let (lo, hi) = (at.floor() as usize, at.ceil() as usize);
    sorted[lo] + (sorted[hi.min(last)] - sorted[lo]) * (at - lo as f64)
}

/// Verification in sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyTotals {
    /// Branches verified.
    pub run: usize,
    /// Problems whose verification was skipped.
    pub skipped: usize,
}

/// Blocks in sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlockTotals {
    /// The most in use at once.
    pub peak: usize,
    /// The most shared at the end of a problem's decoding.
    pub shared: usize,
}

/// The record of a run.
#[derive(Clone, Debug, Serialize)]
pub struct SolveReport {
    /// Problems solved.
    pub problems: usize,
    /// Of those with a known answer, how many were right.
    pub correct: usize,
    /// `correct` over the problems with a known answer; null when there are none.
    pub accuracy: Option<f64>,
    /// 95 % Wilson interval of `accuracy`.
    pub accuracy_interval: Option<[f64; 2]>,
    /// Latency per problem.
    pub latency_ms: LatencyMs,
    /// Tokens computed by phase.
    pub tokens: TokenCounts,
    /// Verification.
    pub verify: VerifyTotals,
    /// The preset's name.
    pub policy: &'static str,
    /// KV blocks.
    pub blocks: BlockTotals,
    /// What the KV budget held back, where there was one.
    pub kv: Option<kv::KvTotals>,
    /// What the river did, where there was one and the engine was [asked](Self::with_river).
    pub river: Option<river::RiverTotals>,
    /// The whole configuration.
    pub config: SolverConfig,
}

impl SolveReport {
    /// Sums up a run.
    pub fn new(config: &SolverConfig, results: &[ProblemResult]) -> Self {
        let known = results.iter().filter(|r| r.correct.is_some()).count();
        let correct = results.iter().filter(|r| r.correct == Some(true)).count();
        let latencies: Vec<f64> = results.iter().map(|r| r.latency_ms).collect();
        let tokens = results.iter().fold(TokenCounts::default(), |t, r| TokenCounts {
            prefill: t.prefill + r.tokens.prefill,
            decode: t.decode + r.tokens.decode,
            verify: t.verify + r.tokens.verify,
            probed: t.probed + r.tokens.probed,
        });
        Self {
            problems: results.len(),
            correct,
            accuracy: (known > 0).then(|| correct as f64 / known as f64),
            accuracy_interval: (known > 0).then(|| wilson(correct, known)),
            latency_ms: LatencyMs::of(&latencies),
            tokens,
            verify: VerifyTotals {
                run: results.iter().map(|r| r.verify.run).sum(),
                skipped: results.iter().filter(|r| r.verify.skipped).count(),
            },
            policy: config.policy.name(),
            blocks: BlockTotals {
                peak: results.iter().map(|r| r.blocks_peak).max().unwrap_or(0),
                shared: results.iter().map(|r| r.blocks_shared).max().unwrap_or(0),
            },
            kv: config.kv.map(|_| kv::KvTotals::of(results)),
            river: None,
            config: config.clone(),
        }
    }

    /// With what the engine counted, where the run had a river.
    pub fn with_river(self, engine: &Engine) -> Self {
        Self { river: self.config.river.map(|_| river::RiverTotals::of(engine)), ..self }
    }
}

/// The 95 % Wilson score interval of `k` successes in `n` trials.
pub fn wilson(k: usize, n: usize) -> [f64; 2] {
    let (k, n, z) = (k as f64, n as f64, 1.959_964);
    let p = k / n;
    let centre = p + z * z / (2.0 * n);
    let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    [((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let l = LatencyMs::of(&[4.0, 1.0, 3.0, 2.0, 5.0]);
        assert_eq!((l.mean, l.p50), (3.0, 3.0));
        assert!((l.p10 - 1.4).abs() < 1e-12 && (l.p90 - 4.6).abs() < 1e-12);
        assert_eq!(LatencyMs::of(&[]), LatencyMs::default());
    }

    #[test]
    fn the_wilson_interval_of_a_textbook_case() {
        let [lo, hi] = wilson(81, 263);
        assert!((lo - 0.2553).abs() < 5e-4 && (hi - 0.3662).abs() < 5e-4, "{lo} {hi}");
    }
}

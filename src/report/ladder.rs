//! Policies against each other on the same problems: paired ratios, their intervals, and what the counted work allows.
//!
//! *Ratio* of A to B: mean latency of A over mean latency of B over the same problems. Its interval is the percentile
//! bootstrap over problems: a resample draws problems, and both arms keep their own latency of each.
//!
//! *Ceiling* of A to B: every pass of every arm is priced from one list, made from the passes of all arms together, and
//! the ceiling is the price of A's passes over the price of B's. The list knows rows, and the share of the layers they
//! went through, so the ceiling is what a policy can gain by computing fewer rows in fewer layers and passes. A ratio below its ceiling shows what is lost between the
//! passes (tokens, texts, forks); a ratio above it shows passes that were cheaper than others of as many rows, because
//! attention read shared slots once.

use serde::{Serialize, Serializer};

use super::{BlockTotals, LatencyMs, PassRecord, ProblemResult, SolveReport, TokenCounts, quantile};
use crate::prompts::same_answer;
use crate::solver::{Policy, SolverConfig};
use crate::testing::fill::Fill;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;
/// Key of the resamples: the same samples give the same interval.
const SEED: u64 = 0x1add_e500;
/// Passes of one row count that make its median a price of its own.
const MIN_SAMPLES: usize = 5;

/// A statistic and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The statistic of the samples.
    pub value: f64,
    /// 2.5th percentile over resamples.
    pub lo: f64,
    /// 97.5th percentile over resamples.
    pub hi: f64,
}

/// Mean of `a` over mean of `b`, where `a[i]` and `b[i]` belong to problem `i`. `None` without problems.
pub fn ratio_of_means(a: &[f64], b: &[f64]) -> Option<Interval> {
    bootstrap(a, b, |sum_a, sum_b, _| sum_a / sum_b)
}

/// Mean of `a` minus mean of `b`, where `a[i]` and `b[i]` belong to problem `i`. `None` without problems.
pub fn difference_of_means(a: &[f64], b: &[f64]) -> Option<Interval> {
    bootstrap(a, b, |sum_a, sum_b, n| (sum_a - sum_b) / n as f64)
}

/// Paired bootstrap of a statistic of the two sums over `n` problems.
fn bootstrap(a: &[f64], b: &[f64], statistic: impl Fn(f64, f64, usize) -> f64) -> Option<Interval> {
    let n = a.len().min(b.len());
    if n == 0 {
        return None;
    }
    let mut draws = Fill::new(SEED);
    let mut values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let (mut sum_a, mut sum_b) = (0.0, 0.0);
            for _ in 0..n {
                let i = draws.below(n);
                sum_a += a[i];
                sum_b += b[i];
            }
            statistic(sum_a, sum_b, n)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let value = statistic(a[..n].iter().sum(), b[..n].iter().sum(), n);
    Some(Interval { value, lo: quantile(&values, 0.025), hi: quantile(&values, 0.975) })
}

/// Seconds of a pass by its rows.
#[derive(Clone, Debug, Default)]
pub struct PriceList {
    /// Ascending in rows.
    prices: Vec<Price>,
    /// Layers of a row that went through all of them.
    layers: f64,
}

#[derive(Clone, Copy, Debug)]
struct Price {
    rows: usize,
    samples: usize,
    /// Median.
    seconds: f64,
}

impl PriceList {
    /// The median of each row count, among passes whose rows went through all layers.
    pub fn new<'a>(passes: impl IntoIterator<Item = &'a PassRecord>) -> Self {
        let passes: Vec<&PassRecord> = passes.into_iter().collect();
        let layers = passes.iter().map(|p| p.layers()).fold(0.0, f64::max);
        let whole = passes.iter().filter(|p| p.layers() >= layers);
        let mut passes: Vec<(usize, f64)> = whole.map(|p| (p.rows, p.seconds)).collect();
        passes.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let price = |same: &[(usize, f64)]| {
            let seconds: Vec<f64> = same.iter().map(|p| p.1).collect();
            Price { rows: same[0].0, samples: same.len(), seconds: quantile(&seconds, 0.5) }
        };
        Self { prices: passes.chunk_by(|a, b| a.0 == b.0).map(price).collect(), layers }
    }

    /// The median of passes with `rows` rows when there are at least five; otherwise the straight line between the
    /// nearest such row counts below and above; at the ends of the list its own median, or the nearest price in
    /// proportion to rows.
    pub fn seconds(&self, rows: usize) -> f64 {
        let own = self.prices.iter().find(|p| p.rows == rows);
        if let Some(price) = own.filter(|p| p.is_firm()) {
            return price.seconds;
        }
        let below = self.prices.iter().rfind(|p| p.rows < rows && p.is_firm());
        let above = self.prices.iter().find(|p| p.rows > rows && p.is_firm());
        match (below, own, above) {
            (Some(a), _, Some(b)) => {
                let part = (rows - a.rows) as f64 / (b.rows - a.rows) as f64;
                a.seconds + (b.seconds - a.seconds) * part
            }
            (_, Some(own), _) => own.seconds,
            _ => {
                let nearest = self.prices.iter().min_by_key(|p| p.rows.abs_diff(rows));
                nearest.map_or(0.0, |p| p.seconds * rows as f64 / p.rows.max(1) as f64)
            }
        }
    }

    /// The price of all `passes`; one that rows left early costs the share of the layers that it ran.
    pub fn total(&self, passes: &[PassRecord]) -> f64 {
        let share = |p: &PassRecord| if self.layers > 0.0 { p.layers() / self.layers } else { 1.0 };
        passes.iter().map(|p| self.seconds(p.rows) * share(p)).sum()
    }
}

impl Price {
    fn is_firm(&self) -> bool {
        self.samples >= MIN_SAMPLES
    }
}

/// What one policy did.
#[derive(Clone, Debug)]
pub struct Arm {
    /// The preset's name, or that of what was changed in it.
    pub name: String,
    /// The preset, as it was run.
    pub config: SolverConfig,
    /// `[problem][round]`; the problems of all arms are the same, in the same order.
    pub results: Vec<Vec<ProblemResult>>,
    /// Every pass of all of them.
    pub passes: Vec<PassRecord>,
}

impl Arm {
    /// One that has run nothing of `num_problems` yet.
    pub fn new(name: impl Into<String>, config: SolverConfig, num_problems: usize) -> Self {
        Self { name: name.into(), config, results: vec![Vec::new(); num_problems], passes: Vec::new() }
    }

    /// Mean latency of each problem.
    pub(super) fn latencies(&self) -> Vec<f64> {
        let mean =
            |rounds: &Vec<ProblemResult>| rounds.iter().map(|r| r.latency_ms).sum::<f64>() / rounds.len().max(1) as f64;
        self.results.iter().map(mean).collect()
    }

    /// Mean device time of a problem's prefill.
    fn prefill_ms(&self) -> f64 {
        let runs: Vec<f64> = self.results.iter().flatten().map(|r| r.phase_ms.prefill).collect();
        runs.iter().sum::<f64>() / runs.len().max(1) as f64
    }

    /// The first round of each problem. The others repeat its counts, since decoding repeats.
    pub(super) fn first_round(&self) -> impl Iterator<Item = &ProblemResult> {
        self.results.iter().filter_map(|rounds| rounds.first())
    }

    /// 1 for each right answer, 0 for a wrong one; `None` when any problem's answer is not known.
    fn correctness(&self) -> Option<Vec<f64>> {
        self.first_round().map(|r| r.correct.map(|c| f64::from(u8::from(c)))).collect()
    }
}

/// One policy's line of the ladder.
#[derive(Clone, Debug, Serialize)]
pub struct ArmReport {
    /// The preset's name.
    pub policy: &'static str,
    /// Latency over all problems and rounds.
    pub latency_ms: LatencyMs,
    /// Right answers over problems; null where the answers are not known.
    pub accuracy: Option<f64>,
    /// 95 % Wilson interval of `accuracy`.
    pub accuracy_interval: Option<[f64; 2]>,
    /// Problems with the same answer as `no-sharing` gives, over problems; without answers (random weights), problems
    /// in which every branch generated the same tokens.
    pub agreement: Option<f64>,
    /// Tokens computed by phase, all problems, one round.
    pub tokens: TokenCounts,
    /// Problems whose verification was skipped, over problems.
    pub skip_rate: f64,
    /// KV blocks.
    pub blocks: ArmBlocks,
    /// Passes per problem.
    pub passes: f64,
    /// Milliseconds inside passes, per problem.
    pub pass_ms: f64,
    /// The same by the common price list.
    pub priced_ms: f64,
    /// The whole configuration.
    pub config: SolverConfig,
    /// One entry a problem, for comparisons paired with something outside.
    pub per_problem: Vec<ProblemLine>,
}

/// What one policy made of one problem.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProblemLine {
    /// Its id.
    pub id: String,
    /// Latency of each round.
    pub latency_ms: Vec<f64>,
    /// The selected answer, in the first round.
    pub answer: Option<String>,
    /// Whether it is right; null where that is not known.
    pub correct: Option<bool>,
    /// True when its verification was skipped.
    pub skipped: bool,
    /// Layers at which branches left the verification before its end, of those that did.
    pub exit_layers: Vec<u32>,
}

/// KV blocks of a policy: the most over all problems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ArmBlocks {
    /// In use at once.
    pub peak: usize,
    /// Held by more than one branch when decoding ended.
    pub shared: usize,
    /// Held by one branch alone then, over all branches.
    pub private: usize,
}

/// How much longer one policy takes than another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Mean latency over mean latency, with its interval.
    #[serde(flatten)]
    pub measured: Interval,
    /// What the counted passes allow.
    pub ceiling: f64,
    /// `measured` over `ceiling`.
    pub of_ceiling: f64,
}

/// The whole ladder.
#[derive(Clone, Debug, Serialize)]
pub struct LadderReport {
    /// Problems counted.
    pub problems: usize,
    /// Times each was solved by each policy.
    pub rounds: usize,
    /// One entry a policy.
    pub policies: Vec<ArmReport>,
    /// Each policy against `rksc`, by name.
    #[serde(serialize_with = "by_name")]
    pub ratios: Vec<(String, Ratio)>,
    /// Accuracy of `rksc` minus that of `no-sharing`, paired by problem.
    pub accuracy_difference: Option<Interval>,
    /// Prefill of a problem under `no-sharing` against `exact`.
    pub sharing: Option<SharingGain>,
}

/// What sharing a prefix saves in prefill, in milliseconds a problem.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SharingGain {
    /// Every branch prefills its whole prompt.
    pub full_ms: f64,
    /// The prefix once, and each branch's suffix.
    pub shared_ms: f64,
    /// The difference; sharing pays when it is above zero.
    pub net_ms: f64,
}

impl SharingGain {
    /// The gain of `shared_ms` over `full_ms`.
    pub fn new(full_ms: f64, shared_ms: f64) -> Self {
        Self { full_ms, shared_ms, net_ms: full_ms - shared_ms }
    }

    /// Whether to share.
    pub fn pays(&self) -> bool {
        self.net_ms > 0.0
    }
}

fn by_name<S: Serializer>(ratios: &[(String, Ratio)], s: S) -> Result<S::Ok, S::Error> {
    s.collect_map(ratios.iter().map(|(name, ratio)| (name, ratio)))
}

impl LadderReport {
    /// Compares the arms.
    pub fn new(arms: &[Arm]) -> Self {
        let prices = PriceList::new(arms.iter().flat_map(|a| &a.passes));
        let find = |policy: Policy| arms.iter().find(|a| a.config.policy == policy);
        let (base, best) = (find(Policy::NoSharing), find(Policy::Rksc));
        let ratios = best.map_or_else(Vec::new, |best| {
            let others = arms.iter().filter(|a| a.config.policy != Policy::Rksc);
            others.filter_map(|a| Some((ratio_name(a), ratio(a, best, &prices)?))).collect()
        });
        let correctness = |arm: Option<&Arm>| arm.and_then(Arm::correctness);
        let sharing = match (base, find(Policy::Exact)) {
            (Some(base), Some(exact)) => Some(SharingGain::new(base.prefill_ms(), exact.prefill_ms())),
            _ => None,
        };
        Self {
            problems: arms.first().map_or(0, |a| a.results.len()),
            rounds: arms.first().and_then(|a| a.results.first()).map_or(0, Vec::len),
            policies: arms.iter().map(|a| arm_report(a, base, &prices)).collect(),
            ratios,
            accuracy_difference: match (correctness(best), correctness(base)) {
                (Some(best), Some(base)) => difference_of_means(&best, &base),
                _ => None,
            },
            sharing,
        }
    }
}

fn ratio_name(arm: &Arm) -> String {
    format!("{}/{}", arm.config.policy.name(), Policy::Rksc.name())
}

/// How much longer `a` takes than `b`.
pub(super) fn ratio(a: &Arm, b: &Arm, prices: &PriceList) -> Option<Ratio> {
    let measured = ratio_of_means(&a.latencies(), &b.latencies())?;
    let ceiling = prices.total(&a.passes) / prices.total(&b.passes);
    Some(Ratio { measured, ceiling, of_ceiling: measured.value / ceiling })
}

fn arm_report(arm: &Arm, base: Option<&Arm>, prices: &PriceList) -> ArmReport {
    let first: Vec<ProblemResult> = arm.first_round().cloned().collect();
    let sums = SolveReport::new(&arm.config, &first);
    let latencies: Vec<f64> = arm.results.iter().flatten().map(|r| r.latency_ms).collect();
    let (problems, runs) = (first.len().max(1) as f64, latencies.len().max(1) as f64);
    let BlockTotals { peak, shared } = sums.blocks;
    let private = |r: &ProblemResult| r.branches.iter().map(|b| b.blocks_private).sum::<usize>();
    ArmReport {
        policy: sums.policy,
        latency_ms: LatencyMs::of(&latencies),
        accuracy: sums.accuracy,
        accuracy_interval: sums.accuracy_interval,
        agreement: base.map(|base| agreement(&first, base)),
        tokens: sums.tokens,
        skip_rate: sums.verify.skipped as f64 / problems,
        blocks: ArmBlocks { peak, shared, private: first.iter().map(private).max().unwrap_or(0) },
        passes: arm.passes.len() as f64 / runs,
        pass_ms: arm.passes.iter().map(|p| p.seconds).sum::<f64>() * 1e3 / runs,
        priced_ms: prices.total(&arm.passes) * 1e3 / runs,
        config: sums.config,
        per_problem: arm.results.iter().filter_map(|rounds| problem_line(rounds)).collect(),
    }
}

fn problem_line(rounds: &[ProblemResult]) -> Option<ProblemLine> {
    let first = rounds.first()?;
    Some(ProblemLine {
        id: first.id.clone(),
        latency_ms: rounds.iter().map(|r| r.latency_ms).collect(),
        answer: first.answer.clone(),
        correct: first.correct,
        skipped: first.verify.skipped,
        exit_layers: first.branches.iter().filter_map(|b| b.exit_layer).collect(),
    })
}

fn agreement(results: &[ProblemResult], base: &Arm) -> f64 {
    let same = results.iter().zip(base.first_round()).filter(|(a, b)| agrees(a, b)).count();
    same as f64 / results.len().max(1) as f64
}

fn agrees(a: &ProblemResult, b: &ProblemResult) -> bool {
    match (&a.answer, &b.answer) {
        (Some(a), Some(b)) => same_answer(a, b),
        (None, None) => a.branches.iter().map(|x| &x.tokens).eq(b.branches.iter().map(|x| &x.tokens)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{PhaseMs, VerifyOutcome};

    fn pass(rows: usize, seconds: f64) -> PassRecord {
        PassRecord { rows, layer_rows: 4 * rows as u64, slots_read: 0, seconds }
    }

    fn result(latency_ms: f64, answer: &str) -> ProblemResult {
        ProblemResult {
            id: "p".into(),
            answer: Some(answer.into()),
            correct: Some(answer == "1"),
            expected: Some("1".into()),
            winner: 0,
            latency_ms,
            phase_ms: PhaseMs::default(),
            tokens: TokenCounts { prefill: 10, decode: 2, verify: 1, ..TokenCounts::default() },
            verify: VerifyOutcome::default(),
            blocks_peak: 7,
            blocks_shared: 3,
            trials: crate::report::TrialCounts::default(),
            branches: Vec::new(),
            similarity: None,
            tree: Vec::new(),
            memory: Vec::new(),
        }
    }

    #[test]
    fn a_constant_ratio_has_an_interval_of_no_width() {
        let b = [10.0, 20.0, 70.0];
        let a: Vec<f64> = b.iter().map(|x| x * 3.0).collect();
        let r = ratio_of_means(&a, &b).unwrap();
        assert!((r.value - 3.0).abs() < 1e-12 && (r.lo - 3.0).abs() < 1e-12 && (r.hi - 3.0).abs() < 1e-12);
        assert_eq!(ratio_of_means(&[], &[]), None);
    }

    #[test]
    fn the_bootstrap_repeats_and_is_near_the_normal_interval() {
        let mut fill = Fill::new(5);
        let b = vec![1.0; 200];
        let a: Vec<f64> = (0..200).map(|_| 1.0 + f64::from(fill.normal()) * 0.2).collect();
        let d = difference_of_means(&a, &b).unwrap();
        assert_eq!(Some(d), difference_of_means(&a, &b));
        // Standard error 0.2 / sqrt(200) = 0.01414; the interval is about 3.92 of them wide.
        let width = (d.hi - d.lo) / (0.2 / 200f64.sqrt());
        assert!(d.lo < d.value && d.value < d.hi && (3.3..4.5).contains(&width), "{d:?} {width}");
    }

    #[test]
    fn prices_are_medians_and_straight_lines_between_them() {
        let mut passes = vec![pass(50, 100.0), pass(5, 0.5), pass(300, 4.0)];
        passes.extend([1.0, 2.0, 9.0, 1.5, 2.5].map(|s| pass(10, s)));
        passes.extend([12.0; 5].map(|s| pass(110, s)));
        let list = PriceList::new(&passes);
        assert_eq!(list.seconds(10), 2.0);
        assert_eq!(list.seconds(110), 12.0);
        assert_eq!(list.seconds(60), 7.0);
        assert_eq!(list.seconds(50), 6.0, "one sample is not a price where neighbours are");
        assert_eq!(list.seconds(5), 0.5, "at the end its own median");
        assert_eq!(list.seconds(600), 8.0, "beyond the end in proportion");
        assert_eq!(list.total(&passes[..2]), 6.5);
        assert_eq!(PriceList::default().seconds(3), 0.0);
    }

    #[test]
    fn a_pass_that_rows_left_early_costs_its_share_of_the_layers() {
        let early = PassRecord { layer_rows: 20, ..pass(10, 9.0) };
        let passes: Vec<PassRecord> = [pass(10, 2.0); 5].into_iter().chain([early; 20]).collect();
        let list = PriceList::new(&passes);
        assert_eq!(list.seconds(10), 2.0, "its own time is no price of a whole pass");
        assert_eq!(list.total(&[early]), 1.0);
    }

    /// Acceptance vector RK12: the probe's times of full prefill, prefix and suffixes.
    #[test]
    fn rk12_sharing_pays_by_the_difference() {
        let gain = SharingGain::new(583.3, 88.8 + 40.0);
        assert!((gain.net_ms - 454.5).abs() < 1e-9 && gain.pays());
        assert!(!SharingGain::new(10.0, 10.0).pays());
    }

    #[test]
    fn a_ladder_of_two_arms() {
        let arm = |policy: Policy, scale: f64, answers: [&str; 2], passes: usize| Arm {
            name: policy.name().into(),
            config: SolverConfig::preset(policy),
            results: answers.map(|a| vec![result(scale, a), result(3.0 * scale, a)]).to_vec(),
            passes: vec![pass(8, 0.001); passes],
        };
        let arms = [
            arm(Policy::NoSharing, 10.0, ["1", "2"], 60), //
            arm(Policy::Rksc, 2.0, ["1", "1"], 10),
        ];
        let report = LadderReport::new(&arms);
        assert_eq!((report.problems, report.rounds), (2, 2));
        let [(name, ratio)] = report.ratios.as_slice() else { panic!("{:?}", report.ratios) };
        assert_eq!(name, "no-sharing/rksc");
        assert!((ratio.measured.value - 5.0).abs() < 1e-12 && (ratio.ceiling - 6.0).abs() < 1e-12);
        let [base, best] = report.policies.as_slice() else { panic!("two arms") };
        assert_eq!((base.accuracy, best.accuracy), (Some(0.5), Some(1.0)));
        assert_eq!((base.agreement, best.agreement), (Some(1.0), Some(0.5)));
        assert_eq!((best.latency_ms.mean, best.tokens.prefill, best.blocks.peak), (4.0, 20, 7));
        assert_eq!(base.per_problem[1].latency_ms, [10.0, 30.0]);
        assert_eq!((base.per_problem[1].answer.as_deref(), base.per_problem[1].correct), (Some("2"), Some(false)));
        assert_eq!(report.accuracy_difference.map(|d| (d.value, d.lo, d.hi)), Some((0.5, 0.0, 1.0)));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ratios"]["no-sharing/rksc"]["value"], 5.0);
    }
}

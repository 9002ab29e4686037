//! What each mechanism saves, and which answers it changes, against the same solver without it.
//!
//! All arms solve the same problems. The first is the baseline: it skips nothing and stops nothing. What an arm did is
//! told under each selection rule, and always against the baseline under that same rule: selecting comes last and costs
//! nothing, so one run serves every rule. (Under `score*sqrt(conf)` a decode exit counts votes as under `vote`.)

use serde::Serialize;

use super::ladder::{Arm, Interval, PriceList, Ratio, difference_of_means, ratio};
use super::{LatencyMs, ProblemResult, SolveReport, TokenCounts, wilson};
use crate::engine::EndReason;
use crate::gate::verify::SkipRule;
use crate::prompts::same_answer;
use crate::solver::SolverConfig;
use crate::solver::select::{Ballot, Select, select};
use crate::stats::clopper_pearson;

/// Confidence of every interval here.
const CONFIDENCE: f64 = 0.95;

/// The arms in sum.
#[derive(Clone, Debug, Serialize)]
pub struct MechanismReport {
    /// Problems that every arm solved.
    pub problems: usize,
    /// One an arm, the baseline first.
    pub arms: Vec<MechanismRow>,
}

/// One arm.
#[derive(Clone, Debug, Serialize)]
pub struct MechanismRow {
    /// Its name.
    pub name: String,
    /// Times; null where problems ran beside each other, or were not run at all but told from another arm's.
    pub timing: Option<Timing>,
    /// Tokens computed by phase, all problems.
    pub tokens: TokenCounts,
    /// Verifications run.
    pub verified: usize,
    /// Verifications that the baseline ran and this arm did not.
    pub verify_skipped: usize,
    /// Mean of the layers after which verifications left their pass, of those that did.
    pub mean_exit_layer: Option<f64>,
    /// What it decided.
    pub decisions: Decisions,
    /// One a selection rule.
    pub selections: Vec<Selection>,
    /// In one word or a few: whether it pays.
    pub verdict: &'static str,
    /// The whole configuration.
    pub config: SolverConfig,
}

/// Times of an arm, and the most memory it needed: both are those of one problem alone.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// Per problem.
    pub latency_ms: LatencyMs,
    /// Mean latency of the baseline over this arm's; null for the baseline.
    pub gain: Option<Ratio>,
    /// The most KV blocks in use at once.
    pub blocks_peak: usize,
}

/// How often an arm cut something short, by what it cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Decisions {
    /// Problems whose verification was skipped.
    pub skips: usize,
    /// Verifications that left their pass early.
    pub exits: usize,
    /// Branches stopped before their own end.
    pub stops: usize,
    /// Branches merged into another.
    pub merges: usize,
    /// Prompts that took over another's KV.
    pub reuses: usize,
    /// Problems in which any of these happened.
    pub problems: usize,
}

impl Decisions {
    fn of(results: &[ProblemResult]) -> Self {
        results.iter().fold(Self::default(), |sum, r| {
            let count = |is: fn(&super::BranchResult) -> bool| r.branches.iter().filter(|b| is(b)).count();
            let one = Self {
                skips: usize::from(r.verify.skipped),
                exits: r.verify.exited,
                stops: count(|b| b.ended == Some(EndReason::Stopped)),
                merges: count(|b| b.merged_into.is_some()),
                reuses: reuses(r),
                problems: 0,
            };
            Self {
                skips: sum.skips + one.skips,
                exits: sum.exits + one.exits,
                stops: sum.stops + one.stops,
                merges: sum.merges + one.merges,
                reuses: sum.reuses + one.reuses,
                problems: sum.problems + usize::from(one != Self::default()),
            }
        })
    }

    /// What a changed answer is charged to: the skips, where there are any; else exits, stops, merges, reuses. An arm that does
    /// several things has its changes charged to the first kind alone: rather too high a rate than too low a one.
    pub fn charged(&self) -> usize {
        [self.skips, self.exits, self.stops, self.merges, self.reuses].into_iter().find(|&n| n > 0).unwrap_or(0)
    }
}

/// Prompts of a problem that took over another's KV.
pub fn reuses(r: &ProblemResult) -> usize {
    let clusters = r.similarity.iter().flat_map(|s| s.clusters.iter().enumerate());
    clusters.filter(|(own, representative)| own != *representative).count()
}

/// Answers of an arm under one selection rule.
#[derive(Clone, Debug, Serialize)]
pub struct Selection {
    /// The rule.
    pub rule: Select,
    /// Right answers over problems with a known one.
    pub accuracy: Option<f64>,
    /// 95 % Wilson interval of `accuracy`.
    pub accuracy_interval: Option<[f64; 2]>,
    /// Accuracy minus the baseline's, paired by problem; null for the baseline.
    pub difference: Option<Interval>,
    /// Problems with another answer than the baseline's.
    pub changed: usize,
    /// Of the changed.
    pub right_to_wrong: Rate,
    /// Of the changed.
    pub wrong_to_right: Rate,
    /// Of the changed: wrong before, and wrong in another way.
    pub wrong_to_wrong: usize,
}

/// How many of what could have changed did, with 95 % Clopper-Pearson intervals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// How many did.
    pub count: usize,
    /// Decisions they are charged to: see [`Decisions::charged`].
    pub decisions: usize,
    /// `count` over `decisions`, as an interval; everything where there were none.
    pub per_decision: [f64; 2],
    /// `count` over the problems, as an interval.
    pub per_problem: [f64; 2],
}

impl Rate {
    fn new(count: usize, decisions: usize, problems: usize) -> Self {
        Self {
            count,
            decisions,
            per_decision: clopper_pearson(count, decisions, CONFIDENCE),
            per_problem: clopper_pearson(count, problems, CONFIDENCE),
        }
    }
}

impl MechanismReport {
    /// Compares every arm with the first. `timed`: each arm solved one problem at a time, in turn with the others.
    pub fn new(arms: &[Arm], rules: &[Select], timed: bool) -> Self {
        let prices = PriceList::new(arms.iter().flat_map(|a| &a.passes));
        let timing = |arm: &Arm, base: &Arm, results: &[ProblemResult]| {
            let latencies: Vec<f64> = arm.results.iter().flatten().map(|r| r.latency_ms).collect();
            Timing {
                latency_ms: LatencyMs::of(&latencies),
                gain: if std::ptr::eq(arm, base) { None } else { ratio(base, arm, &prices) },
                blocks_peak: results.iter().map(|r| r.blocks_peak).max().unwrap_or(0),
            }
        };
        let Some(base) = arms.first() else { return Self { problems: 0, arms: Vec::new() } };
        let before: Vec<ProblemResult> = base.first_round().cloned().collect();
        let row = |arm: &Arm| {
            let after: Vec<ProblemResult> = arm.first_round().cloned().collect();
            let is_base = std::ptr::eq(arm, base);
            row(arm, &before, &after, is_base, rules, timed.then(|| timing(arm, base, &after)))
        };
        Self { problems: before.len(), arms: arms.iter().map(row).collect() }
    }
}

fn row(
    arm: &Arm,
    before: &[ProblemResult],
    after: &[ProblemResult],
    is_base: bool,
    rules: &[Select],
    timing: Option<Timing>,
) -> MechanismRow {
    let decisions = Decisions::of(after);
    let exit_layers: Vec<u32> = after.iter().flat_map(|r| r.branches.iter().filter_map(|b| b.exit_layer)).collect();
    let mean = exit_layers.iter().map(|&l| f64::from(l)).sum::<f64>() / exit_layers.len() as f64;
    let sums = SolveReport::new(&arm.config, after);
    let verified_before: usize = before.iter().map(|r| r.verify.run).sum();
    let selections: Vec<Selection> =
        rules.iter().map(|&rule| selection(rule, before, after, decisions.charged(), is_base)).collect();
    MechanismRow {
        name: arm.name.clone(),
        tokens: sums.tokens,
        verified: sums.verify.run,
        verify_skipped: verified_before.saturating_sub(sums.verify.run),
        mean_exit_layer: (!exit_layers.is_empty()).then_some(mean),
        decisions,
        verdict: verdict(is_base, &decisions, timing.as_ref(), &selections),
        timing,
        selections,
        config: sums.config,
    }
}

/// What the numbers say, in plain words. Answers are judged under the first rule.
fn verdict(is_base: bool, d: &Decisions, timing: Option<&Timing>, selections: &[Selection]) -> &'static str {
    let harms = selections.first().is_some_and(|s| s.right_to_wrong.count > s.wrong_to_right.count);
    let gain = timing.and_then(|t| t.gain).map(|g| g.measured);
    match gain {
        _ if is_base => "baseline",
        _ if d.problems == 0 => "never fires",
        Some(g) if g.lo > 1.0 && harms => "faster, but turns right answers wrong",
        Some(g) if g.lo > 1.0 => "pays",
        Some(g) if g.hi < 1.0 => "does not pay: it costs time",
        Some(_) => "does not pay: no gain that can be told from zero",
        None if harms => "turns right answers wrong",
        None => "no harm seen",
    }
}

fn selection(
    rule: Select,
    before: &[ProblemResult],
    after: &[ProblemResult],
    charged: usize,
    is_base: bool,
) -> Selection {
    let pairs: Vec<(Outcome<'_>, Outcome<'_>)> =
        before.iter().zip(after).map(|(b, a)| (Outcome::of(b, rule), Outcome::of(a, rule))).collect();
    let turned = |from: bool, to: bool| {
        let is = |(b, a): &&(Outcome<'_>, Outcome<'_>)| b.is_right == Some(from) && a.is_right == Some(to);
        pairs.iter().filter(is).filter(|(b, a)| !b.says_the_same_as(a)).count()
    };
    let right = |pick: fn(&(Outcome<'_>, Outcome<'_>)) -> Option<bool>| -> Option<Vec<f64>> {
        pairs.iter().map(|p| pick(p).map(|r| f64::from(u8::from(r)))).collect()
    };
    let (was, is) = (right(|p| p.0.is_right), right(|p| p.1.is_right));
    let known: Vec<bool> = pairs.iter().filter_map(|p| p.1.is_right).collect();
    let num_right = known.iter().filter(|&&r| r).count();
    let n = pairs.len();
    Selection {
        rule,
        accuracy: (!known.is_empty()).then(|| num_right as f64 / known.len() as f64),
        accuracy_interval: (!known.is_empty()).then(|| wilson(num_right, known.len())),
        difference: match (is_base, is, was) {
            (false, Some(is), Some(was)) => difference_of_means(&is, &was),
            _ => None,
        },
        changed: pairs.iter().filter(|(b, a)| !b.says_the_same_as(a)).count(),
        right_to_wrong: Rate::new(turned(true, false), charged, n),
        wrong_to_right: Rate::new(turned(false, true), charged, n),
        wrong_to_wrong: turned(false, false),
    }
}

/// What a problem's branches come to under a rule.
struct Outcome<'a> {
    answer: Option<&'a str>,
    is_right: Option<bool>,
}

impl<'a> Outcome<'a> {
    fn of(r: &'a ProblemResult, rule: Select) -> Self {
        let ballots: Vec<Ballot> = r
            .branches
            .iter()
            .map(|b| Ballot { answer: b.answer.clone(), confidence: b.confidence, score: b.score, votes: b.votes })
            .collect();
        let answer = select(rule, &ballots).and_then(|w| r.branches[w].answer.as_deref());
        Self { answer, is_right: r.expected.as_deref().map(|e| answer.is_some_and(|a| same_answer(a, e))) }
    }

    fn says_the_same_as(&self, other: &Self) -> bool {
        match (self.answer, other.answer) {
            (Some(a), Some(b)) => same_answer(a, b),
            (a, b) => a == b,
        }
    }
}

/// What `results`, all verified, would have been with verification skipped by `rule`: the rule sees what it would have
/// seen, for it looks at branches that have ended, and a skipped verification gives no scores. Answers and token counts
/// are exact; times and blocks are not told.
pub fn with_skip(results: &[ProblemResult], rule: SkipRule) -> Vec<ProblemResult> {
    let skipped = |r: &ProblemResult| {
        let confidences: Vec<f64> = r.branches.iter().map(|b| b.confidence).collect();
        let answers: Vec<Option<String>> = r.branches.iter().map(|b| b.answer.clone()).collect();
        let mut r = r.clone();
        if rule.skips(&confidences, &answers) {
            r.verify = super::VerifyOutcome { skipped: true, ..Default::default() };
            r.tokens.verify = 0;
            r.branches.iter_mut().for_each(|b| (b.score, b.exit_layer) = (None, None));
        }
        r
    };
    results.iter().map(skipped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{BranchResult, PassRecord, PhaseMs, TrialCounts, VerifyOutcome};
    use crate::solver::Policy;

    fn branch(idx: usize, answer: &str, confidence: f64, score: Option<f64>) -> BranchResult {
        BranchResult {
            branch: idx,
            tokens: vec![1],
            text: String::new(),
            answer: Some(answer.into()),
            score,
            confidence,
            ended: Some(EndReason::EndToken),
            votes: 1.0,
            exit_layer: None,
            layers: Vec::new(),
            wording: 0,
            merged_into: None,
            blocks_shared: 1,
            blocks_private: 1,
            kv_slots: 0,
            kv_full: 0,
            kv_cuts: 0,
            first_kv_cut: None,
        }
    }

    /// A problem whose answer is 1. Branches of (answer, confidence, score).
    fn problem(latency_ms: f64, branches: &[(&str, f64, Option<f64>)]) -> ProblemResult {
        let run = branches.iter().filter(|b| b.2.is_some()).count();
        ProblemResult {
            id: "p".into(),
            answer: None,
            correct: None,
            expected: Some("1".into()),
            winner: 0,
            latency_ms,
            phase_ms: PhaseMs::default(),
            tokens: TokenCounts { prefill: 10, decode: 5, verify: 3, ..TokenCounts::default() },
            verify: VerifyOutcome { run, ..VerifyOutcome::default() },
            blocks_peak: 4,
            blocks_shared: 1,
            trials: TrialCounts::default(),
            branches: branches.iter().enumerate().map(|(i, b)| branch(i, b.0, b.1, b.2)).collect(),
            similarity: None,
            tree: Vec::new(),
            memory: Vec::new(),
        }
    }

    fn arm(name: &str, results: Vec<ProblemResult>, layer_rows: u64) -> Arm {
        let passes = vec![PassRecord { rows: 10, layer_rows, slots_read: 0, seconds: 0.001 }; 10];
        let results = results.into_iter().map(|r| vec![r]).collect();
        Arm { name: name.into(), config: SolverConfig::preset(Policy::Exact), results, passes }
    }

    /// By score * sqrt(conf): right, right, wrong. By vote: right, wrong, wrong.
    fn verified() -> Vec<ProblemResult> {
        vec![
            problem(4.0, &[("1", 0.9, Some(0.9)), ("1", 0.8, Some(0.8)), ("2", 0.95, Some(0.1))]),
            problem(4.0, &[("1", 0.8, Some(0.9)), ("2", 0.9, Some(0.2)), ("2", 0.7, Some(0.2))]),
            problem(4.0, &[("3", 0.9, Some(0.9)), ("1", 0.95, Some(0.1)), ("3", 0.5, Some(0.5))]),
        ]
    }

    #[test]
    fn a_skip_takes_the_scores_and_changes_no_vote() {
        let before = verified();
        let after = with_skip(&before, SkipRule::Agreement { k: 2 });
        assert!(after.iter().all(|r| r.verify.skipped && r.verify.run == 0 && r.tokens.verify == 0));
        assert_eq!(with_skip(&before, SkipRule::Agreement { k: 3 }), before);
        let arms = [arm("exact", before, 80), arm("skip", after, 80)];
        let report = MechanismReport::new(&arms, &[Select::Vote, Select::ScoreSqrtConf], false);
        let [base, skip] = report.arms.as_slice() else { panic!("two arms") };
        assert_eq!((base.verified, skip.verified, skip.verify_skipped), (9, 0, 9));
        assert_eq!(skip.decisions, Decisions { skips: 3, problems: 3, ..Decisions::default() });
        let [vote, paper] = skip.selections.as_slice() else { panic!("two rules") };
        assert_eq!((vote.accuracy, vote.changed, vote.right_to_wrong.count), (Some(1.0 / 3.0), 0, 0));
        // Confidence alone: 2 (0.95), 2 (0.9), 1 (0.95).
        assert_eq!((base.selections[1].accuracy, paper.accuracy), (Some(2.0 / 3.0), Some(1.0 / 3.0)));
        assert_eq!((paper.changed, paper.right_to_wrong.count, paper.wrong_to_right.count), (3, 2, 1));
        assert_eq!(paper.difference.map(|d| d.value), Some(-1.0 / 3.0));
        assert_eq!((paper.right_to_wrong.decisions, paper.wrong_to_wrong), (3, 0));
        assert_eq!(paper.right_to_wrong.per_decision, clopper_pearson(2, 3, 0.95));
        assert_eq!((base.verdict, skip.verdict, base.selections[0].difference), ("baseline", "no harm seen", None));
    }

    #[test]
    fn an_arm_pays_by_time_and_answers() {
        let slow = verified();
        let mut fast = verified();
        for r in &mut fast {
            r.latency_ms /= 2.0;
            r.verify.exited = 1;
            r.branches[0].exit_layer = Some(3);
        }
        let mut wrong = fast.clone();
        wrong[0].branches[0].answer = Some("2".into());
        let mut idle = slow.clone();
        idle[0].latency_ms = 3.9;
        let arms = [arm("exact", slow, 80), arm("fast", fast, 40), arm("wrong", wrong, 40), arm("idle", idle, 80)];
        let report = MechanismReport::new(&arms, &[Select::Vote], true);
        let verdicts: Vec<&str> = report.arms.iter().map(|a| a.verdict).collect();
        assert_eq!(verdicts, ["baseline", "pays", "faster, but turns right answers wrong", "never fires"]);
        let fast = &report.arms[1];
        let gain = fast.timing.as_ref().and_then(|t| t.gain).unwrap();
        assert_eq!((gain.measured.value, gain.ceiling), (2.0, 2.0));
        assert_eq!((fast.mean_exit_layer, fast.decisions.charged()), (Some(3.0), 3));
        assert_eq!(report.arms[2].selections[0].right_to_wrong.count, 1);
    }

    #[test]
    fn changes_are_charged_to_the_rarest_kind_first() {
        let d = Decisions { skips: 2, stops: 50, problems: 9, ..Decisions::default() };
        assert_eq!((d.charged(), Decisions::default().charged()), (2, 0));
        let merges = Decisions { merges: 4, stops: 0, ..Decisions::default() };
        assert_eq!(merges.charged(), 4);
    }

    #[test]
    fn without_arms_there_is_nothing_to_say() {
        assert!(MechanismReport::new(&[], &[Select::Vote], true).arms.is_empty());
    }
}

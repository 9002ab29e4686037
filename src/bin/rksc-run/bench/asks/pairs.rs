//! How similar questions are to their paraphrases, and to questions that only look alike.

use std::path::Path;

use rksc::calibrate::{Negative, parse_negatives};
use rksc::engine::{BranchId, PrefillOptions};
use rksc::gate::asks::numbers;
use rksc::gate::{Effect, GateSpec, Rule, Scope, Statistic};
use rksc::problems::Problem;
use rksc::report::separation::{Merged, Pairs, auc, roc, separating_tau};
use rksc::solver::task::CompiledPack;
use rksc::stats::clopper_pearson;
use rksc::tokenizer::Tokenizer;
use rksc::{Engine, Error};

use crate::common::progress;

/// Questions compared in one pass.
const GROUP: usize = 16;
/// Points of a curve in the JSON.
const ROC_POINTS: usize = 60;
/// The name of the pairs that should merge.
const PARAPHRASE: &str = "paraphrase";

/// The first `limit` of each kind.
pub(super) fn read(path: &Path, limit: Option<usize>) -> anyhow::Result<Vec<Negative>> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let mut negatives: Vec<Negative> = Vec::new();
    for negative in parse_negatives(path, &bytes)? {
        if negatives.iter().filter(|n| n.kind == negative.kind).count() < limit.unwrap_or(usize::MAX) {
            negatives.push(negative);
        }
    }
    Ok(negatives)
}

/// What one depth shows.
#[derive(serde::Serialize)]
pub(super) struct PairReport {
    /// Layers run.
    pub(super) depth: u32,
    /// Kind of negative, and the probability that a paraphrase is more similar than one of that kind; `all` last.
    pub(super) auc: Vec<(String, f64)>,
    /// Shares of all negatives and of the paraphrases that merge, from none to all.
    roc: Vec<[f64; 2]>,
    pub(super) taus: Vec<AtTau>,
    /// The threshold that keeps pairs with other answers apart and merges most; null when there is none.
    pub(super) separating_tau: Option<f32>,
}

/// One threshold.
#[derive(serde::Serialize)]
pub(super) struct AtTau {
    pub(super) tau: f32,
    /// Of all negatives, the share that merges, with its 95 % Clopper-Pearson interval.
    pub(super) false_rate: f64,
    false_interval: [f64; 2],
    /// Answers that merging changes, and how many are left when pairs with different numbers are refused.
    pub(super) answers_changed: usize,
    pub(super) answers_changed_same_numbers: usize,
    /// Paraphrases first.
    pub(super) kinds: Vec<Merged>,
}

/// What asks the engine how similar questions are.
pub(super) struct Probe<'a> {
    pub(super) tokenizer: std::sync::Arc<Tokenizer>,
    pub(super) pack: &'a CompiledPack,
    pub(super) prefix: String,
    pub(super) alpha: f32,
}

/// A question, and what it is compared with: (kind, text, whether its answer differs).
struct Group<'a> {
    question: &'a str,
    others: Vec<(&'a str, &'a str, bool)>,
}

impl Probe<'_> {
    /// Compares every question with its paraphrases and with its negatives, at each depth.
    pub(super) fn report(
        &self,
        engine: &mut Engine,
        problems: &[Problem],
        negatives: &[Negative],
        depths: &[u32],
        taus: &[f32],
        max_false_rate: f64,
    ) -> anyhow::Result<Vec<PairReport>> {
        let groups = groups(problems, negatives);
        let bar = progress(groups.len() * depths.len());
        let mut reports = Vec::new();
        for &depth in depths {
            let mut kinds = vec![Pairs { kind: PARAPHRASE.into(), ..Pairs::default() }];
            for group in &groups {
                bar.set_message(format!("{depth} layers"));
                let similarity = self.similarity(engine, group, depth)?;
                for ((kind, other, differ), similarity) in group.others.iter().zip(similarity) {
                    let at = kinds.iter().position(|p| p.kind == *kind).unwrap_or_else(|| {
                        kinds.push(Pairs { kind: (*kind).into(), ..Pairs::default() });
                        kinds.len() - 1
                    });
                    kinds[at].similarity.push(similarity);
                    kinds[at].answers_differ.push(*differ);
                    kinds[at].numbers_differ.push(numbers(group.question) != numbers(other));
                }
                bar.inc(1);
            }
            reports.push(PairReport::new(depth, &kinds, taus, max_false_rate));
        }
        bar.finish_and_clear();
        Ok(reports)
    }

    /// Of each of the group's texts with its question.
    fn similarity(&self, engine: &mut Engine, group: &Group<'_>, depth: u32) -> anyhow::Result<Vec<f32>> {
        let encode = |text: &str| self.tokenizer.encode(&self.pack.pack().root(&self.prefix, text));
        let texts: Vec<&str> = [group.question].into_iter().chain(group.others.iter().map(|o| o.1)).collect();
        let tokens = texts.iter().map(|t| encode(t)).collect::<rksc::Result<Vec<_>>>()?;
        let mut ids = Vec::new();
        let outcome = self.compare(engine, &tokens, depth, &mut ids);
        ids.into_iter().rev().try_for_each(|id| engine.prune(id))?;
        while engine.next_event().is_some() {}
        outcome
    }

    /// Forks from what the texts have in common, all in one pass. The first of `ids` is the trunk.
    fn compare(
        &self,
        engine: &mut Engine,
        texts: &[Vec<u32>],
        depth: u32,
        ids: &mut Vec<BranchId>,
    ) -> anyhow::Result<Vec<f32>> {
        let same = |n: &usize| texts.iter().all(|t| t.len() > n + 1 && t[*n] == texts[0][*n]);
        let common = (0..texts[0].len()).take_while(same).count();
        anyhow::ensure!(common > 0, "--prompts: two questions have not one token in common");
        let trunk = engine.prefill(&texts[0][..common], PrefillOptions::default())?;
        ids.push(trunk);
        while engine.has_work() {
            engine.step()?;
        }
        for text in texts {
            let mut fork = [BranchId::default()];
            engine.fork(trunk, &mut fork)?;
            ids.push(fork[0]);
            engine.append(fork[0], &text[common..])?;
        }
        engine.gate(&self.gate(depth), &ids[1..])?;
        while engine.has_work() {
            engine.step()?;
        }
        let found = engine.similarity(ids[1])?;
        let found = found.ok_or_else(|| anyhow::anyhow!("--max-batch-tokens: {} questions do not fit", texts.len()))?;
        Ok(found.similarity.to_root[1..].to_vec())
    }

    /// Looks, and lets every question go on.
    fn gate(&self, depth: u32) -> GateSpec {
        GateSpec {
            layers: (1..=depth).collect(),
            statistic: Statistic::BranchSimilarity { alpha: self.alpha },
            rule: Rule::Never,
            scope: Scope::Sequence,
            effect: Effect::Observe,
        }
    }
}

/// Each question once, or more often where it has many to be compared with.
fn groups<'a>(problems: &'a [Problem], negatives: &'a [Negative]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    let mut add = |question: &'a str, other: (&'a str, &'a str, bool)| match groups
        .iter_mut()
        .rev()
        .find(|g| g.question == question && g.others.len() + 1 < GROUP)
    {
        Some(group) => group.others.push(other),
        None => groups.push(Group { question, others: vec![other] }),
    };
    for p in problems {
        p.paraphrases.iter().for_each(|text| add(&p.question, (PARAPHRASE, text, false)));
    }
    negatives.iter().for_each(|n| add(&n.question, (&n.kind, &n.other, n.answers_differ())));
    groups
}

impl PairReport {
    fn new(depth: u32, kinds: &[Pairs], taus: &[f32], max_false_rate: f64) -> Self {
        let (reused, negatives) = kinds.split_at(1);
        let all: Vec<f32> = negatives.iter().flat_map(|k| k.similarity.iter().copied()).collect();
        let against = negatives.iter().map(|k| (k.kind.clone(), k.similarity.as_slice()));
        let areas = against.chain([("all".to_string(), all.as_slice())]);
        let curve = roc(&reused[0].similarity, &all);
        let every = curve.len().div_ceil(ROC_POINTS).max(1);
        let last = curve.len() - 1;
        Self {
            depth,
            auc: areas.filter_map(|(kind, n)| Some((kind, auc(&reused[0].similarity, n)?))).collect(),
            roc: (0..=last).filter(|i| i % every == 0 || *i == last).map(|i| curve[i]).collect(),
            taus: taus.iter().map(|&tau| AtTau::new(tau, kinds)).collect(),
            separating_tau: separating_tau(&reused[0], negatives, max_false_rate),
        }
    }
}

impl AtTau {
    fn new(tau: f32, kinds: &[Pairs]) -> Self {
        let merged: Vec<Merged> = kinds.iter().map(|k| k.merged(tau)).collect();
        let sum = |of: fn(&Merged) -> usize| merged[1..].iter().map(of).sum::<usize>();
        let (count, pairs) = (sum(|m| m.merged), sum(|m| m.pairs));
        Self {
            tau,
            false_rate: count as f64 / pairs.max(1) as f64,
            false_interval: clopper_pearson(count, pairs, 0.95),
            answers_changed: sum(|m| m.answers_changed),
            answers_changed_same_numbers: sum(|m| m.answers_changed_same_numbers),
            kinds: merged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_asked_once_for_all_it_is_compared_with() {
        let problem = |q: &str, n: usize| Problem {
            id: q.into(),
            question: q.into(),
            answer: None,
            paraphrases: (0..n).map(|i| format!("{q} {i}")).collect(),
        };
        let line = |q: &str, other: i64| Negative {
            kind: "number".into(),
            question: q.into(),
            other: "o".into(),
            answer: Some(3.into()),
            other_answer: Some(other.into()),
        };
        let (problems, negatives) = (vec![problem("a", 2), problem("b", 20)], vec![line("a", 4), line("c", 3)]);
        let groups = groups(&problems, &negatives);
        let sizes: Vec<(&str, usize)> = groups.iter().map(|g| (g.question, g.others.len())).collect();
        assert_eq!(sizes, [("a", 3), ("b", GROUP - 1), ("b", 20 + 1 - GROUP), ("c", 1)]);
        assert_eq!((groups[0].others[2], groups[3].others[0].2), (("number", "o", true), false));
    }
}

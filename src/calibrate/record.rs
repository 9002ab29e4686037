//! What every setting is replayed on: each problem run once, with nothing left out.
//!
//! Greedy branches say the same whatever runs beside them, so one run of every branch in every wording, and one
//! comparison of the wordings at every depth, hold the outcome of all settings.

use std::sync::Arc;

use super::Setup;
use super::asks::AsksSetting;
use super::negatives::Negative;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gate::asks::Asks;
use crate::problems::Problem;
use crate::report::{BranchResult, ProblemResult, SimilarityRecord};
use crate::solver::task::{CompiledPack, Task, TextTask};
use crate::solver::{Policy, Solver, SolverConfig, VerifyMode, common_prefix};

/// Depths at which wordings are compared, as far as the model has as many layers.
const DEPTHS: [u32; 3] = [4, 2, 1];

/// What a branch said.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Solution {
    pub(super) answer: Option<String>,
    pub(super) confidence: f64,
    /// Its last verdict's yes against its no.
    pub(super) score: Option<f64>,
    /// `[num_layers]`: entropy of the verdict after each layer. Empty where nobody looked.
    pub(super) entropies: Vec<f32>,
    /// `[num_layers]`: yes against no after each layer.
    pub(super) verdicts: Vec<f64>,
}

/// A problem, every branch in every wording.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ProblemRecord {
    pub(super) expected: String,
    /// `[wordings][branches]`; the first is the question itself, and has verdicts.
    pub(super) wordings: Vec<Vec<Solution>>,
    /// `[wordings]`: prompt tokens that the wordings do not have in common.
    pub(super) tokens: Vec<usize>,
    /// `[depths][wordings * wordings]`; empty where there is one wording.
    pub(super) similar: Vec<Vec<f32>>,
}

impl ProblemRecord {
    pub(super) fn branches(&self) -> &[Solution] {
        self.wordings.first().map_or(&[], Vec::as_slice)
    }
}

/// Two questions that are not the same.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PairRecord {
    pub(super) kind: String,
    /// `[depths]`.
    pub(super) similarity: Vec<f32>,
}

impl PairRecord {
    /// Another name is another question with the same answer.
    pub(super) fn is_harmless(&self) -> bool {
        self.kind == "name"
    }
}

/// The runs that settings are judged by.
#[derive(Clone, Debug, PartialEq)]
pub struct Records {
    pub(super) problems: Vec<ProblemRecord>,
    pub(super) pairs: Vec<PairRecord>,
    pub(super) depths: Vec<u32>,
    pub(super) num_layers: usize,
    /// Yes and no have one spelling each, so that a layer's entropy tells its verdict.
    pub(super) has_verdicts: bool,
}

impl Records {
    /// Runs `problems`, those with an answer, and compares the pairs of `negatives`. `progress` is told how much of the
    /// whole is done, from 0 to 1.
    pub fn take(
        engine: &mut Engine,
        pack: &Arc<CompiledPack>,
        setup: &Setup,
        problems: &[Problem],
        negatives: &[Negative],
        progress: &mut dyn FnMut(f64),
    ) -> Result<Self> {
        let num_layers = engine.model().num_layers;
        let depths: Vec<u32> = DEPTHS.into_iter().filter(|&d| (d as usize) < num_layers).collect();
        let problems: Vec<&Problem> = problems.iter().filter(|p| p.answer.is_some()).collect();
        let mut recorder = Recorder { engine, pack, setup, progress, done: 0.0, total: 0.0 };
        recorder.plan(&problems, negatives.len(), depths.len());
        let mut records = Vec::new();
        let mut asked = recorder.wordings(&problems)?;
        let similar = recorder.compare_wordings(&problems, &depths)?;
        for (i, p) in problems.iter().enumerate() {
            let wordings = asked.iter_mut().filter_map(|of| of[i].take()).collect();
            records.push(ProblemRecord {
                expected: p.answer.clone().unwrap_or_default(),
                wordings,
                tokens: recorder.own_tokens(p)?,
                similar: similar.iter().filter_map(|at| at[i].clone()).collect(),
            });
        }
        let pairs = recorder.compare_pairs(negatives, &depths)?;
        let has_verdicts = pack.pack().yes.len() == 1 && pack.pack().no.len() == 1;
        Ok(Self { problems: records, pairs, depths, num_layers, has_verdicts })
    }
}

struct Recorder<'a> {
    engine: &'a mut Engine,
    pack: &'a Arc<CompiledPack>,
    setup: &'a Setup,
    progress: &'a mut dyn FnMut(f64),
    /// Branches run so far, and in all; a comparison counts as one.
    done: f64,
    total: f64,
}

impl Recorder<'_> {
    fn plan(&mut self, problems: &[&Problem], num_pairs: usize, num_depths: usize) {
        let wordings: usize = problems.iter().map(|p| self.num_wordings(p)).sum();
        let compared = (problems.len() + num_pairs) * num_depths;
        self.total = (wordings * self.setup.branches + compared).max(1) as f64;
    }

    fn num_wordings(&self, p: &Problem) -> usize {
        (1 + p.paraphrases.len()).min(self.setup.wordings).min(self.setup.branches)
    }

    /// `p` asked in one wording alone.
    fn in_wording(p: &Problem, wording: usize) -> Problem {
        let question = wording.checked_sub(1).and_then(|i| p.paraphrases.get(i)).unwrap_or(&p.question).clone();
        Problem { question, paraphrases: Vec::new(), ..p.clone() }
    }

    /// `[wordings][problems]`: the branches, where the problem has that wording.
    fn wordings(&mut self, problems: &[&Problem]) -> Result<Vec<Vec<Option<Vec<Solution>>>>> {
        let most = problems.iter().map(|p| self.num_wordings(p)).max().unwrap_or(0);
        let mut all = Vec::new();
        for wording in 0..most {
            let has_it = |p: &&&Problem| self.num_wordings(p) > wording;
            let asked: Vec<Problem> = problems.iter().filter(has_it).map(|p| Self::in_wording(p, wording)).collect();
            let config = SolverConfig {
                verify: if wording == 0 { VerifyMode::Suffix } else { VerifyMode::Off },
                record: wording == 0,
                ..self.config(self.setup.branches)
            };
            let mut results = self.solve(config, asked, self.setup.branches as f64)?.into_iter();
            let places = problems.iter().map(|p| self.num_wordings(p) > wording).collect::<Vec<_>>();
            let take = |has: bool| if has { results.next().map(solutions) } else { None };
            all.push(places.into_iter().map(take).collect());
        }
        Ok(all)
    }

    /// `[depths][problems]`: every two wordings of a problem, where it has two.
    fn compare_wordings(&mut self, problems: &[&Problem], depths: &[u32]) -> Result<Vec<Vec<Option<Vec<f32>>>>> {
        let compare = |this: &mut Self, &depth: &u32| {
            let several: Vec<bool> = problems.iter().map(|p| this.num_wordings(p) > 1).collect();
            let asked: Vec<Problem> =
                problems.iter().zip(&several).filter(|(_, s)| **s).map(|(p, _)| (*p).clone()).collect();
            let most = this.setup.wordings.min(this.setup.branches);
            let sizes: Vec<usize> = asked.iter().map(|p| this.num_wordings(p)).collect();
            let results = this.compare(asked, most, depth)?;
            let mut found = results.into_iter().zip(sizes).map(|(r, n)| pairwise(r.similarity.as_ref(), n));
            Ok(several.into_iter().map(|s| if s { found.next() } else { None }).collect())
        };
        depths.iter().map(|depth| compare(self, depth)).collect()
    }

    fn compare_pairs(&mut self, negatives: &[Negative], depths: &[u32]) -> Result<Vec<PairRecord>> {
        let mut pairs: Vec<PairRecord> =
            negatives.iter().map(|n| PairRecord { kind: n.kind.clone(), similarity: Vec::new() }).collect();
        for &depth in depths {
            let asked = negatives.iter().enumerate().map(|(i, n)| Problem {
                id: i.to_string(),
                question: n.question.clone(),
                answer: None,
                paraphrases: vec![n.other.clone()],
            });
            let results = self.compare(asked.collect(), 2, depth)?;
            for (pair, result) in pairs.iter_mut().zip(results) {
                pair.similarity.push(pairwise(result.similarity.as_ref(), 2)[1]);
            }
        }
        Ok(pairs)
    }

    /// Prompts alone, compared after `depth` layers; a threshold above 1 makes none of them one.
    fn compare(&mut self, problems: Vec<Problem>, wordings: usize, depth: u32) -> Result<Vec<ProblemResult>> {
        if problems.is_empty() {
            return Ok(Vec::new());
        }
        let config = SolverConfig {
            wordings,
            asks: Some(AsksSetting { tau: 2.0, probe_layers: depth }.into()),
            max_new_tokens: 1,
            verify: VerifyMode::Off,
            ..self.config(wordings)
        };
        self.solve(config, problems, 1.0)
    }

    fn config(&self, num_branches: usize) -> SolverConfig {
        SolverConfig {
            num_branches,
            max_new_tokens: self.setup.max_new_tokens,
            concurrency: self.setup.in_flight,
            cold_cache: false,
            ..SolverConfig::preset(Policy::Exact)
        }
    }

    /// Results in the order of the problems.
    fn solve(&mut self, config: SolverConfig, problems: Vec<Problem>, weight: f64) -> Result<Vec<ProblemResult>> {
        let task = |p: Problem| Ok(Box::new(TextTask::new(Arc::clone(self.pack), p)?) as Box<dyn Task>);
        let tasks: Vec<Box<dyn Task>> = problems.into_iter().map(task).collect::<Result<_>>()?;
        let mut results: Vec<Option<ProblemResult>> = tasks.iter().map(|_| None).collect();
        let (done, total, progress) = (&mut self.done, self.total, &mut *self.progress);
        Solver::new(self.engine, config)?.solve(&tasks, &mut |idx, result| {
            results[idx] = Some(result);
            *done += weight;
            progress((*done / total).min(1.0));
            Ok(())
        })?;
        let missing = || Error::Internal("a problem has no result".into());
        results.into_iter().map(|r| r.ok_or_else(missing)).collect()
    }

    fn own_tokens(&self, p: &Problem) -> Result<Vec<usize>> {
        let task = TextTask::new(Arc::clone(self.pack), p.clone())?;
        let texts: Vec<&[u32]> = (0..self.num_wordings(p)).map(|i| task.wording(i)).collect::<Result<_>>()?;
        let common = if texts.len() > 1 { common_prefix(&texts) } else { 0 };
        Ok(texts.iter().map(|t| t.len() - common).collect())
    }
}

fn solutions(result: ProblemResult) -> Vec<Solution> {
    let solution = |b: BranchResult| {
        let verdicts: Vec<f64> = b.layers.iter().filter_map(|l| l.yes).collect();
        let seen = verdicts.len() == b.layers.len() && b.score.is_some();
        Solution {
            answer: b.answer,
            confidence: b.confidence,
            score: b.score,
            // Entropies are f32 where they come from: nothing is rounded here.
            entropies: if seen { b.layers.iter().map(|l| l.entropy as f32).collect() } else { Vec::new() },
            verdicts: if seen { verdicts } else { Vec::new() },
        }
    };
    result.branches.into_iter().map(solution).collect()
}

/// `[n * n]`. Prompts that did not fit one pass were not compared, and are never one.
fn pairwise(found: Option<&SimilarityRecord>, n: usize) -> Vec<f32> {
    match found {
        Some(s) if s.members.len() == n => s.pairwise.concat(),
        _ => (0..n * n).map(|i| if i / n == i % n { 1.0 } else { f32::NEG_INFINITY }).collect(),
    }
}

impl From<AsksSetting> for Asks {
    fn from(s: AsksSetting) -> Self {
        Self { tau: s.tau, probe_layers: s.probe_layers, ..Self::default() }
    }
}

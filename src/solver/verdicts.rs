//! The verification of a problem's branches: who is asked what, and what they say.

use super::candidate::Candidate;
use super::config::{SolverConfig, VerifyMode};
use super::prompts::common_prefix;
use super::task::Task;
use crate::engine::{BranchId, EndReason, Engine, LayerRow, PrefillOptions, RowAnswer};
use crate::error::Result;
use crate::gate::verify::VerifyExit;
use crate::gate::{Over, Statistic};
use crate::report::{LayerEntropy, VerifyOutcome};

/// See the module text.
#[derive(Default)]
pub(super) struct Verdicts {
    /// Branches that exist for verification alone: (branch, index of the candidate it judges).
    verifiers: Vec<(BranchId, Option<usize>)>,
    num_yes: usize,
    /// The yes of looks between layers that are at one yes and one no alone.
    sole_yes: Option<u32>,
    /// Verdicts still to come.
    open: usize,
    outcome: VerifyOutcome,
}

impl Verdicts {
    /// Notes that nobody is asked.
    pub(super) fn skip(&mut self) {
        self.outcome.skipped = true;
    }

    /// Puts a verifier for every branch into the engine.
    pub(super) fn ask(
        &mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        branches: &[Candidate],
    ) -> Result<()> {
        let (yes, no) = task.verdict_tokens();
        self.num_yes = yes.len();
        match config.verify {
            VerifyMode::Off => {}
            VerifyMode::Suffix => self.ask_on_forks(engine, task, branches)?,
            VerifyMode::Fresh => self.ask_afresh(engine, task, branches, false)?,
            VerifyMode::FreshShared => self.ask_afresh(engine, task, branches, true)?,
        }
        let ids: Vec<BranchId> = self.verifiers.iter().filter(|v| v.1.is_some()).map(|v| v.0).collect();
        let watched = [yes, no].concat();
        ids.iter().try_for_each(|&id| engine.watch(id, &watched, 0))?;
        let num_layers = engine.model().num_layers;
        let gate = match &config.verify_exit {
            Some(exit) => exit.gate(num_layers),
            None if config.river.is_some_and(|r| r.verify) => None,
            None => config.record.then(|| VerifyExit::CANDIDATES.observer(num_layers)),
        };
        let sees_both =
            matches!(&gate, Some(g) if matches!(g.statistic, Statistic::Entropy { over: Over::Watched, .. }));
        self.sole_yes = yes.first().copied().filter(|_| sees_both && watched.len() == 2);
        if let Some(gate) = gate.filter(|_| !ids.is_empty()) {
            engine.gate(&gate, &ids)?;
        }
        for &id in ids.iter().filter(|_| config.river.is_some()) {
            let num_tokens = engine.tokens(id)?.len();
            if let Some(gate) = config.river.and_then(|r| r.verify_gate(num_tokens, num_layers)) {
                engine.gate(&gate, &[id])?;
            }
        }
        self.open = ids.len();
        self.outcome.run = ids.len();
        Ok(())
    }

    /// Branches with a broken last row cannot be asked, nor those that another speaks for.
    fn can_be_asked(c: &Candidate) -> bool {
        !matches!(c.ended, Some(EndReason::NonFinite | EndReason::Dropped | EndReason::Merged))
    }

    fn ask_on_forks(&mut self, engine: &mut Engine, task: &dyn Task, branches: &[Candidate]) -> Result<()> {
        for (idx, c) in branches.iter().enumerate().filter(|(_, c)| Self::can_be_asked(c)) {
            let mut fork = [BranchId::default()];
            engine.fork(c.id, &mut fork)?;
            self.verifiers.push((fork[0], Some(idx)));
            engine.append(fork[0], task.verify_suffix())?;
        }
        Ok(())
    }

    /// Prompts of their own; with `share`, their common beginning is a root that all fork from.
    fn ask_afresh(&mut self, engine: &mut Engine, task: &dyn Task, branches: &[Candidate], share: bool) -> Result<()> {
        let options = PrefillOptions { use_prefix_cache: share, ..Default::default() };
        let mut prompts = Vec::new();
        for (idx, c) in branches.iter().enumerate().filter(|(_, c)| Self::can_be_asked(c)) {
            prompts.push((idx, task.verify_fresh(&c.generated)?));
        }
        let texts: Vec<&[u32]> = prompts.iter().map(|(_, p)| p.as_slice()).collect();
        let common = if share { common_prefix(&texts) } else { 0 };
        let root = if common > 0 {
            let root = engine.prefill(&texts[0][..common], options)?;
            self.verifiers.push((root, None));
            Some(root)
        } else {
            None
        };
        for (idx, prompt) in prompts {
            match root {
                Some(root) => {
                    let mut fork = [BranchId::default()];
                    engine.fork(root, &mut fork)?;
                    self.verifiers.push((fork[0], Some(idx)));
                    engine.append(fork[0], &prompt[common..])?;
                }
                None => self.verifiers.push((engine.prefill(&prompt, options)?, Some(idx))),
            }
        }
        Ok(())
    }

    /// A verifier's last row is there: its yes against its no. One whose logits were not finite gives no score.
    pub(super) fn take(&mut self, engine: &Engine, branch: BranchId, branches: &mut [Candidate]) -> Result<()> {
        let Some(&(_, Some(idx))) = self.verifiers.iter().find(|v| v.0 == branch) else { return Ok(()) };
        let Some(row) = engine.row(branch)? else { return Ok(()) };
        let c = &mut branches[idx];
        c.score = yes_share(row, self.num_yes).or(c.score);
        c.exit_layer = engine.exit_layer(branch)?;
        c.layers = row.layers.iter().map(|l| layer_entropy(l, self.sole_yes)).collect();
        self.outcome.exited += usize::from(c.exit_layer.is_some());
        self.open -= 1;
        Ok(())
    }

    pub(super) fn are_there(&self) -> bool {
        self.open == 0
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        self.verifiers.iter().map(|v| v.0)
    }

    pub(super) fn outcome(&self) -> &VerifyOutcome {
        &self.outcome
    }
}

fn layer_entropy(l: &LayerRow, sole_yes: Option<u32>) -> LayerEntropy {
    let top1 = f64::from(l.stats.top1);
    let yes = sole_yes.map(|yes| if l.stats.argmax == yes { top1 } else { 1.0 - top1 });
    LayerEntropy { layer: l.layer, entropy: f64::from(l.stats.entropy), top1, yes }
}

/// A verifier's yes against its no, of which the first `num_yes` watched tokens are spellings of yes. `None` when its
/// logits were not finite.
pub(super) fn yes_share(row: &RowAnswer, num_yes: usize) -> Option<f64> {
    let (yes, no) = row.watched.split_at_checked(num_yes).filter(|_| !row.watched.is_empty())?;
    let mass = |xs: &[f32]| xs.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
    let (yes, no) = (mass(yes), mass(no));
    Some(if yes + no > 0.0 { yes / (yes + no) } else { 0.0 })
}

//! A problem's prompts: one root a wording, forked from what their tokens have in common. With semantic sharing they are
//! compared while they run, and those that look alike go on as one.
//!
//! ```text
//! trunk (few-shot examples, "Problem: ") +- wording 0 - branches 0, 3, 6
//!                                        +- wording 1 - branches 1, 4, 7        branch b takes wording b mod W
//!                                        +- wording 2 = wording 0 - branches 2, 5     (aliased)
//! ```

use super::config::{Sharing, SolverConfig};
use super::task::Task;
use crate::engine::{BranchId, Engine, PrefillOptions};
use crate::error::Result;
use crate::gate::asks::AsksScope;
use crate::report::SimilarityRecord;

/// See the module text. Empty where every branch is a prompt of its own.
#[derive(Default)]
pub(super) struct Prompts {
    trunk: Option<BranchId>,
    wordings: Vec<Wording>,
    record: Option<SimilarityRecord>,
}

struct Wording {
    id: BranchId,
    num_tokens: usize,
    /// The numbers it speaks of.
    numbers: Vec<String>,
}

/// How many wordings a problem's branches take turns among.
pub(super) fn num_wordings(config: &SolverConfig, task: &dyn Task) -> usize {
    config.wordings.min(task.num_wordings()).min(config.num_branches).max(1)
}

impl Prompts {
    /// Puts the prompts into the engine, into `self` as they come: whoever holds `self` takes them out after an error.
    pub(super) fn expand(
        &mut self,
        engine: &mut Engine,
        config: &SolverConfig,
        task: &dyn Task,
        options: PrefillOptions,
    ) -> Result<()> {
        if config.sharing == Sharing::None {
            return Ok(());
        }
        let texts: Vec<&[u32]> = (0..num_wordings(config, task)).map(|i| task.wording(i)).collect::<Result<_>>()?;
        // A trunk of less than a block would save less than its own copy-on-write costs.
        let common = if texts.len() > 1 { common_prefix(&texts) } else { 0 };
        if common >= engine.config().block_size {
            self.trunk = Some(engine.prefill(&texts[0][..common], options)?);
        }
        for (i, text) in texts.iter().enumerate() {
            let options = PrefillOptions { path: options.path ^ (i as u64) << 48, ..options };
            let id = match self.trunk {
                Some(trunk) => {
                    let mut child = [BranchId::default()];
                    engine.fork(trunk, &mut child)?;
                    child[0]
                }
                None => engine.prefill(text, options)?,
            };
            self.wordings.push(Wording { id, num_tokens: text.len(), numbers: task.numbers(i) });
            if self.trunk.is_some() {
                engine.append(id, &text[common..])?;
            }
            engine.exit_prompt(id)?;
        }
        match &config.asks {
            Some(asks) if asks.scope == AsksScope::Problem && can_pay(config, &texts, common) => {
                let ids: Vec<BranchId> = self.wordings.iter().map(|w| w.id).collect();
                engine.gate(&asks.gate(), &ids)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn branch_ids(&self) -> impl Iterator<Item = BranchId> {
        self.trunk.into_iter().chain(self.wordings.iter().map(|w| w.id))
    }

    /// The root of a branch that was asked in wording `idx`.
    pub(super) fn root(&self, idx: usize) -> Option<BranchId> {
        self.wordings.get(idx).map(|w| w.id)
    }

    /// The wording whose root this is.
    pub(super) fn wording_of(&self, root: BranchId) -> Option<usize> {
        self.wordings.iter().position(|w| w.id == root)
    }

    /// Prompts with the numbers they speak of, for a comparison beyond this problem.
    pub(super) fn numbered(&self) -> impl Iterator<Item = (BranchId, &[String])> {
        self.wordings.iter().map(|w| (w.id, w.numbers.as_slice()))
    }

    /// A wording has become another prompt: by how many tokens that is longer.
    pub(super) fn on_aliased(&mut self, engine: &Engine, wording: usize) -> Result<isize> {
        let w = &mut self.wordings[wording];
        let num_tokens = engine.tokens(w.id)?.len();
        let longer = num_tokens as isize - w.num_tokens as isize;
        w.num_tokens = num_tokens;
        Ok(longer)
    }

    /// A comparison has found something that is not written down yet.
    pub(super) fn has_new_similarity(&self, engine: &Engine) -> Result<bool> {
        match (&self.record, self.wordings.first()) {
            (None, Some(first)) => Ok(engine.similarity(first.id)?.is_some()),
            _ => Ok(false),
        }
    }

    /// Writes down what a comparison found, once; `name` knows the prompts of every problem in flight.
    pub(super) fn take_similarity(
        &mut self,
        engine: &Engine,
        config: &SolverConfig,
        name: &dyn Fn(BranchId) -> String,
    ) -> Result<()> {
        let (Some(asks), Some(first), None) = (&config.asks, self.wordings.first(), &self.record) else {
            return Ok(());
        };
        let Some(found) = engine.similarity(first.id)? else { return Ok(()) };
        let n = found.members.len();
        self.record = Some(SimilarityRecord {
            members: found.members.iter().map(|&m| name(m)).collect(),
            to_root: found.similarity.to_root.clone(),
            pairwise: found.similarity.pairwise.chunks(n).map(<[f32]>::to_vec).collect(),
            clusters: found.similarity.labels.iter().map(|&l| l as usize).collect(),
            tau: asks.tau,
            depth: asks.probe_layers,
        });
        Ok(())
    }

    pub(super) fn take_record(&mut self) -> Option<SimilarityRecord> {
        self.record.take()
    }
}

/// Whether becoming one could save anything, were the texts as alike as can be behind their `common` tokens.
fn can_pay(config: &SolverConfig, texts: &[&[u32]], common: usize) -> bool {
    let own = texts.iter().map(|t| t.len() - common).max().unwrap_or(0);
    texts.len() > 1 && config.sharing_table.as_ref().is_none_or(|t| t.pays(own, texts.len()))
}

/// Tokens with which every text begins, leaving each at least one of its own.
pub(crate) fn common_prefix(texts: &[&[u32]]) -> usize {
    let Some((first, rest)) = texts.split_first() else { return 0 };
    let same = |n: usize| rest.iter().all(|t| t.get(n) == first.get(n));
    let shortest = texts.iter().map(|t| t.len()).min().unwrap_or(0);
    (0..shortest.saturating_sub(1)).take_while(|&n| same(n)).count()
}

/// Keys under which prompts of different problems may be compared: one for each set of numbers.
pub(super) fn keys(numbers: &[&[String]]) -> Vec<u64> {
    numbers.iter().map(|n| numbers.iter().position(|m| m == n).unwrap_or(0) as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_prefix_leaves_everybody_a_token() {
        assert_eq!(common_prefix(&[&[1, 2, 3], &[1, 2, 4]]), 2);
        assert_eq!(common_prefix(&[&[1, 2], &[1, 2, 4]]), 1);
        assert_eq!(common_prefix(&[&[1], &[2]]), 0);
        assert_eq!(common_prefix(&[]), 0);
    }

    #[test]
    fn prompts_with_the_same_numbers_have_the_same_key() {
        let (a, b) = (vec!["1".to_string(), "2".to_string()], vec!["1".to_string()]);
        assert_eq!(keys(&[&a, &b, &a, &b]), [0, 1, 0, 1]);
    }
}

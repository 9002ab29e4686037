//! From results to a row: how many are right, what changed against the full cache, what was held.

use anyhow::ensure;
use rksc::engine::EndReason;
use rksc::kv::budget::KvLimit;
use rksc::prompts::same_answer;
use rksc::report::{BranchResult, ProblemResult};
use rksc::solver::task::Task;

use super::super::paired::{Paired, is_right, only_branch};

/// Problems of one kind, and how many of them are right in the arm and with the full cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Group {
    pub(super) problems: usize,
    pub(super) right: usize,
    pub(super) right_full: usize,
}

/// Slots per (layer, head) over the decode steps of all problems.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub(super) struct Memory {
    /// `1 - held / full`, summed over problems: of their peaks, and of all their steps.
    pub(super) saved_peak: f64,
    pub(super) saved_mean: f64,
    /// The same without the pinned slots on either side.
    pub(super) unpinned_saved_peak: f64,
    pub(super) unpinned_saved_mean: f64,
    /// The most unpinned slots of any problem, and the mean of pinned ones.
    pub(super) unpinned_peak: usize,
    pub(super) pinned_mean: f64,
}

/// One arm against the full cache.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Row {
    /// `full` or the method's name.
    pub(super) method: String,
    pub(super) seed: Option<u64>,
    /// Budget in % of the full arm's mean chain.
    pub(super) percent: Option<f64>,
    pub(super) budget: Option<usize>,
    pub(super) buffer: Option<usize>,
    /// Against the full cache.
    #[serde(flatten)]
    pub(super) paired: Paired,
    /// The three kinds of problems: never cut, first cut behind the answer's first statement, first cut before it.
    pub(super) never_cut: Group,
    pub(super) cut_after_answer: Group,
    pub(super) cut_before_answer: Group,
    /// Problems whose tokens differ from the full cache's before the first cut. Where passes are exact there are none.
    pub(super) differ_before_cut: usize,
    pub(super) cuts_mean: f64,
    pub(super) memory: Memory,
}

/// What makes an arm.
#[derive(Clone, Debug)]
pub(super) struct Arm {
    pub(super) method: String,
    pub(super) seed: Option<u64>,
    pub(super) percent: Option<f64>,
    pub(super) limit: Option<KvLimit>,
}

/// What the engine works with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) block_size: usize,
    pub(super) window: usize,
    /// Branches are roots and not forks of one.
    pub(super) are_roots: bool,
}

impl Row {
    pub(super) fn new(
        arm: &Arm,
        tasks: &[Box<dyn Task>],
        results: &[ProblemResult],
        full: &[ProblemResult],
        setting: Setting,
    ) -> anyhow::Result<Self> {
        let n = results.len();
        let mut groups = [Group::default(); 3];
        let mut held = Held::default();
        let mut differ_before_cut = 0;
        for (idx, ((task, result), whole)) in tasks.iter().zip(results).zip(full).enumerate() {
            let (branch, whole_branch) = (only_branch(result)?, only_branch(whole)?);
            held.add(arm.limit.as_ref(), (idx, task.as_ref()), branch, setting)?;
            // The token behind the last computed one had been chosen before the cut.
            let undisturbed = branch.first_kv_cut.map_or(branch.tokens.len(), |t| (t + 1).min(branch.tokens.len()));
            let before = &branch.tokens[..undisturbed];
            differ_before_cut += usize::from(!whole_branch.tokens.starts_with(before));
            let kind = match branch.first_kv_cut {
                None => 0,
                Some(_) if is_stated(task.as_ref(), before, whole)? => 1,
                Some(_) => 2,
            };
            let group = &mut groups[kind];
            group.problems += 1;
            group.right += usize::from(is_right(result));
            group.right_full += usize::from(is_right(whole));
        }
        let cuts: u32 = results.iter().flat_map(|r| &r.branches).map(|b| b.kv_cuts).sum();
        let limit = arm.limit.as_ref().map(|l| l.for_prompt(1, setting.block_size));
        Ok(Self {
            method: arm.method.clone(),
            seed: arm.seed,
            percent: arm.percent,
            budget: limit.map(|l| l.budget),
            buffer: limit.map(|l| l.buffer),
            paired: Paired::new(results, full),
            never_cut: groups[0],
            cut_after_answer: groups[1],
            cut_before_answer: groups[2],
            differ_before_cut,
            cuts_mean: f64::from(cuts) / n.max(1) as f64,
            memory: held.memory(n),
        })
    }
}

/// Whether the answer stands in the text of `tokens`: the one that the full cache ends with, or if it ends with none the
/// expected one. It does when the task reads it out of the text as it reads answers, or when a finished line ends with it,
/// sentence marks aside. A line in the middle of its sums states nothing.
fn is_stated(task: &dyn Task, tokens: &[u32], full: &ProblemResult) -> anyhow::Result<bool> {
    let Some(answer) = full.answer.as_deref().or(task.expected()) else { return Ok(false) };
    let text = task.text(tokens)?;
    let is_read = task.answer(&text).is_some_and(|a| same_answer(&a, answer));
    Ok(is_read || a_line_ends_with(&text, answer))
}

fn a_line_ends_with(text: &str, answer: &str) -> bool {
    let finished = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    finished.lines().any(|line| {
        let last = line.split_whitespace().next_back().unwrap_or_default();
        same_answer(last.trim_end_matches(['.', '!', ',', ';', ':']), answer)
    })
}

/// Sums over problems.
#[derive(Default)]
struct Held {
    peaks: [usize; 2],
    steps: [usize; 2],
    unpinned_peaks: [usize; 2],
    unpinned_steps: [usize; 2],
    unpinned_peak: usize,
    pinned: usize,
}

impl Held {
    /// A chain's slots, held and in a full cache, pass by pass, from its length and the schedule alone. What the engine
    /// recorded of it must agree.
    fn add(
        &mut self,
        limit: Option<&KvLimit>,
        (idx, task): (usize, &dyn Task),
        branch: &BranchResult,
        setting: Setting,
    ) -> anyhow::Result<()> {
        let prompt = task.root().len() + task.branch(0)?.len();
        // A token that ended the chain for being the last was never computed; an end token is not among them.
        let passes =
            branch.tokens.len() - usize::from(branch.ended != Some(EndReason::EndToken)).min(branch.tokens.len());
        let ordinal = if setting.are_roots { (idx as u64) << 16 } else { 0 };
        let budget = limit.map(|l| l.for_prompt(prompt, setting.block_size));
        let pinned = budget.map_or(prompt, |b| b.pinned);
        let (mut cuts, mut first_cut) = (0, None);
        let (mut held, mut full) = (vec![prompt; 1], vec![prompt; 1]);
        full.extend((0..passes).map(|i| prompt + i + 1));
        match &budget {
            None => held.clone_from(&full),
            Some(budget) => held.extend(budget.held(prompt, ordinal, setting.window).take(passes).map(|h| {
                if h.is_cut {
                    cuts += 1;
                    first_cut.get_or_insert(h.num_tokens - prompt);
                }
                h.num_slots
            })),
        }
        let last = held.last().copied().unwrap_or(prompt);
        ensure!(
            (branch.kv_slots, branch.kv_cuts, branch.first_kv_cut) == (last, cuts, first_cut),
            "problem {}: {} slots, {} cuts, the first behind {:?} tokens, where the schedule says {last}, {cuts}, \
             {first_cut:?}",
            task.id(),
            branch.kv_slots,
            branch.kv_cuts,
            branch.first_kv_cut,
        );
        let most = |v: &[usize]| v.iter().copied().max().unwrap_or(0);
        for (at, slots) in [&held[1..], &full[1..]].into_iter().enumerate() {
            self.peaks[at] += most(slots);
            self.steps[at] += slots.iter().sum::<usize>();
            self.unpinned_peaks[at] += most(slots).saturating_sub(pinned);
            self.unpinned_steps[at] += slots.iter().map(|s| s.saturating_sub(pinned)).sum::<usize>();
        }
        self.unpinned_peak = self.unpinned_peak.max(most(&held[1..]).saturating_sub(pinned));
        self.pinned += pinned;
        Ok(())
    }

    fn memory(&self, problems: usize) -> Memory {
        let saved = |[held, full]: [usize; 2]| if full == 0 { 0.0 } else { 1.0 - held as f64 / full as f64 };
        Memory {
            saved_peak: saved(self.peaks),
            saved_mean: saved(self.steps),
            unpinned_saved_peak: saved(self.unpinned_peaks),
            unpinned_saved_mean: saved(self.unpinned_steps),
            unpinned_peak: self.unpinned_peak,
            pinned_mean: self.pinned as f64 / problems.max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_stated_where_a_finished_line_ends_with_it() {
        let text = " 79-8=71. So I get 71.\nWait, 71-8=63. The rest is 63.\nIt is 5";
        assert!(a_line_ends_with(text, "71") && a_line_ends_with(text, "63.0"));
        // Sums in the middle, a line that is not finished, parts of numbers.
        assert!(!a_line_ends_with(text, "79") && !a_line_ends_with(text, "5") && !a_line_ends_with(text, "3"));
        assert!(!a_line_ends_with("So I get 71.", "71") && !a_line_ends_with("", "0"));
    }
}

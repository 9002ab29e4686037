//! When comparing prompts can pay at all: times measured once at start-up, asked before a problem's prompts are
//! compared. The times decide nothing but that; without a table prompts are always compared.

use std::time::Instant;

use crate::engine::{BranchId, Engine, PrefillOptions};
use crate::error::Result;
use crate::gate::GateSpec;
use crate::gate::asks::Asks;
use crate::sampler::child_path;

/// Tokens of the smallest bucket; the next has four times as many.
const FIRST_BUCKET: usize = 64;
/// Prompts that are measured together.
const BRANCHES: [usize; 4] = [1, 2, 4, 8];
/// The fastest of so many runs counts.
const RUNS: usize = 3;
/// Every cosine is above it: prompts compared with it are one.
const ALL_ALIKE: f32 = -2.0;

/// What prompts of one length cost, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct SharingCell {
    /// Tokens of each.
    pub prefix_tokens: usize,
    /// How many of them.
    pub branches: usize,
    /// All of them, each for itself.
    pub full_ms: f64,
    /// One of them.
    pub prefix_ms: f64,
    /// What the others add in the best case: they are compared after the probed layers, and all become the one.
    pub suffix_ms: f64,
}

/// What becoming one can save at best, by length and number of prompts.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct SharingTable {
    /// Ascending in tokens, then in branches.
    pub cells: Vec<SharingCell>,
}

/// Milliseconds that sharing saves: everything for itself, against the common part once and what each adds.
pub fn net_ms(full_ms: f64, prefix_ms: f64, suffix_ms: f64) -> f64 {
    full_ms - prefix_ms - suffix_ms
}

/// Branches from which on sharing a prefix saves time, from what one branch takes: the prefix, then its whole prompt
/// alone, or its suffix on the shared prefix. Infinite where a branch saves nothing.
pub fn break_even_branches(prefix_ms: f64, full_one_ms: f64, suffix_one_ms: f64) -> f64 {
    let saved = full_one_ms - suffix_one_ms;
    if saved > 0.0 { prefix_ms / saved } else { f64::INFINITY }
}

impl SharingCell {
    /// What sharing saves here.
    pub fn net_ms(&self) -> f64 {
        net_ms(self.full_ms, self.prefix_ms, self.suffix_ms)
    }
}

impl SharingTable {
    /// Times synthetic prompts on an engine that has nothing else to do, and resets its counters. A longer bucket is
    /// left out where every number of prompts already gains in the one before: what is saved grows with the tokens.
    pub fn measure(engine: &mut Engine, asks: &Asks) -> Result<Self> {
        let gate = Asks { tau: ALL_ALIKE, recompute: None, ..*asks }.gate();
        let room = engine.config().max_batch_tokens.min(engine.engine_stats().blocks * engine.config().block_size / 2);
        let longest = room.min(engine.model().max_position_embeddings);
        let mut cells: Vec<SharingCell> = Vec::new();
        let mut tokens = FIRST_BUCKET.min(longest);
        while tokens > 0 && tokens <= longest {
            let mut bucket: Vec<SharingCell> = Vec::new();
            let prefix_ms = fastest_ms(engine, tokens, 1, None)?;
            for branches in BRANCHES.into_iter().filter(|b| b * tokens <= room) {
                // One prompt has nothing to become one with.
                let (full_ms, compared_ms) = match branches {
                    1 => (prefix_ms, prefix_ms),
                    _ => (
                        fastest_ms(engine, tokens, branches, None)?,
                        fastest_ms(engine, tokens, branches, Some(&gate))?,
                    ),
                };
                let suffix_ms = compared_ms - prefix_ms;
                bucket.push(SharingCell { prefix_tokens: tokens, branches, full_ms, prefix_ms, suffix_ms });
            }
            let is_clear = bucket.iter().filter(|c| c.branches > 1).all(|c| c.net_ms() > 0.0);
            cells.extend(bucket);
            if is_clear {
                break;
            }
            tokens *= 4;
        }
        engine.reset_counters();
        Ok(Self { cells })
    }

    /// Whether `branches` prompts of `prefix_tokens` tokens could gain by becoming one. The nearest measured bucket at
    /// or below decides, else the smallest; where nothing was measured, they are compared.
    pub fn pays(&self, prefix_tokens: usize, branches: usize) -> bool {
        if branches < 2 {
            return false;
        }
        let several = || self.cells.iter().filter(|c| c.branches > 1);
        let below = several().map(|c| c.prefix_tokens).filter(|&t| t <= prefix_tokens).max();
        let Some(tokens) = below.or(several().map(|c| c.prefix_tokens).min()) else { return true };
        let bucket = || several().filter(|c| c.prefix_tokens == tokens);
        let cell = bucket().rfind(|c| c.branches <= branches).or(bucket().next());
        cell.is_none_or(|c| c.net_ms() > 0.0)
    }
}

/// The fastest pass over `branches` prompts that have no token in common on purpose, compared by `gate` if there is one.
fn fastest_ms(engine: &mut Engine, tokens: usize, branches: usize, gate: Option<&GateSpec>) -> Result<f64> {
    let vocab = engine.model().vocab_size as u64;
    let prompt = |b: usize| -> Vec<u32> {
        (0..tokens as u64).map(|i| (child_path((b as u64) << 32 | i, 1) % vocab) as u32).collect()
    };
    let prompts: Vec<Vec<u32>> = (0..branches).map(prompt).collect();
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let mut ids = Vec::with_capacity(branches);
        let outcome = time_ms(engine, &prompts, gate, &mut ids);
        ids.into_iter().try_for_each(|id| engine.prune(id))?;
        while engine.next_event().is_some() {}
        fastest = fastest.min(outcome?);
    }
    Ok(fastest)
}

fn time_ms(engine: &mut Engine, prompts: &[Vec<u32>], gate: Option<&GateSpec>, ids: &mut Vec<BranchId>) -> Result<f64> {
    let options = PrefillOptions { use_prefix_cache: false, ..Default::default() };
    for prompt in prompts {
        ids.push(engine.prefill(prompt, options)?);
    }
    if let Some(gate) = gate {
        engine.gate(gate, ids)?;
    }
    let started = Instant::now();
    while engine.has_work() {
        engine.step()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(prefix_tokens: usize, branches: usize, net: f64) -> SharingCell {
        SharingCell { prefix_tokens, branches, full_ms: 10.0, prefix_ms: 4.0, suffix_ms: 6.0 - net }
    }

    /// Acceptance vector RK12: full prompts, prefix, suffixes.
    #[test]
    fn rk12_sharing_saves_454_ms() {
        assert!((net_ms(583.3, 88.8, 40.0) - 454.5).abs() < 1e-9);
        let probe = SharingCell { prefix_tokens: 1033, branches: 8, full_ms: 583.3, prefix_ms: 88.8, suffix_ms: 40.0 };
        assert!(SharingTable { cells: vec![probe] }.pays(1033, 8));
    }

    /// The published break-even of 1.6 names neither of one branch's times; it says that a branch saved 55.5 ms.
    #[test]
    fn rk12_breaks_even_where_the_prefix_is_saved_back() {
        let branches = break_even_branches(88.8, 95.5, 40.0);
        assert!((branches - 1.6).abs() < 0.005, "{branches}");
        assert_eq!(break_even_branches(1.0, 2.0, 2.0), f64::INFINITY);
    }

    #[test]
    fn the_nearest_bucket_at_or_below_decides() {
        let cells = vec![cell(64, 1, 0.0), cell(64, 2, -1.0), cell(64, 4, 1.0), cell(256, 2, 2.0), cell(256, 4, -3.0)];
        let table = SharingTable { cells };
        assert!(!table.pays(64, 2) && table.pays(64, 4) && table.pays(255, 7));
        assert!(table.pays(256, 3) && !table.pays(9000, 4), "3 prompts are judged by 2");
        assert!(!table.pays(5, 2), "below the smallest, the smallest");
        assert!(!table.pays(300, 1), "one prompt has nobody to become one with");
    }

    #[test]
    fn what_was_not_measured_is_compared() {
        assert!(SharingTable::default().pays(64, 2) && !SharingTable::default().pays(64, 1));
        assert!(SharingTable { cells: vec![cell(64, 1, 0.0)] }.pays(64, 2));
    }
}

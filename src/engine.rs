//! The engine: branches of one or many problems, advanced together, one pass per [`Engine::step`].
//!
//! A branch is made by [`prefill`](Engine::prefill) or [`fork`](Engine::fork) and named by a [`BranchId`]. Nothing is
//! computed until the next step, so a prompt and the suffixes of its forks run packed in one pass. A step is
//! *decide -> reserve -> run -> interpret -> commit*; only the commit changes the tree, so a refused or failed step
//! leaves every branch as it was. The same holds for every call that returns an error, unless its text says what stays.
//!
//! Nothing here is generic, borrows across calls or touches a device: the model and its KV cache stand behind one
//! object, and outputs go to buffers of the caller.

mod cancel;
mod codes;
mod draft;
mod evict;
#[cfg(test)]
mod evict_tests;
#[cfg(test)]
mod gate_tests;
mod gating;
mod limit;
#[cfg(test)]
mod limit_tests;
mod limited;
mod open;
mod read_kv;
mod river;
#[cfg(test)]
mod river_tests;
mod stats;
mod step;

use std::collections::VecDeque;

use crate::backend::Counters;
use crate::batch::Batch;
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::gate::GateSpec;
use crate::gate::river::River;
use crate::kv::KvLayout;
use crate::kv::block_pool::BlockPool;
use crate::kv::block_table::BlockTable;
use crate::kv::eviction::Evictor;
use crate::kv::prefix_cache::PrefixCache;
use crate::model::family::ModelConfig;
use crate::model::{RowQuery, Runner};
use crate::sampler;
use crate::tree::{Branch, BranchTree, ForkPoint, Mode, SwappedBlocks};

pub(crate) use open::kv_layout;

pub use crate::backend::{RowStats, Similarity};
pub use crate::model::{LayerRow, LayerStep};
pub use crate::tree::{BranchId, EndReason, GenerateParams, RowAnswer};
pub use cancel::CancelFlag;
pub use codes::MadeCodes;
pub(crate) use gating::BranchGate;
pub use gating::GroupSimilarity;
pub(crate) use limited::Limited;
pub use open::SecondSet;
pub use read_kv::LayerKv;
pub use stats::{BranchStats, EngineStats, MemoryUse, ModelInfo, StepItem, StepSummary};

/// How a root takes part in the prefix cache, and how its draws are keyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillOptions {
    /// Look the prompt up in the prefix cache, and offer its blocks to it.
    pub use_prefix_cache: bool,
    /// Only roots with the same salt see each other's blocks.
    pub salt: u64,
    /// Key of the branch path, so that draws do not depend on what else is in flight.
    pub path: u64,
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { use_prefix_cache: true, salt: 0, path: 0 }
    }
}

/// What happened to a branch in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The branch.
    pub branch: BranchId,
    /// What happened.
    pub kind: EventKind,
}

/// See [`Event`].
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// It generated a token. A step may yield several; the row of the last is in [`Engine::row`].
    Token(GeneratedToken),
    /// All its tokens are computed, and it waits for more.
    Ready,
    /// A gate found its prompt as good as another's: it has that one's tokens and blocks now.
    Aliased {
        /// Whose.
        to: BranchId,
    },
    /// It stopped generating. [`EndReason::NonFinite`] and [`EndReason::Dropped`] also end branches that were not
    /// generating.
    Ended(EndReason),
    /// It gave its blocks to an older branch. It is recomputed, or swapped back in, when it can stay; a branch that was
    /// at rest only when somebody asks it for something.
    Preempted,
}

/// A token and the row it was chosen from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub token: u32,
    /// Its natural-log probability, before sampling parameters.
    pub logprob: f32,
    /// What the row said.
    pub stats: RowStats,
}

/// See the module text.
pub struct Engine {
    config: EngineConfig,
    model: ModelConfig,
    layout: KvLayout,
    info: ModelInfo,
    runner: Box<dyn Runner>,
    tree: BranchTree,
    pool: BlockPool,
    cache: PrefixCache,
    evictor: Evictor,
    /// Passes with a decoding branch since the engine opened: when to measure attention mass.
    decode_passes: u64,
    gates: Vec<GateSpec>,
    /// How generated tokens use the second weight set.
    river: Option<River>,
    /// Its gate on them; of a draft, on its proposals.
    river_gate: Option<GateSpec>,
    events: VecDeque<Event>,
    cancel: CancelFlag,
    next_arrival: u64,
    swap_used: u64,
    rings: limit::RingPool,
    totals: EngineStats,
    batch: Batch,
    queries: Vec<RowQuery>,
    /// See [`Engine::fail_allocation`].
    fault: Option<usize>,
    /// See [`Engine::force_preemption`].
    forced_preemptions: Vec<BranchId>,
}

impl Engine {
    /// Makes a root branch of `tokens`. Refused when they can never fit the cache or the model's context.
    pub fn prefill(&mut self, tokens: &[u32], options: PrefillOptions) -> Result<BranchId> {
        self.check_tokens(tokens)?;
        self.check_fits(tokens.len(), tokens.len())?;
        let arrival = self.arrive();
        let table = BlockTable::new(self.layout.block_size);
        let salt = options.use_prefix_cache.then_some(options.salt);
        let path = sampler::child_path(0, options.path);
        let ordinal = options.path;
        Ok(self.tree.insert(|id| Branch {
            salt,
            ordinal,
            ..Branch::new(id, tokens.to_vec(), table, path, (arrival, arrival))
        }))
    }

    /// Makes `out.len()` children that continue from the branch as it is now. They share its KV; what it has not
    /// computed yet is computed once, by the branch itself. Each child speaks for whom the branch speaks for: it has its
    /// votes. On error none is made.
    pub fn fork(&mut self, branch: BranchId, out: &mut [BranchId]) -> Result<()> {
        for i in 0..out.len() {
            match self.fork_one(branch) {
                Ok(id) => out[i] = id,
                Err(error) => {
                    out[..i].iter().try_for_each(|&id| self.prune(id))?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn fork_one(&mut self, parent_id: BranchId) -> Result<BranchId> {
        let arrival = self.arrive();
        let block_size = self.layout.block_size;
        let parent = self.tree.get_mut(parent_id)?;
        let ordinal = parent.num_children;
        parent.num_children += 1;
        parent.rests = false;
        let parent = self.tree.get(parent_id)?;
        // Blocks are shared at once unless the parent still has tokens to run or holds none: then when it has run them.
        let waits = parent.fork_point.is_some() || parent.is_runnable();
        let shares_now = !waits && parent.swapped.is_none();
        let fork_point = waits.then_some(ForkPoint { parent: parent_id, at: parent.tokens.len() });
        // What was swapped out cannot be computed again as it was.
        let swapped = parent.swapped.as_ref().filter(|_| !waits);
        let swapped = swapped.map(|s| s.fork(s.num_slots));
        let (table, num_computed) = if shares_now {
            (parent.table.fork(&mut self.pool, parent.table.len())?, parent.num_computed)
        } else {
            (BlockTable::new(block_size), swapped.as_ref().map_or(0, |_| parent.num_computed))
        };
        let fork_at = if waits { parent.tokens.len() } else { parent.num_computed.max(parent.num_lost) };
        let limited = parent.limited.as_ref().map(|l| Box::new(l.fork(ordinal, fork_at)));
        let path = sampler::child_path(parent.path, ordinal);
        let arrival = (parent.arrival.0, arrival);
        let child = Branch {
            depth: parent.depth + 1,
            ordinal,
            num_computed,
            fork_point,
            state: parent.state,
            num_lost: parent.num_lost,
            num_found: parent.whole_tokens(num_computed),
            num_forked: fork_at,
            swapped,
            limited,
            salt: parent.salt,
            votes: parent.votes,
            num_cached_blocks: if shares_now { parent.num_cached_blocks } else { 0 },
            last: if shares_now { parent.last.clone() } else { None },
            ..Branch::new(parent_id, parent.tokens.clone(), table, path, arrival)
        };
        self.swap_used += child.swapped.as_ref().map_or(0, SwappedBlocks::num_bytes);
        if !waits {
            self.note_shared(parent_id, fork_at)?;
        }
        Ok(self.tree.insert(|id| Branch { id, ..child }))
    }

    /// Gives a branch more tokens to run. An ended branch wakes up.
    pub fn append(&mut self, branch: BranchId, tokens: &[u32]) -> Result<()> {
        self.check_tokens(tokens)?;
        let b = self.tree.get(branch)?;
        self.check_fits(b.tokens.len() + tokens.len(), self.slots_once_run(b) + tokens.len())?;
        let b = self.tree.get_mut(branch)?;
        b.tokens.extend_from_slice(tokens);
        b.rests = false;
        b.prompt_len = b.tokens.len();
        b.num_generated = 0;
        b.mode = Mode::Idle;
        Ok(())
    }

    /// Cuts a branch back to its first `num_tokens` tokens; blocks past them return. Children keep what they share.
    pub fn truncate(&mut self, branch: BranchId, num_tokens: usize) -> Result<()> {
        if num_tokens == 0 || num_tokens > self.tree.get(branch)?.tokens.len() {
            return Err(Error::config("num_tokens", "must be between 1 and the branch's length"));
        }
        self.settle_children(branch)?;
        let b = self.tree.get_mut(branch)?;
        let Some(num_slots) = b.slots_for(b.num_computed.min(num_tokens)) else {
            return Err(Error::config("truncate", "a cut under a KV budget went through those tokens"));
        };
        b.tokens.truncate(num_tokens);
        b.num_computed = b.num_computed.min(num_tokens);
        b.num_lost = b.num_lost.min(num_tokens);
        b.num_found = b.num_found.min(num_tokens);
        b.num_refreshed = b.num_refreshed.min(num_tokens);
        b.num_forked = b.num_forked.min(num_tokens);
        b.prompt_len = b.prompt_len.min(num_tokens);
        b.num_generated = 0;
        b.num_cached_blocks = b.num_cached_blocks.min(num_tokens / self.layout.block_size);
        b.last = None;
        b.mode = Mode::Idle;
        if let Some(fork) = &mut b.fork_point {
            fork.at = fork.at.min(num_tokens);
        }
        if let Some(limited) = &mut b.limited {
            limited.truncate(num_tokens);
        }
        match &mut b.swapped {
            Some(swapped) => swapped.num_slots = num_slots,
            None => b.table.truncate(&mut self.pool, num_slots)?,
        }
        Ok(())
    }

    /// Removes a branch; its private blocks return. Its children live on.
    pub fn prune(&mut self, branch: BranchId) -> Result<()> {
        self.settle_children(branch)?;
        self.release_ring(branch)?;
        let mut b = self.tree.remove(branch)?;
        if let Some(swapped) = b.swapped.take() {
            self.swap_used -= swapped.num_bytes();
        }
        b.table.clear(&mut self.pool)
    }

    /// Takes a branch out of the prefix cache: what only it and the cache hold is forgotten there, and nothing of it is
    /// offered any more. For a branch that nobody will ask for again: pruned, it then leaves no cached block behind.
    pub fn uncache(&mut self, branch: BranchId) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        b.num_cached_blocks = 0;
        let Some(salt) = b.salt.take() else { return Ok(()) };
        self.cache.forget(salt, &b.tokens, b.table.blocks(), &mut self.pool).map(|_| ())
    }

    /// Prunes `merged` and gives its votes to `survivor`.
    pub fn merge(&mut self, survivor: BranchId, merged: BranchId) -> Result<()> {
        if survivor == merged {
            return Err(Error::config("merge", "a branch cannot be merged into itself"));
        }
        self.tree.get(survivor)?;
        let votes = self.tree.get(merged)?.votes;
        self.prune(merged)?;
        self.tree.get_mut(survivor)?.votes += votes;
        Ok(())
    }

    /// The branch with the most votes; then the highest mean confidence; then the first given.
    pub fn select(&self, branches: &[BranchId]) -> Result<BranchId> {
        let mut best: Option<(&Branch, f64)> = None;
        for &id in branches {
            let b = self.tree.get(id)?;
            let key = (b.votes, b.mean_confidence());
            if best.is_none_or(|(lead, confidence)| key > (lead.votes, confidence)) {
                best = Some((b, key.1));
            }
        }
        best.map(|(b, _)| b.id).ok_or_else(|| Error::config("select", "needs at least one branch"))
    }

    /// Lets a branch generate from its next step on. Refused when the tokens it may generate can never fit. A branch
    /// that may generate none has ended, and says so in an event.
    pub fn start(&mut self, branch: BranchId, params: GenerateParams) -> Result<()> {
        params.sampling.validate()?;
        self.check_tokens(&params.end_tokens)?;
        self.check_tokens(params.sampling.logit_bias.iter().map(|(token, _)| token))?;
        let b = self.tree.get(branch)?;
        let new = params.max_new_tokens.min(self.model.max_position_embeddings.saturating_sub(b.tokens.len()));
        self.check_fits(b.tokens.len() + new, self.slots_behind(b, self.slots_once_run(b), new))?;
        self.reopen_last_row(branch)?;
        self.leave_clusters(branch)?;
        let b = self.tree.get_mut(branch)?;
        b.prompt_len = b.tokens.len();
        b.num_generated = 0;
        b.confidence_sum = 0.0;
        b.confidence_steps = 0;
        if params.max_new_tokens > 0 {
            b.mode = Mode::Generating(Box::new(params));
        } else {
            b.mode = Mode::Ended(EndReason::Length);
            self.events.push_back(Event { branch, kind: EventKind::Ended(EndReason::Length) });
        }
        Ok(())
    }

    /// Stops a generating branch where it is.
    pub fn stop(&mut self, branch: BranchId) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        if b.is_generating() {
            b.mode = Mode::Ended(EndReason::Stopped);
            self.events.push_back(Event { branch, kind: EventKind::Ended(EndReason::Stopped) });
        }
        Ok(())
    }

    /// From its next row on, a branch reports the log-probabilities of these tokens in [`RowAnswer::watched`], and its
    /// `top_k` most likely tokens.
    pub fn watch(&mut self, branch: BranchId, tokens: &[u32], top_k: usize) -> Result<()> {
        self.check_tokens(tokens)?;
        self.reopen_last_row(branch)?;
        let b = self.tree.get_mut(branch)?;
        b.watch = tokens.to_vec();
        b.top_k = top_k;
        Ok(())
    }

    /// Appends `tokens` and runs steps until they are computed (other branches advance too). `logprobs[i]` becomes the
    /// natural-log probability of `tokens[i]` given all before it; NaN for the first token of a root. When a step fails
    /// or is cancelled, `logprobs` is untouched, and the tokens stay with the branch.
    pub fn score(&mut self, branch: BranchId, tokens: &[u32], logprobs: &mut [f32]) -> Result<()> {
        if tokens.len() != logprobs.len() {
            return Err(Error::Shape {
                op: "score",
                expected: format!("{} log-probabilities", tokens.len()),
                got: logprobs.len().to_string(),
            });
        }
        let from = self.tree.get(branch)?.tokens.len();
        self.append(branch, tokens)?;
        self.score_pending(branch, from)?;
        self.finish_score(branch, logprobs)
    }

    /// As [`score`](Self::score) for a root that has not run yet: the log-probabilities of all its tokens.
    pub fn score_prompt(&mut self, branch: BranchId, logprobs: &mut [f32]) -> Result<()> {
        let b = self.tree.get(branch)?;
        if b.num_computed != 0 || b.fork_point.is_some() || b.tokens.len() != logprobs.len() {
            return Err(Error::config("score_prompt", "needs a root that has not run, and one value per token"));
        }
        self.tree.get_mut(branch)?.salt = None; // every row must be computed
        self.score_pending(branch, 0)?;
        self.finish_score(branch, logprobs)
    }

    /// The most likely token in the place of each that was scored last; `None` for the first token of a root.
    pub fn predicted(&self, branch: BranchId) -> Result<&[Option<u32>]> {
        Ok(&self.tree.get(branch)?.predicted)
    }

    /// Runs until the scores are there. After an error nothing is scored any more; what has run stays computed.
    fn finish_score(&mut self, branch: BranchId, logprobs: &mut [f32]) -> Result<()> {
        let outcome = self.run_until_computed(branch);
        let b = self.tree.get_mut(branch)?;
        b.score_from = None;
        outcome?;
        logprobs.copy_from_slice(&b.scores);
        Ok(())
    }

    /// Asks for the log-probabilities of the tokens from `from` on; the token at `from` needs the row before it.
    fn score_pending(&mut self, branch: BranchId, from: usize) -> Result<()> {
        self.leave_clusters(branch)?;
        let b = self.tree.get_mut(branch)?;
        match (&mut b.fork_point, from.checked_sub(1)) {
            (Some(fork), Some(row)) => fork.at = fork.at.min(row),
            (None, Some(row)) if b.num_computed > row => self.uncompute(branch, row)?,
            _ => {}
        }
        let b = self.tree.get_mut(branch)?;
        b.score_from = Some(from);
        b.scores = vec![f32::NAN; b.tokens.len() - from];
        b.predicted = vec![None; b.scores.len()];
        Ok(())
    }

    fn run_until_computed(&mut self, branch: BranchId) -> Result<()> {
        while self.tree.get(branch)?.is_runnable() {
            self.step()?;
        }
        match self.tree.get(branch)?.mode {
            Mode::Ended(EndReason::NonFinite) => {
                let b = self.tree.get(branch)?;
                // The first token without a score stands behind the first row that was not finite.
                let is_unscored = |from: usize, i: usize| b.scores.get(i - from).is_some_and(|x| x.is_nan());
                let unscored = b.score_from.and_then(|f| (f.max(1)..b.num_computed).find(|&i| is_unscored(f, i)));
                let position = unscored.unwrap_or(b.num_computed).saturating_sub(1);
                Err(Error::NonFinite { branch: branch.to_string(), position })
            }
            Mode::Ended(_) if self.tree.get(branch)?.pending() > 0 => {
                Err(Error::Branch { branch: branch.to_string(), why: "left its pass at a gate" })
            }
            _ => Ok(()),
        }
    }

    /// What the branch's last computed row said; `None` before its first.
    pub fn row(&self, branch: BranchId) -> Result<Option<&RowAnswer>> {
        Ok(self.tree.get(branch)?.last.as_ref())
    }

    /// The branch's tokens: prompt, then what it generated.
    pub fn tokens(&self, branch: BranchId) -> Result<&[u32]> {
        Ok(&self.tree.get(branch)?.tokens)
    }

    /// The oldest event not taken yet.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// True while any branch has tokens to run.
    pub fn has_work(&self) -> bool {
        self.tree.iter().any(Branch::is_runnable)
    }

    /// The flag that cancels this engine's steps.
    pub fn cancel_flag(&self) -> CancelFlag {
        self.cancel.clone()
    }

    /// Gates between layers, on every branch of every pass from now on. Empty (the default) leaves every pass whole.
    /// Aliases are for [`gate`](Self::gate), which knows whom they concern. A draft ([`set_river`](Self::set_river)) proposes
    /// nothing while there are any.
    pub fn set_gates(&mut self, gates: &[GateSpec]) -> Result<()> {
        for gate in gates {
            self.check_gate(gate)?;
            if gate.effect.needs_clusters() {
                return Err(Error::config("gate", "effect: an alias needs its branches named"));
            }
        }
        self.gates = gates.to_vec();
        Ok(())
    }

    /// Forgets every cached prefix that no branch uses.
    pub fn clear_prefix_cache(&mut self) -> Result<()> {
        self.cache.clear(&mut self.pool)?;
        for b in self.tree.iter_mut() {
            b.num_cached_blocks = 0;
        }
        Ok(())
    }

    /// The configuration the engine was opened with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// Work done by the device since the last reset.
    pub fn counters(&self) -> Counters {
        self.runner.counters()
    }

    /// Resets [`counters`](Self::counters), [`stats`](Self::engine_stats) totals and the block peak.
    pub fn reset_counters(&mut self) {
        self.runner.reset_counters();
        self.totals = EngineStats::default();
        self.pool.reset_peak();
    }

    /// For tests: the next step that reserves anything is refused its memory, once. `at` is how many of the plan's
    /// branches have theirs by then; from their number on it is the pass that gets none.
    #[doc(hidden)]
    pub fn fail_allocation(&mut self, at: usize) {
        self.fault = Some(at);
    }

    fn arrive(&mut self) -> u64 {
        self.next_arrival += 1;
        self.next_arrival
    }

    fn check_tokens<'a>(&self, tokens: impl IntoIterator<Item = &'a u32>) -> Result<()> {
        match tokens.into_iter().find(|&&t| t as usize >= self.model.vocab_size) {
            Some(t) => Err(Error::config(
                "tokens",
                format!("token id {t} is outside the vocabulary of {}", self.model.vocab_size),
            )),
            None => Ok(()),
        }
    }

    /// Slots of a branch when all its tokens have run.
    fn slots_once_run(&self, b: &Branch) -> usize {
        let start = self.fork_start(b);
        self.start_slots(b, start) + b.tokens.len() - start
    }

    /// Slots at most when a branch that will hold `num_slots` has generated `num_new` tokens more.
    fn slots_behind(&self, b: &Branch, num_slots: usize, num_new: usize) -> usize {
        let most = b.limited.as_ref().map_or(usize::MAX, |l| l.most_slots(self.config.kv_window));
        (num_slots + num_new).min(most.max(num_slots))
    }

    /// Refuses what no amount of waiting can make fit.
    fn check_fits(&self, num_tokens: usize, num_slots: usize) -> Result<()> {
        if num_tokens == 0 {
            return Err(Error::config("tokens", "a branch needs at least one token"));
        }
        if num_tokens > self.model.max_position_embeddings {
            let max = self.model.max_position_embeddings;
            return Err(Error::config("tokens", format!("{num_tokens} tokens exceed the model's context of {max}")));
        }
        // One block more than the slots fill: the copy of a shared tail.
        let needed = num_slots.div_ceil(self.layout.block_size) + 1;
        let capacity = self.pool.num_blocks();
        if needed > capacity {
            let missing_bytes = (needed - capacity) as u64 * self.layout.block_bytes(self.model.num_layers);
            return Err(Error::OutOfBlocks { needed, capacity, missing_bytes });
        }
        Ok(())
    }

    /// A branch whose tokens are all computed has no logits at hand: its last token runs again.
    fn reopen_last_row(&mut self, branch: BranchId) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        let last = b.tokens.len() - 1;
        b.rests = false;
        match &mut b.fork_point {
            Some(fork) => fork.at = fork.at.min(last),
            None if b.num_computed > last => self.uncompute(branch, last)?,
            None => {}
        }
        // Also where its KV is lost or not there yet: what counts as run must not depend on that.
        if let Some(limited) = &mut self.tree.get_mut(branch)?.limited {
            limited.run_again(last);
        }
        Ok(())
    }

    /// Makes `tokens[num_computed..]` pending again.
    fn uncompute(&mut self, branch: BranchId, num_computed: usize) -> Result<()> {
        self.settle_children(branch)?;
        let b = self.tree.get_mut(branch)?;
        let Some(num_slots) = b.slots_for(num_computed) else {
            return Err(Error::config(
                "branch",
                "a cut under a KV budget went through the tokens that are to run again",
            ));
        };
        if let Some(limited) = &mut b.limited {
            limited.run_again(num_computed);
        }
        b.num_computed = num_computed;
        b.num_cached_blocks = b.num_cached_blocks.min(num_computed / self.layout.block_size);
        match &mut b.swapped {
            Some(swapped) => swapped.num_slots = num_slots,
            None => b.table.truncate(&mut self.pool, num_slots)?,
        }
        Ok(())
    }

    /// Gives children that wait for `branch` what it has computed so far; the rest they run themselves, the first of
    /// them on behalf of the others.
    fn settle_children(&mut self, branch: BranchId) -> Result<()> {
        let waiting: Vec<(BranchId, usize)> = self
            .tree
            .iter()
            .filter_map(|b| b.fork_point.filter(|f| f.parent == branch).map(|f| (b.id, f.at)))
            .collect();
        let mut heir: Option<(BranchId, usize)> = None;
        for (child, at) in waiting {
            if let Some((heir, heir_at)) = heir
                && heir_at >= at
            {
                self.tree.get_mut(child)?.fork_point = Some(ForkPoint { parent: heir, at });
                continue;
            }
            self.materialise(child)?;
            heir = Some((child, at));
        }
        Ok(())
    }

    /// Lets children share what their parents have finished, those included that have nothing to run themselves.
    fn materialise_ready(&mut self) -> Result<()> {
        let is_ready = |b: &Branch| {
            b.fork_point.is_some_and(|f| {
                self.tree.get(f.parent).is_ok_and(|p| p.fork_point.is_none() && p.num_computed >= f.at)
            })
        };
        let ready: Vec<BranchId> = self.tree.iter().filter(|b| is_ready(b)).map(|b| b.id).collect();
        ready.into_iter().try_for_each(|id| self.materialise(id))
    }

    /// Forks the table of a waiting child from its parent as far as that has come.
    fn materialise(&mut self, child: BranchId) -> Result<()> {
        self.share_from_parent(child, 0)?;
        self.tree.get_mut(child)?.fork_point = None;
        Ok(())
    }

    /// Another branch has the first `num_tokens` of this one from now on. Whatever becomes of it, they are never dropped: what
    /// a branch keeps must not depend on who else is there.
    fn note_shared(&mut self, branch: BranchId, num_tokens: usize) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        b.num_forked = b.num_forked.max(num_tokens);
        if let Some(limited) = &mut b.limited {
            limited.share(num_tokens);
        }
        Ok(())
    }

    /// Gives a waiting child the rows up to its fork that its parent has, or will have after running `num_planned` more
    /// in this very step. A swapped-out parent has none to share: the child has a copy.
    fn share_from_parent(&mut self, child: BranchId, num_planned: usize) -> Result<()> {
        let Some(fork) = self.tree.get(child)?.fork_point else { return Ok(()) };
        self.note_shared(fork.parent, fork.at)?;
        let parent = self.tree.get(fork.parent)?;
        let at = parent.whole_tokens(fork.at.min(parent.num_computed + num_planned));
        let num_slots = parent.slots_for(at).unwrap_or(at);
        let swapped = parent.swapped.as_ref().map(|s| s.fork(num_slots));
        let table = match swapped {
            Some(_) => BlockTable::new(self.layout.block_size),
            None => parent.table.fork(&mut self.pool, num_slots)?,
        };
        let (state, cached, num_lost) = (parent.state, parent.num_cached_blocks, parent.num_lost.min(fork.at));
        let num_found = parent.whole_tokens(at);
        self.swap_used += swapped.as_ref().map_or(0, SwappedBlocks::num_bytes);
        let mut own = self.tree.get_mut(child)?.limited.take();
        let (parent, ordinal) = (self.tree.get(fork.parent)?.limited.as_deref(), self.tree.get(child)?.ordinal);
        match (&mut own, parent) {
            (Some(own), parent) => own.take_from(parent, fork.at),
            (None, Some(parent)) if parent.is_cut() => own = Some(Box::new(parent.fork(ordinal, fork.at))),
            (None, _) => {}
        }
        let c = self.tree.get_mut(child)?;
        c.limited = own;
        c.num_lost = c.num_lost.max(num_lost);
        c.swapped = swapped;
        c.table = table;
        c.num_computed = at;
        c.num_found = num_found;
        c.num_cached_blocks = cached.min(at / self.layout.block_size);
        c.state = state;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let ids: Vec<BranchId> = self.tree.iter().map(|b| b.id).collect();
        for id in ids {
            let _ = self.prune(id);
        }
    }
}

const fn assert_send<T: Send>() {}
const _: () = assert_send::<Engine>();

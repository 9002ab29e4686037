//! The branch tree: an arena of branches behind generation-checked handles.
//!
//! A branch owns its token ids and its block table, and knows where it forked. It never touches a device; the engine
//! is the only one that edits it, and only when a step commits.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::backend::RowStats;
use crate::engine::{BranchGate, GroupSimilarity, Limited};
use crate::error::{Error, Result};
use crate::kv::block_pool::BlockState;
use crate::kv::block_table::BlockTable;
use crate::model::{LayerRow, LayerStep};
use crate::sampler::SamplingParams;

/// Handle of a branch. A handle of a pruned branch stays invalid for ever, and one of another engine was never valid:
/// generations are drawn from one counter for the whole process (it wraps after 2^32 branches).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct BranchId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl fmt::Display for BranchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

/// Why a branch stopped generating.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum EndReason {
    /// It produced one of its end tokens.
    EndToken = 0,
    /// It reached its token limit.
    Length = 1,
    /// Somebody called [`stop`](crate::Engine::stop).
    Stopped = 2,
    /// A gate between layers dropped it.
    Dropped = 3,
    /// Its logits were not finite.
    NonFinite = 4,
    /// It reached the model's last position.
    Context = 5,
    /// Another branch that had become the same speaks for it.
    Merged = 6,
}

/// How a branch generates.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// End tokens are not taken before this many.
    pub min_new_tokens: usize,
    /// Tokens that end the branch; they are reported, not appended. Empty: only the limit ends it.
    pub end_tokens: Vec<u32>,
}

impl GenerateParams {
    /// What is added to logits once so many tokens are there: end tokens that would come too early are banned.
    pub(crate) fn bias(&self, num_generated: usize) -> Vec<(u32, f32)> {
        if num_generated >= self.min_new_tokens {
            return self.sampling.logit_bias.clone();
        }
        let allowed = self.sampling.logit_bias.iter().filter(|(token, _)| !self.end_tokens.contains(token));
        let mut banned = self.end_tokens.clone();
        banned.sort_unstable();
        banned.dedup();
        allowed.copied().chain(banned.into_iter().map(|token| (token, f32::NEG_INFINITY))).collect()
    }
}

impl Default for GenerateParams {
    fn default() -> Self {
        Self { sampling: SamplingParams::default(), max_new_tokens: 256, min_new_tokens: 0, end_tokens: Vec::new() }
    }
}

/// What the last computed row of a branch said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowAnswer {
    /// Statistics of the row.
    pub stats: RowStats,
    /// The token chosen from it, when the branch generates.
    pub token: Option<u32>,
    /// Natural-log probability of `token`.
    pub token_logprob: f32,
    /// Natural-log probabilities of the branch's watched tokens.
    pub watched: Vec<f32>,
    /// The most likely tokens with their natural-log probabilities, when asked for.
    pub top: Vec<(u32, f32)>,
    /// What the probed layers below it said, shallow first.
    pub layers: Vec<LayerRow>,
    /// Cosines of its residual stream before and after the layers that a gate compared, shallow first.
    pub steps: Vec<LayerStep>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Mode {
    /// Computes what it is given and stops there.
    Idle,
    /// Appends tokens until it ends.
    Generating(Box<GenerateParams>),
    /// Ended; appending or starting wakes it.
    Ended(EndReason),
}

/// Where a branch that has no KV of its own yet starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ForkPoint {
    pub(crate) parent: BranchId,
    pub(crate) at: usize,
}

#[derive(Debug)]
pub(crate) struct Branch {
    pub(crate) id: BranchId,
    pub(crate) depth: u32,
    /// Which of its parent's children it is; of a root what it was given as its path.
    pub(crate) ordinal: u64,
    pub(crate) num_children: u64,
    /// Hash of the path from the root: the key of its draws.
    pub(crate) path: u64,
    /// Order of arrival of its root, then of itself: the priority for blocks.
    pub(crate) arrival: (u64, u64),
    pub(crate) tokens: Vec<u32>,
    /// Where generation began, for penalties and limits.
    pub(crate) prompt_len: usize,
    pub(crate) num_generated: usize,
    /// `tokens[..num_computed]` have their KV in `table` (or in swap).
    pub(crate) num_computed: usize,
    /// `tokens[..num_lost]` were computed before and evicted since; what of them runs is computed again.
    pub(crate) num_lost: usize,
    /// `tokens[..num_found]` it did not compute itself: another branch did, or the prefix cache had them.
    pub(crate) num_found: usize,
    /// `tokens[..num_refreshed]` are not due to run again in the backbone.
    pub(crate) num_refreshed: usize,
    /// `tokens[..num_forked]` another branch has or had too, by a fork or because the two had become one prompt.
    pub(crate) num_forked: usize,
    pub(crate) table: BlockTable,
    pub(crate) fork_point: Option<ForkPoint>,
    /// The weakest state of anything it attended to.
    pub(crate) state: BlockState,
    /// Salt of its prefix-cache entries; `None` keeps it out of the cache.
    pub(crate) salt: Option<u64>,
    /// Full blocks handed to the prefix cache so far.
    pub(crate) num_cached_blocks: usize,
    pub(crate) mode: Mode,
    pub(crate) watch: Vec<u32>,
    pub(crate) top_k: usize,
    /// Log-probabilities wanted for `tokens[score_from..]`.
    pub(crate) score_from: Option<usize>,
    pub(crate) scores: Vec<f32>,
    /// The most likely tokens in their places.
    pub(crate) predicted: Vec<Option<u32>>,
    pub(crate) last: Option<RowAnswer>,
    /// Sum over generated steps of the top-1 probability.
    pub(crate) confidence_sum: f64,
    pub(crate) confidence_steps: u64,
    pub(crate) votes: f64,
    pub(crate) preemptions: u32,
    /// It was whole and idle when it gave up its blocks, and nobody has asked it for anything since. It must not take
    /// them back before: it would take them from those that are at work, and they would never come to an end.
    pub(crate) rests: bool,
    /// Swapped-out blocks of a branch that cannot be recomputed exactly.
    pub(crate) swapped: Option<SwappedBlocks>,
    /// Its KV budget, if it has one.
    pub(crate) limited: Option<Box<Limited>>,
    pub(crate) exit_layer: Option<u32>,
    /// Set for the pass that computes its last pending token.
    pub(crate) gate: Option<Arc<BranchGate>>,
    pub(crate) similarity: Option<Arc<GroupSimilarity>>,
}

/// The blocks of a swapped-out branch, in table order.
#[derive(Debug, Default)]
pub(crate) struct SwappedBlocks {
    pub(crate) bytes: Vec<u8>,
    pub(crate) num_slots: usize,
    /// The leading slots that hold exact rows of its own tokens.
    pub(crate) num_exact: usize,
    /// Its last queries; empty where nobody asks for them.
    pub(crate) queries: Vec<u8>,
}

impl SwappedBlocks {
    /// For a fork that has the first `num_slots`, and queries of its own.
    pub(crate) fn fork(&self, num_slots: usize) -> Self {
        Self { bytes: self.bytes.clone(), num_slots, num_exact: self.num_exact, queries: Vec::new() }
    }

    /// What it takes of the swap space.
    pub(crate) fn num_bytes(&self) -> u64 {
        (self.bytes.len() + self.queries.len()) as u64
    }
}

impl Branch {
    /// A branch of `tokens` with nothing computed.
    pub(crate) fn new(id: BranchId, tokens: Vec<u32>, table: BlockTable, path: u64, arrival: (u64, u64)) -> Self {
        Self {
            id,
            depth: 0,
            ordinal: 0,
            num_children: 0,
            path,
            arrival,
            prompt_len: tokens.len(),
            tokens,
            num_generated: 0,
            num_computed: 0,
            num_lost: 0,
            num_found: 0,
            num_refreshed: 0,
            num_forked: 0,
            table,
            fork_point: None,
            state: BlockState::Exact,
            salt: None,
            num_cached_blocks: 0,
            mode: Mode::Idle,
            watch: Vec::new(),
            top_k: 0,
            score_from: None,
            scores: Vec::new(),
            predicted: Vec::new(),
            last: None,
            confidence_sum: 0.0,
            confidence_steps: 0,
            votes: 1.0,
            preemptions: 0,
            rests: false,
            swapped: None,
            limited: None,
            exit_layer: None,
            gate: None,
            similarity: None,
        }
    }

    /// Tokens it has to run itself: those its parent is about to run for it do not count.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.fork_point.map_or(self.num_computed, |f| f.at)
    }

    /// It has tokens to run and nobody told it to rest.
    pub(crate) fn is_runnable(&self) -> bool {
        self.pending() > 0 && !self.rests && !matches!(self.mode, Mode::Ended(_))
    }

    /// Slots that hold the first `num_tokens` tokens; `None` where a cut went through them.
    pub(crate) fn slots_for(&self, num_tokens: usize) -> Option<usize> {
        self.limited.as_ref().map_or(Some(num_tokens), |l| l.slots_for(num_tokens))
    }

    /// The most of the first `num_tokens` tokens whose slots can be shared or kept.
    pub(crate) fn whole_tokens(&self, num_tokens: usize) -> usize {
        self.limited.as_ref().map_or(num_tokens, |l| l.whole_tokens(num_tokens))
    }

    /// Slots it holds, or held when it was swapped out.
    pub(crate) fn num_slots(&self) -> usize {
        self.swapped.as_ref().map_or(self.table.len(), |s| s.num_slots)
    }

    /// Leading slots that hold exact rows of its own tokens, or held them when it was swapped out.
    pub(crate) fn exact_len(&self) -> usize {
        self.swapped.as_ref().map_or(self.table.exact_len(), |s| s.num_exact.min(s.num_slots))
    }

    pub(crate) fn is_generating(&self) -> bool {
        matches!(self.mode, Mode::Generating(_))
    }
}

/// Never 0, so that a default handle names nobody.
fn next_generation() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    match NEXT.fetch_add(1, Ordering::Relaxed) {
        0 => NEXT.fetch_add(1, Ordering::Relaxed),
        generation => generation,
    }
}

/// The arena. Indices are reused; generations are not.
#[derive(Debug, Default)]
pub(crate) struct BranchTree {
    slots: Vec<Slot>,
    free: Vec<u32>,
    num_live: usize,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    branch: Option<Box<Branch>>,
}

impl BranchTree {
    /// Makes room and lets `make` build the branch for its handle.
    pub(crate) fn insert(&mut self, make: impl FnOnce(BranchId) -> Branch) -> BranchId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.generation = next_generation();
        let id = BranchId { index, generation: slot.generation };
        slot.branch = Some(Box::new(make(id)));
        self.num_live += 1;
        id
    }

    pub(crate) fn remove(&mut self, id: BranchId) -> Result<Branch> {
        self.get(id)?;
        let slot = &mut self.slots[id.index as usize];
        self.free.push(id.index);
        self.num_live -= 1;
        slot.branch.take().map(|b| *b).ok_or_else(|| unknown(id))
    }

    pub(crate) fn get(&self, id: BranchId) -> Result<&Branch> {
        match self.slots.get(id.index as usize) {
            Some(Slot { generation, branch: Some(branch) }) if *generation == id.generation => Ok(branch),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn get_mut(&mut self, id: BranchId) -> Result<&mut Branch> {
        match self.slots.get_mut(id.index as usize) {
            Some(Slot { generation, branch: Some(branch) }) if *generation == id.generation => Ok(branch),
            _ => Err(unknown(id)),
        }
    }

    /// The live branch at `index`, for indices that came from this tree in this step.
    pub(crate) fn at(&self, index: usize) -> Option<&Branch> {
        self.slots.get(index).and_then(|s| s.branch.as_deref())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Branch> {
        self.slots.iter().filter_map(|s| s.branch.as_deref())
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Branch> {
        self.slots.iter_mut().filter_map(|s| s.branch.as_deref_mut())
    }

    pub(crate) fn len(&self) -> usize {
        self.num_live
    }
}

fn unknown(id: BranchId) -> Error {
    Error::Branch { branch: id.to_string(), why: "no such branch (pruned, or of another engine)" }
}

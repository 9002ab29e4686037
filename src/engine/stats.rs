//! What the engine tells about itself and its branches.

use std::collections::HashMap;

use super::Engine;
use crate::error::{Error, Result};
use crate::kv::block_pool::BlockState;
use crate::tree::{Branch, BranchId, EndReason, Mode};

/// A branch at a glance.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BranchStats {
    /// Distance from its root.
    pub depth: u32,
    /// Tokens it has.
    pub num_tokens: usize,
    /// Of those, tokens with KV.
    pub num_computed_tokens: usize,
    /// Tokens it generated since it was started.
    pub num_generated_tokens: usize,
    /// KV slots they take in each layer and head: fewer under a KV budget.
    pub num_slots: usize,
    /// Times its KV was cut back to its budget.
    pub kv_cuts: u32,
    /// Tokens it had computed when that first happened.
    pub first_kv_cut: Option<usize>,
    /// Blocks it shares with another branch.
    pub blocks_shared: usize,
    /// Blocks only it uses (the prefix cache may keep them findable).
    pub blocks_private: usize,
    /// The weakest state of anything it attended to.
    #[serde(serialize_with = "state_name")]
    pub state: BlockState,
    /// Mean top-1 probability over its generated steps, the one that ended it included.
    pub mean_confidence: f64,
    /// Entropy of its last row in nats; NaN before its first.
    pub entropy: f32,
    /// Votes it holds.
    pub votes: f64,
    /// Times it gave up its blocks.
    pub preemptions: u32,
    /// Why it ended, if it did.
    pub ended: Option<EndReason>,
    /// The layer after which a gate let it leave, if one did.
    pub exit_layer: Option<u32>,
}

fn state_name<S: serde::Serializer>(state: &BlockState, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_str(&format!("{state:?}").to_lowercase())
}

/// The engine at a glance. The totals count since the last [`Engine::reset_counters`].
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct EngineStats {
    /// Passes run.
    pub steps: u64,
    /// Tokens computed, through all layers or some.
    pub tokens_computed: u64,
    /// Layers that tokens went through, in sum: `tokens_computed * layers` where no gate was at work.
    pub layer_rows: u64,
    /// Generated tokens computed one by one.
    pub tokens_decoded: u64,
    /// Layers of the backbone that they went through, in sum; the river had the others.
    pub decode_layers: u64,
    /// Tokens the river proposed.
    pub tokens_drafted: u64,
    /// Of those, tokens the backbone would have chosen itself.
    pub drafts_kept: u64,
    /// Times the backbone ran a branch's last tokens again.
    pub kv_refreshes: u64,
    /// Prompt tokens found in the prefix cache instead.
    pub tokens_from_cache: u64,
    /// Times a branch gave up its blocks.
    pub preemptions: u64,
    /// Of the computed tokens, those whose KV had been there before and was evicted: from the prefix cache, or with a
    /// branch that gave way.
    pub tokens_recomputed: u64,
    /// Blocks freed to make room: taken from the prefix cache, or from a branch that gave way.
    pub blocks_evicted: u64,
    /// Their bytes.
    pub bytes_evicted: u64,
    /// Times a branch's KV was cut back to its budget.
    pub kv_cuts: u64,
    /// Slots, in each layer and head, that were dropped thereby.
    pub slots_dropped: u64,
    /// Live branches.
    pub branches: usize,
    /// KV blocks in all.
    pub blocks: usize,
    /// KV blocks held by branches or the prefix cache.
    pub blocks_used: usize,
    /// The most that were held at once.
    pub blocks_peak: usize,
    /// KV blocks the prefix cache holds.
    pub blocks_cached: usize,
    /// Bytes swapped out.
    pub swapped_bytes: u64,
}

/// Where the KV blocks are at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Held by more than one branch.
    pub shared: usize,
    /// Held by one branch.
    pub private: usize,
    /// Held by the prefix cache alone.
    pub cached: usize,
    /// Given back since the engine was opened.
    pub freed: u64,
}

/// What was loaded.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ModelInfo {
    /// The folder or the built-in name.
    pub name: String,
    /// The family's name.
    pub family: String,
    /// Parameters, tied ones once.
    pub num_params: u64,
    /// Bytes of weights mapped in place.
    pub weight_bytes: u64,
    /// Bytes copied beyond that (converted to the compute type).
    pub weight_copy_bytes: u64,
    /// `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// The device in words.
    pub device: String,
    /// Why `auto` chose the CPU, in one line.
    pub device_note: Option<String>,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: u64,
    /// Bytes of K and V one token takes.
    pub kv_bytes_per_token: u64,
    /// Seconds spent loading.
    pub load_seconds: f64,
}

/// One branch's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepItem {
    /// The branch.
    pub branch: BranchId,
    /// Tokens computed for it.
    pub num_tokens: usize,
    /// Layers they went through.
    pub num_layers: u32,
    /// Of those, layers of the backbone; the second weight set had the others.
    pub backbone_layers: u32,
    /// A gate let it leave before the last.
    pub left_early: bool,
    /// True when the token was one it had generated.
    pub is_decode: bool,
}

/// What a step did; reused by the caller from step to step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepSummary {
    /// Who ran.
    pub items: Vec<StepItem>,
    /// Layers their tokens went through, in sum.
    pub layer_rows: u64,
    /// KV slots that attention read in each layer, shared runs once.
    pub slots_read: usize,
}

impl StepSummary {
    /// Tokens computed.
    pub fn num_tokens(&self) -> usize {
        self.items.iter().map(|i| i.num_tokens).sum()
    }
}

impl Branch {
    pub(crate) fn mean_confidence(&self) -> f64 {
        if self.confidence_steps == 0 { 0.0 } else { self.confidence_sum / self.confidence_steps as f64 }
    }
}

impl Engine {
    /// A branch at a glance. Counting who shares what looks at every table: not for inner loops.
    pub fn stats(&self, branch: BranchId) -> Result<BranchStats> {
        let b = self.tree.get(branch)?;
        let shared = self.shared_blocks();
        let blocks_shared =
            b.table.blocks().iter().filter(|id| shared.get(&id.index()).is_some_and(|&n| n > 1)).count();
        Ok(BranchStats {
            depth: b.depth,
            num_tokens: b.tokens.len(),
            num_computed_tokens: b.num_computed,
            num_generated_tokens: b.num_generated,
            num_slots: b.num_slots(),
            kv_cuts: b.limited.as_ref().map_or(0, |l| l.num_cuts),
            first_kv_cut: b.limited.as_ref().and_then(|l| l.first_cut),
            blocks_shared,
            blocks_private: b.table.blocks().len() - blocks_shared,
            state: b.state,
            mean_confidence: b.mean_confidence(),
            entropy: b.last.as_ref().map_or(f32::NAN, |r| r.stats.entropy),
            votes: b.votes,
            preemptions: b.preemptions,
            ended: match b.mode {
                Mode::Ended(reason) => Some(reason),
                _ => None,
            },
            exit_layer: b.exit_layer,
        })
    }

    /// The mean top-1 probability of a branch over its generated steps.
    pub fn confidence(&self, branch: BranchId) -> Result<f64> {
        Ok(self.tree.get(branch)?.mean_confidence())
    }

    /// The layer after which a gate let the branch leave, if one did.
    pub fn exit_layer(&self, branch: BranchId) -> Result<Option<u32>> {
        Ok(self.tree.get(branch)?.exit_layer)
    }

    /// Where the KV blocks are. Looks at every table: not for inner loops.
    pub fn memory(&self) -> MemoryUse {
        let owners = self.shared_blocks();
        let shared = owners.values().filter(|&&n| n > 1).count();
        let used = self.pool.num_in_use();
        MemoryUse {
            shared,
            private: owners.len() - shared,
            cached: used.saturating_sub(owners.len()),
            freed: self.pool.num_freed(),
        }
    }

    /// The engine at a glance.
    pub fn engine_stats(&self) -> EngineStats {
        EngineStats {
            branches: self.tree.len(),
            blocks: self.pool.num_blocks(),
            blocks_used: self.pool.num_blocks() - self.pool.num_free(),
            blocks_peak: self.pool.peak_in_use(),
            blocks_cached: self.cache.len(),
            swapped_bytes: self.swap_used,
            ..self.totals.clone()
        }
    }

    /// Blocks that more than one branch holds, right now.
    pub fn num_shared_blocks(&self) -> usize {
        self.shared_blocks().into_values().filter(|&n| n > 1).count()
    }

    /// What was loaded, and where it runs.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Blocks, tables, cache and tree agree with each other: every block has as many owners as tables and cache entries
    /// hold it, nothing else is in use, and every branch has the rows it says. A description of the first disagreement
    /// otherwise.
    pub fn check_integrity(&self) -> Result<()> {
        self.pool.check_integrity()?;
        self.cache.check_integrity(&self.pool)?;
        for id in self.cache.blocks() {
            let state = self.pool.state(id)?;
            if state != BlockState::Exact {
                return Err(Error::Internal(format!("the prefix cache holds block {id}, which is {state:?}")));
            }
        }
        let mut owners = vec![0u32; self.pool.num_blocks()];
        let mut num_held = 0;
        for b in self.tree.iter() {
            b.table.check_integrity(&self.pool)?;
            if b.num_slots()
                != if b.fork_point.is_some() { 0 } else { b.slots_for(b.num_computed).unwrap_or(usize::MAX) }
            {
                let why = format!("branch {}: {} slots for {} computed tokens", b.id, b.num_slots(), b.num_computed);
                return Err(Error::Internal(why));
            }
        }
        let tables = || self.tree.iter().flat_map(|b| b.table.blocks().iter().copied().chain(b.table.copied_from()));
        for id in tables().chain(self.cache.blocks()) {
            if let Some(n) = owners.get_mut(id.index() as usize) {
                num_held += usize::from(*n == 0);
                *n += 1;
            }
        }
        for id in tables().chain(self.cache.blocks()) {
            let (count, expected) = (self.pool.ref_count(id)?, owners.get(id.index() as usize).copied());
            if Some(count) != expected {
                return Err(Error::Internal(format!("block {id} counts {count} owners and has {expected:?}")));
            }
        }
        if self.pool.num_in_use() != num_held {
            let why = format!("{} blocks are in use, {num_held} have an owner", self.pool.num_in_use());
            return Err(Error::Internal(why));
        }
        Ok(())
    }

    /// Number of tables that hold each block.
    fn shared_blocks(&self) -> HashMap<u32, usize> {
        let mut owners = HashMap::new();
        for b in self.tree.iter() {
            for id in b.table.blocks() {
                *owners.entry(id.index()).or_default() += 1;
            }
        }
        owners
    }
}

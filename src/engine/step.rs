//! One step: decide (pure) -> reserve (may refuse, nothing changed) -> run -> interpret (pure) -> commit.

use std::ops::Range;

use super::draft::push_draft_queries;
use super::{Engine, Event, EventKind, GeneratedToken, StepItem, StepSummary};
use crate::batch::BatchSeq;
use crate::error::{Error, Result};
use crate::kv::block_pool::{BlockId, BlockState};
use crate::kv::block_table::BlockTable;
use crate::model::{Draw, Fate, PassOutput, RowQuery};
use crate::sampler::DrawKey;
use crate::scheduler::{self, Budget, Candidate, Decision, PlanItem};
use crate::tree::{Branch, BranchId, EndReason, Mode, RowAnswer};

/// An item of the plan with what it holds until the step commits.
pub(super) struct Reserved {
    pub(super) branch: BranchId,
    pub(super) num_new_tokens: usize,
    /// Of those, tokens that the river is yet to propose.
    pub(super) drafts: usize,
    /// Its last token is one that the branch has generated, its newest.
    pub(super) decodes: bool,
    /// Slots its table had before.
    old_len: usize,
    /// Its table came into being in this step.
    is_new: bool,
    /// Index of its last row's query.
    pub(super) query: Option<usize>,
    /// Index of its first scoring query; they follow one another.
    score_queries: Range<usize>,
    /// Place of the first of them in the branch's scores.
    first_score: usize,
}

impl Engine {
    /// Runs one pass over every branch that has tokens to run, as far as the budget goes. An empty summary means that
    /// nobody had work. After an error every branch has the tokens, the row and the mode it had before the call, and the
    /// next step goes on as if nothing had happened. What was done to make room stays done: branches that gave way
    /// (each said so in an event) are recomputed later.
    pub fn step(&mut self) -> Result<StepSummary> {
        if self.cancel.is_raised() {
            return Err(Error::Cancelled);
        }
        self.cut_due()?;
        self.refresh_due()?;
        self.preempt_as_forced()?;
        self.materialise_behind_swapped()?;
        self.attach_cached_prefixes()?;
        self.dissolve_groups()?;
        let plan = loop {
            match self.decide()? {
                Decision::Run(plan) => break plan,
                Decision::Idle => return Ok(StepSummary::default()),
                Decision::Preempt(index) => self.preempt(index)?,
                Decision::Stuck(index) if self.dissolve_group_of(index)? => {}
                Decision::Stuck(index) => return Err(self.stuck(index)),
            }
        };
        let reserved = self.reserve(&plan)?;
        self.batch.measures_mass = self.measures_mass(&reserved)?;
        if let Err(error) = self.draft(&reserved).and_then(|()| self.trip(None)) {
            self.roll_back(reserved)?;
            return Err(error);
        }
        let batch = std::mem::take(&mut self.batch);
        let queries = std::mem::take(&mut self.queries);
        let branch_gates = self.branch_gates(&reserved)?;
        let river_gate = self.river_gate.clone();
        let mut gates = Self::pass_gates(&self.gates, &branch_gates, &reserved);
        gates.extend(self.decode_gate(river_gate.as_ref(), &reserved));
        let result = self.runner.run(&batch, &queries, &gates);
        self.batch = batch;
        self.queries = queries;
        match result {
            Ok(mut output) => {
                self.spend_gates(&branch_gates, &reserved, std::mem::take(&mut output.similarities))?;
                self.commit(reserved, output)
            }
            Err(error) => {
                self.roll_back(reserved)?;
                Err(error)
            }
        }
    }

    /// New roots start from the longest cached prefix of their tokens. A preempted branch looks only when it is let in
    /// again: until then it would hold blocks that others wait for.
    fn attach_cached_prefixes(&mut self) -> Result<()> {
        let is_new = |b: &Branch| b.preemptions == 0 && b.num_computed == 0 && b.is_runnable();
        let roots: Vec<BranchId> = self.tree.iter().filter(|b| is_new(b)).map(|b| b.id).collect();
        roots.into_iter().try_for_each(|id| self.attach_cached_prefix(id))
    }

    fn attach_cached_prefix(&mut self, id: BranchId) -> Result<()> {
        let b = self.tree.get_mut(id)?;
        let has_nothing = b.num_computed == 0 && b.table.is_empty() && b.fork_point.is_none() && b.swapped.is_none();
        let Some(salt) = b.salt.filter(|_| has_nothing) else { return Ok(()) };
        // The last token always runs: its row is what the caller waits for. What may be dropped must be the branch's own.
        let most = (b.tokens.len() - 1).min(b.limited.as_ref().map_or(usize::MAX, |l| l.num_permanent()));
        // The row before the first token to be scored is needed too.
        let most = most.min(b.score_from.map_or(usize::MAX, |from| from.saturating_sub(1)));
        let blocks = self.cache.lookup(salt, &b.tokens, most, &mut self.pool)?;
        let num_evicted = self.cache.num_evicted_blocks(salt, &b.tokens[..most], blocks.len());
        b.num_lost = b.num_lost.max((blocks.len() + num_evicted) * self.layout.block_size);
        b.num_cached_blocks = blocks.len();
        b.num_computed = blocks.len() * self.layout.block_size;
        b.num_found = b.num_computed;
        self.totals.tokens_from_cache += b.num_computed as u64;
        b.table = BlockTable::from_blocks(&self.pool, self.layout.block_size, &blocks)?;
        Ok(())
    }

    fn decide(&self) -> Result<Decision> {
        let mut runnable: Vec<&Branch> =
            self.tree.iter().filter(|b| b.is_runnable() && !self.waits_for_gate(b)).collect();
        runnable.sort_by_key(|b| b.arrival);
        let candidates: Vec<Candidate> = runnable.iter().map(|b| self.candidate(b)).collect::<Result<_>>()?;
        let block_size = self.layout.block_size;
        let wanted: usize =
            candidates.iter().map(|c| c.copy_blocks + c.growth_blocks + c.pending / block_size + 1).sum();
        // Counting what could be evicted walks the cache, and ranking branches walks their tables: only when it may matter.
        let is_tight = wanted > self.pool.num_free();
        let evictable = if is_tight { self.cache.num_evictable(&self.pool)? } else { 0 };
        let holders = if is_tight { self.holders()? } else { Vec::new() };
        let budget = Budget {
            max_tokens: self.config.max_batch_tokens,
            free_blocks: self.pool.num_free() + evictable,
            block_size,
        };
        Ok(scheduler::decide(&candidates, &holders, budget))
    }

    fn candidate(&self, b: &Branch) -> Result<Candidate> {
        let block_size = self.layout.block_size;
        let start = self.fork_start(b);
        let start_slots = self.start_slots(b, start);
        let (free_tail_slots, copy_blocks) = match (&b.fork_point, &b.swapped) {
            // A fork of what is not there yet will find a shared tail, and copy it.
            (Some(_), _) => match start_slots % block_size {
                0 => (0, 0),
                tail => (block_size - tail, 1),
            },
            (None, Some(swapped)) => {
                let blocks = swapped.num_slots.div_ceil(block_size);
                (blocks * block_size - swapped.num_slots, blocks)
            }
            (None, None) => {
                let free = (block_size - b.table.len() % block_size) % block_size;
                (free, usize::from(b.table.shared_tail(&self.pool)?.is_some()))
            }
        };
        let limit = match &b.mode {
            Mode::Generating(params) => {
                b.prompt_len.saturating_add(params.max_new_tokens).min(self.model.max_position_embeddings)
            }
            _ => b.tokens.len(),
        };
        let pending = b.tokens.len() - start;
        let num_slots = start_slots + pending;
        let growth = self.slots_behind(b, num_slots, limit.saturating_sub(b.tokens.len())) - num_slots;
        let has_begun = b.num_computed > b.num_found || b.limited.is_none();
        Ok(Candidate {
            branch: b.id.index as usize,
            pending,
            drafts: self.num_drafts(b),
            free_tail_slots,
            copy_blocks,
            after: b.fork_point.map(|f| (f.parent.index as usize, f.at)),
            computed: b.num_computed,
            needs_room_to_stay: (b.preemptions > 0 && b.table.is_empty()) || !has_begun,
            group: Self::group_of(b),
            growth_blocks: growth.div_ceil(block_size),
        })
    }

    /// Tokens a branch has, or will have from its parent, when its next step begins.
    pub(super) fn fork_start(&self, b: &Branch) -> usize {
        match b.fork_point.map(|f| (f, self.tree.get(f.parent))) {
            None => b.num_computed,
            Some((fork, Ok(parent))) if parent.is_runnable() || parent.fork_point.is_some() => fork.at,
            Some((fork, Ok(parent))) if parent.swapped.is_none() => {
                parent.whole_tokens(fork.at.min(parent.num_computed))
            }
            Some(_) => 0,
        }
    }

    /// Slots of its first `start` tokens, where its next step begins: its parent's, if it is yet to have them.
    pub(super) fn start_slots(&self, b: &Branch, start: usize) -> usize {
        let mut source = b;
        while let Some(parent) = source.fork_point.and_then(|f| self.tree.get(f.parent).ok()) {
            source = parent;
        }
        source.slots_for(start).unwrap_or(start)
    }

    /// Children that wait for a branch which was swapped out and has nothing to run take their copy of it now.
    fn materialise_behind_swapped(&mut self) -> Result<()> {
        let waits_in_vain = |b: &&Branch| {
            b.fork_point.is_some_and(|f| {
                let parent = self.tree.get(f.parent);
                parent.is_ok_and(|p| p.swapped.is_some() && !p.is_runnable())
            })
        };
        let waiting: Vec<BranchId> = self.tree.iter().filter(waits_in_vain).map(|b| b.id).collect();
        waiting.into_iter().try_for_each(|id| self.materialise(id))
    }

    fn stuck(&self, index: usize) -> Error {
        let block_size = self.layout.block_size;
        let needed = |b: &Branch| self.slots_once_run(b).div_ceil(block_size) + 1;
        let needed = self.tree.at(index).map_or(0, needed);
        let capacity = self.pool.num_blocks();
        let missing = needed.saturating_sub(self.pool.num_free()).max(1) as u64;
        Error::OutOfBlocks { needed, capacity, missing_bytes: missing * self.layout.block_bytes(self.model.num_layers) }
    }

    /// Takes the blocks of the whole plan, then lays out the batch. Nothing can fail after the blocks are taken but a
    /// bug, and then everything taken is given back.
    fn reserve(&mut self, plan: &[PlanItem]) -> Result<Vec<Reserved>> {
        let needed: usize = plan.iter().map(|i| i.num_blocks).sum();
        if needed > self.pool.num_free() {
            self.evict_cached(needed - self.pool.num_free())?;
        }
        let mut fresh = self.pool.try_take(needed).ok_or_else(|| {
            Error::Internal(format!("the plan needs {needed} blocks, {} are free", self.pool.num_free()))
        })?;
        self.clear_batch();
        let mut reserved = Vec::with_capacity(plan.len());
        for (i, item) in plan.iter().enumerate() {
            let outcome = self.trip(Some(i)).and_then(|()| self.reserve_item(item, &mut fresh, &mut reserved));
            if let Err(error) = outcome {
                self.give_back(fresh)?;
                self.roll_back(reserved)?;
                return Err(error);
            }
        }
        self.give_back(fresh)?;
        Ok(reserved)
    }

    /// The failure that [`fail_allocation`](Self::fail_allocation) asked for, if this is its place: before item `Some(i)`
    /// of the plan, or, `None`, before the pass.
    fn trip(&mut self, item: Option<usize>) -> Result<()> {
        match self.fault {
            Some(at) if item.is_none_or(|i| i == at) => {
                self.fault = None;
                Err(Error::OutOfMemory { what: "a step", bytes: self.layout.block_bytes(self.model.num_layers) })
            }
            _ => Ok(()),
        }
    }

    fn give_back(&mut self, blocks: Vec<BlockId>) -> Result<()> {
        self.pool.release_all(&blocks)
    }

    fn clear_batch(&mut self) {
        let batch = &mut self.batch;
        batch.token_ids.clear();
        batch.positions.clear();
        batch.slots.clear();
        batch.ring_rows.clear();
        batch.seqs.clear();
        batch.blocks.clear();
        batch.copies.clear();
        batch.measures_mass = false;
        self.queries.clear();
    }

    fn reserve_item(&mut self, item: &PlanItem, fresh: &mut Vec<BlockId>, reserved: &mut Vec<Reserved>) -> Result<()> {
        let Some(id) = self.tree.at(item.branch).map(|b| b.id) else {
            return Err(Error::Internal("the plan names a branch that is gone".into()));
        };
        let may_draft = self.num_drafts(self.tree.get(id)?) > 0;
        let fork_point = self.tree.get(id)?.fork_point;
        let is_new = fork_point.is_some();
        if let Some(fork) = fork_point {
            let planned = reserved.iter().find(|r| r.branch == fork.parent).map_or(0, |r| r.num_new_tokens);
            self.share_from_parent(id, planned)?;
        }
        self.swap_in(id, fresh)?;
        self.attach_cached_prefix(id)?;
        let b = self.tree.get_mut(id)?;
        let old_len = b.table.len();
        let first_row = self.batch.token_ids.len();
        let from = b.num_computed;
        let to = b.tokens.len().min(from + item.num_new_tokens);
        let drafts = if may_draft { item.num_new_tokens - (to - from) } else { 0 };
        let num_new_tokens = to - from + drafts;
        let appended = b.table.append(&mut self.pool, fresh, num_new_tokens)?;
        b.table.push_slots(appended.kv, &mut self.batch.slots);
        self.batch.copies.extend(appended.copy);
        self.batch.token_ids.extend_from_slice(&b.tokens[from..to]);
        self.batch.token_ids.extend(std::iter::repeat_n(0, drafts));
        self.batch.positions.extend((from..to + drafts).map(|p| p as u32));
        self.push_ring_rows(id, from, to)?;
        let b = self.tree.get(id)?;
        let first_block = self.batch.blocks.len();
        self.batch.blocks.extend_from_slice(b.table.indices());
        self.batch.seqs.push(BatchSeq {
            rows: first_row..first_row + num_new_tokens,
            blocks: first_block..self.batch.blocks.len(),
            kv_len: b.table.len(),
            accumulates_from: Self::accumulates_from(b, from, to),
        });
        let (score_queries, first_score) = push_score_queries(b, from, to, first_row, &mut self.queries);
        let newest = to == b.tokens.len();
        let query = newest.then_some(self.queries.len());
        if newest {
            let row = first_row + to - from - 1;
            self.queries.push(last_row_query(b, row));
            push_draft_queries(b, row, drafts, &mut self.queries);
        }
        let decodes = newest && drafts == 0 && b.num_generated > 0;
        reserved.push(Reserved {
            branch: id,
            num_new_tokens,
            drafts,
            decodes,
            old_len,
            is_new,
            query,
            score_queries,
            first_score,
        });
        Ok(())
    }

    /// Brings a swapped-out branch's blocks back.
    fn swap_in(&mut self, id: BranchId, fresh: &mut Vec<BlockId>) -> Result<()> {
        let b = self.tree.get_mut(id)?;
        let Some(swapped) = b.swapped.take() else { return Ok(()) };
        self.swap_used -= swapped.num_bytes();
        b.table.append(&mut self.pool, fresh, swapped.num_slots)?;
        // Cut back to where it is exact, it goes on as if it had never been anything else.
        if swapped.num_exact < swapped.num_slots {
            b.table.mark(&mut self.pool, swapped.num_exact, b.state)?;
        }
        b.table.commit(&mut self.pool)?;
        let mut taken = 0;
        for &block in b.table.indices() {
            taken += self.runner.write_block(block, &swapped.bytes[taken..])?;
        }
        self.swap_ring_in(id, &swapped.queries)
    }

    /// Undoes a reservation, last item first.
    fn roll_back(&mut self, reserved: Vec<Reserved>) -> Result<()> {
        for r in reserved.into_iter().rev() {
            let b = self.tree.get_mut(r.branch)?;
            b.table.rollback(&mut self.pool)?;
            if r.is_new && b.fork_point.is_some() {
                b.table.clear(&mut self.pool)?;
                b.num_computed = 0;
                b.num_cached_blocks = 0;
            }
        }
        Ok(())
    }

    /// Makes the step true: tokens computed, tokens generated, blocks offered to the cache, events.
    fn commit(&mut self, reserved: Vec<Reserved>, mut output: PassOutput) -> Result<StepSummary> {
        let mut summary = StepSummary {
            items: Vec::with_capacity(reserved.len()),
            layer_rows: output.layer_rows,
            slots_read: output.slots_read,
        };
        self.add_mass(&reserved, &output)?;
        self.add_slot_mass(&reserved, &output)?;
        self.totals.layer_rows += output.layer_rows;
        let leads = self.leads(&reserved, &output.fates);
        for (i, mut r) in reserved.into_iter().enumerate() {
            let num_tokens = r.num_new_tokens;
            r.num_new_tokens = self.standing_rows(&r, i, &output)?;
            let mut answer = r.query.and_then(|q| output.answers[q].take());
            if let (Some(answer), Some(layers)) = (&mut answer, output.layers.get_mut(i)) {
                answer.layers = std::mem::take(layers);
                answer.steps = std::mem::take(&mut output.steps[i]);
            }
            let is_decode = (r.decodes && num_tokens == 1) || r.drafts > 0;
            let num_layers = match output.fates[i] {
                Fate::Done | Fate::River { .. } | Fate::Mixed(_) => self.model.num_layers as u32,
                Fate::Dropped(layer) | Fate::Stopped(layer) | Fate::Aliased { layer, .. } => layer,
            };
            let left_early = (num_layers as usize) < self.model.num_layers;
            let backbone_layers = match output.fates[i] {
                Fate::River { layer, .. } => layer,
                _ => num_layers,
            };
            let item = StepItem { branch: r.branch, num_tokens, num_layers, backbone_layers, left_early, is_decode };
            summary.items.push(item);
            self.totals.tokens_computed += num_tokens as u64;
            self.totals.tokens_decoded += u64::from(r.decodes);
            self.totals.decode_layers += if r.decodes { u64::from(backbone_layers) } else { 0 };
            self.totals.drafts_kept += (r.num_new_tokens - 1).min(r.drafts) as u64;
            self.count_recomputed(&r)?;
            match output.fates[i] {
                Fate::Done => self.commit_kv(&r, 0, BlockState::Exact)?,
                Fate::River { first, .. } => self.commit_kv(&r, first, BlockState::River)?,
                Fate::Mixed(_) => self.commit_kv(&r, 0, BlockState::Aliased)?,
                Fate::Dropped(layer) | Fate::Stopped(layer) => {
                    self.commit_exit(r, layer, answer)?;
                    continue;
                }
                Fate::Aliased { .. } => {
                    self.tree.get_mut(r.branch)?.table.rollback(&mut self.pool)?;
                    continue;
                }
            }
            for (i, q) in r.score_queries.clone().enumerate() {
                if let Some(answer) = output.answers[q].take() {
                    self.commit_score(r.branch, r.first_score + i, answer)?;
                }
            }
            if let Some(answer) = answer {
                self.commit_answer(r.branch, answer)?;
            }
            for q in r.query.map_or(0..0, |q| q + 1..q + r.num_new_tokens.min(1 + r.drafts)) {
                if let Some(answer) = output.answers[q].take() {
                    self.commit_answer(r.branch, answer)?;
                }
            }
            self.offer_to_cache(r.branch)?;
        }
        for (branch, to, layer) in leads {
            self.alias(branch, to, layer)?;
        }
        self.materialise_ready()?;
        self.totals.steps += 1;
        debug_assert!(self.check_integrity().is_ok());
        Ok(summary)
    }

    /// Branches that gave way in this pass, to whom, after which layer.
    fn leads(&self, reserved: &[Reserved], fates: &[Fate]) -> Vec<(BranchId, BranchId, u32)> {
        let lead = |(r, fate): (&Reserved, &Fate)| match *fate {
            Fate::Aliased { layer, to } => Some((r.branch, reserved[to].branch, layer)),
            _ => None,
        };
        reserved.iter().zip(fates).filter_map(lead).collect()
    }

    /// The KV of the new tokens is valid, from row `first` on `written`. Its state is the weakest of all the row attended to.
    fn commit_kv(&mut self, r: &Reserved, first: usize, written: BlockState) -> Result<()> {
        let b = self.tree.get_mut(r.branch)?;
        b.table.mark(&mut self.pool, r.old_len + first, written)?;
        if let (Some(from), Some(&to)) =
            (b.table.copied_from(), b.table.blocks().get(r.old_len / self.layout.block_size))
        {
            self.evictor.mass.copy(from, to);
        }
        b.table.commit(&mut self.pool)?;
        if r.drafts > 0 {
            b.table.truncate(&mut self.pool, r.old_len + r.num_new_tokens)?;
        }
        b.num_computed += r.num_new_tokens;
        b.state = b.state.inherit(b.table.state());
        if let Some(fork) = b.fork_point.take() {
            // What its parent wrote in this very pass may have become weaker since it was shared.
            let parent = self.tree.get(fork.parent)?;
            let (state, rows, exact) = (parent.state, parent.table.state(), parent.table.exact_len());
            let b = self.tree.get_mut(r.branch)?;
            if exact < r.old_len {
                b.table.mark(&mut self.pool, exact, rows)?;
            }
            b.state = b.state.inherit(state);
        }
        Ok(())
    }

    /// A gate let the sequence leave: its new slots return, its answer (if any) stands.
    fn commit_exit(&mut self, r: Reserved, layer: u32, answer: Option<RowAnswer>) -> Result<()> {
        let branch = r.branch;
        let is_new = r.is_new;
        let b = self.tree.get_mut(branch)?;
        b.table.rollback(&mut self.pool)?;
        if is_new {
            b.fork_point = None;
        }
        b.exit_layer = Some(layer);
        let reason = if answer.is_some() { EndReason::Stopped } else { EndReason::Dropped };
        b.mode = Mode::Ended(reason);
        if answer.is_some() {
            b.last = answer;
        }
        self.events.push_back(Event { branch, kind: EventKind::Ended(reason) });
        Ok(())
    }

    /// A scoring row predicts the token behind it; `idx` is that token's place in the branch's scores.
    fn commit_score(&mut self, branch: BranchId, idx: usize, answer: RowAnswer) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        match (b.scores.get_mut(idx), answer.watched.first()) {
            (Some(score), Some(&logprob)) => {
                *score = logprob;
                b.predicted[idx] = Some(answer.stats.argmax);
            }
            // One event, however many rows are broken.
            _ if b.mode != Mode::Ended(EndReason::NonFinite) => {
                b.mode = Mode::Ended(EndReason::NonFinite);
                self.events.push_back(Event { branch, kind: EventKind::Ended(EndReason::NonFinite) });
            }
            _ => {}
        }
        Ok(())
    }

    /// Offers the branch's new full blocks to the prefix cache.
    fn offer_to_cache(&mut self, branch: BranchId) -> Result<()> {
        let b = self.tree.get_mut(branch)?;
        let full = b.table.cacheable_blocks();
        // What may be dropped must stay the branch's own.
        let most = b.limited.as_ref().map_or(usize::MAX, |l| l.num_permanent() / self.layout.block_size);
        let full = &full[..full.len().min(most)];
        let Some(salt) = b.salt.filter(|_| full.len() > b.num_cached_blocks) else { return Ok(()) };
        let tokens = &b.tokens[..full.len() * self.layout.block_size];
        self.cache.insert(salt, tokens, full, &mut self.pool)?;
        b.num_cached_blocks = full.len();
        Ok(())
    }

    /// The last row is there: the branch takes its token, or ends, or waits.
    fn commit_answer(&mut self, branch: BranchId, answer: RowAnswer) -> Result<()> {
        let max_positions = self.model.max_position_embeddings;
        let b = self.tree.get_mut(branch)?;
        let mut ended = None;
        let mut token = None;
        if b.mode == Mode::Ended(EndReason::NonFinite) {
            b.last = Some(answer);
            return Ok(());
        }
        if answer.stats.finite != 1 {
            ended = Some(EndReason::NonFinite);
        } else if let (Mode::Generating(params), Some(next)) = (&b.mode, answer.token) {
            b.confidence_sum += f64::from(answer.stats.top1);
            b.confidence_steps += 1;
            token = Some(GeneratedToken { token: next, logprob: answer.token_logprob, stats: answer.stats });
            if params.end_tokens.contains(&next) {
                ended = Some(EndReason::EndToken);
            } else {
                b.tokens.push(next);
                b.num_generated += 1;
                if b.num_generated >= params.max_new_tokens {
                    ended = Some(EndReason::Length);
                } else if b.tokens.len() >= max_positions {
                    ended = Some(EndReason::Context);
                }
            }
        }
        b.last = Some(answer);
        let mut kinds = vec![];
        match (token, ended) {
            (None, None) => kinds.push(EventKind::Ready),
            (token, ended) => {
                kinds.extend(token.map(EventKind::Token));
                if let Some(reason) = ended {
                    b.mode = Mode::Ended(reason);
                    kinds.push(EventKind::Ended(reason));
                }
            }
        }
        self.events.extend(kinds.into_iter().map(|kind| Event { branch, kind }));
        Ok(())
    }
}

/// Queries for the rows whose next token is to be scored (the row of token i predicts token i + 1), and the place of
/// the first in the branch's scores.
fn push_score_queries(
    b: &Branch,
    from: usize,
    to: usize,
    first_row: usize,
    queries: &mut Vec<RowQuery>,
) -> (Range<usize>, usize) {
    let start = queries.len();
    let Some(score_from) = b.score_from else { return (start..start, 0) };
    let first = (from + 1).max(score_from);
    for next in first..(to + 1).min(b.tokens.len()) {
        queries.push(RowQuery { row: first_row + next - 1 - from, watch: vec![b.tokens[next]], ..Default::default() });
    }
    (start..queries.len(), first - score_from)
}

/// What the last pending row is asked: a token if the branch generates, and whatever it watches.
pub(super) fn last_row_query(b: &Branch, row: usize) -> RowQuery {
    let draw = match &b.mode {
        Mode::Generating(params) => {
            let needs_history = !params.sampling.is_argmax();
            let history = |tokens: &[u32]| if needs_history { tokens.to_vec() } else { Vec::new() };
            Some(Draw {
                params: params.sampling.clone(),
                bias: params.bias(b.num_generated),
                prompt: history(&b.tokens[..b.prompt_len]),
                generated: history(&b.tokens[b.prompt_len..]),
                key: DrawKey { path: b.path, position: b.tokens.len() as u64 },
            })
        }
        _ => None,
    };
    RowQuery { row, draw, watch: b.watch.clone(), top_k: b.top_k }
}

//! The pure decision at the head of a step: which branches run how many tokens, who waits, who must give way.
//!
//! Candidates come in order of arrival, and that order is the priority for blocks: the oldest always proceeds, so a
//! cache that holds any one request finishes all of them. Tokens are a shared budget; branches with a single token to
//! run (decode) go first, long prompts take what is left in chunks.

/// A branch with tokens to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The branch's index in the tree.
    pub branch: usize,
    /// Tokens known and not computed.
    pub pending: usize,
    /// Tokens that may be proposed behind them and checked in the same pass, where there is room.
    pub drafts: usize,
    /// Slots left in its private tail block.
    pub free_tail_slots: usize,
    /// 1 when its tail block is shared and must be copied before it can grow.
    pub copy_blocks: usize,
    /// The branch whose KV it starts from, and how many tokens that branch must have by then.
    pub after: Option<(usize, usize)>,
    /// Tokens computed so far.
    pub computed: usize,
    /// It comes in only when it can stay: it gave up its blocks before, or its KV is limited and it has not begun, so that
    /// how much it will need is known.
    pub needs_room_to_stay: bool,
    /// Branches of one group run all their pending tokens in one pass, or none.
    pub group: Option<usize>,
    /// Blocks it may still ask for after this step, at most.
    pub growth_blocks: usize,
}

/// A branch that holds blocks and may be asked for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The branch's index in the tree.
    pub branch: usize,
    /// It has work to do; idle branches give way first.
    pub runnable: bool,
}

/// What the step has to divide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tokens in one pass.
    pub max_tokens: usize,
    /// Blocks that are free or can be evicted from the prefix cache.
    pub free_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
}

/// One branch's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanItem {
    /// The branch's index in the tree.
    pub branch: usize,
    /// Tokens to run now.
    pub num_new_tokens: usize,
    /// Blocks it takes.
    pub num_blocks: usize,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Run these, in this order (a branch stands behind the branch it starts from).
    Run(Vec<PlanItem>),
    /// Take this branch's blocks, then decide again.
    Preempt(usize),
    /// Nobody has work.
    Idle,
    /// The oldest branch cannot be helped by waiting or by preemption.
    Stuck(usize),
}

/// Decides. `candidates` are in order of arrival; `holders` are those who could give way, youngest first.
pub fn decide(candidates: &[Candidate], holders: &[Holder], budget: Budget) -> Decision {
    if candidates.is_empty() {
        return Decision::Idle;
    }
    let mut division = Division::new(candidates, holders, budget);
    for c in candidates {
        let verdict = match c.group {
            None => division.admit(c),
            Some(group) => division.admit_group(c, group),
        };
        match verdict {
            Verdict::Next => {}
            Verdict::NoBlocks if division.items.is_empty() => return division.take_from_others(c),
            Verdict::NoBlocks => break, // everyone else waits for the oldest
        }
    }
    if division.items.is_empty() { Decision::Stuck(candidates[0].branch) } else { Decision::Run(division.items) }
}

/// What has been given away so far, and what is left.
struct Division<'a> {
    candidates: &'a [Candidate],
    holders: &'a [Holder],
    block_size: usize,
    prefill_tokens: usize,
    decode_tokens: usize,
    free_blocks: usize,
    /// Blocks that those who run may still ask for.
    reserved_growth: usize,
    items: Vec<PlanItem>,
}

enum Verdict {
    /// It runs, or waits for something that is no block.
    Next,
    /// It could run if it had blocks.
    NoBlocks,
}

impl<'a> Division<'a> {
    fn new(candidates: &'a [Candidate], holders: &'a [Holder], budget: Budget) -> Self {
        let num_decodes = candidates.iter().filter(|c| c.pending == 1).count();
        let prefill_tokens = budget.max_tokens.saturating_sub(num_decodes);
        Self {
            candidates,
            holders,
            block_size: budget.block_size,
            prefill_tokens,
            decode_tokens: budget.max_tokens - prefill_tokens,
            free_blocks: budget.free_blocks,
            reserved_growth: 0,
            items: Vec::new(),
        }
    }

    /// Gives one branch as much as there is.
    fn admit(&mut self, c: &Candidate) -> Verdict {
        let tokens_left = if c.pending == 1 { self.decode_tokens } else { self.prefill_tokens };
        // A proposal takes what prompts leave: its branch goes on without.
        let wanted = c.pending.min(tokens_left) + if c.pending == 1 { c.drafts.min(self.prefill_tokens) } else { 0 };
        if wanted == 0 || self.waits_for_parent(c) {
            return Verdict::Next;
        }
        let needed = blocks_for(c, wanted, self.block_size);
        if c.needs_room_to_stay
            && !self.items.is_empty()
            && needed + c.growth_blocks + self.reserved_growth > self.free_blocks
        {
            return Verdict::Next;
        }
        let fitting = || tokens_that_fit(c, self.free_blocks, self.block_size).min(wanted);
        match if needed <= self.free_blocks { wanted } else { fitting() } {
            0 => return Verdict::NoBlocks,
            tokens => self.give(c, tokens),
        }
        Verdict::Next
    }

    /// Gives a whole group what it needs, when its first member comes up, or nothing.
    fn admit_group(&mut self, c: &Candidate, group: usize) -> Verdict {
        let members: Vec<&Candidate> = self.candidates.iter().filter(|o| o.group == Some(group)).collect();
        let is_first = members.first().is_some_and(|m| m.branch == c.branch);
        let tokens: usize = members.iter().map(|m| m.pending).sum();
        let room = self.prefill_tokens + members.iter().filter(|m| m.pending == 1).count();
        if !is_first || tokens > room || members.iter().any(|m| self.waits_for_parent(m)) {
            return Verdict::Next;
        }
        let blocks: usize = members.iter().map(|m| blocks_for(m, m.pending, self.block_size)).sum();
        if blocks > self.free_blocks {
            return Verdict::NoBlocks;
        }
        members.iter().for_each(|m| self.give(m, m.pending));
        Verdict::Next
    }

    /// The branch it starts from has not come far enough, this step's share included.
    fn waits_for_parent(&self, c: &Candidate) -> bool {
        let Some((parent, at)) = c.after else { return false };
        let planned = self.items.iter().find(|i| i.branch == parent).map_or(0, |i| i.num_new_tokens);
        let parent = self.candidates.iter().find(|o| o.branch == parent);
        parent.is_some_and(|p| p.computed + planned < at)
    }

    fn give(&mut self, c: &Candidate, tokens: usize) {
        let num_blocks = blocks_for(c, tokens, self.block_size);
        self.free_blocks -= num_blocks;
        self.reserved_growth += c.growth_blocks;
        let tokens_left = if c.pending == 1 { &mut self.decode_tokens } else { &mut self.prefill_tokens };
        *tokens_left -= tokens.min(c.pending);
        self.prefill_tokens -= tokens.saturating_sub(c.pending);
        self.items.push(PlanItem { branch: c.branch, num_new_tokens: tokens, num_blocks });
    }

    /// Only the oldest may take blocks from others, and never from its own group.
    fn take_from_others(&self, c: &Candidate) -> Decision {
        let is_own = |h: &Holder| {
            let group = self.candidates.iter().find(|o| o.branch == h.branch).and_then(|o| o.group);
            group.is_some() && group == c.group
        };
        let outsiders: Vec<Holder> = self.holders.iter().filter(|h| !is_own(h)).copied().collect();
        match victim(&outsiders, c.branch) {
            Some(branch) => Decision::Preempt(branch),
            None => Decision::Stuck(c.branch),
        }
    }
}

/// Idle branches first, then the youngest; never the branch that asks.
fn victim(holders: &[Holder], asking: usize) -> Option<usize> {
    let others = || holders.iter().filter(|h| h.branch != asking);
    others().find(|h| !h.runnable).or_else(|| others().next()).map(|h| h.branch)
}

fn blocks_for(c: &Candidate, tokens: usize, block_size: usize) -> usize {
    c.copy_blocks + tokens.saturating_sub(c.free_tail_slots).div_ceil(block_size)
}

fn tokens_that_fit(c: &Candidate, free: usize, block_size: usize) -> usize {
    if free < c.copy_blocks { 0 } else { c.free_tail_slots + (free - c.copy_blocks) * block_size }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(branch: usize, pending: usize) -> Candidate {
        Candidate {
            branch,
            pending,
            drafts: 0,
            free_tail_slots: 0,
            copy_blocks: 0,
            after: None,
            computed: 0,
            needs_room_to_stay: false,
            group: None,
            growth_blocks: 0,
        }
    }

    fn budget(max_tokens: usize, free_blocks: usize) -> Budget {
        Budget { max_tokens, free_blocks, block_size: 16 }
    }

    fn shares(d: &Decision) -> Vec<(usize, usize)> {
        match d {
            Decision::Run(items) => items.iter().map(|i| (i.branch, i.num_new_tokens)).collect(),
            other => panic!("expected a plan, got {other:?}"),
        }
    }

    #[test]
    fn decodes_run_beside_a_chunk_of_a_long_prompt() {
        let d = decide(&[candidate(0, 500), candidate(1, 1), candidate(2, 1)], &[], budget(100, 99));
        assert_eq!(shares(&d), [(0, 98), (1, 1), (2, 1)]);
    }

    #[test]
    fn a_fork_runs_in_the_pass_that_completes_its_parent_and_not_before() {
        let child = Candidate { after: Some((0, 60)), ..candidate(1, 5) };
        let d = decide(&[candidate(0, 60), child.clone()], &[], budget(100, 99));
        assert_eq!(shares(&d), [(0, 60), (1, 5)]);
        let d = decide(&[candidate(0, 60), child], &[], budget(40, 99));
        assert_eq!(shares(&d), [(0, 40)]);
    }

    #[test]
    fn a_fork_whose_parent_has_nothing_left_to_run_does_not_wait() {
        let child = Candidate { after: Some((7, 60)), ..candidate(1, 5) };
        assert_eq!(shares(&decide(&[child], &[], budget(100, 9))), [(1, 5)]);
    }

    #[test]
    fn the_oldest_takes_blocks_from_the_idle_then_from_the_youngest() {
        let holders = [Holder { branch: 5, runnable: true }, Holder { branch: 3, runnable: false }];
        assert_eq!(decide(&[candidate(0, 1), candidate(5, 1)], &holders, budget(8, 0)), Decision::Preempt(3));
        assert_eq!(decide(&[candidate(0, 1), candidate(5, 1)], &holders[..1], budget(8, 0)), Decision::Preempt(5));
        assert_eq!(decide(&[candidate(0, 1)], &[], budget(8, 0)), Decision::Stuck(0));
    }

    #[test]
    fn younger_branches_wait_instead_of_preempting() {
        let d = decide(&[candidate(0, 1), candidate(1, 40)], &[Holder { branch: 0, runnable: true }], budget(99, 1));
        assert_eq!(shares(&d), [(0, 1)]);
    }

    #[test]
    fn a_group_runs_whole_or_not_at_all() {
        let member = |branch, pending| Candidate { group: Some(7), ..candidate(branch, pending) };
        let (a, b) = (member(1, 40), member(2, 50));
        assert_eq!(shares(&decide(&[a.clone(), b.clone()], &[], budget(90, 9))), [(1, 40), (2, 50)]);
        // Too many tokens beside an older prompt: the group waits, a younger one does not.
        let d = decide(&[candidate(0, 20), a.clone(), b.clone(), candidate(3, 9)], &[], budget(90, 99));
        assert_eq!(shares(&d), [(0, 20), (3, 9)]);
        // Too few blocks: it takes them from outsiders only.
        let holders = [Holder { branch: 2, runnable: true }, Holder { branch: 5, runnable: true }];
        assert_eq!(decide(&[a.clone(), b.clone()], &holders, budget(90, 6)), Decision::Preempt(5));
        assert_eq!(decide(&[a.clone(), b.clone()], &holders[..1], budget(90, 6)), Decision::Stuck(1));
        // A member that waits for its parent keeps the others waiting.
        let waiting = Candidate { after: Some((0, 60)), ..b };
        assert_eq!(shares(&decide(&[candidate(0, 60), a, waiting], &[], budget(40, 99))), [(0, 40)]);
    }

    #[test]
    fn proposals_take_what_prompts_leave_and_their_branches_go_on_without() {
        let drafting = |branch| Candidate { drafts: 4, free_tail_slots: 8, ..candidate(branch, 1) };
        let plan = |all: &[Candidate], tokens| shares(&decide(all, &[], budget(tokens, 9)));
        assert_eq!(plan(&[drafting(0), drafting(1)], 99), [(0, 5), (1, 5)]);
        assert_eq!(plan(&[drafting(0), drafting(1)], 7), [(0, 5), (1, 2)]);
        assert_eq!(plan(&[candidate(0, 100), drafting(1), drafting(2)], 50), [(0, 48), (1, 1), (2, 1)]);
        assert_eq!(plan(&[drafting(0), candidate(1, 100)], 50), [(0, 5), (1, 45)]);
        // Room for one token more in its block, and no block.
        let tight = Candidate { free_tail_slots: 2, ..drafting(0) };
        assert_eq!(shares(&decide(&[tight], &[], budget(50, 0))), [(0, 2)]);
    }

    #[test]
    fn a_prompt_takes_the_blocks_there_are() {
        assert_eq!(shares(&decide(&[candidate(0, 100)], &[], budget(200, 3))), [(0, 48)]);
    }

    #[test]
    fn a_preempted_branch_returns_only_when_it_can_stay() {
        let back = Candidate { needs_room_to_stay: true, growth_blocks: 3, ..candidate(1, 16) };
        let busy = Candidate { growth_blocks: 2, ..candidate(0, 1) };
        assert_eq!(shares(&decide(&[busy.clone(), back.clone()], &[], budget(99, 6))), [(0, 1)]);
        assert_eq!(shares(&decide(&[busy, back.clone()], &[], budget(99, 7))), [(0, 1), (1, 16)]);
        assert_eq!(shares(&decide(&[back], &[], budget(99, 1))), [(1, 16)]);
    }
}

//! Drafts: the river proposes tokens one by one, the backbone runs them all in one pass and keeps those it chooses itself.
//!
//! ```text
//! slots:     | committed | newest | draft 1 | draft 2 | draft 3 |      reserved together, once
//! river:                  -> d1     -> d2     -> d3                    one pass each; K and V are overwritten below
//! backbone:               -> t1     -> t2     -> t3     -> t4          one pass; row i stands while t(1..i) = d(1..i)
//! ```
//!
//! A token is chosen by the backbone's row and the key of its position, whoever proposed it: the branch generates what it
//! would have generated without drafts, also when it samples.

use super::Engine;
use super::step::{Reserved, last_row_query};
use crate::batch::{Batch, BatchSeq};
use crate::error::{Error, Result};
use crate::gate::GateSpec;
use crate::model::{PassGate, PassOutput, RowQuery};
use crate::tree::{Branch, Mode};

impl Engine {
    /// Tokens to propose for a branch in its next step: none unless it does nothing but generate.
    pub(super) fn num_drafts(&self, b: &Branch) -> usize {
        let (Some(most), Mode::Generating(params)) = (self.num_proposed(), &b.mode) else { return 0 };
        let is_steady = b.pending() == 1 && b.fork_point.is_none() && b.swapped.is_none();
        let is_watched = b.gate.is_some() || b.score_from.is_some() || !self.gates.is_empty();
        if !is_steady || is_watched || b.limited.is_some() {
            return 0;
        }
        let end = b.prompt_len.saturating_add(params.max_new_tokens).min(self.model.max_position_embeddings);
        // The pass yields a token more than were proposed.
        most.min(end.saturating_sub(b.tokens.len() + 1))
    }

    /// Fills in the proposals that the reserved pass has room for.
    pub(super) fn draft(&mut self, reserved: &[Reserved]) -> Result<()> {
        let most = reserved.iter().map(|r| r.drafts).max().unwrap_or(0);
        let Some(gate) = self.river_gate.clone().filter(|_| most > 0) else { return Ok(()) };
        for i in 0..most {
            let drafting: Vec<usize> = (0..reserved.len()).filter(|&seq| reserved[seq].drafts > i).collect();
            let (batch, queries) = self.draft_pass(reserved, &drafting, i);
            let output = self.run_draft(&batch, &queries, &gate)?;
            for (&seq, answer) in drafting.iter().zip(output.answers) {
                // Without a token the place keeps what it has, which stands or falls like any other proposal.
                if let Some(token) = answer.and_then(|a| a.token) {
                    self.propose(&reserved[seq], seq, i, token);
                }
            }
        }
        Ok(())
    }

    fn run_draft(&mut self, batch: &Batch, queries: &[RowQuery], spec: &GateSpec) -> Result<PassOutput> {
        let seqs = (0..batch.seqs.len()).collect();
        if self.cancel.is_raised() {
            return Err(Error::Cancelled);
        }
        self.totals.tokens_drafted += batch.seqs.len() as u64;
        let output =
            self.runner.run(batch, queries, &[PassGate { spec, seqs, keys: Vec::new(), newest_alone: true }])?;
        self.totals.layer_rows += output.layer_rows;
        Ok(output)
    }

    /// Row `i` of each drafting sequence of the pass, as a pass of its own.
    fn draft_pass(&self, reserved: &[Reserved], drafting: &[usize], i: usize) -> (Batch, Vec<RowQuery>) {
        let (mut batch, mut queries) = (Batch::default(), Vec::new());
        for &seq in drafting {
            let whole = &self.batch.seqs[seq];
            let (from, row) = (whole.rows.start + i, batch.token_ids.len());
            let first_block = batch.blocks.len();
            batch.token_ids.push(self.batch.token_ids[from]);
            batch.positions.push(self.batch.positions[from]);
            batch.slots.push(self.batch.slots[from]);
            batch.blocks.extend_from_slice(&self.batch.blocks[whole.blocks.clone()]);
            batch.seqs.push(BatchSeq {
                rows: row..row + 1,
                blocks: first_block..batch.blocks.len(),
                kv_len: whole.kv_len - (whole.rows.end - from - 1),
                accumulates_from: None,
            });
            let query = reserved[seq].query.and_then(|q| self.queries.get(q + i));
            queries.push(RowQuery { row, draw: query.and_then(|q| q.draw.clone()), ..Default::default() });
        }
        // The first pass finds what it attends to in the blocks that the append will copy to; the copies are done again.
        if i == 0 {
            batch.copies = self.batch.copies.clone();
        }
        (batch, queries)
    }

    /// The token behind row `i` of a sequence.
    fn propose(&mut self, r: &Reserved, seq: usize, i: usize, token: u32) {
        let at = self.batch.seqs[seq].rows.start + i + 1;
        self.batch.token_ids[at] = token;
        let Some(first) = r.query else { return };
        for query in self.queries.iter_mut().skip(first + i + 1).take(r.drafts - i) {
            if let Some(draw) = query.draw.as_mut().filter(|d| !d.params.is_argmax()) {
                draw.generated.push(token);
            }
        }
    }

    /// Rows of a sequence that stand: its newest token's, and each draft's that the row before it chose too.
    pub(super) fn standing_rows(&self, r: &Reserved, seq: usize, output: &PassOutput) -> Result<usize> {
        let (Some(first), Mode::Generating(params), 1..) = (r.query, &self.tree.get(r.branch)?.mode, r.drafts) else {
            return Ok(r.num_new_tokens);
        };
        let drafts = &self.batch.token_ids[self.batch.seqs[seq].rows.clone()][1..];
        let agrees = |(i, draft): (usize, &u32)| {
            let answer = output.answers.get(first + i).and_then(Option::as_ref);
            answer.is_some_and(|a| a.stats.finite == 1 && a.token == Some(*draft))
        };
        let goes_on = |draft: &&u32| !params.end_tokens.contains(draft);
        Ok(1 + drafts.iter().take_while(goes_on).enumerate().take_while(|&d| agrees(d)).count())
    }
}

/// Queries for the rows of a branch's drafts, behind the one of its newest token.
pub(super) fn push_draft_queries(b: &Branch, first_row: usize, drafts: usize, queries: &mut Vec<RowQuery>) {
    let Mode::Generating(params) = &b.mode else { return };
    for i in 1..=drafts {
        let mut query = last_row_query(b, first_row + i);
        if let Some(draw) = &mut query.draw {
            draw.key.position += i as u64;
            if b.num_generated + i >= params.min_new_tokens {
                draw.bias.clone_from(&params.sampling.logit_bias);
            }
        }
        queries.push(query);
    }
}

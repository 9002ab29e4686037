//! Where the queries are answered: final norm, unembedding, row statistics and draws of the chosen rows, one read-back
//! a chunk when nothing but the most likely token is asked for.

use super::gating::Exit;
use super::{Draw, Model, Pass, RowQuery, Workspace};
use crate::backend::{
    AddRmsNorm, Backend, GatherRows, Linear, NormOutput, RowIds, RowStats, RowStatsOp, Sample, SampleRow, Sampled,
    Softcap,
};
use crate::error::Result;
use crate::sampler;
use crate::tree::RowAnswer;

impl<B: Backend> Model<B> {
    /// Answers every query whose row survived, chunk by chunk.
    pub(super) fn answer(&mut self, queries: &[RowQuery], pass: &mut Pass<B>) -> Result<()> {
        let ids = std::mem::take(&mut pass.query_ids);
        let mut from = 0;
        while from < ids.len() {
            let to = (from + self.ws.chunk).min(ids.len());
            self.backend.gather_rows(GatherRows {
                rows: RowIds::Queried(&pass.inputs, from..to),
                src: &self.ws.x,
                dst: &mut self.ws.out_x,
                dst_row: 0,
                width: self.config.hidden,
            })?;
            self.unembed(to - from)?;
            if to == ids.len() {
                self.backend.end_pass()?;
            }
            self.interpret(queries, &ids[from..to], &mut pass.answers)?;
            from = to;
        }
        if ids.is_empty() {
            self.backend.end_pass()?;
        }
        for exit in std::mem::take(&mut pass.exits) {
            self.answer_exit(queries, &exit, &mut pass.answers)?;
        }
        Ok(())
    }

    /// Answers the queries of a sequence that stopped between two layers.
    fn answer_exit(&mut self, queries: &[RowQuery], exit: &Exit<B>, answers: &mut [Option<RowAnswer>]) -> Result<()> {
        for (i, chunk) in exit.query_ids.chunks(self.ws.chunk).enumerate() {
            let rows: Vec<u32> = (0..chunk.len()).map(|r| (i * self.ws.chunk + r) as u32).collect();
            self.backend.gather_rows(GatherRows {
                rows: RowIds::Given(&rows),
                src: &exit.rows,
                dst: &mut self.ws.out_x,
                dst_row: 0,
                width: self.config.hidden,
            })?;
            if exit.raw {
                self.unembed_raw(chunk.len())?
            } else {
                self.unembed(chunk.len())?
            }
            self.interpret(queries, chunk, answers)?;
        }
        Ok(())
    }

    /// Final norm, logits and statistics of the first rows of `out_x`.
    fn unembed(&mut self, num_rows: usize) -> Result<()> {
        let Self { backend, config, ws, .. } = self;
        Self::norm_rows(backend, ws, num_rows, &self.final_norm, config.hidden, config.rms_norm_eps)?;
        self.logits(num_rows)
    }

    /// The same without the norm: with an `eps` in which the mean square is lost, the norm divides every row by
    /// sqrt(eps), and the weight multiplies it back.
    fn unembed_raw(&mut self, num_rows: usize) -> Result<()> {
        const SQRT_EPS: f32 = 1e6;
        let Self { backend, config, ws, .. } = self;
        let weight = match self.no_norm.take() {
            Some(weight) => weight,
            None => backend.upload(&vec![SQRT_EPS; config.hidden])?,
        };
        let normed = Self::norm_rows(backend, ws, num_rows, &weight, config.hidden, SQRT_EPS * SQRT_EPS);
        self.no_norm = Some(weight);
        normed?;
        self.logits(num_rows)
    }

    fn norm_rows(
        backend: &mut B,
        ws: &mut Workspace<B>,
        num_rows: usize,
        weight: &B::Buf,
        hidden: usize,
        eps: f32,
    ) -> Result<()> {
        backend.add_rms_norm(AddRmsNorm {
            rows: 0..num_rows,
            x: &mut ws.out_x,
            delta: None,
            post_norm: None,
            output: NormOutput::Normed(weight),
            y: &mut ws.out_h,
            keep: None,
            step_similarity: None,
            hidden,
            eps,
        })
    }

    fn logits(&mut self, num_rows: usize) -> Result<()> {
        let Self { backend, config, ws, .. } = self;
        let w = self.lm_head.as_ref().unwrap_or(&self.embed);
        backend.linear(Linear { rows: 0..num_rows, x: &ws.out_h, w, river: None, bias: None, y: &mut ws.logits })?;
        if let Some(cap) = config.logit_softcap {
            backend.softcap(Softcap { logits: &mut ws.logits, num_rows, vocab: config.vocab_size, cap })?;
        }
        backend.row_stats(RowStatsOp { logits: &ws.logits, num_rows, vocab: config.vocab_size })
    }

    /// Reads what the logits say: query `ids[i]` is answered from row i.
    fn interpret(&mut self, queries: &[RowQuery], ids: &[usize], answers: &mut [Option<RowAnswer>]) -> Result<()> {
        self.ws.stats.resize(ids.len(), RowStats::default());
        self.backend.read_stats(&mut self.ws.stats)?;
        let mut watched = self.read_watched(queries, ids)?.into_iter();
        for (row, &id) in ids.iter().enumerate() {
            let (query, stats) = (&queries[id], self.ws.stats[row]);
            let mut answer = RowAnswer { stats, ..Default::default() };
            let logits = watched.by_ref().take(query.watch.len());
            if stats.finite == 1 {
                answer.watched = logits.map(|x| x - stats.lse).collect();
                answer.top = self.read_top(row, query.top_k)?.into_iter().map(|(t, x)| (t, x - stats.lse)).collect();
            } else {
                logits.for_each(drop);
            }
            answers[id] = Some(answer);
        }
        self.draw(queries, ids)?;
        for (row, &id) in ids.iter().enumerate() {
            let (stats, sampled) = (self.ws.stats[row], self.ws.sampled[row]);
            if let (Some(answer), Some(_), 1) = (&mut answers[id], &queries[id].draw, stats.finite) {
                answer.token = Some(sampled.token);
                answer.token_logprob = sampled.logit - stats.lse;
            }
        }
        Ok(())
    }

    /// Logits of every watched token, row by row; minus infinity for ids past the vocabulary.
    fn read_watched(&mut self, queries: &[RowQuery], ids: &[usize]) -> Result<Vec<f32>> {
        let vocab = self.config.vocab_size;
        let watch = |&(row, &id): &(usize, &usize)| queries[id].watch.iter().map(move |&t| (row, t as usize));
        let tokens = || ids.iter().enumerate().flat_map(|x| watch(&x));
        let at: Vec<u32> = tokens().map(|(row, t)| (row * vocab + t.min(vocab - 1)) as u32).collect();
        let mut logits = vec![0.0; at.len()];
        let width = self.ws.watched_len;
        for (at, logits) in at.chunks(width).zip(logits.chunks_mut(width)) {
            self.backend.gather_rows(GatherRows {
                rows: RowIds::Given(at),
                src: &self.ws.logits,
                dst: &mut self.ws.watched,
                dst_row: 0,
                width: 1,
            })?;
            self.backend.read_f32(&self.ws.watched, 0, logits)?;
        }
        for ((_, token), x) in tokens().zip(&mut logits) {
            if token >= vocab {
                *x = f32::NEG_INFINITY;
            }
        }
        Ok(logits)
    }

    fn read_top(&mut self, row: usize, k: usize) -> Result<Vec<(u32, f32)>> {
        if k == 0 {
            return Ok(Vec::new());
        }
        let vocab = self.config.vocab_size;
        self.ws.row.resize(vocab, 0.0);
        self.backend.read_f32(&self.ws.logits, row * vocab, &mut self.ws.row)?;
        Ok(sampler::top_k(&self.ws.row, k))
    }

    /// Chooses the token of every row, into `sampled`. Rows that take the most likely one need no draw; when all do,
    /// nothing is launched.
    fn draw(&mut self, queries: &[RowQuery], ids: &[usize]) -> Result<()> {
        let Self { backend, config, ws, .. } = self;
        ws.sampled.clear();
        ws.sampled.extend(ws.stats.iter().map(|s| Sampled { token: s.argmax, logit: s.max }));
        let needs_draw = |(&id, s): (&usize, &RowStats)| {
            let draw = queries[id].draw.as_ref();
            draw.is_some_and(|d| !d.params.is_argmax() || d.bias.iter().any(|(token, _)| *token == s.argmax))
        };
        if !ids.iter().zip(&ws.stats).any(needs_draw) {
            return Ok(());
        }
        let greedy = Draw::default();
        let row = |&id: &usize| {
            let d = queries[id].draw.as_ref().unwrap_or(&greedy);
            SampleRow { params: &d.params, bias: &d.bias, prompt: &d.prompt, generated: &d.generated, key: d.key }
        };
        let rows: Vec<SampleRow<'_>> = ids.iter().map(row).collect();
        let (logits, sampled) = (&mut ws.logits, &mut ws.sampled);
        backend.sample(Sample { logits, vocab: config.vocab_size, rows: &rows, sampled })
    }
}

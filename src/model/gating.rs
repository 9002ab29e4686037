//! Gates at work inside a pass: look at the rows in flight after a probed layer, decide, and cut.
//!
//! ```text
//! layer l - probe: last rows -> statistic -> rule --nothing fired--> layer l + 1
//!                                              \--fired: rows that go on are packed, the others leave
//! ```

use std::ops::Range;

use super::live::Thinned;
use super::{Asked, Fate, LayerRow, LayerStep, Model, Pass, RowQuery, river};
use crate::backend::{Backend, BranchSimilarity, EntropyProbe, GatherRows, RowIds, RowStats, Similarity};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gate::{self, Effect, GateSpec, Over, ProbeNorm, Rule, Seen, Statistic, asks};
use crate::kv::SlotTransfer;

/// A gate and the sequences of the batch it is set on.
pub(crate) struct PassGate<'a> {
    pub(crate) spec: &'a GateSpec,
    /// Indices in the batch, in the order of the gate's members; the first is the root of their comparison.
    pub(crate) seqs: Vec<usize>,
    /// One a member: members of different keys never become one. Empty: all may.
    pub(crate) keys: Vec<u64>,
    /// Of a member its last row alone leaves the backbone, not all its rows with it.
    pub(crate) newest_alone: bool,
}

/// What one gate has seen in this pass.
pub(super) struct Watch<B: Backend> {
    /// Values of the statistic, one list a member.
    seen: Vec<Vec<f32>>,
    /// Residual rows on their way to one reading of the unembedding, and whose they are: (layer, members).
    stack: Option<B::Buf>,
    stacked: Vec<(u32, Vec<usize>)>,
    /// Members' states `[layers, members, hidden]` and the root's `[layers, hidden]`.
    states: Option<(B::Buf, B::Buf)>,
    pub(super) similarity: Option<Similarity>,
}

impl<B: Backend> Watch<B> {
    pub(super) fn new(gate: &PassGate<'_>) -> Self {
        Self {
            seen: vec![Vec::new(); gate.seqs.len()],
            stack: None,
            stacked: Vec::new(),
            states: None,
            similarity: None,
        }
    }
}

/// What leaves at a cut: live sequences in ascending order, and what they stand back for.
struct Leaving {
    live: Vec<usize>,
    /// Batch sequence that each gives way to; empty unless the effect is [`Effect::Alias`].
    to: Vec<usize>,
}

impl<B: Backend> Model<B> {
    /// Lets every gate that probes after layer `after` look, and decide.
    pub(super) fn probe_all(&mut self, asked: Asked<'_>, after: u32, pass: &mut Pass<B>) -> Result<()> {
        let gates = asked.gates;
        // Gates that send rows to the second weight set are the device's.
        let looks = |g: &PassGate<'_>| g.spec.effect != Effect::River && g.spec.layers.contains(&after);
        if !gates.iter().any(looks) {
            return Ok(());
        }
        // The addition happens once, whoever looks first.
        self.flush_delta(pass, river::compares(gates, after).then_some(after))?;
        let mut watches = std::mem::take(&mut pass.watches);
        for (gate, watch) in gates.iter().zip(&mut watches) {
            if looks(gate) {
                let leaving = self.probe(gate, watch, after, asked.queries, pass)?;
                if leaving.live.is_empty() {
                    continue;
                }
                self.cut(gate.spec, &leaving, after, asked, pass)?;
            }
        }
        pass.watches = watches;
        Ok(())
    }

    fn probe(
        &mut self,
        gate: &PassGate<'_>,
        watch: &mut Watch<B>,
        after: u32,
        queries: &[RowQuery],
        pass: &mut Pass<B>,
    ) -> Result<Leaving> {
        // (member, live sequence), in member order.
        let members: Vec<(usize, usize)> = gate
            .seqs
            .iter()
            .enumerate()
            .filter_map(|(m, &seq)| Some((m, pass.live.eligible(seq, gate.spec.effect)?)))
            .collect();
        match gate.spec.statistic {
            Statistic::RowIndex => Ok(self.decide(gate, watch, &members, pass)),
            Statistic::StepSimilarity { .. } => {
                let similarity = self.read_similarity(pass)?;
                for &(m, live) in &members {
                    let similarity = similarity[pass.live.last_row(live)];
                    watch.seen[m].push(similarity);
                    pass.steps[gate.seqs[m]].push(LayerStep { layer: after, similarity });
                }
                Ok(self.decide(gate, watch, &members, pass))
            }
            Statistic::Entropy { over, norm, stacked } => {
                self.stack_rows(watch, &members, stacked, after, pass)?;
                let is_last = gate.spec.layers.last() == Some(&after);
                if watch.stacked.len() < stacked as usize && !is_last {
                    return Ok(Leaving { live: Vec::new(), to: Vec::new() });
                }
                self.read_entropies(gate, watch, over, norm, queries, pass)
            }
            Statistic::BranchSimilarity { alpha } => self.compare(gate, watch, &members, alpha, after, pass),
        }
    }

    /// Of each live row, after the layer that is being probed.
    fn read_similarity(&mut self, pass: &Pass<B>) -> Result<Vec<f32>> {
        let mut similarity = vec![f32::NAN; pass.live.num_rows()];
        if let Some(routes) = &self.routes {
            self.backend.read_f32(&routes.similarity, 0, &mut similarity)?;
        }
        Ok(similarity)
    }

    fn decide(&self, gate: &PassGate<'_>, watch: &Watch<B>, members: &[(usize, usize)], pass: &Pass<B>) -> Leaving {
        let seen = |&(m, live): &(usize, usize)| {
            let row = pass.live.last_row(live) as u32;
            Seen { row, values: &watch.seen[m] }
        };
        let seen: Vec<Seen<'_>> = members.iter().map(seen).collect();
        let fired = gate.spec.decide(&seen);
        let mut live: Vec<usize> = members.iter().zip(fired).filter(|(_, fired)| *fired).map(|(m, _)| m.1).collect();
        live.sort_unstable();
        Leaving { live, to: Vec::new() }
    }

    /// Puts the members' last rows behind those of the layers before.
    fn stack_rows(
        &mut self,
        watch: &mut Watch<B>,
        members: &[(usize, usize)],
        stacked: u32,
        after: u32,
        pass: &Pass<B>,
    ) -> Result<()> {
        let hidden = self.config.hidden;
        let rows: Vec<u32> = members.iter().map(|&(_, live)| pass.live.last_row(live) as u32).collect();
        let dst_row = watch.stacked.iter().map(|(_, members)| members.len()).sum();
        let mut stack = match watch.stack.take() {
            Some(stack) => stack,
            None => self.backend.alloc(DType::F32, watch.seen.len() * stacked as usize * hidden)?,
        };
        let rows = RowIds::Given(&rows);
        self.backend.gather_rows(GatherRows { rows, src: &self.ws.x, dst: &mut stack, dst_row, width: hidden })?;
        watch.stack = Some(stack);
        watch.stacked.push((after, members.iter().map(|m| m.0).collect()));
        Ok(())
    }

    /// Reads the entropies of all stacked rows at once, and decides layer by layer; whoever fires in any of them leaves
    /// now.
    fn read_entropies(
        &mut self,
        gate: &PassGate<'_>,
        watch: &mut Watch<B>,
        over: Over,
        norm: ProbeNorm,
        queries: &[RowQuery],
        pass: &mut Pass<B>,
    ) -> Result<Leaving> {
        let candidates = match over {
            Over::Vocabulary => None,
            Over::Watched => Some(self.watched_tokens(gate, queries, pass)?),
        };
        let num_rows = watch.stacked.iter().map(|(_, members)| members.len()).sum();
        let Some(stack) = watch.stack.as_ref().filter(|_| num_rows > 0) else {
            return Ok(Leaving { live: Vec::new(), to: Vec::new() });
        };
        self.backend.entropy_probe(EntropyProbe {
            x: stack,
            num_rows,
            norm: (norm == ProbeNorm::Final).then_some(&self.final_norm),
            eps: self.config.rms_norm_eps,
            w: self.lm_head.as_ref().unwrap_or(&self.embed),
            candidates: candidates.as_deref(),
            hidden: self.config.hidden,
        })?;
        let mut stats = vec![RowStats::default(); num_rows];
        self.backend.read_stats(&mut stats)?;
        let mut stats = stats.into_iter();
        let mut leaving = Leaving { live: Vec::new(), to: Vec::new() };
        for (layer, members) in std::mem::take(&mut watch.stacked) {
            for (&m, stats) in members.iter().zip(&mut stats) {
                watch.seen[m].push(if stats.finite == 1 { stats.entropy } else { f32::NAN });
                pass.layers[gate.seqs[m]].push(LayerRow { layer, stats });
            }
            let live = |&m: &usize| Some((m, pass.live.eligible(gate.seqs[m], gate.spec.effect)?));
            let members: Vec<(usize, usize)> = members.iter().filter_map(live).collect();
            leaving.live.extend(self.decide(gate, watch, &members, pass).live);
        }
        leaving.live.sort_unstable();
        leaving.live.dedup();
        if gate.spec.effect == Effect::Observe {
            leaving.live.clear();
        }
        Ok(leaving)
    }

    /// The tokens that the members' last rows watch, ascending.
    fn watched_tokens(&self, gate: &PassGate<'_>, queries: &[RowQuery], pass: &Pass<B>) -> Result<Vec<u32>> {
        let is_member = |q: &&RowQuery| gate.seqs.iter().any(|&seq| pass.live.batch_last_row(seq) == Some(q.row));
        let mut tokens: Vec<u32> = queries.iter().filter(is_member).flat_map(|q| q.watch.iter().copied()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        match tokens.is_empty() {
            true => Err(Error::config("gate", "over: an entropy over watched tokens needs a branch that watches some")),
            false => Ok(tokens),
        }
    }

    /// Takes the members' states after this layer; after the last probed one, compares them and forms clusters.
    fn compare(
        &mut self,
        gate: &PassGate<'_>,
        watch: &mut Watch<B>,
        members: &[(usize, usize)],
        alpha: f32,
        after: u32,
        pass: &mut Pass<B>,
    ) -> Result<Leaving> {
        let nobody = Leaving { live: Vec::new(), to: Vec::new() };
        let (hidden, num_members, layers) = (self.config.hidden, gate.seqs.len(), &gate.spec.layers);
        if num_members < 2 || members.len() < num_members {
            return Ok(nobody); // alone, or another gate has taken a member away: nothing can be compared
        }
        let nth = layers.iter().position(|&l| l == after).unwrap_or(0);
        let (mut states, mut root) = match watch.states.take() {
            Some(states) => states,
            None => (
                self.backend.alloc(DType::F32, layers.len() * num_members * hidden)?,
                self.backend.alloc(DType::F32, layers.len() * hidden)?,
            ),
        };
        let rows: Vec<u32> = members.iter().map(|&(_, live)| pass.live.last_row(live) as u32).collect();
        for (dst, rows, dst_row) in [(&mut states, &rows[..], nth * num_members), (&mut root, &rows[..1], nth)] {
            let rows = RowIds::Given(rows);
            self.backend.gather_rows(GatherRows { rows, src: &self.ws.x, dst, dst_row, width: hidden })?;
        }
        if nth + 1 < layers.len() {
            watch.states = Some((states, root));
            return Ok(nobody);
        }
        let tau = match gate.spec.rule {
            Rule::Cluster { tau } => tau,
            _ => f32::INFINITY,
        };
        let mut similarity = Similarity::default();
        self.backend.branch_similarity(BranchSimilarity {
            states: &states,
            root: &root,
            layer_weights: &gate::layer_weights(alpha, layers, self.config.num_layers),
            num_branches: num_members,
            hidden,
            tau,
            similarity: &mut similarity,
        })?;
        if gate.keys.iter().any(|k| Some(k) != gate.keys.first()) {
            similarity.labels = gate::cluster(&refused(&similarity.pairwise, &gate.keys), num_members, tau);
        }
        let mut fired: Vec<(usize, usize)> = Vec::new(); // (live sequence, batch sequence it gives way to)
        for (&(m, live), &label) in members.iter().zip(&similarity.labels) {
            if m != label as usize {
                fired.push((live, gate.seqs[label as usize]));
            }
        }
        watch.similarity = Some(similarity);
        if gate.spec.effect == Effect::Observe {
            return Ok(nobody);
        }
        fired.sort_unstable();
        let (live, to) = fired.into_iter().unzip();
        Ok(Leaving { live, to })
    }

    /// Lets the sequences that leave go, and packs the rows that go on.
    fn cut(
        &mut self,
        gate: &GateSpec,
        leaving: &Leaving,
        after: u32,
        asked: Asked<'_>,
        pass: &mut Pass<B>,
    ) -> Result<()> {
        let kept = match gate.effect {
            Effect::Observe => return Ok(()),
            Effect::Recompute { share } => self.thin(leaving, share, after, asked.batch, pass)?,
            _ => self.let_go(gate, leaving, after, asked, pass)?,
        };
        let (inputs, query_ids) = pass.live.inputs(asked, self.layout.block_size, self.max_group_rows);
        pass.inputs = self.backend.stage(inputs)?;
        pass.query_ids = query_ids;
        if let Some(routes) = &mut self.routes {
            if pass.routed {
                // What ran so far ran for the rows as they were.
                let mut left = vec![0.0; pass.num_rows];
                self.backend.read_route(&routes.route, &mut left)?;
            }
            pass.num_rows = kept.len();
            routes.permute(&mut self.backend, &kept)?;
        }
        self.backend.gather_rows(GatherRows {
            rows: RowIds::Given(&kept),
            src: &self.ws.x,
            dst: &mut self.ws.x_alt,
            dst_row: 0,
            width: self.config.hidden,
        })?;
        std::mem::swap(&mut self.ws.x, &mut self.ws.x_alt);
        Ok(())
    }

    /// Takes sequences out of the pass. Returns the old row of each new row.
    fn let_go(
        &mut self,
        gate: &GateSpec,
        leaving: &Leaving,
        after: u32,
        asked: Asked<'_>,
        pass: &mut Pass<B>,
    ) -> Result<Vec<u32>> {
        for (i, &live) in leaving.live.iter().enumerate() {
            pass.fates[pass.live.seq_of(live)] = match (gate.effect, leaving.to.get(i)) {
                (Effect::Stop, _) => Fate::Stopped(after),
                (Effect::Alias, Some(&to)) => Fate::Aliased { layer: after, to },
                _ => Fate::Dropped(after),
            };
            if gate.effect == Effect::Stop {
                let raw = matches!(gate.statistic, Statistic::Entropy { norm: ProbeNorm::Raw, .. });
                self.keep_exit_rows(live, raw, asked, pass)?;
            }
        }
        Ok(pass.live.take_out(&leaving.live))
    }

    /// Leaves sequences the rows that they do not share with the one they give way to, those that differ most from it,
    /// and the last.
    fn thin(
        &mut self,
        leaving: &Leaving,
        share: f32,
        after: u32,
        batch: &Batch,
        pass: &mut Pass<B>,
    ) -> Result<Vec<u32>> {
        let mut thinned = Vec::with_capacity(leaving.live.len());
        for (&live, &source) in leaving.live.iter().zip(&leaving.to) {
            let seq = pass.live.seq_of(live);
            let (own, other) = (batch.seqs[seq].rows.clone(), batch.seqs[source].rows.clone());
            let mut pairs = asks::aligned(&batch.token_ids[own.clone()], &batch.token_ids[other.clone()]);
            pairs.retain(|&(i, _)| i + 1 < own.len());
            let Some(source_live) = pass.live.eligible(source, Effect::Observe) else { continue };
            let similarity = self.row_similarity(
                pass.live.first_row(live)..pass.live.first_row(live) + own.len(),
                pass.live.first_row(source_live)..pass.live.first_row(source_live) + other.len(),
                &pairs,
            )?;
            let anew = asks::most_different(&similarity, share);
            let taken: Vec<(usize, usize)> =
                pairs.iter().zip(anew).filter(|(_, anew)| !anew).map(|(p, _)| *p).collect();
            let transfer = |&(i, j): &(usize, usize)| SlotTransfer {
                src: batch.slots[other.start + j],
                dst: batch.slots[own.start + i],
                shift: batch.positions[own.start + i] as i32 - batch.positions[other.start + j] as i32,
            };
            let is_kept = |i: &usize| taken.binary_search_by_key(i, |p| p.0).is_err();
            pass.fates[seq] = Fate::Mixed(after);
            thinned.push(Thinned {
                live,
                kept: (0..own.len()).filter(is_kept).map(|i| (i, own.start + i)).collect(),
                transfers: taken.iter().map(transfer).collect(),
                source,
            });
        }
        Ok(pass.live.thin(thinned))
    }

    /// Cosines between rows of the residual stream, computed on the host: a matter of one probe a prompt.
    fn row_similarity(&mut self, a: Range<usize>, b: Range<usize>, pairs: &[(usize, usize)]) -> Result<Vec<f32>> {
        let hidden = self.config.hidden;
        let mut read = |rows: Range<usize>| -> Result<Vec<f32>> {
            let mut x = vec![0.0; rows.len() * hidden];
            self.backend.read_f32(&self.ws.x, rows.start * hidden, &mut x)?;
            Ok(x)
        };
        let (a, b) = (read(a)?, read(b)?);
        let dot = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
        let cosine = |&(i, j): &(usize, usize)| {
            let (x, y) = (&a[i * hidden..][..hidden], &b[j * hidden..][..hidden]);
            (dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()) as f32
        };
        Ok(pairs.iter().map(cosine).collect())
    }

    /// Copies the queried rows of a sequence that leaves with an answer.
    fn keep_exit_rows(
        &mut self,
        live_seq: usize,
        raw: bool,
        Asked { batch, queries, .. }: Asked<'_>,
        pass: &mut Pass<B>,
    ) -> Result<()> {
        let seq = &batch.seqs[pass.live.seq_of(live_seq)];
        let (ids, rows): (Vec<usize>, Vec<u32>) = queries
            .iter()
            .enumerate()
            .filter(|(_, q)| seq.rows.contains(&q.row))
            .filter_map(|(i, q)| Some((i, pass.live.live_row(q.row)? as u32)))
            .unzip();
        let mut dst = self.backend.alloc(DType::F32, rows.len() * self.config.hidden)?;
        self.backend.gather_rows(GatherRows {
            rows: RowIds::Given(&rows),
            src: &self.ws.x,
            dst: &mut dst,
            dst_row: 0,
            width: self.config.hidden,
        })?;
        pass.exits.push(Exit { query_ids: ids, rows: dst, raw });
        Ok(())
    }
}

/// Residual rows of a sequence that stopped.
pub(super) struct Exit<B: Backend> {
    pub(super) query_ids: Vec<usize>,
    pub(super) rows: B::Buf,
    /// They are unembedded without the final norm.
    pub(super) raw: bool,
}

/// `pairwise` with minus infinity between members of different keys.
fn refused(pairwise: &[f32], keys: &[u64]) -> Vec<f32> {
    let n = keys.len();
    let allowed = |i: usize| keys[i / n] == keys[i % n];
    pairwise.iter().enumerate().map(|(i, &x)| if allowed(i) { x } else { f32::NEG_INFINITY }).collect()
}

//! What early exit costs in numbers: texts are run once through the backbone and once with each policy, on the same
//! tokens, and rows and KV are compared.

use serde::Serialize;

use crate::engine::{BranchId, Engine, LayerKv, PrefillOptions};
use crate::error::{Error, Result};
use crate::gate::river::{River, RiverExit};
use crate::gate::{Effect, GateSpec, Rows, Rule, Scope, Statistic};

/// Bytes of log-probabilities kept at a time.
const ROWS_BYTES: usize = 512 << 20;

/// What a policy must keep.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Least share of tokens behind which both expect the same one most.
    pub agreement: f64,
    /// Largest mean KL divergence, in nats.
    pub kl: f64,
}

/// A prompt, which stays in the backbone, and the tokens that are given behind it.
#[derive(Clone, Debug)]
pub struct ForcedText {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Run one by one.
    pub forced: Vec<u32>,
}

/// A policy against the backbone.
#[derive(Clone, Debug, Serialize)]
pub struct RiverRow {
    /// The policy.
    pub exit: RiverExit,
    /// Tokens compared.
    pub tokens: usize,
    /// Layers of the backbone a token went through, in the mean.
    pub mean_depth: f64,
    /// KL(backbone || policy) of the next token, in nats, in the mean.
    pub kl: f64,
    /// Share of the tokens behind which both expect the same one most.
    pub agreement: f64,
    /// Mean cosine of each layer's keys to the backbone's. RoPE turns both alike: it is that of the keys before it.
    pub k_cosine: Vec<f64>,
    /// The same of the values.
    pub v_cosine: Vec<f64>,
}

/// Policies, and how much the statistic foretells.
#[derive(Clone, Debug, Serialize)]
pub struct RiverCurve {
    /// One a policy, in the order given.
    pub rows: Vec<RiverRow>,
    /// Pearson correlation, over tokens, of the step similarity after each layer but the last with the cosine of the last
    /// layer's values when the token leaves after that very layer; NaN where one of the two does not vary.
    pub correlation: Vec<f64>,
}

/// Sums over tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    depth: u64,
    kl: f64,
    agreeing: usize,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// One text under one policy.
struct Trace {
    /// Natural-log probabilities, `[forced, vocab]`.
    logprobs: Vec<f32>,
    depth: u64,
    /// Forced tokens.
    tokens: usize,
    /// Of them.
    kv: Vec<LayerKv>,
    /// Step similarities, `[forced, layers - 1]`; empty unless they were asked for.
    steps: Vec<f32>,
}

/// Compares policies with the backbone on `texts`. The engine holds nothing else meanwhile.
pub fn measure(
    engine: &mut Engine,
    texts: &[ForcedText],
    exits: &[RiverExit],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<RiverCurve> {
    let (vocab, num_layers) = (engine.model().vocab_size, engine.model().num_layers);
    let at_once = texts_at_once(texts, vocab)?;
    let mut sums: Vec<Sums> = exits.iter().map(|_| Sums::default()).collect();
    let mut pairs: Vec<Vec<(f64, f64)>> = vec![Vec::new(); num_layers - 1];
    for (done, texts) in texts.chunks(at_once).enumerate() {
        progress(done * at_once, texts.len());
        let backbone = trace(engine, texts, &observer(num_layers))?;
        for (&exit, sums) in exits.iter().zip(&mut sums) {
            let gates: Vec<GateSpec> = River::new(exit).gate(num_layers).into_iter().collect();
            for (with, without) in trace(engine, texts, &gates)?.iter().zip(&backbone) {
                sums.add(with, without, vocab);
            }
        }
        for (i, pairs) in pairs.iter_mut().enumerate() {
            let gates: Vec<GateSpec> =
                River::new(RiverExit::Fixed(i as u32 + 1)).gate(num_layers).into_iter().collect();
            for (with, without) in trace(engine, texts, &gates)?.iter().zip(&backbone) {
                let steps = without.steps.iter().skip(i).step_by(num_layers - 1).map(|&s| f64::from(s));
                pairs.extend(steps.zip(value_cosines(with, without)));
            }
        }
    }
    let rows = exits.iter().zip(sums).map(|(&exit, sums)| sums.row(exit)).collect();
    Ok(RiverCurve { rows, correlation: pairs.iter().map(|p| pearson(p)).collect() })
}

/// Compares an engine whose projections are in codes with one whose are not: the same texts, prompts in codes too. Neither
/// holds anything else meanwhile. The row is that of [`RiverExit::Fixed`] with no layer.
pub fn measure_whole(
    backbone: &mut Engine,
    in_codes: &mut Engine,
    texts: &[ForcedText],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<RiverRow> {
    let shape = |e: &Engine| (e.model().vocab_size, e.model().num_layers);
    if shape(backbone) != shape(in_codes) {
        return Err(Error::config("in_codes", "is another model"));
    }
    let vocab = backbone.model().vocab_size;
    let at_once = texts_at_once(texts, vocab)?;
    let mut sums = Sums::default();
    for (done, texts) in texts.chunks(at_once).enumerate() {
        progress(done * at_once, texts.len());
        let without = trace(backbone, texts, &[])?;
        for (with, without) in trace(in_codes, texts, &[])?.iter().zip(&without) {
            sums.add(with, without, vocab);
        }
    }
    sums.depth = 0;
    Ok(sums.row(RiverExit::Fixed(0)))
}

/// Texts whose rows fit what is kept of them.
fn texts_at_once(texts: &[ForcedText], vocab: usize) -> Result<usize> {
    if texts.iter().any(|t| t.prompt.is_empty() || t.forced.is_empty()) {
        return Err(Error::config("texts", "each needs a prompt and a token behind it"));
    }
    let longest = texts.iter().map(|t| t.forced.len()).max().unwrap_or(1);
    Ok((ROWS_BYTES / (8 * vocab * longest)).clamp(1, 32))
}

/// The bound with the least mean depth among those that reach the goal.
pub fn admissible_tau(curve: &RiverCurve, goal: Goal) -> Option<&RiverRow> {
    let holds = |r: &&RiverRow| matches!(r.exit, RiverExit::Tau(_)) && r.agreement >= goal.agreement && r.kl <= goal.kl;
    curve.rows.iter().filter(holds).min_by(|a, b| a.mean_depth.total_cmp(&b.mean_depth))
}

/// Looks at every step and lets nobody leave.
fn observer(num_layers: usize) -> Vec<GateSpec> {
    vec![GateSpec {
        layers: (1..num_layers as u32).collect(),
        statistic: Statistic::StepSimilarity { of: Rows::Last },
        rule: Rule::Never,
        scope: Scope::Sequence,
        effect: Effect::Observe,
    }]
}

/// Runs the texts side by side, prompts without gates, then one token of each a step with them.
fn trace(engine: &mut Engine, texts: &[ForcedText], gates: &[GateSpec]) -> Result<Vec<Trace>> {
    engine.set_gates(&[])?;
    let options = PrefillOptions { use_prefix_cache: false, ..Default::default() };
    let ids: Vec<BranchId> = texts.iter().map(|t| engine.prefill(&t.prompt, options)).collect::<Result<_>>()?;
    let outcome = trace_branches(engine, texts, gates, &ids);
    engine.set_gates(&[])?;
    ids.into_iter().try_for_each(|id| engine.prune(id))?;
    while engine.next_event().is_some() {}
    outcome
}

fn trace_branches(
    engine: &mut Engine,
    texts: &[ForcedText],
    gates: &[GateSpec],
    ids: &[BranchId],
) -> Result<Vec<Trace>> {
    run(engine)?;
    let all: Vec<u32> = (0..engine.model().vocab_size as u32).collect();
    let empty = || Trace { logprobs: Vec::new(), depth: 0, tokens: 0, kv: Vec::new(), steps: Vec::new() };
    let mut traces: Vec<Trace> = texts.iter().map(|_| empty()).collect();
    engine.set_gates(gates)?;
    for t in 0..texts.iter().map(|t| t.forced.len()).max().unwrap_or(0) {
        let open =
            || texts.iter().zip(ids).enumerate().filter_map(|(i, (text, &id))| Some((i, id, *text.forced.get(t)?)));
        for (_, id, token) in open() {
            engine.append(id, &[token])?;
            if t == 0 {
                engine.watch(id, &all, 0)?;
            }
        }
        while engine.has_work() {
            for item in engine.step()?.items {
                let Some(i) = ids.iter().position(|&id| id == item.branch) else { continue };
                traces[i].depth += u64::from(item.backbone_layers);
            }
        }
        for (i, id, _) in open() {
            let Some(row) = engine.row(id)? else { continue };
            traces[i].logprobs.extend_from_slice(&row.watched);
            traces[i].steps.extend(row.steps.iter().map(|s| s.similarity));
        }
    }
    for ((trace, text), &id) in traces.iter_mut().zip(texts).zip(ids) {
        trace.tokens = text.forced.len();
        trace.kv = engine.read_kv(id, text.prompt.len())?;
    }
    Ok(traces)
}

fn run(engine: &mut Engine) -> Result<()> {
    while engine.has_work() {
        engine.step()?;
    }
    Ok(())
}

impl Sums {
    fn add(&mut self, with: &Trace, without: &Trace, vocab: usize) {
        let rows = without.logprobs.chunks_exact(vocab).zip(with.logprobs.chunks_exact(vocab));
        for (p, q) in rows {
            self.tokens += 1;
            self.agreeing += usize::from(argmax(p) == argmax(q));
            let term = |(p, q): (&f32, &f32)| f64::from(p.exp()) * (f64::from(*p) - f64::from(*q));
            self.kl += p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(term).sum::<f64>();
        }
        self.depth += with.depth;
        for (sums, of) in [(&mut self.k, keys as fn(&LayerKv) -> &[f32]), (&mut self.v, values)] {
            sums.resize(with.kv.len(), 0.0);
            for ((sum, a), b) in sums.iter_mut().zip(&with.kv).zip(&without.kv) {
                *sum += cosines(of(a), of(b), with.tokens).sum::<f64>();
            }
        }
    }

    fn row(self, exit: RiverExit) -> RiverRow {
        let mean = |sum: f64| sum / self.tokens.max(1) as f64;
        RiverRow {
            exit,
            tokens: self.tokens,
            mean_depth: mean(self.depth as f64),
            kl: mean(self.kl),
            agreement: mean(self.agreeing as f64),
            k_cosine: self.k.iter().map(|&s| mean(s)).collect(),
            v_cosine: self.v.iter().map(|&s| mean(s)).collect(),
        }
    }
}

fn keys(kv: &LayerKv) -> &[f32] {
    &kv.k
}

fn values(kv: &LayerKv) -> &[f32] {
    &kv.v
}

/// Of the last layer, token by token.
fn value_cosines<'a>(with: &'a Trace, without: &'a Trace) -> impl Iterator<Item = f64> + 'a {
    let last = with.kv.last().zip(without.kv.last());
    last.into_iter().flat_map(|(a, b)| cosines(&a.v, &b.v, with.tokens))
}

/// Of each token's numbers, all heads together.
fn cosines<'a>(a: &'a [f32], b: &'a [f32], tokens: usize) -> impl Iterator<Item = f64> + 'a {
    let width = (a.len() / tokens.max(1)).max(1);
    a.chunks_exact(width).zip(b.chunks_exact(width)).map(|(a, b)| {
        let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    })
}

/// The most likely token; ties go to the lowest id.
fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best })
}

fn pearson(pairs: &[(f64, f64)]) -> f64 {
    let n = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in pairs {
        xy += (a - x) * (b - y);
        xx += (a - x) * (a - x);
        yy += (b - y) * (b - y);
    }
    xy / (xx * yy).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlations_are_those_of_the_textbook() {
        assert!((pearson(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) - 1.0).abs() < 1e-12);
        assert!((pearson(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) + 1.0).abs() < 1e-12);
        assert!((pearson(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]) - 0.5).abs() < 1e-12);
        assert!(pearson(&[(1.0, 1.0), (1.0, 3.0)]).is_nan());
    }

    #[test]
    fn the_shallowest_bound_that_holds_is_taken() {
        let row = |exit, mean_depth, kl, agreement| RiverRow {
            exit,
            tokens: 1,
            mean_depth,
            kl,
            agreement,
            k_cosine: vec![],
            v_cosine: vec![],
        };
        let rows = vec![
            row(RiverExit::Fixed(1), 1.0, 0.0, 1.0),
            row(RiverExit::Tau(0.3), 2.0, 0.02, 0.999),
            row(RiverExit::Tau(0.5), 3.0, 0.01, 0.99),
            row(RiverExit::Tau(0.7), 4.0, 0.0, 1.0),
        ];
        let mut curve = RiverCurve { rows, correlation: vec![] };
        let goal = Goal { agreement: 0.99, kl: 0.01 };
        assert_eq!(admissible_tau(&curve, goal).unwrap().exit, RiverExit::Tau(0.5));
        curve.rows.truncate(2);
        assert!(admissible_tau(&curve, goal).is_none());
    }
}

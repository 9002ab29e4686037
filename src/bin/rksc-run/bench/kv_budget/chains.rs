//! Chains of forced length through an engine that does nothing else, step by step, with what they must hold at each step:
//! a block more or less than the schedule says ends the run.

use std::time::Instant;

use rksc::Engine;
use rksc::engine::{BranchId, EventKind, GenerateParams, PrefillOptions};
use rksc::kv::budget::{Held, KvLimit};
use rksc::sampler::SamplingParams;
use rksc::testing::fill::Fill;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) prompt_tokens: usize,
    pub(super) new_tokens: usize,
    pub(super) temperature: f32,
    /// `None`: the full cache.
    pub(super) limit: Option<KvLimit>,
    /// Chains in all.
    pub(super) chains: usize,
    /// Of those, how many may be with the engine at once; the others wait outside.
    pub(super) at_once: usize,
}

/// One step of the engine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) seconds: f64,
    /// Chains that computed a generated token in it.
    pub(super) decodes: usize,
    /// Chains whose prompt ran in it.
    pub(super) prefills: usize,
    /// Chains cut before it.
    pub(super) cuts: u64,
    /// Slots of all chains in flight after it, prompts included.
    pub(super) held: usize,
    /// What they would be in a full cache.
    pub(super) full: usize,
    /// Blocks in use after it.
    pub(super) blocks: usize,
}

/// What came of a job.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    pub(super) steps: Vec<Step>,
    pub(super) seconds: f64,
    pub(super) tokens: usize,
    pub(super) preemptions: u64,
    pub(super) tokens_recomputed: u64,
    pub(super) kv_cuts: u64,
    pub(super) blocks_peak: usize,
    /// The most blocks that the schedule allows for who was in flight.
    pub(super) expected_peak: usize,
}

struct Chain {
    id: BranchId,
    schedule: Option<Box<dyn Iterator<Item = Held>>>,
    held: usize,
    computed: usize,
}

impl Outcome {
    /// Seconds of steps in which `n` chains decoded and nothing else happened: no prompt, no cut.
    pub(super) fn plain(&self, n: usize) -> Vec<f64> {
        self.steps.iter().filter(|s| s.is_plain() && s.decodes == n).map(|s| s.seconds).collect()
    }

    /// Chains in flight: the most, and the mean over the steps.
    pub(super) fn in_flight(&self) -> (usize, f64) {
        let sizes = || self.steps.iter().map(|s| s.decodes + s.prefills);
        (sizes().max().unwrap_or(0), sizes().sum::<usize>() as f64 / self.steps.len().max(1) as f64)
    }
}

impl Step {
    pub(super) fn is_plain(&self) -> bool {
        self.prefills == 0 && self.cuts == 0
    }
}

/// Runs the job to its end. `each` sees every step with the engine behind it.
pub(super) fn run(
    engine: &mut Engine,
    job: &Job,
    each: &mut dyn FnMut(&Engine, &Step) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    engine.reset_counters();
    let (block_size, window) = (engine.config().block_size, engine.config().kv_window);
    let mut outcome = Outcome::default();
    let mut open: Vec<Chain> = Vec::new();
    let mut started = 0;
    let clock = Instant::now();
    let mut cuts_before = 0;
    loop {
        while open.len() < job.at_once && started < job.chains {
            open.push(start(engine, job, started as u64, (block_size, window))?);
            started += 1;
        }
        if open.is_empty() {
            break;
        }
        let before = Instant::now();
        let summary = engine.step()?;
        let seconds = before.elapsed().as_secs_f64();
        anyhow::ensure!(!summary.items.is_empty(), "chains are open and none of them has work");
        let (mut decodes, mut cuts) = (0, 0);
        for item in &summary.items {
            let Some(chain) = open.iter_mut().find(|c| c.id == item.branch) else { continue };
            decodes += usize::from(item.is_decode);
            cuts += u64::from(chain.advance(item.num_tokens, item.is_decode));
        }
        let stats = engine.engine_stats();
        let in_flight = || open.iter().filter(|c| c.computed > 0);
        let step = Step {
            seconds,
            decodes,
            prefills: summary.items.len() - decodes,
            cuts: stats.kv_cuts - cuts_before,
            held: in_flight().map(|c| c.held).sum(),
            full: in_flight().map(|c| c.computed).sum(),
            blocks: stats.blocks_used,
        };
        cuts_before = stats.kv_cuts;
        let expected: usize = in_flight().map(|c| c.held.div_ceil(block_size)).sum();
        anyhow::ensure!(
            (step.blocks, step.cuts) == (expected, cuts),
            "step {}: {} blocks and {} cuts, where the schedule says {expected} and {cuts}",
            outcome.steps.len(),
            step.blocks,
            step.cuts
        );
        outcome.expected_peak = outcome.expected_peak.max(expected);
        each(engine, &step)?;
        outcome.steps.push(step);
        while let Some(event) = engine.next_event() {
            if let EventKind::Ended(reason) = event.kind {
                let generated = engine.tokens(event.branch)?.len() - job.prompt_tokens;
                anyhow::ensure!(generated == job.new_tokens, "a chain ended at {generated} tokens: {reason:?}");
                outcome.tokens += generated;
                engine.prune(event.branch)?;
                open.retain(|c| c.id != event.branch);
            }
        }
    }
    let stats = engine.engine_stats();
    outcome.seconds = clock.elapsed().as_secs_f64();
    outcome.preemptions = stats.preemptions;
    outcome.tokens_recomputed = stats.tokens_recomputed;
    outcome.kv_cuts = stats.kv_cuts;
    outcome.blocks_peak = stats.blocks_peak;
    Ok(outcome)
}

fn start(engine: &mut Engine, job: &Job, idx: u64, (block_size, window): (usize, usize)) -> anyhow::Result<Chain> {
    let vocab = engine.model().vocab_size;
    let mut fill = Fill::new(1 + idx.wrapping_mul(0x9e37));
    let prompt: Vec<u32> = (0..job.prompt_tokens).map(|_| fill.below(vocab) as u32).collect();
    let id = engine.prefill(&prompt, PrefillOptions { use_prefix_cache: false, path: idx, ..Default::default() })?;
    let mut schedule: Option<Box<dyn Iterator<Item = Held>>> = None;
    if let Some(limit) = &job.limit {
        let budget = limit.for_prompt(prompt.len(), block_size);
        engine.limit_kv(id, budget)?;
        schedule = Some(Box::new(budget.held(prompt.len(), idx, window)));
    }
    let sampling = SamplingParams { temperature: job.temperature, seed: 1, ..SamplingParams::default() };
    let params = GenerateParams {
        sampling,
        max_new_tokens: job.new_tokens,
        min_new_tokens: job.new_tokens,
        end_tokens: Vec::new(),
    };
    engine.start(id, params)?;
    Ok(Chain { id, schedule, held: 0, computed: 0 })
}

impl Chain {
    /// Another pass of its; true where it was to be cut before.
    fn advance(&mut self, num_tokens: usize, is_decode: bool) -> bool {
        self.computed += num_tokens;
        match &mut self.schedule {
            Some(schedule) if is_decode => match schedule.next() {
                Some(held) => {
                    self.held = held.num_slots;
                    held.is_cut
                }
                None => false,
            },
            _ => {
                self.held += num_tokens;
                false
            }
        }
    }
}

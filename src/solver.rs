//! One problem, many branches, one answer: expand, decode, verify, select.
//!
//! The solver uses only the engine's public API. Policies are data: a [`SolverConfig`] preset names what is shared,
//! how branches are verified, when verification or decoding may be cut short, and how the answer is selected.

mod beam;
mod candidate;
mod config;
mod growth;
mod merge;
mod nodes;
mod prompts;
mod run;
mod search;
#[cfg(test)]
mod search_tests;
pub mod select;
pub mod sharing_table;
mod steps;
pub mod task;
mod trial;
mod verdicts;
mod verify_again;

use std::collections::HashMap;
use std::time::Instant;

pub use beam::{SearchConfig, StepScore};
pub use config::{Calibrated, Policy, Sharing, SolverConfig, VerifyMode};
pub(crate) use prompts::common_prefix;
pub use verify_again::verify_again;

use crate::engine::{BranchId, Engine, EventKind};
use crate::error::{Error, Result};
use crate::gate::asks::AsksScope;
use crate::report::{PassRecord, ProblemResult};
use search::Search;
use task::Task;

/// Drives an engine through problems.
pub struct Solver<'e> {
    engine: &'e mut Engine,
    config: SolverConfig,
    /// Rows and seconds of every pass, for pricing work afterwards.
    passes: Vec<PassRecord>,
}

impl<'e> Solver<'e> {
    /// Checks the configuration against the engine.
    pub fn new(engine: &'e mut Engine, config: SolverConfig) -> Result<Self> {
        config.validate()?;
        if let Some(kv) = &config.kv {
            kv.for_prompt(1, engine.config().block_size).validate(engine.config().kv_window)?;
        }
        engine.set_river(config.river)?;
        Ok(Self { engine, config, passes: Vec::new() })
    }

    /// Rows and seconds of every pass so far.
    pub fn passes(&self) -> &[PassRecord] {
        &self.passes
    }

    /// Solves `tasks`, `concurrency` at a time, and hands each result over as soon as it is there, in order of
    /// finishing. `done` returning false cancels the rest. After an error nothing of the open problems stays behind.
    pub fn solve(
        &mut self,
        tasks: &[Box<dyn Task>],
        done: &mut dyn FnMut(usize, ProblemResult) -> Result<()>,
    ) -> Result<()> {
        let mut flight = Flight::default();
        let result = self.drive(tasks, &mut flight, done);
        if result.is_err() {
            for run in flight.runs.drain(..) {
                run.abandon(self.engine);
            }
            while self.engine.next_event().is_some() {}
        }
        result
    }

    fn drive(
        &mut self,
        tasks: &[Box<dyn Task>],
        flight: &mut Flight,
        done: &mut dyn FnMut(usize, ProblemResult) -> Result<()>,
    ) -> Result<()> {
        let mut waiting = 0..tasks.len();
        loop {
            let mut started = Vec::new();
            while flight.runs.len() < self.config.concurrency
                && let Some(idx) = waiting.next()
            {
                if self.config.cold_cache && flight.runs.is_empty() {
                    self.engine.clear_prefix_cache()?;
                }
                let run = Search::start(self.engine, &self.config, idx, tasks[idx].as_ref())?;
                flight.add(run);
                started.push(idx);
            }
            if flight.runs.is_empty() {
                return Ok(());
            }
            self.compare_across(flight, &started)?;
            self.step(tasks, flight)?;
            for idx in flight.finished() {
                let run = flight.remove(idx);
                let task_idx = run.task_idx();
                let result = run.finish(self.engine, &self.config, tasks[task_idx].as_ref())?;
                done(task_idx, result)?;
            }
        }
    }

    /// One engine step and its consequences for every problem in flight.
    fn step(&mut self, tasks: &[Box<dyn Task>], flight: &mut Flight) -> Result<()> {
        let started = Instant::now();
        let summary = self.engine.step()?;
        let seconds = started.elapsed().as_secs_f64();
        if summary.items.is_empty() {
            return Err(Error::Internal("problems are open and no branch has work".into()));
        }
        self.passes.push(PassRecord {
            rows: summary.num_tokens(),
            layer_rows: summary.layer_rows,
            slots_read: summary.slots_read,
            seconds,
        });
        for item in &summary.items {
            if let Some(run) = flight.run_of(item.branch) {
                run.count(item, seconds / summary.items.len() as f64);
            }
        }
        while let Some(event) = self.engine.next_event() {
            let Some(run) = flight.run_of(event.branch) else { continue };
            match event.kind {
                EventKind::Token(token) => run.on_token(event.branch, &token),
                EventKind::Ended(reason) => run.on_ended(self.engine, event.branch, reason)?,
                EventKind::Ready => run.on_ready(self.engine, event.branch)?,
                EventKind::Aliased { .. } => run.on_aliased(self.engine, event.branch)?,
                EventKind::Preempted => {}
            }
        }
        self.record_similarities(tasks, flight)?;
        for run in &mut flight.runs {
            let task = tasks[run.task_idx()].as_ref();
            run.advance(self.engine, &self.config, task)?;
            if self.config.record {
                run.sample_memory(self.engine);
            }
        }
        flight.reindex();
        Ok(())
    }

    /// Compares the prompts of the problems that have just been taken up, whatever problem they belong to.
    fn compare_across(&mut self, flight: &Flight, started: &[usize]) -> Result<()> {
        let Some(asks) = self.config.asks.as_ref().filter(|a| a.scope == AsksScope::Batch) else { return Ok(()) };
        let new = flight.runs.iter().filter(|r| started.contains(&r.task_idx()));
        let (ids, numbers): (Vec<BranchId>, Vec<&[String]>) = new.flat_map(|r| r.prompts().numbered()).unzip();
        match ids.len() {
            0 | 1 => Ok(()),
            _ => self.engine.gate_keyed(&asks.gate(), &ids, &prompts::keys(&numbers)),
        }
    }

    /// Writes down what comparisons of prompts found, under names that say whose each prompt is.
    fn record_similarities(&mut self, tasks: &[Box<dyn Task>], flight: &mut Flight) -> Result<()> {
        // Nearly every step has nothing to write down: no names are made for it.
        let mut is_due = false;
        for run in &flight.runs {
            is_due |= run.prompts().has_new_similarity(self.engine)?;
        }
        if !is_due {
            return Ok(());
        }
        let is_batch = self.config.asks.as_ref().is_some_and(|a| a.scope == AsksScope::Batch);
        let mut names: HashMap<BranchId, String> = HashMap::new();
        for run in &flight.runs {
            let id = tasks[run.task_idx()].id();
            for (i, (root, _)) in run.prompts().numbered().enumerate() {
                names.insert(root, if is_batch { format!("{id}, wording {i}") } else { format!("wording {i}") });
            }
        }
        let name = |id: BranchId| names.get(&id).cloned().unwrap_or_else(|| "a finished problem".into());
        for run in &mut flight.runs {
            run.prompts_mut().take_similarity(self.engine, &self.config, &name)?;
        }
        Ok(())
    }
}

/// The problems in flight and who owns which branch.
#[derive(Default)]
struct Flight {
    runs: Vec<Search>,
    owner: HashMap<BranchId, usize>,
}

impl Flight {
    fn add(&mut self, run: Search) {
        self.runs.push(run);
        self.reindex();
    }

    fn run_of(&mut self, branch: BranchId) -> Option<&mut Search> {
        self.owner.get(&branch).and_then(|&i| self.runs.get_mut(i))
    }

    /// Indices of finished runs, last first, so that they can be removed in order.
    fn finished(&self) -> Vec<usize> {
        (0..self.runs.len()).rev().filter(|&i| self.runs[i].is_done()).collect()
    }

    fn remove(&mut self, idx: usize) -> Search {
        let run = self.runs.remove(idx);
        self.reindex();
        run
    }

    fn reindex(&mut self) {
        self.owner.clear();
        for (i, run) in self.runs.iter().enumerate() {
            self.owner.extend(run.branch_ids().map(|id| (id, i)));
        }
    }
}

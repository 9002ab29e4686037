//! Tokens per second of chains, one at a time: arms in turns on the same problems.

use rksc::Engine;
use rksc::solver::task::Task;
use rksc::solver::{Solver, SolverConfig};

use super::super::{median, spread};
use super::{Arm, in_turn};

/// What came of an arm, a number a turn.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(super) struct Rates {
    /// Generated tokens over the time of all passes: the prompt's, and those that run tokens again, among them.
    pub(super) tokens_per_s: Vec<f64>,
    /// Over the first arm's of the same turn.
    pub(super) speed_up: Vec<f64>,
}

impl Rates {
    pub(super) fn speed_up(&self) -> f64 {
        median(&self.speed_up)
    }

    pub(super) fn cells(&self) -> [String; 2] {
        [spread(&self.tokens_per_s, 0), spread(&self.speed_up, 2)]
    }
}

/// The first arm is what the others are compared with.
pub(super) fn measure(
    engines: &mut [Engine],
    arms: &[Arm],
    tasks: &[Box<dyn Task>],
    config: &SolverConfig,
    repeats: usize,
) -> anyhow::Result<Vec<Rates>> {
    let mut rates = vec![Rates::default(); arms.len()];
    for arm in arms {
        turn(&mut engines[arm.engine], arm, &tasks[..1], config)?;
    }
    for repeat in 0..repeats {
        for at in in_turn(arms.len(), repeat) {
            eprintln!("turn {}: {}", repeat + 1, arms[at].name);
            let rate = turn(&mut engines[arms[at].engine], &arms[at], tasks, config)?;
            rates[at].tokens_per_s.push(rate);
        }
    }
    let first = rates[0].tokens_per_s.clone();
    for r in &mut rates {
        r.speed_up = r.tokens_per_s.iter().zip(&first).map(|(rate, first)| rate / first).collect();
    }
    Ok(rates)
}

fn turn(engine: &mut Engine, arm: &Arm, tasks: &[Box<dyn Task>], config: &SolverConfig) -> anyhow::Result<f64> {
    engine.clear_prefix_cache()?;
    let config = SolverConfig { river: arm.river, concurrency: 1, ..config.clone() };
    let (mut tokens, mut ms) = (0, 0.0);
    Solver::new(engine, config)?.solve(tasks, &mut |_, result| {
        tokens += result.branches.iter().map(|b| b.tokens.len()).sum::<usize>();
        ms += result.phase_ms.prefill + result.phase_ms.decode;
        Ok(())
    })?;
    Ok(tokens as f64 / ms * 1e3)
}

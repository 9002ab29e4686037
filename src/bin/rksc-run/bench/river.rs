//! `rksc-run bench river`: what early exit into a 4-bit copy costs in answers, and what it gives in speed.

mod accuracy;
mod bytes;
mod chains;
mod draft;
mod draw;
mod rates;
mod score;
mod speed;
mod steps;
mod verdicts;

use clap::Subcommand;
use rksc::Engine;
use rksc::config::EngineConfig;
use rksc::engine::SecondSet;
use rksc::gate::GateSpec;
use rksc::gate::river::{River, RiverExit};
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::quant::{QuantOptions, QuantWeights};

use crate::common;

#[derive(Subcommand)]
pub(crate) enum Command {
    Accuracy(Box<accuracy::Args>),
    Speed(Box<speed::Args>),
    Draft(Box<draft::Args>),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Accuracy(args) => accuracy::run(args),
        Command::Speed(args) => speed::run(args),
        Command::Draft(args) => draft::run(args),
    }
}

/// The least and the most that arXiv 2604.18396 says for Llama models, in times the backbone's tokens/s.
const CLAIM: [f64; 2] = [1.71, 2.16];

/// An arm of a comparison: an engine, and how its generated tokens leave the backbone.
#[derive(Clone, Debug)]
struct Arm {
    name: String,
    /// Which of the engines.
    engine: usize,
    river: Option<River>,
    /// Besides, on every branch of every pass behind the prompts.
    gates: Vec<GateSpec>,
}

impl Arm {
    /// The first engine's.
    fn backbone() -> Self {
        Self { name: "backbone".into(), engine: 0, river: None, gates: Vec::new() }
    }

    fn exit(exit: RiverExit) -> Self {
        Self { name: exit.to_string(), river: Some(River::new(exit)), ..Self::backbone() }
    }

    /// An engine whose projections are in codes.
    fn whole(name: String, engine: usize) -> Self {
        Self { name, engine, ..Self::backbone() }
    }

    /// Lets the engine run as the arm does from the next step on.
    fn apply(&self, engine: &mut Engine) -> rksc::Result<()> {
        engine.set_river(self.river)?;
        engine.set_gates(&self.gates)
    }
}

/// One copy of the weights, for several engines.
struct Weights {
    config: EngineConfig,
    model: ModelConfig,
    store: WeightStore,
}

impl Weights {
    fn load(config: EngineConfig) -> rksc::Result<Self> {
        let (model, store) = Engine::load(&config)?;
        Ok(Self { config, model, store })
    }

    fn codes(&self, options: QuantOptions) -> rksc::Result<QuantWeights> {
        Engine::load_codes(&self.config, &self.model, &self.store, options)
    }

    /// The backbone, and the codes as its second set.
    fn with_river(&self, codes: &QuantWeights) -> rksc::Result<Engine> {
        let second = SecondSet::Codes(codes);
        let engine = Engine::with_second_set(self.config.clone(), self.model.clone(), &self.store, second)?;
        common::announce(&engine);
        Ok(engine)
    }

    /// The codes in the backbone's place.
    fn in_codes(&self, codes: &QuantWeights) -> rksc::Result<Engine> {
        Engine::with_codes(self.config.clone(), self.model.clone(), &self.store, codes)
    }
}

/// Refuses depths that are no exit.
fn check_fixed(fixed: &[u32], num_layers: usize) -> anyhow::Result<()> {
    let deepest = fixed.iter().copied().max().unwrap_or(0);
    anyhow::ensure!((deepest as usize) < num_layers, "--fixed: {deepest}: the model has {num_layers} layers");
    Ok(())
}

/// Every index below `n`, from another one on in each turn.
fn in_turn(n: usize, turn: usize) -> impl Iterator<Item = usize> {
    (0..n).map(move |i| (i + turn) % n)
}

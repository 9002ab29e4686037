//! Flags of early exit. A flag that would change nothing beside the others is refused by its name.

use std::path::PathBuf;

use clap::Args;
use rksc::Result;
use rksc::config::EngineConfig;
use rksc::engine::Engine;
use rksc::gate::river::{River, RiverExit};
use rksc::quant::QuantOptions;
use rksc::report::river::RiverTotals;

use crate::common::refused;
use crate::quant::{QuantArgs, Wanted};

#[derive(Args, Clone)]
pub(crate) struct RiverArgs {
    /// When a generated token leaves the backbone, the layers as they are stored, for a second set of them in 4 bits, the
    /// river: off; tau=X (after the first layer that changes it so little that the cosine is above X) or fixed=LAYERS (0:
    /// at once), which are not exact; draft[=TOKENS] (the river proposes so many, 4 unless given, and the backbone keeps
    /// those it would have chosen itself), which is exact.
    #[arg(long, default_value = "off", value_name = "EXIT", value_parser = exit)]
    river: Exit,
    /// The first layer, counted from 1, after which --river tau and --river-prefill may look [default: 1].
    #[arg(long, value_name = "LAYER")]
    river_first: Option<u32>,
    /// The last one: what has not left by then stays [default: 8].
    #[arg(long, value_name = "LAYER")]
    river_last: Option<u32>,
    /// All tokens of a pass leave after the same layer, the one after which the last of them would (the paper's rule; only
    /// with --river tau). A branch's tokens then depend on its neighbours.
    #[arg(long)]
    river_batch_min: bool,
    /// Prompts of at most 256 tokens leave too, as a whole, after the first layer that leaves all but 5 % of their rows
    /// with a cosine above this. Not exact.
    #[arg(long, value_name = "TAU", allow_negative_numbers = true)]
    river_prefill: Option<f32>,
    /// Every so many tokens the backbone runs a branch's last ones again, and their K and V become exact.
    #[arg(long, value_name = "TOKENS")]
    river_refresh: Option<usize>,
    /// The whole model in 4 bits instead of as it is stored. Not exact.
    #[arg(long)]
    quantise: bool,
    #[command(flatten)]
    quant: QuantArgs,
    /// Where the codes lie, made there if they are not [default: beside the model, or in the user's cache].
    #[arg(long, value_name = "FILE")]
    codes: Option<PathBuf>,
}

/// `--river`, as it was given.
#[derive(Clone, Copy)]
pub(crate) enum Exit {
    Off,
    At(RiverExit),
}

impl Exit {
    pub(crate) fn is_on(self) -> bool {
        matches!(self, Self::At(_))
    }
}

pub(crate) fn exit(text: &str) -> Result<Exit> {
    if text == "off" { Ok(Exit::Off) } else { text.parse().map(Exit::At) }
}

impl RiverArgs {
    /// The policy, if there is one; `verify` is `--river-verify`. `engine` gets the codes.
    pub(crate) fn policy(&self, verify: bool, engine: &mut EngineConfig) -> Result<Option<River>> {
        let wanted = Wanted { river: self.river.is_on(), quantise: self.quantise };
        self.quant.apply(&wanted, engine)?;
        if self.codes.is_some() && !(wanted.river || wanted.quantise) {
            return Err(refused("codes", "changes nothing without codes; give --river or --quantise too"));
        }
        engine.codes.clone_from(&self.codes);
        let Exit::At(exit) = self.river else {
            return match self.given(verify).into_iter().find(|(_, is_given)| *is_given) {
                Some((flag, _)) => Err(refused(flag, "changes nothing without early exit; give --river too")),
                None => Ok(None),
            };
        };
        self.refuse_idle(exit, verify)?;
        let base = River::new(exit);
        let river = River {
            min_layer: self.river_first.unwrap_or(base.min_layer),
            max_layer: self.river_last.unwrap_or(base.max_layer),
            batch_min: self.river_batch_min,
            prefill: self.river_prefill,
            verify,
            refresh: self.river_refresh,
            ..base
        };
        river.validate()?;
        Ok(Some(river))
    }

    fn given(&self, verify: bool) -> [(&'static str, bool); 6] {
        [
            ("river-first", self.river_first.is_some()),
            ("river-last", self.river_last.is_some()),
            ("river-batch-min", self.river_batch_min),
            ("river-prefill", self.river_prefill.is_some()),
            ("river-verify", verify),
            ("river-refresh", self.river_refresh.is_some()),
        ]
    }

    /// Refuses the first flag that the others leave without an effect.
    fn refuse_idle(&self, exit: RiverExit, verify: bool) -> Result<()> {
        let idle = |flag: &str, is_idle: bool, why: &str| if is_idle { Err(refused(flag, why)) } else { Ok(()) };
        let is_tau = matches!(exit, RiverExit::Tau(_));
        if matches!(exit, RiverExit::Draft(_)) {
            let why =
                "changes nothing under --river draft, where all that stays is the backbone's; drop one of the two";
            self.given(verify).into_iter().try_for_each(|(flag, is_given)| idle(flag, is_given, why))?;
        }
        let looks = is_tau || self.river_prefill.is_some();
        for (flag, layer) in [("river-first", self.river_first), ("river-last", self.river_last)] {
            let why = "is of --river tau and --river-prefill; drop it, or give one of these";
            idle(flag, layer.is_some() && !looks, why)?;
        }
        idle(
            "river-batch-min",
            self.river_batch_min && !is_tau,
            "is of --river tau: otherwise all tokens leave after the same layer anyway; drop one of the two",
        )
    }
}

/// What the river was to do, and what it did.
#[derive(serde::Serialize)]
pub(crate) struct RiverReport {
    pub(crate) policy: River,
    codes: Option<QuantOptions>,
    pub(crate) totals: RiverTotals,
}

impl RiverReport {
    pub(crate) fn of(engine: &Engine) -> Option<Self> {
        let policy = *engine.river()?;
        Some(Self { policy, codes: engine.config().river, totals: RiverTotals::of(engine) })
    }
}

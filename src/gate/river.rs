//! Token-level early exit (River-LLM): a token leaves the backbone after a few layers, and a 4-bit copy of the other layers
//! finishes it, so that its K and V stand in every layer.
//!
//! Not exact, but for [`RiverExit::Draft`]: what tokens write in the river is approximate, and every later token reads it.

use std::fmt;
use std::str::FromStr;

use super::{Effect, GateSpec, Rows, Rule, Scope, Statistic};
use crate::error::{Error, Result};

/// When a generated token leaves the backbone.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RiverExit {
    /// After the first layer whose residual stream, before and after, has a cosine above this. From 1 on: never.
    Tau(f32),
    /// After this many layers; 0 is the river alone, and as many as the model has is never.
    Fixed(u32),
    /// The river alone proposes this many tokens, and the backbone runs them all in one pass and keeps those it would have
    /// chosen itself. Exact: the same tokens, and the backbone's K and V.
    Draft(usize),
}

/// A policy. Prompts stay in the backbone, unless [`prefill`](Self::prefill) says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct River {
    /// When a token leaves.
    pub exit: RiverExit,
    /// The first layer after which `tau` looks, at least 1.
    pub min_layer: u32,
    /// The last one: a token that has not left by then stays.
    pub max_layer: u32,
    /// All tokens of a pass leave after the same layer, the one after which the last of them would: the paper's rule. A
    /// branch's tokens then depend on its neighbours. Otherwise each decides for itself.
    pub batch_min: bool,
    /// Of a prompt of at most [`MAX_EXIT_PROMPT`] tokens, the rows of its last pass leave together, after the first layer
    /// whose cosines are above this but for 5 % of the rows; the first 4 positions do not count. What was cached, shared or
    /// run in earlier chunks is no matter.
    pub prefill: Option<f32>,
    /// Verification too runs in the river, with `prefill`'s rule or, without one, after as many layers as `exit` says.
    pub verify: bool,
    /// Every so many tokens the backbone runs the last ones again, and their K and V become exact.
    pub refresh: Option<usize>,
}

/// Longer prompts are bound by arithmetic, where 4-bit weights save nothing.
pub const MAX_EXIT_PROMPT: usize = 256;
/// The most tokens a draft proposes: with the one before they fill a skinny launch.
pub const MAX_DRAFT: usize = 15;
/// Share of a prompt's rows that may fall short of the bound.
const PREFILL_SHARE: f32 = 0.05;
/// Positions that attention sinks make alike.
const SINKS: u32 = 4;

impl River {
    /// A policy with the defaults of the paper: any layer up to the eighth, each token by itself.
    pub fn new(exit: RiverExit) -> Self {
        Self { exit, min_layer: 1, max_layer: 8, batch_min: false, prefill: None, verify: false, refresh: None }
    }

    /// What is generated is what the backbone alone would have generated.
    pub fn is_exact(&self) -> bool {
        matches!(self.exit, RiverExit::Draft(_))
    }

    /// Refuses what cannot be done, by option.
    pub fn validate(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::config("river", why));
        let refuse_of = |field: &str, why: String| Err(Error::config(field, why));
        match self.exit {
            RiverExit::Tau(tau) if !tau.is_finite() => return refuse(format!("tau={tau} is not a number")),
            RiverExit::Draft(n) if n == 0 || n > MAX_DRAFT => {
                return refuse(format!("draft={n}: between 1 and {MAX_DRAFT} tokens can be proposed"));
            }
            RiverExit::Draft(_) if self.prefill.is_some() || self.verify || self.refresh.is_some() => {
                return refuse(
                    "draft is exact: its prompts, verification and K and V are the backbone's anyway".into(),
                );
            }
            _ => {}
        }
        if self.min_layer == 0 || self.min_layer > self.max_layer {
            let why = format!("layers {} to {}: count from 1, ascending", self.min_layer, self.max_layer);
            return refuse_of("river-first", why);
        }
        if self.batch_min && !matches!(self.exit, RiverExit::Tau(_)) {
            return refuse_of("river-batch-min", "is of tau: otherwise all leave after the same layer anyway".into());
        }
        if self.refresh == Some(0) {
            return refuse_of("river-refresh", "must be at least 1 token".into());
        }
        match self.prefill {
            Some(tau) if !tau.is_finite() => refuse_of("river-prefill", format!("{tau} is not a number")),
            _ => Ok(()),
        }
    }

    /// Refuses what does not go together with a KV budget.
    pub fn check_budget(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::config("river", why));
        match self.exit {
            RiverExit::Draft(_) => {
                refuse("draft and a KV budget do not go together: a cut drops what it reads; drop one of the two")
            }
            _ if self.refresh.is_some() => refuse(
                "a refresh and a KV budget do not go together: a cut goes through what is to run again; drop one of the two",
            ),
            _ => Ok(()),
        }
    }

    /// The gate of generated tokens in a model of `num_layers`; `None` where none ever leaves. A draft's is that of its
    /// proposals.
    pub fn gate(&self, num_layers: usize) -> Option<GateSpec> {
        match self.exit {
            RiverExit::Tau(tau) => self.step_gate(Rows::Last, tau, num_layers),
            RiverExit::Fixed(layers) => fixed(layers, num_layers),
            RiverExit::Draft(_) => fixed(0, num_layers),
        }
    }

    /// The gate of a prompt of `num_tokens`; `None` where it stays in the backbone.
    pub fn prefill_gate(&self, num_tokens: usize, num_layers: usize) -> Option<GateSpec> {
        let of = Rows::Percentile { share: PREFILL_SHARE, skip: SINKS };
        let tau = self.prefill.filter(|_| num_tokens <= MAX_EXIT_PROMPT)?;
        Self { batch_min: false, ..*self }.step_gate(of, tau, num_layers)
    }

    /// The gate of a verification prompt of `num_tokens`; `None` where it stays in the backbone.
    pub fn verify_gate(&self, num_tokens: usize, num_layers: usize) -> Option<GateSpec> {
        match (self.verify, self.prefill) {
            (false, _) => None,
            (true, Some(_)) => self.prefill_gate(num_tokens, num_layers),
            (true, None) => self.gate(num_layers),
        }
    }

    fn step_gate(&self, of: Rows, tau: f32, num_layers: usize) -> Option<GateSpec> {
        let last = self.max_layer.min((num_layers as u32).saturating_sub(1));
        let layers: Vec<u32> = (self.min_layer..=last).collect();
        // A cosine never exceeds 1, but for its rounding.
        (tau < 1.0 && !layers.is_empty()).then_some(GateSpec {
            layers,
            statistic: Statistic::StepSimilarity { of },
            rule: Rule::Above(tau),
            scope: if self.batch_min { Scope::Batch } else { Scope::Sequence },
            effect: Effect::River,
        })
    }
}

fn fixed(layers: u32, num_layers: usize) -> Option<GateSpec> {
    ((layers as usize) < num_layers).then_some(GateSpec {
        layers: vec![layers],
        statistic: Statistic::RowIndex,
        rule: Rule::EveryNth { every: 1, offset: 0 },
        scope: Scope::Sequence,
        effect: Effect::River,
    })
}

impl fmt::Display for RiverExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tau(tau) => write!(f, "tau={tau}"),
            Self::Fixed(layers) => write!(f, "fixed={layers}"),
            Self::Draft(tokens) => write!(f, "draft={tokens}"),
        }
    }
}

impl FromStr for RiverExit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || {
            let why =
                format!("{text:?} is unknown; use off, tau=X (0.5 is the paper's), fixed=LAYERS or draft[=TOKENS]");
            Error::config("river", why)
        };
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        match (name, value) {
            ("tau", x) => x.parse().map(Self::Tau).map_err(|_| refuse()),
            ("fixed", n) => n.parse().map(Self::Fixed).map_err(|_| refuse()),
            ("draft", "") if !text.ends_with('=') => Ok(Self::Draft(4)),
            ("draft", n) => n.parse().map(Self::Draft).map_err(|_| refuse()),
            _ => Err(refuse()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The edge rules: the last layer never triggers, tau from 1 on never exits, tau at most -1 exits at once.
    #[test]
    fn gates_look_where_they_may() {
        let layers = |exit: RiverExit| River::new(exit).gate(6).map(|g| g.layers);
        assert_eq!(layers(RiverExit::Tau(0.5)), Some(vec![1, 2, 3, 4, 5]));
        assert_eq!(layers(RiverExit::Tau(1.0)), None);
        assert_eq!(layers(RiverExit::Tau(2.0)), None);
        assert_eq!(layers(RiverExit::Fixed(0)), Some(vec![0]));
        assert_eq!(layers(RiverExit::Fixed(5)), Some(vec![5]));
        assert_eq!(layers(RiverExit::Fixed(6)), None);
        assert_eq!(layers(RiverExit::Draft(4)), Some(vec![0]));
        let river = River { min_layer: 2, max_layer: 3, prefill: Some(0.9), ..River::new(RiverExit::Tau(-2.0)) };
        for gate in [river.gate(6), river.prefill_gate(256, 6)] {
            let gate = gate.unwrap();
            assert_eq!(gate.layers, [2, 3]);
            gate.validate(6).unwrap();
        }
        assert_eq!(river.prefill_gate(257, 6), None);
        assert_eq!(river.verify_gate(100, 6), None);
        assert_eq!(River { verify: true, ..river }.verify_gate(100, 6), river.prefill_gate(100, 6));
        assert_eq!(River { verify: true, prefill: None, ..river }.verify_gate(100, 6), river.gate(6));
    }

    #[test]
    fn exits_are_read_as_they_are_written_and_nonsense_is_refused() {
        for exit in [RiverExit::Tau(0.5), RiverExit::Fixed(4), RiverExit::Draft(7)] {
            assert_eq!(exit.to_string().parse::<RiverExit>().unwrap(), exit);
        }
        assert_eq!("draft".parse::<RiverExit>().unwrap(), RiverExit::Draft(4));
        for text in ["", "tau", "tau=x", "fixed=-1", "draft=", "draft=x", "0.5"] {
            assert!(text.parse::<RiverExit>().is_err(), "{text}");
        }
        let bad = |river: River| river.validate().unwrap_err().to_string();
        assert!(bad(River::new(RiverExit::Tau(f32::NAN))).contains("tau"));
        assert!(bad(River::new(RiverExit::Draft(0))).contains("draft=0"));
        assert!(bad(River::new(RiverExit::Draft(16))).contains("15"));
        assert!(bad(River { refresh: Some(8), ..River::new(RiverExit::Draft(4)) }).contains("exact"));
        assert!(bad(River { min_layer: 9, ..River::new(RiverExit::Tau(0.5)) }).contains("layers 9 to 8"));
        assert!(bad(River { refresh: Some(0), ..River::new(RiverExit::Fixed(4)) }).contains("refresh"));
        assert!(bad(River { prefill: Some(f32::INFINITY), ..River::new(RiverExit::Fixed(4)) }).contains("prefill"));
        River::new(RiverExit::Tau(0.5)).validate().unwrap();
    }
}

//! Names of the ways to choose what stays, and the limits they stand for.

use rksc::backend::RkvVariant;
use rksc::kv::budget::{Aggregation, KeepRule, KvLimit, KvPrompt};

/// A way to choose what stays, by its name on the command line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Method {
    pub(super) name: String,
    rule: KeepRule,
    aggregation: Aggregation,
}

const NAMES: [&str; 10] =
    ["rkv", "rkv-text", "rkv-alg1", "rkv-layer", "rkv-token", "snapkv", "streaming", "h2o", "random", "random-token"];

impl std::str::FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let rkv = |variant| match KeepRule::RKV {
            KeepRule::RKv { lambda, threshold, pool_size, .. } => {
                KeepRule::RKv { variant, lambda, threshold, pool_size }
            }
            other => other,
        };
        let (rule, aggregation) = match name {
            "rkv" => (KeepRule::RKV, Aggregation::Head),
            "rkv-text" => (rkv(RkvVariant::Text), Aggregation::Head),
            "rkv-alg1" => (rkv(RkvVariant::Alg1), Aggregation::Layer),
            "rkv-layer" => (KeepRule::RKV, Aggregation::Layer),
            "rkv-token" => (KeepRule::RKV, Aggregation::Token),
            "snapkv" => (KeepRule::SNAPKV, Aggregation::Head),
            "streaming" => (KeepRule::Streaming, Aggregation::Head),
            "h2o" => (KeepRule::H2o, Aggregation::Head),
            "random" => (KeepRule::Random { seed: 0 }, Aggregation::Head),
            "random-token" => (KeepRule::Random { seed: 0 }, Aggregation::Token),
            _ => return Err(format!("{name:?} is unknown; use one of {}", NAMES.join(", "))),
        };
        Ok(Self { name: name.to_string(), rule, aggregation })
    }
}

impl Method {
    /// What asks for `budget` slots kept by this method; only a random one looks at the seed.
    pub(super) fn limit(&self, budget: usize, buffer: Option<usize>, prompt: KvPrompt, seed: u64) -> KvLimit {
        let rule = if let KeepRule::Random { .. } = self.rule { KeepRule::Random { seed } } else { self.rule };
        KvLimit { buffer, prompt, rule, aggregation: self.aggregation, ..KvLimit::new(budget) }
    }

    /// Repeating it with another seed changes something.
    pub(super) fn is_random(&self) -> bool {
        matches!(self.rule, KeepRule::Random { .. })
    }

    /// With R-KV's `lambda`; nothing changes for others.
    pub(super) fn with_lambda(self, lambda: f32) -> Self {
        match self.rule {
            KeepRule::RKv { variant, threshold, pool_size, .. } => {
                Self { rule: KeepRule::RKv { variant, lambda, threshold, pool_size }, ..self }
            }
            _ => self,
        }
    }
}

/// `percent` of `len`, to the nearest slot.
pub(super) fn share(percent: f64, len: f64) -> usize {
    (percent / 100.0 * len).round() as usize
}

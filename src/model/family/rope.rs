//! Rotation frequencies: how a model's config.json stretches RoPE over longer contexts.
//!
//! ```text
//! plain     theta^(-2 i / rotary_dim)                              i < rotary_dim / 2, radians per position
//! linear    all divided by factor
//! dynamic   theta grown with the context, once that is longer than the model was trained for (NTK)
//! llama3    long waves divided by factor, short ones as they are, a ramp in between
//! yarn      the same by index instead of by wavelength; cosines and sines are scaled as well
//! longrope  each divided by a number of its own: one list for short contexts, one for long ones; scaled as well
//! ```
//!
//! transformers looks at the length of each call where a rule depends on it, so that keys computed early and late in one
//! text may be rotated by different rules. Here the context that the model is opened for decides, for all of them.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::model::fields::{FACTORS, Fields};

/// How one kind of layer rotates q and k.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that are rotated, from the front; the others stay as they are.
    pub rotary_dim: usize,
    /// The rule for long contexts.
    pub scaling: RopeScaling,
}

/// See the module text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "lowercase", tag = "rope_type")]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// One factor for all frequencies.
    Linear {
        /// What they are divided by.
        factor: f64,
    },
    /// NTK by the context.
    Dynamic {
        /// How fast theta grows.
        factor: f64,
        /// Positions up to which nothing changes.
        trained: usize,
    },
    /// Llama 3.1 and later.
    Llama3 {
        /// What the frequencies of long waves are divided by.
        factor: f64,
        /// `trained` / this is the shortest of the long waves.
        low_freq_factor: f64,
        /// `trained` / this is the longest of the short waves.
        high_freq_factor: f64,
        /// Positions the model was trained for first.
        trained: usize,
    },
    /// YaRN.
    Yarn {
        /// What the last frequencies are divided by.
        factor: f64,
        /// Rotations over `trained` positions above which a frequency stays as it is.
        beta_fast: f64,
        /// Rotations below which it is divided by all of `factor`.
        beta_slow: f64,
        /// Whether the ends of the ramp are whole indices.
        truncate: bool,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Positions the model was trained for first.
        trained: usize,
    },
    /// Phi-3 and Phi-4-mini.
    LongRope {
        /// Divisors of the frequencies for contexts up to `trained`, one for each.
        short_factor: Vec<f64>,
        /// Divisors for longer contexts.
        long_factor: Vec<f64>,
        /// What cosines and sines are multiplied by, in either.
        attention_factor: f64,
        /// Positions the model was trained for first.
        trained: usize,
    },
}

/// The kind of layers that attend to everything, as config.json calls it.
pub(super) const FULL_ATTENTION: &str = "full_attention";

impl Rope {
    /// No scaling.
    pub fn plain(theta: f64, rotary_dim: usize) -> Self {
        Self { theta, rotary_dim, scaling: RopeScaling::Default }
    }

    /// Frequencies `[rotary_dim / 2]` for a context of so many positions, radians per position.
    pub fn inv_freq(&self, context: usize) -> Vec<f32> {
        let (dim, half) = (self.rotary_dim as f64, self.rotary_dim / 2);
        // The exponent is an f32, as in transformers.
        let exponent = |i: usize| f64::from((2 * i) as f32 / self.rotary_dim as f32);
        let plain = |theta: f64| move |i: usize| 1.0 / theta.powf(exponent(i));
        let all = |of: &dyn Fn(usize) -> f64| (0..half).map(|i| of(i) as f32).collect();
        match &self.scaling {
            RopeScaling::Default => all(&plain(self.theta)),
            RopeScaling::Linear { factor } => all(&|i| plain(self.theta)(i) / factor),
            RopeScaling::Dynamic { factor, trained } => {
                let times = context.max(*trained) as f64 / *trained as f64;
                let grown = self.theta * (factor * times - (factor - 1.0)).powf(dim / (dim - 2.0));
                all(&plain(grown))
            }
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, trained } => all(&|i| {
                let freq = plain(self.theta)(i);
                // Waves that fit into the trained context; between `low` and `high` of them, a ramp.
                let waves = *trained as f64 * freq / (2.0 * PI);
                let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * freq / factor + kept * freq
            }),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, trained, .. } => {
                let (low, high) = self.yarn_ramp((*beta_fast, *beta_slow), *truncate, *trained);
                all(&|i| {
                    let freq = plain(self.theta)(i);
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    freq / factor * divided + freq * (1.0 - divided)
                })
            }
            RopeScaling::LongRope { short_factor, long_factor, trained, .. } => {
                let factors = if context > *trained { long_factor } else { short_factor };
                all(&|i| plain(self.theta)(i) / factors[i])
            }
        }
    }

    /// The indices between which YaRN's ramp rises.
    fn yarn_ramp(&self, (fast, slow): (f64, f64), truncate: bool, trained: usize) -> (f64, f64) {
        let dim = self.rotary_dim as f64;
        let index = |rotations: f64| dim * (trained as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (low, high) = (index(fast), index(slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // Equal ends would divide by nothing.
        (low, if low == high { high + 0.001 } else { high })
    }

    /// What cosines and sines are multiplied by.
    pub fn scale(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        }
    }

    /// Positions up to which transformers would use the same frequencies as here, and positions that the rule reaches,
    /// for a config.json that speaks of `positions`.
    pub(super) fn reach(&self, positions: usize) -> (usize, usize) {
        let times = |n: usize, factor: f64| (n as f64 * factor) as usize;
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => (positions, positions),
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => {
                (positions, times(positions, *factor).max(positions))
            }
            RopeScaling::Yarn { factor, trained, .. } => (positions, times(*trained, *factor).max(positions)),
            RopeScaling::LongRope { trained, .. } => (positions.min(*trained), positions),
        }
    }

    /// Of the layers of one kind: `kind` is the entry of a `rope_parameters` that has one for each; what is said without a
    /// kind is for those with full attention. `rope_scaling` counts where both are there; `theta` holds where config.json
    /// says nothing.
    pub(super) fn from_fields(f: &Fields<'_>, kind: &str, theta: f64, head_dim: usize) -> Result<Self> {
        let outer = f.opt_number("rope_theta")?;
        let (mut said, mut rope) = (outer, None);
        for field in ["rope_parameters", "rope_scaling"] {
            let Some(whole) = f.object(field)? else { continue };
            let part = match whole.object(kind)? {
                Some(nested) => nested,
                None if kind == FULL_ATTENTION => whole,
                None => continue,
            };
            match (said, part.opt_number("rope_theta")?) {
                (Some(one), Some(other)) if one != other && kind == FULL_ATTENTION => {
                    let why = format!("rope_theta is {other} here and {one} at the top; make them equal");
                    return Err(f.bad(field, why));
                }
                (_, inner) => said = inner.or(said),
            }
            rope = Some(part);
        }
        let rotary_dim = rotary_dim(f, rope.as_ref(), head_dim)?;
        let scaling = rope.map_or(Ok(RopeScaling::Default), |rope| scaling(f, &rope, rotary_dim))?;
        Self { theta: said.unwrap_or(theta), rotary_dim, scaling }.checked(f, "rope_theta")
    }

    /// Refuses a base that makes no waves; `field` is where it stands.
    pub(super) fn checked(self, f: &Fields<'_>, field: &str) -> Result<Self> {
        if !(1.0..=1e12).contains(&self.theta) {
            return Err(f.bad(field, format!("{} must lie between 1 and 1e12", self.theta)));
        }
        Ok(self)
    }
}

fn rotary_dim(f: &Fields<'_>, rope: Option<&Fields<'_>>, head_dim: usize) -> Result<usize> {
    let inner = rope.map(|r| r.opt_number("partial_rotary_factor")).transpose()?.flatten();
    let Some(factor) = inner.or(f.opt_number("partial_rotary_factor")?) else { return Ok(head_dim) };
    let dim = (head_dim as f64 * factor) as usize;
    if !(factor > 0.0 && factor <= 1.0) || dim < 2 || !dim.is_multiple_of(2) {
        let why = format!("{factor} of a head of {head_dim} is no even number of elements from 2 to {head_dim}");
        return Err(f.bad("partial_rotary_factor", why));
    }
    Ok(dim)
}

fn scaling(f: &Fields<'_>, rope: &Fields<'_>, rotary_dim: usize) -> Result<RopeScaling> {
    let positions = f.count("max_position_embeddings", super::config::MAX_ABSURD)?;
    let trained = || -> Result<usize> {
        let field = "original_max_position_embeddings";
        let outer = f.opt_count(field, super::config::MAX_ABSURD)?;
        Ok(outer.or(rope.opt_count(field, super::config::MAX_ABSURD)?).unwrap_or(positions))
    };
    let optional = |field: &str| rope.opt_factor(field);
    let number = |field: &str| -> Result<f64> { optional(field)?.ok_or_else(|| rope.missing(field)) };
    match rope.string("rope_type")?.or(rope.string("type")?) {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
        Some("dynamic") if rotary_dim > 2 => Ok(RopeScaling::Dynamic { factor: number("factor")?, trained: positions }),
        Some("llama3") => {
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low >= high {
                return Err(rope.bad("high_freq_factor", format!("{high} must be above low_freq_factor = {low}")));
            }
            let (factor, trained) = (number("factor")?, trained()?);
            Ok(RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, trained })
        }
        Some("yarn") if f.string("model_type")? != Some("phi3") => {
            let (factor, trained) = (number("factor")?, trained()?);
            let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let inferred = match (optional("mscale")?, optional("mscale_all_dim")?) {
                (Some(over), Some(under)) => mscale(over) / mscale(under),
                _ => mscale(1.0),
            };
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                truncate: rope.flag("truncate")?.unwrap_or(true),
                attention_factor: optional("attention_factor")?.unwrap_or(inferred),
                trained,
            })
        }
        // Phi-3's first configs called it su, and yarn.
        Some("longrope" | "su" | "yarn") => {
            let trained = trained()?;
            let factor = optional("factor")?.unwrap_or(positions as f64 / trained as f64);
            let inferred = || match trained {
                _ if factor <= 1.0 => Ok(1.0),
                1 => Err(rope.bad("attention_factor", "missing, and original_max_position_embeddings = 1 tells none")),
                _ => Ok((1.0 + factor.ln() / (trained as f64).ln()).sqrt()),
            };
            Ok(RopeScaling::LongRope {
                short_factor: factors(rope, "short_factor", rotary_dim / 2)?,
                long_factor: factors(rope, "long_factor", rotary_dim / 2)?,
                attention_factor: optional("attention_factor")?.map_or_else(inferred, Ok)?,
                trained,
            })
        }
        Some(kind) => {
            let what = format!("rope_type {kind:?} (supported: default, linear, dynamic, llama3, yarn, longrope)");
            Err(Error::Unsupported { op: "config.json", what })
        }
    }
}

fn factors(rope: &Fields<'_>, field: &str, len: usize) -> Result<Vec<f64>> {
    let list = rope.numbers(field)?.ok_or_else(|| rope.missing(field))?;
    if list.len() != len || !list.iter().all(|x| FACTORS.contains(x)) {
        let why = format!("must be {len} numbers from 1e-6 to 1e6 (half of what is rotated), not {}", list.len());
        return Err(rope.bad(field, why));
    }
    Ok(list)
}

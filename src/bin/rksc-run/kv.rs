//! Flags of a KV budget. A flag that would change nothing beside the others is refused by its name.

use clap::{Args, ValueEnum};
use rksc::Result;
use rksc::backend::RkvVariant;
use rksc::config::EngineConfig;
use rksc::kv::budget::{Aggregation, KeepRule, KvBudget, KvLimit, KvPrompt};

use crate::common::refused;

#[derive(Args, Clone)]
pub(crate) struct KvArgs {
    /// Tokens whose KV a branch may keep behind its prompt, in each layer and KV head; the others are dropped. Not exact.
    #[arg(long, value_name = "N")]
    kv_budget: Option<usize>,
    /// Tokens that may come on top until the branch is cut back to its budget [default: half of the budget, at most 128,
    /// in whole blocks].
    #[arg(long, value_name = "M")]
    kv_buffer: Option<usize>,
    /// What stays at a cut: rkv (attended to by the last tokens, and no repetition), snapkv (attended to by the last
    /// tokens), h2o (attended to by all so far, and the newer half), streaming (the newest), random [default: rkv].
    #[arg(long, value_name = "METHOD", hide_possible_values = true)]
    kv_method: Option<Method>,
    /// The published form of rkv: its code, its text, or its Algorithm 1 (which keeps the window on top of the budget)
    /// [default: code].
    #[arg(long, hide_possible_values = true, value_name = "code|text|alg1")]
    kv_variant: Option<Variant>,
    /// Who chooses together: each head for itself, the heads of a layer, or all, so that whole tokens stay or go
    /// [default: head; with alg1 layer].
    #[arg(long, hide_possible_values = true, value_name = "head|layer|token")]
    kv_agg: Option<Agg>,
    /// Share of the attention in rkv's score; the rest is redundancy [default: 0.1].
    #[arg(long, value_name = "X")]
    kv_lambda: Option<f32>,
    /// Cosine above which two keys repeat each other for rkv [default: 0.5].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    kv_threshold: Option<f32>,
    /// Tokens over which rkv and snapkv pool attention; odd [default: 7].
    #[arg(long, value_name = "N")]
    kv_pool_size: Option<usize>,
    /// pin: the prompt stays and does not count. evict: it counts and is dropped like the rest, but for --kv-sinks; of a
    /// prompt that branches share nothing is ever dropped, so that this needs one continuation, or a policy that shares
    /// nothing [default: pin].
    #[arg(long, hide_possible_values = true, value_name = "pin|evict")]
    kv_prompt: Option<Prompt>,
    /// Leading tokens that stay under --kv-prompt evict [default: 4].
    #[arg(long, value_name = "N")]
    kv_sinks: Option<usize>,
    /// Key of --kv-method random [default: 0].
    #[arg(long, value_name = "SEED")]
    kv_seed: Option<u64>,
    /// Last tokens that always stay, and by whose attention rkv and snapkv judge the others, 1 to 64 [default: 8].
    #[arg(long, value_name = "N")]
    kv_window: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    Rkv,
    Snapkv,
    H2o,
    Streaming,
    Random,
}

#[derive(Clone, Copy, ValueEnum)]
enum Variant {
    Code,
    Text,
    Alg1,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Agg {
    Head,
    Layer,
    Token,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Prompt {
    Pin,
    Evict,
}

impl KvArgs {
    /// The budget, if one was given. `engine` gets the window.
    pub(crate) fn limit(&self, engine: &mut EngineConfig) -> Result<Option<KvLimit>> {
        engine.kv_window = self.kv_window.unwrap_or(engine.kv_window);
        engine.validate()?;
        let Some(budget) = self.kv_budget else {
            return match self.given().into_iter().find(|(_, is_given)| *is_given) {
                Some((flag, _)) => Err(refused(flag, "changes nothing without a budget; give --kv-budget N too")),
                None => Ok(None),
            };
        };
        self.refuse_idle(budget, engine.kv_window)?;
        let base = KvLimit::new(budget);
        let limit = KvLimit {
            // As a number, because the record of the run does not know the block size.
            buffer: Some(self.kv_buffer.unwrap_or_else(|| KvBudget::default_buffer(budget, engine.block_size))),
            prompt: match self.kv_prompt {
                Some(Prompt::Evict) => KvPrompt::Evict,
                Some(Prompt::Pin) | None => KvPrompt::Pin,
            },
            sinks: self.kv_sinks.unwrap_or(base.sinks),
            rule: self.rule(),
            aggregation: match (self.kv_agg, self.kv_variant) {
                (Some(Agg::Token), _) => Aggregation::Token,
                (Some(Agg::Layer), _) | (None, Some(Variant::Alg1)) => Aggregation::Layer,
                (Some(Agg::Head) | None, _) => Aggregation::Head,
            },
            ..base
        };
        limit.for_prompt(0, engine.block_size).validate(engine.kv_window)?;
        Ok(Some(limit))
    }

    fn given(&self) -> [(&'static str, bool); 11] {
        [
            ("kv-buffer", self.kv_buffer.is_some()),
            ("kv-method", self.kv_method.is_some()),
            ("kv-variant", self.kv_variant.is_some()),
            ("kv-agg", self.kv_agg.is_some()),
            ("kv-lambda", self.kv_lambda.is_some()),
            ("kv-threshold", self.kv_threshold.is_some()),
            ("kv-pool-size", self.kv_pool_size.is_some()),
            ("kv-prompt", self.kv_prompt.is_some()),
            ("kv-sinks", self.kv_sinks.is_some()),
            ("kv-seed", self.kv_seed.is_some()),
            ("kv-window", self.kv_window.is_some()),
        ]
    }

    fn method(&self) -> Method {
        self.kv_method.unwrap_or(Method::Rkv)
    }

    fn rule(&self) -> KeepRule {
        let pool_size = self.kv_pool_size.unwrap_or(7);
        match self.method() {
            Method::Rkv => KeepRule::RKv {
                variant: match self.kv_variant {
                    Some(Variant::Text) => RkvVariant::Text,
                    Some(Variant::Alg1) => RkvVariant::Alg1,
                    Some(Variant::Code) | None => RkvVariant::Code,
                },
                lambda: self.kv_lambda.unwrap_or(0.1),
                threshold: self.kv_threshold.unwrap_or(0.5),
                pool_size,
            },
            Method::Snapkv => KeepRule::SnapKv { pool_size },
            Method::H2o => KeepRule::H2o,
            Method::Streaming => KeepRule::Streaming,
            Method::Random => KeepRule::Random { seed: self.kv_seed.unwrap_or(0) },
        }
    }

    /// Refuses the first flag that the others leave without an effect.
    fn refuse_idle(&self, budget: usize, window: usize) -> Result<()> {
        let method = self.method();
        let idle = |flag: &str, is_idle: bool, why: &str| if is_idle { Err(refused(flag, why)) } else { Ok(()) };
        let (is_rkv, is_streaming) = (method == Method::Rkv, method == Method::Streaming);
        let pools = is_rkv || method == Method::Snapkv;
        idle("kv-variant", self.kv_variant.is_some() && !is_rkv, "is of --kv-method rkv; drop one of the two")?;
        idle("kv-lambda", self.kv_lambda.is_some() && !is_rkv, "is of --kv-method rkv; drop one of the two")?;
        idle("kv-threshold", self.kv_threshold.is_some() && !is_rkv, "is of --kv-method rkv; drop one of the two")?;
        idle(
            "kv-threshold",
            self.kv_threshold.is_some() && self.kv_lambda == Some(1.0),
            "judges redundancy, which has no share in the score at --kv-lambda 1; drop it, or lower the lambda",
        )?;
        idle(
            "kv-pool-size",
            self.kv_pool_size.is_some() && !pools,
            "is of --kv-method rkv and snapkv; drop it, or take one of these",
        )?;
        idle(
            "kv-pool-size",
            self.kv_pool_size.is_some() && self.kv_lambda == Some(0.0),
            "pools attention, which has no share in the score at --kv-lambda 0; drop it, or raise the lambda",
        )?;
        idle(
            "kv-seed",
            self.kv_seed.is_some() && method != Method::Random,
            "is of --kv-method random; drop it (--seed is the key of sampling)",
        )?;
        idle(
            "kv-agg",
            self.kv_agg.is_some() && is_streaming,
            "says who chooses together, and under --kv-method streaming all keep the same tokens; drop one of the two",
        )?;
        idle(
            "kv-agg",
            self.kv_agg == Some(Agg::Head) && matches!(self.kv_variant, Some(Variant::Alg1)),
            "head is not to be had with --kv-variant alg1, where a layer's heads choose together; use layer or token",
        )?;
        idle(
            "kv-sinks",
            self.kv_sinks.is_some() && self.kv_prompt != Some(Prompt::Evict),
            "are of --kv-prompt evict: a pinned prompt stays whole; drop them, or evict the prompt",
        )?;
        idle(
            "kv-window",
            self.kv_window.is_some() && is_streaming,
            "changes nothing under --kv-method streaming, which keeps the newest tokens anyway; drop one of the two",
        )?;
        idle(
            "kv-window",
            self.kv_window.is_some() && method == Method::H2o && window <= budget / 2,
            "changes nothing under --kv-method h2o, which keeps the newer half of the budget anyway; drop it, or give more \
             than that half",
        )
    }
}

//! What `generate`, `chat` and `batch` may be told of decoding beside how tokens are chosen: KV budgets, early exit, weights
//! in codes.

use clap::Args;
use rksc::Result;
use rksc::config::EngineConfig;
use rksc::engine::{BranchId, Engine, GenerateParams};
use rksc::gate::river::{River, RiverExit};
use rksc::kv::budget::{KvLimit, KvPrompt};
use rksc::report::kv::{KvTotals, limit_in_words};
use rksc::report::river::{exactness, river_in_words};
use serde_json::{Value, json};

use crate::common::{self, refused};
use crate::kv::KvArgs;
use crate::river::{RiverArgs, RiverReport};

#[derive(Args, Clone)]
pub(crate) struct DecodingArgs {
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    river: RiverArgs,
}

/// What the flags ask for.
pub(crate) struct Decoding {
    pub(crate) limit: Option<KvLimit>,
    river: Option<River>,
}

impl DecodingArgs {
    /// Checks the flags against each other; `config` gets what the engine must know when it opens.
    pub(crate) fn apply(&self, config: &mut EngineConfig) -> Result<Decoding> {
        let limit = self.kv.limit(config)?;
        let river = self.river.policy(false, config)?;
        if limit.is_some() {
            river.iter().try_for_each(River::check_budget)?;
        }
        Ok(Decoding { limit, river })
    }
}

impl Decoding {
    /// Opens the engine, and says on stderr what it runs on.
    pub(crate) fn open(&self, config: EngineConfig) -> Result<Engine> {
        let mut engine = common::open(config)?;
        engine.set_river(self.river)?;
        Ok(engine)
    }

    /// A draft settles several tokens in a step, and only the last one's row is kept.
    pub(crate) fn check_top_logprobs(&self, flag: &str) -> Result<()> {
        match self.river.map(|river| river.exit) {
            Some(RiverExit::Draft(_)) => {
                Err(refused(flag, "is not to be had under --river draft; drop one of the two"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses continuations that share a prompt of which something is to be dropped.
    pub(crate) fn check_shared(&self, way_out: &str) -> Result<()> {
        match &self.limit {
            Some(limit) if limit.prompt == KvPrompt::Evict => {
                let why = format!("evict drops nothing of a prompt that continuations share; {way_out}");
                Err(refused("kv-prompt", why))
            }
            _ => Ok(()),
        }
    }

    /// Lets a branch go on from a prompt of `num_prompt_tokens`.
    pub(crate) fn start(
        &self,
        engine: &mut Engine,
        branch: BranchId,
        num_prompt_tokens: usize,
        params: &GenerateParams,
    ) -> Result<()> {
        if let Some(limit) = &self.limit {
            engine.limit_kv(branch, limit.for_prompt(num_prompt_tokens, engine.config().block_size))?;
        }
        engine.start(branch, params.clone())?;
        if params.max_new_tokens > 0 {
            engine.exit_prompt(branch)?;
        }
        Ok(())
    }

    /// For `--json`, as fields `kv`, `river` and `quantise`.
    pub(crate) fn describe(&self, engine: &Engine, totals: Option<&KvTotals>, into: &mut Value) {
        let window = engine.config().kv_window;
        into["kv"] = self.limit.as_ref().map_or(Value::Null, |limit| match totals {
            Some(totals) => json!({"limit": limit, "window": window, "totals": totals}),
            None => json!({"limit": limit, "window": window}),
        });
        into["river"] = json!(RiverReport::of(engine));
        into["quantise"] = json!(engine.config().quantise);
    }

    /// On stderr, whatever is not exact.
    pub(crate) fn say(&self, engine: &Engine, totals: Option<&KvTotals>) {
        if let Some(limit) = &self.limit {
            let totals = totals.map(|totals| format!("; {totals}")).unwrap_or_default();
            eprintln!("KV budget, not exact: {}{totals}", limit_in_words(limit));
        }
        if let Some(RiverReport { policy, totals, .. }) = RiverReport::of(engine) {
            eprintln!("River, {}: {}; {totals}", exactness(&policy), river_in_words(&policy));
        }
    }
}

//! Flags of weights in codes. A flag that would change nothing beside the others is refused by its name.

use clap::Args;
use rksc::Result;
use rksc::config::EngineConfig;
use rksc::quant::{CodeBits, QuantOptions, Quantiser};

use crate::common::refused;

/// How codes are made.
#[derive(Args, Clone)]
pub(crate) struct QuantArgs {
    /// How 4-bit codes are found: rtn (to nearest), hqq (zeros that fit best), gptq (on the activations of a text; see
    /// `rksc-run quantise`) [default: hqq].
    #[arg(long, value_name = "METHOD")]
    quantiser: Option<Quantiser>,
    /// Neighbours in a row that share a scale and a zero: 32, 64 or 128 [default: 64].
    #[arg(long, value_name = "N")]
    quant_group: Option<usize>,
    /// Bits of the k and v projections, whose errors stay in the KV cache: 4 or 8 [default: 4].
    #[arg(long, value_name = "BITS")]
    quant_kv_bits: Option<CodeBits>,
}

/// Who wants codes.
pub(crate) struct Wanted {
    /// A second weight set, by `--river`.
    pub(crate) river: bool,
    /// The whole model, by `--quantise`.
    pub(crate) quantise: bool,
}

impl QuantArgs {
    /// Whoever makes codes with them refuses those that cannot be.
    pub(crate) fn options(&self) -> QuantOptions {
        let base = QuantOptions::default();
        QuantOptions {
            quantiser: self.quantiser.unwrap_or(base.quantiser),
            group: self.quant_group.unwrap_or(base.group),
            kv_bits: self.quant_kv_bits.unwrap_or(base.kv_bits),
        }
    }

    /// Sets what `wanted` says.
    pub(crate) fn apply(&self, wanted: &Wanted, engine: &mut EngineConfig) -> Result<()> {
        if wanted.river && wanted.quantise {
            let why = "and --river both take the model in codes: leaving the one for the other would change nothing; drop \
                       one of the two";
            return Err(refused("quantise", why));
        }
        if let (false, Some(flag)) = (wanted.river || wanted.quantise, self.given()) {
            return Err(refused(flag, "changes nothing without codes; give --river or --quantise too"));
        }
        let options = self.options();
        engine.river = wanted.river.then_some(options);
        engine.quantise = wanted.quantise.then_some(options);
        Ok(())
    }

    /// The first flag that was given.
    fn given(&self) -> Option<&'static str> {
        let flags = [
            ("quantiser", self.quantiser.is_some()),
            ("quant-group", self.quant_group.is_some()),
            ("quant-kv-bits", self.quant_kv_bits.is_some()),
        ];
        flags.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }
}

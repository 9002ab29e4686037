//! Which quantiser, in what groups, and what k and v get.

use std::fmt;
use std::str::FromStr;

use super::CodeBits;
use crate::error::{Error, Result};

/// How codes are found for weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantiser {
    /// Every weight to its nearest code; integer zeros.
    Rtn,
    /// Half-quadratic: the zero of a group moves until the weights fit best; fractional zeros.
    #[default]
    Hqq,
    /// Data-aware: what a column loses, the columns after it make good on the activations of a text; integer zeros.
    Gptq,
}

impl Quantiser {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rtn, Self::Hqq, Self::Gptq];
}

impl fmt::Display for Quantiser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rtn => "rtn",
            Self::Hqq => "hqq",
            Self::Gptq => "gptq",
        })
    }
}

impl FromStr for Quantiser {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let unknown = || Error::config("quantiser", format!("{s:?} is unknown; use rtn, hqq or gptq"));
        Self::ALL.into_iter().find(|q| q.to_string() == s).ok_or_else(unknown)
    }
}

impl fmt::Display for CodeBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bits())
    }
}

impl FromStr for CodeBits {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "4" => Ok(Self::W4),
            "8" => Ok(Self::W8),
            other => Err(Error::config("quant-kv-bits", format!("{other:?} is not supported; use 4 or 8"))),
        }
    }
}

/// What codes are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct QuantOptions {
    /// How codes are found. Matrices in 8 bits are rounded to nearest whatever it is.
    pub quantiser: Quantiser,
    /// Neighbours along k that share a scale and a zero: 32, 64 or 128.
    pub group: usize,
    /// Bits of k_proj and v_proj, the only weights that enter the KV cache; the others have 4.
    pub kv_bits: CodeBits,
}

impl Default for QuantOptions {
    fn default() -> Self {
        Self { quantiser: Quantiser::default(), group: 64, kv_bits: CodeBits::W4 }
    }
}

impl QuantOptions {
    /// Refuses groups that no backend computes with.
    pub fn validate(&self) -> Result<()> {
        if ![32, 64, 128].contains(&self.group) {
            return Err(Error::config("quant-group", format!("{} is not supported; use 32, 64 or 128", self.group)));
        }
        Ok(())
    }
}

impl fmt::Display for QuantOptions {
    /// As in a file's name: `hqq-g64`, `rtn-g128-kv8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-g{}", self.quantiser, self.group)?;
        if self.kv_bits == CodeBits::W8 { f.write_str("-kv8") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_read_written_and_serialised() {
        for quantiser in Quantiser::ALL {
            let name = quantiser.to_string();
            assert_eq!(name.parse::<Quantiser>().unwrap(), quantiser);
            assert_eq!(serde_json::to_string(&quantiser).unwrap(), format!("{name:?}"));
        }
        let error = "awq".parse::<Quantiser>().unwrap_err().to_string();
        assert_eq!(error, "quantiser: \"awq\" is unknown; use rtn, hqq or gptq");
        assert!("5".parse::<CodeBits>().is_err());
        assert_eq!(QuantOptions::default().to_string(), "hqq-g64");
        assert_eq!(QuantOptions { kv_bits: CodeBits::W8, ..QuantOptions::default() }.to_string(), "hqq-g64-kv8");
    }
}

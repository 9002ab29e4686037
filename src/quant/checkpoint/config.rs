//! `quantization_config` of config.json: which format it is, and one line by the name of the field where it is none that
//! is read. Fields that say how the codes were found (`damp_percent`, `dataset`, ...) or how others are to run them do not
//! matter.

use std::fmt::Display;

use super::CheckpointFormat;
use crate::error::{Error, Result};
use crate::model::fields::Fields;
use crate::quant::CodeBits;

const WAY_OUT: &str = "take another checkpoint of the model, or its bf16 one";

impl CheckpointFormat {
    /// What `quantization_config` says; a variant that is not read is refused by the field that names it.
    pub(crate) fn from_fields(f: &Fields<'_>) -> Result<Self> {
        for field in ["kv_cache_scheme", "kv_cache_quant_algo", "quantize_kv_cache"] {
            off(f, field, "KV cache scales are not read")?;
        }
        match f.string("quant_method")? {
            Some("gptq") => gptq(f),
            Some("awq") => awq(f),
            Some("fp8" | "fbgemm_fp8") => fp8(f),
            Some("compressed-tensors") => compressed_tensors(f),
            Some(other) => {
                let why = format!("{other:?} is not read; gptq, awq, fp8 and compressed-tensors are: {WAY_OUT}");
                Err(f.bad("quant_method", why))
            }
            None => Err(f.missing("quant_method")),
        }
    }
}

fn gptq(f: &Fields<'_>) -> Result<CheckpointFormat> {
    let bits = match f.count("bits", 64)? {
        4 => CodeBits::W4,
        8 => CodeBits::W8,
        other => return Err(not_read(f, "bits", other, "4 and 8 are")),
    };
    off(f, "dynamic", "rules for single modules are not read")?;
    off(f, "is_marlin_format", "weights in marlin's order are not read")?;
    off(f, "lm_head", "an lm_head in codes is not read")?;
    one_of(f, "pack_dtype", &["int32"])?;
    // The older name of the same.
    let field = if f.is_set("checkpoint_format") { "checkpoint_format" } else { "format" };
    let zeros_less_one = one_of(f, field, &["gptq", "gptq_v2"])? != Some("gptq_v2");
    let symmetric = f.flag("sym")?.unwrap_or(true);
    if !symmetric && bits == CodeBits::W8 {
        return Err(not_read(f, "sym", false, "in 8 bits true is"));
    }
    Ok(CheckpointFormat::Gptq { bits, group: group(f)?, symmetric, zeros_less_one })
}

fn awq(f: &Fields<'_>) -> Result<CheckpointFormat> {
    match f.count("bits", 64)? {
        4 => {}
        other => return Err(not_read(f, "bits", other, "4 is")),
    }
    one_of(f, "version", &["gemm"])?;
    if f.flag("zero_point")? == Some(false) {
        return Err(not_read(f, "zero_point", false, "true is"));
    }
    Ok(CheckpointFormat::Awq { group: group(f)? })
}

fn fp8(f: &Fields<'_>) -> Result<CheckpointFormat> {
    one_of(f, "fmt", &["e4m3", "float8_e4m3fn"])?;
    one_of(f, "activation_scheme", &["dynamic", "static"])?;
    fp8_of(f, "weight_block_size")
}

fn fp8_of(f: &Fields<'_>, field: &str) -> Result<CheckpointFormat> {
    let block = f.pair(field)?;
    match block {
        Some([_, columns]) if !columns.is_multiple_of(32) => {
            Err(not_read(f, field, columns, "blocks of a multiple of 32 columns are"))
        }
        _ => Ok(CheckpointFormat::Fp8 { block }),
    }
}

fn compressed_tensors(f: &Fields<'_>) -> Result<CheckpointFormat> {
    let format = one_of(f, "format", &["float-quantized", "naive-quantized", "pack-quantized"])?;
    one_of(f, "quantization_status", &["compressed"])?;
    off(f, "transform_config", "transforms of activations are not read")?;
    if let Some(sparsity) = f.object("sparsity_config")? {
        one_of(&sparsity, "format", &["dense"])?;
    }
    let groups = f.object("config_groups")?.ok_or_else(|| f.missing("config_groups"))?;
    let mut names = groups.names();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err(f.bad("config_groups", format!("one group of modules is read: {WAY_OUT}")));
    };
    let group_of = groups.object(name)?.ok_or_else(|| groups.missing(name))?;
    off(&group_of, "output_activations", "rounded outputs are not read")?;
    let weights = group_of.object("weights")?.ok_or_else(|| group_of.missing("weights"))?;
    off(&weights, "dynamic", "weights have their scales in the file")?;
    if format == Some("pack-quantized") { packed(&weights) } else { floats(&weights) }
}

fn packed(weights: &Fields<'_>) -> Result<CheckpointFormat> {
    one_of(weights, "type", &["int"])?;
    match weights.count("num_bits", 64)? {
        4 => {}
        other => return Err(not_read(weights, "num_bits", other, "4 is")),
    }
    if weights.flag("symmetric")? == Some(false) {
        return Err(not_read(weights, "symmetric", false, "true is"));
    }
    let group = match one_of(weights, "strategy", &["group", "channel"])? {
        Some("channel") => None,
        _ => group(weights)?,
    };
    Ok(CheckpointFormat::Packed { group })
}

fn floats(weights: &Fields<'_>) -> Result<CheckpointFormat> {
    one_of(weights, "type", &["float"])?;
    match weights.count("num_bits", 64)? {
        8 => {}
        other => return Err(not_read(weights, "num_bits", other, "8 is")),
    }
    match one_of(weights, "strategy", &["tensor", "channel", "block"])? {
        Some("block") => fp8_of(weights, "block_structure"),
        _ => Ok(CheckpointFormat::Fp8 { block: None }),
    }
}

/// `group_size`: -1 is a whole row.
fn group(f: &Fields<'_>) -> Result<Option<usize>> {
    if f.is_minus_one("group_size") {
        return Ok(None);
    }
    match f.count("group_size", 1 << 20)? {
        size if size.is_multiple_of(32) => Ok(Some(size)),
        other => Err(not_read(f, "group_size", other, "-1 and multiples of 32 are")),
    }
}

/// The field's value, which must be one of `read` where it is there; capitals do not matter.
fn one_of(f: &Fields<'_>, field: &str, read: &[&'static str]) -> Result<Option<&'static str>> {
    let Some(found) = f.string(field)? else { return Ok(None) };
    match read.iter().find(|one| one.eq_ignore_ascii_case(found)) {
        Some(one) => Ok(Some(one)),
        None => {
            let found: String = found.chars().take(40).collect();
            Err(not_read(f, field, format!("{found:?}"), &format!("{} {}", read.join(", "), are(read.len()))))
        }
    }
}

fn are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}

/// Refuses a field that says anything.
fn off(f: &Fields<'_>, field: &str, why: &str) -> Result<()> {
    if f.is_set(field) { Err(f.bad(field, format!("{why}: {WAY_OUT}"))) } else { Ok(()) }
}

fn not_read(f: &Fields<'_>, field: &str, found: impl Display, read: &str) -> Error {
    f.bad(field, format!("{found} is not read; {read}: {WAY_OUT}"))
}

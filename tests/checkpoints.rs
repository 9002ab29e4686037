//! Checkpoints in codes, as tests/checkpoints/make.py writes them: weights bit for bit, logits through the engine, and what
//! is refused by name.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use rksc::engine::{Engine, PrefillOptions, SecondSet};
use rksc::model::family::ModelConfig;
use rksc::model::weights::{TensorData, WeightStore};
use rksc::quant::{CodeBits, QuantOptions, QuantWeights, Survey, ZeroKind};
use rksc::{DType, EngineConfig, Error, ModelSource, Result};
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

/// What the script wrote.
const NAMES: [&str; 9] =
    ["gptq", "gptq-act-order", "gptq-v2", "gptq-8-bit", "awq", "packed", "fp8-tensor", "fp8-channel", "fp8-block"];

fn folder(name: &str) -> PathBuf {
    common::path("tests/checkpoints").join(name)
}

fn open(dir: &Path) -> Result<(ModelConfig, WeightStore, QuantWeights)> {
    let (model, store) = (ModelConfig::from_dir(dir)?, WeightStore::open(dir)?);
    let codes = QuantWeights::from_checkpoint(&model, &store)?.expect("config.json names a quantization_config");
    Ok((model, store, codes))
}

fn expected() -> serde_json::Value {
    serde_json::from_str(&common::read(&folder("expected.json"))).unwrap()
}

/// Every matrix of the checkpoint `name`, as it is in `dir`.
fn check_weights(name: &str, dir: &Path) {
    let (_, _, codes) = open(dir).unwrap();
    let expected = &expected()[name];
    let matrices = expected.as_object().unwrap();
    assert_eq!(codes.iter().count(), matrices.len(), "{name}");
    assert!(matrices.len() >= 6);
    assert_eq!(codes.options(), None);
    for (matrix, expected) in matrices {
        let tensor = codes.get(matrix).unwrap_or_else(|| panic!("{name}: {matrix} is not in codes"));
        tensor.validate().unwrap();
        let bits: Vec<u32> = tensor.dequantise().iter().map(|w| w.to_bits()).collect();
        for (at, expected) in expected["bits"].as_object().unwrap() {
            let at: usize = at.parse().unwrap();
            assert_eq!(u64::from(bits[at]), expected.as_u64().unwrap(), "{name}: element {at} of {matrix}");
        }
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, expected["sha256"].as_str().unwrap(), "{name}: {matrix}");
    }
}

#[test]
fn weights_are_the_scripts_bit_for_bit() {
    for name in NAMES {
        check_weights(name, &folder(name));
        // The same a byte further on: nothing lies on its boundary.
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(folder(name).join("model.safetensors")).unwrap();
        let len = u64::from_le_bytes(whole[..8].try_into().unwrap());
        let (header, data) = whole[8..].split_at(len as usize);
        let shifted = [&(len + 1).to_le_bytes()[..], header, b" ", data].concat();
        std::fs::write(dir.path().join("model.safetensors"), shifted).unwrap();
        write_config(dir.path(), &config_of(&folder(name), |_| ()));
        check_weights(name, dir.path());
    }
}

#[test]
fn codes_take_what_their_format_takes_and_stay_where_they_can() {
    let of = |name: &str, matrix: &str| {
        let (_, _, codes) = open(&folder(name)).unwrap();
        codes.get(&format!("model.layers.0.{matrix}_proj.weight")).unwrap().clone()
    };
    let form = |name: &str| {
        let w = of(name, "mlp.down");
        (w.bits, w.group, w.zero_kind, w.columns.is_some())
    };
    assert_eq!(form("gptq"), (CodeBits::W4, 32, ZeroKind::None, false));
    assert_eq!(form("gptq-act-order"), (CodeBits::W4, 32, ZeroKind::Integer, true));
    assert_eq!(form("gptq-v2"), (CodeBits::W4, 64, ZeroKind::Integer, false));
    assert_eq!(form("gptq-8-bit"), (CodeBits::W8, 64, ZeroKind::None, false));
    assert_eq!(form("awq"), (CodeBits::W4, 64, ZeroKind::Integer, false));
    assert_eq!(form("packed"), (CodeBits::W4, 32, ZeroKind::None, true));
    assert_eq!(form("fp8-tensor"), (CodeBits::F8, 64, ZeroKind::None, false));
    assert_eq!(of("fp8-block", "mlp.gate").group, 32);
    for (name, matrix) in [("fp8-block", "mlp.up"), ("fp8-channel", "self_attn.q"), ("packed", "self_attn.q")] {
        assert!(matches!(of(name, matrix).codes, TensorData::Mapped { .. }), "{name} {matrix} was copied");
    }
    assert_eq!(of("fp8-block", "self_attn.q").num_bytes(), 64 * 160 + 4 * 64 * 5);
}

/// The checkpoint's folder with every projection dense in f32.
fn dense_twin(dir: &Path, to: &Path) {
    let (model, store, codes) = open(dir).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = model
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let tensor = match codes.get(&name) {
                Some(codes) => codes.to_dense(DType::F32),
                None => store.get(&name, &shape).unwrap().cast(DType::F32),
            };
            (name, shape, tensor.bytes().to_vec())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    write_config(to, &config_of(dir, |config| drop(config.remove("quantization_config"))));
}

type Object = serde_json::Map<String, serde_json::Value>;

fn config_of(dir: &Path, change: impl FnOnce(&mut Object)) -> Object {
    let mut config: Object = serde_json::from_str(&common::read(&dir.join("config.json"))).unwrap();
    change(&mut config);
    config
}

fn write_config(dir: &Path, config: &Object) {
    std::fs::write(dir.join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
}

fn config(dir: &Path, device: &str, dtype: DType, simd: &str) -> EngineConfig {
    EngineConfig {
        model: ModelSource::Dir(dir.to_owned()),
        device: device.into(),
        dtype,
        simd: simd.into(),
        threads: 2,
        kv_cache_memory: Some(4 << 20),
        max_batch_tokens: 64,
        ..EngineConfig::default()
    }
}

/// Logits after a prompt of more rows than a launch takes, and after each of three tokens behind it.
fn logits(engine: &mut Engine) -> Vec<f32> {
    let vocab = engine.model().vocab_size as u32;
    let prompt: Vec<u32> = (0..21).map(|i| (7 * i + 3) % vocab).collect();
    let all: Vec<u32> = (0..vocab).collect();
    let branch = engine.prefill(&prompt, PrefillOptions::default()).unwrap();
    engine.watch(branch, &all, 0).unwrap();
    let mut logits = Vec::new();
    for next in [4, 19, 30, 2] {
        while engine.has_work() {
            engine.step().unwrap();
        }
        let row = engine.row(branch).unwrap().expect("the branch has run");
        logits.extend(row.watched.iter().map(|log_p| log_p + row.stats.lse));
        engine.append(branch, &[next]).unwrap();
    }
    logits
}

fn norm(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// RV10's bound, on what comes out at the end.
fn assert_near(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    let off = norm(got.iter().zip(want).map(|(a, b)| a - b)) / norm(want.iter().copied());
    assert!(off < 2e-3, "{what}: logits are off by {off:e}");
}

#[test]
fn logits_are_those_of_the_dense_weights_on_every_device() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        dense_twin(&folder(name), dir.path());
        let of = |dir: &Path, device: &str, dtype, simd: &str| {
            logits(&mut Engine::open(config(dir, device, dtype, simd)).unwrap())
        };
        let want = of(dir.path(), "cpu", DType::F32, "portable");
        for simd in common::simd_levels() {
            let got = of(&folder(name), "cpu", DType::F32, &simd);
            assert_near(&format!("{name}, cpu, {simd}"), &got, &want);
            // Rounded activations: the same weights, so the same roundings but for a few.
            let (got, dense) = (of(&folder(name), "cpu", DType::F16, &simd), of(dir.path(), "cpu", DType::F16, &simd));
            assert_near(&format!("{name}, cpu, f16, {simd}"), &got, &dense);
        }
        let got = of(&folder(name), "emulated", DType::F16, "auto");
        assert_near(&format!("{name}, emulated, f16"), &got, &want);
        let got = of(&folder(name), "emulated", DType::Bf16, "auto");
        let cpu = of(&folder(name), "cpu", DType::Bf16, "portable");
        let off = norm(got.iter().zip(&cpu).map(|(a, b)| a - b)) / norm(cpu.iter().copied());
        assert!(off < 1e-2, "{name}, emulated, bf16: off by {off:e}");
    }
}

#[test]
fn a_checkpoint_in_codes_may_be_the_second_set_of_its_dense_twin() {
    let dir = tempfile::tempdir().unwrap();
    dense_twin(&folder("gptq-act-order"), dir.path());
    let (_, _, codes) = open(&folder("gptq-act-order")).unwrap();
    let config = config(dir.path(), "cpu", DType::F32, "auto");
    let (model, store) = Engine::load(&config).unwrap();
    let second = SecondSet::Codes(&codes);
    let mut engine = Engine::with_second_set(config.clone(), model.clone(), &store, second).unwrap();
    let want = logits(&mut Engine::with_weights(config, model, &store).unwrap());
    assert_eq!(logits(&mut engine), want, "nobody goes to the second set");
}

#[test]
fn codes_are_not_quantised_again() {
    let base = config(&folder("awq"), "cpu", DType::F32, "auto");
    let options = QuantOptions { group: 32, ..QuantOptions::default() };
    let whole = EngineConfig { quantise: Some(options), ..base.clone() };
    let river = EngineConfig { river: Some(options), ..base.clone() };
    for config in [whole, river] {
        let e = Engine::open(config).map(drop).unwrap_err().to_string();
        assert!(e.contains("in codes already (awq, 4 bits in groups of 64)") && e.contains("--river"), "{e}");
    }
    let e = Engine::make_codes(&base, options, &[]).map(drop).unwrap_err().to_string();
    assert!(e.contains("in codes already"), "{e}");
    let (model, store, codes) = open(&folder("awq")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(codes.write(&dir.path().join("x.codes"), &model, &store), Err(Error::Config { .. })));
}

// ---- the program ---------------------------------------------------------------------------------------------------------

fn program(args: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_rksc-run")).args(args).output().unwrap();
    (out.status.success(), format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
}

#[test]
fn the_program_shows_format_and_bytes() {
    for name in NAMES {
        let dir = folder(name);
        let (model, store, codes) = open(&dir).unwrap();
        let dir = dir.to_str().unwrap();
        let (ok, text) = program(&["inspect", "-m", dir, "--json"]);
        assert!(ok, "{text}");
        let json: serde_json::Value = serde_json::from_str(text.lines().collect::<String>().as_str()).unwrap();
        assert_eq!(json["code_bytes"], codes.num_bytes(), "{name}");
        assert_eq!(json["num_code_matrices"], codes.iter().count());
        assert_eq!(json["problems"], serde_json::json!([]));
        let survey = Survey::new(&model, &store);
        assert_eq!(json["weight_bytes"], survey.code_bytes + survey.dense_bytes);
        let engine = Engine::open(config(&folder(name), "cpu", DType::F16, "auto")).unwrap();
        assert_eq!(engine.info().weight_bytes, survey.code_bytes + survey.dense_bytes);
        let format = model.quantization.unwrap().to_string();
        let (_, text) = program(&["inspect", "-m", dir]);
        assert!(text.contains(&format), "{text}");
        let (ok, text) = program(&["plan", "-m", dir, "--kv-cache-memory", "4MiB"]);
        assert!(ok && text.contains("projections in codes") && text.contains(&format), "{text}");
        let (bytes, weights) = model.quantization.unwrap().num_bytes(&model);
        assert!(weights > 0);
        if codes.iter().count() == 7 {
            assert_eq!(bytes, codes.num_bytes(), "{name}: what a plan says is what is there");
        }
    }
    for flag in ["--quantise", "--river=draft"] {
        let dir = folder("gptq");
        let (ok, text) = program(&["plan", "-m", dir.to_str().unwrap(), flag]);
        assert!(!ok && text.contains("in codes already (gptq, 4 bits in groups of 32)"), "{flag}: {text}");
    }
}

// ---- refusals ------------------------------------------------------------------------------------------------------------

/// What reading `quantization_config` says.
fn refused(name: &str, path: &[&str], value: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let config = config_of(&folder(name), |config| {
        let mut at = &mut config["quantization_config"];
        for field in &path[..path.len() - 1] {
            at = &mut at[*field];
        }
        at[path[path.len() - 1]] = serde_json::from_str(value).unwrap();
    });
    write_config(dir.path(), &config);
    match ModelConfig::from_dir(dir.path()) {
        Ok(_) => panic!("{name}: {path:?} = {value} was read"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn variants_that_are_not_read_are_refused_by_the_name_of_their_field() {
    let weights = |field| ["config_groups", "group_0", "weights", field];
    let cases: &[(&str, &[&str], &str, &str)] = &[
        ("gptq", &["quant_method"], "\"bitsandbytes\"", "quant_method: \"bitsandbytes\" is not read"),
        ("gptq", &["quant_method"], "\"hqq\"", "quant_method: \"hqq\""),
        ("gptq", &["quant_method"], "null", "quant_method: missing"),
        ("gptq", &["bits"], "3", "bits: 3 is not read; 4 and 8 are"),
        ("gptq", &["bits"], "2", "bits: 2"),
        ("gptq", &["bits"], "null", "bits: missing"),
        ("gptq", &["group_size"], "48", "group_size: 48 is not read; -1 and multiples of 32 are"),
        ("gptq", &["group_size"], "16", "group_size: 16"),
        ("gptq", &["group_size"], "0", "group_size: 0"),
        ("gptq", &["group_size"], "\"all\"", "group_size: \"all\""),
        ("gptq", &["checkpoint_format"], "\"marlin\"", "checkpoint_format: \"marlin\""),
        ("gptq", &["format"], "\"bitblas\"", "format: \"bitblas\""),
        ("gptq", &["pack_dtype"], "\"int16\"", "pack_dtype: \"int16\""),
        ("gptq", &["dynamic"], r#"{"-:.*down.*": {}}"#, "dynamic: "),
        ("gptq", &["lm_head"], "true", "lm_head: "),
        ("gptq", &["is_marlin_format"], "true", "is_marlin_format: "),
        ("gptq", &["kv_cache_scheme"], r#"{"num_bits": 8}"#, "kv_cache_scheme: "),
        ("gptq", &["sym"], "\"yes\"", "sym: \"yes\" must be true or false"),
        ("gptq-8-bit", &["sym"], "false", "sym: false is not read; in 8 bits true is"),
        ("awq", &["bits"], "8", "bits: 8 is not read; 4 is"),
        ("awq", &["version"], "\"gemv\"", "version: \"gemv\" is not read; gemm is"),
        ("awq", &["version"], "\"marlin\"", "version: \"marlin\""),
        ("awq", &["zero_point"], "false", "zero_point: false"),
        ("awq", &["group_size"], "40", "group_size: 40"),
        ("fp8-tensor", &["fmt"], "\"e5m2\"", "fmt: \"e5m2\""),
        ("fp8-tensor", &["activation_scheme"], "\"other\"", "activation_scheme: \"other\""),
        ("fp8-tensor", &["kv_cache_scheme"], r#"{"type": "float"}"#, "kv_cache_scheme: "),
        ("fp8-block", &["weight_block_size"], "[128, 100]", "weight_block_size: 100"),
        ("fp8-block", &["weight_block_size"], "[128]", "weight_block_size: a list must be two whole numbers"),
        ("packed", &["format"], "\"int-quantized\"", "format: \"int-quantized\""),
        ("packed", &["format"], "\"nvfp4-pack-quantized\"", "format: \"nvfp4"),
        ("packed", &["quantization_status"], "\"frozen\"", "quantization_status: \"frozen\""),
        ("packed", &["config_groups", "group_1"], "{}", "config_groups: one group"),
        ("packed", &["sparsity_config"], r#"{"format": "sparse-24-bitmask"}"#, "sparsity_config.format: \"sparse-24"),
        ("packed", &["transform_config"], r#"{"config_groups": 1}"#, "transform_config: "),
        ("packed", &weights("num_bits"), "8", "config_groups.group_0.weights.num_bits: 8"),
        ("packed", &weights("symmetric"), "false", "weights.symmetric: false"),
        ("packed", &weights("strategy"), "\"tensor\"", "weights.strategy: \"tensor\""),
        ("fp8-channel", &weights("type"), "\"int\"", "weights.type: \"int\""),
        ("fp8-channel", &weights("num_bits"), "4", "weights.num_bits: 4"),
        ("fp8-channel", &weights("dynamic"), "true", "weights.dynamic: "),
        ("fp8-channel", &["kv_cache_scheme"], r#"{"num_bits": 8}"#, "kv_cache_scheme: "),
    ];
    for (name, path, value, cause) in cases {
        let e = refused(name, path, value);
        assert!(e.contains("config.json: quantization_config.") && e.contains(cause), "{name} {path:?} {value}: {e}");
        assert_eq!(e.lines().count(), 1, "{e}");
    }
}

/// A tensor on its way to another file.
#[derive(Clone)]
struct Part {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Parts = BTreeMap<String, Part>;

/// The checkpoint in a folder of its own after `change`.
fn changed(name: &str, change: impl FnOnce(&mut Parts, &mut Object)) -> tempfile::TempDir {
    let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
    let mut parts: Parts = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, t)| (name, Part { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() }))
        .collect();
    let mut config = config_of(&folder(name), |_| ());
    change(&mut parts, &mut config);
    let dir = tempfile::tempdir().unwrap();
    let views = parts.iter().map(|(name, part)| {
        (name, safetensors::tensor::TensorView::new(part.dtype, part.shape.clone(), &part.bytes).unwrap())
    });
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    write_config(dir.path(), &config);
    dir
}

/// What reading the checkpoint says after `change`.
fn broken(name: &str, change: impl FnOnce(&mut Parts, &mut Object)) -> String {
    let dir = changed(name, change);
    match open(dir.path()) {
        Ok(_) => panic!("{name}: a broken checkpoint was read"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn packed_tensors_that_make_no_sense_are_refused_by_name() {
    const UP: &str = "model.layers.0.mlp.up_proj";
    let at = |what: &str| format!("{UP}.{what}");
    // Words or halves of `up_proj.<what>`.
    fn put<const N: usize>(parts: &mut Parts, what: &str, at: usize, value: [u8; N]) {
        parts.get_mut(&format!("{UP}.{what}")).unwrap().bytes[at * N..][..N].copy_from_slice(&value);
    }
    let check = |name: &str, what: &str, cause: &str, change: &dyn Fn(&mut Parts)| {
        let e = broken(name, |parts, _| change(parts));
        assert!(e.contains(&format!("tensor {}: ", at(what))) && e.contains(cause), "{name} {what}: {e}");
        assert!(e.contains("model.safetensors"), "{e}");
    };
    let gone = |what: &'static str| move |parts: &mut Parts| drop(parts.remove(&at(what)));
    let reshaped = |what: &'static str, shape: [usize; 2]| {
        move |parts: &mut Parts| parts.get_mut(&at(what)).unwrap().shape = shape.to_vec()
    };
    check("gptq", "qweight", "missing (expected I32 [8, 128])", &gone("qweight"));
    check("gptq", "scales", "missing", &gone("scales"));
    check("gptq", "qzeros", "missing", &gone("qzeros"));
    check("awq", "scales", "missing", &gone("scales"));
    check("packed", "weight_packed", "missing", &gone("weight_packed"));
    check("packed", "weight_scale", "missing", &gone("weight_scale"));
    check("fp8-tensor", "weight_scale", "missing", &gone("weight_scale"));
    check("fp8-block", "weight_scale", "missing", &gone("weight_scale_inv"));
    check("gptq", "qweight", "found I32 [128, 8]", &reshaped("qweight", [128, 8]));
    check("gptq", "scales", "expected F32 or BF16 or F16 [2, 128]", &reshaped("scales", [4, 64]));
    check("awq", "qweight", "expected I32 [64, 16]", &reshaped("qweight", [8, 128]));
    check("fp8-block", "weight", "expected F8_E4M3 [32, 160]", &reshaped("weight", [160, 32]));
    check("fp8-block", "weight_scale_inv", "expected", &reshaped("weight_scale_inv", [2, 1]));
    check("gptq", "qweight", "found U32", &|parts| parts.get_mut(&at("qweight")).unwrap().dtype = Dtype::U32);
    check("fp8-tensor", "weight", "found F8_E5M2", &|p| p.get_mut(&at("weight")).unwrap().dtype = Dtype::F8_E5M2);
    check("fp8-tensor", "weight", "found I8", &|p| p.get_mut(&at("weight")).unwrap().dtype = Dtype::I8);
    check("gptq", "g_idx", "element 5 is 2, and the last group is 1", &|p| put(p, "g_idx", 5, 2i32.to_le_bytes()));
    check("gptq", "g_idx", "element 0 is -1", &|p| put(p, "g_idx", 0, (-1i32).to_le_bytes()));
    check("gptq", "g_idx", "not as many columns", &|p| put(p, "g_idx", 5, 1i32.to_le_bytes()));
    check("packed", "weight_scale", "found I16", &|p| p.get_mut(&at("weight_scale")).unwrap().dtype = Dtype::I16);
    check("gptq", "qzeros", "zero 16 of output 0 in group 0 is above 15", &|p| put(p, "qzeros", 0, [0xff; 4]));
    check("gptq-8-bit", "qzeros", "zero 1 of output 0 is not read in 8 bits", &|p| put(p, "qzeros", 0, [0; 4]));
    check("gptq", "scales", "element 9 is NaN or infinite", &|p| put(p, "scales", 9, 0x7e00u16.to_le_bytes()));
    check("awq", "scales", "element 3 is NaN or infinite", &|p| put(p, "scales", 3, 0xfc00u16.to_le_bytes()));
    check("packed", "weight_scale", "element 2 is", &|p| put(p, "weight_scale", 2, 0x7f00u16.to_le_bytes()));
    check("packed", "weight_scale", "f16 does not hold", &|p| put(p, "weight_scale", 2, 0x7f00u16.to_le_bytes()));
    check("fp8-tensor", "weight", "element 77 is NaN", &|p| put(p, "weight", 77, [0xff]));
    check("fp8-block", "weight", "element 0 is NaN", &|p| put(p, "weight", 0, [0x7f]));
    check("fp8-block", "weight_scale_inv", "element 1 is NaN", &|p| put(p, "weight_scale_inv", 1, [0xff; 4]));
}

#[test]
fn codes_of_anything_but_projections_are_refused_by_name() {
    let part = Part { dtype: Dtype::I32, shape: vec![1], bytes: vec![0; 4] };
    for (name, tensor) in [("gptq", "lm_head.qweight"), ("fp8-tensor", "model.embed_tokens.weight_scale")] {
        let e = broken(name, |parts, config| {
            parts.insert(tensor.into(), part.clone());
            config.insert("tie_word_embeddings".into(), false.into());
        });
        assert!(e.contains(&format!("tensor {tensor}: in codes")), "{e}");
    }
    let e = broken("fp8-tensor", |parts, _| {
        let dense =
            |part: &mut Part| *part = Part { dtype: Dtype::F16, bytes: [&part.bytes[..]; 2].concat(), ..part.clone() };
        parts.values_mut().filter(|part| part.dtype == Dtype::F8_E4M3).for_each(dense);
        parts.retain(|name, _| !name.ends_with("weight_scale"));
    });
    assert!(e.contains("no projection is stored so"), "{e}");
}

#[test]
fn parts_of_one_matrix_have_one_order_of_columns() {
    let dir = changed("gptq-act-order", |parts, _| {
        let g_idx = &mut parts.get_mut("model.layers.0.self_attn.k_proj.g_idx").unwrap().bytes;
        let of = |i: usize, g_idx: &[u8]| g_idx[4 * i];
        let other = (1..64).find(|&i| of(i, g_idx) != of(0, g_idx)).unwrap();
        g_idx.swap(0, 4 * other);
    });
    for (device, dtype) in [("cpu", DType::F32), ("emulated", DType::F16)] {
        let e = Engine::open(config(dir.path(), device, dtype, "auto")).map(drop).unwrap_err();
        assert!(matches!(e, Error::Unsupported { op: "matrix", .. }), "{e}");
        let e = e.to_string();
        assert!(
            e.contains("k_proj.weight in another order of columns than model.layers.0.self_attn.q_proj.weight"),
            "{e}"
        );
    }
}

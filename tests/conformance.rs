//! Every model family against transformers: tiny models whose weights come from an integer hash, with logits and greedy
//! continuations that conformance/make.py computed in f32.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::*;
use rksc::engine::{BranchId, Engine};
use rksc::gate::verify::VerifyExit;
use rksc::kv::budget::KvBudget;
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::{DType, EngineConfig, ModelSource};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// How far a logit may lie from transformers'.
const TOLERANCE: f32 = 1e-3;

#[derive(serde::Deserialize)]
struct Golden {
    salt: u64,
    tokens: Vec<u32>,
    runs: Vec<Run>,
    greedy: Vec<Continuation>,
}

/// Logits behind prompts of these lengths, in a model opened for this context.
#[derive(serde::Deserialize)]
struct Run {
    context: usize,
    lengths: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

#[derive(serde::Deserialize)]
struct Continuation {
    context: usize,
    length: usize,
    tokens: Vec<u32>,
}

/// A family's tiny model in a folder of its own.
struct Case {
    name: String,
    dir: tempfile::TempDir,
    golden: Golden,
}

impl Case {
    fn engine(&self, context: usize, change: impl FnOnce(&mut EngineConfig)) -> Engine {
        engine(|c| {
            c.model = ModelSource::Dir(self.dir.path().to_owned());
            (c.dtype, c.max_context) = (DType::F32, Some(context));
            change(c);
        })
    }

    /// Each branch's last row against the logits behind as many tokens as it has.
    fn check(&self, how: &str, engine: &Engine, run: &Run, branches: &[(usize, BranchId)]) {
        assert!(!branches.is_empty());
        for &(length, branch) in branches {
            let at = run.lengths.iter().position(|&l| l == length).unwrap();
            let row = engine.row(branch).unwrap().unwrap();
            assert_eq!(row.watched.len(), run.logits[at].len());
            for (token, (logprob, golden)) in row.watched.iter().zip(&run.logits[at]).enumerate() {
                let logit = logprob + row.stats.lse;
                let near = (logit - golden).abs() <= TOLERANCE;
                assert!(near, "{}, {how}, {length} tokens: logit {token} is {logit}, golden {golden}", self.name);
            }
        }
    }

    /// One branch a length, whole.
    fn prompts(&self, engine: &mut Engine, run: &Run) -> Vec<(usize, BranchId)> {
        let ids = all_ids(engine);
        let prompt = |&length: &usize| {
            let branch = engine.prefill(&self.golden.tokens[..length], uncached()).unwrap();
            engine.watch(branch, &ids, 0).unwrap();
            (length, branch)
        };
        run.lengths.iter().map(prompt).collect()
    }
}

fn folder() -> PathBuf {
    path("tests/conformance")
}

fn case_names() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap());
    let mut names: Vec<String> =
        entries.filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 17, "{names:?}");
    names
}

fn case(name: &str) -> Case {
    let from = folder().join(name);
    let golden: Golden = serde_json::from_str(&read(&from.join("golden.json"))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let model = ModelConfig::from_dir(dir.path()).unwrap();
    let tensors = tensors(&model, golden.salt);
    // Half of the families come in shards.
    let shards = 1 + name.len() % 2;
    write(dir.path(), &tensors, shards, |_| DType::F32);
    Case { name: name.to_owned(), dir, golden }
}

/// Name, shape and elements of every tensor of the file: fused where the family fuses.
fn tensors(model: &ModelConfig, salt: u64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    for (name, shape) in model.tensor_shapes() {
        let fused = name.replace(".q_proj", ".qkv_proj").replace(".gate_proj", ".gate_up_proj");
        let is_more = [".k_proj", ".v_proj", ".up_proj"].iter().any(|part| name.contains(part));
        match shapes.last_mut() {
            Some((_, whole)) if model.family.fused && is_more => whole[0] += shape[0],
            _ => shapes.push((if model.family.fused { fused } else { name }, shape)),
        }
    }
    let filled = |(name, shape): (String, Vec<usize>)| {
        let elems = fill(&name, &shape, salt, model.family.norm_offset);
        (name, shape, elems)
    };
    shapes.into_iter().map(filled).collect()
}

/// As `fill` in make.py.
fn fill(name: &str, shape: &[usize], salt: u64, norm_offset: f32) -> Vec<f32> {
    let keyed = format!("{salt}:{name}");
    let key = keyed.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let (scale, middle) = match name {
        _ if name.contains("norm") => (0.25, 1.0 - norm_offset),
        _ if name.ends_with("bias") => (0.25, 0.0),
        _ if name.contains("embed_tokens") => (1.0, 0.0),
        _ => {
            let gain = if name.starts_with("lm_head") { 4.0 } else { 1.0 };
            ((gain * (3.0 / *shape.last().unwrap() as f64).sqrt()) as f32, 0.0)
        }
    };
    let uniform = |i: u64| {
        let mut z = key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (1..=shape.iter().product::<usize>() as u64).map(|i| scale * uniform(i) + middle).collect()
}

/// Writes the tensors as a checkpoint in one file or several.
fn write(dir: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)], shards: usize, dtype: impl Fn(usize) -> DType) {
    let bytes = |elems: &[f32], dtype: DType| -> Vec<u8> {
        let each = |&x: &f32| match dtype {
            DType::F32 => x.to_le_bytes().to_vec(),
            DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        };
        elems.iter().flat_map(each).collect()
    };
    let stored = |dtype: DType| match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
    };
    let data: Vec<Vec<u8>> = tensors.iter().enumerate().map(|(i, t)| bytes(&t.2, dtype(i))).collect();
    let mut weight_map = BTreeMap::new();
    for shard in 0..shards {
        let file = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
        };
        let own = (0..tensors.len()).filter(|i| i % shards == shard);
        let views: Vec<(&str, TensorView<'_>)> = own
            .map(|i| {
                let (name, shape, _) = &tensors[i];
                weight_map.insert(name.clone(), file.clone());
                (name.as_str(), TensorView::new(stored(dtype(i)), shape.clone(), &data[i]).unwrap())
            })
            .collect();
        serialize_to_file(views, None, &dir.join(&file)).unwrap();
    }
    if shards > 1 {
        let index = serde_json::json!({ "weight_map": weight_map });
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

#[test]
fn prompts_in_one_piece_and_in_chunks_have_the_logits_of_transformers() {
    for name in case_names() {
        let case = case(&name);
        for run in &case.golden.runs {
            for max_batch_tokens in [2048, 24] {
                let mut engine = case.engine(run.context, |c| c.max_batch_tokens = max_batch_tokens);
                let branches = case.prompts(&mut engine, run);
                run_all(&mut engine);
                case.check(&format!("{max_batch_tokens} tokens a pass"), &engine, run, &branches);
            }
        }
    }
}

#[test]
fn decode_steps_have_the_logits_of_transformers() {
    for name in case_names() {
        let case = case(&name);
        for run in &case.golden.runs {
            let mut engine = case.engine(run.context, |_| ());
            let ids = all_ids(&engine);
            let branch = engine.prefill(&case.golden.tokens[..1], uncached()).unwrap();
            engine.watch(branch, &ids, 0).unwrap();
            for length in 1..=*run.lengths.last().unwrap() {
                if length > 1 {
                    engine.append(branch, &case.golden.tokens[length - 1..length]).unwrap();
                }
                run_all(&mut engine);
                if run.lengths.contains(&length) {
                    case.check("token by token", &engine, run, &[(length, branch)]);
                }
            }
        }
    }
}

#[test]
fn forked_branches_have_the_logits_of_transformers() {
    for name in case_names() {
        let case = case(&name);
        for run in &case.golden.runs {
            let mut engine = case.engine(run.context, |_| ());
            let ids = all_ids(&engine);
            let mut branches = Vec::new();
            // From a trunk that ends inside a block, and from one that ends with a tile.
            for trunk_len in [40, 64] {
                let trunk = engine.prefill(&case.golden.tokens[..trunk_len], uncached()).unwrap();
                run_all(&mut engine);
                for &length in run.lengths.iter().filter(|&&l| l > trunk_len) {
                    let child = fork(&mut engine, trunk);
                    engine.append(child, &case.golden.tokens[trunk_len..length]).unwrap();
                    engine.watch(child, &ids, 0).unwrap();
                    branches.push((length, child));
                }
            }
            run_all(&mut engine);
            case.check("forked", &engine, run, &branches);
        }
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for name in case_names() {
        let case = case(&name);
        let mut compared = 0;
        for run in &case.golden.runs {
            let mut engine = case.engine(run.context, |_| ());
            let wanted: Vec<&Continuation> = case.golden.greedy.iter().filter(|c| c.context == run.context).collect();
            let branches: Vec<BranchId> = wanted
                .iter()
                .map(|c| {
                    let branch = engine.prefill(&case.golden.tokens[..c.length], uncached()).unwrap();
                    engine.start(branch, greedy(c.tokens.len())).unwrap();
                    branch
                })
                .collect();
            run_all(&mut engine);
            for (c, &branch) in wanted.iter().zip(&branches) {
                assert_eq!(generated(&engine, branch, c.length), c.tokens, "{name}, behind {} tokens", c.length);
                compared += c.tokens.len();
            }
        }
        assert!(compared >= 48, "{name}: {compared} tokens");
    }
}

#[test]
fn the_emulated_kernels_have_the_logits_of_transformers() {
    for name in case_names() {
        let case = case(&name);
        for run in &case.golden.runs {
            let mut engine = case.engine(run.context, |c| c.device = "emulated".into());
            let few = Run { lengths: few(&run.lengths), logits: Vec::new(), context: run.context };
            let branches = case.prompts(&mut engine, &few);
            run_all(&mut engine);
            case.check("emulated", &engine, run, &branches);
        }
    }
}

/// The lengths that the slow device is asked for: a short one, and one beyond windows and trained lengths.
fn few(lengths: &[usize]) -> Vec<usize> {
    let beyond = lengths.iter().find(|&&l| l >= 129).or(lengths.last());
    let mut few: Vec<usize> = lengths.iter().copied().filter(|l| *l == 17).chain(beyond.copied()).collect();
    few.dedup();
    few
}

#[test]
fn older_spellings_of_config_json_say_the_same() {
    let mut compared = 0;
    for name in case_names() {
        let older = folder().join(&name).join("config.older.json");
        if older.exists() {
            let new = ModelConfig::from_file(&folder().join(&name).join("config.json")).unwrap();
            assert_eq!(ModelConfig::from_file(&older).unwrap(), new, "{name}");
            compared += 1;
        }
    }
    assert!(compared >= 14, "{compared}");
}

/// Files of several element types, in shards: the same bits as one f32 file of the rounded values.
#[test]
fn mixed_element_types_are_read_as_they_are() {
    let golden: Golden = serde_json::from_str(&read(&folder().join("qwen3/golden.json"))).unwrap();
    let model = ModelConfig::from_file(&folder().join("qwen3/config.json")).unwrap();
    let tensors = tensors(&model, golden.salt);
    let kind = |i: usize| [DType::F32, DType::Bf16, DType::F16][i % 3];
    let rounded: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(i, (name, shape, elems))| {
            let round = |&x: &f32| match kind(i) {
                DType::F32 => x,
                DType::Bf16 => half::bf16::from_f32(x).to_f32(),
                DType::F16 => half::f16::from_f32(x).to_f32(),
            };
            (name.clone(), shape.clone(), elems.iter().map(round).collect())
        })
        .collect();
    let row = |write: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path());
        let config =
            EngineConfig { dtype: DType::F32, threads: 1, kv_cache_memory: Some(1 << 20), ..Default::default() };
        let mut engine = Engine::with_weights(config, model.clone(), &WeightStore::open(dir.path()).unwrap()).unwrap();
        let ids = all_ids(&engine);
        let branch = engine.prefill(&golden.tokens[..40], uncached()).unwrap();
        engine.watch(branch, &ids, 0).unwrap();
        run_all(&mut engine);
        engine.row(branch).unwrap().unwrap().watched.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    let mixed = row(&|dir| write(dir, &tensors, 3, kind));
    assert_eq!(mixed, row(&|dir| write(dir, &rounded, 1, |_| DType::F32)));
}

#[test]
fn a_context_beyond_the_reach_of_the_model_is_refused() {
    let phi = ModelConfig::from_file(&folder().join("phi4_mini/config.json")).unwrap();
    assert_eq!((phi.max_position_embeddings, phi.context_limit), (128, 512));
    let why = phi.with_context(Some(513)).unwrap_err().to_string();
    assert!(why.contains("context") && why.contains("513") && why.contains("512"), "{why}");
}

/// Every command that reads a model reads it for the context that is asked for.
#[test]
fn inspect_and_plan_know_the_context_that_is_asked_for() {
    let case = case("phi4_mini");
    let field = |command: &str, context: &[&str], name: &str| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_rksc-run"))
            .args([command, "--json", "-m"])
            .arg(case.dir.path())
            .args(context)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()[name].as_u64().unwrap()
    };
    let longest = ["--max-context", "512"];
    assert_eq!(field("inspect", &[], "max_position_embeddings"), 128);
    assert_eq!(field("inspect", &longest, "max_position_embeddings"), 512);
    // 64 contexts' worth.
    assert_eq!(field("plan", &longest, "kv_blocks"), 4 * field("plan", &[], "kv_blocks"));
}

#[test]
fn what_a_model_cannot_do_is_refused_by_name() {
    let mut mistral = case("mistral").engine(512, |_| ());
    let branch = mistral.prefill(&[1, 2, 3], uncached()).unwrap();
    let why = mistral.limit_kv(branch, KvBudget::new(16, 3, 16)).unwrap_err().to_string();
    assert!(why.contains("kv-budget") && why.contains("sliding window"), "{why}");
    // Within one window there is nothing to refuse.
    let mut mistral = case("mistral").engine(100, |_| ());
    let branch = mistral.prefill(&[1, 2, 3], uncached()).unwrap();
    mistral.limit_kv(branch, KvBudget::new(16, 3, 16)).unwrap();

    let probe = VerifyExit::CANDIDATES.observer(4);
    let mut gemma = case("gemma2").engine(512, |_| ());
    let branch = gemma.prefill(&[1, 2, 3], uncached()).unwrap();
    let refused = [gemma.gate(&probe, &[branch]), gemma.set_gates(std::slice::from_ref(&probe))];
    for why in refused.map(|r| r.unwrap_err().to_string()) {
        assert!(why.contains("gate") && why.contains("final_logit_softcapping"), "{why}");
    }
}

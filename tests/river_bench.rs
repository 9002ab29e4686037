//! What `rksc-run bench river` counts, on few problems and a small shape: numbers that follow from layers and lengths alone,
//! and columns that agree with each other.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::*;
use rksc::model::family::ModelConfig;
use serde_json::Value;

const PROBLEMS: &str = "models/tinymath/problems/test.jsonl";

/// What the binary says in JSON; codes are kept in `dir`.
fn bench(dir: &Path, args: &[&str]) -> Value {
    let out = command(dir, args).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {errors}");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rksc-run"));
    command.args(["bench", "river"]).args(args).arg("--json");
    command.current_dir(dir).env("RKSC_CACHE_DIR", dir).stdin(Stdio::null());
    command
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap_or_else(|| panic!("{v} is no list")).iter().map(number).collect()
}

fn arm<'a>(r: &'a Value, name: &str) -> &'a Value {
    let arms = r["arms"].as_array().unwrap();
    arms.iter().find(|a| a["arm"] == name).unwrap_or_else(|| panic!("no arm {name}: {r}"))
}

fn names(r: &Value) -> Vec<&str> {
    r["arms"].as_array().unwrap().iter().map(|a| a["arm"].as_str().unwrap()).collect()
}

#[test]
fn accuracy_columns_agree_with_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let problems = path(PROBLEMS);
    let sizes = ["--limit", "4", "--forced-problems", "2", "--forced-tokens", "24", "--max-new-tokens", "96"];
    let arms = ["--taus", "0.5,2", "--fixed", "0,2,4", "--refresh", "8", "--draft", "3"];
    let timed = ["--speed-problems", "1", "--repeats", "2", "--svg", "a.svg"];
    let problems = ["accuracy", "--problems", problems.to_str().unwrap()];
    let r = bench(dir.path(), &[&problems[..], &sizes, &arms, &timed].concat());
    let expected = [
        "backbone",
        "tau=0.5",
        "tau=2",
        "fixed=0",
        "fixed=2",
        "fixed=4",
        "fixed=2 refresh=8",
        "draft=3",
        "all hqq",
        "all rtn",
    ];
    assert_eq!(names(&r), expected);
    let right = number(&arm(&r, "backbone")["right"]);
    for a in r["arms"].as_array().unwrap() {
        let (lost, won) = (number(&a["right_to_wrong"]), number(&a["wrong_to_right"]));
        assert_eq!(number(&a["right"]) + lost, right + won, "{a}");
        assert_eq!((numbers(&a["tokens_per_s"]).len(), numbers(&a["speed_up"]).len()), (2, 2), "{a}");
        assert_eq!(
            a["forced"].is_null(),
            ["backbone", "refresh", "draft"].contains(&a["kind"].as_str().unwrap()),
            "{a}"
        );
    }
    // Depths that need no measuring; what never leaves is the backbone, and so are drafts.
    for (name, depth) in [("backbone", 8.0), ("tau=2", 8.0), ("fixed=0", 0.0), ("fixed=4", 4.0), ("all hqq", 0.0)] {
        assert_eq!(number(&arm(&r, name)["mean_depth"]), depth, "{name}");
    }
    for name in ["tau=2", "draft=3"] {
        assert_eq!(number(&arm(&r, name)["same_tokens"]), 4.0, "{name}");
    }
    let never = &arm(&r, "tau=2")["forced"];
    assert_eq!((number(&never["kl"]), number(&never["agreement"]), number(&never["mean_depth"])), (0.0, 1.0, 8.0));
    let (fixed, whole) = (&arm(&r, "fixed=2")["forced"], &arm(&r, "all rtn")["forced"]);
    assert_eq!(number(&fixed["tokens"]), 48.0);
    assert!(number(&fixed["kl"]) > 0.0 && number(&whole["kl"]) > 0.0, "{r}");
    // The layers before the exit are the backbone's own, for tokens that read its prompt and each other alone.
    let k = numbers(&fixed["k_cosine"]);
    assert!(k.len() == 8 && (k[0] - 1.0).abs() < 1e-9 && k[7] < 1.0, "{k:?}");
    assert!(number(&arm(&r, "fixed=2 refresh=8")["kv_refreshes"]) >= 4.0);
    assert!(number(&arm(&r, "draft=3")["acceptance"]) > 0.2);
    assert_eq!(numbers(&r["correlation"]).len(), 7);
    assert!(read(&dir.path().join("a.svg")).starts_with("<svg"));
    let verdicts: Vec<&str> = r["verdicts"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    for words in ["fixed=2: K and V", "fixed=4: K and V", "at equal depth", "the paper's 1.71 to 2.16"] {
        assert!(verdicts.iter().any(|v| v.starts_with(words)), "{words}: {verdicts:?}");
    }
    assert!(r["notes"][0].as_str().unwrap().contains("--better-codes"));
}

/// Bytes of one layer's projections and of the unembedding.
fn layer_bytes(model: &ModelConfig) -> (f64, f64) {
    let bytes = |is_wanted: fn(&str) -> bool| -> f64 {
        let wanted = model.tensor_shapes().into_iter().filter(|(name, _)| is_wanted(name));
        wanted.map(|(_, shape)| 2.0 * shape.iter().product::<usize>() as f64).sum()
    };
    (bytes(|n| n.starts_with("model.layers.0.") && n.ends_with("_proj.weight")), bytes(|n| n.contains("embed_tokens")))
}

/// Acceptance test RV13, and mixed ways: a layer's set is read once where a row takes it.
#[test]
fn speed_counts_the_bytes_of_the_sets_that_rows_take() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = ["--tokens", "6", "--repeats", "2", "--batch", "4", "--mixed", "2,6"];
    let arms = ["--fixed", "0,3", "--tau=-2,2", "--river-layers", "1,5", "--model"];
    // In a folder of its own: the codes are written beside the model.
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model_file(file), dir.path().join(file)).unwrap();
    }
    let r = bench(dir.path(), &[&["speed"], &sizes[..], &arms, &["."]].concat());
    assert_eq!(names(&r), ["backbone", "fixed=0", "fixed=3", "tau=-2", "tau=2", "each", "last", "all"]);
    let (dense, head) = layer_bytes(&ModelConfig::from_dir(&path(MODEL)).unwrap());
    // 16 bits to 4 and, in groups of 64, a scale and a zero of 16 each.
    let codes = dense / 16.0 * 4.5;
    let both = |dense_layers: f64, code_layers: f64| dense_layers * dense + code_layers * codes + head;
    let expected = [
        ("backbone", both(8.0, 0.0), 8.0),
        ("fixed=0", both(0.0, 8.0), 0.0),
        ("fixed=3", both(3.0, 5.0), 3.0),
        ("tau=-2", both(1.0, 7.0), 1.0),
        ("tau=2", both(8.0, 0.0), 8.0),
        ("each", both(6.0, 6.0), 4.0),
        ("last", both(6.0, 2.0), 6.0),
        ("all", both(0.0, 8.0), 0.0),
    ];
    for (name, bytes, depth) in expected {
        let a = arm(&r, name);
        assert_eq!((number(&a["by_formula"]), number(&a["mean_depth"])), (bytes, depth), "{name}");
        assert!((number(&a["weight_bytes"]) / bytes - 1.0).abs() < 0.01, "{a}");
        assert!((number(&a["floor"]) - both(8.0, 0.0) / bytes).abs() < 1e-9, "{a}");
        let [ms, up, of_floor, of_whole] = ["step_ms", "speed_up", "of_floor", "of_whole"].map(|c| numbers(&a[c]));
        assert!([&ms, &up, &of_floor, &of_whole].iter().all(|v| v.len() == 2 && v.iter().all(|x| *x > 0.0)), "{a}");
    }
    assert_eq!(numbers(&arm(&r, "backbone")["speed_up"]), [1.0, 1.0]);
    assert_eq!(numbers(&arm(&r, "all")["of_whole"]), [1.0, 1.0]);
}

#[test]
fn drafts_have_the_backbones_tokens_on_problems_and_on_random_weights() {
    let dir = tempfile::tempdir().unwrap();
    let problems = path(PROBLEMS);
    let sizes = ["--limit", "4", "--max-new-tokens", "96", "--speed-problems", "1", "--repeats", "2"];
    let text = ["draft", "--draft", "1,4", "--problems", problems.to_str().unwrap()];
    let shape = ["draft", "--draft", "1,4", "--shape", "tiny", "--tokens", "24", "--batch", "2", "--repeats", "2"];
    for (args, chains) in [([&text[..], &sizes].concat(), 4.0), (shape.to_vec(), 2.0)] {
        let r = bench(dir.path(), &args);
        assert_eq!(names(&r), ["backbone", "draft=1", "draft=4"]);
        assert!(arm(&r, "backbone")["acceptance"].is_null());
        for a in r["arms"].as_array().unwrap() {
            assert_eq!((number(&a["chains"]), numbers(&a["speed_up"]).len()), (chains, 2), "{a}");
            let most = 1.0 + a["arm"].as_str().unwrap().strip_prefix("draft=").map_or(0.0, |n| n.parse().unwrap());
            assert!((1.0..=most).contains(&number(&a["tokens_per_pass"])), "{a}");
        }
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |args: &[&str], words: &str| {
        let out = command(dir.path(), args).output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && errors.contains(words), "{args:?}: {errors}");
    };
    refused(&["accuracy", "--fixed", "8"], "8 layers");
    refused(&["speed", "--shape", "tiny", "--fixed", "3"], "--fixed");
    refused(&["speed", "--shape", "tiny", "--tokens", "1"], "--tokens");
    refused(&["speed", "--shape", "tiny", "--batch", "200"], "--batch");
    refused(&["draft", "--draft", "16"], "draft=16");
}

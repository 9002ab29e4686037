//! `--kv-budget` and its companions on the real binary: flags that would change nothing are refused by name, a limited run
//! says so and holds what it promised, and a budget that is never reached changes no token.

#[path = "common/mod.rs"]
mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::read;
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_rksc-run");
const PROMPT: &str = "<|bos|>Problem: Tom has 12 apples and buys 30 more. How many apples does Tom have?\nApproach #1: \
                      Think for a long time and check again.\nStep 1:";
/// Generates 200 tokens, whatever they say.
const GENERATE: [&str; 7] = ["generate", "-p", PROMPT, "--max-new-tokens", "200", "--ignore-eos", "--json"];

fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(BINARY).args(args).current_dir(dir).stdin(Stdio::null()).output().unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> Output {
    let out = run(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

fn generate(flags: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let out = ok(dir.path(), &[&GENERATE[..], flags].concat());
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Refused by the caller's fault, with the flag in front and the way out in the message, before anything is printed.
fn refused(command: &[&str], flags: &[&str], flag: &str, way_out: &str) {
    let dir = tempfile::tempdir().unwrap();
    let out = run(dir.path(), &[command, flags].concat());
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{flags:?}: {message}");
    assert!(message.starts_with(&format!("rksc-run: {flag}: ")), "{flags:?}: {message}");
    assert!(message.contains(way_out), "{flags:?}: {way_out:?} is not in: {message}");
    assert!(out.stdout.is_empty(), "{flags:?}");
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

#[test]
fn a_flag_without_a_budget_is_refused() {
    let flags = [
        ["--kv-buffer", "16"],
        ["--kv-method", "h2o"],
        ["--kv-variant", "text"],
        ["--kv-agg", "layer"],
        ["--kv-lambda", "0.2"],
        ["--kv-threshold", "0.2"],
        ["--kv-pool-size", "5"],
        ["--kv-prompt", "evict"],
        ["--kv-sinks", "2"],
        ["--kv-seed", "2"],
        ["--kv-window", "4"],
    ];
    for flag in flags {
        let name = flag[0].trim_start_matches('-');
        refused(&["generate", "-p", "x"], &flag, name, "--kv-budget");
        refused(&["solve"], &flag, name, "--kv-budget");
    }
}

#[test]
fn a_flag_that_the_others_leave_idle_is_refused() {
    for (flags, flag, way_out) in [
        ("--kv-method snapkv --kv-variant text", "kv-variant", "--kv-method rkv"),
        ("--kv-method h2o --kv-lambda 0.2", "kv-lambda", "--kv-method rkv"),
        ("--kv-method random --kv-threshold 0.2", "kv-threshold", "--kv-method rkv"),
        ("--kv-lambda 1 --kv-threshold 0.2", "kv-threshold", "lower the lambda"),
        ("--kv-method h2o --kv-pool-size 5", "kv-pool-size", "take one of these"),
        ("--kv-lambda 0 --kv-pool-size 5", "kv-pool-size", "raise the lambda"),
        ("--kv-seed 3", "kv-seed", "--kv-method random"),
        ("--kv-method streaming --kv-agg token", "kv-agg", "drop one"),
        ("--kv-variant alg1 --kv-agg head", "kv-agg", "use layer or token"),
        ("--kv-sinks 2", "kv-sinks", "evict the prompt"),
        ("--kv-prompt pin --kv-sinks 2", "kv-sinks", "evict the prompt"),
        ("--kv-method streaming --kv-window 4", "kv-window", "drop one"),
        ("--kv-method h2o --kv-window 32", "kv-window", "more than that half"),
    ] {
        let flags: Vec<&str> = ["--kv-budget", "64"].into_iter().chain(flags.split(' ')).collect();
        refused(&["generate", "-p", "x"], &flags, flag, way_out);
        refused(&["solve"], &flags, flag, way_out);
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for (flags, flag, way_out) in [
        ("--kv-budget 8", "kv-budget", "above the 8"),
        ("--kv-budget 18446744073709551615", "kv-budget", "at most"),
        ("--kv-budget 64 --kv-buffer 0", "kv-buffer", "at least 1"),
        ("--kv-budget 64 --kv-buffer 18446744073709551615", "kv-buffer", "at most"),
        ("--kv-budget 64 --kv-lambda 1.5", "kv-lambda", "between 0 and 1"),
        ("--kv-budget 64 --kv-threshold -2", "kv-threshold", "between 0 and 1"),
        ("--kv-budget 64 --kv-pool-size 6", "kv-pool-size", "odd"),
        ("--kv-budget 64 --kv-window 65", "kv-window", "between 1 and 64"),
    ] {
        let flags: Vec<&str> = flags.split(' ').collect();
        refused(&["generate", "-p", "x"], &flags, flag, way_out);
        refused(&["solve"], &flags, flag, way_out);
    }
}

#[test]
fn a_shared_prompt_cannot_be_evicted() {
    let evict = ["--kv-budget", "64", "--kv-prompt", "evict"];
    refused(&["generate", "-p", "x", "-n", "2"], &evict, "kv-prompt", "-n 1");
    refused(&["solve"], &evict, "kv-prompt", "--policy no-sharing");
    refused(&["solve", "-B", "1", "--policy", "exact"], &evict, "kv-prompt", "--policy no-sharing");
}

#[test]
fn a_budget_that_forks_would_undo_is_refused() {
    refused(&["solve", "--decode-exit", "trial"], &["--kv-budget", "64"], "kv-budget", "use another exit");
}

#[test]
fn every_method_holds_its_budget() {
    let methods = [
        &[][..],
        &["--kv-variant", "text"],
        &["--kv-variant", "alg1"],
        &["--kv-method", "snapkv", "--kv-agg", "token"],
        &["--kv-method", "h2o"],
        &["--kv-method", "streaming"],
        &["--kv-method", "random", "--kv-seed", "3", "--kv-agg", "layer"],
    ];
    let whole = generate(&[]);
    let prompt = number(&whole["usage"]["prompt_tokens"]);
    assert_eq!(number(&whole["choices"][0]["kv_cuts"]), 0);
    // The last token is never run.
    assert_eq!(number(&whole["choices"][0]["kv_slots"]), prompt + 199);
    assert!(whole["kv"].is_null());
    for method in methods {
        let limited = generate(&[&["--kv-budget", "32", "--kv-buffer", "16"][..], method].concat());
        let choice = &limited["choices"][0];
        // Algorithm 1 keeps the window on top.
        let kept = if method.contains(&"alg1") { 32 + 8 } else { 32 };
        let (slots, cuts) = (number(&choice["kv_slots"]), number(&choice["kv_cuts"]));
        assert!((prompt + kept..=prompt + kept + 16).contains(&slots), "{method:?}: {slots} slots");
        assert!((8..=11).contains(&cuts), "{method:?}: {cuts} cuts of 199 tokens, one every 16");
        assert_eq!(choice["tokens"].as_array().unwrap().len(), 200, "{method:?}");
        let totals = &limited["kv"]["totals"];
        assert_eq!(number(&totals["slots_full"]), prompt + 199, "{method:?}");
        assert_eq!(number(&totals["slots_dropped"]), prompt + 199 - slots, "{method:?}");
        assert_eq!((number(&totals["cuts"]), number(&totals["branches_cut"])), (cuts, 1), "{method:?}");
    }
}

#[test]
fn the_prompt_is_evicted_where_it_is_asked_for() {
    let flags = ["--kv-budget", "16", "--kv-buffer", "16", "--kv-prompt", "evict", "--kv-sinks", "2"];
    let limited = generate(&flags);
    let slots = number(&limited["choices"][0]["kv_slots"]);
    assert!(number(&limited["usage"]["prompt_tokens"]) > 2 + 16 + 16, "the bound below says nothing");
    assert!((2 + 16..=2 + 16 + 16).contains(&slots), "{slots} slots");
    assert_eq!(limited["kv"]["limit"]["prompt"], "evict");
}

#[test]
fn a_budget_above_the_text_changes_no_token() {
    let drawn = ["-n", "3", "--temperature", "0.8", "--seed", "5"];
    for flags in [&[][..], &drawn] {
        let whole = generate(flags);
        for method in ["rkv", "h2o"] {
            let limited = generate(&[flags, &["--kv-budget", "200", "--kv-method", method]].concat());
            for (l, w) in limited["choices"].as_array().unwrap().iter().zip(whole["choices"].as_array().unwrap()) {
                assert_eq!(l["tokens"], w["tokens"], "{method} {flags:?}");
                assert_eq!(l["token_logprobs"], w["token_logprobs"], "{method} {flags:?}");
                assert_eq!((number(&l["kv_cuts"]), &l["kv_slots"]), (0, &w["kv_slots"]), "{method} {flags:?}");
            }
        }
    }
}

#[test]
fn one_continuation_is_the_first_of_several() {
    let drawn = ["--temperature", "0.8", "--seed", "5", "--kv-budget", "32", "--kv-buffer", "16"];
    let (one, three) = (generate(&drawn), generate(&[&drawn[..], &["-n", "3"]].concat()));
    assert_eq!(one["choices"][0]["tokens"], three["choices"][0]["tokens"]);
    assert_ne!(three["choices"][0]["tokens"], three["choices"][1]["tokens"]);
    for choice in three["choices"].as_array().unwrap() {
        assert!(number(&choice["kv_cuts"]) >= 8);
    }
}

/// What is the same in every run of `solve`.
fn said(result: &Value) -> Value {
    let mut result = result.clone();
    for clock in ["latency_ms", "phase_ms"] {
        result.as_object_mut().unwrap().remove(clock);
    }
    result
}

#[test]
fn solve_is_limited_says_so_and_repeats_itself() {
    let dir = tempfile::tempdir().unwrap();
    let approaches = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/approaches_long.txt");
    let args = |out: &'static str| {
        let base = ["solve", "--limit", "2", "-B", "3", "--policy", "exact", "--approaches", approaches];
        [&base[..], &["--kv-budget", "24", "--kv-buffer", "16", "--report", "page.html", "--out", out, "--json"]]
            .concat()
    };
    let first: Value = serde_json::from_slice(&ok(dir.path(), &args("a")).stdout).unwrap();
    ok(dir.path(), &args("b"));
    let results = |name: &str| -> Vec<Value> {
        read(&dir.path().join(name)).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let (a, b) = (results("a"), results("b"));
    assert_eq!(a.len(), 2);
    assert_eq!(a.iter().map(said).collect::<Vec<_>>(), b.iter().map(said).collect::<Vec<_>>());

    let branches: Vec<&Value> = a.iter().flat_map(|r| r["branches"].as_array().unwrap()).collect();
    assert_eq!(branches.len(), 6);
    let (mut cuts, mut held, mut full) = (0, 0, 0);
    for b in &branches {
        let (num_cuts, slots, whole) = (number(&b["kv_cuts"]), number(&b["kv_slots"]), number(&b["kv_full"]));
        let generated = b["tokens"].as_array().unwrap().len() as u64;
        assert!(num_cuts > 0, "{generated} tokens");
        // The end token is no part of the text, and is not run.
        let prompt = whole - generated;
        assert!((prompt + 24..=prompt + 24 + 16).contains(&slots), "{slots} slots behind {prompt}");
        let first_cut = number(&b["first_kv_cut"]);
        assert!((24..=24 + 16).contains(&first_cut) && first_cut < generated, "{first_cut}");
        (cuts, held, full) = (cuts + num_cuts, held + slots, full + whole);
    }
    let totals = &first["kv"];
    assert_eq!((number(&totals["cuts"]), number(&totals["branches_cut"])), (cuts, 6));
    assert_eq!((number(&totals["slots_held"]), number(&totals["slots_full"])), (held, full));
    assert_eq!(number(&totals["slots_dropped"]), full - held);
    let kv = &first["config"]["kv"];
    assert_eq!((&kv["budget"], &kv["buffer"], &kv["rule"]["method"]), (&json!(24), &json!(16), &json!("rkv")));
    assert_eq!(first["kv_window"], 8);

    let page = read(&dir.path().join("page.html"));
    assert!(page.contains("24 KV slots a layer and head behind the prompt, chosen by rkv"));
    assert!(page.contains(&format!("branches cut: 6 of 6, cuts: {cuts};")));
    let text = ok(dir.path(), &["solve", "--limit", "1", "-B", "1", "--kv-budget", "16"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("KV budget, not exact: 16 KV slots a layer and head behind the prompt"), "{text}");
    let whole = ok(dir.path(), &["solve", "--limit", "1", "-B", "1", "--json"]).stdout;
    assert!(serde_json::from_slice::<Value>(&whole).unwrap()["kv"].is_null());
}

#[test]
fn solve_evicts_prompts_that_nobody_shares() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["solve", "--limit", "1", "-B", "2", "--policy", "no-sharing", "--prefix", "bundled", "--json"];
    let flags = ["--kv-budget", "128", "--kv-buffer", "16", "--kv-prompt", "evict"];
    let report: Value = serde_json::from_slice(&ok(dir.path(), &[&args[..], &flags].concat()).stdout).unwrap();
    for b in report["results"][0]["branches"].as_array().unwrap() {
        assert!(number(&b["kv_full"]) > 1000 && number(&b["kv_slots"]) <= 4 + 128 + 16, "{b}");
    }
}

#[test]
fn a_plan_takes_the_budget_into_account() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |flags: &[&str]| -> Value {
        let args = ["plan", "--shape", "qwen2.5-7b", "--kv-cache-memory", "8GiB", "--own", "8192", "--json"];
        serde_json::from_slice(&ok(dir.path(), &[&args[..], flags].concat()).stdout).unwrap()
    };
    let blocks = |plan: &Value| number(&plan["kv_bytes_per_branch"]) / (number(&plan["kv_bytes_per_token"]) * 16);
    assert_eq!(blocks(&plan(&[])), 512 + 1);
    assert_eq!(blocks(&plan(&["--kv-budget", "1024", "--kv-buffer", "128"])), 72 + 1);
    assert_eq!(blocks(&plan(&["--kv-budget", "1024"])), 72 + 1);
    assert_eq!(blocks(&plan(&["--kv-budget", "100000"])), 512 + 1);
    refused(&["plan"], &["--kv-buffer", "16"], "kv-buffer", "--kv-budget");
}

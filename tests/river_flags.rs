//! `--river` and its companions on the real binary: flags that would change nothing are refused by name, a run says what
//! left the backbone and whether that is exact, drafts change no token; and `quantise` makes what such a run takes.

#[path = "common/mod.rs"]
mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{model_file, read};
use serde_json::{Value, json};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_rksc-run");
const PROMPT: &str = "<|bos|>Problem: Tom has 12 apples and buys 30 more. How many apples does Tom have?\nApproach #1: \
                      Think for a long time and check again.\nStep 1:";
/// Generates 60 tokens, whatever they say.
const GENERATE: [&str; 7] = ["generate", "-p", PROMPT, "--max-new-tokens", "60", "--ignore-eos", "--json"];

/// In a folder of its own, which is the user's cache too.
fn run(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).current_dir(dir).env("RKSC_CACHE_DIR", dir.join("cache")).stdin(Stdio::null());
    command.output().unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn ok(dir: &Path, args: &[&str]) -> Output {
    let out = run(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", stderr(&out));
    out
}

fn json_of(dir: &Path, args: &[&str]) -> Value {
    serde_json::from_slice(&ok(dir, args).stdout).unwrap()
}

fn generate(dir: &Path, flags: &str) -> Value {
    let flags: Vec<&str> = flags.split_whitespace().collect();
    json_of(dir, &[&GENERATE[..], &flags].concat())
}

/// Fails with `code`, with `what` in front and the way out in the message, before anything is printed.
fn fails(dir: &Path, args: &[&str], code: i32, what: &str, way_out: &str) {
    let out = run(dir, args);
    let message = stderr(&out);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
    assert!(message.contains(&format!("rksc-run: {what}: ")), "{args:?}: {message}");
    assert!(message.contains(way_out), "{args:?}: {way_out:?} is not in: {message}");
    assert!(out.stdout.is_empty(), "{args:?}");
}

/// Refused by the caller's fault, and nothing was made.
fn refused(command: &[&str], flags: &str, flag: &str, way_out: &str) {
    let dir = folder();
    let flags: Vec<&str> = flags.split_whitespace().collect();
    fails(dir.path(), &[command, &flags].concat(), 1, flag, way_out);
    assert!(!dir.path().join("cache").exists(), "{flags:?}");
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

#[test]
fn a_flag_that_changes_nothing_is_refused() {
    for (flags, flag, way_out) in [
        ("--river-first 1", "river-first", "give --river too"),
        ("--river-last 4", "river-last", "give --river too"),
        ("--river-batch-min", "river-batch-min", "give --river too"),
        ("--river-prefill 0.5", "river-prefill", "give --river too"),
        ("--river off --river-refresh 8", "river-refresh", "give --river too"),
        ("--quantise --river-refresh 8", "river-refresh", "give --river too"),
        ("--quantiser rtn", "quantiser", "give --river or --quantise"),
        ("--quant-group 32", "quant-group", "give --river or --quantise"),
        ("--quant-kv-bits 8", "quant-kv-bits", "give --river or --quantise"),
        ("--codes here", "codes", "give --river or --quantise"),
        ("--river tau=0.5 --quantise", "quantise", "drop one"),
        ("--river fixed=2 --river-first 1", "river-first", "--river tau"),
        ("--river fixed=2 --river-last 4", "river-last", "--river tau"),
        ("--river fixed=2 --river-batch-min", "river-batch-min", "--river tau"),
        ("--river draft --river-last 4", "river-last", "drop one"),
        ("--river draft --river-batch-min", "river-batch-min", "drop one"),
        ("--river draft --river-prefill 0.5", "river-prefill", "drop one"),
        ("--river draft --river-refresh 8", "river-refresh", "drop one"),
        ("--river draft --kv-budget 64", "river", "drop one"),
    ] {
        refused(&["generate", "-p", "x"], flags, flag, way_out);
        refused(&["solve"], flags, flag, way_out);
    }
    refused(&["solve"], "--river-verify", "river-verify", "give --river too");
    refused(&["solve"], "--river draft --river-verify", "river-verify", "drop one");
    refused(&["solve"], "--river fixed=2 --river-verify --verify off", "river-verify", "--verify off");
    refused(
        &["solve", "--wordings", "2"],
        "--asks semantic --river fixed=2 --river-prefill 0.5",
        "river-prefill",
        "drop",
    );
    refused(&["solve"], "--river draft --decode-exit stop-all", "river", "drop one");
    refused(&["plan"], "--quant-group 32", "quant-group", "give --river or --quantise");
    refused(&["plan"], "--river draft --quantise", "quantise", "drop one");
}

#[test]
fn values_out_of_range_are_refused() {
    for (flags, flag, way_out) in [
        ("--river tau=inf", "river", "not a number"),
        ("--river draft=0", "river", "between 1 and 15"),
        ("--river draft=16", "river", "between 1 and 15"),
        ("--river tau=0.5 --river-first 0", "river-first", "count from 1"),
        ("--river tau=0.5 --river-first 4 --river-last 3", "river-first", "ascending"),
        ("--river fixed=2 --river-prefill nan", "river-prefill", "not a number"),
        ("--river fixed=2 --river-refresh 0", "river-refresh", "at least 1"),
        ("--river fixed=2 --quant-group 48", "quant-group", "use 32, 64 or 128"),
        ("--quantise --quant-group 128", "quant-group", "use 64"),
        ("--river fixed=2 --quantiser gptq", "quantiser", "rksc-run quantise --quantiser gptq --text FILE"),
    ] {
        refused(&["generate", "-p", "x"], flags, flag, way_out);
        refused(&["solve"], flags, flag, way_out);
    }
    for (flags, what) in [
        (["--river", "0.5"], "use off, tau=X"),
        (["--quantiser", "awq"], "use rtn, hqq or gptq"),
        (["--quant-kv-bits", "5"], "use 4 or 8"),
    ] {
        let out = run(folder().path(), &[&["solve"], &flags[..]].concat());
        assert!(out.status.code() == Some(1) && stderr(&out).contains(what), "{flags:?}: {}", stderr(&out));
    }
}

#[test]
fn every_exit_runs_and_says_how_deep() {
    let dir = folder();
    let at = dir.path();
    let whole = generate(at, "");
    assert!(whole["river"].is_null() && whole["quantise"].is_null());
    for (flags, depth) in [
        ("--river fixed=2", Some(2.0)),
        ("--river fixed=0 --quantiser rtn --quant-group 32 --quant-kv-bits 8", Some(0.0)),
        ("--river tau=-1 --river-first 3 --river-last 4", Some(3.0)),
        ("--river tau=0.8", None),
        ("--river tau=0.8 --river-batch-min -n 3", None),
        ("--river fixed=1 --river-prefill 0.2 --river-refresh 16", Some(1.0)),
        ("--river fixed=1 --kv-budget 32 --kv-buffer 16", Some(1.0)),
    ] {
        let said = generate(at, flags);
        let totals = &said["river"]["totals"];
        let choices = said["choices"].as_array().unwrap();
        // The first token comes from the prompt, and the last is never run.
        assert_eq!(number(&totals["tokens_decoded"]), 59 * choices.len() as u64, "{flags}");
        let mean = totals["mean_depth"].as_f64().unwrap();
        assert!(depth.map_or((0.0..=8.0).contains(&mean), |depth| mean == depth), "{flags}: {mean}");
        assert_eq!((number(&totals["layers"]), number(&totals["drafts_proposed"])), (8, 0), "{flags}");
        let refreshes = number(&totals["refreshes"]);
        assert_eq!(refreshes > 0, flags.contains("refresh"), "{flags}: {refreshes}");
        assert!(choices.iter().all(|c| c["tokens"].as_array().unwrap().len() == 60), "{flags}");
        assert_ne!(choices[0]["token_logprobs"], whole["choices"][0]["token_logprobs"], "{flags}");
    }
    let quantised = generate(at, "--quantise");
    assert_eq!(quantised["quantise"], json!({"quantiser": "hqq", "group": 64, "kv_bits": "W4"}));
    assert_ne!(quantised["choices"][0]["token_logprobs"], whole["choices"][0]["token_logprobs"]);
    // Who may never leave does not.
    for flags in ["--river off", "--river fixed=8", "--river tau=1"] {
        let same = generate(at, flags);
        assert_eq!(same["choices"], whole["choices"], "{flags}");
    }
    let nothing = json_of(at, &["generate", "-p", "x", "--max-new-tokens", "0", "--river", "fixed=1", "--json"]);
    assert!(nothing["river"]["totals"]["mean_depth"].is_null());
}

#[test]
fn drafts_change_no_token() {
    let dir = folder();
    for drawn in ["", "-n 3 --temperature 0.8 --seed 5"] {
        let without = generate(dir.path(), drawn);
        for draft in ["draft", "draft=1", "draft=15"] {
            let with = generate(dir.path(), &format!("{drawn} --river {draft}"));
            for (w, o) in with["choices"].as_array().unwrap().iter().zip(without["choices"].as_array().unwrap()) {
                assert_eq!((&w["tokens"], &w["text"]), (&o["tokens"], &o["text"]), "{draft} {drawn}");
            }
            let totals = &with["river"]["totals"];
            let (proposed, kept) = (number(&totals["drafts_proposed"]), number(&totals["drafts_kept"]));
            assert!(kept > 0 && kept <= proposed, "{draft} {drawn}: {kept} of {proposed}");
        }
    }
}

#[test]
fn the_words_say_whether_it_is_exact() {
    let dir = folder();
    let said = |flags: &[&str]| stderr(&ok(dir.path(), &[&GENERATE[..6], flags].concat()));
    let draft = said(&["--river", "draft"]);
    assert!(draft.contains("River, exact: the river proposes 4 tokens") && draft.contains(" kept"), "{draft}");
    let fixed = said(&["--river", "fixed=2"]);
    let words = "River, not exact: generated tokens leave the backbone after 2 layers; tokens decoded one by one: 59, in the \
                 backbone for 2.00 of 8 layers in the mean";
    assert!(fixed.contains(words), "{fixed}");
    let quantised = said(&["--quantise"]);
    assert!(quantised.contains("projections in codes, not exact: hqq-g64"), "{quantised}");
}

#[test]
fn solve_says_what_the_river_did() {
    let dir = folder();
    let at = dir.path();
    let solve = ["solve", "--limit", "2", "-B", "3", "--policy", "exact"];
    let flags = ["--river", "tau=0.9", "--river-prefill", "0.5", "--river-verify", "--quant-kv-bits", "8"];
    let report = json_of(at, &[&solve[..], &flags, &["--report", "page.html", "--json"]].concat());
    let totals = &report["river"];
    let decoded = number(&totals["tokens_decoded"]);
    assert!(decoded > 0 && decoded <= number(&report["tokens"]["decode"]), "{totals}");
    let mean = totals["mean_depth"].as_f64().unwrap();
    assert!((1.0..=8.0).contains(&mean), "{mean}");
    assert_eq!(report["config"]["river"]["verify"], true);
    assert_eq!(report["codes"]["kv_bits"], "W8");
    let page = read(&at.join("page.html"));
    for words in ["River, not exact: a generated token leaves", "codes of the river: hqq-g64-kv8", "layers in the mean"]
    {
        assert!(page.contains(words), "{words}");
    }
    let text = String::from_utf8(ok(at, &[&solve[..], &["--river", "draft"]].concat()).stdout).unwrap();
    assert!(text.contains("River, exact: the river proposes 4 tokens"), "{text}");

    let without = json_of(at, &[&solve[..], &["--json"]].concat());
    assert!(without["river"].is_null() && without["codes"].is_null());
    let draft = json_of(at, &[&solve[..], &["--river", "draft", "--json"]].concat());
    let tokens = |report: &Value| -> Vec<Value> {
        let results = report["results"].as_array().unwrap();
        results.iter().flat_map(|r| r["branches"].as_array().unwrap()).map(|b| b["tokens"].clone()).collect()
    };
    assert_eq!(tokens(&draft), tokens(&without));
}

/// What is made once is there for the next run, in the user's cache or where it was named.
#[test]
fn codes_are_kept() {
    let dir = folder();
    let at = dir.path();
    let first = generate(at, "--river fixed=2");
    let files: Vec<_> = std::fs::read_dir(at.join("cache")).unwrap().map(|f| f.unwrap().path()).collect();
    let [file] = files.as_slice() else { panic!("{files:?}") };
    assert!(file.to_str().unwrap().ends_with("hqq-g64.codes"), "{file:?}");
    let made = std::fs::metadata(file).unwrap().modified().unwrap();
    assert_eq!(generate(at, "--river fixed=2")["choices"], first["choices"]);
    assert_eq!(generate(at, "--river fixed=2 --codes named")["choices"], first["choices"]);
    assert!(at.join("named").exists());
    assert_eq!(std::fs::metadata(file).unwrap().modified().unwrap(), made);
}

/// A few thousand characters like those that the model was made for.
fn text(dir: &Path, name: &str, bytes: std::ops::Range<usize>) {
    let all = read(&model_file("problems/fewshot_prefix_1024.txt"));
    std::fs::write(dir.join(name), &all[bytes]).unwrap();
}

#[test]
fn quantise_makes_what_generate_takes() {
    let dir = folder();
    let at = dir.path();
    text(at, "text", 0..1500);
    text(at, "other", 1500..2500);
    let gptq = ["quantise", "--quantiser", "gptq", "--out", "codes"];
    let made = json_of(at, &[&gptq[..], &["--text", "text", "--chunk-tokens", "100", "--json"]].concat());
    assert_eq!(made["options"], json!({"quantiser": "gptq", "group": 64, "kv_bits": "W4"}));
    assert_eq!((&made["file"], &made["num_runs"]), (&json!("codes"), &json!(1)));
    // Integer zeros: 4 bits, and 3 bytes for 64 of them.
    assert_eq!(made["bits_per_weight"], 4.375);
    let kinds = made["kinds"].as_array().unwrap();
    assert_eq!(kinds.len(), 7);
    for kind in kinds {
        let error = kind["relative_error"].as_f64().unwrap();
        assert!((0.05..0.3).contains(&error) && kind["num_matrices"] == 8, "{kind}");
    }
    let bytes = || std::fs::read(at.join("codes")).unwrap();
    let first = bytes();

    let with = ["--river", "fixed=2", "--codes", "codes"];
    let run = |flags: &[&str]| json_of(at, &[&GENERATE[..], &with, flags].concat());
    let said = run(&["--quantiser", "gptq"]);
    assert_eq!(said["river"]["codes"]["quantiser"], "gptq");
    assert_eq!(bytes(), first);

    // Another text is another set, though there is one; and the same text is the same set.
    let words = String::from_utf8(ok(at, &[&gptq[..], &["--text", "other"]].concat()).stdout).unwrap();
    assert!(words.contains("gptq-g64: ") && words.ends_with("written to codes\n"), "{words}");
    assert_ne!(bytes(), first);
    ok(at, &[&gptq[..], &["--text", "text", "--chunk-tokens", "100"]].concat());
    assert_eq!(bytes(), first);
    let fewer = json_of(at, &[&gptq[..], &["--text", "text", "--max-tokens", "50", "--json"]].concat());
    assert_eq!(fewer["num_tokens"], 50);

    // Made for something else, and damaged.
    let generate = [&GENERATE[..], &with].concat();
    fails(at, &generate, 2, "codes", "make the file anew (rksc-run quantise)");
    let mut damaged = first.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(at.join("codes"), damaged).unwrap();
    fails(at, &[&generate[..], &["--quantiser", "gptq"]].concat(), 2, "codes", "delete the file");
    assert!(!at.join("cache").exists());
}

/// Without `--out` the set lies where the other commands look, also in place of one that is there.
#[test]
fn quantise_writes_where_others_look() {
    let dir = folder();
    let at = dir.path();
    text(at, "text", 0..1000);
    let of = |quantiser: &[&str]| json_of(at, &[&["quantise", "--json", "--quantiser"], quantiser].concat());
    let made = of(&["gptq", "--text", "text"]);
    assert!(made["file"].as_str().unwrap().starts_with(at.join("cache").to_str().unwrap()), "{made}");
    generate(at, "--river fixed=2 --quantiser gptq");
    let rtn = of(&["rtn", "--quant-kv-bits", "8"]);
    assert!(rtn["file"].as_str().unwrap().ends_with("rtn-g64-kv8.codes"), "{rtn}");
    assert_eq!((&rtn["num_tokens"], &rtn["num_runs"]), (&json!(0), &json!(0)));
    std::fs::write(rtn["file"].as_str().unwrap(), "damaged").unwrap();
    fails(
        at,
        &["solve", "--quantise", "--quantiser", "rtn", "--quant-kv-bits", "8"],
        2,
        rtn["file"].as_str().unwrap(),
        "delete the file",
    );
    of(&["rtn", "--quant-kv-bits", "8"]);
    generate(at, "--quantise --quantiser rtn --quant-kv-bits 8");
}

#[test]
fn quantise_refuses_what_it_cannot_do() {
    let quantise = ["quantise", "--out", "x"];
    refused(&quantise, "--quantiser gptq", "text", "give --text FILE, or use hqq");
    refused(&quantise, "--text t", "text", "--quantiser gptq");
    refused(&quantise, "--quantiser rtn --chunk-tokens 9", "chunk-tokens", "--quantiser gptq");
    refused(&quantise, "--max-tokens 9", "max-tokens", "--quantiser gptq");
    refused(&quantise, "--quant-group 128", "quant-group", "use 64");
    refused(&quantise, "--quantiser gptq --text t --chunk-tokens 0", "chunk-tokens", "at least 1");
    refused(&quantise, "--quantiser gptq --text t --max-tokens 0", "max-tokens", "at least 1");

    let dir = folder();
    let at = dir.path();
    fails(at, &["quantise", "--quantiser", "gptq", "--text", "nowhere"], 2, "nowhere", "No such file");
    fails(at, &["quantise", "--out", "nowhere/x"], 2, "nowhere/x", "No such file");
    // What is no file of codes stays.
    std::fs::write(at.join("novel"), "It was a dark and stormy night.").unwrap();
    std::fs::copy(model_file("model.safetensors"), at.join("weights")).unwrap();
    for name in ["novel", "weights"] {
        let before = std::fs::read(at.join(name)).unwrap();
        fails(at, &["quantise", "--out", name], 2, name, "name another file");
        assert_eq!(std::fs::read(at.join(name)).unwrap(), before);
    }
    std::fs::write(at.join("empty"), "").unwrap();
    let args = ["quantise", "--quantiser", "gptq", "--text", "empty"];
    let out = run(at, &args);
    assert!(out.status.code() == Some(1) && stderr(&out).contains("--text: empty is empty"), "{}", stderr(&out));
}

#[test]
fn a_plan_takes_the_codes_into_account() {
    let dir = folder();
    let plan = |flags: &[&str]| {
        let args = ["plan", "--shape", "qwen2.5-7b", "--kv-cache-memory", "8GiB", "--json"];
        json_of(dir.path(), &[&args[..], flags].concat())
    };
    let (plain, river, whole) = (plan(&[]), plan(&["--river", "tau=0.5"]), plan(&["--quantise"]));
    assert_eq!(number(&plain["code_bytes"]), 0);
    assert_eq!(river["weight_bytes"], plain["weight_bytes"]);
    assert_eq!(river["code_bytes"], whole["code_bytes"]);
    assert!(number(&whole["weight_bytes"]) < number(&plain["weight_bytes"]) / 4);
    let wide = plan(&["--river", "draft", "--quant-kv-bits", "8", "--quant-group", "32"]);
    assert!(number(&wide["code_bytes"]) > number(&river["code_bytes"]));
    let text = ok(dir.path(), &["plan", "--shape", "qwen2.5-7b", "--river", "draft"]).stdout;
    assert!(String::from_utf8(text).unwrap().contains("weights in codes"));
    assert!(!dir.path().join("cache").exists());
}

#[test]
fn calibrate_finds_the_shallowest_tau_that_reaches_its_goal() {
    let dir = folder();
    let problems = model_file("problems/dev.jsonl").display().to_string();
    let base = ["calibrate", "--problems", &problems, "--river", "--river-texts", "3", "--river-tokens", "24"];
    let of = |flags: &str| {
        let flags: Vec<&str> = flags.split_whitespace().collect();
        json_of(dir.path(), &[&base[..], &flags, &["--json", "--out", "found.json"]].concat())
    };
    let found = of("--river-taus 0.5,0.9,1.0");
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    let depth = |row: &Value| row["mean_depth"].as_f64().unwrap();
    assert!(depth(&rows[0]) < depth(&rows[1]) && depth(&rows[2]) == 8.0, "{rows:?}");
    assert_eq!((rows[2]["kl"].as_f64(), rows[2]["agreement"].as_f64()), (Some(0.0), Some(1.0)));
    assert!(rows[0]["kl"].as_f64().unwrap() > 0.0);
    assert_eq!(found["correlation"].as_array().unwrap().len(), 7);
    assert_eq!(found["tau"], json!({"tau": 0.5}));
    let kept: Value = serde_json::from_str(&read(&dir.path().join("found.json"))).unwrap();
    assert_eq!(kept["tau"], found["tau"]);
    // Nothing but the backbone has a divergence of 0.
    assert_eq!(of("--river-taus 0.5,0.9 --river-kl 0")["tau"], Value::Null);
    let plain = String::from_utf8(ok(dir.path(), &[&base[..], &["--river-taus", "0.5"]].concat()).stdout).unwrap();
    assert!(plain.contains("correlation") && plain.contains("use --river tau=0.5"), "{plain}");
    let out = run(dir.path(), &["calibrate", "--problems", &problems, "--river-texts", "3"]);
    assert_eq!(out.status.code(), Some(1), "without --river: {}", stderr(&out));
    let idle = ["calibrate", "--problems", &problems, "--quantiser", "rtn", "--out", "other.json"];
    fails(dir.path(), &idle, 1, "quantiser", "--river");
}

//! The real binary, each time in a folder of its own: what it prints, writes and returns. Data goes to stdout, the
//! rest to stderr; the exit status says who can act (1 caller, 2 file, 3 memory, 5 cancelled).

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::*;
use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_rksc-run");

fn command(dir: &Path) -> Command {
    let mut command = Command::new(BINARY);
    command.current_dir(dir);
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    command(dir).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Standard output of a command that must succeed.
fn ok(dir: &Path, args: &[&str]) -> String {
    let out = run(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", stderr(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let text = ok(dir, args);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: stdout is not one JSON value: {e}\n{text}"))
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Fails with `code`, names `what` on stderr, and leaves stdout empty.
fn refused(dir: &Path, args: &[&str], code: i32, what: &str) {
    let out = run(dir, args);
    let message = stderr(&out);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
    assert!(message.contains(what), "{args:?}: {what:?} is not in: {message}");
    assert!(out.stdout.is_empty(), "{args:?}: an error on stdout");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = read(path);
    assert!(text.is_empty() || text.ends_with('\n'), "{}: the last line is not whole", path.display());
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// Ids and answers, whatever the order.
fn answers(path: &Path) -> BTreeSet<(String, String)> {
    let lines = lines(path);
    let set: BTreeSet<_> =
        lines.iter().map(|l| (l["id"].as_str().unwrap().to_string(), l["answer"].to_string())).collect();
    assert_eq!(set.len(), lines.len(), "an id appears twice");
    set
}

#[test]
fn the_binary_alone_in_an_empty_folder_solves_its_problems() {
    let dir = folder();
    let binary = dir.path().join("rksc-run");
    std::fs::copy(BINARY, &binary).unwrap();
    let out = Command::new(&binary)
        .args(["solve", "--limit", "2"])
        .current_dir(dir.path())
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    let text = String::from_utf8(out.stdout.clone()).unwrap();
    assert!(text.contains("test-0000") && text.contains("test-0006") && text.contains("of 2 right"), "{text}");
    assert!(stderr(&out).contains("tinymath (bundled)"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "it left files behind");
}

#[test]
fn solve_json_is_one_object_with_the_promised_keys() {
    let dir = folder();
    let report = json(dir.path(), &["solve", "--limit", "3", "--json", "--policy", "exact"]);
    assert_eq!(report["problems"], 3);
    assert!(report["correct"].as_u64().unwrap() <= 3);
    let accuracy = report["accuracy"].as_f64().unwrap();
    assert!((accuracy - report["correct"].as_f64().unwrap() / 3.0).abs() < 1e-12);
    for key in ["mean", "p50", "p90"] {
        assert!(report["latency_ms"][key].as_f64().unwrap() > 0.0, "latency_ms.{key}");
    }
    for key in ["prefill", "decode", "verify"] {
        assert!(report["tokens"][key].as_u64().unwrap() > 0, "tokens.{key}");
    }
    assert_eq!((&report["verify"]["run"], &report["verify"]["skipped"]), (&24.into(), &0.into()));
    assert_eq!(report["policy"], "exact");
    let (peak, shared) = (report["blocks"]["peak"].as_u64().unwrap(), report["blocks"]["shared"].as_u64().unwrap());
    assert!(peak > shared && shared > 0, "{peak} {shared}");
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.iter().map(|r| r["branches"].as_array().unwrap().len()).collect::<Vec<_>>(), [8, 8, 8]);
    let prefill: u64 = results.iter().map(|r| r["tokens"]["prefill"].as_u64().unwrap()).sum();
    assert_eq!(report["tokens"]["prefill"], prefill);
}

#[test]
fn out_holds_a_whole_record_a_line() {
    let dir = folder();
    let report = json(dir.path(), &["solve", "--limit", "2", "-B", "3", "--policy", "exact", "--out", "o", "--json"]);
    let lines = lines(&dir.path().join("o"));
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert!(line["id"].is_string() && line["answer"].is_string() && line["correct"].is_boolean());
        assert!(line["latency_ms"].as_f64().unwrap() > 0.0);
        let branches = line["branches"].as_array().unwrap();
        assert_eq!(branches.len(), 3);
        for b in branches {
            assert!(b["tokens"].as_array().unwrap().len() > 5);
            assert!(b["text"].as_str().unwrap().contains("The answer is"));
            assert!(b["answer"].is_string() && b["ended"] == "end-token");
            assert!((0.0..=1.0).contains(&b["score"].as_f64().unwrap()));
            assert!((0.0..=1.0).contains(&b["confidence"].as_f64().unwrap()));
        }
    }
    let right = lines.iter().filter(|l| l["correct"] == true).count();
    assert_eq!(report["correct"], right);
}

#[test]
fn a_tree_search_writes_its_whole_tree() {
    let dir = folder();
    let args =
        ["solve", "--limit", "2", "-B", "3", "--temperature", "0.9", "--depth", "2", "--beam", "1", "--score", "both"];
    let report = json(dir.path(), &[&args[..], &["--out", "o", "--json"]].concat());
    assert_eq!(
        report["config"]["search"],
        serde_json::json!({"depth": 2, "beam": 1, "score": "both", "min_score": null})
    );
    for line in lines(&dir.path().join("o")) {
        let tree = line["tree"].as_array().unwrap();
        let ended = |what: &str| tree.iter().filter(|n| n["ended"] == what).count();
        assert_eq!(ended("expanded"), 1);
        assert_eq!(tree.len(), 3 + 3);
        assert!(tree.iter().all(|n| n["text"].is_string() && n["depth"].as_u64().unwrap() <= 2));
        assert!(tree[3..].iter().all(|n| n["parent"].as_u64().is_some_and(|p| p < 3)));
    }
    let text = ok(dir.path(), &args);
    assert!(text.contains("tree of 6 nodes: 1 expanded"), "{text}");
    // A delimiter as a shell passes it on.
    let same = json(dir.path(), &[&args[..], &["--json", "--step-delimiter", "\\n"]].concat());
    assert_eq!(same["tokens"], report["tokens"]);
}

#[test]
fn a_trial_exit_needs_words_for_it_and_counts_what_it_costs() {
    let dir = folder();
    let at = dir.path();
    let args = ["solve", "--limit", "2", "--exit", "trial", "--trial-confidence", "0.5"];
    ok(at, &[&args[..], &["--out", "o"]].concat());
    let trials: Vec<Value> = lines(&at.join("o")).into_iter().map(|l| l["trials"].clone()).collect();
    assert!(
        trials.iter().all(|t| t["run"].as_u64() > Some(0) && t["tokens"].as_u64() > t["run"].as_u64()),
        "{trials:?}"
    );
    let mut pack: Value = serde_json::from_str(&read(&model_file("prompts.json"))).unwrap();
    pack.as_object_mut().unwrap().remove("trial");
    std::fs::write(at.join("pack"), pack.to_string()).unwrap();
    std::fs::write(at.join("keep"), "kept").unwrap();
    refused(at, &[&args[..], &["--prompts", "pack", "--out", "keep"]].concat(), 1, "prompts: trial");
    assert_eq!(read(&at.join("keep")), "kept");
}

#[test]
fn resume_after_a_torn_line_gives_the_uninterrupted_file() {
    let dir = folder();
    let args = ["solve", "--limit", "6", "-B", "3", "--json", "--out"];
    ok(dir.path(), &[&args[..], &["whole"]].concat());
    let whole = answers(&dir.path().join("whole"));
    assert_eq!(whole.len(), 6);
    let text = read(&dir.path().join("whole"));
    let third = text.match_indices('\n').nth(2).unwrap().0;
    // In the middle of the third line; between lines; in the first; nothing at all.
    for (cut, left) in [(third - 10, 4), (third + 1, 3), (5, 6), (0, 6)] {
        std::fs::write(dir.path().join("torn"), &text[..cut]).unwrap();
        let report = json(dir.path(), &[&args[..], &["torn", "--resume"]].concat());
        assert_eq!(report["problems"], left, "cut at {cut}: only what is missing is solved");
        assert_eq!(answers(&dir.path().join("torn")), whole, "cut at {cut}");
    }
    let again = json(dir.path(), &[&args[..], &["whole", "--resume"]].concat());
    assert_eq!((&again["problems"], &again["accuracy"]), (&0.into(), &Value::Null));
    assert_eq!(answers(&dir.path().join("whole")), whole);
    std::fs::write(dir.path().join("other"), "{\"id\": \"a\"}\n{\"x\": 1}\n").unwrap();
    refused(dir.path(), &[&args[..], &["other", "--resume"]].concat(), 2, "other: line 2");
    // What is not ours is not cut, even where it ends like a torn line.
    for foreign in ["dear diary", "{\"id\": \"a\"}\nand more", "{\"name\": 1"] {
        std::fs::write(dir.path().join("other"), foreign).unwrap();
        refused(dir.path(), &[&args[..], &["other", "--resume"]].concat(), 2, "not a result of this command");
        assert_eq!(read(&dir.path().join("other")), foreign);
    }
}

#[test]
fn resume_survives_a_tear_inside_a_character() {
    let dir = folder();
    let question = &problems("test", 1)[0].question;
    let line = |id: &str| serde_json::json!({"id": id, "question": question}).to_string();
    std::fs::write(dir.path().join("p"), [line("\u{e9}1"), line("\u{e9}2"), line("\u{e9}3")].join("\n")).unwrap();
    let args = ["solve", "-B", "1", "--problems", "p", "--json", "--out", "o"];
    ok(dir.path(), &args);
    let whole = answers(&dir.path().join("o"));
    let bytes = std::fs::read(dir.path().join("o")).unwrap();
    let second = bytes.iter().position(|&b| b == b'\n').unwrap() + 1;
    // `{"id":"` and the first of the two bytes of the letter.
    std::fs::write(dir.path().join("o"), &bytes[..second + 8]).unwrap();
    assert_eq!(json(dir.path(), &[&args[..], &["--resume"]].concat())["problems"], 2);
    assert_eq!(answers(&dir.path().join("o")), whole);
}

#[test]
fn nothing_is_overwritten_before_everything_else_is_known_to_be_sound() {
    let dir = folder();
    let at = dir.path();
    std::fs::write(at.join("keep"), "kept").unwrap();
    std::fs::write(at.join("pack.json"), "{}").unwrap();
    std::fs::write(at.join("two"), "{\"tokens\": [1, 2]}\n{\"tokens\": [1, -2]}\n").unwrap();
    refused(at, &["solve", "--prompts", "pack.json", "--out", "keep"], 2, "pack.json");
    refused(at, &["solve", "--kv-cache-memory", "1KiB", "--out", "keep"], 3, "bytes are missing");
    refused(at, &["solve", "-B", "0", "--out", "keep"], 1, "branches");
    refused(at, &["score", "--in", "two", "--out", "keep"], 2, "two: line 2");
    refused(at, &["score", "--in", "two", "--out", "keep", "-m", "nowhere"], 2, "two: line 2");
    assert_eq!(read(&at.join("keep")), "kept");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_ends_with_5_and_whole_lines() {
    let dir = folder();
    let out = dir.path().join("o");
    let problems = model_file("problems/test.jsonl");
    let mut child = command(dir.path())
        .args(["solve", "--policy", "no-sharing", "--json", "--out", "o", "--problems"])
        .arg(&problems)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first lines say that it is at work.
    while std::fs::read_to_string(&out).unwrap_or_default().lines().count() < 2 {
        assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("cancelled") && output.stdout.is_empty());
    let done = lines(&out).len();
    assert!((2..500).contains(&done), "{done} lines");
}

fn golden(idx: usize) -> (String, String) {
    let golden: Value = serde_json::from_str(&read(&model_file("golden/golden.json"))).unwrap();
    let text = |key: &str| golden["prompts"][idx][key].as_str().unwrap().to_string();
    (format!("<|bos|>{}", text("prompt")), text("greedy64_text"))
}

#[test]
fn generate_continues_as_the_goldens_do_streamed_or_not() {
    let dir = folder();
    for idx in [0, 3] {
        let (prompt, expected) = golden(idx);
        let ends = expected.contains("<|eos|>");
        let expected = expected.split("<|eos|>").next().unwrap();
        let args = ["generate", "--dtype", "f32", "--max-new-tokens", "64", "-p", &prompt];
        let text = ok(dir.path(), &args);
        assert_eq!(text.trim_end_matches('\n'), expected);
        assert_eq!(ok(dir.path(), &[&args[..], &["--stream"]].concat()), text);
        std::fs::write(dir.path().join("p"), &prompt).unwrap();
        assert_eq!(
            ok(dir.path(), &["generate", "--dtype", "f32", "--max-new-tokens", "64", "--prompt-file", "p"]),
            text
        );
        let json = json(dir.path(), &[&args[..], &["--json"]].concat());
        let choice = &json["choices"][0];
        assert_eq!(choice["text"].as_str(), Some(expected));
        assert_eq!(choice["finish_reason"], if ends { "stop" } else { "length" });
        assert_eq!(choice["tokens"].as_array().unwrap().len(), choice["token_logprobs"].as_array().unwrap().len());
        assert_eq!(json["usage"]["completion_tokens"], choice["tokens"].as_array().unwrap().len());
    }
    let (prompt, expected) = golden(0);
    let stopped = ok(dir.path(), &["generate", "-p", &prompt, "--stop", "The answer"]);
    assert_eq!(stopped.trim_end_matches('\n'), expected.split_once("The answer").unwrap().0.trim_end_matches('\n'));
    let short = json(dir.path(), &["generate", "-p", &prompt, "--max-new-tokens", "5", "--json"]);
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 5);
    let past = json(dir.path(), &["generate", "-p", &prompt, "--max-new-tokens", "40", "--ignore-eos", "--json"]);
    assert_eq!(past["usage"]["completion_tokens"], 40);
}

#[test]
fn sampled_continuations_are_seeded_repeatable_and_distinct() {
    let dir = folder();
    let (prompt, _) = golden(2);
    // Ten words into the model's own text nothing is certain: past the end token it makes up problems.
    let texts = |seed: &str| -> Vec<String> {
        let args = ["generate", "-p", &prompt, "-n", "3", "--temperature", "1", "--ignore-eos", "--seed", seed];
        let json = json(dir.path(), &[&args[..], &["--max-new-tokens", "120", "--json"]].concat());
        json["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
    };
    let first = texts("1");
    assert_eq!(first.len(), 3);
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 3, "the draws of the branches are the same");
    assert_eq!(texts("1"), first);
    assert_ne!(texts("2"), first);
}

#[test]
fn score_of_text_and_of_its_tokens_agree() {
    let dir = folder();
    let (prompt, continuation) = golden(0);
    let text = format!("{prompt}{}", continuation.split_once("<|eos|>").unwrap().0);
    let tokens = tokenizer().encode(&text).unwrap();
    let input = [
        serde_json::json!({"id": "text", "text": text}),
        serde_json::json!({"id": 7, "tokens": tokens}),
        serde_json::json!({"tokens": [0]}),
    ];
    let input: Vec<String> = input.iter().map(Value::to_string).collect();
    std::fs::write(dir.path().join("in"), input.join("\n")).unwrap();
    let args = ["score", "--in", "in", "--out", "out", "--dtype", "f32", "--top-k", "4"];
    assert_eq!(ok(dir.path(), &args), "");
    let sums = json(dir.path(), &[&args[..], &["--json"]].concat());
    let total = 2 * tokens.len() + 1;
    assert_eq!((&sums["lines"], &sums["tokens"], &sums["scored"]), (&3.into(), &total.into(), &(total - 3).into()));
    assert!(sums["mean_logprob"].as_f64().unwrap() < 0.0);
    let records = lines(&dir.path().join("out"));
    assert_eq!(
        (&records[0]["id"], &records[1]["id"], &records[2]["id"]),
        (&"text".into(), &7.into(), &"line-3".into())
    );
    for key in ["tokens", "token_logprobs", "last_top"] {
        assert_eq!(records[0][key], records[1][key]);
    }
    let logprobs = records[0]["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), tokens.len());
    assert!(logprobs[0].is_null());
    assert!(logprobs[1..].iter().all(|x| x.as_f64().unwrap() <= 0.0));
    // The model's own greedy text is likely to it.
    let own = &logprobs[tokenizer().encode(&prompt).unwrap().len()..];
    assert!(own.iter().all(|x| x.as_f64().unwrap() > -0.7), "{own:?}");
    let top = records[0]["last_top"].as_array().unwrap();
    assert_eq!((top.len(), &top[0][0]), (4, &Value::from(EOS)));
    assert!(top.windows(2).all(|w| w[0][1].as_f64() >= w[1][1].as_f64()), "{top:?}");
}

#[test]
fn a_context_is_not_scored_and_lines_share_it() {
    let dir = folder();
    let (prompt, continuation) = golden(0);
    let text = continuation.split_once("<|eos|>").unwrap().0;
    let encode = |text: &str| tokenizer().encode(text).unwrap().len();
    let (context, total) = (encode(&prompt), encode(&format!("{prompt}{text}")));
    let input = [
        serde_json::json!({"text": format!("{prompt}{text}")}),
        serde_json::json!({"context": prompt, "text": text}),
        serde_json::json!({"context": prompt, "text": text}),
    ];
    let input: Vec<String> = input.iter().map(Value::to_string).collect();
    std::fs::write(dir.path().join("in"), input.join("\n")).unwrap();
    let sums = json(dir.path(), &["score", "--in", "in", "--out", "out", "--json"]);
    assert_eq!(sums["scored"], total - 1 + 2 * (total - context));
    // A line that is scored whole leaves no blocks; the third finds those of the context that end before its last row.
    let shared = (context - 1) / 16 * 16;
    assert_eq!(sums["stats"]["tokens_computed"], 3 * total - shared);
    let records = lines(&dir.path().join("out"));
    for record in &records[1..] {
        for key in ["token_logprobs", "predicted"] {
            let (record, whole) = (record[key].as_array().unwrap(), records[0][key].as_array().unwrap());
            assert!(record[..context].iter().all(Value::is_null));
            assert_eq!(record[context..], whole[context..]);
        }
        // The text is the model's own.
        assert_eq!(record["predicted"].as_array().unwrap()[context..], record["tokens"].as_array().unwrap()[context..]);
    }
}

#[test]
fn score_without_a_tokenizer_takes_tokens_and_no_text() {
    let dir = folder();
    let model = dir.path().join("m");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(model_file(name), model.join(name)).unwrap();
    }
    std::fs::write(dir.path().join("tokens"), "{\"tokens\": [0, 349, 32, 615]}\n").unwrap();
    std::fs::write(dir.path().join("text"), "{\"text\": \"Problem: x\"}\n").unwrap();
    ok(dir.path(), &["score", "-m", "m", "--in", "tokens", "--out", "out"]);
    assert_eq!(lines(&dir.path().join("out"))[0]["token_logprobs"].as_array().unwrap().len(), 4);
    refused(dir.path(), &["score", "-m", "m", "--in", "text", "--out", "out"], 2, "tokenizer.json");
}

#[test]
fn inspect_plan_and_devices_speak_json() {
    let dir = folder();
    let model = model_file("");
    let bundled = json(dir.path(), &["inspect", "--json"]);
    let of_folder = json(dir.path(), &["inspect", "--json", "--tensors", "-m", model.to_str().unwrap()]);
    for inspect in [&bundled, &of_folder] {
        assert_eq!((&inspect["num_params"], &inspect["vocab_size"]), (&2_804_928.into(), &768.into()));
        assert_eq!((&inspect["problems"], &inspect["end_tokens"]), (&serde_json::json!([]), &serde_json::json!([EOS])));
    }
    assert_eq!(of_folder["tensors"].as_array().unwrap().len() as u64, of_folder["num_tensors"].as_u64().unwrap());
    let plan = json(dir.path(), &["plan", "--json", "--kv-cache-memory", "8MiB"]);
    assert!(plan["kv_cache_bytes"].as_u64().unwrap() <= 8 << 20);
    assert_eq!(plan["kv_bytes_per_token"], 2048, "8 layers, K and V, 2 heads of 32 bf16");
    let shape = json(dir.path(), &["plan", "--json", "--shape", "qwen2.5-7b", "--kv-cache-memory", "8GiB"]);
    assert!(shape["weight_bytes"].as_u64().unwrap() > 14_000_000_000);
    let devices = json(dir.path(), &["devices", "--json"]);
    let simd = devices["devices"][0]["simd"].as_array().unwrap();
    let levels: Vec<&str> = simd.iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(levels, simd_levels());
    // A GPU, or one line that says why there is none.
    let gpus = &devices["devices"].as_array().unwrap()[1..];
    match devices["no_cuda"].as_str() {
        Some(why) => assert!(gpus.is_empty() && why.starts_with("no CUDA device: ") && !why.contains('\n'), "{why}"),
        None => assert!(!gpus.is_empty() && gpus.iter().all(|gpu| gpu["total_bytes"].as_u64() > Some(0)), "{devices}"),
    }
}

/// On the emulated device an op is checked and counted, never timed.
#[test]
fn bench_kernels_checks_an_op() {
    let dir = folder();
    let report = json(
        dir.path(),
        &["bench", "kernels", "--device", "emulated", "--op", "sample", "--json", "--out", "cases.jsonl"],
    );
    let cases = report["cases"].as_array().unwrap();
    assert!(cases.len() == 2 && report["timed"] == false && report["copy_gb_s"].is_null(), "{report}");
    for case in cases {
        assert!(case["op"] == "sample" && case["right"] == true && case["us"].is_null(), "{case}");
        assert!(case["bytes"].as_u64() > Some(0) && case["error"] == 0.0, "{case}");
    }
    // The file holds the same: the head, then the cases.
    let written = lines(&dir.path().join("cases.jsonl"));
    assert_eq!(written[1..], cases[..]);
    assert_eq!(written[0]["date"], report["date"]);
    refused(dir.path(), &["bench", "kernels", "--device", "emulated", "--op", "fft"], 1, "row_stats");
    refused(dir.path(), &["bench", "kernels", "--device", "cpu"], 1, "no CUDA kernels");
    refused(dir.path(), &["bench", "kernels", "--device", "emulated", "--planted-fault"], 4, "out of bounds");
}

/// Every mechanism is an arm against `exact`, timed or counted, under each selection rule.
#[test]
fn bench_mechanisms_compares_each_with_exact() {
    let dir = folder();
    let small = ["bench", "mechanisms", "--limit", "2", "-B", "3", "--prefix", "none", "--json"];
    let with = |more: &[&str]| json(dir.path(), &[&small[..], more].concat());
    let counted = with(&["--untimed", "2"]);
    let arms = counted["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|a| a["name"].as_str().unwrap()).collect();
    assert_eq!((names[0], names[names.len() - 1], &counted["problems"]), ("exact", "rksc", &2.into()));
    for a in arms {
        assert!(a["timing"].is_null() && a["tokens"]["decode"].as_u64().unwrap() > 0, "{a}");
        let rules: Vec<&Value> = a["selections"].as_array().unwrap().iter().map(|s| &s["rule"]).collect();
        assert_eq!(rules, ["vote", "score*sqrt(conf)"]);
    }
    // The code's form of the early verdict leaves every pass on this model.
    let paper = arms.iter().find(|a| a["name"] == "verify exit: the paper's").unwrap();
    assert_eq!((&paper["decisions"]["exits"], &paper["verified"]), (&6.into(), &6.into()));
    let timed = with(&["--only", "paper's rule,rksc", "--select", "vote"]);
    let arms = timed["arms"].as_array().unwrap();
    assert_eq!(arms.iter().map(|a| &a["name"]).collect::<Vec<_>>(), ["exact", "skip: the paper's rule", "rksc"]);
    assert!(arms[0]["timing"]["gain"].is_null() && arms[2]["timing"]["gain"]["ceiling"].as_f64().unwrap() > 0.0);
    // Counted and timed, the branches are the same.
    assert_eq!(arms[0]["tokens"]["decode"], counted["arms"][0]["tokens"]["decode"]);
    assert_eq!(arms[2]["selections"][0]["accuracy"], counted["arms"][names.len() - 1]["selections"][0]["accuracy"]);
    let table =
        ok(dir.path(), &["bench", "mechanisms", "--limit", "1", "-B", "2", "--prefix", "none", "--only", "none"]);
    assert!(table.contains("selected by score*sqrt(conf)") && table.contains("baseline"), "{table}");
    refused(dir.path(), &["bench", "mechanisms", "--limit", "0"], 1, "--limit: leaves no problems");
    refused(dir.path(), &["bench", "mechanisms", "--rounds", "0"], 1, "--rounds");
}

#[test]
fn bench_asks_compares_pairs_and_shares_prompts() {
    let dir = folder();
    let problems = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinymath/problems/dev.jsonl");
    let negatives = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinymath/problems/negatives.jsonl");
    let pairs = ["--problems", problems, "--negatives", negatives, "--prefix", "none"];
    let small = ["--limit", "2", "-B", "3", "--wordings", "3", "--taus=-1,2", "--depths", "1,2", "--recompute", "0.5"];
    let all = [&["bench", "asks", "--svg", "asks.svg", "--json"], &pairs[..], &small[..]].concat();
    let report = json(dir.path(), &all);
    let depths: Vec<&Value> = report["pairs"].as_array().unwrap().iter().map(|p| &p["depth"]).collect();
    assert_eq!(depths, [1, 2, 6]);
    let everything = &report["pairs"][0]["taus"][0];
    assert_eq!((&everything["kinds"][0]["kind"], &everything["kinds"][0]["merged"]), (&"paraphrase".into(), &8.into()));
    assert_eq!((&everything["false_rate"], &everything["kinds"].as_array().unwrap().len()), (&1.0.into(), &5));
    assert_eq!(report["pairs"][0]["taus"][1]["false_rate"], 0.0);
    let arms = report["arms"].as_array().unwrap();
    let reuse: Vec<f64> = arms.iter().map(|a| a["reuse_rate"].as_f64().unwrap()).collect();
    assert_eq!(reuse[..5], [0.0, 1.0, 0.0, 1.0, 0.0], "token-exact; everything and nothing, after 1 and 2 layers");
    let saved: Vec<f64> = arms.iter().map(|a| a["saved_tokens"].as_f64().unwrap()).collect();
    assert!(saved[1] > saved[3] && saved[3] > 0.0 && saved[0] == 0.0 && saved[2] == 0.0, "{saved:?}");
    assert!(report["sharing_table"]["cells"].as_array().unwrap().len() >= 4);
    assert!(read(&dir.path().join("asks.svg")).contains("token-exact sharing"));
    let table = ok(dir.path(), &[&["bench", "asks", "--solve", "0"], &pairs[..], &small[..]].concat());
    assert!(table.contains("AUC against number") && table.contains("start-up table"), "{table}");
    refused(dir.path(), &["bench", "asks", "--negatives", "nowhere.jsonl"], 2, "nowhere.jsonl");
}

/// A run of the command line measures where comparing pays, unless it is told to compare always.
#[test]
fn solve_measures_where_comparing_prompts_pays() {
    let dir = folder();
    let args = ["solve", "--limit", "1", "-B", "2", "--wordings", "2", "--asks", "semantic", "--asks-tau=-1", "--json"];
    let measured = json(dir.path(), &args);
    assert!(measured["config"]["sharing_table"]["cells"].as_array().unwrap().len() >= 4, "{}", measured["config"]);
    let always = json(dir.path(), &[&args[..], &["--asks-always"]].concat());
    assert!(always["config"]["sharing_table"].is_null());
    assert!(always["tokens"]["probed"].as_u64().unwrap() > 0);
}

#[test]
fn bench_agree_compares_devices() {
    let dir = folder();
    let args =
        ["bench", "agree", "--device", "emulated", "--limit", "1", "-B", "2", "--kv-cache-memory", "8MiB", "--json"];
    let report = json(dir.path(), &args);
    assert_eq!((&report["branches"], &report["different"]), (&2.into(), &0.into()));
    assert_eq!(report["problems"].as_array().unwrap().len(), 1);
}

/// A pack of one's own: other words around the problem, another form of answer, approaches from a file.
#[test]
fn solve_takes_another_prompt_pack_and_other_approaches() {
    let dir = folder();
    let at = dir.path();
    let mut pack: Value = serde_json::from_str(&read(&model_file("prompts.json"))).unwrap();
    pack["name"] = "mine".into();
    pack["approach"] = "\nApproach #{number}: Count. {approach}\nStep 1:".into();
    // The result of the last step instead of the sentence behind it, which is cut off.
    pack["answer_pattern"] = "=(-?[0-9]+)".into();
    pack["stops"] = serde_json::json!(["\nThe answer"]);
    std::fs::write(at.join("pack"), pack.to_string()).unwrap();
    std::fs::write(at.join("approaches"), "Use short equations.\n\nEquations, short ones.\nUse equations.\n").unwrap();
    let args = ["solve", "--limit", "4", "--prompts", "pack", "--approaches", "approaches", "-B", "3", "--json"];
    let report = json(at, &[&args[..], &["--policy", "exact", "--out", "o"]].concat());
    assert_eq!((&report["problems"], &report["verify"]["run"]), (&4.into(), &12.into()));
    assert!(report["correct"].as_u64().unwrap() >= 3, "{report}");
    for line in lines(&at.join("o")) {
        for branch in line["branches"].as_array().unwrap() {
            let text = branch["text"].as_str().unwrap();
            assert!(!text.contains("The answer") && branch["ended"] == "end-token", "{text:?}");
            let last = text.rsplit_once('=').and_then(|(_, t)| t.lines().next());
            assert_eq!(branch["answer"].as_str(), last, "{text:?}");
        }
    }
    refused(at, &[&args[..4], &["pack", "--approaches", "approaches", "-B", "4"]].concat(), 1, "3 approaches");
    pack["no"] = serde_json::json!(["not at all"]);
    std::fs::write(at.join("pack"), pack.to_string()).unwrap();
    refused(at, &["solve", "--prompts", "pack"], 1, "prompts: no: \"not at all\" is not a single token");
}

#[test]
fn mistakes_are_named_with_their_exit_status() {
    let dir = folder();
    let at = dir.path();
    // The command line itself.
    refused(at, &["solve", "--policy", "best"], 1, "\"best\" is unknown; use one of no-sharing");
    refused(at, &["solve", "--bogus"], 1, "--bogus");
    refused(at, &["solve", "--dtype", "int3"], 1, "int3");
    refused(at, &["solve", "--kv-cache-memory", "12XB"], 1, "unknown unit \"XB\"");
    refused(at, &["generate"], 1, "--prompt");
    // Options that parse and cannot work.
    refused(at, &["solve", "--block-size", "24"], 1, "block-size: 24");
    refused(at, &["solve", "--simd", "neon"], 1, "neon");
    refused(at, &["solve", "-B", "9"], 1, "8 approaches");
    refused(at, &["solve", "--temperature=-1"], 1, "temperature");
    refused(at, &["generate", "-p", "x", "-n", "2", "--stream"], 1, "--stream");
    refused(at, &["plan", "--shape", "gpt-9"], 1, "gpt-9");
    refused(at, &["bench", "ladder", "--shape", "gpt-9"], 1, "gpt-9");
    // Nothing, too much, and more than a number holds.
    let most = &usize::MAX.to_string();
    refused(at, &["solve", "-B", "0"], 1, "branches: must be between 1 and 1024");
    refused(at, &["solve", "-B", most], 1, "branches: must be between 1 and 1024");
    refused(at, &["solve", "-B", "99999999999999999999"], 1, "99999999999999999999");
    refused(at, &["solve", "--max-new-tokens", "0"], 1, "max-new-tokens");
    refused(at, &["solve", "--depth", "2"], 1, "use --temperature 0.7, or --depth 1");
    refused(at, &["solve", "--depth", "0"], 1, "depth: must be between 1 and 64");
    refused(at, &["solve", "--depth", "2", "--beam", "0"], 1, "beam: must be at least 1");
    refused(at, &["solve", "--beam", "2"], 1, "--depth");
    refused(at, &["solve", "--depth", "1", "--step-delimiter", ""], 1, "an empty delimiter ends nothing");
    refused(at, &["solve", "--exit", "trial", "--trial-confidence", "2"], 1, "trial-confidence: must be between");
    refused(at, &["solve", "--agree", "0"], 1, "agree: must be at least 1");
    refused(at, &["solve", "--concurrency", "0"], 1, "concurrency");
    refused(at, &["solve", "--threads", most], 1, "threads: must be at most 1024");
    refused(at, &["solve", "--temperature", "nan"], 1, "temperature");
    refused(at, &["generate", "-p", ""], 1, "--prompt: is empty");
    refused(at, &["generate", "-p", "x", "-n", "0"], 1, "-n: must be between");
    refused(at, &["generate", "-p", &"x ".repeat(3000)], 1, "exceed the model's context of 2048");
    refused(at, &["bench", "decode", "--context", most], 1, "--context");
    refused(at, &["bench", "decode", "--steps", most], 1, "exceed the model's 2048");
    refused(at, &["bench", "decode", "-B", "0"], 1, "-B");
    refused(at, &["bench", "prefill", "--context", most], 1, "--context");
    refused(at, &["bench", "prefill", "--shape", "tiny", "--context", "1", "--steps", most], 1, "--steps");
    refused(at, &["bench", "gemm", "--shape", "tiny", "--rows", "0"], 1, "--rows");
    refused(at, &["bench", "gemm", "--shape", "tiny", "--threads", most], 1, "threads");
    refused(at, &["bench", "roof", "--threads", most], 1, "threads");
    refused(at, &["bench", "ladder", "--limit", "0"], 1, "--limit: leaves no problems");
    refused(at, &["bench", "ladder", "--rounds", "0"], 1, "--rounds");
    refused(at, &["solve", "--kv-cache-memory", "1e30"], 3, "out of memory");
    let plan = json(at, &["plan", "--json", "--prefix", most, "--own", most]);
    assert_eq!((&plan["max_branches"], &plan["kv_bytes_per_branch"]), (&0.into(), &u64::MAX.into()));
    for (n, tokens) in [("0", 0), ("3", 3)] {
        let none = json(at, &["generate", "-p", "x", "--max-new-tokens", n, "--json"]);
        assert_eq!(
            (&none["usage"]["completion_tokens"], &none["choices"][0]["finish_reason"]),
            (&tokens.into(), &"length".into())
        );
    }
    assert_eq!(json(at, &["solve", "--limit", "1", "--max-new-tokens", most, "--json"])["correct"], 1);
    assert_eq!(json(at, &["solve", "--limit", "0", "--json"])["problems"], 0);
    // Files.
    refused(at, &["generate", "-p", "x", "-m", "nowhere"], 2, "nowhere");
    refused(at, &["solve", "-m", "nowhere"], 2, "nowhere");
    refused(at, &["solve", "--problems", "nowhere.jsonl"], 2, "nowhere.jsonl");
    refused(at, &["score", "--in", "nowhere.jsonl", "--out", "o"], 2, "nowhere.jsonl");
    for (line, what) in [
        ("nonsense", "line 1"),
        ("{}", "needs either"),
        ("{\"tokens\": [1], \"text\": \"x\"}", "needs either"),
        ("{\"tokens\": [4294967296]}", "line 1"),
    ] {
        std::fs::write(at.join("in"), line).unwrap();
        refused(
            at,
            &["score", "--in", "in", "--out", "o"],
            2,
            &format!("in: line 1: {}", what.trim_start_matches("line 1")),
        );
    }
    for line in ["{\"tokens\": []}", "{\"text\": \"\"}", "{\"tokens\": [768]}"] {
        std::fs::write(at.join("in"), line).unwrap();
        refused(at, &["score", "--in", "in", "--out", "o"], 1, "in: line 1: tokens");
    }
    let twice = stderr(&run(at, &["solve", "--problems", "nowhere.jsonl"]));
    assert_eq!(twice.matches("No such file").count(), 1, "{twice}");
    std::fs::write(at.join("bad.jsonl"), "{\"id\": 1, \"question\": \"q\"}\n{\"id\": 2}\n").unwrap();
    refused(at, &["solve", "--problems", "bad.jsonl"], 2, "bad.jsonl: line 2: field question");
    std::fs::write(at.join("good.jsonl"), "{\"id\": 1, \"question\": \"q\"}\n").unwrap();
    refused(at, &["solve", "-m", "nowhere", "--problems", "good.jsonl"], 2, "nowhere");
    std::fs::write(at.join("pack.json"), "{\"name\": \"x\"}").unwrap();
    refused(at, &["solve", "--prompts", "pack.json"], 2, "pack.json");
    std::fs::create_dir(at.join("empty")).unwrap();
    refused(at, &["inspect", "-m", "empty"], 2, "config.json");
    // Memory and devices.
    refused(at, &["solve", "--kv-cache-memory", "1KiB"], 3, "bytes are missing");
    refused(at, &["solve", "--kv-cache-memory", "100KiB"], 3, "bytes are missing");
    refused(at, &["solve", "--device", "cuda:0"], 4, "--device cpu");
    refused(at, &["solve", "--device", "tpu"], 1, "tpu");
}

#[test]
fn verbose_logs_and_progress_stay_off_stdout() {
    let dir = folder();
    let quiet = json(dir.path(), &["solve", "--limit", "1", "--json"]);
    let loud = json(dir.path(), &["-vv", "solve", "--limit", "1", "--json"]);
    assert_eq!((&quiet["correct"], &quiet["tokens"]), (&loud["correct"], &loud["tokens"]));
    let script = ok(dir.path(), &["completions", "bash"]);
    assert!(script.contains("rksc-run"));
    assert!(ok(dir.path(), &["--version"]).starts_with("rksc-run "));
}

/// Whatever a command says, `--json` says it as one value on stdout, with the fields that others build on.
#[test]
fn bench_commands_speak_json() {
    let dir = folder();
    let tiny = |args: &[&str]| {
        let all = [&["bench"], args, &["--shape", "tiny", "--json", "--threads", "1"]].concat();
        json(dir.path(), &all)
    };
    let ladder = tiny(&["ladder", "--limit", "2", "-B", "2", "--dtype", "f32"]);
    assert_eq!((&ladder["dtype"], &ladder["problems"]), (&"f32".into(), &2.into()));
    let policies = ladder["policies"].as_array().unwrap();
    let names: Vec<&str> = policies.iter().map(|p| p["policy"].as_str().unwrap()).collect();
    assert_eq!(names, ["no-sharing", "paper-baseline", "exact-fresh", "exact", "rksc-paper", "rksc"]);
    for p in policies {
        for key in ["p10", "p50", "p90", "mean"] {
            assert!(p["latency_ms"][key].as_f64().unwrap() > 0.0, "latency_ms.{key}");
        }
        for key in ["prefill", "decode", "verify"] {
            assert!(p["tokens"][key].as_u64().unwrap() > 0, "tokens.{key}");
        }
        for key in ["peak", "shared", "private"] {
            assert!(p["blocks"][key].is_u64(), "blocks.{key}");
        }
        assert!(p["accuracy"].is_null() && p["agreement"] == 1.0 && p["skip_rate"] == 0.0, "{p}");
    }
    // Two problems of a prefix of 1024 and two branches of 32: each alone, or the prefix once.
    assert_eq!(policies[0]["tokens"]["prefill"], 2 * 2 * (1024 + 32));
    assert_eq!(policies[5]["tokens"]["prefill"], 2 * (1024 + 2 * 32));
    for other in ["no-sharing", "paper-baseline", "exact-fresh", "exact"] {
        let ratio = &ladder["ratios"][format!("{other}/rksc")];
        let of = |key: &str| ratio[key].as_f64().unwrap_or_else(|| panic!("{other}: {key} in {ratio}"));
        assert!(of("lo") <= of("value") && of("value") <= of("hi") && of("ceiling") > 0.0, "{other}: {ratio}");
    }
    for bench in ["decode", "prefill"] {
        let report = tiny(&[bench, "-B", "1,3", "--context", "20", "--steps", "2", "--dtype", "f32"]);
        assert_eq!((&report["bench"], &report["dtype"]), (&bench.into(), &"f32".into()));
        let cases = report["cases"].as_array().unwrap();
        assert!(cases.len() == 2 && cases.iter().all(|c| c["ms"]["p50"].as_f64().unwrap() > 0.0), "{report}");
    }
}

/// Every command explains itself, and takes `--json` and `--dtype` where it has anything to compute or to say.
#[test]
fn every_command_has_its_help() {
    let dir = folder();
    for command in [
        "solve",
        "generate",
        "score",
        "inspect",
        "plan",
        "quantise",
        "bench ladder",
        "bench roof",
        "bench gemm",
        "bench decode",
        "bench prefill",
        "bench agree",
        "bench mechanisms",
        "bench asks",
        "bench evict",
    ] {
        let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let help = ok(dir.path(), &args);
        assert!(help.contains("--json") && help.contains("--dtype"), "{command}: {help}");
    }
    for command in [&["devices", "--help"][..], &["bench", "kernels", "--help"]] {
        assert!(ok(dir.path(), command).contains("--json"));
    }
}

#[test]
fn bench_evict_compares_the_policies_with_what_cannot_be_avoided() {
    let dir = folder();
    let prefixes = ["--prefixes", "3", "--prefix-tokens", "96", "--pool", "3", "--requests", "12", "--new-tokens", "4"];
    let trees = ["--tree-problems", "4", "--concurrency", "4", "--depth", "2", "--beam", "2", "-B", "2"];
    let report = json(dir.path(), &[&["bench", "evict", "--json"], &prefixes[..], &trees[..]].concat());
    for part in ["prefixes", "trees"] {
        let part = &report[part];
        let bound = part["bound"].as_u64().unwrap();
        let arms = part["arms"].as_array().unwrap();
        let names: Vec<&str> = arms.iter().map(|a| a["name"].as_str().unwrap()).collect();
        assert_eq!(names[2..], ["lru", "fifo", "mass"]);
        let recomputed = |i: usize| arms[i]["tokens_recomputed"].as_u64().unwrap();
        assert_eq!(recomputed(0), 0, "no limit, and the need");
        for arm in &arms[2..] {
            assert_eq!(arm["blocks"], part["blocks"]);
            assert!(arm["blocks_evicted"].as_u64().unwrap() > 0, "{arm}");
        }
        if part["need"].is_null() {
            assert!(bound > 0 && (2..5).all(|i| recomputed(i) >= bound), "{part}");
        }
    }
    refused(dir.path(), &["bench", "evict", "--pool", "1"], 1, "--pool");
    refused(dir.path(), &["generate", "-p", "x", "--eviction", "random"], 1, "lru, fifo, mass");
    let with = |policy| ok(dir.path(), &["generate", "-p", "Problem:", "-n", "8", "--eviction", policy]);
    assert_eq!(with("mass"), with("lru"));
}

/// A reader that goes away early ends the command quietly.
#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_error() {
    let dir = folder();
    for args in [&["solve"][..], &["devices"], &["inspect", "--tensors"], &["completions", "bash"], &["plan"]] {
        let mut child = command(dir.path()).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        assert!(!stderr(&out).contains("panicked") && out.status.code() == Some(0), "{args:?}: {}", stderr(&out));
    }
}

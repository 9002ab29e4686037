//! `rksc-run template`, `chat`, `generate --chat`, and `solve` through a template.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::common::{model_file, path};

const BINARY: &str = env!("CARGO_BIN_EXE_rksc-run");

const TEMPLATE: &str = "<|bos|>{% for m in messages %}{% if m.role == 'user' %}Problem: {{ m.content }}\nApproach #1: Use short \
equations.\nStep 1:{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}{{ m.content }}<|eos|>\n{% endif %}{% endfor %}";

const ASK: &str = "Tom has 5 apples and buys 7 more. How many apples does he have?";

fn run(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(BINARY)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn ok(dir: &Path, args: &[&str], input: &str) -> String {
    let out = run(dir, args, input);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn refused(dir: &Path, args: &[&str], code: i32, what: &str) {
    let out = run(dir, args, "");
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
    assert!(message.contains(what) && !message.contains("panicked"), "{args:?}: {what:?} is not in: {message}");
}

/// A folder with a template of the model's words.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("t.jinja"), TEMPLATE).unwrap();
    dir
}

/// The bundled model as a folder of a chat model: without its prompt pack.
fn chat_model(dir: &Path) {
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model_file(file), dir.join(file)).unwrap();
    }
    let template = std::fs::read_to_string(path("tests/chat/templates/chatml.jinja")).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
}

#[test]
fn template_prints_the_prompt_to_the_letter() {
    let dir = folder();
    let prompt = format!("<|bos|>Be brief.\n\nProblem: {ASK}\nApproach #1: Use short equations.\nStep 1:");
    let args = ["template", "--chat-template", "t.jinja", "--system", "Be brief.", "--user", ASK];
    assert_eq!(ok(dir.path(), &args, ""), prompt);
    let tokens = super::common::tokenizer().encode(&prompt).unwrap();
    let with_tokens = ok(dir.path(), &[&args[..], &["--tokens"]].concat(), "");
    assert_eq!(with_tokens, format!("{prompt}\n{}\n", serde_json::to_string(&tokens).unwrap()));
    let json: Value = serde_json::from_str(&ok(dir.path(), &[&args[..], &["--json"]].concat(), "")).unwrap();
    assert_eq!((&json["prompt"], &json["tokens"]), (&prompt.into(), &serde_json::json!(tokens)));
    assert_eq!((&json["turn_end"], &json["thinking"]["is_open"]), (&1.into(), &false.into()));

    let messages = r#"{"messages": [{"role": "user", "content": "hi"}], "tools": [{"a": 1.0}]}"#;
    std::fs::write(dir.path().join("m.json"), messages).unwrap();
    std::fs::write(dir.path().join("v.jinja"), "{{ tools | tojson }} {{ x }} {{ add_generation_prompt }}\n\n").unwrap();
    let args = ["template", "--chat-template", "v.jinja", "--messages", "m.json", "--set", "x=[true, \"a\"]"];
    assert_eq!(ok(dir.path(), &args, ""), "[{\"a\": 1.0}] [True, 'a'] True\n");
    let args = [&args[..], &["--no-generation-prompt", "--set", "tools=null"]].concat();
    assert_eq!(ok(dir.path(), &args, ""), "null [True, 'a'] False\n");
    // The bundled model has a template of its own.
    assert!(ok(dir.path(), &["template", "--user", "2 + 2?"], "").starts_with("<|bos|>Problem: 2 + 2?"));
}

#[test]
fn mistakes_are_refused_by_name() {
    let dir = folder();
    refused(dir.path(), &["template", "--user", "x", "--set", "a=b"], 1, "is not JSON");
    refused(dir.path(), &["template", "--user", "x", "--chat-template", "none.jinja"], 2, "none.jinja");
    refused(dir.path(), &["template", "-m", ".", "--user", "x"], 1, "--chat-template");
    std::fs::write(dir.path().join("bad.jinja"), "\n{{ messages.x.y }}").unwrap();
    refused(
        dir.path(),
        &["template", "--user", "x", "--chat-template", "bad.jinja"],
        2,
        "bad.jinja: chat template: line 2",
    );
    std::fs::write(dir.path().join("no.jinja"), "{{ raise_exception('not that') }}").unwrap();
    refused(dir.path(), &["chat", "--chat-template", "no.jinja", "--messages", "m.json"], 2, "m.json");
    std::fs::write(dir.path().join("m.json"), r#"[{"role": "user", "content": "x"}]"#).unwrap();
    refused(dir.path(), &["chat", "--chat-template", "no.jinja", "--messages", "m.json"], 1, "refuses them: not that");
    refused(dir.path(), &["chat", "--kv-buffer", "8"], 1, "kv-buffer");
}

#[test]
fn a_talk_keeps_its_kv_and_says_what_generate_says() {
    let dir = folder();
    let second = "Ann has 9 coins and finds 3 more. How many coins does she have?";
    let args = ["chat", "--chat-template", "t.jinja", "--dtype", "f32"];
    let input = format!("{ASK}\n{second}\n/undo\n/edit 1 {second}\n/quit\nnever said\n");
    let json: Value = serde_json::from_str(&ok(dir.path(), &[&args[..], &["--json"]].concat(), &input)).unwrap();
    let turns = json["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 3);
    let number = |turn: usize, key: &str| turns[turn][key].as_u64().unwrap();
    let generated = |turn: usize| turns[turn]["tokens"].as_array().unwrap().len() as u64;
    assert_eq!(number(0, "kept_tokens"), 0);
    assert_eq!(number(1, "kept_tokens"), number(0, "prompt_tokens") + generated(0));
    for (i, turn) in turns.iter().enumerate() {
        let new = number(i, "prompt_tokens") - number(i, "kept_tokens");
        assert_eq!(number(i, "computed_tokens"), new + generated(i), "turn {i}");
        assert_eq!(turn["finish_reason"], "stop");
    }
    assert!((1..number(0, "prompt_tokens")).contains(&number(2, "kept_tokens")));
    let said: Vec<&str> = json["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(said, ["user", "assistant"]);

    let prompt = format!("<|bos|>Problem: {ASK}\nApproach #1: Use short equations.\nStep 1:");
    let alone = ok(dir.path(), &["generate", "--dtype", "f32", "-p", &prompt], "");
    assert_eq!(turns[0]["content"].as_str().unwrap(), alone.trim_end_matches('\n'));
    assert_eq!(ok(dir.path(), &args, &format!("{ASK}\n")), alone);
    let chat = ok(dir.path(), &["generate", "--dtype", "f32", "--chat", "-p", ASK], "");
    let own = ok(dir.path(), &["template", "--user", ASK], "");
    assert_eq!(chat, ok(dir.path(), &["generate", "--dtype", "f32", "-p", &own], ""));
}

#[test]
fn a_file_of_messages_is_said_turn_by_turn_with_its_own_replies_as_history() {
    let dir = folder();
    let messages = serde_json::json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK},
        {"role": "assistant", "content": " 5 + 7 = 12."}, {"role": "user", "content": ASK}, {"role": "user", "content": ASK},
    ]);
    std::fs::write(dir.path().join("m.json"), messages.to_string()).unwrap();
    let args = ["chat", "--chat-template", "t.jinja", "--messages", "m.json", "--max-new-tokens", "5", "--json"];
    let json: Value = serde_json::from_str(&ok(dir.path(), &args, "")).unwrap();
    assert_eq!(json["turns"].as_array().unwrap().len(), 2);
    let said: Vec<&str> = json["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(said, ["system", "user", "assistant", "user", "assistant", "user", "assistant"]);
    assert_eq!(json["turns"][0]["finish_reason"], "length");
}

#[test]
fn reasoning_is_shown_apart_or_hidden() {
    let dir = folder();
    // The prompt opens a block, and a stop string ends the reply inside it.
    let template = TEMPLATE.replace("Step 1:", "Step 1:</think>") + "{% if add_generation_prompt %}<think>{% endif %}";
    std::fs::write(dir.path().join("r.jinja"), template).unwrap();
    let args = ["chat", "--chat-template", "r.jinja", "--max-new-tokens", "6"];
    let json: Value = serde_json::from_str(&ok(dir.path(), &[&args[..], &["--json"]].concat(), ASK)).unwrap();
    let reasoning = json["turns"][0]["reasoning"].as_str().unwrap();
    assert!(!reasoning.is_empty() && json["turns"][0]["content"] == "");
    assert_eq!(json["messages"][1]["reasoning_content"], reasoning);
    assert_eq!(ok(dir.path(), &args, ASK), format!("{reasoning}\n"));
    assert_eq!(ok(dir.path(), &[&args[..], &["--hide-thinking"]].concat(), ASK), "\n");
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_reply_and_not_the_talk() {
    use std::io::{BufRead, BufReader, Read};
    let dir = folder();
    // No end: the model's end tokens are not these, so that only the interrupt ends the first reply in time.
    let mut child = Command::new(BINARY)
        .args([
            "chat",
            "--chat-template",
            "t.jinja",
            "--threads",
            "1",
            "--temperature",
            "30",
            "--max-new-tokens",
            "1900",
        ])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stdin.write_all(b"first\n").unwrap();
    // Its first text says that it is at work.
    let mut byte = [0];
    stdout.read_exact(&mut byte).unwrap();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let drain = std::thread::spawn(move || {
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).map(|_| rest)
    });
    let mut line = String::new();
    while !line.contains("prompt tokens") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    assert!(line.contains("cancelled"), "{line}");
    stdin.write_all(b"/undo\n/quit\n").unwrap();
    let status = child.wait().unwrap();
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert!(status.success() && rest.contains("taken back: first"), "{rest}");
    drain.join().unwrap().unwrap();
}

#[test]
fn solve_takes_a_chat_model_without_a_pack_through_its_template() {
    let dir = folder();
    chat_model(dir.path());
    std::fs::write(
        dir.path().join("p.jsonl"),
        format!("{{\"id\": \"a\", \"question\": \"{ASK}\", \"answer\": \"12\"}}\n"),
    )
    .unwrap();
    let args = [
        "solve",
        "-m",
        ".",
        "--problems",
        "p.jsonl",
        "-B",
        "3",
        "--max-new-tokens",
        "8",
        "--policy",
        "exact",
        "--json",
    ];
    let report: Value = serde_json::from_str(&ok(dir.path(), &args, "")).unwrap();
    assert_eq!((&report["problems"], &report["verify"]["run"]), (&1.into(), &3.into()));
    let branches = report["results"][0]["branches"].as_array().unwrap();
    assert!(branches.iter().all(|b| b["score"].as_f64().is_some()));

    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    refused(dir.path(), &args, 1, "neither prompts.json nor a chat template");
    let pack = path("models/chat-pack/prompts.json");
    let with_pack = [&args[..], &["--prompts", pack.to_str().unwrap()]].concat();
    refused(dir.path(), &with_pack, 1, "no chat template");
}

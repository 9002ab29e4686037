//! `rksc-run batch`: a file of requests in OpenAI's batch format becomes a file of answers, whatever happens in between.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the model was made to go on from.
const PROMPT: &str = "<|bos|>Problem: Tom has 5 apples and buys 7 more. How many apples does he have?\nApproach #1: Use \
short equations.\nStep 1:";

const TEMPLATE: &str = "<|bos|>{% for m in messages %}{% if m.role == 'user' %}Problem: {{ m.content }}\nApproach #1: Use short \
equations.\nStep 1:{% else %}{{ m.content }}<|eos|>\n{% endif %}{% endfor %}";

struct Folder(TempDir);

impl Folder {
    /// Holds the requests as `in.jsonl`, and a template of the model's words.
    fn with(requests: &[Value]) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        let lines: String = requests.iter().map(|r| format!("{r}\n")).collect();
        std::fs::write(dir.at("in.jsonl"), lines).unwrap();
        std::fs::write(dir.at("t.jinja"), TEMPLATE).unwrap();
        dir
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rksc-run"));
        command.current_dir(self.0.path()).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// What a batch run says of itself; its answers are in `out.jsonl`.
    fn batch(&self, more: &[&str]) -> Value {
        let args = ["batch", "-i", "in.jsonl", "-o", "out.jsonl", "--chat-template", "t.jinja", "--json"];
        self.json(&[&args, more].concat())
    }

    fn answers(&self) -> Vec<Value> {
        read(&self.at("out.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The bodies of the answers, all of which must be answers.
    fn bodies(&self) -> Vec<Value> {
        let body = |answer: Value| {
            assert_eq!(answer["response"]["status_code"], 200, "{answer}");
            answer["response"]["body"].clone()
        };
        self.answers().into_iter().map(body).collect()
    }
}

fn request(custom_id: &str, url: &str, body: Value) -> Value {
    json!({"custom_id": custom_id, "method": "POST", "url": url, "body": body})
}

fn completion(custom_id: &str, more: Value) -> Value {
    let mut body = json!({"model": "tinymath", "prompt": PROMPT});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request(custom_id, "/v1/completions", body)
}

fn texts(body: &Value) -> Vec<String> {
    body["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
}

/// Requests of all kinds: plain, sampled, several choices, and some that are refused.
fn mixture(len: usize) -> Vec<Value> {
    (0..len)
        .map(|i| {
            let more = match i % 5 {
                0 => json!({"temperature": 0, "max_tokens": 48, "ignore_eos": true}),
                1 => json!({"temperature": 1.2, "max_tokens": 16 + i, "ignore_eos": true}),
                2 => json!({"n": 3, "max_tokens": 24, "logprobs": 2}),
                3 => json!({"seed": i, "max_tokens": 40, "stop": "Step 3", "ignore_eos": true}),
                _ => json!({"echo": true}),
            };
            completion(&format!("line-{i}"), more)
        })
        .collect()
}

#[test]
fn killed_twenty_times_and_taken_up_again_it_ends_with_the_uninterrupted_file() {
    let folder = Folder::with(&mixture(100));
    folder.batch(&[]);
    let whole = read(&folder.at("out.jsonl"));
    assert_eq!(whole.lines().count(), 100);

    let out = folder.at("killed.jsonl");
    let mut draw = 1usize;
    let args = ["batch", "-i", "in.jsonl", "-o", "killed.jsonl", "--chat-template", "t.jinja", "--concurrency", "2"];
    let args = [&args[..], &["--resume"]].concat();
    for kill in 0..20 {
        let before = lines_in(&out);
        let mut child = folder.command(&args).stderr(Stdio::null()).spawn().unwrap();
        while lines_in(&out) <= before {
            assert!(child.try_wait().unwrap().is_none(), "kill {kill}: the run ended by itself at line {before}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // A line that was in flight may have been torn anywhere.
        let mut bytes = std::fs::read(&out).unwrap();
        let last = bytes[..bytes.len() - 1].iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        draw = draw.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        bytes.truncate(last + 1 + (draw >> 33) % (bytes.len() - last));
        std::fs::write(&out, bytes).unwrap();
    }
    assert!(lines_in(&out) < 100, "the kills came too late to matter");
    assert!(folder.run(&args).status.success());
    assert_eq!(read(&out), whole);
}

fn lines_in(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |bytes| bytes.iter().filter(|&&b| b == b'\n').count())
}

#[test]
fn an_answer_depends_on_its_line_alone() {
    let requests = mixture(20);
    let folder = Folder::with(&requests);
    folder.batch(&["--concurrency", "20"]);
    let together = folder.answers();
    folder.batch(&["--concurrency", "1"]);
    assert_eq!(folder.answers(), together);
    let alone = Folder::with(&requests[7..8]);
    alone.batch(&[]);
    assert_eq!(alone.answers(), together[7..8]);
    let hot = json!({"temperature": 3, "max_tokens": 32});
    // Without seeds of their own, lines draw by their names and the run's seed.
    let twins = Folder::with(&[completion("a", hot.clone()), completion("b", hot)]);
    twins.batch(&[]);
    let first: Vec<_> = twins.bodies().iter().map(texts).collect();
    assert_ne!(first[0], first[1]);
    twins.batch(&["--seed", "1"]);
    assert_ne!(twins.bodies().iter().map(texts).collect::<Vec<_>>(), first);
}

#[test]
fn four_choices_are_four_draws_behind_one_prefill() {
    let ask = |n: usize| {
        completion("x", json!({"n": n, "seed": 5, "max_tokens": 24, "ignore_eos": true, "temperature": 3.0}))
    };
    let folder = Folder::with(&[ask(4)]);
    let run = folder.batch(&[]);
    let body = folder.bodies().remove(0);
    let four = texts(&body);
    assert_eq!(four.iter().collect::<BTreeSet<_>>().len(), 4, "{four:?}");
    let prompt = body["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(body["usage"]["completion_tokens"], 4 * 24);
    // The prompt once; then each choice draws its first token from a last row of its own, and the others one by one.
    assert_eq!(run["stats"]["tokens_computed"], prompt + 4 * 24);
    // Whoever asks for fewer gets the first of them, and so does whoever asks elsewhere.
    let fewer = Folder::with(&[ask(2)]);
    fewer.batch(&[]);
    assert_eq!(texts(&fewer.bodies()[0]), four[..2]);
    let args = ["generate", "-p", PROMPT, "-n", "4", "--temperature", "3", "--seed", "5", "--max-new-tokens", "24"];
    let generated = folder.json(&[&args[..], &["--ignore-eos", "--json"]].concat());
    assert_eq!(texts(&generated), four);
}

#[test]
fn a_chat_line_says_what_the_template_makes_of_it() {
    let question = "Tom has 5 apples and buys 7 more. How many apples does he have?";
    let body = json!({
        "messages": [{"role": "user", "content": question}], "temperature": 0, "logprobs": true, "top_logprobs": 2,
    });
    let folder = Folder::with(&[
        request("chat", "/v1/chat/completions", body),
        completion("text", json!({"temperature": 0, "max_tokens": 1024, "logprobs": 2})),
    ]);
    folder.batch(&[]);
    let [chat, text] = &folder.bodies()[..] else { panic!("two answers") };
    assert_eq!(chat["object"], "chat.completion");
    assert_eq!(chat["choices"][0]["message"]["content"], text["choices"][0]["text"]);
    assert_eq!(chat["choices"][0]["finish_reason"], "stop");
    assert_eq!(chat["usage"], text["usage"]);

    // Greedy, each token is the first of the most likely; their bytes are the text.
    let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let mut bytes = Vec::new();
    for (i, token) in content.iter().enumerate() {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["logprob"], &top[0]["bytes"]), (2, &token["logprob"], &token["bytes"]));
        assert!(top[1]["logprob"].as_f64() <= top[0]["logprob"].as_f64());
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
        let logprobs = &text["choices"][0]["logprobs"];
        assert_eq!((&logprobs["tokens"][i], &logprobs["token_logprobs"][i]), (&token["token"], &token["logprob"]));
        assert_eq!(logprobs["top_logprobs"][i].as_object().unwrap().len(), 2);
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), text["choices"][0]["text"].as_str().unwrap());
}

#[test]
fn reasoning_stands_apart_from_the_reply() {
    let body = json!({
        "messages": [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many apples does he have?"}],
        "temperature": 0, "max_completion_tokens": 512,
    });
    let folder = Folder::with(&[request("x", "/v1/chat/completions", body)]);
    let thinks = "<|bos|>{% for m in messages %}Problem: {{ m.content }}\n<think>\n{% endfor %}";
    std::fs::write(folder.at("t.jinja"), thinks).unwrap();
    folder.batch(&[]);
    let message = &folder.bodies()[0]["choices"][0]["message"];
    let (reasoning, content) = (message["reasoning_content"].as_str().unwrap(), message["content"].as_str().unwrap());
    assert!(reasoning.contains("5+7=12") && !reasoning.contains("think>"), "{reasoning}");
    assert_eq!(content, "The answer is 12.");
}

#[test]
fn what_is_not_exact_is_what_generate_does_and_is_written_down() {
    let long = json!({"temperature": 0, "max_tokens": 64, "ignore_eos": true});
    let folder = Folder::with(&[completion("a", long.clone()), completion("b", long)]);
    let generate = ["generate", "-p", PROMPT, "--max-new-tokens", "64", "--ignore-eos", "--json"];
    for (flags, field) in [
        (&["--kv-budget", "32", "--kv-buffer", "16"][..], "kv"),
        (&["--river", "fixed=2", "--codes", "codes"], "river"),
        (&["--quantise", "--codes", "codes"], "quantise"),
    ] {
        let run = folder.batch(flags);
        let expected = folder.json(&[&generate, flags].concat());
        assert!(!run[field].is_null(), "{field}");
        for body in folder.bodies() {
            assert_eq!(texts(&body), texts(&expected), "{flags:?}");
        }
    }
    let refused = folder.run(&["batch", "-i", "in.jsonl", "-o", "x", "--kv-budget", "32", "--kv-prompt", "evict"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("kv-prompt: evict"));
    let tops = Folder::with(&[completion("a", json!({"logprobs": 2}))]);
    tops.batch(&["--river", "draft", "--codes", "codes"]);
    assert_eq!(tops.answers()[0]["response"]["body"]["error"]["param"], "top_logprobs");
}

#[test]
fn every_way_to_end_ends() {
    let greedy = |id: &str, more: Value| {
        let mut more = more;
        more["temperature"] = 0.into();
        completion(id, more)
    };
    let folder = Folder::with(&[
        greedy("free", json!({"max_tokens": 256, "logprobs": 1})),
        greedy("length", json!({"max_tokens": 3})),
        greedy("none", json!({"max_tokens": 0})),
        greedy("text", json!({"max_tokens": 256, "stop": ["never", "12"]})),
        greedy("longer", json!({"max_tokens": 256, "min_tokens": 200})),
    ]);
    folder.batch(&[]);
    let bodies = folder.bodies();
    let choice = |i: usize| (texts(&bodies[i]).remove(0), bodies[i]["choices"][0]["finish_reason"].clone());
    let (free, reason) = choice(0);
    assert_eq!((free.contains("12"), reason), (true, "stop".into()));
    assert_eq!((bodies[1]["usage"]["completion_tokens"].clone(), choice(1).1), (3.into(), "length".into()));
    assert_eq!((choice(2).0, choice(2).1), (String::new(), "length".into()));
    assert_eq!((choice(3).0.as_str(), choice(3).1), (free.split_once("12").unwrap().0, "stop".into()));
    assert!(bodies[4]["usage"]["completion_tokens"].as_u64().unwrap() >= 200);

    // Its third token, as one to stop at.
    let generated = folder.json(&["generate", "-p", PROMPT, "--json", "--top-logprobs", "1"]);
    let third = generated["choices"][0]["tokens"][2].as_u64().unwrap();
    let stop = Folder::with(&[greedy("id", json!({"max_tokens": 256, "stop_token_ids": [third]}))]);
    stop.batch(&[]);
    let stopped = stop.bodies().remove(0);
    assert_eq!(
        (&stopped["usage"]["completion_tokens"], &stopped["choices"][0]["finish_reason"]),
        (&2.into(), &"stop".into())
    );
    let by_flag = folder.json(&["generate", "-p", PROMPT, "--json", "--stop-id", &third.to_string()]);
    assert_eq!(by_flag["choices"][0]["text"], stopped["choices"][0]["text"]);
    let top = &generated["choices"][0]["top_logprobs"];
    assert_eq!(top[2][0], json!([third, generated["choices"][0]["token_logprobs"][2]]));
}

#[test]
fn a_request_that_cannot_be_honoured_is_answered_with_its_field_and_costs_no_other() {
    let requests = [
        completion("stream", json!({"stream": true})),
        completion("bias", json!({"logit_bias": {"99999999": 1}})),
        completion("long", json!({"prompt": "1 ".repeat(5000)})),
        completion("empty", json!({"prompt": ""})),
        request("url", "/v1/embeddings", json!({"input": "x"})),
        request("messages", "/v1/chat/completions", json!({})),
        completion("good", json!({"max_tokens": 1})),
    ];
    let folder = Folder::with(&requests);
    let run = folder.batch(&[]);
    assert_eq!((&run["totals"]["refused"], &run["totals"]["answered"]), (&6.into(), &1.into()));
    let answers = folder.answers();
    let params = ["stream", "", "", "", "url", "messages"];
    for (answer, param) in answers.iter().zip(params) {
        assert_eq!(answer["response"]["status_code"], 400, "{answer}");
        let error = &answer["response"]["body"]["error"];
        assert!(param.is_empty() || error["param"] == param, "{answer}");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    assert_eq!(answers[6]["response"]["status_code"], 200);
    // A model without a template answers text, and says so of messages.
    let bare =
        Folder::with(&[request("m", "/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]}))]);
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model_file(file), bare.at(file)).unwrap();
    }
    bare.json(&["batch", "-m", ".", "-i", "in.jsonl", "-o", "out.jsonl", "--json"]);
    assert!(bare.answers()[0]["response"]["body"]["error"]["message"].as_str().unwrap().contains("--chat-template"));
}

#[test]
fn a_file_that_is_none_is_refused_whole_and_nothing_is_lost() {
    let good = completion("a", json!({})).to_string();
    for (text, why) in [
        (String::new(), "holds no lines"),
        (format!("{good}\n{{\"custom_id\": "), "line 2: "),
        (format!("{good}\n\n{{}}"), "line 3: needs a \"custom_id\""),
        (format!("{good}\n{good}"), "line 2: custom_id \"a\" appears twice"),
    ] {
        let folder = Folder::with(&[]);
        std::fs::write(folder.at("in.jsonl"), text).unwrap();
        std::fs::write(folder.at("out.jsonl"), "kept\n").unwrap();
        let out = folder.run(&["batch", "-i", "in.jsonl", "-o", "out.jsonl"]);
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{message}");
        assert!(message.contains("in.jsonl") && message.contains(why), "{message}");
        assert_eq!(read(&folder.at("out.jsonl")), "kept\n");
    }
    // Somebody else's file is not gone on with.
    let folder = Folder::with(&[completion("a", json!({}))]);
    std::fs::write(folder.at("out.jsonl"), "kept\n").unwrap();
    let out = folder.run(&["batch", "-i", "in.jsonl", "-o", "out.jsonl", "--resume"]);
    assert_eq!(out.status.code(), Some(2));
    assert_eq!(read(&folder.at("out.jsonl")), "kept\n");
}

#[test]
fn flags_of_generate_that_cannot_act_are_refused() {
    let folder = Folder::with(&[]);
    for (args, what) in [
        (&["--min-new-tokens", "3", "--ignore-eos"][..], "--min-new-tokens: changes nothing beside --ignore-eos"),
        (&["--top-logprobs", "3"], "--json"),
        (&["--top-logprobs", "3", "--json", "--river", "draft"], "top-logprobs"),
        (&["--stop-id", "99999999"], "99999999"),
    ] {
        let out = folder.run(&[&["generate", "-p", "x"], args].concat());
        let message = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{message}");
        assert!(message.contains(what), "{message}");
    }
}

//! `make_goldens.py` beside this file makes what is compared here.

use std::time::{Duration, SystemTime};

use rksc::chat::{ChatTemplate, Message, RenderOptions};
use serde_json::Value;

use super::{json, path, tokenizer};

const FAMILIES: [&str; 13] = [
    "llama3",
    "llama3_1",
    "chatml",
    "qwen2_5",
    "qwen3",
    "mistral",
    "falcon3",
    "phi3",
    "phi4_mini",
    "deepseek_r1",
    "gemma",
    "olmo2",
    "constructs",
];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// 2025-02-03 04:05:06 UTC, as in the maker.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_738_555_506)
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let (mut rendered, mut refused) = (0, 0);
    for family in FAMILIES {
        let golden = json(&format!("goldens/{family}.json"));
        assert_eq!(golden["now"], "2025-02-03T04:05:06");
        let source = std::fs::read_to_string(path(&format!("tests/chat/templates/{family}.jinja"))).unwrap();
        let special = golden["special"].as_object().unwrap().clone();
        let template = ChatTemplate::from_source(std::path::Path::new(family), &source, special).unwrap();
        let tokenizer = tokenizer(golden["tokenizer"].as_str().unwrap());
        for (i, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let options = RenderOptions {
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                tools: Some(case["tools"].clone()).filter(|t| !t.is_null()),
                variables: case["variables"].as_object().unwrap().clone(),
                now: Some(now()),
            };
            let outcome = template.render(&messages, &options);
            match case["error"].as_str() {
                None => {
                    let text = outcome.unwrap_or_else(|e| panic!("{family} {i}: {e}"));
                    assert_eq!(text, case["text"].as_str().unwrap(), "{family} {i}");
                    assert_eq!(tokenizer.encode(&text).unwrap(), ids(&case["ids"]), "{family} {i}");
                    rendered += 1;
                }
                Some(message) => {
                    let error = outcome.unwrap_err();
                    assert_eq!(error.code(), rksc::ErrorCode::Caller, "{family} {i}: {error}");
                    let error = error.to_string();
                    assert!(error.contains(message) && error.contains(&format!("({family}, line ")), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(rendered > 90 && refused == 7, "{rendered} rendered, {refused} refused");
}

#[test]
fn tokenizers_encode_and_decode_as_the_python_library_does() {
    for name in ["llama3", "qwen", "mistral", "gemma"] {
        let tokenizer = tokenizer(name);
        let golden = json(&format!("goldens/tokenizer_{name}.json"));
        for case in golden["cases"].as_array().unwrap() {
            let (text, ids) = (case["text"].as_str().unwrap(), ids(&case["ids"]));
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"].as_str().unwrap(), "{name}: {text:?}");
            assert_eq!(tokenizer.decode_visible(&ids).unwrap(), case["visible"].as_str().unwrap(), "{name}: {text:?}");
        }
    }
}

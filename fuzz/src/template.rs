//! A chat template, and behind a zero byte the messages it is to render. What begins with `{"` is the
//! tokenizer_config.json that holds the template.

use std::path::Path;
use std::time::SystemTime;

use rksc::chat::{ChatTemplate, Message, MessageFile, RenderOptions};
use serde_json::{Map, json};

/// 64 bytes for each step that a template may take; text of its own is what it may repeat on top.
const MAX_TEXT_BYTES: usize = 64 * 500_000;

/// See the module text.
pub fn template(data: &[u8]) {
    let (source, messages) = super::split_once(data, 0);
    let path = Path::new("chat_template");
    let template = if source.starts_with(b"{\"") {
        ChatTemplate::from_tokenizer_config(path, source).ok().flatten()
    } else {
        ChatTemplate::from_source(path, &String::from_utf8_lossy(source), special()).ok()
    };
    let Some(template) = template else { return };
    let file = MessageFile::from_bytes(Path::new("messages.json"), messages).unwrap_or_else(|_| conversation());
    let now = Some(SystemTime::UNIX_EPOCH);
    for add_generation_prompt in [false, true] {
        let options = RenderOptions { add_generation_prompt, tools: file.tools.clone(), now, ..Default::default() };
        let text = template.render(&file.messages, &options);
        // A template may keep nothing from one rendering to the next.
        match (text, template.render(&file.messages, &options)) {
            (Ok(one), Ok(other)) => assert!(one == other && one.len() <= MAX_TEXT_BYTES, "{} bytes", one.len()),
            (Err(one), Err(other)) => assert_eq!(one.to_string(), other.to_string()),
            (one, other) => panic!("{one:?}, and then {other:?}"),
        }
    }
}

fn special() -> Map<String, serde_json::Value> {
    [("bos_token", "<s>"), ("eos_token", "</s>")]
        .map(|(name, token)| (name.to_owned(), token.into()))
        .into_iter()
        .collect()
}

fn conversation() -> MessageFile {
    let call = json!([{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}}]);
    let mut calls = Message::assistant("", "because");
    calls.extra.insert("tool_calls".into(), call);
    MessageFile {
        messages: vec![
            Message::system("Be brief."),
            Message::user("1 + 2?"),
            calls,
            Message::new("tool", "3"),
            Message::assistant("3", ""),
            Message::user("sure?\n"),
        ],
        tools: Some(json!([{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}])),
    }
}

//! Files that say what to do: the first line names the format, the file is behind it.

use std::collections::HashSet;
use std::path::Path;

use rksc::Error;
use rksc::calibrate::{Calibration, parse_negatives};
use rksc::chat::{Message, MessageFile};
use rksc::openai::{parse_lines, refusal};
use rksc::problems::{Problem, parse_problems};
use rksc::prompts::PromptPack;
use serde_json::json;

/// Every format by its name in the first line. **Another line format is one row here**, a function below, and seeds in
/// `corpus/jsonl`.
const FORMATS: [(&[u8], super::Target); 6] = [
    (b"problems", problems),
    (b"negatives", negatives),
    (b"pack", pack),
    (b"messages", messages),
    (b"calibration", calibration),
    (b"batch", batch),
];

/// See the module text.
pub fn jsonl(data: &[u8]) {
    let (name, file) = super::split_once(data, b'\n');
    if let Some((_, check)) = FORMATS.iter().find(|(format, _)| *format == name) {
        check(file);
    }
}

/// Problems print and parse to themselves.
fn problems(file: &[u8]) {
    let parse = |bytes: &[u8]| parse_problems(Path::new("p.jsonl"), bytes);
    let Ok(problems) = parse(file) else { return };
    let print = |p: &Problem| {
        let Problem { id, question, answer, paraphrases } = p;
        json!({"id": id, "question": question, "answer": answer, "paraphrases": paraphrases}).to_string()
    };
    let printed = problems.iter().map(print).collect::<Vec<_>>().join("\n");
    assert_eq!(parse(printed.as_bytes()).expect("what was read"), problems);
}

/// Whether two answers differ does not depend on which comes first.
fn negatives(file: &[u8]) {
    for mut pair in parse_negatives(Path::new("n.jsonl"), file).unwrap_or_default() {
        let differ = pair.answers_differ();
        std::mem::swap(&mut pair.answer, &mut pair.other_answer);
        assert_eq!(pair.answers_differ(), differ);
    }
}

/// A pack prints and parses to itself, and fills in its texts.
fn pack(file: &[u8]) {
    let parse = |bytes: &[u8]| PromptPack::from_bytes(Path::new("prompts.json"), bytes);
    let Ok(pack) = parse(file) else { return };
    let printed = serde_json::to_vec(&pack).expect("a pack is JSON");
    assert_eq!(parse(&printed).expect("what was read"), pack);
    let texts = [pack.root("", "1 + 2 = 3"), pack.fresh("{question}", "{solution} 3")];
    assert!(pack.branch(0).is_some() && pack.branch(pack.approaches.len()).is_none());
    let finder = pack.answer_finder().expect("checked");
    for text in texts {
        let Some(answer) = finder.find(&text) else { continue };
        assert!(text.contains(&answer));
    }
}

/// Messages print and parse to themselves.
fn messages(file: &[u8]) {
    let parse = |bytes: &[u8]| MessageFile::from_bytes(Path::new("m.json"), bytes);
    let Ok(MessageFile { messages, tools }) = parse(file) else { return };
    let printed = json!({"messages": messages, "tools": tools}).to_string();
    assert_eq!(parse(printed.as_bytes()).expect("what was read"), MessageFile { messages: messages.clone(), tools });
    messages.iter().map(Message::text).for_each(drop);
}

/// A calibration prints and parses to itself.
fn calibration(file: &[u8]) {
    let parse = |bytes: &[u8]| Calibration::from_bytes(Path::new("calibration.json"), bytes);
    let Ok(calibration) = parse(file) else { return };
    let printed = calibration.to_bytes().expect("a calibration is JSON");
    let again = parse(&printed).expect("what was read");
    assert_eq!(again.to_bytes().expect("a calibration is JSON"), printed);
}

/// Names are all there and differ; a request is one that can be honoured, or is refused by a field.
fn batch(file: &[u8]) {
    let Ok(lines) = parse_lines(Path::new("in.jsonl"), file) else { return };
    let names: HashSet<&str> = lines.iter().map(|line| line.custom_id.as_str()).collect();
    assert!(names.len() == lines.len() && !names.contains(""));
    for line in &lines {
        match &line.request {
            Ok((_, request)) => {
                request.sampling.validate().expect("checked");
                assert!(request.num_choices > 0 && request.stop.iter().all(|text| !text.is_empty()));
            }
            Err(error @ Error::Config { field, .. }) => {
                assert_eq!(refusal(&line.custom_id, error)["response"]["body"]["error"]["param"], field.as_str());
            }
            Err(other) => panic!("{other}"),
        }
    }
}

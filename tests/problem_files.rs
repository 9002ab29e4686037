//! The problem files beside the bundled model: what `recipe/more_problems.py` says of them, as far as the texts show it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use rksc::problems::{Problem, read_problems};
use serde_json::Value;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinymath/problems").join(name)
}

fn problems(name: &str) -> Vec<Problem> {
    read_problems(&path(name)).unwrap()
}

fn lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(path(name)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn text<'a>(line: &'a Value, field: &str) -> &'a str {
    line[field].as_str().unwrap()
}

/// A text cut at its spaces, punctuation left out.
fn words(text: &str) -> Vec<&str> {
    text.split(' ').map(|w| w.trim_end_matches(['.', ',', '?'])).collect()
}

fn numbers(text: &str) -> Vec<u32> {
    words(text).iter().filter_map(|w| w.parse().ok()).collect()
}

/// Where two texts of as many words differ.
fn changes<'a>(a: &'a str, b: &'a str) -> Vec<(&'a str, &'a str)> {
    let (a, b) = (words(a), words(b));
    assert_eq!(a.len(), b.len());
    a.into_iter().zip(b).filter(|(x, y)| x != y).collect()
}

#[test]
fn fresh_problems_are_new_and_as_long_as_those_of_test() {
    let mut known = HashSet::new();
    for p in problems("dev.jsonl").into_iter().chain(problems("test.jsonl")) {
        known.insert(p.question);
        known.extend(p.paraphrases);
    }
    let fresh = problems("fresh.jsonl");
    assert_eq!(fresh.len(), 600);
    for p in &fresh {
        let wordings: HashSet<_> = std::iter::once(&p.question).chain(&p.paraphrases).collect();
        assert_eq!(wordings.len(), 5, "{}: wordings repeat", p.id);
        assert!(wordings.is_disjoint(&known.iter().collect()), "{} stands in dev or test", p.id);
    }
    let mut steps = BTreeMap::new();
    for line in lines("fresh.jsonl") {
        *steps.entry(line["n_ops"].as_u64().unwrap()).or_insert(0) += 1;
        let last = line["gold_steps"].as_array().unwrap().last().unwrap().as_str().unwrap();
        assert_eq!(last.rsplit('=').next().unwrap(), line["answer"].to_string(), "{}", line["id"]);
    }
    assert_eq!(steps, (2..=7).map(|n| (n, 100)).collect());
}

#[test]
fn negatives_differ_from_their_dev_problem_by_what_their_kind_says() {
    let dev = problems("dev.jsonl");
    let by_id: HashMap<_, _> = dev.iter().map(|p| (p.id.as_str(), p)).collect();
    let by_question: HashMap<_, _> = dev.iter().map(|p| (p.question.as_str(), p)).collect();
    let (mut counts, mut ids, mut pairs) = (BTreeMap::new(), HashSet::new(), HashSet::new());
    let negatives = lines("negatives.jsonl");
    for n in &negatives {
        let (id, kind, question, other) = (text(n, "id"), text(n, "kind"), text(n, "question"), text(n, "other"));
        let (answer, other_answer) = (n["answer"].to_string(), n["other_answer"].to_string());
        *counts.entry(kind).or_insert(0) += 1;
        assert!(ids.insert(id), "{id} twice");
        assert!(pairs.insert((question, other)), "{id}: this pair again");
        let base = by_id[text(n, "base")];
        assert_eq!((base.question.as_str(), base.answer.as_deref()), (question, Some(answer.as_str())), "{id}");
        assert!(!base.paraphrases.iter().any(|p| p == other) && question != other, "{id} is a paraphrase");
        assert_eq!(answer == other_answer, kind == "name", "{id}: answers");
        match kind {
            "number" => {
                let [(a, b)] = changes(question, other)[..] else { panic!("{id}: more than one word") };
                assert!(a.parse::<u32>().is_ok() && b.parse::<u32>().is_ok(), "{id}: {a} became {b}");
            }
            "operation" => assert_eq!(numbers(question), numbers(other), "{id}"),
            "name" => {
                let changed: HashSet<_> = changes(question, other).into_iter().collect();
                let [(a, b)] = changed.iter().copied().collect::<Vec<_>>()[..] else { panic!("{id}: {changed:?}") };
                assert!([a, b].iter().all(|w| w.starts_with(char::is_uppercase)), "{id}: {a} became {b}");
                assert!(
                    !words(other).contains(&a) && !words(question).contains(&b),
                    "{id}: {a} and {b} both stand there"
                );
            }
            "other" => assert_eq!(by_question[other].answer.as_deref(), Some(other_answer.as_str()), "{id}"),
            _ => panic!("{id}: kind {kind}"),
        }
    }
    assert_eq!(counts, ["name", "number", "operation", "other"].map(|k| (k, 250)).into());
}

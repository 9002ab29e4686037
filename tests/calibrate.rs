//! Calibration end to end: what is replayed is what runs, the same input gives the same file, and `solve` takes from it
//! what it promises and nothing else.

mod common;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::*;
use rksc::ModelSource;
use rksc::calibrate::{
    AsksSetting, Calibration, Counts, ExitSetting, FileRef, Goal, Negative, Part, Parts, Records, Setup,
};
use rksc::gate::asks::Asks;
use rksc::gate::verify::SkipRule;
use rksc::report::ProblemResult;
use rksc::solver::select::Select;
use rksc::solver::{Policy, SolverConfig, VerifyMode};
use serde_json::Value;

const LAYERS: u64 = 8;
const GOAL: Goal = Goal { target: 0.5, confidence: 0.95 };

fn setup() -> Setup {
    let texts = Setup::of_texts(&prompt_pack(), "").unwrap();
    Setup { branches: 4, wordings: 3, max_new_tokens: 256, in_flight: 3, ..texts }
}

/// Settings bold enough to do something on a handful of problems.
fn bold() -> Parts {
    fn part<S>(setting: S) -> Part<S> {
        let setting = Some(setting);
        let (answer, saves) = ("admissible".into(), String::new());
        Part { answer, setting, saves, evidence: None, settings: 1, held: 1, stopped_at: None }
    }
    Parts {
        skip_paper: part(SkipRule::Paper { tau: 0.9, rel_gap: 0.002 }),
        skip_code: part(SkipRule::Code { tau: 0.99, gap: 0.001, rel_gap: 0.5 }),
        skip_agreement: part(SkipRule::Agreement { k: 4 }),
        verify_exit: part(ExitSetting { min_layer: 2, every: 1, theta: 0.3, epsilon: 0.2 }),
        asks: part(AsksSetting { tau: 0.5, probe_layers: 2 }),
    }
}

fn config(select: Select) -> SolverConfig {
    SolverConfig { num_branches: 4, select, ..SolverConfig::preset(Policy::Exact) }
}

/// Right to wrong, and wrong to right.
fn flips(before: &[ProblemResult], after: &[ProblemResult]) -> (usize, usize) {
    let count = |was: bool| {
        let flipped = |(b, a): &(&ProblemResult, &ProblemResult)| b.correct == Some(was) && a.correct == Some(!was);
        before.iter().zip(after).filter(flipped).count()
    };
    (count(true), count(false))
}

fn flipped(counts: Counts) -> (usize, usize) {
    (counts.right_to_wrong, counts.wrong_to_right)
}

/// Every figure of a replay is what a run with that setting gives.
#[test]
fn a_replay_is_a_run() {
    let problems = problems("dev", 8);
    let mut e = engine(|c| c.threads = 2);
    let pack = compiled(prompt_pack(), "");
    let records = Records::take(&mut e, &pack, &setup(), &problems, &[], &mut |_| ()).unwrap();
    let files = (FileRef::new(Path::new("dev.jsonl"), b"", problems.len()), None);
    let calibration = Calibration::new(String::new(), "bf16".into(), files, GOAL, (setup(), bold()));
    let checks = calibration.check(&records);
    let counts = |mechanism: &str| checks.iter().find(|c| c.mechanism == mechanism).unwrap().counts;
    let tasks = tasks(&problems, "");

    let verified = solve(&mut e, &config(Select::ScoreSqrtConf), &tasks);
    for (mechanism, part) in [
        ("skip paper", &calibration.parts.skip_paper),
        ("skip code", &calibration.parts.skip_code),
        ("skip agreement", &calibration.parts.skip_agreement),
    ] {
        let rule = SolverConfig { skip: part.setting.unwrap(), ..config(Select::ScoreSqrtConf) };
        let skipped = solve(&mut e, &rule, &tasks);
        let fired = skipped.iter().filter(|r| r.verify.skipped).count();
        let c = counts(mechanism);
        assert_eq!((c.fired, c.saved, c.work), (fired, 4 * fired as u64, 32), "{mechanism}");
        assert_eq!(flipped(c), flips(&verified, &skipped), "{mechanism}");
    }
    assert!(counts("skip agreement").fired > 0, "nothing was tested");

    let exit = calibration.parts.verify_exit.setting.unwrap().exit();
    let early = solve(&mut e, &SolverConfig { verify_exit: Some(exit), ..config(Select::ScoreSqrtConf) }, &tasks);
    let saved = |r: &ProblemResult| -> u64 {
        r.branches.iter().filter_map(|b| b.exit_layer).map(|l| LAYERS - u64::from(l)).sum()
    };
    let c = counts("verify-exit");
    assert_eq!(c.fired, early.iter().filter(|r| saved(r) > 0).count());
    assert_eq!((c.saved, c.work), (early.iter().map(saved).sum(), 32 * LAYERS));
    assert_eq!(flipped(c), flips(&verified, &early));
    assert!(c.saved > 0, "nothing was tested");

    let vote = SolverConfig { wordings: 3, verify: VerifyMode::Off, ..config(Select::Vote) };
    let alone = solve(&mut e, &vote, &tasks);
    let asks = Asks::from(calibration.parts.asks.setting.unwrap());
    let shared = solve(&mut e, &SolverConfig { asks: Some(asks), ..vote }, &tasks);
    let merged = |r: &ProblemResult| r.similarity.as_ref().unwrap().clusters != [0, 1, 2];
    let c = counts("asks");
    assert_eq!(c.fired, shared.iter().filter(|r| merged(r)).count());
    assert_eq!(flipped(c), flips(&alone, &shared));
    assert!(c.fired > 0 && c.saved > 0, "nothing was tested");
}

#[test]
fn pairs_that_change_the_answer_leave_semantic_sharing_no_setting() {
    let base = &problems("dev", 1)[0];
    let pair = |kind: &str, other: String| Negative {
        kind: kind.into(),
        question: base.question.clone(),
        other,
        answer: None,
        other_answer: None,
    };
    let mut e = engine(|_| ());
    let pack = compiled(prompt_pack(), "");
    let setup = Setup { branches: 2, wordings: 2, ..setup() };
    let mut of = |negatives: &[Negative]| {
        let records = Records::take(&mut e, &pack, &setup, std::slice::from_ref(base), negatives, &mut |_| ());
        Parts::find(&records.unwrap(), Goal { target: 0.96, ..GOAL }).asks
    };
    let name = pair("name", base.question.replace("Mia", "Leo"));
    assert!(of(&[]).answer.contains("--negatives"));
    assert!(of(std::slice::from_ref(&name)).answer.contains("--negatives"), "a name is harmless");
    // The same question twice: no similarity is high enough to keep them apart.
    let same = pair("number", base.question.clone());
    let found = of(&[same, name]);
    assert_eq!((found.setting, found.held), (None, 0));
    assert!(found.answer.contains("1 of 1 pairs"), "{}", found.answer);
    assert_eq!(found.stopped_at.unwrap().evidence.counts.pairs, 1);
}

const BINARY: &str = env!("CARGO_BIN_EXE_rksc-run");

fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(BINARY).current_dir(dir).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn ok(dir: &Path, args: &[&str]) -> Output {
    let out = run(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", stderr(&out));
    out
}

/// A folder with a few dev problems, a few negatives, and a copy of the model.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copy_lines = |name: &str, n: usize| {
        let text = read(&model_file(&format!("problems/{name}.jsonl")));
        let lines: String = text.split_inclusive('\n').take(n).collect();
        std::fs::write(dir.path().join(format!("{name}.jsonl")), lines).unwrap();
    };
    copy_lines("dev", 5);
    copy_lines("test", 5);
    copy_lines("negatives", 4);
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors", "prompts.json", "tokenizer.json"] {
        std::fs::copy(model_file(name), model.join(name)).unwrap();
    }
    dir
}

const SMALL: [&str; 6] = ["-B", "3", "--wordings", "2", "--target", "0.6"];

fn calibrate<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    let args = ["calibrate", "--problems", "dev.jsonl", "--negatives", "negatives.jsonl"];
    [args.as_slice(), &SMALL, extra].concat()
}

#[test]
fn the_same_input_gives_the_same_bytes_beside_the_model() {
    let dir = workplace();
    let at = dir.path();
    ok(at, &calibrate(&["-m", "model"]));
    let first = std::fs::read(at.join("model/calibration.json")).unwrap();
    // Neither where the model lies nor how many problems are in flight, nor how many threads run, is part of it.
    ok(at, &calibrate(&["--out", "again.json", "--concurrency", "1", "--threads", "1"]));
    assert_eq!(String::from_utf8(first).unwrap(), read(&at.join("again.json")));

    let text = |out: Output| String::from_utf8(out.stdout).unwrap();
    let checked = text(ok(
        at,
        &["calibrate", "--problems", "test.jsonl", "-B", "3", "--wordings", "2", "--check", "again.json", "--json"],
    ));
    let checked: Value = serde_json::from_str(&checked).unwrap();
    let agreement = &checked["mechanisms"].as_array().unwrap()[0];
    assert_eq!(agreement["counts"]["n"], 5);
    assert!(["shown", "not refuted", "refuted"].contains(&agreement["verdict"].as_str().unwrap()));
    let other =
        run(at, &["calibrate", "--problems", "test.jsonl", "-B", "2", "--wordings", "2", "--check", "again.json"]);
    assert_eq!(other.status.code(), Some(1));
    assert!(stderr(&other).contains("branches 2 (calibrated with 3)"), "{}", stderr(&other));
}

#[test]
fn an_impossible_target_has_no_admissible_setting() {
    let dir = workplace();
    let out = ok(dir.path(), &["calibrate", "--problems", "dev.jsonl", "--target", "0.005", "--out", "c.json"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(text.matches("no admissible setting: 5 problems cannot show less than 45.07 %").count(), 5, "{text}");
    let file: Value = serde_json::from_str(&read(&dir.path().join("c.json"))).unwrap();
    assert!(file["asks"]["setting"].is_null() && file["skip_paper"]["setting"].is_null());
    let out = ok(dir.path(), &["solve", "--limit", "1", "--skip", "paper", "--calibration", "c.json"]);
    assert!(stderr(&out).contains("nothing taken; skip paper: no admissible setting"), "{}", stderr(&out));
}

#[test]
fn solve_takes_what_is_left_open_and_says_so() {
    let dir = workplace();
    let at = dir.path();
    ok(at, &calibrate(&["-m", "model"]));
    let solve = |extra: &[&str]| {
        let args = ["solve", "-m", "model", "--problems", "test.jsonl", "--limit", "1", "-B", "3", "--json"];
        let out = ok(at, &[args.as_slice(), extra].concat());
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        (report["config"].clone(), stderr(&out))
    };
    let (config, said) = solve(&["--policy", "exact", "--verify-exit", "candidates", "--report", "r.html"]);
    let file: Value = serde_json::from_str(&read(&at.join("model/calibration.json"))).unwrap();
    let found = &file["verify_exit"]["setting"];
    assert!(found.is_object(), "five problems and a loose target: {}", file["verify_exit"]["answer"]);
    for name in ["theta", "epsilon", "min_layer", "every"] {
        assert_eq!(config["verify_exit"][name], found[name], "{name}");
    }
    assert_eq!(said.matches("calibration model/calibration.json").count(), 1, "{said}");
    assert!(said.contains("60 % right to wrong at 95 % confidence, 5 problems): verify-exit min_layer"), "{said}");
    assert_eq!(config["calibration"]["used"].as_array().unwrap().len(), 1);
    assert!(read(&at.join("r.html")).contains("verify-exit min_layer"));

    // A number of one's own stands, and so does a preset; nothing is switched on by a file.
    let (config, said) = solve(&["--verify-exit", "candidates", "--exit-theta", "0.25"]);
    assert_eq!(config["verify_exit"]["theta"], 0.25);
    assert_eq!(config["skip"], serde_json::json!({"rule": "agreement", "k": 5}));
    assert!(said.contains("nothing taken"), "{said}");
    let (config, said) = solve(&["--skip", "agreement", "--calibration", "off"]);
    assert!(config["calibration"].is_null() && !said.contains("calibration"), "{said}");
    let (config, _) = solve(&["--skip", "agreement"]);
    assert_eq!(config["skip"], file["skip_agreement"]["setting"]);
}

#[test]
fn a_file_for_another_model_or_type_is_refused() {
    let dir = workplace();
    let at = dir.path();
    ok(at, &calibrate(&["-m", "model"]));
    let solve = |extra: &[&str]| {
        run(at, &[["solve", "-m", "model", "--problems", "test.jsonl", "--limit", "1"].as_slice(), extra].concat())
    };
    let refused = |extra: &[&str], what: &str| {
        let out = solve(extra);
        assert_eq!(out.status.code(), Some(1), "{extra:?}");
        let said = stderr(&out);
        assert!(said.contains(what) && said.contains("--calibration off") && out.stdout.is_empty(), "{said}");
    };
    refused(&["--dtype", "f32", "--skip", "paper"], "made for dtype bf16, this run is f32");
    refused(&["--dtype", "f32", "--calibration", "model/calibration.json"], "made for dtype bf16");
    // Where nothing hangs on it, it is in nobody's way.
    let out = solve(&["--dtype", "f32"]);
    assert!(out.status.success() && stderr(&out).contains("not used: calibration: model/calibration.json"));
    // One bit of one weight.
    let weights = at.join("model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 0x80;
    std::fs::write(&weights, bytes).unwrap();
    refused(&["--verify-exit", "candidates"], "made for another model");
    let check = ["calibrate", "-m", "model", "--problems", "test.jsonl", "--check", "model/calibration.json"];
    let out = run(at, &check);
    assert!(out.status.code() == Some(1) && stderr(&out).contains("another model"), "{}", stderr(&out));
}

#[test]
fn flags_and_files_that_make_no_sense_are_refused() {
    let dir = workplace();
    let at = dir.path();
    std::fs::write(at.join("none.jsonl"), "{\"question\": \"q\"}\n").unwrap();
    std::fs::write(at.join("pairs.jsonl"), "{\"kind\": \"name\"}\n").unwrap();
    std::fs::write(at.join("c.json"), "{}").unwrap();
    for (args, code, what) in [
        (&["--problems", "dev.jsonl"] as &[&str], 1, "--out: the bundled model has no folder"),
        (&["--problems", "none.jsonl", "--out", "o"], 1, "none has an answer"),
        (&["--problems", "dev.jsonl", "--negatives", "pairs.jsonl", "--out", "o"], 2, "pairs.jsonl: line 1"),
        (&["--problems", "dev.jsonl", "--out", "nowhere/o"], 2, "--out: nowhere/o"),
        (&["--problems", "dev.jsonl", "--target", "2", "--out", "o"], 1, "2 % is 0.02"),
        (&["--problems", "dev.jsonl", "-B", "99", "--out", "o"], 1, "8 approaches"),
        (&["--problems", "dev.jsonl", "--check", "c.json"], 2, "c.json: field version is missing"),
    ] {
        let out = run(at, &[&["calibrate"], args].concat());
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(what), "{args:?}: {}", stderr(&out));
        assert!(!at.join("o").exists(), "{args:?}");
    }
}

/// The calibration in the repository is the bundled model's, and the library carries the same.
#[test]
fn the_models_own_calibration_fits_it() {
    let (_, bundled) = ModelSource::Bundled.calibration().unwrap().unwrap();
    let (name, beside) = ModelSource::Dir(path(MODEL)).calibration().unwrap().unwrap();
    assert_eq!(bundled, beside);
    let fingerprint = rksc::Engine::fingerprint(&rksc::EngineConfig::default()).unwrap();
    beside.check_model(&name, &fingerprint, rksc::DType::Bf16).unwrap();
    assert_eq!((beside.problems.file.as_str(), beside.problems.count), ("dev.jsonl", 200));
    let dev = std::fs::read(model_file("problems/dev.jsonl")).unwrap();
    assert_eq!(beside.problems, FileRef::new(Path::new("dev.jsonl"), &dev, 200));
    assert_eq!(std::fs::read(model_file("calibration.json")).unwrap(), beside.to_bytes().unwrap());
}

//! `--report`: every number a figure draws is read back from its marks and from their places, and compared with the
//! records as `--json` prints them. The pages stay in `target/tmp/report` for the check in a browser
//! (`tests/browser/check-report`).

#[path = "../common/mod.rs"]
mod common;
mod page;
mod records;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use page::{Element, Scale, parse};
use records::*;
use rksc::gate::asks::Asks;
use rksc::gate::step::Converged;
use rksc::gate::verify::VerifyExit;
use rksc::kv::budget::KvLimit;
use rksc::report::html::{ReportData, render};
use rksc::report::ladder::{Arm, LadderReport};
use rksc::report::{MemorySample, NodeEnd, NodeResult, PassRecord, PhaseMs, ProblemResult, SolveReport, quantile};
use rksc::solver::{Policy, SearchConfig, SolverConfig, StepScore};
use serde_json::{Value, json};

const PHASES: [&str; 3] = ["prefill", "decode", "verify"];

fn pages() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Keeps a page for the browser and reads it.
fn keep(name: &str, html: &str) -> Element {
    std::fs::write(pages().join(format!("{name}.html")), html).unwrap();
    parse(html)
}

/// The page of made-up problems, and the records as `--json` prints them.
fn page<'a>(name: &str, problems: &'a [ProblemResult], change: impl FnOnce(&mut ReportData<'a>)) -> (Element, Value) {
    let report = SolveReport::new(&SolverConfig::preset(Policy::Exact), problems);
    let mut data = ReportData { title: name.into(), problems, ..ReportData::default() };
    change(&mut data);
    let html = render(&ReportData { report: Some(&report), ..data });
    (keep(name, &html), serde_json::to_value(problems).unwrap())
}

fn close(a: f64, b: f64, within: f64) -> bool {
    (a - b).abs() <= within
}

/// The same number, but for the last bits that reading decimals and the order of a sum may change.
fn same(a: f64, b: f64) -> bool {
    close(a, b, 1e-9 * b.abs().max(1.0)) || (a.is_nan() && b.is_nan())
}

fn all_same(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(*a, *b))
}

fn f(v: &Value) -> f64 {
    v.as_f64().unwrap_or(f64::NAN)
}

fn list(v: &Value) -> &Vec<Value> {
    v.as_array().unwrap()
}

/// The records of a figure's problem.
fn record<'a>(results: &'a Value, figure: &Element) -> &'a Value {
    let id = figure.attr("data-problem");
    list(results).iter().find(|r| r["id"] == id).unwrap_or_else(|| panic!("no record of {id}"))
}

/// Row name to (series to value), after checking that every bar is as long as its number and begins where the one
/// before ended.
fn bars(figure: &Element) -> Vec<(String, BTreeMap<String, f64>)> {
    let plot = figure.with("data-x")[0];
    let x = Scale::of(plot, "data-x");
    let rows = plot.all(|e| e.get("data-row").is_some());
    rows.iter()
        .map(|row| {
            let mut sum = 0.0;
            let bar = |bar: &&Element| {
                let value = bar.number("data-value");
                assert!(close(x.value(bar.number("x")), sum, x.grain()), "a bar begins elsewhere");
                let drawn = x.length(bar.number("width"));
                assert!(close(drawn, value, x.grain().max(x.length(0.61))), "a bar of {value} is {drawn} long");
                sum += value;
                (bar.attr("data-series").to_string(), value)
            };
            (row.attr("data-row").to_string(), row.with("data-series").iter().map(bar).collect())
        })
        .collect()
}

/// Row name to (value, lo, hi, against), after checking that dot, line and stroke stand where their numbers are.
fn points(figure: &Element) -> Vec<(String, [f64; 4])> {
    let plot = figure.with("data-x")[0];
    let x = Scale::of(plot, "data-x");
    let read = |row: &&Element| {
        let numbers = ["data-value", "data-lo", "data-hi", "data-against"]
            .map(|name| row.get(name).map_or(f64::NAN, |_| row.number(name)));
        let [value, lo, hi, against] = numbers;
        let drawn = |name: &str, class: &str, place: &str| {
            let marks = row.all(|e| e.name == name && e.get("class").is_some_and(|c| c.contains(class)));
            marks.first().map(|m| x.value(m.number(place)))
        };
        let same = |number: f64, drawn: Option<f64>| match drawn {
            Some(drawn) => assert!(close(number, drawn, x.grain()), "{number} stands at {drawn}"),
            None => assert!(number.is_nan(), "{number} is not drawn"),
        };
        same(value, drawn("circle", "dot", "cx"));
        same(lo, drawn("line", "interval", "x1"));
        same(hi, drawn("line", "interval", "x2"));
        same(against, drawn("line", "against", "x1"));
        (row.attr("data-row").to_string(), numbers)
    };
    plot.all(|e| e.get("data-row").is_some()).iter().map(read).collect()
}

fn rest(r: &Value) -> f64 {
    (f(&r["latency_ms"]) - PHASES.iter().map(|p| f(&r["phase_ms"][p])).sum::<f64>()).max(0.0)
}

/// One bar a problem: milliseconds by phase.
fn check_latency(page: &Element, results: &Value) {
    let rows = bars(page.figure("latency"));
    assert_eq!(rows.len(), list(results).len());
    for ((name, values), r) in rows.iter().zip(list(results)) {
        assert_eq!(name.as_str(), r["id"].as_str().unwrap());
        for phase in PHASES {
            assert!(same(values[phase], f(&r["phase_ms"][phase])), "{name} {phase}");
        }
        assert!(same(values["rest"], rest(r)), "{name} rest");
    }
    check_spread(page, results);
}

fn check_spread(page: &Element, results: &Value) {
    let spread = points(page.figure("latency-phases"));
    let mut columns = vec![list(results).iter().map(|r| f(&r["latency_ms"])).collect::<Vec<f64>>()];
    columns.extend(PHASES.map(|p| list(results).iter().map(|r| f(&r["phase_ms"][p])).collect()));
    columns.push(list(results).iter().map(rest).collect());
    assert_eq!(spread.len(), columns.len());
    for ((name, [value, lo, hi, _]), mut column) in spread.into_iter().zip(columns) {
        column.sort_by(f64::total_cmp);
        let expected = [0.5, 0.1, 0.9].map(|q| quantile(&column, q));
        assert!(all_same(&[value, lo, hi], &expected), "{name}: {expected:?}");
    }
}

/// A problem's lines: every probed layer of every branch, at its place; exits on their layer.
fn check_entropy(page: &Element, results: &Value) {
    for figure in page.figures("entropy") {
        let plot = figure.with("data-y")[0];
        let (x, y) = (Scale::of(plot, "data-x"), Scale::of(plot, "data-y"));
        let branches = list(&record(results, figure)["branches"]);
        let drawn = figure.with("data-branch");
        assert_eq!(drawn.len(), branches.len());
        for (g, b) in drawn.iter().zip(branches) {
            assert_eq!(g.number("data-branch"), f(&b["branch"]));
            let probes = g.with("data-layer");
            assert_eq!(probes.len(), list(&b["layers"]).len());
            for (mark, l) in probes.iter().zip(list(&b["layers"])) {
                let [layer, entropy, _] = ["layer", "entropy", "top1"].map(|k| (k, f(&l[k]))).map(|(k, json)| {
                    let shown = mark.number(&format!("data-{k}"));
                    assert!(same(shown, json), "{k}: {shown} {json}");
                    json
                });
                assert!(close(x.value(mark.number("cx")), layer, x.grain()));
                if entropy.is_finite() {
                    assert!(close(y.value(mark.number("cy")), entropy, y.grain()));
                }
            }
            let branch = b["branch"].to_string();
            let exits = figure.all(|e| e.get("data-exit-branch") == Some(&branch));
            let expected: Vec<f64> = b["exit_layer"].as_f64().into_iter().collect();
            assert_eq!(exits.iter().map(|e| e.number("data-exit-layer")).collect::<Vec<_>>(), expected);
            for (mark, layer) in exits.iter().zip(expected) {
                assert!(close(x.value(mark.number("cx")), layer, x.grain()));
            }
        }
        for count in figure.with("data-after") {
            let after = branches.iter().filter(|b| f(&b["exit_layer"]) == count.number("data-after")).count();
            assert_eq!((count.number("data-exits"), count.text().trim()), (after as f64, after.to_string().as_str()));
        }
    }
    check_all_layers(page.figure("entropy-layers"), results);
}

fn check_all_layers(figure: &Element, results: &Value) {
    let mut by_layer: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    let mut exits: BTreeMap<u64, usize> = BTreeMap::new();
    for b in list(results).iter().flat_map(|r| list(&r["branches"])) {
        for l in list(&b["layers"]).iter().filter(|l| l["entropy"].is_number()) {
            by_layer.entry(l["layer"].as_u64().unwrap()).or_default().push(f(&l["entropy"]));
        }
        if let Some(layer) = b["exit_layer"].as_u64() {
            *exits.entry(layer).or_default() += 1;
        }
    }
    let plot = |holds: &str| figure.all(|e| e.get("data-y").is_some() && !e.with(holds).is_empty()).into_iter().next();
    let drawn = figure.with("data-layer");
    let y = plot("data-layer").map(|p| Scale::of(p, "data-y"));
    assert_eq!(drawn.len(), by_layer.len());
    for (g, (layer, mut values)) in drawn.iter().zip(by_layer) {
        values.sort_by(f64::total_cmp);
        assert_eq!((g.number("data-layer"), g.number("data-branches")), (layer as f64, values.len() as f64));
        let quantiles = [0.1, 0.5, 0.9].map(|q| quantile(&values, q));
        assert!(all_same(&["data-p10", "data-p50", "data-p90"].map(|k| g.number(k)), &quantiles), "layer {layer}");
        let y = y.as_ref().unwrap();
        assert!(close(y.value(g.named("circle")[0].number("cy")), quantiles[1], y.grain()));
    }
    let drawn = figure.with("data-exits");
    let y = plot("data-exits").map(|p| Scale::of(p, "data-y"));
    assert_eq!(drawn.len(), exits.len());
    for (bar, (layer, n)) in drawn.iter().zip(exits) {
        assert_eq!((bar.number("data-exit-layer"), bar.number("data-exits")), (layer as f64, n as f64));
        let y = y.as_ref().unwrap();
        assert!(close(y.length(-bar.number("height")), n as f64, y.grain() * 2.0), "a bar of {n}");
    }
}

/// A cell for every pair, frames around the clusters.
fn check_similarity(page: &Element, results: &Value) {
    for figure in page.figures("similarity") {
        let s = &record(results, figure)["similarity"];
        let n = list(&s["members"]).len();
        assert_eq!(figure.with("data-tau")[0].number("data-tau") as f32, f(&s["tau"]) as f32);
        assert_eq!(figure.with("data-depth")[0].number("data-depth"), f(&s["depth"]));
        let cells = figure.with("data-with");
        assert_eq!((cells.len(), figure.with("data-root").len()), (n * n, n));
        for cell in cells {
            let [i, j] = ["data-member", "data-with"].map(|k| cell.number(k) as usize);
            let json = f(&s["pairwise"][i][j]) as f32;
            let shown = cell.number("data-value") as f32;
            assert!(shown == json || (shown.is_nan() && json.is_nan()), "{shown} {json}");
        }
        for cell in figure.with("data-root") {
            assert_eq!(cell.number("data-root") as f32, f(&s["to_root"][cell.number("data-member") as usize]) as f32);
        }
        let mut clusters: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (i, c) in list(&s["clusters"]).iter().enumerate() {
            clusters.entry(c.as_u64().unwrap()).or_default().push(i as f64);
        }
        let frames = figure.with("data-cluster");
        assert_eq!(frames.len(), clusters.len());
        let side = figure.with("data-with")[0].number("width") + 1.0;
        for frame in frames {
            let members = &clusters[&(frame.number("data-cluster") as u64)];
            assert_eq!(&frame.numbers("data-members"), members);
            assert!(
                close(frame.number("width"), side * members.len() as f64, 0.011 * (members.len() + 1) as f64),
                "a frame is as wide as its cells"
            );
            // The cells of its members among themselves lie inside it, and no others.
            let inside = |c: &&&Element| {
                let within = |k: &str, side: &str| {
                    let (at, from) = (c.number(k), frame.number(k));
                    at >= from && at < from + frame.number(side)
                };
                within("x", "width") && within("y", "height")
            };
            let cells = figure.with("data-with");
            let mut found: Vec<f64> = cells.iter().filter(inside).map(|c| c.number("data-with")).collect();
            found.sort_by(f64::total_cmp);
            found.dedup();
            assert_eq!(&found, members);
        }
    }
}

/// A row a node: who it grew from, why it ended, its numbers.
fn check_tree(page: &Element, results: &Value) {
    let mut ends: BTreeMap<String, f64> = BTreeMap::new();
    for r in list(results) {
        for n in list(&r["tree"]) {
            *ends.entry(end_of(&n["ended"]).0).or_default() += 1.0;
        }
    }
    for figure in page.figures("tree") {
        let nodes = list(&record(results, figure)["tree"]);
        let rows = figure.with("data-node");
        assert_eq!(rows.len(), nodes.len());
        for row in rows {
            let n = &nodes[row.number("data-node") as usize];
            let (end, other) = end_of(&n["ended"]);
            assert_eq!(row.attr("data-end"), end);
            assert_eq!(row.get("data-other").map(|o| o.parse::<u64>().unwrap()), other);
            assert_eq!(row.get("data-parent").map(|o| o.parse::<u64>().unwrap()), n["parent"].as_u64());
            assert_eq!(row.get("data-score").is_some(), n["score"].is_number());
            assert!(row.get("data-score").is_none_or(|s| same(s.parse().unwrap(), f(&n["score"]))));
            assert_eq!(row.get("data-answer"), n["answer"].as_str());
            for key in ["depth", "tokens", "confidence"] {
                assert!(same(row.number(&format!("data-{key}")), f(&n[key])), "{key}");
            }
        }
    }
    let shown: BTreeMap<String, f64> = page
        .figure("tree-ends")
        .with("data-end")
        .iter()
        .map(|row| (row.attr("data-end").to_string(), row.number("data-total")))
        .collect();
    assert_eq!(shown, ends);
    for (_, values) in bars(page.figure("tree-ends")) {
        assert!(values.values().sum::<f64>() > 0.0);
    }
}

/// `"pruned"` or `{"merged": 5}`.
fn end_of(ended: &Value) -> (String, Option<u64>) {
    match ended {
        Value::Object(o) => o.iter().next().map(|(k, v)| (k.clone(), v.as_u64())).unwrap(),
        other => (other.as_str().unwrap().to_string(), None),
    }
}

/// Areas whose edges stand at the sums of their numbers, and the line of what was freed.
fn check_memory(page: &Element, results: &Value) {
    for figure in page.figures("memory") {
        let samples = list(&record(results, figure)["memory"]);
        let plots = figure.with("data-y");
        let (x, y) = (Scale::of(plots[0], "data-x"), Scale::of(plots[0], "data-y"));
        let mut below = vec![0.0; samples.len()];
        for area in plots[0].with("data-series") {
            let key = area.attr("data-series");
            let values: Vec<f64> = samples.iter().map(|m| f(&m[key])).collect();
            assert_eq!(area.numbers("data-values"), values, "{key}");
            let steps: Vec<f64> = samples.iter().map(|m| f(&m["step"])).collect();
            assert_eq!(area.numbers("data-steps"), steps);
            let points = area.numbers("points");
            for (i, value) in values.iter().enumerate() {
                let (at, top) = (x.value(points[4 * i]), y.value(points[4 * i + 1]));
                assert!(close(at, steps[i], x.grain()), "{key} {i}");
                assert!(close(top, below[i] + value, y.grain()), "{key} {i}: {top}");
                below[i] += value;
            }
        }
        let line = plots[1].with("data-series")[0];
        let (y, points) = (Scale::of(plots[1], "data-y"), line.numbers("points"));
        for (i, m) in samples.iter().enumerate() {
            assert_eq!(line.numbers("data-values")[i], f(&m["freed"]));
            assert!(close(y.value(points[4 * i + 1]), f(&m["freed"]), y.grain()));
        }
    }
}

#[test]
fn every_figure_of_a_full_run_gives_its_numbers_back() {
    let problems: Vec<ProblemResult> = (0..12).map(|i| full(i, 8)).collect();
    let (page, results) = page("full", &problems, |data| data.setting = vec![("model".into(), "made up".into())]);
    check_latency(&page, &results);
    check_entropy(&page, &results);
    check_similarity(&page, &results);
    check_tree(&page, &results);
    check_memory(&page, &results);
    for kind in ["entropy", "similarity", "tree", "memory"] {
        assert_eq!(page.figures(kind).len(), 5, "{kind}: at most so many problems one by one");
    }
    for kind in ["similarity-pairs", "memory-peaks", "tree-ends", "entropy-layers"] {
        page.figure(kind);
    }
    assert!(page.text().contains("test-0003 (wrong)"));
}

#[test]
fn the_summary_says_what_the_report_says() {
    let problems: Vec<ProblemResult> = (0..12).map(|i| full(i, 8)).collect();
    let report = SolveReport::new(&SolverConfig::preset(Policy::Rksc), &problems);
    let data = ReportData { title: "s".into(), report: Some(&report), problems: &problems, ..ReportData::default() };
    let page = parse(&render(&data));
    let text = page.all(|e| e.get("class") == Some("summary"))[0].text();
    let total = report.tokens.total();
    for what in ["10 (83.3 %; 95 % interval 55.2 % to 95.3 %)", "96 branches run", "mean exit layer"] {
        assert!(text.contains(what), "{what}: {text}");
    }
    assert!(text.contains(&format!("{},{:03}", total / 1000, total % 1000)), "{text}");
    for sentence in
        ["8 branches a problem, at most 256 tokens each", "skipped where 5 answers agree", "Greedy decoding."]
    {
        assert!(page.text().contains(sentence), "{sentence}");
    }
    // Whatever the configuration has, by its own name.
    let fields = page.all(|e| e.get("class") == Some("fields"))[0].text();
    assert!(fields.contains("num_branches  8") || fields.contains("num_branches 8"), "{fields}");
    assert!(fields.contains("sampling.temperature"));
    assert_eq!(page.section("problems").named("tr").len(), 1 + problems.len());
}

#[test]
fn hundreds_of_problems_become_bins() {
    let problems: Vec<ProblemResult> = (0..300).map(|i| full(i, 8)).collect();
    let (page, results) = page("hundreds", &problems, |_| {});
    let rows = bars(page.figure("latency-bins"));
    let mut sorted: Vec<&Value> = list(&results).iter().collect();
    sorted.sort_by(|a, b| f(&a["latency_ms"]).total_cmp(&f(&b["latency_ms"])));
    assert_eq!(rows.len(), 20);
    for (bin, (name, values)) in rows.iter().enumerate() {
        let members = &sorted[bin * 15..(bin + 1) * 15];
        for phase in PHASES {
            let mean = members.iter().map(|r| f(&r["phase_ms"][phase])).sum::<f64>() / 15.0;
            assert!(close(values[phase], mean, 1e-9), "{name} {phase}");
        }
    }
    check_spread(&page, &results);
    check_all_layers(page.figure("entropy-layers"), &results);
    check_similarity(&page, &results);
    check_tree(&page, &results);
    assert_eq!(bars(page.figure("memory-peak-bins")).len(), 20);
    assert!(page.with("data-figure").len() < 40, "the page stays short");
    let pairs: f64 = bars(page.figure("similarity-pairs")).iter().flat_map(|(_, v)| v.values()).sum();
    let expected: usize =
        problems.iter().filter_map(|p| p.similarity.as_ref()).map(|s| s.members.len()).map(|n| n * (n - 1) / 2).sum();
    assert_eq!(pairs, expected as f64);
}

#[test]
fn a_long_run_of_samples_is_thinned_and_keeps_its_peak() {
    let mut r = plain(0, 8);
    r.memory =
        (0..5000).map(|i| MemorySample { step: i, shared: 5, private: i % 40, cached: 0, freed: i as u64 }).collect();
    r.memory[2345].private = 777;
    let (page, _) = page("long", &[r], |_| {});
    let area = page.figure("memory").all(|e| e.get("data-series") == Some("private"));
    let values = area[0].numbers("data-values");
    assert!(values.len() <= 321 && values.contains(&777.0));
    assert_eq!(area[0].numbers("data-steps").last(), Some(&4999.0));
    assert!(page.figure("memory").text().contains("of 5000 steps"));
}

#[test]
fn what_was_not_recorded_is_left_out_and_said() {
    let problems: Vec<ProblemResult> = (0..3).map(|i| plain(i, 4)).collect();
    let (page, results) = page("plain", &problems, |_| {});
    check_latency(&page, &results);
    for (id, why) in [
        ("ladder", "There is no ladder"),
        ("entropy", "No layer was probed"),
        ("similarity", "No prompts were compared"),
        ("memory", "not recorded"),
    ] {
        let section = page.section(id);
        assert!(section.text().contains(why), "{id}: {}", section.text());
        assert!(section.with("data-figure").is_empty());
    }
    // Without a tree the branches are one: below the problem, with what ended them.
    for figure in page.figures("tree") {
        let branches = list(&record(&results, figure)["branches"]);
        let rows = figure.with("data-node");
        assert_eq!(rows.len(), branches.len());
        for (row, b) in rows.iter().zip(branches) {
            assert_eq!((row.attr("data-end"), row.number("data-depth")), ("answered", 1.0));
            assert_eq!(row.number("data-tokens"), list(&b["tokens"]).len() as f64);
            assert!(same(row.number("data-confidence"), f(&b["confidence"])));
        }
    }
}

#[test]
fn nothing_solved_and_an_error_still_make_a_page() {
    let (empty, _) = page("nothing", &[], |data| {
        data.error = Some("out of blocks: 9 <needed> & 8 there".into());
    });
    assert!(empty.with("data-figure").is_empty());
    assert!(empty.all(|e| e.get("role") == Some("alert"))[0].text().contains("9 <needed> & 8 there"));
    let bare = parse(&render(&ReportData { title: "bare".into(), ..ReportData::default() }));
    assert!(bare.text().contains("No problem was solved."));
}

#[test]
fn numbers_that_are_none_do_not_break_a_figure() {
    let mut r = full(0, 3);
    r.branches[0].layers[0].entropy = f64::NAN;
    r.branches[1].confidence = f64::NAN;
    r.tree[1].confidence = f64::INFINITY;
    let s = r.similarity.as_mut().unwrap();
    s.pairwise[0][1] = f32::NAN;
    s.pairwise[1][0] = f32::NAN;
    s.to_root[0] = 0.5;
    let html = render(&ReportData { title: "n".into(), problems: &[r.clone()], ..ReportData::default() });
    assert!(!html.contains("NaN") && !html.contains("inf\""), "a coordinate that is no number");
    let page = keep("no-numbers", &html);
    let results = serde_json::to_value([r]).unwrap();
    check_entropy(&page, &results);
    check_similarity(&page, &results);
}

#[test]
fn a_configuration_is_told_in_words() {
    let config = SolverConfig {
        wordings: 5,
        asks: Some(Asks { tau: 0.9, ..Asks::default() }),
        merge: Some(Converged::at(0.98)),
        verify_exit: Some(VerifyExit::PAPER),
        search: Some(SearchConfig { depth: 4, beam: 2, score: StepScore::Verifier, min_score: None }),
        kv: Some(KvLimit { buffer: Some(32), ..KvLimit::new(64) }),
        ..SolverConfig::preset(Policy::RkscPaper)
    };
    let report = SolveReport::new(&config, &[]);
    let words =
        parse(&render(&ReportData { title: "w".into(), report: Some(&report), ..ReportData::default() })).text();
    for sentence in [
        "grow as a tree of 4 levels; of each the best 2 by the verifier are kept.",
        "take turns among 5 wordings",
        "that are 0.9 alike after 2 layers go on as one: not exact.",
        "branches that are 0.98 alike are merged",
        "its entropy over the vocabulary is below 8 nats and changes by less than 3, all together or none.",
        "score x sqrt(confidence) wins",
        "keeps 64 KV slots a layer and head behind the prompt, chosen by rkv (code, lambda 0.1), and 32 more until a cut: not",
        "branches cut: 0 of 0, cuts: 0",
    ] {
        assert!(words.contains(sentence), "{sentence}: {words}");
    }
}

/// Nothing here has a size that a real run could not have; the browser looks whether it still fits.
#[test]
fn extremes_keep_their_place() {
    let mut draws = Draws(5);
    let mut wide = full(0, 64);
    wide.id = "an-identifier-without-an-end/".repeat(6);
    wide.similarity = Some(similarity(40, &mut draws));
    wide.latency_ms = 3_600_000.0;
    wide.phase_ms.decode = 3_500_000.0;
    // A beam of four over eight levels, and one thread down to level 30.
    wide.tree = (0..300)
        .map(|i| {
            let (parent, depth) = if i < 8 {
                (None, 1)
            } else if i < 270 {
                (Some((i - 8) / 4), 0)
            } else {
                (Some(i - 1), 0)
            };
            NodeResult { node: i, parent, depth, ended: NodeEnd::Duplicate(i / 2), ..tree().remove(0) }
        })
        .collect();
    for i in 8..300 {
        wide.tree[i].depth = wide.tree[wide.tree[i].parent.unwrap()].depth + 1;
    }
    let mut lone = full(1, 1);
    lone.similarity = Some(similarity(1, &mut draws));
    lone.branches[0].layers.clear();
    lone.branches[0].exit_layer = Some(30);
    lone.memory = vec![MemorySample { step: 0, shared: 0, private: 0, cached: 0, freed: 0 }];
    lone.latency_ms = 0.0;
    lone.phase_ms = PhaseMs::default();
    let mut many = full(2, 8);
    many.memory.iter_mut().for_each(|m| m.shared = 2_000_000);
    let (page, results) = page("extremes", &[wide, lone, many], |_| {});
    check_latency(&page, &results);
    check_entropy(&page, &results);
    check_similarity(&page, &results);
    check_tree(&page, &results);
    check_memory(&page, &results);
}

#[test]
fn hostile_text_stays_text() {
    let evil = "</script></svg><script>alert(1)</script><img src=x onerror=\"x\"> & &amp; '\u{0}\u{1b}\n";
    let mut r = full(0, 2);
    r.id = evil.into();
    r.answer = Some(evil.into());
    r.expected = Some(evil.into());
    r.correct = Some(false);
    for b in &mut r.branches {
        b.text = evil.into();
    }
    for n in &mut r.tree {
        n.text = evil.into();
        n.answer = Some(evil.into());
    }
    r.similarity.as_mut().unwrap().members[0] = evil.into();
    let (page, _) = page("hostile", &[r], |data| {
        data.title = evil.into();
        data.error = Some(evil.into());
        data.setting = vec![(evil.into(), evil.into())];
    });
    // The reader above has seen well-formed elements; none of them came out of the text.
    let allowed = [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "h1",
        "h2",
        "p",
        "b",
        "strong",
        "span",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "figcaption",
        "details",
        "summary",
        "ul",
        "li",
        "svg",
        "g",
        "text",
        "rect",
        "line",
        "path",
        "circle",
        "polyline",
        "polygon",
    ];
    let strange = page.all(|e| !allowed.contains(&e.name.as_str()));
    assert!(strange.is_empty(), "{:?}", strange.iter().map(|e| &e.name).collect::<Vec<_>>());
    assert!(page.with("onerror").is_empty() && page.with("src").is_empty() && page.with("href").is_empty());
    assert!(page.named("title")[0].text().contains("<script>alert(1)</script>"));
}

#[test]
fn a_page_refers_to_nothing_outside_itself() {
    let problems: Vec<ProblemResult> = (0..2).map(|i| full(i, 2)).collect();
    let html = render(&ReportData { title: "t".into(), problems: &problems, ..ReportData::default() });
    for outside in ["http:", "https:", "url(", "@import", "<script", "<link", "src=", "href="] {
        assert!(!html.contains(outside), "{outside}");
    }
}

fn ladder() -> LadderReport {
    let arm = |(i, policy): (usize, Policy)| {
        let slower = [4.0, 2.1, 1.8, 1.2, 1.5, 1.0][i];
        let scaled = |idx: usize| {
            let mut r = plain(idx, 8);
            r.latency_ms *= slower * (1.0 + 0.05 * (idx % 3) as f64);
            r.tokens.prefill *= (6 - i) as u64;
            vec![r]
        };
        let seconds = 0.001 * slower;
        Arm {
            name: policy.name().into(),
            config: SolverConfig::preset(policy),
            results: (0..30).map(scaled).collect(),
            passes: vec![PassRecord { rows: 8, layer_rows: 16, slots_read: 100, seconds }; 20 * (7 - i)],
        }
    };
    LadderReport::new(&Policy::ALL.into_iter().enumerate().map(arm).collect::<Vec<Arm>>())
}

/// The ladder's figures against its JSON.
fn check_ladder(page: &Element, json: &Value) {
    let policies = list(&json["policies"]);
    let problems = f(&json["problems"]);
    let latency = points(page.figure("ladder-latency"));
    assert_eq!(latency.len(), policies.len());
    for ((name, numbers), p) in latency.iter().zip(policies) {
        assert_eq!(name.as_str(), p["policy"].as_str().unwrap());
        let json = ["mean", "p10", "p90"].map(|k| f(&p["latency_ms"][k]));
        assert!(all_same(&numbers[..3], &json), "{name}: {numbers:?} {json:?}");
    }
    for (name, [value, lo, hi, ceiling]) in points(page.figure("ladder-ratio")) {
        let r = &json["ratios"][format!("{name}/rksc")];
        assert!(all_same(&[value, lo, hi, ceiling], &["value", "lo", "hi", "ceiling"].map(|k| f(&r[k]))), "{name}");
    }
    for ((name, values), p) in bars(page.figure("ladder-tokens")).iter().zip(policies) {
        for phase in PHASES {
            assert!(close(values[phase] * problems, f(&p["tokens"][phase]), 1e-6), "{name} {phase}");
        }
    }
    for ((_, [value, lo, hi, _]), p) in points(page.figure("ladder-accuracy")).iter().zip(policies) {
        let json = [&p["accuracy"], &p["accuracy_interval"][0], &p["accuracy_interval"][1]].map(|v| f(v) * 100.0);
        assert!([*value, *lo, *hi].iter().zip(json).all(|(a, b)| close(*a, b, 1e-9)));
    }
}

#[test]
fn the_ladder_gives_its_numbers_back() {
    let ladder = ladder();
    let problems: Vec<ProblemResult> = (0..30).map(|i| plain(i, 8)).collect();
    let (page, _) = page("ladder", &problems, |data| data.ladder = Some(&ladder));
    let json = serde_json::to_value(&ladder).unwrap();
    assert_eq!(list(&json["policies"]).len(), 6);
    check_ladder(&page, &json);
    assert_eq!(points(page.figure("ladder-ratio")).len(), 5);
    assert!(page.section("ladder").text().contains("Every policy solved the same 30 problems once"));
}

// ---- the command ----

fn run(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rksc-run"));
    command.current_dir(dir).args(args).stdin(Stdio::null()).output().unwrap()
}

fn run_json(dir: &Path, args: &[&str]) -> Value {
    let out = run(dir, args);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The page a command wrote, kept for the browser.
fn written(dir: &Path, file: &str, name: &str) -> Element {
    let parts =
        std::fs::read_dir(dir).unwrap().filter(|e| e.as_ref().unwrap().path().extension() == Some("part".as_ref()));
    assert_eq!(parts.count(), 0, "a temporary file stayed behind");
    keep(name, &std::fs::read_to_string(dir.join(file)).unwrap())
}

#[test]
fn solve_writes_what_json_says() {
    let dir = tempfile::tempdir().unwrap();
    let json = run_json(
        dir.path(),
        &["solve", "--limit", "3", "-B", "4", "--policy", "exact", "--json", "--report", "r.html"],
    );
    let results = &json["results"];
    assert_eq!((list(results).len(), &json["problems"]), (3, &json!(3)));
    let page = written(dir.path(), "r.html", "solve");
    check_latency(&page, results);
    check_entropy(&page, results);
    check_similarity(&page, results);
    check_memory(&page, results);
    assert_eq!((page.figures("memory").len(), page.figures("entropy").len()), (3, 3));
    for figure in page.figures("tree") {
        let r = record(results, figure);
        let nodes = if list(&r["tree"]).is_empty() { &r["branches"] } else { &r["tree"] };
        assert_eq!(figure.with("data-node").len(), list(nodes).len());
    }
    assert!(page.text().contains("tinymath (bundled)"));
    let right = json["correct"].as_u64().unwrap();
    assert!(page.all(|e| e.get("class") == Some("summary"))[0].text().contains(&format!("{right} (")));
}

#[test]
fn one_branch_renders() {
    let dir = tempfile::tempdir().unwrap();
    let json = run_json(dir.path(), &["solve", "--limit", "1", "-B", "1", "--json", "--report", "r.html"]);
    let page = written(dir.path(), "r.html", "one-branch");
    check_latency(&page, &json["results"]);
    assert_eq!(page.figure("tree").with("data-node").len(), 1);
    assert!(page.text().contains("One branch a problem"));
}

#[test]
fn a_run_that_ends_with_an_error_still_writes_what_was_done() {
    let dir = tempfile::tempdir().unwrap();
    let line = |id: &str, question: &str| json!({"id": id, "question": question, "answer": "5"}).to_string();
    let long = "Tom has 2 apples and gets 3 more. ".repeat(400);
    let problems = [line("fits", "Tom has 2 apples and gets 3 more. How many?"), line("too-long", &long)].join("\n");
    std::fs::write(dir.path().join("p.jsonl"), problems).unwrap();
    std::fs::write(dir.path().join("r.html"), "an older page").unwrap();
    let args = ["solve", "--problems", "p.jsonl", "-B", "2", "--report", "r.html", "--out", "o.jsonl"];
    let out = run(dir.path(), &args);
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stderr));
    let page = written(dir.path(), "r.html", "error");
    let alert = page.all(|e| e.get("role") == Some("alert"))[0].text();
    assert!(alert.contains("exceed the model's context"), "{alert}");
    let done = std::fs::read_to_string(dir.path().join("o.jsonl")).unwrap();
    let results: Value = Value::Array(done.lines().map(|l| serde_json::from_str(l).unwrap()).collect());
    assert_eq!(list(&results).len(), 1);
    check_latency(&page, &results);
    assert!(page.text().contains("1 of 2 problems"));
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    std::fs::create_dir(at.join("folder")).unwrap();
    std::fs::write(at.join("o.jsonl"), "kept").unwrap();
    let refused = |args: &[&str], code: i32, what: &str| {
        let out = run(at, args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(what) && out.stdout.is_empty(), "{args:?}: {stderr}");
        assert!(!stderr.contains("tinymath"), "the model was opened first: {stderr}");
    };
    refused(&["solve", "--report", "nowhere/r.html", "--out", "o.jsonl"], 2, "nowhere/r.html");
    refused(&["solve", "--report", "folder", "--out", "o.jsonl"], 2, "folder");
    refused(&["solve", "--report", "o.jsonl", "--out", "o.jsonl"], 1, "--out");
    refused(&["bench", "ladder", "--report", "nowhere/r.html"], 2, "nowhere/r.html");
    assert_eq!(std::fs::read_to_string(at.join("o.jsonl")).unwrap(), "kept");
    assert_eq!(std::fs::read_dir(at).unwrap().count(), 2, "something was left behind");
}

#[test]
fn the_ladder_command_writes_what_json_says() {
    let dir = tempfile::tempdir().unwrap();
    let args = [
        "bench",
        "ladder",
        "--limit",
        "2",
        "-B",
        "2",
        "--policies",
        "no-sharing,exact,rksc",
        "--json",
        "--report",
        "r.html",
    ];
    let json = run_json(dir.path(), &args);
    let page = written(dir.path(), "r.html", "ladder-command");
    check_ladder(&page, &json);
    assert_eq!(page.figure("latency").with("data-row").len(), 2);
    // Written down in a run of its own, so that the timed ones are what they are without a report.
    assert_eq!((page.figures("memory").len(), page.figures("entropy").len()), (2, 2));
    assert_eq!(json["policies"][2]["config"]["record"], false);
}

#[cfg(unix)]
#[test]
fn a_link_stays_a_link_and_a_device_a_device() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("real.html", dir.path().join("link.html")).unwrap();
    std::fs::write(dir.path().join("real.html"), "old").unwrap();
    run_json(dir.path(), &["solve", "--limit", "1", "-B", "1", "--json", "--report", "link.html"]);
    assert!(std::fs::symlink_metadata(dir.path().join("link.html")).unwrap().is_symlink());
    written(dir.path(), "real.html", "link");
    run_json(dir.path(), &["solve", "--limit", "1", "-B", "1", "--json", "--report", "/dev/null"]);
    assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
}

//! A branch whose numbers break ends by itself, with a name for it, and takes nobody along: its siblings' bits, the
//! blocks it leaves behind, the problem it belongs to.

mod common;

use std::path::Path;
use std::process::Command;

use common::*;
use rksc::engine::{BranchId, EndReason, Engine, EventKind};
use rksc::prompts::PromptPack;
use rksc::report::NodeEnd;
use rksc::solver::task::{Task, TextTask};
use rksc::solver::{Policy, SearchConfig, Solver, SolverConfig, StepScore};
use rksc::{DType, Error, ErrorCode, ModelSource};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// `@`: no prompt of the tests has it, and the model never says it.
const POISON: u32 = 38;
const HARMLESS: u32 = 39;

/// The bundled model with its embeddings untied, and the input embedding of [`POISON`] full of `value`: whoever is fed
/// that token has it in every row of its KV from there on, and nobody else sees it.
fn model(value: f32) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "prompts.json", "generation_config.json"] {
        if model_file(name).exists() {
            std::fs::copy(model_file(name), dir.path().join(name)).unwrap();
        }
    }
    let mut config: serde_json::Value = serde_json::from_str(&read(&model_file("config.json"))).unwrap();
    config["tie_word_embeddings"] = false.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let file = std::fs::read(model_file("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let embed = tensors.tensor("model.embed_tokens.weight").unwrap();
    let hidden = embed.shape()[1];
    let mut poisoned = embed.data().to_vec();
    let row = POISON as usize * hidden * 2;
    for element in poisoned[row..row + hidden * 2].chunks_exact_mut(2) {
        element.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
    }
    let view = |data| TensorView::new(embed.dtype(), embed.shape().to_vec(), data).unwrap();
    let mut all: Vec<(String, TensorView<'_>)> =
        tensors.tensors().into_iter().filter(|(name, _)| name != "model.embed_tokens.weight").collect();
    all.push(("model.embed_tokens.weight".into(), view(&poisoned)));
    all.push(("lm_head.weight".into(), view(embed.data())));
    safetensors::serialize_to_file(all, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

fn open(dir: &Path, dtype: DType, simd: &str) -> Engine {
    engine(|c| {
        c.model = ModelSource::Dir(dir.to_path_buf());
        c.dtype = dtype;
        c.simd = simd.into();
    })
}

/// A root and four forks that generate, the third of them behind `token`.
fn branches(engine: &mut Engine, token: u32) -> Vec<BranchId> {
    let mut rng = Rng(12);
    let root = engine.prefill(&rng.tokens(41), uncached()).unwrap();
    let ids = all_ids(engine);
    (0..4)
        .map(|i| {
            let branch = fork(engine, root);
            let mut own = rng.tokens(5);
            own[2] = if i == 2 { token } else { HARMLESS };
            own.retain(|&t| i == 2 || t != POISON);
            engine.append(branch, &own).unwrap();
            engine.watch(branch, &ids, 0).unwrap();
            engine.start(branch, greedy(12)).unwrap();
            branch
        })
        .collect()
}

#[test]
fn a_broken_branch_ends_and_its_siblings_keep_every_bit() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let dir = model(value);
        for simd in simd_levels() {
            for dtype in [DType::F32, DType::Bf16] {
                let mut clean = open(dir.path(), dtype, &simd);
                let expected_ids = branches(&mut clean, HARMLESS);
                let expected = traces(&mut clean, &expected_ids);
                let mut engine = open(dir.path(), dtype, &simd);
                let ids = branches(&mut engine, POISON);
                let mut events = Vec::new();
                let mut got = vec![Vec::new(); 4];
                while engine.has_work() {
                    engine.step().unwrap();
                    while let Some(event) = engine.next_event() {
                        let Some(i) = ids.iter().position(|&b| b == event.branch) else { continue };
                        match event.kind {
                            EventKind::Token(_) => got[i].push(row_bits(&engine, event.branch)),
                            kind if i == 2 => events.push(kind),
                            _ => {}
                        }
                    }
                }
                let what = format!("{value} {simd} {dtype}");
                assert_eq!(events, [EventKind::Ended(EndReason::NonFinite)], "{what}");
                for i in [0, 1, 3] {
                    assert!(got[i].len() == 12 && got[i] == expected[i], "{what}: branch {i} is not what it was");
                }
                // Not one token came out of it.
                let stats = engine.stats(ids[2]).unwrap();
                assert_eq!((got[2].len(), stats.num_generated_tokens), (0, 0), "{what}");
                assert_eq!((stats.num_tokens, stats.ended), (46, Some(EndReason::NonFinite)), "{what}");
                assert_eq!(engine.row(ids[2]).unwrap().unwrap().stats.finite, 0);
                engine.check_integrity().unwrap();
            }
        }
    }
}

#[test]
fn blocks_of_a_broken_branch_serve_the_next_one() {
    let dir = model(f32::NAN);
    for simd in simd_levels() {
        let run = |engine: &mut Engine| {
            let mut rng = Rng(5);
            let branch = engine.prefill(&rng.tokens(37), uncached()).unwrap();
            let ids = all_ids(engine);
            engine.watch(branch, &ids, 0).unwrap();
            engine.start(branch, greedy(20)).unwrap();
            traces(engine, &[branch]).remove(0)
        };
        // Four blocks: whoever comes next gets those that the broken branch filled.
        let small = || {
            let mut engine = open(dir.path(), DType::Bf16, &simd);
            let memory = 5 * 16 * engine.info().kv_bytes_per_token;
            engine = common::engine(|c| {
                c.model = ModelSource::Dir(dir.path().to_path_buf());
                c.simd = simd.clone();
                c.kv_cache_memory = Some(memory);
            });
            engine
        };
        let expected = run(&mut small());
        let mut engine = small();
        let broken = engine.prefill(&[POISON; 64], uncached()).unwrap();
        run_all(&mut engine);
        assert_eq!(engine.stats(broken).unwrap().ended, Some(EndReason::NonFinite));
        engine.prune(broken).unwrap();
        assert!(run(&mut engine) == expected, "{simd}: something was left in the blocks");
    }
}

#[test]
fn a_broken_score_is_an_error_that_names_branch_and_position() {
    let dir = model(f32::NAN);
    let mut engine = open(dir.path(), DType::F32, "auto");
    let mut tokens = Rng(8).tokens(30);
    tokens.retain(|&t| t != POISON);
    let sibling = engine.prefill(&tokens, uncached()).unwrap();
    let branch = fork(&mut engine, sibling);
    let mut logprobs = [1.0; 4];
    let error = engine.score(branch, &[40, POISON, 41, 42], &mut logprobs).unwrap_err();
    assert_eq!(error.code(), ErrorCode::File);
    match error {
        Error::NonFinite { branch: name, position } => {
            assert_eq!((name, position), (branch.to_string(), tokens.len() + 1));
        }
        other => panic!("{other}"),
    }
    assert_eq!(logprobs, [1.0; 4], "a failed call wrote to its caller's buffer");
    let ended = std::iter::from_fn(|| engine.next_event()).filter(|e| e.branch == branch).count();
    assert_eq!(ended, 1, "three broken rows are one end");
    // Cut back to before the break, it is a branch like any other.
    engine.truncate(branch, tokens.len()).unwrap();
    let (mut again, mut clean) = ([0.0; 2], [0.0; 2]);
    engine.score(branch, &[40, 41], &mut again).unwrap();
    engine.score(sibling, &[40, 41], &mut clean).unwrap();
    assert_eq!(again.map(f32::to_bits), clean.map(f32::to_bits));
}

#[test]
fn a_problem_with_a_broken_branch_is_answered_by_the_others() {
    let dir = model(f32::NAN);
    for policy in Policy::ALL {
        let solve = |third: &str| {
            let mut pack = PromptPack::from_file(&dir.path().join("prompts.json")).unwrap();
            pack.approaches[2] = third.into();
            let task = TextTask::new(compiled(pack, ""), problems("test", 2).remove(1)).unwrap();
            let tasks: [Box<dyn Task>; 1] = [Box::new(task)];
            let mut engine = open(dir.path(), DType::Bf16, "auto");
            let mut config = SolverConfig::preset(policy);
            config.skip = rksc::gate::verify::SkipRule::Never;
            config.decode_exit = rksc::gate::step::DecodeExit::Off;
            let mut results = Vec::new();
            let mut take = |_, result| {
                results.push(result);
                Ok(())
            };
            Solver::new(&mut engine, config).unwrap().solve(&tasks, &mut take).unwrap();
            engine.clear_prefix_cache().unwrap();
            assert_eq!((engine.engine_stats().branches, engine.engine_stats().blocks_used), (0, 0));
            results.remove(0)
        };
        let (broken, clean) = (solve("Mail @ once."), solve("Make a table."));
        let third = &broken.branches[2];
        assert_eq!((third.ended, third.tokens.len()), (Some(EndReason::NonFinite), 0), "{}", policy.name());
        assert_eq!((&third.answer, third.score), (&None, None));
        assert_eq!((broken.verify.run, clean.verify.run), (7, 8), "{}", policy.name());
        assert_eq!(broken.correct, Some(true), "{}", policy.name());
        for i in (0..8).filter(|&i| i != 2) {
            let (a, b) = (&broken.branches[i], &clean.branches[i]);
            assert_eq!((&a.tokens, a.confidence.to_bits()), (&b.tokens, b.confidence.to_bits()), "branch {i}");
            assert_eq!(a.score.map(f64::to_bits), b.score.map(f64::to_bits), "{}: branch {i}", policy.name());
        }
    }
}

#[test]
fn a_tree_whose_nodes_all_break_has_leaves_that_say_so_and_no_answer() {
    let dir = model(f32::NAN);
    let mut pack = PromptPack::from_file(&dir.path().join("prompts.json")).unwrap();
    pack.approaches = vec!["Mail @ once.".into(), "Mail @ twice.".into()];
    let task = |pack| -> Vec<Box<dyn Task>> {
        vec![Box::new(TextTask::new(compiled(pack, ""), problems("test", 1).remove(0)).unwrap())]
    };
    let mut engine = open(dir.path(), DType::Bf16, "auto");
    let tree = SearchConfig { depth: 3, beam: 2, score: StepScore::Both, min_score: None };
    let mut config = SolverConfig { num_branches: 2, search: Some(tree), ..SolverConfig::preset(Policy::Exact) };
    config.sampling.temperature = 0.7;
    let broken = solve(&mut engine, &config, &task(pack.clone())).remove(0);
    assert_eq!((&broken.answer, broken.verify.run), (&None, 0));
    assert!(broken.tree.len() == 2 && broken.tree.iter().all(|n| (n.ended, n.tokens) == (NodeEnd::Failed, 0)));
    assert!(broken.branches.iter().all(|b| b.ended == Some(EndReason::NonFinite)));
    // One that breaks leaves the tree to the others.
    pack.approaches[1] = "Make a table.".into();
    let half = solve(&mut engine, &config, &task(pack)).remove(0);
    assert_eq!(half.tree[0].ended, NodeEnd::Failed);
    assert_eq!((half.tree[1].ended, half.correct), (NodeEnd::Expanded, Some(true)));
}

#[test]
fn the_command_line_names_it() {
    let dir = model(f32::NAN);
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_rksc-run")).current_dir(dir.path()).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, stdout, _) = run(&["generate", "-m", ".", "-p", "Problem: @ home", "-n", "2", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(code, Some(0));
    for choice in json["choices"].as_array().unwrap() {
        assert_eq!((choice["text"].as_str(), choice["finish_reason"].as_str()), (Some(""), Some("error: non_finite")));
    }
    let (_, _, stderr) = run(&["generate", "-m", ".", "-p", "Problem: @ home"]);
    assert!(stderr.contains("error: non_finite"), "{stderr}");
    std::fs::write(dir.path().join("in"), "{\"text\": \"Problem: 1\"}\n{\"text\": \"Problem: @ 1\"}\n").unwrap();
    let (code, _, stderr) = run(&["score", "-m", ".", "--in", "in", "--out", "out"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("in: line 2") && stderr.contains("not finite at position"), "{stderr}");
    assert_eq!(read(&dir.path().join("out")).lines().count(), 1, "the line before it is there");
    let (code, _, stderr) = run(&["generate", "-m", ".", "-p", "x", "--check-tensors"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("model.embed_tokens.weight") && stderr.contains("NaN"), "{stderr}");
}

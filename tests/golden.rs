//! The engine against reference outputs computed with transformers (models/tinymath/golden, made by recipe/golden.py):
//! logits and greedy tokens in f32 at every SIMD level, and bf16 against the engine's own f32.

mod common;

use common::*;
use rksc::DType;
use rksc::engine::BranchId;
use serde_json::Value;

struct Golden {
    name: String,
    prompt: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
    margins: Vec<f64>,
}

fn goldens() -> Vec<Golden> {
    let json: Value = serde_json::from_str(&read(&model_file("golden/golden.json"))).unwrap();
    let ids = |v: &Value| -> Vec<u32> { v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect() };
    let prompts = json["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 12);
    let golden = |p: &Value| Golden {
        name: p["name"].as_str().unwrap().into(),
        prompt: ids(&p["prompt_ids"]),
        logits: read_npy_f32(&format!("golden/{}", p["last_logits"].as_str().unwrap())),
        greedy: ids(&p["greedy64_ids"]),
        margins: p["greedy64_top1_minus_top2"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect(),
    };
    prompts.iter().map(golden).collect()
}

/// A one-dimensional little-endian f32 array: magic, version 1, header length, header, data.
fn read_npy_f32(name: &str) -> Vec<f32> {
    let bytes = std::fs::read(model_file(name)).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{name}");
    let data = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..data]).unwrap();
    assert!(header.contains("'descr': '<f4'") && header.contains("'fortran_order': False"), "{name}: {header}");
    let values: Vec<f32> = bytes[data..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert!(header.contains(&format!("'shape': ({},)", values.len())), "{name}: {header}");
    values
}

#[test]
fn f32_logits_and_greedy_tokens_match_transformers_at_every_simd_level() {
    let goldens = goldens();
    for simd in simd_levels() {
        let mut engine = engine(|c| (c.dtype, c.simd) = (DType::F32, simd.clone()));
        let ids = all_ids(&engine);
        let branches: Vec<BranchId> = goldens
            .iter()
            .map(|g| {
                let branch = engine.prefill(&g.prompt, uncached()).unwrap();
                engine.watch(branch, &ids, 0).unwrap();
                branch
            })
            .collect();
        run_all(&mut engine);
        let mut worst = 0.0_f32;
        for (g, &branch) in goldens.iter().zip(&branches) {
            let row = engine.row(branch).unwrap().unwrap();
            assert_eq!(row.watched.len(), g.logits.len());
            for (i, (logprob, golden)) in row.watched.iter().zip(&g.logits).enumerate() {
                let diff = (logprob + row.stats.lse - golden).abs();
                assert!(diff <= 1e-3, "{simd}, {}: logit {i} is {}, golden {golden}", g.name, logprob + row.stats.lse);
                worst = worst.max(diff);
            }
        }
        for &branch in &branches {
            engine.watch(branch, &[], 0).unwrap();
            engine.start(branch, greedy(64)).unwrap();
        }
        run_all(&mut engine);
        let mut compared = 0;
        for (g, &branch) in goldens.iter().zip(&branches) {
            let sure = g.margins.iter().position(|&m| m < 0.01).unwrap_or(g.greedy.len());
            let tokens = generated(&engine, branch, g.prompt.len());
            assert_eq!(tokens.len(), 64, "{simd}, {}", g.name);
            assert_eq!(tokens[..sure], g.greedy[..sure], "{simd}, {}", g.name);
            compared += sure;
        }
        println!(
            "{simd}: worst logit difference {worst:.2e}; {compared} of {} greedy tokens compared, all equal",
            12 * 64
        );
        assert!(compared >= 12 * 48, "the goldens say too little: {compared} tokens before the first close call");
    }
}

/// Texts for teacher forcing: the goldens with their continuations, and the f32 engine's own solutions of dev problems,
/// with the number of tokens before the solution.
fn forced_texts() -> Vec<(Vec<u32>, usize)> {
    let mut engine = engine(|c| c.dtype = DType::F32);
    let tasks = tasks(&problems("dev", 40), "");
    let prompts: Vec<Vec<u32>> = tasks.iter().enumerate().map(|(i, t)| branch_prompt(t.as_ref(), i % 8)).collect();
    let branches: Vec<BranchId> = prompts
        .iter()
        .map(|prompt| {
            let branch = engine.prefill(prompt, uncached()).unwrap();
            engine.start(branch, greedy_to_end()).unwrap();
            branch
        })
        .collect();
    run_all(&mut engine);
    let solutions = branches.iter().zip(&prompts).map(|(&b, p)| (engine.tokens(b).unwrap().to_vec(), p.len()));
    let golden = |g: Golden| ([g.prompt.clone(), g.greedy].concat(), g.prompt.len());
    goldens().into_iter().map(golden).chain(solutions).collect()
}

#[derive(Default)]
struct Divergence {
    positions: usize,
    kl: f64,
    worst_kl: f64,
    same_top: usize,
    /// Of those that differ, the largest f32 margin.
    worst_margin: f32,
}

impl Divergence {
    fn add(&mut self, p: &[f32], q: &[f32], same_top: bool, margin: f32) {
        let kl: f64 = p.iter().zip(q).map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum();
        self.positions += 1;
        self.kl += kl;
        self.worst_kl = self.worst_kl.max(kl);
        self.same_top += usize::from(same_top);
        if !same_top {
            self.worst_margin = self.worst_margin.max(margin);
        }
    }

    fn print(&self, what: &str) {
        println!(
            "{what}: {} positions, mean KL {:.2e}, worst {:.2e}, top-1 agreement {:.3} %, widest f32 margin lost {:.3}",
            self.positions,
            self.kl / self.positions as f64,
            self.worst_kl,
            100.0 * self.same_top as f64 / self.positions as f64,
            self.worst_margin
        );
    }
}

#[test]
fn bf16_stays_close_to_f32_under_teacher_forcing() {
    let texts = forced_texts();
    let mut exact = engine(|c| c.dtype = DType::F32);
    let mut rounded = engine(|c| c.dtype = DType::Bf16);
    let ids = all_ids(&exact);
    let start = |engine: &mut rksc::Engine| -> Vec<BranchId> {
        let start_one = |(text, _): &(Vec<u32>, usize)| {
            let branch = engine.prefill(&text[..1], uncached()).unwrap();
            engine.watch(branch, &ids, 0).unwrap();
            branch
        };
        texts.iter().map(start_one).collect()
    };
    let (a, b) = (start(&mut exact), start(&mut rounded));
    let (mut all, mut solutions) = (Divergence::default(), Divergence::default());
    // One token of every text a step: each row is seen whole.
    for at in 0..texts.iter().map(|t| t.0.len()).max().unwrap() {
        run_all(&mut exact);
        run_all(&mut rounded);
        for (i, (text, prompt_len)) in texts.iter().enumerate().filter(|(_, t)| at < t.0.len()) {
            let (p, q) = (exact.row(a[i]).unwrap().unwrap(), rounded.row(b[i]).unwrap().unwrap());
            let same_top = p.stats.argmax == q.stats.argmax;
            all.add(&p.watched, &q.watched, same_top, p.stats.margin);
            if at + 1 >= *prompt_len {
                solutions.add(&p.watched, &q.watched, same_top, p.stats.margin);
            }
            if let Some(next) = text.get(at + 1) {
                exact.append(a[i], &[*next]).unwrap();
                rounded.append(b[i], &[*next]).unwrap();
            }
        }
    }
    all.print("prompts and solutions");
    solutions.print("solutions alone");
    for d in [&all, &solutions] {
        assert!(d.kl / d.positions as f64 <= 5e-3);
        assert!(d.kl > 0.0, "bf16 and f32 are the same engine");
        assert!(d.same_top as f64 / d.positions as f64 >= 0.99);
    }
    assert!(all.positions >= 4000 && solutions.positions >= 3000);
}

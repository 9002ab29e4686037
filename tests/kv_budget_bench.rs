//! What `rksc-run bench kv-budget` counts, on small shapes and few problems: numbers that follow from lengths alone. And
//! what a budgeted chain holds and allocates, against arithmetic written down here once more.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::*;
use rksc::engine::{EventKind, GenerateParams, PrefillOptions};
use rksc::kv::budget::KvBudget;
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::{DType, Engine, EngineConfig};
use serde_json::Value;

/// Remembers the largest allocation while `WATCHING` is up.
struct WatchingAllocator;

static WATCHING: AtomicBool = AtomicBool::new(false);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for WatchingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        watch(new_size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

fn watch(bytes: usize) {
    if WATCHING.load(Ordering::Relaxed) {
        LARGEST.fetch_max(bytes, Ordering::Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: WatchingAllocator = WatchingAllocator;

/// What the binary says in JSON.
fn bench(dir: &Path, args: &[&str]) -> Value {
    let binary = env!("CARGO_BIN_EXE_rksc-run");
    let mut command = Command::new(binary);
    command.args(["bench", "kv-budget"]).args(args).arg("--json");
    let out = command.current_dir(dir).stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {errors}");
    serde_json::from_slice(&out.stdout).unwrap()
}

fn number(v: &Value) -> u64 {
    v.as_u64().unwrap_or_else(|| panic!("{v} is no count"))
}

#[test]
fn throughput_counts_follow_from_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["throughput", "--shape", "tiny", "--max-new-tokens", "512", "--kv-budget-percent", "10,34"];
    let r = bench(dir.path(), &args);
    // 16 + 512 tokens are 33 blocks; one more is for the copy of a shared tail.
    assert_eq!(number(&r["blocks"]), 34);
    let arms = r["arms"].as_array().unwrap();
    // Slots: 16 + 511; 16 + 51 + 32; 16 + 174 + 32.
    let expected = [(527, 33, 1), (99, 7, 4), (222, 14, 2)];
    assert_eq!(arms.len(), expected.len());
    for (arm, (slots, blocks, fits)) in arms.iter().zip(expected) {
        assert_eq!(number(&arm["slots_per_chain"]), slots, "{arm}");
        assert_eq!(number(&arm["blocks_per_chain"]), blocks, "{arm}");
        // Chains that come to their end need less than they might: one more may begin before they are gone.
        let in_flight = number(&arm["in_flight"]);
        assert!(number(&arm["fits"]) == fits && (fits..=fits + 1).contains(&in_flight), "{arm}");
        assert_eq!(number(&arm["chains"]), 2 * fits, "{arm}");
        assert_eq!((number(&arm["preemptions"]), number(&arm["tokens_recomputed"])), (0, 0), "{arm}");
        assert_eq!(number(&arm["blocks_peak"]), number(&arm["expected_peak"]), "{arm}");
        assert!((fits * (blocks - 1)..=34).contains(&number(&arm["blocks_peak"])), "{arm}");
    }
    assert_eq!((number(&arms[0]["kv_cuts"]), number(&arms[0]["blocks_peak"])), (0, 33));
    // 511 passes each fill 51 + 32 at most; a cut every 32 from then on, 13 or 14 by phase.
    let cuts = number(&arms[1]["kv_cuts"]);
    assert!((8 * 13..=8 * 15).contains(&cuts), "{cuts} cuts");
}

#[test]
fn memory_is_budget_and_buffer_at_its_peak() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = ["--max-new-tokens", "2000", "--kv-budget", "160", "--kv-buffer", "32"];
    let r = bench(dir.path(), &[&["memory", "--shape", "tiny"][..], &sizes].concat());
    let [slots, chain, blocks] = [0, 1, 2].map(|i| &r["rows"][i]);
    assert_eq!((number(&slots["held"]["peak"]), number(&slots["full"]["peak"])), (16 + 160 + 32, 16 + 1999));
    assert_eq!((number(&chain["held"]["peak"]), number(&chain["full"]["peak"])), (192, 1999));
    assert_eq!((number(&blocks["held"]["peak"]), number(&blocks["full"]["peak"])), (13, 126));
    let saved = slots["saved_at_peak"].as_f64().unwrap();
    assert!((saved - (1.0 - 208.0 / 2015.0)).abs() < 1e-12, "{saved}");
    assert_eq!(number(&r["blocks_peak"]), 13);
}

#[test]
fn cost_compares_every_cut_with_the_steps_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = ["--max-new-tokens", "600", "--kv-budget", "96", "--kv-buffer", "32", "--methods", "rkv,streaming"];
    let r = bench(dir.path(), &[&["cost", "--shape", "tiny"][..], &sizes].concat());
    for arm in r["arms"].as_array().unwrap() {
        // Total 16 + 97 is 113 = 17 mod 32; the first total that is 1 mod 32 behind it is 129, the last below 616 is 609.
        assert_eq!((number(&arm["cuts"]), number(&arm["pairs"])), (16, 16), "{arm}");
        assert!(arm["step_ms"].as_f64().unwrap() > 0.0, "{arm}");
        assert_eq!((number(&arm["square"]), number(&arm["squares"])), (4 * 128 * 128, 4 * 4 * 128 * 128), "{arm}");
    }
}

#[test]
fn accuracy_counts_agree_with_themselves_and_draw() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["accuracy", "--limit", "4", "--kv-budget-percent", "16,54,500", "--methods", "rkv,random,h2o"];
    let r = bench(dir.path(), &[&args[..], &["--seeds", "2", "--svg", "a.svg"]].concat());
    let arms = r["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|a| a["method"].as_str().unwrap()).collect();
    assert_eq!(names.iter().filter(|n| **n == "random").count(), 6, "{names:?}");
    assert_eq!(names.len(), 1 + 3 + 6 + 3, "{names:?}");
    let full = number(&arms[0]["right"]);
    for arm in arms {
        let (lost, won) = (number(&arm["right_to_wrong"]), number(&arm["wrong_to_right"]));
        assert_eq!(number(&arm["right"]) + lost, full + won, "{arm}");
        let kinds = ["never_cut", "cut_after_answer", "cut_before_answer"].map(|k| &arm[k]);
        for (field, sum) in [("problems", 4), ("right", number(&arm["right"])), ("right_full", full)] {
            assert_eq!(kinds.iter().map(|k| number(&k[field])).sum::<u64>(), sum, "{field}: {arm}");
        }
        // What was decided before a cut is what the full cache decides.
        assert_eq!(number(&arm["differ_before_cut"]), 0, "{arm}");
        match arm["percent"].as_f64() {
            Some(500.0) => {
                assert_eq!((number(&arm["same_tokens"]), number(&kinds[0]["problems"])), (4, 4), "{arm}");
                assert_eq!(arm["memory"]["saved_peak"], 0.0, "{arm}");
            }
            Some(percent) => {
                let (budget, buffer) = (number(&arm["budget"]), number(&arm["buffer"]));
                assert_eq!(number(&arm["memory"]["unpinned_peak"]), budget + buffer, "{arm}");
                assert!(arm["cuts_mean"].as_f64().unwrap() >= 1.0, "{arm}");
                let saved = arm["memory"]["unpinned_saved_peak"].as_f64().unwrap();
                assert!(saved > 0.0 && saved < 1.0 - percent / 200.0, "{arm}");
            }
            None => assert_eq!(number(&arm["same_tokens"]), 4, "{arm}"),
        }
    }
    assert!(read(&dir.path().join("a.svg")).starts_with("<svg"));
    // 4 problems decide nothing, and the command says so.
    let verdicts = r["verdicts"].as_array().unwrap();
    assert!(verdicts.iter().any(|v| v.as_str().unwrap().contains("do not make a default")), "{verdicts:?}");
}

#[test]
fn a_prompt_that_may_go_goes() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["accuracy", "--limit", "2", "--kv-budget-percent", "25", "--methods", "rkv,streaming"];
    let r = bench(dir.path(), &[&args[..], &["--kv-prompt", "evict"]].concat());
    for arm in &r["arms"].as_array().unwrap()[1..] {
        assert_eq!(arm["memory"]["pinned_mean"], 4.0, "{arm}");
    }
}

/// One layer of the tiny shape, with room for long contexts.
fn one_layer(kv_cache_memory: u64) -> Engine {
    let mut model = ModelConfig::shape("tiny").unwrap();
    model.num_layers = 1;
    model.max_position_embeddings = 16_384;
    let store = WeightStore::random(&model, 0, DType::Bf16).unwrap();
    let config = EngineConfig {
        threads: 1,
        device: "cpu".into(),
        kv_cache_memory: Some(kv_cache_memory),
        ..EngineConfig::default()
    };
    Engine::with_weights(config, model, &store).unwrap()
}

/// Forced length 8192 behind a prompt of 16, budget 640, buffer 128: nine tenths are saved at the peak.
#[test]
fn ninety_per_cent_of_a_long_chain_is_arithmetic() {
    const PROMPT: usize = 16;
    const NEW: usize = 8192;
    let mut engine = one_layer(8 << 20);
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| 7 * i + 3).collect();
    let id = engine.prefill(&prompt, PrefillOptions { use_prefix_cache: false, ..Default::default() }).unwrap();
    engine.limit_kv(id, KvBudget { buffer: 128, ..KvBudget::new(640, PROMPT, 16) }).unwrap();
    let params = GenerateParams { max_new_tokens: NEW, min_new_tokens: NEW, ..GenerateParams::default() };
    engine.start(id, params).unwrap();
    let (mut computed, mut held_sum, mut full_sum, mut peak) = (0, 0, 0, 0);
    WATCHING.store(true, Ordering::Relaxed);
    while engine.has_work() {
        let num_tokens = engine.step().unwrap().num_tokens();
        while engine.next_event().is_some_and(|e| !matches!(e.kind, EventKind::Ended(_))) {}
        computed += num_tokens;
        // A root's phase is 1: it is cut where 1 + 128 k tokens are computed, first at 769, where 753 are not pinned.
        let held = match computed {
            ..=769 => computed - PROMPT,
            _ => 640 + 1 + (computed - 770) % 128,
        };
        assert!(held <= 640 + 128, "{held} slots at {computed} tokens");
        let stats = engine.engine_stats();
        assert_eq!(engine.stats(id).unwrap().num_slots, PROMPT + held, "at {computed} tokens");
        assert_eq!(stats.blocks_used, (PROMPT + held).div_ceil(16), "at {computed} tokens");
        assert_eq!(stats.kv_cuts as usize, (computed + 126).saturating_sub(768) / 128, "at {computed} tokens");
        peak = peak.max(PROMPT + held);
        if computed > PROMPT {
            held_sum += PROMPT + held;
            full_sum += computed;
        }
    }
    WATCHING.store(false, Ordering::Relaxed);
    assert_eq!((computed, peak), (PROMPT + NEW - 1, PROMPT + 640 + 128));
    assert_eq!(engine.engine_stats().blocks_peak, 49);
    let saved = |held: usize, full: usize| 1.0 - held as f64 / full as f64;
    assert!(saved(peak, computed) > 0.90, "{}", saved(peak, computed));
    assert!((0.82..0.84).contains(&saved(held_sum, full_sum)), "{}", saved(held_sum, full_sum));
    // Nothing of the size n x n: 760 slots squared in f32 are 2.3 MB. Other tests of this file only wait for processes.
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest > 0 && largest < 760 * 760 * 4 / 4, "an allocation of {largest} bytes");
}

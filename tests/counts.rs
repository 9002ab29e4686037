//! Work as numbers: launches, read-backs, weight and KV bytes, blocks, allocations. Exact, from the shapes alone, so that
//! a change that makes a step do more cannot hide behind a fast machine.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rksc::backend::Counters;
use rksc::engine::{BranchId, GenerateParams, PrefillOptions};
use rksc::{Engine, EngineConfig, ModelSource};

/// Counts allocations while `COUNTING` is up.
struct CountingAllocator;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);
/// Tests of this file run one at a time: the counters are the process's.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

fn count(bytes: usize) {
    if COUNTING.load(Ordering::Relaxed) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        ALLOCATED_BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const LAYERS: u64 = 8;
const BF16: u64 = 2;
/// K and V of one token in one layer: 2 kv heads of 32.
const KV_TOKEN_BYTES: u64 = 2 * 2 * 32 * BF16;
/// One layer's matrices: qkv (128 + 64 + 64 rows), o, gate and up, down.
const LAYER_BYTES: u64 = (256 * 192 + 192 * 128 + 2 * 448 * 192 + 192 * 448) * BF16;
const UNEMBED_BYTES: u64 = 768 * 192 * BF16;
/// norm, qkv, rope, attention, o, norm, gate_up, glu, down.
const LAYER_LAUNCHES: u64 = 9;
/// embed; last addition, row gather, final norm, logits, row statistics.
const PASS_LAUNCHES: u64 = 1 + 5;

fn engine() -> Engine {
    let config =
        EngineConfig { model: ModelSource::Bundled, threads: 1, kv_cache_memory: Some(16 << 20), ..Default::default() };
    Engine::open(config).unwrap()
}

/// A root of `root` tokens and eight forks with four tokens each, all generating.
fn branches(e: &mut Engine, root: usize) -> Vec<BranchId> {
    let prompt: Vec<u32> = (0..root as u32).map(|i| 300 + i * 7 % 400).collect();
    let root = e.prefill(&prompt, PrefillOptions::default()).unwrap();
    let mut ids = vec![BranchId::default(); 8];
    e.fork(root, &mut ids).unwrap();
    for (i, &id) in ids.iter().enumerate() {
        e.append(id, &[400 + i as u32, 410, 420, 430]).unwrap();
        e.start(id, GenerateParams::default()).unwrap();
    }
    ids
}

#[test]
fn a_packed_prefill_computes_each_token_once_and_copies_only_tails() {
    let _alone = ALONE.lock();
    let mut e = engine();
    branches(&mut e, 130);
    e.reset_counters();
    let summary = e.step().unwrap();
    assert_eq!(summary.num_tokens(), 130 + 8 * 4);
    let copied = 8 * 2; // 130 = 8 blocks and 2 slots: every fork copies two
    let expected = Counters {
        launches: LAYERS * (LAYER_LAUNCHES + 1) + PASS_LAUNCHES,
        weight_bytes: LAYERS * LAYER_BYTES + UNEMBED_BYTES,
        kv_read_bytes: LAYERS * KV_TOKEN_BYTES * summary.slots_read as u64,
        kv_write_bytes: LAYERS * KV_TOKEN_BYTES * (130 + 8 * 4 + copied),
        read_backs: 1,
        graph_replays: 0,
    };
    assert_eq!(e.counters(), expected);
    // 8 full blocks and a tail of the root's; a tail of each fork's.
    assert_eq!(e.engine_stats().blocks_used, 9 + 8);
    assert_eq!(e.num_shared_blocks(), 8);
}

#[test]
fn a_decode_step_reads_weights_once_and_the_shared_run_once() {
    let _alone = ALONE.lock();
    let mut e = engine();
    branches(&mut e, 130);
    e.step().unwrap();
    e.reset_counters();
    let summary = e.step().unwrap();
    assert_eq!(summary.num_tokens(), 8);
    // Tiles 0 and 1 are shared: 128 slots once. Tile 2 holds 2 + 4 + 1 slots of each branch.
    assert_eq!(summary.slots_read, 128 + 8 * 7);
    let expected = Counters {
        launches: LAYERS * LAYER_LAUNCHES + PASS_LAUNCHES,
        weight_bytes: LAYERS * LAYER_BYTES + UNEMBED_BYTES,
        kv_read_bytes: LAYERS * KV_TOKEN_BYTES * (128 + 8 * 7),
        kv_write_bytes: LAYERS * KV_TOKEN_BYTES * 8,
        read_backs: 1,
        graph_replays: 0,
    };
    assert_eq!(e.counters(), expected);
}

#[test]
fn pruning_returns_every_private_block_at_once() {
    let _alone = ALONE.lock();
    let mut e = engine();
    let ids = branches(&mut e, 130);
    e.step().unwrap();
    for (i, &id) in ids.iter().enumerate() {
        e.prune(id).unwrap();
        assert_eq!(e.engine_stats().blocks_used, 9 + 7 - i);
    }
}

#[test]
fn a_steady_decode_step_allocates_little_and_always_the_same() {
    let _alone = ALONE.lock();
    let mut e = engine();
    branches(&mut e, 130);
    for _ in 0..4 {
        e.step().unwrap();
    }
    while e.next_event().is_some() {}
    let mut counts = Vec::new();
    for _ in 0..4 {
        ALLOCATIONS.store(0, Ordering::Relaxed);
        ALLOCATED_BYTES.store(0, Ordering::Relaxed);
        COUNTING.store(true, Ordering::Relaxed);
        let summary = e.step();
        COUNTING.store(false, Ordering::Relaxed);
        assert_eq!(summary.unwrap().num_tokens(), 8);
        while e.next_event().is_some() {}
        counts.push((ALLOCATIONS.load(Ordering::Relaxed), ALLOCATED_BYTES.load(Ordering::Relaxed)));
    }
    println!("allocations and bytes of four steady steps: {counts:?}");
    assert!(counts.iter().all(|c| c.0 == counts[0].0), "{counts:?}");
    assert_eq!(counts[0].0, STEADY_ALLOCATIONS);
}

/// Small vectors (10.6 KB in all) of the plan, the queries, the answers and the debug build's integrity check.
const STEADY_ALLOCATIONS: u64 = 45;

//! The emulation itself: planted faults are reported with the right words, clean patterns pass, in every warp order.
//!
//! The patterns are cuda/host/faults.cu.

use std::ffi::CStr;

use rksc::backend::cuda::bindings::*;

/// Forward, backward, and a few shuffles.
const ORDERS: [(i32, u64); 6] = [(0, 0), (1, 0), (2, 1), (2, 2), (2, 3), (2, 4)];

const FAULT: i32 = 999;

/// A launcher of patterns: 0 is clean, n has the n-th fault.
type Pattern = unsafe extern "C" fn(i32) -> i32;

#[allow(unsafe_code)]
fn run(pattern: Pattern, n: i32, (order, seed): (i32, u64)) -> (i32, String) {
    // SAFETY: only sets this thread's order.
    assert_eq!(unsafe { rksc_emu_set_order(order, seed) }, 0);
    // SAFETY: a pattern brings its own memory and runs on this thread.
    let code = unsafe { pattern(n) };
    // SAFETY: a string of this thread that lives until its next launch.
    let fault = unsafe { CStr::from_ptr(rksc_emu_last_fault()) };
    (code, fault.to_string_lossy().into_owned())
}

/// `faults[n - 1]` lists what the report of fault n may say: which side of a race is caught depends on the order.
#[track_caller]
fn check(name: &str, pattern: Pattern, faults: &[&[&str]]) {
    for order in ORDERS {
        let (code, fault) = run(pattern, 0, order);
        assert_eq!((code, fault.as_str()), (0, ""), "{name}, clean, order {order:?}");
        for (n, words) in (1..).zip(faults) {
            let (code, fault) = run(pattern, n, order);
            assert_eq!(code, FAULT, "{name} fault {n}, order {order:?}: not reported");
            assert!(
                words.iter().any(|words| fault.contains(words)),
                "{name} fault {n}, order {order:?}: reported as {fault:?}, which has none of {words:?}"
            );
            assert!(fault.starts_with(&format!("{name}_kernel<n>: CTA (")), "{fault:?} does not name the kernel");
        }
    }
    assert_eq!(run(pattern, faults.len() as i32 + 1, ORDERS[0]).0, -1, "{name}: a fault that no test expects");
}

#[test]
fn accesses_outside_a_range_are_reported() {
    check(
        "rows",
        rksc_emu_fault_rows,
        &[
            &["reads 16 bytes at offset -16 of a range of 10240 bytes"],
            &["writes 16 bytes at offset 10240 of a range of 10240 bytes"],
            &["writes a vector of 16 bytes", "misaligned"],
            &["of the read-only range"],
        ],
    );
}

#[test]
fn races_of_warps_in_shared_memory_are_reported() {
    check(
        "row_sum",
        rksc_emu_fault_row_sum,
        &[
            // The reader may come first and find nothing.
            &["write-read race", "read-write race", "unwritten shared memory"],
            &["read-write race", "write-read race"],
            &["write-write race: writes byte 0 of scratch"],
            &["reads unwritten shared memory: 4 bytes at byte 12 of scratch"],
            &["writes 4 bytes at byte 16 of scratch, which has 16: out of bounds"],
        ],
    );
}

#[test]
fn lanes_that_exchange_without_syncwarp_are_reported() {
    check(
        "reverse",
        rksc_emu_fault_reverse,
        &[
            &["unwritten shared memory", "race within the warp"],
            &["race within the warp"],
            &["dynamic shared memory, which has 512: out of bounds"],
        ],
    );
}

#[test]
fn divergent_barriers_and_collectives_are_reported() {
    check(
        "rounds",
        rksc_emu_fault_rounds,
        &[
            &["divergent __syncthreads: 100 threads wait at it, 28 threads of the CTA have exited"],
            &["divergent __syncthreads: 96 threads wait at it"],
            &["divergent __shfl_sync: lanes 0-15 of warp"],
            &["divergent __shfl_sync"],
            &["divergent __ballot_sync", "divergent __shfl_sync"],
            &["__shfl_sync reads lane"],
        ],
    );
}

#[test]
fn asynchronous_copies_are_reported_when_touched_too_early() {
    check(
        "pipeline",
        rksc_emu_fault_pipeline,
        &[
            &["is under way: before its wait"],
            &["write-read race", "is under way: before its wait", "unwritten shared memory"],
            &["overwrites byte", "is under way: before its wait"],
            &["read-write race", "is under way: before its wait"],
        ],
    );
}

#[test]
fn dropped_fences_of_a_last_arriver_are_reported() {
    check(
        "split_sum",
        rksc_emu_fault_split_sum,
        &[
            &["the writer executed no __threadfence between the write and an atomic"],
            &["this thread executed no __threadfence behind an atomic of its CTA"],
            &["the writer's CTA executed no atomic behind its __threadfence"],
            &["this thread executed no __threadfence behind an atomic of its CTA"],
            &["write-write race between CTAs in global memory"],
        ],
    );
}

#[test]
fn matrix_loads_are_checked_as_reads() {
    check(
        "product",
        rksc_emu_fault_product,
        &[
            &["write-read race", "unwritten shared memory"],
            &["reads a vector of 16 bytes at byte", "misaligned"],
            &["reads unwritten shared memory: 16 bytes at byte 32 of b", "out of bounds"],
        ],
    );
}

/// The state of a launch is the calling thread's.
#[test]
fn threads_run_kernels_side_by_side() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                for i in 0..20 {
                    assert_eq!(run(rksc_emu_fault_split_sum, 0, (2, seed * 100 + i)), (0, String::new()));
                    assert_eq!(run(rksc_emu_fault_split_sum, 1, (2, seed * 100 + i)).0, FAULT);
                }
            });
        }
    });
}

#[allow(unsafe_code)]
#[test]
fn ranges_are_registered_once() {
    let memory = [0u8; 64];
    let at = |offset: usize| memory[offset..].as_ptr().cast();
    // SAFETY: only notes and forgets ranges, which no launch uses.
    unsafe {
        assert_eq!(rksc_emu_register(at(16), 32, 0), 0);
        for (offset, bytes) in [(16, 32), (0, 17), (47, 1), (20, 4), (0, 64)] {
            assert_eq!(rksc_emu_register(at(offset), bytes, 0), 1, "[{offset}, {offset} + {bytes})");
        }
        assert_eq!(rksc_emu_register(at(0), 0, 0), 1);
        assert_eq!(rksc_emu_register(std::ptr::null(), 4, 0), 1);
        assert_eq!((rksc_emu_register(at(0), 16, 0), rksc_emu_register(at(48), 16, 1)), (0, 0));
        assert_eq!(rksc_emu_unregister(at(17)), 1);
        for offset in [0, 16, 48] {
            assert_eq!(rksc_emu_unregister(at(offset)), 0);
        }
        assert_eq!(rksc_emu_version(), 1);
        assert_eq!(rksc_emu_set_order(3, 0), 1);
    }
}

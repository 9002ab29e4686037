//! `attention_mass` on the worlds of `paged_attention`, with the lse that `paged_attention` found.

use half::{bf16, f16};
use rksc::backend::MassSequence;
use rksc::backend::cpu::attention::AttentionScratch;
use rksc::backend::cpu::attention::mass::{AttentionMassArgs, attention_mass};
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::testing::attention as reference;
use rksc::{Error, Result};

use crate::attention::{Shape, World, everywhere, shape, shapes};
use crate::attention_window::WINDOWS;

/// Tables and rows of a world's sequences, as the op wants them.
pub(crate) fn sequences<T: Elem>(world: &World<T>) -> (Vec<u32>, Vec<MassSequence>) {
    let mut blocks = Vec::new();
    let mut sequences = Vec::new();
    for (i, seq) in world.seqs.iter().enumerate() {
        sequences.push(MassSequence { rows: world.rows(i), block_start: blocks.len(), kv_len: seq.kv_len });
        blocks.extend(&seq.blocks);
    }
    (blocks, sequences)
}

fn run<T: Elem>(
    level: SimdLevel,
    threads: usize,
    world: &World<T>,
    lse: &[f32],
    blocks: &[u32],
    sequences: &[MassSequence],
) -> Result<Vec<f32>> {
    let mut mass = vec![f32::NAN; 3];
    let args = AttentionMassArgs {
        q: &world.q,
        k_cache: &world.k,
        lse,
        blocks,
        sequences,
        num_q_heads: world.num_q_heads,
        sm_scale: world.scale(),
        window: world.window,
        softcap: world.softcap,
        layout: &world.layout,
        mass: &mut mass,
    };
    attention_mass(level, &mut ThreadPool::new(threads), &mut AttentionScratch::default(), args)?;
    Ok(mass)
}

fn all_shapes() -> Vec<Shape> {
    let mut all = shapes();
    all.extend([
        shape((1, 1), 64, 16, &[], &[]),
        shape((2, 2), 40, 16, &[], &[(66, 2)]),
        shape((1, 1), 32, 16, &[], &[(4097, 1)]),
        // More queries than are laid out at a time.
        shape((14, 2), 32, 32, &[], &[(90, 90), (65, 2)]),
    ]);
    all
}

fn oracle_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in all_shapes().iter().enumerate() {
        let world = World::<T>::new(shape, i as u64);
        check(level, &world, &format!("attention_mass {level} {:?} {shape:?}", T::DTYPE));
    }
}

fn check<T: Elem>(level: SimdLevel, world: &World<T>, what: &str) {
    let (_, lse) = world.run(level, 1);
    let (blocks, sequences) = sequences(world);
    let mass = run(level, 1, world, &lse, &blocks, &sequences).unwrap();
    let (hkv, dim) = (world.layout.num_kv_heads, world.layout.head_dim);
    let group = world.num_q_heads / hkv;
    let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|x| f64::from(x.widen())).collect() };
    let mut masses = mass.as_slice();
    for (seq, s) in world.seqs.iter().zip(&sequences) {
        for head in 0..hkv {
            let at = |slot| World::<T>::elem(&world.layout, seq, head, slot);
            let k: Vec<Vec<f64>> = (0..s.kv_len).map(|slot| wide(&world.k[at(slot)..at(slot) + dim])).collect();
            let k: Vec<&[f64]> = k.iter().map(Vec::as_slice).collect();
            let mut queries = Vec::new();
            for (nth, row) in s.rows.clone().enumerate() {
                for h in head * group..(head + 1) * group {
                    let at = row * world.num_q_heads + h;
                    let num_slots = s.kv_len + 1 + nth - s.rows.len();
                    queries.push((wide(&world.q[at * dim..(at + 1) * dim]), f64::from(lse[at]), num_slots));
                }
            }
            let queries: Vec<_> = queries.iter().map(|(q, lse, n)| (q.as_slice(), *lse, *n)).collect();
            let want = reference::attention_mass(&queries, &k, &world.scoring());
            let (got, rest) = masses.split_at(s.kv_len);
            masses = rest;
            // The result is f32 whatever the compute type; the error is that of the exponents.
            let tol = 4e-6 * (queries.len() as f64).max(1.0);
            for (slot, (&g, w)) in got.iter().zip(want).enumerate() {
                assert!((f64::from(g) - w).abs() <= tol, "{what}: head {head} slot {slot}: got {g}, want {w}");
            }
            // What the queries gave is what the slots received.
            let total: f64 = got.iter().map(|&m| f64::from(m)).sum();
            let given = queries.len() as f64;
            assert!((total - given).abs() <= 1e-5 * given, "{what}: {total} of {given}");
        }
    }
    assert!(masses.is_empty(), "{what}");
}

/// Through windows of every awkward length, capped and not.
fn window_case<T: Elem>(level: SimdLevel) {
    let shapes = [
        shape((4, 2), 32, 16, &[], &[(200, 1)]),
        shape((6, 2), 64, 16, &[], &[(200, 73), (5, 5)]),
        shape((4, 2), 64, 32, &[2], &[(150, 1), (130, 1), (100, 1)]),
    ];
    for (i, window) in WINDOWS.into_iter().enumerate() {
        for (j, shape) in shapes.iter().enumerate() {
            let world = World::<T>::new(shape, i as u64);
            let softcap = [None, Some(5.0), Some(50.0), Some(1.0)][(i + j) % 4];
            let world = World { window: Some(window), softcap, ..world };
            let what = format!("attention_mass {level} {:?} {shape:?} window {window} cap {softcap:?}", T::DTYPE);
            check(level, &world, &what);
        }
    }
}

#[test]
fn attention_mass_through_a_window_matches_oracle() {
    everywhere!(window_case);
}

#[test]
fn attention_mass_matches_oracle() {
    everywhere!(oracle_case);
}

fn law_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in all_shapes().iter().enumerate() {
        let world = World::<T>::new(shape, 300 + i as u64);
        let (_, lse) = world.run(level, 1);
        let (blocks, sequences) = sequences(&world);
        let all = run(level, 1, &world, &lse, &blocks, &sequences).unwrap();
        for threads in [2, 3] {
            assert_eq!(run(level, threads, &world, &lse, &blocks, &sequences).unwrap(), all, "{level} {shape:?}");
        }
        let mut start = 0;
        for s in &sequences {
            let of_one = s.kv_len * world.layout.num_kv_heads;
            let alone = run(level, 1, &world, &lse, &blocks, std::slice::from_ref(s)).unwrap();
            assert_eq!(alone, all[start..start + of_one], "{level} {shape:?}");
            start += of_one;
        }
    }
}

#[test]
fn a_sequences_bits_depend_on_its_own_rows_alone() {
    everywhere!(law_case);
}

/// A later row's slot is NaN: earlier rows do not read it, and every other slot's mass is finite where rows that read it
/// are not asked about.
#[test]
fn slots_past_a_rows_own_are_not_read() {
    for level in SimdLevel::available() {
        for kv_len in [20, 64, 100, 130] {
            let mut world = World::<bf16>::new(&shape((4, 2), 32, 16, &[], &[(kv_len, 3)]), kv_len as u64);
            let (_, lse) = world.run(level, 1);
            let (blocks, mut sequences) = sequences(&world);
            // The first two of three rows, whose last attends to a slot fewer.
            sequences[0].rows.end -= 1;
            sequences[0].kv_len -= 1;
            let clean = run(level, 1, &world, &lse, &blocks, &sequences).unwrap();
            for head in 0..2 {
                let at = World::<bf16>::elem(&world.layout, &world.seqs[0], head, kv_len - 1);
                world.k[at..at + 32].fill(bf16::NAN);
            }
            assert_eq!(run(level, 1, &world, &lse, &blocks, &sequences).unwrap(), clean);
            assert!(clean.iter().all(|m| m.is_finite()));
        }
    }
}

/// Slots that every row has left behind are NaN: they have no mass, and nobody else's changes.
#[test]
fn slots_below_every_window_are_not_read() {
    for level in SimdLevel::available() {
        for window in [1, 20, 63, 64, 65] {
            let world = World::<bf16>::new(&shape((4, 2), 32, 16, &[], &[(170, 3)]), window as u64);
            let mut world = World { window: Some(window), ..world };
            let (_, lse) = world.run(level, 1);
            let (blocks, sequences) = sequences(&world);
            let clean = run(level, 1, &world, &lse, &blocks, &sequences).unwrap();
            for slot in 0..168 - window {
                for head in 0..2 {
                    let at = World::<bf16>::elem(&world.layout, &world.seqs[0], head, slot);
                    world.k[at..at + 32].fill(bf16::NAN);
                }
                assert!(clean[slot] == 0.0 && clean[170 + slot] == 0.0, "window {window}: slot {slot}");
            }
            assert_eq!(run(level, 1, &world, &lse, &blocks, &sequences).unwrap(), clean, "window {window}");
        }
    }
}

#[test]
fn sequences_that_do_not_fit_are_refused() {
    let world = World::<f32>::new(&shape((2, 1), 32, 16, &[], &[(40, 2), (50, 1)]), 5);
    let (_, lse) = world.run(SimdLevel::Portable, 1);
    let (blocks, good) = sequences(&world);
    let refuse = |change: &dyn Fn(&mut MassSequence), blocks: &[u32]| {
        let mut sequences = good.clone();
        change(&mut sequences[1]);
        let refused = run(SimdLevel::Portable, 1, &world, &lse, blocks, &sequences);
        assert!(matches!(refused, Err(Error::Shape { op: "attention_mass", .. })), "{refused:?}");
    };
    refuse(&|s| s.rows = 3..4, &blocks);
    refuse(&|s| s.rows = 2..2, &blocks);
    refuse(&|s| s.kv_len = 0, &blocks);
    refuse(&|s| s.block_start += 1, &blocks);
    refuse(&|_| (), &[10_000; 7]);
}

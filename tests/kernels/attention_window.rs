//! `paged_attention` through sliding windows and under soft caps, on the CPU; and through the trait on both backends.

use half::{bf16, f16};
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::{AttentionMass, Backend, MassSequence, PagedAttention, PassInputs};
use rksc::batch::AttentionPlan;
use rksc::{DType, Error, Result};

use crate::attention::{Shape, World, assert_law, bits, everywhere, shape};

/// About the ends of blocks of 16 and 32, of tiles, and beyond most rows.
pub(crate) const WINDOWS: [usize; 14] = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 1000];

const SOFTCAPS: [Option<f32>; 4] = [None, Some(50.0), Some(5.0), Some(1.0)];

fn window_shapes() -> Vec<Shape> {
    vec![
        shape((4, 2), 32, 16, &[], &[(1, 1), (64, 1), (65, 1), (200, 1)]),
        shape((2, 1), 96, 16, &[], &[(1025, 1)]),
        shape((1, 1), 6, 16, &[], &[(70, 3)]),
        // Prefill, and a chunk onto what is there.
        shape((4, 2), 32, 16, &[], &[(127, 127)]),
        shape((7, 1), 64, 32, &[], &[(200, 73)]),
        // Branches of a common prefix: windows begin inside it, before it and behind it.
        shape((4, 2), 32, 16, &[16], &[(300, 1), (270, 1), (257, 1), (320, 1)]),
        shape((8, 2), 64, 32, &[4, 2], &[(200, 1), (210, 1), (250, 1), (195, 1)]),
        // Prefill chunks and decodes over shared blocks.
        shape((4, 2), 32, 16, &[8], &[(140, 10), (129, 1), (200, 70), (150, 1)]),
    ]
}

/// Every window on every shape, each with another cap.
fn windowed<T: Elem>(mut case: impl FnMut(&World<T>, &str)) {
    for (i, shape) in window_shapes().iter().enumerate() {
        for (j, window) in WINDOWS.into_iter().enumerate() {
            let softcap = SOFTCAPS[(i + j) % 4];
            let world = World { window: Some(window), softcap, ..World::<T>::new(shape, (i * 20 + j) as u64) };
            case(&world, &format!("{:?} {shape:?} window {window} cap {softcap:?}", T::DTYPE));
        }
    }
}

fn oracle_case<T: Elem>(level: SimdLevel) {
    windowed::<T>(|world, what| world.check(level, &format!("paged_attention {level} {what}")));
    for (i, shape) in window_shapes().iter().enumerate() {
        for softcap in SOFTCAPS {
            let world = World { softcap, ..World::<T>::new(shape, 500 + i as u64) };
            world.check(level, &format!("paged_attention {level} {:?} {shape:?} cap {softcap:?}", T::DTYPE));
        }
    }
}

#[test]
fn windows_and_caps_match_oracle() {
    everywhere!(oracle_case);
}

fn law_case<T: Elem>(level: SimdLevel) {
    windowed::<T>(|world, what| assert_law(level, world, &format!("{level} {what}")));
}

#[test]
fn a_rows_bits_depend_on_its_own_tokens_and_window_alone() {
    everywhere!(law_case);
}

fn wide_case<T: Elem>(level: SimdLevel) {
    for (i, shape) in window_shapes().iter().enumerate() {
        let world = World::<T>::new(shape, 600 + i as u64);
        let (o, lse) = world.run(level, 1);
        let longest = world.seqs.iter().map(|s| s.kv_len).max().unwrap();
        for window in [longest, usize::MAX] {
            let (o2, lse2) = World { window: Some(window), ..world.again() }.run(level, 1);
            assert!(bits(&o2) == bits(&o) && bits(&lse2) == bits(&lse), "{level} {:?} {shape:?} {window}", T::DTYPE);
        }
    }
}

#[test]
fn a_window_over_everything_changes_no_bit() {
    everywhere!(wide_case);
}

/// NaN in some slots: rows that attend to one of them show it, the others keep every bit.
fn garbage_case<T: Elem>(level: SimdLevel) {
    for window in [1, 2, 15, 16, 17, 40, 64, 65] {
        for slots in [vec![0], vec![66], vec![67], vec![63, 64], vec![30, 99], vec![31, 98], (0..70).collect()] {
            let rows = 50;
            let world = World::<T>::new(&shape((4, 2), 32, 16, &[], &[(120, rows)]), window as u64);
            let mut world = World { window: Some(window), ..world };
            let (o, lse) = world.run(level, 1);
            for (slot, head) in slots.iter().flat_map(|&slot| [(slot, 0), (slot, 1)]) {
                let at = World::<T>::elem(&world.layout, &world.seqs[0], head, slot);
                world.k[at..at + 32].fill(T::narrow(f32::NAN));
                world.v[at..at + 16].fill(T::narrow(f32::INFINITY));
                world.v[at + 16..at + 32].fill(T::narrow(f32::NAN));
            }
            let (o2, lse2) = world.run(level, 1);
            let what = format!("{level} {:?} window {window}, NaN in {slots:?}", T::DTYPE);
            for row in 0..rows {
                let end = 120 - rows + row + 1;
                let of_row = row * 128..(row + 1) * 128;
                if slots.iter().any(|&slot| (end.saturating_sub(window)..end).contains(&slot)) {
                    assert!(o2[of_row].iter().all(|x| x.widen().is_nan()), "{what}: row {row} reads it");
                } else {
                    assert!(bits(&o2[of_row.clone()]) == bits(&o[of_row]), "{what}: row {row} does not");
                    assert_eq!(lse2[row * 4..][..4], lse[row * 4..][..4], "{what}: row {row} does not");
                }
            }
        }
    }
}

#[test]
fn garbage_below_a_rows_window_changes_nothing() {
    everywhere!(garbage_case);
}

// ---- through the trait ---------------------------------------------------------------------------------------------

/// Outputs, mass, and the bytes of K and V that each op counts.
fn through<B: Backend, T: Elem>(b: &mut B, world: &World<T>) -> Result<[(Vec<f32>, u64); 2]> {
    let buffer = |b: &mut B, values: &[T]| -> Result<B::Buf> {
        let mut buf = b.alloc(T::DTYPE, values.len())?;
        b.write_bytes(&mut buf, 0, values.len(), bytemuck::cast_slice(values))?;
        Ok(buf)
    };
    let (q, k_cache, v_cache) = (buffer(b, &world.q)?, buffer(b, &world.k)?, buffer(b, &world.v)?);
    let (num_q_heads, layout) = (world.num_q_heads, &world.layout);
    let num_rows = world.q.len() / (num_q_heads * layout.head_dim);
    let group = num_q_heads / layout.num_kv_heads;
    let plan = AttentionPlan::new(&world.views(), layout.block_size, b.max_group_rows(group));
    let rows = vec![0; num_rows];
    let inputs =
        PassInputs { token_ids: rows.clone(), positions: rows.clone(), slots: rows, plan, ..PassInputs::default() };
    let inputs = b.stage(inputs)?;
    let (mut o, mut lse) = (b.alloc(T::DTYPE, world.q.len())?, b.alloc(DType::F32, num_rows * num_q_heads)?);
    b.reset_counters();
    b.paged_attention(PagedAttention {
        inputs: &inputs,
        q: &q,
        k_cache: &k_cache,
        v_cache: &v_cache,
        o: &mut o,
        lse: &mut lse,
        num_q_heads,
        sm_scale: world.scale(),
        window: world.window,
        softcap: world.softcap,
        layout,
    })?;
    let attention_bytes = b.counters().kv_read_bytes;
    let mut out = vec![0.0; world.q.len()];
    b.read_f32(&o, 0, &mut out)?;
    let (mut blocks, mut sequences, mut mass) = (Vec::new(), Vec::new(), Vec::new());
    for (i, seq) in world.seqs.iter().enumerate() {
        sequences.push(MassSequence { rows: world.rows(i), block_start: blocks.len(), kv_len: seq.kv_len });
        blocks.extend(&seq.blocks);
    }
    b.reset_counters();
    b.attention_mass(AttentionMass {
        q: &q,
        k_cache: &k_cache,
        lse: &lse,
        blocks: &blocks,
        sequences: &sequences,
        num_q_heads,
        sm_scale: world.scale(),
        window: world.window,
        softcap: world.softcap,
        layout,
        mass: &mut mass,
    })?;
    Ok([(out, attention_bytes), (mass, b.counters().kv_read_bytes)])
}

fn backends(device: Device) -> (Cpu, Cuda) {
    let heads = Heads { num_q_heads: 4, num_kv_heads: 2, block_size: 16 };
    (Cpu::new(2, SimdLevel::detect()).unwrap(), Cuda::new(device, heads))
}

/// Both backends count the tiles that some row attends to, and those alone.
#[test]
fn tiles_below_every_window_are_not_counted_as_read() {
    // 256 shared slots, then 44 of one branch and 14 of the other.
    let fork = shape((4, 2), 32, 16, &[16], &[(300, 1), (270, 1)]);
    let chunk = shape((4, 2), 32, 16, &[], &[(300, 20)]);
    for device in [Device::emulated(), Device::gpu(0)].into_iter().flatten() {
        let (mut cpu, mut cuda) = backends(device);
        // Slots that attention reads, and that the mass does.
        for (shape, window, of_attention, of_mass) in [
            (&fork, None, 256 + 44 + 14, 300 + 270),
            (&fork, Some(1), 44 + 14, 44 + 14),
            (&fork, Some(14), 44 + 14, 44 + 14),
            // The shorter branch begins in the last shared tile, and then in the one before.
            (&fork, Some(15), 64 + 44 + 14, 44 + 78),
            (&fork, Some(79), 128 + 44 + 14, 108 + 142),
            (&fork, Some(299), 256 + 44 + 14, 300 + 270),
            // Rows see 281 to 300 slots.
            (&chunk, None, 300, 300),
            (&chunk, Some(1), 44, 44),
            (&chunk, Some(25), 44, 44),
            (&chunk, Some(26), 108, 108),
            (&chunk, Some(100), 172, 172),
        ] {
            let world = World { window, ..World::<f32>::new(shape, 3) };
            let of_slot = (2 * 32 * 4) as u64;
            for [attention, mass] in [through(&mut cpu, &world).unwrap(), through(&mut cuda, &world).unwrap()] {
                assert_eq!(attention.1, 2 * of_slot * of_attention, "window {window:?}");
                assert_eq!(mass.1, of_slot * of_mass, "window {window:?}");
            }
        }
    }
}

#[test]
fn windows_and_caps_reach_both_backends() {
    for device in [Device::emulated(), Device::gpu(0)].into_iter().flatten() {
        let (mut cpu, mut cuda) = backends(device);
        let shape = shape((4, 2), 64, 16, &[4], &[(150, 1), (130, 20), (70, 1)]);
        let plain = World::<f32>::new(&shape, 8);
        let without = through(&mut cpu, &plain).unwrap();
        for (window, softcap) in [(Some(17), None), (None, Some(2.0)), (Some(65), Some(5.0))] {
            let world = World { window, softcap, ..plain.again() };
            let what = format!("window {window:?} cap {softcap:?}");
            let (on_cpu, on_cuda) = (through(&mut cpu, &world).unwrap(), through(&mut cuda, &world).unwrap());
            for ((want, got), without) in on_cpu.iter().zip(&on_cuda).zip(&without) {
                assert!(want.0.iter().zip(&got.0).all(|(w, g)| (w - g).abs() < 2e-5 * (1.0 + w.abs())), "{what}");
                assert!(want.0.iter().zip(&without.0).any(|(w, o)| (w - o).abs() > 1e-2), "{what} must show");
            }
        }
    }
}

#[test]
fn no_window_and_no_cap_at_all_are_refused() {
    let (mut cpu, mut cuda) = backends(Device::emulated().unwrap());
    let world = World::<f32>::new(&shape((4, 2), 32, 16, &[], &[(40, 2)]), 5);
    for (window, softcap) in [(Some(0), None), (None, Some(0.0)), (None, Some(-1.0)), (None, Some(f32::NAN))] {
        let world = World { window, softcap, ..world.again() };
        for refused in [through(&mut cpu, &world), through(&mut cuda, &world)] {
            assert!(matches!(refused, Err(Error::Shape { op: "paged_attention", .. })), "{window:?} {softcap:?}");
        }
    }
}

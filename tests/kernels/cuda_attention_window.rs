//! `paged_attention` and `attention_mass` as kernels, through sliding windows and under soft caps.

use rksc::DType;
use rksc::backend::cuda::attention_items::AttentionItems;
use rksc::backend::cuda::device::Device;

use crate::attention_window::WINDOWS;
use crate::cuda_attention::{Shape, World, assert_mass, joined, run, shape, split_to_tiles};
use crate::device::{DTYPES, for_each_device};

const SOFTCAPS: [Option<f32>; 4] = [None, Some(50.0), Some(5.0), Some(1.0)];

fn window_shapes() -> Vec<Shape> {
    vec![
        shape((4, 2), 32, 16, &[], &[(1, 1), (64, 1), (65, 1), (200, 1)]),
        shape((16, 1), 128, 32, &[], &[(330, 1)]),
        shape((2, 1), 256, 16, &[], &[(150, 40)]),
        shape((7, 1), 64, 16, &[], &[(200, 73)]),
        // Branches of a common prefix: windows begin inside it, before it and behind it.
        shape((4, 2), 32, 16, &[16], &[(300, 1), (270, 1), (257, 1), (320, 1)]),
        shape((8, 2), 80, 32, &[4, 2], &[(200, 1), (210, 1), (250, 3), (195, 1)]),
    ]
}

/// For a device that splits whatever it can, for one that shares whatever it can, and with a tile to an item, where most
/// items have nothing to add.
fn check_lists(world: &World, what: &str) {
    let (plan, want) = (world.plan(), world.expected());
    let [split, whole] = [132, 1].map(|sms| AttentionItems::new(&plan, &world.item_params(sms, usize::MAX)));
    let tiles = split_to_tiles(&whole, world.layout.block_size);
    let mut lists = vec![split, whole, tiles];
    lists.dedup_by(|a, b| a.items == b.items);
    for list in lists {
        let what = format!("paged_attention {what}, {} items", list.items.len());
        for_each_device(&what, |dev| {
            let (o, lse) = run(dev, world, &plan, &list)?;
            world.check(&what, &want, &o, &lse);
            Ok(joined((o, lse)))
        });
    }
}

#[test]
fn windows_and_caps_match_oracle() {
    for (i, shape) in window_shapes().iter().enumerate() {
        for (j, window) in WINDOWS.into_iter().enumerate() {
            let (dtype, softcap) = (DTYPES[(i + j) % 3], SOFTCAPS[(i + j) % 4]);
            let world = World { window: Some(window), softcap, ..World::new(shape, dtype, j as u64) };
            check_lists(&world, &format!("{dtype} {shape:?} window {window} cap {softcap:?}"));
        }
        for softcap in &SOFTCAPS[1..] {
            let dtype = DTYPES[i % 3];
            let world = World { softcap: *softcap, ..World::new(shape, dtype, 90) };
            check_lists(&world, &format!("{dtype} {shape:?} cap {softcap:?}"));
        }
    }
}

/// Block ids of tiles that no row attends to lie outside the cache: whoever reads such a tile is stopped.
#[test]
fn tiles_below_every_window_are_not_visited() {
    for dtype in DTYPES {
        let world = World::new(&shape((4, 2), 64, 16, &[], &[(700, 5)]), dtype, 7);
        let world = World { window: Some(100), ..world };
        let (plan, want) = (world.plan(), world.expected());
        // The first row sees 696 slots, so the tile at 576 is the first.
        let mut lists = [132, 1].map(|sms| AttentionItems::new(&plan, &world.item_params(sms, usize::MAX))).to_vec();
        lists.push(split_to_tiles(&lists[1], 16));
        for list in &mut lists {
            assert!(list.blocks.len() == 44 && list.blocks[35..37] == world.seqs[0].blocks[35..37]);
            list.blocks[..36].fill(1 << 20);
            let what = format!("tiles below a window, {dtype}, {} items", list.items.len());
            for_each_device(&what, |dev| {
                let (o, lse) = run(dev, &world, &plan, list)?;
                world.check(&what, &want, &o, &lse);
                Ok(joined((o, lse)))
            });
            let mut dev = Device::emulated().unwrap();
            let wider = World { window: Some(121), ..World::new(&shape((4, 2), 64, 16, &[], &[(700, 5)]), dtype, 7) };
            assert!(run(&mut dev, &wider, &plan, list).is_err(), "{what}: a visit must show");
        }
    }
}

/// NaN in some slots: rows that attend to one of them show it, the others keep every bit.
#[test]
fn garbage_below_a_rows_window_changes_nothing() {
    let case = |window: usize, slots: &[usize], dtype: DType| {
        let rows = 50;
        let new =
            || World { window: Some(window), ..World::new(&shape((4, 2), 32, 16, &[], &[(120, rows)]), dtype, 2) };
        let (world, mut garbage) = (new(), new());
        for (slot, head) in slots.iter().flat_map(|&slot| [(slot, 0), (slot, 1)]) {
            let at = garbage.layout.elem(garbage.seqs[0].blocks[slot / 16] as usize, head, slot % 16);
            garbage.k[at..at + 32].fill(f32::NAN);
            garbage.v[at..at + 16].fill(f32::INFINITY);
            garbage.v[at + 16..at + 32].fill(f32::NAN);
        }
        let plan = world.plan();
        let list = AttentionItems::new(&plan, &world.item_params(132, usize::MAX));
        let what = format!("{dtype} window {window}, NaN in {slots:?}");
        for_each_device(&what, |dev| {
            let (clean, got) = (run(dev, &world, &plan, &list)?, run(dev, &garbage, &plan, &list)?);
            for row in 0..rows {
                let (end, of_row) = (120 - rows + row + 1, row * 128..(row + 1) * 128);
                if slots.iter().any(|&slot| (end.saturating_sub(window)..end).contains(&slot)) {
                    assert!(got.0[of_row].iter().all(|x| x.is_nan()), "{what}: row {row} reads it");
                } else {
                    assert_eq!(got.0[of_row.clone()], clean.0[of_row], "{what}: row {row} does not");
                    assert_eq!(got.1[row * 4..][..4], clean.1[row * 4..][..4], "{what}: row {row} does not");
                }
            }
            Ok(joined(clean))
        });
    };
    let slots: [&[usize]; 5] = [&[0], &[66], &[63, 64], &[30, 99], &(0..70).collect::<Vec<_>>()];
    for (i, window) in [1, 2, 17, 40, 64, 65].into_iter().enumerate() {
        for (j, slots) in slots.into_iter().enumerate() {
            case(window, slots, DTYPES[(i + j) % 3]);
        }
    }
}

#[test]
fn attention_mass_through_a_window_matches_oracle() {
    for (i, shape) in window_shapes().iter().enumerate() {
        for (j, window) in WINDOWS.into_iter().enumerate() {
            let (dtype, softcap) = (DTYPES[(i + j) % 3], SOFTCAPS[(i + j + 1) % 4]);
            let world = World { window: Some(window), softcap, ..World::new(shape, dtype, j as u64) };
            assert_mass(&world, &format!("attention_mass {dtype} {shape:?} window {window} cap {softcap:?}"));
        }
    }
}

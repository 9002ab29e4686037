//! `row_stats` against its float64 oracle.

use rksc::Result;
use rksc::backend::cuda::bindings::{rksc_row_stats_params, rksc_statistics};
use rksc::backend::cuda::device::Device;
use rksc::testing::fill::Fill;
use rksc::testing::oracle;

use crate::device::{assert_refused, for_each_device};

fn run(dev: &mut Device, logits: &[f32], vocab: usize) -> Result<Vec<rksc_statistics>> {
    let rows = logits.len() / vocab;
    let x = dev.buffer(logits)?;
    let mut stats = dev.alloc::<rksc_statistics>(rows)?;
    let mut workspace = dev.zeroed::<u8>(dev.kernels().row_stats_workspace_bytes(rows, vocab))?;
    let params = rksc_row_stats_params {
        logits: x.ptr(),
        stats: stats.ptr_mut(),
        workspace: workspace.ptr_mut().cast(),
        num_rows: rows as u32,
        vocab: vocab as u32,
    };
    dev.launch(dev.kernels().row_stats, &params)?;
    assert!(dev.to_vec(&workspace)?.iter().all(|&b| b == 0), "the workspace is left zeroed");
    dev.to_vec(&stats)
}

fn bits(stats: &[rksc_statistics]) -> Vec<u32> {
    stats
        .iter()
        .flat_map(|s| {
            let f = [s.max, s.lse, s.entropy, s.top1, s.margin].map(f32::to_bits);
            [s.argmax, f[0], f[1], f[2], f[3], f[4], s.finite]
        })
        .collect()
}

const CASES: [(usize, f32); 26] = [
    (1, 1.0),
    (2, 1.0),
    (3, 1.0),
    (4, 3.0),
    (5, 2.0),
    (15, 4.0),
    (16, 1.0),
    (31, 3.0),
    (32, 3.0),
    (33, 3.0),
    (97, 8.0),
    (1000, 2.0),
    (4095, 2.0),
    (4096, 2.0),
    (4097, 5.0),
    (4100, 1.0),
    (8191, 0.0),
    (8192, 1.0),
    (8193, 30.0),
    (32_768, 2.0),
    (50_000, 0.1),
    (50_257, 10.0),
    (128_256, 3.0),
    (151_936, 2.0),
    (152_064, 2.0),
    (152_065, 4.0),
];

#[test]
fn row_stats_matches_oracle() {
    for (vocab, scale) in CASES {
        let logits = Fill::new(vocab as u64).normals(2 * vocab, scale);
        for_each_device(&format!("row_stats vocab {vocab}"), |dev| {
            let stats = run(dev, &logits, vocab)?;
            for (row, got) in logits.chunks(vocab).zip(&stats) {
                let want = oracle::row_stats(row);
                let what = format!("vocab {vocab}: {got:?} {want:?}");
                assert_eq!((got.finite, got.argmax as usize), (1, want.argmax), "{what}");
                assert_eq!(got.max, row[want.argmax], "{what}");
                assert!((f64::from(got.lse) - want.lse).abs() < 1e-6 * (1.0 + want.lse.abs()), "{what}");
                assert!((f64::from(got.entropy) - want.entropy).abs() < 5e-6 * (1.0 + want.entropy), "{what}");
                assert!((f64::from(got.top1) - want.top1).abs() < 3e-6 * want.top1, "{what}");
                if vocab > 1 {
                    assert!((f64::from(got.margin) - want.margin).abs() < 1e-6, "{what}");
                }
            }
            Ok(bits(&stats))
        });
    }
}

#[test]
fn entropy_of_known_and_of_peaked_distributions() {
    for_each_device("entropy", |dev| {
        for (top, want) in [(0.0, 1.386_294), (2.0, 0.918_284), (6.0, 0.051_697), (10.0, 0.001_498)] {
            let got = run(dev, &[top, 0.0, 0.0, 0.0], 4)?[0].entropy;
            assert!((got - want).abs() < 1e-5, "top {top}: got {got}, want {want}");
        }
        let mut all = Vec::new();
        // Where 1 + e^-top is 1 in f32 the entropy still has all its digits.
        for top in [15.0f32, 20.0, 30.0, 60.0] {
            for vocab in [4usize, 9000] {
                let mut logits = vec![0.0; vocab];
                logits[vocab / 2] = top;
                let got = run(dev, &logits, vocab)?;
                let q = (-f64::from(top)).exp();
                let rest = (vocab - 1) as f64 * q;
                let want = (rest.ln_1p() + rest * f64::from(top) / (1.0 + rest)) as f32;
                assert!((got[0].entropy - want).abs() < 3e-6 * want, "top {top}, vocab {vocab}: {got:?}, want {want}");
                all.extend(bits(&got));
            }
        }
        Ok(all)
    });
}

#[test]
fn ties_go_to_the_lowest_id_with_margin_zero() {
    for (a, b) in [(5, 6), (3, 19), (100, 9000), (4095, 4096), (8191, 8192), (0, 9999)] {
        let mut logits = vec![-1.0; 10_000];
        logits[a] = 2.0;
        logits[b] = 2.0;
        for_each_device(&format!("row_stats tie of {a} and {b}"), |dev| {
            let got = run(dev, &logits, 10_000)?;
            assert_eq!((got[0].argmax, got[0].margin, got[0].finite), (a as u32, 0.0, 1));
            Ok(bits(&got))
        });
    }
}

#[test]
fn anything_not_finite_is_seen_and_hurts_no_other_row() {
    for vocab in [5003, 8200] {
        let clean = Fill::new(9).normals(3 * vocab, 3.0);
        for_each_device(&format!("row_stats not finite, vocab {vocab}"), |dev| {
            let want = run(dev, &clean, vocab)?;
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 17, 4095, 4096, vocab - 1] {
                    let mut logits = clean.clone();
                    logits[vocab + at] = bad;
                    let got = run(dev, &logits, vocab)?;
                    assert_eq!(bits(&got[1..2]), [0; 7], "{bad} at {at}");
                    assert_eq!((bits(&got[..1]), bits(&got[2..])), (bits(&want[..1]), bits(&want[2..])));
                }
            }
            let extremes = run(dev, &[f32::MAX, f32::MIN, 0.0], 3)?;
            assert_eq!((extremes[0].finite, extremes[0].argmax, extremes[0].entropy), (1, 0, 0.0));
            Ok(bits(&extremes))
        });
    }
}

#[test]
fn a_row_alone_has_the_same_bits() {
    for vocab in [20_000, 20_001] {
        let logits = Fill::new(4).normals(3 * vocab, 4.0);
        for_each_device(&format!("row_stats alone, vocab {vocab}"), |dev| {
            let all = run(dev, &logits, vocab)?;
            for (row, want) in logits.chunks(vocab).zip(&all) {
                assert_eq!(bits(&run(dev, row, vocab)?), bits(std::slice::from_ref(want)));
            }
            Ok(bits(&all))
        });
    }
}

#[test]
fn no_rows_are_no_work() {
    for_each_device("row_stats limits", |dev| {
        dev.launch(dev.kernels().row_stats, &rksc_row_stats_params { vocab: 5, ..Default::default() })?;
        assert_refused(
            dev.launch(dev.kernels().row_stats, &rksc_row_stats_params { num_rows: 1, ..Default::default() }),
        );
        Ok(Vec::new())
    });
}

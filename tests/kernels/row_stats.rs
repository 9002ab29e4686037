use rksc::backend::RowStats;
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::row_stats::{RowStatsScratch, row_stats};
use rksc::backend::cpu::simd::SimdLevel;
use rksc::testing::fill::Fill;
use rksc::testing::oracle;

fn run(level: SimdLevel, threads: usize, logits: &[f32], vocab: usize) -> Vec<RowStats> {
    let mut stats = vec![RowStats::default(); logits.len() / vocab];
    let mut scratch = RowStatsScratch::default();
    row_stats(level, &mut ThreadPool::new(threads), &mut scratch, logits, vocab, &mut stats).unwrap();
    stats
}

#[test]
fn row_stats_matches_oracle() {
    for level in SimdLevel::available() {
        for (vocab, scale) in [
            (1, 1.0),
            (3, 1.0),
            (15, 4.0),
            (16, 1.0),
            (31, 3.0),
            (97, 8.0),
            (4096, 2.0),
            (4097, 5.0),
            (50_000, 0.1),
            (50_001, 10.0),
        ] {
            let logits = Fill::new(vocab as u64).normals(2 * vocab, scale);
            for (row, got) in logits.chunks(vocab).zip(run(level, 1, &logits, vocab)) {
                let want = oracle::row_stats(row);
                let what = format!("{level:?} vocab {vocab}: {got:?} {want:?}");
                assert_eq!((got.finite, got.argmax as usize), (1, want.argmax), "{what}");
                assert_eq!(got.max, row[want.argmax]);
                assert!((f64::from(got.lse) - want.lse).abs() < 3e-6 * (1.0 + want.lse.abs()), "{what}");
                assert!((f64::from(got.entropy) - want.entropy).abs() < 1e-5 * (1.0 + want.entropy), "{what}");
                assert!((f64::from(got.top1) - want.top1).abs() < 3e-6 * want.top1, "{what}");
                if vocab > 1 {
                    assert!((f64::from(got.margin) - want.margin).abs() < 1e-6, "{what}");
                }
            }
        }
    }
}

/// Acceptance vector RK4.
#[test]
fn rk4_entropy_of_known_distributions() {
    for level in SimdLevel::available() {
        for (top, want) in [(0.0, 1.386_294), (2.0, 0.918_284), (6.0, 0.051_697), (10.0, 0.001_498)] {
            let got = run(level, 1, &[top, 0.0, 0.0, 0.0], 4)[0].entropy;
            assert!((got - want).abs() < 2e-6, "{level:?}: top {top}: got {got}, want {want}");
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id_with_margin_zero() {
    for level in SimdLevel::available() {
        for (a, b) in [(5, 6), (3, 19), (100, 9000), (8191, 8192)] {
            let mut logits = vec![-1.0; 10_000];
            logits[a] = 2.0;
            logits[b] = 2.0;
            let got = run(level, 1, &logits, 10_000)[0];
            assert_eq!((got.argmax, got.margin, got.finite), (a as u32, 0.0, 1), "{level:?} {a} {b}");
        }
    }
}

#[test]
fn anything_not_finite_is_seen_and_hurts_no_other_row() {
    for level in SimdLevel::available() {
        let clean = Fill::new(9).normals(3 * 5003, 3.0);
        let want = run(level, 1, &clean, 5003);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 17, 4095, 4096, 5002] {
                let mut logits = clean.clone();
                logits[5003 + at] = bad;
                let got = run(level, 1, &logits, 5003);
                assert_eq!(got[1], RowStats::default(), "{level:?} {bad} at {at}");
                assert_eq!((got[0], got[2]), (want[0], want[2]));
            }
        }
        let extremes = run(level, 1, &[f32::MAX, f32::MIN, 0.0], 3)[0];
        assert_eq!((extremes.finite, extremes.argmax, extremes.entropy), (1, 0, 0.0), "{level:?}");
    }
}

#[test]
fn threads_and_other_rows_do_not_change_a_bit() {
    for level in SimdLevel::available() {
        let logits = Fill::new(4).normals(3 * 20_001, 4.0);
        let want = run(level, 1, &logits, 20_001);
        for threads in 2..4 {
            assert_eq!(run(level, threads, &logits, 20_001), want);
        }
        assert_eq!(run(level, 2, &logits[20_001..40_002], 20_001)[0], want[1]);
    }
}

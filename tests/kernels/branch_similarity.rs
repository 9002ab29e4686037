use rksc::backend::Similarity;
use rksc::backend::cpu::branch_similarity::{BranchSimilarityArgs, BranchSimilarityScratch, branch_similarity};
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::testing::branch_similarity as oracle;
use rksc::testing::oracle::assert_close;
use rksc::{DType, gate};

use crate::cuda_branch_similarity::Case;
use crate::device::{bits, wide};

/// (layers, branches, hidden, tau): hidden around the lanes of every level, branches around the four taken together.
const SHAPES: &[(usize, usize, usize, f32)] = &[
    (1, 1, 1, 0.5),
    (1, 1, 16, 0.5),
    (1, 2, 3, 0.5),
    (3, 2, 5, 0.7),
    (28, 2, 97, 0.8),
    (29, 3, 64, 0.7),
    (2, 3, 7, 0.8),
    (2, 4, 255, 0.8),
    (2, 5, 256, 0.8),
    (2, 7, 257, 0.8),
    (12, 8, 192, 0.75),
    (4, 8, 896, 0.7),
    (3, 8, 3584, 0.7),
    (1, 9, 33, 0.75),
    (1, 11, 4096, 0.75),
    (2, 12, 100, 0.8),
    (2, 15, 512, 0.8),
    (5, 16, 128, 0.8),
    (2, 17, 130, 0.6),
    (2, 31, 127, 0.8),
    (2, 32, 132, 0.75),
    (2, 47, 63, 0.7),
    (3, 64, 200, 0.75),
    (2, 80, 31, 0.75),
];

fn run(level: SimdLevel, threads: usize, case: &Case) -> Similarity {
    let mut similarity = Similarity::default();
    let args = BranchSimilarityArgs {
        states: &case.states,
        root: &case.root,
        layer_weights: &case.weights,
        num_branches: case.num_branches(),
        hidden: case.hidden,
        tau: case.tau,
        similarity: &mut similarity,
    };
    let mut pool = ThreadPool::new(threads);
    branch_similarity(level, &mut pool, &mut BranchSimilarityScratch::default(), args).unwrap();
    similarity
}

fn result_bits(s: &Similarity) -> Vec<u32> {
    [bits(&s.to_root), bits(&s.pairwise), s.labels.clone()].concat()
}

#[test]
fn branch_similarity_matches_oracle() {
    for level in SimdLevel::available() {
        for &(num_layers, num_branches, hidden, tau) in SHAPES {
            let case = Case::random(num_layers, num_branches, hidden, tau);
            let what = format!("branch_similarity {level} {num_layers}x{num_branches}x{hidden}");
            let got = run(level, 1, &case);
            let want = oracle::branch_similarity(&case.states, &case.root, &case.weights, hidden);
            assert_close(&what, DType::F32, 2e-6, &wide(&got.to_root), &want.to_root);
            assert_close(&what, DType::F32, 2e-6, &wide(&got.pairwise), &want.pairwise);
            assert_eq!(got.labels, oracle::cluster(&got.pairwise, num_branches, tau), "{what}");
            for b in 0..num_branches {
                assert_eq!(got.pairwise[b * num_branches + b], 1.0, "{what}: diagonal");
                for c in 0..b {
                    let pair = |b: usize, c: usize| got.pairwise[b * num_branches + c].to_bits();
                    assert_eq!(pair(b, c), pair(c, b), "{what}: {b} and {c}");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for level in SimdLevel::available() {
        for &(num_layers, num_branches, hidden, tau) in SHAPES {
            let case = Case::random(num_layers, num_branches, hidden, tau);
            let want = result_bits(&run(level, 1, &case));
            for threads in [2, 3] {
                assert_eq!(
                    result_bits(&run(level, threads, &case)),
                    want,
                    "{level} {num_layers}x{num_branches}x{hidden}"
                );
            }
        }
    }
}

/// The branches `picked` of a case, in that order.
fn subset(case: &Case, picked: &[usize]) -> Case {
    let n = case.num_branches();
    let rows: Vec<&[f32]> = case.states.chunks(case.hidden).collect();
    let states = rows.chunks(n).flat_map(|layer| picked.iter().flat_map(|&b| layer[b].to_vec())).collect();
    Case { states, root: case.root.clone(), weights: case.weights.clone(), hidden: case.hidden, tau: case.tau }
}

#[test]
fn a_pairs_bits_do_not_depend_on_the_other_branches() {
    for level in SimdLevel::available() {
        let case = Case::random(3, 11, 77, 0.8);
        let all = run(level, 1, &case);
        for picked in [vec![4], vec![7, 2], vec![10, 0, 5, 6, 1]] {
            let some = run(level, 1, &subset(&case, &picked));
            for (i, &b) in picked.iter().enumerate() {
                assert_eq!(some.to_root[i].to_bits(), all.to_root[b].to_bits());
                for (j, &c) in picked.iter().enumerate() {
                    assert_eq!(some.pairwise[i * picked.len() + j].to_bits(), all.pairwise[b * 11 + c].to_bits());
                }
            }
        }
    }
}

#[test]
fn equal_states_are_exactly_one_alike_and_zero_states_alike_to_nobody() {
    for level in SimdLevel::available() {
        for (num_layers, hidden) in [(1, 1), (4, 64), (28, 97), (7, 896)] {
            let mut case = Case::random(num_layers, 5, hidden, 1.0);
            for layer in 0..num_layers {
                let row = |b: usize| (layer * 5 + b) * hidden..(layer * 5 + b + 1) * hidden;
                let first = case.states[row(1)].to_vec();
                case.states[row(3)].copy_from_slice(&first);
                case.states[row(4)].fill(0.0);
                case.root[layer * hidden..(layer + 1) * hidden].copy_from_slice(&first);
            }
            let got = run(level, 1, &case);
            assert_eq!(
                [got.pairwise[5 + 3], got.to_root[1], got.to_root[3]],
                [1.0; 3],
                "{level} {num_layers}x{hidden}"
            );
            assert_eq!([got.pairwise[4], got.to_root[4], got.pairwise[24]], [0.0, 0.0, 1.0]);
            assert_eq!(got.labels[3], got.labels[1]);
        }
    }
}

/// Acceptance vectors RK1, RK2 and RK3.
#[test]
fn rk3_weighted_similarity_of_a_known_pair() {
    let (root, branch) = ([1.0, 0.0, 0.0, 2.0, 3.0, 4.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0, 4.0, 3.0, -1.0, 1.0]);
    let narrow = |w: Vec<f64>| w.into_iter().map(|w| w as f32).collect::<Vec<f32>>();
    let code = narrow(oracle::layer_weights_from_zero(1.5, 4));
    let paper = gate::layer_weights(1.5, &[1, 2, 3, 4], 4);
    let flat = gate::layer_weights(0.0, &[1, 2, 3, 4], 4);
    for (weights, values, want) in [
        (code, [0.101_536, 0.167_405, 0.276_004, 0.455_054], 0.484_874),
        (paper, [0.130_681, 0.190_140, 0.276_652, 0.402_527], 0.530_717),
        (flat, [0.25; 4], 0.666_777),
    ] {
        assert!(weights.iter().zip(values).all(|(w, v): (&f32, f32)| (w - v).abs() < 1e-6), "{weights:?}");
        let (states, root) = (branch.to_vec(), root.to_vec());
        let case = Case { states, root, weights, hidden: 2, tau: 0.5 };
        for level in SimdLevel::available() {
            let got = run(level, 1, &case).to_root[0];
            assert!((got - want).abs() < 1e-6, "{level}: got {got}, want {want}");
        }
    }
}

/// Weights of the probed layers are those of the whole model, renormalised.
#[test]
fn weights_of_probed_layers_keep_their_ratios() {
    let (all, some) = (gate::layer_weights(1.5, &[1, 2, 3, 4], 4), gate::layer_weights(1.5, &[2, 4], 4));
    assert!((some[0] / some[1] - all[1] / all[3]).abs() < 1e-6 && (some[0] + some[1] - 1.0).abs() < 1e-6);
}

#[test]
fn not_a_number_stays_with_its_branch() {
    for level in SimdLevel::available() {
        let mut case = Case::random(2, 4, 33, 0.2);
        let clean = run(level, 1, &case);
        case.states[33 + 5] = f32::NAN;
        let got = run(level, 1, &case);
        assert!(got.to_root[1].is_nan() && got.pairwise[4].is_nan() && got.pairwise[5] == 1.0);
        for (b, c) in [(0, 2), (0, 3), (2, 3)] {
            assert_eq!(got.pairwise[b * 4 + c].to_bits(), clean.pairwise[b * 4 + c].to_bits());
        }
        assert!(got.labels[1] == 1 && [0, 2, 3].iter().all(|&b| got.labels[b] != 1), "{got:?}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let case = Case::random(2, 3, 8, 0.5);
    let refuse = |num_branches: usize, hidden: usize, weights: &[f32]| {
        let args = BranchSimilarityArgs {
            states: &case.states,
            root: &case.root,
            layer_weights: weights,
            num_branches,
            hidden,
            tau: 0.5,
            similarity: &mut Similarity::default(),
        };
        let scratch = &mut BranchSimilarityScratch::default();
        assert!(branch_similarity(SimdLevel::Portable, &mut ThreadPool::new(1), scratch, args).is_err());
    };
    refuse(4, 8, &case.weights);
    refuse(3, 9, &case.weights);
    refuse(0, 8, &case.weights);
    refuse(3, 0, &case.weights);
    refuse(3, 8, &[]);
    refuse(3, 8, &[0.2; 3]);
}

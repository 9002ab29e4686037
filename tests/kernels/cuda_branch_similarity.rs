//! `branch_similarity` against its float64 oracle, and its clustering against the stated rule.

use rksc::backend::cuda::bindings::rksc_branch_similarity_params;
use rksc::backend::cuda::device::Device;
use rksc::testing::branch_similarity::{branch_similarity, cluster, layer_weights, layer_weights_from_zero};
use rksc::testing::fill::Fill;
use rksc::testing::oracle::assert_close;
use rksc::{DType, Result};

use crate::device::{assert_refused, bits, for_each_device, wide};

pub(crate) struct Case {
    pub(crate) states: Vec<f32>,
    pub(crate) root: Vec<f32>,
    pub(crate) weights: Vec<f32>,
    pub(crate) hidden: usize,
    pub(crate) tau: f32,
}

#[derive(PartialEq, Debug)]
struct Output {
    to_root: Vec<f32>,
    pairwise: Vec<f32>,
    above: Vec<u32>,
    labels: Vec<u32>,
}

impl Output {
    fn bits(&self) -> Vec<u32> {
        [bits(&self.to_root), bits(&self.pairwise), self.above.clone(), self.labels.clone()].concat()
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

impl Case {
    pub(crate) fn num_branches(&self) -> usize {
        self.states.len() / (self.weights.len() * self.hidden)
    }

    /// Branches around a few centres per layer, so that there is something to cluster.
    pub(crate) fn random(num_layers: usize, num_branches: usize, hidden: usize, tau: f32) -> Self {
        let mut fill = Fill::new((num_layers * 1009 + num_branches * 31 + hidden) as u64);
        let num_centres = num_branches / 4 + 1;
        let (mut states, mut root) = (Vec::new(), Vec::new());
        for _ in 0..num_layers {
            let centres: Vec<Vec<f32>> = (0..num_centres).map(|_| fill.normals(hidden, 3.0)).collect();
            for b in 0..num_branches {
                let noise = 1.0 + (b % 3) as f32;
                states.extend(centres[b % num_centres].iter().map(|x| x + noise * fill.normal()));
            }
            root.extend(centres[0].iter().map(|x| 2.0 * x + fill.normal()));
        }
        let weights = narrow(&layer_weights(1.5, num_layers));
        Self { states, root, weights, hidden, tau }
    }

    /// Runs it twice over one workspace, which the first run must leave as it was.
    fn run(&self, dev: &mut Device) -> Result<Output> {
        let (num_layers, n) = (self.weights.len(), self.num_branches());
        let (states, root) = (dev.buffer(&self.states)?, dev.buffer(&self.root)?);
        let weights = dev.buffer(&self.weights)?;
        let mut workspace = dev.zeroed::<u8>(dev.kernels().branch_similarity_workspace_bytes(num_layers, n))?;
        let mut outputs = Vec::new();
        for _ in 0..2 {
            let (mut to_root, mut pairwise) = (dev.alloc::<f32>(n)?, dev.alloc::<f32>(n * n)?);
            let (mut above, mut labels) = (dev.alloc::<u32>(n)?, dev.alloc::<u32>(n)?);
            let params = rksc_branch_similarity_params {
                states: states.ptr(),
                root: root.ptr(),
                layer_weights: weights.ptr(),
                to_root: to_root.ptr_mut(),
                pairwise: pairwise.ptr_mut(),
                above: above.ptr_mut(),
                labels: labels.ptr_mut(),
                workspace: workspace.ptr_mut().cast(),
                num_layers: num_layers as u32,
                num_branches: n as u32,
                hidden: self.hidden as u32,
                tau: self.tau,
            };
            dev.launch(dev.kernels().branch_similarity, &params)?;
            outputs.push(Output {
                to_root: dev.to_vec(&to_root)?,
                pairwise: dev.to_vec(&pairwise)?,
                above: dev.to_vec(&above)?,
                labels: dev.to_vec(&labels)?,
            });
        }
        let (second, first) = (outputs.remove(1), outputs.remove(0));
        assert_eq!(first.bits(), second.bits(), "the second run on a workspace");
        Ok(first)
    }

    /// What must hold of every result, whatever the numbers.
    fn check_rules(&self, what: &str, got: &Output) {
        let n = self.num_branches();
        let above: Vec<u32> = got.to_root.iter().map(|&s| u32::from(s >= self.tau)).collect();
        assert_eq!(got.above, above, "{what}");
        for b in 0..n {
            assert_eq!(got.pairwise[b * n + b].to_bits(), 1.0f32.to_bits(), "{what}: diagonal {b}");
            for c in 0..b {
                assert_eq!(got.pairwise[b * n + c].to_bits(), got.pairwise[c * n + b].to_bits(), "{what}: {b} and {c}");
            }
        }
        assert_eq!(got.labels, cluster(&got.pairwise, n, self.tau), "{what}: labels");
        for (b, &label) in got.labels.iter().enumerate() {
            assert!(b == label as usize || got.pairwise[label as usize * n + b] >= self.tau, "{what}: member {b}");
            assert_eq!(got.labels[label as usize], label, "{what}: representative of {b}");
        }
    }
}

#[test]
fn branch_similarity_matches_oracle() {
    for (num_layers, num_branches, hidden, tau) in [
        (1, 0, 64, 0.5),
        (1, 1, 1, 0.5),
        (1, 1, 4, 0.5),
        (3, 2, 5, 0.7),
        (28, 2, 97, 0.8),
        (29, 3, 64, 0.7),
        (2, 4, 255, 0.8),
        (2, 5, 256, 0.8),
        (2, 7, 257, 0.8),
        (4, 8, 896, 0.7),
        (3, 8, 3584, 0.7),
        (1, 11, 4096, 0.75),
        (2, 12, 100, 0.8),
        (2, 15, 512, 0.8),
        (5, 16, 128, 0.8),
        (2, 17, 130, 0.6),
        (2, 31, 127, 0.8),
        (2, 32, 132, 0.75),
        (3, 33, 64, 0.7),
        (2, 47, 63, 0.7),
        (2, 63, 65, 0.8),
        (3, 64, 200, 0.75),
        (1, 64, 1000, 0.9),
        (36, 6, 33, 0.8),
    ] {
        let what = format!("branch_similarity {num_layers}x{num_branches}x{hidden}");
        let case = Case::random(num_layers, num_branches, hidden, tau);
        let want = branch_similarity(&case.states, &case.root, &case.weights, hidden);
        for_each_device(&what, |dev| {
            let got = case.run(dev)?;
            assert_close(&what, DType::F32, 2e-6, &wide(&got.to_root), &want.to_root);
            assert_close(&what, DType::F32, 2e-6, &wide(&got.pairwise), &want.pairwise);
            case.check_rules(&what, &got);
            Ok(got.bits())
        });
    }
}

#[test]
fn branch_similarity_of_the_published_vector() {
    let states = vec![2.0, 0.0, 1.0, 1.0, 4.0, 3.0, -1.0, 1.0];
    let root = vec![1.0, 0.0, 0.0, 2.0, 3.0, 4.0, 1.0, 1.0];
    for (weights, want) in
        [(layer_weights_from_zero(1.5, 4), 0.484_874), (layer_weights(1.5, 4), 0.530_717), (vec![0.25; 4], 0.666_777)]
    {
        let weights = narrow(&weights);
        let case = Case { states: states.clone(), root: root.clone(), weights, hidden: 2, tau: 0.5 };
        for_each_device("branch_similarity published", |dev| {
            let got = case.run(dev)?;
            assert!((got.to_root[0] - want).abs() < 1e-6, "{} {want}", got.to_root[0]);
            assert_eq!(got.labels, [0]);
            Ok(got.bits())
        });
    }
}

#[test]
fn equal_states_are_exactly_one_and_pass_a_threshold_of_one() {
    for (num_layers, num_branches, hidden) in [(28, 9, 1031), (5, 40, 512)] {
        let mut case = Case::random(num_layers, num_branches, hidden, 1.0);
        case.states = case.root.chunks(hidden).flat_map(|row| row.repeat(num_branches)).collect();
        for_each_device("branch_similarity of equal states", |dev| {
            let got = case.run(dev)?;
            assert!(got.to_root.iter().chain(&got.pairwise).all(|&s| s == 1.0), "{:?}", got.to_root);
            assert_eq!(got.labels, vec![0; num_branches]);
            assert_eq!(got.above, vec![1; num_branches]);
            Ok(got.bits())
        });
    }
}

#[test]
fn zero_states_have_cosine_zero_and_broken_ones_stand_alone() {
    let hidden = 70;
    let mut case = Case::random(2, 6, hidden, 0.6);
    for layer in 0..2 {
        case.states[(layer * 6 + 1) * hidden..][..hidden].fill(0.0);
        case.states[(layer * 6 + 4) * hidden + 3] = f32::NAN;
    }
    for_each_device("branch_similarity of zero and broken states", |dev| {
        let got = case.run(dev)?;
        case.check_rules("zero and broken", &got);
        assert_eq!((got.to_root[1], got.pairwise[6], got.pairwise[7]), (0.0, 0.0, 1.0));
        assert!(got.to_root[4].is_nan() && got.pairwise[4].is_nan());
        assert_eq!((got.above[4], got.labels[1], got.labels[4]), (0, 1, 4));
        Ok(got.bits())
    });
    case.root.fill(0.0);
    for_each_device("branch_similarity of a zero root", |dev| {
        let got = case.run(dev)?;
        assert_eq!((got.to_root[0], got.to_root[5], got.above[0]), (0.0, 0.0, 0));
        Ok(got.bits())
    });
}

#[test]
fn branch_similarity_refuses_what_it_cannot_do() {
    for_each_device("branch_similarity refuses", |dev| {
        let good = rksc_branch_similarity_params { num_layers: 1, num_branches: 1, hidden: 4, ..Default::default() };
        for bad in [
            rksc_branch_similarity_params { num_branches: 65, ..good },
            rksc_branch_similarity_params { num_layers: 0, ..good },
            rksc_branch_similarity_params { hidden: 0, ..good },
        ] {
            assert_refused(dev.launch(dev.kernels().branch_similarity, &bad));
        }
        Ok(Vec::new())
    });
}

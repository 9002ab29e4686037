//! Oracle of `branch_similarity`: cosines in float64, and the clustering rule as the kernel states it.

use super::oracle::cosine;

/// Layer weights `exp(alpha * x_l)`, normalised, as the method is published: `x_l = l / L` for `l = 1..=L`.
pub fn layer_weights(alpha: f64, num_layers: usize) -> Vec<f64> {
    normalised((1..=num_layers).map(|l| alpha * l as f64 / num_layers as f64))
}

/// The same as the published code has it: `x` runs evenly from 0 to 1 over `num_states` states.
pub fn layer_weights_from_zero(alpha: f64, num_states: usize) -> Vec<f64> {
    normalised((0..num_states).map(|i| alpha * i as f64 / (num_states - 1) as f64))
}

fn normalised(exponents: impl Iterator<Item = f64>) -> Vec<f64> {
    let weights: Vec<f64> = exponents.map(f64::exp).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// What [`branch_similarity`] returns.
#[derive(Clone, Debug)]
pub struct Similarities {
    /// `[num_branches]`
    pub to_root: Vec<f64>,
    /// `[num_branches, num_branches]`, 1 on the diagonal.
    pub pairwise: Vec<f64>,
}

/// `sum_l w_l cos(a^l, b^l)` of each branch with the root and with each branch. `states` is `[num_layers, num_branches, hidden]`,
/// `root` `[num_layers, hidden]`.
pub fn branch_similarity(states: &[f32], root: &[f32], weights: &[f32], hidden: usize) -> Similarities {
    let num_layers = weights.len();
    let num_branches = states.len() / (num_layers * hidden);
    let wide = |row: &[f32]| -> Vec<f64> { row.iter().map(|&x| f64::from(x)).collect() };
    let rows: Vec<Vec<f64>> = states.chunks(hidden).map(wide).collect();
    let roots: Vec<Vec<f64>> = root.chunks(hidden).map(wide).collect();
    let mut result =
        Similarities { to_root: vec![0.0; num_branches], pairwise: vec![0.0; num_branches * num_branches] };
    for (layer, &w) in weights.iter().enumerate() {
        let of_layer = &rows[layer * num_branches..][..num_branches];
        for b in 0..num_branches {
            result.to_root[b] += f64::from(w) * cosine(&of_layer[b], &roots[layer]);
            for c in 0..b {
                let similarity = f64::from(w) * cosine(&of_layer[b], &of_layer[c]);
                result.pairwise[b * num_branches + c] += similarity;
                result.pairwise[c * num_branches + b] += similarity;
            }
        }
    }
    for b in 0..num_branches {
        result.pairwise[b * num_branches + b] = 1.0;
    }
    result
}

/// Each branch's representative: in descending centrality (sum of its row; ties: lowest index; not a number: last) a branch
/// without a label takes itself and every branch without one that is at least `tau` similar. Sums are f32 in ascending order,
/// as the kernel's are, so that labels of the same `pairwise` are the same.
pub fn cluster(pairwise: &[f32], num_branches: usize, tau: f32) -> Vec<u32> {
    let centrality: Vec<f32> = pairwise
        .chunks(num_branches.max(1))
        .map(|row| row.iter().fold(0.0, |sum, x| sum + x))
        .map(|sum: f32| if sum.is_nan() { f32::NEG_INFINITY } else { sum })
        .collect();
    let mut order: Vec<usize> = (0..num_branches).collect();
    order.sort_by(|&a, &b| centrality[b].total_cmp(&centrality[a]).then(a.cmp(&b)));
    let mut labels = vec![u32::MAX; num_branches];
    for representative in order {
        if labels[representative] != u32::MAX {
            continue;
        }
        for b in 0..num_branches {
            let similar = b == representative || pairwise[representative * num_branches + b] >= tau;
            if similar && labels[b] == u32::MAX {
                labels[b] = representative as u32;
            }
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-6, "{got:?} {want:?}");
        }
    }

    #[test]
    fn layer_weights_are_the_published_ones() {
        close(&layer_weights_from_zero(1.5, 4), &[0.101536, 0.167405, 0.276004, 0.455054]);
        close(&layer_weights(1.5, 4), &[0.130681, 0.190140, 0.276652, 0.402527]);
    }

    #[test]
    fn representatives_are_central_and_take_what_is_near() {
        // 1 is near 0 and 2, which are not near each other; 3 is alone.
        let s = [1.0, 0.9, 0.5, 0.0, 0.9, 1.0, 0.9, 0.1, 0.5, 0.9, 1.0, 0.0, 0.0, 0.1, 0.0, 1.0];
        assert_eq!(cluster(&s, 4, 0.8), [1, 1, 1, 3]);
        assert_eq!(cluster(&s, 4, 0.95), [0, 1, 2, 3]);
        assert_eq!(cluster(&[1.0; 9], 3, 1.0), [0, 0, 0]);
        assert_eq!(cluster(&[], 0, 1.0), [0u32; 0]);
        let broken = [1.0, f32::NAN, f32::NAN, 1.0];
        assert_eq!(cluster(&broken, 2, 0.5), [0, 1]);
    }
}

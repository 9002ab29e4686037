//! Oracle of `kv_scores`: R-KV in float64, every pair of keys by itself, in each of its published forms.

use super::oracle::Scoring;
use crate::backend::RkvVariant;

/// One kv head at compression.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Queries `[num_queries][group][D]`, in any order.
    pub queries: &'a [f64],
    /// Keys `[num_slots][D]`.
    pub keys: &'a [f64],
    /// Position of each slot, for recency; `None`: the slot.
    pub positions: Option<&'a [u32]>,
    /// D.
    pub head_dim: usize,
    /// Query heads of this kv head.
    pub group: usize,
    /// Last slots, which are always kept and are no candidates.
    pub window: usize,
    /// Width of the pooling, odd.
    pub pool_size: usize,
    /// Which form.
    pub variant: RkvVariant,
    /// Multiplies q k.
    pub sm_scale: f64,
    /// Bound of what attention makes of q k; `None`: none.
    pub softcap: Option<f64>,
    /// Share of the importance in the score.
    pub lambda: f64,
    /// Cosine above which keys are similar.
    pub threshold: f64,
}

/// What [`kv_scores`] returns.
#[derive(Clone, Debug)]
pub struct Scores {
    /// Of each candidate, before the means are pooled.
    pub unpooled: Vec<f64>,
    /// Of each candidate.
    pub importance: Vec<f64>,
    /// Newest similar other slot of each slot.
    pub nearest: Vec<Option<usize>>,
    /// Column means, or row means, of each slot.
    pub mean: Vec<f64>,
    /// Of each candidate.
    pub redundancy: Vec<f64>,
    /// Of each candidate.
    pub scores: Vec<f64>,
    /// Slots whose `nearest` would be another if cosines within 1e-6 of the threshold fell on its other side.
    pub ambiguous: usize,
}

/// Scores of one head.
pub fn kv_scores(head: &Head<'_>) -> Scores {
    let num_candidates = head.keys.len() / head.head_dim - head.window;
    let unpooled = unpooled_importance(head, num_candidates);
    let importance = match head.variant {
        RkvVariant::Code | RkvVariant::Alg1 => max_pool(&unpooled, head.pool_size),
        RkvVariant::Text => unpooled.clone(),
    };
    let (nearest, mean, ambiguous) = means(head);
    let redundancy = softmax(&mean)[..num_candidates].to_vec();
    let mix = |(i, r): (&f64, &f64)| head.lambda * i - (1.0 - head.lambda) * r;
    let scores = importance.iter().zip(&redundancy).map(mix).collect();
    Scores { unpooled, importance, nearest, mean, redundancy, scores, ambiguous }
}

/// Largest value within `pool_size / 2` places.
pub fn max_pool(x: &[f64], pool_size: usize) -> Vec<f64> {
    max_within(x, pool_size / 2, pool_size / 2)
}

/// Largest value of `[i - behind, i + ahead]`.
fn max_within(x: &[f64], behind: usize, ahead: usize) -> Vec<f64> {
    let near = |i: usize| &x[i.saturating_sub(behind)..(i + ahead + 1).min(x.len())];
    (0..x.len()).map(|i| near(i).iter().copied().fold(f64::NEG_INFINITY, f64::max)).collect()
}

/// `nearest` and the column means by the identity that the kernels use: the sum of all normalised keys minus what does not count.
pub fn column_means_by_identity(head: &Head<'_>) -> (Vec<Option<usize>>, Vec<f64>) {
    let keys = normalised(head);
    let n = keys.len();
    let mut sum = vec![0.0; head.head_dim];
    for key in &keys {
        for (s, k) in sum.iter_mut().zip(key) {
            *s += k;
        }
    }
    let mut mean: Vec<f64> = keys.iter().map(|k| dot(k, &sum) - dot(k, k)).collect();
    let mut newest_first: Vec<usize> = (0..n).collect();
    newest_first.sort_by_key(|&v| std::cmp::Reverse(recency(head, v)));
    let nearest: Vec<Option<usize>> = (0..n)
        .map(|u| newest_first.iter().copied().find(|&v| v != u && dot(&keys[u], &keys[v]) > head.threshold))
        .collect();
    for (u, v) in nearest.iter().enumerate() {
        let v = v.unwrap_or(0);
        if v != u {
            mean[v] -= dot(&keys[u], &keys[v]);
        }
    }
    (nearest, mean.into_iter().map(|m| m / n as f64).collect())
}

fn unpooled_importance(head: &Head<'_>, num_candidates: usize) -> Vec<f64> {
    let mut importance = vec![0.0; num_candidates];
    let num_queries = head.queries.len() / (head.group * head.head_dim);
    for of_row in head.queries.chunks(head.group * head.head_dim) {
        let scoring = Scoring { softcap: head.softcap, ..Scoring::plain(head.sm_scale) };
        let logit =
            |key: &[f64]| of_row.chunks(head.head_dim).map(|q| scoring.score(q, key)).fold(f64::NEG_INFINITY, f64::max);
        let logits: Vec<f64> = head.keys.chunks(head.head_dim).take(num_candidates).map(logit).collect();
        let mut attention = softmax(&logits);
        if head.variant == RkvVariant::Text {
            let half = head.pool_size / 2;
            attention = max_within(&attention, half, half.saturating_sub(1));
        }
        for (i, p) in importance.iter_mut().zip(attention) {
            *i += p / num_queries as f64;
        }
    }
    importance
}

/// Means of the cosines without the diagonal and without each row's link to its newest similar key: of columns in the code
/// (slot 0 where there is none), of rows elsewhere.
fn means(head: &Head<'_>) -> (Vec<Option<usize>>, Vec<f64>, usize) {
    const MARGIN: f64 = 1e-6;
    let keys = normalised(head);
    let n = keys.len();
    let (mut mean, mut nearest, mut ambiguous) = (vec![0.0; n], Vec::with_capacity(n), 0);
    for u in 0..n {
        let row: Vec<f64> = keys.iter().enumerate().map(|(v, k)| if v == u { 0.0 } else { dot(&keys[u], k) }).collect();
        let newest =
            |threshold: f64| (0..n).filter(|&v| v != u && row[v] > threshold).max_by_key(|&v| recency(head, v));
        let link = newest(head.threshold);
        if link != newest(head.threshold - MARGIN) || link != newest(head.threshold + MARGIN) {
            ambiguous += 1;
        }
        for (v, s) in row.iter().enumerate() {
            match head.variant {
                RkvVariant::Code if v != link.unwrap_or(0) => mean[v] += s / n as f64,
                RkvVariant::Text | RkvVariant::Alg1 if Some(v) != link => mean[u] += s / n as f64,
                _ => {}
            }
        }
        nearest.push(link);
    }
    (nearest, mean, ambiguous)
}

fn recency(head: &Head<'_>, slot: usize) -> (u32, usize) {
    (head.positions.map_or(0, |positions| positions[slot]), slot)
}

fn normalised(head: &Head<'_>) -> Vec<Vec<f64>> {
    head.keys
        .chunks(head.head_dim)
        .map(|k| {
            let norm = dot(k, k).sqrt() + 1e-8;
            k.iter().map(|x| x / norm).collect()
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fill::Fill;

    fn head<'a>(keys: &'a [f64], queries: &'a [f64], head_dim: usize, window: usize) -> Head<'a> {
        let (pool_size, sm_scale) = (1, 1.0 / (head_dim as f64).sqrt());
        Head {
            queries,
            keys,
            positions: None,
            head_dim,
            group: 1,
            window,
            pool_size,
            variant: RkvVariant::Code,
            sm_scale,
            softcap: None,
            lambda: 0.1,
            threshold: 0.5,
        }
    }

    fn close(got: &[f64], want: &[f64]) {
        assert!(got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?} {want:?}");
    }

    #[test]
    fn identity_is_the_dense_form() {
        let mut fill = Fill::new(12);
        let (n, d) = (1152, 128);
        let mut keys: Vec<f64> = fill.normals(n * d, 1.0).into_iter().map(f64::from).collect();
        for u in 1..n {
            if fill.below(10) < 3 {
                let of = fill.below(u);
                for i in 0..d {
                    keys[u * d + i] = 1.7 * keys[of * d + i] + 0.3 * f64::from(fill.normal());
                }
            }
        }
        let queries = vec![0.0; d];
        let head = head(&keys, &queries, d, 1);
        let (nearest, mean, ambiguous) = means(&head);
        let (fast_nearest, fast_mean) = column_means_by_identity(&head);
        assert_eq!(ambiguous, 0);
        assert_eq!(nearest, fast_nearest);
        assert!(nearest.iter().flatten().count() > n / 4);
        assert!(mean.iter().zip(&fast_mean).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn row_means_prefer_none_of_three_duplicates() {
        let keys = [0., 0., 1., 1., 0., 0., 2., 0., 0., 0., 1., 0., 3., 0., 0.];
        let code = kv_scores(&head(&keys, &[0.0; 3], 3, 1));
        close(&code.mean, &[0.0, 0.4, 0.2, 0.0, 0.0]);
        close(&code.redundancy, &[0.175_032, 0.261_118, 0.213_785, 0.175_032]);
        for variant in [RkvVariant::Text, RkvVariant::Alg1] {
            let rows = kv_scores(&Head { variant, ..head(&keys, &[0.0; 3], 3, 1) });
            assert_eq!(rows.nearest, code.nearest);
            close(&rows.mean, &[0.0, 0.2, 0.2, 0.0, 0.2]);
        }
    }

    #[test]
    fn text_pools_each_query_before_the_mean() {
        // The queries look at slots 1 and 4 alone.
        let keys = [0., 0., 90., 0., 0., 0., 0., 0., 0., 90., 0., 0., 0., 0.];
        let of = |variant, pool_size| {
            kv_scores(&Head { variant, pool_size, ..head(&keys, &[9., 0., 0., 9.], 2, 1) }).importance
        };
        close(&of(RkvVariant::Text, 1), &[0.0, 0.5, 0.0, 0.0, 0.5, 0.0]);
        close(&of(RkvVariant::Text, 3), &[0.0, 0.5, 0.5, 0.0, 0.5, 0.5]);
        close(&of(RkvVariant::Text, 5), &[0.5, 0.5, 0.5, 1.0, 0.5, 0.5]);
        close(&of(RkvVariant::Alg1, 5), &[0.5; 6]);
    }

    #[test]
    fn pooling_stops_at_the_ends() {
        let mut x = vec![0.0; 10];
        x[4] = 1.0;
        assert_eq!(max_pool(&x, 7), [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(max_pool(&x, 1), x);
    }

    #[test]
    fn newest_duplicate_is_protected_by_slot_or_by_position() {
        let keys = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0];
        let by_slot = kv_scores(&head(&keys, &[0.0; 2], 2, 1));
        assert_eq!(by_slot.nearest, [Some(2), Some(2), Some(1), None]);
        close(&by_slot.mean, &[0.5, 0.25, 0.0, 0.0]);
        let positions = [9, 3, 5, 2];
        let by_position = kv_scores(&Head { positions: Some(&positions), ..head(&keys, &[0.0; 2], 2, 1) });
        assert_eq!(by_position.nearest, [Some(2), Some(0), Some(0), None]);
        close(&by_position.mean, &[0.0, 0.5, 0.25, 0.0]);
    }
}

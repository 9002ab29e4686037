//! Whether a similarity tells pairs that are one from pairs that are not.

use serde::Serialize;

use crate::stats::clopper_pearson;

/// The probability that one of `positives` is larger than one of `negatives`; ties count half. `None` without both.
pub fn auc(positives: &[f32], negatives: &[f32]) -> Option<f64> {
    let mut sorted = negatives.to_vec();
    sorted.sort_by(f32::total_cmp);
    let pairs = positives.len() as f64 * negatives.len() as f64;
    let wins = |&p: &f32| {
        let below = sorted.partition_point(|&n| n < p) as f64;
        let up_to = sorted.partition_point(|&n| n <= p) as f64;
        (below + up_to) / 2.0
    };
    (pairs > 0.0).then(|| positives.iter().map(wins).sum::<f64>() / pairs)
}

/// Shares of negatives and of positives at or above each value that occurs, from none to all.
pub fn roc(positives: &[f32], negatives: &[f32]) -> Vec<[f64; 2]> {
    let mut taus: Vec<f32> = positives.iter().chain(negatives).copied().collect();
    taus.sort_by(|a, b| b.total_cmp(a));
    taus.dedup();
    let point = |tau| [share(negatives, tau), share(positives, tau)];
    [[0.0, 0.0]].into_iter().chain(taus.into_iter().map(point)).collect()
}

/// How many of `values` are at least `tau`.
pub fn at_least(values: &[f32], tau: f32) -> usize {
    values.iter().filter(|&&x| x >= tau).count()
}

fn share(values: &[f32], tau: f32) -> f64 {
    at_least(values, tau) as f64 / values.len().max(1) as f64
}

/// Pairs of one kind, and how similar each is.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    /// What was changed from one to the other.
    pub kind: String,
    /// `[pairs]`.
    pub similarity: Vec<f32>,
    /// `[pairs]`: the second has another answer, so that merging the two answers one of them wrongly.
    pub answers_differ: Vec<bool>,
    /// `[pairs]`: the numbers in the two texts differ, so that `--asks-scope batch` refuses the pair.
    pub numbers_differ: Vec<bool>,
}

/// One kind at one threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merged {
    /// The kind.
    pub kind: String,
    /// Pairs of it.
    pub pairs: usize,
    /// Those merged.
    pub merged: usize,
    /// `merged` over `pairs`.
    pub rate: f64,
    /// Its 95 % Clopper-Pearson interval.
    pub interval: [f64; 2],
    /// Of the merged, those whose second text has another answer.
    pub answers_changed: usize,
    /// Of these, how many are left when pairs with different numbers are refused.
    pub answers_changed_same_numbers: usize,
}

impl Pairs {
    /// What merging from `tau` on does.
    pub fn merged(&self, tau: f32) -> Merged {
        let hit = |i: &usize| self.similarity[*i] >= tau;
        let merged: Vec<usize> = (0..self.similarity.len()).filter(hit).collect();
        let changed = |i: &&usize| self.answers_differ[**i];
        let pairs = self.similarity.len();
        Merged {
            kind: self.kind.clone(),
            pairs,
            merged: merged.len(),
            rate: merged.len() as f64 / pairs.max(1) as f64,
            interval: clopper_pearson(merged.len(), pairs, 0.95),
            answers_changed: merged.iter().filter(changed).count(),
            answers_changed_same_numbers: merged.iter().filter(changed).filter(|&&i| !self.numbers_differ[i]).count(),
        }
    }
}

/// A threshold from which on some of `reused` merge, while of the pairs in `kinds` whose answers differ at most
/// `max_rate` do: the one that merges the most. `None`: nothing separates them. Every value that occurs is tried.
pub fn separating_tau(reused: &Pairs, kinds: &[Pairs], max_rate: f64) -> Option<f32> {
    let harmful: Vec<f32> = kinds
        .iter()
        .flat_map(|k| k.similarity.iter().zip(&k.answers_differ).filter(|(_, differ)| **differ).map(|(s, _)| *s))
        .collect();
    let admissible = |tau: &f32| share(&harmful, *tau) <= max_rate;
    reused.similarity.iter().copied().filter(admissible).min_by(f32::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(kind: &str, similarity: &[f32], differ: bool) -> Pairs {
        let n = similarity.len();
        let (answers_differ, numbers_differ) = (vec![differ; n], vec![false; n]);
        Pairs { kind: kind.into(), similarity: similarity.to_vec(), answers_differ, numbers_differ }
    }

    #[test]
    fn the_area_under_the_curve() {
        assert_eq!(auc(&[0.9, 0.8], &[0.1, 0.2]), Some(1.0));
        assert_eq!(auc(&[0.1], &[0.9, 0.8]), Some(0.0));
        assert_eq!(auc(&[0.5, 0.5], &[0.5]), Some(0.5));
        assert_eq!(auc(&[0.4, 0.8], &[0.6, 0.2]), Some(0.75));
        assert_eq!(auc(&[], &[0.5]), None);
    }

    /// The area by trapezoids is the same area.
    #[test]
    fn the_curve_goes_from_nothing_to_everything() {
        let (p, n) = ([0.4, 0.8, 0.8], [0.6, 0.2, 0.8]);
        let curve = roc(&p, &n);
        assert_eq!((curve.first(), curve.last()), (Some(&[0.0, 0.0]), Some(&[1.0, 1.0])));
        let area: f64 = curve.windows(2).map(|w| (w[1][0] - w[0][0]) * (w[0][1] + w[1][1]) / 2.0).sum();
        assert!((area - auc(&p, &n).unwrap()).abs() < 1e-12);
    }

    #[test]
    fn merged_pairs_and_the_answers_they_change() {
        let mut p = pairs("number", &[0.9, 0.8, 0.7], true);
        p.numbers_differ[0] = true;
        let at = p.merged(0.8);
        assert_eq!((at.merged, at.answers_changed, at.answers_changed_same_numbers), (2, 2, 1));
        assert_eq!((at.interval, at.rate), (clopper_pearson(2, 3, 0.95), 2.0 / 3.0));
        assert_eq!(p.merged(0.95).merged, 0);
    }

    #[test]
    fn a_threshold_must_keep_what_differs_apart() {
        let reused = pairs("paraphrase", &[0.95, 0.7, 0.4], false);
        let far = pairs("number", &[0.5, 0.6], true);
        let harmless = pairs("name", &[0.99], false);
        assert_eq!(separating_tau(&reused, &[far, harmless.clone()], 0.0), Some(0.7));
        let near = pairs("number", &[0.99, 0.6], true);
        assert_eq!(separating_tau(&reused, &[near.clone(), harmless], 0.0), None);
        assert_eq!(separating_tau(&reused, &[near], 0.5), Some(0.7));
    }
}

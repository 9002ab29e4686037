//! Gates: numbers in, decision out. A gate never touches a device.
//!
//! Between two layers a gate is data, a [`GateSpec`]: after which layers to look, at which statistic, with which rule,
//! at what scope, and to what effect. [`GateSpec::decide`] is the reference of every rule; a device that decides for
//! itself is tested against it.

pub mod step;
pub mod verify;

/// A decision between layers about rows in flight.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSpec {
    /// Probe after these layers (1 = after the first decoder layer).
    pub layers: Vec<u32>,
    /// What the rule reads.
    pub statistic: Statistic,
    /// When a row's gate fires.
    pub rule: Rule,
    /// How far one row's decision reaches.
    pub scope: Scope,
    /// What happens to the rows for which it fired.
    pub effect: Effect,
}

/// A number per row, taken from the residual stream after the probed layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Nothing is read; the rule looks at row numbers alone.
    RowIndex,
    /// Cosine of the residual stream before and after the layer's last addition.
    StepSimilarity,
}

/// When a gate fires, given the row's index among the rows in flight and its statistic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Rows `offset`, `offset + every`, ...; `every` 1 and `offset` 0 is all of them.
    EveryNth {
        /// Distance between rows.
        every: u32,
        /// First row.
        offset: u32,
    },
    /// The statistic exceeds the bound, strictly. NaN never does.
    Above(f32),
    /// The statistic is below the bound, strictly. NaN never is.
    Below(f32),
}

/// How far one row's decision reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Each sequence decides by its last row; a sequence leaves as a whole.
    Sequence,
    /// All sequences or none: every sequence's last row must fire.
    Batch,
}

/// What happens to a sequence whose gate fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It leaves the pass: nothing is committed, its new blocks return.
    Drop,
    /// It leaves the pass with its logits read from this layer.
    Stop,
    /// Its remaining layers use the second weight set; its new KV is marked `river`.
    River,
}

impl GateSpec {
    /// The reference rule: `last_rows` holds (row index, statistic) of each sequence's last row, in order.
    pub fn decide(&self, last_rows: &[(u32, f32)]) -> Vec<bool> {
        let fired: Vec<bool> = last_rows
            .iter()
            .map(|&(row, x)| match self.rule {
                Rule::EveryNth { every, offset } => row >= offset && (row - offset).is_multiple_of(every.max(1)),
                Rule::Above(bound) => x > bound,
                Rule::Below(bound) => x < bound,
            })
            .collect();
        match self.scope {
            Scope::Sequence => fired,
            Scope::Batch => vec![fired.iter().all(|&f| f); fired.len()],
        }
    }
}

/// Each branch's representative, from `pairwise` `[n, n]`: in descending centrality (the sum of its row; ties: the lowest
/// index; not a number: last) a branch without a label takes itself and every branch without one that is at least `tau`
/// similar to it. Sums are f32 in ascending order, as on a device, so that equal numbers give equal clusters.
pub fn cluster(pairwise: &[f32], num_branches: usize, tau: f32) -> Vec<u32> {
    let centrality = |b: usize| {
        let sum = pairwise[b * num_branches..][..num_branches].iter().fold(0.0, |sum, x| sum + x);
        if f32::is_nan(sum) { f32::NEG_INFINITY } else { sum }
    };
    let mut order: Vec<(usize, f32)> = (0..num_branches).map(|b| (b, centrality(b))).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut labels: Vec<Option<u32>> = vec![None; num_branches];
    for (representative, _) in order {
        if labels[representative].is_some() {
            continue;
        }
        for (b, label) in labels.iter_mut().enumerate() {
            if label.is_none() && (b == representative || pairwise[representative * num_branches + b] >= tau) {
                *label = Some(representative as u32);
            }
        }
    }
    labels.into_iter().enumerate().map(|(b, label)| label.unwrap_or(b as u32)).collect()
}

/// Layer weights `exp(alpha * l / L)` over the probed `layers` of a model of `num_layers`, normalised.
pub fn layer_weights(alpha: f32, layers: &[u32], num_layers: usize) -> Vec<f32> {
    let raw: Vec<f64> = layers.iter().map(|&l| (f64::from(alpha) * f64::from(l) / num_layers as f64).exp()).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|w| (w / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(rule: Rule, scope: Scope) -> GateSpec {
        GateSpec { layers: vec![2], statistic: Statistic::StepSimilarity, rule, scope, effect: Effect::Stop }
    }

    #[test]
    fn thresholds_are_strict_and_nan_never_fires() {
        let rows = [(0, 0.5), (1, 0.6), (2, f32::NAN)];
        assert_eq!(spec(Rule::Above(0.5), Scope::Sequence).decide(&rows), [false, true, false]);
        assert_eq!(spec(Rule::Below(0.5), Scope::Sequence).decide(&rows), [false, false, false]);
    }

    #[test]
    fn batch_scope_waits_for_the_last() {
        assert_eq!(spec(Rule::Above(0.5), Scope::Batch).decide(&[(0, 0.9), (1, 0.4)]), [false, false]);
        assert_eq!(spec(Rule::Above(0.5), Scope::Batch).decide(&[(0, 0.9), (1, 0.8)]), [true, true]);
    }

    #[test]
    fn every_nth_counts_from_its_offset() {
        let rows: Vec<_> = (0..5).map(|i| (i, 0.0)).collect();
        assert_eq!(
            spec(Rule::EveryNth { every: 2, offset: 1 }, Scope::Sequence).decide(&rows),
            [false, true, false, true, false]
        );
    }
}

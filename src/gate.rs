//! Gates: numbers in, decision out. A gate never touches a device.
//!
//! Between two layers a gate is data, a [`GateSpec`]: after which layers to look, at which statistic, with which rule,
//! at what scope, and to what effect. [`GateSpec::decide`] is the reference of every rule; a device that decides for
//! itself is tested against it.

pub mod asks;
pub mod river;
pub mod step;
pub mod verify;

use crate::error::{Error, Result};

/// A decision between layers about rows in flight.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSpec {
    /// Probe after these layers, ascending (1 = after the first decoder layer; 0, before it, is for the river alone).
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

/// A number per sequence, taken from the residual stream after the probed layer: of its last row, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Statistic {
    /// Nothing is read; the rule looks at row numbers alone.
    RowIndex,
    /// Cosine of the residual stream before and after the layer.
    StepSimilarity {
        /// The rows it is taken from.
        of: Rows,
    },
    /// Entropy in nats of what the row would say if it were unembedded now.
    Entropy {
        /// What the softmax runs over.
        over: Over,
        /// How the residual stream is normed before it is unembedded; an answer at the exit is read the same way.
        norm: ProbeNorm,
        /// Probed layers that share one reading of the unembedding, at least 1. Rows leave at the last of them.
        stacked: u32,
    },
    /// Cosines between the sequences' last rows, summed over all probed layers with the weights `exp(alpha l / L)`; the
    /// first sequence is the root. Decided once, after the last of them.
    BranchSimilarity {
        /// 0 weighs all layers alike.
        alpha: f32,
    },
}

/// The rows of a sequence that make its step similarity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rows {
    /// Its last.
    Last,
    /// A low percentile over all of them but the first positions, which attention sinks make alike whatever comes: value
    /// number `floor(share n)` of n in ascending order. For the river alone.
    Percentile {
        /// Between 0 and 1: 0.05 is the 5th percentile.
        share: f32,
        /// Positions at the sequence's start that do not count.
        skip: u32,
    },
}

/// What an entropy is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// Every token.
    Vocabulary,
    /// The tokens that the sequences' last rows watch: for a verdict, its spellings of yes and no.
    Watched,
}

/// The norm in front of a probe's unembedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeNorm {
    /// The model's final norm, as behind its last layer.
    Final,
    /// None: the reference code's form.
    Raw,
}

/// When a gate fires, given the row's index among the rows in flight and what was seen of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// It only looks.
    Never,
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
    /// The statistic is below `theta` and has changed by less than `epsilon` since the probe before; the first probe has
    /// none before it.
    Settled {
        /// Bound of the statistic.
        theta: f32,
        /// Bound of its change.
        epsilon: f32,
    },
    /// Sequences at least `tau` similar form clusters ([`cluster`]); all but each cluster's representative fire.
    Cluster {
        /// Similarity from which two sequences are one.
        tau: f32,
    },
}

/// How far one row's decision reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Each sequence decides by its last row; a sequence leaves as a whole.
    Sequence,
    /// All sequences the gate is set on, or none: every one's last row must fire.
    Batch,
}

/// What happens to a sequence whose gate fired.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// Nothing: what was seen is reported.
    Observe,
    /// It leaves the pass: nothing is committed, its new blocks return.
    Drop,
    /// It leaves the pass with its logits read from this layer.
    Stop,
    /// Its remaining layers use the second weight set; its new KV is marked `river`.
    River,
    /// It leaves the pass, and its branch becomes one with its representative's: the same tokens, the same blocks.
    Alias,
    /// It keeps its tokens. Those that its representative has too take that one's KV in the remaining layers, but for
    /// `share` of them, the most different, and its last one; these and the others run on. Its KV is marked `aliased`.
    Recompute {
        /// Between 0 and 1.
        share: f32,
    },
}

impl Effect {
    /// One sequence gives way to another's.
    pub(crate) fn needs_clusters(self) -> bool {
        matches!(self, Self::Alias | Self::Recompute { .. })
    }
}

/// What a gate has seen of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen<'a> {
    /// Its last row among the rows in flight.
    pub row: u32,
    /// The statistic at each probe so far, the present one last.
    pub values: &'a [f32],
}

impl GateSpec {
    /// The reference of every rule that looks at sequences one by one. [`Rule::Cluster`] looks at pairs: see [`cluster`].
    pub fn decide(&self, sequences: &[Seen<'_>]) -> Vec<bool> {
        let fires = |s: &Seen<'_>| match (self.rule, s.values) {
            (Rule::EveryNth { every, offset }, _) => s.row >= offset && (s.row - offset).is_multiple_of(every.max(1)),
            (Rule::Above(bound), [.., x]) => *x > bound,
            (Rule::Below(bound), [.., x]) => *x < bound,
            (Rule::Settled { theta, epsilon }, [.., before, x]) => *x < theta && (x - before).abs() < epsilon,
            _ => false,
        };
        let fired: Vec<bool> = sequences.iter().map(fires).collect();
        match self.scope {
            Scope::Sequence => fired,
            Scope::Batch => vec![fired.iter().all(|&f| f); fired.len()],
        }
    }

    /// A device can decide it for itself, row by row, without asking the host.
    fn decides_on_device(&self) -> bool {
        match self.statistic {
            Statistic::RowIndex => matches!(self.rule, Rule::Never | Rule::EveryNth { .. }),
            Statistic::StepSimilarity { .. } => matches!(self.rule, Rule::Never | Rule::Above(_)),
            _ => false,
        }
    }

    /// Refuses what cannot work on a model of `num_layers`, by field.
    pub fn validate(&self, num_layers: usize) -> Result<()> {
        let check = |ok: bool, why: &str| if ok { Ok(()) } else { Err(Error::config("gate", why)) };
        let is_river = self.effect == Effect::River;
        // Before the first layer there is nothing to compare.
        let first = usize::from(!is_river || self.statistic != Statistic::RowIndex);
        let last = match self.effect {
            Effect::Observe => num_layers,
            _ => num_layers.saturating_sub(1),
        };
        check(!self.layers.is_empty(), "layers: at least one is probed")?;
        check(self.layers.is_sorted_by(|a, b| a < b), "layers: must ascend")?;
        let inside = self.layers.iter().all(|&l| (first..=last).contains(&(l as usize)));
        check(inside, &format!("layers: must lie between {first} and {last}"))?;
        check(!is_river || self.decides_on_device(), "effect: the river takes the step similarity, or rows by number")?;
        if let Statistic::StepSimilarity { of: Rows::Percentile { share, .. } } = self.statistic {
            check(is_river, "of: a percentile is for the river")?;
            check((0.0..1.0).contains(&share), "of: a percentile's share must lie between 0 and 1")?;
        }
        let compares = matches!(self.statistic, Statistic::BranchSimilarity { .. });
        let clusters = matches!(self.rule, Rule::Cluster { .. });
        check(compares == clusters || self.rule == Rule::Never, "rule: clusters go with branch similarity alone")?;
        let gives_way = self.effect.needs_clusters();
        check(
            !compares || gives_way || self.effect == Effect::Observe,
            "effect: clusters alias, recompute or observe",
        )?;
        check(!gives_way || clusters, "effect: alias needs clusters")?;
        let stacked = !matches!(self.statistic, Statistic::Entropy { stacked: 0, .. });
        check(stacked, "stacked: at least 1")?;
        let numbers = match (self.rule, self.statistic) {
            (Rule::Cluster { tau }, Statistic::BranchSimilarity { alpha }) => tau.is_finite() && alpha.is_finite(),
            _ => true,
        };
        check(numbers, "tau, alpha: must be finite")?;
        let share = if let Effect::Recompute { share } = self.effect { share } else { 0.0 };
        check((0.0..=1.0).contains(&share), "share: must lie between 0 and 1")
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
        let statistic = Statistic::StepSimilarity { of: Rows::Last };
        GateSpec { layers: vec![2], statistic, rule, scope, effect: Effect::Stop }
    }

    fn decide(rule: Rule, scope: Scope, values: &[f32]) -> Vec<bool> {
        let seen = |(i, x): (usize, &f32)| (i as u32, [*x]);
        let seen: Vec<(u32, [f32; 1])> = values.iter().enumerate().map(seen).collect();
        let seen: Vec<Seen<'_>> = seen.iter().map(|(row, values)| Seen { row: *row, values }).collect();
        spec(rule, scope).decide(&seen)
    }

    #[test]
    fn thresholds_are_strict_and_nan_never_fires() {
        let values = [0.5, 0.6, f32::NAN];
        assert_eq!(decide(Rule::Above(0.5), Scope::Sequence, &values), [false, true, false]);
        assert_eq!(decide(Rule::Below(0.5), Scope::Sequence, &values), [false, false, false]);
    }

    #[test]
    fn batch_scope_waits_for_the_last() {
        assert_eq!(decide(Rule::Above(0.5), Scope::Batch, &[0.9, 0.4]), [false, false]);
        assert_eq!(decide(Rule::Above(0.5), Scope::Batch, &[0.9, 0.8]), [true, true]);
    }

    #[test]
    fn every_nth_counts_from_its_offset() {
        let fired = decide(Rule::EveryNth { every: 2, offset: 1 }, Scope::Sequence, &[0.0; 5]);
        assert_eq!(fired, [false, true, false, true, false]);
    }

    /// Acceptance vector RK5: entropies 11, 9, 7.5, 7.0 after layers 1 to 4, probed from layer 2 on.
    #[test]
    fn rk5_an_entropy_settles_at_layer_three() {
        let entropies = [9.0, 7.5, 7.0];
        let exit = |epsilon: f32| {
            let spec = spec(Rule::Settled { theta: 8.0, epsilon }, Scope::Sequence);
            (1..=3).find(|&n| spec.decide(&[Seen { row: 0, values: &entropies[..n] }])[0]).map(|n| n + 1)
        };
        assert_eq!(exit(3.0), Some(3));
        assert_eq!(exit(0.4), None);
    }

    /// Acceptance vector RK2, and the same weights over the first two layers alone.
    #[test]
    fn rk2_layer_weights() {
        let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6);
        assert!(close(&layer_weights(1.5, &[1, 2, 3, 4], 4), &[0.130681, 0.190140, 0.276652, 0.402527]));
        let sum = 0.130681 + 0.190140;
        assert!(close(&layer_weights(1.5, &[1, 2], 4), &[0.130681 / sum, 0.190140 / sum]));
    }

    #[test]
    fn representatives_are_central_and_take_what_is_near() {
        // 1 is near 0 and 2, which are not near each other; 3 is alone.
        let s = [1.0, 0.9, 0.5, 0.0, 0.9, 1.0, 0.9, 0.1, 0.5, 0.9, 1.0, 0.0, 0.0, 0.1, 0.0, 1.0];
        assert_eq!(cluster(&s, 4, 0.8), [1, 1, 1, 3]);
        assert_eq!(cluster(&s, 4, 0.95), [0, 1, 2, 3]);
        assert_eq!(cluster(&[1.0; 9], 3, 1.0), [0, 0, 0]);
        assert_eq!(cluster(&[], 0, 1.0), [0u32; 0]);
        assert_eq!(cluster(&[1.0, f32::NAN, f32::NAN, 1.0], 2, 0.5), [0, 1]);
    }

    #[test]
    fn what_cannot_work_is_refused_by_field() {
        let complaint = |change: fn(&mut GateSpec)| {
            let mut s = spec(Rule::Above(0.5), Scope::Sequence);
            change(&mut s);
            s.validate(4).map_err(|e| e.to_string())
        };
        assert_eq!(complaint(|_| ()), Ok(()));
        for (change, field) in [
            ((|s| s.layers.clear()) as fn(&mut GateSpec), "layers: at least one"),
            (|s| s.layers = vec![3, 2], "layers: must ascend"),
            (|s| s.layers = vec![4], "layers: must lie between 1 and 3"),
            (|s| s.layers = vec![0], "layers: must lie between 1 and 3"),
            (|s| s.rule = Rule::Cluster { tau: 0.5 }, "rule: clusters"),
            (|s| s.effect = Effect::Alias, "alias needs clusters"),
            (
                |s| s.statistic = Statistic::Entropy { over: Over::Watched, norm: ProbeNorm::Final, stacked: 0 },
                "stacked",
            ),
        ] {
            let got = complaint(change).unwrap_err();
            assert!(got.contains(field), "{got}");
        }
        assert_eq!(complaint(|s| (s.layers, s.effect) = (vec![4], Effect::Observe)), Ok(()));
    }
}

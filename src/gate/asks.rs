//! Whether two prompts are one (ASKS, its semantic form): prompts that are worded differently run their first layers
//! together, and those that look alike there go on as one.

use super::{Effect, GateSpec, Rule, Scope, Statistic};
use crate::error::{Error, Result};

/// Semantic sharing. Not exact: a branch whose prompt is shared answers its representative's wording.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Asks {
    /// Similarity of the last prompt tokens from which two prompts are one. Above 1, none ever are.
    pub tau: f32,
    /// Layers that every prompt runs through before it is compared.
    pub probe_layers: u32,
    /// Layer l of L weighs `exp(alpha l / L)`.
    pub alpha: f32,
    /// Which prompts may become one.
    pub scope: AsksScope,
    /// Prompts keep their own tokens: of those that the representative has too, this share (0 to 1), the most
    /// different, is computed all the same; the others take its KV. `None`: a prompt becomes its representative's.
    pub recompute: Option<f32>,
}

/// Which prompts may become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AsksScope {
    /// Wordings that the caller declares to be the same question.
    Problem,
    /// Prompts of different problems in flight too, unless their numbers differ.
    Batch,
}

impl Default for Asks {
    fn default() -> Self {
        Self { tau: 0.95, probe_layers: 2, alpha: 1.5, scope: AsksScope::Problem, recompute: None }
    }
}

impl Asks {
    /// The gate that compares prompts after the probed layers.
    pub fn gate(&self) -> GateSpec {
        GateSpec {
            layers: (1..=self.probe_layers).collect(),
            statistic: Statistic::BranchSimilarity { alpha: self.alpha },
            rule: Rule::Cluster { tau: self.tau },
            scope: Scope::Sequence,
            effect: self.recompute.map_or(Effect::Alias, |share| Effect::Recompute { share }),
        }
    }

    /// Refuses what cannot work, by name.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str, why: &str| if ok { Ok(()) } else { Err(Error::config(field, why)) };
        check(self.tau.is_finite(), "asks-tau", "must be a number")?;
        check(self.alpha.is_finite(), "asks-alpha", "must be a number")?;
        check(self.probe_layers >= 1, "asks-probe-layers", "must be at least 1")?;
        let share = self.recompute.unwrap_or(0.0);
        check((0.0..=1.0).contains(&share), "asks-recompute", "must be a share between 0 and 1")
    }
}

/// A longest common subsequence of two prompts as pairs of indices, ascending; of several the one that pairs early
/// tokens of `a` first.
pub fn aligned(a: &[u32], b: &[u32]) -> Vec<(usize, usize)> {
    // longest[i][j]: of a[i..] and b[j..].
    let width = b.len() + 1;
    let mut longest = vec![0u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            longest[i * width + j] = match a[i] == b[j] {
                true => longest[(i + 1) * width + j + 1] + 1,
                false => longest[(i + 1) * width + j].max(longest[i * width + j + 1]),
            };
        }
    }
    let (mut i, mut j, mut pairs) = (0, 0, Vec::new());
    while i < a.len() && j < b.len() {
        if a[i] == b[j] {
            pairs.push((i, j));
            (i, j) = (i + 1, j + 1);
        } else if longest[i * width + j + 1] >= longest[(i + 1) * width + j] {
            j += 1;
        } else {
            i += 1;
        }
    }
    pairs
}

/// Which of the aligned pairs are computed all the same: the `share` of them, rounded up, with the lowest similarity
/// (not a number: lowest of all; ties: the earlier).
pub fn most_different(similarity: &[f32], share: f32) -> Vec<bool> {
    let num_chosen = (similarity.len() as f64 * f64::from(share)).ceil() as usize;
    let rank = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let mut order: Vec<usize> = (0..similarity.len()).collect();
    order.sort_by(|&a, &b| rank(similarity[a]).total_cmp(&rank(similarity[b])).then(a.cmp(&b)));
    let mut chosen = vec![false; similarity.len()];
    order.into_iter().take(num_chosen).for_each(|i| chosen[i] = true);
    chosen
}

/// The numbers in a text, sorted: two texts with different ones never ask the same.
pub fn numbers(text: &str) -> Vec<String> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    let mut numbers: Vec<String> = text
        .split(|c: char| !is_number(c))
        .map(|n| n.trim_matches(['.', ',']).replace(',', ""))
        .filter(|n| !n.is_empty())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_a_multiset_whatever_the_words() {
        assert_eq!(numbers("Mia has 12 apples, buys 3, loses 12."), ["12", "12", "3"]);
        assert_eq!(numbers("3 and 12; then 12 more"), numbers("12... 12, 3!"));
        assert_ne!(numbers("3 and 12"), numbers("3 and 12 and 12"));
        assert_eq!(numbers("1,024 or 1024 or 2.5."), ["1024", "1024", "2.5"]);
        assert!(numbers("half of them").is_empty());
    }

    #[test]
    fn prompts_align_by_what_they_have_in_common() {
        assert_eq!(aligned(&[1, 2, 3, 4], &[1, 3, 9, 4]), [(0, 0), (2, 1), (3, 3)]);
        assert_eq!(aligned(&[5, 6], &[7, 8]), []);
        assert_eq!(aligned(&[1, 1, 2], &[1, 2]), [(0, 0), (2, 1)]);
        assert_eq!(aligned(&[], &[1]), []);
        let long: Vec<u32> = (0..300).collect();
        assert_eq!(aligned(&long, &long).len(), 300);
    }

    #[test]
    fn the_most_different_are_computed_all_the_same() {
        assert_eq!(most_different(&[0.9, 0.1, 0.5, 0.1], 0.5), [false, true, false, true]);
        assert_eq!(most_different(&[0.9, f32::NAN, 0.5], 0.1), [false, true, false]);
        assert_eq!(most_different(&[0.9, 0.8], 0.0), [false, false]);
        assert_eq!(most_different(&[0.9, 0.8], 1.0), [true, true]);
    }

    #[test]
    fn the_gate_decides_after_the_last_probed_layer() {
        let gate = Asks { probe_layers: 3, ..Default::default() }.gate();
        assert_eq!(gate.layers, [1, 2, 3]);
        assert!(gate.validate(4).is_ok() && gate.validate(3).is_err());
        assert!(Asks { recompute: Some(1.5), ..Default::default() }.validate().is_err());
    }
}

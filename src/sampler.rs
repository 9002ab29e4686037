//! From a logits row to the next token: biases, penalties, temperature, top-k, top-p, min-p, one seeded draw.
//!
//! The draw is counter-based: it is a pure function of (seed, branch path, position), so a branch's tokens depend
//! neither on its neighbours nor on scheduling. Ties go to the lowest token id.

use crate::error::{Error, Result};

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in the branch; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens generated before; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the tokens generated before; 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits before anything else: token, bias; no two of one token. Minus infinity bans it.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Refuses values outside their range, by name.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &str, range: &str| {
            if ok { Ok(()) } else { Err(Error::config(field, format!("must be {range}"))) }
        };
        check(self.temperature.is_finite() && self.temperature >= 0.0, "temperature", "a finite number >= 0")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top-p", "in (0, 1]")?;
        check((0.0..1.0).contains(&self.min_p), "min-p", "in [0, 1)")?;
        check(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(), "repetition-penalty", "> 0")?;
        check(self.presence_penalty.is_finite(), "presence-penalty", "finite")?;
        check(self.frequency_penalty.is_finite(), "frequency-penalty", "finite")?;
        let mut tokens: Vec<u32> = self.logit_bias.iter().map(|(token, _)| *token).collect();
        tokens.sort_unstable();
        check(tokens.windows(2).all(|pair| pair[0] != pair[1]), "logit-bias", "of different tokens")?;
        let sane = |bias: f32| bias.is_finite() || bias == f32::NEG_INFINITY;
        check(self.logit_bias.iter().all(|(_, bias)| sane(*bias)), "logit-bias", "finite, or -inf to ban the token")
    }

    /// Refuses truncations that cannot act: at temperature 0 the most likely token is taken whatever else is kept.
    pub fn refuse_idle(&self) -> Result<()> {
        let given = [("top-k", self.top_k != 0), ("top-p", self.top_p != 1.0), ("min-p", self.min_p != 0.0)];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) if self.temperature == 0.0 => {
                Err(Error::config(field, "changes nothing at temperature 0, which is greedy; give a temperature too"))
            }
            _ => Ok(()),
        }
    }

    /// True when the most likely token is always taken, so that no logits need to leave the device.
    pub fn is_argmax(&self) -> bool {
        self.temperature == 0.0 && !self.has_penalties() && self.logit_bias.is_empty()
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Where a draw stands: nothing else may influence it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrawKey {
    /// Hash of the path from the root of the branch tree.
    pub path: u64,
    /// Position of the token to be drawn.
    pub position: u64,
}

/// Chooses a token from one row, to which biases have been added already. `prompt` are the branch's tokens before generation, `generated` those since;
/// `logits` is scratch afterwards.
pub fn sample(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], generated: &[u32], key: DrawKey) -> u32 {
    if params.has_penalties() {
        penalise(logits, params, prompt, generated);
    }
    if params.temperature == 0.0 {
        return argmax(logits);
    }
    let mut kept = candidates(logits, params);
    keep_top_p(&mut kept, params.top_p);
    let total: f64 = kept.iter().map(|c| c.weight).sum();
    let mut left = uniform(params.seed, key) * total;
    for c in &kept {
        left -= c.weight;
        if left < 0.0 {
            return c.token;
        }
    }
    kept.last().map_or(0, |c| c.token)
}

/// The largest logit's index; the lowest among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// The `k` largest logits with their token ids, largest first (ties: lowest id first).
pub fn top_k(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
    let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if k > 0 && k < all.len() {
        all.select_nth_unstable_by(k - 1, by_logit);
        all.truncate(k);
    }
    all.sort_unstable_by(by_logit);
    all
}

struct Candidate {
    token: u32,
    /// exp((logit - max) / temperature): proportional to the probability.
    weight: f64,
}

/// Tokens that survive top-k and min-p, most likely first (ties: lowest id first).
fn candidates(logits: &[f32], params: &SamplingParams) -> Vec<Candidate> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let floor = f64::from(params.min_p);
    let mut kept: Vec<Candidate> = logits
        .iter()
        .enumerate()
        .map(|(i, &x)| Candidate {
            token: i as u32,
            weight: (f64::from(x - max) / f64::from(params.temperature)).exp(),
        })
        .filter(|c| c.weight > 0.0 && c.weight >= floor)
        .collect();
    let by_weight = |a: &Candidate, b: &Candidate| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token));
    let k = params.top_k as usize;
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k, by_weight);
        kept.truncate(k);
    }
    kept.sort_unstable_by(by_weight);
    kept
}

/// Cuts after the token at which the cumulative probability reaches `top_p`; at least one token stays.
fn keep_top_p(kept: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let total: f64 = kept.iter().map(|c| c.weight).sum();
    let mut sum = 0.0;
    for i in 0..kept.len() {
        sum += kept[i].weight;
        if sum >= f64::from(top_p) * total {
            return kept.truncate(i + 1);
        }
    }
}

fn penalise(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) {
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = prompt.iter().chain(generated).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for &token in &seen {
            if let Some(x) = logits.get_mut(token as usize) {
                *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
            }
        }
    }
    let mut counted: Vec<u32> = generated.to_vec();
    counted.sort_unstable();
    for run in counted.chunk_by(|a, b| a == b) {
        if let Some(x) = logits.get_mut(run[0] as usize) {
            *x -= params.presence_penalty + params.frequency_penalty * run.len() as f32;
        }
    }
}

/// A uniform number in [0, 1), a pure function of its arguments.
pub(crate) fn uniform(seed: u64, key: DrawKey) -> f64 {
    let bits = mix(mix(mix(seed) ^ key.path) ^ key.position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The path hash of child number `ordinal` of a branch whose path hash is `parent`.
pub fn child_path(parent: u64, ordinal: u64) -> u64 {
    mix(parent ^ mix(ordinal.wrapping_add(1)))
}

/// The splitmix64 finaliser: every input bit reaches every output bit.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f32], params: &SamplingParams, position: u64) -> u32 {
        sample(&mut logits.to_vec(), params, &[], &[], DrawKey { path: 3, position })
    }

    #[test]
    fn greedy_ties_go_to_the_lowest_id() {
        assert_eq!(draw(&[1.0, 4.0, 4.0, 2.0], &SamplingParams::default(), 0), 1);
    }

    #[test]
    fn top_k_of_one_and_tiny_top_p_are_greedy() {
        let logits = [0.3, 2.0, 2.0, -1.0];
        for position in 0..200 {
            let k1 = SamplingParams { temperature: 1.5, top_k: 1, ..Default::default() };
            let p0 = SamplingParams { temperature: 1.5, top_p: 1e-9, ..Default::default() };
            assert_eq!(draw(&logits, &k1, position), 1);
            assert_eq!(draw(&logits, &p0, position), 1);
        }
    }

    #[test]
    fn a_draw_is_a_function_of_seed_path_and_position_alone() {
        let params = SamplingParams { temperature: 1.0, seed: 7, ..Default::default() };
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let once: Vec<u32> = (0..100).map(|p| draw(&logits, &params, p)).collect();
        let again: Vec<u32> = (0..100).map(|p| draw(&logits, &params, p)).collect();
        assert_eq!(once, again);
        let other = SamplingParams { seed: 8, ..params };
        assert_ne!(once, (0..100).map(|p| draw(&logits, &other, p)).collect::<Vec<_>>());
    }

    /// Chi-square over 100,000 draws; the bound is the 0.999 quantile for the degrees of freedom.
    #[test]
    fn draws_follow_the_softmax_and_its_truncations() {
        let logits = [1.0f32, 0.5, 0.0, -0.5, -1.0, 2.0];
        let cases: [(SamplingParams, &[usize], f64); 4] = [
            (SamplingParams { temperature: 1.0, ..Default::default() }, &[0, 1, 2, 3, 4, 5], 20.52),
            (SamplingParams { temperature: 0.7, top_k: 3, ..Default::default() }, &[0, 1, 5], 13.82),
            (SamplingParams { temperature: 1.0, top_p: 0.8, ..Default::default() }, &[0, 1, 5], 13.82),
            (SamplingParams { temperature: 1.0, min_p: 0.2, ..Default::default() }, &[0, 1, 5], 13.82),
        ];
        for (params, kept, bound) in cases {
            let weight = |i: usize| (f64::from(logits[i]) / f64::from(params.temperature)).exp();
            let total: f64 = kept.iter().map(|&i| weight(i)).sum();
            let n = 100_000;
            let mut counts = [0u32; 6];
            for position in 0..n {
                counts[draw(&logits, &params, position) as usize] += 1;
            }
            let chi: f64 = kept
                .iter()
                .map(|&i| {
                    let expected = n as f64 * weight(i) / total;
                    (f64::from(counts[i]) - expected).powi(2) / expected
                })
                .sum();
            assert!(chi < bound, "{params:?}: chi-square {chi}, counts {counts:?}");
            assert_eq!(kept.iter().map(|&i| counts[i]).sum::<u32>(), n as u32);
        }
    }

    #[test]
    fn penalties_match_their_formulas() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Default::default()
        };
        let mut logits = vec![2.0, -2.0, 4.0, 1.0];
        penalise(&mut logits, &params, &[0, 1], &[2, 2]);
        assert_eq!(logits, [1.0, -4.0, 2.0 - 0.5 - 0.5, 1.0]);
    }

    #[test]
    fn out_of_range_parameters_are_refused_by_name() {
        let bad = SamplingParams { top_p: 0.0, ..Default::default() };
        assert!(bad.validate().unwrap_err().to_string().contains("top-p"));
    }
}

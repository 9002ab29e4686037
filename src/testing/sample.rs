//! Sampling with fixed-point weights: integers alone from the logits on, so that a device which does the same chooses the
//! same token without exception. `sampler::sample`, which sums f64, differs from it only where a draw falls within about
//! 2^-30 of a boundary between two tokens.

use std::collections::HashMap;

use crate::sampler::{DrawKey, SamplingParams};

/// Weight of the most likely token.
const UNIT_BITS: u32 = 44;

/// 1 - f p(f) = 2^-f on \[0, 1), from the highest power down, in 2^-32: p interpolated at seven Chebyshev nodes.
const POWERS: [u32; 7] = [0x0000_bda6, 0x0009_c200, 0x0057_28b0, 0x0276_41a9, 0x0e35_8127, 0x3d7f_7bcb, 0xb172_17f7];

/// What is asked of a row.
pub struct Request<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Tokens before generation.
    pub prompt: &'a [u32],
    /// Tokens since.
    pub generated: &'a [u32],
    /// Added first: token, bias.
    pub bias: &'a [(u32, f32)],
    /// Where the draw stands.
    pub key: DrawKey,
}

/// The logits after biases and penalties.
pub fn penalised(logits: &[f32], request: &Request<'_>) -> Vec<f32> {
    let params = request.params;
    let mut uses: HashMap<usize, u32> = HashMap::new();
    for &token in request.prompt {
        uses.entry(token as usize).or_default();
    }
    for &token in request.generated {
        *uses.entry(token as usize).or_default() += 1;
    }
    let mut y = logits.to_vec();
    for &(token, bias) in request.bias {
        if let Some(y) = y.get_mut(token as usize) {
            *y += bias;
        }
    }
    for (token, count) in uses {
        let Some(y) = y.get_mut(token) else { continue };
        if params.repetition_penalty != 1.0 {
            *y = if *y > 0.0 { *y / params.repetition_penalty } else { *y * params.repetition_penalty };
        }
        if count > 0 {
            *y -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
    y
}

/// The token that the request chooses.
pub fn sample(logits: &[f32], request: &Request<'_>) -> u32 {
    let y = penalised(logits, request);
    let params = request.params;
    if params.temperature == 0.0 {
        return crate::sampler::argmax(&y);
    }
    // Never -0, from which 0 would be at a distance of -0.
    let max = y.iter().copied().fold(f32::NEG_INFINITY, f32::max) + 0.0;
    let floor = fixed(params.min_p, UNIT_BITS).max(1);
    let weight = Weight::new(params.temperature);
    let mut kept: Vec<(u32, u32, u64)> = (0..)
        .zip(&y)
        .map(|(token, &y)| ((max - y).to_bits(), token))
        .map(|(distance, token)| (distance, token, weight.of(distance)))
        .filter(|&(_, _, weight)| weight >= floor)
        .collect();
    kept.sort_unstable();
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let product = u128::from(fixed(params.top_p, 64)) * mass(&kept);
        kept.truncate(reaches(&kept, product.div_ceil(1 << 64).max(1)) + 1);
    }
    let uniform = u128::from(mix(mix(mix(params.seed) ^ request.key.path) ^ request.key.position) >> 11);
    let target = ((uniform * mass(&kept)) >> 53) + 1;
    kept.get(reaches(&kept, target)).map_or(0, |&(_, token, _)| token)
}

fn mass(kept: &[(u32, u32, u64)]) -> u128 {
    kept.iter().map(|&(_, _, weight)| u128::from(weight)).sum()
}

/// The first place at which the mass reaches `target`.
fn reaches(kept: &[(u32, u32, u64)], target: u128) -> usize {
    let mut sum = 0;
    kept.iter()
        .position(|&(_, _, weight)| {
            sum += u128::from(weight);
            sum >= target
        })
        .unwrap_or(kept.len())
}

/// ceil(x * 2^bits) for x in \[0, 1).
fn fixed(x: f32, bits: u32) -> u64 {
    let scaled = f64::from(x) * 2f64.powi(bits as i32);
    // Exact: 24 bits, and the ceiling of what has more binary places than f64 is asked for is 1.
    scaled.ceil() as u64
}

/// exp(-distance / temperature) in units of 2^-UNIT_BITS.
struct Weight {
    scale: u64,
    shift: i32,
}

impl Weight {
    fn new(temperature: f32) -> Self {
        let bits = temperature.max(f32::MIN_POSITIVE).to_bits();
        let mantissa = u64::from(bits & 0x7f_ffff | 0x80_0000);
        // log2(e) * 2^63
        let quotient = 0xb8aa_3b29_5c17_f0bc / mantissa;
        let zeros = quotient.leading_zeros();
        Self { scale: quotient << zeros >> 32, shift: (zeros + (bits >> 23)) as i32 - 1 }
    }

    /// `distance` is that of a logit to the largest, as bits of an f32; NaN and infinity weigh nothing.
    fn of(&self, distance: u32) -> u64 {
        if distance >= f32::INFINITY.to_bits() {
            return 0;
        }
        let exponent = distance >> 23;
        let mantissa = u64::from(distance & 0x7f_ffff | if exponent > 0 { 0x80_0000 } else { 0 });
        let shift = self.shift - exponent.max(1) as i32;
        if shift <= 16 {
            return 0;
        }
        let octaves = (mantissa * self.scale).checked_shr(shift as u32).unwrap_or(0);
        if octaves >> 32 > u64::from(UNIT_BITS) + 1 {
            return 0;
        }
        let f = octaves & 0xffff_ffff;
        let p = POWERS[1..].iter().fold(u64::from(POWERS[0]), |p, &c| u64::from(c) - ((p * f) >> 32));
        let power = (1 << 32) - ((p * f) >> 32);
        ((power << (UNIT_BITS - 31) >> (octaves >> 32)) + 1) >> 1
    }
}

/// The splitmix64 finaliser.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_exponentials() {
        for temperature in [1e-3f32, 0.1, 0.7, 1.0, 1.3, 50.0, 1e9] {
            let weight = Weight::new(temperature);
            assert_eq!(weight.of(0), 1 << UNIT_BITS);
            for i in 0..20_000 {
                let distance = (i as f32 * 0.002 + 1e-4) * temperature;
                let exact = (-f64::from(distance) / f64::from(temperature)).exp();
                let got = weight.of(distance.to_bits()) as f64 / 2f64.powi(UNIT_BITS as i32);
                let bound = if exact > 1e-5 { (1e-8 * exact).min(2f64.powi(-30)) } else { 1e-13 };
                assert!((got - exact).abs() < bound, "{temperature} {distance}: {got:e} {exact:e}");
            }
            assert_eq!(weight.of((40.0 * temperature).to_bits()), 0);
        }
        assert_eq!((Weight::new(1.0).of(f32::INFINITY.to_bits()), Weight::new(1.0).of(f32::NAN.to_bits())), (0, 0));
    }

    #[test]
    fn fixed_point_shares_are_rounded_up() {
        assert_eq!((fixed(0.0, 64), fixed(0.5, 64), fixed(0.25, 44)), (0, 1 << 63, 1 << 42));
        assert_eq!((fixed(1e-30, 44), fixed(f32::from_bits(0x3f7f_ffff), 64)), (1, u64::MAX - 0xff_ffff_ffff));
    }
}

//! E4M3 without infinities: a sign, four bits of exponent, three of mantissa.

/// 2^120: what exponents of 4 bits lack in f32 (bias 127 instead of 7).
const REBIAS: f32 = f32::from_bits((127 + 120) << 23);
/// The codes that are no number, but for their sign.
const NAN: u8 = 0x7f;

/// The number, which f32 (and bf16, and f16) holds exactly; subnormal ones need no case of their own.
pub(super) fn widen(code: u8) -> f32 {
    let (sign, rest) = (u32::from(code & 0x80) << 24, code & 0x7f);
    if rest == NAN { f32::NAN } else { f32::from_bits(sign | u32::from(rest) << 20) * REBIAS }
}

/// Index of the first code that is no number.
pub(super) fn first_nan(codes: &[u8]) -> Option<usize> {
    // A branch-free sweep over each chunk, then a search of the one that has a culprit.
    codes.chunks(4096).enumerate().find_map(|(i, chunk)| {
        let clean = chunk.iter().fold(true, |clean, code| clean & (code & 0x7f != NAN));
        if clean { None } else { chunk.iter().position(|code| code & 0x7f == NAN).map(|at| i * 4096 + at) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_the_number_of_its_definition() {
        for code in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let size = match exponent {
                0 => mantissa / 8.0 * 2f64.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            let want = if code & 0x80 == 0 { size } else { -size };
            match code & 0x7f {
                NAN => assert!(widen(code).is_nan()),
                _ => assert_eq!(f64::from(widen(code)), want, "{code:#x}"),
            }
        }
        assert_eq!([widen(0x7e), widen(0x01), widen(0xb8)], [448.0, 0.001953125, -1.0]);
    }

    #[test]
    fn a_code_without_a_number_is_found_wherever_it_is() {
        let mut codes = vec![0x7eu8; 9000];
        assert_eq!(first_nan(&codes), None);
        for at in [8999, 4096, 17] {
            codes[at] = if at == 17 { 0xff } else { 0x7f };
            assert_eq!(first_nan(&codes), Some(at));
        }
    }
}

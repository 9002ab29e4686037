//! Exact intervals of proportions.

/// The two-sided Clopper-Pearson interval of a proportion of which `k` of `n` were seen: the proportions under which
/// neither so few nor so many would be improbable. With nothing seen (`n` 0) it is everything.
pub fn clopper_pearson(k: usize, n: usize, confidence: f64) -> [f64; 2] {
    let side = (1.0 - confidence) / 2.0;
    if n == 0 || k > n {
        return [0.0, 1.0];
    }
    let upper = |k: usize| if k == n { 1.0 } else { root(|p| at_most(k, n, p) > side) };
    // At least k of n are at most n - k of the others.
    [1.0 - upper(n - k), upper(k)]
}

/// The largest `p` in (0, 1) of which `holds`; it holds up to there and not beyond.
fn root(holds: impl Fn(f64) -> bool) -> f64 {
    let (mut lo, mut hi) = (0.0, 1.0);
    for _ in 0..60 {
        let mid = (lo + hi) / 2.0;
        if holds(mid) { lo = mid } else { hi = mid }
    }
    (lo + hi) / 2.0
}

/// Probability of at most `k` of `n`, each with probability `p` in (0, 1).
fn at_most(k: usize, n: usize, p: f64) -> f64 {
    // Term i + 1 is term i times (n - i) / (i + 1) * odds; in logarithms, for (1 - p)^n can be too small for a number.
    let (mut ln_term, ln_odds) = (n as f64 * (-p).ln_1p(), p.ln() - (-p).ln_1p());
    let mut sum = ln_term.exp();
    for i in 0..k {
        ln_term += ((n - i) as f64 / (i + 1) as f64).ln() + ln_odds;
        sum += ln_term.exp();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published tables: 81 of 263, 15 of 148, 0 of 20 and 1 of 29 (Newcombe 1998, method 5).
    #[test]
    fn intervals_of_textbook_cases() {
        for (k, n, lo, hi) in
            [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)]
        {
            let [l, u] = clopper_pearson(k, n, 0.95);
            assert!((l - lo).abs() < 5e-5 && (u - hi).abs() < 5e-5, "{k} of {n}: {l} {u}");
        }
    }

    #[test]
    fn none_seen_has_a_closed_form_and_all_seen_is_its_mirror() {
        let hi = 1.0 - 0.025f64.powf(1.0 / 1100.0);
        let [lo, got] = clopper_pearson(0, 1100, 0.95);
        assert!(lo.abs() < 1e-12 && (got - hi).abs() < 1e-9, "{lo} {got} {hi}");
        let [mirrored, one] = clopper_pearson(1100, 1100, 0.95);
        assert!((mirrored - (1.0 - hi)).abs() < 1e-9 && one == 1.0);
        assert_eq!(clopper_pearson(0, 0, 0.95), [0.0, 1.0]);
    }

    #[test]
    fn large_numbers_stay_numbers() {
        let [lo, hi] = clopper_pearson(50_000, 100_000, 0.95);
        assert!((lo - 0.4969).abs() < 1e-4 && (hi - 0.5031).abs() < 1e-4, "{lo} {hi}");
    }
}

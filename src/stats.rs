//! Intervals for proportions, exact ones: they hold at the stated confidence for every n. And a score interval for the
//! difference of two proportions of the same trials.

/// The one-sided Clopper-Pearson upper limit of a proportion of which `k` of `n` were seen: were it larger, `k` or fewer
/// would come up with a probability below `1 - confidence`. With nothing known (`n` 0) it is 1.
pub fn upper_limit(k: usize, n: usize, confidence: f64) -> f64 {
    if k >= n {
        return 1.0;
    }
    if k == 0 {
        return 1.0 - (1.0 - confidence).powf(1.0 / n as f64);
    }
    // The probability of at most k falls as p grows; 60 halvings leave less than an f64 can tell.
    let coefficients = ln_binomials(k, n);
    let (mut lo, mut hi) = (k as f64 / n as f64, 1.0);
    for _ in 0..60 {
        let p = 0.5 * (lo + hi);
        if at_most(&coefficients, n, p) > 1.0 - confidence {
            lo = p;
        } else {
            hi = p;
        }
    }
    hi
}

/// Logarithms of n over i, for i up to `k`.
fn ln_binomials(k: usize, n: usize) -> Vec<f64> {
    let step = |sum: &mut f64, i: usize| {
        let before = *sum;
        *sum += ((n - i) as f64 / (i + 1) as f64).ln();
        Some(before)
    };
    (0..=k).scan(0.0, step).collect()
}

/// Probability of fewer events than there are coefficients, in `n` trials of probability `p`.
fn at_most(coefficients: &[f64], n: usize, p: f64) -> f64 {
    let (yes, no) = (p.ln(), (-p).ln_1p());
    coefficients.iter().enumerate().map(|(i, c)| (c + i as f64 * yes + (n - i) as f64 * no).exp()).sum()
}

/// The one-sided Clopper-Pearson lower limit: `upper_limit` seen from the other side.
pub fn lower_limit(k: usize, n: usize, confidence: f64) -> f64 {
    if k > n { 1.0 } else { 1.0 - upper_limit(n - k, n, confidence) }
}

/// The two-sided Clopper-Pearson interval.
pub fn clopper_pearson(k: usize, n: usize, confidence: f64) -> [f64; 2] {
    let side = 0.5 + 0.5 * confidence;
    [lower_limit(k, n, side), upper_limit(k, n, side)]
}

/// Standard normal quantile of a two-sided 95 % interval.
pub const Z_TWO_SIDED: f64 = 1.959_964;
/// Of a one-sided 95 % bound.
pub const Z_ONE_SIDED: f64 = 1.644_854;

/// Tango's score interval (Statistics in Medicine 17, 1998) for the difference of two proportions of the same `n` trials,
/// the second's less the first's: `lost` trials succeeded in the first alone, `won` in the second alone. Its ends are
/// where the score test of that difference has the value `z`; trials that ended alike count by their number. With nothing
/// known it is everything.
pub fn paired_difference(lost: usize, won: usize, n: usize, z: f64) -> [f64; 2] {
    if n == 0 {
        return [-1.0, 1.0];
    }
    let (b, c, n) = (lost as f64, won as f64, n as f64);
    // How many standard deviations the data lie above a difference `d`, with the likeliest nuisance parameter under it.
    let score = |d: f64| {
        let (square, linear, constant) = (2.0 * n, (2.0 * n + b - c) * d - b - c, -b * d * (1.0 - d));
        let q = ((linear * linear - 4.0 * square * constant).max(0.0).sqrt() - linear) / (2.0 * square);
        let variance = n * (2.0 * q + d * (1.0 - d));
        let above = c - b - n * d;
        match variance > 0.0 {
            true => above / variance.sqrt(),
            false if above == 0.0 => 0.0,
            false => above.signum() * f64::INFINITY,
        }
    };
    let solve = |value: f64, mut lo: f64, mut hi: f64| {
        for _ in 0..60 {
            let d = 0.5 * (lo + hi);
            if score(d) > value {
                lo = d;
            } else {
                hi = d;
            }
        }
        0.5 * (lo + hi)
    };
    let seen = (c - b) / n;
    [solve(z, -1.0, seen), solve(-z, seen, 1.0)]
}

/// How many trials without a single event show that a proportion is at most `limit`.
pub fn trials_needed(limit: f64, confidence: f64) -> f64 {
    ((1.0 - confidence).ln() / (1.0 - limit).ln()).ceil()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64, within: f64) {
        assert!((got - want).abs() <= within, "{got} {want}");
    }

    /// Published tables: 81 of 263 and 15 of 148 (Newcombe 1998, method 5), 0 of 20 and 1 of 29.
    #[test]
    fn intervals_of_textbook_cases() {
        for (k, n, lo, hi) in
            [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)]
        {
            let [l, u] = clopper_pearson(k, n, 0.95);
            close(l, lo, 5e-5);
            close(u, hi, 5e-5);
        }
    }

    #[test]
    fn the_limit_is_where_so_few_become_improbable() {
        for (k, n) in [(0, 1), (0, 200), (1, 200), (3, 200), (17, 60), (8, 750), (250, 500), (59, 60), (4, 100_000)] {
            for confidence in [0.9, 0.95, 0.99] {
                let p = upper_limit(k, n, confidence);
                close(at_most(&ln_binomials(k, n), n, p), 1.0 - confidence, 1e-9);
            }
        }
    }

    #[test]
    fn without_an_event_the_limit_is_a_root() {
        close(upper_limit(0, 200, 0.95), 0.014867, 5e-7);
        close(upper_limit(0, 500, 0.95), 1.0 - 0.05f64.powf(1.0 / 500.0), 1e-12);
    }

    #[test]
    fn the_limits_of_the_limits() {
        assert_eq!((upper_limit(0, 0, 0.95), upper_limit(5, 5, 0.95), upper_limit(6, 5, 0.95)), (1.0, 1.0, 1.0));
        assert_eq!((lower_limit(0, 5, 0.95), lower_limit(0, 0, 0.95)), (0.0, 0.0));
        assert!((1..200).all(|k| upper_limit(k, 200, 0.95) > upper_limit(k - 1, 200, 0.95)));
        assert!((5..200).all(|n| upper_limit(3, n, 0.95) < upper_limit(3, n - 1, 0.95)));
    }

    /// Airway hyper-responsiveness of 21 children (Fagerland, Lydersen and Laake 2014): 1 and 7 that changed, -0.517 to
    /// -0.026.
    #[test]
    fn the_paired_interval_of_a_textbook_case() {
        let [lo, hi] = paired_difference(7, 1, 21, Z_TWO_SIDED);
        close(lo, -0.517, 5e-4);
        close(hi, -0.026, 5e-4);
        let [l, h] = paired_difference(1, 7, 21, Z_TWO_SIDED);
        close(l, -hi, 1e-12);
        close(h, -lo, 1e-12);
    }

    /// Without a change the bound is z^2 / (n + z^2), as Wilson's at 0: there the two score tests are the same.
    #[test]
    fn without_a_change_the_paired_bound_is_wilsons() {
        let z2 = Z_TWO_SIDED * Z_TWO_SIDED;
        for n in [1, 20, 500, 2000] {
            let [lo, hi] = paired_difference(0, 0, n, Z_TWO_SIDED);
            close(hi, z2 / (n as f64 + z2), 1e-9);
            close(lo, -hi, 1e-9);
        }
        assert_eq!(paired_difference(0, 0, 0, Z_TWO_SIDED), [-1.0, 1.0]);
    }

    #[test]
    fn more_losses_lower_the_paired_bound() {
        let bound = |lost, won| paired_difference(lost, won, 2000, Z_ONE_SIDED)[0];
        assert!((1..100).all(|b| bound(b, 3) < bound(b - 1, 3)));
        assert!((1..100).all(|c| bound(20, c) > bound(20, c - 1)));
        // 1 point lost, 25 against 5: the bound lies between that and 2 points, not below.
        assert!(bound(25, 5) < -0.01 && bound(25, 5) > -0.02, "{}", bound(25, 5));
    }

    #[test]
    fn a_target_takes_so_many_trials() {
        assert_eq!((trials_needed(0.02, 0.95), trials_needed(0.005, 0.95)), (149.0, 598.0));
        assert!(upper_limit(0, 149, 0.95) <= 0.02 && upper_limit(0, 148, 0.95) > 0.02);
        assert!(trials_needed(0.0, 0.95).is_infinite());
    }
}

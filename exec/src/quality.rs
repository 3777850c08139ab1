//! What a compressed cache loses, by the logits of two runs over the same tokens. Natural logarithms, sums in f64.

use batchmax_kernels::sample::argmax;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Share of the resampled means that an [`Interval`] holds.
pub const LEVEL: f64 = 0.9;
/// Resamplings behind an interval.
const RESAMPLED: usize = 10_000;

/// Log of the sum of exponentials, which normalises logits.
fn log_sum(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
    f64::from(most) + sum.ln()
}

/// KL(p || q) of the distributions that two rows of logits `[vocab]` stand for, nats; never under 0.
#[must_use]
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (log_p, log_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - log_p, f64::from(*q) - log_q);
        if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
    });
    // Rounding can leave equal rows a hair under 0.
    terms.sum::<f64>().max(0.0)
}

/// Negative log-likelihood of a token, nats.
#[must_use]
pub fn nll(logits: &[f32], token: u32) -> f64 {
    log_sum(logits) - f64::from(logits[token as usize])
}

/// The token with the best logit, the first of equals.
#[must_use]
pub fn top(logits: &[f32]) -> u32 {
    argmax(logits).0
}

/// The mean; 0 of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// A mean and where it may lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The mean of the values.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The mean with its percentile bootstrap interval of level [`LEVEL`]. Values that belong to the same samples are paired
/// by taking their differences first. Same values, same interval.
#[must_use]
pub fn bootstrap(values: &[f64]) -> Interval {
    let mean = mean(values);
    if values.len() < 2 {
        return Interval { mean, low: mean, high: mean };
    }
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut means: Vec<f64> = (0..RESAMPLED)
        .map(|_| {
            let sum: f64 =
                (0..values.len()).map(|_| values[random.random_range(0..values.len())]).sum();
            sum / values.len() as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[(share * (RESAMPLED - 1) as f64).round() as usize];
    let tail = (1.0 - LEVEL) / 2.0;
    Interval { mean, low: at(tail), high: at(1.0 - tail) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-7
    }

    #[test]
    fn divergence_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
        let (p, q) = ([0.0, 0.0], [0.0, 3.0f32.ln()]);
        assert!(near(kl(&p, &q), 0.5 * (4.0f64 / 3.0).ln()), "{}", kl(&p, &q));
        // The other way round: 1/4 ln 1/2 + 3/4 ln 3/2.
        assert!(near(kl(&q, &p), 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln()), "{}", kl(&q, &p));
        // A shift of all logits is the same distribution.
        assert!(kl(&q, &[5.0, 5.0 + 3.0f32.ln()]) < 1e-7);
        assert_eq!(kl(&[1.0, -2.0, 3.0], &[1.0, -2.0, 3.0]), 0.0);
        // What p excludes adds nothing, however unlikely q finds it.
        assert!(near(kl(&[0.0, f32::NEG_INFINITY], &p), 2.0f64.ln()));
    }

    #[test]
    fn likelihoods_by_hand() {
        let logits = [0.0, 3.0f32.ln()];
        assert!(near(nll(&logits, 0), 4.0f64.ln()) && near(nll(&logits, 1), (4.0f64 / 3.0).ln()));
        // Large logits do not overflow.
        assert!(near(nll(&[1e4, 1e4], 1), 2.0f64.ln()));
        assert_eq!((top(&logits), top(&[2.0, 2.0])), (1, 0));
    }

    #[test]
    fn intervals_hold_the_mean_and_repeat() {
        let values = [0.0, 1.0, 2.0, 5.0];
        let found = bootstrap(&values);
        assert_eq!(found, bootstrap(&values));
        assert_eq!(found.mean, 2.0);
        // The smallest of the 4^4 equally likely means is 0 (1 of 256), 0.25 comes 4 times, 0.5 10 times: 5 % of them
        // lie at or under 0.5; above, 5 has 1, (5,5,5,2) 4, (5,5,5,1) 4, (5,5,5,0) and (5,5,2,2) 10: 5 % reach 3.75
        // or 3.5.
        assert!((0.25..=0.5).contains(&found.low), "{found:?}");
        assert!((3.5..=4.0).contains(&found.high), "{found:?}");
        assert_eq!(bootstrap(&[3.0]), Interval { mean: 3.0, low: 3.0, high: 3.0 });
        assert_eq!(bootstrap(&[2.0; 8]), Interval { mean: 2.0, low: 2.0, high: 2.0 });
    }
}

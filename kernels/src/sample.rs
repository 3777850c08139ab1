//! The choice of a token from logits.

use crate::simd::{LANES, Simd, isa, multiversion};

/// The id of the largest logit, the lowest one among equals, and its distance to the second largest. NaN never wins.
///
/// # Panics
/// If there is no logit.
#[must_use]
pub fn argmax(logits: &[f32]) -> (u32, f32) {
    assert!(!logits.is_empty(), "no logits");
    // SAFETY: the instruction set is the processor's own.
    let (best, second) = unsafe { two_best(isa(), logits) };
    let id = logits.iter().position(|x| *x == best).unwrap_or(0);
    (id as u32, if logits.len() == 1 { f32::INFINITY } else { best - second })
}

multiversion! { unsafe fn two_best(logits: &[f32]) -> (f32, f32) = two_best_body }

#[inline(always)]
unsafe fn two_best_body<S: Simd>(s: S, logits: &[f32]) -> (f32, f32) {
    let low = s.splat(f32::NEG_INFINITY);
    let (mut best, mut second) = (low, low);
    for at in (0..logits.len()).step_by(LANES) {
        let n = LANES.min(logits.len() - at);
        // SAFETY: n elements remain.
        let v = unsafe { s.load_part(logits.as_ptr().add(at), n, f32::NEG_INFINITY) };
        // A NaN compares as not greater, so it is replaced.
        let v = s.select_lt(low, v, v, low);
        second = s.max(second, s.min(best, v));
        best = s.max(best, v);
    }
    let (firsts, seconds) = (s.to_array(best), s.to_array(second));
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for x in firsts.into_iter().chain(seconds) {
        if x > best {
            (best, second) = (x, best);
        } else if x > second {
            second = x;
        }
    }
    (best, second)
}

/// A token drawn from the smallest set of most likely tokens whose probability reaches `top_p`, at `temperature`, by
/// `uniform` in 0..1. The same arguments give the same token.
///
/// # Panics
/// If there is no logit or the temperature is not above zero.
#[must_use]
pub fn top_p(logits: &[f32], temperature: f32, top_p: f32, uniform: f32) -> u32 {
    assert!(temperature > 0.0, "temperature {temperature}");
    let (best, _) = argmax(logits);
    let (highest, inverse) = (f64::from(logits[best as usize]), 1.0 / f64::from(temperature));
    let mut weights: Vec<(f64, u32)> = logits
        .iter()
        .zip(0u32..)
        .map(|(x, id)| (((f64::from(*x) - highest) * inverse).exp(), id))
        .filter(|(weight, _)| *weight > 0.0)
        .collect();
    let total: f64 = weights.iter().map(|(weight, _)| weight).sum();
    let mut wanted = total;
    if top_p < 1.0 {
        wanted = total * f64::from(top_p.max(0.0));
        // Tokens below this hold less than 1 - top_p together, so the set lies among the others, which are few.
        let least = (total - wanted) / logits.len() as f64;
        weights.retain(|(weight, _)| *weight >= least);
        weights.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut sum = 0.0;
        let count = weights.iter().position(|(weight, _)| {
            sum += weight;
            sum >= wanted
        });
        weights.truncate(count.map_or(weights.len(), |c| c + 1));
        wanted = weights.iter().map(|(weight, _)| weight).sum();
    }
    let target = wanted * f64::from(uniform.clamp(0.0, 1.0));
    let mut sum = 0.0;
    let drawn = weights.iter().find(|(weight, _)| {
        sum += weight;
        sum > target
    });
    drawn.or(weights.last()).map_or(best, |(_, id)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_finds_the_lowest_best_and_the_gap() {
        assert_eq!(argmax(&[1.0, 3.0, 2.5, 3.0]), (1, 0.0));
        assert_eq!(argmax(&[1.0, 3.0, 2.5]), (1, 0.5));
        assert_eq!(argmax(&[f32::NAN, -1.0, -2.0]), (1, 1.0));
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 377) % 1000) as f32).collect();
        let (id, gap) = argmax(&logits);
        assert_eq!((logits[id as usize], gap), (999.0, 1.0));
    }

    #[test]
    fn the_draw_walks_the_most_likely_tokens() {
        // Probabilities 0.1, 0.6, 0.3.
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        assert_eq!(top_p(&logits, 1.0, 0.5, 0.99), 1);
        // The set is 1 and 2, of weight 0.9; 1 ends at 2/3.
        assert_eq!(top_p(&logits, 1.0, 0.8, 0.66), 1);
        assert_eq!(top_p(&logits, 1.0, 0.8, 0.67), 2);
        assert_eq!(top_p(&logits, 1.0, 0.8, 1.0), 2);
        // All tokens, in the order of their ids.
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.05), 0);
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.15), 1);
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.75), 2);
        // A low temperature leaves the best.
        assert_eq!(top_p(&logits, 0.01, 1.0, 0.5), 1);
        assert_eq!(top_p(&logits, 1.0, 0.0, 0.5), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.5).collect();
        let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let mut counts = vec![0u32; 50];
        let draws = 100_000;
        for i in 0..draws {
            counts[top_p(&logits, 1.0, 1.0, (i as f32 + 0.5) / draws as f32) as usize] += 1;
        }
        for (x, count) in logits.iter().zip(counts) {
            let expected = f64::from(*x).exp() / total;
            assert!((f64::from(count) / f64::from(draws) - expected).abs() < 1e-4);
        }
    }
}

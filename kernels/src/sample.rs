//! The next token from its logits.

/// The best token and its distance to the second best; of equal logits the lowest id. NaN never wins.
#[must_use]
pub fn argmax(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut at, mut second) = (f32::NEG_INFINITY, 0u32, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > best {
            second = best;
            (best, at) = (logit, i as u32);
        } else if logit > second {
            second = logit;
        }
    }
    (at, best - second)
}

/// Draws from the smallest set of tokens whose probability reaches `top_p`, at a temperature; `uniform` in [0, 1).
#[must_use]
pub fn top_p(logits: &[f32], temperature: f32, top_p: f32, uniform: f32) -> u32 {
    let (best, _) = argmax(logits);
    let top = logits[best as usize];
    let mut weights: Vec<(f32, u32)> = logits
        .iter()
        .enumerate()
        .map(|(i, l)| (((l - top) / temperature).exp(), i as u32))
        .filter(|(w, _)| *w > 0.0)
        .collect();
    weights.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let all: f32 = weights.iter().map(|(w, _)| w).sum();
    let mut nucleus = 0.0;
    let mut count = 0;
    for (weight, _) in &weights {
        nucleus += weight;
        count += 1;
        if nucleus >= top_p * all {
            break;
        }
    }
    let mut left = uniform * nucleus;
    for (weight, id) in &weights[..count] {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    weights[..count].last().map_or(best, |(_, id)| *id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_id_and_nan_never_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, f32::NAN, 2.5]), (1, 0.0));
        assert_eq!(argmax(&[f32::NAN, 1.0, 0.5]), (1, 0.5));
    }

    #[test]
    fn top_p_draws_from_the_nucleus() {
        // Probabilities 0.5, 0.25, 0.25.
        let logits = [4f32.ln(), 2f32.ln(), 2f32.ln()];
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.49), 0);
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.51), 1);
        assert_eq!(top_p(&logits, 1.0, 1.0, 0.99), 2);
        assert_eq!(top_p(&logits, 1.0, 0.6, 0.99), 1);
        assert_eq!(top_p(&logits, 1.0, 0.4, 0.99), 0);
    }
}

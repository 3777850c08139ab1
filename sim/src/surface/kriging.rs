//! Weights with which a key that nobody timed borrows from keys that somebody did.

use serde::{Deserialize, Serialize};

use super::KEYS;

/// Neighbours that are asked.
const NEIGHBOURS: usize = 24;

/// How far residuals reach and how noisy they are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kriging {
    /// Multiple of the kernel's usual octaves over which residuals forget each other.
    pub reach: f64,
    /// Share of a residual that is noise of its own key.
    pub nugget: f64,
}

impl Default for Kriging {
    fn default() -> Self {
        Self { reach: 1.0, nugget: 0.02 }
    }
}

impl Kriging {
    /// What a fit chooses from, by leaving keys out.
    pub(super) const CHOICES: [Self; 6] = [
        Self { reach: 1.0, nugget: 0.02 },
        Self { reach: 1.0, nugget: 0.1 },
        Self { reach: 2.0, nugget: 0.02 },
        Self { reach: 2.0, nugget: 0.1 },
        Self { reach: 2.0, nugget: 0.4 },
        Self { reach: 0.5, nugget: 0.02 },
    ];
}

/// Simple kriging with mean zero and a product of exponentials as covariance: weights over `keys` for `target`, and the
/// share of the variance that they explain (0 far from everything, near 1 close to a key).
///
/// Coordinates are octaves divided by the kernel's scales. `skip` leaves a key out.
pub(super) fn weights(
    keys: &[[f64; KEYS]],
    target: &[f64; KEYS],
    skip: Option<usize>,
    kriging: Kriging,
) -> (Vec<(usize, f64)>, f64) {
    let distance = |a: &[f64; KEYS], b: &[f64; KEYS]| -> f64 {
        a.iter().zip(b).map(|(x, y)| (x - y).abs()).sum::<f64>() / kriging.reach
    };
    let mut near: Vec<(f64, usize)> = keys
        .iter()
        .enumerate()
        .filter(|(i, _)| Some(*i) != skip)
        .map(|(i, key)| (distance(key, target), i))
        .collect();
    near.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    near.truncate(NEIGHBOURS);
    if skip.is_none()
        && let Some((d, i)) = near.first()
        && *d < 1e-9
    {
        return (vec![(*i, 1.0)], 1.0);
    }
    let n = near.len();
    let mut matrix = vec![0.0; n * n];
    let mut right = vec![0.0; n];
    for (row, (d, i)) in near.iter().enumerate() {
        right[row] = (-d).exp();
        for (column, (_, j)) in near.iter().enumerate() {
            matrix[row * n + column] = (-distance(&keys[*i], &keys[*j])).exp();
        }
        matrix[row * n + row] += kriging.nugget;
    }
    let covariance = right.clone();
    solve_spd(&mut matrix, &mut right);
    let explained: f64 = right.iter().zip(&covariance).map(|(w, c)| w * c).sum();
    (near.iter().zip(&right).map(|((_, i), w)| (*i, *w)).collect(), explained.clamp(0.0, 1.0))
}

/// Solves `matrix x = right` in place by Cholesky; the matrix is symmetric and positive definite (its nugget sees to it).
pub(crate) fn solve_spd(matrix: &mut [f64], right: &mut [f64]) {
    let n = right.len();
    for column in 0..n {
        for row in column..n {
            let mut sum = matrix[row * n + column];
            for k in 0..column {
                sum -= matrix[row * n + k] * matrix[column * n + k];
            }
            matrix[row * n + column] = if row == column {
                sum.max(1e-12).sqrt()
            } else {
                sum / matrix[column * n + column]
            };
        }
    }
    for row in 0..n {
        let mut sum = right[row];
        for k in 0..row {
            sum -= matrix[row * n + k] * right[k];
        }
        right[row] = sum / matrix[row * n + row];
    }
    for row in (0..n).rev() {
        let mut sum = right[row];
        for k in row + 1..n {
            sum -= matrix[k * n + row] * right[k];
        }
        right[row] = sum / matrix[row * n + row];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timed_key_is_taken_as_it_is() {
        let keys = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]];
        assert_eq!(
            weights(&keys, &[1.0, 0.0, 0.0], None, Kriging::default()),
            (vec![(1, 1.0)], 1.0)
        );
    }

    #[test]
    fn between_two_keys_each_has_half_the_say() {
        let keys = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]];
        let (w, explained) = weights(&keys, &[0.5, 0.0, 0.0], None, Kriging::default());
        assert!((w[0].1 - w[1].1).abs() < 1e-12);
        // By hand: c = e^-0.5, K = [1.02, e^-1]: w = c / (1.02 + e^-1).
        assert!((w[0].1 - (-0.5f64).exp() / (1.02 + (-1.0f64).exp())).abs() < 1e-12);
        // Both weights times their covariance e^-0.5.
        assert!((explained - 2.0 * (-1.0f64).exp() / (1.02 + (-1.0f64).exp())).abs() < 1e-12);
    }

    #[test]
    fn far_away_nothing_is_borrowed() {
        let (w, explained) = weights(&[[0.0; 3]], &[30.0, 0.0, 0.0], None, Kriging::default());
        assert!(w[0].1 < 1e-9 && explained < 1e-9);
    }
}

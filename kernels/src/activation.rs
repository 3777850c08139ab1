//! The gate of the feed-forward block.

use crate::threads::{Threads, for_row_blocks};

/// Non-linearities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x).
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
}

impl Activation {
    fn of(self, x: f32) -> f32 {
        match self {
            Self::Silu => x / (1.0 + fast_exp(-x)),
            Self::GeluTanh => {
                let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                // tanh(y) = 1 - 2 / (e^2y + 1)
                0.5 * x * (2.0 - 2.0 / (fast_exp(2.0 * inner) + 1.0))
            }
        }
    }
}

/// e^x without branches, so that the loop below is vectorised; relative error under 3e-7, saturating at e^88.
fn fast_exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// out = activation(gate) * up; a row of `gate_up` is `ffn` gates, then `ffn` ups.
///
/// # Panics
/// If the slices do not fit each other.
pub fn gated(
    threads: &Threads,
    gate_up: &[f32],
    ffn: usize,
    activation: Activation,
    out: &mut [f32],
) {
    assert!(gate_up.len() == 2 * out.len() && out.len().is_multiple_of(ffn));
    for_row_blocks(threads, out, ffn, 8, |first, rows| {
        for (i, row) in rows.chunks_mut(ffn).enumerate() {
            let at = (first + i) * 2 * ffn;
            let (gate, up) = gate_up[at..at + 2 * ffn].split_at(ffn);
            for ((out, gate), up) in row.iter_mut().zip(gate).zip(up) {
                *out = activation.of(*gate) * up;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_gates_agree_with_f64() {
        for i in -400..400 {
            let x = f64::from(i) * 0.05;
            let silu = x / (1.0 + (-x).exp());
            assert!(
                (f64::from(Activation::Silu.of(x as f32)) - silu).abs() < 2e-6 * (1.0 + x.abs())
            );
            let gelu = 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x.powi(3))).tanh());
            assert!(
                (f64::from(Activation::GeluTanh.of(x as f32)) - gelu).abs()
                    < 3e-6 * (1.0 + x.abs())
            );
        }
    }

    #[test]
    fn gate_then_up() {
        let mut out = [0.0; 2];
        gated(&Threads::new(1), &[0.0, 1.0, 7.0, 3.0], 2, Activation::Silu, &mut out);
        assert_eq!(out[0], 0.0);
        assert!((out[1] - 3.0 * 0.731_058_6).abs() < 1e-5);
    }
}

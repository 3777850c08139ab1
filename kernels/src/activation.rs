//! The gated feed-forward activation.

use crate::simd::math::exp;
use crate::simd::{Isa, LANES, Simd, isa, multiversion};
use crate::threads::Threads;

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x).
    Silu,
    /// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    GeluTanh,
}

/// `out = activation(gate) * up`, where a row of `gate_up` is `ffn` numbers of gate, then `ffn` of up.
///
/// # Panics
/// If `gate_up` is not twice `out`, or `out` is not whole rows.
pub fn gated(
    threads: &Threads,
    gate_up: &[f32],
    ffn: usize,
    activation: Activation,
    out: &mut [f32],
) {
    gated_with(isa(), threads, gate_up, ffn, activation, out);
}

fn gated_with(
    isa: Isa,
    threads: &Threads,
    gate_up: &[f32],
    ffn: usize,
    activation: Activation,
    out: &mut [f32],
) {
    assert!(ffn > 0 && out.len().is_multiple_of(ffn), "out is not whole rows of {ffn}");
    assert_eq!(gate_up.len(), 2 * out.len(), "gate_up is not twice out");
    threads.for_rows(out, ffn, |first, out| {
        for (i, out) in out.chunks_exact_mut(ffn).enumerate() {
            let (gate, up) =
                gate_up[(first + i) * 2 * ffn..(first + i + 1) * 2 * ffn].split_at(ffn);
            // SAFETY: `isa` is available.
            unsafe { run(isa, activation, gate, up, out) };
        }
    });
}

multiversion! { unsafe fn run(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) = body }

#[inline(always)]
unsafe fn body<S: Simd>(s: S, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    let one = s.splat(1.0);
    for at in (0..out.len()).step_by(LANES) {
        let n = LANES.min(out.len() - at);
        // SAFETY: n elements remain in all three.
        unsafe {
            let x = s.load_part(gate.as_ptr().add(at), n, 0.0);
            // Both are x sigmoid(y): (1 + tanh u) / 2 is the sigmoid of 2u, without its cancellation.
            let y = match activation {
                Activation::Silu => x,
                Activation::GeluTanh => {
                    let cubic = s.mul_add(s.mul(s.mul(x, x), s.splat(0.044_715)), x, x);
                    s.mul(s.splat(1.595_769), cubic)
                }
            };
            let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), y))));
            let u = s.load_part(up.as_ptr().add(at), n, 0.0);
            s.store_part(out.as_mut_ptr().add(at), s.mul(s.mul(x, sigmoid), u), n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_activations_match_their_formulas() {
        let threads = Threads::new(2);
        let (rows, ffn) = (3, 37);
        let gate_up: Vec<f32> =
            (0..rows * 2 * ffn).map(|i| ((i * 37) % 101) as f32 * 0.2 - 10.0).collect();
        for isa in Isa::available() {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let mut out = vec![0.0; rows * ffn];
                gated_with(isa, &threads, &gate_up, ffn, activation, &mut out);
                for (i, y) in out.iter().enumerate() {
                    let x = f64::from(gate_up[i / ffn * 2 * ffn + i % ffn]);
                    let up = f64::from(gate_up[i / ffn * 2 * ffn + ffn + i % ffn]);
                    let gate = match activation {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        Activation::GeluTanh => {
                            x / 2.0
                                * (1.0
                                    + ((2.0 / std::f64::consts::PI).sqrt()
                                        * (x + 0.044_715 * x.powi(3)))
                                    .tanh())
                        }
                    };
                    assert!(
                        (f64::from(*y) - gate * up).abs() < 1e-5,
                        "{isa} {activation:?}: {x}, {up}: {y}"
                    );
                }
            }
        }
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let threads = Threads::new(1);
        let mut out = [0.0; 2];
        gated(&threads, &[-1e4, 1e4, 1.0, 2.0], 2, Activation::Silu, &mut out);
        assert_eq!(out[1], 2e4);
        assert!(out[0].abs() < 1e-30);
    }
}

//! Soft cap of logits: `cap * tanh(x / cap)`.

use crate::simd::math::tanh;
use crate::simd::{Isa, LANES, Simd, isa, multiversion};
use crate::threads::Threads;

/// Replaces every x by `cap * tanh(x / cap)`. An infinite cap changes nothing.
pub fn softcap(threads: &Threads, x: &mut [f32], cap: f32) {
    softcap_with(isa(), threads, x, cap);
}

fn softcap_with(isa: Isa, threads: &Threads, x: &mut [f32], cap: f32) {
    /// Elements that tasks share by.
    const CHUNK: usize = 1 << 12;
    if cap.is_infinite() {
        return;
    }
    // SAFETY: `isa` is available.
    let apply = |x: &mut [f32]| unsafe { run(isa, x, cap) };
    let whole = x.len() / CHUNK * CHUNK;
    let (chunks, rest) = x.split_at_mut(whole);
    threads.for_rows(chunks, CHUNK, |_, part| apply(part));
    apply(rest);
}

multiversion! { unsafe fn run(x: &mut [f32], cap: f32) = body }

#[inline(always)]
unsafe fn body<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    let (by, inverse) = (s.splat(cap), s.splat(1.0 / cap));
    for at in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - at);
        // SAFETY: n elements remain.
        unsafe {
            let p = x.as_mut_ptr().add(at);
            let v = s.load_part(p, n, 0.0);
            s.store_part(p, s.mul(by, tanh(s, s.mul(v, inverse))), n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_match_the_formula_at_any_length() {
        let threads = Threads::new(2);
        for isa in Isa::available() {
            for len in [1, 15, 4096, 9001] {
                let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.731).sin() * 200.0).collect();
                let mut y = x.clone();
                softcap_with(isa, &threads, &mut y, 30.0);
                for (x, y) in x.iter().zip(&y) {
                    let exact = 30.0 * (f64::from(*x) / 30.0).tanh();
                    assert!(
                        (f64::from(*y) - exact).abs() < 2e-6 * exact.abs() + 1e-9,
                        "{isa}: {x}: {y}"
                    );
                }
            }
        }
        let mut y = [5.0];
        softcap(&threads, &mut y, f32::INFINITY);
        assert_eq!(y, [5.0]);
    }
}

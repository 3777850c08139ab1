//! x becomes cap * tanh(x / cap).

use crate::threads::{Threads, for_row_blocks};

/// Caps every value.
pub fn softcap(threads: &Threads, x: &mut [f32], cap: f32) {
    for_row_blocks(threads, x, 1, 4096, |_, values| {
        for x in values {
            *x = cap * (*x / cap).tanh();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_pass_and_large_ones_saturate() {
        let mut x = [0.01, 1e9, -1e9];
        softcap(&Threads::new(1), &mut x, 30.0);
        assert!((x[0] - 0.01).abs() < 1e-6);
        assert_eq!([x[1], x[2]], [30.0, -30.0]);
    }
}

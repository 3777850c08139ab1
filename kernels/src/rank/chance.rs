//! Scores by chance that depend on nothing but where a token stands.

/// The draws of one head.
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new(seed: u32, layer: u32, head: u32) -> Self {
        Self(mixed(mixed(u64::from(seed)) ^ (u64::from(layer) << 32 | u64::from(head))))
    }

    /// In 0..1, in steps of 2^-24.
    pub(super) fn at(&self, position: u32) -> f32 {
        (mixed(self.0 ^ u64::from(position)) >> 40) as f32 / (1 << 24) as f32
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), one step on.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_even_and_every_part_counts() {
        // The generator's first number for seed 0, as published with it.
        assert_eq!(mixed(0), 0xe220_a839_7b1d_cdaf);
        let draws = |seed, layer, head| -> Vec<f32> {
            let draw = Draw::new(seed, layer, head);
            (0..4000).map(|p| draw.at(p)).collect()
        };
        let one = draws(0, 0, 0);
        assert_eq!(one, draws(0, 0, 0));
        assert!(one.iter().all(|x| (0.0..1.0).contains(x)));
        let below = |limit: f32| one.iter().filter(|x| **x < limit).count();
        // Of 4,000 draws, to four deviations of a binomial count.
        assert!(below(0.5).abs_diff(2000) < 127, "{}", below(0.5));
        assert!(below(0.1).abs_diff(400) < 76, "{}", below(0.1));
        for other in [draws(1, 0, 0), draws(0, 1, 0), draws(0, 0, 1)] {
            let larger = one.iter().zip(&other).filter(|(a, b)| a < b).count();
            assert!(larger.abs_diff(2000) < 127, "{larger}");
        }
    }
}

//! How the next token is chosen: greedy, or by temperature and top-p from a seed of the sequence's own, so that a
//! sequence does not depend on its neighbours.

use batchmax_kernels::sample::{argmax, top_p};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The choice of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this is drawn from.
    pub top_p: f32,
    /// Same seed, same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// The random numbers of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// For the sequence with this index.
    #[must_use]
    pub fn new(sampling: Sampling, sequence: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
        random.set_stream(sequence as u64);
        Self { sampling, random }
    }

    /// Whether the largest logit decides, whatever the random numbers are.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature <= 0.0
    }

    /// The next token and the gap between the two best logits.
    pub fn next(&mut self, logits: &[f32]) -> (u32, f32) {
        let (best, gap) = argmax(logits);
        if self.is_greedy() {
            return (best, gap);
        }
        let uniform: f32 = self.random.random();
        (top_p(logits, self.sampling.temperature, self.sampling.top_p, uniform), gap)
    }
}

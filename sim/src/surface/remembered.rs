//! Look-ups that were made before: policies and schedules of a plan launch the same kernels.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::Mutex;

use super::{AXES, Estimate, KEYS, Shape};

/// Estimates that are kept at most; what comes later is worked out each time.
const MOST: usize = 1 << 14;

/// A shape's key and place on the axes, bit by bit.
#[derive(Clone, Copy, Debug)]
struct Key([u64; KEYS + AXES]);

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        // All words at once: they differ seldom, and a call that compares bytes takes longer than this.
        self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.iter().for_each(|word| state.write_u64(*word));
    }
}

/// What a kernel was estimated at.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<HashMap<Key, Estimate, BuildHasherDefault<Fold>>>);

impl Remembered {
    /// The estimate of a shape; `work_out` says the same of equal shapes, so it is asked once.
    pub(super) fn estimate(&self, shape: &Shape, work_out: impl FnOnce() -> Estimate) -> Estimate {
        let mut key = Key([0; KEYS + AXES]);
        for (slot, size) in key.0.iter_mut().zip(shape.key.iter().chain(&shape.at)) {
            *slot = size.to_bits();
        }
        // Nothing panics under the lock; and what is not remembered can be worked out.
        let Ok(mut known) = self.0.lock() else { return work_out() };
        if let Some(estimate) = known.get(&key) {
            return *estimate;
        }
        let estimate = work_out();
        if known.len() < MOST {
            known.insert(key, estimate);
        }
        estimate
    }
}

/// A hash of a few words: nobody chooses them to collide.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

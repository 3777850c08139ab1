//! What several test modules share: noise, and sequences with caches.

use crate::append::{AppendItem, append};
use crate::attend::{AttendItem, AttendShape};
use crate::evict::{EvictItem, Protect, evict};
use crate::kv::{BlockPool, HeadCache, KvFormat};
use crate::threads::Threads;

/// Pseudo-random numbers in -1..1.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Sequences of one layer, fed with rows of noise.
pub(crate) struct Layer {
    pub(crate) threads: Threads,
    pub(crate) pool: BlockPool,
    pub(crate) shape: AttendShape,
    pub(crate) caches: Vec<Vec<HeadCache>>,
    pub(crate) seen: Vec<u32>,
    pub(crate) qkv: Vec<f32>,
    pub(crate) width: usize,
    /// First row and rows of each sequence's last step.
    pub(crate) step: Vec<(usize, usize)>,
}

impl Layer {
    pub(crate) fn new(sequences: usize, shape: AttendShape, format: KvFormat) -> Self {
        let heads = || std::iter::repeat_with(HeadCache::default).take(shape.kv_heads).collect();
        Self {
            threads: Threads::new(2),
            pool: BlockPool::new(shape.head_dim, format, 1 << 30),
            shape,
            caches: std::iter::repeat_with(heads).take(sequences).collect(),
            seen: vec![0; sequences],
            qkv: Vec::new(),
            width: (shape.heads + 2 * shape.kv_heads) * shape.head_dim,
            step: vec![(0, 0); sequences],
        }
    }

    /// A step with this many rows per sequence. A row's noise depends on sequence and position only.
    pub(crate) fn feed(&mut self, seed: u64, rows: &[usize]) {
        self.qkv.clear();
        let mut first_row = 0;
        for (i, rows) in rows.iter().enumerate() {
            for r in 0..*rows {
                let token = u64::from(self.seen[i]) + r as u64;
                let row = noise(seed ^ (i as u64) << 32 ^ token << 8, self.width);
                self.qkv.extend(row.iter().map(|x| x * 2.0));
            }
            self.step[i] = (first_row, *rows);
            first_row += rows;
        }
        let positions: Vec<Vec<u32>> = self
            .step
            .iter()
            .zip(&self.seen)
            .map(|(s, seen)| (*seen..).take(s.1).collect())
            .collect();
        let mut items: Vec<AppendItem<'_>> = self
            .caches
            .iter_mut()
            .zip(&self.step)
            .zip(&positions)
            .map(|((heads, step), positions)| AppendItem {
                heads,
                first_row: step.0,
                rows: step.1,
                positions,
            })
            .collect();
        let dim = self.shape.head_dim;
        let key = self.shape.heads * dim;
        let value = key + self.shape.kv_heads * dim;
        append(&self.threads, &mut self.pool, &mut items, &self.qkv, self.width, key, value, dim)
            .expect("room for the tokens");
        self.seen.iter_mut().zip(rows).for_each(|(seen, rows)| *seen += *rows as u32);
    }

    /// Drops tokens at random until `keep` are left, so that heads have gaps of their own.
    pub(crate) fn thin(&mut self, seed: u64, keep: &[usize]) {
        let scores: Vec<Vec<f32>> = self
            .caches
            .iter()
            .flatten()
            .enumerate()
            .map(|(i, head)| noise(seed + i as u64, head.tokens()))
            .collect();
        let mut items: Vec<EvictItem<'_>> = self
            .caches
            .iter_mut()
            .zip(keep)
            .zip(&self.seen)
            .map(|((heads, keep), seen)| EvictItem {
                keep: vec![*keep; heads.len()],
                heads,
                seen: *seen,
            })
            .collect();
        evict(&self.threads, &mut self.pool, &mut items, &scores, Protect::default(), None)
            .expect("room");
    }

    pub(crate) fn items(&self) -> Vec<AttendItem<'_>> {
        let with_rows = self.caches.iter().zip(&self.step);
        with_rows
            .map(|(heads, step)| AttendItem { heads, first_row: step.0, rows: step.1, at: None })
            .collect()
    }

    pub(crate) fn rows(&self) -> usize {
        self.qkv.len() / self.width
    }
}

/// Fails unless the numbers are close: by `tolerance` absolutely, or relative to numbers above one.
pub(crate) fn assert_close(found: &[f32], exact: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (i, (x, y)) in found.iter().zip(exact).enumerate() {
        let close =
            (f64::from(*x) - y).abs() <= tolerance * y.abs().max(1.0) || f64::from(*x) == *y;
        assert!(close, "{what}: {x} for {y} at {i}");
    }
}

/// Bits, so that comparisons tell -0 from 0 and NaN equals itself.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

//! Caches that are put together from stored ones (`CacheBlend`): rows in a cache's format, and how far values of theirs are
//! from new ones.

use crate::kv::{BlockPool, HeadCache, KvFormat, with_format};
use crate::simd::{LANES, Simd, Source, isa, multiversion};
use crate::threads::Threads;

/// Rows of numbers in the format of a cache, without padding between them.
#[derive(Clone, Debug)]
pub struct StoredRows {
    format: KvFormat,
    width: usize,
    rows: usize,
    /// The numbers, and a vector's worth behind them that nobody reads.
    words: Vec<u32>,
}

impl StoredRows {
    /// The tokens of caches: a row has the keys of all `heads`, then their values.
    ///
    /// # Panics
    /// If the heads don't hold the same number of tokens.
    #[must_use]
    pub fn of_caches(pool: &BlockPool, heads: &[HeadCache]) -> Self {
        let rows = heads.first().map_or(0, HeadCache::tokens);
        assert!(heads.iter().all(|h| h.tokens() == rows), "heads of different lengths");
        let numbers: Vec<f32> = (0..rows)
            .flat_map(|token| {
                let keys = heads.iter().flat_map(move |h| h.key(pool, token));
                keys.chain(heads.iter().flat_map(move |h| h.value(pool, token)))
            })
            .collect();
        Self::new(pool.format(), 2 * heads.len() * pool.head_dim(), &numbers)
    }

    /// `numbers`, rounded to the format, in rows of `width`.
    ///
    /// # Panics
    /// If they are not whole rows.
    #[must_use]
    pub fn new(format: KvFormat, width: usize, numbers: &[f32]) -> Self {
        assert!(width > 0 && numbers.len().is_multiple_of(width), "not whole rows");
        let bytes = (numbers.len() + LANES) * format.bytes();
        let mut words = vec![0u32; bytes.div_ceil(4)];
        // SAFETY: there is room for every number and a vector more; words are aligned to any number.
        unsafe {
            let to = words.as_mut_ptr().cast::<u8>();
            with_format!(format, narrow::<B>(isa(), numbers, to));
        }
        Self { format, width, rows: numbers.len() / width, words }
    }

    /// Rows of `width` numbers that are in the format already.
    ///
    /// # Panics
    /// If they are not whole rows.
    #[must_use]
    pub fn from_bytes(format: KvFormat, width: usize, bytes: &[u8]) -> Self {
        let row = width * format.bytes();
        assert!(row > 0 && bytes.len().is_multiple_of(row), "not whole rows");
        let mut padded = bytes.to_vec();
        padded.resize((bytes.len() + LANES * format.bytes()).next_multiple_of(4), 0);
        let words = padded.as_chunks::<4>().0.iter().map(|b| u32::from_ne_bytes(*b)).collect();
        Self { format, width, rows: bytes.len() / row, words }
    }

    /// The numbers as they are stored.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.truncate(self.rows * self.width * self.format.bytes());
        bytes
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of the numbers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.rows * self.width * self.format.bytes()) as u64
    }

    /// Writes all rows to `out`.
    ///
    /// # Panics
    /// If `out` is not as long.
    pub fn read(&self, threads: &Threads, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.width, "not the stored rows");
        let isa = isa();
        threads.for_rows(out, self.width, |first, part| {
            // SAFETY: as many numbers are stored from there on, and a vector more.
            unsafe {
                let from = self.words.as_ptr().cast::<u8>();
                let from = from.add(first * self.width * self.format.bytes());
                with_format!(self.format, widen::<B>(isa, from, part));
            }
        });
    }
}

multiversion! {
    /// # Safety
    /// `to` has room for the numbers and a vector more, and is aligned to one.
    unsafe fn narrow<B: Source>(numbers: &[f32], to: *mut u8) = narrow_body
}

multiversion! {
    /// # Safety
    /// `from` has as many numbers as `out` and a vector more, and is aligned to one.
    unsafe fn widen<B: Source>(from: *const u8, out: &mut [f32]) = widen_body
}

#[inline(always)]
unsafe fn narrow_body<S: Simd, B: Source>(s: S, numbers: &[f32], to: *mut u8) {
    for at in (0..numbers.len()).step_by(LANES) {
        let n = LANES.min(numbers.len() - at);
        // SAFETY: n numbers remain; a whole vector may be written.
        unsafe {
            let v = s.load_part(numbers.as_ptr().add(at), n, 0.0);
            B::store(s, to.add(at * B::BYTES), v);
        }
    }
}

#[inline(always)]
unsafe fn widen_body<S: Simd, B: Source>(s: S, from: *const u8, out: &mut [f32]) {
    for at in (0..out.len()).step_by(LANES) {
        let n = LANES.min(out.len() - at);
        // SAFETY: n numbers remain; a whole vector may be read.
        unsafe { s.store_part(out.as_mut_ptr().add(at), B::load(s, from.add(at * B::BYTES)), n) };
    }
}

/// Where new values and stored ones stand.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Width of a row of new ones.
    pub width: usize,
    /// Column of the first value there.
    pub values: usize,
    /// Width of a row of stored ones.
    pub stored_width: usize,
    /// Column of the first value there.
    pub stored_values: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// KV heads.
    pub kv_heads: usize,
}

/// The squared distance of the new values, rounded as a cache of `format` would, from the stored ones: for each KV head one
/// number per stored row, then zeros up to the number of new rows.
///
/// # Panics
/// If a row is not whole or a column lies outside.
#[must_use]
pub fn deviation(format: KvFormat, new: &[f32], stored: &[f32], at: Columns) -> Vec<Vec<f32>> {
    let (numbers, dim) = (at.kv_heads * at.head_dim, at.head_dim);
    assert!(new.len().is_multiple_of(at.width) && stored.len().is_multiple_of(at.stored_width));
    assert!(at.values + numbers <= at.width && at.stored_values + numbers <= at.stored_width);
    let (rows, known) = (new.len() / at.width, stored.len() / at.stored_width);
    assert!(known <= rows, "more stored rows than new ones");
    let mut found = vec![vec![0.0f32; rows]; at.kv_heads];
    let mut rounded = Vec::with_capacity(known * numbers);
    for row in new.chunks_exact(at.width).take(known) {
        rounded.extend_from_slice(&row[at.values..at.values + numbers]);
    }
    let rounded = StoredRows::new(format, numbers.max(1), &rounded);
    let mut values = vec![0.0; known * numbers];
    rounded.read(&Threads::new(1), &mut values);
    for (row, stored) in stored.chunks_exact(at.stored_width).enumerate() {
        let stored = &stored[at.stored_values..at.stored_values + numbers];
        let values = &values[row * numbers..(row + 1) * numbers];
        let heads = values.chunks_exact(dim).zip(stored.chunks_exact(dim));
        for ((values, stored), found) in heads.zip(&mut found) {
            found[row] = values.iter().zip(stored).map(|(a, b)| (a - b) * (a - b)).sum();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::AttendShape;
    use crate::testing::{Layer, noise};

    const FORMATS: [KvFormat; 4] = [KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8];

    #[test]
    fn what_is_stored_is_what_a_cache_would_hold() {
        let shape = AttendShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        for format in FORMATS {
            let mut layer = Layer::new(1, shape, format);
            layer.feed(3, &[37]);
            let stored = StoredRows::of_caches(&layer.pool, &layer.caches[0]);
            assert_eq!(stored.bytes(), (37 * 64 * format.bytes()) as u64);
            let mut out = vec![0.0; 37 * 64];
            stored.read(&Threads::new(2), &mut out);
            for (token, row) in out.chunks_exact(64).enumerate() {
                for (h, head) in layer.caches[0].iter().enumerate() {
                    assert_eq!(row[h * 16..][..16], head.key(&layer.pool, token));
                    assert_eq!(row[32 + h * 16..][..16], head.value(&layer.pool, token));
                }
            }
        }
    }

    #[test]
    fn rows_of_any_width_come_back() {
        for format in FORMATS {
            for (rows, width) in [(1, 1), (3, 5), (7, 33), (0, 4)] {
                let numbers = noise(9, rows * width);
                let stored = StoredRows::new(format, width, &numbers);
                let mut once = vec![0.0; numbers.len()];
                stored.read(&Threads::new(1), &mut once);
                let mut twice = vec![0.0; numbers.len()];
                StoredRows::new(format, width, &once).read(&Threads::new(3), &mut twice);
                assert_eq!(once, twice);
                let near = once
                    .iter()
                    .zip(&numbers)
                    .all(|(a, b)| (a - b).abs() <= 0.07 * b.abs().max(1.0 / 64.0));
                assert!(near, "{format:?}");
            }
        }
    }

    #[test]
    fn deviations_by_hand() {
        let at = Columns {
            width: 5,
            values: 1,
            stored_width: 4,
            stored_values: 0,
            head_dim: 2,
            kv_heads: 2,
        };
        let new = [9.0, 1.0, 2.0, 3.0, 4.0, 9.0, 5.0, 6.0, 7.0, 8.0];
        // One stored row: (1-0)^2 + (2-4)^2 = 5, and 0 for the other head.
        let found = deviation(KvFormat::F32, &new, &[0.0, 4.0, 3.0, 4.0], at);
        assert_eq!(found, [vec![5.0, 0.0], vec![0.0, 0.0]]);
        // Rounded as it would be cached: 1.0001 is 1 in 16 bits.
        let new = [0.0, 1.0001, 1.0, 1.0, 1.0];
        assert_eq!(deviation(KvFormat::F16, &new, &[1.0; 4], at), [vec![0.0], vec![0.0]]);
    }
}

//! Rotary position embedding.

use std::sync::OnceLock;

use crate::threads::Threads;

/// Which channels of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Channels 2i and 2i + 1.
    Interleaved,
    /// Channels i and i + half of the rotated ones.
    Half,
}

impl RopeLayout {
    /// The channels of the i-th of `pairs` pairs.
    pub(crate) fn pair(self, i: usize, pairs: usize) -> (usize, usize) {
        match self {
            Self::Interleaved => (2 * i, 2 * i + 1),
            Self::Half => (i, i + pairs),
        }
    }
}

/// Positions whose angles are worked out together, when one of them is first needed.
const PAGE: usize = 256;

/// Cosines and sines by position, worked out in double precision.
#[derive(Clone)]
pub struct RopeTable {
    inverse: Vec<f32>,
    factor: f32,
    max_position: usize,
    pages: Vec<OnceLock<Box<[f32]>>>,
}

impl RopeTable {
    /// For positions below `max_position`. Pair i turns by `inv_freq[i]` per position; cosines and sines are multiplied by
    /// `attention_factor`.
    #[must_use]
    pub fn new(inv_freq: &[f32], max_position: usize, attention_factor: f32) -> Self {
        let pages =
            std::iter::repeat_with(OnceLock::new).take(max_position.div_ceil(PAGE)).collect();
        Self { inverse: inv_freq.to_vec(), factor: attention_factor, max_position, pages }
    }

    /// Channels that are rotated.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        2 * self.inverse.len()
    }

    /// Turns the rotated channels of a head back from `position`.
    ///
    /// # Panics
    /// If the head has fewer channels than the table, or the position is not below the table's end.
    pub fn turn_back(&self, head: &mut [f32], position: u32, layout: RopeLayout) {
        let (cos, sin) = self.angles(position);
        let scale = 1.0 / (self.factor * self.factor);
        for (i, (c, s)) in cos.iter().zip(sin).enumerate() {
            let (a, b) = layout.pair(i, cos.len());
            (head[a], head[b]) = turn(head[a], head[b], c * scale, -s * scale);
        }
    }

    /// Cosines and sines of a distance, per pair, multiplied by [`Self::factor`].
    ///
    /// # Panics
    /// If it is not below the table's end.
    #[must_use]
    pub fn angles(&self, distance: u32) -> (&[f32], &[f32]) {
        assert!((distance as usize) < self.max_position, "position {distance} is past the end");
        self.row(distance)
    }

    /// Works out the angles of the first `positions` positions now, as far as there are any, and not where they are first
    /// needed.
    pub fn prepare(&self, positions: u32) {
        let last = self.max_position.min(positions as usize);
        (0..last).step_by(PAGE).for_each(|position| _ = self.row(position as u32));
    }

    /// Positions that have angles.
    #[must_use]
    pub fn max_position(&self) -> usize {
        self.max_position
    }

    /// What keys and queries are multiplied by beside the rotation (`attention_factor`).
    #[must_use]
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// The mean of the rotations of `count` positions from `from`, which may lie past the table's end: cosine and sine per
    /// pair.
    #[must_use]
    pub fn mean_turn(&self, from: u32, count: u32) -> Vec<(f32, f32)> {
        let n = f64::from(count.max(1));
        let mean = |frequency: &f32| {
            // The sum of equal steps on a circle: its direction is the middle's.
            let step = f64::from(*frequency);
            let middle = step * (f64::from(from) + (n - 1.0) / 2.0);
            let half = (step / 2.0).sin();
            let length = if half.abs() < 1e-12 { 1.0 } else { (n * step / 2.0).sin() / half / n };
            let length = length * f64::from(self.factor);
            ((middle.cos() * length) as f32, (middle.sin() * length) as f32)
        };
        self.inverse.iter().map(mean).collect()
    }

    /// Cosines, then sines, of a position.
    fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let (position, pairs) = (position as usize, self.inverse.len());
        let page = self.pages[position / PAGE].get_or_init(|| self.make_page(position / PAGE));
        page[position % PAGE * 2 * pairs..][..2 * pairs].split_at(pairs)
    }

    fn make_page(&self, page: usize) -> Box<[f32]> {
        let factor = f64::from(self.factor);
        let mut values = Vec::with_capacity(PAGE * self.rotary_dim());
        for position in page * PAGE..(page + 1) * PAGE {
            let angle = |f: &f32| f64::from(*f) * position as f64;
            values.extend(self.inverse.iter().map(|f| (angle(f).cos() * factor) as f32));
            values.extend(self.inverse.iter().map(|f| (angle(f).sin() * factor) as f32));
        }
        values.into_boxed_slice()
    }
}

/// Rotates the first `heads_to_rotate` heads of every row of `qkv` (queries, then keys) by the row's position. Channels
/// beyond the table's stay as they are.
///
/// # Panics
/// If the sizes do not fit each other or a position is not below the table's end.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn rope(
    threads: &Threads,
    qkv: &mut [f32],
    qkv_width: usize,
    heads_to_rotate: usize,
    head_dim: usize,
    positions: &[u32],
    table: &RopeTable,
    layout: RopeLayout,
) {
    assert_eq!(qkv.len(), positions.len() * qkv_width, "qkv is not one row per position");
    assert!(heads_to_rotate * head_dim <= qkv_width, "heads outside the row");
    assert!(table.rotary_dim() <= head_dim, "more rotated channels than channels");
    if let Some(last) = positions.iter().max() {
        assert!((*last as usize) < table.max_position, "position {last} of {}", table.max_position);
    }
    let pairs = table.inverse.len();
    threads.for_rows(qkv, qkv_width, |first, rows| {
        for (row, position) in rows.chunks_exact_mut(qkv_width).zip(&positions[first..]) {
            let (cos, sin) = table.row(*position);
            for head in row[..heads_to_rotate * head_dim].chunks_exact_mut(head_dim) {
                match layout {
                    RopeLayout::Half => {
                        let (low, high) = head[..2 * pairs].split_at_mut(pairs);
                        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                            (*a, *b) = turn(*a, *b, *c, *s);
                        }
                    }
                    RopeLayout::Interleaved => {
                        for ((pair, c), s) in
                            head[..2 * pairs].chunks_exact_mut(2).zip(cos).zip(sin)
                        {
                            (pair[0], pair[1]) = turn(pair[0], pair[1], *c, *s);
                        }
                    }
                }
            }
        }
    });
}

#[inline(always)]
pub(crate) fn turn(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

/// Turns what [`rope`] has turned before on by `positions`: as if it had been turned once, by the sum. The factor of the
/// table, which both turns bring, counts once; channels that are not rotated stay as they are.
///
/// # Panics
/// As [`rope`].
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn turn_on(
    threads: &Threads,
    qkv: &mut [f32],
    qkv_width: usize,
    heads_to_rotate: usize,
    head_dim: usize,
    positions: &[u32],
    table: &RopeTable,
    layout: RopeLayout,
) {
    rope(threads, qkv, qkv_width, heads_to_rotate, head_dim, positions, table, layout);
    if table.factor == 1.0 {
        return;
    }
    for row in qkv.chunks_exact_mut(qkv_width) {
        for head in row[..heads_to_rotate * head_dim].chunks_exact_mut(head_dim) {
            head[..table.rotary_dim()].iter_mut().for_each(|channel| *channel /= table.factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_in_both_layouts() {
        let threads = Threads::new(2);
        let table = RopeTable::new(&[std::f32::consts::FRAC_PI_2, 0.0], 1000, 1.0);
        let row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0];
        let check = |layout: RopeLayout, expected: [f32; 7]| {
            let mut qkv = row;
            // Position 1 turns the first pair by 90 degrees: (a, b) becomes (-b, a).
            rope(&threads, &mut qkv, 7, 1, 6, &[1], &table, layout);
            for (y, exact) in qkv.iter().zip(expected) {
                assert!((y - exact).abs() < 1e-6, "{layout:?}: {qkv:?}");
            }
        };
        check(RopeLayout::Half, [-3.0, 2.0, 1.0, 4.0, 5.0, 6.0, 9.0]);
        check(RopeLayout::Interleaved, [-2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 9.0]);
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let threads = Threads::new(1);
        let table = RopeTable::new(&[1.0, 0.1, 0.01, 0.001], 5000, 1.0);
        let score = |q: u32, k: u32| {
            let mut rows = [0.3, -1.0, 0.5, 2.0, 0.7, 0.1, -0.4, 1.1].repeat(2);
            rope(&threads, &mut rows, 8, 1, 8, &[q, k], &table, RopeLayout::Half);
            rows[..8].iter().zip(&rows[8..]).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((score(10, 3) - score(4010, 4003)).abs() < 1e-4);
        assert!((score(10, 3) - score(10, 4)).abs() > 1e-3);
    }

    #[test]
    fn turning_back_and_the_mean_turn() {
        let threads = Threads::new(1);
        let table = RopeTable::new(&[1.3, 0.1, 0.001, 0.0], 300, 1.5);
        let row = [0.3, -1.0, 0.5, 2.0, 0.7, 0.1, -0.4, 1.1, 9.0];
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            let mut turned = row;
            rope(&threads, &mut turned, 9, 1, 8, &[299], &table, layout);
            table.turn_back(&mut turned, 299, layout);
            for (y, exact) in turned.iter().zip(row) {
                assert!((y - exact).abs() < 1e-6, "{layout:?}: {turned:?}");
            }
        }
        for (i, (cos, sin)) in table.mean_turn(290, 512).into_iter().enumerate() {
            let mean = |f: fn(f64) -> f64| {
                let angle = |p: u32| f64::from([1.3f32, 0.1, 0.001, 0.0][i]) * f64::from(p);
                (290..802).map(|p| f(angle(p))).sum::<f64>() / 512.0 * 1.5
            };
            assert!((f64::from(cos) - mean(f64::cos)).abs() < 1e-6, "{i}: {cos}");
            assert!((f64::from(sin) - mean(f64::sin)).abs() < 1e-6, "{i}: {sin}");
        }
    }

    #[test]
    fn turning_on_is_turning_once() {
        let threads = Threads::new(1);
        for (layout, factor) in [(RopeLayout::Half, 1.0), (RopeLayout::Interleaved, 1.5)] {
            let table = RopeTable::new(&[1.0, 0.3, 0.01], 4096, factor);
            for (first, then) in [(0, 0), (5, 0), (0, 512), (17, 1024), (511, 3072)] {
                // The last channel of the head is not rotated, the one behind it is no key's.
                let row = [0.3f32, -1.2, 2.0, 0.7, 1.1, -0.4, 0.9, 5.0];
                let (mut twice, mut once) = (row, row);
                rope(&threads, &mut twice, 8, 1, 7, &[first], &table, layout);
                turn_on(&threads, &mut twice, 8, 1, 7, &[then], &table, layout);
                rope(&threads, &mut once, 8, 1, 7, &[first + then], &table, layout);
                assert_eq!(twice[6..], row[6..]);
                for (a, b) in twice.iter().zip(&once) {
                    assert!((a - b).abs() < 2e-6, "{layout:?} {first} + {then}");
                }
            }
        }
    }

    #[test]
    fn the_factor_scales_and_position_zero_turns_nothing() {
        let threads = Threads::new(1);
        let table = RopeTable::new(&[1.0], 1, 1.5);
        let mut qkv = [2.0, 4.0];
        rope(&threads, &mut qkv, 2, 1, 2, &[0], &table, RopeLayout::Interleaved);
        assert_eq!(qkv, [3.0, 6.0]);
    }
}

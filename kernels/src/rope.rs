//! Rotary position embedding: pairs of channels turned by position times a frequency.

use crate::threads::{Threads, for_row_blocks};

/// Which channels form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// 2i and 2i + 1.
    Interleaved,
    /// i and i + half of the rotated channels.
    Half,
}

/// Cosines and sines of all positions.
pub struct RopeTable {
    pairs: usize,
    /// [position][pair]: cosine, sine.
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// For the angles `position * inv_freq[pair]`; results are multiplied by `attention_factor`.
    #[must_use]
    pub fn new(inv_freq: &[f32], max_position: usize, attention_factor: f32) -> Self {
        let factor = f64::from(attention_factor);
        let turns = (0..max_position)
            .flat_map(|position| {
                inv_freq.iter().map(move |frequency| {
                    // The angle is rounded to f32 first, as the reference implementations do.
                    let angle = f64::from(position as f32 * frequency);
                    ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32)
                })
            })
            .collect();
        Self { pairs: inv_freq.len(), turns }
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.turns.len() * size_of::<(f32, f32)>()
    }
}

/// Rotates the first `heads` heads of every row (queries, then keys) to its position.
///
/// # Panics
/// If there are fewer positions than rows, or one is past the table.
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
pub fn rope(
    threads: &Threads,
    qkv: &mut [f32],
    qkv_width: usize,
    heads: usize,
    head_dim: usize,
    positions: &[u32],
    table: &RopeTable,
    layout: RopeLayout,
) {
    assert!(heads * head_dim <= qkv_width && qkv.len() == positions.len() * qkv_width);
    let pairs = table.pairs;
    assert!(2 * pairs <= head_dim);
    for_row_blocks(threads, qkv, qkv_width, 16, |first, rows| {
        for (i, row) in rows.chunks_mut(qkv_width).enumerate() {
            let position = positions[first + i] as usize;
            let turns = &table.turns[position * pairs..(position + 1) * pairs];
            for head in row[..heads * head_dim].chunks_mut(head_dim) {
                match layout {
                    RopeLayout::Interleaved => {
                        for (pair, (cos, sin)) in head.chunks_mut(2).zip(turns) {
                            let (a, b) = (pair[0], pair[1]);
                            pair[0] = a * cos - b * sin;
                            pair[1] = a * sin + b * cos;
                        }
                    }
                    RopeLayout::Half => {
                        let (low, high) = head[..2 * pairs].split_at_mut(pairs);
                        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
                            let (x, y) = (*a, *b);
                            *a = x * cos - y * sin;
                            *b = x * sin + y * cos;
                        }
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn() {
        let table = RopeTable::new(&[std::f32::consts::FRAC_PI_2, 0.0], 2, 1.0);
        let mut interleaved = [1.0, 2.0, 3.0, 4.0, 9.0];
        rope(&Threads::new(1), &mut interleaved, 5, 1, 4, &[1], &table, RopeLayout::Interleaved);
        let mut half = [1.0, 3.0, 2.0, 4.0, 9.0];
        rope(&Threads::new(1), &mut half, 5, 1, 4, &[1], &table, RopeLayout::Half);
        for (got, want) in interleaved.iter().zip([-2.0, 1.0, 3.0, 4.0, 9.0]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        for (got, want) in half.iter().zip([-2.0, 3.0, 1.0, 4.0, 9.0]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }
}

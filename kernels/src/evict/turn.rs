//! Keys that move up in the cache turn to their new place.

use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, read, write};
use crate::rope::{RopeLayout, RopeTable};

/// How keys are rotated.
#[derive(Clone, Copy)]
pub struct Turning<'a> {
    /// Angles by position.
    pub table: &'a RopeTable,
    /// Which channels form a pair.
    pub layout: RopeLayout,
}

impl Turning<'_> {
    /// Turns the key at place i, which was at `kept[i]` before, back by the difference, for all i.
    ///
    /// # Safety
    /// Nobody else uses the head's halves.
    ///
    /// # Panics
    /// If a difference is not below the table's end.
    pub(super) unsafe fn turn(self, pool: &BlockPool, head: &HeadCache, kept: &[u32]) {
        let (format, pairs) = (pool.format(), self.table.rotary_dim() / 2);
        // The factor was in the keys before.
        let scale = 1.0 / self.table.factor();
        for (block, kept) in kept.chunks(BLOCK_TOKENS).enumerate() {
            let first = (block * BLOCK_TOKENS) as u32;
            let angles: Vec<_> =
                (first..).zip(kept).map(|(to, from)| self.table.angles(from - to)).collect();
            let base = pool.ptr(head.keys.whole[block]);
            for pair in 0..pairs {
                let (a, b) = self.layout.pair(pair, pairs);
                for (lane, (cos, sin)) in angles.iter().enumerate() {
                    if kept[lane] == first + lane as u32 {
                        continue;
                    }
                    let at = [a, b].map(|channel| channel * BLOCK_TOKENS + lane);
                    // SAFETY: the half has a number per channel and lane, and it is this head's alone.
                    unsafe {
                        let [x, y] = at.map(|i| read(format, base, i));
                        let (cos, sin) = (cos[pair] * scale, -sin[pair] * scale);
                        let (x, y) = crate::rope::turn(x, y, cos, sin);
                        write(format, base, at[0], x);
                        write(format, base, at[1], y);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::AttendShape;
    use crate::evict::{EvictItem, Protect, evict};
    use crate::kv::KvFormat;
    use crate::testing::Layer;

    /// What stays must be as if it had been rotated at its place in the cache from the beginning.
    #[test]
    fn keys_stand_at_their_places() {
        let shape = AttendShape {
            heads: 2,
            kv_heads: 2,
            head_dim: 16,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(1, shape, KvFormat::F32);
        layer.feed(3, &[100]);
        // Twelve of sixteen channels are rotated; keys and queries are 1.2 times as long.
        let inverse: Vec<f32> = (0..6).map(|i| 0.7f32.powi(i)).collect();
        let table = RopeTable::new(&inverse, 128, 1.2);
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            let pool = &mut layer.pool;
            let mut heads: Vec<HeadCache> =
                layer.caches[0].iter().map(|head| head.copy(pool).expect("room")).collect();
            let before: Vec<Vec<f32>> = (0..100).map(|t| heads[0].key(pool, t)).collect();
            let scores: Vec<Vec<f32>> =
                vec![(0..100).map(|t| ((t * 37) % 100) as f32).collect(); 2];
            let mut items = [EvictItem { heads: &mut heads, seen: 100, keep: vec![40; 2] }];
            let (protect, turning) =
                (Protect { sinks: 4, recent: 8 }, Turning { table: &table, layout });
            evict(&layer.threads, pool, &mut items, &scores, protect, Some(turning)).expect("room");
            let positions = heads[0].positions.clone();
            assert_eq!(positions.len(), 40);
            for (place, from) in positions.iter().enumerate() {
                let mut expected = before[*from as usize].clone();
                table.turn_back(&mut expected, *from, layout);
                let mut row = expected.clone();
                crate::rope::rope(
                    &layer.threads,
                    &mut row,
                    16,
                    1,
                    16,
                    &[place as u32],
                    &table,
                    layout,
                );
                let key = heads[0].key(&layer.pool, place);
                for (d, (x, y)) in key.iter().zip(&row).enumerate() {
                    assert!(
                        (x - y).abs() < 1e-5,
                        "{layout:?}, {from} to {place}, channel {d}: {x}, {y}"
                    );
                }
            }
        }
    }
}

//! Copies of caches: sequences that begin alike share the work of reading, not the memory.

use super::{BlockPool, Half, Halves, HeadCache, PoolFull};
use crate::state::State;

impl HeadCache {
    /// A copy with halves of its own.
    ///
    /// # Errors
    /// If the budget has no room; nothing is taken then.
    pub fn copy(&self, pool: &mut BlockPool) -> Result<Self, PoolFull> {
        pool.check_room(self.held_bytes(pool))?;
        // In the order in which appending takes them, so that keys and values of a block lie next to each other.
        Ok(Self {
            keys: self.keys.copy(pool)?,
            values: self.values.copy(pool)?,
            positions: self.positions.clone(),
            tally: self.tally.clone(),
            state: match self.state {
                Some(state) => Some(State { half: copy(pool, state.half)?, ..state }),
                None => None,
            },
        })
    }
}

impl Halves {
    fn copy(&self, pool: &mut BlockPool) -> Result<Self, PoolFull> {
        let mut all = |halves: &[Half]| -> Result<Vec<Half>, PoolFull> {
            halves.iter().map(|h| copy(pool, *h)).collect()
        };
        Ok(Self {
            packed: all(&self.packed)?,
            pruned: all(&self.pruned)?,
            whole: all(&self.whole)?,
            packed_tokens: self.packed_tokens,
            narrow_tokens: self.narrow_tokens,
            codec: self.codec,
            kept: self.kept.clone(),
        })
    }
}

fn copy(pool: &mut BlockPool, from: Half) -> Result<Half, PoolFull> {
    let bytes = pool.bytes_of(from) as usize;
    let to = pool.try_alloc_bytes(bytes)?;
    // SAFETY: both halves are live, of this size and not the same.
    unsafe { std::ptr::copy_nonoverlapping(pool.ptr(from).cast_const(), pool.ptr(to), bytes) };
    Ok(to)
}

#[cfg(test)]
mod tests {
    use crate::attend::AttendShape;
    use crate::kv::KvFormat;
    use crate::testing::Layer;

    #[test]
    fn a_copy_has_the_same_tokens_and_memory_of_its_own() {
        let shape = AttendShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(1, shape, KvFormat::F16);
        layer.feed(3, &[45]);
        let held = layer.pool.held_bytes();
        let mut copy = layer.caches[0][0].copy(&mut layer.pool).expect("room");
        assert_eq!(layer.pool.held_bytes(), 2 * held);
        let of = |cache: &crate::kv::HeadCache, pool: &crate::kv::BlockPool| {
            (0..45).map(|t| (cache.key(pool, t), cache.value(pool, t))).collect::<Vec<_>>()
        };
        let original = of(&layer.caches[0][0], &layer.pool);
        assert!(of(&copy, &layer.pool) == original);
        assert_eq!(copy.positions, layer.caches[0][0].positions);
        // What happens to the copy does not reach the original.
        copy.fill(&mut layer.pool, 40).expect("room");
        assert!(of(&layer.caches[0][0], &layer.pool) == original);
        copy.clear(&mut layer.pool);
        assert_eq!(layer.pool.held_bytes(), held);
    }
}

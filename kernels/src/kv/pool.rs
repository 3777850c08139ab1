//! The pool of half-blocks: several sizes under one byte budget.

use std::fmt;

use super::{BLOCK_TOKENS, KvFormat};
use crate::buffer::AlignedBytes;

/// Slabs are at most this large: big enough that the system maps each by itself, small enough to follow the use.
const SLAB_BYTES: usize = 2 << 20;

/// The keys or the values of a block, in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half {
    class: u32,
    slot: u32,
}

/// The budget does not hold what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFull {
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes held then.
    pub held: u64,
    /// The budget.
    pub budget: u64,
}

impl fmt::Display for PoolFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requested, held, budget } = self;
        write!(
            f,
            "the KV cache budget of {budget} bytes has no room for {requested} more beside {held} held"
        )
    }
}

impl std::error::Error for PoolFull {}

/// Halves of one size.
struct Class {
    bytes: usize,
    /// A slab has two to the power of this many slots.
    shift: u32,
    slabs: Vec<Slab>,
    /// Halves given back, the last one on top: it is the one most likely in a cache. An entry whose generation is not its
    /// slab's is void.
    free: Vec<(u32, u32)>,
    /// Slabs without memory.
    unmapped: Vec<u32>,
    /// Slots of mapped slabs that are not in use.
    spare: usize,
    /// The slab mapped last: only it can have slots that were never handed out, for the others were used up before.
    newest: usize,
}

struct Slab {
    /// None while no slot is in use and the memory is the system's.
    memory: Option<AlignedBytes>,
    /// Slots ever handed out since the memory came; those beyond have never been touched.
    fresh: u32,
    live: u32,
    /// How often the memory was given back.
    generation: u32,
}

impl Class {
    fn new(bytes: usize) -> Self {
        let slots = (SLAB_BYTES / bytes).max(1);
        Self {
            bytes,
            shift: slots.ilog2(),
            slabs: Vec::new(),
            free: Vec::new(),
            unmapped: Vec::new(),
            spare: 0,
            newest: 0,
        }
    }

    fn slots(&self) -> usize {
        1 << self.shift
    }

    fn split(&self, slot: u32) -> (usize, usize) {
        ((slot >> self.shift) as usize, slot as usize & (self.slots() - 1))
    }

    /// A slot; a new slab has memory for no more than `most` of them.
    fn take(&mut self, most: u64) -> u32 {
        let slot = self.reuse().or_else(|| self.next_fresh()).unwrap_or_else(|| {
            self.map(most);
            self.next_fresh().unwrap_or_else(|| unreachable!("a new slab has a fresh slot"))
        });
        let (slab, _) = self.split(slot);
        self.slabs[slab].live += 1;
        self.spare -= 1;
        slot
    }

    fn reuse(&mut self) -> Option<u32> {
        while let Some((slot, generation)) = self.free.pop() {
            let (slab, _) = self.split(slot);
            if self.slabs[slab].generation == generation {
                return Some(slot);
            }
        }
        None
    }

    fn next_fresh(&mut self) -> Option<u32> {
        let slab = self.slabs.get_mut(self.newest)?;
        let room = slab.memory.as_ref().map_or(0, |m| m.len() / self.bytes) as u32;
        (slab.fresh < room).then(|| {
            slab.fresh += 1;
            ((self.newest as u32) << self.shift) + slab.fresh - 1
        })
    }

    fn map(&mut self, most: u64) {
        let slots = self.slots().min(usize::try_from(most).unwrap_or(usize::MAX)).max(1);
        let memory = Some(AlignedBytes::zeroed(slots * self.bytes));
        self.spare += slots;
        if let Some(index) = self.unmapped.pop() {
            let slab = &mut self.slabs[index as usize];
            (slab.memory, slab.fresh) = (memory, 0);
            self.newest = index as usize;
        } else {
            assert!(self.slabs.len() < 1 << (32 - self.shift), "more than 2^32 halves");
            self.newest = self.slabs.len();
            self.slabs.push(Slab { memory, fresh: 0, live: 0, generation: 0 });
        }
    }

    fn give_back(&mut self, slot: u32) {
        let (index, _) = self.split(slot);
        let slots = self.slots();
        self.spare += 1;
        let slab = &mut self.slabs[index];
        slab.live -= 1;
        self.free.push((slot, slab.generation));
        // One slab's worth stays, so that a cache that shrinks and grows doesn't map and unmap all the time.
        let own = slab.memory.as_ref().map_or(0, |m| m.len() / self.bytes);
        if slab.live == 0 && self.spare >= own + slots {
            slab.memory = None;
            slab.fresh = 0;
            slab.generation += 1;
            self.spare -= own;
            self.unmapped.push(index as u32);
        }
    }
}

/// All halves of blocks of a run: keys or values of 32 tokens of one KV head of one layer of one sequence.
///
/// What counts against the budget are the bytes of the halves in use. Memory is mapped in slabs of up to 2 MiB of halves of
/// one size, and goes back to the system slab by slab.
pub struct BlockPool {
    head_dim: usize,
    format: KvFormat,
    budget: u64,
    /// The first one is that of whole halves.
    classes: Vec<Class>,
    held: u64,
    peak: u64,
}

impl BlockPool {
    /// An empty pool of blocks for heads of this many channels.
    ///
    /// # Panics
    /// Unless `head_dim` is a multiple of 8 up to 256.
    #[must_use]
    pub fn new(head_dim: usize, format: KvFormat, budget_bytes: u64) -> Self {
        assert!(
            head_dim > 0 && head_dim.is_multiple_of(8) && head_dim <= 256,
            "head_dim {head_dim}"
        );
        Self {
            head_dim,
            format,
            budget: budget_bytes,
            classes: vec![Class::new(format.half_bytes(head_dim))],
            held: 0,
            peak: 0,
        }
    }

    /// Channels of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Number format of what is not packed.
    #[must_use]
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Bytes of the keys, and of the values, of a block that is not packed: `32 * head_dim` numbers.
    #[must_use]
    pub fn half_bytes(&self) -> u64 {
        self.format.half_bytes(self.head_dim) as u64
    }

    /// Bytes of the halves in use.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held
    }

    /// Most bytes in use since the start or [`Self::reset_peak`].
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }

    /// The budget.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget
    }

    #[cfg(test)]
    pub(crate) fn set_budget(&mut self, bytes: u64) {
        self.budget = bytes;
    }

    /// Bytes of the slabs, used or not: what the pool has asked of the system. Untouched pages of it are not resident.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        let slabs = self.classes.iter().flat_map(|c| &c.slabs);
        slabs.filter_map(|s| s.memory.as_ref()).map(|m| m.len() as u64).sum()
    }

    /// Starts the peak anew from what is held.
    pub fn reset_peak(&mut self) {
        self.peak = self.held;
    }

    /// Takes a half for numbers in the pool's format, contents unspecified.
    ///
    /// # Errors
    /// If the budget has no room for it.
    pub fn try_alloc(&mut self) -> Result<Half, PoolFull> {
        self.try_alloc_bytes(self.half_bytes() as usize)
    }

    /// Takes a half of `bytes` bytes, contents unspecified.
    ///
    /// # Errors
    /// If the budget has no room for it.
    pub(crate) fn try_alloc_bytes(&mut self, bytes: usize) -> Result<Half, PoolFull> {
        self.check_room(bytes as u64)?;
        let class = self.classes.iter().position(|c| c.bytes == bytes).unwrap_or_else(|| {
            self.classes.push(Class::new(bytes));
            self.classes.len() - 1
        });
        // No slab is larger than what the budget could still fill.
        let most = (self.budget - self.held) / bytes as u64;
        let slot = self.classes[class].take(most);
        self.held += bytes as u64;
        self.peak = self.peak.max(self.held);
        Ok(Half { class: class as u32, slot })
    }

    /// Whether `requested` more bytes fit.
    pub(crate) fn check_room(&self, requested: u64) -> Result<(), PoolFull> {
        if self.held + requested > self.budget {
            return Err(PoolFull { requested, held: self.held, budget: self.budget });
        }
        Ok(())
    }

    /// Stops counting `freed` bytes of halves whose contents are still read, if `wanted` more fit then. The halves are given
    /// back by [`Self::recycle`] after.
    pub(crate) fn exchange(&mut self, freed: u64, wanted: u64) -> Result<(), PoolFull> {
        self.held -= freed;
        let room = self.check_room(wanted);
        if room.is_err() {
            self.held += freed;
        }
        room
    }

    /// Gives back a half that no longer counts.
    pub(crate) fn recycle(&mut self, half: Half) {
        self.classes[half.class as usize].give_back(half.slot);
    }

    /// Gives a half back.
    pub fn free(&mut self, half: Half) {
        self.held -= self.bytes_of(half);
        self.recycle(half);
    }

    /// Bytes of a half.
    #[must_use]
    pub fn bytes_of(&self, half: Half) -> u64 {
        self.classes[half.class as usize].bytes as u64
    }

    /// Address of a half. A cache line behind it is readable.
    #[inline]
    pub(crate) fn ptr(&self, half: Half) -> *mut u8 {
        let class = &self.classes[half.class as usize];
        let (slab, slot) = class.split(half.slot);
        let Some(memory) = &class.slabs[slab].memory else {
            unreachable!("a half that was given back")
        };
        // SAFETY: a slab has room for each slot that was handed out.
        unsafe { memory.as_ptr().add(slot * class.bytes) }
    }
}

/// Number of blocks that hold so many tokens.
pub(crate) fn blocks(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_halves_come_back_last_in_first_out_in_each_class() {
        let mut pool = BlockPool::new(8, KvFormat::F32, 1 << 20);
        let a = pool.try_alloc().expect("room");
        let small = pool.try_alloc_bytes(100).expect("room");
        let b = pool.try_alloc().expect("room");
        assert_eq!((pool.held_bytes(), pool.bytes_of(small)), (2 * 1024 + 100, 100));
        pool.free(a);
        pool.free(small);
        pool.free(b);
        assert_eq!(pool.try_alloc().expect("room"), b);
        assert_eq!(pool.try_alloc_bytes(100).expect("room"), small);
        assert_eq!(pool.try_alloc().expect("room"), a);
        assert_eq!(pool.peak_bytes(), 2148);
    }

    #[test]
    fn slabs_never_exceed_the_budget_of_one_class() {
        let mut pool = BlockPool::new(256, KvFormat::F32, 70 * 32_768);
        while pool.try_alloc().is_ok() {}
        assert_eq!(pool.held_bytes(), 70 * 32_768);
        assert_eq!(pool.mapped_bytes(), 70 * 32_768);
    }

    #[test]
    fn empty_slabs_go_back_and_their_slots_are_new_again() {
        let mut pool = BlockPool::new(64, KvFormat::F16, 64 << 20);
        // 512 slots of 4 KiB a slab.
        let halves: Vec<Half> = (0..2048).map(|_| pool.try_alloc().expect("room")).collect();
        assert_eq!(pool.mapped_bytes(), 8 << 20);
        halves.iter().rev().for_each(|h| pool.free(*h));
        assert_eq!((pool.held_bytes(), pool.mapped_bytes()), (0, 2 << 20));
        // Another size may now have what the first one has given up, and the first one starts again.
        let other: Vec<Half> =
            (0..1000).map(|_| pool.try_alloc_bytes(768).expect("room")).collect();
        let again: Vec<Half> = (0..2048).map(|_| pool.try_alloc().expect("room")).collect();
        let mut addresses: Vec<usize> =
            other.iter().chain(&again).map(|h| pool.ptr(*h) as usize).collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 3048);
        assert_eq!(pool.held_bytes(), 1000 * 768 + 2048 * 4096);
        assert_eq!(pool.mapped_bytes(), (8 << 20) + 2048 * 768);
    }
}

//! The memory of all caches on a device: one piece, cut into halves by the host.

use std::collections::BTreeMap;

use batchmax_kernels::cuda::{Address, CudaError};

use super::kv::full;
use super::memory::Device;
use crate::error::ExecError;

/// Bytes by which places are counted.
const UNIT: u64 = 64;

/// Free and taken places. Counted are the bytes that callers name, which may differ from those that are taken.
pub(super) struct Pool {
    at: Address,
    /// Where free stretches begin, and how many units they have. Neighbours are joined.
    free: BTreeMap<u32, u32>,
    left: u64,
    budget: u64,
    held: u64,
    peak: u64,
}

impl Pool {
    /// Memory for the `needed` bytes of a budget, and `more` for what halves take beyond what they count.
    pub(super) fn new(
        device: &mut Device<'_>,
        (budget, needed): (u64, u64),
        more: u64,
    ) -> Result<Self, ExecError> {
        let units = needed.saturating_add(more).div_ceil(UNIT).max(1);
        let Ok(units) = u32::try_from(units) else {
            return Err(CudaError::OutOfMemory {
                wanted: units * UNIT,
                free: device.driver()?.memory()?.free,
            }
            .into());
        };
        let left = u64::from(units);
        let at = device.alloc(left * UNIT)?;
        Ok(Self { at, free: BTreeMap::from([(0, units)]), left, budget, held: 0, peak: 0 })
    }

    pub(super) fn at(&self) -> Address {
        self.at
    }

    /// Where a place is.
    pub(super) fn address(&self, place: u32) -> Address {
        self.at.plus(u64::from(place) * UNIT)
    }

    pub(super) fn held(&self) -> u64 {
        self.held
    }

    pub(super) fn peak(&self) -> u64 {
        self.peak
    }

    pub(super) fn reset_peak(&mut self) {
        self.peak = self.held;
    }

    /// Bytes of free stretches.
    pub(super) fn left(&self) -> u64 {
        self.left * UNIT
    }

    /// Whether `requested` more bytes fit.
    pub(super) fn check_room(&self, requested: u64) -> Result<(), ExecError> {
        if self.held + requested > self.budget {
            return Err(full(requested, self.held, self.budget));
        }
        Ok(())
    }

    /// A place of `bytes` bytes that count as `counted`: the first stretch that is long enough.
    pub(super) fn take(&mut self, counted: u64, bytes: u64) -> Result<u32, ExecError> {
        self.check_room(counted)?;
        let units = bytes.div_ceil(UNIT) as u32;
        let found = self.free.iter().find(|(_, length)| **length >= units);
        let Some((&place, &length)) = found else {
            return Err(full(counted, self.held, self.budget));
        };
        self.free.remove(&place);
        if length > units {
            self.free.insert(place + units, length - units);
        }
        self.left -= u64::from(units);
        self.held += counted;
        self.peak = self.peak.max(self.held);
        Ok(place)
    }

    /// The same at the end of the last stretch that is long enough: what has another size than halves and stays long would
    /// leave gaps between them.
    pub(super) fn take_behind(&mut self, counted: u64, bytes: u64) -> Result<u32, ExecError> {
        self.check_room(counted)?;
        let units = bytes.div_ceil(UNIT) as u32;
        let found = self.free.iter_mut().rev().find(|(_, length)| **length >= units);
        let Some((&first, length)) = found else {
            return Err(full(counted, self.held, self.budget));
        };
        *length -= units;
        let place = first + *length;
        if *length == 0 {
            self.free.remove(&first);
        }
        self.left -= u64::from(units);
        self.held += counted;
        self.peak = self.peak.max(self.held);
        Ok(place)
    }

    /// Gives a place back.
    pub(super) fn give(&mut self, place: u32, counted: u64, bytes: u64) {
        let mut units = bytes.div_ceil(UNIT) as u32;
        self.held -= counted;
        self.left += u64::from(units);
        let mut from = place;
        if let Some(length) = self.free.remove(&(place + units)) {
            units += length;
        }
        if let Some((&before, &length)) = self.free.range(..place).next_back()
            && before + length == place
        {
            self.free.remove(&before);
            (from, units) = (before, units + length);
        }
        self.free.insert(from, units);
    }

    /// Counts what stands twice for the moment once: `freed` bytes will be given back by [`Self::settle`].
    pub(super) fn exchange(&mut self, freed: u64, wanted: u64) -> Result<(), ExecError> {
        self.held -= freed;
        let room = self.check_room(wanted);
        if room.is_err() {
            self.held += freed;
        }
        room
    }

    /// Counts again what [`Self::exchange`] left out, in front of its giving back.
    pub(super) fn settle(&mut self, freed: u64) {
        self.held += freed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(units: u32, budget: u64) -> Pool {
        let free = BTreeMap::from([(0, units)]);
        Pool { at: Address(1 << 20), free, left: u64::from(units), budget, held: 0, peak: 0 }
    }

    #[test]
    fn places_are_joined_when_they_come_back() {
        let mut pool = pool(10, 640);
        let places: Vec<u32> =
            [128, 64, 100].iter().map(|bytes| pool.take(*bytes, *bytes).expect("room")).collect();
        assert_eq!((places.as_slice(), pool.held(), pool.left()), (&[0, 2, 3][..], 292, 320));
        pool.give(2, 64, 64);
        assert_eq!(pool.take(128, 128).expect("behind the gap"), 5);
        pool.give(0, 128, 128);
        pool.give(3, 100, 100);
        assert_eq!(pool.take(320, 320).expect("the first five are one again"), 0);
        assert_eq!(pool.address(5), Address((1 << 20) + 320));
        pool.give(0, 320, 320);
        pool.give(5, 128, 128);
        assert_eq!((pool.held(), pool.peak(), pool.left(), pool.free.len()), (0, 448, 640, 1));
    }

    #[test]
    fn what_stays_long_is_taken_from_behind() {
        let mut pool = pool(10, 640);
        assert_eq!(pool.take(128, 128).expect("room"), 0);
        assert_eq!(pool.take_behind(65, 65).expect("room"), 8);
        assert_eq!(pool.take_behind(64, 64).expect("room"), 7);
        pool.give(8, 65, 65);
        assert_eq!(pool.take_behind(60, 60).expect("the gap behind"), 9);
        assert_eq!(pool.take(320, 320).expect("all between"), 2);
        assert!(pool.take(128, 128).is_err() && pool.take_behind(128, 128).is_err());
        assert_eq!(pool.take_behind(64, 64).expect("the last unit"), 8);
        assert_eq!((pool.left(), pool.free.len()), (0, 0));
    }

    #[test]
    fn the_budget_is_hard_whatever_the_piece_holds() {
        let mut pool = pool(10, 100);
        pool.take(100, 128).expect("room");
        let error = pool.take(1, 64).expect_err("no budget").to_string();
        assert!(error.contains("100 bytes"), "{error}");
        pool.exchange(100, 60).expect("less than before");
        let place = pool.take(60, 64).expect("room");
        pool.settle(100);
        pool.give(0, 100, 128);
        assert_eq!((pool.held(), pool.peak()), (60, 100));
        pool.give(place, 60, 64);
        assert!(pool.exchange(0, 101).is_err());
    }
}

//! What is alive on a pretended device.

use std::sync::{Arc, Mutex, PoisonError};

use super::shim::Moved;

/// Counts of a device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Live {
    /// Pieces of device memory that were taken and not given back.
    pub allocations: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The most bytes that there were at once.
    pub peak: u64,
    /// Pieces of pinned memory.
    pub pinned: usize,
    /// Streams, the first included.
    pub streams: usize,
    /// Events.
    pub events: usize,
    /// Recordings.
    pub graphs: usize,
    /// Bytes of each piece of device memory that was still alive when the device was dropped.
    pub leaked: Vec<u64>,
    /// Kernels that ran.
    pub launches: u64,
    /// What they moved.
    pub moved: Moved,
}

/// A handle on the counts that outlives the device.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<Live>>);

impl Ledger {
    /// The counts now.
    #[must_use]
    pub fn live(&self) -> Live {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Live) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

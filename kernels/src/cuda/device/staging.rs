//! Pinned memory through which uploads go: the device may still read it when the bytes they came from are gone.

use std::collections::VecDeque;

use cudarc::driver::{result, sys};

use super::said;
use crate::cuda::{Address, CudaError};

/// Bytes of it.
const BYTES: usize = 16 << 20;
/// The most that goes in one copy, so that filling it and copying out of it overlap.
const PIECE: usize = BYTES / 4;

/// A place in the ring from which a copy may still go on.
struct Copy {
    start: usize,
    end: usize,
    event: sys::CUevent,
}

/// A ring of pinned memory.
pub(super) struct Staging {
    base: *mut u8,
    head: usize,
    /// The oldest first.
    copies: VecDeque<Copy>,
    idle: Vec<sys::CUevent>,
}

impl Staging {
    /// Takes the memory; the context is current, as it is in all that follows.
    ///
    /// # Errors
    /// What the driver said.
    pub(super) fn new() -> Result<Self, CudaError> {
        // SAFETY: plain memory without flags.
        let base = unsafe { result::malloc_host(BYTES, 0) };
        let base = base.map_err(|e| said("taking pinned memory", e))?.cast();
        Ok(Self { base, head: 0, copies: VecDeque::new(), idle: Vec::new() })
    }

    /// Waits for copies, the oldest first, as long as they fit the description.
    fn retire(&mut self, which: impl Fn(&Copy) -> bool) -> Result<(), CudaError> {
        while let Some(copy) = self.copies.pop_front_if(|copy| which(copy)) {
            self.idle.push(copy.event);
            // SAFETY: the event is alive.
            unsafe { result::event::synchronize(copy.event) }
                .map_err(|e| said("waiting for an upload", e))?;
        }
        Ok(())
    }

    /// Where `bytes`, at most a piece, may be written now.
    fn reserve(&mut self, bytes: usize) -> Result<usize, CudaError> {
        if self.head + bytes > BYTES {
            // What stands from the head on is older than all that stands before it.
            let head = self.head;
            self.retire(|copy| copy.start >= head)?;
            self.head = 0;
        }
        let (start, end) = (self.head, self.head + bytes);
        self.retire(|copy| copy.start < end && copy.end > start)?;
        self.head = end;
        Ok(start)
    }

    /// Copies bytes to the device; they may be dropped when this returns.
    ///
    /// # Errors
    /// What the driver said.
    pub(super) fn upload(
        &mut self,
        stream: sys::CUstream,
        to: Address,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        let uploading = |e| said("an upload", e);
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let start = self.reserve(piece.len())?;
            // SAFETY: `reserve` gives a place of that length inside of the ring, from which no copy goes on.
            let source = unsafe {
                let place = self.base.add(start);
                place.copy_from_nonoverlapping(piece.as_ptr(), piece.len());
                std::slice::from_raw_parts(place, piece.len())
            };
            let to = to.plus((i * PIECE) as u64).0;
            // SAFETY: the caller has checked the destination; the source stays until the event below.
            unsafe { result::memcpy_htod_async(to, source, stream) }.map_err(uploading)?;
            let event = match self.idle.pop() {
                Some(event) => event,
                None => result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(uploading)?,
            };
            self.copies.push_back(Copy { start, end: start + piece.len(), event });
            // SAFETY: both are alive.
            unsafe { result::event::record(event, stream) }.map_err(uploading)?;
        }
        Ok(())
    }

    /// Gives everything back; all copies have ended.
    pub(super) fn release(&mut self) {
        let events = self.copies.drain(..).map(|copy| copy.event).chain(self.idle.drain(..));
        for event in events {
            // SAFETY: made here, destroyed once. An error has nobody to go to.
            let _ = unsafe { result::event::destroy(event) };
        }
        // SAFETY: the same.
        let _ = unsafe { result::free_host(self.base.cast()) };
    }
}

//! Memory of a pretended device: pieces of the host's, each between two guards.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

use super::shim::Range;

/// Bytes on both sides that nobody may touch.
const GUARD: usize = 256;
/// Alignment of every piece, in bytes.
const ALIGN: usize = 256;
/// What fresh memory holds: no float of any width is a number with these bytes.
const POISON: u8 = 0xff;

struct Piece {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a piece is the only owner of its memory, as a box is.
unsafe impl Send for Piece {}

impl Piece {
    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.checked_add(2 * GUARD)?, ALIGN).ok()
    }

    fn new(bytes: usize) -> Option<Self> {
        let layout = Self::layout(bytes)?;
        // SAFETY: the layout is not empty, and all of it is written at once where there was memory.
        let base = unsafe {
            let base = alloc(layout);
            if base.is_null() {
                return None;
            }
            base.write_bytes(POISON, layout.size());
            base
        };
        Some(Self { base, bytes })
    }

    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(GUARD)
    }

    fn is_intact(&self) -> bool {
        // SAFETY: both guards belong to the piece, and were written when it was made.
        let guards = unsafe {
            [
                std::slice::from_raw_parts(self.base, GUARD),
                std::slice::from_raw_parts(self.start().add(self.bytes), GUARD),
            ]
        };
        guards.iter().all(|guard| guard.iter().all(|byte| *byte == POISON))
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let layout = Self::layout(self.bytes).expect("it was allocated with this layout");
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, layout) };
    }
}

/// All pieces, by address.
#[derive(Default)]
pub(super) struct Pieces {
    by_address: BTreeMap<u64, Piece>,
    used: u64,
    ranges: Option<Vec<Range>>,
}

impl Pieces {
    /// Takes `bytes`; `None` where the host has no more. They hold poison.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let piece = Piece::new(usize::try_from(bytes).ok()?)?;
        let at = piece.start() as u64;
        self.by_address.insert(at, piece);
        self.used += bytes;
        self.ranges = None;
        Some(at)
    }

    /// Gives a piece back, by its first address.
    pub(super) fn give(&mut self, at: u64) -> Result<(), String> {
        let piece =
            self.by_address.remove(&at).ok_or_else(|| format!("nothing was taken at {at:#x}"))?;
        self.used -= piece.bytes as u64;
        self.ranges = None;
        if piece.is_intact() {
            Ok(())
        } else {
            Err("somebody wrote in front of it or behind it".into())
        }
    }

    /// Bytes of all.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Addresses and bytes of all.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u64)> {
        self.by_address.iter().map(|(at, piece)| (*at, piece.bytes as u64))
    }

    /// What kernels may touch: everything.
    pub(super) fn ranges(&mut self) -> &[Range] {
        let pieces = &self.by_address;
        self.ranges.get_or_insert_with(|| {
            let range = |(at, piece): (&u64, &Piece)| Range {
                begin: *at,
                end: at + piece.bytes as u64,
                writable: 1,
            };
            pieces.iter().map(range).collect()
        })
    }

    fn find(&self, at: u64, bytes: u64) -> Result<*mut u8, String> {
        let outside = || format!("{bytes} bytes at {at:#x} are not inside of what was taken");
        let (begin, piece) = self.by_address.range(..=at).next_back().ok_or_else(outside)?;
        let offset = at - begin;
        if offset.checked_add(bytes).is_none_or(|end| end > piece.bytes as u64) {
            return Err(outside());
        }
        Ok(piece.start().wrapping_add(offset as usize))
    }

    /// Bytes from an address on.
    pub(super) fn read(&self, at: u64, bytes: u64) -> Result<&[u8], String> {
        let start = self.find(at, bytes)?;
        // SAFETY: inside of a piece, which is initialised; kernels, who write, borrow all pieces mutably.
        Ok(unsafe { std::slice::from_raw_parts(start, bytes as usize) })
    }

    /// The same, to be written.
    pub(super) fn write(&mut self, at: u64, bytes: u64) -> Result<&mut [u8], String> {
        let start = self.find(at, bytes)?;
        // SAFETY: inside of a piece, which is initialised and borrowed by nobody else.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, bytes as usize) })
    }
}

//! Aligned memory: large buffers that the system hands out page by page as they are touched, and scratch space that a
//! thread keeps between tasks.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::ptr::NonNull;

/// One cache line, and the alignment that the vector loads like best.
const LINE: usize = 64;

/// Zeroed bytes, aligned to a cache line and with another one behind them, so that a vector may be read at the last number.
///
/// The allocation itself asks for a small alignment only: for a larger one the standard allocator would write the zeros
/// itself, and memory that is merely reserved would become resident.
pub(crate) struct AlignedBytes {
    base: NonNull<u8>,
    layout: Layout,
    offset: usize,
    len: usize,
}

impl AlignedBytes {
    pub(crate) fn zeroed(len: usize) -> Self {
        let size = len.checked_add(2 * LINE).expect("buffer size overflows");
        let layout = Layout::from_size_align(size, 16).expect("buffer size overflows");
        // SAFETY: the layout has a size above zero.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
        let offset = base.as_ptr().align_offset(LINE);
        Self { base, layout, offset, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: the offset is below LINE, and the allocation has two of them on top of `len`.
        unsafe { self.base.as_ptr().add(self.offset) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

// SAFETY: the buffer owns its memory; access through the pointer is ordered by whoever holds it.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; a shared reference alone gives only an address and a length.
unsafe impl Sync for AlignedBytes {}

thread_local! {
    static SCRATCH: Cell<Option<AlignedBytes>> = const { Cell::new(None) };
}

/// A thread's scratch space, on loan. A loan inside a loan gets space of its own.
///
/// It is a guard rather than a function that calls back, because a callback would not be compiled for the instruction set
/// of the kernel around it.
pub(crate) struct Scratch {
    buffer: Option<AlignedBytes>,
    len: usize,
}

impl Scratch {
    /// Space for `len` floats, contents unspecified.
    pub(crate) fn take(len: usize) -> Self {
        let held = SCRATCH.take().filter(|b| b.len() >= len * 4);
        let buffer = held.unwrap_or_else(|| AlignedBytes::zeroed((len * 4).next_multiple_of(4096)));
        Self { buffer: Some(buffer), len }
    }

    pub(crate) fn floats(&mut self) -> &mut [f32] {
        let start =
            self.buffer.as_ref().map_or(std::ptr::dangling_mut(), |b| b.as_ptr().cast::<f32>());
        // SAFETY: the buffer holds at least `len` aligned, initialised floats and is there until the drop.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        SCRATCH.set(self.buffer.take());
    }
}

/// Cuts a scratch slice into parts whose starts stay on cache lines.
pub(crate) fn split_lines(scratch: &mut [f32], len: usize) -> (&mut [f32], &mut [f32]) {
    let (part, rest) = scratch.split_at_mut(lines(len));
    (&mut part[..len], rest)
}

/// `len` floats rounded up to whole cache lines.
pub(crate) fn lines(len: usize) -> usize {
    len.next_multiple_of(LINE / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_nested_scratch_is_distinct() {
        let mut outer = Scratch::take(100);
        assert_eq!(outer.floats().as_ptr() as usize % LINE, 0);
        outer.floats().fill(1.0);
        Scratch::take(10).floats().fill(2.0);
        assert!(outer.floats().iter().all(|x| *x == 1.0));
    }

    #[test]
    fn buffers_are_zero_and_aligned() {
        let buffer = AlignedBytes::zeroed(1000);
        assert_eq!(buffer.as_ptr() as usize % LINE, 0);
        // SAFETY: 1000 bytes were allocated and zeroed.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), buffer.len()) };
        assert!(bytes.iter().all(|b| *b == 0));
    }
}

//! Files as memory: what was written once is read without a copy, page by page as it is touched.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// What is used of a mapped file begins at multiples of so many bytes, a cache line, and has as many behind it: kernels
/// read whole vectors at the last number.
pub const MARGIN: usize = 64;

/// A file that is mapped to be read.
pub struct Mapped {
    map: Mmap,
}

impl Mapped {
    /// Maps the whole file. It must be one that is never changed in place: written whole under another name, made
    /// read-only, renamed, and at most unlinked or replaced by another rename later.
    ///
    /// # Errors
    /// What the system says; an empty file can't be mapped everywhere.
    pub fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the bytes of the map don't change and don't go, since nobody writes to or truncates a file that is made
        // as demanded above; unlinking or replacing its name leaves the file itself to this map.
        let map = unsafe { Mmap::map(file)? };
        Ok(Self { map })
    }

    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

//! Buffers of a pretended device, and launches on it: each in three orders of threads, which must give the same bits.

use std::alloc::{Layout, alloc, dealloc};

use batchmax_kernels::cuda::CudaError;
use batchmax_kernels::cuda::emulated::shim::{Moved, Range, Start, open};

/// Bytes on both sides of a buffer that nobody may touch.
const GUARD: usize = 256;
/// No float of any width is a number with these bytes.
const POISON: u8 = 0xff;
/// Forward, backward, shuffled.
const ORDERS: [u32; 3] = [0, 1, 20_240_607];

/// Types whose bytes a kernel can read.
pub trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for u64 {}

struct Memory {
    base: *mut u8,
    bytes: usize,
    writable: bool,
}

impl Memory {
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes + 2 * GUARD, 256).expect("a layout")
    }

    fn new(bytes: usize, writable: bool) -> Self {
        // SAFETY: the layout is not empty; all of it is written at once.
        let base = unsafe {
            let base = alloc(Self::layout(bytes));
            assert!(!base.is_null(), "no memory");
            base.write_bytes(POISON, bytes + 2 * GUARD);
            base
        };
        Self { base, bytes, writable }
    }

    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(GUARD)
    }

    fn slice(&self) -> &[u8] {
        // SAFETY: the bytes are initialised, and nobody writes while a test holds them.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes, "outside of the buffer");
        // SAFETY: inside the buffer, as checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start().add(at), bytes.len()) };
    }

    fn is_intact(&self) -> bool {
        // SAFETY: both guards belong to the allocation.
        let guards = unsafe {
            [
                std::slice::from_raw_parts(self.base, GUARD),
                std::slice::from_raw_parts(self.start().add(self.bytes), GUARD),
            ]
        };
        guards.iter().all(|g| g.iter().all(|b| *b == POISON))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated so.
        unsafe { dealloc(self.base, Self::layout(self.bytes)) };
    }
}

/// A buffer.
#[derive(Clone, Copy, Debug)]
pub struct Buffer(usize);

/// An argument of a kernel.
pub enum Arg {
    /// A number.
    U32(u32),
    /// A number.
    F32(f32),
    /// The address of a buffer.
    At(Buffer),
    /// No buffer.
    Null,
    /// A structure, passed by value.
    Bytes(Vec<u8>),
}

/// All buffers of a test.
#[derive(Default)]
pub struct Gpu {
    memory: Vec<Memory>,
}

/// Whether there is a compiler; says so if not, for then nothing is tested.
pub fn available() -> bool {
    match open() {
        Ok(_) => true,
        Err(CudaError::Unavailable { why }) => {
            #[expect(clippy::print_stderr, reason = "a test that is left out must say so")]
            {
                eprintln!("SKIPPED: {why}");
            }
            false
        }
        Err(why) => panic!("{why}"),
    }
}

/// The bytes of numbers.
pub fn bytes_of<T: Plain>(numbers: &[T]) -> Vec<u8> {
    // SAFETY: plain numbers have no padding.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }.to_vec()
}

impl Gpu {
    /// What kernels may only read.
    pub fn input<T: Plain>(&mut self, numbers: &[T]) -> Buffer {
        self.add(size_of_val(numbers), false, &bytes_of(numbers))
    }

    /// What kernels may read and write.
    pub fn inout<T: Plain>(&mut self, numbers: &[T]) -> Buffer {
        self.add(size_of_val(numbers), true, &bytes_of(numbers))
    }

    /// What kernels write; poison at first.
    pub fn output(&mut self, bytes: usize) -> Buffer {
        self.add(bytes, true, &[])
    }

    fn add(&mut self, bytes: usize, writable: bool, content: &[u8]) -> Buffer {
        let memory = Memory::new(bytes, writable);
        memory.put(0, content);
        self.memory.push(memory);
        Buffer(self.memory.len() - 1)
    }

    /// Its address.
    pub fn at(&self, buffer: Buffer) -> u64 {
        self.memory[buffer.0].start() as u64
    }

    /// Replaces bytes from `at` on.
    pub fn put(&self, buffer: Buffer, at: usize, bytes: &[u8]) {
        self.memory[buffer.0].put(at, bytes);
    }

    /// Its bytes.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        self.memory[buffer.0].slice()
    }

    /// Its numbers.
    pub fn read<T: Plain>(&self, buffer: Buffer) -> Vec<T> {
        let bytes = self.bytes(buffer);
        let count = bytes.len() / size_of::<T>();
        // SAFETY: buffers are aligned to any number, of which all bytes are one.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<T>(), count) }.to_vec()
    }

    /// Runs a kernel in three orders and demands the same bits.
    pub fn launch(
        &mut self,
        kernel: &str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        arguments: &[Arg],
    ) -> Moved {
        self.try_launch(kernel, grid, block, shared, arguments)
            .unwrap_or_else(|why| panic!("{why}"))
    }

    /// The same.
    ///
    /// # Errors
    /// What is wrong with the kernel.
    pub fn try_launch(
        &mut self,
        kernel: &str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        arguments: &[Arg],
    ) -> Result<Moved, String> {
        let arguments: Vec<Vec<u8>> = arguments
            .iter()
            .map(|argument| match argument {
                Arg::U32(x) => bytes_of(&[*x]),
                Arg::F32(x) => bytes_of(&[*x]),
                Arg::At(buffer) => bytes_of(&[self.at(*buffer)]),
                Arg::Null => vec![0; 8],
                Arg::Bytes(bytes) => bytes.clone(),
            })
            .collect();
        let mut ranges: Vec<Range> = self
            .memory
            .iter()
            .map(|m| {
                let begin = m.start() as u64;
                Range { begin, end: begin + m.bytes as u64, writable: m.writable.into() }
            })
            .collect();
        ranges.sort_by_key(|r| r.begin);
        let library = open().map_err(|e| e.to_string())?;
        let writable: Vec<usize> =
            (0..self.memory.len()).filter(|i| self.memory[*i].writable).collect();
        let all = |gpu: &Self| -> Vec<Vec<u8>> {
            writable.iter().map(|i| gpu.memory[*i].slice().to_vec()).collect()
        };
        let before = all(self);
        let mut first: Option<(Moved, Vec<Vec<u8>>)> = None;
        for order in ORDERS {
            for (i, bytes) in writable.iter().zip(&before) {
                self.memory[*i].put(0, bytes);
            }
            let grid = grid.map(|n| n as u32);
            let (block, shared) = (block as u32, shared as u32);
            let start = Start { grid, block, shared, order, ranges: &ranges };
            let moved = library.launch(kernel, &start, &arguments)?;
            if !self.memory.iter().all(Memory::is_intact) {
                return Err(format!("{kernel} wrote outside of a buffer"));
            }
            let after = all(self);
            match &first {
                None => first = Some((moved, after)),
                Some((_, bytes)) if *bytes != after => {
                    return Err(format!("{kernel} depends on the order of threads ({order})"));
                }
                Some(_) => {}
            }
        }
        Ok(first.expect("there are orders").0)
    }
}

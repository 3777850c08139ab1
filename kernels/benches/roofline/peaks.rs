//! What the machine can do at best.

use std::cell::Cell;
use std::hint::black_box;

use batchmax_kernels::gemm::{Isa, isa};
use batchmax_kernels::threads::Threads;

use crate::least_time;

/// Rounds of a piece of arithmetic: some 10 microseconds.
const ROUNDS: usize = 2_000;
/// Independent sums: twice as many as instructions are under way.
const SUMS: usize = 12;
/// Bytes of a buffer that no cache holds.
const BUFFER: usize = 512 << 20;
/// Bytes of it that are read in turn, and those that a thread takes at a time.
const WINDOW: usize = 8 << 20;
const PIECE: usize = 256 << 10;

/// Bytes ahead of the loads that are asked for.
const AHEAD: usize = 4096;

/// Asks for two cache lines: the processor alone does not reach the rate of its memory.
fn ask(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..2 {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on time, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line * 8).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::hint::black_box(at);
}

/// Peaks of some threads together: multiply-adds a second in single precision, of bytes in integers, bytes a second read.
pub(crate) struct Peaks {
    pub(crate) f32: f64,
    pub(crate) int8: f64,
    pub(crate) memory: f64,
    buffer: Vec<u64>,
    at: Cell<usize>,
}

/// What can bind a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    Floats,
    Integers,
    Memory,
}

impl Peaks {
    pub(crate) fn measure(threads: &Threads) -> Self {
        let (f32, int8, memory) = (0.0, 0.0, 0.0);
        let mut peaks =
            Self { f32, int8, memory, buffer: vec![1u64; BUFFER / 8], at: Cell::new(0) };
        let rate = |limit, amount| {
            let mut done = 0.0;
            let time = least_time(threads, |_| done = peaks.run(threads, limit, amount));
            done / time
        };
        let (f32, int8) = (rate(Limit::Floats, 0.0), rate(Limit::Integers, 0.0));
        let memory = rate(Limit::Memory, WINDOW as f64);
        (peaks.f32, peaks.int8, peaks.memory) = (f32, int8, memory);
        peaks
    }

    /// Does at least so much of one thing at the best rate, and says how much: multiply-adds or bytes.
    pub(crate) fn run(&self, threads: &Threads, limit: Limit, amount: f64) -> f64 {
        let arithmetic = |(lanes, run): (usize, fn())| {
            // Several pieces a thread: the slowest start does not count.
            let piece = (ROUNDS * SUMS * lanes) as f64;
            let tasks = ((amount / piece).ceil() as usize).next_multiple_of(threads.count() * 4);
            let tasks = tasks.max(threads.count() * 4);
            threads.run(tasks, |_| run());
            tasks as f64 * piece
        };
        match limit {
            Limit::Floats => arithmetic(floats()),
            Limit::Integers => arithmetic(integers()),
            Limit::Memory => {
                let pieces = ((amount / PIECE as f64).ceil() as usize).clamp(1, BUFFER / PIECE);
                let start = self.at.get();
                self.at.set((start + pieces * PIECE) % BUFFER);
                let buffer = &self.buffer;
                threads.run(pieces, |i| {
                    let at = (start + i * PIECE) % BUFFER / 8;
                    let piece = &buffer[at..at + PIECE / 8];
                    let mut sums = [0u64; 16];
                    for words in piece.as_chunks::<16>().0 {
                        ask(words.as_ptr().wrapping_add(AHEAD / 8));
                        for (sum, word) in sums.iter_mut().zip(words) {
                            *sum ^= word;
                        }
                    }
                    black_box(sums);
                });
                (pieces * PIECE) as f64
            }
        }
    }
}

fn plain_floats() {
    let mut sums = [[1.0f32; 8]; SUMS];
    let (by, plus) = (black_box([0.999f32; 8]), black_box([0.001f32; 8]));
    for _ in 0..ROUNDS {
        for sums in &mut sums {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = *sum * by[i] + plus[i];
            }
        }
    }
    black_box(sums);
}

fn plain_integers() {
    let mut sums = [[1i32; 8]; SUMS];
    let (codes, x) = (black_box([3u8; 8]), black_box([5i8; 8]));
    for _ in 0..ROUNDS {
        for sums in &mut sums {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = sum.wrapping_add(i32::from(codes[i]) * i32::from(x[i]));
            }
        }
        black_box(&mut sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{ROUNDS, SUMS};

    macro_rules! peak {
        ($name:ident, $features:literal, $start:expr, $factors:expr, $step:expr) => {
            pub(super) fn $name() {
                #[target_feature(enable = $features)]
                fn run() {
                    let mut sums = [$start; SUMS];
                    let (a, b) = black_box($factors);
                    for _ in 0..ROUNDS {
                        for sum in &mut sums {
                            *sum = $step(*sum, a, b);
                        }
                    }
                    black_box(sums);
                }
                // SAFETY: chosen where the processor has the features.
                unsafe { run() }
            }
        };
    }

    peak!(
        avx2_floats,
        "avx2,fma",
        _mm256_set1_ps(1.0),
        (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001)),
        |s, a, b| _mm256_fmadd_ps(s, a, b)
    );
    peak!(
        avx512_floats,
        "avx512f",
        _mm512_set1_ps(1.0),
        (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001)),
        |s, a, b| _mm512_fmadd_ps(s, a, b)
    );
    // Each product depends on the sum, so that it can't leave the loop.
    peak!(
        avx2_integers,
        "avx2",
        _mm256_set1_epi8(1),
        (_mm256_set1_epi8(3), _mm256_set1_epi8(5)),
        |s, a, b| _mm256_add_epi16(_mm256_maddubs_epi16(a, s), b)
    );
    peak!(
        vnni_integers,
        "avx512f,avx512vnni",
        _mm512_set1_epi32(1),
        (_mm512_set1_epi8(3), _mm512_set1_epi8(5)),
        |s, a, b| _mm512_dpbusd_epi32(s, a, b)
    );
}

/// Multiply-adds of a step, and the loop.
fn floats() -> (usize, fn()) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (16, x86::avx512_floats),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (8, x86::avx2_floats),
        _ => (8, plain_floats),
    }
}

/// The same of bytes: on AVX2 as a multiplication into 16-bit sums and an addition.
fn integers() -> (usize, fn()) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => (64, x86::vnni_integers),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => (32, x86::avx2_integers),
        _ => (8, plain_integers),
    }
}

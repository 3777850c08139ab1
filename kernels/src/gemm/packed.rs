//! Weights in panels of 32 output columns.

use crate::buffer::AlignedBytes;
use crate::simd::{Isa, Simd, bf16_bits, isa, multiversion};
use crate::tile::PANEL;

/// The number format of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// Single precision.
    F32,
    /// Brain floats: the upper half of single precision.
    Bf16,
}

impl WeightFormat {
    const fn bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::Bf16 => 2,
        }
    }
}

/// An N x K weight matrix as `[ceil(N / 32)][K][32]`: the numbers that meet one element of x lie next to each other.
/// Columns beyond N are zero.
pub struct Packed {
    n: usize,
    k: usize,
    format: WeightFormat,
    data: AlignedBytes,
}

impl Packed {
    /// Packs the matrix whose row `i` of length `k` `rows(i, out)` writes. It is called once per row, in order.
    pub fn pack(
        n: usize,
        k: usize,
        format: WeightFormat,
        mut rows: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let packed = Self::zeroed(n, k, format);
        let mut staged = vec![0.0f32; PANEL * k];
        for panel in 0..n.div_ceil(PANEL) {
            let first = panel * PANEL;
            let count = PANEL.min(n - first);
            for i in 0..count {
                rows(first + i, &mut staged[i * k..(i + 1) * k]);
            }
            for at in 0..k {
                let start = (panel * k + at) * PANEL;
                for i in 0..count {
                    let x = staged[i * k + at];
                    // SAFETY: inside the panel; nobody else has the fresh buffer.
                    unsafe {
                        match format {
                            WeightFormat::F32 => {
                                packed.data.as_ptr().cast::<f32>().add(start + i).write(x);
                            }
                            WeightFormat::Bf16 => {
                                packed
                                    .data
                                    .as_ptr()
                                    .cast::<u16>()
                                    .add(start + i)
                                    .write(bf16_bits(x));
                            }
                        }
                    }
                }
            }
        }
        packed
    }

    /// Made-up weights, uniform in `-scale..=scale`: the same for the same shape and seed on every machine.
    #[must_use]
    pub fn synthetic(n: usize, k: usize, format: WeightFormat, seed: u64, scale: f32) -> Self {
        let packed = Self::zeroed(n, k, format);
        let panels = n.div_ceil(PANEL);
        let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // Small matrices are not worth a thread.
        let share = panels.div_ceil(workers).max((1 << 20) / (PANEL * k).max(1)).max(1);
        let (isa, target) = (isa(), &packed);
        let make = |first: usize| {
            for panel in first..(first + share).min(panels) {
                target.make_up(isa, panel, seed, scale);
            }
        };
        std::thread::scope(|scope| {
            for first in (share..panels).step_by(share) {
                scope.spawn(move || make(first));
            }
            make(0);
        });
        packed
    }

    fn make_up(&self, isa: Isa, panel: usize, seed: u64, scale: f32) {
        let start = panel * self.k * PANEL;
        // One 32-bit stream per panel keeps the inner loop in 32-bit lanes.
        let key = mix((seed as u32).wrapping_add((panel as u32).wrapping_mul(0x9e37_79b9)))
            ^ mix((seed >> 32) as u32 ^ !(panel as u32));
        let count = PANEL.min(self.n - panel * PANEL);
        // SAFETY: the panel lies inside the buffer and one thread makes it up.
        unsafe {
            let p = self.data.as_ptr().add(start * self.format.bytes());
            match self.format {
                WeightFormat::F32 => fill_f32(isa, p.cast(), self.k, count, key, scale),
                WeightFormat::Bf16 => fill_bf16(isa, p.cast(), self.k, count, key, scale),
            }
        }
    }

    fn zeroed(n: usize, k: usize, format: WeightFormat) -> Self {
        Self { n, k, format, data: AlignedBytes::zeroed(Self::bytes_for(n, k, format)) }
    }

    /// Output columns.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input columns.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Number format.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes of the panels.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Bytes that a matrix of this shape takes, without making it.
    #[must_use]
    pub fn bytes_for(n: usize, k: usize, format: WeightFormat) -> usize {
        n.div_ceil(PANEL) * PANEL * k * format.bytes()
    }

    /// Unpacks row `i`, of length `k`.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k, "out is not k long");
        let start = (i / PANEL) * self.k * PANEL + i % PANEL;
        for (at, out) in out.iter_mut().enumerate() {
            let index = start + at * PANEL;
            // SAFETY: inside the panels.
            *out = unsafe {
                match self.format {
                    WeightFormat::F32 => *self.data.as_ptr().cast::<f32>().add(index),
                    WeightFormat::Bf16 => f32::from_bits(
                        u32::from(*self.data.as_ptr().cast::<u16>().add(index)) << 16,
                    ),
                }
            };
        }
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.data.as_ptr()
    }
}

/// A hash of 32 bits whose outputs pass for random.
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[inline(always)]
fn uniform(key: u32, index: usize, scale: f32) -> f32 {
    let bits = mix((index as u32).wrapping_mul(0x9e37_79b9) ^ key);
    (bits as i32 as f32) * (1.0 / 2_147_483_648.0) * scale
}

#[inline(always)]
fn keep_f32(x: f32) -> f32 {
    x
}

macro_rules! fill {
    ($body:ident, $name:ident, $element:ty, $convert:ident) => {
        #[inline(always)]
        unsafe fn $body<S: Simd>(_s: S, p: *mut $element, k: usize, count: usize, key: u32, scale: f32) {
            for at in 0..k {
                // SAFETY: a panel has k rows of 32 elements.
                let row = unsafe { &mut *p.add(at * PANEL).cast::<[$element; PANEL]>() };
                for (i, x) in row.iter_mut().enumerate() {
                    *x = $convert(uniform(key, at * PANEL + i, scale));
                }
                row[count..].fill(Default::default());
            }
        }

        multiversion! { unsafe fn $name(p: *mut $element, k: usize, count: usize, key: u32, scale: f32) = $body }
    };
}

fill!(fill_f32_body, fill_f32, f32, keep_f32);
fill!(fill_bf16_body, fill_bf16, u16, bf16_bits);

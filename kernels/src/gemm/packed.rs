//! Weights in panels of 32 output columns.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::buffer::AlignedBytes;
use crate::mapped::{MARGIN, Mapped};
use crate::simd::{Isa, LANES, Simd, bf16_bits, isa, multiversion};
use crate::tile::PANEL;

/// The number format of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// Single precision.
    F32,
    /// Brain floats: the upper half of single precision.
    Bf16,
    /// Codes of 4 bits in blocks of 32 along K, each with a binary16 scale and minimum (GGUF's `Q4_0` and `Q4_1`).
    Q4,
    /// Codes of 8 bits in such blocks (GGUF's `Q8_0`).
    Q8,
}

/// Codes along K that share a scale.
pub(super) const BLOCK: usize = 32;

/// Bytes of a block of a panel: codes, scales, minima.
pub(super) const fn block_bytes(bits: usize) -> usize {
    PANEL * BLOCK * bits / 8 + 2 * PANEL * 2
}

impl WeightFormat {
    /// Bits of a code, where numbers are codes in blocks.
    #[must_use]
    pub const fn code_bits(self) -> Option<usize> {
        match self {
            WeightFormat::F32 | WeightFormat::Bf16 => None,
            WeightFormat::Q4 => Some(4),
            WeightFormat::Q8 => Some(8),
        }
    }

    /// Bytes of a panel of K numbers in each column.
    const fn panel_bytes(self, k: usize) -> usize {
        match self {
            WeightFormat::F32 => PANEL * k * 4,
            WeightFormat::Bf16 => PANEL * k * 2,
            WeightFormat::Q4 => k.div_ceil(BLOCK) * block_bytes(4),
            WeightFormat::Q8 => k.div_ceil(BLOCK) * block_bytes(8),
        }
    }
}

/// A row of weights as codes: `code * scale + minimum`, 32 to a scale, the last block padded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CodeRow {
    /// A code each, in a byte.
    pub codes: Vec<u8>,
    /// Scales, binary16.
    pub scales: Vec<u16>,
    /// Minima, binary16.
    pub minima: Vec<u16>,
}

impl CodeRow {
    /// Of `k` zeros.
    #[must_use]
    pub fn zero(k: usize) -> Self {
        let blocks = k.div_ceil(BLOCK);
        Self { codes: vec![0; blocks * BLOCK], scales: vec![0; blocks], minima: vec![0; blocks] }
    }

    /// The nearest codes of `bits` bits to `values`, between the least and the largest number of each block.
    pub fn quantise(&mut self, values: &[f32], bits: usize) {
        let most = ((1u32 << bits) - 1) as f32;
        self.codes.fill(0);
        for (block, values) in values.chunks(BLOCK).enumerate() {
            let least = values.iter().copied().fold(f32::INFINITY, f32::min);
            let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let half = |x: f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
            let minimum = half(least);
            let scale = half((largest - minimum.to_f32()) / most);
            (self.scales[block], self.minima[block]) = (scale.to_bits(), minimum.to_bits());
            let by = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
            let codes = &mut self.codes[block * BLOCK..];
            for (code, x) in codes.iter_mut().zip(values) {
                *code = ((x - minimum.to_f32()) * by).round_ties_even().clamp(0.0, most) as u8;
            }
        }
    }
}

/// An N x K weight matrix as `[ceil(N / 32)][K][32]`: the numbers that meet one element of x lie next to each other.
/// Columns beyond N are zero. Codes lie as `[ceil(N / 32)][ceil(K / 32)]` blocks: for each 16 of a panel's columns groups of
/// four codes along K, then the scales and minima of all of them; nibbles are those of two groups, the lower ones first.
pub struct Packed {
    n: usize,
    k: usize,
    format: WeightFormat,
    data: Data,
}

/// Where panels are.
enum Data {
    /// In memory of their own.
    Own(AlignedBytes),
    /// In a file, from this byte on.
    Mapped(Arc<Mapped>, usize),
}

impl Packed {
    /// Stands for how panels lie in memory and how numbers become codes. Files hold panels: whoever changes what
    /// [`Self::pack`], [`Self::put_codes`] or [`CodeRow::quantise`] write raises it.
    pub const LAYOUT: u32 = 1;

    /// Panels that lie in a file from byte `start` on, as [`Self::panels`] gave them. `None` where they would end less than
    /// [`MARGIN`] bytes before the end of the file, or don't begin at a multiple of that.
    #[must_use]
    pub fn mapped(
        n: usize,
        k: usize,
        format: WeightFormat,
        file: &Arc<Mapped>,
        start: usize,
    ) -> Option<Self> {
        let end = start.checked_add(Self::bytes_for(n, k, format))?.checked_add(MARGIN)?;
        let fits = start.is_multiple_of(MARGIN) && end <= file.bytes().len();
        fits.then(|| Self { n, k, format, data: Data::Mapped(Arc::clone(file), start) })
    }

    /// The panels, to be kept in a file.
    #[must_use]
    pub fn panels(&self) -> &[u8] {
        // SAFETY: so many bytes were zeroed when they were allocated, or are in the file; who shares the matrix only reads.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.bytes()) }
    }

    /// Where to write.
    ///
    /// # Panics
    /// If the panels are those of a file.
    fn own(&self) -> *mut u8 {
        match &self.data {
            Data::Own(data) => data.as_ptr(),
            Data::Mapped(..) => panic!("a matrix in a file is not written to"),
        }
    }

    /// Packs the matrix whose row `i` of length `k` `rows(i, out)` writes. It is called once per row, in order. Codes are the
    /// nearest ones.
    pub fn pack(
        n: usize,
        k: usize,
        format: WeightFormat,
        mut rows: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        if let Some(bits) = format.code_bits() {
            let mut values = vec![0.0; k];
            return Self::pack_codes(n, k, format, |i, row| {
                rows(i, &mut values);
                row.quantise(&values, bits);
            });
        }
        let packed = Self::zeroed(n, k, format);
        let own = packed.own();
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
                            WeightFormat::F32 => own.cast::<f32>().add(start + i).write(x),
                            _ => own.cast::<u16>().add(start + i).write(bf16_bits(x)),
                        }
                    }
                }
            }
        }
        packed
    }

    /// Packs the matrix whose row `i` `rows(i, out)` writes as codes. It is called once per row, in order.
    ///
    /// # Panics
    /// If the format has no codes.
    pub fn pack_codes(
        n: usize,
        k: usize,
        format: WeightFormat,
        mut rows: impl FnMut(usize, &mut CodeRow),
    ) -> Self {
        let mut packed = Self::zeroed(n, k, format);
        let mut row = CodeRow::zero(k);
        for i in 0..n {
            rows(i, &mut row);
            packed.put_codes(i, &row);
        }
        packed
    }

    /// Takes `row` for row `i` of a matrix of zeros ([`Self::zeroed`]), in which each row is put once.
    ///
    /// # Panics
    /// If the format has no codes, there is no such row, or it has another length.
    pub fn put_codes(&mut self, i: usize, row: &CodeRow) {
        let bits = self.format.code_bits().expect("a format of codes");
        let blocks = self.k.div_ceil(BLOCK);
        assert!(i < self.n, "row {i} of {}", self.n);
        assert!(row.codes.len() == blocks * BLOCK, "the row is not k long");
        let own = self.own();
        for (block, codes) in row.codes.as_chunks::<BLOCK>().0.iter().enumerate() {
            let place = self.place(i, block, bits);
            // SAFETY: the offsets are this row's in its block, and the matrix is this caller's alone.
            unsafe {
                for (j, four) in codes.as_chunks::<4>().0.iter().enumerate() {
                    let at = own.add(place.codes + j * bits / 8 * 64).cast::<[u8; 4]>();
                    if bits == 8 {
                        at.write(*four);
                    } else {
                        let others = u32::from_ne_bytes(*at);
                        let these = u32::from_ne_bytes(four.map(|c| c & 15)) << (4 * (j % 2));
                        at.write((others | these).to_ne_bytes());
                    }
                }
                own.add(place.scale).cast::<u16>().write(row.scales[block]);
                own.add(place.minimum).cast::<u16>().write(row.minima[block]);
            }
        }
    }

    /// Where a column's part of a block is.
    fn place(&self, column: usize, block: usize, bits: usize) -> Place {
        let (panel, inside) = (column / PANEL, column % PANEL);
        let (vector, lane) = (inside / LANES, inside % LANES);
        let vector_bytes = LANES * BLOCK * bits / 8;
        let start = (panel * self.k.div_ceil(BLOCK) + block) * block_bytes(bits);
        assert!(start + block_bytes(bits) <= self.bytes(), "no such block");
        let scales = start + 2 * vector_bytes;
        Place {
            codes: start + vector * vector_bytes + lane * 4,
            scale: scales + inside * 2,
            minimum: scales + (PANEL + inside) * 2,
        }
    }

    /// A number of a matrix of codes.
    fn coded(&self, column: usize, at: usize, bits: usize) -> f32 {
        let place = self.place(column, at / BLOCK, bits);
        let panels = self.panels();
        let code = code_in(panels, &place, at % BLOCK, bits);
        let half = |at: usize| f16::from_ne_bytes([panels[at], panels[at + 1]]).to_f32();
        f32::from(code) * half(place.scale) + half(place.minimum)
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
        // One 32-bit stream per panel keeps the inner loop in 32-bit lanes.
        let key = mix((seed as u32).wrapping_add((panel as u32).wrapping_mul(0x9e37_79b9)))
            ^ mix((seed >> 32) as u32 ^ !(panel as u32));
        let count = PANEL.min(self.n - panel * PANEL);
        // SAFETY: the panel lies inside the buffer and one thread makes it up.
        unsafe {
            let p = self.own().add(panel * self.format.panel_bytes(self.k));
            match self.format {
                WeightFormat::F32 => fill_f32(isa, p.cast(), self.k, count, key, scale),
                WeightFormat::Bf16 => fill_bf16(isa, p.cast(), self.k, count, key, scale),
                WeightFormat::Q4 => fill_codes(p, self.k, 4, count, key, scale),
                WeightFormat::Q8 => fill_codes(p, self.k, 8, count, key, scale),
            }
        }
    }

    /// Zeros.
    #[must_use]
    pub fn zeroed(n: usize, k: usize, format: WeightFormat) -> Self {
        let data = Data::Own(AlignedBytes::zeroed(Self::bytes_for(n, k, format)));
        Self { n, k, format, data }
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
        Self::bytes_for(self.n, self.k, self.format)
    }

    /// Bytes that a matrix of this shape takes, without making it.
    #[must_use]
    pub fn bytes_for(n: usize, k: usize, format: WeightFormat) -> usize {
        n.div_ceil(PANEL) * format.panel_bytes(k)
    }

    /// Unpacks row `i`, of length `k`.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k, "out is not k long");
        if let Some(bits) = self.format.code_bits() {
            for (at, out) in out.iter_mut().enumerate() {
                *out = self.coded(i, at, bits);
            }
            return;
        }
        let start = (i / PANEL) * self.k * PANEL + i % PANEL;
        for (at, out) in out.iter_mut().enumerate() {
            let index = start + at * PANEL;
            // SAFETY: inside the panels.
            *out = unsafe {
                match self.format {
                    WeightFormat::F32 => *self.as_ptr().cast::<f32>().add(index),
                    _ => f32::from_bits(u32::from(*self.as_ptr().cast::<u16>().add(index)) << 16),
                }
            };
        }
    }

    /// Row `i` of a matrix of codes, as [`Self::put_codes`] took it.
    ///
    /// # Panics
    /// If the format has no codes, there is no such row, or `out` has another length.
    pub fn code_row(&self, i: usize, out: &mut CodeRow) {
        let bits = self.format.code_bits().expect("a format of codes");
        let blocks = self.k.div_ceil(BLOCK);
        assert!(i < self.n, "row {i} of {}", self.n);
        assert!(out.codes.len() == blocks * BLOCK, "the row is not k long");
        let panels = self.panels();
        for block in 0..blocks {
            let place = self.place(i, block, bits);
            for (at, code) in out.codes[block * BLOCK..][..BLOCK].iter_mut().enumerate() {
                *code = code_in(panels, &place, at, bits);
            }
            let half = |at: usize| u16::from_ne_bytes([panels[at], panels[at + 1]]);
            (out.scales[block], out.minima[block]) = (half(place.scale), half(place.minimum));
        }
    }

    /// Some columns of some rows, in that order, as a matrix of its own; `None` where blocks of codes would be torn.
    ///
    /// # Panics
    /// If there are no such rows or columns.
    #[must_use]
    pub fn part(&self, rows: &[Range<usize>], columns: Range<usize>) -> Option<Self> {
        assert!(columns.end <= self.k, "columns up to {} of {}", columns.end, self.k);
        let of: Vec<usize> = rows.iter().flat_map(Clone::clone).collect();
        let (n, k) = (of.len(), columns.len());
        if self.format.code_bits().is_none() {
            let mut row = vec![0.0; self.k];
            return Some(Self::pack(n, k, self.format, |i, out| {
                self.row(of[i], &mut row);
                out.copy_from_slice(&row[columns.clone()]);
            }));
        }
        let whole = |at: usize| at.is_multiple_of(BLOCK) || at == self.k;
        if !whole(columns.start) || !whole(columns.end) {
            return None;
        }
        let blocks = columns.start / BLOCK..columns.end.div_ceil(BLOCK);
        let mut row = CodeRow::zero(self.k);
        Some(Self::pack_codes(n, k, self.format, |i, out| {
            self.code_row(of[i], &mut row);
            out.codes.copy_from_slice(&row.codes[blocks.start * BLOCK..blocks.end * BLOCK]);
            out.scales.copy_from_slice(&row.scales[blocks.clone()]);
            out.minima.copy_from_slice(&row.minima[blocks.clone()]);
        }))
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        match &self.data {
            Data::Own(data) => data.as_ptr(),
            Data::Mapped(file, start) => file.bytes()[*start..].as_ptr(),
        }
    }
}

/// The code at an index of a column's part of a block.
fn code_in(panels: &[u8], place: &Place, at: usize, bits: usize) -> u8 {
    let (four, byte) = (at / 4, at % 4);
    if bits == 8 {
        panels[place.codes + four * 64 + byte]
    } else {
        panels[place.codes + four / 2 * 64 + byte] >> (4 * (four % 2)) & 15
    }
}

/// First bytes of a column's part of a block of codes: groups of four codes lie 64 bytes apart.
struct Place {
    codes: usize,
    scale: usize,
    minimum: usize,
}

/// Codes between `-scale` and `scale`; columns from `count` on stand for zeros.
///
/// # Safety
/// A panel of `k` numbers per column is at `p`.
unsafe fn fill_codes(p: *mut u8, k: usize, bits: usize, count: usize, key: u32, scale: f32) {
    let step = f16::from_f32(2.0 * scale / ((1u32 << bits) - 1) as f32).to_bits();
    let least = f16::from_f32(-scale).to_bits();
    let codes = PANEL * BLOCK * bits / 8;
    for block in 0..k.div_ceil(BLOCK) {
        // SAFETY: a panel has that many blocks, each of codes, scales and minima.
        unsafe {
            let p = p.add(block * block_bytes(bits));
            for word in 0..codes / 4 {
                let random =
                    mix(((block * codes / 4 + word) as u32).wrapping_mul(0x9e37_79b9) ^ key);
                p.add(word * 4).cast::<u32>().write(random);
            }
            let scales = p.add(codes).cast::<u16>();
            for i in 0..count {
                scales.add(i).write(step);
                scales.add(PANEL + i).write(least);
            }
        }
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

//! Matrix products of a pretended device.

use half::{bf16, f16};

use super::memory::Pieces;
use crate::cuda::{Address, Element, Product};
use crate::simd::{fp8_bits, fp8_value};

/// Sums that are kept side by side.
const LANES: usize = 16;

/// `count` numbers, `stride` elements from a row to the next.
struct Matrix {
    at: Address,
    rows: u32,
    columns: u32,
    stride: u32,
    element: Element,
}

impl Matrix {
    fn row(&self, row: u32) -> (u64, u64) {
        let bytes = self.element.bytes();
        let at = self.at.plus(u64::from(row) * u64::from(self.stride) * bytes);
        (at.0, u64::from(self.columns) * bytes)
    }
}

pub(super) fn decode(element: Element, bytes: &[u8]) -> Vec<f32> {
    let word = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    match element {
        Element::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        Element::F16 => bytes.chunks_exact(2).map(|b| f16::from_bits(word(b)).to_f32()).collect(),
        Element::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_bits(word(b)).to_f32()).collect(),
        Element::Fp8 => bytes.iter().map(|b| fp8_value(*b)).collect(),
    }
}

pub(super) fn encode(element: Element, x: f32, out: &mut [u8]) {
    match element {
        Element::F32 => out.copy_from_slice(&x.to_ne_bytes()),
        Element::F16 => out.copy_from_slice(&f16::from_f32(x).to_ne_bytes()),
        Element::Bf16 => out.copy_from_slice(&bf16::from_f32(x).to_ne_bytes()),
        Element::Fp8 => out[0] = fp8_bits(x),
    }
}

/// Always in the same order, whatever else is multiplied.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    for (a, b) in a.zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// Does it.
///
/// # Errors
/// An operand lies outside of memory.
pub(super) fn multiply(product: &Product, memory: &mut Pieces) -> Result<(), String> {
    let Product { m, n, k, element, .. } = *product;
    let x = Matrix { at: product.x, rows: m, columns: k, stride: product.x_stride, element };
    let w = Matrix { at: product.w, rows: n, columns: k, stride: k, element };
    let y = Matrix {
        at: product.y,
        rows: m,
        columns: n,
        stride: product.y_stride,
        element: product.out,
    };
    let load = |matrix: &Matrix| -> Result<Vec<Vec<f32>>, String> {
        (0..matrix.rows)
            .map(|row| {
                let (at, bytes) = matrix.row(row);
                Ok(decode(matrix.element, memory.read(at, bytes)?))
            })
            .collect()
    };
    let bias = if product.bias == Address::default() {
        vec![0.0; n as usize]
    } else {
        decode(Element::F32, memory.read(product.bias.0, u64::from(n) * 4)?)
    };
    let (rows, weights) = (load(&x)?, load(&w)?);
    for (row, x) in (0..m).zip(&rows) {
        let (at, bytes) = y.row(row);
        let out = memory.write(at, bytes)?;
        let old = decode(y.element, out);
        let cells = out.chunks_exact_mut(y.element.bytes() as usize);
        for ((cell, w), (bias, old)) in cells.zip(&weights).zip(bias.iter().zip(old)) {
            let old = if product.accumulate { old } else { 0.0 };
            encode(y.element, dot(x, w) * product.scale + bias + old, cell);
        }
    }
    Ok(())
}

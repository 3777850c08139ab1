//! Plain Rust, which the compiler vectorises as far as the target allows.

use half::f16;

use super::{Isa, LANES, Simd, Source, fp8_value};
use crate::tile::{Tile, body};

/// Needs no proof.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// `f32::mul_add` is a call into the C library unless the target has the instruction.
const FUSED: bool =
    cfg!(any(target_feature = "fma", target_arch = "aarch64", target_arch = "riscv64"));

/// `a * b + c`, fused where the target can.
#[inline(always)]
pub(super) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

type Lanes = [f32; LANES];

macro_rules! lanewise {
    ($($name:ident($($arg:ident),+) = $value:expr;)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: Lanes),+) -> Lanes {
                let mut out = [0.0; LANES];
                for (i, out) in out.iter_mut().enumerate() {
                    $(let $arg = $arg[i];)+
                    *out = $value;
                }
                out
            }
        )+
    };
}

impl Simd for Portable {
    type V = Lanes;
    const ISA: Isa = Isa::Portable;
    const ACCUMULATORS: usize = 4;
    const REGISTERS: usize = usize::MAX;
    const TILE_ROWS: usize = 4;

    lanewise! {
        add(a, b) = a + b;
        sub(a, b) = a - b;
        mul(a, b) = a * b;
        div(a, b) = a / b;
        sqrt(a) = a.sqrt();
        max(a, b) = if a > b { a } else { b };
        min(a, b) = if a < b { a } else { b };
        mul_add(a, b, c) = mul_add(a, b, c);
        select_lt(a, b, x, y) = if a < b { x } else { y };
        pow2(n) = f32::from_bits(((n as i32 + 127) as u32) << 23);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Lanes {
        // SAFETY: 16 floats are readable by the contract.
        unsafe { p.cast::<Lanes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Lanes {
        // SAFETY: 16 numbers are readable by the contract.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Lanes {
        // SAFETY: 16 numbers are readable by the contract.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }

    #[inline(always)]
    unsafe fn load_fp8(self, p: *const u8) -> Lanes {
        // SAFETY: 16 numbers are readable by the contract.
        unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(fp8_value)
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(self, p: *const u8) -> Lanes {
        let mut out = [0.0; LANES];
        for (i, out) in out.iter_mut().enumerate() {
            let bit = i * BITS;
            // SAFETY: 16 codes are readable by the contract.
            let byte = unsafe { *p.add(bit / 8) };
            *out = f32::from((byte >> (bit % 8)) & ((1u16 << BITS) - 1) as u8);
        }
        out
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Lanes) {
        // SAFETY: 16 floats are writable by the contract.
        unsafe { p.cast::<Lanes>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Lanes) {
        let bits = v.map(|x| f16::from_f32(x).to_bits());
        // SAFETY: 16 numbers are writable by the contract.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Lanes) {
        // SAFETY: 16 bytes are writable by the contract.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(v.map(|x| x as i8)) }
    }

    #[inline(always)]
    fn keep(self, v: Lanes, from: isize, to: isize, other: Lanes) -> Lanes {
        let mut out = other;
        for (i, out) in out.iter_mut().enumerate() {
            if (from..to).contains(&(i as isize)) {
                *out = v[i];
            }
        }
        out
    }

    unsafe fn tile<B: Source>(self, tile: &Tile) {
        // SAFETY: the same contract.
        unsafe { body::<Portable, B>(self, tile) }
    }
}

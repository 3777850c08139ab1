//! The paged KV cache.
//!
//! A block is 32 tokens of one KV head of one layer of one sequence. Its keys, transposed as `[head_dim][32]`, and its
//! values, `[32][head_dim]`, are halves with a place of their own. So the keys are a ready right factor for scores and the
//! values one for outputs, every head can keep tokens of its own, and keys and values can have different forms. All halves
//! come from one pool with a hard byte budget.
//!
//! The oldest tokens may be packed into codes of a few bits ([`Codec`]), those after them may lack pruned channels in their
//! keys, and the newest are whole. Where the forms meet inside a block, it has a half of each. A side with N tokens, of
//! which the first p are packed and the first n packed or pruned, holds `ceil(p / 32)` packed halves,
//! `ceil(n / 32) - floor(p / 32)` pruned ones if n > p, and `ceil(N / 32) - floor(n / 32)` whole ones if N > n.

pub(crate) mod codec;
mod copy;
mod head;
pub(crate) mod pool;
mod rows;
pub(crate) mod tile;

pub use codec::{Codec, KeyAxis};
pub use head::{Halves, HeadCache};
pub(crate) use head::{read, write};
pub use pool::{BlockPool, Half, PoolFull};

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;

/// The number format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Brain floats.
    Bf16,
    /// Bytes with four bits of exponent and three of mantissa (e4m3), no scale: rounded to nearest, ties to even, at most
    /// 448.
    Fp8,
}

impl KvFormat {
    /// Bytes of a number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::F16 | KvFormat::Bf16 => 2,
            KvFormat::Fp8 => 1,
        }
    }

    /// Bytes of the keys or the values of a block: 32 numbers per channel.
    #[must_use]
    pub const fn half_bytes(self, channels: usize) -> usize {
        channels * BLOCK_TOKENS * self.bytes()
    }
}

/// Calls a function generic over the source of a format.
macro_rules! with_format {
    ($format:expr, $call:ident :: <B> ($($arg:expr),* $(,)?)) => {
        match $format {
            $crate::kv::KvFormat::F32 => $call::<$crate::simd::F32>($($arg),*),
            $crate::kv::KvFormat::F16 => $call::<$crate::simd::F16>($($arg),*),
            $crate::kv::KvFormat::Bf16 => $call::<$crate::simd::Bf16>($($arg),*),
            $crate::kv::KvFormat::Fp8 => $call::<$crate::simd::Fp8>($($arg),*),
        }
    };
}
pub(crate) use with_format;

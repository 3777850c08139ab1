//! CPU kernels of Batch-Max: matrix products, attention over a paged KV cache, ranking of cached tokens, eviction, packing
//! into codes of a few bits, pruning of key channels.
//!
//! The crate knows no model, policy or profile, only slices and shapes. Its results define what every other back end has
//! to compute. The value of an output row depends on nothing but its own inputs: not on the number of rows of the call,
//! the other sequences, the thread count or the way a prompt was cut into chunks, because each output has one fixed order
//! of accumulation. Tests check that bit for bit.

pub mod activation;
pub mod append;
pub mod attend;
pub mod blend;
mod buffer;
pub mod cuda;
pub mod embed;
pub mod evict;
pub mod gemm;
pub mod kv;
pub mod lists;
pub mod mapped;
pub mod norm;
pub mod pack;
pub mod prune;
pub mod rank;
#[doc(hidden)]
pub mod reference;
pub mod rope;
pub mod sample;
pub mod select;
mod simd;
pub mod softcap;
pub mod state;
#[cfg(test)]
mod testing;
pub mod threads;
mod tile;

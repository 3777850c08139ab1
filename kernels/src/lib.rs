//! CPU kernels: matrix products, attention over a paged cache, ranking, eviction, and the small ops between them.
//!
//! A leaf crate: slices and pointers, no model, no policy. The kernels here define what every other backend must compute.
//!
//! The contract that everything above relies on: a row of a result depends on its own inputs alone. Not on the number of
//! rows in the call, not on the other sequences, not on the number of threads, not on how a prompt was cut into chunks.
//! Every output is one fixed order of additions.

pub mod activation;
pub mod append;
pub mod attend;
pub mod embed;
pub mod evict;
pub mod gemm;
pub mod kv;
pub mod norm;
pub mod rank;
pub mod rope;
pub mod sample;
mod simd;
pub mod softcap;
pub mod threads;
mod tile;

pub use simd::Isa;

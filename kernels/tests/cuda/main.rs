//! The CUDA kernels, run on the CPU through `cuda/shim` and held to the CPU's kernels, which define them.
#![cfg(unix)]
#![expect(dead_code, reason = "the shared test module serves others too")]

// What the shared test module names by `crate`.
use batchmax_kernels::{append, attend, evict, kv, threads};

mod blending;
mod cases;
mod decode;
mod device;
mod elementwise;
mod evicting;
mod faults;
mod floors;
mod gpu;
mod mirror;
mod narrowing;
mod packing;
mod prefill;
mod ranking;
mod selecting;
#[path = "../../src/testing.rs"]
mod testing;
mod writing;

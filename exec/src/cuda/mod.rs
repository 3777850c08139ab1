//! Programs on a CUDA device: the same ops, caches, checks and results as on the CPU, over whatever
//! [`batchmax_kernels::cuda::Driver`] there is.
//!
//! - [`engine`]: whole runs;
//! - `group`: the same on several devices that share each layer;
//! - `step`, `interpreter` and the files beside it, by the stems of the CPU's: which kernels make up an op;
//! - `kv`, `pool`: the caches under their hard budget, with counts and tables on the host;
//! - `weights`: what is uploaded;
//! - `memory`: who took what from the device, so that everything is given back;
//! - `recorded`: work that comes again, started at once.

mod ahead;
mod blend;
mod cache;
mod choice;
mod copy;
pub mod engine;
mod evict;
mod forward;
mod group;
mod interpreter;
mod kv;
mod memory;
mod pool;
mod rank;
mod recorded;
mod refresh;
mod settle;
mod state;
mod step;
mod weights;

pub use engine::CudaEngine;
pub use group::CudaGroup;

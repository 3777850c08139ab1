//! Runs what the simulator predicts: replays a [`batchmax_sim::program::Program`] on real hardware and times it.
//!
//! - [`load`], [`fetch`]: weights and tokenisers from GGUF files and safetensors directories;
//! - [`weights`]: packed for the kernels, or synthetic;
//! - [`kv_store`]: caches in blocks under a hard byte budget;
//! - [`interpreter`]: one `match` over the op kinds, no policy by name;
//! - [`cuda`]: the same on a CUDA device;
//! - [`tier`]: slower memory for offloaded tokens, on a thread of its own;
//! - [`executor`]: whatever can run programs;
//! - [`engine`]: a whole run, held against its predicted memory at every step;
//! - [`clock`]: measured times in the simulator's own [`batchmax_sim::timeline::Timeline`];
//! - [`devices`]: which GPUs there are;
//! - [`profile`]: times single passes over a grid, for calibration;
//! - [`quality`]: what a policy loses, by the logits of runs;
//! - [`state_maps`], [`state_training`]: the networks of the states that dropped tokens leave;
//! - [`observe`], [`sharing`]: what policies are prepared from.
#![forbid(unsafe_code)]

pub mod chunks;
pub mod clock;
pub mod cuda;
pub mod devices;
pub mod engine;
pub mod error;
pub mod executor;
pub mod fetch;
pub mod interpreter;
pub mod kv_store;
pub mod load;
pub mod machine;
pub mod nodes;
pub mod observe;
pub mod profile;
pub mod quality;
pub mod sampling;
pub mod sharing;
pub mod state_maps;
pub mod state_training;
pub mod tier;
pub mod weights;

pub use engine::{Chosen, Engine, RunOptions, RunResult, load_of};
pub use error::ExecError;
pub use executor::Executor;
pub use sampling::Sampling;

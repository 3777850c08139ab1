//! Batch-Max's arithmetic: what a run of a language model under a KV-cache policy does, how long it takes and what
//! memory it needs.
//!
//! The pipeline is a chain of plain values:
//!
//! - [`profile`]: descriptions of models, devices and policies, read from files ([`profile::Catalog`]);
//! - [`policy`]: what a system does to a cache, one file each, against a tape that knows *how many* tokens a layer
//!   holds, never *which* ([`kv`], [`form`]);
//! - [`lower`]: (model, policy, [`load`]) -> [`program::Program`], the ops of the run, folded;
//! - [`op`]: one kernel launch; the only place where FLOPs and bytes are counted;
//! - [`memory`]: peak bytes, by replaying a program;
//! - [`cost`]: how long each op takes, with the source of the number and its error -> [`timeline`];
//! - [`probe`]: the passes that a profile times;
//! - [`metrics`]: TTFT, TPOT, tokens per second;
//! - [`place`]: a model on devices under an [`engine`]: what each holds, in which types, within which memory;
//! - [`plan`]: which batch, policy and schedule is the fastest that fits, [`parallel`] over placements.
//!
//! Pure from the descriptions on: no clock, no randomness, no I/O outside [`profile`].
#![forbid(unsafe_code)]

pub mod cost;
pub mod engine;
pub mod engine_fit;
pub mod explain;
pub mod form;
pub mod kv;
pub mod load;
pub mod lower;
pub mod memory;
pub mod metrics;
pub mod op;
pub mod parallel;
pub mod place;
pub mod plan;
pub mod policy;
pub mod probe;
pub mod profile;
pub mod program;
pub mod runs;
pub mod serve;
pub mod surface;
pub mod timeline;
pub mod units;

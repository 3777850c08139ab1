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
//!
//! # From a model, a device and a load to numbers
//!
//! ```
//! use batchmax_sim::load::{Hit, Schedule, Spread};
//! use batchmax_sim::place::{Choice, Placement};
//! use batchmax_sim::plan::{Case, LARGEST_BATCH};
//! use batchmax_sim::policy::Preset;
//! use batchmax_sim::profile::Catalog;
//! use batchmax_sim::surface::Library;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // What ships with the crate; `with_user_dir` adds descriptions of your own.
//! let catalog = Catalog::built_in();
//! let model = catalog.model("llama-3.1-8b")?;
//! let gpu = catalog.gpu("h100-sxm")?;
//! let engine = catalog.engine("batchmax")?;
//! let placement = Placement::new(&model, &gpu, &engine, Choice::default())?;
//! // Kernels as they were measured, under what this engine adds to them.
//! let cost = placement.cost(&Library::new(catalog.clone(), Vec::new()));
//!
//! let mut rates = Vec::new();
//! for name in ["full", "batch-max:budget=25%"] {
//!     let preset = Preset::parse(&catalog, name)?;
//!     let case = Case {
//!         placement: &placement,
//!         policy: preset.policy.as_ref(),
//!         isl: 8192, // prompt tokens
//!         osl: 256,  // generated tokens
//!         spread: Spread::default(),
//!         hit: Hit::default(),
//!         schedule: Schedule::Static,
//!     };
//!     let (batch, stopped_by) = case.largest_batch(LARGEST_BATCH)?;
//!     let (answer, timeline) = case.answer_of(&case.program(batch)?, cost.as_ref());
//!     println!(
//!         "{name}: {:.0} output tokens/s ±{:.0} % at batch {batch}, caches {} of {}, then {}; {}",
//!         answer.metrics.output_tokens_per_s,
//!         100.0 * answer.metrics.error,
//!         answer.footprint.kv_peak(),
//!         answer.footprint.total(),
//!         stopped_by.bound.name(),
//!         timeline.weakest_source().name(),
//!     );
//!     rates.push(answer.metrics.output_tokens_per_s);
//! }
//! assert!(rates[1] > rates[0], "a quarter of the caches leaves room for a larger batch");
//! # Ok(())
//! # }
//! ```
//!
//! # Versions
//!
//! Semantic versioning: until 1.0 a minor version may change what is public, a patch version may not. Numbers are no part
//! of that promise, since better kernels and fits change them; descriptions that once could be read can be read by every
//! later version of the same minor version.
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

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
//! Pure from the descriptions on: no clock, no randomness, no I/O outside [`profile`]. Nothing panics on descriptions that
//! [`profile::Catalog`] has read: they are checked there, and what does not go together is an error.
//!
//! # A whole question
//!
//! Llama 3.1 8B on one H100 under vLLM's timings, prompts of 4,000 tokens, answers of 500: the most tokens a second of a full
//! cache and of a compressed one, at the largest batch that fits.
//!
//! ```
//! use batchmax_sim::load::{Hit, Schedule, Spread};
//! use batchmax_sim::place::{Choice, Placement};
//! use batchmax_sim::plan::{Case, LARGEST_BATCH, Slo};
//! use batchmax_sim::policy::Preset;
//! use batchmax_sim::profile::Catalog;
//! use batchmax_sim::surface::Library;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let catalog = Catalog::built_in();
//! let (model, gpu) = (catalog.model("llama-3.1-8b")?, catalog.gpu("h100-sxm")?);
//! let engine = catalog.engine("batchmax")?;
//! let placement = Placement::new(&model, &gpu, &engine, Choice::default())?;
//! let cost = placement.cost(&Library::new(catalog.clone(), Vec::new()));
//!
//! let mut rates = Vec::new();
//! for name in ["full", "batch-max:budget=25%"] {
//!     let preset = Preset::parse(&catalog, name)?;
//!     let case = Case {
//!         placement: &placement,
//!         policy: preset.policy.as_ref(),
//!         isl: 4000,
//!         osl: 500,
//!         spread: Spread::default(),
//!         hit: Hit::default(),
//!         schedule: Schedule::Static,
//!     };
//!     let (batch, stopped_by) = case.largest_batch(LARGEST_BATCH)?;
//!     let answer = case.answer(batch, cost.as_ref())?;
//!     println!(
//!         "{name}: batch {batch} ({} stops a larger one), {:.0} tokens/s within {:.0} %, caches {}",
//!         stopped_by.bound.name(),
//!         answer.metrics.output_tokens_per_s,
//!         100.0 * answer.metrics.error,
//!         answer.footprint.kv_most(),
//!     );
//!     rates.push(answer.metrics.output_tokens_per_s);
//! }
//! assert!(rates[1] > rates[0], "a quarter of the cache leaves room for a larger batch");
//!
//! // The same search over all that is asked for, ranked: see `plan::plan`. Limits of latency go into `plan::Slo`.
//! let _ = Slo::default();
//! # Ok(())
//! # }
//! ```
//!
//! # Versions
//!
//! Semantic versioning. Until 1.0 a minor version may change the API, a patch version does not. What a prediction says is no
//! part of the API: it changes with every better fit, and the changelog says so. A file of descriptions with a key that this
//! version does not know is refused, not misread.
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

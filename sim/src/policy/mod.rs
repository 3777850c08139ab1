//! What a system does to a KV cache: one small file per policy against one trait.
//!
//! *How many* tokens stay is decided here, when the program is lowered; *which* is decided when it runs. To add a
//! policy: its file, one line in `registry!`, one preset in `profiles/policies/`. A policy that only ranks tokens
//! implements [`Scoring`], any other [`Policy`].

mod budget;
mod composed;
mod evicting;
mod preset;

use std::fmt::Debug;
use std::sync::Arc;

pub use adakv::{AdaKv, Together};
pub use batch_max::{AnyScore, BatchMax, By};
pub use budget::Budget;
pub use cacheblend::CacheBlend;
pub use clusterkv::ClusterKv;
pub use composed::Composed;
pub use dbudgetkv::{DBudgetKv, Kept, Order};
pub use duoattention::DuoAttention;
pub use evicting::{Cut, Evicting, Evictor, Instant, Scoring};
pub use expected_attention::{Expected, ExpectedAttention};
pub use fastkv::FastKv;
pub use full::Full;
pub use h2o::{H2o, HeavyHitters};
pub use keydiff::KeyDiff;
pub use kivi::Kivi;
pub use knorm::Knorm;
pub use kvsharer::KvSharer;
pub use lagkv::{LagKv, Lagging};
pub use less::Less;
pub use preset::Preset;
pub use pyramidkv::{Falling, PyramidKv};
pub use quest::Quest;
pub use random::{Chance, Random};
pub use refreshkv::RefreshKv;
pub use rocketkv::RocketKv;
use serde::de::DeserializeOwned;
pub use snapkv::{Snap, SnapKv};
pub use specache::SpeCache;
pub use streaming_llm::StreamingLlm;
pub use think::ThinK;
pub use tova::{LastQuery, Tova};

use crate::form::Form;
use crate::kv::KvTape;
use crate::op::{DType, Phase, Pick};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// One layer's step, as a policy sees it. Nothing here grows with the step, so that equal steps fold.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The model.
    pub model: &'a Model,
    /// Prefill or decode.
    pub phase: Phase,
    /// The layer (the first of those that share the tape).
    pub layer: Layer,
    /// Layers of the model.
    pub layers: u32,
    /// Prompt length of the sequence.
    pub prompt: Tokens,
    /// Tokens this step adds.
    pub rows: Tokens,
    /// The prompt is complete after this step.
    pub prompt_read: bool,
    /// Bytes of a token in all layers, stored whole.
    pub token_bytes: u64,
}

/// What a policy is asked to serve.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The model.
    pub model: &'a Model,
    /// Prompt length.
    pub prompt: Tokens,
    /// Of those, the first tokens that a cache already holds.
    pub hit: Tokens,
    /// Bytes of a token in all layers, stored whole.
    pub token_bytes: u64,
}

/// The tokens that a decode step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// How they are chosen.
    pub by: Pick,
    /// How many, per set; clusters: sinks included, tokens that came after them not.
    pub tokens: Tokens,
}

/// A partial cache beside the full one, which decode steps read instead, and when it is filled anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refreshing {
    /// Tokens of it; one more while a step reads it.
    pub tokens: Tokens,
    /// Decode steps from one that may fill it to the next.
    pub every: u32,
    /// Such a step fills it where the query's cosine with the one at the last filling is below this; `None`: always.
    pub below: Option<Cosine>,
    /// Neighbours that a token's score is taken over.
    pub pool: Tokens,
}

/// When a partial cache is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cosine {
    /// Thousandths.
    pub thousandths: i32,
    /// Of queries before they are rotated.
    pub before_rope: bool,
    /// Expected thousandths of the comparisons that are below.
    pub share: u32,
}

/// Whole tokens that decode steps fetch from slower memory, chosen one step ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetching {
    /// How many, per KV head.
    pub tokens: Tokens,
    /// Tokens that are whole in any case are chosen too.
    pub whole: bool,
}

/// What evictions leave, for those that share a cache with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaves {
    /// Tokens in the layer that keeps fewest.
    pub least: Tokens,
    /// A sequence is cut more than once: chunk by chunk, or in decode.
    pub again: bool,
    /// Heads of a layer keep different numbers.
    pub ragged: bool,
}

/// Tokens that upper layers take over from caches of chunks of the prompt, which were read earlier, each alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reusing {
    /// Tokens at the start of the prompt that stand in chunks.
    pub tokens: Tokens,
    /// Tokens of a chunk; the last one may be shorter.
    pub chunk: Tokens,
}

/// Rows of a prompt that upper layers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forwards {
    /// The last layer that sees all rows.
    pub after: Layer,
    /// Rows that go on.
    pub rows: Tokens,
    /// The newest of them, which go on in any case.
    pub recent: Tokens,
}

impl<'a> Request<'a> {
    /// A prompt for a model whose cache has elements of this type.
    #[must_use]
    pub fn new(model: &'a Model, prompt: Tokens, cache: DType) -> Self {
        let elements = model.kv_elements_per_token_layer() * u64::from(model.layers);
        Self { model, prompt, hit: 0, token_bytes: cache.bytes(elements).0 }
    }

    /// The same, with the first `hit` tokens cached.
    #[must_use]
    pub fn with_hit(self, hit: Tokens) -> Self {
        Self { hit, ..self }
    }
}

/// What a run needs beside the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Beside {
    /// Nothing.
    #[default]
    Nothing,
    /// This file.
    File(String),
    /// A file that has not been named.
    Missing,
}

/// What a policy does to the cache, as far as others must know to work beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    Keeps,
    /// Drops tokens for good.
    Evicts,
    /// Stores old tokens in fewer bits.
    Packs,
    /// Stores old keys with fewer channels.
    Prunes,
    /// Keeps everything and reads a part.
    Selects,
    /// Layers read other layers' caches.
    Shares,
    /// Takes parts of a cache over from earlier requests.
    Reuses,
}

/// What a system does to a KV cache.
pub trait Policy: Debug + Send + Sync {
    /// The policy with its parameters, as `--policy` accepts it.
    fn label(&self) -> String;

    /// What others that share the cache must know.
    fn role(&self) -> Role;

    /// Whether tokens are dropped for good; then no two sequences keep the same.
    fn evicts(&self) -> bool {
        self.role() == Role::Evicts
    }

    /// Prompt tokens read between two calls of the hooks; `None` reads the prompt whole.
    fn prefill_chunk(&self) -> Option<Tokens> {
        None
    }

    /// Whether [`Self::after_attend`] may do anything in decode steps; `false` spares the lowering a scan.
    fn acts_in_decode(&self) -> bool {
        true
    }

    /// The largest cache, this step's tokens included, up to which the hooks drop nothing and say the same as over any
    /// smaller one; `None` where only asking them tells. It spares the lowering a scan of the steps on the way.
    fn quiet_up_to(&self, _step: &Step<'_>) -> Option<Tokens> {
        None
    }

    /// Whether a cache is ever smaller than the full one: what never is is what compression is compared with.
    fn compresses(&self) -> bool {
        true
    }

    /// Whether a plan tries it where it is named and never proposes it: it only shows how much the others are worth, or
    /// relies on what no question states.
    fn only_if_named(&self) -> bool {
        false
    }

    /// Layers with the same number are treated alike.
    fn layer_kind(&self, _layer: Layer, _model: &Model) -> u32 {
        0
    }

    /// The layer whose cache a layer reads: itself, or a lower one, and then it has none of its own.
    fn cache_of(&self, layer: Layer, _model: &Model) -> Layer {
        layer
    }

    /// The layer behind which only some rows of a prompt of `prompt` tokens go on, and which. That layer must be of a
    /// kind of its own.
    fn forwards(&self, _prompt: Tokens, _model: &Model) -> Option<Forwards> {
        None
    }

    /// What the layers behind that of [`Self::forwards`] take over, where rows go on because the others are known.
    fn reuses(&self, _prompt: Tokens, _model: &Model) -> Option<Reusing> {
        None
    }

    /// The KV heads of a layer that hold sinks and recent tokens only: as many as its form says.
    fn short_heads(&self, _layer: Layer, _model: &Model) -> Vec<u32> {
        Vec::new()
    }

    /// How a layer stores what it keeps.
    fn form(&self, _layer: Layer, _model: &Model) -> Form {
        Form::default()
    }

    /// What a decode step of a layer reads of a cache, if not all of it, for a prompt of `prompt` tokens.
    fn reads(&self, _layer: Layer, _prompt: Tokens, _model: &Model) -> Option<Reading> {
        None
    }

    /// The partial cache that decode steps read instead of the full one, for a prompt of `prompt` tokens.
    fn refreshes(&self, _prompt: Tokens, _model: &Model) -> Option<Refreshing> {
        None
    }

    /// What decode steps fetch one step ahead, if all tokens are offloaded whole.
    fn prefetches(&self, _model: &Model) -> Option<Prefetching> {
        None
    }

    /// What a run needs beside the model; predictions need nothing.
    fn beside(&self) -> Beside {
        Beside::Nothing
    }

    /// The policy as one that ranks tokens and keeps a budget of them, if that is all it does.
    fn evictor(self: Arc<Self>) -> Option<Arc<dyn Evictor>> {
        None
    }

    /// Tokens that an eviction leaves in the layer that keeps fewest, and whether it happens more than once per sequence.
    fn leaves(&self, _request: &Request<'_>) -> Option<Leaves> {
        None
    }

    /// The same, expecting that layers keep these shares of a prompt, as a run of `model` showed; `None` where counts
    /// don't depend on the text.
    fn expecting(&self, _kept: &[f64], _model: &Model) -> Option<Arc<dyn Policy>> {
        None
    }

    /// Refuses parameters or models that it can't serve, before any work starts.
    fn check(&self, _request: &Request<'_>) -> Result<(), PolicyError> {
        Ok(())
    }

    /// Called for each layer right after its attention.
    fn after_attend(&self, _step: &Step<'_>, _kv: &mut KvTape<'_>) {}

    /// Called for each layer after all layers are through.
    fn after_pass(&self, _step: &Step<'_>, _kv: &mut KvTape<'_>) {}
}

/// [`Policy::check`] of a prompt, and of its cached prefix, which was a prompt of its own.
pub fn check_with_prefix(policy: &dyn Policy, request: &Request<'_>) -> Result<(), PolicyError> {
    policy.check(request)?;
    if request.hit == 0 {
        return Ok(());
    }
    let prefix = Request { prompt: request.hit, hit: 0, ..*request };
    policy.check(&prefix).map_err(|why| PolicyError {
        problem: format!("a cached prefix of {} tokens: {}", request.hit, why.problem),
        remedy: format!("a longer --prefix-hit, or none; {}", why.remedy),
        ..why
    })
}

/// A policy with its parameters can't do what is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy}: {problem}; hint: {remedy}")]
pub struct PolicyError {
    /// Its label.
    pub policy: String,
    /// What doesn't work.
    pub problem: String,
    /// What would.
    pub remedy: String,
}

/// Refuses a window of queries that is no window of the prompt.
fn window_and_pool(
    window: Tokens,
    pool: Tokens,
    request: &Request<'_>,
) -> Result<(), (String, String)> {
    if window == 0 || pool == 0 {
        return Err((
            "window and pool must be at least 1".to_owned(),
            "use window=32,pool=5".to_owned(),
        ));
    }
    if window > request.prompt {
        return Err((
            format!("a window of {window} queries is longer than the prompt, {}", request.prompt),
            "lower window or raise --isl".to_owned(),
        ));
    }
    Ok(())
}

type Build = fn(toml::Table) -> Result<Arc<dyn Policy>, toml::de::Error>;

fn build<P: Policy + DeserializeOwned + 'static>(
    table: toml::Table,
) -> Result<Arc<dyn Policy>, toml::de::Error> {
    Ok(Arc::new(toml::Value::Table(table).try_into::<P>()?))
}

/// Declares the modules, too, so that a policy is one line here. What is formatted by module must be told of them: see
/// `.ci/run`.
macro_rules! registry {
    ($($kind:literal in $module:ident: $build:expr,)*) => {
        $(mod $module;)*

        /// The kinds a preset can name.
        pub const KINDS: &[&str] = &[$($kind),*];

        fn builder(kind: &str) -> Option<Build> {
            match kind {
                $($kind => {
                    #[allow(unused_imports, reason = "some need only what stands here")]
                    use $module::*;
                    Some($build)
                })*
                _ => None,
            }
        }
    };
}

fn scored<S: Scoring>(table: toml::Table) -> Result<Arc<dyn Policy>, toml::de::Error> {
    Ok(Arc::new(Evicting::<S>::from_table(table)?))
}

fn less(table: toml::Table) -> Result<Arc<dyn Policy>, toml::de::Error> {
    Ok(Arc::new(Less::from_table(table)?))
}

registry! {
    "full" in full: build::<Full>,
    "batch-max" in batch_max: scored::<AnyScore>,
    "snapkv" in snapkv: scored::<Snap>,
    "streaming-llm" in streaming_llm: scored::<Newest>,
    "h2o" in h2o: scored::<HeavyHitters>,
    "knorm" in knorm: scored::<SmallKeys>,
    "keydiff" in keydiff: scored::<UnusualKeys>,
    "pyramidkv" in pyramidkv: scored::<Falling>,
    "tova" in tova: scored::<LastQuery>,
    "lagkv" in lagkv: scored::<Lagging>,
    "expected-attention" in expected_attention: scored::<Expected>,
    "random" in random: scored::<Chance>,
    "adakv" in adakv: scored::<Together>,
    "kivi" in kivi: build::<Kivi>,
    "think" in think: build::<ThinK>,
    "fastkv" in fastkv: build::<FastKv>,
    "kvsharer" in kvsharer: build::<KvSharer>,
    "quest" in quest: build::<Quest>,
    "clusterkv" in clusterkv: build::<ClusterKv>,
    "rocketkv" in rocketkv: build::<RocketKv>,
    "dbudgetkv" in dbudgetkv: build::<DBudgetKv>,
    "duoattention" in duoattention: build::<DuoAttention>,
    "less" in less: less,
    "cacheblend" in cacheblend: build::<CacheBlend>,
    "refreshkv" in refreshkv: build::<RefreshKv>,
    "specache" in specache: build::<SpeCache>,
}

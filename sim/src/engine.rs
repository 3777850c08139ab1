//! Serving engines as data: what a step costs beside its kernels, what memory is left for caches, what can be run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::kv::KvLayout;
use crate::op::{DType, Family, Phase};
use crate::profile::{Gpu, ProfileError};
use crate::surface::is_nvidia;
use crate::units::{Bytes, Tokens};

/// Deviation (of the logarithm) between devices that the kernels do not explain: the shipped factors of the 38 pairs of
/// engine and NVIDIA device have a root mean square of 0.13 while tokens are generated and 0.18 while prompts are read.
const UNSEEN_DEVICE: f64 = 0.15;
/// The same where no kernel of the vendor was ever timed.
const UNTIMED_VENDOR: f64 = 0.25;

/// Errors of a fit on runs it saw and on clusters left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineFit {
    /// Measurements.
    pub rows: usize,
    /// Median of |predicted / measured - 1| on the runs of the fit.
    pub median: f64,
    /// 90th percentile of the same.
    pub p90: f64,
    /// Median on runs held out of the fit.
    pub held_out_median: f64,
    /// 90th percentile on runs held out of the fit.
    pub held_out_p90: f64,
}

/// What an engine's time on a device is a multiple of, beside what its kernels say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFactors {
    /// While prompts are read.
    pub prefill: f64,
    /// While tokens are generated.
    pub decode: f64,
    /// Of sums over devices.
    pub sums: f64,
}

impl Default for DeviceFactors {
    fn default() -> Self {
        Self { prefill: 1.0, decode: 1.0, sums: 1.0 }
    }
}

/// An engine between two releases that changed its speed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// First year of its releases; the newest that is not after a run's is taken.
    pub since: u32,
    /// Time of matrix products while prompts are read, as a multiple of the timed kernels'.
    pub prefill: f64,
    /// The same while tokens are generated.
    pub decode: f64,
    /// Time of attention, as a multiple of the timed kernels'.
    pub attention: f64,
    /// Attention grows with this power of the number of query heads per KV head: 0 where kernels read a shared KV head
    /// once, 1 where they read it for every query head.
    #[serde(default)]
    pub grouping: f64,
    /// The first token comes out of a generating step of its own, after the prompt is read.
    #[serde(default)]
    pub first_token_decodes: bool,
    /// Time of norms, rotations, activations and the like, as a multiple of the timed kernels' (engines fuse them).
    pub small: f64,
    /// Time of sums over devices, as a multiple of the timed kernels'.
    pub sums: f64,
    /// Host time of a step that no kernel hides, seconds.
    pub step_s: f64,
    /// The same per sequence of the step.
    pub sequence_s: f64,
    /// The same per step and decoder layer (kernels launched one by one).
    #[serde(default)]
    pub layer_s: f64,
    /// Share of the reading of others' prompts that a generating request of a closed loop waits for.
    pub interference: f64,
    /// Multiple of the time on a device beside what its kernels and these numbers say, by the device's name.
    #[serde(default)]
    pub devices: BTreeMap<String, DeviceFactors>,
    /// Deviation of the logarithm of a run's time, from runs held out.
    pub log_stddev: f64,
    /// How well that fits.
    #[serde(default)]
    pub fit: EngineFit,
}

impl Generation {
    /// The multiple of the timed attention's time where `group` query heads share a KV head.
    #[must_use]
    pub fn attention_factor(&self, group: u32) -> f64 {
        self.attention * f64::from(group.max(1)).powf(self.grouping)
    }

    /// The multiple of the timed kernels' time that an op of `family` takes.
    #[must_use]
    pub fn factor(&self, family: Family, phase: Phase, group: u32) -> f64 {
        match (family, phase) {
            (Family::Gemm, Phase::Prefill) => self.prefill,
            (Family::Gemm, Phase::Decode) => self.decode,
            (Family::AttendPrefill | Family::AttendDecode, _) => self.attention_factor(group),
            (Family::Collective, _) => self.sums,
            _ => self.small,
        }
    }

    /// The multiple of the time on a device; 1 where no run says otherwise.
    #[must_use]
    pub fn device(&self, gpu: &str) -> DeviceFactors {
        self.devices.get(gpu).copied().unwrap_or_default()
    }

    /// Deviation of the logarithm of a run's time on a device: wider where the engine was never seen on it, and wider
    /// still where no kernel of its vendor was timed.
    #[must_use]
    pub fn stddev_on(&self, gpu: &Gpu) -> f64 {
        let unseen = if self.devices.contains_key(&gpu.name) { 0.0 } else { UNSEEN_DEVICE };
        let untimed = if is_nvidia(gpu) { 0.0 } else { UNTIMED_VENDOR };
        self.log_stddev.hypot(unseen).hypot(untimed)
    }

    /// Seconds between the end of the prompt and the first token, where that comes out of a generating step of its own:
    /// the mean of the `steps` generating steps that take `decode` seconds.
    #[must_use]
    pub fn first_token_s(&self, decode: f64, steps: f64) -> f64 {
        if self.first_token_decodes && steps > 0.0 { decode / steps } else { 0.0 }
    }

    /// Host seconds of a step of `sequences` through `layers` decoder layers that no kernel hides.
    #[must_use]
    pub fn host_s(&self, sequences: f64, layers: f64) -> f64 {
        self.step_s + sequences * self.sequence_s + layers * self.layer_s
    }
}

/// How an engine's own products of a single row read weights, where they are none of those that were timed: as fast as the
/// memory or as the processors can, whichever is slower.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Streams {
    /// Bytes per second that one processor has under way: few devices of wide memory have enough processors for it.
    pub processor_bytes_per_s: f64,
    /// Bits of a 4-bit weight as it is stored, scales included.
    pub packed_bits: f64,
}

/// A serving engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Kebab-case name, unique among the profiles.
    pub name: String,
    /// Other names people type.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Where the figures come from.
    pub source: String,
    /// Whose kernel surfaces stand for its kernels.
    pub framework: String,
    /// Share of a device's memory that it takes.
    pub memory_share: f64,
    /// Bytes of that share that hold neither weights nor caches (activations, graphs, the runtime).
    pub reserve_bytes: Bytes,
    /// Copies of the caches that exist at the worst moment; 2 where growing concatenates.
    #[serde(default = "one")]
    pub kv_copies: f64,
    /// Tokens per cache block.
    pub kv_block_tokens: Tokens,
    /// Sequences that begin alike hold the whole blocks of that prefix once (prefix caching, on unless told otherwise);
    /// else each holds it. Caches whose policy drops, packs or slides are held by each in any case.
    #[serde(default)]
    pub shares_prefix: bool,
    /// Sequences that run together at most.
    pub most_sequences: u32,
    /// Prompt tokens that a step takes at most.
    pub step_tokens: Tokens,
    /// "auto" KV types follow fp8 weights.
    #[serde(default)]
    pub kv_follows_weights: bool,
    /// Several devices hold a part of the layers each unless something else is said.
    #[serde(default)]
    pub splits_layers: bool,
    /// Policies it can run today, by the name of the preset; `*` for all.
    pub policies: Vec<String>,
    /// Weight types it can run.
    pub weight_dtypes: Vec<DType>,
    /// Cache types it can run.
    pub kv_dtypes: Vec<DType>,
    /// Schedules it can run.
    pub schedules: Vec<String>,
    /// Its products of a single row, where they are not those that were timed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<Streams>,
    /// Whose speed it has: the generations of that engine stand for its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// Its speed, release by release, oldest first.
    #[serde(rename = "generation", default)]
    pub generations: Vec<Generation>,
}

fn one() -> f64 {
    1.0
}

impl Engine {
    /// Checks what types can't say; `origin` names the file in the error.
    pub fn validate(&self, origin: &str) -> Result<(), ProfileError> {
        let fail = |key: &str, problem: &str| {
            Err(ProfileError::Invalid {
                origin: origin.to_owned(),
                key: key.to_owned(),
                problem: problem.to_owned(),
            })
        };
        if !(self.memory_share > 0.0 && self.memory_share <= 1.0) {
            return fail("memory_share", "expected 0 to 1");
        }
        if !(self.kv_copies >= 1.0 && self.kv_copies.is_finite()) {
            return fail("kv_copies", "expected at least 1");
        }
        if self.streams.is_some_and(|s| !(s.processor_bytes_per_s > 0.0 && s.packed_bits >= 4.0)) {
            return fail("streams", "expected a positive rate and at least 4 bits");
        }
        if self.kv_block_tokens == 0 || self.most_sequences == 0 || self.step_tokens == 0 {
            return fail("kv_block_tokens", "blocks, sequences and step tokens are at least 1");
        }
        if self.generations.is_empty() {
            return fail("generation", "expected at least one");
        }
        let years = self.generations.windows(2).all(|w| w[0].since < w[1].since);
        if !years {
            return fail("generation", "expected ascending years");
        }
        for g in &self.generations {
            let factors = [g.prefill, g.decode, g.attention, g.small, g.sums, g.interference];
            let times = [g.step_s, g.sequence_s, g.layer_s, g.log_stddev, g.grouping];
            let devices = g.devices.values().flat_map(|d| [d.prefill, d.decode, d.sums]);
            let factors: Vec<f64> = factors.into_iter().chain(devices).collect();
            if factors.iter().any(|x| !x.is_finite() || *x <= 0.0)
                || times.iter().any(|x| !x.is_finite() || *x < 0.0)
            {
                return fail("generation", "factors are positive, times not negative");
            }
        }
        Ok(())
    }

    /// How caches of this type lie in memory.
    #[must_use]
    pub fn layout(&self, dtype: DType) -> KvLayout {
        let (block_tokens, shares_prefix) = (self.kv_block_tokens, self.shares_prefix);
        KvLayout { dtype, block_tokens, shares_prefix }
    }

    /// The generation of a release of `year`; the newest where no year is given.
    #[must_use]
    pub fn generation(&self, year: Option<u32>) -> &Generation {
        let newest = self.generations.len() - 1;
        let index = year.map_or(newest, |year| {
            self.generations.iter().rposition(|g| g.since <= year).unwrap_or(0)
        });
        &self.generations[index]
    }

    /// Bytes for caches on each of the devices, after weights.
    #[must_use]
    pub fn kv_bytes(&self, gpu: &Gpu, weights: Bytes) -> Bytes {
        let share = Bytes((gpu.memory_bytes.0 as f64 * self.memory_share) as u64);
        share.saturating_sub(weights + self.reserve_bytes)
    }
}

//! Published end-to-end measurements: read, predicted, scored.

use std::collections::HashMap;
use std::io::Read;

use serde::{Deserialize, Serialize};

use crate::cost::GpuKernels;
use crate::engine::{Engine, Generation};
use crate::load::Hit;
use crate::lower::Setup;
use crate::op::DType;
use crate::policy::{Policy, Preset};
use crate::profile::{Catalog, Gpu, Model};
use crate::serve::{Arrival, Deployment, Run};
use crate::surface::Library;
use crate::timeline::Source;
use crate::units::Tokens;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Generated tokens per second, all devices.
    OutputTokS,
    /// Prompt and generated tokens per second.
    TotalTokS,
    /// Generated tokens per second without the prefill.
    DecodeTokS,
    /// Prompt tokens per second.
    PrefillTokS,
    /// Time to first token, ms.
    TtftMs,
    /// Time per token after the first, ms.
    TpotMs,
    /// The whole run, seconds.
    E2eS,
    /// Largest batch that runs.
    MaxBatch,
    /// Peak memory, 1e9 bytes.
    PeakMemGb,
}

impl Metric {
    /// The name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OutputTokS => "output_tok_s",
            Self::TotalTokS => "total_tok_s",
            Self::DecodeTokS => "decode_tok_s",
            Self::PrefillTokS => "prefill_tok_s",
            Self::TtftMs => "ttft_ms",
            Self::TpotMs => "tpot_ms",
            Self::E2eS => "e2e_s",
            Self::MaxBatch => "max_batch",
            Self::PeakMemGb => "peak_mem_gb",
        }
    }

    /// Whether it is a time or a rate.
    #[must_use]
    pub fn is_speed(self) -> bool {
        !matches!(self, Self::MaxBatch | Self::PeakMemGb)
    }

    /// Its value in a run of `isl` prompt and `osl` generated tokens.
    #[must_use]
    pub fn of(self, run: &Run) -> f64 {
        match self {
            Self::OutputTokS => run.output_tok_s,
            Self::TotalTokS => run.total_tok_s,
            Self::DecodeTokS => run.decode_tok_s,
            Self::PrefillTokS => run.prefill_tok_s,
            Self::TtftMs => run.ttft_s * 1e3,
            Self::TpotMs => run.tpot_s * 1e3,
            Self::E2eS => run.e2e_s,
            Self::MaxBatch => f64::from(run.capacity),
            Self::PeakMemGb => run.peak_bytes.0 as f64 / 1e9,
        }
    }
}

/// One row of a file of runs, as text.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Row {
    /// Unique name.
    pub id: String,
    /// Day or year.
    #[serde(default)]
    pub date: String,
    /// Device.
    pub gpu: String,
    /// Devices.
    #[serde(default)]
    pub n_gpus: String,
    /// Devices to a layer.
    #[serde(default)]
    pub tp: String,
    /// Groups of layers.
    #[serde(default)]
    pub pp: String,
    /// Model.
    pub model: String,
    /// Weight type.
    #[serde(default)]
    pub weight_dtype: String,
    /// Cache type.
    #[serde(default)]
    pub kv_dtype: String,
    /// Engine.
    pub engine: String,
    /// Its version.
    #[serde(default)]
    pub engine_version: String,
    /// `static-batch`, `offline-throughput`, `online`.
    pub mode: String,
    /// Sequences, or requests under way.
    #[serde(default)]
    pub batch_or_concurrency: String,
    /// Prompt tokens.
    pub input_len: String,
    /// Generated tokens.
    #[serde(default)]
    pub output_len: String,
    /// First tokens of each prompt that a cache holds: a number or a share.
    #[serde(default)]
    pub prefix_hit: String,
    /// Cache policy.
    #[serde(default)]
    pub kv_policy: String,
    /// What was measured.
    pub metric: String,
    /// Its value.
    pub value: String,
    /// Remarks of who collected it.
    #[serde(default)]
    pub notes: String,
}

/// A row understood: everything resolved but the engine's speed.
pub struct Question {
    /// Device.
    pub gpu: Gpu,
    /// One device's part of the model.
    pub model: Model,
    /// Engine.
    pub engine: Engine,
    /// Year of its release.
    pub year: Option<u32>,
    /// Types.
    pub setup: Setup,
    /// Groups of layers.
    pub pp: u32,
    /// Copies of the whole deployment.
    pub replicas: f64,
    /// The cache policy.
    pub preset: Preset,
    /// How requests come.
    pub arrival: Arrival,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens.
    pub osl: Tokens,
    /// First tokens of each prompt that a cache holds.
    pub hit: Tokens,
    /// What was measured.
    pub metric: Metric,
    /// Its value.
    pub measured: f64,
}

/// Lines that are no record, each with what is wrong.
pub type BadLines = Vec<(u64, String)>;

/// Reads the rows of a file; a row that is no record comes back as its line and what is wrong with it.
pub fn read_rows(origin: &str, reader: impl Read) -> Result<(Vec<Row>, BadLines), String> {
    let mut reader = csv::Reader::from_reader(reader);
    let header = reader.headers().map_err(|e| format!("{origin}:1: {e}"))?.clone();
    let needed = ["id", "gpu", "model", "engine", "mode", "input_len", "metric", "value"];
    if let Some(missing) = needed.iter().find(|n| !header.iter().any(|h| h == **n)) {
        return Err(format!("{origin}:1: column \"{missing}\" is missing"));
    }
    let (mut rows, mut bad) = (Vec::new(), Vec::new());
    for (index, record) in reader.records().enumerate() {
        let line = index as u64 + 2;
        match record.and_then(|r| r.deserialize(Some(&header))) {
            Ok(row) => rows.push(row),
            Err(e) => bad.push((line, e.to_string().replace('\n', " "))),
        }
    }
    if rows.is_empty() && bad.is_empty() {
        return Err(format!("{origin}: no run below the header"));
    }
    Ok((rows, bad))
}

fn metric_of(name: &str) -> Result<Metric, String> {
    use Metric::{
        DecodeTokS, E2eS, MaxBatch, OutputTokS, PeakMemGb, PrefillTokS, TotalTokS, TpotMs, TtftMs,
    };
    [OutputTokS, TotalTokS, DecodeTokS, PrefillTokS, TtftMs, TpotMs, E2eS, MaxBatch, PeakMemGb]
        .into_iter()
        .find(|m| m.name() == name)
        .ok_or_else(|| format!("metric \"{name}\" is not predicted"))
}

fn weight_type(name: &str) -> Result<DType, String> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "fp16" | "f16" | "float16" | "half" => DType::F16,
        "bf16" | "bfloat16" | "full_prec" | "" => DType::Bf16,
        "fp8" => DType::Fp8,
        "int8" | "int8_sq" | "w8a16" | "w8a8" => DType::Int8,
        "int4" | "w4a16" | "q4_k_m" | "q4_0" | "awq" | "gptq" | "nvfp4" | "fp4" => DType::Int4,
        "fp32" | "f32" => DType::F32,
        // Codes of this project's executor, with their scales.
        "q4" => DType::Q4,
        "q8" => DType::Q8,
        other => return Err(format!("weight type \"{other}\" is unknown")),
    })
}

fn cache_type(name: &str, policy: &str, weights: DType, engine: &Engine) -> Result<DType, String> {
    let named = match policy {
        "fp8-kv" => "fp8",
        "int8-kv" => "int8",
        "int4-kv" => "int4",
        _ => name,
    };
    Ok(match named.to_ascii_lowercase().as_str() {
        "fp8" => DType::Fp8,
        "int8" => DType::Int8,
        "int4" => DType::Int4,
        "auto" if engine.kv_follows_weights && weights == DType::Fp8 => DType::Fp8,
        "fp16" | "f16" => DType::F16,
        "bf16" | "auto" | "" => DType::Bf16,
        "fp32" | "f32" => DType::F32,
        other => return Err(format!("cache type \"{other}\" is unknown")),
    })
}

/// A count, a length or a mean length; at least `least`.
fn count(text: &str, name: &str, least: u32) -> Result<Option<u32>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let value: f64 = text.parse().map_err(|_| format!("{name}: \"{text}\" is not a number"))?;
    let whole = value.round();
    if !(f64::from(least)..=f64::from(1u32 << 30)).contains(&whole) {
        return Err(format!("{name}: {text} is not between {least} and 2^30"));
    }
    Ok(Some(whole as u32))
}

impl Row {
    /// Resolves names and numbers; the error says why the row can't be predicted.
    pub fn understand(&self, catalog: &Catalog) -> Result<Question, String> {
        let metric = metric_of(&self.metric)?;
        let measured: f64 =
            self.value.parse().map_err(|_| format!("value: \"{}\" is not a number", self.value))?;
        if !(measured.is_finite() && measured > 0.0) {
            return Err(format!("value: {measured} is not positive"));
        }
        let gpu = catalog.gpu(&self.gpu).map_err(|e| e.to_string())?;
        let engine = catalog.engine(&self.engine).map_err(|e| e.to_string())?;
        let whole = catalog.model(&self.model).map_err(|e| e.to_string())?;
        let preset = match self.kv_policy.as_str() {
            "" | "none" | "unstated" | "fp8-kv" | "int8-kv" | "int4-kv" => "full",
            other => other,
        };
        let preset = Preset::parse(catalog, preset).map_err(|e| e.to_string())?;
        let weights = weight_type(&self.weight_dtype)?;
        let cache = cache_type(&self.kv_dtype, &self.kv_policy, weights, &engine)?;
        let n_gpus = count(&self.n_gpus, "n_gpus", 1)?.unwrap_or(1);
        let tp = count(&self.tp, "tp", 1)?.unwrap_or(1);
        let mut pp = count(&self.pp, "pp", 1)?.unwrap_or(1);
        if engine.splits_layers && tp == 1 {
            pp = n_gpus;
        }
        let replicas = (n_gpus / (tp * pp).max(1)).max(1);
        let mut model = whole.shard(tp)?;
        let batch = count(&self.batch_or_concurrency, "batch_or_concurrency", 1)?;
        let per_replica = |b: u32| b.div_ceil(replicas);
        let arrival = match self.mode.as_str() {
            "static-batch" => Arrival::Static {
                batch: per_replica(batch.ok_or("a static batch needs its size")?),
            },
            "online" => Arrival::Closed {
                concurrency: Some(per_replica(batch.ok_or("a closed loop needs its concurrency")?)),
            },
            "offline-throughput" => Arrival::Closed { concurrency: batch.map(per_replica) },
            other => return Err(format!("mode \"{other}\" is unknown")),
        };
        let isl = count(&self.input_len, "input_len", 0)?;
        let osl = count(&self.output_len, "output_len", 0)?;
        if isl.is_none() && osl.is_none() {
            return Err("neither input_len nor output_len is given".to_owned());
        }
        let (isl, osl) = (isl.unwrap_or(1).max(1), osl.unwrap_or(1).max(1));
        let hit = match self.prefix_hit.as_str() {
            "" => Hit::default(),
            text => text.parse().map_err(|e| format!("prefix_hit: {e}"))?,
        };
        // Benchmarks run past the trained context; speed does not mind.
        model.context = model.context.max(isl.saturating_add(osl));
        let year = self.date.get(..4).and_then(|y| y.parse().ok());
        Ok(Question {
            setup: Setup {
                kv: engine.layout(cache),
                weights,
                activations: DType::Bf16,
                head: if weights.bits() < 16 { DType::Bf16 } else { weights },
                tp,
            },
            gpu,
            model,
            engine,
            year,
            pp,
            replicas: f64::from(replicas),
            preset,
            arrival,
            isl,
            osl,
            hit: hit.of(isl),
            metric,
            measured,
        })
    }
}

/// A prediction of one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// What was measured.
    pub metric: Metric,
    /// Its value.
    pub measured: f64,
    /// The prediction.
    pub predicted: f64,
    /// Lower end of the 90 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Where it comes from.
    pub source: Source,
}

/// Predicts rows; kernels of a device and engine are resolved once.
pub struct Predictor<'a> {
    /// Descriptions.
    pub catalog: &'a Catalog,
    /// Kernel surfaces.
    pub library: &'a Library,
    kernels: HashMap<(String, String, DType, DType, u32), GpuKernels>,
}

impl<'a> Predictor<'a> {
    /// Over a catalog and a library.
    #[must_use]
    pub fn new(catalog: &'a Catalog, library: &'a Library) -> Self {
        Self { catalog, library, kernels: HashMap::new() }
    }

    /// The run that a question is about, under a generation of its engine.
    pub fn run(&mut self, q: &Question, generation: &Generation) -> Result<Run, String> {
        let key = (
            q.gpu.name.clone(),
            q.engine.name.clone(),
            q.setup.weights,
            q.setup.kv.dtype,
            q.setup.tp,
        );
        let kernels = self.kernels.entry(key).or_insert_with(|| {
            GpuKernels::new(
                self.library,
                q.gpu.clone(),
                &q.engine.framework,
                q.setup.weights,
                q.setup.kv.dtype,
                q.setup.tp,
            )
            .streaming(q.engine.streams)
        });
        let policy: &dyn Policy = q.preset.policy.as_ref();
        let deployment = Deployment {
            model: &q.model,
            gpu: &q.gpu,
            engine: &q.engine,
            generation,
            kernels,
            policy,
            setup: q.setup,
            pp: q.pp,
            hit: q.hit,
        };
        let arrival = match (q.metric, q.arrival) {
            // The largest batch is a property of memory, whatever ran.
            (Metric::MaxBatch, _) => Arrival::Static { batch: 1 },
            (_, arrival) => arrival,
        };
        deployment.run(arrival, q.isl, q.osl).map_err(|e| e.to_string())
    }

    /// Predicts a row under a generation of its engine.
    pub fn predict(&mut self, q: &Question, generation: &Generation) -> Result<Prediction, String> {
        let run = self.run(q, generation)?;
        let scale = match q.metric {
            Metric::OutputTokS | Metric::TotalTokS | Metric::DecodeTokS | Metric::PrefillTokS => {
                q.replicas
            }
            _ => 1.0,
        };
        let predicted = q.metric.of(&run) * scale;
        if !(predicted.is_finite() && predicted > 0.0) {
            return Err("the prediction is not a number".to_owned());
        }
        let spread = if q.metric.is_speed() { run.half_width } else { 0.05f64 };
        Ok(Prediction {
            metric: q.metric,
            measured: q.measured,
            predicted,
            low: predicted * (-spread).exp(),
            high: predicted * spread.exp(),
            source: run.source,
        })
    }
}

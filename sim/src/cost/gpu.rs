//! Times of a program on a GPU: every op through the surface of its kernel, ops that nobody timed from bytes and FLOPs.

use std::sync::Arc;

use super::{Cost, CostModel};
use crate::engine::Streams;
use crate::op::{DType, Heads, Op, OpKind, Phase};
use crate::profile::Gpu;
use crate::surface::{Kernel, Library, Model, Shape, SurfaceId};
use crate::timeline::Source;
use crate::units::Seconds;

/// Bytes per second that ops nobody timed reach, as a share of the data sheet: that of the timed memory-bound kernels.
const BORROWED_BANDWIDTH: f64 = 0.6;
/// FLOP/s that they reach, as a share of the peak.
const BORROWED_COMPUTE: f64 = 0.3;
/// Their launch inside a captured graph, seconds.
const LAUNCH: f64 = 2.5e-6;
/// Relative deviation of their time.
const BORROWED_STDDEV: f64 = 0.4;

/// Deviation of the logarithm of products that stream weights, where the device was left out of the fit of their rate.
const STREAM_STDDEV: f64 = 0.1;
/// How sharply memory and processors take turns as the limit of a stream.
const STREAM_SHARPNESS: f64 = 4.0;
/// Packed weights as kernels for a single row read them on a device where none was timed: the one that was timed (A100)
/// reads by its processors, 9 to 11 GB/s each, not by its memory, and so does llama.cpp on eleven cards, by its runs. Bits
/// with a scale and a zero of 16 and 4 bits for 128 weights.
const PACKED: Streams = Streams { processor_bytes_per_s: 9.8e9, packed_bits: 4.16 };
/// Deviation of the logarithm of sums over links of the host: nodes differ.
const NODE_STDDEV: f64 = 0.4;

/// The kernels of one framework on one device for one choice of types.
#[derive(Clone, Debug)]
pub struct GpuKernels {
    gpu: Arc<Gpu>,
    gemm: Option<Model>,
    /// Products of what is left at 16 bits.
    gemm16: Option<Model>,
    prefill: Option<Model>,
    decode: Option<Model>,
    /// Bytes of the cache as a share of what the kernel for single tokens was timed with.
    cache_share: f64,
    /// Every kernel that sums inside a node; engines take the fastest for the size.
    all_reduce: Vec<Model>,
    norm: Option<Model>,
    rope: Option<Model>,
    gated: Option<Model>,
    embedding: Option<Model>,
    sampler: Option<Model>,
    /// Seconds of a narrow product's launch that quantise its input.
    quantisation: f64,
    /// Products of a single row that are not those that were timed.
    streams: Option<Streams>,
    /// Devices that share each layer.
    tp: u32,
}

/// The name of a product's type in timing files.
fn gemm_type(weights: DType, gpu: &Gpu) -> &'static str {
    match weights {
        DType::Int4 if gpu.peak_flops_per_s.fp4.is_some() => "nvfp4",
        DType::F32 => "fp32",
        DType::F16 | DType::Bf16 => "bf16",
        DType::Fp8 => "fp8",
        DType::Int8 | DType::Q8 => "w8a16",
        DType::Int4 | DType::Int2 | DType::Q4 => "w4a16",
    }
}

/// The name of an attention's types: math, and the cache's where it differs.
fn attention_type(cache: DType) -> &'static str {
    match cache {
        DType::F32 | DType::F16 | DType::Bf16 => "bf16",
        DType::Fp8 | DType::Int8 | DType::Q8 => "bf16/fp8",
        DType::Int4 | DType::Q4 => "bf16/int4",
        DType::Int2 => "bf16/int2",
    }
}

impl GpuKernels {
    /// Of `framework` on `gpu`, for weights and caches of these types, `tp` devices to a layer.
    #[must_use]
    pub fn new(
        library: &Library,
        gpu: Gpu,
        framework: &str,
        weights: DType,
        cache: DType,
        tp: u32,
    ) -> Self {
        let id = |kernel: Kernel, framework: &str, dtype: &str, variant: &str| SurfaceId {
            gpu: gpu.name.clone(),
            framework: framework.to_owned(),
            kernel,
            dtype: dtype.to_owned(),
            variant: variant.to_owned(),
        };
        let model = |kernel, framework: &str, dtype: &str, variant: &str| {
            library.model_on(&gpu, &id(kernel, framework, dtype, variant))
        };
        let memory = |kernel| model(kernel, "-", "bf16", "");
        // Packed caches that nobody timed are costed as fp8 ones: the unpacking that makes those slower is theirs too.
        let attention = |kernel| {
            model(kernel, framework, attention_type(cache), "")
                .or_else(|| model(kernel, framework, "bf16/fp8", ""))
                .or_else(|| model(kernel, framework, "bf16", ""))
        };
        // A framework whose own kernels over caches of 8 bits nobody timed anywhere is not given the slow ones of another:
        // by published runs of such on H100 and H200 theirs read bytes as fast as the 16-bit kernels do.
        let own_narrow = library.ids().iter().any(|id| {
            id.framework == framework
                && id.kernel == Kernel::AttnDecode
                && id.dtype == attention_type(cache)
        });
        let by_bytes = matches!(cache, DType::Fp8 | DType::Int8) && !own_narrow;
        let decode = if by_bytes {
            model(Kernel::AttnDecode, framework, "bf16", "")
        } else {
            attention(Kernel::AttnDecode)
        };
        let variants =
            ["node8 vLLM_custom_graph 0.24.0", "node8 TRTLLM 1.0.0", "node8 nccl 2.27.3"];
        let reduce = if tp > 1 {
            let sums = variants
                .iter()
                .filter_map(|variant| model(Kernel::AllReduce, "collectives", "fp16", variant));
            sums.collect()
        } else {
            Vec::new()
        };
        let gemm16 = model(Kernel::Gemm, framework, "bf16", "");
        let gemm =
            model(Kernel::Gemm, framework, gemm_type(weights, &gpu), "").or_else(|| gemm16.clone());
        let launch = |m: &Option<Model>| m.as_ref().map_or(0.0, Model::launch_s);
        Self {
            quantisation: (launch(&gemm) - launch(&gemm16)).max(0.0),
            gemm,
            gemm16,
            prefill: attention(Kernel::AttnPrefill),
            decode,
            cache_share: if by_bytes { cache.bits() as f64 / 16.0 } else { 1.0 },
            all_reduce: reduce,
            norm: memory(Kernel::Rmsnorm),
            rope: memory(Kernel::Rope),
            gated: memory(Kernel::SiluMul),
            embedding: memory(Kernel::Embedding),
            sampler: memory(Kernel::Sampler),
            streams: None,
            gpu: Arc::new(gpu),
            tp,
        }
    }

    /// With products of a single row that read weights as an engine's own kernels do.
    #[must_use]
    pub fn streaming(self, streams: Option<Streams>) -> Self {
        Self { streams, ..self }
    }

    /// Remembers its look-ups: the policies and schedules of a plan launch the same kernels. Attention of single
    /// tokens seldom comes back with the same caches; it is remembered where many devices are asked about it.
    #[must_use]
    pub fn remembering(self) -> Self {
        let all = |model: Option<Model>| model.map(Model::remembering);
        let dear =
            |model: Option<Model>| model.map(|m| if m.is_timed() { m } else { m.remembering() });
        Self {
            gemm: all(self.gemm),
            gemm16: all(self.gemm16),
            prefill: all(self.prefill),
            decode: dear(self.decode),
            all_reduce: self.all_reduce.into_iter().map(Model::remembering).collect(),
            norm: all(self.norm),
            rope: all(self.rope),
            gated: all(self.gated),
            embedding: all(self.embedding),
            sampler: all(self.sampler),
            ..self
        }
    }

    /// A product of a single row by an engine's own kernel: its weights through memory and through the processors.
    fn stream(&self, streams: Streams, weights: DType, elements: u64) -> Cost {
        let bits = match weights {
            DType::Int4 => streams.packed_bits,
            other => other.bits() as f64,
        };
        let bytes = elements as f64 * bits / 8.0;
        let processors = f64::from(self.gpu.processors) * streams.processor_bytes_per_s;
        let memory = bytes / self.gpu.bandwidth_bytes_per_s;
        let sum = memory.powf(STREAM_SHARPNESS) + (bytes / processors).powf(STREAM_SHARPNESS);
        Cost {
            seconds: sum.powf(1.0 / STREAM_SHARPNESS),
            relative_stddev: STREAM_STDDEV,
            source: Source::Extrapolated,
        }
    }

    /// A sum of `bytes` on each device. Devices without links of their own sum over the host's, and how well more than two
    /// of them do is a property of the node (switches, sockets), not of the device: such a sum is not slower than a ring
    /// over links that two of them have. On nodes with links the timed sums of four and eight are 0.7 to 1.6 times that
    /// ring where latency does not rule; on the one timed node without, 4 and 10 times.
    fn all_reduce(&self, op: &Op, bytes: f64, step: u32) -> Cost {
        let fastest = |devices: u32, bytes: f64| {
            let (key, at) = ([f64::from(devices), 0.0, 0.0], [bytes, 0.0, 0.0, 0.0]);
            self.all_reduce
                .iter()
                .map(|m| self.look_up(Some(m), Kernel::AllReduce, key, at, op, step))
                .min_by(|a, b| a.seconds.total_cmp(&b.seconds))
        };
        let Some(timed) = fastest(self.tp, bytes) else { return self.by_work(op, step) };
        if self.gpu.link.is_some() || self.tp <= 2 {
            return timed;
        }
        let n = f64::from(self.tp);
        let (Some(two), Some(hop)) = (fastest(2, 2.0 * (n - 1.0) / n * bytes), fastest(2, 1.0))
        else {
            return timed;
        };
        // Both directions of a hop are the least sum of two.
        let ring = two.seconds + (n - 2.0) * 0.5 * hop.seconds;
        if ring >= timed.seconds {
            return timed;
        }
        Cost {
            seconds: ring,
            relative_stddev: two.relative_stddev.hypot(NODE_STDDEV),
            source: two.source.max(Source::Extrapolated),
        }
    }

    /// Whether products and attention were timed on this very device.
    #[must_use]
    pub fn is_timed(&self) -> bool {
        [&self.gemm, &self.prefill, &self.decode]
            .iter()
            .all(|m| m.as_ref().is_some_and(Model::is_timed))
    }

    fn look_up(
        &self,
        model: Option<&Model>,
        kernel: Kernel,
        key: [f64; 3],
        at: [f64; 4],
        op: &Op,
        step: u32,
    ) -> Cost {
        let Some(model) = model else { return self.by_work(op, step) };
        let estimate = model.estimate(&Shape { kernel, key, at });
        Cost {
            seconds: estimate.seconds,
            relative_stddev: estimate.log_stddev,
            source: estimate.source,
        }
    }

    /// From bytes and FLOPs, with the efficiencies of kernels that are alike.
    fn by_work(&self, op: &Op, step: u32) -> Cost {
        let work = op.work(step);
        let peak = self.gpu.peak_flops_per_s.of(op.dtype).unwrap_or(1e12);
        let compute = work.flops.0 / (peak * BORROWED_COMPUTE);
        let memory = work.bytes().0 as f64 / (self.gpu.bandwidth_bytes_per_s * BORROWED_BANDWIDTH);
        Cost {
            seconds: LAUNCH + compute.max(memory),
            relative_stddev: BORROWED_STDDEV,
            source: Source::Roofline,
        }
    }

    /// Attention: lanes of different lengths are launched together and cost what each would, weighed by its work.
    fn attend(&self, op: &Op, heads: Heads, window: Option<u32>, phase: Phase, step: u32) -> Cost {
        let key = [f64::from(heads.query), f64::from(heads.kv), f64::from(heads.dim)];
        let lanes = op.lanes.as_slice();
        let kv = |lane: &crate::op::Lane| {
            let held = lane.kv.saturating_add(step.saturating_mul(lane.rows));
            f64::from(window.map_or(held, |w| held.min(w.saturating_add(lane.rows - 1).max(1))))
        };
        if phase == Phase::Decode && lanes.iter().all(|l| l.rows == 1) {
            let sequences = op.lanes.sequences() as f64;
            let cached: f64 = lanes.iter().map(|l| f64::from(l.sequences) * kv(l)).sum();
            let each = self.cache_share * cached / sequences.max(1.0);
            let at = [sequences, each.max(1.0), 0.0, 0.0];
            return self.look_up(self.decode.as_ref(), Kernel::AttnDecode, key, at, op, step);
        }
        // A ragged launch takes the time of as many sequences of each lane's length, in proportion.
        let sequences = op.lanes.sequences() as f64;
        let (mut seconds, mut spread, mut source) = (0.0, 0.0, Source::Run);
        for lane in lanes {
            let at =
                [sequences, f64::from(lane.rows), (kv(lane) - f64::from(lane.rows)).max(0.0), 0.0];
            let cost = self.look_up(self.prefill.as_ref(), Kernel::AttnPrefill, key, at, op, step);
            let share = f64::from(lane.sequences) / sequences.max(1.0);
            seconds += share * cost.seconds;
            spread += share * cost.seconds * cost.relative_stddev;
            source = source.max(cost.source);
        }
        Cost {
            seconds,
            relative_stddev: if seconds > 0.0 { spread / seconds } else { 0.0 },
            source,
        }
    }
}

impl CostModel for GpuKernels {
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost {
        if let Some(part) = op.as_attention(step) {
            return self.launch(&part, phase, 0);
        }
        let rows = op.lanes.rows() as f64;
        let wide = |width: f64| ([width, 0.0, 0.0], [rows, 0.0, 0.0, 0.0]);
        let by_width = |model: &Option<Model>, kernel, width: f64| {
            let (key, at) = wide(width);
            self.look_up(model.as_ref(), kernel, key, at, op, step)
        };
        match op.kind {
            OpKind::Gemm { n, k, weights, .. } => {
                if let Some(streams) = self.streams
                    && op.lanes.rows() == 1
                {
                    return self.stream(streams, weights, n.saturating_mul(k));
                }
                let (key, at) = ([n as f64, k as f64, 0.0], [rows, 0.0, 0.0, 0.0]);
                let model = if weights.bits() >= 16 { &self.gemm16 } else { &self.gemm };
                let mut cost = self.look_up(model.as_ref(), Kernel::Gemm, key, at, op, step);
                if weights == DType::Int4 && model.as_ref().is_some_and(|m| !m.is_timed()) {
                    // What the borrowed kernel takes too long over its weights; more rows add to that.
                    let least = self.stream(PACKED, weights, n.saturating_mul(k)).seconds;
                    let one = [1.0, 0.0, 0.0, 0.0];
                    let alone = self.look_up(model.as_ref(), Kernel::Gemm, key, one, op, step);
                    cost.seconds = (cost.seconds - (alone.seconds - least).max(0.0)).max(least);
                } else if weights.bits() < 16 {
                    // Timings of narrow products hold the quantisation of their input as a launch of its own; engines
                    // fuse it into the op before.
                    cost.seconds -= self.quantisation.min(0.6 * cost.seconds);
                }
                // Weights of a whole model never stay in the cache between two steps, as those of a timing loop may.
                let peak = self.gpu.peak_flops_per_s.of(weights).unwrap_or(f64::INFINITY);
                let bytes = weights.bytes(n.saturating_mul(k)).0 as f64;
                let floor = (2.0 * rows * n as f64 * k as f64 / peak)
                    .max(bytes / self.gpu.bandwidth_bytes_per_s);
                cost.seconds = cost.seconds.max(floor);
                cost
            }
            OpKind::Attend { heads, window } => self.attend(op, heads, window, phase, step),
            OpKind::AllReduce { width } => {
                let bytes = rows * f64::from(width) * 2.0;
                self.all_reduce(op, bytes, step)
            }
            // The residual is added in the same kernel, the norm of queries and keys in that of the rotation.
            OpKind::RmsNorm { width, .. } => {
                by_width(&self.norm, Kernel::Rmsnorm, f64::from(width))
            }
            OpKind::QkNorm { heads } | OpKind::Rope { heads } => {
                let width = f64::from((heads.query + heads.kv) * heads.dim);
                by_width(&self.rope, Kernel::Rope, width)
            }
            OpKind::Gated { ffn } => by_width(&self.gated, Kernel::SiluMul, 2.0 * f64::from(ffn)),
            OpKind::Embed { width } => {
                by_width(&self.embedding, Kernel::Embedding, f64::from(width))
            }
            OpKind::Sample { vocab } => by_width(&self.sampler, Kernel::Sampler, f64::from(vocab)),
            // Attention kernels were timed with the write of the new keys and values; returning blocks is the host's.
            OpKind::Append { .. } | OpKind::Release { .. } | OpKind::ReleasePart { .. } => {
                Cost { seconds: 0.0, relative_stddev: 0.0, source: Source::Measured }
            }
            OpKind::Offload { .. } | OpKind::Fetch { .. } | OpKind::Load { .. } => {
                // Once over the link; what it reads here it writes there.
                let bytes = op.work(step).written.0 as f64;
                Cost {
                    seconds: LAUNCH + bytes / self.gpu.host_bytes_per_s(),
                    relative_stddev: BORROWED_STDDEV,
                    source: Source::Roofline,
                }
            }
            _ => self.by_work(op, step),
        }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(0.0)
    }
}

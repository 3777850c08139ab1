//! What a kernel must move and compute, and how long an analytic core says that takes.

use serde::{Deserialize, Serialize};

use super::{AXES, KEYS};
use crate::op::DType;
use crate::profile::Gpu;

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// y\[m,n\] = x\[m,k\] W\[n,k\]^T. Key (n, k); axis m.
    Gemm,
    /// Causal attention of new tokens over cached ones. Key (query heads, KV heads, head dim); axes batch, new tokens,
    /// cached tokens.
    AttnPrefill,
    /// One token per sequence. Key as prefill; axes batch, cached tokens.
    AttnDecode,
    /// One prompt chunk and decodes in one launch. Key as prefill; axes new tokens, cached tokens, decodes, their
    /// cached tokens.
    AttnMixed,
    /// Sum over devices. Key (devices); axis bytes on each.
    AllReduce,
    /// Everyone gets everyone's part. As [`Kernel::AllReduce`].
    AllGather,
    /// Everyone gets a part of the sum. As [`Kernel::AllReduce`].
    ReduceScatter,
    /// Everyone sends a part to everyone. As [`Kernel::AllReduce`].
    Alltoall,
    /// One device to the next. As [`Kernel::AllReduce`].
    SendRecv,
    /// Root-mean-square norm. Key (width); axis tokens; so are all below.
    Rmsnorm,
    /// Sum of two rows.
    Add,
    /// Rotary embedding; width: all rotated channels.
    Rope,
    /// Norm of queries and keys; width: all their channels.
    QkNorm,
    /// silu(gate) * up; width: both together.
    SiluMul,
    /// silu; width: the feed-forward width.
    Silu,
    /// Embedding look-up.
    Embedding,
    /// Sampling; width: the vocabulary.
    Sampler,
    /// Quantisation to fp8 with a given scale.
    Fp8StaticQuant,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Self; 18] = [
        Self::Gemm,
        Self::AttnPrefill,
        Self::AttnDecode,
        Self::AttnMixed,
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::Alltoall,
        Self::SendRecv,
        Self::Rmsnorm,
        Self::Add,
        Self::Rope,
        Self::QkNorm,
        Self::SiluMul,
        Self::Silu,
        Self::Embedding,
        Self::Sampler,
        Self::Fp8StaticQuant,
    ];

    /// The name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::AttnPrefill => "attn_prefill",
            Self::AttnDecode => "attn_decode",
            Self::AttnMixed => "attn_mixed",
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Alltoall => "alltoall",
            Self::SendRecv => "send_recv",
            Self::Rmsnorm => "rmsnorm",
            Self::Add => "add",
            Self::Rope => "rope",
            Self::QkNorm => "qk_norm",
            Self::SiluMul => "silu_mul",
            Self::Silu => "silu",
            Self::Embedding => "embedding",
            Self::Sampler => "sampler",
            Self::Fp8StaticQuant => "fp8_static_quant",
        }
    }

    /// By its name in files.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    /// Whether it moves data between devices.
    #[must_use]
    pub fn is_collective(self) -> bool {
        use Kernel::{AllGather, AllReduce, Alltoall, ReduceScatter, SendRecv};
        matches!(self, AllReduce | AllGather | ReduceScatter | Alltoall | SendRecv)
    }

    /// Whether it is attention.
    #[must_use]
    pub fn is_attention(self) -> bool {
        matches!(self, Self::AttnPrefill | Self::AttnDecode | Self::AttnMixed)
    }

    /// Sizes that make its key.
    #[must_use]
    pub fn key_parts(self) -> usize {
        match self {
            Self::Gemm => 2,
            k if k.is_attention() => 3,
            _ => 1,
        }
    }

    /// Its axes.
    #[must_use]
    pub fn axis_names(self) -> &'static [&'static str] {
        match self {
            Self::Gemm => &["m"],
            Self::AttnPrefill => &["batch", "q_len", "prefix_len"],
            Self::AttnDecode => &["batch", "kv_len"],
            Self::AttnMixed => &["q_len", "prefix_len", "n_decode", "kv_len"],
            k if k.is_collective() => &["bytes"],
            _ => &["tokens"],
        }
    }

    /// Octaves of a key part over which residuals forget each other, fitted by leaving keys out: an n counts twice as
    /// much as a k, a head dimension twice as much as a number of heads.
    pub(crate) fn key_scales(self) -> [f64; KEYS] {
        match self {
            Self::Gemm => [2.0, 4.0, 1.0],
            k if k.is_attention() => [4.0, 4.0, 2.0],
            _ => [4.0, 1.0, 1.0],
        }
    }
}

/// Types of a kernel, as far as bytes and peaks go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NumberType {
    /// What the tensor cores multiply.
    pub multiplied: DType,
    /// Bytes of a weight.
    pub weight_bytes: f64,
    /// Bytes of an activation.
    pub activation_bytes: f64,
    /// Bytes of a cached element.
    pub cache_bytes: f64,
}

impl NumberType {
    /// From the names in timing files: `bf16`, `fp8`, `fp8_block`, `w4a16`, `bf16/fp8` (math/cache).
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (math, cache) = name.split_once('/').unwrap_or((name, name));
        let (multiplied, weight_bytes, activation_bytes) = match math {
            "bf16" => (DType::Bf16, 2.0, 2.0),
            "fp16" => (DType::F16, 2.0, 2.0),
            "fp32" => (DType::F32, 4.0, 4.0),
            // The input is read at 16 bits and quantised on the way.
            "fp8" | "fp8_block" => (DType::Fp8, 1.0, 2.0),
            "int8" => (DType::Int8, 1.0, 2.0),
            "nvfp4" => (DType::Int4, 0.5, 2.0),
            "w8a16" => (DType::Bf16, 1.0, 2.0),
            "w4a16" => (DType::Bf16, 0.5, 2.0),
            _ => return None,
        };
        let cache_bytes = match cache {
            "fp8" | "int8" => 1.0,
            "int4" => 0.5,
            "int2" => 0.25,
            "fp32" => 4.0,
            _ => 2.0,
        };
        Some(Self { multiplied, weight_bytes, activation_bytes, cache_bytes })
    }
}

/// The figures of a device that the core uses, in units per microsecond.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Peak of the type, FLOP/us.
    pub flops: f64,
    /// Memory bandwidth, bytes/us.
    pub bandwidth: f64,
    /// Last-level cache, bytes.
    pub l2: f64,
    /// The geometric mean of the memory bandwidth and what all processors load at eight bytes a clock, bytes/us: the
    /// scale of kernels that too few processors work on.
    pub load: f64,
    /// Streaming multiprocessors.
    pub processors: f64,
    /// Link between devices in one direction, bytes/us.
    pub link: f64,
}

impl Hardware {
    /// Of `gpu` for products of `number`.
    #[must_use]
    pub fn of(gpu: &Gpu, number: NumberType) -> Self {
        let peaks = &gpu.peak_flops_per_s;
        // Four-bit floats have a peak of their own where the card multiplies them.
        let own = if number.multiplied == DType::Int4 { peaks.fp4 } else { None };
        let peak = own.or(peaks.of(number.multiplied)).unwrap_or(1e12);
        Self {
            flops: peak * 1e-6,
            bandwidth: gpu.bandwidth_bytes_per_s * 1e-6,
            l2: gpu.l2_bytes.map_or(8e6, |b| b.0 as f64),
            processors: f64::from(gpu.processors.max(1)),
            load: (8e-6 * f64::from(gpu.processors.max(1)) * gpu.clock_hz.unwrap_or(1.5e9))
                .min(1e9)
                .sqrt()
                * (gpu.bandwidth_bytes_per_s * 1e-6).sqrt(),
            // Without a link the host bus carries it: 25 GB/s in one direction is Gen4 x16.
            link: gpu.link_bytes_per_s.unwrap_or(50e9) * 0.5e-6,
        }
    }
}

/// The five numbers of a core; shares of the data sheet, so that they carry over to another device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Core {
    /// Microseconds of an empty launch.
    pub launch_us: f64,
    /// Share of the peak FLOP/s (collectives: of the link).
    pub compute: f64,
    /// Share of the memory bandwidth.
    pub bandwidth: f64,
    /// The same for footprints that fit the last-level cache; of attention, whose small launches keep few processors
    /// busy, as a share of [`Hardware::load`]. Collectives: latency per further device, as
    /// a share of the first's.
    pub cache: f64,
    /// Exponent of the norm that joins the compute and the memory side: 1 adds them, large takes the longer.
    pub sharpness: f64,
}

/// One launch: a kernel with its key and its place on the axes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// What it does.
    pub kernel: Kernel,
    /// Its key; unused parts are 0.
    pub key: [f64; KEYS],
    /// Its place on the axes; unused ones are 0.
    pub at: [f64; AXES],
}

/// Keys that a chunk of new tokens over a prefix attends to, summed over the tokens.
fn causal_pairs(new: f64, cached: f64) -> f64 {
    new * cached + new * (new + 1.0) / 2.0
}

impl Shape {
    /// (FLOPs, bytes) that it can't avoid.
    #[must_use]
    pub fn work(&self, number: NumberType) -> (f64, f64) {
        let [a, b, c] = self.key;
        let at = self.at;
        match self.kernel {
            Kernel::Gemm => {
                let (n, k, m) = (a, b, at[0]);
                let bytes =
                    number.weight_bytes * n * k + number.activation_bytes * m * k + 2.0 * m * n;
                (2.0 * m * n * k, bytes)
            }
            Kernel::AttnPrefill | Kernel::AttnDecode => {
                let (batch, new, cached) = if self.kernel == Kernel::AttnDecode {
                    (at[0], 1.0, (at[1] - 1.0).max(0.0))
                } else {
                    (at[0], at[1], at[2])
                };
                attention(a, b, c, batch, new, cached, number)
            }
            Kernel::AttnMixed => {
                let (f, y) = attention(a, b, c, 1.0, at[0], at[1], number);
                let (g, z) = attention(a, b, c, at[2], 1.0, (at[3] - 1.0).max(0.0), number);
                (f + g, y + z)
            }
            Kernel::AllReduce => (0.0, 2.0 * (a - 1.0) / a * at[0]),
            Kernel::AllGather | Kernel::ReduceScatter | Kernel::Alltoall => {
                (0.0, (a - 1.0) / a * at[0])
            }
            Kernel::SendRecv => (0.0, at[0]),
            Kernel::Rmsnorm | Kernel::Rope | Kernel::QkNorm | Kernel::Silu | Kernel::Embedding => {
                (0.0, 4.0 * a * at[0])
            }
            Kernel::Add => (0.0, 6.0 * a * at[0]),
            Kernel::SiluMul | Kernel::Fp8StaticQuant => (0.0, 3.0 * a * at[0]),
            Kernel::Sampler => (0.0, 4.0 * a * at[0]),
        }
    }

    /// Microseconds by the analytic core.
    #[must_use]
    pub fn microseconds(&self, core: &Core, hardware: &Hardware, number: NumberType) -> f64 {
        let (flops, bytes) = self.work(number);
        if self.kernel.is_collective() {
            // A collective's latency grows with the number of devices; the wire carries the rest.
            let wire = bytes / (hardware.link * core.compute);
            let hops = core.launch_us * (1.0 + core.cache * (self.key[0] - 1.0).max(0.0));
            return p_norm(hops, wire, core.sharpness);
        }
        let compute = flops * self.padding(hardware) / (hardware.flops * core.compute);
        // Small footprints stay in the last-level cache between launches.
        let ratio = bytes / hardware.l2;
        let hit = 1.0 / (1.0 + ratio * ratio * ratio);
        let small = if self.kernel.is_attention() { hardware.load } else { hardware.bandwidth };
        let memory = bytes
            * (hit / (small * core.cache) + (1.0 - hit) / (hardware.bandwidth * core.bandwidth));
        core.launch_us + p_norm(compute, memory, core.sharpness)
    }

    /// Seconds by the analytic core.
    #[must_use]
    pub fn seconds(&self, core: &Core, hardware: &Hardware, number: NumberType) -> f64 {
        1e-6 * self.microseconds(core, hardware, number)
    }

    /// How much more a matrix product computes than it must: rows padded to a tile, the last wave of tiles not full.
    fn padding(&self, hardware: &Hardware) -> f64 {
        if self.kernel != Kernel::Gemm {
            return 1.0;
        }
        let (n, m) = (self.key[0], self.at[0].max(1.0));
        let tile = match m {
            m if m <= 16.0 => 16.0,
            m if m <= 32.0 => 32.0,
            m if m <= 64.0 => 64.0,
            _ => 128.0,
        };
        let rows = (m / tile).ceil() * tile / m;
        let tiles = (m / 128.0).ceil() * (n / 128.0).ceil();
        let waves = if tiles >= hardware.processors {
            (tiles / hardware.processors).ceil() * hardware.processors / tiles
        } else {
            1.0
        };
        // The square root: half of a ragged wave is hidden by tiles of other sizes.
        rows * waves.sqrt()
    }
}

fn p_norm(a: f64, b: f64, p: f64) -> f64 {
    let (small, large) = if a < b { (a, b) } else { (b, a) };
    if large <= 0.0 {
        return 0.0;
    }
    // Kernels that compute nothing, or next to nothing, have one side only; any power of 1 is 1.
    let sum = if small > 0.0 { 1.0 + (small / large).powf(p) } else { 1.0 };
    if sum > 1.0 { large * sum.powf(1.0 / p) } else { large }
}

fn attention(
    query: f64,
    kv: f64,
    dim: f64,
    batch: f64,
    new: f64,
    cached: f64,
    number: NumberType,
) -> (f64, f64) {
    let flops = 4.0 * batch * query * dim * causal_pairs(new, cached);
    let cache = 2.0 * batch * kv * dim * (new + cached) * number.cache_bytes;
    (flops, cache + 4.0 * batch * query * dim * new)
}

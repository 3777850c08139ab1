//! All fitted surfaces, loaded when first asked for.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, RwLock};

use super::curve::{Curve, Estimate, Prepared};
use super::remembered::Remembered;
use super::shape::{Hardware, Kernel, NumberType, Shape};
use super::text::{Head, from_text};
use super::{KEYS, Origin, Surface, SurfaceId};
use crate::profile::{Catalog, Gpu, ProfileError};
use crate::timeline::Source;

mod packed {
    include!(concat!(env!("OUT_DIR"), "/surfaces.rs"));
}

/// A surface in use.
#[derive(Debug)]
pub struct Loaded {
    /// The surface.
    pub surface: Surface,
    prepared: Prepared,
    number: NumberType,
    curves: Curves,
}

/// Curves by key. A model asks for a handful, many times and on several threads: those are read without a lock.
#[derive(Debug, Default)]
struct Curves {
    first: [OnceLock<([u32; KEYS], Curve)>; 32],
    others: RwLock<HashMap<[u32; KEYS], Arc<Curve>>>,
}

impl Curves {
    fn with<R>(
        &self,
        key: [u32; KEYS],
        make: impl Fn() -> Curve,
        read: impl FnOnce(&Curve) -> R,
    ) -> R {
        for slot in &self.first {
            let (owner, curve) = slot.get_or_init(|| (key, make()));
            if *owner == key {
                return read(curve);
            }
        }
        if let Ok(others) = self.others.read()
            && let Some(curve) = others.get(&key)
        {
            return read(curve);
        }
        let curve = Arc::new(make());
        if let Ok(mut others) = self.others.write() {
            others.insert(key, Arc::clone(&curve));
        }
        read(&curve)
    }
}

impl Loaded {
    /// Unpacks.
    #[must_use]
    pub fn new(surface: Surface) -> Option<Self> {
        let number = NumberType::parse(&surface.id.dtype)?;
        let prepared = Prepared::new(&surface);
        Some(Self { surface, prepared, number, curves: Curves::default() })
    }

    /// The time of a shape on `gpu`, which may be another device than the one that was timed: the core is in shares of
    /// the data sheet, `borrowed` scales the residuals.
    fn estimate_on(&self, hardware: &Hardware, shape: &Shape, borrowed: f64) -> Estimate {
        let make =
            || self.prepared.curve(shape.kernel, &shape.key.map(|k| f64::from(k as u32)), None);
        let mut estimate = self.curves.with(shape.key.map(|k| k as u32), make, |curve| {
            self.surface.estimate(&self.prepared, curve, shape, hardware, self.number)
        });
        if borrowed < 1.0 {
            let core = shape.seconds(&self.surface.core, hardware, self.number);
            estimate.seconds = core * (estimate.seconds / core).powf(borrowed);
        }
        estimate
    }
}

/// Surfaces that ship with the program and the user's own.
#[derive(Debug)]
pub struct Library {
    catalog: Catalog,
    own: Vec<Arc<Loaded>>,
    /// Lazily unpacked, in the order of the packed table.
    shipped: Vec<OnceLock<Option<Arc<Loaded>>>>,
    gpus: RwLock<HashMap<String, Option<Arc<Gpu>>>>,
}

/// Deviation (of the logarithm) that another framework's timings add.
const OTHER_FRAMEWORK: f64 = 0.08;
/// Share of another device's residuals that carries over: the best of none, half and all of them when
/// devices were left out.
const BORROWED: f64 = 0.5;

impl Library {
    /// What ships, and `own` before it.
    #[must_use]
    pub fn new(catalog: Catalog, own: Vec<Surface>) -> Self {
        Self {
            catalog,
            own: own.into_iter().filter_map(|s| Loaded::new(s).map(Arc::new)).collect(),
            shipped: packed::SURFACES.iter().map(|_| OnceLock::new()).collect(),
            gpus: RwLock::default(),
        }
    }

    /// Only `surfaces`: a fit under test.
    #[must_use]
    pub fn only(catalog: Catalog, surfaces: Vec<Surface>) -> Self {
        let mut library = Self::new(catalog, surfaces);
        library.shipped.clear();
        library
    }

    /// The surfaces of a file of the user.
    pub fn read(origin: &str, text: &str) -> Result<Vec<Surface>, ProfileError> {
        from_text(origin, text)
    }

    /// Names of all surfaces.
    #[must_use]
    pub fn ids(&self) -> Vec<SurfaceId> {
        let shipped = packed::SURFACES.iter().take(self.shipped.len()).map(|p| SurfaceId {
            gpu: p.gpu.to_owned(),
            framework: p.framework.to_owned(),
            kernel: Kernel::from_name(p.kernel).unwrap_or(Kernel::Gemm),
            dtype: p.dtype.to_owned(),
            variant: p.variant.to_owned(),
        });
        self.own.iter().map(|l| l.surface.id.clone()).chain(shipped).collect()
    }

    /// A device by name.
    #[must_use]
    pub fn gpu(&self, name: &str) -> Option<Arc<Gpu>> {
        if let Ok(gpus) = self.gpus.read()
            && let Some(gpu) = gpus.get(name)
        {
            return gpu.clone();
        }
        let gpu = self.catalog.gpu(name).ok().map(Arc::new);
        if let Ok(mut gpus) = self.gpus.write() {
            gpus.insert(name.to_owned(), gpu.clone());
        }
        gpu
    }

    fn matching(
        &self,
        wanted: impl Fn(&str, &str, Kernel, &str, &str) -> bool,
    ) -> Vec<Arc<Loaded>> {
        let own = self.own.iter().filter(|l| {
            let id = &l.surface.id;
            wanted(&id.gpu, &id.framework, id.kernel, &id.dtype, &id.variant)
        });
        let mut found: Vec<Arc<Loaded>> = own.cloned().collect();
        for (slot, p) in self.shipped.iter().zip(packed::SURFACES) {
            let Some(kernel) = Kernel::from_name(p.kernel) else { continue };
            if wanted(p.gpu, p.framework, kernel, p.dtype, p.variant)
                && let Some(loaded) = slot.get_or_init(|| unpack(p))
            {
                found.push(Arc::clone(loaded));
            }
        }
        found
    }

    /// The surface of exactly this kernel.
    #[must_use]
    pub fn exact(&self, id: &SurfaceId) -> Option<Arc<Loaded>> {
        let same = |gpu: &str, framework: &str, kernel: Kernel, dtype: &str, variant: &str| {
            gpu == id.gpu
                && framework == id.framework
                && kernel == id.kernel
                && dtype == id.dtype
                && variant == id.variant
        };
        self.matching(same).into_iter().next()
    }

    /// Whatever says most about a kernel on a device of the catalog; see [`Model`].
    #[must_use]
    pub fn model(&self, id: &SurfaceId) -> Option<Model> {
        let gpu = self.gpu(&id.gpu)?;
        self.model_on(&gpu, id)
    }

    /// Whatever says most about a kernel on a described device.
    #[must_use]
    pub fn model_on(&self, gpu: &Gpu, id: &SurfaceId) -> Option<Model> {
        let gpu = Arc::new(gpu.clone());
        if let Some(own) = self.exact(id) {
            return Some(Model::new(&gpu, vec![(own, 1.0)], 1.0, 0.0));
        }
        let class = type_class(&id.dtype);
        let alike = |g: &str, kernel: Kernel, dtype: &str, variant: &str| {
            g == id.gpu
                && kernel == id.kernel
                && type_class(dtype) == class
                && (!kernel.is_collective() || same_kind(variant, &id.variant))
        };
        let mut here =
            self.matching(|g, _, kernel, dtype, variant| alike(g, kernel, dtype, variant));
        if !here.is_empty() {
            here.sort_by_key(|l| {
                (framework_rank(&l.surface.id.framework), std::cmp::Reverse(l.surface.keys.len()))
            });
            here.truncate(1);
            let parts = here.into_iter().map(|l| (l, 1.0)).collect();
            return Some(Model::new(&gpu, parts, 1.0, OTHER_FRAMEWORK));
        }
        self.transferred(id, gpu, class)
    }

    /// From other devices: the geometric mean of their cores on this device's data sheet, nearer ones counting more.
    fn transferred(&self, id: &SurfaceId, gpu: Arc<Gpu>, class: &str) -> Option<Model> {
        let mut found = self.matching(|g, framework, kernel, dtype, variant| {
            g != id.gpu
                && kernel == id.kernel
                && type_class(dtype) == class
                && (kernel.is_collective() || framework_rank(framework) < 3)
                && (!kernel.is_collective() || same_kind(variant, &id.variant))
        });
        // One surface a device: that of the framework that was asked for, else the usual order.
        found.sort_by_key(|l| {
            let own = &l.surface.id;
            (
                own.gpu.clone(),
                own.framework != id.framework,
                framework_rank(&own.framework),
                std::cmp::Reverse(own.variant.clone()),
            )
        });
        found.dedup_by(|a, b| a.surface.id.gpu == b.surface.id.gpu);
        let parts: Vec<(Arc<Loaded>, f64)> = found
            .into_iter()
            .filter_map(|l| {
                let other = self.gpu(&l.surface.id.gpu)?;
                let weight = similarity(&gpu, &other);
                Some((l, weight))
            })
            .collect();
        if parts.is_empty() {
            return None;
        }
        // What the spread between devices leaves out: with it, intervals hold 93 % of the products and 84 to 97 % of the
        // attention of devices that were left out.
        let extra = if id.kernel == Kernel::Gemm { 0.15 } else { 0.25 };
        Some(Model::new(&gpu, parts, BORROWED, extra))
    }
}

/// How much one device's kernels say about another's: generation first, then the balance of FLOPs and bandwidth.
fn similarity(a: &Gpu, b: &Gpu) -> f64 {
    let generation = |g: &Gpu| g.arch.split_whitespace().next().unwrap_or_default().to_owned();
    let balance = |g: &Gpu| {
        let peak = g.peak_flops_per_s.of(crate::op::DType::Bf16).unwrap_or(1e12);
        (peak / g.bandwidth_bytes_per_s).ln()
    };
    let same = if generation(a) == generation(b) { 4.0 } else { 1.0 };
    // Kernels of another vendor are other kernels; they count only where there is nothing else.
    let vendor = if is_nvidia(a) == is_nvidia(b) { 1.0 } else { 1e-3 };
    let size = (f64::from(a.processors.max(1)) / f64::from(b.processors.max(1))).ln().abs();
    vendor * same * (-(balance(a) - balance(b)).abs() - 0.5 * size).exp()
}

/// By the compute capability in its architecture (`Hopper sm90`).
#[must_use]
pub fn is_nvidia(gpu: &Gpu) -> bool {
    gpu.arch.contains("sm")
}

/// Types whose kernels are the same: bf16 and fp16 are one.
fn type_class(dtype: &str) -> &str {
    match dtype {
        "fp16" | "bf16" | "fp16/bf16" | "bf16/fp16" => "bf16",
        "fp8_block" | "fp8" => "fp8",
        "bf16/fp8" | "fp16/fp8" => "bf16/fp8",
        other => other,
    }
}

/// Collectives: custom kernels inside a captured graph, those of TensorRT-LLM, eager ones and NCCL's are four kinds.
fn same_kind(a: &str, b: &str) -> bool {
    let kind = |v: &str| {
        if v.contains("_graph") {
            0
        } else if v.contains("TRTLLM") {
            3
        } else if v.contains("_eager") {
            1
        } else {
            2
        }
    };
    let node = |v: &str| v.split_whitespace().next().unwrap_or_default().to_owned();
    kind(a) == kind(b) && (node(a) == "node8") == (node(b) == "node8")
}

/// Frameworks whose timings come from today's engines first.
fn framework_rank(framework: &str) -> u8 {
    match framework {
        "vllm" => 0,
        "sglang" => 1,
        "trtllm" => 2,
        "sarathi" => 3,
        _ => 4,
    }
}

fn unpack(p: &packed::Packed) -> Option<Arc<Loaded>> {
    let head: Head = toml::from_str(p.head).ok()?;
    let origin = Origin {
        source: p.source.to_owned(),
        licence: p.licence.to_owned(),
        date: p.date.to_owned(),
    };
    let mut surface = head.surface(p.gpu, p.framework, origin).ok()?;
    let parts = surface.id.kernel.key_parts();
    let mut words = packed::BLOB[p.start..p.end].chunks_exact(4);
    for _ in 0..p.keys {
        let mut key = [0u32; KEYS];
        for slot in &mut key[..parts] {
            *slot = u32::from_le_bytes(words.next()?.try_into().ok()?);
        }
        surface.keys.push(key);
    }
    let residuals = &packed::BLOB[p.start + 4 * parts * p.keys..p.end];
    surface.residuals =
        residuals.chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]])).collect();
    Loaded::new(surface).map(Arc::new)
}

/// What predicts one kernel on one device: its own surface, another framework's, or other devices' together.
#[derive(Clone, Debug)]
pub struct Model {
    parts: Vec<(Arc<Loaded>, f64)>,
    /// The device as each part's type sees it.
    hardware: Vec<Hardware>,
    borrowed: f64,
    extra: f64,
    remembered: Option<Arc<Remembered>>,
}

impl Model {
    fn new(gpu: &Gpu, parts: Vec<(Arc<Loaded>, f64)>, borrowed: f64, extra: f64) -> Self {
        let hardware = parts.iter().map(|(l, _)| Hardware::of(gpu, l.number)).collect();
        Self { parts, hardware, borrowed, extra, remembered: None }
    }

    /// Remembers what it estimates, for whoever asks about the same shapes again and again.
    #[must_use]
    pub fn remembering(self) -> Self {
        Self { remembered: Some(Arc::default()), ..self }
    }

    /// The time of a shape.
    #[must_use]
    pub fn estimate(&self, shape: &Shape) -> Estimate {
        match &self.remembered {
            Some(remembered) => remembered.estimate(shape, || self.work_out(shape)),
            None => self.work_out(shape),
        }
    }

    fn work_out(&self, shape: &Shape) -> Estimate {
        if let [(only, _)] = self.parts.as_slice()
            && self.borrowed >= 1.0
        {
            let mut estimate = only.estimate_on(&self.hardware[0], shape, 1.0);
            if self.extra > 0.0 {
                estimate.log_stddev = estimate.log_stddev.hypot(self.extra);
                estimate.source = estimate.source.max(Source::Extrapolated);
            }
            return estimate;
        }
        let (mut log, mut sum, mut square, mut deviation) = (0.0, 0.0, 0.0, 0.0);
        for ((loaded, weight), hardware) in self.parts.iter().zip(&self.hardware) {
            let estimate = loaded.estimate_on(hardware, shape, self.borrowed);
            let ln = estimate.seconds.ln();
            log += weight * ln;
            square += weight * ln * ln;
            deviation += weight * estimate.log_stddev;
            sum += weight;
        }
        let mean = log / sum;
        // Devices that disagree about this shape say how far to trust their mean.
        let spread = (square / sum - mean * mean).max(0.0).sqrt();
        Estimate {
            seconds: mean.exp(),
            log_stddev: spread.hypot(deviation / sum).hypot(self.extra),
            source: Source::Extrapolated,
        }
    }

    /// Whether the kernel was timed on this very device in this very framework.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.borrowed >= 1.0 && self.extra <= 0.0
    }

    /// The surface that counts most.
    #[must_use]
    pub fn nearest(&self) -> Option<&Surface> {
        self.parts.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(l, _)| &l.surface)
    }

    /// (compute, memory) microseconds at the device's data-sheet peaks.
    #[must_use]
    pub fn bounds(&self, shape: &Shape) -> (f64, f64) {
        let (Some((loaded, _)), Some(hardware)) = (self.parts.first(), self.hardware.first())
        else {
            return (0.0, 0.0);
        };
        let (flops, bytes) = shape.work(loaded.number);
        (flops / hardware.flops, bytes / hardware.bandwidth)
    }

    /// Seconds of an empty launch by the cores it rests on.
    #[must_use]
    pub fn launch_s(&self) -> f64 {
        let sum: f64 = self.parts.iter().map(|(_, w)| w).sum();
        let us: f64 = self.parts.iter().map(|(l, w)| w * l.surface.core.launch_us).sum();
        1e-6 * us / sum.max(1e-12)
    }

    /// Whether some framework's kernel was timed on this very device.
    #[must_use]
    pub fn is_timed(&self) -> bool {
        self.borrowed >= 1.0
    }

    /// The surfaces it rests on.
    pub fn surfaces(&self) -> impl Iterator<Item = &SurfaceId> {
        self.parts.iter().map(|(l, _)| &l.surface.id)
    }
}

//! What people mean: names resolved, quantities read, defaults filled in.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::cost::{
    Calibrated, CostModel, Roofline, calibrated::KernelProfile, roofline::Efficiency,
};
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::Setup;
use batchmax_sim::op::DType;
use batchmax_sim::plan::{Case, LARGEST_BATCH, Limits};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Catalog, Gpu, Model};
use batchmax_sim::surface::{Library, Surface};
use batchmax_sim::units::{Bytes, Tokens, parse_bytes, parse_tokens};

use crate::cli::{ConfigArgs, Global, MemoryArgs};
use crate::paths;

/// The device that is this machine.
pub const LOCAL: &str = "cpu";
/// Tokens per cache block of the CPU executor.
const CPU_BLOCK_TOKENS: Tokens = 32;
/// Tokens per cache block of GPU engines (vLLM's default).
const GPU_BLOCK_TOKENS: Tokens = 16;
/// Share of a device's memory that is used where no limit is given.
const MEMORY_SHARE: f64 = 0.9;

/// Where descriptions and results are.
pub struct Places {
    /// Descriptions, built in and the user's.
    pub catalog: Catalog,
    /// Models and profiles of this machine.
    pub data_dir: PathBuf,
}

impl Places {
    /// From the global flags.
    pub fn new(global: &Global) -> Result<Self> {
        let data_dir = paths::data_dir(global.data_dir.as_ref())?;
        let mut catalog = Catalog::built_in().with_user_dir(data_dir.clone());
        if let Some(dir) = &global.profiles {
            if !dir.is_dir() {
                bail!("--profiles {}: no such directory", dir.display());
            }
            catalog = catalog.with_user_dir(dir.clone());
        }
        Ok(Self { catalog, data_dir })
    }

    /// The fitted profile of this machine with `threads` threads.
    pub fn kernel_profile_path(&self, device: &str, threads: usize) -> PathBuf {
        self.data_dir.join("kernels").join(device).join(format!("batchmax-{threads}t.toml"))
    }

    /// The measurements a profile is fitted from.
    pub fn measurements_path(&self, device: &str, threads: usize) -> PathBuf {
        self.data_dir.join("measurements").join(device).join(format!("batchmax-{threads}t.json"))
    }

    /// Kernel surfaces that the user has fitted: `kernels/<device>/<framework>.toml` in the data directory.
    pub fn own_surfaces(&self) -> Result<Vec<Surface>> {
        let mut surfaces = Vec::new();
        let devices = std::fs::read_dir(self.data_dir.join("kernels"));
        for device in devices.into_iter().flatten().flatten() {
            // This machine's own profile is of another kind: shapes of one model, not of a framework.
            if device.file_name() == LOCAL {
                continue;
            }
            for file in std::fs::read_dir(device.path()).into_iter().flatten().flatten() {
                let path = file.path();
                if path.extension().is_some_and(|e| e == "toml") {
                    let text = std::fs::read_to_string(&path)
                        .with_context(|| path.display().to_string())?;
                    surfaces.extend(Library::read(&path.display().to_string(), &text)?);
                }
            }
        }
        Ok(surfaces)
    }

    fn kernel_profile(&self, device: &str, threads: usize) -> Result<KernelProfile> {
        let path = self.kernel_profile_path(device, threads);
        let text = std::fs::read_to_string(&path).map_err(|_| {
            anyhow!(
                "no kernel profile of this machine with {threads} threads; \
                 hint: batchmax profile --threads {threads} (under a minute)"
            )
        })?;
        let profile =
            batchmax_sim::profile::catalog::parse_toml(&path.display().to_string(), &text)?;
        Ok(profile)
    }
}

/// A device with its cost model.
pub struct Device {
    /// Its description.
    pub gpu: Gpu,
    /// How long ops take on it.
    pub cost: Box<dyn CostModel>,
    /// Bytes that the process or the driver takes for itself.
    pub runtime: Bytes,
    /// Whether it is this machine's CPU.
    pub local: bool,
}

/// Cores of this machine, or what `--threads` says.
pub fn threads(memory: &MemoryArgs) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match memory.threads {
        Some(0) => bail!("--threads 0: at least one thread must work"),
        Some(n) if n > 4 * cores => {
            bail!("--threads {n}: this machine has {cores} cores; hint: leave --threads out")
        }
        Some(n) => Ok(n),
        None => Ok(cores),
    }
}

impl Device {
    /// Resolves a name. `cpu` needs a profile of this machine.
    pub fn resolve(places: &Places, name: &str, memory: &MemoryArgs) -> Result<Self> {
        if name != LOCAL {
            let gpu = places.catalog.gpu(name)?;
            let cost = Box::new(Roofline::new(gpu.clone(), Efficiency::default()));
            return Ok(Self { gpu, cost, runtime: Bytes(1 << 30), local: false });
        }
        let threads = threads(memory)?;
        let profile = places.kernel_profile(LOCAL, threads)?;
        let gpu =
            places.catalog.gpu(LOCAL).with_context(|| "this machine's description is missing")?;
        let runtime = profile.runtime_bytes;
        Ok(Self { gpu, cost: Box::new(Calibrated::new(profile)), runtime, local: true })
    }
}

fn dtype(text: Option<&String>, flag: &str) -> Result<Option<DType>> {
    text.map(|t| t.parse().map_err(|e| anyhow!("{flag}: {e}"))).transpose()
}

/// The types and the layout on a device.
pub fn setup(model: &Model, local: bool, memory: &MemoryArgs) -> Result<Setup> {
    let weights = dtype(memory.weight_dtype.as_ref(), "--weight-dtype")?;
    let kv = dtype(memory.kv_dtype.as_ref(), "--kv-dtype")?;
    Ok(if local {
        Setup {
            kv: KvLayout { dtype: kv.unwrap_or(DType::F16), block_tokens: CPU_BLOCK_TOKENS },
            weights: weights.unwrap_or(DType::F32),
            activations: DType::F32,
            head: weights.unwrap_or(DType::F32),
            tp: 1,
        }
    } else {
        Setup {
            kv: KvLayout { dtype: kv.unwrap_or(DType::Bf16), block_tokens: GPU_BLOCK_TOKENS },
            weights: weights.unwrap_or(model.weight_dtype),
            activations: DType::Bf16,
            head: DType::Bf16,
            tp: 1,
        }
    })
}

/// The memory limits on a device.
pub fn limits(gpu: &Gpu, runtime: Bytes, memory: &MemoryArgs) -> Result<Limits> {
    let read = |text: &Option<String>, flag: &str| -> Result<Option<Bytes>> {
        text.as_ref().map(|t| parse_bytes(t).map_err(|e| anyhow!("{flag}: {e}"))).transpose()
    };
    let all = read(&memory.memory, "--memory")?
        .unwrap_or(Bytes((gpu.memory_bytes.0 as f64 * MEMORY_SHARE) as u64));
    Ok(Limits { memory: all, kv_memory: read(&memory.kv_memory, "--kv-memory")?, runtime })
}

/// One token count.
pub fn tokens(text: &str, flag: &str) -> Result<Tokens> {
    let tokens = parse_tokens(text).map_err(|e| anyhow!("{flag}: {e}"))?;
    if tokens == 0 {
        bail!("{flag} 0: at least one token is needed");
    }
    Ok(tokens)
}

/// `1,2,4`, `2k..32k` (doubling from the first to the last) or both mixed.
pub fn token_list(text: &str, flag: &str) -> Result<Vec<Tokens>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        match part.split_once("..") {
            Some((from, to)) => {
                let (mut at, to) = (tokens(from, flag)?, tokens(to, flag)?);
                if at > to {
                    bail!("{flag} {part}: a range goes from the smaller to the larger");
                }
                while at < to {
                    list.push(at);
                    at = at.saturating_mul(2);
                }
                list.push(to);
            }
            None => list.push(tokens(part, flag)?),
        }
    }
    Ok(list)
}

/// A batch, or `None` for the largest that fits.
pub fn batch(text: &str) -> Result<Option<u32>> {
    if text == "max" {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(0) => bail!("--batch 0: at least one sequence is needed"),
        Ok(n) if n <= LARGEST_BATCH => Ok(Some(n)),
        Ok(n) => bail!("--batch {n}: at most {LARGEST_BATCH} sequences are searched"),
        Err(_) => bail!("--batch {text}: expected a number of sequences, or max"),
    }
}

/// A schedule.
pub fn schedule(text: &str) -> Result<Schedule> {
    text.parse().map_err(|e| anyhow!("--schedule: {e}"))
}

/// One resolved configuration.
pub struct Configuration {
    /// The model.
    pub model: Model,
    /// The device.
    pub device: Device,
    /// The policy.
    pub preset: Preset,
    /// Types and layout.
    pub setup: Setup,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens.
    pub osl: Tokens,
    /// The batch, or the largest that fits.
    pub batch: Option<u32>,
    /// Who runs when.
    pub schedule: Schedule,
    /// Memory.
    pub limits: Limits,
}

impl Configuration {
    /// From the flags.
    pub fn resolve(places: &Places, args: &ConfigArgs) -> Result<Self> {
        let model = model(places, &args.model)?;
        let device = Device::resolve(places, &args.gpu, &args.memory)?;
        let limits = limits(&device.gpu, device.runtime, &args.memory)?;
        let setup = setup(&model, device.local, &args.memory)?;
        Ok(Self {
            preset: Preset::parse(&places.catalog, &args.policy)?,
            isl: tokens(&args.isl, "--isl")?,
            osl: tokens(&args.osl, "--osl")?,
            batch: batch(&args.batch)?,
            schedule: schedule(&args.schedule)?,
            model,
            device,
            setup,
            limits,
        })
    }

    /// As the planner's case.
    pub fn case(&self) -> Case<'_> {
        Case {
            model: &self.model,
            policy: self.preset.policy.as_ref(),
            setup: self.setup,
            isl: self.isl,
            osl: self.osl,
            schedule: self.schedule,
            limits: self.limits,
        }
    }

    /// The batch that was asked for, or the largest that fits; an error where nothing fits.
    pub fn batch(&self) -> Result<u32> {
        if let Some(batch) = self.batch {
            return Ok(batch);
        }
        let (largest, over) = self.case().largest_batch(LARGEST_BATCH)?;
        if largest == 0 {
            bail!(
                "not even one sequence fits: {} more {} is needed; hint: a policy with a smaller budget, or more memory",
                over.by,
                over.bound.name()
            );
        }
        Ok(largest)
    }
}

/// A model by name: built in, the user's, fetched, or a file.
pub fn model(places: &Places, name: &str) -> Result<Model> {
    match places.catalog.model(name) {
        Ok(model) => Ok(model),
        Err(error) => match located(places, name) {
            Some(path) => Ok(places.catalog.model(&path.display().to_string())?),
            None => Err(error.into()),
        },
    }
}

#[cfg(feature = "exec")]
fn located(places: &Places, name: &str) -> Option<PathBuf> {
    batchmax_exec::fetch::locate(&places.data_dir, name)
}

#[cfg(not(feature = "exec"))]
fn located(_places: &Places, _name: &str) -> Option<PathBuf> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        assert_eq!(token_list("1k,2k", "--isl").expect("list"), [1024, 2048]);
        assert_eq!(token_list("2k..16k", "--isl").expect("range"), [2048, 4096, 8192, 16384]);
        assert_eq!(token_list("3..10", "--isl").expect("range"), [3, 6, 10]);
        assert!(token_list("8k..2k", "--isl").is_err());
        assert!(token_list("0", "--isl").is_err());
    }

    #[test]
    fn batches() {
        assert_eq!(batch("max").expect("max"), None);
        assert_eq!(batch("12").expect("12"), Some(12));
        assert!(batch("0").is_err() && batch("-1").is_err() && batch("9999999").is_err());
    }
}

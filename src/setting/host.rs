//! Devices, engines and memory: where a model runs.

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::cost::Calibrated;
use batchmax_sim::engine::Engine;
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::Setup;
use batchmax_sim::op::DType;
use batchmax_sim::place::{Choice, Placement};
use batchmax_sim::plan::{Host, Limits};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Gpu, Model};
use batchmax_sim::units::{Bytes, parse_bytes};

use super::{LOCAL, Places, devices_of, dtype, is_local, part, tp_list};
use crate::cli::{ConfigArgs, MemoryArgs};

/// The engine of GPUs where none is named and it can run what is asked.
const ENGINE: &str = "vllm";
/// The engine that runs everything, and exists on this machine only.
const HYPOTHETICAL: &str = "batchmax";
/// Tokens per cache block of the executor.
const BLOCK_TOKENS: u32 = 32;
/// Share of this machine's memory, or of its GPU's, that is used where no limit is given.
const LOCAL_MEMORY_SHARE: f64 = 0.9;

/// Cores of this machine (of one memory node where it has several), or what `--threads` says.
pub fn threads(memory: &MemoryArgs) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    #[cfg(feature = "exec")]
    let usual = batchmax_exec::nodes::usual_threads(&batchmax_exec::nodes::nodes());
    #[cfg(not(feature = "exec"))]
    let usual = None;
    match memory.threads {
        Some(0) => bail!("--threads 0: at least one thread must work"),
        Some(n) if n > 4 * cores => {
            bail!("--threads {n}: this machine has {cores} cores; hint: leave --threads out")
        }
        Some(n) => Ok(n),
        None => Ok(usual.unwrap_or(cores)),
    }
}

/// Threads by which profiles of a device of this machine are told apart: those of its CPU; a GPU has one profile.
pub fn threads_on(device: &str, memory: &MemoryArgs) -> Result<usize> {
    if device == LOCAL { threads(memory) } else { Ok(1) }
}

/// Types and layout on a device of this machine.
pub fn setup_here(
    places: &Places,
    device: &str,
    model: &Model,
    memory: &MemoryArgs,
) -> Result<Setup> {
    if device == LOCAL {
        return local_setup(places, model, memory);
    }
    Ok(Setup { tp: devices_of(device), ..cuda_setup(model, memory)? })
}

/// On a GPU of this machine: brain floats unless the model's weights are in single precision or codes are asked for.
fn cuda_setup(model: &Model, memory: &MemoryArgs) -> Result<Setup> {
    let own = if model.weight_dtype == DType::F32 { DType::F32 } else { DType::Bf16 };
    let weights = dtype(memory.weight_dtype.as_ref(), "--weight-dtype")?.unwrap_or(own);
    let kv = dtype(memory.kv_dtype.as_ref(), "--kv-dtype")?.unwrap_or(DType::Bf16);
    let activations = if weights == DType::F32 { DType::F32 } else { DType::Bf16 };
    Ok(Setup {
        kv: KvLayout { dtype: kv, block_tokens: BLOCK_TOKENS, shares_prefix: false },
        weights,
        activations,
        // As engines have it: codes of 8 bits, and numbers of 16, are enough for the embedding and the head.
        head: match weights {
            DType::Q4 => DType::Q8,
            DType::Fp8 => DType::Bf16,
            other => other,
        },
        tp: 1,
    })
}

/// Types and layout on this machine's CPU: weights as they are stored here, unless told otherwise.
fn local_setup(places: &Places, model: &Model, memory: &MemoryArgs) -> Result<Setup> {
    // What was fetched under its name says how it is stored. Only a CPU asks.
    let fetched = || places.stored(&super::located(places, &model.name)?);
    let usual = if memory.weight_dtype.is_some() { None } else { model.stored.or_else(fetched) };
    cpu_setup(memory, usual.unwrap_or(DType::F32))
}

/// The same with weights in single precision unless told otherwise, where what is measured is to depend on nothing else.
#[cfg(feature = "exec")]
pub fn exact_setup(memory: &MemoryArgs) -> Result<Setup> {
    cpu_setup(memory, DType::F32)
}

fn cpu_setup(memory: &MemoryArgs, usual: DType) -> Result<Setup> {
    let weights = dtype(memory.weight_dtype.as_ref(), "--weight-dtype")?.unwrap_or(usual);
    let kv = dtype(memory.kv_dtype.as_ref(), "--kv-dtype")?.unwrap_or(DType::F16);
    Ok(Setup {
        kv: KvLayout { dtype: kv, block_tokens: BLOCK_TOKENS, shares_prefix: false },
        weights,
        activations: DType::F32,
        // Four bits are too few for the embedding and the head; files hold them in eight.
        head: if weights == DType::Q4 { DType::Q8 } else { weights },
        tp: 1,
    })
}

/// A placement that is asked for.
pub struct Wanted<'a> {
    /// The whole model.
    pub model: &'a Model,
    /// The device, as it was typed.
    pub gpu: &'a str,
    /// The engine, where one was typed.
    pub engine: Option<&'a str>,
    /// Types, devices, memory.
    pub choice: Choice,
    /// What it must run: names of presets.
    pub policies: Vec<&'a str>,
    /// And schedules.
    pub schedules: Vec<Schedule>,
    /// Flags of the CPU.
    pub memory: &'a MemoryArgs,
}

/// Types, devices and memory from the flags, for `tp` devices to a layer.
pub fn choice(memory: &MemoryArgs, kv: Option<DType>, tp: u32, pp: u32) -> Result<Choice> {
    let read = |text: &Option<String>, flag: &str| -> Result<Option<Bytes>> {
        text.as_ref().map(|t| parse_bytes(t).map_err(|e| anyhow!("{flag}: {e}"))).transpose()
    };
    Ok(Choice {
        weights: dtype(memory.weight_dtype.as_ref(), "--weight-dtype")?,
        kv,
        tp,
        pp,
        memory: read(&memory.memory, "--memory")?,
        kv_memory: read(&memory.kv_memory, "--kv-memory")?,
    })
}

impl<'a> Wanted<'a> {
    /// Of one configuration.
    pub fn of(
        args: &'a ConfigArgs,
        model: &'a Model,
        preset: &'a Preset,
        schedule: Schedule,
    ) -> Result<Self> {
        let tps = tp_list(args.placement.tp.as_ref())?;
        let [tp] = tps.as_slice() else { bail!("--tp: one number is expected here") };
        let kv = dtype(args.memory.kv_dtype.as_ref(), "--kv-dtype")?;
        Ok(Self {
            model,
            gpu: &args.gpu,
            engine: args.placement.engine.as_deref(),
            choice: choice(&args.memory, kv, *tp, args.placement.pp)?,
            policies: vec![&preset.name],
            schedules: vec![schedule],
            memory: &args.memory,
        })
    }

    /// What each device holds. This machine's CPU needs its description.
    pub fn placement(&self, places: &Places) -> Result<Placement> {
        if self.memory.threads.is_some() {
            threads(self.memory)?;
        }
        if is_local(self.gpu) {
            return self.local(places);
        }
        let gpu = places.catalog.gpu(self.gpu)?;
        let place = |engine: &Engine| -> Result<Placement, String> {
            let placement = Placement::new(self.model, &gpu, engine, self.choice)?;
            for policy in &self.policies {
                for schedule in &self.schedules {
                    if let Some(why) = placement.refuses(policy, *schedule) {
                        return Err(why);
                    }
                }
            }
            Ok(placement)
        };
        let hypothetical =
            || place(&places.catalog.engine(HYPOTHETICAL).map_err(|e| e.to_string())?);
        match self.engine {
            Some(name) => {
                let engine = places.catalog.engine(name)?;
                place(&engine).map_err(|why| match hypothetical() {
                    Ok(_) => {
                        anyhow!("{why}; hint: --engine {HYPOTHETICAL} predicts it all the same")
                    }
                    Err(_) => anyhow!(why),
                })
            }
            None => match place(&places.catalog.engine(ENGINE)?) {
                Ok(placement) => Ok(placement),
                Err(_) => hypothetical().map_err(|why| anyhow!(why)),
            },
        }
    }

    /// The same with its cost model. This machine's CPU needs a profile.
    pub fn host(&self, places: &Places) -> Result<Host> {
        let placement = self.placement(places)?;
        host(places, placement, self.memory)
    }

    fn local(&self, places: &Places) -> Result<Placement> {
        check_local(self.engine, self.choice.tp, self.choice.pp)?;
        let memory = MemoryArgs { kv_dtype: None, ..self.memory.clone() };
        let mut setup = setup_here(places, self.gpu, self.model, &memory)?;
        setup.kv.dtype = self.choice.kv.unwrap_or(setup.kv.dtype);
        let threads = threads_on(self.gpu, self.memory)?;
        let profile = places.kernel_profile(self.gpu, threads, setup.weights)?;
        let gpu: Gpu = places
            .catalog
            .gpu(self.gpu)
            .with_context(|| "this machine's description is missing")?;
        let share = Bytes((gpu.memory_bytes.0 as f64 * LOCAL_MEMORY_SHARE) as u64);
        Ok(Placement {
            gpu,
            engine: None,
            model: part(self.gpu, self.model)?,
            setup,
            pp: 1,
            limits: Limits {
                memory: self.choice.memory.unwrap_or(share),
                kv_memory: self.choice.kv_memory,
                runtime: profile.runtime_bytes,
            },
        })
    }
}

/// This machine's CPU is one device under one engine.
pub fn check_local(engine: Option<&str>, tp: u32, pp: u32) -> Result<()> {
    if tp > 1 || pp > 1 {
        bail!(
            "--tp, --pp: this machine shares layers over what --device names (cuda:0,1); hint: name a GPU with --gpu"
        );
    }
    if let Some(other) = engine.filter(|e| *e != HYPOTHETICAL) {
        bail!(
            "--engine {other}: this machine runs {HYPOTHETICAL} only; hint: name a GPU with --gpu"
        );
    }
    Ok(())
}

fn host(places: &Places, placement: Placement, memory: &MemoryArgs) -> Result<Host> {
    let cost: Box<dyn batchmax_sim::cost::CostModel> = match placement.engine {
        Some(_) => placement.cost(places.library()?),
        None => {
            let (device, weights) = (&placement.gpu.name, placement.setup.weights);
            let threads = threads_on(device, memory)?;
            Box::new(Calibrated::new(places.kernel_profile(device, threads, weights)?))
        }
    };
    Ok(Host { usd_per_hour: placement.gpu.usd_per_hour, placement, cost })
}

/// Hosts that were asked for before: equal placements share a cost model.
#[derive(Default)]
pub struct Hosts {
    known: Vec<Host>,
}

impl Hosts {
    /// The host of a placement.
    pub fn get(&mut self, places: &Places, wanted: &Wanted<'_>) -> Result<&Host> {
        let placement = wanted.placement(places)?;
        let found = self.known.iter().position(|h| h.placement == placement);
        let index = match found {
            Some(index) => index,
            None => {
                self.known.push(host(places, placement, wanted.memory)?);
                self.known.len() - 1
            }
        };
        Ok(&self.known[index])
    }
}

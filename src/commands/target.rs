//! What a command runs on: this machine's CPU, a GPU of it, or several that share each layer.

use anyhow::{Context, Result, bail};
use batchmax_exec::cuda::{CudaEngine, CudaGroup};
use batchmax_exec::devices::{self, DeviceInfo, DeviceMemory, Driver};
use batchmax_exec::weights::{Weights, check_executable, host_type};
use batchmax_exec::{Engine, Executor, machine};
use batchmax_sim::cost::calibrated::{KernelProfile, Point, Provenance};
use batchmax_sim::op::{DType, Family};
use batchmax_sim::profile::{Gpu, Model, Peaks};
use batchmax_sim::units::Bytes;

use crate::cli::{DeviceArgs, Global, MemoryArgs};
use crate::commands::local;
use crate::report::remark;
use crate::setting::{self, Device, LOCAL};

/// A device that is ready.
pub struct Target {
    /// What it is called where devices are named.
    name: String,
    /// Drivers of GPUs; none is the CPU.
    drivers: Vec<Box<dyn Driver>>,
}

impl Target {
    /// This machine's CPU.
    pub fn cpu() -> Self {
        Self { name: LOCAL.to_owned(), drivers: Vec::new() }
    }

    /// Opens the device of `--device`. One that fails ends with exit code 3, what can't be meant with 2; where the best is
    /// asked for, a GPU that can't run leaves the work to the CPU and says why.
    pub fn of(args: &DeviceArgs, global: &Global) -> Result<Self> {
        let text = &args.device;
        match setting::device(text)? {
            Device::Cpu => Ok(Self::cpu()),
            Device::Auto => {
                let Some(index) = best(devices::cuda().unwrap_or_default()) else {
                    return Ok(Self::cpu());
                };
                match devices::open(&[index]) {
                    Ok(drivers) => {
                        let target = Self::of_drivers(drivers);
                        let text = format!(
                            "on cuda:{index}, {}; --device cpu runs on the processor",
                            target.label()
                        );
                        remark(global.quiet, &text);
                        Ok(target)
                    }
                    Err(why) => {
                        remark(global.quiet, &format!("on the processor: {why}"));
                        Ok(Self::cpu())
                    }
                }
            }
            Device::Cuda(_) if !devices::WITH_CUDA => bail!(
                "--device {text}: this batchmax was built without CUDA; hint: cargo build --release --features cuda"
            ),
            Device::Cuda(indices) => {
                let drivers =
                    devices::open(&indices).with_context(|| format!("--device {text}"))?;
                Ok(Self::of_drivers(drivers))
            }
        }
    }

    fn of_drivers(drivers: Vec<Box<dyn Driver>>) -> Self {
        let mut target = Self { name: String::new(), drivers };
        target.name = setting::cuda_name(&target.label());
        target
    }

    /// The GPU, or the first of several: they are alike.
    fn gpu(&self) -> Option<&DeviceInfo> {
        self.drivers.first().map(|driver| driver.device())
    }

    /// What it is called where devices are named.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How people call it.
    pub fn label(&self) -> String {
        match (self.gpu(), self.drivers.len()) {
            (None, _) => machine::processor(),
            (Some(gpu), 1) => gpu.name.clone(),
            (Some(gpu), count) => format!("{count}x {}", gpu.name),
        }
    }

    /// Holds --gpu to what --device says. The CPU is the default of --gpu, which so says nothing.
    pub fn check_gpu(&self, gpu: &str) -> Result<()> {
        if gpu == LOCAL || gpu == self.name {
            return Ok(());
        }
        bail!(
            "--gpu {gpu}: this runs on {}; hint: --device chooses a device of this machine, what-if predicts others",
            self.name
        )
    }

    /// Says what of a model can't run there with weights of a type, if anything.
    pub fn check(&self, model: &Model, weights: DType) -> Result<()> {
        let held = if self.gpu().is_some() { host_type(weights) } else { weights };
        Ok(check_executable(model, held)?)
    }

    /// What a run may take where no limit is given, on each device: most of the memory.
    pub fn memory(&mut self) -> Result<Bytes> {
        match self.memory_of(|memory| memory.total, u64::min)? {
            None => Ok(local::machine_memory()),
            Some(total) => Ok(Bytes(total / 10 * 9)),
        }
    }

    /// A figure of the devices' memory, the one that counts of two; none of a CPU.
    fn memory_of(
        &mut self,
        figure: fn(&DeviceMemory) -> u64,
        counts: fn(u64, u64) -> u64,
    ) -> Result<Option<u64>> {
        let mut found = None;
        for driver in &mut self.drivers {
            let one = figure(&driver.memory()?);
            found = Some(found.map_or(one, |other| counts(one, other)));
        }
        Ok(found)
    }

    /// Threads of a run: those of the CPU, which stay on one memory node from now on; one tells a GPU what to do.
    pub fn threads(&self, memory: &MemoryArgs) -> Result<usize> {
        if self.drivers.is_empty() { local::threads(memory) } else { Ok(1) }
    }

    /// Memory that is in use before there are weights.
    pub fn in_use(&mut self) -> Result<Bytes> {
        let used = |memory: &DeviceMemory| memory.total.saturating_sub(memory.free);
        Ok(self.memory_of(used, u64::max)?.map_or_else(machine::rss, Bytes))
    }

    /// The index of a GPU.
    pub fn index(&self) -> Option<u32> {
        self.gpu().map(|gpu| gpu.index)
    }

    /// A model with its weights there, both whole. `activations` counts on a GPU; threads on a CPU.
    pub fn executor(
        &mut self,
        model: &Model,
        weights: Weights,
        activations: DType,
        threads: usize,
    ) -> Result<Box<dyn Executor + '_>> {
        Ok(match &mut self.drivers[..] {
            [] => Box::new(Engine::new(model.clone(), weights, threads)),
            [driver] => {
                Box::new(CudaEngine::new(driver.as_mut(), model.clone(), weights, activations)?)
            }
            several => {
                let drivers = several.iter_mut().map(|driver| driver.as_mut() as &mut dyn Driver);
                Box::new(CudaGroup::new(drivers, model, &weights, activations)?)
            }
        })
    }

    /// How it is named in results.
    pub fn provenance(&self, model: &str, threads: usize, weights: DType) -> Provenance {
        let isa = self.gpu().map_or_else(machine::isa, |device| {
            let (major, minor) = device.capability;
            format!("sm_{major}{minor}, driver {}", device.driver)
        });
        let processor = self.label();
        Provenance {
            date: crate::dates::today(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            processor,
            threads: threads as u32,
            isa,
            model: model.to_owned(),
            weights,
        }
    }
}

/// The first GPU that kernels can run on.
fn best(found: Vec<DeviceInfo>) -> Option<u32> {
    found.into_iter().find(DeviceInfo::runs_kernels).map(|device| device.index)
}

/// The device that measurements are of.
pub fn measured_device(of: &Provenance) -> String {
    if of.isa.starts_with("sm_") { setting::cuda_name(&of.processor) } else { LOCAL.to_owned() }
}

/// A device of this machine as a description: its peaks are what its own kernels reached.
pub fn described(profile: &KernelProfile, target: &Target) -> Gpu {
    let best = |rate: fn(&Point) -> f64| {
        profile
            .families
            .iter()
            .filter(|f| matches!(f.family, Family::Gemm | Family::AttendDecode))
            .flat_map(|f| &f.points)
            .map(|p| rate(p) / p.seconds)
            .fold(1.0, f64::max)
    };
    let flops = Some(best(|p| p.flops));
    let mut gpu = Gpu {
        name: profile.device.clone(),
        label: profile.measured.processor.clone(),
        aliases: Vec::new(),
        arch: std::env::consts::ARCH.to_owned(),
        memory_bytes: machine::memory().max(Bytes(1)),
        bandwidth_bytes_per_s: best(|p| p.bytes),
        peak_flops_per_s: Peaks { f32: flops, ..Peaks::default() },
        processors: machine::cores() as u32,
        l2_bytes: machine::last_level_cache(),
        clock_hz: None,
        power_w: None,
        link: None,
        link_bytes_per_s: None,
        host_link: None,
        usd_per_hour: None,
        source: format!("batchmax profile, {}", profile.measured.date),
        unsure: Vec::new(),
    };
    if let Some(device) = target.gpu() {
        gpu.arch = profile.measured.isa.clone();
        gpu.memory_bytes = Bytes(device.memory.max(1));
        gpu.processors = device.multiprocessors.max(1);
        gpu.l2_bytes = None;
        if profile.measured.weights != DType::F32 {
            gpu.peak_flops_per_s = Peaks { bf16: flops, ..Peaks::default() };
        }
    }
    gpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_first_gpu_that_can() {
        let gpu = |index, capability| DeviceInfo {
            name: "a card".into(),
            index,
            capability,
            memory: 1 << 30,
            multiprocessors: 1,
            l2: 0,
            driver: 12040,
        };
        assert_eq!(best(Vec::new()), None);
        assert_eq!(best(vec![gpu(0, (7, 5))]), None);
        assert_eq!(best(vec![gpu(0, (7, 5)), gpu(1, (8, 6)), gpu(2, (9, 0))]), Some(1));
    }
}

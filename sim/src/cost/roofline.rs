//! Times from a data sheet: FLOPs over the derated peak or bytes over the derated bandwidth, whichever is longer, plus
//! a launch.

use super::{Cost, CostModel};
use crate::op::{DType, Op, OpKind, Phase};
use crate::profile::Gpu;
use crate::timeline::Source;
use crate::units::Seconds;

/// What share of the data sheet real engines reach, fitted to published end-to-end runs (see `source`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Efficiency {
    /// Share of the peak FLOP/s.
    pub compute: f64,
    /// Share of the bandwidth.
    pub bandwidth: f64,
    /// Host time per step.
    pub step: Seconds,
    /// Standard deviation of an op's time, relative.
    pub relative_stddev: f64,
}

impl Default for Efficiency {
    /// Medians over the published runs of production engines on NVIDIA data-centre GPUs: compute 0.40, bandwidth 0.82,
    /// 2.1 ms of host time a step. Prefill alone varies from 0.15 to 0.71 of the peak between engines and cards, hence
    /// the wide deviation.
    fn default() -> Self {
        Self { compute: 0.40, bandwidth: 0.82, step: Seconds(2.1e-3), relative_stddev: 0.25 }
    }
}

/// Launch cost of a GPU kernel inside a captured graph, seconds.
const LAUNCH: f64 = 2e-6;

/// The data-sheet model of a device.
#[derive(Clone, Debug)]
pub struct Roofline {
    gpu: Gpu,
    efficiency: Efficiency,
}

impl Roofline {
    /// For a device.
    #[must_use]
    pub fn new(gpu: Gpu, efficiency: Efficiency) -> Self {
        Self { gpu, efficiency }
    }

    /// The least time that physics allows: (compute, memory) seconds at the data sheet's own peaks.
    #[must_use]
    pub fn floor(gpu: &Gpu, op: &Op, step: u32) -> (f64, f64) {
        let work = op.work(step);
        let multiplied = match op.kind {
            OpKind::Gemm { weights, .. } if weights.bits() < op.dtype.bits() => weights,
            _ => op.dtype,
        };
        let peak = gpu.peak_flops_per_s.of(multiplied).or(gpu.peak_flops_per_s.of(DType::Bf16));
        let compute = peak.map_or(0.0, |peak| work.flops.0 / peak);
        (compute, work.bytes().0 as f64 / gpu.bandwidth_bytes_per_s)
    }
}

impl CostModel for Roofline {
    fn launch(&self, op: &Op, _phase: Phase, step: u32) -> Cost {
        let (compute, memory) = Self::floor(&self.gpu, op, step);
        let busy = (compute / self.efficiency.compute).max(memory / self.efficiency.bandwidth);
        let free = matches!(op.kind, OpKind::Release { .. } | OpKind::ReleasePart { .. });
        Cost {
            seconds: if free { 0.0 } else { LAUNCH + busy },
            relative_stddev: self.efficiency.relative_stddev,
            source: Source::Roofline,
        }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        self.efficiency.step
    }
}

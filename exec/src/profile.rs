//! Times single passes over a grid, so that the simulator can be calibrated for this machine.
//!
//! A finished profile is a list of points; a started one can be saved and resumed probe by probe.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_sim::cost::calibrated::{KernelProfile, Point, Provenance, features, fit};
use batchmax_sim::cost::{CostModel, predict};
use batchmax_sim::op::{Family, Phase};
use batchmax_sim::probe::Probe;
use batchmax_sim::program::Pass;
use batchmax_sim::timeline::Timeline;
use batchmax_sim::units::{Bytes, Seconds};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::devices::Conditions;
use crate::error::ExecError;
use crate::executor::Executor;

/// Passes of a yardstick that count.
const YARDSTICK_ROUNDS: usize = 5;

/// At what a GPU ran; what is not known is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// Probes done by then.
    pub done: usize,
    /// Version of the driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Clock of the multiprocessors in MHz.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_mhz: Option<u32>,
    /// Clock of the memory in MHz.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_clock_mhz: Option<u32>,
    /// Temperature in degrees Celsius.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<u32>,
}

impl Condition {
    /// What was found after so many probes.
    #[must_use]
    pub fn of(done: usize, found: Conditions) -> Self {
        let Conditions { driver, clock_mhz, memory_clock_mhz, temperature_c } = found;
        Self { done, driver, clock_mhz, memory_clock_mhz, temperature_c }
    }
}

/// What a profile has measured so far.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurements {
    /// Machine, date, versions.
    pub measured: Provenance,
    /// Size of the grid: a file of another grid is not resumed.
    pub probes: usize,
    /// Probes done.
    pub done: usize,
    /// Bytes of the process before any weights.
    pub runtime_bytes: Bytes,
    /// At what a GPU ran on the way: clocks that fall say that it throttled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Seconds of each timed step beyond its ops.
    pub overheads_s: Vec<f64>,
    /// The points: ops where they run, with what the ops before them left in the caches.
    pub points: Vec<(Family, Point)>,
    /// Those of a GPU's shorter passes once more, each with the device's cache full of something else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cold: Vec<(Family, Point)>,
}

impl Measurements {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(measured: Provenance, probes: usize, runtime_bytes: Bytes) -> Self {
        Self {
            measured,
            probes,
            done: 0,
            runtime_bytes,
            conditions: Vec::new(),
            overheads_s: Vec::new(),
            points: Vec::new(),
            cold: Vec::new(),
        }
    }

    /// Whether these can go on with a grid on this machine.
    #[must_use]
    pub fn matches(&self, measured: &Provenance, probes: usize) -> bool {
        let same_machine = Provenance { date: measured.date.clone(), ..self.measured.clone() };
        same_machine == *measured && self.probes == probes && self.done <= probes
    }

    /// Times the probes that are missing. `progress` sees these measurements after every probe and may save them.
    pub fn go_on(
        &mut self,
        executor: &mut dyn Executor,
        probes: &[Probe],
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&Self),
    ) -> Result<(), ExecError> {
        for probe in &probes[self.done..] {
            if stop.load(Ordering::Relaxed) {
                return Err(ExecError::Interrupted);
            }
            self.time(executor, probe)?;
            self.done += 1;
            progress(self);
        }
        Ok(())
    }

    fn time(&mut self, executor: &mut dyn Executor, probe: &Probe) -> Result<(), ExecError> {
        // The first pass touches fresh memory; a run does so once, not at every step.
        let short = probe.weight < 4000.0;
        if short {
            executor.probe(&probe.program, probe.resident)?;
        }
        let clock = executor.probe(&probe.program, probe.resident)?;
        let timeline = clock.timeline(&probe.program);
        for phase in [Phase::Prefill, Phase::Decode] {
            let overhead = timeline.overhead[phase as usize].0;
            if overhead > 0.0 {
                self.overheads_s.push(overhead);
            }
        }
        probe.program.visit_passes(|index, pass, _| take(&mut self.points, index, pass, &clock));
        // Long passes sweep the cache by themselves.
        if short && let Some(clock) = executor.probe_cold(&probe.program, probe.resident)? {
            probe.program.visit_passes(|index, pass, _| take(&mut self.cold, index, pass, &clock));
        }
        Ok(())
    }
}

/// Adds the points of a pass.
fn take(points: &mut Vec<(Family, Point)>, pass_index: u32, pass: &Pass, clock: &Clock) {
    for (block_index, block) in pass.blocks() {
        for (op_index, op) in block.ops.iter().enumerate() {
            let samples = clock.samples(pass_index, block_index, op_index as u32);
            let features = features(op, 0);
            let (Some((seconds, spread)), Some((at, _))) =
                (median_and_spread(samples), features.parts.first())
            else {
                continue;
            };
            let work = op.work(0);
            let point = Point {
                key: features.key,
                at: *at,
                flops: work.flops.0,
                bytes: work.bytes().0 as f64,
                seconds,
                spread,
            };
            points.push((op.family(pass.phase), point));
        }
    }
}

/// How much longer than in its profile a machine takes now, by phase: prefill, decode. 1 is the same pace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace(pub [f64; 2]);

impl Pace {
    /// Times `yardsticks` on an executor, several times over, against what the profile `cost` knows of them.
    ///
    /// # Errors
    /// If a pass can't run.
    pub fn now(
        executor: &mut dyn Executor,
        yardsticks: &[Probe; 2],
        cost: &dyn CostModel,
    ) -> Result<Self, ExecError> {
        let mut pace = [1.0; 2];
        for probe in yardsticks {
            let predicted = predict(cost, &probe.program).phases();
            let mut times = Vec::new();
            // The first one touches fresh memory.
            for round in 0..=YARDSTICK_ROUNDS {
                let phases = executor.probe(&probe.program, probe.resident)?;
                if round > 0 {
                    times.push(phases.timeline(&probe.program).phases());
                }
            }
            for (phase, pace) in pace.iter_mut().enumerate().filter(|(i, _)| predicted[*i].0 > 0.0)
            {
                let seconds: Vec<f64> = times.iter().map(|t| t[phase].0).collect();
                *pace = median_and_spread(&seconds).map_or(1.0, |(m, _)| m / predicted[phase].0);
            }
        }
        Ok(Self(pace))
    }

    /// Between two paces, before a run and after it.
    #[must_use]
    pub fn between(self, other: Self) -> Self {
        let Self([prefill, decode]) = self;
        Self([(prefill * other.0[0]).sqrt(), (decode * other.0[1]).sqrt()])
    }

    /// A predicted time at this pace.
    #[must_use]
    pub fn total(self, predicted: &Timeline) -> Seconds {
        let [prefill, decode] = predicted.phases();
        prefill * self.0[0] + decode * self.0[1]
    }
}

/// Median and interquartile range over the median.
fn median_and_spread(samples: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |q: f64| sorted.get(((sorted.len() - 1) as f64 * q).round() as usize).copied();
    if sorted.is_empty() {
        return None;
    }
    let median = at(0.5)?;
    Some((median, (at(0.75)? - at(0.25)?) / median))
}

/// Fits the kernel profile of a device to its measurements. Points of equal kernel and sizes become one, their median.
#[must_use]
pub fn calibrate(measurements: &Measurements, device: &str) -> KernelProfile {
    type Equal = BTreeMap<String, Vec<Point>>;
    let mut families: BTreeMap<Family, Equal> = BTreeMap::new();
    for (family, point) in &measurements.points {
        let equal = format!("{:?} {:.3?}", point.key, point.at);
        families.entry(*family).or_default().entry(equal).or_default().push(*point);
    }
    let merged = |mut points: Vec<Point>| {
        points.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        points[points.len() / 2]
    };
    let families = families
        .into_iter()
        .map(|(family, equal)| fit(family, equal.into_values().map(merged).collect()))
        .collect();
    let overhead = median_and_spread(&measurements.overheads_s).map_or(0.0, |(m, _)| m);
    KernelProfile {
        device: device.to_owned(),
        measured: measurements.measured.clone(),
        step_overhead_s: overhead,
        runtime_bytes: measurements.runtime_bytes,
        families,
    }
}

//! Times from kernels measured on the device: an analytic core times the interpolated log-residual of the points.
//!
//! The core is `launch + ((flops/F)^4 + (bytes/B)^4)^(1/4)` with three fitted numbers per kernel family; what it misses
//! (cache levels, tile edges, thread balance) is in the residuals, interpolated between the nearest points in the
//! logarithm of the family's coordinates and held constant outside them. The deviation of a family is that of points
//! left out of their own prediction.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Cost, CostModel};
use crate::op::{Choice, DType, Family, Heads, Lane, Op, OpKind, Phase, Pick, Score, Work};
use crate::timeline::Source;
use crate::units::{Bytes, Seconds};

/// What names a kernel beside its sizes: shapes that are equal or not, never "near".
pub type Key = [u32; 5];

/// Log2 of the sizes that a kernel's time depends on; unused ones are 0.
pub type Coordinates = [f64; 3];

/// One measured launch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// The kernel.
    pub key: Key,
    /// Its sizes, log2.
    pub at: Coordinates,
    /// FLOPs.
    pub flops: f64,
    /// Bytes.
    pub bytes: f64,
    /// Median time, seconds.
    pub seconds: f64,
    /// Interquartile range relative to the median.
    pub spread: f64,
}

/// Errors on points that their own prediction did not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitError {
    /// Points.
    pub points: usize,
    /// Median of |predicted / measured - 1|.
    pub median: f64,
    /// 90th percentile of the same.
    pub p90: f64,
}

/// A fitted kernel family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamilyFit {
    /// Which.
    pub family: Family,
    /// Seconds that a launch takes at least.
    pub launch_s: f64,
    /// FLOP/s that the core reaches.
    pub flops_per_s: f64,
    /// Bytes/s that the core reaches.
    pub bytes_per_s: f64,
    /// Leave-one-out errors.
    pub left_out: FitError,
    /// Standard deviation of the log error of points left out.
    pub stddev: f64,
    /// The points: what the residuals are interpolated between.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub points: Vec<Point>,
}

/// What was measured, where and with what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Day of the measurement, ISO 8601.
    pub date: String,
    /// Version of the program that measured.
    pub version: String,
    /// The processor, in its own words.
    pub processor: String,
    /// Threads it used.
    pub threads: u32,
    /// Instruction set that the kernels used.
    pub isa: String,
    /// The model whose shapes were measured.
    pub model: String,
    /// Type of its weights.
    #[serde(default = "single")]
    pub weights: DType,
}

/// What all weights were before it was noted.
fn single() -> DType {
    DType::F32
}

impl Default for Provenance {
    fn default() -> Self {
        Self {
            date: String::new(),
            version: String::new(),
            processor: String::new(),
            threads: 0,
            isa: String::new(),
            model: String::new(),
            weights: single(),
        }
    }
}

/// All families of a device and an engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelProfile {
    /// The device's name.
    pub device: String,
    /// How it was measured.
    pub measured: Provenance,
    /// Time of a step beyond its ops, seconds.
    pub step_overhead_s: f64,
    /// Bytes that the process takes without weights, caches and buffers.
    pub runtime_bytes: Bytes,
    /// The families.
    #[serde(rename = "family")]
    pub families: Vec<FamilyFit>,
}

/// What the residual of an op is looked up by: its key, and coordinates with their weights (ragged batches have one per
/// lane).
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// The kernel.
    pub key: Key,
    /// Sizes and their share in the op's time.
    pub parts: Vec<(Coordinates, f64)>,
}

fn log2(x: f64) -> f64 {
    x.max(1.0).log2()
}

/// What tells one way of choosing from another.
fn pick(by: Pick) -> u32 {
    match by {
        Pick::Bounds { page, per_query_head, .. } => page * 4 + u32::from(per_query_head),
        Pick::Shares { page, channels } => page * 4 + 2 + channels * 1024,
        Pick::Clusters { per_cluster, .. } => per_cluster * 4 + 3,
    }
}

/// What tells one state from another.
fn networks(heads: Heads) -> u32 {
    heads.form.state.map_or(0, |s| s.rank.saturating_mul(4096).saturating_add(s.hidden))
}

/// The features of `op`, `step` steps into its pass.
#[must_use]
pub fn features(op: &Op, step: u32) -> Features {
    if let Some(part) = op.as_attention(step) {
        return features(&part, 0);
    }
    let rows = op.lanes.rows() as f64;
    let one = |key: Key, at: Coordinates| Features { key, parts: vec![(at, 1.0)] };
    let kv = |lane: &Lane| f64::from(lane.kv.saturating_add(step.saturating_mul(lane.rows)));
    let sequences = op.lanes.sequences() as f64;
    let cached: f64 = op.lanes.as_slice().iter().map(|l| f64::from(l.sequences) * kv(l)).sum();
    let mean_kv = cached / sequences.max(1.0);
    let kept: f64 =
        op.lanes.as_slice().iter().map(|l| f64::from(l.sequences) * f64::from(l.keep)).sum();
    let kept = kept / sequences.max(1.0);
    let head_key = |extra: u32| {
        op.cache_heads().map_or([0; 5], |h| {
            // Packed and pruned caches are kernels of their own.
            let packed = h.form.packed.map_or(0, |p| p.bits * 256 + p.group);
            let pruned = h.form.pruned.map_or(0, |p| p.channels);
            let stored = h.dtype.bits() as u32 + packed * 64 + pruned * (1 << 20);
            [h.query, h.kv, h.dim, stored, extra]
        })
    };
    match op.kind {
        OpKind::Gemm { n, k, weights, accumulate } => one(
            [
                u32::try_from(n).unwrap_or(u32::MAX),
                u32::try_from(k).unwrap_or(u32::MAX),
                weights.bits() as u32,
                u32::from(accumulate),
                0,
            ],
            [log2(rows), 0.0, 0.0],
        ),
        OpKind::Embed { width } => one([width, 0, 0, 0, 0], [log2(rows), 0.0, 0.0]),
        OpKind::RmsNorm { width, .. } => one([0; 5], [log2(rows * f64::from(width)), 0.0, 0.0]),
        OpKind::QkNorm { heads } | OpKind::Rope { heads } => {
            let width = f64::from((heads.query + heads.kv) * heads.dim);
            one([1, 0, 0, 0, 0], [log2(rows * width), 0.0, 0.0])
        }
        OpKind::Gated { ffn } => one([0; 5], [log2(rows * f64::from(ffn)), 0.0, 0.0]),
        OpKind::AllReduce { width } => {
            one([width, 1, 0, 0, 0], [log2(rows * f64::from(width)), 0.0, 0.0])
        }
        OpKind::Softcap { width } => one([0; 5], [log2(rows * f64::from(width)), 0.0, 0.0]),
        OpKind::Sample { vocab } => one([vocab, 0, 0, 0, 0], [log2(rows), 0.0, 0.0]),
        OpKind::Append { .. } | OpKind::AppendPart { .. } => {
            one(head_key(0), [log2(rows), log2(sequences), 0.0])
        }
        OpKind::Release { .. } => one(head_key(0), [log2(cached), 0.0, 0.0]),
        OpKind::ReleasePart { .. } => {
            one(head_key(0), [log2(kept.min(mean_kv) * sequences), 0.0, 0.0])
        }
        OpKind::Compare { .. } => one(head_key(0), [log2(sequences), 0.0, 0.0]),
        OpKind::Offload { .. } => one(head_key(1), [log2(rows), log2(sequences), 0.0]),
        OpKind::Fetch { .. } => one(head_key(2), [log2(sequences), log2(kept), 0.0]),
        OpKind::Load { .. } => one(head_key(3), [log2(rows), log2(sequences), 0.0]),
        OpKind::Deviate { .. } => one(head_key(0), [log2(rows), log2(sequences), 0.0]),
        OpKind::Blend { .. } => one(head_key(0), [log2(kept * sequences), log2(sequences), 0.0]),
        OpKind::Foresee { .. } => one(head_key(1), [log2(sequences), log2(mean_kv), log2(kept)]),
        OpKind::Refresh { .. } => one(head_key(0), [log2(sequences), log2(mean_kv), log2(kept)]),
        OpKind::Index { page, .. } => one(head_key(page), [log2(rows), log2(sequences), 0.0]),
        OpKind::Cluster { .. } => one(head_key(0), [log2(mean_kv), log2(sequences), log2(kept)]),
        OpKind::Select { by, .. } => {
            one(head_key(pick(by)), [log2(sequences), log2(mean_kv), log2(kept)])
        }
        // Pages are copied whole, tokens one by one.
        OpKind::AttendChosen { by, .. } => {
            one(head_key(pick(by)), [log2(sequences), log2(kept), log2(mean_kv)])
        }
        OpKind::Pack { .. } | OpKind::PruneChannels { .. } | OpKind::Trim { .. } => {
            one(head_key(0), [log2(rows), log2(sequences), log2(mean_kv)])
        }
        OpKind::Forward { width, .. } => {
            one([width, 0, 0, 0, 0], [log2(rows), log2(sequences), 0.0])
        }
        OpKind::Attend { .. } if op.lanes.as_slice().iter().all(|l| l.rows == 1) => {
            one(head_key(0), [log2(sequences), log2(mean_kv), 0.0])
        }
        OpKind::Attend { .. }
        | OpKind::AttendPart { .. }
        | OpKind::AttendAhead { .. }
        | OpKind::AttendRows { .. }
        | OpKind::Tally { .. } => {
            let parts = op.lanes.as_slice().iter().map(|lane| {
                let prefix = kv(lane) - f64::from(lane.rows);
                let pairs = f64::from(lane.rows) * (kv(lane) - f64::from(lane.rows) / 2.0);
                // Prefixes shorter than a tile of keys are alike: 32 is added before the logarithm.
                let at = [log2(f64::from(lane.rows)), log2(prefix + 32.0), log2(sequences)];
                (at, pairs * f64::from(lane.sequences))
            });
            Features { key: head_key(0), parts: normalised(parts.collect()) }
        }
        OpKind::Rank { by, .. } => {
            let queries = match by {
                Score::WindowAttention { window, .. } => {
                    op.lanes.as_slice().iter().map(|l| l.rows.min(window)).max().unwrap_or(0)
                }
                Score::NewestAttention { pool } => pool,
                _ => 0,
            };
            // The queries that are a sample are all of the step's.
            let sampled = matches!(by, Score::ExpectedAttention { .. });
            let sampled = if sampled { log2(rows / sequences.max(1.0)) } else { 0.0 };
            one(head_key(queries), [log2(sequences), log2(mean_kv), sampled])
        }
        OpKind::ReadState { heads } => {
            one(head_key(networks(heads)), [log2(rows), log2(sequences), 0.0])
        }
        OpKind::Accumulate { heads, .. } => {
            let dropped = (cached / sequences.max(1.0) - kept).max(0.0);
            one(head_key(networks(heads)), [log2(sequences), log2(dropped), log2(mean_kv)])
        }
        OpKind::Evict { choice, .. } => {
            let kept: f64 = op
                .lanes
                .as_slice()
                .iter()
                .map(|l| f64::from(l.sequences) * f64::from(l.keep))
                .sum();
            // The share that is dropped decides how much moves; -log2 keeps small shares apart.
            let dropped = ((cached - kept) / cached.max(1.0)).clamp(1.0 / 1024.0, 1.0);
            // One that weighs what it drops reads keys, too.
            let weighs = matches!(choice, Choice::Within { .. });
            // And one that turns keys reckons.
            let turns = op.cache_heads().is_some_and(|h| h.form.rerotated);
            let extra = u32::from(weighs) + 2 * u32::from(turns);
            one(head_key(extra), [log2(cached), -dropped.log2(), 0.0])
        }
    }
}

fn normalised(mut parts: Vec<(Coordinates, f64)>) -> Vec<(Coordinates, f64)> {
    let sum: f64 = parts.iter().map(|(_, w)| w).sum();
    for (_, weight) in &mut parts {
        *weight = if sum > 0.0 { *weight / sum } else { 0.0 };
    }
    parts
}

impl FamilyFit {
    fn core(&self, flops: f64, bytes: f64) -> f64 {
        let compute = flops / self.flops_per_s;
        let memory = bytes / self.bytes_per_s;
        self.launch_s + (compute.powi(4) + memory.powi(4)).sqrt().sqrt()
    }

    /// Interpolated log-residual at `at` among the points of `key` (but `skip`), and where it comes from.
    fn residual(
        &self,
        residuals: &[f64],
        key: Key,
        at: &Coordinates,
        skip: usize,
    ) -> (f64, Source) {
        const NEAREST: usize = 4;
        let mut nearest = [(f64::INFINITY, 0.0f64); NEAREST];
        let (mut low, mut high) = ([f64::INFINITY; 3], [f64::NEG_INFINITY; 3]);
        for (i, (point, residual)) in self.points.iter().zip(residuals).enumerate() {
            if point.key != key || i == skip {
                continue;
            }
            let mut distance = 0.0;
            for axis in 0..3 {
                let d = point.at[axis] - at[axis];
                distance += d * d;
                low[axis] = low[axis].min(point.at[axis]);
                high[axis] = high[axis].max(point.at[axis]);
            }
            if distance < nearest[NEAREST - 1].0 {
                let mut slot = NEAREST - 1;
                while slot > 0 && nearest[slot - 1].0 > distance {
                    nearest[slot] = nearest[slot - 1];
                    slot -= 1;
                }
                nearest[slot] = (distance, *residual);
            }
        }
        if nearest[0].0.is_infinite() {
            return (0.0, Source::Roofline);
        }
        if nearest[0].0 < 1e-6 {
            return (nearest[0].1, Source::Measured);
        }
        let inside = (0..3).all(|a| at[a] >= low[a] - 0.05 && at[a] <= high[a] + 0.05);
        let (mut sum, mut weights) = (0.0, 0.0);
        for (distance, residual) in nearest {
            if distance.is_finite() {
                let weight = 1.0 / (distance * distance);
                sum += weight * residual;
                weights += weight;
            }
        }
        let source = if inside { Source::Interpolated } else { Source::Extrapolated };
        (sum / weights, source)
    }

    /// The key of the points that is nearest in the logarithm of its parts.
    fn nearest_key(&self, key: Key) -> Option<Key> {
        let distance = |other: &Key| -> f64 {
            key.iter()
                .zip(other)
                .map(|(a, b)| {
                    let d = f64::from(*a).max(0.5).log2() - f64::from(*b).max(0.5).log2();
                    d * d
                })
                .sum()
        };
        self.points.iter().map(|p| p.key).min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }
}

/// A device's fitted kernels, ready to predict.
#[derive(Clone, Debug)]
pub struct Calibrated {
    profile: KernelProfile,
    by_family: BTreeMap<Family, usize>,
    residuals: Vec<Vec<f64>>,
}

impl Calibrated {
    /// From a fitted profile.
    #[must_use]
    pub fn new(profile: KernelProfile) -> Self {
        let by_family = profile.families.iter().enumerate().map(|(i, f)| (f.family, i)).collect();
        let residuals = profile.families.iter().map(residuals_of).collect();
        Self { profile, by_family, residuals }
    }

    /// The profile it predicts with.
    #[must_use]
    pub fn profile(&self) -> &KernelProfile {
        &self.profile
    }
}

fn residuals_of(fit: &FamilyFit) -> Vec<f64> {
    fit.points.iter().map(|p| (p.seconds / fit.core(p.flops, p.bytes)).ln()).collect()
}

impl CostModel for Calibrated {
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost {
        let family = op.family(phase);
        let work = op.work(step);
        let Some(&index) = self.by_family.get(&family) else {
            return self.unmeasured(&work);
        };
        let fit = &self.profile.families[index];
        let features = features(op, step);
        let known = fit.points.iter().any(|p| p.key == features.key);
        let key = if known { Some(features.key) } else { fit.nearest_key(features.key) };
        let Some(key) = key else { return self.unmeasured(&work) };
        let (mut residual, mut source) = (0.0, Source::Measured);
        for (at, weight) in &features.parts {
            let (r, s) = fit.residual(&self.residuals[index], key, at, usize::MAX);
            residual += weight * r;
            source = source.max(s);
        }
        if !known {
            source = source.max(Source::Extrapolated);
        }
        let seconds = fit.core(work.flops.0, work.bytes().0 as f64) * residual.exp();
        let widen =
            if source >= Source::Extrapolated { 2.0 * fit.stddev + 0.10 } else { fit.stddev };
        Cost { seconds, relative_stddev: widen.max(0.02), source }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(self.profile.step_overhead_s)
    }

    /// They were timed in runs, beside everything else.
    fn transfers_run_beside(&self) -> bool {
        false
    }
}

impl Calibrated {
    /// A family nobody measured: at the middle of the rates of those that were and that move or compute anything.
    fn unmeasured(&self, work: &Work) -> Cost {
        let middle = |of: fn(&Point) -> f64, most: f64| {
            let rate = |f: &FamilyFit| {
                let rates = f.points.iter().map(|p| of(p) / p.seconds);
                Some(rates.fold(0.0, f64::max)).filter(|r| *r > 0.0)
            };
            let mut rates: Vec<f64> = self.profile.families.iter().filter_map(rate).collect();
            rates.sort_by(f64::total_cmp);
            rates.get(rates.len() / 2).map_or(most, |r| r.min(most))
        };
        let (bytes, flops) = (middle(|p| p.bytes, 1e12), middle(|p| p.flops, 1e15));
        let seconds = (work.bytes().0 as f64 / bytes).max(work.flops.0 / flops) + 1e-6;
        Cost { seconds, relative_stddev: 0.5, source: Source::Roofline }
    }
}

/// Fits the core of one family to its points, and scores it on each point left out.
#[must_use]
pub fn fit(family: Family, points: Vec<Point>) -> FamilyFit {
    let rate =
        |work: fn(&Point) -> f64| points.iter().map(|p| work(p) / p.seconds).fold(1.0, f64::max);
    let fastest = points.iter().map(|p| p.seconds).fold(f64::INFINITY, f64::min);
    let mut best = FamilyFit {
        family,
        launch_s: fastest * 0.5,
        flops_per_s: rate(|p| p.flops),
        bytes_per_s: rate(|p| p.bytes),
        left_out: FitError::default(),
        stddev: 0.0,
        points,
    };
    let loss = |fit: &FamilyFit| -> f64 {
        fit.points.iter().map(|p| (p.seconds / fit.core(p.flops, p.bytes)).ln().abs()).sum()
    };
    let mut least = loss(&best);
    // Pattern search in the logarithm of the three numbers: few, smooth, and far from each other.
    let mut stride = 1.6f64;
    while stride > 1.01 {
        let mut improved = false;
        for parameter in 0..3 {
            for factor in [stride, 1.0 / stride] {
                let mut trial = best.clone();
                match parameter {
                    0 => trial.launch_s *= factor,
                    1 => trial.flops_per_s *= factor,
                    _ => trial.bytes_per_s *= factor,
                }
                let value = loss(&trial);
                if value < least {
                    (best, least, improved) = (trial, value, true);
                }
            }
        }
        if !improved {
            stride = stride.sqrt();
        }
    }
    score(&mut best);
    best
}

/// Predicts each point from the others.
fn score(fit: &mut FamilyFit) {
    let residuals = residuals_of(fit);
    let mut errors: Vec<f64> = Vec::with_capacity(residuals.len());
    for (i, point) in fit.points.iter().enumerate() {
        let (residual, source) = fit.residual(&residuals, point.key, &point.at, i);
        // The corners of the measured range have no neighbours on one side; they would score extrapolation.
        if source <= Source::Interpolated {
            errors.push(residuals[i] - residual);
        }
    }
    let mut relative: Vec<f64> = errors.iter().map(|e| (e.exp() - 1.0).abs()).collect();
    relative.sort_by(f64::total_cmp);
    let quantile = |q: f64| {
        let last = relative.len().saturating_sub(1);
        relative.get((q * last as f64).round() as usize).copied().unwrap_or(0.0)
    };
    fit.left_out = FitError { points: relative.len(), median: quantile(0.5), p90: quantile(0.9) };
    // Robust: the 68th percentile of |error| is one standard deviation of a normal distribution.
    fit.stddev = quantile(0.68);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(rows: f64, seconds: f64) -> Point {
        Point {
            key: [1, 2, 3, 4, 5],
            at: [rows.log2(), 0.0, 0.0],
            flops: 1e6 * rows,
            bytes: 1e6,
            seconds,
            spread: 0.0,
        }
    }

    #[test]
    fn fit_recovers_a_known_core() {
        // launch 10 us, 1e9 FLOP/s, 1e9 bytes/s: 1 ms of bytes, 1 ms of FLOPs a row.
        let time = |rows: f64| 1e-5 + ((1e-3 * rows).powi(4) + 1e-3f64.powi(4)).powf(0.25);
        let points: Vec<_> = (0..8).map(|i| f64::from(1 << i)).map(|r| point(r, time(r))).collect();
        let fit = fit(Family::Gemm, points);
        assert!(fit.left_out.median < 0.01, "{:?}", fit.left_out);
        assert!((fit.flops_per_s / 1e9 - 1.0).abs() < 0.05, "{}", fit.flops_per_s);
    }

    #[test]
    fn what_nobody_measured_goes_at_the_rates_of_the_others() {
        // 1e8 bytes/s and 1e9 FLOP/s; freeing moves nothing and says nothing.
        let free = Point { flops: 0.0, bytes: 0.0, ..point(1.0, 1e-6) };
        let families = vec![
            fit(Family::Gemm, vec![point(1.0, 1e-2), point(10.0, 1e-2)]),
            fit(Family::Release, vec![free]),
        ];
        let profile = KernelProfile {
            device: "x".to_owned(),
            measured: Provenance::default(),
            step_overhead_s: 0.0,
            runtime_bytes: Bytes(0),
            families,
        };
        let model = Calibrated::new(profile);
        let work =
            Work { flops: crate::units::Flops(5e6), read: Bytes(2_000_000), written: Bytes(0) };
        let cost = model.unmeasured(&work);
        assert!((cost.seconds - 2e-2).abs() < 2e-6, "{}", cost.seconds);
        assert_eq!(cost.source, Source::Roofline);
    }

    #[test]
    fn a_measured_point_is_predicted_exactly() {
        let points = vec![point(1.0, 1.3e-3), point(2.0, 4.0e-3), point(4.0, 3.0e-3)];
        let fit = fit(Family::Gemm, points);
        let residuals = residuals_of(&fit);
        let (residual, source) =
            fit.residual(&residuals, [1, 2, 3, 4, 5], &[1.0, 0.0, 0.0], usize::MAX);
        assert_eq!(source, Source::Measured);
        assert!((fit.core(2e6, 1e6) * residual.exp() - 4.0e-3).abs() < 1e-12);
    }
}

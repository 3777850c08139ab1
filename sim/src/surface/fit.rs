//! Timings to surfaces, and the errors of what was left out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::curve::Prepared;
use super::kriging::Kriging;
use super::points::Sample;
use super::shape::{Core, Hardware, Kernel, NumberType, Shape};
use super::{AXES, KEYS, MISSING, Origin, STEP, Surface, SurfaceId};

/// Points a core is fitted to; more add time, not accuracy.
const CORE_POINTS: usize = 3000;
/// Surfaces with fewer keys are scored by leaving axis points out.
const KEYS_TO_LEAVE_OUT: usize = 8;
/// Decades of time that have an interval of their own: under 10 us, 100 us, 1 ms, and above.
const BINS: usize = 4;
/// Timings of the same shape in two harnesses differ by this much at the median: no interval is narrower.
const NOISE: f64 = 0.02;
/// Half width of a 90 % interval in standard deviations.
const SIGMAS_90: f64 = 1.645;

/// Errors on what the prediction did not see, as fractions of the measured time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitErrors {
    /// Points scored.
    pub points: usize,
    /// Median of |predicted / measured - 1|.
    pub median: f64,
    /// 95th percentile of the same.
    pub p95: f64,
    /// Median of predicted / measured - 1.
    pub bias: f64,
    /// Standard deviation of the core's own log error.
    pub core_stddev: f64,
    /// Share of the residuals' variance that neighbours usually explain.
    pub explained: f64,
    /// 90th percentile of the log error, by decade of time: under 10 us, 100 us, 1 ms, above.
    pub log_p90: [f64; BINS],
}

fn bin(seconds: f64) -> usize {
    match seconds {
        s if s < 10e-6 => 0,
        s if s < 100e-6 => 1,
        s if s < 1e-3 => 2,
        _ => 3,
    }
}

impl FitErrors {
    /// Standard deviation of the log error of a launch of about `seconds`.
    #[must_use]
    pub fn log_stddev(&self, seconds: f64) -> f64 {
        self.log_p90[bin(seconds)].max(NOISE) / SIGMAS_90
    }
}

/// The `q`-quantile of unsorted values; 0 of none.
pub(super) fn quantile(values: &mut [f64], q: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

/// Fits a surface to timings that all belong to `id`; `None` where the type is unknown or nothing was measured.
#[must_use]
pub fn fit(
    id: &SurfaceId,
    samples: &[Sample],
    hardware: &Hardware,
    number: NumberType,
    origin: Origin,
) -> Option<Surface> {
    let kernel = id.kernel;
    let mut cells: BTreeMap<([u32; KEYS], [u64; AXES]), Vec<f64>> = BTreeMap::new();
    for sample in samples {
        cells.entry((sample.key, sample.at)).or_default().push(sample.seconds);
    }
    if cells.is_empty() {
        return None;
    }
    // The same shape in several versions or runs: the median.
    let points: Vec<([u32; KEYS], [u64; AXES], f64)> = cells
        .into_iter()
        .map(|((key, at), mut times)| (key, at, quantile(&mut times, 0.5)))
        .collect();
    let mut keys: Vec<[u32; KEYS]> = points.iter().map(|p| p.0).collect();
    keys.dedup();
    let axes: Vec<Vec<u64>> = (0..kernel.axis_names().len())
        .map(|a| {
            let mut values: Vec<u64> = points.iter().map(|p| p.1[a]).collect();
            values.sort_unstable();
            values.dedup();
            values
        })
        .collect();
    let core = fit_core(kernel, &points, hardware, number);
    let cells: usize = axes.iter().map(Vec::len).product();
    let mut residuals = vec![MISSING; keys.len() * cells];
    for (key, at, seconds) in &points {
        let (Ok(k), Some(cell)) = (keys.binary_search(key), cell_of(&axes, at)) else { continue };
        let shape = Shape { kernel, key: key.map(f64::from), at: at.map(|v| v as f64) };
        let log = (seconds / shape.seconds(&core, hardware, number)).ln() / STEP;
        residuals[k * cells + cell] = log.round().clamp(-30000.0, 30000.0) as i16;
    }
    let mut surface = Surface {
        id: id.clone(),
        origin,
        core,
        kriging: Kriging::default(),
        keys,
        axes,
        residuals,
        errors: FitErrors::default(),
    };
    surface.errors = score_left_out(&surface, hardware, number);
    if surface.keys.len() >= KEYS_TO_LEAVE_OUT {
        for kriging in Kriging::CHOICES {
            let trial = Surface { kriging, ..surface.clone() };
            let errors = score_left_out(&trial, hardware, number);
            // The tail counts a little: two choices that are alike at the median differ there.
            let loss = |e: &FitErrors| e.median + 0.1 * e.p95;
            if loss(&errors) < loss(&surface.errors) {
                surface = Surface { errors, ..trial };
            }
        }
    }
    Some(surface)
}

fn cell_of(axes: &[Vec<u64>], at: &[u64; AXES]) -> Option<usize> {
    let mut index = 0;
    for (a, axis) in axes.iter().enumerate() {
        index = index * axis.len() + axis.binary_search(&at[a]).ok()?;
    }
    Some(index)
}

/// The five numbers that make the soft-L1 of the log error least.
fn fit_core(
    kernel: Kernel,
    points: &[([u32; KEYS], [u64; AXES], f64)],
    hardware: &Hardware,
    number: NumberType,
) -> Core {
    let stride = points.len().div_ceil(CORE_POINTS);
    // A stride that shares no factor with the grids walks through all of their columns.
    let stride = if stride > 1 { stride | 1 } else { 1 };
    let shapes: Vec<(Shape, f64)> = points
        .iter()
        .step_by(stride)
        .map(|(key, at, seconds)| {
            (Shape { kernel, key: key.map(f64::from), at: at.map(|v| v as f64) }, seconds.ln())
        })
        .collect();
    let fastest = points.iter().map(|p| p.2).fold(f64::INFINITY, f64::min) * 1e6;
    let core_of = |p: &[f64; 5]| Core {
        launch_us: p[0].exp(),
        compute: p[1].exp(),
        bandwidth: p[2].exp(),
        cache: p[3].exp(),
        sharpness: 1.0 + p[4].exp(),
    };
    let loss = |p: &[f64; 5]| -> f64 {
        let core = core_of(p);
        let sum: f64 = shapes
            .iter()
            .map(|(shape, log)| {
                let e = (shape.seconds(&core, hardware, number).ln() - log) / 0.1;
                (1.0 + e * e).sqrt()
            })
            .sum();
        // A weak pull to the plausible keeps numbers that nothing measured (say, the compute of a copy) from running off.
        sum / shapes.len() as f64
            + 1e-4 * p.iter().zip(START).map(|(a, b)| (a - b) * (a - b)).sum::<f64>()
    };
    const START: [f64; 5] = [1.0, -0.4, -0.3, 0.6, 0.5];
    let start = [(fastest * 0.8).max(0.05).ln(), START[1], START[2], START[3], START[4]];
    core_of(&minimise(start, 0.5, loss))
}

/// Nelder-Mead over `N` numbers from `start` with a first simplex of size `reach`.
fn minimise<const N: usize>(
    start: [f64; N],
    reach: f64,
    loss: impl Fn(&[f64; N]) -> f64,
) -> [f64; N] {
    let mut simplex: Vec<([f64; N], f64)> = vec![(start, loss(&start))];
    for i in 0..N {
        let mut corner = start;
        corner[i] += reach;
        simplex.push((corner, loss(&corner)));
    }
    for _ in 0..120 * N {
        simplex.sort_by(|a, b| a.1.total_cmp(&b.1));
        if simplex[N].1 - simplex[0].1 < 1e-7 * simplex[0].1.abs().max(1e-9) {
            break;
        }
        let mut centre = [0.0; N];
        for (corner, _) in &simplex[..N] {
            for i in 0..N {
                centre[i] += corner[i] / N as f64;
            }
        }
        let worst = simplex[N];
        let along = |t: f64| -> ([f64; N], f64) {
            let point = std::array::from_fn(|i| centre[i] + t * (worst.0[i] - centre[i]));
            (point, loss(&point))
        };
        let reflected = along(-1.0);
        simplex[N] = if reflected.1 < simplex[0].1 {
            let expanded = along(-2.0);
            if expanded.1 < reflected.1 { expanded } else { reflected }
        } else if reflected.1 < simplex[N - 1].1 {
            reflected
        } else {
            let contracted = along(if reflected.1 < worst.1 { -0.5 } else { 0.5 });
            if contracted.1 < worst.1.min(reflected.1) {
                contracted
            } else {
                let best = simplex[0].0;
                for (corner, value) in &mut simplex[1..] {
                    *corner = std::array::from_fn(|i| best[i] + 0.5 * (corner[i] - best[i]));
                    *value = loss(corner);
                }
                continue;
            }
        };
    }
    simplex.sort_by(|a, b| a.1.total_cmp(&b.1));
    simplex[0].0
}

/// Predicts every key from the others (or, with few keys, every second point of the longest axis from its neighbours).
#[must_use]
pub fn score_left_out(surface: &Surface, hardware: &Hardware, number: NumberType) -> FitErrors {
    let kernel = surface.id.kernel;
    let cells = surface.cells();
    let mut logs: Vec<(f64, f64)> = Vec::new();
    let mut explained = Vec::new();
    let measured = |k: usize, cell: usize| -> Option<f64> {
        let r = surface.residuals[k * cells + cell];
        (r != MISSING).then(|| f64::from(r) * STEP)
    };
    let seconds = |k: usize, at: [f64; AXES], residual: f64| {
        let shape = Shape { kernel, key: surface.keys[k].map(f64::from), at };
        shape.seconds(&surface.core, hardware, number) * residual.exp()
    };
    if surface.keys.len() >= KEYS_TO_LEAVE_OUT {
        let prepared = Prepared::new(surface);
        for (k, key) in surface.keys.iter().enumerate() {
            let curve = prepared.curve(kernel, &key.map(f64::from), Some(k));
            explained.push(curve.explained);
            for cell in 0..cells {
                let Some(residual) = measured(k, cell) else { continue };
                let at = place(&surface.axes, cell);
                let (guess, ..) = prepared.at(kernel, &curve, &at);
                logs.push((guess - residual, seconds(k, at, residual)));
            }
        }
    } else {
        let axis = (0..surface.axes.len()).max_by_key(|a| surface.axes[*a].len()).unwrap_or(0);
        let stride: usize = surface.axes[axis + 1..].iter().map(Vec::len).product();
        let mut thinned = surface.clone();
        for k in 0..surface.keys.len() {
            for cell in 0..cells {
                if cell / stride % surface.axes[axis].len() % 2 == 1 {
                    thinned.residuals[k * cells + cell] = MISSING;
                }
            }
        }
        let prepared = Prepared::new(&thinned);
        for (k, key) in surface.keys.iter().enumerate() {
            let curve = prepared.curve(kernel, &key.map(f64::from), None);
            for cell in 0..cells {
                if thinned.residuals[k * cells + cell] != MISSING {
                    continue;
                }
                let Some(residual) = measured(k, cell) else { continue };
                let at = place(&surface.axes, cell);
                let (guess, ..) = prepared.at(kernel, &curve, &at);
                logs.push((guess - residual, seconds(k, at, residual)));
            }
        }
        explained.push(1.0);
    }
    let all: Vec<f64> = (0..surface.residuals.len())
        .filter(|i| surface.residuals[*i] != MISSING)
        .map(|i| f64::from(surface.residuals[i]) * STEP)
        .collect();
    let core_stddev = (all.iter().map(|r| r * r).sum::<f64>() / all.len().max(1) as f64).sqrt();
    errors_of(&logs, core_stddev, quantile(&mut explained, 0.5))
}

pub(super) fn errors_of(logs: &[(f64, f64)], core_stddev: f64, explained: f64) -> FitErrors {
    let mut relative: Vec<f64> = logs.iter().map(|(e, _)| e.exp_m1().abs()).collect();
    let mut signed: Vec<f64> = logs.iter().map(|(e, _)| e.exp_m1()).collect();
    let mut absolute: Vec<f64> = logs.iter().map(|(e, _)| e.abs()).collect();
    let overall = if logs.is_empty() { 2.0 * core_stddev } else { quantile(&mut absolute, 0.9) };
    let log_p90 = std::array::from_fn(|b| {
        let mut here: Vec<f64> =
            logs.iter().filter(|(_, s)| bin(*s) == b).map(|(e, _)| e.abs()).collect();
        // Few points say nothing about a tail.
        if here.len() < 40 { overall } else { quantile(&mut here, 0.9) }
    });
    FitErrors {
        points: logs.len(),
        median: quantile(&mut relative, 0.5),
        p95: quantile(&mut relative, 0.95),
        bias: quantile(&mut signed, 0.5),
        core_stddev,
        explained,
        log_p90,
    }
}

/// The sizes of a cell.
pub(super) fn place(axes: &[Vec<u64>], mut cell: usize) -> [f64; AXES] {
    let mut at = [0.0; AXES];
    for (a, axis) in axes.iter().enumerate().rev() {
        at[a] = axis[cell % axis.len()] as f64;
        cell /= axis.len();
    }
    at
}

//! A new device from a handful of timings: what is known of other devices, bent to what was measured on this one.

use super::check::Report;
use super::fit::quantile;
use super::fit::{errors_of, place};
use super::library::{Library, Model};
use super::points::Sample;
use super::shape::{Hardware, NumberType, Shape};
use super::{Kernel, Origin, STEP, Surface, SurfaceId, check_model, solve_spd};

/// What a correction looks at: a constant, and how compute-bound, how large and how tall the launch is.
const FEATURES: usize = 4;
/// Points that "as other devices say" counts as, per feature.
const PRIOR_POINTS: f64 = 2.0;

/// A model of other devices times a correction that a few timings gave.
#[derive(Clone, Debug)]
pub struct Adapted {
    model: Model,
    weights: [f64; FEATURES],
    /// Standard deviation of the logarithm of what is left.
    stddev: f64,
}

impl Adapted {
    /// Bends what `library` says of `id` to `samples` of it. `None` where the library says nothing at all.
    #[must_use]
    pub fn new(library: &Library, id: &SurfaceId, samples: &[&Sample]) -> Option<Self> {
        let model = library.model(id)?;
        let rows: Vec<([f64; FEATURES], f64)> = samples
            .iter()
            .map(|s| {
                let shape = shape_of(s);
                let log = (s.seconds / model.estimate(&shape).seconds).ln();
                (features(&model, &shape), log)
            })
            .collect();
        let mut matrix = vec![0.0; FEATURES * FEATURES];
        let mut right = vec![0.0; FEATURES];
        for (x, y) in &rows {
            // Outliers (a kernel chosen badly for one shape) count with their sign only.
            let weight = 1.0 / (1.0 + (y / 0.3).powi(2)).sqrt();
            for i in 0..FEATURES {
                for j in 0..FEATURES {
                    matrix[i * FEATURES + j] += weight * x[i] * x[j];
                }
                right[i] += weight * x[i] * y;
            }
        }
        for i in 0..FEATURES {
            matrix[i * FEATURES + i] += PRIOR_POINTS;
        }
        solve_spd(&mut matrix, &mut right);
        let weights: [f64; FEATURES] = std::array::from_fn(|i| right[i]);
        let correction =
            |x: &[f64; FEATURES]| x.iter().zip(&weights).map(|(a, b)| a * b).sum::<f64>();
        let mut left: Vec<f64> = rows.iter().map(|(x, y)| (y - correction(x)).abs()).collect();
        let stddev = (quantile(&mut left, 0.9) / 1.645).max(0.05);
        Some(Self { model, weights, stddev })
    }

    /// Seconds and the deviation of their logarithm.
    #[must_use]
    pub fn seconds(&self, shape: &Shape) -> (f64, f64) {
        let x = features(&self.model, shape);
        let correction: f64 = x.iter().zip(&self.weights).map(|(a, b)| a * b).sum();
        (self.model.estimate(shape).seconds * correction.exp(), self.stddev)
    }
}

/// Fewer timings than this bend what is known; more are fitted on their own.
pub const FEW: usize = 200;

/// The surface of a kernel of which a few timings exist: the grid of the nearest device's surface, filled with what the
/// adapted model says. Its errors are those of one half of the timings predicted from the other.
#[must_use]
pub fn adapt(
    library: &Library,
    id: &SurfaceId,
    samples: &[&Sample],
    hardware: &Hardware,
    number: NumberType,
    origin: Origin,
) -> Option<Surface> {
    let adapted = Adapted::new(library, id, samples)?;
    let donor = adapted.model.nearest()?;
    let mut residuals = Vec::with_capacity(donor.residuals.len());
    for key in &donor.keys {
        for cell in 0..donor.cells() {
            let at = place(&donor.axes, cell);
            let shape = Shape { kernel: id.kernel, key: key.map(f64::from), at };
            let (seconds, _) = adapted.seconds(&shape);
            let log = (seconds / shape.seconds(&donor.core, hardware, number)).ln() / STEP;
            residuals.push(log.round().clamp(-30_000.0, 30_000.0) as i16);
        }
    }
    let (even, odd): (Vec<_>, Vec<_>) = samples.iter().enumerate().partition(|(i, _)| i % 2 == 0);
    let half: Vec<&Sample> = even.into_iter().map(|(_, s)| *s).collect();
    let tested = Adapted::new(library, id, &half)?;
    let logs: Vec<(f64, f64)> = odd
        .into_iter()
        .map(|(_, s)| ((tested.seconds(&shape_of(s)).0 / s.seconds).ln(), s.seconds))
        .collect();
    let all = residuals.iter().map(|r| (f64::from(*r) * STEP).powi(2)).sum::<f64>();
    let core_stddev = (all / residuals.len().max(1) as f64).sqrt();
    let mut errors = errors_of(&logs, core_stddev, donor.errors.explained);
    // Few timings say little about the tail: no interval is narrower than what the adapted model missed by.
    errors.log_p90 = errors.log_p90.map(|p| p.max(1.645 * adapted.stddev));
    Some(Surface { id: id.clone(), origin, residuals, errors, ..donor.clone() })
}

fn shape_of(sample: &Sample) -> Shape {
    Shape {
        kernel: sample.id.kernel,
        key: sample.key.map(f64::from),
        at: sample.at.map(|v| v as f64),
    }
}

/// All of order one: centred decades and octaves.
fn features(model: &Model, shape: &Shape) -> [f64; FEATURES] {
    let (compute, memory) = model.bounds(shape);
    let bound = (compute / memory.max(1e-12)).max(1e-6).ln().tanh();
    let size = (model.estimate(shape).seconds * 1e6).max(0.1).log10() - 1.5;
    let tall = match shape.kernel {
        Kernel::Gemm => (shape.key[0] / shape.key[1].max(1.0)).max(1e-3).log2() / 4.0,
        _ => shape.at[0].max(1.0).log2() / 8.0,
    };
    [1.0, bound, size, tall]
}

/// The error on the rest of a device's timings after `points` of them, chosen evenly, were seen; the device's own
/// surfaces must not be in `library`.
#[must_use]
pub fn few_shot(library: &Library, samples: &[Sample], points: usize) -> Report {
    check_model(samples, |id, own| {
        let stride = (own.len() / points.max(1)).max(1) | 1;
        let seen: Vec<&Sample> = own.iter().copied().step_by(stride).take(points).collect();
        let adapted = Adapted::new(library, id, &seen)?;
        Some(Box::new(move |shape: &Shape| adapted.seconds(shape)))
    })
}

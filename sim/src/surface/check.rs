//! How far surfaces are from timings: on any points, or on parts that a fit did not see.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

use super::few_shot::{FEW, adapt, few_shot};
use super::fit::{fit, quantile};
use super::library::{Library, Model};
use super::points::Sample;
use super::shape::{Hardware, NumberType, Shape};
use super::{Kernel, Origin, Surface, SurfaceId};
use crate::profile::Catalog;
use crate::timeline::SIGMAS_90;

/// Shorter launches weigh nothing in a step.
const WEIGHED_FROM: f64 = 50e-6;
/// One in so many keys is held out.
const FOLDS: u64 = 5;
/// Share of each surface's points, by work, that counts as its largest.
const LARGEST: f64 = 0.1;

/// Errors of a set of points, as fractions of the measured time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// Points.
    pub n: usize,
    /// Median of |predicted / measured - 1|.
    pub median: f64,
    /// 90th percentile of the same.
    pub p90: f64,
    /// 95th percentile of the same.
    pub p95: f64,
    /// Median of predicted / measured - 1.
    pub bias: f64,
    /// Sum of |predicted - measured| over sum of measured, of points above 50 us.
    pub time_weighted: f64,
    /// Share of points inside their 90 % interval.
    pub coverage: f64,
}

/// What a group has in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Group {
    /// Kernel.
    pub op: Kernel,
    /// Device.
    pub gpu: String,
    /// Framework.
    pub framework: String,
    /// Type.
    pub dtype: String,
}

/// Errors in total and by group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// All points.
    pub total: Score,
    /// By op, device, framework and type.
    pub groups: Vec<(Group, Score)>,
    /// Points that no surface says anything about.
    pub unanswered: usize,
}

/// One prediction beside its measurement, seconds, and the half width of its 90 % interval in logarithms.
#[derive(Clone, Copy, Debug)]
struct Pair {
    predicted: f64,
    measured: f64,
    half_width: f64,
}

fn score(pairs: &[Pair]) -> Score {
    let error = |p: &Pair| p.predicted / p.measured - 1.0;
    let mut absolute: Vec<f64> = pairs.iter().map(|p| error(p).abs()).collect();
    let mut signed: Vec<f64> = pairs.iter().map(error).collect();
    let long = || pairs.iter().filter(|p| p.measured >= WEIGHED_FROM);
    let time: f64 = long().map(|p| p.measured).sum();
    let off: f64 = long().map(|p| (p.predicted - p.measured).abs()).sum();
    let inside =
        pairs.iter().filter(|p| (p.predicted / p.measured).ln().abs() <= p.half_width).count();
    Score {
        n: pairs.len(),
        median: quantile(&mut absolute, 0.5),
        p90: quantile(&mut absolute, 0.9),
        p95: quantile(&mut absolute, 0.95),
        bias: quantile(&mut signed, 0.5),
        time_weighted: if time > 0.0 { off / time } else { 0.0 },
        coverage: inside as f64 / pairs.len().max(1) as f64,
    }
}

/// Predicts every sample with the surface of its own device, framework and type, or what comes nearest.
#[must_use]
pub fn check(library: &Library, samples: &[Sample]) -> Report {
    check_model(samples, |id, _| {
        let model: Model = library.model(id)?;
        Some(Box::new(move |shape: &Shape| {
            let estimate = model.estimate(shape);
            (estimate.seconds, estimate.log_stddev)
        }))
    })
}

/// Seconds of a launch and the deviation of their logarithm.
pub(crate) type Predict = Box<dyn Fn(&Shape) -> (f64, f64)>;

/// Scores whatever `model_of` makes of a kernel and its samples.
pub(crate) fn check_model(
    samples: &[Sample],
    model_of: impl Fn(&SurfaceId, &[&Sample]) -> Option<Predict>,
) -> Report {
    let mut by_id: BTreeMap<&SurfaceId, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_id.entry(&sample.id).or_default().push(sample);
    }
    let mut groups: BTreeMap<Group, Vec<Pair>> = BTreeMap::new();
    let mut unanswered = 0;
    for (id, own) in by_id {
        let Some(predict) = model_of(id, &own) else {
            unanswered += own.len();
            continue;
        };
        let group = Group {
            op: id.kernel,
            gpu: id.gpu.clone(),
            framework: id.framework.clone(),
            dtype: id.dtype.clone(),
        };
        let pairs = groups.entry(group).or_default();
        for sample in own {
            let shape = Shape {
                kernel: id.kernel,
                key: sample.key.map(f64::from),
                at: sample.at.map(|v| v as f64),
            };
            let (predicted, log_stddev) = predict(&shape);
            pairs.push(Pair {
                predicted,
                measured: sample.seconds,
                half_width: SIGMAS_90 * log_stddev,
            });
        }
    }
    let all: Vec<Pair> = groups.values().flatten().copied().collect();
    Report {
        total: score(&all),
        groups: groups.into_iter().map(|(g, pairs)| (g, score(&pairs))).collect(),
        unanswered,
    }
}

/// Fits every surface that `samples` hold. `origin_of` says where a sample's surface comes from. Kernels with few
/// timings bend what `known` says of them, where it says something; without it every kernel is fitted on its own.
#[must_use]
pub fn fit_all(
    catalog: &Catalog,
    known: Option<&Library>,
    samples: &[Sample],
    origin_of: impl Fn(&Sample) -> Origin,
) -> Vec<Surface> {
    let mut by_id: BTreeMap<&SurfaceId, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_id.entry(&sample.id).or_default().push(sample);
    }
    by_id
        .into_iter()
        .filter_map(|(id, samples)| {
            let gpu = catalog.gpu(&id.gpu).ok()?;
            let number = NumberType::parse(&id.dtype)?;
            let origin = origin_of(samples.first()?);
            let hardware = Hardware::of(&gpu, number);
            if samples.len() < FEW
                && let Some(library) = known
                && let Some(adapted) =
                    adapt(library, id, &samples, &hardware, number, origin.clone())
            {
                return Some(adapted);
            }
            let own: Vec<Sample> = samples.into_iter().cloned().collect();
            fit(id, &own, &hardware, number, origin)
        })
        .collect()
}

/// What a fit is kept from seeing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldOut {
    /// A fifth of the keys: shapes and head configurations nobody timed.
    Keys,
    /// The largest tenth of each surface.
    Largest,
    /// Each device in turn, known by its data sheet and so many timings of each kernel.
    Devices(usize),
}

impl std::str::FromStr for HoldOut {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keys" => Ok(Self::Keys),
            "largest" => Ok(Self::Largest),
            "devices" => Ok(Self::Devices(0)),
            other => match other.strip_prefix("devices:").map(str::parse) {
                Some(Ok(points @ 1..=100_000)) => Ok(Self::Devices(points)),
                _ => {
                    Err(format!("\"{other}\" is not one of keys, largest, devices, devices:POINTS"))
                }
            },
        }
    }
}

/// Fits on a part and checks on the rest; nothing that ships is used.
#[must_use]
pub fn check_held_out(catalog: &Catalog, samples: &[Sample], what: HoldOut) -> Report {
    match what {
        HoldOut::Keys => {
            let fold = |s: &Sample| {
                let mut hasher = DefaultHasher::new();
                s.key.hash(&mut hasher);
                // A collective's key is a number of devices: there it is sizes that are held out.
                if s.id.kernel.is_collective() {
                    s.at.hash(&mut hasher);
                }
                hasher.finish().is_multiple_of(FOLDS)
            };
            split_and_check(catalog, samples, fold)
        }
        HoldOut::Largest => {
            let mut by_id: BTreeMap<&SurfaceId, Vec<f64>> = BTreeMap::new();
            for sample in samples {
                by_id.entry(&sample.id).or_default().push(size(sample));
            }
            let limits: BTreeMap<&SurfaceId, f64> = by_id
                .into_iter()
                .map(|(id, mut sizes)| (id, quantile(&mut sizes, 1.0 - LARGEST)))
                .collect();
            split_and_check(catalog, samples, |s| size(s) > limits[&s.id])
        }
        HoldOut::Devices(points) => {
            let all = fit_all(catalog, None, samples, |_| Origin::default());
            let mut gpus: Vec<&str> = samples.iter().map(|s| s.id.gpu.as_str()).collect();
            gpus.sort_unstable();
            gpus.dedup();
            let mut whole: Option<Report> = None;
            for gpu in gpus {
                let others = all.iter().filter(|s| s.id.gpu != gpu).cloned().collect();
                let library = Library::only(catalog.clone(), others);
                let own: Vec<Sample> =
                    samples.iter().filter(|s| s.id.gpu == gpu).cloned().collect();
                let report = if points == 0 {
                    check(&library, &own)
                } else {
                    few_shot(&library, &own, points)
                };
                whole = Some(match whole {
                    None => report,
                    Some(before) => merge(before, report),
                });
            }
            whole.unwrap_or_else(|| check(&Library::only(catalog.clone(), Vec::new()), &[]))
        }
    }
}

/// Groups side by side; the total is their mean, every device with the same weight.
fn merge(mut a: Report, b: Report) -> Report {
    let weigh = |x: f64, y: f64| {
        let n = (a.total.n + b.total.n).max(1) as f64;
        (x * a.total.n as f64 + y * b.total.n as f64) / n
    };
    a.total = Score {
        n: a.total.n + b.total.n,
        median: weigh(a.total.median, b.total.median),
        p90: weigh(a.total.p90, b.total.p90),
        p95: weigh(a.total.p95, b.total.p95),
        bias: weigh(a.total.bias, b.total.bias),
        time_weighted: weigh(a.total.time_weighted, b.total.time_weighted),
        coverage: weigh(a.total.coverage, b.total.coverage),
    };
    a.groups.extend(b.groups);
    a.unanswered += b.unanswered;
    a
}

fn split_and_check(
    catalog: &Catalog,
    samples: &[Sample],
    held_out: impl Fn(&Sample) -> bool,
) -> Report {
    let (test, train): (Vec<Sample>, Vec<Sample>) =
        samples.iter().cloned().partition(|s| held_out(s));
    let library =
        Library::only(catalog.clone(), fit_all(catalog, None, &train, |_| Origin::default()));
    check(&library, &test)
}

fn size(sample: &Sample) -> f64 {
    let shape = Shape {
        kernel: sample.id.kernel,
        key: sample.key.map(f64::from),
        at: sample.at.map(|v| v as f64),
    };
    let Some(number) = NumberType::parse(&sample.id.dtype) else { return 0.0 };
    let (flops, bytes) = shape.work(number);
    flops + bytes
}

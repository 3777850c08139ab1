//! An engine's speed from published runs: a few numbers per generation, fitted to the parts of each run's time.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::{DeviceFactors, EngineFit, Generation};
use crate::runs::{Metric, Question};
use crate::serve::{Arrival, Parts, Run};
use crate::surface::{is_nvidia, solve_spd};

/// One measurement beside what its time is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Its name in the file.
    pub id: String,
    /// Device.
    pub gpu: String,
    /// Whether kernels of the device's vendor were timed.
    pub timed_vendor: bool,
    /// Whether its devices sum, if at all, over links of their own: sums over the host's are a property of the node.
    pub linked: bool,
    /// Engine.
    pub engine: String,
    /// First year of the engine's generation.
    pub since: u32,
    /// Weight of the row in a fit: rows of a cluster share one.
    pub cluster: (String, String),
    /// What was measured.
    pub metric: Metric,
    /// Its value.
    pub measured: f64,
    /// What its time is made of.
    pub parts: Parts,
    /// How requests came.
    pub arrival: Arrival,
    /// Sequences that ran together.
    pub together: f64,
    /// Prompt tokens.
    pub isl: f64,
    /// Generated tokens.
    pub osl: f64,
    /// Copies of the deployment.
    pub replicas: f64,
    /// A property of the generation that is known, not fitted.
    pub first_token_decodes: bool,
}

impl Observed {
    /// From a question and a run of it under any generation.
    #[must_use]
    pub fn new(id: &str, q: &Question, run: &Run) -> Self {
        Self {
            id: id.to_owned(),
            gpu: q.gpu.name.clone(),
            timed_vendor: is_nvidia(&q.gpu),
            linked: q.gpu.link.is_some() || q.setup.tp == 1,
            engine: q.engine.name.clone(),
            since: q.engine.generation(q.year).since,
            cluster: (q.gpu.name.clone(), q.engine.name.clone()),
            metric: q.metric,
            measured: q.measured,
            parts: run.parts,
            arrival: q.arrival,
            together: run.batch,
            isl: f64::from(q.isl),
            osl: f64::from(q.osl),
            replicas: q.replicas,
            first_token_decodes: q.engine.generation(q.year).first_token_decodes,
        }
    }

    /// The metric under a generation.
    #[must_use]
    pub fn predicted(&self, g: &Generation) -> f64 {
        let device = g.device(&self.gpu);
        let (prefill, decode) = (self.parts.prefill(g, &device), self.parts.decode(g, &device));
        let (isl, osl, r) = (self.isl, self.osl, self.replicas);
        match self.arrival {
            Arrival::Static { batch } => {
                let all = f64::from(batch);
                let waves = (all / self.together.max(1.0)).ceil();
                let total = waves * (prefill + decode);
                match self.metric {
                    Metric::OutputTokS => r * all * osl / total,
                    Metric::TotalTokS => r * all * (isl + osl) / total,
                    Metric::DecodeTokS => r * self.together * (osl - 1.0).max(1.0) / decode,
                    Metric::PrefillTokS => r * self.together * isl / prefill,
                    Metric::TtftMs => prefill * 1e3,
                    Metric::TpotMs => decode / (osl - 1.0).max(1.0) * 1e3,
                    _ => total,
                }
            }
            Arrival::Closed { .. } => {
                let tpot = g.interference * prefill + decode;
                match self.metric {
                    Metric::OutputTokS => r * self.together / tpot,
                    Metric::TotalTokS => r * self.together / tpot * (isl + osl) / osl,
                    Metric::DecodeTokS => r * self.together / decode,
                    Metric::E2eS => tpot * osl,
                    _ => tpot * 1e3,
                }
            }
        }
    }

    /// ln(predicted / measured).
    #[must_use]
    pub fn log_error(&self, g: &Generation) -> f64 {
        (self.predicted(g) / self.measured).ln()
    }

    /// Whether a fit may use it: time to first token in a closed loop contains a queue.
    #[must_use]
    pub fn is_fit_for_fitting(&self) -> bool {
        self.metric.is_speed()
            && !(matches!(self.arrival, Arrival::Closed { .. }) && self.metric == Metric::TtftMs)
    }
}

/// Logarithms of an engine's ten numbers (the last as it is), in the order of `generation_of`.
pub type Numbers = [f64; 10];

/// What a fit of all engines together is drawn to: kernels as timed but small ones half fused, a millisecond a step.
const PRIOR: Numbers = [0.05, 0.0, 0.0, -0.7, 0.0, -6.9, -11.5, -12.2, -0.1, 0.0];
/// How far engines differ from each other, as standard deviations of the same.
const SPREAD: Numbers = [0.25, 0.10, 0.15, 0.5, 0.3, 1.0, 1.0, 1.0, 0.3, 0.2];
/// Errors that the prior's deviations are worth: a number one deviation off costs as much as all rows off by this.
const PRIOR_ERROR: f64 = 0.015;
/// Log error at which a row starts to count linearly: a few rows must not bend a fit.
const KNEE: f64 = 0.05;
/// Runs that halve what an engine's own runs say against the prior.
const FEW_ROWS: f64 = 30.0;
/// Runs on a device that "as its kernels say" counts as.
const DEVICE_PRIOR_ROWS: f64 = 4.0;
/// Steps of the fit; it settles in ten.
const STEPS: usize = 40;

fn generation_of(since: u32, p: &Numbers, first_token_decodes: bool) -> Generation {
    Generation {
        since,
        prefill: p[0].exp(),
        decode: p[1].exp(),
        attention: p[2].exp(),
        small: p[3].exp(),
        sums: p[4].exp(),
        step_s: p[5].exp(),
        sequence_s: p[6].exp(),
        layer_s: p[7].exp(),
        interference: p[8].exp(),
        grouping: p[9].clamp(0.0, 1.0),
        first_token_decodes,
        devices: BTreeMap::new(),
        log_stddev: 0.1,
        fit: EngineFit::default(),
    }
}

/// What all rows know of their generation without a fit.
fn known(rows: &[&Observed]) -> bool {
    !rows.is_empty() && rows.iter().all(|r| r.first_token_decodes)
}

/// The numbers that explain `rows` best, drawn to `prior`; a cluster weighs as the root of its number of rows: one that
/// was measured often says more, but not in proportion.
fn fit_numbers(rows: &[&Observed], prior: &Numbers) -> Numbers {
    // On devices of a vendor whose kernels nobody timed the factors would make up for the kernels: such devices get
    // factors of their own and say nothing about the engine. Nor do sums over a node's host links.
    let rows: Vec<&Observed> =
        rows.iter().copied().filter(|r| r.timed_vendor && r.linked).collect();
    let rows = rows.as_slice();
    let mut sizes: BTreeMap<&(String, String), f64> = BTreeMap::new();
    for row in rows {
        *sizes.entry(&row.cluster).or_default() += 1.0;
    }
    let total = rows.len().max(1) as f64;
    let weights: Vec<f64> = rows.iter().map(|r| 1.0 / (sizes[&r.cluster] * total).sqrt()).collect();
    let errors = |p: &Numbers| -> Vec<f64> {
        let g = generation_of(0, p, known(rows));
        rows.iter().map(|r| r.log_error(&g).clamp(-3.0, 3.0)).collect()
    };
    // Few rows leave the prior as it is.
    let trust = (rows.len() as f64 / (rows.len() as f64 + FEW_ROWS)).sqrt();
    let spread = SPREAD.map(|s| s * trust.max(1e-3));
    levenberg_marquardt(prior, &spread, &weights, errors)
}

/// The numbers whose `errors` are least, each drawn to its prior; errors beyond [`KNEE`] count linearly (by reweighting
/// in each step), and a number one `spread` off costs as much as all rows off by [`PRIOR_ERROR`].
fn levenberg_marquardt<const N: usize>(
    prior: &[f64; N],
    spread: &[f64; N],
    weights: &[f64],
    errors: impl Fn(&[f64; N]) -> Vec<f64>,
) -> [f64; N] {
    const NUDGE: f64 = 1e-4;
    let loss = |p: &[f64; N], errors: &[f64]| -> f64 {
        let rows: f64 = errors
            .iter()
            .zip(weights)
            .map(|(e, w)| 2.0 * w * KNEE * KNEE * ((1.0 + (e / KNEE).powi(2)).sqrt() - 1.0))
            .sum();
        let drawn = (0..N).map(|i| ((p[i] - prior[i]) / spread[i] * PRIOR_ERROR).powi(2));
        rows + drawn.sum::<f64>()
    };
    let mut p = *prior;
    let mut now = errors(&p);
    let mut damping = 1e-2;
    for _ in 0..STEPS {
        let columns: Vec<Vec<f64>> = (0..N)
            .map(|i| {
                let mut q = p;
                q[i] += NUDGE;
                errors(&q).iter().zip(&now).map(|(a, b)| (a - b) / NUDGE).collect()
            })
            .collect();
        let robust: Vec<f64> =
            now.iter().zip(weights).map(|(e, w)| w / (1.0 + (e / KNEE).powi(2)).sqrt()).collect();
        let mut matrix = vec![0.0; N * N];
        let mut right = vec![0.0; N];
        for i in 0..N {
            for j in 0..N {
                let products = columns[i].iter().zip(&columns[j]).zip(&robust);
                matrix[i * N + j] = products.map(|((a, b), w)| a * b * w).sum();
            }
            let slope = columns[i].iter().zip(&now).zip(&robust);
            right[i] = -slope.map(|((a, e), w)| a * e * w).sum::<f64>();
            let pull = (PRIOR_ERROR / spread[i]).powi(2);
            matrix[i * N + i] += pull;
            right[i] -= pull * (p[i] - prior[i]);
            matrix[i * N + i] *= 1.0 + damping;
        }
        solve_spd(&mut matrix, &mut right);
        let trial: [f64; N] = std::array::from_fn(|i| p[i] + right[i].clamp(-1.0, 1.0));
        let then = errors(&trial);
        let (before, after) = (loss(&p, &now), loss(&trial, &then));
        if after < before {
            (p, now) = (trial, then);
            damping = (damping * 0.3).max(1e-6);
            if before - after < 1e-9 * before {
                break;
            }
        } else {
            damping *= 5.0;
            if damping > 1e6 {
                break;
            }
        }
    }
    p
}

/// How far devices differ beside their kernels: prefill, decode, sums.
const DEVICE_SPREAD: [f64; 3] = [0.15, 0.10, 0.5];
/// The same where the vendor's kernels were never timed.
const UNTIMED_SPREAD: [f64; 3] = [0.4, 0.4, 0.5];

/// Adds what each device is off by beside its kernels (clocks, power, links, the age of a port), drawn to nothing where
/// few runs say so.
fn with_devices(mut g: Generation, rows: &[&Observed]) -> Generation {
    let mut by_device: BTreeMap<&String, Vec<&Observed>> = BTreeMap::new();
    for row in rows {
        by_device.entry(&row.gpu).or_default().push(row);
    }
    // Beyond a factor of four it is not the device that explains the runs.
    let thousandths = |log: f64| (log.exp().clamp(0.25, 4.0) * 1e3).round() / 1e3;
    for (gpu, rows) in by_device {
        let n = rows.len() as f64;
        // Rows weigh the whole of what they are: few of them leave the prior as it is.
        let weights = vec![1.0 / (n + DEVICE_PRIOR_ROWS); rows.len()];
        let errors = |p: &[f64; 3]| -> Vec<f64> {
            let mut trial = g.clone();
            let factors =
                DeviceFactors { prefill: p[0].exp(), decode: p[1].exp(), sums: p[2].exp() };
            trial.devices.insert(gpu.clone(), factors);
            rows.iter().map(|r| r.log_error(&trial).clamp(-3.0, 3.0)).collect()
        };
        let spread = if rows[0].timed_vendor { &DEVICE_SPREAD } else { &UNTIMED_SPREAD };
        let p = levenberg_marquardt(&[0.0; 3], spread, &weights, errors);
        let factors = DeviceFactors {
            prefill: thousandths(p[0]),
            decode: thousandths(p[1]),
            sums: thousandths(p[2]),
        };
        g.devices.insert(gpu.clone(), factors);
    }
    g
}

fn quantiles(rows: &[&Observed], g: &Generation) -> (f64, f64) {
    // Devices whose kernels nobody timed have an interval of their own.
    let timed = rows.iter().filter(|r| r.timed_vendor);
    let mut errors: Vec<f64> = timed.map(|r| r.log_error(g).exp_m1().abs()).collect();
    errors.sort_by(f64::total_cmp);
    let at = |q: f64| {
        errors.get(((errors.len().max(1) - 1) as f64 * q).round() as usize).copied().unwrap_or(0.0)
    };
    (at(0.5), at(0.9))
}

/// Fits one generation to runs of it. A fifth of the rows is held out once to say how wrong the rest's fit is on it; the
/// numbers that are kept see all rows.
#[must_use]
pub fn fit_generation(since: u32, rows: &[&Observed], prior: &Numbers) -> Generation {
    let held = |r: &&&Observed| {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        r.id.hash(&mut hasher);
        hasher.finish().is_multiple_of(5)
    };
    let (out, kept): (Vec<&Observed>, Vec<&Observed>) =
        rows.iter().copied().partition(|r| held(&r));
    let mut g = with_devices(generation_of(since, &fit_numbers(rows, prior), known(rows)), rows);
    let (median, p90) = quantiles(rows, &g);
    let (held_out_median, held_out_p90) = if out.is_empty() || kept.is_empty() {
        (median, p90)
    } else {
        quantiles(
            &out,
            &with_devices(generation_of(since, &fit_numbers(&kept, prior), known(rows)), &kept),
        )
    };
    g.fit = EngineFit { rows: rows.len(), median, p90, held_out_median, held_out_p90 };
    g.log_stddev = (p90.max(held_out_p90).ln_1p() / 1.645).clamp(0.03, 1.0);
    g
}

/// Rows by engine and generation.
#[must_use]
pub fn by_generation(rows: &[Observed]) -> BTreeMap<(String, u32), Vec<&Observed>> {
    let mut groups: BTreeMap<(String, u32), Vec<&Observed>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.is_fit_for_fitting()) {
        groups.entry((row.engine.clone(), row.since)).or_default().push(row);
    }
    groups
}

/// A generation of each engine from all rows.
#[must_use]
pub fn fit_all(rows: &[Observed]) -> BTreeMap<(String, u32), Generation> {
    let groups = by_generation(rows);
    let engines: Vec<Numbers> = groups
        .values()
        .filter(|rows| rows.len() >= ROWS_THAT_SAY_SOMETHING)
        .map(|rows| fit_numbers(rows, &PRIOR))
        .collect();
    let shared = median_of(&engines);
    groups
        .into_iter()
        .map(|((engine, since), rows)| {
            let generation = fit_generation(since, &rows, &shared);
            ((engine, since), generation)
        })
        .collect()
}

/// Runs from which an engine's numbers say what engines are like.
const ROWS_THAT_SAY_SOMETHING: usize = 20;

/// Number by number, the median engine.
fn median_of(engines: &[Numbers]) -> Numbers {
    if engines.is_empty() {
        return PRIOR;
    }
    std::array::from_fn(|i| {
        let mut values: Vec<f64> = engines.iter().map(|e| e[i]).collect();
        values.sort_by(f64::total_cmp);
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    })
}

/// For each (device, engine, generation): numbers fitted without that device's rows, drawn to what the engine's other
/// generations say and to the median engine.
#[must_use]
pub fn leave_clusters_out(rows: &[Observed]) -> BTreeMap<(String, String, u32), Generation> {
    let groups = by_generation(rows);
    let cases: BTreeSet<(String, String, u32)> =
        rows.iter().map(|r| (r.gpu.clone(), r.engine.clone(), r.since)).collect();
    cases
        .into_iter()
        .map(|(gpu, engine, since)| {
            let of = |keep: &dyn Fn(&Observed) -> bool| -> Vec<&Observed> {
                groups
                    .values()
                    .flatten()
                    .copied()
                    .filter(|r| (r.gpu != gpu || r.engine != engine) && keep(r))
                    .collect()
            };
            // Engines as they usually are: this one says nothing about itself with the device it is scored on.
            let others: Vec<Numbers> = groups
                .iter()
                .filter(|((other, year), rows)| {
                    (*other != engine || *year != since) && rows.len() >= ROWS_THAT_SAY_SOMETHING
                })
                .map(|((other, _), rows)| {
                    let kept: Vec<&Observed> =
                        rows.iter().copied().filter(|r| *other != engine || r.gpu != gpu).collect();
                    fit_numbers(&kept, &PRIOR)
                })
                .collect();
            let shared = median_of(&others);
            let relatives = of(&|r| r.engine == engine && r.since != since);
            let family =
                if relatives.is_empty() { shared } else { fit_numbers(&relatives, &shared) };
            let own = of(&|r| r.engine == engine && r.since == since);
            // Relatives of another time say half of what they are: hosts and kernels have changed since.
            let prior: Numbers = std::array::from_fn(|i| 0.5 * (family[i] + shared[i]));
            let generation = if own.is_empty() {
                let known = rows
                    .iter()
                    .any(|r| r.engine == engine && r.since == since && r.first_token_decodes);
                let mut g = generation_of(since, &prior, known);
                g.log_stddev = 0.2;
                g
            } else {
                fit_generation(since, &own, &prior)
            };
            ((gpu, engine, since), generation)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::Buckets;

    /// Runs of an engine whose numbers are known, on two devices.
    fn observed(truth: &Generation) -> Vec<Observed> {
        let mut rows = Vec::new();
        for (gpu, speed) in [("a", 1.0), ("b", 0.6)] {
            for batch in [1u32, 4, 16, 64] {
                for isl in [128.0, 1024.0, 4096.0] {
                    let b = f64::from(batch);
                    let parts = Parts {
                        prefill: Buckets {
                            products: speed * 2e-5 * b * isl,
                            attention: speed * 1e-9 * b * isl * isl,
                            sums: 0.0,
                            small: speed * 1e-6 * b * isl,
                        },
                        decode: Buckets {
                            products: speed * 0.6,
                            attention: speed * 1e-6 * b * isl,
                            sums: 0.0,
                            small: 0.05,
                        },
                        prefill_steps: 1.0,
                        decode_steps: 99.0,
                        first_steps: 1.0,
                        sequence_steps: 99.0 * b,
                        layers: 32.0,
                        group: 4,
                    };
                    for metric in [Metric::TtftMs, Metric::TpotMs, Metric::OutputTokS] {
                        let mut row = Observed {
                            id: format!("{gpu}{batch}{isl}{}", metric.name()),
                            gpu: gpu.to_owned(),
                            timed_vendor: true,
                            linked: true,
                            engine: "e".to_owned(),
                            since: 2024,
                            cluster: (gpu.to_owned(), "e".to_owned()),
                            metric,
                            measured: 1.0,
                            parts,
                            arrival: Arrival::Static { batch },
                            together: b,
                            isl,
                            osl: 100.0,
                            replicas: 1.0,
                            first_token_decodes: false,
                        };
                        row.measured = row.predicted(truth);
                        rows.push(row);
                    }
                }
            }
        }
        rows
    }

    fn truth() -> Generation {
        generation_of(2024, &[0.3, 0.1, 0.05, -0.5, 0.0, -6.0, -9.5, -11.0, -0.1, 0.2], false)
    }

    #[test]
    fn a_fit_finds_the_engine_that_made_the_runs() {
        let rows = observed(&truth());
        let fitted = fit_all(&rows);
        let g = &fitted[&("e".to_owned(), 2024)];
        assert!(g.fit.median < 0.01 && g.fit.p90 < 0.03, "{g:?}");
        assert!((g.prefill / truth().prefill - 1.0).abs() < 0.1, "{g:?}");
        assert_eq!(g.fit.rows, rows.len());
    }

    #[test]
    fn a_device_left_out_is_predicted_from_the_other() {
        let rows = observed(&truth());
        let fitted = leave_clusters_out(&rows);
        let g = &fitted[&("b".to_owned(), "e".to_owned(), 2024)];
        assert!(!g.devices.contains_key("b"));
        let worst =
            rows.iter().filter(|r| r.gpu == "b").map(|r| r.log_error(g).abs()).fold(0.0, f64::max);
        assert!(worst < 0.1, "{worst}");
    }

    #[test]
    fn what_a_device_is_off_by_is_found_and_kept_small_where_few_runs_say_so() {
        let mut rows = observed(&truth());
        for row in rows.iter_mut().filter(|r| r.gpu == "b") {
            row.measured *= if row.metric == Metric::OutputTokS { 1.0 / 1.2 } else { 1.2 };
        }
        let all = &fit_all(&rows)[&("e".to_owned(), 2024)];
        let found = all.device("b");
        assert!(found.decode / all.device("a").decode > 1.1, "{:?}", all.devices);
        let few: Vec<Observed> = rows
            .into_iter()
            .enumerate()
            .filter(|(i, r)| r.gpu == "a" || i % 36 == 0)
            .map(|(_, r)| r)
            .collect();
        let few = fit_all(&few)[&("e".to_owned(), 2024)].device("b");
        assert!(few.decode < found.decode);
    }

    #[test]
    fn time_to_first_token_in_a_closed_loop_is_not_fitted() {
        let mut row = observed(&truth()).remove(0);
        assert!(row.is_fit_for_fitting());
        row.arrival = Arrival::Closed { concurrency: Some(4) };
        row.metric = Metric::TtftMs;
        assert!(!row.is_fit_for_fitting());
    }
}

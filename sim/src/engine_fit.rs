//! An engine's speed from published runs: a few numbers per generation, fitted to the parts of each run's time.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::{EngineFit, Generation};
use crate::runs::{Metric, Question};
use crate::serve::{Arrival, Parts, Run};
use crate::surface::minimise;

/// One measurement beside what its time is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Its name in the file.
    pub id: String,
    /// Device.
    pub gpu: String,
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
}

impl Observed {
    /// From a question and a run of it under any generation.
    #[must_use]
    pub fn new(id: &str, q: &Question, run: &Run) -> Self {
        Self {
            id: id.to_owned(),
            gpu: q.gpu.name.clone(),
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
        }
    }

    /// The metric under a generation.
    #[must_use]
    pub fn predicted(&self, g: &Generation) -> f64 {
        let (prefill, decode) = (self.parts.prefill(g), self.parts.decode(g));
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
                let tpot = prefill + decode;
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

/// What a fit starts from and is drawn to: the medians over engines.
const PRIOR: [f64; 7] = [0.10, 0.05, 1.0e-3, 10e-6, 5e-6, 6e-6, 0.0];

fn generation_of(since: u32, p: &[f64; 6]) -> Generation {
    Generation {
        since,
        prefill: p[0].exp(),
        decode: p[1].exp(),
        step_s: p[2].exp() * PRIOR[2],
        sequence_s: p[3].exp() * PRIOR[3],
        layer_s: p[4].exp() * PRIOR[4],
        reduce_s: p[5].exp() * PRIOR[5],
        log_stddev: 0.1,
        fit: EngineFit::default(),
    }
}

/// Fits one generation to runs of it; clusters weigh the same whatever their number of rows.
#[must_use]
pub fn fit_generation(since: u32, rows: &[&Observed]) -> Generation {
    let mut sizes: BTreeMap<&(String, String), f64> = BTreeMap::new();
    for row in rows {
        *sizes.entry(&row.cluster).or_default() += 1.0;
    }
    let clusters = sizes.len().max(1) as f64;
    let count = rows.len() as f64;
    let loss = |p: &[f64; 6]| -> f64 {
        let g = generation_of(since, p);
        let sum: f64 = rows
            .iter()
            .map(|row| {
                let e = row.log_error(&g) / 0.05;
                (1.0 + e * e).sqrt() / sizes[&row.cluster]
            })
            .sum();
        // Numbers that the rows say nothing about stay where engines usually are; factors are surer than times.
        let drawn = (p[0] - PRIOR[0]).powi(2) / 0.09
            + (p[1] - PRIOR[1]).powi(2) / 0.02
            + p[2..].iter().map(|x| x * x / 4.0).sum::<f64>();
        sum / clusters + drawn / count.max(1.0)
    };
    let start = [PRIOR[0], PRIOR[1], 0.0, 0.0, 0.0, 0.0];
    let first = minimise(start, 0.4, loss);
    // A second start from where the first ended: a simplex that has collapsed is opened again.
    let best = minimise(first, 0.2, loss);
    let mut g = generation_of(since, &best);
    let mut errors: Vec<f64> = rows.iter().map(|r| r.log_error(&g).exp_m1().abs()).collect();
    errors.sort_by(f64::total_cmp);
    let at = |q: f64| errors.get(((errors.len().max(1) - 1) as f64 * q).round() as usize).copied();
    g.fit = EngineFit {
        rows: rows.len(),
        median: at(0.5).unwrap_or(0.0),
        p90: at(0.9).unwrap_or(0.0),
        ..EngineFit::default()
    };
    g.log_stddev = (at(0.9).unwrap_or(0.3).ln_1p() / 1.645).max(0.02);
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

/// For each (device, engine): a generation fitted without that device's rows. Where the engine was measured on no other
/// device, its other generations stand in, then all engines of the same years together.
#[must_use]
pub fn leave_clusters_out(rows: &[Observed]) -> BTreeMap<(String, String, u32), Generation> {
    let groups = by_generation(rows);
    let cases: BTreeSet<(String, String, u32)> =
        rows.iter().map(|r| (r.gpu.clone(), r.engine.clone(), r.since)).collect();
    cases
        .into_iter()
        .map(|(gpu, engine, since)| {
            let of = |keep: &dyn Fn(&Observed) -> bool| -> Vec<&Observed> {
                groups.values().flatten().copied().filter(|r| r.gpu != gpu && keep(r)).collect()
            };
            let same = of(&|r| r.engine == engine && r.since == since);
            let sibling = of(&|r| r.engine == engine);
            let era = of(&|r| r.engine != engine && r.since == since);
            let all = of(&|r| r.engine != engine);
            let chosen = [same, sibling, era, all]
                .into_iter()
                .find(|rows| rows.len() >= 5)
                .unwrap_or_default();
            let generation = fit_generation(since, &chosen);
            ((gpu, engine, since), generation)
        })
        .collect()
}

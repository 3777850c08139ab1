//! How long a program takes, op by op: predicted by `sim` or measured by `exec`, in the same type.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::op::{Family, Phase, Site};
use crate::units::Seconds;

/// Where a number comes from, strongest first. A sum carries the weakest of its parts.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Timed while the program ran.
    #[default]
    Run,
    /// A calibration point of this very shape.
    Measured,
    /// Between calibration points.
    Interpolated,
    /// Outside the calibration points.
    Extrapolated,
    /// From the data sheet: FLOPs and bytes over derated peaks.
    Roofline,
}

impl Source {
    /// The word in tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Measured => "measured",
            Self::Interpolated => "interpolated",
            Self::Extrapolated => "extrapolated",
            Self::Roofline => "roofline",
        }
    }
}

/// All launches of one op: over its layers, its steps and the loops around them.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it stands.
    pub site: Site,
    /// Kernel family.
    pub family: Family,
    /// Launches.
    pub launches: f64,
    /// Sum over the launches.
    pub time: Seconds,
    /// Standard deviation of that sum.
    pub stddev: Seconds,
    /// Where the time comes from.
    pub source: Source,
}

/// How long a program takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// One per op of the folded program.
    pub spans: Vec<Span>,
    /// Time of whole steps that no op accounts for (scheduling, clocks), by phase: prefill, decode.
    pub overhead: [Seconds; 2],
    /// Relative deviation that all of it shares (what is not known about an engine).
    pub common: f64,
}

/// Two standard deviations hold 95 % of a normal distribution; its 90 % interval is 1.645 of them.
pub const SIGMAS_90: f64 = 1.645;

impl Timeline {
    /// Time of a phase, overhead included.
    #[must_use]
    pub fn phase(&self, phase: Phase) -> Seconds {
        self.phases()[phase as usize]
    }

    /// Time of both phases: prefill, decode.
    #[must_use]
    pub fn phases(&self) -> [Seconds; 2] {
        let mut ops = [Seconds(0.0); 2];
        for span in &self.spans {
            ops[span.site.phase as usize] += span.time;
        }
        [ops[0] + self.overhead[0], ops[1] + self.overhead[1]]
    }

    /// Time of everything.
    #[must_use]
    pub fn total(&self) -> Seconds {
        let [prefill, decode] = self.phases();
        prefill + decode
    }

    /// Standard deviation of the spans that `select` takes: errors inside a family are one model's and add up, errors
    /// of different families are independent.
    #[must_use]
    pub fn stddev(&self, select: impl Fn(&Span) -> bool) -> Seconds {
        let mut families = [0.0; Family::ALL.len()];
        for span in self.spans.iter().filter(|s| select(s)) {
            families[span.family as usize] += span.stddev.0;
        }
        Seconds(families.iter().map(|s| s * s).sum::<f64>().sqrt())
    }

    /// Half width of the 90 % interval of a phase's time, or of all of it, relative.
    #[must_use]
    pub fn half_width(&self, phase: Option<Phase>) -> f64 {
        let [prefill, decode] = self.phases();
        let time = match phase {
            None => prefill + decode,
            Some(Phase::Prefill) => prefill,
            Some(Phase::Decode) => decode,
        };
        self.half_width_of(time, phase)
    }

    /// The same where the time is known.
    pub(crate) fn half_width_of(&self, Seconds(time): Seconds, phase: Option<Phase>) -> f64 {
        if time <= 0.0 {
            return 0.0;
        }
        let ops = self.stddev(|s| phase.is_none_or(|p| s.site.phase == p)).0;
        SIGMAS_90 * (ops / time).hypot(self.common)
    }

    /// The weakest source that matters: it and weaker ones are behind at least 1 % of the time (a guess about nothing changes
    /// nothing).
    #[must_use]
    pub fn weakest_source(&self) -> Source {
        self.weakest_source_of(self.total())
    }

    /// The same where the total is known.
    pub(crate) fn weakest_source_of(&self, Seconds(total): Seconds) -> Source {
        const WEAKEST_FIRST: [Source; 5] = [
            Source::Roofline,
            Source::Extrapolated,
            Source::Interpolated,
            Source::Measured,
            Source::Run,
        ];
        let mut times = [0.0; WEAKEST_FIRST.len()];
        for span in &self.spans {
            times[span.source as usize] += span.time.0;
        }
        let mut sum = 0.0;
        let matters = |source: &Source| {
            sum += times[*source as usize];
            sum > 0.0 && sum >= 0.01 * total
        };
        WEAKEST_FIRST.into_iter().find(matters).unwrap_or_default()
    }

    /// The family and phase in which most of the time goes, with its share; `host` is the time of steps that no op accounts
    /// for.
    #[must_use]
    pub fn mostly(&self) -> Option<(Phase, &'static str, f64)> {
        let mut times = [[None::<f64>; Family::ALL.len()]; 2];
        for span in &self.spans {
            let time = &mut times[span.site.phase as usize][span.family as usize];
            *time = Some(time.unwrap_or_default() + span.time.0);
        }
        let ops = [Phase::Prefill, Phase::Decode].into_iter().zip(&times).flat_map(|(phase, t)| {
            let known = Family::ALL.into_iter().zip(t);
            known.filter_map(move |(family, time)| Some((phase, family.name(), (*time)?)))
        });
        let host = [Phase::Prefill, Phase::Decode]
            .map(|phase| (phase, "host", self.overhead[phase as usize].0));
        let (phase, name, time) = ops.chain(host).max_by(|a, b| a.2.total_cmp(&b.2))?;
        let total = self.total().0;
        (total > 0.0).then(|| (phase, name, time / total))
    }

    /// Time by phase and family.
    #[must_use]
    pub fn by_family(&self) -> BTreeMap<(Phase, Family), (Seconds, Source)> {
        let mut rows = BTreeMap::new();
        for span in &self.spans {
            let row: &mut (Seconds, Source) =
                rows.entry((span.site.phase, span.family)).or_insert((Seconds(0.0), Source::Run));
            row.0 += span.time;
            row.1 = row.1.max(span.source);
        }
        rows
    }
}

/// One row of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Phase.
    pub phase: Phase,
    /// Kernel family.
    pub family: Family,
    /// By the simulator.
    pub predicted: Seconds,
    /// By the executor.
    pub measured: Seconds,
    /// (predicted - measured) / measured.
    pub error: f64,
    /// Source of the prediction.
    pub source: Source,
}

/// Prediction beside measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// By phase and family.
    pub rows: Vec<Row>,
    /// Sites on one side only: a bug, not a rounding error.
    pub unmatched: Vec<Site>,
}

/// (predicted - measured) / measured; 0 where nothing was measured.
#[must_use]
pub fn relative_error(predicted: f64, measured: f64) -> f64 {
    if measured == 0.0 { 0.0 } else { (predicted - measured) / measured }
}

/// Joins on [`Site`].
#[must_use]
pub fn compare(predicted: &Timeline, measured: &Timeline) -> Comparison {
    let sites =
        |t: &Timeline| t.spans.iter().map(|s| s.site).collect::<std::collections::BTreeSet<_>>();
    let unmatched = sites(predicted).symmetric_difference(&sites(measured)).copied().collect();
    let ours = measured.by_family();
    let rows = predicted
        .by_family()
        .into_iter()
        .map(|((phase, family), (time, source))| {
            let (real, _) = ours.get(&(phase, family)).copied().unwrap_or_default();
            let error = relative_error(time.0, real.0);
            Row { phase, family, predicted: time, measured: real, error, source }
        })
        .collect();
    Comparison { rows, unmatched }
}

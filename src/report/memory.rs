//! What the caches hold while a run goes on, as a plot.

use batchmax_sim::memory::{Footprint, Moment};
use batchmax_sim::op::Phase;
use batchmax_sim::plan::Limits;
use batchmax_sim::units::Bytes;

use super::figure::{Axis, Figure, Series};

/// One run's caches, step by step.
#[derive(Clone, Debug)]
pub struct Course {
    /// The policy and the batch.
    pub name: String,
    /// Its steps.
    pub moments: Vec<Moment>,
}

/// Points of a line at most: more are not told apart.
const MOST_POINTS: usize = 600;

/// The caches' bytes against time, prompts and generated tokens apart; nothing where no run was unrolled. `room` is what
/// they may hold.
pub fn figure(courses: &[Course], room: Option<Bytes>, source: String) -> Option<Figure> {
    let end = |c: &Course| c.moments.last().map_or(0.0, |m| m.end.0);
    let last = courses.iter().map(end).fold(0.0, f64::max);
    let peaks = courses.iter().flat_map(|c| &c.moments).map(|m| m.peak.0);
    let most = peaks.chain(room.map(|r| r.0)).max()?;
    if courses.iter().all(|c| c.moments.is_empty()) {
        return None;
    }
    let (scale, unit) = unit(most);
    let mut series: Vec<Series> = Vec::new();
    for course in courses {
        for (phase, points) in lines(course, scale) {
            let name = format!("{}: {}", course.name, phase.name());
            let points = thinned(points);
            series.push(Series { name, points, joined: true, marked: false });
        }
    }
    if let Some(room) = room {
        let height = room.0 as f64 / scale;
        let points = vec![(0.0, height), (last, height)];
        let name = "room for caches".to_owned();
        series.push(Series { name, points, joined: true, marked: false });
    }
    Some(Figure {
        title: "Caches while the run goes on".to_owned(),
        x: Axis::linear("time since the start, s"),
        y: Axis::linear(&format!("caches of a device, {unit}")),
        series,
        source,
    })
}

/// Bytes that are left for caches beside everything else.
pub fn room(limits: &Limits, footprint: &Footprint) -> Bytes {
    let rest = footprint.total().saturating_sub(footprint.kv_peak());
    let left = limits.memory.saturating_sub(rest);
    limits.kv_memory.map_or(left, |kv| kv.min(left))
}

/// Said below every such plot.
pub const READ: &str = "Within a step caches grow from what was held before to its worst moment (prompts are appended \
     before anything is dropped) and fall to what is held behind it. Decode begins with the first generated token.";

fn unit(most: u64) -> (f64, &'static str) {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let found = units.into_iter().find(|(bits, _)| most >> bits > 0);
    found.map_or((1.0, "bytes"), |(bits, name)| ((1u64 << bits) as f64, name))
}

/// What is held, until the first generated token and from there on.
fn lines(course: &Course, scale: f64) -> Vec<(Phase, Vec<(f64, f64)>)> {
    let decode = course.moments.iter().position(|m| m.phase == Phase::Decode);
    let (read, generated) = course.moments.split_at(decode.unwrap_or(course.moments.len()));
    let mut at = (0.0, 0.0);
    let mut found = Vec::new();
    for (phase, moments) in [(Phase::Prefill, read), (Phase::Decode, generated)] {
        if moments.is_empty() {
            continue;
        }
        let mut points = vec![at];
        for m in moments {
            points.push((m.end.0, m.peak.0 as f64 / scale));
            at = (m.end.0, m.held.0 as f64 / scale);
            if m.held != m.peak {
                points.push(at);
            }
        }
        found.push((phase, points));
    }
    found
}

/// The lowest and the highest point of each of a few stretches.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points;
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let mut kept = Vec::with_capacity(MOST_POINTS + 2);
    for part in points.chunks(stretch) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let ends = [part.iter().min_by(by_height), part.iter().max_by(by_height)];
        let mut ends: Vec<(f64, f64)> = ends.into_iter().flatten().copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(ends);
    }
    kept.extend(points.last());
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use batchmax_sim::units::Seconds;

    fn moment(phase: Phase, end: f64, peak: u64, held: u64) -> Moment {
        let mib = |n| Bytes(n << 20);
        Moment { phase, end: Seconds(end), peak: mib(peak), held: mib(held) }
    }

    #[test]
    fn a_prompt_is_appended_before_it_is_cut() {
        let moments = vec![moment(Phase::Prefill, 1.0, 8, 2), moment(Phase::Decode, 1.5, 3, 3)];
        let course = Course { name: "snapkv, batch 1".into(), moments };
        let figure = figure(&[course], Some(Bytes(9 << 20)), "made up".into()).expect("a plot");
        assert_eq!(figure.y.label, "caches of a device, MiB");
        let names: Vec<&str> = figure.series.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            ["snapkv, batch 1: prefill", "snapkv, batch 1: decode", "room for caches"]
        );
        assert_eq!(figure.series[0].points, [(0.0, 0.0), (1.0, 8.0), (1.0, 2.0)]);
        assert_eq!(figure.series[1].points, [(1.0, 2.0), (1.5, 3.0)]);
        assert_eq!(figure.series[2].points, [(0.0, 9.0), (1.5, 9.0)]);
    }

    #[test]
    fn thinning_keeps_the_highest_point_and_the_last() {
        let mut points: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i), 1.0)).collect();
        points[1234].1 = 7.0;
        let kept = thinned(points);
        assert!(kept.len() <= MOST_POINTS + 2 && kept.contains(&(1234.0, 7.0)));
        assert_eq!(kept.last(), Some(&(4999.0, 1.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn nothing_unrolled_is_nothing_to_plot() {
        let course = Course { name: "full".into(), moments: Vec::new() };
        assert!(figure(&[course], None, String::new()).is_none());
    }
}

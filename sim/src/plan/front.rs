//! Which candidates no other beats in two respects at once.

use super::{Candidate, Objective};

/// The fronts a candidate is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Value against time per output token.
    pub tpot: bool,
    /// Value against memory of a device.
    pub memory: bool,
}

/// The fronts of each candidate, in their order; what does not fit is on none.
#[must_use]
pub fn marks(candidates: &[Candidate], objective: Objective) -> Vec<Marks> {
    let points = |price: fn(&super::Answer) -> f64| -> Vec<Option<(f64, f64)>> {
        let point = |c: &Candidate| Some((c.value(objective), price(c.answer.as_ref()?)));
        candidates.iter().map(point).collect()
    };
    let tpot = front(&points(|a| a.metrics.tpot.0));
    let memory = front(&points(|a| a.footprint.total().0 as f64));
    tpot.into_iter().zip(memory).map(|(tpot, memory)| Marks { tpot, memory }).collect()
}

/// Differences below this share are none: no prediction can tell such points apart.
const ALIKE: f64 = 0.005;

/// Of (value, price) points: those that no other one beats, being as good in both and better in one; of points that are
/// alike the first.
fn front(points: &[Option<(f64, f64)>]) -> Vec<bool> {
    let beats = |(i, (v, p)): (usize, (f64, f64)), (j, (value, price)): (usize, (f64, f64))| {
        let as_good = v >= value * (1.0 - ALIKE) && p <= price * (1.0 + ALIKE);
        let better = v > value * (1.0 + ALIKE) || p < price * (1.0 - ALIKE);
        as_good && (better || i < j)
    };
    let known = || points.iter().enumerate().filter_map(|(i, p)| Some((i, (*p)?)));
    let mut on = vec![false; points.len()];
    for point in known() {
        on[point.0] = !known().any(|other| other.0 != point.0 && beats(other, point));
    }
    on
}

#[cfg(test)]
mod tests {
    use super::front;

    #[test]
    fn a_front_leaves_out_what_another_beats() {
        let points = [
            Some((100.0, 10.0)), // the fastest
            Some((90.0, 10.0)),  // as dear, slower
            Some((90.0, 5.0)),   // cheaper
            Some((90.2, 5.01)),  // alike
            Some((80.0, 6.0)),   // slower and dearer
            None,
            Some((10.0, 1.0)), // the cheapest
        ];
        assert_eq!(front(&points), [true, false, true, false, false, false, true]);
    }
}

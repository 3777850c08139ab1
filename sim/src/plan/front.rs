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

/// Of (value, price) points: those that no other one beats, being at least as good in both and better in one.
fn front(points: &[Option<(f64, f64)>]) -> Vec<bool> {
    let beaten = |(value, price): (f64, f64)| {
        points.iter().flatten().any(|&(v, p)| v >= value && p <= price && (v > value || p < price))
    };
    points.iter().map(|point| point.is_some_and(|p| !beaten(p))).collect()
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
            Some((90.0, 5.0)),   // the same again: neither beats the other
            Some((80.0, 6.0)),   // slower and dearer
            None,
            Some((10.0, 1.0)), // the cheapest
        ];
        assert_eq!(front(&points), [true, false, true, true, false, false, true]);
    }
}

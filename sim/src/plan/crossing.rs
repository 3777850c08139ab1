//! From where on something holds: a scan by doubling, then bisection.

/// Where a condition holds along a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// Everywhere.
    Always,
    /// Nowhere.
    Never,
    /// At this value and above.
    From(u64),
    /// At this value and below.
    UpTo(u64),
    /// Between the two, both included.
    Between(u64, u64),
}

/// Where `holds` along `from..=to`, to one part in 64. A condition that changes more than twice between the doublings
/// is answered by its outermost values.
///
/// # Errors
/// The first one of `holds`.
pub fn crossing<E>(
    from: u64,
    to: u64,
    mut holds: impl FnMut(u64) -> Result<bool, E>,
) -> Result<Crossing, E> {
    let mut grid = Vec::new();
    let mut at = from.max(1);
    while at < to {
        grid.push(at);
        at = at.saturating_mul(2);
    }
    grid.push(to);
    let known = grid.iter().map(|at| holds(*at)).collect::<Result<Vec<bool>, E>>()?;
    let (Some(first), Some(last)) = (known.iter().position(|k| *k), known.iter().rposition(|k| *k))
    else {
        return Ok(Crossing::Never);
    };
    // `yes` holds, `no` does not; whichever is larger.
    let mut bisect = |mut yes: u64, mut no: u64| -> Result<u64, E> {
        while yes.abs_diff(no) > (yes.min(no) / 64).max(1) {
            let middle = yes.midpoint(no);
            if holds(middle)? { yes = middle } else { no = middle }
        }
        Ok(yes)
    };
    let low = if first == 0 { None } else { Some(bisect(grid[first], grid[first - 1])?) };
    let high =
        if last + 1 == grid.len() { None } else { Some(bisect(grid[last], grid[last + 1])?) };
    Ok(match (low, high) {
        (None, None) => Crossing::Always,
        (Some(low), None) => Crossing::From(low),
        (None, Some(high)) => Crossing::UpTo(high),
        (Some(low), Some(high)) => Crossing::Between(low, high),
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn find(from: u64, to: u64, holds: impl Fn(u64) -> bool) -> Crossing {
        let found: Result<_, Infallible> = crossing(from, to, |x| Ok(holds(x)));
        match found {
            Ok(crossing) => crossing,
        }
    }

    #[test]
    fn a_threshold_is_bisected() {
        assert_eq!(find(1, 100, |x| x >= 37), Crossing::From(37));
        assert_eq!(find(1, 100, |x| x <= 37), Crossing::UpTo(37));
        assert_eq!(find(1, 100, |x| (9..=37).contains(&x)), Crossing::Between(9, 37));
        assert_eq!(find(1, 100, |_| true), Crossing::Always);
        assert_eq!(find(1, 100, |_| false), Crossing::Never);
        assert_eq!(find(5, 5, |x| x == 5), Crossing::Always);
    }

    #[test]
    fn large_values_are_found_to_one_part_in_64() {
        let Crossing::From(at) = find(1 << 30, 1 << 40, |x| x >= 123_456_789_012) else {
            panic!("a threshold");
        };
        assert!((123_456_789_012..123_456_789_012 / 64 * 65).contains(&at), "{at}");
    }

    #[test]
    fn the_first_error_ends_the_search() {
        let mut asked = 0;
        let found = crossing(1, 1 << 20, |x| {
            asked += 1;
            if x >= 4 { Err("no") } else { Ok(false) }
        });
        assert_eq!((found, asked), (Err("no"), 3));
    }
}

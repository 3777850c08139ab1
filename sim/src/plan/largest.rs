//! The largest number that fits, and why the next one does not.

/// The largest of `1..=most` that fits, and what `why_not` says of the next; (0, why) where 1 does not, and no reason where
/// `most` does. What does not fit fits no larger. A good `guess` takes two questions; without one it is doubled from 1.
pub fn largest<W, E>(
    most: u32,
    guess: Option<u32>,
    mut why_not: impl FnMut(u32) -> Result<Option<W>, E>,
) -> Result<(u32, Option<W>), E> {
    let first = guess.unwrap_or(1).clamp(1, most.max(1));
    // `good` fits, `bad` does not.
    let (mut good, mut bad, mut over) = (0, u32::MAX, None);
    match why_not(first)? {
        None => {
            good = first;
            let mut step = if guess.is_some() { 1 } else { first };
            while good < most {
                let next = good.saturating_add(step).min(most);
                if let Some(why) = why_not(next)? {
                    (bad, over) = (next, Some(why));
                    break;
                }
                good = next;
                step = step.saturating_mul(2);
            }
            if over.is_none() {
                return Ok((good, None));
            }
        }
        Some(why) => {
            (bad, over) = (first, Some(why));
            let mut step = 1;
            while bad > 1 {
                let next = bad.saturating_sub(step).max(1);
                match why_not(next)? {
                    None => {
                        good = next;
                        break;
                    }
                    Some(why) => (bad, over) = (next, Some(why)),
                }
                step = step.saturating_mul(2);
            }
        }
    }
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        match why_not(middle)? {
            None => good = middle,
            Some(why) => (bad, over) = (middle, Some(why)),
        }
    }
    Ok((good, over))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::largest;

    #[test]
    fn whatever_the_guess_the_same_is_found() {
        for most in [1, 2, 7, 100, 65_536] {
            for fit in [0, 1, 2, 3, 6, 7, 63, 64, 65, 99, 100, 70_000] {
                for guess in [None, Some(1), Some(2), Some(64), Some(100), Some(65_536)] {
                    let found: Result<_, Infallible> =
                        largest(most, guess, |n| Ok((n > fit).then_some(n)));
                    let Ok(found) = found;
                    let expected = if fit >= most { (most, None) } else { (fit, Some(fit + 1)) };
                    assert_eq!(found, expected, "{fit} of {most} from {guess:?}");
                }
            }
        }
    }

    #[test]
    fn a_good_guess_asks_twice() {
        let mut asked = Vec::new();
        let found: Result<_, Infallible> = largest(1 << 16, Some(1234), |n| {
            asked.push(n);
            Ok((n > 1234).then_some(()))
        });
        assert_eq!((found, asked), (Ok((1234, Some(()))), vec![1234, 1235]));
    }
}

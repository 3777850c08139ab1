//! Work on several threads whose results don't depend on how many there are.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// `work` on each of `0..count` on at most `threads` threads, results in order. Each thread makes a state of its own, which
/// must not change what is answered.
///
/// # Errors
/// That of the first whose work fails; nothing is begun once one has.
pub fn in_order<S, R: Send, E: Send>(
    count: usize,
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let threads = threads.clamp(1, count.max(1));
    if threads == 1 {
        let mut state = state();
        return (0..count).map(|index| work(&mut state, index)).collect();
    }
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    // Whoever is free takes the next one: some take much longer than others.
    let share = || {
        let (mut state, mut done) = (state(), Vec::new());
        loop {
            if failed.load(Ordering::Relaxed) {
                return done;
            }
            // Whatever is taken is worked on, and what comes before it was taken: the first failure is always found.
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return done;
            }
            let result = work(&mut state, index);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push((index, result));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(share)).collect();
        let mut done = share();
        for other in others {
            match other.join() {
                Ok(part) => done.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn the_order_is_that_of_the_work() {
        for threads in [0, 1, 2, 3, 50] {
            let squares = in_order(20, threads, || (), |(), i| Ok::<_, ()>(i * i));
            assert_eq!(squares, Ok((0..20).map(|i| i * i).collect()));
            let failing = in_order(20, threads, || (), |(), i| if i < 7 { Ok(()) } else { Err(i) });
            assert_eq!(failing, Err(7));
        }
        assert_eq!(in_order(0, 4, || (), |(), i| Ok::<_, ()>(i)), Ok(Vec::new()));
    }
}

//! Where pretended devices add up.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::product::{decode, encode};
use crate::cuda::Element;

/// What the sum is called in errors.
pub(super) const ALL_REDUCE: &str = "a sum over devices";
/// A device that waits so long for another one never meets it: the ranks disagree about what comes next.
const PATIENCE: Duration = Duration::from_secs(120);

/// A place where every device brings its numbers and takes the sums.
pub(super) struct Meeting {
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    number: u64,
    /// What each device has brought.
    parts: Vec<Option<(Element, Vec<u8>)>>,
    /// What came of the last round.
    sum: Result<Arc<Vec<u8>>, String>,
    /// One of them comes no more.
    left: bool,
}

impl Meeting {
    pub(super) fn new(devices: u32) -> Self {
        let parts = vec![None; devices as usize];
        let round = Round { number: 0, parts, sum: Ok(Arc::default()), left: false };
        Self { round: Mutex::new(round), changed: Condvar::new() }
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn devices(&self) -> u32 {
        self.round().parts.len() as u32
    }

    pub(super) fn leave(&self) {
        self.round().left = true;
        self.changed.notify_all();
    }

    /// The sums, in the order of the ranks, once all have brought their part.
    pub(super) fn add(
        &self,
        rank: u32,
        element: Element,
        part: Vec<u8>,
    ) -> Result<Arc<Vec<u8>>, String> {
        let mut round = self.round();
        let number = round.number;
        round.parts[rank as usize] = Some((element, part));
        if round.parts.iter().all(Option::is_some) {
            round.sum = sum(round.parts.iter_mut().filter_map(Option::take));
            round.number += 1;
            self.changed.notify_all();
            return round.sum.clone();
        }
        let waiting = |round: &mut Round| round.number == number && !round.left;
        let waited = self.changed.wait_timeout_while(round, PATIENCE, waiting);
        let (round, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // The next round can't end before this device has come to it.
        if round.number != number {
            return round.sum.clone();
        }
        Err(if round.left { "another device left" } else { "another device did not come" }.into())
    }
}

fn sum(parts: impl Iterator<Item = (Element, Vec<u8>)>) -> Result<Arc<Vec<u8>>, String> {
    let mut sums: Option<(Element, Vec<f32>)> = None;
    for (element, part) in parts {
        let numbers = decode(element, &part);
        match &mut sums {
            None => sums = Some((element, numbers)),
            Some((of, sums)) if *of == element && sums.len() == numbers.len() => {
                sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x);
            }
            Some((of, sums)) => {
                let (a, b) = (sums.len(), numbers.len());
                return Err(format!(
                    "one device has {a} numbers of {of:?}, another {b} of {element:?}"
                ));
            }
        }
    }
    let (element, sums) = sums.ok_or("nobody came")?;
    let mut bytes = vec![0; sums.len() * element.bytes() as usize];
    let cells = bytes.chunks_exact_mut(element.bytes() as usize);
    cells.zip(sums).for_each(|(cell, x)| encode(element, x, cell));
    Ok(Arc::new(bytes))
}

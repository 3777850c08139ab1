//! Sequences that join and leave: a request begins as soon as a place and the bytes it will need are free.
//!
//! Reading comes first, as in engines that keep the two apart: whoever can join has its prompt read at once, one prompt at a
//! time, while those that generate wait. Requests join in their order, so that none starves. Nothing is ever taken back: a
//! sequence reserves what its caches hold at their worst moment, which is known before it runs. The sum of such reservations
//! bounds what all hold together.

use std::collections::VecDeque;

use super::{Lowering, Sequences, lower};
use crate::load::{Admission, Group, Load, Schedule};
use crate::memory::{kv_peaks, kv_spread};
use crate::program::Node;
use crate::units::{Bytes, Tokens};

/// Requests that have not begun.
struct Waiting {
    sequences: Sequences,
    /// What each of them reserves.
    bytes: Bytes,
}

/// Sequences that generate, with what they reserve.
struct Running {
    sequences: Vec<Sequences>,
    bytes: Vec<Bytes>,
}

impl Running {
    fn count(&self) -> u32 {
        self.sequences.iter().map(|s| s.count).sum()
    }

    fn reserved(&self) -> Bytes {
        let each = self.sequences.iter().zip(&self.bytes);
        Bytes(each.map(|(s, b)| b.0.saturating_mul(s.count.into())).sum())
    }
}

impl Lowering<'_> {
    /// Serves `all`, group after group.
    pub(super) fn continuous(
        &mut self,
        all: Vec<Sequences>,
        admission: Admission,
        nodes: &mut Vec<Node>,
    ) {
        let mut waiting = self.waiting(all, admission);
        let mut running = Running { sequences: Vec::new(), bytes: Vec::new() };
        loop {
            while let Some(joining) = next(&mut waiting, &running, admission) {
                self.others_follow = !waiting.is_empty() || !running.sequences.is_empty();
                let Waiting { mut sequences, bytes } = joining;
                self.prefill_staggered(&mut sequences, 1, nodes);
                self.look_ahead(std::slice::from_mut(&mut sequences), nodes);
                if sequences.generated < sequences.osl {
                    running.sequences.push(sequences);
                    running.bytes.push(bytes);
                }
            }
            if running.sequences.is_empty() {
                return;
            }
            self.others_follow = !waiting.is_empty();
            self.decode_to_an_end(&mut running.sequences, nodes);
            let stay: Vec<bool> = running.sequences.iter().map(|s| s.generated < s.osl).collect();
            let mut stays = stay.iter();
            running.bytes.retain(|_| stays.next() == Some(&true));
            running.sequences.retain(|s| s.generated < s.osl);
        }
    }

    fn waiting(&self, all: Vec<Sequences>, admission: Admission) -> VecDeque<Waiting> {
        let mut known: Vec<((Tokens, Tokens), Bytes)> = Vec::new();
        let mut reservation = |s: &Sequences| {
            if admission.kv.is_none() {
                return Bytes(0);
            }
            let lengths = (s.isl, s.osl);
            if let Some((_, bytes)) = known.iter().find(|(l, _)| *l == lengths) {
                return *bytes;
            }
            let bytes = self.alone(s.isl, s.osl);
            known.push((lengths, bytes));
            bytes
        };
        all.into_iter()
            .map(|sequences| Waiting { bytes: reservation(&sequences), sequences })
            .collect()
    }

    /// What the caches of one sequence of these lengths hold at most.
    fn alone(&self, isl: Tokens, osl: Tokens) -> Bytes {
        let group = Group { sequences: 1, isl, osl, hit: 0 };
        let load = Load::new(vec![group], Schedule::Static);
        // What can't be lowered alone can't be lowered at all, and that has been checked.
        lower(self.model, self.policy, &load, self.setup).map_or(Bytes(0), |program| {
            let peaks = kv_peaks(&program);
            peaks.prefill.max(peaks.decode) + kv_spread(&program)
        })
    }
}

/// The requests that can join now: as many equal ones as there is room for.
fn next(
    waiting: &mut VecDeque<Waiting>,
    running: &Running,
    admission: Admission,
) -> Option<Waiting> {
    let first = waiting.front_mut()?;
    let places = admission.places.map_or(u32::MAX, |p| p.max(1).saturating_sub(running.count()));
    let room = admission.kv.map_or(u32::MAX, |kv| {
        let free = kv.saturating_sub(running.reserved());
        u32::try_from(free.0 / first.bytes.0.max(1)).unwrap_or(u32::MAX)
    });
    // Whoever does not fit alone would wait for ever; the run is then refused by its peak.
    let least = u32::from(running.sequences.is_empty());
    let count = places.min(room).max(least).min(first.sequences.count);
    if count == 0 {
        return None;
    }
    let bytes = first.bytes;
    let joining = Sequences { count, ..first.sequences.clone() };
    first.sequences.first += count;
    first.sequences.count -= count;
    if first.sequences.count == 0 {
        waiting.pop_front();
    }
    Some(Waiting { sequences: joining, bytes })
}

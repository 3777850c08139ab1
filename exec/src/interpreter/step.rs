//! What a step says of its rows and of who takes part in an op, whatever runs it.

use batchmax_sim::op::{Branch, Lane, Lanes};
use batchmax_sim::program::StepView;

use super::SequenceState;

/// Tokens and positions of the step's rows, and sequence, first row and rows of each sequence in it. The memory is the caller's.
pub(crate) struct StepRows<'a> {
    pub(crate) ids: &'a mut Vec<u32>,
    pub(crate) positions: &'a mut Vec<u32>,
    pub(crate) sequences: &'a mut Vec<(u32, usize, usize)>,
}

impl StepRows<'_> {
    /// Gathers them, sequence after sequence, and notes what the step adds to each.
    pub(crate) fn gather(self, view: &StepView<'_>, lanes: &Lanes, states: &mut [SequenceState]) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        for lane in lanes.as_slice() {
            for index in lane.first..lane.first + lane.sequences {
                let state = &mut states[index as usize];
                // Rows that speculate leave nothing behind.
                state.step = lane.rows - view.pass.ahead.min(lane.rows);
                self.sequences.push((index, self.ids.len(), lane.rows as usize));
                state.put_ids(view.pass.phase, lane.rows, self.ids);
                self.positions.extend(state.seen..state.seen + lane.rows);
            }
        }
    }
}

/// The sequences of `lanes` that take part in an op, where some are stale; `None`: all do.
pub(crate) fn taking_part(branch: Branch, lanes: &Lanes, stale: &[u32]) -> Option<Lanes> {
    let wanted = match branch {
        Branch::All => return None,
        Branch::Stale { .. } => true,
        Branch::Fresh { .. } => false,
    };
    let one = |l: &Lane, first: u32| Lane { first, sequences: 1, ..*l };
    let taken: Vec<Lane> = (lanes.as_slice().iter())
        .flat_map(|l| (l.first..l.first + l.sequences).map(move |s| one(l, s)))
        .filter(|lane| stale.contains(&lane.first) == wanted)
        .collect();
    Some(Lanes::new(&taken))
}

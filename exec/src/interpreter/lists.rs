//! What ops list anew each time, in memory that is taken over: a step in which nothing is dropped asks the system for none
//! (`tests/allocations.rs`).

use batchmax_kernels::append::AppendItem;
use batchmax_kernels::attend::AttendItem;
use batchmax_kernels::rank::TallyItem;
use batchmax_sim::op::Lane;

/// Memory of lists that live for one op; the next one takes it over ([`batchmax_kernels::lists::recycle`]).
#[derive(Default)]
pub(super) struct Lists {
    pub(super) lanes: Vec<Lane>,
    pub(super) appends: Vec<AppendItem<'static>>,
    pub(super) attends: Vec<AttendItem<'static>>,
    pub(super) tallies: Vec<TallyItem<'static>>,
    /// Scores whose eviction is over: at most those of a layer.
    pub(super) scores: Vec<Vec<f32>>,
}

/// First row and number of rows, in the step, of each sequence of `lanes`, which may be some of the step's.
pub(super) fn rows_in<'a>(
    step_rows: &'a [(u32, usize, usize)],
    lanes: &'a [Lane],
) -> impl Iterator<Item = (usize, usize)> + 'a {
    let wanted = lanes.iter().flat_map(|l| l.first..l.first + l.sequences);
    let mut step = step_rows.iter();
    wanted.filter_map(move |sequence| {
        step.find(|(s, ..)| *s == sequence).map(|(_, first, rows)| (*first, *rows))
    })
}

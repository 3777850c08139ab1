//! Which candidates are shown, and in which order.

use super::answer::Found;
use super::app::{App, Sort};

impl App {
    /// Candidates of the table, in its order.
    pub fn table(&self) -> Vec<usize> {
        let Some((found, _)) = self.found() else { return Vec::new() };
        let wanted = self.filter.to_lowercase();
        let line = |i: &usize| {
            let c = &found.candidates[*i];
            format!("{} {} {}", c.preset, c.schedule, found.host(c).gpu).to_lowercase()
        };
        let mut rows: Vec<usize> =
            found.shown.iter().copied().filter(|i| line(i).contains(&wanted)).collect();
        let by = |i: &usize, of: fn(&batchmax_sim::plan::Answer) -> f64| {
            found.candidates[*i].answer.as_ref().map_or(f64::INFINITY, of)
        };
        match self.sort {
            Sort::Rank => {}
            Sort::Name => rows.sort_by_key(|i| found.candidates[*i].preset.clone()),
            Sort::Ttft => rows.sort_by(|a, b| {
                by(a, |a| a.metrics.ttft.0).total_cmp(&by(b, |a| a.metrics.ttft.0))
            }),
            Sort::Tpot => rows.sort_by(|a, b| {
                by(a, |a| a.metrics.tpot.0).total_cmp(&by(b, |a| a.metrics.tpot.0))
            }),
            Sort::Memory => rows.sort_by(|a, b| {
                let total = |a: &batchmax_sim::plan::Answer| a.footprint.total().0 as f64;
                by(a, total).total_cmp(&by(b, total))
            }),
        }
        rows
    }

    /// Candidates on a front, ordered along it.
    pub fn front(&self) -> Vec<usize> {
        let Some((_, found)) = &self.answers.frontier else { return Vec::new() };
        let on = |i: &usize| {
            let marks = found.marks[*i];
            if self.by_memory { marks.memory } else { marks.tpot }
        };
        let mut list: Vec<usize> = (0..found.candidates.len()).filter(on).collect();
        list.sort_by(|a, b| self.x_of(found, *a).total_cmp(&self.x_of(found, *b)));
        list
    }

    /// Where a candidate stands on the lower axis of the frontier.
    pub fn x_of(&self, found: &Found, index: usize) -> f64 {
        let answer = found.candidates[index].answer.as_ref();
        answer.map_or(0.0, |a| match self.by_memory {
            true => a.footprint.total().0 as f64,
            false => a.metrics.tpot.0,
        })
    }
}

//! `batchmax plan`: the ranking, what binds each candidate, what one change would buy, where compression pays, and how to
//! go on.

mod advice;
mod curves;
mod question;
mod report;
pub mod show;

use anyhow::Result;
use batchmax_sim::plan::{Candidate, Host, marks};

use crate::cli::{Global, PlanCommand};
use crate::commands::Outcome;
use crate::report::{answer, typed};
use crate::setting::Places;

pub use advice::Advice;
pub use curves::{Curve, curves};
pub use question::{Question, quality_of};
pub use report::{csv_text, report};

/// Gains below this are not worth another policy: +5 %.
pub const WORTH: f64 = 1.05;

/// What was found.
pub struct Plan {
    /// Where it was searched.
    pub hosts: Vec<Host>,
    /// The best first.
    pub candidates: Vec<Candidate>,
    /// What was not tried, and why.
    pub left_out: Vec<String>,
}

impl Plan {
    /// Where a candidate runs.
    pub fn host(&self, candidate: &Candidate) -> &Host {
        &self.hosts[candidate.host]
    }
}

/// Plans and prints.
pub fn run(places: &Places, command: &PlanCommand, global: &Global) -> Result<Outcome> {
    let (args, output) = (&command.plan, &command.output);
    let question = Question::new(places, args)?;
    let plan = question.plan()?;
    let marks = marks(&plan.candidates, question.objective);
    let advice = Advice::of(&question, &plan)?;
    let page = match output.wants_report() {
        true => Some(report(&question, &plan, &marks, &advice, typed())?),
        false => None,
    };
    if let Some(page) = &page {
        output.write(page)?;
    }
    answer(&if global.json {
        show::document(&question, &plan, &marks, &advice)
    } else if output.csv {
        csv_text(&plan, &marks)?
    } else if let Some(page) = page.filter(|_| output.markdown) {
        page.markdown()
    } else {
        show::text(&question, &plan, &marks, &advice)
    });
    let fits = plan.candidates.iter().any(|c| c.answer.is_some());
    Ok(if fits { Outcome::Answered } else { Outcome::No })
}

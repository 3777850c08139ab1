//! `batchmax plan`: the ranking, what binds each candidate, what one change would buy, where compression pays, and how to
//! go on.

mod advice;
mod question;
mod show;

use anyhow::Result;
use batchmax_sim::plan::{Candidate, Host, marks};

use crate::cli::{Global, PlanArgs};
use crate::commands::Outcome;
use crate::report::answer;
use crate::setting::Places;

use advice::Advice;
use question::Question;

/// Gains below this are not worth another policy: +5 %.
const WORTH: f64 = 1.05;

/// What was found.
struct Plan {
    hosts: Vec<Host>,
    /// The best first.
    candidates: Vec<Candidate>,
}

impl Plan {
    fn host(&self, candidate: &Candidate) -> &Host {
        &self.hosts[candidate.host]
    }
}

/// Plans and prints.
pub fn run(places: &Places, args: &PlanArgs, global: &Global) -> Result<Outcome> {
    let question = Question::new(places, args)?;
    let plan = question.plan()?;
    let marks = marks(&plan.candidates, question.objective);
    let advice = Advice::of(&question, &plan)?;
    answer(&if global.json {
        show::document(&question, &plan, &marks, &advice)
    } else {
        show::text(&question, &plan, &marks, &advice)
    });
    let fits = plan.candidates.iter().any(|c| c.answer.is_some());
    Ok(if fits { Outcome::Answered } else { Outcome::No })
}

//! Writes the answer of a query to a file, in the format that its name asks for.

use std::path::Path;

use anyhow::{Result, bail};

use super::worker::plan_args;
use crate::commands::plan::{Advice, Question, csv_text, report, show};
use crate::paths::write_whole;
use crate::report::quoted;
use crate::setting::Places;
use batchmax_sim::plan::marks;

/// Formats by ending.
const KNOWN: &str = ".html, .json, .csv, .md, .svg, .txt";

/// Plans once more and writes.
pub fn write(places: &Places, args: &[String], path: &str) -> Result<()> {
    let command = format!("batchmax plan {}", quoted(args));
    let args = plan_args(args)?;
    let question = Question::new(places, &args)?;
    let plan = question.plan()?;
    let marks = marks(&plan.candidates, question.objective);
    let advice = Advice::of(&question, &plan)?;
    let path = Path::new(path);
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let text = match ending {
        "json" => show::document(&question, &plan, &marks, &advice),
        "csv" => csv_text(&plan, &marks)?,
        "html" => report(&question, &plan, &marks, &advice, command)?.html()?,
        "md" => report(&question, &plan, &marks, &advice, command)?.markdown(),
        "svg" => match report(&question, &plan, &marks, &advice, command)?.svg()? {
            Some(svg) => svg,
            None => bail!("{}: there is nothing to plot", path.display()),
        },
        "txt" => show::text(&question, &plan, &marks, &advice),
        _ => bail!("{}: the ending says the format; hint: one of {KNOWN}", path.display()),
    };
    write_whole(path, text)
}

//! Where an answer goes: tables on stdout, or a page, a picture, Markdown, CSV.

use anyhow::{Result, bail};

use super::page::Report;
use crate::cli::OutputArgs;
use crate::paths::write_whole;

impl OutputArgs {
    /// Whether a report is wanted at all.
    pub fn wants_report(&self) -> bool {
        self.html.is_some() || self.svg.is_some() || self.markdown
    }

    /// Writes the files that are asked for.
    pub fn write(&self, report: &Report) -> Result<()> {
        if let Some(path) = &self.html {
            write_whole(path, report.html()?)?;
        }
        if let Some(path) = &self.svg {
            match report.svg()? {
                Some(svg) => write_whole(path, svg)?,
                None => bail!("--svg {}: there is nothing to plot", path.display()),
            }
        }
        Ok(())
    }
}

/// Rows as CSV.
pub fn csv(head: &[&str], rows: &[Vec<String>]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(head)?;
    for row in rows {
        writer.write_record(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

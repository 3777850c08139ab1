//! Answers on stdout, everything else on stderr. One format a file.

pub mod json;
pub mod table;

use std::io::Write;

/// Prints an answer. A reader that closed its end is no error.
pub fn answer(text: &str) {
    let mut out = std::io::stdout().lock();
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    write!(out, "{text}{newline}").ok();
}

/// A remark beside the answer, on stderr.
pub fn remark(quiet: bool, text: &str) {
    if !quiet {
        writeln!(std::io::stderr().lock(), "{text}").ok();
    }
}

/// An error: one line, its causes joined, and the hint on a line of its own.
pub fn complain(error: &anyhow::Error) {
    complain_text(&format!("{error:#}"));
}

/// The same for what the parser of the command line says: its first paragraph, and its tip or where to read on.
pub fn complain_usage(error: &clap::Error) {
    let text = error.to_string();
    let mut paragraphs = text.split("\n\n");
    let problem = paragraphs.next().unwrap_or_default().trim_start_matches("error: ");
    let tip = paragraphs.find_map(|p| p.trim().strip_prefix("tip: "));
    let hint = tip.unwrap_or("batchmax --help, or --help after a command");
    complain_text(&format!("{problem}; hint: {hint}"));
}

fn complain_text(text: &str) {
    // Texts quote names and files: nothing in them may start a line or steer the terminal.
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut err = std::io::stderr().lock();
    match text.split_once("; hint: ") {
        Some((problem, hint)) => writeln!(err, "error: {problem}\nhint: {hint}").ok(),
        None => writeln!(err, "error: {text}").ok(),
    };
}

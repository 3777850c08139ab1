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
    let text = format!("{error:#}").replace('\n', " ");
    let mut err = std::io::stderr().lock();
    match text.split_once("; hint: ") {
        Some((problem, hint)) => writeln!(err, "error: {problem}\nhint: {hint}").ok(),
        None => writeln!(err, "error: {text}").ok(),
    };
}

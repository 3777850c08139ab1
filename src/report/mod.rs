//! Answers on stdout, everything else on stderr. One format a file.

pub mod figure;
pub mod json;
pub mod memory;
pub mod output;
pub mod page;
pub mod progress;
pub mod table;

use std::io::Write;

/// Prints an answer. A reader that closed its end is no error.
pub fn answer(text: &str) {
    let mut out = std::io::stdout().lock();
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    write!(out, "{text}{newline}").ok();
}

/// The command that was typed.
pub fn typed() -> String {
    let words: Vec<String> = std::env::args().skip(1).collect();
    format!("batchmax {}", quoted(&words))
}

/// Words of a command as a shell reads them.
pub fn quoted(words: &[String]) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=%+@".contains(c);
    let quote = |word: &String| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
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

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_for_a_shell() {
        let words = ["--model", "my model's.gguf", "25%", ""].map(str::to_owned);
        assert_eq!(quoted(&words), r"--model 'my model'\''s.gguf' 25% ''");
    }
}

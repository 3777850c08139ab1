//! What the documentation says to type is accepted, and answers where that needs neither a model nor minutes.

mod common;

use std::path::{Path, PathBuf};

use common::Place;

/// Commands that run models, open a screen, read files that are not here or write where the reader wants it: their words
/// are only checked.
const NOT_RUN: [&str; 13] = [
    "tui",
    "fetch",
    "import",
    "profile",
    "calibrate",
    "score",
    "run",
    "validate",
    "compare",
    "quality",
    "prepare",
    "doctor",
    "man",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and the pages below docs/.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![root().join("README.md")];
    for entry in std::fs::read_dir(root().join("docs")).expect("docs").flatten() {
        pages.extend(Some(entry.path()).filter(|p| p.extension().is_some_and(|e| e == "md")));
    }
    pages.sort();
    pages
}

/// One line that calls the program.
struct Line {
    place: String,
    words: Vec<String>,
    /// Where its output goes.
    to: Option<String>,
    run: bool,
}

/// Words as a shell makes them; quotes hold words together, `#` begins a comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut open) = (Vec::new(), String::new(), None, false);
    for c in line.chars() {
        match (quote, c) {
            (None, '\'' | '"') => (quote, open) = (Some(c), true),
            (Some(q), c) if q == c => quote = None,
            (None, '#') if word.is_empty() && !open => break,
            (None, c) if c.is_whitespace() => {
                if open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            (_, c) => word.push(c),
        }
    }
    if open || !word.is_empty() {
        words.push(word);
    }
    words
}

/// The program's lines of a page's `sh` blocks.
fn lines(page: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(page).expect("a page");
    let name = page.file_name().expect("a name").to_string_lossy().into_owned();
    let (mut inside, mut run, mut before) = (false, true, String::new());
    let mut found = Vec::new();
    let mut begun: Option<String> = None;
    for (i, line) in text.lines().enumerate() {
        let joined = begun.take().map(|b| format!("{b} {}", line.trim()));
        let own = joined.as_deref().unwrap_or(line.trim());
        if inside && let Some(start) = own.strip_suffix('\\') {
            begun = Some(start.trim_end().to_owned());
            continue;
        }
        if own == "```sh" {
            (inside, run) = (true, before != "<!-- no test -->");
        } else if own == "```" {
            inside = false;
        } else if inside && own.starts_with("batchmax ") {
            let (own, to) = match own.split_once(" > ") {
                Some((own, to)) => (own, to.split_whitespace().next().map(str::to_owned)),
                None => (own, None),
            };
            let words: Vec<String> = words(own).into_iter().skip(1).collect();
            let first = words.first().cloned().unwrap_or_default();
            let files = words.iter().any(|w| w.ends_with(".csv") || w.ends_with("FILES"));
            let run = run && !files && !NOT_RUN.contains(&first.as_str());
            found.push(Line { place: format!("{name}:{}", i + 1), words, to, run });
        }
        if !own.is_empty() {
            before = own.to_owned();
        }
    }
    found
}

#[test]
fn every_example_is_accepted() {
    let place = Place::new();
    let mut count = 0;
    for line in pages().iter().flat_map(|p| lines(p)) {
        // Help comes after all words before it were read and found good.
        let mut words: Vec<&str> = line.words.iter().map(String::as_str).collect();
        words.push("--help");
        let ran = place.run(&words);
        // Parts that not every build has.
        if ran.err.contains("unrecognized subcommand") && cfg!(not(feature = "exec")) {
            continue;
        }
        assert_eq!(ran.code, Some(0), "{}: {}", line.place, ran.err);
        count += 1;
    }
    assert!(count > 30, "{count} examples");
}

#[test]
fn examples_that_only_predict_answer() {
    for page in pages() {
        let place = Place::new();
        let (mut ran, mut needs_a_profile) = (0, 0);
        for line in lines(&page).iter().filter(|l| l.run) {
            let words: Vec<&str> = line.words.iter().map(String::as_str).collect();
            let result = place.run(&words);
            if result.err.contains("no kernel profile of this machine") {
                needs_a_profile += 1;
                continue;
            }
            assert!(
                matches!(result.code, Some(0 | 1)),
                "{}: {}: {}",
                line.place,
                result.command,
                result.err
            );
            if let Some(to) = &line.to {
                place.write(to, &result.out);
            }
            ran += 1;
        }
        let name = page.display();
        assert!(ran >= needs_a_profile, "{name}: {ran} answered, {needs_a_profile} need a profile");
    }
}

#[test]
fn links_lead_somewhere() {
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("a page");
        for part in text.split("](").skip(1) {
            let target = part.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = page.parent().expect("a folder").join(target);
            assert!(path.exists(), "{}: {target}", page.display());
        }
    }
}

#[test]
fn every_preset_is_described() {
    let text = std::fs::read_to_string(root().join("docs/policies.md")).expect("the page");
    for entry in std::fs::read_dir(root().join("profiles/policies")).expect("presets").flatten() {
        let name = entry.path().file_stem().expect("a name").to_string_lossy().into_owned();
        // In the first column of a table or in the text.
        assert!(text.contains(&format!("`{name}`")), "docs/policies.md lacks {name}");
    }
}

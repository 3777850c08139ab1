//! How far something long is.

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::Global;

/// A bar on stderr for what takes more than two seconds: done, rate, time left. Nothing is drawn where stderr is no
/// terminal.
pub fn bar(global: &Global, total: u64, what: &str) -> ProgressBar {
    if global.quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let style =
        ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len} {per_sec} {eta} left");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

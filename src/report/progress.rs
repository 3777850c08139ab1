//! How far something long is.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::Global;

/// Where nothing says how long something takes, that it takes long is said after so much.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar on stderr for what takes more than two seconds: done, rate, time left. Nothing is drawn where stderr is no
/// terminal.
pub fn bar(global: &Global, total: u64, what: &str) -> ProgressBar {
    styled(global, total, what, "{msg:24} {wide_bar} {pos}/{len} {per_sec} {eta} left")
}

fn styled(global: &Global, total: u64, what: &str, template: &str) -> ProgressBar {
    if global.quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// A bar of what is mostly over at once: drawn only when it takes long.
pub struct Late {
    bar: ProgressBar,
    since: Instant,
    waits: bool,
}

impl Late {
    /// Of so many steps.
    pub fn new(global: &Global, total: u64, what: &str) -> Self {
        let bar = bar(global, total, what);
        bar.set_draw_target(ProgressDrawTarget::hidden());
        Self { bar, since: Instant::now(), waits: !global.quiet }
    }

    /// One more is done.
    pub fn step(&mut self) {
        self.bar.inc(1);
        if self.waits && self.since.elapsed() > PATIENCE {
            self.waits = false;
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar of bytes that come.
#[cfg(feature = "exec")]
pub struct Bytes(ProgressBar);

#[cfg(feature = "exec")]
impl Bytes {
    /// Of so many.
    pub fn new(global: &Global, total: u64, what: &str) -> Self {
        let template = "{msg:24} {wide_bar} {decimal_bytes}/{decimal_total_bytes} \
            {decimal_bytes_per_sec} {eta} left";
        Self(styled(global, total, what, template))
    }

    /// So many are there.
    pub fn at(&self, done: u64) {
        self.0.set_position(done);
    }
}

#[cfg(feature = "exec")]
impl Drop for Bytes {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// What turns until it is over.
pub struct Turning(ProgressBar);

impl Turning {
    /// Nobody can say how much is left: how long it has been is shown.
    pub fn new(global: &Global, what: &str) -> Self {
        let bar = styled(global, 0, what, "{spinner} {msg} {elapsed}");
        bar.enable_steady_tick(Duration::from_millis(250));
        Self(bar)
    }
}

impl Drop for Turning {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

//! Six roles of colour, the signs that stand for meaning, and what a terminal without colour or Unicode shows instead.

use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier, Style};

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Theme {
    /// Colours; else bold, dim and reverse alone.
    pub colour: bool,
    /// Only ASCII.
    pub ascii: bool,
}

impl Theme {
    /// By the environment: `NO_COLOR`, `TERM=dumb`, the locale.
    pub fn of_environment(ascii: bool) -> Self {
        let value = |name: &str| std::env::var(name).unwrap_or_default();
        let plain = !value("NO_COLOR").is_empty() || value("TERM") == "dumb";
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].map(value).into_iter().find(|v| !v.is_empty());
        let locale = locale.unwrap_or_default().to_lowercase();
        let unicode = locale.contains("utf-8") || locale.contains("utf8");
        Self { colour: !plain, ascii: ascii || !unicode }
    }
}

/// Text.
pub const TEXT: Style = Style::new();
/// Frames, hints, what is old.
pub const DIM: Style = Style::new().fg(Color::DarkGray).add_modifier(Modifier::DIM);
/// What is chosen, and heads.
pub const ACCENT: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
/// Fits, pays.
pub const GOOD: Style = Style::new().fg(Color::Green);
/// To be taken with care.
pub const WARN: Style = Style::new().fg(Color::Yellow);
/// Does not fit, failed.
pub const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
/// The row under the cursor.
pub const CURSOR: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Colours of series, in their order; letters tell them apart too.
pub const SERIES: [Color; 6] =
    [Color::Cyan, Color::Yellow, Color::Green, Color::Magenta, Color::Blue, Color::Red];

/// What stands for a sign where only ASCII can be shown.
fn plain(c: char) -> char {
    match c {
        '●' | '█' | '▉' | '▊' | '▋' | '▌' => '#',
        '◐' | '▍' | '▎' | '▏' => '+',
        '◔' | '~' => '~',
        '○' => 'o',
        '×' => 'x',
        '·' | '┄' | '─' | '—' | '…' | '╌' => '-',
        '│' | '┤' | '├' => '|',
        '┌' | '┐' | '└' | '┘' | '┼' | '┬' | '┴' | '±' => '+',
        '▸' | '→' => '>',
        '◂' | '←' => '<',
        '↑' => '^',
        '↓' => 'v',
        '≤' => '<',
        '≥' => '>',
        '✓' => '*',
        '\u{2801}'..='\u{28ff}' => '.',
        '\u{2800}' => ' ',
        c if c.is_ascii() => c,
        _ => '?',
    }
}

/// Makes a drawn screen what the terminal can show.
pub fn finish(theme: Theme, buffer: &mut Buffer) {
    if theme.colour && !theme.ascii {
        return;
    }
    for cell in &mut buffer.content {
        if !theme.colour {
            cell.fg = Color::Reset;
            cell.bg = Color::Reset;
        }
        if theme.ascii && !cell.symbol().is_ascii() {
            let c = cell.symbol().chars().next().map_or(' ', plain);
            cell.set_char(c);
        }
    }
}

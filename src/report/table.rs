//! Tables for people.

use batchmax_sim::memory::Footprint;
use batchmax_sim::timeline::Source;
use comfy_table::{CellAlignment, Table};

/// Columns with a head; all but the first `left` ones are numbers and stand right.
pub fn table(head: &[&str], rows: Vec<Vec<String>>, left: usize) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(head.to_vec());
    table.add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding(if i == 0 { (0, 1) } else { (1, 1) });
        if i >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// Tables as Markdown.
pub fn markdown(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut out = line(head.iter().map(|h| (*h).to_owned()).collect());
    out += &line(head.iter().map(|_| "---".to_owned()).collect());
    for row in rows {
        out += &line(row.clone());
    }
    out
}

/// The weakest of some sources, in words.
pub fn weakest(sources: impl Iterator<Item = Source>) -> String {
    let source = sources.max().unwrap_or_default();
    format!("the weakest source: {} {}.", sign(source), source.name())
}

/// The sign of a source: how far to trust a number.
pub fn sign(source: Source) -> &'static str {
    match source {
        Source::Run | Source::Measured => "●",
        Source::Interpolated => "◐",
        Source::Extrapolated => "◔",
        Source::Roofline => "○",
    }
}

/// The legend of [`sign`].
pub const LEGEND: &str = "● measured  ◐ interpolated  ◔ extrapolated  ○ roofline";

/// `+3.1 %`.
pub fn percent(fraction: f64) -> String {
    format!("{:+.1} %", fraction * 100.0)
}

/// `±12 %`.
pub fn plus_minus(fraction: f64) -> String {
    format!("±{:.0} %", fraction * 100.0)
}

/// Three significant digits.
pub fn rate(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A footprint, one line a kind.
pub fn memory(footprint: &Footprint) -> String {
    let mut lines = vec![
        ("weights", footprint.weights),
        ("kv, prefill peak", footprint.kv_prefill_peak),
        ("kv, decode peak", footprint.kv_decode_peak),
        ("activations", footprint.activations),
        ("bookkeeping", footprint.bookkeeping),
        ("runtime", footprint.runtime),
        ("total", footprint.total()),
    ];
    if footprint.away.0 > 0 {
        lines.push(("in slower memory", footprint.away));
    }
    if footprint.kv_spread.0 > 0 {
        lines.push(("kv spread, most", footprint.kv_spread));
    }
    lines.iter().map(|(name, bytes)| format!("  {name:<18}{bytes:>10}\n")).collect()
}

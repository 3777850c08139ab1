//! The candidate under the cursor, op by op: time, share of the roofline, and what a run of it measured.

use batchmax_sim::op::Phase;
use batchmax_sim::units::{Bytes, Seconds};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use serde_json::Value;

use super::{fresh, series, split_columns, split_rows};
use crate::report::table;
use crate::tui::answer::{OpRow, Ops};
use crate::tui::app::App;
use crate::tui::plot::{Axis, Plot, Series, short};
use crate::tui::theme::{ACCENT, DIM, TEXT};
use crate::tui::trial::Trial;
use crate::tui::widgets::{Column, Table, bar, frame, put, wrapped};

impl App {
    /// What is known op by op, and whether it is of what is selected now.
    fn ops(&self) -> Option<(&Ops, bool)> {
        let (query, of, ops) = self.answers.ops.as_ref()?;
        Some((ops.as_deref()?, *query == self.query && *of == self.selected))
    }

    /// The rows that are shown, in their order.
    pub fn op_rows(&self) -> Vec<&OpRow> {
        let Some((ops, _)) = self.ops() else { return Vec::new() };
        let shown = |r: &&OpRow| self.phase.is_none_or(|p| p == r.phase) && r.time.0 > 0.0;
        let mut rows: Vec<&OpRow> = ops.rows.iter().filter(shown).collect();
        if self.by_name {
            rows.sort_by_key(|r| (r.phase as usize, r.name));
        }
        rows
    }

    /// What the last run measured, where it was of the candidate under the cursor.
    fn measured(&self) -> Option<&Vec<Value>> {
        let Trial::Done { command, document, .. } = &self.trial else { return None };
        if self.run_arguments().ok()? != *command {
            return None;
        }
        document.pointer("/comparison/rows")?.as_array()
    }
}

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let Some((ops, new)) = app.ops() else {
        let inner = frame(buffer, area, "Ops", true);
        let text = match app.candidate() {
            Some((_, c)) if c.answer.is_none() => "the selected candidate does not fit",
            _ => "asking…",
        };
        put(buffer, inner.x + 1, inner.y, inner.width.saturating_sub(1), text, DIM);
        return;
    };
    let lower = if area.height >= 20 { (area.height / 3).max(8) } else { 0 };
    let (upper, lower) = split_rows(area, area.height - lower);
    let phase = app.phase.map_or("both phases", Phase::name);
    let total = ops.answer.metrics.total;
    let title = format!("{} · {phase} · all {total}", ops.title);
    let inner = frame(buffer, upper, &title, !app.inputs);
    rows(app, ops, new, buffer, inner);
    let wide = lower.width >= 84;
    let (left, right) = split_columns(lower, if wide { lower.width / 2 } else { lower.width });
    match app.measured() {
        Some(measured) => compared(measured, buffer, left),
        None if wide => roofline(app, ops, buffer, left),
        None => detail(app, ops, buffer, left),
    }
    if wide {
        detail(app, ops, buffer, right);
    }
}

fn rows(app: &App, ops: &Ops, new: bool, buffer: &mut Buffer, inner: Rect) {
    let rows = app.op_rows();
    let total = ops.answer.metrics.total.0.max(f64::MIN_POSITIVE);
    let of = |f: &dyn Fn(&OpRow) -> String| rows.iter().map(|r| f(r)).collect::<Vec<_>>();
    let widest = rows.iter().map(|r| r.time.0).fold(f64::MIN_POSITIVE, f64::max);
    let roof = |r: &OpRow| {
        r.floor
            .filter(|_| r.time.0 > 0.0)
            .map_or_else(String::new, |(least, _)| format!("{:.0} %", 100.0 * least.0 / r.time.0))
    };
    let bound = |r: &OpRow| match r.floor {
        Some((_, true)) => "memory".to_owned(),
        Some((_, false)) => "compute".to_owned(),
        None => String::new(),
    };
    let mut bars = Column::left("", 5, of(&|r| format!("{:<12}", bar(r.time.0 / widest, 12))));
    bars.style = series(0);
    let columns = vec![
        Column::left("op", 0, of(&|r| r.name.to_owned())),
        Column::left("phase", 0, of(&|r| r.phase.name().to_owned())),
        Column::right("time", 0, of(&|r| r.time.to_string())),
        Column::right("share", 0, of(&|r| format!("{:.1} %", 100.0 * r.time.0 / total))),
        Column::right("of roofline", 1, of(&roof)),
        Column::left("bound", 2, of(&bound)),
        Column::right("launches", 4, of(&|r| short(r.launches))),
        Column::right("FLOPs", 6, of(&|r| short_si(r.flops))),
        Column::right("bytes", 6, of(&|r| Bytes(r.bytes as u64).to_string())),
        Column::left("", 0, of(&|r| table::sign(r.source).to_owned())),
        bars,
    ];
    let cursor = Some(app.rows[0].min(rows.len().saturating_sub(1)));
    Table { columns, cursor, style: fresh(new), marked: Vec::new() }.draw(buffer, inner);
}

/// `3.1G`.
fn short_si(value: f64) -> String {
    const UNITS: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    let (mut value, mut unit) = (value, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{}{}", table::rate(value), UNITS[unit])
}

/// FLOPs per second against FLOPs per byte, with the device's roof.
fn roofline(app: &App, ops: &Ops, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, &format!("Roofline of {}", ops.gpu), false);
    let point = |r: &&OpRow| {
        let known = r.flops > 0.0 && r.bytes > 0.0 && r.time.0 > 0.0;
        known.then(|| (r.flops / r.bytes, r.flops / r.time.0))
    };
    let rows = app.op_rows();
    let of = |phase: Phase| rows.iter().filter(|r| r.phase == phase).filter_map(point).collect();
    let mut points: Vec<(f64, f64)> = rows.iter().filter_map(point).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut all = vec![
        Series {
            points: of(Phase::Prefill),
            style: series(1),
            sign: 'p',
            joined: false,
            end: None,
        },
        Series { points: of(Phase::Decode), style: series(0), sign: 'd', joined: false, end: None },
    ];
    if let (Some(peak), Some(first), Some(last)) = (ops.peaks.0, points.first(), points.last()) {
        let roof = |x: f64| (x, (x * ops.peaks.1).min(peak));
        let ridge = (peak / ops.peaks.1).clamp(first.0, last.0.max(first.0));
        let roof = vec![roof(first.0), roof(ridge), roof(last.0)];
        all.push(Series { points: roof, style: DIM, sign: '·', joined: true, end: None });
    }
    let cursor = rows.get(app.rows[0]).and_then(point);
    let plot = Plot {
        x: Axis { log: true, label: "FLOPs a byte (p prefill, d decode)".into(), number: short },
        y: Axis { log: true, label: "FLOP/s".into(), number: short_si },
        series: all,
        cursor,
    };
    plot.draw(buffer, inner);
}

fn detail(app: &App, ops: &Ops, buffer: &mut Buffer, area: Rect) {
    let rows = app.op_rows();
    let Some(row) = rows.get(app.rows[0].min(rows.len().saturating_sub(1))) else { return };
    let inner = frame(buffer, area, &format!("{} in {}", row.name, row.phase.name()), false);
    let m = &ops.answer.metrics;
    let mut lines = vec![
        format!(
            "kernel family {}, {} launches of {}",
            row.family,
            short(row.launches),
            Seconds(row.time.0 / row.launches.max(1.0))
        ),
        format!(
            "{} FLOPs and {} moved: {} FLOPs a byte",
            short_si(row.flops),
            Bytes(row.bytes as u64),
            short(row.flops / row.bytes.max(1.0))
        ),
    ];
    lines.push(match row.floor {
        Some((least, by_memory)) => format!(
            "the data sheet allows {least}, set by {}: {:.0} % of the time",
            if by_memory { "memory" } else { "compute" },
            100.0 * least.0 / row.time.0
        ),
        None => "no roofline is known for it".to_owned(),
    });
    lines.push(format!("source: {} {}", table::sign(row.source), row.source.name()));
    let [prefill, decode] = ops.overhead;
    lines.push(format!("steps beside ops: {prefill} in prefill, {decode} in decode"));
    lines.push(format!(
        "TTFT {}, TPOT {}, {} tokens/s {}",
        m.ttft,
        m.tpot,
        table::rate(m.output_tokens_per_s),
        table::plus_minus(m.error)
    ));
    let mut y = inner.y;
    for line in lines {
        let room = Rect { y, height: inner.bottom().saturating_sub(y), ..inner };
        y += wrapped(buffer, room, &line, TEXT);
    }
}

/// Prediction beside the last run of this candidate, by kernel family.
fn compared(measured: &[Value], buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "Predicted ○ against measured ●", false);
    let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_lowercase();
    let seconds = |v: &Value, key: &str| Seconds(v[key].as_f64().unwrap_or_default()).to_string();
    let error = |v: &Value| table::percent(v["error"].as_f64().unwrap_or_default());
    let of = |f: &dyn Fn(&Value) -> String| measured.iter().map(f).collect::<Vec<_>>();
    let mut family = Column::left("op", 0, of(&|v| text(v, "family")));
    family.style = ACCENT;
    let columns = vec![
        family,
        Column::left("phase", 2, of(&|v| text(v, "phase"))),
        Column::right("predicted", 0, of(&|v| seconds(v, "predicted"))),
        Column::right("measured", 0, of(&|v| seconds(v, "measured"))),
        Column::right("error", 0, of(&error)),
    ];
    Table { columns, cursor: None, style: TEXT, marked: Vec::new() }.draw(buffer, inner);
}

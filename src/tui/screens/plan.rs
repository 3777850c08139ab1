//! Ranked candidates, the memory of the one under the cursor, throughput against batch, what one change would do.

use batchmax_sim::plan::{Bound, Candidate, Objective};
use batchmax_sim::units::Bytes;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::{fresh, letter, series, split_columns, split_rows};
use crate::commands::plan::show;
use crate::report::table;
use crate::tui::app::{App, Sort};
use crate::tui::plot::{Axis, Plot, Series, short};
use crate::tui::theme::{BAD, DIM, GOOD, TEXT, WARN};
use crate::tui::widgets::{Column, Table, bar, frame, parts, put, put_right, wrapped};

/// Rows of the memory pane.
const MEMORY: u16 = 11;

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    // What is dropped first where there is no room: the chart, then the advice, then the memory.
    let small = area.height < 24;
    let below = if small { MEMORY.min(area.height / 2) } else { (area.height / 3).max(MEMORY) };
    let advice = if area.height >= 32 { 9.min(area.height - 2 * below) } else { 0 };
    let (ranking, rest) = split_rows(area, area.height - below - advice);
    candidates(app, buffer, ranking);
    let (lower, last) = split_rows(rest, below);
    if lower.width >= 84 {
        let (left, right) = split_columns(lower, lower.width * 9 / 20);
        memory(app, buffer, left);
        chart(app, buffer, right);
    } else {
        memory(app, buffer, lower);
    }
    if advice > 0 {
        advise(app, buffer, last);
    }
}

fn candidates(app: &App, buffer: &mut Buffer, area: Rect) {
    let sorted = match app.sort {
        Sort::Rank => "best first",
        Sort::Ttft => "by TTFT",
        Sort::Tpot => "by TPOT",
        Sort::Memory => "by memory",
        Sort::Name => "by name",
    };
    let filter =
        if app.filter.is_empty() { String::new() } else { format!(", with \"{}\"", app.filter) };
    let title = format!("Candidates, {sorted}{filter}");
    let inner = frame(buffer, area, &title, !app.inputs);
    let Some((found, new)) = app.found() else {
        return nothing(app, buffer, inner);
    };
    let rows = app.table();
    if rows.is_empty() {
        put(buffer, inner.x + 1, inner.y, inner.width - 1, "no candidate is so named", DIM);
        return;
    }
    let of = |f: &dyn Fn(&Candidate) -> String| -> Vec<String> {
        rows.iter().map(|i| f(&found.candidates[*i])).collect()
    };
    let answer = |f: fn(&batchmax_sim::plan::Answer) -> String| {
        of(&|c| c.answer.as_ref().map_or_else(String::new, f))
    };
    let several = found.hosts.len() > 1;
    let host = |c: &Candidate| {
        let host = found.host(c);
        let tp = if host.tp > 1 { format!(" tp {}", host.tp) } else { String::new() };
        let copies = if c.replicas > 1 { format!("{} x ", c.replicas) } else { String::new() };
        format!("{copies}{}{tp} {}", host.gpu, host.kv)
    };
    let rate = of(&|c| c.answer.as_ref().map_or_else(String::new, |_| table::rate(c.throughput())));
    let mut columns = vec![Column::left("policy", 0, of(&|c| c.preset.clone()))];
    if several || found.gpus > 1 {
        columns.push(Column::left("on", 3, of(&host)));
    }
    columns.extend([
        Column::left("schedule", 5, of(&|c| c.schedule.to_string())),
        Column::left("limited by", 4, of(&show::limited)),
        Column::left("mostly", 8, of(&show::mostly)),
        Column::left(
            "front",
            9,
            rows.iter().map(|i| show::front(found.marks[*i]).into()).collect(),
        ),
        Column::right("batch", 1, answer(|a| a.batch.to_string())),
        Column::right("tok/s", 0, rate),
        Column::right("", 2, answer(|a| table::plus_minus(a.metrics.error))),
        Column::right("TTFT", 2, answer(|a| a.metrics.ttft.to_string())),
        Column::right("TPOT", 1, answer(|a| a.metrics.tpot.to_string())),
        Column::right("KV prefill", 6, answer(|a| a.footprint.kv_prefill_peak.to_string())),
        Column::right("KV decode", 6, answer(|a| a.footprint.kv_decode_peak.to_string())),
        Column::right("total", 7, answer(|a| a.footprint.total().to_string())),
        Column::right("", 0, answer(|a| table::sign(a.metrics.source).to_owned())),
    ]);
    if found.objective != Objective::Output {
        let value = match found.objective {
            Objective::Cost => {
                of(&|c| c.usd_per_million().map_or_else(String::new, |usd| format!("{usd:.3}")))
            }
            _ => of(&|c| table::rate(c.per_gpu())),
        };
        let head = if found.objective == Objective::Cost { "USD/M" } else { "per GPU" };
        columns.push(Column::right(head, 0, value));
    }
    let recommended = app.answers.advised.as_ref().filter(|(q, _)| *q == app.query);
    let recommended = recommended.and_then(|(_, a)| a.recommended);
    let mark = |(row, i): (usize, &usize)| {
        let style = match &found.candidates[*i].answer {
            _ if recommended == Some(*i) => GOOD,
            Some(_) => return None,
            None => BAD,
        };
        Some((row, style))
    };
    let marked = rows.iter().enumerate().filter_map(mark).collect();
    let cursor = rows.iter().position(|i| *i == app.selected);
    let style = if new { Style::new() } else { DIM };
    Table { columns, cursor, style, marked }.draw(buffer, inner);
}

/// Where there is no answer yet: why.
fn nothing(app: &App, buffer: &mut Buffer, inner: Rect) {
    let room = Rect { x: inner.x + 1, width: inner.width.saturating_sub(2), ..inner };
    let Some(why) = app.failed() else {
        put(buffer, room.x, room.y, room.width, "asking…", DIM);
        return;
    };
    let (problem, hint) = why.split_once("; hint: ").unwrap_or((why, ""));
    let used = wrapped(buffer, room, problem, BAD);
    if !hint.is_empty() {
        let rest = Rect { y: room.y + used, height: room.height.saturating_sub(used), ..room };
        wrapped(buffer, rest, &format!("hint: {hint}"), TEXT);
    }
}

fn memory(app: &App, buffer: &mut Buffer, area: Rect) {
    let title = app.candidate().map_or_else(
        || "Memory".to_owned(),
        |(_, c)| {
            let batch =
                c.answer.as_ref().map_or_else(String::new, |a| format!(", batch {}", a.batch));
            format!("Memory of a device: {}{batch}", c.preset)
        },
    );
    let inner = frame(buffer, area, &title, false);
    let Some((found, c)) = app.candidate() else { return };
    let new = app.found().is_some_and(|(_, new)| new);
    let host = found.host(c);
    let Some(answer) = &c.answer else {
        let text = format!("{}; the device has {}", show::limited(c), host.memory);
        wrapped(buffer, inner, &text, BAD);
        return;
    };
    let f = &answer.footprint;
    let limit = host.memory;
    let whole = limit.max(f.total()).0.max(1) as f64;
    let rows: Vec<(&str, Bytes, Style)> = vec![
        ("weights", f.weights, series(4)),
        ("kv, prefill peak", f.kv_prefill_peak, peak(f.kv_prefill_peak, f.kv_decode_peak)),
        ("kv, decode peak", f.kv_decode_peak, peak(f.kv_decode_peak, f.kv_prefill_peak)),
        ("activations", f.activations, series(3)),
        ("bookkeeping", f.bookkeeping, series(3)),
        ("runtime", f.runtime, series(3)),
        ("total", f.total(), TEXT),
    ];
    let mut y = inner.y;
    let wide = inner.width.saturating_sub(17 + 11);
    let mut line = |buffer: &mut Buffer, name: &str, bytes: Bytes, style: Style| {
        if y >= inner.bottom() {
            return;
        }
        put(buffer, inner.x, y, 16, name, fresh(new));
        let style = if new { style } else { DIM };
        put(buffer, inner.x + 17, y, wide, &bar(bytes.0 as f64 / whole, wide), style);
        put_right(buffer, inner, y, &bytes.to_string(), fresh(new));
        y += 1;
    };
    for (name, bytes, style) in rows {
        line(buffer, name, bytes, style);
    }
    line(buffer, "free", limit.saturating_sub(f.total()), DIM);
    if let Some(caches) = host.kv_memory {
        line(buffer, "caches, at most", caches, DIM);
    }
}

/// The larger peak is the one that limits.
fn peak(own: Bytes, other: Bytes) -> Style {
    if own >= other { WARN } else { series(0) }
}

fn chart(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "tokens/s against batch; × nothing larger fits", false);
    let curves =
        app.answers.curves.as_ref().filter(|(q, of, _)| *q == app.query && *of == app.selected);
    let Some((_, _, curves)) = curves else {
        put(buffer, inner.x + 1, inner.y, inner.width.saturating_sub(1), "asking…", DIM);
        return;
    };
    let legend = curves.len().min(inner.height.saturating_sub(6) as usize) as u16;
    let (top, rest) = split_rows(inner, legend);
    for (i, curve) in curves.iter().enumerate().take(legend as usize) {
        let (batch, rate) = curve.points.last().copied().unwrap_or_default();
        let why = match curve.bound {
            Bound::Memory => "memory is full".to_owned(),
            other => other.name().to_owned(),
        };
        let sign = format!("{} ", letter(i));
        let text = format!("{}: {} at batch {batch}, {why}", curve.preset, table::rate(rate));
        parts(buffer, top, top.y + i as u16, &[(&sign, series(i)), (&text, TEXT)]);
    }
    let lines = curves.iter().enumerate().map(|(i, curve)| Series {
        points: curve.points.iter().map(|(b, r)| (f64::from(*b), *r)).collect(),
        style: series(i),
        sign: letter(i),
        joined: true,
        end: Some('×'),
    });
    let plot = Plot {
        x: Axis { log: true, label: "batch, sequences".into(), number: short },
        y: Axis { log: false, label: "tokens/s".into(), number: short },
        series: lines.collect(),
        cursor: None,
    };
    plot.draw(buffer, rest);
}

/// What one change would make of it, and where compression pays.
fn advise(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "One change would make it", false);
    let Some((query, advised)) = &app.answers.advised else { return };
    let style = fresh(*query == app.query);
    let left = if inner.width >= 120 { inner.width / 2 } else { inner.width };
    let mut y = inner.y;
    for change in &advised.changes {
        if y >= inner.bottom() || change.len() < 5 {
            break;
        }
        let text = format!(
            "{:<14}{:>7}  {:>16} {:>6}  {}",
            change[0], change[1], change[2], change[3], change[4]
        );
        put(buffer, inner.x, y, left, &text, style);
        y += 1;
    }
    let mut lines = advised.pays.iter();
    let mut line = |buffer: &mut Buffer, x, y, width| {
        if let Some(text) = lines.next() {
            put(buffer, x, y, width, text, style);
        }
    };
    if left < inner.width {
        for y in inner.y..inner.bottom() {
            line(buffer, inner.x + left, y, inner.width - left);
        }
    } else {
        for y in y..inner.bottom() {
            line(buffer, inner.x, y, inner.width);
        }
    }
}

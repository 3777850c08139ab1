//! What no other candidate beats: rate against time per token, or against memory; and pinned ones side by side.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::{fresh, series, split_columns, split_rows};
use crate::report::table;
use crate::tui::app::App;
use crate::tui::plot::{Axis, Plot, Series, short};
use crate::tui::theme::{ACCENT, DIM, GOOD, TEXT};
use crate::tui::widgets::{Column, Table, frame, put};
use batchmax_sim::units::{Bytes, Seconds};

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let pinned = if app.pins.is_empty() { 0 } else { 17.min(area.height / 2) };
    let (upper, lower) = split_rows(area, area.height - pinned);
    if upper.width >= 100 {
        let (left, right) = split_columns(upper, upper.width * 11 / 20);
        chart(app, buffer, left);
        list(app, buffer, right);
    } else if upper.height >= 16 {
        let (top, bottom) = split_rows(upper, upper.height / 2);
        chart(app, buffer, top);
        list(app, buffer, bottom);
    } else {
        list(app, buffer, upper);
    }
    if pinned > 0 {
        side_by_side(app, buffer, lower);
    }
}

fn chart(app: &App, buffer: &mut Buffer, area: Rect) {
    let against = if app.by_memory { "memory of a device" } else { "TPOT" };
    let title = format!("tokens/s against {against}: o no other gives more, · beaten");
    let inner = frame(buffer, area, &title, false);
    let Some((query, found)) = &app.answers.frontier else {
        put(buffer, inner.x + 1, inner.y, inner.width.saturating_sub(1), "asking…", DIM);
        return;
    };
    let y = |i: usize| found.candidates[i].throughput();
    let point = |i: usize| (app.x_of(found, i), y(i));
    let front = app.front();
    let fits = |i: &usize| found.candidates[*i].answer.is_some() && !front.contains(i);
    let beaten = (0..found.candidates.len()).filter(fits).map(point).collect();
    let mut all: Vec<Series> = app
        .pins
        .iter()
        .map(|p| {
            let x = if app.by_memory { p.point.1 } else { p.point.0 };
            Series {
                points: vec![(x, p.point.2)],
                style: GOOD,
                sign: p.letter,
                joined: false,
                end: None,
            }
        })
        .collect();
    all.push(Series {
        points: front.iter().copied().map(point).collect(),
        style: if *query == app.query { series(0) } else { DIM },
        sign: 'o',
        joined: true,
        end: None,
    });
    all.push(Series { points: beaten, style: DIM, sign: '·', joined: false, end: None });
    let (label, number): (&str, fn(f64) -> String) = match app.by_memory {
        true => ("memory of a device", |v| Bytes(v as u64).to_string()),
        false => ("time per output token", |v| Seconds(v).to_string()),
    };
    let plot = Plot {
        x: Axis { log: !app.by_memory, label: label.into(), number },
        y: Axis { log: false, label: "tokens/s".into(), number: short },
        series: all,
        cursor: front.get(app.rows[1]).copied().map(point),
    };
    plot.draw(buffer, inner);
}

fn list(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "On the front", !app.inputs);
    let Some((query, found)) = &app.answers.frontier else { return };
    let rows = app.front();
    let of = |f: &dyn Fn(&batchmax_sim::plan::Candidate) -> String| -> Vec<String> {
        rows.iter().map(|i| f(&found.candidates[*i])).collect()
    };
    let answer = |f: fn(&batchmax_sim::plan::Answer) -> String| {
        of(&|c| c.answer.as_ref().map_or_else(String::new, f))
    };
    let columns = vec![
        Column::left("policy", 0, of(&|c| c.preset.clone())),
        Column::left("schedule", 3, of(&|c| c.schedule.to_string())),
        Column::left("on", 5, of(&|c| found.host(c).gpu.clone())),
        Column::right("batch", 1, answer(|a| a.batch.to_string())),
        Column::right("tok/s", 0, of(&|c| table::rate(c.throughput()))),
        Column::right("TPOT", 0, answer(|a| a.metrics.tpot.to_string())),
        Column::right("TTFT", 4, answer(|a| a.metrics.ttft.to_string())),
        Column::right("memory", 2, answer(|a| a.footprint.total().to_string())),
    ];
    let cursor = Some(app.rows[1].min(rows.len().saturating_sub(1)));
    let style = if *query == app.query { Style::new() } else { fresh(false) };
    Table { columns, cursor, style, marked: Vec::new() }.draw(buffer, inner);
}

/// One column a pinned scenario.
fn side_by_side(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "Pinned, side by side", false);
    let count = app.pins.len() as u16;
    let wide = (inner.width.saturating_sub(12) / count.max(1)).min(40);
    for (index, pin) in app.pins.iter().enumerate() {
        let x = inner.x + 12 + wide * index as u16;
        put(buffer, x, inner.y, wide.saturating_sub(1), &format!("{}", pin.letter), ACCENT);
        for (row, (name, value)) in pin.facts.iter().enumerate() {
            let y = inner.y + 1 + row as u16;
            if y >= inner.bottom() {
                break;
            }
            if index == 0 {
                put(buffer, inner.x, y, 11, name, DIM);
            }
            let first = app.pins.first().and_then(|p| p.facts.get(row)).map(|(_, v)| v);
            // What differs from the first is what one looks for.
            let style = if index > 0 && first != Some(value) { ACCENT } else { TEXT };
            put(buffer, x, y, wide.saturating_sub(1), value, style);
        }
    }
}

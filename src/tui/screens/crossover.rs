//! A map over context and memory: who wins, and where compression does not pay.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::{letter, series, split_rows};
use crate::report::table;
use crate::tui::app::App;
use crate::tui::map::Winner;
use crate::tui::theme::{BAD, CURSOR, DIM, TEXT};
use crate::tui::widgets::{frame, put, put_right, wrapped};
use batchmax_sim::units::Bytes;

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let Some((query, axes)) = &app.answers.axes else {
        let inner = frame(buffer, area, "Crossover", true);
        let text = app.failed().unwrap_or("asking…");
        put(buffer, inner.x + 1, inner.y, inner.width.saturating_sub(1), text, DIM);
        return;
    };
    let of = if axes.caches { "memory of caches" } else { "memory of a device" };
    let done = app.answers.columns.iter().filter(|c| c.is_some()).count();
    let new = *query == app.query;
    let state = match (new, done == axes.contexts.len()) {
        (false, _) => ", of an older query".to_owned(),
        (true, true) => String::new(),
        (true, false) => format!(", {done} of {} columns", axes.contexts.len()),
    };
    let title = format!("Who gives most on {}: {of} against prompt tokens{state}", axes.gpu);
    let inner = frame(buffer, area, &title, !app.inputs);
    let kinds = kinds(app);
    let rows = axes.memories.len() as u16;
    // Where there is room, gains stand below the letters.
    let tall = if inner.height > 2 * rows + 6 { 2 } else { 1 };
    let (map, rest) = split_rows(inner, (tall * rows + 1).min(inner.height.saturating_sub(4)));
    cells(app, buffer, map, &kinds, tall);
    let (under, legend) = split_rows(rest, 3);
    wrapped(buffer, under, &under_cursor(app), TEXT);
    let mut x = legend.x;
    let mut y = legend.y;
    let fixed = [("· no compression, or less than 5 % more", DIM), ("× nothing fits", BAD)];
    let named: Vec<(String, _)> = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| (format!("{} {kind}", letter(i)), series(i)))
        .chain(fixed.map(|(text, style)| (text.to_owned(), style)))
        .collect();
    for (text, style) in named {
        let width = text.chars().count() as u16 + 3;
        if x + width > legend.right() {
            (x, y) = (legend.x, y + 1);
        }
        if y >= legend.bottom() {
            break;
        }
        put(buffer, x, y, width, &text, style);
        x += width;
    }
}

/// Policies that win somewhere, in the order of their first letters' use: the most frequent first.
fn kinds(app: &App) -> Vec<String> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for winner in app.answers.columns.iter().flatten().flatten().flatten().filter(|w| w.pays) {
        match counts.iter_mut().find(|(kind, _)| *kind == winner.kind) {
            Some((_, count)) => *count += 1,
            None => counts.push((winner.kind.clone(), 1)),
        }
    }
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts.into_iter().map(|(kind, _)| kind).collect()
}

fn cells(app: &App, buffer: &mut Buffer, area: Rect, kinds: &[String], tall: u16) {
    const LEFT: u16 = 10;
    let Some((_, axes)) = &app.answers.axes else { return };
    let columns = axes.contexts.len() as u16;
    let wide = ((area.width.saturating_sub(LEFT)) / columns.max(1)).clamp(2, 7);
    for (row, memory) in axes.memories.iter().enumerate() {
        let y = area.y + tall * row as u16;
        if y + tall >= area.bottom() {
            break;
        }
        let own = if row == axes.own.1 { TEXT } else { DIM };
        put_right(buffer, Rect { width: LEFT - 1, ..area }, y, &Bytes(memory.0).to_string(), own);
        for column in 0..axes.contexts.len() {
            let x = area.x + LEFT + wide * column as u16;
            let known = app.answers.columns.get(column).and_then(|c| c.as_ref());
            let (text, style) = match known.map(|cells| &cells[row]) {
                None => ("?".to_owned(), DIM),
                Some(None) => ("×".to_owned(), BAD),
                Some(Some(winner)) => cell(winner, kinds, wide * tall),
            };
            // Signs for nothing are longer than a byte and have no gain behind them.
            match text.split_at_checked(1) {
                Some((letter, gain)) if tall == 2 => {
                    put(buffer, x, y, 1, letter, style);
                    put(buffer, x, y + 1, wide - 1, gain, DIM);
                }
                _ => {
                    put(buffer, x, y, wide - 1, &text, style);
                }
            }
            if app.cell == (column, row) {
                buffer.set_style(Rect { x, y, width: wide - 1, height: tall }, CURSOR);
            }
        }
    }
    let y = area.bottom() - 1;
    let mut free = 0;
    for (column, context) in axes.contexts.iter().enumerate() {
        let x = area.x + LEFT + wide * column as u16;
        let text = tokens(*context);
        if x >= free && (column % 2 == 0 || wide >= 6) {
            let style = if column == axes.own.0 { TEXT } else { DIM };
            free = x + put(buffer, x, y, area.right().saturating_sub(x), &text, style) + 1;
        }
    }
}

fn cell(winner: &Winner, kinds: &[String], wide: u16) -> (String, ratatui::style::Style) {
    let Some(index) = kinds.iter().position(|k| *k == winner.kind).filter(|_| winner.pays) else {
        return ("·".to_owned(), DIM);
    };
    let gain = match winner.gain {
        Some(gain) if wide >= 5 => table::rate(gain).chars().take(3).collect(),
        _ => String::new(),
    };
    (format!("{}{}", letter(index), gain.trim_end_matches('.')), series(index))
}

fn tokens(n: u32) -> String {
    if n.is_multiple_of(1024) {
        format!("{}k", n / 1024)
    } else if n > 9999 {
        format!("{}k", n / 1000)
    } else {
        n.to_string()
    }
}

/// The cell under the cursor in words.
fn under_cursor(app: &App) -> String {
    let Some((_, axes)) = &app.answers.axes else { return String::new() };
    let (column, row) = app.cell;
    let (Some(context), Some(memory)) = (axes.contexts.get(column), axes.memories.get(row)) else {
        return String::new();
    };
    let place = format!("{context} prompt tokens, {memory}: ");
    let known = app.answers.columns.get(column).and_then(|c| c.as_ref());
    place
        + &match known.map(|cells| &cells[row]) {
            None => "not yet searched".to_owned(),
            Some(None) => "nothing fits".to_owned(),
            Some(Some(w)) => {
                let gain = match w.gain {
                    Some(gain) => format!("{gain:.2}x of no compression"),
                    None => "no compression does not fit".to_owned(),
                };
                let rate = table::rate(w.rate);
                format!("{} at batch {}, {rate} tokens/s, {gain}", w.preset, w.batch)
            }
        }
}

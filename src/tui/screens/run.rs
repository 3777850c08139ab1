//! Runs the candidate under the cursor on this machine: progress, measured beside predicted, what to do where they differ.

use batchmax_sim::units::{Bytes, Seconds};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use serde_json::Value;

use super::split_rows;
use crate::report::{quoted, table};
use crate::tui::app::App;
use crate::tui::command::number;
use crate::tui::theme::{ACCENT, BAD, DIM, GOOD, TEXT, WARN};
use crate::tui::trial::{Going, Trial};
use crate::tui::widgets::{Column, Table, bar, frame, parts, put, wrapped};

/// A change of pace above which timing the machine again is offered.
const DRIFT: f64 = 0.1;

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let (upper, lower) = split_rows(area, 9.min(area.height / 2));
    what(app, buffer, upper);
    match &app.trial {
        Trial::Idle => {
            let inner = frame(buffer, lower, "No run yet", false);
            let text = "A run predicts the candidate, runs it with the executor, and shows what differs. \
                        It is a process of its own: the planner goes on.";
            wrapped(buffer, inner, text, DIM);
        }
        Trial::Going(going) => progress(app, going, buffer, lower),
        Trial::Done { command, document, good } => {
            if command.first().is_some_and(|c| c == "validate") {
                result(document, *good, buffer, lower);
            } else {
                let inner = frame(buffer, lower, "Done", true);
                let text =
                    "This machine was timed anew; answers are asked again with what it takes now.";
                wrapped(buffer, inner, text, GOOD);
            }
        }
        Trial::Failed { command, why } => {
            let inner = frame(buffer, lower, "The run failed; the planner goes on", true);
            let mut y = inner.y;
            let text = format!("batchmax {}", quoted(command));
            for (text, style) in std::iter::once((&text, DIM)).chain(why.iter().map(|w| (w, BAD))) {
                let room = Rect { y, height: inner.bottom().saturating_sub(y), ..inner };
                y += wrapped(buffer, room, text, style);
            }
        }
    }
}

/// What would run, and how long that would take.
fn what(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "Would run on this machine", !app.inputs);
    let mut y = inner.y;
    let mut say = |text: &str, style| {
        let room = Rect { y, height: inner.bottom().saturating_sub(y), ..inner };
        y += wrapped(buffer, room, text, style);
    };
    match app.run_arguments() {
        Err(why) => {
            for part in why.split("; ") {
                say(part, WARN);
            }
        }
        Ok(args) => {
            if let Some((_, c)) = app.candidate()
                && let Some(a) = &c.answer
            {
                let m = &a.metrics;
                let text = format!(
                    "{} at batch {}: predicted {} {}, {} tokens/s, {} of memory",
                    c.preset,
                    a.batch,
                    m.total,
                    table::plus_minus(m.error),
                    table::rate(m.output_tokens_per_s),
                    a.footprint.total()
                );
                say(&text, TEXT);
                if m.total.0 > 120.0 {
                    say("that is long: a smaller batch or output makes it shorter", WARN);
                }
            }
            say(&format!("batchmax {}", quoted(&args)), DIM);
        }
    }
}

fn progress(app: &App, going: &Going, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, &format!("Running: {}", going.label), true);
    let spent = app.now - going.since;
    let share = if going.total > 0 { going.done as f64 / going.total as f64 } else { 0.0 };
    let wide = inner.width.saturating_sub(2);
    put(buffer, inner.x + 1, inner.y, wide, &bar(share, wide), ACCENT);
    let left = if share > 0.0 {
        format!(", about {} left", Seconds(spent * (1.0 - share) / share))
    } else {
        String::new()
    };
    let text = format!("{} of {} steps after {}{left}", going.done, going.total, Seconds(spent));
    put(buffer, inner.x + 1, inner.y + 1, wide, &text, TEXT);
    let hint = if going.stopping { "stopping…" } else { "x cancels" };
    put(buffer, inner.x + 1, inner.y + 2, wide, hint, DIM);
}

fn result(document: &Value, good: bool, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "Measured ● beside predicted ○", true);
    let of = |path: &str| number(document, path);
    let size = |path: &str| of(path).map_or_else(String::new, |b| Bytes(b as u64).to_string());
    let rate = |path: &str| of(path).map_or_else(String::new, table::rate);
    let error = |p: &str, m: &str| match (of(p), of(m)) {
        (Some(p), Some(m)) => table::percent(batchmax_sim::timeline::relative_error(p, m)),
        _ => String::new(),
    };
    let mut rows = Vec::new();
    let same = |base: &str, key: &str| format!("{base}/{key}");
    let pair = |key: &str| (same("/predicted/metrics", key), same("/measured", key));
    let sizes = |key: &str| (same("/predicted/memory", key), same("/measured", key));
    let process =
        ("/predicted/memory/total_bytes".to_owned(), "/measured/peak_rss_bytes".to_owned());
    /// A name, where the two numbers stand, how they are written.
    type Kind<'a> = (&'a str, (String, String), &'a dyn Fn(&str) -> String);
    let kinds: [Kind<'_>; 6] = [
        ("read, tokens/s", pair("prefill_tok_s"), &rate),
        ("generated, tokens/s", pair("decode_tok_s"), &rate),
        ("output, tokens/s", pair("output_tok_s"), &rate),
        ("KV, prefill peak", sizes("kv_prefill_peak_bytes"), &size),
        ("KV, decode peak", sizes("kv_decode_peak_bytes"), &size),
        ("process", process, &size),
    ];
    for (name, (p, m), show) in &kinds {
        rows.push([(*name).to_owned(), show(p), show(m), error(p, m)]);
    }
    let column = |i: usize| rows.iter().map(|r| r[i].clone()).collect::<Vec<_>>();
    let columns = vec![
        Column::left("", 0, column(0)),
        Column::right("predicted", 0, column(1)),
        Column::right("measured", 0, column(2)),
        Column::right("error", 0, column(3)),
    ];
    let (head, rest) = split_rows(inner, 8);
    Table { columns, cursor: None, style: TEXT, marked: Vec::new() }.draw(buffer, head);
    let mut y = rest.y;
    let error = of("/total_error").unwrap_or_default();
    let tolerance = of("/tolerance").unwrap_or_default();
    let (word, style) = if good { ("within tolerance", GOOD) } else { ("beyond tolerance", BAD) };
    let text =
        format!(": total time {} (tolerance {:.0} %)", table::percent(error), tolerance * 100.0);
    if y < rest.bottom() {
        parts(buffer, rest, y, &[(word, style), (&text, TEXT)]);
        y += 1;
    }
    let pace = ["prefill", "decode"].map(|k| of(&format!("/pace/{k}")).unwrap_or(1.0));
    if pace.iter().any(|p| (p - 1.0).abs() > DRIFT) || !good {
        let at = of("/error_at_pace").unwrap_or_default();
        let text = format!(
            "The machine takes {:.2} times as long to read and {:.2} times as long to generate as when it was timed; \
             at that pace the error is {}. p times it anew (minutes).",
            pace[0],
            pace[1],
            table::percent(at)
        );
        let room = Rect { y, height: rest.bottom().saturating_sub(y), ..rest };
        wrapped(buffer, room, &text, WARN);
    }
}

//! What policies were measured to lose, against the bytes that they keep.

use batchmax_sim::profile::QualityRow;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::{series, split_rows};
use crate::tui::app::App;
use crate::tui::plot::{Axis, Plot, Series, short};
use crate::tui::theme::{DIM, TEXT, WARN};
use crate::tui::widgets::{Column, Table, frame, put, wrapped};
use batchmax_sim::units::Bytes;

impl App {
    /// Measurements in the order of the table.
    pub fn quality_rows(&self) -> Vec<&QualityRow> {
        let Some((_, Some(measured))) = &self.answers.quality else { return Vec::new() };
        let mut rows: Vec<&QualityRow> = measured.quality.row.iter().collect();
        if self.by_name {
            rows.sort_by(|a, b| a.policy.cmp(&b.policy));
        } else {
            rows.sort_by(|a, b| a.kl.total_cmp(&b.kl));
        }
        rows
    }
}

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let Some((_, found)) = &app.answers.quality else {
        let inner = frame(buffer, area, "Quality", true);
        put(buffer, inner.x + 1, inner.y, inner.width.saturating_sub(1), "asking…", DIM);
        return;
    };
    let Some(measured) = found else {
        let inner = frame(buffer, area, "Quality", true);
        let text = "nothing was measured; batchmax quality measures it on a model that is here";
        wrapped(buffer, inner, text, WARN);
        return;
    };
    let high = if area.height >= 26 {
        area.height / 2
    } else if area.height >= 18 {
        9
    } else {
        0
    };
    let (upper, lower) = split_rows(area, high);
    let rows = app.quality_rows();
    let own = if measured.own { "" } else { ", which stands for the model asked about" };
    let title = format!("Loss against bytes, measured on {}{own}", measured.quality.name);
    if high > 0 {
        let inner = frame(buffer, upper, &title, false);
        // What loses nothing has no place on an axis of magnitudes.
        let point = |r: &&QualityRow| (r.kl > 0.0).then_some((r.kv_bytes_per_token, r.kl));
        let whole = |r: &&&QualityRow| r.chunk.is_none();
        let of = |chunked: bool| {
            let chosen = rows.iter().filter(|r| whole(r) != chunked);
            chosen.filter_map(point).collect::<Vec<_>>()
        };
        let kind = |points, style, sign| Series { points, style, sign, joined: false, end: None };
        let cursor = rows.get(app.rows[2]).and_then(point);
        let plot = Plot {
            x: Axis {
                log: true,
                label: "cache bytes a prompt token (o read whole, c by chunks)".into(),
                number: short,
            },
            y: Axis { log: true, label: "KL, nats".into(), number: short },
            series: vec![kind(of(false), series(0), 'o'), kind(of(true), series(1), 'c')],
            cursor,
        };
        plot.draw(buffer, inner);
    }
    let title = if high > 0 { measured.quality.about.clone() } else { title };
    let inner = frame(buffer, lower, &title, !app.inputs);
    let of = |f: &dyn Fn(&QualityRow) -> String| rows.iter().map(|r| f(r)).collect::<Vec<_>>();
    let columns = vec![
        Column::left("policy", 0, of(&|r| r.policy.clone())),
        Column::right(
            "budget",
            1,
            of(&|r| r.budget.map_or_else(String::new, |b| format!("{:.0} %", b * 100.0))),
        ),
        Column::right("chunk", 3, of(&|r| r.chunk.map_or_else(String::new, |c| c.to_string()))),
        Column::right("context", 4, of(&|r| r.context.to_string())),
        Column::right("bytes/token", 2, of(&|r| Bytes(r.kv_bytes_per_token as u64).to_string())),
        Column::right("KL", 0, of(&|r| format!("{:.3}", r.kl))),
        Column::right("90 % interval", 5, of(&|r| format!("{:.3} to {:.3}", r.kl_low, r.kl_high))),
        Column::right("same top", 6, of(&|r| format!("{:.1} %", 100.0 * r.top1))),
        Column::right(
            "recall",
            1,
            of(&|r| r.recall.map_or_else(String::new, |x| format!("{:.1} %", 100.0 * x))),
        ),
        Column::right("quoted", 7, of(&|r| format!("{:.1} %", 100.0 * r.copy_top1))),
    ];
    let cursor = Some(app.rows[2].min(rows.len().saturating_sub(1)));
    Table { columns, cursor, style: TEXT, marked: Vec::new() }.draw(buffer, inner);
}

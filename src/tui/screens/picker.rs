//! The list to choose from, above the screen.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::widgets::{Clear, Widget};

use crate::tui::app::{App, Mode};
use crate::tui::draw::line_of_text;
use crate::tui::form::FIELDS;
use crate::tui::theme::{ACCENT, CURSOR, DIM, TEXT};
use crate::tui::widgets::{frame, put, put_right};

pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    let Mode::Picking(picker) = &app.mode else { return };
    let width = area.width.saturating_sub(6).min(84);
    let height = area.height.saturating_sub(4).min(30);
    let place = Rect { x: area.x + 3, y: area.y + 2, width, height };
    Clear.render(place, buffer);
    let field = &FIELDS[picker.field];
    let inner = frame(buffer, place, &format!("{}: type parts of a name", field.label), true);
    let line = Rect { x: inner.x + 2, width: inner.width.saturating_sub(3), height: 1, ..inner };
    put(buffer, inner.x, inner.y, 1, ">", ACCENT);
    line_of_text(buffer, line, &picker.line);
    let matches = picker.matches();
    let room = inner.height.saturating_sub(3) as usize;
    let first = picker.cursor.saturating_sub(room / 2).min(matches.len().saturating_sub(room));
    let names = matches.iter().map(|i| i.name.chars().count()).max().unwrap_or_default() as u16;
    for (row, item) in matches.iter().skip(first).take(room).enumerate() {
        let y = inner.y + 1 + row as u16;
        let marked = picker.marked.contains(&item.name);
        if picker.several.is_some() {
            put(buffer, inner.x, y, 1, if marked { "✓" } else { " " }, ACCENT);
        }
        let style = if marked { ACCENT } else { TEXT };
        put(buffer, inner.x + 2, y, inner.width.saturating_sub(2), &item.name, style);
        let note = inner.x + 4 + names;
        put(buffer, note, y, inner.right().saturating_sub(note), &item.note, DIM);
        if first + row == picker.cursor {
            buffer.set_style(Rect { y, height: 1, ..inner }, CURSOR);
        }
    }
    let last = inner.bottom() - 1;
    let taken = format!("Enter takes: {}", picker.chosen());
    put(buffer, inner.x, last, inner.width.saturating_sub(12), &taken, DIM);
    let below = matches.len().saturating_sub(first + room);
    put_right(buffer, inner, last, &format!("↑{first} ↓{below}"), DIM);
}

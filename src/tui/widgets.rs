//! Frames, tables and bars, on a buffer.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::symbols::border;

use super::theme::{ACCENT, CURSOR, DIM, TEXT};
use ratatui::widgets::{Block, Widget};

/// A frame with a title; bright where it has the focus. The room inside.
pub fn frame(buffer: &mut Buffer, area: Rect, title: &str, focused: bool) -> Rect {
    let style = if focused { ACCENT } else { DIM };
    let block = Block::bordered().border_set(border::PLAIN).border_style(style);
    let inner = block.inner(area);
    block.render(area, buffer);
    if area.width > 4 {
        let title = format!(" {title} ");
        let head = if focused { ACCENT } else { TEXT };
        put(buffer, area.x + 1, area.y, area.width - 2, &title, head);
    }
    inner
}

/// Text at a place, cut to a width; an ellipsis says so. Cells that were taken.
pub fn put(buffer: &mut Buffer, x: u16, y: u16, width: u16, text: &str, style: Style) -> u16 {
    if width == 0 || !buffer.area.contains((x, y).into()) {
        return 0;
    }
    let width = width.min(buffer.area.right() - x);
    let long = text.chars().count() > width as usize;
    let room = if long { width as usize - 1 } else { width as usize };
    let (end, _) = buffer.set_stringn(x, y, text, room, style);
    if long {
        buffer.set_stringn(end, y, "…", 1, style);
        return (end + 1).saturating_sub(x);
    }
    end - x
}

/// Text that ends at a right edge.
pub fn put_right(buffer: &mut Buffer, area: Rect, y: u16, text: &str, style: Style) {
    let width = (text.chars().count() as u16).min(area.width);
    put(buffer, area.right() - width, y, width, text, style);
}

/// Parts of a line, each with its style.
pub fn parts(buffer: &mut Buffer, area: Rect, y: u16, parts: &[(&str, Style)]) {
    let mut x = area.x;
    for (text, style) in parts {
        x += put(buffer, x, y, area.right().saturating_sub(x), text, *style);
    }
}

/// Paragraphs, broken at words; the lines that were drawn.
pub fn wrapped(buffer: &mut Buffer, area: Rect, text: &str, style: Style) -> u16 {
    let mut y = area.y;
    for line in broken(text, area.width as usize) {
        if y >= area.bottom() {
            break;
        }
        put(buffer, area.x, y, area.width, &line, style);
        y += 1;
    }
    y - area.y
}

/// Lines of at most `width` characters.
pub fn broken(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        let room = line.chars().count() + word.chars().count() + 1;
        if !line.is_empty() && room > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    lines.push(line);
    lines
}

/// A column of a table.
pub struct Column {
    pub head: &'static str,
    /// Numbers stand right.
    pub right: bool,
    /// Columns with the largest number are dropped first where there is no room; 0 stays.
    pub drop: u8,
    pub cells: Vec<String>,
    pub style: Style,
}

impl Column {
    /// Of words.
    pub fn left(head: &'static str, drop: u8, cells: Vec<String>) -> Self {
        Self { head, right: false, drop, cells, style: TEXT }
    }

    /// Of numbers.
    pub fn right(head: &'static str, drop: u8, cells: Vec<String>) -> Self {
        Self { head, right: true, drop, cells, style: TEXT }
    }

    fn width(&self) -> usize {
        let widest = self.cells.iter().map(|c| c.chars().count()).max().unwrap_or_default();
        widest.max(self.head.chars().count())
    }
}

/// Rows of which one may be under the cursor; what does not fit is scrolled, and said on the
/// frame below.
pub struct Table {
    pub columns: Vec<Column>,
    pub cursor: Option<usize>,
    /// Style of all cells where it is not text: old answers are dim.
    pub style: Style,
    /// Styles of rows that stand out.
    pub marked: Vec<(usize, Style)>,
}

impl Table {
    /// Draws it.
    pub fn draw(mut self, buffer: &mut Buffer, area: Rect) {
        if area.height < 2 || area.width < 4 {
            return;
        }
        let total = |columns: &[Column]| -> usize {
            columns.iter().map(|c| c.width() + 2).sum::<usize>().saturating_sub(2)
        };
        while total(&self.columns) > area.width as usize {
            let Some(most) = self.columns.iter().map(|c| c.drop).max().filter(|d| *d > 0) else {
                break;
            };
            let at = self.columns.iter().rposition(|c| c.drop == most).unwrap_or_default();
            self.columns.remove(at);
        }
        let rows = self.columns.first().map_or(0, |c| c.cells.len());
        let room = area.height as usize - 1;
        let cursor = self.cursor.unwrap_or_default();
        let first = cursor.saturating_sub(room / 2).min(rows.saturating_sub(room));
        let mut x = area.x;
        // The first column gives way where even the rest is too wide.
        let over = total(&self.columns).saturating_sub(area.width as usize);
        for (index, column) in self.columns.iter().enumerate() {
            let mut width = column.width();
            if index == 0 {
                width = width.saturating_sub(over).max(6);
            }
            let width = (width as u16).min(area.right().saturating_sub(x));
            let place = Rect { x, y: area.y, width, height: area.height };
            let cell = |buffer: &mut Buffer, y, text: &str, style| {
                if column.right {
                    put_right(buffer, place, y, text, style);
                } else {
                    put(buffer, x, y, width, text, style);
                }
            };
            cell(buffer, area.y, column.head, DIM);
            for (line, row) in (first..rows).take(room).enumerate() {
                let marked = self.marked.iter().find(|(r, _)| *r == row).map(|(_, s)| *s);
                let style = column.style.patch(marked.unwrap_or_default()).patch(self.style);
                cell(buffer, area.y + 1 + line as u16, &column.cells[row], style);
            }
            x = (x + width + 2).min(area.right());
        }
        if let Some(cursor) = self.cursor.filter(|c| (first..first + room).contains(c)) {
            let y = area.y + 1 + (cursor - first) as u16;
            buffer.set_style(Rect { y, height: 1, ..area }, CURSOR);
        }
        let below = rows.saturating_sub(first + room);
        if below > 0 || first > 0 {
            let text = format!(" ↑{first} ↓{below} ");
            // On the frame below.
            put_right(buffer, area, area.bottom(), &text, DIM);
        }
    }
}

/// A bar of eighths of blocks.
pub fn bar(share: f64, width: u16) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let eighths = (share * f64::from(width) * 8.0).round() as usize;
    // What is there at all is to be seen.
    let eighths = if share > 0.0 { eighths.max(1) } else { eighths };
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        assert_eq!(bar(0.5, 4), "██");
        assert_eq!(bar(0.0, 4), "");
        assert_eq!(bar(1e-9, 4), "▏");
        assert_eq!(bar(f64::NAN, 4), "");
        assert_eq!(bar(7.0, 2), "██");
    }

    #[test]
    fn lines_are_broken_at_words() {
        assert_eq!(broken("one two three", 8), ["one two", "three"]);
        assert_eq!(broken("", 8), [""]);
        assert_eq!(broken("longerthanthat x", 4), ["longerthanthat", "x"]);
    }
}

//! One screen a file.

mod crossover;
mod frontier;
mod ops;
pub mod picker;
mod plan;
mod quality;
mod run;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::app::{App, Screen};
use super::theme::{DIM, SERIES, TEXT};

/// Draws the screen that is shown.
pub fn draw(app: &App, buffer: &mut Buffer, area: Rect) {
    match app.screen {
        Screen::Plan => plan::draw(app, buffer, area),
        Screen::Ops => ops::draw(app, buffer, area),
        Screen::Frontier => frontier::draw(app, buffer, area),
        Screen::Crossover => crossover::draw(app, buffer, area),
        Screen::Run => run::draw(app, buffer, area),
        Screen::Quality => quality::draw(app, buffer, area),
    }
}

/// The style of an answer: dim where a newer one is awaited.
fn fresh(new: bool) -> Style {
    if new { TEXT } else { DIM }
}

/// Colour of a series.
fn series(index: usize) -> Style {
    Style::new().fg(SERIES[index % SERIES.len()])
}

/// The letter of a series.
fn letter(index: usize) -> char {
    char::from(b'a' + (index % 26) as u8)
}

/// A part of an area: `height` rows at its top, and the rest.
fn split_rows(area: Rect, height: u16) -> (Rect, Rect) {
    let height = height.min(area.height);
    let rest = Rect { y: area.y + height, height: area.height - height, ..area };
    (Rect { height, ..area }, rest)
}

/// The same beside each other.
fn split_columns(area: Rect, width: u16) -> (Rect, Rect) {
    let width = width.min(area.width);
    let rest = Rect { x: area.x + width, width: area.width - width, ..area };
    (Rect { width, ..area }, rest)
}

//! The picture in the README: the real screen as SVG. To make it anew:
//! cargo test --release --no-default-features screenshot -- --ignored

use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier};

use super::Desk;
use crate::report::figure::escaped;

const CELL: (f64, f64) = (8.4, 18.0);
const GROUND: &str = "#14171b";
const INK: &str = "#dfe3e8";

fn colour(c: Color) -> &'static str {
    match c {
        Color::Cyan => "#56c2e6",
        Color::Yellow => "#e6b450",
        Color::Green => "#6cc66c",
        Color::Magenta => "#d781c4",
        Color::Blue => "#7aa2f7",
        Color::Red => "#f2777a",
        Color::DarkGray => "#7d8794",
        _ => INK,
    }
}

/// Ink and ground of a cell, and whether it is bold.
fn look(cell: &Cell) -> (&'static str, Option<&'static str>, bool) {
    let bold = cell.modifier.contains(Modifier::BOLD);
    match cell.modifier.contains(Modifier::REVERSED) {
        true => (GROUND, Some(colour(cell.fg)), bold),
        false => (colour(cell.fg), None, bold),
    }
}

/// A buffer as SVG: cells of one look that follow each other are one text.
fn svg(buffer: &Buffer) -> String {
    let (columns, rows) = (buffer.area.width, buffer.area.height);
    let (wide, high) = (f64::from(columns) * CELL.0 + 20.0, f64::from(rows) * CELL.1 + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {wide:.0} {high:.0}\" role=\"img\" \
         aria-label=\"batchmax tui\" font-family=\"ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace\" font-size=\"14\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{GROUND}\"/>\n"
    );
    for y in 0..rows {
        let mut x = 0;
        while x < columns {
            let (start, first) = (x, look(&buffer[(x, y)]));
            let mut text = String::new();
            while x < columns && look(&buffer[(x, y)]) == first {
                text.push_str(buffer[(x, y)].symbol());
                x += 1;
            }
            let (ink, ground, bold) = first;
            let (left, top) = (10.0 + f64::from(start) * CELL.0, 10.0 + f64::from(y) * CELL.1);
            let length = f64::from(x - start) * CELL.0;
            if let Some(ground) = ground {
                out += &format!(
                    "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{}\" fill=\"{ground}\"/>\n",
                    CELL.1
                );
            }
            if text.trim().is_empty() {
                continue;
            }
            let weight = if bold { " font-weight=\"700\"" } else { "" };
            out += &format!(
                "<text x=\"{left:.1}\" y=\"{:.1}\" textLength=\"{length:.1}\" xml:space=\"preserve\" fill=\"{ink}\"{weight}>{}</text>\n",
                top + 13.5,
                escaped(&text)
            );
        }
    }
    out + "</svg>\n"
}

#[test]
fn a_picture_has_every_word_of_its_screen() {
    let desk = Desk::new(super::QUERY);
    let picture = svg(&desk.draw(120, 40));
    for word in ["plain-7b", "batch-max", "tokens/s against batch"] {
        assert!(picture.contains(word), "{word}");
    }
    assert!(!picture.replace("http://www.w3.org/2000/svg", "").contains("http"));
}

#[test]
#[ignore = "writes docs/screen.svg"]
fn screenshot() {
    let desk = Desk::new("--model llama-3.1-8b --gpu h100-sxm --isl 32k --osl 512");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/screen.svg");
    std::fs::write(path, svg(&desk.draw(130, 42))).expect("writable");
}

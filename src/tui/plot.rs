//! Points and lines on axes with numbers.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::theme::{CURSOR, DIM};
use super::widgets::{put, put_right};

/// One axis.
pub struct Axis {
    pub log: bool,
    pub label: String,
    pub number: fn(f64) -> String,
}

/// Points of one kind.
pub struct Series {
    pub points: Vec<(f64, f64)>,
    pub style: Style,
    /// What stands at its points.
    pub sign: char,
    /// Whether its points are joined.
    pub joined: bool,
    /// What stands at its last point instead.
    pub end: Option<char>,
}

/// All of it.
pub struct Plot {
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// The point under the cursor.
    pub cursor: Option<(f64, f64)>,
}

/// Where a value stands on an axis, from 0 to 1.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
}

impl Scale {
    fn of(axis: &Axis, values: impl Iterator<Item = f64>) -> Option<Self> {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| v.is_finite() && (!axis.log || *v > 0.0)) {
            (low, high) = (low.min(v), high.max(v));
        }
        if low > high {
            return None;
        }
        // Linear axes begin at nothing: heights can be compared.
        let low = if axis.log { low } else { low.min(0.0) };
        let high = if high > low { high } else { low + low.abs().max(1.0) };
        Some(Self { log: axis.log, low, high })
    }

    fn place(&self, value: f64) -> f64 {
        let of = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        ((of(value) - of(self.low)) / (of(self.high) - of(self.low))).clamp(0.0, 1.0)
    }

    fn value(&self, place: f64) -> f64 {
        if self.log {
            (self.low.ln() + place * (self.high.ln() - self.low.ln())).exp()
        } else {
            self.low + place * (self.high - self.low)
        }
    }
}

impl Plot {
    /// Draws it: numbers at the left and below, lines in dots of a quarter of a cell.
    pub fn draw(&self, buffer: &mut Buffer, area: Rect) {
        const LEFT: u16 = 7;
        if area.width < LEFT + 10 || area.height < 5 {
            return;
        }
        let all = || self.series.iter().flat_map(|s| &s.points);
        let x = Scale::of(&self.x, all().map(|p| p.0));
        let y = Scale::of(&self.y, all().map(|p| p.1));
        let (Some(x), Some(y)) = (x, y) else {
            put(buffer, area.x + 1, area.y + 1, area.width - 2, "no points yet", DIM);
            return;
        };
        let inner = Rect {
            x: area.x + LEFT,
            y: area.y + 1,
            width: area.width - LEFT - 1,
            height: area.height - 3,
        };
        put(buffer, area.x, area.y, area.width, &self.y.label, DIM);
        self.axes(buffer, area, inner, &x, &y);
        for series in &self.series {
            if series.joined {
                lines(buffer, inner, series, &x, &y);
            }
        }
        let cell = |p: (f64, f64)| {
            let right = (x.place(p.0) * f64::from(inner.width - 1)).round() as u16;
            let up = (y.place(p.1) * f64::from(inner.height - 1)).round() as u16;
            (inner.x + right, inner.bottom() - 1 - up)
        };
        // The first series are drawn last: they matter most.
        for series in self.series.iter().rev() {
            let last = series.points.len().saturating_sub(1);
            for (i, point) in series.points.iter().enumerate() {
                let sign = series.end.filter(|_| i == last).unwrap_or(series.sign);
                if let Some(cell) = buffer.cell_mut(cell(*point)) {
                    cell.set_char(sign).set_style(series.style);
                }
            }
        }
        if let Some(point) = self.cursor
            && let Some(cell) = buffer.cell_mut(cell(point))
        {
            cell.set_style(CURSOR);
        }
    }

    fn axes(&self, buffer: &mut Buffer, area: Rect, inner: Rect, x: &Scale, y: &Scale) {
        for row in 0..inner.height {
            put(buffer, inner.x - 1, inner.y + row, 1, "│", DIM);
        }
        let marks = if inner.height >= 9 { 3 } else { 2 };
        for i in 0..marks {
            let place = f64::from(i) / f64::from(marks - 1);
            let up = (place * f64::from(inner.height - 1)).round() as u16;
            let row = inner.bottom() - 1 - up;
            let label = Rect { width: inner.x - 1 - area.x, ..area };
            put_right(buffer, label, row, &(self.y.number)(y.value(place)), DIM);
            put(buffer, inner.x - 1, row, 1, "┤", DIM);
        }
        let base = inner.bottom();
        put(buffer, inner.x - 1, base, 1, "└", DIM);
        put(buffer, inner.x, base, inner.width, &"─".repeat(inner.width as usize), DIM);
        let numbers = base + 1;
        let low = (self.x.number)(x.low);
        let high = (self.x.number)(x.high);
        put(buffer, inner.x, numbers, inner.width, &low, DIM);
        put_right(buffer, inner, numbers, &high, DIM);
        let taken = (low.chars().count() + high.chars().count() + 4) as u16;
        let room = inner.width.saturating_sub(taken);
        let label = self.x.label.chars().count() as u16;
        if label <= room {
            let from = inner.x + low.chars().count() as u16 + 2 + (room - label) / 2;
            put(buffer, from, numbers, label, &self.x.label, DIM);
        }
    }
}

fn lines(buffer: &mut Buffer, inner: Rect, series: &Series, x: &Scale, y: &Scale) {
    let (wide, high) = (i32::from(inner.width) * 2 - 1, i32::from(inner.height) * 4 - 1);
    let dot = |p: &(f64, f64)| {
        let right = (x.place(p.0) * f64::from(wide)).round() as i32;
        (right, high - (y.place(p.1) * f64::from(high)).round() as i32)
    };
    for pair in series.points.windows(2) {
        let ((x0, y0), (x1, y1)) = (dot(&pair[0]), dot(&pair[1]));
        let steps = (x1 - x0).abs().max((y1 - y0).abs()).max(1);
        for step in 0..=steps {
            let at = |from: i32, to: i32| from + ((to - from) * step + steps / 2).div_euclid(steps);
            braille(buffer, inner, (at(x0, x1), at(y0, y1)), series.style);
        }
    }
}

/// Sets one of the eight dots of a cell.
fn braille(buffer: &mut Buffer, inner: Rect, (x, y): (i32, i32), style: Style) {
    const BITS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
    let place = (inner.x + (x / 2) as u16, inner.y + (y / 4) as u16);
    let Some(cell) = buffer.cell_mut(place) else { return };
    let now = cell.symbol().chars().next().map_or(0, u32::from);
    let dots = if (0x2800..0x2900).contains(&now) { now - 0x2800 } else { 0 };
    let bit = BITS[(y % 4) as usize][(x % 2) as usize];
    if let Some(c) = char::from_u32(0x2800 + (dots | bit)) {
        cell.set_char(c).set_style(style);
    }
}

/// `1.2k`, `340`, `0.05`.
pub fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 1e6 => format!("{:.1}M", value / 1e6),
        v if v >= 1e4 => format!("{:.0}k", value / 1e3),
        v if v >= 1e3 => format!("{:.1}k", value / 1e3),
        v if v >= 10.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        v if v >= 0.01 => format!("{value:.2}"),
        _ => format!("{value:.0e}"),
    }
}

//! Plots as SVG, drawn by `plotters`.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What and in which unit.
    pub label: String,
    /// By magnitudes.
    pub log: bool,
}

impl Axis {
    /// With even steps.
    pub fn linear(label: &str) -> Self {
        Self { label: label.to_owned(), log: false }
    }

    /// By magnitudes.
    pub fn log(label: &str) -> Self {
        Self { label: label.to_owned(), log: true }
    }
}

/// Points of one kind.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Whether its points are joined.
    pub joined: bool,
    /// Whether its points are marked.
    pub marked: bool,
}

impl Series {
    /// Its line and its mark in a field of 18 by 10, as SVG; `index` is its place among all.
    fn sample(&self, index: usize) -> String {
        let RGBColor(r, g, b) = COLOURS[index % COLOURS.len()];
        let colour = format!("#{r:02x}{g:02x}{b:02x}");
        let line = |path: &str| {
            format!("<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>")
        };
        let mut sample = if self.joined { line("M0 5H18") } else { String::new() };
        if self.marked {
            // As the points are drawn.
            sample += &match index % 3 {
                0 => format!(
                    "<path d=\"M5.5 5a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0\" fill=\"{colour}\"/>"
                ),
                1 => format!("<path d=\"M9 1L13.5 9H4.5Z\" fill=\"{colour}\"/>"),
                _ => line("M5 1L13 9M13 1L5 9"),
            };
        }
        sample
    }
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Figure {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// Where its numbers come from, one line.
    pub source: String,
}

const SIZE: (u32, u32) = (860, 430);
/// Colours that are told apart on light and on dark ground, and without red against green.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x2b, 0x8c, 0xbe),
    RGBColor(0xe6, 0x8a, 0x00),
    RGBColor(0x2c, 0xa2, 0x5f),
    RGBColor(0xc5, 0x1b, 0x8a),
    RGBColor(0x8c, 0x6b, 0xb1),
    RGBColor(0xd7, 0x30, 0x1f),
    RGBColor(0x6b, 0x8e, 0x23),
    RGBColor(0x80, 0x80, 0x80),
];
/// What is to take the colour of the text around the plot.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_TEXT: &str = "#010203";

impl Figure {
    /// As SVG in the colour of the text around it; nothing where there is no point.
    pub fn svg(&self) -> Result<Option<String>> {
        let points = || self.series.iter().flat_map(|s| &s.points).filter(|p| self.shows(p));
        let Some(x) = range(&self.x, points().map(|p| p.0)) else { return Ok(None) };
        let Some(y) = range(&self.y, points().map(|p| p.1)) else { return Ok(None) };
        let mut text = String::new();
        self.drawn(&mut text, x, y).map_err(|e| anyhow!("{}: {e}", self.title))?;
        let label = escaped(&format!("{}: {} against {}", self.title, self.y.label, self.x.label));
        let text = text.replace(INK_TEXT, "currentColor");
        Ok(Some(text.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{label}\" "), 1)))
    }

    fn shows(&self, point: &(f64, f64)) -> bool {
        let fits = |axis: &Axis, v: f64| v.is_finite() && (!axis.log || v > 0.0);
        fits(&self.x, point.0) && fits(&self.y, point.1)
    }

    fn drawn(&self, text: &mut String, x: (f64, f64), y: (f64, f64)) -> Result<()> {
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        let mut builder = ChartBuilder::on(&root);
        builder.margin(12).margin_right(24).x_label_area_size(46).y_label_area_size(72);
        // The ranges of the four kinds of axes are types of their own.
        macro_rules! on {
            ($x:expr, $y:expr) => {{
                let mut chart = builder.build_cartesian_2d($x, $y).map_err(problem)?;
                chart
                    .configure_mesh()
                    .bold_line_style(INK.mix(0.18))
                    .light_line_style(INK.mix(0.0))
                    .axis_style(INK.mix(0.6))
                    .label_style(("sans-serif", 12, &INK))
                    .axis_desc_style(("sans-serif", 13, &INK))
                    .x_desc(&self.x.label)
                    .y_desc(&self.y.label)
                    .x_labels(10)
                    .y_labels(6)
                    .x_label_formatter(&|v| number(*v))
                    .y_label_formatter(&|v| number(*v))
                    .draw()
                    .map_err(problem)?;
                for (index, series) in self.series.iter().enumerate() {
                    let colour = COLOURS[index % COLOURS.len()];
                    let points = series.points.iter().copied().filter(|p| self.shows(p));
                    let points: Vec<(f64, f64)> = points.collect();
                    if series.joined {
                        let style = colour.stroke_width(2);
                        let line = LineSeries::new(points.iter().copied(), style);
                        chart.draw_series(line).map_err(problem)?;
                    }
                    if series.marked {
                        let style = colour.filled();
                        // Shapes as well as colours: some see no colours, and some points lie on others.
                        let at = points.iter().copied();
                        let drawn = match index % 3 {
                            0 => chart.draw_series(at.map(|p| Circle::new(p, 3, style))).err(),
                            1 => chart.draw_series(at.map(|p| TriangleMarker::new(p, 5, style))).err(),
                            _ => chart.draw_series(at.map(|p| Cross::new(p, 4, colour.stroke_width(2)))).err(),
                        };
                        drawn.map_or(Ok(()), |e| Err(problem(e)))?;
                    }
                }
            }};
        }
        match (self.x.log, self.y.log) {
            (false, false) => on!(x.0..x.1, y.0..y.1),
            (true, false) => on!((x.0..x.1).log_scale().base(base(x)), y.0..y.1),
            (false, true) => on!(x.0..x.1, (y.0..y.1).log_scale().base(base(y))),
            (true, true) => {
                on!((x.0..x.1).log_scale().base(base(x)), (y.0..y.1).log_scale().base(base(y)));
            }
        }
        root.present().map_err(problem)?;
        Ok(())
    }

    /// The series of which something is seen, with their places among all.
    fn seen(&self) -> impl Iterator<Item = (usize, &Series)> {
        self.series.iter().enumerate().filter(|(_, s)| s.points.iter().any(|p| self.shows(p)))
    }

    /// Its names beside their lines and marks, for a page.
    pub fn legend(&self) -> String {
        let entry = |(i, s): (usize, &Series)| {
            let name = escaped(&s.name);
            format!("<span><svg width=\"18\" height=\"10\">{}</svg>{name}</span>", s.sample(i))
        };
        self.seen().map(entry).collect()
    }

    /// As a picture of its own, legend included.
    pub fn alone(&self) -> Result<Option<String>> {
        let Some(svg) = self.svg()? else { return Ok(None) };
        let lines = self.seen().count() as u32;
        let extra = 22 * lines + 62;
        let (wide, high) = (SIZE.0, SIZE.1 + extra);
        let mut legend = String::new();
        for (line, (i, series)) in (0..).zip(self.seen()) {
            let y = SIZE.1 + 22 * line + 20;
            legend += &format!(
                "<g transform=\"translate(84 {})\">{}</g>\
                 <text x=\"110\" y=\"{y}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">{}</text>\n",
                y - 10,
                series.sample(i),
                escaped(&series.name)
            );
        }
        let title = escaped(&self.title);
        let source_at = SIZE.1 + 22 * lines + 26;
        legend += &format!(
            "<text x=\"84\" y=\"{source_at}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#555\">{}</text>\n",
            escaped(&self.source)
        );
        let nested = svg.replace("currentColor", "#222222");
        Ok(Some(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{wide}\" height=\"{high}\" viewBox=\"0 0 {wide} {high}\">\n\
             <title>{title}</title><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{nested}\n{legend}</svg>\n"
        )))
    }
}

fn problem<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("{error}")
}

/// From where to where an axis goes.
fn range(axis: &Axis, values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for v in values {
        (low, high) = (low.min(v), high.max(v));
    }
    if low > high {
        return None;
    }
    Some(match axis.log {
        true => (low / 1.15, high * 1.15),
        // Heights are compared from nothing up.
        false => (low.min(0.0), if high > 0.0 { high * 1.06 } else { 1.0 }),
    })
}

/// Short axes have a number at every doubling.
fn base((low, high): (f64, f64)) -> f64 {
    if high / low < 600.0 { 2.0 } else { 10.0 }
}

/// Three digits with a prefix.
fn number(value: f64) -> String {
    let text = |v: f64, unit: &str| {
        let digits = format!("{v:.3}");
        format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.'))
    };
    match value.abs() {
        v if v >= 1e9 => text(value / 1e9, "G"),
        v if v >= 1e6 => text(value / 1e6, "M"),
        // Powers of two are read as they are.
        v if v >= 1e4 && v.fract() == 0.0 && v % 100.0 != 0.0 => format!("{value}"),
        v if v >= 1e4 => text(value / 1e3, "k"),
        v if v >= 1e-3 || v == 0.0 => text(value, ""),
        _ => format!("{value:e}"),
    }
}

/// Text for HTML and SVG.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(points: Vec<(f64, f64)>) -> Figure {
        let name = "a <b> & \"c\"".to_owned();
        let series = vec![Series { name, points, joined: true, marked: true }];
        let (x, y) = (Axis::log("batch"), Axis::linear("tokens/s"));
        Figure { title: "t".into(), x, y, series, source: "made up".into() }
    }

    #[test]
    fn plots_hold_their_points_and_take_the_colour_of_the_page() {
        let svg = figure(vec![(1.0, 10.0), (8.0, 60.0), (0.0, 1.0)]).svg().expect("drawn");
        let svg = svg.expect("points");
        assert_eq!(svg.matches("<circle").count(), 2, "a logarithm has no zero");
        assert!(svg.contains("batch") && svg.contains("tokens/s") && svg.contains("currentColor"));
        assert!(!svg.contains(INK_TEXT));
        assert!(figure(Vec::new()).svg().expect("nothing").is_none());
        assert!(figure(vec![(f64::NAN, 1.0)]).svg().expect("nothing").is_none());
    }

    #[test]
    fn a_picture_of_its_own_names_its_series() {
        let svg = figure(vec![(2.0, 3.0)]).alone().expect("drawn").expect("points");
        assert!(svg.contains("a &lt;b&gt; &amp; &quot;c&quot;") && !svg.contains("currentColor"));
        assert!(svg.contains("made up"), "and says where its numbers come from");
        // A line and a circle; a series of which nothing is seen has no name there.
        let legend = figure(vec![(2.0, 3.0)]).legend();
        assert!(legend.contains("M0 5H18") && legend.contains("a3.5 3.5"), "{legend}");
        assert_eq!(figure(vec![(0.0, 3.0)]).legend(), "");
    }

    #[test]
    fn numbers_of_axes() {
        let text = [0.0, 0.5, 20.0, 1500.0, 32000.0, 32768.0, 2.5e6].map(number);
        assert_eq!(text, ["0", "0.5", "20", "1500", "32k", "32768", "2.5M"]);
    }
}

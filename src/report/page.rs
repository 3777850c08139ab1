//! A report: what was asked, what came out, in tables and plots, as one HTML page without outside requests, as Markdown or CSV.

use anyhow::Result;

use super::figure::{Figure, escaped};
use super::table;

/// A table with its head.
#[derive(Clone, Debug, Default)]
pub struct Sheet {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// The first columns stand left: they are words.
    pub left: usize,
}

impl Sheet {
    /// From parts.
    pub fn new(head: &[&str], rows: Vec<Vec<String>>, left: usize) -> Self {
        Self { head: head.iter().map(|h| (*h).to_owned()).collect(), rows, left }
    }
}

/// A part of a report.
#[derive(Clone, Debug, Default)]
pub struct Section {
    pub title: String,
    /// Said before the table.
    pub text: Vec<String>,
    pub figure: Option<Figure>,
    pub sheet: Option<Sheet>,
}

/// A report.
#[derive(Clone, Debug)]
pub struct Report {
    pub title: String,
    /// The answer in a few lines.
    pub verdict: Vec<String>,
    pub sections: Vec<Section>,
    /// Where the numbers come from.
    pub sources: Vec<String>,
    /// The command that prints it again.
    pub command: String,
}

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5a6370;--ground:#fff;--card:#f5f7f9;--line:#d5dae0;--accent:#1f6f9f}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#9aa4b1;--ground:#14171b;--card:#1c2127;--line:#343b44;--accent:#6db7e0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:86rem;padding:2rem 1.25rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground)}
h1{font-size:1.4rem;margin:0 0 .75rem}h2{font-size:1.1rem;margin:2.25rem 0 .5rem}
.verdict{background:var(--card);border-left:4px solid var(--accent);padding:.75rem 1rem;border-radius:4px}
.verdict p{margin:.15rem 0}
p{margin:.4rem 0}.soft,footer{color:var(--soft);font-size:.88rem}
figure{margin:1rem 0}figure>svg{display:block;width:100%;max-width:64rem;height:auto}
figcaption p{flex-basis:100%;margin:.1rem 0;color:var(--soft)}figcaption .t{color:var(--ink);font-weight:600}
figcaption{display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;font-size:.88rem}
figcaption svg{margin-right:.4rem;vertical-align:middle;overflow:visible}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:.25rem .7rem .25rem 0;text-align:right;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}.l{text-align:left}
code{font:.86em ui-monospace,monospace;background:var(--card);padding:.1rem .3rem;border-radius:3px;overflow-wrap:anywhere}
footer{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:.75rem}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--ground:#fff;--card:#fff;--line:#bbb;--accent:#000}body{padding:0;max-width:none;font-size:10pt}
.wide{overflow:visible}table{font-size:7.5pt;white-space:normal}figure,tr,.verdict{break-inside:avoid}*{print-color-adjust:exact}h2{break-after:avoid}}
";

impl Report {
    /// One page.
    pub fn html(&self) -> Result<String> {
        let mut body = format!("<h1>{}</h1>\n", escaped(&self.title));
        if !self.verdict.is_empty() {
            let line = |l: &String| match l.strip_prefix("hint: ") {
                Some(command) => {
                    format!("<p class=\"soft\">next: <code>{}</code></p>", escaped(command))
                }
                None => format!("<p>{}</p>", escaped(l)),
            };
            let lines = self.verdict.iter().map(line);
            body += &format!("<div class=\"verdict\">{}</div>\n", lines.collect::<String>());
        }
        for section in &self.sections {
            body += &format!("<section><h2>{}</h2>\n", escaped(&section.title));
            for line in &section.text {
                body += &format!("<p>{}</p>\n", escaped(line));
            }
            if let Some(figure) = &section.figure
                && let Some(svg) = figure.svg()?
            {
                let legend = figure.legend();
                let (title, source) = (escaped(&figure.title), escaped(&figure.source));
                body += &format!(
                    "<figure><figcaption><p class=\"t\">{title}</p></figcaption>{svg}\
                     <figcaption>{legend}<p>{source}</p></figcaption></figure>\n"
                );
            }
            if let Some(sheet) = &section.sheet {
                body += &rows(sheet);
            }
            body += "</section>\n";
        }
        let sources = self.sources.iter().map(|s| format!("<p>{}</p>", escaped(s)));
        body += &format!(
            "<footer>{}<p>again: <code>{}</code></p><p>batchmax {}</p></footer>\n",
            sources.collect::<String>(),
            escaped(&self.command),
            env!("CARGO_PKG_VERSION")
        );
        Ok(format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <title>{}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n",
            escaped(&self.title)
        ))
    }

    /// Markdown: the same without plots.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n", self.title);
        for line in &self.verdict {
            out += &format!("{line}  \n");
        }
        for section in &self.sections {
            out += &format!("\n## {}\n\n", section.title);
            for line in &section.text {
                out += &format!("{line}  \n");
            }
            if let Some(sheet) = &section.sheet {
                let cell = |c: &String| c.replace('|', "\\|");
                let rows: Vec<Vec<String>> =
                    sheet.rows.iter().map(|r| r.iter().map(cell).collect()).collect();
                let head: Vec<&str> = sheet.head.iter().map(String::as_str).collect();
                out += &table::markdown(&head, &rows);
            }
        }
        out += "\n";
        for source in &self.sources {
            out += &format!("{source}  \n");
        }
        out + &format!("\n    {}\n", self.command)
    }

    /// The first plot as a picture.
    pub fn svg(&self) -> Result<Option<String>> {
        let mut figures = self.sections.iter().filter_map(|s| s.figure.as_ref());
        figures.next().map_or(Ok(None), Figure::alone)
    }
}

fn rows(sheet: &Sheet) -> String {
    let cell = |tag: &str, (i, text): (usize, &String)| {
        let side = if i < sheet.left { " class=\"l\"" } else { "" };
        format!("<{tag}{side}>{}</{tag}>", escaped(text))
    };
    let line = |tag: &str, cells: &[String]| {
        let cells: String = cells.iter().enumerate().map(|c| cell(tag, c)).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let body: String = sheet.rows.iter().map(|r| line("td", r)).collect();
    let head = line("th", &sheet.head);
    format!(
        "<div class=\"wide\"><table><thead>{head}</thead><tbody>\n{body}</tbody></table></div>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::figure::{Axis, Series};

    fn report() -> Report {
        let series = vec![Series {
            name: "full".into(),
            points: vec![(1.0, 2.0)],
            joined: true,
            marked: true,
        }];
        let (x, y) = (Axis::log("batch"), Axis::linear("tokens/s"));
        let figure = Figure { title: "t".into(), x, y, series, source: "made up".into() };
        let sheet = Sheet::new(&["policy", "rate"], vec![vec!["a|b<i>".into(), "3".into()]], 1);
        let section = Section {
            title: "S".into(),
            figure: Some(figure),
            sheet: Some(sheet),
            ..Section::default()
        };
        Report {
            title: "<script>".into(),
            verdict: vec!["full & more".into()],
            sections: vec![section],
            sources: vec!["measured".into()],
            command: "batchmax plan".into(),
        }
    }

    #[test]
    fn a_page_asks_nothing_from_outside() {
        let page = report().html().expect("drawn");
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert!(page.contains("<p>made up</p>"), "a plot says where its numbers come from");
        // Names of XML are no requests; nothing else names another place.
        let page = page.replace("http://www.w3.org/2000/svg", "");
        for request in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(request), "{request}");
        }
    }

    #[test]
    fn markdown_keeps_its_columns() {
        let text = report().markdown();
        assert!(text.contains("| a\\|b<i> | 3 |"), "{text}");
        assert!(text.starts_with("# <script>\n"));
    }
}

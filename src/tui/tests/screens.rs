//! Every screen as it is seen, at three sizes, with and without colour, and in ASCII.

use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};

use super::{Desk, QUERY, text};
use crate::tui::theme::Theme;
use crate::tui::trial;

const SIZES: [(u16, u16); 3] = [(80, 24), (120, 40), (200, 60)];

/// One letter for the style of each cell: what colour alone would say must not be lost without it.
fn styles(buffer: &Buffer) -> String {
    let letter = |x: u16, y: u16| {
        let cell = &buffer[(x, y)];
        if cell.modifier.contains(Modifier::REVERSED) {
            return '#';
        }
        match cell.fg {
            Color::Reset if cell.symbol() == " " => ' ',
            Color::Reset => '.',
            Color::DarkGray => ',',
            Color::Cyan => 'c',
            Color::Green => 'g',
            Color::Yellow => 'y',
            Color::Red => 'r',
            _ => 'x',
        }
    };
    let line = |y: u16| (0..buffer.area.width).map(|x| letter(x, y)).collect::<String>();
    (0..buffer.area.height).map(|y| format!("{}\n", line(y).trim_end())).collect()
}

/// All sizes in one picture, and what must hold for each.
fn pictures(desk: &mut Desk) -> String {
    let mut all = String::new();
    for (width, height) in SIZES {
        let coloured = desk.draw(width, height);
        all += &format!("{width} x {height}\n{}", text(&coloured));
        desk.app.theme = Theme { colour: false, ascii: false };
        let plain = desk.draw(width, height);
        assert_eq!(text(&plain), text(&coloured), "colour changes no text");
        let grey = |c: &ratatui::buffer::Cell| c.fg == Color::Reset && c.bg == Color::Reset;
        assert!(plain.content.iter().all(grey), "colour without colour");
        desk.app.theme = Theme { colour: true, ascii: true };
        let ascii = desk.draw(width, height);
        assert!(ascii.content.iter().all(|c| c.symbol().is_ascii()), "more than ASCII");
        assert!(!text(&ascii).contains('?') || text(&coloured).contains('?'), "unknown signs");
        desk.app.theme = Theme { colour: true, ascii: false };
        if width == 80 {
            all += &format!("styles\n{}", styles(&coloured));
        }
    }
    all
}

#[test]
fn plan() {
    let mut desk = Desk::new(QUERY);
    insta::assert_snapshot!(pictures(&mut desk));
}

#[test]
fn plan_in_ascii() {
    let mut desk = Desk::new(QUERY);
    desk.app.theme = Theme { colour: false, ascii: true };
    desk.press("<Tab><Down>");
    insta::assert_snapshot!(desk.text(120, 40));
}

#[test]
fn ops() {
    let mut desk = Desk::new(QUERY);
    desk.press("<Tab><Enter>p<Down>");
    insta::assert_snapshot!(pictures(&mut desk));
}

#[test]
fn frontier() {
    let mut desk = Desk::new(QUERY);
    desk.press("3<Down> <Down><Down> ");
    assert_eq!(desk.app.pins.len(), 2);
    insta::assert_snapshot!(pictures(&mut desk));
}

#[test]
fn crossover() {
    let mut desk = Desk::new(QUERY);
    desk.press("4<Up><Up><Right>");
    insta::assert_snapshot!(pictures(&mut desk));
}

#[test]
fn run() {
    let mut desk = Desk::new(QUERY);
    desk.press("5");
    let other = pictures(&mut desk);
    assert!(other.contains("runs are on this machine"), "{other}");
    let document = serde_json::json!({
        "predicted": {
            "metrics": { "prefill_tok_s": 1000.0, "decode_tok_s": 100.0, "output_tok_s": 80.0 },
            "memory": { "kv_prefill_peak_bytes": 1 << 20, "kv_decode_peak_bytes": 1 << 19, "total_bytes": 1 << 30 },
        },
        "measured": {
            "prefill_tok_s": 900.0, "decode_tok_s": 90.0, "output_tok_s": 70.0,
            "kv_prefill_peak_bytes": 1 << 20, "kv_decode_peak_bytes": 1 << 19, "peak_rss_bytes": 1 << 30,
        },
        "total_error": -0.12, "tolerance": 0.1, "error_at_pace": -0.03,
        "pace": { "prefill": 1.12, "decode": 1.14 },
    });
    let command = vec!["validate".to_owned()];
    desk.app.trial = trial::ended(command.clone(), &document.to_string(), Vec::new(), Some(1));
    let beyond = pictures(&mut desk);
    assert!(beyond.contains("p times it anew"), "{beyond}");
    let why = vec!["error: the caches are full at step 12".to_owned()];
    desk.app.trial = trial::ended(command, "", why, Some(3));
    let failed = desk.text(120, 40);
    assert!(failed.contains("the caches are full at step 12"), "{failed}");
    insta::assert_snapshot!(beyond);
}

#[test]
fn quality() {
    let mut desk = Desk::new(QUERY);
    let rows = "name = \"plain-7b\"\nweights = \"f32\"\ncache = \"f16\"\nsamples = 2\nabout = \"made up\"\n";
    let row = |policy: &str, budget: f64, kl: f64| {
        format!(
            "[[row]]\npolicy = \"{policy}\"\nbudget = {budget}\ncontext = 512\nkv_bytes_per_token = {}\nkl = {kl}\n\
             kl_low = {kl}\nkl_high = {kl}\ntop1 = 0.9\nrecall = 0.5\nanswer_nll = 1.0\ncopy_top1 = 0.5\ncopy_nll = 1.0\n",
            budget * 20000.0
        )
    };
    let text = [
        rows.to_owned(),
        row("snapkv:window=32", 0.5, 0.02),
        row("snapkv:window=32", 0.25, 0.09),
        row("knorm", 0.25, 0.4),
    ];
    std::fs::create_dir_all(desk.dir.path().join("quality")).expect("writable");
    std::fs::write(desk.dir.path().join("quality/plain-7b.toml"), text.concat()).expect("writable");
    desk.press("6<Down>");
    insta::assert_snapshot!(pictures(&mut desk));
}

#[test]
fn picker_and_help() {
    let mut desk = Desk::new(QUERY);
    desk.press("<Down><Enter>slate");
    let picker = desk.text(80, 24);
    assert!(picker.contains("Slate 80 GB") && picker.contains("Enter takes: slate-80"), "{picker}");
    desk.press("<Esc>?");
    insta::assert_snapshot!(desk.text(80, 24));
}

#[test]
fn small_terminals_say_so() {
    let desk = Desk::new(QUERY);
    let small = desk.text(40, 10).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(small.contains("batchmax needs 60 x 15 cells, here are 40 x 10"), "{small}");
    for (width, height) in [(1, 1), (60, 15), (61, 16), (300, 15), (60, 120)] {
        desk.draw(width, height);
    }
}

//! Screens and keys without a terminal.

mod keys;
mod numbers;
#[cfg(unix)]
mod runs;
mod screens;
mod screenshot;
mod speed;

use std::collections::VecDeque;
use std::sync::Arc;

use clap::Parser;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use tempfile::TempDir;

use super::app::{App, Effect};
use super::draw::draw;
use super::form::Values;
use super::run::lists;
use super::theme::Theme;
use super::worker::{Answered, Worker, plan_args};
use crate::cli::Cli;
use crate::setting::Places;

/// A device and a model that nobody fits anew: what is shown of them changes with the planner alone.
const GPU: &str = r#"
name = "slate-80"
label = "Slate 80 GB"
memory_bytes = 80000000000
bandwidth_bytes_per_s = 2.0e12
processors = 100
source = "made up"
[peak_flops_per_s]
bf16 = 500.0e12
"#;
const MODEL: &str = r#"
name = "plain-7b"
source = "made up"
layers = 32
hidden = 4096
heads = 32
kv_heads = 8
head_dim = 128
ffn = 14336
vocab = 32000
context = 32768
rope_theta = 10000.0
weight_dtype = "bf16"
"#;

/// What is asked in most tests.
pub const QUERY: &str = "--model plain-7b --gpu slate-80 --isl 8k --osl 256 \
    --policy full snapkv batch-max kivi";

/// The planner with everything that is outside of it done at once.
pub struct Desk {
    pub app: App,
    pub places: Places,
    worker: Worker,
    /// What went out beside questions.
    pub done: Vec<Effect>,
    pub dir: TempDir,
}

impl Desk {
    /// With a query, answered.
    pub fn new(query: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for (kind, name, text) in [("gpus", "slate-80", GPU), ("models", "plain-7b", MODEL)] {
            std::fs::create_dir_all(dir.path().join(kind)).expect("writable");
            let path = dir.path().join(kind).join(format!("{name}.toml"));
            std::fs::write(path, text).expect("writable");
        }
        let path = dir.path().display().to_string();
        let cli = Cli::parse_from(["batchmax", "models", "--data-dir", &path]);
        let places = Places::new(&cli.global).expect("places");
        let words: Vec<String> = query.split_whitespace().map(str::to_owned).collect();
        let values = Values::of(&plan_args(&words).expect("a query"));
        let theme = Theme { colour: true, ascii: false };
        let app = App::new(values, Arc::new(lists(&places)), theme);
        let mut desk = Self { app, places, worker: Worker::default(), done: Vec::new(), dir };
        desk.app.can_run = true;
        let first = desk.app.ask(super::worker::Want::Ranking);
        desk.act(vec![first]);
        desk
    }

    /// Does what the state asks for until nothing is left.
    pub fn act(&mut self, effects: Vec<Effect>) {
        let mut left: VecDeque<Effect> = effects.into();
        while let Some(effect) = left.pop_front() {
            let Effect::Ask(request) = effect else {
                self.done.push(effect);
                continue;
            };
            let mut parts = Vec::new();
            self.worker.answer(&self.places, &request, &|| false, &mut |part| parts.push(part));
            for part in parts {
                left.extend(self.app.take(Answered { query: request.query, part }));
            }
        }
    }

    /// A key by its code.
    pub fn key(&mut self, code: KeyCode) {
        let effects = self.app.key(KeyEvent::new(code, KeyModifiers::NONE));
        self.act(effects);
    }

    /// Keys by letters; `<Enter>` and the like by name.
    pub fn press(&mut self, keys: &str) {
        let mut rest = keys;
        while let Some(first) = rest.chars().next() {
            let named = rest.strip_prefix('<').and_then(|r| r.split_once('>'));
            let (code, after) = match named {
                Some((name, after)) => (code(name), after),
                None => (KeyCode::Char(first), &rest[first.len_utf8()..]),
            };
            self.key(code);
            rest = after;
        }
    }

    /// The screen at a size.
    pub fn draw(&self, width: u16, height: u16) -> Buffer {
        picture(&self.app, width, height)
    }

    /// The same as text.
    pub fn text(&self, width: u16, height: u16) -> String {
        text(&self.draw(width, height))
    }
}

/// A key by its name.
fn code(name: &str) -> KeyCode {
    match name {
        "Enter" => KeyCode::Enter,
        "Esc" => KeyCode::Esc,
        "Tab" => KeyCode::Tab,
        "Up" => KeyCode::Up,
        "Down" => KeyCode::Down,
        "Left" => KeyCode::Left,
        "Right" => KeyCode::Right,
        "Home" => KeyCode::Home,
        "End" => KeyCode::End,
        "Bksp" => KeyCode::Backspace,
        other => panic!("no key {other}"),
    }
}

/// What a terminal of a size would show.
pub fn picture(app: &App, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(app, frame.buffer_mut())).expect("drawn");
    terminal.backend().buffer().clone()
}

/// Lines of a buffer, without blanks at their ends.
pub fn text(buffer: &Buffer) -> String {
    let line = |y: u16| {
        let cells = (0..buffer.area.width).map(|x| buffer[(x, y)].symbol().to_owned());
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    (0..buffer.area.height).map(line).collect()
}

//! How long a key takes to be seen. Run by hand: cargo test --release --no-default-features speed -- --ignored --nocapture

#![expect(clippy::print_stderr, reason = "a measurement says what it found")]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use clap::Parser;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};

use super::Desk;
use crate::cli::Cli;
use crate::setting::Places;
use crate::tui::app::Effect;
use crate::tui::draw::draw;
use crate::tui::run::{Incoming, take};
use crate::tui::worker::{Slot, work};

/// The widest query: every policy, on eight kinds of device, in two types of cache.
const WIDEST: &str = "--model llama-3.1-70b --gpu h100-sxm,h200-sxm,a100-sxm-80gb,b200-sxm,l40s,mi300x,h20,gh200-96gb \
    --gpus 8 --isl 32k --osl 512 --kv-dtype bf16,fp8";

#[test]
#[ignore = "a measurement"]
fn from_key_to_redraw() {
    let mut desk = Desk::new("--model plain-7b --gpu slate-80");
    let words: Vec<String> = WIDEST.split_whitespace().map(str::to_owned).collect();
    let args = super::plan_args(&words).expect("a query");
    desk.app.values = super::Values::of(&args);
    let cli = Cli::parse_from(["batchmax", "models"]);
    let (send, receive) = channel();
    let slot = Arc::new(Slot::default());
    let (asked, out) = (slot.clone(), send.clone());
    let own = Places::new(&cli.global).expect("places");
    std::thread::spawn(move || work(&own, &asked, &out));
    let act = |effects: Vec<Effect>| {
        for effect in effects {
            if let Effect::Ask(request) = effect {
                slot.put(request);
            }
        }
    };
    // The real backend, into memory: what is measured ends where the terminal begins.
    let options = ratatui::TerminalOptions {
        viewport: ratatui::Viewport::Fixed(ratatui::layout::Rect::new(0, 0, 200, 60)),
    };
    let backend = CrosstermBackend::new(Vec::<u8>::new());
    let mut terminal = Terminal::with_options(backend, options).expect("a terminal");
    desk.app.inputs = true;
    desk.app.field = 3;
    let (mut times, mut answers) = (Vec::new(), Vec::new());
    let mut since = Instant::now();
    for at in 0..600 {
        let code = if at % 8 < 4 { KeyCode::Right } else { KeyCode::Left };
        let start = Instant::now();
        let key = KeyEvent::new(code, KeyModifiers::NONE);
        act(take(&mut desk.app, Incoming::Event(Event::Key(key))));
        terminal.draw(|frame| draw(&desk.app, frame.buffer_mut())).expect("drawn");
        times.push(start.elapsed().as_secs_f64() * 1e3);
        // Somebody holds a key: one comes every 30 ms, and answers come when they come.
        let until = Instant::now() + std::time::Duration::from_millis(30);
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(incoming) = receive.recv_timeout(left) else { break };
            let waited = desk.app.waits();
            act(take(&mut desk.app, incoming));
            if waited && !desk.app.waits() {
                answers.push(since.elapsed().as_secs_f64() * 1e3);
            }
            terminal.draw(|frame| draw(&desk.app, frame.buffer_mut())).expect("drawn");
        }
        since = if desk.app.waits() { since } else { Instant::now() };
    }
    let rank = |list: &mut Vec<f64>, share: f64| {
        list.sort_by(f64::total_cmp);
        list.get(((list.len() as f64 - 1.0).max(0.0) * share) as usize).copied().unwrap_or(f64::NAN)
    };
    let (median, late, worst) =
        (rank(&mut times, 0.5), rank(&mut times, 0.99), rank(&mut times, 1.0));
    eprintln!(
        "key to redraw at 200 x 60, ms: median {median:.2}, 99 % {late:.2}, worst {worst:.2}"
    );
    let count = answers.len();
    let (median, late) = (rank(&mut answers, 0.5), rank(&mut answers, 0.99));
    eprintln!("answers while keys come, {count}: median {median:.0} ms, 99 % {late:.0} ms");
    assert_eq!(times.len(), 600);
}

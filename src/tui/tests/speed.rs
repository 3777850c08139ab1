//! How long a key takes to be seen. Run by hand: cargo test --release --no-default-features speed -- --ignored --nocapture

#![expect(clippy::print_stderr, reason = "a measurement says what it found")]

use std::collections::VecDeque;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// Keys that are pressed.
const KEYS: usize = 600;

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
    // Somebody holds a key: one comes every 33 ms, whatever the planner is at, so that some find it drawing an answer.
    let pressed = Arc::new(Mutex::new(VecDeque::new()));
    let (keys, times_of) = (send.clone(), pressed.clone());
    std::thread::spawn(move || {
        for at in 0..KEYS {
            std::thread::sleep(Duration::from_millis(33));
            let code = if at % 8 < 4 { KeyCode::Right } else { KeyCode::Left };
            let key = KeyEvent::new(code, KeyModifiers::NONE);
            times_of.lock().expect("no panic").push_back(Instant::now());
            if keys.send(Incoming::Event(Event::Key(key))).is_err() {
                return;
            }
        }
    });
    let (mut times, mut answers, mut met) = (Vec::new(), Vec::new(), 0);
    let mut since = Instant::now();
    // As `run::inside`: what has gathered is taken, then drawn once.
    while times.len() < KEYS
        && let Ok(first) = receive.recv_timeout(Duration::from_secs(5))
    {
        let (mut seen, mut others) = (0, 0);
        for incoming in std::iter::once(first).chain(receive.try_iter()) {
            let key = matches!(incoming, Incoming::Event(_));
            (seen, others) = (seen + usize::from(key), others + usize::from(!key));
            let waited = desk.app.waits();
            act(take(&mut desk.app, incoming));
            if waited && !desk.app.waits() {
                answers.push(since.elapsed().as_secs_f64() * 1e3);
            }
        }
        terminal.draw(|frame| draw(&desk.app, frame.buffer_mut())).expect("drawn");
        let mut pressed = pressed.lock().expect("no panic");
        times.extend(pressed.drain(..seen).map(|at| at.elapsed().as_secs_f64() * 1e3));
        met += if others > 0 { seen } else { 0 };
        since = if desk.app.waits() { since } else { Instant::now() };
    }
    let rank = |list: &mut Vec<f64>, share: f64| {
        list.sort_by(f64::total_cmp);
        list.get(((list.len() as f64 - 1.0).max(0.0) * share) as usize).copied().unwrap_or(f64::NAN)
    };
    let (median, late, worst) =
        (rank(&mut times, 0.5), rank(&mut times, 0.99), rank(&mut times, 1.0));
    eprintln!(
        "key to redraw at 200 x 60, ms: median {median:.2}, 99 % {late:.2}, worst {worst:.2}; {met} of {KEYS} keys came with an answer"
    );
    let count = answers.len();
    let (median, late) = (rank(&mut answers, 0.5), rank(&mut answers, 0.99));
    eprintln!("answers while keys come, {count}: median {median:.0} ms, 99 % {late:.0} ms");
    assert_eq!(times.len(), KEYS);
}

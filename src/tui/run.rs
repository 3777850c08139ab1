//! The loop: what comes in, the state, what goes out. The screen never waits for an answer.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use super::app::{App, Effect, Lists};
use super::draw::draw;
use super::export;
use super::form::Values;
use super::picker::Item;
use super::terminal::{self, Guard};
use super::theme::Theme;
use super::trial::{self, News, Process, Trial};
use super::worker::{Answered, Slot, Want, work};
use crate::cli::{Global, TuiArgs};
use crate::commands::Outcome;
use crate::setting::{LOCAL, Places};

/// Whatever happens.
pub enum Incoming {
    Event(Event),
    Answered(Box<Answered>),
    Trial(News),
    /// An export came out.
    Written(Result<String, String>),
    Signal,
}

/// What is asked where nothing is typed and this machine has no profile yet.
const EXAMPLE: [(&str, &str); 4] =
    [("model", "llama-3.1-8b"), ("gpu", "h100-sxm"), ("isl", "8k"), ("osl", "512")];

/// Opens the planner.
pub fn run(places: &Places, args: &TuiArgs, global: &Global) -> Result<Outcome> {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        bail!("tui: this is not a terminal; hint: batchmax plan prints the same answers");
    }
    let mut values = Values::of(&args.plan);
    if values.arguments().is_empty() && places.catalog.gpu(LOCAL).is_err() {
        for (flag, value) in EXAMPLE {
            values.set(super::form::index(flag), value);
        }
    }
    let mut theme = Theme::of_environment(args.ascii);
    theme.colour &= global.colour != "never";
    let mut app = App::new(values, Arc::new(lists(places)), theme);
    let (send, receive) = channel();
    let slot = Arc::new(Slot::default());
    let (own, asked, answers) = (Places::new(global)?, slot.clone(), send.clone());
    // Ends with the process: a search under way is not waited for.
    std::thread::spawn(move || work(&own, &asked, &answers));
    inside(&mut app, global, &slot, send, &receive)?;
    // The alternate screen is gone: what was picked last stays.
    let picked = app.candidate().map(|_| crate::report::quoted(&super::command::of(&app)));
    if let Some(command) = picked {
        crate::report::answer(&command);
    }
    Ok(Outcome::Answered)
}

/// What there is to choose from.
pub fn lists(places: &Places) -> Lists {
    let catalog = &places.catalog;
    let item = |name: String, note: String| Item { name, note };
    let models = catalog.models().unwrap_or_default().into_iter().map(|m| {
        let note = format!("{:.1} B, {} tokens of context", m.parameters() as f64 / 1e9, m.context);
        item(m.name.clone(), note)
    });
    let gpus = catalog.gpus().unwrap_or_default().into_iter().map(|g| {
        let note =
            format!("{}, {} {:.0} GB/s", g.label, g.memory_bytes, g.bandwidth_bytes_per_s / 1e9);
        item(g.name.clone(), note)
    });
    let engines = catalog.engines().unwrap_or_default().into_iter();
    let policies = catalog.policy_names().into_iter().map(|name| {
        let about = batchmax_sim::policy::Preset::parse(catalog, &name).map(|p| p.about);
        item(name, about.unwrap_or_default())
    });
    let mut gpus: Vec<Item> = gpus.collect();
    if gpus.iter().all(|g| g.name != LOCAL) {
        gpus.push(item(
            LOCAL.to_owned(),
            "this machine, once batchmax profile has timed it".to_owned(),
        ));
    }
    Lists {
        models: models.collect(),
        gpus,
        policies: policies.collect(),
        engines: engines.map(|e| item(e.name.clone(), String::new())).collect(),
    }
}

fn inside(
    app: &mut App,
    global: &Global,
    slot: &Slot,
    send: Sender<Incoming>,
    receive: &Receiver<Incoming>,
) -> Result<()> {
    let start = Instant::now();
    terminal::listen(send.clone())?;
    let guard = Guard::take().context("the terminal can't be taken")?;
    let mut screen = Terminal::new(CrosstermBackend::new(std::io::stdout()))?;
    let events = send.clone();
    std::thread::spawn(move || {
        // A terminal that is gone gives no events any more: the hang-up ends the loop.
        while let Ok(event) = event::read() {
            if events.send(Incoming::Event(event)).is_err() {
                return;
            }
        }
    });
    let mut outside = Outside { global, slot, send, process: None };
    outside.act(app, vec![app.ask(Want::Ranking)]);
    loop {
        app.now = start.elapsed().as_secs_f64();
        screen.draw(|frame| draw(app, frame.buffer_mut()))?;
        let going = app.waits() || matches!(app.trial, Trial::Going(_));
        let wait = Duration::from_millis(if going { 200 } else { 60_000 });
        let first = match receive.recv_timeout(wait) {
            Ok(incoming) => incoming,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        app.now = start.elapsed().as_secs_f64();
        // What has gathered meanwhile is taken before anything is drawn.
        for incoming in std::iter::once(first).chain(receive.try_iter()) {
            let effects = take(app, incoming);
            if outside.act(app, effects) {
                drop(guard);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// What something that happens does to the state.
pub fn take(app: &mut App, incoming: Incoming) -> Vec<Effect> {
    match incoming {
        Incoming::Event(Event::Key(key)) if key.kind != KeyEventKind::Release => app.key(key),
        Incoming::Event(Event::Paste(text)) => app.typed(&text),
        Incoming::Event(_) => Vec::new(),
        Incoming::Answered(answered) => app.take(*answered),
        Incoming::Trial(news) => app.hear(news),
        Incoming::Written(Ok(path)) => {
            app.say(&format!("written: {path}"), false);
            Vec::new()
        }
        Incoming::Written(Err(why)) => {
            app.say(&why, true);
            Vec::new()
        }
        Incoming::Signal => vec![Effect::Quit],
    }
}

/// What the state asks of the outside.
struct Outside<'a> {
    global: &'a Global,
    slot: &'a Slot,
    send: Sender<Incoming>,
    process: Option<Process>,
}

impl Outside<'_> {
    /// Does it; whether that was the end.
    fn act(&mut self, app: &mut App, effects: Vec<Effect>) -> bool {
        for effect in effects {
            match effect {
                Effect::Quit => return true,
                Effect::Ask(request) => self.slot.put(request),
                Effect::Copy(text) => match terminal::copy(&text) {
                    Ok(()) => app.say(&format!("copied: {text}"), false),
                    Err(e) => app.say(&format!("the terminal takes no text: {e}"), true),
                },
                Effect::Write { path, args } => self.write(path, args),
                Effect::Stop => drop(self.process.take()),
                Effect::Start(args) => {
                    let args = self.with_places(args);
                    match Process::start(&args, self.send.clone()) {
                        Ok(process) => self.process = Some(process),
                        Err(e) => {
                            let why = vec![format!("it could not be started: {e}")];
                            app.trial = Trial::Failed { command: args, why };
                        }
                    }
                }
            }
        }
        false
    }

    /// The run looks for descriptions where the planner does.
    fn with_places(&self, mut args: Vec<String>) -> Vec<String> {
        for (flag, dir) in
            [("--profiles", &self.global.profiles), ("--data-dir", &self.global.data_dir)]
        {
            args.extend(dir.iter().flat_map(|d| [flag.to_owned(), d.display().to_string()]));
        }
        args
    }

    fn write(&self, path: String, args: Vec<String>) {
        let (send, global) = (self.send.clone(), self.global.clone());
        std::thread::spawn(move || {
            let written = Places::new(&global).and_then(|p| export::write(&p, &args, &path));
            let said =
                written.map(|()| path).map_err(|e| format!("{e:#}").replace("; hint: ", " — "));
            send.send(Incoming::Written(said)).ok();
        });
    }
}

impl App {
    /// News of a run.
    pub fn hear(&mut self, news: News) -> Vec<Effect> {
        let Trial::Going(going) = &mut self.trial else { return Vec::new() };
        match news {
            News::Progress { label, done, total } => {
                (going.label, going.done, going.total) = (label, done, total);
                Vec::new()
            }
            News::Ended { out, err, code } => {
                let (command, stopped) = (going.command.clone(), going.stopping);
                let timed = command.first().is_some_and(|c| c == "profile");
                self.trial = trial::ended(command, &out, err, code);
                let (text, bad) = match &self.trial {
                    Trial::Failed { .. } if stopped => ("the run was cancelled", false),
                    Trial::Failed { .. } => ("the run failed: see Run (5)", true),
                    _ => ("the run is over: see Run (5)", false),
                };
                self.say(text, bad);
                if timed {
                    self.query += 1;
                    self.asked_at = self.now;
                    return vec![self.ask(Want::Ranking)];
                }
                Vec::new()
            }
        }
    }
}

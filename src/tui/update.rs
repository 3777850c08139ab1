//! What keys do to the state.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::app::{App, Effect, Mode, Said, Screen};
use super::command;
use super::form::{self, FIELDS, Ladder, Values};
use super::keys::{KEYS, Message, lookup};
use super::picker::Picker;
use super::text::{LONGEST, Line};

/// Rows of a page.
const PAGE: isize = 10;
/// Steps that can be undone.
const REMEMBERED: usize = 200;

impl App {
    /// A key.
    pub fn key(&mut self, key: KeyEvent) -> Vec<Effect> {
        if let Some(message) = lookup(&self.contexts(), key) {
            self.said = None;
            return self.update(message);
        }
        let plain = !key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT);
        match key.code {
            KeyCode::Char(c) if plain => self.typed(&c.to_string()),
            _ => Vec::new(),
        }
    }

    /// Text that is typed or pasted. Where no text is asked for, a pasted one does nothing.
    pub fn typed(&mut self, text: &str) -> Vec<Effect> {
        let whole = match &mut self.mode {
            Mode::Typing { line, .. } | Mode::Filtering(line) | Mode::Exporting(line) => {
                line.insert(text)
            }
            Mode::Picking(picker) => {
                picker.cursor = 0;
                picker.line.insert(text)
            }
            Mode::Normal | Mode::Help(_) => return Vec::new(),
        };
        self.said = (!whole).then(|| Said {
            text: format!("cut: a value is one line of at most {LONGEST} characters"),
            bad: true,
        });
        self.retyped()
    }

    /// The text has changed: what is typed is asked at once.
    fn retyped(&mut self) -> Vec<Effect> {
        match &self.mode {
            Mode::Typing { field, line, .. } => {
                let (field, text) = (*field, line.text());
                let mut values = self.values.clone();
                values.set(field, &text);
                self.assume(values)
            }
            Mode::Filtering(line) => {
                self.filter = line.text();
                self.keep_in_table()
            }
            _ => Vec::new(),
        }
    }

    /// Other values, not yet to be undone.
    fn assume(&mut self, values: Values) -> Vec<Effect> {
        if values == self.values {
            return Vec::new();
        }
        self.values = values;
        self.query += 1;
        self.asked_at = self.now;
        vec![self.ask(super::worker::Want::Ranking)]
    }

    /// Other values, to be undone.
    pub(super) fn change(&mut self, values: Values) -> Vec<Effect> {
        if values != self.values {
            let before = self.values.clone();
            self.remember(before);
        }
        self.assume(values)
    }

    fn remember(&mut self, before: Values) {
        self.past.push(before);
        if self.past.len() > REMEMBERED {
            self.past.remove(0);
        }
        self.future.clear();
    }

    fn set(&mut self, field: usize, text: &str) -> Vec<Effect> {
        let mut values = self.values.clone();
        values.set(field, text);
        self.change(values)
    }

    /// What a message does.
    pub fn update(&mut self, message: Message) -> Vec<Effect> {
        if message == Message::Quit {
            return vec![Effect::Quit];
        }
        match std::mem::replace(&mut self.mode, Mode::Normal) {
            Mode::Typing { field, line, before } => self.typing(message, field, line, before),
            Mode::Filtering(mut line) => {
                match message {
                    Message::Accept | Message::AcceptNext => {}
                    Message::Back => self.filter.clear(),
                    other => {
                        edit(&mut line, other);
                        self.filter = line.text();
                        self.mode = Mode::Filtering(line);
                    }
                }
                self.keep_in_table()
            }
            Mode::Exporting(mut line) => match message {
                Message::Accept | Message::AcceptNext => self.export(line.text()),
                Message::Back => Vec::new(),
                other => {
                    edit(&mut line, other);
                    self.mode = Mode::Exporting(line);
                    Vec::new()
                }
            },
            Mode::Picking(picker) => self.picking(message, picker),
            Mode::Help(at) => {
                let by = steps(message);
                if message != Message::Back {
                    self.mode = Mode::Help(at.saturating_add_signed(by).min(KEYS.len()));
                }
                Vec::new()
            }
            Mode::Normal => self.normal(message),
        }
    }

    fn typing(
        &mut self,
        message: Message,
        field: usize,
        mut line: Line,
        before: Values,
    ) -> Vec<Effect> {
        match message {
            Message::Accept | Message::AcceptNext => {
                if before != self.values {
                    self.remember(before);
                }
                if message == Message::AcceptNext {
                    self.field = (field + 1) % FIELDS.len();
                }
                Vec::new()
            }
            Message::Back => self.assume(before),
            Message::More | Message::Less => {
                let text = self.stepped(field, message == Message::More);
                let line = text.map_or(line, |t| Line::new(&t));
                self.mode = Mode::Typing { field, line, before };
                self.retyped()
            }
            other => {
                edit(&mut line, other);
                self.mode = Mode::Typing { field, line, before };
                self.retyped()
            }
        }
    }

    fn picking(&mut self, message: Message, mut picker: Picker) -> Vec<Effect> {
        match message {
            Message::Accept => return self.set(picker.field, &picker.chosen()),
            Message::Back => return Vec::new(),
            Message::Mark if picker.several.is_some() => picker.mark(),
            Message::Backspace | Message::Clear => {
                edit(&mut picker.line, message);
                picker.cursor = 0;
            }
            other => picker.go(steps(other)),
        }
        self.mode = Mode::Picking(picker);
        Vec::new()
    }

    fn normal(&mut self, message: Message) -> Vec<Effect> {
        match message {
            Message::Help => self.mode = Mode::Help(0),
            Message::NextPane => self.inputs = !self.inputs,
            Message::Show(screen) => return self.show(screen),
            Message::Copy => return vec![Effect::Copy(crate::report::quoted(&command::of(self)))],
            Message::Export => self.mode = Mode::Exporting(Line::new(command::file(self))),
            Message::Undo => {
                if let Some(before) = self.past.pop() {
                    self.future.push(self.values.clone());
                    return self.assume(before);
                }
                self.say("nothing to undo", false);
            }
            Message::Redo => {
                if let Some(after) = self.future.pop() {
                    self.past.push(self.values.clone());
                    return self.assume(after);
                }
                self.say("nothing to redo", false);
            }
            Message::Back if !self.filter.is_empty() => {
                self.filter.clear();
                return self.keep_in_table();
            }
            Message::Back if self.screen != Screen::Plan => return self.show(Screen::Plan),
            _ if self.inputs => return self.on_inputs(message),
            _ => return self.on_screen(message),
        }
        Vec::new()
    }

    pub(super) fn show(&mut self, screen: Screen) -> Vec<Effect> {
        self.screen = screen;
        self.inputs &= screen == Screen::Plan;
        vec![self.ask(self.want())]
    }

    fn on_inputs(&mut self, message: Message) -> Vec<Effect> {
        let field = self.field;
        match message {
            Message::Left | Message::Right => {
                if let Some(text) = self.stepped(field, message == Message::Right) {
                    return self.set(field, &text);
                }
            }
            Message::Less | Message::More => {
                let up = message == Message::More;
                let counted = matches!(FIELDS[field].ladder, Ladder::Counts(_));
                let text = counted.then(|| form::fine(self.values.get(field), up)).flatten();
                if let Some(text) = text.or_else(|| self.stepped(field, up)) {
                    return self.set(field, &text);
                }
            }
            Message::Usual => return self.set(field, FIELDS[field].usual),
            Message::Accept => self.open(field),
            other => {
                let last = FIELDS.len() - 1;
                self.field = match other {
                    Message::First => 0,
                    Message::Last => last,
                    other => field.saturating_add_signed(steps(other)).min(last),
                };
            }
        }
        Vec::new()
    }

    /// Opens a parameter: a list where there is one, else a line.
    fn open(&mut self, field: usize) {
        let value = self.values.get(field).to_owned();
        let (items, several) = match FIELDS[field].ladder {
            Ladder::Models => (&self.lists.models, None),
            Ladder::Gpus => (&self.lists.gpus, Some(',')),
            Ladder::Policies => (&self.lists.policies, Some(' ')),
            Ladder::Engines => (&self.lists.engines, None),
            Ladder::Steps(_) | Ladder::Counts(_) => {
                let before = self.values.clone();
                self.mode = Mode::Typing { field, line: Line::new(&value), before };
                return;
            }
        };
        self.mode = Mode::Picking(Picker::new(field, items.clone(), several, &value));
    }

    fn export(&mut self, path: String) -> Vec<Effect> {
        if path.trim().is_empty() {
            self.say("no file was named: nothing is written", true);
            return Vec::new();
        }
        let mut args = self.values.arguments();
        args.extend((self.screen == Screen::Frontier).then(|| "--pareto".to_owned()));
        vec![Effect::Write { path: path.trim().to_owned(), args }]
    }

    /// A line for the user.
    pub fn say(&mut self, text: &str, bad: bool) {
        self.said = Some(Said { text: text.to_owned(), bad });
    }
}

fn edit(line: &mut Line, message: Message) {
    match message {
        Message::Backspace => line.backspace(),
        Message::Delete => line.delete(),
        Message::Clear => line.clear(),
        Message::Left => line.go(-1),
        Message::Right => line.go(1),
        Message::First => line.go(isize::MIN),
        Message::Last => line.go(isize::MAX),
        _ => {}
    }
}

fn steps(message: Message) -> isize {
    match message {
        Message::Up => -1,
        Message::Down => 1,
        Message::PageUp => -PAGE,
        Message::PageDown => PAGE,
        Message::First => isize::MIN,
        Message::Last => isize::MAX,
        _ => 0,
    }
}

pub(super) fn moved(at: usize, message: Message, length: usize) -> usize {
    at.saturating_add_signed(steps(message)).min(length.saturating_sub(1))
}

impl App {
    /// Whether there is something to undo.
    pub fn can_undo(&self) -> bool {
        !self.past.is_empty()
    }
}

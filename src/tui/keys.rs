//! The one table of keys: what dispatches, what the footer shows and what the help lists.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::app::Screen;

/// Where a key means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// A text is typed: it owns the keyboard.
    Field,
    /// A list to choose from is open.
    Picker,
    /// The help is open.
    Help,
    /// The inputs have the focus.
    Inputs,
    /// A screen has the focus.
    On(Screen),
    /// Nothing is typed.
    Anywhere,
}

/// What a key does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    Quit,
    Back,
    Help,
    Show(Screen),
    NextPane,
    Up,
    Down,
    Left,
    Right,
    PageUp,
    PageDown,
    First,
    Last,
    Accept,
    AcceptNext,
    Less,
    More,
    Mark,
    Pin,
    Unpin,
    Sort,
    Filter,
    Copy,
    Export,
    Undo,
    Redo,
    Usual,
    Phase,
    Axis,
    Start,
    Cancel,
    Recalibrate,
    Backspace,
    Delete,
    Clear,
}

/// A key without its chance modifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Press {
    code: KeyCode,
    control: bool,
}

/// One line of the table.
pub struct Binding {
    pub context: Context,
    pub keys: &'static [Press],
    pub message: Message,
    /// What it does, in few words.
    pub hint: &'static str,
    /// Whether the footer shows it.
    pub footer: bool,
}

const fn c(letter: char) -> Press {
    Press { code: KeyCode::Char(letter), control: false }
}
const fn ctrl(letter: char) -> Press {
    Press { code: KeyCode::Char(letter), control: true }
}
const fn k(code: KeyCode) -> Press {
    Press { code, control: false }
}

const ENTER: Press = k(KeyCode::Enter);
const ESC: Press = k(KeyCode::Esc);
const UP: Press = k(KeyCode::Up);
const DOWN: Press = k(KeyCode::Down);
const LEFT: Press = k(KeyCode::Left);
const RIGHT: Press = k(KeyCode::Right);
const TAB: Press = k(KeyCode::Tab);
const SPACE: Press = c(' ');

macro_rules! keys {
    ($($context:expr, [$($key:expr),*] => $message:expr, $hint:literal, $footer:literal;)*) => {
        /// All keys; the first line that fits counts.
        pub const KEYS: &[Binding] = &[$(Binding {
            context: $context, keys: &[$($key),*], message: $message, hint: $hint, footer: $footer,
        }),*];
    };
}

use Context::{Anywhere, Field, Help, Inputs, On, Picker};

keys! {
    Field, [ENTER] => Message::Accept, "keep", true;
    Field, [ESC] => Message::Back, "discard", true;
    Field, [TAB] => Message::AcceptNext, "keep, next field", true;
    Field, [UP] => Message::More, "next value", true;
    Field, [DOWN] => Message::Less, "previous value", false;
    Field, [LEFT] => Message::Left, "cursor left", false;
    Field, [RIGHT] => Message::Right, "cursor right", false;
    Field, [k(KeyCode::Home)] => Message::First, "to the beginning", false;
    Field, [k(KeyCode::End)] => Message::Last, "to the end", false;
    Field, [k(KeyCode::Backspace)] => Message::Backspace, "remove", false;
    Field, [k(KeyCode::Delete)] => Message::Delete, "remove under the cursor", false;
    Field, [ctrl('u')] => Message::Clear, "remove all", true;
    Field, [ctrl('c')] => Message::Quit, "quit", false;

    Picker, [ENTER] => Message::Accept, "take", true;
    Picker, [ESC] => Message::Back, "discard", true;
    Picker, [SPACE] => Message::Mark, "mark several", true;
    Picker, [UP] => Message::Up, "up", false;
    Picker, [DOWN] => Message::Down, "down", false;
    Picker, [k(KeyCode::PageUp)] => Message::PageUp, "page up", false;
    Picker, [k(KeyCode::PageDown)] => Message::PageDown, "page down", false;
    Picker, [k(KeyCode::Backspace)] => Message::Backspace, "remove", false;
    Picker, [ctrl('u')] => Message::Clear, "remove all", false;
    Picker, [ctrl('c')] => Message::Quit, "quit", false;

    Help, [ESC, c('?'), c('q'), ENTER] => Message::Back, "close", true;
    Help, [UP, c('k')] => Message::Up, "up", true;
    Help, [DOWN, c('j')] => Message::Down, "down", true;
    Help, [k(KeyCode::PageUp)] => Message::PageUp, "page up", false;
    Help, [k(KeyCode::PageDown), SPACE] => Message::PageDown, "page down", false;
    Help, [ctrl('c')] => Message::Quit, "quit", false;

    Inputs, [UP, c('k')] => Message::Up, "previous input", false;
    Inputs, [DOWN, c('j')] => Message::Down, "next input", false;
    Inputs, [LEFT, c('h'), c('[')] => Message::Left, "previous", true;
    Inputs, [RIGHT, c('l'), c(']')] => Message::Right, "next", true;
    Inputs, [c('-')] => Message::Less, "a little less", false;
    Inputs, [c('+'), c('=')] => Message::More, "finer", true;
    Inputs, [ENTER, c('i')] => Message::Accept, "type", true;
    Inputs, [k(KeyCode::Backspace), k(KeyCode::Delete)] => Message::Usual, "as usual", false;

    On(Screen::Plan), [ENTER] => Message::Accept, "op by op", true;
    On(Screen::Plan), [SPACE, c('m')] => Message::Pin, "pin", true;
    On(Screen::Plan), [c('s')] => Message::Sort, "sort", true;
    On(Screen::Plan), [c('/')] => Message::Filter, "filter", true;
    On(Screen::Ops), [c('p')] => Message::Phase, "phase", true;
    On(Screen::Ops), [c('s')] => Message::Sort, "sort", true;
    On(Screen::Frontier), [ENTER] => Message::Accept, "choose", true;
    On(Screen::Frontier), [SPACE, c('m')] => Message::Pin, "pin", true;
    On(Screen::Frontier), [c('x')] => Message::Axis, "axis", true;
    On(Screen::Frontier), [k(KeyCode::Backspace), k(KeyCode::Delete)] => Message::Unpin, "unpin last", true;
    On(Screen::Crossover), [LEFT, c('h')] => Message::Left, "shorter", false;
    On(Screen::Crossover), [RIGHT, c('l')] => Message::Right, "longer", false;
    On(Screen::Crossover), [ENTER] => Message::Accept, "plan this cell", true;
    On(Screen::Run), [ENTER, c('r')] => Message::Start, "run here", true;
    On(Screen::Run), [c('x')] => Message::Cancel, "cancel", true;
    On(Screen::Run), [c('p')] => Message::Recalibrate, "recalibrate", true;
    On(Screen::Quality), [c('s')] => Message::Sort, "sort", true;

    Anywhere, [UP, c('k')] => Message::Up, "up", false;
    Anywhere, [DOWN, c('j')] => Message::Down, "down", false;
    Anywhere, [k(KeyCode::PageUp)] => Message::PageUp, "page up", false;
    Anywhere, [k(KeyCode::PageDown)] => Message::PageDown, "page down", false;
    Anywhere, [k(KeyCode::Home), c('g')] => Message::First, "first", false;
    Anywhere, [k(KeyCode::End), c('G')] => Message::Last, "last", false;
    Anywhere, [TAB, k(KeyCode::BackTab)] => Message::NextPane, "pane", true;
    Anywhere, [c('1')] => Message::Show(Screen::Plan), "Plan", false;
    Anywhere, [c('2')] => Message::Show(Screen::Ops), "Ops", false;
    Anywhere, [c('3')] => Message::Show(Screen::Frontier), "Frontier", false;
    Anywhere, [c('4')] => Message::Show(Screen::Crossover), "Crossover", false;
    Anywhere, [c('5')] => Message::Show(Screen::Run), "Run", false;
    Anywhere, [c('6')] => Message::Show(Screen::Quality), "Quality", false;
    Anywhere, [c('u'), ctrl('z')] => Message::Undo, "undo", true;
    Anywhere, [c('U'), ctrl('r')] => Message::Redo, "redo", false;
    Anywhere, [c('c'), c('y')] => Message::Copy, "copy", true;
    Anywhere, [c('e')] => Message::Export, "export", true;
    Anywhere, [ESC] => Message::Back, "back", false;
    Anywhere, [c('?'), k(KeyCode::F(1))] => Message::Help, "help", false;
    Anywhere, [c('q'), ctrl('c')] => Message::Quit, "quit", false;
}

/// What a key does where these contexts hold, the nearest first.
pub fn lookup(contexts: &[Context], key: KeyEvent) -> Option<Message> {
    // A modified letter is not the letter.
    if key.modifiers.intersects(KeyModifiers::ALT | KeyModifiers::SUPER | KeyModifiers::META) {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let press = Press { code: key.code, control };
    contexts.iter().find_map(|context| {
        let mut lines = KEYS.iter().filter(|b| b.context == *context);
        lines.find(|b| b.keys.contains(&press)).map(|b| b.message)
    })
}

impl Press {
    /// As people read it.
    pub fn name(self) -> String {
        let name = match self.code {
            KeyCode::Char(' ') => "Space".to_owned(),
            KeyCode::Char(c) if self.control => format!("Ctrl-{}", c.to_uppercase()),
            KeyCode::Char(c) => c.to_string(),
            KeyCode::Enter => "Enter".to_owned(),
            KeyCode::Up => "↑".to_owned(),
            KeyCode::Down => "↓".to_owned(),
            KeyCode::Left => "←".to_owned(),
            KeyCode::Right => "→".to_owned(),
            KeyCode::Backspace => "Bksp".to_owned(),
            KeyCode::BackTab => "Shift-Tab".to_owned(),
            KeyCode::PageUp => "PgUp".to_owned(),
            KeyCode::PageDown => "PgDn".to_owned(),
            KeyCode::Delete => "Del".to_owned(),
            KeyCode::F(n) => format!("F{n}"),
            other => format!("{other:?}"),
        };
        if self.control && !name.starts_with("Ctrl") { format!("Ctrl-{name}") } else { name }
    }
}

/// How a context is headed in the help.
pub fn title(context: Context) -> String {
    match context {
        Field => "While a text is typed".to_owned(),
        Picker => "In a list".to_owned(),
        Help => "In this help".to_owned(),
        Inputs => "In the inputs".to_owned(),
        On(screen) => format!("On {}", screen.name()),
        Anywhere => "Anywhere else".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_in_a_context_twice() {
        for (i, a) in KEYS.iter().enumerate() {
            for b in &KEYS[i + 1..] {
                let both = a.context == b.context && a.keys.iter().any(|k| b.keys.contains(k));
                assert!(!both, "{} and {}", a.hint, b.hint);
            }
        }
    }

    #[test]
    fn a_field_owns_the_keyboard() {
        for letter in ('a'..='z').chain('0'..='9').chain("?/[]+-= ".chars()) {
            let key = KeyEvent::new(KeyCode::Char(letter), KeyModifiers::NONE);
            assert_eq!(lookup(&[Context::Field], key), None, "{letter}");
        }
    }

    #[test]
    fn modified_letters_are_other_keys() {
        let key = |m| KeyEvent::new(KeyCode::Char('q'), m);
        assert_eq!(lookup(&[Anywhere], key(KeyModifiers::NONE)), Some(Message::Quit));
        assert_eq!(lookup(&[Anywhere], key(KeyModifiers::ALT)), None);
        assert_eq!(lookup(&[Anywhere], key(KeyModifiers::CONTROL)), None);
    }
}

//! The state of the planner, apart from keys and drawing.

use std::sync::Arc;

use batchmax_sim::plan::Candidate;

use super::answer::{Advised, Found, Measured, Ops};
use super::form::{self, FIELDS, Ladder, Values};
use super::keys::Context;
use super::map::{Axes, Winner};
use super::picker::{Item, Picker};
use super::text::Line;
use super::theme::Theme;
use super::trial::Trial;
use super::worker::{Answered, Part, Request, Want};
use crate::commands::plan::Curve;

/// A screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    Plan,
    Ops,
    Frontier,
    Crossover,
    Run,
    Quality,
}

/// All screens, in the order of their keys.
pub const SCREENS: [Screen; 6] =
    [Screen::Plan, Screen::Ops, Screen::Frontier, Screen::Crossover, Screen::Run, Screen::Quality];

impl Screen {
    /// As tabs and help name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plan => "Plan",
            Self::Ops => "Ops",
            Self::Frontier => "Frontier",
            Self::Crossover => "Crossover",
            Self::Run => "Run",
            Self::Quality => "Quality",
        }
    }
}

/// What has the keyboard.
#[derive(Clone, Debug)]
pub enum Mode {
    Normal,
    /// A parameter is typed; the values before, for Esc.
    Typing {
        field: usize,
        line: Line,
        before: Values,
    },
    Filtering(Line),
    Exporting(Line),
    Picking(Picker),
    /// Lines scrolled.
    Help(usize),
}

/// What the outside is to do.
#[derive(Clone, Debug)]
pub enum Effect {
    Ask(Request),
    Copy(String),
    /// Write the answer of these arguments of `plan` to a file.
    Write {
        path: String,
        args: Vec<String>,
    },
    /// Start the program with these arguments beside.
    Start(Vec<String>),
    Stop,
    Quit,
}

/// How a table of candidates is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Rank,
    Ttft,
    Tpot,
    Memory,
    Name,
}

/// A line for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub text: String,
    pub bad: bool,
}

/// A candidate that is kept for comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Pin {
    /// Letter by which charts and tables name it.
    pub letter: char,
    pub command: Vec<String>,
    /// What is compared: name and value.
    pub facts: Vec<(&'static str, String)>,
    /// Time per token in seconds, total bytes, tokens per second.
    pub point: (f64, f64, f64),
}

/// What there is to choose from.
#[derive(Debug, Default)]
pub struct Lists {
    pub models: Vec<Item>,
    pub gpus: Vec<Item>,
    pub policies: Vec<Item>,
    pub engines: Vec<Item>,
}

/// Answers, each with the number of the query it is of.
#[derive(Default)]
pub struct Answers {
    pub found: Option<(u64, Box<Found>)>,
    /// When the ranking came, seconds.
    pub found_at: f64,
    pub advised: Option<(u64, Box<Advised>)>,
    pub curves: Option<(u64, usize, Vec<Curve>)>,
    pub ops: Option<(u64, usize, Option<Box<Ops>>)>,
    pub frontier: Option<(u64, Box<Found>)>,
    pub axes: Option<(u64, Box<Axes>)>,
    pub columns: Vec<Option<Vec<Option<Winner>>>>,
    pub quality: Option<(u64, Option<Box<Measured>>)>,
    /// Why the newest query has no answer.
    pub failed: Option<(u64, String)>,
}

/// Everything.
pub struct App {
    pub theme: Theme,
    pub lists: Arc<Lists>,
    pub screen: Screen,
    pub mode: Mode,
    /// Whether the inputs have the focus.
    pub inputs: bool,
    /// The input under the cursor.
    pub field: usize,
    pub values: Values,
    pub(super) past: Vec<Values>,
    pub(super) future: Vec<Values>,
    /// Number of the newest query.
    pub query: u64,
    /// When it was asked, seconds.
    pub asked_at: f64,
    /// Seconds since the start.
    pub now: f64,
    pub answers: Answers,
    /// Index of the candidate under the cursor.
    pub selected: usize,
    /// Who that was, for the next ranking; `None`: whoever is recommended.
    pub(super) picked: Option<String>,
    pub sort: Sort,
    pub filter: String,
    /// Rows under the cursors of Ops, Frontier and Quality.
    pub rows: [usize; 3],
    /// Ops: of one phase alone.
    pub phase: Option<batchmax_sim::op::Phase>,
    /// Frontier: memory instead of time per token.
    pub by_memory: bool,
    pub by_name: bool,
    /// Crossover: the cell under the cursor (column, row).
    pub cell: (usize, usize),
    pub pins: Vec<Pin>,
    pub trial: Trial,
    pub said: Option<Said>,
    /// Whether this build has the executor.
    pub can_run: bool,
}

impl App {
    /// With what is asked first.
    pub fn new(values: Values, lists: Arc<Lists>, theme: Theme) -> Self {
        Self {
            theme,
            lists,
            screen: Screen::Plan,
            mode: Mode::Normal,
            inputs: true,
            field: 0,
            values,
            past: Vec::new(),
            future: Vec::new(),
            query: 1,
            asked_at: 0.0,
            now: 0.0,
            answers: Answers::default(),
            selected: 0,
            picked: None,
            sort: Sort::Rank,
            filter: String::new(),
            rows: [0; 3],
            phase: None,
            by_memory: false,
            by_name: false,
            cell: (0, 0),
            pins: Vec::new(),
            trial: Trial::Idle,
            said: None,
            can_run: cfg!(feature = "exec"),
        }
    }

    /// The contexts of keys that hold now, the nearest first.
    pub fn contexts(&self) -> Vec<Context> {
        match &self.mode {
            Mode::Typing { .. } | Mode::Filtering(_) | Mode::Exporting(_) => vec![Context::Field],
            Mode::Picking(_) => vec![Context::Picker],
            Mode::Help(_) => vec![Context::Help],
            Mode::Normal if self.inputs => vec![Context::Inputs, Context::Anywhere],
            Mode::Normal => vec![Context::On(self.screen), Context::Anywhere],
        }
    }

    /// The ranking that is shown, and whether it is of the newest query.
    pub fn found(&self) -> Option<(&Found, bool)> {
        self.answers.found.as_ref().map(|(query, found)| (found.as_ref(), *query == self.query))
    }

    /// Why the newest query has no answer.
    pub fn failed(&self) -> Option<&str> {
        self.answers.failed.as_ref().filter(|(q, _)| *q == self.query).map(|(_, why)| why.as_str())
    }

    /// What to take, in the words of `plan`.
    pub fn verdict(&self) -> Option<&str> {
        let (_, advised) = self.answers.advised.as_ref().filter(|(q, _)| *q == self.query)?;
        let line = advised.verdict.iter().find(|l| l.contains(" output tokens/s "));
        line.or(advised.verdict.first()).map(String::as_str)
    }

    /// Whether an answer is awaited.
    pub fn waits(&self) -> bool {
        self.failed().is_none() && self.found().is_none_or(|(_, new)| !new)
    }

    /// The candidate under the cursor.
    pub fn candidate(&self) -> Option<(&Found, &Candidate)> {
        let (found, _) = self.found()?;
        found.candidates.get(self.selected).map(|c| (found, c))
    }

    /// What is wanted for the screen.
    pub fn want(&self) -> Want {
        match self.screen {
            Screen::Plan => Want::Plan(self.selected),
            Screen::Ops => Want::Ops(self.selected),
            Screen::Frontier => Want::Frontier,
            Screen::Crossover => {
                let known = self.answers.columns.iter().take(64).enumerate();
                Want::Map(known.map(|(i, c)| u64::from(c.is_some()) << i).sum())
            }
            Screen::Run => Want::Ranking,
            Screen::Quality => Want::Quality,
        }
    }

    /// The request of the newest query.
    pub fn ask(&self, want: Want) -> Effect {
        Effect::Ask(Request { query: self.query, args: self.values.arguments(), want })
    }

    /// Takes a part of an answer; what is of an older query is dropped. Asks on where the screen needs more.
    pub fn take(&mut self, answered: Answered) -> Vec<Effect> {
        let Answered { query, part } = answered;
        if query != self.query {
            return Vec::new();
        }
        match part {
            Part::Found(found) => {
                let who = |c: &Candidate| key(&found, c);
                let kept = self.picked.as_ref().and_then(|picked| {
                    found.shown.iter().copied().find(|i| who(&found.candidates[*i]) == *picked)
                });
                self.selected = kept.or(found.shown.first().copied()).unwrap_or_default();
                self.answers.found = Some((query, found));
                self.answers.found_at = self.now;
                if self.screen != Screen::Run {
                    return vec![self.ask(self.want())];
                }
            }
            Part::Advised(advised) => self.answers.advised = Some((query, advised)),
            Part::Curves(of, curves) => self.answers.curves = Some((query, of, curves)),
            Part::Ops(of, ops) => self.answers.ops = Some((query, of, ops)),
            Part::Frontier(found) => {
                self.answers.frontier = Some((query, found));
                self.rows[1] = self.rows[1].min(self.front().len().saturating_sub(1));
            }
            Part::Axes(axes) => {
                if self.answers.axes.as_ref().is_none_or(|(q, _)| *q != query) {
                    self.answers.columns = vec![None; axes.contexts.len()];
                    self.cell = axes.own;
                }
                self.answers.axes = Some((query, axes));
            }
            Part::Column(column) => {
                if let Some(place) = self.answers.columns.get_mut(column.index) {
                    *place = Some(column.cells);
                }
            }
            Part::Quality(measured) => self.answers.quality = Some((query, measured)),
            Part::Failed(why) => self.answers.failed = Some((query, why)),
        }
        Vec::new()
    }

    /// The values beside a parameter's.
    pub fn ladder(&self, field: usize) -> Vec<&str> {
        fn names(list: &[Item]) -> impl Iterator<Item = &str> {
            list.iter().map(|i| i.name.as_str())
        }
        match FIELDS[field].ladder {
            Ladder::Models => names(&self.lists.models).collect(),
            Ladder::Gpus => names(&self.lists.gpus).collect(),
            Ladder::Policies => std::iter::once("").chain(names(&self.lists.policies)).collect(),
            Ladder::Engines => std::iter::once("").chain(names(&self.lists.engines)).collect(),
            Ladder::Steps(list) | Ladder::Counts(list) => list.to_vec(),
        }
    }

    /// A value one step further.
    pub fn stepped(&self, field: usize, up: bool) -> Option<String> {
        form::neighbour(&self.ladder(field), self.values.get(field), up)
    }
}

/// Who a candidate is, whatever its rank.
pub fn key(found: &Found, c: &Candidate) -> String {
    let host = found.host(c);
    format!("{} {} {} {} {}", c.preset, c.schedule, host.gpu, host.tp, host.kv)
}

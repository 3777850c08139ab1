//! What keys do on each screen.

use batchmax_sim::op::Phase;

use super::app::{App, Effect, Mode, Screen, Sort, key};
use super::form;
use super::keys::Message;
use super::pins;
use super::text::Line;
use super::trial::Trial;
use super::update::moved;

impl App {
    pub(super) fn on_screen(&mut self, message: Message) -> Vec<Effect> {
        match (self.screen, message) {
            (Screen::Plan, Message::Accept) => return self.show(Screen::Ops),
            (Screen::Plan, Message::Sort) => {
                self.sort = match self.sort {
                    Sort::Rank => Sort::Ttft,
                    Sort::Ttft => Sort::Tpot,
                    Sort::Tpot => Sort::Memory,
                    Sort::Memory => Sort::Name,
                    Sort::Name => Sort::Rank,
                };
            }
            (Screen::Plan, Message::Filter) => {
                self.mode = Mode::Filtering(Line::new(&self.filter));
            }
            (Screen::Plan | Screen::Frontier, Message::Pin) => pins::pin(self),
            (Screen::Plan, other) => return self.move_in_table(other),
            (Screen::Ops, Message::Phase) => {
                self.phase = match self.phase {
                    None => Some(Phase::Prefill),
                    Some(Phase::Prefill) => Some(Phase::Decode),
                    Some(Phase::Decode) => None,
                };
                self.rows[0] = 0;
            }
            (Screen::Ops | Screen::Quality, Message::Sort) => self.by_name = !self.by_name,
            (Screen::Frontier, Message::Axis) => {
                self.by_memory = !self.by_memory;
                self.rows[1] = 0;
            }
            (Screen::Frontier, Message::Unpin) => drop(self.pins.pop()),
            (Screen::Frontier, Message::Accept) => return self.choose_from_front(),
            (Screen::Crossover, other) => return self.on_map(other),
            (Screen::Run, Message::Start) => return self.start(),
            (Screen::Run, Message::Cancel) => {
                if let Trial::Going(going) = &mut self.trial {
                    going.stopping = true;
                    return vec![Effect::Stop];
                }
                self.say("nothing runs", false);
            }
            (Screen::Run, Message::Recalibrate) => return self.recalibrate(),
            (screen, other) => {
                let (row, length) = match screen {
                    Screen::Ops => (0, self.op_rows().len()),
                    Screen::Frontier => (1, self.front().len()),
                    _ => (2, self.quality_rows().len()),
                };
                self.rows[row] = moved(self.rows[row], other, length);
            }
        }
        Vec::new()
    }

    fn move_in_table(&mut self, message: Message) -> Vec<Effect> {
        let table = self.table();
        let at = table.iter().position(|i| *i == self.selected).unwrap_or_default();
        match table.get(moved(at, message, table.len())) {
            Some(index) if *index != self.selected => self.select(*index),
            _ => Vec::new(),
        }
    }

    /// Puts the cursor on a candidate.
    pub(super) fn select(&mut self, index: usize) -> Vec<Effect> {
        self.selected = index;
        self.picked = self.candidate().map(|(found, c)| key(found, c));
        vec![self.ask(self.want())]
    }

    /// Where the filter hides the selected row, the first one is selected.
    pub(super) fn keep_in_table(&mut self) -> Vec<Effect> {
        let table = self.table();
        match table.first() {
            Some(first) if !table.contains(&self.selected) => self.select(*first),
            _ => Vec::new(),
        }
    }

    fn on_map(&mut self, message: Message) -> Vec<Effect> {
        let Some((_, axes)) = &self.answers.axes else { return Vec::new() };
        let (columns, rows) = (axes.contexts.len(), axes.memories.len());
        match message {
            Message::Left => self.cell.0 = self.cell.0.saturating_sub(1),
            Message::Right => self.cell.0 = (self.cell.0 + 1).min(columns.saturating_sub(1)),
            Message::Accept => {
                let (context, memory) = (axes.contexts[self.cell.0], axes.memories[self.cell.1]);
                let flag = if axes.caches { "kv-memory" } else { "memory" };
                let mut values = self.values.clone();
                values.set(form::index("isl"), &context.to_string());
                values.set(form::index(flag), &format!("{}B", memory.0));
                let mut effects = self.change(values);
                effects.extend(self.show(Screen::Plan));
                self.inputs = false;
                return effects;
            }
            other => self.cell.1 = moved(self.cell.1, other, rows),
        }
        Vec::new()
    }

    fn choose_from_front(&mut self) -> Vec<Effect> {
        let chosen = self.front().get(self.rows[1]).copied();
        let Some(((_, found), index)) = self.answers.frontier.as_ref().zip(chosen) else {
            return Vec::new();
        };
        let c = &found.candidates[index];
        let batch = c.answer.as_ref().map_or(0, |a| a.batch);
        let (preset, schedule) = (c.preset.clone(), c.schedule.to_string());
        let mut values = self.values.clone();
        values.set(form::index("policy"), &preset);
        values.set(form::index("schedule"), &schedule);
        values.set(form::index("batch"), &batch.to_string());
        let mut effects = self.change(values);
        effects.extend(self.show(Screen::Plan));
        effects
    }
}

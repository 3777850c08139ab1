//! What was written, and what was left out and why.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};

/// A file that was written.
#[derive(Clone, Debug, Serialize)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// Rows without the head.
    pub rows: u64,
}

#[derive(Clone, Debug)]
struct LeftOut {
    rows: u64,
    first: String,
}

/// Counts for the end of an import.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Files that were written.
    pub files: Vec<Written>,
    left_out: BTreeMap<String, LeftOut>,
    remarks: Vec<String>,
}

impl Summary {
    /// Counts a row that is left out; `place` names the first of each reason.
    pub fn leave_out(&mut self, reason: &str, place: impl FnOnce() -> String) {
        match self.left_out.get_mut(reason) {
            Some(known) => known.rows += 1,
            None => {
                let first = LeftOut { rows: 1, first: place() };
                self.left_out.insert(reason.to_owned(), first);
            }
        }
    }

    /// A line for people.
    pub fn remark(&mut self, line: String) {
        if !self.remarks.contains(&line) {
            self.remarks.push(line);
        }
    }

    /// Lines for stderr.
    pub fn lines(&self) -> Vec<String> {
        let rows = |n: u64| if n == 1 { "1 row".to_owned() } else { format!("{n} rows") };
        let left_out = self
            .left_out
            .iter()
            .map(|(why, l)| format!("left out {}: {why} (first: {})", rows(l.rows), l.first));
        self.remarks.iter().cloned().chain(left_out).collect()
    }

    /// The same for programs.
    pub fn left_out(&self) -> Vec<Value> {
        self.left_out
            .iter()
            .map(|(why, l)| json!({ "reason": why, "rows": l.rows, "first": l.first }))
            .collect()
    }

    /// Why most rows were left out, for an error's end.
    pub fn chief_reason(&self) -> String {
        let chief = self.left_out.iter().max_by_key(|(_, l)| l.rows);
        chief.map_or_else(String::new, |(why, l)| format!(": {why} ({})", l.first))
    }

    /// Rows left out for any reason.
    #[cfg(test)]
    pub fn rows_left_out(&self) -> u64 {
        self.left_out.values().map(|l| l.rows).sum()
    }
}

/// Text from a foreign file, fit for one line of a message.
pub fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

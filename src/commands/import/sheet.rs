//! Foreign CSV files, read row by row with their place at hand.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::summary::{Summary, tame};

/// No file of this kind comes near it.
const LARGEST_FILE: u64 = 1 << 30;

/// A CSV with a head.
pub struct Sheet {
    /// For messages.
    pub name: String,
    columns: HashMap<String, usize>,
    width: usize,
    reader: csv::Reader<std::io::Cursor<Vec<u8>>>,
}

impl Sheet {
    /// From a file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(&path.display().to_string(), read_file(path)?)
    }

    /// From bytes; `name` is for messages.
    pub fn new(name: &str, bytes: Vec<u8>) -> Result<Self> {
        let mut reader =
            csv::ReaderBuilder::new().flexible(true).from_reader(std::io::Cursor::new(bytes));
        let head = reader.byte_headers().with_context(|| name.to_owned())?.clone();
        let Ok(head) = csv::StringRecord::from_byte_record(head) else {
            bail!("{name}: the first line is not UTF-8 text");
        };
        let columns: HashMap<String, usize> = head
            .iter()
            .enumerate()
            .map(|(i, column)| (column.trim_start_matches('\u{feff}').trim().to_owned(), i))
            .collect();
        if head.len() < 2 {
            bail!("{name}: no comma in the first line: not a CSV file");
        }
        Ok(Self { name: name.to_owned(), columns, width: head.len(), reader })
    }

    /// Whether it has a column.
    pub fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    /// Fails if a column is missing.
    pub fn expect(&self, columns: &[&str]) -> Result<()> {
        match columns.iter().find(|c| !self.has(c)) {
            Some(missing) => bail!("{}: no column \"{missing}\"", self.name),
            None => Ok(()),
        }
    }

    /// Calls `take` with every sound row; what it refuses is left out and counted.
    pub fn visit(
        &mut self,
        summary: &mut Summary,
        mut take: impl FnMut(&Row<'_>, &mut Summary) -> Result<(), String>,
    ) {
        let mut record = csv::ByteRecord::new();
        loop {
            // The line of a record is known after it was read, that of the head is 1.
            match self.reader.read_byte_record(&mut record) {
                Ok(false) => return,
                Ok(true) => {}
                Err(problem) => {
                    let reason = format!("not CSV ({})", tame(&problem.to_string()));
                    summary.leave_out(&reason, || self.name.clone());
                    return;
                }
            }
            let line = record.position().map_or(0, csv::Position::line);
            let place = || format!("{} line {line}", self.name);
            if record.len() != self.width {
                summary.leave_out("another number of fields than the first line", place);
                continue;
            }
            let Ok(text) = csv::StringRecord::from_byte_record(record.clone()) else {
                summary.leave_out("not UTF-8", place);
                continue;
            };
            let row = Row { columns: &self.columns, record: text };
            if let Err(reason) = take(&row, summary) {
                summary.leave_out(&reason, place);
            }
        }
    }
}

/// A row of a sheet.
pub struct Row<'a> {
    columns: &'a HashMap<String, usize>,
    record: csv::StringRecord,
}

impl Row<'_> {
    /// A cell; blank if there is no such column.
    pub fn text(&self, column: &str) -> &str {
        self.columns.get(column).and_then(|i| self.record.get(*i)).unwrap_or("").trim()
    }

    /// A cell that must be a number.
    pub fn number(&self, column: &str) -> Result<f64, String> {
        self.text(column).parse().map_err(|_| format!("{column} is not a number"))
    }

    /// A cell that must be a whole number, at least `least`.
    pub fn whole(&self, column: &str, least: u64) -> Result<u64, String> {
        let value = self.number(column)?;
        if value.fract() != 0.0 || value < least as f64 || value > 1e12 {
            return Err(format!("{column} is not a whole number from {least}"));
        }
        Ok(value as u64)
    }
}

/// A whole file, unless it is too large to be one of ours.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    let about = path.metadata().with_context(|| path.display().to_string())?;
    if about.is_dir() {
        bail!("{}: a directory, expected a file", path.display());
    }
    if about.len() > LARGEST_FILE {
        bail!("{}: {} MB, too large", path.display(), about.len() / 1_000_000);
    }
    std::fs::read(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn unsound_rows_are_counted_with_their_line() {
        let bytes = b"\xef\xbb\xbfa,b\n1,2\n3\n\xff,4\n5,x\n7,8".to_vec();
        let mut sheet = Sheet::new("t.csv", bytes).unwrap();
        assert!(sheet.expect(&["a", "b"]).is_ok());
        let mut summary = Summary::default();
        let mut sums = Vec::new();
        sheet.visit(&mut summary, |row, _| {
            sums.push(row.whole("a", 1)? + row.whole("b", 1)?);
            Ok(())
        });
        assert_eq!(sums, [3, 15]);
        let lines = summary.lines().join("\n");
        for part in ["t.csv line 3", "not UTF-8 (first: t.csv line 4)", "b is not a number"] {
            assert!(lines.contains(part), "{lines}");
        }
    }

    #[test]
    fn heads_that_can_not_be_are_refused() {
        assert!(Sheet::new("t", b"\xff\xfe,a\n".to_vec()).is_err());
        assert!(Sheet::new("t", Vec::new()).is_err());
        let error = Sheet::new("t", b"a,b\n".to_vec()).unwrap().expect(&["c"]).unwrap_err();
        assert_eq!(error.to_string(), "t: no column \"c\"");
    }
}

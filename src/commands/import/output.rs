//! Files that appear whole or not at all, written row by row.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file under a temporary name beside its target; it goes when this value does, unless committed.
pub struct Staged {
    target: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Staged {
    /// Opens the neighbour of `target`.
    pub fn create(target: &Path) -> Result<Self> {
        if let Some(parent) = target.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = target.with_file_name(name);
        let file = File::create(&temporary).with_context(|| temporary.display().to_string())?;
        Ok(Self { target: target.to_owned(), temporary, file: Some(BufWriter::new(file)) })
    }

    /// Gives the file its name.
    pub fn commit(mut self) -> Result<PathBuf> {
        let name = || self.target.display().to_string();
        if let Some(file) = self.file.take() {
            let file = file.into_inner().map_err(io::IntoInnerError::into_error);
            file.and_then(|f| f.sync_all()).with_context(name)?;
        }
        std::fs::rename(&self.temporary, &self.target).with_context(name)?;
        Ok(std::mem::take(&mut self.target))
    }
}

impl Write for Staged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.as_mut().map_or(Ok(0), |f| f.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit there is nothing left; otherwise the error that led here is the one to report.
        if !self.target.as_os_str().is_empty() {
            std::fs::remove_file(&self.temporary).ok();
        }
    }
}

/// A CSV in the making.
pub struct Table {
    writer: csv::Writer<Staged>,
    rows: u64,
}

impl Table {
    /// Opens it; a head is written first unless rows bring their own.
    pub fn create(path: &Path, head: Option<&[&str]>) -> Result<Self> {
        let mut writer = csv::Writer::from_writer(Staged::create(path)?);
        if let Some(head) = head {
            writer.write_record(head)?;
        }
        Ok(Self { writer, rows: 0 })
    }

    /// Writes a row of texts.
    pub fn write<I: AsRef<[u8]>>(&mut self, row: impl IntoIterator<Item = I>) -> Result<()> {
        self.rows += 1;
        Ok(self.writer.write_record(row)?)
    }

    /// Writes a row with named fields.
    pub fn serialize(&mut self, row: &impl serde::Serialize) -> Result<()> {
        self.rows += 1;
        Ok(self.writer.serialize(row)?)
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<super::summary::Written> {
        let staged = self.writer.into_inner().map_err(|e| anyhow::anyhow!("{}", e.error()))?;
        Ok(super::summary::Written { path: staged.commit()?, rows: self.rows })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_only_when_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/a.csv");
        let mut table = Table::create(&path, Some(&["a", "b"])).unwrap();
        table.write(["1", "x,y"]).unwrap();
        drop(table);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        let mut table = Table::create(&path, Some(&["a", "b"])).unwrap();
        table.write(["1", "x,y"]).unwrap();
        assert_eq!(table.finish().unwrap().rows, 1);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a,b\n1,\"x,y\"\n");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}

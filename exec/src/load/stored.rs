//! Tensors where they lie, in one file or several.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use batchmax_sim::profile::GgmlType;

use super::LoadError;

/// A matrix in a file; a vector is one row.
pub(super) struct Stored {
    /// Index of the file.
    pub(super) shard: usize,
    /// First byte, from the beginning of the file.
    pub(super) start: u64,
    /// Rows.
    pub(super) rows: usize,
    /// Columns.
    pub(super) columns: usize,
    /// How elements are stored.
    pub(super) kind: GgmlType,
    /// What the file calls that, also where `kind` does not know it.
    pub(super) kind_name: String,
}

/// One open file. The handle is kept so that all bytes come from the file whose header was checked.
pub(super) struct Shard {
    /// Its path, for messages.
    pub(super) path: PathBuf,
    /// The handle; the lock makes seek and read one.
    file: Mutex<File>,
}

impl Shard {
    /// Takes an open file.
    pub(super) fn new(path: PathBuf, file: File) -> Self {
        Self { path, file: Mutex::new(file) }
    }

    /// Bytes, and when they were last changed.
    pub(super) fn size_and_time(&self) -> std::io::Result<(u64, SystemTime)> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let about = file.metadata()?;
        Ok((about.len(), about.modified()?))
    }

    /// Fills the buffer from a position.
    pub(super) fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(position)).and_then(|_| file.read_exact(buffer)).map_err(
            |problem| {
                if problem.kind() == std::io::ErrorKind::UnexpectedEof {
                    let problem = "became shorter while it was read; fetch it again".to_owned();
                    return LoadError::File { path: self.path.clone(), problem };
                }
                LoadError::Io { path: self.path.clone(), problem }
            },
        )
    }
}

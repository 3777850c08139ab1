//! What a checkpoint's files are, as far as that can be told without reading them.

use std::fmt::Write;
use std::fs::File;
use std::io::ErrorKind;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::stored::Shard;
use super::{Checkpoint, LoadError};

/// Samples that are hashed of each file, and their size: half a millisecond's work.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

impl Checkpoint {
    /// A line for each file that weights and tokens come from: its place, size and time of change, and a hash of samples from its
    /// beginning to its end. Another line means other bytes; the same line means the same bytes, unless somebody
    /// changed some between the samples and set the time back.
    ///
    /// # Errors
    /// If a file can't be read any more.
    pub fn identity(&self) -> Result<String, LoadError> {
        let mut text = String::new();
        for shard in &self.shards {
            text += &of_file(shard)?;
        }
        let beside: &[&str] =
            if self.header.is_none() { &["config.json", "tokenizer.json"] } else { &[] };
        for path in beside.iter().map(|name| self.path.join(name)) {
            match File::open(&path) {
                Ok(file) => text += &of_file(&Shard::new(path, file))?,
                // Weights need no tokenizer.
                Err(problem) if problem.kind() == ErrorKind::NotFound => {}
                Err(problem) => return Err(LoadError::Io { path, problem }),
            }
        }
        Ok(text)
    }

    /// A name for files that are made of this checkpoint: its own, and a hash of its place.
    #[must_use]
    pub fn file_name(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        // Models of one name from several directories.
        let whole = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let place = Sha256::digest(whole.as_os_str().as_encoded_bytes());
        format!("{stem}-{}", hex(&place[..6]))
    }
}

fn of_file(shard: &Shard) -> Result<String, LoadError> {
    let io = |problem| LoadError::Io { path: shard.path.clone(), problem };
    let (bytes, changed) = shard.size_and_time().map_err(io)?;
    // Before 1970: a time like any other, as long as it is the same next time.
    let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_else(|before| before.duration());
    let path = std::fs::canonicalize(&shard.path).map_err(io)?;
    let mut hash = Sha256::new();
    let mut sample = vec![0; SAMPLE_BYTES.min(bytes) as usize];
    for i in 0..SAMPLES {
        let last = bytes - sample.len() as u64;
        shard.read_at(last * i / (SAMPLES - 1), &mut sample)?;
        hash.update(&sample);
    }
    let hash = hex(&hash.finalize());
    Ok(format!("source {path:?} {bytes} {} {hash}\n", changed.as_nanos()))
}

/// Bytes as text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").ok();
        text
    })
}

//! Slower memory for offloaded tokens: a thread of its own stores them and brings them back while others compute.
//!
//! Tokens lie there whole, one after the other per cache (layer, sequence, KV head), in memory or in a file. The budget is
//! the caller's to check before a run ([`batchmax_sim::memory::offloaded`]); what is asked for arrives in the order in which
//! it was asked for.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use batchmax_sim::units::{Bytes, Seconds};

use crate::error::ExecError;

/// Where offloaded tokens lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TierPlace {
    /// In memory.
    #[default]
    Memory,
    /// In files of this directory, which are gone when the run ends.
    Directory(PathBuf),
}

/// What went to slower memory and back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TierUse {
    /// Most bytes that lay there.
    pub peak: Bytes,
    /// Bytes that went there.
    pub stored: Bytes,
    /// Bytes that came back.
    pub fetched: Bytes,
    /// Time that its thread needed for both.
    pub busy: Seconds,
    /// Time that the run waited for it.
    pub waited: Seconds,
}

/// A cache: layer, sequence and KV head, numbered.
pub(crate) type Slot = usize;

enum Job {
    Store(Slot, Vec<u8>),
    Fetch(Slot, Vec<u32>),
    Forget(Slot),
}

type Arrival = Result<(Slot, Vec<u8>, Seconds), ExecError>;

/// The slower memory of one run.
pub struct Tier {
    jobs: Option<Sender<Job>>,
    arrivals: Receiver<Arrival>,
    thread: Option<JoinHandle<()>>,
    arrived: HashMap<Slot, Vec<u8>>,
    /// Bytes of each cache that lie there.
    held: HashMap<Slot, u64>,
    now: u64,
    used: TierUse,
}

impl Tier {
    /// Empty, for tokens of `token_bytes` bytes.
    pub fn new(place: TierPlace, token_bytes: usize) -> Self {
        let (jobs, inbox) = channel();
        let (outbox, arrivals) = channel();
        let thread =
            std::thread::spawn(move || work(&Store::new(place), token_bytes, &inbox, &outbox));
        Self {
            jobs: Some(jobs),
            arrivals,
            thread: Some(thread),
            arrived: HashMap::new(),
            held: HashMap::new(),
            now: 0,
            used: TierUse::default(),
        }
    }

    fn send(&self, job: Job) {
        // The thread ends only when this sender does, or by an error that the next wait reports.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    /// Adds tokens to a cache.
    pub(crate) fn store(&mut self, slot: Slot, rows: Vec<u8>) {
        let bytes = rows.len() as u64;
        *self.held.entry(slot).or_default() += bytes;
        self.now += bytes;
        self.used.stored = Bytes(self.used.stored.0 + bytes);
        self.used.peak = self.used.peak.max(Bytes(self.now));
        self.send(Job::Store(slot, rows));
    }

    /// Asks for tokens of a cache.
    pub(crate) fn fetch(&mut self, slot: Slot, tokens: Vec<u32>) {
        self.send(Job::Fetch(slot, tokens));
    }

    /// Drops a cache.
    pub(crate) fn forget(&mut self, slot: Slot) {
        self.now -= self.held.remove(&slot).unwrap_or(0);
        self.arrived.remove(&slot);
        self.send(Job::Forget(slot));
    }

    /// Waits for the tokens of a cache that were asked for.
    pub(crate) fn wait(&mut self, slot: Slot) -> Result<Vec<u8>, ExecError> {
        let start = Instant::now();
        loop {
            if let Some(rows) = self.arrived.remove(&slot) {
                self.used.waited += Seconds(start.elapsed().as_secs_f64());
                self.used.fetched = Bytes(self.used.fetched.0 + rows.len() as u64);
                return Ok(rows);
            }
            match self.arrivals.recv() {
                Ok(arrival) => {
                    let (slot, rows, busy) = arrival?;
                    self.used.busy = busy;
                    self.arrived.insert(slot, rows);
                }
                Err(_) => return Err(ExecError::TierLost),
            }
        }
    }

    /// What it was used for so far.
    pub(crate) fn used(&self) -> TierUse {
        self.used
    }
}

impl Drop for Tier {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread keeps the tokens in.
enum Kept {
    Memory(Vec<u8>),
    File { file: File, end: u64 },
}

struct Store {
    place: TierPlace,
}

impl Store {
    fn new(place: TierPlace) -> Self {
        Self { place }
    }

    fn open(&self) -> Result<Kept, ExecError> {
        match &self.place {
            TierPlace::Memory => Ok(Kept::Memory(Vec::new())),
            TierPlace::Directory(path) => {
                let file = tempfile::tempfile_in(path)
                    .map_err(|problem| ExecError::Io { path: path.clone(), problem })?;
                Ok(Kept::File { file, end: 0 })
            }
        }
    }

    fn add(&self, kept: &mut Kept, rows: &[u8]) -> Result<(), ExecError> {
        match kept {
            Kept::Memory(all) => all.extend_from_slice(rows),
            Kept::File { file, end } => {
                self.io(write_at(file, rows, *end))?;
                *end += rows.len() as u64;
            }
        }
        Ok(())
    }

    fn read(
        &self,
        kept: &Kept,
        token: u32,
        bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), ExecError> {
        let from = token as usize * bytes;
        match kept {
            Kept::Memory(all) => {
                out.extend_from_slice(all.get(from..from + bytes).ok_or(ExecError::TierLost)?);
            }
            Kept::File { file, .. } => {
                let start = out.len();
                out.resize(start + bytes, 0);
                self.io(read_at(file, &mut out[start..], from as u64))?;
            }
        }
        Ok(())
    }

    fn io<T>(&self, result: std::io::Result<T>) -> Result<T, ExecError> {
        result.map_err(|problem| ExecError::Io {
            path: match &self.place {
                TierPlace::Memory => PathBuf::new(),
                TierPlace::Directory(path) => path.clone(),
            },
            problem,
        })
    }
}

fn write_at(mut file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}

fn read_at(mut file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(bytes)
}

fn work(store: &Store, token_bytes: usize, inbox: &Receiver<Job>, outbox: &Sender<Arrival>) {
    let mut caches: HashMap<Slot, Kept> = HashMap::new();
    let mut busy = 0.0;
    let mut one = |job: Job| -> Result<Option<(Slot, Vec<u8>)>, ExecError> {
        match job {
            Job::Store(slot, rows) => {
                let kept = match caches.entry(slot) {
                    Entry::Occupied(there) => there.into_mut(),
                    Entry::Vacant(place) => place.insert(store.open()?),
                };
                store.add(kept, &rows)?;
            }
            Job::Fetch(slot, tokens) => {
                let kept = caches.get(&slot).ok_or(ExecError::TierLost)?;
                let mut rows = Vec::with_capacity(tokens.len() * token_bytes);
                for token in tokens {
                    store.read(kept, token, token_bytes, &mut rows)?;
                }
                return Ok(Some((slot, rows)));
            }
            Job::Forget(slot) => {
                caches.remove(&slot);
            }
        }
        Ok(None)
    };
    for job in inbox {
        let start = Instant::now();
        let done = one(job);
        busy += start.elapsed().as_secs_f64();
        let sent = match done {
            Ok(None) => continue,
            Ok(Some((slot, rows))) => outbox.send(Ok((slot, rows, Seconds(busy)))),
            Err(error) => {
                let _ = outbox.send(Err(error));
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back_by_token() {
        let directory = tempfile::tempdir().expect("a directory");
        for place in [TierPlace::Memory, TierPlace::Directory(directory.path().to_path_buf())] {
            let mut tier = Tier::new(place, 2);
            tier.store(7, vec![0, 1, 2, 3, 4, 5]);
            tier.store(8, vec![9, 9]);
            tier.store(7, vec![6, 7]);
            tier.fetch(7, vec![3, 0]);
            tier.fetch(8, vec![0]);
            // Asked for in one order, taken in another.
            assert_eq!(tier.wait(8).expect("there"), [9, 9]);
            assert_eq!(tier.wait(7).expect("there"), [6, 7, 0, 1]);
            tier.forget(7);
            tier.store(7, vec![1, 1]);
            let used = tier.used();
            assert_eq!((used.peak, used.stored, used.fetched), (Bytes(10), Bytes(12), Bytes(6)));
            // A token that nobody stored is an error, not a panic.
            tier.fetch(7, vec![1]);
            assert!(tier.wait(7).is_err() && tier.wait(7).is_err());
        }
    }

    #[test]
    fn a_place_that_is_not_there_is_an_error_with_its_name() {
        let mut tier = Tier::new(TierPlace::Directory("/no/such/place".into()), 1);
        tier.store(0, vec![1]);
        tier.fetch(0, vec![0]);
        let error = tier.wait(0).expect_err("nowhere to write").to_string();
        assert!(error.contains("/no/such/place"), "{error}");
    }
}

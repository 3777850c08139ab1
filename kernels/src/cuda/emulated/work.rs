//! What stands in a stream, and recordings of it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::failed;
use super::meeting::ALL_REDUCE;
use crate::cuda::{Address, CudaError, Element, Event, Launch, Product, Stream};

/// A piece of work.
pub(super) enum Work {
    Upload { to: Address, bytes: Vec<u8> },
    Copy { from: Address, to: Address, bytes: u64 },
    Out { from: Address, to: u64, bytes: u64 },
    In { from: u64, to: Address, bytes: u64 },
    Fill { at: Address, byte: u8, bytes: u64 },
    Launch(Launch),
    Multiply(Product),
    Record { event: Event, ticket: u64 },
    Wait { event: Event, ticket: u64, source: Stream },
    Graph(Arc<Vec<Work>>),
    AllReduce { at: Address, count: u64, element: Element },
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Upload { .. } => "an upload",
            Self::Copy { .. } => "a copy",
            Self::Out { .. } => "a copy to the host",
            Self::In { .. } => "a copy from the host",
            Self::Fill { .. } => "a fill",
            Self::Launch(launch) => return write!(f, "kernel {}", launch.kernel),
            Self::Multiply(Product { m, n, k, .. }) => return write!(f, "product {m} x {n} x {k}"),
            Self::Record { .. } | Self::Wait { .. } => "a mark",
            Self::Graph(_) => "a recording",
            Self::AllReduce { .. } => ALL_REDUCE,
        })
    }
}

/// A place in a recording.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Number of the recording.
    pub(super) capture: usize,
    /// Work in front of it, and one.
    at: usize,
}

/// An event.
#[derive(Clone, Copy, Default)]
pub(super) struct Mark {
    /// How often it was put into a stream.
    pub(super) ticket: u64,
    /// The stream that it was put into last.
    pub(super) source: Stream,
    /// Which of the tickets has been reached.
    pub(super) done: u64,
    /// When.
    pub(super) at: Option<Instant>,
    /// Which recording it was put into last, if it was put into one, and where.
    pub(super) in_capture: Option<Place>,
}

/// A recording that goes on. Work stands in the order of the calls, in which it may always be done.
pub(super) struct Capture {
    /// Which of all.
    pub(super) number: usize,
    origin: Stream,
    works: Vec<Work>,
    /// Streams that take part because they waited for a mark in the recording: place behind their last work, and up to
    /// where the first stream has waited for them.
    joined: BTreeMap<u32, (usize, usize)>,
}

impl Capture {
    pub(super) fn new(number: usize, origin: Stream) -> Self {
        Self { number, origin, works: Vec::new(), joined: BTreeMap::new() }
    }

    /// Whether work of a stream goes into the recording.
    pub(super) fn holds(&self, stream: Stream) -> bool {
        stream == self.origin || self.joined.contains_key(&stream.0)
    }

    /// Where a mark of a stream stands.
    pub(super) fn place(&self, stream: Stream) -> Option<Place> {
        self.holds(stream).then_some(Place { capture: self.number, at: self.works.len() + 1 })
    }

    pub(super) fn add(&mut self, stream: Stream, work: Work) {
        self.works.push(work);
        if let Some((last, _)) = self.joined.get_mut(&stream.0) {
            *last = self.works.len() + 1;
        }
    }

    /// A stream waits for a mark of another one.
    pub(super) fn join(
        &mut self,
        stream: Stream,
        source: Stream,
        place: Option<Place>,
    ) -> Result<(), CudaError> {
        let Some(Place { at, .. }) = place.filter(|p| p.capture == self.number) else {
            return failed("a wait", "recorded work can't wait for work that is not");
        };
        if stream != self.origin {
            // Even without work of its own the first stream has to wait for it before the end.
            self.joined.entry(stream.0).or_insert((self.works.len() + 1, 0));
        } else if let Some((_, waited)) = self.joined.get_mut(&source.0) {
            *waited = at.max(*waited);
        }
        Ok(())
    }

    /// The recorded work.
    pub(super) fn end(self, stream: Stream) -> Result<Vec<Work>, CudaError> {
        let call = "the end of a recording";
        if stream != self.origin {
            return failed(call, "it was begun in another stream");
        }
        if let Some((stream, _)) = self.joined.iter().find(|(_, (last, waited))| waited < last) {
            return failed(call, format!("the first stream does not wait for stream {stream}"));
        }
        Ok(self.works)
    }
}

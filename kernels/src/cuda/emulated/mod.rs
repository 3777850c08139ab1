//! A device that is the CPU: the project's own CUDA kernels behind a [`Driver`], for tests on machines without a GPU.
//!
//! Kernels run as fibers (`kernels/cuda/shim`), every access is checked against the memory that was taken, and what is
//! wrong with a launch, a copy, a product or a recording on a real device is an error here too. What a fault leaves behind
//! is as on a device: all later calls fail with it.

mod ledger;
mod meeting;
mod memory;
mod perform;
mod product;
pub mod shim;
mod work;

use std::collections::VecDeque;
use std::sync::Arc;

pub use self::ledger::{Ledger, Live};
use self::meeting::{ALL_REDUCE, Meeting};
use self::memory::Pieces;
use self::shim::Library;
use self::work::{Capture, Mark, Work};
use super::{
    Address, Arg, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch,
    Pinned, Product, Stream,
};

/// What the device pretends to be.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of its memory.
    pub memory: u64,
    /// Compute capability: decides how much shared memory a block may have and whether there are products of fp8.
    pub capability: (u32, u32),
    /// Multiprocessors that it says it has.
    pub multiprocessors: u32,
    /// Order in which threads and blocks run. 0: forward, 1: backward, else the seed of a shuffle.
    pub order: u32,
    /// Work of a stream is done only when somebody has to see it (a wait, a download, `synchronize`), so that a missing
    /// wait between streams gives wrong results. Otherwise it is done at once.
    pub late: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { memory: 1 << 30, capability: (8, 0), multiprocessors: 8, order: 0, late: false }
    }
}

/// The device.
pub struct Emulated {
    info: DeviceInfo,
    settings: Settings,
    library: Library,
    memory: Pieces,
    pinned: Pieces,
    queues: Vec<VecDeque<Work>>,
    marks: Vec<Mark>,
    graphs: Vec<Option<Arc<Vec<Work>>>>,
    capture: Option<Capture>,
    captures: usize,
    fault: Option<CudaError>,
    ledger: Ledger,
    /// Where devices that were opened together add up, and which of them this is.
    meeting: (Arc<Meeting>, u32),
}

/// Bytes of the cache that it says it has.
const L2: u64 = 64 << 10;

fn failed<T>(call: impl Into<String>, why: impl Into<String>) -> Result<T, CudaError> {
    Err(CudaError::Failed { call: call.into(), why: why.into() })
}

/// Bytes of shared memory that a block may have.
fn shared_limit(capability: (u32, u32)) -> u32 {
    let kib = match capability {
        (8, 0 | 7) => 163,
        (8, _) | (12, _) => 99,
        _ => 227,
    };
    kib << 10
}

fn bytes_of(arg: &Arg) -> Vec<u8> {
    match arg {
        Arg::U32(x) => x.to_ne_bytes().to_vec(),
        Arg::U64(x) | Arg::At(Address(x)) => x.to_ne_bytes().to_vec(),
        Arg::F32(x) => x.to_ne_bytes().to_vec(),
        Arg::F64(x) => x.to_ne_bytes().to_vec(),
        Arg::Bytes(bytes) => bytes.clone(),
    }
}

impl Emulated {
    /// A device. The first of a process compiles the kernels, if nobody has yet.
    ///
    /// # Errors
    /// `Unavailable` where there is no C++ compiler; `Failed` where the kernels don't compile.
    pub fn new(settings: Settings) -> Result<Self, CudaError> {
        let info = DeviceInfo {
            name: "emulated".into(),
            index: 0,
            capability: settings.capability,
            memory: settings.memory,
            multiprocessors: settings.multiprocessors,
            l2: L2,
            driver: 0,
        };
        let ledger = Ledger::default();
        ledger.change(|live| live.streams = 1);
        Ok(Self {
            info,
            settings,
            library: shim::open()?,
            memory: Pieces::default(),
            pinned: Pieces::default(),
            queues: vec![VecDeque::new()],
            marks: Vec::new(),
            graphs: Vec::new(),
            capture: None,
            captures: 0,
            fault: None,
            ledger,
            meeting: (Arc::new(Meeting::new(1)), 0),
        })
    }

    /// Devices that add up, each to be called from a thread of its own.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn together(settings: Settings, devices: u32) -> Result<Vec<Self>, CudaError> {
        let meeting = Arc::new(Meeting::new(devices));
        let one = |rank| {
            let mut device = Self::new(settings)?;
            device.info.index = rank;
            device.meeting = (Arc::clone(&meeting), rank);
            Ok(device)
        };
        (0..devices).map(one).collect()
    }

    /// Changes the order in which threads and blocks of later kernels run.
    pub fn set_order(&mut self, order: u32) {
        self.settings.order = order;
    }

    /// What is alive, to be looked at from outside; it stays when the device is dropped.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.ledger.clone()
    }

    /// Memory that nobody has given back yet: addresses and bytes.
    #[must_use]
    pub fn leaks(&self) -> Vec<(Address, u64)> {
        self.memory.all().map(|(at, bytes)| (Address(at), bytes)).collect()
    }

    fn healthy(&self) -> Result<(), CudaError> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    fn not_in_capture(&self, call: &str) -> Result<(), CudaError> {
        self.healthy()?;
        if self.capture.is_some() { failed(call, "not while work is recorded") } else { Ok(()) }
    }

    /// Whether that much of device memory was taken.
    fn inside(&self, call: &str, at: Address, bytes: u64) -> Result<(), CudaError> {
        self.healthy()?;
        self.memory.read(at.0, bytes).map(drop).or_else(|why| failed(call, why))
    }

    fn inside_pinned(&self, call: &str, at: u64, bytes: u64) -> Result<(), CudaError> {
        self.pinned.read(at, bytes).map(drop).or_else(|why| failed(call, why))
    }

    fn queue(&mut self, stream: Stream) -> Result<&mut VecDeque<Work>, CudaError> {
        match self.queues.get_mut(stream.0 as usize) {
            Some(queue) => Ok(queue),
            None => failed("a call", format!("there is no stream {}", stream.0)),
        }
    }

    /// Queues or records it.
    fn push(&mut self, stream: Stream, work: Work) -> Result<(), CudaError> {
        self.healthy()?;
        self.queue(stream)?;
        if let Some(capture) = &mut self.capture
            && capture.holds(stream)
        {
            capture.add(stream, work);
            return Ok(());
        }
        self.queue(stream)?.push_back(work);
        if self.settings.late { Ok(()) } else { self.drain(stream) }
    }

    /// Does all that is queued in a stream, and what it waits for.
    fn drain(&mut self, stream: Stream) -> Result<(), CudaError> {
        while let Some(work) = self.queue(stream)?.pop_front() {
            self.perform(&work)?;
        }
        Ok(())
    }

    fn drain_all(&mut self) -> Result<(), CudaError> {
        (0..self.queues.len() as u32).try_for_each(|stream| self.drain(Stream(stream)))
    }

    fn mark(&mut self, event: Event) -> Result<&mut Mark, CudaError> {
        match self.marks.get_mut(event.0 as usize) {
            Some(mark) => Ok(mark),
            None => failed("a mark", format!("there is no event {}", event.0)),
        }
    }
}

impl Driver for Emulated {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&mut self) -> Result<DeviceMemory, CudaError> {
        self.healthy()?;
        let total = self.settings.memory;
        Ok(DeviceMemory { free: total - self.memory.used(), total })
    }

    fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError> {
        self.not_in_capture("taking memory")?;
        if bytes == 0 {
            return failed("taking memory", "0 bytes");
        }
        let free = self.memory()?.free;
        let out_of_memory = CudaError::OutOfMemory { wanted: bytes, free };
        if bytes > free {
            return Err(out_of_memory);
        }
        let at = self.memory.take(bytes).ok_or(out_of_memory)?;
        let used = self.memory.used();
        self.ledger.change(|live| {
            live.allocations += 1;
            live.bytes = used;
            live.peak = live.peak.max(used);
        });
        Ok(Address(at))
    }

    fn free(&mut self, at: Address) -> Result<(), CudaError> {
        let before = if self.fault.is_some() { Ok(()) } else { self.not_in_capture("freeing") };
        let drained = before.and_then(|()| self.drain_all());
        let given = self.memory.give(at.0);
        let (count, used) = (self.memory.all().count(), self.memory.used());
        self.ledger.change(|live| (live.allocations, live.bytes) = (count, used));
        drained?;
        self.healthy()?;
        given.or_else(|why| failed(format!("freeing {:#x}", at.0), why))
    }

    fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError> {
        self.not_in_capture("taking pinned memory")?;
        if bytes == 0 {
            return failed("taking pinned memory", "0 bytes");
        }
        let at =
            self.pinned.take(bytes).ok_or(CudaError::OutOfMemory { wanted: bytes, free: 0 })?;
        self.ledger.change(|live| live.pinned += 1);
        Ok(Pinned(at))
    }

    fn free_pinned(&mut self, at: Pinned) -> Result<(), CudaError> {
        let drained = if self.fault.is_some() { Ok(()) } else { self.drain_all() };
        let given = self.pinned.give(at.0);
        let count = self.pinned.all().count();
        self.ledger.change(|live| live.pinned = count);
        drained?;
        self.healthy()?;
        given.or_else(|why| failed(format!("freeing pinned memory {:#x}", at.0), why))
    }

    fn upload(&mut self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), CudaError> {
        self.inside("an upload", to, bytes.len() as u64)?;
        if self.capture.as_ref().is_some_and(|c| c.holds(stream)) {
            return failed(
                "an upload",
                "not while work is recorded: the bytes would be gone later",
            );
        }
        self.push(stream, Work::Upload { to, bytes: bytes.to_vec() })
    }

    fn download(&mut self, stream: Stream, from: Address, out: &mut [u8]) -> Result<(), CudaError> {
        self.not_in_capture("a download")?;
        self.drain(stream)?;
        match self.memory.read(from.0, out.len() as u64) {
            Ok(bytes) => {
                out.copy_from_slice(bytes);
                Ok(())
            }
            Err(why) => failed("a download", why),
        }
    }

    fn copy(
        &mut self,
        stream: Stream,
        from: Address,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError> {
        self.inside("a copy", from, bytes)?;
        self.inside("a copy", to, bytes)?;
        if from.0 < to.0 + bytes && to.0 < from.0 + bytes {
            return failed("a copy", format!("{bytes} bytes from {from:?} to {to:?} overlap"));
        }
        self.push(stream, Work::Copy { from, to, bytes })
    }

    fn copy_out(
        &mut self,
        stream: Stream,
        from: Address,
        to: Pinned,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CudaError> {
        let call = "a copy to the host";
        self.inside(call, from, bytes)?;
        self.inside_pinned(call, to.0 + offset, bytes)?;
        self.push(stream, Work::Out { from, to: to.0 + offset, bytes })
    }

    fn copy_in(
        &mut self,
        stream: Stream,
        from: Pinned,
        offset: u64,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError> {
        let call = "a copy from the host";
        self.inside(call, to, bytes)?;
        self.inside_pinned(call, from.0 + offset, bytes)?;
        self.push(stream, Work::In { from: from.0 + offset, to, bytes })
    }

    fn fill(&mut self, stream: Stream, at: Address, byte: u8, bytes: u64) -> Result<(), CudaError> {
        self.inside("a fill", at, bytes)?;
        self.push(stream, Work::Fill { at, byte, bytes })
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<(), CudaError> {
        self.healthy()?;
        if let Err(why) = self.check(launch) {
            return failed(format!("launch of {}", launch.kernel), why);
        }
        self.push(stream, Work::Launch(launch.clone()))
    }

    fn multiply(&mut self, stream: Stream, product: &Product) -> Result<(), CudaError> {
        self.healthy()?;
        let refused = product.check(self.settings.capability);
        let outside =
            || product.operands().try_for_each(|(at, n)| self.memory.read(at.0, n).map(drop));
        if let Err(why) = refused.and_then(|()| outside()) {
            return failed(format!("product {} x {} x {}", product.m, product.n, product.k), why);
        }
        self.push(stream, Work::Multiply(*product))
    }

    fn rank(&self) -> (u32, u32) {
        (self.meeting.1, self.meeting.0.devices())
    }

    fn all_reduce(
        &mut self,
        stream: Stream,
        at: Address,
        count: u64,
        element: Element,
    ) -> Result<(), CudaError> {
        self.not_in_capture(ALL_REDUCE)?;
        self.inside(ALL_REDUCE, at, count * element.bytes())?;
        self.push(stream, Work::AllReduce { at, count, element })
    }

    fn leave(&mut self) {
        self.meeting.0.leave();
    }

    fn stream(&mut self) -> Result<Stream, CudaError> {
        self.not_in_capture("a new stream")?;
        self.queues.push(VecDeque::new());
        self.ledger.change(|live| live.streams += 1);
        Ok(Stream(self.queues.len() as u32 - 1))
    }

    fn synchronize(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.not_in_capture("synchronize")?;
        self.drain(stream)
    }

    fn event(&mut self) -> Result<Event, CudaError> {
        self.healthy()?;
        self.marks.push(Mark::default());
        self.ledger.change(|live| live.events += 1);
        Ok(Event(self.marks.len() as u32 - 1))
    }

    fn record(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.queue(stream)?;
        let in_capture = self.capture.as_ref().and_then(|c| c.place(stream));
        let mark = self.mark(event)?;
        mark.ticket += 1;
        mark.source = stream;
        mark.in_capture = in_capture;
        let ticket = mark.ticket;
        if in_capture.is_some() {
            return self.healthy();
        }
        self.push(stream, Work::Record { event, ticket })
    }

    fn wait(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.queue(stream)?;
        let Mark { ticket, source, in_capture, .. } = *self.mark(event)?;
        let ours =
            |c: &Capture| c.holds(stream) || in_capture.is_some_and(|p| p.capture == c.number);
        match &mut self.capture {
            Some(capture) if ours(capture) => return capture.join(stream, source, in_capture),
            _ if in_capture.is_some() => {
                return failed("a wait", "the mark was put into a recording that has ended");
            }
            _ => {}
        }
        // As on a device, nothing is waited for where nothing was recorded.
        self.push(stream, Work::Wait { event, ticket, source })
    }

    fn elapsed(&mut self, from: Event, to: Event) -> Result<f64, CudaError> {
        self.healthy()?;
        let mut times = [None; 2];
        for (time, event) in times.iter_mut().zip([from, to]) {
            let Mark { ticket, source, in_capture, .. } = *self.mark(event)?;
            if in_capture.is_none() {
                self.reach(event, ticket, source)?;
                *time = self.marks[event.0 as usize].at;
            }
        }
        match times {
            [Some(from), Some(to)] if to >= from => Ok((to - from).as_secs_f64()),
            [Some(from), Some(to)] => Ok(-(from - to).as_secs_f64()),
            _ => failed("the time between two marks", "they were not both put into a stream"),
        }
    }

    fn begin_capture(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.not_in_capture("a recording")?;
        self.queue(stream)?;
        self.captures += 1;
        self.capture = Some(Capture::new(self.captures, stream));
        Ok(())
    }

    fn end_capture(&mut self, stream: Stream) -> Result<Graph, CudaError> {
        self.healthy()?;
        let Some(capture) = self.capture.take() else {
            return failed("the end of a recording", "none was begun");
        };
        let works = capture.end(stream)?;
        self.graphs.push(Some(Arc::new(works)));
        self.ledger.change(|live| live.graphs += 1);
        Ok(Graph(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, stream: Stream, graph: Graph) -> Result<(), CudaError> {
        self.not_in_capture("a recording in a recording")?;
        match self.graphs.get(graph.0 as usize) {
            Some(Some(works)) => {
                let works = Arc::clone(works);
                self.push(stream, Work::Graph(works))
            }
            _ => failed("a recording", format!("there is no graph {}", graph.0)),
        }
    }

    fn free_graph(&mut self, graph: Graph) -> Result<(), CudaError> {
        let freed = self.graphs.get_mut(graph.0 as usize).and_then(Option::take);
        if freed.is_none() {
            return failed("freeing a recording", format!("there is no graph {}", graph.0));
        }
        self.ledger.change(|live| live.graphs -= 1);
        self.healthy()
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let leaked: Vec<u64> = self.memory.all().map(|(_, bytes)| bytes).collect();
        // Streams and events go with their device, as in the real driver.
        self.ledger.change(|live| {
            live.leaked = leaked;
            (live.streams, live.events) = (0, 0);
        });
    }
}

//! Drivers for tests of who calls a driver: one that writes down every call and can fail any of them, and one that does
//! nothing.

mod null;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::null::Null;
use super::{
    Address, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch, Pinned,
    Product, Stream,
};

/// A call of a driver. Bytes are counted, not kept.
#[expect(missing_docs, reason = "fields are the arguments of the trait's methods")]
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Memory,
    Alloc { bytes: u64 },
    Free { at: Address },
    AllocPinned { bytes: u64 },
    FreePinned { at: Pinned },
    Upload { stream: Stream, to: Address, bytes: u64 },
    Download { stream: Stream, from: Address, bytes: u64 },
    Copy { stream: Stream, from: Address, to: Address, bytes: u64 },
    CopyOut { stream: Stream, from: Address, to: Pinned, offset: u64, bytes: u64 },
    CopyIn { stream: Stream, from: Pinned, offset: u64, to: Address, bytes: u64 },
    Fill { stream: Stream, at: Address, byte: u8, bytes: u64 },
    Launch { stream: Stream, launch: Launch },
    Multiply { stream: Stream, product: Product },
    AllReduce { stream: Stream, at: Address, count: u64, element: Element },
    Stream,
    Synchronize { stream: Stream },
    Event,
    Record { stream: Stream, event: Event },
    Wait { stream: Stream, event: Event },
    Elapsed { from: Event, to: Event },
    BeginCapture { stream: Stream },
    EndCapture { stream: Stream },
    LaunchGraph { stream: Stream, graph: Graph },
    FreeGraph { graph: Graph },
}

impl Call {
    /// Name of the kernel that it starts, if it starts one.
    #[must_use]
    pub fn kernel(&self) -> Option<&'static str> {
        match self {
            Self::Launch { launch, .. } => Some(launch.kernel),
            _ => None,
        }
    }

    /// Whether it gives something back: that happens even if the call fails.
    fn gives_back(&self) -> bool {
        matches!(self, Self::Free { .. } | Self::FreePinned { .. } | Self::FreeGraph { .. })
    }
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no memory for it. Later calls go on.
    OutOfMemory,
    /// The driver refuses it. Later calls go on.
    Refused,
    /// The device is lost: this call and all later ones fail.
    Lost,
}

impl Fault {
    fn error(self, call: &Call) -> CudaError {
        let wanted = match call {
            Call::Alloc { bytes } | Call::AllocPinned { bytes } => *bytes,
            _ => 0,
        };
        let failed = |why: &str| CudaError::Failed { call: format!("{call:?}"), why: why.into() };
        match self {
            Self::OutOfMemory => CudaError::OutOfMemory { wanted, free: 0 },
            Self::Refused => failed("refused by a test"),
            Self::Lost => failed("the device is lost, says a test"),
        }
    }
}

type Filter = Box<dyn Fn(&Call) -> bool + Send>;

struct Planned {
    /// Which calls count.
    filter: Filter,
    /// So many of them go well first.
    after: usize,
    fault: Fault,
}

#[derive(Default)]
struct Script {
    calls: Vec<Call>,
    planned: Vec<Planned>,
    lost: Option<CudaError>,
}

/// What was called, and what will fail: a handle that outlives the driver.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Script>>);

impl Log {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All calls so far, failed ones included.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.script().calls.clone()
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.script().calls.len()
    }

    /// Forgets the calls so far.
    pub fn clear(&self) {
        self.script().calls.clear();
    }

    /// Lets so many calls from here on go well and fails the next one.
    pub fn fail_after(&self, calls: usize, fault: Fault) {
        self.fail_matching(|_| true, calls, fault);
    }

    /// The same, where only some calls count and fail.
    pub fn fail_matching(
        &self,
        filter: impl Fn(&Call) -> bool + Send + 'static,
        after: usize,
        fault: Fault,
    ) {
        self.script().planned.push(Planned { filter: Box::new(filter), after, fault });
    }

    /// Writes a call down; the error that it has to end with, if it has to.
    fn note(&self, call: &Call) -> Result<(), CudaError> {
        let mut script = self.script();
        script.calls.push(call.clone());
        if let Some(lost) = &script.lost {
            return Err(lost.clone());
        }
        let mut due = None;
        script.planned.retain_mut(|planned| {
            if !(planned.filter)(call) {
                return true;
            }
            if planned.after == 0 {
                due = due.or(Some(planned.fault));
                return false;
            }
            planned.after -= 1;
            true
        });
        let Some(fault) = due else { return Ok(()) };
        let error = fault.error(call);
        if fault == Fault::Lost {
            script.lost = Some(error.clone());
        }
        Err(error)
    }
}

/// A driver that writes down what is asked of another one.
pub struct Recording<D> {
    inner: D,
    log: Log,
}

impl<D: Driver> Recording<D> {
    /// Around a driver.
    pub fn new(inner: D) -> Self {
        Self { inner, log: Log::default() }
    }

    /// What it writes into.
    #[must_use]
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// The driver inside.
    pub fn inner(&mut self) -> &mut D {
        &mut self.inner
    }

    fn call<T>(
        &mut self,
        call: Call,
        go: impl FnOnce(&mut D) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        match self.log.note(&call) {
            Ok(()) => go(&mut self.inner),
            Err(why) if call.gives_back() => go(&mut self.inner).and(Err(why)),
            Err(why) => Err(why),
        }
    }
}

impl<D: Driver> Driver for Recording<D> {
    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }

    fn memory(&mut self) -> Result<DeviceMemory, CudaError> {
        self.call(Call::Memory, D::memory)
    }

    fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError> {
        self.call(Call::Alloc { bytes }, |d| d.alloc(bytes))
    }

    fn free(&mut self, at: Address) -> Result<(), CudaError> {
        self.call(Call::Free { at }, |d| d.free(at))
    }

    fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError> {
        self.call(Call::AllocPinned { bytes }, |d| d.alloc_pinned(bytes))
    }

    fn free_pinned(&mut self, at: Pinned) -> Result<(), CudaError> {
        self.call(Call::FreePinned { at }, |d| d.free_pinned(at))
    }

    fn upload(&mut self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), CudaError> {
        let call = Call::Upload { stream, to, bytes: bytes.len() as u64 };
        self.call(call, |d| d.upload(stream, to, bytes))
    }

    fn download(&mut self, stream: Stream, from: Address, out: &mut [u8]) -> Result<(), CudaError> {
        let call = Call::Download { stream, from, bytes: out.len() as u64 };
        self.call(call, |d| d.download(stream, from, out))
    }

    fn copy(
        &mut self,
        stream: Stream,
        from: Address,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError> {
        self.call(Call::Copy { stream, from, to, bytes }, |d| d.copy(stream, from, to, bytes))
    }

    fn copy_out(
        &mut self,
        stream: Stream,
        from: Address,
        to: Pinned,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CudaError> {
        let call = Call::CopyOut { stream, from, to, offset, bytes };
        self.call(call, |d| d.copy_out(stream, from, to, offset, bytes))
    }

    fn copy_in(
        &mut self,
        stream: Stream,
        from: Pinned,
        offset: u64,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError> {
        let call = Call::CopyIn { stream, from, offset, to, bytes };
        self.call(call, |d| d.copy_in(stream, from, offset, to, bytes))
    }

    fn fill(&mut self, stream: Stream, at: Address, byte: u8, bytes: u64) -> Result<(), CudaError> {
        self.call(Call::Fill { stream, at, byte, bytes }, |d| d.fill(stream, at, byte, bytes))
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<(), CudaError> {
        let call = Call::Launch { stream, launch: launch.clone() };
        self.call(call, |d| d.launch(stream, launch))
    }

    fn multiply(&mut self, stream: Stream, product: &Product) -> Result<(), CudaError> {
        self.call(Call::Multiply { stream, product: *product }, |d| d.multiply(stream, product))
    }

    fn rank(&self) -> (u32, u32) {
        self.inner.rank()
    }

    fn all_reduce(
        &mut self,
        stream: Stream,
        at: Address,
        count: u64,
        element: Element,
    ) -> Result<(), CudaError> {
        let call = Call::AllReduce { stream, at, count, element };
        self.call(call, |d| d.all_reduce(stream, at, count, element))
    }

    fn leave(&mut self) {
        self.inner.leave();
    }

    fn stream(&mut self) -> Result<Stream, CudaError> {
        self.call(Call::Stream, D::stream)
    }

    fn synchronize(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.call(Call::Synchronize { stream }, |d| d.synchronize(stream))
    }

    fn event(&mut self) -> Result<Event, CudaError> {
        self.call(Call::Event, D::event)
    }

    fn record(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.call(Call::Record { stream, event }, |d| d.record(stream, event))
    }

    fn wait(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.call(Call::Wait { stream, event }, |d| d.wait(stream, event))
    }

    fn elapsed(&mut self, from: Event, to: Event) -> Result<f64, CudaError> {
        self.call(Call::Elapsed { from, to }, |d| d.elapsed(from, to))
    }

    fn begin_capture(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.call(Call::BeginCapture { stream }, |d| d.begin_capture(stream))
    }

    fn end_capture(&mut self, stream: Stream) -> Result<Graph, CudaError> {
        let noted = self.log.note(&Call::EndCapture { stream });
        // As on a device, a recording is over even if its end fails.
        let ended = self.inner.end_capture(stream);
        if let (Err(_), Ok(graph)) = (&noted, &ended) {
            self.inner.free_graph(*graph)?;
        }
        noted.and(ended)
    }

    fn launch_graph(&mut self, stream: Stream, graph: Graph) -> Result<(), CudaError> {
        self.call(Call::LaunchGraph { stream, graph }, |d| d.launch_graph(stream, graph))
    }

    fn free_graph(&mut self, graph: Graph) -> Result<(), CudaError> {
        self.call(Call::FreeGraph { graph }, |d| d.free_graph(graph))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Stream = Stream(0);

    fn driver() -> Recording<Null> {
        Recording::new(Null::new(DeviceInfo {
            name: "null".into(),
            index: 0,
            capability: (8, 0),
            memory: 1 << 20,
            multiprocessors: 1,
            l2: 0,
            driver: 0,
        }))
    }

    #[test]
    fn calls_are_written_down_in_order() {
        let mut gpu = driver();
        let log = gpu.log();
        let at = gpu.alloc(100).expect("memory");
        let launch =
            Launch { kernel: "rope", grid: [1, 2, 3], block: 32, shared: 0, args: Vec::new() };
        gpu.launch(FIRST, &launch).expect("launched");
        gpu.free(at).expect("freed");
        let stream = FIRST;
        let wanted =
            [Call::Alloc { bytes: 100 }, Call::Launch { stream, launch }, Call::Free { at }];
        assert_eq!(log.calls(), wanted);
        assert_eq!(log.calls()[1].kernel(), Some("rope"));
        drop(gpu);
        assert_eq!(log.count(), 3, "the log stays");
    }

    #[test]
    fn the_chosen_call_fails_and_others_go_on() {
        let mut gpu = driver();
        gpu.log().fail_after(1, Fault::OutOfMemory);
        let first = gpu.alloc(100).expect("memory");
        assert_eq!(gpu.alloc(200), Err(CudaError::OutOfMemory { wanted: 200, free: 0 }));
        assert_eq!(gpu.inner().used(), 100, "a call that fails does nothing");
        gpu.alloc(300).expect("memory");
        gpu.log().fail_matching(|call| call.kernel() == Some("rope"), 1, Fault::Refused);
        let launch = |kernel| Launch { kernel, grid: [1; 3], block: 32, shared: 0, args: vec![] };
        for (kernel, works) in [("rope", true), ("append", true), ("rope", false), ("rope", true)] {
            assert_eq!(gpu.launch(FIRST, &launch(kernel)).is_ok(), works, "{kernel}");
        }
        gpu.free(first).expect("freed");
    }

    #[test]
    fn after_a_loss_everything_fails_but_memory_goes_back() {
        let mut gpu = driver();
        let at = gpu.alloc(100).expect("memory");
        gpu.log().fail_after(0, Fault::Lost);
        let lost = gpu.synchronize(FIRST).expect_err("lost");
        assert_eq!(gpu.alloc(1), Err(lost.clone()));
        assert_eq!(gpu.free(at), Err(lost.clone()));
        assert_eq!(gpu.end_capture(FIRST), Err(lost));
        assert_eq!(gpu.inner().used(), 0);
    }
}

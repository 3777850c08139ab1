//! A CUDA device behind a [`Driver`], by cudarc.
//!
//! Everything is looked for when it is first used: the program is built without CUDA and starts without it. Of cudarc's
//! names for CUDA 13 only those are called that drivers of CUDA 11.8 have, too.
//!
//! Nothing here has run on a device yet.

mod conditions;
mod found;
mod modules;
mod product;
mod staging;
mod together;

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};

pub use self::conditions::conditions;
pub use self::found::devices;
use self::modules::Modules;
use self::product::{Products, WORKSPACE};
use self::staging::Staging;
use self::together::Together;
use super::{
    Address, Arg, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch,
    Pinned, Product, Stream,
};

fn failed(call: impl Into<String>, why: impl Into<String>) -> CudaError {
    CudaError::Failed { call: call.into(), why: why.into() }
}

/// What a driver calls an error, and what it says of it.
fn text(error: result::DriverError) -> String {
    let name = error.error_name().map(|s| s.to_string_lossy().into_owned());
    let says = error.error_string().map(|s| s.to_string_lossy().into_owned());
    match (name, says) {
        (Ok(name), Ok(says)) => format!("{name}: {says}"),
        _ => format!("error {}", error.0 as u32),
    }
}

fn said(call: impl Into<String>, error: result::DriverError) -> CudaError {
    failed(call, text(error))
}

/// First addresses and bytes of what was taken.
#[derive(Default)]
struct Taken(BTreeMap<u64, u64>);

impl Taken {
    fn check(&self, call: &str, at: u64, bytes: u64) -> Result<(), CudaError> {
        let inside = |(begin, held): (&u64, &u64)| {
            (at - begin).checked_add(bytes).is_some_and(|end| end <= *held)
        };
        if self.0.range(..=at).next_back().is_some_and(inside) {
            return Ok(());
        }
        Err(failed(call, format!("{bytes} bytes at {at:#x} are not inside of what was taken")))
    }

    fn remove(&mut self, call: &str, at: u64) -> Result<(), CudaError> {
        let removed = self.0.remove(&at);
        removed.map(drop).ok_or_else(|| failed(call, format!("nothing was taken at {at:#x}")))
    }
}

struct Queue {
    handle: sys::CUstream,
    /// For products; taken with the first.
    workspace: Option<Address>,
}

/// A device, with everything that is alive on it. All of it goes when this is dropped.
pub struct Device {
    info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Modules,
    products: Option<Products>,
    staging: Option<Staging>,
    memory: Taken,
    pinned: Taken,
    queues: Vec<Queue>,
    events: Vec<sys::CUevent>,
    graphs: Vec<Option<sys::CUgraphExec>>,
    capturing: bool,
    /// Those that were opened with it, and which of them it is.
    together: Option<(Arc<Together>, u32)>,
}

// SAFETY: handles of the driver belong to a process, not to a thread; every call makes the context that of its thread.
unsafe impl Send for Device {}

impl Device {
    /// Opens a device of [`devices`].
    ///
    /// # Errors
    /// `Unavailable` where the driver, cuBLASLt or the device is missing or too old; `NoDevice`; what the driver said.
    pub fn open(index: u32) -> Result<Self, CudaError> {
        let (device, info) = found::device(index)?;
        let shared = found::shared_limit(device)?;
        // SAFETY: the device was found just now; the context is given back on drop.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|e| said(format!("opening cuda:{index}"), e))?;
        let mut own = Self {
            info,
            device,
            context,
            modules: Modules::new(shared),
            products: None,
            staging: None,
            memory: Taken::default(),
            pinned: Taken::default(),
            queues: Vec::new(),
            events: Vec::new(),
            graphs: Vec::new(),
            capturing: false,
            together: None,
        };
        own.stream()?;
        own.staging = Some(Staging::new()?);
        own.products = Some(Products::new()?);
        // Here and not with the first product, so that `memory` already tells of it.
        own.workspace(Stream(0))?;
        Ok(own)
    }

    /// Opens several devices of one kind that add up ([`Driver::all_reduce`]), each to be called from a thread of its own.
    ///
    /// # Errors
    /// As [`Self::open`]; `Unavailable` where NCCL is missing or the devices differ.
    pub fn open_together(indices: &[u32]) -> Result<Vec<Self>, CudaError> {
        let mut devices = indices.iter().map(|i| Self::open(*i)).collect::<Result<Vec<_>, _>>()?;
        together::alike(devices.iter().map(|device| &device.info))?;
        let together = Arc::new(Together::new(indices)?);
        for (device, rank) in devices.iter_mut().zip(0..) {
            device.together = Some((Arc::clone(&together), rank));
        }
        Ok(devices)
    }

    /// Whether products of single precision may round their operands to TF32, which is faster. Not so at first.
    pub fn set_tf32(&mut self, allowed: bool) {
        if let Ok(products) = self.products() {
            products.allow_tf32(allowed);
        }
    }

    /// Makes the context that of this thread.
    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is held until drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| said("a call", e))
    }

    fn products(&mut self) -> Result<&mut Products, CudaError> {
        self.products.as_mut().ok_or_else(|| failed("a product", "cuBLASLt is not open"))
    }

    fn queue(&self, stream: Stream) -> Result<sys::CUstream, CudaError> {
        let queue = self.queues.get(stream.0 as usize);
        queue
            .map(|queue| queue.handle)
            .ok_or_else(|| failed("a call", format!("there is no stream {}", stream.0)))
    }

    fn mark(&self, event: Event) -> Result<sys::CUevent, CudaError> {
        let mark = self.events.get(event.0 as usize).copied();
        mark.ok_or_else(|| failed("a mark", format!("there is no event {}", event.0)))
    }

    fn not_in_capture(&self, call: &str) -> Result<(), CudaError> {
        if self.capturing { Err(failed(call, "not while work is recorded")) } else { Ok(()) }
    }

    fn out_of_memory(&mut self, call: &str, wanted: u64, error: result::DriverError) -> CudaError {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return said(call, error);
        }
        let free = self.memory().map_or(0, |memory| memory.free);
        CudaError::OutOfMemory { wanted, free }
    }

    /// What products of a stream use beside their operands.
    fn workspace(&mut self, stream: Stream) -> Result<Address, CudaError> {
        self.queue(stream)?;
        if let Some(at) = self.queues[stream.0 as usize].workspace {
            return Ok(at);
        }
        let at = self.alloc(WORKSPACE)?;
        self.queues[stream.0 as usize].workspace = Some(at);
        Ok(at)
    }

    /// Writes the bias into the result, or adds it there.
    fn spread_bias(&mut self, stream: Stream, product: &Product) -> Result<(), CudaError> {
        let Product { m, n, bias, y, y_stride, out, accumulate, .. } = *product;
        let kind: u32 = match out {
            Element::F32 => 0,
            Element::F16 => 1,
            Element::Bf16 => 2,
            Element::Fp8 => 3,
        };
        // As `Rows` of `cuda/common.cuh`.
        let mut rows = y.0.to_le_bytes().to_vec();
        rows.extend(kind.to_le_bytes());
        rows.extend(y_stride.to_le_bytes());
        let blocks = (u64::from(m) * u64::from(n)).div_ceil(256);
        let launch = Launch {
            kernel: "bias_rows",
            grid: [blocks as u32, 1, 1],
            block: 256,
            shared: 0,
            args: vec![
                Arg::Bytes(rows),
                Arg::U32(m),
                Arg::U32(n),
                Arg::At(bias),
                Arg::U32(accumulate.into()),
            ],
        };
        self.launch(stream, &launch)
    }

    fn check_operands(&self, product: &Product) -> Result<(), CudaError> {
        product.check(self.info.capability).map_err(|why| failed("a product", why))?;
        for (at, bytes) in product.operands() {
            self.memory.check("a product", at.0, bytes)?;
        }
        Ok(())
    }

    /// Seconds between two marks that have been reached.
    fn between(from: sys::CUevent, to: sys::CUevent) -> Result<f64, CudaError> {
        // cudarc's own call for CUDA 13 wants a driver of 12.8; all drivers have this one.
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let call = "the time between two marks";
        let mut milliseconds = 0f32;
        // SAFETY: the library is there, else there were no device, and the function has this type in all its versions.
        unsafe {
            let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0");
            let elapsed = elapsed.map_err(|e| failed(call, e.to_string()))?;
            elapsed(&raw mut milliseconds, from, to).result()
        }
        .map_err(|e| said(call, e))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Driver for Device {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&mut self) -> Result<DeviceMemory, CudaError> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|e| said("asking about memory", e))?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError> {
        let call = "taking memory";
        self.enter()?;
        self.not_in_capture(call)?;
        // SAFETY: it is given back by `free` or on drop.
        let at = unsafe { result::malloc_sync(bytes as usize) }
            .map_err(|e| self.out_of_memory(call, bytes, e))?;
        self.memory.0.insert(at, bytes);
        Ok(Address(at))
    }

    fn free(&mut self, at: Address) -> Result<(), CudaError> {
        let call = "freeing memory";
        self.enter()?;
        self.not_in_capture(call)?;
        self.memory.remove(call, at.0)?;
        let ended = result::ctx::synchronize();
        // SAFETY: taken by `alloc`, and given back once; nothing uses it any more.
        let freed = unsafe { result::free_sync(at.0) };
        ended.and(freed).map_err(|e| said(call, e))
    }

    fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError> {
        let call = "taking pinned memory";
        self.enter()?;
        self.not_in_capture(call)?;
        // SAFETY: it is given back by `free_pinned` or on drop.
        let at = unsafe { result::malloc_host(bytes as usize, 0) }
            .map_err(|e| self.out_of_memory(call, bytes, e))?;
        self.pinned.0.insert(at as u64, bytes);
        Ok(Pinned(at as u64))
    }

    fn free_pinned(&mut self, at: Pinned) -> Result<(), CudaError> {
        let call = "freeing pinned memory";
        self.enter()?;
        self.not_in_capture(call)?;
        self.pinned.remove(call, at.0)?;
        let ended = result::ctx::synchronize();
        // SAFETY: taken by `alloc_pinned`, and given back once; nothing uses it any more.
        let freed = unsafe { result::free_host(at.0 as *mut c_void) };
        ended.and(freed).map_err(|e| said(call, e))
    }

    fn upload(&mut self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), CudaError> {
        self.enter()?;
        self.not_in_capture("an upload")?;
        self.memory.check("an upload", to.0, bytes.len() as u64)?;
        let queue = self.queue(stream)?;
        let staging = self.staging.as_mut();
        staging.ok_or_else(|| failed("an upload", "no pinned memory"))?.upload(queue, to, bytes)
    }

    fn download(&mut self, stream: Stream, from: Address, out: &mut [u8]) -> Result<(), CudaError> {
        let call = "a download";
        self.enter()?;
        self.not_in_capture(call)?;
        self.memory.check(call, from.0, out.len() as u64)?;
        let queue = self.queue(stream)?;
        // SAFETY: both sides hold that much, and the bytes stay borrowed until the copy has ended.
        let (copied, ended) = unsafe {
            (result::memcpy_dtoh_async(out, from.0, queue), result::stream::synchronize(queue))
        };
        copied.and(ended).map_err(|e| said(call, e))
    }

    fn copy(
        &mut self,
        stream: Stream,
        from: Address,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError> {
        self.enter()?;
        self.memory.check("a copy", from.0, bytes)?;
        self.memory.check("a copy", to.0, bytes)?;
        let queue = self.queue(stream)?;
        // SAFETY: both sides hold that much.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes as usize, queue) }
            .map_err(|e| said("a copy", e))
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
        self.enter()?;
        self.memory.check(call, from.0, bytes)?;
        self.pinned.check(call, to.0 + offset, bytes)?;
        let queue = self.queue(stream)?;
        // SAFETY: both sides hold that much, and pinned memory goes only when all work has ended.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2((to.0 + offset) as *mut c_void, from.0, bytes as usize, queue)
        }
        .result()
        .map_err(|e| said(call, e))
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
        self.enter()?;
        self.memory.check(call, to.0, bytes)?;
        self.pinned.check(call, from.0 + offset, bytes)?;
        let queue = self.queue(stream)?;
        // SAFETY: both sides hold that much, and pinned memory goes only when all work has ended.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                to.0,
                (from.0 + offset) as *const c_void,
                bytes as usize,
                queue,
            )
        }
        .result()
        .map_err(|e| said(call, e))
    }

    fn fill(&mut self, stream: Stream, at: Address, byte: u8, bytes: u64) -> Result<(), CudaError> {
        self.enter()?;
        self.memory.check("a fill", at.0, bytes)?;
        let queue = self.queue(stream)?;
        // SAFETY: there is that much.
        unsafe { result::memset_d8_async(at.0, byte, bytes as usize, queue) }
            .map_err(|e| said("a fill", e))
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<(), CudaError> {
        self.enter()?;
        let queue = self.queue(stream)?;
        self.modules.launch(queue, launch)
    }

    fn multiply(&mut self, stream: Stream, product: &Product) -> Result<(), CudaError> {
        self.enter()?;
        self.check_operands(product)?;
        let queue = self.queue(stream)?;
        let workspace = self.workspace(stream)?;
        let mut accumulate = product.accumulate;
        if product.bias != Address::default() && !product::adds_bias(product) {
            self.spread_bias(stream, product)?;
            accumulate = true;
        }
        // cuBLASLt has a name of its own for the driver's streams.
        self.products()?.multiply(queue.cast(), workspace, product, accumulate)
    }

    fn rank(&self) -> (u32, u32) {
        self.together.as_ref().map_or((0, 1), |(all, rank)| (*rank, all.devices()))
    }

    fn all_reduce(
        &mut self,
        stream: Stream,
        at: Address,
        count: u64,
        element: Element,
    ) -> Result<(), CudaError> {
        self.enter()?;
        self.not_in_capture(together::CALL)?;
        self.memory.check(together::CALL, at.0, count * element.bytes())?;
        let queue = self.queue(stream)?;
        match &self.together {
            Some((all, rank)) => all.add(*rank, queue.cast(), at, count, element),
            None => Ok(()),
        }
    }

    fn leave(&mut self) {
        if let Some((all, _)) = &self.together {
            all.abort();
        }
    }

    fn stream(&mut self) -> Result<Stream, CudaError> {
        self.enter()?;
        self.not_in_capture("a new stream")?;
        // Not the driver's own stream 0, which waits for all others and can't be recorded.
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| said("a new stream", e))?;
        self.queues.push(Queue { handle, workspace: None });
        Ok(Stream(self.queues.len() as u32 - 1))
    }

    fn synchronize(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.enter()?;
        self.not_in_capture("synchronize")?;
        let queue = self.queue(stream)?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(queue) }.map_err(|e| said("waiting for a stream", e))
    }

    fn event(&mut self) -> Result<Event, CudaError> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| said("a new mark", e))?;
        self.events.push(event);
        Ok(Event(self.events.len() as u32 - 1))
    }

    fn record(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.enter()?;
        let (queue, mark) = (self.queue(stream)?, self.mark(event)?);
        // SAFETY: both are alive.
        unsafe { result::event::record(mark, queue) }.map_err(|e| said("a mark", e))
    }

    fn wait(&mut self, stream: Stream, event: Event) -> Result<(), CudaError> {
        self.enter()?;
        let (queue, mark) = (self.queue(stream)?, self.mark(event)?);
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(queue, mark, flags) }
            .map_err(|e| said("waiting for a mark", e))
    }

    fn elapsed(&mut self, from: Event, to: Event) -> Result<f64, CudaError> {
        self.enter()?;
        self.not_in_capture("the time between two marks")?;
        let (from, to) = (self.mark(from)?, self.mark(to)?);
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(to) }.map_err(|e| said("waiting for a mark", e))?;
        Self::between(from, to)
    }

    fn begin_capture(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.enter()?;
        self.not_in_capture("a recording")?;
        // Before it begins, since memory can't be taken in it.
        self.workspace(stream)?;
        let queue = self.queue(stream)?;
        // Modules may be loaded in a recording; nothing else that the mode would forbid is done.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(queue, mode) }
            .map_err(|e| said("a recording", e))?;
        self.capturing = true;
        Ok(())
    }

    fn end_capture(&mut self, stream: Stream) -> Result<Graph, CudaError> {
        let call = "the end of a recording";
        self.enter()?;
        let queue = self.queue(stream)?;
        self.capturing = false;
        // SAFETY: the stream is alive.
        let graph = unsafe { result::stream::end_capture(queue) }.map_err(|e| said(call, e))?;
        // SAFETY: the graph was made just now; what is started later is made from it, so it can go.
        let made = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            made
        };
        self.graphs.push(Some(made.map_err(|e| said(call, e))?));
        Ok(Graph(self.graphs.len() as u32 - 1))
    }

    fn launch_graph(&mut self, stream: Stream, graph: Graph) -> Result<(), CudaError> {
        let call = "starting a recording";
        self.enter()?;
        self.not_in_capture(call)?;
        let queue = self.queue(stream)?;
        let made = self.graphs.get(graph.0 as usize).copied().flatten();
        let made = made.ok_or_else(|| failed(call, format!("there is no graph {}", graph.0)))?;
        // SAFETY: both are alive.
        unsafe { result::graph::launch(made, queue) }.map_err(|e| said(call, e))
    }

    fn free_graph(&mut self, graph: Graph) -> Result<(), CudaError> {
        let call = "freeing a recording";
        self.enter()?;
        let made = self.graphs.get_mut(graph.0 as usize).and_then(Option::take);
        let made = made.ok_or_else(|| failed(call, format!("there is no graph {}", graph.0)))?;
        // SAFETY: made by `end_capture`, destroyed once.
        unsafe { result::graph::exec_destroy(made) }.map_err(|e| said(call, e))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some((all, _)) = self.together.take() {
            all.close();
        }
        // A device that was lost answers each of these with the same error, which has nobody to go to.
        if self.enter().is_ok() {
            let _ = result::ctx::synchronize();
            // SAFETY: each of these was made by this device and is destroyed once; no work is left that uses it.
            unsafe {
                for graph in self.graphs.drain(..).flatten() {
                    let _ = result::graph::exec_destroy(graph);
                }
                self.products = None;
                for at in std::mem::take(&mut self.memory.0).into_keys() {
                    let _ = result::free_sync(at);
                }
                for at in std::mem::take(&mut self.pinned.0).into_keys() {
                    let _ = result::free_host(at as *mut c_void);
                }
                if let Some(staging) = &mut self.staging {
                    staging.release();
                }
                for event in self.events.drain(..) {
                    let _ = result::event::destroy(event);
                }
                for queue in self.queues.drain(..) {
                    let _ = result::stream::destroy(queue.handle);
                }
            }
            self.modules.unload();
        }
        // SAFETY: retained once in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

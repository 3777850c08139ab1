//! A driver without a device.

use std::collections::BTreeMap;

use crate::cuda::{
    Address, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch, Pinned,
    Product, Stream,
};

/// A driver that gives out numbers and does nothing: downloads are zeros, times are zero.
pub struct Null {
    info: DeviceInfo,
    next: u64,
    sizes: BTreeMap<u64, u64>,
    pinned: u64,
    streams: u32,
    events: u32,
    graphs: u32,
}

impl Null {
    /// As if it were this device.
    #[must_use]
    pub fn new(info: DeviceInfo) -> Self {
        let sizes = BTreeMap::new();
        Self { info, next: 256, sizes, pinned: 1, streams: 0, events: 0, graphs: 0 }
    }

    /// Gives the device a cache of so many bytes.
    pub fn set_l2(&mut self, bytes: u64) {
        self.info.l2 = bytes;
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.sizes.values().sum()
    }
}

impl Driver for Null {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&mut self) -> Result<DeviceMemory, CudaError> {
        let total = self.info.memory;
        Ok(DeviceMemory { free: total.saturating_sub(self.used()), total })
    }

    fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError> {
        let free = self.memory()?.free;
        if bytes > free {
            return Err(CudaError::OutOfMemory { wanted: bytes, free });
        }
        let at = self.next;
        self.sizes.insert(at, bytes);
        self.next += bytes.next_multiple_of(256).max(256);
        Ok(Address(at))
    }

    fn free(&mut self, at: Address) -> Result<(), CudaError> {
        let freed = self.sizes.remove(&at.0);
        freed.map(drop).ok_or_else(|| CudaError::Failed {
            call: "freeing".into(),
            why: format!("nothing was taken at {:#x}", at.0),
        })
    }

    fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError> {
        self.pinned += bytes;
        Ok(Pinned(self.pinned - bytes))
    }

    fn free_pinned(&mut self, _: Pinned) -> Result<(), CudaError> {
        Ok(())
    }

    fn upload(&mut self, _: Stream, _: Address, _: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }

    fn download(&mut self, _: Stream, _: Address, out: &mut [u8]) -> Result<(), CudaError> {
        out.fill(0);
        Ok(())
    }

    fn copy(&mut self, _: Stream, _: Address, _: Address, _: u64) -> Result<(), CudaError> {
        Ok(())
    }

    fn copy_out(
        &mut self,
        _: Stream,
        _: Address,
        _: Pinned,
        _: u64,
        _: u64,
    ) -> Result<(), CudaError> {
        Ok(())
    }

    fn copy_in(
        &mut self,
        _: Stream,
        _: Pinned,
        _: u64,
        _: Address,
        _: u64,
    ) -> Result<(), CudaError> {
        Ok(())
    }

    fn fill(&mut self, _: Stream, _: Address, _: u8, _: u64) -> Result<(), CudaError> {
        Ok(())
    }

    fn launch(&mut self, _: Stream, _: &Launch) -> Result<(), CudaError> {
        Ok(())
    }

    fn multiply(&mut self, _: Stream, _: &Product) -> Result<(), CudaError> {
        Ok(())
    }

    fn all_reduce(&mut self, _: Stream, _: Address, _: u64, _: Element) -> Result<(), CudaError> {
        Ok(())
    }

    fn stream(&mut self) -> Result<Stream, CudaError> {
        self.streams += 1;
        Ok(Stream(self.streams))
    }

    fn synchronize(&mut self, _: Stream) -> Result<(), CudaError> {
        Ok(())
    }

    fn event(&mut self) -> Result<Event, CudaError> {
        self.events += 1;
        Ok(Event(self.events - 1))
    }

    fn record(&mut self, _: Stream, _: Event) -> Result<(), CudaError> {
        Ok(())
    }

    fn wait(&mut self, _: Stream, _: Event) -> Result<(), CudaError> {
        Ok(())
    }

    fn elapsed(&mut self, _: Event, _: Event) -> Result<f64, CudaError> {
        Ok(0.0)
    }

    fn begin_capture(&mut self, _: Stream) -> Result<(), CudaError> {
        Ok(())
    }

    fn end_capture(&mut self, _: Stream) -> Result<Graph, CudaError> {
        self.graphs += 1;
        Ok(Graph(self.graphs - 1))
    }

    fn launch_graph(&mut self, _: Stream, _: Graph) -> Result<(), CudaError> {
        Ok(())
    }

    fn free_graph(&mut self, _: Graph) -> Result<(), CudaError> {
        Ok(())
    }
}

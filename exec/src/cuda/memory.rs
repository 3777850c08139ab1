//! Memory of a device and the starts of kernels on it.
//!
//! Everything that is taken is on one list, which a run cuts back to where it began, whatever it came to; the rest goes when
//! the device does. So nobody else has to give anything back, and no failure can forget to.

use std::collections::HashMap;

use batchmax_kernels::cuda::{
    Address, Arg, CudaError, Driver, Element, Event, Launch, Pinned, Product, Stream,
};

use super::recorded::{Recordings, Work};

/// The queue in which ops run.
pub(super) const MAIN: Stream = Stream(0);

/// Something that was taken.
#[derive(Clone, Copy)]
enum Taken {
    Device(Address),
    Pinned(Pinned),
}

/// A buffer that has a name, so that the next op of its kind takes it over.
struct Named {
    at: Address,
    bytes: u64,
    /// What was last uploaded, where the whole of it was.
    known: Option<Vec<u8>>,
}

/// A driver, and what was taken from it.
pub(super) struct Device<'d> {
    driver: &'d mut dyn Driver,
    taken: Vec<Taken>,
    named: HashMap<&'static str, Named>,
    /// Marks, and those of them that nobody uses.
    events: Vec<Event>,
    free_events: Vec<Event>,
    side: Option<Stream>,
    recordings: Recordings,
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        self.release(0);
    }
}

impl<'d> Device<'d> {
    pub(super) fn new(driver: &'d mut dyn Driver) -> Self {
        Self {
            driver,
            taken: Vec::new(),
            named: HashMap::new(),
            events: Vec::new(),
            free_events: Vec::new(),
            side: None,
            recordings: Recordings::default(),
        }
    }

    /// How much has been taken: what [`Self::release`] cuts back to.
    pub(super) fn mark(&self) -> usize {
        self.taken.len()
    }

    /// Gives back what was taken since the mark, and all buffers with names.
    pub(super) fn release(&mut self, mark: usize) {
        // Errors would only hide the one that led here; a driver that fails says so again.
        self.recordings.hold(false);
        let _ = self.recordings.forget(self.driver);
        for (_, named) in self.named.drain() {
            let _ = self.driver.free(named.at);
        }
        for taken in self.taken.drain(mark.min(self.taken.len())..).rev() {
            let _ = match taken {
                Taken::Device(at) => self.driver.free(at),
                Taken::Pinned(at) => self.driver.free_pinned(at),
            };
        }
        self.free_events.clone_from(&self.events);
    }

    /// The driver, for everything but the work of the main queue; what was held back is started before.
    pub(super) fn driver(&mut self) -> Result<&mut dyn Driver, CudaError> {
        self.recordings.flush(self.driver)?;
        Ok(self.driver)
    }

    /// From here on work of the main queue is started in stretches, those that come again as recordings; or at once, as before.
    pub(super) fn in_stretches(&mut self, on: bool) -> Result<(), CudaError> {
        self.recordings.flush(self.driver)?;
        self.recordings.hold(on);
        Ok(())
    }

    /// Takes memory until the next release.
    pub(super) fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError> {
        let at = self.driver()?.alloc(bytes.max(16))?;
        self.taken.push(Taken::Device(at));
        Ok(at)
    }

    /// The same, with every byte zero.
    pub(super) fn alloc_zeroed(&mut self, bytes: u64) -> Result<Address, CudaError> {
        let at = self.alloc(bytes)?;
        self.fill(at, 0, bytes.max(16))?;
        Ok(at)
    }

    /// Takes pinned memory until the next release.
    pub(super) fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError> {
        let at = self.driver()?.alloc_pinned(bytes.max(16))?;
        self.taken.push(Taken::Pinned(at));
        Ok(at)
    }

    /// Memory of the host's bytes.
    pub(super) fn alloc_of(&mut self, bytes: &[u8]) -> Result<Address, CudaError> {
        let at = self.alloc(bytes.len() as u64)?;
        self.upload(at, bytes)?;
        Ok(at)
    }

    /// The buffer of a name, with room for so many bytes; what it held is lost where it was smaller.
    pub(super) fn scratch(&mut self, name: &'static str, bytes: u64) -> Result<Address, CudaError> {
        let wanted = bytes.max(16);
        if let Some(named) = self.named.get_mut(name)
            && named.bytes >= wanted
        {
            named.known = None;
            return Ok(named.at);
        }
        if let Some(old) = self.named.remove(name) {
            self.driver()?.free(old.at)?;
        }
        // Buffers that grow with the caches don't grow every step.
        let bytes = wanted.next_power_of_two().min(wanted.saturating_add(wanted / 4)).max(wanted);
        let bytes = bytes.next_multiple_of(256);
        let at = self.driver()?.alloc(bytes)?;
        self.named.insert(name, Named { at, bytes, known: None });
        Ok(at)
    }

    /// The same, filled with bytes of the host, unless it holds them already. Only kernels that don't write to it may get it.
    pub(super) fn put(&mut self, name: &'static str, bytes: &[u8]) -> Result<Address, CudaError> {
        if let Some(named) = self.named.get(name)
            && named.known.as_deref() == Some(bytes)
        {
            return Ok(named.at);
        }
        let at = self.scratch(name, bytes.len() as u64)?;
        self.upload(at, bytes)?;
        if let Some(named) = self.named.get_mut(name) {
            named.known = Some(bytes.to_vec());
        }
        Ok(at)
    }

    /// [`Self::put`] of numbers.
    pub(super) fn put_words(
        &mut self,
        name: &'static str,
        words: &[u32],
    ) -> Result<Address, CudaError> {
        self.put(name, &bytes_of(words))
    }

    /// Copies bytes to the device.
    pub(super) fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), CudaError> {
        if bytes.is_empty() { Ok(()) } else { self.driver()?.upload(MAIN, to, bytes) }
    }

    /// Bytes of the device, once all work before has ended.
    pub(super) fn download(&mut self, from: Address, bytes: usize) -> Result<Vec<u8>, CudaError> {
        let mut out = vec![0; bytes];
        if bytes > 0 {
            self.driver()?.download(MAIN, from, &mut out)?;
        }
        Ok(out)
    }

    /// Numbers of the device.
    pub(super) fn words(&mut self, from: Address, count: usize) -> Result<Vec<u32>, CudaError> {
        Ok(words_of(&self.download(from, 4 * count)?))
    }

    /// Numbers of the device in single precision.
    pub(super) fn floats(&mut self, from: Address, count: usize) -> Result<Vec<f32>, CudaError> {
        Ok(self.words(from, count)?.into_iter().map(f32::from_bits).collect())
    }

    /// Copies inside the device.
    pub(super) fn copy(&mut self, from: Address, to: Address, bytes: u64) -> Result<(), CudaError> {
        if bytes == 0 { Ok(()) } else { self.work(Work::Copy { from, to, bytes }) }
    }

    /// Sets every byte.
    pub(super) fn fill(&mut self, at: Address, byte: u8, bytes: u64) -> Result<(), CudaError> {
        self.work(Work::Fill { at, byte, bytes })
    }

    /// Starts a kernel; an empty grid is no work.
    pub(super) fn launch(
        &mut self,
        kernel: &'static str,
        grid: [usize; 3],
        (block, shared): (u32, usize),
        args: Vec<Arg>,
    ) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = grid.map(|n| n as u32);
        self.work(Work::Launch(Launch { kernel, grid, block, shared: shared as u32, args }))
    }

    pub(super) fn multiply(&mut self, product: &Product) -> Result<(), CudaError> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        self.work(Work::Multiply(*product))
    }

    /// Which of the devices that share layers it is, and how many they are.
    pub(super) fn rank(&self) -> (u32, u32) {
        self.driver.rank()
    }

    /// Adds rows up over those devices. Never in a stretch: whether a sum is part of a recording has to be the same for all of
    /// them, and what else a stretch holds may depend on a device's own heads.
    pub(super) fn all_reduce(&mut self, rows: Rows, count: usize) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        let numbers = count as u64 * u64::from(rows.width);
        self.driver()?.all_reduce(MAIN, rows.at, numbers, rows.kind.element())
    }

    /// Tells them not to wait for this one.
    pub(super) fn leave(&mut self) {
        self.driver.leave();
    }

    fn work(&mut self, work: Work) -> Result<(), CudaError> {
        self.recordings.add(self.driver, work)
    }

    /// The queue beside the main one.
    pub(super) fn side(&mut self) -> Result<Stream, CudaError> {
        if let Some(side) = self.side {
            return Ok(side);
        }
        let side = self.driver()?.stream()?;
        self.side = Some(side);
        Ok(side)
    }

    /// A mark that nobody uses; [`Self::give_event`] brings it back.
    pub(super) fn take_event(&mut self) -> Result<Event, CudaError> {
        if let Some(event) = self.free_events.pop() {
            return Ok(event);
        }
        let event = self.driver()?.event()?;
        self.events.push(event);
        Ok(event)
    }

    pub(super) fn give_event(&mut self, event: Event) {
        self.free_events.push(event);
    }
}

/// Numbers as the device has them.
pub(super) fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// Numbers in single precision as the device has them.
pub(super) fn bytes_of_floats(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|x| x.to_ne_bytes()).collect()
}

pub(super) fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_ne_bytes(*b)).collect()
}

/// Numbers of a type in rows, as kernels take them by value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rows {
    pub(super) at: Address,
    pub(super) kind: Kind,
    pub(super) width: u32,
}

/// Types of numbers, as kernels name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32 = 0,
    F16 = 1,
    Bf16 = 2,
    Fp8 = 3,
}

impl Kind {
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    pub(super) fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::F16 => Element::F16,
            Self::Bf16 => Element::Bf16,
            Self::Fp8 => Element::Fp8,
        }
    }
}

impl Rows {
    pub(super) fn arg(self) -> Arg {
        let mut bytes = self.at.0.to_ne_bytes().to_vec();
        bytes.extend(bytes_of(&[self.kind as u32, self.width]));
        Arg::Bytes(bytes)
    }

    /// Bytes of so many rows.
    pub(super) fn bytes(self, rows: usize) -> u64 {
        rows as u64 * u64::from(self.width) * self.kind.bytes()
    }
}

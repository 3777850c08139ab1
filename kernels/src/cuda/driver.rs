//! What the CUDA executor asks of a driver. Whoever implements it moves bytes and starts kernels; it knows no op.

use std::fmt;

/// An address in the memory of a device; 0 is no memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Address {
    /// So many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// Memory of the host that a device can copy to and from while both go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pinned(pub u64);

/// A queue of work on a device. 0 is there from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stream(pub u32);

/// A mark in a stream that can be timed and waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub u32);

/// Recorded work that can be started again as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub u32);

/// A device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// As the driver names it.
    pub name: String,
    /// Its index among the devices of the machine.
    pub index: u32,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the cache that they share; 0 where that is not known.
    pub l2: u64,
    /// The newest CUDA that the driver serves, 12040 for 12.4.
    pub driver: u32,
}

impl DeviceInfo {
    /// Whether the kernels run on it: they need compute capability 8.0.
    #[must_use]
    pub fn runs_kernels(&self) -> bool {
        self.capability >= (8, 0)
    }
}

/// What a device runs at; what is not known is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditions {
    /// Version of the driver, 550.54.15.
    pub driver: Option<String>,
    /// Clock of the multiprocessors in MHz.
    pub clock_mhz: Option<u32>,
    /// Clock of the memory in MHz.
    pub memory_clock_mhz: Option<u32>,
    /// Temperature in degrees Celsius.
    pub temperature_c: Option<u32>,
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// An unsigned number of 4 bytes.
    U32(u32),
    /// An unsigned number of 8 bytes.
    U64(u64),
    /// A number in single precision.
    F32(f32),
    /// A number in double precision.
    F64(f64),
    /// An address; `Address(0)` where the kernel takes none.
    At(Address),
    /// A structure, passed by value: its bytes as C lays them out.
    Bytes(Vec<u8>),
}

/// A start of one kernel of `kernels/cuda`.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Its name there.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block: whole warps.
    pub block: u32,
    /// Bytes of shared memory that it is given.
    pub shared: u32,
    /// Its arguments in order.
    pub args: Vec<Arg>,
}

/// Type of the elements of a matrix on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Brain float.
    Bf16,
    /// 8-bit float e4m3, with a scale per tensor.
    Fp8,
}

impl Element {
    /// Compute capability from which on devices multiply such numbers.
    #[must_use]
    pub fn multiplied_from(self) -> (u32, u32) {
        if self == Self::Fp8 { (8, 9) } else { (8, 0) }
    }

    /// Bytes of one.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

/// `y[m, n] = scale x[m, k] w[n, k]^T (+ bias[n])`, or `y += ...`; all row by row, summed in single precision. Results have
/// the type of the operands or are in single precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Rows of `x` and `y`.
    pub m: u32,
    /// Rows of `w`, columns of `y`.
    pub n: u32,
    /// Columns of `x` and `w`.
    pub k: u32,
    /// Rows of activations.
    pub x: Address,
    /// Elements from a row of `x` to the next.
    pub x_stride: u32,
    /// Weights.
    pub w: Address,
    /// Type of `x` and `w`.
    pub element: Element,
    /// Scale of `w` where its type has one, else 1.
    pub scale: f32,
    /// `n` elements in single precision, or none.
    pub bias: Address,
    /// The result.
    pub y: Address,
    /// Elements from a row of `y` to the next.
    pub y_stride: u32,
    /// Type of `y`.
    pub out: Element,
    /// Adds to what `y` holds.
    pub accumulate: bool,
}

impl Product {
    /// Whether there is such a product on a device of that compute capability.
    ///
    /// # Errors
    /// What of it there is not.
    pub fn check(&self, capability: (u32, u32)) -> Result<(), String> {
        if self.m == 0 || self.n == 0 || self.k == 0 {
            return Err("a matrix has no rows or no columns".into());
        }
        if self.x_stride < self.k || self.y_stride < self.n {
            return Err("rows are longer than what lies between them".into());
        }
        let narrow = self.out == self.element || self.out == Element::F32;
        match self.element {
            Element::Fp8 => {
                if capability < self.element.multiplied_from() {
                    return Err("products of fp8 need compute capability 8.9".into());
                }
                if self.out == Element::Fp8 {
                    return Err("products of fp8 have wider results".into());
                }
                if [self.n, self.k, self.x_stride, self.y_stride]
                    .iter()
                    .any(|x| !x.is_multiple_of(16))
                {
                    return Err("products of fp8 need sizes and strides in multiples of 16".into());
                }
            }
            _ if !narrow => {
                return Err("results have the type of the operands, or single precision".into());
            }
            _ => {}
        }
        let whole = |at: Address, element: Element| at.0.is_multiple_of(element.bytes());
        if !whole(self.x, self.element)
            || !whole(self.w, self.element)
            || !whole(self.y, self.out)
            || !whole(self.bias, Element::F32)
        {
            return Err("an operand is not aligned to its numbers".into());
        }
        Ok(())
    }

    /// Where each operand lies, and how many bytes it spans.
    pub fn operands(&self) -> impl Iterator<Item = (Address, u64)> {
        let spans = |rows: u32, stride: u32, columns: u32, element: Element| {
            let all = u64::from(rows.saturating_sub(1)) * u64::from(stride) + u64::from(columns);
            all * element.bytes()
        };
        let bias = (self.bias != Address::default())
            .then(|| (self.bias, u64::from(self.n) * Element::F32.bytes()));
        [
            (self.x, spans(self.m, self.x_stride, self.k, self.element)),
            (self.w, spans(self.n, self.k, self.k, self.element)),
            (self.y, spans(self.m, self.y_stride, self.n, self.out)),
        ]
        .into_iter()
        .chain(bias)
    }
}

/// Bytes of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not in use by anybody.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// Why a device could not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaError {
    /// There is no driver, or none that is new enough, or a library is missing.
    Unavailable {
        /// What is missing, and what to do.
        why: String,
    },
    /// There is no device of that index.
    NoDevice {
        /// The index.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// There is not enough memory.
    OutOfMemory {
        /// Bytes that were wanted.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The driver refused a call, or an earlier kernel failed.
    Failed {
        /// What was asked of it.
        call: String,
        /// What it said.
        why: String,
    },
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { why } => f.write_str(why),
            Self::NoDevice { index, count } => {
                write!(
                    f,
                    "cuda:{index}: there are {count} CUDA devices; hint: batchmax devices lists them"
                )
            }
            Self::OutOfMemory { wanted, free } => write!(
                f,
                "the device has {free} bytes free, {wanted} more are needed; hint: lower --batch or --kv-memory"
            ),
            Self::Failed { call, why } => write!(f, "CUDA, {call}: {why}"),
        }
    }
}

impl std::error::Error for CudaError {}

/// A device with its driver.
///
/// Everything that takes a stream is put into that queue and may not have happened yet when the call returns, except
/// `download`, which waits for it. Errors of earlier work may show up in later calls.
pub trait Driver: Send {
    /// The device.
    fn device(&self) -> &DeviceInfo;

    /// Which it is of the devices that were opened together, and how many they are.
    fn rank(&self) -> (u32, u32) {
        (0, 1)
    }

    /// Its memory now.
    ///
    /// # Errors
    /// What the driver said.
    fn memory(&mut self) -> Result<DeviceMemory, CudaError>;

    /// Takes memory, aligned to 256 bytes; what it holds is unknown.
    ///
    /// # Errors
    /// `OutOfMemory`, or what the driver said.
    fn alloc(&mut self, bytes: u64) -> Result<Address, CudaError>;

    /// Gives it back, once all work that was started before has ended.
    ///
    /// # Errors
    /// What the driver said.
    fn free(&mut self, at: Address) -> Result<(), CudaError>;

    /// Takes pinned memory of the host.
    ///
    /// # Errors
    /// `OutOfMemory`, or what the driver said.
    fn alloc_pinned(&mut self, bytes: u64) -> Result<Pinned, CudaError>;

    /// Gives it back.
    ///
    /// # Errors
    /// What the driver said.
    fn free_pinned(&mut self, at: Pinned) -> Result<(), CudaError>;

    /// Copies bytes of the host to the device. They may be dropped when the call returns.
    ///
    /// # Errors
    /// What the driver said.
    fn upload(&mut self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), CudaError>;

    /// Copies bytes of the device to the host, and waits for the stream until they are there.
    ///
    /// # Errors
    /// What the driver said.
    fn download(&mut self, stream: Stream, from: Address, out: &mut [u8]) -> Result<(), CudaError>;

    /// Copies inside the device; the two don't overlap.
    ///
    /// # Errors
    /// What the driver said.
    fn copy(
        &mut self,
        stream: Stream,
        from: Address,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError>;

    /// Copies from the device to pinned memory, from `offset` bytes behind its start on.
    ///
    /// # Errors
    /// What the driver said.
    fn copy_out(
        &mut self,
        stream: Stream,
        from: Address,
        to: Pinned,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CudaError>;

    /// Copies from pinned memory to the device.
    ///
    /// # Errors
    /// What the driver said.
    fn copy_in(
        &mut self,
        stream: Stream,
        from: Pinned,
        offset: u64,
        to: Address,
        bytes: u64,
    ) -> Result<(), CudaError>;

    /// Sets every byte.
    ///
    /// # Errors
    /// What the driver said.
    fn fill(&mut self, stream: Stream, at: Address, byte: u8, bytes: u64) -> Result<(), CudaError>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// What the driver said.
    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<(), CudaError>;

    /// Multiplies two matrices.
    ///
    /// # Errors
    /// What the library said, or that it has no such product.
    fn multiply(&mut self, stream: Stream, product: &Product) -> Result<(), CudaError>;

    /// Adds numbers up over all devices that were opened together: each gets the sums in place of its own, the same bits
    /// everywhere. Every one of them has to ask for it, with as many numbers of the same type, in the same order as for
    /// other sums. Not while work is recorded.
    ///
    /// # Errors
    /// What the library said, or that one of the others left.
    fn all_reduce(
        &mut self,
        stream: Stream,
        at: Address,
        count: u64,
        element: Element,
    ) -> Result<(), CudaError>;

    /// Tells the others not to wait for this device: sums that they ask for end with an error from here on.
    fn leave(&mut self) {}

    /// A second queue beside stream 0.
    ///
    /// # Errors
    /// What the driver said.
    fn stream(&mut self) -> Result<Stream, CudaError>;

    /// Waits until all work of a stream has ended.
    ///
    /// # Errors
    /// What the driver said, of any work before.
    fn synchronize(&mut self, stream: Stream) -> Result<(), CudaError>;

    /// A mark that belongs to no stream yet.
    ///
    /// # Errors
    /// What the driver said.
    fn event(&mut self) -> Result<Event, CudaError>;

    /// Puts the mark behind all work of a stream so far.
    ///
    /// # Errors
    /// What the driver said.
    fn record(&mut self, stream: Stream, event: Event) -> Result<(), CudaError>;

    /// Lets the work that comes to a stream wait for the mark.
    ///
    /// # Errors
    /// What the driver said.
    fn wait(&mut self, stream: Stream, event: Event) -> Result<(), CudaError>;

    /// Seconds between two marks; waits for the second.
    ///
    /// # Errors
    /// What the driver said.
    fn elapsed(&mut self, from: Event, to: Event) -> Result<f64, CudaError>;

    /// From here on the work of a stream is recorded, not done, until `end_capture`; so is that of streams which wait for
    /// a mark in it, for which this stream has to wait before the end. Meanwhile nothing is taken, given back, uploaded,
    /// downloaded or waited for, and marks in a recording have no times.
    ///
    /// # Errors
    /// What the driver said.
    fn begin_capture(&mut self, stream: Stream) -> Result<(), CudaError>;

    /// Ends the recording.
    ///
    /// # Errors
    /// What the driver said.
    fn end_capture(&mut self, stream: Stream) -> Result<Graph, CudaError>;

    /// Does all recorded work in a stream.
    ///
    /// # Errors
    /// What the driver said.
    fn launch_graph(&mut self, stream: Stream, graph: Graph) -> Result<(), CudaError>;

    /// Forgets a recording.
    ///
    /// # Errors
    /// What the driver said.
    fn free_graph(&mut self, graph: Graph) -> Result<(), CudaError>;
}

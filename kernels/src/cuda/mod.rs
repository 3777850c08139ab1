//! The CUDA kernels and who runs them.

mod driver;

pub use driver::{
    Address, Arg, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch,
    Pinned, Product, Stream,
};

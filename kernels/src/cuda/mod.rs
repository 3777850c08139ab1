//! The CUDA kernels and who runs them.

mod driver;
#[cfg(all(feature = "emulated", unix))]
pub mod emulated;
#[cfg(feature = "emulated")]
pub mod recording;

pub use driver::{
    Address, Arg, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph, Launch,
    Pinned, Product, Stream,
};

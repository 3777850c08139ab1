//! The CUDA kernels and who runs them.

#[cfg(feature = "cuda")]
pub mod device;
mod driver;
#[cfg(all(feature = "emulated", unix))]
pub mod emulated;
#[cfg(feature = "emulated")]
pub mod recording;
#[cfg(feature = "cuda")]
mod table;

pub use driver::{
    Address, Arg, Conditions, CudaError, DeviceInfo, DeviceMemory, Driver, Element, Event, Graph,
    Launch, Pinned, Product, Stream,
};
